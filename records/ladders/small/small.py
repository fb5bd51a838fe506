"""A small transformer, one change at a time: the model file of the ladder small/.

    python train_gpt.py records/ladders/small/01_sgd.env     one rung
    python records/ladders/small/run.py                      all rungs, the table and the picture

The first rung is the model of PyTorch's tutorial on language modeling: width 200, a feed-forward part of width 200, two
heads, sequences of 35 tokens, norms after each part, dropout 0.2, and SGD with a learning rate of 5. Each later rung
changes a knob, toward what is common now.

Shape suffixes: B batch, T time, D model width, F feed-forward width, H heads, d head width, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from train_gpt import Linear, ParameterRule, knob, require, uniform_init


class Config(train_gpt.Config):
    """The defaults are the first rung. What no rung changes is set here and not in the recipes."""

    data_path = "./data/datasets/shakespeare_sp1025"
    tokenizer_path = "./data/tokenizers/shakespeare_1025_bpe.model"
    vocab_size = 1025
    num_layers = 6
    model_dim = 200
    num_heads = 2
    num_kv_heads = 2
    tie_embeddings = False
    beta2 = 0.999
    grad_clip_norm = 0.5
    train_seq_len = 35
    train_batch_tokens = 700  # 20 sequences
    val_batch_size = 14_000
    loader = "shuffle"
    compile = "0"  # on two cores the compiler takes longer than a rung
    dtype = "float32"
    iterations = 300
    max_wallclock_seconds = 0.0  # a clock would make runs differ
    warmup_steps = 3
    val_loss_every = 100
    val_tokens_limit = 21_000
    val_at_start = False
    size_limit = 200_000_000  # these are no submissions

    ff_dim: int = knob(200, "width F of the feed-forward part", 1, artifact=True)
    feed_forward: str = knob("relu", "kind of feed-forward part", choices=("relu", "swiglu"), artifact=True)
    positions: str = knob("sinusoid", "kind of positions", choices=("sinusoid", "rope", "learned"), artifact=True)
    pre_norm: bool = knob(False, "norms before each part and at the end; 0: after each part", artifact=True)
    dropout: float = knob(0.2, "fraction of the activations that training drops", 0, 0.99)
    optimizer: str = knob("sgd", "plain SGD, or AdamW", choices=("sgd", "adam"))
    learning_rate: float = knob(5.0, "peak learning rate", 0)
    lr_warmup_steps: int = knob(0, "steps of the linear learning-rate warmup; fewer than ITERATIONS", 0)
    cosine: bool = knob(False, "the learning rate falls to 0 on a cosine; 0: it is constant after the warmup")
    weight_decay: float = knob(0.0, "AdamW weight decay of the matrices", 0)

    vocab_padding = 7

    @classmethod
    def model_class(cls) -> type["Small"]:
        return Small

    def check(self):
        super().check()
        H, K = self.num_heads, self.num_kv_heads
        warmup = f"LR_WARMUP_STEPS={self.lr_warmup_steps}"
        require(self.lr_warmup_steps < self.iterations, f"{warmup}: use fewer than ITERATIONS={self.iterations}")
        require(K == H, f"NUM_KV_HEADS={K}: this model has as many as NUM_HEADS={H}: set it to {H}")


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose fp32 weights are cast to the type of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal multi-head attention; one matrix computes queries, keys and values."""

    def __init__(self, config: Config, attend):
        super().__init__()
        D = config.model_dim
        self.heads = config.num_heads
        self.attend = attend
        self.qkv = Linear(D, 3 * D)
        self.proj = Linear(D, D)

    def forward(self, x_BTD: Tensor, rotate) -> Tensor:
        """`rotate` is a function of queries or keys [B, T, H, d], or None."""
        q_BTHd, k_BTHd, v_BTHd = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        if rotate:
            q_BTHd = rotate(q_BTHd)
            k_BTHd = rotate(k_BTHd)
        y_BHTd = self.attend(q_BTHd.transpose(1, 2), k_BTHd.transpose(1, 2), v_BTHd.transpose(1, 2))
        return self.proj(y_BHTd.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two matrices with ReLU between them; or SwiGLU (Shazeer 2020), where a third matrix gates the first."""

    def __init__(self, config: Config):
        super().__init__()
        D = config.model_dim
        self.dropout = config.dropout
        self.fc = Linear(D, config.ff_dim)
        self.proj = Linear(config.ff_dim, D)
        self.gate = Linear(D, config.ff_dim) if config.feed_forward == "swiglu" else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        h_BTF = F.relu(self.fc(x_BTD)) if self.gate is None else F.silu(self.gate(x_BTD)) * self.fc(x_BTD)
        return self.proj(F.dropout(h_BTF, self.dropout, self.training))


class Block(nn.Module):
    """Attention and feed-forward part, each added to the stream, with a norm before or after it."""

    def __init__(self, config: Config, attend):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.attn = Attention(config, attend)
        self.mlp = FeedForward(config)
        self.norm1 = LayerNorm(config.model_dim)
        self.norm2 = LayerNorm(config.model_dim)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, rotate) -> Tensor:
        if self.pre_norm:
            x_BTD = x_BTD + self.drop(self.attn(self.norm1(x_BTD), rotate))
            return x_BTD + self.drop(self.mlp(self.norm2(x_BTD)))
        x_BTD = self.norm1(x_BTD + self.drop(self.attn(x_BTD, rotate)))
        return self.norm2(x_BTD + self.drop(self.mlp(x_BTD)))


def tutorial_init(p: Tensor, config: Config, generator: torch.Generator):
    """How the tutorial initializes its embedding and its output projection."""
    p.uniform_(-0.1, 0.1, generator=generator)


def sinusoids(length: int, width: int) -> Tensor:
    """[T, D]: sines in the even dimensions, cosines in the odd ones (Vaswani et al. 2017)."""
    cos, sin = train_gpt.rope_tables(length, width, 10_000.0)
    return torch.stack([sin, cos], dim=-1).flatten(1)


class Small(train_gpt.Model):
    """The tutorial's transformer. An untied output projection has a bias; the logits have no softcap."""

    PARAMETERS = {
        "tok_emb": ParameterRule(tutorial_init, "embed"),
        "pos_emb": ParameterRule(tutorial_init, "embed"),
        "lm_head": ParameterRule(tutorial_init, "head"),
        "lm_head.bias": ParameterRule(0.0, "scalar", fp32=True),
        "norm": ParameterRule(1.0, "scalar", fp32=True),
        "norm.bias": ParameterRule(0.0, "scalar", fp32=True),
    }
    for part in ("attn.qkv", "attn.proj", "mlp.fc", "mlp.gate", "mlp.proj"):
        PARAMETERS[f"blocks.{part}"] = ParameterRule(uniform_init, "matrix")
        PARAMETERS[f"blocks.{part}.bias"] = ParameterRule(0.0, "scalar", fp32=True)
    for part in ("norm1", "norm2"):
        PARAMETERS[f"blocks.{part}"] = ParameterRule(1.0, "scalar", fp32=True)
        PARAMETERS[f"blocks.{part}.bias"] = ParameterRule(0.0, "scalar", fp32=True)

    def __init__(self, config: Config, attend=train_gpt.grouped_attention, dtype: torch.dtype = torch.float32):
        super().__init__()
        D = config.model_dim
        T = config.train_seq_len
        self.dtype = dtype
        self.dropout = config.dropout
        self.positions = config.positions
        self.tok_emb = nn.Embedding(config.vocab_size, D)
        self.pos_emb = nn.Embedding(T, D) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config, attend) for _ in range(config.num_layers))
        self.norm = LayerNorm(D) if config.pre_norm else None
        self.lm_head = None if config.tie_embeddings else Linear(D, config.vocab_size)
        self.rope = train_gpt.RoPE(config)
        self.register_buffer("waves", sinusoids(T, D), persistent=False)

    def features(self, tokens_BT: Tensor) -> Tensor:
        T = tokens_BT.size(1)
        scale = self.tok_emb.embedding_dim**0.5  # as in the tutorial
        rotate = None
        x_BTD = self.tok_emb(tokens_BT).to(self.dtype) * scale
        if self.positions == "sinusoid":
            x_BTD = x_BTD + self.waves[:T].to(self.dtype)
        elif self.positions == "learned":
            x_BTD = x_BTD + self.pos_emb.weight[:T].to(self.dtype) * scale
        else:
            rotate = self.rope.rotation(T, self.dtype)
        x_BTD = F.dropout(x_BTD, self.dropout, self.training)
        for block in self.blocks:
            x_BTD = block(x_BTD, rotate)
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """[B, T, V] in fp32."""
        if self.lm_head is None:
            return train_gpt.at_least_fp32(F.linear(x_BTD, self.tok_emb.weight.to(x_BTD.dtype)))
        return train_gpt.at_least_fp32(self.lm_head(x_BTD))

    def optimizers(self, config: Config, runtime) -> list[torch.optim.Optimizer]:
        """One optimizer; only the matrices have weight decay."""
        options = [
            {"params": [p for p in self.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in self.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        if config.optimizer == "sgd":
            return [torch.optim.SGD(options, lr=config.learning_rate)]
        betas = (config.beta1, config.beta2)
        return [torch.optim.AdamW(options, lr=config.learning_rate, betas=betas, eps=config.adam_eps, fused=True)]

    def lr_scale(self, config: Config, step: int, progress: float) -> float:
        """Linear to 1 over the warmup; then 1, or half a cosine from 1 to 0 at the end."""
        warm = config.lr_warmup_steps / config.iterations
        rise = min(1.0, (step + 1) / max(config.lr_warmup_steps, 1))
        fall = 0.5 * (1 + math.cos(math.pi * max(0.0, progress - warm) / (1 - warm)))
        return rise * fall if config.cosine else rise
