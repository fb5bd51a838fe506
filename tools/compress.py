"""What the exports of the frontier need beyond rounding and zlib: GPTQ, the rANS coder, clips that fit the size.

train_gpt.py loads this file where GPTQ_BATCHES, CODEC=rans or FIT_SIZE ask for it. It shapes the artifact, and so it is
a source of that run like the script itself: hashed, copied into the run folder, counted in the bytes of code.
"""

import contextlib
import functools
import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import train_gpt
from train_gpt import INT8_FORMAT, INT8_MIN_NUMEL, RANS_FORMAT, TENSOR_CLASSES, Config, require


@torch.no_grad()
def collect_hessians(model, loader, batches: int, runtime) -> dict[str, Tensor]:
    """{parameter: X^T X [in, in] in fp32} of the inputs X of every Linear and of the output projection in so
    many micro-batches of the uncompiled model; averaged over the ranks. A module that multiplies by the weights of some
    of its own, and does not call them, names them in `multiplies`: its input is theirs."""
    sums, precision = {}, torch.get_float32_matmul_precision()

    def add(name, module, inputs):
        x = inputs[0].flatten(0, -2).float()
        sums[name] = sums.get(name, 0) + x.mT @ x

    torch.set_float32_matmul_precision("high")  # TF32 loses nothing of inputs in bf16, and is fast
    model.eval()
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, train_gpt.Linear):
                hooks.enter_context(module.register_forward_pre_hook(functools.partial(add, f"{name}.weight")))
            for part in getattr(module, "multiplies", ()):
                hooks.enter_context(module.register_forward_pre_hook(functools.partial(add, f"{name}.{part}.weight")))
        for _ in range(batches):
            add(model.output_weight()[0], model, [model.features(loader.next_step()[0][0])])
    model.train()
    torch.set_float32_matmul_precision(precision)
    if runtime.world_size > 1:
        for total in sums.values():
            dist.all_reduce(total.div_(runtime.world_size))
    return sums


def calibration_seconds(trainer) -> float:
    """How much of the clock to keep for GPTQ's calibration, by two of its micro-batches: the first only warms up."""
    for _ in range(2):
        began = trainer.stopwatch.elapsed("compile")
        collect_hessians(trainer.model, trainer.loader, 1, trainer.runtime)
        trainer.runtime.synchronize()
        seconds = 1.5 * trainer.calibration * (trainer.stopwatch.elapsed("compile") - began)
    config = trainer.config
    require(
        seconds < (config.max_wallclock_seconds or math.inf),
        f"GPTQ_BATCHES={config.gptq_batches} takes {seconds:.0f} s, the whole clock: use fewer",
    )
    return seconds


def gptq_round(w: Tensor, scale: Tensor, hessian: Tensor, qmax: int, block: int = 128) -> Tensor:
    """int8 values [rows, in], on the device of the Hessian [in, in]: column after column is rounded, and the
    next make up for its error in the layer's squared error (Frantar et al. 2022, GPTQ)."""
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
    for start in range(0, len(H), block):
        stop = min(start + block, len(H))
        errors = torch.empty_like(columns[start:stop])
        for i in range(start, stop):
            q[i] = (columns[i] / scale).round().clamp(-qmax, qmax)
            errors[i - start] = (columns[i] - q[i] * scale) / U[i, i]
            columns[i + 1 : stop] -= torch.outer(U[i, i + 1 : stop], errors[i - start])
        columns[stop:] -= U[start:stop, stop:].mT @ errors
    return q[order.argsort()].mT.contiguous()


def rans_frequencies(counts: np.ndarray) -> np.ndarray:
    """Frequencies [256] that sum to 2**14, 0 just where the count is, and cost next to no bits."""
    counts = counts + (np.arange(256) == 0) * (counts.sum() == 0)  # of no symbols any table will do
    frequencies = np.ceil(counts * (2**14 / counts.sum()))
    while frequencies.sum() > 2**14:  # one less costs count * log2(f / (f - 1)) bits: least
        frequencies[np.where(frequencies > 1, counts / (frequencies - 0.5), np.inf).argmin()] -= 1
    return frequencies.astype(np.int64)


