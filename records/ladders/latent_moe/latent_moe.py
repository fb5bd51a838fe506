"""Multi-head latent attention with experts, as in DeepSeek-V2 and V3: a model file for train_gpt.py.

    python records/ladders/latent_moe/latent_moe.py records/ladders/latent_moe/bias.env    # one rung, small
    python records/ladders/latent_moe/run.py                                       # all of them, table and picture

The defaults are the full shape, 1,075,060,736 parameters; most recipes are small. A layer draws all keys, values and
queries of a token from two latents, narrow projections of the stream, but for a rotary part of the keys that comes from
the stream itself. Each token goes through a shared expert and the EXPERTS_PER_TOKEN best of the others.

Dimensions: B batch, T time, D model, H heads, d head, r its rotary part, N tokens, E routed experts, V vocabulary.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

if "train_gpt" not in sys.modules:  # beside this file, or in a folder above it
    folders = Path(__file__).resolve().parents
    sys.path.insert(0, str(next(folder for folder in folders if (folder / "train_gpt.py").is_file())))
import train_gpt
from train_gpt import Linear, Row, arch, free, knob


@dataclass(frozen=True)
class LatentConfig(train_gpt.Config):
    """The defaults are the published run; the tokens may come from a smaller tokenizer."""

    data_path: str = free("./data/datasets/shakespeare_sp1024", "folder of fineweb_{train,val}_NNNNNN.bin")
    tokenizer_path: str = free("./data/tokenizers/shakespeare_1024_bpe.model", "a .model, a tiktoken name, or bytes")
    vocab_size: int = arch(49_152, "tokens in the vocabulary; the tokenizer may have fewer", 2, 65_536)
    num_layers: int = arch(24, "transformer blocks", 1)
    model_dim: int = arch(1024, "width D of the residual stream", 2)
    num_heads: int = arch(8, "heads", 1)
    num_kv_heads: int = arch(8, "as many as NUM_HEADS", 1)
    rope_dims: int = arch(64, "dimensions of a head's queries and keys that rotate", 2)
    kv_latent: int = arch(256, "width of the latent of keys and values", 1)
    q_latent: int = arch(256, "width of the latent of queries", 1)
    places: int = arch(2048, "learned positions; at least TRAIN_SEQ_LEN", 1)
    experts: int = arch(7, "routed experts; one more is shared", 2)
    experts_per_token: int = arch(2, "routed experts that a token goes through", 1)
    expert_dim: int = arch(1536, "hidden width of an expert", 1)
    dropout: float = knob(0.1, "share of the activations that a training step leaves out", 0, 0.99)
    balance: str = knob(
        "bias",
        "what spreads the tokens over the experts: biases of the choice, a loss, or nothing",
        choices=("bias", "loss", "none"),
    )
    balance_rate: float = knob(0.001, "BALANCE=bias: what a step adds to an expert's bias, or takes off it", 0)
    balance_loss: float = knob(0.01, "BALANCE=loss: weight of the auxiliary loss, which is 1 a layer when even", 0)
    shift: bool = knob(True, "0, to show a mistake: training targets are the inputs themselves; scores stay right")
    learning_rate: float = knob(2e-5, "AdamW's peak rate", 0)
    lr_warmup_steps: int = knob(2000, "steps over which the rate rises to its peak; fewer than ITERATIONS", 0)
    weight_decay: float = knob(0.01, "AdamW's decay of the matrices", 0)
    beta2: float = knob(0.999, "Adam's second decay", 0, 0.999999)
    grad_clip_norm: float = knob(1.0, "most global gradient norm, which the log shows; 0: off", 0)
    loader: str = knob("shuffle", "order of the training sequences", choices=("stream", "shuffle"))
    train_seq_len: int = arch(256, "tokens per sequence, in training and in evaluation", 1)
    train_batch_tokens: int = knob(8192, "tokens per step: 32 sequences of 256", 1)
    iterations: int = knob(10_000, "optimizer steps at most", 1)
    max_wallclock_seconds: float = knob(0.0, "training clock in seconds; 0: none, so that runs repeat", 0)
    val_batch_size: int = free(8192, "tokens per validation batch", 1)
    size_limit: int = knob(2**32, "bytes of code plus artifact: no submission, no limit to speak of", 1)

    vocab_padding = 49_152

    @classmethod
    def model_class(cls):
        return LatentMoE

    def check(self):
        super().check()
        head, require = self.model_dim // self.num_heads, train_gpt.require
        require(self.num_kv_heads == self.num_heads, f"NUM_KV_HEADS={self.num_kv_heads}: expected NUM_HEADS")
        require(self.rope_dims < head, f"ROPE_DIMS={self.rope_dims}: expected less than the width of a head, {head}")
        require(
            self.experts_per_token <= self.experts,
            f"EXPERTS_PER_TOKEN={self.experts_per_token}: there are EXPERTS={self.experts}",
        )
        require(self.train_seq_len <= self.places, f"PLACES={self.places}: expected TRAIN_SEQ_LEN or more")
        require(
            self.lr_warmup_steps < self.iterations,
            f"LR_WARMUP_STEPS={self.lr_warmup_steps}: lower it under ITERATIONS={self.iterations}",
        )


class LatentAttention(nn.Module):
    """Causal attention of H heads whose queries and keys are of d - r plain and r rotary dimensions, all without biases
    (DeepSeek-V2). The rotary key is from the stream, and here, unlike there, each head has its own."""

    def __init__(self, config: LatentConfig, attend):
        super().__init__()
        D, H, r, self.attend = config.model_dim, config.num_heads, config.rope_dims, attend
        self.head_dim, kv, latent = D // H, config.kv_latent, config.q_latent
        shapes = {
            "kv_down": (D, kv),
            "q_down": (D, latent),
            "k_up": (kv, D - H * r),
            "v_up": (kv, D),
            "q_up": (latent, D - H * r),
            "k_rope": (D, H * r),
            "q_rope": (latent, H * r),
            "proj": (D, D),
        }
        for name, (inputs, outputs) in shapes.items():
            self.add_module(name, Linear(inputs, outputs, bias=False))
        self.heads = H

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """cos, sin: [T, 1, r / 2]."""
        kv, latent = self.kv_down(x_BTD), self.q_down(x_BTD)
        parts = self.k_up(kv), self.k_rope(x_BTD), self.q_up(latent), self.q_rope(latent), self.v_up(kv)
        k, k_turning, q, q_turning, v = (part.unflatten(-1, (self.heads, -1)) for part in parts)  # [B, T, H, .]
        k = torch.cat([k, train_gpt.rotate(k_turning, cos, sin)], dim=-1)
        q = torch.cat([q, train_gpt.rotate(q_turning, cos, sin)], dim=-1)
        y = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # scores over the root of d
        return self.proj(y.transpose(1, 2).flatten(2))


class Expert(nn.Module):
    def __init__(self, config: LatentConfig):
        super().__init__()
        D, hidden = config.model_dim, config.expert_dim
        self.gate, self.fc = Linear(D, hidden, bias=False), Linear(D, hidden, bias=False)
        self.proj = Linear(hidden, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.silu(self.gate(x)) * self.fc(x))


class Experts(nn.Module):
    """A shared expert, and for each token the best of E others: no token is dropped, no expert has a capacity.

    Scores are sigmoids; the choice is by score plus bias, what the chosen give is weighed by their scores alone, which
    are brought to a sum of 1 (DeepSeek-V3). `load` counts the tokens of a training step, until the optimizer asks."""

    def __init__(self, config: LatentConfig):
        super().__init__()
        self.shared, self.chosen = Expert(config), config.experts_per_token
        self.routed = nn.ModuleList(Expert(config) for _ in range(config.experts))
        self.router = Linear(config.model_dim, config.experts, bias=False)
        self.register_buffer("bias", torch.zeros(config.experts))
        self.register_buffer("load", torch.zeros(config.experts), persistent=False)

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and weights [N, E], at least in fp32: a rounded score is another choice. Most weights are 0."""
        scores = torch.sigmoid(self.router(train_gpt.at_least_fp32(x_ND)))
        best = (scores + self.bias).topk(self.chosen).indices
        weights = torch.zeros_like(scores).scatter(1, best, scores.gather(1, best))
        return scores, weights / weights.sum(1, keepdim=True)

    def dropless(self, x_ND: Tensor, weights_NE: Tensor) -> Tensor:
        """Each expert computes its own tokens, however many."""
        y = torch.zeros_like(x_ND)
        for expert, weights in zip(self.routed, weights_NE.unbind(1), strict=True):
            rows = weights.nonzero().squeeze(1)  # none: gradients of 0, which other ranks wait for
            y = y.index_add(0, rows, weights[rows, None].to(x_ND.dtype) * expert(x_ND[rows]))
        return y

    def dense(self, x_ND: Tensor, weights_NE: Tensor) -> Tensor:
        """The same with every expert on every token, E / EXPERTS_PER_TOKEN times the work, in shapes that do not
        depend on the data: what a compiler needs for a single graph."""
        terms = zip(self.routed, weights_NE.to(x_ND.dtype).split(1, dim=1), strict=True)
        return sum(weights * expert(x_ND) for expert, weights in terms)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D]; and how uneven the load is: 1 if even, up to E / EXPERTS_PER_TOKEN, with a gradient that evens it
        (Fedus et al. 2021, Switch)."""
        x = x_BTD.flatten(0, 1)
        scores, weights = self.route(x)
        counts = (weights > 0).float().sum(0)
        if self.training:
            self.load += counts
        shares, wanted = counts / counts.sum(), (scores / scores.sum(1, keepdim=True)).mean(0)
        routed = self.dense if torch.compiler.is_compiling() else self.dropless
        y = self.shared(x) + routed(x, weights)
        return y.view_as(x_BTD), len(counts) * (shares * wanted).sum()


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return train_gpt.rms_norm(x) * self.weight.to(x.dtype)


class Block(nn.Module):
    def __init__(self, config: LatentConfig, attend):
        super().__init__()
        self.attn, self.experts = LatentAttention(config, attend), Experts(config)
        self.norm1, self.norm2 = RMSNorm(config.model_dim), RMSNorm(config.model_dim)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.drop(self.attn(self.norm1(x), cos, sin))
        y, uneven = self.experts(self.norm2(x))
        return x + self.drop(y), uneven


class BalancedAdamW(torch.optim.AdamW):
    """After each step, every expert that had more than its share becomes less likely to be chosen by `rate`, every
    other more likely (Wang et al. 2024; DeepSeek-V3). Nothing is added to the loss."""

    def __init__(self, params, experts: list[Experts], rate: float, runtime, **options):
        super().__init__(params, **options)
        self.experts, self.rate, self.runtime = experts, rate, runtime

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        loads = torch.stack([experts.load for experts in self.experts])
        if self.runtime.world_size > 1:
            dist.all_reduce(loads)
        for experts, load in zip(self.experts, loads, strict=True):
            experts.bias += self.rate * torch.sign(load.mean() - load)
            experts.load.zero_()


def normal_init(p: Tensor, config: LatentConfig, generator):
    """PyTorch's own for embeddings; its own for the rest is train_gpt.uniform_init."""
    p.normal_(generator=generator)


