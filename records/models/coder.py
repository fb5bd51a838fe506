"""The artifact of the frontier: fewer bits per weight (WEIGHT_BITS, EMBED_BITS), clips in standard deviations (CLIP_*),
GPTQ (GPTQ_BATCHES), an entropy coder (CODEC=rans), and clips that make the file just fit (FIT_SIZE).

frontier.py imports this file only where one of these knobs is on. Because it affects the artifact, it then counts as
submission code: it is hashed, copied into the run folder, and included in the code size.
"""

import contextlib
import functools
import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import train_gpt
from train_gpt import INT8_FORMAT, INT8_MIN_NUMEL, UserError, percentile_clip, quantize_rows, require

RANS_FORMAT = "rans_per_row_v1"
TENSOR_CLASSES = ("attn", "mlp", "embed")  # each has its own CLIP_* knob and its own table of frequencies
UNPACKED_LIMIT = 2**30  # bytes of decoded weights: far more than any artifact within SIZE_LIMIT needs
MOST_TENSORS = 2**14


def tensor_class(name: str) -> str:
    """The quantization class of a parameter: attn, mlp or embed (the embedding, the output projection, the rest)."""
    return "attn" if ".attn." in name else "mlp" if ".mlp." in name else "embed"


class FrontierCoder(train_gpt.Coder):
    """The script's coder with more knobs. The object in the file stays the public reference's for CODEC=zlib.

    A matrix [rows, cols] becomes integers up to qmax = 2**(bits - 1) - 1 in steps of one fp16 scale per row. With a
    clip of k the scale is k standard deviations of the row over qmax. By the size law a weight then takes about
    2.047 + log2(qmax / k) bits after entropy coding: k is what trades size for precision. Source: public
    parameter-golf records; Frantar et al. 2022 for GPTQ; Duda 2013 for rANS."""

    def __init__(self, config):
        super().__init__(config)
        self.hessians: dict[str, Tensor] = {}
        self.clip_multiplier = 1.0  # of all clips, with FIT_SIZE

    @property
    def file(self) -> str:
        return f"final_model.{'rans' if self.config.codec == 'rans' else 'int8'}.ptz"

    @property
    def tag(self) -> str:
        return f"int{self.config.weight_bits}+{self.config.codec}"


# ---------- GPTQ: Hessians from a few training batches, and rounding that makes up for its own errors -----------------


@torch.no_grad()
def collect_hessians(model, loader, batches: int, runtime) -> dict[str, Tensor]:
    """{parameter: X^T X, fp32 [in, in]} of the inputs X of every Linear and of the output projection.

    X comes from `batches` micro-batches through the uncompiled model; the result is averaged over the ranks. A module
    that multiplies by the weights of its submodules without calling them lists their names in `multiplies`: the input
    of the module is the input of each."""
    sums = {}

    def add(name, module, inputs):
        x = inputs[0].flatten(0, -2).float()
        sums[name] = sums.get(name, 0) + x.mT @ x

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # TF32 loses nothing of bf16 inputs, and is fast
    model.eval()
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, train_gpt.Linear):
                hooks.enter_context(module.register_forward_pre_hook(functools.partial(add, f"{name}.weight")))
            for part in getattr(module, "multiplies", ()):
                hooks.enter_context(module.register_forward_pre_hook(functools.partial(add, f"{name}.{part}.weight")))
        for _ in range(batches):
            inputs, _ = loader.next_step()
            add(model.output_weight()[0], model, [model.features(inputs[0])])
    model.train()
    torch.set_float32_matmul_precision(precision)
    if runtime.world_size > 1:
        for total in sums.values():
            dist.all_reduce(total.div_(runtime.world_size))
    return sums


