"""Knobs of the model's shape: each of them, and random combinations, against a slow float64 reading of the formulas,
forward and backward; causality; one graph for the compiler; and that the default model is, bit for bit, what it was in
the first release. The techniques of records/models/frontier.py are tested in tests/models/."""

import functools
import hashlib
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import artifact_knobs, new_model, parameter_groups

import train_gpt
from train_gpt import Config, UserError, rope_tables

kernels = train_gpt.tool("kernels")

SMALL = {
    "VOCAB_SIZE": 40,
    "NUM_LAYERS": 4,
    "MODEL_DIM": 32,
    "NUM_HEADS": 4,
    "NUM_KV_HEADS": 2,
    "TRAIN_SEQ_LEN": 16,
    "TRAIN_BATCH_TOKENS": 16,
}
EVERYTHING = {
    "NUM_LAYERS": 5,
    "MODEL_DIM": 24,
    "NUM_HEADS": 2,
    "NUM_KV_HEADS": 1,
    "MLP_MULT": 1.7,
    "ROPE_BASE": 50,
    "TIE_EMBEDDINGS": 0,
    "LOGIT_SOFTCAP": 4,
}
CASES = [
    {},
    {"MLP_MULT": 0.6},
    {"MLP_MULT": 2.7},
    {"MLP_MULT": 3},
    {"ROPE_BASE": 50},
    {"NUM_KV_HEADS": 1},
    {"NUM_KV_HEADS": 4},
    {"NUM_LAYERS": 1},
    {"NUM_LAYERS": 5},
    {"MODEL_DIM": 8},
    {"TIE_EMBEDDINGS": 0},
    {"LOGIT_SOFTCAP": 4},
    EVERYTHING,
]
# A short sequence has several blocks.
ATTENTIONS = [functools.partial(kernels.blocked_attention, block=4), kernels.expanded_attention]


def label(value):
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None


def config_of(**knobs) -> Config:
    return Config.load([], {name: str(value) for name, value in (SMALL | knobs).items()})


