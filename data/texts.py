"""Find the texts that a user names, and read their documents. Whatever is not read is an error or is counted."""

import glob
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm
from vocab import Tokenizer

from train_gpt import SHARD_MAGIC, SHARD_VERSION, UserError, open_shard

BLOCK_BYTES = 2**20  # read at a time
MAX_DOCUMENT_BYTES = 2**25  # so that memory is bounded

FORMS = {".txt": "txt", ".jsonl": "jsonl", ".parquet": "parquet", ".bin": "bin"}
PACKINGS = ".gz", ".xz", ".zst"
SUFFIXES = "*.txt, *.jsonl (each also .gz, .xz, .zst) or *.parquet"


# ----------------------------------------------------------------------------------------------------------------------
# Find the input
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextFile:
    """A file to read, and how."""

    path: Path
    form: str  # txt, jsonl, parquet or bin
    packing: str  # "", .gz, .xz or .zst
    field: str  # of a jsonl line or a parquet row
    separator: bytes  # between the documents of a txt; empty: there is none
    document_bytes: int  # a document of a txt is cut where it has as many; 0: no cut
    held_out: bool  # whether its documents are validation


def classify(path: Path) -> tuple[str, str] | None:
    """Form and packing by the name: a.jsonl.xz is ("jsonl", ".xz"); None for a name that says neither."""
    name = path.name.lower()
    packing = next((packing for packing in PACKINGS if name.endswith(packing)), "")
    form = FORMS.get(Path(name.removesuffix(packing)).suffix)
    return (form, packing) if form and (not packing or form in ("txt", "jsonl")) else None


def plain_name(path: Path) -> str:
    """The name without what says form and packing."""
    name = path.name
    while Path(name).suffix in (*PACKINGS, *FORMS):
        name = Path(name).stem
    return name


def walk(folder: Path, left_out: Counter) -> list[Path]:
    """The texts in a folder and below it, links to folders followed, sorted; counts what it leaves out."""

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); make it readable, or name the others")

    texts, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(parent)
        if real in seen:  # two links to one folder, or a circle of them: its files are in already
            folders.clear()
            continue
        seen.add(real)
        left_out["hidden"] += sum(name.startswith(".") for name in (*folders, *files))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in files if not name.startswith(".")):
            kind = classify(path)
            if kind and kind[0] != "bin":  # tokens are read only where they are named
                texts.append(path)
            else:
                left_out["no text by the name"] += 1
    return sorted(texts)


def expand(given: str, left_out: Counter) -> list[Path]:
    """The files of a glob or a path; folders are walked."""
    members = [Path(given)]
    if not os.path.exists(given) and glob.has_magic(given):
        members = [Path(name) for name in sorted(glob.glob(given, recursive=True))]
        left_out["hidden"] += len(glob.glob(given, recursive=True, include_hidden=True)) - len(members)
        for folder in glob.glob(os.path.dirname(given), recursive=True):  # glob itself passes over what it cannot read
            if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
                raise UserError(f"{folder}: cannot be read, and {given} may match in it; make it readable")
    return [file for member in members for file in (walk(member, left_out) if member.is_dir() else [member])]


def find_files(inputs: list[str], form: str | None, left_out: Counter, **how) -> list[TextFile]:
    """The files that paths, folders and globs stand for: in the order given, sorted within each, each of them once."""
    found: dict[Path, TextFile] = {}
    for given in inputs:
        files = expand(given, left_out)
        if not files:
            raise UserError(f"{given}: no text found, expected {SUFFIXES}; name the files themselves")
        for file in files:
            if file.exists() and not file.is_file():
                raise UserError(f"{file}: is no file that can be read twice; give it as standard input, with -")
            kind = classify(file)
            if form:
                kind = form, next((packing for packing in PACKINGS if file.name.lower().endswith(packing)), "")
            if kind is None:
                raise UserError(f"{file}: expected {SUFFIXES}; say what it holds with --format txt or jsonl")
            left_out["given twice"] += file.resolve() in found
            found.setdefault(file.resolve(), TextFile(file, *kind, **how))
    return list(found.values())


