"""Small in-process runs for tests, and helpers that take their files apart and reassemble them with valid checksums."""

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pytest
import torch

import train_gpt

SCRIPT = Path(train_gpt.__file__).resolve()
FRONTIER = "records/models/frontier.py"
SAMPLE = ("SAMPLE_PROMPT", "SAMPLE_TOKENS", "TEMPERATURE", "TOP_K")  # used only by MODE=sample
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RESTART_COUNT")
# Machine settings and data paths: all that MODE=eval may need in addition to ARTIFACT.
MACHINE = ("DEVICE", "DTYPE", "COMPILE", "DATA_PATH", "TOKENIZER_PATH")


def run_settings(corpus: Path, **overrides) -> dict[str, str]:
    """The environment of a one-second run of a two-layer model."""
    base = {
        "DATA_PATH": corpus / "data",
        "TOKENIZER_PATH": corpus / "tok.model",
        "RUN_ID": "run",
        "LOG_DIR": "logs",
        "VOCAB_SIZE": (corpus / "vocab_size").read_text(),
        "DEVICE": "cpu",
        "DTYPE": "float32",
        "COMPILE": "0",
        "MAX_WALLCLOCK_SECONDS": 0,
        "ITERATIONS": 5,
        "NUM_LAYERS": 2,
        "MODEL_DIM": 32,
        "NUM_HEADS": 4,
        "NUM_KV_HEADS": 2,
        "TRAIN_SEQ_LEN": 32,
        "TRAIN_BATCH_TOKENS": 256,
        "VAL_BATCH_SIZE": 512,
        "WARMUP_STEPS": 0,
        "VAL_LOSS_EVERY": 0,
    }
    return {name: str(value) for name, value in (base | overrides).items()}


def knobs(text: str) -> dict[str, str]:
    """Parse a string such as "NUM_LAYERS=3 LOOP_LAYERS=0-1" into {KNOB: value}."""
    return dict(pair.split("=") for pair in text.split())


def tiny_settings(corpus: Path, **overrides) -> dict[str, str]:
    """Settings of a run whose artifact must record some knobs because they differ from the defaults."""
    return run_settings(corpus, **{"ITERATIONS": 4, "ROPE_BASE": 5000, "LOGIT_SOFTCAP": 20} | overrides)


def machine_settings(corpus: Path, **overrides) -> dict[str, str]:
    """The part of `tiny_settings` that MODE=eval and MODE=sample need."""
    return {name: text for name, text in tiny_settings(corpus).items() if name in MACHINE} | {
        name: str(value) for name, value in overrides.items()
    }


@contextlib.contextmanager
def environment(values: dict[str, str]):
    """Set only these variables; remove all other knobs and launcher variables from the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (*train_gpt.Config.knobs(), *SAMPLE, *LAUNCHER):
            patch.delenv(name, raising=False)
        for name, value in values.items():
            patch.setenv(name, value)
        yield


@contextlib.contextmanager
def signals_restored():
    """Restore the signal handlers that training replaces."""
    names = {"SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"} & set(dir(signal))
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in names}
    try:
        yield
    finally:
        for name, handler in handlers.items():
            signal.signal(getattr(signal, name), handler)


def call_main(values: dict[str, str], *args) -> int:
    """The exit code of main() in this environment."""
    with environment(values), signals_restored():
        return train_gpt.main([str(arg) for arg in args])


def train_tiny(corpus: Path, folder: Path, **overrides) -> Path:
    """The folder of a finished run. Some of its tensors are stored as int8 although they are small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "INT8_MIN_NUMEL", 1500)
        assert call_main(tiny_settings(corpus, LOG_DIR=folder / "logs", **overrides)) == 0
    return folder / "logs" / "run"


def new_model(config, *args, of=None) -> train_gpt.Model:
    """The initialized model of a configuration, or of class `of`; `args` are the attention function and the dtype."""
    model = (of or config.model_class())(config, *args)
    model.init_weights(config)
    return model


def model_file(name: str):
    """(class Config, module) of records/models/NAME.py."""
    config_class = train_gpt.load_model_file(f"records/models/{name}.py")
    return config_class, sys.modules[config_class.__module__]


