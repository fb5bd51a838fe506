"""How fast data/tokenize_text.py is, next to SentencePiece's own batch encoding on the same cores. No test.

    python tests/bench_tokenize.py TEXT.jsonl.xz                       # a tokenizer that the command trains
    python tests/bench_tokenize.py TEXT.jsonl.xz --model FILE.model    # a given one

Prints, for pairs of runs one after the other (so that what else the machine does disturbs both): MB of text a second of
`SentencePieceProcessor.encode(documents, num_threads=2)` on documents in memory, the same of the whole command with two
workers (start, reading, unpacking, encoding, proof, writing), their ratio, and the command's peak memory, which is the
largest sum of the resident memory of all its processes, looked at 50 times a second (Linux only). The processor time of
both is the better measure where other work takes turns on the cores. Then whether one worker makes the same shards.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sentencepiece as spm

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "tokenize_text.py"
sys.path.insert(0, str(SCRIPT.parent))

import tokenize_text as tt  # noqa: E402

BATCH = 1000  # documents that SentencePiece gets at a time: all at once is slower, as it makes a list of every token
PAGE_BYTES = 4096


def read_documents(path: str, field: str) -> list[str]:
    files = tt.find_files([path], None, field=field, separator=b"", held_out=False)
    with tt.Progress("reading", files) as progress:
        chunks = tt.read_chunks(files, progress)
        parsed = (tt.parse_record(chunk, i) for chunk in chunks for i in range(len(chunk.records)))
        return [text for text, _ in filter(None, parsed)]


def resident_bytes(pid: int) -> int:
    """Of a process and all below it; 0 for one that has ended."""
    try:
        own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
        return own + sum(map(resident_bytes, map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())))
    except OSError:
        return 0


def processor_seconds() -> float:
    """Of this process and of the commands that have ended."""
    return sum(os.times()[:4])


def run(out: Path, *arguments) -> tuple[float, int]:
    """Seconds and peak bytes of one command."""
    command = [sys.executable, SCRIPT, *map(str, arguments), "--out", out]
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(process.stdout.read())
    return seconds, peak


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
            seconds, peak = run(root / "trained", *command, "--tokenizer", "train:sp1024", "--workers", 2)
            print(f"train:sp1024 and encode: {seconds:.1f} s, {size / seconds:.2f} MB/s, peak {peak / 2**20:.0f} MiB")
            (args.model,) = (root / "trained" / "tokenizers").iterdir()
        sp = spm.SentencePieceProcessor(model_file=str(args.model))
        ratios = []
        for pair in range(args.pairs):
            started, spent = time.perf_counter(), [processor_seconds()]
            for at in range(0, len(documents), BATCH):
                sp.encode(documents[at : at + BATCH], num_threads=2)
            theirs = size / (time.perf_counter() - started)
            spent.append(processor_seconds())
            out = root / f"two_{pair}"
            seconds, peak = run(out, *command, "--tokenizer", args.model, "--workers", 2)
            spent.append(processor_seconds())
            ratios.append(size / seconds / theirs)
            print(f"pair {pair}: sentencepiece {theirs:.2f} MB/s, command {size / seconds:.2f} MB/s, "
                  f"ratio {ratios[-1]:.2f}, peak {peak / 2**20:.0f} MiB; processor seconds {spent[1] - spent[0]:.1f} "
                  f"and {spent[2] - spent[1]:.1f}", flush=True)  # fmt: skip
        print(f"ratio: median {sorted(ratios)[len(ratios) // 2]:.2f}, least {min(ratios):.2f}, n = {len(ratios)}")
        run(root / "one", *command, "--tokenizer", args.model, "--workers", 1)
        print(f"the same shards with one worker: {hashes(root / 'one') == hashes(root / 'two_0')}")


if __name__ == "__main__":
    main()
