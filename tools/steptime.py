"""The time of a training step on eight H100: a fit to the step times of public runs, for MODE=check elsewhere.

    TARGET_WORLD_SIZE=8 MODE=check python train_gpt.py [FILE.env]

A step takes a constant time (launches, optimizer, collectives), and for every GPU the time of its matmuls and of its
attention:
    products    6 FLOPs per token for each weight that multiplies, as often as it does, with the output projection
    attention   7 * sequence * width per token for each layer that runs. It is made of seven matmuls: two forward, five
                backward, where the scores are computed again. Each takes 2 FLOPs per weight and position, and the
                causal mask leaves half of the positions.
Attention has one rate for torch's flash SDPA (FA2), and one for FA3 and cuDNN, which the table cannot tell apart.
The coefficients are computed from the table below whenever they are needed. Their error is known: each shape is
predicted by a fit to all others. Of the forms below, the one with the smallest such error is used.
"""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np

import train_gpt

kernels = train_gpt.tool("kernels", required=True)


class Run(NamedTuple):
    """A public run: compiled, bf16, width 512, 8 query and 4 key-value heads, on eight H100 of one node."""

    params: int  # as its log states, to find it by; some have an embedding of bigrams, which multiplies nothing
    layers: int  # that run; with depth recurrence a layer counts as often as it runs
    mlp: int  # hidden width over 512
    vocabulary: int
    tokens: int  # per step, over all GPUs
    sequence: int
    attention: str  # flash: torch's SDPA; flash3 or cudnn
    ms: tuple[float, ...]  # of a step; several where several nodes ran the same


# Source: logs of runs for the parameter-golf challenge (github.com/openai/parameter-golf), 2026.
PUBLIC_RUNS = (
    Run(17_059_912, 9, 2, 1024, 524_288, 1024, "flash", (43.5,)),
    Run(17_059_912, 9, 2, 1024, 524_288, 2048, "flash", (51.9,)),
    Run(17_059_912, 9, 2, 1024, 393_216, 4096, "flash", (51.1, 66.0, 70.5, 71.5)),
    Run(17_059_912, 9, 2, 1024, 524_288, 4096, "flash", (75.0,)),
    Run(21_778_504, 9, 3, 1024, 524_288, 1024, "flash", (48.7,)),
    Run(21_778_504, 9, 3, 1024, 524_288, 2048, "flash", (55.4,)),
    Run(22_368_841, 9, 3, 1024, 786_432, 2048, "flash", (81.3,)),
    Run(25_517_137, 10, 3, 1024, 786_432, 2048, "flash", (89.4,)),
    Run(26_829_913, 11, 3, 1024, 786_432, 2048, "flash3", (84.5,)),
    Run(26_829_913, 11, 3, 1024, 524_288, 2048, "flash3", (59.0,)),
    Run(26_829_913, 11, 3, 1024, 524_288, 2048, "cudnn", (62.0,)),
    Run(26_829_913, 11, 3, 1024, 524_288, 2048, "flash", (67.8,)),
    Run(27_067_484, 11, 3, 1024, 786_432, 2048, "flash3", (86.7,)),  # with XSA in every layer
    Run(34_401_371, 11, 4, 4096, 786_432, 2048, "flash3", (98.9,)),
    Run(35_943_512, 11, 4, 8192, 786_432, 2048, "flash3", (101.8,)),
    Run(35_943_512, 15, 4, 8192, 786_432, 2048, "flash3", (140.2,)),
    Run(35_944_536, 11, 4, 8192, 786_432, 2048, "flash3", (102.0,)),
    Run(35_944_536, 17, 4, 8192, 786_432, 2048, "flash3", (150.3,)),
    Run(24_699_993, 11, 2, 8192, 786_432, 2048, "flash3", (79.5,)),
)
GPUS = 8  # these three hold for all of the runs
WIDTH = 512
KV_WIDTH = 256
FORMS = (
    ("constant", "products", "flash", "flash3"),
    ("constant", "products", "flash", "flash3", "logits"),
    ("constant", "products", "flash", "flash3", "activations"),
    ("constant", "products", "attention"),
    ("products", "flash", "flash3", "logits"),
)


