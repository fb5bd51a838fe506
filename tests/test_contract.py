"""Tests every model of the repository against the seam's contract: see contract.py."""

import contract
import models
import oracle
import pytest
import runs

CASES = pytest.mark.parametrize("case", contract.MODELS.values(), ids=contract.MODELS)
ON_TWO_RANKS = {name: case for name, case in contract.MODELS.items() if case.ranks}


@pytest.fixture(autouse=True)
def no_other_model_file():
    with models.fresh_model_files():
        yield


@CASES
def test_parameters_are_initialized_by_rules_and_trained_by_one_group(corpus, case):
    oracle.assert_parameters(contract.config_of(corpus, case, **case.exact))


@CASES
def test_it_is_causal(corpus, case):
    config = contract.config_of(corpus, case)
    oracle.assert_causal(config, rounding=case.rounding)
    oracle.assert_no_gradient_from_the_future(config)


@CASES
def test_it_is_one_graph(corpus, case):
    oracle.assert_one_graph(contract.config_of(corpus, case, **case.exact))


@CASES
def test_bf16_is_close_to_fp32(corpus, case):
    oracle.assert_bf16_is_close(contract.config_of(corpus, case, **case.exact | case.smooth))


@CASES
def test_flops_are_those_that_torch_counts(corpus, case):
    oracle.assert_flops(contract.config_of(corpus, case, **case.counted))


@CASES
def test_it_is_resumed_bit_for_bit_and_its_artifact_is_scored_again(corpus, tmp_path, capsys, monkeypatch, case):
    contract.assert_life(case, corpus, tmp_path, capsys, monkeypatch)


@pytest.mark.parametrize("case", ON_TWO_RANKS.values(), ids=ON_TWO_RANKS)
def test_two_ranks_train_as_one(corpus, tmp_path, launch, case):
    knobs = case.knobs | case.exact | {"MODEL_FILE": case.file}
    runs.assert_two_ranks_train_as_one(runs.starter(corpus, tmp_path), launch, corpus, tmp_path, knobs)


@pytest.mark.parametrize("name", ["gpt", "frontier"])
def test_no_knob_is_at_its_default(corpus, name):
    """A knob at its default would test nothing."""
    case = contract.MODELS[name]
    runs.assert_no_defaults(case.knobs, type(contract.config_of(corpus, case)))
