"""What a validation text is known to be, and whether a training set holds its documents."""

import hashlib
import math
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import numpy as np
from record_read import digits, read_manifest

from train_gpt import TokenStream, open_shard

# Bytes of FineWeb's validation text (its first 50,000 documents). The set of the challenge's launch day was larger; its
# bytes are those that the score of the naive baseline was divided by.
FINEWEB_BYTES, LAUNCH_BYTES = 151_080_363, 155_769_746
KNOWN_TEXTS = {  # {targets: bytes}
    62_021_632: FINEWEB_BYTES,  # 1,024 pieces
    45_514_752: FINEWEB_BYTES,  # 4,096 pieces
    40_540_160: FINEWEB_BYTES,  # 8,192 pieces
    47_851_520: FINEWEB_BYTES,  # 8,192 pieces with case marks
    63_779_840: LAUNCH_BYTES,  # launch day, 1,024 pieces
}
# Scripts drop the ragged end in their own ways: up to a sequence or a batch per rank.
RAGGED = 1.5e-3
CHUNK = 2**24
SHORTEST = 32  # tokens of a document that is compared; shorter ones repeat by chance


def known_bytes(targets: int) -> int | None:
    """The bytes of the FineWeb text with about this many targets."""
    near = (known for known in KNOWN_TEXTS if math.isclose(targets, known, rel_tol=RAGGED))
    return KNOWN_TEXTS.get(next(near, None))


def rounding(loss: Decimal, bpb: Decimal) -> float:
    """Relative error of implied bytes that comes from the digits of a loss and a score."""
    return sum(digits(value) / float(value) for value in (loss, bpb)) + 1e-9


def shards(folder: Path, split: str) -> list[Path]:
    """The files of a split, in order."""
    return [Path(shard.filename) for shard in TokenStream(str(folder), split, 2**16).shards]


def fingerprints(paths: list[Path], start: int) -> tuple[np.ndarray, np.ndarray]:
    """(64-bit hash, length in tokens) of every document; a document begins with the token `start`.

    The hash is the sum over positions of a mix of token and position, modulo 2**64, so that all documents of a chunk
    are hashed at once. Equal documents have equal hashes; different ones collide with a chance of about 2**-64 a pair.
    """
    found = list(hash_documents(paths, start))
    hashes, lengths = (np.concatenate([np.empty(0, np.uint64), *(pair[i] for pair in found)]) for i in (0, 1))
    return hashes, lengths.astype(np.int64)


def hash_documents(paths: list[Path], start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rest = np.empty(0, np.uint64)  # the document that the next chunk goes on with
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
    """Hashes and lengths of the documents that begin at `borders`; the last one ends with the tokens."""
    tokens, borders = tokens[borders[0] :], borders - borders[0]
    sizes = np.diff(borders, append=len(tokens))
    position = (np.arange(len(tokens)) - np.repeat(borders, sizes)).astype(np.uint64)
    # Odd constants of splitmix64 and xxhash, then splitmix64's finalizer.
    token_factor, position_factor = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
    mixed = (tokens + np.uint64(1)) * token_factor ^ (position + np.uint64(1)) * position_factor
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.add.reduceat(mixed ^ (mixed >> np.uint64(31)), borders), sizes


def leaked(folder: Path, start: int) -> tuple[int, int, float]:
    """(validation documents that training holds, validation documents, share of the validation tokens in the former).
    Documents under SHORTEST tokens are left out."""
    hashes, lengths = fingerprints(shards(folder, "val"), start)
    found = np.zeros(len(hashes), bool)
    for path in shards(folder, "train"):  # a document that crosses two shards is seen in neither
        found |= np.isin(hashes, fingerprints([path], start)[0])
    found &= lengths >= SHORTEST
    return int(found.sum()), len(hashes), float(lengths[found].sum() / max(lengths.sum(), 1))


def hash_tokens(folder: Path, split: str) -> str:
    """sha256 of all tokens of a split, as result.json has it of the validation text."""
    digest = hashlib.sha256()
    for path in shards(folder, split):
        digest.update(open_shard(path))  # mapped into memory, so not read at once
    return digest.hexdigest()


def start_token(folder: Path) -> int:
    """The token that begins a document, by the data's manifest; 1 in the published shards."""
    tokenizer = read_manifest(folder / "manifest.json").get("tokenizer", {})
    return tokenizer.get("start", tokenizer.get("options", {}).get("bos_id", 1))
