"""Go through the rungs of the latent_moe ladder, then write the tables into README.md and the picture losses.png.

    python records/ladders/latent_moe/run.py            # the small rungs
    python records/ladders/latent_moe/run.py bias loss  # these
    python records/ladders/latent_moe/run.py full       # 1,075,060,736 parameters: 3 steps, resumed for 1; 20 GiB free
    python records/ladders/latent_moe/run.py --table    # tables and picture alone, from logs/*.json

A finished run is not run again and an unfinished one goes on. Knobs in the environment (LOG_DIR, DATA_PATH, ...) reach
every run. What a run gave, its load and what it wrote to five prompts, is kept in logs/RUNG.json.
"""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

HERE = Path(__file__).resolve().parent
ROOT = next(folder for folder in HERE.parents if (folder / "train_gpt.py").is_file())
LOGS = Path(os.environ.get("LOG_DIR", ROOT / "logs")).resolve()
SMALL = ("bias", "loss", "none", "unshifted", "text")
EVERY, LOAD_TOKENS, FULL_STEPS = 10, 65_536, 3
PROMPTS = ("Once upon a time, in a land far away", "The future of AI will be shaped by",
           "In the middle of the night, I heard a strange noise", "The scientist looked at the data and realized",
           "A journey across the ocean began when")  # fmt: skip


def command(rung: str, **knobs) -> dict:
    """For subprocess: latent_moe.py with the rung's recipe."""
    environ = os.environ | {"LOG_DIR": str(LOGS), "RUN_ID": f"latent_{rung}"} | knobs
    return {"args": [sys.executable, HERE / "latent_moe.py", HERE / f"{rung}.env"], "cwd": ROOT, "env": environ}


