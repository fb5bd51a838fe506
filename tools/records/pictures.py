"""Figures of tracks, and the colors and style of all figures.

Colors are those of Okabe and Ito (2008), which color-blind readers can tell apart.
"""

import itertools
from pathlib import Path

import numpy as np
from record_folder import Record

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}: pip install matplotlib (it is in requirements-dev.txt)") from None

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.hashsalt": "train_gpt",
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
}


def ladder_rows(records: list[Record]) -> list[tuple[str, str, float, float, int]]:
    """(date, slug, mean BPB, deviation, bytes) by date, of records that state all of it."""
    rows = []
    for record in records:
        date, _, slug = record.folder.name.partition("_")
        scores = [run.val_bpb for run in record.runs if run.val_bpb]
        sizes = [run.bytes_total for run in record.runs if run.bytes_total]
        if scores and sizes:
            spread = float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
            rows.append((date, slug, float(np.mean(scores)), spread, max(sizes)))
    return sorted(rows)


def draw_track(records: list[Record]):
    """Two panels: the scores by date with the best so far, and size against score."""
    rows, track = ladder_rows(records), records[0].track
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    names = [f"{slug}\n{date}" for date, slug, *_ in rows]
    scores, spreads, sizes = (np.array([row[i] for row in rows], float) for i in (2, 3, 4))
    places = np.arange(len(rows))
    left.errorbar(places, scores, spreads, fmt="o", color=COLORS[0], capsize=4, label="mean ± std over seeds")
    best = np.minimum.accumulate(scores)
    left.step(places, best, where="post", color=COLORS[1], linestyle="--", label="best so far")
    left.set_xticks(places, names, rotation=20, ha="right")
    left.set_xlabel("record, by date")
    left.set_title(track.name)
    for (_, slug, score, spread, size), color in zip(rows, itertools.cycle(COLORS), strict=False):
        right.errorbar(size / 1e6, score, spread, fmt="o", color=color, capsize=4)
        right.annotate(slug, (size / 1e6, score), xytext=(6, 5), textcoords="offset points", fontsize=8)
    if track.bytes:
        right.axvline(track.bytes / 1e6, color=COLORS[6], linestyle=":", label=f"limit: {track.bytes:,} bytes")
    right.set_xlabel("code and artifact (MB, decimal)")
    right.set_title("size against score")
    right.margins(0.15)
    for axes in (left, right):
        axes.set_ylabel("val_bpb (bits per byte)")
        axes.legend(frameon=False)
    return figure


def save(figure, path: Path, about: str = ""):
    """The same data give the same bytes: no date is written. `about` stands in the file's description."""
    key = "Description" if path.suffix in (".svg", ".png") else "Subject"
    figure.savefig(path, dpi=150, metadata={key: about} | ({"Date": None} if path.suffix == ".svg" else {}))
    plt.close(figure)
