"""Schedule: end points and shape of progress, learning rate and its floor, momentum."""

import itertools

import pytest

from train_gpt import Model, UserError, muon_momentum, progress_at


def test_progress_is_the_further_of_steps_and_clock(make_config):
    config = make_config(ITERATIONS=8)
    assert [progress_at(config, step, elapsed=1e9) for step in (0, 2, 4, 8, 9)] == [0, 0.25, 0.5, 1, 1], "no clock"
    config = make_config(ITERATIONS=100, MAX_WALLCLOCK_SECONDS=50)
    cases = {(0, 0.0): 0, (10, 25.0): 0.5, (90, 25.0): 0.9, (10, 50.0): 1, (10, 60.0): 1, (100, 1.0): 1}
    assert {case: progress_at(config, *case) for case in cases} == cases


@pytest.mark.parametrize("floor", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("fraction", [0, 0.01, 0.35, 1])
def test_the_rate_is_constant_then_linear_to_its_floor(make_config, floor, fraction):
    config = make_config(WARMDOWN_FRAC=fraction, LR_FLOOR=floor)
    rates = [Model().lr_scale(config, 0, i / 1000) for i in range(1001)]
    for i, rate in enumerate(rates):
        falling = fraction > 0 and i / 1000 > 1 - fraction
        assert rate == pytest.approx(max((1 - i / 1000) / fraction, floor) if falling else 1.0, abs=1e-12)
    assert rates[0] == 1.0 and rates[-1] == (floor if fraction else 1.0)
    assert all(a >= b for a, b in itertools.pairwise(rates))


@pytest.mark.parametrize("floor", [-0.1, 1.1, "x"])
def test_a_floor_that_is_no_share_is_refused(make_config, floor):
    with pytest.raises(UserError, match="LR_FLOOR"):
        make_config(LR_FLOOR=floor)


def test_momentum_warms_linearly_and_stays(make_config):
    config = make_config(MUON_MOMENTUM=0.97, MUON_MOMENTUM_WARMUP_START=0.9, MUON_MOMENTUM_WARMUP_STEPS=100)
    found = [muon_momentum(config, step) for step in (0, 50, 100, 101, 10**6)]
    assert found == pytest.approx([0.9, 0.935, 0.97, 0.97, 0.97], abs=1e-12)
    config = make_config(MUON_MOMENTUM=0.97, MUON_MOMENTUM_WARMUP_START=0.9, MUON_MOMENTUM_WARMUP_STEPS=0)
    assert [muon_momentum(config, step) for step in (0, 1, 2)] == [0.97] * 3
