"""Attention and loss for CPUs in C++, and Newton-Schulz iterations for CPUs with AVX-512 instructions for bf16.

tools/kernels.py uses them if there is a compiler, the CPU has the instructions and the shape fits. Elsewhere it uses
torch's operations. Results differ only by rounding, so scoring an artifact needs none of this. A run logs what it used,
with the hash of the C++.
"""

import ctypes
import functools
import hashlib
import math
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
SOURCES = {torch.bfloat16: HERE / "cpu_kernels.cpp", torch.float32: HERE / "cpu_kernels_fp32.cpp"}
WIRING = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]  # torch does not look into our operators
HAS_INSTRUCTIONS = os.name == "posix" and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())  # for bf16
MOST_TOKENS = 2048  # of a sequence, so that the scores of 64 queries stay in the cache
IDLE_SHARE = 0.25  # of the threads at most, since each takes whole matrices
MOST_SOFTCAP = 40.0  # exp(-2 * softcap) must not vanish in fp32


def has_kernels(dtype: torch.dtype) -> bool:
    return HAS_INSTRUCTIONS if dtype == torch.bfloat16 else os.name == "posix" and dtype in SOURCES


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled C++. It is compiled once for each source, compiler and machine.

    Raises OSError without a compiler, and subprocess.CalledProcessError if it does not know the instructions.
    """
    source = SOURCES[dtype]
    compiler = os.environ.get("CXX", "g++")
    flags = ["-O3", "-march=native", "-fno-strict-aliasing", "-fno-math-errno", "-fPIC"]
    cpu = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    model = [line for line in cpu.splitlines() if line.startswith(("model name", "flags"))]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(repr((source.read_bytes(), version, flags, model)).encode()).hexdigest()[:16]
    usual = Path(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or usual)
    path = folder / f"{source.stem}_{key}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            objects = Path(scratch, "kernels.o")
            made = Path(scratch, "kernels.so")
            run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
            run([compiler, *flags, "-fopenmp", "-c", str(source), "-o", str(objects)])
            # -fopenmp would link a second OpenMP next to torch's, and the two would wait for each other's cores.
            run([compiler, "-shared", str(objects), "-o", str(made)])
            os.replace(made, path)
    return ctypes.CDLL(str(path))


def describe(dtype: torch.dtype) -> str:
    """The source and its hash, for the log of a run. Raises if it cannot be compiled."""
    library(dtype)
    return f"{SOURCES[dtype].name} sha256:{hashlib.sha256(SOURCES[dtype].read_bytes()).hexdigest()}"


def call(name: str, dtype: torch.dtype, *arguments):
    """Call a function of the library of a dtype. A tensor is passed as the address of its data, None as null."""
    values = [ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else value for value in arguments]
    values = [ctypes.c_void_p() if value is None else value for value in values]
    getattr(library(dtype), name)(*values, ctypes.c_int(torch.get_num_threads()))


def sizes_of(q: Tensor, k: Tensor) -> Tensor:
    B, T, H, d = q.shape
    return torch.tensor([B, T, H, k.size(2), d])


@torch.library.custom_op("train_gpt_cpu::attention", mutates_args=())
def attention(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, T, H, d], and log2 of each query's sum of exponentials, [B, H, T] in fp32."""
    q, k, v = (x.contiguous() for x in (q_BTHd, k_BTKd, v_BTKd))
    B, T, H, d = q.shape
    y = torch.empty_like(q)
    logs = q.new_empty(B, H, T, dtype=torch.float32)
    call("attention_forward", q.dtype, q, k, v, y, logs, sizes_of(q, k))
    return y, logs


@attention.register_fake
def _(q, k, v):
    B, T, H, d = q.shape
    return q.new_empty(B, T, H, d), q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("train_gpt_cpu::attention_backward", mutates_args=())
def attention_backward(q: Tensor, k: Tensor, v: Tensor, y: Tensor, dy: Tensor, logs: Tensor) -> list[Tensor]:
    q, k, v, y, dy, logs = (x.contiguous() for x in (q, k, v, y, dy, logs))
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    call("attention_backward", q.dtype, q, k, v, y, dy, logs, *gradients, sizes_of(q, k))
    return gradients


@attention_backward.register_fake
def _(q, k, v, y, dy, logs):
    return [x.new_empty(x.shape) for x in (q, k, v)]


