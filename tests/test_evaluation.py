"""Every target is scored exactly once with its full context, for any number of ranks; loss and BPB against a naive
reference; bytes against the text itself; no side effects; models that define their own distributions, and models that
train on the text they have already been scored on."""

import copy
import itertools
import math
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import make_documents, write_shard
from models import new_model

import train_gpt
from train_gpt import GPT, Evaluator, Model, TokenBytes, TokenStream, UserError

kernels = train_gpt.tool("kernels")


class FromFunction(Model):
    """A model without weights, defined by a function of inputs and targets."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, inputs, targets):
        return self.function(inputs, targets)


def counting_stream(folder, targets):
    """A stream whose token at position p is p, so that each token of a batch shows its position."""
    folder.mkdir(exist_ok=True)
    write_shard(folder / "fineweb_val_000000.bin", range(targets + 1))
    return TokenStream(str(folder), "val", 65_536)


# Counts each target as its position, so that the sum shows which targets were counted.
POSITIONS = SimpleNamespace(count=lambda tokens: int(tokens[1:].astype(np.int64).sum()))


def twice(model):
    """A model without compilation, as `score` takes it: the model itself, and what computes its losses."""
    return model, model


def ranks_of(runtime, world_size):
    fakes = [copy.copy(runtime) for _ in range(world_size)]
    for rank, fake in enumerate(fakes):
        fake.rank, fake.world_size, fake.is_master = rank, world_size, rank == 0
    return fakes


def score_on_ranks(runtime, world_size, tokens, score) -> list[list[float]]:
    """What each rank contributes to the all-reduce: nats, tokens, bytes and whether it was interrupted."""
    parts = []
    for fake in ranks_of(runtime, world_size):
        fake.all_reduce = lambda values: parts.append(values) or [1.0, tokens, 1, 0]
        score(fake)
    assert len(parts) == world_size
    return parts


def first_seen(target, length, stride):
    """Position of the first token visible to the prediction of token `target`. The first window scores all its targets,
    each later one (they start every `stride` tokens) its last `stride`."""
    return 0 if target <= length else stride * math.ceil((target - length) / stride)


class Case(NamedTuple):
    targets: int
    T: int
    stride: int
    batch_tokens: int
    ranks: int
    accum: int
    limit: int

    @property
    def scored(self) -> int:
        return min(self.limit or self.targets, self.targets)

    def evaluator(self, make_config, runtime, folder) -> Evaluator:
        stream = counting_stream(folder / str(self.targets), self.targets)
        knobs = {"val_batch_size": self.batch_tokens, "val_tokens_limit": self.limit}
        config = replace(make_config(), train_seq_len=self.T, eval_stride=self.stride, **knobs)
        return Evaluator(stream, POSITIONS, config, runtime, self.accum)


def cases():
    """Random cases, then edge cases."""
    rng = random.Random(0)
    for _ in range(120):
        T, n = rng.choice([1, 2, 5, 8]), rng.randint(1, 60)
        stride, batch_tokens = rng.choice([0, 1, T // 2, T]), rng.choice([1, 2 * T, 7 * T, 1000])
        ranks, accum, limit = rng.choice([1, 2, 3, 5]), rng.choice([1, 2]), rng.choice([0, 0, 1, n // 2, n, n + 5])
        yield Case(n, T, stride, batch_tokens, ranks, accum, limit)
    for n, stride, ranks in itertools.product((1, 2, 3, 4, 5, 8, 9), (0, 1, 3, 4), (1, 3)):
        yield Case(n, 4, stride, 8, ranks, 1, 0)


def test_each_target_is_scored_exactly_once_with_its_full_context(make_config, runtime, tmp_path):
    for case in cases():
        seen = []
        for fake in ranks_of(runtime, case.ranks):
            evaluator = case.evaluator(make_config, fake, tmp_path)
            for inputs, goals, mask, scored in evaluator.batches(evaluator.targets, 0):
                assert inputs.shape == goals.shape == mask.shape == (evaluator.batch, case.T), case
                assert len(inputs) * case.T <= max(case.T, case.batch_tokens // (case.ranks * case.accum)), case
                assert sorted(goals[mask].tolist()) == [j + 1 for j in scored], case
                for row, column in mask.nonzero().tolist():
                    target, visible = int(goals[row, column]), inputs[row, : column + 1].tolist()
                    assert visible == list(range(first_seen(target, case.T, case.stride or case.T), target)), case
                    seen.append(target)
        assert sorted(seen) == list(range(1, case.scored + 1)), case


def test_the_sums_over_ranks_are_those_of_all_targets(make_config, runtime, tmp_path):
    """Uses score() itself, with a model whose loss encodes the target and its context; padding would give NaN."""

    def model(inputs, targets):
        columns = torch.arange(inputs.size(1)).expand_as(inputs)
        context = torch.where(inputs[:, :1] + columns == inputs, columns + 1, 10**6)  # contiguous text only
        loss = torch.sin(targets.double()) + torch.cos(3 * context.double())
        return torch.where(targets > 0, loss, math.nan)

    for case in cases():
        parts = score_on_ranks(
            runtime,
            case.ranks,
            case.scored,
            lambda fake: case.evaluator(make_config, fake, tmp_path).score(*twice(FromFunction(model))),  # noqa: B023
        )
        wanted = range(1, case.scored + 1)
        contexts = [target - first_seen(target, case.T, case.stride or case.T) for target in wanted]
        expected = sum(math.sin(t) + math.cos(3 * c) for t, c in zip(wanted, contexts, strict=True))
        nats, tokens, weight, leave = (sum(column) for column in zip(*parts, strict=True))
        assert tokens == len(wanted) and weight == sum(wanted) and not leave, case
        assert nats == pytest.approx(expected, abs=1e-9), case


def scatter(model):
    """Randomize every parameter, so that context matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture
