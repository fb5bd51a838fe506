"""What users get wrong, through main(): exit code 2, one message that helps, no traceback, nothing left behind."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_shard

import train_gpt


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """What a run leaves in the current folder shows, too."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(corpus, tmp_path):
    """A copy of the shards, to damage."""
    return shutil.copytree(corpus / "data", tmp_path / "data")


def files(path: Path) -> dict:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


@pytest.fixture
def refuse(tiny, tmp_path, monkeypatch, capfd):
    """Function: the message with which main() refuses this environment, after all that must hold of it."""

    def run(*args, **overrides) -> str:
        for name in (train_gpt.KNOBS.keys() | {"RANK", "WORLD_SIZE", "LOCAL_RANK"}) & os.environ.keys():
            monkeypatch.delenv(name)
        for name, value in tiny(**overrides).items():
            monkeypatch.setenv(name, value)
        before = files(tmp_path)
        assert train_gpt.main([str(arg) for arg in args]) == 2
        assert files(tmp_path) == before
        return the_message(*capfd.readouterr())

    return run


def the_message(out: str, err: str) -> str:
    assert "Traceback" not in out + err and "error:" not in out
    assert err.startswith("error: ") and err.count("error:") == 1
    return err


def assert_shows_the_two_commands(message: str):
    assert "\n  python data/prepare_shakespeare.py\n  python train_gpt.py records/recipes/demo_cpu.env\n" in message


# Data


def test_missing_data_folder(refuse, tmp_path):
    message = refuse(DATA_PATH=tmp_path / "nowhere")
    assert f"DATA_PATH={tmp_path / 'nowhere'}" in message
    assert_shows_the_two_commands(message)


def test_data_folder_without_shards(refuse, data):
    (data / "fineweb_val_000000.bin").unlink()
    message = refuse(DATA_PATH=data)
    assert f"DATA_PATH={data} holds no fineweb_val_" in message
    assert_shows_the_two_commands(message)


@pytest.mark.parametrize("name", ["fineweb_train_000001.bin", "fineweb_val_000000.bin"])
def test_shard_cut_short(refuse, data, name):
    path = data / name
    path.write_bytes(path.read_bytes()[:-1])
    message = refuse(DATA_PATH=data)
    assert f"shard {path}" in message and f"{path.stat().st_size} bytes" in message and "fetch it again" in message


def test_wrong_magic(refuse, data):
    path = data / "fineweb_train_000000.bin"
    path.write_bytes(b"\x01\x02\x03\x04" + path.read_bytes()[4:])
    message = refuse(DATA_PATH=data)
    assert f"shard {path} has magic 67305985" in message and "expected 20240520" in message


@pytest.mark.parametrize("name", ["fineweb_train_000000.bin", "fineweb_val_000000.bin"])
def test_token_over_the_vocabulary(refuse, data, tiny, name):
    size = int(tiny()["VOCAB_SIZE"])
    tokens = np.fromfile(data / name, dtype="<u2", offset=1024)
    tokens[len(tokens) // 2] = size
    write_shard(data / name, tokens)
    message = refuse(DATA_PATH=data)
    assert f"token {size} is outside VOCAB_SIZE={size}" in message and name[:-10] in message


def test_data_that_differs_from_its_manifest(refuse, data):
    (data / "manifest.json").write_text('{"splits": {"val": {"bytes": 12345}}}')
    message = refuse(DATA_PATH=data)
    assert "manifest.json states 12345" in message and "fineweb_val" in message


def test_validation_text_without_a_target(refuse, data):
    write_shard(data / "fineweb_val_000000.bin", [1])
    assert "fineweb_val_*.bin holds 1 tokens: 2 are needed" in refuse(DATA_PATH=data)


# Tokenizer


def test_tokenizer_of_another_size(refuse, corpus, tiny):
    message = refuse(VOCAB_SIZE=1024)
    assert f"VOCAB_SIZE=1024, but TOKENIZER_PATH={corpus / 'tok.model'}" in message
    assert f"set VOCAB_SIZE={tiny()['VOCAB_SIZE']}" in message


def test_tokenizer_that_is_none(refuse, data):
    message = refuse(TOKENIZER_PATH=data / "fineweb_val_000000.bin")
    assert "is no SentencePiece model" in message
    message = refuse(TOKENIZER_PATH=data / "missing.model")
    assert f"TOKENIZER_PATH={data / 'missing.model'} does not exist" in message
    assert_shows_the_two_commands(message)


def test_tokenizer_of_other_shards(refuse, data, tiny):
    """Right size, wrong text: only the audit can tell."""
    write_shard(data / "fineweb_val_000000.bin", list(reversed(range(int(tiny()["VOCAB_SIZE"])))))
    assert "use the tokenizer of the shards" in refuse(DATA_PATH=data)


# Configuration


@pytest.mark.parametrize("knob, value, said", [
    ("NUM_HEADS", "7", "MODEL_DIM=32"), ("ITERATIONS", "abc", "whole number"), ("MATRIX_LR", "nan", "0.02"),
    ("NUM_KV_HEADS", "3", "[1, 2, 4]"), ("TRAIN_BATCH_TOKENS", "100", "use 128"), ("RUN_ID", "../x", "use letters"),
    ("GRAD_ACCUM_STEPS", "3", "[1, 2, 4, 8]"), ("TIE_EMBEDDINGS", "yes", "0 or 1"), ("DTYPE", "fp16", "bfloat16"),
])  # fmt: skip
def test_bad_value(refuse, knob, value, said):
    message = refuse(**{knob: value})
    assert f"{knob}=" in message and value in message and said in message


def test_device_that_is_not_there(refuse, monkeypatch):
    monkeypatch.setattr(train_gpt.torch.cuda, "is_available", lambda: False)
    assert "use DEVICE=auto" in refuse(DEVICE="cuda")


def test_file_env(refuse, tmp_path):
    path = tmp_path / "run.env"
    assert str(path) in refuse(path)
    path.write_text("SEED=1\nMATRXI_LR=0.03\n")
    message = refuse(path)
    assert str(path) in message and "MATRXI_LR" in message and "did you mean MATRIX_LR?" in message
    path.write_text("SEED=1\nMATRIX_LR 0.03\n")
    assert f"{path}:2" in refuse(path)
    assert "at most one" in refuse(path, path)
    assert "--bogus" in refuse("--bogus")


# The exit code of a real process


def test_exit_code_of_missing_data(launch, tmp_path):
    done = launch(DATA_PATH=tmp_path / "nowhere")
    assert done.returncode == 2
    assert_shows_the_two_commands(the_message(done.stdout, done.stderr))
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("names, said", [
    (("train.log", "result.json"), "is finished"), (("notes.txt",), "is no run folder"), ((), "is no run folder"),
])  # fmt: skip
def test_exit_code_of_a_folder_that_cannot_go_on(launch, tmp_path, names, said):
    """One that is finished, or that no run made. The last thing that can be refused."""
    (tmp_path / "logs" / "run").mkdir(parents=True)
    for name in names:
        (tmp_path / "logs" / "run" / name).write_text("of an earlier run")
    before = files(tmp_path)
    done = launch()
    message = the_message(done.stdout, done.stderr)
    assert done.returncode == 2 and str(tmp_path / "logs" / "run") in message and said in message
    assert "choose another RUN_ID" in message and "checkpoint.pt" not in message, "there is none to go on from"
    assert files(tmp_path) == before
