"""The techniques of records/models/frontier.py, individually and in random combinations, against float64, forward and
backward; initialization and optimizers of their parameters; the recurrence switch under the compiler; FLOPs."""

import shutil

import models
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import new_model, parameter_groups
from oracle import ATTENTIONS, label, random_tokens, scatter

import train_gpt
from train_gpt import UserError

FrontierConfig, frontier = models.model_file("frontier")
kernels = train_gpt.tool("kernels")

SMALL = models.knobs(
    "VOCAB_SIZE=40 NUM_LAYERS=4 MODEL_DIM=32 NUM_HEADS=4 NUM_KV_HEADS=2 TRAIN_SEQ_LEN=16 TRAIN_BATCH_TOKENS=16 "
    "START_TOKEN=3"
)
EVERYTHING = models.knobs(
    "MLP_SLOPE=0.5 MLP_MULT=1.7 ROPE_DIMS=4 LN_SCALE=1 XSA_LAYERS=2 ATTN_GATE=1 GATED_SKIPS=1 PARALLEL_FROM=3 "
    "SMEAR_GATE=1 LOOP_LAYERS=1-2 LOOP_PASSES=3"
)
EVERYTHING_ELSE = EVERYTHING | models.knobs(
    "NUM_LAYERS=5 MODEL_DIM=8 NUM_HEADS=2 NUM_KV_HEADS=1 ROPE_DIMS=2 X0_MIX=0 XSA_LAYERS=9 PARALLEL_FROM=0 "
    "LOOP_LAYERS=2-4 LOOP_PASSES=2 TIE_EMBEDDINGS=0 LOGIT_SOFTCAP=4 FOLD_SCALES=1 FUSE_QKV=1"
)
CASES = [
    {"MLP_SLOPE": 0.1, "MLP_MULT": 0.6},
    {"ROPE_DIMS": 6, "ROPE_BASE": 50},
    {"ROPE_DIMS": 8},
    {"LN_SCALE": 1},
    {"XSA_LAYERS": 1},
    {"XSA_LAYERS": 3, "NUM_KV_HEADS": 1},
    {"XSA_LAYERS": 99, "NUM_KV_HEADS": 4},
    {"XSA_LAYERS": 2, "XSA_GATE": 1},
    {"ATTN_GATE": 1, "XSA_LAYERS": 9},
    {"ATTN_GATE": 1, "MODEL_DIM": 8},
    {"GATED_SKIPS": 1, "NUM_LAYERS": 5},
    {"GATED_SKIPS": 1, "NUM_LAYERS": 1},
    {"X0_MIX": 0},
    {"PARALLEL_FROM": 0},
    {"PARALLEL_FROM": 3, "LN_SCALE": 1},
    {"SMEAR_GATE": 1, "START_TOKEN": 0},
    {"SMEAR_GATE": 1, "MODEL_DIM": 8},
    {"FOLD_SCALES": 1},
    {"FUSE_QKV": 1},
    {"LOOP_LAYERS": "1-2"},
    {"LOOP_LAYERS": "3-3", "LOOP_PASSES": 4},
    {"LOOP_LAYERS": "0-0", "GATED_SKIPS": 1},
    {"LOOP_LAYERS": "1-2", "NUM_LAYERS": 3, "LOOP_PASSES": 2},
    EVERYTHING,
    EVERYTHING_ELSE,
]
LOOPED = [case for case in CASES if "LOOP_LAYERS" in case]


def config_of(**knobs) -> FrontierConfig:
    return FrontierConfig.load([], {name: str(value) for name, value in (SMALL | knobs).items()})


@pytest.mark.parametrize("knobs", CASES, ids=label)
def test_losses_logits_and_gradients_equal_float64(knobs):
    oracle.assert_equals_the_reference(config_of(**knobs), ATTENTIONS[0])


