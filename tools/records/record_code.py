"""Checks of what a record ships: the script that ran, all code counted, the size, the configuration, the tokenizer."""

import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from record_folder import Finding, Record, Skip, sha256
from record_read import sources_of

# Knobs that may differ between the seeds of a record: they do not shape what is trained or scored.
MAY_DIFFER = {
    "SEED",
    "LOG_DIR",
    "DATA_PATH",
    "TOKENIZER_PATH",
    "CHECKPOINT_EVERY_SECONDS",
    "TRAIN_LOG_EVERY",
    "VAL_LOSS_EVERY",
    "VAL_AT_START",
    "MICRO_BATCH_TOKENS",
    "SAMPLE_PROMPT",
    "SAMPLE_TOKENS",
    "TEMPERATURE",
    "TOP_K",
    "TARGET_WORLD_SIZE",
}


def plain_size(path: Path) -> set[int]:
    """Bytes of a text file, and of the same with the other line ends: git may have changed them at checkout."""
    data = path.read_bytes()
    unix = data.replace(b"\r\n", b"\n")
    return {len(data), len(unix), len(unix) + unix.count(b"\n")}


def check_script(record: Record) -> Iterator[Finding | Skip]:
    """The files are the code that ran: hashes of result.json, or the source that a public log holds."""
    judged = False
    for run in record.runs:
        for name, stated in sources_of(run.result).items() if run.result else ():
            path = record.folder / name
            if stated["sha256"] and path.is_file():
                judged = True
                if sha256(path) != stated["sha256"]:
                    yield Finding(
                        "script",
                        name,
                        f"is not the file that ran ({run.name} has sha256 {stated['sha256'][:12]}...)",
                        "ship the copy in the run folder, or run again",
                    )
        path = record.folder / "train_gpt.py"
        if run.log and path.is_file() and not run.result:
            text = path.read_text(encoding="utf-8", errors="replace").split()
            if run.log.source is not None:
                judged = True
                if run.log.source.split() != text:
                    yield Finding(
                        "script",
                        "train_gpt.py",
                        f"differs from the source in {run.name}",
                        "ship the script that made the log",
                    )
            elif run.log.code_bytes:
                judged = True
                together = sum(p.stat().st_size for p in record.folder.glob("*.py"))
                if not run.log.code_bytes & (plain_size(path) | {together}):
                    yield Finding(
                        "script",
                        "train_gpt.py",
                        f"has {len(path.read_bytes())} bytes, {run.name} logged {sorted(run.log.code_bytes)}",
                        "ship the script that made the log",
                    )
    if not judged:
        yield Skip("no log or result tells the hash, the text or the size of its code")


def check_code(record: Record) -> Iterator[Finding | Skip]:
    """Bytes of code: all of it counted, and the count that of the files."""
    claim, remedy = record.claim, "count every source file that shapes the run, in bytes, as result.json does"
    files = {path.name for path in record.folder.rglob("*.py")}
    if record.ours:
        for name in sorted(files - set(record.sources)):
            yield Finding("code", name, "is neither hashed nor counted in bytes_code", remedy)
        stated = {run.result.get("bytes_code") for run in record.runs}
        if len(stated) > 1:
            yield Finding("code", "result_seed*.json", f"bytes_code differs between seeds: {sorted(stated)}", remedy)
        paths = [record.folder / name for name in record.sources]
        shipped = all(
            path.is_file() and sha256(path) == source["sha256"]
            for path, source in zip(paths, record.sources.values(), strict=True)
        )
        counted = (
            sum(path.stat().st_size for path in paths)
            if shipped
            else sum(source["bytes"] for source in record.sources.values())
        )
        logged = set().union(*(run.log.code_bytes for run in record.runs if run.log))
        wrong = (stated | logged) - {counted}
        if len(stated) == 1 and wrong:
            yield Finding("code", "bytes_code", f"is {sorted(wrong)}, the sources have {counted}", remedy)
        allowed = {counted}
    else:
        sizes = [plain_size(path) for path in record.folder.glob("*.py")]
        allowed = set().union(*sizes, *(run.log.code_bytes for run in record.runs if run.log))
        allowed |= {sum(map(end, sizes)) for end in (min, max) if sizes}  # all files, with either line end
    if not claim or claim.bytes_code is None or not allowed:
        yield Skip("no claimed bytes of code" if allowed else "no script")
    elif int(claim.bytes_code) not in allowed:
        yield Finding(
            "code",
            "submission.json: bytes_code",
            f"claims {claim.bytes_code}, the code has {', '.join(map(str, sorted(allowed)[:3]))}",
            remedy,
        )


def check_artifact(record: Record) -> Iterator[Finding | Skip]:
    """The artifact in the folder, if there is one, is that of a run, by its hash and its size."""
    made = {run.result["sha256_artifact"]: run.result["bytes_artifact"] for run in record.runs if run.result}
    files = sorted(record.folder.glob("final_model.*.ptz"))
    if not files or not made:
        yield Skip("the folder holds no artifact" if made else "no result tells the hash of an artifact")
    for path in files if made else ():
        if made.get(sha256(path)) != path.stat().st_size:
            yield Finding("artifact", path.name, "is the artifact of none of the runs", "ship the one that was scored")


