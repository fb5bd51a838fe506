"""Property tests of readers of files and the environment: for any bytes they return what the format defines or raise a
UserError."""

import contextlib
import dataclasses
import hashlib
import struct
import zlib
from types import SimpleNamespace

import models
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import Config, UserError

KNOBS = Config.knobs()
checkpoint = train_gpt.tool("checkpoint")
evaluate = train_gpt.tool("artifact")

CHECKED = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


NUMBERS_OF_INTEREST = [0, 1, -1, 2, 255, 256, 65535, 65536, 2**31 - 1, -(2**31), 20240520]


@st.composite
def mutations(draw, data: bytes) -> bytes:
    """`data` after one to three edits: bytes changed, a part removed, duplicated, moved, or replaced by anything."""
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, max(len(data) - 1, 0)))
        end = min(begin + draw(st.sampled_from([1, 2, 4, 8, 50, len(data)])), len(data))
        part, kind = data[begin:end], draw(st.sampled_from(["flip", "cut", "double", "swap", "any", "number"]))
        if kind == "flip" and part:
            part = bytes([part[0] ^ 1 << draw(st.integers(0, 7))]) + part[1:]
        elif kind == "cut":
            part = b""
        elif kind == "double":
            part += part
        elif kind == "swap":
            part = part[::-1]
        elif kind == "any":
            part = draw(st.binary(max_size=12))
        elif kind == "number":
            part = struct.pack("<i", draw(st.sampled_from(NUMBERS_OF_INTEREST)))
        data = data[:begin] + part + data[end:]
    return data


# Shards


def shard(tokens, magic=20240520, version=1, count=None) -> bytes:
    numbers = [magic, version, len(tokens) if count is None else count] + 253 * [0]
    return struct.pack("<256i", *numbers) + struct.pack(f"<{len(tokens)}H", *tokens)


def tokens_by_the_format(data: bytes) -> list[int] | None:
    """Implemented from the description of the format; None if `data` is not a shard."""
    if len(data) < 1024 or struct.unpack("<2i", data[:8]) != (20240520, 1):
        return None
    count = struct.unpack("<i", data[8:12])[0]
    body = data[1024:]
    return list(struct.unpack(f"<{count}H", body)) if count > 0 and len(body) == 2 * count else None


SHARD = shard(range(60_000, 60_040))
SHARDS = st.one_of(
    st.binary(max_size=40),
    st.binary(min_size=1020, max_size=1040),
    mutations(SHARD),
    st.builds(shard, st.lists(st.integers(0, 65535), max_size=20), st.just(20240520), st.just(1), st.integers(-3, 25)),
    st.builds(shard, st.lists(st.integers(0, 65535), max_size=20)),
)


@CHECKED
@given(data=SHARDS)
@example(data=SHARD)
@example(data=shard([7], count=2))
def test_a_shard_is_read_as_the_format_says_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.bin"
    path.write_bytes(data)
    expected = tokens_by_the_format(data)
    try:
        tokens = train_gpt.open_shard(path)
    except UserError as error:
        assert expected is None and str(path) in str(error)
    else:
        assert tokens.tolist() == expected and tokens.dtype == np.uint16


# Configuration

# Belongs to a single call; texts() leaves it out.
HIDDEN = ("run_id", "mode", "artifact", "resume", "resume_force")
NUMBERS = st.one_of(
    st.integers(-3, 5000).map(str),
    st.integers().map(str),
    st.floats().map(str),
    st.floats(0, 1).map(str),
    st.sampled_from(["1" + 400 * "0", 5000 * "9", "0" * 50, "00", "1_0", "+1", "-0", "1e5", " 7 ", "\u0663", "0x1"]),
)
LETTERS = st.text(st.characters() | st.sampled_from(" #'\"=$\\\n\t"), max_size=12)


@st.composite
def environments(draw):
    """Strings for some knobs: mostly of the right kind, so that some configurations are valid."""
    texts = {}
    for name in draw(st.lists(st.sampled_from(sorted(KNOBS)), max_size=6, unique=True)):
        field = KNOBS[name]
        (low, _, choices), kind = field.metadata["allowed"], type(field.default)
        fitting = [st.just(str(int(field.default) if kind is bool else field.default))]
        if choices:
            fitting.append(st.sampled_from(choices))
        elif kind is bool:
            fitting.append(st.sampled_from("01"))
        elif kind is not str:
            fitting += [st.integers(int(low or 0), 2**16).map(str), NUMBERS]
        texts[name] = draw(
            st.one_of(*fitting, LETTERS) if kind is str or draw(st.integers(0, 5)) == 0 else st.one_of(*fitting)
        )
    return texts


