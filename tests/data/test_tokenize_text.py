"""data/tokenize_text.py: every input format, every kind of tokenizer, true byte counts, reproducible files."""

import functools
import gzip
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
import shards
from conftest import make_documents, shard_bytes
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from shards import CASE_MARKS, EMOJI, GPT2, GPT2_FOLDER, MARK, assert_one_line, snapshot, train_model, write_jsonl

import train_gpt

# isort: split
import common
import texts
import tokenize_text as tt
import vocab

BYTES, LEARNED = ("--tokenizer", "bytes"), ("--tokenizer", "train:sp300")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    shards.use_local_gpt2(monkeypatch, tmp_path / "tiktoken")


@pytest.fixture
def small_batches(monkeypatch):
    """Many blocks and batches from little text."""
    monkeypatch.setattr(texts, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(tt, "BATCH_BYTES", 3000)


def run(root: Path, *arguments) -> int:
    return tt.main([*map(str, arguments), "--out", str(root)])


def only_folder(root: Path) -> Path:
    (folder,) = (path for path in (root / "datasets").iterdir() if path.is_dir())
    return folder


def manifest_of(root: Path) -> dict:
    return json.loads((only_folder(root) / "manifest.json").read_text(encoding="utf-8"))


def read_bytes_split(root: Path, split: str) -> list[str]:
    """Documents of a byte260 dataset, read without the code under test."""
    tokens = shards.read_tokens(only_folder(root), split)
    parts = np.split(tokens, np.flatnonzero(tokens == 1))
    assert len(parts[0]) == 0 and all((part[1:] >= 4).all() for part in parts[1:])
    return [(part[1:] - 4).astype(np.uint8).tobytes().decode() for part in parts[1:]]


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


# Input

DOCUMENTS = ["first\r\n\ttab", f" {EMOJI}\u00e9 \u4e2d", "\ufeffmark\n", "x" * 5000, "\0", "end\n\n", "a\u2028b", MARK]


def pack(path: Path, data: bytes) -> Path:
    if path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(data) // 2  # two frames, as parallel compressors make them
        data = b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))
    path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(data))
    return path


