"""Bytes: what each token weighs, against text decoded by SentencePiece itself; and the audit that refuses a lie.

Two tokenizers are trained here: `lossless` adds nothing to the text, `prefixed` puts a space before every document."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece as spm
from conftest import make_documents, write_shard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import run_audit

import train_gpt
from train_gpt import TokenBytes, TokenStream, UserError

CHECKED = settings()  # those of the profile that conftest.py loads
SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # piece types of sentencepiece_model.proto

DOCUMENTS = [
    "the king of night",
    "na\u00efve caf\u00e9 \u6d77 and \U0001f600\U0001f600 \u2603",  # the last three come as byte pieces
    "\n\nthe  king   of     sea\t\r\n  indented  \n",
    "sea" + " " * 17 + "sea ",
    "\n",
    "thethethe,the;king<s></s><unk><0x41>",  # names of pieces are text here
    "\u00a0\u3000\u200bthe\u2028king",
]


def train(folder, name, **options):
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(make_documents(150, seed=3)),
        model_prefix=str(folder / name),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return str(folder / f"{name}.model")


@pytest.fixture(scope="module", params=["lossless", "prefixed"])
def tokenizer(request, lossless, prefixed):
    return {"lossless": lossless, "prefixed": prefixed}[request.param]


def load(path) -> SimpleNamespace:
    model = spm.SentencePieceProcessor(model_file=path)
    return SimpleNamespace(path=path, model=model, size=model.vocab_size(), table=TokenBytes(path, model.vocab_size()))


@pytest.fixture(scope="module")
def lossless(tmp_path_factory):
    return load(train(tmp_path_factory.mktemp("lossless"), "tok", add_dummy_prefix=False))


@pytest.fixture(scope="module")
def prefixed(tmp_path_factory):
    """With a space before each document, a padding piece and a user-defined symbol."""
    return load(train(tmp_path_factory.mktemp("prefixed"), "tok", pad_id=3, user_defined_symbols=["<|x|>"]))


def tokens_of(tokenizer, documents) -> list[int]:
    """Each document after its start token, as in the published shards."""
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


def test_documents_weigh_their_bytes(tokenizer):
    for text in DOCUMENTS:
        assert weigh(tokenizer, tokens_of(tokenizer, [text])) == len(text.encode()), text
    assert weigh(tokenizer, tokens_of(tokenizer, DOCUMENTS)) == sum(len(text.encode()) for text in DOCUMENTS)


def test_every_piece_weighs_what_it_adds_to_the_decoded_text(tokenizer):
    """The oracle is the decoder: a piece after an ordinary one adds exactly as many bytes as it weighs."""
    model, before = tokenizer.model, tokenizer.model.encode("x")[-1]
    without = len(model.decode([before]).encode())
    kinds = set()
    for token in range(tokenizer.size):
        if model.is_byte(token):
            kinds.add("byte")
            assert weigh(tokenizer, [before, token]) == 1
            assert weigh(tokenizer, [model.bos_id(), token]) == 1
        elif model.is_unknown(token):
            assert weigh(tokenizer, [before, token]) == 0
        else:
            kinds.add("control" if model.is_control(token) else "text")
            added = len(model.decode([before, token]).encode()) - without
            assert weigh(tokenizer, [before, token]) == added, model.id_to_piece(token)
    assert kinds == {"byte", "control", "text"}


def test_every_pair_at_the_start_of_a_document(prefixed):
    """After a boundary the first space belongs to the tokenizer; further ones do not, in this piece or the next."""
    model = prefixed.model
    for token in range(prefixed.size):
        if not model.is_byte(token) and not model.is_unknown(token):
            for boundary in (model.bos_id(), model.eos_id(), model.pad_id(), model.unk_id()):
                ids = [boundary, token, *model.encode("the king")]  # begins with a space of its own
                if model.id_to_piece(token).startswith(SPACE):
                    assert weigh(prefixed, ids) == len(model.decode(ids[1:]).encode())


def test_what_a_table_is_made_of(prefixed):
    model, table = prefixed.model, prefixed.table
    assert set(np.flatnonzero(table.boundary)) == {model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()}
    symbol = model.piece_to_id("<|x|>")
    assert not table.boundary[symbol] and table.byte_count[symbol] == len("<|x|>")
    assert table.byte_count[model.piece_to_id("<0xE2>")] == 1
    assert (table.byte_count[model.piece_to_id(SPACE)], table.leading_space[model.piece_to_id(SPACE)]) == (0, True)
    assert (table.byte_count[model.piece_to_id(SPACE + "the")], table.byte_count[model.piece_to_id("\u6d77")]) == (3, 3)


def test_spaces_inside_a_piece_weigh_one_byte_each(tmp_path):
    options = {"remove_extra_whitespaces": False, "add_dummy_prefix": False, "split_by_whitespace": False}
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b" + " " * 8 + "a b"] * 50),
        model_prefix=str(tmp_path / "tok"),
        vocab_size=280,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        allow_whitespace_only_pieces=True,
        **options,
    )
    tokenizer = load(str(tmp_path / "tok.model"))
    pieces = [tokenizer.model.id_to_piece(token) for token in range(tokenizer.size)]
    assert any(set(piece) == {SPACE} and len(piece) > 1 for piece in pieces)
    assert any(SPACE in piece[1:] and piece[0] == "a" for piece in pieces)
    before = tokenizer.model.piece_to_id("a")
    for token, piece in enumerate(pieces):
        if SPACE in piece:
            assert weigh(tokenizer, [before, token]) == len(piece), piece  # all its characters are one byte of text
    for text in ("a b", "b" + " " * 30 + "a", "a b" + " " * 8 + "a b"):
        assert weigh(tokenizer, tokens_of(tokenizer, [text])) == len(text)


# Any text except U+2581 itself, which SentencePiece takes for a space.
WORDS = st.sampled_from([" ", "   ", "\n", "the", " king", "\u00e9", "\U0001f600"])
CHARACTERS = st.characters(exclude_categories=("Cs",), exclude_characters=SPACE)
TEXTS = st.lists(WORDS | CHARACTERS | st.text(CHARACTERS, max_size=5), max_size=12).map("".join)


@CHECKED
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
@example(texts=["", "", "a"])
def test_any_text_weighs_its_bytes(lossless, prefixed, texts):
    for tokenizer in (prefixed, lossless):
        assert weigh(tokenizer, tokens_of(tokenizer, texts)) == sum(len(text.encode()) for text in texts)


# The audit


def states(size, kept=None):
    """What a manifest says of the validation text."""
    return {"bytes": size, "token_bytes": size if kept is None else kept}


def test_audit_passes_and_says_what_it_proved(tokenizer, stream_of):
    tokens, size = tokens_of(tokenizer, DOCUMENTS), sum(len(text.encode()) for text in DOCUMENTS)
    line = run_audit(tokenizer.table, stream_of(tokens, tokenizer.size), states(size))[0]
    assert line.startswith("byte_audit:") and "\n" not in line
    assert f"{len(tokens)} tokens" in line and f"{len(DOCUMENTS)} documents" in line and f"{size} bytes" in line
    assert "(bytes:proved by manifest.json)" in line
    stream = stream_of(tokens, tokenizer.size)
    assert "(not proved: no manifest.json" in run_audit(tokenizer.table, stream)[0]
    facts = run_audit(tokenizer.table, stream, states(size))[1]
    digest = hashlib.sha256(np.array(tokens, dtype="<u2").tobytes()).hexdigest()
    assert facts == {"val_bytes": size, "bytes_proved": True, "sha256_val_tokens": digest}


class SpaceTwice(TokenBytes):
    def __init__(self, *args):
        super().__init__(*args)
        self.byte_count = self.byte_count + self.leading_space


class BytesOfThree(TokenBytes):
    """As if a byte piece were a character of another script."""

    def __init__(self, *args):
        super().__init__(*args)
        self.byte_count[[self.model.is_byte(token) for token in range(len(self.byte_count))]] = 3


class BytesByName(TokenBytes):
    """A byte piece is called <0x41>: six characters."""

    def __init__(self, *args):
        super().__init__(*args)
        self.byte_count[[self.model.is_byte(token) for token in range(len(self.byte_count))]] = 6


class NoBoundaries(TokenBytes):
    def count(self, tokens):
        return int(self.byte_count[tokens[1:]].sum() + self.leading_space[tokens[1:]].sum())


class ControlWeighs(TokenBytes):
    def __init__(self, *args):
        super().__init__(*args)
        self.byte_count[self.model.bos_id()] = 3


WRONG_TABLES = [SpaceTwice, BytesOfThree, BytesByName, NoBoundaries, ControlWeighs]


@pytest.mark.parametrize("wrong", WRONG_TABLES)
def test_audit_refuses_a_wrong_table(prefixed, stream_of, wrong):
    """Weights are made of the pieces: where they differ from what these spell, no data is to blame."""
    stream = stream_of(tokens_of(prefixed, DOCUMENTS), prefixed.size)
    with pytest.raises(AssertionError, match=r"the first tokens count \d+ bytes and spell \d+"):
        run_audit(wrong(prefixed.path, prefixed.size), stream)


class SpelledOtherwise(TokenBytes):
    """A table that agrees with its pieces, which are not what the tokenizer means by them."""

    def load_sentencepiece(self, path):
        super().load_sentencepiece(path)
        self.spell_otherwise()


class SpelledWithSpaces(SpelledOtherwise):
    def spell_otherwise(self):
        self.pieces = [b" " + piece if token in self.leading else piece for token, piece in enumerate(self.pieces)]


class SpelledByName(SpelledOtherwise):
    def spell_otherwise(self):
        for token in self.byte_ids:
            self.pieces[token] = self.model.id_to_piece(token).encode()


class SpelledInAnotherOrder(SpelledOtherwise):
    """As many bytes, but others."""

    def spell_otherwise(self):
        for token in range(self.model.vocab_size()):
            if self.pieces[token] and token not in self.byte_ids:
                self.pieces[token] = self.pieces[token].decode()[::-1].encode()


class SpelledFromTheStart(SpelledOtherwise):
    """The space that the tokenizer puts before a document counts."""

    def spell_otherwise(self):
        self.strips_first_space = False


@pytest.mark.parametrize("wrong", SpelledOtherwise.__subclasses__())
def test_audit_refuses_pieces_that_are_not_the_text(prefixed, stream_of, wrong):
    stream = stream_of(tokens_of(prefixed, DOCUMENTS), prefixed.size)
    with pytest.raises(UserError, match=r"fineweb_val_.*decodes .*spell.*use the tokenizer of the shards"):
        run_audit(wrong(prefixed.path, prefixed.size), stream)


def test_a_document_that_begins_with_a_space_counts_it_where_the_model_adds_none(lossless, prefixed, stream_of):
    texts = ["the king", " the king", "  of sea", " "]
    size = sum(len(text.encode()) for text in texts)
    for tokenizer in (lossless, prefixed):
        tokens = tokens_of(tokenizer, texts)
        line, facts = run_audit(tokenizer.table, stream_of(tokens, tokenizer.size), states(size))
        assert f"decode to the {size} bytes they weigh" in line and facts["bytes_proved"]


def test_a_model_that_strips_spaces_drops_a_first_one(tmp_path, stream_of):
    """The published models are of this kind: their documents have no spaces at their ends."""
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(make_documents(150, seed=3)),
        model_prefix=str(tmp_path / "tok"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    tokenizer = load(str(tmp_path / "tok.model"))
    tokens = tokens_of(tokenizer, [" the king", "of  sea "])
    assert tokens == tokens_of(tokenizer, ["the king", "of sea"])
    line, facts = run_audit(tokenizer.table, stream_of(tokens, tokenizer.size), states(len("the kingof sea")))
    assert "decode to the 14 bytes they weigh" in line and facts["val_bytes"] == 14
    # A space piece that follows a boundary all the same adds nothing, as in the published rule.
    first = tokenizer.model.piece_to_id(SPACE + "the")
    assert weigh(tokenizer, [tokenizer.model.bos_id(), first]) == 3


def test_audit_refuses_the_tokenizer_of_other_shards(lossless, prefixed, stream_of):
    """By broken characters, by ids that it does not have, and else by the true bytes: any tokens spell some text."""
    texts, vocab_size = [f"{text} \u2603" for text in DOCUMENTS], max(lossless.size, prefixed.size) + 1
    size = sum(len(text.encode()) for text in texts)
    for tokenizer, other in ((lossless, prefixed), (prefixed, lossless)):
        tokens = tokens_of(tokenizer, texts)
        run_audit(tokenizer.table, stream_of(tokens, tokenizer.size), states(size))
        stream = stream_of([min(token, other.size - 1) for token in tokens], other.size)
        with pytest.raises(
            UserError, match=f"use the tokenizer of the shards|use the shards' tokenizer|manifest.json says {size}:"
        ):
            run_audit(other.table, stream, states(size))
    (letter,) = lossless.model.encode("e")
    broken = [letter, *(token for token in reversed(range(lossless.size)) if lossless.model.is_byte(token)), letter]
    with pytest.raises(UserError, match="use the tokenizer of the shards"):  # bytes that make no characters
        run_audit(lossless.table, stream_of(broken, lossless.size))
    table = TokenBytes(lossless.path, vocab_size)
    stream = stream_of([*tokens_of(lossless, texts), lossless.size], vocab_size)
    with pytest.raises(UserError, match=f"has no token {lossless.size}: use the shards' tokenizer"):
        run_audit(table, stream)


def test_audit_with_control_pieces_between_documents(tokenizer, stream_of):
    model, tokens = tokenizer.model, []
    for text in DOCUMENTS:
        tokens += [model.bos_id(), *model.encode(text), model.eos_id(), model.eos_id()]
    size = sum(len(text.encode()) for text in DOCUMENTS)
    stream = stream_of(tokens, tokenizer.size)
    assert f"decode to the {size} bytes they weigh" in run_audit(tokenizer.table, stream, states(size))[0]


def test_audit_names_documents_with_unknown_tokens(lossless, stream_of):
    """What the tokenizer could not hold is lost: it weighs nothing, and only the rest can be compared."""
    whole = tokens_of(lossless, ["the king", "of sea"])
    tokens = [*whole, lossless.model.unk_id(), *lossless.model.encode(" night")]
    line, facts = run_audit(lossless.table, stream_of(tokens, lossless.size))
    size = len("the kingof sea night")
    assert f"decode to the {size} bytes they weigh (1 documents hold unknown letters" in line
    assert facts["val_bytes"] == size and not facts["bytes_proved"]
    with pytest.raises(UserError, match=rf": {size} bytes, \S+manifest.json says {size + 3}"):
        run_audit(lossless.table, stream_of(tokens, lossless.size), states(size + 3))


def test_audit_weighs_the_first_token_too(lossless, stream_of):
    """A stream need not begin with a start token."""
    tokens = lossless.model.encode("the king")
    assert "8 bytes" in run_audit(lossless.table, stream_of(tokens, lossless.size))[0]


def bytes_of(tokenizer, tokens) -> int:
    """What lossless tokens add to the text, one by one."""
    model, size = tokenizer.model, 0
    for token in tokens:
        text = "" if model.is_control(token) else model.id_to_piece(token).replace(SPACE, " ")
        size += 1 if model.is_byte(token) else len(text.encode())
    return size


def test_audit_of_a_part_leaves_nothing_out(lossless, stream_of, monkeypatch):
    """Wherever it ends, be it inside a character."""
    texts = ["the king \U0001f600", "\U0001f600" * 5, "\u2603\u2603 night", "sea"]
    tokens, bos = tokens_of(lossless, texts), lossless.model.bos_id()
    assert bytes_of(lossless, tokens) == sum(len(text.encode()) for text in texts)
    stream = stream_of(tokens, lossless.size)
    for limit in range(1, len(tokens) + 1):
        monkeypatch.setattr(train_gpt, "AUDIT_TOKENS", limit)
        line = run_audit(lossless.table, stream)[0]
        audited, documents = bytes_of(lossless, tokens[:limit]), tokens[:limit].count(bos)
        assert f" {limit} tokens in {documents} documents decode to the {audited} bytes they weigh;" in line


@pytest.mark.parametrize("start", [[], ["bos"]])
def test_audit_of_one_long_document_does_not_cut_a_character(lossless, stream_of, monkeypatch, start):
    """Text without document borders is honest data: wherever the part ends, the audit must not refuse it."""
    text = "the \U0001f600 king \u2603\u2603" * 3
    tokens = [lossless.model.bos_id() for _ in start] + lossless.model.encode(text)
    stream = stream_of(tokens, lossless.size)
    for limit in range(8, len(tokens)):
        monkeypatch.setattr(train_gpt, "AUDIT_TOKENS", limit)
        line = run_audit(lossless.table, stream)[0]
        assert f"byte_audit: {limit} tokens" in line and f" {bytes_of(lossless, tokens[:limit])} bytes they" in line


@pytest.mark.parametrize("left_out", [1, 2])
def test_a_shard_that_ends_or_begins_inside_a_character(tokenizer, stream_of, left_out):
    """As foreign shards may: each byte piece weighs one byte, whatever sign the decoder puts in its place."""
    tokens, end = tokens_of(tokenizer, ["the king", "sea \u2603"]), len("the kingsea ")
    assert all(tokenizer.model.is_byte(token) for token in tokens[-3:])
    line, facts = run_audit(tokenizer.table, stream_of(tokens[:-left_out], tokenizer.size))
    assert f"decode to the {end + 3 - left_out} bytes they weigh;" in line
    assert facts["val_bytes"] == end + 3 - left_out
    begun = [*tokens[-3:][left_out:], *tokens_of(tokenizer, ["the king"])]
    line, facts = run_audit(tokenizer.table, stream_of(begun, tokenizer.size))
    # The first token has no token before it, and is no target: it is not weighed.
    assert f"decode to the {3 - left_out + 8} bytes they weigh; all {len(begun)} tokens weigh" in line


def test_unknown_letters_of_a_model_without_byte_fallback_are_named(tmp_path, stream_of):
    """SentencePiece's default: it decodes an unknown letter to a sign that the text does not have."""
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(make_documents(150, seed=3)),
        model_prefix=str(tmp_path / "tok"),
        vocab_size=60,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    tokenizer = load(str(tmp_path / "tok.model"))
    texts = ["the king", "of the \u03b1 sea", "night \u03b1\u03b2"]
    tokens = tokens_of(tokenizer, texts)
    assert tokens.count(tokenizer.model.unk_id()) == 2  # letters in a row are one
    text, kept = "".join(texts), "".join(texts).replace("\u03b1", "").replace("\u03b2", "")
    # What follows an unknown letter follows a boundary, where a space adds nothing.
    weighed = len(kept) - 1
    stream = stream_of(tokens, tokenizer.size)
    line, facts = run_audit(tokenizer.table, stream)
    assert f"decode to the {weighed} bytes they weigh (2 documents hold unknown letters" in line
    assert facts["val_bytes"] == weighed
    line, facts = run_audit(tokenizer.table, stream, states(len(text.encode()), weighed))
    assert f"bytes:lossy: of {len(text.encode())} in the text" in line and not facts["bytes_proved"]


