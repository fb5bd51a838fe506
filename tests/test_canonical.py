"""The canonical mask: its table against SentencePiece itself and against merging by hand, for models of every kind; what
it does to losses, scores and samples; what is refused."""

import itertools
import json
import math
import re
import struct

import models
import numpy as np
import pytest
import sentencepiece as spm
import torch
from conftest import make_documents, write_shard
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import GPT, UserError

canonical = train_gpt.tool("canonical")
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
    """BPE as SentencePiece defines it, as plainly as it can be said. Unused pieces are not split again."""
    scores = {piece: score for piece, score, kind in pieces if kind in (NORMAL, USER_DEFINED, UNUSED)}
    whole = sorted((piece for piece, _, kind in pieces if kind == USER_DEFINED), key=len, reverse=True)
    symbols = []
    while text:
        symbol = next((piece for piece in whole if text.startswith(piece)), text[0])
        symbols.append((symbol, symbol in whole))
        text = text[len(symbol) :]
    while True:
        merges = [(-scores[x + y], place) for place, ((x, x_whole), (y, y_whole)) in enumerate(itertools.pairwise(symbols))
                  if x + y in scores and not x_whole and not y_whole]  # fmt: skip
        if not merges:
            return [symbol for symbol, _ in symbols]
        _, place = min(merges)
        (x, _), (y, _) = symbols[place : place + 2]
        symbols[place : place + 2] = [(x + y, False)]


def number(value: int) -> bytes:
    return bytes([value & 127 | 128]) + number(value >> 7) if value > 127 else bytes([value])


def message(*parts: tuple) -> bytes:
    """A protocol buffer of (number, value) with integers, floats, and bytes or text."""
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
    """A SentencePiece model that changes nothing of its text before it cuts it."""
    return b"".join([
        *(message((1, message((1, text), (2, float(score)), (3, kind)))) for text, score, kind in pieces),
        message((2, message((3, model_type))), (3, message((1, "identity"), (3, 0), (4, 0), (5, 1)))),
    ])  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def trained_model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(make_documents(150, seed=3)), model_prefix=str(folder / "tok"), model_type="bpe",
        vocab_size=330 if "byte_fallback" in KINDS[request.param] else 80, hard_vocab_limit=False, num_threads=1,
        minloglevel=2, **KINDS[request.param],
    )  # fmt: skip
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
    size = len(pieces) + 3  # ids that only fill the vocabulary up
    expected = np.ones((size, size), bool)
    for (a, (x, _, x_kind)), (b, (y, _, y_kind)) in itertools.product(enumerate(pieces), repeat=2):
        if x_kind == y_kind == NORMAL:
            expected[a, b] = encode_by_hand(x + y, pieces) == [x, y]
    table = bits_of(trained_model, size)
    assert (table == expected).all() and 0 < (~expected).sum()


@st.composite
def piece_lists(draw):
    """Few letters and many pieces of them, scores in any order and often equal: merges that go astray, pieces that are
    never made, user-defined ones that overlap, unused ones."""
    texts = draw(st.lists(st.text("abc", min_size=2, max_size=5), min_size=2, max_size=14, unique=True))
    kinds = draw(st.sampled_from([[NORMAL], [NORMAL] * 5 + [USER_DEFINED], [NORMAL] * 4 + [UNUSED],
                                  [NORMAL] * 4 + [UNUSED, USER_DEFINED]]))  # fmt: skip
    rows = [(text, -draw(st.integers(0, 9)), draw(st.sampled_from(kinds))) for text in texts]
    return [("<unk>", 0, UNKNOWN), *rows, *((letter, -99, NORMAL) for letter in "abc")]


@settings(max_examples=150)
@given(pieces=piece_lists(), texts=st.lists(st.text("abc", min_size=2, max_size=30), min_size=20, max_size=20))
@example(pieces=[("<unk>", 0, UNKNOWN), ("aa", -1, NORMAL), ("a", -2, NORMAL), ("b", -3, NORMAL)], texts=["aaaba"])
def test_any_model_and_any_text(tmp_path_factory, pieces, texts):
    """What a text has is allowed; and without unused pieces, what is allowed for two others is what both give."""
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