def write_form(folder: Path, form: str, monkeypatch) -> list:
    """Write the DOCUMENTS in a format. Returns the arguments that read them."""
    folder.mkdir()
    if form == "folder":
        (folder / "b").mkdir()
        (folder / ".git").mkdir()
        for i, text in enumerate(DOCUMENTS):
            (folder / ("a" if i < 5 else "b/c")).with_name(f"{i}.txt").write_bytes(text.encode())
        for ignored in (".git/config.txt", ".hidden.txt", "notes.md"):
            (folder / ignored).write_text("no")
        (folder / "b").rename(folder.with_name("elsewhere"))
        (folder / "b").symlink_to(folder.with_name("elsewhere"))
        (folder / "b" / "circle").symlink_to(folder)
        return [folder]
    if form == "glob":
        for i, text in enumerate(DOCUMENTS):
            (folder / f"part_{i}.txt").write_bytes(text.encode())
        (folder / "other.txt").write_text("no")
        return [folder / "part_*.txt"]
    if form == "several files":
        one, two = write_jsonl(folder / "z.jsonl", DOCUMENTS[:3]), write_jsonl(folder / "a.jsonl", DOCUMENTS[3:])
        return [one, two, one]
    if form == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"id": range(len(DOCUMENTS)), "text": DOCUMENTS}), folder / "a.parquet")
        return [folder / "a.parquet"]
    if form == "field and format":
        return [write_jsonl(folder / "a.data", DOCUMENTS, "content"), "--field", "content", "--format", "jsonl"]
    options = ["--separator", r"<|sep|>\n"] if "txt" in form else []
    data = "<|sep|>\n".join([*DOCUMENTS, "", ""]).encode()
    if not options:  # with empty texts, which are not documents, and empty lines
        lines = (json.dumps({"text": text}).encode() for text in ["", *DOCUMENTS, ""])
        data = b"\xef\xbb\xbf" + b"\n\n".join(lines)
    if form.startswith("-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return ["-", "--format", form[1:], *options]
    return [pack(folder / f"a.{form}", data), *options]


PACKED = [f"{form}{packing}" for form in ("txt", "jsonl") for packing in ("", ".gz", ".xz", ".zst")]
LEFT_OUT = {"folder": {"hidden": 2, "no text by the name": 1}, "several files": {"given twice": 1}}
FORMS = ["folder", "glob", "several files", "parquet", "field and format", *PACKED, "-txt", "-jsonl"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_documents(tmp_path, form, monkeypatch):
    monkeypatch.setattr(texts, "BLOCK_BYTES", 37)  # so that records, separators and characters cross block boundaries
    arguments = write_form(tmp_path / "in", form, monkeypatch)
    assert run(tmp_path / "out", *arguments, *BYTES, "--val-docs", 2) == 0
    assert read_bytes_split(tmp_path / "out", "val") == DOCUMENTS[:2]
    assert read_bytes_split(tmp_path / "out", "train") == DOCUMENTS[2:]
    manifest = manifest_of(tmp_path / "out")
    assert manifest["corpus"].get("left_out") == LEFT_OUT.get(form)
    assert manifest["dropped"]["empty"] == 2 * form.lstrip("-").startswith("jsonl")
    name = "stdin" if form.startswith("-") else Path(arguments[0]).name
    assert form in ("folder", "glob") or manifest["corpus"]["files"][0]["file"] == name


LINES = [json.dumps({"text": f"document {i}"}).encode() for i in range(400)]
NOISE = b"\n".join(json.dumps({"text": random.Random(i).randbytes(80).hex()}).encode() for i in range(400))
BAD_LINES = {
    "no_utf8": (b'{"text": "\xff"}', "0xff"),
    "no_json": (b'{"text": "a"', "no JSON"),
    "field": (b'{"content": "a"}', "'text'", "content (str)", "--field"),
    "number": (b'{"text": 7}', "int"),
    "list": (b'["text"]', "list"),
    "half": (b'{"text": "\\ud800"}', "surrogate"),
    "deep": (b"[" * 100_000, "JSON"),
}
FAULTS = {  # file: its content, None if missing; the message; options
    "no_utf8.txt": (b"one\n\ntwo\n\nthr\xffee\n\nfour", ["no_utf8.txt: line 5", "0xff", "UTF-8"], "--separator=\\n\\n"),
    "missing.txt": (None, ["missing.txt", "cannot be read"]),
    "*.txt": (None, ["*.txt", "no text found"]),
    "folder/": (b"", ["folder", "no text found"]),
    "unknown.md": (b"", ["unknown.md", "--format"]),
    "empty.txt": (b"", ["empty", "0 documents"]),
    "empty.jsonl.xz": (b"", ["empty.jsonl.xz", "cut short"]),
    "second.txt.xz": (lzma.compress(b"a") + b"no xz at all", ["second.txt.xz", "damaged"]),
    "no.parquet": (b"PAR1 no more", ["no.parquet", "cannot be read"]),
    "other.parquet": ({"content": ["a"]}, ["other.parquet: no column 'text', but content; choose one with --field\n"]),
    "numbers.parquet": ({"text": [1, 2]}, ["numbers.parquet: row 1: 'text' is int", "choose a column with --field\n"]),
    "cut.bin": (shard_bytes([1, 104])[:-1], ["shard", "cut.bin", "make or fetch it again"]),
}
for name, (line, *words) in BAD_LINES.items():
    FAULTS[f"{name}.jsonl"] = b"\n".join([*LINES[:300], line, *LINES[301:]]), [f"{name}.jsonl: line 301", *words]
for name in (f"{fault}.jsonl.{packing}" for fault in ("cut", "flipped") for packing in ("gz", "xz", "zst")):
    FAULTS[name] = NOISE, [f"{name}: line ", "get the file again"]


@pytest.mark.parametrize("name, tokenizer", [*((name, BYTES) for name in FAULTS), ("no_json.jsonl", LEARNED)])
def test_a_fault_is_one_line_that_names_its_place(tmp_path, name, tokenizer, capsys, small_batches):
    path, (content, words, *options) = tmp_path / name, FAULTS[name]
    if isinstance(content, dict):
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table(content), path)
    elif name == "folder/":
        path.mkdir()
        (path / "a.md").touch()
    elif content is not None:
        path.write_bytes(content)
    if name == "no.parquet":
        pytest.importorskip("pyarrow")
    if content == NOISE:
        data = pack(path, content).read_bytes()
        half = len(data) // 2
        path.write_bytes(data[: len(data) * 2 // 3] if "cut" in name else data[:half][::-1] + data[half:])
    assert run(tmp_path / "out", path, *options, *tokenizer) == 2
    assert_one_line(capsys, *words)
    assert not snapshot(tmp_path / "out")


MISTAKES = {
    "--tokenizer train:sp70000": "uint16",
    "--tokenizer train:sp100": "choose another size",
    "--tokenizer sp1024": "train:spN",
    "--tokenizer missing.model": "missing.model",
    "--tokenizer bytes --val-docs 30": "train split would be empty",
    "--tokenizer bytes --val-share 0.999999": "train split would be empty",
    "--tokenizer bytes --name a/b": "--name a/b",
    "--tokenizer bytes --val -": "standard input",
    "--tokenizer bytes --case-marks": "train:spN",
    "--tokenizer bytes --separator x": "--format txt",
}
WRONG = ["--val-docs 1 --val-share 0.5", "--val-share 0", "--val-share nan", "--val-docs 0", "--shard-tokens 0"]
WRONG += ["--threads -1", "--separator=", "--val-docs one", "--document-bytes 3"]
MISTAKES |= {f"--tokenizer bytes {wrong}": "error: " for wrong in WRONG}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_is_one_line(tmp_path, options, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(30)])
    try:
        assert run(tmp_path / "out", source, *options.split()) == 2
    except SystemExit as ended:  # from argparse, after its usage
        assert ended.code == 2 and MISTAKES[options] in capsys.readouterr().err
    else:
        assert_one_line(capsys, MISTAKES[options])


def test_a_document_beyond_the_bound_is_refused_or_cut(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(texts, "MAX_DOCUMENT_BYTES", 1000)
    (tmp_path / "a.txt").write_text("short\n---\n" + "x" * 2000)
    assert run(tmp_path / "out", tmp_path / "a.txt", r"--separator=---\n", *BYTES) == 2
    assert_one_line(capsys, "line 3", "--separator", "--document-bytes")
    assert run(tmp_path / "out", tmp_path / "a.txt", r"--separator=---\n", "--document-bytes", 900, *BYTES) == 0


@pytest.mark.parametrize("block", [1, 7, 10_000])
@pytest.mark.parametrize("separator", [(), ("--separator", "<>")])
def test_a_text_without_separators_is_cut_by_its_size(tmp_path, monkeypatch, block, separator):
    monkeypatch.setattr(texts, "BLOCK_BYTES", block)
    text = " ".join(make_documents(3, seed=2)).replace("  ", "<>")
    (tmp_path / "text8").write_bytes(text.encode())
    options = ["--format", "txt", "--document-bytes", 50, *separator, "--val-docs", 4]
    assert run(tmp_path / "out", tmp_path / "text8", *BYTES, *options) == 0
    documents = [document for split in ("val", "train") for document in read_bytes_split(tmp_path / "out", split)]
    assert "".join(documents) == (text.replace("<>", "") if separator else text), "nothing is removed"
    sizes = [len(document.encode()) for document in documents]
    assert max(sizes) <= 50 and (separator or min(sizes[:-1]) > 46)
    assert manifest_of(tmp_path / "out")["corpus"]["document_bytes"] == 50


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_that_is_read_once_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "a.txt")
    assert run(tmp_path / "out", tmp_path / "a.txt", *BYTES) == 2
    assert_one_line(capsys, "standard input")


@pytest.mark.parametrize("given", ["", "*/*.txt", "**/*.txt"])
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, given, monkeypatch, capsys):
    for name in ("in/a/1.txt", "in/closed/2.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("text")
    scandir, access = os.scandir, os.access

    def closed(path="."):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    monkeypatch.setattr(os, "access", lambda path, mode: not path.endswith("closed") and access(path, mode))
    assert run(tmp_path / "out", tmp_path / "in" / given, *BYTES) == 2
    assert_one_line(capsys, "closed: cannot be read")


# Tokenizers

FOREIGN = {  # how third-party models differ from those trained here
    "published": {"add_dummy_prefix": False},  # newlines become spaces, spaces are merged and stripped
    "prefixed": {},  # SentencePiece's defaults: it prepends a space to the text
    "prefixed, keeping spaces": shards.PLAIN | {"add_dummy_prefix": True},
    "stripped": shards.PLAIN | {"remove_extra_whitespaces": True},
    "suffixed": {"treat_whitespace_as_suffix": True},
    "with a rule": {"normalization_rule_tsv": None, "add_dummy_prefix": False},  # a rule that is not idempotent
    "unigram": shards.PLAIN | {"model_type": "unigram"},
    "across spaces": shards.PLAIN | {"split_by_whitespace": False},
    "with symbols": shards.PLAIN | {"user_defined_symbols": ["king of", "\n", "<user>"]},
    "with marks as letters": shards.PLAIN | {"required_chars": CASE_MARKS},
    "without <s>": shards.PLAIN | {"bos_id": -1},
    "without <s> and </s>": shards.PLAIN | {"bos_id": -1, "eos_id": -1},
    "without byte fallback": shards.PLAIN | {"byte_fallback": False, "character_coverage": 0.99},
}
OWN = "own", "case marks"
EXACT = {*OWN, "unigram", "across spaces", "with symbols", "with marks as letters", "without <s>"}
EXACT |= {"without <s> and </s>"}
KINDS = [*OWN, "bytes", GPT2]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{kind: Tokenizer}; those of SentencePiece have the `path` of their model."""
    documents, folder = make_documents(200, seed=1), tmp_path_factory.mktemp("models")
    rule = folder / "rule.tsv"
    rule.write_text("6E\t6B\n6B\t73\n")  # n to k, k to s
    raws = [text.encode() for text in documents]
    marked = [text.encode() for text in shards.with_capitals(documents)]
    models = {
        "own": vocab.train_sentencepiece(raws, 320, "test"),
        "case marks": vocab.train_sentencepiece(marked, 330, "test", vocab.MARKS_OPTIONS),
    }
    for name, options in FOREIGN.items():
        options = {key: str(rule) if key.endswith("tsv") else value for key, value in options.items()}
        models[name] = train_model(documents, 320, **options)
    made = {}
    for i, (name, model) in enumerate(models.items()):
        path = folder / f"{i}.model"
        path.write_bytes(model)
        made[name] = vocab.SentencePiece(path)
        made[name].path = path
    with pytest.MonkeyPatch.context() as patch:
        shards.use_local_gpt2(patch, folder / "tiktoken")
        return made | {"bytes": vocab.Bytes()} | ({"gpt2": vocab.Tiktoken("gpt2")} if GPT2_FOLDER else {})


# Characters of every script and plane, and those that tokenizers treat specially.
CHARACTERS = st.characters(exclude_categories=["Cs"])
SPECIAL = [" ", "  ", " " * 20, "\n", "\r\n", "\t", "\0", "\x1b", MARK, f"{MARK} ", EMOJI, "\U0001f469\u200d\U0001f4bb"]
SPECIAL += ["\u0301", "\u202e", "\ufeff", "\ufffd", "\u2585", "\ufb01", "\u00a0", "\u3000", "\u6d77", "\u1100\u1161"]
SPECIAL += ["\u05d0", "\u0627", "<s>", "</s>", "<unk>", "<pad>", "<0x20>", "<|endoftext|>", "the king", "the", " The"]
SPECIAL += ["KING", "McDonald", " iPhone", "A", " B", *CASE_MARKS]
TEXTS = st.lists(st.one_of(st.text(CHARACTERS, max_size=12), st.sampled_from(SPECIAL)), max_size=12).map("".join)
checked = functools.partial(settings, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("kind", KINDS)
@checked(max_examples=350)
@example(text=MARK)
@example(text=f" {MARK} {MARK}")
@example(text="  two spaces first")
@example(text="<|endoftext|><s>")
@given(text=TEXTS)
def test_every_text_comes_back(tokenizers, kind, text):
    """The oracle is the library's own decoder."""
    tokenizer, raws = tokenizers[kind], [text.encode(), b"next"]
    encoded = tt.prove(tokenizer, raws, tokenizer.encode([text, "next"]))
    tokens = encoded.tokens.tolist()
    starts = [i for i, token in enumerate(tokens) if tokenizer.table.boundary[token]]
    assert len(starts) == 2 and {tokens[i] for i in starts} == {tokenizer.start}, "no special token from text"
    assert tokenizer.table.decode(tokens[1 : starts[1]]).decode() == text
    assert encoded.lossy_documents == 0 and encoded.documents == 2
    assert encoded.bytes == encoded.token_bytes == len(text.encode()) + 4


@pytest.mark.parametrize("name", [*OWN, *FOREIGN])
@checked(max_examples=60)
@example(text="a  b", data=None)
@example(text=f"a {MARK}b{MARK}{MARK}c ", data=None)
@given(text=TEXTS, data=st.data())
def test_encoding_is_the_models_own_and_any_tokens_weigh_what_they_spell(tokenizers, name, text, data):
    tokenizer = tokenizers[name]
    assert tokenizer.exact == (name in EXACT) and tokenizer.case_marks == (name == "case marks")
    if data is not None and name != "case marks":  # misplaced marks are tested with tools/vocabularies.py
        tokens = data.draw(st.lists(st.integers(0, tokenizer.size - 1), min_size=1))
        assert tokenizer.table.count(np.array([tokenizer.start, *tokens])) == len(tokenizer.table.spell(tokens))
    if tokenizer.exact:  # deliberately spelled in bytes
        assert tokenizer.encode([" a"])[0][0] == tokenizer.sp.piece_to_id("<0x20>") or tokenizer.case_marks
        text = text.replace(MARK, "").lstrip(" ")
    assert tokenizer.encode([text])[0].tolist() == tokenizer.table.encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_encoded_in_parts_to_the_same_tokens(tokenizers, kind, monkeypatch):
    """If there is no place to cut, the tokens differ but decode to the same text."""
    tokenizer = tokenizers[kind]
    text = "  \n\n   lead" + "\n   x\t  y".join(make_documents(20, seed=3)) + "   \n  end  "
    whole = tokenizer.encode([text])[0].tolist()
    for part in range(20, 40, 3):
        monkeypatch.setattr(vocab, "PART_CHARACTERS", part)
        assert len(list(vocab.cut_parts(text))) > 100 and "".join(vocab.cut_parts(text)) == text
        assert tokenizer.encode([text], threads=2)[0].tolist() == whole
    monkeypatch.setattr(vocab, "PART_CHARACTERS", 10)
    for text in (" " * 99, "\u6d77" * 99, f"x{MARK}" * 50 + "\n" * 9, "ab" * 45 + " " * 45 + "c d"):
        assert max(map(len, vocab.cut_parts(text))) <= 20
        encoded = tt.prove(tokenizer, [text.encode()], tokenizer.encode([text]))
        assert encoded.lossy_documents == 0 and encoded.token_bytes == len(text.encode())
        assert tokenizer.table.decode(encoded.tokens[1:].tolist()).decode() == text


@pytest.mark.parametrize("kind, as_shard", [("case marks", True), (GPT2.values[0], False)])
def test_tokens_of_another_tool_become_documents(tokenizers, tmp_path, kind, as_shard, monkeypatch, capsys):
    """nanoGPT ends each document with <|endoftext|>; shards start them with it."""
    if kind not in tokenizers:
        pytest.skip("needs GPT-2's files")
    monkeypatch.setattr(texts, "BLOCK_BYTES", 10)
    documents, tokenizer = shards.with_capitals(make_documents(12, seed=3)), tokenizers[kind]
    stream = [token for ids in tokenizer.encode(documents) for token in [*ids.tolist(), tokenizer.start]]
    (tmp_path / "train.bin").write_bytes(shard_bytes(stream) if as_shard else np.array(stream, "<u2").tobytes())
    options = "--tokenizer", getattr(tokenizer, "path", kind), "--val-docs", 2
    assert run(tmp_path / "out", tmp_path / "train.bin", *options) == 0
    ids = np.concatenate([shards.read_tokens(only_folder(tmp_path / "out"), split) for split in ("val", "train")])
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.start))[1:]
    assert [tokenizer.table.decode(part[1:].tolist()).decode() for part in parts] == documents
    for wrong in ("bytes", "train:sp300"):
        assert run(tmp_path / "wrong", tmp_path / "train.bin", "--tokenizer", wrong) == 2
        assert_one_line(capsys, "train.bin", "name the tokenizer that made it")


