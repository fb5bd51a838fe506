"""record.py compare A B: test whether B is better than A, by how much, and at what cost.

Prints Welch's one-sided t-test (unequal variances) on the losses of the seeds, under the rule that a record must win by
0.005 nats at p < 0.01; the differences in nats and bits per byte with 95% confidence intervals; the number of seeds
needed to decide; step time and bytes; and the fraction of A's run that B needs to reach A's loss.
"""

import argparse
import json
import math
import statistics
from dataclasses import asdict, dataclass, replace

import numpy as np
from record_read import Run, read_group
from record_results import present

from train_gpt import require

MARGIN_NATS, P_VALUE, POWER, CONFIDENCE, MOST_SEEDS = 0.005, 0.01, 0.8, 0.95, 1000


@dataclass(frozen=True)
class Comparison:
    """Welch's test of whether B is lower than A by more than `margin`. `difference` is mean(A) - mean(B); the interval
    is two-sided. p and the interval are None if either side has a single seed or neither has any variance."""

    n_a: int
    n_b: int
    mean_a: float | None = None
    mean_b: float | None = None
    std_a: float | None = None
    std_b: float | None = None
    margin: float | None = None
    difference: float | None = None
    p: float | None = None
    low: float | None = None
    high: float | None = None
    seeds_needed: int | None = None  # on each side
    problem: str = ""


def welch(a: list[float], b: list[float], margin: float) -> Comparison:
    from scipy import stats  # imported late: takes a second

    means = statistics.fmean(a), statistics.fmean(b)
    deviations = tuple(statistics.stdev(x) if len(x) > 1 else None for x in (a, b))
    p = low = high = needed = None
    if None not in deviations and any(deviations):
        p = float(stats.ttest_ind(np.array(a) - margin, b, equal_var=False, alternative="greater").pvalue)
        interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(CONFIDENCE)
        low, high = float(interval.low), float(interval.high)
        needed = seeds_needed(means[0] - means[1] - margin, *deviations)
    return Comparison(len(a), len(b), *means, *deviations, margin, means[0] - means[1], p, low, high, needed)


def seeds_needed(gain: float, std_a: float, std_b: float) -> int | None:
    """Return the seeds per side for a test at level P_VALUE to detect a true `gain` over the margin with power POWER,
    given the observed standard deviations. None if gain <= 0 or more than MOST_SEEDS are needed. The power is computed
    from the noncentral t distribution."""
    from scipy import stats

    if gain <= 0:
        return None
    variances = std_a**2, std_b**2
    for n in range(2, MOST_SEEDS + 1):
        error = sum(variances) / n
        freedom = error**2 / sum((v / n) ** 2 / (n - 1) for v in variances)  # Welch-Satterthwaite
        critical = stats.t.ppf(1 - P_VALUE, freedom)
        if stats.nct.sf(critical, freedom, gain / math.sqrt(error)) >= POWER:
            return n
    return None


def nats_per_bpb(runs: list[Run]) -> float:
    """Return the factor from bits per byte to nats per token: the mean ratio of val_loss to val_bpb."""
    return statistics.fmean(run.val_loss / run.val_bpb for run in runs if run.val_loss and run.val_bpb)


def record_test(a: list[Run], b: list[Run]) -> Comparison:
    """Test the record rule: B must beat A by 0.005 nats per token. With different tokenizers, nats per token are not
    comparable, so bits per byte are compared, with the margin converted at A's ratio."""
    a, b = ([run for run in runs if run.val_bpb and run.val_loss] for runs in (a, b))
    if not a or not b:
        return Comparison(len(a), len(b), problem="no scores")
    texts = [statistics.median(run.implied_bytes or 0 for run in runs) for runs in (a, b)]
    same_text = not all(texts) or math.isclose(*texts, rel_tol=1.5e-3)
    same_tokens = math.isclose(nats_per_bpb(a), nats_per_bpb(b), rel_tol=1e-4)
    key, margin = ("val_loss", MARGIN_NATS) if same_tokens else ("val_bpb", MARGIN_NATS / nats_per_bpb(a))
    test, problem = welch(present(a, key), present(b, key), margin), ""
    if not same_text:
        problem = f"the texts differ: {texts[0]:.0f} and {texts[1]:.0f} bytes were scored"
    elif test.p is None:
        problem = f"{test.n_a} and {test.n_b} seeds allow no test: at least two with different scores are needed"
    return replace(test, problem=problem)


