"""Training: one step against gradients computed by hand, warm-up without side effects, the clock, and what a run logs,
writes and repeats. Runs are made in this process by main()."""

import contextlib
import copy
import hashlib
import io
import itertools
import json
import math
import re
from types import SimpleNamespace

import models
import pytest
import torch
from conftest import ROOT, make_documents
from models import build_trainer
from oracle import scatter
from runs import fake_clock, read_run

import train_gpt
from train_gpt import Evaluator, TokenBytes, TokenStream, Trainer

kernels = train_gpt.tool("kernels")


@pytest.fixture
def go(tiny, call, tmp_path):
    """Function: a run with these knobs that must succeed. Returns the contents of its folder."""

    def start(**knobs):
        assert call(tiny(**knobs))[::2] == (0, "")
        return read_run(tmp_path / "logs" / knobs.get("RUN_ID", "run"))

    return start


@pytest.fixture
def build(runtime):
    """Function: the Trainer of a configuration."""
    return lambda config: build_trainer(config, runtime)


def evaluator_of(config, runtime) -> Evaluator:
    stream = TokenStream(config.data_path, "val", config.vocab_size)
    return Evaluator(stream, TokenBytes(config.tokenizer_path, config.vocab_size), config, runtime)


class Recorder:
    """Stands in for the optimizers and keeps the gradients of a step."""

    param_groups = ()

    def __init__(self, model):
        self.model = model

    def step(self):
        self.grads = {name: p.grad.clone() for name, p in self.model.named_parameters()}

    def zero_grad(self, set_to_none):
        for p in self.model.parameters():
            p.grad = None


@pytest.mark.parametrize(
    "cut, clip",
    [
        ({"GRAD_ACCUM_STEPS": 1}, 0.01),
        ({"GRAD_ACCUM_STEPS": 4}, 0),
        ({"GRAD_ACCUM_STEPS": 4}, 0.01),
        ({"MICRO_BATCH_TOKENS": 64}, 1e6),
    ],
)
def test_a_step_has_the_gradient_of_the_mean_loss_clipped_once_after_accumulation(make_config, build, cut, clip):
    trainer = build(make_config(GRAD_CLIP_NORM=clip, **cut))
    by_hand = copy.deepcopy(scatter(trainer.model))
    trainer.optimizers = [Recorder(trainer.model)]
    for start in (0, 256):  # the second step: nothing is left over from the first
        by_hand.zero_grad()
        tokens = torch.from_numpy(trainer.loader.stream.read(start, 257).astype("int64"))
        expected_loss = by_hand(tokens[:-1].view(8, 32), tokens[1:].view(8, 32)).mean()
        expected_loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in by_hand.parameters()))
        factor = min(1.0, clip / norm) if clip else 1.0
        assert (factor < 1) == (clip == 0.01)
        assert trainer.step(1.0, 0.9)["train_loss"].item() == pytest.approx(expected_loss.item(), rel=1e-6)
        for name, p in by_hand.named_parameters():
            largest = float(p.grad.abs().max())
            assert largest > 0
            error = (trainer.optimizers[0].grads[name] - factor * p.grad).abs().max()
            assert error <= 2e-5 * factor * largest, name


def test_an_extra_loss_trains_with_the_losses_and_is_in_no_log(make_config, build):
    """It is averaged over the micro-steps, like the losses."""
    trainer = build(make_config(GRAD_ACCUM_STEPS=4))
    model = scatter(trainer.model)
    by_hand = copy.deepcopy(model)
    trainer.train_model = lambda x, y: (model(x, y), 0.3 * x.float().mean() * sum(p.sum() for p in model.parameters()))
    trainer.optimizers = [Recorder(model)]
    tokens = torch.from_numpy(trainer.loader.stream.read(0, 257).astype("int64"))
    expected_loss = by_hand(tokens[:-1].view(8, 32), tokens[1:].view(8, 32)).mean()
    expected_loss.backward()
    assert trainer.step(1.0, 0.9)["train_loss"].item() == pytest.approx(expected_loss.item(), rel=1e-6)
    for name, p in by_hand.named_parameters():
        expected = p.grad + 0.3 * tokens[:-1].double().mean().float()
        torch.testing.assert_close(trainer.optimizers[0].grads[name], expected, rtol=1e-5, atol=1e-5)