def test_gpt2_that_cannot_be_loaded_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GPT2_BPE_DIR", str(tmp_path))
    assert run(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), "--tokenizer", "gpt2") == 2
    assert_one_line(capsys, "--tokenizer gpt2: gpt2", str(tmp_path), "GPT2_BPE_DIR", "TIKTOKEN_CACHE_DIR")


def test_a_vocabulary_beyond_uint16_is_refused(tmp_path, monkeypatch, capsys):
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)} | {b"ab" + str(i).encode(): i for i in range(256, 65536)}
    big = tiktoken.Encoding("big", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 65536})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: big)
    assert run(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), "--tokenizer", "cl100k_base") == 2
    assert_one_line(capsys, "65,537", "uint16")


def test_a_model_that_the_trainer_cannot_use_is_refused(tmp_path, capsys):
    path, source = tmp_path / "a.model", write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    unspaced = train_model(["\u4e2d\u6587" * 9], 300, **shards.PLAIN)
    for model, lack in ((unspaced, "single space"), (b"no", "is not a SentencePiece model")):
        path.write_bytes(model)
        assert run(tmp_path / "out", source, "--tokenizer", path) == 2
        assert_one_line(capsys, f"--tokenizer {path}: ", lack)


def test_a_tokenizer_learns_from_short_texts_and_from_such_without_spaces():
    short, unspaced = (
        spm.SentencePieceProcessor(model_proto=vocab.train_sentencepiece([text.encode()] * 9, size, ""))
        for text, size in (("a b", 262), ("\u4e2d\u6587\u5b57", 265))
    )
    assert short.encode("a b") and unspaced.id_to_piece(unspaced.piece_to_id(MARK)) == MARK


