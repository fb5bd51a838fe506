"""Turn any text into shards, a tokenizer and a manifest that states the true bytes of the text.

    python data/tokenize_text.py book.txt --separator '\\n\\n\\n' --tokenizer train:sp1024   # learn a tokenizer, use it
    python data/tokenize_text.py corpus/ --tokenizer gpt2 --val-docs 1000                 # a folder, GPT-2's tokens
    python data/tokenize_text.py 'part_*.jsonl.zst' --tokenizer my.model --val held.jsonl # a model of your own
    zcat all.jsonl.gz | python data/tokenize_text.py - --format jsonl --name all --tokenizer bytes

data/README.md describes the formats. A tokenizer is learned in a first reading; then texts are read, encoded in batches
by the tokenizer's own library, proved and written, beside the place of the data set, which is taken at the very end.
The result depends on the input and the options alone, not on the number of threads.
"""

import argparse
import hashlib
import heapq
import os
import re
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np
from common import DATA_ROOT, hash_file, say
from texts import BLOCK_BYTES, MAX_DOCUMENT_BYTES, SUFFIXES, Document, TextFile, find_files, plain_name, read_documents
from tqdm import tqdm
from vocab import UNLEARNED, SentencePiece, Tokenizer, choose_tokenizer, tokenizer_options, train_tokenizer

from train_gpt import SHARD_HEADER_BYTES, SHARD_MAGIC, SHARD_VERSION, UserError

SHARD_TOKENS = 100_000_000
DEFAULT_SHARE = 0.01  # of the documents, for validation
# Of 150 MB of Wikipedia, 5, 10, 20, 40 and 100 MB gave 2.401, 2.401, 2.401, 2.402 and 2.403 bytes per token at 1,024
# pieces and 3.842, 3.863, 3.875, 3.884 and 3.886 at 8,192.
TRAIN_BYTES_PER_PIECE, MAX_TRAIN_BYTES = 20_000, 100_000_000
SPLITS = "train", "val"

BATCH_BYTES = 2**22  # of text that is encoded at a time; three batches are in memory


# ----------------------------------------------------------------------------------------------------------------------
# Split
# ----------------------------------------------------------------------------------------------------------------------


class Split:
    """Says of one document after the other where it belongs. Validation are those of files held out and the first
    `val_docs`, which stand before all others, and those whose hash, as a number, is under `below`. What validation has,
    training has not."""

    def __init__(self, args: argparse.Namespace, below: int):
        self.val_docs, self.below = args.val_docs or 0, below
        self.held_out: set[bytes] = set()
        self.counts: Counter = Counter()  # train, val, duplicates (of validation), empty
        self.smallest = 2**128  # hash of a document that belongs to a split

    def place(self, document: Document, file: TextFile) -> tuple[str | None, int]:
        """train, val or None; and the hash."""
        if not document.raw:
            self.counts["empty"] += file.form != "txt"  # between two separators there may be nothing
            return None, 0
        digest = hashlib.blake2b(document.raw, digest_size=16).digest()
        key = int.from_bytes(digest, "big")
        first = file.held_out or self.counts["val"] < self.val_docs
        if first:
            self.held_out.add(digest)
        elif digest in self.held_out:
            self.counts["duplicates"] += 1
            return None, key
        where = "val" if first or key < self.below else "train"
        self.counts[where] += 1
        self.smallest = min(self.smallest, key)
        return where, key

    def read(self, files: list[TextFile], label: str, tokenizer: Tokenizer | None = None) -> Iterator[tuple]:
        """(split or None, hash, document) of the whole input."""
        total = sum(file.path.stat().st_size for file in files)
        with tqdm(total=total, desc=label, unit="B", unit_scale=True, leave=False, disable=None) as progress:
            for file in files:
                for document in read_documents(file, progress, tokenizer):
                    yield *self.place(document, file), document


def take_sample(files: list[TextFile], split: Split, size: int) -> list[bytes]:
    """The training documents of the smallest hashes that fit `size` bytes, in their order, but at least one. Where no
    hash was under the share of validation, `split.below` is raised to the smallest."""
    heap, sampled = [], 0  # (minus the hash, order, document): the largest hash is on top
    beyond = 2**128  # hashes from here on have no place in the sample
    for order, (where, key, document) in enumerate(split.read(files, "survey")):
        if where == "train" and key < beyond:
            heapq.heappush(heap, (-key, order, document.raw))
            sampled += len(document.raw)
            while sampled > size and len(heap) > 1:
                largest, _, raw = heapq.heappop(heap)
                beyond, sampled = -largest, sampled - len(raw)
    if split.below and not split.counts["val"]:
        split.below = split.smallest + 1
    return [raw for _, raw in sorted((order, raw) for key, order, raw in heap if -key >= split.below)]


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer
# ----------------------------------------------------------------------------------------------------------------------


