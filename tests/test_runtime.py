"""Runtime: import without side effects, the device, the run folder, the stopwatch; and the code rules of the file."""

import ast
import errno
import json
import os
import re
import socket
import subprocess
import sys
import time
import tokenize
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
import torch

import train_gpt
from train_gpt import Runtime, Stopwatch, UserError

kernels = train_gpt.tool("kernels")

checkpoint = train_gpt.tool("checkpoint")
RunFolder = checkpoint.RunFolder
BOTH = pytest.mark.parametrize("kind", [train_gpt.RunFolder, RunFolder], ids=["the script alone", "with its tools"])
ROOT = Path(train_gpt.__file__).resolve().parent
SCRIPT = ROOT / "train_gpt.py"
TOOLS = [ROOT / "tools" / f"{name}.py" for name in ("check", "checkpoint", "artifact")]

# Runs in its own process. torch is imported first: what it reads and prints is not part of the test.
IMPORT_PROBE = """
import os, sys
import numpy, torch, torch.distributed, torch.nn.parallel
read = set()
real = type(os.environ).__getitem__
type(os.environ).__getitem__ = lambda self, key: (read.add(key), real(self, key))[1]
rng, threads = torch.get_rng_state(), torch.get_num_threads()
import train_gpt
assert not read & train_gpt.Config.knobs().keys(), f"the import read {read & train_gpt.Config.knobs().keys()}"
heavy = {"sentencepiece", "tiktoken", "huggingface_hub", "matplotlib"} & sys.modules.keys()
assert not heavy, f"the import loaded {heavy}"
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert torch.equal(rng, torch.get_rng_state()) and threads == torch.get_num_threads()
assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
"""


def fake_runtime(kind="cpu", is_master=True, broadcast=lambda value: value):
    return SimpleNamespace(device=torch.device(kind), is_master=is_master, broadcast=broadcast)


def name_folder(folder, config):
    """Name the run folder without checking what it may already contain."""
    if type(folder) is RunFolder:
        folder.locate(config)
    else:
        folder.choose(config, None, {})


@pytest.fixture
def create(runtime, make_config):
    """Function: a run folder on disk, with the first files in it."""
    created = []

    def new(kind=RunFolder, runtime=runtime, **knobs):
        created.append(kind(runtime))
        name_folder(created[-1], make_config(**knobs))
        created[-1].create(make_config(**knobs), {"train_gpt.py": b"the code"})
        return created[-1]

    yield new
    for folder in created:
        folder.close()


# Import


def test_importing_does_nothing(tmp_path):
    knobs = {"ITERATIONS": "abc", "DEVICE": "cuda", "DATA_PATH": "/nowhere", "RANK": "0", "WORLD_SIZE": "2"}
    environ = os.environ | knobs | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", IMPORT_PROBE]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# Device and collectives


def test_one_process(runtime):
    assert (runtime.rank, runtime.world_size, runtime.is_master) == (0, 1, True)
    assert (runtime.device, runtime.dtype) == (torch.device("cpu"), torch.float32)
    value = object()
    assert runtime.broadcast(value) is value
    values = [2.0**53 + 2, 0.1, -(2.0**-60)]  # float32 would round all three
    assert runtime.all_reduce(values) == values
    runtime.synchronize()


def test_ranks_without_a_launcher(make_config):
    """Variables that the shells of some clusters set. Regression: without MASTER_PORT it was a traceback."""
    address, port = {"MASTER_ADDR": "localhost"}, {"MASTER_PORT": "29500"}
    for rank, size, place in [
        *(("1", None, {}), ("x", None, {}), (None, "2", {}), ("0", "2", {}), ("0", "2", address), ("1", "2", port)),
        *((rank, size, address | port) for rank, size in (("2", "2"), ("0", "-1"), ("0", "0"), ("\u00b2", "4"))),
    ]:
        environ = {name: text for name, text in (("RANK", rank), ("WORLD_SIZE", size)) if text} | place
        with pytest.raises(UserError, match="RANK=.* WORLD_SIZE=.*torchrun.*MASTER_PORT.*unset") as caught:
            Runtime(make_config(), environ)
        assert "\n" not in str(caught.value)


