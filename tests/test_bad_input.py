"""What users get wrong, and what is broken or hostile, through main(): exit code 2, one message that helps, no
traceback, no code run, no file lost, changed or left behind.

Each table below is a list of cases (name, what is given, what the message must say)."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import models
import numpy as np
import pytest
import torch
from conftest import ROOT, write_shard

import train_gpt

PATIENCE = 60  # seconds after which an endless loop is interrupted; nothing here takes a tenth of it


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """The folder of a finished run."""
    return models.train_tiny(corpus, tmp_path_factory.mktemp("trained"))


class Place:
    """A user's folder, in which things go wrong: a copy of the data, and of a run that was stopped."""

    def __init__(self, corpus: Path, trained: Path, folder: Path):
        self.corpus, self.trained, self.folder = corpus, trained, folder
        self.data = shutil.copytree(corpus / "data", folder / "data")
        self.tokenizer = Path(shutil.copy(corpus / "tok.model", folder / "tok.model"))
        self.canary, self.given = folder / "canary", folder / "given"

    def settings(self, **overrides) -> dict[str, str]:
        here = {"DATA_PATH": self.data, "TOKENIZER_PATH": self.tokenizer, "LOG_DIR": self.folder / "logs"}
        if overrides.get("MODE") in ("eval", "sample"):
            return models.machine_settings(self.corpus, **here | overrides)
        return models.tiny_settings(self.corpus, **here | overrides)

    def stopped_run(self) -> Path:
        """The run folder as it was after the last step."""
        run = shutil.copytree(self.trained, self.folder / "logs" / "run")
        for name in ("result.json", "final_model.pt", "final_model.int8.ptz"):
            (run / name).unlink()
        return run


@pytest.fixture
def place(corpus, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a run leaves in the current folder shows, too
    return Place(corpus, trained, tmp_path)


def files(path: Path) -> dict:
    found = [p for p in path.rglob("*") if p.is_symlink() or p.exists()]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).digest() if p.is_file() else None for p in found}


def the_message(out: str, err: str) -> str:
    """The one message, the last thing on stderr; in MODE=sample, where stdout is for the text, notes come before it."""
    assert "Traceback" not in out + err and "error:" not in out
    notes, message = re.fullmatch(r"((?:.*\n)*?)error: (.+\n(?:.*\n)*)", err).groups()
    assert "Warning" not in notes, err
    lines = message.splitlines()
    assert len(lines) == 1 or lines[1:] == train_gpt.NO_DATA_HINT.splitlines()[1:], message
    return message


@contextlib.contextmanager
def impatience():
    """Ends what hangs."""

    def stop(number, frame):
        pytest.fail("this hangs")

    signal = pytest.importorskip("signal")
    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def refuse(place, capfd):
    """Function: the message with which main() refuses this environment, after all that must hold of it."""

    def run(*args, said=(), **overrides) -> str:
        before = files(place.folder)
        with impatience():
            code = models.call_main(place.settings(**overrides), *args)
        out, err = capfd.readouterr()
        assert code == 2, (code, out[-600:], err)
        message = the_message(out, err)
        assert not place.canary.exists()
        assert files(place.folder) == before
        for words in [said] if isinstance(said, str) else said:
            assert words in message, message
        return message

    return run


def table(cases, **options):
    """A test for each case of a table of (name, ...)."""
    names = [case[0] for case in cases]
    assert len(set(names)) == len(names)
    return pytest.mark.parametrize("case", [case[1:] for case in cases], ids=names, **options)


def assert_shows_the_two_commands(message: str):
    assert "\n  python data/prepare_shakespeare.py\n  python train_gpt.py records/recipes/demo_cpu.env\n" in message


# Configuration

