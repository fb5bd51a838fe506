"""Checkpoints: a run stopped anywhere ends like an undisturbed one; what may change before it resumes; damaged files;
signals; micro-batches that fit the memory. Runs are made in this process by main()."""

import contextlib
import copy
import gc
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import models
import numpy as np
import pytest
import torch
from conftest import write_shard
from models import open_checkpoint, tree
from runs import fake_clock

import train_gpt
from train_gpt import Evaluator, Stopwatch, TokenStream, Trainer, TrainLoader, UserError

checkpoint = train_gpt.tool("checkpoint")
RunFolder = checkpoint.RunFolder
KNOBS = train_gpt.Config.knobs()
POSIX = pytest.mark.skipif(os.name == "nt", reason="needs signals that Windows lacks")
EVERY_STEP = {"CHECKPOINT_EVERY_SECONDS": 1e-9}
# Six steps, the last half of them in the warmdown, while the momentum is still warming up; three validations.
SHORT = {
    "ITERATIONS": 6,
    "WARMDOWN_FRAC": 0.5,
    "MUON_MOMENTUM_WARMUP_STEPS": 5,
    "VAL_LOSS_EVERY": 2,
    "VAL_TOKENS_LIMIT": 100,
}
SCORES = ("val_loss", "val_bpb", "pre_quant_val_loss", "pre_quant_val_bpb", "sha256_artifact")
COUNTS = ("steps", "train_tokens", "scored_tokens", "scored_bytes", "model_params")


def text_of(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def run_main(corpus, logs, **knobs):
    """The outcome of main() with these knobs, and the contents of the run folder."""
    values = models.tiny_settings(corpus, LOG_DIR=logs, **SHORT | knobs)
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = models.call_main(values)
    path = logs / values["RUN_ID"]
    return SimpleNamespace(
        code=code,
        err=errors.getvalue(),
        path=path,
        checkpoint=path / "checkpoint.pt",
        log=text_of(path / "train.log"),
        metrics=[json.loads(line) for line in text_of(path / "metrics.jsonl").splitlines()],
        result=json.loads(text_of(path / "result.json") or "null"),
    )


@pytest.fixture
def go(corpus, tmp_path):
    return lambda **knobs: run_main(corpus, tmp_path / "logs", **knobs)


def disturb(patch, number: int, action):
    """Do something once, in the middle of this training step (1 is the first)."""
    step, left = Trainer.step, [action]

    def disturbed(self, *args):
        if self.checkpoints.in_training and self.steps + 1 == number and left:
            left.pop()(self)
        return step(self, *args)

    patch.setattr(Trainer, "step", disturbed)


def send(*names):
    """An action that sends these signals to this process."""
    return lambda *args: [os.kill(os.getpid(), getattr(signal, name)) for name in names]


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A finished run."""
    run = run_main(corpus, tmp_path_factory.mktemp("whole"))
    assert (run.code, run.err) == (0, "")
    assert [m["step"] for m in run.metrics if "train_loss" in m] == [1, 2, 3, 4, 5, 6]
    assert [m["step"] for m in run.metrics if "val_loss" in m] == [0, 2, 4, 6]
    assert [m["lr_scale"] for m in run.metrics if "lr_scale" in m] == pytest.approx([1, 1, 1, 1, 2 / 3, 1 / 3])
    return run


@pytest.fixture(scope="module")
def stopped_once(corpus, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        disturb(patch, 3, send("SIGTERM"))
        run = run_main(corpus, tmp_path_factory.mktemp("stopped"))
    assert run.code == 143 and open_checkpoint(run.checkpoint)["steps"] == 3
    return run.path


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """The folder of a run stopped after three steps: a copy, which `go` resumes."""
    return shutil.copytree(stopped_once, tmp_path / "logs" / "run")


def timeless(metrics) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "train_seconds"} for line in metrics]


def trained(run) -> list[dict]:
    return [m for m in timeless(run.metrics) if "train_loss" in m]


def scores(run) -> dict:
    return {name: run.result[name] for name in SCORES + COUNTS}


def assert_ended_well(run, like):
    assert (run.code, run.err) == (0, ""), run.err
    assert scores(run) == scores(like)


def assert_equal(one, other):
    """Bit-exact, through dictionaries and lists."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def assert_one_line(run, *words):
    assert run.code == 2 and run.err.startswith("error: ") and run.err.count("\n") == 1 and run.result is None
    for word in words:
        assert word in run.err


@pytest.fixture
def trainers(monkeypatch):
    """The Trainer of each run, in order."""
    seen, train = [], Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, evaluator: seen.append(self) or train(self, evaluator))
    return seen


def all_of(trainer) -> dict:
    """Every number that the next step depends on, read from the live objects."""
    names = {p: name for name, p in trainer.model.named_parameters()}
    values = {("model", name): t for name, t in trainer.model.state_dict().items()}
    for optimizer in trainer.optimizers:
        for p, state in optimizer.state.items():
            values |= {(type(optimizer).__name__, names[p], key): value for key, value in state.items()}
    values |= {("average", number): tensor for number, tensor in enumerate(trainer.average)}
    return values | {("position",): trainer.loader.position, ("steps",): trainer.steps}


