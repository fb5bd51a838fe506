"""Which kernels run fastest on this machine, whether to compile, and how fast its devices are at most.

train_gpt.py works without this file. The choice changes results only by rounding, and is logged.
"""

import contextlib
import ctypes
import math
import platform
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import train_gpt
from train_gpt import Linear, Model, UserError, at_least_fp32, grouped_attention, require, tool

cpu_kernels = tool("cpu/cpu_kernels")

# Peak of dense bf16 matmuls in TFLOP/s, by a part of the GPU's name (NVIDIA's data sheets).
PEAK_TFLOPS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "RTX 5090": 209,
    "RTX 4090": 165,
    "RTX 3090": 71,
}

# Options of torch.compile by COMPILE. Only a matmul that is a Triton template can be fused with the squared activation.
# Autotuning times those templates and torch's own matmuls together with what follows them.
COMPILE_OPTIONS = {"autotune": {"max_autotune_gemm": True, "coordinate_descent_tuning": True, "epilogue_fusion": True}}


def choose_device(config, world_size: int) -> str:
    """The kind of device that every rank uses: cuda, mps or cpu."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    for_other_machine = config.mode == "check" and config.target_world_size
    kind = config.device
    if kind == "auto" or for_other_machine:
        kind = next(name for name in found if found[name])
    require(found[kind], f"DEVICE={kind}: torch {torch.__version__} finds none here: use DEVICE=auto")
    require(kind != "mps" or world_size == 1, f"WORLD_SIZE={world_size}: use one process, or DEVICE=cpu")
    return kind


def best_dtype(kind: str) -> str:
    """bfloat16 where the hardware of this kind of device multiplies it, float32 elsewhere."""
    native = False
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, test, bool)() for test in tests)
    return "bfloat16" if native else "float32"


def device_name(device: torch.device) -> str:
    """The name of the GPU, or that of the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    name = re.search(r"model name\s*: (.*)", cpuinfo)
    return f"{name[1] if name else platform.processor()}, {torch.get_num_threads()} threads"


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is how the CPU, CUDA, its libraries (CUBLAS_STATUS_ALLOC_FAILED) or MPS run out of memory."""
    return bool(re.search("(not enough|can't allocate|out of) memory|ALLOC_FAILED", str(error)))


def peak_flops(runtime) -> float | None:
    """Peak FLOP/s of this rank's device, or None if it is unknown."""
    if runtime.device.type != "cuda" or runtime.dtype != torch.bfloat16:
        return None
    return next((1e12 * peak for name, peak in PEAK_TFLOPS.items() if name in runtime.device_name), None)


def flops_per_token(model, seq_len: int) -> int:
    """Training FLOPs of a token: 6 for each weight that multiplies (Kaplan et al. 2020) and 12 T D for each attention.

    The latter counts the full square of positions, as PaLM does. A model may count its own.
    """
    own = model.flops_per_token(seq_len)
    if own is not None:
        return own
    weights = {id(module.weight): module.weight for module in model.modules() if isinstance(module, Linear)}
    width = 0
    if hasattr(model, "tok_emb"):  # unless the model has its own way from features to logits
        output = model.output_weight()[1]
        weights[id(output)] = output
        width = output.size(1)
    attentions = sum(hasattr(module, "attend") for module in model.modules())
    return 6 * sum(weight.numel() for weight in weights.values()) + 12 * seq_len * width * attentions


def share_of_peak(model, config, runtime, tokens_per_second: float) -> float | None:
    """MFU: the fraction of the peak FLOP/s of all ranks that this speed uses, or None if the peak is unknown."""
    peak = peak_flops(runtime)
    if not peak:
        return None
    return tokens_per_second * flops_per_token(model, config.train_seq_len) / (peak * runtime.world_size)


def speed(trainer) -> str:
    """For a log line: the tokens per second of all ranks over the last steps, and the MFU if it is known."""
    tokens_per_second = trainer.config.train_batch_tokens / max(statistics.fmean(trainer.step_seconds), 1e-9)
    mfu = share_of_peak(trainer.model, trainer.config, trainer.runtime, tokens_per_second)
    return f" tok/s:{tokens_per_second:.0f}" + (f" mfu:{mfu:.1%}" if mfu else "")


def choose_compile(config, runtime) -> tuple[bool, str]:
    """Whether to use torch.compile, and why. It is tried on a tiny function."""
    unreliable = runtime.device.type == "mps" or sys.platform == "win32"
    if config.compile == "0" or (config.compile == "auto" and unreliable):
        return False, f"COMPILE={config.compile} on {runtime.device.type}, {sys.platform}"
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=runtime.device))
        slow = "; autotune: kernels are timed, which takes more minutes before the first step"
        return True, "a trial compilation worked" + slow * (config.compile in COMPILE_OPTIONS)
    except Exception as error:  # whatever a missing or broken toolchain raises
        reason = f"a trial compilation failed: {error!r:.120}"
        require(config.compile == "auto", f"COMPILE={config.compile}: {reason}: get a C++ compiler or use COMPILE=0")
        return False, reason


