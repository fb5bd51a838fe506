"""Parse the output of runs: train_gpt.py run folders, records built from them, and folders of the public challenge.

A run is described by its log, its result.json, or both. If both state a value and agree to the log's precision, the
value comes from result.json, which has more digits. If they disagree, it comes from the log, and record_check reports
the contradiction. Values that neither file states are None. This module only reads; record_check.py does the checking.
"""

import glob
import json
import math
import re
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from pathlib import Path

from train_gpt import UserError, require

ROOT = Path(__file__).resolve().parents[2]
LOG_SUFFIXES = (".log", ".txt", ".out")
# Score labels in public challenge logs that refer to weights before export, not to the artifact.
BEFORE_EXPORT = re.compile(r"pre.?quant|post.?ema|post.?swa|unquantized|raw.?(model|weights)", re.IGNORECASE)


def is_number(value) -> bool:
    """Return True for a finite JSON number. Rejects NaN and Infinity, which Python's JSON parser accepts, and booleans,
    which Python counts as integers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def digits(number: Decimal) -> float:
    """Return the place value of a number's last digit: 1e-4 for 1.2032. Scores agree if they differ by at most that."""
    return 10.0 ** number.as_tuple().exponent


def agree(exact: float, written: Decimal, coarsest: float = 1.0) -> bool:
    """Return True if `written` is `exact` rounded or truncated to the digits of `written`. The tolerance is capped at
    `coarsest`, so a number with very few digits does not match everything."""
    return abs(exact - float(written)) <= min(digits(written), coarsest) * (1 + 1e-6)


@dataclass(frozen=True)
class Score:
    """A log line with a score computed after training."""

    label: str
    loss: Decimal
    bpb: Decimal
    line: int
    partial: bool

    def value(self, key: str) -> Decimal:
        return {"val_loss": self.loss, "val_bpb": self.bpb}[key]

    @property
    def before_export(self) -> bool:
        return bool(BEFORE_EXPORT.search(self.label))


@dataclass
class Log:
    """A parsed training log. Times are in milliseconds, sizes in bytes; `tokens` counts validation targets."""

    path: Path
    text: str
    seeds: set[int] = field(default_factory=set)
    scores: list[Score] = field(default_factory=list)
    knobs: dict[str, str] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)  # knobs that the log marks as non-default

    @property
    def final(self) -> Score | None:
        """The final score: the last full-precision (`exact`) score of the artifact, else its last rounded one."""
        scores = [score for score in self.scores if not score.before_export]
        exact = [score for score in scores if "exact" in score.label]
        return (exact or scores or [None])[-1]

    @cached_property
    def body(self) -> str:
        """The log without the script's source, whose default values may differ from the run's settings."""
        return self.text[len(self.source or "") :]

    def last(self, pattern: str, kind=int):
        """Return the captured group of the last match, converted by `kind`, or None."""
        found = re.findall(pattern, self.body, re.MULTILINE)
        return kind(found[-1]) if found else None

    def last_of(self, *patterns: str) -> int | None:
        """Return the last number captured by the first pattern that matches."""
        return next(filter(None, map(self.last, patterns)), None)

    @cached_property
    def tokens(self) -> int | None:
        return self.last_of(r"^val_loader:.*\btokens: ?(\d+)", r"target_tokens: ?(\d+)", r"^val_tokens: ?(\d+)")

    @cached_property
    def train_ms(self) -> float | None:
        stopped = self.last(r"^stopping_early:.*train_time: ?(\d+)ms")
        minutes = self.last(r"train_time: ?([\d.]+)m(?!s)", float)
        last = self.last(r"^step:.*train_time: ?(\d+)ms")
        return stopped or last or (minutes and 60_000 * minutes)

    @cached_property
    def eval_ms(self) -> float | None:
        """Evaluation time of the final score. Public scripts with test-time training also print a total; others print
        the time on a line with the same score under another label."""
        total = self.last(r"^total_eval_time: ?([\d.]+)s", float)
        if total or not self.final:
            return total * 1000 if total else self.last(r"^final .*eval_time: ?(\d+)ms")
        labels = [s.label for s in self.scores if not s.before_export and agree(float(self.final.bpb), s.bpb)]
        names = [self.final.label.replace("_exact", ""), *reversed(labels)]
        times = (self.last(rf"^{re.escape(name)}[ :].*eval_time: ?(\d+)ms") for name in names)
        return next((time for time in times if time is not None), None)

    @cached_property
    def steps(self) -> int | None:
        return self.last_of(r"^stopping_early:.*step: ?(\d+)", r"^step: ?(\d+)/", r"^(\d+)/\d+ (?:train|val)_loss")

    @cached_property
    def code_bytes(self) -> set[int]:
        """Code sizes in the log; more than one if the script logs both its plain and its compressed size."""
        return {int(n) for n in re.findall(r"^Code size[^:\n]*: ?(\d+)", self.body, re.MULTILINE)}

    @cached_property
    def total_bytes(self) -> int | None:
        """Size of compressed artifact plus code, from the line that has the codec's name after `size`."""
        return self.last(r"^Total submission size \S[^:\n]*: ?(\d+)")

    @cached_property
    def artifact_bytes(self) -> int | None:
        return self.last(r"^Serialized model \S[^:\n]*: ?(\d+)")

    @cached_property
    def source(self) -> str | None:
        """The script's source, which the public reference logs before a line of equals signs."""
        head, ruler, _ = self.text.partition("\n" + "=" * 100)
        return head if ruler and re.search(r"^import torch", head, re.MULTILINE) else None


