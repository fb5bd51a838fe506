"""Checkpoint: a run that was cut anywhere ends as if it had not been; what may change meanwhile; files that are
damaged, hostile or half written; signals; the micro-batch that fits. Runs are made in this process by main()."""

import copy
import dataclasses
import gc
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import models
import numpy as np
import pytest
import torch
from conftest import ROOT, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import Evaluator, Stopwatch, TokenStream, Trainer, TrainLoader, UserError

checkpoint = train_gpt.tool("checkpoint")
RunFolder = checkpoint.RunFolder
KNOBS = train_gpt.Config.knobs()
CHECKED = settings()  # those of the profile that conftest.py loads
EVERY_STEP = {"CHECKPOINT_EVERY_SECONDS": "1e-9"}
# Six steps: the second half of them in the warmdown, the momentum still warming up, three validations.
SHORT = {
    "ITERATIONS": 6,
    "WARMDOWN_FRAC": 0.5,
    "MUON_MOMENTUM_WARMUP_STEPS": 5,
    "VAL_LOSS_EVERY": 2,
    "VAL_TOKENS_LIMIT": 100,
}


@pytest.fixture(autouse=True)
def as_it_was():
    """A run pins torch's attention switches and handles signals."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)
    for switch in ("flash", "cudnn", "mem_efficient", "math"):
        getattr(torch.backends.cuda, f"enable_{switch}_sdp")(True)


@pytest.fixture
def go(tiny, monkeypatch, capsys):
    """Function: main() on `tiny` with these overrides; what came of it and what the run folder holds."""

    def start(**overrides):
        given = tiny(**SHORT | overrides)
        for name in KNOBS:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        code = train_gpt.main([])
        return SimpleNamespace(code=code, **look(given), **dict(zip(("out", "err"), capsys.readouterr(), strict=True)))

    return start


def look(given) -> dict:
    path = Path(given["LOG_DIR"]) / given["RUN_ID"]
    result, log, metrics = path / "result.json", path / "train.log", path / "metrics.jsonl"
    return {
        "path": path,
        "log": log.read_text() if log.is_file() else "",
        "checkpoint": path / "checkpoint.pt",
        "metrics": [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else [],
        "result": json.loads(result.read_text()) if result.is_file() else None,
    }


def timeless(metrics) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "train_seconds"} for line in metrics]


SCORES = (
    "val_loss",
    "val_bpb",
    "pre_quant_val_loss",
    "pre_quant_val_bpb",
    "sha256_artifact",
    "steps",
    "train_tokens",
    "scored_tokens",
    "scored_bytes",
    "model_params",
)


def scores(run) -> dict:
    return {name: run.result[name] for name in SCORES}


def assert_ended_well(run, like):
    assert (run.code, run.err) == (0, ""), run.err
    assert scores(run) == scores(like)


@pytest.fixture
def trainers(monkeypatch):
    """The Trainer of each run, in order."""
    seen, train = [], Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, evaluator: seen.append(self) or train(self, evaluator))
    return seen


@pytest.fixture
def saved(monkeypatch):
    """{step: bytes of checkpoint.pt} of all that was saved before the end."""
    kept, write = {}, checkpoint.write_checkpoint

    def keep(state, folder):
        write(state, folder)
        if not state["finished"]:
            kept[state["steps"]] = (folder.path / "checkpoint.pt").read_bytes()

    monkeypatch.setattr(checkpoint, "write_checkpoint", keep)
    return kept


def all_of(trainer) -> dict:
    """Every number that the next step depends on, read from the live objects."""
    names = {p: name for name, p in trainer.model.named_parameters()}
    values = {("model", name): t for name, t in trainer.model.state_dict().items()}
    for optimizer in trainer.optimizers:
        for p, state in optimizer.state.items():
            values |= {(type(optimizer).__name__, names[p], key): value for key, value in state.items()}
    return values | {("position",): trainer.loader.position, ("steps",): trainer.steps}


def assert_same(one, other):
    """Equal to the last bit, through dictionaries and lists."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    else:
        assert one == other


def load(path_or_blob) -> dict:
    blob = path_or_blob if isinstance(path_or_blob, bytes) else path_or_blob.read_bytes()
    assert hashlib.sha256(blob[:-32]).digest() == blob[-32:]
    return torch.load(io.BytesIO(blob[:-32]), weights_only=True)