def assert_reads_back(config: Config):
    """It reads back from an environment, and from the config.env that a run writes."""
    texts, shown = config.as_env(), {name: getattr(config, name) for name in HIDDEN}
    assert all(KNOBS.keys() >= {name} and type(text) is str for name, text in texts.items())
    again = Config.load([], texts)
    assert dataclasses.replace(again, **shown) == config
    assert again.as_env() == texts


def test_an_environment_is_a_configuration_or_refused():
    seen = []

    @settings(CHECKED, max_examples=250)
    @given(texts=environments())
    @example(texts={"ITERATIONS": "1" + 400 * "0"})
    @example(texts={"MICRO_BATCH_TOKENS": 5000 * "9"})
    @example(texts={"NUM_HEADS": "1" + 30 * "0", "MODEL_DIM": "2" + 30 * "0"})
    def check(texts):
        try:
            config = Config.load([], texts)
        except UserError as error:
            seen.append("refused")
            assert str(error).strip()
        else:
            seen.append("a configuration" if texts else "")
            assert_reads_back(config)
            for world_size in (1, 3):
                with contextlib.suppress(UserError):
                    assert config.accumulation_steps(world_size, "cpu") >= 1

    check()
    assert seen.count("refused") > 20 and seen.count("a configuration") > 20


NAMES = st.sampled_from([*sorted(KNOBS), "SEEDS", "seed", "X"])
BLANKS = st.sampled_from(["", " ", "\t "])
LINES = st.one_of(
    st.builds("{}={}".format, NAMES, NUMBERS | LETTERS),
    st.builds('{1}{0}{2}={3}"{4}"{5}# {4}'.format, NAMES, BLANKS, BLANKS, BLANKS, LETTERS, st.just(" ")),
    st.builds("{}='{}'".format, st.sampled_from(["DATA_PATH", "SAMPLE_PROMPT", "LOG_DIR"]), LETTERS),
    st.builds("SEED={}{}".format, st.integers(0, 99), st.sampled_from(["", " # one", "# two", " #", "\r"])),
    st.just("# comment"),
    BLANKS,
    LETTERS,
)
ENDINGS = st.sampled_from(["\n", "\r\n", "\x0b"])
TEXTS = st.builds(lambda lines, ending: ending.join(lines), st.lists(LINES, max_size=5), ENDINGS)


@settings(CHECKED, max_examples=300)
@given(data=TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=60))
@example(data=b"SEED=1\nSEED=1")
@example(data="DATA_PATH='\x85'".encode())
def test_a_file_env_is_a_configuration_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.env"
    path.write_bytes(data)
    try:
        config = Config.load([str(path)], {})
    except UserError as error:
        assert str(path) in str(error) or any(name in str(error) for name in KNOBS)
    else:
        assert_reads_back(config)


# Artifacts and checkpoints


def tiny_config() -> Config:
    width = {"vocab_size": 6, "num_layers": 1, "model_dim": 4, "num_heads": 2, "num_kv_heads": 1, "mlp_mult": 1}
    return Config(**width, train_seq_len=8, train_batch_tokens=8)


@pytest.fixture(scope="module")
def artifact():
    """The smallest possible artifact, and a function: whether other bytes are a model that could be loaded and used."""
    config = tiny_config()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "INT8_MIN_NUMEL", 20)
        packed = train_gpt.Coder(config).quantize(models.new_model(config).state_dict())
    assert packed["quantized"] and packed["passthrough"]

    def read(blob: bytes):
        state, told, config_class = evaluate.read_model(blob, "the file")
        assert all(torch.isfinite(tensor).all() and tensor.is_floating_point() for tensor in state.values())
        config = config_class.load([], told)
        assert config_class is Config
        assert (config.vocab_size, config.model_dim) == state["tok_emb.weight"].shape

    return SimpleNamespace(content=packed, seal=models.seal, read=read)


@pytest.fixture(scope="module")
def weights(artifact):
    """final_model.pt, which has no checksum."""
    content = models.new_model(tiny_config()).state_dict()
    return SimpleNamespace(content=content, seal=lambda data: data, read=artifact.read)


@pytest.fixture(scope="module")
def saved():
    """A complete checkpoint without any training, and a function: whether other bytes are a checkpoint of this run."""
    config, facts = tiny_config(), {"train_gpt.py": "0123", "training tokens": "99"}
    model = models.new_model(config)
    state = {
        "format": checkpoint.CHECKPOINT_FORMAT,
        "knobs": config.as_env() | facts,
        "model": model.state_dict(),
        "optimizer": {name: {"momentum_buffer": p.detach()} for name, p in model.named_parameters()},
        "rng": [{"cpu": torch.get_rng_state()[:64]}],
        "position": 0,
        "steps": 3,
        "train_seconds": 1.5,
        "finished": False,
        "resumed_at": [],
    }

    def read(blob: bytes):
        state, differences = checkpoint.read_checkpoint(blob, "the file", config, facts)
        assert isinstance(state, dict) and not differences

    return SimpleNamespace(content=state, seal=lambda data: data + hashlib.sha256(data).digest(), read=read)