def expanded_attention(q_BHTd, k_BKTd, v_BKTd):
    """Causal attention by kernels that do not know grouped heads."""
    groups = q_BHTd.size(1) // k_BKTd.size(1)
    k_BHTd = k_BKTd.repeat_interleave(groups, dim=1)
    v_BHTd = v_BKTd.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, is_causal=True)


def blocked_attention(q_BHTd, k_BKTd, v_BKTd, block: int = 128):
    """Causal attention by plain matmuls, each block of queries against its own past.

    It is twice as fast as torch's CPU flash kernel at T = 256, but its memory grows with T squared.
    """
    B, H, T, d = q_BHTd.shape
    G = H // k_BKTd.size(1)
    k_NTd = k_BKTd.flatten(0, 1)
    v_NTd = v_BKTd.flatten(0, 1)
    outputs = []
    q_NGTd = q_BHTd.reshape(-1, G, T, d)
    for start in range(0, T, block):
        past = slice(start + block)
        q_NSd = q_NGTd[:, :, start : start + block].flatten(1, 2)
        scores = at_least_fp32((q_NSd @ k_NTd[:, past].mT).unflatten(1, (G, -1))) * d**-0.5
        hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(start + 1)
        weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1).to(v_NTd.dtype)
        outputs.append((weights.flatten(1, 2) @ v_NTd[:, past]).unflatten(1, (G, -1)))
    return torch.cat(outputs, dim=2).view(B, H, T, -1)


def fused_attention(q_BHTd, k_BKTd, v_BKTd):
    """By tools/cpu/cpu_kernels.py where it takes the shape. The sequences of a sample have every length."""
    if cpu_kernels.takes_attention(*q_BHTd.shape[2:], q_BHTd.dtype):
        return cpu_kernels.fused_attention(q_BHTd, k_BKTd, v_BKTd)
    return blocked_attention(q_BHTd, k_BKTd, v_BKTd)


def flash3_attention(q_BHTd, k_BKTd, v_BKTd):
    from flash_attn_interface import flash_attn_func  # few machines have it

    y_BTHd = flash_attn_func(*(x.transpose(1, 2) for x in (q_BHTd, k_BKTd, v_BKTd)), causal=True)
    return (y_BTHd[0] if isinstance(y_BTHd, tuple) else y_BTHd).transpose(1, 2)


def attention_inputs(config, runtime, rows: int) -> list[torch.Tensor]:
    """q, k and v [rows, T, heads, d] of normal random numbers, the same in every sequence."""
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    d = config.model_dim // config.num_heads
    generator = torch.Generator().manual_seed(0)
    sequence = [torch.randn(1, config.train_seq_len, n, d, generator=generator) for n in heads]
    return [x.to(runtime.device, runtime.dtype).repeat(rows, 1, 1, 1) for x in sequence]


def prove_attention(attend, config, runtime, rows: int):
    """Train `rows` sequences with the model's strides, and raise if the result differs from plain matmuls in fp32.

    Only the beginning of the first sequence is compared. Nothing later has an influence on it.
    """
    inputs = attention_inputs(config, runtime, rows)
    beginnings = [x[:1, :1024].clone().float() for x in inputs]
    results = []
    for run, leaves in ((attend, inputs), (blocked_attention, beginnings)):
        y = run(*(x.requires_grad_().transpose(1, 2) for x in leaves)).transpose(1, 2)[:, :1024]
        y.float().square().sum().backward()
        results.append([tensor[:1, :1024].detach().float() for tensor in (y, *(x.grad for x in leaves))])
    for ours, plain in zip(*results, strict=True):
        error = float((ours - plain).abs().max() / plain.abs().max())
        if not error < 0.05:  # the error of bf16 is under 0.02
            raise RuntimeError(f"it errs by {error:.2g} of the largest value")


def time_attention(attend, config, runtime, rows: int, rounds: int = 9) -> float:
    """Seconds of forward and backward per sequence in one layer, with the model's strides.

    It is the median of so many rounds after a first one.
    """
    leaves = [x.requires_grad_() for x in attention_inputs(config, runtime, rows)]
    taken = []
    dy_BHTd = torch.randn_like(leaves[0]).transpose(1, 2)
    for _ in range(1 + rounds):
        runtime.synchronize()
        began = time.perf_counter()
        torch.autograd.grad(attend(*(x.transpose(1, 2) for x in leaves)), leaves, dy_BHTd)
        runtime.synchronize()
        taken.append((time.perf_counter() - began) / rows)
    return statistics.median(taken[1:])


