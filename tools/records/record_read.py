"""Reads what runs leave behind: run folders of train_gpt.py, records made of them, folders of the public challenge.

A run has up to two witnesses, its log and its result.json. Where both speak and agree to the digits of the log, the
value is that of result.json, which has more of them; where they differ it is the log's, and record_check says so. What
nobody says is None. Nothing here judges.
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
# Labels of scores of weights that are not those of the artifact, in the logs of the public challenge.
BEFORE_EXPORT = re.compile(r"pre.?quant|post.?ema|post.?swa|unquantized|raw.?(model|weights)", re.IGNORECASE)


def is_number(value) -> bool:
    """Whether a value of a JSON file is a finite number; NaN and Infinity pass as JSON in Python, and true as 1."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def digits(number: Decimal) -> float:
    """The value of a number's last written digit: 1e-4 for 1.2032. Scores agree if they differ by at most that."""
    return 10.0 ** number.as_tuple().exponent


def agree(exact: float, written: Decimal, coarsest: float = 1.0) -> bool:
    """Whether a number is `written`, rounded or cut to its digits; fewer than `coarsest` has are not taken for an
    excuse."""
    return abs(exact - float(written)) <= min(digits(written), coarsest) * (1 + 1e-6)


@dataclass(frozen=True)
class Score:
    """A line of a log that scores a model after its training."""

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
    """What a training log says; times in milliseconds, sizes in bytes, `tokens` the targets of the validation text."""

    path: Path
    text: str
    seeds: set[int] = field(default_factory=set)
    scores: list[Score] = field(default_factory=list)
    knobs: dict[str, str] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)  # knobs that the log marks as other than the defaults

    @property
    def final(self) -> Score | None:
        """The score of record: the last exact one of the artifact, or the last one with fewer digits."""
        scores = [score for score in self.scores if not score.before_export]
        exact = [score for score in scores if "exact" in score.label]
        return (exact or scores or [None])[-1]

    @cached_property
    def body(self) -> str:
        """What the run printed: all but its source, which names defaults that the run may not have had."""
        return self.text[len(self.source or "") :]

    def last(self, pattern: str, kind=int):
        """The group of the last match, as `kind`."""
        found = re.findall(pattern, self.body, re.MULTILINE)
        return kind(found[-1]) if found else None

    def last_of(self, *patterns: str) -> int | None:
        """The number of the first pattern that is found."""
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
        """Of the score of record; public scripts that learn while they score also print a total, and others state the
        time on a line of the same score with another name."""
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
        """Several where a script logs its code both plain and compressed."""
        return {int(n) for n in re.findall(r"^Code size[^:\n]*: ?(\d+)", self.body, re.MULTILINE)}

    @cached_property
    def total_bytes(self) -> int | None:
        """Of the compressed artifact and the code: the line with a tag after `size`."""
        return self.last(r"^Total submission size \S[^:\n]*: ?(\d+)")

    @cached_property
    def artifact_bytes(self) -> int | None:
        return self.last(r"^Serialized model \S[^:\n]*: ?(\d+)")

    @cached_property
    def source(self) -> str | None:
        """The script, which the public reference writes into its log in front of a line of equals signs."""
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
    """One seed: its log and, if train_gpt.py of this repository ran it, its result.json and metrics.jsonl."""

    name: str
    log: Log | None = None
    result: dict | None = None
    result_path: Path | None = None
    metrics_path: Path | None = None

    @property
    def witness(self) -> Log | None:
        """The log, unless it is that of another seed than the result's."""
        other = self.log and self.result and self.log.seeds and self.result.get("seed") not in self.log.seeds
        return None if other else self.log

    def _logged(self, key: str):
        return getattr(self.witness, key) if self.witness else None

    def _value(self, key: str, logged, scale: float = 1.0):
        """`key` of result.json where it agrees with what the log says, else the latter."""
        stated = (self.result or {}).get(key)
        if logged is None or (stated is not None and agree(stated * scale, Decimal(str(logged)))):
            return stated
        return float(logged) / scale if isinstance(logged, Decimal | float) or scale != 1 else logged

    @property
    def contradictions(self) -> list[str]:
        """Keys of result.json that its log contradicts."""
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
        """Targets that were scored."""
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
        """The log's, unless result.json counts as much or more (a calibration after the last step is training)."""
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
        """Bytes of text that a score was divided by: tokens * loss / (ln 2 * BPB)."""
        if not (self.tokens and self.val_loss and self.val_bpb):
            return None
        return self.tokens * self.val_loss / (math.log(2) * self.val_bpb)

    def metrics(self) -> list[dict]:
        """Lines of metrics.jsonl by step: their finite numbers, and `partial`. A resumed run wrote some steps twice:
        the later line counts. What is no such line is left out, as the last one of a run that is still writing."""
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
    """{file: {sha256, bytes}} of the code that shaped a run; older results know the script alone."""
    script = {"sha256": result.get("sha256_code"), "bytes": result.get("bytes_code")}
    return result.get("sources") or {"train_gpt.py": script}


