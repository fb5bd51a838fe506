"""Optimizer: parameter groups; AdamW, Newton-Schulz and Muon against float64; work shared among ranks."""

import copy
import threading

import pytest
import torch
from models import new_model, parameter_groups
from torch import nn

import train_gpt
from train_gpt import Muon, UserError, newton_schulz

VECTORS = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights")
QUINTIC = (3.4445, -4.7750, 2.0315)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tied", [1, 0])
def test_every_parameter_is_in_the_one_group_of_the_design(make_config, runtime, tied):
    config = make_config(TIE_EMBEDDINGS=tied, NUM_LAYERS=3)
    model = new_model(config)
    names = {p: name for name, p in model.named_parameters()}
    groups = {kind: [names[p] for p in group] for kind, group in parameter_groups(model, config, runtime).items()}
    assert sorted(name for group in groups.values() for name in group) == sorted(names.values())
    assert groups["embed"] == ["tok_emb.weight"] and groups["head"] == ([] if tied else ["lm_head.weight"])
    matrices = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")
    assert sorted(groups["matrix"]) == sorted(f"blocks.{i}.{m}.weight" for i in range(3) for m in matrices)
    assert all(name.endswith(VECTORS) for name in groups["scalar"]) and len(groups["scalar"]) == 3 * 4 + 1


@pytest.mark.parametrize("in_block", [True, False])
def test_a_parameter_that_no_group_covers_raises(make_config, runtime, in_block):
    model = new_model(make_config())
    owner = model.blocks[0] if in_block else model
    owner.mystery = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(UserError, match=r"GPT.PARAMETERS has no rule .*mystery for .*mystery: add one"):
        model.optimizers(make_config(), runtime)


def well_conditioned(rows, cols, seed):
    """A float64 matrix of Frobenius norm 1 whose singular values lie within a factor of four, and its SVD."""
    rank = min(rows, cols)
    u, _ = torch.linalg.qr(randn(rows, rank, seed=seed, dtype=torch.float64))
    v, _ = torch.linalg.qr(randn(cols, rank, seed=seed + 1, dtype=torch.float64))
    s = torch.linspace(0.25, 1, rank, dtype=torch.float64)
    return u, s / s.norm(), v


@pytest.mark.parametrize("rows, cols", [(16, 16), (48, 16), (16, 48), (5, 3)])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_newton_schulz_applies_the_quintic_to_the_singular_values(rows, cols, steps):
    svds = [well_conditioned(rows, cols, seed) for seed in (0, 10, 20)]
    stack = torch.stack([u * s @ v.T for u, s, v in svds])
    result = newton_schulz(stack.float(), [QUINTIC] * steps)
    for (u, s, v), matrix in zip(svds, result, strict=True):
        for _ in range(steps):
            s = QUINTIC[0] * s + QUINTIC[1] * s**3 + QUINTIC[2] * s**5
        torch.testing.assert_close(matrix.double(), u * s @ v.T, rtol=1e-4, atol=1e-5)
        if steps == 5:
            assert 0.6 < s.min() and s.max() < 1.3


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_newton_schulz_of_a_batch_equals_one_by_one(dtype, tolerance):
    stack = randn(4, 24, 40)
    stack = (stack / stack.norm(dim=(1, 2), keepdim=True)).to(dtype)
    batched = newton_schulz(stack, [QUINTIC] * 5)
    single = torch.cat([newton_schulz(matrix[None], [QUINTIC] * 5) for matrix in stack])
    assert batched.dtype == dtype
    torch.testing.assert_close(batched, single, rtol=0, atol=tolerance)


def orthogonalized(u):
    """Five quintic steps in float64, of a matrix of any shape, after division by its Frobenius norm."""
    a, b, c = QUINTIC
    x = u / u.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


SHAPES = [(8, 8), (24, 8), (8, 24), (8, 8), (24, 8), (8, 8), (6, 4)]


