"""Start a training script in a process of its own, for tools that compare or search.

It may be any script with the standard environment variables and log lines, from this repository or from the public
challenge.
"""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "records")]  # train_gpt, and the readers of runs

from record_read import Run, parse_log, read_result  # noqa: E402

from train_gpt import UserError, read_env_file  # noqa: E402

REPOSITORY_SCRIPT = ROOT / "train_gpt.py"


@dataclass(frozen=True)
class Target:
    """A script and, optionally, a configuration file for it."""

    script: Path
    config: Path | None

    @property
    def ours(self) -> bool:
        """Whether it takes a FILE.env and makes a run folder, as the script, its copies and older model files do."""
        text = read_script(self.script)
        return "train_gpt.main(" in text or bool(re.search(r"^class RunFolder\b", text, re.MULTILINE))


def read_script(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def is_model_file(path: Path) -> bool:
    """Whether this is a model file, which is no program: it subclasses Config, and never calls main."""
    text = read_script(path)
    imports = re.search(r"^(import train_gpt|from train_gpt import)\b", text, re.MULTILINE)
    return bool(imports and re.search(r"^class Config\(", text, re.MULTILINE)) and "train_gpt.main(" not in text


def parse_target(spec: str) -> Target:
    """FILE.env (this repository's script), SCRIPT.py, or SCRIPT.py,FILE.env."""
    paths = [Path(part) for part in spec.split(",")]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{', '.join(missing)}: no such file: expected FILE.env, SCRIPT.py or SCRIPT.py,FILE.env")
    scripts, configs = ([path for path in paths if path.suffix == end] for end in (".py", ".env"))
    if len(scripts) > 1 or len(configs) > 1 or len(scripts) + len(configs) < len(paths):
        raise UserError(f"{spec}: expected FILE.env, SCRIPT.py or SCRIPT.py,FILE.env")
    script = scripts[0] if scripts else REPOSITORY_SCRIPT
    if is_model_file(script):
        raise UserError(
            f"{script} is a model file and no program: put MODEL_FILE={script} into a FILE.env and give that"
        )
    return Target(script, configs[0] if configs else None)


def start(target: Target, knobs: dict[str, str], folder: Path) -> subprocess.Popen:
    """Start a run that logs under `folder`/<RUN_ID>, with its output in `folder`/<RUN_ID>.out.

    A public script reads no FILE.env and leaves its model in its working directory. So it gets the knobs of the file as
    environment variables, and a directory of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environ = os.environ | knobs | {"LOG_DIR": str(folder.resolve()), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(target.script.resolve())]
    where = None
    if target.ours:
        command += [str(target.config.resolve())] if target.config else []
    else:
        environ = (read_env_file(target.config) if target.config else {}) | environ
        for name in ("DATA_PATH", "TOKENIZER_PATH"):
            if "/" in environ.get(name, ""):
                environ[name] = str(Path(environ[name]).resolve())
        where = folder / knobs["RUN_ID"]
        where.mkdir(exist_ok=True)
        if "DATA_PATH" not in environ and not (where / "data").exists():
            (where / "data").symlink_to(ROOT / "data")
    with open(folder / f"{knobs['RUN_ID']}.out", "wb") as output:
        return subprocess.Popen(
            command, env=environ, cwd=where, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )


def wait(process: subprocess.Popen) -> tuple[int, float]:
    """The exit code of a run, and its peak resident memory in MiB. A tool that is stopped stops its run."""
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        stop(process)
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)


def stop(process: subprocess.Popen, patience: float = 10.0):
    """Send SIGTERM, and SIGKILL if the process does not end within `patience` seconds."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def read_finished(folder: Path, run_id: str) -> Run:
    """The files of a finished run: its output as the log, and result.json and metrics.jsonl if it writes them."""
    result = folder / run_id / "result.json"
    return Run(
        run_id,
        parse_log(folder / f"{run_id}.out"),
        read_result(result) if result.is_file() else None,
        result,
        folder / run_id / "metrics.jsonl",
    )


def last_words(folder: Path, run_id: str) -> str:
    """The line that says why a run failed: its error, or its last line."""
    lines = (folder / f"{run_id}.out").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["it said nothing"])[-1]