def parse_log(path: Path) -> Log:
    text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
    log = Log(path, text)
    skipped = text.count("\n", 0, len(text) - len(log.body))
    for number, line in enumerate(log.body.splitlines(), 1 + skipped):
        if match := re.match(r"(?:seed|\s+seed): ?(\d+)\s*$", line):
            log.seeds.add(int(match[1]))
        elif match := re.match(r"([* ]) ([A-Z][A-Z0-9_]+)=(.*)$", line):
            log.knobs[match[2]] = match[3]
            log.changed |= {match[2]} if match[1] == "*" else set()
        elif match := re.match(r"(\S.*?)[ :]+val_loss: ?(\d+\.\d+)\s+val_bpb: ?(\d+\.\d+)(.*)", line):
            if not re.match(r"(step: ?)?\d+/\d+", match[1]):
                score = Score(match[1], Decimal(match[2]), Decimal(match[3]), number, "partial:" in match[4])
                log.scores.append(score)
    if not log.seeds and (match := re.search(r"seed[_-]?(\d+)", path.stem)):
        log.seeds.add(int(match[1]))
    return log


@dataclass
class Run:
    """One seed: its log and, if it was run by this repository's train_gpt.py, its result.json and metrics.jsonl."""

    name: str
    log: Log | None = None
    result: dict | None = None
    result_path: Path | None = None
    metrics_path: Path | None = None

    @property
    def witness(self) -> Log | None:
        """The log, or None if its seed differs from the seed in result.json."""
        other = self.log and self.result and self.log.seeds and self.result.get("seed") not in self.log.seeds
        return None if other else self.log

    def _logged(self, key: str):
        return getattr(self.witness, key) if self.witness else None

    def _value(self, key: str, logged, scale: float = 1.0):
        """Return `key` of result.json if it agrees with the logged value, else the logged value divided by `scale`."""
        stated = (self.result or {}).get(key)
        if logged is None or (stated is not None and agree(stated * scale, Decimal(str(logged)))):
            return stated
        return float(logged) / scale if isinstance(logged, Decimal | float) or scale != 1 else logged

    @property
    def contradictions(self) -> list[str]:
        """Keys of result.json whose values differ from the log."""
        if not self.result or not self.witness:
            return []
        final = self.witness.final
        logged = {"val_loss": final.loss, "val_bpb": final.bpb} if final else {}
        odd = [key for key, written in logged.items() if not agree(self.result.get(key) or 0, written)]
        total = self.witness.total_bytes
        return odd + ["bytes_total"] * (total is not None and total != self.result.get("bytes_total"))

    @property
    def seed(self) -> int | None:
        if self.result:
            return self.result.get("seed")
        return next(iter(self.log.seeds), None) if self.log and len(self.log.seeds) == 1 else None

    @property
    def val_loss(self) -> float | None:
        final = self._logged("final")
        return self._value("val_loss", final and final.loss)

    @property
    def val_bpb(self) -> float | None:
        final = self._logged("final")
        return self._value("val_bpb", final and final.bpb)

    @property
    def tokens(self) -> int | None:
        """Number of scored targets."""
        return self._value("scored_tokens", None if self.partial else self._logged("tokens"))

    @property
    def pre_quant_val_bpb(self) -> float | None:
        return (self.result or {}).get("pre_quant_val_bpb")

    @property
    def partial(self) -> bool:
        final = self._logged("final")
        return bool(final and final.partial) or bool((self.result or {}).get("partial"))

    @property
    def train_seconds(self) -> float | None:
        """Training time: result.json's, unless it is lower than the log's. It may be higher because calibration after
        the last step counts as training."""
        stated, logged = (self.result or {}).get("seconds", {}).get("training"), self._logged("train_ms")
        if stated is None or (logged is not None and 1000 * stated < logged - 1):
            return logged if logged is None else logged / 1000
        return stated

    @property
    def eval_seconds(self) -> float | None:
        return self._value("eval_seconds", self._logged("eval_ms"), scale=1000)

    @property
    def steps(self) -> int | None:
        return self._value("steps", self._logged("steps"))

    @property
    def step_ms(self) -> float | None:
        return 1000 * self.train_seconds / self.steps if self.steps and self.train_seconds else None

    @property
    def bytes_total(self) -> int | None:
        return self._value("bytes_total", self._logged("total_bytes"))

    @property
    def tokens_per_step(self) -> float | None:
        if self.result and self.result.get("steps"):
            return self.result["train_tokens"] / self.result["steps"]
        batch = self.log.knobs.get("TRAIN_BATCH_TOKENS") if self.log else None
        return float(batch) if batch else self.log and self.log.last(r"train_batch_tokens: ?(\d+)", float)

    @property
    def implied_bytes(self) -> float | None:
        """Byte count implied by the score: tokens * loss / (ln 2 * BPB)."""
        if not (self.tokens and self.val_loss and self.val_bpb):
            return None
        return self.tokens * self.val_loss / (math.log(2) * self.val_bpb)

    def metrics(self) -> list[dict]:
        """Return the lines of metrics.jsonl sorted by step, reduced to finite numbers and `partial`.

        A resumed run may write a step twice; the later line wins. Malformed lines are skipped, such as an unfinished
        last line of an active run."""
        if not self.metrics_path or not self.metrics_path.is_file():
            return []
        kept = {}
        for line in self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(found, dict) and is_number(found.get("step")):
                entry = {key: value for key, value in found.items() if is_number(value) or key == "partial"}
                kept[entry["step"], "val_loss" in entry] = entry
        return [kept[key] for key in sorted(kept)]


