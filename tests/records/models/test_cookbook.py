"""The cookbook, records/models/README.md: its model files match its table, train, and reproduce their scores."""

import ast
import json
import math
import re
import sys

import models
import pytest
import torch

import train_gpt

README = (models.SCRIPT.parent / "records" / "models" / "README.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (?P<change>[^|]+) \| (?P<inside>\d), \+\d+ -\d+ \| (?P<own>\d), (?P<lines>\d+) \|", re.MULTILINE)
TABLE = {row["change"]: row for row in ROW.finditer(README)}
SECTIONS = [section.partition("\n```python\n") for section in README.split("\n### ")[1:]]
SHOWN = {heading: rest.partition("```\n")[0] for heading, _, rest in SECTIONS}
OTHERS = {}  # model files omitted from the README for lack of space

OTHERS["A cosine schedule"] = """\
import math

import train_gpt


class Config(train_gpt.Config):
    @classmethod
    def model_class(cls):
        return GPT


class GPT(train_gpt.GPT):
    def lr_scale(self, config: Config, step: int, progress: float) -> float:
        return config.lr_floor + (1 - config.lr_floor) * 0.5 * (1 + math.cos(math.pi * progress))
"""

OTHERS["Learned positions in place of RoPE"] = """\
import torch
from torch import nn

import train_gpt


class Config(train_gpt.Config):
    @classmethod
    def model_class(cls):
        return GPT


class Learned(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.train_seq_len, config.model_dim))

    def embed(self, x_BTD):
        return x_BTD + self.weight[: x_BTD.size(1)].to(x_BTD.dtype)

    def rotation(self, length: int, dtype: torch.dtype):
        return lambda x_BTHd: x_BTHd


class GPT(train_gpt.GPT):
    PARAMETERS = train_gpt.GPT.PARAMETERS | {"positions": train_gpt.ParameterRule(train_gpt.embedding_init, "embed")}
    positions_class = Learned
"""

OTHERS["LayerNorm in place of the RMS norm"] = """\
import torch.nn.functional as F
from torch import nn

import train_gpt
from train_gpt import ParameterRule


class Config(train_gpt.Config):
    @classmethod
    def model_class(cls):
        return GPT


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class GPT(train_gpt.GPT):
    PARAMETERS = train_gpt.GPT.PARAMETERS.copy()
    for name in ("blocks.attn_norm", "blocks.mlp_norm", "norm"):
        PARAMETERS[name] = ParameterRule(1.0, "scalar", fp32=True)
        PARAMETERS[f"{name}.bias"] = ParameterRule(0.0, "scalar", fp32=True)
    norm_class = LayerNorm
"""

OTHERS["Latent attention"] = """\
import train_gpt
from train_gpt import Linear, knob, rms_norm


class Config(train_gpt.Config):
    kv_latent: int = knob(64, "width of the latent of keys and values", 1, artifact=True)

    @classmethod
    def model_class(cls):
        return GPT


class LatentAttention(train_gpt.Attention):
    def __init__(self, config: Config, attend, layer: int):
        super().__init__(config, attend, layer)
        kv_dim = self.head_dim * config.num_kv_heads
        self.kv_down = Linear(config.model_dim, config.kv_latent, bias=False)
        self.c_k, self.c_v = (Linear(config.kv_latent, kv_dim, bias=False) for _ in range(2))

    def forward(self, x_BTD, rotate):
        latent = rms_norm(self.kv_down(x_BTD))
        projections = (self.c_q(x_BTD), self.c_k(latent), self.c_v(latent))
        q_BTHd, k_BTKd, v_BTKd = (x.unflatten(-1, (-1, self.head_dim)) for x in projections)
        q_BTHd = rotate(rms_norm(q_BTHd)) * self.q_gain.to(x_BTD.dtype)[:, None]
        k_BTKd = rotate(rms_norm(k_BTKd))
        y_BHTd = self.attend(q_BTHd.transpose(1, 2), k_BTKd.transpose(1, 2), v_BTKd.transpose(1, 2))
        return self.proj(y_BHTd.transpose(1, 2).flatten(2))


class GPT(train_gpt.GPT):
    PARAMETERS = train_gpt.GPT.PARAMETERS | {"blocks.attn.kv_down": train_gpt.GPT.PARAMETERS["blocks.attn.c_k"]}
    attention_class = LatentAttention
"""

