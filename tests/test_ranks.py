"""Ranks: any number of processes trains and scores as one does, with accumulation, clipping and uneven validation; goes
on from what any number has saved; and outlives the death of one."""

import hashlib
import io
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch

import train_gpt

checkpoint = train_gpt.tool("checkpoint")
# 12 sequences a step; 7 validation windows, which neither 2 nor 3 ranks share evenly, the last of them ragged.
COMMON = {
    "ITERATIONS": 10,
    "TRAIN_LOG_EVERY": 1,
    "TRAIN_BATCH_TOKENS": 384,
    "WARMUP_STEPS": 1,
    "VAL_LOSS_EVERY": 5,
    "VAL_TOKENS_LIMIT": 6 * 32 + 5,
    "VAL_BATCH_SIZE": 64,
    "NUM_LAYERS": 3,
}


def read_run(settings):
    path = Path(settings["LOG_DIR"]) / settings["RUN_ID"]
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return metrics, json.loads((path / "result.json").read_text()), path


@pytest.fixture
def alone(tiny, monkeypatch, tmp_path):
    """Function: the same run in this one process; (metrics, result, run folder)."""

    def start(**overrides):
        settings = tiny(**overrides, LOG_DIR=tmp_path / "alone")
        for name in train_gpt.Config.knobs():
            monkeypatch.delenv(name, raising=False)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        assert train_gpt.main([]) == 0
        return read_run(settings)

    yield start
    for switch in ("flash", "cudnn", "mem_efficient", "math"):  # a run pins torch's global attention switches
        getattr(torch.backends.cuda, f"enable_{switch}_sdp")(True)


@pytest.mark.parametrize(
    "ranks, settings",
    [
        (2, {"GRAD_CLIP_NORM": 0.5, "GRAD_ACCUM_STEPS": 3}),
        (3, {"EVAL_STRIDE": 20}),
    ],
)
def test_ranks_train_and_score_as_one_process(tiny, launch, alone, ranks, settings):
    done = launch(ranks=ranks, **COMMON, **settings)
    assert done.returncode == 0, done.stderr
    metrics, result, path = read_run(tiny())
    expected_metrics, expected, _ = alone(**COMMON | settings | {"GRAD_ACCUM_STEPS": 0})
    losses, expected_losses = (
        [m["train_loss"] for m in lines if "train_loss" in m] for lines in (metrics, expected_metrics)
    )
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.5
    assert losses == pytest.approx(expected_losses, abs=1e-4)
    for name in ("val_loss", "val_bpb", "pre_quant_val_loss", "pre_quant_val_bpb"):
        assert result[name] == pytest.approx(expected[name], abs=1e-4), name
    for name in ("scored_tokens", "scored_bytes", "train_tokens", "steps", "model_params"):
        assert result[name] == expected[name], name
    assert result["world_size"] == ranks and expected["world_size"] == 1
    # Only rank 0 speaks: every step once, on the screen and in the log.
    for text in (done.stdout, (path / "train.log").read_text()):
        assert re.findall(r"^step:(\d+)/10 train_loss", text, re.MULTILINE) == [str(step) for step in range(1, 11)]
        assert f"\nworld_size:{ranks} grad_accum_steps:{settings.get('GRAD_ACCUM_STEPS', 1)}\n" in text


def test_a_single_layer_without_skips_trains_on_two_ranks(tiny, launch):
    """Its skip_weights are empty and get no gradient: the reduction over ranks must not wait for one."""
    done = launch(ranks=2, NUM_LAYERS=1, ITERATIONS=3, VAL_TOKENS_LIMIT=50)
    assert done.returncode == 0, done.stderr
    losses = [m["train_loss"] for m in read_run(tiny())[0] if "train_loss" in m]
    assert len(losses) == 3 and losses[2] < losses[0]


def test_an_error_of_rank_0_alone_ends_the_run(launch, tmp_path):
    """The other rank waits in a collective for it, and must not keep it waiting in turn."""
    (tmp_path / "logs" / "run").mkdir(parents=True)
    done = launch(ranks=2, timeout=120)
    assert done.returncode == 1, "torchrun's own code"
    assert done.stderr.count("error: ") == 1 and "is no run folder" in done.stderr
    assert not list((tmp_path / "logs" / "run").iterdir())


# Checkpoints: a rank is disturbed in the middle of a step, by the environment


