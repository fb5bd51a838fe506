"""Checks of a record's measurements: scores, seeds, times, validation data, and statistical significance."""

import math
import re
import statistics
from collections.abc import Iterator
from decimal import Decimal

import record_data
from record_compare import P_VALUE, record_test
from record_folder import Fault, Record, Skip
from record_read import Run, agree, digits, record_runs

# Coarsest rounding allowed in a claimed score. Claims in our own records are computed and have full precision.
COARSEST_PUBLIC, COARSEST_OURS = 1e-3, 1e-8
COMPUTED = "copy no number by hand: `record.py new` computes all of them"  # the fix for a wrong claim


def check_seeds(record: Record) -> Iterator[Fault | Skip]:
    """Check that the claimed, listed and logged seeds are the same, and that each file holds the seed in its name."""
    claim, remedy = record.claim, "include every seed that was run, each with its own log"
    for run in record.runs:
        logged, named = run.log.seeds if run.log else set(), re.search(r"seed[_-]?(\d+)", run.name.replace(" ", ""))
        if run.result and run.log and run.result.get("seed") not in logged:
            problem = f"is the log of seed {sorted(logged)}, but the result is of seed {run.result.get('seed')}"
            yield Fault(record.log_of(run), problem, "put the log of that seed in its place")
        elif named and logged and int(named[1]) not in logged | {run.seed}:
            yield Fault(run.name, f"its log says seed {sorted(logged)}", "put the right log in its place")
    if not claim or not (claim.seeds or claim.listed):
        yield Skip("submission.json lists no seeds")
        return
    if claim.seeds and claim.listed and set(claim.seeds) != set(claim.listed):
        yield Fault("submission.json", f"seeds {claim.listed} but results of {sorted(claim.seeds)}", remedy)
    claimed, ran = set(claim.seeds or claim.listed), {run.seed for run in record.runs} - {None}
    if ran and claimed - ran:
        yield Fault("submission.json", f"claims seeds {sorted(claimed - ran)}, which left no log", remedy)
    # Public folders also hold ablation logs: a log counts as a dropped seed only if its name fits the claimed ones.
    forms = {run.name.replace(str(run.seed), "*") for run in record.runs if run.seed in claimed}
    named = {run.seed for run in record.runs if record.ours or run.name.replace(str(run.seed), "*") in forms}
    dropped = sorted(named - claimed - {None})
    if named & claimed and dropped:
        problem = f"leaves out seeds {dropped}, which are in the folder: a mean over chosen seeds proves nothing"
        yield Fault("submission.json", problem, remedy)
    seeds = [run.seed for run in record.runs if run.seed is not None]
    for seed in sorted({seed for seed in seeds if seeds.count(seed) > 1 and record.ours}):
        yield Fault(f"seed {seed}", "appears twice", remedy)


def check_score(record: Record) -> Iterator[Fault | Skip]:
    """Compare each seed's log with its result.json and the claims with both; recompute mean and standard deviation."""
    for run in record.runs:
        for key in [key for key in run.contradictions if key != "bytes_total"]:
            logged = f"line {run.log.final.line} of {record.log_of(run)} says {run.log.final.value(key)}"
            yield Fault(f"{run.result_path.name}: {key}", f"is {run.result.get(key)}, but {logged}", COMPUTED)
    if record.contradicted:
        yield Skip("claims: a log and its result.json contradict each other")
        return
    claim, scored = record.claim, record.scored()
    if not claim or claim.val_bpb is None or not any(run.val_bpb for run in record.runs):
        yield Skip("no claimed score" if not claim or claim.val_bpb is None else "no score line known in the logs")
        return
    for seed, fields in claim.seeds.items():
        for key in ("val_bpb", "val_loss") if seed in scored else ():
            if key in fields and (problem := differs(fields[key], scored[seed], key)):
                yield Fault(f"submission.json: seed {seed} {key}", problem, COMPUTED)
    yield from check_mean(record)
    if not record.ours and claim.val_loss is not None and not known_loss(record):
        yield Fault("submission.json: val_loss", f"claims {claim.val_loss}, which no log says", COMPUTED)


