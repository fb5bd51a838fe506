"""watch.py: each step once and complete, across restarts, several runs at once; the same calls to wandb."""

import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import tiny_runs
import watch


@pytest.fixture
def going(corpus, tmp_path):
    """A run that has taken ten steps and is not finished, and a function that lets it finish."""
    folder = tmp_path / "going"
    shutil.copytree(tiny_runs.make_runs(corpus)[0], folder)
    (folder / "result.json").rename(tmp_path / "result.json")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:10]))

    def finish():
        (folder / "metrics.jsonl").write_text("".join(lines))
        shutil.copyfile(tmp_path / "result.json", folder / "result.json")

    return folder, finish, [json.loads(line)["train_loss"] for line in lines[:24]]


class Fake(SimpleNamespace):
    """Stands in for wandb and records its calls."""

    def init(self, **options):
        self.options, self.step = options, getattr(self, "step", 0)
        return self

    def log(self, numbers, step):
        assert step >= self.step - 1, "wandb drops steps that go back"
        self.sent.append((step, numbers))
        self.step = step + 1

    def finish(self):
        self.finished = True


@pytest.fixture
def fake(monkeypatch):
    fake = Fake(sent=[])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_the_same_calls_and_each_step_once_across_restarts(going, fake):
    folder, finish, losses = going
    watch.follow(folder, "wandb", "project", once=True)
    assert [step for step, _ in fake.sent] == list(range(1, 10))  # step 10 may still get a validation
    finish()
    watch.follow(folder, "wandb", "project", once=False)
    assert [(step, numbers["train_loss"]) for step, numbers in fake.sent] == list(enumerate(losses, 1))
    last, result = fake.sent[-1][1], json.loads((folder / "result.json").read_text())
    assert fake.finished and {"lr_scale", "val_bpb"} <= last.keys() and last["final_val_bpb"] == result["val_bpb"]
    assert fake.options["config"]["NUM_LAYERS"] == "2" and fake.options["resume"] == "allow"
    assert fake.options["project"] == "project" and fake.options["name"] == fake.options["id"] == "going"


def test_trackio_holds_two_runs_and_a_killed_watcher_goes_on(going, corpus, tmp_path):
    trackio = pytest.importorskip("trackio")
    folder, finish, losses = going
    home = tmp_path / "trackio"
    environ = os.environ | {"TRACKIO_DIR": str(home)}
    command = [sys.executable, watch.__file__, "--project", "tests", str(folder)]
    first = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(home.glob("*.db")):
        time.sleep(0.05)
    first.kill()
    first.wait()
    finish()
    command += [str(tiny_runs.make_runs(corpus)[1])]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", home)
        one, two = (trackio.SQLiteStorage.get_logs("tests", run) for run in ("going", "run2"))
    assert [(log["step"], log["train_loss"]) for log in one] == list(enumerate(losses, 1)) and len(two) == 24


def test_invalid_lines_of_metrics_are_not_sent(going, fake):
    folder, _, _ = going
    (folder / "metrics.jsonl").write_bytes(
        b'[1]\n{"step": "x"}\n{"step": 1, "train_loss": NaN, "note": "x"}\n\xff\n'
        b'{"step": 2, "train_loss": 3.0}\n{"step": 3}\n'
    )
    watch.follow(folder, "wandb", "project", once=True)
    assert [pair for pair in fake.sent if pair[1]] == [(2, {"train_loss": 3.0})]


def test_a_folder_that_is_waited_for_is_named(tmp_path, monkeypatch, capsys):
    """Otherwise the tool would wait forever for a mistyped name."""

    def stop(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", stop)
    monkeypatch.setattr(watch, "check_package", lambda sink: None)
    assert watch.main([str(tmp_path / "later")]) == 130
    assert "waiting for " + str(tmp_path / "later") in capsys.readouterr().err
    assert watch.main([str(tmp_path / "later"), "--once"]) == 2 and "has no train.log" in capsys.readouterr().err


def test_a_missing_package_gets_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watch.importlib.util, "find_spec", lambda name: None)
    assert watch.main([str(tmp_path), "--to", "wandb"]) == 2
    assert capsys.readouterr().err == "error: --to wandb needs a package that is not installed: pip install wandb\n"
