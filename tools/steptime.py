"""How long a training step takes on eight H100: a fit to the step times of public runs, for MODE=check elsewhere.

    TARGET_WORLD_SIZE=8 MODE=check python train_gpt.py [FILE.env]

A step is a constant (launches, optimizer, collectives) and, for every GPU, its products and its attention:
    products    6 FLOPs a token for each weight that multiplies, as often as it runs, with the output projection
    attention   7 * sequence * width a token for each layer that runs. Seven products are made of it: two forward, five
                backward, in which the scores are computed again. Each takes 2 FLOPs a weight and position, and the
                causal mask leaves half of the positions.
Attention has a rate for torch's flash SDPA (FA2), and one for FA3 and cuDNN, of which the table has too little apart.
The coefficients are computed from the table below whenever they are asked for. They come with their error: each shape
is predicted by a fit to all others. Of the forms below, that with the least such error is taken.
"""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np

from train_gpt import tool

kernels = tool("kernels", required=True)


class Run(NamedTuple):
    """A public run: compiled, bf16, width 512, 8 query and 4 key-value heads, on eight H100 of one node."""

    params: int  # as its log tells, by which it can be found; some have an embedding of bigrams, which takes no product
    layers: int  # that run, those of depth recurrence as often as they do
    mlp: int  # hidden width over 512
    vocabulary: int
    tokens: int  # a step, over all GPUs
    sequence: int
    attention: str  # flash: torch's SDPA; flash3 or cudnn
    ms: tuple[float, ...]  # a step; several where several nodes ran the same


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
GPUS, WIDTH, KV_WIDTH = 8, 512, 256  # of all of them
FORMS = (
    ("constant", "products", "flash", "flash3"),
    ("constant", "products", "flash", "flash3", "logits"),
    ("constant", "products", "flash", "flash3", "activations"),
    ("constant", "products", "attention"),
    ("products", "flash", "flash3", "logits"),
)


def features(
    tokens: float, product_flops: float, attention_flops: float, attention: str, vocabulary: int, layer_width: int
) -> dict[str, float]:
    """What a step's time may depend on, for one GPU: TFLOPs, billions of logits and of activations. `tokens` are those
    of the GPU, the FLOPs those of a token; layer_width is the width times the layers that run."""
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
    """Those of a public run, from its shape."""
    weights = run.layers * 2 * WIDTH * (WIDTH + KV_WIDTH + run.mlp * WIDTH) + run.vocabulary * WIDTH
    layer_width = run.layers * WIDTH
    return features(
        run.tokens / GPUS, 6 * weights, 7 * run.sequence * layer_width, run.attention, run.vocabulary, layer_width
    )


