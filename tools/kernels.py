"""What this machine runs best: which attention kernel, whether to compile; and how fast it could be at most.

train_gpt.py loads this file where it is there. The choice changes no result but by rounding, and the log tells it.
"""

import contextlib
import ctypes
import math
import statistics
import sys
import tempfile
import time

import torch
import torch.nn.functional as F

import train_gpt
from train_gpt import Model, UserError, at_least_fp32, grouped_attention, is_out_of_memory, require, tool

cpu_kernels = tool("cpu_kernels", log=str)

# What a GPU's bf16 products reach at most, dense, in TFLOP/s, by a part of its name (NVIDIA's data sheets).
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


# What torch.compile is told beyond its defaults, by COMPILE. Only a product that is a Triton template can take the
# squared activation into the same kernel: the fastest of torch's and those is chosen with what follows it.
COMPILE_OPTIONS = {"autotune": {"max_autotune_gemm": True, "coordinate_descent_tuning": True, "epilogue_fusion": True}}


def peak_flops(runtime) -> float | None:
    """FLOP/s of this rank's device; None where it is not known."""
    if runtime.device.type != "cuda" or runtime.dtype != torch.bfloat16:
        return None
    return next((1e12 * peak for name, peak in PEAK_TFLOPS.items() if name in runtime.device_name()), None)


def share_of_peak(model, config, runtime, tokens_per_second: float) -> float | None:
    """MFU: what that speed of all ranks takes of what their devices could do; None where that is not known."""
    peak = peak_flops(runtime)
    flops = model.flops_per_token(config.train_seq_len)
    return tokens_per_second * flops / (peak * runtime.world_size) if peak else None


def choose_compile(config, runtime) -> tuple[bool, str]:
    """Whether to torch.compile, and why: it is tried on a tiny function."""
    unreliable = runtime.device.type == "mps" or sys.platform == "win32"
    if config.compile == "0" or (config.compile == "auto" and unreliable):
        return False, f"COMPILE={config.compile} on {runtime.device.type}, {sys.platform}"
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=runtime.device))
        slow = "; autotune: kernels are timed, which takes minutes more before the first step"
        return True, "a trial compilation worked" + slow * (config.compile in COMPILE_OPTIONS)
    except Exception as error:  # whatever a missing or broken toolchain raises
        reason = f"a trial compilation failed: {error!r:.120}"
        require(config.compile == "auto", f"COMPILE={config.compile}: {reason}: get a C++ compiler or use COMPILE=0")
        return False, reason


def expanded_attention(q_BHTd, k_BKTd, v_BKTd):
    """For kernels without grouped heads."""
    k_BHTd, v_BHTd = (x.repeat_interleave(q_BHTd.size(1) // x.size(1), dim=1) for x in (k_BKTd, v_BKTd))
    return F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, is_causal=True)


def blocked_attention(q_BHTd, k_BKTd, v_BKTd, block: int = 128):
    """Plain products, each block of queries against its own past. Twice as fast as torch's CPU flash kernel
    at T = 256, but its memory grows with T squared."""
    B, H, T, d = q_BHTd.shape
    G, k_NTd, v_NTd, outputs = H // k_BKTd.size(1), k_BKTd.flatten(0, 1), v_BKTd.flatten(0, 1), []
    q_NGTd = q_BHTd.reshape(-1, G, T, d)
    for start in range(0, T, block):
        past, q_NSd = slice(start + block), q_NGTd[:, :, start : start + block].flatten(1, 2)
        scores = at_least_fp32((q_NSd @ k_NTd[:, past].mT).unflatten(1, (G, -1))) * d**-0.5
        hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(start + 1)
        weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1).to(v_NTd.dtype)
        outputs.append((weights.flatten(1, 2) @ v_NTd[:, past]).unflatten(1, (G, -1)))
    return torch.cat(outputs, dim=2).view(B, H, T, -1)


def fused_attention(q_BHTd, k_BKTd, v_BKTd):
    """By tools/cpu_kernels.py, where it takes the shape; sequences of a sample come in every length."""
    if cpu_kernels.takes_attention(*q_BHTd.shape[2:], q_BHTd.dtype):
        return cpu_kernels.fused_attention(q_BHTd, k_BKTd, v_BKTd)
    return blocked_attention(q_BHTd, k_BKTd, v_BKTd)


def flash3_attention(q_BHTd, k_BKTd, v_BKTd):
    from flash_attn_interface import flash_attn_func  # late: few machines have it

    y_BTHd = flash_attn_func(*(x.transpose(1, 2) for x in (q_BHTd, k_BKTd, v_BKTd)), causal=True)
    return (y_BTHd[0] if isinstance(y_BTHd, tuple) else y_BTHd).transpose(1, 2)


def attention_inputs(config, runtime, rows: int) -> list[torch.Tensor]:
    """q, k and v [rows, T, heads, d] of normal random numbers, every sequence the same."""
    heads, d = (config.num_heads, *[config.num_kv_heads] * 2), config.model_dim // config.num_heads
    generator = torch.Generator().manual_seed(0)
    sequence = [torch.randn(1, config.train_seq_len, n, d, generator=generator) for n in heads]
    return [x.to(runtime.device, runtime.dtype).repeat(rows, 1, 1, 1) for x in sequence]


