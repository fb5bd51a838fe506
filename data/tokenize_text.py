"""Turn any text into shards, a tokenizer and a manifest that states the true bytes of the text.

    python data/tokenize_text.py book.txt --separator '\\n\\n\\n' --tokenizer train:sp1024   # learn a tokenizer, use it
    python data/tokenize_text.py corpus/ --tokenizer gpt2 --val-docs 1000                 # a folder, GPT-2's tokens
    python data/tokenize_text.py 'part_*.jsonl.zst' --tokenizer my.model --val held.jsonl # a model of your own
    zcat all.jsonl.gz | python data/tokenize_text.py - --format jsonl --name all --tokenizer bytes

data/README.md describes the formats. A survey finds the validation documents and the sample that a tokenizer learns
from, where there is such a thing to find; then workers encode and this process writes. The result depends on the input
and the options alone, not on the number of workers. A run that was interrupted goes on after its last whole shard when
the same command is given again; the manifest is written last, so what it names is whole.
"""

import argparse
import glob
import gzip
import hashlib
import heapq
import io
import json
import lzma
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import sentencepiece as spm

DATA_ROOT = Path(__file__).resolve().parent
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
SHARD_GLOB = "fineweb_*.bin"
SHARD_TOKENS = 100_000_000
DEFAULT_SHARE = 0.01  # of the documents, for validation
# Of 150 MB of Wikipedia, 5, 10, 20, 40 and 100 MB gave 2.401, 2.401, 2.401, 2.402 and 2.403 bytes per token at 1,024
# pieces and 3.842, 3.863, 3.875, 3.884 and 3.886 at 8,192.
TRAIN_BYTES_PER_PIECE, MAX_TRAIN_BYTES = 20_000, 100_000_000
SPLITS = "train", "val"
MAX_VOCAB = 65536  # tokens are uint16

BLOCK_BYTES = 2**20  # read at a time, and the text that a worker gets at a time
MAX_DOCUMENT_BYTES = 2**25  # so that memory is bounded
MAX_FLIGHT_BYTES = 2**25  # text that workers hold at one time, unless one document is larger
PART_CHARACTERS = 2**19  # of a long document, encoded at a time; at most twice as many
CACHED_WORDS, CACHED_LENGTH = 2**18, 64  # words and their most characters; about 50 MB in every worker

FORMS = {".txt": "txt", ".jsonl": "jsonl", ".parquet": "parquet"}
PACKINGS = "", ".gz", ".xz", ".zst"
SUFFIXES = "*.txt, *.jsonl (each also .gz, .xz, .zst) or *.parquet"

SPACE_MARK = "\u2581"  # how SentencePiece spells a space inside a piece
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
BYTE_OFFSET = 4  # of the tokenizer `bytes`: pad, bos, eos and unk come first

# Bytes per token on 4.6 MB of Shakespeare at 1024 pieces: 2.54 as here; split by script 2.47; documents fed as
# paragraphs 2.52, as lines 2.49; newline as a symbol of its own 2.36; coverage 1 2.52 (below 1 the rarest characters
# become byte pieces, in ASCII one token either way). Pieces that reach across spaces: 2.56, but a small transformer
# scored worse with them (2.258 bits per byte against 2.252, and 2.264 with the split by script; one seed).
TOKENIZER_OPTIONS = dict(
    model_type="bpe",
    byte_fallback=True,
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    split_by_unicode_script=False,
    character_coverage=0.999,
    pad_id=-1,
    unk_id=UNK_ID,
    bos_id=BOS_ID,
    eos_id=EOS_ID,
)

GPT2_FILES = {  # name: sha256, as tiktoken pins them
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


class UserError(Exception):
    """Something the user can put right: one line with what was given, what was expected and what to do."""


class Progress:
    """Bytes of files read: a bar on a terminal, otherwise a line every ten seconds."""

    EVERY_S = 10

    def __init__(self, label: str, files: list["TextFile"]):
        self.label, self.total, self.done, self.bar = label, sum(file.path.stat().st_size for file in files), 0, None
        self.started = self.said = time.perf_counter()
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm

                self.bar = tqdm(total=self.total, desc=label, unit="B", unit_scale=True, leave=False)
            except ImportError:  # lines do as well
                pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()

    def add(self, size: int) -> None:
        now = time.perf_counter()
        self.done += size
        if self.bar is not None:
            self.bar.update(size)
        elif now - self.said >= self.EVERY_S:
            counts = f"{self.done / 1e6:.1f} of {self.total / 1e6:.1f} MB of files"
            print(f"{self.label}: {counts}, {self.done / self.total:.1%} in {now - self.started:.0f} s",
                  file=sys.stderr, flush=True)  # fmt: skip
            self.said = now


# ----------------------------------------------------------------------------------------------------------------------
# Input: files to chunks of raw records, records to documents
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextFile:
    """A file to read, and how."""

    path: Path
    form: str  # txt, jsonl or parquet
    packing: str  # "", .gz, .xz or .zst
    field: str  # of a jsonl line or a parquet row
    separator: bytes  # between the documents of a txt; empty: the file is one document
    held_out: bool  # whether its documents are validation


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one file: texts, lines of JSON, or documents as bytes."""

    file: TextFile
    number: int  # counted over the whole input
    start: int  # of its first record: the byte in a txt, the line in a jsonl, the row in a parquet
    records: list[bytes]


def classify(path: Path) -> tuple[str, str] | None:
    """Form and packing by the name: a.jsonl.xz is ("jsonl", ".xz"); None for a name that says neither."""
    name = path.name.lower()
    for packing in PACKINGS[1:]:
        if name.endswith(packing):
            form = FORMS.get(Path(name.removesuffix(packing)).suffix)
            return (form, packing) if form in ("txt", "jsonl") else None
    form = FORMS.get(Path(name).suffix)
    return (form, "") if form else None


def find_files(inputs: list[str], form: str | None, **how) -> list[TextFile]:
    """The files that paths, folders and globs stand for: in the order given, sorted within each, each of them once."""
    found: dict[Path, TextFile] = {}
    for given in inputs:
        path, pattern = Path(given), not os.path.exists(given) and glob.has_magic(given)
        members = [Path(name) for name in sorted(glob.glob(given, recursive=True))] if pattern else [path]
        files = []
        for member in members:
            if member.is_dir():
                inside = (m for m in sorted(member.rglob("*")) if classify(m) and m.is_file())
                files += [m for m in inside if not any(p.startswith(".") for p in m.relative_to(member).parts)]
            else:
                files.append(member)
        if not files:
            raise UserError(f"{given}: no text found, expected {SUFFIXES}; name the files themselves")
        for file in files:
            if file.exists() and not file.is_file():
                raise UserError(f"{file}: is no file that can be read twice; give it as standard input, with -")
            kind = classify(file)
            if form:
                packing = next((p for p in PACKINGS[1:] if file.name.lower().endswith(p)), "")
                kind = form, packing
            if kind is None:
                raise UserError(f"{file}: expected {SUFFIXES}; say what it holds with --format txt or jsonl")
            found.setdefault(file.resolve(), TextFile(file, *kind, **how))
    return list(found.values())


@contextmanager
def spooled(stream, path: Path) -> Iterator[None]:
    """Standard input as a file, because it is read twice; gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "wb") as file:
            while block := stream.read(BLOCK_BYTES):
                file.write(block)
        yield
    finally:
        path.unlink(missing_ok=True)