CONFIGURATION = [
    ("heads that do not cut the width", {"NUM_HEADS": "7"}, ["MODEL_DIM=32", "NUM_HEADS=7", "use 42"]),
    ("kv heads that do not divide", {"NUM_KV_HEADS": "3"}, ["NUM_KV_HEADS=3", "[1, 2, 4]"]),
    ("letters for a whole number", {"ITERATIONS": "abc"}, ["ITERATIONS='abc'", "whole number"]),
    ("fraction for a whole number", {"TRAIN_SEQ_LEN": "3.5"}, ["TRAIN_SEQ_LEN='3.5'", "whole number"]),
    ("nothing for a whole number", {"SEED": ""}, ["SEED=''", "whole number"]),
    ("zero steps", {"ITERATIONS": "0"}, ["ITERATIONS=0", "minimum is 1"]),
    ("number beyond a float", {"ITERATIONS": "1" + 400 * "0"}, "ITERATIONS="),
    ("number beyond int()", {"ITERATIONS": 5000 * "9"}, "ITERATIONS="),
    ("steps beyond reason", {"ITERATIONS": "1" + 30 * "0"}, "ITERATIONS="),
    ("seed beyond 63 bits", {"SEED": str(2**63)}, ["SEED=", "the maximum is"]),
    ("nan for a rate", {"MATRIX_LR": "nan"}, ["MATRIX_LR='nan'", "finite", "0.02"]),
    ("infinity for a rate", {"MATRIX_LR": "inf"}, ["MATRIX_LR='inf'", "finite"]),
    ("negative rate", {"MATRIX_LR": "-0.1"}, ["MATRIX_LR=-0.1", "minimum is 0"]),
    ("share over one", {"WARMDOWN_FRAC": "1.5"}, ["WARMDOWN_FRAC=1.5", "maximum is 1"]),
    ("word for a switch", {"TIE_EMBEDDINGS": "yes"}, ["TIE_EMBEDDINGS='yes'", "0 or 1"]),
    ("unknown type", {"DTYPE": "fp16"}, ["DTYPE=fp16", "bfloat16"]),
    ("unknown mode", {"MODE": "eat"}, ["MODE=eat", "train, check, eval, sample"]),
    ("unknown attention", {"ATTENTION": "fast"}, ["ATTENTION=fast", "blocked"]),
    ("batch of broken sequences", {"TRAIN_BATCH_TOKENS": "100"}, ["TRAIN_BATCH_TOKENS=100", "use 128"]),
    ("batch beyond reason", {"TRAIN_BATCH_TOKENS": str(32 * 10**30)}, "TRAIN_BATCH_TOKENS="),
    ("heads beyond reason", {"MODEL_DIM": str(2 * 10**30), "NUM_HEADS": str(10**30)}, "="),
    ("model beyond memory", {"MODEL_DIM": str(2**31)}, ["memory", "smaller MODEL_DIM"]),
    ("vocabulary over 16 bits", {"VOCAB_SIZE": "65537"}, ["VOCAB_SIZE=65537", "65536"]),
    ("stride over the sequence", {"EVAL_STRIDE": "33"}, ["EVAL_STRIDE=33", "TRAIN_SEQ_LEN=32"]),
    ("micro-batch under a sequence", {"MICRO_BATCH_TOKENS": "31"}, ["MICRO_BATCH_TOKENS=31", "auto"]),
    ("micro-batch that is no number", {"MICRO_BATCH_TOKENS": "big"}, ["MICRO_BATCH_TOKENS=big", "auto"]),
    ("micro-batch beyond int()", {"MICRO_BATCH_TOKENS": 5000 * "9"}, ["MICRO_BATCH_TOKENS=", "auto"]),
    ("micro-batch of two zeros", {"MICRO_BATCH_TOKENS": "00"}, ["MICRO_BATCH_TOKENS=00", "auto"]),
    ("both cuts of the step", {"GRAD_ACCUM_STEPS": "2", "MICRO_BATCH_TOKENS": "64"}, "unset one"),
    ("micro-steps that do not divide", {"GRAD_ACCUM_STEPS": "3"}, ["GRAD_ACCUM_STEPS=3", "[1, 2, 4, 8]"]),
    ("checkpoints before they are due", {"CHECKPOINT_EVERY_SECONDS": "-2"}, "CHECKPOINT_EVERY_SECONDS=-2"),
    ("run id that climbs", {"RUN_ID": "../x"}, ["RUN_ID='../x'", "use up to 100 letters"]),
    ("run id too long for a name", {"RUN_ID": 300 * "x"}, "xxx"),
    ("path of two lines", {"DATA_PATH": "a\nb"}, ["DATA_PATH='a\\nb'", "use another"]),
    ("path that is not UTF-8", {"DATA_PATH": "caf\udce9"}, ["DATA_PATH='caf\\udce9'", "use another"]),
    ("path with both quotes", {"DATA_PATH": """say "it's" """}, ["DATA_PATH=", "quotes"]),
    (
        "prompt with half a character by its number",
        {"MODE": "sample", "ARTIFACT": "x", "SAMPLE_PROMPT": r"a\ud83d"},
        ["SAMPLE_PROMPT='a\\ud83d'"],
    ),
    (
        "prompt that is not UTF-8",
        {"MODE": "sample", "ARTIFACT": "x", "SAMPLE_PROMPT": "caf\udce9"},
        ["SAMPLE_PROMPT='caf\\udce9'"],
    ),
    ("rank out of the world", {"RANK": "2", "WORLD_SIZE": "2"}, ["RANK=2 WORLD_SIZE=2", "torchrun"]),
    ("world without a launcher", {"WORLD_SIZE": "2"}, ["WORLD_SIZE=2", "torchrun"]),
    ("world without a port", {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, ["MASTER_PORT", "torchrun"]),
    ("world that is no number", {"WORLD_SIZE": "two"}, ["WORLD_SIZE=two", "torchrun"]),
    ("kernel that is not for this device", {"ATTENTION": "cudnn"}, ["ATTENTION=cudnn", "use ATTENTION=auto"]),
    ("eval without an artifact", {"MODE": "eval"}, ["MODE=eval", "ARTIFACT="]),
    ("sample without an artifact", {"MODE": "sample"}, ["MODE=sample", "ARTIFACT="]),
    ("sample of no tokens", {"MODE": "sample", "ARTIFACT": "x", "SAMPLE_TOKENS": "0"}, "SAMPLE_TOKENS=0"),
    ("negative temperature", {"MODE": "sample", "ARTIFACT": "x", "TEMPERATURE": "-1"}, "TEMPERATURE=-1"),
]


@table(CONFIGURATION)
def test_configuration(refuse, case):
    knobs, said = case
    refuse(said=said, **knobs)


def test_device_that_is_not_there(refuse, monkeypatch):
    monkeypatch.setattr(train_gpt.torch.cuda, "is_available", lambda: False)
    refuse(DEVICE="cuda", said="use DEVICE=auto")


class At(NamedTuple):
    """What is done with a path, where the others give new bytes for old ones."""

    do: Callable[[Path], None]


def damage(path: Path, change):
    if isinstance(change, At):
        change.do(path)
    else:
        path.write_bytes(change(path.read_bytes()))


def emptied(path: Path):
    path.unlink()
    path.mkdir()


def dangling(path: Path):
    path.unlink()
    path.symlink_to("nowhere")


# FILE.env: (name, bytes of the file or how the path is made; what the message says beside the path)

ENV_FILES = [
    ("missing", None, ["No such file", "FILE.env"]),
    ("directory", At(Path.mkdir), "FILE.env"),
    ("dangling link", At(lambda path: path.symlink_to("nowhere")), ["No such file", "FILE.env"]),
    ("loop of links", At(lambda path: path.symlink_to(path)), "FILE.env"),
    ("latin 1", b"DATA_PATH=caf\xe9\n", "FILE.env"),
    ("utf-16", "SEED=1\n".encode("utf-16"), "FILE.env"),
    ("shard", np.arange(2000, dtype="<u2").tobytes(), "FILE.env"),
    ("zeros", bytes(100), ":1: "),
    ("json", b'{"SEED": 1}\n', [":1: ", "KEY=VALUE"]),
    ("unknown knob", b"SEED=1\nMATRXI_LR=0.03\n", ["MATRXI_LR", "did you mean MATRIX_LR?"]),
    ("knob like no other", b"XYZZY=1\n", ["XYZZY", "--help"]),
    ("no equals sign", b"SEED=1\nMATRIX_LR 0.03\n", [":2: ", "KEY=VALUE"]),
    ("export", b"export SEED=1\n", [":1: ", "KEY=VALUE"]),
    ("open quote", b'DATA_PATH="/a\n', [":1: ", "KEY=VALUE"]),
    ("twice", b"SEED=1\n\nSEED=1\n", [":3: ", "twice"]),
    ("bad value", b"TARGET_WORLD_SIZE=many\n", ["TARGET_WORLD_SIZE='many'", "whole number"]),
    ("no value", b"TARGET_WORLD_SIZE=\n", ["TARGET_WORLD_SIZE=''", "whole number"]),
]


@table(ENV_FILES)
def test_file_env(refuse, place, case):
    content, said = case
    if isinstance(content, At):
        content.do(place.given)
    elif content is not None:
        place.given.write_bytes(content)
    message = refuse(place.given, said=said)
    assert str(place.given) in message or "TARGET_WORLD_SIZE=" in message


def test_arguments_that_are_no_file(refuse, place):
    place.given.write_text("SEED=1\n")
    refuse(place.given, place.given, said="at most one")
    refuse("--bogus", said="--bogus")
    refuse("SEED=3", said="SEED=3")


# Shards: (name, the shard, its new bytes by its old ones or what is done with its path; what the message says)

TRAIN, VAL = "fineweb_train_000001.bin", "fineweb_val_000000.bin"


def header(magic=20240520, version=1, count=None):
    """Replaces the numbers at the beginning of a shard."""

    def change(data: bytes) -> bytes:
        old = struct.unpack("<i", data[8:12])[0]
        return struct.pack("<3i", magic, version, old if count is None else count(old)) + data[12:]

    return change


def shard_of(*tokens):
    return At(lambda path: write_shard(path, tokens))


AGAIN = "make or fetch it again"
SHARDS = [
    ("one byte short", TRAIN, lambda data: data[:-1], [" bytes, header [20240520, 1, ", AGAIN]),
    ("one byte short, validation", VAL, lambda data: data[:-1], [" bytes, header [20240520, 1, ", AGAIN]),
    ("one token short", VAL, lambda data: data[:-2], ["6888 bytes, header [20240520, 1, 2933]", AGAIN]),
    ("one byte long", TRAIN, lambda data: data + b"\0", AGAIN),
    ("half", TRAIN, lambda data: data[: len(data) // 2], AGAIN),
    ("header alone", VAL, lambda data: data[:1024], AGAIN),
    ("half a header", VAL, lambda data: data[:500], ["500 bytes", AGAIN]),
    ("nothing", TRAIN, lambda data: b"", ["0 bytes", AGAIN]),
    ("other magic", TRAIN, header(magic=67305985), ["header [67305985, 1, ", "expected magic 20240520", AGAIN]),
    ("other magic, validation", VAL, header(magic=0), ["header [0, 1, 2933]", "expected magic 20240520", AGAIN]),
    ("other version", VAL, header(version=2), ["header [20240520, 2, 2933]", AGAIN]),
    ("count too high", TRAIN, header(count=lambda n: n + 1), AGAIN),
    ("count too low", TRAIN, header(count=lambda n: n - 1), AGAIN),
    ("count of zero", VAL, header(count=lambda n: 0), AGAIN),
    ("negative count", VAL, header(count=lambda n: -n), AGAIN),
    ("largest count", VAL, header(count=lambda n: 2**31 - 1), AGAIN),
    ("big-endian", VAL, lambda data: np.frombuffer(data[:1024], "<i4").astype(">i4").tobytes() + data[1024:], AGAIN),
    ("text", VAL, lambda data: b"To be, or not to be\n" * 100, AGAIN),
    ("directory", VAL, At(emptied), VAL),
    ("directory, training", TRAIN, At(emptied), TRAIN),
    ("dangling link", VAL, At(dangling), VAL),
    (
        "a gap",
        TRAIN,
        At(lambda path: path.rename(path.with_name("fineweb_train_000002.bin"))),
        ["shard 1 is missing", "fetch"],
    ),
    (
        "no beginning",
        VAL,
        At(lambda path: path.rename(path.with_name("fineweb_val_000001.bin"))),
        ["shard 0 is missing", "fetch"],
    ),
    (
        "twice",
        VAL,
        At(lambda path: shutil.copy(path, path.with_name("fineweb_val_0.bin"))),
        ["duplicated", "remove one"],
    ),
    ("no validation text", VAL, At(Path.unlink), ["holds no fineweb_val_", "prepare_shakespeare"]),
    ("one token", VAL, shard_of(1), ["holds 1 tokens", "2 are needed"]),
    ("tokens that weigh nothing", VAL, shard_of(1, 1, 1), ["stand for no bytes", AGAIN]),
]


@table(SHARDS)
def test_shard(refuse, place, case):
    name, change, said = case
    damage(place.data / name, change)
    message = refuse(said=said)
    assert str(place.data) in message


def test_missing_data_folder(refuse, place):
    message = refuse(DATA_PATH=place.folder / "nowhere", said=f"DATA_PATH={place.folder / 'nowhere'}")
    assert_shows_the_two_commands(message)


def test_file_for_a_data_folder(refuse, place):
    assert_shows_the_two_commands(refuse(DATA_PATH=place.tokenizer, said=f"DATA_PATH={place.tokenizer}"))


@pytest.mark.parametrize("name", ["fineweb_train_000000.bin", VAL])
def test_token_over_the_vocabulary(refuse, place, name):
    size = int(place.settings()["VOCAB_SIZE"])
    tokens = np.fromfile(place.data / name, dtype="<u2", offset=1024)
    tokens[len(tokens) // 2] = size
    write_shard(place.data / name, tokens)
    refuse(said=[f"token {size} >= VOCAB_SIZE={size}: set ", name[:-10]])


MANIFESTS = [
    ("other count", b'{"splits": {"val": {"bytes": 12345}}}', "manifest.json says 12345"),
    ("no count", b'{"splits": {}}', "manifest.json"),
    ("list", b"[1, 2]", "manifest.json"),
    ("no json", b'{"splits"', "manifest.json"),
    ("not UTF-8", b'{"caf\xe9": 1}', "manifest.json"),
    ("infinity", b'{"splits": {"val": {"bytes": 1e999}}}', "manifest.json"),
    ("word", b'{"splits": {"val": {"bytes": "many"}}}', "manifest.json"),
]


@table(MANIFESTS)
def test_manifest(refuse, place, case):
    content, said = case
    (place.data / "manifest.json").write_bytes(content)
    refuse(said=[said, "again"])


# Tokenizers: (name, the new bytes by the old ones or what is done with the path; what the message says)

TOKENIZERS = [
    ("missing", At(Path.unlink), ["does not exist", "prepare_shakespeare"]),
    ("directory", At(emptied), ["does not exist", "prepare_shakespeare"]),
    ("empty", lambda data: b"", AGAIN),
    ("text", lambda data: b"the king of the sea\n" * 50, AGAIN),
    ("zeros", lambda data: bytes(5000), AGAIN),
    ("cut in half", lambda data: data[: len(data) // 2], "TOKENIZER_PATH"),
    ("without its last byte", lambda data: data[:-1], AGAIN),
    ("first bit flipped", lambda data: bytes([data[0] ^ 1]) + data[1:], AGAIN),
    ("sign bit of a length flipped", lambda data: data[:1] + bytes([data[1] ^ 128]) + data[2:], AGAIN),
    ("shard", lambda data: np.arange(3000, dtype="<u2").tobytes(), AGAIN),
    ("zip", lambda data: models.torch_bytes({"a": 1}), AGAIN),
]


@table(TOKENIZERS)
def test_tokenizer(refuse, place, case):
    change, said = case
    damage(place.tokenizer, change)
    refuse(said=[f"TOKENIZER_PATH={place.tokenizer}"] + ([said] if isinstance(said, str) else said))


def test_tokenizer_of_another_size(refuse, place):
    size = place.settings()["VOCAB_SIZE"]
    refuse(
        VOCAB_SIZE=1024,
        said=[f"VOCAB_SIZE=1024, but TOKENIZER_PATH={place.tokenizer}", f" has {size} pieces: set that"],
    )


def test_tokenizer_of_other_shards(refuse, place):
    """Right size, wrong text: only the audit can tell."""
    size = int(place.settings()["VOCAB_SIZE"])
    write_shard(place.data / VAL, list(reversed(range(size))))
    refuse(said="use the tokenizer of the shards")


# Checkpoints: (name, a function of what the checkpoint holds that returns the new bytes; what the message says)


def state_with(change):
    """The state of the run after `change`, with a checksum that holds."""

    def make(place: Place) -> bytes:
        state = models.open_checkpoint(place.trained / "checkpoint.pt")
        changed = change(state)
        return models.seal_checkpoint(state if changed is None else changed)

    return make


def bytes_with(change):
    return lambda place: change((place.trained / "checkpoint.pt").read_bytes())


def flipped(data: bytes, bit: int) -> bytes:
    bit %= 8 * len(data)
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def drop(*keys):
    """A change that takes out what a path of keys leads to."""

    def change(value):
        for key in keys[:-1]:
            value = value[key]
        del value[keys[-1]]

    return change


def set_to(*keys_and_value):
    """A change that puts something else, or a function of what is there, where a path of keys leads."""
    *keys, last, new = keys_and_value

    def change(value):
        for key in keys:
            value = value[key]
        value[last] = new(value[last]) if callable(new) else new

    return change


def zip_of(entries, compression=zipfile.ZIP_DEFLATED) -> bytes:
    """An archive of (name, bytes)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


def deflated_bomb(value, size=2**34) -> bytes:
    """What torch.save writes, with an entry of `size` zeros in a few bytes: deflated, and then deflated by hand, since
    nobody has the time to compress so much."""
    plain = zipfile.ZipFile(io.BytesIO(models.torch_bytes(value)))
    entries = [(name, plain.read(name)) for name in plain.namelist()]
    data = bytearray(zip_of([(n, d) if not n.endswith("data/0") else (n, bytes(2**20)) for n, d in entries]))
    small, large = struct.pack("<I", 2**20), struct.pack("<I", min(size, 2**32 - 2))
    return bytes(data.replace(small, large))


def overlapping_bomb(value, copies=2000) -> bytes:
    """Many entries of the directory of an archive that all mean the same bytes."""
    data = models.torch_bytes(value)
    end = data.rindex(b"PK\5\6")
    size, start = struct.unpack("<II", data[end + 12 : end + 20])
    directory = data[start : start + size]
    records = [b"PK\1\2" + record for record in directory.split(b"PK\1\2")[1:]]
    biggest = max(records, key=lambda record: struct.unpack("<I", record[24:28]))
    total = records + [biggest] * copies
    count = len(total)
    tail = struct.pack("<HHIIH", count, count, len(b"".join(total)), start, 0)
    return data[:start] + b"".join(total) + b"PK\5\6" + data[end + 4 : end + 8] + tail


def laughs():
    """A list that is small in memory and in the file, and endless when it is printed."""
    value = ["ha"]
    for _ in range(60):
        value = [value, value]
    return value


def checked(data: bytes) -> bytes:
    return data + hashlib.sha256(data).digest()


W, Q = "blocks.0.mlp.fc.weight", "blocks.0.attn.q_gain"
CHECKPOINTS = [
    ("empty", bytes_with(lambda data: b""), "checksum"),
    ("short", bytes_with(lambda data: data[:20]), "checksum"),
    ("cut in half", bytes_with(lambda data: data[: len(data) // 2]), "checksum"),
    ("without its last byte", bytes_with(lambda data: data[:-1]), "checksum"),
    ("without its checksum", bytes_with(lambda data: data[:-32]), "checksum"),
    ("a byte too long", bytes_with(lambda data: data + b"\0"), "checksum"),
    ("first bit flipped", bytes_with(lambda data: flipped(data, 0)), "checksum"),
    ("bit flipped in the middle", bytes_with(lambda data: flipped(data, 4 * len(data))), "checksum"),
    ("last bit flipped", bytes_with(lambda data: flipped(data, -1)), "checksum"),
    ("text", lambda place: b"the king of the sea", "checksum"),
    ("artifact", lambda place: (place.trained / "final_model.int8.ptz").read_bytes(), "is damaged"),
    ("model", lambda place: (place.trained / "final_model.pt").read_bytes(), "checksum"),
    ("checksum of nothing", lambda place: checked(b""), "is damaged or of another format"),
    ("checksum of text", lambda place: checked(b"the king"), "is damaged or of another format"),
    ("pickle that runs code", state_with(lambda state: state | {"rng": models.Canary(Path("canary"))}), "is damaged"),
    (
        "plain pickle that runs code",
        lambda place: checked(models.torch_bytes(models.Canary(place.canary), _use_new_zipfile_serialization=False)),
        "is damaged",
    ),
    ("list", state_with(lambda state: [state]), "holds a list"),
    ("tensor", state_with(lambda state: torch.ones(3)), "holds a Tensor"),
    ("other format", state_with(set_to("format", "somebody_else_v7")), "format"),
    ("format that is endless", state_with(set_to("format", laughs())), "format"),
    *(
        (f"without {key}", state_with(drop(key)), "is damaged")
        for key in (
            "format",
            "knobs",
            "model",
            "optimizer",
            "rng",
            "position",
            "steps",
            "train_seconds",
            "finished",
            "resumed_at",
        )
    ),
    ("without a matrix", state_with(drop("model", W)), "is damaged"),
    ("with a matrix more", state_with(set_to("model", lambda model: model | {"x": torch.ones(1)})), "is damaged"),
    ("wrong shape", state_with(set_to("model", W, lambda w: w[:-1])), "is damaged"),
    ("word for a matrix", state_with(set_to("model", W, "heavy")), "is damaged"),
    ("without the state of a matrix", state_with(drop("optimizer", W)), W),
    ("without the state of a vector", state_with(drop("optimizer", Q)), Q),
    ("without a momentum", state_with(drop("optimizer", W, "momentum_buffer")), W),
    ("without a second moment", state_with(drop("optimizer", Q, "exp_avg_sq")), Q),
    ("momentum of a wrong shape", state_with(set_to("optimizer", W, "momentum_buffer", lambda m: m[:-1])), W),
    ("momentum of one number", state_with(set_to("optimizer", W, "momentum_buffer", torch.tensor(0.0))), W),
    ("words for a momentum", state_with(set_to("optimizer", W, "momentum_buffer", "fast")), "is damaged"),
    ("list for the optimizers", state_with(set_to("optimizer", [1])), "is damaged"),
    ("words for the position", state_with(set_to("position", "here")), "is damaged"),
    ("fraction for the position", state_with(set_to("position", 0.5)), "is damaged"),
    ("words for the steps", state_with(set_to("steps", "four")), "is damaged"),
    ("words for the seconds", state_with(set_to("train_seconds", "long")), "is damaged"),
    ("no state of random numbers", state_with(set_to("rng", [])), "is damaged"),
    ("wrong state of random numbers", state_with(set_to("rng", [{"cpu": torch.ones(3)}])), "is damaged"),
    ("configuration that is a list", state_with(set_to("knobs", ["SEED"])), "is damaged"),
    ("configuration of tensors", state_with(set_to("knobs", {"SEED": torch.ones(3)})), "is damaged"),
    ("configuration that is endless", state_with(set_to("knobs", {"SEED": laughs()})), "is damaged"),
    ("iterations that are no number", state_with(set_to("knobs", "ITERATIONS", "x")), "is damaged"),
    ("of another seed", state_with(set_to("knobs", "SEED", "9")), ["SEED was 9, is 1337", "RESUME_FORCE=1"]),
    ("of a longer run", state_with(set_to("knobs", "ITERATIONS", "9")), ["ITERATIONS was 9, is 6", "RUN_ID"]),
    ("of another script", state_with(set_to("knobs", "train_gpt.py", "0")), ["train_gpt.py was 0", "RESUME_FORCE=1"]),
    ("of other data", state_with(set_to("knobs", "training tokens", "7")), ["tokens was 7", "RESUME_FORCE=1"]),
    ("of another shape", state_with(set_to("knobs", "NUM_LAYERS", "3")), ["NUM_LAYERS was 3", "RESUME_FORCE=1"]),
    ("deflated bomb", lambda place: checked(deflated_bomb({"format": torch.zeros(9)})), "more than it holds"),
    ("overlapping bomb", lambda place: checked(overlapping_bomb({"format": torch.zeros(10**5)})), "more than it holds"),
]


@table(CHECKPOINTS)
@pytest.mark.parametrize("by", ["RUN_ID", "RESUME"])
def test_checkpoint(refuse, place, case, by):
    """In the run folder that goes on, and under the path that RESUME gives."""
    make, said = case
    if by == "RUN_ID":
        path, knobs = place.stopped_run() / "checkpoint.pt", {}
    else:
        path, knobs = place.given, {"RESUME": place.given}
    knobs["ITERATIONS"] = 6  # a longer run goes on with training
    path.write_bytes(make(place))
    refuse(said=[str(path)] + ([said] if isinstance(said, str) else said), **knobs)


def test_checkpoint_that_is_not_there(refuse, place):
    refuse(RESUME=place.folder / "nowhere", said=[f"RESUME={place.folder / 'nowhere'}", "give a run folder or a file"])
    refuse(RESUME=place.data, said=[f"there is no checkpoint {place.data}", "give a run folder or a file"])
    run = place.stopped_run()
    emptied(run / "checkpoint.pt")
    refuse(said=str(run / "checkpoint.pt"))


def test_a_checkpoint_of_other_knobs_is_taken_by_force(place):
    """So that the refusals above are those of these differences."""
    run = place.stopped_run()
    state = models.open_checkpoint(run / "checkpoint.pt")
    state["knobs"]["SEED"] = "9"
    (run / "checkpoint.pt").write_bytes(models.seal_checkpoint(state))
    assert models.call_main(place.settings(RESUME_FORCE=1)) == 0
    assert (run / "result.json").exists() and "SEED was 9, is 1337" in (run / "train.log").read_text()


# Artifacts: (name, a function that returns the bytes; what the message says)


def object_with(change):
    """The object in the artifact after `change`, sealed again."""

    def make(place: Place) -> bytes:
        artifact = models.open_artifact(place.trained / "final_model.int8.ptz")
        changed = change(artifact)
        return models.seal(models.torch_bytes(artifact if changed is None else changed))

    return make


def blob_with(change):
    return lambda place: change((place.trained / "final_model.int8.ptz").read_bytes())


def model_with(change):
    """final_model.pt after `change`."""

    def make(place: Place) -> bytes:
        state = models.load((place.trained / "final_model.pt").read_bytes())
        changed = change(state)
        return models.torch_bytes(state if changed is None else changed)

    return make


def zlib_bomb(size: int) -> bytes:
    """A stream of `size` zeros, of repeated blocks that each stand alone, sealed."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, 15)
    head, block = deflate.compress(b"") + deflate.flush(zlib.Z_FULL_FLUSH), 2**24
    body = deflate.compress(bytes(block)) + deflate.flush(zlib.Z_FULL_FLUSH)
    return checked(head + body * (size // block))


def claims(*shape, dtype=torch.float32):
    """A tensor of one number that claims to be larger."""
    return torch.zeros(1, dtype=dtype).expand(shape)


def all_in_one(artifact: dict):
    """A thousand large matrices of one storage: small in the file, large when each gets its own."""
    storage = torch.zeros(2**24, dtype=torch.int8).view(2**12, 2**12)
    names = [f"blocks.{n}.mlp.fc.weight" for n in range(1000)]
    artifact["quantized"] |= dict.fromkeys(names, storage)
    artifact["scales"] |= dict.fromkeys(names, torch.ones(2**12, dtype=torch.float16))
    artifact["dtypes"] |= dict.fromkeys(names, "float32")


def spread(artifact: dict):
    """A row times a column of scales: a matrix of 10**10 numbers from 2 * 10**5."""
    artifact["quantized"][W] = torch.zeros(1, 10**5, dtype=torch.int8)
    artifact["scales"][W] = torch.ones(10**5, dtype=torch.float16)


def nested():
    with warnings.catch_warnings(action="ignore"):  # "a prototype"
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def told(**values):
    return object_with(lambda artifact: artifact["config"].update(values))


NAN = float("nan")
E, S = "tok_emb.weight", "skip_weights"
ARTIFACTS = [
    ("empty", lambda place: b"", "cut short"),
    ("text", lambda place: b"the king of the sea", "is damaged or of another format"),
    ("shard", lambda place: (place.data / VAL).read_bytes(), "is damaged or of another format"),
    ("checkpoint", lambda place: (place.trained / "checkpoint.pt").read_bytes(), "is damaged or of another format"),
    ("one byte", blob_with(lambda blob: blob[:1]), "cut short"),
    ("cut in half", blob_with(lambda blob: blob[: len(blob) // 2]), "cut short"),
    ("without the end of its stream", blob_with(lambda blob: blob[:-40]), "cut short"),
    ("without its checksum", blob_with(lambda blob: blob[:-32]), "checksum"),
    ("without its last byte", blob_with(lambda blob: blob[:-1]), "checksum"),
    ("a byte too long", blob_with(lambda blob: blob + b"\0"), "checksum"),
    ("first bit flipped", blob_with(lambda blob: flipped(blob, 0)), "is damaged"),
    ("bit flipped in the middle", blob_with(lambda blob: flipped(blob, 4 * len(blob))), "is damaged"),
    ("last bit flipped", blob_with(lambda blob: flipped(blob, -1)), "checksum"),
    ("zlib bomb", lambda place: zlib_bomb(2**32), "unpacks to over"),
    ("deflated zip bomb", lambda place: models.seal(deflated_bomb({"a": torch.zeros(9)})), "more than it holds"),
    ("overlapping zip bomb", lambda place: models.seal(overlapping_bomb({"a": torch.zeros(10**5)})), "more than it"),
    (
        "pickle that runs code",
        lambda place: object_with(set_to("config", models.Canary(place.canary)))(place),
        "is damaged",
    ),
    (
        "plain pickle that runs code",
        lambda place: models.seal(
            models.torch_bytes(models.Canary(place.canary), _use_new_zipfile_serialization=False)
        ),
        "is damaged",
    ),
    ("list", object_with(lambda artifact: [artifact]), "holds a list"),
    ("other format", object_with(set_to("__quant_format__", "int4")), "is of format 'int4', known are"),
    ("without a format", object_with(drop("__quant_format__")), "is no artifact: it states no format"),
    *(
        (f"without {part}", object_with(drop(part)), "is damaged")
        for part in ("quantized", "scales", "dtypes", "passthrough")
    ),
    ("list of tensors", object_with(set_to("quantized", lambda part: list(part.items()))), "is damaged"),
    ("words for a tensor", object_with(set_to("passthrough", Q, "four")), "is damaged"),
    ("without a matrix", object_with(drop("quantized", W)), W),
    ("without the embedding", object_with(drop("quantized", E)), "is damaged"),
    ("without a vector", object_with(drop("passthrough", S)), S),
    ("without a scale", object_with(drop("scales", W)), "is damaged"),
    ("without a type", object_with(drop("dtypes", W)), "is damaged"),
    ("with a tensor more", object_with(lambda a: a["passthrough"].update(x=torch.ones(1))), "disagree on x"),
    ("wrong shape of a matrix", object_with(set_to("quantized", W, lambda q: q[:, :-1].contiguous())), W),
    ("transposed matrix", object_with(set_to("quantized", W, lambda q: q.mT)), "larger than its data"),
    ("wrong shape of a vector", object_with(set_to("passthrough", S, torch.ones(1, 31))), S),
    ("wrong number of scales", object_with(set_to("scales", W, lambda scale: scale[:-1].clone())), "is damaged"),
    ("one scale for a vector", object_with(set_to("quantized", W, torch.tensor(1, dtype=torch.int8))), "is damaged"),
    ("unknown type", object_with(set_to("dtypes", W, "quantum")), "is damaged"),
    ("function for a type", object_with(set_to("dtypes", W, "load")), "is damaged"),
    ("number for a type", object_with(set_to("dtypes", W, 7)), "is damaged"),
    ("whole numbers", object_with(set_to("passthrough", S, lambda t: t.long())), S),
    ("complex numbers", object_with(set_to("passthrough", S, lambda t: t.to(torch.complex64))), S),
    ("matrix of complex numbers", object_with(set_to("dtypes", W, "complex64")), W),
    ("matrix that is not a number", object_with(set_to("scales", W, lambda scale: scale * NAN)), W),
    ("vector that is not a number", object_with(set_to("passthrough", S, lambda t: t * NAN)), S),
    ("infinite scale", object_with(set_to("scales", E, lambda scale: scale * 1e9)), E),
    ("terabytes by stride 0", object_with(set_to("quantized", W, claims(10**6, 10**6, dtype=torch.int8))), "larger"),
    ("terabytes by stride 0, kept", object_with(set_to("passthrough", Q, claims(10**13))), "larger than its data"),
    ("terabytes of scales", object_with(set_to("scales", W, claims(10**13))), "larger than its data"),
    ("terabytes by one storage", object_with(all_in_one), "is damaged"),
    ("terabytes by a row of scales", object_with(spread), "is damaged"),
    ("tensor without data", object_with(set_to("passthrough", S, lambda t: t.to("meta"))), "is damaged"),
    ("sparse tensor", object_with(set_to("passthrough", S, lambda t: t.to_sparse())), "is damaged"),
    (
        "no layers",
        object_with(
            lambda a: (
                [a[p].pop(n) for p in ("quantized", "passthrough") for n in [*a[p]] if n.startswith("blocks.")] and None
            )
        ),
        "is damaged",
    ),
    (
        "layers with a gap",
        object_with(
            lambda a: (
                [
                    a[p].update({n.replace(".1.", ".7."): a[p].pop(n)})
                    for p in ("quantized", "scales", "dtypes", "passthrough", "passthrough_orig_dtypes")
                    for n in [*a[p]]
                ]
                and None
            )
        ),
        ".1.",
    ),
    ("configuration that is a list", object_with(set_to("config", [1])), "is damaged"),
    ("configuration that is a word", object_with(set_to("config", "large")), "is damaged"),
    ("configuration of unknown knobs", told(num_experts=8), "NUM_EXPERTS"),
    ("configuration with paths", told(data_path="/etc"), "DATA_PATH"),
    ("configuration of numbers", object_with(set_to("config", {1: 2})), "is damaged"),
    ("configuration of tensors", told(rope_base=torch.ones(3)), "ROPE_BASE"),
    ("configuration that is endless", told(rope_base=laughs()), "ROPE_BASE"),
    ("configuration in letters", told(rope_base="x"), "ROPE_BASE"),
    ("configuration that is not a number", told(logit_softcap=NAN), "LOGIT_SOFTCAP"),
    ("configuration out of bounds", told(logit_softcap=0.0), "LOGIT_SOFTCAP=0.0"),
    ("batch that cannot be", told(train_batch_tokens=33), "TRAIN_BATCH_TOKENS=33"),
    ("batch beyond reason", told(train_batch_tokens=32 * 10**30), "TRAIN_BATCH_TOKENS"),
    ("sequence beyond reason", told(train_seq_len=2**38, train_batch_tokens=2**38), "TRAIN_"),
    ("sequence beyond memory", told(train_seq_len=2**31, train_batch_tokens=2**31), "TRAIN_SEQ_LEN"),
    ("width that contradicts", told(model_dim=64), "MODEL_DIM"),
    ("huge width", told(model_dim=2**36), "MODEL_DIM"),
    ("layers that contradict", told(num_layers=3), "NUM_LAYERS"),
    ("vocabulary that contradicts", told(vocab_size=1024), "VOCAB_SIZE"),
    ("head that is not there", told(tie_embeddings=False), "TIE_EMBEDDINGS"),
    (".pt of something else", lambda place: models.torch_bytes({"x": torch.ones(3)}), "is damaged"),
    (".pt of nothing", lambda place: models.torch_bytes({}), "is damaged"),
    (".pt of a list", lambda place: models.torch_bytes([1]), "holds a list"),
    (".pt of a tensor", lambda place: models.torch_bytes(torch.ones(3)), "holds a Tensor"),
    (
        ".pt of an artifact",
        lambda place: zlib.decompressobj().decompress((place.trained / "final_model.int8.ptz").read_bytes()),
        "is damaged",
    ),
    (".pt cut in half", lambda place: (place.trained / "final_model.pt").read_bytes()[:50_000], "is damaged"),
    (
        ".pt that runs code",
        lambda place: model_with(lambda state: state | {"x": models.Canary(place.canary)})(place),
        "is damaged",
    ),
    (".pt of words", model_with(set_to(S, "heavy")), "is damaged"),
    (".pt of numbers for names", model_with(lambda state: dict(state) | {7: torch.ones(1)}), "is damaged"),
    (".pt without a matrix", model_with(drop(W)), W),
    (".pt of a wrong shape", model_with(set_to(W, lambda w: w[:-1].clone())), "mlp.proj.weight"),
    (".pt of whole numbers", model_with(set_to(W, lambda w: w.long())), W),
    (".pt that is not a number", model_with(set_to(W, lambda w: w * NAN)), W),
    (".pt without data", model_with(set_to(S, lambda w: w.to("meta"))), "is damaged"),
    (".pt of a nested tensor", model_with(lambda state: state | {S: nested()}), "is damaged"),
    (".pt of terabytes", model_with(set_to(S, claims(10**13))), "larger than the data"),
    (".pt deflated bomb", lambda place: deflated_bomb({"x": torch.zeros(9)}), "more than it holds"),
    (".pt of ten gigabytes for one byte", lambda place: zip_of([("a/data.pkl", bytes(2**24))]), "more than it holds"),
]


@contextlib.contextmanager
def little_memory(extra: int):
    """This process may have this many more bytes of addresses, and no more, where the system knows such a limit."""
    resource = pytest.importorskip("resource")
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@table(ARTIFACTS)
@pytest.mark.parametrize("mode", ["eval", "sample"])
def test_artifact(refuse, place, case, mode):
    make, said = case
    place.given.write_bytes(make(place))
    with little_memory(3 * 2**30):
        message = refuse(MODE=mode, ARTIFACT=place.given, said=said)
    assert str(place.given) in message or "memory" in message, message


@pytest.mark.parametrize("mode", ["eval", "sample"])
def test_artifact_that_cannot_be_read(refuse, place, mode):
    refuse(MODE=mode, ARTIFACT=place.folder / "nowhere", said=[str(place.folder / "nowhere"), "No such file"])
    refuse(MODE=mode, ARTIFACT=place.data, said=[str(place.data), "directory"])
    dangling(Path(shutil.copy(place.tokenizer, place.given)))
    refuse(MODE=mode, ARTIFACT=place.given, said=[str(place.given), "No such file"])


@pytest.mark.parametrize("mode", ["eval", "sample"])
def test_the_canary_would_sing(place, mode):
    """The same files, untouched, are scored and sampled from, and the pickle does run code where it is let."""
    for name in ("final_model.int8.ptz", "final_model.pt"):
        knobs = {} if name.endswith("ptz") else {"TRAIN_SEQ_LEN": 32}
        settings = place.settings(MODE=mode, ARTIFACT=place.trained / name, SAMPLE_TOKENS=3, **knobs)
        assert models.call_main(settings) == 0
    data = models.torch_bytes({"config": models.Canary(place.canary)})
    torch.load(io.BytesIO(data), weights_only=False)
    assert place.canary.exists()


def test_the_bombs_would_go_off():
    """They are what they claim to be."""
    stream = zlib_bomb(2**26)[:-32]
    assert len(stream) < 2**18 and zlib.decompressobj().decompress(stream) == bytes(2**26)
    sizes = [entry.file_size for entry in zipfile.ZipFile(io.BytesIO(deflated_bomb({"a": torch.zeros(9)}))).infolist()]
    assert max(sizes) > 2**30
    archive = overlapping_bomb({"a": torch.zeros(10**5)})
    entries = zipfile.ZipFile(io.BytesIO(archive)).infolist()
    assert sum(entry.file_size for entry in entries) > 1000 * len(archive)


@pytest.mark.parametrize("mode", ["eval", "sample"])
def test_knobs_against_the_tensors(refuse, place, mode):
    artifact = place.trained / "final_model.int8.ptz"
    for knobs in (
        {"NUM_LAYERS": 3},
        {"MODEL_DIM": 64},
        {"VOCAB_SIZE": 512},
        {"TIE_EMBEDDINGS": 0},
        {"MLP_MULT": 3},
        {"NUM_HEADS": 2, "NUM_KV_HEADS": 1},
    ):
        refuse(MODE=mode, ARTIFACT=artifact, said=[str(artifact), "disagree", "unset"], **knobs)


# The run folder


def test_finished_run(refuse, place):
    run = shutil.copytree(place.trained, place.folder / "logs" / "run")
    refuse(said=[f"the run in {run} is finished", "choose another RUN_ID"])
    refuse(RESUME="never", said=["RESUME=never", str(run), "choose another RUN_ID"])


def test_folder_of_somebody_else(refuse, place):
    (place.folder / "logs" / "run").mkdir(parents=True)
    (place.folder / "logs" / "run" / "diary.txt").write_text("dear diary")
    refuse(said=[str(place.folder / "logs" / "run"), "is no run folder", "choose another RUN_ID"])


def test_run_that_must_not_go_on(refuse, place):
    run = place.stopped_run()
    refuse(RESUME="never", said=["RESUME=never", str(run), f"RESUME={run / 'checkpoint.pt'}"])


def test_file_where_the_folder_belongs(refuse, place):
    refuse(LOG_DIR=place.tokenizer, said=[f"LOG_DIR={place.tokenizer}", "choose another"])
    (place.folder / "logs").mkdir()
    (place.folder / "logs" / "run").write_text("mine")
    refuse(said=[str(place.folder / "logs" / "run"), "choose another"])


def test_directory_where_the_log_belongs(refuse, place):
    run = place.stopped_run()
    emptied(run / "train.log")
    refuse(said=[str(run), "choose another"])


@pytest.mark.skipif(not Path("/proc/1").exists(), reason="needs a place where even root cannot make a folder")
def test_place_that_cannot_be_written(refuse):
    refuse(LOG_DIR="/proc/logs", said=["LOG_DIR=/proc/logs", "choose another"])


# A full disk


@contextlib.contextmanager
def small_files(limit: int):
    """No file grows over the limit: writes fail as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Limits between the sizes of config.env (1 kB), the script (100 kB), the model (400 kB) and the checkpoint (over 1 MB)
DISKS = [
    ("configuration", 500, "config.env"),
    ("script", 20_000, "train_gpt.py"),
    ("model", 200_000, "final_model.pt"),
]
LARGER = {"MODEL_DIM": 96}


@table(DISKS)
def test_full_disk(place, capsys, case):
    limit, name = case
    settings, run = place.settings(**LARGER), place.folder / "logs" / "run"
    with small_files(limit):
        assert models.call_main(settings) == 2
    message = the_message(*capsys.readouterr())
    assert str(run / name) in message and "too large" in message and "LOG_DIR" in message
    assert not [path for path in files(run) if "tmp" in path], "half a file"
    assert not (run / name).exists() and not (run / "result.json").exists()
    assert not (run / "checkpoint.pt").exists()
    assert ("no checkpoint of step 4" in (run / "train.log").read_text()) == (name == "final_model.pt")
    assert models.call_main(settings) == 0, "with room again, it begins again"
    assert (run / "result.json").exists()


def test_full_disk_at_the_checkpoint_alone(place, capsys):
    """It costs the checkpoint, and a run that goes on keeps the one before."""
    settings, run = place.settings(**LARGER), place.folder / "logs" / "run"
    with small_files(1_000_000):
        assert models.call_main(settings) == 0
    out, err = capsys.readouterr()
    assert not err and re.search(r"^warning: no checkpoint of step 4 \(.*too large", out, re.MULTILINE)
    assert (run / "result.json").exists() and not (run / "checkpoint.pt").exists()


def test_full_disk_at_the_export_of_a_run_that_goes_on(place, capsys):
    settings, run = place.settings(**LARGER), place.folder / "logs" / "run"  # whose model is larger than the script
    assert models.call_main(settings) == 0
    first = json.loads((run / "result.json").read_text())
    for name in ("result.json", "final_model.pt", "final_model.int8.ptz"):
        (run / name).unlink()
    capsys.readouterr()
    before = files(run)
    with small_files(200_000):
        assert models.call_main(settings) == 2
    assert str(run / "final_model.pt") in the_message(*capsys.readouterr())
    after = files(run)
    assert after.keys() == before.keys() and after["checkpoint.pt"] == before["checkpoint.pt"]
    assert models.call_main(settings) == 0
    result = json.loads((run / "result.json").read_text())
    assert result["resumed_at"] == [4] and result["pre_quant_val_bpb"] == first["pre_quant_val_bpb"]


# Processes of their own


def start(settings: dict[str, str], **options) -> subprocess.CompletedProcess:
    environ = {name: text for name, text in os.environ.items() if name not in train_gpt.Config.knobs()} | settings
    command = [sys.executable, str(ROOT / "train_gpt.py")]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False, **options)


def test_exit_code_of_missing_data(place):
    before = files(place.folder)
    done = start(place.settings(DATA_PATH=place.folder / "nowhere"))
    assert done.returncode == 2
    assert_shows_the_two_commands(the_message(done.stdout, done.stderr))
    assert files(place.folder) == before


def test_exit_code_of_a_full_disk(place):
    resource = pytest.importorskip("resource")
    done = start(place.settings(), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)))
    assert done.returncode == 2
    assert str(place.folder / "logs" / "run" / "train_gpt.py") in the_message(done.stdout, done.stderr)


# The tables

TABLES = [CONFIGURATION, ENV_FILES, SHARDS, MANIFESTS, TOKENIZERS, CHECKPOINTS, ARTIFACTS, DISKS]


def test_the_tables_are_long():
    assert len(list(itertools.chain(*TABLES))) >= 60