def prove_attention(attend, config, runtime, rows: int):
    """Train `rows` sequences with the model's strides, and compare the beginning of the first, on which nothing
    later has an influence, with plain products in fp32. Raises whatever is wrong."""
    inputs, results = attention_inputs(config, runtime, rows), []
    beginnings = [x[:1, :1024].clone().float() for x in inputs]
    for run, leaves in ((attend, inputs), (blocked_attention, beginnings)):
        y = run(*(x.requires_grad_().transpose(1, 2) for x in leaves)).transpose(1, 2)[:, :1024]
        y.float().square().sum().backward()
        results.append([tensor[:1, :1024].detach().float() for tensor in (y, *(x.grad for x in leaves))])
    for ours, plain in zip(*results, strict=True):
        error = float((ours - plain).abs().max() / plain.abs().max())
        if not error < 0.05:  # that of bf16 is under 0.02
            raise RuntimeError(f"it errs by {error:.2g} of the largest value")


def time_attention(attend, config, runtime, rows: int, rounds: int = 9) -> float:
    """Seconds of forward and backward for one sequence in one layer, with the model's strides: the median of so many
    rounds after a first one."""
    leaves, taken = [x.requires_grad_() for x in attention_inputs(config, runtime, rows)], []
    dy_BHTd = torch.randn_like(leaves[0]).transpose(1, 2)
    for _ in range(1 + rounds):
        runtime.synchronize()
        began = time.perf_counter()
        torch.autograd.grad(attend(*(x.transpose(1, 2) for x in leaves)), leaves, dy_BHTd)
        runtime.synchronize()
        taken.append((time.perf_counter() - began) / rows)
    return statistics.median(taken[1:])


def pin_attention(name: str):
    """Of SDPA's kernels this one alone; all of them beside a kernel that is not SDPA's."""
    kernels = ("flash", "cudnn", "mem_efficient", "math")
    ours = all(kernel.removeprefix("mem_") != name for kernel in kernels)
    for kernel in kernels:
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(ours or kernel.removeprefix("mem_") == name)
    # torch finds compiled code on the disk by a key that leaves these switches out, and would run the kernel of an
    # earlier choice (pytorch issue 185449); and what an operator of ours computes on the way back.
    torch.compiler.config.cache_key_tag = f"attention:{name} {cpu_kernels and cpu_kernels.WIRING}"


def try_attention(name: str, config, runtime, compiled: bool, seconds_of=None):
    """(function or None, seconds by `seconds_of`, what failed before it) of the first that trains with this backend as
    it should."""
    own, failed = {"flash3": flash3_attention, "blocked": blocked_attention, "fused": fused_attention}, ""
    T, ranks, kind = config.train_seq_len, runtime.world_size, runtime.device.type
    rows = config.train_batch_tokens // (ranks * config.accumulation_steps(ranks, kind) * T)
    pin_attention(name)
    for attend in [own[name]] if name in own else [grouped_attention, expanded_attention]:
        # On a CPU compiling takes long and finds out nothing.
        on_gpu = compiled and kind == "cuda"
        run = torch.compile(attend, fullgraph=True, dynamic=False) if on_gpu else attend
        for halvings in range(rows.bit_length()):  # as will be done to the micro-batch
            try:
                prove_attention(run, config, runtime, rows >> halvings)
                return attend, seconds_of and seconds_of(run, config, runtime, rows >> halvings), failed
            except Exception as error:  # of the kernel, its package, or the compiler
                if rows >> halvings == 1 or not is_out_of_memory(error):
                    failed += f"; {name} {attend.__name__} failed: {error!r:.120}"
                    break
            finally:
                if on_gpu:  # of graphs there may only be so many; and for one that is there no switch is looked at
                    torch._dynamo.reset()
    return None, math.inf, failed


def fastest_first(found: dict, config, runtime) -> tuple[dict, str]:
    """({backend: (function, seconds)} sorted by what all ranks take together, times for the log)."""
    names = config.knobs()["ATTENTION"].metadata["allowed"][2]  # on every rank the same
    mine = [found[name][1] if name in found else math.inf for name in names]
    sums = dict(zip(names, runtime.all_reduce(mine), strict=True))
    found = {name: found[name] for name in sorted(found, key=sums.get) if sums[name] < math.inf}
    times = ", ".join(f"{name} {1000 * sums[name] / runtime.world_size:.3g}" for name in found)
    return found, f"; forward and backward of a sequence in a layer, ms: {times}"


