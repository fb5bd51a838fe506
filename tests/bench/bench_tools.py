"""Shared helpers for the benches: settings from words, random data and weights, timing, and printing of results."""

import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402

FRONTIER = ROOT / "records" / "models" / "frontier.py"


def parse(words: str) -> dict[str, str]:
    """Parse words KNOB=value into {KNOB: string}."""
    return dict(word.split("=", 1) for word in words.split())


RANS = parse("CODEC=rans WEIGHT_BITS=6 EMBED_BITS=6 CLIP_ATTN=12.85 CLIP_MLP=12.85 CLIP_EMBED=12.85")


def random_stream(config, count: int) -> train_gpt.TokenStream:
    """A token stream in memory."""
    stream = train_gpt.TokenStream.__new__(train_gpt.TokenStream)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=count, dtype=np.uint16)
    stream.shards, stream.ends = [tokens], np.array([count])
    stream.pattern, stream.vocab_size = "random", config.vocab_size
    return stream


def random_loader(config, runtime) -> train_gpt.TrainLoader:
    accum_steps = config.accumulation_steps(1, runtime.device.type)
    return train_gpt.TrainLoader(random_stream(config, 10**6), config, runtime, accum_steps)


def build_trainer(config, runtime, tool=train_gpt, folder=None) -> train_gpt.Trainer:
    """The Trainer of the script or of the checkpoint tool."""
    stopwatch = train_gpt.Stopwatch(runtime.synchronize)
    return tool.Trainer(config, folder or train_gpt.RunFolder(runtime), stopwatch, random_loader(config, runtime))


def random_weights(shapes: dict) -> dict[str, torch.Tensor]:
    """Random weights with about the scale of trained ones, so that they compress about as well."""
    generator = torch.Generator().manual_seed(0)
    return {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def timed(call, *args, wait=lambda: None):
    """(result, seconds) of a call; `wait` waits for the device."""
    wait()
    began = time.perf_counter()
    result = call(*args)
    wait()
    return result, time.perf_counter() - began


def take_turns(calls: dict, rounds: int, wait=lambda: None) -> dict[str, list[float]]:
    """Seconds of each call in each round; every second round runs the calls in reverse order."""
    taken = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            taken[name].append(timed(calls[name], wait=wait)[1])
    return taken


def spread(values, digits=3) -> str:
    """Median (minimum to maximum)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def entropy(quantized: dict[str, torch.Tensor], kinds) -> float:
    """Zeroth-order entropy in bits per weight, with separate tables for attention, MLP and embedding."""
    counts = np.zeros((3, 256))
    for kind, q in zip(kinds, quantized.values(), strict=True):
        counts[kind] += np.bincount(q.numpy().view(np.uint8).ravel(), minlength=256)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return -(counts * np.log2(np.where(counts > 0, shares, 1))).sum() / counts.sum()
