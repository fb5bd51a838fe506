"""Any number of processes trains and scores like one, with accumulation, clipping and uneven validation; resumes
checkpoints saved by any number of ranks; and survives the death of a rank."""

import json
import os
import re
import signal
from pathlib import Path

import models
import pytest
import torch
from models import open_checkpoint
from runs import read_run

import train_gpt

checkpoint = train_gpt.tool("checkpoint")
SCORES = ("val_loss", "val_bpb", "pre_quant_val_loss", "pre_quant_val_bpb")
POSIX = pytest.mark.skipif(os.name == "nt", reason="needs signals that Windows lacks")


def run_alone(corpus, logs: Path, **knobs):
    """The same run in this single process."""
    values = models.tiny_settings(corpus, LOG_DIR=logs, **knobs)
    assert models.call_main(values) == 0
    return read_run(logs / values["RUN_ID"])


# 7 validation windows, not divisible by 2 or 3 ranks; the last one is shorter.
COMMON = {
    "ITERATIONS": 10,
    "TRAIN_LOG_EVERY": 1,
    "TRAIN_BATCH_TOKENS": 384,
    "WARMUP_STEPS": 1,
    "VAL_LOSS_EVERY": 5,
    "VAL_TOKENS_LIMIT": 6 * 32 + 5,
    "VAL_BATCH_SIZE": 64,
}


@pytest.mark.parametrize(
    "ranks, knobs",
    [
        (2, {"NUM_LAYERS": 3, "GRAD_CLIP_NORM": 0.5, "GRAD_ACCUM_STEPS": 3}),
        # The skip_weights of one layer are empty and get no gradient: the all-reduce must not wait for one.
        (3, {"NUM_LAYERS": 1, "EVAL_STRIDE": 20}),
    ],
)
def test_ranks_train_and_score_as_one_process(corpus, launch, tmp_path, ranks, knobs):
    values = models.tiny_settings(corpus, LOG_DIR=tmp_path / "logs", **COMMON | knobs)
    done = launch(ranks=ranks, **values)
    assert done.returncode == 0, done.stderr
    run, alone = (
        read_run(tmp_path / "logs" / "run"),
        run_alone(corpus, tmp_path / "alone", **COMMON | knobs | {"GRAD_ACCUM_STEPS": 0}),
    )
    assert len(run.losses) == 10 and run.losses[-1] < run.losses[0] - 0.5
    assert run.losses == pytest.approx(alone.losses, abs=1e-4)
    for name in SCORES:
        assert run.result[name] == pytest.approx(alone.result[name], abs=1e-4), name
    for name in ("scored_tokens", "scored_bytes", "train_tokens", "steps", "model_params"):
        assert run.result[name] == alone.result[name], name
    assert run.result["world_size"] == ranks and alone.result["world_size"] == 1
    for text in (done.stdout, run.log):  # only rank 0 writes
        assert re.findall(r"^step:(\d+)/10 train_loss", text, re.MULTILINE) == [str(step) for step in range(1, 11)]
        assert f"\nworld_size:{ranks} grad_accum_steps:{knobs.get('GRAD_ACCUM_STEPS', 1)}\n" in text


def test_an_error_of_rank_0_alone_ends_the_run(launch, tmp_path):
    """The other rank waits for it in a collective, and must not block it in turn."""
    (tmp_path / "logs" / "run").mkdir(parents=True)
    done = launch(ranks=2, timeout=120)
    assert done.returncode == 1, "torchrun's own code"
    assert done.stderr.count("error: ") == 1 and "is no run folder" in done.stderr
    assert not list((tmp_path / "logs" / "run").iterdir())


# Checkpoints: a rank is disturbed in the middle of a step, as set by the environment

