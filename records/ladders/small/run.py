"""Go through the rungs of the small ladder, then write the table into README.md and the picture losses.png.

    python records/ladders/small/run.py                    # all rungs, two seeds; those of over 3 M parameters one
    python records/ladders/small/run.py 01_sgd 02_adam     # these rungs
    python records/ladders/small/run.py --table            # table and picture alone, from logs/*.json

A finished run is not run again and an unfinished one goes on, so that this may be stopped at any time. Knobs in the
environment (LOG_DIR, COMPILE, ...) reach every run. What a run gave is kept in logs/RUNG_SEED.json.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from statistics import fmean

HERE = Path(__file__).resolve().parent
ROOT = next(folder for folder in HERE.parents if (folder / "train_gpt.py").is_file())
LOGS = Path(os.environ.get("LOG_DIR", ROOT / "logs")).resolve()
SEEDS, LARGE, EVERY = (1337, 1338), ("10_layers18", "13_layers23"), 25
# Losses after epochs 1, 2, 3 of a text that is not named, and milliseconds a batch, where they were published.
PUBLISHED = {
    "01_sgd": ((3.03, 3.02, 2.96), ""), "02_adam": ((2.87, 2.87, 2.86), ""), "03_cosine": ((2.87, 2.86, 2.85), ""),
    "04_rope": ((3.18, 3.18, 3.14), ""), "05_no_dropout": ((2.69, 2.66, 2.64), ""), "06_ema": ((2.66, 2.63, 2.62), ""),
    "07_swiglu": ((2.60, 2.58, 2.56), 38), "08_layers8": ((2.62, 2.59), 48.5), "09_ff512": ((2.61,), 35),
    "10_layers18": ((2.32,), 130), "11_warmup": ((2.59, 2.57, 2.56), ""), "12_rate3e-4": ((2.59, 2.57, 2.54), ""),
    "13_layers23": ((2.23,), 465), "14_learned": ((2.58, 2.55, 2.53), ""),
}  # fmt: skip


def call(rung: str, log: Path | None = None, **knobs) -> str:
    """Standard output of small.py with the rung's recipe; where it fails, this ends too, and the same call goes on."""
    environ = os.environ | {"LOG_DIR": str(LOGS)} | {name: str(value) for name, value in knobs.items()}
    command = [sys.executable, HERE / "small.py", HERE / f"{rung}.env"]
    done = subprocess.run(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{rung}: exit code {done.returncode}\n{done.stdout[-2000:]}")
    return done.stdout


def thirds() -> dict[str, int]:
    """A validation after each third of the steps, where the caller sets how many: recipes of 300 steps have it so."""
    steps = os.environ.get("ITERATIONS", "")
    set_already = not steps.isdecimal() or "VAL_LOSS_EVERY" in os.environ
    return {} if set_already else {"VAL_LOSS_EVERY": math.ceil(int(steps) / 3)}


def raw_loss(rung: str, folder: Path) -> float:
    """Of the weights themselves, where their average was exported: the last checkpoint has both."""
    import torch

    if not (folder / "raw.pt").exists():
        torch.save(torch.load(folder / "checkpoint.pt", weights_only=True)["model"], folder / "raw.pt")
    text = call(rung, MODE="eval", ARTIFACT=folder / "raw.pt")
    return float(re.search(r"final_model_exact val_loss:(\S+)", text)[1])


def run(rung: str, seed: int):
    """One run, if it is not finished, and what is kept of it."""
    folder, kept = LOGS / f"small_{rung}_{seed}", HERE / "logs" / f"{rung}_{seed}.json"
    if not (folder / "result.json").exists():
        print(f"{rung} seed {seed}", flush=True)
        call(rung, RUN_ID=folder.name, SEED=seed, **thirds())
    elif kept.exists():
        return
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = {line["step"]: line["train_loss"] for line in lines if "train_loss" in line}  # a repeated step: the later
    ends = range(EVERY, len(train) + 1, EVERY)
    means = [round(fmean(train[step] for step in range(end - EVERY + 1, end + 1)), 4) for end in ends]
    result = json.loads((folder / "result.json").read_text())
    keys = ("seed", "steps", "model_params", "train_tokens", "val_loss", "pre_quant_val_loss", "partial",
            "scored_tokens", "step_avg_ms", "device", "dtype", "torch", "note", "sha256_code")  # fmt: skip
    told = {key: result[key] for key in keys} | {f"train_means_of_{EVERY}": means}
    told["val"] = {line["step"]: round(line["val_loss"], 4) for line in lines if "val_loss" in line}
    if "EMA_DECAY=" in (HERE / f"{rung}.env").read_text():
        told["raw_val_loss"] = raw_loss(rung, folder)
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(told, indent=1) + "\n")


