"""Runtime: importing does nothing, the device, the run folder, the stopwatch; and the rules the file itself keeps."""

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

# Runs in a process of its own. torch comes first: what it reads and prints is not ours.
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


@pytest.fixture
def folder(runtime):
    folder = RunFolder(runtime)
    yield folder
    folder.close()


def fake_runtime(kind="cpu", is_master=True):
    return SimpleNamespace(device=torch.device(kind), is_master=is_master, broadcast=lambda value: value)


def name_folder(folder, config):
    """Without a look at what may be in it already."""
    if type(folder) is RunFolder:
        folder.locate(config)
    else:
        folder.choose(config, None, {})


def contents(path: Path) -> dict:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


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


MEETING_PLACE = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "1"},
        {"RANK": "x"},
        {"WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"},
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"},
        {"RANK": "2", "WORLD_SIZE": "2"} | MEETING_PLACE,
        {"RANK": "0", "WORLD_SIZE": "-1"} | MEETING_PLACE,
        {"RANK": "0", "WORLD_SIZE": "0"} | MEETING_PLACE,
        {"RANK": "\u00b2", "WORLD_SIZE": "4"} | MEETING_PLACE,
    ],
)
def test_ranks_without_a_launcher(make_config, environ):
    """As the shells of some clusters leave them behind. Regression: without MASTER_PORT it was a traceback."""
    with pytest.raises(UserError, match="RANK=.* WORLD_SIZE=.*torchrun.*MASTER_PORT.*unset") as caught:
        Runtime(make_config(), environ)
    assert "\n" not in str(caught.value)


