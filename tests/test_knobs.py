"""Model-shape knobs, individually and in random combinations, against a slow float64 implementation of the formulas,
forward and backward; and the default model, bit-identical to the first release.

Causality, one graph, precision and parameters: test_contract.py. The techniques of records/models/frontier.py:
tests/records/models/test_techniques.py."""

import hashlib
import shutil

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import artifact_knobs, new_model
from models import knobs as knobs_of
from oracle import ATTENTIONS, assert_equals_the_reference, label, random_tokens, scatter

import train_gpt
from train_gpt import Config

kernels = train_gpt.tool("kernels")


SMALL = knobs_of(
    "VOCAB_SIZE=40 NUM_LAYERS=4 MODEL_DIM=32 NUM_HEADS=4 NUM_KV_HEADS=2 TRAIN_SEQ_LEN=16 TRAIN_BATCH_TOKENS=16"
)
EVERYTHING = knobs_of(
    "NUM_LAYERS=5 MODEL_DIM=24 NUM_HEADS=2 NUM_KV_HEADS=1 MLP_MULT=1.7 ROPE_BASE=50 TIE_EMBEDDINGS=0 LOGIT_SOFTCAP=4"
)
CASES = [{}, EVERYTHING, knobs_of("NUM_LAYERS=1 MODEL_DIM=8 MLP_MULT=0.6 ROPE_BASE=1"), {"NUM_KV_HEADS": "4"}]


def config_of(**knobs) -> Config:
    return Config.load([], SMALL | {name: str(value) for name, value in knobs.items()})


@pytest.mark.parametrize("attend", ATTENTIONS, ids=["blocked", "expanded"])
@pytest.mark.parametrize("knobs", CASES, ids=label)
def test_losses_logits_and_gradients_equal_the_slow_reference(knobs, attend):
    assert_equals_the_reference(config_of(**knobs), attend)


@st.composite
def knob_sets(draw):
    heads, head_dim = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([2, 4, 6, 8]))
    return {
        "NUM_LAYERS": draw(st.integers(1, 5)),
        "MODEL_DIM": heads * head_dim,
        "NUM_HEADS": heads,
        "NUM_KV_HEADS": draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0])),
        "MLP_MULT": draw(st.sampled_from([1, 2, 2.6, 3.1])),
        "ROPE_BASE": draw(st.sampled_from([2, 50, 10_000])),
        "LOGIT_SOFTCAP": draw(st.sampled_from([2, 30])),
        "TIE_EMBEDDINGS": draw(st.integers(0, 1)),
    }


@settings(max_examples=40)
@given(knobs=knob_sets(), seed=st.integers(0, 9), attend=st.sampled_from(ATTENTIONS))
def test_any_combination_of_knobs_equals_the_slow_reference(knobs, seed, attend):
    assert_equals_the_reference(config_of(**knobs), attend, seed=seed, length=6)


def test_a_tiny_softcap_gives_finite_logits():
    config = config_of(LOGIT_SOFTCAP=0.001)
    assert new_model(config)(random_tokens(config, 1, 4)).isfinite().all()


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
@pytest.mark.parametrize("knobs", [{"NUM_LAYERS": 1}, EVERYTHING | {"NUM_LAYERS": 2}], ids=label)
def test_inductor_gives_the_same_losses_and_gradients(knobs):
    """With few layers, since each of inductor's kernels takes a C++ compiler a third of a second."""
    oracle.assert_inductor_agrees(config_of(**knobs))


# The parameters


def test_the_default_model_starts_bit_for_bit_as_ever():
    """The first release's random draws, redone: the same numbers for the same seed, whatever knobs were added since."""
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
    """At a width of 64 the uniform draws are exact in fp32, so the hash is the same on every processor; the embedding's
    normal draws go through each processor's own logarithm and are compared above."""
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
    shape = "NUM_LAYERS=11 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=4 VOCAB_SIZE=8192"
    counts = {}
    for name, knobs in {"plain": {}, "odd width": {"MLP_MULT": 3.3}, "untied": {"TIE_EMBEDDINGS": 0}}.items():
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in new_model(config_of(**knobs_of(shape) | knobs)).parameters())
    assert counts["plain"] == 35_944_536 - (2 * 8 - 5) * 512
    assert counts["plain"] - counts["odd width"] == 11 * 2 * 512 * (2048 - 1690)
    assert counts["untied"] - counts["plain"] == 8192 * 512


def test_all_knobs_of_the_model_are_recorded_in_an_artifact():
    """Every knob that changes the function computed from the weights must be stored with them."""
    assert {*EVERYTHING, *SMALL} <= artifact_knobs()