class ZstdReader:
    """`read` over the frames of a .zst through the package zstandard, whose own reader takes a cut file for whole."""

    INPUT_BYTES = 2**13  # small, as there is no bound on what one step gives

    def __init__(self, raw):
        import zstandard

        self.error, self.start = zstandard.ZstdError, zstandard.ZstdDecompressor().decompressobj
        self.raw, self.frame = raw, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self, _: int) -> bytes:
        """Some bytes of text, b"" at the end."""
        try:
            while True:
                over = self.frame is None or self.frame.eof
                block = (self.frame.unused_data if self.frame and over else b"") or self.raw.read(self.INPUT_BYTES)
                if not block:
                    break
                if over:
                    self.frame = self.start()
                if text := self.frame.decompress(block):
                    return text
        except self.error as error:
            raise EOFError(str(error)) from None
        if not over:
            raise EOFError("the last frame has no end")
        return b""


def open_zst(raw):
    try:
        from compression import zstd  # Python 3.14

        return zstd.open(raw, "rb")
    except ImportError:
        pass
    try:
        return ZstdReader(raw)
    except ImportError:
        raise UserError(f"{raw.name}: .zst needs the package zstandard: pip install zstandard") from None


OPENERS = {"": nullcontext, ".gz": gzip.open, ".xz": lzma.open, ".zst": open_zst}


def read_blocks(file: TextFile, progress: Progress | None = None) -> Iterator[bytes]:
    """The file's text, unpacked, some MB at a time; UserError where it is unreadable, damaged or cut short."""
    line, read = 1, 0
    try:
        with open(file.path, "rb") as raw, OPENERS[file.packing](raw) as stream:
            while block := stream.read(BLOCK_BYTES):
                if progress is not None:
                    progress.add(raw.tell() - read)
                    read = raw.tell()
                yield block
                line += block.count(b"\n")
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{file.path}: line {line}: damaged or cut short ({error}); get the file again") from None
    except OSError as error:
        raise UserError(f"{file.path}: cannot be read ({error.strerror or error}); name a file that can") from None
    except Exception as error:  # Python 3.14's ZstdError, which has no name here
        if type(error).__name__ != "ZstdError":
            raise
        raise UserError(f"{file.path}: line {line}: damaged or cut short ({error}); get the file again") from None


def read_parquet(file: TextFile, progress: Progress) -> Iterator[bytes]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file.path}: .parquet needs the package pyarrow: pip install pyarrow") from None
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            if file.field not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise UserError(f"{file.path}: no column '{file.field}', but {names}; choose one with --field")
            size = file.path.stat().st_size / max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=256, columns=[file.field]):
                progress.add(round(size * len(batch)))
                for text in batch.column(0).to_pylist():
                    row += 1
                    if not isinstance(text, str):
                        raise UserError(f"{file.path}: row {row}: '{file.field}' is {type(text).__name__}, expected "
                                        "text; mend the row or choose a column with --field")  # fmt: skip
                    yield text.encode("utf-8")
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file.path}: row {row + 1}: cannot be read ({reason}); get the file again") from None


def split_records(file: TextFile, progress: Progress) -> Iterator[bytes]:
    """Lines of a jsonl; documents of a txt, cut at the separator. None is longer than MAX_DOCUMENT_BYTES."""
    separator = b"\n" if file.form == "jsonl" else file.separator
    rest, number = b"", 1
    for block in read_blocks(file, progress):
        *whole, rest = (rest + block).split(separator) if separator else [rest + block]
        for n, record in enumerate((*whole, rest), number):
            if len(record) > MAX_DOCUMENT_BYTES:
                place, cut = (f"line {n}", "") if file.form == "jsonl" else (f"document {n}", " with --separator")
                size = f"over {MAX_DOCUMENT_BYTES >> 20} MiB"
                raise UserError(f"{file.path}: {place} has {size}, the most there may be; cut it into documents{cut}")
        number += len(whole)
        yield from whole
    yield rest


def read_chunks(files: Iterable[TextFile], progress: Progress) -> Iterator[Chunk]:
    """Every record of every file, about BLOCK_BYTES at a time; the same cuts whenever the text is the same."""
    number = 0
    for file in files:
        start = position = 0 if file.form == "txt" else 1
        records, size = [], 0
        read = read_parquet if file.form == "parquet" else split_records
        for record in read(file, progress):
            records.append(record)
            size += len(record) + 1  # so that nothing but empty lines comes to an end, too
            position += len(record) + len(file.separator) if file.form == "txt" else 1
            if size >= BLOCK_BYTES:
                yield Chunk(file, number, start, records)
                number, start, records, size = number + 1, position, [], 0
        if records:
            yield Chunk(file, number, start, records)
            number += 1


def line_at(file: TextFile, offset: int) -> int:
    """The line, counted from 1, that holds this byte of a txt."""
    line = 1
    for block in read_blocks(file):
        line += block[:offset].count(b"\n")
        offset -= len(block)
        if offset <= 0:
            break
    return line