def test_a_port_that_is_taken_is_one_line(make_config):
    """Regression: it was a traceback of torch."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as caught:
            for name, text in environ.items():  # which torch reads too
                patch.setenv(name, text)
            Runtime(make_config(), environ)
    message = str(caught.value)
    assert f"127.0.0.1:{port}" in message and "choose a free port" in message and "\n" not in message


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_device_that_is_not_there(make_config, monkeypatch, kind):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"DEVICE={kind}: .*use DEVICE=auto"):
        Runtime(make_config(DEVICE=kind), {})
    assert Runtime(make_config(DEVICE="auto"), {}).device.type == "cpu"


def test_device_auto_prefers_an_accelerator(make_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert Runtime(make_config(DEVICE="auto"), {}).device.type == "mps"
    with pytest.raises(UserError, match="WORLD_SIZE=2: use one process"):
        Runtime(make_config(DEVICE="mps"), {"WORLD_SIZE": "2"} | MEETING_PLACE)


@pytest.mark.parametrize("has_test, expected", [(True, torch.bfloat16), (False, torch.float32), (None, torch.float32)])
def test_dtype_auto_follows_the_hardware(make_config, monkeypatch, has_test, expected):
    for test in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        if has_test is None:  # another release of torch
            monkeypatch.delattr(torch.cpu, test, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, test, lambda: has_test, raising=False)
    assert Runtime(make_config(DTYPE="auto"), {}).dtype == expected
    assert Runtime(make_config(DTYPE="float32"), {}).dtype == torch.float32
    assert Runtime(make_config(DTYPE="bfloat16"), {}).dtype == torch.bfloat16


# Run folder


@BOTH
def test_folder_gets_everything_that_was_said(runtime, make_config, capsys, kind):
    config, folder = make_config(SEED=7), kind(runtime)
    folder.log("early \u6d77")
    name_folder(folder, config)
    assert not list(Path(config.log_dir).glob("*")), "to name it is not to make it"
    folder.create(config, {"train_gpt.py": b"the code"})
    folder.log("late")
    assert folder.path == Path(config.log_dir) / "run"
    # A run that is killed must leave its lines: they are read before `close`.
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


@pytest.mark.parametrize(
    "names, said",
    [
        (("train.log", "result.json", "checkpoint.pt"), "is finished"),
        (("checkpoint.pt",), "is no run folder"),
    ],
)
def test_existing_folder_that_cannot_go_on_is_left_alone(folder, make_config, names, said):
    config = make_config()
    path = Path(config.log_dir) / "run"
    (path / "sub").mkdir(parents=True)
    for name in names:
        (path / name).write_text("of an earlier run")
    before = contents(path)
    folder.locate(config)
    with pytest.raises(UserError, match=f"{said}: choose another RUN_ID") as caught:
        checkpoint.locate_checkpoint(config, folder)
    assert str(path) in str(caught.value)
    assert contents(path) == before


def test_folder_that_cannot_be_made(folder, make_config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    config = make_config(LOG_DIR=tmp_path / "file")
    folder.locate(config)
    with pytest.raises(UserError, match=f"LOG_DIR={tmp_path / 'file'} RUN_ID=run: .*cannot be opened.*choose another"):
        folder.create(config, {"train_gpt.py": b""})
    assert (tmp_path / "file").read_text() == "in the way" and folder.file is None


@BOTH
def test_run_without_a_name_gets_that_of_rank_0(make_config, kind):
    config = make_config(RUN_ID="")
    folder = kind(SimpleNamespace(is_master=True, broadcast=lambda value: f"shared_{value}"))
    name_folder(folder, config)
    folder.create(config, {"train_gpt.py": b""})
    folder.close()
    assert folder.run_id.startswith("shared_2") and folder.path.name == folder.run_id and folder.path.is_dir()


@BOTH
def test_two_runs_with_one_clock_and_one_process_id_get_two_folders(runtime, make_config, monkeypatch, kind):
    """As two containers may have them. Regression: the second wrote into the folder of the first."""
    strftime, now = time.strftime, time.gmtime(10**9)
    monkeypatch.setattr(time, "strftime", lambda text: strftime(text, now))
    monkeypatch.setattr(os, "getpid", lambda: 1)
    config, folders = make_config(RUN_ID=""), [kind(runtime) for _ in range(3)]
    for folder in folders:
        name_folder(folder, config)
        assert checkpoint.locate_checkpoint(config, folder) is None
        folder.create(config, {"train_gpt.py": b""})
        folder.write("checkpoint.pt", b"that no other goes on from")
    assert len({folder.path for folder in folders}) == 3
    for folder in folders:
        assert re.fullmatch(r"2001-09-09_01-46-40_\d+", folder.run_id) and folder.path.name == folder.run_id
        folder.close()


@pytest.mark.parametrize("name", ["ENOSYS", "ENOTSUP", "ENOLCK", "EOPNOTSUPP", "EINVAL"])
def test_a_file_system_without_locks_costs_a_warning(folder, make_config, monkeypatch, capsys, name):
    """Lustre, SMB and some NFS have none. Regression: it was taken for another run's lock."""
    fcntl, number = pytest.importorskip("fcntl"), getattr(errno, name)

    def lacking(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", lacking)
    folder.locate(make_config())
    folder.create(make_config(), {"train_gpt.py": b""})
    folder.log("it goes on")
    log = (folder.path / "train.log").read_text()
    assert log == capsys.readouterr().out and log.endswith("\nit goes on\n")
    assert log.startswith(f"warning: {folder.path / 'train.log'} cannot be locked ({os.strerror(number)}): see that no")


@pytest.mark.parametrize("name", ["EWOULDBLOCK", "EAGAIN"])
def test_a_lock_that_another_has_is_refused(folder, make_config, monkeypatch, name):
    fcntl, number = pytest.importorskip("fcntl"), getattr(errno, name)

    def busy(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", busy)
    folder.locate(make_config())
    with pytest.raises(UserError, match="RUN_ID=run: .*another run is using it.*choose another"):
        folder.create(make_config(), {"train_gpt.py": b""})


@BOTH
def test_other_ranks_write_nothing(make_config, tmp_path, capsys, kind):
    folder = kind(fake_runtime(is_master=False))
    folder.log("early")
    name_folder(folder, make_config())
    folder.create(make_config(), {"train_gpt.py": b"code"})
    folder.log("late")
    folder.append("metrics.jsonl", "{}")
    folder.close()
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())
    assert folder.path.name == "run"  # they know where it is all the same


def test_the_script_alone_starts_new_folders_only(runtime, make_config):
    path = Path(make_config().log_dir) / "run"
    folder = train_gpt.RunFolder(runtime)
    for config in (make_config(RESUME="auto"), make_config(RESUME="never")):
        folder.choose(config, None, {})
        assert folder.path == path and not path.exists()
    with pytest.raises(UserError, match="RESUME is set: .*get tools/checkpoint.py"):
        folder.choose(make_config(RESUME="logs/other"), None, {})
    folder.create(make_config(), {"train_gpt.py": b"code"})
    before = contents(path)
    for resume in ("auto", "never"):
        with pytest.raises(UserError, match=f"{path} exists, .*: choose another RUN_ID"):
            train_gpt.RunFolder(runtime).choose(make_config(RESUME=resume), None, {})
    assert contents(path) == before


def test_the_script_alone_writes_a_file_whole_or_not_at_all(runtime, make_config, monkeypatch):
    folder = train_gpt.RunFolder(runtime)
    folder.choose(make_config(), None, {})
    folder.create(make_config(), {"train_gpt.py": b"code"})
    folder.write("model", b"old")

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        folder.write("model", b"new and longer")
    assert (folder.path / "model").read_bytes() == b"old"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_write_is_all_or_nothing(folder, make_config, monkeypatch, failing):
    folder.locate(make_config())
    folder.create(make_config(), {"train_gpt.py": b""})
    folder.write("model", b"old")

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, failing, fail)
    for name in ("model", "fresh"):
        with pytest.raises(OSError, match="no space"):
            folder.write(name, b"new and longer")
    assert (folder.path / "model").read_bytes() == b"old"
    assert {path.name for path in folder.path.iterdir()} == {"train.log", "config.env", "train_gpt.py", "model"}


