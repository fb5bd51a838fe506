"""Run folders for the tests of the record tools: real runs of a two-layer model, made once for all of them."""

import atexit
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (1, 2, 3)
RUN_ALL = """
import os, train_gpt
for seed in os.environ["TINY_RUN_SEEDS"].split():
    os.environ |= {"SEED": seed, "RUN_ID": f"run{seed}"}
    assert train_gpt.main([]) == 0
"""


@functools.cache
def work() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tiny_runs_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def with_manifest(corpus: Path, folder: Path) -> Path:
    """The corpus' shards under `folder`, with a manifest that states what they are."""
    import train_gpt

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
    """The knobs of a run of a second."""
    data = work() / "data"
    data = data if data.exists() else with_manifest(corpus, data)
    knobs = {
        "DATA_PATH": data,
        "TOKENIZER_PATH": corpus / "tok.model",
        "DEVICE": "cpu",
        "DTYPE": "float32",
        "COMPILE": 0,
        "VOCAB_SIZE": (corpus / "vocab_size").read_text(),
        "NUM_LAYERS": 2,
        "MAX_WALLCLOCK_SECONDS": 0,
        "ITERATIONS": 24,
        "MODEL_DIM": 32,
        "NUM_HEADS": 4,
        "NUM_KV_HEADS": 2,
        "TRAIN_SEQ_LEN": 32,
        "TRAIN_BATCH_TOKENS": 256,
        "VAL_BATCH_SIZE": 512,
        "WARMUP_STEPS": 0,
        "VAL_LOSS_EVERY": 0,
        "TRAIN_LOG_EVERY": 4,
    }
    return {name: str(value) for name, value in knobs.items()}


@functools.cache
def make_runs(corpus: Path) -> list[Path]:
    """Run folders of seeds 1, 2 and 3, by one process."""
    logs = work() / "logs"
    environ = dict(os.environ) | settings(corpus)
    environ |= {"LOG_DIR": str(logs), "PYTHONPATH": str(ROOT), "TINY_RUN_SEEDS": " ".join(map(str, SEEDS))}
    done = subprocess.run([sys.executable, "-c", RUN_ALL], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [logs / f"run{seed}" for seed in SEEDS]