@pytest.mark.parametrize("character", ["\u2585", MARK])
def test_a_text_with_a_character_of_the_trainers_own_is_learned_from(tmp_path, character, capsys):
    """SentencePiece drops every sentence with U+2585, and takes U+2581 for a space."""
    source = write_jsonl(tmp_path / "a.jsonl", [f"walrus walrus {character} chart {i}" for i in range(60)])
    assert run(tmp_path / "out", source, *LEARNED, "--val-docs", 2) == 0
    about = manifest_of(tmp_path / "out")
    assert about["tokenizer"]["trained_on"]["reserved_characters"] == 58 and about["splits"]["train"]["lossless"]
    assert "58 characters U+2581 and U+2585" in capsys.readouterr().out
    (model,) = (tmp_path / "out" / "tokenizers").iterdir()
    assert f"{MARK}walrus" in spm.SentencePieceProcessor(model_file=str(model)).encode("a walrus", out_type=str)


def test_a_tokenizer_learns_from_training_documents_only_and_from_no_more_than_asked(tmp_path, monkeypatch):
    documents = [f"{text[: 20 + 41 * i % 400]} {i}" for i, text in enumerate(make_documents(60, seed=5, words=90))]
    fed, train = [], spm.SentencePieceTrainer.train

    def spy(sentence_iterator, **options):
        fed.append(list(sentence_iterator))
        train(sentence_iterator=iter(fed[-1]), **options)

    monkeypatch.setattr(spm.SentencePieceTrainer, "train", spy)
    source = write_jsonl(tmp_path / "a.jsonl", documents + documents[:5])
    for most in (10**6, 5000, 1):
        assert run(tmp_path / str(most), source, *LEARNED, "--val-docs", 20, "--train-bytes", most) == 0
    assert fed[0] == documents[20:]
    assert set(fed[1]) < set(fed[0]) and fed[1] == sorted(fed[1], key=documents.index)
    about = manifest_of(tmp_path / "5000")["tokenizer"]["trained_on"]
    assert about == {"documents": len(fed[1]), "bytes": sum(len(text.encode()) for text in fed[1])}
    smallest = sorted(documents[20:], key=digest)
    assert set(fed[1]) == set(smallest[: len(fed[1])]), "the documents of the smallest hashes"
    assert about["bytes"] <= 5000 < about["bytes"] + len(smallest[len(fed[1])].encode()), "as many of them as fit"
    assert fed[2] == smallest[:1], "at least one"


