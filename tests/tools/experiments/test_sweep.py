"""sweep.py: trials as processes, the pruner, failures, two workers on one study, a restart after a kill."""

import json
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
GRID = 'sampler = "BruteForceSampler"\n'


@pytest.fixture
def space(tmp_path, monkeypatch):
    """Function: write space.toml for the stand-in script, and return its path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.02)

    def write(text, trials):
        path = tmp_path / "space.toml"
        path.write_text(f'name = "study"\nscript = "{FAKE}"\ntrials = {trials}\n{text}')
        return str(path)

    return write


def trials_of(storage="sqlite:///logs/study/study.db"):
    return optuna.load_study(study_name="study", storage=sweep.open_storage(storage)).get_trials()


def test_a_search_finds_the_lowest_and_ranks_with_size_and_time(space, capsys):
    path = space(GRID + "[space]\nLEVEL = [3.0, 1.0, 2.0]\n[pruner]\noff = true\n", 3)
    assert sweep.main([path]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[1] for row in rows] == ["0.50000", "1.00000", "1.50000"]
    assert rows[0][3] == "`LEVEL=1`" and rows[0][4:8] == ["1.0", "40", "123,456", "0.0 |"]
    assert min(trial.value for trial in trials_of()) == 0.5


def test_a_trial_on_two_ranks(space, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where torchrun leaves folders
    assert sweep.main([space("[fixed]\nSTEPS = 2\n[space]\nLEVEL = [1]\n", 1), "--ranks", "2"]) == 0
    assert json.loads(Path("logs/study/trial0000/result.json").read_text())["world_size"] == 2


def test_the_pruner_stops_a_hopeless_trial_early(space, capsys):
    """Four good trials, then a bad one, which would take ten seconds to finish."""
    pruner = (
        "\n[pruner]\nstartup_trials = 3\nafter = 0.1\n[fixed]\nLEVEL = {}\n[space]\nOTHER = {{low = 0, high = 9}}\n"
    )
    assert sweep.main([space(pruner.format("1.0"), 4)]) == 0
    began = time.monotonic()
    assert sweep.main([space(pruner.format("9.0\nSTEPS = 400\nSTEP_MS = 25"), 5)]) == 0
    last = trials_of()[-1]
    assert last.state == TrialState.PRUNED and time.monotonic() - began < 6
    assert 2 <= max(last.intermediate_values) <= 10  # of 20 stages
    assert not (Path("logs/study") / last.user_attrs["run_id"] / "result.json").exists()
    assert "| pruned at " in capsys.readouterr().out


def test_a_failed_trial_is_kept_with_its_error_and_the_search_goes_on(space, capsys):
    assert sweep.main([space(GRID + '[fixed]\nFAIL = "level > 2"\n[space]\nLEVEL = [1.0, 3.0]\n', 2)]) == 0
    states = {trial.params["LEVEL"]: trial for trial in trials_of()}
    assert states[1.0].state == TrialState.COMPLETE and states[3.0].state == TrialState.FAIL
    assert states[3.0].user_attrs["error"] == "error: LEVEL is out of range: lower it"
    assert "failed: error: LEVEL is out of range" in capsys.readouterr().out


@pytest.mark.parametrize("storage", ["sqlite:///logs/study/study.db", "logs/study.journal"])
def test_two_workers_share_a_study(space, storage):
    text = f'storage = "{storage}"\n{GRID}[fixed]\nSTEP_MS = 10\n[space]\nLEVEL = {{low = 1, high = 6}}\n'
    command = [sys.executable, sweep.__file__, space(text + "[pruner]\noff = true\n", 6)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    workers = [subprocess.Popen(command, **pipes) for _ in range(2)]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    trials = trials_of(storage)
    assert {trial.params["LEVEL"] for trial in trials if trial.state == TrialState.COMPLETE} == set(range(1, 7))
    assert {trial.user_attrs["pid"] for trial in trials} == {worker.pid for worker in workers}


def test_workers_that_ask_at_once_try_no_value_of_a_grid_twice(space, monkeypatch):
    settings = sweep.read_space(Path(space(GRID + "[space]\nLEVEL = {low = 1, high = 6}\n", 6)))
    sample = optuna.samplers.BruteForceSampler.sample_independent

    def slow(*arguments):
        value = sample(*arguments)
        time.sleep(0.1)  # while others may ask, too
        return value

    monkeypatch.setattr(optuna.samplers.BruteForceSampler, "sample_independent", slow)
    studies = [sweep.open_study(settings) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda study: sweep.suggest(study.ask(), settings)["LEVEL"], studies))
    assert sorted(found) == ["1", "2", "3", "4", "5", "6"]


def test_a_killed_sweep_continues_and_repeats_the_trial(space, capsys):
    path = space('sampler = "RandomSampler"\n[fixed]\nSTEP_MS = 25\n[space]\nLEVEL = {low = 1.0, high = 2.0}\n', 2)
    worker = subprocess.Popen([sys.executable, sweep.__file__, path], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not Path("logs/study/trial0000/metrics.jsonl").is_file():
        time.sleep(0.02)
    worker.kill()
    worker.wait()
    assert trials_of()[0].state == TrialState.RUNNING
    assert sweep.main([path]) == 0
    trials = trials_of()
    assert [trial.state for trial in trials] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert trials[1].params == trials[0].params != trials[2].params
    assert "its worker died" in capsys.readouterr().out


def test_stages_are_shares_of_the_budget_by_steps_or_by_the_clock(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "train_loss": step, "train_seconds": step / 10} for step in range(1, 51)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = sweep.Run("x", metrics_path=path)
    by_steps = sweep.stages(run, {"ITERATIONS": "100", "MAX_WALLCLOCK_SECONDS": "0"})
    assert by_steps == {stage: pytest.approx(2.5 if stage == 1 else 5 * stage - 3) for stage in range(1, 11)}
    by_clock = sweep.stages(run, {"ITERATIONS": "100", "MAX_WALLCLOCK_SECONDS": "5"})
    assert max(by_clock) == 20


SPACE = "[space]\nLEVEL = [1]\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no [space]"),
        ("[", "see `python"),
        ("space = 3\n", "a table"),
        ("wrong = 1\n" + SPACE, "unknown keys"),
        ('sampler = "None"\n' + SPACE, "expected one of optuna.samplers"),
        ('sampler = "__doc__"\n' + SPACE, "expected one of optuna.samplers"),
        ('storage = "no://where"\n' + SPACE, "cannot be opened"),
        ("config = 3\n" + SPACE, "config = 3: expected a text"),
        ('objective = ["x"]\n' + SPACE, "expected a text"),
        ("fixed = 3\n" + SPACE, "a table"),
        ("pruner = 3\n" + SPACE, "a table"),
        ("trials = 0\n" + SPACE, "trials = 0"),
        ('trials = "x"\n' + SPACE, "trials = 'x'"),
        ("trials = 1.5\n" + SPACE, "trials = 1.5"),
        ("trials = true\n" + SPACE, "trials = True"),
        ('name = "../x"\n' + SPACE, "name = '../x'"),
        ('name = ""\n' + SPACE, "name = ''"),
        (SPACE + "[pruner]\nwarm = 3\n", "pruner.warm"),
        (SPACE + "[pruner]\nafter = 3\n", "pruner.after = 3"),
        (SPACE + '[pruner]\nafter = "x"\n', "pruner.after"),
        (SPACE + "[pruner]\nstartup_trials = -2\n", "pruner.startup_trials"),
        ("[space]\nLEVEL = 3\n", "expected {low"),
        ("[space]\nLEVEL = {low = 3, high = 1}\n", "LEVEL"),
        ("[space]\nLEVEL = {low = 0, high = 1, log = true}\n", "LEVEL"),
        ('[space]\nLEVEL = {low = "a", high = "b"}\n', "LEVEL"),
        ("[space]\nLEVEL = {low = 1.0, high = 2.0, log = true, step = 0.1}\n", "LEVEL"),
        ("[space]\nLEVEL = {low = 1.0, high = 2.0, lgo = true}\n", "LEVEL"),
        ("[space]\nLEVEL = {low = 1.0, high = inf}\n", "LEVEL"),
        ("[space]\nLEVEL = {low = true, high = 3}\n", "LEVEL"),
        ("[space]\nLEVEL = []\n", "LEVEL"),
        ("[space]\nLEVEL = [[1]]\n", "LEVEL"),
        ("[fixed]\nLEVEL = 1\n" + SPACE, "both fixed and searched: LEVEL"),
        ("[fixed]\nOTHER = [1]\n" + SPACE, "fixed.OTHER"),
        ('[fixed]\nRUN_ID = "x"\n' + SPACE, "RUN_ID"),
        ('[space]\nLOG_DIR = ["x"]\n', "LOG_DIR"),
        ("\udcff", "space.toml"),  # bytes that are not text
    ],
)
def test_a_mistake_gets_one_line_before_any_trial(text, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep.time, "sleep", lambda _: None)
    Path("space.toml").write_bytes(text.encode(errors="surrogateescape"))
    assert sweep.main(["space.toml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["space.toml"]


@pytest.mark.parametrize("new", ["[1.0, 2.0]", "{low = 1.0, high = 3.0}"])
def test_a_study_continues_in_its_own_space_alone(new, space, capsys):
    """With other choices it would be another study: optuna keeps the two apart, so the user must know."""
    text = "[fixed]\nSTEPS = 2\n[space]\nLEVEL = [1.0]\n"
    assert sweep.main([space(text, 1)]) == 0
    assert sweep.main([space(text.replace("[1.0]", new), 2)]) == 2
    error = capsys.readouterr().err
    assert "LEVEL" in error and "another name" in error and error.count("\n") == 1 and len(trials_of()) == 1


def test_bounds_may_be_moved_while_a_study_continues(space):
    text = "[fixed]\nSTEPS = 2\n[space]\nLEVEL = {low = 1.0, high = 1.5}\n"
    assert sweep.main([space(text, 1)]) == 0
    assert sweep.main([space(text.replace("1.5", "2.5"), 2)]) == 0
    assert [trial.state for trial in trials_of()] == [TrialState.COMPLETE] * 2


@pytest.mark.parametrize("objective", ["seconds", "nothing"])
def test_an_objective_that_is_no_number_fails_the_trial(objective, space):
    assert sweep.main([space(f'objective = "{objective}"\n[fixed]\nSTEPS = 2\n' + SPACE, 1)]) == 0
    (trial,) = trials_of()
    assert trial.state == TrialState.FAIL and f"no {objective} in its result" in trial.user_attrs["error"]


def test_a_result_that_cannot_be_read_fails_its_trial_alone(space, monkeypatch):
    real = sweep.launcher.read_finished

    def broken(folder, run_id):
        if run_id == "trial0000":
            (folder / run_id / "result.json").write_text('{"val_bpb": NaN}')
        return real(folder, run_id)

    monkeypatch.setattr(sweep.launcher, "read_finished", broken)
    assert sweep.main([space(GRID + "[fixed]\nSTEPS = 2\n[space]\nLEVEL = [1, 2]\n", 2)]) == 0
    one, two = trials_of()
    assert one.state == TrialState.FAIL and "val_bpb is nan" in one.user_attrs["error"]
    assert two.state == TrialState.COMPLETE
