"""Measure what case marks gain in a trained model: bits per byte of the original text, paired by seed. Not a test.

    python tests/bench/case_marks_gain.py TRAIN.jsonl.xz VAL.jsonl.xz --out DIR --megabytes 30 --config FILE.env

Makes three datasets of the same text: without marks, with marks before the space next to a word, as the option
--case-marks has them, and with marks after it. Trains on each with each seed, on equally many bytes of text; the knobs
come from the config and the environment. Results already in DIR are reused.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "data"))

import tokenize_text  # noqa: E402
from vocab import vocabularies  # noqa: E402

KINDS = "none", "before", "after"
mark, unmark = vocabularies.mark, vocabularies.unmark
T, A, E = vocabularies.T, vocabularies.A, vocabularies.E


def mark_after(text: str) -> str:
    return re.sub(f"(?<!{E})([{T}{A}]) ", r" \1", mark(text))


def unmark_after(text: bytes) -> bytes:
    return unmark(re.sub(f" ({T}|{A})".encode(), rb"\1 ", text))


def make_data(kind: str, args: argparse.Namespace) -> tuple[Path, Path, dict]:
    """Folder, tokenizer and training split of a dataset."""
    vocabularies.mark, vocabularies.unmark = (mark_after, unmark_after) if kind == "after" else (mark, unmark)
    options = [] if kind == "none" else ["--case-marks"]
    options += ["--tokenizer", f"train:sp{args.pieces}", "--val", args.val, "--name", kind, "--out", str(args.out)]
    if tokenize_text.main([args.train, *options]):
        sys.exit(2)
    folder = args.out / "datasets" / kind
    manifest = json.loads((folder / "manifest.json").read_text())
    return folder, args.out / "tokenizers" / f"{kind}.model", manifest["splits"]["train"]


def train(kind: str, seed: int, knobs: dict, args: argparse.Namespace) -> dict:
    """result.json of a run."""
    path = args.out / "logs" / f"{kind}_{seed}" / "result.json"
    if not path.exists():
        knobs = knobs | {"RUN_ID": path.parent.name, "LOG_DIR": args.out / "logs", "SEED": seed}
        environ = os.environ | {name: str(value) for name, value in knobs.items()}
        command = [sys.executable, ROOT / "train_gpt.py", *([args.config] if args.config else [])]
        subprocess.run(command, env=environ, check=True, stdout=subprocess.DEVNULL)
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", help="training text")
    parser.add_argument("val", help="validation text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pieces", type=int, default=4096)
    parser.add_argument("--megabytes", type=float, default=30, help="of text that each run sees")
    parser.add_argument("--batch", type=int, default=8192, help="TRAIN_BATCH_TOKENS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    parser.add_argument("--config", type=Path)
    args = parser.parse_args()
    scores: dict[str, list[float]] = {}
    for kind in KINDS:
        folder, model, split = make_data(kind, args)
        steps = round(args.megabytes * 1e6 * split["tokens"] / split["bytes"] / args.batch)
        knobs = {
            "DATA_PATH": folder,
            "TOKENIZER_PATH": model,
            "VOCAB_SIZE": args.pieces,
            "ITERATIONS": steps,
            "TRAIN_BATCH_TOKENS": args.batch,
            "MAX_WALLCLOCK_SECONDS": 0,
        }
        results = [train(kind, seed, knobs, args) for seed in args.seeds]
        scores[kind] = [result["val_bpb"] for result in results]
        print(f"{kind}: {steps} steps, {results[0]['scored_bytes']:,} bytes scored, bpb {scores[kind]}", flush=True)
    for kind in KINDS[1:]:
        pairs = [score - plain for score, plain in zip(scores[kind], scores["none"], strict=True)]
        spread = statistics.stdev(pairs) if len(pairs) > 1 else float("nan")
        print(f"{kind} - none: {statistics.mean(pairs):+.5f} bits per byte, sd {spread:.5f}, n = {len(pairs)}")


if __name__ == "__main__":
    main()
