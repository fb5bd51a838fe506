"""watch.py: each step once and whole, across restarts, several runs at once; the same calls to wandb."""

import tiny_runs  # first: it knows where the tools are

# isort: split
import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import watch

WATCH = tiny_runs.ROOT / "tools" / "experiments" / "watch.py"


@pytest.fixture
def going(corpus, tmp_path):
    """A run that has taken ten steps and is not finished, and a function that adds lines to its metrics.jsonl."""
    folder = tmp_path / "going"
    shutil.copytree(tiny_runs.make_runs(corpus)[0], folder)
    (folder / "result.json").rename(tmp_path / "result.json")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:10]))

    def add(count, result=False):
        with open(folder / "metrics.jsonl", "a") as file:
            file.writelines(lines[10 : 10 + count])
        if result:
            shutil.copyfile(tmp_path / "result.json", folder / "result.json")

    return folder, add, lines


class Fake(SimpleNamespace):
    """Stands in for wandb: keeps what it is told."""

    def init(self, **options):
        self.options, self.step = options, getattr(self, "step", 0)
        return self

    def log(self, numbers, step):
        assert step >= self.step - 1, "wandb drops steps that go back"
        self.sent.append((step, numbers))
        self.step = step + 1

    def finish(self):
        self.finished = True


def test_wandb_gets_the_same_calls_and_each_step_once_across_restarts(going, monkeypatch):
    folder, add, lines = going
    fake = Fake(sent=[])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    watch.follow(folder, "wandb", "project", once=True)
    assert [step for step, _ in fake.sent] == list(range(1, 10))  # step 10 may get a validation yet
    add(len(lines), result=True)
    watch.follow(folder, "wandb", "project", once=False)
    assert [step for step, _ in fake.sent] == list(range(1, 25)) and fake.finished
    result = json.loads((folder / "result.json").read_text())
    last = fake.sent[-1][1]
    assert {"train_loss", "lr_scale", "val_bpb"} <= last.keys() and last["final_val_bpb"] == result["val_bpb"]
    assert fake.options["project"] == "project" and fake.options["name"] == fake.options["id"] == "going"
    assert fake.options["config"]["NUM_LAYERS"] == "2" and fake.options["resume"] == "allow"
    first = json.loads(lines[0])
    assert fake.sent[0][1]["train_loss"] == first["train_loss"]


def trackio_values(project, run, home):
    """[(step, train_loss)] as trackio has them on disk, by a process of its own."""
    code = (
        "import json, sys, trackio\n"
        "logs = trackio.SQLiteStorage.get_logs(*sys.argv[1:])\n"
        "print(json.dumps([(log['step'], log['train_loss']) for log in logs if 'train_loss' in log]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, project, run],
        env=os.environ | {"TRACKIO_DIR": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    return [tuple(pair) for pair in json.loads(done.stdout.splitlines()[-1])]


def test_trackio_holds_two_runs_and_a_killed_watcher_goes_on(going, corpus, tmp_path):
    pytest.importorskip("trackio")
    folder, add, lines = going
    other, home = tiny_runs.make_runs(corpus)[1], tmp_path / "trackio"
    command = [sys.executable, str(WATCH), str(folder), str(other), "--project", "tests"]
    environ = os.environ | {"TRACKIO_DIR": str(home)}
    first = subprocess.Popen([*command[:3], *command[4:]], env=environ, stdout=subprocess.DEVNULL)  # one run, going on
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(home.glob("*.db")):
        time.sleep(0.2)
    time.sleep(1)
    first.kill()
    first.wait()
    add(len(lines), result=True)
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = [(step, json.loads(line)["train_loss"]) for step, line in enumerate(lines[:24], 1)]
    assert trackio_values("tests", "going", home) == expected
    assert len(trackio_values("tests", "run2", home)) == 24


def test_rubbish_in_metrics_is_not_sent(going, monkeypatch):
    folder, _, _ = going
    (folder / "metrics.jsonl").write_bytes(
        b'[1]\n{"step": "x"}\n{"step": 1, "train_loss": NaN, "note": "x"}\n\xff\n'
        b'{"step": 2, "train_loss": 3.0}\n{"step": 3}\n'
    )
    fake = Fake(sent=[])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    watch.follow(folder, "wandb", "project", once=True)
    assert [pair for pair in fake.sent if pair[1]] == [(2, {"train_loss": 3.0})]


def test_a_folder_that_is_waited_for_is_named(tmp_path, monkeypatch, capsys):
    """A mistyped name would be waited for without end."""

    def stop(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", stop)
    monkeypatch.setattr(watch, "check_package", lambda sink: None)
    assert watch.main([str(tmp_path / "later")]) == 130
    assert "waiting for " + str(tmp_path / "later") in capsys.readouterr().err


def test_a_missing_package_and_a_missing_folder_get_one_line(going, monkeypatch, capsys, tmp_path):
    folder, _, _ = going
    monkeypatch.setattr(watch.importlib.util, "find_spec", lambda name: None)
    assert watch.main([str(folder), "--to", "wandb"]) == 2
    assert capsys.readouterr().err == "error: --to wandb needs a package that is not installed: pip install wandb\n"
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "trackio", Fake(sent=[]))
    monkeypatch.setattr(watch, "check_package", lambda sink: None)
    assert watch.main([str(tmp_path / "nowhere"), "--once"]) == 2 and "has no train.log" in capsys.readouterr().err
