"""What is read from files and from the environment, by properties: whatever the bytes, a reader gives what the format
says or raises a UserError, and nothing else."""

import dataclasses
import hashlib
import itertools
import struct
import zlib

import models
import numpy as np
import pytest
import torch
from conftest import write_shard
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import Config, UserError

KNOBS = Config.knobs()
checkpoint = train_gpt.tool("checkpoint")
evaluate = train_gpt.tool("artifact")

CHECKED = settings(max_examples=150)


NUMBERS_OF_INTEREST = [0, 1, -1, 2, 255, 256, 65535, 65536, 2**31 - 1, -(2**31), 20240520]


@st.composite
def mutations(draw, data: bytes) -> bytes:
    """`data` after one to three edits: bytes changed, a part cut out, doubled, moved, or replaced by anything."""
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
    """Written from the description of the format; None for what is no shard."""
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
@example(data=b"")
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


def test_the_oracle_of_shards_accepts_and_refuses(tmp_path):
    assert tokens_by_the_format(SHARD) == [*range(60_000, 60_040)]
    write_shard(tmp_path / "x", [1, 2, 3])
    assert tokens_by_the_format((tmp_path / "x").read_bytes()) == [1, 2, 3]
    assert tokens_by_the_format(SHARD[:-1]) is None is tokens_by_the_format(shard([]))


# Configuration

# What belongs to one call and is left out of texts().
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
    """Texts for some knobs: mostly of the right kind, so that some configurations are valid."""
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
    """As an environment, and as the config.env that a run writes."""
    texts, shown = config.as_env(), {name: getattr(config, name) for name in HIDDEN}
    assert all(KNOBS.keys() >= {name} and type(text) is str for name, text in texts.items())
    again = Config.load([], texts)
    assert dataclasses.replace(again, **shown) == config
    assert again.as_env() == texts


@settings(CHECKED, max_examples=500)
@given(texts=environments())
@example(texts={"ITERATIONS": "1" + 400 * "0"})
@example(texts={"MICRO_BATCH_TOKENS": 5000 * "9"})
@example(texts={"NUM_HEADS": "1" + 30 * "0", "MODEL_DIM": "2" + 30 * "0"})
@example(texts={"WARMDOWN_FRAC": "0.5", "WARMDOWN_ITERS": "-1"})
def test_an_environment_is_a_configuration_or_refused(texts):
    try:
        config = Config.load([], texts)
    except UserError as error:
        assert str(error).strip()
    else:
        assert_reads_back(config)
        for world_size in (1, 3):
            try:
                assert config.accumulation_steps(world_size, "cpu") >= 1
            except UserError:
                pass


def test_environments_are_of_both_kinds():
    """The property above is not empty: it sees many that are valid and many that are not."""
    seen = {True: 0, False: 0}

    @CHECKED
    @given(texts=environments())
    def count(texts):
        try:
            Config.load([], texts)
            seen[len(texts) > 0] += 1
        except UserError:
            seen[False] += 1

    count()
    assert min(seen.values()) > 20


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


@settings(CHECKED, max_examples=400)
@given(lines=st.lists(LINES, max_size=5), ending=st.sampled_from(["\n", "\r\n", "\x0b"]))
@example(lines=["SEED=1", "SEED=1"], ending="\n")
@example(lines=["DATA_PATH='\x85'"], ending="\n")
def test_a_file_env_is_a_configuration_or_refused(tmp_path_factory, lines, ending):
    path = tmp_path_factory.getbasetemp() / "fuzzed.env"
    path.write_bytes(ending.join(lines).encode("utf-8", "surrogatepass"))
    try:
        config = Config.load([str(path)], {})
    except UserError as error:
        assert str(path) in str(error) or any(f"{name}=" in str(error) or name in str(error) for name in KNOBS)
    else:
        assert_reads_back(config)


@CHECKED
@given(data=st.binary(max_size=60))
def test_any_bytes_as_file_env(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "bytes.env"
    path.write_bytes(data)
    try:
        assert_reads_back(Config.load([str(path)], {}))
    except UserError as error:
        assert str(path) in str(error)


VALUES = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=20).map(str.strip)