def rans_encode(groups: list[np.ndarray], tables: np.ndarray, steps: int = 8192) -> np.ndarray:
    """16-bit words of groups of uint8 symbols, each by its table of frequencies [256] (Duda 2013; interleaved,
    Giesen 2014): the last states, two words each, then those in the order of decoding, `steps` a lane."""
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
    """The groups, of known lengths. Refuses words that rans_encode would not have written."""
    lanes, groups = sum(counts) // steps + 1, []
    states, position = words[: 2 * lanes].view("<u4").astype(np.int64), 2 * lanes
    for count, freq in zip(counts, tables.astype(np.int64), strict=True):
        # For each of the 2**14 slots: its symbol; and in one number, since looking up is what takes the time,
        # the symbol's frequency (high bits) and how far into its share the slot lies (low 14 bits).
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
    """The number of the table that codes each tensor."""
    return [TENSOR_CLASSES.index(config.model_class().rule(name).clip) for name in names]


def rans_pack(artifact: dict, config: Config) -> dict:
    """An int8 object with values in one stream, by a table per class, and shapes in their place."""
    tensors, kinds = artifact["quantized"], rans_tables(artifact["quantized"], config)
    groups = [q.flatten().numpy().view(np.uint8) for q in tensors.values()]
    counts = np.zeros((len(TENSOR_CLASSES), 256))
    for symbols, kind in zip(groups, kinds, strict=True):
        counts[kind] += np.bincount(symbols, minlength=256)
    tables = np.stack([rans_frequencies(row) for row in counts])
    stream = torch.from_numpy(rans_encode(groups, tables[kinds]).view(np.uint8))
    return artifact | {
        "__quant_format__": RANS_FORMAT,
        "quantized": {name: [*q.shape] for name, q in tensors.items()},
        "stream": stream,
        "tables": torch.from_numpy(tables.astype(np.int16)),
    }


def rans_unpack(artifact: dict, config: Config) -> dict:
    """The int8 object of what rans_pack made."""
    shapes, words = artifact["quantized"], artifact["stream"].numpy().view("<u2")
    tables = artifact["tables"].numpy()[rans_tables(shapes, config)]
    groups = rans_decode(words, [math.prod(shape) for shape in shapes.values()], tables)
    values = {
        name: torch.from_numpy(q.view(np.int8)).view(shape)
        for (name, shape), q in zip(shapes.items(), groups, strict=True)
    }
    return artifact | {"__quant_format__": INT8_FORMAT, "quantized": values}


def fit_artifact(state: dict[str, Tensor], config: Config, code_bytes: int, hessians=None) -> tuple:
    """(clip multiplier, then what train_gpt.encode gives). Clips of 1/2 to 8 times as wide are tried until the artifact
    just fits: by the size law, a bit less a weight is twice as wide a clip."""
    limit, slack, best, doublings = config.size_limit, 0.002 * config.size_limit, None, 0.0
    weights = sum(tensor.numel() for tensor in state.values() if tensor.numel() > INT8_MIN_NUMEL)
    for _ in range(8):
        artifact, blob, packed = train_gpt.encode(state, config, hessians, 2.0**doublings)
        spare = limit - code_bytes - len(blob)
        rank = (spare >= 0, -abs(spare))  # one that fits before one that does not, then the nearest
        if best is None or rank > best[0]:
            best = rank, (2.0**doublings, artifact, blob, packed)
        excess_bits = 8 * (slack / 2 - spare) / max(weights, 1)
        before, doublings = doublings, min(max(doublings + excess_bits, -1.0), 3.0)
        if 0 <= spare < slack or doublings == before:
            break
    return best[1]
