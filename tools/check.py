"""MODE=check of train_gpt.py: what a run would do, need and cost, in seconds and without training.

    MODE=check python train_gpt.py [FILE.env]                              for this machine
    MODE=check TARGET_WORLD_SIZE=8 python train_gpt.py [FILE.env]          for 8 GPUs, from any machine
    MODE=check torchrun --standalone --nproc_per_node=8 train_gpt.py       with the ranks that will train

It prints facts, then problems with their remedies, then everything as JSON in one line, `check_json:{...}`. The exit
code is 1 if there are problems. Missing data is one problem among others: the rest is checked anyway.

Every mode uses this file before it starts: for contradictory knobs, for environment variables that are almost knobs,
for knobs that moved to another file, for ranks that are late, and for --help.
"""

import ast
import contextlib
import datetime
import difflib
import functools
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import train_gpt
from train_gpt import require

# Size by zlib -9 over the entropy, as a function of the entropy: measured on 2**20 Gaussian weights of 4 to 8 bits.
ZLIB_ENTROPIES = (2.31, 3.33, 4.12, 4.72, 5.32, 6.33, 7.34)
ZLIB_FACTORS = (1.187, 1.158, 1.137, 1.099, 1.047, 1.013, 1.009)
FP16_UNDER_ZLIB = 0.92  # size of fp16 weights by zlib -9 over their size, measured on 2**18 Gaussian weights
SAMPLED = 2**16  # tokens that are read at either end of a training shard
CPU_TOKENS = 4096  # largest micro-step that is measured on a CPU
# Characters that a line of a file cannot hold, and text in both kinds of quotes.
UNQUOTABLE = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff]|\".*'|'.*\"")
FRONTIER = "records/models/frontier.py"
# Knobs that moved from the script to FRONTIER, with the values at which they do nothing. Files of before hold them.
MOVED = {
    "MLP_SLOPE": "0.0",
    "ROPE_DIMS": "0",
    "XSA_LAYERS": "0",
    "ATTN_GATE": "0",
    "X0_MIX": "1",
    "LN_SCALE": "0",
    "GATED_SKIPS": "0",
    "PARALLEL_FROM": "-1",
    "SMEAR_GATE": "0",
    "START_TOKEN": "1",
    "CANONICAL": "0",
    "LOOP_LAYERS": "",
    "LOOP_PASSES": "3",
    "LOOP_START": "0.35",
    "MUON_ROW_NORM": "0",
    "CODEC": "zlib",
    "WEIGHT_BITS": "8",
    "EMBED_BITS": "8",
    "CLIP_ATTN": "0.0",
    "CLIP_MLP": "0.0",
    "CLIP_EMBED": "0.0",
    "GPTQ_BATCHES": "0",
    "FIT_SIZE": "0",
}
SAMPLE_KNOBS = ("SAMPLE_PROMPT", "SAMPLE_TOKENS", "TEMPERATURE", "TOP_K")  # tools/artifact.py reads them
# Knobs of similar trainers, which would be ignored without a word.
ELSEWHERE = {
    "WARMDOWN_ITERS": "set WARMDOWN_FRAC to this over the steps that the run will take",
    "MUON_WD": "set MUON_WEIGHT_DECAY",
    "ADAM_WD": "set EMBED_WEIGHT_DECAY and SCALAR_WEIGHT_DECAY",
    "XSA_LAST_N": f"set XSA_LAYERS and MODEL_FILE={FRONTIER}",
    "INT8_SCALE_FLOOR": f"set CLIP_ATTN, CLIP_MLP, CLIP_EMBED and MODEL_FILE={FRONTIER}",
}


# ---------- Knobs -----------------------------------------------------------------------------------------------------


