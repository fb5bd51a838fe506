"""The techniques of records/models/frontier.py: each of them, and random combinations, against a slow float64 reading
of the formulas, forward and backward; causality; one graph for the compiler, whichever way the recurrence is switched;
what their parameters start as and who trains them; FLOPs; and Muon's options."""

import copy
import shutil

import models
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import new_model, parameter_groups
from oracle import (
    ATTENTIONS,
    assert_equals_the_reference,
    counted_flops,
    graphs_of,
    label,
    layer_order,
    losses_and_gradients,
    random_tokens,
    scatter,
    slow_logits,
)

import train_gpt
from train_gpt import UserError

FrontierConfig, frontier = models.model_file("frontier")
kernels = train_gpt.tool("kernels")

SMALL = {
    "VOCAB_SIZE": 40,
    "NUM_LAYERS": 4,
    "MODEL_DIM": 32,
    "NUM_HEADS": 4,
    "NUM_KV_HEADS": 2,
    "TRAIN_SEQ_LEN": 16,
    "TRAIN_BATCH_TOKENS": 16,
    "START_TOKEN": 3,
}
EVERYTHING = {
    "MLP_SLOPE": 0.5,
    "MLP_MULT": 1.7,
    "ROPE_DIMS": 4,
    "LN_SCALE": 1,
    "XSA_LAYERS": 2,
    "ATTN_GATE": 1,
    "GATED_SKIPS": 1,
    "PARALLEL_FROM": 3,
    "SMEAR_GATE": 1,
    "LOOP_LAYERS": "1-2",
    "LOOP_PASSES": 3,
}
EVERYTHING_ELSE = EVERYTHING | {
    "NUM_LAYERS": 5,
    "MODEL_DIM": 8,
    "NUM_HEADS": 2,
    "NUM_KV_HEADS": 1,
    "ROPE_DIMS": 2,
    "X0_MIX": 0,
    "XSA_LAYERS": 9,
    "PARALLEL_FROM": 0,
    "LOOP_LAYERS": "2-4",
    "LOOP_PASSES": 2,
    "TIE_EMBEDDINGS": 0,
    "LOGIT_SOFTCAP": 4,
}
CASES = [
    {},
    {"MLP_SLOPE": 0.5},
    {"MLP_SLOPE": 0.1, "MLP_MULT": 0.6},
    {"MLP_MULT": 2.7},
    {"MLP_MULT": 3},
    {"ROPE_DIMS": 2},
    {"ROPE_DIMS": 6, "ROPE_BASE": 50},
    {"ROPE_DIMS": 8},
    {"LN_SCALE": 1},
    {"XSA_LAYERS": 1},
    {"XSA_LAYERS": 3, "NUM_KV_HEADS": 1},
    {"XSA_LAYERS": 4, "NUM_KV_HEADS": 4},
    {"XSA_LAYERS": 99},
    {"ATTN_GATE": 1},
    {"ATTN_GATE": 1, "XSA_LAYERS": 9},
    {"ATTN_GATE": 1, "MODEL_DIM": 8},
    {"GATED_SKIPS": 1},
    {"GATED_SKIPS": 1, "NUM_LAYERS": 5},
    {"X0_MIX": 0},
    {"GATED_SKIPS": 1, "NUM_LAYERS": 1},
    {"PARALLEL_FROM": 0},
    {"PARALLEL_FROM": 2},
    {"PARALLEL_FROM": 3, "LN_SCALE": 1},
    {"SMEAR_GATE": 1},
    {"SMEAR_GATE": 1, "START_TOKEN": 0},
    {"SMEAR_GATE": 1, "MODEL_DIM": 8},
    {"LOOP_LAYERS": "1-2"},
    {"LOOP_LAYERS": "0-3", "LOOP_PASSES": 2},
    {"LOOP_LAYERS": "3-3", "LOOP_PASSES": 4},
    {"LOOP_LAYERS": "0-0", "GATED_SKIPS": 1},
    {"LOOP_LAYERS": "1-2", "NUM_LAYERS": 3, "LOOP_PASSES": 2},
    EVERYTHING,
    EVERYTHING_ELSE,
]
LOOPED = [case for case in CASES if "LOOP_LAYERS" in case]


def config_of(**knobs) -> FrontierConfig:
    return FrontierConfig.load([], {name: str(value) for name, value in (SMALL | knobs).items()})


