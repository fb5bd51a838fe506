"""Run the rungs of the small ladder, then write the table in README.md and the picture losses.png.

    python records/ladders/small/run.py                    all rungs with two seeds, the two large ones with one
    python records/ladders/small/run.py 01_sgd 02_adam     these rungs
    python records/ladders/small/run.py --table            only table and picture, from logs/*.json

A finished run is not run again and a stopped one resumes, so this may be interrupted at any time. Knobs in the
environment (LOG_DIR, COMPILE, ...) apply to every run. logs/RUNG_SEED.json keeps the results.
"""

import math
import os
import re
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools" / "experiments"))

import ladder
import launcher

from train_gpt import require

HERE = Path(__file__).resolve().parent
SEEDS = (1337, 1338)
LARGE = ("10_layers18", "13_layers23")  # only the first seed
EVERY = 25  # steps per mean of the training loss
PUBLISHED = {  # losses after epochs 1, 2, 3 of an unnamed text, and milliseconds per batch, as far as published
    "01_sgd": ((3.03, 3.02, 2.96), ""),
    "02_adam": ((2.87, 2.87, 2.86), ""),
    "03_cosine": ((2.87, 2.86, 2.85), ""),
    "04_rope": ((3.18, 3.18, 3.14), ""),
    "05_no_dropout": ((2.69, 2.66, 2.64), ""),
    "06_ema": ((2.66, 2.63, 2.62), ""),
    "07_swiglu": ((2.60, 2.58, 2.56), 38),
    "08_layers8": ((2.62, 2.59), 48.5),
    "09_ff512": ((2.61,), 35),
    "10_layers18": ((2.32,), 130),
    "11_warmup": ((2.59, 2.57, 2.56), ""),
    "12_rate3e-4": ((2.59, 2.57, 2.54), ""),
    "13_layers23": ((2.23,), 465),
    "14_learned": ((2.58, 2.55, 2.53), ""),
}


def thirds() -> dict[str, str]:
    """Knobs that validate after each third of the steps if the caller sets ITERATIONS, as the recipes do for 300."""
    steps = os.environ.get("ITERATIONS", "")
    return {"VAL_LOSS_EVERY": str(math.ceil(int(steps) / 3))} if steps.isdecimal() else {}


def raw_loss(rung: str, environ: dict[str, str]) -> float:
    """The validation loss of the last weights where their average was exported. The last checkpoint holds both."""
    import torch

    folder = ladder.run_folder(environ)
    torch.save(torch.load(folder / "checkpoint.pt", weights_only=True)["model"], folder / "raw.pt")
    environ = environ | {"MODE": "eval", "ARTIFACT": str(folder / "raw.pt")}
    output = folder / "raw.out"
    code, _ = launcher.wait(ladder.start(HERE / f"{rung}.env", environ, output))
    require(code == 0, f"{rung} was not scored without the average: {launcher.last_words(output)}")
    return float(re.search(r"final_model_exact val_loss:(\S+)", output.read_text())[1])


def run(rung: str, seed: int):
    """Finish one run and keep its results."""
    environ = {"LOG_DIR": "logs"} | thirds() | os.environ | {"RUN_ID": f"small_{rung}_{seed}", "SEED": str(seed)}
    folder = ladder.run_folder(environ)
    log = HERE / "logs" / f"{rung}_{seed}.json"
    if (folder / "result.json").exists() and log.exists():
        return
    reason = ladder.finish(HERE / f"{rung}.env", environ)
    require(not reason, f"{rung} with seed {seed} failed; the same command resumes it: {reason}")
    result, metrics = ladder.read_run(folder)
    kept = {key: result.get(key) for key in ladder.KEPT}
    kept[f"train_means_of_{EVERY}"] = ladder.means(metrics, "train_loss", EVERY)
    kept["val"] = {step: round(line["val_loss"], 4) for step, line in metrics.items() if "val_loss" in line}
    if "EMA_DECAY=" in (HERE / f"{rung}.env").read_text():
        kept["raw_val_loss"] = raw_loss(rung, environ)
    ladder.write_log(log, kept)