def test_a_disk_that_stores_something_else_does_not_replace_the_file(folder, make_config, monkeypatch):
    folder.locate(make_config())
    folder.create(make_config(), {"train_gpt.py": b""})
    folder.write("model", b"old")
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self)[:-1] + b"x" if "tmp" in self.name else read(self))
    with pytest.raises(OSError, match="does not hold what was written"):
        folder.write("model", b"new")
    assert (folder.path / "model").read_bytes() == b"old" and len(list(folder.path.iterdir())) == 4


def test_write_is_on_disk_before_it_gets_its_name(folder, make_config, monkeypatch):
    folder.locate(make_config())
    folder.create(make_config(), {"train_gpt.py": b""})
    synced, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))

    def checked_replace(source, target):
        assert synced == [5] and Path(source).read_bytes() == b"bytes"
        assert Path(source).parent == Path(target).parent  # a rename across disks is no rename
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

    watch = Stopwatch(lambda: wait(0.25))  # the device needs a quarter of a second to finish: time of the ending phase
    wait(1)
    for phase, seconds in [("compile", 2), ("training", 4), ("evaluation", 8), ("training", 16), ("training", 32)]:
        watch.switch(phase)
        wait(seconds)
    assert watch.elapsed("training") == 4 + 0.25 + 16 + 0.25 + 32
    assert watch.elapsed("evaluation") == 8.25  # the clock of another phase stands still
    watch.switch("export")
    wait(64)
    watch.switch("export")
    assert watch.seconds == {"startup": 1.25, "compile": 2.25, "training": 52.75, "evaluation": 8.25, "export": 64.25}
    assert sum(watch.seconds.values()) == now[0] - 1000


# torch.compile or not


def broken_compile(error):
    """A torch.compile that fails as a missing toolchain does: at the first call."""

    def compile_it(function):
        def call(*args):
            raise error

        return call

    return compile_it


