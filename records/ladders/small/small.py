"""A small transformer, one change at a time: a model file for train_gpt.py.

    python records/ladders/small/small.py records/ladders/small/01_sgd.env      # one rung
    python records/ladders/small/run.py                                         # all of them, table and picture

It begins as PyTorch's tutorial on language modelling does (width and feed-forward 200, two heads, sequences of 35,
norms after each part, dropout 0.2, SGD with a rate of 5) and ends with what is usual now; each step between is a knob.

Dimensions: B batch, T time, D model, F feed-forward, V vocabulary.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if "train_gpt" not in sys.modules:  # beside this file, or in a folder above it
    folders = Path(__file__).resolve().parents
    sys.path.insert(0, str(next(folder for folder in folders if (folder / "train_gpt.py").is_file())))
import train_gpt
from train_gpt import Linear, Row, arch, free, knob


@dataclass(frozen=True)
class SmallConfig(train_gpt.Config):
    """The defaults are those of the first rung; what no rung changes stands here and not in the recipes."""

    data_path: str = free("./data/datasets/shakespeare_sp1025", "folder of fineweb_{train,val}_NNNNNN.bin")
    tokenizer_path: str = free("./data/tokenizers/shakespeare_1025_bpe.model", "a .model, a tiktoken name, or bytes")
    vocab_size: int = arch(1025, "tokens in the vocabulary, up to 7 more than the tokenizer has", 2, 65_536)
    num_layers: int = arch(6, "transformer blocks", 1)
    model_dim: int = arch(200, "width D of the residual stream", 2)
    num_heads: int = arch(2, "heads", 1)
    num_kv_heads: int = arch(2, "as many as NUM_HEADS", 1)
    tie_embeddings: bool = arch(False, "the output projection is the embedding, and has no bias")
    ff_dim: int = arch(200, "width F of the feed-forward part", 1)
    feed_forward: str = arch("relu", "feed-forward part: plain with ReLU, or SwiGLU", choices=("relu", "swiglu"))
    positions: str = arch("sinusoid", "how a token's place is told", choices=("sinusoid", "rope", "learned"))
    pre_norm: bool = arch(False, "norms before attention and feed-forward and at the end; 0: after the two")
    dropout: float = knob(0.2, "share of the activations that a training step leaves out", 0, 0.99)
    optimizer: str = knob("sgd", "plain SGD, or AdamW", choices=("sgd", "adam"))
    learning_rate: float = knob(5.0, "peak of the learning rate", 0)
    lr_warmup_steps: int = knob(0, "steps over which the rate rises to its peak; fewer than ITERATIONS", 0)
    cosine: bool = knob(False, "the rate falls on a cosine to 0; 0: it stays")
    weight_decay: float = knob(0.0, "AdamW's decay of the matrices", 0)
    beta2: float = knob(0.999, "Adam's second decay", 0, 0.999999)
    grad_clip_norm: float = knob(0.5, "most global gradient norm; 0: off", 0)
    train_seq_len: int = arch(35, "tokens per sequence, in training and in evaluation", 1)
    train_batch_tokens: int = knob(700, "tokens per step: 20 sequences", 1)
    val_batch_size: int = free(14_000, "tokens per validation batch", 1)
    loader: str = knob("shuffle", "order of the training sequences", choices=("stream", "shuffle"))
    compile: str = free("0", "torch.compile; on two cores it takes longer than a rung", choices=("auto", "0", "1"))
    dtype: str = knob("float32", "of activations and products", choices=("auto", "bfloat16", "float32"))
    iterations: int = knob(300, "optimizer steps at most: 210,000 tokens", 1)
    max_wallclock_seconds: float = knob(0.0, "training clock in seconds; 0: none, so that runs repeat", 0)
    warmup_steps: int = free(3, "steps that compile everything; all state is restored after them", 0)
    val_loss_every: int = free(100, "steps between validations; 0: only at the end", 0)
    val_tokens_limit: int = free(21_000, "score only the first N targets, labelled partial; 0: all", 0)
    val_at_start: bool = free(False, "validate before the first step")
    size_limit: int = knob(200_000_000, "bytes of code plus artifact: no submission, no limit to speak of", 1)

    vocab_padding = 7

    @classmethod
    def model_class(cls):
        return Small

    def check(self):
        super().check()
        train_gpt.require(
            self.lr_warmup_steps < self.iterations,
            f"LR_WARMUP_STEPS={self.lr_warmup_steps}: lower it under ITERATIONS={self.iterations}",
        )
        train_gpt.require(
            self.num_kv_heads == self.num_heads,
            f"NUM_KV_HEADS={self.num_kv_heads}: this model has as many as NUM_HEADS={self.num_heads}",
        )


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config: SmallConfig, attend):
        super().__init__()
        D, self.heads, self.attend = config.model_dim, config.num_heads, attend
        self.qkv, self.proj = Linear(D, 3 * D), Linear(D, D)

    def forward(self, x_BTD: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        """`tables`: cos and sin, where queries and keys are to be rotated."""
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # [B, T, H, D / H] each
        if tables:
            q, k = train_gpt.rotate(q, *tables), train_gpt.rotate(k, *tables)
        y = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """ReLU between two products; or SwiGLU (Shazeer 2020), where a third one gates the first."""

    def __init__(self, config: SmallConfig):
        super().__init__()
        D, hidden, self.share = config.model_dim, config.ff_dim, config.dropout
        self.fc, self.proj = Linear(D, hidden), Linear(hidden, D)
        self.gate = Linear(D, hidden) if config.feed_forward == "swiglu" else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc(x)) if self.gate is None else F.silu(self.gate(x)) * self.fc(x)
        return self.proj(F.dropout(h, self.share, self.training))


class Block(nn.Module):
    def __init__(self, config: SmallConfig, attend):
        super().__init__()
        self.attn, self.mlp = Attention(config, attend), FeedForward(config)
        self.norm1, self.norm2 = LayerNorm(config.model_dim), LayerNorm(config.model_dim)
        self.pre_norm, self.drop = config.pre_norm, nn.Dropout(config.dropout)

    def forward(self, x: Tensor, tables) -> Tensor:
        if self.pre_norm:
            x = x + self.drop(self.attn(self.norm1(x), tables))
            return x + self.drop(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.drop(self.attn(x, tables)))
        return self.norm2(x + self.drop(self.mlp(x)))


def tutorial_init(p: Tensor, config: SmallConfig, generator):
    """What the tutorial gives its embedding and its output projection."""
    p.uniform_(-0.1, 0.1, generator=generator)


def sinusoids(length: int, width: int) -> Tensor:
    """[T, D]: sines in the even, cosines in the odd dimensions (Vaswani et al. 2017)."""
    cos, sin = train_gpt.rope_tables(length, width, 10_000.0)
    return torch.stack([sin, cos], dim=-1).flatten(1)


class Small(train_gpt.Model):
    PARAMETERS = {
        "tok_emb": Row(tutorial_init, "embed", bits="embed_bits"),
        "pos_emb": Row(tutorial_init, "embed", bits="embed_bits"),
        "lm_head": Row(tutorial_init, "head"),
        "lm_head.bias": Row(0.0, "scalar", fp32=True),
        "norm": Row(1.0, "scalar", fp32=True),
        "norm.bias": Row(0.0, "scalar", fp32=True),
    }
    for part in ("attn.qkv", "attn.proj", "mlp.fc", "mlp.gate", "mlp.proj"):
        PARAMETERS[f"blocks.{part}"] = Row(train_gpt.uniform_init, "matrix", part.split(".")[0])
        PARAMETERS[f"blocks.{part}.bias"] = Row(0.0, "scalar", fp32=True)
    for part in ("norm1", "norm2"):
        PARAMETERS[f"blocks.{part}"] = Row(1.0, "scalar", fp32=True)
        PARAMETERS[f"blocks.{part}.bias"] = Row(0.0, "scalar", fp32=True)

    def __init__(self, config: SmallConfig, attend=train_gpt.grouped_attention, dtype: torch.dtype = torch.float32):
        super().__init__()
        D, V, T = config.model_dim, config.vocab_size, config.train_seq_len
        self.dtype, self.drop = dtype, config.dropout
        self.tok_emb, self.positions = nn.Embedding(V, D), config.positions
        self.pos_emb = nn.Embedding(T, D) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config, attend) for _ in range(config.num_layers))
        self.norm = LayerNorm(D) if config.pre_norm else None
        self.lm_head = None if config.tie_embeddings else Linear(D, V)
        cos, sin = train_gpt.rope_tables(T, D // config.num_heads, config.rope_base)
        tables = {"cos": cos[:, None], "sin": sin[:, None], "waves": sinusoids(T, D)}
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
        self.init_weights(config)

    def features(self, tokens_BT: Tensor) -> Tensor:
        T, tables = tokens_BT.size(1), None
        x = self.tok_emb(tokens_BT).to(self.dtype) * self.tok_emb.embedding_dim**0.5
        if self.positions == "sinusoid":
            x = x + self.waves[:T].to(self.dtype)
        elif self.positions == "learned":
            x = x + self.pos_emb.weight[:T].to(self.dtype) * self.tok_emb.embedding_dim**0.5
        else:
            tables = self.cos[:T].to(self.dtype), self.sin[:T].to(self.dtype)
        x = F.dropout(x, self.drop, self.training)
        for block in self.blocks:
            x = block(x, tables)
        return x if self.norm is None else self.norm(x)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """[B, T, V] in fp32, with a bias where the projection is its own, and no softcap."""
        head = self.lm_head or (lambda x: F.linear(x, self.tok_emb.weight.to(x.dtype)))
        return train_gpt.at_least_fp32(head(x_BTD))

    def optimizers(self, config: SmallConfig, runtime) -> list[torch.optim.Optimizer]:
        groups = train_gpt.parameter_groups(self)
        vectors, matrices = groups.pop("scalar"), sum(groups.values(), [])
        options = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        if config.optimizer == "sgd":
            return [torch.optim.SGD(options, lr=config.learning_rate)]
        betas = config.beta1, config.beta2
        return [torch.optim.AdamW(options, lr=config.learning_rate, betas=betas, eps=config.adam_eps, fused=True)]

    def lr_scale(self, config: SmallConfig, step: int, progress: float) -> float:
        """On a line to 1 over the warm-up; then 1, or on half a cosine from 1 to 0 at the end."""
        warm = config.lr_warmup_steps / config.iterations
        rise = min(1.0, (step + 1) / max(config.lr_warmup_steps, 1))
        fall = 0.5 * (1 + math.cos(math.pi * max(0.0, progress - warm) / (1 - warm)))
        return rise * fall if config.cosine else rise

    def flops_per_token(self, seq_len: int) -> int:
        weights = self.output_weight()[1].numel()
        weights += sum(m.weight.numel() for m in self.blocks.modules() if isinstance(m, Linear))
        return 6 * weights + 12 * seq_len * self.tok_emb.embedding_dim * len(self.blocks)


if __name__ == "__main__":
    sys.exit(train_gpt.main(config_class=SmallConfig))
