"""Checks of what a record claims to have measured: scores, seeds, times, the validation text, significance."""

import math
import re
import statistics
from collections.abc import Iterator
from decimal import Decimal

import record_data
from record_folder import Finding, Record, Skip
from record_read import Run, agree, digits, record_runs

# A claim may be rounded, but not to fewer digits than this; ours is computed, and has them all.
COARSEST_PUBLIC, COARSEST_OURS = 1e-3, 1e-8


def check_seeds(record: Record) -> Iterator[Finding | Skip]:
    """Claimed seeds, listed seeds and seeds that left logs are the same; every file is of the seed it names."""
    claim, remedy = record.claim, "include every seed that was run, each with its own log"
    for run in record.runs:
        logged, named = run.log.seeds if run.log else set(), re.search(r"seed[_-]?(\d+)", run.name.replace(" ", ""))
        if run.result and run.log and run.result.get("seed") not in logged:
            yield Finding(
                "seeds",
                record.log_of(run),
                f"is the log of seed {sorted(logged)}, beside the result of seed {run.result.get('seed')}",
                "put the log of that seed in its place",
            )
        elif named and logged and int(named[1]) not in logged | {run.seed}:
            yield Finding("seeds", run.name, f"its log says seed {sorted(logged)}", "put the right log in its place")
    if not claim or not (claim.seeds or claim.listed):
        yield Skip("submission.json lists no seeds")
        return
    if claim.seeds and claim.listed and set(claim.seeds) != set(claim.listed):
        yield Finding("seeds", "submission.json", f"seeds {claim.listed} but results of {sorted(claim.seeds)}", remedy)
    claimed, ran = set(claim.seeds or claim.listed), {run.seed for run in record.runs} - {None}
    if ran and claimed - ran:
        yield Finding("seeds", "submission.json", f"claims seeds {sorted(claimed - ran)}, which left no log", remedy)
    # Public folders also hold logs of ablations: only one that is named like the claimed ones is a dropped seed.
    forms = {run.name.replace(str(run.seed), "*") for run in record.runs if run.seed in claimed}
    named = {run.seed for run in record.runs if record.ours or run.name.replace(str(run.seed), "*") in forms}
    if named & claimed and named - claimed - {None}:
        yield Finding(
            "seeds",
            "submission.json",
            f"leaves out seeds {sorted(named - claimed - {None})}, which are in "
            "the folder: a mean over chosen seeds proves nothing",
            remedy,
        )
    seeds = [run.seed for run in record.runs if run.seed is not None]
    for seed in sorted({seed for seed in seeds if seeds.count(seed) > 1 and record.ours}):
        yield Finding("seeds", f"seed {seed}", "is there twice", remedy)


def check_score(record: Record) -> Iterator[Finding | Skip]:
    """Log against result.json, seed by seed; claims against both; mean and deviation computed again."""
    remedy = "copy no number by hand: `record.py new` computes all of them"
    for run in record.runs:
        for key in run.contradictions:
            if key != "bytes_total":
                final = run.log.final
                yield Finding(
                    "score",
                    f"{run.result_path.name}: {key}",
                    f"is {run.result.get(key)}, but line "
                    f"{final.line} of {record.log_of(run)} says {getattr(final, key.removeprefix('val_'))}",
                    remedy,
                )
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
                yield Finding("score", f"submission.json: seed {seed} {key}", problem, remedy)
    yield from check_mean(record, remedy)
    if not record.ours and claim.val_loss is not None and not known_loss(record):
        yield Finding("score", "submission.json: val_loss", f"claims {claim.val_loss}, which no log says", remedy)