# Bit for bit

SETTINGS = [
    {"EMA_DECAY": 0.9, "TIE_EMBEDDINGS": 0, "GRAD_ACCUM_STEPS": 4, "GRAD_CLIP_NORM": 0.5, "WARMUP_STEPS": 2},
    {"LOADER": "shuffle", "NUM_LAYERS": 1, "NUM_KV_HEADS": 4, "WARMDOWN_FRAC": 1},
]


@pytest.mark.parametrize("knobs", SETTINGS, ids=str)
def test_a_run_resumed_at_any_step_equals_the_undisturbed_one(go, trainers, monkeypatch, tmp_path, knobs):
    """In losses, scores, weights, average, optimizers, data, and random numbers, which each step draws here."""
    step, write, saved = Trainer.step, checkpoint.write_checkpoint, {}

    def keep(state, folder):
        write(state, folder)
        saved[state["steps"]] = (folder.path / "checkpoint.pt").read_bytes()

    def noisy(self, *args):
        metrics = step(self, *args)
        with torch.no_grad():
            self.model.tok_emb.weight.add_(1e-3 * torch.randn_like(self.model.tok_emb.weight))
        return metrics

    monkeypatch.setattr(Trainer, "step", noisy)
    whole = go(RUN_ID="whole", **knobs)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_checkpoint", keep)
        watched = go(RUN_ID="watched", **knobs, **EVERY_STEP)
    assert saved.keys() == {0, 1, 2, 3, 4, 5, 6}
    assert_ended_well(watched, like=whole)
    assert timeless(watched.metrics) == timeless(whole.metrics), "saving changes nothing"
    expected, final = all_of(trainers[0]), open_checkpoint(whole.checkpoint)
    kinds = {"model", "AdamW", "Muon", "position", "steps"} | ({"average"} if "EMA_DECAY" in knobs else set())
    assert {kind for kind, *_ in expected} == kinds
    for number, blob in saved.items():
        path = tmp_path / "checkpoint.pt"
        path.write_bytes(blob)
        resumed = go(RUN_ID=f"from{number}", RESUME=path, **knobs)
        assert_ended_well(resumed, like=whole)
        assert f"\nresumed: step:{number} from {path} train_time:" in resumed.log
        assert resumed.result["resumed_at"] == [number]
        assert_equal(all_of(trainers[-1]), expected)
        # From the last step on nothing is trained, so nothing is saved.
        again = open_checkpoint(resumed.checkpoint) if number < 6 else final
        assert_equal(
            *({name: state[name] for name in ("model", "average", "optimizer", "rng")} for state in (again, final))
        )
        for name in ("position", "steps", "finished", "knobs", "format"):
            assert again[name] == final[name], name
        left = [m for m in whole.metrics if m["step"] > number or m["step"] == number and "val_loss" in m]
        assert timeless(resumed.metrics) == timeless(left)


@POSIX
def test_a_run_that_signals_stop_again_and_again_goes_on_each_time(go, whole, monkeypatch):
    for step, name, code in ((1, "SIGTERM", 143), (3, "SIGINT", 130), (4, "SIGHUP", 129), (6, "SIGTERM", 143)):
        with monkeypatch.context() as patch:
            disturb(patch, step, send(name))
            run = go()
        assert (run.code, run.result) == (code, None) and open_checkpoint(run.checkpoint)["steps"] == step
        assert run.err == f"stopped by {name}: RUN_ID=run goes on with it\n" and run.log.endswith(run.err)
        assert f"\ncheckpoint: saved step:{step} " in run.log
    run = go()
    assert_ended_well(run, like=whole)
    assert run.result["resumed_at"] == [1, 3, 4, 6] and trained(run) == trained(whole)
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


def test_the_generators_of_cpu_and_gpu_are_restored(make_config, build, runtime, monkeypatch):
    trainer, given = build(make_config()), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([1, 2, 3], dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: given.append(state.tolist()))
    runtime.device = torch.device("cuda")  # as far as the generators are concerned
    state = trainer.checkpoints.state(trainer)
    drawn = torch.rand(5)
    torch.rand(100)
    trainer.checkpoints.restore(trainer, state)
    assert torch.equal(torch.rand(5), drawn) and given == [[1, 2, 3]]
    runtime.device = torch.device("cpu")  # resumes a checkpoint saved on a GPU
    trainer.checkpoints.restore(trainer, state)
    runtime.device = torch.device("cuda")
    del state["rng"][0]["cuda"]  # and vice versa
    trainer.checkpoints.restore(trainer, state)
    assert len(given) == 1
    # Each rank gets its own, as far as the saved states suffice.
    state["rng"] = [{"cpu": torch.Generator().manual_seed(seed).get_state()} for seed in (1, 2)]
    for runtime.rank in (0, 1, 2):
        trainer.checkpoints.restore(trainer, state | {"optimizer": {}, "steps": 0})
        assert torch.equal(torch.get_rng_state(), state["rng"][runtime.rank % 2]["cpu"])


