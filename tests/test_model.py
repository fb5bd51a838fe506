"""Model: names and counts, the whole forward and backward against a slow float64 reading of the design, causality,
RoPE, the attention functions, initialisation, precision, the choice of a backend, traceability."""

import functools
import math
import re
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from models import new_model
from torch import nn

import train_gpt
from train_gpt import UserError, grouped_attention, rope_tables, rotate

kernels = train_gpt.tool("kernels")

ATTENTIONS = [kernels.blocked_attention, kernels.expanded_attention, grouped_attention]
# Blocks of 4, so that a short sequence has several.
SHORT_BLOCKS = functools.partial(kernels.blocked_attention, block=4)
SHORT_ATTENTIONS = [SHORT_BLOCKS, kernels.expanded_attention, grouped_attention]
SWITCHES = ("flash", "cudnn", "mem_efficient", "math")


@pytest.fixture(autouse=True)
def all_kernels():
    """choose_attention pins torch's global switches: every test starts and ends with all kernels allowed."""

    def allow():
        for switch in SWITCHES:
            getattr(torch.backends.cuda, f"enable_{switch}_sdp")(True)

    allow()
    yield
    allow()


def scatter(model, seed=0):
    """Random values in every parameter: at the initial ones half of the model multiplies by zero or by one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith(("tok_emb.weight", "lm_head.weight")):
                p.copy_(0.4 * noise)
            elif p.ndim == 2 and name.endswith(".weight"):
                p.copy_(noise * p.size(1) ** -0.5)
            else:
                p.copy_(0.8 + 0.5 * noise)
    return model


def random_tokens(config, batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


# The reference: the design's words in float64, one sequence, one head and one query at a time.


def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()


def turn(x_Td, base):
    """RoPE as complex numbers: dimension i is the real part, i + d/2 the imaginary; position t turns it by -t * f."""
    T, d = x_Td.shape
    rows = []
    for t in range(T):
        angles = torch.tensor([-t * base ** (-2 * i / d) for i in range(d // 2)], dtype=torch.float64)
        z = torch.complex(x_Td[t, : d // 2], x_Td[t, d // 2 :]) * torch.polar(torch.ones_like(angles), angles)
        rows.append(torch.cat([z.real, z.imag]))
    return torch.stack(rows)


def slow_attention(w, x_TD, config):
    d, group = config.model_dim // config.num_heads, config.num_heads // config.num_kv_heads
    heads = []
    for h in range(config.num_heads):
        kv = h // group
        q = turn(norm(x_TD @ w["attn.c_q.weight"][h * d : (h + 1) * d].T), config.rope_base) * w["attn.q_gain"][h]
        k = turn(norm(x_TD @ w["attn.c_k.weight"][kv * d : (kv + 1) * d].T), config.rope_base)
        v = x_TD @ w["attn.c_v.weight"][kv * d : (kv + 1) * d].T
        rows = []
        for t in range(len(x_TD)):
            e = torch.exp(k[: t + 1] @ q[t] / math.sqrt(d))
            rows.append(e / e.sum() @ v[: t + 1])
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=1) @ w["attn.proj.weight"].T


def slow_logits(w, tokens_T, config):
    x = x0 = norm(w["tok_emb.weight"][tokens_T])
    pushed, half = [], config.num_layers // 2
    for i in range(config.num_layers):
        b = {name.removeprefix(f"blocks.{i}."): p for name, p in w.items() if name.startswith(f"blocks.{i}.")}
        if i >= half and pushed:
            x = x + w["skip_weights"][i - half] * pushed.pop()
        x = b["resid_mix"][0] * x + b["resid_mix"][1] * x0
        x = x + b["attn_scale"] * slow_attention(b, norm(x), config)
        hidden = (norm(x) @ b["mlp.fc.weight"].T).clamp(min=0)
        x = x + b["mlp_scale"] * ((hidden * hidden) @ b["mlp.proj.weight"].T)
        if i < half:
            pushed.append(x)
    z = norm(x) @ (w["tok_emb.weight"] if config.tie_embeddings else w["lm_head.weight"]).T
    return config.logit_softcap * torch.tanh(z / config.logit_softcap)


@pytest.mark.parametrize("attend", SHORT_ATTENTIONS)
@pytest.mark.parametrize(
    "shape",
    [
        {"NUM_LAYERS": 1, "NUM_KV_HEADS": 4, "MLP_MULT": 3},
        {"NUM_LAYERS": 2, "TIE_EMBEDDINGS": 0, "LOGIT_SOFTCAP": 4},
        {"NUM_LAYERS": 5, "NUM_KV_HEADS": 1, "MLP_MULT": 1, "ROPE_BASE": 50},
        {"NUM_LAYERS": 4, "MODEL_DIM": 24, "LOGIT_SOFTCAP": 3},
    ],
)
def test_losses_logits_and_gradients_equal_the_slow_reference(make_config, attend, shape):
    config = make_config(**shape)
    model = scatter(new_model(config, attend))
    tokens = random_tokens(config, batch=2, length=11)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    w = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    logits = torch.stack([slow_logits(w, row, config) for row in inputs])
    losses = -torch.log(torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True))
    losses = losses.gather(-1, targets[..., None])[..., 0]
    losses.mean().backward()
    ours = model(inputs, targets)
    ours.mean().backward()
    torch.testing.assert_close(ours.double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(inputs).double(), logits, rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        if p.numel() == 0:  # one layer has no skips
            continue
        scale = w[name].grad.abs().max()
        assert scale > 0, f"{name} has no gradient: the reference does not use it"
        assert (p.grad - w[name].grad).abs().max() < 2e-5 * scale, name


@pytest.mark.parametrize("tied", [True, False])
def test_default_model_has_the_reference_names_shapes_and_count(tied):
    model = new_model(train_gpt.Config(tie_embeddings=tied))
    D, F, KV = 512, 1024, 256
    expected = {"tok_emb.weight": (1024, D), "skip_weights": (4, D)} | ({} if tied else {"lm_head.weight": (1024, D)})
    for i in range(9):
        expected |= {
            f"blocks.{i}.{name}": shape
            for name, shape in {
                "attn_scale": (D,),
                "mlp_scale": (D,),
                "resid_mix": (2, D),
                "attn.c_q.weight": (D, D),
                "attn.c_k.weight": (KV, D),
                "attn.c_v.weight": (KV, D),
                "attn.proj.weight": (D, D),
                "attn.q_gain": (8,),
                "mlp.fc.weight": (F, D),
                "mlp.proj.weight": (D, F),
            }.items()
        }
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == expected  # no buffer is saved
    assert sum(p.numel() for p in model.parameters()) == 17_059_912 + (0 if tied else 1024 * D)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("tied, tolerance", [(1, 5e-3), (0, 1e-6)])  # an untied head starts at zero
def test_untrained_loss_is_log_of_the_vocabulary(make_config, tied, tolerance):
    config = make_config(TIE_EMBEDDINGS=tied)
    tokens = random_tokens(config, batch=8, length=33)
    with torch.no_grad():
        loss = new_model(config)(tokens[:, :-1], tokens[:, 1:]).mean()
    assert float(loss) == pytest.approx(math.log(config.vocab_size), abs=tolerance)


def test_losses_are_those_of_a_probability_distribution(make_config):
    """Summed over every possible target, exp(-loss) is 1 at every position."""
    config = make_config()
    model, V = scatter(new_model(config)), config.vocab_size
    inputs = random_tokens(config, batch=1, length=6).expand(V, -1)
    targets = torch.arange(V)[:, None].expand(-1, 6)
    with torch.no_grad():
        total = model(inputs, targets).double().neg().exp().sum(0)
    torch.testing.assert_close(total, torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("attend", SHORT_ATTENTIONS)
def test_no_gradient_comes_from_the_future_and_all_the_past_is_seen(make_config, attend):
    config, length = make_config(), 11
    model, seen = scatter(new_model(config, attend)), []
    model.tok_emb.register_forward_hook(lambda module, args, output: seen.append(output))
    logits = model(random_tokens(config, batch=1, length=length))
    for t in range(length):
        (grad,) = torch.autograd.grad(logits[0, t].square().sum(), seen[0], retain_graph=True)
        reached = grad[0].abs().sum(-1) > 0
        assert reached.tolist() == [i <= t for i in range(length)]


@pytest.mark.parametrize("attend", SHORT_ATTENTIONS)
def test_a_changed_token_moves_no_earlier_logit_or_loss(make_config, attend):
    config, length = make_config(), 11
    model = scatter(new_model(config, attend))
    tokens = random_tokens(config, batch=2, length=length + 1)
    with torch.no_grad():
        losses, logits = model(tokens[:, :-1], tokens[:, 1:]), model(tokens[:, :-1])
        for t in range(length):
            changed = tokens.clone()
            changed[0, t] = (changed[0, t] + 1) % config.vocab_size
            new_losses, new_logits = model(changed[:, :-1], changed[:, 1:]), model(changed[:, :-1])
            assert torch.equal(new_logits[0, :t], logits[0, :t]) and torch.equal(new_logits[1], logits[1])
            # The loss before t has token t as its target; those before it neither see nor predict it.
            assert torch.equal(new_losses[0, : max(t - 1, 0)], losses[0, : max(t - 1, 0)])
            assert torch.equal(new_losses[1], losses[1])
            assert (new_logits[0, t:] != logits[0, t:]).any(-1).all(), "the present and the future must see it"


def test_shorter_sequences_than_the_tables_give_the_same_prefix(make_config):
    config = make_config()
    model, tokens = scatter(new_model(config)), random_tokens(config, batch=2, length=32)
    torch.testing.assert_close(model(tokens[:, :7]), model(tokens)[:, :7], rtol=1e-5, atol=1e-5)


def test_rope_tables_are_float64_to_fp32_rounding_and_tell_all_positions_apart():
    cos, sin = rope_tables(4096, 64, 10_000.0)
    assert cos.shape == sin.shape == (4096, 32) and cos.dtype == sin.dtype == torch.float32
    angles = [[t * 10_000.0 ** (-2 * i / 64) for i in range(32)] for t in range(4096)]
    angles = torch.tensor(angles, dtype=torch.float64)
    # An angle in fp32 is off by a few half-ulps of itself (position times rounded frequency), its cosine by one more.
    bound = angles * 3 * 2.0**-24 + 2.0**-23
    assert ((cos - angles.cos()).abs() <= bound).all() and ((sin - angles.sin()).abs() <= bound).all()
    for dtype in (torch.float32, torch.bfloat16):  # cast last: even in bf16 no two positions merge
        rows = torch.cat([cos, sin], dim=1).to(dtype).float().numpy()
        assert len({row.tobytes() for row in rows}) == 4096


def test_a_bf16_model_keeps_its_rope_tables_in_fp32(make_config):
    model = new_model(make_config(TRAIN_SEQ_LEN=1024, TRAIN_BATCH_TOKENS=1024), grouped_attention, torch.bfloat16)
    cos, sin = rope_tables(1024, 8, 10_000.0)
    tables = model.positions
    assert torch.equal(tables.cos.view_as(cos), cos) and torch.equal(tables.sin.view_as(sin), sin)


def test_rotation_keeps_norms_and_makes_products_depend_on_the_distance_only():
    d, T = 16, 40
    cos, sin = (table.double()[:, None] for table in rope_tables(T, d, 100.0))
    q, k = torch.randn(2, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotated_q, rotated_k = (rotate(x.expand(T, 1, d), cos, sin)[:, 0] for x in (q, k))
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(T), rtol=1e-6, atol=0)
    products = rotated_q @ rotated_k.T
    for distance in range(-T + 2, T - 1):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    first = products[0]
    assert (first[1:] - first[:-1]).abs().min() > 1e-3, "different distances must give different products"


@pytest.mark.parametrize("attend", ATTENTIONS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 5, 127, 128, 129, 300])
def test_attention_forward_and_backward_equal_float64(attend, kv_heads, length):
    generator = torch.Generator().manual_seed(length)
    # As the model passes them: [B, T, heads, d] transposed, so not contiguous.
    q, k, v = (torch.randn(2, length, n, 8, generator=generator).requires_grad_() for n in (4, kv_heads, kv_heads))
    upstream = torch.randn(2, 4, length, 8, generator=generator)
    y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    (y * upstream).sum().backward()
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    past = torch.ones(length, length, dtype=torch.float64).tril()
    heads = []
    for h in range(4):
        qh, kh, vh = (x[:, :, n] for x, n in zip(wide, (h, h * kv_heads // 4, h * kv_heads // 4), strict=True))
        e = torch.exp(qh @ kh.mT / math.sqrt(8)) * past
        heads.append(e / e.sum(-1, keepdim=True) @ vh)
    expected = torch.stack(heads, dim=1)
    (expected * upstream).sum().backward()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for x, reference in zip((q, k, v), wide, strict=True):
        torch.testing.assert_close(x.grad.double(), reference.grad, rtol=1e-5, atol=2e-5)


def named(model, *endings):
    found = [p.detach() for name, p in model.named_parameters() if name.removesuffix(".weight").endswith(endings)]
    assert found
    return found


@pytest.mark.parametrize("tied, std", [(1, 0.005), (0, 1.0)])
def test_initial_values_follow_the_rules(make_config, tied, std):
    model = new_model(make_config(TIE_EMBEDDINGS=tied, MODEL_DIM=128, QK_GAIN_INIT=2.5))
    (embedding,) = named(model, "tok_emb")
    assert float(embedding.std()) == pytest.approx(std, rel=0.03) and abs(float(embedding.mean())) < 0.03 * std
    assert float(embedding.abs().max()) > 3.5 * std, "normal, not uniform"
    for w in named(model, "c_q", "c_k", "c_v", "fc"):
        bound = w.size(1) ** -0.5
        assert 0.99 * bound < w.abs().max() <= bound and abs(float(w.mean())) < 0.03 * bound
        assert float(w.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    for w in named(model, "attn.proj", "mlp.proj", *([] if tied else ["lm_head"])):
        assert (w == 0).all()
    for w in named(model, "attn_scale", "mlp_scale", "skip_weights"):
        assert (w == 1).all()
    for w in named(model, "resid_mix"):
        assert (w[0] == 1).all() and (w[1] == 0).all()
    for w in named(model, "q_gain"):
        assert (w == 2.5).all()
    stds = named(new_model(make_config(TIED_EMBED_INIT_STD=0.5)), "tok_emb")[0].std()
    assert float(stds) == pytest.approx(0.5, rel=0.03)


def test_initial_weights_depend_on_the_seed_and_on_nothing_else(make_config):
    states = []
    for seed, disturb in ((1, 0), (1, 99), (2, 0)):
        torch.manual_seed(disturb)
        states.append(new_model(make_config(SEED=seed)).state_dict())
    first, same, other = states
    assert all(torch.equal(first[name], same[name]) for name in first)
    drawn = [name for name in first if first[name].unique().numel() > 2]
    assert len(drawn) == 1 + 2 * 4 and not any(torch.equal(first[name], other[name]) for name in drawn)
    assert len({first[name].flatten()[:4].numpy().tobytes() for name in drawn}) == len(drawn), "no two drawn alike"


def test_a_parameter_without_an_initialisation_rule_raises(make_config):
    model = new_model(make_config())
    model.blocks[1].mystery = nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError, match=r"GPT.PARAMETERS has no rule blocks\.mystery for blocks\.1\.mystery: add one"):
        model.init_weights(make_config())


@pytest.mark.parametrize("attend", ATTENTIONS)
def test_bf16_is_close_to_float32_and_loss_and_gradients_stay_fp32(make_config, attend):
    config = make_config(LOGIT_SOFTCAP=5)
    tokens = random_tokens(config, batch=4, length=33)
    losses, grads = [], []
    for dtype in (torch.float32, torch.bfloat16):
        model = scatter(new_model(config, attend, dtype))
        losses.append(model(tokens[:, :-1], tokens[:, 1:]))
        losses[-1].mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        assert losses[-1].dtype == model(tokens[:, 1:]).dtype == torch.float32
        assert {grad.dtype for grad in grads[-1].values()} == {torch.float32}
    assert 0 < (losses[0] - losses[1]).abs().max() < 0.2  # not 0: bf16 was really used
    assert losses[0].mean().item() == pytest.approx(losses[1].mean().item(), abs=0.01)
    for name, grad in grads[0].items():
        cosine = nn.functional.cosine_similarity(grad.flatten(), grads[1][name].flatten(), dim=0)
        assert cosine > 0.99, name


def test_logits_stay_within_the_softcap(make_config):
    config = make_config(LOGIT_SOFTCAP=7)
    model = scatter(new_model(config))
    with torch.no_grad():
        model.tok_emb.weight.mul_(50)
        logits = model(random_tokens(config, batch=2, length=16))
    assert 6.99 < logits.abs().max() <= 7


@pytest.mark.parametrize(
    "name, works",
    [
        ("auto", True),
        ("flash", True),
        ("math", True),
        ("blocked", True),
        ("cudnn", False),
        ("efficient", False),
    ],
)
def test_each_attention_backend_on_the_cpu_works_or_is_a_user_error(make_config, runtime, name, works):
    config = make_config(ATTENTION=name)
    if not works:
        with pytest.raises(UserError, match=f"ATTENTION={name} .*cpu.*{name} grouped_attention failed: .+") as error:
            kernels.choose_attention(config, runtime, compiled=False)
        assert f"{name} expanded_attention failed: " in str(error.value)
        return
    attend, note = kernels.choose_attention(config, runtime, compiled=False)
    chosen = "blocked" if name == "auto" else name  # the fastest on a CPU at this length
    assert note.startswith(f"attention:{chosen} by {attend.__name__}")
    enabled = [switch for switch in SWITCHES if getattr(torch.backends.cuda, f"{switch}_sdp_enabled")()]
    assert enabled == (list(SWITCHES) if chosen == "blocked" else [chosen]), "our own kernel needs no switch"
    model, tokens = scatter(new_model(config, attend)), random_tokens(config, batch=2, length=9)
    other = scatter(new_model(config, kernels.blocked_attention))
    torch.testing.assert_close(model(tokens), other(tokens), rtol=1e-5, atol=1e-5)


def test_auto_on_the_cpu_avoids_quadratic_memory_for_long_sequences(make_config, runtime):
    config = make_config(TRAIN_SEQ_LEN=2112, TRAIN_BATCH_TOKENS=2112)
    assert kernels.choose_attention(config, runtime, compiled=False)[1].startswith("attention:flash")


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no backward kernel\nfor this")


def test_a_backend_that_fails_is_passed_over_and_the_log_says_why(make_config, runtime, monkeypatch):
    tried = []

    def broken(q, k, v):
        tried.append((tuple(q.shape), tuple(k.shape), tuple(v.shape), q.dtype))
        return FailsBackward.apply(kernels.expanded_attention(q, k, v))

    monkeypatch.setattr(kernels, "grouped_attention", broken)
    attend, note = kernels.choose_attention(make_config(ATTENTION="math"), runtime, compiled=False)
    assert attend is kernels.expanded_attention
    assert note == (
        "attention:math by expanded_attention; math broken failed: RuntimeError('no backward kernel\\nfor this')"
    )
    assert tried == [((8, 4, 32, 8), (8, 2, 32, 8), (8, 2, 32, 8), torch.float32)], "proved on a real micro-batch"


def test_a_backend_that_gives_other_values_is_passed_over(make_config, runtime, monkeypatch):
    """Regression: it was enough not to fail, as a mask that lets a token see the next one does not."""

    def sees_the_next(q, k, v):
        seen = torch.ones(q.size(2), q.size(2), dtype=torch.bool).tril(1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    monkeypatch.setattr(kernels, "grouped_attention", sees_the_next)
    attend, note = kernels.choose_attention(make_config(ATTENTION="math"), runtime, compiled=False)
    assert attend is kernels.expanded_attention
    assert re.search(r"; math sees_the_next failed: RuntimeError\('it errs by [\d.]+ of the largest value'\)$", note)


def test_the_proof_of_a_backend_takes_fewer_sequences_where_memory_is_short(make_config, runtime, monkeypatch):
    tried = []

    def small(q, k, v):
        tried.append(len(q))
        if len(q) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return kernels.expanded_attention(q, k, v)

    monkeypatch.setattr(kernels, "grouped_attention", small)
    attend, note = kernels.choose_attention(make_config(ATTENTION="math"), runtime, compiled=False)
    assert (attend, note, tried) == (small, "attention:math by small", [8, 4, 2])


# ATTENTION=fastest, and what the log says of what was lost


@pytest.fixture
def gpu(make_config, monkeypatch):
    """Function: choose_attention on a GPU that is not there, whose backends fail or take so many seconds; (function,
    its log lines, the backends tried). Which backend it is shows in SDPA's switches, or in the function."""

    def choose(asked, seconds, capability=(9, 0), others=None):
        tried = []

        def name_of(attend):
            if attend is kernels.flash3_attention:
                return "flash3"
            (switch,) = [switch for switch in SWITCHES if getattr(torch.backends.cuda, f"{switch}_sdp_enabled")()]
            return switch.removeprefix("mem_")

        def prove(attend, config, runtime, rows):
            tried.append(name_of(attend))
            if tried[-1] not in seconds:
                raise RuntimeError("no kernel")

        config, names = make_config(ATTENTION=asked), train_gpt.Config.knobs()["ATTENTION"].metadata["allowed"][2]
        theirs = [others.get(name, math.inf) if others else 0.0 for name in names]
        runtime = SimpleNamespace(
            device=torch.device("cuda"),
            dtype=torch.bfloat16,
            world_size=2 if others else 1,
            all_reduce=lambda ours: [a + b for a, b in zip(ours, theirs, strict=True)],
        )
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(kernels, "prove_attention", prove)
        attend, note = kernels.choose_attention(config, runtime, False, lambda attend, *_: seconds[name_of(attend)])
        assert name_of(attend) == re.match(r"attention:(\w+) by ", note)[1], "SDPA is pinned to what is chosen"
        return attend, note, tried

    return choose