@CHECKED
@given(values=st.fixed_dictionaries({"DATA_PATH": VALUES, "LOG_DIR": VALUES, "TOKENIZER_PATH": VALUES}))
def test_quoted_values_are_taken_to_the_letter(tmp_path_factory, values):
    assume(not any({"'", '"'} <= set(text) for text in values.values()))
    path = tmp_path_factory.getbasetemp() / "quoted.env"
    quotes = {name: "'" if '"' in text else '"' for name, text in values.items()}
    lines = [f"{name} = {quotes[name]}{text}{quotes[name]}  # {text}\n" for name, text in values.items()]
    path.write_text("".join(lines), encoding="utf-8")
    config = Config.load([str(path)], {})
    assert {name: getattr(config, name.lower()) for name in values} == values


# Artifacts and checkpoints


def tiny_config(**changes) -> Config:
    small = {
        "vocab_size": 6,
        "num_layers": 1,
        "model_dim": 4,
        "num_heads": 2,
        "num_kv_heads": 1,
        "mlp_mult": 1,
        "train_seq_len": 8,
        "train_batch_tokens": 8,
    }
    return Config(**small | changes)


@pytest.fixture(scope="module")
def artifact():
    """The smallest artifact of all: (bytes, state dict)."""
    config = tiny_config()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "INT8_MIN_NUMEL", 20)
        packed = train_gpt.Coder(config).quantize(models.new_model(config).state_dict())
    assert packed["quantized"] and packed["passthrough"]
    blob = models.seal(models.torch_bytes(packed))
    state, told, config_class = evaluate.read_model(blob, "file")
    assert config_class is Config and told["NUM_HEADS"] == "2" and told["TRAIN_SEQ_LEN"] == "8"
    return blob, state


def assert_a_model_or_refused(blob: bytes) -> bool:
    """Whether it is a model: what comes back could be loaded and used."""
    try:
        state, told, config_class = evaluate.read_model(blob, "the file")
    except UserError as error:
        assert "the file" in str(error) and "\n" not in str(error)
        return False
    assert all(torch.isfinite(tensor).all() and tensor.is_floating_point() for tensor in state.values())
    config = config_class.load([], told)
    assert config_class is Config
    assert (config.vocab_size, config.model_dim) == state["tok_emb.weight"].shape
    return True


def test_every_flipped_bit_of_an_artifact_is_noticed(artifact):
    blob = artifact[0]
    for position, bit in itertools.product(range(len(blob)), range(8)):
        flipped = bytearray(blob)
        flipped[position] ^= 1 << bit
        with pytest.raises(UserError):
            evaluate.read_model(bytes(flipped), "file")


def test_every_shortened_artifact_is_noticed(artifact):
    blob = artifact[0]
    for length in range(len(blob)):
        with pytest.raises(UserError):
            evaluate.read_model(blob[:length], "file")


@CHECKED
@given(data=st.binary(max_size=200))
@example(data=b"PK")
@example(data=b"PK\5\6" + bytes(18))
@example(data=zlib.compress(b""))
@example(data=zlib.compress(b"PK\5\6" + bytes(18)))
def test_any_bytes_as_a_model(data):
    assert not assert_a_model_or_refused(data)
    assert not assert_a_model_or_refused(models.seal(data))
    assert not assert_a_model_or_refused(b"PK" + data)


@settings(CHECKED, max_examples=400)
@given(data=st.data())
def test_an_artifact_that_was_tampered_with(artifact, data):
    """With the old checksum it is refused, unless it is the same; with a new one, refused or a model all the same."""
    blob = artifact[0]
    changed = data.draw(mutations(blob))
    assert changed == blob or not assert_a_model_or_refused(changed)
    packed = zlib.decompressobj().decompress(blob)
    changed = data.draw(mutations(packed))
    assert_a_model_or_refused(models.seal(changed))
    assert_a_model_or_refused(changed)


