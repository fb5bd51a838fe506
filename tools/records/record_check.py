"""record.py check: run all automatic checks on a record. Each finding has a location and a fix.

A check is a function that takes a Record and yields Faults, or a Skip with the reason why it could not run. Each fault
is reported by exactly one check. Folders of the public challenge work too, despite their varying field names; they are
checked only for what their format provides.
"""

import argparse
import json
import math
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import record_code
import record_data
import record_scores
from record_folder import Fault, Finding, Record, Skip, all_records, open_record
from record_read import ROOT
from record_results import TABLE, computed, results_table
from record_schema import schema_errors

from train_gpt import UserError, require

LEAK_SHARE = 1e-3  # of validation tokens; any large crawl has a few duplicate documents
JUDGED_ELSEWHERE = {"val_loss", "val_bpb", "val_bpb_std", "bytes_total", "bytes_code", "seeds", "seed_results"}
BOARD_FILES = ("records/README.md", "records/board/")  # generated, and part of a record's pull request


def check_files(record: Record) -> Iterator[Fault | Skip]:
    names = {path.relative_to(record.folder).as_posix().lower() for path in record.folder.rglob("*") if path.is_file()}
    wanted = ["README.md", "submission.json"]
    wanted += ["config.env", *record.sources] if record.ours else []
    for name in wanted:
        if name.lower() not in names:
            yield Fault(name, "is missing", "add it: `record.py new` writes every file from the run folders")
    if not record.ours and not any(record.folder.glob("*train*.py")):
        yield Fault("train_gpt.py", "is missing", "add the script that made the score")
    if not record.runs:
        yield Fault("*.log", "no training log", "add the log of every seed")
    for run in record.runs if record.ours else []:
        metrics = run.metrics_path.name if run.metrics_path and not run.metrics_path.is_file() else None
        for name in filter(None, [None if run.log else f"train_seed{run.seed}.log", metrics]):
            yield Fault(name, "is missing", "add it from the run folder of that seed")


def check_schema(record: Record) -> Iterator[Fault | Skip]:
    if record.unreadable:
        yield Fault("submission.json", record.unreadable, "regenerate it with `record.py new`")
    elif record.claim:
        for where, problem in schema_errors(record.plain, record.ours):
            yield Fault(f"submission.json: {where}", problem, "records/README.md lists the fields")
        track, folder = record.plain.get("track"), record.folder.parent.name
        if record.ours and track not in (None, folder):
            problem = f"is {track!r}, the folder is in {folder}"
            yield Fault("submission.json: track", problem, "move the folder to that track, or regenerate it")


def check_readme(record: Record) -> Iterator[Fault | Skip]:
    """Check that the generated table in the README matches the runs."""
    path = record.folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if not record.ours or TABLE not in text or record.contradicted:
        yield Skip("no generated table of results, or a log and its result.json contradict each other")
    elif results_table(list(record.scored().values())) not in text:
        yield Fault("README.md", "its results table does not match the runs", "regenerate it with `record.py new`")


def check_claims(record: Record) -> Iterator[Fault | Skip]:
    """Recompute all other fields of submission.json that derive from the runs, and compare."""
    runs = sorted(record.scored().values(), key=lambda run: run.seed)
    seeds = [run.seed for run in runs]
    if not record.ours or record.contradicted or seeds != record.plain.get("seeds") or len(runs) < len(record.runs):
        yield Skip("not written by `record.py new`, of other seeds, or a log and its result.json contradict each other")
        return
    if any(schema_errors(record.plain, record.ours)):
        yield Skip("submission.json has fields of another kind")
        return
    fresh = computed(runs)
    rows = [("", record.plain, fresh)]
    for seed, row in fresh["seed_results"].items():
        rows.append((f"seed_results.{seed}.", (record.plain.get("seed_results") or {}).get(seed) or {}, row))
    for prefix, stated, row in rows:
        for key in [key for key in row if key not in JUDGED_ELSEWHERE]:
            said, value = stated.get(key), row[key]
            if isinstance(said, float | int):
                same = math.isclose(said, value, rel_tol=1e-6)
            else:
                same = said in (value, None)
            if not same:
                place, problem = f"submission.json: {prefix}{key}", f"says {said}, the runs say {value}"
                yield Fault(place, problem, record_scores.COMPUTED)


def check_leak(record: Record) -> Iterator[Fault | Skip]:
    """Check that the training shards contain no validation documents. Skipped if the data is not available locally."""
    folder = ROOT / record.config.get("DATA_PATH", "unknown")
    try:
        for split in ("train", "val"):
            record_data.shards(folder, split)
    except UserError as error:
        told = record.manifest.get("dropped", {}).get("duplicates_of_validation")
        said = "" if told is None else f"; its manifest says that {told} duplicates of validation were dropped"
        yield Skip(f"the data is missing or incomplete: {str(error).partition(';')[0]}{said}")
        return
    if {result.get("sha256_val_tokens") for result in record.results} != {record_data.hash_tokens(folder, "val")}:
        yield Skip(f"{folder} holds a different validation set from the one that was scored")
        return
    count, documents, share = record_data.leaked(folder, record_data.start_token(folder))
    if share > LEAK_SHARE:
        found = f"{count} of {documents} validation documents ({share:.2%} of the tokens)"
        problem = f"{found} are also in the training shards"
        yield Fault("DATA_PATH", problem, "split the data again and retrain")


