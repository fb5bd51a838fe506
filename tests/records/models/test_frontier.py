"""records/models/frontier.py: with its knobs off it equals the script; recurrence, contexts, prefix loss, mask and
Muon's options against their formulas; the rules of a score; what changes during a run.

test_techniques.py covers the architecture, test_contract.py complete runs with everything on."""

import itertools
import math
import re
from types import SimpleNamespace

import contract
import models
import numpy as np
import oracle
import pytest
import runs
import torch
from models import new_model

import train_gpt
from train_gpt import Evaluator, TokenBytes, Trainer, UserError

FrontierConfig, frontier = models.model_file("frontier")
OFF = {"MODEL_FILE": models.FRONTIER}


@pytest.fixture
def config_of(tiny):
    """Function: the FrontierConfig of `tiny`, with knob overrides."""
    return lambda **overrides: FrontierConfig.load([], tiny(**overrides))


@pytest.fixture
def go(corpus, tmp_path):
    """Function: a short run of the frontier with these knobs. Returns the contents of its folder."""
    with models.no_siblings():
        yield runs.starter(corpus, tmp_path, MODEL_FILE=models.FRONTIER)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def scatter(model):
    """Randomize every parameter: many of the initial values are 0."""
    with torch.no_grad():
        for seed, p in enumerate(model.parameters()):
            p.copy_(0.5 * randn(*p.shape, seed=seed))
    return model


def double(config):
    """The model in float64, except for its RoPE tables."""
    return new_model(config, train_gpt.grouped_attention, torch.float64).double()


def random_tokens(config, batch=3, seed=0):
    shape = (batch, config.train_seq_len)
    return torch.randint(3, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# Off


def test_with_every_knob_off_it_trains_bit_for_bit_as_the_script(go, monkeypatch):
    monkeypatch.setattr(train_gpt, "INT8_MIN_NUMEL", 1000)  # so that some tensors are quantized
    knobs = {"WARMUP_STEPS": 1, "NUM_LAYERS": 3, "TIE_EMBEDDINGS": 0}
    ours, theirs = (go(RUN_ID=name, MODEL_FILE=file, **knobs) for name, file in (("a", models.FRONTIER), ("b", "")))
    assert len(ours.losses) == 4 and ours.losses == theirs.losses
    one, other = (torch.load(run.path / "final_model.pt") for run in (ours, theirs))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    assert ours.result["val_loss"] == theirs.result["val_loss"]
    assert ours.result["sources"].keys() == {"train_gpt.py", "frontier.py", "score_first.py"}


def test_with_every_knob_off_there_is_nothing_new(config_of, make_config, runtime):
    model, plain = new_model(config_of(NUM_LAYERS=3)), new_model(make_config(NUM_LAYERS=3))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))
    assert model.graph_starts == plain.graph_starts == (0.0,) and model.observe_every == 0
    assert type(model.optimizers(config_of(), runtime)[1]) is train_gpt.Muon
    assert not dict(model.named_buffers()).keys() - dict(plain.named_buffers()).keys()


# FOLD_SCALES, FUSE_QKV

LEAN = {"FOLD_SCALES": 1, "FUSE_QKV": 1}


def test_folded_and_fused_there_are_fewer_passes_over_the_tokens(config_of):
    """Measured by the graph's saved tensors and operations: no projection outputs, and two matmuls fewer per block."""
    counts = []
    for knobs in ({}, LEAN):
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
    for knobs in ({}, LEAN):
        config = config_of(XSA_LAYERS=1, **knobs)
        model, tokens = scatter(new_model(config)), random_tokens(config)
        loader = SimpleNamespace(next_step=lambda tokens=tokens: ([tokens], None))
        found.append(collect(model, loader, 2, runtime))
    expected = {name for name, p in model.named_parameters() if model.rule(name).group == "matrix"} | {"tok_emb.weight"}
    assert found[0].keys() == found[1].keys() == expected
    for name, hessian in found[0].items():
        assert 0 < hessian.abs().max() and (found[1][name] - hessian).abs().max() < 1e-5 * hessian.abs().max(), name