def curve(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (steps, losses, training seconds) of a run: its validation losses if there are more than two, else
    train_loss as a running mean over 5% of the run."""
    lines = run.metrics()
    keys = "step", "train_loss", "train_seconds"
    train = [tuple(m[key] for key in keys) for m in lines if m.keys() >= set(keys)]
    seconds = {step: clock for step, _, clock in train}
    val = [(m["step"], m["val_loss"], seconds.get(m["step"], 0.0)) for m in lines if "val_loss" in m]
    if len(val) > 2:
        return tuple(np.array(column, float) for column in zip(*val, strict=True))
    if not train:
        return tuple(np.empty((3, 0)))
    steps, losses, clocks = (np.array(column, float) for column in zip(*train, strict=True))
    width = max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    return steps[width - 1 :], smooth, clocks[width - 1 :]


def compute_multiplier(a: list[Run], b: list[Run]) -> dict | None:
    """Return the fractions of A's steps, tokens and seconds that B needs to reach A's final loss: medians over all
    pairs of runs, where a pair counts as infinite if B never reaches it. None if a run has no loss curve. Both curves
    must be of the same kind (see `curve`)."""
    pairs = []
    for one in a:
        for other in b:
            (steps_a, loss_a, clock_a), (steps_b, loss_b, clock_b) = curve(one), curve(other)
            if not len(loss_a) or not len(loss_b):
                return None
            reached = np.flatnonzero(loss_b <= loss_a[-1])
            if not len(reached):
                pairs.append((math.inf,) * 3)
                continue
            at = reached[0]
            tokens = (other.tokens_per_step or 1) / (one.tokens_per_step or 1)
            share = steps_b[at] / steps_a[-1]
            pairs.append((share, share * tokens, clock_b[at] / clock_a[-1] if clock_a[-1] else math.nan))
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    return dict(zip(("steps", "tokens", "seconds"), medians, strict=True))


def compare(a: list[Run], b: list[Run]) -> dict:
    """Run all comparisons. Returns plain values that can be written as JSON."""
    for name, runs in (("A", a), ("B", b)):
        require(present(runs, "val_bpb"), f"{name} has no run with a score: give finished runs")
        whole = not any(run.partial for run in runs)
        require(whole, f"{name} has runs that scored a part of the text: give runs with VAL_TOKENS_LIMIT=0")
    nats_a, nats_b = present(a, "val_loss"), present(b, "val_loss")
    costs = {}
    for key, unit in (("step_ms", "ms"), ("train_seconds", "s"), ("bytes_total", "bytes"), ("eval_seconds", "s")):
        values = [present(runs, key) for runs in (a, b)]
        if all(values):
            costs[key] = {"a": statistics.median(values[0]), "b": statistics.median(values[1]), "unit": unit}
    nats = asdict(welch(nats_a, nats_b, 0.0)) if nats_a and nats_b else None
    return {
        "record": asdict(record_test(a, b)),
        "nats": nats,
        "bpb": asdict(welch(present(a, "val_bpb"), present(b, "val_bpb"), 0.0)),
        "costs": costs,
        "compute": compute_multiplier(a, b),
        "compute_reverse": compute_multiplier(b, a),
    }


def describe(test: dict, unit: str) -> str:
    sides = []
    for side in "ab":
        mean, deviation, n = (test[f"{key}_{side}"] for key in ("mean", "std", "n"))
        sides.append(f"{mean:.5f}" + (f" ± {deviation:.5f}" if deviation is not None else "") + f" (n = {n})")
    text = f"A {sides[0]}, B {sides[1]}: B is lower by {test['difference']:+.5f} {unit}"
    if test["low"] is not None:
        text += f", 95% interval {test['low']:+.5f} to {test['high']:+.5f}, p = {test['p']:.3g}"
    return text


def verdict(test: dict) -> str:
    if test["problem"]:
        return f"not settled: {test['problem']}"
    if test["p"] < P_VALUE:
        return f"B beats A by the rule for records: p = {test['p']:.3g} < {P_VALUE} for a gain over 0.005 nats"
    text = f"B does not beat A by the rule for records: p = {test['p']:.3g} for a gain over 0.005 nats; "
    if test["seeds_needed"] is None:
        small = test["difference"] <= test["margin"]
        more = "the gain seen is under 0.005 nats: more seeds of the same would not help"
        return text + (more if small else f"over {MOST_SEEDS} seeds would be needed")
    a, b = (max(0, test["seeds_needed"] - test[f"n_{side}"]) for side in "ab")
    more = f"with {a} more seeds of A and {b} of B such a gain and spread would settle it four times in five"
    return text + more


def add_arguments(parser: argparse.ArgumentParser):
    for name in ("a", "b"):
        parser.add_argument(name, metavar=name.upper(), help="a record or run folder, or several as a glob or list")
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")


def main(arguments: argparse.Namespace) -> int:
    found = compare(read_group(arguments.a), read_group(arguments.b))
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    print(verdict(found["record"]))
    print("bits per byte:", describe(found["bpb"], "BPB"))
    if found["nats"]:
        print("nats per token:", describe(found["nats"], "nats"))
    for name, cost in found["costs"].items():
        print(f"{name}: A {cost['a']:,.6g}, B {cost['b']:,.6g} {cost['unit']} ({cost['b'] / cost['a'] - 1:+.1%})")
    for key, (one, other) in (("compute", "BA"), ("compute_reverse", "AB")):
        share = found[key]
        if share is None:
            print("compute: unknown, because metrics.jsonl is missing")
            break
        if all(map(math.isfinite, share.values())):
            told = ", ".join(f"{share[of]:.2f} of its {of.replace('seconds', 'time')}" for of in share)
            print(f"compute: {one} reaches the final loss of {other} in {told}")
        else:
            print(f"compute: {one} does not reach the final loss of {other}")
    return 0
