"""record.py new: a record folder from run folders, one per seed. Every number is computed, none is typed."""

import argparse
import datetime
import difflib
import json
import os
import re
import shutil
import statistics
import tempfile
from pathlib import Path

from record_read import ROOT, Run, UserError, read_env, read_run, sources_of

TABLE = "<!-- results: generated, do not edit -->"
DIFF_LINES = 200  # of a script's difference that a README shows
NEEDED = ("train.log", "metrics.jsonl", "config.env", "result.json")


def spread(values: list[float], form: str) -> str:
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}"


def results_table(runs: list[Run]) -> str:
    """Markdown: a row for each seed, then means with sample standard deviations. From the runs alone, so that a check
    can make it again."""
    head = ["seed", "val_bpb", "val_loss", "before export", "steps", "ms a step", "training s", "evaluation s", "bytes"]
    rows, runs = [], sorted(runs, key=lambda run: run.seed or 0)
    for run in runs:
        rows.append(
            [
                run.seed,
                f"{run.val_bpb:.5f}",
                f"{run.val_loss:.5f}",
                f"{run.result['pre_quant_val_bpb']:.5f}",
                run.steps,
                f"{run.step_ms:.2f}",
                f"{run.train_seconds:.1f}",
                f"{run.eval_seconds:.1f}",
                f"{run.bytes_total:,}",
            ]
        )
    columns = [("val_bpb", ".5f"), ("val_loss", ".5f")]
    means = [spread([getattr(run, key) for run in runs], form) for key, form in columns]
    means.append(spread([run.result["pre_quant_val_bpb"] for run in runs], ".5f"))
    more = [("steps", ".0f"), ("step_ms", ".2f"), ("train_seconds", ".1f"), ("eval_seconds", ".1f")]
    means += [spread([getattr(run, key) for run in runs], form) for key, form in more]
    rows.append([f"**mean ± std, n = {len(runs)}**", *means, f"{max(run.bytes_total for run in runs):,} at most"])
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([TABLE, "", *("| " + " | ".join(map(str, line)) + " |" for line in lines)])


def read_runs(folders: list[Path]) -> list[Run]:
    """Finished runs that differ in their seed alone; UserError for what cannot be one record."""
    runs = []
    for folder in folders:
        missing = [name for name in NEEDED if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder} has no {', '.join(missing)}: expected a finished run's folder, logs/<run_id>")
        runs.append(read_run(folder))
    first = runs[0]
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds {seeds}: each seed once: leave out the folders that repeat one")
    for run, folder in zip(runs, folders, strict=True):
        if run.partial:
            raise UserError(f"{folder} scored a part of the validation text: run with VAL_TOKENS_LIMIT=0")
        if sources_of(run.result) != sources_of(first.result):
            raise UserError(f"{folder} ran other code than {folders[0]}: a record is of one script")
        for name in sources_of(run.result):
            if not (folder / name).is_file():
                raise UserError(f"{folder} has no {name}, which its result.json names: copy it from where it ran")
    return sorted(runs, key=lambda run: run.seed)


def hardware(run: Run) -> str:
    ranks = run.result["world_size"]
    return f"{ranks} x {run.result['device']}" if ranks > 1 else run.result["device"]


def computed(runs: list[Run]) -> dict:
    """The fields of submission.json that follow from the runs."""
    losses, scores = ([getattr(run, key) for run in runs] for key in ("val_loss", "val_bpb"))
    results = {
        str(run.seed): {
            "val_loss": run.val_loss,
            "val_bpb": run.val_bpb,
            "artifact_bytes": run.result["bytes_artifact"],
            "steps": run.steps,
            "step_avg_ms": run.step_ms,
            "train_time_s": run.train_seconds,
            "eval_time_s": run.eval_seconds,
        }
        for run in runs
    }
    return {
        "val_loss": statistics.fmean(losses),
        "val_bpb": statistics.fmean(scores),
        "val_bpb_std": statistics.stdev(scores) if len(runs) > 1 else None,
        "bytes_total": max(run.bytes_total for run in runs),
        "bytes_code": runs[0].result["bytes_code"],
        "seeds": [run.seed for run in runs],
        "seed_results": results,
        "hardware": hardware(runs[0]),
        "pytorch_version": runs[0].result["torch"],
        "pre_quant_val_bpb": statistics.fmean(run.result["pre_quant_val_bpb"] for run in runs),
        "step_stop": round(statistics.fmean(run.steps for run in runs)),
        "wallclock_seconds": max(run.train_seconds for run in runs),
        "eval_time_seconds": max(run.eval_seconds for run in runs),
    }


