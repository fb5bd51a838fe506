"""Score-first test-time training: what is learned has been scored; the score is that of a slow oracle, for any number
of ranks; and nothing of it stays but the score."""

import copy
import dataclasses
import importlib.util
import math
import re
import sys
from pathlib import Path

import models
import numpy as np
import pytest
import torch

import train_gpt
from train_gpt import Evaluator, UserError

ROOT = Path(train_gpt.__file__).resolve().parent
SCRIPT = ROOT / "records" / "models" / "score_first.py"


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


score_first = load("score_first", SCRIPT)
tiny_model = load("tiny_model", ROOT / "tests" / "alternative" / "tiny_model.py")
probe = load("record_probe", ROOT / "tools" / "record_probe.py")
ScoreFirst, ScoreFirstConfig = score_first.ScoreFirst, score_first.ScoreFirstConfig


@dataclasses.dataclass(frozen=True)
class BothConfig(ScoreFirstConfig, tiny_model.TinyConfig):
    """Knobs of both files."""

    @classmethod
    def model_class(cls):
        return Both


class Both(ScoreFirst, tiny_model.Tiny):
    """A model with dropout and an auxiliary loss, which learns while it is scored."""


class Peeking(score_first.Walk):
    """A saboteur: learns from a chunk before it is scored."""

    def __iter__(self):
        optimizer = self.model.test_time_optimizer()
        for chunk in range(self.chunks):
            self.evaluator.windows = range(self.first_window(chunk), self.first_window(chunk + 1))
            tokens = self.evaluator.stream.read(chunk * self.config.ttt_chunk, self.config.ttt_chunk + 1)
            self.learn(optimizer, tokens)
            yield from self.evaluator.windows[:: self.evaluator.batch]


# A rate at which a tiny model learns enough to see; windows of 32, chunks of 128 targets.
LEARNS = {"TTT_CHUNK": 128, "TTT_LR": 0.05, "TTT_EPOCHS": 2, "TTT_BATCH_TOKENS": 64, "VAL_TOKENS_LIMIT": 700}


@pytest.fixture
def make(tiny, runtime):
    """Function: (config, model, evaluator, stream) of these knobs; the weights are not those of a beginning, where half
    of the gradients are zero."""

    def build(config_class=ScoreFirstConfig, dtype=torch.float32, **knobs):
        config = config_class.load([], tiny(**LEARNS | knobs))
        model = config.model_class()(config, dtype=dtype).to(dtype)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        if config.canonical:
            model.mask = train_gpt.tool("canonical").Mask(model, config, runtime)
        stream = train_gpt.TokenStream(config.data_path, "val", config.vocab_size)
        token_bytes = train_gpt.TokenBytes(config.tokenizer_path, config.vocab_size)
        return config, model, Evaluator(stream, token_bytes, config, runtime), stream

    return build


def score(model, evaluator, log=lambda line: None):
    return model.final_score(evaluator, model, log)


# What it computes


def oracle(config, model, tokens: np.ndarray) -> float:
    """Nats, by one window and one sequence at a time, with SGD written out."""
    T, C = config.train_seq_len, config.ttt_chunk
    S, targets = config.eval_stride or T, min(config.val_tokens_limit, len(tokens) - 1)
    tokens, params = torch.from_numpy(tokens.astype(np.int64)), [*model.parameters()]
    momenta, nats = [torch.zeros_like(p) for p in params], 0.0
    first = [0]  # targets that windows score from on
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
        {},
        {"EVAL_STRIDE": 8},
        {"EVAL_STRIDE": 20, "VAL_BATCH_SIZE": 96, "TTT_BATCH_TOKENS": 96},
        {"TTT_BATCH_TOKENS": 32_768, "TTT_CLIP": 0, "TTT_MOMENTUM": 0, "TTT_EPOCHS": 1},
        {"VAL_TOKENS_LIMIT": 128},
        {"VAL_TOKENS_LIMIT": 20},
        {"VAL_TOKENS_LIMIT": 130, "EVAL_STRIDE": 20, "TTT_CHUNK": 64},
        {"TTT_CHUNK": 32, "EVAL_STRIDE": 32},
        {"MICRO_BATCH_TOKENS": 64, "TTT_BATCH_TOKENS": 128, "CANONICAL": 1},
        {"LOOP_LAYERS": "0-1", "SMEAR_GATE": 1, "TTT_CHUNK": 96},
    ],
    ids=str,
)
def test_the_score_is_that_of_an_oracle_in_float64(make, knobs):
    config, model, evaluator, stream = make(dtype=torch.float64, **knobs)
    expected = oracle(config, copy.deepcopy(model), stream.read(0, len(stream)))
    found = score(model, evaluator)
    assert found.loss == pytest.approx(expected / found.tokens, rel=1e-12)
    plain = evaluator.score(model)
    assert (found.tokens, found.bytes, found.of) == (plain.tokens, plain.bytes, plain.of)
    learns = config.val_tokens_limit > config.ttt_chunk
    assert (found.loss != plain.loss) is learns or found.loss == pytest.approx(plain.loss, rel=1e-12)


