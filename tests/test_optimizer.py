"""Optimizer: the partition of the parameters, Adam's settings, Newton-Schulz and Muon against float64 references,
decay, ranks that share the work, a state that survives being saved."""

import copy
import io
import threading

import pytest
import torch
from models import new_model, parameter_groups
from torch import nn

import train_gpt
from train_gpt import Muon, UserError, newton_schulz

kernels = train_gpt.tool("kernels")

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


@pytest.mark.parametrize("shape, in_block", [((4,), True), ((4, 4), False), ((2, 4, 4), True)])
def test_a_parameter_that_no_group_covers_raises(make_config, runtime, shape, in_block):
    model = new_model(make_config())
    owner = model.blocks[0] if in_block else model
    owner.mystery = nn.Parameter(torch.zeros(shape))
    with pytest.raises(UserError, match=r"GPT.PARAMETERS has no rule .*mystery for .*mystery: add one"):
        model.optimizers(make_config(), runtime)


@pytest.mark.parametrize("tied", [1, 0])
def test_each_group_gets_its_own_rate_and_the_common_settings(make_config, runtime, tied):
    config = make_config(
        TIE_EMBEDDINGS=tied,
        TIED_EMBED_LR=0.01,
        EMBED_LR=0.02,
        HEAD_LR=0.03,
        SCALAR_LR=0.04,
        MATRIX_LR=0.05,
        BETA1=0.8,
        BETA2=0.9,
        ADAM_EPS=1e-6,
        MUON_MOMENTUM=0.7,
        MUON_BACKEND_STEPS=3,
    )
    model = new_model(config)
    adam, muon = model.optimizers(config, runtime)
    rates = {p: group["lr"] for optimizer in (adam, muon) for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        if name.endswith(VECTORS):
            expected = 0.04
        elif name.startswith("blocks"):
            expected = 0.05
        else:
            expected = 0.03 if name == "lm_head.weight" else (0.01 if tied else 0.02)
        assert rates[p] == expected, name
    for group in adam.param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.9), 1e-6, 0)
    (group,) = muon.param_groups
    assert (group["momentum"], group["steps"]) == (0.7, 3)


def test_adam_steps_equal_its_formula(make_config, runtime):
    config = make_config(BETA1=0.8, BETA2=0.9, ADAM_EPS=1e-3, SCALAR_LR=0.04, TIED_EMBED_LR=0.02)
    model = new_model(config)
    adam = model.optimizers(config, runtime)[0]
    cases = [(model.tok_emb.weight, 0.02), (model.blocks[0].attn_scale, 0.04), (model.blocks[1].attn.q_gain, 0.04)]
    references = [(p.detach().double(), torch.zeros_like(p).double(), torch.zeros_like(p).double()) for p, _ in cases]
    for t in range(1, 5):
        for i, (p, lr) in enumerate(cases):
            p.grad = 0.01 * randn(*p.shape, seed=10 * t + i)
            w, m, v = references[i]
            m, v = 0.8 * m + 0.2 * p.grad.double(), 0.9 * v + 0.1 * p.grad.double() ** 2
            w = w - lr * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-3)
            references[i] = (w, m, v)
        adam.step()
    for (p, _), (w, _, _) in zip(cases, references, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-6)


def well_conditioned(rows, cols, seed):
    """A float64 matrix of Frobenius norm 1 whose singular values lie within a factor of four; its SVD."""
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
    values = torch.linalg.svdvals(batched.float())
    assert 0.6 < values.min() and values.max() < 1.3


def orthogonalised(u):
    """Five quintic steps in float64, of a matrix of any shape, from its Frobenius norm."""
    a, b, c = QUINTIC
    x = u / u.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


SHAPES = [(8, 8), (24, 8), (8, 24), (8, 8), (24, 8), (8, 8), (6, 4)]


def test_muon_equals_a_plain_reference_over_steps_of_changing_rate_and_momentum(runtime):
    params = [nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    weights = [p.detach().double() for p in params]
    momenta = [torch.zeros_like(w) for w in weights]
    muon = Muon(params, lr=1.0, momentum=0.0, steps=5, runtime=runtime)
    for t, (lr, mu) in enumerate([(0.1, 0.5), (0.05, 0.9), (0.2, 0.95), (0.0, 0.95), (0.03, 0.8)]):
        muon.param_groups[0].update(lr=lr, momentum=mu)
        for i, p in enumerate(params):
            g = p.grad = randn(*p.shape, seed=100 * t + i) * 10.0**-t  # the size of a gradient must not matter
            momenta[i] = mu * momenta[i] + g
            u = g + mu * momenta[i]
            weights[i] = weights[i] - lr * max(1, p.size(0) / p.size(1)) ** 0.5 * orthogonalised(u.double())
        muon.step()
        for i, (p, w) in enumerate(zip(params, weights, strict=True)):
            torch.testing.assert_close(p.detach().double(), w, rtol=1e-4, atol=2e-5, msg=lambda m, i=i: f"{i}: {m}")


def uneven(*shape, seed):
    """Rows whose sizes span four orders of magnitude."""
    return randn(*shape, seed=seed) * torch.logspace(-2, 2, shape[0])[:, None]


@pytest.mark.parametrize("decay", [0, 0.3])
def test_muon_with_decay_equals_the_formulas(make_config, runtime, decay):
    config = make_config(MATRIX_LR=0.05, MUON_WEIGHT_DECAY=decay, NUM_LAYERS=1)
    model = new_model(config)
    muon = model.optimizers(config, runtime)[1]
    (group,) = muon.param_groups
    with torch.no_grad():
        for i, p in enumerate(group["params"]):
            p.copy_(randn(*p.shape, seed=i))
    weights = [p.detach().double() for p in group["params"]]
    momenta = [torch.zeros_like(w) for w in weights]
    for t, (scale, mu) in enumerate([(1.0, 0.5), (0.5, 0.9), (0.0, 0.9), (2.0, 0.95)]):  # the decay follows the rate
        lr = group["lr"] = 0.05 * scale
        group["momentum"] = mu
        for i, p in enumerate(group["params"]):
            p.grad = uneven(*p.shape, seed=100 * t + i) * 10.0**-t
            momenta[i] = mu * momenta[i] + p.grad.double()
            u = p.grad.double() + mu * momenta[i]
            shape_factor = max(1, p.size(0) / p.size(1)) ** 0.5
            weights[i] = (1 - lr * decay) * weights[i] - lr * shape_factor * orthogonalised(u)
        muon.step()
        for i, (p, w) in enumerate(zip(group["params"], weights, strict=True)):
            torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=2e-5, msg=lambda m, i=i: f"{i}: {m}")
            kept = muon.state[p]["momentum_buffer"].double()
            assert ((kept - momenta[i]).abs() <= 1e-6 * momenta[i].norm(dim=1, keepdim=True)).all()


