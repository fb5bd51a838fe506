"""Evaluation: every target scored exactly once with the context the design promises, for any number of ranks; loss and
BPB against a naive reference; bytes against the text itself; no side effects."""

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

import train_gpt
from train_gpt import GPT, Evaluator, TokenBytes, TokenStream, UserError

kernels = train_gpt.tool("kernels")


class FromFunction(torch.nn.Module):
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


# Weighs each target as its position: the sum tells which targets were weighed.
POSITIONS = SimpleNamespace(weigh=lambda tokens: int(tokens[1:].astype(np.int64).sum()))


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
            evaluator, windows = Evaluator(stream, POSITIONS, config, fake, accum), 0
            for index in evaluator.windows[:: evaluator.batch]:
                inputs, goals, mask, scored = evaluator.batch_at(index)
                windows += len(inputs)
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
            fake.sum = lambda values: given.append(values) or [1.0, len(wanted), 1, 0]  # noqa: B023
            Evaluator(stream, POSITIONS, config, fake, accum).score(FromFunction(model))
        contexts = [target - first_seen(target, T, stride or T) for target in wanted]
        expected = sum(math.sin(t) + math.cos(3 * c) for t, c in zip(wanted, contexts, strict=True))
        nats, tokens, weight, leave = (sum(column) for column in zip(*given, strict=True))
        assert len(given) == world_size and tokens == len(wanted) and weight == sum(wanted) and not leave, case
        assert nats == pytest.approx(expected, abs=1e-9), case


@pytest.fixture
def trained(make_config):
    """A model with random weights everywhere, such that context matters."""
    model = GPT(make_config(TRAIN_SEQ_LEN=16), kernels.blocked_attention)
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
    score, weight = evaluator.score(trained), byte_count(evaluator.token_bytes.model, tokens.tolist())
    assert score.loss == pytest.approx(nats / limit, rel=1e-6)
    assert score.bpb == pytest.approx(nats / math.log(2) / weight, rel=1e-6)
    assert (score.tokens, score.bytes) == (limit, weight)


def test_more_context_changes_the_loss_but_never_what_is_scored(evaluate, runtime, trained):
    scores = [evaluate(runtime, EVAL_STRIDE=stride).score(trained) for stride in (0, 3, 8, 16)]
    assert len({(score.tokens, score.bytes, score.of) for score in scores}) == 1
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
    assert evaluator.token_bytes.weigh(anything) == byte_count(evaluator.token_bytes.model, anything.tolist())
    score = evaluator.score(trained)
    assert score.bytes == true_bytes and score.tokens == score.of == len(tokens) - 1
    assert score.bpb == pytest.approx(score.loss * score.tokens / math.log(2) / true_bytes, rel=1e-12)


@pytest.mark.parametrize("world_size, stride, accum", [(2, 0, 1), (3, 5, 2), (4, 16, 1)])
def test_ranks_sum_to_the_score_of_one(evaluate, runtime, trained, world_size, stride, accum):
    alone, parts = evaluate(runtime, EVAL_STRIDE=stride).score(trained), []
    for fake in ranks_of(runtime, world_size):
        fake.sum = lambda values: parts.append(values) or [1.0, alone.tokens, 1, 0]
        evaluate(fake, accum, EVAL_STRIDE=stride).score(trained)
    nats, tokens, weight, leave = (sum(column) for column in zip(*parts, strict=True))
    assert (tokens, weight, leave) == (alone.tokens, alone.bytes, 0)
    assert nats / tokens == pytest.approx(alone.loss, rel=1e-6)
    assert min(part[1] for part in parts) > 0.8 * tokens / world_size, "the work is shared evenly"


def test_a_target_that_no_rank_scored_is_noticed(evaluate, runtime, trained):
    runtime.sum = lambda values: [values[0], values[1] - 1, *values[2:]]
    with pytest.raises(UserError, match="scored .* targets"):
        evaluate(runtime).score(trained)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_refused(evaluate, runtime, value):
    with pytest.raises(UserError, match=f"validation loss is {value}"):
        evaluate(runtime).score(FromFunction(lambda inputs, targets: torch.full(inputs.shape, value)))


def test_the_label_says_partial_only_when_targets_are_left_out(evaluate, runtime, trained):
    everything = evaluate(runtime).of
    labels = {
        limit: evaluate(runtime, VAL_TOKENS_LIMIT=limit).score(trained).label
        for limit in (0, everything - 1, everything, everything + 7)
    }
    assert labels.pop(everything - 1) == f" partial:{everything - 1}/{everything}"
    assert set(labels.values()) == {""}


def test_evaluation_changes_nothing_and_training_goes_on(evaluate, runtime, trained):
    inputs, targets = evaluate(runtime).batch_at(0)[:2]
    trained(inputs, targets).mean().backward()
    weights = copy.deepcopy(trained.state_dict())
    grads, rng = [p.grad.clone() for p in trained.parameters()], torch.get_rng_state()
    evaluate(runtime).score(trained)
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
    evaluate(runtime).score(FromFunction(lambda *batch: recorded.append(model(*batch)) or recorded[-1]))
    assert not any(losses.requires_grad for losses in recorded), "scoring must record nothing for gradients"
    model(torch.zeros(2, 16), None).sum().backward()
    assert weight.grad == pytest.approx(16.0)


class Dropping(torch.nn.Module):
    """Every loss is 2, or with dropout 0 or 4."""

    def __init__(self):
        super().__init__()
        self.dropout, self.modes = torch.nn.Dropout(0.5), []

    def forward(self, inputs, targets):
        self.modes.append(self.training)
        return self.dropout(torch.full(inputs.shape, 2.0))


def test_a_model_with_dropout_is_scored_without_and_trains_on_with_it(evaluate, runtime):
    model, evaluator = Dropping(), evaluate(runtime)
    assert evaluator.score(model).loss == 2.0
    assert model.training and model(torch.zeros(4, 64), None).unique().tolist() == [0.0, 4.0]
    assert model.modes == [*[False] * (len(model.modes) - 1), True]


def test_a_long_evaluation_reports_its_progress(evaluate, runtime, trained, monkeypatch):
    evaluator, lines, now = evaluate(runtime, VAL_TOKENS_LIMIT=16 * 8 * 4), [], [0.0]
    assert len(evaluator.windows[:: evaluator.batch]) == 4

    def model(inputs, targets):
        now[0] += 11.0
        return trained(inputs, targets)

    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: now[0])
    evaluator.score(FromFunction(model), lines.append)
    assert lines == ["eval_progress:25% eta:33s", "eval_progress:50% eta:22s", "eval_progress:75% eta:11s"]


def test_targets_without_bytes_or_no_targets_at_all_are_refused(make_config, runtime, trained, tmp_path):
    config = dataclasses.replace(make_config(), train_seq_len=16)
    weightless = SimpleNamespace(weigh=lambda tokens: 0)
    with pytest.raises(UserError, match="VAL_TOKENS_LIMIT"):
        Evaluator(counting_stream(tmp_path / "some", 20), weightless, config, runtime).score(trained)
    counting_stream(tmp_path / "none", 0)
    with pytest.raises(UserError, match="2 are needed"):
        train_gpt.open_text(make_config(DATA_PATH=tmp_path / "none"), train_gpt.RunFolder(runtime))