@contextlib.contextmanager
def no_siblings():
    """Simulate a new process that has loaded only frontier.py of records/models/, not the files it loads on demand.

    Everything loaded from a model file's folder counts as code of the run.
    """
    keys = [key for key in sys.modules if key.startswith("model_file_") and not key.endswith("_frontier_py")]
    with pytest.MonkeyPatch.context() as patch:
        for key in keys:
            patch.delitem(sys.modules, key)
        yield


@contextlib.contextmanager
def fresh_model_files():
    """Simulate a new process in which no model file, nor any module next to one, has been loaded."""
    folder = str(SCRIPT.parent / "records")

    def loaded():
        return {
            key: module
            for key, module in sys.modules.items()
            if key.startswith("model_file_") or str(getattr(module, "__file__", "")).startswith(folder)
        }

    before, path = loaded(), list(sys.path)
    for key in before:
        del sys.modules[key]
    try:
        yield
    finally:
        for key in loaded():
            del sys.modules[key]
        sys.modules.update(before)
        sys.path[:] = path


def artifact_knobs(config_class=train_gpt.Config) -> set[str]:
    """The knobs that an artifact records."""
    return {name for name, field in config_class.knobs().items() if field.metadata["artifact"]}


def parameter_groups(model, config, runtime) -> dict[str, list]:
    """What AdamW trains (the embedding, an untied output projection, vectors) and what Muon trains (the matrices)."""
    adam, *muon = model.optimizers(config, runtime)
    kinds = ["embed", *["head"] * (not config.tie_embeddings), "scalar"]
    groups = {kind: group["params"] for kind, group in zip(kinds, adam.param_groups, strict=True)}
    matrices = [p for optimizer in muon for group in optimizer.param_groups for p in group["params"]]
    return {"head": []} | groups | {"matrix": matrices}


def build_trainer(config, runtime, trainer_class=train_gpt.Trainer) -> train_gpt.Trainer:
    """A Trainer of the configuration on its training data, without a run folder."""
    stream = train_gpt.TokenStream(config.data_path, "train", config.vocab_size)
    accum_steps = config.accumulation_steps(runtime.world_size, runtime.device.type)
    loader = train_gpt.TrainLoader(stream, config, runtime, accum_steps)
    stopwatch = train_gpt.Stopwatch(runtime.synchronize)
    return trainer_class(config, train_gpt.RunFolder(runtime), stopwatch, loader)


def run_audit(token_bytes, stream, stated: dict | None = None) -> tuple[str, dict]:
    """The audit of a validation stream for which a manifest states `stated`."""
    with tempfile.TemporaryDirectory() as folder:
        if stated:
            (Path(folder) / "manifest.json").write_text(json.dumps({"splits": {"val": stated}}))
        return train_gpt.audit(token_bytes, stream, folder)


def process(environ, cwd, ranks=1, script=SCRIPT, args=(), options=(), torchrun=(), timeout=300, text=False, **more):
    """Run a script in its own process, or under torchrun. Returns the CompletedProcess. `options` are Python's."""
    others = {
        name: value for name, value in os.environ.items() if name not in (*train_gpt.Config.knobs(), *SAMPLE, *LAUNCHER)
    }
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *torchrun] * (ranks > 1)
    command = [sys.executable, *options, *several, str(script), *map(str, args)]
    how = {"env": others | environ | more, "cwd": cwd, "capture_output": True, "timeout": timeout, "text": text}
    return subprocess.run(command, check=False, **how)


def exact_line(text: str, label="final_int8_zlib_roundtrip") -> str:
    """The digits of a logged score."""
    (line,) = re.findall(rf"^{label}_exact (.*)$", text, re.MULTILINE)
    assert re.match(r"val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8} tokens:\d+ bytes:\d+", line)
    return line


def tree(path: Path) -> dict:
    """All files and folders below `path`."""
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


def torch_bytes(value, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def load(data: bytes):
    return torch.load(io.BytesIO(data), weights_only=True)


def seal(packed: bytes) -> bytes:
    """An artifact with this payload: the zlib stream and its checksum."""
    blob = zlib.compress(packed, 9)
    return blob + hashlib.sha256(blob).digest()


def open_artifact(path: Path) -> dict:
    return load(zlib.decompressobj().decompress(path.read_bytes()))


def seal_checkpoint(state) -> bytes:
    data = torch_bytes(state)
    return data + hashlib.sha256(data).digest()


def open_checkpoint(path: Path) -> dict:
    return load(path.read_bytes()[:-32])


class Canary:
    """An object whose pickle creates a folder if the reader executes code while loading it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
