"""GPT-2 (Radford et al. 2019) on the seam of train_gpt.py: what the ladders gpt2/ and precision/ train.

    python records/ladders/gpt2/model.py records/ladders/gpt2/d_init.env
    MODE=eval ARTIFACT=logs/<run_id>/final_model.int8.ptz python records/ladders/gpt2/model.py

The defaults of GPT2Config are the published setting: 124 M parameters, 50 steps of AdamW at a constant rate, the text
in its order. A recipe says what its rung changes. Suffixes: B batch, T time, D width, H heads, d width of a head.
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The script is beside this file, as in a run folder, or in a folder above it, as in the repository.
sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents if (folder / "train_gpt.py").is_file()][:1]

import train_gpt  # noqa: E402
from train_gpt import Linear, Row, arch, knob, require  # noqa: E402

INIT_STD = 0.02


def default(name: str, value):
    """The script's own knob with another default."""
    return dataclasses.field(default=value, metadata=train_gpt.Config.knobs()[name.upper()].metadata)


@dataclasses.dataclass(frozen=True)
class GPT2Config(train_gpt.Config):
    """Knobs of the script with GPT-2's defaults, then those that only this model has."""

    data_path: str = default("data_path", "./data/datasets/tiny_shakespeare_gpt2")
    tokenizer_path: str = default("tokenizer_path", "gpt2")
    vocab_size: int = default("vocab_size", 50_257)
    num_layers: int = default("num_layers", 12)
    model_dim: int = default("model_dim", 768)
    num_heads: int = default("num_heads", 12)
    num_kv_heads: int = default("num_kv_heads", 12)
    mlp_mult: float = default("mlp_mult", 4.0)
    train_seq_len: int = default("train_seq_len", 1024)
    train_batch_tokens: int = default("train_batch_tokens", 16_384)
    iterations: int = default("iterations", 50)
    max_wallclock_seconds: float = default("max_wallclock_seconds", 0.0)
    warmup_steps: int = default("warmup_steps", 0)
    warmdown_frac: float = default("warmdown_frac", 0.0)
    train_log_every: int = default("train_log_every", 1)
    val_loss_every: int = default("val_loss_every", 0)
    beta2: float = default("beta2", 0.999)

    context: int = arch(1024, "learned positions, at least TRAIN_SEQ_LEN", 1)
    init: str = knob("gpt2", "initial weights: GPT-2's, or those of torch's modules", choices=("gpt2", "torch"))
    learning_rate: float = knob(3e-4, "AdamW's rate of all parameters", 0)
    weight_decay: float = knob(0.01, "AdamW's decay of all parameters", 0)
    lr_warmup: int = knob(0, "steps in which the rate rises on a line to LEARNING_RATE", 0)
    matmul_precision: str = knob("highest", "of fp32 products; high: TF32 on a GPU", choices=("highest", "high"))

    @classmethod
    def model_class(cls) -> type["GPT2"]:
        return GPT2

    def check(self):
        super().check()
        T, H, K = self.train_seq_len, self.num_heads, self.num_kv_heads
        require(T <= self.context, f"TRAIN_SEQ_LEN={T} is over CONTEXT={self.context}: raise that")
        require(H == K, f"NUM_KV_HEADS={K}: GPT-2 has one for each of its NUM_HEADS={H}: set it to {H}")


def embedding_init(p: Tensor, config: GPT2Config, generator):
    p.normal_(std=INIT_STD if config.init == "gpt2" else 1.0, generator=generator)


def token_init(p: Tensor, config: GPT2Config, generator):
    """Tied, the matrix keeps what it was as output projection."""
    (matrix_init if config.tie_embeddings else embedding_init)(p, config, generator)


def matrix_init(p: Tensor, config: GPT2Config, generator):
    if config.init == "gpt2":
        p.normal_(std=INIT_STD, generator=generator)
    else:
        train_gpt.uniform_init(p, config, generator)


def residual_init(p: Tensor, config: GPT2Config, generator):
    """Each block adds to the stream twice: scaled so, the sum keeps its size whatever the depth."""
    matrix_init(p, config, generator)
    if config.init == "gpt2":
        p.mul_((2 * config.num_layers) ** -0.5)