def parse_json(file: TextFile, line: int, record: bytes) -> str:
    """The text of a line of JSON; UserError that names file and line."""
    place = f"{file.path}: line {line}"
    try:
        value = json.loads(record.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: no UTF-8 (byte {record[error.start]:#04x}); convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: no JSON ({error}); expected one object a line") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: {type(value).__name__}, expected an object with the field '{file.field}'")
    if file.field not in value:
        names = ", ".join(list(value)[:8]) or "nothing"
        raise UserError(f"{place}: no field '{file.field}', but {names}; choose one with --field")
    if not isinstance(value[file.field], str):
        found = type(value[file.field]).__name__
        raise UserError(f"{place}: the field '{file.field}' is {found}, expected text; choose another with --field")
    return value[file.field]


def parse_record(chunk: Chunk, index: int) -> tuple[str, bytes] | None:
    """The document of a record and its UTF-8, without any translation; None for a blank line. It may be empty."""
    record, file = chunk.records[index], chunk.file
    if file.form == "jsonl":
        if not record.strip():
            return None
        line = chunk.start + index
        text = parse_json(file, line, record)
        try:
            return text, text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{file.path}: line {line}: half a character (a lone surrogate), which no UTF-8 can "
                            "spell; mend or drop the line") from None  # fmt: skip
    try:
        return record.decode("utf-8"), record
    except UnicodeDecodeError as error:
        before = sum(len(other) + len(file.separator) for other in chunk.records[:index])
        line = line_at(file, chunk.start + before + error.start)
        raise UserError(f"{file.path}: line {line}: no UTF-8 (byte {record[error.start]:#04x}); convert the file "
                        "to UTF-8") from None  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers: text to tokens, and tokens to the bytes they stand for
# ----------------------------------------------------------------------------------------------------------------------


class Tokenizer:
    """`encode(text)` gives native uint16 tokens as bytes, without the token `start`, which stands before a document.

    pieces: bytes of text per token, empty for a boundary; leading: tokens that lose their first byte, a space, right
    after a boundary; boundary: tokens that stand for no text.
    """

    start: int

    def __init__(self, label: str, pieces: list[bytes], boundary: np.ndarray, leading: np.ndarray | None = None):
        if len(pieces) > MAX_VOCAB:
            raise UserError(f"{label}: {len(pieces):,} tokens, but tokens are uint16; expected at most {MAX_VOCAB:,}")
        self.vocab_size, self.boundary = len(pieces), boundary
        self.leading = np.zeros(len(pieces), dtype=bool) if leading is None else leading
        self.length = np.array([len(piece) for piece in pieces], dtype=np.int32)
        self.first = np.cumsum(self.length, dtype=np.int32) - self.length
        self.flat = np.frombuffer(b"".join(pieces), dtype=np.uint8)

    def spell(self, tokens: np.ndarray) -> tuple[bytes, np.ndarray]:
        """The text that tokens stand for, and bytes per token; the first counts as after a boundary."""
        cut = self.leading[tokens]
        cut[1:] &= self.boundary[tokens[:-1]]
        lengths = self.length[tokens] - cut
        first, text = self.first[tokens] + cut, []
        for at in range(0, len(tokens), 2**16):  # small enough for the processor's cache
            part = slice(at, at + 2**16)
            ends = np.cumsum(lengths[part], dtype=np.int32)
            source = np.repeat(first[part] - (ends - lengths[part]), lengths[part])
            source += np.arange(ends[-1], dtype=np.int32)
            text.append(self.flat.take(source).tobytes())
        return b"".join(text), lengths


def cut_parts(text: str) -> Iterator[str]:
    """A long text in parts, which bounds the memory of encoding it. The cuts are where a space follows what is no
    whitespace: no token of GPT-2, and none of a model that splits by whitespace, reaches across. Where there is no such
    place for long, they are elsewhere, which may give other tokens, but of the same text."""
    start, place = 0, re.compile(r"(?<=\S) ")
    while len(text) - start > 2 * PART_CHARACTERS:
        cut = place.search(text, start + PART_CHARACTERS, start + 2 * PART_CHARACTERS)
        end = cut.start() if cut else start + 2 * PART_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]


class WordCache(dict):
    """The values of a function of words, each computed once until there are too many of them. Long words, which texts
    without spaces consist of, are not kept."""

    def __init__(self, function: Callable[[str], bytes]):
        self.function = function

    def __missing__(self, word: str) -> bytes:
        if len(word) > CACHED_LENGTH:
            return self.function(word)
        if len(self) >= CACHED_WORDS:
            self.clear()
        tokens = self[word] = self.function(word)
        return tokens


class Inseparable(Exception):
    """A word that the tokenizer treats differently when it stands alone."""


class SentencePiece(Tokenizer):
    """A SentencePiece model: bytes of its .model file.

    exact: it changes nothing before it looks for pieces and can spell every byte; only then can every text be kept.
    by_words: no piece goes on after a word, so words can be encoded one by one, each distinct one once.
    """

    PROBE = "  a  b\n\ufb01\u00a0 \t "
    ANCHOR = "a"  # stands before a word that begins with a space, which at the start of a text may mean something else

    def __init__(self, model: bytes, label: str = "model"):
        self.model, self.label = model, label
        self.sp = sp = spm.SentencePieceProcessor()
        try:
            sp.load_from_serialized_proto(model)
        except RuntimeError:
            raise UserError(f"{label}: no SentencePiece model; make or get it again") from None
        ids = range(sp.vocab_size())
        names = [sp.id_to_piece(i) for i in ids]
        boundary = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids])
        text = [b"" if boundary[i] else name.replace(SPACE_MARK, " ").encode("utf-8") for i, name in enumerate(names)]
        pieces = [bytes([int(names[i][3:5], 16)]) if sp.is_byte(i) else text[i] for i in ids]
        super().__init__(label, pieces, boundary, np.array([n.startswith(SPACE_MARK) for n in names]) & ~boundary)
        if sp.bos_id() < 0 or SPACE_MARK not in names:
            lack = "start token (bos_id)" if sp.bos_id() < 0 else "piece for a single space (U+2581)"
            raise UserError(f"{label}: has no {lack}, which the trainer needs; use another model")
        self.start = sp.bos_id()
        spells_all = sum(map(sp.is_byte, ids)) == 256
        self.exact = spells_all and sp.normalize(self.PROBE) == self.PROBE.replace(" ", SPACE_MARK)
        across = any(re.search(f"[^{SPACE_MARK}]{SPACE_MARK}", name) for name in names)
        is_bpe = all(sp.get_score(i).is_integer() for i in ids)  # minus the rank; unigrams have log probabilities
        self.by_words = spells_all and is_bpe and not across
        self.words = re.compile(r" *[^ ]+| +")
        self.anchor = sp.normalize(self.ANCHOR), sp.encode(self.ANCHOR)
        encode = self.encode_whole if self.exact else self.encode_separable
        self.cache, self.spaced = WordCache(encode), WordCache(lambda word: encode(" " + word))

    def __reduce__(self):
        return SentencePiece, (self.model, self.label)

    def encode_whole(self, text: str) -> bytes:
        return array("H", self.sp.encode(text)).tobytes()

    def encode_separable(self, word: str) -> bytes:
        """A word of normalised text as it would be encoded inside that text; Inseparable where alone it would not."""
        before, ids = self.anchor if word.startswith(" ") else ("", [])
        given = self.ANCHOR + word if before else word
        tokens = self.sp.encode(given)
        if self.sp.normalize(given) != before + word.replace(" ", SPACE_MARK) or tokens[: len(ids)] != ids:
            raise Inseparable
        return array("H", tokens[len(ids) :]).tobytes()

    def encode_part(self, text: str) -> bytes:
        """What the model gives for the whole text, whatever way."""
        if not self.by_words:
            return self.encode_whole(text)
        normal = text if self.exact else self.sp.normalize(text).replace(SPACE_MARK, " ")
        try:
            if "  " in normal:
                return b"".join(map(self.cache.__getitem__, self.words.findall(normal)))
            first, *others = normal.split(" ")  # much faster
            return b"".join([self.cache[first], *map(self.spaced.__getitem__, others)])
        except Inseparable:
            return self.encode_whole(text)

    def encode_bytes(self, text: str) -> bytes:
        return array("H", [self.sp.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode("utf-8")]).tobytes()

    def encode(self, text: str) -> bytes:
        """Of an exact model, byte pieces spell what no other piece can: a first space, whose mark would follow a
        boundary and so weigh nothing, and U+2581 itself, which means a space in every other piece."""
        if not self.exact:
            return b"".join(map(self.encode_part, cut_parts(text)))
        tokens = []
        if text.startswith(" "):
            tokens, text = [self.encode_bytes(" ")], text[1:]
        for part in cut_parts(text):
            for between in re.split(f"({SPACE_MARK})", part):
                tokens.append(self.encode_bytes(between) if between == SPACE_MARK else self.encode_part(between))
        return b"".join(tokens)


