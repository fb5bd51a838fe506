"""record.py rescore FOLDER: the verdict on a record's score, by running its own script on its own artifact.

The record's code runs in two processes that are isolated from each other, from the network and from the data. One
scores the text; the other, which has no text, must give the same losses at places that are drawn afterwards. See
record_judge.py. The rules:

    bytes           the text is the one that the run scored, and it has the bytes that its score was divided by
    score           the artifact has the score of its result.json, and it is the mean of the losses of all targets
    coverage        every target is scored once, as the token that the text has there
    inputs          the model reads the text, and its weights at the first batch are those of the artifact
    normalization   at every place the probabilities of all tokens sum to 1
    blind           the claimed losses are those of the blind distributions: no future, no hidden text, no changed loss

Exit code: 0 if every rule holds, 1 if one is broken, 2 if there is no verdict, for example because the record's code
cannot be isolated on this machine.
"""

import argparse
import json
import math
import secrets
import tempfile
from dataclasses import asdict
from pathlib import Path

import isolation
import numpy as np
import record_data
import record_judge
from record_check import show
from record_folder import Finding, Record, open_record, sha256
from record_read import ROOT, Run, read_run

import train_gpt
from train_gpt import UserError, require

PLACES = 256
SAME = 1e-8  # tolerance in BPB: the same device, ranks, kernels and torch repeat every digit
# Tolerance in BPB on other hardware or kernels in the same dtype. Another machine with the same kernels differed by
# 1.2e-5. In bf16, an older record without the kernels of its time differed by 1.5e-4.
ELSEWHERE = {"torch.float32": 1e-4, "torch.bfloat16": 5e-4}
MEAN = 1e-5  # tolerance in nats of the mean of the losses, which the script sums in fp32 for each batch


class Verdict:
    """What holds with its numbers, what is broken, and what could not be checked."""

    def __init__(self, artifact: Path):
        self.artifact = artifact
        self.findings: list[Finding] = []
        self.held: dict[str, str] = {}
        self.skipped: dict[str, str] = {}

    def rule(self, name: str, holds: bool, told: str, remedy: str):
        if holds:
            self.held[name] = told
        else:
            self.findings.append(Finding(name, self.artifact.name, told, remedy))


def judge_score(verdict: Verdict, run: Run | None, claim: record_judge.Claim, text_bytes: int):
    answer = claim.answer
    losses = claim.losses.astype(np.float64)
    if run is None:
        verdict.skipped["score"] = "no result.json in the folder is of this artifact"
        return
    same = run.result["world_size"] == 1 and all(
        run.result.get(name) == answer[name] for name in ("device", "torch", "dtype", "note")
    )
    slack = SAME if same else ELSEWHERE.get(answer["dtype"], ELSEWHERE["torch.bfloat16"])
    mean = float(losses.mean())
    bpb = float(losses.sum()) / math.log(2) / text_bytes
    told = (
        f"{answer['val_bpb']:.8f} BPB, {run.name} says {run.val_bpb:.8f}; tolerance {slack:g} on "
        f"{'the same' if same else 'other'} hardware or kernels. Mean of the losses: {mean:.8f} nats, {bpb:.8f} BPB"
    )
    holds = abs(answer["val_bpb"] - run.val_bpb) <= slack and abs(mean - answer["val_loss"]) <= MEAN
    holds = holds and abs(bpb - answer["val_bpb"]) <= MEAN
    verdict.rule("score", holds, told, "ship the artifact and script of one run")


def judge_coverage(verdict: Verdict, claim: record_judge.Claim):
    answer = claim.answer
    missing = int(np.isnan(claim.losses).sum())
    told = (
        f"{len(claim.losses) - missing} of {len(claim.losses)} targets were scored, {answer['twice']} more than once, "
        f"{answer['wrong_targets']} with another token"
    )
    exact = not (missing or answer["twice"] or answer["wrong_targets"])
    verdict.rule("coverage", exact, told, "score every target of the text once")
    told = f"{answer['wrong_inputs']} inputs were not the text"
    told += "" if answer["weights"] else "; the weights at the first batch were not those of the artifact"
    remedy = "an evaluation reads the text and starts with the weights of the artifact"
    verdict.rule("inputs", not answer["wrong_inputs"] and answer["weights"], told, remedy)


def judge_blind(verdict: Verdict, claim: record_judge.Claim, blind: record_judge.Blind):
    if not len(blind.places):
        verdict.skipped |= dict.fromkeys(("normalization", "blind"), "; ".join(blind.notes) or "no place was reached")
        return
    distance = np.abs(blind.sums - 1)
    odd = blind.sums[np.argmax(np.where(np.isfinite(distance), distance, np.inf))]
    told = f"probabilities sum to {odd:.6f} where they are furthest from 1, of {len(blind.sums)} places"
    remedy = "a score must be the logarithm of a distribution over the vocabulary"
    verdict.rule("normalization", abs(odd - 1) <= record_judge.SUM_LIMIT, told, remedy)
    comparison = record_judge.compare(claim, blind)
    remedy = "a loss may depend on the artifact and on the tokens before its target, and on nothing else"
    verdict.rule("blind", comparison.holds, f"{comparison} (seed {blind.seed})", remedy)
    if blind.notes:
        verdict.skipped["blind, the rest of the text"] = "; ".join(blind.notes)


def hidden_folders(record: Record, data: Path, folder: Path) -> list[Path]:
    """Where text could be: the data at hand, the repository's, and the other runs."""
    root = folder.resolve()
    found = [data, data.parent, ROOT / "data", ROOT / "logs", ROOT / "records", record.folder]
    return [
        path for path in dict.fromkeys(p.resolve() for p in found) if path.is_dir() and not root.is_relative_to(path)
    ]


