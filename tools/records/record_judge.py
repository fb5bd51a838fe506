"""The judge of record.py rescore: compares what a record claims with what its model says when it cannot see the text.

Two processes run the record's code, isolated from each other and from the data (isolation.py, record_child.py):

1. The claim process has the validation text, scores it as the record does and returns the loss of every target.
2. Only then places are drawn, from the system's randomness. The blind process has no text. It gets the context of one
   place at a time, in the order of the text and at the window positions of the evaluation, and returns
   log-probabilities over all token ids. So a context never contains a target that is still to be asked for. A model
   that learns from what was scored also gets the scored tokens, chunk by chunk, as the evaluation would give them.

This file runs none of the record's code. It checks that the probabilities sum to 1, computes the losses at the places
in float64 and compares them with the claimed ones. A record that peeks, memorizes the text outside its artifact, or
changes its losses must claim lower losses than its blind distribution gives.
"""

import json
import math
import select
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import isolation
import numpy as np

from train_gpt import UserError, require

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parent
BEGIN, CONTEXT, OBSERVE = range(3)  # kinds of a request, as in record_child.py
HEADER = "<BI"
SUM_LIMIT = 1e-3  # distance of a sum of probabilities from 1, in fp32 over some thousand tokens
# Limits of the difference between claimed and blind losses in nats, by the dtype of the activations: of one place, and
# of the mean in addition to its statistical error. The claim comes from a batch and the blind answer from one window;
# their kernels may round differently. On a CPU, compiled, honest runs differed by 5e-6 in both dtypes; eager in bf16 by
# 0.04 at most.
OUTLIER = {"torch.float32": 0.01, "torch.bfloat16": 0.5}
BIAS = {"torch.float32": 1e-4, "torch.bfloat16": 1e-3}
SIGMAS = 4.0  # of the mean's statistical error: an honest record fails once in 30,000 verdicts


@dataclass
class Claim:
    """What the claim process returned: the loss of every target, NaN where none was returned, and what it says."""

    losses: np.ndarray
    answer: dict
    isolation: str


@dataclass
class Blind:
    """What the blind process returned: losses of the true tokens and sums of probabilities at some places."""

    seed: int
    places: np.ndarray
    losses: np.ndarray
    sums: np.ndarray
    isolation: str
    reached: int  # targets up to which the model was fed scored text, or all of them if it does not learn
    notes: list[str] = field(default_factory=list)


# ---------- Boxes -----------------------------------------------------------------------------------------------------


def make_box(folder: Path, files: dict[str, Path], artifact: Path, tokenizer: str) -> dict:
    """A folder that holds what a child may see: the counted files, config.env, artifact, tokenizer, tools. Its options.

    files: {name in the record: path}.
    """
    record = folder / "record"
    record.mkdir(parents=True)
    for name, path in files.items():
        shutil.copy(path, record / name)
    shutil.copy(artifact, folder / artifact.name)
    if Path(tokenizer).is_file():
        tokenizer = shutil.copy(tokenizer, folder / Path(tokenizer).name)
    tools = folder / "tools"
    tools.mkdir()
    for name in ("kernels.py", "vocabularies.py", "cpu"):
        copy = shutil.copytree if (TOOLS / name).is_dir() else shutil.copy
        copy(TOOLS / name, tools / name)
    shutil.copy(HERE / "record_child.py", folder)
    return {
        "record": str(record),
        "artifact": str(folder / artifact.name),
        "tokenizer": str(tokenizer),
        "tools": str(tools),
    }


def start(folder: Path, role: str, options: dict, hidden: list[Path], **streams) -> subprocess.Popen:
    command = [sys.executable, str(folder / "record_child.py"), role, json.dumps(options)]
    return isolation.start(command, folder, hidden, stderr=(folder / "output.txt").open("wb"), **streams)


def failure(folder: Path, role: str, code) -> UserError:
    """What a child that ended left behind, as a message."""
    lines = (folder / "output.txt").read_text(errors="replace").strip().splitlines()
    if code == isolation.NOT_ISOLATED:
        return NotIsolated("no namespaces and no Landlock for this user: run the verdict on another machine")
    said = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "no output")
    return UserError(f"the record's code ended with exit code {code} in the {role} process: {said[:300]}")


