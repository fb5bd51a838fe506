"""The canonical mask: its table against SentencePiece and against manual merging, for models of every kind;
its effect on losses, scores and samples; and what is refused."""

import itertools
import json
import math
import re
import shutil
import struct

import models
import numpy as np
import oracle
import pytest
import sentencepiece as spm
import torch
from conftest import make_documents, write_shard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import exact_line

import train_gpt
from train_gpt import UserError

_, frontier = models.model_file("frontier")
canonical = frontier.sibling("canonical")
sample = train_gpt.tool("artifact")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
PLAIN = dict(normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False)
KINDS = {
    "bytes": PLAIN | dict(byte_fallback=True),
    "unknown letters": PLAIN | dict(character_coverage=0.98),
    "normalised": dict(byte_fallback=True),
    "across words": PLAIN | dict(split_by_whitespace=False),
    "user-defined": PLAIN | dict(byte_fallback=True, user_defined_symbols=["\ue000", "ing", "e k", "th", "heki", "ek"]),
}


def bits_of(path, size: int) -> np.ndarray:
    return np.unpackbits(canonical.allowed_pairs(str(path), size), axis=1, count=size, bitorder="little").astype(bool)


def encode_by_hand(text: str, pieces: list) -> list[str]:
    """BPE as SentencePiece defines it, in its simplest form. Unused pieces are not split again."""
    scores = {piece: score for piece, score, kind in pieces if kind in (NORMAL, USER_DEFINED, UNUSED)}
    whole = sorted((piece for piece, _, kind in pieces if kind == USER_DEFINED), key=len, reverse=True)
    symbols = []
    while text:
        symbol = next((piece for piece in whole if text.startswith(piece)), text[0])
        symbols.append((symbol, symbol in whole))
        text = text[len(symbol) :]
    while True:
        pairs = enumerate(itertools.pairwise(symbols))
        merges = [
            (-scores[x + y], place)
            for place, ((x, x_whole), (y, y_whole)) in pairs
            if x + y in scores and not x_whole and not y_whole
        ]
        if not merges:
            return [symbol for symbol, _ in symbols]
        _, place = min(merges)
        (x, _), (y, _) = symbols[place : place + 2]
        symbols[place : place + 2] = [(x + y, False)]


def number(value: int) -> bytes:
    return bytes([value & 127 | 128]) + number(value >> 7) if value > 127 else bytes([value])


def message(*parts: tuple) -> bytes:
    """A protocol buffer of (number, value) with integers, floats, and bytes or strings."""
    done = b""
    for key, value in parts:
        if isinstance(value, int):
            done += number(key << 3) + number(value)
        elif isinstance(value, float):
            done += number(key << 3 | 5) + struct.pack("<f", value)
        else:
            value = value.encode() if isinstance(value, str) else value
            done += number(key << 3 | 2) + number(len(value)) + value
    return done


def model_of(pieces: list, model_type=2) -> bytes:
    """A SentencePiece model that does not normalize its text."""
    return b"".join(
        [
            *(message((1, message((1, text), (2, float(score)), (3, kind)))) for text, score, kind in pieces),
            message((2, message((3, model_type))), (3, message((1, "identity"), (3, 0), (4, 0), (5, 1)))),
        ]
    )


@pytest.fixture(scope="module", params=KINDS)
def trained_model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(make_documents(150, seed=3)),
        model_prefix=str(folder / "tok"),
        model_type="bpe",
        vocab_size=330 if "byte_fallback" in KINDS[request.param] else 80,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **KINDS[request.param],
    )
    return folder / "tok.model"


def test_the_reader_sees_what_sentencepiece_does(trained_model):
    model = spm.SentencePieceProcessor(model_file=str(trained_model))
    pieces = canonical.read_pieces(str(trained_model))
    assert [text for text, *_ in pieces] == model.id_to_piece([*range(model.vocab_size())])
    assert [score for _, score, _ in pieces] == [model.get_score(token) for token in range(len(pieces))]
    kinds = {UNKNOWN: model.is_unknown, CONTROL: model.is_control, UNUSED: model.is_unused, BYTE: model.is_byte}
    for kind, test in kinds.items():
        assert [k == kind for *_, k in pieces] == [test(token) for token in range(len(pieces))]