def check_combinations(config):
    """Raise if knobs contradict each other, or if config.env could not hold a value."""
    D = config.model_dim
    T = config.train_seq_len
    for name, field in config.knobs().items():
        value = getattr(config, field.name)
        bad = UNQUOTABLE.search(str(value))
        require(not bad, f"{name}={value!r} holds control characters or both kinds of quotes: use another name")
    is_name = re.fullmatch(r"[\w+=-][\w.+=-]{0,99}|", config.run_id)
    require(is_name, f"RUN_ID={config.run_id!r} cannot name a folder: use up to 100 letters, digits and . _ + = -")
    require(round(config.mlp_mult * D), f"MLP_MULT={config.mlp_mult} of MODEL_DIM={D} rounds to 0: raise it")
    require(config.eval_stride <= T, f"EVAL_STRIDE={config.eval_stride} is over TRAIN_SEQ_LEN={T}: lower it")
    micro = config.micro_batch_tokens
    unlimited = micro in ("auto", "0")
    number = re.fullmatch("[1-9][0-9]{,14}", micro)
    require(
        unlimited or (number and int(micro) >= T),
        f"MICRO_BATCH_TOKENS={micro}: expected auto, 0 (unlimited) or at least one TRAIN_SEQ_LEN={T}",
    )
    require(
        not config.grad_accum_steps or unlimited,
        "GRAD_ACCUM_STEPS and MICRO_BATCH_TOKENS are both given: unset one, both cut the step",
    )
    require(
        config.ema_share == 1 or config.ema_decay,
        f"EMA_SHARE={config.ema_share} weights an average, and EMA_DECAY=0 makes none: set EMA_DECAY, to about 0.99",
    )


def is_moved_and_off(name: str, text: str) -> bool:
    """Whether this is no knob of the script any more, and has no effect at this value.

    Numbers are compared as numbers: 0 is 0.0. A knob of tools/artifact.py never has an effect on a run.
    """
    off = MOVED.get(name)
    if name in SAMPLE_KNOBS or text == off:
        return True
    with contextlib.suppress(ValueError, TypeError):  # a text, or not among MOVED
        return float(text) == float(off)
    return False


def drop_moved_knobs(texts: dict[str, str], knobs) -> dict[str, str]:
    """{KNOB: text} of a file of before, without the knobs that are none any more and have no effect at their value."""
    return {name: text for name, text in texts.items() if name in knobs or not is_moved_and_off(name, text)}


def model_files() -> dict[str, ast.Module]:
    """{path relative to the script: syntax tree} of the files in records/models/. They are parsed, not executed."""
    return parse_model_files(Path(train_gpt.__file__).resolve().parent)


@functools.cache
def parse_model_files(root: Path) -> dict[str, ast.Module]:
    trees = {}
    for path in sorted((root / "records" / "models").glob("*.py")):
        with contextlib.suppress(SyntaxError, ValueError):  # a file that is being written is no reason to fail here
            trees[path.relative_to(root).as_posix()] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def knobs_in(tree: ast.Module) -> dict[str, ast.Call]:
    """{KNOB: its call of knob(default, meaning, ...)} of the class Config in a model file."""
    bodies = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config"]
    fields = [node for body in bodies for node in body if isinstance(node, ast.AnnAssign)]
    return {node.target.id.upper(): node.value for node in fields if isinstance(node.value, ast.Call)}


def model_file_of(name: str) -> str:
    """The model file that adds this knob, relative to the script; empty if there is none."""
    if name in MOVED:
        return FRONTIER
    return next((file for file, tree in model_files().items() if name in knobs_in(tree)), "")


def nearest(name: str, knobs) -> str:
    """A hint on what a name that is no knob may have meant."""
    if file := model_file_of(name):
        return f"it is one of a model file: set MODEL_FILE={file}"
    close = difflib.get_close_matches(name.upper(), knobs, 1)
    return f"did you mean {close[0]}?" if close else "see --help"


def typo_warnings(environ, knobs) -> list[str]:
    """Warnings about environment variables that are almost knobs, or knobs of a model file or of other trainers.

    Also one about srun, which starts as many single runs where torchrun should start ranks.
    """
    warnings = []
    tasks = environ.get("SLURM_NTASKS", "1")
    if tasks.isdecimal() and int(tasks) > 1 and "WORLD_SIZE" not in environ:
        warnings.append(
            f"warning: SLURM_NTASKS={tasks} and WORLD_SIZE is not set: srun started {tasks} single runs: "
            "start torchrun once per node"
        )
    known = [*knobs, *SAMPLE_KNOBS]
    others = {name for tree in model_files().values() for name in knobs_in(tree)} | MOVED.keys()
    for name in sorted(name for name in environ.keys() - {*known} if name.isprintable()):
        # A wrong letter of n leaves 1 - 1/n of a name.
        close = difflib.get_close_matches(name.upper(), known, 1, min(0.85, 1 - 1 / max(len(name), 4)))
        hint = ELSEWHERE.get(name, "")
        if name in others and not is_moved_and_off(name, environ[name]):
            hint = nearest(name, knobs)
        elif close and name not in others:
            hint = hint or f"did you mean {close[0]}?"
        if hint:
            warnings.append(f"warning: the environment variable {name} is no knob: {hint}")
    return warnings