def test_the_step_count_of_adam_stays_exact_beside_bf16_moments(make_config, build):
    """bfloat16 cannot represent 257, and the moments of a bfloat16 parameter have its dtype."""
    trainer, other = build(make_config()), build(make_config())
    for one in (trainer, other):
        one.model.tok_emb.to(torch.bfloat16)
    trainer.step(1.0, 0.9)
    trainer.steps = 257
    adam = trainer.optimizers[0].state[trainer.model.tok_emb.weight]
    adam["step"].fill_(257)
    assert adam["exp_avg"].dtype == torch.bfloat16
    other.checkpoints.restore(other, trainer.checkpoints.state(trainer))
    assert_equal(all_of(other), all_of(trainer))
    other.step(1.0, 0.9)


def test_a_checkpoint_waits_for_the_last_loss_and_copies_the_state(make_config, build):
    """The file is written while training continues."""
    trainer = build(make_config(EMA_DECAY=0.9))
    trainer.step(1.0, 0.9)
    state = trainer.checkpoints.state(trainer)
    parts = {name: state[name] for name in ("model", "average", "optimizer")}
    frozen = copy.deepcopy(parts)
    trainer.step(1.0, 0.9)
    trainer.average[0].add_(1)
    assert_equal(parts, frozen)
    assert not torch.equal(state["model"]["tok_emb.weight"], trainer.model.tok_emb.weight)
    trainer.queue.append((1, {"train_loss": None}, ["train_loss"], torch.tensor([math.nan]), None))
    with pytest.raises(UserError, match="step 1: the loss is nan"):
        trainer.checkpoints.save(trainer, wait=True)
    assert trainer.checkpoints.written is None


# The clock


@pytest.fixture
def clock(monkeypatch):
    return fake_clock(monkeypatch)


CLOCKED = {"ITERATIONS": 1000, "WARMUP_STEPS": 2, "VAL_LOSS_EVERY": 0}


@pytest.mark.parametrize("limit, warmup_steps, cut", [(10, 2, 1), (10, 0, 5), (9.5, 0, 8), (9.5, 2, 9)])
def test_the_clock_continues_where_it_stood(go, clock, monkeypatch, limit, warmup_steps, cut):
    """The time between two processes and the time to write the last checkpoint do not count. Regression: without a
    warm-up, a resumed run did not know yet how long a step takes."""
    capped = CLOCKED | {"MAX_WALLCLOCK_SECONDS": limit, "WARMUP_STEPS": warmup_steps}
    clock.slow(checkpoint, "write_checkpoint", 1000)
    disturb(monkeypatch, cut, send("SIGTERM"))
    assert go(**capped).code == 143
    clock.now += 5000
    run = go(**capped)
    assert run.code == 0 and run.result["resumed_at"] == [cut] and not run.result["over_clock"]
    assert run.result["steps"] == run.result["seconds"]["training"] == 9 <= limit
    steps = [m for m in run.metrics if "train_loss" in m]
    assert [m["train_seconds"] for m in steps] == list(range(1, 10))
    assert [m["lr_scale"] for m in steps] == pytest.approx([min(1, (1 - s / limit) / 0.5) for s in range(9)])
    assert re.search(rf"^resumed: step:{cut} from \S+ train_time:{cut}000ms$", run.log, re.MULTILINE)
    assert "\nstopping_early: wallclock_cap train_time:9000ms step:9/1000\n" in run.log


@pytest.mark.parametrize(
    "limit, knobs, expected",
    [
        (301, {}, [3, 6, 9, 12, 15]),
        (300, {}, [14]),
        (0, {"ITERATIONS": 8}, [8]),
        (301, {"CHECKPOINT_EVERY_SECONDS": 0}, [15]),
        (0, {"ITERATIONS": 8, "CHECKPOINT_EVERY_SECONDS": 50}, [3, 6, 8]),
        (100, {"CHECKPOINT_EVERY_SECONDS": 40}, [2, 4]),
    ],
)
def test_when_a_checkpoint_is_due(go, clock, limit, knobs, expected):
    """By default every minute of training if the limit is over five minutes, else only at the end."""
    clock.steps = itertools.repeat(20.0)
    run = go(**CLOCKED | {"MAX_WALLCLOCK_SECONDS": limit} | knobs)
    lines = re.findall(r"^checkpoint: saved step:(\d+) bytes:(\d+) write_time:\d+ms$", run.log, re.MULTILINE)
    assert [int(step) for step, _ in lines] == expected and int(lines[-1][1]) == run.checkpoint.stat().st_size
    assert re.findall(r"^checkpoint: writing step:(\d+)$", run.log, re.MULTILINE) == [step for step, _ in lines]
    seconds = [m["train_seconds"] for m in run.metrics if "train_loss" in m]
    assert seconds == [20.0 * step for step in range(1, expected[-1] + 1)]


