"""What every ladder's model must do: train, stop and go on bit for bit, export, be scored to the same digits, write."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_gpt

EXPANDED = train_gpt.tool("kernels").expanded_attention

LADDERS = Path(train_gpt.__file__).resolve().parent / "records" / "ladders"


def load(name: str, path: Path | None = None):
    """The module of LADDERS/name/name.py, or of another file."""
    spec = importlib.util.spec_from_file_location(name, path or LADDERS / name / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_ladder(name: str, folder: Path):
    """run.py of a ladder, loaded from a copy of what it needs of the repository."""
    root, copy = LADDERS.parents[1], folder / "records" / "ladders" / name
    shutil.copytree(LADDERS / name, copy, ignore=shutil.ignore_patterns("logs", "*.png", "__pycache__"))
    shutil.copytree(root / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "train_gpt.py", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        sys.modules.pop("ladder", None)  # that of another copy
        return load(f"{name}_run", copy / "run.py")


def counted_flops(model, vocab_size: int, seq_len: int) -> float:
    """Of training, per token, by torch's own counter, which counts matrix products; attention by plain ones."""
    tokens = torch.randint(vocab_size, (2, seq_len), generator=torch.Generator().manual_seed(3))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, tokens).mean().backward()
    return counter.get_total_flops() / tokens.numel()


def settings(corpus: Path, logs: Path, **overrides) -> dict[str, str]:
    base = {
        "DATA_PATH": corpus / "data",
        "TOKENIZER_PATH": corpus / "tok.model",
        "LOG_DIR": logs,
        "RUN_ID": "run",
        "VOCAB_SIZE": int((corpus / "vocab_size").read_text()) + 4,
        "DEVICE": "cpu",
        "DTYPE": "float32",
        "COMPILE": 0,
        "MAX_WALLCLOCK_SECONDS": 0,
        "WARMUP_STEPS": 0,
        "VAL_LOSS_EVERY": 0,
        "VAL_TOKENS_LIMIT": 400,
        "CHECKPOINT_EVERY_SECONDS": 0,
    }
    return {name: str(value) for name, value in (base | overrides).items()}


def start(config_class, values: dict[str, str]) -> int:
    """The exit code of a call in this environment; signals and switches are as they were after it."""
    names = [name for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        for name in config_class.knobs():
            patch.delenv(name, raising=False)
        for name, value in values.items():
            patch.setenv(name, value)
        patch.setattr(train_gpt, "INT8_MIN_NUMEL", 1000)  # so that something is quantised
        try:
            return train_gpt.main([], config_class)
        finally:
            for name, handler in handlers.items():
                signal.signal(getattr(signal, name), handler)
            for switch in ("flash", "cudnn", "mem_efficient", "math"):  # one of which the run has pinned
                getattr(torch.backends.cuda, f"enable_{switch}_sdp")(True)


@contextlib.contextmanager
def stopped_at(step: int):
    """A SIGTERM arrives while this step runs."""
    with pytest.MonkeyPatch.context() as patch:
        whole = train_gpt.Trainer.step

        def interrupted(trainer, *args):
            if trainer.steps + 1 == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return whole(trainer, *args)

        patch.setattr(train_gpt.Trainer, "step", interrupted)
        yield


def exact(text: str) -> list[str]:
    """Loss and BPB of the artifact, to the last digit."""
    lines = [line.split() for line in text.splitlines() if "roundtrip_exact" in line]
    return [word for word in lines[-1] if word.startswith("val_")]


def check_life(config_class, corpus: Path, folder: Path, capfd, **overrides):
    """A run, the same stopped and resumed, its artifact scored and sampled from. The finished run's folder."""
    values = settings(corpus, folder / "whole", **overrides)
    assert start(config_class, values) == 0
    score = exact(capfd.readouterr().out)
    with stopped_at(3):
        assert start(config_class, values | {"LOG_DIR": str(folder / "cut")}) == 128 + signal.SIGTERM
    assert start(config_class, values | {"LOG_DIR": str(folder / "cut")}) == 0
    assert exact(capfd.readouterr().out) == score
    whole, cut = (torch.load(folder / name / "run" / "final_model.pt") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(whole[name].equal(cut[name]) for name in whole)
    assert json.loads((folder / "cut" / "run" / "result.json").read_text())["resumed_at"] == [3]

    artifact = {"ARTIFACT": str(folder / "whole" / "run" / "final_model.int8.ptz")}
    machine = ("DATA_PATH", "TOKENIZER_PATH", "DEVICE", "DTYPE", "COMPILE", "VAL_TOKENS_LIMIT")
    machine = {name: values[name] for name in machine} | artifact
    assert start(train_gpt.Config, machine | {"MODE": "eval"}) == 0  # which finds the model file by itself
    assert exact(capfd.readouterr().out) == score
    sample = {"MODE": "sample", "SAMPLE_PROMPT": "the king", "SAMPLE_TOKENS": "5"}
    assert start(config_class, machine | sample) == 0
    assert capfd.readouterr().out.startswith("the king")
    return folder / "whole" / "run"
