"""Schedule: end points and shape of progress, learning rate and its floor, momentum."""

import itertools

import pytest

from train_gpt import Model, UserError, muon_momentum, progress_at


def lr_scale(config, progress):
    return Model().lr_scale(config, 0, progress)


def scales(config, steps, step_seconds=0.0):
    """The rate at every step of a run whose steps all take as long."""
    times = [(step, progress_at(config, step, step * step_seconds)) for step in range(steps + 1)]
    return [lr_scale(config, progress) for _, progress in times]


def test_progress_counts_steps_without_a_clock(make_config):
    config = make_config(ITERATIONS=8)
    assert [progress_at(config, step, elapsed=1e9) for step in (0, 2, 4, 8, 9)] == [0, 0.25, 0.5, 1, 1]


def test_progress_is_the_further_of_steps_and_clock(make_config):
    config = make_config(ITERATIONS=100, MAX_WALLCLOCK_SECONDS=50)
    assert progress_at(config, 0, 0.0) == 0
    assert progress_at(config, 10, 25.0) == 0.5
    assert progress_at(config, 90, 25.0) == 0.9
    assert progress_at(config, 10, 50.0) == progress_at(config, 10, 60.0) == progress_at(config, 100, 1.0) == 1


@pytest.mark.parametrize("fraction", [0, 0.35, 1])
def test_rate_is_constant_then_linear_to_zero(make_config, fraction):
    config = make_config(WARMDOWN_FRAC=fraction, ITERATIONS=1000)
    for progress in [i / 1000 for i in range(1001)]:
        falling = fraction > 0 and progress > 1 - fraction
        expected = (1 - progress) / fraction if falling else 1.0
        assert lr_scale(config, progress) == pytest.approx(expected, abs=1e-12)
    assert lr_scale(config, 0.0) == 1.0
    assert lr_scale(config, 1.0) == (0.0 if fraction else 1.0)


@pytest.mark.parametrize("clock", [0, 30])
@pytest.mark.parametrize("warmdown", [{"WARMDOWN_FRAC": f} for f in (0, 0.01, 0.35, 1)])
def test_rate_stays_in_0_1_and_never_rises(make_config, warmdown, clock):
    config = make_config(ITERATIONS=40, MAX_WALLCLOCK_SECONDS=clock, **warmdown)
    for step_seconds in (0.1, 1.0, 5.0):
        values = scales(config, 40, step_seconds)
        assert all(0 <= value <= 1 for value in values)
        assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("floor", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("fraction", [0, 0.35, 1])
def test_the_rate_is_the_larger_of_the_warmdown_and_its_floor(make_config, floor, fraction):
    config = make_config(WARMDOWN_FRAC=fraction, LR_FLOOR=floor)
    for progress in [i / 200 for i in range(201)]:
        falling = fraction > 0 and progress > 1 - fraction
        expected = max((1 - progress) / fraction, floor) if falling else 1.0
        assert lr_scale(config, progress) == pytest.approx(expected, abs=1e-12)
    assert lr_scale(config, 1.0) == (floor if fraction else 1.0)


@pytest.mark.parametrize("floor", [-0.1, 1.1, "x"])
def test_a_floor_that_is_no_share_is_refused(make_config, floor):
    with pytest.raises(UserError, match="LR_FLOOR"):
        make_config(LR_FLOOR=floor)


def test_momentum_warms_linearly_and_stays(make_config):
    config = make_config(MUON_MOMENTUM=0.97, MUON_MOMENTUM_WARMUP_START=0.9, MUON_MOMENTUM_WARMUP_STEPS=100)
    assert muon_momentum(config, 0) == 0.9
    assert muon_momentum(config, 50) == pytest.approx(0.935, abs=1e-12)
    assert muon_momentum(config, 100) == muon_momentum(config, 101) == muon_momentum(config, 10**6) == 0.97
    values = [muon_momentum(config, step) for step in range(120)]
    assert values == sorted(values)


def test_momentum_without_warm_up_is_the_final_one_from_step_0(make_config):
    config = make_config(MUON_MOMENTUM=0.97, MUON_MOMENTUM_WARMUP_START=0.9, MUON_MOMENTUM_WARMUP_STEPS=0)
    assert [muon_momentum(config, step) for step in (0, 1, 2)] == [0.97] * 3