DRIVER = f"""
import json, os, shutil, signal, sys, time
sys.path.insert(0, {str(Path(train_gpt.__file__).parent)!r})
import train_gpt
checkpoint = train_gpt.tool("checkpoint")

rank, restarts = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
faults = json.loads(os.environ["FAULTS"])  # [restarts, rank, step, signal, whether to the launcher]
step, write = train_gpt.Trainer.step, checkpoint.write_checkpoint

def disturbed(self, *args):
    for *when, number, to_launcher in faults:
        if when == [restarts, rank, self.steps + 1] and self.checkpoints.in_training:
            os.kill(os.getppid() if to_launcher else os.getpid(), number)
    time.sleep(float(os.environ.get("SLOW_STEP", 0)))
    return step(self, *args)

def slow(state, folder):
    time.sleep(float(os.environ.get("SLOW_DISK", 0)))
    write(state, folder)
    shutil.copy(folder.path / "checkpoint.pt", folder.path / f"checkpoint{{state['steps']}}.pt")

train_gpt.Trainer.step, checkpoint.write_checkpoint = disturbed, slow
dist, leave = train_gpt.dist, os._exit
init, os._exit = dist.init_process_group, lambda code: None
dist.init_process_group = lambda backend, **options: dist.is_initialized() or init(backend, **options)
for run in json.loads(os.environ.get("RUNS", "[{{}}]")):  # several with the same processes: to start them takes longest
    os.environ.update(run)
    code = train_gpt.main([])
leave(code)
"""
STEPS = {
    "ITERATIONS": 10,
    "VAL_LOSS_EVERY": 5,
    "VAL_TOKENS_LIMIT": 100,
    "TRAIN_BATCH_TOKENS": 384,
    "NUM_LAYERS": 3,
    "MUON_MOMENTUM_WARMUP_STEPS": 8,
}
SCORES = ("val_loss", "val_bpb", "pre_quant_val_loss", "pre_quant_val_bpb")
needs_usr1 = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal here")


@pytest.fixture
def disturb(launch, tmp_path):
    """Function: two ranks under torchrun, with faults; the CompletedProcess."""
    (tmp_path / "driver.py").write_text(DRIVER, encoding="utf-8")

    def start(*faults, **overrides):
        return launch(ranks=2, script=tmp_path / "driver.py", FAULTS=json.dumps(faults), **STEPS | overrides)

    return start


def load(path):
    blob = path.read_bytes()
    assert hashlib.sha256(blob[:-32]).digest() == blob[-32:]
    return torch.load(io.BytesIO(blob[:-32]), weights_only=True)


def losses_of(settings, run_id):
    path = Path(settings["LOG_DIR"]) / run_id
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [m["train_loss"] for m in metrics if "train_loss" in m], json.loads((path / "result.json").read_text())


@needs_usr1
def test_any_number_of_ranks_goes_on_from_any_other(tiny, disturb, alone, monkeypatch):
    """A signal to one rank makes both save one step; two ranks go on from it to the same bits, one rank from the two
    and two from the one to the same numbers but for rounding."""
    step = train_gpt.Trainer.step

    def signalled(self, *args):
        if self.steps == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, *args)

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    monkeypatch.setattr(train_gpt.Trainer, "step", signalled)
    kept, write = [], checkpoint.write_checkpoint
    monkeypatch.setattr(
        checkpoint,
        "write_checkpoint",
        lambda state, folder: [write(state, folder), kept.append((folder.path / "checkpoint.pt").read_bytes())],
    )
    one_losses, one_result = alone(**STEPS)[:2]
    monkeypatch.undo()
    one_losses = [m["train_loss"] for m in one_losses if "train_loss" in m]
    settings = tiny()
    saved_by_one = Path(settings["LOG_DIR"]) / "one.pt"
    saved_by_one.parent.mkdir()
    saved_by_one.write_bytes(kept[0])
    runs = [
        {"RUN_ID": "two"},
        {"RUN_ID": "two_two", "RESUME": str(saved_by_one.parent / "two" / "checkpoint5.pt")},
        {"RUN_ID": "one_two", "RESUME": str(saved_by_one)},
    ]
    done = disturb([0, 1, 5, signal.SIGUSR1, False], RUNS=json.dumps(runs))
    assert done.returncode == 0, done.stderr
    saved_by_two = Path(runs[1]["RESUME"])
    assert load(saved_by_one)["steps"] == load(saved_by_two)["steps"] == 5
    assert len(load(saved_by_two)["rng"]) == 2 and len(load(saved_by_one)["rng"]) == 1
    losses, result = losses_of(settings, "two")
    assert losses == pytest.approx(one_losses, abs=1e-4) and result["val_bpb"] == pytest.approx(
        one_result["val_bpb"], abs=1e-4
    )
    again, again_result = losses_of(settings, "two_two")
    assert again == losses[5:], "bit for bit"
    assert {name: again_result[name] for name in SCORES} == {name: result[name] for name in SCORES}
    assert again_result["sha256_artifact"] == result["sha256_artifact"]
    for name, first, last in (("model", "two", "two_two"), ("optimizer", "two", "two_two")):
        states = [load(saved_by_one.parent / run / "checkpoint10.pt")[name] for run in (first, last)]
        for key, value in states[0].items():
            values = value if isinstance(value, dict) else {"": value}
            others = states[1][key] if isinstance(value, dict) else {"": states[1][key]}
            assert values.keys() == others.keys() and all(torch.equal(values[k], others[k]) for k in values), key
    crossed = [losses_of(settings, "one_two")]
    metrics, result, _ = alone(**STEPS, RUN_ID="two_one", RESUME=saved_by_two)
    crossed.append(([m["train_loss"] for m in metrics if "train_loss" in m], result))
    for losses, result in crossed:
        assert losses == pytest.approx(one_losses[5:], abs=1e-4) and result["resumed_at"] == [5]
        for name in SCORES:
            assert result[name] == pytest.approx(one_result[name], abs=1e-4), name
    for number, handler in zip((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), handlers, strict=True):
        signal.signal(number, handler)