TIMES = "; forward and backward of a sequence in a layer, ms: "


@pytest.mark.parametrize(
    "seconds, expected",
    [
        (
            {"flash3": 0.003, "cudnn": 0.0011, "flash": 0.002, "efficient": 0.00444},
            f"attention:cudnn by grouped_attention{TIMES}cudnn 1.1, flash 2, flash3 3, efficient 4.44",
        ),
        (
            {"flash3": 0.001, "cudnn": 0.0011, "flash": 0.002, "efficient": 0.004},
            f"attention:flash3 by flash3_attention{TIMES}flash3 1, cudnn 1.1, flash 2, efficient 4",
        ),
        (
            {"cudnn": 0.0011, "flash": 0.001, "efficient": 0.004},
            f"attention:flash by grouped_attention{TIMES}flash 1, cudnn 1.1, efficient 4; "
            "flash3 flash3_attention failed: "
            "RuntimeError('no kernel')",
        ),
    ],
    ids=["cudnn", "flash3", "flash"],
)
def test_the_fastest_attention_of_those_that_are_proved_is_taken_and_all_times_are_told(gpu, seconds, expected):
    _, note, tried = gpu("fastest", seconds)
    assert note == expected, "without a warning: what failed cannot be faster than cuDNN was here"
    assert list(dict.fromkeys(tried)) == ["flash3", "cudnn", "flash", "efficient"], "math keeps all scores"


