"""MODE=check of train_gpt.py: what a run would do, need and cost, in seconds and without training. And what every
mode says before it begins: which knobs contradict each other, which variables are almost knobs, which ranks are late.

    MODE=check python train_gpt.py [FILE.env]                              for this machine
    MODE=check TARGET_WORLD_SIZE=8 python train_gpt.py [FILE.env]          for 8 GPUs, from any machine
    MODE=check torchrun --standalone --nproc_per_node=8 train_gpt.py       with the ranks that will train

Prints facts, then problems with their remedies, then everything as JSON in one line, `check_json:{...}`. The exit code
is 1 if there are problems. Data that is missing is a problem among others: the rest is checked all the same.
"""

import contextlib
import datetime
import difflib
import inspect
import json
import math
import os
import platform
import re
import shutil
import socket
import statistics
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import train_gpt

# Bits per weight, and how many times as many zlib -9 takes: measured on 2**20 Gaussian weights of 4 to 8 bits.
ZLIB_OVERHEAD = ((2.31, 3.33, 4.12, 4.72, 5.32, 6.33, 7.34), (1.187, 1.158, 1.137, 1.099, 1.047, 1.013, 1.009))
FP16_UNDER_ZLIB = 0.92  # of its bytes, measured on 2**18 Gaussian weights
SAMPLED = 2**16  # tokens read at either end of a training shard
# Knobs of other trainers in this line, which would be ignored in silence.
ELSEWHERE = {
    "WARMDOWN_ITERS": "set WARMDOWN_FRAC to this over the steps that the run will take",
    "MUON_WD": "set MUON_WEIGHT_DECAY",
    "ADAM_WD": "set EMBED_WEIGHT_DECAY and SCALAR_WEIGHT_DECAY",
    "XSA_LAST_N": "set XSA_LAYERS",
    "INT8_SCALE_FLOOR": "set CLIP_ATTN, CLIP_MLP and CLIP_EMBED",
}
CPU_TOKENS = 4096  # of the micro-step that a CPU is measured with
UNPRINTED = r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"  # characters that a line of a file cannot hold


def check_combinations(config):
    """What must hold between knobs, and what their values must be to come back from config.env."""
    require = train_gpt.require
    D = config.model_dim
    T = config.train_seq_len
    for name, field in config.knobs().items():
        odd = f"{UNPRINTED}|\".*'|'.*\""
        value = getattr(config, field.name)
        require(
            not re.search(odd, str(value)),
            f"{name}={value!r} holds control characters or both kinds of quotes: use another name",
        )
    require(round(config.mlp_mult * D), f"MLP_MULT={config.mlp_mult} of MODEL_DIM={D} is nothing: raise it")
    require(config.eval_stride <= T, f"EVAL_STRIDE={config.eval_stride} is over TRAIN_SEQ_LEN={T}: lower it")
    micro, free = config.micro_batch_tokens, ("auto", "0")
    require(
        re.fullmatch("auto|0|[1-9][0-9]{,14}", micro) and (micro in free or int(micro) >= T),
        f"MICRO_BATCH_TOKENS={micro}: expected auto, 0 (unlimited) or at least one TRAIN_SEQ_LEN={T}",
    )
    require(
        not config.grad_accum_steps or micro in free,
        "GRAD_ACCUM_STEPS and MICRO_BATCH_TOKENS are both given: unset one, both cut the step",
    )
    require(
        config.ema_share == 1 or config.ema_decay,
        f"EMA_SHARE={config.ema_share} is of an average, and EMA_DECAY=0 makes none: set EMA_DECAY, to about 0.99",
    )


