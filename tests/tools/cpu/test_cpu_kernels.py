"""The CPU's own attention, loss and Newton-Schulz iterations against the same math in float64."""

import contextlib
import math
import subprocess
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import train_gpt

kernels, cpu_kernels = train_gpt.tool("kernels"), train_gpt.tool("cpu/cpu_kernels")


def is_usable(dtype) -> bool:
    try:
        return cpu_kernels.has_kernels(dtype) and bool(cpu_kernels.library(dtype))
    except (OSError, subprocess.CalledProcessError):
        return False


BF16_ONLY = pytest.mark.skipif(not is_usable(torch.bfloat16), reason="no AVX-512 instructions for bf16")
pytestmark = pytest.mark.skipif(not is_usable(torch.float32), reason="no compiler")


@pytest.fixture(params=[pytest.param(torch.bfloat16, marks=BF16_ONLY), torch.float32], ids=str)
def dtype(request):
    return request.param


SHAPE = {
    "vocab_size": 64,
    "num_layers": 2,
    "model_dim": 32,
    "num_heads": 2,
    "num_kv_heads": 1,
    "train_seq_len": 64,
    "train_batch_tokens": 128,
}


@pytest.fixture
def config(dtype):
    return train_gpt.Config(**SHAPE, device="cpu", dtype=str(dtype).removeprefix("torch."), compile="0")


@contextlib.contextmanager
def threads_restored():
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def draw(dtype, B, T, H, K, d, seed=0):
    """q, k, v and the gradient of y, [B, T, heads, d]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, heads, d, generator=generator).to(dtype) for heads in (H, K, K, H)]


def run(attend, tensors, dtype=None):
    """y and the gradients of q, k and v."""
    *inputs, dy = (x.detach().to(dtype or x.dtype) for x in tensors)
    leaves = [x.requires_grad_() for x in inputs]
    y = attend(*(x.transpose(1, 2) for x in leaves)).transpose(1, 2)
    y.backward(dy)
    return [y.detach(), *(x.grad for x in leaves)]


def distance(found, exact) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    "shape", [(3, 256, 4, 2, 40), (1, 1024, 8, 4, 64), (1, 320, 2, 2, 22), (1, 128, 3, 1, 2)], ids=str
)
def test_attention_and_its_gradients_err_no_more_than_plain_matmuls(dtype, shape):
    """In fp32 rounding depends on how sums are ordered: those of one lane here, where a library has several."""
    tensors, longer_sums = draw(dtype, *shape), 1.0 if dtype == torch.bfloat16 else 4.0
    exact = run(train_gpt.grouped_attention, tensors, torch.float64)
    plain, fused = run(kernels.blocked_attention, tensors), run(cpu_kernels.fused_attention, tensors)
    for name, ours, theirs, true in zip("y dq dk dv".split(), fused, plain, exact, strict=True):
        assert distance(ours, true) <= longer_sums * distance(theirs, true), name


def test_sharp_and_flat_attention(dtype):
    """Scores of hundreds, whose exponentials would overflow unless the maximum is subtracted, and scores of 0."""
    for size in (30.0, 0.0):
        q, k, v, dy = draw(dtype, 1, 128, 2, 1, 32)
        exact = run(train_gpt.grouped_attention, [q * size, k, v, dy], torch.float64)
        fused = run(cpu_kernels.fused_attention, [q * size, k, v, dy])
        assert all(x.isfinite().all() for x in fused)
        assert distance(fused[0], exact[0]) < 0.02 and distance(fused[3], exact[3]) < 0.02


def test_no_query_sees_a_later_key_and_no_key_gets_a_gradient_of_an_earlier_query(dtype):
    q, k, v, dy = draw(dtype, 1, 256, 2, 1, 32)
    before = run(cpu_kernels.fused_attention, [q, k, v, dy])[0]
    for place in (1, 15, 16, 63, 64, 200, 255):
        later = [x.clone() for x in (k, v)]
        for x in later:
            x[:, place:] = 7.0
        after = run(cpu_kernels.fused_attention, [q, *later, dy])[0]
        assert torch.equal(before[:, :place], after[:, :place]) and not torch.equal(before, after)
    dy[:, :] = 0
    dy[:, 99] = 1
    *_, dk, dv = run(cpu_kernels.fused_attention, [q, k, v, dy])
    assert not dk[:, 100:].any() and not dv[:, 100:].any() and dv[:, :100].any(-1).all()


def test_the_number_of_threads_and_the_layout_change_nothing(dtype):
    tensors, results = draw(dtype, 2, 128, 4, 2, 24), []
    with threads_restored():
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run(cpu_kernels.fused_attention, tensors))
    apart = [F.pad(x, (0, 8))[..., :-8] for x in tensors]  # rows that are not contiguous
    for other in (results[1], run(cpu_kernels.fused_attention, apart)):
        assert all(map(torch.equal, results[0], other))


def test_what_the_kernel_does_not_take_goes_to_plain_matmuls():
    for T, dtype in ((100, torch.bfloat16), (100, torch.float32), (128, torch.float64)):
        tensors = draw(dtype, 1, T, 2, 1, 16)
        assert torch.equal(*(run(f, tensors)[0] for f in (kernels.fused_attention, kernels.blocked_attention)))


# The loss


class Masked:
    """Like the Mask of records/models/canonical.py, with a random table in which each token may follow itself."""

    def __init__(self, V, seed=0):
        self.allowed = torch.rand(V, V, generator=torch.Generator().manual_seed(seed)) < 0.7
        self.allowed |= torch.eye(V, dtype=torch.bool)
        powers = 2 ** torch.arange(8)
        self.bits = (self.allowed.view(V, V // 8, 8) * powers).sum(-1).to(torch.uint8)

    def __call__(self, logits, tokens):
        return logits.masked_fill(~self.allowed[tokens], -math.inf)


def plain_losses(x, weight, targets, softcap, mask=None, before=None):
    """The model's own computation. A target excluded by the mask counts 0 in training and has no gradient."""
    logits = softcap * torch.tanh(train_gpt.at_least_fp32(x @ weight.mT) / softcap)
    losses = F.cross_entropy(mask(logits, before) if mask else logits, targets, reduction="none")
    return losses.masked_fill(losses == math.inf, 0.0) if mask else losses