class NotIsolated(UserError):
    """The record's code was not run, because it could not be isolated."""


def layers(folder: Path) -> str:
    """The line in which the child says how it is isolated, before the record's code runs."""
    with open(folder / "output.txt", "rb") as file:
        return file.readline().decode(errors="replace").strip().partition(":")[2]


def run_claim(folder: Path, options: dict, shards: list[Path], hidden: list[Path], timeout: float | None) -> Claim:
    """Score the whole text by the record's code. `shards` are those of the validation text, and its manifest."""
    data = folder / "data"
    data.mkdir()
    for path in shards:
        shutil.copy(path, data / path.name)
    process = start(folder, "claim", options | {"data": str(data)}, hidden, stdin=subprocess.DEVNULL)
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"no score within {error.timeout:.0f} s: give a longer --timeout") from error
    finally:
        process.kill()
    if code or not (folder / "answer.json").is_file():
        raise failure(folder, "claim", code)
    losses = np.load(folder / "losses.npy", allow_pickle=False)
    require(losses.ndim == 1 and losses.dtype == np.float32, "the claim process returned no losses in fp32")
    return Claim(losses, read_answer(folder / "answer.json"), layers(folder))


ANSWER = {  # field: (type, least, most)
    "device": (str, "", "~"),
    "torch": (str, "", "~"),
    "dtype": (str, "", "~"),
    "note": (str, "", "~"),
    "val_loss": (float, 0, 1e4),
    "val_bpb": (float, 0, 1e4),
    "seconds": (float, 0, 1e9),
    "twice": (int, 0, 2**40),
    "wrong_targets": (int, 0, 2**40),
    "wrong_inputs": (int, 0, 2**60),
    "weights": (bool, 0, 1),
    "seq_len": (int, 1, 2**30),
    "stride": (int, 1, 2**30),
    "vocab_size": (int, 2, 2**16),
    "observe_every": (int | None, 0, 2**40),
}


def read_answer(path: Path) -> dict:
    """What the claim process says. It may be anything, so every field is checked."""
    answer = json.loads(path.read_text())
    for name, (kind, least, most) in ANSWER.items():
        value = answer.get(name) if isinstance(answer, dict) else None
        fits = isinstance(value, kind) and (value is None or least <= value <= most)
        require(fits, f"the claim process wrote {name}={value!r:.40} to answer.json: run the record's code unchanged")
    return answer


# ---------- The blind process -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """The windows of train_gpt.Evaluator: T inputs, every S tokens; all but the first score their last S targets."""

    length: int
    stride: int

    def window(self, target: int) -> int:
        return 0 if target < self.length else (target - self.length) // self.stride + 1

    def context(self, target: int) -> range:
        """The tokens that the score of a target may depend on, besides what the model has learned."""
        return range(self.window(target) * self.stride, target + 1)

    def first_scored(self, target: int) -> int:
        """The first target that is scored in the same window."""
        window = self.window(target)
        return window * self.stride + self.length - self.stride if window else 0