@pytest.fixture(params=["artifact", "saved"])
def file(request):
    made = request.getfixturevalue(request.param)
    made.packed = models.torch_bytes(made.content)
    made.blob = made.seal(made.packed)
    made.read(made.blob)
    return made


def is_accepted(file, blob: bytes) -> bool:
    """Whether it is read; otherwise it must be refused in one line."""
    try:
        file.read(blob)
    except UserError as error:
        assert "the file" in str(error) and "\n" not in str(error)
        return False
    return True


def test_a_flipped_bit_in_any_byte_and_any_missing_end_is_noticed(file):
    for position in range(len(file.blob)):
        flipped = bytearray(file.blob)
        flipped[position] ^= 1 << position % 8
        assert not is_accepted(file, bytes(flipped))
        assert position % 8 or not is_accepted(file, file.blob[:position])


@CHECKED
@given(data=st.binary(max_size=200))
@example(data=b"PK")
@example(data=b"PK\5\6" + bytes(18))
@example(data=zlib.compress(b""))
@example(data=zlib.compress(b"PK\5\6" + bytes(18)))
def test_any_bytes_as_a_file(file, data):
    for blob in (data, file.seal(data), b"PK" + data):
        assert not is_accepted(file, blob)


@settings(CHECKED, max_examples=250)
@given(data=st.data())
def test_a_file_that_was_tampered_with(file, data):
    """With the old checksum it is refused unless unchanged; with a new one it is refused, or complete nevertheless."""
    changed = data.draw(mutations(file.blob))
    assert changed == file.blob or not is_accepted(file, changed)
    changed = data.draw(mutations(file.packed))
    is_accepted(file, file.seal(changed))
    is_accepted(file, changed)


STRANGE_TENSORS = [
    *(torch.ones(shape) for shape in ((), 0, 4, (2, 4), (6, 4), (4, 4, 1))),
    *(torch.ones(4, 4, dtype=dtype) for dtype in (torch.int8, torch.complex64, torch.bool, torch.half)),
    *(torch.full((4, 4), value) for value in (float("nan"), 1e38)),
    *(torch.ones(1).expand(10**9), torch.ones(4, 4).to_sparse(), torch.ones(4, 4).to("meta")),
]
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=5))
STRANGE = st.one_of(
    st.sampled_from(STRANGE_TENSORS), PLAIN, st.lists(PLAIN, max_size=2), st.dictionaries(st.text(max_size=3), PLAIN)
)


@st.composite
def altered(draw, value):
    """A copy of nested dictionaries with one or two entries removed, renamed or replaced by something else."""
    value = models.load(models.torch_bytes(value))
    for _ in range(draw(st.integers(1, 2))):
        place, deep = value, draw(st.integers(0, 3))
        while place and deep:
            key = draw(st.sampled_from(sorted(place, key=str)))
            if not isinstance(place[key], dict) or not place[key]:
                break
            place, deep = place[key], deep - 1
        if place:
            key, kind = draw(st.sampled_from(sorted(place, key=str))), draw(st.integers(0, 3))
            old = place.pop(key) if kind < 2 else None
            if kind == 1:
                place[draw(st.sampled_from(["x", "blocks.0", "blocks.9.attn.q_gain", 7, None]))] = old
            elif kind > 1:
                place[key] = draw(STRANGE)
    return value


@pytest.mark.parametrize("file", ["artifact", "saved", "weights"], indirect=True)
@CHECKED
@given(data=st.data())
def test_a_file_of_strange_parts(file, data):
    is_accepted(file, file.seal(models.torch_bytes(data.draw(altered(file.content)))))


ODD_FORMATS = [torch.ones(4, 4), b"int8\nclean", ["int8_clean_per_row_v1"]]
ODD_KNOBS = [{"vocab_size": torch.ones(4, 4)}, {"micro_batch_tokens": "au\nto"}, {"two\nlines": 1}]


@pytest.mark.parametrize("changes", [{"__quant_format__": name} for name in ODD_FORMATS] + ODD_KNOBS, ids=str)
def test_what_an_artifact_says_of_itself_is_one_line_of_a_message(artifact, changes):
    """Whatever the file contains in place of a name."""
    content = models.load(models.torch_bytes(artifact.content))
    (content if "__quant_format__" in changes else content["config"]).update(changes)
    assert not is_accepted(artifact, artifact.seal(models.torch_bytes(content)))