@pytest.mark.parametrize("knobs", LOOPED, ids=label)
def test_before_the_recurrence_begins_each_layer_runs_once(knobs):
    oracle.assert_equals_the_reference(config_of(**knobs), ATTENTIONS[1], looping=False)


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
        "MLP_SLOPE": draw(st.sampled_from([0, 0.3, 0.5, 1])),
        "MLP_MULT": draw(st.sampled_from([1, 2, 2.6, 3.1])),
        "ROPE_DIMS": draw(st.sampled_from(range(0, head_dim + 1, 2))),
        # With two dimensions, projecting out one leaves little but rounding errors.
        "XSA_LAYERS": draw(st.integers(0, layers + 1)) if head_dim > 2 else 0,
        "PARALLEL_FROM": draw(st.integers(-1, layers - 1)),
        "START_TOKEN": draw(st.integers(0, 4)),
    }
    switches = ("LN_SCALE", "ATTN_GATE", "GATED_SKIPS", "X0_MIX", "SMEAR_GATE", "TIE_EMBEDDINGS")
    for switch in (*switches, "FOLD_SCALES", "FUSE_QKV"):
        knobs[switch] = draw(st.integers(0, 1))
    knobs["XSA_GATE"] = draw(st.integers(0, 1)) if knobs["XSA_LAYERS"] else 0
    if layers > 1 and draw(st.booleans()):
        first = draw(st.integers(0, layers - 1))
        knobs["LOOP_LAYERS"] = f"{first}-{draw(st.integers(first, layers - 1))}"
        knobs["LOOP_PASSES"] = draw(st.integers(2, 4))
    return knobs


@settings(max_examples=40)
@given(knobs=knob_sets(), looping=st.booleans(), seed=st.integers(0, 9), attend=st.sampled_from(ATTENTIONS))
def test_any_combination_of_knobs_equals_float64(knobs, looping, seed, attend):
    oracle.assert_equals_the_reference(config_of(**knobs), attend, looping, seed, length=6)


def test_the_order_of_the_recurrence_by_hand():
    """Independent of the code that both sides of the tests above share."""
    config = config_of(NUM_LAYERS=6, LOOP_LAYERS="2-3", LOOP_PASSES=3)
    model, seen = scatter(new_model(config)), []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, output, i=i: seen.append(i))
    for looping, order in ((True, [0, 1, 2, 3, 2, 3, 2, 3, 4, 5]), (False, [*range(6)])):
        model.looping, seen[:] = looping, []
        model(random_tokens(config, 1, 5))
        assert seen == order == oracle.layer_order(config, looping)


def test_the_compiled_model_of_everything_follows_the_switch_of_the_recurrence():
    """If the graph folded the switch into a constant, the recurrence would stay off forever."""
    config = config_of(**EVERYTHING | {"NUM_LAYERS": 3, "LOOP_LAYERS": "1-1", "LOOP_PASSES": 2, "PARALLEL_FROM": 2})
    model = scatter(new_model(config))
    compiled, graphs = oracle.graphs_of(model)
    for seed in (1, 2):  # the second batch, with starts elsewhere, must reuse the graphs of the first
        tokens, results = random_tokens(config, 2, 17, seed), []
        for looping in (False, True):
            model.looping = looping
            eager, traced = (oracle.losses_and_gradients(run, model, tokens) for run in (model, compiled))
            torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-6)
            results.append(traced[0])
        assert (results[1] - results[0]).abs().max() > 0.01
    assert len(graphs) == 2, "one graph for each state of the switch, and none compiled again"


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
def test_inductor_gives_the_losses_and_gradients_of_a_combination():
    """With one layer, since each of inductor's kernels takes a C++ compiler a third of a second."""
    knobs = {"NUM_LAYERS": 1, "XSA_LAYERS": 1, "XSA_GATE": 1, "ATTN_GATE": 1, "SMEAR_GATE": 1, "PARALLEL_FROM": 0}
    oracle.assert_inductor_agrees(config_of(X0_MIX=0, **knobs))


