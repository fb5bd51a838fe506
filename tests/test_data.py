"""Data: the shard format, the stream across shards, the order that every number of ranks and micro-steps shares."""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import Config, TokenStream, TrainLoader, UserError, open_shard, to_device

CHECKED = settings(database=None, deadline=None, derandomize=True)  # the same examples on every machine
MAGIC = 20240520


def raw_shard(magic=MAGIC, version=1, count=None, tokens=(1, 2, 3)):
    numbers = [magic, version, len(tokens) if count is None else count] + [0] * 253
    header = b"".join(number.to_bytes(4, "little", signed=True) for number in numbers)
    return header + b"".join(token.to_bytes(2, "little") for token in tokens)


def write_split(folder, lengths, split="train", low=0, high=50_000, seed=0):
    """Shards of random tokens; the whole as a list."""
    rng = random.Random(seed)
    shards = [[rng.randrange(low, high) for _ in range(length)] for length in lengths]
    for number, shard in enumerate(shards):
        write_shard(folder / f"fineweb_{split}_{number:06d}.bin", shard)
    return list(itertools.chain(*shards))


# One shard


def test_shard_by_the_letter_of_the_format(tmp_path):
    path = tmp_path / "shard.bin"
    path.write_bytes(raw_shard(tokens=(0x0201, 0, 65535)))
    assert path.read_bytes()[1024:] == b"\x01\x02\x00\x00\xff\xff"
    assert open_shard(path).tolist() == [0x0201, 0, 65535] and open_shard(path).dtype == np.uint16


@pytest.mark.parametrize("data, said", [
    (b"", "0 bytes"), (raw_shard()[:1023], "1023 bytes"), (raw_shard(magic=20240521), "magic 20240521"),
    (raw_shard(magic=-1), "magic -1"), (raw_shard(version=2), "version 2"), (raw_shard(version=0), "version 0"),
    (raw_shard()[:-1], "1029 bytes"), (raw_shard()[:-2], "1028 bytes"), (raw_shard(count=2), "1030 bytes"),
    (raw_shard(count=4), "4 tokens"), (raw_shard() + b"\0", "1031 bytes"), (raw_shard(tokens=()), "0 tokens"),
    (raw_shard(count=-3), "-3 tokens"), (raw_shard(count=0), "0 tokens"),
])  # fmt: skip
def test_damaged_shard(tmp_path, data, said):
    write_split(tmp_path, [5, 5])
    path = tmp_path / "fineweb_train_000002.bin"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        TokenStream(str(tmp_path), "train", 65536)
    message = str(caught.value)
    assert f"shard {path}" in message and said in message and "make or fetch it again" in message


# The shards of a folder


def test_side_files_are_not_data(tmp_path):
    expected = write_split(tmp_path, [4, 5], "val")
    write_split(tmp_path, [7], "train", seed=1)
    for name in ("fineweb_val_000000_old.bin", "fineweb_val_000002.bin.bak", "fineweb_val_.bin", "manifest.json",
                 "my_fineweb_val_000002.bin", "fineweb_valid_000002.bin", "fineweb_val_000002.BIN",
                 "fineweb_val_2a.bin"):  # fmt: skip
        (tmp_path / name).write_bytes(raw_shard(tokens=(9, 9, 9)))
    stream = TokenStream(str(tmp_path), "val", 65536)
    assert len(stream) == 9 and stream.read(0, 9).tolist() == expected


def test_shards_are_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 8, 11):
        write_shard(tmp_path / f"fineweb_train_{number}.bin", [number])
    assert TokenStream(str(tmp_path), "train", 100).read(0, 4).tolist() == [8, 9, 10, 11]


def test_missing_shard_in_the_middle(tmp_path):
    write_split(tmp_path, [3] * 6)
    (tmp_path / "fineweb_train_000003.bin").unlink()
    (tmp_path / "fineweb_train_000000.bin").unlink()  # published sets may begin at 1
    with pytest.raises(UserError, match=r"shard number \[?3\b.*fetch it again"):
        TokenStream(str(tmp_path), "train", 65536)
    write_shard(tmp_path / "fineweb_train_000003.bin", [1])
    assert len(TokenStream(str(tmp_path), "train", 65536)) == 3 * 4 + 1


def test_validation_text_must_have_its_beginning(tmp_path):
    """Training may begin anywhere; a validation text without its first shard is another text."""
    for split in ("train", "val"):
        write_shard(tmp_path / f"fineweb_{split}_000003.bin", [1, 2])
    assert len(TokenStream(str(tmp_path), "train", 100)) == 2
    with pytest.raises(UserError, match="shard number 0 is missing"):
        TokenStream(str(tmp_path), "val", 100)


def test_two_files_with_the_same_number(tmp_path):
    """Neither may be dropped in silence: which of the two is the validation text?"""
    write_shard(tmp_path / "fineweb_val_000000.bin", [1, 2])
    write_shard(tmp_path / "fineweb_val_0.bin", [3, 4, 5])
    with pytest.raises(UserError, match="fineweb_val"):
        TokenStream(str(tmp_path), "val", 65536)