def numbers(values, digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def validated(run: dict) -> str:
    """The steps of its validations."""
    return ", ".join(sorted(run["val"], key=int))


def table(found: dict[str, list[dict]]) -> str:
    """The rungs, published and ours, and how far their orders agree: of all that were validated after the same steps,
    those of most runs."""
    steps = Counter(validated(run) for runs in found.values() for run in runs).most_common(1)
    usual = steps[0][0] if steps else "none yet"
    head = ["rung", "parameters", "published: epochs 1, 2, 3", "ms", f"ours: steps {usual}", "seeds apart", "raw", "ms"]
    rows, last = [head, ["---"] * len(head)], {}
    for rung, (losses, milliseconds) in PUBLISHED.items():
        runs = found.get(rung)
        if not runs:
            rows.append([rung, "", numbers(losses, 2), f"{milliseconds}", f"not run: `run.py {rung}`", "", "", ""])
            continue
        own = usual if usual in map(validated, runs) else validated(runs[0])
        runs = [run for run in runs if validated(run) == own]  # a seed of another length is no mean with these
        ours = [[run["val"][step] for step in own.split(", ")] for run in runs]
        finals = [run["pre_quant_val_loss"] for run in runs]
        raw = [run["raw_val_loss"] for run in runs if "raw_val_loss" in run]
        rows.append([
            rung, f"{runs[0]['model_params']:,}", numbers(losses, 2), f"{milliseconds}",
            numbers(map(fmean, zip(*ours, strict=True)), 3) + f" (steps {own})" * (own != usual),
            f"{max(finals) - min(finals):.3f}" if len(runs) > 1 else "one seed",
            numbers([fmean(raw)], 3) if raw else "", f"{fmean(run['step_avg_ms'] for run in runs):.0f}",
        ])  # fmt: skip
        last |= {rung: fmean(finals)} if own == usual else {}
    published = {rung: PUBLISHED[rung][0][-1] for rung in last}
    pairs = [(a, b) for a, b in combinations(last, 2) if published[a] != published[b]]
    same = [(a, b) for a, b in pairs if (published[a] < published[b]) == (last[a] < last[b])]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", f"Of {len(pairs)} pairs of rungs whose last published losses differ, {len(same)} have "
              f"the same order here. Published, the best first: {', '.join(sorted(last, key=published.get))}. Ours: "
              f"{', '.join(sorted(last, key=last.get))}."]  # fmt: skip
    return "".join(f"{line}\n" for line in lines)


def picture(found: dict[str, list[dict]]):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2"]  # Okabe and Ito
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    rungs = [rung for rung in PUBLISHED if rung in found and rung not in LARGE]
    for axis, part in zip(axes, (rungs[:6], rungs[5:]), strict=True):
        for i, rung in enumerate(part):
            means = found[rung][0][f"train_means_of_{EVERY}"]
            steps = range(EVERY, EVERY * len(means) + 1, EVERY)
            style = {"color": colours[i], "linestyle": ["-", "--", "-.", ":"][i % 4], "linewidth": 1.4}
            axis.plot(steps, means, label=rung, **style)
        axis.set_xlabel("step of 700 tokens")
        axis.grid(alpha=0.3)
        if part:
            axis.legend(title=f"training loss, means of {EVERY} steps")
    axes[0].set_ylabel("nats a token")
    figure.suptitle(f"Small transformer, one change at a time (seed {SEEDS[0]})")
    figure.tight_layout()
    figure.savefig(HERE / "losses.png", dpi=90)


def main(argv: list[str]):
    if unknown := set(argv) - {*PUBLISHED, "--table"}:
        sys.exit(f"error: no rung {', '.join(sorted(unknown))}: there are {', '.join(PUBLISHED)}, and --table")
    rungs = [rung for rung in PUBLISHED if rung in argv or not argv]
    (HERE / "logs").mkdir(exist_ok=True)
    for seed in SEEDS:
        for rung in rungs:
            if rung not in LARGE or seed == SEEDS[0]:
                run(rung, seed)
    found = {}
    for path in sorted((HERE / "logs").glob("*.json")):
        found.setdefault(path.stem.rpartition("_")[0], []).append(json.loads(path.read_text()))
    readme = HERE / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition("<!-- table: run.py -->\n")
    after = rest.partition("<!-- end -->")[2]
    readme.write_text(f"{before}<!-- table: run.py -->\n{table(found)}<!-- end -->{after}", encoding="utf-8")
    picture(found)


if __name__ == "__main__":
    main(sys.argv[1:])