def fused_losses(x, weight, targets, softcap, mask=None, before=None):
    model = train_gpt.Model()
    model.tok_emb, model.softcap, model.mask = torch.nn.Embedding(*weight.shape), softcap, mask
    del model.tok_emb.weight
    model.tok_emb.weight = weight
    return cpu_kernels.fused_loss(model, x[None], targets[None], before[None] if mask else None)[0]


def losses_and_gradients(function, dtype, x, weight, *more):
    x, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in (x, weight))
    losses = function(x, weight, *more)
    scale = torch.linspace(0.5, 2.0, len(losses), dtype=losses.dtype)
    (losses * scale).sum().backward()
    return losses.detach(), x.grad, weight.grad


@pytest.mark.parametrize(
    "N, D, V, softcap, size, masked",
    [
        (50, 32, 48, 30.0, 1.0, ""),
        (64, 64, 2048, 15.0, 8.0, ""),
        (3, 16, 16, 40.0, 0.01, ""),
        (50, 32, 48, 30.0, 1.0, "all targets allowed"),
        (30, 16, 2048, 30.0, 1.0, "some excluded"),
    ],
)
def test_losses_and_gradients_are_those_of_the_softcapped_cross_entropy(dtype, N, D, V, softcap, size, masked):
    """No worse than the model's own computation, apart from one more rounding of the loss's own gradient."""
    generator, mask = torch.Generator().manual_seed(N), Masked(V)
    x, weight = (size * torch.randn(rows, D, generator=generator).to(dtype) for rows in (N, V))
    before, targets = (torch.randint(V, (N,), generator=generator) for _ in range(2))
    if masked.startswith("all"):
        targets = torch.where(mask.allowed[before, targets], targets, before)
    excluded = ~mask.allowed[before, targets] if masked else torch.zeros(N, dtype=torch.bool)
    assert bool(excluded.any()) == masked.startswith("some")
    inputs = x, weight, targets, softcap, *([mask, before] if masked else [])
    exact = losses_and_gradients(plain_losses, torch.float64, *inputs)
    plain, fused = (losses_and_gradients(function, dtype, *inputs) for function in (plain_losses, fused_losses))
    assert fused[0].dtype == torch.float32
    for name, ours, theirs, true in zip(("loss", "dx", "dweight"), fused, plain, exact, strict=True):
        once_more = 1e-6 if name == "loss" or ours.dtype == torch.float32 else 2.0**-9
        assert distance(ours, true) <= 1.1 * distance(theirs, true) + once_more, name
    with torch.no_grad():
        scored = fused_losses(*inputs)
    assert torch.equal(scored == math.inf, excluded) and torch.equal(scored[~excluded], fused[0][~excluded])


