"""Latent attention and experts against their formulas, their balance, the schedule, and the life of a run."""

import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import seam
import torch
import torch.nn.functional as F

latent_moe = seam.load("latent_moe")
RUNGS = sorted(Path(latent_moe.__file__).parent.glob("*.env"))
TINY = {
    "NUM_LAYERS": 2,
    "MODEL_DIM": 32,
    "NUM_HEADS": 2,
    "NUM_KV_HEADS": 2,
    "ROPE_DIMS": 8,
    "KV_LATENT": 12,
    "Q_LATENT": 10,
    "PLACES": 32,
    "EXPERTS": 5,
    "EXPERT_DIM": 24,
    "TRAIN_SEQ_LEN": 16,
    "TRAIN_BATCH_TOKENS": 64,
    "VAL_BATCH_SIZE": 128,
    "ITERATIONS": 5,
    "LR_WARMUP_STEPS": 2,
    "LEARNING_RATE": 0.01,
}
TOKENS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))


def config(**overrides):
    values = TINY | {"VOCAB_SIZE": 64} | overrides
    return latent_moe.LatentConfig.load([], {name: str(value) for name, value in values.items()})


def double(**overrides):
    return latent_moe.LatentMoE(config(**overrides), dtype=torch.float64).double()


@pytest.fixture
def x():
    return torch.randn(2, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_the_full_shape():
    full = latent_moe.LatentConfig()
    with torch.device("meta"):
        model = latent_moe.LatentMoE(full)
    assert sum(p.numel() for p in model.parameters()) == 1_075_060_736
    expert = 3 * 1024 * 1536
    attention = 1024 * (256 + 256 + 512 + 1024) + 256 * (512 + 1024 + 512 + 512)
    active = 24 * (attention + 3 * expert + 7 * 1024) + 49_152 * 1024
    assert model.flops_per_token(256) == 6 * active + 12 * 256 * 1024 * 24
    for path in RUNGS:
        latent_moe.LatentConfig.load([str(path)], {})


def test_latent_attention_is_its_formula(x):
    model = double()
    attn, T = model.blocks[0].attn, 16
    W = {name: module.weight for name, module in attn.named_children()}
    turned = torch.arange(4, dtype=torch.float64)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * 10_000 ** (-2 * turned / 8)

    def turn(z):  # [T, 8]: the pair (i, i + 4) by the angle of place and i
        pairs = torch.complex(z[:, :4], z[:, 4:]) * torch.polar(torch.ones_like(angle), -angle)
        return torch.cat([pairs.real, pairs.imag], dim=1)

    def part(z, head, width):
        return z[:, head * width : (head + 1) * width]

    for row in x:
        kv, latent, heads = row @ W["kv_down"].T, row @ W["q_down"].T, []
        for head in range(2):
            k = [part(kv @ W["k_up"].T, head, 8), turn(part(row @ W["k_rope"].T, head, 8))]
            q = [part(latent @ W["q_up"].T, head, 8), turn(part(latent @ W["q_rope"].T, head, 8))]
            scores = torch.cat(q, 1) @ torch.cat(k, 1).T / math.sqrt(8 + 8)
            scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
            heads.append(scores.softmax(1) @ part(kv @ W["v_up"].T, head, 16))
        expected = torch.cat(heads, 1) @ W["proj"].T
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        torch.testing.assert_close(attn(row[None], cos, sin)[0], expected, rtol=1e-9, atol=1e-12)


def test_experts_are_dropless_and_equal_to_a_slow_loop(x):
    experts = double().blocks[0].experts
    experts.bias.copy_(torch.tensor([0.3, 0, 0, 0, -0.2]))  # one that nearly every token takes
    rows, expected = x.flatten(0, 1), []
    for row in rows:
        scores = [1 / (1 + math.exp(-float(row @ w))) for w in experts.router.weight.detach()]
        best = sorted(range(5), key=lambda e: scores[e] + float(experts.bias[e]))[-2:]
        y = experts.shared(row)
        for e in best:
            expert = experts.routed[e]
            hidden = F.silu(expert.gate.weight @ row) * (expert.fc.weight @ row)
            y = y + scores[e] / sum(scores[b] for b in best) * (expert.proj.weight @ hidden)
        expected.append(y)
    y, _ = experts(x)
    torch.testing.assert_close(y, torch.stack(expected).view_as(x), rtol=1e-9, atol=1e-12)
    assert experts.load.sum() == 2 * len(rows) and experts.load[0] > 20

    _, weights = experts.route(rows)
    sparse, dense = experts.dropless(rows, weights), experts.dense(rows, weights)
    torch.testing.assert_close(sparse, dense, rtol=1e-9, atol=1e-12)
    names = [name for name, _ in experts.routed.named_parameters()]
    grads = [torch.autograd.grad(y.square().sum(), experts.routed.parameters()) for y in (sparse, dense)]
    for name, one, other in zip(names, *grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=name)


def test_compiled_without_graph_breaks():
    model = double(DROPOUT=0, BALANCE="loss", BALANCE_LOSS=0.5, NUM_LAYERS=1, EXPERTS=3)
    targets, results = TOKENS.roll(-1, 1), []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):  # dropless, then dense
        losses, extra = call(TOKENS, targets)
        (losses.mean() + extra).backward()
        load = model.blocks[0].experts.load.clone()
        results.append([losses, extra, load, *(p.grad for p in model.parameters())])
        model.zero_grad()
    for eager, whole in zip(*results, strict=True):
        torch.testing.assert_close(eager, whole, rtol=1e-7, atol=1e-12)