def dump(state) -> bytes:
    """A file with a valid checksum, whatever it holds."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()


@pytest.fixture
def at_step(monkeypatch):
    """Function: do something once, in the middle of this step of the training (1 is the first)."""

    def plan(number, action):
        step, left = Trainer.step, [action]

        def disturbed(self, *args):
            if self.checkpoints.in_training and self.steps + 1 == number and left:
                left.pop()(self)
            return step(self, *args)

        monkeypatch.setattr(Trainer, "step", disturbed)

    return plan


def send(*numbers):
    """An action that sends these signals to this process."""

    def action(*args):
        for number in numbers:
            os.kill(os.getpid(), number)

    return action


_first = {}


@pytest.fixture
def whole(go):
    """The undisturbed run, made for the first test that asks."""
    if not _first:
        run = go(RUN_ID="whole")
        assert (run.code, run.err) == (0, "")
        _first.update(vars(run), state=load(run.checkpoint), blob=run.checkpoint.read_bytes())
        assert [m["step"] for m in run.metrics if "train_loss" in m] == [1, 2, 3, 4, 5, 6]
        assert [m["step"] for m in run.metrics if "val_loss" in m] == [0, 2, 4, 6]
        assert [m["lr_scale"] for m in run.metrics if "lr_scale" in m] == pytest.approx([1, 1, 1, 1, 2 / 3, 1 / 3])
    return SimpleNamespace(**_first)


# Bit for bit


@pytest.mark.parametrize(
    "change",
    [
        {"WARMUP_STEPS": 2},
        {"TIE_EMBEDDINGS": 0, "GRAD_ACCUM_STEPS": 4, "GRAD_CLIP_NORM": 0.5},
        {"NUM_LAYERS": 1, "NUM_KV_HEADS": 4},
        {"NUM_LAYERS": 3, "TIE_EMBEDDINGS": 0, "WARMDOWN_FRAC": 1, "WARMUP_STEPS": 1},
    ],
    ids=str,
)
def test_from_any_step_a_resumed_run_is_the_undisturbed_one(go, trainers, saved, monkeypatch, tmp_path, change):
    """In losses, scores, weights, moments, momentum, data and random numbers, which each step draws here."""
    step = Trainer.step

    def noisy(self, *args):
        metrics = step(self, *args)
        with torch.no_grad():
            self.model.tok_emb.weight.add_(1e-3 * torch.randn(self.model.tok_emb.weight.shape))
        return metrics

    monkeypatch.setattr(Trainer, "step", noisy)
    torch.manual_seed(5)
    whole = go(RUN_ID="whole", **change)
    torch.manual_seed(5)
    watched = go(RUN_ID="watched", **change, **EVERY_STEP)
    assert saved.keys() == {0, 1, 2, 3, 4, 5}
    assert_ended_well(watched, like=whole)
    assert timeless(watched.metrics) == timeless(whole.metrics), "to save changes nothing"
    expected, final = all_of(trainers[0]), load(whole.checkpoint)
    assert {kind for kind, *_ in expected} == {"model", "AdamW", "Muon", "position", "steps"}
    for number, blob in {**saved, 6: whole.checkpoint.read_bytes()}.items():
        (tmp_path / "checkpoint.pt").write_bytes(blob)
        torch.manual_seed(number + 77)
        resumed = go(RUN_ID=f"from{number}", RESUME=tmp_path / "checkpoint.pt", **change)
        assert_ended_well(resumed, like=whole)
        assert f"\nresumed: step:{number} from {tmp_path / 'checkpoint.pt'} train_time:" in resumed.log
        assert resumed.result["resumed_at"] == [number]
        assert_same(all_of(trainers[-1]), expected)
        again = load(resumed.checkpoint) if number < 6 else final  # nothing was trained that a new file would hold
        for name in ("model", "optimizer", "rng", "position", "steps", "finished", "knobs", "format"):
            assert_same(again[name], final[name])
        left = [m for m in whole.metrics if m["step"] > number or m["step"] == number and "val_loss" in m]
        assert timeless(resumed.metrics) == timeless(left)


def test_a_run_cut_again_and_again(go, whole, at_step):
    for cut in (1, 3, 4, 6):
        at_step(cut, send(signal.SIGTERM))
        run = go()
        assert run.code == 143
    run = go()
    assert_ended_well(run, like=whole)
    assert run.result["resumed_at"] == [1, 3, 4, 6]
    unique = {(m["step"], "val_loss" in m): m for m in timeless(run.metrics)}
    assert list(unique.values()) == timeless(whole.metrics)


@pytest.fixture
def build(runtime):
    """Function: the Trainer of a configuration."""

    def start(config):
        stream = TokenStream(config.data_path, "train", config.vocab_size)
        loader = TrainLoader(stream, config, runtime, config.accumulation_steps(1, "cpu"))
        folder = RunFolder(runtime)
        folder.choose(config, stream, {"train_gpt.py": b""})
        return checkpoint.Trainer(config, folder, Stopwatch(runtime.synchronize), loader)

    with models.signals_restored():
        yield start


def test_the_generators_of_cpu_and_gpu_come_back(make_config, build, runtime, monkeypatch):
    trainer, given = build(make_config()), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([1, 2, 3], dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", given.append)
    runtime.device = torch.device("cuda")  # as far as generators go
    state = trainer.checkpoints.state(trainer)
    drawn = torch.rand(5)
    torch.rand(100)
    trainer.checkpoints.restore(trainer, state)
    assert torch.equal(torch.rand(5), drawn) and [t.tolist() for t in given] == [[1, 2, 3]]
    del state["rng"][0]["cuda"]  # saved without a GPU
    trainer.checkpoints.restore(trainer, state)
    runtime.device = torch.device("cpu")
    rng = {"rng": [{"cpu": torch.get_rng_state(), "cuda": torch.zeros(3)}]}
    trainer.checkpoints.restore(trainer, trainer.checkpoints.state(trainer) | rng)
    assert len(given) == 1


def test_each_rank_gets_its_own_generator_and_the_momenta_that_it_owns(make_config, build, runtime, monkeypatch):
    """Saved by two ranks, which no rank is alone to know; restored on one, two and three."""
    config, alone = make_config(), build(make_config())
    for alone.steps in (1, 2, 3):
        alone.step(1.0, 0.9)
    whole = alone.checkpoints.state(alone)
    muon = {name for name, values in whole["optimizer"].items() if "momentum_buffer" in values}
    assert len(muon) == 12 and len(whole["optimizer"]) == len(list(alone.model.parameters()))
    ranks = {}
    for rank in (1, 0):
        fake = copy.copy(runtime)
        fake.rank, fake.world_size, fake.is_master = rank, 2, rank == 0
        monkeypatch.setattr(
            checkpoint,
            "gather",
            lambda runtime, value, rank=rank: ranks.update({rank: value}) or [ranks[r] for r in sorted(ranks)],
        )
        trainer = copy.copy(alone)
        adam, optimizer = alone.optimizers
        optimizer = copy.copy(optimizer)
        optimizer.state = {p: optimizer.state[p] for p in optimizer.param_groups[0]["params"][rank::2]}
        trainer.runtime, trainer.optimizers = fake, [adam, optimizer]
        torch.manual_seed(rank)
        state = trainer.checkpoints.state(trainer)
        assert (state is None) == (rank == 1)
    mine, others = ranks[0], ranks[1]
    assert muon & mine["optimizer"].keys() and muon & others["optimizer"].keys()
    assert others["optimizer"].keys() <= muon, "Adam's state is the same everywhere: one rank sends it"
    assert state["optimizer"].keys() == whole["optimizer"].keys()
    for name, values in whole["optimizer"].items():
        assert_same(state["optimizer"][name], values)
    assert len(state["rng"]) == 2 and not torch.equal(*(rng["cpu"] for rng in state["rng"]))
    for world_size in (1, 2, 3):
        held = []
        for rank in range(world_size):
            trainer, fake = build(config), copy.copy(runtime)
            fake.rank, fake.world_size = rank, world_size
            trainer.runtime = trainer.optimizers[1].runtime = fake
            trainer.checkpoints.restore(trainer, state)
            assert torch.equal(torch.get_rng_state(), state["rng"][rank % 2]["cpu"])
            values = {key[1:]: value for key, value in all_of(trainer).items() if key[0] in ("AdamW", "Muon")}
            for (name, key), value in values.items():
                assert torch.equal(value, whole["optimizer"][name][key])
            held += [name for name, key in values if key == "momentum_buffer"]
            assert {name for name, _ in values} - muon == whole["optimizer"].keys() - muon
        assert sorted(held) == sorted(muon), "each matrix has one owner"


def test_the_step_count_of_adam_stays_exact_beside_bf16_moments(make_config, build):
    """bfloat16 holds no 257, and the moments of a bfloat16 parameter are of its type."""
    trainer, other = build(make_config()), build(make_config())
    for one in (trainer, other):
        one.model.tok_emb.to(torch.bfloat16)
    trainer.step(1.0, 0.9)
    trainer.steps = 257
    adam = trainer.optimizers[0].state[trainer.model.tok_emb.weight]
    adam["step"].fill_(257)
    assert adam["exp_avg"].dtype == torch.bfloat16
    other.checkpoints.restore(other, trainer.checkpoints.state(trainer))
    assert_same(all_of(other), all_of(trainer))
    assert other.optimizers[0].state[other.model.tok_emb.weight]["step"] == 257
    other.step(1.0, 0.9)


def test_a_loss_that_is_still_on_its_way_is_awaited_before_a_checkpoint(make_config, build):
    """On a GPU the last one may be, and may be no number."""
    trainer = build(make_config())
    trainer.queue.append((1, {"train_loss": None}, ["train_loss"], torch.tensor([math.nan]), None))
    with pytest.raises(UserError, match="step 1: the loss is nan"):
        trainer.checkpoints.save(trainer, wait=True)
    assert trainer.checkpoints.written is None


def test_a_copy_is_saved_and_not_what_training_goes_on_with(make_config, build):
    """The file is written while the next steps change the weights."""
    trainer = build(make_config())
    trainer.step(1.0, 0.9)
    state = trainer.checkpoints.state(trainer)
    frozen = copy.deepcopy(state)
    trainer.step(1.0, 0.9)
    assert_same(state, frozen)
    assert not torch.equal(state["model"]["tok_emb.weight"], trainer.model.tok_emb.weight)


# The clock


@pytest.fixture
def clock(monkeypatch):
    """A clock that only steps (1 s, or `duration`), evaluations (100 s) and writing (1000 s) move."""
    fake = SimpleNamespace(now=0.0, duration=1.0)
    step, score, write = Trainer.step, Evaluator.score, checkpoint.write_checkpoint

    def moving(seconds, call):
        def moved(*args, **options):
            fake.now += seconds or fake.duration
            return call(*args, **options)

        return moved

    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: fake.now)
    monkeypatch.setattr(Trainer, "step", moving(0, step))
    monkeypatch.setattr(Evaluator, "score", moving(100, score))
    fake.slow_disk = lambda: monkeypatch.setattr(checkpoint, "write_checkpoint", moving(1000, write))
    fake.moving = moving
    return fake


@pytest.mark.parametrize("warmup_steps", [2, 0])
@pytest.mark.parametrize("limit, steps", [(10, 9), (9.5, 9)])
def test_the_clock_goes_on_where_it_stood(go, clock, at_step, limit, steps, warmup_steps):
    """From wherever it was cut, the whole takes as long as allowed, on one schedule; what is between two processes and
    the writing of the last checkpoint do not count. Regression: without a warm-up, a resumed run knew of no step yet
    that could be too long."""
    capped = {
        "MAX_WALLCLOCK_SECONDS": limit,
        "ITERATIONS": 1000,
        "WARMDOWN_FRAC": 0.5,
        "VAL_LOSS_EVERY": 0,
        "WARMUP_STEPS": warmup_steps,
    }
    clock.slow_disk()
    for cut in range(1, steps + 1):
        at_step(cut, send(signal.SIGTERM))
        assert go(RUN_ID=f"cut{cut}", **capped).code == 143
        clock.now += 5000
        run = go(RUN_ID=f"cut{cut}", **capped)
        assert run.code == 0, run.err
        assert run.result["seconds"]["training"] <= limit and not run.result["over_clock"]
        assert run.result["steps"] == steps == run.result["seconds"]["training"]
        assert run.result["resumed_at"] == [cut]
        trained = [m for m in run.metrics if "train_loss" in m]
        assert [m["train_seconds"] for m in trained] == list(range(1, steps + 1))
        assert [m["lr_scale"] for m in trained] == pytest.approx([min(1, (1 - s / limit) / 0.5) for s in range(steps)])
        assert re.search(rf"^resumed: step:{cut} from \S+ train_time:{cut}000ms$", run.log, re.MULTILINE)
        assert f"\nstopping_early: wallclock_cap train_time:{steps}000ms step:{steps}/1000\n" in run.log


@pytest.mark.parametrize(
    "knobs, expected",
    [
        ({"MAX_WALLCLOCK_SECONDS": 301}, [3, 6, 9, 12, 15]),
        ({"MAX_WALLCLOCK_SECONDS": 300}, [14]),
        ({"MAX_WALLCLOCK_SECONDS": 0, "ITERATIONS": 8}, [8]),
        ({"MAX_WALLCLOCK_SECONDS": 301, "CHECKPOINT_EVERY_SECONDS": 0}, [15]),
        ({"MAX_WALLCLOCK_SECONDS": 0, "ITERATIONS": 8, "CHECKPOINT_EVERY_SECONDS": 50}, [3, 6, 8]),
        ({"MAX_WALLCLOCK_SECONDS": 100, "CHECKPOINT_EVERY_SECONDS": 40}, [2, 4]),
    ],
)
def test_when_a_checkpoint_is_due(go, clock, monkeypatch, knobs, expected):
    """Every minute of training where the run is capped over five, else never before the end."""
    clock.duration, steps = 20.0, []
    write = checkpoint.write_checkpoint
    monkeypatch.setattr(
        checkpoint, "write_checkpoint", lambda state, folder: steps.append(state["steps"]) or write(state, folder)
    )
    run = go(**{"ITERATIONS": 1000, "WARMUP_STEPS": 2, "VAL_LOSS_EVERY": 0} | knobs)
    assert run.code == 0 and steps == expected
    lines = re.findall(r"^checkpoint: saved step:(\d+) bytes:(\d+) write_time:\d+ms$", run.log, re.MULTILINE)
    assert [int(step) for step, _ in lines] == expected and int(lines[-1][1]) == run.checkpoint.stat().st_size
    assert re.findall(r"^checkpoint: writing step:(\d+)$", run.log, re.MULTILINE) == [step for step, _ in lines]
    assert [m["train_seconds"] for m in run.metrics if "train_loss" in m] == [20.0 * s for s in range(1, steps[-1] + 1)]


def test_the_pause_of_a_checkpoint_is_training_time_but_no_part_of_a_step(go, clock, trainers, monkeypatch):
    """Else it would be taken for the length of a step, and end the run that much earlier."""
    monkeypatch.setattr(checkpoint.Checkpoints, "state", clock.moving(2, checkpoint.Checkpoints.state))
    run = go(MAX_WALLCLOCK_SECONDS=18, ITERATIONS=1000, WARMUP_STEPS=2, CHECKPOINT_EVERY_SECONDS=5, VAL_LOSS_EVERY=0)
    assert set(trainers[0].step_seconds) == {1.0}
    assert re.findall("saved step:([0-9]+)", run.log) == ["5", "10", "13"]
    assert run.result["seconds"]["training"] == 17 and run.result["steps"] == 13, "5 steps, 2 s, 5 steps, 2 s, 3 steps"


@pytest.mark.parametrize("limit", [13.5, 15.5, 18.5, 20.5, 21, 22.5, 27.5])
def test_a_checkpoint_right_before_the_end_does_not_take_the_run_over_its_clock(go, clock, monkeypatch, limit):
    """The last one comes at the end anyway. Regression: its pause did."""
    monkeypatch.setattr(checkpoint.Checkpoints, "state", clock.moving(2, checkpoint.Checkpoints.state))
    run = go(MAX_WALLCLOCK_SECONDS=limit, ITERATIONS=1000, WARMUP_STEPS=2, CHECKPOINT_EVERY_SECONDS=5, VAL_LOSS_EVERY=0)
    assert limit - 1.5 < run.result["seconds"]["training"] <= limit and not run.result["over_clock"]


# A finished state


def test_a_finished_run_goes_on_at_its_export(go, whole, monkeypatch):
    """However often what follows the training is killed."""
    export, score, calls = train_gpt.export, Evaluator.score, itertools.count(1)
    monkeypatch.setattr(train_gpt, "export", lambda *args: send(signal.SIGTERM)() or export(*args))
    run = go(WARMUP_STEPS=2)
    assert run.code == 143 and run.result is None and not (run.path / "final_model.pt").exists()
    assert load(run.checkpoint)["finished"] is True
    assert "stopped by SIGTERM: RUN_ID=run goes on with it" in run.err
    monkeypatch.setattr(train_gpt, "export", export)

    def killed_at_the_second(self, *args, **options):
        if next(calls) == 2:  # the first repeats the validation before the export
            send(signal.SIGINT)()
        return score(self, *args, **options)

    monkeypatch.setattr(Evaluator, "score", killed_at_the_second)
    run = go(WARMUP_STEPS=2)
    assert run.code == 130 and run.result is None and (run.path / "final_model.int8.ptz").exists()
    monkeypatch.setattr(Trainer, "step", None)  # there is nothing left to train, nor to warm up
    run = go(WARMUP_STEPS=2)
    assert_ended_well(run, like=whole)
    assert len(re.findall(r"^resumed: step:6 from .* finished$", run.log, re.MULTILINE)) == 2
    assert run.result["resumed_at"] == [6]
    assert {path.name for path in run.path.iterdir()} == {path.name for path in whole.path.iterdir()}


def test_a_finished_run_is_not_run_again(go, whole):
    done = go()
    before = {path: path.read_bytes() for path in done.path.iterdir()}
    run = go()
    assert run.code == 2 and run.err.count("error:") == 1
    assert f"the run in {done.path} is finished: choose another RUN_ID" in run.err
    assert f"RESUME={done.checkpoint}" in run.err, "what to give to go on from it"
    assert {path: path.read_bytes() for path in done.path.iterdir()} == before
    again = go(RUN_ID="scored", RESUME=done.path)  # a folder, too; nothing to train
    assert_ended_well(again, like=whole)
    assert not [m for m in again.metrics if "train_loss" in m]


@pytest.mark.parametrize(
    "first, longer",
    [
        ({"ITERATIONS": 4}, {"ITERATIONS": 6}),
        ({"ITERATIONS": 6, "MAX_WALLCLOCK_SECONDS": 4.5}, {"ITERATIONS": 6, "MAX_WALLCLOCK_SECONDS": 0}),
        ({"ITERATIONS": 6, "MAX_WALLCLOCK_SECONDS": 4.5}, {"ITERATIONS": 6, "MAX_WALLCLOCK_SECONDS": 99}),
    ],
)
def test_more_steps_or_time_continue_a_finished_run(go, clock, first, longer):
    constant = {"WARMDOWN_FRAC": 0, "WARMUP_STEPS": 2}
    whole = go(RUN_ID="whole", **constant, **longer)
    short = go(RUN_ID="short", **constant, **first)
    assert (whole.result["steps"], short.result["steps"]) == (6, 4)
    for place in (short.path, short.checkpoint):
        run = go(RUN_ID=f"longer_{place.name}", RESUME=place, **constant, **longer)
        assert_ended_well(run, like=whole)
        assert run.result["resumed_at"] == [4] and run.result["seconds"]["training"] == 6
        trained = [m for m in run.metrics if "train_loss" in m]
        assert timeless(trained) == timeless(m for m in whole.metrics if "train_loss" in m)[4:]


# Which knobs may change


# Where things are, what is logged and validated, how a step is cut, what happens after the training; by the plan.
FREE = """MODE DATA_PATH TOKENIZER_PATH MODEL_FILE LOG_DIR RUN_ID CHECKPOINT_EVERY_SECONDS RESUME RESUME_FORCE DEVICE
    COMPILE ATTENTION TARGET_WORLD_SIZE WARMUP_STEPS GRAD_ACCUM_STEPS MICRO_BATCH_TOKENS TRAIN_LOG_EVERY VAL_LOSS_EVERY
    VAL_AT_START VAL_BATCH_SIZE VAL_TOKENS_LIMIT EVAL_STRIDE ARTIFACT""".split()


def another(value):
    if isinstance(value, bool):
        return not value
    return value + "x" if isinstance(value, str) else value + 1


def read(blob, config, **facts):
    return checkpoint.read_checkpoint(blob, "FILE", config, facts)


@pytest.mark.parametrize("name", KNOBS)
def test_each_knob_may_change_or_not(make_config, name):
    config = make_config()
    blob = dump({"format": checkpoint.CHECKPOINT_FORMAT, "knobs": config.as_env()})
    assert read(blob, config)[1] == []
    field = KNOBS[name].name
    old = getattr(config, field)
    changed = dataclasses.replace(config, **{field: another(old)})
    if name in FREE or name == "ITERATIONS":  # the latter is longer now; 0 seconds are more than any, so 1 is less
        assert read(blob, changed)[1] == []
        return
    expected = [f"{name} was {old}, is {another(old)}"]
    if isinstance(old, bool):
        expected = [f"{name} was {int(old)}, is {int(not old)}"]
    with pytest.raises(UserError) as caught:
        read(blob, changed)
    message = str(caught.value)
    assert message.startswith(f"FILE is of another run: {'; '.join(expected)}: change that back")
    assert "RESUME_FORCE=1" in message and "RUN_ID" in message and "\n" not in message
    assert read(blob, dataclasses.replace(changed, resume_force=True))[1] == expected
    if name != "MAX_WALLCLOCK_SECONDS":
        knobs = {other: text for other, text in changed.as_env().items() if other != name}
        with pytest.raises(UserError, match=f"FILE is of another run: {name} was unset, is"):  # a knob that is new
            read(dump({"format": checkpoint.CHECKPOINT_FORMAT, "knobs": knobs}), changed)


def test_knobs_that_moved_to_other_files_are_no_difference_where_they_are_off(make_config):
    """A checkpoint of before holds all of them."""
    check = train_gpt.tool("check")
    config = make_config()
    before = config.as_env() | check.MOVED | dict.fromkeys(check.SAMPLE_KNOBS, "5")

    def differences(knobs):
        blob = dump({"format": checkpoint.CHECKPOINT_FORMAT, "knobs": knobs})
        return read(blob, dataclasses.replace(config, resume_force=True))[1]

    assert differences(before) == differences(before | {"CLIP_ATTN": "0"}) == []
    assert differences(before | {"XSA_LAYERS": "4"}) == ["XSA_LAYERS was 4, is unset"]
    frontier = train_gpt.load_model_file(str(ROOT / "records" / "models" / "frontier.py"))
    config = frontier.load([], config.as_env() | {"XSA_LAYERS": "4", "RESUME_FORCE": "1"})
    before |= {name: text for name, text in config.as_env().items() if name not in before}
    assert differences(before) == ["XSA_LAYERS was 0, is 4"], "a model that has the knob compares it"


@pytest.mark.parametrize(
    "name, old, new, allowed",
    [
        ("ITERATIONS", 5, 6, True),
        ("ITERATIONS", 5, 4, False),
        ("MAX_WALLCLOCK_SECONDS", 60, 60.5, True),
        ("MAX_WALLCLOCK_SECONDS", 60, 59.5, False),
        ("MAX_WALLCLOCK_SECONDS", 60, 0, True),
        ("MAX_WALLCLOCK_SECONDS", 0, 60, False),
        ("MAX_WALLCLOCK_SECONDS", 0, 1e9, False),
    ],
)
def test_a_run_may_get_longer_and_not_shorter(make_config, name, old, new, allowed):
    """Without a clock it has all the time there is."""
    blob = dump({"format": checkpoint.CHECKPOINT_FORMAT, "knobs": make_config(**{name: old}).as_env()})
    if allowed:
        assert read(blob, make_config(**{name: new}))[1] == []
    else:
        with pytest.raises(UserError, match=f"FILE is of another run: {name} was "):
            read(blob, make_config(**{name: new}))


@pytest.fixture
def stopped(go, whole, at_step):
    """A run of which three steps are done."""
    at_step(3, send(signal.SIGTERM))
    run = go()
    assert run.code == 143 and load(run.checkpoint)["steps"] == 3
    return run


def contents(path: Path) -> dict:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


def test_other_knobs_are_refused_and_listed_unless_forced(go, stopped, whole):
    before = contents(stopped.path)
    changes = {"MATRIX_LR": 0.5, "SEED": 3, "ITERATIONS": 5}
    said = "ITERATIONS was 6, is 5; MATRIX_LR was 0.02, is 0.5; SEED was 1337, is 3"
    run = go(**changes)
    assert run.code == 2 and run.err.startswith("error: ") and run.err.count("\n") == 1 and said in run.err
    assert contents(stopped.path) == before
    run = go(**changes, RESUME_FORCE=1)
    assert run.code == 0 and re.search(rf"^resumed: step:3 from \S+ train_time:\d+ms; {said}$", run.log, re.MULTILINE)
    assert run.result["steps"] == 5 and run.result["val_loss"] != whole.result["val_loss"]


def test_free_knobs_may_change(go, stopped, whole):
    run = go(TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=5, CHECKPOINT_EVERY_SECONDS=1e-9, WARMUP_STEPS=1)
    assert_ended_well(run, like=whole)
    assert [m["step"] for m in run.metrics if "val_loss" in m] == [0, 2, 5, 6]
    assert re.findall("saved step:(.)", run.log) == ["3", "4", "5", "6"], "what it came from is not saved again"


def test_another_model_is_refused_even_by_force(go, stopped):
    before = contents(stopped.path)
    run = go(MODEL_DIM=64, RESUME_FORCE=1)
    assert run.code == 2 and run.err.startswith(f"error: {stopped.checkpoint} ") and run.err.count("\n") == 1
    assert contents(stopped.path) == before


def test_another_script_is_noticed(go, stopped, monkeypatch, tmp_path):
    other = tmp_path / "train_gpt.py"
    other.write_bytes((ROOT / "train_gpt.py").read_bytes() + b"# one more line\n")
    monkeypatch.setattr(train_gpt, "__file__", str(other))
    run = go()
    digests = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in (ROOT / "train_gpt.py", other)]
    assert run.code == 2 and "of another run: train_gpt.py was {}, is {}: ".format(*digests) in run.err
    run = go(RESUME_FORCE=1)
    assert run.code == 0 and "; train_gpt.py was {}, is {}\n".format(*digests) in run.log


@pytest.mark.parametrize("edit", ["one more token", "one other token"])
def test_other_training_data_is_noticed(go, stopped, whole, corpus, tmp_path, edit):
    """Regression: as many tokens were taken for the same tokens."""
    data = shutil.copytree(corpus / "data", tmp_path / "data")
    same = go(DATA_PATH=data, RUN_ID="same", RESUME=stopped.checkpoint)
    assert_ended_well(same, like=whole)  # another place is no other data
    path = data / "fineweb_train_000000.bin"
    tokens = np.fromfile(path, dtype="<u2", offset=1024).tolist()
    write_shard(path, [*tokens, 5] if edit == "one more token" else [tokens[0] + 1, *tokens[1:]])
    run = go(DATA_PATH=data)
    assert run.code == 2 and re.search("of another run: training [^;]* was [^;]*, is [^;]*: change that back", run.err)


# RESUME


def test_resume_never(go, stopped, whole):
    before = contents(stopped.path)
    run = go(RESUME="never")
    assert run.code == 2 and f"RESUME=never, but folder {stopped.path} exists: choose another RUN_ID" in run.err
    assert contents(stopped.path) == before
    assert_ended_well(go(RESUME="never", RUN_ID="fresh"), like=whole)


@pytest.mark.parametrize("resume", ["auto", "PATH"])
def test_a_run_that_died_before_its_first_checkpoint_starts_again(go, whole, stopped, tmp_path, resume):
    path = tmp_path / "logs" / "young"
    path.mkdir()
    (path / "train.log").write_text("step:1\n")
    run = go(RUN_ID="young", RESUME=stopped.path if resume == "PATH" else resume)
    assert_ended_well(run, like=whole)
    assert run.log.startswith("step:1\n") and run.result["resumed_at"] == ([3] if resume == "PATH" else [])


def test_in_its_own_folder_a_run_goes_on_from_its_own_checkpoint(go, whole, stopped, at_step, tmp_path):
    """A run that began with RESUME=PATH is started again with the same command when it dies."""
    at_step(5, send(signal.SIGTERM))
    again = {"RUN_ID": "again", "RESUME": stopped.path}
    assert go(**again).code == 143
    run = go(**again)
    assert_ended_well(run, like=whole)
    assert run.result["resumed_at"] == [3, 5]


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir])
def test_resume_from_a_place_without_a_checkpoint(go, tmp_path, make):
    place = tmp_path / "place"
    make(place)
    run = go(RESUME=place)
    named = place / "checkpoint.pt" if place.exists() else place
    said = f"error: RESUME={place}: there is no checkpoint {named}: give a run folder or a file\n"
    assert (run.code, run.err) == (2, said)
    assert not run.path.exists()


# Files that are not whole, or not ours


def refused(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith("FILE is ") and "\n" not in message
    return message


def test_a_flipped_bit_or_a_missing_end_never_passes(make_config, whole):
    config = make_config(**SHORT)
    facts = {name: text for name, text in whole.state["knobs"].items() if name not in KNOBS}
    read(whole.blob, config, **facts)
    size, rng = len(whole.blob), random.Random(0)
    places = {0, 1, 31, size // 2, size - 34, size - 33, size - 32, size - 1, *(rng.randrange(size) for _ in range(60))}

    def flip_and_cut(place, bit):
        flipped = bytearray(whole.blob)
        flipped[place] ^= 1 << bit
        for blob in (bytes(flipped), whole.blob[:place], whole.blob + bytes(1 + bit), whole.blob[place + 1 :]):
            assert "does not match its checksum" in refused(lambda b=blob: read(b, config, **facts))

    for place in places:
        flip_and_cut(place, rng.randrange(8))
    CHECKED(given(st.integers(0, size - 1), st.integers(0, 7))(flip_and_cut))()


def test_a_damaged_checkpoint_is_left_as_it_is(go, stopped, whole):
    blob = bytearray(stopped.checkpoint.read_bytes())
    blob[len(blob) // 2] ^= 4
    stopped.checkpoint.write_bytes(blob)
    before = contents(stopped.path)
    run = go()
    assert run.code == 2 and run.err.startswith(f"error: {stopped.checkpoint} is damaged") and run.err.count("\n") == 1
    assert contents(stopped.path) == before
    stopped.checkpoint.unlink()  # as the message advises
    assert_ended_well(go(), like=whole)


def without(*path):
    def change(state):
        for name in path[:-1]:
            state = state[name]
        del state[path[-1]]

    return change


def put(*path, value):
    def change(state):
        for name in path[:-1]:
            state = state[name]
        state[path[-1]] = value(state[path[-1]]) if callable(value) else value

    return change


EMB, FC = "tok_emb.weight", "blocks.0.mlp.fc.weight"
KEYS = (
    "format",
    "knobs",
    "model",
    "average",
    "optimizer",
    "rng",
    "position",
    "steps",
    "train_seconds",
    "finished",
    "resumed_at",
    "recent",
)
BROKEN = {
    **{f"no {key}": without(key) for key in KEYS},
    **{f"{key} is a text": put(key, value="x") for key in KEYS if key not in ("finished", "resumed_at")},
    **{f"{key} is a list": put(key, value=lambda old: [old]) for key in KEYS if key not in ("finished", "resumed_at")},
    "no weight": without("model", EMB),
    "one weight more": lambda state: state["model"].update(x=torch.ones(1)),
    "weight too short": put("model", EMB, value=lambda t: t[1:]),
    "weight is a number": put("model", EMB, value=1.0),
    # Regression: what was missing was taken for zeros, or found missing by the optimizer in the first step.
    "no momentum": without("optimizer", FC),
    "empty momentum": put("optimizer", FC, value={}),
    "no moments": without("optimizer", EMB),
    "no second moment": without("optimizer", EMB, "exp_avg_sq"),
    "moment too short": put("optimizer", EMB, "exp_avg", value=lambda t: t[1:]),
    "momentum too short": put("optimizer", FC, "momentum_buffer", value=lambda t: t[1:]),
    "momentum turned": put("optimizer", FC, "momentum_buffer", value=lambda t: t.T),
    "moment is a scalar": put("optimizer", EMB, "exp_avg", value=torch.tensor(0.0)),
    "step is a table": put("optimizer", EMB, "step", value=torch.zeros(320, 32)),
    "moments are a list": put("optimizer", EMB, value=[1]),
    "no tensor": put("optimizer", EMB, "step", value=3.0),
    "no generators": put("rng", value=[]),
    "generator of another size": put("rng", 0, "cpu", value=torch.zeros(8)),
    "no generator of the CPU": without("rng", 0, "cpu"),
    "another format": put("format", value="other_v9"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_that_is_not_complete_is_refused_behind_a_right_checksum(go, stopped, tmp_path, name):
    state = load(stopped.checkpoint)
    assert state.keys() == set(KEYS)
    BROKEN[name](state)
    (tmp_path / "broken.pt").write_bytes(dump(state))
    run = go(RUN_ID="new", RESUME=tmp_path / "broken.pt")
    assert run.code == 2 and run.err.startswith("error: ") and str(tmp_path / "broken.pt") in run.err
    assert run.err.count("\n") == 1 and len(run.err) < 500 and not run.path.exists()


class Evil:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_runs_and_no_bomb_goes_off(make_config, whole, tmp_path):
    config = make_config(**SHORT)
    trap = dump(whole.state | {"resumed_at": Evil(tmp_path / "trapped")})
    assert "damaged or of another format" in refused(lambda: read(trap, config))
    assert not (tmp_path / "trapped").exists()
    torch.load(io.BytesIO(trap[:-32]), weights_only=False)
    assert (tmp_path / "trapped").exists(), "the trap would have worked"
    bomb = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole.blob[:-32])) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
        new.writestr("archive/data/zeros", bytes(10**8))
    blob = bomb.getvalue() + hashlib.sha256(bomb.getvalue()).digest()
    with pytest.raises(UserError, match="^FILE unpacks to more than it holds$"):
        read(blob, config)
    for thing in ([1, 2], torch.ones(3), "text"):
        with pytest.raises(UserError, match="^FILE holds a .*, no dictionary$"):
            read(dump(thing), config)
    for junk in (b"", b"x" * 31, b"x" * 32, b"x" * 500, hashlib.sha256(b"").digest()):
        refused(lambda blob=junk: read(blob, config))


# Writing


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_gpt
real, calls = os.{name}, []

def fatal(*args):
    calls.append(args)
    # config.env and train_gpt.py are written first, then the checkpoints of steps 0, 1, 2, 3
    if len(calls) == 2 + 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

os.{name} = fatal
sys.exit(train_gpt.main([]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_while_it_writes_a_run_has_the_checkpoint_before(go, tiny, whole):
    """Between the bytes and their name, and before they are on the disk."""
    environ, started = {name: value for name, value in os.environ.items() if name not in KNOBS}, []
    for name in ("fsync", "replace"):
        command = [sys.executable, "-c", KILLED.format(root=str(ROOT), name=name)]
        given = tiny(RUN_ID=name, **SHORT, **EVERY_STEP)
        started.append(subprocess.Popen(command, env=environ | given, stdout=subprocess.DEVNULL))
    for name, process in zip(("fsync", "replace"), started, strict=True):
        assert process.wait(120) == -signal.SIGKILL
        path = Path(tiny()["LOG_DIR"]) / name
        assert (path / ".checkpoint.pt.tmp").exists() and load(path / "checkpoint.pt")["steps"] == 2
        assert re.findall("saved step:([0-9])", (path / "train.log").read_text()) == ["0", "1", "2"]
        run = go(RUN_ID=name, **EVERY_STEP)
        assert_ended_well(run, like=whole)
        assert run.result["resumed_at"] == [2] and not (path / ".checkpoint.pt.tmp").exists()


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_disk_that_fails_costs_the_checkpoint_and_not_the_run(go, whole, monkeypatch, failing):
    real, count = getattr(os, failing), itertools.count(1)

    def fail(*args):
        if next(count) in (2 + 3, 2 + 4, 2 + 7):  # the checkpoints of steps 2, 3 and 6
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, failing, fail)
    run = go(**EVERY_STEP)
    assert_ended_well(run, like=whole)
    warnings = re.findall(r"^warning: no checkpoint of step (\d) \(.*No space left.*\): the one before", run.log, re.M)
    assert warnings == ["2", "3", "6"] and re.findall("saved step:(.)", run.log) == ["0", "1", "4", "5"]
    state = load(run.checkpoint)
    assert state["steps"] == 5 and not state["finished"] and not [*run.path.glob(".*")]


def test_a_file_size_limit_under_a_checkpoint(go, whole, monkeypatch):
    resource = pytest.importorskip("resource")
    sizes = [(whole.path / name).stat().st_size for name in ("final_model.pt", "checkpoint.pt", "train_gpt.py")]
    limit, (soft, hard) = max(sizes[0], sizes[2]) + 1000, resource.getrlimit(resource.RLIMIT_FSIZE)
    assert limit < sizes[1], "the limit must cut the checkpoint alone"
    write = checkpoint.write_checkpoint

    def limited(state, folder):
        low = limit if state["steps"] > 1 else soft
        resource.setrlimit(resource.RLIMIT_FSIZE, (low, hard))
        write(state, folder)

    monkeypatch.setattr(checkpoint, "write_checkpoint", limited)
    try:
        run = go(**EVERY_STEP)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_ended_well(run, like=whole)
    assert run.log.count("warning: no checkpoint of step") == 5 and load(run.checkpoint)["steps"] == 1


# Numbers that are none


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["weights", "loss"])
def test_what_is_not_finite_never_replaces_the_last_good_checkpoint(go, whole, trainers, monkeypatch, where, value):
    step = Trainer.step

    def poisoned(self, *args):
        metrics = step(self, *args)
        if self.steps + 1 == 4 and where == "loss":
            return metrics | {"train_loss": torch.tensor(value)}
        if self.steps + 1 == 4:
            self.model.blocks[1].mlp.fc.weight.data[3, 5] = value
        return metrics

    def written_late(state, folder):
        time.sleep(0.2)
        write_checkpoint(state, folder)

    write_checkpoint = checkpoint.write_checkpoint
    monkeypatch.setattr(checkpoint, "write_checkpoint", written_late)
    monkeypatch.setattr(Trainer, "step", poisoned)
    run = go(**EVERY_STEP)
    remedy = "lower the learning rates" if where == "weights" else "lower MATRIX_LR"
    assert run.code == 2 and run.err.startswith("error: step 4: ") and remedy in run.err
    assert run.result is None and not [*run.path.glob("final_model*")] and load(run.checkpoint)["steps"] == 3
    assert run.log.endswith(run.err), "the log says how it ended, after what was still being written"
    monkeypatch.setattr(Trainer, "step", step)
    run = go()
    assert_ended_well(run, like=whole)
    assert run.result["resumed_at"] == [3]


# Signals


needs_usr1 = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no SIGUSR1 here")


@needs_usr1
def test_usr1_saves_and_goes_on(go, whole, at_step, saved):
    at_step(3, send(signal.SIGUSR1))
    run = go()
    assert_ended_well(run, like=whole)
    assert timeless(run.metrics) == timeless(whole.metrics) and saved.keys() == {3}
    assert re.findall("^checkpoint: saved step:(.)", run.log, re.M) == ["3", "6"]


@needs_usr1
def test_usr1_before_the_training_saves_its_beginning(go, whole, monkeypatch, saved):
    fit = checkpoint.fit_memory
    monkeypatch.setattr(checkpoint, "fit_memory", lambda trainer: send(signal.SIGUSR1)() or fit(trainer))
    assert_ended_well(go(), like=whole)
    assert saved.keys() == {0}


ENDING = [
    pytest.param(
        getattr(signal, name, None),
        code,
        id=name,
        marks=pytest.mark.skipif(not hasattr(signal, name), reason=f"no {name} here"),
    )
    for name, code in (("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129))
]


@pytest.mark.parametrize("number, code", ENDING)
@pytest.mark.parametrize("step", [1, 4, 6])
def test_term_int_and_hup_save_and_stop_and_the_run_goes_on(go, whole, at_step, number, code, step):
    at_step(step, send(number))
    run = go()
    assert run.code == code and run.result is None and load(run.checkpoint)["steps"] == step
    assert run.err == f"stopped by {number.name}: RUN_ID=run goes on with it\n" and run.log.endswith(run.err)
    assert f"\ncheckpoint: saved step:{step} " in run.log
    run = go()
    assert_ended_well(run, like=whole)
    assert timeless(m for m in run.metrics if "train_loss" in m) == timeless(
        m for m in whole.metrics if "train_loss" in m
    )
    unique = {(m["step"], "val_loss" in m): m for m in timeless(run.metrics)}
    assert list(unique.values()) == timeless(whole.metrics) and run.result["resumed_at"] == [step]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_under_nohup_a_terminal_that_goes_away_changes_nothing(go, whole, at_step):
    """It ignores SIGHUP before the program starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(3, send(signal.SIGHUP))
        run = go()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert_ended_well(run, like=whole)
    assert timeless(run.metrics) == timeless(whole.metrics)
    assert re.findall("saved step:(.)", run.log) == ["6"]


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
@pytest.mark.parametrize("validation, step", [(1, 0), (3, 4), (4, 6)])
def test_a_signal_during_a_validation(go, whole, monkeypatch, number, validation, step):
    """The validation is dropped where the run ends, and made again where it goes on."""
    if not hasattr(signal, number):
        pytest.skip(f"no {number} here")
    number, batches, score, calls = getattr(signal, number), Evaluator.batches, Evaluator.score, itertools.count(1)
    running = []

    def counted(self, *args, **options):
        running.append(next(calls))
        return score(self, *args, **options)

    def disturbed(self, *args):
        for index, batch in enumerate(batches(self, *args)):
            if running[-1:] == [validation] and index == 2:
                send(number)()
            yield batch

    monkeypatch.setattr(Evaluator, "score", counted)
    monkeypatch.setattr(Evaluator, "batches", disturbed)
    run = go(VAL_BATCH_SIZE=32)  # a window at a time
    if number != getattr(signal, "SIGUSR1", None):
        assert run.code == 128 + number and load(run.checkpoint)["steps"] == step
        assert load(run.checkpoint)["finished"] == (step == 6)
        assert [m["step"] for m in run.metrics if "val_loss" in m] == [0, 2, 4][: validation - 1]
        run = go(VAL_BATCH_SIZE=32)
        assert run.result["resumed_at"] == [step]
    assert run.code == 0 and run.result["steps"] == 6
    undisturbed = go(RUN_ID="undisturbed", VAL_BATCH_SIZE=32)
    assert scores(run) == scores(undisturbed)
    assert timeless(run.metrics) == timeless(undisturbed.metrics), "each validation is there once"


