"""User errors, and broken or hostile files, through main() in every MODE: exit code 2 (MODE=check lists the problem and
exits with 1), one helpful message, no traceback, no code executed, no file lost, changed or left behind."""

import contextlib
import hashlib
import io
import json
import re
import shutil
import struct
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
from conftest import write_shard

import train_gpt

PATIENCE = 60  # seconds until an endless loop is interrupted; no test takes a tenth of it
MODES = ("train", "check", "eval", "sample")
TRAIN, VAL = "fineweb_train_000001.bin", "fineweb_val_000000.bin"


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """The folder of a finished run."""
    return models.train_tiny(corpus, tmp_path_factory.mktemp("trained"))


class Place:
    """A user's folder for faulty input: a copy of the data, and of an interrupted run."""

    def __init__(self, corpus: Path, trained: Path, folder: Path):
        self.corpus, self.trained, self.folder = corpus, trained, folder
        self.data = shutil.copytree(corpus / "data", folder / "data")
        self.tokenizer = Path(shutil.copy(corpus / "tok.model", folder / "tok.model"))
        self.canary, self.given, self.run = folder / "canary", folder / "given", folder / "logs" / "run"

    def settings(self, **overrides) -> dict[str, str]:
        here = {"DATA_PATH": self.data, "TOKENIZER_PATH": self.tokenizer, "LOG_DIR": self.folder / "logs"}
        if overrides.get("MODE") in ("eval", "sample"):
            artifact = {"ARTIFACT": self.trained / "final_model.int8.ptz"}
            return models.machine_settings(self.corpus, **here | artifact | overrides)
        return models.tiny_settings(self.corpus, **here | overrides)

    def stopped_run(self) -> Path:
        """The run folder as it was after the last step."""
        shutil.copytree(self.trained, self.run)
        for name in ("result.json", "final_model.pt", "final_model.int8.ptz"):
            (self.run / name).unlink()
        return self.run

    def write_manifest(self) -> Path:
        """Write a correct manifest, with the byte count of the validation text."""
        (self.data / "manifest.json").write_text('{"splits": {"val": {"bytes": 9425}}}')
        return self.data / "manifest.json"


@pytest.fixture
def place(corpus, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # so that files left in the current folder are noticed, too
    return Place(corpus, trained, tmp_path)


def files(path: Path) -> dict:
    found = [p for p in path.rglob("*") if p.is_symlink() or p.exists()]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).digest() if p.is_file() else None for p in found}


def the_message(out: str, err: str) -> str:
    """The single message at the end of stderr; in MODE=sample, where stdout is for the text, notes come before it."""
    assert "Traceback" not in out + err and "error:" not in out
    notes, message = re.fullmatch(r"((?:.*\n)*?)error: (.+\n(?:.*\n)*)", err).groups()
    assert "Warning" not in notes, err
    lines = message.splitlines()
    assert len(lines) == 1 or lines[1:] == train_gpt.NO_DATA_HINT.splitlines()[1:], message
    return message


def the_problem(out: str, err: str) -> str:
    """The single problem that MODE=check finds."""
    assert "Traceback" not in out + err and "error:" not in out and not err
    (problem,) = json.loads(out.splitlines()[-1].removeprefix("check_json:"))["problems"]
    return problem + "\n"


@contextlib.contextmanager
def limits(memory=3 * 2**30):
    """Limit a call's time, and its address space to `memory` bytes beyond current usage where that is known."""

    def stop(number, frame):
        pytest.fail("this hangs")

    signal, resource = pytest.importorskip("signal"), pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, hard))
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def refuse(place, capfd):
    """Function: the message with which main() refuses this environment, after checking what holds for every refusal."""

    def run(*args, said=(), **overrides) -> str:
        before = files(place.folder)
        with limits():
            code = models.call_main(place.settings(**overrides), *args)
        out, err = capfd.readouterr()
        problem = code == 1 and overrides.get("MODE") == "check"
        assert code == 2 or problem, (code, overrides, out[-600:], err)
        message = the_problem(out, err) if problem else the_message(out, err)
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


# Configuration; tests/test_config.py has more