def test_where_nothing_else_runs_it_is_plain_products(gpu):
    note = gpu("fastest", {"math": 0.5}, capability=(8, 0))[1]
    assert note.startswith(f"attention:math by grouped_attention{TIMES}math 500; flash grouped_attention failed")


def test_ranks_choose_the_attention_that_all_of_them_have_and_that_is_the_fastest_for_all(gpu):
    ours = {"flash3": 0.001, "cudnn": 0.002, "flash": 0.003, "efficient": 0.004}
    note = gpu("fastest", ours, others={"cudnn": 0.009, "flash": 0.003, "efficient": 0.004})[1]
    assert note == f"attention:flash by grouped_attention{TIMES}flash 3, efficient 4, cudnn 5.5"


@pytest.mark.parametrize(
    "asked, seconds, capability, warned",
    [
        ("auto", ["flash", "efficient"], (9, 0), True),
        ("fastest", ["flash", "efficient"], (9, 0), True),
        ("auto", ["cudnn", "flash"], (9, 0), False),
        ("auto", ["flash3", "flash"], (9, 0), False),
        ("flash", ["flash", "cudnn"], (9, 0), False),
        ("auto", ["flash"], (8, 0), False),
        ("auto", ["flash"], (10, 0), False),
    ],
)
def test_a_hopper_gpu_without_its_own_attention_is_warned_of(gpu, asked, seconds, capability, warned):
    note = gpu(asked, dict.fromkeys(seconds, 1.0), capability)[1]
    assert ("\nwarning: attention by flash, since neither FlashAttention 3 nor cuDNN works" in note) == warned
    assert ("10 to 20 ms a step" in note and "install flash_attn_interface" in note) == warned


