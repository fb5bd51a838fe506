"""Train a small GPT as well as 600 seconds and 16,000,000 bytes allow. The score is in bits per byte of held-out text.

    python train_gpt.py                                      one process, on whatever device this machine has
    python train_gpt.py records/recipes/demo_cpu.env         a configuration file of KEY=VALUE lines
    SEED=1338 MATRIX_LR=0.03 python train_gpt.py             every knob is an environment variable
    MODEL_FILE=records/models/tiny.py python train_gpt.py    a model of your own, with more knobs
    torchrun --standalone --nproc_per_node=8 train_gpt.py    eight GPUs; any number of ranks works
    MODE=check python train_gpt.py                           what a run needs; README.md has eval and sample
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
import signal
import statistics
import sys
import time
import traceback
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

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_BYTES = 1024
NAMED_TOKENIZER = re.compile(r"\w+|(.*\W)?\w*byte_?260\w*(\.json)?")  # "bytes" or a name of tiktoken; no .model file
NO_DATA_HINT = """two commands make a small dataset and train on it:
  python data/prepare_shakespeare.py\n  python train_gpt.py records/recipes/demo_cpu.env"""


class UserError(ValueError):
    """A mistake that the user can correct. It is shown as one message without a traceback; the exit code is 2."""


def require(ok, message: str):
    if not ok:
        raise UserError(message)


# ---------- Config ----------------------------------------------------------------------------------------------------
# Every hyperparameter is a field of one frozen dataclass, checked once and printed whole at the start of a run. A value
# comes from the defaults, then from a FILE.env, then from the environment; the last one wins.


def knob(default, meaning: str, low=None, high=None, choices=(), free=False, artifact=False):
    """A field of Config. Bounds are inclusive.

    A `free` knob does not shape the result and may change when a run resumes. An `artifact` knob is recorded in the
    artifact, so that the file can be scored without any other settings.
    """
    if type(default) is int and high is None:
        high = 2**32  # a larger number of anything would only hang
    metadata = {"meaning": meaning, "allowed": (low, high, choices), "free": free, "artifact": artifact}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """All knobs. The name of a field in capitals is its environment variable; `# --` starts a group of --help.

    A model file subclasses this without a decorator. A new knob is a field made by `knob`; a new default for a knob
    that exists is the value alone, such as `vocab_size = 8192`.
    """

    # -- Task and files
    mode: str = knob("train", "what this call does", choices=("train", "check", "eval", "sample"), free=True)
    data_path: str = knob("./data/datasets/fineweb10B_sp1024", "folder of fineweb_*.bin shards", free=True)
    tokenizer_path: str = knob(
        "./data/tokenizers/fineweb_1024_bpe.model", "a .model file, a name of tiktoken, or bytes", free=True
    )
    model_file: str = knob("", "a .py file with a model and more knobs; empty: the GPT of this script", free=True)
    log_dir: str = knob("./logs", "folder of the run folders", free=True)
    run_id: str = knob("", "name of the run folder; empty: a time stamp", free=True)
    seed: int = knob(1337, "seed of the initial weights, and of a sample", 0, 2**63 - 1)
    # -- Checkpoints
    checkpoint_every_seconds: float = knob(-1.0, "0: only one at the end; -1: 60 s for long runs", -1, free=True)
    resume: str = knob("auto", "auto: continue a run folder that exists; never; or a checkpoint", free=True)
    resume_force: bool = knob(False, "resume although knobs that shape the result differ", free=True)
    # -- Device and kernels
    device: str = knob("auto", "device of every rank", choices=("auto", "cuda", "mps", "cpu"), free=True)
    dtype: str = knob("auto", "type of the activations", choices=("auto", "bfloat16", "float32"))
    compile: str = knob("auto", "auto: where a compiler works", choices=("auto", "0", "1", "autotune"), free=True)
    attention: str = knob(
        "auto",
        "attention kernel; blocked and fused are this project's own, for CPUs",
        choices=("auto", "fastest", "flash3", "cudnn", "flash", "efficient", "math", "blocked", "fused"),
        free=True,
    )
    target_world_size: int = knob(0, "MODE=check for this many GPUs; 0: for the ranks at hand", 0, free=True)
    # -- Length of the run, and its batches
    iterations: int = knob(20_000, "maximum number of optimizer steps", 1)
    max_wallclock_seconds: float = knob(600.0, "limit of the training clock; validation does not count; 0: none", 0)
    warmup_steps: int = knob(20, "compilation steps, undone afterwards; the learning rate has no warmup", 0, free=True)
    loader: str = knob("stream", "order of the training sequences", choices=("stream", "shuffle"))
    train_batch_tokens: int = knob(393_216, "tokens per step, over all ranks and micro-steps", 1, artifact=True)
    train_seq_len: int = knob(4096, "tokens per sequence, in training and evaluation", 1, artifact=True)
    grad_accum_steps: int = knob(
        0, "micro-steps; 0: at least 8 / ranks on GPUs, 1 on CPUs", 0, free=True, artifact=True
    )
    micro_batch_tokens: str = knob("auto", "limit per micro-step and rank; auto: what fits", free=True, artifact=True)
    # -- Logging and validation
    train_log_every: int = knob(200, "steps between log lines, after the first ten; 0: none", 0, free=True)
    val_loss_every: int = knob(1000, "steps between validations; 0: only at the end", 0, free=True)
    val_at_start: bool = knob(True, "validate before the first step, unless VAL_LOSS_EVERY is 0", free=True)
    val_batch_size: int = knob(524_288, "tokens per validation batch, over all ranks", 1, free=True, artifact=True)
    val_tokens_limit: int = knob(0, "score only the first N targets, labeled partial; 0: all", 0, free=True)
    eval_stride: int = knob(0, "targets per sliding window; 0: disjoint windows", 0, free=True, artifact=True)
    artifact: str = knob("", "model of MODE=eval and sample: a final_model.int8.ptz or a .pt file", free=True)
    # -- Model
    vocab_size: int = knob(1024, "tokens in the vocabulary; must match the tokenizer", 2, 65_536, artifact=True)
    num_layers: int = knob(9, "transformer blocks", 1, artifact=True)
    model_dim: int = knob(512, "width D of the residual stream", 2, artifact=True)
    num_heads: int = knob(8, "query heads H", 1, artifact=True)
    num_kv_heads: int = knob(4, "key-value heads K; must divide NUM_HEADS", 1, artifact=True)
    mlp_mult: float = knob(2.0, "hidden width of the MLP over MODEL_DIM, rounded", 0.01, 1024, artifact=True)
    tie_embeddings: bool = knob(True, "the embedding is also the output projection", artifact=True)
    tied_embed_init_std: float = knob(0.005, "standard deviation of the initial tied embedding", 0)
    logit_softcap: float = knob(30.0, "smooth limit of the logits", 1e-3, artifact=True)
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
    muon_weight_decay: float = knob(0.0, "weight decay of the matrices, times their learning rate", 0)
    embed_weight_decay: float = knob(0.0, "AdamW weight decay of embedding and output projection", 0)
    scalar_weight_decay: float = knob(0.0, "AdamW weight decay of vectors, scales and gains", 0)
    grad_clip_norm: float = knob(0.0, "limit of the global gradient norm, after reduction; 0: off", 0)
    # -- Schedule and average of the weights
    warmdown_frac: float = knob(0.3526, "final fraction of the run in which the learning rates fall to 0", 0, 1)
    lr_floor: float = knob(0.0, "lower bound of the learning-rate scale in the warmdown", 0, 1)
    ema_decay: float = knob(0.0, "decay of the average of the weights; 0: no average", 0, 1)
    ema_share: float = knob(1.0, "weight of the average in the export; the last weights have the rest", 0, 1)
    # -- Export
    size_limit: int = knob(16_000_000, "limit of code plus artifact, in bytes", 1)

    vocab_padding = 127  # VOCAB_SIZE may exceed the tokenizer's size by this much, to be a multiple of 128

    def __init_subclass__(cls):
        """Make a subclass a frozen dataclass, too. A default that it replaces keeps the meaning and the bounds."""
        bases = reversed(cls.__mro__[1:])
        inherited = {
            name: field for base in bases for name, field in vars(base).get("__dataclass_fields__", {}).items()
        }
        for name, value in list(vars(cls).items()):
            if name in inherited and not isinstance(value, dataclasses.Field):
                default = type(inherited[name].default)(value)
                setattr(cls, name, dataclasses.field(default=default, metadata=inherited[name].metadata))
                cls.__annotations__[name] = inherited[name].type
        dataclasses.dataclass(frozen=True)(cls)

    @classmethod
    def model_class(cls) -> type["Model"]:
        """The model that this configures. The Config of a model file names its own."""
        return GPT

    @classmethod
    def coder_class(cls) -> type["Coder"]:
        """What turns the weights into the artifact and back."""
        return Coder

    @classmethod
    def knobs(cls) -> dict[str, dataclasses.Field]:
        return {field.name.upper(): field for field in dataclasses.fields(cls)}

    @classmethod
    def artifact_knobs(cls) -> list[str]:
        return [name for name, field in cls.knobs().items() if field.metadata["artifact"]]

    @classmethod
    def load(cls, argv: list[str], environ, from_artifact: dict[str, str] | None = None) -> "Config":
        """Read the knobs: defaults, then what an artifact records, then the file in argv, then the environment."""
        require(len(argv) <= 1, f"{argv}: give at most one FILE.env; knobs are environment variables")
        texts = read_env_file(Path(argv[0])) if argv else {}
        model_file = environ.get("MODEL_FILE", texts.get("MODEL_FILE"))
        if cls is Config and model_file:
            return load_model_file(model_file).load(argv, environ, from_artifact)
        knobs = cls.knobs()
        check = tool("check", log=str)
        if check:
            texts = check.drop_moved_knobs(texts, knobs)
        for name in texts.keys() - knobs.keys():
            hint = check.nearest(name, knobs) if check else "see --help"
            raise UserError(f"{argv[0]}: {name} is not a knob: {hint}")
        texts = (from_artifact or {}) | texts | {name: environ[name] for name in knobs if name in environ}
        config = cls(**{knobs[name].name: parse(knobs[name], text) for name, text in texts.items()})
        config.check()
        if check:
            check.check_combinations(config)
        return config

    def check(self):
        """Raise if a value is out of bounds, or if it would fail later with an obscure message.

        tools/check.py knows the other contradictions between knobs.
        """
        for name, field in self.knobs().items():
            value = getattr(self, field.name)
            low, high, choices = field.metadata["allowed"]
            require(not choices or value in choices, f"{name}={value}: expected one of {', '.join(choices)}")
            require(low is None or value >= low, f"{name}={value} is too small: the minimum is {low}")
            require(high is None or value <= high, f"{name}={value} is too large: the maximum is {high}")
        named = re.fullmatch(r"[\w+=-][\w.+=-]{0,99}|", self.run_id)
        require(named, f"RUN_ID={self.run_id!r} is no folder name: use up to 100 letters, digits and . _ + = -")
        D, H, K, T = self.model_dim, self.num_heads, self.num_kv_heads, self.train_seq_len
        require(D % (2 * H) == 0, f"MODEL_DIM={D} is not a multiple of 2 * NUM_HEADS={H}: use {D + -D % (2 * H)}")
        require(H % K == 0, f"NUM_KV_HEADS={K} does not divide NUM_HEADS={H}: use one of {divisors(H)}")
        batch = self.train_batch_tokens
        require(batch % T == 0, f"TRAIN_BATCH_TOKENS={batch} is not whole TRAIN_SEQ_LEN={T}: use {batch + -batch % T}")

    def check_text(self, stream: "TokenStream", token_bytes: "TokenBytes") -> str:
        """Check the validation text on rank 0 and return a line for the log. A model file may override this."""
        return ""

    def as_env(self) -> dict[str, str]:
        """{KNOB: text} of a FILE.env that reproduces this run, without the knobs that belong to one call only."""
        once = ("RUN_ID", "MODE", "ARTIFACT", "RESUME", "RESUME_FORCE")
        values = {name: getattr(self, field.name) for name, field in self.knobs().items() if name not in once}
        return {name: str(int(value) if isinstance(value, bool) else value) for name, value in values.items()}

    def accumulation_steps(self, world_size: int, device_type: str) -> int:
        """Micro-steps per step: GRAD_ACCUM_STEPS, or the smallest number that satisfies three conditions.

        It gives whole sequences, it respects MICRO_BATCH_TOKENS, and on GPUs it is at least 8 / world_size, so that one
        GPU computes what eight would.
        """
        T = self.train_seq_len
        sequences = self.train_batch_tokens // T
        require(
            sequences % world_size == 0,
            f"TRAIN_BATCH_TOKENS={sequences * T} is {sequences} sequences, which do not divide among {world_size} ranks: "
            f"use {-(-sequences // world_size) * world_size * T} tokens, or one of {divisors(sequences)} ranks",
        )
        per_rank = sequences // world_size
        allowed = divisors(per_rank)
        wanted = self.grad_accum_steps
        require(not wanted or wanted in allowed, f"GRAD_ACCUM_STEPS={wanted}: for {per_rank} sequences use {allowed}")
        if wanted:
            return wanted
        if self.micro_batch_tokens == "auto":
            # A CPU that runs out of memory gets no error to react to. 2**14 tokens are enough to keep its cores busy.
            limit = 2**14 if device_type == "cpu" else math.inf
        else:
            limit = int(self.micro_batch_tokens) or math.inf
        fewest = max(0 if device_type == "cpu" else 8 / world_size, per_rank * T / limit)
        return next((steps for steps in allowed if steps >= fewest), per_rank)


def divisors(n: int) -> list[int]:
    return sorted({d for k in range(1, math.isqrt(n) + 1) if n % k == 0 for d in (k, n // k)})


def parse(field: dataclasses.Field, text: str):
    """Read the value of a knob from its text."""
    kind = type(field.default)
    text = text.strip()
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
    grammar = re.compile(r"""\s*(\w+)\s*=\s*("[^"]*"|'[^']*'|[^"'#\s](?:[^#]*[^#\s])?|)\s*(?:\s#.*)?""")
    texts = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = grammar.fullmatch(line)
        require(match, f"{path}:{number}: {line.strip()!r} is not a KEY=VALUE line")
        name, text = match.groups()
        require(name not in texts, f"{path}:{number}: {name} is given twice: keep one")
        quoted = text[:1] in ('"', "'")
        texts[name] = text[1:-1] if quoted else text
    return texts