class BlindProcess:
    """A child that answers requests, one at a time."""

    def __init__(self, folder: Path, options: dict, hidden: list[Path], vocab_size: int, timeout: float | None):
        self.folder, self.vocab_size, self.timeout = folder, vocab_size, timeout
        self.process = start(folder, "blind", options, hidden, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()

    def request(self, kind: int, count: int, tokens: np.ndarray, answer_bytes: int) -> bytes:
        deadline = time.monotonic() + (self.timeout or math.inf)
        try:
            self.process.stdin.write(struct.pack(HEADER, kind, count) + tokens.astype("<u2").tobytes())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise failure(self.folder, "blind", self.process.wait()) from None
        answer = b""
        while len(answer) < answer_bytes:
            left = min(deadline - time.monotonic(), 3600)
            require(left > 0, f"the blind process did not answer within {self.timeout} s: give a longer --timeout")
            if select.select([self.process.stdout], [], [], left)[0]:
                part = self.process.stdout.read1(answer_bytes - len(answer))
                if not part:
                    raise failure(self.folder, "blind", self.process.wait())
                answer += part
        return answer

    def begin(self, targets: int):
        self.request(BEGIN, targets, np.empty(0), 1)

    def observe(self, tokens: np.ndarray):
        self.request(OBSERVE, len(tokens), tokens, 1)

    def log_probabilities(self, context: np.ndarray) -> np.ndarray:
        """[V] in float64."""
        answer = self.request(CONTEXT, len(context), context, 4 * self.vocab_size)
        return np.frombuffer(answer, "<f4").astype(np.float64)


def draw_places(seed: int, targets: int, count: int) -> np.ndarray:
    """Targets in ascending order, each at most once."""
    return np.sort(np.random.default_rng(seed).choice(targets, min(count, targets), replace=False))


def run_blind(folder, options, claim: Claim, tokens, seed: int, count: int, hidden, timeout, seconds=math.inf) -> Blind:
    """Ask for `count` places. tokens: of the validation text, whose first is no target.

    A model that learns is fed the text from its beginning. After `seconds` this ends, and later places are left out.
    """
    answer = claim.answer
    windows, chunk = Windows(answer["seq_len"], answer["stride"]), answer["observe_every"]
    targets = len(tokens) - 1
    places = draw_places(seed, targets, count)
    losses, sums, notes, observed = [], [], [], 0
    began = time.monotonic()
    with BlindProcess(folder, options, hidden, answer["vocab_size"], timeout) as process:
        if chunk:
            process.begin(targets)
        for place in places:
            place = int(place)
            while chunk and (observed + 1) * chunk <= windows.first_scored(place):
                process.observe(tokens[observed * chunk : observed * chunk + chunk + 1])
                observed += 1
                if time.monotonic() - began > seconds:
                    break
            if time.monotonic() - began > seconds:
                notes.append(f"stopped after {seconds:.0f} s at target {place} of {targets}")
                break
            context = windows.context(place)
            found = process.log_probabilities(tokens[context.start : context.stop])
            with np.errstate(over="ignore"):
                sums.append(float(np.exp(found).sum()))
            losses.append(-float(found[tokens[place + 1]]))
        reached = place if notes else targets
    done = len(losses)
    return Blind(seed, places[:done], np.array(losses), np.array(sums), layers(folder), reached, notes)


# ---------- The comparison --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Claimed minus blind losses, in nats."""

    mean: float
    error: float  # standard error of the mean
    outlier: float  # the largest difference, with its sign
    places: int
    bias_limit: float
    outlier_limit: float

    @property
    def holds(self) -> bool:
        return abs(self.mean) <= self.bias_limit + SIGMAS * self.error and abs(self.outlier) <= self.outlier_limit

    @property
    def detectable(self) -> float:
        """A lowering of all losses, in nats, that would have been found with a probability of 95%."""
        return self.bias_limit + (SIGMAS + 1.645) * self.error

    @property
    def rare(self) -> float:
        """The fraction of targets whose losses, lowered by more than the outlier limit, would have been found so."""
        return 1 - 0.05 ** (1 / self.places)

    def __str__(self) -> str:
        return (
            f"claimed minus blind losses at {self.places} places: mean {self.mean:+.2e} +- {self.error:.1e} nats, "
            f"largest {self.outlier:+.2e}; limits {self.bias_limit:g} + {SIGMAS:g} standard errors and "
            f"{self.outlier_limit:g}. Found with 95% probability: all losses lowered by {self.detectable:.1e} nats, or "
            f"{self.rare:.2%} of them by more than {self.outlier_limit:g}"
        )


def compare(claim: Claim, blind: Blind) -> Comparison:
    with np.errstate(invalid="ignore"):
        difference = claim.losses[blind.places].astype(np.float64) - blind.losses
    # NaN and infinity are differences, too, unless both say the same.
    both_infinite = np.isinf(claim.losses[blind.places]) & np.isinf(blind.losses)
    difference = np.where(both_infinite, 0.0, difference)
    difference = np.where(np.isfinite(difference), difference, np.inf)
    n = len(difference)
    spread = float(difference.std(ddof=1)) / math.sqrt(n) if n > 1 and np.isfinite(difference).all() else math.inf
    largest = float(difference[np.argmax(np.abs(difference))])
    dtype = claim.answer["dtype"]
    limits = BIAS.get(dtype, BIAS["torch.bfloat16"]), OUTLIER.get(dtype, OUTLIER["torch.bfloat16"])
    return Comparison(float(difference.mean()), spread, largest, n, *limits)