@pytest.mark.parametrize("function", ["prove_attention", "time_attention"])
def test_attention_is_proved_and_timed_with_the_shapes_and_strides_of_the_model(make_config, runtime, function):
    config, seen = make_config(TRAIN_BATCH_TOKENS=96), []

    def attend(q, k, v):
        seen.append([(x.shape, x.stride()) for x in (q, k, v)])
        y = kernels.expanded_attention(q, k, v)
        y.requires_grad and y.register_hook(lambda dy: seen[-1].append((dy.shape, dy.stride())))
        return y

    losses = new_model(config, attend)(*(random_tokens(config, batch=3, length=32),) * 2)
    model, seen[:] = seen[:], []
    getattr(kernels, function)(attend, config, runtime, 3)
    if function == "time_attention":  # what comes back from the output projection
        losses.mean().backward()
        assert seen[0][3] == (torch.Size([3, 4, 32, 8]), (1024, 8, 32, 1))
    assert len(model) == 2 and all(shapes[:3] == model[0][:3] for shapes in (*model, *seen))


def test_the_time_of_attention_is_the_median_for_one_sequence_of_synchronized_rounds(make_config, runtime, monkeypatch):
    events, clock = [], iter([0.0, 90.0, 100.0, 103.0, 200.0, 206.0, 300.0, 330.0])
    monkeypatch.setattr(kernels, "time", SimpleNamespace(perf_counter=lambda: events.append("time") or next(clock)))
    monkeypatch.setattr(runtime, "synchronize", lambda: events.append("synchronize"))
    seconds = kernels.time_attention(kernels.blocked_attention, make_config(), runtime, 2, rounds=3)
    assert seconds == 3.0, "of 3, 6 and 30 seconds for two sequences; the first round only warms up"
    assert events == ["synchronize", "time"] * 8


