"""Compare two configurations or scripts in alternating pairs on this machine: speed, size, score, with intervals.

    python tools/experiments/ab.py old.env new.env --pairs 5
    python tools/experiments/ab.py train_gpt.py,a.env other/train_gpt.py --pairs 5   any script with the same log format

A and B run one after the other. A goes first in one pair and B in the next, so that drift in the machine's speed does
not look like a difference. Both runs of a pair use the same seed. The first pair is a warm-up (compiled kernels, file
cache) and is not counted. Ratios are B / A, reported as a geometric mean with a 95% bootstrap interval over the pairs.
Finished runs are kept in the work folder, so an interrupted comparison resumes when the same command is run again.
"""

import argparse
import hashlib
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import launcher  # first: it adds the folders of the other tools to sys.path
import numpy as np
from record_read import Run, read_json
from scipy import stats

from train_gpt import require

FEW = 3  # minimum number of pairs for a bootstrap interval
RESAMPLES = 10_000


@dataclass(frozen=True)
class Measured:
    """Measurements of one run. step_ms is the mean from step 10 on, as early steps are slower. memory_mib is the
    device's peak memory if logged, else the peak memory of the run's largest process."""

    step_ms: float | None
    tokens_per_second: float | None
    memory_mib: float
    val_bpb: float | None
    bytes_total: int | None


def steady_step_ms(run: Run) -> float | None:
    """Return the mean step time from step 10 on, or over the complete run if it is too short."""
    lines = re.findall(r"^step: ?(\d+)/\d+ train_loss.*?train_time: ?(\d+)ms", run.log.text, re.MULTILINE)
    pairs = [(int(step), int(ms)) for step, ms in lines]
    late = [pair for pair in pairs if pair[0] >= 10]
    if len(late) > 1 and late[-1][0] > late[0][0]:
        return (late[-1][1] - late[0][1]) / (late[-1][0] - late[0][0])
    return run.step_ms


def measure(folder: Path, run_id: str, resident_mib: float) -> Measured:
    run = launcher.read_finished(folder, run_id)
    step = steady_step_ms(run)
    device = run.log.last(r"^peak memory allocated: ?(\d+) MiB", float)
    rate = 1000 * run.tokens_per_step / step if step and run.tokens_per_step else None
    return Measured(step, rate, device or resident_mib, run.val_bpb, run.bytes_total)


def run_once(target: launcher.Target, folder: Path, run_id: str, seed: int, ranks: int) -> Measured:
    """Run one side of a pair, or load its saved result. Interrupted runs restart, as partial runs cannot be timed."""
    kept, output = folder / f"{run_id}.json", folder / f"{run_id}.out"
    if kept.is_file():
        return Measured(**read_json(kept))
    process = launcher.start(target, {"SEED": str(seed), "RUN_ID": run_id}, folder, ranks, anew=True)
    code, resident = launcher.wait(process)
    failed = f"{run_id} ended with exit code {code}: {launcher.last_words(output)}"
    require(not code, f"{failed}\nits output is {output}; the same command continues from here")
    found = measure(folder, run_id, resident)
    kept.write_text(json.dumps(asdict(found)), encoding="utf-8")
    return found