@pytest.mark.parametrize("decay", [0, 0.3])
def test_muon_equals_a_plain_reference_over_steps_of_changing_rate_and_momentum(runtime, decay):
    params = [nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    weights = [p.detach().double() for p in params]
    momenta = [torch.zeros_like(w) for w in weights]
    muon = Muon(params, lr=1.0, momentum=0.0, steps=5, runtime=runtime, weight_decay=decay)
    for t, (lr, mu) in enumerate([(0.1, 0.5), (0.05, 0.9), (0.2, 0.95), (0.0, 0.95), (0.03, 0.8)]):
        muon.param_groups[0].update(lr=lr, momentum=mu)
        for i, p in enumerate(params):
            # The scale of a gradient must not matter, and its rows span four orders of magnitude.
            rows = torch.logspace(-2, 2, p.size(0))[:, None] if i % 2 else 1
            p.grad = randn(*p.shape, seed=100 * t + i) * rows * 10.0**-t
            g = p.grad.double()
            momenta[i] = mu * momenta[i] + g
            u = g + mu * momenta[i]
            step = max(1, p.size(0) / p.size(1)) ** 0.5 * orthogonalized(u)
            weights[i] = (1 - lr * decay) * weights[i] - lr * step
        muon.step()
        for i, (p, w) in enumerate(zip(params, weights, strict=True)):
            torch.testing.assert_close(p.detach().double(), w, rtol=1e-4, atol=2e-5, msg=lambda m, i=i: f"{i}: {m}")
            kept = muon.state[p]["momentum_buffer"].double()
            assert ((kept - momenta[i]).abs() <= 1e-6 * momenta[i].norm(dim=1, keepdim=True)).all()


ADAM = {"TIED_EMBED_LR": 0.02, "EMBED_LR": 0.1, "HEAD_LR": 0.03, "SCALAR_LR": 0.04}
ADAM |= {"BETA1": 0.8, "BETA2": 0.9, "ADAM_EPS": 1e-3}
MUON = {"MATRIX_LR": 0.05, "MUON_MOMENTUM": 0.7, "MUON_BACKEND_STEPS": 3, "MUON_WEIGHT_DECAY": 0.9}


@pytest.mark.parametrize("tied", [1, 0])
@pytest.mark.parametrize("embed_decay, scalar_decay", [(0, 0), (0.3, 0), (0.2, 0.4)])
def test_embedding_head_and_vectors_are_trained_by_adamw(make_config, runtime, tied, embed_decay, scalar_decay):
    decays = {"EMBED_WEIGHT_DECAY": embed_decay, "SCALAR_WEIGHT_DECAY": scalar_decay}
    config = make_config(TIE_EMBEDDINGS=tied, **ADAM, **MUON, **decays)
    model = new_model(config)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(randn(*p.shape, seed=i))
    wide, before = copy.deepcopy(model).double(), copy.deepcopy(model)
    adam, muon = model.optimizers(config, runtime)
    (group,) = muon.param_groups
    found = [group[name] for name in ("lr", "momentum", "steps", "weight_decay")]
    assert found == [0.05, 0.7, 3, 0.9]
    rates = {"embed": (0.02 if tied else 0.1, embed_decay), "head": (0.03, embed_decay), "scalar": (0.04, scalar_decay)}
    groups = {kind: group for kind, group in parameter_groups(wide, config, runtime).items() if group}
    trained = {id(p) for kind in groups.keys() & rates.keys() for p in groups[kind]}
    w = {p: (p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in wide.parameters()}
    base = [group["lr"] for group in adam.param_groups]
    for t, scale in enumerate((1.0, 0.5, 0.0, 0.7), 1):
        for i, p in enumerate(model.parameters()):
            p.grad = 0.01 * randn(*p.shape, seed=100 * t + i)
        for group, lr in zip(adam.param_groups, base, strict=True):
            group["lr"] = lr * scale
        adam.step()
        gradients = {q: p.grad.double() for p, q in zip(model.parameters(), wide.parameters(), strict=True)}
        for kind in groups.keys() & rates.keys():
            lr, decay = rates[kind][0] * scale, rates[kind][1]
            for p in groups[kind]:
                (x, m, v), g = w[p], gradients[p]
                m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
                x = (1 - lr * decay) * x - lr * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-3)
                w[p] = (x, m, v)
    for (name, p), q, r in zip(model.named_parameters(), wide.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p.detach().double(), w[q][0], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)
        assert torch.equal(p, r) == (id(q) not in trained), name


def test_muon_leaves_the_gradients_alone_and_survives_a_zero_gradient(runtime):
    params = [nn.Parameter(randn(8, 8, seed=i)) for i in range(2)]
    before = [p.detach().clone() for p in params]
    params[0].grad, params[1].grad = torch.zeros(8, 8), randn(8, 8, seed=5)
    Muon(params, lr=0.1, momentum=0.9, steps=5, runtime=runtime).step()
    assert torch.equal(params[0], before[0]) and torch.equal(params[1].grad, randn(8, 8, seed=5))
    assert params[1].isfinite().all() and not torch.equal(params[1], before[1])


class Ranks:
    """Several ranks as threads of this process, with an all-reduce that waits for all of them."""

    def __init__(self, runtime, world_size):
        self.barrier, self.given, self.own = threading.Barrier(world_size, timeout=60), {}, threading.local()
        self.runtimes = [copy.copy(runtime) for _ in range(world_size)]
        for rank, fake in enumerate(self.runtimes):
            fake.rank, fake.world_size, fake.is_master = rank, world_size, rank == 0

    def all_reduce(self, tensor, *args, **kwargs):
        self.given[self.own.rank] = tensor.clone()
        self.barrier.wait()
        total = sum(self.given[rank] for rank in range(len(self.runtimes)))
        self.barrier.wait()
        tensor.copy_(total)

    def run(self, work):
        def start(rank):
            self.own.rank = rank
            work(rank)

        threads = [threading.Thread(target=start, args=(rank,)) for rank in range(len(self.runtimes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("extra", [{}, {"weight_decay": 0.5}], ids=["plain", "decay"])
def test_three_ranks_equal_one_and_each_momentum_lives_on_one_rank(runtime, monkeypatch, extra):
    def fresh():
        return [nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate(SHAPES)]

    def steps(params, muon):
        for t in range(3):
            for i, p in enumerate(params):
                p.grad = randn(*p.shape, seed=100 * t + i)
            muon.step()

    alone = fresh()
    steps(alone, Muon(alone, lr=0.1, momentum=0.9, steps=5, runtime=runtime, **extra))
    ranks = Ranks(runtime, 3)
    monkeypatch.setattr(train_gpt.dist, "all_reduce", ranks.all_reduce)
    shares = [fresh() for _ in range(3)]
    muons = [Muon(shares[r], lr=0.1, momentum=0.9, steps=5, runtime=ranks.runtimes[r], **extra) for r in range(3)]
    ranks.run(lambda rank: steps(shares[rank], muons[rank]))
    owners = []
    for i, p in enumerate(alone):
        assert torch.equal(shares[0][i], shares[1][i]) and torch.equal(shares[0][i], shares[2][i])
        torch.testing.assert_close(shares[0][i], p, rtol=1e-5, atol=1e-5)
        owners.append([r for r in range(3) if "momentum_buffer" in muons[r].state[shares[r][i]]])
    assert all(len(owner) == 1 for owner in owners)
    counts = [sum(owner == [r] for owner in owners) for r in range(3)]
    assert max(counts) - min(counts) <= 1, "the matrices are shared evenly"