@pytest.mark.parametrize("limit", [13.5, 15.5, 18, 18.5, 20.5, 21, 27.5])
def test_the_pause_of_a_checkpoint_is_training_time_but_no_part_of_a_step(go, clock, trainers, limit):
    """2 s every 5 s, but not right before the end, where it could exceed the limit (regression). If it counted as part
    of a step, it would end the run earlier."""
    clock.slow(checkpoint.Checkpoints, "state", 2)
    run = go(**CLOCKED | {"MAX_WALLCLOCK_SECONDS": limit, "CHECKPOINT_EVERY_SECONDS": 5})
    assert set(trainers[0].step_seconds) == {1.0}
    assert limit - 1.5 < run.result["seconds"]["training"] <= limit and not run.result["over_clock"]


# A finished run


def test_a_run_that_is_killed_after_its_training_resumes_there(go, whole, monkeypatch):
    """Right after the last validation (regression: the export continued, without a score), in the export, and in the
    final evaluation."""
    train, export, score, calls = Trainer.train, train_gpt.export, Evaluator.score, itertools.count(1)

    def killed_at_the_second(self, *args, **options):
        if next(calls) == 2:  # the first repeats the validation before the export
            send("SIGINT")()
        return score(self, *args, **options)

    for owner, name, killed, code, exported in (
        (Trainer, "train", lambda *args: [train(*args), send("SIGTERM")()], 143, False),
        (train_gpt, "export", lambda *args: send("SIGTERM")() and export(*args), 143, False),
        (Evaluator, "score", killed_at_the_second, 130, True),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            run = go(WARMUP_STEPS=2)
        assert run.code == code and run.result is None and open_checkpoint(run.checkpoint)["finished"] is True
        assert (run.path / "final_model.int8.ptz").exists() == exported
    monkeypatch.setattr(Trainer, "step", None)  # nothing is left to train or warm up
    run = go(WARMUP_STEPS=2)
    assert_ended_well(run, like=whole)
    assert len(re.findall(r"^resumed: step:6 from .* finished$", run.log, re.MULTILINE)) == 3
    assert run.result["resumed_at"] == [6]
    assert {path.name for path in run.path.iterdir()} == {path.name for path in whole.path.iterdir()}


@pytest.mark.parametrize(
    "first, longer",
    [
        ({"ITERATIONS": 4}, {"ITERATIONS": 6}),
        ({"MAX_WALLCLOCK_SECONDS": 4.5}, {"MAX_WALLCLOCK_SECONDS": 0}),
        ({"MAX_WALLCLOCK_SECONDS": 4.5}, {"MAX_WALLCLOCK_SECONDS": 99}),
    ],
)
def test_more_steps_or_time_continue_a_finished_run(go, clock, first, longer):
    constant = {"WARMDOWN_FRAC": 0, "WARMUP_STEPS": 2}
    whole, short = go(RUN_ID="whole", **constant | longer), go(RUN_ID="short", **constant | first)
    assert (whole.result["steps"], short.result["steps"]) == (6, 4)
    run = go(RUN_ID="longer", RESUME=short.path, **constant | longer)
    assert_ended_well(run, like=whole)
    assert run.result["resumed_at"] == [4] and run.result["seconds"]["training"] == 6
    assert trained(run) == trained(whole)[4:]


# Which knobs may change

# Where things are, what is logged and validated, how a step is split, and what happens after training.
FREE = """MODE DATA_PATH TOKENIZER_PATH MODEL_FILE LOG_DIR RUN_ID CHECKPOINT_EVERY_SECONDS RESUME RESUME_FORCE DEVICE
    COMPILE ATTENTION TARGET_WORLD_SIZE WARMUP_STEPS GRAD_ACCUM_STEPS MICRO_BATCH_TOKENS TRAIN_LOG_EVERY VAL_LOSS_EVERY
    VAL_AT_START VAL_BATCH_SIZE VAL_TOKENS_LIMIT EVAL_STRIDE ARTIFACT""".split()


def differences(then: dict[str, str], config) -> list[str]:
    blob = models.seal_checkpoint({"format": checkpoint.CHECKPOINT_FORMAT, "knobs": then})
    return checkpoint.read_checkpoint(blob, "FILE", config, {})[1]


def test_a_knob_that_shapes_the_result_must_not_change(make_config):
    config, free = make_config(), set()
    for name, field in KNOBS.items():
        old = getattr(config, field.name)
        new = not old if isinstance(old, bool) else old + ("x" if isinstance(old, str) else 1)
        changed = replace(config, **{field.name: new})
        try:
            assert differences(config.as_env(), changed) == []
            free.add(name)
        except UserError as error:
            said = f"{name} was {config.as_env()[name]}, is {changed.as_env()[name]}"
            assert str(error).startswith(f"FILE is of another run: {said}: change that back")
            assert "RESUME_FORCE=1" in str(error) and "RUN_ID" in str(error) and "\n" not in str(error)
            assert differences(config.as_env(), replace(changed, resume_force=True)) == [said]
    assert free == {*FREE, "ITERATIONS"}  # more iterations are allowed; but 1 s is less than 0, which is no limit
    older = {name: text for name, text in config.as_env().items() if name != "SEED"}
    with pytest.raises(UserError, match="FILE is of another run: SEED was unset, is 1337"):
        differences(older, config)


def test_knobs_that_moved_to_model_files_may_be_off(make_config):
    """An old checkpoint contains all of them."""
    check, config = train_gpt.tool("check"), make_config(RESUME_FORCE=1)
    before = config.as_env() | check.MOVED | dict.fromkeys(check.SAMPLE_KNOBS, "5")
    assert differences(before, config) == differences(before | {"CLIP_ATTN": "0"}, config) == []
    assert differences(before | {"XSA_LAYERS": "4"}, config) == ["XSA_LAYERS was 4, is unset"]
    frontier, _ = models.model_file("frontier")
    config = frontier.load([], config.as_env() | {"XSA_LAYERS": "4", "RESUME_FORCE": "1"})
    assert differences(config.as_env() | before, config) == ["XSA_LAYERS was 0, is 4"], (
        "a model with the knob compares it"
    )


def test_a_run_may_get_longer_and_not_shorter(make_config):
    """A limit of 0 is no limit."""
    clock = "MAX_WALLCLOCK_SECONDS"
    for old, new in ((60, 60.5), (60, 0)):
        assert differences(make_config(**{clock: old}).as_env(), make_config(**{clock: new})) == []
    for name, old, new in ((clock, 60, 59.5), (clock, 0, 1e9), ("ITERATIONS", 5, 4)):
        with pytest.raises(UserError, match=f"FILE is of another run: {name} was "):
            differences(make_config(**{name: old}).as_env(), make_config(**{name: new}))


def test_changed_knobs_are_refused_and_listed_unless_forced(go, stopped, whole):
    before, changes = tree(stopped), {"MATRIX_LR": 0.5, "SEED": 3, "ITERATIONS": 5}
    said = "ITERATIONS was 6, is 5; MATRIX_LR was 0.02, is 0.5; SEED was 1337, is 3"
    assert_one_line(go(**changes), said)
    assert_one_line(go(MODEL_DIM=64, RESUME_FORCE=1), f"error: {stopped / 'checkpoint.pt'} ")  # cannot be forced
    assert tree(stopped) == before
    run = go(**changes, RESUME_FORCE=1)
    assert run.code == 0 and re.search(rf"^resumed: step:3 from \S+ train_time:\d+ms; {said}$", run.log, re.MULTILINE)
    assert run.result["steps"] == 5 and run.result["val_loss"] != whole.result["val_loss"]


def test_free_knobs_may_change(go, stopped, whole):
    run = go(TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=5, WARMUP_STEPS=1, **EVERY_STEP)
    assert_ended_well(run, like=whole)
    assert [m["step"] for m in run.metrics if "val_loss" in m] == [0, 2, 5, 6]
    assert re.findall("saved step:(.)", run.log) == ["3", "4", "5", "6"], "step 3 is not saved again"


def test_an_average_that_begins_or_ends_by_force(go, stopped, tmp_path):
    """It starts with the weights of the checkpoint."""
    begun = go(EMA_DECAY=0.9, RESUME_FORCE=1)
    assert begun.code == 0 and "; EMA_DECAY was 0.0, is 0.9\n" in begun.log
    ended = go(RUN_ID="ended", RESUME=begun.path, RESUME_FORCE=1)
    assert ended.code == 0 and "; EMA_DECAY was 0.9, is 0.0\n" in ended.log


def test_other_training_data_is_noticed(go, stopped, whole, corpus, tmp_path):
    """Regression: equal token counts were taken for equal tokens."""
    data = shutil.copytree(corpus / "data", tmp_path / "data")
    path = data / "fineweb_train_000000.bin"
    tokens = np.fromfile(path, dtype="<u2", offset=1024).tolist()
    for changed in ([*tokens, 5], [tokens[0] + 1, *tokens[1:]]):
        write_shard(path, changed)
        assert re.search("another run: training [^;]* was [^;]*, is [^;]*: change that back", go(DATA_PATH=data).err)
    write_shard(path, tokens)
    assert_ended_well(go(DATA_PATH=data), like=whole)  # the same data in another place


# RESUME


@pytest.mark.parametrize("resume, at", [("auto", []), ("PATH", [3])])
def test_a_run_that_died_before_its_first_checkpoint_starts_again(go, whole, stopped, tmp_path, resume, at):
    path = tmp_path / "logs" / "young"
    path.mkdir()
    (path / "train.log").write_text("step:1\n")
    run = go(RUN_ID="young", RESUME=stopped if resume == "PATH" else resume)
    assert_ended_well(run, like=whole)
    assert run.log.startswith("step:1\n") and run.result["resumed_at"] == at


def test_the_checkpoint_in_its_own_folder_goes_before_that_of_resume(go, whole, stopped, monkeypatch):
    """A run that started with RESUME=PATH is restarted with the same command when it dies."""
    disturb(monkeypatch, 5, send("SIGTERM"))
    again = {"RUN_ID": "again", "RESUME": stopped}
    assert go(**again).code == 143
    run = go(**again)
    assert_ended_well(run, like=whole)
    assert run.result["resumed_at"] == [3, 5]


# Damaged files; tests/test_bad_input.py and tests/test_properties.py have more of them


EMB, FC = "tok_emb.weight", "blocks.0.mlp.fc.weight"
KEYS = "format knobs model average optimizer rng position steps train_seconds finished resumed_at recent".split()
BROKEN = [
    lambda state: state.pop("average"),
    lambda state: state.pop("recent"),
    lambda state: state.update(average=[torch.ones(1)]),
    lambda state: state.update(recent="x"),
    lambda state: state.update(train_seconds=1),
    # Regression: missing state was taken for zeros, or the optimizer noticed it only in the first step.
    lambda state: state["optimizer"].pop(EMB),
    lambda state: state["optimizer"].update({FC: {}}),
    lambda state: state["optimizer"][EMB].pop("exp_avg_sq"),
    lambda state: state["optimizer"][EMB].update(step=torch.zeros(320, 32)),
    lambda state: state["optimizer"][EMB].update(step=3.0),
    lambda state: state["optimizer"][FC].update(momentum_buffer=state["optimizer"][FC]["momentum_buffer"].T),
    lambda state: state["rng"][0].update(cpu=torch.zeros(8)),
    lambda state: state["rng"][0].pop("cpu"),
]


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_an_incomplete_checkpoint_is_refused_although_its_checksum_is_right(go, stopped, tmp_path, number):
    state, path = open_checkpoint(stopped / "checkpoint.pt"), tmp_path / "broken.pt"
    assert state.keys() == set(KEYS)
    BROKEN[number](state)
    path.write_bytes(models.seal_checkpoint(state))
    run = go(RUN_ID="new", RESUME=path, EMA_DECAY=0.9, RESUME_FORCE=1)
    assert_one_line(run, str(path))
    assert len(run.err) < 500 and not run.path.exists()


# Writing


@pytest.mark.parametrize(
    "owner, failing, others", [(os, "fsync", 2), (os, "replace", 2), (checkpoint, "matches_checksum", 0)]
)
def test_a_disk_that_fails_costs_the_checkpoint_and_not_the_run(go, whole, monkeypatch, owner, failing, others):
    """Or a disk that stores something else. Two other files are written before."""
    real, count = getattr(owner, failing), itertools.count(1 - others)

    def fail(*args):
        if next(count) not in (3, 4, 7):  # the checkpoints of steps 2, 3 and 6
            return real(*args)
        if owner is os:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, failing, fail)
    run = go(**EVERY_STEP)
    assert_ended_well(run, like=whole)
    reason = ".*No space left.*" if owner is os else "it does not hold what was written to it: check the disk"
    warnings = re.findall(rf"^warning: no checkpoint of step (\d) \({reason}\): the one before", run.log, re.M)
    assert warnings == ["2", "3", "6"] and re.findall("saved step:(.)", run.log) == ["0", "1", "4", "5"]
    state = open_checkpoint(run.checkpoint)
    assert state["steps"] == 5 and not state["finished"] and not [*run.path.glob(".*")]