# The manifest


def test_stated_bytes(lossless, stream_of, monkeypatch):
    tokens, size = tokens_of(lossless, DOCUMENTS), sum(len(text.encode()) for text in DOCUMENTS)
    stream = stream_of(tokens, lossless.size)
    monkeypatch.setattr(train_gpt, "AUDIT_TOKENS", 20)  # all tokens are weighed however few are decoded
    line = run_audit(lossless.table, stream, states(size))[0]
    assert f"all {len(tokens)} tokens weigh {size} bytes (bytes:proved" in line
    for wrong in (size - 1, size + 1, 0):
        with pytest.raises(UserError, match=rf": {size} bytes, \S+manifest.json says {wrong}: .*again"):
            run_audit(lossless.table, stream, states(wrong))


def test_stated_bytes_of_a_long_text(lossless, monkeypatch):
    """All is weighed in blocks of 2^24 tokens; none may be lost or lose its context where two blocks meet."""
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

    stream = Stream()
    line = run_audit(lossless.table, stream, states(stated))[0]
    assert f"all {length} tokens weigh {stated} bytes (bytes:proved" in line
    with pytest.raises(UserError, match=f": {stated} bytes"):
        run_audit(lossless.table, stream, states(stated + 1))


def test_manifest_is_optional(lossless, stream_of):
    tokens = tokens_of(lossless, DOCUMENTS)
    size = sum(len(text.encode()) for text in DOCUMENTS)
    stream = stream_of(tokens, lossless.size)
    for stated, proved, words in (
        (None, False, "not proved: no manifest.json states the true bytes"),
        ({"bytes": size, "tokens": 5}, True, "bytes:proved by manifest.json"),
        ({"bytes": size + 9, "token_bytes": size}, False, f"bytes:lossy: of {size + 9} in the text"),
    ):
        line, facts = run_audit(lossless.table, stream, stated)
        assert facts["bytes_proved"] is proved and facts["val_bytes"] == size and f"({words})" in line


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"splits": {}}',
        '{"splits": {"val": {}}}',
        '{"splits": {"val": {"bytes": null}}}',
        '{"splits": {"val": {"bytes": "many"}}}',
        '{"splits": {"val": 5}}',
        '{"splits": []}',
        "\udcff",
    ],
)
def test_malformed_manifest(lossless, stream_of, tmp_path, text):
    path = tmp_path / "manifest.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    stream = stream_of(tokens_of(lossless, DOCUMENTS), lossless.size)
    with pytest.raises(UserError) as caught:
        train_gpt.audit(lossless.table, stream, str(tmp_path))
    assert str(path) in str(caught.value) and "splits.val.bytes" in str(caught.value) and "again" in str(caught.value)


