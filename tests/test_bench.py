"""Every bench runs, at the smallest size that exercises its code; speed is not tested."""

import json
import os
import re
import sys
import time
from pathlib import Path

import models
import pytest
import torch
from conftest import make_documents
from models import new_model
from oracle import scatter

import train_gpt

BENCH = Path(__file__).resolve().parent / "bench"
sys.path.insert(0, str(BENCH))
import plain  # noqa: E402
import speed  # noqa: E402

SHAPE = "NUM_LAYERS=1 MODEL_DIM=32 NUM_HEADS=2 NUM_KV_HEADS=1 TRAIN_SEQ_LEN=32 TRAIN_BATCH_TOKENS=64"
SMALL = speed.parse(f"DEVICE=cpu COMPILE=0 PAIRS=1 STEPS=1 {SHAPE}")


@pytest.fixture
def bench(tmp_path):
    """Function: the output of a bench, given its arguments and knobs."""

    def run(name, *arguments, **knobs):
        done = models.process(knobs, tmp_path, script=BENCH / name, args=arguments, TMPDIR=str(tmp_path))
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.decode()

    return run


def test_speed_in_all_its_parts(bench, tmp_path):
    """Also with an MLP_MULT that gives a fractional number of channels."""
    file = tmp_path / "speed.json"
    found = bench("speed.py", "--pairs", 1, "--json", file, **SMALL, MLP_MULT="1.3", VOCAB_SIZE="40")
    told = json.loads(found.splitlines()[-1].removeprefix("bench_json:"))
    assert json.loads(file.read_text()) == told and told["pairs"] == 1
    for name, figure in told["figures"].items():
        assert figure["n"] == 1 and figure["least"] <= figure["median"] <= figure["most"]
        line = f"^{re.escape(name)} +[0-9.-]+ \\([0-9.-]+ to [0-9.-]+\\) {re.escape(figure['unit'])}$"
        assert re.search(line, found, re.MULTILINE), found
    expected = {"ours over plain, eager", "evaluation by windows over a pure forward", "export, rans: in all"}
    expected |= {f"split: {phase}" for phase in speed.PHASES} | {
        f"growth with {knob}: exponent" for knob in speed.GROWING
    }
    expected |= {"ours over plain, eager: start to first step", "ours over plain, eager: step"}
    assert expected <= told["figures"].keys()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--parts", "step,rest"), "--parts step,rest: expected some of step,split"),
        (("--pairs", "0"), "--pairs 0: expected at least 1"),
    ],
    ids=str,
)
def test_speed_asked_for_what_it_does_not_know(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["speed.py", *arguments])
    with pytest.raises(SystemExit):
        speed.main()
    assert said in capsys.readouterr().err


MODEL = {
    "num_layers": 5,
    "model_dim": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "train_seq_len": 48,
    "vocab_size": 80,
    "train_batch_tokens": 192,
    "dtype": "float32",
    "compile": "0",
}


def both_models(**knobs):
    """(configuration, our model, the plain port, tokens, targets): fp32, the same random weights."""
    config = train_gpt.Config(**MODEL | knobs)
    model = scatter(new_model(config))
    other = plain.PlainTrainer(config, torch.device("cpu"), torch.float32, compiled=False)
    other.raw_model.load_state_dict(model.state_dict())
    shape = (4, config.train_seq_len + 1)
    tokens = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return config, model, other, tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("knobs", [{}, {"tie_embeddings": False}, {"model_file": "frontier"}], ids=str)
def test_speed_compares_with_the_plain_port_only_where_that_is_the_same_model(capsys, knobs):
    config_class = train_gpt.load_model_file(models.FRONTIER) if "model_file" in knobs else train_gpt.Config
    config = config_class(**MODEL | knobs)
    names = [*speed.contenders(config, train_gpt.Runtime(config, {}))]
    assert names == (["ours"] if knobs else ["ours", "plain, eager"])
    assert ("no plain contender" in capsys.readouterr().out) == bool(knobs)