def known_loss(record: Record) -> bool:
    """Public folders state the loss of any validation, before or after the export, or its mean over the seeds."""
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
    """What is wrong with a claimed score of a run; a public log may hold several scores of its artifact."""
    scores = run.log.scores if run.log and not run.result else []
    value = {"val_bpb": lambda s: s.bpb, "val_loss": lambda s: s.loss}[key]
    after = [float(value(score)) for score in scores if not score.before_export] + [getattr(run, key)]
    coarse = [score for score in scores if digits(value(score)) > digits(claimed)]
    coarsest = COARSEST_OURS if run.result else COARSEST_PUBLIC
    if any(agree(exact, claimed, coarsest) for exact in after) or any(agree(float(claimed), value(s)) for s in coarse):
        return ""
    if any(agree(float(value(score)), claimed, coarsest) for score in scores if score.before_export):
        return f"{claimed} is the score before the export, the artifact scored {getattr(run, key)}"
    return f"{claimed} is in no score line of {run.name}, whose last is {getattr(run, key)}"


def check_mean(record: Record, remedy: str) -> Iterator[Finding | Skip]:
    claim, scored = record.claim, record.scored()
    seeds = [seed for seed in (claim.seeds or claim.listed) if seed in scored]
    chosen = [scored[seed] for seed in seeds] or [run for run in record.runs if run.val_bpb]
    claimed = [fields["val_bpb"] for fields in claim.seeds.values() if "val_bpb" in fields]
    if not record.ours and len(claimed) == len(claim.seeds) > 0:
        scores = [float(score) for score in claimed]  # each was compared with its log above
        slack = max(digits(score) for score in claimed)
    else:
        scores, slack = [run.val_bpb for run in chosen], COARSEST_OURS
    coarsest = COARSEST_OURS if record.ours else COARSEST_PUBLIC
    mean = statistics.fmean(scores)
    single = not record.ours and not claim.seeds and any(not differs(claim.val_bpb, run, "val_bpb") for run in chosen)
    if not agree(mean, claim.val_bpb, coarsest) and abs(mean - float(claim.val_bpb)) > slack and not single:
        of = f"the mean of seeds {seeds}" if len(seeds) > 1 else "the score in the log"
        yield Finding("score", "submission.json: val_bpb", f"claims {claim.val_bpb}, {of} is {mean:.8f}", remedy)
    if record.ours and claim.val_loss is not None:
        mean_loss = statistics.fmean(run.val_loss for run in chosen)
        if not agree(mean_loss, claim.val_loss, coarsest) and abs(mean_loss - float(claim.val_loss)) > slack:
            yield Finding(
                "score", "submission.json: val_loss", f"claims {claim.val_loss}, the mean is {mean_loss:.8f}", remedy
            )
    if claim.val_bpb_std is not None and len(scores) > 1:
        spreads = [statistics.stdev(scores), statistics.pstdev(scores)][: 1 if record.ours else 2]
        slack += min(digits(claim.val_bpb_std), coarsest)
        if all(abs(spread - float(claim.val_bpb_std)) > slack for spread in spreads):
            yield Finding(
                "score",
                "submission.json: val_bpb_std",
                f"claims {claim.val_bpb_std}, the sample standard deviation is {spreads[0]:.8f}",
                remedy,
            )


def check_clock(record: Record) -> Iterator[Finding | Skip]:
    """Training and evaluation, each under the cap. The public script tests its clock after a step: one more is let."""
    cap = record.track.seconds
    if not cap or not any(run.train_seconds for run in record.runs):
        yield Skip("the track has no clock" if not cap else "no log states the time of the training")
        return
    for run in record.runs:
        slack = 0.0 if record.ours else 2 * (run.step_ms or 0) / 1000
        if run.train_seconds and run.train_seconds > cap + slack:
            yield Finding(
                "clock",
                run.name,
                f"trained for {run.train_seconds:.3f} s, the cap is {cap} s",
                f"run again with MAX_WALLCLOCK_SECONDS={cap}",
            )
        if run.eval_seconds and run.eval_seconds > cap:
            yield Finding(
                "clock",
                run.name,
                f"was scored in {run.eval_seconds:.3f} s, the cap is {cap} s",
                "score in larger batches, or with a larger EVAL_STRIDE",
            )