# The parameters


def test_the_parameters_of_the_frontier_recipe_are_counted_exactly():
    shape = {"NUM_LAYERS": 11, "MODEL_DIM": 512, "NUM_HEADS": 8, "NUM_KV_HEADS": 4, "MLP_MULT": 4, "VOCAB_SIZE": 8192}

    def count(**knobs):
        with torch.device("meta"):
            return sum(p.numel() for p in frontier.GPT(config_of(**shape | knobs)).parameters())

    plain = count()
    assert count(LOOP_LAYERS="3-5", GATED_SKIPS=1) == plain + (2 * 8 - 5) * 512 == 35_944_536
    assert count(ATTN_GATE=1) == plain + 11 * 96 and count(SMEAR_GATE=1) == plain + 13
    assert count(X0_MIX=0) == plain - 11 * 2 * 512 and count(XSA_LAYERS=4, XSA_GATE=1) == plain + 4 * 8


SHAPES = [
    ({"ATTN_GATE": 1}, {f"blocks.{i}.attn.gate": (4, 12) for i in range(4)}),
    ({"ATTN_GATE": 1, "SMEAR_GATE": 1, "MODEL_DIM": 8}, {"blocks.3.attn.gate": (4, 8), "smear": (9,)}),
    ({"XSA_LAYERS": 2, "XSA_GATE": 1}, {f"blocks.{i}.attn.attend.gate": (4,) for i in (2, 3)}),
    ({"GATED_SKIPS": 1, "SMEAR_GATE": 1}, {"skip_gates": (2, 32), "skip_weights": (2, 32), "smear": (13,)}),
    ({"GATED_SKIPS": 1, "NUM_LAYERS": 1}, {"skip_gates": (0, 32), "skip_weights": (0, 32)}),
    ({"LOOP_LAYERS": "1-3", "LOOP_PASSES": 3}, {"skip_weights": (5, 32)}),  # with ten layers in execution order
    ({"X0_MIX": 0, "LOOP_LAYERS": "0-0", "GATED_SKIPS": 1}, {"skip_weights": (3, 32), "skip_gates": (3, 32)}),
]


@pytest.mark.parametrize("knobs, shapes", SHAPES, ids=label)
def test_new_parameters_are_vectors_to_the_optimizer_and_do_not_change_the_others(runtime, knobs, shapes):
    config = config_of(**knobs)
    model = new_model(config)
    parameters, groups = dict(model.named_parameters()), parameter_groups(model, config, runtime)
    assert {name: tuple(parameters[name].shape) for name in shapes} == shapes
    assert all(p.requires_grad == (p.numel() > 0) for p in parameters.values()), "DDP waits for their gradients"
    plain = new_model(config_of(**{name: knobs[name] for name in ("MODEL_DIM", "NUM_LAYERS") if name in knobs}))
    old = dict(plain.named_parameters())
    new = parameters.keys() - old.keys()
    assert new == {name for name in parameters if name.endswith(("gate", "skip_gates", "smear"))}
    assert all((parameters[name] == 0).all() for name in new) and (parameters["skip_weights"] == 1).all()
    assert {id(parameters[name]) for name in new} <= set(map(id, groups["scalar"]))
    gone = {f"blocks.{i}.resid_mix" for i in range(4)} if "X0_MIX" in knobs else set()
    assert old.keys() - parameters.keys() == gone
    same = old.keys() & parameters.keys() - {"skip_weights"}
    assert all(torch.equal(old[name], parameters[name]) for name in same), "the draws stay"


def test_at_their_initial_values_gates_change_nothing():
    """2 * sigmoid(0) is 1, and lambda and tanh(0) are 0."""
    one, other = new_model(config_of()), new_model(config_of(ATTN_GATE=1, SMEAR_GATE=1, XSA_LAYERS=2, XSA_GATE=1))
    other.load_state_dict(scatter(one).state_dict(), strict=False)
    tokens = random_tokens(config_of(), 2, 9)
    assert torch.equal(one(tokens), other(tokens))


