"""Multi-head latent attention and a mixture of experts, as in DeepSeek-V2 and V3: the model file of latent_moe/.

    python train_gpt.py records/ladders/latent_moe/bias.env    one rung, small
    python records/ladders/latent_moe/run.py                   all small rungs, the tables and the picture

The defaults are the full shape of 1,075,060,736 parameters; most recipes are small. A layer computes all queries, keys
and values of a token from two latents, which are narrow projections of the stream. Only the rotary part of the keys
comes from the stream itself. Each token passes through a shared expert and the EXPERTS_PER_TOKEN best of the others.

Shape suffixes: B batch, T time, D model width, H heads, d head width, N tokens, E routed experts, V vocabulary. The
rotary part of a head has width r = ROPE_DIMS.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from train_gpt import Linear, ParameterRule, knob, require, uniform_init


class Config(train_gpt.Config):
    """The defaults are the published run, with the demo's data and tokenizer."""

    data_path = "./data/datasets/shakespeare_sp1024"
    tokenizer_path = "./data/tokenizers/shakespeare_1024_bpe.model"
    vocab_size = 49_152
    num_layers = 24
    model_dim = 1024
    num_heads = 8
    num_kv_heads = 8
    beta2 = 0.999
    grad_clip_norm = 1.0
    loader = "shuffle"
    train_seq_len = 256
    train_batch_tokens = 8192  # 32 sequences
    iterations = 10_000
    max_wallclock_seconds = 0.0  # a clock would make runs differ
    val_batch_size = 8192
    size_limit = 2**32  # these are no submissions

    rope_dims: int = knob(64, "dimensions of a head's queries and keys that rotate", 2, artifact=True)
    kv_latent: int = knob(256, "width of the latent of keys and values", 1, artifact=True)
    q_latent: int = knob(256, "width of the latent of queries", 1, artifact=True)
    places: int = knob(2048, "learned positions; at least TRAIN_SEQ_LEN", 1, artifact=True)
    experts: int = knob(7, "routed experts E; one more is shared", 2, artifact=True)
    experts_per_token: int = knob(2, "routed experts that a token passes through", 1, artifact=True)
    expert_dim: int = knob(1536, "hidden width of an expert", 1, artifact=True)
    dropout: float = knob(0.1, "fraction of the activations that training drops", 0, 0.99)
    balance: str = knob(
        "bias",
        "what balances the load of the experts: biases of the choice, an auxiliary loss, or nothing",
        choices=("bias", "loss", "none"),
    )
    balance_rate: float = knob(0.001, "BALANCE=bias: change of an expert's bias per step", 0)
    balance_loss: float = knob(0.01, "BALANCE=loss: weight of the loss, which is 1 per layer at an even load", 0)
    shift: bool = knob(True, "0 demonstrates a mistake: the training targets are the inputs; scores stay right")
    learning_rate: float = knob(2e-5, "AdamW peak learning rate", 0)
    lr_warmup_steps: int = knob(2000, "steps of the linear learning-rate warmup; fewer than ITERATIONS", 0)
    weight_decay: float = knob(0.01, "AdamW weight decay of the matrices", 0)

    vocab_padding = 49_152  # the tokenizer may have fewer pieces than VOCAB_SIZE

    @classmethod
    def model_class(cls) -> type["LatentMoE"]:
        return LatentMoE

    def check(self):
        super().check()
        H, K, T = self.num_heads, self.num_kv_heads, self.train_seq_len
        head_dim = self.model_dim // H
        chosen = f"EXPERTS_PER_TOKEN={self.experts_per_token}"
        warmup = f"LR_WARMUP_STEPS={self.lr_warmup_steps}"
        require(K == H, f"NUM_KV_HEADS={K}: this model has as many as NUM_HEADS={H}: set it to {H}")
        require(self.rope_dims < head_dim, f"ROPE_DIMS={self.rope_dims}: use less than the head width {head_dim}")
        require(self.experts_per_token <= self.experts, f"{chosen}: there are only EXPERTS={self.experts}")
        require(T <= self.places, f"PLACES={self.places}: use at least TRAIN_SEQ_LEN={T}")
        require(self.lr_warmup_steps < self.iterations, f"{warmup}: use fewer than ITERATIONS={self.iterations}")