# Validation and duplicates


@pytest.mark.parametrize("how, tokenizer", [("docs", BYTES), ("file", BYTES), ("file", LEARNED)])
def test_duplicates_of_validation_are_dropped_from_training(tmp_path, how, tokenizer, small_batches):
    documents = make_documents(80, seed=6)
    val, train = documents[:30], documents[30:]
    mixed = [*train[:20], val[3], *train[20:], train[0], val[29], val[3]]
    if how == "docs":
        options = [write_jsonl(tmp_path / "a.jsonl", val + mixed), "--val-docs", 30]
    else:
        (tmp_path / "held").mkdir()
        write_jsonl(tmp_path / "held" / "1.jsonl", val[:10])
        write_jsonl(tmp_path / "held" / "2.jsonl", val[10:])
        options = [write_jsonl(tmp_path / "a.jsonl", mixed), "--val", tmp_path / "held"]
    assert run(tmp_path / "out", *options, *tokenizer) == 0
    manifest = manifest_of(tmp_path / "out")
    assert manifest["dropped"]["duplicates_of_validation"] == 3
    assert [manifest["splits"][split]["documents"] for split in ("train", "val")] == [51, 30]
    assert manifest["splits"]["train"]["bytes"] == len("".join([*train, train[0]]).encode())
    if tokenizer == BYTES:
        assert read_bytes_split(tmp_path / "out", "val") == val
        assert read_bytes_split(tmp_path / "out", "train") == [*train, train[0]], "duplicates within a split stay"