def learn(size: int, sample: list[bytes], work: Path, args: argparse.Namespace) -> tuple[SentencePiece, dict]:
    """A tokenizer of `size` pieces from a sample, and how much that was."""
    about = {"documents": len(sample), "bytes": sum(map(len, sample))}
    say(f"training {size} pieces on {about['documents']:,} training documents, {about['bytes'] / 1e6:.1f} MB")
    if reserved := sum(raw.count(char.encode()) for raw in sample for char in UNLEARNED):
        about["reserved_characters"] = reserved
        say(f"not learned, but spelled in bytes: {reserved:,} characters U+2581 and U+2585, which SentencePiece keeps")
    options = tokenizer_options(args.case_marks)
    return train_tokenizer(sample, size, f"--tokenizer {args.tokenizer}", options, work), about


# ----------------------------------------------------------------------------------------------------------------------
# Encode, and prove every document
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """Consecutive documents of one split as tokens, and what they stand for."""

    tokens: np.ndarray  # uint16, with the start tokens
    documents: int
    bytes: int  # of the text itself
    token_bytes: int  # that the tokens stand for
    lossy_documents: int  # whose tokens do not spell their text


def prove(tokenizer: Tokenizer, documents: list[bytes], encoded: list[np.ndarray]) -> Encoded:
    """Documents with their tokens, which are spelled again and compared with every text."""
    start = np.array([tokenizer.start], np.uint16)
    tokens = np.concatenate([part for ids in encoded for part in (start, ids)])
    spelled = (tokenizer.table.spell(ids.tolist()) for ids in encoded)
    lossy = sum(text != raw for text, raw in zip(spelled, documents, strict=True))
    true_bytes, token_bytes = sum(map(len, documents)), tokenizer.table.count(tokens)
    assert lossy or token_bytes == true_bytes, f"{token_bytes} bytes counted, {true_bytes} spelled"
    return Encoded(tokens, len(documents), true_bytes, token_bytes, lossy)


def batches(documents: Iterable[tuple]) -> Iterator[list[tuple[str, Document]]]:
    """Consecutive documents that have a split, about BATCH_BYTES of text at a time; an empty list at the end."""
    batch, size = [], 0
    for split, _, document in documents:
        if split is not None:
            batch.append((split, document))
            size += len(document.raw)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield from [batch, []] if batch else [[]]


def encode_all(documents: Iterable[tuple], tokenizer: Tokenizer, threads: int) -> Iterator[tuple[str, Encoded]]:
    """Splits and their tokens, in order. While the library encodes a batch, this thread proves the one before it, has
    it written, and reads the next."""
    former, future = [], None
    for batch in batches(documents):
        encoded = future.result() if future else []
        if batch:
            future = common.in_thread(tokenizer.encode, [document.text for _, document in batch], threads)
        for split in SPLITS:
            members = [i for i, (where, _) in enumerate(former) if where == split]
            if members:
                yield split, prove(tokenizer, [former[i][1].raw for i in members], [encoded[i] for i in members])
        former = batch


# ----------------------------------------------------------------------------------------------------------------------
# Write
# ----------------------------------------------------------------------------------------------------------------------