def test_a_checkpoint_and_an_artifact_do_not_ask_whether_they_are_folded_and_fused(go, corpus, tmp_path, capsys):
    """A run continues with both; without them its artifact has the same score up to rounding."""
    common = {"CODEC": "rans", "GPTQ_BATCHES": 1, "WEIGHT_BITS": 6, "WARMDOWN_FRAC": 0, "ITERATIONS": 6}
    begun = go(**common | {"ITERATIONS": 3}, RUN_ID="begun")
    resumed = {"RESUME": begun.path / "checkpoint.pt"} | common
    plain, lean = (go(**resumed | knobs, RUN_ID=name) for name, knobs in (("plain", {}), ("lean", LEAN)))
    assert len(lean.losses) == 3 and lean.losses == pytest.approx(plain.losses, abs=1e-5)
    assert lean.result["val_loss"] == pytest.approx(plain.result["val_loss"], abs=1e-3)
    assert lean.result["val_loss"] < begun.result["val_loss"] - 0.1
    artifact = lean.path / "final_model.rans.ptz"
    told = models.open_artifact(artifact)["config"]
    assert told["fold_scales"] is True and told["fuse_qkv"] is True
    off = dict.fromkeys(LEAN, 0)
    loss, _ = runs.score_again(corpus, tmp_path / "again", artifact, capsys, **off)
    assert float(loss) == pytest.approx(lean.result["val_loss"], abs=1e-6)


# MUON_HEADS, POLAR_EXPRESS


def by_singular_values(u, quintics):
    """U p(S) V^T of a matrix, where p is the composition of the quintics."""
    left, s, right = torch.linalg.svd(u, full_matrices=False)
    for a, b, c in quintics:
        s = a * s + b * s**3 + c * s**5
    return left @ torch.diag(s) @ right


def paper_quintics(steps):
    rest = (1.875, -1.25, 0.375)
    six = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in frontier.POLAR_EXPRESS[:6]]
    return (six + [rest] * steps)[:steps]


@pytest.mark.parametrize("row_norm", [0, 1])
@pytest.mark.parametrize("heads, polar", [(0, 1), (1, 0), (1, 1), (2, 0)])
def test_a_step_of_muon_equals_the_formulas_piece_by_piece(config_of, runtime, heads, row_norm, polar):
    knobs = {"MUON_BACKEND_STEPS": 4, "MUON_MOMENTUM": 0.9, "MATRIX_LR": 0.1, "MUON_WEIGHT_DECAY": 0.3}
    config = config_of(MUON_HEADS=heads, MUON_ROW_NORM=row_norm, POLAR_EXPRESS=polar, **knobs)
    model = double(config)
    runtime.dtype = torch.float64
    adam, muon = model.optimizers(config, runtime)
    trained = [p for optimizer in (adam, muon) for group in optimizer.param_groups for p in group["params"]]
    assert len(trained) == len(set(trained)) == len(list(model.parameters()))
    expected = {}
    for seed, (name, p) in enumerate(model.named_parameters()):
        p.grad = randn(*p.shape, seed=seed)
        p.grad[0] = 0
        if model.rule(name).group != "matrix":
            continue
        cut = heads and re.search(r"c_[qkv]\.weight$", name)
        pieces = []
        for u in (p.grad * 1.9).split(heads * 8 if cut else len(p)):
            u = u / u.norm(dim=1, keepdim=True).clamp(min=1e-30) if row_norm else u
            quintics = paper_quintics(4) if polar else [(3.4445, -4.7750, 2.0315)] * 4
            u = by_singular_values(u / u.norm() / (1.01 if polar else 1), quintics)
            pieces.append(u * max(1, u.size(0) / u.size(1)) ** 0.5)
        expected[name] = p.detach() * (1 - 0.1 * 0.3) - 0.1 * torch.cat(pieces)
    muon.step()
    assert len(expected) == 12
    for name, value in expected.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows, cols", [(24, 24), (8, 32), (32, 8)])
@pytest.mark.parametrize("steps", [1, 4, 5, 6, 10])
def test_polar_express_brings_singular_values_nearer_to_1_than_the_usual_coefficients(rows, cols, steps):
    """In the worst case from the first iteration on, and on average from the fifth on: for singular values from a
    thousandth to 1, the range for which the paper's iterations are optimal."""
    left, right = (torch.linalg.qr(randn(n, n, seed=n))[0] for n in (rows, cols))
    values, errors = torch.logspace(-3, -0.01, min(rows, cols), dtype=torch.float64), []
    matrix = left[:, : len(values)] @ values.diag() @ right[:, : len(values)].T
    result = train_gpt.newton_schulz(matrix[None], frontier.polar_express(steps))
    for matrices in (result, train_gpt.newton_schulz(matrix[None], [train_gpt.Muon.QUINTIC] * steps)):
        errors.append((torch.linalg.svdvals(matrices) - 1).abs())
    assert errors[0].max() < errors[1].max() and (steps < 5 or errors[0].mean() < 0.5 * errors[1].mean())
    assert errors[0].max() < {1: 1, 4: 0.6, 5: 0.17, 6: 0.01, 10: 1e-6}[steps]
    expected = by_singular_values(matrix / 1.01, paper_quintics(steps))
    torch.testing.assert_close(result[0], expected, rtol=1e-9, atol=1e-9)