# ---------- Help ------------------------------------------------------------------------------------------------------


def help_line(name: str, default, meaning: str, choices=(), free=False) -> str:
    default = int(default) if isinstance(default, bool) else default
    chosen = f" ({', '.join(choices)})" if choices else ""
    return f"{name}={default}  {meaning}{chosen}{' [free]' * free}"


def lines_by_heading(config_class) -> dict[str, list[str]]:
    """{heading: lines} of the knobs of a Config: under its comments `# -- Heading`, a model file's under its name."""
    headings = {}
    for cls in reversed(config_class.__mro__[:-1]):
        source = Path(inspect.getfile(cls))
        heading = "" if cls is train_gpt.Config else f"Knobs of {source.name}"
        for line in inspect.getsource(cls).splitlines():
            if match := re.match(r"    # -- (.+)", line):
                heading = match[1]
            elif match := re.match(r"    (\w+): \w+ = knob\(", line):
                headings[match[1].upper()] = heading
    groups = {}
    for name, field in config_class.knobs().items():
        choices = field.metadata["allowed"][2]
        line = help_line(name, field.default, field.metadata["meaning"], choices, field.metadata["free"])
        groups.setdefault(headings.get(name, ""), []).append(line)
    return groups


def constant(node: ast.AST):
    """The value of a constant expression such as 2**15."""
    return eval(compile(ast.Expression(node), "default", "eval"), {"__builtins__": {}})


def lines_by_model_file() -> dict[str, list[str]]:
    """{heading: lines} of the knobs that the files in records/models/ add."""
    groups = {}
    for file, tree in model_files().items():
        for name, call in knobs_in(tree).items():
            options = {option.arg: constant(option.value) for option in call.keywords}
            default, meaning = map(constant, call.args[:2])
            line = help_line(name, default, meaning, options.get("choices", ()), options.get("free", False))
            groups.setdefault(f"MODEL_FILE={file}", []).append(line)
    return groups


def explain(artifact) -> int:
    """--help: every knob with its default and meaning, by group. Returns the exit code.

    With MODEL_FILE in the environment these are the knobs of its Config. `artifact` is tools/artifact.py, if present.
    """
    model_file = os.environ.get("MODEL_FILE")
    config_class = train_gpt.load_model_file(model_file) if model_file else train_gpt.Config
    groups = lines_by_heading(config_class)
    if artifact:
        groups |= lines_by_heading(artifact.SampleKnobs)
    if not model_file:
        groups |= lines_by_model_file()
    print(train_gpt.__doc__)
    print("Knobs. One that is [free] does not shape the result and may differ when a run resumes.")
    for heading, lines in groups.items():
        print(f"\n{heading}", *lines, sep="\n")
    return 0


# ---------- Errors ----------------------------------------------------------------------------------------------------


def explain_error(error: BaseException, folder) -> tuple[str, int]:
    """The message and the exit code of an error that ends a run. One that is a fault of the program is raised again.

    `folder` is the run folder, or None if the run has none yet.
    """
    if isinstance(error, KeyboardInterrupt):
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        resumable = folder and folder.created and getattr(folder, "header", "")
        hint = f": RUN_ID={folder.run_id} goes on with it" if resumable else ""
        return f"stopped by {number.name}{hint}", 128 + number
    kernels = train_gpt.tool("kernels", log=str)
    if kernels and kernels.is_out_of_memory(error):
        return f"error: {error!r:.120}: lower VAL_BATCH_SIZE, TRAIN_SEQ_LEN or the size of the model", 2
    if not (folder and folder.runtime.world_size > 1):
        raise error
    traceback.print_exception(error)  # and end at once: other ranks may wait for this one
    return f"stopped by {error!r:.120}", 1


# ---------- Meeting of the ranks --------------------------------------------------------------------------------------


def check_launch(environ):
    """Raise if the variables of a launcher are incomplete or contradict each other."""
    rank = environ.get("RANK", "0")
    size = environ.get("WORLD_SIZE", "1")
    numbers = rank.isdecimal() and size.isdecimal() and int(rank) < int(size)
    reachable = size == "1" or {"MASTER_ADDR", "MASTER_PORT"} <= set(environ)
    train_gpt.require(
        numbers and reachable,
        f"RANK={rank} WORLD_SIZE={size} without a launcher: start several ranks with "
        "torchrun, which sets MASTER_ADDR and MASTER_PORT too, or unset both",
    )


