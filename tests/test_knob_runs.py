"""Knobs in complete runs: graphs compiled before the clock starts, and the exported average of the weights. Resumed
runs, two ranks and scored artifacts with all knobs together: test_contract.py."""

from types import SimpleNamespace

import models
import pytest
import runs
import torch

import train_gpt
from train_gpt import Evaluator, Trainer

checkpoint = train_gpt.tool("checkpoint")


@pytest.fixture(autouse=True)
def all_kernels():
    """Enable all attention kernels again: a run pins torch's global switches."""
    yield
    for switch in ("flash", "cudnn", "mem_efficient", "math"):
        getattr(torch.backends.cuda, f"enable_{switch}_sdp")(True)


@pytest.fixture
def go(corpus, tmp_path):
    """Function: a short run with these knobs. Returns the contents of its folder."""
    return runs.starter(corpus, tmp_path)


@pytest.fixture
def raw_weights(monkeypatch):
    """The float64 weights before training and after each training step; the warm-up's are left out."""
    seen, step, warm_up = [], Trainer.step, Trainer.warm_up

    def now(model):
        seen.append({name: p.detach().double() for name, p in model.named_parameters()})

    def watched_step(self, *args):
        loss = step(self, *args)
        now(self.model)
        return loss

    def watched_warm_up(self, *args):
        warm_up(self, *args)
        seen.clear()
        now(self.model)

    monkeypatch.setattr(Trainer, "step", watched_step)
    monkeypatch.setattr(Trainer, "warm_up", watched_warm_up)
    return seen


# Compilation


@pytest.fixture
def graphs(monkeypatch):
    yield from runs.counted_graphs(monkeypatch)


# A model that changes during the run: from then on its second block runs, too.
STAGED = """
import train_gpt


class Config(train_gpt.Config):
    @classmethod
    def model_class(cls):
        return Staged


class Staged(train_gpt.GPT):
    graph_starts = (0.0, 0.5)
    late = True

    def advance(self, progress):
        self.late = progress >= 0.5

    def features(self, tokens_BT):
        rotate = self.positions.rotation(tokens_BT.size(1), self.dtype)
        x_BTD = x0_BTD = self.embed(tokens_BT)
        x_BTD = self.blocks[0](x_BTD, x0_BTD, rotate)
        y_BTD = self.blocks[1](x_BTD, x0_BTD, rotate)
        x_BTD = y_BTD if self.late else x_BTD + 0 * y_BTD
        return self.norm(x_BTD + self.skip_weights[0].to(x_BTD.dtype) * x0_BTD)
"""


@pytest.fixture
def stages(go, tmp_path, monkeypatch):
    """Records the model's state in each warm-up step, training step and validation; `go` makes a run."""
    seen, step, warm_up, score = SimpleNamespace(), Trainer.step, Trainer.warm_up, Evaluator.score
    seen.steps, seen.warm, seen.scores, seen.now, seen.step_seconds = [], [], [], 0.0, 0.0

    def watched_step(self, *args):
        seen.steps.append(self.model.late)
        seen.now += seen.step_seconds
        return step(self, *args)

    def watched_warm_up(self, *args):
        warm_up(self, *args)
        seen.warm, seen.steps = seen.steps, []

    def watched_score(self, model, *args, **options):
        seen.scores.append(model.late)
        return score(self, model, *args, **options)

    monkeypatch.setattr(Trainer, "step", watched_step)
    monkeypatch.setattr(Trainer, "warm_up", watched_warm_up)
    monkeypatch.setattr(Evaluator, "score", watched_score)
    (tmp_path / "staged.py").write_text(STAGED, encoding="utf-8")
    seen.go = lambda **knobs: go(MODEL_FILE=tmp_path / "staged.py", WARMUP_STEPS=2, **knobs)
    return seen


def test_a_model_advances_by_the_progress_of_the_steps(stages):
    run = stages.go(ITERATIONS=10, VAL_LOSS_EVERY=2)
    assert stages.steps == [False] * 5 + [True] * 5
    assert stages.warm == [False] * 2 + [True] * 2, "each graph that will run is warmed up"
    # Validations after 0, 2, 4, 6, 8 and 10 steps and of the artifact; the exported model is in its final state.
    assert stages.scores == [False, False, False, True, True, True, True]
    assert run.losses[0] > run.losses[-1]


