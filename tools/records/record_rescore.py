"""record.py rescore FOLDER: score the artifact of a record again by its own script, and test the rules on it.

It runs in a process of its own, without a network, with only the validation shards in DATA_PATH, and checks
    - the score;
    - causality: no score changes when the tokens after it are replaced, at 64 places in single windows and at 4 through
      the whole evaluation, so also for a model that learns while it is scored;
    - that the probabilities at 64 places sum to 1 over the vocabulary;
    - that each target is scored once, and that the score is the mean of exactly those;
    - that no training data is read.
It works for any model file. The record's code is executed: use a machine where anyone's code may run.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import record_data
from record_check import show
from record_folder import Finding, Record, open_record, sha256
from record_read import ROOT, read_run

from train_gpt import UserError, require

PLACES = 64
SAME = 1e-8  # tolerance in BPB: the same device, ranks, kernels and torch repeat every digit
ELSEWHERE = 2e-3  # tolerance in BPB of anything else, which rounds differently
MOVED = 1e-6  # nats; without the future nothing changes
SUM = 1e-3  # tolerance of a sum of probabilities, in fp32 over some thousand tokens


def without_network() -> list[str]:
    """A command prefix that gives a process no network, if the system has one. The child refuses it in any case."""
    prefix = ["unshare", "--net", "--map-root-user"]
    tried = shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True, check=False)
    return prefix if tried and tried.returncode == 0 else []


def validation_only(data: Path, folder: Path) -> Path:
    """A data folder with links to the validation shards and the manifest of another."""
    require(any(data.glob("fineweb_val_*.bin")), f"{data} holds no validation shards: give --data FOLDER")
    for path in [*record_data.shards(data, "val"), *data.glob("manifest.json")]:
        (folder / path.name).symlink_to(path.resolve())
    return folder


def probe(record: Record, artifact: Path, data: Path, tokenizer: str, timeout: float | None) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        only = validation_only(data, Path(temporary))
        script = Path(__file__).with_name("record_probe.py")
        places = [record.folder.resolve(), only, tokenizer, artifact.resolve(), PLACES]
        command = [*without_network(), sys.executable, script, *map(str, places)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=timeout, cwd=temporary)
    needs = "it needs train_gpt.py, every other source, config.env and the artifact of one run"
    ended = f"the record's script ended with exit code {done.returncode}, see above"
    require(not done.returncode and done.stdout.strip(), f"{ended}: {needs}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def judge(record: Record, artifact: Path, found: dict) -> tuple[list[Finding], dict[str, str], dict[str, str]]:
    """The findings, what passed with its numbers, and what was not checked."""
    findings, passed, skipped = [], {}, {}

    def answer(check: str, good: bool, told: str, remedy: str):
        if good:
            passed[check] = told
        else:
            findings.append(Finding(check, artifact.name, told, remedy))

    score, digest = found["score"], sha256(artifact)
    run = next((run for run in record.runs if run.result and run.result.get("sha256_artifact") == digest), None)
    if run is None:
        skipped["score"] = "no result.json in the folder is of this artifact"
    else:
        names = ("device", "torch", "dtype", "note")
        same = run.result["world_size"] == 1 and all(run.result.get(name) == found[name] for name in names)
        slack, where = (SAME, "the same") if same else (ELSEWHERE, "other")
        told = f"{score['val_bpb']:.8f} BPB, {run.name} says {run.val_bpb:.8f}; "
        told += f"tolerance {slack:g} on {where} hardware or kernels"
        answer("score", abs(score["val_bpb"] - run.val_bpb) <= slack, told, "ship the artifact and script of one run")
    moved = max([*found["moved"], *found["moved_in_evaluation"]])
    told = f"replacing later tokens moves a loss by {moved:.3g} nats at most, over {len(found['moved'])} places in "
    told += f"windows and {len(found['moved_in_evaluation'])} in the evaluation"
    told += ", which learns" if score["learned"] else ""
    answer("causality", moved <= MOVED, told, "a prediction may depend on the tokens before it alone")
    odd = max(found["sums"], key=lambda total: abs(total - 1))
    told = f"probabilities sum to {odd:.6f} where they are furthest from 1, of {len(found['sums'])} places"
    remedy = "a score must be the logarithm of a distribution over the vocabulary"
    answer("normalisation", abs(odd - 1) <= SUM, told, remedy)
    exact = score["once"] == score["of"] == score["tokens"] and not score["twice"] and not score["wrong"]
    exact = exact and abs(score["summed_loss"] - score["val_loss"]) <= 1e-5
    told = f"{score['once']} of {score['of']} targets were scored once, {score['twice']} more often, "
    told += f"{score['wrong']} with another token; their mean loss is {score['summed_loss']:.6f}, "
    told += f"the score {score['val_loss']:.6f}"
    answer("each target once", exact, told, "score every target of the text once")
    opened, refused, remedy = found["opened"], found["refused"], "an evaluation reads the artifact and the text alone"
    told = f"opened {opened[:3]}" if opened else "opened no training shard"
    answer("evaluation without training data", not opened, told, remedy)
    told = f"tried {refused[:3]}" if refused else "tried no connection"
    answer("evaluation without a network", not refused, told, remedy)
    return findings, passed, skipped


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a record with its artifact, or a run folder")
    parser.add_argument("--artifact", type=Path, help="where it is, if not in the folder")
    parser.add_argument("--data", type=Path, help="folder of the shards; default: DATA_PATH of config.env")
    parser.add_argument("--tokenizer", help="default: TOKENIZER_PATH of config.env")
    parser.add_argument("--timeout", type=float, help="seconds at most")
    parser.add_argument("--json", action="store_true", help="the report as JSON")


def main(arguments: argparse.Namespace) -> int:
    """The exit code: 1 if there are findings."""
    record = open_record(arguments.folder)
    if (record.folder / "train.log").is_file() and not record.ours:  # a run folder
        record = Record(record.folder, [read_run(record.folder)])
    missing = [name for name in ("train_gpt.py", "config.env") if not (record.folder / name).is_file()]
    told = "only records and runs of train_gpt.py can be scored again; those of other scripts are read by"
    require(not missing, f"{record.folder} has no {', '.join(missing)}: {told} `record.py check`")
    artifacts = [arguments.artifact] if arguments.artifact else sorted(record.folder.glob("final_model.*.ptz"))
    found = artifacts and artifacts[0].is_file()
    require(found, f"{record.folder} has no final_model.*.ptz: give --artifact FILE, or pack with --artifact")
    data = arguments.data or ROOT / record.config.get("DATA_PATH", "")
    tokenizer = arguments.tokenizer or record.config.get("TOKENIZER_PATH", "")
    tokenizer = str((ROOT / tokenizer).resolve()) if (ROOT / tokenizer).is_file() else tokenizer
    try:
        found = probe(record, artifacts[0], data, tokenizer, arguments.timeout)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"no answer within {error.timeout:.0f} s: give a longer --timeout") from error
    findings, passed, skipped = judge(record, artifacts[0], found)
    report = {"folder": str(record.folder), "findings": [asdict(finding) for finding in findings]}
    report |= {"passed": list(passed), "not_checked": skipped}
    if arguments.json:
        print(json.dumps(report | {"numbers": passed, "measured": found}, indent=1))
    else:
        print(show(report), *(f"  {name}: {told}" for name, told in passed.items()), sep="\n")
    return 1 if findings else 0