def test_a_signal_right_after_the_last_validation(go, whole, monkeypatch):
    """Too late for the training to see, too early for the export to be cut. Regression: the export went ahead, and its
    evaluation, which a signal cuts short, had no score."""
    train = Trainer.train

    def late(self, evaluator):
        score = train(self, evaluator)
        send(signal.SIGTERM)()
        return score

    monkeypatch.setattr(Trainer, "train", late)
    run = go()
    assert run.code == 143 and run.result is None and "stopped by SIGTERM" in run.err
    monkeypatch.setattr(Trainer, "train", train)
    assert_ended_well(go(), like=whole)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(go, at_step, second):
    at_step(3, send(signal.SIGTERM, second))
    run = go()
    assert run.code == 128 + second and not run.checkpoint.exists() and run.result is None
    assert run.log.endswith(f"stopped by {second.name}: RUN_ID=run goes on with it\n")
    assert [m["step"] for m in run.metrics if "train_loss" in m] == [1, 2]


@pytest.mark.parametrize("place, folder", [("open_text", False), ("build_model", False), ("export", True)])
def test_outside_of_the_training_the_first_signal_ends_at_once(go, monkeypatch, place, folder):
    real = getattr(train_gpt, place)
    monkeypatch.setattr(train_gpt, place, lambda *args: send(signal.SIGTERM)() or real(*args))
    run = go()
    assert run.code == 143 and run.result is None and run.path.exists() == folder
    assert run.err == "stopped by SIGTERM" + ": RUN_ID=run goes on with it" * folder + "\n"


