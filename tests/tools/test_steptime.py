"""Step time on eight H100s: coefficients, errors and mixtures against independent computations."""

import math
from dataclasses import replace

import models
import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.optimize import nnls

import train_gpt
from train_gpt import Config

steptime = train_gpt.tool("steptime")
RECIPE = str(ROOT / "records" / "recipes" / "frontier_sp8192.env")


def build(config) -> train_gpt.Model:
    with torch.device("meta"):
        return config.model_class()(config)


def frontier(**knobs) -> Config:
    """The recipe with the model file that it names, which is relative to the repository."""
    file = {"MODEL_FILE": str(ROOT / "records" / "models" / "frontier.py")}
    return Config.load([RECIPE], file | {name: str(value) for name, value in knobs.items()})


def table(form) -> tuple[np.ndarray, np.ndarray]:
    """Features and times of the public runs, computed here from the shapes, without the tool's own functions."""
    rows = []
    for run in steptime.PUBLIC_RUNS:
        tokens, layer = run.tokens / 8, 2 * 512 * 512 + 2 * 512 * 256 + 2 * 512 * 512 * run.mlp
        work = 7 * run.layers * run.sequence * 512 * tokens / 1e12
        fa2 = run.attention == "flash"
        columns = {
            "constant": 1,
            "products": 6 * (run.layers * layer + 512 * run.vocabulary) * tokens / 1e12,
            "attention": work,
            "flash": work if fa2 else 0,
            "flash3": 0 if fa2 else work,
            "logits": tokens * run.vocabulary / 1e9,
            "activations": tokens * run.layers * 512 / 1e9,
        }
        rows.append([columns[name] for name in form])
    return np.array(rows), np.array([np.median(run.ms) for run in steptime.PUBLIC_RUNS])


@pytest.mark.parametrize("form", steptime.FORMS, ids=" ".join)
def test_coefficients_and_errors_are_those_of_another_least_squares(form):
    """scipy's non-negative least squares, with the same relative errors."""
    features, ms = table(form)
    fit = steptime.fit_form(form)
    np.testing.assert_allclose(fit.coefficients, nnls(features / ms[:, None], np.ones(len(ms)))[0], atol=1e-8)
    for row, time, error in zip(features, ms, fit.errors, strict=True):
        others = [i for i, other in enumerate(features) if not np.allclose(row, other)]
        found = nnls(features[others] / ms[others, None], np.ones(len(others)))[0]
        assert error == pytest.approx(row @ found / time - 1, abs=1e-8)


def test_the_form_taken_errs_least_and_little():
    errors = {form: np.abs(steptime.fit_form(form).errors).mean() for form in steptime.FORMS}
    fit = steptime.best_fit()
    assert errors[fit.form] == min(errors.values()) <= 0.08
    assert (fit.coefficients >= 0).all()


def test_a_fit_without_negative_coefficients_against_that_of_scipy():
    """Random columns, some of which would get a negative coefficient."""
    for seed in range(20):
        random = np.random.default_rng(seed)
        columns, target = random.normal(size=(9, 5)), random.normal(size=9)
        np.testing.assert_allclose(steptime.non_negative_fit(columns, target), nnls(columns, target)[0], atol=1e-9)


def test_a_public_run_and_the_same_model_here_have_the_same_features():
    """So the fit applies to this project's models: the defaults have 17,059,912 parameters; the frontier has loops."""
    looped = frontier(CONTEXTS="")
    for config, rows in ((Config(train_seq_len=2048), [(9, 2, 1024)]), (looped, [(11, 4, 8192), (17, 4, 8192)])):
        graphs = steptime.flops_by_graph(config, build(config))
        for flops, (layers, mlp, vocabulary) in zip(graphs, rows, strict=True):
            run = steptime.Run(0, layers, mlp, vocabulary, config.train_batch_tokens, 2048, "flash3", (1.0,))
            found = steptime.model_features(config, flops, 8, "flash3")
            assert found == pytest.approx(steptime.run_features(run)) and flops.layers(config) == layers


def test_parameters_in_the_table_are_those_of_the_shape():
    """Except for a bigram embedding, gates and similar: up to 6% more, and never fewer."""
    for run in steptime.PUBLIC_RUNS:
        if run.layers <= 11:
            config = Config(num_layers=run.layers, mlp_mult=float(run.mlp), vocab_size=run.vocabulary)
            params = sum(p.numel() for p in build(config).parameters())
            assert params <= run.params <= 1.06 * params, run
    assert sum(p.numel() for p in build(Config()).parameters()) == steptime.PUBLIC_RUNS[0].params


def ms(config, gpus=8) -> float:
    return steptime.predict(config, build(config), gpus)["ms_per_step"]


