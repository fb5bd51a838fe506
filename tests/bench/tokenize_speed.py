"""Compare the speed of data/tokenize_text.py with SentencePiece's batch encoding on the same cores. Not a test.

    python tests/bench/tokenize_speed.py TEXT.jsonl.xz                       # a tokenizer that the command trains
    python tests/bench/tokenize_speed.py TEXT.jsonl.xz --model FILE.model    # a given one

Prints, for pairs of consecutive runs (so that other load on the machine affects both): MB of text per second of
`SentencePieceProcessor.encode(documents, num_threads=2)` on documents in memory, the same for the complete command with
two threads (start, reading, unpacking, encoding, verification, writing), their ratio, and the command's peak resident
memory (as Linux counts it). If other work shares the cores, the processor time of both is the better measure. Finally
checks that one thread makes the same shards.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import sentencepiece as spm

SCRIPT = Path(__file__).resolve().parents[2] / "data" / "tokenize_text.py"
sys.path.insert(0, str(SCRIPT.parent))

import texts  # noqa: E402

BATCH = 1000  # documents per SentencePiece call: all at once is slower, as it makes a list of every token


def read_documents(path: str, field: str) -> list[str]:
    form, packing = texts.classify(Path(path))
    file = texts.TextFile(Path(path), form, packing, field, separator=b"", document_bytes=0, held_out=False)
    progress = SimpleNamespace(update=lambda size: None)
    return [document.text for document in texts.read_documents(file, progress, None)]


def run(out: Path, *arguments) -> tuple[float, float, int]:
    """Seconds, processor seconds and peak bytes of one command."""
    command = [sys.executable, SCRIPT, *map(str, arguments), "--out", out]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(said)
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.bin"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="any input of data/tokenize_text.py that is one file")
    parser.add_argument("--model", type=Path, help="a SentencePiece model (default: train:sp1024, trained first)")
    parser.add_argument("--field", default="text")
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    documents = read_documents(args.text, args.field)
    size = sum(len(text.encode("utf-8")) for text in documents) / 1e6
    print(f"{len(documents):,} documents, {size:.1f} MB of text")
    with tempfile.TemporaryDirectory() as folder:
        root, command = Path(folder), [args.text, "--field", args.field]
        if args.model is None:
            seconds, _, peak = run(root / "trained", *command, "--tokenizer", "train:sp1024", "--threads", 2)
            print(f"train:sp1024 and encode: {seconds:.1f} s, {size / seconds:.2f} MB/s, peak {peak / 2**20:.0f} MiB")
            (args.model,) = (root / "trained" / "tokenizers").iterdir()
        sp = spm.SentencePieceProcessor(model_file=str(args.model))
        ratios = []
        for pair in range(args.pairs):
            started, spent = time.perf_counter(), time.process_time()
            for at in range(0, len(documents), BATCH):
                sp.encode(documents[at : at + BATCH], num_threads=2)
            theirs, spent = size / (time.perf_counter() - started), time.process_time() - spent
            seconds, ours, peak = run(root / f"two_{pair}", *command, "--tokenizer", args.model, "--threads", 2)
            ratios.append(size / seconds / theirs)
            print(
                f"pair {pair}: sentencepiece {theirs:.2f} MB/s, command {size / seconds:.2f} MB/s, ratio "
                f"{ratios[-1]:.2f}, peak {peak / 2**20:.0f} MiB; processor seconds {spent:.1f} and {ours:.1f}",
                flush=True,
            )
        print(f"ratio: median {sorted(ratios)[len(ratios) // 2]:.2f}, least {min(ratios):.2f}, n = {len(ratios)}")
        run(root / "one", *command, "--tokenizer", args.model, "--threads", 1)
        print(f"the same shards with one thread: {hashes(root / 'one') == hashes(root / 'two_0')}")


if __name__ == "__main__":
    main()
