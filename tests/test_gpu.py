"""Tests that need a CUDA device: compiled against eager at the size of a real micro-batch, the attention kernels,
fp32 masters, memory, the clock, two processes on one device."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from models import build_trainer, new_model
from runs import read_run

import train_gpt

kernels = train_gpt.tool("kernels")

CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CAPABLE, reason="needs a CUDA device with bf16 and flash")]

# Head width 64, as in the reference: every kernel supports it.
SHAPE = {
    "DEVICE": "cuda",
    "DTYPE": "bfloat16",
    "MODEL_DIM": 256,
    "NUM_HEADS": 4,
    "NUM_KV_HEADS": 2,
    "TRAIN_SEQ_LEN": 256,
    "TRAIN_BATCH_TOKENS": 2048,
    "VAL_BATCH_SIZE": 2048,
}
# A real-size micro-batch: from 4,096 rows on, inductor writes different kernels for a sum over the rows, which computes
# the gradient of every vector. It fuses them with the preceding operations, and they add in a different order.
REAL = {
    "DEVICE": "cuda",
    "DTYPE": "bfloat16",
    "VOCAB_SIZE": 1024,
    "NUM_LAYERS": 4,
    "MODEL_DIM": 512,
    "NUM_HEADS": 8,
    "NUM_KV_HEADS": 4,
    "TRAIN_SEQ_LEN": 2048,
    "TRAIN_BATCH_TOKENS": 16_384,
    "MICRO_BATCH_TOKENS": 16_384,
    "GRAD_ACCUM_STEPS": 0,
}


@pytest.fixture
def on_device(make_config):
    """Function: (config, runtime) of one process on the first GPU, with knob overrides."""

    def start(**overrides):
        config = make_config(**SHAPE | overrides)
        return config, train_gpt.Runtime(config, {})

    return start


def scatter(model):
    """Randomize every parameter: at the initial values half of the model multiplies by zero or by one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p.device, p.dtype))
    return model


def losses_and_gradients(forward, model, config):
    """Losses and gradients of all sequences of a step at once."""
    shape = config.train_batch_tokens // config.train_seq_len, config.train_seq_len + 1
    tokens = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).cuda()
    model.zero_grad()
    losses = forward(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    losses.mean().backward()
    return losses.detach(), {name: p.grad.float().clone() for name, p in model.named_parameters()}


def assert_close_in_bf16(one, other):
    assert one[0].dtype == other[0].dtype == torch.float32
    assert float(one[0].mean()) == pytest.approx(float(other[0].mean()), abs=0.01)
    assert (one[0] - other[0]).abs().max() < 0.2
    for name, grad in one[1].items():
        assert torch.nn.functional.cosine_similarity(grad.flatten(), other[1][name].flatten(), dim=0) > 0.99, name


def test_auto_chooses_the_attention_of_the_chip(on_device):
    config, runtime = on_device()
    expected = {"flash"}
    if torch.cuda.get_device_capability()[0] in (9, 10):  # FlashAttention 3 if it is installed and works here
        expected = {"cudnn", "flash3"} if importlib.util.find_spec("flash_attn_interface") else {"cudnn"}
    attend, note = kernels.choose_attention(config, runtime, compiled=True)
    assert re.match(r"attention:(\w+) by (grouped|flash3)_attention", note)[1] in expected, note


def test_every_attention_backend_that_runs_agrees_with_our_own(on_device):
    config, runtime = on_device()
    expected = scatter(new_model(config, kernels.blocked_attention, torch.bfloat16).cuda())
    expected = losses_and_gradients(expected, expected, config)
    tried = []
    for name in ("flash3", "flash", "cudnn", "efficient", "math"):
        config, runtime = on_device(ATTENTION=name)
        try:
            attend, _ = kernels.choose_attention(config, runtime, compiled=False)
        except train_gpt.UserError:
            continue  # cuDNN and the others depend on the chip and the build; flash must be available (see above)
        model = scatter(new_model(config, attend, torch.bfloat16).cuda())
        assert_close_in_bf16(losses_and_gradients(model, model, config), expected)
        tried.append(name)
    assert {"flash", "math"} <= set(tried)


@pytest.mark.parametrize("knobs", [{}, {"TIE_EMBEDDINGS": 0, "MLP_MULT": 2.5}], ids=["default", "untied"])
def test_compiled_equals_eager_at_a_real_size(on_device, knobs):
    config, runtime = on_device(**REAL | knobs)
    attend, _ = kernels.choose_attention(config, runtime, compiled=True)
    model = scatter(new_model(config, attend, torch.bfloat16).cuda())
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=False, fullgraph=True)
    eager = losses_and_gradients(model, model, config)
    assert_close_in_bf16(losses_and_gradients(compiled, model, config), eager)