def scatter(model, seed=0):
    """Random values in every parameter: at their initial ones half of the knobs do nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith(("tok_emb.weight", "lm_head.weight")):
                p.copy_(0.4 * noise)
            elif name.endswith(".weight"):
                p.copy_(noise * p.size(1) ** -0.5)
            else:
                p.copy_(0.8 + 0.4 * noise)
    return model


def random_tokens(config, batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


# The reference: the formulas in float64, one sequence, one head and one token at a time.


def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()


def turn(x_Td, base):
    """RoPE: dimensions i and i + d/2 are the parts of a complex number that turns by -t * f.

    By the model's own tables, which are fp32: test_rope_tables_are_those_of_float64 looks after them."""
    d = x_Td.size(1)
    cos, sin = (table.double() for table in rope_tables(len(x_Td), d, base))
    rows = []
    for t, x in enumerate(x_Td):
        z = torch.complex(x[: d // 2], x[d // 2 :]) * torch.complex(cos[t], -sin[t])
        rows.append(torch.cat([z.real, z.imag]))
    return torch.stack(rows)


def slow_attention(w, u_TD, config):
    d, group = config.model_dim // config.num_heads, config.num_heads // config.num_kv_heads
    heads = []
    for h in range(config.num_heads):
        kv = slice(h // group * d, (h // group + 1) * d)
        q = turn(norm(u_TD @ w["attn.c_q.weight"][h * d : (h + 1) * d].T), config.rope_base)
        k = turn(norm(u_TD @ w["attn.c_k.weight"][kv].T), config.rope_base)
        q, v = q * w["attn.q_gain"][h], u_TD @ w["attn.c_v.weight"][kv].T
        rows = []
        for t in range(len(u_TD)):
            e = torch.exp(k[: t + 1] @ q[t] / math.sqrt(d))
            rows.append(e / e.sum() @ v[: t + 1])
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=1) @ w["attn.proj.weight"].T


def slow_mlp(w, u, config):
    hidden = u @ w["mlp.fc.weight"].T
    assert hidden.size(-1) == round(config.mlp_mult * config.model_dim)
    return hidden.clamp(min=0) ** 2 @ w["mlp.proj.weight"].T


def slow_block(w, layer, x, x0, config):
    b = {name.removeprefix(f"blocks.{layer}."): p for name, p in w.items() if name.startswith(f"blocks.{layer}.")}
    x = b["resid_mix"][0] * x + b["resid_mix"][1] * x0
    x = x + b["attn_scale"] * slow_attention(b, norm(x), config)
    return x + b["mlp_scale"] * slow_mlp(b, norm(x), config)


def slow_logits(w, tokens_T, config):
    x = x0 = norm(w["tok_emb.weight"][tokens_T])
    pushed, pops, half = [], 0, config.num_layers // 2
    for layer in range(config.num_layers):
        if layer >= half and pushed:
            x = x + w["skip_weights"][pops] * pushed.pop()
            pops += 1
        x = slow_block(w, layer, x, x0, config)
        if layer < half:
            pushed.append(x)
    assert not pushed
    z = norm(x) @ (w["tok_emb.weight"] if config.tie_embeddings else w["lm_head.weight"]).T
    return config.logit_softcap * torch.tanh(z / config.logit_softcap)


def assert_equals_the_reference(config, attend, seed=0, length=9):
    """In float64 on both sides, so that nothing but a fault can make a difference, however badly conditioned."""
    model = scatter(new_model(config, attend, torch.float64).double(), seed)
    tokens = random_tokens(config, 2, length + 1, seed)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    logits = torch.stack([slow_logits(w, row, config) for row in inputs])
    losses = torch.logsumexp(logits, dim=-1) - logits.gather(-1, targets[..., None])[..., 0]
    losses.mean().backward()
    ours = model(inputs, targets)
    ours.mean().backward()
    assert ours.dtype == torch.float64
    torch.testing.assert_close(model(inputs), logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours, losses, rtol=1e-9, atol=1e-9)
    for name, p in model.named_parameters():
        if p.numel():  # one layer has no skips
            assert p.grad is not None, f"{name} has no gradient"
            scale = w[name].grad.abs().max()
            assert scale > 0, f"the reference does not use {name}"
            assert (p.grad - w[name].grad).abs().max() <= 1e-9 * scale, name


@pytest.mark.parametrize("attend", ATTENTIONS, ids=["blocked", "expanded"])
@pytest.mark.parametrize("knobs", CASES, ids=label)
def test_losses_logits_and_gradients_equal_the_slow_reference(knobs, attend):
    assert_equals_the_reference(config_of(**knobs), attend)


@st.composite
def knob_sets(draw):
    heads = draw(st.sampled_from([1, 2, 4]))
    head_dim = draw(st.sampled_from([2, 4, 6, 8]))
    layers = draw(st.integers(1, 5))
    knobs = {
        "NUM_LAYERS": layers,
        "MODEL_DIM": heads * head_dim,
        "NUM_HEADS": heads,
        "NUM_KV_HEADS": draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0])),
        "MLP_MULT": draw(st.sampled_from([1, 2, 2.6, 3.1])),
        "ROPE_BASE": draw(st.sampled_from([2, 50, 10_000])),
        "LOGIT_SOFTCAP": draw(st.sampled_from([2, 30])),
        "TIE_EMBEDDINGS": draw(st.integers(0, 1)),
    }
    return knobs


@settings(max_examples=40)
@given(knobs=knob_sets(), seed=st.integers(0, 9), attend=st.sampled_from(ATTENTIONS))
def test_any_combination_of_knobs_equals_the_slow_reference(knobs, seed, attend):
    assert_equals_the_reference(config_of(**knobs), attend, seed, length=6)


