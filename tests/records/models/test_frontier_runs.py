"""Techniques of records/models/frontier.py in whole runs: when the recurrence begins and what is compiled before, a
resumed run, two ranks, an artifact that needs to be told nothing, and the clock that GPTQ needs. Runs are made in this
process by main(), except those of several ranks."""

import re
from types import SimpleNamespace

import models
import pytest
import runs

import train_gpt
from train_gpt import Evaluator, Trainer

FrontierConfig, frontier = models.model_file("frontier")
kernels = train_gpt.tool("kernels")

EVERYTHING = {
    "NUM_LAYERS": 3,
    "MLP_SLOPE": 0.5,
    "MLP_MULT": 1.7,
    "ROPE_DIMS": 4,
    "LN_SCALE": 1,
    "XSA_LAYERS": 2,
    "ATTN_GATE": 1,
    "GATED_SKIPS": 1,
    "X0_MIX": 0,
    "PARALLEL_FROM": 2,
    "SMEAR_GATE": 1,
    "LOOP_LAYERS": "0-1",
    "LOOP_PASSES": 2,
    "LOOP_START": 0.5,
    "MUON_WEIGHT_DECAY": 0.1,
    "MUON_ROW_NORM": 1,
    "EMBED_WEIGHT_DECAY": 0.1,
    "LR_FLOOR": 0.1,
    "SCALAR_WEIGHT_DECAY": 0.1,
    "EMA_DECAY": 0.9,
    "EMA_SHARE": 0.7,
    "LOADER": "shuffle",
    "GRAD_CLIP_NORM": 0.3,
    "CODEC": "rans",
    "WEIGHT_BITS": 6,
    "EMBED_BITS": 7,
    "CLIP_ATTN": 13,
    "CLIP_MLP": 12,
    "CLIP_EMBED": 15,
    "GPTQ_BATCHES": 3,
}


@pytest.fixture
def go(corpus, tmp_path):
    """Function: a short run of the frontier with these knobs; what its folder holds."""
    return runs.starter(corpus, tmp_path, MODEL_FILE=models.FRONTIER)


# Depth recurrence


@pytest.fixture
def switch(monkeypatch):
    """The state of the switch in each step of the training and in each validation."""
    seen, step, warm_up, score = SimpleNamespace(), Trainer.step, Trainer.warm_up, Evaluator.score
    seen.steps, seen.warm, seen.scores = [], [], []

    def watched_step(self, *args):
        seen.steps.append(self.model.looping)
        return step(self, *args)

    def watched_warm_up(self, *args):
        warm_up(self, *args)
        seen.warm, seen.steps = seen.steps, []

    def watched_score(self, model, *args, **options):
        seen.scores.append(model.looping)
        return score(self, model, *args, **options)

    monkeypatch.setattr(Trainer, "step", watched_step)
    monkeypatch.setattr(Trainer, "warm_up", watched_warm_up)
    monkeypatch.setattr(Evaluator, "score", watched_score)
    return seen


@pytest.mark.parametrize("start, plain_steps", [(0, 0), (0.35, 4), (0.4, 4), (0.45, 5), (1, 10)])
def test_the_recurrence_begins_at_its_share_of_the_steps(go, switch, start, plain_steps):
    run = go(ITERATIONS=10, LOOP_LAYERS="0-1", LOOP_START=start, WARMUP_STEPS=2, VAL_LOSS_EVERY=2)
    assert switch.steps == [False] * plain_steps + [True] * (10 - plain_steps)
    assert switch.warm == [False] * 2 * (start > 0) + [True] * 2, "each graph that will run is warmed up"
    # Validations after 0, 2, 4, 6, 8 and 10 steps and of the artifact; the exported model always recurs.
    during, after = switch.scores[:5], switch.scores[5:]
    assert during == [2 * i >= plain_steps for i in range(5)] and after == [True, True]
    assert run.losses[0] > run.losses[-1]


def test_the_recurrence_begins_at_its_share_of_the_clock(go, switch, monkeypatch):
    now, step = [0.0], Trainer.step

    def timed(self, *args):
        now[0] += 1.0
        return step(self, *args)

    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Trainer, "step", timed)
    go(ITERATIONS=1000, MAX_WALLCLOCK_SECONDS=10, LOOP_LAYERS="1-1", LOOP_PASSES=2, LOOP_START=0.5, WARMUP_STEPS=2)
    assert switch.steps == [False] * 5 + [True] * 4 and switch.scores == [True, True]  # a tenth would end at 10 s


def test_without_the_recurrence_nothing_is_switched_and_warmed_up_twice(go, switch):
    go(ITERATIONS=4, WARMUP_STEPS=2)
    assert switch.steps == [False] * 4 and switch.warm == [False] * 2 and switch.scores == [False, False]


@pytest.fixture
def graphs(monkeypatch):
    yield from runs.counted_graphs(monkeypatch)