@pytest.mark.parametrize("knobs", [{}, {"num_layers": 2, "num_kv_heads": 4, "mlp_mult": 3.0}], ids=str)
def test_the_plain_port_has_our_losses_and_gradients_and_takes_our_steps(knobs):
    """Equal to fp32 rounding: it is the same computation, implemented differently."""
    config, model, other, tokens, targets = both_models(**knobs)
    ours, theirs = model(tokens, targets).mean(), other.loss(tokens, targets)
    ours.backward(), theirs.backward()
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-6)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, p in other.raw_model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6 * float(gradients[name].abs().max()))
    optimizers = model.optimizers(config, train_gpt.Runtime(config, {}))
    model.zero_grad(), other.raw_model.zero_grad()
    for _ in range(3):
        loss = model(tokens, targets).mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert float(other.step(tokens[None], targets[None])) == pytest.approx(loss.item(), rel=1e-5)


def test_a_step_taken_apart_is_a_step():
    """The phases that speed.py times leave the same weights as Trainer.step, bit for bit."""
    config = train_gpt.Config(**MODEL, grad_accum_steps=2, grad_clip_norm=0.1)
    runtime, states = train_gpt.Runtime(config, {}), []
    for step in (lambda trainer: trainer.step(1.0, 0.95), lambda trainer: speed.split_step(trainer, time.perf_counter)):
        trainer = speed.build_trainer(config, runtime)
        step(trainer), step(trainer)
        states.append(trainer.model.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_what_a_checkpoint_costs(bench, tmp_path):
    found = bench("checkpoint.py", **SMALL | {"LOG_DIR": str(tmp_path), "VOCAB_SIZE": "40"})
    assert re.search("^a checkpoint costs, s ", found, re.MULTILINE), found


def write_texts(path: Path, count: int) -> Path:
    texts = [text.title() for text in make_documents(count, seed=len(path.name))]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="it asks the system for the memory of its processes")
def test_the_speed_of_the_data_tool(bench, corpus, tmp_path):
    source = write_texts(tmp_path / "a.jsonl", 60)
    found = bench("tokenize_speed.py", source, "--pairs", 1, "--model", corpus / "tok.model")
    assert re.search(r"^ratio: median [0-9.]+, least [0-9.]+, n = 1$", found, re.MULTILINE), found
    assert "the same shards with one thread: True" in found


def test_what_case_marks_gain(bench, tmp_path):
    sources = write_texts(tmp_path / "train.jsonl", 60), write_texts(tmp_path / "val.jsonl", 5)
    options = f"--out {tmp_path / 'out'} --pieces 300 --megabytes 0.002 --batch 64 --seeds 1".split()
    found = bench("case_marks_gain.py", *sources, *options, **SMALL, WARMUP_STEPS="0")
    scored = re.findall(r"^(?:none|before|after): \d+ steps, ([\d,]+) bytes scored", found, re.MULTILINE)
    assert len(scored) == 3 and len(set(scored)) == 1, "the same text, whatever the marks"
    assert re.search(r"^before - none: [+-][0-9.]+ bits per byte", found, re.MULTILINE), found


def test_the_coders_on_random_weights_and_on_those_of_a_run(bench, tmp_path):
    found = bench("export.py", "--gaussian", "1.2e6", PAIRS="1")
    assert abs(float(re.search(r"^artifact: \d+ bytes; the size law says \d+, (\S+)%$", found, re.MULTILINE)[1])) < 5
    state = new_model(train_gpt.Config(num_layers=1, vocab_size=300)).state_dict()
    (tmp_path / "model.pt").write_bytes(models.torch_bytes(state))
    found = bench("export.py", "--model", tmp_path / "model.pt", PAIRS="1", NUM_LAYERS="1", VOCAB_SIZE="300")
    assert re.search("^rANS ", found, re.MULTILINE), found


def test_what_gptq_saves(bench, corpus, tmp_path):
    """At a width of 256, since smaller matrices are not quantized."""
    shape = SMALL | {"MODEL_DIM": "256", "VOCAB_SIZE": (corpus / "vocab_size").read_text()}
    config = train_gpt.Config.load([], shape)
    (tmp_path / "model.pt").write_bytes(models.torch_bytes(new_model(config).state_dict()))
    knobs = {name: text for name, text in shape.items() if name in config.knobs()}
    knobs |= {"DATA_PATH": str(corpus / "data"), "TOKENIZER_PATH": str(corpus / "tok.model")}
    (tmp_path / "config.env").write_text("".join(f"{name}={text}\n" for name, text in knobs.items()))
    found = bench("gptq.py", tmp_path / "config.env", tmp_path / "model.pt", GPTQ_BATCHES="1", VAL_TOKENS_LIMIT="200")
    assert re.findall(r"^ +(\d) ", found, re.MULTILINE) == ["4", "5", "6", "7", "8"], found
