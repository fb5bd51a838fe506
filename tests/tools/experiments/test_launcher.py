"""launcher.py and guard.py: a run ends with its tool, is started only once at a time, and gets its knobs."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import ab
import launcher
import pytest
import sweep

from train_gpt import UserError

FAKE = Path(__file__).with_name("fake_trainer.py")
# ab.py with shorter timeouts.
TOOL = f"import sys; sys.path.insert(0, {str(Path(launcher.__file__).parent)!r}); import ab, launcher"
TOOL += "; launcher.PATIENCE = 0.3; sys.exit(ab.main(sys.argv[1:]))"


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number, ranks, stubborn", [("TERM", 1, ""), ("KILL", 1, "STUBBORN=1\n"), ("KILL", 2, "")])
def test_a_run_ends_with_its_tool(number, ranks, stubborn, tmp_path):
    (tmp_path / "a.env").write_text(f"STEPS=6000\nSTEP_MS=10\n{stubborn}")
    arguments = [f"{FAKE},a.env"] * 2 + ["--work", "w", "--ranks", str(ranks)]
    environ = os.environ | {"TMPDIR": str(tmp_path)}  # where torchrun leaves folders
    tool = subprocess.Popen(
        [sys.executable, "-c", TOOL, *arguments], cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True
    )
    output = tmp_path / "w" / "warm_up1_b.out"

    def pids():
        return re.findall(r"^pid:(\d+)", output.read_text(), re.MULTILINE) if output.is_file() else []

    wait_until(lambda: len(pids()) == ranks and (tmp_path / "w/warm_up1_b/metrics.jsonl").is_file())
    tool.send_signal(getattr(signal, f"SIG{number}"))
    code, errors = tool.wait(), tool.stderr.read()
    if number == "TERM":
        assert code == 143 and errors == "stopped by SIGTERM: the same command continues from here\n"
    wait_until(lambda: not any(lives(int(pid)) for pid in pids()), 20)
    assert "checkpoint: saved" in output.read_text()  # SIGTERM came first


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_tool_with_its_number_unless_it_is_ignored(number, capsys):
    before = signal.getsignal(number)
    assert launcher.run_tool(lambda: os.kill(os.getpid(), number), "again") == 128 + number
    assert capsys.readouterr().err == f"stopped by {signal.Signals(number).name}: again\n"
    try:
        signal.signal(number, signal.SIG_IGN)  # as nohup does
        assert launcher.run_tool(lambda: os.kill(os.getpid(), number), "again") == 0
    finally:
        signal.signal(number, before)


def test_a_run_that_still_lives_is_not_started_again_and_each_start_has_its_own_output(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPS", "6000")
    process = launcher.start(launcher.Target(FAKE, None), {"RUN_ID": "run"}, tmp_path)
    wait_until((tmp_path / "run" / "metrics.jsonl").is_file)
    with pytest.raises(UserError, match="run still runs, with its output in .*run.out: wait until it ends, or stop it"):
        launcher.start(launcher.Target(FAKE, None), {"RUN_ID": "run"}, tmp_path, anew=True)
    launcher.stop(process)
    assert process.returncode == 143 and sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.out"]

    monkeypatch.setenv("STEPS", "3")
    process = launcher.start(launcher.Target(FAKE, None), {"RUN_ID": "run"}, tmp_path, anew=True)
    lines = list(launcher.follow(process, tmp_path / "run.out"))
    assert process.returncode == 0 and "".join(lines) == (tmp_path / "run.out").read_text() and len(lines) == 8
    names = ["run", "run.1.out", "run.out", "run_stopped_0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert "checkpoint: saved" in (tmp_path / "run.1.out").read_text()


@pytest.mark.parametrize("code, expected", [("exit 3", 3), ("kill -9 $$", 137), ("setsid sleep 600 & echo $!", 0)])
def test_the_exit_code_is_that_of_the_run_which_leaves_no_process_behind(code, expected, tmp_path):
    with launcher.open_output(tmp_path / "x.out") as output:
        process = launcher.spawn(["sh", "-c", code], os.environ.copy(), output)
    assert launcher.wait(process)[0] == expected
    assert not any(lives(int(pid)) for pid in (tmp_path / "x.out").read_text().split())


@pytest.mark.parametrize("tool", ["ab", "sweep"])
def test_a_public_script_gets_the_knobs_of_a_file_and_a_folder_of_its_own(tool, tmp_path, monkeypatch):
    """It reads no FILE.env, and writes its model to its working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(
        "import os, pathlib, sys\n"
        "assert not sys.argv[1:]\n"
        "pathlib.Path('final_model.pt').write_text(repr([os.environ[name] for name in 'ABCD']))\n"
        "print('step:1/1 train_loss:1.0 train_time:10ms step_avg:1ms')\n"
        "print('final_int8_zlib_roundtrip_exact val_loss:2.0 val_bpb:1.00000000')\n"
    )
    (tmp_path / "a.env").write_text("A=1 # one\nB = 2\nC='x'  # q\nD=file\n")
    monkeypatch.setenv("D", "environment")
    if tool == "ab":
        assert ab.main(["train.py,a.env", "train.py,a.env", "--pairs", "1", "--work", "w", "--warm-up", "0"]) == 0
    else:
        text = 'name = "w"\ntrials = 2\nscript = "train.py"\nconfig = "a.env"\n[space]\nX = {low = 0.0, high = 1.0}\n'
        (tmp_path / "space.toml").write_text(text)
        assert sweep.main(["space.toml"]) == 0
    models = list(tmp_path.glob("**/final_model.pt"))
    assert len({model.parent for model in models}) == 2 and tmp_path not in {model.parent for model in models}
    assert [model.read_text() for model in models] == ["['1', '2', 'x', 'environment']"] * 2


MODEL_FILE = "from train_gpt import Config as Base\n\n\nclass Config(Base):\n    seed = 1\n"


@pytest.mark.parametrize(
    "spec, message",
    [
        ("/nowhere.env", "expected FILE.env"),
        ("a.txt", "expected FILE.env"),
        ("a.env,b.env", "expected FILE.env"),
        ("mine.py", "mine.py is a model file and no program: put MODEL_FILE=mine.py into a FILE.env and give that"),
        (f"{launcher.ROOT}/records/models/tiny.py,a.env", "tiny.py is a model file and no program"),
        (f"{launcher.ROOT}/records/models/frontier.py", "frontier.py is a model file and no program"),
    ],
)
def test_a_target_that_is_none_gets_one_line(spec, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in {"a.txt": "", "a.env": "", "b.env": "", "mine.py": MODEL_FILE}.items():
        Path(name).write_text(text)
    assert ab.main(["a.env", spec, "--work", "w"]) == 2 and not Path("w").exists()
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "script, ours",
    [
        ("train_gpt.py", True),
        ("tests/tools/experiments/fake_trainer.py", True),
        ("records/track_cpu_3min_16mb/2026-11-26_demo_cpu/train_gpt.py", True),
        ("records/track_cpu_3min_16mb/2026-11-26_frontier_cpu_fp32/frontier.py", True),
        ("tools/experiments/plot.py", False),
    ],
)
def test_the_script_its_copies_and_older_model_files_take_a_configuration_file(script, ours):
    assert launcher.parse_target(str(launcher.ROOT / script)).ours == ours
