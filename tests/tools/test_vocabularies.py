"""Tokenizers added by tools/vocabularies.py (tiktoken, bytes and case marks): byte counts, training and scoring."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import make_documents
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import SCRIPT, call_main, new_model, process
from shards import CASE_MARKS, GPT2, GPT2_FOLDER, MARK, PLAIN, needs_gpt2, train_model, use_local_gpt2, with_capitals

import train_gpt
from train_gpt import Evaluator, TokenBytes, TokenStream, UserError

# isort: split
import tokenize_text
import vocab

helper = train_gpt.tool("vocabularies")
SIZES = {"sentencepiece": 300, "case marks": 330, "bytes": 260, "gpt2": 50_304}
kinds = pytest.mark.parametrize("kind", ["sentencepiece", "case marks", "bytes", GPT2])


@pytest.fixture(autouse=True)
def local_gpt2(monkeypatch, tmp_path):
    use_local_gpt2(monkeypatch, tmp_path / "tiktoken")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{kind: (knobs of a dataset, bytes of its validation text)}, as data/tokenize_text.py makes them."""
    root, made = tmp_path_factory.mktemp("made"), {}
    documents = with_capitals(make_documents(60, seed=3))
    source = root / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        use_local_gpt2(patch, root / "tiktoken")
        for kind, size in SIZES.items():
            if kind == "gpt2" and not GPT2_FOLDER:
                continue
            name, learned = kind.replace(" ", "_"), kind in ("sentencepiece", "case marks")
            options = ["--tokenizer", f"train:sp{size}" if learned else kind, "--name", name, "--out", str(root)]
            options += ["--val-docs", "10", *["--case-marks"] * (kind == "case marks")]
            assert tokenize_text.main([str(source), *options]) == 0
            path = root / "tokenizers" / f"{name}.model" if learned else kind
            knobs = {"DATA_PATH": root / "datasets" / name, "TOKENIZER_PATH": path, "VOCAB_SIZE": size}
            made[kind] = knobs, len("".join(documents[:10]).encode())
    return made


@pytest.fixture(scope="module")
def tables(made):
    with pytest.MonkeyPatch.context() as patch:
        use_local_gpt2(patch, made["bytes"][0]["DATA_PATH"].parent / "tiktoken")
        return {kind: TokenBytes(str(it["TOKENIZER_PATH"]), it["VOCAB_SIZE"]) for kind, (it, _) in made.items()}


letters = st.one_of(
    st.characters(exclude_categories=["Cs"]),
    st.sampled_from("  \n\t\u2581\u200b\u0000\u007f\U0001f600\U0001f468\u200d\u0301\u6d77\u0628\u0928\u1e9e<|>"),
)
words = st.lists(st.sampled_from(["the", "   ", "<s>", "<|endoftext|>", "\n\n", " The", "KING", "iPhone"])).map("".join)
texts = st.one_of(st.text(letters, max_size=80), words)
# Misplaced marks, too: a model may generate them in any order.
marked_texts = st.lists(st.sampled_from([*CASE_MARKS, " ", "a", "bc", "A", "\u00e9", MARK])).map("".join)


@kinds
@settings(max_examples=300)
@given(text=texts)
@example(text="")
@example(text="<|endoftext|>")
@example(text="\U0001f468\u200d\U0001f469\u200d\U0001f467   \x00\x01")
@example(text="a\u2581 \u2581")
def test_the_table_weighs_the_bytes_of_any_text(tables, kind, text):
    table = tables[kind]
    if kind == "sentencepiece":  # it writes a space as U+2581 and so cannot represent that character
        text = text.replace(MARK, "")
    tokens = [table.start, *table.encode(text)]
    assert table.count(np.array(tokens)) == len(text.encode())
    assert table.decode(tokens[1:]) == table.decode(tokens) == table.spell(tokens) == text.encode()


@settings(max_examples=1000)
@given(text=texts | marked_texts)
@example(text="The NASA McDonald iPhone, \u00c9T. X")
def test_capitals_become_marks_and_come_back(text):
    marked = helper.mark(text)
    assert helper.unmark(marked.encode()) == text.encode()
    assert not re.search(f"[A-Z{MARK}]", marked)


def test_case_marks_by_hand():
    t, a, m, e = CASE_MARKS
    cases = {"The NASA": f"{t}the{a} nasa", "a McDonald": f"a{t} mc{m}donald"}
    cases |= {"iPhone  X\nYou": f"i{m}phone {t} x\n{t}you"}
    cases |= {t + a + m + e + MARK: e + t + e + a + e + m + e + m + m + e + a + m, "\u00c9T": f"\u00c9{t}t"}
    for text, marked in cases.items():
        assert helper.mark(text) == marked
    sampled = helper.unmark(f"{t}{t}{a}1{m} {e}x".encode()).decode()
    assert sampled == "1 \ufffdx", "of sampled marks those without a letter vanish"


