"""The artifact of the frontier: fewer bits per weight (WEIGHT_BITS, EMBED_BITS), clips in standard deviations (CLIP_*),
GPTQ (GPTQ_BATCHES), an entropy coder (CODEC=rans), and clips that make the file just fit (FIT_SIZE).

frontier.py loads this file only where one of these knobs is on. Because it affects the artifact, it then counts as
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
from train_gpt import INT8_CLIP_QUANTILE, INT8_FORMAT, quantize_rows, require

RANS_FORMAT = "rans_per_row_v1"
TENSOR_CLASSES = ("attn", "mlp", "embed")  # each has its own CLIP_* knob and its own table of frequencies
UNPACKED_LIMIT = 2**30  # bytes of decoded weights: far more than any artifact within SIZE_LIMIT needs
MOST_TENSORS = 2**14
# FIT_SIZE: limits of the factor of all clips, and the part of SIZE_LIMIT that may stay free.
CLIP_MULTIPLIERS = (0.5, 8.0)
SIZE_SLACK = 0.002


class FrontierCoder(train_gpt.Coder):
    """The script's coder with more knobs. With CODEC=zlib the file keeps the public reference's format.

    A matrix [rows, cols] becomes integers up to qmax = 2**(bits - 1) - 1 in steps of one fp16 scale per row. With a
    clip of k the step is k standard deviations of the row over qmax. After entropy coding a weight then takes about
    2.047 + log2(qmax / k) bits, so k trades size for precision. Source: public parameter-golf records; Frantar et al.
    2022 (GPTQ); Duda 2013 (rANS)."""

    formats = (INT8_FORMAT, RANS_FORMAT)  # that it can decode

    def __init__(self, config):
        super().__init__(config)
        rans = config.codec == "rans"
        self.file = f"final_model.{'rans' if rans else 'int8'}.ptz"
        self.tag = f"int{config.weight_bits}+{config.codec}"
        self.control_fp32 = not rans
        self.hessians: dict[str, Tensor] = {}
        self.clip_multiplier = 1.0  # of all clips; FIT_SIZE changes it

    def tensor_class(self, name: str) -> str:
        """attn or mlp for the matrices of those parts; embed for the embedding and the output projection."""
        self.rule(name)  # raises for a name that the model does not have
        parts = name.split(".")
        return next((part for part in ("attn", "mlp") if part in parts), "embed")

    def rule(self, name: str) -> train_gpt.ParameterRule:
        return self.config.model_class().rule(name)

    def qmax(self, name: str) -> int:
        bits = self.config.embed_bits if self.rule(name).group == "embed" else self.config.weight_bits
        return 2 ** (bits - 1) - 1

    def clip(self, name: str) -> float:
        """The clip in standard deviations of a row; 0: a high quantile of its magnitudes."""
        return self.clip_multiplier * getattr(self.config, f"clip_{self.tensor_class(name)}")

    # GPTQ needs statistics of training batches, which count as training time

    def warm_up(self, trainer: train_gpt.Trainer) -> float:
        """Seconds of the clock to reserve, measured on two micro-batches; the first one only warms up."""
        if not self.config.gptq_batches:
            return 0.0
        for _ in range(2):
            began = trainer.stopwatch.elapsed("compile")
            collect_hessians(trainer.model, trainer.loader, 1, trainer.runtime)
            trainer.runtime.synchronize()
            taken = trainer.stopwatch.elapsed("compile") - began
        seconds = 1.5 * self.calibration_batches(trainer.runtime) * taken
        require(
            seconds < (self.config.max_wallclock_seconds or math.inf),
            f"GPTQ_BATCHES={self.config.gptq_batches} takes {seconds:.0f} s, the whole clock: use fewer",
        )
        return seconds

    def calibrate(self, trainer: train_gpt.Trainer):
        if self.config.gptq_batches:
            batches = self.calibration_batches(trainer.runtime)
            self.hessians = collect_hessians(trainer.model, trainer.loader, batches, trainer.runtime)

    def calibration_batches(self, runtime: train_gpt.Runtime) -> int:
        """Micro-batches of this rank."""
        return -(-self.config.gptq_batches // runtime.world_size)

    # From the weights to the file

    def quantize_matrix(self, name: str, w: Tensor) -> tuple[Tensor, Tensor]:
        qmax = self.qmax(name)
        k = self.clip(name)
        if k:
            deviation, mean = torch.std_mean(w, dim=1, correction=0)
            clip = torch.maximum(k * deviation, mean.abs())  # a row of one value has only a mean
        else:
            clip = torch.quantile(w.abs(), INT8_CLIP_QUANTILE, dim=1)
        q, scale = quantize_rows(w, clip, qmax)
        if name in self.hessians:
            q = gptq_round(w, scale, self.hessians[name], qmax).cpu()
        return q, scale

    def pack(self, artifact: dict) -> tuple[bytes, dict]:
        return super().pack(self.rans_pack(artifact) if self.config.codec == "rans" else artifact)

    def encode(self, state: dict[str, Tensor], code_bytes: int) -> tuple[bytes, dict]:
        """With FIT_SIZE: the artifact with the narrowest clips of which code and artifact fit SIZE_LIMIT, if any do.

        The search uses the size law: clips that are twice as wide take one bit less per weight."""
        if not self.config.fit_size:
            return super().encode(state, code_bytes)
        limit = self.config.size_limit
        slack = SIZE_SLACK * limit
        weights = sum(tensor.numel() for tensor in state.values() if tensor.numel() > train_gpt.INT8_MIN_NUMEL)
        narrowest, widest = map(math.log2, CLIP_MULTIPLIERS)
        best = None
        doublings = 0.0
        for _ in range(8):
            self.clip_multiplier = 2.0**doublings
            blob, facts = super().encode(state, code_bytes)
            spare = limit - code_bytes - len(blob)
            rank = (spare >= 0, -abs(spare))  # one that fits before one that does not, then the nearest
            if best is None or rank > best[0]:
                best = rank, blob, facts | {"clip_multiplier": self.clip_multiplier}
            excess_bits = 8 * (slack / 2 - spare) / max(weights, 1)
            before = doublings
            doublings = min(max(doublings + excess_bits, narrowest), widest)
            if 0 <= spare < slack or doublings == before:
                break
        _, blob, facts = best
        self.clip_multiplier = facts["clip_multiplier"]
        return blob, facts

    def rans_pack(self, artifact: dict) -> dict:
        """An int8 object with all values in one stream, coded by one table per class, and shapes in their place."""
        tensors = artifact["quantized"]
        tables_of = self.table_numbers(tensors)
        groups = [q.flatten().numpy().view(np.uint8) for q in tensors.values()]
        counts = np.zeros((len(TENSOR_CLASSES), 256))
        for symbols, number in zip(groups, tables_of, strict=True):
            counts[number] += np.bincount(symbols, minlength=256)
        tables = np.stack([rans_frequencies(row) for row in counts])
        words = rans_encode(groups, tables[tables_of])
        return artifact | {
            "__quant_format__": RANS_FORMAT,
            "quantized": {name: [*q.shape] for name, q in tensors.items()},
            "stream": torch.from_numpy(words.view(np.uint8)),
            "tables": torch.from_numpy(tables.astype(np.int16)),
        }

    def table_numbers(self, names) -> list[int]:
        return [TENSOR_CLASSES.index(self.tensor_class(name)) for name in names]

    # And back

    def dequantize(self, artifact: dict) -> dict[str, Tensor]:
        if artifact["__quant_format__"] == RANS_FORMAT:
            artifact = self.rans_unpack(artifact)
        return super().dequantize(artifact)

    def rans_unpack(self, artifact: dict) -> dict:
        """The int8 object of rans_pack. The artifact may be anyone's: sizes are checked before memory is taken."""
        shapes = {name: [*map(int, shape)] for name, shape in artifact["quantized"].items()}
        require(all(n > 0 for shape in shapes.values() for n in shape), "its shapes are no sizes")
        sizes = [math.prod(shape) for shape in shapes.values()]
        stream = artifact["stream"]
        tables = artifact["tables"]
        whole = stream.is_contiguous() and tables.is_contiguous()  # not a few bytes by stride 0
        require(
            whole and tables.dtype == torch.int16 and tables.shape == (len(TENSOR_CLASSES), 256),
            "its rANS tables and its stream do not fit",
        )
        require((tables >= 0).all() and (tables.sum(1) == 2**14).all(), "its rANS tables are no frequencies")
        fits = len(sizes) <= MOST_TENSORS and 4 * sum(sizes) <= UNPACKED_LIMIT  # dequantized they are fp32
        require(fits, "its shapes are too large")
        types = [getattr(torch, name) for name in artifact["dtypes"].values()]
        require(all(each.is_floating_point for each in types), "its weights are no real numbers")
        tables_of = self.table_numbers(shapes)
        groups = rans_decode(stream.numpy().view("<u2"), sizes, tables.numpy()[tables_of])
        values = {}
        for (name, shape), q in zip(shapes.items(), groups, strict=True):
            values[name] = torch.from_numpy(q.view(np.int8)).view(shape)
        return artifact | {"__quant_format__": INT8_FORMAT, "quantized": values}

    def projected_size(self, model: train_gpt.Model, check) -> int:
        """Bytes of the artifact of this model once it is trained. With FIT_SIZE its clips are fitted to SIZE_LIMIT."""
        if not self.config.fit_size:
            return self.size_by_law(model, check, 1.0)
        narrowest, widest = CLIP_MULTIPLIERS
        limit = self.config.size_limit
        code = sum(path.stat().st_size for path in train_gpt.source_paths(self.config).values())
        fitted = round(limit - code - SIZE_SLACK / 2 * limit)
        return min(max(fitted, self.size_by_law(model, check, widest)), self.size_by_law(model, check, narrowest))

    def size_by_law(self, model: train_gpt.Model, check, clip_multiplier: float) -> int:
        """Bytes of the artifact if the rows of all matrices are Gaussian, as they about are after training."""

        def bits_of(name: str, columns: int) -> float:
            return check.bits_per_weight(columns, self.qmax(name), clip_multiplier * self.clip(name))

        return check.projected_bytes(self, model, bits_of, 1.001 if self.config.codec == "rans" else 0.0)


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


# ---------- rANS: range asymmetric numeral systems, the entropy coder -------------------------------------------------


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