def ratio(a: list[float], b: list[float]) -> dict | None:
    """Return the geometric mean of B / A over pairs with a 95% BCa bootstrap interval (scipy); None without data."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x and y]
    if not pairs:
        return None
    logs = np.log([y / x for x, y in pairs])
    low = high = None
    if len(logs) >= FEW:
        if np.ptp(logs) == 0:
            low = high = float(np.exp(logs[0]))
        else:
            interval = stats.bootstrap((logs,), np.mean, n_resamples=RESAMPLES, rng=0).confidence_interval
            low, high = float(np.exp(interval.low)), float(np.exp(interval.high))
    return {"ratio": float(np.exp(logs.mean())), "low": low, "high": high, "pairs": np.exp(logs).tolist()}


def open_folder(folder: Path, targets: list[launcher.Target], seed: int, ranks: int):
    """Create the work folder and record the files' hashes, the first seed and the rank count in ab.json. Raises
    UserError if the folder belongs to a comparison with different ones."""
    files = [path for target in targets for path in (target.script, target.config) if path]
    told = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files} | {"first seed": seed}
    told |= {"ranks": ranks} if ranks > 1 else {}
    pinned = folder / "ab.json"
    folder.mkdir(parents=True, exist_ok=True)
    earlier = read_json(pinned) if pinned.is_file() else told
    others = f"{folder} holds pairs of other files, seeds or ranks ({', '.join(earlier)})"
    require(earlier == told, f"{others}: choose another --work, or remove it")
    pinned.write_text(json.dumps(told), encoding="utf-8")


def run_pairs(targets: list[launcher.Target], folder: Path, options: argparse.Namespace):
    """Yield (pair number, A, B) after each measured pair. Numbers start at 1."""
    for number in range(1 - options.warm_up, options.pairs + 1):
        order = (0, 1) if number % 2 else (1, 0)
        found = {}
        for side in order:
            name = f"pair{number}_{'ab'[side]}" if number > 0 else f"warm_up{1 - number}_{'ab'[side]}"
            seed = options.seed + max(number - 1, 0)
            found[side] = run_once(targets[side], folder, name, seed, options.ranks)
        if number > 0:
            yield number, found[0], found[1]


def describe_pair(number: int, a: Measured, b: Measured) -> str:
    told = []
    for key in Measured.__dataclass_fields__:
        one, other = getattr(a, key), getattr(b, key)
        if one and other:
            told.append(f"{key} {one:,.6g} and {other:,.6g} ({other / one - 1:+.2%})")
    return f"pair {number}: {'; '.join(told)}"


def describe_ratio(key: str, found: dict | None) -> str:
    if found is None:
        return f"{key}: not in the logs"
    sure = "no interval from so few pairs"
    if found["low"] is not None:
        sure = f"95% interval {found['low']:.4f} to {found['high']:.4f}"
    return f"{key}: B / A = {found['ratio']:.4f}, {sure}, n = {len(found['pairs'])}"


def compare(arguments: argparse.Namespace) -> dict:
    targets = [launcher.parse_target(spec) for spec in (arguments.a, arguments.b)]
    names = [(target.config or target.script).stem for target in targets]
    folder = arguments.work or Path("logs") / f"ab_{names[0]}_{names[1]}"
    open_folder(folder, targets, arguments.seed, arguments.ranks)
    kept = []
    for number, a, b in run_pairs(targets, folder, arguments):
        kept.append((a, b))
        print(describe_pair(number, a, b), flush=True)
    return {
        key: ratio(*[[getattr(pair[side], key) for pair in kept] for side in (0, 1)])
        for key in Measured.__dataclass_fields__
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for side in "ab":
        parser.add_argument(side, metavar=side.upper(), help="FILE.env, SCRIPT.py, or SCRIPT.py,FILE.env")
    parser.add_argument("--pairs", type=launcher.at_least(1), default=5)
    parser.add_argument("--warm-up", type=launcher.at_least(0), default=1, help="warm-up pairs, which are not counted")
    parser.add_argument("--seed", type=launcher.at_least(0), default=1337, help="of the first pair; +1 for each pair")
    parser.add_argument("--ranks", type=launcher.at_least(1), default=1, help="processes per run, under torchrun")
    parser.add_argument("--work", type=Path, help="folder for the runs; default: logs/ab_<A>_<B>")
    parser.add_argument("--json", action="store_true", help="also print all numbers as JSON on the last line")
    arguments = parser.parse_args(argv)

    def tool():
        found = compare(arguments)
        print(*[describe_ratio(key, value) for key, value in found.items()], sep="\n")
        if arguments.json:
            print(json.dumps(found))

    return launcher.run_tool(tool, "the same command continues from here")


if __name__ == "__main__":
    sys.exit(main())
