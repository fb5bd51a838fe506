"""Train a small GPT as well as possible under a hard budget: 16,000,000 bytes, 600 seconds, scored in bits per byte.

    python train_gpt.py                                      one process on whatever this machine has
    python train_gpt.py records/recipes/demo_cpu.env         a configuration file of KEY=VALUE lines
    SEED=1338 MATRIX_LR=0.03 python train_gpt.py             every knob is an environment variable, which wins
    torchrun --standalone --nproc_per_node=8 train_gpt.py    eight GPUs; any number of ranks and nodes works
    MODE=check python train_gpt.py                           what a run would do and need; eval and sample: README.md
    python train_gpt.py --help                               every knob with its default and meaning

Dimensions in comments and suffixes: B batch, T time, D model, H query heads, K key-value heads, d head, V vocabulary.
"""

import contextlib
import copy
import dataclasses
import datetime
import difflib
import functools
import hashlib
import importlib.util
import inspect
import io
import itertools
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
NO_DATA_HINT = """two commands bring some data and train on it:
  python data/prepare_shakespeare.py\n  python train_gpt.py records/recipes/demo_cpu.env"""

class UserError(ValueError):
    """A mistake that the user can mend: shown as a message without a traceback, exit code 2."""

def require(ok, message: str):
    if not ok:
        raise UserError(message)

# ---------- Config: every knob with its default, meaning and unit; where values come from; what may be combined -------
def knob(default, meaning: str, low=None, high=None, choices=(), free=False, arch=False):
    """Bounds are inclusive. What is not `free` stays the same at a resume; an artifact tells its `arch`itecture."""
    high = 2**32 if type(default) is int and high is None else high  # more of anything would hang
    metadata = {"meaning": meaning, "allowed": (low, high, choices), "free": free, "arch": arch}
    return dataclasses.field(default=default, metadata=metadata)

free, arch = functools.partial(knob, free=True), functools.partial(knob, arch=True)
CONTROL = r"\x00-\x1f\x7f-\x9f\u2028\u2029"  # characters that a line of a file cannot hold