def known_loss(record: Record) -> bool:
    """Return True if the claimed loss appears in the logs. Public folders may state the loss of any validation, before
    or after export, or its mean over seeds."""
    claim, logs = record.claim, [run.log for run in record.runs if run.log]
    every = [float(text) for log in logs for text in re.findall(r"val_loss[:=] ?(\d+\.\d+)", log.body)]
    groups = [
        [run.val_loss for run in record.runs if run.val_loss],
        [run.val_loss for run in record.scored().values() if run.seed in (claim.seeds or claim.listed)],
        [float(fields["val_loss"]) for fields in claim.seeds.values() if "val_loss" in fields],
    ]
    for label in {score.label for log in logs for score in log.scores}:
        groups.append([float(score.loss) for log in logs for score in log.scores if score.label == label])
    means = [statistics.fmean(group) for group in groups if group]
    return any(abs(loss - float(claim.val_loss)) <= max(digits(claim.val_loss), 1e-4) for loss in every + means)


def differs(claimed: Decimal, run: Run, key: str) -> str:
    """Return how a claimed score differs from the run's, or "". A public log may contain several artifact scores."""
    scores = run.log.scores if run.log and not run.result else []
    after = [float(score.value(key)) for score in scores if not score.before_export] + [getattr(run, key)]
    coarse = [score.value(key) for score in scores if digits(score.value(key)) > digits(claimed)]
    coarsest = COARSEST_OURS if run.result else COARSEST_PUBLIC
    if any(agree(exact, claimed, coarsest) for exact in after) or any(agree(float(claimed), it) for it in coarse):
        return ""
    if any(agree(float(score.value(key)), claimed, coarsest) for score in scores if score.before_export):
        return f"{claimed} is the score before the export, the artifact scored {getattr(run, key)}"
    return f"{claimed} is in no score line of {run.name}, whose last is {getattr(run, key)}"


def check_mean(record: Record) -> Iterator[Fault | Skip]:
    claim, scored = record.claim, record.scored()
    seeds = [seed for seed in (claim.seeds or claim.listed) if seed in scored]
    chosen = [scored[seed] for seed in seeds] or [run for run in record.runs if run.val_bpb]
    claimed = [fields["val_bpb"] for fields in claim.seeds.values() if "val_bpb" in fields]
    if not record.ours and len(claimed) == len(claim.seeds) > 0:
        scores = [float(score) for score in claimed]  # each was already compared with its log
        slack = max(digits(score) for score in claimed)
    else:
        scores, slack = [run.val_bpb for run in chosen], COARSEST_OURS
    coarsest = COARSEST_OURS if record.ours else COARSEST_PUBLIC

    def is_off(mean: float, stated: Decimal) -> bool:
        return not agree(mean, stated, coarsest) and abs(mean - float(stated)) > slack

    mean = statistics.fmean(scores)
    single = not record.ours and not claim.seeds and any(not differs(claim.val_bpb, run, "val_bpb") for run in chosen)
    if is_off(mean, claim.val_bpb) and not single:
        of = f"the mean of seeds {seeds}" if len(seeds) > 1 else "the score in the log"
        yield Fault("submission.json: val_bpb", f"claims {claim.val_bpb}, {of} is {mean:.8f}", COMPUTED)
    mean = statistics.fmean(run.val_loss for run in chosen) if record.ours else 0.0
    if record.ours and claim.val_loss is not None and is_off(mean, claim.val_loss):
        yield Fault("submission.json: val_loss", f"claims {claim.val_loss}, the mean is {mean:.8f}", COMPUTED)
    if claim.val_bpb_std is not None and len(scores) > 1:
        spreads = [statistics.stdev(scores), statistics.pstdev(scores)][: 1 if record.ours else 2]
        slack += min(digits(claim.val_bpb_std), coarsest)
        if all(abs(spread - float(claim.val_bpb_std)) > slack for spread in spreads):
            problem = f"claims {claim.val_bpb_std}, the sample standard deviation is {spreads[0]:.8f}"
            yield Fault("submission.json: val_bpb_std", problem, COMPUTED)


def check_clock(record: Record) -> Iterator[Fault | Skip]:
    """Check that training and evaluation each stay within the time limit. The public script checks its clock only after
    a step, so public runs get a slack of two steps."""
    cap = record.track.seconds
    if not cap or not any(run.train_seconds for run in record.runs):
        yield Skip("the track has no clock" if not cap else "no log states the time of the training")
        return
    for run in record.runs:
        slack = 0.0 if record.ours else 2 * (run.step_ms or 0) / 1000
        if run.train_seconds and run.train_seconds > cap + slack:
            problem = f"trained for {run.train_seconds:.3f} s, the cap is {cap} s"
            yield Fault(run.name, problem, f"run again with MAX_WALLCLOCK_SECONDS={cap}")
        if run.eval_seconds and run.eval_seconds > cap:
            problem = f"was scored in {run.eval_seconds:.3f} s, the cap is {cap} s"
            yield Fault(run.name, problem, "score in larger batches, or with a larger EVAL_STRIDE")