def gptq_round(w: Tensor, scale: Tensor, hessian: Tensor, qmax: int, block: int = 128) -> Tensor:
    """int8 values [rows, in] of the fp32 matrix w, on the device of the Hessian [in, in].

    Columns are rounded one after the other, those with the largest diagonal first. The columns that follow make up for
    each error: they minimize the squared error of the layer's outputs (Frantar et al. 2022, GPTQ). U is the upper
    Cholesky factor of the inverse Hessian; an error e in column j adds -e * U[j, k] / U[j, j] to column k > j."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    H = hessian.float()[order][:, order]
    columns = w.to(hessian.device, torch.float32).mT[order]  # [in, rows]
    scale = scale.to(H.device).float()
    q = torch.empty_like(columns, dtype=torch.int8)
    unused = H.diagonal() == 0
    H.diagonal()[unused] = 1.0
    columns[unused] = 0.0
    U = inverse_factor(H)
    for start in range(0, len(H), block):
        stop = min(start + block, len(H))
        errors = torch.empty_like(columns[start:stop])
        for i in range(start, stop):
            q[i] = (columns[i] / scale).round().clamp(-qmax, qmax)
            errors[i - start] = (columns[i] - q[i] * scale) / U[i, i]
            columns[i + 1 : stop] -= torch.outer(U[i, i + 1 : stop], errors[i - start])
        columns[stop:] -= U[start:stop, stop:].mT @ errors
    return q[order.argsort()].mT.contiguous()


def inverse_factor(H: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of H, with the least damping of its diagonal that makes one exist."""
    for damping in (0.01, 0.1, 1.0, 10.0):
        damped = H + damping * H.diagonal().mean() * torch.eye(len(H), device=H.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        U, failed_again = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and not failed_again:
            break
    found = not failed and not failed_again and U.isfinite().all()
    require(found, "a Hessian is singular: set GPTQ_BATCHES=0 RESUME_FORCE=1")
    return U


# ---------- rANS: range asymmetric numeral systems, the entropy coder --------------------------------------------------


def rans_frequencies(counts: np.ndarray) -> np.ndarray:
    """Frequencies [256] that sum to 2**14, are 0 only where the count is 0, and cost next to no bits."""
    counts = counts + (np.arange(256) == 0) * (counts.sum() == 0)  # without symbols any table will do
    frequencies = np.ceil(counts * (2**14 / counts.sum()))
    while frequencies.sum() > 2**14:
        # Lowering f by one costs count * log2(f / (f - 1)) bits: take the cheapest.
        frequencies[np.where(frequencies > 1, counts / (frequencies - 0.5), np.inf).argmin()] -= 1
    return frequencies.astype(np.int64)


def rans_encode(groups: list[np.ndarray], tables: np.ndarray, steps: int = 8192) -> np.ndarray:
    """16-bit words for groups of uint8 symbols, each group coded by its table of frequencies [256].

    Lanes of about `steps` symbols each are interleaved, so that numpy codes one symbol of every lane at a time. The
    words are the final states, two words each, followed by the others in the order of decoding. Source: Duda 2013;
    Giesen 2014, Interleaved entropy coders."""
    lanes = sum(map(len, groups)) // steps + 1
    states = np.full(lanes, 2**16, np.uint64)
    chunks = []
    for symbols, freq in zip(groups[::-1], tables[::-1].astype(np.uint64), strict=True):
        first = freq.cumsum() - freq
        for begin in reversed(range(0, len(symbols), lanes)):
            symbol = symbols[begin : begin + lanes]
            x = states[: len(symbol)]
            f = freq[symbol]
            full = np.flatnonzero(x >= f << 18)  # these would leave [2**16, 2**32)
            chunks.append(x[full].astype("<u2"))
            x[full] >>= 16
            x += x // f * (2**14 - f) + first[symbol]
    return np.concatenate([states.astype("<u4").view("<u2"), *reversed(chunks)], dtype="<u2")


def rans_decode(words: np.ndarray, counts: list[int], tables: np.ndarray, steps: int = 8192) -> list[np.ndarray]:
    """The groups, given their lengths. Raises UserError for words that rans_encode would not have written."""
    lanes = sum(counts) // steps + 1
    states = words[: 2 * lanes].view("<u4").astype(np.int64)
    position = 2 * lanes
    groups = []
    for count, freq in zip(counts, tables.astype(np.int64), strict=True):
        # Table lookups dominate the time. So each of the 2**14 slots has its symbol, and one number with the frequency
        # of the symbol (high bits) and how far into its range the slot is (low 14 bits).
        symbol_at = np.repeat(np.arange(256, dtype=np.uint8), freq)
        both_at = freq[symbol_at] << 14 | np.arange(2**14) - (freq.cumsum() - freq)[symbol_at]
        slots = np.empty(count, np.uint16)
        for begin in range(0, count, lanes):
            x = states[: count - begin]
            slot = x & 0x3FFF
            slots[begin : begin + lanes] = slot
            both = both_at[slot]
            x[:] = (x >> 14) * (both >> 14) + (both & 0x3FFF)
            low = np.flatnonzero(x < 2**16)
            x[low] = x[low] << 16 | words[position : position + len(low)]
            position += len(low)
        groups.append(symbol_at[slots])
    exact = position == len(words) and words[1 : 2 * lanes : 2].all() and (states == 2**16).all()
    require(exact, "its rANS stream is not one that the encoder writes")
    return groups