def sources_of(result: dict) -> dict[str, dict]:
    """Return {file: {sha256, bytes}} of a run's source files. Older results list only the script."""
    script = {"sha256": result.get("sha256_code"), "bytes": result.get("bytes_code")}
    return result.get("sources") or {"train_gpt.py": script}


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises UserError if the file is unreadable or holds anything else."""
    remedy = "take the file that the run wrote"
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deep
        raise UserError(f"{path} is no JSON ({error}): {remedy}") from error
    require(isinstance(value, dict), f"{path} holds a {type(value).__name__}, expected an object: {remedy}")
    return value


# Schemas for the fields that the tools read from result.json and manifest.json: each value has the type listed here, is
# an object of such values, or is null, which is treated as missing. Additional fields are allowed.
COUNT, NUMBER, TEXT, FLAG, ANY = "a whole number", "a number", "a text", "true or false", "anything"
RESULT = {
    **dict.fromkeys(("seed", "steps", "scored_tokens", "scored_bytes", "world_size"), COUNT),
    **dict.fromkeys(("bytes_artifact", "bytes_code", "bytes_total"), COUNT),
    **dict.fromkeys(("val_loss", "val_bpb", "pre_quant_val_loss", "pre_quant_val_bpb"), NUMBER),
    **dict.fromkeys(("eval_seconds", "train_tokens"), NUMBER),
    **dict.fromkeys(("device", "dtype", "torch", "python", "platform"), TEXT),
    **dict.fromkeys(("sha256_code", "sha256_val_tokens", "sha256_tokenizer", "sha256_artifact"), TEXT),
    "partial": FLAG,
    "seconds": {"training": NUMBER},
    "sources": {"*": {"sha256": TEXT, "bytes": COUNT}},
}
MAY_LACK = {"sources", "partial", "sha256_tokenizer", "sha256_val_tokens", "pre_quant_val_loss"}
MAY_BE_ZERO = {"seed", "eval_seconds", "start", "bos_id", "duplicates_of_validation"}
MANIFEST = {
    "tokenizer": {"kind": TEXT, "sha256": TEXT, "start": COUNT, "options": {"bos_id": COUNT}},
    "splits": {"val": {"tokens": COUNT, "bytes": COUNT, "token_bytes": COUNT}},
    "dropped": {"duplicates_of_validation": COUNT},
}


def without_nulls(value):
    """Remove null values from an object, recursively."""
    if not isinstance(value, dict):
        return value
    return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}


def misfits(value, kind, name: str) -> list[str]:
    """Return descriptions of all schema violations in a value, recursively."""
    if kind == ANY:
        return []
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            return [f"{name} is {value!r:.40}, expected an object"]
        inside = [(key, kind.get(key, kind.get("*", ANY))) for key in value]
        return [problem for key, of in inside for problem in misfits(value[key], of, f"{name}.{key}".lstrip("."))]
    if kind in (COUNT, NUMBER):
        fits = is_number(value) and (kind == NUMBER or value == int(value))
        good = fits and (value > 0 or (value == 0 and name.rpartition(".")[2] in MAY_BE_ZERO))
    else:
        good = isinstance(value, str if kind == TEXT else bool)
    return [] if good else [f"{name} is {value!r:.40}, expected {kind}"]


def read_shaped(path: Path, kind: dict, needed: set[str]) -> dict:
    """Read a JSON object and drop its nulls. Raises UserError if a field has the wrong type or a field in `needed` is
    missing."""
    value = without_nulls(read_json(path))
    problems = misfits(value, kind, "")
    problems += [f"{name} is missing" for name in sorted(needed - value.keys())]
    for name, source in value.get("sources", {}).items() if not problems else ():
        if Path(name).is_absolute() or ".." in Path(name).parts or len(source.keys() & {"sha256", "bytes"}) < 2:
            problems.append(f"sources.{name} is {source}, expected sha256 and bytes of a file inside the folder")
    require(not problems, f"{path}: {'; '.join(problems[:3])}: take the file that the run wrote")
    return value


def read_result(path: Path, whole: bool = False) -> dict:
    """Read a run's result.json. `whole` requires every field that a record needs; other scripts may write fewer."""
    return read_shaped(path, RESULT, RESULT.keys() - MAY_LACK if whole else set())