def test_a_port_that_is_taken_is_one_line(make_config):
    """Regression: it was a traceback from torch."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as caught:
            for name, text in environ.items():  # torch reads them too
                patch.setenv(name, text)
            Runtime(make_config(), environ)
    message = str(caught.value)
    assert f"127.0.0.1:{port}" in message and "choose a free port" in message and "\n" not in message


def test_device_auto_is_the_best_and_a_missing_one_is_an_error(make_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for kind in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"DEVICE={kind}: .*use DEVICE=auto"):
            Runtime(make_config(DEVICE=kind), {})
    assert Runtime(make_config(DEVICE="auto"), {}).device.type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert Runtime(make_config(DEVICE="auto"), {}).device.type == "mps"
    with pytest.raises(UserError, match="WORLD_SIZE=2: use one process"):
        environ = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
        Runtime(make_config(DEVICE="mps"), environ)


@pytest.mark.parametrize("has_test, expected", [(True, torch.bfloat16), (False, torch.float32), (None, torch.float32)])
def test_dtype_auto_follows_the_hardware(make_config, monkeypatch, has_test, expected):
    for test in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        if has_test is None:  # another release of torch
            monkeypatch.delattr(torch.cpu, test, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, test, lambda: has_test, raising=False)
    for name, dtype in {"auto": expected, "float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        assert Runtime(make_config(DTYPE=name), {}).dtype == dtype


# Run folder


@BOTH
def test_folder_gets_everything_that_was_logged(runtime, make_config, capsys, kind):
    config, folder = make_config(SEED=7), kind(runtime)
    folder.log("early \u6d77")
    name_folder(folder, config)
    assert not list(Path(config.log_dir).glob("*")), "to name it is not to make it"
    folder.create(config, {"train_gpt.py": b"the code"})
    folder.log("late")
    assert folder.path == Path(config.log_dir) / "run"
    # A killed run must leave its lines, so they are read before `close`.
    assert (folder.path / "train.log").read_text(encoding="utf-8") == "early \u6d77\nlate\n"
    assert capsys.readouterr().out == "early \u6d77\nlate\n"
    folder.append("metrics.jsonl", '{"step": 1, "loss": 2.5}')
    folder.append("metrics.jsonl", '{"step": 2}')
    folder.close()
    metrics = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in metrics] == [{"step": 1, "loss": 2.5}, {"step": 2}]
    assert (folder.path / "train_gpt.py").read_bytes() == b"the code"
    assert "RUN_ID" not in (folder.path / "config.env").read_text()
    assert not [path for path in folder.path.iterdir() if path.name.endswith(".tmp")]


@BOTH
def test_other_ranks_write_nothing(make_config, create, tmp_path, capsys, kind):
    folder = create(kind, fake_runtime(is_master=False))
    folder.log("a line")
    folder.append("metrics.jsonl", "{}")
    folder.close()
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())
    assert folder.path.name == "run"  # they still know where it is


@BOTH
def test_run_without_a_name_gets_that_of_rank_0(create, kind):
    folder = create(kind, fake_runtime(broadcast=lambda value: f"shared_{value}"), RUN_ID="")
    assert folder.run_id.startswith("shared_2") and folder.path.name == folder.run_id and folder.path.is_dir()


@BOTH
def test_runs_with_one_clock_and_one_process_id_get_folders_of_their_own(create, make_config, monkeypatch, kind):
    """Two containers may share both. Regression: the second wrote into the folder of the first."""
    strftime, now = time.strftime, time.gmtime(10**9)
    monkeypatch.setattr(time, "strftime", lambda text: strftime(text, now))
    monkeypatch.setattr(os, "getpid", lambda: 1)
    folders = []
    for _ in range(3):
        folders.append(create(kind, RUN_ID=""))
        folders[-1].write("checkpoint.pt", b"that no other goes on from")
    assert len({folder.path for folder in folders}) == 3
    assert all(re.fullmatch(r"2001-09-09_01-46-40_\d+", folder.run_id) for folder in folders)


LACKING = ("ENOSYS", "ENOTSUP", "ENOLCK", "EOPNOTSUPP", "EINVAL")


@pytest.mark.parametrize("name", [*LACKING, "EWOULDBLOCK", "EAGAIN"])
def test_a_file_system_without_locks_costs_a_warning_and_a_lock_of_another_run_the_run(
    create, monkeypatch, capsys, name
):
    """Lustre, SMB and some NFS have no locks. Regression: this was mistaken for another run's lock."""
    fcntl, number = pytest.importorskip("fcntl"), getattr(errno, name)

    def fail(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    if name not in LACKING:
        with pytest.raises(UserError, match="RUN_ID=run: .*another run is using it.*choose another"):
            create()
        return
    folder = create()
    folder.log("it goes on")
    log = (folder.path / "train.log").read_text()
    assert log == capsys.readouterr().out and log.endswith("\nit goes on\n")
    assert log.startswith(f"warning: {folder.path / 'train.log'} cannot be locked ({os.strerror(number)}): see that no")


def test_the_script_alone_starts_new_folders_only(runtime, make_config, create):
    with pytest.raises(UserError, match="RESUME is set: .*get tools/checkpoint.py"):
        create(train_gpt.RunFolder, RESUME="logs/other")
    path = create(train_gpt.RunFolder, RESUME="never").path
    before = models.tree(path)
    for resume in ("auto", "never"):
        with pytest.raises(UserError, match=f"{path} exists, .*: choose another RUN_ID"):
            create(train_gpt.RunFolder, RESUME=resume)
    assert models.tree(path) == before


@pytest.mark.parametrize(
    "kind, failing", [(train_gpt.RunFolder, "replace"), (RunFolder, "replace"), (RunFolder, "fsync")]
)
def test_a_file_is_written_whole_or_not_at_all(create, monkeypatch, kind, failing):
    folder = create(kind)
    folder.write("model", b"old")
    before = models.tree(folder.path)

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, failing, fail)
    for name in ("model", "fresh"):
        with pytest.raises(OSError, match="no space"):
            folder.write(name, b"new and longer")
    after = models.tree(folder.path)
    assert {name: data for name, data in after.items() if not name.endswith(".tmp")} == before
    assert after == before or kind is train_gpt.RunFolder


