"""sweep.py: trials as processes, the pruner, failures, two workers on one study, going on after a kill."""

import tiny_runs  # first: it knows where the tools are

# isort: split
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
import sweep
from optuna.trial import TrialState

FAKE = Path(__file__).with_name("fake_trainer.py")
SWEEP = tiny_runs.ROOT / "tools" / "experiments" / "sweep.py"


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
    path = space(
        'sampler = "RandomSampler"\n[fixed]\nSTEPS = 40\n[space]\nLEVEL = [1.0]\n'
        "[pruner]\nstartup_trials = 3\nafter = 0.1\n",
        4,
    )
    assert sweep.main([str(path)]) == 0
    path.write_text(
        path.read_text()
        .replace("trials = 4", "trials = 5")
        .replace("STEPS = 40\n[space]\nLEVEL = [1.0]", "LEVEL = 9.0\nSTEPS = 400\nSTEP_MS = 25\n[space]\nOTHER = [1]")
    )
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
    path = space(
        f'storage = "{storage}"\nsampler = "BruteForceSampler"\n[fixed]\nSTEPS = 40\nSTEP_MS = 10\n'
        "[space]\nLEVEL = {low = 1, high = 6}\n[pruner]\noff = true\n",
        6,
    )
    workers = [
        subprocess.Popen(
            [sys.executable, str(SWEEP), str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    said = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    trials = study_of(storage).get_trials()
    assert {trial.params["LEVEL"] for trial in trials if trial.state == TrialState.COMPLETE} == set(range(1, 7))
    assert {trial.user_attrs["pid"] for trial in trials} == {worker.pid for worker in workers}


def test_workers_that_ask_at_once_try_no_value_of_a_grid_twice(space, monkeypatch):
    settings = sweep.read_space(space('sampler = "BruteForceSampler"\n[space]\nLEVEL = {low = 1, high = 6}\n', 6))
    sample = optuna.samplers.BruteForceSampler.sample_independent

    def slow(*arguments):
        value = sample(*arguments)
        time.sleep(0.3)  # while others may ask, too
        return value

    monkeypatch.setattr(optuna.samplers.BruteForceSampler, "sample_independent", slow)
    studies = [sweep.open_study(settings) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda study: sweep.suggest(study.ask(), settings)["LEVEL"], studies))
    assert sorted(found) == ["1", "2", "3", "4", "5", "6"]


def test_a_killed_sweep_goes_on_and_gives_its_trial_again(space):
    path = space(
        'sampler = "RandomSampler"\n[fixed]\nSTEPS = 40\nSTEP_MS = 25\n[space]\nLEVEL = {low = 1.0, high = 2.0}\n', 2
    )
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
    path.write_text(
        "".join(f'{{"step": {step}, "train_loss": {step}, "train_seconds": {step / 10}}}\n' for step in range(1, 51))
    )
    run = sweep.Run("x", metrics_path=path)
    by_steps = sweep.stages(run, {"ITERATIONS": "100", "MAX_WALLCLOCK_SECONDS": "0"})
    assert by_steps == {stage: pytest.approx(2.5 if stage == 1 else 5 * stage - 3) for stage in range(1, 11)}
    by_clock = sweep.stages(run, {"ITERATIONS": "100", "MAX_WALLCLOCK_SECONDS": "5"})
    assert max(by_clock) == 20


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "no [space]"),
        ("[space]\nLEVEL = 3\n", "expected {low"),
        ("wrong = 1\n[space]\nLEVEL = [1]\n", "unknown keys"),
        ('sampler = "None"\n[space]\nLEVEL = [1]\n', "expected one of optuna.samplers"),
        ("[", "see `python"),
        ('storage = "no://where"\n[space]\nLEVEL = [1]\n', "cannot be opened"),
        ('sampler = "__doc__"\n[space]\nLEVEL = [1]\n', "expected one of optuna.samplers"),
        ("config = 3\n[space]\nLEVEL = [1]\n", "config = 3: expected a text"),
        ('objective = ["x"]\n[space]\nLEVEL = [1]\n', "expected a text"),
        ("fixed = 3\n[space]\nLEVEL = [1]\n", "a table"),
        ("space = 3\n", "a table"),
        ("pruner = 3\n[space]\nLEVEL = [1]\n", "a table"),
        ("[space]\nLEVEL = [1]\n[pruner]\nwarm = 3\n", "pruner.warm"),
        ("[space]\nLEVEL = [1]\n[pruner]\nafter = 3\n", "pruner.after = 3"),
        ('[space]\nLEVEL = [1]\n[pruner]\nafter = "x"\n', "pruner.after"),
        ("[space]\nLEVEL = [1]\n[pruner]\nstartup_trials = -2\n", "pruner.startup_trials"),
        ("[space]\nLEVEL = {low = 3, high = 1}\n", "LEVEL"),
        ("[space]\nLEVEL = {low = 0, high = 1, log = true}\n", "LEVEL"),
        ('[space]\nLEVEL = {low = "a", high = "b"}\n', "LEVEL"),
        ("[space]\nLEVEL = []\n", "LEVEL"),
        ("[space]\nLEVEL = {low = 1.0, high = 2.0, log = true, step = 0.1}\n", "LEVEL"),
        ("[space]\nLEVEL = {low = 1.0, high = 2.0, lgo = true}\n", "LEVEL"),
        ("[space]\nLEVEL = [[1]]\n", "LEVEL"),
        ("[space]\nLEVEL = {low = 1.0, high = inf}\n", "LEVEL"),
        ("[space]\nLEVEL = {low = true, high = 3}\n", "LEVEL"),
        ("[fixed]\nLEVEL = 1\n[space]\nLEVEL = [1]\n", "both fixed and searched: LEVEL"),
        ("[fixed]\nLEVEL = [1]\n[space]\nOTHER = [1]\n", "fixed.LEVEL"),
        ('[fixed]\nRUN_ID = "x"\n[space]\nLEVEL = [1]\n', "RUN_ID"),
        ('[space]\nLOG_DIR = ["x"]\n', "LOG_DIR"),
    ],
)
def test_a_mistake_gets_one_line(space, text, said, capsys, monkeypatch):
    """Before any trial: a search of a night must not end with it in the morning."""
    monkeypatch.setattr(sweep.time, "sleep", lambda _: None)
    monkeypatch.setattr(sweep, "search", lambda *_: pytest.fail("it began to search"))
    assert sweep.main([str(space(text, 1))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "line, said",
    [
        ("trials = 0", "trials = 0"),
        ('trials = "x"', "trials = 'x'"),
        ("trials = 1.5", "trials = 1.5"),
        ("trials = true", "trials"),
        ('name = "../x"', "name = '../x'"),
        ("name = 3", "name = 3"),
        ('name = ""', "name = ''"),
    ],
)
def test_a_name_or_a_number_of_trials_that_is_none_is_refused(line, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("space.toml").write_text(f'script = "{FAKE}"\n{line}\n[space]\nLEVEL = [1]\n')
    assert sweep.main(["space.toml"]) == 2 and said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["space.toml"]


@pytest.mark.parametrize("new", ["[1.0, 2.0]", "{low = 1.0, high = 3.0}"])
def test_a_study_goes_on_in_its_own_space_alone(new, space, capsys):
    """Other choices would be another study: optuna keeps the two apart, and so is the user told."""
    text = "[fixed]\nSTEPS = 2\n[space]\nLEVEL = [1.0]\n"
    assert sweep.main([str(space(text, 1))]) == 0
    assert sweep.main([str(space(text.replace("[1.0]", new), 2))]) == 2
    error = capsys.readouterr().err
    assert "LEVEL" in error and "another name" in error and error.count("\n") == 1
    assert len(study_of().get_trials()) == 1


def test_bounds_may_be_moved_while_a_study_goes_on(space):
    text = "[fixed]\nSTEPS = 2\n[space]\nLEVEL = {low = 1.0, high = 1.5}\n"
    assert sweep.main([str(space(text, 1))]) == 0
    assert sweep.main([str(space(text.replace("1.5", "2.5"), 2))]) == 0
    assert [trial.state for trial in study_of().get_trials()] == [TrialState.COMPLETE] * 2


def test_a_file_that_is_no_text_is_refused(tmp_path, capsys):
    (tmp_path / "space.toml").write_bytes(b"\xff\xfe\x00")
    assert sweep.main([str(tmp_path / "space.toml")]) == 2 and "space.toml" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["seconds", "nothing", "device"])
def test_an_objective_that_is_no_number_fails_the_trial_and_is_told(objective, space):
    path = space(f'objective = "{objective}"\n[fixed]\nSTEPS = 2\n[space]\nLEVEL = [1]\n', 1)
    assert sweep.main([str(path)]) == 0
    (trial,) = study_of().get_trials()
    assert trial.state == TrialState.FAIL and f"no {objective} in its result" in trial.user_attrs["error"]


def test_a_result_that_cannot_be_read_fails_its_trial_alone(space, monkeypatch):
    path = space('sampler = "BruteForceSampler"\n[fixed]\nSTEPS = 2\n[space]\nLEVEL = [1, 2]\n', 2)
    real = sweep.launcher.read_finished

    def broken(folder, run_id):
        if run_id == "trial0000":
            (folder / run_id / "result.json").write_text('{"val_bpb": NaN}')
        return real(folder, run_id)

    monkeypatch.setattr(sweep.runner, "read_finished", broken)
    assert sweep.main([str(path)]) == 0
    one, two = study_of().get_trials()
    assert one.state == TrialState.FAIL and "val_bpb is nan" in one.user_attrs["error"]
    assert two.state == TrialState.COMPLETE
