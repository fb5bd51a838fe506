"""record.py new: build a record folder from run folders, one per seed. All numbers are computed from the runs."""

import argparse
import datetime
import difflib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from record_check import examine, show
from record_read import ROOT, Run, read_run, sources_of
from record_results import computed, results_table

from train_gpt import UserError, read_env_file, require

DIFF_LINES = 200  # maximum lines of code diff in a README
COPIED = {  # files copied from each run: {name in the run folder: name in the record}
    "train.log": "train_seed{}.log",
    "metrics.jsonl": "metrics_seed{}.jsonl",
    "result.json": "result_seed{}.json",
}


def read_runs(folders: list[Path]) -> dict[Path, Run]:
    """Return {folder: finished run}, sorted by seed. Raises UserError if the runs cannot form one record: they must be
    finished, use the same code and have different seeds."""
    for folder in folders:
        missing = [name for name in (*COPIED, "config.env") if not (folder / name).is_file()]
        wanted = "expected a finished run's folder, logs/<run_id>"
        require(not missing, f"{folder} has no {', '.join(missing)}: {wanted}")
    runs = [read_run(folder) for folder in folders]
    seeds, sources = [run.seed for run in runs], sources_of(runs[0].result)
    require(len(set(seeds)) == len(seeds), f"seeds {seeds}: each seed once: leave out the folders that repeat one")
    for run, folder in zip(runs, folders, strict=True):
        require(not run.partial, f"{folder} scored a part of the validation text: run with VAL_TOKENS_LIMIT=0")
        same = sources_of(run.result) == sources
        require(same, f"{folder} ran other code than {folders[0]}: a record is of one script")
        for name in sources:
            remedy = "which its result.json names: copy it from where it ran"
            require((folder / name).is_file(), f"{folder} has no {name}, {remedy}")
    return dict(sorted(zip(folders, runs, strict=True), key=lambda pair: pair[1].seed))


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
    """Return (knob, old value, new value) relative to the record `base`; without one, the non-default knobs."""
    passing = {"SEED", "LOG_DIR", "DATA_PATH", "TOKENIZER_PATH"}
    if base:
        theirs = read_env_file(base / "config.env") if (base / "config.env").is_file() else {}
        names = sorted({n for n in config.keys() | theirs.keys() if config.get(n) != theirs.get(n)} - passing)
        return [(name, theirs.get(name, "unset"), config.get(name, "unset")) for name in names]
    return [(name, "the default", config.get(name, "")) for name in sorted(run.log.changed - passing)]


def script_changes(folder: Path, names: list[str], base: Path) -> tuple[str, list[str]]:
    """Return a one-line summary and the unified diff of the sources against those of a record or the repository.

    A record folder is flat. In the repository, a source file is the script, a tool or a model file.
    """
    difference = []
    for name in names:
        places = [base / part / name for part in ("", "tools", "records/models")]
        there = next((path for path in places if path.is_file()), places[0])
        texts = [read_lines(path) for path in (there, folder / name)]
        difference += difflib.unified_diff(*texts, f"base/{name}", f"here/{name}", n=1, lineterm="")
    added, removed = (
        sum(line.startswith(sign) and not line.startswith(sign * 3) for line in difference) for sign in "+-"
    )
    return f"{added} lines added, {removed} removed" if difference else "the same", difference


def read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def command(run: Run, folder: Path) -> str:
    """Return the command that reruns a seed from the record folder.

    It runs the script, whose config.env names any model file. Older model files are run directly.
    """
    names = [n for n in sources_of(run.result) if n != "train_gpt.py"]
    models = [n for n in names if "train_gpt.main(" in (folder / n).read_text(encoding="utf-8")]
    ranks = run.result["world_size"]
    launcher = f"torchrun --standalone --nproc_per_node={ranks}" if ranks > 1 else "python"
    return f"{launcher} {models[0] if models else 'train_gpt.py'} config.env"