CHECKS = {
    "files": check_files,
    "schema": check_schema,
    "seeds": record_scores.check_seeds,
    "score": record_scores.check_score,
    "claims": check_claims,
    "script": record_code.check_script,
    "code": record_code.check_code,
    "artifact": record_code.check_artifact,
    "size": record_code.check_size,
    "config": record_code.check_config,
    "clock": record_scores.check_clock,
    "validation": record_scores.check_validation,
    "bytes": record_scores.check_bytes,
    "tokenizer": record_code.check_tokenizer,
    "leak": check_leak,
    "compile": record_code.check_compile,
    "readme": check_readme,
    "significance": record_scores.check_significance,
}
# Rules that cannot be checked from a record's files alone: `record.py rescore` runs the artifact to test them.
NEEDS_RESCORE = ("causality", "normalisation", "each target once", "evaluation without training data")


def unreadable(folder: Path, error: UserError | OSError) -> Finding:
    """Turn an error from reading a file into a finding."""
    if isinstance(error, OSError):
        place, problem, remedy = str(error.filename), f"cannot be read ({error.strerror})", ""
    else:
        place, problem, remedy = "the folder", *str(error).rpartition(": ")[::2]
    problem = problem.replace(f"{folder}/", "")
    return Finding("files", place.removeprefix(f"{folder}/"), problem, remedy or "take the file that the run wrote")


def examine(folder: Path) -> dict:
    """Run all checks on one record. Returns {findings, passed, not_checked}."""
    findings, passed, skipped, checks = [], [], {}, CHECKS
    try:
        record = open_record(folder)
    except UserError as error:
        if not folder.is_dir():
            raise
        findings, checks = [unreadable(folder, error)], {}
        skipped = dict.fromkeys(CHECKS, "a file cannot be read")
    for name, check in checks.items():
        found, skips = [], []
        try:
            for answer in check(record):
                if isinstance(answer, Skip):
                    skips.append(answer.why)
                else:
                    found.append(Finding(name, *answer))
        except (UserError, OSError) as error:
            found, skips = [unreadable(folder, error)], []
        findings += found
        if skips:
            skipped[name] = "; ".join(dict.fromkeys(skips))
        elif not found:
            passed.append(name)
    skipped |= dict.fromkeys(NEEDS_RESCORE, "run `record.py rescore`")
    findings = [asdict(finding) for finding in dict.fromkeys(findings)]  # two checks may need the same file
    return {"folder": str(folder), "findings": findings, "passed": passed, "not_checked": skipped}


def git(root: Path, *words: str) -> str:
    try:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().partition("\n")[0]
        raise UserError(f"git {' '.join(words)} failed: {said}: give a commit or branch that is here") from error


def against_base(root: Path, base: str) -> tuple[list[Path], list[Finding]]:
    """Return (record folders that a pull request touches, findings about its set of changed files).

    A pull request that touches no record is not restricted. One with a record may only add a single new record folder
    and update the board."""
    lines = git(root, "diff", "--name-status", "--no-renames", f"{base}...HEAD").splitlines()
    changed = [line.split("\t") for line in lines]
    parts = {name: Path(name).parts for _, name in changed}
    folders = sorted({Path(*p[:3]) for p in parts.values() if len(p) > 3 and p[0] == "records" and "track_" in p[1]})
    if not folders:
        return [], []
    findings = []

    def add(names: list, problem: str, remedy: str):
        findings.append(Finding("scope", ", ".join(map(str, names)), problem, remedy))

    if len(folders) > 1:
        add(folders, "more than one record folder", "one pull request for each record")
    outside = [name for name, p in parts.items() if Path(*p[:3]) not in folders and not name.startswith(BOARD_FILES)]
    if outside:
        remedy = "move them to a separate pull request"
        add(outside[:5], f"{len(outside)} files outside the record folder", remedy)
    old = [name for status, name in changed if status != "A" and Path(*parts[name][:3]) in folders]
    if old:
        remedy = "make a new folder; a dispute goes through an issue"
        add(old[:5], "changes a record that is there already", remedy)
    return [root / folder for folder in folders if (root / folder).is_dir()], findings


def show(report: dict) -> str:
    counts = f"{len(report['findings'])} findings, {len(report['passed'])} checks passed"
    lines = [f"{report['folder']}: {counts}, {len(report['not_checked'])} not checked"]
    lines += [f"  {f['check']}: {f['place']}: {f['problem']}\n    remedy: {f['remedy']}" for f in report["findings"]]
    lines += [f"  not checked: {name}: {why}" for name, why in report["not_checked"].items()]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="records/<track>/<date>_<slug>")
    parser.add_argument("--all", action="store_true", help="every record of this repository")
    parser.add_argument("--base", metavar="GITREF", help="check the records that a pull request against GITREF adds")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout for --all and --base; default: this one")


def main(arguments: argparse.Namespace) -> int:
    """Return the exit code: 1 if there are findings."""
    given = arguments.folders or arguments.all or arguments.base
    require(given, "nothing to check: give a record folder, --all, or --base GITREF")
    folders, scope = list(arguments.folders), []
    if arguments.base:
        touched, scope = against_base(arguments.root, arguments.base)
        folders += touched
    folders += all_records(arguments.root / "records") if arguments.all else []
    reports = [examine(folder) for folder in folders]
    if scope:
        report = {"folder": f"changes since {arguments.base}", "findings": [asdict(finding) for finding in scope]}
        reports.append(report | {"passed": [], "not_checked": {}})
    if arguments.json:
        print(json.dumps(reports, indent=1))
    else:
        print("\n".join(map(show, reports)) or "no record here to check")
    return 1 if any(report["findings"] for report in reports) else 0