def test_the_fastest_attention_of_this_machine(make_config, runtime):
    config = make_config(ATTENTION="fastest")
    attend, note = kernels.choose_attention(config, runtime, compiled=False)
    name, function, times = re.fullmatch(rf"attention:(\w+) by (\w+){TIMES}([^;]*)", note).groups()
    times = {name: float(ms) for name, ms in (text.split(" ") for text in times.split(", "))}
    assert set(times) == {"blocked", "flash"} and times[name] == min(times.values()) and function == attend.__name__


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
def test_compiled_code_that_is_kept_does_not_bring_back_another_backend():
    """torch's key for it leaves SDPA's switches out: pytorch issue 185449."""
    inputs = [torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3)]
    for name in ("flash", "math", "flash"):
        kernels.pin_attention(name)
        torch._dynamo.reset()
        y = torch.compile(grouped_attention, fullgraph=True, dynamic=False)(*inputs)
        with torch.autograd.profiler.profile() as profile:
            y.sum().backward()
        ran = any("flash_attention_for_cpu_backward" in event.key for event in profile.key_averages())
        assert ran == (name == "flash"), f"{name} was asked for"
    torch._dynamo.reset()


@pytest.mark.parametrize("attend", [kernels.blocked_attention, kernels.expanded_attention])
def test_the_whole_model_traces_into_one_graph_with_equal_losses_and_gradients(make_config, attend):
    config = make_config(NUM_LAYERS=3)
    model, graphs = scatter(new_model(config, attend)), []

    def backend(graph, examples):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    results = []
    for run in (model, compiled):
        for seed in (1, 2):  # the second batch must reuse the first one's graph
            tokens = random_tokens(config, batch=2, length=33, seed=seed)
            model.zero_grad()
            losses = run(tokens[:, :-1], tokens[:, 1:])
            losses.mean().backward()
            results.append((losses.detach(), [p.grad.clone() for p in model.parameters()]))
    assert len(graphs) == 1
    for eager, traced in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-6)