def meet(environ, timeout: datetime.timedelta) -> dist.Store:
    """The store at which all ranks of a torchrun launch have met.

    A rank that waits for more than ten seconds prints which rank it waits for. A failure is a UserError.
    """
    rank = int(environ["RANK"])
    world_size = int(environ["WORLD_SIZE"])
    place = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
    waits = f"rank {rank} of {world_size} waits at {place} for"
    alarm = threading.Timer(10, print, [waits, "rank 0" if rank else "the others"], {"flush": True})
    alarm.daemon = True
    alarm.start()
    try:
        store, *_ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
        if environ.get("GROUP_WORLD_SIZE") == "1":
            # After a restart by torchrun the store still holds the keys of the ranks that died.
            store = dist.PrefixStore(f"attempt_{environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        alarm.cancel()
        store.set(f"here {rank}", "")
        for other in range(world_size):
            while not store.check([f"here {other}"]):
                try:
                    store.wait([f"here {other}"], datetime.timedelta(seconds=10))
                except RuntimeError:  # the ten seconds are over
                    print(waits, f"rank {other}", flush=True)
    except (RuntimeError, OSError) as error:
        raise train_gpt.UserError(
            f"the ranks cannot meet at MASTER_ADDR:MASTER_PORT={place} ({error!s:.150}): choose "
            "a free port, or set GLOO_SOCKET_IFNAME to the host's network interface"
        ) from error
    finally:
        alarm.cancel()
    return store


# ---------- What a run needs ------------------------------------------------------------------------------------------


def schedule(config) -> str:
    """The learning rate over the run, in words."""
    clock = config.max_wallclock_seconds
    steps = config.iterations
    if config.model_class().lr_scale is not train_gpt.Model.lr_scale:
        return "by the model's own lr_scale"
    full = 1 - config.warmdown_frac
    floor = f", but not below {config.lr_floor}" if config.lr_floor else ""
    by_clock = f"full until {full * clock:.0f} s, then linear to 0 at {clock:.0f} s{floor}"
    by_steps = f"full until step {full * steps:.0f}, then linear to 0 at step {steps}{floor}"
    return f"{by_clock}; or {by_steps}, if that comes first" if clock else by_steps


def versions(config, runtime) -> dict:
    nccl = {name: text for name, text in os.environ.items() if name.startswith("NCCL_")}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": runtime.device_name,
        "device_type": runtime.device.type,
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "ranks": int(runtime.all_reduce([1.0])[0]),
        "target_ranks": config.target_world_size or runtime.world_size,
        "nccl_environment": nccl,
    }


def check_host_name(config, runtime) -> dict:
    """Raise OSError if several ranks are to meet and the name of this host leads to no network interface for gloo."""
    name = socket.gethostname()
    several = (config.target_world_size or runtime.world_size) > 1
    if several and "GLOO_SOCKET_IFNAME" not in os.environ:
        try:
            socket.gethostbyname(name)
        except OSError as error:
            raise OSError(
                f"the name of this host, {name}, does not resolve ({error}): set GLOO_SOCKET_IFNAME to the "
                "network interface on which the ranks are to meet"
            ) from error
    return {}


def training_data(config) -> dict:
    """Read headers and sizes of all training shards, and the tokens at both ends of each."""
    stream = train_gpt.TokenStream(config.data_path, "train", config.vocab_size)
    sampled = 0
    for end, shard in zip(stream.ends.tolist(), stream.shards, strict=True):
        for start in {end - len(shard), max(end - len(shard), end - SAMPLED)}:
            sampled += len(stream.read(start, min(SAMPLED, end - start)))
    return {
        "train_shards": len(stream.shards),
        "train_tokens": len(stream),
        "train_tokens_checked": f"{min(sampled, len(stream))} of {len(stream)}, at both ends of each shard",
    }


def validation_data(config, folder) -> dict:
    """Read the whole validation text and audit its bytes, as a run does."""
    train_gpt.TokenStream(config.data_path, "val", config.vocab_size)  # missing data is reported before the tokenizer
    token_bytes = train_gpt.TokenBytes(config.tokenizer_path, config.vocab_size, config.vocab_padding)
    stream, facts = train_gpt.open_text(config, token_bytes, folder)
    return {"val_shards": len(stream.shards), "val_tokens": len(stream), "bytes_proved": False} | facts


