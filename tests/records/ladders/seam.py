"""What the model of every ladder must do: train, stop and resume bit for bit, export, reproduce its score, sample."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import models
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_gpt

ROOT = Path(train_gpt.__file__).resolve().parent
LADDERS = ROOT / "records" / "ladders"


def load(file: str):
    """The module of a model file, such as small/small.py, as MODEL_FILE loads it."""
    return sys.modules[train_gpt.load_model_file(str(LADDERS / file)).__module__]


def count_parameters(config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in config.model_class()(config).parameters())


def copy_ladders(folder: Path):
    """Copy what the ladders need of the repository, without their logs."""
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
        sys.modules.pop("ladder", None)  # it may be that of another copy
        spec.loader.exec_module(module)
    return module


def check_causal(model, tokens_1T, t: int = 7):
    """The logits at t depend on all embeddings up to t and on none after it."""
    seen = []
    hook = model.tok_emb.register_forward_hook(lambda module, inputs, x: x.retain_grad() or seen.append(x))
    model(tokens_1T)[0, t].square().sum().backward()
    hook.remove()
    grad_TD = seen[0].grad[0]
    assert (grad_TD[t + 1 :] == 0).all() and (grad_TD[: t + 1] != 0).any(dim=1).all()


def check_flops(config):
    """The FLOPs behind the log's MFU are those that torch counts of matmuls in a training step with plain attention."""
    T = config.train_seq_len
    kernels = train_gpt.tool("kernels")
    model = models.new_model(config, kernels.expanded_attention)
    tokens = torch.randint(config.vocab_size, (2, T), generator=torch.Generator().manual_seed(3))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, tokens).mean().backward()
    assert kernels.flops_per_token(model, T) == counter.get_total_flops() / tokens.numel()


def settings(corpus: Path, logs: Path, **overrides) -> dict[str, str]:
    """The environment of a short run on the corpus. The numbers of heads are the model's own."""
    vocab_size = int((corpus / "vocab_size").read_text()) + 4
    more = {"LOG_DIR": logs, "VOCAB_SIZE": vocab_size, "VAL_TOKENS_LIMIT": 400, "CHECKPOINT_EVERY_SECONDS": 0}
    values = models.run_settings(corpus, **more | overrides)
    return {name: text for name, text in values.items() if "_HEADS" not in name or name in overrides}


def start(values: dict[str, str]) -> int:
    """The exit code of main() in this environment. Signals and switches are restored after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "INT8_MIN_NUMEL", 1000)  # so that something is quantized
        try:
            return models.call_main(values)
        finally:
            for switch in ("flash", "cudnn", "mem_efficient", "math"):  # the run pins one of them
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


def check_life(file: str, corpus: Path, folder: Path, capfd, **overrides) -> Path:
    """Run a model file; stop and resume the same run; score its artifact and sample from it. Returns the run folder."""
    values = settings(corpus, folder / "whole", MODEL_FILE=LADDERS / file, **overrides)
    cut = values | {"LOG_DIR": str(folder / "cut")}
    assert start(values) == 0
    score = models.exact_line(capfd.readouterr().out)
    with stopped_at(3):
        assert start(cut) == 128 + signal.SIGTERM
    assert start(cut) == 0
    assert models.exact_line(capfd.readouterr().out) == score
    state, state_cut = (torch.load(folder / name / "run" / "final_model.pt") for name in ("whole", "cut"))
    assert state.keys() == state_cut.keys() and all(state[name].equal(state_cut[name]) for name in state)
    assert json.loads((folder / "cut" / "run" / "result.json").read_text())["resumed_at"] == [3]
    sources = json.loads((folder / "whole" / "run" / "result.json").read_text())["sources"]
    assert set(sources) == {"train_gpt.py", Path(file).name}

    # The artifact names its model file and finds it in the run folder.
    machine = ("DATA_PATH", "TOKENIZER_PATH", "DEVICE", "DTYPE", "COMPILE", "VAL_TOKENS_LIMIT")
    machine = {name: values[name] for name in machine}
    machine["ARTIFACT"] = str(folder / "whole" / "run" / "final_model.int8.ptz")
    assert start(machine | {"MODE": "eval"}) == 0
    assert models.exact_line(capfd.readouterr().out) == score
    assert start(machine | {"MODE": "sample", "SAMPLE_PROMPT": "the king", "SAMPLE_TOKENS": "5"}) == 0
    assert capfd.readouterr().out.startswith("the king")
    return folder / "whole" / "run"
