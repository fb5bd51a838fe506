"""Data: the shard format, the stream across shards, and the order shared by any number of ranks and micro-steps."""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import shard_bytes, write_shard

from train_gpt import Config, TokenStream, TrainLoader, UserError, open_shard, to_device


def write_split(folder, lengths, split="train", high=50_000, seed=0):
    """Write shards of random tokens. Returns all tokens as a list."""
    rng = random.Random(seed)
    shards = [[rng.randrange(high) for _ in range(length)] for length in lengths]
    for number, shard in enumerate(shards):
        write_shard(folder / f"fineweb_{split}_{number:06d}.bin", shard)
    return list(itertools.chain(*shards))


def open_stream(folder, split="train", vocab_size=65536) -> TokenStream:
    return TokenStream(str(folder), split, vocab_size)


# One shard


def test_shard_by_the_letter_of_the_format(tmp_path):
    header = b"".join(number.to_bytes(4, "little") for number in [20240520, 1, 3] + [0] * 253)
    path = tmp_path / "shard.bin"
    path.write_bytes(header + b"\x01\x02\x00\x00\xff\xff")
    assert open_shard(path).tolist() == [0x0201, 0, 65535] and open_shard(path).dtype == np.uint16
    assert path.read_bytes() == shard_bytes([0x0201, 0, 65535])


WHOLE = shard_bytes([1, 2, 3])
DAMAGED = [
    (b"", "0 bytes"),
    (WHOLE[:1023], "1023 bytes"),
    (shard_bytes([1, 2, 3], magic=20240521), "header [20240521, 1, 3]"),
    (shard_bytes([1, 2, 3], magic=-1), "header [-1, 1, 3]"),
    (shard_bytes([1, 2, 3], version=2), "header [20240520, 2, 3]"),
    (shard_bytes([1, 2, 3], version=0), "header [20240520, 0, 3]"),
    (WHOLE[:-1], "1029 bytes"),
    (WHOLE[:-2], "1028 bytes"),
    (WHOLE + b"\0", "1031 bytes"),
    (shard_bytes([1, 2, 3], count=4), "1030 bytes, header [20240520, 1, 4]"),
    (shard_bytes([1, 2, 3], count=-3), "header [20240520, 1, -3]"),
    (shard_bytes([]), "1024 bytes, header [20240520, 1, 0]"),
]


@pytest.mark.parametrize("data, said", DAMAGED)
def test_damaged_shard(tmp_path, data, said):
    write_split(tmp_path, [5, 5])
    path = tmp_path / "fineweb_train_000002.bin"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        open_stream(tmp_path)
    message = str(caught.value)
    assert f"shard {path}" in message and said in message and "make or fetch it again" in message


# The shards of a folder

SIDE_FILES = ["fineweb_val_000000_old.bin", "fineweb_val_000002.bin.bak", "fineweb_val_.bin", "manifest.json"]
SIDE_FILES += ["my_fineweb_val_000002.bin", "fineweb_valid_000002.bin", "fineweb_val_000002.BIN", "fineweb_val_2a.bin"]


def test_side_files_are_not_data(tmp_path):
    expected = write_split(tmp_path, [4, 5], "val")
    write_split(tmp_path, [7], "train", seed=1)
    for name in SIDE_FILES:
        write_shard(tmp_path / name, [9, 9, 9])
    stream = open_stream(tmp_path, "val")
    assert len(stream) == 9 and stream.read(0, 9).tolist() == expected


def test_shards_are_in_the_order_of_their_numbers_and_none_may_be_missing(tmp_path):
    for number in (10, 9, 8, 11):
        write_shard(tmp_path / f"fineweb_train_{number}.bin", [number])
    assert open_stream(tmp_path).read(0, 4).tolist() == [8, 9, 10, 11]  # published datasets may start at 1
    (tmp_path / "fineweb_train_10.bin").unlink()
    with pytest.raises(UserError, match=r"shard 10 is missing .*: fetch"):
        open_stream(tmp_path)


def test_validation_text_must_have_its_beginning_and_no_shard_twice(tmp_path):
    write_shard(tmp_path / "fineweb_val_000001.bin", [1, 2])
    with pytest.raises(UserError, match="shard 0 is missing"):
        open_stream(tmp_path, "val")
    for name in ("fineweb_val_000000.bin", "fineweb_val_0.bin"):  # ambiguous: either could be the validation text
        write_shard(tmp_path / name, [3, 4, 5])
    with pytest.raises(UserError, match="fineweb_val"):
        open_stream(tmp_path, "val")