# One run, one process


def test_two_processes_cannot_use_one_folder(go, tiny, make_config, runtime, stopped, whole):
    """Regression: the error of the second was written into the log of the first."""
    pytest.importorskip("fcntl")
    other = RunFolder(runtime)
    other.locate(make_config())
    other.create(make_config(), {"train_gpt.py": b"code"})
    before = contents(stopped.path)
    run = go()
    assert run.code == 2 and "RUN_ID=run" in run.err and "another run is using it" in run.err
    assert contents(stopped.path) == before, "not even a line in the log of the other"
    other.close()
    assert_ended_well(go(), like=whole)


def test_the_folder_of_a_process_that_was_killed_is_free(go, whole, at_step):
    """The lock goes with the process: nothing has to be removed by hand."""

    class Killed(BaseException):
        pass

    def die(trainer):
        raise Killed

    at_step(3, die)
    with models.signals_restored(), pytest.raises(Killed):
        go()
    gc.collect()  # what a handler of signals holds no longer
    assert_ended_well(go(), like=whole)


# The folder of a launch


def folder_of(runtime, config, **environ):
    folder = RunFolder(runtime)
    environ = {f"TORCHELASTIC_{name}": str(value) for name, value in environ.items()}
    folder.locate(config, checkpoint.launch_name(config, folder, environ))
    return folder