def knobs_of_model_files() -> dict[str, str]:
    """{knob: the file under records/models/ that adds it}, read from their texts: no code of theirs runs."""
    root = Path(train_gpt.__file__).resolve().parent
    return {
        name.upper(): path.relative_to(root).as_posix()
        for path in sorted((root / "records" / "models").glob("*.py"))
        for name in re.findall(r"^    (\w+): \w+ = knob\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }


# Knobs that left the script for a model file, with the values at which they do nothing.
MOVED = {
    "MLP_SLOPE": "0.0", "ROPE_DIMS": "0", "XSA_LAYERS": "0", "ATTN_GATE": "0", "X0_MIX": "1", "LN_SCALE": "0",
    "GATED_SKIPS": "0", "PARALLEL_FROM": "-1", "SMEAR_GATE": "0", "CANONICAL": "0", "LOOP_LAYERS": "",
    "MUON_ROW_NORM": "0", "LOOP_PASSES": "3", "LOOP_START": "0.35", "START_TOKEN": "1", "CODEC": "zlib", "WEIGHT_BITS": "8", "EMBED_BITS": "8", "CLIP_ATTN": "0.0",
    "CLIP_MLP": "0.0", "CLIP_EMBED": "0.0", "GPTQ_BATCHES": "0", "FIT_SIZE": "0",
}  # fmt: skip


def drop_moved_knobs(texts: dict[str, str], knobs) -> dict[str, str]:
    return {name: text for name, text in texts.items() if name in knobs or MOVED.get(name) != text}


def nearest(name: str, knobs) -> str:
    """A hint on what a name that is no knob may have meant."""
    file = knobs_of_model_files().get(name)
    if file:
        return f"it is one of a model file: set MODEL_FILE={file}"
    close = difflib.get_close_matches(name.upper(), knobs, 1)
    return f"did you mean {close[0]}?" if close else "see --help"


def meet(environ, timeout: datetime.timedelta) -> dist.Store:
    """The store at which all ranks of a torchrun launch have met. A rank that waits for more than ten seconds says for
    whom, and a failure is one line."""
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


def schedule(config) -> str:
    """The learning rate over the run, as a person would say it."""
    clock, steps = config.max_wallclock_seconds, config.iterations
    if config.model_class().lr_scale is not train_gpt.Model.lr_scale:
        return "as the model's own lr_scale says"
    full = 1 - config.warmdown_frac
    by_clock = f"full until {full * clock:.0f} s, then linear to 0 at {clock:.0f} s"
    by_steps = f"full until step {full * steps:.0f}, then linear to 0 at step {steps}"
    if config.lr_floor:
        by_clock, by_steps = (f"{words}, but not below {config.lr_floor}" for words in (by_clock, by_steps))
    return f"{by_clock}; or {by_steps}, if that comes first" if clock else by_steps


def versions(config, runtime) -> dict:
    nccl = {name: text for name, text in os.environ.items() if name.startswith("NCCL_")}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": runtime.device_name(),
        "device_type": runtime.device.type,
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "ranks": int(runtime.all_reduce([1.0])[0]),
        "target_ranks": config.target_world_size or runtime.world_size,
        "nccl_environment": nccl,
    }


def host_name(config, runtime) -> dict:
    """gloo takes the network interface that the name of the host leads to."""
    name, several = socket.gethostname(), (config.target_world_size or runtime.world_size) > 1
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
    """Headers and sizes of all shards; the tokens of each are too many to read whole, so its two ends are."""
    stream, sampled = train_gpt.TokenStream(config.data_path, "train", config.vocab_size), 0
    for end, shard in zip(stream.ends.tolist(), stream.shards, strict=True):
        for start in {end - len(shard), max(end - len(shard), end - SAMPLED)}:
            sampled += len(stream.read(start, min(SAMPLED, end - start)))
    return {
        "train_shards": len(stream.shards),
        "train_tokens": len(stream),
        "train_tokens_checked": f"{min(sampled, len(stream))} of {len(stream)}, at both ends of each shard",
    }


def validation_data(config, folder) -> dict:
    """The validation text is read whole: its score is what everything is about."""
    stream, _, audited = train_gpt.open_text(config, folder)
    return {"val_shards": len(stream.shards), "val_tokens": len(stream), "bytes_proved": False} | audited


def activation_bytes(model, tokens) -> int:
    """What autograd keeps of one sequence, measured on an eager forward; a compiled model keeps less."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, tokens)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def bits_per_weight(config, name: str, columns: int) -> float:
    """The size law: the entropy of Gaussian weights in steps of k / qmax standard deviations is 2.047 bits (half of
    log2(2 pi e)) + log2(qmax / k), and a little for what the steps hide and the clip cuts."""
    row = config.model_class().rule(name)
    qmax = 2 ** (getattr(config, row.bits) - 1) - 1
    # A percentile so high is about the largest of a row, whose expectation this is.
    largest = statistics.NormalDist().inv_cdf(1 - math.exp(-0.5772) / (2 * columns))
    k = getattr(config, f"clip_{row.clip}") or largest
    return 2.047 + math.log2(qmax / k) + 0.060 * (k / qmax) ** 2


def projected_bytes(config, model) -> int:
    """Of the artifact of a trained model, whose rows are about Gaussian. The size of an untrained one says nothing."""
    bits, rest = 0.0, 4096
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            rest += tensor.nbytes
        elif tensor.numel() <= train_gpt.INT8_MIN_NUMEL:
            wide = config.codec == "zlib" and model.rule(name).fp32
            rest += tensor.numel() * (4 if wide else 2 * FP16_UNDER_ZLIB)
        else:
            rest += 2 * tensor.shape[0]  # the scales
            entropy = bits_per_weight(config, name, tensor.shape[-1])
            bits += tensor.numel() * entropy * (1.001 if config.codec == "rans" else np.interp(entropy, *ZLIB_OVERHEAD))
    return round(bits / 8 + rest)


def device_memory(device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None


def model_and_step(config, runtime, problems: list[str], log) -> dict:
    """Build the model, run a real micro-step twice, and reckon from it what a run will take. Where other ranks are to
    train than there are, tools/steptime.py predicts that from public runs."""
    T, ranks = config.train_seq_len, config.target_world_size or runtime.world_size
    kind = "cuda" if config.target_world_size else runtime.device.type
    here = kind == runtime.device.type
    accum_steps = config.accumulation_steps(ranks, kind)
    micro = config.train_batch_tokens // ranks // accum_steps
    model, compiled_model, kernels = train_gpt.build_model(config, runtime)
    params = sum(p.numel() for p in model.parameters())
    code = sum(len(path.read_bytes()) for path in train_gpt.source_paths(config).values())
    projected = projected_bytes(config, model)
    # A GPU gets the whole micro-batch, compiled. A CPU gets a small one; its compilation takes far longer than all
    # the rest together, and is left to COMPILE=1 and autotune, where the CPU is to train.
    on_cpu = runtime.device.type == "cpu"
    chosen = model if on_cpu and (not here or config.compile in ("auto", "0")) else compiled_model
    rows = max(1, min(micro, CPU_TOKENS) // T) if on_cpu else micro // T
    tokens = torch.zeros(rows, T, dtype=torch.long, device=runtime.device)
    seconds = {}
    for looping in {False, model.has_loops}:
        model.looping = looping
        for _ in range(2):  # the first compiles
            runtime.synchronize()
            began = time.perf_counter()
            output = chosen(tokens, tokens.clone())
            (output[0] if isinstance(output, tuple) else output).mean().backward()
            runtime.synchronize()
        seconds[looping] = time.perf_counter() - began
    # A run is without depth recurrence up to LOOP_START, and with it from there on, by its clock.
    steps = config.loop_start / seconds[False] + (1 - config.loop_start) / seconds.get(True, seconds[False])
    per_token = 1 / steps / tokens.numel()
    # Weights, gradients, optimizers, the reduced gradients of DDP; then what a micro-batch keeps for its backward.
    copies = 5 + bool(config.ema_decay)
    estimate = copies * sum(p.nbytes for p in model.parameters()) + activation_bytes(model, tokens[:1]) * (micro // T)
    memory = device_memory(runtime.device) if here else None
    facts = {
        "model_params": params,
        "kernels": kernels.replace("\n", "; "),
        "seconds_per_token": per_token,
        "micro_step": f"{rows} sequences of {T} tokens, {'eager' if chosen is model else 'compiled'}: runs",
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
    if projected + code > config.size_limit and not config.fit_size:
        problems.append(
            f"{params} parameters take about {projected} bytes as {train_gpt.artifact_names(config)[1]}, "
            f"{projected + code} with the code, over {config.size_limit}: lower MODEL_DIM, NUM_LAYERS, "
            "MLP_MULT or VOCAB_SIZE, or set CODEC=rans and fewer WEIGHT_BITS"
        )
    if memory and estimate > memory:
        problems.append(
            f"a micro-step of {micro} tokens needs about {estimate >> 20} MiB, the device has "
            f"{memory >> 20}: set a lower MICRO_BATCH_TOKENS"
        )
    if kind == runtime.device.type and runtime.world_size == ranks:
        step, clock = per_token * config.train_batch_tokens / ranks, config.max_wallclock_seconds or math.inf
        count = int(min(config.iterations, clock / step))
        facts |= {
            "seconds_per_step": step,
            "ms_per_step": round(1000 * step, 1),
            "steps_in_budget": count,
            "tokens_in_budget": count * config.train_batch_tokens,
            "step_time_rests_on": "micro-steps that ran here, forward and backward: without optimizers and reductions",
        }
    elif steptime := train_gpt.tool("steptime", log):
        facts |= steptime.predict(config, model, ranks)
    else:
        facts |= {"seconds_per_step": None, "steps_in_budget": f"unknown: no {ranks} ranks of {kind} to measure on"}
    step = facts["seconds_per_step"] or 0.0
    if step > (config.max_wallclock_seconds or math.inf):
        problems.append(
            f"one step takes about {step:.0f} s, the clock is {config.max_wallclock_seconds:.0f} s: lower "
            "TRAIN_BATCH_TOKENS or raise MAX_WALLCLOCK_SECONDS"
        )
    return facts


def disk(config, params: int) -> dict:
    """A run writes its model and its artifact, and a checkpoint beside the one before it."""
    path = Path(config.log_dir).absolute()
    place = next(parent for parent in (path, *path.parents) if parent.exists())
    free, need = shutil.disk_usage(place).free, (30 + 8 * bool(config.ema_decay)) * params + 2**24
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise OSError(f"LOG_DIR={config.log_dir}: {place} cannot be written to: choose another")
    if free < need:
        raise OSError(f"LOG_DIR={config.log_dir} has {free >> 20} MiB free, a run needs {need >> 20}: make room")
    return {"disk_free_mib": free >> 20, "disk_need_mib": need >> 20}


def explain(config_class) -> int:
    """--help: every knob with its default and its meaning, those of MODEL_FILE among them. The exit code."""
    if config_class is train_gpt.Config and os.environ.get("MODEL_FILE"):
        config_class = train_gpt.tool("evaluate", required=True).config_class_of(os.environ["MODEL_FILE"])
    print(train_gpt.__doc__ + "\nKnobs; what is [free] does not shape the result, and may differ when a run resumes:")
    for name, field in config_class.knobs().items():
        default = int(field.default) if isinstance(field.default, bool) else field.default
        choices = f" ({', '.join(field.metadata['allowed'][2])})" if field.metadata["allowed"][2] else ""
        print(f"{name}={default}  {field.metadata['meaning']}{choices}{' [free]' * field.metadata['free']}")
    return 0


def typo_warnings(environ, knobs) -> list[str]:
    """One for each environment variable that is almost a knob, or one of a model file or of other trainers; and one
    for srun, which starts as many single runs where torchrun should start ranks."""
    warnings, tasks, others = [], environ.get("SLURM_NTASKS", "1"), knobs_of_model_files()
    if tasks.isdecimal() and int(tasks) > 1 and "WORLD_SIZE" not in environ:
        warnings.append(
            f"warning: SLURM_NTASKS={tasks} and WORLD_SIZE is not set: srun started {tasks} single runs: "
            "start torchrun once per node"
        )
    for name in sorted(name for name in environ.keys() - knobs.keys() if name.isprintable()):
        # A wrong letter of n leaves 1 - 1/n of a name.
        close = difflib.get_close_matches(name.upper(), knobs, 1, min(0.85, 1 - 1 / max(len(name), 4)))
        hint = nearest(name, knobs) if name in others else ELSEWHERE.get(name)
        hint = hint or (f"did you mean {close[0]}?" if close else "")
        if hint:
            warnings.append(f"warning: the environment variable {name} is no knob: {hint}")
    return warnings


def main(config, folder, argv: list[str]) -> int:
    """The exit code: 1 if there are problems."""
    runtime, problems = folder.runtime, []
    for warning in typo_warnings(os.environ, config.knobs()):
        folder.log(warning)
    facts = versions(config, runtime)
    parts = (
        lambda: host_name(config, runtime),
        lambda: training_data(config),
        lambda: validation_data(config, folder),
        lambda: model_and_step(config, runtime, problems, folder.log),
        lambda: disk(config, facts.get("model_params", 0)),
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