def strange_values():
    """What a pickle of tensors may hold, in places where it does not belong."""
    tensors = st.sampled_from(
        [
            torch.ones(()),
            torch.ones(0),
            torch.ones(4),
            torch.ones(2, 4),
            torch.ones(6, 4),
            torch.ones(4, 4, 1),
            torch.ones(1).expand(10**9),
            torch.ones(4, dtype=torch.int8),
            torch.ones(4, 4, dtype=torch.complex64),
            torch.full((4,), float("nan")),
            torch.full((4, 4), 1e38),
            torch.ones(4, 4).to_sparse(),
            torch.ones(4, 4).to("meta"),
            torch.ones(4, 4, dtype=torch.bool),
            torch.ones(4, 4).half(),
        ]
    )
    plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=5))
    return st.one_of(tensors, plain, st.lists(plain, max_size=2), st.dictionaries(st.text(max_size=3), plain))


@st.composite
def altered(draw, value):
    """A copy of nested dictionaries with one or two places taken out, renamed or filled with something else."""
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
                place[key] = draw(strange_values())
    return value


@CHECKED
@given(data=st.data())
def test_an_artifact_of_strange_parts(artifact, data):
    changed = data.draw(altered(models.load(zlib.decompressobj().decompress(artifact[0]))))
    assert_a_model_or_refused(models.seal(models.torch_bytes(changed)))
    assert_a_model_or_refused(models.torch_bytes(data.draw(altered(artifact[1]))))


@pytest.mark.parametrize(
    "changes",
    [
        {"__quant_format__": torch.ones(4, 4)},
        {"__quant_format__": b"int8\nclean"},
        {"__quant_format__": ["int8_clean_per_row_v1"]},
        {"config": {"vocab_size": torch.ones(4, 4)}},
        {"config": {"micro_batch_tokens": "au\nto"}},
        {"config": {"two\nlines": 1}},
    ],
    ids=str,
)
def test_what_an_artifact_says_of_itself_is_one_line_of_a_message(artifact, changes):
    """An error of one line, whatever the file holds in the place of a name."""
    content = models.load(zlib.decompressobj().decompress(artifact[0]))
    config = content["config"] | changes.get("config", {})
    changed = models.seal(models.torch_bytes(content | changes | {"config": config}))
    assert not assert_a_model_or_refused(changed)


@pytest.fixture(scope="module")
def saved():
    """(bytes, configuration, facts): of no training, but with everything in its place."""
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
    blob = models.seal_checkpoint(state)
    assert checkpoint.read_checkpoint(blob, "file", config, facts)[1] == []
    return blob, config, facts


def refused_checkpoint(blob: bytes, config: Config, facts: dict) -> bool:
    try:
        state, differences = checkpoint.read_checkpoint(blob, "the file", config, facts)
    except UserError as error:
        assert "the file" in str(error) and "\n" not in str(error)
        return True
    assert isinstance(state, dict) and not differences
    return False


def test_every_flipped_bit_of_a_checkpoint_is_noticed(saved):
    blob, config, facts = saved
    for position, bit in itertools.product(range(len(blob)), range(8)):
        flipped = bytearray(blob)
        flipped[position] ^= 1 << bit
        with pytest.raises(UserError, match="checksum"):
            checkpoint.read_checkpoint(bytes(flipped), "file", config, facts)


@CHECKED
@given(data=st.data())
def test_a_checkpoint_that_was_tampered_with(saved, data):
    blob, config, facts = saved
    changed = data.draw(mutations(blob))
    assert changed == blob or refused_checkpoint(changed, config, facts)
    packed = data.draw(mutations(blob[:-32]))
    refused_checkpoint(packed + hashlib.sha256(packed).digest(), config, facts)


@CHECKED
@given(data=st.binary(max_size=100))
def test_any_bytes_as_a_checkpoint(saved, data):
    assert refused_checkpoint(data, *saved[1:])
    assert refused_checkpoint(data + hashlib.sha256(data).digest(), *saved[1:])


@CHECKED
@given(data=st.data())
def test_a_checkpoint_of_strange_parts(saved, data):
    blob, config, facts = saved
    changed = data.draw(altered(models.load(blob[:-32])))
    refused_checkpoint(models.seal_checkpoint(changed), config, facts)