def trained(make_config):
    return scatter(new_model(make_config(TRAIN_SEQ_LEN=16), kernels.blocked_attention))


@pytest.fixture
def evaluate(make_config, corpus):
    """Function: the Evaluator of the corpus on a runtime, with knob overrides."""

    def build(runtime, accum=1, **overrides):
        config = make_config(**{"TRAIN_SEQ_LEN": 16, "VAL_BATCH_SIZE": 128} | overrides)
        stream = TokenStream(config.data_path, "val", config.vocab_size)
        return Evaluator(stream, TokenBytes(config.tokenizer_path, config.vocab_size), config, runtime, accum)

    return build


def byte_count(model, tokens):
    """Bytes of tokens[1:], one at a time, by the documented rule for a model that writes spaces unchanged."""
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


def test_ranks_sum_to_the_score_of_one(evaluate, runtime, trained):
    alone = evaluate(runtime, EVAL_STRIDE=5).score(*twice(trained))
    rank_score = lambda fake: evaluate(fake, 2, EVAL_STRIDE=5).score(*twice(trained))  # noqa: E731
    parts = score_on_ranks(runtime, 3, alone.tokens, rank_score)
    nats, tokens, weight, leave = (sum(column) for column in zip(*parts, strict=True))
    assert (tokens, weight, leave) == (alone.tokens, alone.bytes, 0)
    assert nats / tokens == pytest.approx(alone.loss, rel=1e-6)
    assert min(part[1] for part in parts) > 0.8 * tokens / 3, "the work is shared evenly"


def test_a_target_that_no_rank_scored_and_a_loss_that_is_no_number_are_refused(evaluate, runtime, trained):
    for value in (math.nan, math.inf):
        with pytest.raises(UserError, match=f"validation loss is {value}"):
            evaluate(runtime).score(*twice(FromFunction(lambda x, y, v=value: torch.full(x.shape, v))))
    runtime.all_reduce = lambda values: [values[0], values[1] - 1, *values[2:]]
    with pytest.raises(UserError, match="scored .* targets"):
        evaluate(runtime).score(*twice(trained))


def test_the_label_says_partial_only_when_targets_are_left_out(evaluate, runtime, trained):
    everything = evaluate(runtime).total
    partial = f" partial:{everything - 1}/{everything}"
    for limit, label in ((0, ""), (everything - 1, partial), (everything, ""), (everything + 7, "")):
        assert evaluate(runtime, VAL_TOKENS_LIMIT=limit).score(*twice(trained)).label == label


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
    config = replace(make_config(), train_seq_len=16)
    weightless = SimpleNamespace(count=lambda tokens: 0)
    with pytest.raises(UserError, match="VAL_TOKENS_LIMIT"):
        Evaluator(counting_stream(tmp_path / "some", 20), weightless, config, runtime).score(*twice(trained))
    counting_stream(tmp_path / "none", 0)
    with pytest.raises(UserError, match="2 are needed"):
        train_gpt.open_text(make_config(DATA_PATH=tmp_path / "none"), None, train_gpt.RunFolder(runtime))