def test_logits_far_beyond_the_cap_give_finite_losses(dtype):
    x, weight = torch.full((2, 16), 100.0, dtype=dtype), torch.ones(32, 16, dtype=dtype)
    weight[1:] = -1.0  # logits of 1,600 and -1,600
    inputs = x, weight, torch.tensor([0, 5]), 40.0
    losses, dx, dweight = losses_and_gradients(fused_losses, dtype, *inputs)
    exact = losses_and_gradients(plain_losses, torch.float64, *inputs)
    assert torch.allclose(losses.double(), exact[0], atol=1e-4)  # 0 and 80
    assert dx.isfinite().all() and dweight.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_no_number_stays_none(dtype, masked):
    """Regression: a model that had diverged scored like one that predicts uniformly, and the run continued."""
    generator, targets = torch.Generator().manual_seed(0), torch.tensor([0, 5])
    x, weight = (torch.randn(rows, 16, generator=generator).to(dtype) for rows in (2, 32))
    x[1, 3] = math.nan
    assert fused_losses(x, weight, targets, 30.0, Masked(32) if masked else None, targets).isnan().tolist() == [
        False,
        True,
    ]
    q, k, v, dy = draw(dtype, 1, 64, 1, 1, 16)
    q[0, 7, 0, 0] = k[0, 60, 0, 1] = math.nan
    y = cpu_kernels.fused_attention(*(tensor.transpose(1, 2) for tensor in (q, k, v)))[0, 0]
    assert y.isnan().any(-1).nonzero().flatten().tolist() == [7, 60, 61, 62, 63]


# Newton-Schulz