def check_size(record: Record) -> Iterator[Finding | Skip]:
    """Code plus artifact: the sum, the claim, the limit in decimal bytes."""
    claim, limit, remedy = record.claim, record.track.bytes, "take the total that the run logged"
    totals = {}
    for run in record.runs:
        total = run.bytes_total
        if run.result:
            code, artifact = run.result.get("bytes_code"), run.result.get("bytes_artifact")
            if None not in (code, artifact, total) and code + artifact != run.result["bytes_total"]:
                yield Finding(
                    "size",
                    run.result_path.name,
                    f"bytes_total is {run.result['bytes_total']}, code and artifact are {code + artifact}",
                    remedy,
                )
                continue
            if "bytes_total" in run.contradictions:
                yield Finding(
                    "size",
                    record.log_of(run),
                    f"logs {run.log.total_bytes} bytes, {run.result_path.name} says {run.result['bytes_total']}",
                    remedy,
                )
                continue
        if total:
            totals[run.name] = total
    stated = int(claim.bytes_total) if claim and claim.bytes_total is not None else None
    largest = max(totals.values(), default=stated)
    if largest is None:
        yield Skip("no log, result or claim states a size")
        return
    if limit and largest > limit:
        yield Finding(
            "size",
            max(totals, key=totals.get, default="submission.json"),
            f"{largest} bytes of code and artifact exceed {limit} (decimal: {limit // 10**6} MB are not MiB)",
            "make it smaller: fewer bits, FIT_SIZE=1, or a smaller model",
        )
    if stated is not None and totals and not known_total(record, stated, totals):
        yield Finding(
            "size", "submission.json: bytes_total", f"claims {stated}, the largest of the seeds is {largest}", remedy
        )


def known_total(record: Record, stated: int, totals: dict[str, int]) -> bool:
    """Ours states the largest total; public folders also the artifact alone, the mean, or any seed's."""
    values = list(totals.values())
    if record.ours:
        return stated == max(values)
    artifacts = [run.log.artifact_bytes for run in record.runs if run.log and run.log.artifact_bytes]
    known = (
        set(values)
        | set(artifacts)
        | {int(fields["bytes_total"]) for fields in record.claim.seeds.values() if "bytes_total" in fields}
    )
    return stated in known or any(abs(stated - statistics.fmean(v)) <= 1 for v in (values, artifacts) if v)


def check_config(record: Record) -> Iterator[Finding | Skip]:
    if not (record.folder / "config.env").exists() or not any(run.log and run.log.knobs for run in record.runs):
        yield Skip("no config.env, or no log that prints its configuration")
        return
    for run in record.runs:
        logged = run.log.knobs if run.log else {}
        odd = [
            name
            for name in sorted(record.config.keys() & logged.keys() - MAY_DIFFER)
            if record.config[name] != logged[name]
        ]
        odd += sorted((record.config.keys() ^ logged.keys()) - MAY_DIFFER) if logged else []
        if odd:
            told = ", ".join(f"{n}={record.config.get(n, 'unset')} (log: {logged.get(n, 'unset')})" for n in odd[:3])
            yield Finding(
                "config",
                "config.env",
                f"is not the configuration of {record.log_of(run)}: {told}",
                "take config.env of the run folder; all seeds must run the same",
            )


def check_compile(record: Record) -> Iterator[Finding | Skip]:
    """The sources are Python. Newer syntax than this interpreter's is tried with a newer one, if there is one."""
    paths = sorted({*record.folder.glob("*train*.py"), *(record.folder / name for name in record.sources)})
    paths = [path for path in paths if path.is_file()]
    versions = range(20, sys.version_info.minor, -1)
    newer = next(filter(None, (shutil.which(f"python3.{minor}") for minor in versions)), None)
    for path in paths:
        try:
            compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            ran = [run.result.get("python", "") for run in record.runs if run.result]
            same = any(text.split(".")[:2] == [str(n) for n in sys.version_info[:2]] for text in ran)
            command = [newer, "-c", "import sys; compile(open(sys.argv[1], 'rb').read(), sys.argv[1], 'exec')", path]
            if same or (newer and subprocess.run(command, capture_output=True, check=False).returncode):
                yield Finding(
                    "compile",
                    f"{path.name}:{getattr(error, 'lineno', 0)}",
                    f"is no Python: {error.args[0]}",
                    "ship the script that ran",
                )
            elif not newer:
                yield Skip(f"{path.name} does not compile on Python {sys.version.split()[0]}, and no newer one is here")
    if not paths:
        yield Skip("no script")


def check_tokenizer(record: Record) -> Iterator[Finding | Skip]:
    hashes = {run.result.get("sha256_tokenizer") for run in record.runs if run.result} - {None}
    stated = record.manifest.get("tokenizer", {})
    stated = stated.get("sha256") if stated.get("kind") == "sentencepiece" else None
    if not hashes:
        yield Skip("no result tells the hash of its tokenizer")
    elif len(hashes) > 1 or (stated and hashes != {stated}):
        known = f", the data was made with {stated[:12]}..." if stated else ""
        yield Finding(
            "tokenizer",
            "sha256_tokenizer",
            f"runs used {sorted(h[:12] for h in hashes)}{known}",
            "train and score with the tokenizer that made the shards",
        )
