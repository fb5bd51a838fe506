"""Latent attention and experts against their formulas in float64, load balancing, the schedule, and run.py.

test_contract.py covers the rest of what the model must do."""

import functools
import json
import math
import re
import shutil
import sys
from types import SimpleNamespace

import models
import oracle
import pytest
import seam
import torch
import torch.nn.functional as F

import train_gpt

latent_moe = seam.load("latent_moe/latent_moe.py")
TINY = models.knobs(
    "NUM_LAYERS=2 MODEL_DIM=32 NUM_HEADS=2 NUM_KV_HEADS=2 ROPE_DIMS=8 KV_LATENT=12 Q_LATENT=10 PLACES=32 EXPERTS=5 "
    "EXPERT_DIM=24 TRAIN_SEQ_LEN=16 TRAIN_BATCH_TOKENS=64 VAL_BATCH_SIZE=128 ITERATIONS=5 LR_WARMUP_STEPS=2 "
    "LEARNING_RATE=0.01"
)
TOKENS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))


def config(**overrides):
    values = TINY | {"VOCAB_SIZE": 64} | overrides
    return latent_moe.Config.load([], {name: str(value) for name, value in values.items()})


def double(**overrides):
    return models.new_model(config(**overrides), train_gpt.grouped_attention, torch.float64).double()


