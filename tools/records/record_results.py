"""Values computed from a record's runs: the fields of submission.json and the results table of its README."""

import statistics

from record_read import Run

TABLE = "<!-- results: generated, do not edit -->"
COLUMNS = {  # table columns: {title: (field of Run, format)}
    "val_bpb": ("val_bpb", ".5f"),
    "val_loss": ("val_loss", ".5f"),
    "before export": ("pre_quant_val_bpb", ".5f"),
    "steps": ("steps", ".0f"),
    "ms a step": ("step_ms", ".2f"),
    "training s": ("train_seconds", ".1f"),
    "evaluation s": ("eval_seconds", ".1f"),
}


def present(runs: list[Run], key: str) -> list[float]:
    """Return a field's values from the runs where it is not None."""
    return [value for run in runs if (value := getattr(run, key)) is not None]


def spread(values: list[float], form: str) -> str:
    """Format the mean and, for two or more values, the sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}"


def results_table(runs: list[Run]) -> str:
    """Return a Markdown table: one row per seed, then mean ± std. record_check recomputes and compares it."""
    runs = sorted(runs, key=lambda run: run.seed or 0)
    lines = [["seed", *COLUMNS, "bytes"], ["---"] * (len(COLUMNS) + 2)]
    for run in runs:
        lines.append([run.seed, *(f"{getattr(run, key):{form}}" for key, form in COLUMNS.values())])
        lines[-1].append(f"{run.bytes_total:,}")
    means = [spread([getattr(run, key) for run in runs], form) for key, form in COLUMNS.values()]
    largest = f"{max(run.bytes_total for run in runs):,} at most"
    lines.append([f"**mean ± std, n = {len(runs)}**", *means, largest])
    return "\n".join([TABLE, "", *("| " + " | ".join(map(str, line)) + " |" for line in lines)])


def hardware(run: Run) -> str:
    ranks = run.result["world_size"]
    return f"{ranks} x {run.result['device']}" if ranks > 1 else run.result["device"]


def computed(runs: list[Run]) -> dict:
    """Compute the fields of submission.json that derive from the runs."""
    scores = [run.val_bpb for run in runs]
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
        "val_loss": statistics.fmean(run.val_loss for run in runs),
        "val_bpb": statistics.fmean(scores),
        "val_bpb_std": statistics.stdev(scores) if len(runs) > 1 else None,
        "bytes_total": max(run.bytes_total for run in runs),
        "bytes_code": runs[0].result["bytes_code"],
        "seeds": [run.seed for run in runs],
        "seed_results": results,
        "hardware": hardware(runs[0]),
        "pytorch_version": runs[0].result["torch"],
        "pre_quant_val_bpb": statistics.fmean(run.pre_quant_val_bpb for run in runs),
        "step_stop": round(statistics.fmean(run.steps for run in runs)),
        "wallclock_seconds": max(run.train_seconds for run in runs),
        "eval_time_seconds": max(run.eval_seconds for run in runs),
    }
