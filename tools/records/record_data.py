"""What a validation text is known to be, and whether a training set holds its documents."""

import hashlib
import math
import re
from decimal import Decimal
from pathlib import Path

import numpy as np
from record_read import read_manifest

# Targets of FineWeb's validation text (its first 50,000 documents) by tokenizer, and the bytes of that text. The set of
# the challenge's launch day was larger; its bytes are those that the score of the naive baseline was divided by.
FINEWEB_BYTES, LAUNCH_BYTES = 151_080_363, 155_769_746
FINEWEB_TARGETS = {
    62_021_632: "1,024 pieces",
    45_514_752: "4,096 pieces",
    40_540_160: "8,192 pieces",
    47_851_520: "8,192 pieces with case marks",
}
LAUNCH_TARGETS = 63_779_840
# Scripts drop the ragged end in their own ways: up to a sequence or a batch per rank.
RAGGED = 1.5e-3
CHUNK = 2**24


def known_text(tokens: int) -> tuple[str, int] | None:
    """(name, bytes) of the FineWeb text with about this many targets."""
    for targets, name in (FINEWEB_TARGETS | {LAUNCH_TARGETS: "launch day, 1,024 pieces"}).items():
        if math.isclose(tokens, targets, rel_tol=RAGGED):
            return name, LAUNCH_BYTES if targets == LAUNCH_TARGETS else FINEWEB_BYTES
    return None


def rounding(loss: Decimal, bpb: Decimal) -> float:
    """Relative error of implied bytes that comes from the digits of a loss and a score."""
    parts = (10.0 ** value.as_tuple().exponent / float(value) for value in (loss, bpb))
    return sum(parts) + 1e-9


def shards(folder: Path, split: str) -> list[Path]:
    named = re.compile(rf"fineweb_{split}_\d+\.bin")
    return sorted(path for path in folder.glob("*.bin") if named.fullmatch(path.name))


def fingerprints(paths: list[Path], start: int) -> tuple[np.ndarray, np.ndarray]:
    """(64-bit hash, length in tokens) of every document; a document begins with the token `start`.

    The hash is the sum over positions of a mix of token and position, modulo 2**64, so that all documents of a chunk
    are hashed at once. Equal documents have equal hashes; unequal ones collide with a chance of about 2**-64 a pair."""
    hashes, lengths, rest = [], [], np.empty(0, np.uint64)
    for path in paths:
        tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024)
        for begin in range(0, len(tokens), CHUNK):
            chunk = np.concatenate([rest, tokens[begin : begin + CHUNK].astype(np.uint64)])
            borders = np.flatnonzero(chunk == start)
            if len(borders) < 2:
                rest = chunk
                continue
            _hash_into(chunk[: borders[-1]], borders[:-1], hashes, lengths)
            rest = chunk[borders[-1] :]
    if len(rest):
        _hash_into(rest, np.flatnonzero(rest == start)[:1], hashes, lengths)
    empty = np.empty(0, np.uint64)
    return np.concatenate([empty, *hashes]), np.concatenate([empty, *lengths]).astype(np.int64)


def _hash_into(tokens: np.ndarray, borders: np.ndarray, hashes: list, lengths: list):
    if not len(borders):
        return
    tokens = tokens[borders[0] :]
    borders = borders - borders[0]
    sizes = np.diff(borders, append=len(tokens))
    position = (np.arange(len(tokens)) - np.repeat(borders, sizes)).astype(np.uint64)
    mixed = (tokens + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ (position + np.uint64(1)) * np.uint64(
        0xC2B2AE3D27D4EB4F
    )  # odd constants of splitmix64 and xxhash
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64's finaliser
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    hashes.append(np.add.reduceat(mixed ^ (mixed >> np.uint64(31)), borders))
    lengths.append(sizes)


def leaked(folder: Path, start: int, shortest: int = 32) -> tuple[int, int, float]:
    """(validation documents that training holds, validation documents, share of the validation tokens in the former).
    Documents under `shortest` tokens are left out: short ones repeat by chance."""
    hashes, lengths = fingerprints(shards(folder, "val"), start)
    long = lengths >= shortest
    found = np.zeros(len(hashes), bool)
    for path in shards(folder, "train"):  # a document that crosses two shards is seen in neither
        found |= np.isin(hashes, fingerprints([path], start)[0])
    found &= long
    return int(found.sum()), len(hashes), float(lengths[found].sum() / max(lengths.sum(), 1))


def hash_tokens(folder: Path, split: str) -> str:
    """sha256 of all tokens of a split, as result.json has it of the validation text."""
    digest = hashlib.sha256()
    for path in shards(folder, split):
        with open(path, "rb") as file:
            file.seek(1024)
            for block in iter(lambda: file.read(CHUNK), b""):  # noqa: B023
                digest.update(block)
    return digest.hexdigest()


def start_token(folder: Path) -> int:
    """What begins a document, by the data's manifest; 1 in the published shards."""
    tokenizer = read_manifest(folder / "manifest.json").get("tokenizer", {})
    return tokenizer.get("start", tokenizer.get("options", {}).get("bos_id", 1))
