"""Train the best small GPT that fits 600 seconds and 16,000,000 bytes, scored in bits per byte of held-out text.

    python train_gpt.py                                      one process, on whatever device this machine has
    python train_gpt.py records/recipes/demo_cpu.env         a configuration file of KEY=VALUE lines
    SEED=1338 MATRIX_LR=0.03 python train_gpt.py             every knob is an environment variable
    MODEL_FILE=records/models/tiny.py python train_gpt.py    your own model, with its own knobs
    torchrun --standalone --nproc_per_node=8 train_gpt.py    eight GPUs; any number of ranks works
    MODE=check python train_gpt.py                           report what a run needs; eval, sample: README.md
    python train_gpt.py --help                               every knob with its default and meaning

Shape suffixes: B batch, T time, D model width, H query heads, K key-value heads, d head width, V vocabulary.
"""

import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import inspect
import io
import json
import math
import os
import platform
import re
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

ATTENTION = ("auto", "fastest", "flash3", "cudnn", "flash", "efficient", "math", "blocked", "fused")
NO_DATA_HINT = """two commands make a small dataset and train on it:
  python data/prepare_shakespeare.py\n  python train_gpt.py records/recipes/demo_cpu.env"""


class UserError(ValueError):
    """A mistake that the user can fix. It is printed as one message, without a traceback, and the exit code is 2."""


def require(ok, message: str):
    if not ok:
        raise UserError(message)