def numbers(values, digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def validated(run: dict) -> str:
    """The steps at which a run was validated, such as "100, 200, 300"."""
    return ", ".join(sorted(run["val"], key=int))


def table(found: dict[str, list[dict]]) -> str:
    """The rungs, published and ours, and how far their orders agree.

    The orders are compared among the rungs that were validated at the most common steps.
    """
    steps = Counter(validated(run) for runs in found.values() for run in runs).most_common(1)
    usual = steps[0][0] if steps else "none yet"
    rows = []
    last = {}
    for rung, (losses, published_ms) in PUBLISHED.items():
        runs = found.get(rung)
        if not runs:
            rows.append([rung, "", numbers(losses, 2), published_ms, f"not run: `run.py {rung}`", "", "", ""])
            continue
        own = usual if usual in map(validated, runs) else validated(runs[0])
        runs = [run for run in runs if validated(run) == own]  # no mean with a run of another length
        ours = [[run["val"][step] for step in own.split(", ")] for run in runs]
        finals = [run["pre_quant_val_loss"] for run in runs]
        raw = [run["raw_val_loss"] for run in runs if "raw_val_loss" in run]
        means = numbers(map(fmean, zip(*ours, strict=True)), 3) + f" (steps {own})" * (own != usual)
        apart = f"{max(finals) - min(finals):.3f}" if len(runs) > 1 else "one seed"
        ms = f"{fmean(run['step_avg_ms'] for run in runs):.0f}"
        row = [rung, f"{runs[0]['model_params']:,}", numbers(losses, 2), published_ms, means, apart]
        rows.append([*row, numbers([fmean(raw)], 3) if raw else "", ms])
        last |= {rung: fmean(finals)} if own == usual else {}
    published = {rung: PUBLISHED[rung][0][-1] for rung in last}
    pairs = [(a, b) for a, b in combinations(last, 2) if published[a] != published[b]]
    same = [(a, b) for a, b in pairs if (published[a] < published[b]) == (last[a] < last[b])]
    columns = ["rung", "parameters", "published: epochs 1, 2, 3", "ms"]
    columns += [f"ours: steps {usual}", "seeds apart", "raw", "ms"]
    return f"""{ladder.markdown(columns, rows)}
Of {len(pairs)} pairs of rungs whose last published losses differ, {len(same)} have the same order here. \
Published, the best first: {", ".join(sorted(last, key=published.get))}. \
Ours: {", ".join(sorted(last, key=last.get))}.
"""


def draw(found: dict[str, list[dict]]):
    with ladder.picture(HERE, f"Small transformer, one change at a time (seed {SEEDS[0]})") as (*axes, colors):
        rungs = [rung for rung in PUBLISHED if rung in found and rung not in LARGE]
        for axis, part in zip(axes, (rungs[:6], rungs[5:]), strict=True):
            for i, rung in enumerate(part):
                means = found[rung][0][f"train_means_of_{EVERY}"]
                steps = range(EVERY, EVERY * len(means) + 1, EVERY)
                axis.plot(steps, means, label=rung, color=colors[i], linestyle=["-", "--", "-.", ":"][i % 4])
            axis.set_xlabel("step of 700 tokens")
        axes[0].set_ylabel(f"training loss, nats per token, means of {EVERY} steps")


def main(argv: list[str]):
    rungs = ladder.choose(argv, PUBLISHED, "--table")
    for seed in SEEDS:
        for rung in rungs:
            if rung not in LARGE or seed == SEEDS[0]:
                run(rung, seed)
    found = {}
    for name, kept in ladder.read_logs(HERE / "logs").items():
        found.setdefault(name.rpartition("_")[0], []).append(kept)
    ladder.fill_readme(HERE, table(found))
    draw(found)


if __name__ == "__main__":
    ladder.main(lambda: main(sys.argv[1:]))