@pytest.mark.parametrize("attend", ATTENTIONS, ids=["blocked", "expanded"])
@pytest.mark.parametrize("knobs", CASES, ids=label)
def test_losses_logits_and_gradients_equal_the_slow_reference(knobs, attend):
    assert_equals_the_reference(config_of(**knobs), attend)


@pytest.mark.parametrize("knobs", LOOPED, ids=label)
def test_before_the_recurrence_begins_each_layer_runs_once(knobs):
    assert_equals_the_reference(config_of(**knobs), ATTENTIONS[0], looping=False)


def test_the_order_of_the_recurrence_by_hand():
    """Independent of the code that both sides of the tests above share the idea of."""
    config = config_of(NUM_LAYERS=6, LOOP_LAYERS="2-3", LOOP_PASSES=3)
    assert layer_order(config, True) == [0, 1, 2, 3, 2, 3, 2, 3, 4, 5] and layer_order(config, False) == [*range(6)]
    model, seen = scatter(new_model(config)), []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, output, i=i: seen.append(i))
    for looping in (True, False, True):
        model.looping, seen[:] = looping, []
        model(random_tokens(config, 1, 5))
        assert seen == layer_order(config, looping)
    assert model.skip_weights.shape == (5, 32)


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
        "XSA_LAYERS": draw(st.integers(0, layers + 1)),
        "PARALLEL_FROM": draw(st.integers(-1, layers - 1)),
        "START_TOKEN": draw(st.integers(0, 4)),
    }
    for switch in ("LN_SCALE", "ATTN_GATE", "GATED_SKIPS", "X0_MIX", "SMEAR_GATE", "TIE_EMBEDDINGS"):
        knobs[switch] = draw(st.integers(0, 1))
    if head_dim == 2 and knobs["XSA_LAYERS"]:  # one dimension less of two leaves little but rounding errors
        knobs["XSA_LAYERS"] = 0
    if layers > 1 and draw(st.booleans()):
        first = draw(st.integers(0, layers - 1))
        knobs["LOOP_LAYERS"] = f"{first}-{draw(st.integers(first, layers - 1))}"
        knobs["LOOP_PASSES"] = draw(st.integers(2, 4))
    return knobs


@settings(max_examples=40)
@given(knobs=knob_sets(), looping=st.booleans(), seed=st.integers(0, 9), attend=st.sampled_from(ATTENTIONS))
def test_any_combination_of_knobs_equals_the_slow_reference(knobs, looping, seed, attend):
    assert_equals_the_reference(config_of(**knobs), attend, looping, seed, length=6)


# What a knob means, told from outside


def test_a_head_without_its_own_value_is_orthogonal_to_it():
    """XSA: what leaves the attention has no part along the same token's value, so a first token passes on nothing."""
    config = config_of(XSA_LAYERS=1, NUM_LAYERS=1)
    model, seen = scatter(new_model(config)), {}
    attn = model.blocks[0].attn
    attn.c_v.register_forward_hook(lambda module, args, output: seen.update(v=output))
    attn.proj.register_forward_hook(lambda module, args, output: seen.update(y=args[0]))
    model(torch.arange(18).view(2, 9))  # all different: the first two of a kind would leave nothing but their own
    y, v = seen["y"].view(2, 9, 4, 8), seen["v"].view(2, 9, 2, 8).repeat_interleave(2, dim=2)
    assert (y[:, 1:].norm(dim=-1) > 0.05).all()
    assert ((y * v).sum(-1) / v.norm(dim=-1)).abs().max() < 1e-6 and y[:, 0].abs().max() < 1e-6


def test_at_their_initial_values_gates_change_nothing_or_what_they_say():
    """2 * sigmoid(0) is 1, lambda is 0; a gated skip starts as the mean of both."""
    plain, gated = config_of(), config_of(ATTN_GATE=1, SMEAR_GATE=1)
    tokens = random_tokens(plain, 2, 9)
    one, other = new_model(plain), new_model(gated)
    state = scatter(one).state_dict()
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert sorted(missing) == [*(f"blocks.{i}.attn.gate" for i in range(4)), "smear"] and not unexpected
    assert torch.equal(one(tokens), other(tokens))
    halves = config_of(GATED_SKIPS=1)
    skips = new_model(halves)
    skips.load_state_dict(state, strict=False)
    w = {name: p.double() for name, p in skips.state_dict().items()}
    assert (w["skip_gates"] == 0).all() and w["skip_gates"].shape == w["skip_weights"].shape
    expected = torch.stack([slow_logits(w, row, halves) for row in tokens])
    torch.testing.assert_close(skips(tokens).double(), expected, rtol=1e-5, atol=1e-5)