def choose_attention(config, runtime, compiled: bool, seconds_of=time_attention):
    """(function, log lines) of the first backend that trains as it should, or with ATTENTION=fastest of the one that
    all ranks together take the least time with, by `seconds_of`; SDPA is pinned to it."""
    T, kind, asked, failed, found = config.train_seq_len, runtime.device.type, config.attention, "", {}
    order = {"cuda": "flash cudnn efficient math", "mps": "math blocked", "cpu": "flash math"}[kind]
    major = torch.cuda.get_device_capability(runtime.device)[0] if kind == "cuda" else 0
    order = "flash3 cudnn flash efficient math" if major in (9, 10) else order  # Hopper and Blackwell
    order = f"blocked {order}" if kind == "cpu" and T <= 1024 else order
    d = config.model_dim // config.num_heads
    fused = bool(kind == "cpu" and cpu_kernels and cpu_kernels.takes_attention(T, d, runtime.dtype))
    order = f"fused {order}" if fused else order
    require(
        fused or asked != "fused",
        "ATTENTION=fused wants a CPU, float32 or AVX-512 that multiplies bfloat16, "
        f"TRAIN_SEQ_LEN={T} in whole 64 up to 2,048 and heads of even width, not {d}: use ATTENTION=auto",
    )
    timed, times = asked == "fastest", ""
    for name in order.split() if timed or asked == "auto" else [asked]:
        if found and (not timed or name == "math"):  # which is never the fastest, and keeps all scores
            break
        attend, seconds, failures = try_attention(name, config, runtime, compiled, seconds_of if timed else None)
        failed += failures
        if attend:
            found[name] = attend, seconds
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
    if major == 9 and asked in ("auto", "fastest") and not {"flash3", "cudnn"} & found.keys():
        note += (
            f"\nwarning: attention by {name}, since neither FlashAttention 3 nor cuDNN works: public runs lost 10 "
            "to 20 ms a step on H100s by that: install flash_attn_interface, or a torch with cuDNN 9"
        )
    return attend, note


def choose_loss(config, runtime):
    """(function of (model, features, targets) that gives the losses, or None for torch's; log line)."""
    # A class that overrides what the kernel replaces must say in its own body that it calls the kernel itself.
    replaced = {"forward", "logits", "losses"}
    author = next(cls for cls in config.model_class().__mro__ if replaced & vars(cls).keys())
    own = author is not Model and not vars(author).get("calls_fused_loss")
    if not cpu_kernels or own or not cpu_kernels.takes_loss(config.vocab_size, config.logit_softcap, runtime):
        return None, "loss:torch"
    try:
        return cpu_kernels.fused_loss, f"loss:fused by {cpu_kernels.describe(runtime.dtype)}"
    except Exception as error:  # of the compiler
        return None, f"loss:torch; fused failed: {error!r:.120}"


def fused_newton_schulz(stack, polynomials: list[tuple[float, float, float]]):
    """By tools/cpu_kernels.cpp, where it takes these matrices."""
    takes = cpu_kernels.takes_newton_schulz(stack)
    return (cpu_kernels if takes else train_gpt).newton_schulz(stack, polynomials)


def choose_newton_schulz(runtime):
    """(function of (stack, polynomials) for Muon, or None for train_gpt's; log line)."""
    takes = cpu_kernels and cpu_kernels.HAS_INSTRUCTIONS
    if not takes or runtime.device.type != "cpu" or runtime.dtype != torch.bfloat16:
        return None, "muon:torch"
    try:
        return fused_newton_schulz, f"muon:fused by {cpu_kernels.describe(runtime.dtype)}"
    except Exception as error:  # of the compiler
        return None, f"muon:torch; fused failed: {error!r:.120}"


def keep_memory():
    """glibc hands large blocks back to the system, which clears them when the next step wants them again: 0.1 of a step
    in small models. From here on it keeps them, but those of over 32 MiB."""
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 2**25)
        libc.mallopt(trim_threshold, 2**31 - 1)


def choose(config, runtime):
    """(attention function, loss function or None, whether to compile, lines for the log). The runtime gets Muon's."""
    name, device = runtime.device_name(), runtime.device
    try:
        tempfile.gettempdir()
    except OSError as error:  # torch's compiler and its optimizers import what wants one
        raise UserError(f"{error}: set TMPDIR to a folder that can be written to") from error
    try:
        torch.ones(8, device=device).sum().item()
    except RuntimeError as error:  # a card that this build of torch has no kernels for
        raise UserError(
            f"DEVICE={device}: torch {torch.__version__} cannot use {name} ({error!s:.120}): "
            "install a torch that is built for it, or use DEVICE=cpu"
        ) from error
    if device.type == "cpu":
        keep_memory()
    compiled, compile_note = choose_compile(config, runtime)
    attend, attention_note = choose_attention(config, runtime, compiled)
    fused_loss, loss_note = choose_loss(config, runtime)
    runtime.newton_schulz, muon_note = choose_newton_schulz(runtime)
    if device.type == "cuda" and runtime.dtype == torch.float32:
        compile_note += "; no bf16 products in hardware, or DTYPE=float32: slow"
    note = f"{attention_note}\n{loss_note}\n{muon_note}\ncompile:{int(compiled)} ({compile_note})"
    return attend, fused_loss, compiled, note
