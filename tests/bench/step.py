"""How much of the machine's bf16 matrix rate a training step reaches, beside a deliberately plain eager baseline.

    python tests/bench/step.py                     the demo's scale: 4 layers, width 256, 8,192 tokens a step
    MODEL_DIM=512 python tests/bench/step.py       any knob of train_gpt.py
    PAIRS=20 python tests/bench/step.py            more pairs

rate = 6 * parameters * tokens/s / FLOPs per second of a 1024-wide bf16 product, measured in this process. The two
contenders and the product take turns, so that a machine whose speed drifts moves all three alike: quote the ratios.
"""

import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt  # noqa: E402

SHAPE = {"NUM_LAYERS": 4, "MODEL_DIM": 256, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "TRAIN_SEQ_LEN": 256,
         "TRAIN_BATCH_TOKENS": 8192, "VOCAB_SIZE": 1024, "MAX_WALLCLOCK_SECONDS": 0}  # fmt: skip


class PlainBlock(nn.Module):
    """The reference block, written without any thought of speed."""

    def __init__(self, c):
        super().__init__()
        d = c.model_dim // c.num_heads
        self.d, self.group = d, c.num_heads // c.num_kv_heads
        self.q, self.proj = (nn.Linear(c.model_dim, c.model_dim, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(c.model_dim, d * c.num_kv_heads, bias=False) for _ in range(2))
        hidden = round(c.mlp_mult * c.model_dim)
        self.fc, self.out = nn.Linear(c.model_dim, hidden, bias=False), nn.Linear(hidden, c.model_dim, bias=False)
        self.gain = nn.Parameter(torch.full((c.num_heads, 1), c.qk_gain_init))
        self.scales = nn.Parameter(torch.ones(2, c.model_dim))
        self.mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, c.model_dim))

    def forward(self, x, x0, cos, sin):
        B, T, D = x.shape
        x = self.mix[0] * x + self.mix[1] * x0
        n = F.rms_norm(x, (D,))
        q, k, v = (layer(n).view(B, T, -1, self.d) for layer in (self.q, self.k, self.v))
        q = train_gpt.rotate(F.rms_norm(q, (self.d,)), cos, sin) * self.gain
        k = train_gpt.rotate(F.rms_norm(k, (self.d,)), cos, sin)
        k, v = (t.repeat_interleave(self.group, dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2).to(v.dtype) for t in (q, k, v))
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):  # the trainer has pinned its own choice
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, D)
        x = x + self.scales[0] * self.proj(y)
        return x + self.scales[1] * self.out(F.relu(self.fc(F.rms_norm(x, (D,)))).square())


class Plain(nn.Module):
    """The reference model under autocast, eager, without U-net skips (which cost next to nothing)."""

    def __init__(self, c):
        super().__init__()
        self.emb = nn.Embedding(c.vocab_size, c.model_dim)
        self.blocks = nn.ModuleList(PlainBlock(c) for _ in range(c.num_layers))
        tables = train_gpt.rope_tables(c.train_seq_len, c.model_dim // c.num_heads, c.rope_base)
        self.cos, self.sin = (table[:, None] for table in tables)
        self.softcap = c.logit_softcap

    def forward(self, tokens, targets):
        with torch.autocast("cpu", torch.bfloat16):
            x = x0 = F.rms_norm(self.emb(tokens), (self.emb.embedding_dim,))
            for block in self.blocks:
                x = block(x, x0, self.cos, self.sin)
            logits = F.rms_norm(x, (x.size(-1),)) @ self.emb.weight.T
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def plain_muon(params, momenta, lr, momentum=0.95, steps=5):
    """One matrix after the other."""
    for p, m in zip(params, momenta, strict=True):
        m.mul_(momentum).add_(p.grad)
        u = p.grad + momentum * m
        x = (u / u.norm()).bfloat16()
        x = x.T if u.size(0) > u.size(1) else x
        for _ in range(steps):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x.T if u.size(0) > u.size(1) else x
        p.data.add_(x.float() * max(1, u.size(0) / u.size(1)) ** 0.5, alpha=-lr)


def plain_step(config):
    """A function that makes one step of the baseline on random tokens, and its number of parameters."""
    model = Plain(config)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and min(p.shape) > 2]
    momenta = [torch.zeros_like(p) for p in matrices]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    adam = torch.optim.Adam(others, lr=1e-3, foreach=False, fused=False)
    rows = config.train_batch_tokens // config.train_seq_len
    tokens = torch.randint(config.vocab_size, (rows, config.train_seq_len + 1))

    def step():
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        adam.step()
        plain_muon(matrices, momenta, 0.01)
        model.zero_grad()

    return step, sum(p.numel() for p in model.parameters())


def our_step(config):
    """A function that makes one step of the trainer on random tokens, and its number of parameters."""
    runtime = train_gpt.Runtime(config, {})
    folder, loader = train_gpt.RunFolder(runtime), RandomTokens(config, runtime)
    trainer = train_gpt.Trainer(config, runtime, folder, None, loader, train_gpt.Hooks(config, folder))
    print(trainer.note)
    return lambda: float(trainer.step(1.0, 0.95)), sum(p.numel() for p in trainer.model.parameters())


class RandomTokens(train_gpt.TrainLoader):
    """The trainer's loader over a stream in memory."""

    def __init__(self, config, runtime):
        stream = train_gpt.TokenStream.__new__(train_gpt.TokenStream)
        tokens = np.random.default_rng(0).integers(config.vocab_size, size=10**6, dtype=np.uint16)
        stream.shards, stream.ends = [tokens], np.array([len(tokens)])
        stream.pattern, stream.vocab_size = "random", config.vocab_size
        super().__init__(stream, config, runtime, config.accumulation_steps(1, runtime.device.type))


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main():
    config = train_gpt.Config.load([], {name: str(value) for name, value in SHAPE.items()} | dict(os.environ))
    pairs = int(os.environ.get("PAIRS", 10))
    (ours, params), (plain, plain_params) = our_step(config), plain_step(config)
    left, right = torch.randn(1024, 1024, dtype=torch.bfloat16), torch.randn(1024, 1024, dtype=torch.bfloat16)
    for call in (ours, plain):
        for _ in range(3):
            call()
    rows = []
    for _ in range(pairs):
        product = statistics.median(seconds(lambda: left @ right) for _ in range(20))
        rows.append((2 * 1024**3 / product, seconds(ours), seconds(plain)))
    tokens = config.train_batch_tokens
    print(f"{params} parameters (plain: {plain_params}), {tokens} tokens a step, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, {pairs} pairs: median (least to most)")  # fmt: skip
    figures = {
        "bf16 product, GFLOP/s": [rate / 1e9 for rate, _, _ in rows],
        "ours, tokens/s": [tokens / ours for _, ours, _ in rows],
        "plain, tokens/s": [tokens / plain for _, _, plain in rows],
        "ours, share of the product's rate": [6 * params * tokens / ours / rate for rate, ours, _ in rows],
        "plain, share of the product's rate": [6 * plain_params * tokens / plain / rate for rate, _, plain in rows],
        "ours over plain, speed": [plain / ours for _, ours, plain in rows],
    }
    for name, values in figures.items():
        print(f"{name:36} {statistics.median(values):10.3f} ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
