"""Checks of a record's files: the script that ran, code size, total size, configuration, and tokenizer."""

import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from record_folder import Fault, Record, Skip, sha256
from record_read import sources_of

# Knobs that may differ between seeds because they do not affect training or the score.
MAY_DIFFER = {
    *("SEED", "LOG_DIR", "DATA_PATH", "TOKENIZER_PATH", "TARGET_WORLD_SIZE", "MICRO_BATCH_TOKENS"),
    *("CHECKPOINT_EVERY_SECONDS", "TRAIN_LOG_EVERY", "VAL_LOSS_EVERY", "VAL_AT_START"),
    *("SAMPLE_PROMPT", "SAMPLE_TOKENS", "TEMPERATURE", "TOP_K"),
}


def plain_size(path: Path) -> set[int]:
    """Return the size of a text file as it is, with LF and with CRLF line endings: git may convert them at checkout."""
    data = path.read_bytes()
    unix = data.replace(b"\r\n", b"\n")
    return {len(data), len(unix), len(unix) + unix.count(b"\n")}


def check_script(record: Record) -> Iterator[Fault | Skip]:
    """Check that the files are the code that ran, by the hashes in result.json or the source in a public log."""
    judged, script = False, record.folder / "train_gpt.py"
    for run in record.runs:
        for name, stated in sources_of(run.result).items() if run.result else ():
            path = record.folder / name
            if stated["sha256"] and path.is_file():
                judged = True
                if sha256(path) != stated["sha256"]:
                    problem = f"is not the file that ran ({run.name} has sha256 {stated['sha256'][:12]}...)"
                    yield Fault(name, problem, "ship the copy in the run folder, or run again")
        if not run.log or not script.is_file() or run.result:
            continue
        problem, sizes = "", run.log.code_bytes
        if run.log.source is not None:
            judged = True
            if run.log.source.split() != script.read_text(encoding="utf-8", errors="replace").split():
                problem = f"differs from the source in {run.name}"
        elif sizes:
            judged = True
            together = sum(path.stat().st_size for path in record.folder.glob("*.py"))
            if not sizes & (plain_size(script) | {together}):
                problem = f"has {script.stat().st_size} bytes, {run.name} logged {sorted(sizes)}"
        if problem:
            yield Fault("train_gpt.py", problem, "ship the script that made the log")
    if not judged:
        yield Skip("no log or result states the hash, source or size of its code")


def check_code(record: Record) -> Iterator[Fault | Skip]:
    """Check that the claimed code size includes every source file and matches the files."""
    claim, remedy = record.claim, "count every source file that shapes the run, in bytes, as result.json does"
    logged = set().union(*(run.log.code_bytes for run in record.runs if run.log))
    if record.ours:
        for name in sorted({path.name for path in record.folder.rglob("*.py")} - set(record.sources)):
            yield Fault(name, "is neither hashed nor counted in bytes_code", remedy)
        stated = {result.get("bytes_code") for result in record.results}
        if len(stated) > 1:
            yield Fault("result_seed*.json", f"bytes_code differs between seeds: {sorted(stated)}", remedy)
        paths = {record.folder / name: source for name, source in record.sources.items()}
        if all(path.is_file() and sha256(path) == source["sha256"] for path, source in paths.items()):
            counted = sum(path.stat().st_size for path in paths)
        else:
            counted = sum(source["bytes"] for source in record.sources.values())
        wrong = (stated | logged) - {counted}
        if len(stated) == 1 and wrong:
            yield Fault("bytes_code", f"is {sorted(wrong)}, the sources have {counted}", remedy)
        allowed = {counted}
    else:
        sizes = [plain_size(path) for path in record.folder.glob("*.py")]
        allowed = logged.union(*sizes)
        allowed |= {sum(map(end, sizes)) for end in (min, max) if sizes}  # all files, with LF or CRLF
    if not claim or claim.bytes_code is None or not allowed:
        yield Skip("no claimed bytes of code" if allowed else "no script")
    elif int(claim.bytes_code) not in allowed:
        some = ", ".join(map(str, sorted(allowed)[:3]))
        yield Fault("submission.json: bytes_code", f"claims {claim.bytes_code}, the code has {some}", remedy)


def check_artifact(record: Record) -> Iterator[Fault | Skip]:
    """Check that any artifact in the folder has the hash and size recorded by one of the runs."""
    made = {result["sha256_artifact"]: result["bytes_artifact"] for result in record.results}
    files = sorted(record.folder.glob("final_model.*.ptz"))
    if not files or not made:
        yield Skip("the folder holds no artifact" if made else "no result states the hash of an artifact")
    for path in files if made else ():
        if made.get(sha256(path)) != path.stat().st_size:
            yield Fault(path.name, "is not the artifact of any run", "ship the one that was scored")