def test_flash_attention_3_is_one_graph_with_the_model(make_config, runtime, monkeypatch):
    """Regression: what imports it must be traceable, or the first step of a GPU that has it ends the run."""
    calls = []

    def flash_attn_func(q_BTHd, k_BTKd, v_BTKd, causal):
        calls.append(causal)
        return kernels.blocked_attention(*(x.transpose(1, 2) for x in (q_BTHd, k_BTKd, v_BTKd))).transpose(1, 2), None

    module = ModuleType("flash_attn_interface")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    config = make_config(ATTENTION="flash3")
    attend, note = kernels.choose_attention(config, runtime, compiled=False)
    assert note == "attention:flash3 by flash3_attention" and calls == [True]
    models = [new_model(config, attend), new_model(config, kernels.blocked_attention)]
    tokens = torch.randint(config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    for model in models:
        scatter_ = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=scatter_))
    torch._dynamo.reset()
    compiled = torch.compile(models[0], backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, tokens), models[1](tokens, tokens))
    torch._dynamo.reset()


def test_flash_attention_3_that_is_not_there_is_said_so(make_config, runtime):
    with pytest.raises(train_gpt.UserError, match="flash3 flash3_attention failed: ModuleNotFoundError"):
        kernels.choose_attention(make_config(ATTENTION="flash3"), runtime, compiled=False)