def gpt2_offline(folder: str):
    """GPT-2's encoding from vocab.bpe and encoder.json in a folder, as tiktoken makes it from its downloads."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

    paths = [Path(folder) / name for name in GPT2_FILES]
    for path, expected in zip(paths, GPT2_FILES.values(), strict=True):
        try:
            found = hash_file(path)
        except OSError as error:
            raise UserError(f"GPT2_BPE_DIR: {path}: {error.strerror}; expected {' and '.join(GPT2_FILES)}") from None
        if found != expected:
            raise UserError(f"GPT2_BPE_DIR: {path} has sha256 {found}, expected {expected}; get GPT-2's own file")
    ranks = data_gym_to_mergeable_bpe_ranks(*map(str, paths), *GPT2_FILES.values())
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={ENDOFTEXT: len(ranks)}, explicit_n_vocab=len(ranks) + 1)  # fmt: skip


class Tiktoken(Tokenizer):
    """An encoding of tiktoken by name; gpt2 from GPT2_BPE_DIR where that is set. Documents start with <|endoftext|>."""

    def __init__(self, name: str):
        import tiktoken

        self.name, folder = name, os.environ.get("GPT2_BPE_DIR")
        try:
            self.encoding = gpt2_offline(folder) if name == "gpt2" and folder else tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            reason = str(error).splitlines()[0][:160]
            remedy = "set TIKTOKEN_CACHE_DIR to a folder where tiktoken has kept it"
            remedy += ", or GPT2_BPE_DIR to one with vocab.bpe and encoder.json" if name == "gpt2" else ""
            raise UserError(f"--tokenizer {name}: cannot be downloaded ({reason}); {remedy}") from None
        self.start = self.encoding.eot_token
        special = {self.encoding.encode_single_token(text) for text in self.encoding.special_tokens_set}
        pieces = [b"" if i in special else self.piece(i) for i in range(self.encoding.n_vocab)]
        super().__init__(f"--tokenizer {name}", pieces, np.array([not piece for piece in pieces]))
        self.sha256 = hashlib.sha256(b"".join(len(piece).to_bytes(4, "little") + piece for piece in pieces)).hexdigest()

    def __reduce__(self):
        return Tiktoken, (self.name,)

    def piece(self, token: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:  # a gap in the numbering
            return b""

    def encode(self, text: str) -> bytes:
        return b"".join(array("H", self.encoding.encode_ordinary(part)).tobytes() for part in cut_parts(text))


class Bytes(Tokenizer):
    """byte260: pad 0, bos 1, eos 2, unk 3; byte b is token b + 4."""

    start = BOS_ID

    def __init__(self):
        pieces = [b""] * BYTE_OFFSET + [bytes([byte]) for byte in range(256)]
        super().__init__("--tokenizer bytes", pieces, np.arange(len(pieces)) < BYTE_OFFSET)

    def __reduce__(self):
        return Bytes, ()

    def encode(self, text: str) -> bytes:
        return (np.frombuffer(text.encode("utf-8"), dtype=np.uint8) + np.uint16(BYTE_OFFSET)).tobytes()


def train_sentencepiece(documents: list[bytes], vocab_size: int, option: str) -> bytes:
    """A lossless SentencePiece BPE model learned from UTF-8 documents, the same bytes every time; UserError if
    impossible, which names the `option` that asked for it.

    Newlines are learned like other characters, so a document is fed as one "sentence": lines would lose their ends. The
    length beyond which the trainer silently drops a sentence is that of the longest document.
    """
    options = dict(TOKENIZER_OPTIONS, vocab_size=vocab_size, num_threads=1, minloglevel=2)
    options["max_sentence_length"] = max(10, *map(len, documents))  # 10 is the least that it takes
    for extra in {}, {"required_chars": SPACE_MARK}:  # the second where spaces are too rare to be learned
        model, texts = io.BytesIO(), (raw.decode("utf-8") for raw in documents)
        try:
            spm.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, **options, **extra)
        except RuntimeError as error:
            # Without the line of C++ that raised it, and without its advice on options that this script does not have.
            reason = " ".join(str(error).split()).rpartition("] ")[2].partition(" Increase")[0]
            raise UserError(f"{option}: the trainer refused it; choose another size ({reason})") from None
        sp = spm.SentencePieceProcessor(model_proto=model.getvalue())
        if sp.piece_to_id(SPACE_MARK) != UNK_ID:
            break
    assert sp.vocab_size() == vocab_size
    return model.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# Workers: the same function over all chunks, in processes, results in order, little in flight
# ----------------------------------------------------------------------------------------------------------------------

job: tuple = ()  # what every task of this process needs: set once, as it is large


def begin(*needs) -> None:
    global job
    job = needs


def begin_worker(*needs) -> None:
    """A worker ends with its parent, however that ends, and leaves an interrupt to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    begin(*needs)


def map_chunks(task: Callable, needs: tuple, calls: Iterable[tuple[Chunk, tuple]], workers: int) -> Iterator:
    """(chunk, task(chunk, *arguments)) for every call (chunk, arguments), in their order; with one worker in this
    process. `task` finds `needs` in `job`."""
    if workers == 1:
        begin(*needs)
        yield from ((chunk, task(chunk, *arguments)) for chunk, arguments in calls)
        return
    spawn = multiprocessing.get_context("spawn")
    pending, flying = deque(), 0
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=begin_worker, initargs=needs) as pool:
        try:
            for chunk, arguments in calls:
                size = sum(map(len, chunk.records))
                while pending and (len(pending) > 2 * workers or flying + size > MAX_FLIGHT_BYTES):
                    done, future = pending.popleft()
                    flying -= sum(map(len, done.records))
                    yield done, future.result()
                pending.append((chunk, pool.submit(task, chunk, *arguments)))
                flying += size
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise UserError(f"--workers {workers}: a worker died, perhaps for lack of memory; run the same command "
                            "again with fewer") from None  # fmt: skip
        finally:
            pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------------
# The survey: the split, duplicates across it, what a tokenizer learns from
# ----------------------------------------------------------------------------------------------------------------------


def hash_text(raw: bytes) -> bytes:
    """16 bytes that name a document."""
    return hashlib.blake2b(raw, digest_size=16).digest()


@dataclass
class Rule:
    """Which documents are validation: the first `leading[n]` of chunk n, and those whose hash as a number is under
    `below`. Of the others, those with a hash in `held_out` are duplicates of validation and belong to no split."""

    leading: list[int] = field(default_factory=list)
    below: int = 0
    held_out: set[bytes] = field(default_factory=set)

    def split(self, digest: bytes, ordinal: int, first: int) -> str | None:
        """train, val or None, for the document `ordinal` of a chunk of which `first` documents are validation."""
        if ordinal < first or int.from_bytes(digest, "big") < self.below:
            return "val"
        return None if digest in self.held_out else "train"


def examine(chunk: Chunk) -> list[tuple[bytes, int] | None]:
    """Hash and UTF-8 bytes of every document of a chunk, None for a blank line; UserError for a fault."""
    parsed = (parse_record(chunk, i) for i in range(len(chunk.records)))
    return [None if it is None else (hash_text(it[1]), len(it[1])) for it in parsed]