class SplitWriter:
    """Writes the shards of a split as tokens come: 256 little-endian int32 (magic, version, token count, zeros), then
    uint16 tokens."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.prefix, self.shard_tokens, self.file = folder / f"fineweb_{split}", shard_tokens, None
        self.counts, self.shards = Counter(), []

    def add(self, it: Encoded) -> None:
        self.counts.update(documents=it.documents, tokens=len(it.tokens), bytes=it.bytes, token_bytes=it.token_bytes)
        self.counts["lossy_documents"] += it.lossy_documents
        tokens = it.tokens.astype("<u2")
        while len(tokens):
            if self.file is None:
                self.file, self.room = open(f"{self.prefix}_{len(self.shards):06d}.bin", "wb"), self.shard_tokens
                self.file.write(bytes(SHARD_HEADER_BYTES))
            part, tokens = tokens[: self.room], tokens[self.room :]
            self.file.write(part.tobytes())
            self.room -= len(part)
            if self.room == 0:
                self.finish()

    def finish(self) -> None:
        if self.file is None:
            return
        tokens, path = self.shard_tokens - self.room, Path(self.file.name)
        with self.file as file:
            file.seek(0)
            file.write(np.array([SHARD_MAGIC, SHARD_VERSION, tokens], dtype="<i4").tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.file = None
        self.shards.append({"file": path.name, "tokens": tokens, "sha256": hash_file(path)})

    def entry(self) -> dict:
        """For the manifest."""
        counts = {name: self.counts[name] for name in ("documents", "tokens", "bytes", "token_bytes")}
        lossy = self.counts["lossy_documents"]
        return {**counts, "lossless": lossy == 0, "lossy_documents": lossy, "shards": self.shards}


def write_shards(work: Path, encoded: Iterable[tuple[str, Encoded]], shard_tokens: int) -> dict[str, dict]:
    """All shards of a data set in the folder `work`; what the manifest says of its splits."""
    writers = {split: SplitWriter(work, split, shard_tokens) for split in SPLITS}
    for split, it in encoded:
        writers[split].add(it)
    for writer in writers.values():
        writer.finish()
    return {split: writer.entry() for split, writer in writers.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Describe, and the command
# ----------------------------------------------------------------------------------------------------------------------


def number(kind: type, least: float, most: float) -> Callable:
    """A reader of numbers from `least` to `most`, for options."""

    def read(text: str):
        value = kind(text.replace("_", ""))
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text}: expected {least:,} to {most:,}")
        return value

    return read


def separator(text: str) -> bytes:
    r"""The bytes of a separator; \n, \r, \t and \\ as in most languages, as few shells have a way to spell them."""
    if not text:
        raise argparse.ArgumentTypeError("empty: expected what stands between two documents, such as '\\n\\n'")
    return re.sub(r"\\([nrt\\])", lambda m: {"n": "\n", "r": "\r", "t": "\t"}.get(m[1], m[1]), text).encode("utf-8")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n    ")[0], allow_abbrev=False)
    whole, add = number(int, 1, 2**40), parser.add_argument
    # fmt: off
    add("inputs", nargs="+", metavar="INPUT",
        help=f"files, folders or globs of {SUFFIXES}; *.bin of tokens; - is standard input")
    add("--tokenizer", required=True, metavar="WHAT", help="train:sp1024 (or any number of pieces), a SentencePiece "
        ".model, gpt2 or another name of tiktoken's, or bytes")
    add("--case-marks", action="store_true", help="with train:spN: capital letters become marks, so that a word and "
        "its capitalised form share their pieces")
    add("--val-docs", type=whole, metavar="N", help="validation: the first N documents")
    add("--val-share", type=number(float, 1e-9, 1 - 1e-9), metavar="F", help="validation: this share of the "
        f"documents, chosen by their hashes, at least one (default {DEFAULT_SHARE})")
    add("--val", nargs="+", metavar="FILE", help="validation: these files, folders or globs")
    add("--field", default="text", help="of a JSON line or a parquet row: the text (default text)")
    add("--separator", type=separator, default=b"", metavar="S",
        help=r"cut each .txt into documents where this stands, such as '\n\n' (default: no cut)")
    add("--document-bytes", type=number(int, 4, MAX_DOCUMENT_BYTES), default=0, metavar="N",
        help="cut each .txt (after --separator) into documents of at most N bytes")
    add("--format", choices=["txt", "jsonl"], help="of standard input and of all INPUTs, whatever their names "
        "(default: by the name; txt for standard input)")
    add("--name", help="of the data set (default: the first input and the tokenizer)")
    add("--out", type=Path, default=DATA_ROOT, help="data root (default: the folder of this script)")
    add("--shard-tokens", type=whole, default=SHARD_TOKENS, metavar="N",
        help=f"most tokens in one shard (default {SHARD_TOKENS})")
    add("--train-bytes", type=whole, metavar="N", help="most text that a tokenizer learns from, sampled by hash "
        f"(default {TRAIN_BYTES_PER_PIECE} a piece, at most {MAX_TRAIN_BYTES})")
    add("--threads", "--workers", type=whole, metavar="N",
        help="that encode (default: the processors that this process may use)")
    add("--overwrite", action="store_true", help="replace another data set of this name")
    # fmt: on
    args = parser.parse_args(argv)
    if sum(option is not None for option in (args.val, args.val_docs, args.val_share)) > 1:
        parser.error("--val, --val-docs and --val-share exclude each other; choose one")
    if args.inputs != ["-"] and "-" in args.inputs or "-" in (args.val or []):
        raise UserError("-: standard input can only be the one INPUT; give files, or - alone")
    if args.name is not None and not re.fullmatch(r"[\w][\w.+-]*", args.name):
        raise UserError(f"--name {args.name}: expected a plain name of letters, digits and any of _ . + -")
    if args.case_marks and not args.tokenizer.startswith("train:"):
        raise UserError(
            f"--case-marks with --tokenizer {args.tokenizer}: expected train:spN; a model that was learned "
            "with marks is known by its pieces, leave the option out"
        )
    return args


def find_input(args: argparse.Namespace, work: Path, left_out: Counter) -> list[TextFile]:
    """Validation files first, then the others; standard input is kept in `work`, as it is read twice."""
    how = dict(field=args.field, separator=args.separator, document_bytes=args.document_bytes)
    files = find_files(args.val, None, left_out, held_out=True, **how) if args.val else []
    if args.inputs == ["-"]:
        with open(work / "stdin", "wb") as spool:
            shutil.copyfileobj(sys.stdin.buffer, spool, BLOCK_BYTES)
        files.append(TextFile(work / "stdin", args.format or "txt", "", held_out=False, **how))
    else:
        files += find_files(args.inputs, args.format, left_out, held_out=False, **how)
    if (args.separator or args.document_bytes) and all(file.form != "txt" for file in files):
        option = "--separator" if args.separator else "--document-bytes"
        raise UserError(f"{option}: cuts a .txt, but none is given; leave it out, or say --format txt")
    return files


def describe(name: str, files: list[TextFile], left_out: Counter, tokenizer: dict, args: argparse.Namespace) -> dict:
    """What the manifest says about a run before it reads its input. No path: the same everywhere."""

    def listed(held_out: bool) -> list[dict]:
        chosen = [file.path for file in files if file.held_out == held_out]
        return [{"file": path.name, "bytes": path.stat().st_size, "sha256": hash_file(path)} for path in chosen]

    if args.val:
        validation = {"files": listed(True)}
    else:
        share = {"share": args.val_share or DEFAULT_SHARE}
        validation = {"first_documents": args.val_docs} if args.val_docs else share
    corpus = {"files": listed(False), "field": args.field, "separator": args.separator.decode("utf-8", "replace")}
    corpus |= {"document_bytes": args.document_bytes} if args.document_bytes else {}
    corpus |= {"left_out": dict(+left_out)} if +left_out else {}
    about = {"format": 1, "name": name, "corpus": corpus, "tokenizer": tokenizer, "validation": validation}
    return about | {"shard_tokens": args.shard_tokens}


def name_dataset(args: argparse.Namespace, tag: str) -> str:
    stem = "stdin" if args.inputs == ["-"] else plain_name(Path(args.inputs[0]).resolve())
    plain = re.sub(r"[^A-Za-z0-9_.+-]+", "_", stem).strip("_.+-")
    return args.name or f"{plain or 'text'}_{tag}{'_case_marks' * args.case_marks}"


def record_command(args: argparse.Namespace) -> str:
    """The command without what does not change the result."""
    parts = ["python", "data/tokenize_text.py", *args.inputs, "--tokenizer", args.tokenizer]
    cut = args.separator.decode("utf-8", "replace").replace("\\", "\\\\")
    cut = cut.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    names = "val_docs val_share field separator document_bytes format name shard_tokens train_bytes".split()
    values = {name: getattr(args, name) for name in names} | {"separator": cut}
    # As one word, since a value may begin with a dash.
    parts += [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value]
    return shlex.join([*parts, *["--case-marks"] * args.case_marks, *(["--val", *args.val] if args.val else [])])


def check_split(split: str, documents: int, counts: Counter) -> None:
    if not documents:
        found = counts["train"] + counts["val"] + counts["duplicates"]
        remedy = "give more text, cut it into documents (--separator, --document-bytes), or choose another"
        options = "--val, --val-docs or --val-share"
        raise UserError(f"the {split} split would be empty, as the input has {found:,} documents; {remedy} {options}")


def make_splits(
    work: Path, files: list[TextFile], tokenizer: Tokenizer, below: int, args: argparse.Namespace
) -> tuple[int, dict]:
    """Encode and write everything. Where no hash is under the share of validation, once more with the smallest as
    validation. That share, and what the manifest says of the result."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    while True:
        split = Split(args, below)
        encoded = encode_all(split.read(files, "encode", tokenizer), tokenizer, args.threads or usable)
        splits = write_shards(work, encoded, args.shard_tokens)
        if splits["val"]["documents"] or not below or not splits["train"]["documents"]:
            break
        below = split.smallest + 1
    for name, it in splits.items():
        check_split(name, it["documents"], split.counts)
        if it["lossy_documents"] and not args.tokenizer.endswith(".model"):
            fault = f"a fault of this script or of {args.tokenizer}; choose another tokenizer"
            raise UserError(f"{name}: {it['lossy_documents']} documents do not come back from their tokens, {fault}")
    dropped = {"duplicates_of_validation": split.counts["duplicates"], "empty": split.counts["empty"]}
    return below, {"dropped": dropped, "splits": splits}