def test_no_data(tmp_path):
    write_split(tmp_path, [3], "train")
    for folder, split in ((tmp_path / "missing", "train"), (tmp_path, "val")):
        with pytest.raises(UserError) as caught:
            open_stream(folder, split)
        assert f"DATA_PATH={folder} holds no fineweb_{split}_" in str(caught.value)
        assert "python data/prepare_shakespeare.py\n" in str(caught.value)
        assert "python train_gpt.py records/recipes/demo_cpu.env" in str(caught.value)


# Reading


def test_read_everywhere_against_a_list(tmp_path):
    tokens = write_split(tmp_path, [7, 1, 12, 3], high=65536)
    stream = open_stream(tmp_path)
    assert len(stream) == len(tokens) == 23
    for start, count in itertools.product([*range(24), 100], [*range(1, 24), 120]):
        assert stream.read(start, count).tolist() == [tokens[i % 23] for i in range(start, start + count)]


def test_token_outside_the_vocabulary(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", [1, 2, 319])
    write_shard(tmp_path / "fineweb_train_000001.bin", [1, 320, 2])
    stream = open_stream(tmp_path, vocab_size=320)
    assert stream.read(5, 5).tolist() == [2, 1, 2, 319, 1]
    for start, count in [(4, 1), (0, 5), (0, 60), (27, 2)]:
        with pytest.raises(UserError, match=r"fineweb_train_.*token 320 .*VOCAB_SIZE=320.*TOKENIZER_PATH"):
            stream.read(start, count)
    assert open_stream(tmp_path, vocab_size=321).read(4, 1).tolist() == [320]


def test_to_device_keeps_every_uint16():
    values = torch.arange(65536)
    moved = to_device(values.numpy().astype("<u2"), torch.device("cpu"))
    assert moved.dtype == torch.int64 and torch.equal(moved, values)


# The order of the data


def loaders_of(stream, T, sequences, world_size=1, accum_steps=1, **knobs):
    config = Config(train_seq_len=T, train_batch_tokens=T * sequences, **knobs)
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
    """The specified order: from position p, sequence i is tokens[p + i*T : p + i*T + T + 1], and the stream wraps."""
    windows = [[tokens[(p + i * T + t) % len(tokens)] for t in range(T + 1)] for i in range(sequences)]
    return [(window[:-1], window[1:]) for window in windows]


def write_distinct(folder, lengths):
    """Shards in which token i of the stream is i, so that a sequence shows where it starts."""
    begins = itertools.accumulate(lengths, initial=0)
    for number, (start, length) in enumerate(zip(begins, lengths, strict=False)):
        write_shard(folder / f"fineweb_train_{number:06d}.bin", range(start, start + length))
    return open_stream(folder)


SHARES = pytest.mark.parametrize("world_size, accum_steps", [(1, 1), (1, 12), (2, 1), (2, 3), (3, 4), (12, 1)])


@SHARES
@pytest.mark.parametrize("lengths", [[500], [61, 1, 200, 47], [29]])  # the last one is shorter than a step
def test_ranks_and_micro_steps_share_one_order(tmp_path, lengths, world_size, accum_steps):
    tokens, T, sequences = write_split(tmp_path, lengths), 5, 12
    loaders = loaders_of(open_stream(tmp_path), T, sequences, world_size, accum_steps)
    for step in range(12):  # 720 tokens: around every stream at least once
        assert step_of(loaders) == expected_step(tokens, step * T * sequences, T, sequences), step
    assert {loader.position for loader in loaders} == {12 * T * sequences % len(tokens)}


@SHARES
def test_ranks_and_micro_steps_share_one_shuffled_order(tmp_path, world_size, accum_steps):
    stream = write_distinct(tmp_path, [61, 1, 200, 47])  # about 60 sequences per epoch: five steps
    alone = loaders_of(stream, 5, 12, loader="shuffle")
    shared = loaders_of(stream, 5, 12, world_size, accum_steps, loader="shuffle")
    for step in range(14):
        assert {loader.position for loader in shared} == {alone[0].position} == {step * 60}, "tokens of all steps"
        assert step_of(shared) == step_of(alone), step


@pytest.mark.parametrize("knobs", [{}, {"loader": "shuffle"}])
def test_a_position_alone_resumes_the_same_batches(tmp_path, knobs):
    stream = write_distinct(tmp_path, [61, 1, 200, 47])
    first = loaders_of(stream, 5, 8, 2, 1, **knobs)
    steps, positions = [], []
    for _ in range(20):  # more than two epochs, none of which ends at the end of a step
        positions.append(first[0].position)
        steps.append(step_of(first))
    for at in (0, 3, 7, 8, 15, 19):
        for resumed in (loaders_of(stream, 5, 8, 2, 1, **knobs), first, loaders_of(stream, 5, 8, 1, 4, **knobs)):
            for loader in resumed:
                loader.seek(positions[at])
            assert [step_of(resumed) for _ in range(min(5, 20 - at))] == steps[at : at + 5]


def test_a_bad_token_read_ahead_is_reported(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", [1] * 20)
    write_shard(tmp_path / "fineweb_train_000001.bin", [99] * 20)
    (loader,) = loaders_of(open_stream(tmp_path, vocab_size=50), 5, 2)
    loader.next_step()
    with pytest.raises(UserError, match="token 99"):  # position 10 to 20, and the target at 20
        loader.next_step()
    (loader,) = loaders_of(open_stream(tmp_path, vocab_size=50), 3, 12, loader="shuffle")
    with pytest.raises(UserError, match="token 99.*VOCAB_SIZE"):
        for _ in range(20):
            loader.next_step()


# Shuffled


def starts_of(loaders, T, steps) -> list[list[int]]:
    """Where the sequences of each step start; each must be T + 1 consecutive tokens of the text."""
    starts = []
    for _ in range(steps):
        sequences = step_of(loaders)
        starts.append([inputs[0] for inputs, _ in sequences])
        for inputs, targets in sequences:
            assert inputs == list(range(inputs[0], inputs[0] + T)), "a sequence is text in a row, not around the end"
            assert targets == list(range(inputs[0] + 1, inputs[0] + T + 1))
    return starts


def epochs_of(starts, T) -> list[list[int]]:
    """Split the order where a start repeats or has a different phase: an epoch must have ended there."""
    epochs = [[]]
    for start in starts:
        if start in epochs[-1] or (epochs[-1] and start % T != epochs[-1][0] % T):
            epochs.append([])
        epochs[-1].append(start)
    return epochs


TEXTS = [([500], 5), ([61, 1, 200, 47], 7), ([1000, 24], 16), ([97], 4), ([64], 1), ([40], 7), ([83, 5], 9)]


@pytest.mark.parametrize("lengths, T", TEXTS)
def test_an_epoch_of_shuffled_sequences_has_each_exactly_once(tmp_path, lengths, T):
    stream, total = write_distinct(tmp_path, lengths), sum(lengths)
    steps = 4 * total // (3 * T)
    starts = starts_of(loaders_of(stream, T, 3, loader="shuffle"), T, steps)  # four times through the text
    epochs = epochs_of(itertools.chain(*starts), T)[:-1]  # the last one may be incomplete
    assert len(epochs) >= 3
    for epoch in epochs:
        low, high = min(epoch), max(epoch)
        assert sorted(epoch) == list(range(low, high + 1, T)), "all of one phase, none twice, none left out"
        assert low < T and total - 2 * T <= high + T < total, "from the phase to the end, but for less than two"
        assert epoch != sorted(epoch)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "each epoch has an order of its own"
    assert T <= 4 or len({epoch[0] % T for epoch in epochs}) > 1, "phases differ"
    assert len({len(epoch) for epoch in epochs}) == 1, "so that a position alone tells the epoch"


def test_the_shuffled_order_is_that_of_the_seed(tmp_path):
    stream = write_distinct(tmp_path, [400])
    loaders = [loaders_of(stream, 5, 10, loader="shuffle", seed=seed) for seed in (1, 1, 2, 2**63 - 1)]
    orders = [starts_of(loader, 5, 5) for loader in loaders]
    assert orders[0] == orders[1] and orders[1] != orders[2] and orders[3] not in orders[:3]


@pytest.mark.parametrize("length", [1, 3, 5, 6, 9, 11])
def test_a_text_shorter_than_an_epoch_needs_is_shuffled_around_its_end_or_refused(tmp_path, length):
    tokens = write_split(tmp_path, [length])
    try:
        loaders = loaders_of(open_stream(tmp_path), 5, 4, loader="shuffle")
        sequences = step_of(loaders) + step_of(loaders)
    except UserError as error:
        assert "LOADER" in str(error) or "TRAIN_SEQ_LEN" in str(error)
        return
    around = tokens * 20
    for inputs, targets in sequences:
        assert any(around[i : i + 6] == [*inputs, targets[-1]] for i in range(length)) and inputs[1:] == targets[:-1]