# A tenth 1 s step would end at 10 s. A step that might not end in time is not started: with 6 s not even the first.
@pytest.mark.parametrize("step_seconds, clock, early, late", [(1.0, 10, 5, 4), (6.0, 5, 0, 0)])
def test_a_model_advances_by_the_progress_of_the_clock(stages, monkeypatch, step_seconds, clock, early, late):
    stages.step_seconds = step_seconds
    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: stages.now)
    stages.go(ITERATIONS=1000, MAX_WALLCLOCK_SECONDS=clock)
    assert stages.steps == [False] * early + [True] * late
    assert stages.scores == [True, True], "the model is exported as at the end"


def test_all_graphs_are_compiled_before_the_clock_starts(stages, graphs, monkeypatch):
    """Compiling during the run would cost training time."""
    before, warm_up = [], Trainer.warm_up

    def watched_warm_up(self, *args):
        warm_up(self, *args)
        before.append(len(graphs))

    monkeypatch.setattr(Trainer, "warm_up", watched_warm_up)
    stages.go(ITERATIONS=4, VAL_LOSS_EVERY=1, EVAL_STRIDE=12, EMA_DECAY=0.9, EMA_SHARE=0.7, GRAD_CLIP_NORM=0.3)
    assert before[0] >= 4, "of a training step and of a validation, early and late"
    assert len(graphs) == before[0], "something was compiled during the run"


def test_fitting_the_memory_compiles_nothing_but_what_the_training_uses(make_config, runtime, graphs):
    """A graph for inputs and targets that share a tensor is never used by a step, yet takes as long to compile."""
    trainer = models.build_trainer(make_config(), runtime)
    checkpoint.fit_memory(trainer)
    assert len(graphs) == 1
    trainer.step(1.0, 0.9)
    assert len(graphs) == 1


# The average


@pytest.mark.parametrize("decay, part", [(0, 1), (0.4, 1), (0.999, 0.6)])
def test_the_average_of_the_weights_is_exported(go, raw_weights, decay, part):
    """The average, or a mix of it with the last weights, is exported. Training is the same as without it."""
    run = go(EMA_DECAY=decay, EMA_SHARE=part, ITERATIONS=12, WARMUP_STEPS=2)
    assert len(raw_weights) == 13
    average = raw_weights[0]
    for t, weights in enumerate(raw_weights[1:]):
        share = min(decay, (t + 1) / (t + 10))
        average = {name: share * average[name] + (1 - share) * p for name, p in weights.items()}
    last = raw_weights[-1]
    exported = torch.load(run.path / "final_model.pt", weights_only=True)
    assert exported.keys() == average.keys()
    for name, tensor in exported.items():
        expected = part * average[name] + (1 - part) * last[name]
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: n + m)
        assert torch.equal(tensor.double(), last[name]) == (not decay) or name == "skip_weights", name
    if decay:
        plain = go(RUN_ID="plain", ITERATIONS=12)
        assert run.losses == plain.losses
        assert run.result["pre_quant_val_loss"] != plain.result["pre_quant_val_loss"]


# Reserving time for an export calibration


def test_the_warmdown_ends_where_the_calibration_begins(go, monkeypatch):
    """With a time limit, the steps leave time for the calibration, and the learning rate has decayed by then."""
    scales, plan = [], Trainer.plan

    def planned(self):
        self.reserve = 0.6  # as if measured
        decision = plan(self)
        scales.append(decision[0])
        return decision

    monkeypatch.setattr(Trainer, "plan", planned)
    run = go(ITERATIONS=10**6, MAX_WALLCLOCK_SECONDS=1.2, WARMDOWN_FRAC=1, WARMUP_STEPS=0, TRAIN_LOG_EVERY=0)
    assert run.result["seconds"]["training"] < 0.9 and scales[-1] < 0.1 and scales[0] <= 0.51