def look(folder: Path) -> dict:
    """How a trained model spreads training text over its experts, and what it writes to the prompts."""
    sys.path.insert(0, str(HERE))
    import latent_moe
    import torch
    from latent_moe import train_gpt

    os.chdir(ROOT)
    config = latent_moe.LatentConfig.load([str(folder / "config.env")], {})
    model = latent_moe.LatentMoE(config)
    model.load_state_dict(torch.load(folder / "final_model.pt", weights_only=True))
    stream = train_gpt.TokenStream(config.data_path, "train", config.vocab_size)
    T = config.train_seq_len
    starts = range(0, len(stream) - T, (len(stream) - T) * T // LOAD_TOKENS)  # from all over the text
    tokens = torch.stack([torch.from_numpy(stream.read(start, T).astype("int64")) for start in starts])
    with torch.no_grad():
        for rows in tokens.split(32):  # in training mode, which counts
            model.features(rows)
    loads = torch.stack([block.experts.load for block in model.blocks])
    shares = loads / loads.mean(1, keepdim=True)  # 1: even
    token_bytes = train_gpt.TokenBytes(config.tokenizer_path, config.vocab_size, config.vocab_padding)
    model.eval()
    texts = []
    for prompt in PROMPTS:
        asked = replace(config, sample_prompt=prompt, sample_tokens=60)
        texts.append("".join(train_gpt.tool("sample").generate(model, asked, token_bytes)))
    return {"load": [[round(share, 3) for share in row] for row in shares.tolist()], "texts": texts}


def run(rung: str):
    folder, kept = LOGS / f"latent_{rung}", HERE / "logs" / f"{rung}.json"
    if not (folder / "result.json").exists():
        print(rung, flush=True)
        subprocess.run(**command(rung), stdout=subprocess.DEVNULL, check=True)
    elif kept.exists():
        return
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = list({line["step"]: line for line in lines if "train_loss" in line}.values())
    result = json.loads((folder / "result.json").read_text())
    keys = ("seed", "steps", "model_params", "train_tokens", "val_loss", "val_bpb", "pre_quant_val_loss",
            "scored_tokens", "step_avg_ms", "device", "dtype", "torch", "note", "sha256_code")  # fmt: skip
    told = {key: result[key] for key in keys}
    for name in ("train_loss", "grad_norm"):
        parts = [lines[begin : begin + EVERY] for begin in range(0, len(lines) - EVERY + 1, EVERY)]
        told[f"{name}_means_of_{EVERY}"] = [round(fmean(line[name] for line in part), 4) for part in parts]
    kept.write_text(json.dumps(told | look(folder), indent=1) + "\n")


def take_steps(steps: int) -> dict:
    """Start the full shape, or go on with it, and send SIGTERM when it has told of so many steps: its log and memory.

    VmHWM is the most that the process had so far, pages of a mapped file included; RssAnon is without those."""
    memory, lines, taken = {}, [], 0
    with subprocess.Popen(**command("full", TRAIN_LOG_EVERY="1"), stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            status = Path(f"/proc/{process.pid}/status")  # a process that has ended tells nothing of its memory
            found = re.findall(r"(VmHWM|RssAnon):\s+(\d+) kB", status.read_text() if status.exists() else "")
            memory |= {name: round(int(kib) / 2**20, 2) for name, kib in found}
            if re.match("device|model_params|resumed|step:|checkpoint|warning", line):
                lines.append(" ".join([line.strip(), *(f"{name}:{gib}GiB" for name, gib in memory.items())]))
            if "train_loss:" in line:
                taken += 1
                if taken == steps:
                    process.send_signal(signal.SIGTERM)
    stopped = 128 + signal.SIGTERM
    if process.returncode != stopped or not any(line.startswith("checkpoint: saved") for line in lines):
        sys.exit(f"error: full ended with exit code {process.returncode}; {stopped} and a checkpoint were expected: "
                 f"see above, or {LOGS / 'latent_full' / 'train.log'}")  # fmt: skip
    return {"log": lines, "peak_gib": memory.get("VmHWM")}


def run_full():
    """FULL_STEPS steps and a checkpoint; then the same command again, which goes on from there for one step."""
    first, second = take_steps(FULL_STEPS), take_steps(1)
    if not any(line.startswith("resumed: ") for line in second["log"]):
        sys.exit("error: the second start of full did not go on from the checkpoint of the first: see above")
    kept = {"first": first, "resumed": second}
    (HERE / "logs" / "full.json").write_text(json.dumps(kept, indent=1) + "\n")


def table(found: dict[str, dict]) -> str:
    """The small rungs, then what the right and the wrong one write."""
    lines = ["| rung | steps | tokens | training loss, last 10 steps | validation loss | BPB | load, 1 is even |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for rung in SMALL:
        told = found.get(rung)
        if not told:
            lines.append(f"| {rung} | not run: `run.py {rung}` | | | | | |")
            continue
        load = f"{min(map(min, told['load'])):.2f} to {max(map(max, told['load'])):.2f}"
        trained = told[f"train_loss_means_of_{EVERY}"][-1]
        lines.append(f"| {rung} | {told['steps']} | {told['train_tokens']:,} | {trained:.3f} | "
                     f"{told['pre_quant_val_loss']:.3f} | {told['val_bpb']:.3f} | {load} |")  # fmt: skip
    for rung in ("text", "unshifted"):
        texts = [repr(text)[1:111] for text in found.get(rung, {}).get("texts", [])]
        lines += ["", f"To five prompts {rung} writes:", "", "```", *texts, "```"]
    return "\n".join(lines) + "\n"


def picture(found: dict[str, dict]):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {"bias": ("#0072B2", "-"), "loss": ("#E69F00", "--"), "none": ("#009E73", "-."),
              "unshifted": ("#D55E00", "-"), "text": ("#000000", ":")}  # fmt: skip
    figure, (axis, spread) = pyplot.subplots(1, 2, figsize=(11, 4.5), width_ratios=(3, 2))
    for rung, (colour, line) in styles.items():
        if rung in found:
            means = found[rung][f"train_loss_means_of_{EVERY}"]
            steps = range(EVERY, EVERY * len(means) + 1, EVERY)
            label = f"{rung} (validation {found[rung]['pre_quant_val_loss']:.2f})"
            axis.plot(steps, means, color=colour, linestyle=line, label=label)
            spread.plot(sorted(sum(found[rung]["load"], [])), color=colour, linestyle=line, label=rung)
    axis.set(xlabel="step of 2,048 tokens", ylabel=f"training loss, nats a token, means of {EVERY} steps", xscale="log")
    spread.set(xlabel="routed experts of all layers, sorted", ylabel="load over an even share")
    for part, place in ((axis, "center right"), (spread, "upper left")):
        part.grid(alpha=0.3)
        if part.lines:
            part.legend(loc=place)
    figure.suptitle("Latent attention with experts, small, on the demo's text")
    figure.tight_layout()
    figure.savefig(HERE / "losses.png", dpi=90)


def main(argv: list[str]):
    if unknown := set(argv) - {*SMALL, "full", "--table"}:
        sys.exit(f"error: no rung {', '.join(sorted(unknown))}: there are {', '.join(SMALL)}, full and --table")
    (HERE / "logs").mkdir(exist_ok=True)
    for rung in SMALL:
        if rung in argv or not argv:
            run(rung)
    if "full" in argv:
        run_full()
    found = {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "logs").glob("*.json"))}
    readme = HERE / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition("<!-- table: run.py -->\n")
    after = rest.partition("<!-- end -->")[2]
    readme.write_text(f"{before}<!-- table: run.py -->\n{table(found)}<!-- end -->{after}", encoding="utf-8")
    picture(found)


if __name__ == "__main__":
    main(sys.argv[1:])