class LatentAttention(nn.Module):
    """Causal attention whose queries and keys have d - r plain and r rotary dimensions (DeepSeek-V2).

    There are no biases. The rotary key comes from the stream; unlike in DeepSeek-V2, each head has its own.
    """

    def __init__(self, config: Config, attend):
        super().__init__()
        D = config.model_dim
        rotary = config.num_heads * config.rope_dims
        self.heads = config.num_heads
        self.attend = attend
        self.kv_down = Linear(D, config.kv_latent, bias=False)
        self.q_down = Linear(D, config.q_latent, bias=False)
        self.k_up = Linear(config.kv_latent, D - rotary, bias=False)
        self.v_up = Linear(config.kv_latent, D, bias=False)
        self.q_up = Linear(config.q_latent, D - rotary, bias=False)
        self.k_rope = Linear(D, rotary, bias=False)
        self.q_rope = Linear(config.q_latent, rotary, bias=False)
        self.proj = Linear(D, D, bias=False)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, T, H, width / H]."""
        return x.unflatten(-1, (self.heads, -1))

    def forward(self, x_BTD: Tensor, rotate) -> Tensor:
        """`rotate` is a function of the rotary parts [B, T, H, r]."""
        kv_latent = self.kv_down(x_BTD)
        q_latent = self.q_down(x_BTD)
        k_rotary = rotate(self.split_heads(self.k_rope(x_BTD)))
        q_rotary = rotate(self.split_heads(self.q_rope(q_latent)))
        k_BTHd = torch.cat([self.split_heads(self.k_up(kv_latent)), k_rotary], dim=-1)
        q_BTHd = torch.cat([self.split_heads(self.q_up(q_latent)), q_rotary], dim=-1)
        v_BTHd = self.split_heads(self.v_up(kv_latent))
        y_BHTd = self.attend(q_BTHd.transpose(1, 2), k_BTHd.transpose(1, 2), v_BTHd.transpose(1, 2))
        return self.proj(y_BHTd.transpose(1, 2).flatten(2))


class Expert(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: Config):
        super().__init__()
        D = config.model_dim
        self.gate = Linear(D, config.expert_dim, bias=False)
        self.fc = Linear(D, config.expert_dim, bias=False)
        self.proj = Linear(config.expert_dim, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.silu(self.gate(x)) * self.fc(x))


class Experts(nn.Module):
    """A shared expert plus, for each token, the best of E routed ones. No token is dropped; there is no capacity limit.

    Experts are chosen by sigmoid score plus bias. The outputs of the chosen ones are weighted by their scores alone,
    normalized to a sum of 1 (DeepSeek-V3). `load` counts the tokens per expert during training until the optimizer
    resets it.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.chosen = config.experts_per_token
        self.loss_weight = config.balance_loss if config.balance == "loss" else 0.0
        self.shared = Expert(config)
        self.routed = nn.ModuleList(Expert(config) for _ in range(config.experts))
        self.router = Linear(config.model_dim, config.experts, bias=False)
        self.register_buffer("bias", torch.zeros(config.experts))
        self.register_buffer("load", torch.zeros(config.experts), persistent=False)

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and weights [N, E]. Most weights are 0. They are at least fp32: rounding would change the choice."""
        scores_NE = torch.sigmoid(self.router(train_gpt.at_least_fp32(x_ND)))
        best = (scores_NE + self.bias).topk(self.chosen).indices
        weights_NE = torch.zeros_like(scores_NE).scatter(1, best, scores_NE.gather(1, best))
        return scores_NE, weights_NE / weights_NE.sum(1, keepdim=True)

    def dropless(self, x_ND: Tensor, weights_NE: Tensor) -> Tensor:
        """Each expert computes only its own tokens, however many there are."""
        y_ND = torch.zeros_like(x_ND)
        for expert, weights in zip(self.routed, weights_NE.unbind(1), strict=True):
            # An expert without tokens still computes, for gradients of 0: other ranks wait for them.
            rows = weights.nonzero().squeeze(1)
            y_ND = y_ND.index_add(0, rows, weights[rows, None].to(x_ND.dtype) * expert(x_ND[rows]))
        return y_ND

    def dense(self, x_ND: Tensor, weights_NE: Tensor) -> Tensor:
        """The same result with every expert on every token.

        That is E / EXPERTS_PER_TOKEN times the work, but no shape depends on the data, so that a compiler needs only
        one graph.
        """
        terms = zip(self.routed, weights_NE.to(x_ND.dtype).split(1, dim=1), strict=True)
        return sum(weights * expert(x_ND) for expert, weights in terms)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        scores_NE, weights_NE = self.route(x_ND)
        counts_E = (weights_NE > 0).float().sum(0)
        if self.training:
            self.load += counts_E
            if self.loss_weight:
                self.extra_loss = self.loss_weight * self.unevenness(counts_E, scores_NE)
        routed = self.dense if torch.compiler.is_compiling() else self.dropless
        return (self.shared(x_ND) + routed(x_ND, weights_NE)).view_as(x_BTD)

    def unevenness(self, counts_E: Tensor, scores_NE: Tensor) -> Tensor:
        """1 at an even load, up to E / EXPERTS_PER_TOKEN. Its gradient evens the load (Fedus et al. 2021, Switch)."""
        share_E = counts_E / counts_E.sum()
        wanted_E = (scores_NE / scores_NE.sum(1, keepdim=True)).mean(0)
        return len(counts_E) * (share_E * wanted_E).sum()


class RMSNorm(nn.RMSNorm):
    """RMS norm with a weight per channel."""

    def forward(self, x: Tensor) -> Tensor:
        return train_gpt.rms_norm(x) * self.weight.to(x.dtype)


class Block(nn.Module):
    """Attention and experts, each with a norm before it and dropout after it."""

    def __init__(self, config: Config, attend):
        super().__init__()
        self.attn = LatentAttention(config, attend)
        self.experts = Experts(config)
        self.norm1 = RMSNorm(config.model_dim)
        self.norm2 = RMSNorm(config.model_dim)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, rotate) -> Tensor:
        x_BTD = x_BTD + self.drop(self.attn(self.norm1(x_BTD), rotate))
        return x_BTD + self.drop(self.experts(self.norm2(x_BTD)))


class BalancedAdamW(torch.optim.AdamW):
    """AdamW that also balances the experts, without a loss (Wang et al. 2024; DeepSeek-V3).

    After each step the bias of every expert with more than an even share of the tokens falls by `rate`; every other
    bias rises by it.
    """

    def __init__(self, params, experts: list[Experts], rate: float, runtime, **options):
        super().__init__(params, **options)
        self.experts = experts
        self.rate = rate
        self.runtime = runtime

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        loads = torch.stack([experts.load for experts in self.experts])
        if self.runtime.world_size > 1:
            dist.all_reduce(loads)
        for experts, load in zip(self.experts, loads, strict=True):
            experts.bias += self.rate * torch.sign(load.mean() - load)
            experts.load.zero_()


def normal_init(p: Tensor, config: Config, generator: torch.Generator):
    """torch's default for embeddings. Its default for other matrices is uniform_init."""
    p.normal_(generator=generator)