def readme(runs: list[Run], about: dict, folder: Path, base: Path | None) -> str:
    config, result = read_env_file(folder / "config.env"), runs[0].result
    digest = result.get("sha256_val_tokens", "unknown")
    where = f"the record [{base.name}](../{base.name})" if base else "this repository's script and its defaults"
    line, difference = script_changes(folder, list(sources_of(result)), base or ROOT)
    changes, code = "", ""
    if rows := config_changes(runs[0], config, base):
        changes = f"| knob | {'base' if base else 'before'} | here |\n|---|---|---|\n"
        changes += "".join(f"| `{name}` | {there} | {here} |\n" for name, there, here in rows) + "\n"
    if difference:
        left = len(difference) - DIFF_LINES
        shown = difference[:DIFF_LINES] + ([f"... {left} lines more"] if left > 0 else [])
        code = "\n".join(["<details><summary>Difference of the code</summary>", "", "```diff", *shown])
        code += "\n```\n</details>\n\n"
    seeds = " ".join(str(run.seed) for run in runs)
    return f"""# {about["name"]}

{about["blurb"]}

## Results

{results_table(runs)}

{about["hardware"]}; torch {result["torch"]}, Python {result["python"]}, {result["platform"]}.

## What changed

Against {where}. Code: {line}.

{changes}{code}## Run it again

```
for seed in {seeds}; do SEED=$seed {command(runs[0], folder)}; done
```

Data: `{config.get("DATA_PATH")}`; the tokens of its validation text have sha256 `{digest}`.
"""


def copy_data_manifest(config: dict[str, str], target: Path):
    """Copy the data's manifest if available: it has the byte count of the text and the tokenizer's hash."""
    path = ROOT / config.get("DATA_PATH", "") / "manifest.json"
    if path.is_file():
        shutil.copyfile(path, target / "data_manifest.json")


def build(found: dict[Path, Run], target: Path, arguments: argparse.Namespace, date: str):
    """Write all files of a record into the empty folder `target`."""
    runs, first = list(found.values()), next(iter(found))
    for name in (*sources_of(runs[0].result), "config.env"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(first / name, target / name)
    for folder, run in found.items():
        for name, new in COPIED.items():
            shutil.copyfile(folder / name, target / new.format(run.seed))
    if arguments.artifact:
        best = min(found, key=lambda folder: found[folder].val_bpb)
        file = next(iter(sorted(best.glob("final_model.*.ptz"))), None)
        require(file, f"{best} has no final_model.*.ptz: leave out --artifact, or give the whole run folder")
        shutil.copyfile(file, target / file.name)
    config = read_env_file(target / "config.env")
    copy_data_manifest(config, target)
    changes = config_changes(runs[0], config, arguments.base)
    told = ", ".join(f"{name}={here}" for name, _, here in changes[:12])
    blurb = arguments.blurb or (f"Knobs that differ: {told}." if told else "The same knobs as its base.")
    about = submission(runs, arguments, date, blurb)
    (target / "submission.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    (target / "README.md").write_text(readme(runs, about, target, arguments.base), encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("folders", nargs="+", type=Path, metavar="LOG_FOLDER", help="logs/<run_id>, one per seed")
    parser.add_argument("--track", required=True, help="such as track_10min_16mb: the name sets the limits")
    parser.add_argument("--slug", required=True, help="short name for the folder: letters, digits, - and _")
    parser.add_argument("--author", required=True)
    parser.add_argument("--github-id", required=True)
    parser.add_argument("--name", help="title; default: the slug")
    parser.add_argument("--blurb", help="what is new, in one or two sentences; default: the changed knobs")
    parser.add_argument("--base", type=Path, metavar="RECORD", help="the record in the same track that this one beats")
    parser.add_argument("--artifact", action="store_true", help="include the best seed's artifact, for rescore")
    parser.add_argument("--date", help="YYYY-MM-DD; default: today, UTC")
    parser.add_argument("--records", type=Path, default=ROOT / "records", help="folder that contains the tracks")


def main(arguments: argparse.Namespace) -> int:
    for name in ("author", "github_id"):
        filled = getattr(arguments, name).strip()
        require(filled, f"--{name.replace('_', '-')} is empty: a record names who made it")
    named = re.fullmatch(r"track_\w+", arguments.track) and re.fullmatch(r"[\w-]+", arguments.slug)
    wanted = "expected a name like track_10min_16mb, and letters, digits, - and _"
    require(named, f"--track {arguments.track} --slug {arguments.slug}: {wanted}")
    date = arguments.date or datetime.datetime.now(datetime.UTC).date().isoformat()
    try:
        date = datetime.date.fromisoformat(date).isoformat()
    except ValueError as error:
        raise UserError(f"--date {date}: {error}: expected YYYY-MM-DD") from error
    target = arguments.records / arguments.track / f"{date}_{arguments.slug}"
    require(not target.exists(), f"{target} exists: choose another --slug, or remove it first")
    base = arguments.base
    fits = base is None or base.resolve().parent == target.parent.resolve()
    require(fits, f"--base {base}: expected a record of the same track, in {target.parent}")
    found = read_runs(arguments.folders)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new_") as temporary:
        made = Path(temporary) / target.name
        made.mkdir()
        build(found, made, arguments, date)
        os.replace(made, target)
    report = examine(target)
    print(show(report))
    return 1 if report["findings"] else 0