def test_a_mask_that_skips_targets_is_noticed(make_config, runtime, tmp_path):
    """Targets are counted by the mask, which decides whose losses count."""

    class Skipping(Evaluator):
        def batches(self, chunk, number):
            for inputs, targets, mask, scored in super().batches(chunk, number):
                yield inputs, targets, mask & (targets % 2 == 0), scored

    config = replace(make_config(), train_seq_len=4, eval_stride=0, val_batch_size=8, val_tokens_limit=0)
    evaluator = Skipping(counting_stream(tmp_path, 20), POSITIONS, config, runtime)
    with pytest.raises(UserError, match="scored 10 of 20 targets"):
        evaluator.score(*twice(FromFunction(lambda inputs, targets: targets.double())))


# Models that define their own distributions, and models that train on what has been scored


@pytest.mark.parametrize("tied", [1, 0])
def test_losses_are_the_distributions_at_the_targets_in_row_major_order(make_config, tied):
    """Both sides are float64, so that any difference is a bug."""
    config = make_config(TRAIN_SEQ_LEN=16, TIE_EMBEDDINGS=tied, LOGIT_SOFTCAP=4)
    model = scatter(new_model(config, kernels.blocked_attention, torch.float64).double().eval())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
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
    """Spreads half of its probability uniformly over the vocabulary."""

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
    rank_score = lambda fake: evaluate(fake, EVAL_STRIDE=stride, VAL_TOKENS_LIMIT=150).score(model, unused)  # noqa: E731
    parts = score_on_ranks(runtime, 2, 150, rank_score)
    assert sum(part[0] for part in parts) / 150 == pytest.approx(score.loss, rel=1e-6)


class Recorder(Model):
    """Records the calls that an evaluation makes; targets are positions, as in `counting_stream`."""

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


def test_each_target_is_scored_once_and_before_it_is_observed(make_config, runtime, tmp_path):
    """With various numbers of targets between two observations, some smaller than a window."""
    for number, case in enumerate(cases()):
        T, S, n = case.T, case.stride or case.T, case.scored
        chunks = sorted({1, 2, T, max(1, T - S), T + 1, 3 * T, case.targets, case.targets + 5})
        for chunk in chunks if number % 3 == 0 else [chunks[number % len(chunks)]]:
            # A target is scored in the chunk with the first target of its window, counted from 0.
            starts = [0, *range(T, n, S)]
            chunk_of = {j + 1: max(start for start in starts if start <= j) // chunk for j in range(n)}
            assert all(scored_in <= (target - 1) // chunk for target, scored_in in chunk_of.items()), "not too late"
            count = 1 + max(chunk_of.values())
            expected = [[*range(i * chunk, min((i + 1) * chunk, case.targets) + 1)] for i in range(count - 1)]
            seen = []
            for fake in ranks_of(runtime, case.ranks):
                fake.all_reduce = lambda values: [1.0, n, 1, 0]  # noqa: B023
                model, lines = Recorder(chunk), []
                evaluator = case.evaluator(make_config, fake, tmp_path)
                score = evaluator.score(*twice(model), lines.append, final=True)
                assert model.training and lines == [f"begins with {n}", f"ends with {n}"], case
                begin, *events, end = model.events
                assert begin == ("begin", n) and end == ("end", score), case
                assert [content for kind, content in events if kind != "score"] == expected, (case, chunk)
                observed = 0
                for kind, content in events:
                    observed += kind == "observe"
                    for target in content if kind == "score" else ():
                        assert chunk_of[target] == observed, (case, chunk, target)
                        seen.append(target)
            assert sorted(seen) == list(range(1, n + 1)), (case, chunk)


def test_a_validation_in_training_neither_begins_nor_observes_nor_ends(make_config, runtime, tmp_path):
    evaluator = Case(50, 4, 0, 8, 1, 1, 0).evaluator(make_config, runtime, tmp_path)
    model, lines = Recorder(8), []
    score = evaluator.score(*twice(model), lines.append)
    assert {kind for kind, _ in model.events} == {"score"} and score.tokens == 50 and not lines
    plain = Recorder(0)  # a model that never observes still begins and ends its final score
    evaluator.score(*twice(plain), lines.append, final=True)
    assert [kind for kind, _ in plain.events if kind != "score"] == ["begin", "end"]


class Counts(Model):
    """Laplace's rule on the tokens observed so far; it takes gradients in `observe`, like a model that trains there."""

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
    knobs = {"EVAL_STRIDE": stride, "VAL_TOKENS_LIMIT": limit}
    parts = score_on_ranks(runtime, 2, limit, lambda fake: evaluate(fake, **knobs).score(*twice(model), final=True))
    assert sum(part[0] for part in parts) == pytest.approx(nats, rel=1e-6) and min(part[1] for part in parts) > 100