@pytest.mark.parametrize("knobs", [{}, {"EVAL_STRIDE": 8}, {"VAL_BATCH_SIZE": 64, "EVAL_STRIDE": 0}], ids=str)
@pytest.mark.parametrize("off", [{"TTT_LR": 0}, {"TTT_CHUNK": 0}], ids=str)
def test_without_a_rate_or_a_chunk_it_is_the_plain_score_to_the_last_digit(make, knobs, off):
    """Batches of one window, or whole chunks, so that both sum the same batches."""
    _, model, evaluator, _ = make(**{"VAL_BATCH_SIZE": 32} | knobs | off)
    plain, found = evaluator.score(model), score(model, evaluator)
    assert (found.loss, found.bpb, found.tokens, found.bytes) == (plain.loss, plain.bpb, plain.tokens, plain.bytes)


def test_it_learns(make):
    _, model, evaluator, _ = make(VAL_TOKENS_LIMIT=0)
    plain, found = evaluator.score(model), score(model, evaluator)
    assert found.bpb < plain.bpb - 0.05 and found.tokens == plain.tokens == evaluator.of


# The rules


@pytest.mark.parametrize("knobs", [{}, {"EVAL_STRIDE": 8}, {"EVAL_STRIDE": 20}, {"VAL_TOKENS_LIMIT": 0}], ids=str)
def test_each_target_is_scored_once_and_before_it_is_learned(make, knobs):
    _, model, evaluator, stream = make(**knobs)
    recorder = probe.Recorder(model, evaluator, stream, keep=True)
    found = model.final_score(evaluator, recorder, print)
    assert (recorder.counts == 1).all() and recorder.wrong == 0 and recorder.learned
    assert recorder.nats / found.tokens == pytest.approx(found.loss, rel=1e-6)

    targets, learn = [], score_first.Walk.learn
    evaluator.batch_at = lambda index, batch_at=evaluator.batch_at: targets.append(batch_at(index)) or targets[-1]

    def watched(self, optimizer, tokens):
        seen = max(scored.stop for *_, scored in targets)
        begin = next(i for i in range(0, evaluator.targets, 128) if (stream.read(i, len(tokens)) == tokens).all())
        assert begin + len(tokens) - 1 <= seen, "token j + 1 is target j"
        learn(self, optimizer, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_first.Walk, "learn", watched)
        score(model, evaluator)


@pytest.mark.parametrize(
    "config_class, knobs",
    [
        (ScoreFirstConfig, {}),
        (ScoreFirstConfig, {"EVAL_STRIDE": 8, "CANONICAL": 1}),
        (BothConfig, {"EVAL_STRIDE": 16}),
    ],
    ids=["plain", "stride and mask", "another model"],
)
@pytest.mark.parametrize("walk, honest", [(score_first.Walk, True), (Peeking, False)], ids=["honest", "peeking"])
def test_no_score_knows_tokens_to_come_unless_it_peeks(make, monkeypatch, config_class, knobs, walk, honest):
    """The flip test of `record.py rescore`, through the whole evaluation."""
    config, model, evaluator, stream = make(config_class, **knobs)
    monkeypatch.setattr(score_first, "Walk", walk)
    moved = probe.flips_in_evaluation(
        train_gpt,
        config,
        model,
        stream,
        evaluator.token_bytes,
        evaluator.runtime,
        places=4,
        rng=np.random.default_rng(0),
        learns=True,
    )
    assert len(moved) == 4 and (max(moved) == 0.0 if honest else max(moved) > 1e-3)


# What stays


@pytest.mark.parametrize("config_class", [ScoreFirstConfig, BothConfig])
def test_nothing_stays_but_the_score(make, config_class):
    _, model, evaluator, _ = make(config_class)
    before, windows, batch = copy.deepcopy(model.state_dict()), evaluator.windows, evaluator.batch
    first, plain = score(model, evaluator), evaluator.score(model)
    assert first.loss != plain.loss and (evaluator.windows, evaluator.batch) == (windows, batch)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert score(model, evaluator).loss == first.loss


def test_weights_come_back_from_a_score_that_fails(make):
    _, model, evaluator, _ = make(TTT_LR=1e30, TTT_CLIP=0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="the run diverged"):
        score(model, evaluator)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_no_random_number_is_drawn(make):
    """Of the generators that a run shares: neither by dropout nor by the warm-up."""
    _, model, evaluator, _ = make(BothConfig)
    before = torch.random.get_rng_state()
    assert score(model, evaluator).loss < 10 and torch.random.get_rng_state().equal(before)


# Knobs, clock and log