def non_negative_fit(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Coefficients of the least squares of columns [n, k] to target [n], none of them below 0: of all choices of
    columns, the one that fits best by itself with coefficients above 0. For the few columns here that is exact."""
    best, least = np.zeros(columns.shape[1]), float(target @ target)
    for count in range(1, columns.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(columns.shape[1]), count)):
            found = np.linalg.lstsq(columns[:, chosen], target)[0]
            rest = columns[:, chosen] @ found - target
            if (found >= 0).all() and rest @ rest < least:
                best, least = np.zeros(columns.shape[1]), float(rest @ rest)
                best[chosen] = found
    return best


class Fit(NamedTuple):
    form: tuple[str, ...]
    coefficients: np.ndarray  # ms for each feature of the form
    errors: np.ndarray  # of each run, relative, by a fit to the runs of other shapes

    def ms(self, found: dict[str, float]) -> float:
        return float(sum(c * found[name] for name, c in zip(self.form, self.coefficients, strict=True)))


def fit_form(form: tuple[str, ...]) -> Fit:
    """Least squares of the relative errors. A shape has one time, the median of its nodes: they differ by 5%, now and
    then by 30%. Runs whose features are the same are left out together, since one would tell the other's time."""
    columns = np.array([[run_features(run)[name] for name in form] for run in PUBLIC_RUNS])
    ms = np.array([np.median(run.ms) for run in PUBLIC_RUNS])
    relative, ones, errors = columns / ms[:, None], np.ones(len(ms)), []
    for row, time in zip(columns, ms, strict=True):
        others = (columns != row).any(1)
        errors.append(row @ non_negative_fit(relative[others], ones[others]) / time - 1)
    return Fit(form, non_negative_fit(relative, ones), np.array(errors))


@functools.cache
def best_fit() -> Fit:
    return min(map(fit_form, FORMS), key=lambda fit: np.abs(fit.errors).mean())


def model_features(config, model, gpus: int, looping: bool, attention: str) -> dict[str, float]:
    """Those of a step of this configuration. The model counts its own FLOPs, those of attention as 12 * T * D for each
    layer, where seven products under the causal mask are 7."""
    before, model.looping = model.looping, looping
    try:
        products = kernels.flops_per_token(model, 0)
        attention_flops = (kernels.flops_per_token(model, config.train_seq_len) - products) * 7 / 12
    finally:
        model.looping = before
    return features(
        config.train_batch_tokens / gpus,
        products,
        attention_flops,
        attention,
        config.vocab_size,
        attention_flops / (7 * config.train_seq_len),
    )


def beyond_the_table(config, model, gpus: int) -> list[str]:
    """What is outside the shapes that the fit has seen, where a prediction is less than its error says."""
    found, attention = [], "flash3" if config.attention in ("auto", "cudnn") else config.attention
    same = [run for run in PUBLIC_RUNS if attention == ("flash3" if run.attention == "cudnn" else run.attention)]
    given = {
        "TRAIN_SEQ_LEN": (config.train_seq_len, "sequence"),
        "VOCAB_SIZE": (config.vocab_size, "vocabulary"),
        "TRAIN_BATCH_TOKENS": (config.train_batch_tokens, "tokens"),
        "MLP_MULT": (config.mlp_mult, "mlp"),
    }
    layers = [len(order) for order in (getattr(model, "straight", []), getattr(model, "looped", [])) if order]
    for name, (value, column) in given.items():
        known = [getattr(run, column) for run in same or PUBLIC_RUNS]
        if not min(known) <= value <= max(known):
            span = f"{min(known)}" if min(known) == max(known) else f"{min(known)} to {max(known)}"
            found.append(f"{name}={value} (known: {span}{f' with {attention}' * bool(same)})")
    known = [run.layers for run in PUBLIC_RUNS]
    found += [
        f"{n} layers (known: {min(known)} to {max(known)})"
        for n in sorted({*layers})
        if not min(known) <= n <= max(known)
    ]
    kv_width = config.model_dim // config.num_heads * config.num_kv_heads
    plain = {
        f"MODEL_DIM={config.model_dim} (known: {WIDTH})": config.model_dim != WIDTH,
        f"keys and values {kv_width} wide (known: {KV_WIDTH})": kv_width != KV_WIDTH,
        f"{gpus} GPUs (known: {GPUS})": gpus != GPUS,
        f"ATTENTION={config.attention}": not same,
        f"COMPILE={config.compile}": config.compile == "0",
        f"DTYPE={config.dtype}": config.dtype == "float32",
        "a model of another architecture": not layers,
    }
    return found + [text for text, holds in plain.items() if holds]


def steps_in_budget(config, straight: float, looping: float) -> tuple[float, float]:
    """(steps, seconds) of a run whose steps take `straight` seconds up to LOOP_START and `looping` from there on; by
    the clock or by ITERATIONS, whichever is first, as the run's progress says."""
    clock = config.max_wallclock_seconds or math.inf
    first = config.loop_start * min(config.iterations, clock / straight)
    rest = min(config.iterations - first, (clock - first * straight) / looping)
    return first + rest, first * straight + rest * looping


def predict(config, model, gpus: int) -> dict:
    """Facts for MODE=check: milliseconds a step over the run, steps and tokens in the budget, and what they rest on."""
    fit, times, means = best_fit(), {}, {}
    for kernel in ("flash3", "flash"):
        times[kernel] = [
            fit.ms(model_features(config, model, gpus, loops, kernel)) / 1e3 for loops in (False, model.has_loops)
        ]
        steps, seconds = steps_in_budget(config, *times[kernel])
        means[kernel] = round(1e3 * seconds / steps, 1)
    attention = "flash3" if config.attention in ("auto", "fastest", "flash3", "cudnn") else "flash"
    steps, seconds = steps_in_budget(config, *times[attention])
    straight, looping = (round(1e3 * time, 1) for time in times[attention])
    phases = f" ({straight} up to LOOP_START, {looping} from there on)" if model.has_loops else ""
    errors, terms = np.abs(fit.errors), dict(zip(fit.form, fit.coefficients.round(2).tolist(), strict=True))
    return {
        "step_time": f"{means[attention]} ms on {gpus} H100{phases}, give or take {errors.mean():.1%} by leave-one-out"
        f"; {means['flash3']} with FA3 or cuDNN, {means['flash']} with flash SDPA",
        "seconds_per_step": seconds / steps,
        "ms_per_step": means[attention],
        "ms_per_step_straight": straight,
        "ms_per_step_looping": looping,
        "steps_in_budget": int(steps),
        "tokens_in_budget": int(steps) * config.train_batch_tokens,
        "step_time_error": round(float(errors.mean()), 4),
        "step_time_rests_on": f"a fit to {len(PUBLIC_RUNS)} public runs on 8xH100; a shape left out of it is missed by "
        f"{errors.mean():.1%} in the mean, {errors.max():.0%} at most; nodes differ by 5%, now and then by 30%. "
        f"Milliseconds for each TFLOP of a GPU: {terms}",
        "step_time_extrapolates": "; ".join(beyond_the_table(config, model, gpus)) or "no: the table has such shapes",
    }