def test_a_signal_to_one_rank_stops_both_at_one_step_with_a_checkpoint(tiny, disturb):
    """Regression: the rank that had nothing to write left at once; the launcher then ended the one that wrote."""
    done = disturb([0, 0, 5, signal.SIGTERM, False], SLOW_DISK=2)
    assert done.returncode == 1, "torchrun's own code"
    path = Path(tiny()["LOG_DIR"]) / "run"
    log = (path / "train.log").read_text()
    assert "\ncheckpoint: saved step:5 " in log and log.endswith("stopped by SIGTERM: RUN_ID=run goes on with it\n")
    state = load(path / "checkpoint.pt")
    assert state["steps"] == 5 and not state["finished"] and len(state["rng"]) == 2
    assert {float(m["step"]) for m in state["optimizer"].values() if "step" in m} == {5.0}
    assert {path.name for path in path.glob(".*")} == set()


def test_a_signal_to_the_launcher_saves_too(tiny, disturb):
    done = disturb([0, 0, 5, signal.SIGTERM, True], ITERATIONS=100_000, SLOW_STEP=0.05, SLOW_DISK=1)
    assert done.returncode not in (0, None)
    log = (Path(tiny()["LOG_DIR"]) / "run" / "train.log").read_text()
    (step,) = re.findall(r"^checkpoint: saved step:(\d+) ", log, re.MULTILINE)
    assert int(step) >= 4 and log.endswith("stopped by SIGTERM: RUN_ID=run goes on with it\n")
    assert load(Path(tiny()["LOG_DIR"]) / "run" / "checkpoint.pt")["steps"] == int(step)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
def test_a_killed_rank_leads_to_a_restart_in_the_same_folder_and_to_the_same_result(tiny, disturb, tmp_path):
    """First the one rank, then the other; without a RUN_ID: the restart knows its folder by the launch."""
    runs, kills = [], [[0, 1, 4, signal.SIGKILL, False], [1, 0, 8, signal.SIGKILL, False]]
    for name, faults in (("whole", []), ("killed", kills)):
        done = disturb(*faults, max_restarts=2, RUN_ID="", LOG_DIR=tmp_path / name, CHECKPOINT_EVERY_SECONDS=1e-9)
        assert done.returncode == 0, done.stderr
        (path,) = (tmp_path / name).iterdir()
        runs.append((path, *losses_of({"LOG_DIR": tmp_path / name}, path.name)))
    (_, losses, result), (path, seen, again) = runs
    first, second = again["resumed_at"]
    assert 0 <= first <= 3 < 4 <= second <= 7 and result["resumed_at"] == []
    assert again["run_id"] == path.name and len(re.findall("^resumed: ", (path / "train.log").read_text(), re.M)) == 2
    assert seen == losses[:3] + losses[first:7] + losses[second:], "what was done twice gave the same twice"
    for name in (*SCORES, "sha256_artifact", "steps", "world_size"):
        assert again[name] == result[name], name