def submission(runs: list[Run], arguments: argparse.Namespace, date: str, blurb: str) -> dict:
    about = {
        "author": arguments.author,
        "github_id": arguments.github_id,
        "name": arguments.name or arguments.slug,
        "date": date,
        "track": arguments.track,
        "blurb": blurb,
    }
    return about | computed(runs) | {"base": arguments.base and arguments.base.name}


def config_changes(run: Run, config: dict[str, str], base: Path | None) -> list[tuple[str, str, str]]:
    """(knob, there, here) against the record `base`, or the knobs that the log marks as other than the defaults."""
    passing = {"SEED", "LOG_DIR", "DATA_PATH", "TOKENIZER_PATH"}
    if base:
        theirs = read_env(base / "config.env") if (base / "config.env").is_file() else {}
        names = sorted({n for n in config.keys() | theirs.keys() if config.get(n) != theirs.get(n)} - passing)
        return [(name, theirs.get(name, "unset"), config.get(name, "unset")) for name in names]
    return [(name, "the default", config.get(name, "")) for name in sorted(run.log.changed - passing)]


def script_changes(folder: Path, names: list[str], base: Path) -> tuple[str, list[str]]:
    """One line, and the unified difference, of the sources against those of a record or of a repository.

    A record is flat. In a repository a source is the script, a tool or a model file.
    """
    difference = []
    for name in names:
        places = [base / part / name for part in ("", "tools", "records/models")]
        there = next((path for path in places if path.is_file()), places[0])
        texts = [
            path.read_text(encoding="utf-8").splitlines() if path.is_file() else [] for path in (there, folder / name)
        ]
        difference += difflib.unified_diff(*texts, f"base/{name}", f"here/{name}", n=1, lineterm="")
    added, removed = (
        sum(line.startswith(sign) and not line.startswith(sign * 3) for line in difference) for sign in "+-"
    )
    return f"{added} lines added, {removed} removed" if difference else "the same", difference


def command(run: Run, folder: Path) -> str:
    """The command that runs a seed again from the record folder.

    It starts the script, whose config.env names the model file, or an older model file, which is a program.
    """
    names = [n for n in sources_of(run.result) if n != "train_gpt.py"]
    models = [n for n in names if "train_gpt.main(" in (folder / n).read_text(encoding="utf-8")]
    ranks = run.result["world_size"]
    launcher = f"torchrun --standalone --nproc_per_node={ranks}" if ranks > 1 else "python"
    return f"{launcher} {models[0] if models else 'train_gpt.py'} config.env"


def readme(runs: list[Run], about: dict, folder: Path, base: Path | None) -> str:
    config, names = read_env(folder / "config.env"), list(sources_of(runs[0].result))
    changes = config_changes(runs[0], config, base)
    where = f"the record [{base.name}](../{base.name})" if base else "this repository's script and its defaults"
    line, difference = script_changes(folder, names, base or ROOT)
    versions = runs[0].result
    text = [
        f"# {about['name']}",
        "",
        about["blurb"],
        "",
        "## Results",
        "",
        results_table(runs),
        "",
        f"{about['hardware']}; torch {versions['torch']}, Python {versions['python']}, {versions['platform']}.",
        "",
        "## What changed",
        "",
        f"Against {where}. Code: {line}.",
        "",
    ]
    if changes:
        text += [f"| knob | {'base' if base else 'before'} | here |", "|---|---|---|"]
        text += [f"| `{name}` | {there} | {here} |" for name, there, here in changes] + [""]
    if difference:
        shown = difference[:DIFF_LINES]
        shown += [f"... {len(difference) - DIFF_LINES} lines more"] if len(difference) > DIFF_LINES else []
        text += ["<details><summary>Difference of the code</summary>", "", "```diff", *shown, "```", "</details>", ""]
    seeds = " ".join(str(run.seed) for run in runs)
    loop = f"for seed in {seeds}; do SEED=$seed {command(runs[0], folder)}; done"
    text += [
        "## Run it again",
        "",
        "```",
        loop,
        "```",
        "",
        f"Data: `{config.get('DATA_PATH')}`; the tokens of "
        f"its validation text have sha256 `{versions.get('sha256_val_tokens', 'unknown')}`.",
        "",
    ]
    return "\n".join(text)


