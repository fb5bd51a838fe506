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
import difflib
import functools
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import platform
import re
import signal
import sys
import time
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
def knob(default, meaning: str, low=None, high=None, choices=(), free: bool = False, model: bool = False):
    """Bounds are inclusive. What is not `free` stays the same at a resume; an artifact tells what is of the `model`."""
    high = 2**32 if type(default) is int and high is None else high  # more of anything is a slip, and would hang
    metadata = {"meaning": meaning, "allowed": (low, high, choices), "free": free, "model": model}
    return dataclasses.field(default=default, metadata=metadata)

free, model = functools.partial(knob, free=True), functools.partial(knob, model=True)

@dataclasses.dataclass(frozen=True)
class Config:
    """A field's name in capitals is its environment variable."""

    mode: str = free("train", "what this call does", choices=("train", "check", "eval", "sample"))
    data_path: str = free("./data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_NNNNNN.bin shards")
    tokenizer_path: str = free("./data/tokenizers/fineweb_1024_bpe.model", "a .model, a name of tiktoken's, or bytes")
    log_dir: str = free("./logs", "folder of the run folders")
    run_id: str = free("", "name of the run folder; empty: a time stamp")
    seed: int = knob(1337, "seed of the initial weights, and of a sample", 0, 2**63 - 1)
    checkpoint_every_seconds: float = free(-1.0, "seconds between checkpoints; 0: one at the end; -1: 60 or 0", -1)
    resume: str = free("auto", "auto: go on in a run folder that exists; never; or the PATH of a checkpoint")
    resume_force: bool = free(False, "resume although knobs that shape the result differ")
    device: str = free("auto", "device of every rank", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = knob("auto", "type of activations and matrix products", choices=("auto", "bfloat16", "float32"))
    compile: str = free("auto", "torch.compile; auto: on where a compiler works", choices=("auto", "0", "1"))
    attention: str = free("auto", "attention backend; blocked is our own, by plain products",
                          choices=("auto", "flash3", "cudnn", "flash", "efficient", "math", "blocked"))
    target_world_size: int = free(0, "MODE=check for a run on this many GPUs; 0: for the ranks there are", 0)
    iterations: int = knob(20_000, "optimizer steps at most", 1)
    max_wallclock_seconds: float = knob(600.0, "training clock in seconds, without validation; 0: none", 0)
    warmdown_frac: float = knob(0.3526, "share of the run over which the rates fall linearly to 0", 0, 1)
    lr_floor: float = knob(0.0, "least share of the rates in the warmdown; wants EMA_DECAY", 0, 1)
    loader: str = knob("stream", "order of the training sequences", choices=("stream", "shuffle"))
    warmup_steps: int = free(20, "steps that compile and warm up; all state is restored after them", 0)
    train_batch_tokens: int = knob(393_216, "tokens per step, over all ranks and micro-steps", 1)
    train_seq_len: int = model(4096, "tokens per sequence, in training and in evaluation", 1)
    grad_accum_steps: int = free(0, "micro-steps per step; 0: at least 8 / ranks on GPUs, 1 on CPUs", 0)
    micro_batch_tokens: str = free("auto", "tokens per micro-step and rank at most; auto: what the memory holds")
    train_log_every: int = free(200, "steps between training log lines, after the first ten; 0: none", 0)
    val_loss_every: int = free(1000, "steps between validations; 0: only at the end", 0)
    val_at_start: bool = free(True, "validate before the first step, unless VAL_LOSS_EVERY is 0")
    val_batch_size: int = free(524_288, "tokens per validation batch, over all ranks and micro-steps", 1)
    val_tokens_limit: int = free(0, "score only the first N targets, labelled partial; 0: all", 0)
    eval_stride: int = free(0, "targets scored per sliding window; 0: disjoint windows", 0)
    artifact: str = free("", "the model of MODE=eval and MODE=sample: a final_model.int8.ptz or a .pt")
    sample_prompt: str = free("", r"text to continue; \n is a line break")
    sample_tokens: int = free(200, "tokens of a sample at most", 1)
    temperature: float = free(0.8, "of the softmax of a sample; 0: the likeliest token", 0)
    top_k: int = free(0, "sample from the likeliest k tokens; 0: from all", 0)
    vocab_size: int = model(1024, "tokens in the vocabulary; must match the tokenizer", 2, 65_536)
    num_layers: int = model(9, "transformer blocks", 1)
    model_dim: int = model(512, "width D of the residual stream", 2)
    num_heads: int = model(8, "query heads H", 1)
    num_kv_heads: int = model(4, "key-value heads K; divides NUM_HEADS", 1)
    mlp_mult: float = model(2.0, "hidden width of the MLP over MODEL_DIM, rounded to whole channels", 0.01, 1024)
    mlp_slope: float = model(0.0, "slope below 0 of the MLP's leaky ReLU, which is squared", 0, 1)
    tie_embeddings: bool = model(True, "the output projection is the embedding")
    tied_embed_init_std: float = knob(0.005, "standard deviation of the initial tied embedding", 0)
    rope_base: float = model(10_000.0, "base of the rotary frequencies", 1)
    rope_dims: int = model(0, "dimensions of a head that rotate, the first ones; 0: all", 0)
    qk_gain_init: float = knob(1.5, "initial gain of every query head")
    logit_softcap: float = model(30.0, "logits are squeezed smoothly into +- this", 1e-3)
    x0_mix: bool = model(True, "every block mixes its input with the embedding, by learned vectors")
    ln_scale: bool = model(False, "what a block's norms give is divided by the root of its number, from 1")
    xsa_layers: int = model(0, "in the last n blocks attention leaves out each token's own value (XSA)", 0)
    attn_gate: bool = model(False, "a gate on what each attention head gives")
    gated_skips: bool = model(False, "learned gates between the stream and what the U-net's skips bring")
    parallel_from: int = model(-1, "from this block on, counted from 0, attention and MLP read the same; -1: none", -1)
    smear_gate: bool = model(False, "a gate lets each embedding take some of the one before it in the document")
    start_token: int = model(1, "id that begins a document, where SMEAR_GATE=1 takes nothing", 0)
    loop_layers: str = model("", "first-last blocks, from 0, that run several times (depth recurrence); empty: none")
    loop_passes: int = model(3, "times that LOOP_LAYERS run", 2, 100)
    loop_start: float = knob(0.35, "share of the run from which on LOOP_LAYERS run several times", 0, 1)
    embed_lr: float = knob(0.6, "Adam rate of an untied embedding", 0)
    head_lr: float = knob(0.008, "Adam rate of an untied output projection", 0)
    tied_embed_lr: float = knob(0.03, "Adam rate of the tied embedding", 0)
    scalar_lr: float = knob(0.02, "Adam rate of vectors, scales and gains", 0)
    matrix_lr: float = knob(0.02, "Muon rate of the matrices of the blocks", 0)
    muon_momentum: float = knob(0.99, "Muon momentum after its warm-up", 0, 0.99999)
    muon_momentum_warmup_start: float = knob(0.92, "Muon momentum at step 0", 0, 0.99999)
    muon_momentum_warmup_steps: int = knob(1500, "steps of the linear momentum warm-up", 0)
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", 1)
    muon_weight_decay: float = knob(0.0, "a step takes this times the rate off the matrices", 0)
    muon_row_norm: bool = knob(False, "rows of Muon's update are normalised before it is orthogonalised")
    embed_weight_decay: float = knob(0.0, "AdamW's decay of the embedding and the output projection", 0)
    scalar_weight_decay: float = knob(0.0, "AdamW's decay of vectors, scales and gains", 0)
    ema_decay: float = knob(0.0, "decay of the average of the weights that is exported; 0: no average", 0, 1)
    beta1: float = knob(0.9, "Adam's first decay", 0, 0.999999)
    beta2: float = knob(0.95, "Adam's second decay", 0, 0.999999)
    adam_eps: float = knob(1e-8, "Adam's epsilon", 1e-20)
    grad_clip_norm: float = knob(0.0, "the global gradient norm is clipped to this, after reduction; 0: off", 0)
    codec: str = knob("zlib", "last stage of the artifact; rans is smaller", choices=("zlib", "rans"))
    weight_bits: int = knob(8, "bits of the matrices of the blocks and of an untied output projection", 2, 8)
    embed_bits: int = knob(8, "bits of the embedding", 2, 8)
    clip_attn: float = knob(0.0, "clip of attention rows in standard deviations; 0: their 99.99984th percentile", 0)
    clip_mlp: float = knob(0.0, "the same for the matrices of the MLPs", 0)
    clip_embed: float = knob(0.0, "the same for the embedding and an untied output projection", 0)
    gptq_batches: int = knob(0, "batches of training text that calibrate GPTQ; 0: plain rounding", 0)
    fit_size: bool = knob(False, "scale all clips by one factor so that code and artifact land just under SIZE_LIMIT")
    size_limit: int = knob(16_000_000, "bytes of code plus artifact, decimal", 1)

    @staticmethod
    def load(argv: list[str], environ, told: dict[str, str] | None = None) -> "Config":
        """Defaults < what an artifact has `told` of itself < KEY=VALUE lines of the one file in argv < environment."""
        require(len(argv) <= 1, f"arguments {argv}: expected at most one FILE.env; knobs are environment variables")
        texts = read_env_file(Path(argv[0])) if argv else {}
        for name in texts.keys() - KNOBS.keys():
            close = difflib.get_close_matches(name.upper(), KNOBS, 1)
            raise UserError(f"{argv[0]}: {name} is no knob: {f'did you mean {close[0]}?' if close else 'see --help'}")
        texts = (told or {}) | texts | {name: environ[name] for name in KNOBS if name in environ}
        config = Config(**{KNOBS[name].name: parse(KNOBS[name], text.strip()) for name, text in texts.items()})
        config.check()
        return config

    def check(self):
        """Bounds of each knob, then what must hold between knobs."""
        require(re.fullmatch(r"[\w+=-][\w.+=-]{0,99}|", self.run_id),
                f"RUN_ID={self.run_id!r} cannot name a folder: use letters, digits and . _ + = -, at most 100")
        for name, field in KNOBS.items():
            value, (low, high, choices) = getattr(self, field.name), field.metadata["allowed"]
            require(not choices or value in choices, f"{name}={value}: expected one of {', '.join(choices)}")
            require(low is None or value >= low, f"{name}={value} is too small: the least is {low}")
            require(high is None or value <= high, f"{name}={value} is too large: the most is {high}")
            require(not re.search(r"""".*'|'.*"|[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]""", str(value)),
                    f"{name}={value!r} holds control characters or both kinds of quotes: use another name")
        D, H, K, T = self.model_dim, self.num_heads, self.num_kv_heads, self.train_seq_len
        batch, micro = self.train_batch_tokens, self.micro_batch_tokens
        require(D % (2 * H) == 0, f"MODEL_DIM={D} is no multiple of 2 * NUM_HEADS={H}: use {D + -D % (2 * H)}")
        require(H % K == 0, f"NUM_KV_HEADS={K} does not divide NUM_HEADS={H}: use one of {divisors(H)}")
        require(round(self.mlp_mult * D), f"MLP_MULT={self.mlp_mult} of MODEL_DIM={D} is nothing: raise it")
        require(self.rope_dims % 2 == 0 and self.rope_dims <= D // H, f"ROPE_DIMS={self.rope_dims}: expected an even "
                f"number up to the width of a head, {D // H}")
        loop = re.fullmatch("([0-9]{1,4})-([0-9]{1,4})|", self.loop_layers)
        require(loop and (not loop[1] or int(loop[1]) <= int(loop[2]) < self.num_layers and self.num_layers > 1),
                f"LOOP_LAYERS={self.loop_layers}: expected FIRST-LAST of 2 or more blocks 0 to {self.num_layers - 1}")
        require(self.start_token < self.vocab_size, f"START_TOKEN={self.start_token} is outside VOCAB_SIZE")
        require(batch % T == 0, f"TRAIN_BATCH_TOKENS={batch} is not whole TRAIN_SEQ_LEN={T}: use {-(-batch // T) * T}")
        require(self.eval_stride <= T, f"EVAL_STRIDE={self.eval_stride} is over TRAIN_SEQ_LEN={T}: lower it")
        require(re.fullmatch("auto|0|[1-9][0-9]{,14}", micro) and (micro in ("auto", "0") or int(micro) >= T),
                f"MICRO_BATCH_TOKENS={micro}: expected auto, 0 (unlimited) or at least one TRAIN_SEQ_LEN={T}")
        require(not self.grad_accum_steps or micro in ("auto", "0"),
                "GRAD_ACCUM_STEPS and MICRO_BATCH_TOKENS are both given: unset one, both cut the step")
        require(not self.fit_size or min(self.clip_attn, self.clip_mlp, self.clip_embed) > 0, "FIT_SIZE=1 scales clips "
                "and CLIP_ATTN, CLIP_MLP or CLIP_EMBED is 0: set each above, to about 13, or unset FIT_SIZE")

    def texts(self) -> dict[str, str]:
        """{KNOB: text}, which read back gives this configuration, but for what belongs to one run or one call."""
        values = {name: getattr(self, field.name) for name, field in KNOBS.items()
                  if name not in ("RUN_ID", "MODE", "ARTIFACT", "RESUME", "RESUME_FORCE")}
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

KNOBS = {field.name.upper(): field for field in dataclasses.fields(Config)}

def divisors(n: int) -> list[int]:
    return sorted({d for k in range(1, math.isqrt(n) + 1) if n % k == 0 for d in (k, n // k)})

def parse(field: dataclasses.Field, text: str):
    """The value of a knob from its text; its type is that of its default."""
    kind = type(field.default)
    with contextlib.suppress(ValueError, KeyError, OverflowError):
        value = {"0": False, "1": True}[text] if kind is bool else kind(text)
        if kind is str or math.isfinite(value):
            return value
    noun = {bool: "a switch: use 0 or 1", int: "a whole number", float: "a finite number"}[kind]
    raise UserError(f"{field.name.upper()}={text!r} is not {noun}: the default is {field.default}")

def read_env_file(path: Path) -> dict[str, str]:
    """{KEY: text} of KEY=VALUE lines. `#` starts a comment, a value may stand in quotes, nothing is expanded."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"configuration file {path} cannot be read ({error}): give the path of a FILE.env") from error
    texts = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            match = re.fullmatch(r"""\s*(\w+)\s*=\s*("[^"]*"|'[^']*'|[^"'#\s](?:[^#]*[^#\s])?|)\s*(?:\s#.*)?""", line)
            require(match, f"{path}:{number}: {line.strip()!r} is not a KEY=VALUE line")
            require(match[1] not in texts, f"{path}:{number}: {match[1]} is given twice: keep one")
            texts[match[1]] = match[2][1:-1] if match[2][:1] in ('"', "'") else match[2]
    return texts

# ---------- Runtime: device and ranks, what they tell each other, the run folder with its log, the one stopwatch ------
class Runtime:
    """This process among `world_size` ranks, and its device. Collectives do nothing for one process."""
    def __init__(self, config: Config, environ):
        ranks = [environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))]
        require(all(text.isdecimal() for text in ranks) and int(ranks[0]) < int(ranks[1])
                and (ranks[1] == "1" or "MASTER_ADDR" in environ), "RANK={} WORLD_SIZE={} without a launcher: "
                "start several ranks with torchrun, or unset both".format(*ranks))
        self.rank, self.world_size = map(int, ranks)
        self.is_master = self.rank == 0
        # What signals have asked lifeline.py for; while `patient`, the wish to leave waits for the end of a step.
        self.patient, self.save_asked, self.leave = False, False, 0
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        meant = config.mode == "check" and config.target_world_size  # the GPUs of which need not be here
        kind = next(k for k in available if available[k]) if config.device == "auto" or meant else config.device
        require(available[kind], f"DEVICE={kind}: torch {torch.__version__} sees no such device here: use DEVICE=auto")
        require(kind != "mps" or self.world_size == 1, f"WORLD_SIZE={self.world_size}: use one process, or DEVICE=cpu")
        gpus, local_ranks = torch.cuda.device_count(), int(environ.get("LOCAL_WORLD_SIZE", self.world_size))
        self.device = torch.device(kind, int(environ.get("LOCAL_RANK", 0)) % gpus if kind == "cuda" else None)
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        self.dtype = self.best_dtype() if config.dtype == "auto" else getattr(torch, config.dtype)
        if self.world_size > 1:
            store, rank, world_size = next(dist.rendezvous("env://"))
            if environ.get("GROUP_WORLD_SIZE") == "1":  # at a restart torchrun's store still holds dead ranks' keys
                store = dist.PrefixStore(f"attempt_{environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
            backend = "nccl" if kind == "cuda" and local_ranks <= gpus else "gloo"  # NCCL refuses two ranks on one GPU
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
            # Decisions and float64 sums travel between the hosts: they must not wait for what is queued on the device.
            self.hosts = dist.new_group(backend="gloo")

    def best_dtype(self) -> torch.dtype:
        """bfloat16 where the hardware multiplies it, float32 elsewhere."""
        cpu_tests = [getattr(torch.cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
        native = {"cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False), "mps": bool,
                  "cpu": lambda: any(test() for test in cpu_tests)}[self.device.type]()
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
        self.runtime, self.lines, self.lock, self.header = runtime, [], None, ""

    def locate(self, config: Config, name: str = ""):
        """Choose the folder: RUN_ID, or `name`, or a new time stamp."""
        self.run_id = self.runtime.share(config.run_id or name or time.strftime(f"%Y-%m-%d_%H-%M-%S_{os.getpid()}"))
        self.path = Path(config.log_dir) / self.run_id

    def create(self, config: Config, code: bytes):
        """Make the folder, or open the one that goes on, for this process alone; put configuration and script in it."""
        if not self.runtime.is_master:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / "train.log", "a", encoding="utf-8")
            with contextlib.suppress(ImportError):  # Windows has no such locks
                fcntl = importlib.import_module("fcntl")
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.lock, busy = None, isinstance(error, BlockingIOError)
            raise UserError(f"LOG_DIR={config.log_dir} RUN_ID={self.run_id}: folder {self.path} cannot be opened "
                            f"({'another run is using it' if busy else error.strerror}): choose another") from error
        quoted = {name: f"'{text}'" if '"' in text else f'"{text}"' for name, text in config.texts().items()}
        self.write("config.env", (self.header + "".join(f"{name}={text}\n" for name, text in quoted.items())).encode())
        self.write("train_gpt.py", code)
        self.append("train.log", *self.lines)

    def log(self, line: str):
        if self.runtime.is_master:
            with contextlib.suppress(OSError):  # a terminal or a pipe that is gone must not end the run
                print(line, flush=True)
            self.append("train.log", line) if self.lock else self.lines.append(line)

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
        if self.lock:
            self.append("train.log", *last_words)
            self.lock.close()
            self.lock = None

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
    return bool(re.search("(not enough|can't allocate|out of) memory", str(error)))  # by CPU, CUDA and MPS

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
            pieces.append(self.shards[index][start - self.ends[index] :][:count])  # counted from the shard's end
            count -= len(pieces[-1])
            start += len(pieces[-1])
        tokens = np.concatenate(pieces)
        require(tokens.max() < self.vocab_size, f"{self.pattern}: token {tokens.max()} is outside VOCAB_SIZE="
                f"{self.vocab_size}: set DATA_PATH, TOKENIZER_PATH and VOCAB_SIZE together")
        return tokens

def to_device(tokens: np.ndarray, device: torch.device) -> Tensor:
    """int64 tokens on the device; two bytes a token on the wire, copied asynchronously on CUDA."""
    wire = torch.from_numpy(tokens.view(np.int16))  # torch's own uint16 lacks kernels on some devices
    wire = wire.pin_memory() if device.type == "cuda" else wire
    return wire.to(device, non_blocking=True).long() & 0xFFFF

class TrainLoader:
    """This rank's share of each step; a thread reads the next one ahead. Ranks and micro-steps take contiguous slices
    of a step's sequences: their number does not matter. LOADER=stream: sequence i of the step at `position` p is
    tokens[p + i*T : p + i*T + T + 1]. LOADER=shuffle: it is number p / T + i of an order that takes every piece of the
    text once an epoch; each epoch has a permutation and a phase, where its first piece begins, of its own."""
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

# ---------- Bytes: the tokenizer, and the only place that knows what a token weighs in bytes of text ------------------
class TokenBytes:
    """Bytes of text per token, for three kinds of tokenizer: a SentencePiece .model, a name that tiktoken knows, bytes.
    Special tokens, and ids beyond the tokenizer's own, weigh 0 and are boundaries. A SentencePiece byte piece weighs 1,
    any other piece its UTF-8 text with U+2581 as a space, but a leading U+2581 right after a boundary adds nothing."""
    def __init__(self, path: str, vocab_size: int):
        self.path, leading, is_byte, padding = path, [], [], 1024
        if re.fullmatch(r"bytes|(.*\W)?\w*byte_?260\w*(\.json)?", path):  # pad, bos, eos, unk, then byte b as id b + 4
            raw, self.start, padding = [None] * 4 + [bytes([byte]) for byte in range(256)], 1, 0
            self.encode = lambda text: [byte + 4 for byte in text.encode()]
            self.decode = lambda tokens: bytes(token - 4 for token in tokens if token >= 4)
        elif re.fullmatch(r"\w+", path):
            model = self.model = load_tiktoken(path)
            special, self.start = set(map(model.encode_single_token, model.special_tokens_set)), model.eot_token
            raw = [None if i in special else model.decode_single_token_bytes(i) for i in range(model.n_vocab)]
            self.encode = model.encode_ordinary
            self.decode = lambda tokens: model.decode_bytes([token for token in tokens if token not in special])
        else:
            model = self.model = load_sentencepiece(path)
            ids, self.start, padding = range(model.vocab_size()), model.bos_id(), 0
            pieces, is_byte = [model.id_to_piece(token) for token in ids], [model.is_byte(token) for token in ids]
            require("\u2581" in pieces, f"{path} has no piece for a single space (U+2581): use another tokenizer")
            special = {i for i in ids if model.is_control(i) or model.is_unknown(i) or model.is_unused(i)}
            leading = [piece.startswith("\u2581") and i not in special for i, piece in enumerate(pieces)]
            raw = [piece.removeprefix("\u2581").replace("\u2581", " ").encode() for piece in pieces]
            raw = [None if i in special else b"?" if is_byte[i] else text for i, text in enumerate(raw)]
            self.encode, self.decode = model.encode, lambda tokens: model.decode(tokens).encode()
        self.size, content = len(raw), Path(path).read_bytes() if is_byte else repr(raw).encode()
        self.sha256 = hashlib.sha256(content).hexdigest()
        require(0 <= vocab_size - self.size <= padding, f"VOCAB_SIZE={vocab_size}, but TOKENIZER_PATH={path} has "
                f"{self.size} pieces: set VOCAB_SIZE={self.size}, or the tokenizer that made the shards")
        self.boundary, self.leading_space, self.is_byte = np.ones(vocab_size, bool), *np.zeros((2, vocab_size), bool)
        self.boundary[: self.size] = [piece is None for piece in raw]
        self.leading_space[: len(leading)], self.is_byte[: len(is_byte)] = leading, is_byte
        self.weight = np.array([len(piece or b"") for piece in raw] + [0] * (vocab_size - self.size))

    def weigh(self, tokens: np.ndarray) -> int:
        """Bytes of tokens[1:], each in the context of the token before it."""
        before, target = tokens[:-1], tokens[1:]
        return int(self.weight[target].sum() + np.count_nonzero(self.leading_space[target] & ~self.boundary[before]))

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

# ---------- Model: attention, the architecture, one initialisation rule per parameter ---------------------------------
CONTROL_TENSORS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "skip_gates", "gate", "smear")
GATE_INPUTS = 12  # channels that a gate looks at

def kind_of(name: str) -> str:
    """The last word of a parameter's name, which says what it is: blocks.3.attn.c_q.weight is a c_q."""
    return name.removesuffix(".weight").split(".")[-1]

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
        scores = (q_NGTd[:, :, start:stop].flatten(1, 2) @ k_NTd[:, :stop].mT).unflatten(1, rows).float() * d**-0.5
        hidden = torch.ones(stop - start, stop, dtype=torch.bool, device=scores.device).triu(start + 1)
        weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1).to(v_NTd.dtype).flatten(1, 2)
        outputs.append((weights @ v_NTd[:, :stop]).unflatten(1, rows))
    return torch.cat(outputs, dim=2).view(B, H, T, d)

def choose_attention(config: Config, runtime: Runtime):
    """(function, log line) of the first backend that trains on one real sequence; torch's switches pin SDPA to it."""
    switches = {"flash": "flash", "cudnn": "cudnn", "efficient": "mem_efficient", "math": "math"}
    hopper = runtime.device.type == "cuda" and torch.cuda.get_device_capability(runtime.device)[0] == 9
    cuda = ["flash3", "cudnn", "flash", "efficient", "math"] if hopper else list(switches)
    order = {"cuda": cuda, "mps": ["math", "blocked"],
             "cpu": ["blocked"] if config.train_seq_len <= 1024 else ["flash", "math"]}[runtime.device.type]
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    shapes = [(1, n, config.train_seq_len, config.model_dim // config.num_heads) for n in heads]
    own, failed = {"flash3": (flash3_attention,), "blocked": (blocked_attention,)}, ""
    for name in order if config.attention == "auto" else [config.attention]:
        for attend in own.get(name, (grouped_attention, expanded_attention)):
            for backend, switch in switches.items():
                getattr(torch.backends.cuda, f"enable_{switch}_sdp")(backend == name)
            try:
                options = {"device": runtime.device, "dtype": runtime.dtype, "requires_grad": True}
                attend(*(torch.ones(shape, **options) for shape in shapes)).sum().backward()
                return attend, f"attention:{name} by {attend.__name__}{failed}"
            except (RuntimeError, ImportError) as error:
                failed += f"; {name} {attend.__name__} failed: {error!r:.120}"
    raise UserError(f"ATTENTION={config.attention} does not run on {runtime.device}: use ATTENTION=auto, or a "
                    f"smaller MODEL_DIM or TRAIN_SEQ_LEN{failed}")

def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=2.0**-23)  # computed in fp32, whose own epsilon this is

class Linear(nn.Linear):
    """The fp32 master weight is cast to the type of the input at use; always made with bias=False."""
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

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

class GPT(nn.Module):
    """A U-net of blocks over a normalised embedding. Precision: fp32 masters (the embedding is bf16 on accelerators),
    activations and products in `dtype`, RoPE tables built in fp32 and cast last, norms, softmax and loss in fp32."""
    def __init__(self, config: Config, attend=expanded_attention, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype, self.softcap, self.start_token = dtype, config.logit_softcap, config.start_token
        self.tok_emb = nn.Embedding(config.vocab_size, config.model_dim)
        self.blocks = nn.ModuleList(Block(config, attend, layer) for layer in range(config.num_layers))
        # The order of the blocks, without and with depth recurrence; `looping` says which, from LOOP_START on.
        self.straight, self.looping = list(range(config.num_layers)), bool(config.loop_layers)
        first, last = map(int, config.loop_layers.split("-")) if self.looping else (0, -1)
        again = self.straight[first : last + 1] * (config.loop_passes - 1)
        self.looped = self.straight[: last + 1] + again + self.straight[last + 1 :]
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

    @torch.no_grad()
    def init_weights(self, config: Config):
        """One rule per parameter, drawn on the CPU: every device and every rank starts from the same numbers."""
        generator, tied = torch.Generator().manual_seed(config.seed), config.tie_embeddings
        constants = dict.fromkeys(("proj", "lm_head", "skip_gates", "gate", "smear"), 0.0)
        constants |= dict.fromkeys(("attn_scale", "mlp_scale", "skip_weights"), 1.0)
        constants |= {"resid_mix": torch.eye(2)[:, :1], "q_gain": config.qk_gain_init}
        for name, p in self.named_parameters():
            kind = kind_of(name)
            if kind == "tok_emb":
                p.normal_(std=config.tied_embed_init_std if tied else 1.0, generator=generator)
            elif kind in ("c_q", "c_k", "c_v", "fc"):
                p.uniform_(-(p.size(1) ** -0.5), p.size(1) ** -0.5, generator=generator)
            else:
                assert kind in constants, f"no initialisation rule covers parameter {name}"
                p.copy_(torch.as_tensor(constants[kind]).expand_as(p))

    def features(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, D] in `dtype`: what the output projection sees."""
        T = tokens_BT.size(1)
        cos, sin = self.cos[:T].to(self.dtype), self.sin[:T].to(self.dtype)
        x = rms_norm(self.tok_emb(tokens_BT).to(self.dtype))
        if self.smear is not None:
            share, weights = self.smear[0].to(x.dtype), self.smear[1:].to(x.dtype)
            gate_BT = share * torch.sigmoid(x[:, 1:, :GATE_INPUTS] @ weights) * (tokens_BT[:, 1:] != self.start_token)
            x = torch.cat([x[:, :1], x[:, 1:] + gate_BT[..., None] * x[:, :-1]], dim=1)
        x0, skips, order = x, [], self.looped if self.looping else self.straight
        pushes = len(order) // 2
        for i, layer in enumerate(order):
            if i >= pushes and skips:
                skip = self.skip_weights[i - pushes].to(x.dtype) * skips.pop()
                gates = self.skip_gates
                x = x + skip if gates is None else torch.lerp(skip, x, torch.sigmoid(gates[i - pushes]).to(x.dtype))
            x = self.blocks[layer](x, x0, cos, sin)
            if i < pushes:
                skips.append(x)
        return rms_norm(x)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Losses [B, T] in nats where targets are given, softcapped logits [B, T, V] otherwise; both fp32."""
        x = self.features(tokens_BT)
        logits = F.linear(x, self.tok_emb.weight.to(x.dtype)) if self.lm_head is None else self.lm_head(x)
        logits = self.softcap * torch.tanh(logits.float() / self.softcap)
        if targets_BT is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)

def build_model(config: Config, runtime: Runtime) -> tuple[GPT, nn.Module, str]:
    """(model, the same compiled where that works, what was chosen and why)."""
    attend, attention_note = choose_attention(config, runtime)
    compiled, compile_note = choose_compile(config, runtime)
    model = GPT(config, attend, runtime.dtype).to(runtime.device)
    if runtime.device.type != "cpu":
        model.tok_emb.to(runtime.dtype)
    scorer = torch.compile(model, dynamic=False, fullgraph=True) if compiled else model
    device_note = f"device:{runtime.device} ({runtime.device_name()}) dtype:{str(runtime.dtype).removeprefix('torch.')}"
    return model, scorer, f"{device_note}\n{attention_note}\ncompile:{int(compiled)} ({compile_note})"

# ---------- Optimizer: the partition of the parameters, Adam for embeddings and vectors, Muon for matrices ------------
def parameter_groups(model: GPT) -> dict[str, list[nn.Parameter]]:
    """Every parameter in exactly one of embed, head, matrix, scalar; raises for one that no rule covers."""
    groups = {"embed": [], "head": [], "matrix": [], "scalar": []}
    for name, p in model.named_parameters():
        kind = kind_of(name)
        group = {"tok_emb": "embed", "lm_head": "head"}.get(kind) or ("scalar" if kind in CONTROL_TENSORS else "matrix")
        assert group != "matrix" or (name.startswith("blocks.") and p.ndim == 2), f"no group covers parameter {name}"
        groups[group].append(p)
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
    Rank r owns every world_size-th matrix; the updates are summed. Those of one shape are one batch: it is faster."""
    def __init__(self, params, lr: float, momentum: float, steps: int, runtime, row_norm=False, weight_decay=0.0):
        options = dict(lr=lr, momentum=momentum, steps=steps, row_norm=row_norm, weight_decay=weight_decay)
        super().__init__(params, options)
        self.runtime = runtime

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, mu = group["params"], group["momentum"]
            total = torch.zeros(sum(p.numel() for p in params), device=params[0].device, dtype=self.runtime.dtype)
            parts = total.split([p.numel() for p in params])
            updates = {p: part.view_as(p) for p, part in zip(params, parts, strict=True)}
            mine = sorted(params[self.runtime.rank :: self.runtime.world_size], key=lambda p: p.shape)
            for shape, same in itertools.groupby(mine, key=lambda p: p.shape):
                same = list(same)
                for p in same:
                    if p not in self.state:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                grads, momenta = [p.grad for p in same], [self.state[p]["momentum_buffer"] for p in same]
                torch._foreach_mul_(momenta, mu)
                torch._foreach_add_(momenta, grads)
                stack = torch.stack(torch._foreach_add(grads, momenta, alpha=mu))
                if group["row_norm"]:
                    stack = stack / stack.norm(dim=2, keepdim=True).clamp_min(1e-7)
                stack = (stack / stack.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)).to(self.runtime.dtype)
                stack = newton_schulz(stack, group["steps"]) * max(1, shape[0] / shape[1]) ** 0.5
                torch._foreach_copy_([updates[p] for p in same], list(stack))
            if self.runtime.world_size > 1:
                dist.all_reduce(total)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, [updates[p].to(p.dtype) for p in params], alpha=-group["lr"])

def build_optimizers(model: GPT, config: Config, runtime: Runtime) -> list[torch.optim.Optimizer]:
    """[AdamW, Muon]; each group keeps its full rate as `base_lr`, which the schedule scales."""
    groups, embed_lr = parameter_groups(model), config.tied_embed_lr if config.tie_embeddings else config.embed_lr
    options = [{"params": groups["embed"], "lr": embed_lr, "weight_decay": config.embed_weight_decay},
               {"params": groups["head"], "lr": config.head_lr, "weight_decay": config.embed_weight_decay},
               {"params": groups["scalar"], "lr": config.scalar_lr, "weight_decay": config.scalar_weight_decay}]
    adam = torch.optim.AdamW([option for option in options if option["params"]], fused=True,
                             betas=(config.beta1, config.beta2), eps=config.adam_eps)
    muon = Muon(groups["matrix"], config.matrix_lr, config.muon_momentum, config.muon_backend_steps, runtime,
                row_norm=config.muon_row_norm, weight_decay=config.muon_weight_decay)
    for group in adam.param_groups + muon.param_groups:
        group["base_lr"] = group["lr"]
    return [adam, muon]

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
        """Inputs, targets, mask of the scored [batch, T] from window `index` on, padded to one shape; their range."""
        begin, windows = index * self.stride, min(self.batch, self.windows.stop - index)
        end = begin + (windows - 1) * self.stride + self.length
        scored = range(begin + self.length - self.stride if index else 0, min(end, self.targets))
        tokens = np.zeros((self.batch - 1) * self.stride + self.length + 1, np.uint16)
        tokens[: scored.stop + 1 - begin] = self.stream.read(begin, scored.stop + 1 - begin)
        rows = to_device(tokens, self.runtime.device).unfold(0, self.length + 1, self.stride)
        target = torch.arange(begin, begin + len(tokens) - 1, device=rows.device).unfold(0, self.length, self.stride)
        fresh = (target >= target[:, :1] + self.length - self.stride) | (target[:, :1] == 0)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), fresh & (target < scored.stop), scored

    @torch.no_grad()  # not inference_mode: tables cached under it would poison the next training step
    def score(self, model, log=lambda line: None) -> Score | None:
        """The Score over all ranks; each takes a contiguous range of the windows. None if a rank was told to leave."""
        nats, count, weight = 0.0, 0, 0
        begun = reported = time.perf_counter()
        for index in self.windows[:: self.batch]:
            if self.runtime.leave:
                break
            inputs, targets, mask, scored = self.batch_at(index)
            nats += float(torch.where(mask, model(inputs, targets), 0.0).sum())
            count += len(scored)
            weight += self.token_bytes.weigh(self.stream.read(scored.start, len(scored) + 1))
            now, done = time.perf_counter(), (index + self.batch - self.windows.start) / len(self.windows)
            if now - reported > 10 and done < 1:
                log(f"eval_progress:{done:.0%} eta:{(now - begun) * (1 - done) / done:.0f}s")
                reported = now
        nats, count, weight, leave = self.runtime.sum([nats, count, weight, self.runtime.leave])
        if leave:
            return None
        require(count == self.targets, f"scored {count:.0f} of {self.targets} targets: a fault of this script")
        require(weight > 0, f"{self.stream.pattern}: the scored targets weigh no bytes: raise VAL_TOKENS_LIMIT")
        require(math.isfinite(nats), f"the validation loss is {nats}: the run diverged: lower the learning rates")
        return Score(nats, int(count), int(weight), self.of, time.perf_counter() - begun)

# ---------- Export: few bits with an fp16 scale per row, GPTQ, zlib or rANS, a checksum, the size, the way back -------
INT8_FORMAT, RANS_FORMAT, INT8_CLIP_QUANTILE = "int8_clean_per_row_v1", "rans_per_row_v1", 0.9999984
INT8_MIN_NUMEL = 65_536  # tensors up to this many elements are kept as floats
UNPACKED_LIMIT = 2**30  # bytes that an artifact may unpack to: far more than any within SIZE_LIMIT needs
TENSOR_CLASSES = ("attn", "mlp", "embed")  # each has a CLIP knob and a table of frequencies
MODEL_KNOBS = tuple(name for name, field in KNOBS.items() if field.metadata["model"])
# What an artifact tells of its configuration: the model, and what its score depends on to the last digit.
TOLD_KNOBS = (*MODEL_KNOBS, "EVAL_STRIDE", "VAL_BATCH_SIZE", "TRAIN_BATCH_TOKENS", "GRAD_ACCUM_STEPS",
              "MICRO_BATCH_TOKENS", "CODEC", "WEIGHT_BITS")

def artifact_names(config: Config) -> tuple[str, str]:
    """(file, tag in log lines): final_model.int8.ptz and int8+zlib by default."""
    return f"final_model.{'rans' if config.codec == 'rans' else 'int8'}.ptz", f"int{config.weight_bits}+{config.codec}"

def tensor_class(name: str) -> str:
    return next((part for part in TENSOR_CLASSES if f".{part}." in name), "embed")

def quantize_rows(w: Tensor, qmax: int = 127, k: float = 0.0) -> tuple[Tensor, Tensor]:
    """int8 values up to qmax and fp16 scales [rows] of an fp32 matrix: scale = clip / qmax, clip k standard deviations
    of the row, or for k = 0 the 99.99984th percentile of its magnitudes; the scale is 1 for a row of zeros.
    Rounding uses the scale as stored: it errs by at most half of it within."""
    spread, mean = torch.std_mean(w, dim=1, correction=0)  # a row of one value has no spread, but a mean
    clip = torch.maximum(k * spread, mean.abs()) if k else torch.quantile(w.abs(), INT8_CLIP_QUANTILE, dim=1)
    scale = (clip / qmax).clamp(min=2.0**-24).where(clip > 0, 1.0).half()  # fp16 holds nothing smaller
    return (w / scale.float()[:, None]).round().clamp(-qmax, qmax).to(torch.int8), scale

@torch.no_grad()
def collect_hessians(model: GPT, loader: TrainLoader, batches: int, runtime: Runtime) -> dict[str, Tensor]:
    """{parameter: X^T X [in, in] in fp32} of the inputs X of every Linear and of the output projection, over so many
    micro-batches of training text on every rank through the uncompiled model; averaged over the ranks."""
    sums, head = {}, "tok_emb.weight" if model.lm_head is None else "lm_head.weight"
    def add(name, module, inputs):
        x = inputs[0].flatten(0, -2).float()
        sums[name] = sums.get(name, 0) + x.mT @ x

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                hooks.enter_context(module.register_forward_pre_hook(functools.partial(add, f"{name}.weight")))
        for _ in range(batches):
            add(head, model, [model.features(loader.next_step()[0][0])])
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
    """The public reference's int8 object, plus `config`, which explains it. GPTQ rounds what is in `hessians`."""
    told = {name.lower(): getattr(config, name.lower()) for name in TOLD_KNOBS}
    artifact = {"__quant_format__": INT8_FORMAT, "config": told}
    parts = ("quantized", "scales", "dtypes", "passthrough", "qmeta", "passthrough_orig_dtypes")
    quantized, scales, dtypes, passthrough, qmeta, original = (artifact.setdefault(part, {}) for part in parts)
    for name, tensor in state.items():
        tensor, dtype = tensor.detach().cpu().contiguous(), str(tensor.dtype).removeprefix("torch.")
        require((tensor.abs() <= 65504).all(), f"{name} holds values that are non-finite or beyond fp16: the run "
                "diverged, no artifact was made: lower the learning rates")
        if tensor.is_floating_point() and tensor.numel() > INT8_MIN_NUMEL:
            rows = tensor.float() if tensor.ndim == 2 else tensor.float().view(1, -1)
            qmax = 2 ** ((config.embed_bits if kind_of(name) == "tok_emb" else config.weight_bits) - 1) - 1
            k = multiplier * getattr(config, f"clip_{tensor_class(name)}")
            q, scale = quantize_rows(rows, qmax, k)
            q = gptq_round(rows, scale, hessians[name], qmax).cpu() if hessians and name in hessians else q
            quantized[name], dtypes[name] = q.view_as(tensor), dtype
            scales[name] = scale if tensor.ndim == 2 else scale[0]
            if tensor.ndim == 2:
                qmeta[name] = {"scheme": "per_row", "axis": 0}
        elif not tensor.is_floating_point() or (kind_of(name) in CONTROL_TENSORS and config.codec == "zlib"):
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
        symbol_at, slots = np.repeat(np.arange(256, dtype=np.uint8), freq), np.empty(count, np.uint16)
        both_at = freq[symbol_at] << 14 | np.arange(2**14) - (freq.cumsum() - freq)[symbol_at]  # looked up at once
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

def rans_pack(artifact: dict) -> dict:
    """An int8 object with its values in one stream, by a table per tensor class, and their shapes in their place."""
    kinds = [TENSOR_CLASSES.index(tensor_class(name)) for name in artifact["quantized"]]
    groups = [q.flatten().numpy().view(np.uint8) for q in artifact["quantized"].values()]
    counts = [[np.bincount(g, minlength=256) for g, k in zip(groups, kinds, strict=True) if k == n] for n in range(3)]
    tables = np.stack([rans_frequencies(np.sum([np.zeros(256), *rows], axis=0)) for rows in counts])
    stream = torch.from_numpy(rans_encode(groups, tables[kinds]).view(np.uint8))
    shapes = {name: [*q.shape] for name, q in artifact["quantized"].items()}
    return artifact | {"__quant_format__": RANS_FORMAT, "quantized": shapes, "stream": stream,
                       "tables": torch.from_numpy(tables.astype(np.int16))}

def rans_unpack(artifact: dict) -> dict:
    """The int8 object of what rans_pack made. What it claims is checked before it is allocated."""
    shapes, tables, stream = (artifact[part] for part in ("quantized", "tables", "stream"))
    sizes = [math.prod(map(int, shape)) for shape in shapes.values()]
    require(tables.is_contiguous() and stream.is_contiguous() and len(sizes) <= 2**14 and min(sizes, default=1) > 0
            and 4 * sum(sizes) <= UNPACKED_LIMIT and tables.shape == (3, 256) and tables.dtype == torch.int16
            and (tables >= 0).all() and (tables.sum(1) == 2**14).all(), "its shapes, tables and stream do not fit")
    kinds = [TENSOR_CLASSES.index(tensor_class(name)) for name in shapes]
    groups = rans_decode(stream.numpy().view("<u2"), sizes, tables.numpy()[kinds])
    values = {name: torch.from_numpy(q.view(np.int8)) for name, q in zip(shapes, groups, strict=True)}
    return artifact | {"quantized": {name: q.view(shapes[name]) for name, q in values.items()}}

def dequantize(artifact: dict) -> dict[str, Tensor]:
    """The state dict that an artifact's object of either format stands for, each tensor in its original type."""
    artifact = rans_unpack(artifact) if artifact.get("__quant_format__") == RANS_FORMAT else artifact
    state, tensors = {}, [t for part in ("quantized", "scales", "passthrough") for t in artifact[part].values()]
    require(all(t.is_contiguous() for t in tensors) and sum(t.nbytes for t in tensors) <= UNPACKED_LIMIT,
            "its tensors are larger than its data")  # by stride 0, or by many of one storage
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

@contextlib.contextmanager
def reading(source):
    """Whatever fails while a file is decoded, the file is to blame: its readers need no check of their own for it."""
    try:
        yield
    except Exception as error:  # zlib, zip, pickle and torch each raise their own
        if isinstance(error, UserError) and str(source) in str(error):
            raise
        raise UserError(f"{source} is damaged or of another format ({error!r:.120}): "
                        "use another file, or make it again") from error

def load_tensors(data: bytes, source) -> dict:
    """A dictionary saved by torch.save. No pickled code runs, and no compressed entry unpacks to more than there is."""
    with reading(source):
        entries = zipfile.ZipFile(io.BytesIO(data)).infolist()
        require(sum(entry.file_size for entry in entries) <= len(data), f"{source} unpacks to more than it holds")
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        require(isinstance(value, dict), f"{source} holds a {type(value).__name__}, no dictionary")
        return value

def unpack(blob: bytes, source) -> dict:
    """The object in the bytes of an artifact: a zlib stream, and after ours the sha256 of that stream."""
    with reading(source):
        inflater = zlib.decompressobj()
        packed = inflater.decompress(blob, UNPACKED_LIMIT)
        require(inflater.eof, f"{source} is cut short, or unpacks to over {UNPACKED_LIMIT} bytes: get it again")
        artifact, checksum = load_tensors(packed, source), inflater.unused_data
        require(artifact.get("__quant_format__") in (INT8_FORMAT, RANS_FORMAT),
                f"{source} is no artifact of format {INT8_FORMAT} or {RANS_FORMAT}")
        require(checksum == hashlib.sha256(blob[: len(blob) - len(checksum)]).digest()
                or ("config" not in artifact and not checksum),  # a foreign file has none
                f"{source} is damaged: it does not match its checksum: get it again")
        return artifact

def export(state: dict[str, Tensor], config: Config, folder: RunFolder, code_bytes: int, hessians=None) -> dict:
    """Write final_model.pt and the artifact; log the sizes and return them for result.json. With FIT_SIZE, clips of 1/2
    to 8 times as wide are tried until the artifact just fits: by the size law, twice as wide is a bit less a weight."""
    raw, limit, (name, tag) = torch_bytes(state), config.size_limit, artifact_names(config)
    folder.write("final_model.pt", raw)  # first: whatever fails from here on, the weights are there
    weights = sum(tensor.numel() for tensor in state.values() if tensor.numel() > INT8_MIN_NUMEL)
    best, doublings, slack = None, 0.0, 0.002 * limit
    for _ in range(8 if config.fit_size else 1):
        artifact = quantize(state, config, hessians, 2.0**doublings)
        artifact = rans_pack(artifact) if config.codec == "rans" else artifact
        packed = torch_bytes(artifact)
        blob = zlib.compress(packed, level=9)
        blob += hashlib.sha256(blob).digest()  # readers of the reference's format ignore what follows the stream
        spare = limit - code_bytes - len(blob)
        if best is None or (spare >= 0, -abs(spare)) > best[0]:
            best = (spare >= 0, -abs(spare)), 2.0**doublings, artifact, packed, blob
        before, doublings = doublings, min(max(doublings - 8 * (spare - slack / 2) / max(weights, 1), -1.0), 3.0)
        if 0 <= spare < slack or doublings == before:
            break
    _, multiplier, artifact, packed, blob = best
    folder.write(name, blob)
    payload = sum(t.nbytes for t in torch.utils._pytree.tree_leaves(artifact) if isinstance(t, Tensor))
    ratio, total = sum(t.nbytes for t in state.values()) / payload, len(blob) + code_bytes
    verdict = "OK" if total <= limit else "TOO LARGE, NOT A VALID SUBMISSION"
    folder.log(f"Serialized model: {len(raw)} bytes\nCode size: {code_bytes} bytes\n"
               f"Total submission size: {len(raw) + code_bytes} bytes\nSerialized model {tag}: {len(blob)} bytes "
               f"(payload:{payload} raw_torch:{len(packed)} payload_ratio:{ratio:.2f}x)\n"
               f"Total submission size {tag}: {total} bytes\nsize_verdict:{verdict} limit:{limit} "
               f"spare:{limit - total}{f' clip_multiplier:{multiplier:.4f}' * config.fit_size}")
    return {"bytes_model": len(raw), "bytes_artifact": len(blob), "bytes_code": code_bytes, "bytes_total": total,
            "bytes_limit": limit, "sha256_artifact": hashlib.sha256(blob).hexdigest(), "clip_multiplier": multiplier}

# ---------- Training: one step function for the warm-up and for the run, the pace that the clock sets, the loop -------
def times(step: int, clock: float) -> str:
    return f"train_time:{1000 * clock:.0f}ms step_avg:{1000 * clock / max(step, 1):.2f}ms"

class Trainer:
    """Model, optimizers and data of one run, and the loop over them."""
    def __init__(self, config: Config, runtime: Runtime, folder, watch: Stopwatch, loader: TrainLoader, lifeline=None):
        self.config, self.runtime, self.folder, self.watch = config, runtime, folder, watch
        self.loader, self.lifeline = loader, lifeline  # the latter makes checkpoints, if there are to be any
        self.model, self.scorer, self.note = build_model(config, runtime)
        self.optimizers, self.learner = build_optimizers(self.model, config, runtime), self.scorer
        if runtime.world_size > 1:
            self.learner = DistributedDataParallel(self.scorer, broadcast_buffers=False)
        self.steps, self.finished, self.exporting, self.reserve, self.hessians = 0, False, False, 0.0, {}
        self.average = [p.detach().float().clone() for p in self.model.parameters() if config.ema_decay]
        self.calibration = -(-config.gptq_batches // runtime.world_size)  # micro-batches of this rank
        # Losses on their way to the host, seconds of the last steps, the training clock when the last of them ended.
        self.pending, self.recent, self.settled_at = deque(), deque(maxlen=20), 0.0

    def step(self, scale: float, momentum: float) -> Tensor:
        """One optimizer step; returns the mean loss of this rank's micro-steps, still on the device."""
        inputs, targets = self.loader.next_step()
        losses = torch.zeros(len(inputs), device=inputs.device)
        for micro, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            more = micro + 1 < len(inputs) and self.runtime.world_size > 1
            with self.learner.no_sync() if more else contextlib.nullcontext():  # reduce once, after the last
                loss = self.learner(x, y).mean() / len(inputs)
                loss.backward()
            losses[micro] = loss.detach()
        if self.config.grad_clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
                if "momentum" in group:
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
        parts, position, total = [self.model, *self.optimizers], self.loader.position, self.config.warmup_steps
        before = copy.deepcopy([part.state_dict() for part in parts])
        with torch.random.fork_rng([self.runtime.device] if self.runtime.device.type == "cuda" else []):
            for looping in [False, True] if self.config.loop_layers else [False]:
                self.model.looping = looping
                for step in range(1, (0 if self.finished else total) + 1):
                    began = self.watch.elapsed("compile")
                    self.step(1.0, self.config.muon_momentum)
                    self.runtime.synchronize()
                    self.folder.log(f"warmup_step:{step}/{total}{' looping' * looping}")
                    if step == total > 1:  # the first step compiles; the last tells how long one takes
                        self.recent.append(self.watch.elapsed("compile") - began)
                with torch.no_grad():
                    self.scorer(*evaluator.batch_at(evaluator.windows.start)[:2])
            for _ in range(2 if self.calibration else 0):  # how much of the clock to keep for it
                began = self.watch.elapsed("compile")
                collect_hessians(self.model, self.loader, 1, self.runtime)
                self.runtime.synchronize()
                self.reserve = 1.5 * self.calibration * (self.watch.elapsed("compile") - began)
                require(self.reserve < (self.config.max_wallclock_seconds or math.inf), "GPTQ_BATCHES="
                        f"{self.config.gptq_batches} takes {self.reserve:.0f} s, the whole clock: use fewer")
        for part, state in zip(parts, before, strict=True):
            part.load_state_dict(state)
        self.loader.seek(position)

    def plan(self) -> tuple[float, bool, bool, bool]:
        """(learning-rate scale, whether to stop before one more step, to save, to leave): rank 0's decision, and any
        rank's signals. The next step, if it takes as long as the slowest of the last 20, must end before the limit."""
        config, runtime, elapsed = self.config, self.runtime, self.watch.elapsed("training")
        limit, progress = config.max_wallclock_seconds, progress_at(config, self.steps, elapsed + self.reserve)
        end = elapsed + (1 + len(self.pending)) * max(self.recent, default=0.0) + self.reserve
        stop = self.finished or self.steps >= config.iterations or bool(limit and end >= limit)
        due = bool(self.lifeline) and not stop and self.lifeline.due(self.steps, elapsed)
        decision = [lr_scale(config, progress), stop, stop or progress >= config.loop_start, due]
        decision = decision if runtime.is_master else [0.0] * 4
        scale, *flags = runtime.sum([*decision[:3], decision[3] + runtime.save_asked, bool(runtime.leave)])
        stop, looping, save, leave = map(bool, flags)
        self.model.looping = looping and bool(config.loop_layers)
        return scale, stop, save, leave

    def settle(self, keep: int):
        """Log the steps that are done, all but the last `keep` dispatched: their losses arrive while those run."""
        config = self.config
        while len(self.pending) > keep:
            step, scale, loss, event = self.pending.popleft()
            event.synchronize() if event else None
            loss, clock = float(loss), self.watch.elapsed("training")
            self.recent.append(clock - self.settled_at)
            self.settled_at = clock
            require(math.isfinite(loss), f"step {step}: the loss is {loss}: nothing was exported: lower MATRIX_LR, "
                    "TIED_EMBED_LR and SCALAR_LR, or set GRAD_CLIP_NORM")
            if config.train_log_every and (step <= 10 or step % config.train_log_every == 0):
                self.folder.log(f"step:{step}/{config.iterations} train_loss:{loss:.4f} {times(step, clock)}")
            numbers = {"step": step, "train_loss": loss, "lr_scale": scale, "train_seconds": round(clock, 4)}
            self.folder.append("metrics.jsonl", json.dumps(numbers))

    def train(self, evaluator: Evaluator) -> Score:
        """Plan, save, validate, step, log, until ITERATIONS or the clock. The last validation."""
        config, folder = self.config, self.folder
        while True:
            scale, stop, save, leave = self.plan()
            if save or leave:
                self.lifeline.save(self, wait=leave)
                if leave:
                    raise KeyboardInterrupt(self.runtime.leave or signal.SIGTERM)
                continue  # the pause may have used up the clock
            if stop and not self.finished:
                self.settle(keep=0)
                self.watch.switch("export")
                self.finished = True
                if self.lifeline:  # a killed validation or export goes on from here
                    self.lifeline.save(self, wait=True)
                self.watch.switch("training")
            if stop and not self.exporting:
                self.finish_weights()
            every = config.val_loss_every
            if stop or (every and self.steps % every == 0 and (self.steps or config.val_at_start)):
                self.settle(keep=0)
                self.watch.switch("evaluation")
                score = evaluator.score(self.scorer, folder.log)
                self.watch.switch("training")
                self.settled_at = clock = self.watch.elapsed("training")
                if not score:
                    continue
                folder.log(f"step:{self.steps}/{config.iterations} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} "
                           f"{times(self.steps, clock)}{score.label}")
                numbers = {"val_loss": score.loss, "val_bpb": score.bpb, "partial": bool(score.label)}
                folder.append("metrics.jsonl", json.dumps({"step": self.steps, **numbers}))
            if stop:
                if self.steps < config.iterations:
                    folder.log(f"stopping_early: wallclock_cap train_time:{1000 * clock:.0f}ms "
                               f"step:{self.steps}/{config.iterations}")
                return score
            loss, event = self.step(scale, muon_momentum(config, self.steps)), None
            if self.average:
                self.update_average()
            self.steps += 1
            if self.runtime.world_size > 1:
                dist.all_reduce(loss)
                loss /= self.runtime.world_size
            if self.runtime.device.type == "cuda":  # to the host, without waiting for it
                loss, event = torch.empty((), pin_memory=True).copy_(loss, non_blocking=True), torch.cuda.Event()
                event.record()
            self.pending.append((self.steps, scale, loss, event))
            self.settle(keep=1 if self.runtime.device.type == "cuda" else 0)  # a GPU may have one more step queued

# ---------- Modes: training, from the checks to the result; every other mode is a file beside this one ----------------
def open_text(config: Config, folder: RunFolder) -> tuple[TokenStream, TokenBytes, dict]:
    """(validation text, what its tokens weigh, what the audit found: nothing on ranks but 0, or without audit.py)."""
    stream = TokenStream(config.data_path, "val", config.vocab_size)
    require(len(stream) > 1, f"{stream.pattern} holds {len(stream)} tokens: 2 are needed to score one")
    token_bytes = TokenBytes(config.tokenizer_path, config.vocab_size)
    require(not config.smear_gate or token_bytes.start in (config.start_token, -1),
            f"START_TOKEN={config.start_token}, but documents begin with token {token_bytes.start}: set that")
    folder.log(f"val_loader:shards pattern={stream.pattern} tokens:{len(stream) - 1}")
    module = beside("audit", "the bytes of the text are weighed, but not proved, and there is no result.json", folder)
    audited = module.report(folder, require, token_bytes, stream, config.data_path) if module else {}
    return stream, token_bytes, audited

def log_final(label: str, score: Score, folder: RunFolder):
    folder.log(f"{label} val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f} eval_time:{1000 * score.seconds:.0f}ms"
               f"{score.label}\n{label}_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f} "
               f"tokens:{score.tokens} bytes:{score.bytes}{score.label}")

def prepare(config: Config, folder: RunFolder, code: bytes, watch: Stopwatch):
    """(trainer, new or resumed, and what open_text returns), after all that the user brought has been checked."""
    runtime, defaults = folder.runtime, Config().texts()
    knobs = [f"{' ' if text == defaults.get(name) else '*'} {name}={text}" for name, text in config.texts().items()]
    check = beside("check", "no hints on environment variables that are almost knobs", folder)
    folder.log("\n".join([*knobs, *(check.typo_warnings(os.environ, KNOBS) if check else [])]))
    accum_steps = config.accumulation_steps(runtime.world_size, runtime.device.type)
    stream = TokenStream(config.data_path, "train", config.vocab_size)
    folder.log(f"train_loader:shards pattern={stream.pattern} tokens:{len(stream)}")
    if runtime.is_master:
        stream.read(0, len(stream.shards[0]))  # checks its tokens; later shards as they are read
    module = beside("lifeline", "no checkpoints, no resuming, no fitting of micro-batches to the memory", folder)
    lifeline = module.Lifeline(config, folder, stream, code) if module else folder.locate(config)
    require(lifeline or config.resume in ("auto", "never") and not folder.path.exists(),
            f"folder {folder.path} exists, or RESUME is set: without lifeline.py give a new RUN_ID and no RESUME")
    text = open_text(config, folder)
    watch.switch("compile")
    trainer = Trainer(config, runtime, folder, watch, TrainLoader(stream, config, runtime, accum_steps), lifeline)
    if lifeline:
        lifeline.begin(trainer)
    folder.create(config, code)
    return trainer, *text

def train(config: Config, folder: RunFolder, argv: list[str]):
    """MODE=train: one run, from the checks to result.json."""
    runtime, code, watch = folder.runtime, Path(__file__).read_bytes(), Stopwatch(folder.runtime.synchronize)
    trainer, val_stream, token_bytes, facts = prepare(config, folder, code, watch)
    params, accum_steps = sum(p.numel() for p in trainer.model.parameters()), trainer.loader.accum_steps
    folder.log(f"{trainer.note}\nmodel_params:{params}\nseed:{config.seed}\nrun_folder:{folder.path}\n"
               f"world_size:{runtime.world_size} grad_accum_steps:{accum_steps}")
    evaluator = Evaluator(val_stream, token_bytes, config, runtime, accum_steps)
    trainer.warm_up(evaluator)
    watch.switch("training")
    runtime.patient = True
    before = trainer.train(evaluator)
    runtime.patient = False
    signal.raise_signal(runtime.leave) if runtime.leave else None  # one that came after the last validation
    watch.switch("export")
    limit, over = config.max_wallclock_seconds, watch.seconds["training"] - config.max_wallclock_seconds
    if limit and over > 0:
        folder.log(f"clock_verdict:{over:.3f}s OVER MAX_WALLCLOCK_SECONDS={limit}, NOT A VALID SUBMISSION")
    if runtime.device.type == "cuda":
        folder.log(f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB "
                   f"reserved: {torch.cuda.max_memory_reserved() >> 20} MiB")
    state, (name, tag) = trainer.model.state_dict(), artifact_names(config)
    sizes = runtime.is_master and export(state, trainer.config, folder, len(code), trainer.hessians)
    # Rank 0 reads the file back and the others get its bytes: hosts need no common disk to score the artifact.
    artifact = folder.path / name
    blob = runtime.share(artifact.read_bytes() if runtime.is_master else None)
    trainer.model.load_state_dict(dequantize(unpack(blob, artifact)))
    watch.switch("evaluation")
    after = evaluator.score(trainer.scorer, folder.log)
    watch.switch("export")
    log_final(f"final_{tag.replace('+', '_')}_roundtrip", after, folder)
    if facts:
        hashes = {"sha256_code": hashlib.sha256(code).hexdigest(), "sha256_tokenizer": token_bytes.sha256}
        beside("audit").write_result(require, trainer, before, after, hashes | sizes | facts)
    if config.sample_prompt and runtime.is_master:
        folder.log("".join(["sample: ", *beside("sample").generate(trainer.model, config, token_bytes)]))

def beside(name: str, without: str = "", folder: RunFolder | None = None):
    """The module NAME.py beside this script, or None and a line that says what is missed `without` it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        require(without and error.name == name, f"{name}.py is not beside train_gpt.py: take both from the repository")
        folder.log(f"warning: {name}.py is not beside train_gpt.py: {without}")

# ---------- main: wiring only -----------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    folder = None
    with contextlib.suppress(AttributeError):  # of what stands in for a terminal
        sys.stdout.reconfigure(errors="replace")  # letters that it lacks must not end the run
    try:
        if argv in (["-h"], ["--help"]):
            return beside("check").explain(sys.modules[__name__])
        config = Config.load(argv, os.environ)
        folder = RunFolder(Runtime(config, os.environ))
        mode = train if config.mode == "train" else beside(config.mode).main
        code = mode(config, folder, argv)
        folder.close()
        if folder.runtime.world_size > 1:
            dist.destroy_process_group()
        return code or 0
    except (UserError, OSError, RuntimeError, KeyboardInterrupt) as error:
        message, code = f"error: {error}", 2
        if isinstance(error, RuntimeError):
            if not is_out_of_memory(error):
                raise
            message = f"error: {error!r:.120}: lower VAL_BATCH_SIZE, TRAIN_SEQ_LEN or the size of the model"
        if isinstance(error, KeyboardInterrupt):
            number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
            message, code = f"stopped by {number.name}", 128 + number
            message += f": RUN_ID={folder.run_id} goes on with it" if folder and folder.lock and folder.header else ""
        print(message, file=sys.stderr, flush=True)
        folder.close(message) if folder else None
        return code

if __name__ == "__main__":
    status = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":  # a tidy end waits for ranks that wait, and gloo may abort it
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