def test_a_step_sets_the_scheduled_rates_and_momentum(make_config, build):
    trainer = build(make_config(MATRIX_LR=0.1, TIED_EMBED_LR=0.2, SCALAR_LR=0.3))
    for scale, momentum in ((0.25, 0.5), (0.5, 0.7)):  # from the full rate each time, not from the last one
        trainer.step(scale, momentum)
        adam, muon = trainer.optimizers
        assert [group["lr"] for group in adam.param_groups] == [0.2 * scale, 0.3 * scale]
        assert [(group["lr"], group["momentum"]) for group in muon.param_groups] == [(0.1 * scale, momentum)]
        assert all("momentum" not in group for group in adam.param_groups)
        assert all(p.grad is None for p in trainer.model.parameters())


def test_the_loop_passes_the_schedule_of_each_step(go, monkeypatch):
    given = []
    metrics = {"train_loss": torch.tensor(1.0), "lr_scale": 1.0}
    monkeypatch.setattr(Trainer, "step", lambda self, *args: given.append(args) or dict(metrics))
    momentum = {"MUON_MOMENTUM": 0.9, "MUON_MOMENTUM_WARMUP_START": 0.5, "MUON_MOMENTUM_WARMUP_STEPS": 4}
    go(ITERATIONS=10, WARMDOWN_FRAC=0.5, **momentum)
    assert [scale for scale, _ in given] == pytest.approx([1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert [momentum for _, momentum in given] == pytest.approx([0.5, 0.6, 0.7, 0.8, *[0.9] * 6])


def test_warm_up_leaves_no_trace_and_training_after_it_is_the_same(make_config, build, runtime, capsys):
    config = make_config(WARMUP_STEPS=3, VAL_TOKENS_LIMIT=500)
    warm, cold = build(config), build(config)
    before, rng = copy.deepcopy(warm.model.state_dict()), torch.get_rng_state()
    steps, step = [], warm.step
    warm.step = lambda *args: steps.append(float(step(*args)["train_loss"])) or {"train_loss": torch.tensor(steps[-1])}
    warm.warm_up(evaluator_of(config, runtime))
    assert len(set(steps)) == 3 and steps[2] < steps[0], "the warm-up must really step"
    assert "warmup_step:1/3\nwarmup_step:2/3\nwarmup_step:3/3\n" in capsys.readouterr().out
    torch.testing.assert_close(warm.model.state_dict(), before, rtol=0, atol=0)
    assert [optimizer.state_dict() for optimizer in warm.optimizers] == [o.state_dict() for o in cold.optimizers]
    assert all(optimizer.state_dict()["state"] == {} for optimizer in warm.optimizers)
    assert torch.equal(torch.get_rng_state(), rng) and warm.loader.position == 0
    assert all(p.grad is None for p in warm.model.parameters())
    for i in range(4):
        assert step(1.0, 0.9)["train_loss"].equal(cold.step(1.0, 0.9)["train_loss"]), f"step {i}"
    torch.testing.assert_close(warm.model.state_dict(), cold.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("peak, ranks, share", [(None, 1, ""), (1e8, 1, " mfu:{:.1%}"), (1e8, 4, " mfu:{:.1%}")])
def test_the_speed_is_that_of_the_last_steps(make_config, build, runtime, monkeypatch, peak, ranks, share):
    trainer = build(make_config())
    monkeypatch.setattr(kernels, "peak_flops", lambda runtime: peak)
    runtime.world_size = ranks
    trainer.step_seconds.extend([0.25] * 30 + [0.5] * 10)  # 20 are kept
    tokens_per_second = 256 / 0.375
    achieved = tokens_per_second * kernels.flops_per_token(trainer.model, 32)
    assert kernels.speed(trainer) == " tok/s:683" + share.format(achieved / (1e8 * ranks))


def test_the_peak_of_a_gpu_is_told_by_its_name():
    h100, cuda = "NVIDIA H100 80GB HBM3", torch.device("cuda")
    peaks = {h100: 989, "NVIDIA H100 PCIe": 756, "NVIDIA L4": 121, "NVIDIA L40S": 362, "NVIDIA GeForce RTX 4090": 165}
    for name, tflops in (peaks | {"NVIDIA A100-SXM4-80GB": 312}).items():
        fake = SimpleNamespace(device=cuda, dtype=torch.bfloat16, device_name=name)
        assert kernels.peak_flops(fake) == 1e12 * tflops
    for device, dtype, name in (
        (cuda, torch.float32, h100),
        (cuda, torch.bfloat16, "Tesla T4"),
        ("cpu", torch.bfloat16, h100),
    ):
        fake = SimpleNamespace(device=torch.device(device), dtype=dtype, device_name=name)
        assert kernels.peak_flops(fake) is None


# The clock


@pytest.fixture
def clock(monkeypatch):
    return fake_clock(monkeypatch)


def test_a_capped_run_ends_before_its_cap_and_validation_does_not_count(go, clock):
    settings = {"MAX_WALLCLOCK_SECONDS": 10, "ITERATIONS": 1000, "VAL_LOSS_EVERY": 2, "VAL_TOKENS_LIMIT": 100}
    run = go(**settings, WARMUP_STEPS=2, WARMDOWN_FRAC=0.5)
    (line,) = re.findall("^stopping_early: .*", run.log, re.MULTILINE)
    assert line == "stopping_early: wallclock_cap train_time:9000ms step:9/1000"  # a tenth step would end at the limit
    validations = re.findall(
        r"^step:(\d+)/1000 val_loss:\S+ val_bpb:\S+ train_time:(\d+)ms step_avg:(\S+)ms (\S+)$", run.log, re.MULTILINE
    )
    assert [(int(step), int(ms)) for step, ms, _, _ in validations] == [(s, 1000 * s) for s in (0, 2, 4, 6, 8, 9)]
    assert [mean for _, _, mean, _ in validations] == ["0.00", *["1000.00"] * 5]
    assert {label.split("/")[0] for *_, label in validations} == {"partial:100"}
    assert re.search(r"^final_int8_zlib_roundtrip_exact .* partial:100/\d+$", run.log, re.MULTILINE)
    assert run.result["seconds"]["training"] == 9 and run.result["seconds"]["compile"] == 2
    assert run.result["seconds"]["evaluation"] == 700 and run.result["eval_seconds"] == 100
    assert run.result["steps"] == 9 and run.result["partial"] is True and run.result["step_avg_ms"] == 1000
    steps = [m for m in run.metrics if "train_loss" in m]
    assert [m["train_seconds"] for m in steps] == list(range(1, 10))
    assert [m["lr_scale"] for m in steps] == pytest.approx([min(1, (1 - s / 10) / 0.5) for s in range(9)])


def test_steps_of_uneven_length_still_end_before_the_cap(go, clock):
    """If no step is slower than the slowest of the 20 before it, none ends after the limit. Even slower ones are
    forgotten after a while (the last case), so that one hiccup does not cost the rest of the run."""
    durations = [2.0, 1.0, 0.25, 2.0, 1.75, 0.5, *itertools.repeat(0.25, 40)]
    for limit, steps in ((7, 4), (7.5, 5), (9.25, 6), (11, 12), (15, 35)):
        clock.steps = iter(durations)
        run = go(MAX_WALLCLOCK_SECONDS=limit, ITERATIONS=1000, VAL_TOKENS_LIMIT=50, RUN_ID=f"limit{limit}")
        training = run.result["seconds"]["training"]
        assert training == sum(durations[:steps]) and limit - 2 <= training <= limit and run.result["steps"] == steps


def test_a_run_that_has_no_time_for_one_step_and_one_that_ends_in_time(go, clock):
    clock.steps = itertools.repeat(3.0)
    run = go(RUN_ID="none", MAX_WALLCLOCK_SECONDS=2.5, WARMUP_STEPS=2, VAL_TOKENS_LIMIT=50)
    assert run.result["steps"] == run.result["train_tokens"] == run.result["seconds"]["training"] == 0
    assert "\nstopping_early: wallclock_cap train_time:0ms step:0/5\n" in run.log
    run = go(MAX_WALLCLOCK_SECONDS=30, ITERATIONS=4, VAL_LOSS_EVERY=2, VAL_AT_START=0, VAL_TOKENS_LIMIT=50)
    assert "stopping_early" not in run.log and run.result["steps"] == 4
    assert [m["step"] for m in run.metrics if "val_loss" in m] == [2, 4]


# Non-finite losses


@pytest.mark.parametrize("bad_step, value", [(1, math.nan), (3, math.inf)])
def test_a_non_finite_loss_stops_the_run_and_exports_nothing(tiny, call, tmp_path, monkeypatch, bad_step, value):
    step, count = Trainer.step, itertools.count(1)

    def poisoned(self, *args):
        metrics = step(self, *args)
        return metrics | ({"train_loss": torch.tensor(value)} if next(count) == bad_step else {})

    monkeypatch.setattr(Trainer, "step", poisoned)
    code, _, error = call(tiny())
    assert code == 2 and f"step {bad_step}: the loss is {value}: lower MATRIX_LR" in error
    assert "Traceback" not in error
    path, metrics = tmp_path / "logs" / "run", ["metrics.jsonl"] if bad_step > 1 else []
    assert {path.name for path in path.iterdir()} == {"train.log", "config.env", "train_gpt.py", *metrics}
    for name in metrics:
        lines = (path / name).read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, bad_step))


@pytest.mark.parametrize("knobs", [{"QK_GAIN_INIT": 3e38}, {"TIED_EMBED_LR": 1e9, "VAL_TOKENS_LIMIT": 50}], ids=str)
def test_a_model_that_overflows_is_noticed(tiny, call, tmp_path, knobs):
    """Immediately if the loss overflows, or if weights exceed the fp16 range of the artifact."""
    code, _, error = call(tiny(**knobs))
    assert code == 2 and ("step 1: the loss is nan" if "QK_GAIN_INIT" in knobs else "not finite in fp16") in error
    assert not (tmp_path / "logs" / "run" / "result.json").exists()


# A complete run: its log, its files, its result


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """One complete run, with its standard output."""
    logs = tmp_path_factory.mktemp("finished")
    settings = models.tiny_settings(corpus, LOG_DIR=logs, ITERATIONS=14, TRAIN_LOG_EVERY=6, VAL_LOSS_EVERY=5)
    settings |= {"WARMUP_STEPS": "2", "SEED": "7", "NUM_LAYERS": "3"}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert models.call_main(settings) == 0
    return SimpleNamespace(settings=settings, out=out.getvalue(), **vars(read_run(logs / "run")))


LOSS, BPB, TIME = r"\d+\.\d{4}", r"\d+\.\d{4}", r"train_time:\d+ms step_avg:\d+\.\d\dms"
SPEED = r"tok/s:\d+"
EXPECTED_LINES = [
    r"train_loader:shards pattern=\S+/data/fineweb_train_\*\.bin tokens:\d+",
    r"val_loader:shards pattern=\S+/data/fineweb_val_\*\.bin tokens:\d+",
    r"attention:blocked by blocked_attention",
    r"model_params:\d+",
    r"seed:7",
    r"world_size:1 grad_accum_steps:1",
    r"warmup_step:1/2",
    r"warmup_step:2/2",
    r"start_to_first_step:\d+ms compile:\d+ms",
    rf"step:0/14 val_loss:{LOSS} val_bpb:{BPB} {TIME}",
    *[rf"step:{i}/14 train_loss:{LOSS} {TIME} {SPEED}" for i in (1, 2, 3, 4, 5)],
    rf"step:5/14 val_loss:{LOSS} val_bpb:{BPB} {TIME}",
    *[rf"step:{i}/14 train_loss:{LOSS} {TIME} {SPEED}" for i in (6, 7, 8, 9, 10)],
    rf"step:10/14 val_loss:{LOSS} val_bpb:{BPB} {TIME}",
    rf"step:12/14 train_loss:{LOSS} {TIME} {SPEED}",
    rf"step:14/14 val_loss:{LOSS} val_bpb:{BPB} {TIME}",
    r"Serialized model: \d+ bytes",
    r"Code size: \d+ bytes",
    r"Total submission size: \d+ bytes",
    r"Serialized model int8\+zlib: \d+ bytes \(payload:\d+ raw_torch:\d+ payload_ratio:\d+\.\d\dx\)",
    r"Total submission size int8\+zlib: \d+ bytes",
    rf"final_int8_zlib_roundtrip val_loss:{LOSS} val_bpb:{BPB} eval_time:\d+ms",
    r"final_int8_zlib_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}( .*)?",
]


def test_the_log_holds_the_lines_of_the_format_in_order(finished):
    lines, at = finished.log.splitlines(), 0
    for pattern in EXPECTED_LINES:
        matches = [i for i, line in enumerate(lines) if re.fullmatch(pattern, line)]
        assert len(matches) == 1, f"{pattern} should match one line, not {len(matches)}"
        assert matches[0] >= at, f"{pattern} comes too early"
        at = matches[0]
    steps = [line for line in lines if line.startswith("step:")]
    assert len(steps) == 15 and not any("stopping_early" in line or "partial" in line for line in lines)
    assert finished.log == finished.out, "the file says what the screen said"


def test_train_log_every_0_logs_no_training_lines_but_keeps_the_metrics(go):
    run = go(TRAIN_LOG_EVERY=0, ITERATIONS=3, VAL_TOKENS_LIMIT=50)
    assert "train_loss" not in run.log and [m["step"] for m in run.metrics if "train_loss" in m] == [1, 2, 3]


def test_the_run_folder_is_complete(finished):
    sources = ["train.log", "metrics.jsonl", "config.env", "train_gpt.py", "result.json"]
    weights = ["final_model.pt", "final_model.int8.ptz", "checkpoint.pt"]
    assert sorted(path.name for path in finished.path.iterdir()) == sorted(sources + weights)
    assert (finished.path / "train_gpt.py").read_bytes() == (ROOT / "train_gpt.py").read_bytes()


def test_metrics_have_one_line_per_step_and_one_per_validation(finished):
    steps = [m for m in finished.metrics if "train_loss" in m]
    assert [m["step"] for m in steps] == list(range(1, 15))
    assert all(math.isfinite(m["train_loss"]) and 0 < m["lr_scale"] <= 1 for m in steps)
    seconds = [m["train_seconds"] for m in steps]
    assert seconds == sorted(seconds) and seconds[0] > 0
    validations = [m for m in finished.metrics if "val_loss" in m]
    assert [m["step"] for m in validations] == [0, 5, 10, 14] and not any(m["partial"] for m in validations)
    assert len(finished.metrics) == 18
    for m in steps[:10]:
        assert f"\nstep:{m['step']}/14 train_loss:{m['train_loss']:.4f} " in finished.log
    for m in validations:
        assert f"\nstep:{m['step']}/14 val_loss:{m['val_loss']:.4f} val_bpb:{m['val_bpb']:.4f} " in finished.log
    assert validations[0]["val_loss"] > validations[-1]["val_loss"] + 0.5


def test_the_result_is_complete_and_agrees_with_log_metrics_and_files(finished):
    result, log, last = finished.result, finished.log, finished.metrics[-1]
    digest = {
        name: hashlib.sha256((finished.path / name).read_bytes()).hexdigest()
        for name in ("train_gpt.py", "final_model.int8.ptz")
    }
    sizes = {path.name: path.stat().st_size for path in finished.path.iterdir()}
    expected = {
        "run_id": "run",
        "seed": 7,
        "steps": 14,
        "train_tokens": 14 * 256,
        "world_size": 1,
        "grad_accum_steps": 1,
        "partial": False,
        "eval_stride": 0,
        "dtype": "torch.float32",
        "torch": torch.__version__,
        "pre_quant_val_loss": last["val_loss"],
        "pre_quant_val_bpb": last["val_bpb"],
        "sha256_code": digest["train_gpt.py"],
        "sha256_artifact": digest["final_model.int8.ptz"],
        "bytes_code": sizes["train_gpt.py"],
        "bytes_model": sizes["final_model.pt"],
        "bytes_limit": 16_000_000,
        "bytes_artifact": sizes["final_model.int8.ptz"],
        "bytes_total": sizes["train_gpt.py"] + sizes["final_model.int8.ptz"],
        "scored_bytes": sum(len(text.encode()) for text in make_documents(30, seed=2)),
    }
    assert {name: result[name] for name in expected} == expected
    assert result["sources"] == {"train_gpt.py": {"sha256": digest["train_gpt.py"], "bytes": sizes["train_gpt.py"]}}
    assert all(result[name] for name in ("device", "python", "platform", "note"))
    assert set(result["seconds"]) == {"startup", "compile", "training", "evaluation", "export"}
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert 0 < result["eval_seconds"] <= result["seconds"]["evaluation"]
    assert result["step_avg_ms"] == pytest.approx(1000 * result["seconds"]["training"] / 14, rel=0.05)
    assert f"\nmodel_params:{result['model_params']}\n" in log
    assert f"\nSerialized model: {sizes['final_model.pt']} bytes\nCode size: {sizes['train_gpt.py']} bytes\n" in log
    assert f"\nTotal submission size int8+zlib: {result['bytes_total']} bytes\n" in log
    val_tokens = int(re.search(r"^val_loader:.* tokens:(\d+)$", log, re.MULTILINE)[1])
    assert result["scored_tokens"] == result["val_tokens"] == val_tokens
    assert f"\nfinal_int8_zlib_roundtrip val_loss:{result['val_loss']:.4f} val_bpb:{result['val_bpb']:.4f} " in log
    exact = f"val_loss:{result['val_loss']:.8f} val_bpb:{result['val_bpb']:.8f}"
    assert f"\nfinal_int8_zlib_roundtrip_exact {exact}" in log
    bits = result["val_loss"] * result["scored_tokens"] / math.log(2)
    assert result["val_bpb"] == pytest.approx(bits / result["scored_bytes"], rel=1e-9)


def test_the_score_of_record_is_that_of_the_file(finished, runtime):
    config, path = train_gpt.Config.load([], finished.settings), finished.path
    before = torch.load(path / "final_model.pt", weights_only=True)
    after, scores = train_gpt.Coder(config).decode((path / "final_model.int8.ptz").read_bytes()), []
    for state, key in ((after, "val_bpb"), (before, "pre_quant_val_bpb")):
        model, *_ = train_gpt.build_model(config, runtime)
        model.load_state_dict(state)
        assert sum(p.numel() for p in model.parameters()) == finished.result["model_params"]
        scores.append(evaluator_of(config, runtime).score(model, model).bpb)
        assert scores[-1] == pytest.approx(finished.result[key], rel=1e-9)
    assert scores[0] != scores[1]


def test_config_env_runs_again_to_the_same_losses_score_and_artifact(finished):
    assert models.call_main({"RUN_ID": "again"}, finished.path / "config.env") == 0
    again = read_run(finished.path.parent / "again")
    for first, second in zip(finished.metrics, again.metrics, strict=True):
        assert first | {"train_seconds": 0} == second | {"train_seconds": 0}
    for name in ("val_loss", "val_bpb", "sha256_artifact", "sha256_code", "scored_bytes", "steps"):
        assert again.result[name] == finished.result[name], name
    assert (again.path / "config.env").read_bytes() == (finished.path / "config.env").read_bytes()