def test_more_work_takes_longer():
    config = Config(attention="flash")
    for name, values in {
        "train_batch_tokens": (2**19, 2**20, 2**21),
        "num_layers": (1, 2, 9, 12),
        "train_seq_len": (1024, 2048, 4096),
        "vocab_size": (1024, 8192, 50304),
        "model_dim": (512, 768),
        "mlp_mult": (1.0, 2.0, 4.0),
    }.items():
        base = replace(config, train_batch_tokens=2**19)
        times = [ms(replace(base, **{name: value})) for value in values]
        assert times == sorted(times) and len(set(times)) == len(times), name
    assert ms(config, gpus=4) > ms(config, gpus=8)
    assert ms(config) > ms(replace(config, attention="flash3")) == ms(replace(config, attention="auto"))


def test_defaults_and_frontier_beside_what_is_public():
    """Within 15% of the median of the nodes for the defaults, whose nodes differ by 40%; 5% for the frontier."""
    assert ms(Config(attention="flash")) == pytest.approx(68.25, rel=0.15)
    config = frontier()
    facts = steptime.predict(config, build(config), 8)
    times = facts["ms_per_step_from_progress"]
    assert list(times) == [f"{start:g}" for start in build(config).graph_starts]
    straight, looping = times["0.1"], times[f"{config.loop_start:g}"]
    assert straight == pytest.approx(102.0, rel=0.05) and looping == pytest.approx(150.3, rel=0.05)
    assert f"{straight} from progress 0.1 on, {looping} from progress {config.loop_start:g} on)" in facts["step_time"]
    assert facts["step_time_extrapolates"].startswith("no")
    assert facts["tokens_in_budget"] == facts["steps_in_budget"] * 786_432


@pytest.mark.parametrize("clock, iterations", [(600, 20_000), (600, 1000), (0, 500), (30, 300)])
@pytest.mark.parametrize("starts", [(0.0,), (0.0, 0.35), (0.0, 1.0), (0.0, 0.2, 0.7)], ids=str)
def test_the_mixture_over_the_run_is_that_of_a_run_step_by_step(clock, iterations, starts):
    """Progress is that of the script: by the clock or by the steps, whichever is further."""
    times = [0.1, 0.15, 0.3][: len(starts)]
    config = Config(max_wallclock_seconds=float(clock), iterations=iterations)
    step, elapsed = 0, 0.0
    while step < iterations:
        progress = train_gpt.progress_at(config, step, elapsed)
        time = max(time for start, time in zip(starts, times, strict=True) if progress >= start)
        if clock and elapsed + time > clock:
            break
        step, elapsed = step + 1, elapsed + time
    steps, seconds = steptime.steps_in_budget(config, starts, times)
    assert steps == pytest.approx(step, abs=3) and seconds == pytest.approx(elapsed, abs=0.6)


OUTSIDE = {
    "MODEL_DIM=768 (known: 512)": {"model_dim": 768},
    "VOCAB_SIZE=50304 (known: 1024": {"vocab_size": 50304},
    "3 layers (known: 9 to 17)": {"num_layers": 3},
    "TRAIN_SEQ_LEN=8192 (known: 2048": {"train_seq_len": 8192},
    "COMPILE=0": {"compile": "0"},
    "ATTENTION=math": {"attention": "math"},
    "keys and values 64 wide (known: 256)": {"num_kv_heads": 1},
}


def test_what_is_outside_the_table_is_named():
    """Layers of depth recurrence count as often as they run. A model on the seam is a different architecture."""

    def outside(config, gpus=8):
        return steptime.predict(config, build(config), gpus)["step_time_extrapolates"]

    config = frontier(LOOP_LAYERS="", CONTEXTS="")
    assert all(said in outside(replace(config, **knobs)) for said, knobs in OUTSIDE.items())
    assert "4 GPUs (known: 8)" in outside(config, 4)
    said = outside(frontier(LOOP_LAYERS="0-9", LOOP_PASSES=3))
    assert "31 layers (known: 9 to 17)" in said and "11 layers" not in said
    facts = steptime.predict(Config(), train_gpt.Model(), 8)
    assert "another architecture" in facts["step_time_extrapolates"] and math.isfinite(facts["ms_per_step"])


def test_check_predicts_where_it_cannot_measure(corpus, tmp_path, monkeypatch, call):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    knobs = {"MODE": "check", "TARGET_WORLD_SIZE": 8, "TRAIN_BATCH_TOKENS": 1024, "LOG_DIR": tmp_path / "logs"}
    code, out, _ = call(models.tiny_settings(corpus, **knobs))
    config = Config.load([], models.tiny_settings(corpus, **knobs))
    facts = steptime.predict(config, build(config), 8)
    assert code == 0
    for name, value in facts.items():
        assert f"\n{name}: {value}\n" in out
    error = np.abs(steptime.best_fit().errors).mean()
    assert f" ms on 8 H100, give or take {error:.1%} by leave-one-out; " in out