def test_a_share_is_chosen_by_the_text_alone(tmp_path, small_batches):
    documents, chosen = [f"document number {i}" for i in range(2000)], []
    for name, members in {"a": documents, "b": [*documents[::-1], *documents[:500]]}.items():
        source = write_jsonl(tmp_path / f"{name}.jsonl", members)
        assert run(tmp_path / name, source, *BYTES, "--val-share", 0.1) == 0
        chosen.append(set(read_bytes_split(tmp_path / name, "val")))
        assert not chosen[-1] & set(read_bytes_split(tmp_path / name, "train"))
    assert chosen[0] == chosen[1]
    assert 140 < len(chosen[0]) < 260, "10% of 2,000, give or take 4.5 standard deviations"


@pytest.mark.parametrize("tokenizer", [BYTES, LEARNED])
def test_at_least_one_document_is_validation(tmp_path, tokenizer):
    documents = make_documents(12, seed=7)
    smallest = min(documents, key=digest)
    options = [write_jsonl(tmp_path / "a.jsonl", [*documents, smallest]), *tokenizer, "--val-share", "0.000001"]
    assert run(tmp_path / "out", *options) == 0
    manifest, before = manifest_of(tmp_path / "out"), snapshot(tmp_path / "out")
    splits = manifest["splits"]
    assert (splits["train"]["documents"], splits["val"]["documents"]) == (11, 2)
    if tokenizer == LEARNED:
        assert manifest["tokenizer"]["trained_on"]["documents"] == 11, "it has learned nothing from validation"
    assert splits["val"]["bytes"] == 2 * len(smallest.encode())
    assert run(tmp_path / "out", *options) == 0 and snapshot(tmp_path / "out") == before


# Files


@pytest.fixture
def source(tmp_path) -> Path:
    documents = make_documents(150, seed=8)
    documents[10] = f"  {MARK}two spaces first {EMOJI}"
    documents[15:25] = shards.with_capitals(documents[15:25])
    return write_jsonl(tmp_path / "text.jsonl", documents)


