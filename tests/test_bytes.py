"""Bytes per token, compared with the text that SentencePiece itself decodes; and the audit.

Two tokenizers are trained here: `lossless` adds nothing to the text, `prefixed` prepends a space to every document.
"""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece as spm
from conftest import make_documents, write_shard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import run_audit
from shards import EMOJI, MARK, PLAIN, train_model

import train_gpt
from train_gpt import TokenBytes, TokenStream, UserError

CHECKED = settings()  # from the profile that conftest.py loads

DOCUMENTS = [
    "the king of night",
    f"na\u00efve caf\u00e9 \u6d77 and {EMOJI}{EMOJI} \u2603",  # the last three become byte pieces
    "\n\nthe  king   of     sea\t\r\n  indented  \n",
    "sea" + " " * 17 + "sea ",
    "\n",
    "thethethe,the;king<s></s><unk><0x41>",  # names of pieces are plain text here
    "\u00a0\u3000\u200bthe\u2028king",
    " the",
    "  of sea",
    " ",
]
SIZE = len("".join(DOCUMENTS).encode())


def load(path, data: bytes) -> SimpleNamespace:
    path.write_bytes(data)
    model = spm.SentencePieceProcessor(model_file=str(path))
    return SimpleNamespace(path=str(path), model=model, size=model.vocab_size(), table=TokenBytes(str(path)))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """`prefixed` also has a padding piece and a user-defined symbol."""
    folder, documents = tmp_path_factory.mktemp("tokenizers"), make_documents(150, seed=3)
    plain = PLAIN | {"character_coverage": 1.0}
    other = {"add_dummy_prefix": True, "pad_id": 3, "user_defined_symbols": ["<|x|>"]}
    made = {"lossless": plain, "prefixed": plain | other}
    return {name: load(folder / f"{name}.model", train_model(documents, 330, **how)) for name, how in made.items()}


@pytest.fixture(params=["lossless", "prefixed"])
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


@pytest.fixture
def lossless(tokenizers):
    return tokenizers["lossless"]


@pytest.fixture
def prefixed(tokenizers):
    return tokenizers["prefixed"]


def tokens_of(tokenizer, documents) -> list[int]:
    """Each document preceded by its start token, as in the published shards."""
    return [token for text in documents for token in [tokenizer.model.bos_id(), *tokenizer.model.encode(text)]]


@pytest.fixture
def stream_of(tmp_path):
    """Function: a validation stream of these tokens."""

    def write(tokens, vocab_size):
        write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
        return TokenStream(str(tmp_path), "val", vocab_size)

    return write


def weigh(tokenizer, tokens) -> int:
    return tokenizer.table.count(np.array(tokens, dtype=np.uint16))


# The table


def test_every_piece_weighs_what_it_adds_to_the_decoded_text(tokenizer):
    """The decoder is the oracle: a piece after an ordinary one adds exactly its byte count to the decoded text."""
    model, before = tokenizer.model, tokenizer.model.encode("x")[-1]
    without = len(model.decode([before]).encode())
    kinds = set()
    for token in range(tokenizer.size):
        if model.is_byte(token):
            kinds.add("byte")
            assert weigh(tokenizer, [before, token]) == weigh(tokenizer, [model.bos_id(), token]) == 1
        elif model.is_unknown(token):
            assert weigh(tokenizer, [before, token]) == 0
        else:
            kinds.add("control" if model.is_control(token) else "text")
            added = len(model.decode([before, token]).encode()) - without
            assert weigh(tokenizer, [before, token]) == added, model.id_to_piece(token)
    assert kinds == {"byte", "control", "text"}


def test_every_pair_at_the_start_of_a_document(prefixed):
    """After a boundary the first space belongs to the tokenizer; further ones, in this piece or the next, do not."""
    model = prefixed.model
    boundaries = [model.bos_id(), model.eos_id(), model.pad_id(), model.unk_id()]
    assert np.flatnonzero(prefixed.table.boundary).tolist() == sorted(boundaries)
    for token in range(prefixed.size):
        if model.id_to_piece(token).startswith(MARK):
            for boundary in boundaries:
                ids = [boundary, token, *model.encode("the king")]  # starts with its own space
                assert weigh(prefixed, ids) == len(model.decode(ids[1:]).encode())


