"""Evaluation: every target scored exactly once with the context the design promises, for any number of ranks; loss and
BPB against a naive reference; bytes against the text itself; no side effects; models that are scored by their own
distributions, and models that learn from the text they have been scored on."""

import copy
import dataclasses
import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_documents, write_shard
from models import new_model

import train_gpt
from train_gpt import GPT, Evaluator, Model, TokenBytes, TokenStream, UserError

kernels = train_gpt.tool("kernels")


class FromFunction(Model):
    """A model without weights, of a function of inputs and targets."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, inputs, targets):
        return self.function(inputs, targets)


def counting_stream(folder, targets):
    """A stream whose token at position p is p: each token of a batch says where it comes from."""
    folder.mkdir(exist_ok=True)
    write_shard(folder / "fineweb_val_000000.bin", range(targets + 1))
    return TokenStream(str(folder), "val", 65_536)


# Counts each target as its position: the sum tells which targets were counted.
POSITIONS = SimpleNamespace(count=lambda tokens: int(tokens[1:].astype(np.int64).sum()))


def twice(model):
    """A model that is not compiled, as `score` takes it: itself, and what computes its losses."""
    return model, model


def ranks_of(runtime, world_size):
    fakes = [copy.copy(runtime) for _ in range(world_size)]
    for rank, fake in enumerate(fakes):
        fake.rank, fake.world_size, fake.is_master = rank, world_size, rank == 0
    return fakes


def first_seen(target, length, stride):
    """Position of the first token that the design lets the prediction of token `target` see: the first window scores
    all its targets, a later one (they start every `stride` tokens) its last `stride`."""
    return 0 if target <= length else stride * math.ceil((target - length) / stride)


def cases():
    """(targets, T, stride, tokens per batch, ranks, micro-steps, limit): the corners, then some at random."""
    rng = random.Random(0)
    corners = itertools.product((1, 2, 3, 4, 5, 8, 9), (4,), (0, 1, 3, 4), (8,), (1, 3), (1,), (0,))
    for _ in range(120):
        T, n = rng.choice([1, 2, 5, 8]), rng.randint(1, 60)
        yield (
            n,
            T,
            rng.choice([0, 1, T // 2, T]),
            rng.choice([1, 2 * T, 7 * T, 1000]),
            rng.choice([1, 2, 3, 5]),
            rng.choice([1, 2]),
            rng.choice([0, 0, 1, n // 2, n, n + 5]),
        )
    yield from corners


def test_each_target_is_scored_exactly_once_with_its_full_context(make_config, runtime, tmp_path):
    for case in cases():
        targets, T, stride, batch_tokens, world_size, accum, limit = case
        stream = counting_stream(tmp_path / str(targets), targets)
        config = dataclasses.replace(
            make_config(), train_seq_len=T, eval_stride=stride, val_batch_size=batch_tokens, val_tokens_limit=limit
        )
        seen = []
        for fake in ranks_of(runtime, world_size):
            evaluator = Evaluator(stream, POSITIONS, config, fake, accum)
            for inputs, goals, mask, scored in evaluator.batches(evaluator.targets, 0):
                assert inputs.shape == goals.shape == mask.shape == (evaluator.batch, T), case
                assert len(inputs) * T <= max(T, batch_tokens // (world_size * accum)), case
                assert sorted(goals[mask].tolist()) == [j + 1 for j in scored], case
                for row, column in mask.nonzero().tolist():
                    target, visible = int(goals[row, column]), inputs[row, : column + 1].tolist()
                    assert visible == list(range(first_seen(target, T, stride or T), target)), case
                    seen.append(target)
        assert sorted(seen) == list(range(1, min(limit or targets, targets) + 1)), case


def test_the_sums_over_ranks_are_those_of_all_targets(make_config, runtime, tmp_path):
    """score() itself, with a model whose loss tells the target and its context; padding would be not-a-number."""

    def model(inputs, targets):
        columns = torch.arange(inputs.size(1)).expand_as(inputs)
        context = torch.where(inputs[:, :1] + columns == inputs, columns + 1, 10**6)  # contiguous text only
        loss = torch.sin(targets.double()) + torch.cos(3 * context.double())
        return torch.where(targets > 0, loss, math.nan)

    for case in cases():
        targets, T, stride, batch_tokens, world_size, accum, limit = case
        stream = counting_stream(tmp_path / str(targets), targets)
        config = dataclasses.replace(
            make_config(), train_seq_len=T, eval_stride=stride, val_batch_size=batch_tokens, val_tokens_limit=limit
        )
        wanted, given = range(1, min(limit or targets, targets) + 1), []
        for fake in ranks_of(runtime, world_size):
            fake.all_reduce = lambda values: given.append(values) or [1.0, len(wanted), 1, 0]  # noqa: B023
            Evaluator(stream, POSITIONS, config, fake, accum).score(*twice(FromFunction(model)))
        contexts = [target - first_seen(target, T, stride or T) for target in wanted]
        expected = sum(math.sin(t) + math.cos(3 * c) for t, c in zip(wanted, contexts, strict=True))
        nats, tokens, weight, leave = (sum(column) for column in zip(*given, strict=True))
        assert len(given) == world_size and tokens == len(wanted) and weight == sum(wanted) and not leave, case
        assert nats == pytest.approx(expected, abs=1e-9), case


@pytest.fixture
def trained(make_config):
    """A model with random weights everywhere, such that context matters."""
    model = new_model(make_config(TRAIN_SEQ_LEN=16), kernels.blocked_attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture
def evaluate(make_config, corpus):
    """Function: the Evaluator of the corpus, with overrides by knob, on a runtime."""

    def build(runtime, accum=1, **overrides):
        config = make_config(**{"TRAIN_SEQ_LEN": 16, "VAL_BATCH_SIZE": 128} | overrides)
        stream = TokenStream(config.data_path, "val", config.vocab_size)
        return Evaluator(stream, TokenBytes(config.tokenizer_path, config.vocab_size), config, runtime, accum)

    return build


def byte_count(model, tokens):
    """Bytes of tokens[1:], by the words of the design for a model that writes spaces as they are, one at a time."""
    total = 0
    for token in tokens[1:]:
        if model.is_control(token) or model.is_unknown(token) or model.is_unused(token):
            continue
        if model.is_byte(token):
            total += 1
            continue
        total += sum(1 if character == "\u2581" else len(character.encode()) for character in model.id_to_piece(token))
    return total


@pytest.mark.parametrize("stride", [0, 1, 5, 16])
def test_loss_and_bpb_equal_one_window_per_target(evaluate, runtime, trained, stride):
    limit, T = 150, 16
    evaluator = evaluate(runtime, EVAL_STRIDE=stride, VAL_TOKENS_LIMIT=limit)
    tokens = evaluator.stream.read(0, limit + 1).astype(np.int64)
    nats = 0.0
    with torch.no_grad():
        for target in range(1, limit + 1):
            window = torch.from_numpy(tokens[first_seen(target, T, stride or T) : target + 1])[None]
            nats += float(trained(window[:, :-1], window[:, 1:])[0, -1])
    score, weight = evaluator.score(*twice(trained)), byte_count(evaluator.token_bytes.model, tokens.tolist())
    assert score.loss == pytest.approx(nats / limit, rel=1e-6)
    assert score.bpb == pytest.approx(nats / math.log(2) / weight, rel=1e-6)
    assert (score.tokens, score.bytes) == (limit, weight)


def test_more_context_changes_the_loss_but_never_what_is_scored(evaluate, runtime, trained):
    scores = [evaluate(runtime, EVAL_STRIDE=stride).score(*twice(trained)) for stride in (0, 3, 8, 16)]
    assert len({(score.tokens, score.bytes, score.total) for score in scores}) == 1
    assert scores[0].loss == scores[3].loss and len({score.loss for score in scores}) == 3


def test_the_whole_validation_text_weighs_its_true_bytes(evaluate, runtime, trained):
    """The corpus encodes the documents losslessly: the denominator of BPB is the length of the text itself."""
    evaluator = evaluate(runtime)
    true_bytes = sum(len(text.encode()) for text in make_documents(30, seed=2))
    tokens = evaluator.stream.read(0, len(evaluator.stream))
    assert byte_count(evaluator.token_bytes.model, tokens.tolist()) == true_bytes
    # Any order of tokens: a piece with a leading space after a boundary, byte pieces, unknowns.
    anything = np.random.default_rng(0).integers(evaluator.stream.vocab_size, size=5000)
    anything[::3] = evaluator.token_bytes.model.bos_id()
    assert evaluator.token_bytes.count(anything) == byte_count(evaluator.token_bytes.model, anything.tolist())
    score = evaluator.score(*twice(trained))
    assert score.bytes == true_bytes and score.tokens == score.total == len(tokens) - 1
    assert score.bpb == pytest.approx(score.loss * score.tokens / math.log(2) / true_bytes, rel=1e-12)


@pytest.mark.parametrize("world_size, stride, accum", [(2, 0, 1), (3, 5, 2), (4, 16, 1)])
def test_ranks_sum_to_the_score_of_one(evaluate, runtime, trained, world_size, stride, accum):
    alone, parts = evaluate(runtime, EVAL_STRIDE=stride).score(*twice(trained)), []
    for fake in ranks_of(runtime, world_size):
        fake.all_reduce = lambda values: parts.append(values) or [1.0, alone.tokens, 1, 0]
        evaluate(fake, accum, EVAL_STRIDE=stride).score(*twice(trained))
    nats, tokens, weight, leave = (sum(column) for column in zip(*parts, strict=True))
    assert (tokens, weight, leave) == (alone.tokens, alone.bytes, 0)
    assert nats / tokens == pytest.approx(alone.loss, rel=1e-6)
    assert min(part[1] for part in parts) > 0.8 * tokens / world_size, "the work is shared evenly"


def test_a_target_that_no_rank_scored_is_noticed(evaluate, runtime, trained):
    runtime.all_reduce = lambda values: [values[0], values[1] - 1, *values[2:]]
    with pytest.raises(UserError, match="scored .* targets"):
        evaluate(runtime).score(*twice(trained))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_refused(evaluate, runtime, value):
    with pytest.raises(UserError, match=f"validation loss is {value}"):
        evaluate(runtime).score(*twice(FromFunction(lambda inputs, targets: torch.full(inputs.shape, value))))


def test_the_label_says_partial_only_when_targets_are_left_out(evaluate, runtime, trained):
    everything = evaluate(runtime).total
    labels = {
        limit: evaluate(runtime, VAL_TOKENS_LIMIT=limit).score(*twice(trained)).label
        for limit in (0, everything - 1, everything, everything + 7)
    }
    assert labels.pop(everything - 1) == f" partial:{everything - 1}/{everything}"
    assert set(labels.values()) == {""}


def test_evaluation_changes_nothing_and_training_goes_on(evaluate, runtime, trained):
    evaluator = evaluate(runtime)
    inputs, targets = next(evaluator.batches(evaluator.targets, 0))[:2]
    trained(inputs, targets).mean().backward()
    weights = copy.deepcopy(trained.state_dict())
    grads, rng = [p.grad.clone() for p in trained.parameters()], torch.get_rng_state()
    evaluate(runtime).score(*twice(trained))
    assert all(torch.equal(weights[name], t) for name, t in trained.state_dict().items())
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, trained.parameters(), strict=True))
    assert torch.equal(rng, torch.get_rng_state()) and torch.is_grad_enabled()
    trained.zero_grad()
    trained(inputs, targets).mean().backward()  # fails if evaluation left inference tensors behind
    for a, p in zip(grads, trained.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-6, atol=1e-7)


def test_what_a_model_caches_during_evaluation_can_be_trained_through(evaluate, runtime):
    """Tensors made under inference_mode cannot be: scoring runs under no_grad instead."""
    weight, cache = torch.ones((), requires_grad=True), []

    def model(inputs, targets):
        if not cache:
            cache.append(torch.linspace(0, 1, inputs.size(1)))
        return (weight * cache[0]).expand(inputs.shape)

    recorded = []
    evaluate(runtime).score(*twice(FromFunction(lambda *batch: recorded.append(model(*batch)) or recorded[-1])))
    assert not any(losses.requires_grad for losses in recorded), "scoring must record nothing for gradients"
    model(torch.zeros(2, 16), None).sum().backward()
    assert weight.grad == pytest.approx(16.0)


class Dropping(Model):
    """Every loss is 2, or with dropout 0 or 4."""

    def __init__(self):
        super().__init__()
        self.dropout, self.modes = torch.nn.Dropout(0.5), []

    def forward(self, inputs, targets):
        self.modes.append(self.training)
        return self.dropout(torch.full(inputs.shape, 2.0))


def test_a_model_with_dropout_is_scored_without_and_trains_on_with_it(evaluate, runtime):
    model, evaluator = Dropping(), evaluate(runtime)
    assert evaluator.score(*twice(model)).loss == 2.0
    assert model.training and model(torch.zeros(4, 64), None).unique().tolist() == [0.0, 4.0]
    assert model.modes == [*[False] * (len(model.modes) - 1), True]


def test_a_long_evaluation_reports_its_progress(evaluate, runtime, trained, monkeypatch):
    evaluator, lines, now = evaluate(runtime, VAL_TOKENS_LIMIT=16 * 8 * 4), [], [0.0]
    assert len([*evaluator.batches(evaluator.targets, 0)]) == 4

    def model(inputs, targets):
        now[0] += 11.0
        return trained(inputs, targets)

    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: now[0])
    evaluator.score(*twice(FromFunction(model)), lines.append)
    assert lines == ["eval_progress:25% eta:33s", "eval_progress:50% eta:22s", "eval_progress:75% eta:11s"]


def test_targets_without_bytes_or_no_targets_at_all_are_refused(make_config, runtime, trained, tmp_path):
    config = dataclasses.replace(make_config(), train_seq_len=16)
    weightless = SimpleNamespace(count=lambda tokens: 0)
    with pytest.raises(UserError, match="VAL_TOKENS_LIMIT"):
        Evaluator(counting_stream(tmp_path / "some", 20), weightless, config, runtime).score(*twice(trained))
    counting_stream(tmp_path / "none", 0)
    with pytest.raises(UserError, match="2 are needed"):
        train_gpt.open_text(make_config(DATA_PATH=tmp_path / "none"), None, train_gpt.RunFolder(runtime))


# Models with distributions of their own, and models that learn from what has been scored


@pytest.mark.parametrize("tied", [1, 0])
def test_losses_are_the_distributions_at_the_targets_in_row_major_order(make_config, tied):
    """In float64 on both sides, so that only a fault could make a difference."""
    config = make_config(TRAIN_SEQ_LEN=16, TIE_EMBEDDINGS=tied, LOGIT_SOFTCAP=4)
    model = new_model(config, kernels.blocked_attention, torch.float64).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
        tokens = torch.randint(config.vocab_size, (3, 17), generator=generator)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        for share in (0.0, 0.3, 1.0):
            mask = torch.rand(3, 16, generator=generator) < share
            found = model.distributions(inputs, mask)
            assert found.shape == (int(mask.sum()), config.vocab_size) and found.dtype == torch.float64
            torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(found)).double(), rtol=0, atol=1e-12)
            losses = -found.gather(1, targets[mask][:, None])[:, 0]
            torch.testing.assert_close(losses, model(inputs, targets)[mask], rtol=1e-12, atol=1e-12)


def test_distributions_of_a_bf16_model_are_fp32(make_config):
    model = new_model(make_config(), kernels.blocked_attention, torch.bfloat16).eval()
    tokens = torch.arange(64).view(2, 32)
    assert model.distributions(tokens, tokens > 40).dtype == torch.float32


class Halved(GPT):
    """Half of its probability is spread over the vocabulary."""

    def distributions(self, contexts_BT, scored_BT):
        own = super().distributions(contexts_BT, scored_BT)
        return torch.log(own.exp() / 2 + 1 / (2 * own.size(-1)))


@pytest.mark.parametrize("stride", [0, 5])
def test_a_model_that_overrides_distributions_is_scored_by_them(evaluate, runtime, make_config, trained, stride):
    model = Halved(make_config(TRAIN_SEQ_LEN=16), kernels.blocked_attention)
    model.load_state_dict(trained.state_dict())

    def unused(inputs, targets):
        raise AssertionError("the compiled losses are not what this model predicts")

    unused.eval, unused.train = (lambda: unused), (lambda: unused)
    evaluator = evaluate(runtime, EVAL_STRIDE=stride, VAL_TOKENS_LIMIT=150)
    score = evaluator.score(model, unused)
    nats = 0.0
    with torch.no_grad():
        for inputs, targets, mask, _ in evaluator.batches(150, 0):
            own = trained(inputs, targets)[mask].double().neg().exp()
            nats -= float(torch.log(own / 2 + 1 / (2 * evaluator.stream.vocab_size)).sum())
    assert score.tokens == 150 and score.loss == pytest.approx(nats / 150, rel=1e-6)
    alone, parts = score, []
    for fake in ranks_of(runtime, 2):
        fake.all_reduce = lambda values: parts.append(values) or [1.0, 150, 1, 0]
        evaluate(fake, EVAL_STRIDE=stride, VAL_TOKENS_LIMIT=150).score(model, unused)
    assert sum(part[0] for part in parts) / 150 == pytest.approx(alone.loss, rel=1e-6)


class Recorder(Model):
    """Writes down what an evaluation asks of it, with the targets as the positions they are in `counting_stream`."""

    def __init__(self, observe_every):
        super().__init__()
        self.observe_every = observe_every
        self.events = []

    def begin(self, targets, forward):
        assert not self.training and forward is self
        self.events.append(("begin", targets))
        return f"begins with {targets}"

    def distributions(self, contexts_BT, scored_BT):
        assert not self.training and not torch.is_grad_enabled()
        scored = (contexts_BT[scored_BT] + 1).tolist()
        self.events.append(("score", scored))
        return torch.arange(-1.0, -1001.0, -1.0).expand(len(scored), -1)

    def observe(self, tokens):
        assert tokens.dtype == np.uint16
        self.events.append(("observe", tokens.tolist()))

    def end(self, score):
        self.events.append(("end", score))
        return f"ends with {score.tokens}"


def observing_cases():
    """Those above with the targets between two observations; the last is of fewer targets than a window has."""
    for number, case in enumerate(cases()):
        targets, T, stride, *_ = case
        chunks = {1, 2, T, max(1, T - (stride or T)), T + 1, 3 * T, targets, targets + 5}
        for chunk in sorted(chunks) if number % 3 == 0 else [sorted(chunks)[number % len(chunks)]]:
            yield case, chunk


def test_each_target_is_scored_once_and_before_it_is_observed(make_config, runtime, tmp_path):
    for case, chunk in observing_cases():
        targets, T, stride, batch_tokens, world_size, accum, limit = case
        stream = counting_stream(tmp_path / str(targets), targets)
        config = dataclasses.replace(
            make_config(), train_seq_len=T, eval_stride=stride, val_batch_size=batch_tokens, val_tokens_limit=limit
        )
        scored_in_all = min(limit or targets, targets)
        S, seen, observed = stride or T, [], []
        # The first target of the window that scores a target, counted from 0, says in which chunk it is scored.
        starts = [0, *range(T, scored_in_all, S)]
        chunk_of = {j + 1: max(start for start in starts if start <= j) // chunk for j in range(scored_in_all)}
        for fake in ranks_of(runtime, world_size):
            fake.all_reduce = lambda values: [1.0, scored_in_all, 1, 0]  # noqa: B023
            model, lines = Recorder(chunk), []
            score = Evaluator(stream, POSITIONS, config, fake, accum).score(*twice(model), lines.append, final=True)
            assert model.training and lines == [f"begins with {scored_in_all}", f"ends with {scored_in_all}"], case
            assert model.events[0] == ("begin", scored_in_all) and model.events[-1] == ("end", score), case
            assert [kind for kind, _ in model.events].count("begin") == 1, case
            observed.append([tokens for kind, tokens in model.events if kind == "observe"])
            phase = 0
            for kind, content in model.events[1:-1]:
                phase += kind == "observe"
                for target in content if kind == "score" else ():
                    assert chunk_of[target] == phase, (case, chunk, target)
                    seen.append(target)
        assert sorted(seen) == list(range(1, scored_in_all + 1)), (case, chunk)
        chunks = 1 + max(chunk_of.values())
        expected = [[*range(n * chunk, min((n + 1) * chunk, targets) + 1)] for n in range(chunks - 1)]
        assert observed == [expected] * world_size, (case, chunk)
        # It must not have been scored later than it was observed.
        assert all(phase <= (target - 1) // chunk for target, phase in chunk_of.items()), (case, chunk)


def test_a_validation_in_training_neither_begins_nor_observes_nor_ends(make_config, runtime, tmp_path):
    stream = counting_stream(tmp_path / "val", 50)
    config = dataclasses.replace(make_config(), train_seq_len=4, val_batch_size=8)
    model, lines = Recorder(8), []
    score = Evaluator(stream, POSITIONS, config, runtime).score(*twice(model), lines.append)
    assert {kind for kind, _ in model.events} == {"score"} and score.tokens == 50 and not lines
    plain = Recorder(0)  # and one that never observes begins and ends its final score
    Evaluator(stream, POSITIONS, config, runtime).score(*twice(plain), lines.append, final=True)
    assert [kind for kind, _ in plain.events if kind != "score"] == ["begin", "end"]


class Counts(Model):
    """Laplace's rule on the tokens it has observed; it takes gradients in `observe`, as a model that trains there."""

    observe_every = 40

    def __init__(self, vocab_size):
        super().__init__()
        self.counts = torch.nn.Parameter(torch.ones(vocab_size))

    def begin(self, targets, forward):
        self.saved = self.counts.detach().clone()

    def distributions(self, contexts_BT, scored_BT):
        return (self.counts / self.counts.sum()).log().expand(int(scored_BT.sum()), -1)

    def forward(self, tokens_BT, targets_BT=None):
        return -(self.counts / self.counts.sum()).log()[targets_BT]

    def observe(self, tokens):
        targets = torch.from_numpy(tokens[1:].astype(np.int64))
        with torch.enable_grad():
            self.counts[targets].sum().backward()
        with torch.no_grad():
            self.counts += self.counts.grad
        self.counts.grad = None

    def end(self, score):
        with torch.no_grad():
            self.counts.copy_(self.saved)