def test_rope_dims_of_the_whole_head_and_of_none_given_are_the_same():
    whole, default = (scatter(new_model(config_of(**knobs))) for knobs in ({"ROPE_DIMS": 8}, {}))
    tokens = random_tokens(config_of(), 2, 16)
    assert torch.equal(whole(tokens), default(tokens))


@pytest.mark.parametrize("knobs", [EVERYTHING, EVERYTHING_ELSE], ids=["everything", "everything else"])
def test_bf16_is_close_to_float32_and_new_parameters_and_gradients_stay_fp32(knobs):
    oracle.assert_bf16_is_close(config_of(**knobs))


# Causality


@pytest.mark.parametrize("attend", ATTENTIONS, ids=["blocked", "expanded"])
@pytest.mark.parametrize(
    "knobs",
    [
        {"MLP_SLOPE": 0.5},
        {"ROPE_DIMS": 4},
        {"LN_SCALE": 1},
        {"XSA_LAYERS": 9},
        {"ATTN_GATE": 1},
        {"GATED_SKIPS": 1},
        {"X0_MIX": 0},
        {"PARALLEL_FROM": 1},
        {"SMEAR_GATE": 1},
        {"LOOP_LAYERS": "1-2"},
        EVERYTHING,
        EVERYTHING_ELSE,
    ],
    ids=label,
)
def test_a_changed_token_moves_no_earlier_logit(knobs, attend):
    oracle.assert_causal(config_of(**knobs), attend)


@pytest.mark.parametrize("knobs", [EVERYTHING, EVERYTHING_ELSE], ids=["everything", "everything else"])
def test_no_gradient_comes_from_the_future(knobs):
    oracle.assert_no_gradient_from_the_future(config_of(**knobs))


@pytest.mark.parametrize("start", [0, 3, 39])
def test_the_smear_reaches_one_token_on_and_never_into_another_document(start):
    """With the attention's output off, nothing but the smear moves anything from one position to another."""
    config, length = config_of(SMEAR_GATE=1, START_TOKEN=start), 12
    model, seen = scatter(new_model(config)), []
    with torch.no_grad():
        for block in model.blocks:
            block.attn_scale.zero_()
    model.tok_emb.register_forward_hook(lambda module, args, output: seen.append(output))
    tokens = torch.where(random_tokens(config, 1, length) == start, (start + 5) % 40, random_tokens(config, 1, length))
    tokens[0, [0, 4, 5, 9]] = start
    logits = model(tokens)
    for t in range(length):
        (grad,) = torch.autograd.grad(logits[0, t].square().sum(), seen[0], retain_graph=True)
        reached = (grad[0].abs().sum(-1) > 0).nonzero().flatten().tolist()
        assert reached == ([t] if t in (0, 4, 5, 9) else [t - 1, t])


# One graph


def test_a_model_without_mix_traces_into_one_graph_with_equal_losses_and_gradients():
    oracle.assert_one_graph(config_of(X0_MIX=0, NUM_LAYERS=2))


def test_the_compiled_model_of_everything_follows_the_switch_of_the_recurrence():
    """A switch that the graph has folded into a constant would leave the recurrence off for ever."""
    config = config_of(**EVERYTHING | {"NUM_LAYERS": 3, "LOOP_LAYERS": "1-1", "LOOP_PASSES": 2, "PARALLEL_FROM": 2})
    model = scatter(new_model(config))
    compiled, graphs = graphs_of(model)
    for seed in (1, 2):  # the second batch, with starts elsewhere, must reuse the graphs of the first
        tokens, results = random_tokens(config, 2, 17, seed), []
        for looping in (False, True):
            model.looping = looping
            eager, traced = (losses_and_gradients(run, model, tokens) for run in (model, compiled))
            torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-6)
            results.append(traced[0])
        assert (results[1] - results[0]).abs().max() > 0.01
    assert len(graphs) == 2, "one graph for each state of the switch, and none compiled again"


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "knobs",
    [
        EVERYTHING | {"NUM_LAYERS": 1, "LOOP_LAYERS": "", "PARALLEL_FROM": 0},
        {"NUM_LAYERS": 2, "LOOP_LAYERS": "0-0", "LOOP_PASSES": 2, "GATED_SKIPS": 1, "X0_MIX": 0, "TIE_EMBEDDINGS": 0},
    ],
)
def test_inductor_gives_the_losses_and_gradients_of_combinations(knobs):
    """In few layers, since each of its kernels takes a C++ compiler a third of a second."""
    oracle.assert_inductor_agrees(config_of(**knobs))