def test_a_restart_finds_the_folder_of_its_launch(make_config, runtime, tmp_path):
    config = make_config(RUN_ID="")
    for number, launch in enumerate(["abc", "abcd", "xabc", "abc", "other"]):
        folder = folder_of(runtime, dataclasses.replace(config, run_id=f"made{number}"), RUN_ID=launch)
        folder.create(config, {"train_gpt.py": b""})
        folder.close()
        os.utime(folder.path / "config.env", (1000 - number, 1000 - number))
    (tmp_path / "logs" / "empty").mkdir()
    assert folder_of(runtime, config, RUN_ID="abc", RESTART_COUNT=1).run_id == "made0", "the latest"
    assert folder_of(runtime, config, RUN_ID="abcd", RESTART_COUNT=2).run_id == "made1"
    assert folder_of(runtime, make_config(RUN_ID="mine"), RUN_ID="abc", RESTART_COUNT=1).run_id == "mine"
    for environ in (
        {"RUN_ID": "abc"},
        {"RUN_ID": "abc", "RESTART_COUNT": 0},
        {"RUN_ID": "ab", "RESTART_COUNT": 1},
        {},
        {"RESTART_COUNT": 1},
    ):
        assert re.fullmatch(r"\d{4}(-\d\d){2}_\d\d(-\d\d){2}_\d+", folder_of(runtime, config, **environ).run_id)