# PREFIX_LOSS


@pytest.fixture
def token_bytes(config_of):
    config = config_of()
    return TokenBytes(config.tokenizer_path, config.vocab_size)


def slow_prefixes(token_bytes, vocab_size):
    """The prefix of each token, by comparison with all the others."""
    texts = {}
    for i, piece in enumerate(token_bytes.pieces):
        if piece is not None and (piece or i in token_bytes.leading):
            texts[i] = b" " * (i in token_bytes.leading) + piece
    table = [-100] * vocab_size
    for i, text in texts.items():
        shorter = [j for j in texts if text.startswith(texts[j]) and len(texts[j]) < len(text)]
        # The longest; among equals, one that is not a byte piece.
        shorter.sort(key=lambda j: (len(texts[j]), j not in token_bytes.byte_ids))
        table[i] = shorter[-1] if shorter else -100
    return table


def test_the_table_of_prefixes_equals_a_search_through_all_tokens(token_bytes):
    size = token_bytes.size + 3  # ids that only pad the vocabulary
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


# CANONICAL_TRAIN


def test_the_mask_in_training_leaves_a_distribution_over_what_is_allowed(config_of, runtime, token_bytes):
    config = config_of(CANONICAL=1, CANONICAL_TRAIN=1, PREFIX_LOSS=0.5)
    model, tokens, targets = scatter(double(config)), *map(random_tokens, [config] * 2, [3, 3], [0, 1])
    bits = frontier.sibling("canonical").allowed_pairs(config.tokenizer_path, config.vocab_size)
    bits = torch.from_numpy(np.unpackbits(bits, axis=1, count=config.vocab_size, bitorder="little").astype(bool))
    table = slow_prefixes(token_bytes, config.vocab_size)
    # Targets that the mask excludes, and others whose prefixes it excludes.
    pairs = [*itertools.product(range(config.vocab_size), repeat=2)]
    odd = [(a, b) for a, b in pairs if not bits[a, b]][:16]
    odd += [(a, b) for a, b in pairs if bits[a, b] and table[b] >= 0 and not bits[a, table[b]]][:16]
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


# A score


@pytest.mark.parametrize("learns", [False, True], ids=["fixed", "learns"])
@pytest.mark.parametrize("stride", [0, 8], ids=["chunks", "windows"])
def test_no_score_knows_tokens_to_come(config_of, runtime, token_bytes, stride, learns):
    knobs = {"CANONICAL": 1, "CANONICAL_TRAIN": 1, "PREFIX_LOSS": 0.5, "CONTEXTS": "8@0,32@0.6", "XSA_LAYERS": 2}
    knobs |= {"VAL_TOKENS_LIMIT": 700, "EVAL_STRIDE": stride}
    config = config_of(**knobs, TTT_CHUNK=128 * learns, TTT_LR=0.05, TTT_BATCH_TOKENS=64)
    model = scatter(new_model(config))
    model.advance(0.0)  # as training leaves it: shortened contexts, which a score must not use
    model.prepare(config, runtime)
    stream = train_gpt.TokenStream(config.data_path, "val", config.vocab_size)
    evaluator = Evaluator(stream, token_bytes, config, runtime)
    assert oracle.moved_before_a_changed_token(model, evaluator, (40, 300, 650)) == [0.0] * 3


# What changes during a run


@pytest.fixture
def graphs(monkeypatch):
    yield from runs.counted_graphs(monkeypatch)


@pytest.mark.parametrize("learns", [{}, contract.TTT], ids=["fixed", "learns"])
def test_all_graphs_are_compiled_before_the_clock_starts(go, graphs, monkeypatch, learns):
    """Compiling at the switch would cost training time, and the final evaluation must not compile either: its clock
    starts after Model.begin."""
    counts, warm_up, observe = [], Trainer.warm_up, frontier.GPT.observe

    def watched_warm_up(self, *args):
        warm_up(self, *args)
        counts.append(len(graphs))

    def watched_observe(self, tokens):
        counts.append(len(graphs))
        observe(self, tokens)

    monkeypatch.setattr(Trainer, "warm_up", watched_warm_up)
    monkeypatch.setattr(frontier.GPT, "observe", watched_observe)
    small = {"NUM_LAYERS": 2, "LOOP_LAYERS": "1-1", "ITERATIONS": 10, "WARMUP_STEPS": 1, "VAL_LOSS_EVERY": 1}
    go(**contract.FRONTIER | {"TTT_CHUNK": 0} | small | learns)
    in_training, *in_evaluation = counts
    assert in_training >= 4 + 2, "contexts of 8 and 16, 16 and 32 with recurrence; validations with and without it"
    more = 2 if learns else 0  # a batch of two windows, and an SGD step in eval mode
    assert in_evaluation == [in_training + more] * (2 if learns else 0)
    assert len(graphs) == in_training + more, "something was compiled during the run"