def test_a_disk_that_stores_something_else_does_not_replace_the_file(create, monkeypatch):
    folder = create()
    folder.write("model", b"old")
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self)[:-1] + b"x" if "tmp" in self.name else read(self))
    with pytest.raises(OSError, match="does not hold what was written"):
        folder.write("model", b"new")
    assert (folder.path / "model").read_bytes() == b"old" and len(list(folder.path.iterdir())) == 4


def test_a_file_is_on_disk_before_it_gets_its_name(create, monkeypatch):
    folder, synced, replace = create(), [], os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))

    def checked_replace(source, target):
        assert synced == [5] and Path(source).read_bytes() == b"bytes"
        assert Path(source).parent == Path(target).parent  # a rename across file systems is not atomic
        replace(source, target)

    monkeypatch.setattr(os, "replace", checked_replace)
    folder.write("model", b"bytes")
    assert (folder.path / "model").read_bytes() == b"bytes"


# Stopwatch


def test_stopwatch_adds_up_to_the_wall_time(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def wait(seconds):
        now[0] += seconds

    watch = Stopwatch(lambda: wait(0.25))  # the device needs 0.25 s to finish, which counts for the ending phase
    wait(1)
    for phase, seconds in [("compile", 2), ("training", 4), ("evaluation", 8), ("training", 16), ("training", 32)]:
        watch.switch(phase)
        wait(seconds)
    assert watch.elapsed("training") == 4 + 0.25 + 16 + 0.25 + 32
    assert watch.elapsed("evaluation") == 8.25  # the clocks of other phases stand still
    watch.switch("export")
    wait(64)
    watch.switch("export")
    assert watch.seconds == {"startup": 1.25, "compile": 2.25, "training": 52.75, "evaluation": 8.25, "export": 64.25}
    assert sum(watch.seconds.values()) == now[0] - 1000


# torch.compile or not


def test_compile_where_it_works(make_config, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    for setting in ("auto", "1", "autotune"):
        chosen, reason = kernels.choose_compile(make_config(COMPILE=setting), fake_runtime())
        assert chosen is True and ("minutes" in reason) == (setting == "autotune"), "a long compilation is logged"


FAILURES = [(RuntimeError("\n  no C++ compiler\nsecond line"), "no C++ compiler"), (FileNotFoundError(2, "g++"), "g++")]
FAILURES += [(AssertionError(), ""), (NotImplementedError("\n"), "")]


@pytest.mark.parametrize("error, shown", FAILURES)
def test_compile_where_it_fails(make_config, monkeypatch, error, shown):
    def call(*args):  # as with a missing toolchain, the first call fails
        raise error

    monkeypatch.setattr(torch, "compile", lambda function: call)
    chosen, reason = kernels.choose_compile(make_config(COMPILE="auto"), fake_runtime())
    assert chosen is False and "failed" in reason and shown in reason and "\n" not in reason
    for asked in ("1", "autotune"):  # no fallback
        with pytest.raises(UserError, match=rf"^COMPILE={asked}: .*{re.escape(shown)}.*COMPILE=0"):
            kernels.choose_compile(make_config(COMPILE=asked), fake_runtime())


def test_compile_where_it_is_not_tried(make_config, monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    assert kernels.choose_compile(make_config(COMPILE="0"), fake_runtime()) == (False, "COMPILE=0 on cpu, linux")
    for kind, platform in (("mps", "linux"), ("cpu", "win32")):
        monkeypatch.setattr(sys, "platform", platform)
        chosen, reason = kernels.choose_compile(make_config(COMPILE="auto"), fake_runtime(kind))
        assert not chosen and kind in reason and platform in reason


def test_options_of_the_compiler(make_config, runtime, monkeypatch):
    autotune = {"max_autotune_gemm": True, "coordinate_descent_tuning": True, "epilogue_fusion": True}
    for setting, expected in {"1": None, "auto": None, "autotune": autotune}.items():
        given = []
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", lambda model, given=given, **options: given.append(options) or model)
            note = train_gpt.build_model(make_config(COMPILE=setting), runtime)[2]
        assert given[-1] == {"dynamic": False, "fullgraph": True, "options": expected} and "\ncompile:1 (" in note
        torch.compile(abs, options=expected)  # inductor knows all of them


# Code rules of the file


def test_script_is_under_1500_lines():
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 1500
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("path", [SCRIPT, *TOOLS], ids=lambda path: path.name)
def test_no_function_over_80_lines_and_no_joined_statements(path):
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    functions = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)]
    lines = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert len(lines) > (50 if path == SCRIPT else 1) and max(lines.values()) <= 80, lines
    with open(path, "rb") as file:
        assert ";" not in [token.string for token in tokenize.tokenize(file.readline)]


def test_the_visible_space_is_written_as_an_escape():
    """A literal U+2581 looks like an underscore and has been mistaken for one."""
    folders = ("data", "records", "tests", "tools")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    sources += ROOT.glob("*.py")
    assert SCRIPT in sources and Path(__file__).resolve() in sources and set(TOOLS) <= set(sources)
    assert [str(path) for path in sources if "\u2581" in path.read_text(encoding="utf-8")] == []


def test_at_the_top_there_is_the_script_alone():
    """All other Python files belong in folders."""
    assert [path.name for path in ROOT.glob("*.py")] == ["train_gpt.py"]