def test_compile_off(make_config, monkeypatch):
    monkeypatch.setattr(torch, "compile", None)  # no trial is made
    assert kernels.choose_compile(make_config(COMPILE="0"), fake_runtime()) == (False, "COMPILE=0 on cpu, linux")


@pytest.mark.parametrize("setting", ["auto", "1", "autotune"])
def test_compile_where_it_works(make_config, monkeypatch, setting):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    chosen, reason = kernels.choose_compile(make_config(COMPILE=setting), fake_runtime())
    assert chosen is True and ("minutes" in reason) == (setting == "autotune"), "a long compilation is said"


@pytest.mark.parametrize(
    "error, shown",
    [
        (RuntimeError("\n  no C++ compiler\nsecond line"), "no C++ compiler"),
        (FileNotFoundError(2, "g++"), "g++"),
        (AssertionError(), ""),
        (NotImplementedError("\n"), ""),
    ],
)
def test_compile_where_it_fails(make_config, monkeypatch, error, shown):
    monkeypatch.setattr(torch, "compile", broken_compile(error))
    chosen, reason = kernels.choose_compile(make_config(COMPILE="auto"), fake_runtime())
    assert chosen is False and "failed" in reason and shown in reason and "\n" not in reason
    for asked in ("1", "autotune"):  # no fallback
        with pytest.raises(UserError, match=rf"^COMPILE={asked}: .*{re.escape(shown)}.*COMPILE=0"):
            kernels.choose_compile(make_config(COMPILE=asked), fake_runtime())


@pytest.mark.parametrize(
    "setting, expected",
    [
        ("1", None),
        ("auto", None),
        ("autotune", {"max_autotune_gemm": True, "coordinate_descent_tuning": True, "epilogue_fusion": True}),
    ],
)
def test_what_the_compiler_is_told(make_config, runtime, monkeypatch, setting, expected):
    told, function = [], lambda x: x * 2
    monkeypatch.setattr(torch, "compile", lambda given, **options: told.append(options) or given)
    note = train_gpt.build_model(make_config(COMPILE=setting), runtime)[2]
    assert told[-1] == {"dynamic": False, "fullgraph": True, "options": expected} and "\ncompile:1 (" in note
    monkeypatch.undo()
    backend = torch.compile(function, options=expected)._torchdynamo_orig_callable  # inductor knows all of them
    assert backend is function


def test_compile_auto_without_a_compiler_for_the_platform(make_config, monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    chosen, reason = kernels.choose_compile(make_config(COMPILE="auto"), fake_runtime("mps"))
    assert not chosen and "mps" in reason
    monkeypatch.setattr(sys, "platform", "win32")
    chosen, reason = kernels.choose_compile(make_config(COMPILE="auto"), fake_runtime("cpu"))
    assert not chosen and "win32" in reason


# The rules of the file


def test_script_is_under_1500_lines():
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 1500
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("path", [SCRIPT, *TOOLS], ids=lambda path: path.name)
def test_no_function_over_80_lines(path):
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert len(long) > (50 if path == SCRIPT else 1)
    assert {name: lines for name, lines in long.items() if lines > 80} == {}


@pytest.mark.parametrize("path", [SCRIPT, *TOOLS], ids=lambda path: path.name)
def test_no_joined_statements(path):
    with open(path, "rb") as file:
        joined = [token.start[0] for token in tokenize.tokenize(file.readline) if token.string == ";"]
    assert joined == []


def test_the_visible_space_is_written_as_an_escape():
    """A literal U+2581 looks like an underscore; it has been mistaken for one."""
    folders = ("data", "records", "tests", "tools")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    sources += ROOT.glob("*.py")
    assert SCRIPT in sources and Path(__file__).resolve() in sources and set(TOOLS) <= set(sources)
    assert [str(path) for path in sources if "\u2581" in path.read_text(encoding="utf-8")] == []


def test_at_the_top_there_is_the_script_alone():
    """What stands around it belongs to a folder."""
    assert [path.name for path in ROOT.glob("*.py")] == ["train_gpt.py"]