def read_json(path: Path) -> dict:
    """The object in a file; UserError for anything else."""
    remedy = "take the file that the run wrote"
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or too deep
        raise UserError(f"{path} is no JSON ({error}): {remedy}") from error
    require(isinstance(value, dict), f"{path} holds a {type(value).__name__}, expected an object: {remedy}")
    return value


# What the tools read of result.json and manifest.json. A value is of the kind that is named here, an object of others,
# or null, which is the same as not there. Other fields may follow.
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
    """An object, and the objects in it, without the keys that are null."""
    if not isinstance(value, dict):
        return value
    return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}


def misfits(value, kind, name: str) -> list[str]:
    """What is wrong with a value, and inside of it, as text."""
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
    """The object in a JSON file, without its nulls; UserError for a field of another kind, or one of `needed` that is
    not there."""
    value = without_nulls(read_json(path))
    problems = misfits(value, kind, "")
    problems += [f"{name} is missing" for name in sorted(needed - value.keys())]
    for name, source in value.get("sources", {}).items() if not problems else ():
        if Path(name).is_absolute() or ".." in Path(name).parts or len(source.keys() & {"sha256", "bytes"}) < 2:
            problems.append(f"sources.{name} is {source}, expected sha256 and bytes of a file inside the folder")
    require(not problems, f"{path}: {'; '.join(problems[:3])}: take the file that the run wrote")
    return value


def read_result(path: Path, whole: bool = False) -> dict:
    """A run's result.json; `whole` if a record needs it, and not what any script may write."""
    return read_shaped(path, RESULT, RESULT.keys() - MAY_LACK if whole else set())


def read_manifest(path: Path) -> dict:
    """The manifest.json of data, or nothing where there is none."""
    return read_shaped(path, MANIFEST, set()) if path.is_file() else {}


def read_run(folder: Path) -> Run:
    """A run folder, finished or not."""
    log = folder / "train.log"
    require(log.is_file(), f"{folder} has no train.log: expected logs/<run_id>, a run folder of train_gpt.py")
    path = folder / "result.json"
    result = read_result(path) if path.is_file() else None
    return Run(folder.name, parse_log(log), result, path, folder / "metrics.jsonl")


def record_runs(folder: Path) -> list[Run]:
    """The runs of a record folder: result_seed*.json with their logs, or else every file that looks like a log."""
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
            if log.final or log.steps:  # other text files are none of our business
                runs.append(Run(path.relative_to(folder).as_posix(), log))
    return runs


def is_record(folder: Path) -> bool:
    return (folder / "submission.json").is_file()


def read_group(spec: str) -> list[Run]:
    """The runs of `spec`: a record folder, a run folder, or several run folders by a glob or with commas between."""
    folders = [Path(path) for part in spec.split(",") for path in (sorted(glob.glob(part)) or [part])]
    missing, remedy = [str(folder) for folder in folders if not folder.is_dir()], "give run folders or a record"
    require(not missing, f"{', '.join(missing)}: no such folder: {remedy}")
    runs = [run for folder in folders for run in (record_runs(folder) if is_record(folder) else [read_run(folder)])]
    require(runs, f"{spec} holds no logs: {remedy}")
    return runs