def take_survey(files: list[TextFile], val_docs: int, share: float, sample_bytes: int,
                workers: int) -> tuple[Rule, list[bytes], int]:  # fmt: skip
    """The rule; a sample of the training documents, in their order; and the number of documents read, which are no more
    than that takes. The sample is the documents of the smallest hashes that fit `sample_bytes`, but at least one."""
    rule, documents = Rule(below=int(share * 2**128)), {"train": 0, "val": 0}
    heap, sampled = [], 0  # (minus the hash as a number, order, document): the largest hash is on top
    smallest = beyond = 2**128  # hashes from `beyond` on have no place in the sample
    if not sample_bytes and not val_docs and not any(file.held_out for file in files):
        return rule, [], 0
    with Progress("survey", files) as progress:
        calls = ((chunk, ()) for chunk in read_chunks(files, progress))
        for chunk, rows in map_chunks(examine, (), calls, workers):
            leading = chunk.file.held_out or documents["val"] < val_docs
            if not leading and not sample_bytes:
                break
            known = [(i, *row) for i, row in enumerate(rows) if row is not None and row[1]]
            first = len(known) if chunk.file.held_out else min(len(known), max(0, val_docs - documents["val"]))
            if leading:
                rule.leading.append(first)
                rule.held_out.update(digest for _, digest, _ in known[:first])
            for ordinal, (index, digest, size) in enumerate(known):
                split, key = rule.split(digest, ordinal, first), int.from_bytes(digest, "big")
                smallest = min(smallest, key)
                if split is not None:
                    documents[split] += 1
                if split == "train" and sample_bytes and key < beyond:
                    heapq.heappush(heap, (-key, documents["train"], parse_record(chunk, index)[1]))
                    sampled += size
                    while sampled > sample_bytes and len(heap) > 1:
                        largest, _, raw = heapq.heappop(heap)
                        beyond, sampled = -largest, sampled - len(raw)
    if share and not documents["val"]:
        rule.below = smallest + 1
    kept = sorted((order, raw) for key, order, raw in heap if -key >= rule.below)
    return rule, [raw for _, raw in kept], sum(documents.values())


# ----------------------------------------------------------------------------------------------------------------------
# Encoding, and the proof of every document
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """Consecutive documents of one split as tokens, and what they stand for."""

    tokens: np.ndarray  # uint16, with the start tokens
    documents: int
    bytes: int  # of the text itself
    token_bytes: int  # that the tokens stand for
    lossy_documents: int  # whose tokens do not spell their text


