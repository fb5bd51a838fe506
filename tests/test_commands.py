"""Every command in every README: scripts exist, options parse, knobs exist, configurations load, shell code parses."""

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import models
import pytest
from conftest import ROOT

from train_gpt import Config, tool

READMES = sorted(path for path in ROOT.rglob("README.md") if not re.search(r"track_|/\.|node_modules", str(path)))
OTHERS = ("pip", "git", "ssh", "trackio", "hf", "unzip", "bash", "torchrun", "python", "python3", "export", "srun")
KNOBS = {*Config.knobs(), *tool("artifact").SampleKnobs.knobs()}
# Variables of other programs, and of scripts in this repository other than the trainer.
NOT_KNOBS = re.compile(r"(MATCHED|HF|TORCH|NCCL|GLOO|SLURM|OMP|GPT2)_\w+|TINY_SHAKESPEARE")


def commands() -> list[tuple[str, str]]:
    """(README, command) of every line in a code block that starts a program, with continuation lines joined."""
    found = []
    for path in READMES:
        for block in re.findall(r"^```\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.split("#")[0].strip()
                program = re.sub(r"^(\w+=\S* +)*", "", words).split(" ")[0]
                if program in OTHERS:
                    found += [(path.relative_to(ROOT).as_posix(), part.strip()) for part in words.split("&&")]
    return found


def filled(command: str) -> list[str]:
    """The words of a command, with placeholders such as <run_id> and FILE replaced."""
    text = re.sub(r"<[\w ]+>", "x", command).replace("...", "x")
    text = re.sub(r"\$\{?recipe\}?", "demo_cpu", text)
    text = re.sub(r"\$\{?(\w+)\}?", "1", text)
    return shlex.split(text)


def split_environment(words: list[str]) -> tuple[dict[str, str], list[str]]:
    names = [word.partition("=") for word in words]
    count = next((i for i, (name, sign, _) in enumerate(names) if not sign or not name.isidentifier()), len(words))
    return {name: value for name, _, value in names[:count]}, words[count:]


def load_configuration(environ: dict[str, str], words: list[str]):
    """The Config of a command of train_gpt.py, for existing files."""
    arguments = [word for word in words if word.endswith(".env") and word not in ("FILE.env", "config.env")]
    arguments = [word for word in arguments if not word.startswith("logs/")]
    for argument in arguments:
        assert (ROOT / argument).is_file(), argument
    environ = dict(environ)
    if environ.get("MODEL_FILE", "").startswith("my_model"):
        environ["MODEL_FILE"] = "records/models/tiny.py"
    with contextlib.chdir(ROOT), models.environment({}):
        config = Config.load([str(ROOT / argument) for argument in arguments], environ)
    unknown = {name for name in environ if name not in config.knobs() and name not in KNOBS}
    assert all(NOT_KNOBS.fullmatch(name) for name in unknown), unknown
    return config


class Parsed(Exception):
    """Raised once a script has accepted its options."""


def parse_options(script: Path, arguments: list[str], monkeypatch):
    """Run a script until argparse has accepted its options."""
    import argparse

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *given, **options):
        parse(self, *given, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message), contextlib.redirect_stdout(message):
            runpy.run_path(str(script), run_name="__main__")
    except Parsed:
        return
    except SystemExit as end:
        # Scripts that catch every error, and --help, end here.
        assert not end.code or "Parsed" in message.getvalue(), message.getvalue()


@pytest.mark.parametrize("readme, command", commands())
def test_a_command_is_one_that_runs(readme, command, monkeypatch):
    environ, words = split_environment(filled(command))
    checked = subprocess.run(["bash", "-n"], input=command, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    script = next((word for word in words if word.endswith((".py", ".sh"))), None)
    if words[:2] == ["pip", "install"] and "-r" in words:
        assert (ROOT / words[words.index("-r") + 1]).is_file()
    elif script is None or "-m" in words[:2]:
        assert words[0] not in ("python", "python3") or words[1] in ("-m", "-c"), words
    elif script == "train_gpt.py":
        after = words[words.index(script) + 1 :]
        if after != ["--help"]:
            load_configuration(environ, after)
    else:
        assert (ROOT / script).is_file(), script
        ladder = re.fullmatch(r"records/ladders/\w+/run\.py", script)
        by_hand = script.endswith((".sh", "mutants.py", "faults.py"))
        if not (ladder or by_hand):
            arguments = words[words.index(script) + 1 :]
            parse_options(ROOT / script, arguments, monkeypatch)


def test_the_commands_are_found():
    found = commands()
    assert len(found) > 50 and len({readme for readme, _ in found}) >= 7
    assert ("README.md", "python data/prepare_shakespeare.py") in found
    assert os.environ.get("PYTEST_CURRENT_TEST")