def read_manifest(path: Path) -> dict:
    """Read a dataset's manifest.json; {} if the file does not exist."""
    return read_shaped(path, MANIFEST, set()) if path.is_file() else {}


def read_run(folder: Path) -> Run:
    """Read a run folder, finished or not. Raises UserError if it has no train.log."""
    log = folder / "train.log"
    require(log.is_file(), f"{folder} has no train.log: expected logs/<run_id>, a run folder of train_gpt.py")
    path = folder / "result.json"
    result = read_result(path) if path.is_file() else None
    return Run(folder.name, parse_log(log), result, path, folder / "metrics.jsonl")


def record_runs(folder: Path) -> list[Run]:
    """Read the runs of a record folder: result_seed*.json and their logs or, if there are none, every log file."""
    results = sorted(folder.glob("result_seed*.json"), key=lambda path: (len(path.name), path.name))
    runs = []
    for path in results:
        seed = path.stem.removeprefix("result_seed")
        log = folder / f"train_seed{seed}.log"
        parsed = parse_log(log) if log.is_file() else None
        runs.append(Run(f"seed {seed}", parsed, read_result(path, True), path, folder / f"metrics_seed{seed}.jsonl"))
    for path in sorted(folder.rglob("*")) if not results else []:
        if path.suffix in LOG_SUFFIXES and path.is_file() and "requirements" not in path.name:
            log = parse_log(path)
            if log.final or log.steps:  # skip other text files
                runs.append(Run(path.relative_to(folder).as_posix(), log))
    return runs


def is_record(folder: Path) -> bool:
    return (folder / "submission.json").is_file()


def read_group(spec: str) -> list[Run]:
    """Read the runs of `spec`: a record folder, a run folder, or several of them as a glob or comma-separated list."""
    folders = [Path(path) for part in spec.split(",") for path in (sorted(glob.glob(part)) or [part])]
    missing, remedy = [str(folder) for folder in folders if not folder.is_dir()], "give run folders or a record"
    require(not missing, f"{', '.join(missing)}: no such folder: {remedy}")
    runs = [run for folder in folders for run in (record_runs(folder) if is_record(folder) else [read_run(folder)])]
    require(runs, f"{spec} holds no logs: {remedy}")
    return runs
