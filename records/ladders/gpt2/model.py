"""GPT-2 (Radford et al. 2019): the model file of the ladders gpt2/ and precision/.

    python train_gpt.py records/ladders/gpt2/d_init.env
    MODE=eval ARTIFACT=logs/<run_id>/final_model.int8.ptz python train_gpt.py

The defaults of Config are the published setting: 124 M parameters and 50 steps of AdamW at a constant learning rate, on
the text in its order. A recipe holds what its rung changes.

Shape suffixes: B batch, T time, D model width, H heads, d head width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from train_gpt import Linear, ParameterRule, knob, require

INIT_STD = 0.02


class Config(train_gpt.Config):
    """The script's knobs with GPT-2's defaults, then the knobs of this model."""

    data_path = "./data/datasets/tiny_shakespeare_gpt2"
    tokenizer_path = "gpt2"
    vocab_size = 50_257
    num_layers = 12
    model_dim = 768
    num_heads = 12
    num_kv_heads = 12
    mlp_mult = 4.0
    train_seq_len = 1024
    train_batch_tokens = 16_384
    iterations = 50
    max_wallclock_seconds = 0.0
    warmup_steps = 0
    warmdown_frac = 0.0
    train_log_every = 1
    val_loss_every = 0
    beta2 = 0.999

    context: int = knob(1024, "learned positions, at least TRAIN_SEQ_LEN", 1, artifact=True)
    init: str = knob("gpt2", "initial weights: GPT-2's, or those of torch's modules", choices=("gpt2", "torch"))
    learning_rate: float = knob(3e-4, "AdamW learning rate of all parameters", 0)
    weight_decay: float = knob(0.01, "AdamW weight decay of all parameters", 0)
    lr_warmup: int = knob(0, "steps of the linear warmup to LEARNING_RATE", 0)
    matmul_precision: str = knob("highest", "of fp32 matmuls; high: TF32 on a GPU", choices=("highest", "high"))

    @classmethod
    def model_class(cls) -> type["GPT2"]:
        return GPT2

    def check(self):
        super().check()
        T, H, K = self.train_seq_len, self.num_heads, self.num_kv_heads
        require(T <= self.context, f"TRAIN_SEQ_LEN={T} is over CONTEXT={self.context}: raise CONTEXT")
        require(H == K, f"NUM_KV_HEADS={K}: GPT-2 has as many as NUM_HEADS={H}: set it to {H}")


def position_init(p: Tensor, config: Config, generator: torch.Generator):
    p.normal_(std=INIT_STD if config.init == "gpt2" else 1.0, generator=generator)


def token_init(p: Tensor, config: Config, generator: torch.Generator):
    """A tied embedding is initialized as the output projection."""
    init = matrix_init if config.tie_embeddings else position_init
    init(p, config, generator)


def matrix_init(p: Tensor, config: Config, generator: torch.Generator):
    if config.init == "gpt2":
        p.normal_(std=INIT_STD, generator=generator)
    else:
        train_gpt.uniform_init(p, config, generator)


def residual_init(p: Tensor, config: Config, generator: torch.Generator):
    """Each block adds to the stream twice. The scale keeps the variance of the sum independent of the depth."""
    matrix_init(p, config, generator)
    if config.init == "gpt2":
        p.mul_((2 * config.num_layers) ** -0.5)


def bias_init(p: Tensor, config: Config, generator: torch.Generator, fan_in_mult: float = 1.0):
    """Zeros for GPT-2. torch's bound is 1 / sqrt(inputs), as for the matrix."""
    bound = (fan_in_mult * config.model_dim) ** -0.5 if config.init == "torch" else 0.0
    p.uniform_(-bound, bound, generator=generator)  # a bound of 0 draws, too: recorded runs depend on that


def wide_bias_init(p: Tensor, config: Config, generator: torch.Generator):
    """For the matrix whose input is the hidden layer of the MLP."""
    bias_init(p, config, generator, config.mlp_mult)


