"""Train a small GPT as well as 600 seconds and 16,000,000 bytes allow, scored in bits per byte.

    python train_gpt.py                                      one process on what this machine has
    python train_gpt.py records/recipes/demo_cpu.env         a configuration file of KEY=VALUE lines
    SEED=1338 MATRIX_LR=0.03 python train_gpt.py             every knob is an environment variable
    torchrun --standalone --nproc_per_node=8 train_gpt.py    eight GPUs; any number of ranks works
    MODE=check python train_gpt.py                           what a run needs; eval, sample: README
    python train_gpt.py --help                               every knob with its default and meaning

In suffixes: B batch, T time, D model, H query heads, K key-value heads, d head, V vocabulary."""

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

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
NAMED_TOKENIZER = re.compile(r"\w+|(.*\W)?\w*byte_?260\w*(\.json)?")  # bytes, or tiktoken's: no .model
GATE_INPUTS = 12  # channels that a gate of the model looks at
NO_DATA_HINT = """two commands bring some data and train on it:
  python data/prepare_shakespeare.py\n  python train_gpt.py records/recipes/demo_cpu.env"""


class UserError(ValueError):
    """A mistake that the user can mend: shown as a message without a traceback, exit code 2."""


def require(ok, message: str):
    if not ok:
        raise UserError(message)


# ---------- Config: every knob with its default, meaning and unit; where values come from -----------------------------
def knob(default, meaning: str, low=None, high=None, choices=(), free=False, arch=False):
    """Bounds are inclusive. What is `free` may change at a resume, `arch` is in an artifact."""
    high = 2**32 if type(default) is int and high is None else high  # more of anything would hang
    metadata = {"meaning": meaning, "allowed": (low, high, choices), "free": free, "arch": arch}
    return dataclasses.field(default=default, metadata=metadata)