@pytest.mark.parametrize("learns", [{}, {"TTT_CHUNK": 64, "TTT_BATCH_TOKENS": 64}], ids=["fixed", "learns"])
def test_all_graphs_are_compiled_before_the_clock_starts(go, graphs, monkeypatch, learns):
    """Not at the switch, where a compilation would cost a part of the training time, nor in the final evaluation: its
    clock starts after Model.begin."""
    counts, warm_up, observe = [], Trainer.warm_up, frontier.GPT.observe

    def watched_warm_up(self, *args):
        warm_up(self, *args)
        counts.append(len(graphs))

    def watched_observe(self, tokens):
        counts.append(len(graphs))
        observe(self, tokens)

    monkeypatch.setattr(Trainer, "warm_up", watched_warm_up)
    monkeypatch.setattr(frontier.GPT, "observe", watched_observe)
    small = {"NUM_LAYERS": 2, "LOOP_LAYERS": "1-1", "ITERATIONS": 4, "WARMUP_STEPS": 1, "VAL_LOSS_EVERY": 1}
    go(**EVERYTHING | small | learns)
    in_training, *in_evaluation = counts
    assert in_training >= 4, "of a training step and of a validation, without and with the recurrence"
    more = 2 if learns else 0  # a batch of two windows, and a step of SGD in evaluation mode
    assert in_evaluation == [in_training + more] * (3 if learns else 0)
    assert len(graphs) == in_training + more, "something was compiled during the run"


# An artifact, a resumed run, ranks


@pytest.mark.parametrize("knobs", [{}, {"LOOP_START": 1}], ids=["begun", "never begun"])
def test_an_artifact_of_everything_is_scored_again_without_being_told(go, corpus, tmp_path, capsys, monkeypatch, knobs):
    """With the recurrence, even if it never began."""
    monkeypatch.setattr(train_gpt, "INT8_MIN_NUMEL", 500)  # so that small tensors are rounded
    runs.assert_no_defaults(EVERYTHING, FrontierConfig)
    run = go(**EVERYTHING | knobs)
    (artifact,) = run.path.glob("final_model.*.ptz")
    assert artifact.name == "final_model.rans.ptz"
    assert "\nfinal_int6_rans_roundtrip_exact val_loss:" in run.log
    told = models.artifact_knobs(FrontierConfig) - {"CODEC", "WEIGHT_BITS"}
    given = models.tiny_settings(corpus) | EVERYTHING | {"MODEL_FILE": models.FRONTIER}
    shape = {name: given[name] for name in [*told, "MODEL_FILE"] if name in given}
    runs.assert_scored_again(run, artifact, corpus, tmp_path, capsys, shape)


def test_a_run_of_everything_goes_on_as_if_it_had_not_been_stopped(go, monkeypatch):
    """Before and after the recurrence begins, at step 4 of 8."""
    runs.assert_goes_on_as_if_it_had_not_been_stopped(go, monkeypatch, EVERYTHING)


def test_two_ranks_train_everything_as_one_process(go, launch, corpus, tmp_path):
    """Before and after the recurrence begins."""
    knobs = EVERYTHING | {"MODEL_FILE": models.FRONTIER}
    runs.assert_two_ranks_train_as_one(go, launch, corpus, tmp_path, knobs)


def test_config_env_repeats_a_run_of_everything(go, tmp_path):
    """Also LOOP_LAYERS and CONTEXTS, which are texts."""
    knobs = EVERYTHING | {"CONTEXTS": "8@0,32@0.5", "SEED": 7}
    run = go(RUN_ID="first", **knobs)
    values = {"LOG_DIR": str(tmp_path / "logs"), "RUN_ID": "again"}
    assert models.call_main(values, run.path / "config.env") == 0
    again = runs.read_run(tmp_path / "logs" / "again")
    assert again.losses == run.losses and again.result["val_loss"] == run.result["val_loss"]


# The clock that GPTQ needs


def test_a_calibration_that_would_take_the_whole_clock_is_refused(corpus, tmp_path, capsys):
    knobs = {"MODEL_FILE": models.FRONTIER, "GPTQ_BATCHES": 10**6, "MAX_WALLCLOCK_SECONDS": 1}
    assert models.call_main(models.tiny_settings(corpus, LOG_DIR=tmp_path, **knobs)) == 2
    assert re.search(r"error: GPTQ_BATCHES=1000000 takes \d+ s, the whole clock: use fewer", capsys.readouterr().err)


def test_the_clock_is_reserved_for_the_calibration(go, monkeypatch):
    """By the time of two of its micro-batches, half as much again."""
    reserved, plan = [], Trainer.plan
    monkeypatch.setattr(Trainer, "plan", lambda self: reserved.append(self.reserve) or plan(self))
    go(GPTQ_BATCHES=2, ITERATIONS=2)
    assert len({*reserved}) == 1 and 0 < reserved[0] < 5
    reserved.clear()
    go(CODEC="rans", ITERATIONS=2, RUN_ID="plain")
    assert {*reserved} == {0.0}
