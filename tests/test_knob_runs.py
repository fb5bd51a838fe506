"""Knobs in whole runs: graphs that are compiled before the clock starts, the average of the weights that is exported, a
resumed run, two ranks, and an artifact that needs to be told nothing. Runs are made in this process by main(), except
those of several ranks."""

from types import SimpleNamespace

import models
import pytest
import runs
import torch

import train_gpt
from train_gpt import Evaluator, Trainer

kernels = train_gpt.tool("kernels")

checkpoint = train_gpt.tool("checkpoint")

EVERYTHING = {
    "NUM_LAYERS": 3,
    "MLP_MULT": 1.7,
    "ROPE_BASE": 900,
    "LOGIT_SOFTCAP": 25,
    "TIE_EMBEDDINGS": 0,
    "EVAL_STRIDE": 12,
    "MUON_WEIGHT_DECAY": 0.1,
    "EMBED_WEIGHT_DECAY": 0.1,
    "LR_FLOOR": 0.1,
    "SCALAR_WEIGHT_DECAY": 0.1,
    "EMA_DECAY": 0.9,
    "EMA_SHARE": 0.7,
    "LOADER": "shuffle",
    "GRAD_CLIP_NORM": 0.3,
}


@pytest.fixture(autouse=True)
def all_kernels():
    """A run pins torch's global attention switches: the tests after it need all kernels again."""
    yield
    for switch in ("flash", "cudnn", "mem_efficient", "math"):
        getattr(torch.backends.cuda, f"enable_{switch}_sdp")(True)


@pytest.fixture
def go(corpus, tmp_path):
    """Function: a short run with these knobs; what its folder holds."""
    return runs.starter(corpus, tmp_path)


@pytest.fixture
def raw_weights(monkeypatch):
    """The weights after each step of the training, float64, those at its start first; the warm-up's are left out."""
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


# A model that changes in the middle of the run: from then on its second block runs, too.
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
def staged(tmp_path):
    (tmp_path / "staged.py").write_text(STAGED, encoding="utf-8")
    return tmp_path / "staged.py"


@pytest.fixture
def stages(monkeypatch):
    """What the model is in each step of the training, of the warm-up, and in each validation."""
    seen, step, warm_up, score = SimpleNamespace(), Trainer.step, Trainer.warm_up, Evaluator.score
    seen.steps, seen.warm, seen.scores = [], [], []

    def watched_step(self, *args):
        seen.steps.append(self.model.late)
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
    return seen


def test_a_model_advances_by_the_progress_of_the_steps(go, staged, stages):
    run = go(MODEL_FILE=staged, ITERATIONS=10, WARMUP_STEPS=2, VAL_LOSS_EVERY=2)
    assert stages.steps == [False] * 5 + [True] * 5
    assert stages.warm == [False] * 2 + [True] * 2, "each graph that will run is warmed up"
    # Validations after 0, 2, 4, 6, 8 and 10 steps and of the artifact; the exported model is as at the end.
    assert stages.scores == [False, False, False, True, True, True, True]
    assert run.losses[0] > run.losses[-1]


def test_a_model_advances_by_the_progress_of_the_clock(go, staged, stages, monkeypatch):
    now, step = [0.0], Trainer.step

    def timed(self, *args):
        now[0] += 1.0
        return step(self, *args)

    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Trainer, "step", timed)
    go(MODEL_FILE=staged, ITERATIONS=1000, MAX_WALLCLOCK_SECONDS=10, WARMUP_STEPS=2)
    assert stages.steps == [False] * 5 + [True] * 4 and stages.scores == [True, True]  # a tenth would end at 10 s


def test_a_run_that_the_clock_ends_early_exports_the_model_as_at_the_end(go, staged, stages, monkeypatch):
    """A step that might not end in time is not begun: here not even the first, at a progress of 0."""
    now, step = [0.0], Trainer.step

    def timed(self, *args):
        now[0] += 6.0
        return step(self, *args)

    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Trainer, "step", timed)
    go(MODEL_FILE=staged, ITERATIONS=1000, MAX_WALLCLOCK_SECONDS=5, WARMUP_STEPS=2)
    assert stages.steps == [] and stages.scores == [True, True]


def test_all_graphs_are_compiled_before_the_clock_starts(go, staged, graphs, monkeypatch):
    """Not in the middle of the run, where a compilation would cost a part of the training time."""
    before, warm_up = [], Trainer.warm_up

    def watched_warm_up(self, *args):
        warm_up(self, *args)
        before.append(len(graphs))

    monkeypatch.setattr(Trainer, "warm_up", watched_warm_up)
    knobs = EVERYTHING | {"NUM_LAYERS": 2, "ITERATIONS": 4, "WARMUP_STEPS": 1, "VAL_LOSS_EVERY": 1}
    go(MODEL_FILE=staged, **knobs)
    assert before[0] >= 4, "of a training step and of a validation, early and late"
    assert len(graphs) == before[0], "something was compiled during the run"