@pytest.mark.parametrize("name", ["train:sp300", "train:sp330 --case-marks", "bytes", GPT2, *OWN, *FOREIGN])
def test_the_manifest_is_true_and_the_trainer_accepts_what_is_made(
    tmp_path, source, tokenizers, name, capsys, small_batches
):
    """With any tokenizer: exact, or LOSSY with the number. The trainer's audit reproduces the manifest's byte count."""
    spec = name.split() if name.startswith("train:") else [getattr(tokenizers[name], "path", name)]
    assert run(tmp_path / "out", source, "--tokenizer", *spec, "--val-docs", 20, "--shard-tokens", 4000) == 0
    manifest, folder, out = manifest_of(tmp_path / "out"), only_folder(tmp_path / "out"), capsys.readouterr().out
    documents, about = [json.loads(line)["text"] for line in source.open(encoding="utf-8")], manifest["tokenizer"]
    assert str(tmp_path) not in json.dumps(manifest | {"command": ""})
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    listed = {"file": "text.jsonl", "bytes": source.stat().st_size, "sha256": sha256}
    assert manifest["corpus"]["files"] == [listed]
    for split, members in {"val": documents[:20], "train": documents[20:]}.items():
        entry = shards.check_split(folder, manifest, split, members, about["start"], 4000)
        difference = entry["token_bytes"] - entry["bytes"]
        # A model's own space before a text counts zero bytes, and only one text starts with another.
        if name not in FOREIGN or name in EXACT or (name, split) == ("prefixed, keeping spaces", "train"):
            assert entry["lossless"] and difference == entry["lossy_documents"] == 0 and f"{split}: lossless" in out
        else:
            assert entry["lossless"] is False and 0 < entry["lossy_documents"] <= entry["documents"]
            assert f"{split}: LOSSY, {entry['lossy_documents']:,} documents" in out and f"{difference:+,} (" in out
        if name == "published":
            sp = tokenizers[name].sp
            assert entry["lossy_documents"] == sum(sp.decode(sp.encode(text)) != text for text in members)
    learned = about["kind"] == "sentencepiece"
    path = tmp_path / "out" / "tokenizers" / about["file"] if learned else name
    assert (tmp_path / "out" / "tokenizers").exists() == ("file" in about) == learned
    assert not learned or hashlib.sha256(path.read_bytes()).hexdigest() == about["sha256"]
    table = train_gpt.TokenBytes(str(path), about["vocab_size"])
    stream = train_gpt.TokenStream(str(folder), "val", about["vocab_size"])
    line, facts = train_gpt.audit(table, stream, str(folder))
    stated = manifest["splits"]["val"]
    assert facts["val_bytes"] == stated["token_bytes"]
    assert facts["bytes_proved"] == (stated["bytes"] == stated["token_bytes"])


@pytest.mark.parametrize("tokenizer", ["train:sp300", GPT2])
def test_the_same_files_with_any_number_of_threads_and_batches(tmp_path, source, tokenizer, monkeypatch):
    for threads, size in {1: 3000, 3: 2**20}.items():
        monkeypatch.setattr(tt, "BATCH_BYTES", size)
        options = ["--tokenizer", tokenizer, "--val-share", 0.2, "--shard-tokens", 4000, "--threads", threads]
        assert run(tmp_path / str(threads), source, *options) == 0
    assert len(list(only_folder(tmp_path / "1").glob("fineweb_train_*"))) > 2
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "3")


def test_the_recorded_command_makes_the_same_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_bytes("--\t\\\n".join(make_documents(40, seed=9)).encode())
    options = ["--separator=--\\t\\\\\\n", *LEARNED, "--val-docs", 7, "--shard-tokens", 3000]
    options += ["--document-bytes", 300, "--case-marks", "--name", "other"]
    assert run(tmp_path / "a", "text.txt", *options) == 0
    command = shlex.split(manifest_of(tmp_path / "a")["command"])
    assert command[:2] == ["python", "data/tokenize_text.py"]
    assert run(tmp_path / "b", *command[2:]) == 0
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def forked(*arguments, end_at=None, by="SIGKILL"):
    """The command in its own process, which a signal ends just before the Nth file or folder gets its final name."""

    def work():
        left = [end_at]

        def ended(change):
            def instead(source, target):
                if not left[0]:
                    signal.raise_signal(getattr(signal, by))
                left[0] -= 1
                change(source, target)

            return instead

        if end_at is not None:
            os.replace, os.rename = ended(os.replace), ended(os.rename)
        common.leave(tt.main([*map(str, arguments)]))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


@needs_fork
@pytest.mark.parametrize("moment", range(5))
def test_a_killed_run_leaves_nothing_that_looks_complete(tmp_path, source, moment):
    options = [source, *LEARNED, "--val-share", "0.3", "--name", "mine", "--overwrite"]
    assert run(tmp_path / "whole", *options) == 0
    assert run(tmp_path / "out", source, "--tokenizer", "train:sp310", "--name", "mine") == 0
    former, whole = snapshot(tmp_path / "out"), snapshot(tmp_path / "whole")
    process = forked(*options, "--out", tmp_path / "out", end_at=moment)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = {name: data for name, data in snapshot(tmp_path / "out").items() if not re.search("~|[.]tmp$", name)}
    if moment < 2:  # the mark of the working folder, then the previous dataset is moved aside
        assert left == former
    else:
        assert not any(name.startswith("datasets") for name in left), "beside which tokenizer?"
        assert all(data in (former[name], whole[name]) for name, data in left.items())
    assert run(tmp_path / "out", *options) == 0
    assert snapshot(tmp_path / "out") == whole