# Tokenizers that cannot be used


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value, shift, at = value | (data[at] & 0x7F) << shift, shift + 7, at + 1
        if data[at - 1] < 0x80:
            return value, at


def change_piece(path, piece: str, text: str | None = None, kind: int = NORMAL) -> bytes:
    """The model with one piece renamed or of another kind. A model is a protocol buffer whose field 1, repeated, is a
    piece (1: text, 2: score, 3: kind); the last value of a field counts, so a changed one is appended."""
    data, out, at, changed = open(path, "rb").read(), b"", 0, 0
    while at < len(data):
        tag, body = read_varint(data, at)
        assert tag & 7 == 2  # every field of a model is a message
        length, body = read_varint(data, body)
        message = data[body : body + length]
        if tag == 0x0A and message.startswith(b"\x0a" + varint(len(piece.encode())) + piece.encode()):
            name = (text or piece).encode()
            message, changed = message + b"\x0a" + varint(len(name)) + name + b"\x18" + varint(kind), changed + 1
        out, at = out + data[at : at + 1] + varint(len(message)) + message, body + length
    assert changed == 1
    return out


def test_vocabulary_without_a_single_space(lossless, tmp_path):
    path = tmp_path / "tok.model"
    path.write_bytes(change_piece(lossless.path, SPACE, "\u2582"))
    with pytest.raises(UserError, match=r"tok.model has no piece for a single space \(U\+2581\): use another"):
        TokenBytes(str(path), lossless.size)