def test_a_launch_without_a_name_is_its_agent(make_config, runtime, monkeypatch):
    config = make_config(RUN_ID="")
    folder = folder_of(runtime, config, RUN_ID="none")
    folder.create(config, {"train_gpt.py": b""})
    folder.close()
    assert folder_of(runtime, config, RUN_ID="none", RESTART_COUNT=1).path == folder.path
    monkeypatch.setattr(os, "getpid", lambda: 1)  # a new name would be the same within a second
    assert folder_of(runtime, config, RUN_ID="none", RESTART_COUNT=1).path == folder.path
    parent = os.getppid()
    monkeypatch.setattr(os, "getppid", lambda: parent + 1)
    assert folder_of(runtime, config, RUN_ID="none", RESTART_COUNT=1).path != folder.path


# Memory


@pytest.fixture
def small_memory(monkeypatch):
    """Function: from now on no device holds more than n sequences of a micro-step."""

    def limit(n, error="CUDA out of memory. Tried to allocate 2.00 GiB."):
        forward = train_gpt.GPT.forward

        def limited(self, tokens, targets=None):
            if len(tokens) > n:
                raise torch.OutOfMemoryError(error)
            return forward(self, tokens, targets)

        monkeypatch.setattr(train_gpt.GPT, "forward", limited)

    return limit