def test_an_artifact_recurs_even_if_the_run_never_did(go, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_gpt, "INT8_MIN_NUMEL", 500)  # so that small tensors are rounded
    run = go(**contract.FRONTIER | {"LOOP_START": 1})
    again = runs.score_again(corpus, tmp_path / "again", run.path / "final_model.rans.ptz", capsys)
    assert again == [f"{run.result[key]:.8f}" for key in ("val_loss", "val_bpb")]
    assert "\nfinal_int6_rans_roundtrip_exact val_loss:" in run.log


# Reserving time for GPTQ


def test_a_calibration_that_would_take_the_whole_clock_is_refused(corpus, tmp_path, capsys):
    knobs = {"MODEL_FILE": models.FRONTIER, "GPTQ_BATCHES": 10**6, "MAX_WALLCLOCK_SECONDS": 1}
    assert models.call_main(models.tiny_settings(corpus, LOG_DIR=tmp_path, **knobs)) == 2
    assert re.search(r"error: GPTQ_BATCHES=1000000 takes \d+ s, the whole clock: use fewer", capsys.readouterr().err)


def test_the_clock_is_reserved_for_the_calibration(go, monkeypatch):
    """It reserves the measured time of two micro-batches plus 50%."""
    reserved, plan = [], Trainer.plan
    monkeypatch.setattr(Trainer, "plan", lambda self: reserved.append(self.reserve) or plan(self))
    go(GPTQ_BATCHES=2, ITERATIONS=2)
    assert len({*reserved}) == 1 and 0 < reserved[0] < 5
    reserved.clear()
    go(CODEC="rans", ITERATIONS=2, RUN_ID="plain")
    assert {*reserved} == {0.0}


# Mistakes


def test_the_token_that_begins_a_document_is_that_of_the_text(tiny, capfd):
    assert models.call_main(tiny(**OFF, SMEAR_GATE=1, START_TOKEN=5)) == 2
    assert "START_TOKEN=5, but documents begin with token 1: set that" in capfd.readouterr().err


MISTAKES = {
    "XSA_GATE=1": "XSA_GATE=1 gates the last XSA_LAYERS=0 blocks: set XSA_LAYERS",
    "MUON_HEADS=3": "MUON_HEADS=3 does not divide NUM_KV_HEADS=2: use 0 or one of [1, 2]",
    "CANONICAL_TRAIN=1": "CANONICAL_TRAIN=1 needs the mask: set CANONICAL=1",
    "CONTEXTS=16": "CONTEXTS=16: expected LENGTH@SHARE,... such as 16@0,32@0.5",
    "CONTEXTS=16@0,32@half": "expected LENGTH@SHARE",
    "CONTEXTS=16@0.1,32@0.5": "the shares must rise from 0 to less than 1",
    "CONTEXTS=16@0,32@0": "the shares must rise",
    "CONTEXTS=16@0,32@1": "the shares must rise",
    "CONTEXTS=12@0,32@0.5": "each length must divide TRAIN_SEQ_LEN=32: use some of [1, 2, 4, 8, 16, 32]",
    "CONTEXTS=64@0,32@0.5": "each length must divide TRAIN_SEQ_LEN=32",
    "CONTEXTS=0@0,32@0.5": "each length must divide TRAIN_SEQ_LEN=32",
    "CONTEXTS=8@0,16@0.5": "ends with a length of 16: end with TRAIN_SEQ_LEN=32",
    "CONTEXTS=1@0,2@0.1,4@0.2,8@0.3,16@0.4,32@0.5": "has 6 lengths, each of which is compiled: use at most 5",
}


@pytest.mark.parametrize("text, message", MISTAKES.items())
def test_mistakes_are_told_with_what_to_do(config_of, text, message):
    name, _, value = text.partition("=")
    with pytest.raises(UserError, match=re.escape(message)):
        config_of(**{name: value})
