"""Every bench runs: at the smallest size that says anything about the code, and nothing about speed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import models
import pytest
from conftest import make_documents

import train_gpt

BENCH = Path(__file__).resolve().parent / "bench"
SMALL = {"DEVICE": "cpu", "COMPILE": "0", "PAIRS": "1", "STEPS": "1", "NUM_LAYERS": "1", "MODEL_DIM": "32",
         "NUM_HEADS": "2", "NUM_KV_HEADS": "1", "TRAIN_SEQ_LEN": "32", "TRAIN_BATCH_TOKENS": "64"}  # fmt: skip


@pytest.fixture
def bench(tmp_path):
    """Function: what a bench prints, given its arguments and the environment's variables."""

    def run(name, *arguments, **variables):
        environ = {k: v for k, v in os.environ.items() if k not in train_gpt.Config.knobs()} | variables
        environ["TMPDIR"] = str(tmp_path)
        command = [sys.executable, str(BENCH / name), *map(str, arguments)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_a_step_beside_a_plain_one(bench):
    """Also with a fraction of a channel in MLP_MULT, which is a number with a point."""
    found = bench("step.py", **SMALL, MLP_MULT="1.3", VOCAB_SIZE="40")
    for line in ("ours, tokens/s", "plain, tokens/s", "ours over plain, speed"):
        assert re.search(rf"^{line} +[0-9.]+ \([0-9.]+ to [0-9.]+\)$", found, re.MULTILINE), found


def test_what_a_checkpoint_costs(bench, tmp_path):
    found = bench("checkpoint.py", **SMALL | {"LOG_DIR": str(tmp_path), "VOCAB_SIZE": "40"})
    assert re.search("^a checkpoint costs, s ", found, re.MULTILINE), found


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="it asks the system for the memory of its processes")
def test_the_speed_of_the_data_tool(bench, corpus, tmp_path):
    source = write_texts(tmp_path / "a.jsonl", 60)
    found = bench("tokenize_speed.py", source, "--pairs", 1, "--model", corpus / "tok.model")
    assert re.search(r"^ratio: median [0-9.]+, least [0-9.]+, n = 1$", found, re.MULTILINE), found
    assert "the same shards with one thread: True" in found


def test_what_case_marks_gain(bench, tmp_path):
    sources = write_texts(tmp_path / "train.jsonl", 60), write_texts(tmp_path / "val.jsonl", 5)
    found = bench("case_marks_gain.py", *sources, "--out", tmp_path / "out", "--pieces", 300, "--megabytes", 0.002,
                  "--batch", 64, "--seeds", 1, **SMALL | {"WARMUP_STEPS": "0"})  # fmt: skip
    scored = re.findall(r"^(?:none|before|after): \d+ steps, ([\d,]+) bytes scored", found, re.MULTILINE)
    assert len(scored) == 3 and len(set(scored)) == 1, "the same text, whatever the marks"
    assert re.search(r"^before - none: [+-][0-9.]+ bits per byte", found, re.MULTILINE), found


def write_texts(path: Path, count: int) -> Path:
    texts = [text.title() for text in make_documents(count, seed=len(path.name))]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_the_coders_on_random_weights_and_on_those_of_a_run(bench, tmp_path):
    found = bench("export.py", "--gaussian", "1.2e6", PAIRS="1")
    assert re.search(r"^artifact: \d+ bytes; the size law says", found, re.MULTILINE), found
    state = train_gpt.GPT(train_gpt.Config(num_layers=1, vocab_size=300)).state_dict()
    (tmp_path / "model.pt").write_bytes(models.torch_bytes(state))
    found = bench("export.py", "--model", tmp_path / "model.pt", PAIRS="1", NUM_LAYERS="1", VOCAB_SIZE="300")
    assert re.search("^rANS ", found, re.MULTILINE), found


def test_what_gptq_saves(bench, corpus, tmp_path):
    """At a width of 256, since smaller matrices are not quantised."""
    shape = SMALL | {"MODEL_DIM": "256", "VOCAB_SIZE": (corpus / "vocab_size").read_text()}
    config = train_gpt.Config.load([], shape)
    (tmp_path / "model.pt").write_bytes(models.torch_bytes(train_gpt.GPT(config).state_dict()))
    knobs = {name: text for name, text in shape.items() if name in config.knobs()}
    knobs |= {"DATA_PATH": str(corpus / "data"), "TOKENIZER_PATH": str(corpus / "tok.model")}
    (tmp_path / "config.env").write_text("".join(f"{name}={text}\n" for name, text in knobs.items()))
    found = bench("gptq.py", tmp_path / "config.env", tmp_path / "model.pt", GPTQ_BATCHES="1", VAL_TOKENS_LIMIT="200")
    assert re.findall(r"^ +(\d) ", found, re.MULTILINE) == ["4", "5", "6", "7", "8"], found