TWELVE = {"TRAIN_BATCH_TOKENS": 384, "VAL_BATCH_SIZE": 32, "WARMUP_STEPS": 1}


@pytest.mark.parametrize(
    "fits, tried",
    [
        (12, []),
        (11, [(384, 192, 2)]),
        (3, [(384, 192, 2), (192, 96, 4)]),
        (2, [(384, 192, 2), (192, 96, 4), (96, 32, 12)]),
    ],
)
def test_the_micro_batch_is_halved_until_it_fits(go, small_memory, monkeypatch, fits, tried):
    """And the run is the one with that micro-batch given."""
    small_memory(fits, "CPU allocator: not enough memory" if fits == 3 else "CUDA out of memory. Tried 2.00 GiB.")
    expected = go(RUN_ID="given", **TWELVE, MICRO_BATCH_TOKENS=tried[-1][1] if tried else 384)
    run = go(**TWELVE)
    assert run.code == 0 and scores(run) | {"sha256_artifact": 0} == scores(expected) | {"sha256_artifact": 0}
    assert timeless(run.metrics) == timeless(expected.metrics)
    weights = [torch.load(one.path / "final_model.pt", weights_only=True) for one in (run, expected)]
    assert_same(*map(dict, weights))
    lines = re.findall(
        r"^micro_batch: (\d+) tokens per rank do not fit the memory: trying (\d+), "
        r"grad_accum_steps:(\d+)$",
        run.log,
        re.M,
    )
    assert [tuple(map(int, numbers)) for numbers in lines] == tried
    assert run.result["grad_accum_steps"] == (tried[-1][2] if tried else 1)
    artifact = models.open_artifact(run.path / "final_model.int8.ptz")
    assert int(artifact["config"]["micro_batch_tokens"]) == tried[-1][0] // 2 if tried else True


