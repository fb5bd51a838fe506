"""Plot runs and tracks.

    python tools/experiments/plot.py logs/a logs/b                         one color per run; writes runs.png
    python tools/experiments/plot.py "logs/wide_*" logs/c,logs/d -o x.svg  two groups (a glob, a list): mean and std
    python tools/experiments/plot.py records/track_10min_16mb              a track: scores by date, size against score

For runs, plots train_loss, val_bpb and the learning-rate scale over steps, tokens and training seconds, all from
metrics.jsonl. Runs may still be active. Uses the color-blind-safe palette of Okabe and Ito.
"""

import argparse
import sys
from pathlib import Path

import launcher  # first: it adds the folders of the other tools to sys.path
import numpy as np
from pictures import COLORS, STYLE, draw_track, ladder_rows, plt, save
from record_folder import open_record
from record_read import Run, is_record, read_group

from train_gpt import require

DASHES = ("-", "--", "-.", ":")
AXES = {"steps": "steps", "tokens": "training tokens (millions)", "seconds": "training time (s)"}
ROWS = {
    "train_loss": "train_loss (nats per token)",
    "val_bpb": "val_bpb (bits per byte)",
    "lr_scale": "learning rate (share of the full)",
}
SMOOTH = 0.02  # running-mean window for train_loss, as a fraction of the run