def pin_attention(name: str):
    """Allow only this kernel of SDPA, or all of them if it is none of SDPA's."""
    switches = {"flash": "flash", "cudnn": "cudnn", "efficient": "mem_efficient", "math": "math"}
    for kernel, switch in switches.items():
        getattr(torch.backends.cuda, f"enable_{switch}_sdp")(kernel == name or name not in switches)
    # torch's cache of compiled code has a key without these switches, so it would run the kernel of an earlier choice
    # (pytorch issue 185449). It does not know either what the backward of our own operators computes.
    torch.compiler.config.cache_key_tag = f"attention:{name} {cpu_kernels and cpu_kernels.WIRING}"


def try_attention(name: str, config, runtime, compiled: bool, seconds_of=None):
    """The first function that trains correctly with this backend, or None; its seconds; what failed before it."""
    own = {"flash3": flash3_attention, "blocked": blocked_attention, "fused": fused_attention}
    failed = ""
    ranks = runtime.world_size
    kind = runtime.device.type
    micro_steps = config.accumulation_steps(ranks, kind)
    rows = config.train_batch_tokens // (ranks * micro_steps * config.train_seq_len)
    pin_attention(name)
    for attend in [own[name]] if name in own else [grouped_attention, expanded_attention]:
        # On a CPU compilation takes long and proves nothing.
        on_gpu = compiled and kind == "cuda"
        run = torch.compile(attend, fullgraph=True, dynamic=False) if on_gpu else attend
        for halvings in range(rows.bit_length()):  # tools/checkpoint.py will halve the micro-batch, too
            try:
                prove_attention(run, config, runtime, rows >> halvings)
                return attend, seconds_of and seconds_of(run, config, runtime, rows >> halvings), failed
            except Exception as error:  # of the kernel, its package, or the compiler
                if rows >> halvings == 1 or not is_out_of_memory(error):
                    failed += f"; {name} {attend.__name__} failed: {error!r:.120}"
                    break
            finally:
                if on_gpu:  # the number of graphs is limited, and an existing graph ignores the switches
                    torch._dynamo.reset()
    return None, math.inf, failed


def fastest_first(found: dict, config, runtime) -> tuple[dict, str]:
    """The same {backend: (function, seconds)}, sorted by the time of all ranks together, and the times for the log."""
    names = config.knobs()["ATTENTION"].metadata["allowed"][2]  # the same on every rank
    mine = [found[name][1] if name in found else math.inf for name in names]
    sums = dict(zip(names, runtime.all_reduce(mine), strict=True))
    found = {name: found[name] for name in sorted(found, key=sums.get) if sums[name] < math.inf}
    times = ", ".join(f"{name} {1000 * sums[name] / runtime.world_size:.3g}" for name in found)
    return found, f"; forward and backward of a sequence in a layer, ms: {times}"


def attention_order(config, runtime) -> list[str]:
    """The backends to try with ATTENTION=auto on this device, the best first."""
    if runtime.device.type == "mps":
        return ["math", "blocked"]
    if runtime.device.type == "cuda":
        hopper_or_blackwell = torch.cuda.get_device_capability(runtime.device)[0] in (9, 10)
        first = ["flash3", "cudnn", "flash"] if hopper_or_blackwell else ["flash", "cudnn"]
        return [*first, "efficient", "math"]
    order = ["flash", "math"]
    if config.train_seq_len <= 1024:
        order.insert(0, "blocked")
    if takes_fused_attention(config, runtime):
        order.insert(0, "fused")
    return order