@pytest.mark.parametrize("tied", [1, 0])
@pytest.mark.parametrize("embed_decay, scalar_decay", [(0, 0), (0.3, 0), (0, 0.3), (0.2, 0.4)])
def test_decay_of_embedding_head_and_vectors_is_that_of_adamw(make_config, runtime, tied, embed_decay, scalar_decay):
    config = make_config(
        TIE_EMBEDDINGS=tied,
        EMBED_WEIGHT_DECAY=embed_decay,
        SCALAR_WEIGHT_DECAY=scalar_decay,
        TIED_EMBED_LR=0.02,
        EMBED_LR=0.1,
        HEAD_LR=0.03,
        SCALAR_LR=0.04,
        BETA1=0.8,
        BETA2=0.9,
        ADAM_EPS=1e-3,
        MUON_WEIGHT_DECAY=0.9,
    )
    model = new_model(config)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(randn(*p.shape, seed=i))
    wide = copy.deepcopy(model).double()
    adam = model.optimizers(config, runtime)[0]
    settings = {
        "embed": (0.02 if tied else 0.1, embed_decay),
        "head": (0.03, embed_decay),
        "scalar": (0.04, scalar_decay),
    }
    groups = parameter_groups(wide, config, runtime)
    reference = torch.optim.AdamW(
        [
            {"params": groups[name], "lr": lr, "weight_decay": decay}
            for name, (lr, decay) in settings.items()
            if groups[name]
        ],
        betas=(0.8, 0.9),
        eps=1e-3,
    )
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in (adam, reference)]
    for t, scale in enumerate((1.0, 0.5, 0.0, 0.7)):
        for i, (p, q) in enumerate(zip(model.parameters(), wide.parameters(), strict=True)):
            p.grad = 0.01 * randn(*p.shape, seed=100 * t + i)
            q.grad = p.grad.double()
        for optimizer, base in zip((adam, reference), rates, strict=True):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * scale
            optimizer.step()
    before = new_model(config)
    for (name, p), q, r in zip(model.named_parameters(), wide.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)
        assert not torch.equal(p, r), name


def test_muon_leaves_the_gradients_alone_and_survives_a_zero_gradient(runtime):
    params = [nn.Parameter(randn(8, 8, seed=i)) for i in range(2)]
    before = [p.detach().clone() for p in params]
    params[0].grad, params[1].grad = torch.zeros(8, 8), randn(8, 8, seed=5)
    Muon(params, lr=0.1, momentum=0.9, steps=5, runtime=runtime).step()
    assert torch.equal(params[0], before[0]) and torch.equal(params[1].grad, randn(8, 8, seed=5))
    assert params[1].isfinite().all() and not torch.equal(params[1], before[1])


class Ranks:
    """Several ranks as threads of this process: an all-reduce that waits for all of them."""

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


def test_saved_and_loaded_optimizers_continue_bit_for_bit(make_config, runtime):
    config = make_config()

    def steps(model, optimizers, first):
        for t in range(first, first + 3):
            for i, p in enumerate(model.parameters()):
                p.grad = randn(*p.shape, seed=100 * t + i)
            for optimizer in optimizers:
                optimizer.step()

    model = new_model(config, kernels.blocked_attention)
    optimizers = model.optimizers(config, runtime)
    steps(model, optimizers, first=0)
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in (model, *optimizers)], buffer)
    buffer.seek(0)
    resumed = new_model(make_config(SEED=5), kernels.blocked_attention)
    resumed_optimizers = resumed.optimizers(config, runtime)
    for part, state in zip((resumed, *resumed_optimizers), torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(state)
    steps(model, optimizers, first=3)
    steps(resumed, resumed_optimizers, first=3)
    for (name, p), q in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert [g["lr"] for o in resumed_optimizers for g in o.param_groups] == [0.03, 0.02, 0.02]
