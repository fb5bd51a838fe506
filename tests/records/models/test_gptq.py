"""GPTQ: results equal column-by-column elimination in float64 and have less error than plain rounding; and Hessians,
against a direct computation."""

import copy
from types import SimpleNamespace

import models
import oracle
import pytest
import torch

import train_gpt
from train_gpt import UserError

_, frontier = models.model_file("frontier")
coder = frontier.sibling("coder")


def quantize_rows(w, qmax, k):
    """Quantize rows clipped at k standard deviations."""
    return train_gpt.quantize_rows(w, k * w.std(1, correction=0), qmax)


def problem(rows=24, width=300, qmax=31, seed=0, samples=900):
    """(w, scale, Hessian of correlated inputs) similar to those of a trained layer."""
    generator = torch.Generator().manual_seed(seed)
    w = 0.02 * torch.randn(rows, width, generator=generator)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    x = torch.randn(samples, width, generator=generator) @ mixing * torch.rand(width, generator=generator).add(0.2)
    return w, quantize_rows(w, qmax, 12.85 if qmax > 1 else 2.0)[1], x.mT @ x


def reference(w, scale, hessian, qmax, damp=0.01):
    """Optimal brain quantization in float64: round a column, spread its error by the inverse Hessian of the remaining
    columns, then eliminate the column from that inverse. No Cholesky factor and no blocks."""
    w, scale, H = w.double().clone(), scale.double(), hessian.double().clone()
    unused = H.diagonal() == 0
    H[unused, unused] = 1
    w[:, unused] = 0
    H += damp * H.diagonal().mean() * torch.eye(len(H), dtype=torch.double)
    q = torch.zeros_like(w)
    left = sorted(range(len(H)), key=lambda i: -float(H[i, i]))
    inverse = H[left][:, left].inverse()
    for step, column in enumerate(left):
        q[:, column] = (w[:, column] / scale).round().clamp(-qmax, qmax)
        error = (w[:, column] - q[:, column] * scale) / inverse[0, 0]
        w[:, left[step + 1 :]] -= error[:, None] * inverse[0, 1:]
        inverse = inverse[1:, 1:] - torch.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    return q.to(torch.int8)


def loss(w, q, scale, hessian):
    """tr(E H E^T): the squared error of the layer's outputs over the calibration inputs."""
    error = w.double() - q.double() * scale.double()[:, None]
    return float((error @ hessian.double() * error).sum())


@pytest.mark.parametrize("qmax, block", [(1, 64), (31, 1), (31, 128), (127, 1000)])
def test_the_values_are_those_of_float64_column_by_column(qmax, block):
    w, scale, hessian = problem(qmax=qmax)
    kept = w.clone(), scale.clone(), hessian.clone()
    q = coder.gptq_round(w, scale, hessian, qmax, block)
    assert all(torch.equal(a, b) for a, b in zip(kept, (w, scale, hessian), strict=True)), "the arguments stay"
    assert q.dtype == torch.int8 and q.shape == w.shape and q.abs().max() <= qmax and q.is_contiguous()
    expected = reference(w, scale, hessian, qmax)
    # float32 breaks a few ties differently, and the columns after one compensate for it
    assert (q == expected).double().mean() > 0.995 and (q - expected).abs().max() <= 2
    ours = loss(w, q, scale, hessian)
    assert ours == pytest.approx(loss(w, expected, scale, hessian), rel=2e-3)
    plain = (w / scale.float()[:, None]).round().clamp(-qmax, qmax)
    assert ours < 0.8 * loss(w, plain, scale, hessian), "it errs less where it counts"


def test_inputs_without_correlation_are_rounded_plainly():
    w, scale, _ = problem()
    hessian = torch.rand(300, generator=torch.Generator().manual_seed(1)).add(0.1).diag()
    assert torch.equal(coder.gptq_round(w, scale, hessian, 31), (w / scale.float()[:, None]).round().to(torch.int8))


def test_inputs_that_are_never_used_become_zero():
    w, scale, hessian = problem()
    hessian[[5, 200]] = 0
    hessian[:, [5, 200]] = 0
    q = coder.gptq_round(w, scale, hessian, 31)
    assert (q[:, [5, 200]] == 0).all() and (q != 0).any(0).sum() == 298
    assert (q == reference(w, scale, hessian, 31)).double().mean() > 0.995
    assert (coder.gptq_round(w, scale, torch.zeros(300, 300), 31) == 0).all()


def test_a_hessian_of_few_samples_is_damped():
    w, scale, hessian = problem(samples=3)
    assert loss(w, coder.gptq_round(w, scale, hessian, 31), scale, hessian) < loss(
        w, quantize_rows(w, 31, 12.85)[0], scale, hessian
    )


def test_what_has_no_factor_is_damped_ten_times_as_much():
    w, scale, _ = problem(width=40)
    hessian = torch.eye(40)
    hessian[0, 1] = hessian[1, 0] = 1.05  # the smallest eigenvalue is -0.05: 0.01 is not enough
    assert torch.equal(coder.gptq_round(w, scale, hessian, 31), reference(w, scale, hessian, 31, damp=0.1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e9])
def test_what_never_has_a_factor_is_refused(value):
    w, scale, hessian = problem(width=40)
    hessian[3, 3] = value
    with pytest.raises(UserError, match="GPTQ_BATCHES=0"):
        coder.gptq_round(w, scale, hessian, 31)