@pytest.mark.parametrize("knobs", [{}, {"NUM_LAYERS": 5, "MLP_MULT": 1.7, "TIE_EMBEDDINGS": 0}], ids=label)
def test_bf16_is_close_to_float32_and_parameters_and_gradients_stay_fp32(knobs):
    config = config_of(**knobs)
    tokens, losses, grads = random_tokens(config, 8, 17), [], []
    for dtype in (torch.float32, torch.bfloat16):
        model = scatter(new_model(config, kernels.expanded_attention, dtype))
        losses.append(model(tokens[:, :-1], tokens[:, 1:]))
        losses[-1].mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        assert {p.dtype for p in model.parameters()} == {g.dtype for g in grads[-1].values()} == {torch.float32}
        assert losses[-1].dtype == torch.float32
    assert 0 < (losses[0] - losses[1]).abs().max() < 0.2  # not 0: bf16 was really used
    assert losses[0].mean().item() == pytest.approx(losses[1].mean().item(), abs=0.01)
    for name, grad in grads[0].items():
        assert F.cosine_similarity(grad.flatten(), grads[1][name].flatten(), dim=0) > 0.99, name


# Causality


@pytest.mark.parametrize("attend", ATTENTIONS, ids=["blocked", "expanded"])
@pytest.mark.parametrize("knobs", CASES, ids=label)
def test_a_changed_token_moves_no_earlier_logit(knobs, attend):
    config, length = config_of(**knobs), 10
    model = scatter(new_model(config, attend))
    tokens = random_tokens(config, 2, length)
    with torch.no_grad():
        before = model(tokens)
        for t in range(length):
            changed = tokens.clone()
            changed[0, t] = (changed[0, t] + 7) % config.vocab_size
            after = model(changed)
            assert torch.equal(after[0, :t], before[0, :t]) and torch.equal(after[1], before[1])
            assert (after[0, t] != before[0, t]).any(), "the present must see it"


@pytest.mark.parametrize("knobs", [{}, EVERYTHING], ids=["default", "everything"])
def test_no_gradient_comes_from_the_future(knobs):
    config, length = config_of(**knobs), 10
    model, seen = scatter(new_model(config, ATTENTIONS[0])), []
    model.tok_emb.register_forward_hook(lambda module, args, output: seen.append(output))
    logits = model(random_tokens(config, 1, length))
    for t in range(length):
        (grad,) = torch.autograd.grad(logits[0, t].square().sum(), seen[0], retain_graph=True)
        reached = (grad[0].abs().sum(-1) > 0).tolist()
        assert reached[t] and not any(reached[t + 1 :])
        assert all(reached[: t + 1]), "all the past is seen"


# One graph


def graphs_of(model):
    """(model compiled without code generation, its list of graphs)."""
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True, dynamic=False), graphs


