"""Run folders for the tests of the record tools: real runs of a two-layer model, created once and shared."""

import atexit
import functools
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import models

import train_gpt

ROOT = models.SCRIPT.parent
SEEDS = (1, 2, 3)
RUN_ALL = """
import os, sys, train_gpt
for seed in sys.argv[2:]:
    os.environ |= {"SEED": seed, "RUN_ID": f"run{seed}"}
    assert train_gpt.main([]) == 0
"""


@functools.cache
def work() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tiny_runs_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def with_manifest(corpus: Path, folder: Path) -> Path:
    """Put the corpus's shards under `folder`, with a manifest that describes them."""
    vocab_size = int((corpus / "vocab_size").read_text())
    shutil.copytree(corpus / "data", folder)
    token_bytes = train_gpt.TokenBytes(str(corpus / "tok.model"), vocab_size)
    splits = {}
    for split in ("train", "val"):
        stream = train_gpt.TokenStream(str(folder), split, vocab_size)
        tokens = stream.read(0, len(stream))
        splits[split] = {"tokens": len(tokens), "bytes": token_bytes.count(tokens)}
    digest = hashlib.sha256((corpus / "tok.model").read_bytes()).hexdigest()
    tokenizer = {"kind": "sentencepiece", "sha256": digest, "options": {"bos_id": 1}}
    (folder / "manifest.json").write_text(json.dumps({"tokenizer": tokenizer, "splits": splits}))
    return folder


def settings(corpus: Path) -> dict[str, str]:
    """The knobs of a one-second run."""
    data = work() / "data"
    data = data if data.exists() else with_manifest(corpus, data)
    knobs = models.run_settings(corpus, DATA_PATH=data, ITERATIONS=24, TRAIN_LOG_EVERY=4)
    return {name: text for name, text in knobs.items() if name not in ("RUN_ID", "LOG_DIR")}


@functools.cache
def make_runs(corpus: Path) -> list[Path]:
    """Run folders of seeds 1, 2 and 3, made by one process."""
    logs = work() / "logs"
    environ = settings(corpus) | {"LOG_DIR": str(logs), "PYTHONPATH": str(ROOT)}
    done = models.process(environ, ROOT, options=["-c", RUN_ALL], args=SEEDS)
    assert done.returncode == 0, done.stdout + done.stderr
    return [logs / f"run{seed}" for seed in SEEDS]