@pytest.mark.parametrize("where, value", [("weights", math.nan), ("weights", math.inf), ("loss", math.inf)])
def test_what_is_not_finite_never_replaces_the_last_good_checkpoint(go, whole, monkeypatch, where, value):
    step, write = Trainer.step, checkpoint.write_checkpoint

    def poisoned(self, *args):
        metrics = step(self, *args)
        if self.steps + 1 == 4 and where == "loss":
            return metrics | {"train_loss": torch.tensor(value)}
        if self.steps + 1 == 4:
            self.model.blocks[1].mlp.fc.weight.data[3, 5] = value
        return metrics

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_checkpoint", lambda *args: time.sleep(0.2) or write(*args))
        patch.setattr(Trainer, "step", poisoned)
        run = go(**EVERY_STEP)
    assert_one_line(run, "error: step 4: ", "lower the learning rates" if where == "weights" else "lower MATRIX_LR")
    assert not [*run.path.glob("final_model*")] and open_checkpoint(run.checkpoint)["steps"] == 3
    assert run.log.endswith(run.err), "the log ends with the reason, after what was still being written"
    run = go()
    assert_ended_well(run, like=whole)
    assert run.result["resumed_at"] == [3]


# Signals


@POSIX
def test_usr1_saves_and_a_terminal_closed_under_nohup_changes_nothing(go, whole, monkeypatch):
    """USR1 during training and before it, which saves the initial state. nohup ignores HUP before the script starts."""
    fit = checkpoint.fit_memory
    monkeypatch.setattr(checkpoint, "fit_memory", lambda trainer: send("SIGUSR1")() and fit(trainer))
    disturb(monkeypatch, 3, send("SIGUSR1"))
    disturb(monkeypatch, 4, send("SIGHUP"))
    with models.signals_restored():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        run = go()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert_ended_well(run, like=whole)
    assert timeless(run.metrics) == timeless(whole.metrics)
    assert re.findall("^checkpoint: saved step:(.)", run.log, re.M) == ["0", "3", "6"]