def takes_fused_attention(config, runtime) -> bool:
    if runtime.device.type != "cpu" or not cpu_kernels:
        return False
    return cpu_kernels.takes_attention(config.train_seq_len, config.model_dim // config.num_heads, runtime.dtype)


def choose_attention(config, runtime, compiled: bool, seconds_of=time_attention):
    """The attention function and lines for the log. SDPA is pinned to the backend.

    It is that of the first backend that trains correctly. With ATTENTION=fastest it is the one for which all ranks
    together need the least time, measured by `seconds_of`.
    """
    asked = config.attention
    timed = asked == "fastest"
    require(
        asked != "fused" or takes_fused_attention(config, runtime),
        "ATTENTION=fused wants a CPU, float32 or AVX-512 that multiplies bfloat16, "
        f"TRAIN_SEQ_LEN={config.train_seq_len} in whole 64 up to 2,048 and heads of even width, not "
        f"{config.model_dim // config.num_heads}: use ATTENTION=auto",
    )
    found = {}
    failed = ""
    times = ""
    for name in attention_order(config, runtime) if timed or asked == "auto" else [asked]:
        if found and (not timed or name == "math"):  # math is never the fastest, and keeps all scores
            break
        attend, seconds, failures = try_attention(name, config, runtime, compiled, seconds_of if timed else None)
        failed += failures
        if attend:
            found[name] = (attend, seconds)
    if timed:
        found, times = fastest_first(found, config, runtime)
    require(
        found,
        f"ATTENTION={asked} does not run on {runtime.device}: use ATTENTION=auto, or a smaller MODEL_DIM or "
        f"TRAIN_SEQ_LEN{failed}",
    )
    name, (attend, _) = next(iter(found.items()))
    pin_attention(name)
    note = f"attention:{name} by {attend.__name__}{times}{failed}"
    hopper = runtime.device.type == "cuda" and torch.cuda.get_device_capability(runtime.device)[0] == 9
    if hopper and asked in ("auto", "fastest") and not {"flash3", "cudnn"} & found.keys():
        note += (
            f"\nwarning: attention by {name}, since neither FlashAttention 3 nor cuDNN works: public runs lost 10 "
            "to 20 ms a step on H100s by that: install flash_attn_interface, or a torch with cuDNN 9"
        )
    return attend, note


def uses_fused_loss(model_class) -> bool:
    """Whether the kernel computes what this model would compute.

    A class that overrides what the kernel replaces must state in its own body that it calls the kernel itself.
    """
    bodies = [vars(cls) for cls in model_class.__mro__[: model_class.__mro__.index(Model)]]
    authors = [body for body in bodies if {"forward", "logits", "losses"} & body.keys()]
    return all(body.get("calls_fused_loss") for body in authors)


def choose_loss(config, runtime):
    """A function (model, x_BTD, targets_BT, tokens_BT or None) that returns losses [B, T], or None for torch's own.

    Also a line for the log.
    """
    fits = cpu_kernels and cpu_kernels.takes_loss(config.vocab_size, config.logit_softcap, runtime)
    if not fits or not uses_fused_loss(config.model_class()):
        return None, "loss:torch"
    try:
        return cpu_kernels.fused_loss, f"loss:fused by {cpu_kernels.describe(runtime.dtype)}"
    except Exception as error:  # from the compiler
        return None, f"loss:torch; fused failed: {error!r:.120}"


def fused_newton_schulz(stack, polynomials: list[tuple[float, float, float]]):
    """Muon's iterations by tools/cpu/cpu_kernels.cpp where it takes these matrices."""
    takes = cpu_kernels.takes_newton_schulz(stack)
    return (cpu_kernels if takes else train_gpt).newton_schulz(stack, polynomials)


def choose_newton_schulz(runtime):
    """A function (stack, polynomials) for Muon, or None for the script's own, and a line for the log."""
    takes = cpu_kernels and cpu_kernels.HAS_INSTRUCTIONS
    if not takes or runtime.device.type != "cpu" or runtime.dtype != torch.bfloat16:
        return None, "muon:torch"
    try:
        return fused_newton_schulz, f"muon:fused by {cpu_kernels.describe(runtime.dtype)}"
    except Exception as error:  # from the compiler
        return None, f"muon:torch; fused failed: {error!r:.120}"


def keep_memory():
    """Make glibc keep freed blocks of up to 32 MiB.

    It returns large blocks to the system, which clears them when the next step asks for them again. That takes 10% of a
    step in small models.
    """
    trim_threshold = -1  # both from malloc.h
    mmap_threshold = -3
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 2**25)
        libc.mallopt(trim_threshold, 2**31 - 1)


def choose(config, runtime):
    """Choose kernels: the attention function, the loss function or None, keywords of torch.compile or None, and lines
    for the log.

    None means that the model is not compiled. The function for Muon is set in the runtime.
    """
    device = runtime.device
    try:
        tempfile.gettempdir()
    except OSError as error:  # torch's compiler and optimizers import modules that need one
        raise UserError(f"{error}: set TMPDIR to a folder that can be written to") from error
    try:
        torch.ones(8, device=device).sum().item()
    except RuntimeError as error:  # this build of torch has no kernels for the GPU
        raise UserError(
            f"DEVICE={device}: torch {torch.__version__} cannot use {runtime.device_name} ({error!s:.120}): "
            "install a torch that is built for it, or use DEVICE=cpu"
        ) from error
    if device.type == "cpu":
        keep_memory()
    compiled, compile_note = choose_compile(config, runtime)
    attend, attention_note = choose_attention(config, runtime, compiled)
    fused_loss, loss_note = choose_loss(config, runtime)
    runtime.newton_schulz, muon_note = choose_newton_schulz(runtime)
    if device.type == "cuda" and runtime.dtype == torch.float32:
        compile_note += "; no bf16 matmuls in hardware, or DTYPE=float32: slow"
    note = f"{attention_note}\n{loss_note}\n{muon_note}\ncompile:{int(compiled)} ({compile_note})"
    compile_options = {"options": COMPILE_OPTIONS.get(config.compile)} if compiled else None
    return attend, fused_loss, compile_options, note