@dataclasses.dataclass(frozen=True)
class Config:
    """A field's name in capitals is its environment variable. A model file subclasses this for more knobs."""

    # What this call does, where it reads and writes
    mode: str = free("train", "what this call does", choices=("train", "check", "eval", "sample"))
    data_path: str = free("./data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_NNNNNN.bin")
    tokenizer_path: str = free("./data/tokenizers/fineweb_1024_bpe.model", "a .model, a tiktoken name, or bytes")
    log_dir: str = free("./logs", "folder of the run folders")
    run_id: str = free("", "name of the run folder; empty: a time stamp")
    seed: int = knob(1337, "seed of the initial weights, and of a sample", 0, 2**63 - 1)
    # Checkpoints
    checkpoint_every_seconds: float = free(-1.0, "between checkpoints; 0: one at the end; -1: 60 or 0", -1)
    resume: str = free("auto", "auto: go on in a run folder that exists; never; or the PATH of a checkpoint")
    resume_force: bool = free(False, "resume although knobs that shape the result differ")
    # Machine
    device: str = free("auto", "device of every rank", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = knob("auto", "of activations and products", choices=("auto", "bfloat16", "float32"))
    compile: str = free("auto", "torch.compile; auto: where a compiler works", choices=("auto", "0", "1"))
    attention: str = free("auto", "attention backend; blocked is our own, by plain products",
                          choices=("auto", "flash3", "cudnn", "flash", "efficient", "math", "blocked"))
    target_world_size: int = free(0, "MODE=check for so many GPUs; 0: for the ranks there are", 0)
    # Length of a run, and its steps. WARMUP_STEPS only compile: the learning rate has no warm-up.
    iterations: int = knob(20_000, "optimizer steps at most", 1)
    max_wallclock_seconds: float = knob(600.0, "training clock in seconds, without validation; 0: none", 0)
    warmup_steps: int = free(20, "steps that compile everything; all state is restored after them", 0)
    loader: str = knob("stream", "order of the training sequences", choices=("stream", "shuffle"))
    train_batch_tokens: int = knob(393_216, "tokens per step, over all ranks and micro-steps", 1)
    train_seq_len: int = arch(4096, "tokens per sequence, in training and in evaluation", 1)
    grad_accum_steps: int = free(0, "micro-steps per step; 0: at least 8 / ranks on GPUs, 1 on CPUs", 0)
    micro_batch_tokens: str = free("auto", "tokens per micro-step and rank at most; auto: what fits")
    # Logging and validation
    train_log_every: int = free(200, "steps between training log lines, after the first ten; 0: none", 0)
    val_loss_every: int = free(1000, "steps between validations; 0: only at the end", 0)
    val_at_start: bool = free(True, "validate before the first step, unless VAL_LOSS_EVERY is 0")
    val_batch_size: int = free(524_288, "tokens per validation batch, over all ranks and micro-steps", 1)
    val_tokens_limit: int = free(0, "score only the first N targets, labelled partial; 0: all", 0)
    eval_stride: int = free(0, "targets scored per sliding window; 0: disjoint windows", 0)
    # MODE=eval and MODE=sample
    artifact: str = free("", "the model of MODE=eval and MODE=sample: a final_model.int8.ptz or a .pt")
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
    xsa_layers: int = arch(0, "in the last n blocks attention leaves out each token's own value (XSA)", 0)
    attn_gate: bool = arch(False, "a gate on what each attention head gives")
    x0_mix: bool = arch(True, "every block mixes its input with the embedding, by learned vectors")
    ln_scale: bool = arch(False, "what a block's norms give is divided by the root of its number, from 1")
    gated_skips: bool = arch(False, "learned gates between the stream and the U-net's skips")
    parallel_from: int = arch(-1, "from this block, from 0, attention and MLP read the same; -1: none", -1)
    smear_gate: bool = arch(False, "a gate lets each embedding take some of the one before it")
    start_token: int = arch(1, "id that begins a document, where SMEAR_GATE=1 takes nothing", 0)
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
    muon_row_norm: bool = knob(False, "rows of Muon's update get norm 1 before it is orthogonalised")
    muon_weight_decay: float = knob(0.0, "a step takes this times the rate off the matrices", 0)
    embed_weight_decay: float = knob(0.0, "AdamW's decay of embedding and output projection", 0)
    scalar_weight_decay: float = knob(0.0, "AdamW's decay of vectors, scales and gains", 0)
    grad_clip_norm: float = knob(0.0, "most global gradient norm, after reduction; 0: off", 0)
    # Schedule, and the average of the weights
    warmdown_frac: float = knob(0.3526, "share of the run over which the rates fall linearly to 0", 0, 1)
    lr_floor: float = knob(0.0, "least share of the rates in the warmdown; wants EMA_DECAY", 0, 1)
    ema_decay: float = knob(0.0, "of the average of the weights that is exported; 0: no average", 0, 1)
    # Export
    codec: str = knob("zlib", "last stage of the artifact; rans is smaller", choices=("zlib", "rans"))
    weight_bits: int = knob(8, "bits of the matrices of the blocks and of an untied output projection", 2, 8)
    embed_bits: int = knob(8, "bits of the embedding", 2, 8)
    clip_attn: float = knob(0.0, "clip of attention rows in standard deviations; 0: a high percentile", 0)
    clip_mlp: float = knob(0.0, "the same for the matrices of the MLPs", 0)
    clip_embed: float = knob(0.0, "the same for the embedding and an untied output projection", 0)
    gptq_batches: int = knob(0, "batches of training text that calibrate GPTQ; 0: plain rounding", 0)
    fit_size: bool = knob(False, "scale all clips by one factor so that the file lands just under SIZE_LIMIT")
    size_limit: int = knob(16_000_000, "bytes of code plus artifact, decimal", 1)

    vocab_padding = 127  # ids at most that only fill the vocabulary up, to a multiple of 128 or less

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
        return [*arch, "EVAL_STRIDE", "VAL_BATCH_SIZE", "TRAIN_BATCH_TOKENS", "GRAD_ACCUM_STEPS",
                "MICRO_BATCH_TOKENS", "CODEC", "WEIGHT_BITS"]

    @classmethod
    def load(cls, argv: list[str], environ, from_artifact: dict[str, str] | None = None) -> "Config":
        """Defaults < what an artifact tells < KEY=VALUE lines of the one file in argv < environment."""
        require(len(argv) <= 1, f"arguments {argv}: expected at most one FILE.env; knobs are environment variables")
        knobs, texts = cls.knobs(), read_env_file(Path(argv[0])) if argv else {}
        for name in texts.keys() - knobs.keys():
            close = difflib.get_close_matches(name.upper(), knobs, 1)
            raise UserError(f"{argv[0]}: {name} is no knob: {f'did you mean {close[0]}?' if close else 'see --help'}")
        texts = (from_artifact or {}) | texts | {name: environ[name] for name in knobs if name in environ}
        config = cls(**{knobs[name].name: parse(knobs[name], text) for name, text in texts.items()})
        config.check()
        return config

    def check(self):
        """Bounds of each knob, then what must hold between knobs."""
        for name, field in self.knobs().items():
            value, (low, high, choices) = getattr(self, field.name), field.metadata["allowed"]
            require(not choices or value in choices, f"{name}={value}: expected one of {', '.join(choices)}")
            require(low is None or value >= low, f"{name}={value} is too small: the least is {low}")
            require(high is None or value <= high, f"{name}={value} is too large: the most is {high}")
            odd = f"""".*'|'.*"|[{CONTROL}\ud800-\udfff]""" if name != "SAMPLE_PROMPT" else "[\ud800-\udfff]"
            require(not re.search(odd, str(value)),
                    f"{name}={value!r} holds control characters or both kinds of quotes: use another name")
        D, H, K, T = self.model_dim, self.num_heads, self.num_kv_heads, self.train_seq_len
        batch, micro = self.train_batch_tokens, self.micro_batch_tokens
        require(re.fullmatch(r"[\w+=-][\w.+=-]{0,99}|", self.run_id),
                f"RUN_ID={self.run_id!r} cannot name a folder: use letters, digits and . _ + = -, at most 100")
        require(D % (2 * H) == 0, f"MODEL_DIM={D} is no multiple of 2 * NUM_HEADS={H}: use {D + -D % (2 * H)}")
        require(H % K == 0, f"NUM_KV_HEADS={K} does not divide NUM_HEADS={H}: use one of {divisors(H)}")
        require(round(self.mlp_mult * D), f"MLP_MULT={self.mlp_mult} of MODEL_DIM={D} is nothing: raise it")
        require(self.rope_dims % 2 == 0 and self.rope_dims <= D // H,
                f"ROPE_DIMS={self.rope_dims}: expected an even number up to the width of a head, {D // H}")
        require(self.loop_range() is not None, f"LOOP_LAYERS={self.loop_layers}: expected FIRST-LAST of 2 or more "
                f"blocks 0 to {self.num_layers - 1}")
        require(self.start_token < self.vocab_size, f"START_TOKEN={self.start_token} is outside VOCAB_SIZE")
        require(batch % T == 0, f"TRAIN_BATCH_TOKENS={batch} is not whole TRAIN_SEQ_LEN={T}: use {-(-batch // T) * T}")
        require(self.eval_stride <= T, f"EVAL_STRIDE={self.eval_stride} is over TRAIN_SEQ_LEN={T}: lower it")
        require(re.fullmatch("auto|0|[1-9][0-9]{,14}", micro) and (micro in ("auto", "0") or int(micro) >= T),
                f"MICRO_BATCH_TOKENS={micro}: expected auto, 0 (unlimited) or at least one TRAIN_SEQ_LEN={T}")
        require(not self.grad_accum_steps or micro in ("auto", "0"),
                "GRAD_ACCUM_STEPS and MICRO_BATCH_TOKENS are both given: unset one, both cut the step")
        require(not self.fit_size or min(self.clip_attn, self.clip_mlp, self.clip_embed) > 0,
                "FIT_SIZE=1 scales clips, and CLIP_ATTN, CLIP_MLP or CLIP_EMBED is 0: set each, to about 13")

    def loop_range(self) -> range | None:
        """The blocks of LOOP_LAYERS; None where it names no blocks that there are."""
        match = re.fullmatch("([0-9]{1,4})-([0-9]{1,4})", self.loop_layers)
        blocks = range(int(match[1]), int(match[2]) + 1) if match else range(0)
        fits = blocks and blocks.stop <= self.num_layers and self.num_layers > 1
        return blocks if fits or not self.loop_layers else None

    def texts(self) -> dict[str, str]:
        """{KNOB: text}, which read back gives this configuration, but for what belongs to one run or one call."""
        values = {name: getattr(self, field.name) for name, field in self.knobs().items()
                  if name not in ("RUN_ID", "MODE", "ARTIFACT", "RESUME", "RESUME_FORCE")}
        values["SAMPLE_PROMPT"] = re.sub(f'["{CONTROL}]', lambda m: f"\\u{ord(m[0]):04x}", self.sample_prompt)
        return {name: str(int(value) if isinstance(value, bool) else value) for name, value in values.items()}

    def accumulation_steps(self, world_size: int, device_type: str) -> int:
        """Micro-steps per step: GRAD_ACCUM_STEPS, or the fewest that cut the batch into whole sequences, keep to
        MICRO_BATCH_TOKENS and are at least 8 / world_size on a GPU: one GPU takes the micro-batches of eight."""
        T, total = self.train_seq_len, self.train_batch_tokens // self.train_seq_len
        fit = -(-total // world_size) * world_size * T
        require(total % world_size == 0, f"TRAIN_BATCH_TOKENS={self.train_batch_tokens} is {total} sequences, which "
                f"{world_size} ranks cannot share: use {fit} tokens, or one of {divisors(total)} ranks")
        allowed, wanted = divisors(total // world_size), self.grad_accum_steps
        require(wanted == 0 or wanted in allowed, f"GRAD_ACCUM_STEPS={wanted} does not divide the "
                f"{allowed[-1]} sequences of a rank: use one of {allowed}")
        # A CPU that runs out of memory gets no error to react to; 2**14 tokens keep its cores busy all the same.
        most = 2**14 if device_type == "cpu" else math.inf
        most = most if self.micro_batch_tokens == "auto" else int(self.micro_batch_tokens) or math.inf
        fewest = max(8 / world_size * (device_type != "cpu"), allowed[-1] * T / most)
        return wanted or next((n for n in allowed if n >= fewest), allowed[-1])

def divisors(n: int) -> list[int]:
    return sorted({d for k in range(1, math.isqrt(n) + 1) if n % k == 0 for d in (k, n // k)})

def parse(field: dataclasses.Field, text: str):
    """The value of a knob, of its default's type, from its text, in which spaces at the ends count in a prompt alone."""
    kind, text = type(field.default), text if field.name == "sample_prompt" else text.strip()
    with contextlib.suppress(ValueError, KeyError, OverflowError):
        value = {"0": False, "1": True}[text] if kind is bool else kind(text)
        if kind is str or math.isfinite(value):
            return value
    noun = {bool: "a switch: use 0 or 1", int: "a whole number", float: "a finite number"}[kind]
    raise UserError(f"{field.name.upper()}={text!r} is not {noun}: the default is {field.default}")

def read_env_file(path: Path) -> dict[str, str]:
    """{KEY: text} of KEY=VALUE lines. `#` starts a comment, a value may stand in quotes, nothing is expanded."""
    try:
        lines, texts = path.read_text(encoding="utf-8-sig").splitlines(), {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"configuration file {path} cannot be read ({error}): give the path of a FILE.env") from error
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            match = re.fullmatch(r"""\s*(\w+)\s*=\s*("[^"]*"|'[^']*'|[^"'#\s](?:[^#]*[^#\s])?|)\s*(?:\s#.*)?""", line)
            require(match, f"{path}:{number}: {line.strip()!r} is not a KEY=VALUE line")
            require(match[1] not in texts, f"{path}:{number}: {match[1]} is given twice: keep one")
            texts[match[1]] = match[2][1:-1] if match[2][:1] in ('"', "'") else match[2]
    return texts

# ---------- Runtime: device and ranks, what they tell each other, the run folder with its log, the one stopwatch ------
def launcher_ranks(environ) -> tuple[int, int]:
    """(rank, number of ranks) as torchrun sets them; (0, 1) where nothing does."""
    rank, size = environ.get("RANK", "0"), environ.get("WORLD_SIZE", "1")
    numbers = rank.isdecimal() and size.isdecimal() and int(rank) < int(size)
    address = size == "1" or {"MASTER_ADDR", "MASTER_PORT"} <= set(environ)
    require(numbers and address, f"RANK={rank} WORLD_SIZE={size} without a launcher: start several ranks with "
            "torchrun, which sets MASTER_ADDR and MASTER_PORT too, or unset both")
    return int(rank), int(size)

class Runtime:
    """This process among `world_size` ranks, and its device. Collectives do nothing for one process."""
    def __init__(self, config: Config, environ):
        self.rank, self.world_size = launcher_ranks(environ)
        self.is_master = self.rank == 0
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        kind = config.device
        if kind == "auto" or (config.mode == "check" and config.target_world_size):  # whose GPUs need not be here
            kind = next(kind for kind in available if available[kind])
        require(available[kind], f"DEVICE={kind}: torch {torch.__version__} sees no such device here: use DEVICE=auto")
        require(kind != "mps" or self.world_size == 1, f"WORLD_SIZE={self.world_size}: use one process, or DEVICE=cpu")
        gpus, local_ranks = torch.cuda.device_count(), int(environ.get("LOCAL_WORLD_SIZE", self.world_size))
        self.device = torch.device(kind, int(environ.get("LOCAL_RANK", 0)) % gpus if kind == "cuda" else None)
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        self.dtype = self.best_dtype() if config.dtype == "auto" else getattr(torch, config.dtype)
        if self.world_size > 1:  # NCCL refuses two ranks on one GPU
            self.join("nccl" if kind == "cuda" and local_ranks <= gpus else "gloo", environ)

    def join(self, backend: str, environ):
        """Meet the other ranks. Whoever waits for over ten seconds says for whom."""
        place, patience = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}", datetime.timedelta(seconds=10)
        waits = f"rank {self.rank} of {self.world_size} waits at {place} for"
        import threading
        alarm = threading.Timer(10, print, [waits, "the others" if self.is_master else "rank 0"], {"flush": True})
        alarm.daemon = True
        alarm.start()
        hour = datetime.timedelta(hours=1)  # ranks compile at different speeds; NCCL's own patience is ten minutes
        try:
            store, rank, world_size = next(dist.rendezvous("env://", timeout=hour))
            if environ.get("GROUP_WORLD_SIZE") == "1":  # at a restart torchrun's store still holds dead ranks' keys
                store = dist.PrefixStore(f"attempt_{environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
            alarm.cancel()
            store.set(f"here {rank}", "")
            for other in range(world_size):
                while not store.check([f"here {other}"]):
                    try:
                        store.wait([f"here {other}"], patience)
                    except RuntimeError:  # its time is over
                        print(waits, f"rank {other}", flush=True)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=hour)
            # Decisions and float64 sums travel between the hosts, which must not wait for what a device has queued.
            self.hosts = dist.new_group(backend="gloo", timeout=hour)
        except (RuntimeError, OSError) as error:
            raise UserError(f"the ranks cannot meet at MASTER_ADDR:MASTER_PORT={place} ({error!s:.150}): choose a free "
                            "port; if a host's name is the trouble, set GLOO_SOCKET_IFNAME to its network interface"
                            ) from error
        finally:
            alarm.cancel()

    def best_dtype(self) -> torch.dtype:
        """bfloat16 where the hardware multiplies it, float32 elsewhere."""
        if self.device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        elif self.device.type == "cpu":
            tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
            native = any(getattr(torch.cpu, test, bool)() for test in tests)
        else:
            native = False
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
    """logs/<run_id>/ and all that a run writes. Only rank 0 writes; lines logged before `create` are kept for it."""
    def __init__(self, runtime: Runtime):
        self.runtime, self.lines, self.file = runtime, [], None
        self.header = ""  # the first line of config.env, by which a restarted launch knows its folder

    def locate(self, config: Config, name: str = ""):
        """Choose the folder: RUN_ID, or `name`, or a new time stamp."""
        self.is_stamp = not (config.run_id or name)
        stamp = time.strftime(f"%Y-%m-%d_%H-%M-%S_{os.getpid()}")
        self.run_id = self.runtime.share(config.run_id or name or stamp)
        self.path = Path(config.log_dir) / self.run_id

    def create(self, config: Config, sources: dict[str, bytes]):
        """Make the folder, or open the one that goes on, for this process alone; put configuration and sources in."""
        if not self.runtime.is_master:
            return
        try:
            for attempt in range(2, 100):  # another host may have chosen the same time stamp
                with contextlib.suppress(FileExistsError):
                    self.path.mkdir(parents=True, exist_ok=not self.is_stamp)
                    break
                self.path = self.path.with_name(f"{self.run_id}_{attempt}")
            self.run_id, self.file = self.path.name, open(self.path / "train.log", "a", encoding="utf-8")
            lock(self.file, self.log)
        except OSError as error:
            self.file, busy = None, isinstance(error, BlockingIOError)
            raise UserError(f"LOG_DIR={config.log_dir} RUN_ID={self.run_id}: folder {self.path} cannot be opened "
                            f"({'another run is using it' if busy else error.strerror}): choose another") from error
        quoted = {name: f"'{text}'" if '"' in text else f'"{text}"' for name, text in config.texts().items()}
        self.write("config.env", (self.header + "".join(f"{name}={text}\n" for name, text in quoted.items())).encode())
        for name, data in sources.items():
            self.write(name, data)
        self.append("train.log", *self.lines)
        self.lines = []

    def log(self, line: str):
        if self.runtime.is_master:
            with contextlib.suppress(OSError):  # a terminal or a pipe that is gone must not end the run
                print(line, flush=True)
            self.append("train.log", line) if self.file and not self.lines else self.lines.append(line)

    def append(self, name: str, *lines: str):
        """Lines at the end of a file; a full disk costs the lines and not the run."""
        if self.runtime.is_master:
            with contextlib.suppress(OSError), open(self.path / name, "a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)

    def write(self, name: str, data: bytes):
        """Write a file of the folder such that it is there whole and verified, or as it was before."""
        temporary = self.path / f".{name}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if temporary.read_bytes() != data:
                raise OSError("it does not hold what was written to it: check the disk")
            os.replace(temporary, self.path / name)
        except OSError as error:
            raise OSError(f"{self.path / name} cannot be written ({error}): make room, or move LOG_DIR") from error
        finally:
            temporary.unlink(missing_ok=True)

    def close(self, *last_words: str):
        if self.file:
            self.append("train.log", *last_words)
            self.file.close()
            self.file = None

def lock(file, log):
    """Keep the file for this process while it is open; BlockingIOError if another has it."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass  # Windows has no such locks
    except BlockingIOError:
        raise
    except OSError as error:  # Lustre, SMB and some NFS have none either
        log(f"warning: {file.name} cannot be locked ({error.strerror}): see that no other run writes to its folder")

class Stopwatch:
    """Seconds spent in each phase of a run. One phase runs at a time; the device is drained where two meet."""
    def __init__(self, synchronize):
        self.synchronize, self.phase, self.since = synchronize, "startup", time.perf_counter()
        self.seconds = dict.fromkeys(("startup", "compile", "training", "evaluation", "export"), 0.0)

    def switch(self, phase: str):
        self.synchronize()
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now

    def elapsed(self, phase: str) -> float:
        return self.seconds[phase] + (time.perf_counter() - self.since if phase == self.phase else 0.0)

def is_out_of_memory(error: Exception) -> bool:
    """As the CPU, CUDA and MPS say it, and the libraries of CUDA: CUBLAS_STATUS_ALLOC_FAILED and the like."""
    return bool(re.search("(not enough|can't allocate|out of) memory|ALLOC_FAILED", str(error)))

def choose_compile(config: Config, runtime: Runtime) -> tuple[bool, str]:
    """Whether to torch.compile, and why. A tiny function is compiled to find out whether a compiler works here."""
    unreliable = runtime.device.type == "mps" or sys.platform == "win32"
    if config.compile == "0" or (config.compile == "auto" and unreliable):
        return False, f"COMPILE={config.compile} on {runtime.device.type}, {sys.platform}"
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=runtime.device))
        return True, "a trial compilation worked"
    except Exception as error:  # whatever a missing or broken toolchain raises
        reason = f"a trial compilation failed: {error!r:.120}"
        require(config.compile == "auto", f"COMPILE=1: {reason}: install a C++ compiler or use COMPILE=0")
        return False, reason

# ---------- Data: the shard format, the order of the stream, its position, the next step read ahead -------------------
def open_shard(path: Path) -> np.ndarray:
    """Memory-mapped uint16 tokens of a shard: 256 int32 (magic, version, token count, zeros), then the tokens."""
    size = path.stat().st_size
    require(size >= SHARD_HEADER_BYTES, f"shard {path} has {size} bytes, less than a header: make or fetch it again")
    magic, version, count = np.fromfile(path, dtype="<i4", count=3).tolist()
    require((magic, version) == (SHARD_MAGIC, SHARD_VERSION), f"shard {path} has magic {magic} version {version}, "
            f"expected {SHARD_MAGIC} version {SHARD_VERSION}: it is damaged or foreign: make or fetch it again")
    require(count > 0 and size == SHARD_HEADER_BYTES + 2 * count, f"shard {path} has {size} bytes, but {count} tokens "
            f"take {SHARD_HEADER_BYTES + 2 * count}: it was cut short or damaged: make or fetch it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))

class TokenStream:
    """The shards of one split as one sequence of tokens."""
    def __init__(self, folder: str, split: str, vocab_size: int):
        self.pattern, self.vocab_size = f"{folder}/fineweb_{split}_*.bin", vocab_size
        # Digits only: a glob would also take side files such as fineweb_val_000000_old.bin for validation text.
        names = re.compile(rf"fineweb_{split}_(\d+)\.bin")
        found = sorted((int(m[1]), path) for path in Path(folder).glob("*") if (m := names.fullmatch(path.name)))
        require(found, f"DATA_PATH={folder} holds no fineweb_{split}_NNNNNN.bin; {NO_DATA_HINT}")
        first = found[0][0] if split == "train" else 0  # a validation text without its beginning is another text
        for expected, (number, path) in enumerate(found, start=first):
            require(number == expected, f"{self.pattern}: shard number {expected} is missing, or {path.name} is there "
                    "twice: fetch it again or move one away")
        self.shards = [open_shard(path) for _, path in found]
        self.ends = np.cumsum([len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` uint16 tokens from position `start`, across shards, wrapping at the end, all in the vocabulary."""
        pieces = []
        while count > 0:
            start %= len(self)
            index = int(np.searchsorted(self.ends, start, side="right"))
            from_its_end = start - self.ends[index]  # negative
            pieces.append(self.shards[index][from_its_end:][:count])
            count -= len(pieces[-1])
            start += len(pieces[-1])
        tokens = np.concatenate(pieces)
        if tokens.max() >= self.vocab_size:
            raise UserError(f"{self.pattern}: token {tokens.max()} is outside VOCAB_SIZE={self.vocab_size}: "
                            "set DATA_PATH, TOKENIZER_PATH and VOCAB_SIZE together")
        return tokens

def to_device(tokens: np.ndarray, device: torch.device) -> Tensor:
    """int64 tokens on the device; two bytes a token on the wire, copied asynchronously on CUDA."""
    wire = torch.from_numpy(tokens.view(np.int16))  # torch's own uint16 lacks kernels on some devices
    wire = wire.pin_memory() if device.type == "cuda" else wire
    return wire.to(device, non_blocking=True).long() & 0xFFFF

class TrainLoader:
    """This rank's share of each step; a thread reads the next one ahead.

    Ranks and micro-steps take contiguous slices of a step's sequences, so that their number does not matter.
    LOADER=stream: sequence i of the step at `position` p is tokens[p + i*T : p + i*T + T + 1]. LOADER=shuffle: it is
    number p / T + i of an order that takes every piece of the text once an epoch; each epoch has a permutation and a
    phase, where its first piece begins, of its own."""
    def __init__(self, stream: TokenStream, config: Config, runtime: Runtime, accum_steps: int):
        self.stream, self.batch_tokens, self.device = stream, config.train_batch_tokens, runtime.device
        self.share, self.length = self.batch_tokens // runtime.world_size, config.train_seq_len
        self.offset, self.accum_steps = runtime.rank * self.share, accum_steps
        self.seed = config.seed if config.loader == "shuffle" else None
        self.pieces = max(1, (len(stream) - 1) // self.length - 1)  # of an epoch; one fewer leaves room for the phase
        self.epoch, self.reader = -1, ThreadPoolExecutor(max_workers=1)
        self.seek(0)

    def seek(self, position: int):
        self.position = position % len(self.stream) if self.seed is None else position
        self.ahead = self.reader.submit(self.read, self.position + self.offset)

    def read(self, position: int) -> np.ndarray:
        """[B, T + 1] tokens: each sequence with the target of its last token."""
        starts = range(position, position + self.share, self.length)
        starts = starts if self.seed is None else map(self.shuffled, starts)
        return np.stack([self.stream.read(start, self.length + 1) for start in starts])

    def shuffled(self, position: int) -> int:
        """Where in the text the sequence at this position of the order begins."""
        epoch, index = divmod(position // self.length, self.pieces)
        if epoch != self.epoch:
            random, self.epoch = np.random.default_rng((self.seed, epoch)), epoch
            self.phase, self.order = int(random.integers(self.length)), random.permutation(self.pieces)
        return self.phase + int(self.order[index]) * self.length

    def next_step(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, [micro-steps, B, T] each."""
        tokens = to_device(self.ahead.result(), self.device)
        self.seek(self.position + self.batch_tokens)
        return tuple(t.contiguous().view(self.accum_steps, -1, self.length) for t in (tokens[:, :-1], tokens[:, 1:]))

# ---------- Bytes: the tokenizer, the only place that knows what a token weighs in bytes of text, and the proof of it --
class TokenBytes:
    """Bytes of text per token, for three kinds of tokenizer: a SentencePiece .model, a name that tiktoken knows, bytes.

    Special tokens weigh 0 and are boundaries, and so are ids beyond the tokenizer's own, which only fill a vocabulary
    up. A SentencePiece byte piece weighs 1, any other piece its UTF-8 text with U+2581 as a space; but a leading
    U+2581 right after a boundary adds nothing, unless the model writes spaces there as they are."""
    def __init__(self, path: str, vocab_size: int, padding: int = 127):
        self.path, self.leading, self.byte_ids, self.unknown = path, set(), set(), set()
        self.drops_first_space = True
        if re.fullmatch(r"bytes|(.*\W)?\w*byte_?260\w*(\.json)?", path):
            self.load_bytes()
        elif re.fullmatch(r"\w+", path):
            self.load_tiktoken()
        else:
            self.load_sentencepiece()
        self.size = len(self.pieces)
        content = Path(path).read_bytes() if self.leading else repr(self.pieces).encode()
        self.sha256 = hashlib.sha256(content).hexdigest()
        require(0 <= vocab_size - self.size <= padding, f"VOCAB_SIZE={vocab_size}, but TOKENIZER_PATH={path} has "
                f"{self.size} pieces: set VOCAB_SIZE={self.size}, or the tokenizer that made the shards")
        pieces = self.pieces + [None] * (vocab_size - self.size)
        self.boundary = np.array([piece is None for piece in pieces])
        self.leading_space = np.array([token in self.leading for token in range(vocab_size)])
        self.is_byte = np.array([token in self.byte_ids for token in range(vocab_size)])
        self.weight = np.array([len(piece or b"") for piece in pieces])

    def load_bytes(self):
        """pad, bos, eos, unk, then byte b as id b + 4."""
        self.pieces, self.start = [None] * 4 + [bytes([byte]) for byte in range(256)], 1
        self.encode = lambda text: [byte + 4 for byte in text.encode()]
        self.decode = lambda tokens: bytes(token - 4 for token in tokens if token >= 4)

    def load_tiktoken(self):
        model = self.model = load_tiktoken(self.path)
        special, self.start = set(map(model.encode_single_token, model.special_tokens_set)), model.eot_token
        ids = range(model.n_vocab)
        self.pieces = [None if token in special else model.decode_single_token_bytes(token) for token in ids]
        self.encode = model.encode_ordinary
        self.decode = lambda tokens: model.decode_bytes([token for token in tokens if token not in special])

    def load_sentencepiece(self):
        """`pieces` are without their leading U+2581, which `leading` tells."""
        model, path = load_sentencepiece(self.path), self.path
        self.model, self.start, self.encode = model, model.bos_id(), model.encode
        self.decode = lambda tokens: model.decode(tokens).encode()
        texts = [model.id_to_piece(token) for token in range(model.vocab_size())]
        require("\u2581" in texts, f"{path} has no piece for a single space (U+2581): use another tokenizer")
        # A model that puts a space before a text, or takes it away, gives a first space no meaning.
        self.drops_first_space = (model.encode("a", out_type=str)[0].startswith("\u2581")
                                  or model.encode(" a") == model.encode("a"))
        self.pieces = []
        for token, text in enumerate(texts):
            odd = model.is_unknown(token) or model.is_unused(token)  # which the model writes in a way of its own
            if odd or model.is_control(token):
                self.pieces.append(None)
                self.unknown |= {token} if odd else set()
            elif model.is_byte(token):
                self.pieces.append(bytes([int(text[3:5], 16)]))  # <0xE6>
                self.byte_ids.add(token)
            else:
                self.pieces.append(text.removeprefix("\u2581").replace("\u2581", " ").encode())
                self.leading |= {token} if text.startswith("\u2581") else set()

    def weigh(self, tokens: np.ndarray) -> int:
        """Bytes of tokens[1:], each in the context of the token before it."""
        before, target = tokens[:-1], tokens[1:]
        spaces = self.leading_space[target] & ~(self.boundary[before] & self.drops_first_space)
        return int(self.weight[target].sum() + np.count_nonzero(spaces))

    def spell(self, tokens: list[int]) -> bytes:
        """The text of a document, piece by piece, as `weigh` counts it."""
        text, first = [], self.drops_first_space
        for token in tokens:
            if self.pieces[token] is None:
                first = self.drops_first_space
                continue
            text += [b" "] if token in self.leading and not first else []
            text.append(self.pieces[token])
            first = False
        return b"".join(text)

def load_sentencepiece(path: str):
    from sentencepiece import SentencePieceProcessor  # late: importing this file must stay light
    require(Path(path).is_file(), f"TOKENIZER_PATH={path} does not exist; {NO_DATA_HINT}")
    try:
        return SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError) as error:
        raise UserError(f"TOKENIZER_PATH={path} is no SentencePiece model: make or fetch it again") from error

def load_tiktoken(name: str):
    """An encoding of tiktoken; gpt2 comes from GPT2_BPE_DIR, a folder with vocab.bpe and encoder.json, if it is set."""
    try:
        import tiktoken.load
        from tiktoken_ext.openai_public import r50k_pat_str
        if name != "gpt2" or not (folder := os.environ.get("GPT2_BPE_DIR")):
            return tiktoken.get_encoding(name)
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(f"{folder}/vocab.bpe", f"{folder}/encoder.json")
        return tiktoken.Encoding(name, pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 50256})
    except Exception as error:  # of names, files and the network
        raise UserError(f"TOKENIZER_PATH={name} is nothing tiktoken can load ({error!r:.120}): give a .model, gpt2 or "
                        "bytes; without a network set TIKTOKEN_CACHE_DIR, or for gpt2 GPT2_BPE_DIR") from error

FINEWEB_TARGETS, FINEWEB_BYTES = 62_021_632, 151_080_363  # the challenge's validation text in its 1,024 pieces
AUDIT_TOKENS = 1_000_000  # that are decoded

def compare_spelling(token_bytes: TokenBytes, stream: TokenStream) -> str:
    """Prove on the first tokens that what is weighed is the text, letter by letter, as the tokenizer itself decodes it.

    Half a character, which some shards end with, is left out on both sides; a document with unknown letters cannot be
    compared, since the model decodes them to a sign that the text does not have. Returns a phrase for the log."""
    tokens = stream.read(0, min(AUDIT_TOKENS, len(stream)))
    documents = np.split(tokens, np.flatnonzero(token_bytes.boundary[tokens]))
    lengths, unknown = 0, 0
    for document in (document.tolist() for document in documents if len(document)):
        spelled = token_bytes.spell(document)
        lengths += len(spelled)
        unknown += not token_bytes.unknown.isdisjoint(document)
        if token_bytes.unknown.isdisjoint(document):
            ours, theirs = (text.decode(errors="replace").replace("\ufffd", "")
                            for text in (spelled, token_bytes.decode(document)))
            require(ours == theirs, f"{stream.pattern}: {token_bytes.path} decodes a document to {theirs[:40]!r} and "
                    f"on, its pieces spell {ours[:40]!r}: use the tokenizer of the shards")
    boundary = np.flatnonzero(token_bytes.boundary)[:1].astype(tokens.dtype)
    weighed = token_bytes.weigh(np.concatenate([boundary, tokens]))
    assert weighed == lengths, f"the first tokens weigh {weighed} bytes and spell {lengths}: a fault of this script"
    count = np.count_nonzero(token_bytes.boundary[tokens])
    note = f" ({unknown} documents hold unknown letters and are not compared)" if unknown else ""
    return f"{len(tokens)} tokens in {count} documents decode to the {weighed} bytes they weigh{note}"

def audit(token_bytes: TokenBytes, stream: TokenStream, data_path: str) -> tuple[str, dict]:
    """Prove the byte count that a score divides by: a line for the log, and facts for result.json.

    A tokenizer and what its tokens weigh come from one file, so they cannot prove each other: only data whose
    manifest.json states the true bytes of its text is proved, or the published text whose bytes are known."""
    pattern, stated = stream.pattern, manifest_bytes(data_path)
    compared = compare_spelling(token_bytes, stream)
    text_bytes, digest, most = 0, hashlib.sha256(), 0
    for start in range(0, len(stream), 2**24):
        chunk = stream.read(start, min(2**24 + 1, len(stream) - start))
        text_bytes, most = text_bytes + token_bytes.weigh(chunk), max(most, int(chunk.max()))
        digest.update(chunk[: 2**24].tobytes())
    require(most < token_bytes.size, f"{pattern}: {token_bytes.path} has no token {most}: use the tokenizer of the "
            "shards")
    require(text_bytes, f"{pattern}: {len(stream)} tokens weigh no bytes: make or fetch it again")
    fineweb = abs(text_bytes - 151.08e6) < 6e3
    if token_bytes.size == 1024:
        fineweb = token_bytes.weigh(stream.read(0, min(FINEWEB_TARGETS + 1, len(stream)))) == FINEWEB_BYTES
    source = f"{'' if fineweb else 'not '}canonical FineWeb, not proved: no manifest.json states the true bytes"
    if stated:
        require(text_bytes == stated["token_bytes"], f"{pattern}: weighs {text_bytes} bytes, but manifest.json states "
                f"{stated['token_bytes']}: make or fetch the data again")
        lossy = stated["token_bytes"] != stated["bytes"]
        source = f"bytes:lossy: of {stated['bytes']} in the text" if lossy else "bytes:proved by manifest.json"
    proved = stated is not None and stated["bytes"] == text_bytes
    facts = {"val_bytes": text_bytes, "bytes_proved": proved, "sha256_val_tokens": digest.hexdigest()}
    return f"byte_audit: {compared}; all {len(stream)} tokens weigh {text_bytes} bytes ({source})", facts

def manifest_bytes(folder: str) -> dict[str, int] | None:
    """The `bytes` of the validation text, and the `token_bytes` that its tokenizer keeps, if a manifest states them."""
    path = Path(folder) / "manifest.json"
    try:
        split = json.loads(path.read_text(encoding="utf-8"))["splits"]["val"]
        return {"bytes": int(split["bytes"]), "token_bytes": int(split.get("token_bytes", split["bytes"]))}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise UserError(f"{path} states no splits.val.bytes ({error!r:.60}): prepare the data again, or move it"
                        ) from error

# ---------- Model: what is asked of any model, attention and its backends, the architecture ---------------------------
class Row(NamedTuple):
    """What is to be done with the parameters of a kind, from the first weights to the artifact."""
    init: object  # a number, or a function of (parameter, config, generator) that fills it in
    group: str  # of the optimizers: "matrix" is Muon's, "embed", "head" and "scalar" are AdamW's
    clip: str = "embed"  # class of the export: its knob CLIP_*, its table of frequencies
    bits: str = "weight_bits"  # the knob that says how many a weight gets
    fp32: bool = False  # kept whole by CODEC=zlib, where it is too small to be quantised

def uniform_init(p: Tensor, config: Config, generator):
    p.uniform_(-(p.size(1) ** -0.5), p.size(1) ** -0.5, generator=generator)

def embedding_init(p: Tensor, config: Config, generator):
    p.normal_(std=config.tied_embed_init_std if config.tie_embeddings else 1.0, generator=generator)

def gain_init(p: Tensor, config: Config, generator):
    p.fill_(config.qk_gain_init)

def first_of_two_init(p: Tensor, config: Config, generator):
    """All of the first, nothing of the second."""
    p.copy_(torch.tensor([[1.0], [0.0]]).expand_as(p))

def kind_of(name: str) -> str:
    """What a parameter is, whatever the block: blocks.3.attn.c_q.weight is a blocks.attn.c_q."""
    return re.sub(r"\.\d+(?=\.|$)", "", name).removesuffix(".weight")

class Model(nn.Module):
    """What training, export and scoring ask of a model. One of your own, in a file of its own, gives PARAMETERS and
    `features`, calls `init_weights` when it is built, and may override the rest; its Config names it (model_class)."""
    PARAMETERS: dict[str, Row] = {}
    looping = False  # whether depth recurrence, if there is any, is on
    has_loops = False
    softcap = 30.0

    @classmethod
    def row(cls, name: str) -> Row:
        require(kind_of(name) in cls.PARAMETERS, f"{cls.__name__}.PARAMETERS has no row {kind_of(name)}, so nothing "
                f"says how parameter {name} begins, learns and is exported: add one")
        return cls.PARAMETERS[kind_of(name)]

    @torch.no_grad()
    def init_weights(self, config: Config):
        """Drawn on the CPU in the order of the parameters: every device and rank starts from the same numbers."""
        generator = torch.Generator().manual_seed(config.seed)
        for name, p in self.named_parameters():
            init = self.row(name).init
            init(p, config, generator) if callable(init) else p.fill_(init)

    def features(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, D]: what the output projection sees."""
        raise NotImplementedError

    def output_weight(self) -> tuple[str, Tensor]:
        """Name and weight [V, D] of the output projection: that of the embedding where there is no lm_head."""
        name = "tok_emb" if getattr(self, "lm_head", None) is None else "lm_head"
        return f"{name}.weight", getattr(self, name).weight

    def logits(self, x_BTD: Tensor) -> Tensor:
        """[B, T, V] in fp32, softcapped."""
        z = at_least_fp32(F.linear(x_BTD, self.output_weight()[1].to(x_BTD.dtype)))
        return self.softcap * torch.tanh(z / self.softcap)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None):
        """Losses [B, T] in nats where targets are given, logits [B, T, V] otherwise; both fp32. In training it may
        return (losses, extra): a scalar to be minimised with their mean, which no log or score counts."""
        logits = self.logits(self.features(tokens_BT))
        if targets_BT is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)

    def optimizers(self, config: Config, runtime: Runtime) -> list[torch.optim.Optimizer]:
        return build_optimizers(self, config, runtime)

    def lr_scale(self, config: Config, step: int, progress: float) -> float:
        """By what each group's rate is multiplied at this step."""
        return lr_scale(config, progress)

    def flops_per_token(self, seq_len: int) -> int:
        """Of training: 6 for each weight that multiplies (Kaplan et al. 2020), forward and backward."""
        return 6 * sum(p.numel() for name, p in self.named_parameters() if p.ndim > 1 and "emb" not in name)

def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

def grouped_attention(q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q_BHTd, k_BKTd, v_BKTd, is_causal=True, enable_gqa=True)

def expanded_attention(q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor) -> Tensor:
    """For kernels without grouped heads."""
    k_BHTd, v_BHTd = (kv.repeat_interleave(q_BHTd.size(1) // kv.size(1), dim=1) for kv in (k_BKTd, v_BKTd))
    return F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, is_causal=True)

def flash3_attention(q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func  # late: few machines have it
    y_BTHd = flash_attn_func(*(x.transpose(1, 2) for x in (q_BHTd, k_BKTd, v_BKTd)), causal=True)
    return (y_BTHd[0] if isinstance(y_BTHd, tuple) else y_BTHd).transpose(1, 2)

def blocked_attention(q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, block: int = 128) -> Tensor:
    """Plain products, each block of queries against its own past, so that half of the square is never computed. Twice
    as fast as torch's CPU flash kernel at T = 256; memory grows with T squared, so it is for short sequences."""
    B, H, T, d = q_BHTd.shape
    q_NGTd, k_NTd, v_NTd = q_BHTd.reshape(-1, H // k_BKTd.size(1), T, d), k_BKTd.flatten(0, 1), v_BKTd.flatten(0, 1)
    outputs = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        rows = (-1, stop - start)
        scores = (q_NGTd[:, :, start:stop].flatten(1, 2) @ k_NTd[:, :stop].mT).unflatten(1, rows)
        scores = at_least_fp32(scores) * d**-0.5
        hidden = torch.ones(stop - start, stop, dtype=torch.bool, device=scores.device).triu(start + 1)
        weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1).to(v_NTd.dtype).flatten(1, 2)
        outputs.append((weights @ v_NTd[:, :stop]).unflatten(1, rows))
    return torch.cat(outputs, dim=2).view(B, H, T, -1)

def pin_sdpa(backend: str):
    """Make torch's scaled dot-product attention use this backend or fail."""
    switches = {"flash": "flash", "cudnn": "cudnn", "efficient": "mem_efficient", "math": "math"}
    for name, switch in switches.items():
        getattr(torch.backends.cuda, f"enable_{switch}_sdp")(name == backend)

def prove_attention(attend, config: Config, runtime: Runtime, rows: int, compiled: bool):
    """Train `rows` sequences, with the strides that the model has, and compare the beginning of the first, on which
    nothing later has an influence, with plain products in fp32. Raises whatever is wrong."""
    T, H, K, d = config.train_seq_len, config.num_heads, config.num_kv_heads, config.model_dim // config.num_heads
    if runtime.device.type == "cuda" and compiled:  # on a CPU that would take long and find out nothing
        attend = torch.compile(attend, fullgraph=True, dynamic=False)
    start, generator = slice(min(T, 1024)), torch.Generator().manual_seed(0)
    sequence = [torch.randn(1, T, heads, d, generator=generator) for heads in (H, K, K)]
    while True:
        inputs = [x.to(runtime.device, runtime.dtype).repeat(rows, 1, 1, 1).requires_grad_() for x in sequence]
        try:
            y = attend(*(x.transpose(1, 2) for x in inputs))[:, :, start]
            y.float().square().sum().backward()
            break
        except RuntimeError as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
            rows //= 2  # as will be done to the micro-batch of the model
    plain_inputs = [x[:1, start].detach().float().requires_grad_() for x in inputs]
    plain_y = blocked_attention(*(x.transpose(1, 2) for x in plain_inputs))
    plain_y.square().sum().backward()
    found = [y[:1], *(x.grad[:1, start] for x in inputs)]
    for tensor, plain in zip(found, [plain_y, *(x.grad for x in plain_inputs)], strict=True):
        error = float((tensor.float() - plain).abs().max() / plain.abs().max())
        if not error < 0.05:  # that of bf16 is under 0.02
            raise RuntimeError(f"it errs by {error:.2g} of the largest value")

def choose_attention(config: Config, runtime: Runtime, compiled: bool):
    """(function, log line) of the first backend that trains as it should; torch's switches pin SDPA to it."""
    order = ["flash", "cudnn", "efficient", "math"]
    if runtime.device.type == "cuda" and torch.cuda.get_device_capability(runtime.device)[0] in (9, 10):
        order = ["flash3", "cudnn", "flash", "efficient", "math"]  # Hopper and Blackwell
    elif runtime.device.type == "mps":
        order = ["math", "blocked"]
    elif runtime.device.type == "cpu":
        order = ["blocked"] if config.train_seq_len <= 1024 else ["flash", "math"]
    accum_steps = config.accumulation_steps(runtime.world_size, runtime.device.type)
    rows = config.train_batch_tokens // (runtime.world_size * accum_steps * config.train_seq_len)
    own, failed = {"flash3": (flash3_attention,), "blocked": (blocked_attention,)}, ""
    for name in order if config.attention == "auto" else [config.attention]:
        for attend in own.get(name, (grouped_attention, expanded_attention)):
            pin_sdpa(name)
            try:
                prove_attention(attend, config, runtime, rows, compiled)
                return attend, f"attention:{name} by {attend.__name__}{failed}"
            except Exception as error:  # of the kernel, its package, or the compiler
                failed += f"; {name} {attend.__name__} failed: {error!r:.120}"
    raise UserError(f"ATTENTION={config.attention} does not run on {runtime.device}: use ATTENTION=auto, or a "
                    f"smaller MODEL_DIM or TRAIN_SEQ_LEN{failed}")

def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=2.0**-23)  # computed in fp32, whose own epsilon this is

class Linear(nn.Linear):
    """The fp32 master weight is cast to the type of the input at use."""
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

def rope_tables(length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin [T, d/2] in fp32 from fp32 positions (Su et al., RoFormer): bf16 positions would merge past 256."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()

def rotate(x_BTHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in halves: dimension i of the first half turns with dimension i of the second. cos, sin: [T, 1, r/2], and
    dimensions from r on stay as they are."""
    a, b, *rest = x_BTHd.split(cos.size(-1), dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, *rest], dim=-1)

GATE_INPUTS = 12  # channels that a gate looks at

class Attention(nn.Module):
    """Causal grouped-query attention (Shazeer 2019; Ainslie et al. 2023) with normalised queries and keys."""
    def __init__(self, config: Config, attend, layer: int):
        super().__init__()
        D, self.head_dim, self.attend = config.model_dim, config.model_dim // config.num_heads, attend
        kv_dim = self.head_dim * config.num_kv_heads
        self.c_q, self.c_k, self.c_v, self.proj = (Linear(D, out, bias=False) for out in (D, kv_dim, kv_dim, D))
        self.q_gain = nn.Parameter(torch.empty(config.num_heads))
        gate = torch.empty(config.num_heads, min(GATE_INPUTS, D))
        self.gate = nn.Parameter(gate) if config.attn_gate else None
        self.exclusive = layer >= config.num_layers - config.xsa_layers

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (c(x_BTD).unflatten(-1, (-1, self.head_dim)) for c in (self.c_q, self.c_k, self.c_v))
        q = rotate(rms_norm(q), cos, sin) * self.q_gain.to(q.dtype)[:, None]
        k = rotate(rms_norm(k), cos, sin)
        y = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        if self.exclusive:  # XSA: each group of heads leaves out the direction of the token's own value
            y_BTKGd, own_BTK1d = y.unflatten(2, (v.size(2), -1)), F.normalize(v, dim=-1)[..., None, :]
            y = (y_BTKGd - (y_BTKGd * own_BTK1d).sum(-1, keepdim=True) * own_BTK1d).flatten(2, 3)
        if self.gate is not None:
            gate_BTH = 2 * torch.sigmoid(F.linear(x_BTD[..., :GATE_INPUTS], self.gate.to(y.dtype)))
            y = y * gate_BTH[..., None]
        return self.proj(y.flatten(2))

class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D, hidden, self.slope = config.model_dim, round(config.mlp_mult * config.model_dim), config.mlp_slope
        self.fc, self.proj = Linear(D, hidden, bias=False), Linear(hidden, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), self.slope).square())

class Block(nn.Module):
    def __init__(self, config: Config, attend, layer: int):
        super().__init__()
        D, self.attn, self.mlp = config.model_dim, Attention(config, attend, layer), MLP(config)
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.empty(D)) for _ in range(2))
        self.resid_mix = nn.Parameter(torch.empty(2, D)) if config.x0_mix else None
        self.norm_scale = (layer + 1) ** -0.5 if config.ln_scale else 1.0
        self.parallel = 0 <= config.parallel_from <= layer

    def forward(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.resid_mix is not None:
            mix = self.resid_mix.to(x.dtype)
            x = mix[0] * x + mix[1] * x0
        y = x + self.attn_scale.to(x.dtype) * self.attn(rms_norm(x) * self.norm_scale, cos, sin)
        mlp_input = rms_norm(x if self.parallel else y) * self.norm_scale
        return y + self.mlp_scale.to(x.dtype) * self.mlp(mlp_input)

class GPT(Model):
    """A U-net of blocks over a normalised embedding. Precision: fp32 masters, cast at use; activations and products in
    `dtype`; RoPE tables built in fp32 and cast last; norms, softmax and loss in fp32."""
    PARAMETERS = {
        "tok_emb": Row(embedding_init, "embed", bits="embed_bits"),
        "lm_head": Row(0.0, "head"),
        "smear": Row(0.0, "scalar", fp32=True),
        "skip_weights": Row(1.0, "scalar", fp32=True),
        "skip_gates": Row(0.0, "scalar", fp32=True),
        "blocks.resid_mix": Row(first_of_two_init, "scalar", fp32=True),
        "blocks.attn_scale": Row(1.0, "scalar", fp32=True),
        "blocks.mlp_scale": Row(1.0, "scalar", fp32=True),
        "blocks.attn.q_gain": Row(gain_init, "scalar", "attn", fp32=True),
        "blocks.attn.gate": Row(0.0, "scalar", "attn", fp32=True),
        "blocks.attn.c_q": Row(uniform_init, "matrix", "attn"),
        "blocks.attn.c_k": Row(uniform_init, "matrix", "attn"),
        "blocks.attn.c_v": Row(uniform_init, "matrix", "attn"),
        "blocks.attn.proj": Row(0.0, "matrix", "attn"),
        "blocks.mlp.fc": Row(uniform_init, "matrix", "mlp"),
        "blocks.mlp.proj": Row(0.0, "matrix", "mlp"),
    }

    def __init__(self, config: Config, attend=expanded_attention, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype, self.softcap, self.start_token = dtype, config.logit_softcap, config.start_token
        self.tok_emb = nn.Embedding(config.vocab_size, config.model_dim)
        self.blocks = nn.ModuleList(Block(config, attend, layer) for layer in range(config.num_layers))
        # The order of the blocks, without and with depth recurrence; `looping` says which, from LOOP_START on.
        self.straight, loop = list(range(config.num_layers)), config.loop_range()
        again = list(loop) * (config.loop_passes - 1)
        self.looped = self.straight[: loop.stop] + again + self.straight[loop.stop :]
        self.has_loops = self.looping = bool(loop)
        skips = torch.empty(len(self.looped) // 2, config.model_dim)
        # A single block has no skips, and DDP waits for the gradient of every parameter that requires one.
        self.skip_weights = nn.Parameter(skips, requires_grad=len(skips) > 0)
        self.skip_gates = nn.Parameter(skips.clone(), requires_grad=len(skips) > 0) if config.gated_skips else None
        self.smear = nn.Parameter(torch.empty(1 + min(GATE_INPUTS, config.model_dim))) if config.smear_gate else None
        self.lm_head = None if config.tie_embeddings else Linear(config.model_dim, config.vocab_size, bias=False)
        turning = config.rope_dims or config.model_dim // config.num_heads
        cos, sin = rope_tables(config.train_seq_len, turning, config.rope_base)
        self.register_buffer("cos", cos[:, None], persistent=False)
        self.register_buffer("sin", sin[:, None], persistent=False)
        self.init_weights(config)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, D], normalised; the smear gate adds some of the token before, but none across a document's start."""
        x = rms_norm(self.tok_emb(tokens_BT).to(self.dtype))
        if self.smear is None:
            return x
        share, weights = self.smear[0].to(x.dtype), self.smear[1:].to(x.dtype)
        gate_BT = share * torch.sigmoid(x[:, 1:, :GATE_INPUTS] @ weights) * (tokens_BT[:, 1:] != self.start_token)
        return torch.cat([x[:, :1], x[:, 1:] + gate_BT[..., None] * x[:, :-1]], dim=1)

    def features(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, D] in `dtype`: what the output projection sees.

        The first half of the blocks, in the order in which they run, push what they give; each of the second half
        takes the latest that is left, scaled by its skip_weights, before it begins."""
        T = tokens_BT.size(1)
        cos, sin = self.cos[:T].to(self.dtype), self.sin[:T].to(self.dtype)
        x = x0 = self.embed(tokens_BT)
        order, skips = self.looped if self.looping else self.straight, []
        half = len(order) // 2
        for layer in order[:half]:
            x = self.blocks[layer](x, x0, cos, sin)
            skips.append(x)
        for i, layer in enumerate(order[half:]):
            if skips:  # an odd number of blocks leaves the last without
                skip = self.skip_weights[i].to(x.dtype) * skips.pop()
                if self.skip_gates is None:
                    x = x + skip
                else:
                    x = torch.lerp(skip, x, torch.sigmoid(self.skip_gates[i]).to(x.dtype))
            x = self.blocks[layer](x, x0, cos, sin)
        return rms_norm(x)

    def flops_per_token(self, seq_len: int) -> int:
        """Of training, forward and backward: 6 for each weight of a product as often as it runs, 12 T D a block for
        the scores of attention and what they weigh, the whole square (the convention of PaLM and nanoGPT)."""
        weights = self.output_weight()[1].numel()
        order = self.looped if self.looping else self.straight
        for layer in order:
            weights += sum(m.weight.numel() for m in self.blocks[layer].modules() if isinstance(m, Linear))
        return 6 * weights + 12 * seq_len * self.tok_emb.embedding_dim * len(order)

def build_model(config: Config, runtime: Runtime) -> tuple[Model, nn.Module, str]:
    """(model, the same compiled where that works, what was chosen and why)."""
    name = runtime.device_name()
    try:
        torch.ones(8, device=runtime.device).sum().item()
    except RuntimeError as error:  # a card that this build of torch no longer has kernels for
        raise UserError(f"DEVICE={runtime.device}: torch {torch.__version__} cannot use {name} ({error!s:.120}): "
                        "install a torch that is built for it, or use DEVICE=cpu") from error
    compiled, compile_note = choose_compile(config, runtime)
    attend, attention_note = choose_attention(config, runtime, compiled)
    model = config.model_class()(config, attend, runtime.dtype).to(runtime.device)
    compiled_model = model
    if compiled:  # DDP would cut the graph at its buckets, where torch 2.8 corrupts the gradients of a model with loops
        torch._dynamo.config.optimize_ddp = False
        compiled_model = torch.compile(model, dynamic=False, fullgraph=True)
    slow = " (no bf16 products in hardware: slow)" * (runtime.device.type == "cuda" and runtime.dtype == torch.float32)
    device_note = f"device:{runtime.device} ({name}) dtype:{str(runtime.dtype).removeprefix('torch.')}{slow}"
    return model, compiled_model, f"{device_note}\n{attention_note}\ncompile:{int(compiled)} ({compile_note})"

# What a GPU's bf16 products reach at most, dense, in TFLOP/s, by a part of its name (NVIDIA's data sheets).
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "B200": 2250, "A100": 312, "L40S": 362,
               "L4": 121, "RTX 5090": 209, "RTX 4090": 165, "RTX 3090": 71}  # fmt: skip

def peak_flops(runtime: Runtime) -> float | None:
    """FLOP/s of this rank's device; None where it is not known."""
    if runtime.device.type != "cuda" or runtime.dtype != torch.bfloat16:
        return None
    return next((1e12 * peak for name, peak in PEAK_TFLOPS.items() if name in runtime.device_name()), None)

# ---------- Optimizer: the partition of the parameters, Adam for embeddings and vectors, Muon for matrices ------------
def parameter_groups(model: Model) -> dict[str, list[nn.Parameter]]:
    """Every parameter in exactly one of embed, head, matrix, scalar, as the model's table says."""
    groups = {"embed": [], "head": [], "matrix": [], "scalar": []}
    for name, p in model.named_parameters():
        groups[model.row(name).group].append(p)
    return groups

def newton_schulz(stack: Tensor, steps: int) -> Tensor:
    """Bring the singular values of each matrix of `stack` [n, rows, cols] near 1 (about 0.7 to 1.2) by quintic
    iterations after division by its Frobenius norm. Source: Keller Jordan, Muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = stack.size(-2) > stack.size(-1)
    x = stack.mT if tall else stack
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x

class Muon(torch.optim.Optimizer):
    """Momentum, then an orthogonalised update, for the matrices inside the blocks; not for embeddings and heads.

    m = mu * m + g;  u = g + mu * m (Nesterov);  p -= lr * sqrt(max(1, rows / cols)) * orthogonal(u)
    Before that, `row_norm` brings the rows of u to norm 1, and `weight_decay` (decoupled) takes lr * weight_decay * p.
    Rank r owns every world_size-th matrix, and keeps the momentum of no other; the updates are summed."""
    def __init__(self, params, lr: float, momentum: float, steps: int, runtime, row_norm=False, weight_decay=0.0):
        options = dict(lr=lr, momentum=momentum, steps=steps, row_norm=row_norm, weight_decay=weight_decay)
        super().__init__(params, options)
        self.runtime = runtime
        shapes = [tuple(p.shape) for group in self.param_groups for p in group["params"]]
        assert all(len(shape) == 2 for shape in shapes), f"Muon is for matrices, not for shapes {shapes}"

    def own(self, params: list[Tensor]) -> list[Tensor]:
        return params[self.runtime.rank :: self.runtime.world_size]

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            # One flat buffer for the updates of all matrices, so that ranks need a single reduction.
            sizes = [p.numel() for p in params]
            flat = torch.zeros(sum(sizes), device=params[0].device, dtype=self.runtime.dtype)
            updates = {p: part.view_as(p) for p, part in zip(params, flat.split(sizes), strict=True)}
            # Matrices of one shape are orthogonalised as one batch: it is faster.
            mine = sorted(self.own(params), key=lambda p: p.shape)
            for _, same in itertools.groupby(mine, key=lambda p: p.shape):
                same = list(same)
                torch._foreach_copy_([updates[p] for p in same], list(self.orthogonal_updates(same, group)))
            if self.runtime.world_size > 1:
                dist.all_reduce(flat)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, [updates[p].to(p.dtype) for p in params], alpha=-group["lr"])

    def orthogonal_updates(self, params: list[Tensor], group: dict) -> Tensor:
        """[n, rows, cols] for n matrices of one shape, whose momentum moves on."""
        for p in params:
            if p not in self.state:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads, momenta = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, grads)
        stack = torch.stack(torch._foreach_add(grads, momenta, alpha=group["momentum"]))
        if group["row_norm"]:
            stack = stack / stack.norm(dim=2, keepdim=True).clamp_min(1e-7)
        stack = stack / stack.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
        rows, cols = params[0].shape
        return newton_schulz(stack.to(self.runtime.dtype), group["steps"]) * max(1, rows / cols) ** 0.5

def build_optimizers(model: Model, config: Config, runtime: Runtime) -> list[torch.optim.Optimizer]:
    """AdamW and Muon, each for the groups that the model has."""
    groups, embed_lr = parameter_groups(model), config.tied_embed_lr if config.tie_embeddings else config.embed_lr
    options = [{"params": groups["embed"], "lr": embed_lr, "weight_decay": config.embed_weight_decay},
               {"params": groups["head"], "lr": config.head_lr, "weight_decay": config.embed_weight_decay},
               {"params": groups["scalar"], "lr": config.scalar_lr, "weight_decay": config.scalar_weight_decay}]
    adam = torch.optim.AdamW([option for option in options if option["params"]], fused=True,
                             betas=(config.beta1, config.beta2), eps=config.adam_eps)
    if not groups["matrix"]:
        return [adam]
    return [adam, Muon(groups["matrix"], config.matrix_lr, config.muon_momentum, config.muon_backend_steps, runtime,
                       row_norm=config.muon_row_norm, weight_decay=config.muon_weight_decay)]

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
    share = min(step / config.muon_momentum_warmup_steps, 1.0) if config.muon_momentum_warmup_steps else 1.0
    return (1 - share) * config.muon_momentum_warmup_start + share * config.muon_momentum

# ---------- Evaluation: loss and bits per byte over the validation text, every target scored exactly once -------------
class Score:
    """From sums over scored targets; `label` ends every line that shows a score of fewer than the text has (`of`)."""
    def __init__(self, nats: float, tokens: int, bytes: int, of: int, seconds: float):
        self.tokens, self.bytes, self.of, self.seconds = tokens, bytes, of, seconds
        self.loss, self.bpb = nats / tokens, nats / math.log(2) / bytes
        self.label = f" partial:{tokens}/{of}" if tokens < of else ""

class Evaluator:
    """Windows of T inputs every S = EVAL_STRIDE tokens (0: T, disjoint); target j is token j + 1. The first window
    scores all its targets, a later one its last S, and none what overhangs the end: each target is scored once."""
    def __init__(self, stream: TokenStream, token_bytes: TokenBytes, config: Config, runtime: Runtime, accum_steps=1):
        self.stream, self.token_bytes, self.runtime, self.of = stream, token_bytes, runtime, len(stream) - 1
        self.targets, self.length = min(config.val_tokens_limit or self.of, self.of), config.train_seq_len
        self.stride = config.eval_stride or self.length
        windows = 1 + max(0, math.ceil((self.targets - self.length) / self.stride))
        rank, world_size = runtime.rank, runtime.world_size
        self.windows = range(windows * rank // world_size, windows * (rank + 1) // world_size)
        per_rank = config.val_batch_size // (self.length * world_size * accum_steps)
        self.batch = max(1, min(per_rank, -(-windows // world_size)))

    def batch_at(self, index: int) -> tuple[Tensor, Tensor, Tensor, range]:
        """Inputs, targets, mask of the scored [batch, T] from window `index` on, and the range of targets they score.

        With T = 4, S = 2 and 7 targets there are three windows, of targets 0123, 2345 and 4567, that score 0123, 45
        and 6. A batch of two from window 1 reads tokens 2 to 8, all but the last of which there are, and scores
        range(4, 7). The last batch of a rank is padded to the shape of the others, since each shape is compiled."""
        T, S = self.length, self.stride
        begin, count = index * S, min(self.batch, self.windows.stop - index)
        first = begin + T - S if index else 0
        scored = range(first, min(begin + (count - 1) * S + T, self.targets))
        tokens = np.zeros((self.batch - 1) * S + T + 1, np.uint16)
        there = scored.stop + 1 - begin
        tokens[:there] = self.stream.read(begin, there)
        rows = to_device(tokens, self.runtime.device).unfold(0, T + 1, S)
        target = torch.arange(begin, begin + len(tokens) - 1, device=rows.device).unfold(0, T, S)
        fresh = (target >= target[:, :1] + T - S) | (target[:, :1] == 0)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), fresh & (target < scored.stop), scored

    @torch.no_grad()
    def run_first_batch(self, model):
        """As `score` begins: for the warm-up."""
        model.eval()
        model(*self.batch_at(self.windows.start)[:2])
        model.train()

    @torch.no_grad()  # not inference_mode: tables cached under it would poison the next training step
    def score(self, model, log=lambda line: None, interrupted=lambda: False) -> Score | None:
        """The Score over all ranks; each takes a contiguous range of the windows. None if a rank was interrupted."""
        sums, count, weight = [], 0, 0
        begun = reported = time.perf_counter()
        model.eval()
        for index in self.windows[:: self.batch]:
            if interrupted():
                break
            inputs, targets, mask, scored = self.batch_at(index)
            sums.append(torch.where(mask, model(inputs, targets), 0.0).sum())  # stays there: no wait in the loop
            count += len(scored)
            weight += self.token_bytes.weigh(self.stream.read(scored.start, len(scored) + 1))
            done = (index + self.batch - self.windows.start) / len(self.windows)
            if time.perf_counter() - reported > 10 and done < 1:
                self.runtime.synchronize()
                reported = time.perf_counter()
                log(f"eval_progress:{done:.0%} eta:{(reported - begun) * (1 - done) / done:.0f}s")
        model.train()
        nats = sum(torch.stack(sums).tolist()) if sums else 0.0
        nats, count, weight, stop = self.runtime.sum([nats, count, weight, bool(interrupted())])
        if stop:
            return None
        require(count == self.targets, f"scored {count:.0f} of {self.targets} targets: a fault of this script")
        require(weight > 0, f"{self.stream.pattern}: the scored targets weigh no bytes: raise VAL_TOKENS_LIMIT")
        require(math.isfinite(nats), f"the validation loss is {nats}: the run diverged: lower the learning rates")
        return Score(nats, int(count), int(weight), self.of, time.perf_counter() - begun)

# ---------- Export: few bits with an fp16 scale per row, GPTQ, zlib or rANS, a checksum, the size, the way back -------
INT8_FORMAT, RANS_FORMAT, INT8_CLIP_QUANTILE = "int8_clean_per_row_v1", "rans_per_row_v1", 0.9999984
INT8_MIN_NUMEL = 65_536  # tensors up to this many elements are kept as floats
TENSOR_CLASSES = ("attn", "mlp", "embed")  # each has a CLIP knob and a table of frequencies

def artifact_names(config: Config) -> tuple[str, str]:
    """(file, tag in log lines): final_model.int8.ptz and int8+zlib by default."""
    return f"final_model.{'rans' if config.codec == 'rans' else 'int8'}.ptz", f"int{config.weight_bits}+{config.codec}"

def quantize_rows(w: Tensor, qmax: int = 127, k: float = 0.0) -> tuple[Tensor, Tensor]:
    """int8 values up to qmax and fp16 scales [rows] of an fp32 matrix: scale = clip / qmax, clip k standard deviations
    of the row, or for k = 0 the 99.99984th percentile of its magnitudes; the scale is 1 for a row of zeros.
    Rounding uses the scale as stored: it errs by at most half of it within."""
    spread, mean = torch.std_mean(w, dim=1, correction=0)  # a row of one value has no spread, but a mean
    clip = torch.maximum(k * spread, mean.abs()) if k else torch.quantile(w.abs(), INT8_CLIP_QUANTILE, dim=1)
    scale = (clip / qmax).clamp(min=2.0**-24).where(clip > 0, 1.0).half()  # fp16 holds nothing smaller
    return (w / scale.float()[:, None]).round().clamp(-qmax, qmax).to(torch.int8), scale

@torch.no_grad()
def collect_hessians(model: Model, loader: TrainLoader, batches: int, runtime: Runtime) -> dict[str, Tensor]:
    """{parameter: X^T X [in, in] in fp32} of the inputs X of every Linear and of the output projection, over so many
    micro-batches of training text on every rank through the uncompiled model; averaged over the ranks."""
    sums = {}
    def add(name, module, inputs):
        x = inputs[0].flatten(0, -2).float()
        sums[name] = sums.get(name, 0) + x.mT @ x

    precision = torch.get_float32_matmul_precision()
    model.eval()
    torch.set_float32_matmul_precision("high")  # the inputs are bf16: TF32 loses nothing of them, and is fast
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                hooks.enter_context(module.register_forward_pre_hook(functools.partial(add, f"{name}.weight")))
        for _ in range(batches):
            add(model.output_weight()[0], model, [model.features(loader.next_step()[0][0])])
    torch.set_float32_matmul_precision(precision)
    model.train()
    if runtime.world_size > 1:
        for total in sums.values():
            dist.all_reduce(total.div_(runtime.world_size))
    return sums

def gptq_round(w: Tensor, scale: Tensor, hessian: Tensor, qmax: int, block: int = 128) -> Tensor:
    """int8 values [rows, in], on the device of the Hessian [in, in]: column after column is rounded, and those that
    follow make up for its error as the Hessian of the layer's squared error says (Frantar et al. 2022, GPTQ)."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    H, columns = hessian.float()[order][:, order], w.to(hessian.device, torch.float32).mT[order]  # [in, rows]
    q, scale, unused = torch.empty_like(columns, dtype=torch.int8), scale.to(H.device).float(), H.diagonal() == 0
    H.diagonal()[unused], columns[unused] = 1.0, 0.0
    for damp in (0.01, 0.1, 1.0, 10.0):
        lower, failed = torch.linalg.cholesky_ex(H + damp * H.diagonal().mean() * torch.eye(len(H), device=H.device))
        U, again = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and not again:
            break
    require(not failed and not again and U.isfinite().all(), "a Hessian is singular: set GPTQ_BATCHES=0 RESUME_FORCE=1")
    for start, stop in itertools.pairwise([*range(0, len(H), block), len(H)]):
        errors = torch.empty_like(columns[start:stop])
        for i in range(start, stop):
            q[i] = (columns[i] / scale).round().clamp(-qmax, qmax)
            errors[i - start] = (columns[i] - q[i] * scale) / U[i, i]
            columns[i + 1 : stop] -= torch.outer(U[i, i + 1 : stop], errors[i - start])
        columns[stop:] -= U[start:stop, stop:].mT @ errors
    return q[order.argsort()].mT.contiguous()

def quantize(state: dict[str, Tensor], config: Config, hessians: dict[str, Tensor] | None = None, multiplier=1.0):
    """The public reference's int8 object, plus `config`, which explains it, and `source`, which names the class of a
    model that is not this script's. GPTQ rounds what is in `hessians`."""
    artifact = {"__quant_format__": INT8_FORMAT, "config": {}} | model_source(config)
    artifact["config"] = {name.lower(): getattr(config, name.lower()) for name in config.told_knobs()}
    parts = ("quantized", "scales", "dtypes", "passthrough", "qmeta", "passthrough_orig_dtypes")
    quantized, scales, dtypes, passthrough, qmeta, original = (artifact.setdefault(part, {}) for part in parts)
    for name, tensor in state.items():
        tensor, dtype = tensor.detach().cpu().contiguous(), str(tensor.dtype).removeprefix("torch.")
        if not tensor.is_floating_point():  # a counter of a model of one's own
            passthrough[name] = tensor
            continue
        row = config.model_class().row(name)
        require((tensor.abs() <= 65504).all(), f"{name} holds values that are non-finite or beyond fp16: the run "
                "diverged, no artifact was made: lower the learning rates")
        if tensor.numel() > INT8_MIN_NUMEL:
            matrix = tensor.float() if tensor.ndim == 2 else tensor.float().view(1, -1)
            qmax = 2 ** (getattr(config, row.bits) - 1) - 1
            q, scale = quantize_rows(matrix, qmax, multiplier * getattr(config, f"clip_{row.clip}"))
            if hessians and name in hessians:
                q = gptq_round(matrix, scale, hessians[name], qmax).cpu()
            quantized[name], dtypes[name] = q.view_as(tensor), dtype
            scales[name] = scale if tensor.ndim == 2 else scale[0]
            if tensor.ndim == 2:
                qmeta[name] = {"scheme": "per_row", "axis": 0}
        elif row.fp32 and config.codec == "zlib":
            passthrough[name] = tensor
        else:
            passthrough[name], original[name] = tensor.half(), dtype
    return artifact

def rans_frequencies(counts: np.ndarray) -> np.ndarray:
    """Frequencies [256] that sum to 2**14, none of them 0 where the count is not, and cost next to no bits."""
    counts = counts + (np.arange(256) == 0) * (counts.sum() == 0)  # without symbols any table will do
    frequencies = np.ceil(counts * (2**14 / counts.sum()))
    while frequencies.sum() > 2**14:  # one less costs count * log2(f / (f - 1)) bits: take it where that is least
        frequencies[np.where(frequencies > 1, counts / (frequencies - 0.5), np.inf).argmin()] -= 1
    return frequencies.astype(np.int64)

def rans_encode(groups: list[np.ndarray], tables: np.ndarray, steps: int = 8192) -> np.ndarray:
    """16-bit words of groups of uint8 symbols, each by its table of frequencies [256] (Duda 2013, rANS; Giesen 2014,
    interleaved): the last states, two words each, then those in the order of decoding. A lane codes about `steps`."""
    lanes, chunks = sum(map(len, groups)) // steps + 1, []
    states = np.full(lanes, 2**16, np.uint64)
    for symbols, freq in zip(groups[::-1], tables[::-1].astype(np.uint64), strict=True):
        first = freq.cumsum() - freq
        for begin in reversed(range(0, len(symbols), lanes)):
            symbol = symbols[begin : begin + lanes]
            x, f = states[: len(symbol)], freq[symbol]
            full = np.flatnonzero(x >= f << 18)  # would leave [2**16, 2**32)
            chunks.append(x[full].astype("<u2"))
            x[full] >>= 16
            x += x // f * (2**14 - f) + first[symbol]
    return np.concatenate([states.astype("<u4").view("<u2"), *reversed(chunks)], dtype="<u2")

def rans_decode(words: np.ndarray, counts: list[int], tables: np.ndarray, steps: int = 8192) -> list[np.ndarray]:
    """The groups, given the length of each. Refuses words that rans_encode would not have written."""
    lanes, groups = sum(counts) // steps + 1, []
    states, position = words[: 2 * lanes].view("<u4").astype(np.int64), 2 * lanes
    for count, freq in zip(counts, tables.astype(np.int64), strict=True):
        # For each of the 2**14 slots of the table: its symbol, and in one number, since looking up is what takes the
        # time, the symbol's frequency (high bits) and how far into the symbol's share the slot lies (low 14 bits).
        symbol_at, slots = np.repeat(np.arange(256, dtype=np.uint8), freq), np.empty(count, np.uint16)
        both_at = freq[symbol_at] << 14 | np.arange(2**14) - (freq.cumsum() - freq)[symbol_at]
        for begin in range(0, count, lanes):
            x = states[: count - begin]
            slot = slots[begin : begin + lanes] = x & 0x3FFF
            both = both_at[slot]
            x[:] = (x >> 14) * (both >> 14) + (both & 0x3FFF)
            low = np.flatnonzero(x < 2**16)
            x[low] = x[low] << 16 | words[position : position + len(low)]
            position += len(low)
        groups.append(symbol_at[slots])
    require(position == len(words) and words[1 : 2 * lanes : 2].all() and (states == 2**16).all(), "its stream is odd")
    return groups

def rans_tables(names, config: Config) -> list[int]:
    """Which table codes each tensor."""
    return [TENSOR_CLASSES.index(config.model_class().row(name).clip) for name in names]

def rans_pack(artifact: dict, config: Config) -> dict:
    """An int8 object with its values in one stream, by a table per tensor class, and their shapes in their place."""
    tensors, kinds = artifact["quantized"], rans_tables(artifact["quantized"], config)
    groups = [q.flatten().numpy().view(np.uint8) for q in tensors.values()]
    counts = np.zeros((len(TENSOR_CLASSES), 256))
    for symbols, kind in zip(groups, kinds, strict=True):
        counts[kind] += np.bincount(symbols, minlength=256)
    tables = np.stack([rans_frequencies(row) for row in counts])
    stream = torch.from_numpy(rans_encode(groups, tables[kinds]).view(np.uint8))
    return artifact | {"__quant_format__": RANS_FORMAT, "quantized": {name: [*q.shape] for name, q in tensors.items()},
                       "stream": stream, "tables": torch.from_numpy(tables.astype(np.int16))}

def rans_unpack(artifact: dict, config: Config) -> dict:
    """The int8 object of what rans_pack made."""
    shapes, tables = artifact["quantized"], artifact["tables"].numpy()[rans_tables(artifact["quantized"], config)]
    sizes = [math.prod(shape) for shape in shapes.values()]
    groups = rans_decode(artifact["stream"].numpy().view("<u2"), sizes, tables)
    values = {name: torch.from_numpy(q.view(np.int8)) for name, q in zip(shapes, groups, strict=True)}
    return artifact | {"quantized": {name: q.view(shapes[name]) for name, q in values.items()}}

def dequantize(artifact: dict, config: Config) -> dict[str, Tensor]:
    """The state dict that an artifact's object of either format stands for, each tensor in its original type."""
    artifact = rans_unpack(artifact, config) if artifact["__quant_format__"] == RANS_FORMAT else artifact
    state = {}
    for name, q in artifact["quantized"].items():
        scale = artifact["scales"][name].float().view(-1, *[1] * (q.ndim - 1))  # one per row, or one in all
        state[name] = q.float().mul_(scale).to(getattr(torch, artifact["dtypes"][name]))
    for name, tensor in artifact["passthrough"].items():
        dtype = artifact.get("passthrough_orig_dtypes", {}).get(name)
        state[name] = tensor.to(getattr(torch, dtype)) if dtype else tensor
    return state

def torch_bytes(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()

def pack(artifact: dict) -> tuple[bytes, int]:
    """(the file: a zlib stream, then the sha256 of that; bytes that were compressed). Readers of the public
    reference's format ignore what follows the stream."""
    raw = torch_bytes(artifact)
    blob = zlib.compress(raw, level=9)
    return blob + hashlib.sha256(blob).digest(), len(raw)

def unpack(blob: bytes) -> dict:
    """The object in a file of this script; tools/evaluate.py reads what others made."""
    require(hashlib.sha256(blob[:-32]).digest() == blob[-32:], "the artifact does not match its checksum: check the disk")
    return torch.load(io.BytesIO(zlib.decompress(blob[:-32])), map_location="cpu", weights_only=True)

def fit_artifact(state: dict[str, Tensor], config: Config, code_bytes: int, hessians=None) -> tuple:
    """(clip multiplier, object, file, bytes that were compressed). With FIT_SIZE, clips of 1/2 to 8 times as wide are
    tried until the artifact just fits: by the size law, a bit less a weight is twice as wide a clip."""
    limit, best, doublings = config.size_limit, None, 0.0
    weights = sum(tensor.numel() for tensor in state.values() if tensor.numel() > INT8_MIN_NUMEL)
    slack = 0.002 * limit  # near enough
    for _ in range(8 if config.fit_size else 1):
        artifact = quantize(state, config, hessians, 2.0**doublings)
        artifact = rans_pack(artifact, config) if config.codec == "rans" else artifact
        blob, packed = pack(artifact)
        spare = limit - code_bytes - len(blob)
        rank = (spare >= 0, -abs(spare))  # one that fits before one that does not, then the nearest
        if best is None or rank > best[0]:
            best = rank, (2.0**doublings, artifact, blob, packed)
        excess_bits = 8 * (slack / 2 - spare) / max(weights, 1)
        before, doublings = doublings, min(max(doublings + excess_bits, -1.0), 3.0)
        if 0 <= spare < slack or doublings == before:
            break
    return best[1]

def export(state: dict[str, Tensor], config: Config, folder: RunFolder, code_bytes: int, hessians=None) -> dict:
    """Write final_model.pt and the artifact; log the sizes and return them for result.json."""
    raw, limit, (name, tag) = torch_bytes(state), config.size_limit, artifact_names(config)
    folder.write("final_model.pt", raw)  # first: whatever fails from here on, the weights are there
    multiplier, artifact, blob, packed = fit_artifact(state, config, code_bytes, hessians)
    folder.write(name, blob)
    payload = sum(t.nbytes for t in torch.utils._pytree.tree_leaves(artifact) if isinstance(t, Tensor))
    ratio, total = sum(t.nbytes for t in state.values()) / payload, len(blob) + code_bytes
    verdict = "OK" if total <= limit else "TOO LARGE, NOT A VALID SUBMISSION"
    folder.log(f"Serialized model: {len(raw)} bytes\nCode size: {code_bytes} bytes\n"
               f"Total submission size: {len(raw) + code_bytes} bytes\nSerialized model {tag}: {len(blob)} bytes "
               f"(payload:{payload} raw_torch:{packed} payload_ratio:{ratio:.2f}x)\n"
               f"Total submission size {tag}: {total} bytes\nsize_verdict:{verdict} limit:{limit} "
               f"spare:{limit - total}{f' clip_multiplier:{multiplier:.4f}' * config.fit_size}")
    return {"bytes_model": len(raw), "bytes_artifact": len(blob), "bytes_code": code_bytes, "bytes_total": total,
            "bytes_limit": limit, "sha256_artifact": hashlib.sha256(blob).hexdigest(), "clip_multiplier": multiplier}

# ---------- Training: one step function for the warm-up and for the run, the pace that the clock sets, the loop -------
class Hooks:
    """What a run calls, and when. These do nothing; those of tools/checkpoint.py make checkpoints, resume, listen to
    signals and fit the micro-batch to the memory."""
    stop_signal = 0  # the number of a signal that asks the run to save and end; read between steps and batches
    resumed_at: tuple[int, ...] = ()  # steps at which the run went on, for result.json

    def __init__(self, config: Config, folder: RunFolder):
        self.config, self.folder = config, folder

    def choose_folder(self, stream: TokenStream, sources: dict[str, bytes]):
        """Before the model is built. Here a checkpoint is looked for, and checked to be of this run."""
        self.folder.locate(self.config)
        require(self.config.resume in ("auto", "never") and not self.folder.path.exists(), "without tools/checkpoint.py "
                f"no run goes on: unset RESUME, and give a RUN_ID whose folder {self.folder.path} is not there")

    def before_warm_up(self, trainer: "Trainer"):
        """Model, optimizers and data are as for a new run. Here a checkpoint is put into them."""

    def training(self, begins: bool):
        """From here on, or no longer, a signal waits for the end of a step."""

    def wants_checkpoint(self, trainer: "Trainer") -> bool:
        """Before every step, on every rank; one that wants it suffices."""
        return False

    def save(self, trainer: "Trainer", wait: bool):
        """Between two steps, on every rank; `wait` until the checkpoint is on the disk."""

class Trainer:
    """Model, optimizers and data of one run, and the loop over them."""
    def __init__(self, config: Config, runtime: Runtime, folder, watch: Stopwatch, loader: TrainLoader, hooks: Hooks):
        self.config, self.runtime, self.folder, self.watch = config, runtime, folder, watch
        self.loader, self.hooks = loader, hooks
        # The model; the same compiled, which scores; and that under DDP, which trains. They share their weights.
        self.model, self.compiled_model, self.note = build_model(config, runtime)
        self.train_model, self.optimizers = self.compiled_model, self.model.optimizers(config, runtime)
        torch.manual_seed(config.seed + runtime.rank)  # of what a model draws while it trains, such as dropout
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["base_lr"] = group["lr"]  # which the schedule scales
        if runtime.world_size > 1:  # all ranks have the same tables: no buffers need to be sent around
            names = inspect.signature(DistributedDataParallel).parameters  # torch 2.13 renamed it
            name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
            self.train_model = DistributedDataParallel(self.compiled_model, **{name: False})
        self.average = [p.detach().float().clone() for p in self.model.parameters() if config.ema_decay]
        self.calibration = -(-config.gptq_batches // runtime.world_size)  # micro-batches of this rank for GPTQ
        self.reserve, self.hessians = 0.0, {}  # seconds of the clock that are kept for them; what they give
        # All steps are done, and their last checkpoint; the weights are no longer those of the training.
        self.steps, self.finished, self.exporting = 0, False, False
        self.grad_norm = torch.zeros((), device=runtime.device)  # of the last step, where GRAD_CLIP_NORM asks for it
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
        """Put the average, if there is one, in the place of the weights; calibrate it, if GPTQ is to round it."""
        self.exporting = True
        for p, average in zip(self.model.parameters(), self.average, strict=False):
            p.copy_(average)
        if self.calibration:
            self.hessians = collect_hessians(self.model, self.loader, self.calibration, self.runtime)

    def warm_up(self, evaluator: Evaluator):
        """Compile every path with real steps, then put weights, optimizers, RNG and data back exactly as they were."""
        parts, position = [self.model, *self.optimizers], self.loader.position
        total = 0 if self.finished else self.config.warmup_steps
        before = copy.deepcopy([part.state_dict() for part in parts]) if total else []
        with torch.random.fork_rng([self.runtime.device] if self.runtime.device.type == "cuda" else []):
            for looping in [False, True] if self.model.has_loops else [False]:
                self.model.looping = looping
                for step in range(1, total + 1):
                    began = self.watch.elapsed("compile")
                    self.step(1.0, self.config.muon_momentum)
                    self.runtime.synchronize()
                    self.folder.log(f"warmup_step:{step}/{total}{' looping' * looping}")
                    if step == total > 1:  # the first step compiles; the last tells how long one takes
                        self.recent.append(self.watch.elapsed("compile") - began)
                evaluator.run_first_batch(self.compiled_model)
            for _ in range(2 if self.calibration else 0):  # how much of the clock to keep for it
                began = self.watch.elapsed("compile")
                collect_hessians(self.model, self.loader, 1, self.runtime)
                self.runtime.synchronize()
                self.reserve = 1.5 * self.calibration * (self.watch.elapsed("compile") - began)
                require(self.reserve < (self.config.max_wallclock_seconds or math.inf), "GPTQ_BATCHES="
                        f"{self.config.gptq_batches} takes {self.reserve:.0f} s, the whole clock: use fewer")
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
        decision = [self.model.lr_scale(config, self.steps, progress), stop, stop or progress >= config.loop_start]
        signals = [not stop and self.hooks.wants_checkpoint(self), bool(self.hooks.stop_signal)]
        scale, stop, looping, save, leave = runtime.sum([*(decision if runtime.is_master else [0.0] * 3), *signals])
        self.model.looping = bool(looping) and self.model.has_loops
        return scale, bool(stop), bool(save), bool(leave)

    def settle(self, keep: int):
        """Log the steps that are done, all but the last `keep` dispatched: their losses arrive while those run."""
        config = self.config
        while len(self.pending) > keep:
            step, scale, told, event = self.pending.popleft()
            if event:
                event.synchronize()
            (loss, norm), clock = told.tolist(), self.watch.elapsed("training")
            self.recent.append(clock - self.settled_at)
            self.settled_at = clock
            if not math.isfinite(loss):
                raise UserError(f"step {step}: the loss is {loss}: nothing was exported: lower MATRIX_LR, "
                                "TIED_EMBED_LR and SCALAR_LR, or set GRAD_CLIP_NORM")
            if config.train_log_every and (step <= 10 or step % config.train_log_every == 0):
                line = f"step:{step}/{config.iterations} train_loss:{loss:.4f} {times(step, clock)}"
                self.folder.log(f"{line} {self.speed()}{f' grad_norm:{norm:.4f}' * bool(config.grad_clip_norm)}")
            numbers = {"step": step, "train_loss": loss, "lr_scale": scale, "train_seconds": round(clock, 4)}
            numbers |= {"grad_norm": norm} if config.grad_clip_norm else {}
            self.folder.append("metrics.jsonl", json.dumps(numbers))

    def speed(self) -> str:
        """Over the last steps: tokens per second of all ranks, and what share of their devices' FLOP/s that takes."""
        speed = self.config.train_batch_tokens / max(statistics.fmean(self.recent), 1e-9)
        flops, peak = speed * self.model.flops_per_token(self.config.train_seq_len), peak_flops(self.runtime)
        return f"tok/s:{speed:.0f}" + (f" mfu:{flops / peak / self.runtime.world_size:.1%}" if peak else "")

    def validate(self, evaluator: Evaluator) -> Score | None:
        """The Score, logged, while the training clock stands still; None if a signal came in between."""
        self.settle(keep=0)
        self.watch.switch("evaluation")
        score = evaluator.score(self.compiled_model, self.folder.log, lambda: self.hooks.stop_signal)
        self.watch.switch("training")
        self.settled_at = clock = self.watch.elapsed("training")
        if score:
            self.folder.log(f"step:{self.steps}/{self.config.iterations} val_loss:{score.loss:.4f} "
                            f"val_bpb:{score.bpb:.4f} {times(self.steps, clock)}{score.label}")
            numbers = {"val_loss": score.loss, "val_bpb": score.bpb, "partial": bool(score.label)}
            self.folder.append("metrics.jsonl", json.dumps({"step": self.steps, **numbers}))
        return score

    def stop(self):
        """After the last step: a checkpoint first, so that a killed validation or export goes on from here; then the
        weights become what is exported."""
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
            every = config.val_loss_every
            if stop or (every and self.steps % every == 0 and (self.steps or config.val_at_start)):
                score = self.validate(evaluator)
                if not score:
                    continue
            if stop:
                if self.steps < config.iterations:
                    clock = 1000 * self.watch.elapsed("training")
                    self.folder.log(f"stopping_early: wallclock_cap train_time:{clock:.0f}ms "
                                    f"step:{self.steps}/{config.iterations}")
                return score
            loss, event = self.step(scale, muon_momentum(config, self.steps)), None
            if self.average:
                self.update_average()
            self.steps += 1
            if runtime.world_size > 1:
                dist.all_reduce(loss)
                loss /= runtime.world_size
            told = torch.stack([loss, self.grad_norm])
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
    path, key = Path(__file__).resolve().parent / "tools" / f"{name}.py", f"train_gpt.tools.{name}"
    if key not in sys.modules and path.is_file():
        spec = importlib.util.spec_from_file_location(key, path)
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    require(key in sys.modules or without, f"{path} is not there: take it from the repository")
    if key not in sys.modules:
        log(f"warning: tools/{name}.py is not beside the script: {without}")
    return sys.modules.get(key)

def source_paths(config: Config) -> dict[str, Path]:
    """{name in the run folder: path} of the files that shape a run: this script; and of a model in a file of its own
    that file, with what it has imported from its own folder."""
    script, paths = Path(__file__).resolve(), {}
    for cls in (type(config), config.model_class()):
        if cls.__module__ != __name__:
            folder = Path(inspect.getfile(cls)).resolve().parent
            files = [Path(module.__file__).resolve() for module in list(sys.modules.values())
                     if getattr(module, "__file__", None)]
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
    require(not config.smear_gate or token_bytes.start in (config.start_token, -1),
            f"START_TOKEN={config.start_token}, but documents begin with token {token_bytes.start}: set that")
    folder.log(f"val_loader:shards pattern={stream.pattern} tokens:{len(stream) - 1}")
    facts = {}
    if folder.runtime.is_master:
        line, facts = audit(token_bytes, stream, config.data_path)
        folder.log(line)
    return stream, token_bytes, facts

def log_final(label: str, score: Score, folder: RunFolder):
    folder.log(f"{label} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} eval_time:{1000 * score.seconds:.0f}ms"
               f"{score.label}\n{label}_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f} "
               f"tokens:{score.tokens} bytes:{score.bytes}{score.label}")

def prepare(config: Config, folder: RunFolder, sources: dict[str, bytes], watch: Stopwatch):
    """(trainer, new or resumed, and what open_text returns), after all that the user brought has been checked."""
    runtime, defaults = folder.runtime, type(config)().texts()
    knobs = [f"{' ' if text == defaults.get(name) else '*'} {name}={text}" for name, text in config.texts().items()]
    check = tool("check", "no hints on environment variables that are almost knobs", folder.log)
    folder.log("\n".join([*knobs, *(check.typo_warnings(os.environ, config.knobs()) if check else [])]))
    accum_steps = config.accumulation_steps(runtime.world_size, runtime.device.type)
    stream = TokenStream(config.data_path, "train", config.vocab_size)
    folder.log(f"train_loader:shards pattern={stream.pattern} tokens:{len(stream)}")
    if runtime.is_master:
        stream.read(0, len(stream.shards[0]))  # checks its tokens; later shards as they are read
    module = tool("checkpoint", "no checkpoints, no resuming, no fitting of micro-batches to the memory", folder.log)
    hooks = (module.Checkpoints if module else Hooks)(config, folder)
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
    folder.log(f"{trainer.note}\nmodel_params:{params}\nseed:{config.seed}\nrun_folder:{folder.path}\n"
               f"world_size:{runtime.world_size} grad_accum_steps:{accum_steps}")
    evaluator = Evaluator(val_stream, token_bytes, config, runtime, accum_steps)
    trainer.warm_up(evaluator)
    watch.switch("training")
    trainer.hooks.training(True)
    before = trainer.train(evaluator)
    trainer.hooks.training(False)
    watch.switch("export")
    limit, over = config.max_wallclock_seconds, watch.seconds["training"] - config.max_wallclock_seconds
    if limit and over > 0:
        folder.log(f"clock_verdict:{over:.3f}s OVER MAX_WALLCLOCK_SECONDS={limit}, NOT A VALID SUBMISSION")
    if runtime.device.type == "cuda":
        folder.log(f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB "
                   f"reserved: {torch.cuda.max_memory_reserved() >> 20} MiB")
    state, (name, tag), artifact = trainer.model.state_dict(), artifact_names(config), None
    if runtime.is_master:
        code_bytes = sum(map(len, sources.values()))
        facts |= export(state, trainer.config, folder, code_bytes, trainer.hessians)
        artifact = (folder.path / name).read_bytes()
    # Rank 0 reads the file back and the others get its bytes: hosts need no common disk to score the artifact.
    trainer.model.load_state_dict(dequantize(unpack(runtime.share(artifact)), config))
    watch.switch("evaluation")
    after = evaluator.score(trainer.compiled_model, folder.log)
    watch.switch("export")
    log_final(f"final_{tag.replace('+', '_')}_roundtrip", after, folder)
    if runtime.is_master:
        write_result(trainer, before, after, sources, facts | {"sha256_tokenizer": token_bytes.sha256})
    if config.sample_prompt and runtime.is_master:
        folder.log("".join(["sample: ", *tool("sample").generate(trainer.model, config, token_bytes)]))

def write_result(trainer: Trainer, before: Score, after: Score, sources: dict[str, bytes], facts: dict):
    """result.json of a finished run: the Scores of the weights and of the artifact, time, machine, sources, `facts`."""
    config, runtime, folder, watch = trainer.config, trainer.runtime, trainer.folder, trainer.watch
    require(after.label or after.bytes == facts["val_bytes"],
            f"scored {after.bytes} bytes, but the text has {facts['val_bytes']}: a fault of this script")
    limit, trained = config.max_wallclock_seconds, watch.seconds["training"]
    hashes = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in sources.items()}
    result = {
        "run_id": folder.run_id, "seed": config.seed, "steps": trainer.steps,
        "model_params": sum(p.numel() for p in trainer.model.parameters()),
        "val_loss": after.loss, "val_bpb": after.bpb, "pre_quant_val_loss": before.loss,
        "pre_quant_val_bpb": before.bpb, "partial": bool(after.label), "scored_tokens": after.tokens,
        "scored_bytes": after.bytes, "val_tokens": after.of, "eval_stride": config.eval_stride,
        "eval_seconds": round(after.seconds, 3), "train_tokens": trainer.steps * config.train_batch_tokens,
        "over_clock": bool(limit and trained > limit),
        "seconds": {phase: round(seconds, 3) for phase, seconds in watch.seconds.items()},
        "step_avg_ms": 1000 * trained / max(trainer.steps, 1), "world_size": runtime.world_size,
        "resumed_at": trainer.hooks.resumed_at, "grad_accum_steps": trainer.loader.accum_steps,
        "device": runtime.device_name(), "dtype": str(runtime.dtype), "note": trainer.note, "cuda": torch.version.cuda,
        "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(),
        "platform": platform.platform(), "sha256_code": hashes["train_gpt.py"]["sha256"], "sources": hashes, **facts,
    }  # fmt: skip
    folder.write("result.json", (json.dumps(result, indent=1) + "\n").encode())

# ---------- main: wiring only -----------------------------------------------------------------------------------------
def main(argv: list[str] | None = None, config_class: type[Config] = Config) -> int:
    """The exit code. A model file hands over its own Config, which names its model: all else is this script's."""
    argv = sys.argv[1:] if argv is None else argv
    folder, code = None, 0
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
        if isinstance(error, RuntimeError):
            if not is_out_of_memory(error) and not (folder and folder.runtime.world_size > 1):
                raise
            if not is_out_of_memory(error):
                traceback.print_exc()
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
    sys.modules["train_gpt"] = sys.modules["__main__"]  # for the tools, whatever this file is called
    sys.exit(main())
