"""rANS: the words of a scalar coder in Python integers, sizes near the entropy, and a container whose reader accepts
only what its writer could have written."""

import zlib

import models
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import UserError

FrontierConfig, frontier = models.model_file("frontier")
coder = frontier.sibling("coder")
evaluate = train_gpt.tool("artifact")

CHECKED = settings(max_examples=150)


def tables_of(groups):
    return np.stack([coder.rans_frequencies(np.bincount(group, minlength=256)) for group in groups])


def scalar_encode(groups, tables, steps):
    """One symbol at a time, from the last to the first: symbol i of a group belongs to lane i % lanes."""
    lanes, words = sum(map(len, groups)) // steps + 1, []
    states = [2**16] * lanes
    for group, table in zip(reversed(groups), reversed(tables.tolist()), strict=True):
        for i in reversed(range(len(group))):
            f, start, x = table[group[i]], sum(table[: group[i]]), states[i % lanes]
            if x >= f * 2**18:
                words.append(x % 2**16)
                x //= 2**16
            states[i % lanes] = x // f * 2**14 + x % f + start
    assert all(2**16 <= x < 2**32 for x in states)
    return [word for x in states for word in (x % 2**16, x // 2**16)] + words[::-1]


def gaussian_groups(count, seed=0, step=0.4145):
    """Rounded normally distributed numbers in three groups, each with its own standard deviation."""
    rng = np.random.default_rng(seed)
    sizes = (count // 2, count // 3, count - count // 2 - count // 3)
    symbols = [np.round(rng.standard_normal(n) * s / step) for n, s in zip(sizes, (1.0, 0.6, 2.0), strict=True)]
    return [np.clip(group, -31, 31).astype(np.int8).view(np.uint8) for group in symbols]


def entropy_bytes(groups):
    """Zeroth-order entropy in bytes, each group separately."""
    bits = 0.0
    for group in groups:
        counts = np.bincount(group)
        counts = counts[counts > 0]
        bits -= (counts * np.log2(counts / len(group))).sum()
    return bits / 8


def same(groups, others):
    return len(groups) == len(others) and all(np.array_equal(a, b) for a, b in zip(groups, others, strict=True))


few = st.lists(st.sampled_from([0, 1, 2, 44, 255]), max_size=60).map(bytes)
groups_of_bytes = st.lists(few | st.binary(max_size=60), max_size=4)


@CHECKED
@given(groups=groups_of_bytes, steps=st.integers(1, 100))
@example(groups=[], steps=5)
@example(groups=[b"", b"", b""], steps=5)
@example(groups=[b"\7"], steps=1)
@example(groups=[b"", b"," * 80, b""], steps=9)  # one symbol only: frequency 2**14, no word is ever emitted
@example(groups=[b"\0\1" * 40, b"\1"], steps=81)
def test_the_words_are_those_of_a_scalar_coder_and_decode_to_the_symbols(groups, steps):
    groups = [np.frombuffer(group, np.uint8) for group in groups]
    tables = tables_of(groups) if groups else np.zeros((0, 256), np.int64)
    words = coder.rans_encode(groups, tables, steps)
    assert words.dtype == np.uint16 and words.tolist() == scalar_encode(groups, tables, steps)
    back = coder.rans_decode(words, [*map(len, groups)], tables.astype(np.int16), steps)
    assert all(group.dtype == np.uint8 for group in back) and same(back, groups)


@pytest.mark.parametrize("step", [0.2, 0.4145, 1.5])
def test_the_size_is_within_3_thousandths_of_the_entropy(step):
    groups = gaussian_groups(1_000_000, step=step)
    words, entropy = coder.rans_encode(groups, tables_of(groups)), entropy_bytes(groups)
    assert entropy <= 2 * len(words) < 1.003 * entropy
    assert same(coder.rans_decode(words, [*map(len, groups)], tables_of(groups)), groups)
    assert 2 * len(words) < len(zlib.compress(b"".join(map(bytes, groups)), 1))


@CHECKED
@given(counts=st.lists(st.integers(0, 10**9) | st.integers(0, 2), min_size=256, max_size=256))
@example(counts=[0] * 256)
@example(counts=[0] * 255 + [10**9])
@example(counts=[1] * 255 + [10**12])
@example(counts=[64] * 256)
@example(counts=[1, 99] * 128)
def test_frequencies_make_a_table_of_exactly_what_occurs(counts):
    counts = np.array(counts)
    frequencies = coder.rans_frequencies(counts)
    assert frequencies.sum() == 2**14 and frequencies.min() >= 0
    if counts.any():
        assert ((frequencies > 0) == (counts > 0)).all()
        shares, some = counts / counts.sum(), counts > 0
        ideal = -(shares[some] * np.log2(shares[some])).sum()
        spent = -(shares[some] * np.log2(frequencies[some] / 2**14)).sum()
        assert spent - ideal < 0.03  # at worst 255 rare symbols take 255 of 2**14 slots


def test_a_damaged_stream_is_refused_or_is_another_stream_of_the_coder():
    """Some changes give the exact code of other symbols. No coder can detect those; a checksum protects the stream."""
    groups = gaussian_groups(300)
    tables, counts, taken = tables_of(groups), [*map(len, groups)], 0
    words = coder.rans_encode(groups, tables, 100)
    for length in range(len(words)):
        with pytest.raises((UserError, ValueError)):
            coder.rans_decode(words[:length], counts, tables, 100)
    with pytest.raises(UserError):
        coder.rans_decode(np.append(words, np.uint16(0)), counts, tables, 100)
    for position in range(len(words)):
        for bit in range(16):
            changed = words.copy()
            changed[position] ^= 1 << bit
            try:
                others = coder.rans_decode(changed, counts, tables, 100)
            except (UserError, ValueError):
                continue
            taken += 1
            assert (coder.rans_encode(others, tables, 100) == changed).all()
    assert taken < len(words), "of 16 changes a word, hardly any"


# The container


def tiny_artifact(**changes) -> tuple[dict, dict]:
    """(state dict, rANS container) of the smallest model."""
    small = {"vocab_size": 6, "num_layers": 1, "model_dim": 4, "num_heads": 2, "num_kv_heads": 1, "mlp_mult": 1}
    small |= {"train_seq_len": 8, "train_batch_tokens": 8, "codec": "rans"}
    config = FrontierConfig(**small | changes)
    made = config.coder_class()(config)
    model = frontier.GPT(config)
    state = {
        name: torch.randn(t.shape, generator=torch.Generator().manual_seed(i)).half().float()
        for i, (name, t) in enumerate(model.state_dict().items())
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "INT8_MIN_NUMEL", 10)
        plain = made.quantize(state)
    assert len(plain["quantized"]) == 5 and plain["passthrough"]
    return made.dequantize(plain), made.rans_pack(plain)


def read(artifact) -> dict:
    return read_bytes(models.seal(models.torch_bytes(artifact)))


def read_bytes(blob) -> dict:
    return evaluate.read_model(blob, "the file", FrontierConfig)[0]


def copy_of(artifact) -> dict:
    return models.load(models.torch_bytes(artifact))


@pytest.mark.parametrize("changes", [{}, {"weight_bits": 2, "embed_bits": 5}, {"clip_attn": 3.0, "clip_mlp": 2.0}])
def test_the_container_holds_what_the_int8_object_holds(changes):
    state, artifact = tiny_artifact(**changes)
    assert artifact["__quant_format__"] == "rans_per_row_v1"
    tensors = {name: part.dtype for name, part in artifact.items() if isinstance(part, torch.Tensor)}
    assert tensors == {"stream": torch.uint8, "tables": torch.int16}
    assert {t.dtype for part in ("scales", "passthrough") for t in artifact[part].values()} == {torch.float16}
    assert artifact["quantized"] == {name: [*state[name].shape] for name in artifact["scales"]}
    back = read(artifact)
    assert set(back) == set(state)
    assert all(back[name].dtype == state[name].dtype and torch.equal(back[name], state[name]) for name in state)


def test_every_cut_and_every_flipped_byte_of_an_artifact_is_refused():
    blob = models.seal(models.torch_bytes(tiny_artifact()[1]))
    for length in range(len(blob)):
        with pytest.raises(UserError, match="the file"):
            read_bytes(blob[:length])
    for position in range(len(blob)):
        changed = bytearray(blob)
        changed[position] ^= 1 << position % 8
        with pytest.raises(UserError, match="the file"):
            read_bytes(bytes(changed))


def put(part, value):
    def change(artifact):
        artifact[part] = value(artifact[part]) if callable(value) else value

    return change


def inside(part, value, index=0):
    """Change one value in a dictionary of the container: the shape of a matrix, its scales, a kept tensor."""

    def change(artifact):
        name = list(artifact[part])[index]
        artifact[part][name] = value(artifact[part][name]) if callable(value) else value

    return change


def shape(value, index=0):
    return inside("quantized", value, index)


def renamed(old, new):
    def change(artifact):
        for part in ("quantized", "scales", "dtypes", "qmeta"):
            artifact[part] = {new if name == old else name: value for name, value in artifact[part].items()}

    return change


def add(artifact, name, shape):
    artifact["quantized"][name], artifact["dtypes"][name] = shape, "float32"
    artifact["scales"][name] = torch.ones(shape[0], dtype=torch.float16)


def table(row, column, more):
    def change(artifact):
        artifact["tables"][row, column] += more

    return change


def claims(*shape, dtype):
    return torch.zeros(1, dtype=dtype).expand(shape)


TAMPERED = {
    "a part is gone": lambda artifact: artifact.pop("stream"),
    "no shape": put("quantized", {}),
    "a word as shapes": put("quantized", "abc"),
    "a matrix is gone": lambda artifact: artifact["quantized"].popitem(),
    "a matrix of nothing": lambda artifact: add(artifact, "more", [0, 4]),
    "thousands of matrices": lambda artifact: [add(artifact, f"more{i}", [0, 4]) for i in range(100)],
    # regression: 4 * 2**30 is 0 in int32, in which such a shape's product was computed
    "terabytes in int32": shape(torch.tensor([2**30], dtype=torch.int32)),
    "terabytes in tensors": shape([torch.tensor(2**30, dtype=torch.int32)]),
    "another class": renamed("tok_emb.weight", "blocks.0.attn.tok_emb.weight"),
    "another name": renamed("tok_emb.weight", "tok_em.weight"),
    "name of nothing": renamed("tok_emb.weight", None),
    "unknown type": inside("dtypes", "quantum"),
    "complex": inside("dtypes", "complex64"),
    "no type": lambda artifact: artifact["dtypes"].popitem(),
    "a row more": shape(lambda s: [s[0] + 1, s[1]]),
    "a column more": shape(lambda s: [s[0], s[1] + 1]),
    "negative shape": shape(lambda s: [-s[0], -s[1]]),
    "free": shape(lambda s: [-1, s[1]]),
    "terabytes": shape([10**6, 10**6]),
    "beyond the limit": shape([2**14, 2**14 + 1]),
    "beyond int64": shape([2**40, 2**40]),
    "terabytes and their negative": lambda artifact: [shape([2**40])(artifact), shape([-(2**40)], 1)(artifact)],
    "a frequency more": table(0, 3, 1),
    "a frequency less": table(1, 0, -1),
    "a table too many": put("tables", lambda tables: torch.cat([tables, tables[:1]])),
    "shorter tables": put("tables", lambda tables: tables[:, :255].clone()),
    "tables whose sum wraps": put(
        "tables",
        torch.cat(
            [  # regression: four times 2**62 is 0 in int64
                torch.tensor([2**62] * 4 + [0] * 251 + [2**14])[None],
                torch.zeros(2, 256, dtype=torch.int64) + 2**14 * (torch.arange(256) == 0),
            ]
        ),
    ),
    "tables by stride 0": put("tables", claims(10**7, 256, dtype=torch.int16)),
    "all tables alike": put("tables", torch.full((3, 256), 64, dtype=torch.int16)),
    "a byte less": put("stream", lambda stream: stream[:-1].clone()),
    "a word less": put("stream", lambda stream: stream[:-2].clone()),
    "a word more": put("stream", lambda stream: torch.cat([stream, stream[:2]])),
    "no stream": put("stream", torch.empty(0, dtype=torch.uint8)),
    "words swapped": put("stream", lambda stream: torch.cat([stream[:4], stream[4:].flip(0)])),
    "a stream by stride 0": put("stream", claims(10**12, dtype=torch.uint8)),
    "a scale more": inside("scales", lambda scales: torch.cat([scales, scales[:1]])),
    "scales gone": lambda artifact: artifact["scales"].popitem(),
    "infinite scale": inside("scales", lambda scales: scales * float("inf")),
    "scales by stride 0": inside("scales", claims(10**12, dtype=torch.float16)),
    "kept by stride 0": inside("passthrough", claims(10**12, dtype=torch.float16)),
    "kept on no device": inside("passthrough", lambda kept: kept.to("meta")),
    "a sparse stream": put("stream", lambda stream: stream.to_sparse()),
    "of another format": put("__quant_format__", "int8_clean_per_row_v1"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_what_was_tampered_with_is_refused_although_its_checksum_holds(name, monkeypatch):
    monkeypatch.setattr(coder, "MOST_TENSORS", 100)  # instead of thousands, which take a while to write
    artifact = copy_of(tiny_artifact()[1])
    read(artifact)
    TAMPERED[name](artifact)
    with pytest.raises(UserError, match="^[^\n]*the file[^\n]*$"):
        read(artifact)


def test_claims_are_checked_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(coder, "MOST_TENSORS", 100)
    artifact = tiny_artifact()[1]
    monkeypatch.setattr(coder, "rans_decode", lambda *args: pytest.fail("too late"))
    changes = ("terabytes", "beyond the limit", "beyond int64", "terabytes in int32", "terabytes in tensors")
    for change in (*changes, "tables by stride 0", "thousands of matrices"):
        changed = copy_of(artifact)
        TAMPERED[change](changed)
        with pytest.raises(UserError):
            read(changed)