def test_fitting_the_memory_compiles_nothing_but_what_the_training_uses(make_config, runtime, graphs):
    """A graph for inputs and targets that are one tensor is of no use to any step, and takes a GPU as long as any."""
    trainer = models.build_trainer(make_config(), runtime)
    checkpoint.fit_memory(trainer)
    assert len(graphs) == 1
    trainer.step(1.0, 0.9)
    assert len(graphs) == 1


# The average


@pytest.mark.parametrize("decay, part", [(0.4, 1), (0.999, 1), (0.999, 0.6)])
def test_the_average_of_the_weights_is_exported(go, raw_weights, decay, part):
    """Or so much of it, and for the rest the last weights."""
    run = go(EMA_DECAY=decay, EMA_SHARE=part, ITERATIONS=12, WARMUP_STEPS=2)
    assert len(raw_weights) == 13
    average = raw_weights[0]
    for t, weights in enumerate(raw_weights[1:]):
        share = min(decay, (t + 1) / (t + 10))
        average = {name: share * average[name] + (1 - share) * p for name, p in weights.items()}
    average = {name: part * tensor + (1 - part) * raw_weights[-1][name] for name, tensor in average.items()}
    exported = torch.load(run.path / "final_model.pt", weights_only=True)
    assert exported.keys() == average.keys()
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor.double(), average[name], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: n + m)
        assert not torch.equal(tensor.double(), raw_weights[-1][name]) or name == "skip_weights", name


def test_without_a_decay_the_last_weights_are_exported(go, raw_weights):
    run = go()
    exported = torch.load(run.path / "final_model.pt", weights_only=True)
    assert all(torch.equal(tensor.double(), raw_weights[-1][name]) for name, tensor in exported.items())


def test_the_average_leaves_the_training_alone(go):
    plain, averaged = go(RUN_ID="plain"), go(RUN_ID="averaged", EMA_DECAY=0.9, WARMUP_STEPS=3)
    assert averaged.losses == plain.losses
    assert averaged.result["pre_quant_val_loss"] != plain.result["pre_quant_val_loss"]


@pytest.mark.parametrize(
    "name, value",
    [
        ("EMA_DECAY", -0.1),
        ("EMA_DECAY", 1.1),
        ("EMA_DECAY", "x"),
        ("EMA_SHARE", -0.1),
        ("EMA_SHARE", 1.1),
        ("MUON_WEIGHT_DECAY", -1),
        ("MUON_WEIGHT_DECAY", "x"),
        ("EMBED_WEIGHT_DECAY", -1),
        ("SCALAR_WEIGHT_DECAY", -1),
    ],
)
def test_bad_values_are_user_errors_that_name_the_knob(make_config, name, value):
    with pytest.raises(train_gpt.UserError, match=name):
        make_config(**{name: value})


# An artifact, a resumed run, ranks


def test_an_artifact_of_everything_is_scored_again_without_being_told(go, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_gpt, "INT8_MIN_NUMEL", 500)  # so that small tensors are rounded
    runs.assert_no_defaults(EVERYTHING, train_gpt.Config)
    run = go(**EVERYTHING)
    given = models.tiny_settings(corpus) | EVERYTHING
    shape = {name: given[name] for name in models.artifact_knobs() if name in given}
    runs.assert_scored_again(run, run.path / "final_model.int8.ptz", corpus, tmp_path, capsys, shape)


def test_a_run_of_everything_goes_on_as_if_it_had_not_been_stopped(go, monkeypatch):
    runs.assert_goes_on_as_if_it_had_not_been_stopped(go, monkeypatch, EVERYTHING)


def test_two_ranks_train_everything_as_one_process(go, launch, corpus, tmp_path):
    runs.assert_two_ranks_train_as_one(go, launch, corpus, tmp_path, EVERYTHING)


# The clock that a calibration of the export needs


def test_the_warmdown_ends_where_the_calibration_begins(go, monkeypatch):
    """Under a clock the steps leave time for the calibration, and the rate has come down by then."""
    scales, plan = [], Trainer.plan

    def planned(self):
        self.reserve = 0.6  # as if measured
        decision = plan(self)
        scales.append(decision[0])
        return decision

    monkeypatch.setattr(Trainer, "plan", planned)
    run = go(ITERATIONS=10**6, MAX_WALLCLOCK_SECONDS=1.2, WARMDOWN_FRAC=1, WARMUP_STEPS=0, TRAIN_LOG_EVERY=0)
    assert run.result["seconds"]["training"] < 0.9 and scales[-1] < 0.1 and scales[0] <= 0.51