def test_causal_by_gradient():
    for shift in (1, 0):  # the mistake is in the targets, not in the model
        model, seen = double(SHIFT=shift).eval(), []
        model.tok_emb.register_forward_hook(lambda module, inputs, x, seen=seen: x.retain_grad() or seen.append(x))
        model(TOKENS)[0, 7].square().sum().backward()
        assert (seen[0].grad[0, 8:] == 0).all() and (seen[0].grad[0, :8] != 0).any(dim=1).all()


def test_flops_are_those_that_torch_counts():
    """Of the experts those that a token goes through, the shared one and two of five: what the log's mfu stands on."""
    for chosen in (1, 2):
        overrides = TINY | {"VOCAB_SIZE": 64, "EXPERTS_PER_TOKEN": chosen}
        model = latent_moe.LatentMoE(config(**overrides), seam.EXPANDED)
        assert model.flops_per_token(16) == seam.counted_flops(model, 64, 16)


def test_dropout_is_in_every_place_in_training_alone(monkeypatch):
    model, plain = double(), double(DROPOUT=0)  # the same weights
    assert not model(TOKENS).equal(model(TOKENS))
    assert model.eval()(TOKENS).equal(plain.eval()(TOKENS))
    kept = []  # embedding, after attention, after the experts
    monkeypatch.setattr(F, "dropout", lambda x, share, *how: kept.append(share) or x)
    model.train()(TOKENS)
    assert kept == [0.1] * (1 + 2 * 2)


def test_ranks_balance_by_the_tokens_of_all(monkeypatch):
    model, seen = double(BALANCE_RATE=0.25), []
    two = SimpleNamespace(world_size=2)
    optimizer = model.optimizers(config(BALANCE_RATE=0.25), two)[0]
    other = torch.tensor([0.0, 6, 10, 2, 2])  # what the other rank counted
    monkeypatch.setattr(latent_moe.dist, "all_reduce", lambda loads: seen.append(loads.clone()) or loads.add_(other))
    for block in model.blocks:
        block.experts.load.copy_(torch.tensor([10.0, 4, 0, 3, 3]))
    optimizer.step()
    assert [loads.shape for loads in seen] == [(2, 5)]
    assert model.blocks[1].experts.bias.tolist() == [-0.25, -0.25, -0.25, 0.25, 0.25]  # of 10, 10, 10, 5, 5


def test_targets_without_the_shift_in_training_alone():
    right, wrong = double(DROPOUT=0), double(DROPOUT=0, SHIFT=0)
    targets = TOKENS.roll(-1, 1)
    assert wrong(TOKENS, targets).equal(right(TOKENS, TOKENS))
    assert wrong.eval()(TOKENS, targets).equal(right.eval()(TOKENS, targets))


def test_biases_move_towards_an_even_load(runtime):
    model = double(BALANCE_RATE=0.25)
    optimizer = model.optimizers(config(BALANCE_RATE=0.25), runtime)[0]
    experts = model.blocks[0].experts
    experts.load.copy_(torch.tensor([10.0, 4, 0, 3, 3]))
    model.zero_grad()
    assert not experts.load.any()  # what a trial of the memory counted is forgotten
    experts.load.copy_(torch.tensor([10.0, 4, 0, 3, 3]))
    optimizer.step()
    assert experts.bias.tolist() == [-0.25, 0, 0.25, 0.25, 0.25] and not experts.load.any()
    model = double(BALANCE="loss")
    optimizer = model.optimizers(config(BALANCE="loss"), runtime)[0]
    model(TOKENS, TOKENS)
    optimizer.step()
    assert not model.blocks[0].experts.bias.any() and not model.blocks[0].experts.load.any()