# Values of knobs

BAD = "ROPE_DIMS=7 ROPE_DIMS=-2 ROPE_DIMS=10 MLP_SLOPE=inf LN_SCALE=2 XSA_LAYERS=-1 XSA_LAYERS=1.5 PARALLEL_FROM=-2 "
BAD += "START_TOKEN=-1 START_TOKEN=40 LOOP_PASSES=1 LOOP_START=-0.1 LOOP_START=1.1 LOOP_LAYERS=3-2 LOOP_LAYERS=2 "
BAD += "LOOP_LAYERS=1- LOOP_LAYERS=-1-2 LOOP_LAYERS=1-4 LOOP_LAYERS=1-2-3 LOOP_LAYERS=1,2 LOOP_LAYERS=1.0-2 "
BAD += "LOOP_LAYERS=\u0661-\u0662"
EDGES = "ROPE_DIMS=0 ROPE_DIMS=2 ROPE_DIMS=8 MLP_SLOPE=1 XSA_LAYERS=1000 PARALLEL_FROM=3 START_TOKEN=0 LOOP_START=0 "
EDGES += "LOOP_START=1 LOOP_LAYERS=0-0 LOOP_LAYERS=0-3 LOOP_LAYERS=3-3"


@pytest.mark.parametrize("text", BAD.split())
def test_a_bad_value_is_a_user_error_that_names_the_knob(text):
    name, value = text.split("=")
    with pytest.raises(UserError, match=name):
        new_model(config_of(**{"LOOP_LAYERS": "1-2", name: value}))


def test_a_single_layer_cannot_recur():
    """While the recurrence is off it would have skips without a gradient, and DDP would wait for one."""
    with pytest.raises(UserError, match="LOOP_LAYERS=0-0.*2 or more"):
        config_of(NUM_LAYERS=1, LOOP_LAYERS="0-0")


@pytest.mark.parametrize("text", EDGES.split())
def test_a_value_at_the_edge_is_taken(text):
    name, value = text.split("=")
    config = config_of(**{name: value})
    assert str(getattr(config, name.lower())).removesuffix(".0") == value
    assert new_model(config)(random_tokens(config, 1, 4)).isfinite().all()


# FLOPs


@pytest.mark.parametrize(
    "knobs",
    [
        {"PARALLEL_FROM": 0, "XSA_LAYERS": 3, "GATED_SKIPS": 1, "ROPE_DIMS": 4, "LN_SCALE": 1},
        {"LOOP_LAYERS": "1-2", "LOOP_PASSES": 3},
        {"TIE_EMBEDDINGS": 0, "MLP_SLOPE": 0.5, "NUM_LAYERS": 3, "CONTEXTS": "4@0,16@0.5"},
    ],
    ids=label,
)
def test_flops_per_token_are_those_that_torch_counts(knobs):
    config = config_of(**knobs)
    model, totals = new_model(config, kernels.expanded_attention), set()
    for looping in (False, bool(config.loop_layers)):
        model.looping = looping
        counted = oracle.counted_flops(model, config)
        assert model.flops_per_token(config.train_seq_len) == counted
        totals.add(counted)
    assert len(totals) == 1 + bool(config.loop_layers), "layers that run again count again"


def test_what_the_gates_take_is_left_out():
    """They are matmuls with twelve input channels, negligible compared with the others."""
    config = config_of(ATTN_GATE=1, SMEAR_GATE=1)
    model = new_model(config, kernels.expanded_attention)
    gates = 6 * config.num_layers * config.num_heads * 12
    smear = oracle.counted_flops(model, config) - model.flops_per_token(config.train_seq_len) - gates
    assert 0 <= smear <= 6 * 12, "one more row of twelve, if torch counts a product with a vector"