def test_spaces_inside_a_piece_weigh_one_byte_each(tmp_path):
    options = PLAIN | {"split_by_whitespace": False, "allow_whitespace_only_pieces": True}
    tokenizer = load(tmp_path / "tok.model", train_model(["a b" + " " * 8 + "a b"] * 50, 280, **options))
    pieces = [tokenizer.model.id_to_piece(token) for token in range(tokenizer.size)]
    assert any(set(piece) == {MARK} and len(piece) > 1 for piece in pieces)
    assert any(MARK in piece[1:] and piece[0] == "a" for piece in pieces)
    before = tokenizer.model.piece_to_id("a")
    for token, piece in enumerate(pieces):
        if MARK in piece:
            assert weigh(tokenizer, [before, token]) == len(piece), piece  # each character is one byte of text
    for text in ("a b", "b" + " " * 30 + "a", "a b" + " " * 8 + "a b"):
        assert weigh(tokenizer, tokens_of(tokenizer, [text])) == len(text)


# Any text except U+2581 itself, which SentencePiece takes for a space.
WORDS = st.sampled_from([" ", "   ", "\n", "the", " king", "\u00e9", EMOJI])
CHARACTERS = st.characters(exclude_categories=("Cs",), exclude_characters=MARK)
TEXTS = st.lists(WORDS | CHARACTERS | st.text(CHARACTERS, max_size=5), max_size=12).map("".join)


@CHECKED
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
@example(texts=["", "", "a"])
@example(texts=DOCUMENTS)
def test_any_text_weighs_its_bytes(tokenizers, texts):
    for tokenizer in tokenizers.values():
        assert weigh(tokenizer, tokens_of(tokenizer, texts)) == len("".join(texts).encode())


# The audit


def stated_as(size, kept=None):
    """What a manifest states about the validation text."""
    return {"bytes": size, "token_bytes": size if kept is None else kept}


def test_audit_passes_and_says_what_it_proved(tokenizer, stream_of):
    model, tokens = tokenizer.model, tokens_of(tokenizer, DOCUMENTS)
    line, facts = run_audit(tokenizer.table, stream_of(tokens, tokenizer.size), stated_as(SIZE))
    assert line.startswith("byte_audit:") and "\n" not in line
    assert f"{len(tokens)} tokens in {len(DOCUMENTS)} documents decode to the {SIZE} bytes they weigh;" in line
    digest = hashlib.sha256(np.array(tokens, dtype="<u2").tobytes()).hexdigest()
    assert facts == {"val_bytes": SIZE, "bytes_proved": True, "sha256_val_tokens": digest}
    # Additional control pieces between documents make no difference.
    bos, eos = model.bos_id(), model.eos_id()
    tokens = [token for text in DOCUMENTS for token in [bos, *model.encode(text), eos, eos]]
    line = run_audit(tokenizer.table, stream_of(tokens, tokenizer.size), stated_as(SIZE))[0]
    assert f"decode to the {SIZE} bytes they weigh" in line


def change_counts(which, change):
    """A table whose byte counts are wrong for some tokens."""

    class Wrong(TokenBytes):
        def __init__(self, *args):
            super().__init__(*args)
            chosen = {"bytes": [*self.byte_ids], "leading": self.leading_space, "start": self.start}[which]
            self.byte_count[chosen] += change

    return Wrong


class NoBoundaries(TokenBytes):
    def count(self, tokens):
        return int(self.byte_count[tokens[1:]].sum() + self.leading_space[tokens[1:]].sum())


# A space counted twice; a byte piece as a non-ASCII character, and by its name <0x41>; <s> by its name.
WRONG_COUNTS = [("leading", 1), ("bytes", 2), ("bytes", 5), ("start", 3)]


@pytest.mark.parametrize("wrong", [NoBoundaries, *(change_counts(*args) for args in WRONG_COUNTS)])
def test_audit_refuses_a_wrong_table(prefixed, stream_of, wrong):
    """The counts are derived from the pieces: a mismatch between them is a bug, not a fault of the data."""
    stream = stream_of(tokens_of(prefixed, DOCUMENTS), prefixed.size)
    with pytest.raises(AssertionError, match=r"the first tokens count \d+ bytes and spell \d+"):
        run_audit(wrong(prefixed.path, prefixed.size), stream)


def spell_spaces_twice(table):
    table.pieces = [b" " + piece if token in table.leading else piece for token, piece in enumerate(table.pieces)]


def spell_bytes_by_name(table):
    for token in table.byte_ids:
        table.pieces[token] = table.model.id_to_piece(token).encode()