def report(manifest: dict) -> None:
    for why, count in manifest["corpus"].get("left_out", {}).items():
        say(f"left out of the input: {count:,} files or folders ({why})")
    duplicates, empty = manifest["dropped"]["duplicates_of_validation"], manifest["dropped"]["empty"]
    say(f"dropped {duplicates:,} training documents that validation has, skipped {empty:,} empty texts")
    for split, it in manifest["splits"].items():
        counts = f"{it['documents']:,} documents, {it['bytes']:,} bytes, {it['tokens']:,} tokens"
        say(f"{split}: {counts}, {it['bytes'] / it['tokens']:.4f} bytes per token")
        if it["lossless"]:
            say(f"{split}: lossless, the tokens of every document spell its exact bytes")
        else:
            off = it["token_bytes"] - it["bytes"]
            tokens = f"the tokens stand for {it['token_bytes']:,} bytes, {off:+,} ({off / it['bytes']:+.4%})"
            say(f"{split}: LOSSY, {it['lossy_documents']:,} documents are not spelled exactly; {tokens}")


def make_dataset(
    folder: Path, work: Path, model: Path | None, tokenizer: Tokenizer | int, args: argparse.Namespace
) -> tuple[dict, Tokenizer] | None:
    """Make the data set in `work` and put it in its place; the manifest and the tokenizer. None if all is there."""
    left_out = Counter()
    files = find_input(args, work, left_out)
    if isinstance(tokenizer, int):
        options = {"options": tokenizer_options(args.case_marks), "train_bytes": args.train_bytes}
        about = {"kind": "sentencepiece", "file": model.name, "vocab_size": tokenizer} | options
    else:
        about = tokenizer.about | ({"file": model.name} if model else {})
    try:
        header = describe(folder.name, files, left_out, about, args)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); name a file that can") from None
    if common.is_complete(folder, model, header):
        return None
    if not args.overwrite:
        common.refuse_foreign(folder, header, model)

    below = 0 if args.val or args.val_docs else int((args.val_share or DEFAULT_SHARE) * 2**128)
    if isinstance(tokenizer, int):
        split = Split(args, below)
        sample, below = take_sample(files, split, args.train_bytes), split.below
        check_split("train", len(sample), split.counts)
        tokenizer, learned = learn(tokenizer, sample, work, args)
        about |= {"start": tokenizer.start, "sha256": tokenizer.about["sha256"], "trained_on": learned}
        sample.clear()  # its memory is needed for other things
    below, made = make_splits(work, files, tokenizer, below, args)
    header["validation"]["below"] = f"{below:032x}"
    manifest = header | {"command": record_command(args)} | made
    (work / "stdin").unlink(missing_ok=True)
    common.publish(work, folder, manifest, (model, tokenizer.model) if model else None)
    return manifest, tokenizer