def test_no_data(tmp_path):
    with pytest.raises(UserError) as no_folder:
        TokenStream(str(tmp_path / "missing"), "train", 65536)
    write_split(tmp_path, [3], "train")
    with pytest.raises(UserError) as no_shard:
        TokenStream(str(tmp_path), "val", 65536)
    assert "fineweb_val_" in str(no_shard.value)
    for caught in (no_folder, no_shard):
        assert f"DATA_PATH={tmp_path}" in str(caught.value)
        assert "python data/prepare_shakespeare.py\n" in str(caught.value)
        assert "python train_gpt.py records/recipes/demo_cpu.env" in str(caught.value)


# Reading


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    tokens = write_split(folder, [7, 1, 12, 3], high=65536)
    return TokenStream(str(folder), "train", 65536), tokens


@CHECKED
@given(start=st.integers(0, 100), count=st.integers(1, 120))
def test_read_against_a_list(stream, start, count):
    stream, tokens = stream
    assert len(stream) == len(tokens) == 23
    assert stream.read(start, count).tolist() == [tokens[i % 23] for i in range(start, start + count)]


def test_read_everywhere(stream):
    stream, tokens = stream
    for start, count in itertools.product(range(23), range(1, 24)):
        assert stream.read(start, count).tolist() == (tokens * 2)[start : start + count]


def test_token_outside_the_vocabulary(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", [1, 2, 319])
    write_shard(tmp_path / "fineweb_train_000001.bin", [1, 320, 2])
    stream = TokenStream(str(tmp_path), "train", 320)
    assert stream.read(5, 5).tolist() == [2, 1, 2, 319, 1]
    for start, count in [(4, 1), (0, 5), (0, 60), (27, 2)]:
        with pytest.raises(UserError, match=r"fineweb_train_.*token 320 .*VOCAB_SIZE=320.*TOKENIZER_PATH"):
            stream.read(start, count)
    assert TokenStream(str(tmp_path), "train", 321).read(4, 1).tolist() == [320]


# On its way to the device


def test_to_device_keeps_every_uint16():
    values = torch.arange(65536)
    moved = to_device(values.numpy().astype("<u2"), torch.device("cpu"))
    assert moved.dtype == torch.int64 and torch.equal(moved, values)


# The order of the data


def loaders_of(stream, T, sequences, world_size, accum_steps):
    config = Config(train_seq_len=T, train_batch_tokens=T * sequences)
    ranks = [SimpleNamespace(rank=r, world_size=world_size, device=torch.device("cpu")) for r in range(world_size)]
    return [TrainLoader(stream, config, rank, accum_steps) for rank in ranks]


def step_of(loaders) -> list[tuple[list[int], list[int]]]:
    """(input, target) of all sequences of a step: rank by rank, micro-step by micro-step, row by row."""
    sequences = []
    for loader in loaders:
        inputs, targets = loader.next_step()
        assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape
        assert inputs.shape[0] == loader.accum_steps and inputs.shape[2] == loader.length
        sequences += zip(inputs.flatten(0, 1).tolist(), targets.flatten(0, 1).tolist(), strict=True)
    return sequences


def expected_step(tokens, p, T, sequences):
    """The designed order: from position p, sequence i is tokens[p + i*T : p + i*T + T + 1], and the stream wraps."""
    windows = [[tokens[(p + i * T + t) % len(tokens)] for t in range(T + 1)] for i in range(sequences)]
    return [(window[:-1], window[1:]) for window in windows]


@pytest.mark.parametrize("world_size, accum_steps", [(1, 1), (1, 2), (1, 12), (2, 1), (2, 3), (3, 4), (4, 1), (12, 1)])
@pytest.mark.parametrize("lengths", [[500], [61, 1, 200, 47], [29]])  # the last is shorter than a step
def test_ranks_and_micro_steps_share_one_order(tmp_path, lengths, world_size, accum_steps):
    tokens, T, sequences = write_split(tmp_path, lengths), 5, 12
    loaders = loaders_of(TokenStream(str(tmp_path), "train", 65536), T, sequences, world_size, accum_steps)
    for step in range(12):  # 720 tokens: around every stream at least once
        assert step_of(loaders) == expected_step(tokens, step * T * sequences, T, sequences), step
    assert {loader.position for loader in loaders} == {12 * T * sequences % len(tokens)}


def test_position_resumes_the_same_batches(tmp_path):
    write_split(tmp_path, [61, 46])
    stream = TokenStream(str(tmp_path), "train", 65536)
    first = loaders_of(stream, 5, 4, 2, 1)
    steps, positions = [], []
    for _ in range(9):
        positions.append(first[0].position)
        steps.append(step_of(first))
    assert len(set(positions)) == 9
    for at in (0, 3, 7):
        for resumed in (loaders_of(stream, 5, 4, 2, 1), loaders_of(stream, 5, 4, 1, 2), first):  # other ranks, too
            for loader in resumed:
                loader.seek(positions[at])
            assert [step_of(resumed) for _ in range(9 - at)] == steps[at:]


def test_a_bad_token_read_ahead_is_reported(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", [1] * 20)
    write_shard(tmp_path / "fineweb_train_000001.bin", [99] * 20)
    (loader,) = loaders_of(TokenStream(str(tmp_path), "train", 50), 5, 2, 1, 1)
    loader.next_step()
    with pytest.raises(UserError, match="token 99"):  # position 10 to 20, and the target at 20
        loader.next_step()
