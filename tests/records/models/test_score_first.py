"""Score-first test-time training: tokens are scored before they are trained on; the score equals that of a slow oracle
for any number of ranks; and only the score remains afterwards."""

import copy
import math
import re
import sys

import models
import numpy as np
import oracle
import pytest
import torch

import train_gpt
from train_gpt import Evaluator, UserError

FILE = "records/models/score_first.py"
ScoreFirstConfig, score_first = models.model_file("score_first")
FrontierConfig, _ = models.model_file("frontier")
TinyConfig, tiny_model = models.model_file("tiny")
ScoreFirst = score_first.ScoreFirst


class BothConfig(ScoreFirstConfig, TinyConfig):
    """Knobs of both files."""

    @classmethod
    def model_class(cls):
        return Both


class Both(ScoreFirst, tiny_model.Tiny):
    """A model with dropout and an extra loss that is trained while it is scored."""


# A learning rate at which a tiny model improves visibly; windows of 32, chunks of 128 targets.
LEARNS = {"TTT_CHUNK": 128, "TTT_LR": 0.05, "TTT_EPOCHS": 2, "TTT_BATCH_TOKENS": 64, "VAL_TOKENS_LIMIT": 700}


@pytest.fixture
def make(tiny, runtime):
    """Function: (config, model, evaluator, stream) for these knobs. The weights are randomized: at initialization half
    of the gradients are zero."""

    def build(config_class=FrontierConfig, dtype=torch.float32, **knobs):
        config = config_class.load([], tiny(**LEARNS | knobs))
        model = oracle.scatter(models.new_model(config, train_gpt.grouped_attention, dtype).to(dtype))
        model.prepare(config, runtime)
        stream = train_gpt.TokenStream(config.data_path, "val", config.vocab_size)
        token_bytes = train_gpt.TokenBytes(config.tokenizer_path, config.vocab_size)
        return config, model, Evaluator(stream, token_bytes, config, runtime), stream

    return build


def score(model, evaluator, log=lambda line: None):
    return evaluator.score(model, model, log, final=True)


def mixin_of(model):
    """ScoreFirst among its bases. frontier.py imports its module under a different name than this file."""
    return next(cls for cls in type(model).__mro__ if cls.__name__ == "ScoreFirst")


def plain_score(model, evaluator):
    """The score as in a validation during training."""
    return evaluator.score(model, model)


# The score