BEYOND = str(10**30)
HALF = r"a\ud83d"
CONFIGURATION = [
    ("number beyond a float", {"ITERATIONS": "1" + 400 * "0"}, "ITERATIONS="),
    ("number beyond int()", {"ITERATIONS": 5000 * "9"}, "ITERATIONS="),
    ("steps beyond reason", {"ITERATIONS": BEYOND}, "ITERATIONS="),
    ("batch beyond reason", {"TRAIN_BATCH_TOKENS": 32 * 10**30}, "TRAIN_BATCH_TOKENS="),
    ("heads beyond reason", {"MODEL_DIM": 2 * 10**30, "NUM_HEADS": BEYOND}, "="),
    ("micro-batch beyond int()", {"MICRO_BATCH_TOKENS": 5000 * "9"}, ["MICRO_BATCH_TOKENS=", "auto"]),
    ("model beyond memory", {"MODEL_DIM": 2**31}, ["memory", "smaller MODEL_DIM"]),
    ("run id too long for a name", {"RUN_ID": 300 * "x"}, "xxx"),
    ("path that is not UTF-8", {"DATA_PATH": "caf\udce9"}, ["DATA_PATH='caf\\udce9'", "use another"]),
    ("eval without an artifact", {"MODE": "eval", "ARTIFACT": ""}, ["MODE=eval", "ARTIFACT="]),
    ("sample without an artifact", {"MODE": "sample", "ARTIFACT": ""}, ["MODE=sample", "ARTIFACT="]),
    ("sample of no tokens", {"MODE": "sample", "SAMPLE_TOKENS": 0}, "SAMPLE_TOKENS=0"),
    ("negative temperature", {"MODE": "sample", "TEMPERATURE": -1}, "TEMPERATURE=-1"),
    ("half a character by its number", {"MODE": "sample", "SAMPLE_PROMPT": HALF}, ["SAMPLE_PROMPT='a\\ud83d'"]),
    ("prompt not in UTF-8", {"MODE": "sample", "SAMPLE_PROMPT": "caf\udce9"}, ["SAMPLE_PROMPT='caf\\udce9'"]),
]


@table(CONFIGURATION)
def test_configuration(refuse, case):
    knobs, said = case
    refuse(said=said, **knobs)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_refuses(refuse, place, mode, monkeypatch):
    refuse(MODE=mode, LOGIT_SOFTCAP=0, said=["LOGIT_SOFTCAP=0", "minimum"])
    refuse(MODE=mode, RANK=1, said=["RANK=1", "torchrun"])
    refuse(place.tokenizer, place.tokenizer, MODE=mode, said="at most one")
    refuse("SEED=3", MODE=mode, said="SEED=3")
    refuse("--bogus", MODE=mode, said="--bogus")
    refuse(MODE=mode, ATTENTION="cudnn", said="use ATTENTION=auto")
    refuse(MODE=mode, VOCAB_SIZE=1024, said="has 320 pieces" if mode in ("train", "check") else "disagree on tok_emb")
    hints = refuse(MODE=mode, TOKENIZER_PATH="no.model", said="TOKENIZER_PATH=no.model does not exist")
    if mode != "sample":
        for data in (place.folder / "nowhere", place.tokenizer):
            hints += refuse(MODE=mode, DATA_PATH=data, said=f"DATA_PATH={data}")
    assert hints.count("python data/prepare_shakespeare.py") == (1 if mode == "sample" else 3)
    monkeypatch.setattr(train_gpt.torch.cuda, "is_available", lambda: False)
    refuse(MODE=mode, DEVICE="cuda", said="use DEVICE=auto")


# FILE.env: (name, content; what the message says in addition to the path)

ENV_FILES = [
    ("utf-16", "SEED=1\n".encode("utf-16"), "FILE.env"),
    ("latin 1", b"DATA_PATH=caf\xe9\n", "FILE.env"),
    ("json", b'{"SEED": 1}\n', [":1: ", "KEY=VALUE"]),
    ("unknown knob", b"SEED=1\nMATRXI_LR=0.03\n", ["MATRXI_LR", "did you mean MATRIX_LR?"]),
    ("knob like no other", b"XYZZY=1\n", ["XYZZY", "--help"]),
    ("no equals sign", b"SEED=1\nMATRIX_LR 0.03\n", [":2: ", "KEY=VALUE"]),
    ("export", b"export SEED=1\n", [":1: ", "KEY=VALUE"]),
    ("twice", b"SEED=1\n\nSEED=1\n", [":3: ", "twice"]),
    ("bad value", b"TARGET_WORLD_SIZE=many\n", ["TARGET_WORLD_SIZE='many'", "whole number"]),
    ("no value", b"TARGET_WORLD_SIZE=\n", ["TARGET_WORLD_SIZE=''", "whole number"]),
]


@table(ENV_FILES)
def test_file_env(refuse, place, case):
    content, said = case
    place.given.write_bytes(content)
    message = refuse(place.given, said=said)
    assert str(place.given) in message or "TARGET_WORLD_SIZE=" in message


# The same damage to every kind of file


def flipped(data: bytes, bit: int) -> bytes:
    bit %= 8 * len(data)
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