def test_unused_pieces_weigh_nothing(lossless, tmp_path):
    path = tmp_path / "tok.model"
    path.write_bytes(change_piece(lossless.path, SPACE + "the", kind=UNUSED))
    token = lossless.model.piece_to_id(SPACE + "the")
    table = TokenBytes(str(path), lossless.size)
    assert table.model.is_unused(token) and table.boundary[token] and not table.leading_space[token]
    assert table.byte_count[token] == 0 and lossless.table.byte_count[token] == 3
    ids = table.model.encode("of the king")
    assert token not in ids and table.count(np.array([table.model.bos_id(), *ids])) == 11


@pytest.mark.parametrize("vocab_size", [2, 1024, 65536])
def test_wrong_vocab_size_and_the_advice_works(lossless, vocab_size):
    with pytest.raises(UserError) as caught:
        TokenBytes(lossless.path, vocab_size)
    message = str(caught.value)
    assert f"VOCAB_SIZE={vocab_size}," in message and f"TOKENIZER_PATH={lossless.path}" in message
    assert f"has {lossless.size} pieces: set that," in message
    TokenBytes(lossless.path, lossless.size)


@pytest.mark.parametrize("data", [b"", b"not a model", b"\0" * 2000, bytes(range(256)) * 4])
def test_file_that_is_no_model(tmp_path, data):
    path = tmp_path / "tok.model"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"TOKENIZER_PATH=.*tok.model is not a SentencePiece model: .*again"):
        TokenBytes(str(path), 1024)


def test_tokenizer_that_was_cut_short(lossless, tmp_path):
    path = tmp_path / "tok.model"
    path.write_bytes(open(lossless.path, "rb").read()[:-100])
    with pytest.raises(UserError, match="TOKENIZER_PATH"):
        TokenBytes(str(path), lossless.size)


def test_missing_tokenizer(tmp_path):
    for path in (tmp_path / "missing.model", tmp_path):
        with pytest.raises(UserError) as caught:
            TokenBytes(str(path), 1024)
        assert f"TOKENIZER_PATH={path} does not exist" in str(caught.value)
        assert "python data/prepare_shakespeare.py" in str(caught.value)


def test_a_whole_text_scored_by_other_bytes_than_the_audit_counted_is_no_result():
    trainer = SimpleNamespace(
        config=train_gpt.Config(), runtime=None, steps=1, stopwatch=train_gpt.Stopwatch(lambda: None)
    )
    with pytest.raises(UserError, match="scored 10 of 11 bytes"):
        train_gpt.write_result(trainer, None, SimpleNamespace(label="", bytes=10), {}, {"val_bytes": 11})
