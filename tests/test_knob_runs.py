"""Knobs in whole runs: graphs that are compiled before the clock starts, the average of the weights that is exported, a
resumed run, two ranks, and an artifact that needs to be told nothing. Runs are made in this process by main(), except
those of several ranks."""

import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
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


def read_run(path: Path):
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    result = path / "result.json"
    return SimpleNamespace(
        path=path,
        log=(path / "train.log").read_text(),
        losses=[m["train_loss"] for m in metrics if "train_loss" in m],
        result=json.loads(result.read_text()) if result.is_file() else None,
    )


@pytest.fixture
def go(corpus, tmp_path):
    """Function: a short run with these knobs; the exit code and what its folder holds."""

    def start(code=0, **overrides):
        values = models.tiny_settings(corpus, **{"LOG_DIR": tmp_path / "logs", "VAL_TOKENS_LIMIT": 200} | overrides)
        assert models.call_main(values) == code
        return read_run(tmp_path / "logs" / values["RUN_ID"])

    return start


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
    """The graphs that were made of the model, in order; they run as they are."""
    made, compile_model = [], torch.compile

    def backend(graph, examples):
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(train_gpt.torch, "compile", lambda model, **how: compile_model(model, backend=backend, **how))
    monkeypatch.setattr(kernels, "choose_compile", lambda config, runtime: (True, "counted"))
    yield made
    torch._dynamo.reset()


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


def score_again(corpus, folder, artifact, capsys, **knobs) -> list[str]:
    """Loss and bits per byte that MODE=eval prints."""
    values = models.machine_settings(
        corpus, MODE="eval", ARTIFACT=artifact, LOG_DIR=folder, VAL_TOKENS_LIMIT=200, **knobs
    )
    capsys.readouterr()
    assert models.call_main(values) == 0
    (found,) = re.findall(r"^final_\w+_exact val_loss:(\S+) val_bpb:(\S+)", capsys.readouterr().out, re.MULTILINE)
    return list(found)


def test_an_artifact_of_everything_is_scored_again_without_being_told(go, corpus, tmp_path, capsys, monkeypatch):
    """The final validation sees what is exported: the average."""
    monkeypatch.setattr(train_gpt, "INT8_MIN_NUMEL", 500)  # so that small tensors are rounded
    defaults = {name: field.default for name, field in train_gpt.Config.knobs().items()}
    assert all(value != defaults[name] for name, value in EVERYTHING.items()), "a default would prove nothing"
    run = go(**EVERYTHING)
    artifact = run.path / "final_model.int8.ptz"
    assert run.result["val_loss"] != run.result["pre_quant_val_loss"]
    again = score_again(corpus, tmp_path / "again", artifact, capsys)
    assert again == [f"{run.result[key]:.8f}" for key in ("val_loss", "val_bpb")]
    given = models.tiny_settings(corpus) | EVERYTHING
    shape = {name: given[name] for name in models.artifact_knobs() if name in given}
    again = score_again(corpus, tmp_path / "again", run.path / "final_model.pt", capsys, **shape)
    assert again == [f"{run.result[key]:.8f}" for key in ("pre_quant_val_loss", "pre_quant_val_bpb")]
    values = models.machine_settings(corpus, MODE="sample", ARTIFACT=artifact, LOG_DIR=tmp_path, SAMPLE_PROMPT="the")
    assert models.call_main(values | {"SAMPLE_TOKENS": "8"}) == 0


def test_a_run_of_everything_goes_on_as_if_it_had_not_been_stopped(go, monkeypatch):
    """Early and late, twice in one run."""
    monkeypatch.setattr(train_gpt, "INT8_MIN_NUMEL", 500)
    knobs = EVERYTHING | {"ITERATIONS": 8, "VAL_LOSS_EVERY": 3}
    whole, step, cuts = go(RUN_ID="whole", **knobs), Trainer.step, [2, 6]

    def disturbed(self, *args):
        if self.checkpoints.in_training and cuts and self.steps + 1 == cuts[0]:
            cuts.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(Trainer, "step", disturbed)
    for _ in range(2):
        go(RUN_ID="cut", code=143, **knobs)
    run = go(RUN_ID="cut", **knobs)
    assert run.result["resumed_at"] == [2, 6] and run.losses == whole.losses
    for name in ("val_loss", "val_bpb", "pre_quant_val_loss", "sha256_artifact"):
        assert run.result[name] == whole.result[name], name
    one, other = (torch.load(r.path / "final_model.pt", weights_only=True) for r in (run, whole))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_two_ranks_train_everything_as_one_process(go, launch, corpus, tmp_path):
    """The reduction over ranks waits for the gradient of every parameter."""
    values = models.tiny_settings(
        corpus,
        **EVERYTHING | {"LOG_DIR": tmp_path / "logs", "ITERATIONS": 6, "WARMUP_STEPS": 1, "VAL_TOKENS_LIMIT": 200},
    )
    done = launch(ranks=2, **values | {"RUN_ID": "two"})
    assert done.returncode == 0, done.stderr
    two, one = read_run(tmp_path / "logs" / "two"), go(RUN_ID="one", **EVERYTHING | {"ITERATIONS": 6})
    assert len(two.losses) == 6 and two.losses == pytest.approx(one.losses, abs=1e-4)
    for name in ("val_loss", "val_bpb", "pre_quant_val_loss"):
        assert two.result[name] == pytest.approx(one.result[name], abs=1e-4), name


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