def test_the_table_equals_merging_every_pair_by_hand(trained_model):
    pieces = canonical.read_pieces(str(trained_model))
    size = len(pieces) + 3  # ids that only pad the vocabulary
    expected = np.ones((size, size), bool)
    for (a, (x, _, x_kind)), (b, (y, _, y_kind)) in itertools.product(enumerate(pieces), repeat=2):
        if x_kind == y_kind == NORMAL:
            expected[a, b] = encode_by_hand(x + y, pieces) == [x, y]
    table = bits_of(trained_model, size)
    assert (table == expected).all() and 0 < (~expected).sum()


@st.composite
def piece_lists(draw):
    """Few letters and many pieces of them, with arbitrary and often equal scores: merges that lead to dead ends, pieces
    that never occur, overlapping user-defined pieces, unused pieces."""
    texts = draw(st.lists(st.text("abc", min_size=2, max_size=5), min_size=2, max_size=14, unique=True))
    kinds = draw(
        st.sampled_from(
            [[NORMAL], [NORMAL] * 5 + [USER_DEFINED], [NORMAL] * 4 + [UNUSED], [NORMAL] * 4 + [UNUSED, USER_DEFINED]]
        )
    )
    rows = [(text, -draw(st.integers(0, 9)), draw(st.sampled_from(kinds))) for text in texts]
    return [("<unk>", 0, UNKNOWN), *rows, *((letter, -99, NORMAL) for letter in "abc")]


@settings(max_examples=150)
@given(pieces=piece_lists(), texts=st.lists(st.text("abc", min_size=2, max_size=30), min_size=20, max_size=20))
@example(pieces=[("<unk>", 0, UNKNOWN), ("aa", -1, NORMAL), ("a", -2, NORMAL), ("b", -3, NORMAL)], texts=["aaaba"])
def test_any_model_and_any_text(tmp_path_factory, pieces, texts):
    """Pairs that occur in a text are allowed. Without unused pieces, a pair is allowed if and only if encoding the text
    of both gives that pair."""
    path = tmp_path_factory.mktemp("any") / "tok.model"
    path.write_bytes(model_of(pieces))
    model, table = spm.SentencePieceProcessor(model_file=str(path)), bits_of(path, len(pieces))
    for text in texts:
        tokens = model.encode(text)
        assert all(table[a, b] for a, b in itertools.pairwise(tokens))
    kinds = [kind for *_, kind in pieces]
    if UNUSED not in kinds:
        for a, b in itertools.product(np.flatnonzero(np.array(kinds) == NORMAL).tolist(), repeat=2):
            x, y = pieces[a][0], pieces[b][0]
            assert table[a, b] == (model.encode(x + y) == [a, b])
            assert model.encode(x + y, out_type=str) == encode_by_hand(x + y, pieces)


# Effect on a model


@pytest.fixture(scope="module")
def masked(corpus):
    """A model with random weights and the mask, in eval mode; its table; some of the text [B, T + 1]."""
    knobs = models.tiny_settings(corpus, MODEL_FILE=models.FRONTIER, CANONICAL=1)
    config = train_gpt.Config.load([], knobs)
    runtime = train_gpt.Runtime(config, {})
    model, _, _ = train_gpt.build_model(config, runtime)
    oracle.scatter(model)
    stream = train_gpt.TokenStream(config.data_path, "val", config.vocab_size)
    text = torch.from_numpy(stream.read(0, 8 * 33).astype(np.int64)).view(8, 33)
    return model.eval(), torch.from_numpy(bits_of(config.tokenizer_path, config.vocab_size)), text


@torch.no_grad()
def test_excluded_tokens_have_no_probability_and_the_others_all_of_it(masked):
    model, table, text = masked
    inputs, targets = text[:, :-1], text[:, 1:]
    logits, losses = model(inputs), model(inputs, targets)
    assert torch.equal(logits == -math.inf, ~table[inputs]) and (~table[inputs]).any()
    torch.testing.assert_close(logits.exp().sum(-1).log() - logits.gather(-1, targets[..., None])[..., 0], losses)
    every = torch.arange(len(table))[:, None].expand(-1, 32).contiguous()  # each token in turn as a context's target
    sums = torch.exp(-model(inputs[:1].expand(len(table), -1).contiguous(), every).double()).sum(0)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)