def save_attention(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def differentiate_attention(ctx, dy, _):
    q, k, v, y, logs = ctx.saved_tensors
    return tuple(attention_backward(q, k, v, y, dy.to(q.dtype), logs))


attention.register_autograd(differentiate_attention, setup_context=save_attention)


def takes_attention(T: int, d: int, dtype: torch.dtype) -> bool:
    return has_kernels(dtype) and T % 64 == 0 and T <= MOST_TOKENS and d % 2 == 0


def fused_attention(q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor) -> Tensor:
    """Causal attention like train_gpt.grouped_attention, for the shapes of `takes_attention`."""
    return attention(*(x.transpose(1, 2) for x in (q_BHTd, k_BKTd, v_BKTd)))[0].transpose(1, 2)


@torch.library.custom_op("train_gpt_cpu::cross_entropy", mutates_args=())
def cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    softcap: float,
    gradient: bool,
    bits_VW: Tensor | None = None,
    before_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses [N] in nats of the softcapped logits x W^T, and with `gradient` their derivative by the uncapped logits.

    The derivative is [N, V] in the type of x. With bits [V, V / 8] only those tokens have a probability whose bit is 1
    in the row of the previous token. A target without one has an infinite loss, and a derivative that the caller
    multiplies by 0.
    """
    z = x_ND @ weight_VD.mT
    losses = z.new_empty(len(z), dtype=torch.float32)
    bits = None if bits_VW is None else bits_VW.contiguous()
    before = None if before_N is None else before_N.contiguous()
    call(
        "softcapped_cross_entropy",
        z.dtype,
        z,
        targets_N.contiguous(),
        losses,
        *map(ctypes.c_int64, z.shape),
        ctypes.c_float(softcap),
        ctypes.c_int(gradient),
        bits,
        before,
    )
    return losses, z if gradient else z.new_empty(0, 0)


@cross_entropy.register_fake
def _(x, weight, targets, softcap, gradient, bits=None, before=None):
    shape = (len(x), len(weight)) if gradient else (0, 0)
    return x.new_empty(len(x), dtype=torch.float32), x.new_empty(shape)


def save_loss(ctx, inputs, output):
    x, weight, *_ = inputs
    losses, gradient = output
    ctx.mark_non_differentiable(gradient)
    ctx.save_for_backward(x, weight, gradient)


def differentiate_loss(ctx, dlosses_N, _):
    """The derivative by the logits was computed while they were in the cache.

    The gradient of the loss, one number per row, multiplies the narrow side of either matmul.
    """
    x, weight, gradient = ctx.saved_tensors
    rows = dlosses_N[:, None]
    dx = (gradient @ weight * rows).to(x.dtype)
    dweight = gradient.mT @ (x * rows).to(x.dtype)
    return dx, dweight, None, None, None, None, None


cross_entropy.register_autograd(differentiate_loss, setup_context=save_loss)


def takes_loss(vocab_size: int, softcap: float, runtime) -> bool:
    fits = vocab_size % 16 == 0 and softcap <= MOST_SOFTCAP
    return has_kernels(runtime.dtype) and runtime.device.type == "cpu" and fits


def fused_loss(model, x_BTD: Tensor, targets_BT: Tensor, tokens_BT: Tensor | None = None) -> Tensor:
    """Losses [B, T] in nats from the input x of the output projection, like those of train_gpt.Model.forward.

    With tokens the logits are masked by the table model.mask.bits. The mask may exclude a target where a new sequence
    begins in the middle of a text: such a target is infinite in a score, and counts 0 in training.
    """
    x_ND = x_BTD.flatten(0, 1)
    weight_VD = model.output_weight()[1].to(x_BTD.dtype)
    bits_VW = None if tokens_BT is None else model.mask.bits
    before_N = None if tokens_BT is None else tokens_BT.flatten()
    learns = torch.is_grad_enabled()
    losses, _ = cross_entropy(x_ND, weight_VD, targets_BT.flatten(), model.softcap, learns, bits_VW, before_N)
    if learns and model.training and tokens_BT is not None:
        losses = losses.masked_fill(losses == math.inf, 0.0)
    return losses.view_as(targets_BT)


def takes_newton_schulz(stack: Tensor) -> bool:
    """Whether there are enough matrices [n, rows, columns] for the threads, of a size that fits."""
    n = len(stack)
    threads = torch.get_num_threads()
    places = -(-n // threads) * threads
    fits = stack.dtype == torch.bfloat16 and stack.size(1) % 32 == 0 and stack.size(2) % 32 == 0
    return HAS_INSTRUCTIONS and stack.device.type == "cpu" and fits and 0 < n >= (1 - IDLE_SHARE) * places


def newton_schulz(stack: Tensor, polynomials: list[tuple[float, float, float]]) -> Tensor:
    """Like train_gpt.newton_schulz, for what `takes_newton_schulz` accepts.

    X X^T and its polynomial are symmetric, so half of either is computed. A matrix stays in the cache of its core.
    """
    tall = stack.size(1) > stack.size(2)
    x = (stack.mT if tall else stack).clone(memory_format=torch.contiguous_format)
    coefficients = torch.tensor(polynomials, dtype=torch.float32)
    call("newton_schulz", x.dtype, x, *map(ctypes.c_int64, x.shape), coefficients, ctypes.c_int(len(polynomials)))
    return x.mT if tall else x