def test_marks_weigh_nothing_and_are_no_boundaries(tables):
    table = tables["case marks"]
    for mark, weight in zip(CASE_MARKS, (0, 0, 0, 3), strict=True):
        token = table.model.piece_to_id(mark)
        assert (table.byte_count[token], table.boundary[token], table.leading_space[token]) == (weight, False, False)
        before_a_space = np.array([token, table.model.piece_to_id(MARK)])
        assert table.count(before_a_space) == 1, "as after any other token"
    assert table.encode("the King")[-2:] == [table.model.piece_to_id("\ue001"), *table.encode(" king")]


@settings(max_examples=500)
@given(data=st.data())
def test_whatever_tokens_there_are_they_weigh_what_they_spell(tables, data):
    """Including misplaced marks, and partial escapes and characters."""
    table = tables["case marks"]
    usual = st.integers(3, table.size - 1).filter(lambda token: table.pieces[token] != b"\xee")  # a mark's first byte
    marks = st.sampled_from([*map(table.model.piece_to_id, CASE_MARKS)])
    tokens = data.draw(st.lists(usual | marks, max_size=30))
    spelled, decoded = table.spell(tokens), table.decode(tokens)
    assert table.count(np.array([table.start, *tokens])) == len(spelled)
    assert decoded == spelled or b"\xef\xbf\xbd" in decoded


NOT_MARKED = [  # three marks, marks that are not symbols, models that change the text
    {"user_defined_symbols": [*CASE_MARKS[:3]]},
    {"user_defined_symbols": [], "required_chars": CASE_MARKS},
    {"byte_fallback": False},
    {"add_dummy_prefix": True},
    {"remove_extra_whitespaces": True},
    {"normalization_rule_name": "nmt_nfkc"},
]


@pytest.mark.parametrize("change", NOT_MARKED, ids=lambda change: ", ".join(change))
def test_a_model_that_lacks_a_sign_of_case_marks_has_none(tmp_path, change):
    """U+E001 is an ordinary letter there."""
    path = tmp_path / "tok.model"
    path.write_bytes(train_model(make_documents(100, seed=1), 330, **vocab.MARKS_OPTIONS | PLAIN | change))
    table = TokenBytes(str(path))
    assert table.byte_count[table.model.piece_to_id("\ue001")] == 3 and not table.zero_bytes
    assert table.decode(table.encode("a\ue001a")).decode().strip() == "a\ue001a"


@kinds
def test_special_and_padded_ids_weigh_nothing_and_are_boundaries(tables, kind):
    table = tables[kind]
    for token in {"gpt2": [50256], "bytes": [0, 1, 2, 3]}.get(kind, [table.start]):
        assert table.boundary[token] and table.byte_count[token] == 0
    assert table.boundary[table.size :].all() and not table.byte_count[table.size :].any()
    assert not table.boundary[: table.size].all() and len(table.byte_count) == SIZES[kind]
    assert not table.leading_space[table.boundary].any()


def test_the_table_of_bytes_is_one_each(tables):
    table = tables["bytes"]
    assert table.start == 1 and table.byte_count.tolist() == [0] * 4 + [1] * 256
    assert table.encode("\u00e9a") == [0xC3 + 4, 0xA9 + 4, 0x61 + 4]
    for name in ("byte260", "./data/tokenizers/fineweb_pure_byte_260.json"):
        assert (TokenBytes(name, 260).byte_count == table.byte_count).all()


@needs_gpt2
def test_the_table_of_gpt2_is_that_of_its_raw_tokens(tables):
    """The published vocabulary maps each byte to a printable letter, so a token has as many bytes as letters."""
    raw = json.loads((GPT2_FOLDER / "encoder.json").read_text(encoding="utf-8"))
    expected = {token: len(text) for text, token in raw.items() if text != "<|endoftext|>"}
    weights = tables["gpt2"].byte_count.tolist()
    assert {token: weights[token] for token in expected} == expected and len(expected) == 50_256


def test_numbers_that_an_encoding_skips_are_boundaries(monkeypatch):
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)}
    gaps = tiktoken.Encoding("gaps", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 260})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: gaps)
    table = TokenBytes("gaps")
    assert table.size == 261 and np.flatnonzero(table.boundary).tolist() == [256, 257, 258, 259, 260]


@pytest.mark.parametrize("size", [256, 259, 261, 384, 387, 388, 1024])
def test_a_vocabulary_may_be_padded_to_a_multiple_of_128_but_not_cut(size):
    if not 260 <= size <= 387:
        with pytest.raises(UserError, match=f"^VOCAB_SIZE={size}, but TOKENIZER_PATH=bytes has 260 pieces: set that"):
            TokenBytes("bytes", size)
        return
    table = TokenBytes("bytes", size)
    assert (table.size, len(table.byte_count), len(table.boundary)) == (260, size, size)
    assert table.boundary[260:].all() and not table.byte_count[260:].any() and not table.leading_space.any()
    with pytest.raises(UserError, match="has 260 pieces"):
        TokenBytes("bytes", size, padding=0)