# The parameters


def test_the_parameters_of_the_frontier_recipe_are_counted_exactly():
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
    for name, knobs in {
        "plain": {},
        "recipe": {"LOOP_LAYERS": "3-5", "LOOP_PASSES": 3, "GATED_SKIPS": 1},
        "gate": {"ATTN_GATE": 1},
        "smear": {"SMEAR_GATE": 1},
        "no mix": {"X0_MIX": 0},
        "odd width": {"MLP_MULT": 3.3},
    }.items():
        with torch.device("meta"):
            model = frontier.GPT(config_of(**shape | knobs))
        counts[name] = sum(p.numel() for p in model.parameters())
    assert counts["recipe"] == 35_944_536
    assert counts["recipe"] - counts["plain"] == (2 * 8 - 5) * 512
    assert counts["gate"] - counts["plain"] == 11 * 96 and counts["smear"] - counts["plain"] == 13
    assert counts["plain"] - counts["no mix"] == 11 * 2 * 512
    assert counts["plain"] - counts["odd width"] == 11 * 2 * 512 * (2048 - 1690)


@pytest.mark.parametrize(
    "knobs, shapes",
    [
        ({"ATTN_GATE": 1}, {f"blocks.{i}.attn.gate": (4, 12) for i in range(4)}),
        ({"ATTN_GATE": 1, "MODEL_DIM": 8}, {f"blocks.{i}.attn.gate": (4, 8) for i in range(4)}),
        ({"GATED_SKIPS": 1}, {"skip_gates": (2, 32), "skip_weights": (2, 32)}),
        ({"SMEAR_GATE": 1}, {"smear": (13,)}),
        ({"SMEAR_GATE": 1, "MODEL_DIM": 8}, {"smear": (9,)}),
        ({"LOOP_LAYERS": "1-3", "LOOP_PASSES": 3}, {"skip_weights": (5, 32)}),  # of ten layers in order
        ({"LOOP_LAYERS": "0-0", "LOOP_PASSES": 2, "GATED_SKIPS": 1}, {"skip_weights": (2, 32), "skip_gates": (2, 32)}),
        (
            EVERYTHING,
            {
                "smear": (13,),
                "skip_gates": (4, 32),
                "skip_weights": (4, 32),
                "blocks.3.attn.gate": (4, 12),
                "blocks.0.mlp.fc.weight": (54, 32),
                "blocks.0.resid_mix": (2, 32),
            },
        ),
    ],
    ids=label,
)
def test_new_parameters_have_their_shapes_initial_values_and_group(runtime, knobs, shapes):
    config = config_of(**knobs)
    model = new_model(config)
    plain = new_model(config_of(**{k: v for k, v in knobs.items() if k in ("MODEL_DIM", "MLP_MULT")}))
    parameters, groups = dict(model.named_parameters()), parameter_groups(model, config, runtime)
    scalars = {id(p) for p in groups["scalar"]}
    assert sum(map(len, groups.values())) == len(parameters) == len({id(p) for g in groups.values() for p in g})
    for name, shape in shapes.items():
        assert tuple(parameters[name].shape) == shape
        kind = name.split(".")[-1]
        if kind in ("gate", "skip_gates", "smear"):
            assert (parameters[name] == 0).all() and id(parameters[name]) in scalars
        if kind == "skip_weights":
            assert (parameters[name] == 1).all() and id(parameters[name]) in scalars
    new = {name for name in parameters.keys() - dict(plain.named_parameters()).keys()}
    assert new == {name for name in parameters if name.split(".")[-1] in ("gate", "skip_gates", "smear")}
    for name, p in plain.named_parameters():  # a knob must not shift the draws of the others
        assert torch.equal(p, parameters[name]) or name == "skip_weights", name
    assert all(p.dtype == torch.float32 and p.requires_grad for p in parameters.values())


def test_without_the_mix_there_is_no_resid_mix_and_the_other_draws_stay():
    plain, without = (dict(new_model(config_of(**knobs)).named_parameters()) for knobs in ({}, {"X0_MIX": 0}))
    assert without.keys() < plain.keys()
    assert plain.keys() - without.keys() == {f"blocks.{i}.resid_mix" for i in range(4)}
    assert all(torch.equal(plain[name], p) for name, p in without.items())