def spell_backwards(table):
    """The same number of bytes, but different ones."""
    for token in range(table.model.vocab_size()):
        if table.pieces[token] and token not in table.byte_ids:
            table.pieces[token] = table.pieces[token].decode()[::-1].encode()


def spell_the_first_space(table):
    table.strips_first_space = False


@pytest.mark.parametrize("wrong", [spell_spaces_twice, spell_bytes_by_name, spell_backwards, spell_the_first_space])
def test_audit_refuses_pieces_that_are_not_the_text(prefixed, stream_of, wrong):
    """The table agrees with its pieces, but the pieces differ from what the tokenizer decodes."""

    class Wrong(TokenBytes):
        def load_sentencepiece(self, path):
            super().load_sentencepiece(path)
            wrong(self)

    stream = stream_of(tokens_of(prefixed, DOCUMENTS), prefixed.size)
    with pytest.raises(UserError, match=r"fineweb_val_.*decodes .*spell.*use the tokenizer of the shards"):
        run_audit(Wrong(prefixed.path, prefixed.size), stream)


def test_a_model_that_strips_spaces_drops_a_first_one(tmp_path, stream_of):
    """The published models are of this kind: their documents have no spaces at their ends."""
    model = train_model(make_documents(150, seed=3), 330, add_dummy_prefix=False, remove_extra_whitespaces=True)
    tokenizer = load(tmp_path / "tok.model", model)
    tokens = tokens_of(tokenizer, [" the king", "of  sea "])
    assert tokens == tokens_of(tokenizer, ["the king", "of sea"])
    line, facts = run_audit(tokenizer.table, stream_of(tokens, tokenizer.size), stated_as(len("the kingof sea")))
    assert "decode to the 14 bytes they weigh" in line and facts["val_bytes"] == 14
    # A space piece after a boundary still adds nothing, as in the published rule.
    first = tokenizer.model.piece_to_id(MARK + "the")
    assert weigh(tokenizer, [tokenizer.model.bos_id(), first]) == 3


def test_audit_refuses_the_tokenizer_of_other_shards(lossless, prefixed, stream_of):
    """Detected by invalid UTF-8, by out-of-range ids, or else by the true byte count: any tokens spell some text."""
    texts, vocab_size = [f"{text} \u2603" for text in DOCUMENTS], max(lossless.size, prefixed.size) + 1
    size = len("".join(texts).encode())
    for tokenizer, other in ((lossless, prefixed), (prefixed, lossless)):
        tokens = tokens_of(tokenizer, texts)
        run_audit(tokenizer.table, stream_of(tokens, tokenizer.size), stated_as(size))
        stream = stream_of([min(token, other.size - 1) for token in tokens], other.size)
        refusal = f"use the tokenizer of the shards|use the shards' tokenizer|manifest.json says {size}:"
        with pytest.raises(UserError, match=refusal):
            run_audit(other.table, stream, stated_as(size))
    (letter,) = lossless.model.encode("e")
    broken = [letter, *(token for token in reversed(range(lossless.size)) if lossless.model.is_byte(token)), letter]
    with pytest.raises(UserError, match="use the tokenizer of the shards"):  # bytes that are not valid UTF-8
        run_audit(lossless.table, stream_of(broken, lossless.size))
    stream = stream_of([*tokens_of(lossless, texts), lossless.size], vocab_size)
    with pytest.raises(UserError, match=f"has no token {lossless.size}: use the shards' tokenizer"):
        run_audit(TokenBytes(lossless.path, vocab_size), stream)


def test_audit_names_documents_with_unknown_tokens(lossless, stream_of):
    """Text that the tokenizer could not encode is lost: it counts zero bytes, and only the rest can be compared."""
    whole = tokens_of(lossless, ["the king", "of sea"])
    tokens = [*whole, lossless.model.unk_id(), *lossless.model.encode(" night")]
    line, facts = run_audit(lossless.table, stream_of(tokens, lossless.size))
    size = len("the kingof sea night")
    assert f"decode to the {size} bytes they weigh (1 documents hold unknown letters" in line
    assert facts["val_bytes"] == size and not facts["bytes_proved"]


