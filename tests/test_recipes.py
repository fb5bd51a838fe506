"""Recipes: each file is a valid configuration of the model that it says it is, and fits the limit."""

import pytest
import torch
from conftest import ROOT

import train_gpt
from train_gpt import GPT, Config

check = train_gpt.tool("check")

RECIPES = {"demo_cpu": 2_363_920, "frontier_sp8192": 35_945_605, "frontier_sp1024": 32_275_589}


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "records" / "recipes").glob("*.env")])
def test_a_recipe_is_a_configuration_that_fits_the_limit(name):
    config = Config.load([str(ROOT / "records" / "recipes" / f"{name}.env")], {})
    with torch.device("meta"):
        model = config.model_class()(config)
    params = sum(p.numel() for p in model.parameters())
    assert params == RECIPES.get(name, params)
    code = sum(len(path.read_bytes()) for path in train_gpt.source_paths(config).values())
    assert check.projected_bytes(config, model) + code < config.size_limit
    assert check.projected_bytes(config, model) > 0.4 * params, "or the law is not applied"


def test_the_size_law_projects_the_published_artifact_of_the_reference():
    """15,839,491 bytes: a run of the defaults on 8xH100, seed 1339."""
    with torch.device("meta"):
        model = GPT(Config())
    assert check.projected_bytes(Config(), model) == pytest.approx(15_839_491, rel=0.01)


def test_the_frontier_without_its_two_gates_has_the_published_number_of_parameters():
    config = Config.load(
        [str(ROOT / "records" / "recipes" / "frontier_sp8192.env")], {"ATTN_GATE": "0", "SMEAR_GATE": "0"}
    )
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(config).parameters()) == 35_944_536
