"""records/models/frontier.py: off, it trains bit for bit as the script; each knob against a slow reading of its
formula; whole runs with all of them on one rank and on two, stopped and resumed, scored again in another process; the
rules of a score with the mask, with test-time training, and with both."""

import importlib.util
import itertools
import json
import math
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import models
import numpy as np
import pytest
import torch
from models import exact_line, new_model, process

import train_gpt
from train_gpt import TokenBytes, UserError

ROOT = Path(train_gpt.__file__).resolve().parent


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FrontierConfig, frontier = models.model_file("frontier")
probe = load("record_probe", ROOT / "tools" / "records" / "record_probe.py")

ALL = {
    "MODEL_FILE": models.FRONTIER,
    "XSA_LAYERS": 2,
    "XSA_GATE": 1,
    "MUON_HEADS": 1,
    "POLAR_EXPRESS": 1,
    "PREFIX_LOSS": 0.5,
    "CANONICAL": 1,
    "CANONICAL_TRAIN": 1,
    "CONTEXTS": "8@0,16@0.3,32@0.6",
    "EMA_DECAY": 0.9,
    "TTT_CHUNK": 64,
    "TTT_LR": 0.05,
    "TTT_BATCH_TOKENS": 64,
    "FOLD_SCALES": 1,
    "FUSE_QKV": 1,
}


@pytest.fixture
def config_of(tiny):
    """Function: the FrontierConfig of `tiny`, with overrides by knob."""
    return lambda **overrides: FrontierConfig.load([], tiny(**overrides))


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def scatter(model):
    """Random values in every parameter: many of the initial ones are 0."""
    with torch.no_grad():
        for seed, p in enumerate(model.parameters()):
            p.copy_(0.5 * randn(*p.shape, seed=seed))
    return model


def double(config):
    """The model in float64, but for its RoPE tables."""
    return new_model(config, train_gpt.grouped_attention, torch.float64).double()