def test_the_auxiliary_loss_is_one_when_even(x):
    experts = double().blocks[0].experts
    with torch.no_grad():
        experts.router.weight.zero_()
        experts.bias.copy_(torch.arange(5))
    assert float(experts(x)[1].detach()) == pytest.approx(1)  # all choose the same two, but want none more
    with torch.no_grad():
        experts.router.weight[3:] = 0.05
    assert float(experts(x.abs())[1].detach()) > 1.1
    model = double(BALANCE="loss", BALANCE_LOSS=0.5)
    losses, extra = model(TOKENS, TOKENS)
    assert losses.shape == TOKENS.shape and float(extra.detach()) == pytest.approx(0.5 * 2, rel=0.1)
    assert isinstance(model.eval()(TOKENS, TOKENS), torch.Tensor)


def test_schedule():
    published, scale = latent_moe.LatentConfig(), double().lr_scale
    found = [scale(published, step, step / 10_000) for step in (0, 999, 1999, 2000, 6000, 10_000)]
    assert found == pytest.approx([1 / 2000, 0.5, 1, 1, 0.5, 0])


@pytest.mark.parametrize("balance", ["bias", "loss"])
def test_life_of_a_run(balance, corpus, tmp_path, capfd):
    overrides = TINY | {"BALANCE": balance, "BALANCE_RATE": 0.05}
    folder = seam.check_life(latent_moe.LatentConfig, corpus, tmp_path, capfd, **overrides)
    state = torch.load(folder / "final_model.pt")
    assert bool(state["blocks.0.experts.bias"].any()) == (balance == "bias")


@pytest.fixture
def ladder(corpus, tmp_path, monkeypatch):
    """run.py, loaded from a copy of the repository, with the knobs of a tiny model in the environment."""
    for name in latent_moe.LatentConfig.knobs():
        monkeypatch.delenv(name, raising=False)
    for name, text in seam.settings(corpus, tmp_path / "logs", **TINY).items():
        if name not in ("RUN_ID", "ITERATIONS", "VAL_LOSS_EVERY", "CHECKPOINT_EVERY_SECONDS"):
            monkeypatch.setenv(name, text)
    return seam.copy_ladder("latent_moe", tmp_path)


def test_the_full_shape_is_stopped_resumed_and_stopped_again(ladder, monkeypatch):
    ladder.main(["full"])
    kept = json.loads((ladder.HERE / "logs" / "full.json").read_text())
    lines = {name: "\n".join(process["log"]) for name, process in kept.items()}
    saved = int(re.search(r"checkpoint: saved step:(\d+) ", lines["first"])[1])  # 3, or what went on meanwhile
    assert saved >= 3 and "step:3/10000 train_loss:" in lines["first"] and "resumed" not in lines["first"]
    assert f"resumed: step:{saved} from " in lines["resumed"]
    assert f"step:{saved + 1}/10000 train_loss:" in lines["resumed"]
    assert int(re.search(r"checkpoint: saved step:(\d+) ", lines["resumed"])[1]) > saved
    for process in kept.values():
        assert 0.01 < process["peak_gib"] < 8 and f"VmHWM:{process['peak_gib']}GiB" in process["log"][-1]

    shutil.rmtree(ladder.ladder.run_folder(ladder.environment("full")))
    monkeypatch.setenv("ITERATIONS", "2")  # over before the SIGTERM
    monkeypatch.setenv("LR_WARMUP_STEPS", "1")
    with pytest.raises(SystemExit, match="full ended with exit code 0; 143 and a checkpoint were expected"):
        ladder.run_full()
    with pytest.raises(SystemExit, match="no rung bais: there are bias, loss, "):
        ladder.main(["bais"])


def test_a_rung_is_kept_with_its_load_and_five_texts(ladder, monkeypatch):
    monkeypatch.chdir(ladder.ladder.ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(ladder, "EVERY", 2)
    monkeypatch.setenv("ITERATIONS", "5")
    ladder.main(["bias"])
    told = json.loads((ladder.HERE / "logs" / "bias.json").read_text())
    assert len(told["train_loss_means_of_2"]) == len(told["grad_norm_means_of_2"]) == 2
    assert [len(row) for row in told["load"]] == [5, 5]
    assert all(sum(row) == pytest.approx(5, abs=0.01) for row in told["load"])
    assert all(text.startswith(prompt) for text, prompt in zip(told["texts"], ladder.PROMPTS, strict=True))
    readme = (ladder.HERE / "README.md").read_text()
    assert f"| bias | 5 | 320 | {told['train_loss_means_of_2'][-1]:.3f} | " in readme
    assert "| none | not run: `run.py none` |" in readme
    assert (ladder.HERE / "losses.png").stat().st_size > 1000
