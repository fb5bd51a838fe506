"""The precision ladder: GPT-2 124M in every type, compiled or not, with every attention backend of this machine.

    python records/ladders/gpt2/run.py a_one_batch && python records/ladders/precision/run.py

The first command prepares the text (TINY_SHAKESPEARE=FILE: the published one). The second runs each cell as a process
and writes the table in README.md and the picture losses.png. A finished run is not run again. A cell that this machine
cannot run becomes a row that says why. All cells start from the same weights, which are drawn on the CPU.
"""

import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools" / "experiments"))

import ladder
import torch
from ladder import ROOT

from train_gpt import require

HERE = Path(__file__).resolve().parent
# Six steps, as published; on a CPU two, in micro-batches whose logits fit into memory.
STEPS = {"cuda": {"GRAD_ACCUM_STEPS": "1"}, "cpu": {"ITERATIONS": "2", "MICRO_BATCH_TOKENS": "2048"}}
PUBLISHED = {  # (device, DTYPE, MATMUL_PRECISION, COMPILE): (losses at steps 0 to 5, thousand tokens/s)
    ("cpu", "float32", "highest", "0"): ([10.9355, 9.3971, 8.9430, 8.8192, 8.4879, 8.4655], 0.84),
    ("cuda", "float32", "highest", "0"): ([10.9355, 9.3971, 8.9430, 8.8192, 8.4879, 8.4655], 21.5),
    ("cuda", "float32", "high", "0"): ([10.9355, 9.3970, 8.9428, 8.8187, 8.4878, 8.4651], 71.1),
    ("cuda", "bfloat16", "high", "0"): ([10.9360, 9.3973, 8.9443, 8.8242, 8.4886, 8.4692], 115.5),
    ("cuda", "bfloat16", "high", "1"): ([], 183.0),
}
KNOBS = ["DEVICE", "DTYPE", "MATMUL_PRECISION", "COMPILE", "ATTENTION"]  # what a cell sets
# Attention backends are compared in one precision only.
CELLS = [
    *(("cpu", dtype, "highest", compiled, "math") for dtype in ("float32", "bfloat16") for compiled in "01"),
    ("cpu", "float32", "high", "0", "math"),
    *(("cpu", "bfloat16", "highest", "0", backend) for backend in ("flash", "blocked")),
    *(("cuda", "float32", precision, compiled, "math") for precision in ("highest", "high") for compiled in "01"),
    *(("cuda", "bfloat16", "high", compiled, "math") for compiled in "01"),
    *(("cuda", "bfloat16", "high", "1", backend) for backend in ("efficient", "flash", "cudnn", "flash3")),
]


def lacking(cell: tuple) -> str:
    """Why this machine cannot run a cell; empty if it can."""
    device, dtype, precision, *_ = cell
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if device == "cpu" and precision == "high":
        return "no TF32 on a CPU: nothing would change"
    if device == "cuda" and precision == "high" and torch.cuda.get_device_capability()[0] < 8:
        return "TF32 and bf16 matmuls need compute capability 8 or later"
    return ""


def find_text() -> str:
    """The dataset that the ladder gpt2 prepared."""
    names = ("tiny_shakespeare_gpt2", "demo_shakespeare_gpt2")
    found = [f"data/datasets/{name}" for name in names if (ROOT / "data/datasets" / name).is_dir()]
    require(found, "no text in GPT-2's tokens: python records/ladders/gpt2/run.py a_one_batch makes it")
    return found[0]


def run(cell: tuple, text: str) -> dict:
    """The row of a cell: its losses and times, or why it has none."""
    row = dict(zip(KNOBS, cell, strict=True))
    if reason := lacking(cell):
        return row | {"skipped": reason}
    environ = {"LOG_DIR": "logs", "DATA_PATH": text, **STEPS[cell[0]], **os.environ, **row}
    environ |= {"RUN_ID": "precision_" + "_".join(cell), "GPT2_BPE_DIR": ladder.gpt2_files()}
    if reason := ladder.finish(HERE / "gpt2.env", environ):  # such as a backend or a compiler that is missing
        return row | {"skipped": reason[:160]}
    folder = ladder.run_folder(environ)
    ladder.drop_large(folder)
    result, metrics = ladder.read_run(folder)
    return row | {
        "losses": ladder.series(metrics, "train_loss", 6),
        "ms": ladder.milliseconds(metrics),
        "machine": result["device"],
        "torch": result["torch"],
        "tokens": result["train_tokens"] // result["steps"],
        "text": re.search(r'DATA_PATH="(?:.*/)?(.*)"', (folder / "config.env").read_text())[1],
    }


def line(row: dict, fp32: list[float]) -> list[str]:
    """A line of the table. `fp32` are the losses that those of the row are compared with."""
    cell = tuple(row[name] for name in KNOBS)
    losses, speed = PUBLISHED.get(cell[:4], ([], 0)) if cell[4] == "math" else ([], 0)
    cells = [*cell, " ".join(f"{loss:.4f}" for loss in losses) or "-", f"{speed} k" if speed else "-"]
    if "skipped" in row:
        return [*cells, f"not run: {row['skipped']}", "-", "-", "-"]
    differences = " ".join(f"{a - b:+.4f}" for a, b in zip(row["losses"], fp32, strict=False))
    shown = " ".join(f"{loss:.4f}" for loss in row["losses"])
    return [*cells, shown, differences, f"{row['ms']:,.0f}", f"{row['tokens'] / row['ms']:.3g} k"]


def draw(rows: list[dict], fp32: list[float]):
    """losses.png: the losses, and their distance from those of fp32."""
    with ladder.picture(HERE, "GPT-2 in every precision") as (left, right, colors):
        for i, row in enumerate(row for row in rows if "losses" in row):
            how = "compiled" if row["COMPILE"] == "1" else "eager"
            label = f"{row['DEVICE']} {row['DTYPE']} {how} {row['ATTENTION']}"
            style = {"color": colors[i % 7], "marker": "osv^Dx+"[i % 7], "fillstyle": "none"}
            left.plot(row["losses"], label=label, **style)
            right.plot([abs(a - b) for a, b in zip(row["losses"], fp32, strict=False)], **style)
        published = PUBLISHED["cpu", "float32", "highest", "0"][0]
        left.plot(published, "--", color="gray", label="published, fp32")
        left.set(title="Training loss (nats)", xlabel="step")
        right.set(title="Distance from fp32, eager (nats)", xlabel="step")
        right.set_yscale("symlog", linthresh=1e-6)
        for axis in (left, right):
            axis.xaxis.get_major_locator().set_params(integer=True)


def main():
    text = os.environ.get("DATA_PATH") or find_text()
    rows = [run(cell, text) for cell in CELLS]
    (HERE / "logs").mkdir(exist_ok=True)
    (HERE / "logs/cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fp32 = max((row["losses"] for row in rows if row.get("losses") and row["DTYPE"] == "float32"), key=len, default=[])
    machines = {f"{row['machine']}, torch {row['torch']}, {row['text']}" for row in rows if "machine" in row}
    columns = ["device", *KNOBS[1:], "published losses", "published tokens/s"]
    columns += ["our losses", "ours - fp32", "ms a step", "tokens/s"]
    table = ladder.markdown(columns, [line(row, fp32) for row in rows])
    table = f"This machine: {'; '.join(sorted(machines)) or 'nothing was measured'}.\n\n{table}"
    print(table)
    ladder.fill_readme(HERE, table)
    draw(rows, fp32)


if __name__ == "__main__":
    ladder.main(main)