# ---------- Config ----------------------------------------------------------------------------------------------------
# Every hyperparameter is a field of one frozen dataclass, validated once and printed in full at the start of a run.
# Values come from the defaults, then a FILE.env, then the environment; the last one wins.
def knob(default, meaning: str, low=None, high=None, choices=(), free=False, artifact=False):
    """A field of Config. Bounds are inclusive. A `free` knob does not affect the result and may change on resume. An
    `artifact` knob is stored in the artifact, which can then be scored without other settings."""
    high = 2**32 if type(default) is int and high is None else high  # a sanity bound: a larger count would only hang
    metadata = {"meaning": meaning, "allowed": (low, high, choices), "free": free, "artifact": artifact}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """All knobs. Each is set by the environment variable of its name in capitals; `# --` starts a group in --help. A
    model file subclasses this without a decorator: `knob(...)` adds a knob, a plain value changes a default."""

    # -- Task and files
    mode: str = knob("train", "what this call does", choices=("train", "check", "eval", "sample"), free=True)
    data_path: str = knob("./data/datasets/fineweb10B_sp1024", "folder of fineweb_*.bin shards", free=True)
    tokenizer_path: str = knob("./data/tokenizers/fineweb_1024_bpe.model", "a .model file or a name", free=True)
    model_file: str = knob("", "a .py file with a model and more knobs; empty: the GPT of this script", free=True)
    artifact: str = knob("", "model for MODE=eval and sample: a final_model.int8.ptz or a .pt file", free=True)
    log_dir: str = knob("./logs", "folder of the run folders", free=True)
    run_id: str = knob("", "name of the run folder; empty: a time stamp", free=True)
    seed: int = knob(1337, "seed of weights, LOADER=shuffle, dropout and samples", 0, 2**63 - 1)
    # -- Checkpoints
    checkpoint_every_seconds: float = knob(-1.0, "0: only one at the end; -1: 60 s for long runs", -1, free=True)
    resume: str = knob("auto", "auto: continue if the run folder exists; never; or a checkpoint", free=True)
    resume_force: bool = knob(False, "resume even if knobs that affect the result differ", free=True)
    # -- Device and kernels
    device: str = knob("auto", "device of every rank", choices=("auto", "cuda", "mps", "cpu"), free=True)
    dtype: str = knob("auto", "dtype of the activations", choices=("auto", "bfloat16", "float32"))
    compile: str = knob("auto", "auto: where a compiler works", choices=("auto", "0", "1", "autotune"), free=True)
    attention: str = knob("auto", "attention kernel; blocked and fused are for CPUs", choices=ATTENTION, free=True)
    target_world_size: int = knob(0, "MODE=check for this many GPUs; 0: WORLD_SIZE", 0, free=True)
    # -- Length of the run, and its batches
    iterations: int = knob(20_000, "maximum number of optimizer steps", 1)
    max_wallclock_seconds: float = knob(600.0, "limit of the training clock; validation does not count; 0: none", 0)
    warmup_steps: int = knob(20, "steps that compile and are then undone; no learning-rate warmup", 0, free=True)
    loader: str = knob("stream", "order of the training sequences", choices=("stream", "shuffle"))
    train_batch_tokens: int = knob(393_216, "tokens per step, over all ranks and micro-steps", 1, artifact=True)
    train_seq_len: int = knob(4096, "tokens per sequence, in training and evaluation", 1, artifact=True)
    grad_accum_steps: int = knob(0, "micro-steps per step; 0: at least 8 / ranks on GPUs", 0, free=True, artifact=True)
    micro_batch_tokens: str = knob("auto", "per micro-step and rank; auto: fits memory", free=True, artifact=True)
    # -- Logging and validation
    train_log_every: int = knob(200, "steps between log lines, after the first ten; 0: none", 0, free=True)
    val_loss_every: int = knob(1000, "steps between validations; 0: only at the end", 0, free=True)
    val_at_start: bool = knob(True, "validate before the first step, unless VAL_LOSS_EVERY is 0", free=True)
    val_batch_size: int = knob(524_288, "tokens per batch, over all ranks and micro-steps", 1, free=True, artifact=True)
    val_tokens_limit: int = knob(0, "score only the first N targets, labeled partial; 0: all", 0, free=True)
    eval_stride: int = knob(0, "targets per sliding window; 0: disjoint windows", 0, free=True, artifact=True)
    # -- Model
    vocab_size: int = knob(1024, "tokens in the vocabulary; must match the tokenizer", 2, 65_536, artifact=True)
    num_layers: int = knob(9, "transformer blocks", 1, artifact=True)
    model_dim: int = knob(512, "width D of the residual stream", 2, artifact=True)
    num_heads: int = knob(8, "query heads H", 1, artifact=True)
    num_kv_heads: int = knob(4, "key-value heads K; must divide NUM_HEADS", 1, artifact=True)
    mlp_mult: float = knob(2.0, "MLP hidden width, as a multiple of MODEL_DIM", 0.01, 1024, artifact=True)
    tie_embeddings: bool = knob(True, "the embedding is also the output projection", artifact=True)
    tied_embed_init_std: float = knob(0.005, "standard deviation of the initial tied embedding", 0)
    logit_softcap: float = knob(30.0, "cap c of the logits: c * tanh(logits / c)", 1e-3, artifact=True)
    rope_base: float = knob(10_000.0, "base of the rotary frequencies", 1, artifact=True)
    qk_gain_init: float = knob(1.5, "initial gain of every query head")
    # -- Adam and Muon
    embed_lr: float = knob(0.6, "Adam learning rate of an untied embedding", 0)
    head_lr: float = knob(0.008, "Adam learning rate of an untied output projection", 0)
    tied_embed_lr: float = knob(0.03, "Adam learning rate of the tied embedding", 0)
    scalar_lr: float = knob(0.02, "Adam learning rate of vectors, scales and gains", 0)
    beta1: float = knob(0.9, "Adam's decay of the first moment", 0, 0.999999)
    beta2: float = knob(0.95, "Adam's decay of the second moment", 0, 0.999999)
    adam_eps: float = knob(1e-8, "Adam's epsilon", 1e-20)
    matrix_lr: float = knob(0.02, "Muon learning rate of the matrices in the blocks", 0)
    muon_momentum: float = knob(0.99, "Muon momentum after its warmup", 0, 0.99999)
    muon_momentum_warmup_start: float = knob(0.92, "Muon momentum at step 0", 0, 0.99999)
    muon_momentum_warmup_steps: int = knob(1500, "steps of the linear momentum warmup", 0)
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", 1)
    muon_weight_decay: float = knob(0.0, "decoupled weight decay of the matrices", 0)
    embed_weight_decay: float = knob(0.0, "AdamW weight decay of embedding and output projection", 0)
    scalar_weight_decay: float = knob(0.0, "AdamW weight decay of vectors, scales and gains", 0)
    grad_clip_norm: float = knob(0.0, "clip the global gradient norm to this; 0: off", 0)
    # -- Schedule, average of the weights, and export
    warmdown_frac: float = knob(0.3526, "final fraction of the run, with linear decay to 0", 0, 1)
    lr_floor: float = knob(0.0, "lower bound of the learning-rate scale in the warmdown", 0, 1)
    ema_decay: float = knob(0.0, "decay of the EMA of the weights; 0: no EMA", 0, 1)
    ema_share: float = knob(1.0, "share of the EMA in the exported weights; the rest: final weights", 0, 1)
    size_limit: int = knob(16_000_000, "limit on code plus artifact, in bytes", 1)

    vocab_padding = 127  # VOCAB_SIZE may exceed the tokenizer's size by this much, to be a multiple of 128

    def __init_subclass__(cls):
        """Make a subclass a frozen dataclass, too. A default that it replaces keeps the meaning and the bounds."""
        for field in [f for base in cls.__mro__[1:] for f in getattr(base, "__dataclass_fields__", {}).values()]:
            value = getattr(cls, field.name)  # from the body, or as Python inherits: dataclass takes the first base's
            if value != field.default and not isinstance(value, dataclasses.Field):
                default = dataclasses.field(default=type(field.default)(value), metadata=field.metadata)
                setattr(cls, field.name, default)
                cls.__annotations__[field.name] = field.type
        dataclasses.dataclass(frozen=True)(cls)

    def check_text(self, stream, token_bytes) -> str: ...  # the validation text, on rank 0; may return a line to log

    @classmethod
    def model_class(cls) -> type["Model"]:
        return GPT

    def coder_class(self) -> type["Coder"]:
        return Coder

    @classmethod
    def knobs(cls) -> dict[str, dataclasses.Field]:
        return {field.name.upper(): field for field in dataclasses.fields(cls)}

    @classmethod
    def load(cls, argv: list[str], environ, from_artifact: dict[str, str] | None = None) -> "Config":
        """Read the knobs: defaults, then what an artifact records, then the file in argv, then the environment."""
        require(len(argv) <= 1, f"{argv}: give at most one FILE.env; knobs are environment variables")
        texts = read_env_file(Path(argv[0])) if argv else {}
        model_file = environ.get("MODEL_FILE", texts.get("MODEL_FILE"))
        if cls is Config and model_file:  # start over as the Config of that file
            return load_model_file(model_file).load(argv, environ, from_artifact)
        knobs, check = cls.knobs(), tool("check")
        texts = check.drop_moved_knobs(texts, knobs) if check else texts
        for name in sorted(texts.keys() - knobs.keys()):
            raise UserError(f"{argv[0]}: {name} is not a knob: {check.nearest(name, knobs) if check else 'see --help'}")
        texts = (from_artifact or {}) | texts | {name: environ[name] for name in knobs if name in environ}
        config = cls(**{knobs[name].name: parse(knobs[name], text) for name, text in texts.items()})
        config.check()
        if check:
            check.check_combinations(config)
        return config

    def check(self):
        """Raise if a value is out of bounds or does not fit another. tools/check.py checks more combinations."""
        for name, field in self.knobs().items():
            value, (low, high, choices) = getattr(self, field.name), field.metadata["allowed"]
            require(not choices or value in choices, f"{name}={value}: expected one of {', '.join(choices)}")
            require(low is None or value >= low, f"{name}={value} is too small: the minimum is {low}")
            require(high is None or value <= high, f"{name}={value} is too large: the maximum is {high}")
        D, H, K, T = self.model_dim, self.num_heads, self.num_kv_heads, self.train_seq_len
        require(D % (2 * H) == 0, f"MODEL_DIM={D} is not a multiple of 2 * NUM_HEADS={H}: use {D + -D % (2 * H)}")
        require(H % K == 0, f"NUM_KV_HEADS={K} does not divide NUM_HEADS={H}: use one of {divisors(H)}")
        batch = self.train_batch_tokens
        require(batch % T == 0, f"TRAIN_BATCH_TOKENS={batch} is not whole TRAIN_SEQ_LEN={T}: use {batch + -batch % T}")

    def as_env(self) -> dict[str, str]:
        """{KNOB: text} of a FILE.env that repeats this run, without the knobs of one invocation."""
        once = ("RUN_ID", "MODE", "ARTIFACT", "RESUME", "RESUME_FORCE")
        values = {name: getattr(self, field.name) for name, field in self.knobs().items() if name not in once}
        return {name: str(int(value) if isinstance(value, bool) else value) for name, value in values.items()}

    def accumulation_steps(self, world_size: int, device_type: str) -> int:
        """Micro-steps: GRAD_ACCUM_STEPS, or the fewest within MICRO_BATCH_TOKENS; on GPUs at least 8 / world_size."""
        T, total, wanted = self.train_seq_len, self.train_batch_tokens, self.grad_accum_steps
        remedy = f"use {total + -total % (world_size * T)}, or one of {divisors(total // T)} ranks"
        require(total % (world_size * T) == 0, f"TRAIN_BATCH_TOKENS={total} on {world_size} ranks: {remedy}")
        allowed = divisors(total // T // world_size)
        require(wanted in (0, *allowed), f"GRAD_ACCUM_STEPS={wanted} does not divide the batch: use one of {allowed}")
        # A CPU that runs out of memory raises no error to catch, so auto has a limit; 2**14 tokens keep its cores busy.
        auto_limit, fewest = (2**14, 1) if device_type == "cpu" else (0, 8 / world_size)  # a limit of 0 is no limit
        limit = auto_limit if self.micro_batch_tokens == "auto" else int(self.micro_batch_tokens)
        fewest = max(fewest, total / world_size / limit) if limit else fewest
        return wanted or next((steps for steps in allowed if steps >= fewest), allowed[-1])


def divisors(n: int) -> list[int]:
    return sorted({d for k in range(1, math.isqrt(n) + 1) if n % k == 0 for d in (k, n // k)})


def parse(field: dataclasses.Field, text: str):
    """The value of a knob from its text."""
    kind, text = type(field.default), text.strip()
    with contextlib.suppress(ValueError, KeyError, OverflowError):
        value = {"0": False, "1": True}[text] if kind is bool else kind(text)
        if kind is str or math.isfinite(value):
            return value
    expected = {bool: "a switch: use 0 or 1", int: "a whole number", float: "a finite number"}[kind]
    raise UserError(f"{field.name.upper()}={text!r} is not {expected}: the default is {field.default}")


def read_env_file(path: Path) -> dict[str, str]:
    """{KEY: text} of a file of KEY=VALUE lines. `#` starts a comment, quotes are optional, nothing is expanded."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give the path of a FILE.env") from error
    grammar = r"""\s*(\w+)\s*=\s*("[^"]*"|'[^']*'|[^"'#\s](?:[^#]*[^#\s])?|)\s*(?:\s#.*)?"""
    texts = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            match = re.fullmatch(grammar, line)
            require(match, f"{path}:{number}: {line.strip()!r} is not a KEY=VALUE line")
            require(match[1] not in texts, f"{path}:{number}: {match[1]} is given twice: keep one")
            texts[match[1]] = match[2][1:-1] if match[2][:1] in ('"', "'") else match[2]
    return texts


# ---------- Runtime ---------------------------------------------------------------------------------------------------
# The device, the ranks and their collectives, the run folder and its log, and the clock. Rank 0 makes all decisions
# that depend on time and broadcasts them, so that ranks cannot disagree.
class Runtime:  # of this process: rank, device, dtype of the activations, and collectives
    newton_schulz = None  # a faster kernel for Muon's iterations, if tools/kernels.py sets one

    def __init__(self, config: Config, environ):
        if check := tool("check"):
            check.check_launch(environ)
        self.rank, self.world_size = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
        self.is_master = self.rank == 0
        gpus, kernels = torch.cuda.device_count(), tool("kernels")
        default = "cuda" if gpus else "cpu"
        kind = kernels.choose_device(config, self.world_size) if kernels else config.device.replace("auto", default)
        self.device = torch.device(kind)
        if kind == "cuda":
            self.device = torch.device(kind, int(environ.get("LOCAL_RANK", 0)) % gpus)
            torch.cuda.set_device(self.device)
        best = kernels.best_dtype(kind) if kernels else {"cuda": "bfloat16"}.get(kind, "float32")
        self.dtype = getattr(torch, config.dtype.replace("auto", best))
        self.device_name = kernels.device_name(self.device) if kernels else kind
        if self.world_size > 1:
            # NCCL needs a GPU for each rank. The timeout is long because compile times differ between ranks.
            own_gpu = kind == "cuda" and int(environ.get("LOCAL_WORLD_SIZE", self.world_size)) <= gpus
            hour = datetime.timedelta(hours=1)
            options = {"rank": self.rank, "world_size": self.world_size, "timeout": hour}
            store = check.meet(environ, hour) if check else None  # prints which ranks have not joined
            dist.init_process_group("nccl" if own_gpu else "gloo", store=store, **options)
            self.host_group = dist.new_group(backend="gloo", timeout=hour)  # does not wait for work queued on the GPU

    def synchronize(self):  # wait until the device has finished all queued work
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def all_reduce(self, values: list[float]) -> list[float]:  # sums over the ranks, in float64 on the hosts
        total = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total, group=self.host_group)
        return total.tolist()

    def broadcast(self, value):  # rank 0's value of any type, on every rank
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]


class RunFolder:  # logs/<run_id>/, written by rank 0; tools/checkpoint.py adds locks, restarts and verified writes
    def __init__(self, runtime: Runtime):
        self.runtime, self.created = runtime, False
        self.early_lines = []  # logged before the folder was created

    def choose(self, config: Config, stream: "TokenStream", sources: dict[str, bytes]):
        """Name the folder, which must be new. tools/checkpoint.py overrides this to find and check a checkpoint."""
        stamp = time.strftime(f"%Y-%m-%d_%H-%M-%S_{int.from_bytes(os.urandom(3))}")  # clocks may agree
        self.run_id = self.runtime.broadcast(config.run_id or stamp)
        self.path = Path(config.log_dir) / self.run_id
        new = config.resume in ("auto", "never") and not self.path.exists()
        require(new, f"{self.path} exists, or RESUME is set: choose another RUN_ID, or get tools/checkpoint.py")

    def create(self, config: Config, sources: dict[str, bytes], header: str = ""):
        """Create or reopen the folder, and write the configuration and the sources."""
        if self.runtime.is_master:
            self.path.mkdir(parents=True, exist_ok=True)
            self.created = True
            quoted = {name: f"'{text}'" if '"' in text else f'"{text}"' for name, text in config.as_env().items()}
            lines = "".join(f"{name}={text}\n" for name, text in quoted.items())
            for name, data in {"config.env": (header + lines).encode(), **sources}.items():
                self.write(name, data)
            self.append("train.log", *self.early_lines)

    def log(self, line: str):
        if self.runtime.is_master:
            with contextlib.suppress(OSError):  # a closed terminal must not end the run
                print(line, flush=True)
            self.append("train.log", line) if self.created else self.early_lines.append(line)

    def append(self, name: str, *lines: str):  # if the disk is full, the lines are lost and the run goes on
        if self.created:
            with contextlib.suppress(OSError), open(self.path / name, "a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)

    def write(self, name: str, data: bytes):  # atomic: the file is either new or unchanged
        temporary = self.path / f".{name}.tmp"
        temporary.write_bytes(data)
        os.replace(temporary, self.path / name)

    def close(self, *last_lines: str):
        self.append("train.log", *last_lines)


class Stopwatch:  # seconds per phase; a switch first waits for the device
    def __init__(self, synchronize):
        self.synchronize, self.phase, self.since = synchronize, "startup", time.perf_counter()
        self.seconds = dict.fromkeys(("startup", "compile", "training", "evaluation", "export"), 0.0)

    def switch(self, phase: str):
        self.synchronize()
        self.seconds[self.phase] = self.elapsed(self.phase)
        self.phase, self.since = phase, time.perf_counter()

    def elapsed(self, phase: str) -> float:
        return self.seconds[phase] + (phase == self.phase) * (time.perf_counter() - self.since)


# ---------- Data ------------------------------------------------------------------------------------------------------
# Shards of uint16 tokens form one long stream. A step takes the next TRAIN_BATCH_TOKENS of it, cut into sequences.
# Ranks and micro-steps take consecutive slices of it, so that the data of a step does not depend on how many there are.
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024


def open_shard(path: Path) -> np.ndarray:
    """Memory-mapped uint16 tokens. The header is 256 int32: magic, version, number of tokens, zeros."""
    size, header = path.stat().st_size, np.fromfile(path, dtype="<i4", count=3).tolist()
    fits = header == [SHARD_MAGIC, SHARD_VERSION, (size - SHARD_HEADER_BYTES) // 2] and size % 2 == 0 and header[2] > 0
    expected = f"expected magic {SHARD_MAGIC}, version {SHARD_VERSION} and its number of tokens"
    require(fits, f"shard {path}: {size} bytes, header {header}: {expected}: make or fetch it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(header[2],))


class TokenStream:  # the shards of one split as one sequence of tokens
    def __init__(self, folder: str, split: str, vocab_size: int):
        self.pattern, self.vocab_size = f"{folder}/fineweb_{split}_*.bin", vocab_size
        name = re.compile(rf"fineweb_{split}_(\d+)\.bin")  # a glob would also accept fineweb_train_000000_old.bin
        found = sorted((int(match[1]), path) for path in Path(folder).glob("*") if (match := name.fullmatch(path.name)))
        require(found, f"DATA_PATH={folder} holds no fineweb_{split}_NNNNNN.bin; {NO_DATA_HINT}")
        first = found[0][0] if split == "train" else 0  # training may use any range of shards, a score needs all
        for expected, (number, path) in enumerate(found, start=first):
            require(number == expected, f"{path}: shard {expected} is missing or duplicated: fetch or remove one")
        self.shards = [open_shard(path) for _, path in found]
        self.ends = np.cumsum([len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` uint16 tokens from position `start`, across shard boundaries and wrapping around at the end."""
        pieces = []
        while count > 0:
            start %= len(self)
            index = int(np.searchsorted(self.ends, start, side="right"))
            from_end = start - self.ends[index]  # negative: counted from the end of this shard
            pieces.append(self.shards[index][from_end:][:count])
            start, count = start + len(pieces[-1]), count - len(pieces[-1])
        tokens = np.concatenate(pieces)
        largest = tokens.max()
        remedy = "set DATA_PATH, TOKENIZER_PATH and VOCAB_SIZE together"
        require(largest < self.vocab_size, f"{self.pattern}: token {largest} >= VOCAB_SIZE={self.vocab_size}: {remedy}")
        return tokens


def to_device(tokens: np.ndarray, device: torch.device) -> Tensor:
    """int64 tokens on the device. They are transferred as two bytes each, asynchronously on CUDA."""
    wire = torch.from_numpy(tokens.view(np.int16))  # int16, since some devices have no kernels for uint16
    wire = wire.pin_memory() if device.type == "cuda" else wire
    return wire.to(device, non_blocking=True).long() & 0xFFFF


# This rank's part of each step. A thread reads the next step ahead.
#
# Sequence i of a step at position p is tokens [p + i*T, p + i*T + T] (LOADER=stream). With LOADER=shuffle it is piece
# number p / T + i of the text, in a random order and with a random offset that change every epoch.
class TrainLoader:
    def __init__(self, stream: TokenStream, config: Config, runtime: Runtime, accum_steps: int):
        self.stream, self.device, self.accum_steps = stream, runtime.device, accum_steps
        self.length, self.batch_tokens = config.train_seq_len, config.train_batch_tokens
        self.rank_tokens = self.batch_tokens // runtime.world_size
        self.rank_offset = self.rank_tokens * runtime.rank
        self.shuffle_seed = config.seed if config.loader == "shuffle" else None
        self.pieces = max(1, (len(stream) - 1) // self.length - 1)  # one fewer than fit, to leave room for the offset
        self.epoch = -1
        self.reader = ThreadPoolExecutor(max_workers=1)
        self.seek(0)

    def seek(self, position: int):
        self.position = position % len(self.stream) if self.shuffle_seed is None else position
        self.ahead = self.reader.submit(self.read, self.position + self.rank_offset)

    def read(self, position: int) -> np.ndarray:
        """[B, T + 1] tokens: each sequence with the target of its last token."""
        starts = range(position, position + self.rank_tokens, self.length)
        starts = starts if self.shuffle_seed is None else map(self.shuffled_start, starts)
        return np.stack([self.stream.read(start, self.length + 1) for start in starts])

    def shuffled_start(self, position: int) -> int:
        """Start in the text of the sequence at this position of the shuffled order."""
        epoch, index = divmod(position // self.length, self.pieces)
        if epoch != self.epoch:
            random = np.random.default_rng((self.shuffle_seed, epoch))
            self.epoch, self.offset = epoch, int(random.integers(self.length))
            self.order = random.permutation(self.pieces)
        return self.offset + int(self.order[index]) * self.length

    def next_step(self) -> tuple[Tensor, Tensor]:  # inputs and targets, [micro-steps, B, T] each
        tokens, shape = to_device(self.ahead.result(), self.device), (self.accum_steps, -1, self.length)
        self.seek(self.position + self.batch_tokens)
        return tokens[:, :-1].contiguous().view(shape), tokens[:, 1:].contiguous().view(shape)


# ---------- Bytes -----------------------------------------------------------------------------------------------------
# Bits per byte compares models with different tokenizers, if bytes are counted correctly. So the first million tokens
# of the validation text are decoded and compared, and the total must equal the one in the dataset's manifest.json.
NAMED_TOKENIZER = re.compile(r"\w+|(.*\W)?\w*byte_?260\w*(\.json)?")  # bytes, gpt2 (of tiktoken), */byte260.json
AUDIT_TOKENS = 1_000_000  # tokens that are decoded and compared


# Bytes of text per token of a SentencePiece .model; tools/vocabularies.py adds others. A special token, or an id beyond
# the tokenizer's own, has 0 bytes and is a boundary, after which a new text starts. A byte piece has 1 byte. Any other
# piece has the UTF-8 length of its text, with U+2581 as a space. If the tokenizer adds or strips a space at
# the start of a text, the leading U+2581 of a piece right after a boundary has 0 bytes.
class TokenBytes:
    def __init__(self, path: str, vocab_size: int | None = None, padding: int = 127):  # None: that of the tokenizer
        self.path, self.strips_first_space = path, True
        self.zero_bytes = []  # case marks: tokens without bytes that are not boundaries
        self.unmark = lambda text: text  # tools/vocabularies.py replaces this if there are case marks
        self.leading, self.byte_ids, self.unknown = set(), set(), set()
        if named := NAMED_TOKENIZER.fullmatch(path):
            tool("vocabularies", required=True).load(self)
        else:
            self.load_sentencepiece(path)
        self.size = len(self.pieces)  # `pieces` has the bytes of each token; None for a special token
        content = repr(self.pieces).encode() if named else Path(path).read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        vocab_size = self.size if vocab_size is None else vocab_size
        fits, found = 0 <= vocab_size - self.size <= padding, f"TOKENIZER_PATH={path} has {self.size} pieces"
        require(fits, f"VOCAB_SIZE={vocab_size}, but {found}: set that, or the tokenizer of the shards")
        pieces = self.pieces + [None] * (vocab_size - self.size)
        self.boundary = np.array([piece is None for piece in pieces])
        self.byte_count = np.array([len(piece or b"") for piece in pieces])
        self.byte_count[self.zero_bytes] = 0
        self.leading_space = np.isin(np.arange(vocab_size), [*self.leading])
        self.texts = [b" " * (token in self.leading) + (piece or b"") for token, piece in enumerate(pieces)]

    def load_sentencepiece(self, path: str):
        from sentencepiece import SentencePieceProcessor  # here, so that importing this script stays cheap

        require(Path(path).is_file(), f"TOKENIZER_PATH={path} does not exist; {NO_DATA_HINT}")
        try:
            model = SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as error:
            raise UserError(f"TOKENIZER_PATH={path} is not a SentencePiece model: make or fetch it again") from error
        self.model, self.start, self.encode = model, model.bos_id(), model.encode
        ids = range(model.vocab_size())
        texts = model.id_to_piece([*ids])
        require("\u2581" in texts, f"{path} has no piece for a single space (U+2581): use another")
        self.strips_first_space = model.normalize("a")[:1] == "\u2581" or model.normalize(" a")[:1] != "\u2581"
        self.unknown = {token for token in ids if model.is_unknown(token) or model.is_unused(token)}
        special, self.byte_ids = self.unknown | set(filter(model.is_control, ids)), set(filter(model.is_byte, ids))
        # `pieces` leaves out the leading U+2581 of these tokens.
        self.leading = {token for token in ids if texts[token].startswith("\u2581")} - special
        self.pieces = [text.removeprefix("\u2581").replace("\u2581", " ").encode() for text in texts]
        for token in special | self.byte_ids:
            self.pieces[token] = None if token in special else bytes([int(texts[token][3:5], 16)])  # such as <0xE6>
        if "\ue001" in texts:  # a case mark: see data/README.md
            tool("vocabularies", required=True).use_case_marks(self, texts)

    def decode(self, tokens: list[int]) -> bytes:
        return self.unmark(self.model.decode(tokens).encode())

    def count(self, tokens: np.ndarray) -> int:
        """Bytes of tokens[1:], each in the context of the token before it."""
        previous, target = tokens[:-1], tokens[1:]
        spaces = self.leading_space[target] & ~(self.boundary[previous] & self.strips_first_space)
        return int(self.byte_count[target].sum() + np.count_nonzero(spaces))

    def spell(self, tokens: list[int]) -> bytes:
        """The text of a document, piece by piece, as `count` counts it."""
        text = [self.texts[token] for token in tokens]
        if self.strips_first_space:
            for at in [0] + [at for at, piece in enumerate(text, 1) if not piece]:  # after a boundary
                if at < len(text) and tokens[at] in self.leading:
                    text[at] = text[at][1:]
        return self.unmark(b"".join(text))


def compare_spelling(token_bytes: TokenBytes, stream: TokenStream) -> str:
    """Check that the first tokens, document by document, decode to the text whose bytes are counted. Not compared are
    characters cut in half at either end, and documents with unknown characters, which decode to a placeholder."""
    tokens = stream.read(0, min(AUDIT_TOKENS, len(stream)))
    starts = np.flatnonzero(token_bytes.boundary[tokens])
    spelled_bytes, skipped = 0, 0
    for document in map(np.ndarray.tolist, np.split(tokens, starts)):
        spelled = token_bytes.spell(document)
        spelled_bytes += len(spelled)
        if not token_bytes.unknown.isdisjoint(document):
            skipped += 1
            continue
        ours, theirs = (t.decode(errors="replace").strip("\ufffd") for t in (spelled, token_bytes.decode(document)))
        found = f"{token_bytes.path} decodes a document to {theirs[:40]!r}..., its pieces spell {ours[:40]!r}..."
        same = ours == theirs and ours.encode() in spelled  # the latter fails if a byte inside had to be replaced
        require(same, f"{stream.pattern}: {found}: use the tokenizer of the shards")
    boundary = np.flatnonzero(token_bytes.boundary)[:1].astype(tokens.dtype)
    counted = token_bytes.count(np.concatenate([boundary, tokens]))
    assert counted == spelled_bytes, f"the first tokens count {counted} bytes and spell {spelled_bytes}"
    note = f" ({skipped} documents hold unknown letters and are not compared)" if skipped else ""
    return f"{len(tokens)} tokens in {len(starts)} documents decode to the {counted} bytes they weigh{note}"


def audit(token_bytes: TokenBytes, stream: TokenStream, data_path: str) -> tuple[str, dict]:
    """Check the byte count of the validation text. Returns a log line, and facts for result.json. Without a manifest
    that states the true count, a faulty tokenizer could be wrong about both the tokens and their bytes."""
    name, total, largest, digest = stream.pattern, 0, 0, hashlib.sha256()
    for start in range(0, len(stream), 2**24):
        tokens = stream.read(start, min(2**24 + 1, len(stream) - start))  # one token more, as context of the next read
        total, largest = total + token_bytes.count(tokens), max(largest, int(tokens.max()))
        digest.update(tokens[: 2**24].tobytes())
    require(largest < token_bytes.size, f"{name}: {token_bytes.path} has no token {largest}: use the shards' tokenizer")
    require(total, f"{name}: {len(stream)} tokens stand for no bytes: make or fetch it again")
    compared = compare_spelling(token_bytes, stream)
    source = "not proved: no manifest.json states the true bytes"
    manifest, proved = Path(data_path) / "manifest.json", False
    if manifest.exists():
        try:
            split = json.loads(manifest.read_text(encoding="utf-8"))["splits"]["val"]
            true_bytes, kept_bytes = int(split["bytes"]), int(split.get("token_bytes", split["bytes"]))
        except (ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
            raise UserError(f"{manifest} has no splits.val.bytes ({error!r:.60}): prepare the data again") from error
        require(total == kept_bytes, f"{name}: {total} bytes, {manifest} says {kept_bytes}: make the data again")
        proved = true_bytes == total
        source = "bytes:proved by manifest.json" if proved else f"bytes:lossy: of {true_bytes} in the text"
    facts = {"val_bytes": total, "bytes_proved": proved, "sha256_val_tokens": digest.hexdigest()}
    return f"byte_audit: {compared}; all {len(stream)} tokens weigh {total} bytes ({source})", facts


# ---------- Model -----------------------------------------------------------------------------------------------------
# Precision: weights, RoPE tables, norms, softmax and loss are fp32; activations and matmuls use `dtype`: weights and
# tables are cast to it where they are used. Each row of the table PARAMETERS states how one kind of parameter is
# initialized, optimized and exported.
class ParameterRule(NamedTuple):  # how the parameters of one kind are initialized, optimized and exported
    init: object  # a value, the name of a knob, or a function (parameter, config, generator)
    group: str  # "matrix" is trained by Muon; "embed", "head" and "scalar" by AdamW
    fp32: bool = False  # stored as fp32 instead of fp16 if it is too small to be quantized


def uniform_init(p: Tensor, config: Config, generator: torch.Generator):
    p.uniform_(-(p.size(1) ** -0.5), p.size(1) ** -0.5, generator=generator)


def embedding_init(p: Tensor, config: Config, generator: torch.Generator):
    p.normal_(std=config.tied_embed_init_std if config.tie_embeddings else 1.0, generator=generator)


# What training, export and scoring need from a model. Your own defines PARAMETERS and `features`, which maps tokens
# [B, T] to the input [B, T, D] of the output projection. The constructor (config, attend, dtype) sets no values.
class Model(nn.Module):
    PARAMETERS: dict[str, ParameterRule] = {}
    softcap = 30.0
    fused_loss = None  # a kernel that computes logits and losses at once, if tools/kernels.py has one
    graph_starts: tuple[float, ...] = (0.0,)  # values of progress at which the compiled graph changes
    observe_every = 0  # targets between two calls of `observe`; 0: never called

    # What the script calls, and when. Each does nothing here.
    def prepare(self, config: Config, runtime: Runtime): ...  # once, on the device, before it is compiled
    def advance(self, progress: float): ...  # before a step, to switch parts on as the run goes on
    def metrics(self) -> dict[str, Tensor | float]: ...  # after a step: more scalars to log
    def begin(self, targets: int, forward) -> str: ...  # before the final score; `forward` is this model, compiled
    def observe(self, tokens: np.ndarray): ...  # a scored chunk: its targets, after the token before them
    def flops_per_token(self, seq_len: int) -> int: ...  # in training; None: tools/kernels.py counts them
    def end(self, score: "Score") -> str: ...  # after the final score; like `begin`, it may return a line for the log

    @classmethod
    def rule(cls, name: str) -> ParameterRule:
        """The rule of a parameter: blocks.3.attn.c_q.weight has that of blocks.attn.c_q."""
        kind = re.sub(r"\.\d+(?=\.|$)", "", name).removesuffix(".weight")
        require(kind in cls.PARAMETERS, f"{cls.__name__}.PARAMETERS has no rule {kind} for {name}: add one")
        return cls.PARAMETERS[kind]

    @torch.no_grad()
    def init_weights(self, config: Config):
        """Initialize every parameter by its rule; one without a rule raises. build_model calls this after the
        constructor. Values are drawn on the CPU, in order: they are the same on all devices and ranks."""
        generator = torch.Generator().manual_seed(config.seed)
        for name, p in self.named_parameters():
            init = self.rule(name).init
            init = getattr(config, init) if isinstance(init, str) else init
            if callable(init):
                init(p, config, generator)
            else:
                p.copy_(torch.tensor(init, dtype=p.dtype))

    def output_weight(self) -> tuple[str, Tensor]:
        """Name and weight [V, D] of the output projection, which is the embedding if there is no lm_head."""
        name = "tok_emb" if getattr(self, "lm_head", None) is None else "lm_head"
        return f"{name}.weight", getattr(self, name).weight

    def logits(self, x_BTD: Tensor) -> Tensor:
        """[B, T, V] in fp32, with a smooth limit of +-softcap."""
        z = at_least_fp32(F.linear(x_BTD, self.output_weight()[1].to(x_BTD.dtype)))
        return self.softcap * torch.tanh(z / self.softcap)

    def losses(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:  # [B, T] in nats, in fp32
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None):
        """Logits [B, T, V] without targets, else losses [B, T]; in training (losses, extra) if a module set one."""
        modules = [*self.modules()] if self.training else []  # after `features` the compiler could not list them
        x_BTD = self.features(tokens_BT)
        if targets_BT is None:
            return self.logits(x_BTD)
        fused = self.fused_loss and self.fused_loss(self, x_BTD, targets_BT, None)
        losses_BT = self.losses(self.logits(x_BTD), targets_BT) if fused is None else fused
        # A module may set its extra_loss, a scalar: it is added to the mean loss in training, and never scored.
        with_extra = [module for module in modules if getattr(module, "extra_loss", None) is not None]
        extra = sum(module.extra_loss for module in with_extra)
        for module in with_extra:
            module.extra_loss = None
        return (losses_BT, extra) if with_extra else losses_BT

    def distributions(self, contexts_BT: Tensor, scored_BT: Tensor) -> Tensor:
        """Log-probabilities [n, V] of the token after each of the n positions in a mask, in row-major order, at least
        fp32. If a model overrides this, its score comes from here; otherwise from the losses, which are the same."""
        return torch.log_softmax(self(contexts_BT)[scored_BT], dim=-1)

    def optimizers(self, config: Config, runtime: Runtime) -> list[torch.optim.Optimizer]:
        """AdamW and Muon, each for the groups that the model has."""
        groups = {"embed": [], "head": [], "matrix": [], "scalar": []}
        for name, p in self.named_parameters():
            groups[self.rule(name).group].append(p)
        decay = config.embed_weight_decay
        embed_lr = config.tied_embed_lr if config.tie_embeddings else config.embed_lr
        adam = [
            {"params": groups["embed"], "lr": embed_lr, "weight_decay": decay},
            {"params": groups["head"], "lr": config.head_lr, "weight_decay": decay},
            {"params": groups["scalar"], "lr": config.scalar_lr, "weight_decay": config.scalar_weight_decay},
        ]
        betas = (config.beta1, config.beta2)
        optimizers = [torch.optim.AdamW([g for g in adam if g["params"]], betas=betas, eps=config.adam_eps, fused=True)]
        if groups["matrix"]:
            rates = (config.matrix_lr, config.muon_momentum, config.muon_backend_steps)
            optimizers.append(Muon(groups["matrix"], *rates, runtime, config.muon_weight_decay))
        return optimizers

    def lr_scale(self, config: Config, step: int, progress: float) -> float:
        """The factor of every learning rate: 1, then linear to 0 over the last WARMDOWN_FRAC, but at least LR_FLOOR."""
        return min(1.0, max((1 - progress) / config.warmdown_frac, config.lr_floor)) if config.warmdown_frac else 1.0


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def grouped_attention(q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor) -> Tensor:
    """Causal attention. tools/kernels.py has other kernels and chooses one."""
    return F.scaled_dot_product_attention(q_BHTd, k_BKTd, v_BKTd, is_causal=True, enable_gqa=True)


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=2.0**-23)  # eps is that of fp32, in which it is computed


class Linear(nn.Linear):  # the fp32 master weight is cast to the type of the input where it is used
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def rope_tables(length: int, width: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin [T, width / 2] in fp32: bf16 cannot represent every position beyond 256."""
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x_BTHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate dimensions i and i + r/2, for i < r/2, by cos and sin [T, 1, r/2]. Dimensions >= r are unchanged."""
    a, b, *rest = x_BTHd.split(cos.size(-1), dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, *rest], dim=-1)


class RoPE(nn.Module):  # rotary positions (Su et al. 2021, RoFormer): queries and keys are rotated
    def __init__(self, config: Config, width: int = 0):
        super().__init__()
        width = width or config.model_dim // config.num_heads  # dimensions of a head that rotate
        cos, sin = rope_tables(config.train_seq_len, width, config.rope_base)
        self.register_buffer("cos", cos[:, None], persistent=False)
        self.register_buffer("sin", sin[:, None], persistent=False)

    def embed(self, x_BTD: Tensor) -> Tensor:
        return x_BTD

    def rotation(self, length: int, dtype: torch.dtype):  # rotates queries or keys [B, T, heads, d]
        return functools.partial(rotate, cos=self.cos[:length].to(dtype), sin=self.sin[:length].to(dtype))


class Attention(nn.Module):  # causal and grouped-query (Shazeer 2019; Ainslie et al. 2023), q and k normalized
    def __init__(self, config: Config, attend, layer: int):
        super().__init__()
        D = config.model_dim
        self.attend, self.head_dim = attend, D // config.num_heads
        kv_dim = self.head_dim * config.num_kv_heads
        self.c_q, self.c_k, self.c_v, self.proj = (Linear(D, out, bias=False) for out in (D, kv_dim, kv_dim, D))
        self.q_gain = nn.Parameter(torch.empty(config.num_heads))

    def forward(self, x_BTD: Tensor, rotate) -> Tensor:
        projections = (self.c_q(x_BTD), self.c_k(x_BTD), self.c_v(x_BTD))
        q_BTHd, k_BTKd, v_BTKd = (x.unflatten(-1, (-1, self.head_dim)) for x in projections)
        q_BTHd = rotate(rms_norm(q_BTHd)) * self.q_gain.to(x_BTD.dtype)[:, None]
        k_BTKd = rotate(rms_norm(k_BTKd))
        y_BHTd = self.attend(q_BTHd.transpose(1, 2), k_BTKd.transpose(1, 2), v_BTKd.transpose(1, 2))
        return self.proj(y_BHTd.transpose(1, 2).flatten(2))


class MLP(nn.Module):  # two matrices with a squared ReLU between them
    def __init__(self, config: Config):
        super().__init__()
        hidden = round(config.mlp_mult * config.model_dim)
        self.fc = Linear(config.model_dim, hidden, bias=False)
        self.proj = Linear(hidden, config.model_dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.proj(F.relu(self.fc(x_BTD)).square())


# Attention and MLP, each added to the stream with a learned scale per channel. Two learned vectors first mix the
# input with the embedding x0. `parts` is the model, whose attributes name the classes to use.
class Block(nn.Module):
    def __init__(self, config: Config, attend, layer: int, parts: "GPT"):
        super().__init__()
        D = config.model_dim
        self.attn_norm, self.attn = parts.norm_class(D), parts.attention_class(config, attend, layer)
        self.mlp_norm, self.mlp = parts.norm_class(D), parts.mlp_class(config)
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.empty(D)), nn.Parameter(torch.empty(D))
        self.resid_mix = nn.Parameter(torch.empty(2, D))

    def forward(self, x_BTD: Tensor, x0_BTD: Tensor, rotate) -> Tensor:
        mix = self.resid_mix.to(x_BTD.dtype)
        x_BTD = mix[0] * x_BTD + mix[1] * x0_BTD
        x_BTD = x_BTD + self.attn_scale.to(x_BTD.dtype) * self.attn(self.attn_norm(x_BTD), rotate)
        return x_BTD + self.mlp_scale.to(x_BTD.dtype) * self.mlp(self.mlp_norm(x_BTD))


class GPT(Model):  # a U-net of blocks over a normalized embedding, which is also the output projection if tied
    PARAMETERS = {
        "tok_emb": ParameterRule(embedding_init, "embed"),
        "lm_head": ParameterRule(0.0, "head"),
        "skip_weights": ParameterRule(1.0, "scalar", fp32=True),
        "blocks.resid_mix": ParameterRule([[1.0], [0.0]], "scalar", fp32=True),
        "blocks.attn.q_gain": ParameterRule("qk_gain_init", "scalar", fp32=True),
        **dict.fromkeys(("blocks.attn_scale", "blocks.mlp_scale"), ParameterRule(1.0, "scalar", fp32=True)),
        **dict.fromkeys(("blocks.attn.proj", "blocks.mlp.proj"), ParameterRule(0.0, "matrix")),
        **dict.fromkeys([f"blocks.attn.c_{part}" for part in "qkv"], ParameterRule(uniform_init, "matrix")),
        "blocks.mlp.fc": ParameterRule(uniform_init, "matrix"),
    }
    # A subclass swaps a part by overriding its class here.
    block_class, attention_class, mlp_class, positions_class = Block, Attention, MLP, RoPE
    norm_class = staticmethod(functools.partial(nn.RMSNorm, eps=2.0**-23, elementwise_affine=False))

    def __init__(self, config: Config, attend=grouped_attention, dtype: torch.dtype = torch.float32):
        super().__init__()
        D, layers = config.model_dim, config.num_layers
        self.dtype, self.softcap = dtype, config.logit_softcap
        self.tok_emb = nn.Embedding(config.vocab_size, D)
        self.positions = self.positions_class(config)
        self.blocks = nn.ModuleList(self.block_class(config, attend, layer, self) for layer in range(layers))
        self.norm = self.norm_class(D)
        # With one block this is empty and gets no gradient, for which DDP would wait.
        self.skip_weights = nn.Parameter(torch.empty(layers // 2, D), requires_grad=layers > 1)
        self.lm_head = None if config.tie_embeddings else Linear(D, config.vocab_size, bias=False)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        return self.positions.embed(rms_norm(self.tok_emb(tokens_BT).to(self.dtype)))

    def features(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, D] in `dtype`. The first half of the blocks push their outputs; the second half pop and add them,
        scaled by skip_weights. With an odd number of blocks the last one gets no skip."""
        rotate = self.positions.rotation(tokens_BT.size(1), self.dtype)
        x_BTD = x0_BTD = self.embed(tokens_BT)
        half = len(self.blocks) // 2
        skips = []
        for i, block in enumerate(self.blocks):
            if i >= half and skips:
                x_BTD = x_BTD + self.skip_weights[i - half].to(x_BTD.dtype) * skips.pop()
            x_BTD = block(x_BTD, x0_BTD, rotate)
            if i < half:
                skips.append(x_BTD)
        return self.norm(x_BTD)


def build_model(config: Config, runtime: Runtime) -> tuple[Model, nn.Module, str]:
    """The initialized model, the same model compiled (or itself), and log lines on the choices made."""
    attend, fused_loss, note = grouped_attention, None, "no tools/kernels.py"
    compile_options = {} if runtime.device.type == "cuda" and config.compile != "0" else None  # None: not compiled
    if kernels := tool("kernels", print if runtime.is_master else str):
        attend, fused_loss, compile_options, note = kernels.choose(config, runtime)
    model = config.model_class()(config, attend, runtime.dtype)
    model.init_weights(config)
    model.to(runtime.device)
    model.fused_loss = fused_loss
    model.prepare(config, runtime)
    # Without this DDP splits the graph, and torch 2.8 then corrupts gradients of blocks that run more than once.
    torch._dynamo.config.optimize_ddp = False
    options = {"dynamic": False, "fullgraph": True} | (compile_options or {})
    compiled_model = model if compile_options is None else torch.compile(model, **options)
    dtype = str(runtime.dtype).removeprefix("torch.")
    return model, compiled_model, f"device:{runtime.device} ({runtime.device_name}) dtype:{dtype}\n{note}"


# ---------- Optimizer and schedule ------------------------------------------------------------------------------------
# Adam trains embeddings and vectors. Muon trains the matrices of the blocks: it orthogonalizes their momentum, so that
# all directions of a matrix get updates of similar size (Keller Jordan et al. 2024). Model.lr_scale is the schedule.
def newton_schulz(stack: Tensor, polynomials: list[tuple[float, float, float]]) -> Tensor:
    """Move the singular values s <= 1 of matrices [n, rows, cols] toward 1, by s <- a s + b s^3 + c s^5 for each."""
    tall = stack.size(-2) > stack.size(-1)
    x = stack.mT if tall else stack
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then an orthogonalized update, for the matrices inside the blocks; not for embeddings and vectors.

    m = mu * m + g;  u = g + mu * m (Nesterov);  p -= lr * (sqrt(max(1, rows / cols)) * orthogonal(u) + decay * p)

    Rank r holds the momentum and computes the update of every world_size-th matrix; one all_reduce exchanges them."""

    QUINTIC = (3.4445, -4.7750, 2.0315)  # five iterations bring singular values to 0.7 to 1.2 (Jordan, Muon)

    def __init__(self, params, lr: float, momentum: float, steps: int, runtime: Runtime, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps, weight_decay=weight_decay))
        self.runtime = runtime
        assert all(p.ndim == 2 for group in self.param_groups for p in group["params"]), "Muon is for matrices"

    def polynomials(self, steps: int) -> list[tuple[float, float, float]]:
        return [self.QUINTIC] * steps

    def orthogonal(self, u: Tensor, group: dict) -> Tensor:
        """The scaled updates of a stack [n, rows, cols] in fp32, computed in the runtime's dtype."""
        u = u / u.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
        iterate = self.runtime.newton_schulz or newton_schulz
        update = iterate(u.to(self.runtime.dtype), self.polynomials(group["steps"]))
        return update * max(1, u.size(1) / u.size(2)) ** 0.5

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            # One flat buffer holds all updates, for a single all_reduce; those of other ranks' matrices are 0 here.
            sizes, owned = [p.numel() for p in params], params[self.runtime.rank :: self.runtime.world_size]
            flat = torch.zeros(sum(sizes), device=params[0].device, dtype=self.runtime.dtype)
            updates = {p: part.view_as(p) for p, part in zip(params, flat.split(sizes), strict=True)}
            # Matrices of one shape are orthogonalized as one batch, which is faster.
            for shape in {p.shape for p in owned}:
                same = [p for p in owned if p.shape == shape]
                for p in same:
                    if p not in self.state:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                momenta, grads = [self.state[p]["momentum_buffer"] for p in same], [p.grad for p in same]
                torch._foreach_mul_(momenta, group["momentum"])
                torch._foreach_add_(momenta, grads)
                u = torch.stack(torch._foreach_add(grads, momenta, alpha=group["momentum"]))
                torch._foreach_copy_([updates[p] for p in same], self.orthogonal(u, group).unbind())
            if self.runtime.world_size > 1:
                dist.all_reduce(flat)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, [updates[p].to(p.dtype) for p in params], alpha=-group["lr"])


def progress_at(config: Config, step: int, elapsed: float) -> float:
    """The completed fraction of the run, by steps or by seconds of the training clock, whichever is larger."""
    by_clock = elapsed / config.max_wallclock_seconds if config.max_wallclock_seconds else 0.0
    return min(max(step / config.iterations, by_clock), 1.0)


def muon_momentum(config: Config, step: int) -> float:
    """Linear from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM over MUON_MOMENTUM_WARMUP_STEPS."""
    steps = config.muon_momentum_warmup_steps
    fraction = min(step / steps, 1.0) if steps else 1.0
    return (1 - fraction) * config.muon_momentum_warmup_start + fraction * config.muon_momentum


# ---------- Evaluation ------------------------------------------------------------------------------------------------
# Every target of the validation text is scored exactly once, which the script verifies. Losses are summed on the device
# per batch, then in float64 on the host. Bits per byte = nats / ln 2 / bytes is comparable across tokenizers.
class Score:  # nats per token and bits per byte; `label` marks a score of only part of the text
    def __init__(self, nats: float, tokens: int, text_bytes: int, total: int, seconds: float):
        self.tokens, self.bytes, self.total, self.seconds = tokens, text_bytes, total, seconds
        self.loss, self.bpb = nats / tokens, nats / math.log(2) / text_bytes
        self.label = f" partial:{tokens}/{total}" if tokens < total else ""


# Scores windows of T inputs that start every S = EVAL_STRIDE tokens (0: S = T). Target j is token j + 1. The first
# window scores all its targets, each later one its last S. Targets beyond the end do not count.
class Evaluator:
    def __init__(self, stream: TokenStream, token_bytes: TokenBytes, config: Config, runtime: Runtime, accum_steps=1):
        self.stream, self.token_bytes, self.runtime = stream, token_bytes, runtime
        self.total = len(stream) - 1
        self.targets = min(config.val_tokens_limit or self.total, self.total)
        self.length, self.stride = config.train_seq_len, config.eval_stride or config.train_seq_len
        self.windows = 1 + max(0, math.ceil((self.targets - self.length) / self.stride))
        per_rank = config.val_batch_size // (self.length * runtime.world_size * accum_steps)
        self.batch = max(1, min(per_rank, math.ceil(self.windows / runtime.world_size)))

    def first_window(self, target: int) -> int:  # the first window that scores nothing before this target
        window = math.ceil((target - self.length) / self.stride) + 1
        return min(max(window, 1 if target else 0), self.windows)

    def batches(self, chunk: int, number: int):
        """This rank's batches of the windows that begin to score in chunk `number` of the text: inputs, targets, mask
        of scored targets, [batch, T] each, and the range of scored targets. Padding gives all batches one shape.
        With T = 4, S = 2 and 7 targets, the windows have targets 0123, 2345 and 4567 and score 0123, 45 and 6. A batch
        of two windows from index 1 on reads tokens 2 to 8, the last of which is padding, and scores range(4, 7)."""
        T, S, rank, ranks = self.length, self.stride, self.runtime.rank, self.runtime.world_size
        first, after = self.first_window(number * chunk), self.first_window((number + 1) * chunk)
        start, stop = (first + (after - first) * r // ranks for r in (rank, rank + 1))  # this rank's windows
        batch = min(self.batch, math.ceil(math.ceil(chunk / S) / ranks))  # no more rows than a chunk can fill
        for index in range(start, stop, batch):
            last = min(index + batch, stop) - 1  # the last window that is not padding
            begin, end = index * S, min(last * S + T, self.targets)  # targets [begin, end) are in these windows
            tokens = np.zeros((batch - 1) * S + T + 1, np.uint16)
            tokens[: end + 1 - begin] = self.stream.read(begin, end + 1 - begin)
            rows = to_device(tokens, self.runtime.device).unfold(0, T + 1, S)
            target = torch.arange(begin, begin + len(tokens) - 1, device=rows.device).unfold(0, T, S)
            fresh = (target >= target[:, :1] + T - S) | (target[:, :1] == 0)  # in no earlier window
            scored = range(begin + T - S if index else 0, end)
            yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), fresh & (target < end), scored

    @torch.no_grad()  # not inference_mode: tables cached under it would fail in the next training step
    def score(self, model: Model, forward, log=lambda line: None, interrupted=lambda: False, final=False):
        """The Score over all ranks, or None if one of them was interrupted. In the final score the text is scored in
        chunks of observe_every targets, and the model may learn from each chunk before the next one is scored."""
        chunk = model.observe_every if final and model.observe_every else self.targets
        last_start = (self.windows - 2) * self.stride + self.length if self.windows > 1 else 0
        chunks = 1 + last_start // chunk  # up to the one in which the last window begins to score
        model.eval()
        if final and (line := model.begin(self.targets, forward)):
            log(line)
        sums, count, text_bytes = [], 0, 0
        begun = reported = time.perf_counter()
        for number in range(chunks):
            for inputs, targets, mask, scored in self.batches(chunk, number):
                if interrupted():
                    break
                if type(model).distributions is Model.distributions:
                    nats = torch.where(mask, forward(inputs, targets), 0.0).sum()
                else:
                    nats = -model.distributions(inputs, mask).gather(1, targets[mask][:, None]).sum()
                sums.append(torch.stack([nats, mask.sum()]))  # still on the device
                count += len(scored)
                text_bytes += self.token_bytes.count(self.stream.read(scored.start, len(scored) + 1))
                done = count * self.runtime.world_size / self.targets
                if time.perf_counter() - reported > 10 and done < 1:
                    reported = time.perf_counter()
                    log(f"eval_progress:{done:.0%} eta:{(reported - begun) * (1 - done) / done:.0f}s")
            if number + 1 < chunks:
                model.observe(self.stream.read(number * chunk, chunk + 1))
        model.train()
        nats, count = map(sum, zip(*torch.stack(sums).tolist(), strict=True)) if sums else (0.0, 0)
        nats, count, text_bytes, stop = self.runtime.all_reduce([nats, count, text_bytes, bool(interrupted())])
        if stop:
            return None
        require(count == self.targets, f"scored {count:.0f} of {self.targets} targets: a bug in this script")
        require(text_bytes > 0, f"{self.stream.pattern}: the scored targets have no bytes: raise VAL_TOKENS_LIMIT")
        require(math.isfinite(nats), f"the validation loss is {nats}, the run diverged: lower learning rates")
        score = Score(nats, int(count), int(text_bytes), self.total, time.perf_counter() - begun)
        if final and (line := model.end(score)):
            log(line)
        return score


# ---------- Export ----------------------------------------------------------------------------------------------------
# The artifact: matrices as int8 with an fp16 scale per row, compressed by zlib, with a checksum at the end. The final
# score is that of this file as read back from disk.
INT8_FORMAT, INT8_CLIP_QUANTILE = "int8_clean_per_row_v1", 0.9999984
INT8_MIN_NUMEL = 65_536  # tensors of up to this many elements are kept as floats


def quantize_rows(w: Tensor, clip: Tensor, qmax: int = 127) -> tuple[Tensor, Tensor]:
    """int8 values [rows, cols] in +-qmax and fp16 scales [rows] of an fp32 matrix that is clipped at `clip` [rows].
    Rounding uses the stored fp16 scale, so the error within the clip is at most scale / 2."""
    scale = (clip / qmax).clamp(min=2.0**-24).where(clip > 0, 1.0).half()  # at least the smallest fp16
    return (w / scale.float()[:, None]).round().clamp(-qmax, qmax).to(torch.int8), scale


# Turns the weights into the bytes of the artifact and back, in the int8+zlib format of the public reference. The
# artifact also holds the knobs and names the model file, so that it is self-describing.
class Coder:
    file = "final_model.int8.ptz"
    tag = "int8+zlib"  # names the artifact in log lines
    control_fp32 = True  # small control tensors stay in fp32

    def __init__(self, config: Config):
        self.config = config

    # What the script calls, and when. Each does nothing here.
    def warm_up(self, trainer: "Trainer") -> float: ...  # after compilation: seconds that `calibrate` will take
    def calibrate(self, trainer: "Trainer"): ...  # after the last step, on every rank, with the weights to export
    def projected_size(self, model: Model, check) -> int: ...  # by the laws of tools/check.py; None: int8+zlib

    def quantize_matrix(self, name: str, w: Tensor) -> tuple[Tensor, Tensor]:
        """int8 values and fp16 scales [rows] of an fp32 matrix. A row is clipped at a high quantile of magnitudes."""
        return quantize_rows(w, torch.quantile(w.abs(), INT8_CLIP_QUANTILE, dim=1))

    def quantize(self, state: dict[str, Tensor]) -> dict:
        """The object that is serialized. Large tensors are quantized; small ones and integers are kept."""
        knobs = {f.name: getattr(self.config, f.name) for f in self.config.knobs().values() if f.metadata["artifact"]}
        artifact = {"__quant_format__": INT8_FORMAT, "config": knobs}
        if type(self.config) is not Config:
            path = Path(inspect.getfile(type(self.config)))
            artifact["source"] = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        quantized, scales, dtypes, kept, kept_dtypes = {}, {}, {}, {}, {}
        for name, tensor in state.items():
            tensor, dtype = tensor.detach().cpu().contiguous(), str(tensor.dtype).removeprefix("torch.")
            rule = self.config.model_class().rule(name) if tensor.is_floating_point() else None
            finite = not rule or (tensor.abs() <= 65504).all()
            require(finite, f"{name} is not finite in fp16: the run diverged: lower the learning rates")
            if rule and tensor.numel() > INT8_MIN_NUMEL:
                matrix = tensor.float() if tensor.ndim == 2 else tensor.float().view(1, -1)
                q, scale = self.quantize_matrix(name, matrix)
                quantized[name], dtypes[name] = q.view_as(tensor), dtype
                scales[name] = scale if tensor.ndim == 2 else scale[0]
            elif rule and not (rule.fp32 and self.control_fp32):
                kept[name], kept_dtypes[name] = tensor.half(), dtype
            else:
                kept[name] = tensor
        qmeta = {name: {"scheme": "per_row", "axis": 0} for name, q in quantized.items() if q.ndim == 2}
        artifact |= {"quantized": quantized, "scales": scales, "dtypes": dtypes}
        return artifact | {"passthrough": kept, "qmeta": qmeta, "passthrough_orig_dtypes": kept_dtypes}

    def dequantize(self, artifact: dict) -> dict[str, Tensor]:
        """The state dict that an artifact stands for, each tensor in its original type."""
        state = {}
        for name, q in artifact["quantized"].items():
            scale = artifact["scales"][name].float().view(-1, *[1] * (q.ndim - 1))  # one per row, or one in all
            state[name] = q.float().mul_(scale).to(getattr(torch, artifact["dtypes"][name]))
        original = artifact.get("passthrough_orig_dtypes", {})
        for name, tensor in artifact["passthrough"].items():
            state[name] = tensor.to(getattr(torch, original[name])) if original.get(name) else tensor
        return state

    def pack(self, artifact: dict) -> tuple[bytes, dict]:
        """The bytes of the file, and its sizes: a zlib stream, then its sha256, which other readers skip."""
        torch.save(artifact, raw := io.BytesIO())
        stream = zlib.compress(raw.getbuffer(), level=9)
        payload = sum(t.nbytes for t in torch.utils._pytree.tree_leaves(artifact) if isinstance(t, Tensor))
        return stream + hashlib.sha256(stream).digest(), {"payload": payload, "raw_torch": len(raw.getbuffer())}

    def encode(self, state: dict[str, Tensor], code_bytes: int) -> tuple[bytes, dict]:
        """The artifact file, and numbers to record; "payload" and "raw_torch" are bytes before compression."""
        return self.pack(self.quantize(state))

    def decode(self, blob: bytes) -> dict[str, Tensor]:
        """The state dict in a file written by `encode`. tools/artifact.py also reads other formats."""
        stream, checksum = blob[:-32], blob[-32:]
        require(hashlib.sha256(stream).digest() == checksum, "the artifact and its checksum differ: check the disk")
        return self.dequantize(torch.load(io.BytesIO(zlib.decompress(stream)), weights_only=True))


def export(state: dict[str, Tensor], coder: Coder, folder: RunFolder, code_bytes: int) -> dict:
    """Write final_model.pt and the artifact, log their sizes, and return them for result.json."""
    torch.save(state, buffer := io.BytesIO())
    raw = buffer.getvalue()
    folder.write("final_model.pt", raw)  # first, so that a failed export does not lose the weights
    blob, facts = coder.encode(state, code_bytes)
    folder.write(coder.file, blob)
    payload, raw_torch = facts.pop("payload"), facts.pop("raw_torch")  # logged; the rest goes to result.json, too
    ratio = sum(tensor.nbytes for tensor in state.values()) / payload
    total, limit = len(blob) + code_bytes, coder.config.size_limit
    verdict = "OK" if total <= limit else "TOO LARGE, NOT A VALID SUBMISSION"
    extra = "".join(f" {name}:{value:.4f}" for name, value in facts.items())
    folder.log(f"""Serialized model: {len(raw)} bytes
Code size: {code_bytes} bytes
Total submission size: {len(raw) + code_bytes} bytes
Serialized model {coder.tag}: {len(blob)} bytes (payload:{payload} raw_torch:{raw_torch} payload_ratio:{ratio:.2f}x)
Total submission size {coder.tag}: {total} bytes
size_verdict:{verdict} limit:{limit} spare:{limit - total}{extra}""")
    sizes = {"bytes_model": len(raw), "bytes_artifact": len(blob), "bytes_code": code_bytes, "bytes_total": total}
    return sizes | {"bytes_limit": limit, "sha256_artifact": hashlib.sha256(blob).hexdigest()} | facts


# ---------- Training --------------------------------------------------------------------------------------------------
# Compilation warmup and training use the same step function. The loop is flat: plan, validate, step, log. Logging never
# makes the host wait for the device: on a GPU the metrics of a step are read while the next step runs.
# Model, optimizers and data of one run, and the loop over them. The subclass in tools/checkpoint.py saves, resumes,
# handles signals, and fits the micro-batch into memory.
class Trainer:
    resumed_at: tuple[int, ...] = ()  # steps at which the run was resumed

    def __init__(self, config: Config, folder: RunFolder, stopwatch: Stopwatch, loader: TrainLoader):
        self.config, self.folder, self.stopwatch, self.loader = config, folder, stopwatch, loader
        self.runtime = runtime = folder.runtime
        # The model, the same model compiled (for scoring), and that under DDP (for training). They share the weights.
        self.model, self.compiled_model, self.note = build_model(config, runtime)
        self.train_model = self.compiled_model
        if runtime.world_size > 1:
            # All ranks compute the same tables, so buffers need no synchronization. torch 2.13 renamed the option.
            new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            options = {"forward_sync_buffers" if new else "broadcast_buffers": False, "gradient_as_bucket_view": True}
            self.train_model = DistributedDataParallel(self.compiled_model, **options)
        self.optimizers = self.model.optimizers(config, runtime)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["base_lr"] = group["lr"]  # the schedule scales this
        self.average = [p.detach().float().clone() for p in self.model.parameters()] if config.ema_decay else []
        self.coder = config.coder_class()(config)
        torch.manual_seed(config.seed + runtime.rank)  # for dropout
        self.steps = 0
        self.reserve = 0.0  # seconds of the training clock that calibration of the export needs
        self.finished = False  # all steps are done and the last checkpoint is saved
        self.exporting = False  # the weights are now those to export; no more training
        # Steps whose metrics are not read yet; seconds of the last 20 steps; training clock at the end of the last one.
        self.queue, self.step_seconds, self.last_time = deque(), deque(maxlen=20), 0.0

    def step(self, lr_scale: float, momentum: float) -> dict[str, Tensor | float]:
        """One optimizer step. Returns named numbers to log, which may still be on the device."""
        inputs, targets = self.loader.next_step()
        losses = torch.zeros(len(inputs), device=inputs.device)
        for micro, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            # DDP all-reduces gradients in every backward, unless no_sync: only the last micro-step needs it.
            skip_sync = self.runtime.world_size > 1 and micro + 1 < len(inputs)
            with self.train_model.no_sync() if skip_sync else contextlib.nullcontext():
                output = self.train_model(x, y)
                token_losses, *extra = output if isinstance(output, tuple) else (output,)
                loss = token_losses.mean() / len(inputs)
                (loss + sum(extra) / len(inputs)).backward()
            losses[micro] = loss.detach()
        metrics = {"train_loss": losses.sum(), "lr_scale": lr_scale}
        if self.runtime.world_size > 1:
            dist.all_reduce(metrics["train_loss"])
            metrics["train_loss"] /= self.runtime.world_size
        if self.config.grad_clip_norm:
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * lr_scale
                if isinstance(optimizer, Muon):
                    group["momentum"] = momentum
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return metrics | (self.model.metrics() or {})

    def warm_up(self, evaluator: Evaluator):
        """Compile and time every graph with real steps, then restore weights, optimizers, random numbers and data."""
        parts, position = [self.model, *self.optimizers], self.loader.position
        total = 0 if self.finished else self.config.warmup_steps
        saved = copy.deepcopy([part.state_dict() for part in parts]) if total else []
        with torch.random.fork_rng([self.runtime.device] if self.runtime.device.type == "cuda" else []):
            for start in self.model.graph_starts:
                self.model.advance(start)
                for step in range(1, total + 1):
                    began = self.stopwatch.elapsed("compile")
                    self.step(1.0, self.config.muon_momentum)
                    self.runtime.synchronize()
                    self.folder.log(f"warmup_step:{step}/{total}" + f" graph:{start}" * bool(start))
                    if 1 < step == total:  # the first step would time the compiler
                        self.step_seconds.append(self.stopwatch.elapsed("compile") - began)
                with torch.no_grad():  # the graph of a validation
                    if batch := next(evaluator.batches(evaluator.targets, 0), None):  # None: no windows on this rank
                        self.compiled_model.eval()(*batch[:2])
                self.compiled_model.train()
            self.reserve = self.coder.warm_up(self) or 0.0
        for part, state in zip(parts, saved, strict=False):
            part.load_state_dict(state)
        self.loader.seek(position)

    def plan(self) -> tuple[float, float, bool]:
        """Learning-rate scale and progress of the next step, and whether to stop: rank 0's decision, by its clock. The
        step must end before the limit even if it takes as long as the slowest of the last 20."""
        elapsed = self.stopwatch.elapsed("training") + self.reserve
        end = elapsed + (1 + len(self.queue)) * max(self.step_seconds, default=0.0)
        out_of_time = 0 < self.config.max_wallclock_seconds <= end
        stop = self.finished or self.steps >= self.config.iterations or out_of_time
        progress = progress_at(self.config, self.steps, elapsed)
        scale = self.model.lr_scale(self.config, self.steps, progress)
        return self.runtime.broadcast((scale, 1.0 if stop else progress, stop))

    def interrupted(self) -> bool: ...  # polled in a validation; if true on any rank, there is no score
    def save(self): ...  # a checkpoint, when all steps are done

    def train(self, evaluator: Evaluator) -> Score:
        """Train until ITERATIONS or the time limit. Returns the score of the last validation."""
        every = self.config.val_loss_every
        while True:
            scale, progress, stop = self.plan()
            self.model.advance(progress)
            if stop:
                self.finish_weights()
            due = every and self.steps % every == 0 and (self.steps or self.config.val_at_start)
            if stop or due:
                score = self.validate(evaluator)
                if not score:  # a signal interrupted it; plan() then saves a checkpoint and ends the run
                    continue
                if stop:
                    return score
            metrics = self.step(scale, muon_momentum(self.config, self.steps))
            if self.average:  # EMA in fp32; a smaller decay at first forgets the initial weights
                decay = min(self.config.ema_decay, (self.steps + 1) / (self.steps + 10))
                torch._foreach_lerp_(self.average, [p.detach().float() for p in self.model.parameters()], 1 - decay)
            self.steps += 1
            self.queue_metrics(metrics)
            # A GPU may have one more step queued, so that it never waits for the host.
            self.log_steps(keep=1 if self.runtime.device.type == "cuda" else 0)

    @torch.no_grad()
    def finish_weights(self):
        """After the last step: a checkpoint, then the average of the weights, then calibration of the export."""
        if not self.finished:
            self.log_steps()
            self.stopwatch.switch("export")
            self.finished = True
            self.save()
            self.stopwatch.switch("training")
        if not self.exporting:
            self.exporting = True
            for p, average in zip(self.model.parameters(), self.average, strict=False):
                p.copy_(torch.lerp(p.float(), average, self.config.ema_share))
            self.coder.calibrate(self)

    def queue_metrics(self, metrics: dict[str, Tensor | float]):
        """Send the numbers of a step to the host; on a GPU they arrive when the step has ended."""
        tensors = {name: value.detach().float() for name, value in metrics.items() if isinstance(value, Tensor)}
        values, arrived = torch.stack([*tensors.values()]), None
        if values.is_cuda:
            values = torch.empty(len(tensors), pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.queue.append((self.steps, metrics, list(tensors), values, arrived))

    def log_steps(self, keep: int = 0):
        """Log the queued steps except the last `keep`, and raise if a loss is not finite."""
        while len(self.queue) > keep:
            step, metrics, names, values, arrived = self.queue.popleft()
            arrived.synchronize() if arrived else self.runtime.synchronize()
            metrics |= dict(zip(names, values.tolist(), strict=True))
            clock = self.stopwatch.elapsed("training")
            self.step_seconds.append(clock - self.last_time)
            self.last_time = clock
            loss, every = metrics["train_loss"], self.config.train_log_every
            require(math.isfinite(loss), f"step {step}: the loss is {loss}: lower MATRIX_LR, SCALAR_LR, TIED_EMBED_LR")
            if every and (step <= 10 or step % every == 0):
                line = f"step:{step}/{self.config.iterations} train_loss:{loss:.4f} {times(step, clock)}"
                more = [f" {name}:{metrics[name]:.4f}" for name in metrics if name not in ("train_loss", "lr_scale")]
                speed = kernels.speed(self) if (kernels := tool("kernels")) else ""
                self.folder.log(f"{line}{speed}{''.join(more)}")
            self.folder.append("metrics.jsonl", json.dumps({"step": step, **metrics, "train_seconds": round(clock, 4)}))

    def validate(self, evaluator: Evaluator) -> Score | None:
        """Score and log, with the training clock paused; None if a signal interrupted it."""
        self.log_steps()
        self.stopwatch.switch("evaluation")
        score = evaluator.score(self.model, self.compiled_model, self.folder.log, self.interrupted)
        self.stopwatch.switch("training")
        self.last_time = clock = self.stopwatch.elapsed("training")
        if score:
            line = f"step:{self.steps}/{self.config.iterations} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f}"
            self.folder.log(f"{line} {times(self.steps, clock)}{score.label}")
            numbers = {"val_loss": score.loss, "val_bpb": score.bpb, "partial": bool(score.label)}
            self.folder.append("metrics.jsonl", json.dumps({"step": self.steps, **numbers}))
        return score


def times(step: int, clock: float) -> str:
    return f"train_time:{1000 * clock:.0f}ms step_avg:{1000 * clock / max(step, 1):.2f}ms"


# ---------- Files around the script -----------------------------------------------------------------------------------
# Tools are optional: the script alone trains, exports and scores. A model file is part of the submission, with whatever
# it imports from its own folder: those sources are hashed, copied into the run folder and counted in the code size.
TOOLS = {  # name: (what is lost without tools/NAME.py, whether it is submission code when used)
    "check": ("contradictory and misspelled knobs are not found", False),
    "checkpoint": ("no checkpoints, no resuming, no fitting of micro-batches to the memory", False),
    "artifact": ("no MODE=eval and no MODE=sample", False),
    "kernels": ("no choice of kernels, no speed in the log", False),
    "vocabularies": ("no tokenizers but SentencePiece models without case marks", True),  # determines byte counts
}
SUBMISSION_TOOLS = [name for name, (_, is_submission) in TOOLS.items() if is_submission]


def tool(name: str, log=lambda line: None, required: bool = False):
    """The module tools/NAME.py next to this script, loaded by its path. If missing: None, and a warning to `log`."""
    key, folder = f"train_gpt.tools.{name}", Path(__file__).resolve().parent
    paths = [folder / "tools" / f"{name}.py"] + [folder / f"{name}.py"] * (name in SUBMISSION_TOOLS)
    path = next(filter(Path.is_file, paths), None)
    if module := sys.modules.get(key) or (path and load_module(path, key)):
        return module
    require(not required, f"{paths[0]} is missing: take it from the repository")
    log(f"warning: tools/{name}.py is missing: {TOOLS[name][0]}")


def load_module(path: Path, key: str):
    spec = importlib.util.spec_from_file_location(key, path)
    module = sys.modules[key] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_model_file(file: str) -> type[Config]:
    """The class Config of a model file, whose folder goes first on sys.path. The path is relative to the working
    directory, then to this script, then by its bare name next to this script, as in a run folder."""
    here = Path(__file__).resolve().parent
    path = next(filter(Path.is_file, (Path(file), here / file, here / Path(file).name)), None)
    require(path, f"MODEL_FILE={file}: no such file here or in {here}: give one such as records/models/tiny.py")
    key = "model_file_" + re.sub(r"\W", "_", str(path.resolve()))
    sys.path[:] = dict.fromkeys([str(path.resolve().parent), *sys.path])  # first, and once
    try:
        found = vars(sys.modules.get(key) or load_module(path.resolve(), key)).get("Config")
    except Exception as error:  # a model file may raise anything
        sys.modules.pop(key, None)
        if isinstance(error, UserError):
            raise
        raise UserError(f"MODEL_FILE={path} cannot be loaded: {error!r:.200}: correct it") from error
    fits = isinstance(found, type) and issubclass(found, Config) and found.__module__ == key
    require(fits, f"MODEL_FILE={path} defines no class Config(train_gpt.Config): add one that names its model_class")
    return found


def source_paths(config: Config) -> dict[str, Path]:
    """{name in the run folder: path} of this script, SUBMISSION_TOOLS, and a model file with what it imports."""
    script, folder = Path(__file__).resolve(), Path(inspect.getfile(type(config))).resolve().parent
    files = {key: getattr(module, "__file__", None) for key, module in list(sys.modules.items())}
    paths = [Path(files[key]) for name in SUBMISSION_TOOLS if (key := f"train_gpt.tools.{name}") in files]
    if type(config) is not Config:  # only then, since to resolve thousands of paths takes a while
        loaded = {key: Path(file).resolve() for key, file in files.items() if file and Path(file).is_file()}
        paths += [path for path in loaded.values() if path.parent == folder and path != script]
        nested = [p for key, p in loaded.items() if p.parent != folder and p.is_relative_to(folder / key.split(".")[0])]
        require(not nested, f"MODEL_FILE imports {' '.join(map(str, nested))}: put it next to it, where it is counted")
    return {"train_gpt.py": script} | {path.name: path for path in paths}


# ---------- Modes -----------------------------------------------------------------------------------------------------
# MODE=train, from checking the inputs to writing result.json. Every other mode is a tool. main only dispatches.
def open_text(config: Config, token_bytes: TokenBytes, folder: RunFolder) -> tuple[TokenStream, dict]:
    """The validation text, and what the audit found: facts for result.json, on rank 0 only."""
    stream, facts = TokenStream(config.data_path, "val", config.vocab_size), {}
    require(len(stream) > 1, f"{stream.pattern} holds {len(stream)} tokens: 2 are needed to score one")
    folder.log(f"val_loader:shards pattern={stream.pattern} tokens:{len(stream) - 1}")
    if folder.runtime.is_master:
        line, facts = audit(token_bytes, stream, config.data_path)
        folder.log("\n".join(filter(None, (config.check_text(stream, token_bytes), line))))
    return stream, facts


def log_final(label: str, score: Score, folder: RunFolder):
    seconds, counted = f"eval_time:{1000 * score.seconds:.0f}ms", f"tokens:{score.tokens} bytes:{score.bytes}"
    folder.log(f"{label} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} {seconds}{score.label}")
    folder.log(f"{label}_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f} {counted}{score.label}")


def train(config: Config, folder: RunFolder, argv: list[str]):
    """MODE=train: one run, from the checks to result.json."""
    runtime, stopwatch, defaults = folder.runtime, Stopwatch(folder.runtime.synchronize), type(config)().as_env()
    lines = [f"{' ' if text == defaults.get(name) else '*'} {name}={text}" for name, text in config.as_env().items()]
    check = tool("check", folder.log)
    folder.log("\n".join([*lines, *(check.typo_warnings(os.environ, config.knobs()) if check else [])]))
    accum_steps = config.accumulation_steps(runtime.world_size, runtime.device.type)
    stream = TokenStream(config.data_path, "train", config.vocab_size)
    folder.log(f"train_loader:shards pattern={stream.pattern} tokens:{len(stream)}")
    stream.read(0, len(stream.shards[0]) if runtime.is_master else 1)  # checks the tokens of the first shard
    token_bytes = TokenBytes(config.tokenizer_path, config.vocab_size, config.vocab_padding)
    config.coder_class()  # imports its modules now, so that source_paths finds them
    sources = {name: path.read_bytes() for name, path in source_paths(config).items()}
    folder.choose(config, stream, sources)
    val_stream, facts = open_text(config, token_bytes, folder)

    stopwatch.switch("compile")
    checkpoint = tool("checkpoint", folder.log)
    trainer_class = checkpoint.Trainer if checkpoint else Trainer
    trainer = trainer_class(config, folder, stopwatch, TrainLoader(stream, config, runtime, accum_steps))
    folder.create(config, sources)
    params = sum(p.numel() for p in trainer.model.parameters())
    folder.log(f"{trainer.note}\nmodel_params:{params}\nseed:{config.seed}\nrun_folder:{folder.path}")
    folder.log(f"world_size:{runtime.world_size} grad_accum_steps:{trainer.loader.accum_steps}")
    evaluator = Evaluator(val_stream, token_bytes, config, runtime, trainer.loader.accum_steps)
    trainer.warm_up(evaluator)
    stopwatch.switch("training")
    startup, compiling = (1000 * stopwatch.seconds[phase] for phase in ("startup", "compile"))
    folder.log(f"start_to_first_step:{startup + compiling:.0f}ms compile:{compiling:.0f}ms")
    before = trainer.train(evaluator)
    stopwatch.switch("export")
    clock, limit = stopwatch.seconds["training"], config.max_wallclock_seconds
    if trainer.steps < config.iterations:
        reached = f"train_time:{1000 * trainer.last_time:.0f}ms step:{trainer.steps}/{config.iterations}"
        folder.log(f"stopping_early: wallclock_cap {reached}")
    if 0 < limit < clock:
        folder.log(f"clock_verdict:{clock - limit:.3f}s OVER MAX_WALLCLOCK_SECONDS={limit}, NOT A VALID SUBMISSION")
    if runtime.device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20
        folder.log(f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB")

    coder = trainer.coder
    if runtime.is_master:
        facts |= export(trainer.model.state_dict(), coder, folder, sum(map(len, sources.values())))
    artifact = (folder.path / coder.file).read_bytes() if runtime.is_master else None
    # Rank 0 reads the file back and broadcasts its bytes, so that no shared filesystem is needed.
    trainer.model.load_state_dict(coder.decode(runtime.broadcast(artifact)))
    stopwatch.switch("evaluation")
    after = evaluator.score(trainer.model, trainer.compiled_model, folder.log, final=True)
    stopwatch.switch("export")
    log_final(f"final_{coder.tag.replace('+', '_')}_roundtrip", after, folder)
    if runtime.is_master:
        write_result(trainer, before, after, sources, facts | {"sha256_tokenizer": token_bytes.sha256})


def write_result(trainer: Trainer, before: Score, after: Score, sources: dict[str, bytes], facts: dict):
    """result.json: scores of the last weights (`before`) and of the artifact, times, machine, sources, facts."""
    config, runtime, steps, seconds = trainer.config, trainer.runtime, trainer.steps, trainer.stopwatch.seconds
    counted, limit, trained = facts["val_bytes"], config.max_wallclock_seconds, seconds["training"]
    require(after.label or after.bytes == counted, f"scored {after.bytes} of {counted} bytes: a fault of this script")
    hashes = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in sources.items()}
    result = {"run_id": trainer.folder.run_id, "seed": config.seed, "steps": steps, "resumed_at": trainer.resumed_at}
    result |= {"model_params": sum(p.numel() for p in trainer.model.parameters()), "world_size": runtime.world_size}
    result |= {"val_loss": after.loss, "val_bpb": after.bpb, "partial": bool(after.label), "val_tokens": after.total}
    result |= {"pre_quant_val_loss": before.loss, "pre_quant_val_bpb": before.bpb, "eval_stride": config.eval_stride}
    result |= {"scored_tokens": after.tokens, "scored_bytes": after.bytes, "eval_seconds": round(after.seconds, 3)}
    result |= {"train_tokens": steps * config.train_batch_tokens, "step_avg_ms": 1000 * trained / max(steps, 1)}
    result |= {"over_clock": 0 < limit < trained, "seconds": {phase: round(s, 3) for phase, s in seconds.items()}}
    result |= {"grad_accum_steps": trainer.loader.accum_steps, "device": runtime.device_name, "note": trainer.note}
    result |= {"dtype": str(runtime.dtype), "torch": torch.__version__, "cuda": torch.version.cuda}
    result |= {"numpy": np.__version__, "python": platform.python_version(), "platform": platform.platform()}
    result |= {"sha256_code": hashes["train_gpt.py"]["sha256"], "sources": hashes, **facts}
    trainer.folder.write("result.json", (json.dumps(result, indent=1) + "\n").encode())


def main(argv: list[str] | None = None) -> int:
    """Run the mode that the configuration names. Returns the exit code."""
    argv, folder, message = sys.argv[1:] if argv is None else argv, None, ""
    with contextlib.suppress(AttributeError):  # a replaced stdout may lack this
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks must not end the run
    try:
        if argv in (["-h"], ["--help"]):
            return tool("check", required=True).explain(tool("artifact"))
        config = Config.load(argv, os.environ)
        checkpoint = tool("checkpoint")
        folder = (checkpoint.RunFolder if checkpoint else RunFolder)(Runtime(config, os.environ))
        name = "check" if config.mode == "check" else "artifact"
        mode = train if config.mode == "train" else tool(name, required=True).MODES[config.mode]
        code = mode(config, folder, argv) or 0
    except (UserError, OSError) as error:
        message, code = f"error: {error}", 2
    except (RuntimeError, KeyboardInterrupt) as error:
        check = tool("check")
        if not check:
            raise
        message, code = check.explain_error(error, folder)  # re-raises what is not a user error
    if message:
        print(message, file=sys.stderr, flush=True)
    if folder:
        folder.close(*filter(None, [message]))
        if folder.runtime.world_size > 1:  # a clean exit could deadlock: other ranks may wait for this one
            sys.stdout.flush()
            os._exit(code)
    return code


if __name__ == "__main__":
    sys.modules["train_gpt"] = sys.modules["__main__"]  # tools and model files import this module by its name
    sys.exit(main())