def test_unknown_letters_of_a_model_without_byte_fallback_are_named(tmp_path, stream_of):
    """SentencePiece's default: it decodes an unknown letter to a symbol that the text does not contain."""
    options = PLAIN | {"add_dummy_prefix": True, "byte_fallback": False}
    tokenizer = load(tmp_path / "tok.model", train_model(make_documents(150, seed=3), 60, **options))
    texts = ["the king", "of the \u03b1 sea", "night \u03b1\u03b2"]
    tokens = tokens_of(tokenizer, texts)
    assert tokens.count(tokenizer.model.unk_id()) == 2  # consecutive letters become one token
    size, kept = len("".join(texts).encode()), "".join(texts).replace("\u03b1", "").replace("\u03b2", "")
    weighed = len(kept) - 1  # text after an unknown letter follows a boundary, where a space adds nothing
    line, facts = run_audit(tokenizer.table, stream_of(tokens, tokenizer.size), stated_as(size, weighed))
    assert f"decode to the {weighed} bytes they weigh (2 documents hold unknown letters" in line
    assert f"bytes:lossy: of {size} in the text" in line
    assert facts["val_bytes"] == weighed and not facts["bytes_proved"]


def bytes_of(tokenizer, tokens) -> int:
    """Bytes that lossless tokens add to the text, counted one by one."""
    model, size = tokenizer.model, 0
    for token in tokens:
        text = "" if model.is_control(token) else model.id_to_piece(token).replace(MARK, " ")
        size += 1 if model.is_byte(token) else len(text.encode())
    return size


@pytest.mark.parametrize("begins_with_bos", [True, False])
def test_audit_of_a_part_leaves_nothing_out(lossless, stream_of, monkeypatch, begins_with_bos):
    """Wherever the part ends, even inside a character; and all tokens are counted however few are decoded."""
    texts = [f"the king {EMOJI}", EMOJI * 5, "\u2603\u2603 night", "sea"]
    tokens, bos = tokens_of(lossless, texts)[not begins_with_bos :], lossless.model.bos_id()
    size = len("".join(texts).encode())
    stream = stream_of(tokens, lossless.size)
    for limit in range(1, len(tokens) + 1):
        monkeypatch.setattr(train_gpt, "AUDIT_TOKENS", limit)
        line = run_audit(lossless.table, stream)[0]
        audited, documents = bytes_of(lossless, tokens[:limit]), tokens[:limit].count(bos)
        assert f" {limit} tokens in {documents} documents decode to the {audited} bytes they weigh;" in line
        assert f"all {len(tokens)} tokens weigh {size - 3 * (not begins_with_bos)} bytes" in line


@pytest.mark.parametrize("left_out", [1, 2])
def test_a_shard_that_ends_or_begins_inside_a_character(tokenizer, stream_of, left_out):
    """As third-party shards may: each byte piece counts as one byte, whatever symbol the decoder substitutes."""
    tokens, end = tokens_of(tokenizer, ["the king", "sea \u2603"]), len("the kingsea ")
    assert all(tokenizer.model.is_byte(token) for token in tokens[-3:])
    line, facts = run_audit(tokenizer.table, stream_of(tokens[:-left_out], tokenizer.size))
    assert f"decode to the {end + 3 - left_out} bytes they weigh;" in line
    assert facts["val_bytes"] == end + 3 - left_out
    begun = [*tokens[-3:][left_out:], *tokens_of(tokenizer, ["the king"])]
    line, facts = run_audit(tokenizer.table, stream_of(begun, tokenizer.size))
    # The first token has no predecessor and is not a target, so its bytes are not counted.
    assert f"decode to the {3 - left_out + 8} bytes they weigh; all {len(begun)} tokens weigh" in line


# The manifest


def test_stated_bytes_of_a_long_text(lossless, monkeypatch):
    """Tokens are counted in blocks of 2^24; none may be lost, or lose its context, where two blocks meet."""
    monkeypatch.setattr(train_gpt, "AUDIT_TOKENS", 100)
    model = lossless.model
    period = np.array([model.bos_id(), *model.encode("the king \u6d77 of sea")], dtype=np.uint16)
    length, size = 2**24 + 1000, len("the king \u6d77 of sea".encode())
    full, rest = divmod(length, len(period))
    stated = full * size + weigh(lossless, period[:rest])

    class Stream:
        pattern = "a long text"

        def __len__(self):
            return length

        def read(self, start, count):
            assert 0 <= start < start + count <= length  # the end must not wrap
            return np.resize(np.roll(period, -start), count)

    line = run_audit(lossless.table, Stream(), stated_as(stated))[0]
    assert f"all {length} tokens weigh {stated} bytes (bytes:proved" in line