def bias_init(p: Tensor, config: GPT2Config, generator, fan_in_mult: float = 1.0):
    """Zero; PyTorch's own is as wide as that of the matrix."""
    bound = (fan_in_mult * config.model_dim) ** -0.5 if config.init == "torch" else 0.0
    p.uniform_(-bound, bound, generator=generator)


def wide_bias_init(p: Tensor, config: GPT2Config, generator):
    bias_init(p, config, generator, config.mlp_mult)


class Attention(nn.Module):
    def __init__(self, config: GPT2Config, attend):
        super().__init__()
        D, self.heads, self.attend = config.model_dim, config.num_heads, attend
        self.c_attn, self.c_proj = Linear(D, 3 * D), Linear(D, D)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self.c_attn(x_BTD).chunk(3, dim=-1))
        return self.c_proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        D, hidden = config.model_dim, round(config.mlp_mult * config.model_dim)
        self.c_fc, self.c_proj = Linear(D, hidden), Linear(hidden, D)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x_BTD), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPT2Config, attend, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.attn, self.mlp = dtype, Attention(config, attend), MLP(config)
        self.ln_1, self.ln_2 = nn.LayerNorm(config.model_dim), nn.LayerNorm(config.model_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD).to(self.dtype))
        return x_BTD + self.mlp(self.ln_2(x_BTD).to(self.dtype))


class GPT2(train_gpt.Model):
    """Precision is that of autocast: products, attention and GELU in `dtype`; weights, residual stream, LayerNorm and
    loss in fp32."""

    PARAMETERS = {
        "tok_emb": Row(token_init, "embed", bits="embed_bits"),
        "pos_emb": Row(embedding_init, "embed", bits="embed_bits"),
        "lm_head": Row(matrix_init, "head"),
    }
    for part in ("blocks.ln_1", "blocks.ln_2", "ln_f"):
        PARAMETERS[part], PARAMETERS[f"{part}.bias"] = Row(1.0, "scalar", fp32=True), Row(0.0, "scalar", fp32=True)
    for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        weight = Row(residual_init if part.endswith("proj") else matrix_init, "scalar", part.split(".")[0])
        PARAMETERS[f"blocks.{part}"] = weight
        PARAMETERS[f"blocks.{part}.bias"] = weight._replace(init=bias_init, fp32=True)
    PARAMETERS["blocks.mlp.c_proj.bias"] = weight._replace(init=wide_bias_init, fp32=True)

    def __init__(self, config: GPT2Config, attend=train_gpt.grouped_attention, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.set_float32_matmul_precision(config.matmul_precision)
        D, self.dtype = config.model_dim, dtype
        self.tok_emb, self.pos_emb = nn.Embedding(config.vocab_size, D), nn.Embedding(config.context, D)
        self.blocks = nn.ModuleList(Block(config, attend, dtype) for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(D)
        self.lm_head = None if config.tie_embeddings else Linear(D, config.vocab_size, bias=False)
        self.init_weights(config)

    def features(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.tok_emb(tokens_BT) + self.pos_emb.weight[: tokens_BT.size(1)]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.ln_f(x_BTD).to(self.dtype)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Without the script's soft cap."""
        return train_gpt.at_least_fp32(F.linear(x_BTD, self.output_weight()[1].to(x_BTD.dtype)))

    def optimizers(self, config: GPT2Config, runtime) -> list[torch.optim.Optimizer]:
        options = {"betas": (config.beta1, config.beta2), "eps": config.adam_eps, "weight_decay": config.weight_decay}
        return [torch.optim.AdamW(self.parameters(), config.learning_rate, **options, fused=True)]

    def lr_scale(self, config: GPT2Config, step: int, progress: float) -> float:
        rise = (step + 1) / config.lr_warmup if config.lr_warmup else 1.0
        return min(rise, 1.0) * super().lr_scale(config, step, progress)

    def flops_per_token(self, seq_len: int) -> int:
        """The output projection multiplies, tied or not; attention by the whole square, 12 T D a block."""
        weights = self.output_weight()[1].numel()
        weights += sum(m.weight.numel() for m in self.blocks.modules() if isinstance(m, Linear))
        return 6 * weights + 12 * seq_len * self.ln_f.weight.numel() * len(self.blocks)


if __name__ == "__main__":
    sys.exit(train_gpt.main(config_class=GPT2Config))