def random_tokens(config, batch=3, seed=0):
    shape = (batch, config.train_seq_len)
    return torch.randint(3, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def start(values: dict[str, str], capfd) -> tuple[int, str, str]:
    """(exit code, what it wrote, errors) of a run in this process."""
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch, models.no_siblings():
        patch.setattr(train_gpt, "INT8_MIN_NUMEL", 1000)  # so that something is quantized
        code = models.call_main(values)
    return code, *capfd.readouterr()


def losses_of(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train_loss"] for line in lines if "train_loss" in line]


def same_weights(one: Path, other: Path) -> bool:
    one, other = (torch.load(folder / "final_model.pt") for folder in (one, other))
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


# Off


def test_with_every_knob_off_it_trains_bit_for_bit_as_the_script(tiny, capfd, tmp_path):
    results = []
    for name, file in (("frontier", models.FRONTIER), ("script", "")):
        values = tiny(LOG_DIR=tmp_path / name, MODEL_FILE=file, WARMUP_STEPS=1, NUM_LAYERS=3, TIE_EMBEDDINGS=0)
        assert start(values, capfd)[0] == 0
        results.append(json.loads((tmp_path / name / "run" / "result.json").read_text()))
    ours, theirs = (tmp_path / name / "run" for name in ("frontier", "script"))
    assert len(losses_of(ours)) == 5 and losses_of(ours) == losses_of(theirs)
    assert same_weights(ours, theirs)
    assert results[0]["val_loss"] == results[1]["val_loss"]
    assert results[0]["sources"].keys() == {"train_gpt.py", "frontier.py", "score_first.py"}
    assert results[1]["sources"].keys() == {"train_gpt.py"}


def test_with_every_knob_off_there_is_nothing_new(config_of, make_config, runtime):
    model, plain = new_model(config_of(NUM_LAYERS=3)), new_model(make_config(NUM_LAYERS=3))
    assert [*model.state_dict()] == [*plain.state_dict()]
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert model.graph_starts == plain.graph_starts == (0.0,) and model.observe_every == 0
    assert type(model.optimizers(config_of(), runtime)[1]) is train_gpt.Muon
    assert not dict(model.named_buffers()).keys() - dict(plain.named_buffers()).keys()


# XSA_GATE


def test_gated_exclusion_takes_its_share_of_the_own_value_out_of_each_head():
    B, H, K, T, d = 2, 4, 2, 5, 6
    q, k, v = (randn(B, heads, T, d, seed=heads + seed) for seed, heads in enumerate((H, K, K)))
    layer = frontier.GatedExclusion(train_gpt.grouped_attention, H).double()
    with torch.no_grad():
        layer.gate.copy_(randn(H))
    y = layer(q, k, v)
    for b, h, t in [(b, h, t) for b in range(B) for h in range(H) for t in range(T)]:
        keys, values = k[b, h // (H // K)], v[b, h // (H // K)]
        weights = torch.exp(keys[: t + 1] @ q[b, h, t] / math.sqrt(d))
        expected = weights / weights.sum() @ values[: t + 1]
        own = values[t] / values[t].norm()
        expected = expected - torch.tanh(layer.gate[h]) * (expected @ own) * own
        torch.testing.assert_close(y[b, h, t], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_gate_of_0_is_no_xsa_and_a_large_one_is_xsa(config_of, layers):
    config = config_of(XSA_LAYERS=layers, XSA_GATE=1)
    model, tokens = double(config), random_tokens(config)
    gates = {name: p for name, p in scatter(model).named_parameters() if name.endswith("attend.gate")}
    assert [*gates] == [f"blocks.{i}.attn.attend.gate" for i in range(2 - layers, 2)]
    for value, knobs in ((0.0, {}), (50.0, {"XSA_LAYERS": layers})):
        with torch.no_grad():
            for gate in gates.values():
                gate.fill_(value)
        plain = double(config_of(**knobs))
        plain.load_state_dict({name: p for name, p in model.state_dict().items() if name not in gates})
        torch.testing.assert_close(model(tokens), plain(tokens), rtol=1e-12, atol=1e-12)


def test_gates_begin_at_0_and_are_trained_as_vectors(config_of, runtime):
    config = config_of(XSA_LAYERS=1, XSA_GATE=1)
    model = new_model(config)
    gate = model.blocks[1].attn.attend.gate
    assert gate.shape == (4,) and not gate.any()
    assert any(gate is p for p in models.parameter_groups(model, config, runtime)["scalar"])
    with torch.no_grad():
        for block in model.blocks:  # which are 0 at first
            block.attn.proj.weight.normal_(generator=torch.Generator().manual_seed(0))
    tokens = random_tokens(config_of())
    model(tokens, tokens.roll(-1, 1)).mean().backward()
    assert gate.grad.abs().min() > 0


# FOLD_SCALES, FUSE_QKV

LEAN = [{"FOLD_SCALES": 1}, {"FUSE_QKV": 1}, {"FOLD_SCALES": 1, "FUSE_QKV": 1}]
ARCHITECTURES = [
    {},
    {"XSA_LAYERS": 1, "XSA_GATE": 1, "X0_MIX": 0, "MLP_MULT": 1.7, "NUM_KV_HEADS": 1},
    {
        "NUM_LAYERS": 4,
        "XSA_LAYERS": 3,
        "ATTN_GATE": 1,
        "PARALLEL_FROM": 2,
        "LN_SCALE": 1,
        "LOOP_LAYERS": "1-2",
        "ROPE_DIMS": 4,
        "MLP_SLOPE": 0.5,
        "NUM_KV_HEADS": 4,
    },
]
ids = {"ids": lambda knobs: " ".join(f"{name}={value}" for name, value in knobs.items()) or "default"}


def losses_and_gradients(model, config):
    tokens, targets = (random_tokens(config, seed=seed) for seed in (0, 1))
    losses = model(tokens, targets)
    losses.mean().backward()
    return {"losses": losses.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, error):
    """Equal to `error`, relative to the largest value of each tensor."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert expected.abs().max() > 0, f"{name} is 0: nothing is compared"
        off = (ours[name] - expected).abs().max() / expected.abs().max()
        assert off < error, f"{name} is off by {off:.1e} of its largest value"


@pytest.mark.parametrize("architecture", ARCHITECTURES, **ids)
@pytest.mark.parametrize("lean", LEAN, **ids)
def test_folded_and_fused_the_model_has_the_same_weights_losses_and_gradients(config_of, architecture, lean):
    """In float64 to 1e-12; in float32 the loss to 1e-6."""
    for dtype in (torch.float64, torch.float32):
        built, found = [], []
        for knobs in (lean, {}):
            config = config_of(**architecture | knobs)
            built.append(new_model(config, train_gpt.grouped_attention, dtype).to(dtype))
        ours, theirs = (model.state_dict() for model in built)
        assert [*ours] == [*theirs] and all(torch.equal(ours[name], theirs[name]) for name in ours), "initial weights"
        for model in built:
            with torch.no_grad():
                for seed, p in enumerate(model.parameters()):
                    p.add_(0.2 * randn(*p.shape, seed=seed).to(dtype))
            found.append(losses_and_gradients(model, config))
        if dtype == torch.float64:
            assert_same(*found, 1e-12)
        means = [float(result["losses"].mean()) for result in found]
        assert means[0] == pytest.approx(means[1], rel=1e-6)


def test_folded_and_fused_there_are_fewer_passes_over_the_tokens(config_of):
    """By what the graph keeps for the backward and does: no output of a projection, and two products less a block."""
    counts = []
    for knobs in ({}, {"FOLD_SCALES": 1, "FUSE_QKV": 1}):
        config, kept, products = config_of(**knobs), [], []
        model, tokens = new_model(config), random_tokens(config)

        class Count(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None, products=products):
                products.append(str(function) in ("aten.mm.default", "aten.addmm.default"))
                return function(*args, **kwargs or {})

        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x), Count():
            model(tokens, tokens)
        by_storage = {x.untyped_storage().data_ptr(): x.shape for x in kept}
        width = tokens.numel() * config.model_dim
        counts.append((sum(products), sum(math.prod(shape) == width for shape in by_storage.values())))
    (products, kept), (fewer, less) = counts
    assert products - fewer == 2 * 2 and kept - less >= 2 * 2, "two layers"


def test_folded_and_fused_gptq_sees_the_inputs_of_every_matrix(config_of, runtime):
    collect, found = frontier.sibling("coder").collect_hessians, []
    for knobs in ({}, *LEAN):
        config = config_of(XSA_LAYERS=1, **knobs)
        model, tokens = scatter(new_model(config)), random_tokens(config)
        loader = SimpleNamespace(next_step=lambda tokens=tokens: ([tokens], None))
        found.append(collect(model, loader, 2, runtime))
        assert not any(module._forward_pre_hooks for module in model.modules())
    expected = {name for name, p in model.named_parameters() if model.rule(name).group == "matrix"} | {"tok_emb.weight"}
    for hessians in found:
        assert hessians.keys() == expected
        assert_same(hessians, found[0], 1e-5)


def test_folded_and_fused_it_is_one_graph(config_of):
    config = config_of(**ARCHITECTURES[1] | LEAN[2])
    eager, traced = (scatter(new_model(config)) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True, dynamic=False)
    found = losses_and_gradients(compiled, config)
    found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
    assert_same(found, losses_and_gradients(eager, config), 1e-5)
    torch._dynamo.reset()


def test_a_checkpoint_and_an_artifact_do_not_ask_whether_they_are_folded_and_fused(tiny, capfd, tmp_path):
    """A run goes on with both; its artifact is scored to the digit as it tells, and equal to rounding without."""
    common = {
        "MODEL_FILE": models.FRONTIER,
        "CODEC": "rans",
        "GPTQ_BATCHES": 1,
        "WEIGHT_BITS": 6,
        "VAL_TOKENS_LIMIT": 200,
        "WARMDOWN_FRAC": 0,
    }
    losses, scores, checkpoint = [], [], tmp_path / "logs" / "begun" / "checkpoint.pt"
    for name, knobs in (
        ("begun", {"ITERATIONS": 3}),
        ("plain", {"RESUME": checkpoint}),
        ("lean", {"RESUME": checkpoint} | LEAN[2]),
    ):
        values = tiny(**{"ITERATIONS": 6} | common | knobs, RUN_ID=name)
        code, out, err = start(values, capfd)
        assert code == 0, err
        losses.append(losses_of(tmp_path / "logs" / name))
        scores.append(float(re.search(r"val_loss:([\d.]+)", exact_line(out, "final_int6_rans_roundtrip"))[1]))
    assert len(losses[2]) == 3 and losses[2] == pytest.approx(losses[1], abs=1e-5)
    assert scores[2] == pytest.approx(scores[1], abs=1e-3) and scores[2] < scores[0] - 0.1
    artifact = tmp_path / "logs" / "lean" / "final_model.rans.ptz"
    told = models.open_artifact(artifact)["config"]
    assert told["fold_scales"] is True and told["fuse_qkv"] is True
    machine = {name: tiny()[name] for name in (*models.MACHINE, "LOG_DIR")}
    for off in ({}, {"FOLD_SCALES": "0", "FUSE_QKV": "0"}):
        values = machine | {"MODE": "eval", "ARTIFACT": str(artifact), "VAL_TOKENS_LIMIT": "200"} | off
        code, again, err = start(values, capfd)
        assert code == 0, err
        line = exact_line(again, "final_int6_rans_roundtrip")
        assert off or line == exact_line(out, "final_int6_rans_roundtrip")
        assert float(re.search(r"val_loss:([\d.]+)", line)[1]) == pytest.approx(scores[2], abs=1e-6)


# MUON_HEADS, POLAR_EXPRESS


def by_singular_values(u, quintics):
    """U p(S) V^T of a matrix, where p is the quintics one after the other."""
    left, s, right = torch.linalg.svd(u, full_matrices=False)
    for a, b, c in quintics:
        s = a * s + b * s**3 + c * s**5
    return left @ torch.diag(s) @ right


def paper_quintics(steps):
    rest = (1.875, -1.25, 0.375)
    six = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in frontier.POLAR_EXPRESS[:6]]
    return (six + [rest] * steps)[:steps]


@pytest.mark.parametrize("row_norm", [0, 1])
@pytest.mark.parametrize("heads, polar", [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)])
def test_a_step_of_muon_equals_the_formulas_piece_by_piece(config_of, runtime, heads, row_norm, polar):
    knobs = {
        "MUON_HEADS": heads,
        "MUON_ROW_NORM": row_norm,
        "POLAR_EXPRESS": polar,
        "MUON_BACKEND_STEPS": 4,
        "MUON_MOMENTUM": 0.9,
        "MATRIX_LR": 0.1,
        "MUON_WEIGHT_DECAY": 0.3,
    }
    config = config_of(**knobs)
    model = double(config)
    runtime.dtype = torch.float64
    adam, muon = model.optimizers(config, runtime)
    assert isinstance(muon, train_gpt.Muon)
    trained = [p for optimizer in (adam, muon) for group in optimizer.param_groups for p in group["params"]]
    assert len(trained) == len(set(trained)) == len(list(model.parameters()))
    expected = {}
    for seed, (name, p) in enumerate(model.named_parameters()):
        p.grad = randn(*p.shape, seed=seed)
        if model.rule(name).group != "matrix":
            continue
        cut = heads and re.search(r"c_[qkv]\.weight$", name)
        pieces = []
        for u in (p.grad * 1.9).split(heads * 8 if cut else len(p)):
            u = u / u.norm(dim=1, keepdim=True) if row_norm else u
            u = u / u.norm()
            u = (
                by_singular_values(u / 1.01, paper_quintics(4))
                if polar
                else by_singular_values(u, [(3.4445, -4.7750, 2.0315)] * 4)
            )
            pieces.append(u * max(1, u.size(0) / u.size(1)) ** 0.5)
        expected[name] = p.detach() * (1 - 0.1 * 0.3) - 0.1 * torch.cat(pieces)
    muon.step()
    assert len(expected) == 12
    for name, value in expected.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows, cols", [(24, 24), (8, 32), (32, 8)])
@pytest.mark.parametrize("steps", [1, 3, 4, 5, 6, 10])
def test_polar_express_brings_singular_values_nearer_to_1_than_the_usual_coefficients(rows, cols, steps):
    """In the worst case, from the first iteration on, and from the fifth on in the mean, too: of singular values from a
    thousandth to 1, for which the paper's iterations are the best."""
    left, right = (torch.linalg.qr(randn(n, n, seed=n))[0] for n in (rows, cols))
    values, errors = torch.logspace(-3, -0.01, min(rows, cols), dtype=torch.float64), []
    matrix = left[:, : len(values)] @ values.diag() @ right[:, : len(values)].T
    result = train_gpt.newton_schulz(matrix[None], frontier.polar_express(steps))
    for matrices in (result, train_gpt.newton_schulz(matrix[None], [train_gpt.Muon.QUINTIC] * steps)):
        errors.append((torch.linalg.svdvals(matrices) - 1).abs())
    assert errors[0].max() < errors[1].max() and (steps < 5 or errors[0].mean() < 0.5 * errors[1].mean())
    assert errors[0].max() < {1: 1, 3: 0.9, 4: 0.6, 5: 0.17, 6: 0.01, 10: 1e-6}[steps]
    expected = by_singular_values(matrix / 1.01, paper_quintics(steps))
    torch.testing.assert_close(result[0], expected, rtol=1e-9, atol=1e-9)


# PREFIX_LOSS


@pytest.fixture
def token_bytes(config_of):
    config = config_of()
    return TokenBytes(config.tokenizer_path, config.vocab_size)


def slow_prefixes(token_bytes, vocab_size):
    """Of each token, by looking at all the others."""
    texts = {}
    for i, piece in enumerate(token_bytes.pieces):
        if piece is not None and (piece or i in token_bytes.leading):
            texts[i] = b" " * (i in token_bytes.leading) + piece
    table = [-100] * vocab_size
    for i, text in texts.items():
        shorter = [j for j in texts if text.startswith(texts[j]) and len(texts[j]) < len(text)]
        # The longest; of equals one that is no byte.
        shorter.sort(key=lambda j: (len(texts[j]), j not in token_bytes.byte_ids))
        table[i] = shorter[-1] if shorter else -100
    return table


def test_the_table_of_prefixes_equals_a_search_through_all_tokens(token_bytes):
    size = token_bytes.size + 3  # ids that only fill the vocabulary up
    table = frontier.longest_prefixes(token_bytes, size).tolist()
    assert table == slow_prefixes(token_bytes, size)
    names = token_bytes.model.id_to_piece([*range(token_bytes.size)])
    pairs = {names[i]: names[j] for i, j in enumerate(table) if j >= 0}
    assert len(pairs) > 30 and "a" not in pairs and table[token_bytes.start] == -100
    expected = {"\u2581sleeps": "\u2581s", "\u2581s": "\u2581", "ent": "en", "king": "k", "\u6d77": "<0xE6>"}
    assert {name: pairs[name] for name in expected} == expected


def test_of_texts_that_two_tokens_share_the_prefix_is_the_one_that_is_no_byte(token_bytes):
    token_bytes.pieces, token_bytes.size = [None, b"a", b"a", b"ab", b"", b"abcd", b"ab"], 7
    token_bytes.leading, token_bytes.byte_ids = {4, 6}, {2}
    assert frontier.longest_prefixes(token_bytes, 8).tolist() == [-100, -100, -100, 1, -100, 3, 4, -100]


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_the_prefix_loss_is_cross_entropy_on_the_prefixes_with_a_weight_that_falls(config_of, token_bytes, progress):
    config = config_of(PREFIX_LOSS=0.5)
    model, tokens, targets = scatter(double(config)), *map(random_tokens, [config] * 2, [3, 3], [0, 1])
    model.advance(progress)
    losses, extra = model(tokens, targets)
    probabilities, table, total = model(tokens).softmax(-1), slow_prefixes(token_bytes, config.vocab_size), 0.0
    for b, t in [(b, t) for b in range(3) for t in range(config.train_seq_len)]:
        target = int(targets[b, t])
        torch.testing.assert_close(losses[b, t], -probabilities[b, t, target].log())
        if table[target] >= 0:
            total = total - probabilities[b, t, table[target]].log()
    torch.testing.assert_close(extra, 0.5 * (1 - progress) * total / targets.numel())
    assert (extra > 0) == (progress < 1)
    assert model.eval()(tokens, targets).equal(losses)


# CONTEXTS


def test_in_training_a_sequence_is_cut_into_contexts_and_in_evaluation_it_is_whole(config_of):
    config = config_of(CONTEXTS="8@0,16@0.3,32@0.6", SMEAR_GATE=1)
    model, tokens = scatter(double(config)), random_tokens(config)
    whole = double(config_of(SMEAR_GATE=1))
    whole.load_state_dict(model.state_dict())
    for progress, length in ((0.0, 8), (0.29, 8), (0.3, 16), (0.59, 16), (0.6, 32), (1.0, 32)):
        model.advance(progress)
        parts = torch.cat([whole(part) for part in tokens.split(length, dim=1)], dim=1)
        torch.testing.assert_close(model.train()(tokens), parts, rtol=1e-12, atol=1e-12)
        assert model(tokens, tokens.roll(-1, 1)).shape == tokens.shape
        torch.testing.assert_close(model.eval()(tokens), whole(tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "loops, expected",
    [
        ({}, (0.0, 0.3, 0.6)),
        ({"LOOP_LAYERS": "0-1", "LOOP_START": 0.4}, (0.0, 0.3, 0.4, 0.6)),
        ({"LOOP_LAYERS": "0-1", "LOOP_START": 0.7}, (0.0, 0.3, 0.6, 0.7)),
    ],
)
def test_graphs_change_where_contexts_do_and_where_recurrence_begins(config_of, loops, expected):
    config = config_of(CONTEXTS="8@0,16@0.3,32@0.6", **loops)
    model = new_model(config)
    assert model.graph_starts == expected and model.context == 32 and model.looping == bool(loops)
    for progress in (0.0, 0.2, 0.3, 0.35, 0.4, 0.5, 0.6, 0.69, 0.7, 1.0):
        model.advance(progress)
        assert model.looping == (bool(loops) and progress >= config.loop_start)
        assert model.context == (8 if progress < 0.3 else 16 if progress < 0.6 else 32)


def test_all_graphs_are_compiled_in_the_warm_up_and_none_after_it(config_of, runtime):
    """By a compiler that only counts; training follows as the run does, with validations in between."""
    config = config_of(**ALL | {"LOOP_LAYERS": "0-1", "LOOP_START": 0.4})
    model, graphs = new_model(config), []
    model.prepare(config, runtime)
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend=lambda graph, _: graphs.append(1) or graph.forward, fullgraph=True, dynamic=False
    )
    tokens = random_tokens(config)

    def train_and_score(progress):
        model.advance(progress)
        losses, extra = compiled.train()(tokens, tokens.roll(-1, 1))
        (losses.mean() + extra).backward()
        with torch.no_grad():
            compiled.eval()(tokens, tokens.roll(-1, 1))

    train_and_score(1.0)  # as the look at the memory does
    for share in model.graph_starts:
        train_and_score(share)
    # Contexts of 8 and 16; 16 and 32 with recurrence; evaluation with and without it.
    assert len(graphs) == 4 + 2
    for step in range(20):
        train_and_score(step / 20)
    assert len(graphs) == 6
    torch._dynamo.reset()


# CANONICAL_TRAIN


def test_the_mask_in_training_leaves_a_distribution_over_what_is_allowed(config_of, runtime, token_bytes):
    config = config_of(CANONICAL=1, CANONICAL_TRAIN=1, PREFIX_LOSS=0.5)
    model, tokens, targets = scatter(double(config)), *map(random_tokens, [config] * 2, [3, 3], [0, 1])
    bits = frontier.sibling("canonical").allowed_pairs(config.tokenizer_path, config.vocab_size)
    bits = torch.from_numpy(np.unpackbits(bits, axis=1, count=config.vocab_size, bitorder="little").astype(bool))
    table = slow_prefixes(token_bytes, config.vocab_size)
    # Targets that the mask excludes, and others whose prefixes it does.
    odd = [(a, b) for a, b in itertools.product(range(config.vocab_size), repeat=2) if not bits[a, b]][:16]
    odd += [
        (a, b)
        for a, b in itertools.product(range(config.vocab_size), repeat=2)
        if bits[a, b] and table[b] >= 0 and not bits[a, table[b]]
    ][:16]
    tokens[0], targets[0] = torch.tensor(odd).T
    plain = model(tokens)
    model.prepare(config, runtime)
    model.advance(0.0)
    losses, extra = model(tokens, targets)
    total, excluded, hidden = 0.0, 0, 0
    for b, t in [(b, t) for b in range(3) for t in range(config.train_seq_len)]:
        target, allowed = int(targets[b, t]), bits[tokens[b, t]]
        weights = torch.where(allowed, plain[b, t].exp(), 0.0)
        costs = -(weights / weights.sum()).log()
        torch.testing.assert_close(losses[b, t], costs[target].where(allowed[target], 0.0))
        prefix_counts = table[target] >= 0 and allowed[table[target]]
        total = total + costs[table[target]] if prefix_counts else total
        excluded, hidden = excluded + (not allowed[target]), hidden + (table[target] >= 0 and not prefix_counts)
    assert excluded >= 16 and hidden >= 16
    torch.testing.assert_close(extra, 0.5 * total / targets.numel())
    (losses.mean() + extra).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    scored = model.eval()(tokens, targets)
    assert scored.isinf().sum() == excluded and scored[scored.isfinite()].equal(losses[scored.isfinite()])


# The rules of a score: each target once, by what came before it, from a whole distribution


@pytest.mark.parametrize("learns", [False, True], ids=["fixed", "learns"])
@pytest.mark.parametrize("stride", [0, 8], ids=["chunks", "windows"])
@pytest.mark.parametrize(
    "mask", [{}, {"CANONICAL": 1}, {"CANONICAL": 1, "CANONICAL_TRAIN": 1}], ids=["no mask", "mask", "mask in training"]
)
def test_a_score_keeps_the_rules(config_of, runtime, token_bytes, mask, stride, learns):
    knobs = {
        "XSA_LAYERS": 2,
        "XSA_GATE": 1,
        "PREFIX_LOSS": 0.5,
        "CONTEXTS": "8@0,32@0.6",
        "VAL_TOKENS_LIMIT": 700,
        "TTT_CHUNK": 128 * learns,
        "TTT_LR": 0.05,
        "TTT_BATCH_TOKENS": 64,
        "EVAL_STRIDE": stride,
    }
    config = config_of(**knobs | mask)
    model = scatter(new_model(config)).eval()
    model.advance(0.0)  # as training leaves it: contexts cut short, which a score is not to see
    model.prepare(config, runtime)
    stream = train_gpt.TokenStream(config.data_path, "val", config.vocab_size)
    evaluator = train_gpt.Evaluator(stream, token_bytes, config, runtime)
    script = models.probe_script(probe, config, model, runtime)
    recorder = probe.Recorder(script, model, evaluator, stream, keep=True)
    found = script.score(evaluator, recorder)
    assert (recorder.counts == 1).all() and recorder.wrong == 0 and recorder.learned == learns
    assert recorder.nats / found.tokens == pytest.approx(found.loss, rel=1e-6) and math.isfinite(found.loss)
    moved = probe.flips_in_evaluation(script, stream, token_bytes, 3, np.random.default_rng(0), learns)
    assert moved == [0.0] * 3
    model.eval()
    with torch.no_grad():
        sums = probe.sums_of_probabilities(script, stream, 40)
    assert len(sums) == 40 and sums == pytest.approx([1.0] * 40, abs=1e-4)


# Whole runs


def test_a_run_with_all_knobs_stopped_and_resumed_is_the_undisturbed_one(tiny, capfd, tmp_path):
    values = {folder: tiny(**ALL, ITERATIONS=8, LOG_DIR=tmp_path / folder) for folder in ("whole", "cut")}
    code, out, err = start(values["whole"], capfd)
    assert code == 0, err
    step = train_gpt.Trainer.step

    def interrupted(trainer, *args):
        if trainer.steps + 1 == 4:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.Trainer, "step", interrupted)
        assert start(values["cut"], capfd)[0] == 128 + signal.SIGTERM
    again = start(values["cut"], capfd)
    assert again[0] == 0 and exact_line(again[1]) == exact_line(out)
    assert same_weights(tmp_path / "whole" / "run", tmp_path / "cut" / "run")
    assert losses_of(tmp_path / "whole" / "run") == losses_of(tmp_path / "cut" / "run")
    assert json.loads((tmp_path / "cut" / "run" / "result.json").read_text())["resumed_at"] == [4]
    weights = torch.load(tmp_path / "whole" / "run" / "final_model.pt")
    gates = [p for name, p in weights.items() if name.endswith("attend.gate")]
    assert len(gates) == 2 and all(gate.abs().min() > 0 for gate in gates)


def test_an_artifact_scores_the_same_in_another_process_with_and_without_the_name_of_its_file(corpus, tmp_path):
    values = models.tiny_settings(corpus, **ALL | {"LOG_DIR": tmp_path / "logs", "WARMUP_STEPS": 1})
    made = process(values, tmp_path)
    assert made.returncode == 0, made.stderr.decode()
    line = exact_line(made.stdout.decode())
    machine = models.machine_settings(corpus, MODE="eval", ARTIFACT="logs/run/final_model.int8.ptz")
    for file in ({}, {"MODEL_FILE": models.FRONTIER}):
        done = process(machine | file, tmp_path)
        assert done.returncode == 0 and exact_line(done.stdout.decode()) == line, done.stderr.decode()


def test_two_ranks_train_and_score_as_one(tiny, launch, tmp_path):
    knobs = ALL | {"ITERATIONS": 10, "VAL_TOKENS_LIMIT": 200, "GRAD_ACCUM_STEPS": 2}
    for ranks in (1, 2):
        done = launch(ranks=ranks, **knobs | {"LOG_DIR": tmp_path / str(ranks)})
        assert done.returncode == 0, done.stderr
    one, two = (losses_of(tmp_path / ranks / "run") for ranks in "12")
    assert len(one) == 10 and one[-1] < one[0] - 0.5 and two == pytest.approx(one, abs=1e-4)
    one, two = (json.loads((tmp_path / ranks / "run" / "result.json").read_text()) for ranks in "12")
    assert two["world_size"] == 2 and two["val_loss"] == pytest.approx(one["val_loss"], abs=1e-4)


# Mistakes


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"XSA_GATE": 1}, "XSA_GATE=1 gates the last XSA_LAYERS=0 blocks: set XSA_LAYERS"),
        ({"MUON_HEADS": 3}, "MUON_HEADS=3 does not divide NUM_KV_HEADS=2: use 0 or one of [1, 2]"),
        ({"CANONICAL_TRAIN": 1}, "CANONICAL_TRAIN=1 needs the mask: set CANONICAL=1"),
        ({"PREFIX_LOSS": -1}, "PREFIX_LOSS=-1.0 is too small"),
        ({"CONTEXTS": "16"}, "CONTEXTS=16: expected LENGTH@SHARE,... such as 16@0,32@0.5"),
        ({"CONTEXTS": "16@0,32@half"}, "expected LENGTH@SHARE"),
        ({"CONTEXTS": "16@0.1,32@0.5"}, "the shares must rise from 0 to less than 1"),
        ({"CONTEXTS": "16@0,32@0"}, "the shares must rise"),
        ({"CONTEXTS": "16@0,32@1"}, "the shares must rise"),
        ({"CONTEXTS": "12@0,32@0.5"}, "each length must divide TRAIN_SEQ_LEN=32: use some of [1, 2, 4, 8, 16, 32]"),
        ({"CONTEXTS": "64@0,32@0.5"}, "each length must divide TRAIN_SEQ_LEN=32"),
        ({"CONTEXTS": "0@0,32@0.5"}, "each length must divide TRAIN_SEQ_LEN=32"),
        ({"CONTEXTS": "8@0,16@0.5"}, "ends with a length of 16: end with TRAIN_SEQ_LEN=32"),
        (
            {"CONTEXTS": "1@0,2@0.1,4@0.2,8@0.3,16@0.4,32@0.5"},
            "has 6 lengths, each of which is compiled: use at most 5",
        ),
    ],
)
def test_mistakes_are_told_with_what_to_do(config_of, knobs, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config_of(**knobs)