@needs_fork
def test_ctrl_c_says_what_is_there(tmp_path, source, capfd):
    process = forked(source, *LEARNED, "--out", tmp_path / "out", end_at=1, by="SIGINT")
    process.join()
    assert process.exitcode == 130
    message = "nothing is in place that was not before; the same command begins anew"
    assert_one_line(capfd, message, start="interrupted: ")
    assert not snapshot(tmp_path / "out")


def test_two_commands_at_once_do_not_mix(tmp_path, source, capsys):
    with common.claimed(tmp_path / "out" / "datasets" / "mine", "the first command"):
        assert run(tmp_path / "out", source, *BYTES, "--name", "mine") == 2
        assert_one_line(capsys, "mine", "another command is making it", str(os.getpid()), "the first command")
        assert run(tmp_path / "out", source, *BYTES, "--name", "mine.other") == 0
    assert run(tmp_path / "out", source, *BYTES, "--name", "mine") == 0


def is_whole(root: Path) -> bool:
    return common.is_complete(only_folder(root), None, manifest_of(root))


@pytest.mark.parametrize("terminal", ["closed pipe", "ascii"])
def test_a_printed_line_never_ends_a_run(tmp_path, terminal):
    source = write_jsonl(tmp_path / f"{EMOJI}.jsonl", make_documents(20, seed=1))
    root = tmp_path / f"\u6d77{EMOJI}"
    command = [sys.executable, shards.DATA / "tokenize_text.py", source, *BYTES, "--out", root, "--name", "mine"]
    environ = os.environ | {"PYTHONIOENCODING": "utf-8" if terminal == "closed pipe" else terminal}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ)
    if terminal == "closed pipe":
        process.stdout.close()
    assert process.wait(timeout=120) == 0 and process.stderr.read() == b""
    assert is_whole(root)
    process.stderr.close()


SHARD = "fineweb_train_000000.bin"
DAMAGES = {  # file: its new content, None if lost; by default nothing happens
    "nothing": (),
    "a changed bit": (SHARD, lambda data: data[:-1] + b"x"),
    "a lost shard": ("fineweb_val_000000.bin", None),
    "a shard too many": ("fineweb_train_000099.bin", lambda data: b"x"),
    "a lost tokenizer": ("tokenizer", None),
    "a changed tokenizer": ("tokenizer", lambda data: b"x"),
    "a lost manifest": ("manifest.json", None),
    "half a manifest": ("manifest.json", lambda data: data[: len(data) // 2]),
    "another manifest": ("manifest.json", lambda data: b'{"splits": {}}'),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_repaired_and_a_second_run_changes_nothing(tmp_path, source, what, monkeypatch, capsys):
    """If no manifest says which files belong to the dataset, only with --overwrite."""
    assert run(tmp_path / "out", source, *LEARNED) == 0
    whole, before, folder = snapshot(tmp_path / "out"), shards.times(tmp_path / "out"), only_folder(tmp_path / "out")
    for name, change in [DAMAGES[what]] if DAMAGES[what] else []:
        path = tmp_path / "out" / "tokenizers" / f"{folder.name}.model" if name == "tokenizer" else folder / name
        path.write_bytes(change(path.read_bytes() if path.exists() else b"")) if change else path.unlink()
    capsys.readouterr()
    if what == "nothing":
        monkeypatch.setattr(tt, "take_sample", None)
    overwrite = ["--overwrite"] * what.endswith("manifest")
    assert run(tmp_path / "out", source, *LEARNED, *overwrite) == 0
    assert snapshot(tmp_path / "out") == whole and ("nothing to do" in capsys.readouterr().out) == (what == "nothing")
    assert what != "nothing" or shards.times(tmp_path / "out") == before


@pytest.mark.parametrize("what", ["another data set", "shards without a manifest", "a tokenizer"])
def test_nothing_of_another_origin_is_lost(tmp_path, source, what, capsys):
    folder, model = tmp_path / "out" / "datasets" / "mine", tmp_path / "out" / "tokenizers" / "mine.model"
    if what == "another data set":
        assert run(tmp_path / "out", source, *BYTES, "--name", "mine") == 0
    else:
        path = model if what == "a tokenizer" else folder / SHARD
        path.parent.mkdir(parents=True)
        path.write_bytes(b"mine")
    before, options = snapshot(tmp_path / "out"), [source, *LEARNED, "--name", "mine"]
    capsys.readouterr()
    assert run(tmp_path / "out", *options) == 2
    assert_one_line(capsys, "mine", "--overwrite", "--name")
    assert snapshot(tmp_path / "out") == before
    assert run(tmp_path / "out", *options, "--overwrite") == run(tmp_path / "fresh", *options) == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "fresh")


def test_an_unwritable_root_is_one_line(tmp_path, source, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert run(tmp_path / "file", source, *BYTES) == 2
    assert_one_line(capsys, "--out DIR")
