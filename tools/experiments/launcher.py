"""Start training runs as subprocesses, for tools that compare, search or repeat runs.

A run never outlives the tool that started it, even if the tool is killed: see guard.py. The script can be any one that
uses the standard environment variables and log lines, from this repository or from the public challenge.
"""

import argparse
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "records"))  # record_read
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # train_gpt

from record_read import Run, parse_log, read_result

import train_gpt
from train_gpt import UserError, require

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY_SCRIPT = ROOT / "train_gpt.py"
PATIENCE = 10.0  # seconds between SIGTERM and SIGKILL
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Target:
    """A script and, optionally, a configuration file for it."""

    script: Path
    config: Path | None

    @property
    def ours(self) -> bool:
        """True if the script reads FILE.env and writes a run folder: train_gpt.py, its copies, older model files."""
        text = read_script(self.script)
        return "train_gpt.main(" in text or bool(re.search(r"^class RunFolder\b", text, re.MULTILINE))


def read_script(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def is_model_file(path: Path) -> bool:
    """Return True for a model file, which cannot be run directly: it subclasses Config and never calls main."""
    text = read_script(path)
    imports = re.search(r"^(import train_gpt|from train_gpt import)\b", text, re.MULTILINE)
    return bool(imports and re.search(r"^class Config\(", text, re.MULTILINE)) and "train_gpt.main(" not in text


def parse_target(spec: str) -> Target:
    """Parse FILE.env (for this repository's script), SCRIPT.py, or SCRIPT.py,FILE.env."""
    paths = [Path(part) for part in spec.split(",")]
    expected = "expected FILE.env, SCRIPT.py or SCRIPT.py,FILE.env"
    missing = [str(path) for path in paths if not path.is_file()]
    require(not missing, f"{', '.join(missing)}: no such file: {expected}")
    scripts, configs = ([path for path in paths if path.suffix == end] for end in (".py", ".env"))
    one = len(scripts) <= 1 and len(configs) <= 1 and len(scripts) + len(configs) == len(paths)
    require(one, f"{spec}: {expected}")
    script = scripts[0] if scripts else REPOSITORY_SCRIPT
    remedy = f"put MODEL_FILE={script} into a FILE.env and give that"
    require(not is_model_file(script), f"{script} is a model file and no program: {remedy}")
    return Target(script, configs[0] if configs else None)


def command(script: Path, *arguments, ranks: int = 1) -> list:
    """Return the command for a run, under torchrun if ranks > 1."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *torchrun, script, *arguments]


def spawn(command: list, environ: dict[str, str], stdout, cwd: Path | None = None) -> subprocess.Popen:
    """Start a command that is stopped when this process exits. Returns the Popen of its guard, which exits with the
    command's exit code.

    Keep a reference to it until the command ends and do not call communicate(): either would close the guard's pipe.
    """
    guard = [sys.executable, "-I", "-S", Path(__file__).with_name("guard.py"), str(PATIENCE)]
    pipes = {"stdin": subprocess.PIPE, "stdout": stdout, "stderr": stdout and subprocess.STDOUT}
    environ = environ | {"PYTHONUNBUFFERED": "1"}
    # A new session, so that Ctrl+C reaches only this process, which then stops the run.
    return subprocess.Popen([*guard, *command], env=environ, cwd=cwd, start_new_session=True, **pipes)


def lock(file, wait: bool = False):
    """Lock an open file until all processes that inherited it have exited. Raises BlockingIOError if another process
    holds the lock and `wait` is False. Without effect on Windows and on file systems without locks."""
    if os.name != "nt":  # Windows has no fcntl
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:  # Lustre, SMB and some NFS versions do not support flock
            if isinstance(error, BlockingIOError):
                raise


def open_output(path: Path):
    """Open a new output file, locked while its run is active. An earlier output file is renamed. Raises UserError if
    the run is still active."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if path.exists():
            with open(path, "ab") as earlier:
                lock(earlier)
            names = (path.with_suffix(f".{number}.out") for number in itertools.count(1))
            path.rename(next(name for name in names if not name.exists()))
        output = open(path, "xb")
        lock(output)
    except (BlockingIOError, FileExistsError) as error:
        raise UserError(f"{path.stem} still runs, with its output in {path}: wait until it ends, or stop it") from error
    return output


def start(target: Target, knobs: dict[str, str], folder: Path, ranks: int = 1, anew=False) -> subprocess.Popen:
    """Start a run that logs to `folder`/<RUN_ID>, with its output in `folder`/<RUN_ID>.out.

    `anew` renames the folder of an interrupted run with the same RUN_ID; otherwise the run may resume. A public script
    does not read FILE.env and writes its model to the working directory. It therefore gets the file's knobs as
    environment variables and a separate working directory.
    """
    where = folder / knobs["RUN_ID"]
    environ = os.environ | knobs | {"LOG_DIR": str(folder.resolve())}
    arguments = [target.config.resolve()] if target.config and target.ours else []
    if target.config and not target.ours:
        environ = train_gpt.read_env_file(target.config) | environ
    with open_output(folder / f"{where.name}.out") as output:
        if anew and where.exists():
            where.rename(folder / f"{where.name}_stopped_{len(list(folder.glob(f'{where.name}_stopped_*')))}")
        if not target.ours:
            for name in ("DATA_PATH", "TOKENIZER_PATH"):
                if "/" in environ.get(name, ""):
                    environ[name] = str(Path(environ[name]).resolve())
            where.mkdir(exist_ok=True)
            if "DATA_PATH" not in environ and not (where / "data").exists():
                (where / "data").symlink_to(ROOT / "data")
        cwd = None if target.ours else where
        return spawn(command(target.script.resolve(), *arguments, ranks=ranks), environ, output, cwd)


def wait(process: subprocess.Popen) -> tuple[int, float]:
    """Wait for a run. Returns its exit code and the peak memory of its largest process in MiB. An exception, such as
    KeyboardInterrupt, stops the run."""
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        stop(process)
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)