def encode_documents(tokenizer: Tokenizer, documents: Iterable[tuple[str, bytes]]) -> Encoded:
    """Tokens of documents (text and its UTF-8), spelled again and compared with every text."""
    start, streams, raws = array("H", [tokenizer.start]).tobytes(), [], []
    for text, raw in documents:
        streams.append(start + tokenizer.encode(text))
        raws.append(raw)
    tokens = np.frombuffer(b"".join(streams), dtype=np.uint16)
    spelled, lengths = tokenizer.spell(tokens)
    starts = np.cumsum([0, *(len(stream) // 2 for stream in streams)])[:-1]
    sizes = np.add.reduceat(lengths, starts).tolist() if raws else []
    lossy = 0
    if sizes != [len(raw) for raw in raws] or spelled != b"".join(raws):
        ends = np.cumsum(sizes).tolist()
        lossy = sum(spelled[end - size : end] != raw for size, end, raw in zip(sizes, ends, raws, strict=True))
    return Encoded(tokens, len(raws), sum(map(len, raws)), len(spelled), lossy)


@dataclass
class Tally:
    """What became of the documents that are in no split; and the smallest hash of those that are."""

    duplicates: int = 0  # training documents dropped, as validation has them
    empty: int = 0  # texts without a character, which are no documents
    smallest: int = 2**128

    def add(self, other: "Tally") -> None:
        self.duplicates += other.duplicates
        self.empty += other.empty
        self.smallest = min(self.smallest, other.smallest)


def encode_chunk(chunk: Chunk, first: int, wanted: tuple[str, ...]) -> tuple[dict[str, Encoded], Tally]:
    """The chunk's documents of each wanted split; the `first` of all are validation. The job: tokenizer and rule."""
    tokenizer, rule = job
    members: dict[str, list] = {split: [] for split in wanted}
    tally, ordinal = Tally(), 0
    for index in range(len(chunk.records)):
        text, raw = parse_record(chunk, index) or (None, None)
        if not raw:
            tally.empty += raw is not None and chunk.file.form != "txt"  # between two separators there may be nothing
            continue
        digest = hash_text(raw)
        split = rule.split(digest, ordinal, first)
        ordinal += 1
        if split is None:
            tally.duplicates += 1
            continue
        tally.smallest = min(tally.smallest, int.from_bytes(digest, "big"))
        if split in members:
            members[split].append((text, raw))
    return {split: encode_documents(tokenizer, documents) for split, documents in members.items()}, tally


# ----------------------------------------------------------------------------------------------------------------------
# The files: shards, their progress, the manifest
# ----------------------------------------------------------------------------------------------------------------------


def hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def appearing(path: Path) -> Iterator:
    """A file to write; its name appears only with all of its bytes on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, data: bytes) -> str:
    """Write atomically; returns the sha256."""
    with appearing(path) as file:
        file.write(data)
    return sha256(data)


def write_json(path: Path, value: dict) -> None:
    write_file(path, (json.dumps(value, indent=2) + "\n").encode("utf-8"))


def read_json(path: Path) -> dict:
    """The object in a file; empty where it is absent or damaged in whatever way."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def agrees(found: object, header: object) -> bool:
    """Whether `found` says everything that `header` says; it may say more."""
    if isinstance(header, dict) and isinstance(found, dict):
        return all(key in found and agrees(found[key], value) for key, value in header.items())
    return found == header


@dataclass
class SplitState:
    """A split up to its last whole shard: the counts before chunk `chunk`, of whose tokens `offset` are in shards."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    token_bytes: int = 0
    lossy_documents: int = 0
    chunk: int = 0
    offset: int = 0
    shards: list[dict] = field(default_factory=list)


class SplitWriter:
    """Writes the shards of a split as tokens come: 256 little-endian int32 (magic, version, token count, zeros), then
    uint16 tokens. `state` is where a new run can go on."""

    def __init__(self, folder: Path, split: str, shard_tokens: int, state: SplitState):
        self.folder, self.split, self.shard_tokens, self.state = folder, split, shard_tokens, state
        self.counts, self.room, self.open = replace(state), 0, None

    def add(self, number: int, piece: Encoded) -> bool:
        """Take the tokens of chunk `number`; whether a shard became whole."""
        position = self.state.offset if number == self.state.chunk else 0
        finished = False
        while position < len(piece.tokens):
            if self.open is None:
                self.begin()
            part = piece.tokens[position : position + self.room]
            self.file.write(part.astype("<u2").tobytes())
            position += len(part)
            self.room -= len(part)
            if self.room == 0:
                self.finish()
                self.state = replace(self.counts, chunk=number, offset=position, shards=list(self.counts.shards))
                finished = True
        self.counts.documents += piece.documents
        self.counts.tokens += len(piece.tokens)
        self.counts.bytes += piece.bytes
        self.counts.token_bytes += piece.token_bytes
        self.counts.lossy_documents += piece.lossy_documents
        return finished

    def begin(self) -> None:
        self.path = self.folder / f"fineweb_{self.split}_{len(self.counts.shards):06d}.bin"
        self.open = ExitStack()
        self.file = self.open.enter_context(appearing(self.path))
        self.file.write(bytes(4 * SHARD_HEADER_INTS))
        self.room = self.shard_tokens

    def finish(self) -> None:
        if self.open is not None:
            tokens = self.shard_tokens - self.room
            self.file.seek(0)
            self.file.write(np.array([SHARD_MAGIC, SHARD_VERSION, tokens], dtype="<i4").tobytes())
            self.open.close()
            self.open = None
            entry = {"file": self.path.name, "tokens": tokens, "sha256": hash_file(self.path)}
            self.counts.shards = [*self.counts.shards, entry]

    def abandon(self, *error) -> None:
        if self.open is not None:
            self.open.__exit__(*error)

    def entry(self) -> dict:
        """For the manifest."""
        it = self.counts
        return {
            "documents": it.documents,
            "tokens": it.tokens,
            "bytes": it.bytes,
            "token_bytes": it.token_bytes,
            "lossless": it.lossy_documents == 0,
            "lossy_documents": it.lossy_documents,
            "shards": it.shards,
        }


def holds(folder: Path, shards: list[dict]) -> bool:
    """Whether these shards are there, whole."""
    try:
        return all(hash_file(folder / shard["file"]) == shard["sha256"] for shard in shards)
    except (OSError, LookupError, TypeError):
        return False


def is_complete(folder: Path, tokenizer: Path | None, header: dict) -> bool:
    """Whether a manifest that agrees with `header` is there, and every file that it names, whole, and no shard more."""
    manifest = read_json(folder / "manifest.json")
    try:
        shards = [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]]
        model = tokenizer is None or hash_file(tokenizer) == manifest["tokenizer"]["sha256"]
        named = {shard["file"] for shard in shards}
    except (OSError, LookupError, TypeError):
        return False
    found = {path.name for path in folder.glob(SHARD_GLOB)}
    return model and agrees(manifest, header) and named == found and holds(folder, shards)


def fresh_states() -> dict[str, SplitState]:
    return {split: SplitState() for split in SPLITS}


def read_progress(folder: Path, header: dict) -> dict[str, SplitState]:
    """How far an interrupted run with this `header` came with its splits, in shards that are still whole."""
    marker = read_json(folder / "manifest.json")
    try:
        states = {split: SplitState(**marker["progress"][split]) for split in SPLITS}
        same = marker["chunk_bytes"] == BLOCK_BYTES and agrees(marker["header"], header)
        if same and all(holds(folder, state.shards) for state in states.values()):
            return states
    except (LookupError, TypeError):
        pass
    return fresh_states()


def write_dataset(folder: Path, header: dict, pieces: Iterable[tuple[int, dict[str, Encoded]]], shard_tokens: int,
                  model: tuple[Path, bytes] | None = None, states: dict[str, SplitState] | None = None,
                  complete: Callable[[dict], dict] = lambda splits: {}) -> dict:  # fmt: skip
    """Write in this order: a manifest that says incomplete, the tokenizer, the shards, the manifest. Returns the last.

    header: the manifest without its splits. pieces: chunk numbers and their tokens per split, in order. model: path and
    bytes of the tokenizer. states: where a former run stopped, its shards still there. complete: given the splits, says
    what else belongs in the manifest, or raises for what must not be called complete.
    """
    states = states or fresh_states()
    writers = {split: SplitWriter(folder, split, shard_tokens, state) for split, state in states.items()}

    def mark() -> None:  # until the last shard is there, the trainer must not take what lies here for a data set
        progress = {split: asdict(writer.state) for split, writer in writers.items()}
        marker = {"incomplete": "run the same command again", "chunk_bytes": BLOCK_BYTES}
        write_json(folder / "manifest.json", marker | {"header": header, "progress": progress})

    mark()
    kept = {shard["file"] for state in states.values() for shard in state.shards}
    for stale in (*folder.glob(SHARD_GLOB), *folder.glob(SHARD_GLOB + ".tmp")):
        if stale.name not in kept:  # it would be read as part of this data set
            stale.unlink()
    if model is not None and not (model[0].is_file() and model[0].read_bytes() == model[1]):
        write_file(*model)
    with ExitStack() as stack:
        for writer in writers.values():
            stack.push(writer.abandon)
        for number, encoded in pieces:
            if any([writers[split].add(number, piece) for split, piece in encoded.items()]):
                mark()
        for writer in writers.values():
            writer.finish()
    splits = {split: writer.entry() for split, writer in writers.items()}
    manifest = dict(header, **complete(splits), splits=splits)
    write_json(folder / "manifest.json", manifest)
    return manifest


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def whole_number(text: str) -> int:
    value = int(text.replace("_", ""))
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a share between 0 and 1, such as 0.01")
    return value


def separator(text: str) -> bytes:
    r"""The bytes of a separator; \n, \r, \t and \\ as in most languages, as few shells have a way to spell them."""
    if not text:
        raise argparse.ArgumentTypeError("empty: expected what stands between two documents, such as '\\n\\n'")
    return re.sub(r"\\([nrt\\])", lambda m: {"n": "\n", "r": "\r", "t": "\t"}.get(m[1], m[1]), text).encode("utf-8")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    # fmt: off
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n    ")[0], allow_abbrev=False)
    parser.add_argument("inputs", nargs="+", metavar="INPUT",
                        help=f"files, folders or globs of {SUFFIXES}; - is standard input")
    parser.add_argument("--tokenizer", required=True, metavar="WHAT", help="train:sp1024 (or any number of pieces), a "
                        "SentencePiece .model, gpt2 or another name of tiktoken's, or bytes")
    held = parser.add_mutually_exclusive_group()
    held.add_argument("--val-docs", type=whole_number, metavar="N", help="validation: the first N documents")
    held.add_argument("--val-share", type=share, metavar="F", help="validation: this share of the documents, chosen by "
                      f"their hashes, at least one (default {DEFAULT_SHARE})")
    held.add_argument("--val", nargs="+", metavar="FILE", help="validation: these files, folders or globs")
    parser.add_argument("--field", default="text", help="of a JSON line or a parquet row: the text (default text)")
    parser.add_argument("--separator", type=separator, default=b"", metavar="S",
                        help=r"cut each .txt into documents where this stands, such as '\n\n' (default: no cut)")
    parser.add_argument("--format", choices=["txt", "jsonl"], help="of standard input and of all INPUTs, whatever "
                        "their names (default: by the name; txt for standard input)")
    parser.add_argument("--name", help="of the data set (default: the first input and the tokenizer)")
    parser.add_argument("--out", type=Path, default=DATA_ROOT, help="data root (default: the folder of this script)")
    parser.add_argument("--shard-tokens", type=whole_number, default=SHARD_TOKENS, metavar="N",
                        help=f"most tokens in one shard (default {SHARD_TOKENS})")
    parser.add_argument("--train-bytes", type=whole_number, metavar="N", help="most text that a tokenizer learns from, "
                        f"sampled by hash (default {TRAIN_BYTES_PER_PIECE} a piece, at most {MAX_TRAIN_BYTES})")
    parser.add_argument("--workers", type=whole_number, metavar="N",
                        help="processes that encode (default: the CPU count, fewer for a small input)")
    parser.add_argument("--overwrite", action="store_true", help="replace another data set of this name")
    # fmt: on
    args = parser.parse_args(argv)
    if args.inputs != ["-"] and "-" in args.inputs or "-" in (args.val or []):
        raise UserError("-: standard input can only be the one INPUT; give files, or - alone")
    if args.name is not None and not re.fullmatch(r"[\w][\w.+-]*", args.name):
        raise UserError(f"--name {args.name}: expected a plain name of letters, digits and any of _ . + -")
    return args


def choose_tokenizer(spec: str) -> tuple[str, Tokenizer | int]:
    """A tokenizer's name for folders and itself, or the number of pieces to train it with."""
    if trained := re.fullmatch(r"train:sp(\d+)", spec):
        size = int(trained[1])
        if not 1 <= size <= MAX_VOCAB:
            raise UserError(f"--tokenizer {spec}: expected 1 to {MAX_VOCAB} pieces, as tokens are uint16")
        return f"sp{size}", size
    if spec == "bytes":
        return "byte260", Bytes()
    if spec.endswith(".model"):
        try:
            return Path(spec).stem, SentencePiece(Path(spec).read_bytes(), spec)
        except OSError as error:
            raise UserError(f"--tokenizer {spec}: {error.strerror}; name a SentencePiece .model") from None
    try:
        import tiktoken
    except ImportError:
        raise UserError(f"--tokenizer {spec}: needs the package tiktoken: pip install tiktoken") from None
    if spec not in tiktoken.list_encoding_names():
        names = ", ".join(sorted(tiktoken.list_encoding_names()))
        raise UserError(f"--tokenizer {spec}: expected train:spN, a .model file, bytes, or one of tiktoken's: {names}")
    return spec, Tiktoken(spec)


def describe_tokenizer(tokenizer: Tokenizer | int, file: str, train_bytes: int | None) -> dict:
    """For the manifest, as far as it is known before training."""
    if isinstance(tokenizer, int):
        options = {"options": TOKENIZER_OPTIONS, "train_bytes": train_bytes}
        return {"kind": "sentencepiece", "file": file, "vocab_size": tokenizer, **options}
    about = {"vocab_size": tokenizer.vocab_size, "start": tokenizer.start}
    if isinstance(tokenizer, SentencePiece):
        return {"kind": "sentencepiece", "file": file, **about, "sha256": sha256(tokenizer.model)}
    if isinstance(tokenizer, Tiktoken):
        return {"kind": "tiktoken", "name": tokenizer.name, **about, "sha256": tokenizer.sha256}
    return {"kind": "bytes", "name": "byte260", **about}


def describe(name: str, files: list[TextFile], tokenizer: dict, args: argparse.Namespace) -> dict:
    """What the manifest says about a run before it reads its input. No path: the same everywhere."""

    def listed(held_out: bool) -> list[dict]:
        chosen = [file for file in files if file.held_out == held_out]
        names = ["stdin" if args.inputs == ["-"] and not held_out else file.path.name for file in chosen]
        about = [{"bytes": file.path.stat().st_size, "sha256": hash_file(file.path)} for file in chosen]
        return [{"file": name, **it} for name, it in zip(names, about, strict=True)]

    if args.val:
        validation = {"files": listed(True)}
    else:
        share = args.val_share or DEFAULT_SHARE
        validation = {"first_documents": args.val_docs} if args.val_docs else {"share": share}
    cut = args.separator.decode("utf-8", "replace")
    return {
        "format": 1,
        "name": name,
        "corpus": {"files": listed(False), "field": args.field, "separator": cut},
        "tokenizer": tokenizer,
        "validation": validation,
        "shard_tokens": args.shard_tokens,
    }


def refuse_foreign(folder: Path, header: dict, model: Path | None) -> None:
    """UserError where a finished data set of another command would be lost, or files of unknown origin."""
    manifest = read_json(folder / "manifest.json")
    if "incomplete" in manifest or agrees(manifest, header):
        return
    remedy = "choose another --name, or pass --overwrite"
    if manifest or any(folder.glob(SHARD_GLOB)):
        origin = f"made by: {manifest.get('command', 'an unknown command')}" if manifest else "without a manifest"
        raise UserError(f"{folder}: holds another data set, {origin}; {remedy}")
    if model is not None and model.is_file() and hash_file(model) != header["tokenizer"].get("sha256"):
        raise UserError(f"{model}: is another tokenizer; {remedy}")


def report(manifest: dict) -> None:
    dropped = manifest["dropped"]
    print(f"dropped {dropped['duplicates_of_validation']:,} training documents that validation has, skipped "
          f"{dropped['empty']:,} empty texts")  # fmt: skip
    for split, it in manifest["splits"].items():
        counts = f"{it['documents']:,} documents, {it['bytes']:,} bytes, {it['tokens']:,} tokens"
        print(f"{split}: {counts}, {it['bytes'] / it['tokens']:.4f} bytes per token")
        if it["lossless"]:
            print(f"{split}: lossless, the tokens of every document spell its exact bytes")
        else:
            off = it["token_bytes"] - it["bytes"]
            print(f"{split}: LOSSY, {it['lossy_documents']:,} documents are not spelled exactly; the tokens stand for "
                  f"{it['token_bytes']:,} bytes, {off:+,} ({off / it['bytes']:+.4%})")  # fmt: skip


def name_dataset(args: argparse.Namespace, tag: str) -> str:
    stem = "stdin" if args.inputs == ["-"] else Path(args.inputs[0]).resolve().name
    while Path(stem).suffix in (*PACKINGS[1:], *FORMS):
        stem = Path(stem).stem
    plain = re.sub(r"[^A-Za-z0-9_.+-]+", "_", stem).strip("_.+-")
    return args.name or f"{plain or 'text'}_{tag}"


def record_command(args: argparse.Namespace) -> str:
    """The command without what does not change the result."""
    parts = ["python", "data/tokenize_text.py", *args.inputs, "--tokenizer", args.tokenizer]
    cut = args.separator.decode("utf-8", "replace").replace("\\", "\\\\")
    cut = cut.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    options = {"--val-docs": args.val_docs, "--val-share": args.val_share, "--field": args.field, "--separator": cut,
               "--format": args.format, "--name": args.name, "--shard-tokens": args.shard_tokens,
               "--train-bytes": args.train_bytes}  # fmt: skip
    parts += [f"{option}={value}" for option, value in options.items() if value]  # a value may begin with a dash
    return shlex.join([*parts, *(["--val", *args.val] if args.val else [])])


def find_input(args: argparse.Namespace, spool: Path, stack: ExitStack) -> list[TextFile]:
    """Validation files first, then the others; standard input goes to the file `spool` until `stack` ends."""
    how = dict(field=args.field, separator=args.separator)
    files = find_files(args.val, None, held_out=True, **how) if args.val else []
    if args.inputs == ["-"]:
        stack.enter_context(spooled(sys.stdin.buffer, spool))
        return [*files, TextFile(spool, args.format or "txt", "", held_out=False, **how)]
    return files + find_files(args.inputs, args.format, held_out=False, **how)


def learn(size: int, sample: list[bytes], option: str) -> tuple[SentencePiece, dict]:
    """A tokenizer of `size` pieces from a sample, and how much that was."""
    about = {"documents": len(sample), "bytes": sum(map(len, sample))}
    counts = f"{about['documents']:,} training documents, {about['bytes'] / 1e6:.1f} MB"
    print(f"training {size} pieces on {counts}", flush=True)
    tokenizer = SentencePiece(train_sentencepiece(sample, size, option), option)
    sample.clear()  # its memory is needed for other things
    return tokenizer, about


def encode_files(files: list[TextFile], tokenizer: Tokenizer, rule: Rule, states: dict[str, SplitState], tally: Tally,
                 workers: int) -> Iterator[tuple[int, dict[str, Encoded]]]:  # fmt: skip
    """Chunk numbers and tokens per split, in order, of what `states` has not in whole shards yet; fills `tally`."""

    def calls(progress: Progress) -> Iterator[tuple[Chunk, tuple]]:
        for chunk in read_chunks(files, progress):
            first = rule.leading[chunk.number] if chunk.number < len(rule.leading) else 0
            yield chunk, (first, tuple(split for split in SPLITS if chunk.number >= states[split].chunk))

    with Progress("encode", files) as progress:
        for chunk, (encoded, part) in map_chunks(encode_chunk, (tokenizer, rule), calls(progress), workers):
            tally.add(part)
            yield chunk.number, encoded


class NoValidation(Exception):
    """No hash is in the share of validation."""


def write_all(folder: Path, header: dict, files: list[TextFile], tokenizer: Tokenizer, model: Path | None, rule: Rule,
              workers: int, args: argparse.Namespace) -> dict:  # fmt: skip
    """Encode and write, going on where a run with this header stopped. Returns the manifest; raises NoValidation, with
    the rule mended, or UserError."""
    header["validation"]["below"] = f"{rule.below:032x}"
    states, tally = read_progress(folder, header), Tally()
    if shards := sum(len(state.shards) for state in states.values()):
        print(f"going on after {shards} whole shards of an interrupted run", flush=True)

    def complete(splits: dict[str, dict]) -> dict:
        if not splits["val"]["documents"] and rule.below and splits["train"]["documents"]:
            rule.below = tally.smallest + 1
            raise NoValidation
        for split, it in splits.items():
            if not it["documents"]:
                raise empty_split(split, sum(other["documents"] for other in splits.values()) + tally.duplicates)
            if it["lossy_documents"] and not args.tokenizer.endswith(".model"):
                raise UserError(f"{split}: {it['lossy_documents']} documents do not come back from their tokens, a "
                                f"fault of this script or of {args.tokenizer}; choose another tokenizer")  # fmt: skip
        return {"dropped": {"duplicates_of_validation": tally.duplicates, "empty": tally.empty}}

    pieces = encode_files(files, tokenizer, rule, states, tally, workers)
    given = (model, tokenizer.model) if model else None
    return write_dataset(folder, header, pieces, args.shard_tokens, given, states, complete)


def empty_split(split: str, found: int) -> UserError:
    return UserError(f"the {split} split would be empty, as the input has {found:,} documents; give more text, cut it "
                     "into documents (--separator), or choose another --val, --val-docs or --val-share")  # fmt: skip


def tokenize(args: argparse.Namespace, stack: ExitStack) -> None:
    """The whole command; what must end with it is on `stack`."""
    started = time.perf_counter()
    tag, tokenizer = choose_tokenizer(args.tokenizer)
    if isinstance(tokenizer, int) and args.train_bytes is None:
        args.train_bytes = min(MAX_TRAIN_BYTES, tokenizer * TRAIN_BYTES_PER_PIECE)
    name, model = name_dataset(args, tag), None
    folder, tokenizers = args.out / "datasets" / name, args.out / "tokenizers"
    if isinstance(tokenizer, SentencePiece) and Path(args.tokenizer).resolve().parent == tokenizers.resolve():
        model = tokenizers / Path(args.tokenizer).name
    elif isinstance(tokenizer, int | SentencePiece):
        model = tokenizers / f"{name}.model"

    files = find_input(args, folder.parent / f"{name}.stdin.tmp", stack)
    try:
        header = describe(name, files, describe_tokenizer(tokenizer, model and model.name, args.train_bytes), args)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); name a file that can") from None
    if is_complete(folder, model, header):
        print(f"complete, nothing to do: {folder}")
        return
    if not args.overwrite:
        refuse_foreign(folder, header, model)
    header["command"] = record_command(args)

    former = read_json(folder / "manifest.json").get("header")
    if isinstance(tokenizer, int) and agrees(former, header) and model.is_file():  # an interrupted run has trained it
        if hash_file(model) == former["tokenizer"].get("sha256"):
            tokenizer, header["tokenizer"] = SentencePiece(model.read_bytes(), str(model)), former["tokenizer"]
    size = sum(file.path.stat().st_size for file in files)
    workers = min(args.workers or min(os.cpu_count() or 1, 1 + size // 2**22), 61)  # Windows waits for no more
    share = 0 if args.val or args.val_docs else args.val_share or DEFAULT_SHARE
    sample_bytes = args.train_bytes if isinstance(tokenizer, int) else 0
    rule, sample, found = take_survey(files, args.val_docs or 0, share, sample_bytes, workers)
    if isinstance(tokenizer, int):
        if not sample:
            raise empty_split("train", found)
        tokenizer, learned = learn(tokenizer, sample, f"--tokenizer {args.tokenizer}")
        header["tokenizer"] |= {"start": tokenizer.start, "sha256": sha256(tokenizer.model), "trained_on": learned}
    try:
        manifest = write_all(folder, header, files, tokenizer, model, rule, workers, args)
    except NoValidation:
        manifest = write_all(folder, header, files, tokenizer, model, rule, workers, args)

    report(manifest)
    seconds, true_bytes = time.perf_counter() - started, sum(it["bytes"] for it in manifest["splits"].values())
    print(f"wrote {folder} in {seconds:.1f} s, {true_bytes / 1e6 / seconds:.2f} MB of text a second")
    where = model or args.tokenizer
    print(f"next: DATA_PATH={folder} TOKENIZER_PATH={where} VOCAB_SIZE={tokenizer.vocab_size} python train_gpt.py")


def main(argv: list[str] | None = None) -> int:
    try:
        with ExitStack() as stack:
            tokenize(parse_arguments(argv), stack)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}; for a data root that can be written to, pass --out DIR", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on after the last whole shard", file=sys.stderr)
        return 130
    else:
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())