def check_validation(record: Record) -> Iterator[Fault | Skip]:
    """Check that every target of a known validation set was scored."""
    stated = record.manifest.get("splits", {}).get("val", {}).get("tokens")
    judged = False
    for run in record.runs:
        tokens, problem = run.tokens, ""
        if run.partial:
            problem = "scored a part of the validation text"
        elif tokens and stated:
            problem = f"scored {tokens} targets, the data has {stated - 1}" if tokens != stated - 1 else ""
        elif tokens and not record_data.known_bytes(tokens) and fineweb_by(run, KNOWN_TOKENIZERS):
            problem = f"scored {tokens} targets, which is no known FineWeb validation text with this tokenizer"
        if problem:
            yield Fault(run.name, problem, "score the whole validation text: VAL_TOKENS_LIMIT=0, every shard there")
        judged |= bool(problem or (tokens and (stated or record_data.known_bytes(tokens))))
    if not judged:
        yield Skip("no number of targets, or a text that is not known and has no data_manifest.json")


# Patterns in the names of FineWeb shards and tokenizers. The number of targets depends on the tokenizer.
KNOWN_TOKENIZERS, ANY_TOKENIZER = r"fineweb10B_sp(1024|4096|8192)\b|fineweb_(1024|4096|8192)_bpe", r"fineweb10B"


def fineweb_by(run: Run, tokenizer: str) -> bool:
    return bool(run.log and re.search(tokenizer, run.log.body))


def check_bytes(record: Record) -> Iterator[Fault | Skip]:
    """Compare the byte count implied by the score, tokens * loss / (ln 2 * BPB), with that of the validation data."""
    split, judged = record.manifest.get("splits", {}).get("val", {}), False
    true = split.get("token_bytes", split.get("bytes"))
    for run in record.runs:
        implied, final = run.implied_bytes, run.witness.final if run.witness and not run.result else None
        if implied is None or run.partial or run.contradictions:
            continue
        error = record_data.rounding(final.loss, final.bpb) if final else 1e-7
        known = record_data.known_bytes(run.tokens)
        if true and run.tokens + 1 == split.get("tokens"):
            expected, slack = true, error
        elif not true and known:
            expected, slack = known, error + record_data.RAGGED
        elif not true and fineweb_by(run, ANY_TOKENIZER) and not fineweb_by(run, KNOWN_TOKENIZERS):
            expected, slack = record_data.FINEWEB_BYTES, error + record_data.RAGGED
        else:
            continue
        judged = True
        counts = filter(None, (implied, (run.result or {}).get("scored_bytes")))
        found = next((count for count in counts if not math.isclose(count, expected, rel_tol=slack)), None)
        if found:
            told = f"the text has {expected} ({found / expected - 1:+.2%})"
            remedy = "count the bytes of each token as data/README.md says; the data must be whole"
            yield Fault(run.name, f"its score divides by {found:.0f} bytes, {told}", remedy)
    if not judged:
        yield Skip("no number of targets, or a text whose bytes are not known")


def check_significance(record: Record) -> Iterator[Fault | Skip]:
    base, place = (record.claim.raw if record.claim else {}).get("base"), "submission.json: base"
    if not base:
        yield Skip("names no record that it beats")
        return
    folder = record.folder.parent / str(base)
    if not folder.is_dir():
        problem = f"there is no record {base} in this track"
        yield Fault(place, problem, "name the folder of the record that it beats, or null")
        return
    verdict = record_test(record_runs(folder), record.runs)
    if verdict.problem:
        yield Fault(place, verdict.problem, "see records/README.md, Statistics")
    elif verdict.p >= P_VALUE:
        numbers = f"difference {verdict.difference:+.5f} nats, p = {verdict.p:.3g}"
        problem = f"does not beat {base} by 0.005 nats: {numbers}"
        yield Fault(place, problem, "run more seeds, or claim no record")