def losses_and_gradients(run, model, tokens):
    model.zero_grad()
    losses = run(tokens[:, :-1], tokens[:, 1:])
    losses.mean().backward()
    return losses.detach(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("knobs", [{}, EVERYTHING], ids=["default", "everything"])
def test_a_model_traces_into_one_graph_with_equal_losses_and_gradients(knobs):
    config = config_of(**knobs | {"NUM_LAYERS": 3})
    model = scatter(new_model(config))
    compiled, graphs = graphs_of(model)
    for seed in (1, 2):
        tokens = random_tokens(config, 2, 17, seed)
        eager, traced = (losses_and_gradients(run, model, tokens) for run in (model, compiled))
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
@pytest.mark.parametrize("knobs", [{"NUM_LAYERS": 1}, EVERYTHING | {"NUM_LAYERS": 2}])
def test_inductor_gives_the_losses_and_gradients_of_combinations(knobs):
    """In few layers, since each of its kernels takes a C++ compiler a third of a second."""
    config = config_of(**knobs)
    model, tokens = scatter(new_model(config)), random_tokens(config, 2, 17)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    eager, fused = (losses_and_gradients(run, model, tokens) for run in (model, compiled))
    torch.testing.assert_close(fused, eager, rtol=1e-5, atol=2e-6)


# The parameters


def test_the_default_model_starts_bit_for_bit_as_ever():
    """The draws of the first release, redone: the same numbers for the same seed, whatever knobs have come since."""
    config = Config()
    generator, expected = torch.Generator().manual_seed(1337), {}

    def matrix(name, rows, cols):
        expected[name] = torch.empty(rows, cols).uniform_(-(cols**-0.5), cols**-0.5, generator=generator)

    expected["skip_weights"] = torch.ones(4, 512)
    expected["tok_emb.weight"] = torch.empty(1024, 512).normal_(std=0.005, generator=generator)
    for i in range(9):
        block = f"blocks.{i}"
        expected[f"{block}.attn_scale"] = expected[f"{block}.mlp_scale"] = torch.ones(512)
        expected[f"{block}.resid_mix"] = torch.stack([torch.ones(512), torch.zeros(512)])
        expected[f"{block}.attn.q_gain"] = torch.full((8,), 1.5)
        matrix(f"{block}.attn.c_q.weight", 512, 512)
        matrix(f"{block}.attn.c_k.weight", 256, 512)
        matrix(f"{block}.attn.c_v.weight", 256, 512)
        expected[f"{block}.attn.proj.weight"] = torch.zeros(512, 512)
        matrix(f"{block}.mlp.fc.weight", 1024, 512)
        expected[f"{block}.mlp.proj.weight"] = torch.zeros(512, 1024)
    model = new_model(config)
    assert [name for name, _ in model.named_parameters()] == list(expected), "names or their order have changed"
    for name, p in model.named_parameters():
        assert torch.equal(p, expected[name]), f"the same seed gives another initial {name}"


GOLDEN = "9c92e75ae7253e1363ee9eb78b81e475702fd73d431ccd90f8d2461c3e794f3f"


def test_the_initial_values_have_their_golden_hash():
    """At a width of 64 the uniform draws are exact in fp32, so the hash is that of every processor; the normal ones of
    the embedding go through each processor's own logarithm and are compared above."""
    model = new_model(Config(model_dim=64, vocab_size=256, num_layers=3))
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(p.shape)}\n".encode())
        if name != "tok_emb.weight":
            digest.update(p.detach().numpy().astype("<f4").tobytes())
    assert digest.hexdigest() == GOLDEN, (
        "names, shapes or initial values of the default model have changed: a run of an old configuration no longer "
        "repeats, and checkpoints and artifacts may not load. If that is meant, say so in the log and put this hash in"
    )


def first_release(w, tokens, config):
    """The same operations in the same order as before there were knobs."""
    d, half = config.model_dim // config.num_heads, config.num_layers // 2
    cos, sin = (table[: tokens.size(1), None] for table in train_gpt.rope_tables(16, d, 10_000.0))

    def rms(x):
        return F.rms_norm(x, (x.size(-1),), eps=2.0**-23)

    def turned(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)

    x = x0 = rms(F.embedding(tokens, w["tok_emb.weight"]))
    skips = []
    for i in range(config.num_layers):
        b = {name.removeprefix(f"blocks.{i}."): p for name, p in w.items() if name.startswith(f"blocks.{i}.")}
        if i >= half and skips:
            x = x + w["skip_weights"][i - half] * skips.pop()
        x = b["resid_mix"][0] * x + b["resid_mix"][1] * x0
        u = rms(x)
        q, k, v = (F.linear(u, b[f"attn.c_{c}.weight"]).unflatten(-1, (-1, d)) for c in "qkv")
        q, k = turned(rms(q)) * b["attn.q_gain"][:, None], turned(rms(k))
        y = kernels.blocked_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)
        x = x + b["attn_scale"] * F.linear(y, b["attn.proj.weight"])
        x = x + b["mlp_scale"] * F.linear(F.relu(F.linear(rms(x), b["mlp.fc.weight"])).square(), b["mlp.proj.weight"])
        skips += [x] if i < half else []
    return 30.0 * torch.tanh(F.linear(rms(x), w["tok_emb.weight"]).float() / 30.0)


@pytest.mark.parametrize("layers", [1, 4, 5])
def test_the_default_forward_and_backward_are_bit_for_bit_those_of_the_first_release(layers):
    config = config_of(NUM_LAYERS=layers)
    model, tokens = scatter(new_model(config, kernels.blocked_attention)), random_tokens(config, 2, 17)
    w = {name: p.detach().clone().requires_grad_(p.numel() > 0) for name, p in model.named_parameters()}
    logits = first_release(w, tokens[:, :-1], config)
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").mean().backward()
    assert torch.equal(model(tokens[:, :-1]), logits)
    model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    for name, p in model.named_parameters():
        assert p.numel() == 0 or torch.equal(p.grad, w[name].grad), name