def features(
    tokens: float, product_flops: float, attention_flops: float, attention: str, vocabulary: int, layer_width: float
) -> dict[str, float]:
    """What the time of a step may depend on, for one GPU: TFLOPs, billions of logits and billions of activations.

    `tokens` are those of the GPU, the FLOPs those of a token; layer_width is the width times the layers that run.
    """
    fa2 = attention not in ("flash3", "cudnn")
    work = tokens * attention_flops / 1e12
    return {
        "constant": 1.0,
        "products": tokens * product_flops / 1e12,
        "attention": work,
        "flash": work * fa2,
        "flash3": work * (not fa2),
        "logits": tokens * vocabulary / 1e9,
        "activations": tokens * layer_width / 1e9,
    }


def run_features(run: Run) -> dict[str, float]:
    """The features of a public run, from its shape."""
    weights = run.layers * 2 * WIDTH * (WIDTH + KV_WIDTH + run.mlp * WIDTH) + run.vocabulary * WIDTH
    layer_width = run.layers * WIDTH
    attention_flops = 7 * run.sequence * layer_width
    return features(run.tokens / GPUS, 6 * weights, attention_flops, run.attention, run.vocabulary, layer_width)


def non_negative_fit(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares of columns [n, k] to target [n], with coefficients that are not negative.

    Every choice of columns is tried; the one counts that fits best by itself without negative coefficients. With the
    few columns here that is exact.
    """
    best = np.zeros(columns.shape[1])
    least = float(target @ target)
    for count in range(1, columns.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(columns.shape[1]), count)):
            found = np.linalg.lstsq(columns[:, chosen], target)[0]
            rest = columns[:, chosen] @ found - target
            if (found >= 0).all() and rest @ rest < least:
                least = float(rest @ rest)
                best = np.zeros(columns.shape[1])
                best[chosen] = found
    return best


class Fit(NamedTuple):
    form: tuple[str, ...]
    coefficients: np.ndarray  # milliseconds for each feature of the form
    errors: np.ndarray  # relative, of each run by a fit to the runs of other shapes

    def ms(self, found: dict[str, float]) -> float:
        return float(sum(c * found[name] for name, c in zip(self.form, self.coefficients, strict=True)))


def fit_form(form: tuple[str, ...]) -> Fit:
    """The least squares of the relative errors.

    A shape has one time, the median of its nodes, which differ by 5% and now and then by 30%. Runs with the same
    features are left out together, since one would reveal the time of the other.
    """
    columns = np.array([[run_features(run)[name] for name in form] for run in PUBLIC_RUNS])
    ms = np.array([np.median(run.ms) for run in PUBLIC_RUNS])
    relative = columns / ms[:, None]
    ones = np.ones(len(ms))
    errors = []
    for row, time in zip(columns, ms, strict=True):
        others = (columns != row).any(1)
        errors.append(row @ non_negative_fit(relative[others], ones[others]) / time - 1)
    return Fit(form, non_negative_fit(relative, ones), np.array(errors))


@functools.cache
def best_fit() -> Fit:
    return min(map(fit_form, FORMS), key=lambda fit: np.abs(fit.errors).mean())


class Flops(NamedTuple):
    """FLOPs of a token in training, by one graph of a model."""

    products: int
    attention: int  # as the model counts them, 12 * T * D per layer

    def layers(self, config) -> float:
        """The layers that run, as far as the model counts the attention of each."""
        return self.attention / (12 * config.train_seq_len * config.model_dim)


def flops_by_graph(config, model) -> list[Flops]:
    """The FLOPs of each graph of model.graph_starts. The model is left with its last one."""
    found = []
    for start in model.graph_starts:
        model.advance(start)
        products = kernels.flops_per_token(model, 0)
        found.append(Flops(products, kernels.flops_per_token(model, config.train_seq_len) - products))
    return found


def model_features(config, flops: Flops, gpus: int, attention: str) -> dict[str, float]:
    """The features of a step of this configuration.

    A model counts attention by the whole square, which is 12 * T * D. Seven matmuls under the causal mask are 7.
    """
    attention_flops = flops.attention * 7 / 12
    layer_width = attention_flops / (7 * config.train_seq_len)
    tokens = config.train_batch_tokens / gpus
    return features(tokens, flops.products, attention_flops, attention, config.vocab_size, layer_width)


def beyond_the_table(config, model, gpus: int) -> list[str]:
    """What is outside the shapes that the fit has seen, where a prediction may err more than its error says."""
    attention = "flash3" if config.attention in ("auto", "cudnn") else config.attention
    same = [run for run in PUBLIC_RUNS if attention == ("flash3" if run.attention == "cudnn" else run.attention)]
    given = {
        "TRAIN_SEQ_LEN": (config.train_seq_len, "sequence"),
        "VOCAB_SIZE": (config.vocab_size, "vocabulary"),
        "TRAIN_BATCH_TOKENS": (config.train_batch_tokens, "tokens"),
        "MLP_MULT": (config.mlp_mult, "mlp"),
    }
    found = []
    for name, (value, column) in given.items():
        known = [getattr(run, column) for run in same or PUBLIC_RUNS]
        if not min(known) <= value <= max(known):
            span = f"{min(known)}" if min(known) == max(known) else f"{min(known)} to {max(known)}"
            found.append(f"{name}={value} (known: {span}{f' with {attention}' * bool(same)})")
    is_gpt = isinstance(model, train_gpt.GPT)
    known = [run.layers for run in PUBLIC_RUNS]
    counts = {round(flops.layers(config)) for flops in flops_by_graph(config, model)} if is_gpt else set()
    for count in sorted(counts):
        if not min(known) <= count <= max(known):
            found.append(f"{count} layers (known: {min(known)} to {max(known)})")
    kv_width = config.model_dim // config.num_heads * config.num_kv_heads
    unlike = {
        f"MODEL_DIM={config.model_dim} (known: {WIDTH})": config.model_dim != WIDTH,
        f"keys and values {kv_width} wide (known: {KV_WIDTH})": kv_width != KV_WIDTH,
        f"{gpus} GPUs (known: {GPUS})": gpus != GPUS,
        f"ATTENTION={config.attention}": not same,
        f"COMPILE={config.compile}": config.compile == "0",
        f"DTYPE={config.dtype}": config.dtype == "float32",
        "a model of another architecture": not is_gpt,
    }
    return found + [text for text, holds in unlike.items() if holds]


def steps_in_budget(config, starts: tuple[float, ...], seconds: list[float]) -> tuple[float, float]:
    """(steps, seconds) of a run whose steps take seconds[i] from progress starts[i] on.

    Progress is that of a run: by the clock or by ITERATIONS, whichever is further.
    """
    clock = config.max_wallclock_seconds or math.inf
    steps = 0.0
    elapsed = 0.0
    for end, duration in zip([*starts[1:], 1.0], seconds, strict=True):
        count = max(0.0, min(end * config.iterations - steps, (end * clock - elapsed) / duration))
        steps += count
        elapsed += count * duration
    return steps, elapsed


def predict(config, model, gpus: int) -> dict:
    """Facts for MODE=check: milliseconds of a step, steps and tokens in the budget, and what they rest on."""
    fit = best_fit()
    starts = model.graph_starts
    graphs = flops_by_graph(config, model)
    times = {}
    means = {}
    for kernel in ("flash3", "flash"):
        times[kernel] = [fit.ms(model_features(config, flops, gpus, kernel)) / 1e3 for flops in graphs]
        steps, seconds = steps_in_budget(config, starts, times[kernel])
        means[kernel] = round(1e3 * seconds / steps, 1)
    attention = "flash3" if config.attention in ("auto", "fastest", "flash3", "cudnn") else "flash"
    steps, seconds = steps_in_budget(config, starts, times[attention])
    by_start = {f"{start:g}": round(1e3 * time, 1) for start, time in zip(starts, times[attention], strict=True)}
    parts = ", ".join(f"{ms} from progress {start} on" for start, ms in by_start.items())
    errors = np.abs(fit.errors)
    terms = dict(zip(fit.form, fit.coefficients.round(2).tolist(), strict=True))
    return {
        "step_time": f"{means[attention]} ms on {gpus} H100{f' ({parts})' * (len(starts) > 1)}, give or take "
        f"{errors.mean():.1%} by leave-one-out; {means['flash3']} with FA3 or cuDNN, {means['flash']} with flash SDPA",
        "seconds_per_step": seconds / steps,
        "ms_per_step": means[attention],
        "ms_per_step_from_progress": by_start,
        "steps_in_budget": int(steps),
        "tokens_in_budget": int(steps) * config.train_batch_tokens,
        "step_time_error": round(float(errors.mean()), 4),
        "step_time_rests_on": f"a fit to {len(PUBLIC_RUNS)} public runs on 8xH100, which misses a shape that is left "
        f"out of it by {errors.mean():.1%} on average, {errors.max():.0%} at most; nodes differ by 5%, now and then "
        f"by 30%. Milliseconds for each TFLOP of a GPU: {terms}",
        "step_time_extrapolates": "; ".join(beyond_the_table(config, model, gpus)) or "no: the table has such shapes",
    }