def follow(process: subprocess.Popen, output: Path) -> Iterator[str]:
    """Yield the lines of a run's output as they are written, until it ends. Closing the generator stops the run."""
    line = ""
    try:
        with open(output, encoding="utf-8", errors="replace") as file:
            while True:
                ended = process.poll() is not None  # polled before reading, so that no line is missed
                line += file.readline()
                if line and (ended or line.endswith("\n")):
                    yield line
                    line = ""
                elif ended:
                    return
                else:
                    time.sleep(POLL_SECONDS)
    finally:
        stop(process)


def stop(process: subprocess.Popen):
    """Stop a run: its guard sends SIGTERM, then SIGKILL if the run does not exit within PATIENCE seconds."""
    process.stdin.close()
    process.wait()


def run_tool(tool: Callable[[], int | None], advice: str) -> int:
    """Run a tool and return its exit code: 2 after a user error, 128 + N after signal N, each with a one-line message.

    Signals raise KeyboardInterrupt, so the tool stops its runs before it exits.
    """

    def leave(number, frame):
        raise KeyboardInterrupt(number)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            if before[number] != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, leave)
        return tool() or 0
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if stopped.args else signal.SIGINT
        print(f"stopped by {signal.Signals(number).name}: {advice}", file=sys.stderr)
        return 128 + number
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def at_least(least: int) -> Callable[[str], int]:
    """Return an argparse type for integers >= `least`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number from {least} on")
        return int(text)

    return parse


def read_finished(folder: Path, run_id: str) -> Run:
    """Read a finished run: its output as the log, and result.json and metrics.jsonl if they exist."""
    log, result = parse_log(folder / f"{run_id}.out"), folder / run_id / "result.json"
    content = read_result(result) if result.is_file() else None
    return Run(run_id, log, content, result, folder / run_id / "metrics.jsonl")


def last_words(output: Path) -> str:
    """Return the line that explains why a run failed: its last `error:` line, else its last line."""
    lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["no output"])[-1]