def counted_files(record: Record) -> dict[str, Path]:
    """{name: path} of what the record's code consists of, and config.env."""
    names = [*record.sources, "config.env"]
    missing = [name for name in names if not (record.folder / name).is_file()]
    require(
        not missing, f"{record.folder} has no {', '.join(missing)}: only whole records and runs can be scored again"
    )
    return {name: record.folder / name for name in names}


def examine(record: Record, artifact: Path, data: Path, tokenizer: str, arguments) -> tuple[Verdict, dict]:
    files = counted_files(record)
    require(any(data.glob("fineweb_val_*.bin")), f"{data} holds no validation shards: give --data FOLDER")
    shards = record_data.shards(data, "val")
    verdict = Verdict(artifact)
    digest = sha256(artifact)
    run = next((run for run in record.runs if run.result and run.result.get("sha256_artifact") == digest), None)
    vocab_size = int(record.config.get("VOCAB_SIZE", train_gpt.Config().vocab_size))
    stream = train_gpt.TokenStream(str(data), "val", vocab_size)
    tokens = stream.read(0, len(stream))
    text_bytes = train_gpt.TokenBytes(tokenizer, vocab_size, padding=2**16).count(tokens)
    if run:
        scored = run.result.get("scored_bytes"), run.result.get("sha256_val_tokens")
        here = text_bytes, record_data.hash_tokens(data, "val")
        told = f"the text has {text_bytes} bytes; {run.name} divided by {scored[0]}"
        told += "" if scored[1] in (None, here[1]) else ", and scored another text than the one at hand"
        verdict.rule("bytes", scored[0] == here[0] and scored[1] in (None, here[1]), told, "give --data with its text")
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / role for role in ("claim", "blind")]
        hidden = hidden_folders(record, data, folders[0])
        options = record_judge.make_box(folders[0], files, artifact, tokenizer)
        manifest = [*data.glob("manifest.json")]
        claim = record_judge.run_claim(folders[0], options, [*shards, *manifest], hidden, arguments.timeout)
        require(
            len(claim.losses) == len(tokens) - 1, f"the script scored {len(claim.losses)} of {len(tokens) - 1} targets"
        )
        judge_score(verdict, run, claim, text_bytes)
        judge_coverage(verdict, claim)
        measured = {"claim": claim.answer, "isolation": claim.isolation}
        if claim.answer["observe_every"] is None:
            why = "this script is older than the interface for models that learn while they are scored"
            verdict.skipped |= dict.fromkeys(("normalization", "blind"), why)
            return verdict, measured
        seed = secrets.randbits(32) if arguments.seed is None else arguments.seed  # drawn after the claim was stored
        options = record_judge.make_box(folders[1], files, artifact, tokenizer)
        limits = arguments.places, hidden, arguments.timeout, arguments.seconds
        blind = record_judge.run_blind(folders[1], options, claim, tokens, seed, *limits)
        judge_blind(verdict, claim, blind)
        measured["blind"] = {"seed": seed, "places": len(blind.places), "reached": blind.reached}
    return verdict, measured


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a record with its artifact, or a run folder")
    parser.add_argument("--artifact", type=Path, help="where it is, if not in the folder")
    parser.add_argument("--data", type=Path, help="folder of the shards; default: DATA_PATH of config.env")
    parser.add_argument("--tokenizer", help="default: TOKENIZER_PATH of config.env")
    parser.add_argument("--places", type=int, default=PLACES, help=f"places at which losses are compared ({PLACES})")
    parser.add_argument("--seed", type=int, help="draw the places of an earlier verdict again")
    parser.add_argument("--seconds", type=float, default=math.inf, help="limit of the blind process; default: none")
    parser.add_argument(
        "--timeout", type=float, help="seconds that the claim and each answer may take; default: no limit"
    )
    parser.add_argument("--json", action="store_true", help="the report as JSON")


def main(arguments: argparse.Namespace) -> int:
    """The exit code: 1 if a rule is broken."""
    record = open_record(arguments.folder)
    if (record.folder / "train.log").is_file() and not record.ours:  # a run folder
        record = Record(record.folder, [read_run(record.folder)])
    if not record.ours:
        raise UserError(
            f"{record.folder} holds no result.json: only records and runs of train_gpt.py can be scored again; those "
            "of other scripts are read by `record.py check`"
        )
    artifacts = [arguments.artifact] if arguments.artifact else sorted(record.folder.glob("final_model.*.ptz"))
    if not artifacts or not artifacts[0].is_file():
        raise UserError(f"{record.folder} has no final_model.*.ptz: give --artifact FILE, or pack with --artifact")
    data = arguments.data or ROOT / record.config.get("DATA_PATH", "")
    tokenizer = arguments.tokenizer or record.config.get("TOKENIZER_PATH", "")
    tokenizer = str((ROOT / tokenizer).resolve()) if (ROOT / tokenizer).is_file() else tokenizer
    require(arguments.places > 0, f"--places {arguments.places}: expected at least 1")
    why = "this user has neither namespaces nor Landlock (Linux 5.13): use another machine"
    require(isolation.available(), f"the record's code cannot be isolated here, so it is not run: {why}")
    verdict, measured = examine(record, artifacts[0], data, tokenizer, arguments)
    report = {
        "folder": str(record.folder),
        "findings": [asdict(finding) for finding in verdict.findings],
        "passed": list(verdict.held),
        "not_checked": verdict.skipped,
    }
    if arguments.json:
        print(json.dumps(report | {"numbers": verdict.held, "measured": measured}, indent=1))
    else:
        print(show(report), *(f"  {name}: {told}" for name, told in verdict.held.items()), sep="\n")
        print(f"  isolation: {measured['isolation']}")
    return 1 if verdict.findings else 0