# ---------- Runtime ---------------------------------------------------------------------------------------------------
# The device, the ranks with their collectives, the run folder with its log, and the one clock. Decisions that depend on
# time are made by rank 0 and broadcast: two ranks never act on two clocks.


class Runtime:
    """This process: its rank among `world_size`, its device, the type of its activations, and its collectives."""

    newton_schulz = None  # a kernel for Muon's iterations, if tools/kernels.py has one

    def __init__(self, config: Config, environ):
        rank = environ.get("RANK", "0")
        size = environ.get("WORLD_SIZE", "1")
        numbers = rank.isdecimal() and size.isdecimal() and int(rank) < int(size)
        reachable = size == "1" or {"MASTER_ADDR", "MASTER_PORT"} <= set(environ)
        message = f"RANK={rank} WORLD_SIZE={size} without MASTER_ADDR or MASTER_PORT: use torchrun, or unset both"
        require(numbers and reachable, message)
        self.rank = int(rank)
        self.world_size = int(size)
        self.is_master = self.rank == 0
        self.device = self.choose_device(config, environ)
        self.dtype = self.best_dtype() if config.dtype == "auto" else getattr(torch, config.dtype)
        if self.world_size > 1:
            # NCCL refuses two ranks on one GPU; gloo does not.
            own_gpu = int(environ.get("LOCAL_WORLD_SIZE", size)) <= torch.cuda.device_count()
            self.join("nccl" if self.device.type == "cuda" and own_gpu else "gloo", environ)

    def choose_device(self, config: Config, environ) -> torch.device:
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        other_machine = config.mode == "check" and config.target_world_size
        kind = config.device
        if kind == "auto" or other_machine:
            kind = next(name for name in found if found[name])
        require(found[kind], f"DEVICE={kind}: torch {torch.__version__} finds none here: use DEVICE=auto")
        require(
            kind != "mps" or self.world_size == 1, f"WORLD_SIZE={self.world_size}: MPS has one rank: use DEVICE=cpu"
        )
        if kind != "cuda":
            return torch.device(kind)
        device = torch.device(kind, int(environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device

    def join(self, backend: str, environ):
        """Meet the other ranks. The timeout is an hour, since some may compile much longer than others."""
        hour = datetime.timedelta(hours=1)
        check = tool("check", log=str)
        store = check.meet(environ, hour) if check else None  # names the ranks that are late
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=hour)
        self.host_group = dist.new_group(backend="gloo", timeout=hour)  # does not wait for work queued on the GPU

    def best_dtype(self) -> torch.dtype:
        """bfloat16 where the hardware multiplies it, float32 elsewhere."""
        if self.device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
            native = self.device.type == "cpu" and any(getattr(torch.cpu, test, bool)() for test in tests)
        return torch.bfloat16 if native else torch.float32

    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
        name = re.search(r"model name\s*: (.*)", cpuinfo)
        return f"{name[1] if name else platform.processor()}, {torch.get_num_threads()} threads"

    def synchronize(self):
        """Wait until the device has finished all queued work."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def all_reduce(self, values: list[float]) -> list[float]:
        """Sums over the ranks, in float64 on the hosts."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total, group=self.host_group)
        return total.tolist()

    def broadcast(self, value):
        """Rank 0's value, of any type that can be pickled, on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]


class RunFolder:
    """logs/<run_id>/ and everything that rank 0 writes there. Lines logged before `create` are kept until then."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.early_lines = []
        self.file = None
        self.header = ""  # first line of config.env; a restarted launch finds its folder by it
        self.before_closing = lambda: None  # waits for a checkpoint that is still being written

    def locate(self, config: Config, name: str = ""):
        """Choose the folder: RUN_ID, or `name`, or a new time stamp."""
        # Two containers may have the same clock and the same process id, so the stamp ends with a random number.
        stamp = time.strftime(f"%Y-%m-%d_%H-%M-%S_{int.from_bytes(os.urandom(3))}")
        self.run_id = self.runtime.broadcast(config.run_id or name or stamp)
        self.path = Path(config.log_dir) / self.run_id

    def create(self, config: Config, sources: dict[str, bytes]):
        """Create or reopen the folder, lock it for this process, and write the configuration and the sources."""
        if not self.runtime.is_master:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path / "train.log", "a", encoding="utf-8")
            if checkpoint := tool("checkpoint", log=str):
                checkpoint.lock(self.file, self.log)
        except OSError as error:
            self.file = None
            place = f"LOG_DIR={config.log_dir} RUN_ID={self.run_id}: {self.path}"
            raise UserError(f"{place} cannot be opened ({error.strerror}): choose another") from error
        lines = [self.header]
        for name, text in config.as_env().items():
            quote = "'" if '"' in text else '"'
            lines.append(f"{name}={quote}{text}{quote}\n")
        self.write("config.env", "".join(lines).encode())
        for name, data in sources.items():
            self.write(name, data)
        self.append("train.log", *self.early_lines)
        self.early_lines = []

    def log(self, line: str):
        if not self.runtime.is_master:
            return
        with contextlib.suppress(OSError):  # a closed terminal must not end the run
            print(line, flush=True)
        if self.file and not self.early_lines:
            self.append("train.log", line)
        else:
            self.early_lines.append(line)

    def append(self, name: str, *lines: str):
        """Append lines to a file. On a full disk the lines are lost and the run goes on."""
        if self.runtime.is_master:
            with contextlib.suppress(OSError), open(self.path / name, "a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)

    def write(self, name: str, data: bytes):
        """Write a file atomically and verify it: afterwards it is complete, or as it was before."""
        path = self.path / name
        temporary = self.path / f".{name}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if temporary.read_bytes() != data:
                raise OSError("it does not hold what was written: check the disk")
            os.replace(temporary, path)
        except OSError as error:
            raise OSError(f"{path} cannot be written ({error}): make room, or move LOG_DIR") from error
        finally:
            temporary.unlink(missing_ok=True)

    def close(self, *last_lines: str):
        self.before_closing()
        if self.file:
            self.append("train.log", *last_lines)
            self.file.close()
            self.file = None


class Stopwatch:
    """Seconds spent in each phase. One phase runs at a time; the device is drained when the phase changes."""

    def __init__(self, synchronize):
        self.synchronize = synchronize
        self.phase = "startup"
        self.since = time.perf_counter()
        self.seconds = dict.fromkeys(("startup", "compile", "training", "evaluation", "export"), 0.0)

    def switch(self, phase: str):
        self.synchronize()
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.since
        self.phase = phase
        self.since = now

    def elapsed(self, phase: str) -> float:
        running = time.perf_counter() - self.since if phase == self.phase else 0.0
        return self.seconds[phase] + running


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is how the CPU, CUDA, its libraries (CUBLAS_STATUS_ALLOC_FAILED) or MPS run out of memory."""
    return bool(re.search("(not enough|can't allocate|out of) memory|ALLOC_FAILED", str(error)))


# ---------- Data ------------------------------------------------------------------------------------------------------
# Shards of uint16 tokens form one long stream. A step takes the next TRAIN_BATCH_TOKENS of it, cut into sequences; ranks
# and micro-steps take consecutive slices of that list, so that their number does not change what a step sees.


def open_shard(path: Path) -> np.ndarray:
    """Memory-mapped uint16 tokens. The header is 256 int32: magic, version, number of tokens, zeros."""
    size = path.stat().st_size
    require(size >= SHARD_HEADER_BYTES, f"shard {path}: {size} bytes are less than a header: make or fetch it again")
    magic, version, count = np.fromfile(path, dtype="<i4", count=3).tolist()
    found = f"magic {magic} version {version}, {size} bytes for {count} tokens"
    fits = magic == SHARD_MAGIC and version == SHARD_VERSION and 0 < 2 * count == size - SHARD_HEADER_BYTES
    require(fits, f"shard {path}: {found}: expected {SHARD_MAGIC} and {SHARD_VERSION}: make or fetch it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))


class TokenStream:
    """The shards of one split as one sequence of tokens."""

    def __init__(self, folder: str, split: str, vocab_size: int):
        self.pattern = f"{folder}/fineweb_{split}_*.bin"
        self.vocab_size = vocab_size
        name = re.compile(rf"fineweb_{split}_(\d+)\.bin")  # a glob would also accept fineweb_train_000000_old.bin
        found = sorted((int(match[1]), path) for path in Path(folder).glob("*") if (match := name.fullmatch(path.name)))
        require(found, f"DATA_PATH={folder} holds no fineweb_{split}_NNNNNN.bin; {NO_DATA_HINT}")
        first = found[0][0] if split == "train" else 0  # training may use some shards; a score needs the whole text
        for expected, (number, path) in enumerate(found, start=first):
            problem = f"shard number {expected} is missing, or {path.name} is there twice"
            require(number == expected, f"{self.pattern}: {problem}: fetch it again or move one away")
        self.shards = [open_shard(path) for _, path in found]
        self.ends = np.cumsum([len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Read `count` uint16 tokens from position `start` on. It crosses shard borders and wraps at the end."""
        pieces = []
        while count > 0:
            start %= len(self)
            index = int(np.searchsorted(self.ends, start, side="right"))
            from_end = start - self.ends[index]  # negative: counted from the end of this shard
            pieces.append(self.shards[index][from_end:][:count])
            start += len(pieces[-1])
            count -= len(pieces[-1])
        tokens = np.concatenate(pieces)
        largest = tokens.max()
        limit = f"VOCAB_SIZE={self.vocab_size}: set DATA_PATH, TOKENIZER_PATH and VOCAB_SIZE together"
        require(largest < self.vocab_size, f"{self.pattern}: token {largest} is outside {limit}")
        return tokens


def to_device(tokens: np.ndarray, device: torch.device) -> Tensor:
    """int64 tokens on the device. They are transferred as two bytes each, asynchronously on CUDA."""
    wire = torch.from_numpy(tokens.view(np.int16))  # int16, since some devices have no kernels for uint16
    if device.type == "cuda":
        wire = wire.pin_memory()
    return wire.to(device, non_blocking=True).long() & 0xFFFF


class TrainLoader:
    """This rank's part of each step. A thread reads the next step ahead.

    Sequence i of a step at position p is tokens [p + i*T, p + i*T + T] (LOADER=stream). With LOADER=shuffle it is piece
    number p / T + i of the text, in a random order and with a random offset that change every epoch.
    """

    def __init__(self, stream: TokenStream, config: Config, runtime: Runtime, accum_steps: int):
        self.stream = stream
        self.device = runtime.device
        self.rank = runtime.rank
        self.accum_steps = accum_steps
        self.length = config.train_seq_len
        self.batch_tokens = config.train_batch_tokens
        self.rank_tokens = config.train_batch_tokens // runtime.world_size
        self.shuffle_seed = config.seed if config.loader == "shuffle" else None
        self.pieces = max(1, (len(stream) - 1) // self.length - 1)  # one fewer than fit, to leave room for the offset
        self.epoch = -1
        self.reader = ThreadPoolExecutor(max_workers=1)
        self.seek(0)

    def seek(self, position: int):
        self.position = position % len(self.stream) if self.shuffle_seed is None else position
        self.ahead = self.reader.submit(self.read, self.position + self.rank * self.rank_tokens)

    def read(self, position: int) -> np.ndarray:
        """[B, T + 1] tokens: each sequence with the target of its last token."""
        starts = range(position, position + self.rank_tokens, self.length)
        if self.shuffle_seed is not None:
            starts = map(self.shuffled_start, starts)
        return np.stack([self.stream.read(start, self.length + 1) for start in starts])

    def shuffled_start(self, position: int) -> int:
        """Where in the text the sequence begins that stands at this position of the shuffled order."""
        epoch, index = divmod(position // self.length, self.pieces)
        if epoch != self.epoch:
            self.epoch = epoch
            random = np.random.default_rng((self.shuffle_seed, epoch))
            self.offset = int(random.integers(self.length))
            self.order = random.permutation(self.pieces)
        return self.offset + int(self.order[index]) * self.length

    def next_step(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, [micro-steps, B, T] each."""
        tokens = to_device(self.ahead.result(), self.device)
        self.seek(self.position + self.batch_tokens)
        shape = (self.accum_steps, -1, self.length)
        return tokens[:, :-1].contiguous().view(shape), tokens[:, 1:].contiguous().view(shape)


# ---------- Bytes -----------------------------------------------------------------------------------------------------
# Bits per byte compares models with different tokenizers, and is only as good as its byte count. This section is the
# only place that knows how many bytes a token stands for, and it checks itself: the first million validation tokens are
# decoded and compared, and a manifest.json of the dataset must agree with the total.

FINEWEB_TARGETS = 62_021_632  # the validation text of the challenge, in its 1,024 pieces
FINEWEB_BYTES = 151_080_363
AUDIT_TOKENS = 1_000_000  # this many are decoded


class TokenBytes:
    """Bytes of text per token of a SentencePiece .model. tools/tokenizers.py knows other vocabularies.

    A special token, or an id beyond the tokenizer's own, has 0 bytes and is a boundary. A byte piece has 1 byte, any
    other piece the UTF-8 length of its text with U+2581 as a space. A leading U+2581 right after a boundary adds no byte
    if the tokenizer adds or strips a space there.
    """

    def __init__(self, path: str, vocab_size: int, padding: int = 127):
        self.path = path
        self.strips_first_space = True
        self.zero_bytes = []  # marks of capitals: tokens without bytes that are no boundaries
        self.leading = set()  # tokens whose text begins with U+2581, which `pieces` leaves out
        self.byte_ids = set()
        self.unknown = set()
        if NAMED_TOKENIZER.fullmatch(path):
            tool("tokenizers", required=True).load(self)
        else:
            self.load_sentencepiece(path)
        self.size = len(self.pieces)  # `pieces` has the text of each token in bytes, None for a special one
        content = Path(path).read_bytes() if self.leading else repr(self.pieces).encode()
        self.sha256 = hashlib.sha256(content).hexdigest()
        found = f"VOCAB_SIZE={vocab_size}, but TOKENIZER_PATH={path} has {self.size} pieces"
        fits = 0 <= vocab_size - self.size <= padding
        require(fits, f"{found}: set VOCAB_SIZE={self.size}, or the tokenizer of the shards")
        pieces = self.pieces + [None] * (vocab_size - self.size)
        self.boundary = np.array([piece is None for piece in pieces])
        self.byte_count = np.array([len(piece or b"") for piece in pieces])
        self.byte_count[self.zero_bytes] = 0
        self.leading_space = np.isin(np.arange(vocab_size), [*self.leading])

    def load_sentencepiece(self, path: str):
        from sentencepiece import SentencePieceProcessor  # late: importing this script stays light

        require(Path(path).is_file(), f"TOKENIZER_PATH={path} does not exist; {NO_DATA_HINT}")
        try:
            model = SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as error:
            raise UserError(f"TOKENIZER_PATH={path} is no SentencePiece model: make or fetch it again") from error
        self.model = model
        self.start = model.bos_id()
        self.encode = model.encode
        ids = range(model.vocab_size())
        texts = model.id_to_piece([*ids])
        require("\u2581" in texts, f"{path} has no piece for a single space (U+2581): use another")
        # A model that puts a space before a text, or strips it, gives the first space no meaning.
        self.strips_first_space = model.normalize("a")[:1] == "\u2581" or model.normalize(" a")[:1] != "\u2581"
        self.unknown = {token for token in ids if model.is_unknown(token) or model.is_unused(token)}
        special = self.unknown | {token for token in ids if model.is_control(token)}
        self.byte_ids = {token for token in ids if model.is_byte(token)}
        self.leading = {token for token in ids if texts[token].startswith("\u2581")} - special
        self.pieces = [text.removeprefix("\u2581").replace("\u2581", " ").encode() for text in texts]
        for token in special:
            self.pieces[token] = None
        for token in self.byte_ids:
            self.pieces[token] = bytes([int(texts[token][3:5], 16)])  # such as <0xE6>
        if "\ue001" in texts:  # a mark of capitals: data/README.md
            tool("tokenizers", required=True).use_case_marks(self, texts)

    def decode(self, tokens: list[int]) -> bytes:
        return self.unmark(self.model.decode(tokens).encode())

    def unmark(self, text: bytes) -> bytes:
        """Turn marks of capitals back into capitals. Without marks the text stays as it is."""
        return text

    def count(self, tokens: np.ndarray) -> int:
        """Bytes of tokens[1:], each in the context of the token before it."""
        previous = tokens[:-1]
        target = tokens[1:]
        spaces = self.leading_space[target] & ~(self.boundary[previous] & self.strips_first_space)
        return int(self.byte_count[target].sum() + np.count_nonzero(spaces))

    def spell(self, tokens: list[int]) -> bytes:
        """The text of a document, piece by piece, as `count` counts it."""
        text = []
        at_start = self.strips_first_space
        for token in tokens:
            if token in self.leading and not at_start:
                text.append(b" ")
            text.append(self.pieces[token] or b"")
            at_start = self.strips_first_space and self.pieces[token] is None
        return self.unmark(b"".join(text))


def compare_spelling(token_bytes: TokenBytes, stream: TokenStream) -> str:
    """Check on the first tokens that the text whose bytes are counted is the text that the tokenizer decodes.

    Half characters at the ends are ignored, and so are documents with unknown letters, which decode to a sign. Returns
    a phrase for the log.
    """
    tokens = stream.read(0, min(AUDIT_TOKENS, len(stream)))
    starts = np.flatnonzero(token_bytes.boundary[tokens])
    spelled_bytes = 0
    unknown = 0
    for document in np.split(tokens, starts):
        document = document.tolist()
        spelled = token_bytes.spell(document)
        spelled_bytes += len(spelled)
        if not token_bytes.unknown.isdisjoint(document):
            unknown += 1
            continue
        ours = spelled.decode(errors="replace").strip("\ufffd")
        theirs = token_bytes.decode(document).decode(errors="replace").strip("\ufffd")
        decoded = f"{token_bytes.path} decodes a document to {theirs[:40]!r}..., its pieces spell {ours[:40]!r}..."
        same = ours == theirs and ours.encode() in spelled
        require(same, f"{stream.pattern}: {decoded}: use the tokenizer of the shards")
    boundary = np.flatnonzero(token_bytes.boundary)[:1].astype(tokens.dtype)
    counted = token_bytes.count(np.concatenate([boundary, tokens]))
    assert counted == spelled_bytes, f"the first tokens count {counted} bytes and spell {spelled_bytes}"
    note = f" ({unknown} documents hold unknown letters and are not compared)" if unknown else ""
    return f"{len(tokens)} tokens in {len(starts)} documents decode to the {counted} bytes they weigh{note}"


def audit(token_bytes: TokenBytes, stream: TokenStream, data_path: str) -> tuple[str, dict]:
    """Check the byte count of the validation text. Returns a line for the log and facts for result.json.

    Only a manifest.json with the true number of bytes proves it: the tokens and their byte counts come from one
    tokenizer, which could be wrong about both.
    """
    pattern = stream.pattern
    total = 0
    largest = 0
    digest = hashlib.sha256()
    for start in range(0, len(stream), 2**24):
        # One more token than the piece: it is counted in the context of the last one.
        tokens = stream.read(start, min(2**24 + 1, len(stream) - start))
        total += token_bytes.count(tokens)
        largest = max(largest, int(tokens.max()))
        digest.update(tokens[: 2**24].tobytes())
    size = token_bytes.size
    require(largest < size, f"{pattern}: {token_bytes.path} has no token {largest}: use the tokenizer of the shards")
    require(total, f"{pattern}: {len(stream)} tokens stand for no bytes: make or fetch it again")
    compared = compare_spelling(token_bytes, stream)
    manifest = manifest_bytes(data_path)
    proved = False
    if manifest:
        text_bytes, kept_bytes = manifest
        require(
            total == kept_bytes, f"{pattern}: {total} bytes, manifest.json says {kept_bytes}: make or fetch it again"
        )
        proved = text_bytes == total
        source = "bytes:proved by manifest.json" if proved else f"bytes:lossy: of {text_bytes} in the text"
    else:
        fineweb = abs(total - 151.08e6) < 6e3
        if size == 1024:
            fineweb = token_bytes.count(stream.read(0, min(FINEWEB_TARGETS + 1, len(stream)))) == FINEWEB_BYTES
        source = f"{'' if fineweb else 'not '}canonical FineWeb, not proved: no manifest.json states the true bytes"
    facts = {"val_bytes": total, "bytes_proved": proved, "sha256_val_tokens": digest.hexdigest()}
    return f"byte_audit: {compared}; all {len(stream)} tokens weigh {total} bytes ({source})", facts


def manifest_bytes(folder: str) -> tuple[int, int] | None:
    """Bytes of the validation text and bytes that its tokens keep, from manifest.json; None without that file."""
    path = Path(folder) / "manifest.json"
    if not path.exists():
        return None
    try:
        split = json.loads(path.read_text(encoding="utf-8"))["splits"]["val"]
        return int(split["bytes"]), int(split.get("token_bytes", split["bytes"]))
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise UserError(f"{path} has no splits.val.bytes ({error!r:.60}): prepare the data again") from error


# ---------- Model -----------------------------------------------------------------------------------------------------
# Precision is one rule: weights, RoPE tables, norms, softmax and loss are fp32; activations and matmuls have the type
# `dtype`, to which weights and tables are cast where they are used. What happens to a parameter, from its first value
# to the artifact, is one row of the table PARAMETERS.


class ParameterRule(NamedTuple):
    """How the parameters of one kind are initialized, optimized and exported."""

    init: object  # a value, the name of a knob, or a function (parameter, config, generator)
    group: str  # "matrix" is trained by Muon; "embed", "head" and "scalar" by AdamW
    fp32: bool = False  # the artifact keeps it in fp32 where it is too small to be quantized


def uniform_init(p: Tensor, config: Config, generator: torch.Generator):
    p.uniform_(-(p.size(1) ** -0.5), p.size(1) ** -0.5, generator=generator)


def embedding_init(p: Tensor, config: Config, generator: torch.Generator):
    p.normal_(std=config.tied_embed_init_std if config.tie_embeddings else 1.0, generator=generator)


class Model(nn.Module):
    """What training, export and scoring need from a model.

    A model of your own provides PARAMETERS and `features`, which maps tokens [B, T] to the input [B, T, D] of the output
    projection. It may override everything else. Its constructor takes (config, attend, dtype) and does not initialize.
    """

    PARAMETERS: dict[str, ParameterRule] = {}
    softcap = 30.0
    fused_loss = None  # a kernel that computes logits and losses at once, if tools/kernels.py has one
    graph_starts: tuple[float, ...] = (0.0,)  # values of progress at which the compiled graph changes
    observe_every = 0  # targets that are scored between two calls of `observe`; 0: it is not called

    @classmethod
    def rule(cls, name: str) -> ParameterRule:
        """The rule of a parameter: blocks.3.attn.c_q.weight has that of blocks.attn.c_q."""
        kind = re.sub(r"\.\d+(?=\.|$)", "", name).removesuffix(".weight")
        require(kind in cls.PARAMETERS, f"{cls.__name__}.PARAMETERS has no rule {kind} for {name}: add one")
        return cls.PARAMETERS[kind]

    @torch.no_grad()
    def init_weights(self, config: Config):
        """Initialize every parameter by its rule. A parameter without one raises, so none stays uninitialized.

        build_model calls this once, after the constructor, so a subclass may add parameters. Values are drawn on the
        CPU in the order of the parameters: they are the same on every device and every rank.
        """
        generator = torch.Generator().manual_seed(config.seed)
        for name, p in self.named_parameters():
            init = self.rule(name).init
            if isinstance(init, str):
                init = getattr(config, init)
            if callable(init):
                init(p, config, generator)
            else:
                p.copy_(torch.tensor(init, dtype=p.dtype))

    def prepare(self, config: Config, runtime: Runtime):
        """Called once, when the model is on its device and not compiled yet: the place for tables that ranks share."""

    def output_weight(self) -> tuple[str, Tensor]:
        """Name and weight [V, D] of the output projection, which is the embedding if there is no lm_head."""
        name = "tok_emb" if getattr(self, "lm_head", None) is None else "lm_head"
        return f"{name}.weight", getattr(self, name).weight

    def logits(self, x_BTD: Tensor) -> Tensor:
        """[B, T, V] in fp32, with a smooth limit of +-softcap."""
        z = at_least_fp32(F.linear(x_BTD, self.output_weight()[1].to(x_BTD.dtype)))
        return self.softcap * torch.tanh(z / self.softcap)

    def losses(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        """[B, T] in nats, in fp32."""
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None):
        """Logits [B, T, V] without targets, else losses [B, T].

        In training the result is (losses, extra) if a module has left an `extra_loss`: a scalar that is minimized with
        the mean loss and not scored.
        """
        x_BTD = self.features(tokens_BT)
        if targets_BT is None:
            return self.logits(x_BTD)
        if self.fused_loss:
            losses_BT = self.fused_loss(self, x_BTD, targets_BT, None)
        else:
            losses_BT = self.losses(self.logits(x_BTD), targets_BT)
        return self.with_extra_losses(losses_BT) if self.training else losses_BT

    def with_extra_losses(self, losses_BT: Tensor):
        extras = []
        for module in self.modules():
            if getattr(module, "extra_loss", None) is not None:
                extras.append(module.extra_loss)
                module.extra_loss = None
        return (losses_BT, sum(extras)) if extras else losses_BT

    def advance(self, progress: float):
        """Train what belongs to this fraction of the run. Before, and in evaluation, a model is as at the end."""

    def metrics(self) -> dict[str, Tensor | float]:
        """More numbers to log after each step: scalars on the device, or numbers known on the host."""
        return {}

    def begin(self, targets: int, forward):
        """Called before the final score of so many targets. `forward` is this model, compiled. May return a log line."""

    def distributions(self, contexts_BT: Tensor, scored_BT: Tensor) -> Tensor:
        """Log-probabilities [n, V] of the token after each of the n positions that the mask `scored_BT` selects.

        They are at least fp32 and in row-major order. A model that overrides this is scored by it; the losses of any
        other model are the same numbers, computed faster.
        """
        return torch.log_softmax(self(contexts_BT)[scored_BT], dim=-1)

    def observe(self, tokens: np.ndarray):
        """Learn from text that has been scored: uint16 targets, with the token before the first one."""

    def end(self, score: "Score"):
        """Called after the final score, to undo what was learned. May return a log line."""

    def optimizers(self, config: Config, runtime: Runtime) -> list[torch.optim.Optimizer]:
        return build_optimizers(self, config, runtime)

    def lr_scale(self, config: Config, step: int, progress: float) -> float:
        """The factor of every learning rate at this step."""
        return lr_scale(config, progress)

    def flops_per_token(self, seq_len: int) -> int:
        """Training FLOPs of a token: 6 for each weight of a matrix (Kaplan et al. 2020), without embeddings."""
        return 6 * sum(p.numel() for name, p in self.named_parameters() if p.ndim > 1 and "emb" not in name)


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def grouped_attention(q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor) -> Tensor:
    """Causal attention. tools/kernels.py has other kernels and chooses one."""
    return F.scaled_dot_product_attention(q_BHTd, k_BKTd, v_BKTd, is_causal=True, enable_gqa=True)


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=2.0**-23)  # computed in fp32, whose own epsilon this is


class RMSNorm(nn.Module):
    """RMS norm over the width, without weights."""

    def __init__(self, width: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x)


class Linear(nn.Linear):
    """The fp32 master weight is cast to the type of the input where it is used."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def rope_tables(length: int, width: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin [T, width / 2] in fp32: bf16 cannot represent every position beyond 256."""
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x_BTHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate dimension i with dimension i + r/2, for i < r/2, by cos and sin [T, 1, r/2]. Dimensions from r on stay."""
    a, b, *rest = x_BTHd.split(cos.size(-1), dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, *rest], dim=-1)


class RoPE(nn.Module):
    """Rotary positions (Su et al. 2021, RoFormer): nothing is added to the embedding; queries and keys are rotated."""

    def __init__(self, config: Config):
        super().__init__()
        cos, sin = rope_tables(config.train_seq_len, self.rotated_width(config), config.rope_base)
        self.register_buffer("cos", cos[:, None], persistent=False)
        self.register_buffer("sin", sin[:, None], persistent=False)

    def rotated_width(self, config: Config) -> int:
        """The number of dimensions of a head that rotate."""
        return config.model_dim // config.num_heads

    def embed(self, x_BTD: Tensor) -> Tensor:
        return x_BTD

    def rotation(self, length: int, dtype: torch.dtype):
        """The function that rotates queries or keys [B, T, heads, d]."""
        return functools.partial(rotate, cos=self.cos[:length].to(dtype), sin=self.sin[:length].to(dtype))


class Attention(nn.Module):
    """Causal grouped-query attention (Shazeer 2019; Ainslie et al. 2023) with normalized queries and keys."""

    def __init__(self, config: Config, attend, layer: int):
        super().__init__()
        D = config.model_dim
        self.attend = attend
        self.head_dim = D // config.num_heads
        kv_dim = self.head_dim * config.num_kv_heads
        self.c_q = Linear(D, D, bias=False)
        self.c_k = Linear(D, kv_dim, bias=False)
        self.c_v = Linear(D, kv_dim, bias=False)
        self.proj = Linear(D, D, bias=False)
        self.q_gain = nn.Parameter(torch.empty(config.num_heads))

    def forward(self, x_BTD: Tensor, rotate) -> Tensor:
        q_BTHd = self.c_q(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTKd = self.c_k(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTKd = self.c_v(x_BTD).unflatten(-1, (-1, self.head_dim))
        q_BTHd = rotate(rms_norm(q_BTHd)) * self.q_gain.to(x_BTD.dtype)[:, None]
        k_BTKd = rotate(rms_norm(k_BTKd))
        y_BHTd = self.attend(q_BTHd.transpose(1, 2), k_BTKd.transpose(1, 2), v_BTKd.transpose(1, 2))
        return self.proj(y_BHTd.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two matrices with a squared ReLU between them."""

    def __init__(self, config: Config):
        super().__init__()
        hidden = round(config.mlp_mult * config.model_dim)
        self.fc = Linear(config.model_dim, hidden, bias=False)
        self.proj = Linear(hidden, config.model_dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.proj(F.relu(self.fc(x_BTD)).square())


class Block(nn.Module):
    """Attention and MLP, each added to the stream with a learned scale per channel.

    The input is first mixed with the embedding x0, by two learned vectors. `parts` is the model, which names the classes
    of the parts.
    """

    def __init__(self, config: Config, attend, layer: int, parts: "GPT"):
        super().__init__()
        D = config.model_dim
        self.attn_norm = parts.norm_class(D)
        self.attn = parts.attention_class(config, attend, layer)
        self.mlp_norm = parts.norm_class(D)
        self.mlp = parts.mlp_class(config)
        self.attn_scale = nn.Parameter(torch.empty(D))
        self.mlp_scale = nn.Parameter(torch.empty(D))
        self.resid_mix = nn.Parameter(torch.empty(2, D))

    def forward(self, x_BTD: Tensor, x0_BTD: Tensor, rotate) -> Tensor:
        mix = self.resid_mix.to(x_BTD.dtype)
        x_BTD = mix[0] * x_BTD + mix[1] * x0_BTD
        x_BTD = x_BTD + self.attn_scale.to(x_BTD.dtype) * self.attn(self.attn_norm(x_BTD), rotate)
        return x_BTD + self.mlp_scale.to(x_BTD.dtype) * self.mlp(self.mlp_norm(x_BTD))


class GPT(Model):
    """A U-net of blocks over a normalized embedding, with the embedding as the output projection."""

    PARAMETERS = {
        "tok_emb": ParameterRule(embedding_init, "embed"),
        "lm_head": ParameterRule(0.0, "head"),
        "skip_weights": ParameterRule(1.0, "scalar", fp32=True),
        "blocks.resid_mix": ParameterRule([[1.0], [0.0]], "scalar", fp32=True),
        "blocks.attn_scale": ParameterRule(1.0, "scalar", fp32=True),
        "blocks.mlp_scale": ParameterRule(1.0, "scalar", fp32=True),
        "blocks.attn.q_gain": ParameterRule("qk_gain_init", "scalar", fp32=True),
        "blocks.attn.c_q": ParameterRule(uniform_init, "matrix"),
        "blocks.attn.c_k": ParameterRule(uniform_init, "matrix"),
        "blocks.attn.c_v": ParameterRule(uniform_init, "matrix"),
        "blocks.attn.proj": ParameterRule(0.0, "matrix"),
        "blocks.mlp.fc": ParameterRule(uniform_init, "matrix"),
        "blocks.mlp.proj": ParameterRule(0.0, "matrix"),
    }
    # A subclass replaces a part by naming its class here.
    block_class = Block
    attention_class = Attention
    mlp_class = MLP
    norm_class = RMSNorm
    positions_class = RoPE

    def __init__(self, config: Config, attend=grouped_attention, dtype: torch.dtype = torch.float32):
        super().__init__()
        D = config.model_dim
        layers = config.num_layers
        self.dtype = dtype
        self.softcap = config.logit_softcap
        self.tok_emb = nn.Embedding(config.vocab_size, D)
        self.positions = self.positions_class(config)
        self.blocks = nn.ModuleList(self.block_class(config, attend, layer, self) for layer in range(layers))
        self.norm = self.norm_class(D)
        # A single block has no skips, and DDP waits for every gradient that is required.
        self.skip_weights = nn.Parameter(torch.empty(layers // 2, D), requires_grad=layers > 1)
        self.lm_head = None if config.tie_embeddings else Linear(D, config.vocab_size, bias=False)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, D] in `dtype`."""
        return self.positions.embed(rms_norm(self.tok_emb(tokens_BT).to(self.dtype)))

    def features(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, D] in `dtype`. The first half of the blocks push their outputs; each block of the second half adds the
        latest one that is left, scaled by its row of skip_weights. With an odd number the last block gets none."""
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

    def flops_per_token(self, seq_len: int) -> int:
        """6 FLOPs for each weight that multiplies, and 12 T D for each attention, which PaLM counts as a full square."""
        weights = [self.output_weight()[1], *(m.weight for m in self.blocks.modules() if isinstance(m, Linear))]
        attention = 12 * seq_len * self.tok_emb.embedding_dim * len(self.blocks)
        return 6 * sum(weight.numel() for weight in weights) + attention


def build_model(config: Config, runtime: Runtime) -> tuple[Model, nn.Module, str]:
    """The initialized model, the same model compiled if that works, and log lines on what was chosen and why."""
    attend = grouped_attention
    fused_loss = None
    compiled = runtime.device.type == "cuda"
    options = None
    note = "no tools/kernels.py"
    if kernels := tool("kernels"):
        attend, fused_loss, compiled, note = kernels.choose(config, runtime)
        options = kernels.COMPILE_OPTIONS.get(config.compile)
    model = config.model_class()(config, attend, runtime.dtype)
    model.init_weights(config)
    model.to(runtime.device)
    model.fused_loss = fused_loss
    model.prepare(config, runtime)
    compiled_model = model
    if compiled:
        # DDP would split the graph, and then torch 2.8 corrupts the gradients of blocks that run more than once.
        torch._dynamo.config.optimize_ddp = False
        compiled_model = torch.compile(model, dynamic=False, fullgraph=True, options=options)
    dtype = str(runtime.dtype).removeprefix("torch.")
    return model, compiled_model, f"device:{runtime.device} ({runtime.device_name()}) dtype:{dtype}\n{note}"


# ---------- Optimizer -------------------------------------------------------------------------------------------------
# Adam trains embeddings and vectors. Muon trains the matrices of the blocks: it orthogonalizes their momentum, so that
# every direction of a matrix learns at the same speed (Keller Jordan et al. 2024).


def parameter_groups(model: Model) -> dict[str, list[nn.Parameter]]:
    """The parameters of each optimizer group, by the model's table. Every parameter is in exactly one."""
    groups = {"embed": [], "head": [], "matrix": [], "scalar": []}
    for name, p in model.named_parameters():
        groups[model.rule(name).group].append(p)
    return groups


def newton_schulz(stack: Tensor, polynomials: list[tuple[float, float, float]]) -> Tensor:
    """Bring the singular values s <= 1 of matrices [n, rows, cols] near 1, by a s + b s^3 + c s^5 in turn."""
    tall = stack.size(-2) > stack.size(-1)
    x = stack.mT if tall else stack
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then an orthogonalized update, for the matrices inside the blocks.

    m = mu * m + g;  u = g + mu * m (Nesterov);  p -= lr * (sqrt(max(1, rows / cols)) * orthogonal(u) + decay * p)

    Rank r owns every world_size-th matrix: it holds its momentum and computes its update; one all_reduce exchanges all
    updates. The learning rate suits matrices that multiply activations. Embeddings and vectors belong to Adam.
    """

    QUINTIC = (3.4445, -4.7750, 2.0315)  # five iterations bring singular values to 0.7 to 1.2 (Jordan, Muon)

    def __init__(self, params, lr: float, momentum: float, steps: int, runtime: Runtime, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps, weight_decay=weight_decay))
        self.runtime = runtime
        assert all(p.ndim == 2 for group in self.param_groups for p in group["params"]), "Muon is for matrices"

    def owned(self, params: list[Tensor]) -> list[Tensor]:
        return params[self.runtime.rank :: self.runtime.world_size]

    def polynomials(self, steps: int) -> list[tuple[float, float, float]]:
        return [self.QUINTIC] * steps

    def orthogonal(self, u: Tensor, group: dict) -> Tensor:
        """The scaled updates of a stack [n, rows, cols] in fp32, computed in the runtime's dtype."""
        u = u / u.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
        iterate = self.runtime.newton_schulz or newton_schulz
        update = iterate(u.to(self.runtime.dtype), self.polynomials(group["steps"]))
        return update * max(1, u.size(1) / u.size(2)) ** 0.5

    def nesterov(self, params: list[Tensor], mu: float) -> Tensor:
        """Update the momentum of matrices of one shape; return g + mu * m as a stack [n, rows, cols]."""
        for p in params:
            if p not in self.state:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in params]
        grads = [p.grad for p in params]
        torch._foreach_mul_(momenta, mu)
        torch._foreach_add_(momenta, grads)
        return torch.stack(torch._foreach_add(grads, momenta, alpha=mu))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            # One flat buffer holds all updates, for a single all_reduce; those of other ranks' matrices are 0 here.
            sizes = [p.numel() for p in params]
            flat = torch.zeros(sum(sizes), device=params[0].device, dtype=self.runtime.dtype)
            updates = {p: part.view_as(p) for p, part in zip(params, flat.split(sizes), strict=True)}
            owned = self.owned(params)
            # Matrices of one shape are orthogonalized as one batch, which is faster.
            for shape in {p.shape for p in owned}:
                same = [p for p in owned if p.shape == shape]
                u = self.nesterov(same, group["momentum"])
                torch._foreach_copy_([updates[p] for p in same], [*self.orthogonal(u, group)])
            if self.runtime.world_size > 1:
                dist.all_reduce(flat)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, [updates[p].to(p.dtype) for p in params], alpha=-group["lr"])


def build_optimizers(model: Model, config: Config, runtime: Runtime) -> list[torch.optim.Optimizer]:
    """AdamW and Muon, each for the groups that the model has."""
    groups = parameter_groups(model)
    embed_lr = config.tied_embed_lr if config.tie_embeddings else config.embed_lr
    adam_groups = [
        {"params": groups["embed"], "lr": embed_lr, "weight_decay": config.embed_weight_decay},
        {"params": groups["head"], "lr": config.head_lr, "weight_decay": config.embed_weight_decay},
        {"params": groups["scalar"], "lr": config.scalar_lr, "weight_decay": config.scalar_weight_decay},
    ]
    adam_groups = [group for group in adam_groups if group["params"]]
    betas = (config.beta1, config.beta2)
    optimizers = [torch.optim.AdamW(adam_groups, betas=betas, eps=config.adam_eps, fused=True)]
    if groups["matrix"]:
        rates = (config.matrix_lr, config.muon_momentum, config.muon_backend_steps)
        optimizers.append(Muon(groups["matrix"], *rates, runtime, config.muon_weight_decay))
    return optimizers


# ---------- Schedule --------------------------------------------------------------------------------------------------
# Pure functions of the step and of progress, the fraction of the run that is over. WARMUP_STEPS has no part in them: it
# only compiles.


def progress_at(config: Config, step: int, elapsed: float) -> float:
    """Progress by steps or by the training clock in seconds, whichever is further; in [0, 1]."""
    by_clock = elapsed / config.max_wallclock_seconds if config.max_wallclock_seconds else 0.0
    return min(max(step / config.iterations, by_clock), 1.0)


def lr_scale(config: Config, progress: float) -> float:
    """1, then linear to 0 over the last WARMDOWN_FRAC of the run, but not below LR_FLOOR."""
    if not config.warmdown_frac:
        return 1.0
    return min(1.0, max((1 - progress) / config.warmdown_frac, config.lr_floor))


def muon_momentum(config: Config, step: int) -> float:
    """Linear from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM over MUON_MOMENTUM_WARMUP_STEPS."""
    steps = config.muon_momentum_warmup_steps
    fraction = min(step / steps, 1.0) if steps else 1.0
    return (1 - fraction) * config.muon_momentum_warmup_start + fraction * config.muon_momentum


# ---------- Evaluation ------------------------------------------------------------------------------------------------
# Every target of the validation text is scored exactly once, and the program checks that it was. Sums are reduced on the
# device and added in float64 on the host. Bits per byte = nats / ln 2 / bytes does not depend on the tokenizer.


class Score:
    """Loss in nats per token and bits per byte. `label` marks a score of fewer targets than the text has."""

    def __init__(self, nats: float, tokens: int, text_bytes: int, total: int, seconds: float):
        self.tokens = tokens
        self.bytes = text_bytes
        self.total = total
        self.seconds = seconds
        self.loss = nats / tokens
        self.bpb = nats / math.log(2) / text_bytes
        self.label = f" partial:{tokens}/{total}" if tokens < total else ""


class Evaluator:
    """Scores windows of T inputs that start every S = EVAL_STRIDE tokens (0: S = T). Target j is token j + 1.

    The first window scores all its targets, each later one its last S. Targets beyond the end do not count.
    """

    def __init__(self, stream: TokenStream, token_bytes: TokenBytes, config: Config, runtime: Runtime, accum_steps=1):
        self.stream = stream
        self.token_bytes = token_bytes
        self.runtime = runtime
        self.total = len(stream) - 1
        self.targets = min(config.val_tokens_limit or self.total, self.total)
        self.length = config.train_seq_len
        self.stride = config.eval_stride or self.length
        self.windows = 1 + max(0, math.ceil((self.targets - self.length) / self.stride))
        per_rank = config.val_batch_size // (self.length * runtime.world_size * accum_steps)
        self.batch = max(1, min(per_rank, math.ceil(self.windows / runtime.world_size)))

    def first_target(self, window: int) -> int:
        """The first target that a window scores."""
        return window * self.stride + self.length - self.stride if window else 0

    def first_window(self, target: int) -> int:
        """The first window that scores nothing before this target."""
        return min(max(0, math.ceil((target - self.length) / self.stride) + 1), self.windows)

    def batch_at(self, index: int, stop: int, batch: int) -> tuple[Tensor, Tensor, Tensor, range]:
        """Inputs, targets and the mask of scored targets, [batch, T] each, from window `index` on, before `stop`.

        Also the range of scored targets. With T = 4, S = 2 and 7 targets, the windows have targets 0123, 2345 and 4567
        and score 0123, 45 and 6. Two windows from index 1 on read tokens 2 to 8, the last of which is padding, and score
        range(4, 7). A last batch is padded to the shape of the others, since every shape is compiled.
        """
        T = self.length
        S = self.stride
        begin = index * S
        end = min(begin + (min(batch, stop - index) - 1) * S + T, self.targets)
        tokens = np.zeros((batch - 1) * S + T + 1, np.uint16)
        tokens[: end + 1 - begin] = self.stream.read(begin, end + 1 - begin)
        rows = to_device(tokens, self.runtime.device).unfold(0, T + 1, S)
        target = torch.arange(begin, begin + len(tokens) - 1, device=rows.device).unfold(0, T, S)
        fresh = (target >= target[:, :1] + T - S) | (target[:, :1] == 0)
        mask = fresh & (target < end)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), mask, range(self.first_target(index), end)

    def batches(self, chunk: int, number: int):
        """This rank's batches of the windows that begin to score in chunk `number` of the text."""
        first = self.first_window(number * chunk)
        count = self.first_window((number + 1) * chunk) - first
        rank = self.runtime.rank
        ranks = self.runtime.world_size
        stop = first + count * (rank + 1) // ranks
        batch = min(self.batch, math.ceil(math.ceil(chunk / self.stride) / ranks))
        for index in range(first + count * rank // ranks, stop, batch):
            yield self.batch_at(index, stop, batch)

    @torch.no_grad()
    def warm_up(self, forward):
        """Compile the graph of an evaluation."""
        for inputs, targets, *_ in self.batches(self.targets, 0):
            forward.eval()(inputs, targets)
            forward.train()
            break

    @torch.no_grad()  # not inference_mode: tables cached under it would fail in the next training step
    def score(self, model: Model, forward, log=lambda line: None, interrupted=lambda: False, final=False):
        """The Score over all ranks, or None if one of them was interrupted. `forward` is the model, compiled.

        In the final score a model may learn from what has been scored: the text is scored in chunks of observe_every
        targets, and the model observes each chunk before the next one is scored.
        """
        chunk = model.observe_every if final and model.observe_every else self.targets
        chunks = 1 + self.first_target(self.windows - 1) // chunk
        model.eval()
        if final and (line := model.begin(self.targets, forward)):
            log(line)
        sums = []
        count = 0
        text_bytes = 0
        begun = reported = time.perf_counter()
        for number in range(chunks):
            for inputs, targets, mask, scored in self.batches(chunk, number):
                if interrupted():
                    break
                sums.append(self.nats(model, forward, inputs, targets, mask))
                count += len(scored)
                text_bytes += self.token_bytes.count(self.stream.read(scored.start, len(scored) + 1))
                done = count * self.runtime.world_size / self.targets
                if time.perf_counter() - reported > 10 and done < 1:
                    self.runtime.synchronize()
                    reported = time.perf_counter()
                    log(f"eval_progress:{done:.0%} eta:{(reported - begun) * (1 - done) / done:.0f}s")
            if number + 1 < chunks:
                model.observe(self.stream.read(number * chunk, chunk + 1))
        nats = sum(torch.stack(sums).tolist()) if sums else 0.0
        nats, count, text_bytes, stop = self.runtime.all_reduce([nats, count, text_bytes, bool(interrupted())])
        score = None
        if not stop:
            require(count == self.targets, f"scored {count:.0f} of {self.targets} targets: a fault of this script")
            require(text_bytes > 0, f"{self.stream.pattern}: targets of no bytes: raise VAL_TOKENS_LIMIT")
            require(math.isfinite(nats), f"the validation loss is {nats}, the run diverged: lower learning rates")
            score = Score(nats, int(count), int(text_bytes), self.total, time.perf_counter() - begun)
        if final and (line := model.end(score)):
            log(line)
        model.train()
        return score

    def nats(self, model: Model, forward, inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """The summed losses of the targets in the mask, still on the device."""
        if type(model).distributions is Model.distributions:
            return torch.where(mask, forward(inputs, targets), 0.0).sum()
        return -model.distributions(inputs, mask).gather(1, targets[mask][:, None]).sum()


# ---------- Export ----------------------------------------------------------------------------------------------------
# The artifact: matrices as int8 with an fp16 scale per row, compressed by zlib, with a checksum at the end. The score of
# record is the one of this file as read back from the disk.

INT8_FORMAT = "int8_clean_per_row_v1"
INT8_CLIP_QUANTILE = 0.9999984
INT8_MIN_NUMEL = 65_536  # tensors of up to this many elements are kept as floats


def quantize_rows(w: Tensor, clip: Tensor, qmax: int = 127) -> tuple[Tensor, Tensor]:
    """int8 values [rows, cols] in +-qmax and fp16 scales [rows] of an fp32 matrix that is clipped at `clip` [rows].

    Rounding uses the scale as it is stored, so an error within the clip is at most half of it. A row of zeros has scale
    1, a tiny one the smallest positive fp16.
    """
    scale = (clip / qmax).clamp(min=2.0**-24).where(clip > 0, 1.0).half()
    return (w / scale.float()[:, None]).round().clamp(-qmax, qmax).to(torch.int8), scale


def torch_bytes(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Coder:
    """Turns the weights into the bytes of the artifact and back: the int8+zlib format of the public reference.

    The artifact also records the config, and the file of a model that is not this script's, so that it explains itself.
    A Config names its coder; one in a model file may override any part.
    """

    file = "final_model.int8.ptz"
    tag = "int8+zlib"  # names the artifact in log lines
    control_fp32 = True  # whether small control tensors stay in fp32

    def __init__(self, config: Config):
        self.config = config

    def warm_up(self, trainer: "Trainer") -> float:
        """Called when the training step is compiled. Seconds of the training clock that `calibrate` will need."""
        return 0.0

    def calibrate(self, trainer: "Trainer"):
        """Called on every rank after the last step, with the weights that will be exported."""

    def projected_size(self, model: Model) -> int:
        """Bytes that the artifact will have when this model is trained, for MODE=check."""
        return tool("check", required=True).projected_bytes(self, model)

    def quantize_matrix(self, name: str, w: Tensor) -> tuple[Tensor, Tensor]:
        """int8 values and fp16 scales [rows] of an fp32 matrix: a row is clipped at a high quantile of its magnitudes."""
        return quantize_rows(w, torch.quantile(w.abs(), INT8_CLIP_QUANTILE, dim=1))

    def quantize(self, state: dict[str, Tensor]) -> dict:
        """The object that is serialized. Large tensors are quantized; small ones and integers are kept."""
        config = {name.lower(): getattr(self.config, name.lower()) for name in self.config.artifact_knobs()}
        artifact = {"__quant_format__": INT8_FORMAT, "config": config} | model_source(self.config)
        for part in ("quantized", "scales", "dtypes", "passthrough", "qmeta", "passthrough_orig_dtypes"):
            artifact[part] = {}
        for name, tensor in state.items():
            tensor = tensor.detach().cpu().contiguous()
            dtype = str(tensor.dtype).removeprefix("torch.")
            if not tensor.is_floating_point():
                artifact["passthrough"][name] = tensor
                continue
            finite = (tensor.abs() <= 65504).all()
            require(
                finite, f"{name} is not finite in fp16, no artifact was made: the run diverged: lower learning rates"
            )
            if tensor.numel() > INT8_MIN_NUMEL:
                is_matrix = tensor.ndim == 2
                q, scale = self.quantize_matrix(name, tensor.float() if is_matrix else tensor.float().view(1, -1))
                artifact["quantized"][name] = q.view_as(tensor)
                artifact["scales"][name] = scale if is_matrix else scale[0]
                artifact["dtypes"][name] = dtype
                if is_matrix:
                    artifact["qmeta"][name] = {"scheme": "per_row", "axis": 0}
            elif self.control_fp32 and self.config.model_class().rule(name).fp32:
                artifact["passthrough"][name] = tensor
            else:
                artifact["passthrough"][name] = tensor.half()
                artifact["passthrough_orig_dtypes"][name] = dtype
        return artifact

    def dequantize(self, artifact: dict) -> dict[str, Tensor]:
        """The state dict that an artifact stands for, each tensor in its original type."""
        state = {}
        for name, q in artifact["quantized"].items():
            # One scale per row of a matrix, one in all for any other tensor.
            scale = artifact["scales"][name].float().view(-1, *[1] * (q.ndim - 1))
            state[name] = q.float().mul_(scale).to(getattr(torch, artifact["dtypes"][name]))
        original = artifact.get("passthrough_orig_dtypes", {})
        for name, tensor in artifact["passthrough"].items():
            state[name] = tensor.to(getattr(torch, original[name])) if name in original else tensor
        return state

    def pack(self, artifact: dict) -> tuple[bytes, dict]:
        """The bytes of the file, and its sizes: a zlib stream, then its sha256, which other readers skip."""
        raw = torch_bytes(artifact)
        stream = zlib.compress(raw, level=9)
        payload = sum(t.nbytes for t in torch.utils._pytree.tree_leaves(artifact) if isinstance(t, Tensor))
        return stream + hashlib.sha256(stream).digest(), {"payload": payload, "raw_torch": len(raw)}

    def unpack(self, blob: bytes) -> dict:
        """The artifact in a file of `pack`. tools/evaluate.py also reads files of others."""
        intact = hashlib.sha256(blob[:-32]).digest() == blob[-32:]
        require(intact, "the artifact does not match its checksum: check the disk")
        return torch.load(io.BytesIO(zlib.decompress(blob[:-32])), map_location="cpu", weights_only=True)

    def encode(self, state: dict[str, Tensor], code_bytes: int) -> tuple[bytes, dict]:
        """The artifact file, and numbers to record: "payload" and "raw_torch" are bytes before compression."""
        return self.pack(self.quantize(state))

    def decode(self, blob: bytes) -> dict[str, Tensor]:
        return self.dequantize(self.unpack(blob))


def export(state: dict[str, Tensor], coder: Coder, folder: RunFolder, code_bytes: int) -> dict:
    """Write final_model.pt and the artifact, log their sizes, and return them for result.json."""
    raw = torch_bytes(state)
    folder.write("final_model.pt", raw)  # first: whatever fails after this, the weights are saved
    blob, facts = coder.encode(state, code_bytes)
    folder.write(coder.file, blob)
    limit = coder.config.size_limit
    total = len(blob) + code_bytes
    ratio = sum(tensor.nbytes for tensor in state.values()) / facts["payload"]
    sizes = f"payload:{facts.pop('payload')} raw_torch:{facts.pop('raw_torch')} payload_ratio:{ratio:.2f}x"
    verdict = "OK" if total <= limit else "TOO LARGE, NOT A VALID SUBMISSION"
    extra = "".join(f" {name}:{value:.4f}" for name, value in facts.items())
    folder.log(f"Serialized model: {len(raw)} bytes\nCode size: {code_bytes} bytes")
    folder.log(f"Total submission size: {len(raw) + code_bytes} bytes")
    folder.log(f"Serialized model {coder.tag}: {len(blob)} bytes ({sizes})")
    folder.log(f"Total submission size {coder.tag}: {total} bytes")
    folder.log(f"size_verdict:{verdict} limit:{limit} spare:{limit - total}{extra}")
    sizes = {"bytes_model": len(raw), "bytes_artifact": len(blob), "bytes_code": code_bytes, "bytes_total": total}
    return sizes | {"bytes_limit": limit, "sha256_artifact": hashlib.sha256(blob).hexdigest()} | facts


# ---------- Training --------------------------------------------------------------------------------------------------
# One step function serves the compilation warmup and the run. The loop is flat: plan, save, validate, step, log. The
# host never waits for the device in order to log: on a GPU the numbers of a step are read while the next one runs.


class Hooks:
    """What a run calls, and when. These do nothing; tools/checkpoint.py saves, resumes and listens to signals."""

    stop_signal = 0  # number of a signal that asks the run to save a checkpoint and end
    resumed_at: tuple[int, ...] = ()  # steps at which the run was resumed

    def __init__(self, config: Config, folder: RunFolder):
        self.config = config
        self.folder = folder

    def choose_folder(self, stream: TokenStream, sources: dict[str, bytes]):
        """Before the model is built: name the run folder, find a checkpoint, and check that it is of this run."""
        self.folder.locate(self.config)
        new = self.config.resume in ("auto", "never") and not self.folder.path.exists()
        require(new, f"{self.folder.path} exists, or RESUME is set: without tools/checkpoint.py start a new RUN_ID")

    def before_warm_up(self, trainer: "Trainer"):
        """All state is that of a new run; a checkpoint is loaded here."""

    def training(self, begins: bool):
        """From here on a signal waits for the end of a step, or no longer does."""

    def wants_checkpoint(self, trainer: "Trainer") -> bool:
        """Asked before every step on every rank; one that answers yes is enough."""
        return False

    def save(self, trainer: "Trainer", wait: bool):
        """Save a checkpoint between two steps, on every rank; `wait` until it is on the disk."""


class Plan(NamedTuple):
    """What comes before the next step, and the learning rate of it. It is the same on every rank."""

    lr_scale: float
    progress: float
    stop: bool  # the run is over: ITERATIONS or the clock
    save: bool  # a checkpoint is due
    leave: bool  # a signal asks to save and exit


class StepLog:
    """Logs finished steps. The numbers of a step are on their way from the device until it has finished."""

    def __init__(self, config: Config, folder: RunFolder, stopwatch: Stopwatch, speed):
        self.config = config
        self.folder = folder
        self.stopwatch = stopwatch
        self.speed = speed
        self.queue = deque()
        self.step_seconds = deque(maxlen=20)
        self.last_time = 0.0  # training clock at the end of the last finished step

    def add(self, step: int, host: dict[str, float], device: dict[str, Tensor]):
        values = torch.stack([value.float() for value in device.values()])
        event = None
        if values.device.type == "cuda":  # copy to the host without waiting for the copy
            values = torch.empty(len(device), pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.queue.append((step, host, list(device), values, event))

    def write(self, keep: int, synchronize):
        """Log the queued steps except the last `keep`, and raise if a loss is not finite."""
        while len(self.queue) > keep:
            step, host, names, values, event = self.queue.popleft()
            if event:
                event.synchronize()
            else:
                synchronize()
            metrics = dict(zip(names, values.tolist(), strict=True))
            clock = self.stopwatch.elapsed("training")
            self.step_seconds.append(clock - self.last_time)
            self.last_time = clock
            loss = metrics.pop("train_loss")
            remedy = "lower MATRIX_LR, TIED_EMBED_LR and SCALAR_LR, or set GRAD_CLIP_NORM"
            require(math.isfinite(loss), f"step {step}: the loss is {loss}: nothing was exported: {remedy}")
            every = self.config.train_log_every
            if every and (step <= 10 or step % every == 0):
                extra = "".join(f" {name}:{value:.4f}" for name, value in metrics.items())
                progress = f"step:{step}/{self.config.iterations} train_loss:{loss:.4f} {times(step, clock)}"
                self.folder.log(f"{progress} {self.speed(self.step_seconds)}{extra}")
            record = {"step": step, "train_loss": loss, **host, "train_seconds": round(clock, 4), **metrics}
            self.folder.append("metrics.jsonl", json.dumps(record))


class Trainer:
    """Model, optimizers and data of one run, and the loop over them."""

    def __init__(
        self, config: Config, runtime: Runtime, folder, stopwatch: Stopwatch, loader: TrainLoader, hooks: Hooks
    ):
        self.config, self.runtime, self.folder = config, runtime, folder
        self.stopwatch, self.loader, self.hooks = stopwatch, loader, hooks
        # The model, the same model compiled (for scoring), and that under DDP (for training). They share the weights.
        self.model, self.compiled_model, self.note = build_model(config, runtime)
        self.train_model = self.compiled_model
        self.optimizers = self.model.optimizers(config, runtime)
        self.coder = config.coder_class()(config)
        self.step_log = StepLog(config, folder, stopwatch, self.speed)
        self.average = [p.detach().float().clone() for p in self.model.parameters() if config.ema_decay]
        self.steps = 0
        self.finished = False  # all steps are done and the last checkpoint is saved
        self.exporting = False  # the weights are the average; training cannot go on with them
        self.reserve = 0.0  # seconds of the training clock that calibration of the export needs
        torch.manual_seed(config.seed + runtime.rank)  # for dropout and the like
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"]  # the schedule scales this
        if runtime.world_size > 1:
            # All ranks compute the same tables, so buffers need no synchronization. torch 2.13 renamed the option.
            new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            options = {"forward_sync_buffers" if new else "broadcast_buffers": False, "gradient_as_bucket_view": True}
            self.train_model = DistributedDataParallel(self.compiled_model, **options)

    def step(self, lr_scale: float, momentum: float) -> dict[str, Tensor | float]:
        """One optimizer step. Returns named numbers to log, which are still on the device."""
        inputs, targets = self.loader.next_step()
        micro_steps = len(inputs)
        losses = torch.zeros(micro_steps, device=inputs.device)
        for micro, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            # DDP reduces gradients in every backward unless told not to: the last micro-step is enough.
            last = micro + 1 == micro_steps or self.runtime.world_size == 1
            with contextlib.nullcontext() if last else self.train_model.no_sync():
                output = self.train_model(x, y)
                token_losses, *extra = output if isinstance(output, tuple) else (output,)
                loss = token_losses.mean() / micro_steps
                sum((term / micro_steps for term in extra), loss).backward()
            losses[micro] = loss.detach()
        metrics = {"train_loss": losses.sum()}
        if self.runtime.world_size > 1:
            dist.all_reduce(metrics["train_loss"])
            metrics["train_loss"] = metrics["train_loss"] / self.runtime.world_size
        if self.config.grad_clip_norm:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip_norm)
            metrics["grad_norm"] = norm
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * lr_scale
                if isinstance(optimizer, Muon):
                    group["momentum"] = momentum
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return metrics | self.model.metrics()

    @torch.no_grad()
    def update_average(self):
        """EMA in fp32 with decay min(EMA_DECAY, (t + 1) / (t + 10)), so that a short run forgets its first steps."""
        decay = min(self.config.ema_decay, (self.steps + 1) / (self.steps + 10))
        torch._foreach_lerp_(self.average, [p.float() for p in self.model.parameters()], 1 - decay)

    def warm_up(self, evaluator: Evaluator):
        """Compile every graph with real steps, then restore weights, optimizers, random numbers and data exactly.

        The last step of each graph measures how long a step takes, by which the first plans decide when to stop.
        """
        stateful = [self.model, *self.optimizers]
        position = self.loader.position
        total = 0 if self.finished else self.config.warmup_steps
        saved = copy.deepcopy([part.state_dict() for part in stateful]) if total else []
        devices = [self.runtime.device] if self.runtime.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            for start in self.model.graph_starts:
                self.model.advance(start)
                for step in range(1, total + 1):
                    began = self.stopwatch.elapsed("compile")
                    self.step(1.0, self.config.muon_momentum)
                    self.runtime.synchronize()
                    self.folder.log(f"warmup_step:{step}/{total}{f' graph:{start}' if start else ''}")
                    if step == total > 1:
                        self.step_log.step_seconds.append(self.stopwatch.elapsed("compile") - began)
                evaluator.warm_up(self.compiled_model)
            self.reserve = self.coder.warm_up(self)
        for part, state in zip(stateful, saved, strict=False):
            part.load_state_dict(state)
        self.loader.seek(position)

    def plan(self) -> Plan:
        """Decide what comes next. Rank 0 decides by its clock; a signal counts on whatever rank it arrives.

        The next step must end before the limit even if it takes as long as the slowest of the last 20.
        """
        config = self.config
        elapsed = self.stopwatch.elapsed("training") + self.reserve
        unfinished_steps = 1 + len(self.step_log.queue)
        end = elapsed + unfinished_steps * max(self.step_log.step_seconds, default=0.0)
        out_of_time = config.max_wallclock_seconds and end >= config.max_wallclock_seconds
        stop = bool(self.finished or self.steps >= config.iterations or out_of_time)
        progress = progress_at(config, self.steps, elapsed)
        scale = self.model.lr_scale(config, self.steps, progress)
        scale, progress, stop = self.runtime.broadcast((scale, 1.0 if stop else progress, stop))
        signals = [not stop and self.hooks.wants_checkpoint(self), bool(self.hooks.stop_signal)]
        save, leave = self.runtime.all_reduce(signals)
        return Plan(scale, progress, stop, bool(save), bool(leave))

    def train(self, evaluator: Evaluator) -> Score:
        """Train until ITERATIONS or the clock. Returns the score of the last validation."""
        config = self.config
        while True:
            plan = self.plan()
            self.model.advance(plan.progress)
            if plan.save or plan.leave:
                self.hooks.save(self, wait=plan.leave)
                if plan.leave:
                    raise KeyboardInterrupt(self.hooks.stop_signal)
                continue  # saving takes time: plan again
            if plan.stop:
                self.finish_weights()
            due = config.val_loss_every and self.steps % config.val_loss_every == 0
            if plan.stop or (due and (self.steps or config.val_at_start)):
                score = self.validate(evaluator)
                if not score:
                    continue  # interrupted by a signal: the next plan leaves
                if plan.stop:
                    return score
            metrics = self.step(plan.lr_scale, muon_momentum(config, self.steps))
            if self.average:
                self.update_average()
            self.steps += 1
            host = {"lr_scale": plan.lr_scale} | {k: v for k, v in metrics.items() if not isinstance(v, Tensor)}
            self.step_log.add(self.steps, host, {k: v for k, v in metrics.items() if isinstance(v, Tensor)})
            # A GPU may have one more step queued, so that it never waits for the host.
            self.log_steps(keep=1 if self.runtime.device.type == "cuda" else 0)

    def log_steps(self, keep: int = 0):
        self.step_log.write(keep, self.runtime.synchronize)

    def finish_weights(self):
        """After the last step: a checkpoint, then the average of the weights, then calibration of the export."""
        if not self.finished:
            self.log_steps()
            self.stopwatch.switch("export")
            self.finished = True
            self.hooks.save(self, wait=True)
            self.stopwatch.switch("training")
        if self.exporting:
            return
        self.exporting = True
        with torch.no_grad():
            for p, average in zip(self.model.parameters(), self.average, strict=False):
                p.copy_(torch.lerp(p.float(), average, self.config.ema_share))
        self.coder.calibrate(self)

    def validate(self, evaluator: Evaluator) -> Score | None:
        """The Score, logged, while the training clock stands still; None if a signal interrupted it."""
        self.log_steps()
        self.stopwatch.switch("evaluation")
        score = evaluator.score(self.model, self.compiled_model, self.folder.log, lambda: self.hooks.stop_signal)
        self.stopwatch.switch("training")
        self.step_log.last_time = clock = self.stopwatch.elapsed("training")
        if score:
            step = f"step:{self.steps}/{self.config.iterations}"
            losses = f"val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f}"
            self.folder.log(f"{step} {losses} {times(self.steps, clock)}{score.label}")
            numbers = {"val_loss": score.loss, "val_bpb": score.bpb, "partial": bool(score.label)}
            self.folder.append("metrics.jsonl", json.dumps({"step": self.steps, **numbers}))
        return score

    def speed(self, step_seconds) -> str:
        """Tokens per second of all ranks over the last steps, and the fraction of the devices' peak FLOP/s (MFU)."""
        speed = self.config.train_batch_tokens / max(statistics.fmean(step_seconds), 1e-9)
        kernels = tool("kernels", log=str)
        mfu = kernels.share_of_peak(self.model, self.config, self.runtime, speed) if kernels else None
        return f"tok/s:{speed:.0f}" + (f" mfu:{mfu:.1%}" if mfu else "")


def times(step: int, clock: float) -> str:
    return f"train_time:{1000 * clock:.0f}ms step_avg:{1000 * clock / max(step, 1):.2f}ms"


# ---------- Files around the script -----------------------------------------------------------------------------------
# Tools are optional: the script alone trains, exports and scores. A model file is part of the submission, with whatever
# it imports from its own folder: those sources are hashed, copied into the run folder and counted in the code size.

TOOLS = {  # name: what is lost without tools/NAME.py
    "check": "contradictory and misspelled knobs are not found",
    "checkpoint": "no checkpoints, no resuming, no fitting of micro-batches to the memory",
    "kernels": "no choice of kernels, no MFU",
    "cpu_kernels": "attention, loss and Muon are torch's",
    "steptime": "no prediction of step times on other machines",
    "sample": "no samples",
    "evaluate": "no scores of finished models",
    "tokenizers": "SentencePiece models only",
}
SUBMISSION_TOOLS = ("tokenizers",)  # part of the submission when they are used: they say how many bytes a token has


def tool(name: str, log=print, required: bool = False):
    """The module tools/NAME.py next to this script, or None, after a warning, if it is missing.

    It is loaded by its path, so that no installed package of that name takes its place. A run folder is flat.
    """
    key = f"train_gpt.tools.{name}"
    if key in sys.modules:
        return sys.modules[key]
    folder = Path(__file__).resolve().parent
    path = folder / "tools" / f"{name}.py"
    if name in SUBMISSION_TOOLS and not path.is_file():
        path = folder / f"{name}.py"
    if path.is_file():
        return load_module(path, key)
    require(not required, f"{path} is missing: take it from the repository")
    log(f"warning: tools/{name}.py is missing: {TOOLS[name]}")
    return None


def load_module(path: Path, key: str):
    spec = importlib.util.spec_from_file_location(key, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module


def find_model_file(file: str) -> Path:
    """MODEL_FILE relative to the working directory, then to this script, then by its bare name next to this script."""
    here = Path(__file__).resolve().parent
    path = next((path for path in (Path(file), here / file, here / Path(file).name) if path.is_file()), None)
    require(path, f"MODEL_FILE={file}: no such file here or in {here}: give one such as records/models/tiny.py")
    return path.resolve()


def load_model_file(file: str) -> type[Config]:
    """The class Config that a model file defines. Its folder becomes the first place from which it imports."""
    path = find_model_file(file)
    key = "model_file_" + re.sub(r"\W", "_", str(path))
    sys.modules.setdefault("train_gpt", sys.modules[__name__])
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        module = sys.modules.get(key) or load_module(path, key)
    except UserError:
        raise
    except Exception as error:  # whatever that program may raise
        raise UserError(f"MODEL_FILE={path} cannot be loaded: {error!r:.200}: correct it") from error
    found = vars(module).get("Config")
    fits = isinstance(found, type) and issubclass(found, Config) and found.__module__ == key
    require(fits, f"MODEL_FILE={path} defines no class Config(train_gpt.Config): add one that names its model_class")
    return found


def source_paths(config: Config) -> dict[str, Path]:
    """{name in the run folder: path} of the code of a submission.

    That is this script, the tools that count as submission code, and the model file with what it imports from its folder.
    """
    script = Path(__file__).resolve()
    modules = [
        sys.modules[key] for key in (f"train_gpt.tools.{name}" for name in SUBMISSION_TOOLS) if key in sys.modules
    ]
    paths = [Path(module.__file__).resolve() for module in modules]
    if type(config) is not Config:
        folder = Path(inspect.getfile(type(config))).resolve().parent
        loaded = [Path(m.__file__).resolve() for m in list(sys.modules.values()) if getattr(m, "__file__", None)]
        paths += [path for path in loaded if path.parent == folder and path != script]
    return {"train_gpt.py": script} | {path.name: path for path in paths}


def model_source(config: Config) -> dict:
    """For an artifact: the model file that can read it, unless the model is this script's."""
    if type(config) is Config:
        return {}
    path = Path(inspect.getfile(type(config)))
    return {"source": {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}}


# ---------- Modes -----------------------------------------------------------------------------------------------------
# MODE=train, from the checks of what the user brought to result.json. Every other mode is a tool. main only connects.


def open_text(config: Config, token_bytes: TokenBytes, folder: RunFolder) -> tuple[TokenStream, dict]:
    """The validation text, and what the audit found: facts for result.json, on rank 0 only."""
    stream = TokenStream(config.data_path, "val", config.vocab_size)
    require(len(stream) > 1, f"{stream.pattern} holds {len(stream)} tokens: 2 are needed to score one")
    folder.log(f"val_loader:shards pattern={stream.pattern} tokens:{len(stream) - 1}")
    if not folder.runtime.is_master:
        return stream, {}
    if line := config.check_text(stream, token_bytes):
        folder.log(line)
    line, facts = audit(token_bytes, stream, config.data_path)
    folder.log(line)
    return stream, facts


def log_final(label: str, score: Score, folder: RunFolder):
    seconds = f"eval_time:{1000 * score.seconds:.0f}ms"
    folder.log(f"{label} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} {seconds}{score.label}")
    counted = f"tokens:{score.tokens} bytes:{score.bytes}{score.label}"
    folder.log(f"{label}_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f} {counted}")


def log_config(config: Config, folder: RunFolder):
    """Log all knobs, with `*` before those that differ from the defaults, and warn of misspelled ones."""
    defaults = type(config)().as_env()
    for name, text in config.as_env().items():
        folder.log(f"{' ' if text == defaults.get(name) else '*'} {name}={text}")
    if check := tool("check", folder.log):
        for warning in check.typo_warnings(os.environ, config.knobs()):
            folder.log(warning)


def train(config: Config, folder: RunFolder, argv: list[str]):
    """MODE=train: one run, from the checks to result.json."""
    runtime = folder.runtime
    stopwatch = Stopwatch(runtime.synchronize)
    log_config(config, folder)
    accum_steps = config.accumulation_steps(runtime.world_size, runtime.device.type)
    stream = TokenStream(config.data_path, "train", config.vocab_size)
    folder.log(f"train_loader:shards pattern={stream.pattern} tokens:{len(stream)}")
    stream.read(0, len(stream.shards[0]) if runtime.is_master else 1)  # checks the tokens of the first shard
    token_bytes = TokenBytes(config.tokenizer_path, config.vocab_size, config.vocab_padding)
    config.coder_class()  # imports what it needs, so that its files are among the sources
    sources = {name: path.read_bytes() for name, path in source_paths(config).items()}
    checkpoint = tool("checkpoint", folder.log)
    hooks = checkpoint.Checkpoints(config, folder) if checkpoint else Hooks(config, folder)
    hooks.choose_folder(stream, sources)
    val_stream, facts = open_text(config, token_bytes, folder)

    stopwatch.switch("compile")
    trainer = Trainer(config, runtime, folder, stopwatch, TrainLoader(stream, config, runtime, accum_steps), hooks)
    hooks.before_warm_up(trainer)
    folder.create(config, sources)
    params = sum(p.numel() for p in trainer.model.parameters())
    folder.log(f"{trainer.note}\nmodel_params:{params}\nseed:{config.seed}\nrun_folder:{folder.path}")
    folder.log(f"world_size:{runtime.world_size} grad_accum_steps:{trainer.loader.accum_steps}")
    evaluator = Evaluator(val_stream, token_bytes, config, runtime, trainer.loader.accum_steps)
    trainer.warm_up(evaluator)
    stopwatch.switch("training")
    startup, compiling = (1000 * stopwatch.seconds[phase] for phase in ("startup", "compile"))
    folder.log(f"start_to_first_step:{startup + compiling:.0f}ms compile:{compiling:.0f}ms")
    hooks.training(True)
    before = trainer.train(evaluator)
    hooks.training(False)
    stopwatch.switch("export")
    log_end_of_training(trainer)

    state = trainer.model.state_dict()
    artifact = None
    if runtime.is_master:
        facts |= export(state, trainer.coder, folder, sum(map(len, sources.values())))
        artifact = (folder.path / trainer.coder.file).read_bytes()
    # Rank 0 reads the file back and the others get its bytes: hosts need no common disk to score the artifact.
    trainer.model.load_state_dict(trainer.coder.decode(runtime.broadcast(artifact)))
    stopwatch.switch("evaluation")
    after = evaluator.score(trainer.model, trainer.compiled_model, folder.log, final=True)
    stopwatch.switch("export")
    log_final(f"final_{trainer.coder.tag.replace('+', '_')}_roundtrip", after, folder)
    if runtime.is_master:
        write_result(trainer, before, after, sources, facts | {"sha256_tokenizer": token_bytes.sha256})


def log_end_of_training(trainer: Trainer):
    config = trainer.config
    clock = trainer.step_log.last_time
    if trainer.steps < config.iterations:
        step = f"step:{trainer.steps}/{config.iterations}"
        trainer.folder.log(f"stopping_early: wallclock_cap train_time:{1000 * clock:.0f}ms {step}")
    limit = config.max_wallclock_seconds
    over = trainer.stopwatch.seconds["training"] - limit
    if limit and over > 0:
        verdict = f"{over:.3f}s OVER MAX_WALLCLOCK_SECONDS={limit}, NOT A VALID SUBMISSION"
        trainer.folder.log(f"clock_verdict:{verdict}")
    if trainer.runtime.device.type == "cuda":
        allocated = f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB"
        trainer.folder.log(f"{allocated} reserved: {torch.cuda.max_memory_reserved() >> 20} MiB")


def write_result(trainer: Trainer, before: Score, after: Score, sources: dict[str, bytes], facts: dict):
    """result.json of a finished run: scores of the last weights and of the artifact, times, machine, sources, `facts`."""
    config, runtime, stopwatch = trainer.config, trainer.runtime, trainer.stopwatch
    counted = after.label or after.bytes == facts["val_bytes"]
    require(counted, f"scored {after.bytes} bytes, but the text has {facts['val_bytes']}: a fault of this script")
    hashes = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in sources.items()}
    trained = stopwatch.seconds["training"]
    steps = trainer.steps
    result = {"run_id": trainer.folder.run_id, "seed": config.seed, "steps": steps}
    result["model_params"] = sum(p.numel() for p in trainer.model.parameters())
    result |= {"val_loss": after.loss, "val_bpb": after.bpb}
    result |= {"pre_quant_val_loss": before.loss, "pre_quant_val_bpb": before.bpb, "partial": bool(after.label)}
    result |= {"scored_tokens": after.tokens, "scored_bytes": after.bytes, "val_tokens": after.total}
    result |= {"eval_stride": config.eval_stride, "eval_seconds": round(after.seconds, 3)}
    result["train_tokens"] = steps * config.train_batch_tokens
    result["over_clock"] = bool(config.max_wallclock_seconds and trained > config.max_wallclock_seconds)
    result["seconds"] = {phase: round(seconds, 3) for phase, seconds in stopwatch.seconds.items()}
    result |= {"step_avg_ms": 1000 * trained / max(steps, 1), "world_size": runtime.world_size}
    result |= {"resumed_at": trainer.hooks.resumed_at, "grad_accum_steps": trainer.loader.accum_steps}
    result |= {"device": runtime.device_name(), "dtype": str(runtime.dtype), "note": trainer.note}
    result |= {"cuda": torch.version.cuda, "torch": torch.__version__, "numpy": np.__version__}
    result |= {"python": platform.python_version(), "platform": platform.platform()}
    result |= {"sha256_code": hashes["train_gpt.py"]["sha256"], "sources": hashes, **facts}
    trainer.folder.write("result.json", (json.dumps(result, indent=1) + "\n").encode())


def main(argv: list[str] | None = None) -> int:
    """Run the mode that the configuration names. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    folder = None
    with contextlib.suppress(AttributeError):  # a replaced stdout may lack this
        sys.stdout.reconfigure(errors="replace")  # letters that the terminal lacks must not end the run
    try:
        if argv in (["-h"], ["--help"]):
            return tool("check", required=True).explain()
        config = Config.load(argv, os.environ)
        folder = RunFolder(Runtime(config, os.environ))
        tools = {"check": "check", "eval": "evaluate", "sample": "sample"}
        mode = train if config.mode == "train" else tool(tools[config.mode], required=True).main
        code = mode(config, folder, argv) or 0
        message = ""
    except KeyboardInterrupt as error:
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        resumable = folder and folder.file and folder.header
        message = f"stopped by {number.name}" + (f": RUN_ID={folder.run_id} goes on with it" if resumable else "")
        code = 128 + number
    except (UserError, OSError) as error:
        message = f"error: {error}"
        code = 2
    except RuntimeError as error:
        if is_out_of_memory(error):
            message = f"error: {error!r:.120}: lower VAL_BATCH_SIZE, TRAIN_SEQ_LEN or the size of the model"
            code = 2
        elif folder and folder.runtime.world_size > 1:
            traceback.print_exc()
            message = f"stopped by {error!r:.120}"
            code = 1
        else:
            raise
    if message:
        print(message, file=sys.stderr, flush=True)
    if folder:
        folder.close(*filter(None, [message]))
        if folder.runtime.world_size > 1:
            # A tidy end waits for ranks that may be waiting for this one, and gloo may abort it.
            sys.stdout.flush()
            os._exit(code)
    return code


if __name__ == "__main__":
    sys.modules["train_gpt"] = sys.modules["__main__"]  # tools and model files import this module by its name
    sys.exit(main())
