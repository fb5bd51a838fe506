"""record.py check: everything about a record that a program can judge, each finding with its place and its remedy.

A check is a function of a Record that yields Findings, or a Skip that names what it could not judge. Each fault is one
check's alone: where one check has spoken, another does not repeat it. Folders of the public challenge are read too,
with their drifting names; of them a check asks only what their format can answer.
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
from record_folder import Finding, Record, Skip, open_record
from record_pack import TABLE, computed, results_table
from record_read import ROOT, UserError
from record_schema import schema_errors

LEAK_SHARE = 1e-3  # of the validation tokens; a few documents repeat in any large crawl
JUDGED_ELSEWHERE = {"val_loss", "val_bpb", "val_bpb_std", "bytes_total", "bytes_code", "seeds", "seed_results"}
BOARD_FILES = ("records/README.md", "records/board/")  # generated, and part of a record's pull request


def check_files(record: Record) -> Iterator[Finding | Skip]:
    names = {path.relative_to(record.folder).as_posix().lower() for path in record.folder.rglob("*") if path.is_file()}
    wanted = ["README.md", "submission.json"]
    wanted += ["config.env", *record.sources] if record.ours else []
    for name in wanted:
        if name.lower() not in names:
            yield Finding("files", name, "is missing", "add it: `record.py new` writes every file from the run folders")
    if not record.ours and not any(record.folder.glob("*train*.py")):
        yield Finding("files", "train_gpt.py", "is missing", "add the script that made the score")
    if not record.runs:
        yield Finding("files", "*.log", "no training log", "add the log of every seed")
    for run in record.runs if record.ours else []:
        metrics = run.metrics_path.name if run.metrics_path and not run.metrics_path.is_file() else None
        for name in filter(None, [None if run.log else f"train_seed{run.seed}.log", metrics]):
            yield Finding("files", name, "is missing", "add it from the run folder of that seed")


def check_schema(record: Record) -> Iterator[Finding | Skip]:
    if record.unreadable:
        yield Finding("schema", "submission.json", record.unreadable, "write it anew with `record.py new`")
    elif record.claim:
        for where, problem in schema_errors(record.plain, record.ours):
            yield Finding("schema", f"submission.json: {where}", problem, "records/README.md lists the fields")
        if record.ours and record.plain.get("track") not in (None, record.folder.parent.name):
            yield Finding(
                "schema",
                "submission.json: track",
                f"is {record.plain['track']!r}, the folder is in {record.folder.parent.name}",
                "put the folder where it says, or write it anew",
            )


def check_readme(record: Record) -> Iterator[Finding | Skip]:
    """The generated table of the README is that of the runs."""
    path = record.folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if not record.ours or TABLE not in text or record.contradicted:
        yield Skip("no generated table of results, or a log and its result.json contradict each other")
    elif results_table(list(record.scored().values())) not in text:
        yield Finding(
            "readme", "README.md", "its table of results is not that of the runs", "generate it again: `record.py new`"
        )


def check_claims(record: Record) -> Iterator[Finding | Skip]:
    """Everything else that submission.json computes from the runs, computed again."""
    runs = sorted(record.scored().values(), key=lambda run: run.seed)
    seeds = [run.seed for run in runs]
    if not record.ours or record.contradicted or seeds != record.plain.get("seeds") or len(runs) < len(record.runs):
        yield Skip("not written by `record.py new`, of other seeds, or a log and its result.json contradict each other")
        return
    if any(schema_errors(record.plain, record.ours)):
        yield Skip("submission.json has fields of another kind")
        return
    fresh = computed(runs)
    pairs = [(key, record.plain.get(key), value) for key, value in fresh.items() if key not in JUDGED_ELSEWHERE]
    for seed, row in fresh["seed_results"].items():
        stated = (record.plain.get("seed_results") or {}).get(seed) or {}
        pairs += [
            (f"seed_results.{seed}.{key}", stated.get(key), value)
            for key, value in row.items()
            if key not in JUDGED_ELSEWHERE
        ]
    for key, stated, value in pairs:
        same = math.isclose(stated, value, rel_tol=1e-6) if isinstance(stated, float | int) else stated in (value, None)
        if not same:
            yield Finding(
                "claims",
                f"submission.json: {key}",
                f"says {stated}, the runs say {value}",
                "copy no number by hand: `record.py new` computes all of them",
            )


def check_leak(record: Record) -> Iterator[Finding | Skip]:
    """No validation document is also a training document, where the data is at hand."""
    folder = ROOT / record.config.get("DATA_PATH", "unknown")
    scored = {run.result.get("sha256_val_tokens") for run in record.runs if run.result}
    if not record_data.shards(folder, "val") or not record_data.shards(folder, "train"):
        told = record.manifest.get("dropped", {}).get("duplicates_of_validation")
        said = "" if told is None else f"; its manifest says that {told} duplicates of validation were dropped"
        yield Skip(f"the data is not here: DATA_PATH={record.config.get('DATA_PATH', 'unknown')}{said}")
    elif scored != {record_data.hash_tokens(folder, "val")}:
        yield Skip(f"{folder} holds another validation text than the one that was scored")
    else:
        count, documents, share = record_data.leaked(folder, record_data.start_token(folder))
        if share > LEAK_SHARE:
            yield Finding(
                "leak",
                "DATA_PATH",
                f"{count} of {documents} validation documents ({share:.2%} of the "
                "tokens) are also in the training shards",
                "split the text again, and train again",
            )


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
# What no file of a record can show: `record.py rescore` runs the artifact for these.
NEEDS_RESCORE = ("causality", "normalisation", "each target once", "evaluation without training data")


def unreadable(folder: Path, error: UserError | OSError) -> Finding:
    """A file that no check can read, as a finding."""
    if isinstance(error, OSError):
        place, problem, remedy = str(error.filename), f"cannot be read ({error.strerror})", ""
    else:
        place, problem, remedy = "the folder", *str(error).rpartition(": ")[::2]
    problem = problem.replace(f"{folder}/", "")
    return Finding("files", place.removeprefix(f"{folder}/"), problem, remedy or "take the file that the run wrote")


def examine(folder: Path) -> dict:
    """{findings, passed, not_checked} of one record."""
    findings, passed, skipped = [], [], {}
    try:
        record = open_record(folder)
    except UserError as error:
        if not folder.is_dir():
            raise
        findings, checks = [unreadable(folder, error)], {}
        skipped = dict.fromkeys(CHECKS, "a file cannot be read")
    else:
        checks = CHECKS
    for name, check in checks.items():
        try:
            answers = list(check(record))
        except (UserError, OSError) as error:
            answers = [unreadable(folder, error)]
        found = [answer for answer in answers if isinstance(answer, Finding)]
        skips = [answer.why for answer in answers if isinstance(answer, Skip)]
        findings += found
        if skips:
            skipped[name] = "; ".join(dict.fromkeys(skips))
        elif not found:
            passed.append(name)
    skipped |= dict.fromkeys(NEEDS_RESCORE, "run `record.py rescore`")
    findings = [asdict(finding) for finding in dict.fromkeys(findings)]  # two checks may want the same file
    return {"folder": str(folder), "findings": findings, "passed": passed, "not_checked": skipped}


def git(root: Path, *words: str) -> str:
    try:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().partition("\n")[0]
        raise UserError(f"git {' '.join(words)} failed: {said}: give a commit or branch that is here") from error


def against_base(root: Path, base: str) -> tuple[list[Path], list[Finding]]:
    """(record folders that a pull request touches, what is wrong with the set of its files).

    A change without any record is an ordinary one, and free; a record brings one new folder, and the board."""
    changed = [
        line.split("\t") for line in git(root, "diff", "--name-status", "--no-renames", f"{base}...HEAD").splitlines()
    ]
    parts = {name: Path(name).parts for _, name in changed}
    folders = sorted({Path(*p[:3]) for p in parts.values() if len(p) > 3 and p[0] == "records" and "track_" in p[1]})
    if not folders:
        return [], []
    findings = []
    if len(folders) > 1:
        findings.append(
            Finding(
                "scope", ", ".join(map(str, folders)), "more than one record folder", "one pull request for each record"
            )
        )
    outside = [name for name, p in parts.items() if Path(*p[:3]) not in folders and not name.startswith(BOARD_FILES)]
    if outside:
        findings.append(
            Finding(
                "scope",
                ", ".join(outside[:5]),
                f"{len(outside)} files outside the record folder",
                "leave them out, or propose them in a pull request of their own",
            )
        )
    old = [name for status, name in changed if status != "A" and Path(*parts[name][:3]) in folders]
    if old:
        findings.append(
            Finding(
                "scope",
                ", ".join(old[:5]),
                "changes a record that is there already",
                "make a new folder; a dispute goes through an issue",
            )
        )
    return [root / folder for folder in folders if (root / folder).is_dir()], findings


def all_records(records: Path) -> list[Path]:
    """The record folders of all tracks."""
    if not records.is_dir():
        raise UserError(f"there is no {records}: give a checkout of the repository, or its folder of records")
    return sorted(path for path in records.glob("track_*/*") if path.is_dir())


def show(report: dict) -> str:
    counts = f"{len(report['findings'])} findings, {len(report['passed'])} checks passed"
    lines = [f"{report['folder']}: {counts}, {len(report['not_checked'])} not checked"]
    lines += [f"  {f['check']}: {f['place']}: {f['problem']}\n    remedy: {f['remedy']}" for f in report["findings"]]
    lines += [f"  not checked: {name}: {why}" for name, why in report["not_checked"].items()]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="records/<track>/<date>_<slug>")
    parser.add_argument("--all", action="store_true", help="every record of this repository")
    parser.add_argument("--base", metavar="GITREF", help="what a pull request against this commit adds, and where")
    parser.add_argument("--json", action="store_true", help="the reports as JSON")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout, for --all and --base")


def main(arguments: argparse.Namespace) -> int:
    """The exit code: 1 if there are findings."""
    if not (arguments.folders or arguments.all or arguments.base):
        raise UserError("nothing to check: give a record folder, --all, or --base GITREF")
    folders, scope = list(arguments.folders), []
    if arguments.base:
        touched, scope = against_base(arguments.root, arguments.base)
        folders += touched
    folders += all_records(arguments.root / "records") if arguments.all else []
    reports = [examine(folder) for folder in folders]
    if scope:
        reports.append(
            {
                "folder": f"changes since {arguments.base}",
                "findings": [asdict(f) for f in scope],
                "passed": [],
                "not_checked": {},
            }
        )
    if arguments.json:
        print(json.dumps(reports, indent=1))
    else:
        print("\n".join(map(show, reports)) or "no record here to check")
    return 1 if any(report["findings"] for report in reports) else 0
