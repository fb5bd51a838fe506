"""The FLOPs that the model says a training step takes, against those that torch counts while one runs."""

import pytest
import torch
from models import new_model
from oracle import counted_flops

import train_gpt
from train_gpt import Config

kernels = train_gpt.tool("kernels")

SHAPE = {
    "vocab_size": 56,
    "num_layers": 3,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "train_seq_len": 24,
    "train_batch_tokens": 24,
}


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"tie_embeddings": False},
        {"num_layers": 1},
        {"num_kv_heads": 4},
        {"num_kv_heads": 1},
        {"mlp_mult": 2.6},
        {"train_seq_len": 7},
    ],
    ids=str,
)
def test_flops_per_token_are_those_that_torch_counts(knobs):
    config = Config(**SHAPE | knobs)
    model = new_model(config, kernels.expanded_attention)
    assert kernels.flops_per_token(model, config.train_seq_len) == counted_flops(model, config)


def test_the_default_model_takes_what_its_parameters_and_its_attention_say():
    """Of 17.06 M parameters 17.04 M multiply; at a length of 4,096 attention takes more than twice as much as they."""
    config = Config()
    with torch.device("meta"):
        model = new_model(config)
    matrices = 1024 * 512 + 9 * (2 * 512 * 512 + 2 * 512 * 256 + 2 * 512 * 1024)
    assert kernels.flops_per_token(model, 4096) == 6 * matrices + 12 * 4096 * 512 * 9