# Hessians


def small_model(make_config, **knobs):
    config = make_config(MODEL_FILE=models.FRONTIER, NUM_LAYERS=3, **knobs)
    model = oracle.scatter(models.new_model(config))
    return config, model, [oracle.random_tokens(config, 2, 16, seed) for seed in range(3)]


def direct_hessians(model, batches, monkeypatch) -> dict:
    """Computed in float64, with a Linear that records its inputs."""
    exact = copy.deepcopy(model).double()
    exact.dtype = torch.double
    names = {id(module): f"{name}.weight" for name, module in exact.named_modules()}
    inputs = {}

    def forward(self, x):
        inputs.setdefault(names[id(self)], []).append(x.flatten(0, 1))
        return x @ self.weight.mT

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(train_gpt.Linear, "forward", forward)
        for tokens in batches:
            features = exact.features(tokens)
            inputs.setdefault("tok_emb.weight" if exact.lm_head is None else "lm_head.weight", []).append(
                features.flatten(0, 1)
            )
    return {name: torch.cat(parts).mT @ torch.cat(parts) for name, parts in inputs.items()}


def gathered(model, batches, runtime):
    """coder.collect_hessians over these micro-batches, each the first of a step."""
    loader = SimpleNamespace(next_step=map(lambda tokens: ([tokens], None), batches).__next__)
    return coder.collect_hessians(model, loader, len(batches), runtime)


@pytest.mark.parametrize("tied, twice", [(0, False), (1, True)])
def test_hessians_are_those_of_a_direct_computation(make_config, runtime, monkeypatch, tied, twice):
    _, model, batches = small_model(make_config, TIE_EMBEDDINGS=tied)
    if twice:
        model.blocks[2] = model.blocks[0]  # its layers are then called twice per pass
    found, expected = gathered(model, batches, runtime), direct_hessians(model, batches, monkeypatch)
    assert set(found) == set(expected) and len(found) == 1 + 6 * (2 if twice else 3)
    for name, hessian in found.items():
        assert hessian.dtype == torch.float32 and not hessian.requires_grad
        assert hessian.shape == (dict(model.named_parameters())[name].size(1),) * 2
        torch.testing.assert_close(hessian.double(), expected[name], rtol=1e-4, atol=1e-3 * float(expected[name].max()))
    with pytest.raises(IndexError):
        gathered(model, [batches[0], batches[0] + 10**6], runtime)
    assert not any(module._forward_pre_hooks for module in model.modules()), "also after an error"


def test_hessians_are_averaged_over_the_ranks(make_config, runtime, monkeypatch):
    _, model, batches = small_model(make_config)
    alone, other = (gathered(model, part, runtime) for part in (batches[:1], batches[1:]))
    others = iter(other.values())
    monkeypatch.setattr(train_gpt.dist, "all_reduce", lambda tensor: tensor.add_(next(others) / 2))
    both = gathered(model, batches[:1], SimpleNamespace(world_size=2))
    for name, hessian in both.items():
        torch.testing.assert_close(hessian, (alone[name] + other[name]) / 2)


def test_only_what_has_a_hessian_is_rounded_by_gptq(make_config, runtime, monkeypatch):
    monkeypatch.setattr(train_gpt, "INT8_MIN_NUMEL", 1000)
    knobs = {"WEIGHT_BITS": 4, "EMBED_BITS": 5, "CLIP_ATTN": 6, "CLIP_MLP": 6, "CLIP_EMBED": 6}
    config, model, batches = small_model(make_config, **knobs)
    state, hessians = model.state_dict(), gathered(model, batches, runtime)
    name = "blocks.1.mlp.fc.weight"
    coders = [config.coder_class()(config) for _ in range(3)]
    for each, some in zip(coders, ({}, hessians, {name: hessians[name]}), strict=True):
        each.hessians = some
    plain, all_of_them, one = (each.quantize(state) for each in coders)
    for key, q in plain["quantized"].items():
        scale = plain["scales"][key]
        assert torch.equal(scale, one["scales"][key]) and torch.equal(scale, all_of_them["scales"][key])
        assert torch.equal(q, one["quantized"][key]) == (key != name)
        expected = coder.gptq_round(state[key], scale, hessians[key], 15 if key == "tok_emb.weight" else 7)
        assert torch.equal(all_of_them["quantized"][key], expected) and not torch.equal(q, expected)
        restored = coders[1].dequantize(all_of_them)[key]
        assert torch.equal(restored, expected.float() * scale.float()[:, None]), "rounded for the scale as stored"


@pytest.mark.parametrize("ranks, taken", [(1, 3), (2, 2), (3, 1)])
def test_the_ranks_share_the_batches(make_config, runtime, monkeypatch, ranks, taken):
    config, model, batches = small_model(make_config, GPTQ_BATCHES=3)
    monkeypatch.setattr(train_gpt.dist, "all_reduce", lambda tensor: None)
    left = iter(batches)
    loader = SimpleNamespace(next_step=lambda: ([next(left)], None))
    made = config.coder_class()(config)
    made.calibrate(SimpleNamespace(model=model, loader=loader, runtime=SimpleNamespace(world_size=ranks)))
    assert len([*left]) == 3 - taken and len(made.hessians) == 1 + 6 * 3