@pytest.mark.parametrize("knobs", CASES, ids=label)
def test_every_parameter_that_waits_for_a_gradient_gets_one(knobs):
    """Also while the recurrence is off: DDP waits for each. With it on, every row of the gates and skips has one."""
    config = config_of(**knobs)
    for looping in (True, False):
        model, tokens = scatter(new_model(config)), random_tokens(config, 2, 17)
        model.looping = looping and bool(config.loop_layers)
        model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None if p.requires_grad else p.numel() == 0, name
            if p.numel():
                assert p.grad.abs().max() > 0, name
            if looping and p.numel() and name.split(".")[-1] in ("gate", "smear", "skip_gates", "skip_weights"):
                assert (p.grad != 0).all(), name


def test_a_single_layer_cannot_recur():
    """While the recurrence is off it would have skips that get no gradient, and DDP would wait for one."""
    with pytest.raises(UserError, match="LOOP_LAYERS=0-0.*2 or more"):
        config_of(NUM_LAYERS=1, LOOP_LAYERS="0-0")


# Bad values


@pytest.mark.parametrize(
    "text",
    [
        "ROPE_DIMS=7",
        "ROPE_DIMS=-2",
        "ROPE_DIMS=10",
        "ROPE_DIMS=x",
        "MLP_SLOPE=x",
        "MLP_SLOPE=inf",
        "LN_SCALE=2",
        "LN_SCALE=x",
        "XSA_LAYERS=-1",
        "XSA_LAYERS=1.5",
        "ATTN_GATE=yes",
        "GATED_SKIPS=2",
        "X0_MIX=-1",
        "PARALLEL_FROM=-2",
        "PARALLEL_FROM=x",
        "SMEAR_GATE=2",
        "START_TOKEN=-1",
        "START_TOKEN=x",
        "LOOP_LAYERS=3-2",
        "LOOP_LAYERS=x",
        "LOOP_LAYERS=2",
        "LOOP_LAYERS=1-",
        "LOOP_LAYERS=-1-2",
        "LOOP_LAYERS=1-4",
        "LOOP_LAYERS=4-5",
        "LOOP_LAYERS=1-2-3",
        "LOOP_LAYERS=1,2",
        "LOOP_LAYERS=a-b",
        "LOOP_LAYERS=1.0-2",
        "LOOP_LAYERS=\u0661-\u0662",
        "LOOP_PASSES=0",
        "LOOP_PASSES=-1",
        "LOOP_PASSES=x",
        "LOOP_START=-0.1",
        "LOOP_START=1.1",
        "LOOP_START=x",
    ],
)
def test_a_bad_value_is_a_user_error_that_names_the_knob(text):
    name, value = text.split("=")
    context = {"LOOP_LAYERS": "1-2"} if name in ("LOOP_PASSES", "LOOP_START") else {}
    with pytest.raises(UserError, match=name):
        new_model(config_of(**context | {name: value}))


@pytest.mark.parametrize(
    "text",
    [
        "ROPE_DIMS=0",
        "ROPE_DIMS=2",
        "ROPE_DIMS=8",
        "MLP_SLOPE=1",
        "XSA_LAYERS=1000",
        "PARALLEL_FROM=3",
        "START_TOKEN=0",
        "LOOP_LAYERS=0-0",
        "LOOP_LAYERS=0-3",
        "LOOP_LAYERS=3-3",
        "LOOP_START=0",
        "LOOP_START=1",
        "LOOP_PASSES=2",
    ],
)
def test_a_value_at_the_edge_is_taken(text):
    name, value = text.split("=")
    config = config_of(**{name: value})
    model = new_model(config)
    assert str(getattr(config, name.lower())).removesuffix(".0") == value.removesuffix(".0")
    assert model(random_tokens(config, 1, 4)).isfinite().all()


def test_the_token_that_begins_a_document_is_that_of_the_text(tiny, capfd):
    assert models.call_main(tiny(MODEL_FILE=models.FRONTIER, SMEAR_GATE=1, START_TOKEN=5)) == 2
    assert "START_TOKEN=5, but documents begin with token 1: set that" in capfd.readouterr().err
    with pytest.raises(UserError, match="START_TOKEN=40 is outside VOCAB_SIZE"):
        config_of(START_TOKEN=40)


