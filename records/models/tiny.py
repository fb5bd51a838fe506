"""A model of its own in sixty lines: an MLP over each token and the mean of the tokens before it.

    MODEL_FILE=records/models/tiny.py python train_gpt.py records/recipes/demo_cpu.env

It adds two knobs, a table of parameters, an extra loss, an optimizer, a schedule and a metric. Everything else is the
script's: data, byte counts, checkpoints, export, score and result.json. README.md in this folder goes on from here.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from train_gpt import Linear, ParameterRule, embedding_init, knob, rms_norm, uniform_init


class Config(train_gpt.Config):
    hidden: int = knob(48, "channels of the MLP", 1, artifact=True)
    dropout: float = knob(0.1, "share of those channels that training drops", 0, 0.9)

    @classmethod
    def model_class(cls):
        return Tiny


class Tiny(train_gpt.Model):
    PARAMETERS = {
        "tok_emb": ParameterRule(embedding_init, "embed"),
        "fc": ParameterRule(uniform_init, "matrix"),
        "proj": ParameterRule(uniform_init, "matrix"),
        "scale": ParameterRule(1.0, "scalar", fp32=True),
    }

    def __init__(self, config: Config, attend=None, dtype=torch.float32):
        super().__init__()
        self.dtype = dtype
        self.dropout = nn.Dropout(config.dropout)
        self.tok_emb = nn.Embedding(config.vocab_size, config.model_dim)
        self.fc = Linear(2 * config.model_dim, config.hidden, bias=False)
        self.proj = Linear(config.hidden, config.model_dim, bias=False)
        self.scale = nn.Parameter(torch.empty(config.model_dim))

    def features(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = rms_norm(self.tok_emb(tokens_BT).to(self.dtype))
        count_T1 = torch.arange(1, x_BTD.size(1) + 1, device=x_BTD.device, dtype=x_BTD.dtype)[:, None]
        mean_BTD = x_BTD.cumsum(1) / count_T1
        hidden = F.gelu(self.fc(torch.cat([x_BTD, mean_BTD], dim=-1)))
        self.extra_loss = 0.1 * self.proj.weight.square().mean()  # trained, but neither logged nor scored
        return rms_norm(self.scale.to(x_BTD.dtype) * x_BTD + self.proj(self.dropout(hidden)))

    def optimizers(self, config: Config, runtime) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(self.parameters(), lr=config.scalar_lr)]

    def lr_scale(self, config: Config, step: int, progress: float) -> float:
        return 0.5 + 0.5 * math.cos(math.pi * progress)

    def metrics(self) -> dict[str, Tensor]:
        return {"scale_mean": self.scale.detach().mean()}