@pytest.mark.parametrize("name, folder", [("gpt5_base", ""), ("gpt2", "missing")])
def test_an_encoding_that_cannot_be_loaded_is_one_clear_line(monkeypatch, tmp_path, name, folder):
    monkeypatch.setenv("GPT2_BPE_DIR", folder and str(tmp_path / folder))
    message = rf"TOKENIZER_PATH={name} is nothing tiktoken can load \(.*TIKTOKEN_CACHE_DIR.*"
    with pytest.raises(UserError) as caught:
        TokenBytes(name, 50_304)
    assert re.fullmatch(message, str(caught.value)) and str(tmp_path / folder) * bool(folder) in str(caught.value)


@needs_gpt2
def test_a_changed_vocabulary_of_gpt2_is_refused(monkeypatch, tmp_path):
    for name, data in {"vocab.bpe": (GPT2_FOLDER / "vocab.bpe").read_bytes(), "encoder.json": b"{}"}.items():
        (tmp_path / name).write_bytes(data)
    monkeypatch.setenv("GPT2_BPE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"\(ValueError: Hash mismatch for data .*encoder.json.*TIKTOKEN_CACHE_DIR"):
        TokenBytes("gpt2", 50_304)


@kinds
def test_a_run_on_each_is_scored_over_the_true_bytes(kind, made, tmp_path, tiny, capsys):
    knobs, size = made[kind]
    assert call_main(tiny(**knobs, ITERATIONS=3)) == 0
    result = json.loads((tmp_path / "logs" / "run" / "result.json").read_text())
    assert result["scored_bytes"] == size and result["bytes_proved"] is True
    assert set(result["sources"]) == {"train_gpt.py", *["vocabularies.py"] * (kind != "sentencepiece")}
    bits = result["val_loss"] * result["scored_tokens"] / math.log(2)
    assert result["val_bpb"] == pytest.approx(bits / size, rel=1e-12)
    assert "(bytes:proved by manifest.json)" in capsys.readouterr().out
    sample = {"MODE": "sample", "SAMPLE_PROMPT": "The King of NASA", "SAMPLE_TOKENS": 5, "DEVICE": "cpu"}
    sample |= {"ARTIFACT": tmp_path / "logs/run/final_model.int8.ptz", "TOKENIZER_PATH": knobs["TOKENIZER_PATH"]}
    assert call_main({name: str(value) for name, value in sample.items()}) == 0
    assert capsys.readouterr().out.startswith("The King of NASA")


def test_the_tool_is_needed_and_is_a_source_of_the_run(made, tmp_path, tiny):
    """It is copied, hashed and counted like the script; the run folder alone reproduces the run."""
    knobs, size = made["case marks"]
    (tmp_path / "alone").mkdir()
    script = Path(shutil.copy(SCRIPT, tmp_path / "alone"))
    done = process(tiny(**knobs), tmp_path, script=script)
    assert done.returncode == 2 and not (tmp_path / "logs").exists()
    assert re.fullmatch(rb"error: \S+vocabularies.py is missing: take it from the repository\n", done.stderr)
    shutil.copy(helper.__file__, tmp_path / "alone")
    done = process(tiny(**knobs), tmp_path, script=script)
    assert done.returncode == 0, done.stderr.decode()
    assert b"(bytes:proved by manifest.json)" in done.stdout
    folder = tmp_path / "logs" / "run"
    first = json.loads((folder / "result.json").read_text())
    assert first["scored_bytes"] == first["val_bytes"] == size
    assert set(first["sources"]) == {"train_gpt.py", "vocabularies.py"}
    assert first["bytes_code"] == sum(it["bytes"] for it in first["sources"].values())
    assert (folder / "vocabularies.py").read_bytes() == Path(helper.__file__).read_bytes()
    kept = shutil.copytree(folder, tmp_path / "kept")
    environ = {"RUN_ID": "again", "LOG_DIR": str(tmp_path / "logs"), "DEVICE": "cpu"}
    done = process(environ, tmp_path, script=kept / "train_gpt.py", args=[kept / "config.env"])
    assert done.returncode == 0, done.stderr.decode()
    again = json.loads((tmp_path / "logs" / "again" / "result.json").read_text())
    assert again["sources"] == first["sources"]
    assert again["val_bpb"] == pytest.approx(first["val_bpb"], rel=1e-4)  # computed with a different kernel


@pytest.mark.parametrize("kind", ["sentencepiece", "case marks", "bytes"])
def test_the_bpb_of_a_uniform_model_is_its_closed_form(kind, made, make_config, runtime):
    knobs, size = made[kind]
    config = make_config(**knobs, TIED_EMBED_INIT_STD=0, EVAL_STRIDE=8)
    stream = TokenStream(config.data_path, "val", config.vocab_size)
    table = TokenBytes(config.tokenizer_path, config.vocab_size)
    attention = train_gpt.tool("kernels").blocked_attention
    score = Evaluator(stream, table, config, runtime).score(*[new_model(config, attention)] * 2)
    assert score.bytes == size
    assert score.bpb == pytest.approx((len(stream) - 1) * math.log2(config.vocab_size) / size, rel=1e-6)