def slow_score(config, model, tokens: np.ndarray) -> float:
    """The score in nats, one window and one sequence at a time, with SGD written out."""
    T, C = config.train_seq_len, config.ttt_chunk
    S, targets = config.eval_stride or T, min(config.val_tokens_limit, len(tokens) - 1)
    tokens, params = torch.from_numpy(tokens.astype(np.int64)), [*model.parameters()]
    momenta, nats = [torch.zeros_like(p) for p in params], 0.0
    first = [0]  # first target that each window scores
    while first[-1] + (S if len(first) > 1 else T) < targets:
        first.append(first[-1] + (S if len(first) > 1 else T))
    chunks = 1 + first[-1] // C
    for chunk in range(chunks):
        model.eval()
        for index, begin in enumerate(first):
            if begin // C == chunk:
                start, stop = index * S, min(begin + (S if index else T), targets)
                window = torch.zeros(T + 1, dtype=torch.int64)
                window[: stop + 1 - start] = tokens[start : stop + 1]
                with torch.no_grad():
                    losses = model(window[None, :-1], window[None, 1:])[0]
                nats += float(losses[begin - start : stop - start].sum())
        if chunk == chunks - 1:
            return nats
        lr = config.ttt_lr * (1 + math.cos(math.pi * chunk / (chunks - 1))) / 2
        for _ in range(config.ttt_epochs):
            starts = [*range(chunk * C, (chunk + 1) * C, T)]
            while starts:
                now, starts = starts[: config.ttt_batch_tokens // T], starts[config.ttt_batch_tokens // T :]
                model.zero_grad()
                for start in now:
                    rows = tokens[start : start + T + 1]
                    (model(rows[None, :-1], rows[None, 1:]).mean() / len(now)).backward()
                norm = math.sqrt(sum(float((p.grad**2).sum()) for p in params))
                scale = min(1.0, config.ttt_clip / (norm + 1e-6)) if config.ttt_clip else 1.0
                with torch.no_grad():
                    for p, momentum in zip(params, momenta, strict=True):
                        momentum.mul_(config.ttt_momentum).add_(p.grad * scale)
                        p.sub_(lr * momentum)


@pytest.mark.parametrize(
    "knobs",
    [
        {"EVAL_STRIDE": 20, "VAL_BATCH_SIZE": 96, "TTT_BATCH_TOKENS": 96},
        {"TTT_BATCH_TOKENS": 32_768, "TTT_CLIP": 0, "TTT_MOMENTUM": 0, "TTT_EPOCHS": 1},
        {"VAL_TOKENS_LIMIT": 128},
        {"VAL_TOKENS_LIMIT": 130, "EVAL_STRIDE": 20, "TTT_CHUNK": 64},
        {"MICRO_BATCH_TOKENS": 64, "TTT_BATCH_TOKENS": 128, "CANONICAL": 1},
        {"LOOP_LAYERS": "0-1", "SMEAR_GATE": 1, "TTT_CHUNK": 96},
    ],
    ids=str,
)
def test_the_score_is_that_of_an_oracle_in_float64(make, knobs):
    config, model, evaluator, stream = make(dtype=torch.float64, **knobs)
    expected = slow_score(config, copy.deepcopy(model), stream.read(0, len(stream)))
    found = score(model, evaluator)
    assert found.loss == pytest.approx(expected / found.tokens, rel=1e-12)
    plain = plain_score(model, evaluator)
    assert (found.tokens, found.bytes, found.total) == (plain.tokens, plain.bytes, plain.total)
    learns = config.val_tokens_limit > config.ttt_chunk
    assert (found.loss != plain.loss) is learns or found.loss == pytest.approx(plain.loss, rel=1e-12)


@pytest.mark.parametrize("knobs", [{}, {"EVAL_STRIDE": 8}], ids=str)
@pytest.mark.parametrize("off", [{"TTT_LR": 0}, {"TTT_CHUNK": 0}], ids=str)
def test_without_a_rate_or_a_chunk_it_is_the_plain_score_to_the_last_digit(make, knobs, off):
    """Batches of one window, or complete chunks, so that both sum over the same batches."""
    _, model, evaluator, _ = make(**{"VAL_BATCH_SIZE": 32} | knobs | off)
    plain, found = plain_score(model, evaluator), score(model, evaluator)
    assert (found.loss, found.bpb, found.tokens, found.bytes) == (plain.loss, plain.bpb, plain.tokens, plain.bytes)


def test_it_learns(make):
    _, model, evaluator, _ = make(VAL_TOKENS_LIMIT=0)
    plain, found = plain_score(model, evaluator), score(model, evaluator)
    assert found.bpb < plain.bpb - 0.05 and found.tokens == plain.tokens == evaluator.total


# The rules


@pytest.mark.parametrize("knobs", [{}, {"EVAL_STRIDE": 20}], ids=str)
def test_each_target_is_scored_once_and_before_it_is_learned(make, monkeypatch, knobs):
    config, model, evaluator, stream = make(**knobs)
    scored, batches = [0], Evaluator.batches

    def watched_batches(*args):
        for batch in batches(evaluator, *args):
            assert batch[3].start == scored[-1], "each target once, in order"
            scored.append(batch[3].stop)
            yield batch

    evaluator.batches = watched_batches
    trainer_class, learned = sys.modules[mixin_of(model).__module__].TestTimeTrainer, []
    train = trainer_class.train

    def watched(self, tokens):
        begin = len(learned) * config.ttt_chunk
        assert (stream.read(begin, len(tokens)) == tokens).all() and len(tokens) == config.ttt_chunk + 1
        assert begin + config.ttt_chunk <= scored[-1], "token j + 1 is target j"
        learned.append(begin)
        train(self, tokens)

    monkeypatch.setattr(trainer_class, "train", watched)
    score(model, evaluator)
    assert scored[-1] == evaluator.targets
    assert len(learned) == (evaluator.targets - 1) // config.ttt_chunk, "all chunks but the last"


KINDS = {"stride and mask": (FrontierConfig, {"EVAL_STRIDE": 8, "CANONICAL": 1})}
KINDS["another model"] = (BothConfig, {"EVAL_STRIDE": 16})


@pytest.mark.parametrize("config_class, knobs", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("honest", [True, False], ids=["honest", "peeking"])
def test_no_score_knows_tokens_to_come_unless_it_peeks(make, monkeypatch, config_class, knobs, honest):
    _, model, evaluator, _ = make(config_class, **knobs)
    begin, chunk = mixin_of(model).begin, model.config.ttt_chunk

    def peeking(self, targets, forward):
        """A saboteur that trains on the text before it is scored."""
        line = begin(self, targets, forward)
        for start in range(0, targets, chunk):
            self.trainer.trained = 0
            self.trainer.train(evaluator.stream.read(start, chunk + 1))
        self.trainer.trained = 0
        return line

    if not honest:
        monkeypatch.setattr(mixin_of(model), "begin", peeking)
    moved = oracle.moved_before_a_changed_token(model, evaluator, (200, 400, 650))
    assert max(moved) == 0.0 if honest else max(moved) > 1e-3


# What remains afterwards


@pytest.mark.parametrize("config_class", [ScoreFirstConfig, BothConfig])
def test_nothing_stays_but_the_score(make, config_class):
    _, model, evaluator, _ = make(config_class)
    before, windows, batch = copy.deepcopy(model.state_dict()), evaluator.windows, evaluator.batch
    first, plain = score(model, evaluator), plain_score(model, evaluator)
    assert first.loss != plain.loss and (evaluator.windows, evaluator.batch) == (windows, batch)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert score(model, evaluator).loss == first.loss


def test_the_end_of_a_score_that_fails_restores_the_weights(make):
    _, model, evaluator, _ = make(TTT_LR=1e30, TTT_CLIP=0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="the run diverged"):
        score(model, evaluator)
    if hasattr(model, "trainer"):  # unless the script has already called it
        assert model.end(None) is None
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_no_random_number_is_drawn(make):
    """Neither dropout nor the warm-up draws from the generators that the run shares."""
    _, model, evaluator, _ = make(BothConfig)
    before = torch.random.get_rng_state()
    assert score(model, evaluator).loss < 10 and torch.random.get_rng_state().equal(before)


# Knobs, clock and log


REFUSED = [
    ({"TTT_CHUNK": 100}, "TTT_CHUNK=100 is not whole TRAIN_SEQ_LEN=32: use 128"),
    ({"TTT_CHUNK": 16, "EVAL_STRIDE": 20}, "TTT_CHUNK=16 is not whole TRAIN_SEQ_LEN=32: use 32"),
    ({"TTT_BATCH_TOKENS": 33}, "TTT_BATCH_TOKENS=33 is not whole TRAIN_SEQ_LEN=32: use 64"),
    ({"TTT_MOMENTUM": 1}, "TTT_MOMENTUM=1.0 is too large"),
]


@pytest.mark.parametrize("knobs, said", REFUSED, ids=str)
def test_knobs_that_cannot_be_are_refused(tiny, knobs, said):
    with pytest.raises(UserError, match=re.escape(said)):
        ScoreFirstConfig.load([], tiny(**LEARNS | knobs))


def test_a_batch_is_at_most_a_chunk_and_nothing_is_asked_of_knobs_that_do_nothing(tiny):
    for knobs in ({"TTT_BATCH_TOKENS": 32_768}, {"TTT_CHUNK": 0, "TTT_BATCH_TOKENS": 33}):
        ScoreFirstConfig.load([], tiny(**LEARNS | knobs))


def test_in_an_evaluation_the_artifact_tells_first_how_long_a_sequence_is(make, trained, bare, capfd):
    artifact = {"MODE": "eval", "ARTIFACT": trained / "final_model.int8.ptz", "MODEL_FILE": FILE}
    for chunk, code in ((96, 0), (100, 2)):
        assert models.call_main(bare(**artifact, TTT_CHUNK=chunk)) == code
        out, err = capfd.readouterr()
        assert ("score_first: chunks:" in out) is (code == 0)
    assert err == "error: TTT_CHUNK=100 is not whole TRAIN_SEQ_LEN=32: use 128\n"


def test_its_clock_is_that_of_the_evaluation(make):
    lines = []
    for seconds, over in ((1e-9, True), (0, False), (600, False)):
        _, model, evaluator, _ = make(EVAL_WALLCLOCK_SECONDS=seconds)
        lines.clear()
        score(model, evaluator, lines.append)
        assert lines[0] == "score_first: chunks:6 steps:20 cost:6.45 of a plain evaluation"
        verdict = rf"eval_clock_verdict:\d+\.\d\d\ds OVER EVAL_WALLCLOCK_SECONDS={seconds}, NOT A VALID SUBMISSION"
        assert bool(re.fullmatch(verdict, lines[-1])) is over and len(lines) == 1 + over


# Ranks


def run(environ, cwd, ranks=1) -> str:
    done = models.process(environ, cwd, ranks=ranks, TMPDIR=str(cwd))
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    return done.stdout.decode()


def digits(text: str) -> tuple[float, float]:
    return tuple(map(float, re.search(r"val_loss:(\S+) val_bpb:(\S+)", models.exact_line(text)).groups()))


def test_ranks_train_and_score_as_one_process(corpus, tmp_path, capsys):
    """Two ranks train, and DDP's hooks are still on the weights when scoring starts; three ranks score, and neither the
    windows of a chunk nor the sequences of a step divide evenly among them."""
    knobs = LEARNS | {"MODEL_FILE": FILE, "EVAL_STRIDE": 16, "ITERATIONS": 12}
    values = models.tiny_settings(corpus, LOG_DIR=tmp_path, **knobs)
    assert models.call_main(values | {"RUN_ID": "one"}) == 0
    one = digits(capsys.readouterr().out)
    assert digits(run(values | {"RUN_ID": "two"}, tmp_path, ranks=2)) == pytest.approx(one, abs=1e-4)
    artifact = tmp_path / "one" / "final_model.int8.ptz"
    more = {"TRAIN_SEQ_LEN": 32, "TRAIN_BATCH_TOKENS": 32 * 6, "TTT_CHUNK": 160, "VAL_TOKENS_LIMIT": 700}
    values = models.machine_settings(corpus, MODE="eval", ARTIFACT=artifact, **more)
    assert models.call_main(values) == 0
    alone = digits(capsys.readouterr().out)
    assert digits(run(values, tmp_path, ranks=3)) == pytest.approx(alone, abs=2e-6)
    assert models.call_main(values | {"TTT_CHUNK": "0"}) == 0
    assert digits(capsys.readouterr().out)[1] > alone[1]