def curves(run: Run) -> dict[str, dict[str, np.ndarray]]:
    """Return {metric: {value, steps, tokens, seconds}} for train_loss, val_bpb and lr_scale. Tokens in millions."""
    lines, found = run.metrics(), {}
    clock = {m["step"]: m["train_seconds"] for m in lines if "train_seconds" in m} | {0: 0.0}
    for key in ROWS:
        rows = [(m["step"], m[key], clock.get(m["step"], np.nan)) for m in lines if key in m]
        if rows:
            steps, values, seconds = np.array(rows, float).T
            tokens = steps * (run.tokens_per_step or np.nan) / 1e6
            found[key] = {"value": values, "steps": steps, "tokens": tokens, "seconds": seconds}
    return found


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the trailing running mean; the window is shorter at the start."""
    width = max(1, round(SMOOTH * len(values)))
    total = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def mean_and_spread(series: list[tuple[np.ndarray, np.ndarray, np.ndarray]]):
    """Return (mean x, mean y, sample std of y) of curves given as (fraction of the run, x, y).

    Curves are interpolated to common fractions, because time-limited runs differ in steps and step-limited runs in
    time."""
    if len(series) == 1:
        return series[0][1], series[0][2], np.zeros(len(series[0][2]))
    shares = np.unique(np.concatenate([share for share, _, _ in series]))
    x, y = (np.stack([np.interp(shares, each[0], each[i]) for each in series]) for i in (1, 2))
    return x.mean(0), y.mean(0), y.std(0, ddof=1)


def draw_group(axes: dict[tuple[str, str], plt.Axes], label: str, runs: list[Run], color: str, dash: str):
    """Draw a group of runs into the panels {(key of ROWS, key of AXES): axes}."""
    found = [curves(run) for run in runs]
    name = label + (f" (mean ± std, n = {len(runs)})" if len(runs) > 1 else "")
    for (key, by), panel in axes.items():
        shown = [c[key] for c in found if key in c and np.isfinite(c[key][by]).all() and c[key]["steps"][-1]]
        values = [smooth(c["value"]) if key == "train_loss" else c["value"] for c in shown]
        series = [(c["steps"] / c["steps"][-1], c[by], y) for c, y in zip(shown, values, strict=True)]
        if not series:
            continue
        x, mean, deviation = mean_and_spread(series)
        marker = {"marker": "o", "markersize": 3} if key == "val_bpb" else {}
        panel.plot(x, mean, dash, color=color, label=name, linewidth=1.4, **marker)
        panel.fill_between(x, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)
        if key == "train_loss" and len(runs) == 1:
            panel.plot(x, found[0][key]["value"], color=color, alpha=0.2, linewidth=0.6)
        if key == "val_bpb":
            finals = [run.val_bpb for run in runs if run.result]
            star = {"color": color, "markersize": 10, "markeredgecolor": "w"}
            panel.plot(x[-1:] if finals else [], [np.mean(finals)] if finals else [], "*", **star)


def draw_runs(groups: dict[str, list[Run]], rows=tuple(ROWS), columns=tuple(AXES)):
    """Return a figure with one panel per row and column. Stars mark the artifact's score."""
    size = (11, 8.5) if len(rows) > 1 else (7, 3.2)
    figure, grid = plt.subplots(len(rows), len(columns), figsize=size, sharex="col", sharey="row", squeeze=False)
    axes = {(key, by): grid[i, j] for i, key in enumerate(rows) for j, by in enumerate(columns)}
    for index, (label, runs) in enumerate(groups.items()):
        dash = DASHES[index // len(COLORS) % len(DASHES)]
        draw_group(axes, label, runs, COLORS[index % len(COLORS)], dash)
    for (key, by), panel in axes.items():
        if by == columns[0]:
            panel.set_ylabel(ROWS[key])
        if key == rows[-1]:
            panel.set_xlabel(AXES[by])
    drawn = [curves(run) for runs in groups.values() for run in runs]
    losses = [found["train_loss"]["value"] for found in drawn if "train_loss" in found]
    if losses and rows[0] == "train_loss":  # cut off the first steps, which would compress the rest
        tops = [np.quantile(loss, 0.97) for loss in losses]
        grid[0, 0].set_ylim(min(loss.min() for loss in losses) - 0.05, max(tops) + 0.05)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    if len(axes) > 1:
        figure.legend(handles, labels, loc="outside upper center", ncols=min(3, len(labels)) or 1, frameon=False)
    else:
        grid[0, 0].legend(handles, labels, frameon=False)
    if ("val_bpb", columns[0]) in axes:
        axes["val_bpb", columns[0]].set_title("star: the artifact's score", fontsize=8, loc="right")
    return figure


def label_of(spec: str) -> str:
    return Path(spec.rstrip("/")).name if "," not in spec else ",".join(Path(part).name for part in spec.split(","))


def readable(groups: dict[str, list[Run]]) -> dict[str, list[Run]]:
    """Drop runs without metrics and print their names. Raises UserError if no run is left."""
    kept = {label: [run for run in runs if curves(run)] for label, runs in groups.items()}
    names = [run.name for label, runs in groups.items() for run in runs if run not in kept[label]]
    told = f"{', '.join(names)} has no numbers yet: its metrics.jsonl is empty or not there"
    require(not names or any(kept.values()), told)
    if names:
        print(told, file=sys.stderr)
    return {label: runs for label, runs in kept.items() if runs}


def picture(specs: list[str], panel: str = ""):
    tracks = [Path(spec) for spec in specs if Path(spec).name.startswith("track_") and not is_record(Path(spec))]
    if not tracks:
        row, _, column = panel.partition(",")
        known = not panel or (row in ROWS and column in AXES)
        require(known, f"--panel {panel}: expected one of {', '.join(ROWS)}, a comma, one of {', '.join(AXES)}")
        shown = ((row,), (column,)) if panel else ()
        return draw_runs(readable({label_of(spec): read_group(spec) for spec in specs}), *shown)
    require(len(specs) == 1, f"{', '.join(specs)}: one track at a time")
    records = [open_record(path) for path in sorted(tracks[0].glob("*")) if is_record(path)]
    none = f"{tracks[0]} holds no record: make one with `python tools/records/record.py new`"
    require(any(ladder_rows([record]) for record in records), none)
    return draw_track(records)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="+", metavar="LOG_FOLDER", help="run folders, groups of runs, records, a track")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs.png"), help="output file: .png, .svg or .pdf")
    parser.add_argument("--panel", default="", metavar="ROW,AXIS", help="draw one panel, such as train_loss,seconds")
    arguments = parser.parse_args(argv)

    def tool():
        output = arguments.output
        require(output.suffix in (".png", ".svg", ".pdf"), f"-o {output}: expected a .png, .svg or .pdf")
        require(output.parent.is_dir(), f"-o {output}: there is no folder {output.parent}: make it first")
        with plt.rc_context(STYLE):
            save(picture(arguments.specs, arguments.panel), output)
        print(f"wrote {output}")

    return launcher.run_tool(tool, f"{arguments.output} was not written")


if __name__ == "__main__":
    sys.exit(main())