free, arch = functools.partial(knob, free=True), functools.partial(knob, arch=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """A field's name in capitals is its environment variable. A model file may subclass this."""

    # What this call does, where it reads and writes
    mode: str = free("train", "what this call does", choices=("train", "check", "eval", "sample"))
    data_path: str = free("./data/datasets/fineweb10B_sp1024", "folder of fineweb_*.bin shards")
    tokenizer_path: str = free("./data/tokenizers/fineweb_1024_bpe.model", "a .model, a tiktoken name, or bytes")
    model_file: str = free("", "a .py file with a model and more knobs; empty: this script's own")
    log_dir: str = free("./logs", "folder of the run folders")
    run_id: str = free("", "name of the run folder; empty: a time stamp")
    seed: int = knob(1337, "seed of the initial weights, and of a sample", 0, 2**63 - 1)
    # Checkpoints
    checkpoint_every_seconds: float = free(-1.0, "0: one at the end; -1: 60 or 0", -1)
    resume: str = free("auto", "auto: go on in an existing run folder; never; or a checkpoint")
    resume_force: bool = free(False, "resume although knobs that shape the result differ")
    # Machine
    device: str = free("auto", "device of every rank", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = knob("auto", "of activations", choices=("auto", "bfloat16", "float32"))
    compile: str = free("auto", "auto: if a compiler works", choices=("auto", "0", "1", "autotune"))
    attention: str = free(
        "auto",
        "the backend; blocked and fused, for CPUs, are our own",
        choices=("auto", "fastest", "flash3", "cudnn", "flash", "efficient", "math", "blocked", "fused"),
    )
    target_world_size: int = free(0, "MODE=check for so many GPUs; 0: for the ranks there are", 0)
    # Length of a run, and its steps. WARMUP_STEPS only compile: the learning rate has no warm-up.
    iterations: int = knob(20_000, "optimizer steps at most", 1)
    max_wallclock_seconds: float = knob(600.0, "training clock, without validation; 0: none", 0)
    warmup_steps: int = free(20, "steps that compile; then all state is restored", 0)
    loader: str = knob("stream", "order of the training sequences", choices=("stream", "shuffle"))
    train_batch_tokens: int = knob(393_216, "tokens per step, over all ranks and micro-steps", 1)
    train_seq_len: int = arch(4096, "tokens per sequence, in training and in evaluation", 1)
    grad_accum_steps: int = free(0, "micro-steps; 0: at least 8 / ranks on GPUs, 1 on CPUs", 0)
    micro_batch_tokens: str = free("auto", "most tokens per micro-step and rank; auto: what fits")
    # Logging and validation
    train_log_every: int = free(200, "steps between log lines, after the first ten; 0: none", 0)
    val_loss_every: int = free(1000, "steps between validations; 0: only at the end", 0)
    val_at_start: bool = free(True, "validate before the first step, unless VAL_LOSS_EVERY is 0")
    val_batch_size: int = free(524_288, "tokens per validation batch, over all ranks", 1)
    val_tokens_limit: int = free(0, "score only the first N targets, labelled partial; 0: all", 0)
    eval_stride: int = free(0, "targets scored per sliding window; 0: disjoint windows", 0)
    # MODE=eval and MODE=sample
    artifact: str = free("", "the model: a final_model.int8.ptz or a .pt")
    sample_prompt: str = free("", r"text to continue; \n is a line break, \u0022 a quote")
    sample_tokens: int = free(200, "tokens of a sample at most", 1)
    temperature: float = free(0.8, "of the softmax of a sample; 0: the likeliest token", 0)
    top_k: int = free(0, "sample from the likeliest k tokens; 0: from all", 0)
    # Model: shape
    vocab_size: int = arch(1024, "tokens in the vocabulary; must match the tokenizer", 2, 65_536)
    num_layers: int = arch(9, "transformer blocks", 1)
    model_dim: int = arch(512, "width D of the residual stream", 2)
    num_heads: int = arch(8, "query heads H", 1)
    num_kv_heads: int = arch(4, "key-value heads K; divides NUM_HEADS", 1)
    mlp_mult: float = arch(2.0, "hidden width of the MLP over MODEL_DIM, rounded", 0.01, 1024)
    mlp_slope: float = arch(0.0, "slope below 0 of the MLP's leaky ReLU, which is squared", 0, 1)
    tie_embeddings: bool = arch(True, "the output projection is the embedding")
    tied_embed_init_std: float = knob(0.005, "standard deviation of the initial tied embedding", 0)
    logit_softcap: float = arch(30.0, "logits are squeezed smoothly into +- this", 1e-3)
    # Model: attention and residual stream
    rope_base: float = arch(10_000.0, "base of the rotary frequencies", 1)
    rope_dims: int = arch(0, "dimensions of a head that rotate, the first ones; 0: all", 0)
    qk_gain_init: float = knob(1.5, "initial gain of every query head")
    xsa_layers: int = arch(0, "last n blocks attend without a token's own value (XSA)", 0)
    attn_gate: bool = arch(False, "a gate on what each attention head gives")
    x0_mix: bool = arch(True, "every block mixes its input with the embedding, by learned vectors")
    ln_scale: bool = arch(False, "divide a block's norms by the root of its number, from 1")
    gated_skips: bool = arch(False, "learned gates between the stream and the U-net's skips")
    parallel_from: int = arch(-1, "first block, from 0, whose attention and MLP read the same", -1)
    smear_gate: bool = arch(False, "a gate lets each embedding take some of the one before it")
    start_token: int = arch(1, "id that begins a document, where SMEAR_GATE=1 takes nothing", 0)
    canonical: bool = arch(False, "no probability for tokens that no text has after the last")
    # Model: depth recurrence
    loop_layers: str = arch("", "FIRST-LAST blocks, from 0, that run several times; empty: none")
    loop_passes: int = arch(3, "times that LOOP_LAYERS run", 2, 100)
    loop_start: float = knob(0.35, "share of the run from which on LOOP_LAYERS do", 0, 1)
    # Optimizers
    embed_lr: float = knob(0.6, "Adam rate of an untied embedding", 0)
    head_lr: float = knob(0.008, "Adam rate of an untied output projection", 0)
    tied_embed_lr: float = knob(0.03, "Adam rate of the tied embedding", 0)
    scalar_lr: float = knob(0.02, "Adam rate of vectors, scales and gains", 0)
    beta1: float = knob(0.9, "Adam's first decay", 0, 0.999999)
    beta2: float = knob(0.95, "Adam's second decay", 0, 0.999999)
    adam_eps: float = knob(1e-8, "Adam's epsilon", 1e-20)
    matrix_lr: float = knob(0.02, "Muon rate of the matrices of the blocks", 0)
    muon_momentum: float = knob(0.99, "Muon momentum after its warm-up", 0, 0.99999)
    muon_momentum_warmup_start: float = knob(0.92, "Muon momentum at step 0", 0, 0.99999)
    muon_momentum_warmup_steps: int = knob(1500, "steps of the linear momentum warm-up", 0)
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", 1)
    muon_row_norm: bool = knob(False, "give rows of Muon's update norm 1 to begin with")
    muon_weight_decay: float = knob(0.0, "a step takes this times the rate off the matrices", 0)
    embed_weight_decay: float = knob(0.0, "AdamW's decay of embedding and output projection", 0)
    scalar_weight_decay: float = knob(0.0, "AdamW's decay of vectors, scales and gains", 0)
    grad_clip_norm: float = knob(0.0, "most global gradient norm, after reduction; 0: off", 0)
    # Schedule, and the average of the weights
    warmdown_frac: float = knob(0.3526, "share of the run in which the rates fall to 0", 0, 1)
    lr_floor: float = knob(0.0, "least share of the rates in the warmdown; wants EMA_DECAY", 0, 1)
    ema_decay: float = knob(0.0, "of the exported average of the weights; 0: none", 0, 1)
    ema_share: float = knob(1.0, "of that average in what is exported; the rest: the last weights", 0, 1)
    # Export
    codec: str = knob("zlib", "of the artifact; rans is smaller", choices=("zlib", "rans"))
    weight_bits: int = knob(8, "bits of the blocks and of an untied output projection", 2, 8)
    embed_bits: int = knob(8, "bits of the embedding", 2, 8)
    clip_attn: float = knob(0.0, "clip of attention in deviations; 0: a high percentile", 0)
    clip_mlp: float = knob(0.0, "the same for the matrices of the MLPs", 0)
    clip_embed: float = knob(0.0, "the same for the embedding and an untied output projection", 0)
    gptq_batches: int = knob(0, "training batches that calibrate GPTQ; 0: plain rounding", 0)
    fit_size: bool = knob(False, "scale all clips so that the file lands just under SIZE_LIMIT")
    size_limit: int = knob(16_000_000, "bytes of code plus artifact, decimal", 1)
    vocab_padding = 127  # ids at most that only fill the vocabulary up, to a multiple of 128

    @classmethod
    def model_class(cls) -> type["Model"]:
        """The model that this configures; the Config of a model file names its own."""
        return GPT

    @classmethod
    def knobs(cls) -> dict[str, dataclasses.Field]:
        return {field.name.upper(): field for field in dataclasses.fields(cls)}

    @classmethod
    def told_knobs(cls) -> list[str]:
        """What an artifact tells: the model, and what its score depends on to the last digit."""
        arch = [name for name, field in cls.knobs().items() if field.metadata["arch"]]
        return [
            *arch,
            "EVAL_STRIDE",
            "VAL_BATCH_SIZE",
            "TRAIN_BATCH_TOKENS",
            "GRAD_ACCUM_STEPS",
            "MICRO_BATCH_TOKENS",
            "CODEC",
            "WEIGHT_BITS",
        ]

    @classmethod
    def load(cls, argv: list[str], environ, from_artifact: dict | None = None) -> "Config":
        """Defaults < what an artifact tells < KEY=VALUE lines of the file in argv < environment."""
        require(len(argv) <= 1, f"{argv}: give at most one FILE.env; knobs are environment variables")
        knobs, texts = cls.knobs(), read_env_file(Path(argv[0])) if argv else {}
        if cls is Config and (file := environ.get("MODEL_FILE", texts.get("MODEL_FILE"))):
            return tool("evaluate").config_class_of(file).load(argv, environ, from_artifact)
        check = tool("check", "contradictions between knobs are not found", log=str)
        for name in texts.keys() - knobs.keys():
            raise UserError(f"{argv[0]}: {name} is no knob: {check.nearest(name, knobs) if check else 'see --help'}")
        texts = (from_artifact or {}) | texts | {name: environ[name] for name in knobs if name in environ}
        config = cls(**{knobs[name].name: parse(knobs[name], text) for name, text in texts.items()})
        config.check()
        if check:
            check.check_combinations(config)
        return config

    def check(self):
        """Bounds, and what would fail obscurely; tools/check.py knows what else contradicts."""
        for name, field in self.knobs().items():
            value, (low, high, choices) = getattr(self, field.name), field.metadata["allowed"]
            require(value in (choices or (value,)), f"{name}={value}: expected one of {', '.join(choices)}")
            require(low is None or value >= low, f"{name}={value} is too small: the least is {low}")
            require(high is None or value <= high, f"{name}={value} is too large: the most is {high}")
        D, H, K, T = self.model_dim, self.num_heads, self.num_kv_heads, self.train_seq_len
        require(
            re.fullmatch(r"[\w+=-][\w.+=-]{0,99}|", self.run_id),
            f"RUN_ID={self.run_id!r} cannot name a folder: use letters, digits and . _ + = -, at most 100",
        )
        require(D % (2 * H) == 0, f"MODEL_DIM={D} is no multiple of 2 * NUM_HEADS={H}: use {D + -D % (2 * H)}")
        require(H % K == 0, f"NUM_KV_HEADS={K} does not divide NUM_HEADS={H}: use one of {divisors(H)}")
        batch, whole = self.train_batch_tokens, -(-self.train_batch_tokens // T) * T
        require(batch == whole, f"TRAIN_BATCH_TOKENS={batch} is not whole TRAIN_SEQ_LEN={T}: use {whole}")

    def loop_range(self) -> range:
        """The blocks of LOOP_LAYERS."""
        match = re.fullmatch("([0-9]{1,4})-([0-9]{1,4})", self.loop_layers)
        blocks, layers = range(int(match[1]), int(match[2]) + 1) if match else range(0), self.num_layers
        fits = not self.loop_layers or (blocks and blocks.stop <= layers and layers > 1)
        require(fits, f"LOOP_LAYERS={self.loop_layers}: expected FIRST-LAST of 2 or more blocks 0 to {layers - 1}")
        return blocks

    def texts(self) -> dict[str, str]:
        """{KNOB: text} that reads back as this, but for what belongs to one run or one call."""
        once = ("RUN_ID", "MODE", "ARTIFACT", "RESUME", "RESUME_FORCE")
        values = {name: getattr(self, name.lower()) for name in self.knobs() if name not in once}
        odd = r'["\\\x00-\x1f\x7f-\x9f\u2028\u2029]'  # what a line of a file cannot hold, or means more there
        values["SAMPLE_PROMPT"] = re.sub(odd, lambda m: f"\\u{ord(m[0]):04x}", self.sample_prompt)
        return {name: str(int(v) if isinstance(v, bool) else v) for name, v in values.items()}

    def accumulation_steps(self, world_size: int, device_type: str) -> int:
        """Micro-steps per step: GRAD_ACCUM_STEPS, or the fewest that give whole sequences, keep to
        MICRO_BATCH_TOKENS and on GPUs are at least 8 / world_size, so that one works as eight."""
        T, micro, wanted = self.train_seq_len, self.micro_batch_tokens, self.grad_accum_steps
        total, ranks = self.train_batch_tokens // T, world_size
        require(
            total % ranks == 0,
            f"TRAIN_BATCH_TOKENS={total * T} is {total} sequences, which {ranks} ranks "
            f"cannot share: use {-(-total // ranks) * ranks * T} tokens, or one of {divisors(total)} ranks",
        )
        allowed, on_cpu = divisors(total // ranks), device_type == "cpu"
        require(
            wanted in (0, *allowed),
            f"GRAD_ACCUM_STEPS={wanted} does not divide the {allowed[-1]} sequences of a rank: use one of {allowed}",
        )
        # A CPU that runs out of memory gets no error to react to; 2**14 tokens keep its cores busy.
        most = 2**14 if on_cpu else math.inf
        most = most if micro == "auto" else int(micro) or math.inf
        fewest = max(0 if on_cpu else 8 / ranks, allowed[-1] * T / most)
        return wanted or next((n for n in allowed if n >= fewest), allowed[-1])


def divisors(n: int) -> list[int]:
    return sorted({d for k in range(1, math.isqrt(n) + 1) if n % k == 0 for d in (k, n // k)})


def parse(field: dataclasses.Field, text: str):
    """The value of a knob from its text; a prompt keeps its spaces and may hold escapes."""
    if field.name == "sample_prompt":
        return re.sub(r"\\u([0-9a-f]{4})", lambda m: chr(int(m[1], 16)), text.replace(r"\n", "\n"))
    kind, text = type(field.default), text.strip()
    with contextlib.suppress(ValueError, KeyError, OverflowError):
        value = {"0": False, "1": True}[text] if kind is bool else kind(text)
        if kind is str or math.isfinite(value):
            return value
    noun = {bool: "a switch: use 0 or 1", int: "a whole number", float: "a finite number"}[kind]
    raise UserError(f"{field.name.upper()}={text!r} is not {noun}: the default is {field.default}")


def read_env_file(path: Path) -> dict[str, str]:
    """{KEY: text}. `#` starts a comment, a value may stand in quotes, nothing is expanded."""
    try:
        lines, texts = path.read_text(encoding="utf-8-sig").splitlines(), {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give the path of a FILE.env") from error
    grammar = r"""\s*(\w+)\s*=\s*("[^"]*"|'[^']*'|[^"'#\s](?:[^#]*[^#\s])?|)\s*(?:\s#.*)?"""
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            match = re.fullmatch(grammar, line)
            require(match, f"{path}:{number}: {line.strip()!r} is not a KEY=VALUE line")
            require(match[1] not in texts, f"{path}:{number}: {match[1]} is given twice: keep one")
            texts[match[1]] = match[2][1:-1] if match[2][:1] in ('"', "'") else match[2]
    return texts


# ---------- Runtime: device and ranks, what they tell each other, the run folder with its log, the one stopwatch ------
class Runtime:
    """This process among `world_size` ranks, and its device. One process has nothing to tell."""

    newton_schulz = None  # a kernel for Muon's iterations, where tools/kernels.py has one

    def __init__(self, config: Config, environ):
        rank, size = environ.get("RANK", "0"), environ.get("WORLD_SIZE", "1")
        numbers = rank.isdecimal() and size.isdecimal() and int(rank) < int(size)
        place = size == "1" or {"MASTER_ADDR", "MASTER_PORT"} <= set(environ)
        require(
            numbers and place,
            f"RANK={rank} WORLD_SIZE={size} without a launcher: start several ranks with "
            "torchrun, which sets MASTER_ADDR and MASTER_PORT too, or unset both",
        )
        self.rank, self.world_size, self.is_master = int(rank), int(size), int(rank) == 0
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        elsewhere = config.mode == "check" and config.target_world_size  # are the GPUs
        kind = next(filter(found.get, found)) if elsewhere or config.device == "auto" else config.device
        require(found[kind], f"DEVICE={kind}: torch {torch.__version__} sees none here: use DEVICE=auto")
        require(kind != "mps" or size == "1", f"WORLD_SIZE={size}: use one process, or DEVICE=cpu")
        self.device, gpus = torch.device(kind), torch.cuda.device_count()
        if kind == "cuda":
            self.device = torch.device(kind, int(environ.get("LOCAL_RANK", 0)) % gpus)
            torch.cuda.set_device(self.device)
        self.dtype = self.best_dtype() if config.dtype == "auto" else getattr(torch, config.dtype)
        if self.world_size > 1:  # NCCL refuses two ranks on one GPU
            one_each = kind == "cuda" and int(environ.get("LOCAL_WORLD_SIZE", size)) <= gpus
            self.join("nccl" if one_each else "gloo", environ)

    def join(self, backend: str, environ):
        """Meet the other ranks; an hour is for those that compile more slowly."""
        hour, check = datetime.timedelta(hours=1), tool("check", "no word of late ranks", log=str)
        with check.meeting(environ, self.rank, self.world_size) if check else contextlib.nullcontext(str) as roll_call:
            store, rank, size = next(dist.rendezvous("env://", timeout=hour))
            if environ.get("GROUP_WORLD_SIZE") == "1":  # after a restart it holds dead ranks' keys
                store = dist.PrefixStore(f"attempt_{environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
            roll_call(store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=hour)
            self.hosts = dist.new_group(backend="gloo", timeout=hour)  # waits for no device's queue

    def best_dtype(self) -> torch.dtype:
        """bfloat16 where the hardware multiplies it, float32 elsewhere."""
        tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = self.device.type == "cpu" and any(getattr(torch.cpu, test, bool)() for test in tests)
        if self.device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32

    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
        name = re.search(r"model name\s*: (.*)", cpuinfo)
        return f"{name[1] if name else platform.processor()}, {torch.get_num_threads()} threads"

    def synchronize(self):
        """Wait until the device has done all that was asked of it."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def sum(self, values: list[float]) -> list[float]:
        """Sums over the ranks, in float64 on the hosts."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total, group=self.hosts)
        return total.tolist()

    def share(self, value):
        """Rank 0's value of any picklable object, on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self.hosts)
        return box[0]


class RunFolder:
    """logs/<run_id>/ and all that rank 0 writes; lines logged before `create` are kept for it."""

    def __init__(self, runtime: Runtime):
        self.runtime, self.lines, self.file = runtime, [], None
        self.header = ""  # first line of config.env, by which a restarted launch knows its folder
        self.before_closing = lambda: None  # ends what is still being written

    def locate(self, config: Config, name: str = ""):
        """Choose the folder: RUN_ID, or `name`, or a new time stamp."""
        # Two containers may have the same clock and the same process id.
        stamp = time.strftime(f"%Y-%m-%d_%H-%M-%S_{int.from_bytes(os.urandom(3))}")
        self.run_id = self.runtime.share(config.run_id or name or stamp)
        self.path = Path(config.log_dir) / self.run_id

    def create(self, config: Config, sources: dict[str, bytes]):
        """Make or reopen the folder, for this process alone; put configuration and sources in."""
        if not self.runtime.is_master:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path / "train.log", "a", encoding="utf-8")
            if keeper := tool("checkpoint", "folders are not locked", log=str):
                keeper.lock(self.file, self.log)
        except OSError as error:
            self.file = None
            raise UserError(
                f"LOG_DIR={config.log_dir} RUN_ID={self.run_id}: folder {self.path} cannot be "
                f"opened ({error.strerror}): choose another"
            ) from error
        marks = {name: "'" if '"' in text else '"' for name, text in config.texts().items()}
        lines = [f"{name}={marks[name]}{text}{marks[name]}\n" for name, text in config.texts().items()]
        for name, data in ({"config.env": (self.header + "".join(lines)).encode()} | sources).items():
            self.write(name, data)
        self.append("train.log", *self.lines)
        self.lines = []

    def log(self, line: str):
        if self.runtime.is_master:
            with contextlib.suppress(OSError):  # a terminal that is gone must not end the run
                print(line, flush=True)
            self.append("train.log", line) if self.file and not self.lines else self.lines.append(line)

    def append(self, name: str, *lines: str):
        """Lines at the end of a file; a full disk costs the lines and not the run."""
        if self.runtime.is_master:
            with contextlib.suppress(OSError), open(self.path / name, "a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)

    def write(self, name: str, data: bytes):
        """Write a file such that it is there whole and verified, or as it was before."""
        path, temporary = self.path / name, self.path / f".{name}.tmp"
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

    def close(self, *last_words: str):
        self.before_closing()
        if self.file:
            self.append("train.log", *last_words)
            self.file.close()
            self.file = None


class Stopwatch:
    """Seconds in each phase. One phase runs at a time; the device is drained where two meet."""

    def __init__(self, synchronize):
        self.synchronize, self.phase, self.since = synchronize, "startup", time.perf_counter()
        self.seconds = dict.fromkeys(("startup", "compile", "training", "evaluation", "export"), 0.0)

    def switch(self, phase: str):
        self.synchronize()
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now

    def elapsed(self, phase: str) -> float:
        return self.seconds[phase] + (phase == self.phase) * (time.perf_counter() - self.since)


def is_out_of_memory(error: Exception) -> bool:
    """As the CPU, CUDA and MPS say it, and CUDA's libraries: CUBLAS_STATUS_ALLOC_FAILED."""
    return bool(re.search("(not enough|can't allocate|out of) memory|ALLOC_FAILED", str(error)))


# ---------- Data: the shard format, the order of the stream, its position, the next step read ahead -------------------
def open_shard(path: Path) -> np.ndarray:
    """Memory-mapped uint16 tokens, after 256 int32: magic, version, token count, zeros."""
    size = path.stat().st_size
    require(size >= SHARD_HEADER_BYTES, f"shard {path} has {size} bytes, less than a header: make or fetch it again")
    magic, version, count = np.fromfile(path, dtype="<i4", count=3).tolist()
    fits = (magic, version, size - SHARD_HEADER_BYTES) == (SHARD_MAGIC, SHARD_VERSION, 2 * count)
    require(
        fits and count > 0,
        f"shard {path} has magic {magic} version {version}, {size} bytes for {count} tokens: "
        f"expected {SHARD_MAGIC} and {SHARD_VERSION}: it was cut short or damaged: make or fetch it again",
    )
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))


class TokenStream:
    """The shards of one split as one sequence of tokens."""

    def __init__(self, folder: str, split: str, vocab_size: int):
        self.pattern, self.vocab_size = f"{folder}/fineweb_{split}_*.bin", vocab_size
        name = re.compile(rf"fineweb_{split}_(\d+)\.bin")  # a glob takes ..._000000_old.bin, too
        found = sorted((int(match[1]), path) for path in Path(folder).glob("*") if (match := name.fullmatch(path.name)))
        require(found, f"DATA_PATH={folder} holds no fineweb_{split}_NNNNNN.bin; {NO_DATA_HINT}")
        first = found[0][0] if split == "train" else 0  # a score needs the beginning of its text
        for expected, (number, path) in enumerate(found, start=first):
            require(
                number == expected,
                f"{self.pattern}: shard number {expected} is missing, or "
                f"{path.name} is there twice: fetch it again or move one away",
            )
        self.shards = [open_shard(path) for _, path in found]
        self.ends = np.cumsum([len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` uint16 tokens of the vocabulary from `start` on, across shards and the end."""
        pieces = []
        while count > 0:
            start %= len(self)
            index = int(np.searchsorted(self.ends, start, side="right"))
            pieces.append(self.shards[index][start - self.ends[index] :][:count])  # from its end
            start, count = start + len(pieces[-1]), count - len(pieces[-1])
        tokens = np.concatenate(pieces)
        largest = tokens.max()
        require(
            largest < self.vocab_size,
            f"{self.pattern}: token {largest} is outside VOCAB_SIZE="
            f"{self.vocab_size}: set DATA_PATH, TOKENIZER_PATH and VOCAB_SIZE together",
        )
        return tokens


def to_device(tokens: np.ndarray, device: torch.device) -> Tensor:
    """int64 tokens on the device; two bytes a token on the wire, copied asynchronously on CUDA."""
    wire = torch.from_numpy(tokens.view(np.int16))  # some devices lack kernels for uint16
    wire = wire.pin_memory() if device.type == "cuda" else wire
    return wire.to(device, non_blocking=True).long() & 0xFFFF


class TrainLoader:
    """This rank's share of each step; a thread reads the next one ahead.

    Ranks and micro-steps take slices of a step's sequences: their number does not matter. Sequence
    i of the step at `position` p is the T + 1 tokens from p + i*T on (LOADER=stream), or number
    p / T + i of all pieces of the text (LOADER=shuffle), by a permutation and a phase per epoch."""

    def __init__(self, stream: TokenStream, config: Config, runtime: Runtime, accum_steps: int):
        self.stream, self.device, self.accum_steps = stream, runtime.device, accum_steps
        self.batch_tokens, self.length = config.train_batch_tokens, config.train_seq_len
        self.share, self.rank = self.batch_tokens // runtime.world_size, runtime.rank
        self.seed, self.epoch = config.seed if config.loader == "shuffle" else None, -1
        self.pieces = max(1, (len(stream) - 1) // self.length - 1)  # one fewer, for the phase
        self.reader = ThreadPoolExecutor(max_workers=1)
        self.seek(0)

    def seek(self, position: int):
        self.position = position % len(self.stream) if self.seed is None else position
        self.ahead = self.reader.submit(self.read, self.position + self.rank * self.share)

    def read(self, position: int) -> np.ndarray:
        """[B, T + 1] tokens: each sequence with the target of its last token."""
        starts = range(position, position + self.share, self.length)
        starts = starts if self.seed is None else map(self.shuffled, starts)
        return np.stack([self.stream.read(start, self.length + 1) for start in starts])

    def shuffled(self, position: int) -> int:
        """Where in the text the sequence at this position of the order begins."""
        epoch, index = divmod(position // self.length, self.pieces)
        if epoch != self.epoch:
            self.epoch, random = epoch, np.random.default_rng((self.seed, epoch))
            self.phase, self.order = int(random.integers(self.length)), random.permutation(self.pieces)
        return self.phase + int(self.order[index]) * self.length

    def next_step(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, [micro-steps, B, T] each."""
        tokens = to_device(self.ahead.result(), self.device)
        self.seek(self.position + self.batch_tokens)
        halves, shape = (tokens[:, :-1], tokens[:, 1:]), (self.accum_steps, -1, self.length)
        return tuple(half.contiguous().view(shape) for half in halves)


# ---------- Bytes: the tokenizer, what each of its tokens weighs in bytes of text, the proof of it --------------------
class TokenBytes:
    """Bytes of text per token, for a SentencePiece .model; tools/tokenizers.py has others.

    Special tokens, and ids beyond the tokenizer's own, weigh 0 and are boundaries. A byte piece weighs
    1, any other its UTF-8 text with U+2581 as a space; but a leading U+2581 right after a boundary adds
    nothing, unless the model writes spaces there as they are. Marks of capitals weigh 0."""

    def __init__(self, path: str, vocab_size: int, padding: int = 127):
        self.path, self.drops_first_space, self.unmark, self.unweighed = path, True, bytes, []
        self.leading, self.byte_ids, self.unknown = set(), set(), set()
        if NAMED_TOKENIZER.fullmatch(path):
            tool("tokenizers").load(self)
        else:
            self.load_sentencepiece(path)
        self.size = len(self.pieces)  # bytes of each token's text, None for a special one
        content = Path(path).read_bytes() if self.leading else repr(self.pieces).encode()
        self.sha256 = hashlib.sha256(content).hexdigest()
        require(
            0 <= vocab_size - self.size <= padding,
            f"VOCAB_SIZE={vocab_size}, but TOKENIZER_PATH={path} has "
            f"{self.size} pieces: set VOCAB_SIZE={self.size}, or the tokenizer of the shards",
        )
        ids, pieces = np.arange(vocab_size), self.pieces + [None] * (vocab_size - self.size)
        self.boundary = np.array([piece is None for piece in pieces])
        self.weight = np.array([len(piece or b"") for piece in pieces])
        self.weight[self.unweighed] = 0
        self.leading_space, self.is_byte = np.isin(ids, [*self.leading]), np.isin(ids, [*self.byte_ids])

    def load_sentencepiece(self, path: str):
        """`pieces` are without their leading U+2581, which `leading` tells."""
        from sentencepiece import SentencePieceProcessor  # late: imports stay light

        require(Path(path).is_file(), f"TOKENIZER_PATH={path} does not exist; {NO_DATA_HINT}")
        try:
            model = SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as error:
            raise UserError(f"TOKENIZER_PATH={path} is no SentencePiece model: make or fetch it again") from error
        self.model, self.start, self.encode = model, model.bos_id(), model.encode
        self.decode = lambda tokens: self.unmark(model.decode(tokens).encode())
        ids = range(model.vocab_size())
        texts = model.id_to_piece([*ids])
        require("\u2581" in texts, f"{path} has no piece for a single space (U+2581): use another")
        # A model that puts a space before a text, or takes it away, gives a first space no meaning.
        self.drops_first_space = model.normalize("a")[:1] == "\u2581" or model.normalize(" a")[:1] != "\u2581"
        self.unknown = {*filter(model.is_unknown, ids), *filter(model.is_unused, ids)}
        silent = self.unknown | set(filter(model.is_control, ids))
        self.byte_ids = set(filter(model.is_byte, ids))
        self.leading = {token for token in ids if texts[token].startswith("\u2581")} - silent
        self.pieces = [text.removeprefix("\u2581").replace("\u2581", " ").encode() for text in texts]
        for token in silent | self.byte_ids:
            self.pieces[token] = None if token in silent else bytes([int(texts[token][3:5], 16)])  # <0xE6>
        # Marks of capitals (data/case_marks.py): T, A and M stand for no text, E spells them all.
        marks = [texts.index(mark) for mark in "\ue001\ue002\ue003\ue004" if mark in texts]
        exact = len(self.byte_ids) == 256 and model.normalize("  a\n\ufb01 ") == "\u2581\u2581a\n\ufb01\u2581"
        if exact and len(marks) == 4 and not any(map(model.get_score, marks)):  # 0: a symbol
            self.unweighed = marks[:3]
            self.unmark = lambda text: re.sub(b"\xee\x80[\x81-\x83]", b"", text)
            if capitals := tool("tokenizers", "case marks are weighed, capitals not compared"):
                capitals.use_case_marks(self)

    def weigh(self, tokens: np.ndarray) -> int:
        """Bytes of tokens[1:], each in the context of the token before it."""
        before, target = tokens[:-1], tokens[1:]
        spaces = self.leading_space[target] & ~(self.boundary[before] & self.drops_first_space)
        return int(self.weight[target].sum() + np.count_nonzero(spaces))

    def spell(self, tokens: list[int]) -> bytes:
        """The text of a document, piece by piece, as `weigh` counts it."""
        text, first = [], self.drops_first_space
        for token in tokens:
            text.append(b" " * (token in self.leading and not first) + (self.pieces[token] or b""))
            first = self.drops_first_space and self.pieces[token] is None
        return self.unmark(b"".join(text))


FINEWEB_TARGETS, FINEWEB_BYTES = 62_021_632, 151_080_363  # the challenge's, in 1,024 pieces
AUDIT_TOKENS = 1_000_000  # that are decoded


def compare_spelling(token_bytes: TokenBytes, stream: TokenStream) -> str:
    """Prove on the first tokens that what is weighed is the text that the tokenizer decodes, less half
    characters, and documents with unknown letters, which become a sign there. A phrase for the log."""
    tokens = stream.read(0, min(AUDIT_TOKENS, len(stream)))
    starts, length, unknown = np.flatnonzero(token_bytes.boundary[tokens]), 0, 0
    for document in filter(len, map(np.ndarray.tolist, np.split(tokens, starts))):
        spelled, known = token_bytes.spell(document), token_bytes.unknown.isdisjoint(document)
        length, unknown = length + len(spelled), unknown + (not known)
        texts = (spelled, token_bytes.decode(document) if known else spelled)
        ours, theirs = (text.decode(errors="replace").strip("\ufffd") for text in texts)
        require(
            ours == theirs and ours.encode() in spelled,
            f"{stream.pattern}: {token_bytes.path} decodes a "
            f"document to {theirs[:40]!r} and on, its pieces spell {ours[:40]!r}: use the tokenizer of the shards",
        )
    boundary = np.flatnonzero(token_bytes.boundary)[:1].astype(tokens.dtype)
    weighed = token_bytes.weigh(np.concatenate([boundary, tokens]))
    assert weighed == length, f"the first tokens weigh {weighed} bytes and spell {length}: a fault of this script"
    note = f" ({unknown} documents hold unknown letters and are not compared)" if unknown else ""
    return f"{len(tokens)} tokens in {len(starts)} documents decode to the {weighed} bytes they weigh{note}"


def audit(token_bytes: TokenBytes, stream: TokenStream, data_path: str) -> tuple[str, dict]:
    """Prove the byte count that a score divides by: a line for the log, and facts for result.json. It takes
    a manifest.json with the true bytes: a tokenizer and its tokens' weights come from one file."""
    pattern, text_bytes, largest, digest = stream.pattern, 0, 0, hashlib.sha256()
    for start in range(0, len(stream), 2**24):
        chunk = stream.read(start, min(2**24 + 1, len(stream) - start))
        text_bytes, largest = text_bytes + token_bytes.weigh(chunk), max(largest, int(chunk.max()))
        digest.update(chunk[: 2**24].tobytes())
    require(
        largest < token_bytes.size,
        f"{pattern}: {token_bytes.path} has no token {largest}: use the tokenizer of the shards",
    )
    require(text_bytes, f"{pattern}: {len(stream)} tokens weigh no bytes: make or fetch it again")
    stated, compared = manifest_bytes(data_path), compare_spelling(token_bytes, stream)
    fineweb = abs(text_bytes - 151.08e6) < 6e3
    if token_bytes.size == 1024:
        fineweb = token_bytes.weigh(stream.read(0, min(FINEWEB_TARGETS + 1, len(stream)))) == FINEWEB_BYTES
    source = f"{'' if fineweb else 'not '}canonical FineWeb, not proved: no manifest.json states the true bytes"
    proved = stated is not None and stated["bytes"] == text_bytes
    if stated:
        require(
            text_bytes == stated["token_bytes"],
            f"{pattern}: weighs {text_bytes} bytes, but "
            f"manifest.json states {stated['token_bytes']}: make or fetch the data again",
        )
        source = "bytes:proved by manifest.json" if proved else f"bytes:lossy: of {stated['bytes']} in the text"
    facts = {"val_bytes": text_bytes, "bytes_proved": proved, "sha256_val_tokens": digest.hexdigest()}
    return f"byte_audit: {compared}; all {len(stream)} tokens weigh {text_bytes} bytes ({source})", facts


def manifest_bytes(folder: str) -> dict[str, int] | None:
    """`bytes` of the validation text, and `token_bytes` that are kept, if a manifest has them."""
    path = Path(folder) / "manifest.json"
    if not path.exists():
        return None
    try:
        split = json.loads(path.read_text(encoding="utf-8"))["splits"]["val"]
        return {"bytes": int(split["bytes"]), "token_bytes": int(split.get("token_bytes", split["bytes"]))}
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise UserError(f"{path} states no splits.val.bytes ({error!r:.60}): prepare the data again") from error


# ---------- Model: what is asked of any model, attention and its backends, the architecture ---------------------------
class Row(NamedTuple):
    """What is done with the parameters of a kind, from the first weights to the artifact."""

    init: object  # a value, the name of a knob, or a function of (parameter, config, generator)
    group: str  # "matrix" is Muon's; "embed", "head" and "scalar" are AdamW's
    clip: str = "embed"  # class of the export: its knob CLIP_*, its table of frequencies
    bits: str = "weight_bits"  # the knob that says how many a weight gets
    fp32: bool = False  # kept whole by CODEC=zlib, where it is too small to be quantised


def uniform_init(p: Tensor, config: Config, generator):
    p.uniform_(-(p.size(1) ** -0.5), p.size(1) ** -0.5, generator=generator)


def embedding_init(p: Tensor, config: Config, generator):
    p.normal_(std=config.tied_embed_init_std if config.tie_embeddings else 1.0, generator=generator)


class Model(nn.Module):
    """What training, export and scoring ask of a model. One of your own gives PARAMETERS and `features`, from
    tokens [B, T] what the output projection sees [B, T, D], calls init_weights, and may override the rest."""

    PARAMETERS: dict[str, Row] = {}
    looping, has_loops = False, False  # depth recurrence: it is on, there is any
    softcap, mask, mask_in_training = 30.0, None, False  # CANONICAL=1
    fused_loss, needs_logits = None, False  # a kernel for logits and loss at once; training needs the logits
    graph_starts: tuple[float, ...] = (0.0,)  # shares of the run where its graph changes

    @classmethod
    def row(cls, name: str) -> Row:
        """That of a parameter: blocks.3.attn.c_q.weight is a blocks.attn.c_q."""
        kind = re.sub(r"\.\d+(?=\.|$)", "", name).removesuffix(".weight")
        require(kind in cls.PARAMETERS, f"{cls.__name__}.PARAMETERS has no row {kind} for {name}: add one")
        return cls.PARAMETERS[kind]

    @torch.no_grad()
    def init_weights(self, config: Config):
        """Drawn on the CPU in the order of the parameters: the same on every device and rank."""
        generator = torch.Generator().manual_seed(config.seed)
        for name, p in self.named_parameters():
            init = self.row(name).init
            init = getattr(config, init) if isinstance(init, str) else init
            init(p, config, generator) if callable(init) else p.copy_(torch.tensor(init, dtype=p.dtype))

    def output_weight(self) -> tuple[str, Tensor]:
        """Name and weight [V, D] of the output projection: the embedding's without an lm_head."""
        name = "tok_emb" if getattr(self, "lm_head", None) is None else "lm_head"
        return f"{name}.weight", getattr(self, name).weight

    def logits(self, x_BTD: Tensor) -> Tensor:
        """[B, T, V] in fp32, softcapped."""
        z = at_least_fp32(F.linear(x_BTD, self.output_weight()[1].to(x_BTD.dtype)))
        return self.softcap * torch.tanh(z / self.softcap)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None):
        """What `losses` makes of the targets; without them logits [B, T, V], in fp32."""
        x_BTD = self.features(tokens_BT)
        masked = self.mask is not None and (self.mask_in_training or not self.training)
        if self.fused_loss and targets_BT is not None and not (self.training and self.needs_logits):
            return self.fused_loss(self, x_BTD, targets_BT, tokens_BT if masked else None)
        logits = self.mask(self.logits(x_BTD), tokens_BT) if masked else self.logits(x_BTD)
        return logits if targets_BT is None else self.losses(logits, targets_BT)

    def losses(self, logits_BTV: Tensor, targets_BT: Tensor):
        """[B, T] in nats, in fp32. In training it may be (losses, extra): a scalar to minimise with
        their mean, which no log or score counts."""
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)

    def advance(self, progress: float):
        """Be what this share of the run trains. Before that, and in evaluation, it is what the end is."""

    def final_score(self, evaluator: "Evaluator", compiled_model: nn.Module, log) -> "Score":
        """That of the artifact, whose weights these are; a model that learns while it is scored does so here."""
        return evaluator.score(compiled_model, log)

    def optimizers(self, config: Config, runtime: Runtime) -> list[torch.optim.Optimizer]:
        return build_optimizers(self, config, runtime)

    def lr_scale(self, config: Config, step: int, progress: float) -> float:
        """By what each group's rate is multiplied at this step."""
        return lr_scale(config, progress)


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def grouped_attention(q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor) -> Tensor:
    """Causal; tools/kernels.py has others, and chooses."""
    return F.scaled_dot_product_attention(q_BHTd, k_BKTd, v_BKTd, is_causal=True, enable_gqa=True)


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=2.0**-23)  # computed in fp32, whose own epsilon this is


class Linear(nn.Linear):
    """The fp32 master weight is cast to the type of the input at use."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def rope_tables(length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin [T, d/2] in fp32 (Su et al., RoFormer): bf16 positions would merge past 256."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x_BTHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in halves: dimension i turns with i + r/2 by cos, sin [T, 1, r/2]; from r on none."""
    a, b, *rest = x_BTHd.split(cos.size(-1), dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, *rest], dim=-1)


class Attention(nn.Module):
    """Causal, grouped-query (Shazeer 2019; Ainslie et al. 2023); queries and keys normalised."""

    def __init__(self, config: Config, attend, layer: int):
        super().__init__()
        D, H, self.attend = config.model_dim, config.num_heads, attend
        self.head_dim, kv_dim = D // H, D // H * config.num_kv_heads
        self.c_q, self.c_k, self.c_v, self.proj = (Linear(D, out, bias=False) for out in (D, kv_dim, kv_dim, D))
        self.q_gain = nn.Parameter(torch.empty(H))
        self.gate = nn.Parameter(torch.empty(H, min(GATE_INPUTS, D))) if config.attn_gate else None
        self.exclusive = layer >= config.num_layers - config.xsa_layers

    def qkv(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.c_q(x_BTD), self.c_k(x_BTD), self.c_v(x_BTD)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, *scale: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x_BTD))
        q = rotate(rms_norm(q), cos, sin) * self.q_gain.to(q.dtype)[:, None]
        k = rotate(rms_norm(k), cos, sin)
        y = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        if self.exclusive:  # XSA: each head leaves out the direction of the token's own value
            y_BTKGd, v_BTK1d = y.unflatten(2, (v.size(2), -1)), F.normalize(v, dim=-1).unsqueeze(3)
            y = (y_BTKGd - (y_BTKGd * v_BTK1d).sum(-1, keepdim=True) * v_BTK1d).flatten(2, 3)
        if self.gate is not None:
            gate_BTH = 2 * torch.sigmoid(F.linear(x_BTD[..., :GATE_INPUTS], self.gate.to(y.dtype)))
            y = y * gate_BTH[..., None]
        return self.proj(y.flatten(2), *scale)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D, hidden, self.slope = config.model_dim, round(config.mlp_mult * config.model_dim), config.mlp_slope
        self.fc, self.proj = Linear(D, hidden, bias=False), Linear(hidden, D, bias=False)

    def forward(self, x: Tensor, *scale: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), self.slope).square(), *scale)


class Block(nn.Module):
    def __init__(self, config: Config, attend, layer: int):
        super().__init__()
        D, self.attn, self.mlp = config.model_dim, Attention(config, attend, layer), MLP(config)
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.empty(D)) for _ in range(2))
        self.resid_mix = nn.Parameter(torch.empty(2, D)) if config.x0_mix else None
        self.norm_scale = (layer + 1) ** -0.5 if config.ln_scale else 1.0
        self.parallel = 0 <= config.parallel_from <= layer

    def scaled(self, scale_D: Tensor, part: nn.Module, x: Tensor, *tables: Tensor) -> Tensor:
        return scale_D.to(x.dtype) * part(x, *tables)

    def forward(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.resid_mix is not None:
            mix = self.resid_mix.to(x.dtype)
            x = mix[0] * x + mix[1] * x0
        y = x + self.scaled(self.attn_scale, self.attn, rms_norm(x) * self.norm_scale, cos, sin)
        return y + self.scaled(self.mlp_scale, self.mlp, rms_norm(x if self.parallel else y) * self.norm_scale)


class GPT(Model):
    """A U-net of blocks over a normalised embedding. Weights, RoPE tables, norms, softmax and loss are fp32;
    activations and products are of `dtype`, to which weights and tables are cast at use."""

    PARAMETERS = {
        "tok_emb": Row(embedding_init, "embed", bits="embed_bits"),
        "lm_head": Row(0.0, "head"),
        "smear": Row(0.0, "scalar", fp32=True),
        "skip_weights": Row(1.0, "scalar", fp32=True),
        "skip_gates": Row(0.0, "scalar", fp32=True),
        "blocks.resid_mix": Row([[1.0], [0.0]], "scalar", fp32=True),
        "blocks.attn_scale": Row(1.0, "scalar", fp32=True),
        "blocks.mlp_scale": Row(1.0, "scalar", fp32=True),
        "blocks.attn.q_gain": Row("qk_gain_init", "scalar", "attn", fp32=True),
        "blocks.attn.gate": Row(0.0, "scalar", "attn", fp32=True),
        "blocks.attn.c_q": Row(uniform_init, "matrix", "attn"),
        "blocks.attn.c_k": Row(uniform_init, "matrix", "attn"),
        "blocks.attn.c_v": Row(uniform_init, "matrix", "attn"),
        "blocks.attn.proj": Row(0.0, "matrix", "attn"),
        "blocks.mlp.fc": Row(uniform_init, "matrix", "mlp"),
        "blocks.mlp.proj": Row(0.0, "matrix", "mlp"),
    }
    block_class = Block

    def __init__(self, config: Config, attend=grouped_attention, dtype=torch.float32):
        super().__init__()
        D, V, layers = config.model_dim, config.vocab_size, config.num_layers
        self.dtype, self.softcap, self.start_token = dtype, config.logit_softcap, config.start_token
        self.tok_emb = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(self.block_class(config, attend, layer) for layer in range(layers))
        # The order of the blocks without depth recurrence, and with it, from LOOP_START on.
        self.straight, loop, again = [*range(layers)], config.loop_range(), config.loop_passes - 1
        self.looped = [*range(loop.stop), *[*loop] * again, *range(loop.stop, layers)]
        self.has_loops = self.looping = bool(loop)
        self.graph_starts = tuple(sorted({0.0, config.loop_start})) if loop else (0.0,)
        # A single block has no skips, and DDP waits for every gradient that is required.
        n = len(self.looped) // 2
        skips, gates = (nn.Parameter(torch.empty(n, D), requires_grad=n > 0) for _ in range(2))
        self.skip_weights, self.skip_gates = skips, gates if config.gated_skips else None
        self.smear = nn.Parameter(torch.empty(1 + min(GATE_INPUTS, D))) if config.smear_gate else None
        self.lm_head = None if config.tie_embeddings else Linear(D, V, bias=False)
        cos, sin = rope_tables(config.train_seq_len, config.rope_dims or D // config.num_heads, config.rope_base)
        self.register_buffer("cos", cos[:, None], persistent=False)
        self.register_buffer("sin", sin[:, None], persistent=False)
        self.init_weights(config)

    def advance(self, progress: float):
        self.looping = self.has_loops and progress >= self.graph_starts[-1]

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, D], normalised; the smear gate adds some of the token before in the document."""
        x = rms_norm(self.tok_emb(tokens_BT).to(self.dtype))
        if self.smear is None:
            return x
        share, weights = self.smear[0].to(x.dtype), self.smear[1:].to(x.dtype)
        gate_BT = share * torch.sigmoid(x[:, 1:, :GATE_INPUTS] @ weights) * (tokens_BT[:, 1:] != self.start_token)
        return torch.cat([x[:, :1], x[:, 1:] + gate_BT[..., None] * x[:, :-1]], dim=1)

    def features(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, D] in `dtype`. The first half of the blocks, as they run, push what they give; each of the
        second half takes the latest that is left, scaled by its skip_weights."""
        cos, sin = (table[: tokens_BT.size(1)].to(self.dtype) for table in (self.cos, self.sin))
        x = x0 = self.embed(tokens_BT)
        order, skips = self.looped if self.looping else self.straight, []
        half = len(order) // 2
        for i, layer in enumerate(order):
            if i >= half and skips:  # an odd number of blocks leaves the last without
                skip = self.skip_weights[i - half].to(x.dtype) * skips.pop()
                gates = self.skip_gates
                x = x + skip if gates is None else torch.lerp(skip, x, torch.sigmoid(gates[i - half]).to(x.dtype))
            x = self.blocks[layer](x, x0, cos, sin)
            if i < half:
                skips.append(x)
        return rms_norm(x)


def build_model(config: Config, runtime: Runtime) -> tuple[Model, nn.Module, str]:
    """(model, the same compiled where that works, what was chosen and why)."""
    attend, fused_loss, compiled, note = grouped_attention, None, runtime.device.type == "cuda", "no tools/kernels.py"
    if kernels := tool("kernels", "nothing tries which kernels are best", log=str):
        attend, fused_loss, compiled, note = kernels.choose(config, runtime)
    model = compiled_model = config.model_class()(config, attend, runtime.dtype).to(runtime.device)
    model.fused_loss = fused_loss
    if config.canonical:
        model.mask = tool("canonical").Mask(model, config, runtime)
    if compiled:  # DDP would cut the graph, where torch 2.8 corrupts the gradients of loops
        torch._dynamo.config.optimize_ddp = False
        options = kernels.COMPILE_OPTIONS.get(config.compile) if kernels else None
        compiled_model = torch.compile(model, dynamic=False, fullgraph=True, options=options)
    dtype = str(runtime.dtype).removeprefix("torch.")
    return model, compiled_model, f"device:{runtime.device} ({runtime.device_name()}) dtype:{dtype}\n{note}"


# ---------- Optimizer: the partition of the parameters, Adam for embeddings and vectors, Muon for matrices ------------
def parameter_groups(model: Model) -> dict[str, list[nn.Parameter]]:
    """Every parameter in exactly one of embed, head, matrix, scalar, as the model's table says."""
    groups = {"embed": [], "head": [], "matrix": [], "scalar": []}
    for name, p in model.named_parameters():
        groups[model.row(name).group].append(p)
    return groups


def newton_schulz(stack: Tensor, polynomials: list[tuple[float, float, float]]) -> Tensor:
    """Bring singular values s <= 1 of matrices [n, rows, cols] near 1, by a s + b s^3 + c s^5 in turn."""
    tall = stack.size(-2) > stack.size(-1)
    x = stack.mT if tall else stack
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then an orthogonalised update, for the matrices inside the blocks.

    m = mu * m + g;  u = g + mu * m (Nesterov);  p -= lr * sqrt(max(1, rows / cols)) * orthogonal(u)
    Before that, `row_norm` brings the rows of u to norm 1, `weight_decay` takes off lr * weight_decay * p.
    Rank r owns every world_size-th matrix and the momentum of no other; updates are summed."""

    QUINTIC = (3.4445, -4.7750, 2.0315)  # five of it give 0.7 to 1.2. Source: Keller Jordan, Muon

    def __init__(self, params, lr, momentum, steps, runtime, row_norm=False, weight_decay=0.0):
        defaults = dict(lr=lr, momentum=momentum, steps=steps, row_norm=row_norm, weight_decay=weight_decay)
        super().__init__(params, defaults)
        self.runtime = runtime
        assert all(p.ndim == 2 for p in self.param_groups[0]["params"]), "Muon is for matrices"

    def own(self, params: list[Tensor]) -> list[Tensor]:
        return params[self.runtime.rank :: self.runtime.world_size]

    def polynomials(self, steps: int) -> list[tuple[float, float, float]]:
        return [self.QUINTIC] * steps

    def orthogonal(self, u: Tensor, group: dict, dtype: torch.dtype) -> Tensor:
        """The scaled updates of a stack [n, rows, cols] in fp32, in `dtype`."""
        for dims in [2, (1, 2)] if group["row_norm"] else [(1, 2)]:
            u = u / u.norm(dim=dims, keepdim=True).clamp_min(1e-7)
        iterate, polynomials = self.runtime.newton_schulz or newton_schulz, self.polynomials(group["steps"])
        return iterate(u.to(dtype), polynomials) * max(1, u.size(1) / u.size(2)) ** 0.5

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, lr, mu = group["params"], group["lr"], group["momentum"]
            sizes, mine, dtype = [p.numel() for p in params], self.own(params), self.runtime.dtype
            flat = torch.zeros(sum(sizes), device=params[0].device, dtype=dtype)  # for one reduction
            updates = {p: u.view_as(p) for p, u in zip(params, flat.split(sizes), strict=True)}
            for shape in {p.shape for p in mine}:  # those of one shape in one batch: it is faster
                same = [p for p in mine if p.shape == shape]
                for p in same:
                    if p not in self.state:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                momenta = [self.state[p]["momentum_buffer"] for p in same]
                grads = [p.grad for p in same]
                torch._foreach_mul_(momenta, mu)
                torch._foreach_add_(momenta, grads)
                u = torch.stack(torch._foreach_add(grads, momenta, alpha=mu))
                torch._foreach_copy_([updates[p] for p in same], [*self.orthogonal(u, group, dtype)])
            if self.runtime.world_size > 1:
                dist.all_reduce(flat)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, [updates[p].to(p.dtype) for p in params], alpha=-lr)


def build_optimizers(model: Model, config: Config, runtime: Runtime) -> list[torch.optim.Optimizer]:
    """AdamW and Muon, each for the groups that the model has."""
    groups, decay, betas = parameter_groups(model), config.embed_weight_decay, (config.beta1, config.beta2)
    embed_lr = config.tied_embed_lr if config.tie_embeddings else config.embed_lr
    options = [
        {"params": groups["embed"], "lr": embed_lr, "weight_decay": decay},
        {"params": groups["head"], "lr": config.head_lr, "weight_decay": decay},
        {"params": groups["scalar"], "lr": config.scalar_lr, "weight_decay": config.scalar_weight_decay},
    ]
    options = [option for option in options if option["params"]]
    optimizers = [torch.optim.AdamW(options, betas=betas, eps=config.adam_eps, fused=True)]
    if groups["matrix"]:
        optimizers.append(
            Muon(
                groups["matrix"],
                config.matrix_lr,
                config.muon_momentum,
                config.muon_backend_steps,
                runtime,
                config.muon_row_norm,
                config.muon_weight_decay,
            )
        )
    return optimizers


# ---------- Schedule: pure functions of the step and of progress, the share of the run that is over -------------------
def progress_at(config: Config, step: int, elapsed: float) -> float:
    """By steps or by the training clock in seconds, whichever is further; in [0, 1]."""
    by_clock = elapsed / config.max_wallclock_seconds if config.max_wallclock_seconds else 0.0
    return min(max(step / config.iterations, by_clock), 1.0)


def lr_scale(config: Config, progress: float) -> float:
    """1, then on a line to 0 over the last WARMDOWN_FRAC of the run, but not below LR_FLOOR."""
    return min(1.0, max((1 - progress) / config.warmdown_frac, config.lr_floor)) if config.warmdown_frac else 1.0


def muon_momentum(config: Config, step: int) -> float:
    """Linear from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM."""
    steps = config.muon_momentum_warmup_steps
    share = min(step / steps, 1.0) if steps else 1.0
    return (1 - share) * config.muon_momentum_warmup_start + share * config.muon_momentum


# ---------- Evaluation: loss and bits per byte over the validation text, every target scored exactly once -------------
class Score:
    """From sums over scored targets; `label` marks a score of fewer than all, `of`."""

    def __init__(self, nats: float, tokens: int, bytes: int, of: int, seconds: float):
        self.tokens, self.bytes, self.of, self.seconds = tokens, bytes, of, seconds
        self.loss, self.bpb = nats / tokens, nats / math.log(2) / bytes
        self.label = f" partial:{tokens}/{of}" if tokens < of else ""


class Evaluator:
    """Windows of T inputs every S = EVAL_STRIDE tokens (0: T); target j is token j + 1. The first window
    scores all its targets, a later one its last S, and none what overhangs the end."""

    def __init__(self, stream: TokenStream, token_bytes: TokenBytes, config, runtime, accum_steps=1):
        self.stream, self.token_bytes, self.runtime, self.of = stream, token_bytes, runtime, len(stream) - 1
        self.targets = min(config.val_tokens_limit or self.of, self.of)
        self.length, rank, ranks = config.train_seq_len, runtime.rank, runtime.world_size
        self.stride = config.eval_stride or self.length
        windows = 1 + max(0, math.ceil((self.targets - self.length) / self.stride))
        self.windows = range(windows * rank // ranks, windows * (rank + 1) // ranks)
        per_rank = config.val_batch_size // (self.length * ranks * accum_steps)
        self.batch = max(1, min(per_rank, -(-windows // ranks)))

    def batch_at(self, index: int) -> tuple[Tensor, Tensor, Tensor, range]:
        """Inputs, targets, mask of the scored [batch, T] from window `index` on; the range of targets scored.

        With T = 4, S = 2 and 7 targets, windows of targets 0123, 2345 and 4567 score 0123, 45 and 6; two from
        window 1 read tokens 2 to 8, the last of them padding, and score range(4, 7). So is a rank's last
        batch padded to the shape of the others, since each shape is compiled."""
        T, S = self.length, self.stride
        begin, count = index * S, min(self.batch, self.windows.stop - index)
        stop = min(begin + (count - 1) * S + T, self.targets)
        scored = range(begin + T - S if index else 0, stop)
        tokens = np.zeros((self.batch - 1) * S + T + 1, np.uint16)
        tokens[: stop + 1 - begin] = self.stream.read(begin, stop + 1 - begin)
        rows = to_device(tokens, self.runtime.device).unfold(0, T + 1, S)
        target = torch.arange(begin, begin + len(tokens) - 1, device=rows.device).unfold(0, T, S)
        fresh = (target >= target[:, :1] + T - S) | (target[:, :1] == 0)
        mask = fresh & (target < stop)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), mask, scored

    @torch.no_grad()  # not inference_mode: tables cached in it would poison the next step
    def score(self, model, log=lambda line: None, interrupted=lambda: False, order=None) -> Score | None:
        """The Score over all ranks; None if one was interrupted. `order` gives the first windows of a
        rank's batches, and is asked for the next when one is scored: it may learn in between."""
        sums, count, weight = [], 0, 0
        begun = reported = time.perf_counter()
        model.eval()
        for index in self.windows[:: self.batch] if order is None else order:
            if interrupted():
                break
            inputs, targets, mask, scored = self.batch_at(index)
            sums.append(torch.where(mask, model(inputs, targets), 0.0).sum())  # still on the device
            count += len(scored)
            weight += self.token_bytes.weigh(self.stream.read(scored.start, len(scored) + 1))
            done = count * self.runtime.world_size / self.targets
            if time.perf_counter() - reported > 10 and done < 1:
                self.runtime.synchronize()
                reported = time.perf_counter()
                log(f"eval_progress:{done:.0%} eta:{(reported - begun) * (1 - done) / done:.0f}s")
        model.train()
        nats = sum(torch.stack(sums).tolist()) if sums else 0.0
        nats, count, weight, stop = self.runtime.sum([nats, count, weight, bool(interrupted())])
        if stop:
            return None
        require(count == self.targets, f"scored {count:.0f} of {self.targets} targets: a fault of the script")
        require(weight > 0, f"{self.stream.pattern}: targets of no bytes: raise VAL_TOKENS_LIMIT")
        require(math.isfinite(nats), f"the validation loss is {nats}, the run diverged: lower learning rates")
        return Score(nats, int(count), int(weight), self.of, time.perf_counter() - begun)


# ---------- Export: few bits with an fp16 scale per row, zlib, a checksum, the size, the way back ---------------------
INT8_FORMAT, RANS_FORMAT, INT8_CLIP_QUANTILE = "int8_clean_per_row_v1", "rans_per_row_v1", 0.9999984
INT8_MIN_NUMEL = 65_536  # tensors up to this many elements are kept as floats
TENSOR_CLASSES = ("attn", "mlp", "embed")  # each has a CLIP knob and a table of frequencies


def artifact_names(config: Config) -> tuple[str, str]:
    """(file, tag in log lines): final_model.int8.ptz and int8+zlib by default."""
    return f"final_model.{'rans' if config.codec == 'rans' else 'int8'}.ptz", f"int{config.weight_bits}+{config.codec}"


def quantize_rows(w: Tensor, qmax: int = 127, k: float = 0.0) -> tuple[Tensor, Tensor]:
    """int8 values up to qmax and fp16 scales [rows] of an fp32 matrix: clip / qmax, with a clip of k standard
    deviations of the row, or for k = 0 its percentile 99.99984 of magnitudes; 1 for a row of zeros. Rounding
    uses the scale as stored: within the clip it errs by at most half of it."""
    spread, mean = torch.std_mean(w, dim=1, correction=0)  # a row of one value has but a mean
    clip = torch.maximum(k * spread, mean.abs()) if k else torch.quantile(w.abs(), INT8_CLIP_QUANTILE, dim=1)
    scale = (clip / qmax).clamp(min=2.0**-24).where(clip > 0, 1.0).half()  # the least of fp16
    return (w / scale.float()[:, None]).round().clamp(-qmax, qmax).to(torch.int8), scale


def quantize(state: dict[str, Tensor], config: Config, hessians=None, multiplier=1.0) -> dict:
    """The public reference's int8 object, plus `config`, which explains it, and `source`, which names the
    class of a model that is not this script's. GPTQ rounds what is in `hessians`."""
    told = {name.lower(): getattr(config, name.lower()) for name in config.told_knobs()}
    artifact = {"__quant_format__": INT8_FORMAT, "config": told} | model_source(config)
    parts = ("quantized", "scales", "dtypes", "passthrough", "qmeta", "passthrough_orig_dtypes")
    quantized, scales, dtypes, kept, qmeta, kept_dtypes = (artifact.setdefault(part, {}) for part in parts)
    for name, tensor in state.items():
        tensor, dtype = tensor.detach().cpu().contiguous(), str(tensor.dtype).removeprefix("torch.")
        row = config.model_class().row(name) if tensor.is_floating_point() else None
        require(
            not row or (tensor.abs() <= 65504).all(),
            f"{name} holds non-finite values, or some beyond "
            "fp16: the run diverged, no artifact was made: lower the learning rates",
        )
        if row and tensor.numel() > INT8_MIN_NUMEL:
            matrix = tensor.float() if tensor.ndim == 2 else tensor.float().view(1, -1)
            qmax, clip = 2 ** (getattr(config, row.bits) - 1) - 1, getattr(config, f"clip_{row.clip}")
            q, scale = quantize_rows(matrix, qmax, multiplier * clip)
            if hessians and name in hessians:
                q = tool("compress").gptq_round(matrix, scale, hessians[name], qmax).cpu()
            quantized[name], dtypes[name], scales[name] = q.view_as(tensor), dtype, scale[0]
            if tensor.ndim == 2:
                scales[name], qmeta[name] = scale, {"scheme": "per_row", "axis": 0}
        elif row and not (row.fp32 and config.codec == "zlib"):
            kept[name], kept_dtypes[name] = tensor.half(), dtype
        else:  # too small for its bytes to count; or a counter of a model of one's own
            kept[name] = tensor
    return artifact


def dequantize(artifact: dict, config: Config) -> dict[str, Tensor]:
    """The state dict that an object of either format stands for, each tensor in its own type."""
    if artifact["__quant_format__"] == RANS_FORMAT:
        artifact = tool("compress").rans_unpack(artifact, config)
    state = {}
    for name, q in artifact["quantized"].items():
        scale = artifact["scales"][name].float().view(-1, *[1] * (q.ndim - 1))  # one per row, or one in all
        state[name] = q.float().mul_(scale).to(getattr(torch, artifact["dtypes"][name]))
    original = artifact.get("passthrough_orig_dtypes", {})
    for name, tensor in artifact["passthrough"].items():
        state[name] = tensor.to(getattr(torch, original[name])) if original.get(name) else tensor
    return state


def torch_bytes(value) -> bytes:
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def encode(state: dict[str, Tensor], config: Config, hessians=None, multiplier=1.0) -> tuple[dict, bytes, int]:
    """(object; file: a zlib stream and its sha256, which others' readers skip; bytes before zlib)."""
    artifact = quantize(state, config, hessians, multiplier)
    artifact = tool("compress").rans_pack(artifact, config) if config.codec == "rans" else artifact
    raw = torch_bytes(artifact)
    stream = zlib.compress(raw, level=9)
    return artifact, stream + hashlib.sha256(stream).digest(), len(raw)


def unpack(blob: bytes) -> dict:
    """The object in a file of this script; tools/evaluate.py reads what others made."""
    require(hashlib.sha256(blob[:-32]).digest() == blob[-32:], "the artifact and its checksum differ: check the disk")
    return torch.load(io.BytesIO(zlib.decompress(blob[:-32])), map_location="cpu", weights_only=True)


def export(state: dict[str, Tensor], config: Config, folder: RunFolder, code_bytes: int, hessians=None) -> dict:
    """Write final_model.pt and the artifact; log the sizes and return them for result.json."""
    raw, limit, (name, tag) = torch_bytes(state), config.size_limit, artifact_names(config)
    folder.write("final_model.pt", raw)  # first: whatever fails from here on, the weights are there
    fitted = config.fit_size and tool("compress").fit_artifact(state, config, code_bytes, hessians)
    multiplier, artifact, blob, packed = fitted or (1.0, *encode(state, config, hessians))
    folder.write(name, blob)
    payload = sum(t.nbytes for t in torch.utils._pytree.tree_leaves(artifact) if isinstance(t, Tensor))
    ratio, total = sum(t.nbytes for t in state.values()) / payload, len(blob) + code_bytes
    verdict = "OK" if total <= limit else "TOO LARGE, NOT A VALID SUBMISSION"
    clips = f" clip_multiplier:{multiplier:.4f}" * config.fit_size
    folder.log(
        f"Serialized model: {len(raw)} bytes\nCode size: {code_bytes} bytes\n"
        f"Total submission size: {len(raw) + code_bytes} bytes\nSerialized model {tag}: {len(blob)} bytes "
        f"(payload:{payload} raw_torch:{packed} payload_ratio:{ratio:.2f}x)\nTotal submission size {tag}: "
        f"{total} bytes\nsize_verdict:{verdict} limit:{limit} spare:{limit - total}{clips}"
    )
    return {
        "bytes_model": len(raw),
        "bytes_artifact": len(blob),
        "bytes_code": code_bytes,
        "bytes_total": total,
        "bytes_limit": limit,
        "sha256_artifact": hashlib.sha256(blob).hexdigest(),
        "clip_multiplier": multiplier,
    }


# ---------- Training: one step function for the warm-up and for the run, the pace that the clock sets, the loop -------
class Hooks:
    """What a run calls, and when. These do nothing; those of tools/checkpoint.py make checkpoints, resume, listen to
    signals and fit the micro-batch to the memory."""

    stop_signal = 0  # the number of a signal that asks the run to save and end
    resumed_at: tuple[int, ...] = ()  # the steps at which the run went on

    def __init__(self, config: Config, folder: RunFolder):
        self.config, self.folder = config, folder

    def choose_folder(self, stream: TokenStream, sources: dict[str, bytes]):
        """Before the model is built: a checkpoint is looked for, and checked to be of this run."""
        self.folder.locate(self.config)
        require(
            self.config.resume in ("auto", "never") and not self.folder.path.exists(),
            "no run goes on without "
            f"tools/checkpoint.py: unset RESUME, and give a RUN_ID whose folder {self.folder.path} is not there",
        )

    def before_warm_up(self, trainer: "Trainer"):
        """All is as for a new run: here a checkpoint is put into it."""

    def training(self, begins: bool):
        """From here on, or no longer, a signal waits for the end of a step."""

    def wants_checkpoint(self, trainer: "Trainer") -> bool:
        return False  # asked before every step on every rank, and one that wants it suffices

    def save(self, trainer: "Trainer", wait: bool):
        """Between two steps, on every rank; `wait` until it is on the disk."""


class Trainer:
    """Model, optimizers and data of one run, and the loop over them."""

    def __init__(self, config: Config, runtime: Runtime, folder, watch: Stopwatch, loader: TrainLoader, hooks: Hooks):
        self.config, self.runtime, self.folder = config, runtime, folder
        self.watch, self.loader, self.hooks = watch, loader, hooks
        # The model; the same compiled, which scores; and that under DDP, which trains. They share their weights.
        self.model, self.compiled_model, self.note = build_model(config, runtime)
        self.train_model, self.optimizers = self.compiled_model, self.model.optimizers(config, runtime)
        torch.manual_seed(config.seed + runtime.rank)  # of what a model draws while it trains, such as dropout
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["base_lr"] = group["lr"]  # which the schedule scales
        if runtime.world_size > 1:  # all ranks have the same tables: no buffers are sent around
            new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # torch 2.13
            name = "forward_sync_buffers" if new else "broadcast_buffers"
            options = {name: False, "gradient_as_bucket_view": True}  # not copied back from the reduction
            self.train_model = DistributedDataParallel(self.compiled_model, **options)
        self.average = [p.detach().float().clone() for p in self.model.parameters() if config.ema_decay]
        self.calibration = -(-config.gptq_batches // runtime.world_size)  # micro-batches of this rank for GPTQ
        self.reserve, self.hessians = 0.0, {}  # seconds of the clock that are kept for them; what they give
        # All steps are done, and the last checkpoint; the weights are no longer those of training.
        self.steps, self.finished, self.exporting = 0, False, False
        self.grad_norm = torch.zeros((), device=runtime.device)  # of the last step, with GRAD_CLIP_NORM
        # Losses on their way to the host, seconds of the last steps, the training clock when the last of them ended.
        self.pending, self.recent, self.settled_at = deque(), deque(maxlen=20), 0.0

    def step(self, scale: float, momentum: float) -> Tensor:
        """One optimizer step; returns the mean loss of this rank's micro-steps, still on the device."""
        inputs, targets = self.loader.next_step()
        losses = torch.zeros(len(inputs), device=inputs.device)
        for micro, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            # DDP reduces the gradients in every backward, unless told that more are to be added: once is enough.
            more = micro + 1 < len(inputs) and self.runtime.world_size > 1
            with self.train_model.no_sync() if more else contextlib.nullcontext():
                output = self.train_model(x, y)
                token_losses, *extra = output if isinstance(output, tuple) else (output,)
                loss = token_losses.mean() / len(inputs)
                sum((term / len(inputs) for term in extra), loss).backward()
            losses[micro] = loss.detach()
        if self.config.grad_clip_norm:
            self.grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
                if isinstance(optimizer, Muon):
                    group["momentum"] = momentum
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return losses.sum()

    @torch.no_grad()
    def update_average(self):
        """EMA in fp32; short runs forget their first steps sooner: decay min(EMA_DECAY, (t + 1) / (t + 10))."""
        decay = min(self.config.ema_decay, (self.steps + 1) / (self.steps + 10))
        torch._foreach_lerp_(self.average, [p.float() for p in self.model.parameters()], 1 - decay)

    @torch.no_grad()
    def finish_weights(self):
        """Bring the weights EMA_SHARE of the way to the average, if there is one; calibrate, if GPTQ is to round."""
        self.exporting = True
        for p, average in zip(self.model.parameters(), self.average, strict=False):
            p.copy_(torch.lerp(p.float(), average, self.config.ema_share))
        if self.calibration:
            collect = tool("compress").collect_hessians
            self.hessians = collect(self.model, self.loader, self.calibration, self.runtime)

    def warm_up(self, evaluator: Evaluator):
        """Compile every path with real steps, then put weights, optimizers, RNG and data back exactly as they were."""
        parts, position = [self.model, *self.optimizers], self.loader.position
        total = 0 if self.finished else self.config.warmup_steps
        before = copy.deepcopy([part.state_dict() for part in parts]) if total else []
        with torch.random.fork_rng([self.runtime.device] if self.runtime.device.type == "cuda" else []):
            for start in self.model.graph_starts:
                self.model.advance(start)
                for step in range(1, total + 1):
                    began = self.watch.elapsed("compile")
                    self.step(1.0, self.config.muon_momentum)
                    self.runtime.synchronize()
                    self.folder.log(f"warmup_step:{step}/{total}{' looping' * self.model.looping}")
                    if step == total > 1:  # the first step compiles; the last tells how long one takes
                        self.recent.append(self.watch.elapsed("compile") - began)
                with torch.no_grad():  # as a validation does it
                    self.compiled_model.eval()(*evaluator.batch_at(evaluator.windows.start)[:2])
                self.compiled_model.train()
            if self.calibration:
                self.reserve = tool("compress").calibration_seconds(self)
        for part, state in zip(parts, before, strict=False):
            part.load_state_dict(state)
        self.loader.seek(position)

    def plan(self) -> tuple[float, bool, bool, bool]:
        """(learning-rate scale, whether to stop before one more step, to save, to leave): rank 0's decision, and any
        rank's signals. The next step, if it takes as long as the slowest of the last 20, must end before the limit."""
        config, runtime, elapsed = self.config, self.runtime, self.watch.elapsed("training")
        limit, progress = config.max_wallclock_seconds, progress_at(config, self.steps, elapsed + self.reserve)
        end = elapsed + (1 + len(self.pending)) * max(self.recent, default=0.0) + self.reserve
        stop = self.finished or self.steps >= config.iterations or bool(limit and end >= limit)
        decision = [self.model.lr_scale(config, self.steps, progress), stop, stop or progress]
        signals = [not stop and self.hooks.wants_checkpoint(self), bool(self.hooks.stop_signal)]
        scale, stop, progress, save, leave = runtime.sum([*(decision if runtime.is_master else [0.0] * 3), *signals])
        self.model.advance(progress)
        return scale, bool(stop), bool(save), bool(leave)

    def settle(self, keep: int):
        """Log the steps that are done, all but the last `keep` dispatched: their losses arrive while those run."""
        config = self.config
        while len(self.pending) > keep:
            step, scale, told, event = self.pending.popleft()
            (event or self.runtime).synchronize()
            (loss, norm), clock = told.tolist(), self.watch.elapsed("training")
            self.recent.append(clock - self.settled_at)
            self.settled_at = clock
            require(
                math.isfinite(loss),
                f"step {step}: the loss is {loss}: nothing was exported: lower MATRIX_LR, "
                "TIED_EMBED_LR and SCALAR_LR, or set GRAD_CLIP_NORM",
            )
            if config.train_log_every and (step <= 10 or step % config.train_log_every == 0):
                line = f"step:{step}/{config.iterations} train_loss:{loss:.4f} {times(step, clock)}"
                self.folder.log(f"{line} {self.speed()}{f' grad_norm:{norm:.4f}' * bool(config.grad_clip_norm)}")
            numbers = {"step": step, "train_loss": loss, "lr_scale": scale, "train_seconds": round(clock, 4)}
            numbers |= {"grad_norm": norm} if config.grad_clip_norm else {}
            self.folder.append("metrics.jsonl", json.dumps(numbers))

    def speed(self) -> str:
        """Over the last steps: tokens per second of all ranks, and what share of their devices' FLOP/s that takes."""
        speed = self.config.train_batch_tokens / max(statistics.fmean(self.recent), 1e-9)
        kernels = tool("kernels", "the share of the peak is not told", log=str)
        share = kernels.share_of_peak(self.model, self.config, self.runtime, speed) if kernels else None
        return f"tok/s:{speed:.0f}" + (f" mfu:{share:.1%}" if share else "")

    def validate(self, evaluator: Evaluator) -> Score | None:
        """The Score, logged, while the training clock stands still; None if a signal came in between."""
        self.settle(keep=0)
        self.watch.switch("evaluation")
        score = evaluator.score(self.compiled_model, self.folder.log, lambda: self.hooks.stop_signal)
        self.watch.switch("training")
        self.settled_at = clock = self.watch.elapsed("training")
        if score:
            self.folder.log(
                f"step:{self.steps}/{self.config.iterations} val_loss:{score.loss:.4f} "
                f"val_bpb:{score.bpb:.4f} {times(self.steps, clock)}{score.label}"
            )
            numbers = {"val_loss": score.loss, "val_bpb": score.bpb, "partial": bool(score.label)}
            self.folder.append("metrics.jsonl", json.dumps({"step": self.steps, **numbers}))
        return score

    def stop(self):
        """After the last step: a checkpoint, for what is killed from here on; then the weights to export."""
        if not self.finished:
            self.settle(keep=0)
            self.watch.switch("export")
            self.finished = True
            self.hooks.save(self, wait=True)
            self.watch.switch("training")
        if not self.exporting:
            self.finish_weights()

    def train(self, evaluator: Evaluator) -> Score:
        """Plan, save, validate, step, log, until ITERATIONS or the clock. The last validation."""
        config, runtime, cuda = self.config, self.runtime, self.runtime.device.type == "cuda"
        while True:
            scale, stop, save, leave = self.plan()
            if save or leave:
                self.hooks.save(self, wait=leave)
                if leave:
                    raise KeyboardInterrupt(self.hooks.stop_signal)
                continue  # the pause may have used up the clock
            if stop:
                self.stop()
            due = config.val_loss_every and self.steps % config.val_loss_every == 0
            if stop or (due and (self.steps or config.val_at_start)):
                score = self.validate(evaluator)
                if not score:
                    continue
            if stop:
                if self.steps < config.iterations:
                    time_and_step = f"train_time:{1000 * self.settled_at:.0f}ms step:{self.steps}/{config.iterations}"
                    self.folder.log(f"stopping_early: wallclock_cap {time_and_step}")
                return score
            loss, event = self.step(scale, muon_momentum(config, self.steps)), None
            if self.average:
                self.update_average()
            self.steps += 1
            if runtime.world_size > 1:
                dist.all_reduce(loss)
            told = torch.stack([loss / runtime.world_size, self.grad_norm])
            if cuda:  # to the host, without waiting for it
                told, event = torch.empty(2, pin_memory=True).copy_(told, non_blocking=True), torch.cuda.Event()
                event.record()
            self.pending.append((self.steps, scale, told, event))
            self.settle(keep=1 if cuda else 0)  # a GPU may have one more step queued


def times(step: int, clock: float) -> str:
    return f"train_time:{1000 * clock:.0f}ms step_avg:{1000 * clock / max(step, 1):.2f}ms"


# ---------- Modes: training, from the checks to result.json; every other mode is a tool -------------------------------
def tool(name: str, without: str = "", log=print):
    """The module tools/NAME.py beside this script, by its path: no package of that name can take its place. Where it
    is missing: an error, or None and a line that says what is missed `without` it."""
    here, key = Path(__file__).resolve().parent, f"train_gpt.tools.{name}"
    beside = name in ("compress", "tokenizers", "canonical") and not (here / "tools").exists()
    path = (here if beside else here / "tools") / f"{name}.py"  # beside: in a run folder
    if key not in sys.modules and path.is_file():
        spec = importlib.util.spec_from_file_location(key, path)
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    require(key in sys.modules or without, f"{path} is not there: take it from the repository")
    key in sys.modules or log(f"warning: tools/{name}.py is not beside the script: {without}")
    return sys.modules.get(key)


def source_paths(config: Config) -> dict[str, Path]:
    """{name in the run folder: path} of what shapes a run: this script; a tool that makes the artifact,
    weighs bytes or scores; of a model in its own file that, and what it imports beside it."""
    compress = config.gptq_batches or config.fit_size or config.codec == "rans"
    asked = {
        "compress": compress,
        "canonical": config.canonical,
        "tokenizers": NAMED_TOKENIZER.fullmatch(config.tokenizer_path),
    }
    script, paths = Path(__file__).resolve(), {f"{k}.py": Path(tool(k).__file__) for k in asked if asked[k]}
    for cls in (type(config), config.model_class()):
        if cls.__module__ != __name__:
            folder = Path(inspect.getfile(cls)).resolve().parent
            files = [
                Path(module.__file__).resolve()
                for module in list(sys.modules.values())
                if getattr(module, "__file__", None)
            ]
            paths |= {path.name: path for path in files if path.parent == folder and path != script}
    return {"train_gpt.py": script} | paths


def model_source(config: Config) -> dict:
    """For an artifact: where the Config is that names the model, unless both are this script's."""
    if type(config) is Config:
        return {}
    path, here = Path(inspect.getfile(type(config))).resolve(), Path(__file__).resolve().parent
    name = path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name
    return {"source": {"file": name, "config_class": type(config).__name__}}


def open_text(config: Config, folder: RunFolder) -> tuple[TokenStream, TokenBytes, dict]:
    """(validation text, what its tokens weigh, what the audit found: nothing on ranks but 0)."""
    stream = TokenStream(config.data_path, "val", config.vocab_size)
    require(len(stream) > 1, f"{stream.pattern} holds {len(stream)} tokens: 2 are needed to score one")
    token_bytes = TokenBytes(config.tokenizer_path, config.vocab_size, config.vocab_padding)
    require(
        not config.smear_gate or token_bytes.start in (config.start_token, -1),
        f"START_TOKEN={config.start_token}, but documents begin with token {token_bytes.start}: set that",
    )
    folder.log(f"val_loader:shards pattern={stream.pattern} tokens:{len(stream) - 1}")
    if config.canonical and folder.runtime.is_master:
        folder.log(tool("canonical").check_text(config, stream))
    line, facts = audit(token_bytes, stream, config.data_path) if folder.runtime.is_master else ("", {})
    folder.log(line)
    return stream, token_bytes, facts


def log_final(label: str, score: Score, folder: RunFolder):
    folder.log(
        f"{label} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} eval_time:{1000 * score.seconds:.0f}ms"
        f"{score.label}\n{label}_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f} "
        f"tokens:{score.tokens} bytes:{score.bytes}{score.label}"
    )


def prepare(config: Config, folder: RunFolder, sources: dict[str, bytes], watch: Stopwatch):
    """(trainer, new or resumed, and what open_text returns), after all that the user brought has been checked."""
    runtime, defaults = folder.runtime, type(config)().texts()
    knobs = [f"{' ' if text == defaults.get(name) else '*'} {name}={text}" for name, text in config.texts().items()]
    check = tool("check", "nothing finds knobs that contradict each other or are misspelt", folder.log)
    folder.log("\n".join([*knobs, *(check.typo_warnings(os.environ, config.knobs()) if check else [])]))
    accum_steps = config.accumulation_steps(runtime.world_size, runtime.device.type)
    stream = TokenStream(config.data_path, "train", config.vocab_size)
    folder.log(f"train_loader:shards pattern={stream.pattern} tokens:{len(stream)}")
    stream.read(0, len(stream.shards[0]) if runtime.is_master else 1)  # checks tokens; of later shards when read
    keeper = tool("checkpoint", "no checkpoints, no resuming, no fitting of micro-batches to the memory", folder.log)
    hooks = keeper.Checkpoints(config, folder) if keeper else Hooks(config, folder)
    hooks.choose_folder(stream, sources)
    text = open_text(config, folder)
    watch.switch("compile")
    trainer = Trainer(config, runtime, folder, watch, TrainLoader(stream, config, runtime, accum_steps), hooks)
    hooks.before_warm_up(trainer)
    folder.create(config, sources)
    return trainer, *text


def train(config: Config, folder: RunFolder, argv: list[str]):
    """MODE=train: one run, from the checks to result.json."""
    runtime, watch = folder.runtime, Stopwatch(folder.runtime.synchronize)
    sources = {name: path.read_bytes() for name, path in source_paths(config).items()}
    trainer, val_stream, token_bytes, facts = prepare(config, folder, sources, watch)
    params, accum_steps = sum(p.numel() for p in trainer.model.parameters()), trainer.loader.accum_steps
    folder.log(
        f"{trainer.note}\nmodel_params:{params}\nseed:{config.seed}\nrun_folder:{folder.path}\n"
        f"world_size:{runtime.world_size} grad_accum_steps:{accum_steps}"
    )
    evaluator = Evaluator(val_stream, token_bytes, config, runtime, accum_steps)
    trainer.warm_up(evaluator)
    watch.switch("training")
    startup, compiling = (1000 * watch.seconds[phase] for phase in ("startup", "compile"))
    folder.log(f"start_to_first_step:{startup + compiling:.0f}ms compile:{compiling:.0f}ms")
    trainer.hooks.training(True)
    before = trainer.train(evaluator)
    trainer.hooks.training(False)
    watch.switch("export")
    limit, over = config.max_wallclock_seconds, watch.seconds["training"] - config.max_wallclock_seconds
    if limit and over > 0:
        folder.log(f"clock_verdict:{over:.3f}s OVER MAX_WALLCLOCK_SECONDS={limit}, NOT A VALID SUBMISSION")
    if runtime.device.type == "cuda":
        folder.log(
            f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB "
            f"reserved: {torch.cuda.max_memory_reserved() >> 20} MiB"
        )
    state, (name, tag), artifact = trainer.model.state_dict(), artifact_names(config), None
    if runtime.is_master:
        facts |= export(state, trainer.config, folder, sum(map(len, sources.values())), trainer.hessians)
        artifact = (folder.path / name).read_bytes()
    # Rank 0 reads the file back and the others get its bytes: hosts need no common disk to score the artifact.
    trainer.model.load_state_dict(dequantize(unpack(runtime.share(artifact)), config))
    watch.switch("evaluation")
    after = trainer.model.final_score(evaluator, trainer.compiled_model, folder.log)
    watch.switch("export")
    log_final(f"final_{tag.replace('+', '_')}_roundtrip", after, folder)
    if runtime.is_master:
        write_result(trainer, before, after, sources, facts | {"sha256_tokenizer": token_bytes.sha256})
    if config.sample_prompt and runtime.is_master and (sample := tool("sample", "no sample", folder.log)):
        folder.log("".join(["sample: ", *sample.generate(trainer.model.eval(), config, token_bytes)]))


def write_result(trainer: Trainer, before: Score, after: Score, sources: dict[str, bytes], facts: dict):
    """result.json of a finished run: the Scores of the weights and of the artifact, time, machine, sources, `facts`."""
    config, runtime, folder, watch = trainer.config, trainer.runtime, trainer.folder, trainer.watch
    require(
        after.label or after.bytes == facts["val_bytes"],
        f"scored {after.bytes} bytes, but the text has {facts['val_bytes']}: a fault of this script",
    )
    limit, trained = config.max_wallclock_seconds, watch.seconds["training"]
    hashes = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in sources.items()}
    result = {
        "run_id": folder.run_id,
        "seed": config.seed,
        "steps": trainer.steps,
        "model_params": sum(p.numel() for p in trainer.model.parameters()),
        "val_loss": after.loss,
        "val_bpb": after.bpb,
        "pre_quant_val_loss": before.loss,
        "pre_quant_val_bpb": before.bpb,
        "partial": bool(after.label),
        "scored_tokens": after.tokens,
        "scored_bytes": after.bytes,
        "val_tokens": after.of,
        "eval_stride": config.eval_stride,
        "eval_seconds": round(after.seconds, 3),
        "train_tokens": trainer.steps * config.train_batch_tokens,
        "over_clock": bool(limit and trained > limit),
        "seconds": {phase: round(seconds, 3) for phase, seconds in watch.seconds.items()},
        "step_avg_ms": 1000 * trained / max(trainer.steps, 1),
        "world_size": runtime.world_size,
        "resumed_at": trainer.hooks.resumed_at,
        "grad_accum_steps": trainer.loader.accum_steps,
        "device": runtime.device_name(),
        "dtype": str(runtime.dtype),
        "note": trainer.note,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "sha256_code": hashes["train_gpt.py"]["sha256"],
        "sources": hashes,
        **facts,
    }
    folder.write("result.json", (json.dumps(result, indent=1) + "\n").encode())


# ---------- main: wiring only -----------------------------------------------------------------------------------------
def main(argv: list[str] | None = None, config_class: type[Config] = Config) -> int:
    """The exit code. A model file hands over its own Config, which names its model: all else is this script's."""
    argv, folder, code = sys.argv[1:] if argv is None else argv, None, 0
    with contextlib.suppress(AttributeError):  # of what stands in for a terminal
        sys.stdout.reconfigure(errors="replace")  # letters that it lacks must not end the run
    try:
        if argv in (["-h"], ["--help"]):
            return tool("check").explain(config_class)
        config = config_class.load(argv, os.environ)
        folder = RunFolder(Runtime(config, os.environ))
        mode = train if config.mode == "train" else tool({"eval": "evaluate"}.get(config.mode, config.mode)).main
        code = mode(config, folder, argv) or 0
        folder.close()
    except (UserError, OSError, RuntimeError, KeyboardInterrupt) as error:
        message, code = f"error: {error}", 2
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            if not (folder and folder.runtime.world_size > 1):
                raise
            traceback.print_exc()  # and end at once: other ranks may wait for this one
            message, code = f"stopped by {error!r:.120}", 1
        elif isinstance(error, RuntimeError):
            message = f"error: {error!r:.120}: lower VAL_BATCH_SIZE, TRAIN_SEQ_LEN or the size of the model"
        if isinstance(error, KeyboardInterrupt):
            number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
            message, code = f"stopped by {number.name}", 128 + number
            message += f": RUN_ID={folder.run_id} goes on with it" if folder and folder.file and folder.header else ""
        print(message, file=sys.stderr, flush=True)
        if folder:
            folder.close(message)
    if folder and folder.runtime.world_size > 1:  # a tidy end waits for ranks that wait, and gloo may abort it
        sys.stdout.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.modules["train_gpt"] = sys.modules["__main__"]  # for the tools, whatever its name
    sys.exit(main())