def test_an_artifact_records_all_knobs_of_the_model():
    """Whatever changes the function that the weights stand for must travel with them."""
    recorded = models.artifact_knobs(FrontierConfig)
    assert {*EVERYTHING, "X0_MIX", "START_TOKEN", "XSA_GATE", "CANONICAL", "FOLD_SCALES", "FUSE_QKV"} <= recorded


# FLOPs


@pytest.mark.parametrize(
    "knobs",
    [
        {"PARALLEL_FROM": 0, "XSA_LAYERS": 3, "GATED_SKIPS": 1, "ROPE_DIMS": 4, "LN_SCALE": 1},
        {"LOOP_LAYERS": "1-2", "LOOP_PASSES": 3},
        {"LOOP_LAYERS": "0-0", "LOOP_PASSES": 2, "X0_MIX": 0},
        {"TIE_EMBEDDINGS": 0, "MLP_SLOPE": 0.5, "NUM_LAYERS": 3, "CONTEXTS": "4@0,16@0.5"},
    ],
    ids=label,
)
def test_flops_per_token_are_those_that_torch_counts(knobs):
    config = config_of(**knobs)
    model, totals = new_model(config, kernels.expanded_attention), set()
    for looping in (False, bool(config.loop_layers)):
        model.looping = looping
        assert model.flops_per_token(config.train_seq_len) == counted_flops(model, config)
        totals.add(counted_flops(model, config))
    assert len(totals) == 1 + bool(config.loop_layers), "layers that run again count again"


def test_what_the_gates_take_is_left_out():
    """Twelve channels of an input: a product that is nothing compared with the others."""
    config = config_of(ATTN_GATE=1, SMEAR_GATE=1)
    model = new_model(config, kernels.expanded_attention)
    gates = 6 * config.num_layers * config.num_heads * 12
    smear = counted_flops(model, config) - model.flops_per_token(config.train_seq_len) - gates
    assert 0 <= smear <= 6 * 12, "one more row of twelve, if torch counts a product with a vector"


# The optimizers: test_frontier.py compares Muon's steps with the formulas


def test_row_norm_makes_rows_of_any_size_count_the_same(runtime):
    """Without it a row a million times smaller is not moved; and a row of zeros stays where it is."""
    moved = {}
    for row_norm in (0, 1):
        config = config_of(MUON_ROW_NORM=row_norm, MATRIX_LR=1, MUON_MOMENTUM=0.9)
        model = new_model(config)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        matrix = model.blocks[0].mlp.fc.weight
        before = matrix.detach().clone()
        matrix.grad.normal_(generator=torch.Generator().manual_seed(1))
        matrix.grad[3] *= 1e-6
        matrix.grad[5] = 0
        model.optimizers(config, runtime)[1].step()
        assert matrix.isfinite().all() and (matrix[5] == before[5]).all()
        moved[row_norm] = (matrix.detach()[3] - before[3]).norm()
    assert moved[0] < 1e-2 and moved[1] > 0.3


def test_new_parameters_are_trained_by_adamw_with_the_decay_of_vectors(runtime):
    knobs = {"GATED_SKIPS": 1, "ATTN_GATE": 1, "SMEAR_GATE": 1, "XSA_LAYERS": 2, "XSA_GATE": 1}
    config = config_of(SCALAR_WEIGHT_DECAY=0.4, SCALAR_LR=0.04, ADAM_EPS=1e-3, BETA1=0.8, BETA2=0.9, **knobs)
    model = scatter(new_model(config))
    wide = copy.deepcopy(model).double()
    adam = model.optimizers(config, runtime)[0]
    vectors = parameter_groups(wide, config, runtime)["scalar"]
    reference = torch.optim.AdamW(vectors, lr=0.04, weight_decay=0.4, betas=(0.8, 0.9), eps=1e-3)
    for t in range(3):
        for i, (p, q) in enumerate(zip(model.parameters(), wide.parameters(), strict=True)):
            p.grad = 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i))
            q.grad = p.grad.double()
        adam.step()
        reference.step()
    before = scatter(new_model(config)).state_dict()
    new = 0
    for (name, p), q in zip(model.named_parameters(), wide.parameters(), strict=True):
        if name.split(".")[-1] in ("gate", "smear", "skip_gates", "skip_weights"):
            new += 1
            torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-5, atol=1e-6)
            assert not torch.equal(p, before[name]), name
    assert new == 4 + 2 + 3, "gates of attention, of XSA, and those of the model"
