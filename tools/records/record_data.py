"""Known validation sets, and a search for validation documents in the training data."""

import hashlib
import math
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import numpy as np
from record_read import digits, read_manifest

from train_gpt import TokenStream, open_shard

# Bytes of FineWeb's validation set (its first 50,000 documents). The set used on the challenge's launch day was larger;
# its byte count is inferred from the naive baseline's score.
FINEWEB_BYTES, LAUNCH_BYTES = 151_080_363, 155_769_746
KNOWN_TEXTS = {  # {targets: bytes}
    62_021_632: FINEWEB_BYTES,  # vocabulary of 1,024
    45_514_752: FINEWEB_BYTES,  # vocabulary of 4,096
    40_540_160: FINEWEB_BYTES,  # vocabulary of 8,192
    47_851_520: FINEWEB_BYTES,  # vocabulary of 8,192 with case markers
    63_779_840: LAUNCH_BYTES,  # launch day, vocabulary of 1,024
}
# Relative tolerance: scripts drop an incomplete last sequence, or up to a batch per rank.
RAGGED = 1.5e-3
CHUNK = 2**24
SHORTEST = 32  # minimum length in tokens of a compared document; shorter ones repeat by chance


def known_bytes(targets: int) -> int | None:
    """Return the bytes of the known FineWeb validation set with about this many targets, or None."""
    near = (known for known in KNOWN_TEXTS if math.isclose(targets, known, rel_tol=RAGGED))
    return KNOWN_TEXTS.get(next(near, None))


def rounding(loss: Decimal, bpb: Decimal) -> float:
    """Return the relative error of the implied byte count due to the rounding of loss and BPB."""
    return sum(digits(value) / float(value) for value in (loss, bpb)) + 1e-9


def shards(folder: Path, split: str) -> list[Path]:
    """Return the shard files of a split, in order."""
    return [Path(shard.filename) for shard in TokenStream(str(folder), split, 2**16).shards]


def fingerprints(paths: list[Path], start: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the 64-bit hash and the length in tokens of every document; each document begins with token `start`.

    The hash sums a mix of token and position over all positions, modulo 2**64, which vectorizes over the documents of a
    chunk. Equal documents have equal hashes; different ones collide with a probability of about 2**-64 per pair.
    """
    found = list(hash_documents(paths, start))
    hashes, lengths = (np.concatenate([np.empty(0, np.uint64), *(pair[i] for pair in found)]) for i in (0, 1))
    return hashes, lengths.astype(np.int64)


def hash_documents(paths: list[Path], start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rest = np.empty(0, np.uint64)  # the document that continues in the next chunk
    for path in paths:
        tokens = open_shard(path)
        for begin in range(0, len(tokens), CHUNK):
            chunk = np.concatenate([rest, tokens[begin : begin + CHUNK].astype(np.uint64)])
            borders = np.flatnonzero(chunk == start)
            rest = chunk[borders[-1] :] if len(borders) > 1 else chunk
            if len(borders) > 1:
                yield hash_chunk(chunk[: borders[-1]], borders[:-1])
    if len(borders := np.flatnonzero(rest == start)):
        yield hash_chunk(rest, borders[:1])


def hash_chunk(tokens: np.ndarray, borders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes and lengths of the documents that begin at `borders`; the last one extends to the end."""
    tokens, borders = tokens[borders[0] :], borders - borders[0]
    sizes = np.diff(borders, append=len(tokens))
    position = (np.arange(len(tokens)) - np.repeat(borders, sizes)).astype(np.uint64)
    # Odd constants from splitmix64 and xxhash, then splitmix64's finalizer.
    token_factor, position_factor = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
    mixed = (tokens + np.uint64(1)) * token_factor ^ (position + np.uint64(1)) * position_factor
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.add.reduceat(mixed ^ (mixed >> np.uint64(31)), borders), sizes


def leaked(folder: Path, start: int) -> tuple[int, int, float]:
    """Return (validation documents found in the training data, all validation documents, fraction of validation tokens
    in the documents found). Documents shorter than SHORTEST tokens never count as found."""
    hashes, lengths = fingerprints(shards(folder, "val"), start)
    found = np.zeros(len(hashes), bool)
    for path in shards(folder, "train"):  # misses documents that span two shards
        found |= np.isin(hashes, fingerprints([path], start)[0])
    found &= lengths >= SHORTEST
    return int(found.sum()), len(hashes), float(lengths[found].sum() / max(lengths.sum(), 1))


def hash_tokens(folder: Path, split: str) -> str:
    """Return the sha256 of a split's tokens; result.json records it for the validation set."""
    digest = hashlib.sha256()
    for path in shards(folder, split):
        digest.update(open_shard(path))  # memory-mapped, so not loaded all at once
    return digest.hexdigest()


def start_token(folder: Path) -> int:
    """Return the token that begins each document, from the data's manifest; 1 in the published shards."""
    tokenizer = read_manifest(folder / "manifest.json").get("tokenizer", {})
    return tokenizer.get("start", tokenizer.get("options", {}).get("bos_id", 1))
