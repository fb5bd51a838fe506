"""Ranks: any number of processes trains and scores as one does, with accumulation, clipping and uneven validation."""

import json
import re
from pathlib import Path

import pytest
import torch

import train_gpt

# 12 sequences a step; 7 validation windows, which neither 2 nor 3 ranks share evenly, the last of them ragged.
COMMON = {"ITERATIONS": 10, "TRAIN_LOG_EVERY": 1, "TRAIN_BATCH_TOKENS": 384, "WARMUP_STEPS": 1, "VAL_LOSS_EVERY": 5,
          "VAL_TOKENS_LIMIT": 6 * 32 + 5, "VAL_BATCH_SIZE": 64, "NUM_LAYERS": 3}  # fmt: skip


def read_run(settings):
    path = Path(settings["LOG_DIR"]) / "run"
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return metrics, json.loads((path / "result.json").read_text()), path


@pytest.fixture
def alone(tiny, monkeypatch, tmp_path):
    """Function: the same run in this one process; (metrics, result, run folder)."""

    def start(**overrides):
        settings = tiny(**overrides, LOG_DIR=tmp_path / "alone")
        for name in train_gpt.KNOBS:
            monkeypatch.delenv(name, raising=False)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        assert train_gpt.main([]) == 0
        return read_run(settings)

    yield start
    for switch in ("flash", "cudnn", "mem_efficient", "math"):  # a run pins torch's global attention switches
        getattr(torch.backends.cuda, f"enable_{switch}_sdp")(True)


@pytest.mark.parametrize("ranks, settings", [
    (2, {"GRAD_CLIP_NORM": 0.5, "GRAD_ACCUM_STEPS": 3}),
    (3, {"EVAL_STRIDE": 20}),
])  # fmt: skip
def test_ranks_train_and_score_as_one_process(tiny, launch, alone, ranks, settings):
    done = launch(ranks=ranks, **COMMON, **settings)
    assert done.returncode == 0, done.stderr
    metrics, result, path = read_run(tiny())
    expected_metrics, expected, _ = alone(**COMMON | settings | {"GRAD_ACCUM_STEPS": 0})
    losses, expected_losses = ([m["train_loss"] for m in lines if "train_loss" in m]
                               for lines in (metrics, expected_metrics))  # fmt: skip
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.5
    assert losses == pytest.approx(expected_losses, abs=1e-4)
    for name in ("val_loss", "val_bpb", "pre_quant_val_loss", "pre_quant_val_bpb"):
        assert result[name] == pytest.approx(expected[name], abs=1e-4), name
    for name in ("scored_tokens", "scored_bytes", "train_tokens", "steps", "model_params"):
        assert result[name] == expected[name], name
    assert result["world_size"] == ranks and expected["world_size"] == 1
    # Only rank 0 speaks: every step once, on the screen and in the log.
    for text in (done.stdout, (path / "train.log").read_text()):
        assert re.findall(r"^step:(\d+)/10 train_loss", text, re.MULTILINE) == [str(step) for step in range(1, 11)]
        assert f"\nworld_size:{ranks} grad_accum_steps:{settings.get('GRAD_ACCUM_STEPS', 1)}\n" in text


def test_a_single_layer_without_skips_trains_on_two_ranks(tiny, launch):
    """Its skip_weights are empty and get no gradient: the reduction over ranks must not wait for one."""
    done = launch(ranks=2, NUM_LAYERS=1, ITERATIONS=3, VAL_TOKENS_LIMIT=50)
    assert done.returncode == 0, done.stderr
    losses = [m["train_loss"] for m in read_run(tiny())[0] if "train_loss" in m]
    assert len(losses) == 3 and losses[2] < losses[0]


def test_an_error_of_rank_0_alone_ends_the_run(launch, tmp_path):
    """The other rank waits in a collective for it, and must not keep it waiting in turn."""
    (tmp_path / "logs" / "run").mkdir(parents=True)
    done = launch(ranks=2, timeout=120)
    assert done.returncode == 1, "torchrun's own code"
    assert done.stderr.count("error: ") == 1 and "is no run folder" in done.stderr
    assert not list((tmp_path / "logs" / "run").iterdir())
