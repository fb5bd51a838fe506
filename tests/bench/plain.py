"""A training step of the reference model as one would write it without this project: the baseline of speed.py.

It shares only the math with train_gpt.py: a U-net of blocks over a normalized embedding, grouped-query attention
with RoPE, squared ReLU, tied embedding, soft-capped logits; Muon for the matrices of the blocks, Adam for the rest. It
runs under autocast, and through torch.compile if requested. Parameter names match, so weights can be exchanged.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, self.heads, self.kv_heads = config.model_dim, config.num_heads, config.num_kv_heads
        self.head_dim = width // self.heads
        self.c_q = nn.Linear(width, width, bias=False)
        self.c_k = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.c_v = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.q_gain = nn.Parameter(torch.full((self.heads,), config.qk_gain_init))

    def forward(self, x, cos, sin):
        """x is [batch, time, width]; cos and sin are [time, half the head width]."""
        batch, time, width = x.shape
        q = self.c_q(x).view(batch, time, self.heads, self.head_dim).transpose(1, 2)
        k = self.c_k(x).view(batch, time, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.c_v(x).view(batch, time, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(norm(q), cos, sin), rotate(norm(k), cos, sin)
        q = q * self.q_gain.to(q.dtype)[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.proj(y.transpose(1, 2).reshape(batch, time, width))


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden = round(config.mlp_mult * config.model_dim)
        self.fc = nn.Linear(config.model_dim, hidden, bias=False)
        self.proj = nn.Linear(hidden, config.model_dim, bias=False)

    def forward(self, x):
        return self.proj(F.relu(self.fc(x)).square())


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn, self.mlp = Attention(config), MLP(config)
        self.attn_scale = nn.Parameter(torch.ones(config.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(config.model_dim))
        self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, config.model_dim))

    def forward(self, x, x0, cos, sin):
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(norm(x), cos, sin)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(norm(x))


class PlainGPT(nn.Module):
    """Returns the mean loss in nats of tokens and targets, [batch, time] each."""

    def __init__(self, config, dtype):
        super().__init__()
        self.dtype, self.softcap, self.half = dtype, config.logit_softcap, config.num_layers // 2
        self.tok_emb = nn.Embedding(config.vocab_size, config.model_dim)
        nn.init.normal_(self.tok_emb.weight, std=config.tied_embed_init_std)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(self.half, config.model_dim))
        head_dim = config.model_dim // config.num_heads
        frequencies = config.rope_base ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(config.train_seq_len, dtype=torch.float32), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens, targets):
        cos, sin = self.cos.to(self.dtype), self.sin.to(self.dtype)
        x = x0 = norm(self.tok_emb(tokens).to(self.dtype))
        skips = []
        for i, block in enumerate(self.blocks):
            if i >= self.half and skips:
                x = x + self.skip_weights[i - self.half].to(x.dtype) * skips.pop()
            x = block(x, x0, cos, sin)
            if i < self.half:
                skips.append(x)
        logits = F.linear(norm(x), self.tok_emb.weight).float()
        logits = self.softcap * torch.tanh(logits / self.softcap)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def newton_schulz(update, steps: int, dtype):
    """The matrix with its singular values moved close to 1 (Keller Jordan, Muon)."""
    x = update.to(dtype)
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class PlainMuon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, one matrix at a time."""

    def __init__(self, params, lr, momentum, steps, dtype, orthogonalize):
        super().__init__(params, {"lr": lr, "momentum": momentum, "steps": steps})
        self.dtype, self.orthogonalize = dtype, orthogonalize

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum_buffer"]
                buffer.mul_(group["momentum"]).add_(p.grad)
                update = self.orthogonalize(p.grad.add(buffer, alpha=group["momentum"]), group["steps"], self.dtype)
                p.add_(update.to(p.dtype), alpha=-group["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5)


class PlainTrainer:
    """Model, optimizers and training step. Learning rates are those of the configuration, without its schedule."""

    def __init__(self, config, device: torch.device, dtype: torch.dtype, compiled: bool):
        self.config, self.device, self.dtype = config, device, dtype
        self.raw_model = PlainGPT(config, dtype).to(device)
        self.model, orthogonalize = self.raw_model, newton_schulz
        if compiled:
            self.model = torch.compile(self.raw_model, dynamic=False, fullgraph=True)
            orthogonalize = torch.compile(newton_schulz)
        matrices = [p for p in self.raw_model.blocks.parameters() if p.ndim == 2 and p.size(0) > 2]
        vectors = [p for p in self.raw_model.blocks.parameters() if p.ndim < 2 or p.size(0) <= 2]
        groups = [
            {"params": [self.raw_model.tok_emb.weight], "lr": config.tied_embed_lr},
            {"params": [*vectors, self.raw_model.skip_weights], "lr": config.scalar_lr},
        ]
        adam = torch.optim.Adam(groups, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)
        muon = PlainMuon(
            matrices, config.matrix_lr, config.muon_momentum, config.muon_backend_steps, dtype, orthogonalize
        )
        self.optimizers = [adam, muon]

    def loss(self, tokens, targets):
        """The loss under autocast; torch chooses the attention kernel itself."""
        mixed = self.dtype != torch.float32
        precision = torch.autocast(self.device.type, self.dtype) if mixed else contextlib.nullcontext()
        with precision, sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return self.model(tokens, targets)

    def step(self, inputs, targets):
        """One optimizer step on [micro-steps, batch, time] tokens and targets. Returns the mean loss."""
        total = 0.0
        for tokens, expected in zip(inputs, targets, strict=True):
            loss = self.loss(tokens, expected) / len(inputs)
            loss.backward()
            total = total + loss.detach()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total