def test_every_master_is_fp32_and_a_compiled_model_learns(on_device):
    """Including the embedding's: in bf16 late updates of less than half a unit in the last place would be lost."""
    config, runtime = on_device(COMPILE=1, GRAD_ACCUM_STEPS=1)
    trainer = build_trainer(config, runtime)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert {p.device.type for p in trainer.model.parameters()} == {"cuda"}
    losses = [float(trainer.step(1.0, 0.9)["train_loss"]) for _ in range(10)]
    assert losses[-1] < losses[0] - 0.5, "it learns"
    moments = [
        value
        for optimizer in trainer.optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    assert {value.dtype for value in moments} == {torch.float32}


def test_the_host_never_waits_for_the_device_in_a_step(on_device):
    """After the first steps, which compile and choose kernels."""
    config, runtime = on_device(GRAD_CLIP_NORM=0.3, EMA_DECAY=0.9, GRAD_ACCUM_STEPS=2)
    trainer = build_trainer(config, runtime)
    for mode in ("default", "default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            metrics = trainer.step(1.0, 0.9)
            torch._foreach_lerp_(trainer.average, [p.detach().float() for p in trainer.model.parameters()], 0.1)
            trainer.queue_metrics(metrics)  # into pinned memory
        finally:
            torch.cuda.set_sync_debug_mode("default")
    values = trainer.queue[-1][3]
    assert values.is_pinned() and not values.is_cuda


def test_a_capped_compiled_run_ends_before_its_cap_and_its_artifact_scores_the_same_on_the_cpu(tiny, launch, runtime):
    settings = SHAPE | {
        "COMPILE": 1,
        "MAX_WALLCLOCK_SECONDS": 5,
        "ITERATIONS": 1_000_000,
        "WARMUP_STEPS": 3,
        "VAL_LOSS_EVERY": 100_000,
    }
    done = launch(**settings)
    assert done.returncode == 0, done.stderr
    run = read_run(Path(tiny()["LOG_DIR"]) / "run")
    result, log = run.result, run.log
    assert result["seconds"]["training"] <= 5 and len(run.losses) == result["steps"] > 10
    assert f"step:{result['steps']}/1000000" in re.search("^stopping_early: wallclock_cap .*$", log, re.MULTILINE)[0]
    peak, reserved = re.search(r"^peak memory allocated: (\d+) MiB reserved: (\d+) MiB$", log, re.MULTILINE).groups()
    assert 0 < int(peak) <= int(reserved)
    assert result["val_bpb"] == pytest.approx(result["pre_quant_val_bpb"], rel=0.02)
    config = train_gpt.Config.load([], tiny(**settings))
    model = new_model(config, kernels.blocked_attention)  # float32 on the CPU
    blob = (Path(tiny()["LOG_DIR"]) / "run" / "final_model.int8.ptz").read_bytes()
    model.load_state_dict(train_gpt.Coder(config).decode(blob))
    stream = train_gpt.TokenStream(config.data_path, "val", config.vocab_size)
    token_bytes = train_gpt.TokenBytes(config.tokenizer_path, config.vocab_size, config.vocab_padding)
    score = train_gpt.Evaluator(stream, token_bytes, config, runtime).score(model, model)
    assert (score.tokens, score.bytes) == (result["scored_tokens"], result["scored_bytes"])
    assert score.bpb == pytest.approx(result["val_bpb"], rel=0.01)


def test_two_processes_on_one_device_equal_one(tiny, launch, tmp_path):
    settings = SHAPE | {
        "DTYPE": "float32",
        "COMPILE": 0,
        "ITERATIONS": 10,
        "CUDA_VISIBLE_DEVICES": 0,
        "GRAD_CLIP_NORM": 0.5,
    }
    runs = []
    for ranks in (1, 2):
        folder = tmp_path / f"ranks{ranks}"
        done = launch(ranks=ranks, **settings, LOG_DIR=folder)
        assert done.returncode == 0, done.stderr
        runs.append(read_run(folder / "run"))
    one, two = runs
    assert (one.result["world_size"], two.result["world_size"]) == (1, 2)
    assert len(one.losses) == 10 and two.losses == pytest.approx(one.losses, abs=1e-3)
    assert two.result["val_bpb"] == pytest.approx(one.result["val_bpb"], abs=1e-3)
    assert two.result["scored_bytes"] == one.result["scored_bytes"]
