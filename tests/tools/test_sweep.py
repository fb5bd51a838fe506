"""sweep.py: trials as processes, the pruner, failures, two workers on one study, going on after a kill."""

import tiny_runs  # first: it knows where the tools are

# isort: split
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import sweep
from optuna.trial import TrialState

FAKE = Path(__file__).with_name("fake_trainer.py")
SWEEP = tiny_runs.ROOT / "tools" / "sweep.py"


@pytest.fixture
def space(tmp_path, monkeypatch):
    """Function: write space.toml for the stand-in script, and return its path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.02)

    def write(text, trials):
        path = tmp_path / "space.toml"
        path.write_text(f'name = "study"\nscript = "{FAKE}"\ntrials = {trials}\n{text}')
        return path

    return write


def study_of(storage="sqlite:///logs/study/study.db"):
    return optuna.load_study(study_name="study", storage=sweep.open_storage(storage))


def test_a_search_finds_the_lowest_and_ranks_with_size_and_time(space, capsys):
    path = space('sampler = "BruteForceSampler"\n[space]\nLEVEL = [3.0, 1.0, 2.0]\n[pruner]\noff = true\n', 3)
    assert sweep.main([str(path)]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[1] for row in rows] == ["0.50000", "1.00000", "1.50000"]
    assert rows[0][3] == "`LEVEL=1`" and rows[0][4:8] == ["1.0", "40", "123,456", "0.0 |"]
    assert study_of().best_value == 0.5


def test_the_pruner_stops_a_hopeless_trial_early(space, capsys):
    """Four good trials, then a bad one, which would take ten seconds to its end."""
    path = space('sampler = "RandomSampler"\n[fixed]\nSTEPS = 40\n[space]\nLEVEL = [1.0]\n'
                 '[pruner]\nstartup_trials = 3\nafter = 0.1\n', 4)  # fmt: skip
    assert sweep.main([str(path)]) == 0
    path.write_text(path.read_text().replace("trials = 4", "trials = 5").replace(
        "STEPS = 40\n[space]\nLEVEL = [1.0]", "LEVEL = 9.0\nSTEPS = 400\nSTEP_MS = 25\n[space]\nOTHER = [1]"))
    began = time.monotonic()
    assert sweep.main([str(path)]) == 0
    last = study_of().get_trials()[-1]
    assert last.state == TrialState.PRUNED and time.monotonic() - began < 6
    assert 2 <= max(last.intermediate_values) <= 10  # of 20 stages
    assert not (Path("logs/study") / last.user_attrs["run_id"] / "result.json").exists()
    assert "pruned at " in sweep.table(study_of(), "val_bpb")


def test_a_failed_trial_is_kept_with_its_error_and_the_search_goes_on(space, capsys):
    path = space('sampler = "BruteForceSampler"\n[fixed]\nFAIL = "level > 2"\n[space]\nLEVEL = [1.0, 3.0]\n', 2)
    assert sweep.main([str(path)]) == 0
    states = {trial.params["LEVEL"]: trial for trial in study_of().get_trials()}
    assert states[1.0].state == TrialState.COMPLETE and states[3.0].state == TrialState.FAIL
    assert states[3.0].user_attrs["error"] == "error: LEVEL is not to be had: lower it"
    assert "failed: error: LEVEL is not to be had" in capsys.readouterr().out


@pytest.mark.parametrize("storage", ["sqlite:///logs/study/study.db", "logs/study.journal"])
def test_two_workers_share_a_study(space, storage):
    path = space(f'storage = "{storage}"\nsampler = "BruteForceSampler"\n[fixed]\nSTEPS = 40\nSTEP_MS = 10\n'
                 '[space]\nLEVEL = {low = 1, high = 6}\n[pruner]\noff = true\n', 6)  # fmt: skip
    workers = [subprocess.Popen([sys.executable, str(SWEEP), str(path)], stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True) for _ in range(2)]  # fmt: skip
    said = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    trials = study_of(storage).get_trials()
    assert {trial.params["LEVEL"] for trial in trials if trial.state == TrialState.COMPLETE} == set(range(1, 7))
    assert {trial.user_attrs["pid"] for trial in trials} == {worker.pid for worker in workers}


def test_a_killed_sweep_goes_on_and_gives_its_trial_again(space):
    path = space('sampler = "RandomSampler"\n[fixed]\nSTEPS = 40\nSTEP_MS = 25\n'
                 '[space]\nLEVEL = {low = 1.0, high = 2.0}\n', 2)  # fmt: skip
    worker = subprocess.Popen([sys.executable, str(SWEEP), str(path)], stdout=subprocess.DEVNULL)
    metrics = Path("logs/study/trial0000/metrics.jsonl")
    for _ in range(600):
        if metrics.is_file():
            break
        time.sleep(0.05)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert study_of().get_trials()[0].state == TrialState.RUNNING
    assert sweep.main([str(path)]) == 0
    trials = study_of().get_trials()
    assert [trial.state for trial in trials] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert trials[1].params == trials[0].params != trials[2].params
    assert "its worker died" in sweep.table(study_of(), "val_bpb")


def test_stages_are_shares_of_the_budget_by_steps_or_by_the_clock(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "train_loss": {step}, "train_seconds": {step / 10}}}\n'
                            for step in range(1, 51)))  # fmt: skip
    run = sweep.Run("x", metrics_path=path)
    by_steps = sweep.stages(run, {"ITERATIONS": "100", "MAX_WALLCLOCK_SECONDS": "0"})
    assert by_steps == {stage: pytest.approx(2.5 if stage == 1 else 5 * stage - 3) for stage in range(1, 11)}
    by_clock = sweep.stages(run, {"ITERATIONS": "100", "MAX_WALLCLOCK_SECONDS": "5"})
    assert max(by_clock) == 20


@pytest.mark.parametrize("text, said", [
    ("", "no [space]"), ("[space]\nLEVEL = 3\n", "expected {low"),
    ("wrong = 1\n[space]\nLEVEL = [1]\n", "unknown keys"),
    ('sampler = "None"\n[space]\nLEVEL = [1]\n', "expected one of optuna.samplers"), ("[", "see `python"),
    ('storage = "no://where"\n[space]\nLEVEL = [1]\n', "cannot be opened"),
])  # fmt: skip
def test_a_mistake_gets_one_line(space, text, said, capsys, monkeypatch):
    monkeypatch.setattr(sweep.time, "sleep", lambda _: None)
    assert sweep.main([str(space(text, 1))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error
