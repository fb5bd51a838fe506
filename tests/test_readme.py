"""The README matches the code."""

import re
from pathlib import Path

from train_gpt import Config, load_model_file, tool

ROOT = Path(__file__).resolve().parent.parent
KNOBS = dict(Config.knobs())
for file in sorted((ROOT / "records" / "models").glob("*.py")):
    if "class Config(" in file.read_text(encoding="utf-8"):
        KNOBS |= load_model_file(str(file)).knobs()
KNOBS |= tool("artifact").SampleKnobs.knobs()
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_two_commands_of_the_readme():
    commands = re.findall(r"^pip install -r .*", README, flags=re.MULTILINE)
    assert len(commands) == 2 and commands[1].endswith("python -m pytest")
    assert "python train_gpt.py records/recipes/demo_cpu.env" in commands[0]
    assert "grep -E '^pip install -r ' README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_knobs_and_defaults_of_the_readme_are_those_of_the_script():
    named = set(re.findall(r"`([A-Z][A-Z0-9_]+)=?[^`]*`", README))
    named = {name for name in named if not name.startswith(("TORCH_", "NCCL_", "SLURM_", "GLOO_"))}  # of other programs
    assert named - set(KNOBS) <= {"KEY", "FILE", "GPT", "PARAMETERS"} and len(named) > 25
    rows = re.findall(r"^\| (`[A-Z].*?) \| (.*?) \|", README, flags=re.MULTILINE)
    checked = 0
    for names, defaults in rows:
        names = re.findall(r"[A-Z][A-Z0-9_]+", names)
        defaults = [text.strip("`") for text in defaults.split(", ")]
        for name, default in zip(names, defaults, strict=False):
            if default.replace(".", "").isdigit():
                assert float(KNOBS[name].default) == float(default), name
                checked += 1
    assert checked > 12


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"(?:data|tests|tools|records)/[\w/.]+\.(?:py|md|env)", README):
        assert (ROOT / name).is_file(), name
    assert "@@" not in README, "an unfilled place"
