"""Complete runs for tests, in-process through main() or under torchrun, and assertions that hold for every model."""

import contextlib
import itertools
import json
import os
import re
import signal
from types import SimpleNamespace

import models
import pytest
import torch

import train_gpt
from train_gpt import Trainer


def read_run(path):
    """The contents of a run folder."""
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    result = path / "result.json"
    return SimpleNamespace(
        path=path,
        log=(path / "train.log").read_text(),
        metrics=metrics,
        losses=[m["train_loss"] for m in metrics if "train_loss" in m],
        result=json.loads(result.read_text()) if result.is_file() else None,
    )


def starter(corpus, tmp_path, **base):
    """Function: make a short run with the given knobs on top of `base`, and read its folder."""

    def start(code=0, **overrides):
        knobs = {"LOG_DIR": tmp_path / "logs", "VAL_TOKENS_LIMIT": 200} | base | overrides
        values = models.tiny_settings(corpus, **knobs)
        assert models.call_main(values) == code
        return read_run(tmp_path / "logs" / values["RUN_ID"])

    return start


def fake_clock(monkeypatch):
    """A clock advanced only by steps (1 s, or as `steps` says), evaluations (100 s) and calls marked `slow`."""
    clock = SimpleNamespace(now=0.0, steps=itertools.repeat(1.0))
    score = train_gpt.Evaluator.score

    def slow(owner, name, seconds=None):
        real = getattr(owner, name)

        def delayed(*args, **options):
            clock.now += next(clock.steps) if seconds is None else seconds
            return real(*args, **options)

        monkeypatch.setattr(owner, name, delayed)

    def timed_score(self, model, *args, **options):
        def first_batch(*_):
            clock.now += 100.0
            handle.remove()

        handle = model.register_forward_pre_hook(first_batch)
        return score(self, model, *args, **options)

    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(train_gpt.Evaluator, "score", timed_score)
    slow(Trainer, "step")
    clock.slow = slow
    return clock


def counted_graphs(monkeypatch):
    """Yield the list of graphs compiled for a model, in order; they run without code generation."""
    made, compile_model = [], torch.compile

    def backend(graph, examples):
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    kernels = train_gpt.tool("kernels")
    monkeypatch.setattr(train_gpt.torch, "compile", lambda model, **how: compile_model(model, backend=backend, **how))
    monkeypatch.setattr(kernels, "choose_compile", lambda config, runtime: (True, "counted"))
    yield made
    torch._dynamo.reset()


def score_again(corpus, folder, artifact, capsys, **knobs) -> list[str]:
    """The loss and bits per byte that MODE=eval prints."""
    values = models.machine_settings(
        corpus, MODE="eval", ARTIFACT=artifact, LOG_DIR=folder, VAL_TOKENS_LIMIT=200, **knobs
    )
    capsys.readouterr()
    assert models.call_main(values) == 0
    (found,) = re.findall(r"^final_\w+_exact val_loss:(\S+) val_bpb:(\S+)", capsys.readouterr().out, re.MULTILINE)
    return list(found)


def assert_no_defaults(knobs, config_class):
    """A knob at its default would test nothing."""
    defaults = config_class().as_env()
    assert all(str(value) != defaults[name] for name, value in knobs.items())


def assert_scored_again(run, artifact, corpus, tmp_path, capsys, shape):
    """MODE=eval reproduces the run's digits, from the artifact alone in another process and from the .pt with its shape
    knobs. The final validation scores the exported weights: the average. MODE=sample accepts the artifact, too."""
    assert run.result["val_loss"] != run.result["pre_quant_val_loss"]
    machine = models.machine_settings(corpus, MODE="eval", ARTIFACT=artifact, VAL_TOKENS_LIMIT=200)
    done = models.process(machine, tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    (again,) = re.findall(r"^final_\w+_exact val_loss:(\S+) val_bpb:(\S+)", done.stdout.decode(), re.MULTILINE)
    assert list(again) == [f"{run.result[key]:.8f}" for key in ("val_loss", "val_bpb")]
    again = score_again(corpus, tmp_path / "again", run.path / "final_model.pt", capsys, **shape)
    assert again == [f"{run.result[key]:.8f}" for key in ("pre_quant_val_loss", "pre_quant_val_bpb")]
    values = models.machine_settings(corpus, MODE="sample", ARTIFACT=artifact, LOG_DIR=tmp_path, SAMPLE_PROMPT="the")
    assert models.call_main(values | {"SAMPLE_TOKENS": "8"}) == 0 and capsys.readouterr().out.startswith("the")


@contextlib.contextmanager
def stopped_at(step: int):
    """Send a SIGTERM while this step runs."""
    with pytest.MonkeyPatch.context() as patch:
        whole = Trainer.step

        def interrupted(self, *args):
            if self.checkpoints.in_training and self.steps + 1 == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return whole(self, *args)

        patch.setattr(Trainer, "step", interrupted)
        yield


def assert_goes_on_as_if_it_had_not_been_stopped(go, monkeypatch, knobs):
    """Compare a run of 8 steps stopped twice, early and late, with an uninterrupted one, which is returned."""
    monkeypatch.setattr(train_gpt, "INT8_MIN_NUMEL", 500)
    knobs = knobs | {"ITERATIONS": 8, "VAL_LOSS_EVERY": 3}
    whole = go(RUN_ID="whole", **knobs)
    for step in (2, 6):
        with stopped_at(step):
            go(RUN_ID="cut", code=143, **knobs)
    run = go(RUN_ID="cut", **knobs)
    assert run.result["resumed_at"] == [2, 6] and run.losses == whole.losses
    for name in ("val_loss", "val_bpb", "pre_quant_val_loss", "sha256_artifact"):
        assert run.result[name] == whole.result[name], name
    one, other = (torch.load(r.path / "final_model.pt", weights_only=True) for r in (run, whole))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    return whole


def assert_two_ranks_train_as_one(go, launch, corpus, tmp_path, knobs):
    """Compare two ranks with one; DDP's all-reduce waits for the gradient of every parameter."""
    more = {"LOG_DIR": tmp_path / "logs", "ITERATIONS": 6, "WARMUP_STEPS": 1, "VAL_TOKENS_LIMIT": 200}
    done = launch(ranks=2, **models.tiny_settings(corpus, **knobs | more) | {"RUN_ID": "two"})
    assert done.returncode == 0, done.stderr
    two, one = read_run(tmp_path / "logs" / "two"), go(RUN_ID="one", **knobs | {"ITERATIONS": 6})
    assert len(two.losses) == 6 and two.losses == pytest.approx(one.losses, abs=1e-4)
    for name in ("val_loss", "val_bpb", "pre_quant_val_loss"):
        assert two.result[name] == pytest.approx(one.result[name], abs=1e-4), name