DRIVER = f"""
import json, os, shutil, signal, sys, time
sys.path.insert(0, {str(models.SCRIPT.parent)!r})
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
    "EMA_DECAY": 0.9,
    "LOADER": "shuffle",
}


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    path = tmp_path_factory.mktemp("driver") / "driver.py"
    path.write_text(DRIVER, encoding="utf-8")
    return path


@pytest.fixture
def disturb(corpus, launch, driver, tmp_path):
    """Function: two ranks under torchrun, with faults. Returns the CompletedProcess."""

    def start(*faults, max_restarts=0, **more):
        values = models.tiny_settings(corpus, LOG_DIR=tmp_path / "logs", **STEPS) | more
        return launch(ranks=2, script=driver, max_restarts=max_restarts, FAULTS=json.dumps(faults), **values)

    return start


@pytest.fixture(scope="module")
def two(corpus, driver, tmp_path_factory):
    """The folder of runs of two ranks: "two", which saves step 5 because of a signal to one rank; "two_two", which
    resumes from it; "one_two", which resumes from the same step of "one", a run of one rank."""
    logs = tmp_path_factory.mktemp("two")
    step = train_gpt.Trainer.step

    def signalled(self, *args):
        if self.steps == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, *args)

    def keep(state, folder):
        write(state, folder)
        (folder.path / f"checkpoint{state['steps']}.pt").write_bytes((folder.path / "checkpoint.pt").read_bytes())

    write = checkpoint.write_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.Trainer, "step", signalled)
        patch.setattr(checkpoint, "write_checkpoint", keep)
        run_alone(corpus, logs, RUN_ID="one", **STEPS)
    resumed = [{"RUN_ID": f"{name}_two", "RESUME": str(logs / name / "checkpoint5.pt")} for name in ("two", "one")]
    environ = {"RUNS": json.dumps([{"RUN_ID": "two"}, *resumed]), "TMPDIR": str(logs)}
    environ |= {"FAULTS": json.dumps([[0, 1, 5, signal.SIGUSR1, False]])}
    done = models.process(models.tiny_settings(corpus, LOG_DIR=logs, **STEPS) | environ, logs, ranks=2, script=driver)
    assert done.returncode == 0, done.stderr
    return logs


@POSIX
def test_any_number_of_ranks_resumes_what_any_other_has_saved(corpus, two):
    """Two ranks resume their own checkpoint bit-exactly. One rank resumes that of two, and two that of one, with equal
    results up to rounding."""
    saved = {name: open_checkpoint(two / name / "checkpoint5.pt") for name in ("one", "two")}
    assert {name: (state["steps"], len(state["rng"])) for name, state in saved.items()} == {
        "one": (5, 1),
        "two": (5, 2),
    }
    run_alone(corpus, two, **STEPS, RUN_ID="two_one", RESUME=two / "two" / "checkpoint5.pt")
    one, whole, again, *crossed = (read_run(two / name) for name in ("one", "two", "two_two", "one_two", "two_one"))
    assert whole.losses == pytest.approx(one.losses, abs=1e-4)
    assert again.losses == whole.losses[5:], "bit for bit"
    assert all(again.result[name] == whole.result[name] for name in (*SCORES, "sha256_artifact"))
    last = [open_checkpoint(run.path / "checkpoint10.pt") for run in (again, whole)]
    for part in ("model", "average", "optimizer"):
        torch.testing.assert_close(last[0][part], last[1][part], rtol=0, atol=0)
    for run in crossed:
        assert run.losses == pytest.approx(one.losses[5:], abs=1e-4) and run.result["resumed_at"] == [5]
    for run in (whole, *crossed):
        for name in SCORES:
            assert run.result[name] == pytest.approx(one.result[name], abs=1e-4), name


def test_a_signal_to_one_rank_stops_both_at_one_step_with_a_checkpoint(disturb, tmp_path):
    """Regression: the rank with nothing to write exited at once; the launcher then killed the one still writing."""
    done, path = disturb([0, 0, 5, signal.SIGTERM, False], SLOW_DISK="2"), tmp_path / "logs" / "run"
    assert done.returncode == 1, "torchrun's own code"
    log = (path / "train.log").read_text()
    assert "\ncheckpoint: saved step:5 " in log and log.endswith("stopped by SIGTERM: RUN_ID=run goes on with it\n")
    state = open_checkpoint(path / "checkpoint.pt")
    assert state["steps"] == 5 and not state["finished"] and len(state["rng"]) == 2
    assert {float(m["step"]) for m in state["optimizer"].values() if "step" in m} == {5.0}
    assert not [*path.glob(".*")]


def test_a_signal_to_the_launcher_saves_too(disturb, tmp_path):
    more = {"ITERATIONS": "100000", "SLOW_STEP": "0.05", "SLOW_DISK": "1"}
    done, path = disturb([0, 0, 5, signal.SIGTERM, True], **more), tmp_path / "logs" / "run"
    assert done.returncode not in (0, None)
    log = (path / "train.log").read_text()
    (step,) = re.findall(r"^checkpoint: saved step:(\d+) ", log, re.MULTILINE)
    assert int(step) >= 4 and log.endswith("stopped by SIGTERM: RUN_ID=run goes on with it\n")
    assert open_checkpoint(path / "checkpoint.pt")["steps"] == int(step)


@POSIX
def test_a_killed_rank_leads_to_a_restart_in_the_same_folder_and_to_the_same_result(two, disturb, tmp_path):
    """First one rank is killed, then the other; without a RUN_ID, the restart identifies its folder by the launch."""
    kills, whole = [[0, 1, 4, signal.SIGKILL, False], [1, 0, 8, signal.SIGKILL, False]], read_run(two / "two")
    done = disturb(*kills, max_restarts=2, RUN_ID="", CHECKPOINT_EVERY_SECONDS="1e-9")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "logs").iterdir()
    run = read_run(path)
    first, second = run.result["resumed_at"]
    assert 0 <= first <= 3 < 4 <= second <= 7 and whole.result["resumed_at"] == []
    assert run.result["run_id"] == path.name and len(re.findall("^resumed: ", run.log, re.M)) == 2
    assert run.losses == whole.losses[:3] + whole.losses[first:7] + whole.losses[second:], "repeated steps are the same"
    for name in (*SCORES, "sha256_artifact", "steps", "world_size"):
        assert run.result[name] == whole.result[name], name