class LatentMoE(train_gpt.Model):
    """Blocks of latent attention and experts over learned positions. The output projection has a bias; no softcap."""

    PARAMETERS = {
        "tok_emb": ParameterRule(normal_init, "embed"),
        "pos_emb": ParameterRule(normal_init, "embed"),
        "lm_head": ParameterRule(uniform_init, "head"),
        "lm_head.bias": ParameterRule(0.0, "scalar", fp32=True),
        "blocks.norm1": ParameterRule(1.0, "scalar", fp32=True),
        "blocks.norm2": ParameterRule(1.0, "scalar", fp32=True),
        "blocks.experts.router": ParameterRule(uniform_init, "matrix", fp32=True),
        "blocks.experts.bias": ParameterRule(0.0, "scalar", fp32=True),  # a buffer, which the artifact holds, too
    }
    for part in ("kv_down", "q_down", "k_up", "v_up", "q_up", "k_rope", "q_rope", "proj"):
        PARAMETERS[f"blocks.attn.{part}"] = ParameterRule(uniform_init, "matrix")
    for part in ("shared.gate", "shared.fc", "shared.proj", "routed.gate", "routed.fc", "routed.proj"):
        PARAMETERS[f"blocks.experts.{part}"] = ParameterRule(uniform_init, "matrix")

    def __init__(self, config: Config, attend=train_gpt.grouped_attention, dtype: torch.dtype = torch.float32):
        super().__init__()
        D = config.model_dim
        self.dtype = dtype
        self.shift = config.shift
        self.dropout = config.dropout
        self.tok_emb = nn.Embedding(config.vocab_size, D)
        self.pos_emb = nn.Embedding(config.places, D)
        self.positions = train_gpt.RoPE(config, config.rope_dims)
        self.blocks = nn.ModuleList(Block(config, attend) for _ in range(config.num_layers))
        self.lm_head = Linear(D, config.vocab_size)

    def features(self, tokens_BT: Tensor) -> Tensor:
        T = tokens_BT.size(1)
        rotate = self.positions.rotation(T, self.dtype)
        x_BTD = (self.tok_emb(tokens_BT) + self.pos_emb.weight[:T]).to(self.dtype)
        x_BTD = F.dropout(x_BTD, self.dropout, self.training)
        for block in self.blocks:
            x_BTD = block(x_BTD, rotate)
        return x_BTD

    def logits(self, x_BTD: Tensor) -> Tensor:
        """[B, T, V] in fp32."""
        return train_gpt.at_least_fp32(self.lm_head(x_BTD))

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None):
        if self.training and not self.shift and targets_BT is not None:
            targets_BT = tokens_BT
        return super().forward(tokens_BT, targets_BT)

    def zero_grad(self, set_to_none: bool = True):
        """Also reset the loads: a micro-step that only tests the memory must leave no trace."""
        super().zero_grad(set_to_none)
        for block in self.blocks:
            block.experts.load.zero_()

    def optimizers(self, config: Config, runtime) -> list[torch.optim.Optimizer]:
        """One AdamW; only the matrices have weight decay."""
        options = [
            {"params": [p for p in self.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in self.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        return [
            BalancedAdamW(
                options,
                [block.experts for block in self.blocks],
                config.balance_rate if config.balance == "bias" else 0.0,
                runtime,
                lr=config.learning_rate,
                betas=(config.beta1, config.beta2),
                eps=config.adam_eps,
                fused=True,
            )
        ]

    def lr_scale(self, config: Config, step: int, progress: float) -> float:
        """Linear to 1 over LR_WARMUP_STEPS, then half a cosine to 0 at the end."""
        warm = config.lr_warmup_steps / config.iterations
        if step < config.lr_warmup_steps:
            return (step + 1) / config.lr_warmup_steps
        return 0.5 * (1 + math.cos(math.pi * max(0.0, progress - warm) / (1 - warm)))

    def flops_per_token(self, seq_len: int) -> int:
        """6 FLOPs for each weight that a token meets, without the experts that it is not routed to, and 12 T D for each
        attention, counted as a full square."""
        experts = self.blocks[0].experts
        idle_per_layer = (len(experts.routed) - experts.chosen) * sum(p.numel() for p in experts.routed[0].parameters())
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear))
        active = weights - len(self.blocks) * idle_per_layer
        return 6 * active + 12 * seq_len * self.tok_emb.embedding_dim * len(self.blocks)