# ----------------------------------------------------------------------------------------------------------------------
# Read documents
# ----------------------------------------------------------------------------------------------------------------------


class Document(NamedTuple):
    text: str
    raw: bytes  # its UTF-8


def zstd_frame():
    try:
        import zstandard
    except ImportError:
        raise UserError("a .zst needs the package zstandard: pip install zstandard") from None
    return zstandard.ZstdDecompressor().decompressobj()


START_FRAME = {".gz": lambda: zlib.decompressobj(wbits=31), ".xz": lzma.LZMADecompressor, ".zst": zstd_frame}


def unpack(raw, start_frame: Callable) -> Iterator[bytes]:
    """The text of a packed file, frame by frame. (Of the libraries' own readers, that of lzma takes a damaged later
    frame, and that of zstandard a missing end, for the end of the file.)"""
    frame, data = None, b""
    while data or (data := raw.read(2**13)):  # little, as there is no bound on what it may unpack to
        if frame is None or frame.eof:
            data = data.lstrip(b"\0")  # padding
            frame = start_frame() if data else frame
        if data:
            yield frame.decompress(data)
        data = frame.unused_data if frame is not None and frame.eof else b""
    if frame is None or not frame.eof:
        raise EOFError("the last frame has no end")


def read_blocks(file: TextFile, progress: tqdm) -> Iterator[bytes]:
    """The file's bytes, unpacked; UserError where it is unreadable, damaged or cut short."""
    line, seen = 1, 0
    try:
        with open(file.path, "rb") as raw:
            packed = unpack(raw, START_FRAME[file.packing]) if file.packing else None
            for block in packed or iter(lambda: raw.read(BLOCK_BYTES), b""):
                progress.update(raw.tell() - seen)
                seen = raw.tell()
                yield block
                line += block.count(b"\n")
    except OSError as error:
        raise UserError(f"{file.path}: cannot be read ({error.strerror or error}); name a file that can") from None
    except Exception as error:
        if not isinstance(error, EOFError | zlib.error | lzma.LZMAError) and type(error).__name__ != "ZstdError":
            raise
        raise UserError(f"{file.path}: line {line}: damaged or cut short ({error}); get the file again") from None


def cut_bytes(raw: bytes, size: int, hold: int = 0) -> Iterator[bytes]:
    """`raw` in pieces of at most `size` bytes, none of which ends within a character; the last may have `hold` more."""
    start = 0
    while len(raw) - start > size + hold:
        end = start + size
        while end > start + size - 3 and raw[end] & 0xC0 == 0x80:
            end -= 1
        yield raw[start:end]
        start = end
    yield raw[start:]


def split_records(file: TextFile, progress: tqdm) -> Iterator[tuple[int, bytes]]:
    """Lines of a jsonl, or what separators and --document-bytes leave of a txt; each with the line where it begins."""
    separator, size = (b"\n", 0) if file.form == "jsonl" else (file.separator, file.document_bytes)
    rest, line = b"", 1

    def pieces(record: bytes, hold: int = 0) -> Iterator[tuple[int, bytes]]:
        nonlocal line
        for piece in cut_bytes(record, size or MAX_DOCUMENT_BYTES, hold):
            if not size and len(piece) < len(record):
                cut = "" if file.form == "jsonl" else " with --separator or --document-bytes"
                raise UserError(
                    f"{file.path}: line {line}: a document of over {MAX_DOCUMENT_BYTES >> 20} MiB, the "
                    f"most there may be; cut it{cut}"
                )
            yield line, piece
            line += piece.count(b"\n")

    for block in read_blocks(file, progress):
        *whole, rest = (rest + block).split(separator) if separator else [rest + block]
        for record in whole:
            yield from pieces(record)
            line += separator.count(b"\n")
        if len(rest) > (size or MAX_DOCUMENT_BYTES):
            *begun, (line, rest) = pieces(rest, hold=len(separator))  # no cut where a separator may have begun
            yield from begun
    yield from pieces(rest)


def read_txt(file: TextFile, progress: tqdm) -> Iterator[Document]:
    for line, raw in split_records(file, progress):
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line += raw[: error.start].count(b"\n")
            raise UserError(
                f"{file.path}: line {line}: no UTF-8 (byte {raw[error.start]:#04x}); convert the file to UTF-8"
            ) from None
        yield Document(text, raw)