@pytest.fixture
def x():
    return torch.randn(2, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_the_full_shape():
    full = latent_moe.Config()
    assert seam.count_parameters(full) == 1_075_060_736
    expert = 3 * 1024 * 1536
    attention = 1024 * (256 + 256 + 512 + 1024) + 256 * (512 + 1024 + 512 + 512)
    active = 24 * (attention + 3 * expert + 7 * 1024) + 49_152 * 1024
    with torch.device("meta"):
        model = latent_moe.LatentMoE(full)
    assert model.flops_per_token(256) == 6 * active + 12 * 256 * 1024 * 24
    for path in (seam.LADDERS / "latent_moe").glob("*.env"):
        assert type(train_gpt.Config.load([str(path)], {})) is latent_moe.Config


def test_latent_attention_is_its_formula(x):
    attn = double().blocks[0].attn
    T = 16
    W = {name: module.weight for name, module in attn.named_children()}
    pairs = torch.arange(4, dtype=torch.float64)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * 10_000 ** (-2 * pairs / 8)
    rotate = functools.partial(train_gpt.rotate, cos=angle.cos()[:, None], sin=angle.sin()[:, None])

    def turn(z):  # [T, 8]: rotate the pair (i, i + 4) by the angle of position and i
        pairs = torch.complex(z[:, :4], z[:, 4:]) * torch.polar(torch.ones_like(angle), -angle)
        return torch.cat([pairs.real, pairs.imag], dim=1)

    def part(z, head, width):
        return z[:, head * width : (head + 1) * width]

    for row in x:
        kv = row @ W["kv_down"].T
        latent = row @ W["q_down"].T
        heads = []
        for head in range(2):
            k = [part(kv @ W["k_up"].T, head, 8), turn(part(row @ W["k_rope"].T, head, 8))]
            q = [part(latent @ W["q_up"].T, head, 8), turn(part(latent @ W["q_rope"].T, head, 8))]
            scores = torch.cat(q, 1) @ torch.cat(k, 1).T / math.sqrt(8 + 8)
            scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
            heads.append(scores.softmax(1) @ part(kv @ W["v_up"].T, head, 16))
        expected = torch.cat(heads, 1) @ W["proj"].T
        torch.testing.assert_close(attn(row[None], rotate)[0], expected, rtol=1e-9, atol=1e-12)


def test_experts_are_dropless_and_equal_to_a_slow_loop(x):
    experts = double().blocks[0].experts
    experts.bias.copy_(torch.tensor([0.3, 0, 0, 0, -0.2]))  # nearly every token selects the first expert
    rows = x.flatten(0, 1)
    expected = []
    for row in rows:
        scores = [1 / (1 + math.exp(-float(row @ w))) for w in experts.router.weight.detach()]
        best = sorted(range(5), key=lambda e: scores[e] + float(experts.bias[e]))[-2:]
        y = experts.shared(row)
        for e in best:
            expert = experts.routed[e]
            hidden = F.silu(expert.gate.weight @ row) * (expert.fc.weight @ row)
            y = y + scores[e] / sum(scores[b] for b in best) * (expert.proj.weight @ hidden)
        expected.append(y)
    torch.testing.assert_close(experts(x), torch.stack(expected).view_as(x), rtol=1e-9, atol=1e-12)
    assert experts.load.sum() == 2 * len(rows) and experts.load[0] > 20

    _, weights = experts.route(rows)
    sparse = experts.dropless(rows, weights)
    dense = experts.dense(rows, weights)
    torch.testing.assert_close(sparse, dense, rtol=1e-9, atol=1e-12)
    names = [name for name, _ in experts.routed.named_parameters()]
    grads = [torch.autograd.grad(y.square().sum(), experts.routed.parameters()) for y in (sparse, dense)]
    for name, one, other in zip(names, *grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("chosen", [1, 2])
def test_flops_are_those_that_torch_counts(chosen):
    """Only the experts that process a token count: the shared one, and one or two of five."""
    oracle.assert_flops(config(EXPERTS_PER_TOKEN=chosen))


def test_the_auxiliary_loss_is_in_the_graph_of_the_compiler():
    oracle.assert_one_graph(config(DROPOUT=0, BALANCE="loss", BALANCE_LOSS=0.5, NUM_LAYERS=1, EXPERTS=3))


@pytest.mark.parametrize("shift", [1, 0])
def test_no_gradient_comes_from_the_future(shift):
    """The mistake of SHIFT=0 is in the targets, not in the model."""
    oracle.assert_no_gradient_from_the_future(config(SHIFT=shift))


def test_dropout_is_in_every_place_in_training_alone(monkeypatch):
    model = double()
    plain = double(DROPOUT=0)  # the same weights
    assert not model(TOKENS).equal(model(TOKENS))
    assert model.eval()(TOKENS).equal(plain.eval()(TOKENS))
    dropped = []  # embedding, then in each block after attention and after the experts
    monkeypatch.setattr(F, "dropout", lambda x, p, *how: dropped.append(p) or x)
    model.train()(TOKENS)
    assert dropped == [0.1] * (1 + 2 * 2)


def test_targets_without_the_shift_in_training_alone():
    right = double(DROPOUT=0)
    wrong = double(DROPOUT=0, SHIFT=0)
    targets = TOKENS.roll(-1, 1)
    assert wrong(TOKENS, targets).equal(right(TOKENS, TOKENS))
    assert wrong.eval()(TOKENS, targets).equal(right.eval()(TOKENS, targets))


def test_biases_move_toward_an_even_load(runtime, monkeypatch):
    """The update uses the token counts of all ranks."""
    here, other = torch.tensor([10.0, 4, 0, 3, 3]), torch.tensor([0.0, 6, 10, 2, 2])
    monkeypatch.setattr(latent_moe.dist, "all_reduce", lambda loads: loads.add_(other))
    two = SimpleNamespace(world_size=2)
    # Alone: 10, 4, 0, 3, 3. With the other rank: 10, 10, 10, 5, 5.
    for ranks, moved in ((runtime, [-0.25, 0, 0.25, 0.25, 0.25]), (two, [-0.25, -0.25, -0.25, 0.25, 0.25])):
        model = double(BALANCE_RATE=0.25)
        optimizer = model.optimizers(config(BALANCE_RATE=0.25), ranks)[0]
        blocks = [block.experts for block in model.blocks]
        blocks[0].load.copy_(here)
        model.zero_grad()
        assert not blocks[0].load.any(), "a trial of the memory leaves no trace"
        for experts in blocks:
            experts.load.copy_(here)
        optimizer.step()
        assert all(experts.bias.tolist() == moved and not experts.load.any() for experts in blocks)
    model = double(BALANCE="loss")
    model(TOKENS, TOKENS)
    model.optimizers(config(BALANCE="loss"), runtime)[0].step()
    assert not any(block.experts.bias.any() or block.experts.load.any() for block in model.blocks)


def test_the_auxiliary_loss_is_one_when_even(x):
    experts = double(BALANCE="loss", BALANCE_LOSS=1).blocks[0].experts
    with torch.no_grad():
        experts.router.weight.zero_()
        experts.bias.copy_(torch.arange(5))
        experts(x)
        assert float(experts.extra_loss) == pytest.approx(1)  # all select the same two, but with equal probabilities
        experts.router.weight[3:] = 0.05
        experts(x.abs())
        assert float(experts.extra_loss) > 1.1
    model = double(BALANCE="loss", BALANCE_LOSS=0.5)
    losses, extra = model(TOKENS, TOKENS)
    assert losses.shape == TOKENS.shape and float(extra.detach()) == pytest.approx(0.5 * 2, rel=0.1)
    assert isinstance(model.eval()(TOKENS, TOKENS), torch.Tensor)


def test_schedule():
    published = latent_moe.Config()
    scale = double().lr_scale
    found = [scale(published, step, step / 10_000) for step in (0, 999, 1999, 2000, 6000, 10_000)]
    assert found == pytest.approx([1 / 2000, 0.5, 1, 1, 0.5, 0])


@pytest.fixture
def ladder(corpus, tmp_path, monkeypatch):
    """run.py, loaded from a copy of the repository, with the knobs of a tiny model in the environment."""
    for name in latent_moe.Config.knobs():
        monkeypatch.delenv(name, raising=False)
    seam.copy_ladders(tmp_path)
    for name, text in seam.settings(corpus, tmp_path / "logs", **TINY).items():
        if name not in ("RUN_ID", "ITERATIONS", "VAL_LOSS_EVERY", "CHECKPOINT_EVERY_SECONDS"):
            monkeypatch.setenv(name, text)
    return seam.load_run(tmp_path, "latent_moe")


def test_the_full_shape_is_stopped_resumed_and_stopped_again(ladder, monkeypatch):
    ladder.main(["full"])
    kept = json.loads((ladder.HERE / "logs" / "full.json").read_text())
    lines = {name: "\n".join(process["log"]) for name, process in kept.items()}
    saved = int(re.search(r"checkpoint: saved step:(\d+) ", lines["first"])[1])  # 3, or more if the signal arrived late
    assert saved >= 3 and "step:3/10000 train_loss:" in lines["first"] and "resumed" not in lines["first"]
    assert f"resumed: step:{saved} from " in lines["resumed"]
    assert f"step:{saved + 1}/10000 train_loss:" in lines["resumed"]
    assert int(re.search(r"checkpoint: saved step:(\d+) ", lines["resumed"])[1]) > saved
    for process in kept.values():
        assert 0.01 < process["peak_gib"] < 8 and f"VmHWM:{process['peak_gib']}GiB" in process["log"][-1]

    shutil.rmtree(ladder.ladder.run_folder(ladder.environment("full")))
    monkeypatch.setenv("ITERATIONS", "2")  # finishes before the SIGTERM
    monkeypatch.setenv("LR_WARMUP_STEPS", "1")
    with pytest.raises(train_gpt.UserError, match="full ended with exit code 0; 143 and a checkpoint were expected"):
        ladder.run_full()
    with pytest.raises(train_gpt.UserError, match="no rung bais: there are bias, loss, "):
        ladder.main(["bais"])


def test_a_rung_is_kept_with_its_load_and_five_texts(ladder, monkeypatch):
    monkeypatch.chdir(ladder.ladder.ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(ladder, "EVERY", 2)
    monkeypatch.setenv("ITERATIONS", "5")
    ladder.main(["bias"])
    kept = json.loads((ladder.HERE / "logs" / "bias.json").read_text())
    assert len(kept["train_loss_means_of_2"]) == len(kept["grad_norm_means_of_2"]) == 2
    assert [len(row) for row in kept["load"]] == [5, 5]
    assert all(sum(row) == pytest.approx(5, abs=0.01) for row in kept["load"])
    assert all(text.startswith(prompt) for text, prompt in zip(kept["texts"], ladder.PROMPTS, strict=True))
    readme = (ladder.HERE / "README.md").read_text()
    assert f"| bias | 5 | 320 | {kept['train_loss_means_of_2'][-1]:.3f} | " in readme
    assert "| none | not run: `run.py none` |" in readme
    assert (ladder.HERE / "losses.png").stat().st_size > 1000