@pytest.mark.parametrize(
    "knobs, said",
    [
        ({"TTT_CHUNK": 100}, "TTT_CHUNK=100 is not whole TRAIN_SEQ_LEN=32: use 128"),
        ({"TTT_CHUNK": 16, "EVAL_STRIDE": 20}, "TTT_CHUNK=16 is not whole TRAIN_SEQ_LEN=32: use 32"),
        ({"TTT_BATCH_TOKENS": 33}, "TTT_BATCH_TOKENS=33 is not whole TRAIN_SEQ_LEN=32: use 64"),
        ({"TTT_CHUNK": -1}, "TTT_CHUNK=-1 is too small"),
        ({"TTT_EPOCHS": 0}, "TTT_EPOCHS=0 is too small"),
        ({"TTT_MOMENTUM": 1}, "TTT_MOMENTUM=1.0 is too large"),
        ({"TTT_LR": -0.1}, "TTT_LR=-0.1 is too small"),
        ({"TTT_LR": "fast"}, "TTT_LR='fast' is not a finite number"),
    ],
    ids=str,
)
def test_knobs_that_cannot_be_are_refused(tiny, knobs, said):
    with pytest.raises(UserError, match=re.escape(said)):
        ScoreFirstConfig.load([], tiny(**LEARNS | knobs))


def test_a_batch_is_at_most_a_chunk_and_nothing_is_asked_of_knobs_that_do_nothing(tiny):
    for knobs in ({"TTT_BATCH_TOKENS": 32_768}, {"TTT_CHUNK": 0, "TTT_BATCH_TOKENS": 33}):
        ScoreFirstConfig.load([], tiny(**LEARNS | knobs))


def test_in_an_evaluation_the_artifact_tells_first_how_long_a_sequence_is(make, trained, bare, capfd):
    artifact = {"MODE": "eval", "ARTIFACT": str(trained / "final_model.int8.ptz")}
    for chunk, code in ((96, 0), (100, 2)):
        with models.environment(bare(**artifact, TTT_CHUNK=chunk)):
            assert train_gpt.main([], ScoreFirstConfig) == code
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
        assert (
            re.fullmatch(
                rf"eval_clock_verdict:\d+\.\d\d\ds OVER EVAL_WALLCLOCK_SECONDS={seconds}, NOT A VALID "
                "SUBMISSION",
                lines[-1],
            )
            is not None
        ) is over and len(lines) == 1 + over


# Runs


def run(environ, cwd, ranks=1, script=SCRIPT) -> str:
    done = models.process(environ, cwd, ranks=ranks, script=script, TMPDIR=str(cwd))
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    return done.stdout.decode()


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """(folder of a run that ends with it, its output)."""
    cwd = tmp_path_factory.mktemp("whole")
    knobs = LEARNS | {"VAL_TOKENS_LIMIT": 0, "EVAL_STRIDE": 16, "EVAL_WALLCLOCK_SECONDS": 1e-9, "ITERATIONS": 12}
    return cwd / "logs" / "run", run(models.tiny_settings(corpus, **knobs), cwd)


def digits(text: str) -> tuple[float, float]:
    return tuple(map(float, re.search(r"val_loss:(\S+) val_bpb:(\S+)", models.exact_line(text)).groups()))


def test_an_artifact_tells_its_knobs_and_is_scored_to_the_same_digits_elsewhere(whole, corpus, tmp_path):
    path, text = whole
    assert "NOT A VALID SUBMISSION" in text and re.search(r"^score_first: chunks:\d+ steps:\d+ ", text, re.MULTILINE)
    told = models.open_artifact(path / "final_model.int8.ptz")
    assert told["source"] == {"file": "records/models/score_first.py", "config_class": "ScoreFirstConfig"}
    assert {name: told["config"][name.lower()] for name in LEARNS if name.startswith("TTT")} == {
        name: value for name, value in LEARNS.items() if name.startswith("TTT")
    }
    assert (path / "score_first.py").read_bytes() == SCRIPT.read_bytes()
    environ = models.machine_settings(corpus, MODE="eval", ARTIFACT=path / "final_model.int8.ptz")
    found = {script: run(environ, tmp_path, script=script) for script in (SCRIPT, models.SCRIPT)}
    for again in found.values():
        assert models.exact_line(again) == models.exact_line(text) and "assumed" not in again
    plain = run(environ | {"TTT_CHUNK": "0"}, tmp_path, script=models.SCRIPT)
    assert digits(plain)[1] > digits(text)[1] and "score_first" not in plain.replace("score_first.py", "")


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_score_as_one_process(whole, corpus, tmp_path, ranks):
    """Chunks of four or five sequences, twice as many windows, steps of two: three ranks share none of them evenly."""
    path, text = whole
    knobs = {"TRAIN_SEQ_LEN": 32, "TRAIN_BATCH_TOKENS": 32 * 6, "TTT_CHUNK": 160} if ranks == 3 else {}
    environ = models.machine_settings(corpus, MODE="eval", ARTIFACT=path / "final_model.int8.ptz", **knobs)
    one = digits(run(environ, tmp_path)) if knobs else digits(text)
    assert digits(run(environ, tmp_path, ranks=ranks)) == pytest.approx(one, abs=2e-6)


def test_a_run_on_two_ranks_ends_as_one_does(whole, corpus, tmp_path):
    """After training under DDP, whose hooks are still on the weights."""
    knobs = LEARNS | {"VAL_TOKENS_LIMIT": 0, "EVAL_STRIDE": 16, "ITERATIONS": 12}
    text = run(models.tiny_settings(corpus, **knobs), tmp_path, ranks=2)
    assert digits(text) == pytest.approx(digits(whole[1]), abs=1e-4)
    assert "NOT A VALID SUBMISSION" not in text