def read_jsonl(file: TextFile, progress: tqdm) -> Iterator[Document]:
    for line, record in split_records(file, progress):
        if not record.strip():
            continue
        place = f"{file.path}: line {line}"
        try:
            value = json.loads(record.decode("utf-8-sig" if line == 1 else "utf-8"))
            document = Document(value[file.field], value[file.field].encode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: no UTF-8 (byte {record[error.start]:#04x}); convert the file to UTF-8") from None
        except UnicodeEncodeError:
            raise UserError(
                f"{place}: half a character (a lone surrogate), which no UTF-8 can spell; mend or drop the line"
            ) from None
        except (LookupError, TypeError, AttributeError):
            found = type(value).__name__
            if isinstance(value, dict):
                found = ", ".join(f"{name} ({type(it).__name__})" for name, it in [*value.items()][:8]) or "no field"
            raise UserError(
                f"{place}: expected an object with text in the field '{file.field}', found {found}; choose "
                "another with --field"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: no JSON ({error}); expected one object a line") from None
        yield document


def read_parquet(file: TextFile, progress: tqdm) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file.path}: .parquet needs the package pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            if file.field not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise UserError(f"{file.path}: no column '{file.field}', but {names}; choose one with --field")
            size = file.path.stat().st_size / max(1, table.metadata.num_rows)
            columns = table.iter_batches(batch_size=256, columns=[file.field])
            for row, text in enumerate((text for batch in columns for text in batch.column(0).to_pylist()), 1):
                if not isinstance(text, str):
                    raise UserError(
                        f"{file.path}: row {row}: '{file.field}' is {type(text).__name__}, expected text; "
                        "mend the row or choose a column with --field"
                    )
                progress.update(size)
                yield Document(text, text.encode("utf-8"))
    except UserError:
        raise
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file.path}: cannot be read ({reason}); get the file again") from None


def read_bin(file: TextFile, progress: tqdm, tokenizer: Tokenizer) -> Iterator[Document]:
    """What the tokens of a file spell between start tokens: bare uint16, as nanoGPT writes them, or a shard."""
    size = file.path.stat().st_size
    tokens = np.memmap(file.path, "<u2", mode="r", shape=size // 2) if size > 1 else np.empty(0, "<u2")
    if tokens[:4].tobytes() == np.array([SHARD_MAGIC, SHARD_VERSION], "<i4").tobytes():
        tokens = open_shard(file.path)
    rest = tokens[:0]
    for at in range(0, len(tokens), BLOCK_BYTES):
        block = np.concatenate([rest, tokens[at : at + BLOCK_BYTES]])
        *parts, rest = np.split(block, np.flatnonzero(block == tokenizer.start))
        progress.update(2 * BLOCK_BYTES)
        for part in (*parts, *([rest] if at + BLOCK_BYTES >= len(tokens) else [])):
            part = part[part[:1].tolist().count(tokenizer.start) :]
            try:
                if size % 2 or tokenizer.table.boundary[part].any() or len(rest) > MAX_DOCUMENT_BYTES:
                    raise IndexError
                raw = tokenizer.table.spell(part.tolist())
                yield Document(raw.decode("utf-8"), raw)
            except (IndexError, UnicodeDecodeError):
                raise UserError(
                    f"{file.path}: expected uint16 tokens of {tokenizer.label} that spell UTF-8, none that "
                    f"is no text, documents of at most {MAX_DOCUMENT_BYTES:,}; name the tokenizer that "
                    "made it"
                ) from None


def read_documents(file: TextFile, progress: tqdm, tokenizer: Tokenizer | None) -> Iterator[Document]:
    """Every document of a file, without any translation; it may be empty."""
    if file.form != "bin":
        return {"txt": read_txt, "jsonl": read_jsonl, "parquet": read_parquet}[file.form](file, progress)
    if tokenizer is None:
        raise UserError(f"{file.path}: holds tokens; name the tokenizer that made it with --tokenizer, such as gpt2")
    return read_bin(file, progress, tokenizer)