class Attention(nn.Module):
    """Causal multi-head attention; one matrix computes queries, keys and values."""

    def __init__(self, config: Config, attend):
        super().__init__()
        D = config.model_dim
        self.heads = config.num_heads
        self.attend = attend
        self.c_attn = Linear(D, 3 * D)
        self.c_proj = Linear(D, D)

    def forward(self, x_BTD: Tensor) -> Tensor:
        parts = self.c_attn(x_BTD).chunk(3, dim=-1)
        q_BHTd, k_BHTd, v_BHTd = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.c_proj(self.attend(q_BHTd, k_BHTd, v_BHTd).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two matrices with GELU between them, in its tanh approximation."""

    def __init__(self, config: Config):
        super().__init__()
        D = config.model_dim
        hidden = round(config.mlp_mult * D)
        self.c_fc = Linear(D, hidden)
        self.c_proj = Linear(hidden, D)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x_BTD), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each with a LayerNorm before it and added to the fp32 residual stream."""

    def __init__(self, config: Config, attend, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.attn = Attention(config, attend)
        self.mlp = MLP(config)
        self.ln_1 = nn.LayerNorm(config.model_dim)
        self.ln_2 = nn.LayerNorm(config.model_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD).to(self.dtype))
        return x_BTD + self.mlp(self.ln_2(x_BTD).to(self.dtype))


class GPT2(train_gpt.Model):
    """Pre-norm transformer with learned positions and without a softcap on the logits.

    Precision is that of autocast: matmuls, attention and GELU in `dtype`; weights, residual stream, LayerNorm and loss
    in fp32.
    """

    PARAMETERS = {
        "tok_emb": ParameterRule(token_init, "embed"),
        "pos_emb": ParameterRule(position_init, "embed"),
        "lm_head": ParameterRule(matrix_init, "head"),
        "blocks.attn.c_attn": ParameterRule(matrix_init, "matrix"),
        "blocks.attn.c_attn.bias": ParameterRule(bias_init, "scalar", fp32=True),
        "blocks.attn.c_proj": ParameterRule(residual_init, "matrix"),
        "blocks.attn.c_proj.bias": ParameterRule(bias_init, "scalar", fp32=True),
        "blocks.mlp.c_fc": ParameterRule(matrix_init, "matrix"),
        "blocks.mlp.c_fc.bias": ParameterRule(bias_init, "scalar", fp32=True),
        "blocks.mlp.c_proj": ParameterRule(residual_init, "matrix"),
        "blocks.mlp.c_proj.bias": ParameterRule(wide_bias_init, "scalar", fp32=True),
        "blocks.ln_1": ParameterRule(1.0, "scalar", fp32=True),
        "blocks.ln_1.bias": ParameterRule(0.0, "scalar", fp32=True),
        "blocks.ln_2": ParameterRule(1.0, "scalar", fp32=True),
        "blocks.ln_2.bias": ParameterRule(0.0, "scalar", fp32=True),
        "ln_f": ParameterRule(1.0, "scalar", fp32=True),
        "ln_f.bias": ParameterRule(0.0, "scalar", fp32=True),
    }

    def __init__(self, config: Config, attend=train_gpt.grouped_attention, dtype: torch.dtype = torch.float32):
        super().__init__()
        D = config.model_dim
        self.dtype = dtype
        self.tok_emb = nn.Embedding(config.vocab_size, D)
        self.pos_emb = nn.Embedding(config.context, D)
        self.blocks = nn.ModuleList(Block(config, attend, dtype) for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(D)
        self.lm_head = None if config.tie_embeddings else Linear(D, config.vocab_size, bias=False)

    def prepare(self, config: Config, runtime):
        torch.set_float32_matmul_precision(config.matmul_precision)

    def features(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.tok_emb(tokens_BT) + self.pos_emb.weight[: tokens_BT.size(1)]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.ln_f(x_BTD).to(self.dtype)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """[B, T, V] in fp32."""
        return train_gpt.at_least_fp32(F.linear(x_BTD, self.output_weight()[1].to(x_BTD.dtype)))

    def optimizers(self, config: Config, runtime) -> list[torch.optim.Optimizer]:
        """One AdamW for all parameters, with weight decay on all of them: torch's defaults, as published."""
        options = {"betas": (config.beta1, config.beta2), "eps": config.adam_eps, "weight_decay": config.weight_decay}
        return [torch.optim.AdamW(self.parameters(), config.learning_rate, **options, fused=True)]

    def lr_scale(self, config: Config, step: int, progress: float) -> float:
        """The script's schedule after a linear warmup that starts at 1 / LR_WARMUP."""
        rise = (step + 1) / config.lr_warmup if config.lr_warmup else 1.0
        return min(rise, 1.0) * super().lr_scale(config, step, progress)
