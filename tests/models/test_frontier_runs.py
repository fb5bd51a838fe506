"""Techniques of records/models/frontier.py in whole runs: when the recurrence begins and what is compiled before, a
resumed run, two ranks, an artifact that needs to be told nothing, and the clock that GPTQ needs. Runs are made in this
process by main(), except those of several ranks."""

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
    """Function: a short run of the frontier with these knobs; the exit code and what its folder holds."""

    def start(code=0, **overrides):
        base = {"MODEL_FILE": models.FRONTIER, "LOG_DIR": tmp_path / "logs", "VAL_TOKENS_LIMIT": 200}
        values = models.tiny_settings(corpus, **base | overrides)
        assert models.call_main(values) == code
        return read_run(tmp_path / "logs" / values["RUN_ID"])

    return start


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
    """The final validation sees what is exported: the average, and with the recurrence, even if it never began."""
    monkeypatch.setattr(train_gpt, "INT8_MIN_NUMEL", 500)  # so that small tensors are rounded
    defaults = {name: field.default for name, field in FrontierConfig.knobs().items()}
    assert all(value != defaults[name] for name, value in EVERYTHING.items()), "a default would prove nothing"
    for name, knobs in {"begun": {}, "never": {"LOOP_START": 1}}.items():
        run = go(RUN_ID=name, **EVERYTHING | knobs)
        (artifact,) = run.path.glob("final_model.*.ptz")
        assert artifact.name == "final_model.rans.ptz" and run.result["val_loss"] != run.result["pre_quant_val_loss"]
        assert "\nfinal_int6_rans_roundtrip_exact val_loss:" in run.log
        again = score_again(corpus, tmp_path / "again", artifact, capsys)
        assert again == [f"{run.result[key]:.8f}" for key in ("val_loss", "val_bpb")]
        told = models.artifact_knobs(FrontierConfig) - {"CODEC", "WEIGHT_BITS"}
        given = models.tiny_settings(corpus) | EVERYTHING | {"MODEL_FILE": models.FRONTIER}
        shape = {name: given[name] for name in [*told, "MODEL_FILE"] if name in given}
        again = score_again(corpus, tmp_path / "again", run.path / "final_model.pt", capsys, **shape)
        assert again == [f"{run.result[key]:.8f}" for key in ("pre_quant_val_loss", "pre_quant_val_bpb")]
    values = models.machine_settings(corpus, MODE="sample", ARTIFACT=artifact, LOG_DIR=tmp_path, SAMPLE_PROMPT="the")
    assert models.call_main(values | {"SAMPLE_TOKENS": "8"}) == 0


def test_a_run_of_everything_goes_on_as_if_it_had_not_been_stopped(go, monkeypatch):
    """Before and after the recurrence begins (at step 4 of 8), twice in one run."""
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
    """The reduction over ranks waits for the gradient of every parameter, before and after the recurrence begins."""
    knobs = EVERYTHING | {"MODEL_FILE": models.FRONTIER, "LOG_DIR": tmp_path / "logs", "ITERATIONS": 6}
    values = models.tiny_settings(corpus, **knobs | {"WARMUP_STEPS": 1, "VAL_TOKENS_LIMIT": 200})
    done = launch(ranks=2, **values | {"RUN_ID": "two"})
    assert done.returncode == 0, done.stderr
    two, one = read_run(tmp_path / "logs" / "two"), go(RUN_ID="one", **EVERYTHING | {"ITERATIONS": 6})
    assert len(two.losses) == 6 and two.losses == pytest.approx(one.losses, abs=1e-4)
    for name in ("val_loss", "val_bpb", "pre_quant_val_loss"):
        assert two.result[name] == pytest.approx(one.result[name], abs=1e-4), name


def test_config_env_repeats_a_run_of_everything(go, tmp_path):
    """Also LOOP_LAYERS and CONTEXTS, which are texts."""
    knobs = EVERYTHING | {"CONTEXTS": "8@0,32@0.5", "SEED": 7}
    run = go(RUN_ID="first", **knobs)
    values = {"LOG_DIR": str(tmp_path / "logs"), "RUN_ID": "again"}
    assert models.call_main(values, run.path / "config.env") == 0
    again = read_run(tmp_path / "logs" / "again")
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