# Functions of the content, and of the path
DAMAGE = {
    "empty": lambda data: b"",
    "one byte": lambda data: data[:1],
    "cut in half": lambda data: data[: len(data) // 2],
    "without its last byte": lambda data: data[:-1],
    "a byte too long": lambda data: data + b"\0",
    "first bit flipped": lambda data: flipped(data, 0),
    "bit flipped in the middle": lambda data: flipped(data, 4 * len(data)),
    "last bit flipped": lambda data: flipped(data, -1),
    "zeros": lambda data: bytes(60),
    "text": lambda data: b"To be, or not to be\n" * 200,
    "tokens": lambda data: np.arange(2000, dtype="<u2").tobytes(),
    "zip": lambda data: models.torch_bytes({"a": 1}),
}
REPLACED = {
    "directory": Path.mkdir,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "loop of links": lambda path: path.symlink_to(path),
}


class Kind(NamedTuple):
    """A kind of file: how to make a valid one, the knobs and modes that read it, the message for damaged bytes, and
    damage that is harmless or cannot be detected."""

    make: Callable[[Place], Path]
    knobs: Callable[[Path], dict]
    modes: str
    said: str
    passes: set[str] = frozenset()


def given(name: str) -> Callable[[Place], Path]:
    """A file of the finished run, under another name."""
    return lambda place: Path(shutil.copy(place.trained / name, place.given))


def env_of(place: Place) -> Path:
    place.given.write_text('LOG_DIR="logs"')
    return place.given


AGAIN, FLIPS = "make or fetch it again", {"bit flipped in the middle", "last bit flipped"}
KINDS = {
    "training shard": Kind(lambda place: place.data / TRAIN, lambda path: {}, "train check", AGAIN, FLIPS),
    "validation shard": Kind(lambda place: place.data / VAL, lambda path: {}, "train check eval", AGAIN, FLIPS),
    "manifest": Kind(Place.write_manifest, lambda path: {}, "train check eval", "", {"dangling link", "loop of links"}),
    "tokenizer": Kind(lambda place: place.tokenizer, lambda path: {}, "train check eval sample", "", FLIPS),
    "checkpoint": Kind(
        lambda place: place.stopped_run() / "checkpoint.pt",
        lambda path: {"ITERATIONS": 6},
        "train",
        "checksum",
        {"dangling link", "loop of links"},
    ),
    "named checkpoint": Kind(given("checkpoint.pt"), lambda path: {"RESUME": path}, "train", "checksum"),
    "artifact": Kind(given("final_model.int8.ptz"), lambda path: {"ARTIFACT": path}, "eval sample", "again"),
    "weights": Kind(
        given("final_model.pt"), lambda path: {"ARTIFACT": path}, "eval sample", "", FLIPS | {"a byte too long"}
    ),
    "FILE.env": Kind(env_of, lambda path: {}, "train check eval sample", "", {"empty"}),
}


@pytest.mark.parametrize("kind, mode", [(name, mode) for name, kind in KINDS.items() for mode in kind.modes.split()])
def test_damaged_file(refuse, place, kind, mode):
    kind = KINDS[kind]
    path = kind.make(place)
    content, knobs = path.read_bytes(), {"MODE": mode} | kind.knobs(path)
    args = [path] if kind.make is env_of else []
    for name, damage in DAMAGE.items():
        if name not in kind.passes:
            path.write_bytes(damage(content))
            message = refuse(*args, **knobs, said=kind.said)
            assert path.name in message and len(message) < 500, (name, message)
    for name, replace in REPLACED.items():
        if name not in kind.passes:
            path.unlink()
            replace(path)
            assert path.name in refuse(*args, **knobs), name
            path.rmdir() if path.is_dir() else path.unlink()
            path.write_bytes(content)


@pytest.mark.parametrize("mode", ["eval", "sample"])
def test_undamaged_files_are_read(place, mode):
    """The same files are scored and sampled from, and the pickle does run code if allowed to."""
    place.write_manifest()
    for name, knobs in {"final_model.int8.ptz": {}, "final_model.pt": {"TRAIN_SEQ_LEN": 32}}.items():
        settings = place.settings(MODE=mode, ARTIFACT=place.trained / name, SAMPLE_TOKENS=3, **knobs)
        assert models.call_main(settings) == 0
    data = models.torch_bytes({"config": models.Canary(place.canary)})
    torch.load(io.BytesIO(data), weights_only=False)
    assert place.canary.exists()


# Data of the wrong kind: (name, file, its new bytes from the old ones or a function of its path; the message)


class At(NamedTuple):
    """A function of the path."""

    do: Callable[[Path], None]


def header(magic=20240520, version=1, count=None):
    """Replaces the numbers at the start of a shard."""

    def change(data: bytes) -> bytes:
        old = struct.unpack("<i", data[8:12])[0]
        return struct.pack("<3i", magic, version, old if count is None else count(old)) + data[12:]

    return change


def shard_of(*tokens):
    return At(lambda path: write_shard(path, tokens))


def renamed(name: str):
    return At(lambda path: path.rename(path.with_name(name)))


def token_over_the_vocabulary(data: bytes) -> bytes:
    middle = len(data) // 4 * 2
    return data[:middle] + struct.pack("<H", 60_000) + data[middle + 2 :]


def manifest_of(value: str):
    return At(lambda path: path.write_text(f'{{"splits": {{"val": {{"bytes": {value}}}}}}}'))


MANIFEST, TOKENIZER = "manifest.json", "../tok.model"
DATA = [
    ("other magic", TRAIN, header(magic=67305985), ["header [67305985, 1, ", "expected magic 20240520", AGAIN]),
    ("other version", VAL, header(version=2), ["header [20240520, 2, 2933]", AGAIN]),
    ("one token short", VAL, lambda data: data[:-2], ["6888 bytes, header [20240520, 1, 2933]", AGAIN]),
    ("count of zero", VAL, header(count=lambda n: 0), AGAIN),
    ("negative count", VAL, header(count=lambda n: -n), AGAIN),
    ("largest count", VAL, header(count=lambda n: 2**31 - 1), AGAIN),
    ("big-endian", VAL, lambda data: np.frombuffer(data[:1024], "<i4").byteswap().tobytes() + data[1024:], AGAIN),
    ("a gap", TRAIN, renamed("fineweb_train_000002.bin"), ["shard 1 is missing", "fetch"]),
    ("no beginning", VAL, renamed("fineweb_val_000001.bin"), ["shard 0 is missing", "fetch"]),
    ("twice", VAL, At(lambda path: shutil.copy(path, path.with_name("fineweb_val_0.bin"))), ["duplicated", "remove"]),
    ("no validation text", VAL, At(Path.unlink), ["holds no fineweb_val_", "prepare_shakespeare"]),
    ("one token", VAL, shard_of(1), ["holds 1 tokens", "2 are needed"]),
    ("tokens without bytes", VAL, shard_of(1, 1, 1), ["stand for no bytes", AGAIN]),
    ("token over the vocabulary", VAL, token_over_the_vocabulary, ["fineweb_val_*.bin: token 60000 >= VOCAB_SIZE="]),
    ("token to train", TRAIN, token_over_the_vocabulary, ["fineweb_train_*.bin: token 60000 >= VOCAB_SIZE=", "set"]),
    ("tokens of another text", VAL, shard_of(*range(319, -1, -1)), "use the tokenizer of the shards"),
    ("other count of bytes", MANIFEST, manifest_of("12345"), ["manifest.json says 12345", "again"]),
    ("list", MANIFEST, At(lambda path: path.write_text("[1, 2]")), ["manifest.json", "again"]),
    ("not UTF-8", MANIFEST, At(lambda path: path.write_bytes(b'{"caf\xe9": 1}')), ["manifest.json", "again"]),
    ("infinity", MANIFEST, manifest_of("1e999"), ["manifest.json", "again"]),
    ("word", MANIFEST, manifest_of('"many"'), ["manifest.json", "again"]),
    ("sign bit of a length", TOKENIZER, lambda data: flipped(data, 15), ["TOKENIZER_PATH=", AGAIN]),
]


@table(DATA)
@pytest.mark.parametrize("mode", ["train", "check"])
def test_data(refuse, place, case, mode):
    name, change, said = case
    path = place.data / name
    change.do(path) if isinstance(change, At) else path.write_bytes(change(path.read_bytes()))
    message = refuse(MODE=mode, said=said)
    assert str(place.data) in message or "TOKENIZER_PATH" in message


# Hostile content


def zip_of(entries, compression=zipfile.ZIP_DEFLATED) -> bytes:
    """An archive of (name, bytes)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


def deflated_bomb() -> bytes:
    """A torch.save file with an entry that claims to unpack to 4 GB."""
    plain = zipfile.ZipFile(io.BytesIO(models.torch_bytes({"a": torch.zeros(9)})))
    entries = [(name, bytes(2**20) if name.endswith("data/0") else plain.read(name)) for name in plain.namelist()]
    return zip_of(entries).replace(struct.pack("<I", 2**20), struct.pack("<I", 2**32 - 2))


def overlapping_bomb(copies=2000) -> bytes:
    """An archive with many directory entries that all refer to the same bytes."""
    data = models.torch_bytes({"a": torch.zeros(10**5)})
    end = data.rindex(b"PK\5\6")
    size, start = struct.unpack("<II", data[end + 12 : end + 20])
    records = [b"PK\1\2" + record for record in data[start : start + size].split(b"PK\1\2")[1:]]
    records += [max(records, key=lambda record: struct.unpack("<I", record[24:28]))] * copies
    directory = b"".join(records)
    tail = struct.pack("<HHIIH", len(records), len(records), len(directory), start, 0)
    return data[:start] + directory + b"PK\5\6" + data[end + 4 : end + 8] + tail


def zlib_bomb(size: int) -> bytes:
    """A sealed stream of `size` zeros, made of repeated independent blocks."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, 15)
    head, block = deflate.compress(b"") + deflate.flush(zlib.Z_FULL_FLUSH), 2**24
    body = deflate.compress(bytes(block)) + deflate.flush(zlib.Z_FULL_FLUSH)
    return hashed(head + body * (size // block))


def test_the_bombs_would_go_off():
    """The bombs really unpack to the sizes they claim."""
    stream = zlib_bomb(2**26)[:-32]
    assert len(stream) < 2**18 and zlib.decompressobj().decompress(stream) == bytes(2**26)
    for bomb in (deflated_bomb(), overlapping_bomb()):
        entries = zipfile.ZipFile(io.BytesIO(bomb)).infolist()
        assert sum(entry.file_size for entry in entries) > 1000 * len(bomb)


def laughs():
    """A list that is small in memory and in the file, but endless when printed."""
    value = ["ha"]
    for _ in range(60):
        value = [value, value]
    return value


def nested():
    with warnings.catch_warnings(action="ignore"):  # torch's warning about "a prototype"
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def hashed(data: bytes) -> bytes:
    return data + hashlib.sha256(data).digest()


class Container(NamedTuple):
    """A torch file of nested dictionaries: how to open and seal it, and who reads it."""

    name: str
    open: Callable[[Path], dict]
    seal: Callable[[object], bytes]
    mode: str
    knob: str


def seal_artifact(value) -> bytes:
    return models.seal(models.torch_bytes(value))


def open_weights(path: Path) -> dict:
    return models.load(path.read_bytes())


CHECKPOINT = Container("checkpoint.pt", models.open_checkpoint, models.seal_checkpoint, "train", "RESUME")
ARTIFACT = Container("final_model.int8.ptz", models.open_artifact, seal_artifact, "eval", "ARTIFACT")
WEIGHTS = Container("final_model.pt", open_weights, models.torch_bytes, "eval", "ARTIFACT")


def changed(value, keys: str, new):
    """The value with the entry at a path of keys replaced by `new`, or by `new` of the old entry. `...` removes it."""
    *path, last = ["whole", *keys.split()]
    whole = part = {"whole": value}
    for key in path:
        part = part[key]
    if new is ...:
        del part[last]
    else:
        part[last] = new(part[last]) if callable(new) else new
    return whole["whole"]


NAN = float("nan")
W, Q, E, S = "blocks.0.mlp.fc.weight", "blocks.0.attn.q_gain", "tok_emb.weight", "skip_weights"
PARTS = {
    CHECKPOINT: [
        *"format knobs model average optimizer rng position steps train_seconds".split(),
        *(f"model {W}", f"optimizer {W}", f"optimizer {Q}", "knobs SEED", "knobs ITERATIONS"),
        *(f"optimizer {W} momentum_buffer", f"optimizer {Q} exp_avg_sq"),
    ],
    ARTIFACT: [
        *"__quant_format__ quantized scales dtypes passthrough config".split(),
        *(f"quantized {W}", f"scales {W}", f"dtypes {W}", f"quantized {E}", f"passthrough {S}", f"passthrough {Q}"),
        *("config rope_base", "config model_dim"),
    ],
    WEIGHTS: [W, E, S, Q],
}
WRONG = {
    "missing": ...,
    "word": "heavy",
    "list": [1],
    "number": 7,
    "endless": laughs(),
    "complex": torch.ones(3, dtype=torch.complex64),
    "other shape": torch.ones(1, 31),
    "not a number": torch.tensor(NAN),
    "without data": torch.ones(4).to("meta"),
    "sparse": torch.ones(4).to_sparse(),
    "nested": nested(),
    "terabytes": torch.zeros(1).expand(10**13),
}
FITS = {"position number", "steps number", "config missing", "config rope_base number"}
FITS |= {"config rope_base missing", "config model_dim missing"}  # defaulted, or inferred from the tensors


@pytest.mark.parametrize(
    "file, keys", [pytest.param(f, keys, id=f"{f.name} {keys}") for f, parts in PARTS.items() for keys in parts]
)
def test_part_of_a_file(refuse, place, file, keys):
    """Every part is removed or replaced, with a valid checksum."""
    knobs = {"MODE": file.mode, file.knob: place.given, "ITERATIONS": 6}
    for name, wrong in (WRONG | {"code": models.Canary(place.canary)}).items():
        if f"{keys} {name}" not in FITS:
            place.given.write_bytes(file.seal(changed(file.open(place.trained / file.name), keys, wrong)))
            message = refuse(**knobs)
            assert str(place.given) in message and len(message) < 500, (name, message)


def all_in_one(artifact: dict) -> dict:
    """A thousand large matrices sharing one storage: small in the file, large when each gets its own."""
    storage = torch.zeros(2**24, dtype=torch.int8).view(2**12, 2**12)
    names = [f"blocks.{n}.mlp.fc.weight" for n in range(1000)]
    artifact["quantized"] |= dict.fromkeys(names, storage)
    artifact["scales"] |= dict.fromkeys(names, torch.ones(2**12, dtype=torch.float16))
    artifact["dtypes"] |= dict.fromkeys(names, "float32")
    return artifact


def spread(artifact: dict) -> dict:
    """A row times a column of scales: a matrix of 10**10 numbers from 2 * 10**5."""
    artifact["quantized"][W] = torch.zeros(1, 10**5, dtype=torch.int8)
    artifact["scales"][W] = torch.ones(10**5, dtype=torch.float16)
    return artifact


def gap_of_layers(artifact: dict) -> dict:
    return {
        part: {name.replace(".1.", ".7."): x for name, x in tensors.items()} if isinstance(tensors, dict) else tensors
        for part, tensors in artifact.items()
    }


def without_layers(artifact: dict) -> dict:
    for part in ("quantized", "passthrough"):
        artifact[part] = {name: x for name, x in artifact[part].items() if not name.startswith("blocks.")}
    return artifact


LENGTHS = ("train_seq_len", "train_batch_tokens")
FORCE, LARGER = "RESUME_FORCE=1", "larger than its data"
CONTENT = [  # name, file, key path, new value or how to change it; the message
    ("list", CHECKPOINT, "", lambda state: [state], "holds a list"),
    ("tensor", CHECKPOINT, "", torch.ones(3), "holds a Tensor"),
    ("a matrix more", CHECKPOINT, "model x", torch.ones(1), "is damaged"),
    ("momentum of a wrong shape", CHECKPOINT, f"optimizer {W} momentum_buffer", lambda m: m[:-1], W),
    ("fraction for the position", CHECKPOINT, "position", 0.5, "is damaged"),
    ("of another seed", CHECKPOINT, "knobs SEED", "9", ["SEED was 9, is 1337", FORCE]),
    ("of a longer run", CHECKPOINT, "knobs ITERATIONS", "9", ["ITERATIONS was 9, is 6", "RUN_ID"]),
    ("of another script", CHECKPOINT, "knobs train_gpt.py", "0", ["train_gpt.py was 0", FORCE]),
    ("of other data", CHECKPOINT, "knobs", lambda k: k | {"training tokens": "7"}, ["tokens was 7", FORCE]),
    ("of another shape", CHECKPOINT, "knobs NUM_LAYERS", "3", ["NUM_LAYERS was 3", FORCE]),
    ("other format", ARTIFACT, "__quant_format__", "int4", "is of format 'int4', known are"),
    ("without a format", ARTIFACT, "__quant_format__", ..., "is no artifact: it states no format"),
    ("with a tensor more", ARTIFACT, "passthrough x", torch.ones(1), "disagree on x"),
    ("wrong shape of a matrix", ARTIFACT, f"quantized {W}", lambda q: q[:, :-1].contiguous(), W),
    ("transposed matrix", ARTIFACT, f"quantized {W}", lambda q: q.mT, LARGER),
    ("wrong number of scales", ARTIFACT, f"scales {W}", lambda scale: scale[:-1].clone(), "is damaged"),
    ("one scale for a vector", ARTIFACT, f"quantized {W}", torch.tensor(1, dtype=torch.int8), "is damaged"),
    ("function for a type", ARTIFACT, f"dtypes {W}", "load", "is damaged"),
    ("whole numbers", ARTIFACT, f"passthrough {S}", lambda t: t.long(), S),
    ("matrix that is not a number", ARTIFACT, f"scales {W}", lambda scale: scale * NAN, W),
    ("vector that is not a number", ARTIFACT, f"passthrough {S}", lambda t: t * NAN, S),
    ("infinite scale", ARTIFACT, f"scales {E}", lambda scale: scale * 1e9, E),
    ("terabytes", ARTIFACT, f"quantized {W}", torch.zeros(1, dtype=torch.int8).expand(10**6, 10**6), LARGER),
    ("terabytes by one storage", ARTIFACT, "", all_in_one, "is damaged"),
    ("terabytes by a row of scales", ARTIFACT, "", spread, "is damaged"),
    ("no layers", ARTIFACT, "", without_layers, "is damaged"),
    ("layers with a gap", ARTIFACT, "", gap_of_layers, ".1."),
    ("path", ARTIFACT, "config data_path", "/etc", "DATA_PATH"),
    ("number for a knob", ARTIFACT, "config", {1: 2}, "is damaged"),
    ("softcap that is not a number", ARTIFACT, "config logit_softcap", NAN, "LOGIT_SOFTCAP"),
    ("softcap out of bounds", ARTIFACT, "config logit_softcap", 0.0, "LOGIT_SOFTCAP=0.0"),
    ("batch that cannot be", ARTIFACT, "config train_batch_tokens", 33, "TRAIN_BATCH_TOKENS=33"),
    ("batch that has no end", ARTIFACT, "config train_batch_tokens", 32 * 10**30, "TRAIN_BATCH_TOKENS"),
    ("sequence beyond reason", ARTIFACT, "config", lambda c: c | dict.fromkeys(LENGTHS, 2**38), "TRAIN_"),
    ("sequence beyond memory", ARTIFACT, "config", lambda c: c | dict.fromkeys(LENGTHS, 2**31), "TRAIN_SEQ_LEN"),
    ("width that contradicts", ARTIFACT, "config model_dim", 64, "MODEL_DIM"),
    ("layers that contradict", ARTIFACT, "config num_layers", 3, "NUM_LAYERS"),
    ("missing head", ARTIFACT, "config tie_embeddings", False, "TIE_EMBEDDINGS"),
    ("something else", WEIGHTS, "", {"x": torch.ones(3)}, "is damaged"),
    ("tensor for a model", WEIGHTS, "", torch.ones(3), "holds a Tensor"),
    ("matrix of a wrong shape", WEIGHTS, W, lambda w: w[:-1].clone(), "mlp.proj.weight"),
    ("weights that are not numbers", WEIGHTS, W, lambda w: w * NAN, W),
]


@table(CONTENT)
def test_content_of_a_file(refuse, place, case):
    file, keys, new, said = case
    place.given.write_bytes(file.seal(changed(file.open(place.trained / file.name), keys, new)))
    message = refuse(MODE=file.mode, ITERATIONS=6, **{file.knob: place.given}, said=said)
    assert str(place.given) in message or "memory" in message, message


def of_run(name: str) -> Callable[[Place], bytes]:
    return lambda place: (place.trained / name).read_bytes()


def plain_pickle(place: Place) -> bytes:
    return models.torch_bytes(models.Canary(place.canary), _use_new_zipfile_serialization=False)


TOO_MUCH = "more than it holds"
HOSTILE = [  # name, who reads it, its bytes; the message
    ("artifact for a checkpoint", CHECKPOINT, of_run("final_model.int8.ptz"), "is damaged"),
    ("checksum of nothing", CHECKPOINT, lambda place: hashed(b""), "is damaged or of another format"),
    ("checksum of text", CHECKPOINT, lambda place: hashed(b"the king"), "is damaged or of another format"),
    ("without its checksum", CHECKPOINT, lambda place: of_run("checkpoint.pt")(place)[:-32], "checksum"),
    ("plain pickle", CHECKPOINT, lambda place: hashed(plain_pickle(place)), "is damaged"),
    ("deflated bomb", CHECKPOINT, lambda place: hashed(deflated_bomb()), TOO_MUCH),
    ("overlapping bomb", CHECKPOINT, lambda place: hashed(overlapping_bomb()), TOO_MUCH),
    ("checkpoint for an artifact", ARTIFACT, of_run("checkpoint.pt"), "is damaged or of another format"),
    ("artifact cut in its stream", ARTIFACT, lambda place: of_run(ARTIFACT.name)(place)[:-40], "cut short"),
    ("artifact without checksum", ARTIFACT, lambda place: of_run(ARTIFACT.name)(place)[:-32], "checksum"),
    ("plain pickle in an artifact", ARTIFACT, lambda place: models.seal(plain_pickle(place)), "is damaged"),
    ("zlib bomb", ARTIFACT, lambda place: zlib_bomb(2**30 + 2**24), "unpacks to over"),
    ("deflated bomb in an artifact", ARTIFACT, lambda place: models.seal(deflated_bomb()), TOO_MUCH),
    ("overlapping bomb in an artifact", ARTIFACT, lambda place: models.seal(overlapping_bomb()), TOO_MUCH),
    ("artifact unpacked", WEIGHTS, lambda p: zlib.decompressobj().decompress(of_run(ARTIFACT.name)(p)), "is damaged"),
    ("deflated bomb of weights", WEIGHTS, lambda place: deflated_bomb(), TOO_MUCH),
    ("entry of zeros", WEIGHTS, lambda place: zip_of([("a/data.pkl", bytes(2**24))]), TOO_MUCH),
]


@table(HOSTILE)
def test_hostile_file(refuse, place, case):
    file, make, said = case
    place.given.write_bytes(make(place))
    refuse(MODE=file.mode, **{file.knob: place.given}, said=[str(place.given), said])


@pytest.mark.parametrize("mode", ["eval", "sample"])
def test_knobs_against_the_tensors(refuse, place, mode):
    artifact = str(place.trained / ARTIFACT.name)
    for knobs in ("NUM_LAYERS=3", "MODEL_DIM=64", "VOCAB_SIZE=512", "TIE_EMBEDDINGS=0", "NUM_HEADS=2 NUM_KV_HEADS=1"):
        refuse(MODE=mode, **models.knobs(knobs), said=[artifact, "disagree", "unset"])


# The run folder


def test_run_folder_that_cannot_be_used(refuse, place):
    refuse(RESUME=place.folder / "nowhere", said=[f"RESUME={place.folder / 'nowhere'}", "give a run folder or a file"])
    refuse(RESUME=place.data, said=[f"there is no checkpoint {place.data}", "give a run folder or a file"])
    refuse(LOG_DIR=place.tokenizer, said=[f"LOG_DIR={place.tokenizer}", "choose another"])
    if Path("/proc/1").exists():  # where even root cannot create a folder
        refuse(LOG_DIR="/proc/logs", said=["LOG_DIR=/proc/logs", "choose another"])
    run = place.stopped_run()
    refuse(RESUME="never", said=["RESUME=never", str(run), f"RESUME={run / 'checkpoint.pt'}"])
    (run / "train.log").unlink()
    (run / "train.log").mkdir()
    refuse(said=[str(run), "choose another"])
    shutil.rmtree(run)
    shutil.copytree(place.trained, run)
    refuse(said=[f"the run in {run} is finished", "choose another RUN_ID"])
    refuse(RESUME="never", said=["RESUME=never", str(run), "choose another RUN_ID"])
    shutil.rmtree(run)
    run.mkdir()
    (run / "diary.txt").write_text("dear diary")
    refuse(said=[str(run), "is no run folder", "choose another RUN_ID"])
    shutil.rmtree(run)
    run.write_text("mine")
    refuse(said=[str(run), "choose another"])


def test_a_checkpoint_of_other_knobs_is_taken_by_force(place):
    """This shows that the refusals above are due to these differences."""
    run = place.stopped_run()
    state = changed(models.open_checkpoint(run / "checkpoint.pt"), "knobs SEED", "9")
    (run / "checkpoint.pt").write_bytes(models.seal_checkpoint(state))
    assert models.call_main(place.settings(RESUME_FORCE=1)) == 0
    assert (run / "result.json").exists() and "SEED was 9, is 1337" in (run / "train.log").read_text()


# A full disk


@contextlib.contextmanager
def small_files(limit: int):
    """No file may exceed the limit: writes fail as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WIDE = {"MODEL_DIM": 96}  # a model larger than the script


# Limits between the sizes of config.env (1 kB), the script (100 kB), the model (400 kB) and the checkpoint (over 1 MB)
@pytest.mark.parametrize("limit, name", [(500, "config.env"), (20_000, "train_gpt.py"), (200_000, "final_model.pt")])
def test_full_disk(place, capsys, limit, name):
    settings, run = place.settings(**WIDE), place.run
    with small_files(limit):
        assert models.call_main(settings) == 2
    message = the_message(*capsys.readouterr())
    assert str(run / name) in message and "too large" in message and "LOG_DIR" in message
    assert not [path for path in files(run) if "tmp" in path], "half a file"
    assert not {name, "result.json", "checkpoint.pt"} & {path.name for path in run.iterdir()}
    assert ("no checkpoint of step 4" in (run / "train.log").read_text()) == (name == "final_model.pt")
    assert models.call_main(settings) == 0, "with room again, it begins again"
    assert (run / "result.json").exists()


def test_full_disk_at_the_checkpoint_alone_and_at_a_later_export(place, capsys):
    """Only the checkpoint is lost; a run that continues keeps the previous one."""
    settings, run = place.settings(**WIDE), place.run
    with small_files(1_000_000):
        assert models.call_main(settings) == 0
    out, err = capsys.readouterr()
    assert not err and re.search(r"^warning: no checkpoint of step 4 \(.*too large", out, re.MULTILINE)
    assert (run / "result.json").exists() and not (run / "checkpoint.pt").exists()
    shutil.rmtree(run)
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


def test_exit_code_of_a_process(place):
    before = files(place.folder)
    done = models.process(place.settings(DATA_PATH=place.folder / "nowhere"), place.folder)
    assert done.returncode == 2 and files(place.folder) == before
    message = the_message(done.stdout.decode(), done.stderr.decode())
    assert "\n  python data/prepare_shakespeare.py\n  python train_gpt.py records/recipes/demo_cpu.env\n" in message