@torch.no_grad()
def test_no_loss_of_a_text_rises_and_training_knows_nothing_of_it(masked):
    model, table, text = masked
    inputs, targets = text[:, :-1], text[:, 1:]
    losses, logits = model(inputs, targets), model(inputs)
    unmasked = model.train()(inputs, targets), model(inputs)
    model.eval()
    mask, model.mask = model.mask, None
    assert torch.equal(model(inputs, targets), unmasked[0]) and torch.equal(model(inputs), unmasked[1])
    model.mask = mask
    assert (losses <= unmasked[0] + 1e-6).all() and losses.mean() < unmasked[0].mean() - 1e-3
    assert torch.equal(logits[table[inputs]], unmasked[1][table[inputs]])


@pytest.mark.parametrize("size", [9, 16, 23])
def test_any_size_of_vocabulary_fits_into_bits(size, monkeypatch):
    allowed = np.random.default_rng(size).random((size, size)) < 0.5
    monkeypatch.setattr(canonical, "allowed_pairs", lambda *_: np.packbits(allowed, axis=1, bitorder="little"))
    config = train_gpt.Config(vocab_size=size, device="cpu")
    mask = canonical.Mask(config, train_gpt.Runtime(config, {}))
    logits, tokens = torch.randn(3, 4, size), torch.randint(size, (3, 4))
    assert torch.equal(mask(logits, tokens), logits.masked_fill(~torch.from_numpy(allowed)[tokens], -math.inf))