def test_the_parameters_of_a_wider_model_are_counted_exactly():
    shape = {
        "NUM_LAYERS": 11,
        "MODEL_DIM": 512,
        "NUM_HEADS": 8,
        "NUM_KV_HEADS": 4,
        "MLP_MULT": 4,
        "VOCAB_SIZE": 8192,
        "TRAIN_SEQ_LEN": 2048,
        "TRAIN_BATCH_TOKENS": 786_432,
    }
    counts = {}
    for name, knobs in {"plain": {}, "odd width": {"MLP_MULT": 3.3}, "untied": {"TIE_EMBEDDINGS": 0}}.items():
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in new_model(config_of(**shape | knobs)).parameters())
    assert counts["plain"] == 35_944_536 - (2 * 8 - 5) * 512
    assert counts["plain"] - counts["odd width"] == 11 * 2 * 512 * (2048 - 1690)
    assert counts["untied"] - counts["plain"] == 8192 * 512


@pytest.mark.parametrize("knobs", CASES, ids=label)
def test_every_parameter_is_trained_in_fp32_by_one_optimizer(runtime, knobs):
    config = config_of(**knobs)
    model = new_model(config)
    parameters, groups = dict(model.named_parameters()), parameter_groups(model, config, runtime)
    assert sum(map(len, groups.values())) == len(parameters) == len({id(p) for g in groups.values() for p in g})
    assert all(p.dtype == torch.float32 and (p.requires_grad or not p.numel()) for p in parameters.values())
    assert parameters["skip_weights"].shape == (len(model.blocks) // 2, model.tok_emb.embedding_dim)


@pytest.mark.parametrize("knobs", CASES, ids=label)
def test_every_parameter_that_waits_for_a_gradient_gets_one(knobs):
    """DDP waits for each."""
    config = config_of(**knobs)
    model, tokens = scatter(new_model(config)), random_tokens(config, 2, 17)
    model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None if p.requires_grad else p.numel() == 0, name
        if p.numel():
            assert p.grad.abs().max() > 0, name


# Bad values


@pytest.mark.parametrize(
    "text",
    [
        "MLP_MULT=0",
        "MLP_MULT=-1",
        "MLP_MULT=nan",
        "MLP_MULT=x",
        "MLP_MULT=0.001",
        "NUM_LAYERS=0",
        "NUM_HEADS=x",
        "NUM_KV_HEADS=3",
        "MODEL_DIM=30",
        "ROPE_BASE=0.5",
        "ROPE_BASE=inf",
        "LOGIT_SOFTCAP=0",
        "TIE_EMBEDDINGS=yes",
        "QK_GAIN_INIT=nan",
    ],
)
def test_a_bad_value_is_a_user_error_that_names_the_knob(text):
    name, value = text.split("=")
    with pytest.raises(UserError, match=name):
        new_model(config_of(**{name: value}))


@pytest.mark.parametrize(
    "text",
    [
        "MLP_MULT=0.5",
        "MLP_MULT=1",
        "NUM_LAYERS=1",
        "NUM_KV_HEADS=4",
        "MODEL_DIM=8",
        "ROPE_BASE=1",
        "LOGIT_SOFTCAP=0.001",
    ],
)
def test_a_value_at_the_edge_is_taken(text):
    name, value = text.split("=")
    config = config_of(**{name: value})
    model = new_model(config)
    assert str(getattr(config, name.lower())).removesuffix(".0") == value.removesuffix(".0")
    assert model(random_tokens(config, 1, 4)).isfinite().all()


def test_all_model_knobs_are_recorded_in_an_artifact():
    """Whatever changes the function that the weights stand for must travel with them."""
    assert {*EVERYTHING, *SMALL} <= artifact_knobs()