@pytest.mark.parametrize("second, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_second_signal_ends_at_once(go, monkeypatch, second, code):
    disturb(monkeypatch, 3, send("SIGTERM", second))
    run = go()
    assert run.code == code and not run.checkpoint.exists() and run.result is None
    assert run.log.endswith(f"stopped by {second}: RUN_ID=run goes on with it\n")
    assert [m["step"] for m in trained(run)] == [1, 2]


@pytest.mark.parametrize("place, folder", [("open_text", False), ("build_model", False), ("export", True)])
def test_outside_of_the_training_the_first_signal_ends_at_once(go, monkeypatch, place, folder):
    real = getattr(train_gpt, place)
    monkeypatch.setattr(train_gpt, place, lambda *args: send("SIGTERM")() and real(*args))
    run = go()
    assert run.code == 143 and run.result is None and run.path.exists() == folder
    assert run.err == "stopped by SIGTERM" + ": RUN_ID=run goes on with it" * folder + "\n"


@POSIX
@pytest.mark.parametrize(
    "name, validation, step",
    [("SIGTERM", 1, 0), ("SIGINT", 3, 4), ("SIGHUP", 4, 6), ("SIGUSR1", 3, 4), ("SIGUSR1", 4, 6)],
)
def test_a_signal_during_a_validation(go, whole, monkeypatch, name, validation, step):
    """A run that stops discards the validation, and repeats it when it continues."""
    number, batches, calls = getattr(signal, name), Evaluator.batches, itertools.count(1)

    def disturbed(self, *args):
        call = next(calls)
        for index, batch in enumerate(batches(self, *args)):
            if call == validation + 1 and index == 2:  # the first call is the warm-up's
                os.kill(os.getpid(), number)
            yield batch

    monkeypatch.setattr(Evaluator, "batches", disturbed)
    run = go(VAL_BATCH_SIZE=32)  # one window at a time
    if name != "SIGUSR1":
        state = open_checkpoint(run.checkpoint)
        assert run.code == 128 + number and state["steps"] == step and state["finished"] == (step == 6)
        assert [m["step"] for m in run.metrics if "val_loss" in m] == [0, 2, 4][: validation - 1]
        run = go(VAL_BATCH_SIZE=32)
        assert run.result["resumed_at"] == [step]
    undisturbed = go(RUN_ID="undisturbed", VAL_BATCH_SIZE=32)
    assert_ended_well(run, like=undisturbed)
    assert timeless(run.metrics) == timeless(undisturbed.metrics), "each validation is there once"


# One process per run


def test_two_processes_cannot_use_one_folder(go, make_config, runtime, stopped, whole, monkeypatch):
    """Regression: the error of the second was written into the log of the first. The lock ends with its process."""
    pytest.importorskip("fcntl")
    other = RunFolder(runtime)
    other.locate(make_config())
    other.create(make_config(), {"train_gpt.py": b"code"})
    before = tree(stopped)
    assert_one_line(go(), "RUN_ID=run", "another run is using it")
    assert tree(stopped) == before, "not even a line in the log of the other"
    other.close()

    def die(trainer):
        raise BaseException("killed")

    with monkeypatch.context() as patch, pytest.raises(BaseException, match="killed"):
        disturb(patch, 5, die)
        go()
    gc.collect()  # objects that no signal handler refers to any more
    assert_ended_well(go(), like=whole)


def folder_of(runtime, config, **environ):
    folder = RunFolder(runtime)
    environ = {f"TORCHELASTIC_{name}": str(value) for name, value in environ.items()}
    folder.locate(config, checkpoint.launch_name(config, folder, environ))
    return folder


def test_a_restart_finds_the_folder_of_its_launch(make_config, runtime, tmp_path, monkeypatch):
    config = make_config(RUN_ID="")
    for number, launch in enumerate(["abc", "abcd", "xabc", "abc", "other", "none"]):
        folder = folder_of(runtime, replace(config, run_id=f"made{number}"), RUN_ID=launch)
        folder.create(config, {"train_gpt.py": b""})
        folder.close()
        os.utime(folder.path / "config.env", (1000 - number, 1000 - number))
    (tmp_path / "logs" / "empty").mkdir()
    for launch, found in (("abc", "made0"), ("abcd", "made1"), ("none", "made5")):  # the latest of its name
        assert folder_of(runtime, config, RUN_ID=launch, RESTART_COUNT=1).run_id == found
    assert folder_of(runtime, make_config(RUN_ID="mine"), RUN_ID="abc", RESTART_COUNT=1).run_id == "mine"
    monkeypatch.setattr(os, "getppid", lambda: 1)  # a launch without a name is identified by its agent
    for launch, restarts in (("abc", 0), ("ab", 1), ("none", 1)):
        new = folder_of(runtime, config, RUN_ID=launch, RESTART_COUNT=restarts).run_id
        assert re.fullmatch(r"\d{4}(-\d\d){2}_\d\d(-\d\d){2}_\d+", new)


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
    "fits, error, tried",
    [
        (12, "", []),
        (3, "CPU allocator: not enough memory", [(384, 192, 2), (192, 96, 4)]),
        (2, "CUDA out of memory. Tried to allocate 2.00 GiB.", [(384, 192, 2), (192, 96, 4), (96, 32, 12)]),
    ],
)
def test_the_micro_batch_is_halved_until_it_fits(go, small_memory, fits, error, tried):
    """The run equals one with that micro-batch given."""
    small_memory(fits, error)
    expected = go(RUN_ID="given", **TWELVE, MICRO_BATCH_TOKENS=tried[-1][1] if tried else 384)
    run = go(**TWELVE)
    assert run.code == 0 and scores(run) | {"sha256_artifact": 0} == scores(expected) | {"sha256_artifact": 0}
    assert timeless(run.metrics) == timeless(expected.metrics)
    assert_equal(*(dict(torch.load(one.path / "final_model.pt", weights_only=True)) for one in (run, expected)))
    line = r"^micro_batch: (\d+) tokens per rank do not fit the memory: trying (\d+), grad_accum_steps:(\d+)$"
    assert [tuple(map(int, found)) for found in re.findall(line, run.log, re.MULTILINE)] == tried
    assert run.result["grad_accum_steps"] == (tried[-1][2] if tried else 1)
    told = models.open_artifact(run.path / "final_model.int8.ptz")["config"]["micro_batch_tokens"]
    assert told == (str(tried[-1][0] // 2) if tried else "auto")


def test_a_micro_batch_that_was_asked_for_is_not_changed(go, small_memory):
    small_memory(5)
    for number, knobs in enumerate(({"MICRO_BATCH_TOKENS": 192}, {"GRAD_ACCUM_STEPS": 2}, {"MICRO_BATCH_TOKENS": 0})):
        said = f"error: out of memory with micro-steps of {384 if number == 2 else 192} tokens: use MICRO_BATCH_TOKENS"
        assert_one_line(go(RUN_ID=f"{number}", **TWELVE, **knobs), said, "GRAD_ACCUM_STEPS", "smaller model")
    small_memory(0)
    assert_one_line(go(RUN_ID="none", **TWELVE), "error: out of memory with micro-steps of 32 tokens")


def test_the_trial_leaves_nothing_behind_and_hides_no_other_error(make_config, build, runtime, small_memory):
    """All ranks halve the micro-batch if one of them lacks memory."""
    trainer, lacking = build(make_config()), iter([[1.0], [0.0]])
    before, rng = all_of(trainer), torch.get_rng_state()
    runtime.all_reduce = lambda values: next(lacking)
    checkpoint.fit_memory(trainer)
    assert trainer.loader.accum_steps == 2 and next(lacking, None) is None
    assert_equal(all_of(trainer), before)
    assert all(p.grad is None for p in trainer.model.parameters()) and torch.equal(rng, torch.get_rng_state())
    small_memory(1, "no kernel for this")
    with pytest.raises(RuntimeError, match="no kernel"):
        checkpoint.fit_memory(trainer)


@pytest.mark.parametrize("ema_decay, copies", [(0, 3), (0.9, 4)])
def test_the_trial_leaves_room_for_gradients_optimizers_and_average(make_config, build, monkeypatch, ema_decay, copies):
    trainer, taken, most = build(make_config(EMA_DECAY=ema_decay)), [], []
    empty_like, forward = torch.empty_like, train_gpt.GPT.forward
    monkeypatch.setattr(torch, "empty_like", lambda p: taken.append(p.numel()) or empty_like(p))
    monkeypatch.setattr(train_gpt.GPT, "forward", lambda *args: most.append(sum(taken)) or forward(*args))
    checkpoint.fit_memory(trainer)
    assert most == [copies * sum(p.numel() for p in trainer.model.parameters())]


def test_a_resumed_run_may_need_another_micro_batch(go, stopped, whole, small_memory):
    small_memory(4)
    run = go(VAL_BATCH_SIZE=32)
    assert run.code == 0 and run.result["grad_accum_steps"] == 2 and run.result["resumed_at"] == [3]
    assert run.result["pre_quant_val_loss"] == pytest.approx(whole.result["pre_quant_val_loss"], abs=1e-4)