def activation_bytes(model, tokens_BT) -> int:
    """Bytes that autograd keeps for these sequences, measured on an eager forward. A compiled model keeps less."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens_BT, tokens_BT)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def bits_per_weight(columns: int, qmax: int = 127, clip: float = 0.0) -> float:
    """Entropy of Gaussian weights, quantized to +-qmax in rows that are clipped at `clip` standard deviations.

    0 stands for a percentile so high that it is about the largest weight of a row. Steps of clip / qmax standard
    deviations give 2.047 bits (half of log2(2 pi e)) + log2(qmax / clip), and a little for what the steps hide and the
    clip cuts.
    """
    expected_largest = statistics.NormalDist().inv_cdf(1 - math.exp(-0.5772) / (2 * columns))
    k = clip or expected_largest
    return 2.047 + math.log2(qmax / k) + 0.060 * (k / qmax) ** 2


def projected_bytes(coder, model, bits_of=lambda name, columns: bits_per_weight(columns), overhead: float = 0.0) -> int:
    """Bytes of the artifact of this model once it is trained, when its rows are about Gaussian.

    The artifact of an untrained model says nothing. A coder of another format calls this from its own projected_size:
    `bits_of` is the entropy of the weights of a tensor (name, columns), and `overhead` the size by its entropy coder
    over the entropy; 0 stands for zlib.
    """
    bits = 0.0
    rest = 4096
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            rest += tensor.nbytes
        elif tensor.numel() <= train_gpt.INT8_MIN_NUMEL:
            wide = coder.control_fp32 and model.rule(name).fp32
            rest += tensor.numel() * (4 if wide else 2 * FP16_UNDER_ZLIB)
        else:
            rest += 2 * tensor.shape[0]  # the scales
            entropy = bits_of(name, tensor.shape[-1])
            bits += tensor.numel() * entropy * (overhead or np.interp(entropy, ZLIB_ENTROPIES, ZLIB_FACTORS))
    return round(bits / 8 + rest)


def device_memory(device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None


def seconds_per_token(model, forward, tokens_BT, runtime) -> float:
    """Seconds of a forward and a backward over a token, averaged over the steps of a run.

    The model runs each of its graphs. A graph counts by the steps that the run takes with it: its fraction of the run
    by the clock, over the seconds of its step.
    """
    steps = 0.0
    ends = [*model.graph_starts[1:], 1.0]
    for start, end in zip(model.graph_starts, ends, strict=True):
        model.advance(start)
        for _ in range(2):  # the first compiles
            runtime.synchronize()
            began = time.perf_counter()
            output = forward(tokens_BT, tokens_BT.clone())
            losses, *extra = output if isinstance(output, tuple) else (output,)
            sum(extra, losses.mean()).backward()
            runtime.synchronize()
            seconds = time.perf_counter() - began
        steps += (end - start) / seconds
    return 1 / steps / tokens_BT.numel()


def model_and_step(config, runtime, problems: list[str]) -> dict:
    """Build the model, run a micro-step of each graph, and estimate from that what a run takes.

    If other ranks than those at hand are to train, tools/steptime.py predicts the time of a step from public runs.
    """
    T = config.train_seq_len
    ranks = config.target_world_size or runtime.world_size
    kind = "cuda" if config.target_world_size else runtime.device.type
    here = kind == runtime.device.type
    accum_steps = config.accumulation_steps(ranks, kind)
    micro = config.train_batch_tokens // ranks // accum_steps
    coder = config.coder_class()(config)
    model, compiled_model, kernels = train_gpt.build_model(config, runtime)
    params = sum(p.numel() for p in model.parameters())
    code = sum(len(path.read_bytes()) for path in train_gpt.source_paths(config).values())
    projected = coder.projected_size(model, sys.modules[__name__]) or projected_bytes(coder, model)
    # A GPU gets the whole micro-batch, compiled. A CPU gets a small one, eagerly unless it is to train with COMPILE=1
    # or autotune: to compile takes far longer than all the rest together.
    on_cpu = runtime.device.type == "cpu"
    eager = on_cpu and (not here or config.compile in ("auto", "0"))
    rows = max(1, min(micro, CPU_TOKENS) // T) if on_cpu else micro // T
    tokens_BT = torch.zeros(rows, T, dtype=torch.long, device=runtime.device)
    per_token = seconds_per_token(model, model if eager else compiled_model, tokens_BT, runtime)
    # Weights, gradients, the states of the optimizers, the reduced gradients of DDP, and the average of the weights.
    copies = 5 + bool(config.ema_decay)
    weights = sum(p.nbytes for p in model.parameters())
    estimate = copies * weights + activation_bytes(model, tokens_BT[:1]) * (micro // T)
    memory = device_memory(runtime.device) if here else None
    facts = {
        "model_params": params,
        "kernels": kernels.replace("\n", "; "),
        "seconds_per_token": per_token,
        "micro_step": f"{rows} sequences of {T} tokens, {'eager' if eager else 'compiled'}: runs",
        "tokens_per_step": config.train_batch_tokens,
        "grad_accum_steps": accum_steps,
        "micro_batch_tokens": micro,
        "memory_estimate_mib": estimate >> 20,
        "memory_mib": memory and memory >> 20,
        "schedule": schedule(config),
        "bytes_artifact_projected": projected,
        "bytes_code": code,
        "bytes_total_projected": projected + code,
        "bytes_limit": config.size_limit,
    }
    if projected + code > config.size_limit:
        problems.append(
            f"{params} parameters take about {projected} bytes as {coder.tag}, {projected + code} with the code, over "
            f"{config.size_limit}: lower MODEL_DIM, NUM_LAYERS, MLP_MULT or VOCAB_SIZE, or use a smaller coder, such "
            f"as that of MODEL_FILE={FRONTIER}"
        )
    if memory and estimate > memory:
        problems.append(
            f"a micro-step of {micro} tokens needs about {estimate >> 20} MiB, the device has "
            f"{memory >> 20}: set a lower MICRO_BATCH_TOKENS"
        )
    if here and runtime.world_size == ranks:
        seconds = per_token * config.train_batch_tokens / ranks
        count = int(min(config.iterations, (config.max_wallclock_seconds or math.inf) / seconds))
        facts |= {
            "seconds_per_step": seconds,
            "ms_per_step": round(1000 * seconds, 1),
            "steps_in_budget": count,
            "tokens_in_budget": count * config.train_batch_tokens,
            "step_time_rests_on": "micro-steps that ran here, forward and backward: without optimizers and reductions",
        }
    else:
        facts |= train_gpt.tool("steptime", required=True).predict(config, model, ranks)
    seconds = facts["seconds_per_step"] or 0.0
    if seconds > (config.max_wallclock_seconds or math.inf):
        problems.append(
            f"one step takes about {seconds:.0f} s, the clock is {config.max_wallclock_seconds:.0f} s: lower "
            "TRAIN_BATCH_TOKENS or raise MAX_WALLCLOCK_SECONDS"
        )
    return facts


def check_disk(config, params: int) -> dict:
    """Raise OSError if LOG_DIR cannot hold a run: its model, its artifact, and two checkpoints for a moment."""
    path = Path(config.log_dir).absolute()
    place = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    need = (30 + 8 * bool(config.ema_decay)) * params + 2**24
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise OSError(f"LOG_DIR={config.log_dir}: {place} cannot be written to: choose another")
    if free < need:
        raise OSError(f"LOG_DIR={config.log_dir} has {free >> 20} MiB free, a run needs {need >> 20}: make room")
    return {"disk_free_mib": free >> 20, "disk_need_mib": need >> 20}


def check_run(config, folder, argv: list[str]) -> int:
    """Print the report. Returns the exit code: 1 if there are problems."""
    runtime = folder.runtime
    problems = []
    for warning in typo_warnings(os.environ, config.knobs()):
        folder.log(warning)
    facts = versions(config, runtime)
    parts = (
        lambda: check_host_name(config, runtime),
        lambda: training_data(config),
        lambda: validation_data(config, folder),
        lambda: model_and_step(config, runtime, problems),
        lambda: check_disk(config, facts.get("model_params", 0)),
    )
    for part in parts:
        try:
            facts |= part()
        except (train_gpt.UserError, OSError, RuntimeError) as error:
            problems.append(str(error))
    if runtime.is_master:
        # What both splits lack is said once.
        problems = list({re.sub("fineweb_(train|val)_", "", text): text for text in reversed(problems)}.values())[::-1]
        with contextlib.suppress(BrokenPipeError):
            lines = [f"{name}: {value}" for name, value in facts.items()]
            lines += [f"problem {number}: {text}" for number, text in enumerate(problems, 1)]
            print(*lines, sep="\n")
            print("check_json:" + json.dumps(facts | {"problems": problems}), flush=True)
    return 1 if problems else 0


MODES = {"check": check_run}