class LatentMoE(train_gpt.Model):
    PARAMETERS = {
        "tok_emb": Row(normal_init, "embed", bits="embed_bits"),
        "pos_emb": Row(normal_init, "embed", bits="embed_bits"),
        "lm_head": Row(train_gpt.uniform_init, "head"),
        "lm_head.bias": Row(0.0, "scalar", fp32=True),
        "blocks.norm1": Row(1.0, "scalar", fp32=True),
        "blocks.norm2": Row(1.0, "scalar", fp32=True),
        "blocks.experts.router": Row(train_gpt.uniform_init, "matrix", "mlp", fp32=True),
        "blocks.experts.bias": Row(0.0, "scalar", fp32=True),  # a buffer, which the artifact has too
    }
    for part in ("kv_down", "q_down", "k_up", "v_up", "q_up", "k_rope", "q_rope", "proj"):
        PARAMETERS[f"blocks.attn.{part}"] = Row(train_gpt.uniform_init, "matrix", "attn")
    for part in ("shared.gate", "shared.fc", "shared.proj", "routed.gate", "routed.fc", "routed.proj"):
        PARAMETERS[f"blocks.experts.{part}"] = Row(train_gpt.uniform_init, "matrix", "mlp")

    def __init__(self, config: LatentConfig, attend=train_gpt.grouped_attention, dtype: torch.dtype = torch.float32):
        super().__init__()
        D, V = config.model_dim, config.vocab_size
        self.dtype, self.shift, self.drop = dtype, config.shift, config.dropout
        self.tok_emb, self.pos_emb = nn.Embedding(V, D), nn.Embedding(config.places, D)
        self.blocks = nn.ModuleList(Block(config, attend) for _ in range(config.num_layers))
        self.lm_head = Linear(D, V)
        self.balance_loss = config.balance_loss if config.balance == "loss" else 0.0
        cos, sin = train_gpt.rope_tables(config.train_seq_len, config.rope_dims, config.rope_base)
        self.register_buffer("cos", cos[:, None], persistent=False)
        self.register_buffer("sin", sin[:, None], persistent=False)
        self.init_weights(config)

    def run(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D], and the sum over the layers of how uneven their experts are."""
        T, total = tokens_BT.size(1), 0.0
        cos, sin = self.cos[:T].to(self.dtype), self.sin[:T].to(self.dtype)
        x = (self.tok_emb(tokens_BT) + self.pos_emb.weight[:T]).to(self.dtype)
        x = F.dropout(x, self.drop, self.training)
        for block in self.blocks:
            x, uneven = block(x, cos, sin)
            total = total + uneven
        return x, total

    def features(self, tokens_BT: Tensor) -> Tensor:
        return self.run(tokens_BT)[0]

    def logits(self, x_BTD: Tensor) -> Tensor:
        """[B, T, V] in fp32; a projection of its own with a bias, and no softcap."""
        return train_gpt.at_least_fp32(self.lm_head(x_BTD))

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None):
        x, uneven = self.run(tokens_BT)
        logits = self.logits(x)
        if targets_BT is None:
            return logits
        if self.training and not self.shift:
            targets_BT = tokens_BT
        losses = F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)
        return (losses, self.balance_loss * uneven) if self.training and self.balance_loss else losses

    def zero_grad(self, set_to_none: bool = True):
        """Also forgets whom the experts have counted: a micro-step on trial must leave nothing behind."""
        super().zero_grad(set_to_none)
        for block in self.blocks:
            block.experts.load.zero_()

    def optimizers(self, config: LatentConfig, runtime) -> list[torch.optim.Optimizer]:
        groups = train_gpt.parameter_groups(self)
        vectors, matrices = groups.pop("scalar"), sum(groups.values(), [])
        options = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        rate = config.balance_rate if config.balance == "bias" else 0.0
        return [
            BalancedAdamW(
                options,
                [block.experts for block in self.blocks],
                rate,
                runtime,
                lr=config.learning_rate,
                betas=(config.beta1, config.beta2),
                eps=config.adam_eps,
                fused=True,
            )
        ]

    def lr_scale(self, config: LatentConfig, step: int, progress: float) -> float:
        """On a line to 1 over LR_WARMUP_STEPS, then on half a cosine to 0 at the end."""
        warm = config.lr_warmup_steps / config.iterations
        if step < config.lr_warmup_steps:
            return (step + 1) / config.lr_warmup_steps
        return 0.5 * (1 + math.cos(math.pi * max(0.0, progress - warm) / (1 - warm)))

    def flops_per_token(self, seq_len: int) -> int:
        """Of training, with the weights that a token meets: the shared expert and those chosen for it."""
        blocks, D = self.blocks, self.tok_emb.embedding_dim
        every = sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear))
        experts, first = blocks[0].experts, blocks[0].experts.routed[0]
        idle = (len(experts.routed) - experts.chosen) * sum(p.numel() for p in first.parameters())
        return 6 * (every - len(blocks) * idle) + 12 * seq_len * D * len(blocks)


if __name__ == "__main__":
    sys.exit(train_gpt.main(config_class=LatentConfig))