def normed(n, rows, columns):
    stack = torch.randn(n, rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    return (stack / stack.norm(dim=(1, 2), keepdim=True)).bfloat16()


@BF16_ONLY
@pytest.mark.parametrize("shape", [(2, 32, 32), (3, 64, 96), (2, 160, 64), (1, 96, 512), (1, 256, 256)], ids=str)
def test_iterations_err_no_more_than_matmuls_in_bf16(shape):
    stack = normed(*shape)
    for polynomials in ([(3.0, -4.0, 2.0)], [(4.0, -6.0, 3.0), (2.0, -1.5, 0.5), (1.9, -1.3, 0.4)]):
        exact = train_gpt.newton_schulz(stack.double(), polynomials)
        plain, ours = (tool.newton_schulz(stack, polynomials) for tool in (train_gpt, cpu_kernels))
        assert ours.shape == stack.shape and ours.dtype == torch.bfloat16
        assert distance(ours, exact) <= 1.02 * distance(plain, exact)  # the summation order differs
        assert torch.equal(stack, normed(*shape)), "the input is unchanged"


@BF16_ONLY
def test_each_matrix_of_a_stack_is_transformed_as_if_alone():
    stack, steps = normed(5, 64, 32), [train_gpt.Muon.QUINTIC] * 3
    with threads_restored():
        for count in (1, 2):
            torch.set_num_threads(count)
            alone = torch.cat([cpu_kernels.newton_schulz(matrix[None], steps) for matrix in stack])
            assert torch.equal(cpu_kernels.newton_schulz(stack, steps), alone)


@BF16_ONLY
def test_matrices_that_do_not_fit_go_to_torch(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    takes, others = [(4, 32, 32), (3, 32, 32)], [(5, 32, 32), (4, 40, 32), (4, 32, 8), (0, 32, 32)]
    for shape in takes + others:
        assert cpu_kernels.takes_newton_schulz(torch.zeros(shape).bfloat16()) == (shape in takes), shape
    assert not cpu_kernels.takes_newton_schulz(torch.zeros(4, 32, 32))
    for stack in (normed(4, 40, 32), normed(4, 32, 32).float()):
        steps = [train_gpt.Muon.QUINTIC] * 2
        assert torch.equal(kernels.fused_newton_schulz(stack, steps), train_gpt.newton_schulz(stack, steps))


@BF16_ONLY
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_muon_takes_the_same_step_but_for_rounding(config):
    runtime, results = train_gpt.Runtime(config, {}), []
    for fused in (None, kernels.fused_newton_schulz):
        runtime.newton_schulz = fused
        params = [torch.nn.Parameter(matrix.float()) for matrix in normed(4, 64, 32)]
        for p in params:
            p.grad = p.detach().flip(0)
        train_gpt.Muon(params, lr=1.0, momentum=0.9, steps=5, runtime=runtime).step()
        results.append(torch.stack([p.detach() for p in params]))
    assert not torch.equal(results[0], torch.stack([*normed(4, 64, 32).float()]))
    assert float((results[0] - results[1]).norm()) <= 0.01 * float(results[0].norm())


# The choice


def losses_and_parameter_gradients(model, tokens):
    model.zero_grad()
    losses = model(tokens[:, :-1], tokens[:, 1:])
    losses.mean().backward()
    return losses.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_close(ours, theirs, loss, gradient, floor):
    assert torch.allclose(ours[0], theirs[0], atol=loss)
    for p, q in zip(ours[1], theirs[1], strict=True):
        assert float((p - q).norm()) <= gradient * float(q.norm()) + floor


def test_a_model_gets_both_and_trains_as_with_torch_but_for_rounding(config):
    runtime, results = train_gpt.Runtime(config, {}), []
    tokens = torch.randint(64, (2, 65), generator=torch.Generator().manual_seed(0))
    for attention in ("auto", "blocked"):
        model, _, note = train_gpt.build_model(replace(config, attention=attention), runtime)
        if attention == "blocked":
            model.fused_loss = None
        else:
            source = cpu_kernels.SOURCES[runtime.dtype].name
            assert "attention:fused by fused_attention" in note and f"loss:fused by {source} sha256:" in note
            assert bool(runtime.newton_schulz) == (runtime.dtype == torch.bfloat16)
            assert ("\nmuon:fused by cpu_kernels.cpp sha256:" in note) == (runtime.dtype == torch.bfloat16)
        results.append(losses_and_parameter_gradients(model, tokens))
    assert abs(results[0][0].mean() / results[1][0].mean() - 1) < (1e-4 if config.dtype == "bfloat16" else 1e-6)
    assert_close(*results, *((0.02, 0.03) if config.dtype == "bfloat16" else (1e-5, 1e-5)), floor=1e-6)


def test_compiled_as_a_whole_the_model_gives_the_same(config):
    tokens, results = torch.arange(2 * 65).view(2, 65) * 7 % 64, []
    tolerances = (0.02, 0.05) if config.dtype == "bfloat16" else (1e-5, 1e-4)  # bf16 is rounded in other places
    torch._dynamo.utils.counters.clear()
    for switch in "10":
        _, model, note = train_gpt.build_model(replace(config, compile=switch), train_gpt.Runtime(config, {}))
        assert f"\ncompile:{switch}" in note
        results.append(losses_and_parameter_gradients(model, tokens))
        with torch.no_grad():  # another graph
            assert torch.allclose(model(tokens[:, :-1], tokens[:, 1:]), results[-1][0], atol=tolerances[0])
    # The next start finds the graphs: torch caches none with an operator whose derivative it cannot see.
    assert not torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_bypass"]
    assert_close(*results, *tolerances, floor=1e-5)


WIDE = {"train_seq_len": 4096, "train_batch_tokens": 4096}
ODD = {"model_dim": 34, "num_heads": 34, "num_kv_heads": 34}


@pytest.mark.parametrize("change", [{"train_seq_len": 32}, WIDE, ODD], ids=str)
def test_asked_for_where_it_does_not_fit_it_is_an_error_that_says_so(config, change):
    config = replace(config, attention="fused", **change)
    with pytest.raises(train_gpt.UserError, match="ATTENTION=fused wants .*: use ATTENTION=auto"):
        train_gpt.build_model(config, train_gpt.Runtime(config, {}))


def test_without_a_compiler_torch_does_it_and_the_log_says_why(config, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpu_kernels.library.cache_clear()
    try:
        model, _, note = train_gpt.build_model(config, train_gpt.Runtime(config, {}))
    finally:
        cpu_kernels.library.cache_clear()
    assert model.fused_loss is None
    assert "attention:blocked by blocked_attention; fused fused_attention failed: FileNotFoundError" in note
    parts = ("loss", "muon") if config.dtype == "bfloat16" else ("loss",)
    assert all(f"\n{part}:torch; fused failed: FileNotFoundError" in note for part in parts)


@pytest.mark.parametrize("change", [{"vocab_size": 60}, {"logit_softcap": 50.0}], ids=str)
def test_a_loss_that_does_not_fit_is_torchs(config, change):
    config = replace(config, **change)
    model, _, note = train_gpt.build_model(config, train_gpt.Runtime(config, {}))
    assert model.fused_loss is None and "\nloss:torch\n" in note


class Silent(train_gpt.GPT):
    def logits(self, x_BTD):
        return 2 * super().logits(x_BTD)


class Calling(train_gpt.GPT):
    calls_fused_loss = True

    def forward(self, tokens_BT, targets_BT=None):
        return super().forward(tokens_BT, targets_BT)


class Heir(Calling):
    pass


class Changed(Calling):
    def losses(self, logits_BTV, targets_BT):
        return 2 * super().losses(logits_BTV, targets_BT)


class OfSilent(Silent):
    calls_fused_loss = True
    forward = Calling.forward


def test_a_model_that_changes_the_loss_gets_the_kernel_only_if_each_change_says_that_it_calls_it():
    """A class must declare it in its own body: an inherited declaration refers to a different computation."""
    classes = (train_gpt.Model, train_gpt.GPT, Silent, Calling, Heir, Changed, OfSilent)
    assert [c for c in classes if kernels.uses_fused_loss(c)] == [train_gpt.Model, train_gpt.GPT, Calling, Heir]