OTHERS["A model of its own"] = """\
import torch
import torch.nn.functional as F
from torch import nn

import train_gpt
from train_gpt import Linear, ParameterRule, embedding_init, knob, rms_norm, uniform_init


class Config(train_gpt.Config):
    window: int = knob(4, "tokens that a convolution sees: the current one and those before it", 1, artifact=True)

    @classmethod
    def model_class(cls):
        return Convolutions


class Convolutions(train_gpt.Model):
    PARAMETERS = {
        "tok_emb": ParameterRule(embedding_init, "embed"),
        "layers": ParameterRule(uniform_init, "matrix"),
    }

    def __init__(self, config: Config, attend=None, dtype=torch.float32):
        super().__init__()
        D = config.model_dim
        self.dtype, self.window = dtype, config.window
        self.tok_emb = nn.Embedding(config.vocab_size, D)
        self.layers = nn.ModuleList(Linear(config.window * D, 2 * D, bias=False) for _ in range(config.num_layers))

    def features(self, tokens_BT):
        x_BTD = rms_norm(self.tok_emb(tokens_BT).to(self.dtype))
        for layer in self.layers:
            padded = F.pad(rms_norm(x_BTD), (0, 0, self.window - 1, 0))
            x_BTD = x_BTD + F.glu(layer(padded.unfold(1, self.window, 1).flatten(2)))
        return rms_norm(x_BTD)
"""

FILES = SHOWN | OTHERS


@pytest.fixture(autouse=True)
def imports_of_this_process(monkeypatch):
    """Undo what a model file adds to the module path before the next test."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_every_change_of_the_table_has_one_model_file():
    assert len(TABLE) == 10 and TABLE.keys() == FILES.keys() and not SHOWN.keys() & OTHERS.keys()
    assert README.count("```python\n") == len(SHOWN)


@pytest.mark.parametrize("change", FILES)
def test_the_table_counts_it(change):
    kinds = (ast.ClassDef, ast.FunctionDef, ast.Assign, ast.AnnAssign)
    definitions = [node for node in ast.parse(FILES[change]).body if isinstance(node, kinds)]
    row = TABLE[change]
    assert (len(definitions), FILES[change].count("\n")) == (int(row["own"]), int(row["lines"]))
    assert max(int(row["own"]), int(row["inside"])) <= 3


@pytest.mark.parametrize("change", FILES)
def test_it_trains_and_its_artifact_is_scored_again(change, corpus, tmp_path, capfd):
    path = tmp_path / "cookbook.py"
    path.write_text(FILES[change], encoding="utf-8")
    run = models.train_tiny(corpus, tmp_path, MODEL_FILE=path, ITERATIONS=2)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [step["train_loss"] for step in steps if "train_loss" in step]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    result = json.loads((run / "result.json").read_text())
    assert math.isfinite(result["val_bpb"]) and {*result["sources"]} == {"train_gpt.py", "cookbook.py"}

    config_class = train_gpt.load_model_file(str(path))
    config = config_class.load([], models.tiny_settings(corpus))
    coder = config.coder_class()(config)
    used = {type(part) for part in (config, coder, *models.new_model(config).modules())}
    of_the_file = vars(sys.modules[config_class.__module__]).values()
    assert used.issuperset(
        value for value in of_the_file if getattr(value, "__module__", "") == config_class.__module__
    )
    decoded = coder.decode((run / coder.file).read_bytes())
    trained = torch.load(run / "final_model.pt", weights_only=True)
    assert decoded.keys() == trained.keys()
    for name, tensor in trained.items():
        error = (decoded[name] - tensor).abs().max()
        assert decoded[name].shape == tensor.shape and error <= tensor.abs().max() / 127, name

    capfd.readouterr()
    values = models.machine_settings(corpus, MODE="eval", ARTIFACT=run / coder.file)  # it names its model file
    assert models.call_main(values) == 0
    exact = r"^final_\S+_exact .*$"
    (line,) = re.findall(exact, capfd.readouterr().out, re.MULTILINE)
    assert [line] == re.findall(exact, (run / "train.log").read_text(), re.MULTILINE)


def test_the_fields_of_a_step_are_in_the_log(corpus, tmp_path):
    path = tmp_path / "cookbook.py"
    path.write_text(FILES["Two more fields in the step log"], encoding="utf-8")
    run = models.train_tiny(corpus, tmp_path, MODEL_FILE=path, ITERATIONS=2, TRAIN_LOG_EVERY=1)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "train_loss" in step]
    assert [step["progress"] for step in steps] == [0.0, 0.5] and all(step["embedding_norm"] > 0 for step in steps)
    logged = re.findall(r" progress:(\S+) embedding_norm:(\S+)$", (run / "train.log").read_text(), re.MULTILINE)
    assert logged == [(f"{step['progress']:.4f}", f"{step['embedding_norm']:.4f}") for step in steps]
