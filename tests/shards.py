"""For tests of the data tools: a data set's files, read without the code under test."""

import hashlib
import sys
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parents[1] / "data"
sys.path.insert(0, str(DATA))  # where its scripts find each other

MARK = "\u2581"
EMOJI = "\U0001f600"


def snapshot(root: Path) -> dict[str, bytes]:
    """{path: content} of all files but locks."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def times(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def read_tokens(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([np.fromfile(path, "<u2")[512:] for path in sorted(folder.glob(f"fineweb_{split}_*.bin"))])


def check_split(folder: Path, manifest: dict, split: str, documents: list[str], start: int, most: float) -> dict:
    """What a manifest says of a split is true: shards of at most so many tokens, hashes, documents, bytes of text. The
    entry."""
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
    """Standard error is one short line for users, with these words."""
    err = captured.readouterr().err
    assert err.count("\n") == 1 and err.startswith(start) and len(err) < 500 and ".cc(" not in err, err
    for word in words:
        assert word in err, err
