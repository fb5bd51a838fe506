"""Helpers for ladder tests: loads their model files, and copies the folder to run a ladder in."""

import importlib.util
import shutil
import sys
from pathlib import Path

import models
import pytest
import torch

import train_gpt

ROOT = Path(train_gpt.__file__).resolve().parent
LADDERS = ROOT / "records" / "ladders"


def load(file: str):
    """The module of a model file, such as small/small.py, loaded as MODEL_FILE loads it."""
    return sys.modules[train_gpt.load_model_file(str(LADDERS / file)).__module__]


def count_parameters(config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in config.model_class()(config).parameters())


def copy_ladders(folder: Path):
    """Copy what the ladders need from the repository, without their logs."""
    ignore = shutil.ignore_patterns("logs", "*.png", "__pycache__")
    for name in ("records/ladders", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "train_gpt.py", folder)


def load_run(folder: Path, name: str):
    """The run.py of a ladder in a copy."""
    spec = importlib.util.spec_from_file_location(f"{name}_run", folder / "records" / "ladders" / name / "run.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        sys.modules.pop("ladder", None)  # it may come from another copy
        spec.loader.exec_module(module)
    return module


def settings(corpus: Path, logs: Path, **overrides) -> dict[str, str]:
    """The environment of a short run on the corpus. The numbers of heads are the model's defaults."""
    vocab_size = int((corpus / "vocab_size").read_text()) + 4
    more = {"LOG_DIR": logs, "VOCAB_SIZE": vocab_size, "VAL_TOKENS_LIMIT": 400, "CHECKPOINT_EVERY_SECONDS": 0}
    values = models.run_settings(corpus, **more | overrides)
    return {name: text for name, text in values.items() if "_HEADS" not in name or name in overrides}