def copy_data_manifest(config: dict[str, str], target: Path):
    """The manifest of the data, if it is at hand: it states the true bytes of the text and the tokenizer's hash."""
    path = ROOT / config.get("DATA_PATH", "") / "manifest.json"
    if path.is_file():
        shutil.copyfile(path, target / "data_manifest.json")


def build(folders: list[Path], runs: list[Run], target: Path, arguments: argparse.Namespace, date: str):
    origin = {read_run(folder).seed: folder for folder in folders}
    first = origin[runs[0].seed]
    for name in (*sources_of(runs[0].result), "config.env"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(first / name, target / name)
    for seed, folder in origin.items():
        for name, new in (
            ("train.log", f"train_seed{seed}.log"),
            ("metrics.jsonl", f"metrics_seed{seed}.jsonl"),
            ("result.json", f"result_seed{seed}.json"),
        ):
            shutil.copyfile(folder / name, target / new)
    if arguments.artifact:
        best = origin[min(runs, key=lambda run: run.val_bpb).seed]
        files = sorted(best.glob("final_model.*.ptz"))
        if not files:
            raise UserError(f"{best} has no final_model.*.ptz: leave out --artifact, or give the whole run folder")
        shutil.copyfile(files[0], target / files[0].name)
    config = read_env(target / "config.env")
    copy_data_manifest(config, target)
    changes = config_changes(runs[0], config, arguments.base)
    told = ", ".join(f"{name}={here}" for name, _, here in changes[:12])
    blurb = arguments.blurb or (f"Knobs that differ: {told}." if told else "The same knobs as its base.")
    about = submission(runs, arguments, date, blurb)
    (target / "submission.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    (target / "README.md").write_text(readme(runs, about, target, arguments.base), encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("folders", nargs="+", type=Path, metavar="LOG_FOLDER", help="logs/<run_id>, one per seed")
    parser.add_argument("--track", required=True, help="track_10min_16mb: its name tells the limits")
    parser.add_argument("--slug", required=True, help="a few words for the folder's name: letters, digits, - and _")
    parser.add_argument("--author", required=True)
    parser.add_argument("--github-id", required=True)
    parser.add_argument("--name", help="a title; default: the slug")
    parser.add_argument("--blurb", help="what is new, in a sentence or two; default: the knobs that differ")
    parser.add_argument("--base", type=Path, metavar="RECORD", help="the record of the same track that it beats")
    parser.add_argument("--artifact", action="store_true", help="ship the artifact of the best seed, for rescore")
    parser.add_argument("--date", help="YYYY-MM-DD; default: today, UTC")
    parser.add_argument("--records", type=Path, default=ROOT / "records", help="the folder of the tracks")


def main(arguments: argparse.Namespace) -> int:
    from record_check import examine, show  # late: it makes the results table again

    for name in ("author", "github_id"):
        if not getattr(arguments, name).strip():
            raise UserError(f"--{name.replace('_', '-')} is empty: a record names who made it")
    if not re.fullmatch(r"track_\w+", arguments.track) or not re.fullmatch(r"[\w-]+", arguments.slug):
        raise UserError(
            f"--track {arguments.track} --slug {arguments.slug}: expected a name like track_10min_16mb, "
            "and letters, digits, - and _"
        )
    date = arguments.date or datetime.datetime.now(datetime.UTC).date().isoformat()
    try:
        date = datetime.date.fromisoformat(date).isoformat()
    except ValueError as error:
        raise UserError(f"--date {date}: {error}: expected YYYY-MM-DD") from error
    target = arguments.records / arguments.track / f"{date}_{arguments.slug}"
    if target.exists():
        raise UserError(f"{target} exists: choose another --slug, or remove it first")
    if arguments.base and arguments.base.resolve().parent != target.parent.resolve():
        raise UserError(f"--base {arguments.base}: expected a record of the same track, in {target.parent}")
    runs = read_runs(arguments.folders)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new_") as temporary:
        made = Path(temporary) / target.name
        made.mkdir()
        build(arguments.folders, runs, made, arguments, date)
        os.replace(made, target)
    report = examine(target)
    print(show(report))
    return 1 if report["findings"] else 0