def tokenize(args: argparse.Namespace) -> None:
    """The whole command."""
    started, model = time.perf_counter(), None
    tag, tokenizer = choose_tokenizer(args.tokenizer)
    if isinstance(tokenizer, int) and args.train_bytes is None:
        args.train_bytes = min(MAX_TRAIN_BYTES, tokenizer * TRAIN_BYTES_PER_PIECE)
    name, tokenizers = name_dataset(args, tag), args.out / "tokenizers"
    folder = args.out / "datasets" / name
    if isinstance(tokenizer, SentencePiece) and Path(args.tokenizer).resolve().parent == tokenizers.resolve():
        model = tokenizers / Path(args.tokenizer).name
    elif isinstance(tokenizer, int | SentencePiece):
        model = tokenizers / f"{name}.model"
    with common.claimed(folder, record_command(args)) as work:
        made = make_dataset(folder, work, model, tokenizer, args)
    if made is None:
        say(f"complete, nothing to do: {folder}")
        return
    manifest, tokenizer = made
    report(manifest)
    seconds, true_bytes = time.perf_counter() - started, sum(it["bytes"] for it in manifest["splits"].values())
    say(f"wrote {folder} in {seconds:.1f} s, {true_bytes / 1e6 / seconds:.2f} MB of text a second")
    where = model or args.tokenizer
    say(f"next: DATA_PATH={folder} TOKENIZER_PATH={where} VOCAB_SIZE={tokenizer.size} python train_gpt.py")


def main(argv: list[str] | None = None) -> int:
    return common.run_command(
        lambda: tokenize(parse_arguments(argv)), "nothing is in place that was not before; the same command begins anew"
    )


if __name__ == "__main__":
    common.leave(main())