@pytest.mark.parametrize(
    "knobs, fits, tokens",
    [
        ({"MICRO_BATCH_TOKENS": 192}, 5, 192),
        ({"MICRO_BATCH_TOKENS": 0}, 11, 384),
        ({"GRAD_ACCUM_STEPS": 2}, 5, 192),
        ({}, 0, 32),
    ],
)
def test_a_micro_batch_that_was_asked_for_is_not_changed(go, small_memory, knobs, fits, tokens):
    small_memory(fits)
    run = go(**TWELVE, **knobs)
    assert run.code == 2 and run.result is None
    assert run.err.startswith(f"error: out of memory with micro-steps of {tokens} tokens: use MICRO_BATCH_TOKENS=auto")
    assert "GRAD_ACCUM_STEPS" in run.err and "smaller model" in run.err and run.err.count("\n") == 1


def test_all_ranks_halve_when_one_of_them_lacks_memory(make_config, build, runtime):
    trainer, said = build(make_config()), iter([[1.0], [0.0]])
    runtime.all_reduce = lambda values: next(said)
    checkpoint.fit_memory(trainer)
    assert trainer.loader.accum_steps == 2 and next(said, None) is None


def test_the_trial_leaves_nothing_behind_and_other_errors_are_not_hidden(make_config, build, small_memory):
    trainer = build(make_config())
    before, rng = all_of(trainer), torch.get_rng_state()
    checkpoint.fit_memory(trainer)
    assert_same(all_of(trainer), before)
    assert all(p.grad is None for p in trainer.model.parameters()) and torch.equal(rng, torch.get_rng_state())
    small_memory(1, "no kernel for this")
    with pytest.raises(RuntimeError, match="no kernel"):
        checkpoint.fit_memory(trainer)


def test_the_trial_leaves_room_for_gradients_and_optimizers(make_config, build, monkeypatch):
    """They come into being with the first step only, and take three more of each weight."""
    trainer, taken, most = build(make_config()), [], []
    empty_like, forward = torch.empty_like, train_gpt.GPT.forward
    monkeypatch.setattr(torch, "empty_like", lambda p: taken.append(p.numel()) or empty_like(p))

    def counted(self, *args):
        most.append(sum(taken))
        return forward(self, *args)

    monkeypatch.setattr(train_gpt.GPT, "forward", counted)
    checkpoint.fit_memory(trainer)
    assert most == [3 * sum(p.numel() for p in trainer.model.parameters())]


def test_a_resumed_run_may_need_another_micro_batch(go, stopped, whole, small_memory):
    small_memory(4)
    run = go(VAL_BATCH_SIZE=32)
    assert run.code == 0 and run.result["grad_accum_steps"] == 2 and run.result["resumed_at"] == [3]
    assert run.result["pre_quant_val_loss"] == pytest.approx(whole.result["pre_quant_val_loss"], abs=1e-4)
