"""Recipes: each file is a valid configuration of the model it names, fits the size limit, and trains."""

import json

import models
import pytest
import torch
from conftest import ROOT

import train_gpt
from train_gpt import GPT, Config

check = train_gpt.tool("check")

FOLDER = ROOT / "records" / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.env"))
PARAMETERS = {"demo_cpu": 2_363_920, "frontier_sp8192": 35_945_605, "frontier_sp1024": 32_275_589}
SCRIPT, FRONTIER = {"train_gpt.py"}, {"train_gpt.py", "frontier.py", "score_first.py"}
CODER = FRONTIER | {"canonical.py", "coder.py"}
SOURCES = {
    **{"demo_cpu": SCRIPT, "reference_cpu": SCRIPT, "case_marks_cpu": FRONTIER},
    **{"frontier_cpu": FRONTIER | {"canonical.py"}, "frontier_sp1024": CODER, "frontier_sp8192": CODER},
}
# Smaller values for a one-second run. Those of the frontier apply to recipes that set the knob.
SMALL = """MODEL_DIM=32 TRAIN_SEQ_LEN=32 TRAIN_BATCH_TOKENS=64 VAL_BATCH_SIZE=256 VAL_TOKENS_LIMIT=200 ITERATIONS=2
    WARMUP_STEPS=1 MAX_WALLCLOCK_SECONDS=0"""
SMALL_WHERE_SET = (
    "ROPE_DIMS=2 CONTEXTS=8@0,16@0.3,32@0.6 EVAL_STRIDE=16 TTT_CHUNK=64 TTT_BATCH_TOKENS=64 GPTQ_BATCHES=2"
)


def load(name: str, **overrides) -> Config:
    return Config.load([str(FOLDER / f"{name}.env")], overrides)


def on_meta(config) -> train_gpt.Model:
    with torch.device("meta"):
        return config.model_class()(config)


def projected_size(config, model) -> int:
    coder = config.coder_class()(config)
    return coder.projected_size(model, check) or check.projected_bytes(coder, model)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_a_configuration_that_fits_the_limit(name):
    with models.no_siblings():
        config = load(name)
        sources = train_gpt.source_paths(config)
    assert set(sources) == SOURCES[name]
    model = on_meta(config)
    params = sum(p.numel() for p in model.parameters())
    assert params == PARAMETERS.get(name, params)
    projected = projected_size(config, model)
    code = sum(len(path.read_bytes()) for path in sources.values())
    assert projected + code < config.size_limit
    assert projected > 0.4 * params, "or the law is not applied"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_two_small_steps(name, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "INT8_MIN_NUMEL", 500)  # so that some tensors are quantized
    texts = train_gpt.read_env_file(FOLDER / f"{name}.env")
    knobs = models.knobs(SMALL) | {
        knob: value for knob, value in models.knobs(SMALL_WHERE_SET).items() if knob in texts
    }
    machine = models.machine_settings(corpus, LOG_DIR=tmp_path, RUN_ID="run", **knobs)
    values = machine | {"VOCAB_SIZE": (corpus / "vocab_size").read_text()}
    with models.no_siblings():
        assert models.call_main(values, FOLDER / f"{name}.env") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert result["steps"] == 2 == sum("train_loss" in line for line in lines) and result["val_loss"] > 0
    assert set(result["sources"]) == SOURCES[name]
    artifact = "final_model.rans.ptz" if "coder.py" in SOURCES[name] else "final_model.int8.ptz"
    assert (tmp_path / "run" / artifact).is_file()


def test_the_size_law_projects_the_published_artifact_of_the_reference():
    """15,839,491 bytes: a run of the defaults on 8xH100, seed 1339."""
    config = Config()
    assert projected_size(config, on_meta(config)) == pytest.approx(15_839_491, rel=0.01)
    assert type(on_meta(config)) is GPT


def test_the_frontier_without_its_two_gates_has_the_published_number_of_parameters():
    config = load("frontier_sp8192", ATTN_GATE="0", SMEAR_GATE="0")
    assert sum(p.numel() for p in on_meta(config).parameters()) == 35_944_536