def check_size(record: Record) -> Iterator[Fault | Skip]:
    """Check the size of code plus artifact: the sum, the claim, and the track's limit in decimal bytes."""
    claim, limit, remedy = record.claim, record.track.bytes, "take the total that the run logged"
    totals = {}
    for run in record.runs:
        total, result = run.bytes_total, run.result or {}
        parts = [result.get(key) for key in ("bytes_code", "bytes_artifact")]
        if result and None not in (*parts, total) and sum(parts) != result["bytes_total"]:
            problem = f"bytes_total is {result['bytes_total']}, code and artifact are {sum(parts)}"
            yield Fault(run.result_path.name, problem, remedy)
        elif "bytes_total" in run.contradictions:
            problem = f"logs {run.log.total_bytes} bytes, {run.result_path.name} says {result['bytes_total']}"
            yield Fault(record.log_of(run), problem, remedy)
        elif total:
            totals[run.name] = total
    stated = int(claim.bytes_total) if claim and claim.bytes_total is not None else None
    largest = max(totals.values(), default=stated)
    if largest is None:
        yield Skip("no log, result or claim states a size")
        return
    if limit and largest > limit:
        place = max(totals, key=totals.get, default="submission.json")
        problem = f"{largest} bytes of code and artifact exceed {limit} (decimal: {limit // 10**6} MB are not MiB)"
        yield Fault(place, problem, "make it smaller: fewer bits, FIT_SIZE=1, or a smaller model")
    if stated is not None and totals and not known_total(record, stated, list(totals.values())):
        problem = f"claims {stated}, the largest of the seeds is {largest}"
        yield Fault("submission.json: bytes_total", problem, remedy)


def known_total(record: Record, stated: int, totals: list[int]) -> bool:
    """Return True if the claimed size matches the runs. Our records state the largest total; public folders may also
    state the artifact's size alone, the mean, or the total of any seed."""
    if record.ours:
        return stated == max(totals)
    artifacts = [run.log.artifact_bytes for run in record.runs if run.log and run.log.artifact_bytes]
    claimed = [int(fields["bytes_total"]) for fields in record.claim.seeds.values() if "bytes_total" in fields]
    means = [statistics.fmean(values) for values in (totals, artifacts) if values]
    return stated in {*totals, *artifacts, *claimed} or any(abs(stated - mean) <= 1 for mean in means)


def check_config(record: Record) -> Iterator[Fault | Skip]:
    config = record.config
    if not (record.folder / "config.env").exists() or not any(run.log and run.log.knobs for run in record.runs):
        yield Skip("no config.env, or no log that prints its configuration")
        return
    for run in record.runs:
        logged = run.log.knobs if run.log else {}
        names = sorted((config.keys() | logged.keys()) - MAY_DIFFER) if logged else []
        odd = [name for name in names if config.get(name) != logged.get(name)]
        if odd:
            told = ", ".join(f"{n}={config.get(n, 'unset')} (log: {logged.get(n, 'unset')})" for n in odd[:3])
            problem = f"differs from the configuration in {record.log_of(run)}: {told}"
            yield Fault("config.env", problem, "take config.env of the run folder; all seeds must run the same")


def check_compile(record: Record) -> Iterator[Fault | Skip]:
    """Check that the sources compile. If this interpreter fails, a newer one is tried if it is installed."""
    paths = {*record.folder.glob("*train*.py"), *(record.folder / name for name in record.sources)}
    paths = sorted(filter(Path.is_file, paths))
    versions = range(20, sys.version_info.minor, -1)
    newer = next(filter(None, (shutil.which(f"python3.{minor}") for minor in versions)), None)
    here = [str(number) for number in sys.version_info[:2]]
    same = any(result.get("python", "").split(".")[:2] == here for result in record.results)
    for path in paths:
        try:
            compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            command = [newer, "-c", "import sys; compile(open(sys.argv[1], 'rb').read(), sys.argv[1], 'exec')", path]
            if same or (newer and subprocess.run(command, capture_output=True, check=False).returncode):
                place, problem = f"{path.name}:{getattr(error, 'lineno', 0)}", f"is not valid Python: {error.args[0]}"
                yield Fault(place, problem, "ship the script that ran")
            elif not newer:
                yield Skip(f"{path.name} does not compile on Python {sys.version.split()[0]}, and no newer one is here")
    if not paths:
        yield Skip("no script")


def check_tokenizer(record: Record) -> Iterator[Fault | Skip]:
    hashes = {result.get("sha256_tokenizer") for result in record.results} - {None}
    stated = record.manifest.get("tokenizer", {})
    stated = stated.get("sha256") if stated.get("kind") == "sentencepiece" else None
    if not hashes:
        yield Skip("no result states the hash of its tokenizer")
    elif len(hashes) > 1 or (stated and hashes != {stated}):
        known = f", the data was made with {stated[:12]}..." if stated else ""
        problem = f"runs used {sorted(digest[:12] for digest in hashes)}{known}"
        yield Fault("sha256_tokenizer", problem, "train and score with the tokenizer that made the shards")