# Runs


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Run folders of the same training with and without the mask."""
    folder = tmp_path_factory.mktemp("runs")
    knobs = {"MODEL_FILE": models.FRONTIER, "ITERATIONS": 30, "TRAIN_LOG_EVERY": 1}
    found = {}
    for on in "10":
        with models.no_siblings():
            found[on] = models.train_tiny(corpus, folder / on, CANONICAL=on, **knobs)
    return found


def test_a_run_trains_as_without_it_and_scores_better(runs):
    result = {on: json.loads((path / "result.json").read_text()) for on, path in runs.items()}
    lines = {on: (path / "metrics.jsonl").read_text() for on, path in runs.items()}
    losses = {on: re.findall('"train_loss": [0-9.]+', text) for on, text in lines.items()}
    weights = {on: models.load((path / "final_model.pt").read_bytes()) for on, path in runs.items()}
    assert losses["1"] == losses["0"] and len(losses["1"]) == 30
    assert all(torch.equal(weights["1"][name], weights["0"][name]) for name in weights["0"])
    for name in ("val_loss", "val_bpb", "pre_quant_val_loss"):
        assert result["1"][name] < result["0"][name]
    logs = {on: (path / "train.log").read_text() for on, path in runs.items()}
    assert re.search(r"canonical: \d+\.\d\d% of all pairs of tokens are excluded, none of", logs["1"])
    assert "canonical:" not in logs["0"]


def test_an_artifact_tells_of_it_and_scores_the_same_elsewhere(runs, bare, call):
    for on, path in runs.items():
        code, out, _ = call(bare(MODE="eval", ARTIFACT=path / "final_model.int8.ptz"))
        assert code == 0 and f"CANONICAL={on}" in out and "assumed" not in out
        assert exact_line(out) == exact_line((path / "train.log").read_text())
    other = bare(MODE="eval", ARTIFACT=runs["0"] / "final_model.int8.ptz", CANONICAL=1)
    code, _, err = call(other)
    assert code == 2 and "canonical.py is missing: put it there, or set MODEL_FILE=records/models/frontier.py" in err
    code, out, _ = call(other | {"MODEL_FILE": models.FRONTIER})
    assert code == 0 and exact_line(out) == exact_line((runs["1"] / "train.log").read_text())


@pytest.mark.parametrize("knobs", [{}, {"top_k": 5}, {"temperature": 3.0}, {"temperature": 0.0}], ids=str)
def test_a_sample_never_has_an_excluded_pair(masked, corpus, knobs):
    """The logits favor excluded pairs, then tokens that exclude others: without the mask, excluded pairs appear."""
    (model, table, _), said = masked, []
    tokenizer = train_gpt.TokenBytes(str(corpus / "tok.model"), len(table))
    mask, decode, excluded = model.mask, tokenizer.decode, {}
    tokenizer.decode = lambda tokens: said.append(tokens) or decode(tokens)
    config = train_gpt.Config(vocab_size=len(table), train_seq_len=32, train_batch_tokens=32)
    chosen = sample.SampleKnobs(sample_prompt="the king", sample_tokens=30, **knobs)

    def spoilt(logits, tokens):
        return logits + 200.0 * ~table[tokens] + 100.0 * (~table).any(1)

    masks = {"without": spoilt, "with": lambda logits, tokens: mask(spoilt(logits, tokens), tokens)}
    try:
        for name, model.mask in masks.items():
            list(sample.generate(model, config, chosen, tokenizer))
            excluded[name] = sum(not table[a, b] for a, b in itertools.pairwise(said[-1]))
    finally:
        model.mask = mask
    assert excluded["with"] == 0 < excluded["without"]


# What is refused


def test_a_text_with_an_excluded_pair_ends_the_run_before_it_begins(corpus, tmp_path, bare, call):
    size = int((corpus / "vocab_size").read_text())
    table = bits_of(corpus / "tok.model", size)
    (a, b), shards = np.argwhere(~table)[0].tolist(), tmp_path / "shards"
    shutil.copytree(corpus / "data", shards)
    tokens = train_gpt.open_shard(shards / "fineweb_val_000000.bin")[:].copy()
    write_shard(shards / "fineweb_val_000000.bin", [*tokens[:100], 1, a, b, 1, *tokens[100:], 1, a, b])
    knobs = models.tiny_settings(corpus, LOG_DIR=tmp_path / "logs", DATA_PATH=shards)
    knobs["MODEL_FILE"] = models.FRONTIER
    code, out, err = call(knobs | {"CANONICAL": "1"})
    pieces = canonical.read_pieces(str(corpus / "tok.model"))
    assert code == 2 and f"2 of {len(tokens) + 6} pairs" in err and "after token 101," in err
    assert repr(pieces[a][0]) in err and repr(pieces[b][0]) in err and not (tmp_path / "logs").exists()
    assert "set CANONICAL=0" in err and len(err.splitlines()) == 1
    assert call(knobs)[0] == 0


REFUSED = {"bytes": "is not such a file", "nowhere.model": "is not such a file", "text.model": "is not one"}
REFUSED |= {"half.model": "is not one", "empty.model": "is not one", "unigram.model": "is of type unigram"}


@pytest.mark.parametrize("name, said", REFUSED.items())
def test_other_tokenizers_are_refused(corpus, tmp_path, name, said):
    good, pieces = (corpus / "tok.model").read_bytes(), [("<unk>", 0, UNKNOWN), ("\u2581", -1, NORMAL)]
    written = {
        "text": b"no model",
        "half": good[: len(good) // 2],
        "empty": b"",
        "unigram": model_of(pieces, 1),
    }
    path = tmp_path / name
    if path.stem in written:
        path.write_bytes(written[path.stem])
    with pytest.raises(UserError, match=f"CANONICAL=1 needs the merges .* {said}.*: set CANONICAL=0, or another"):
        canonical.allowed_pairs(str(path), 300)


def test_a_run_with_another_tokenizer_says_so(corpus, tmp_path, call):
    write_shard(tmp_path / "fineweb_train_000000.bin", [1, *[100] * 600])
    write_shard(tmp_path / "fineweb_val_000000.bin", [1, *[100] * 600])
    knobs = {"DATA_PATH": tmp_path, "TOKENIZER_PATH": "bytes", "VOCAB_SIZE": 260, "LOG_DIR": tmp_path / "logs"}
    code, _, err = call(models.tiny_settings(corpus, MODEL_FILE=models.FRONTIER, CANONICAL=1, **knobs))
    assert code == 2 and "CANONICAL=1 needs the merges" in err and not (tmp_path / "logs").exists()


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(corpus):
    with pytest.raises(UserError, match="VOCAB_SIZE=200"):
        canonical.allowed_pairs(str(corpus / "tok.model"), 200)


def test_a_forward_that_it_does_not_reach_is_refused(make_config, runtime):
    class Own(frontier.GPT):
        def forward(self, tokens, targets=None):
            return super().forward(tokens, targets)

    config = make_config(MODEL_FILE=models.FRONTIER, CANONICAL=1)
    with pytest.raises(UserError, match="does not reach the forward that Own has of its own"):
        Own(config).prepare(config, runtime)
