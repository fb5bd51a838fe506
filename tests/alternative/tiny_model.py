"""A model of one's own, in a file of its own: an MLP over each token and the mean of its past. It brings knobs, a table
of parameters, dropout, an auxiliary loss, AdamW alone and a cosine schedule; all else is the trainer's.

    python tests/alternative/tiny_model.py FILE.env
"""

import dataclasses
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

places = [folder for folder in Path(__file__).resolve().parents if (folder / "train_gpt.py").is_file()]
sys.path.insert(0, str(places[0]))  # beside this file, or above it

import train_gpt  # noqa: E402
from train_gpt import Linear, Row, embedding_init, uniform_init  # noqa: E402


@dataclasses.dataclass(frozen=True)
class TinyConfig(train_gpt.Config):
    hidden: int = train_gpt.knob(48, "channels of the MLP", 1, arch=True)
    dropout: float = train_gpt.knob(0.1, "share of them that training leaves out", 0, 0.9)

    @classmethod
    def model_class(cls):
        return Tiny


class Tiny(train_gpt.Model):
    PARAMETERS = {
        "tok_emb": Row(embedding_init, "embed", bits="embed_bits"),
        "fc": Row(uniform_init, "matrix", "mlp"),
        "proj": Row(uniform_init, "matrix", "mlp"),
        "scale": Row(1.0, "scalar", fp32=True),
    }

    def __init__(self, config, attend=None, dtype=torch.float32):
        super().__init__()
        self.dtype, self.dropout = dtype, nn.Dropout(config.dropout)
        self.tok_emb = nn.Embedding(config.vocab_size, config.model_dim)
        self.fc = Linear(2 * config.model_dim, config.hidden, bias=False)
        self.proj = Linear(config.hidden, config.model_dim, bias=False)
        self.scale = nn.Parameter(torch.empty(config.model_dim))
        self.init_weights(config)

    def features(self, tokens_BT):
        x = train_gpt.rms_norm(self.tok_emb(tokens_BT).to(self.dtype))
        count = torch.arange(1, x.size(1) + 1, device=x.device, dtype=x.dtype)[:, None]
        hidden = F.gelu(self.fc(torch.cat([x, x.cumsum(1) / count], dim=-1)))
        return train_gpt.rms_norm(self.scale.to(x.dtype) * x + self.proj(self.dropout(hidden)))

    def forward(self, tokens_BT, targets_BT=None):
        output = super().forward(tokens_BT, targets_BT)
        scored_only = targets_BT is None or not self.training
        return output if scored_only else (output, 0.1 * self.proj.weight.square().mean())

    def optimizers(self, config, runtime):
        return [torch.optim.AdamW(self.parameters(), lr=config.scalar_lr)]

    def lr_scale(self, config, step, progress):
        return 0.5 + 0.5 * math.cos(math.pi * progress)


if __name__ == "__main__":
    sys.exit(train_gpt.main(config_class=TinyConfig))