def check_validation(record: Record) -> Iterator[Finding | Skip]:
    """All targets of a known text."""
    remedy = "score the whole validation text: VAL_TOKENS_LIMIT=0, every shard there"
    stated = record.manifest.get("splits", {}).get("val", {}).get("tokens")
    judged = False
    for run in record.runs:
        tokens = run.tokens
        if run.partial:
            judged = True
            yield Finding("validation", run.name, "scored a part of the validation text", remedy)
        elif tokens and stated:
            judged = True
            if tokens != stated - 1:
                yield Finding("validation", run.name, f"scored {tokens} targets, the data has {stated - 1}", remedy)
        elif tokens and record_data.known_text(tokens):
            judged = True
        elif tokens and fineweb_by(run, KNOWN_TOKENIZERS):
            judged = True
            yield Finding(
                "validation",
                run.name,
                f"scored {tokens} targets, which is no known FineWeb validation text with this tokenizer",
                remedy,
            )
    if not judged:
        yield Skip("no number of targets, or a text that is not known and has no data_manifest.json")


# In names of FineWeb's shards and tokenizers. With any other tokenizer the number of targets is another one.
KNOWN_TOKENIZERS, ANY_TOKENIZER = r"fineweb10B_sp(1024|4096|8192)\b|fineweb_(1024|4096|8192)_bpe", r"fineweb10B"


def fineweb_by(run: Run, tokenizer: str) -> bool:
    return bool(run.log and re.search(tokenizer, run.log.body))


def check_bytes(record: Record) -> Iterator[Finding | Skip]:
    """Bytes that the score was divided by: tokens * loss / (ln 2 * BPB), against the text's own."""
    split, judged = record.manifest.get("splits", {}).get("val", {}), False
    true = split.get("token_bytes", split.get("bytes"))
    remedy = "count the bytes of each token as data/README.md says; the data must be whole"
    for run in record.runs:
        implied, final = run.implied_bytes, run.witness.final if run.witness and not run.result else None
        if implied is None or run.partial or run.contradictions:
            continue
        error = record_data.rounding(final.loss, final.bpb) if final else 1e-7
        known = record_data.known_text(run.tokens)
        if true and run.tokens + 1 == split.get("tokens"):
            expected, slack = true, error
        elif not true and known:
            expected, slack = known[1], error + record_data.RAGGED
        elif not true and fineweb_by(run, ANY_TOKENIZER) and not fineweb_by(run, KNOWN_TOKENIZERS):
            expected, slack = record_data.FINEWEB_BYTES, error + record_data.RAGGED
        else:
            continue
        judged = True
        for found in (implied, (run.result or {}).get("scored_bytes")):
            if found and not math.isclose(found, expected, rel_tol=slack):
                yield Finding(
                    "bytes",
                    run.name,
                    f"its score divides by {found:.0f} bytes, the text has {expected} ({found / expected - 1:+.2%})",
                    remedy,
                )
                break
    if not judged:
        yield Skip("no number of targets, or a text whose bytes are not known")


def check_significance(record: Record) -> Iterator[Finding | Skip]:
    from record_compare import P_VALUE, record_test

    base = (record.claim.raw if record.claim else {}).get("base")
    if not base:
        yield Skip("names no record that it beats")
        return
    folder = record.folder.parent / str(base)
    if not folder.is_dir():
        yield Finding(
            "significance",
            "submission.json: base",
            f"there is no record {base} in this track",
            "name the folder of the record that it beats, or null",
        )
        return
    verdict = record_test(record_runs(folder), record.runs)
    if verdict.problem:
        yield Finding("significance", "submission.json: base", verdict.problem, "see records/README.md, Statistics")
    elif verdict.p >= P_VALUE:
        yield Finding(
            "significance",
            "submission.json: base",
            f"does not beat {base} by 0.005 nats: difference {verdict.difference:+.5f} nats, p = {verdict.p:.3g}",
            "run more seeds, or claim no record",
        )