def test_what_the_manifest_states(lossless, stream_of):
    stream = stream_of(tokens_of(lossless, DOCUMENTS), lossless.size)
    for stated, proved, words in (
        (None, False, "not proved: no manifest.json states the true bytes"),
        ({"bytes": SIZE, "tokens": 5}, True, "bytes:proved by manifest.json"),
        ({"bytes": SIZE + 9, "token_bytes": SIZE}, False, f"bytes:lossy: of {SIZE + 9} in the text"),
    ):
        line, facts = run_audit(lossless.table, stream, stated)
        assert facts["bytes_proved"] is proved and facts["val_bytes"] == SIZE and f"({words})" in line
    for wrong in (SIZE - 1, SIZE + 1, 0):
        with pytest.raises(UserError, match=rf": {SIZE} bytes, \S+manifest.json says {wrong}: .*again"):
            run_audit(lossless.table, stream, stated_as(wrong))


MALFORMED = ["", "{", "[]", "{}", '{"splits": {}}', '{"splits": {"val": {}}}', '{"splits": {"val": 5}}', "\udcff"]
MALFORMED += ['{"splits": {"val": {"bytes": null}}}', '{"splits": {"val": {"bytes": "many"}}}']


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_manifest(lossless, stream_of, tmp_path, text):
    path = tmp_path / "manifest.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    stream = stream_of(tokens_of(lossless, DOCUMENTS), lossless.size)
    with pytest.raises(UserError, match=r"manifest.json has no splits.val.bytes .*again") as caught:
        train_gpt.audit(lossless.table, stream, str(tmp_path))
    assert str(path) in str(caught.value)


def test_a_whole_text_scored_by_other_bytes_than_the_audit_counted_is_no_result():
    stopwatch = train_gpt.Stopwatch(lambda: None)
    trainer = SimpleNamespace(config=train_gpt.Config(), runtime=None, steps=1, stopwatch=stopwatch)
    with pytest.raises(UserError, match="scored 10 of 11 bytes"):
        train_gpt.write_result(trainer, None, SimpleNamespace(label="", bytes=10), {}, {"val_bytes": 11})


# Unusable tokenizers


def test_unused_pieces_weigh_nothing(lossless, tmp_path):
    """A piece is a protocol buffer message: its length, its text, its score; the appended field says UNUSED."""
    data, name = Path(lossless.path).read_bytes(), f"{MARK}the".encode()
    at = data.index(b"\x0a" + bytes([len(name)]) + name + b"\x15")
    end = at + data[at - 1]
    data = data[: at - 1] + bytes([end - at + 2]) + data[at:end] + b"\x18\x05" + data[end:]
    token, table = lossless.model.piece_to_id(MARK + "the"), load(tmp_path / "tok.model", data).table
    assert table.model.is_unused(token) and table.boundary[token] and not table.leading_space[token]
    assert table.byte_count[token] == 0 and lossless.table.byte_count[token] == 3
    ids = table.model.encode("of the king")
    assert token not in ids and table.count(np.array([table.model.bos_id(), *ids])) == 11


def test_a_tokenizer_that_cannot_be_used_is_named(lossless, tmp_path):
    path, whole = tmp_path / "tok.model", Path(lossless.path).read_bytes()
    for data, words in (
        (train_model(["\u6d77" * 9], 300, **PLAIN), "has no piece for a single space (U+2581): use another"),
        (whole[:-100], "is not a SentencePiece model: make or fetch it again"),
        (b"", "is not a SentencePiece model"),
        (b"not a model", "is not a SentencePiece model"),
        (b"\0" * 2000, "is not a SentencePiece model"),
        (bytes(range(256)) * 4, "is not a SentencePiece model"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError) as caught:
            TokenBytes(str(path), lossless.size)
        assert f"{path} {words}" in str(caught.value)
    for missing in (tmp_path / "missing.model", tmp_path):
        with pytest.raises(UserError) as caught:
            TokenBytes(str(missing), 1024)
        assert f"TOKENIZER_PATH={missing} does not exist" in str(caught.value)
        assert "python data/prepare_shakespeare.py" in str(caught.value)
    for vocab_size in (2, 1024, 65536):
        with pytest.raises(UserError) as caught:
            TokenBytes(lossless.path, vocab_size)
        found = f"VOCAB_SIZE={vocab_size}, but TOKENIZER_PATH={lossless.path} has {lossless.size} pieces: set that,"
        assert found in str(caught.value)