@pytest.mark.parametrize("stride", [0, 5])
def test_a_model_that_learns_as_it_is_scored_gets_the_score_of_its_formula_on_any_ranks(evaluate, runtime, stride):
    limit, T = 300, 16
    evaluator = evaluate(runtime, EVAL_STRIDE=stride, VAL_TOKENS_LIMIT=limit)
    tokens = evaluator.stream.read(0, limit + 1).astype(np.int64)[1:]
    V, S, nats = evaluator.stream.vocab_size, stride or T, 0.0
    for j in range(limit):
        start = 0 if j < T else T + (j - T) // S * S  # of the window that scores target j
        known = tokens[: start // 40 * 40]
        nats -= math.log((1 + np.count_nonzero(known == tokens[j])) / (V + len(known)))
    model = Counts(V)
    score = evaluator.score(*twice(model), final=True)
    assert score.loss == pytest.approx(nats / limit, rel=1e-6)
    assert (model.counts == 1).all(), "what it learned is undone"
    assert evaluator.score(*twice(model)).loss == pytest.approx(math.log(V), rel=1e-6)
    parts = []
    for fake in ranks_of(runtime, 2):
        fake.all_reduce = lambda values: parts.append(values) or [1.0, limit, 1, 0]
        evaluate(fake, EVAL_STRIDE=stride, VAL_TOKENS_LIMIT=limit).score(*twice(model), final=True)
    assert sum(part[0] for part in parts) == pytest.approx(nats, rel=1e-6) and min(part[1] for part in parts) > 100


def test_a_mask_that_skips_targets_is_found_by_the_script(make_config, runtime, tmp_path):
    """The count of targets is that of the mask, which decides whose losses count."""

    class Skipping(Evaluator):
        def batches(self, chunk, number):
            for inputs, targets, mask, scored in super().batches(chunk, number):
                yield inputs, targets, mask & (targets % 2 == 0), scored

    config = dataclasses.replace(make_config(), train_seq_len=4, eval_stride=0, val_batch_size=8, val_tokens_limit=0)
    evaluator = Skipping(counting_stream(tmp_path, 20), POSITIONS, config, runtime)
    with pytest.raises(UserError, match="scored 10 of 20 targets"):
        evaluator.score(*twice(FromFunction(lambda inputs, targets: targets.double())))
