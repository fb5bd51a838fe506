"""Score-first test-time training: what is learned has been scored; the score is that of a slow oracle, for any number
of ranks; and nothing of it stays but the score."""

import copy
import hashlib
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
FILE = "records/models/score_first.py"


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ScoreFirstConfig, score_first = models.model_file("score_first")
FrontierConfig, _ = models.model_file("frontier")
TinyConfig, tiny_model = models.model_file("tiny")
probe = load("record_probe", ROOT / "tools" / "records" / "record_probe.py")
ScoreFirst = score_first.ScoreFirst


class BothConfig(ScoreFirstConfig, TinyConfig):
    """Knobs of both files."""

    @classmethod
    def model_class(cls):
        return Both


class Both(ScoreFirst, tiny_model.Tiny):
    """A model with dropout and an extra loss, which learns while it is scored."""


# A rate at which a tiny model learns enough to see; windows of 32, chunks of 128 targets.
LEARNS = {"TTT_CHUNK": 128, "TTT_LR": 0.05, "TTT_EPOCHS": 2, "TTT_BATCH_TOKENS": 64, "VAL_TOKENS_LIMIT": 700}


@pytest.fixture
def make(tiny, runtime):
    """Function: (config, model, evaluator, stream) of these knobs; the weights are not those of a beginning, where half
    of the gradients are zero."""

    def build(config_class=FrontierConfig, dtype=torch.float32, **knobs):
        config = config_class.load([], tiny(**LEARNS | knobs))
        model = models.new_model(config, train_gpt.grouped_attention, dtype).to(dtype)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        model.prepare(config, runtime)
        stream = train_gpt.TokenStream(config.data_path, "val", config.vocab_size)
        token_bytes = train_gpt.TokenBytes(config.tokenizer_path, config.vocab_size)
        return config, model, Evaluator(stream, token_bytes, config, runtime), stream

    return build


def score(model, evaluator, log=lambda line: None):
    return evaluator.score(model, model, log, final=True)


def mixin_of(model):
    """ScoreFirst among its bases. frontier.py imports its module under another name than this file."""
    return next(cls for cls in type(model).__mro__ if cls.__name__ == "ScoreFirst")


def plain_score(model, evaluator):
    """As a validation during training."""
    return evaluator.score(model, model)


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
    plain = plain_score(model, evaluator)
    assert (found.tokens, found.bytes, found.total) == (plain.tokens, plain.bytes, plain.total)
    learns = config.val_tokens_limit > config.ttt_chunk
    assert (found.loss != plain.loss) is learns or found.loss == pytest.approx(plain.loss, rel=1e-12)


@pytest.mark.parametrize("knobs", [{}, {"EVAL_STRIDE": 8}, {"VAL_BATCH_SIZE": 64, "EVAL_STRIDE": 0}], ids=str)
@pytest.mark.parametrize("off", [{"TTT_LR": 0}, {"TTT_CHUNK": 0}], ids=str)
def test_without_a_rate_or_a_chunk_it_is_the_plain_score_to_the_last_digit(make, knobs, off):
    """Batches of one window, or whole chunks, so that both sum the same batches."""
    _, model, evaluator, _ = make(**{"VAL_BATCH_SIZE": 32} | knobs | off)
    plain, found = plain_score(model, evaluator), score(model, evaluator)
    assert (found.loss, found.bpb, found.tokens, found.bytes) == (plain.loss, plain.bpb, plain.tokens, plain.bytes)


def test_it_learns(make):
    _, model, evaluator, _ = make(VAL_TOKENS_LIMIT=0)
    plain, found = plain_score(model, evaluator), score(model, evaluator)
    assert found.bpb < plain.bpb - 0.05 and found.tokens == plain.tokens == evaluator.total


# The rules


@pytest.mark.parametrize("knobs", [{}, {"EVAL_STRIDE": 8}, {"EVAL_STRIDE": 20}, {"VAL_TOKENS_LIMIT": 0}], ids=str)
def test_each_target_is_scored_once_and_before_it_is_learned(make, monkeypatch, knobs):
    config, model, evaluator, stream = make(**knobs)
    script = models.probe_script(probe, config, model, evaluator.runtime)
    recorder = probe.Recorder(script, model, evaluator, stream, keep=True)
    trainer_class, learned = sys.modules[mixin_of(model).__module__].TestTimeTrainer, []
    train = trainer_class.train

    def watched(self, tokens):
        begin = len(learned) * config.ttt_chunk
        assert (stream.read(begin, len(tokens)) == tokens).all() and len(tokens) == config.ttt_chunk + 1
        assert recorder.counts[: begin + config.ttt_chunk].all(), "token j + 1 is target j"
        learned.append(begin)
        train(self, tokens)

    monkeypatch.setattr(trainer_class, "train", watched)
    found = script.score(evaluator, recorder)
    assert (recorder.counts == 1).all() and recorder.wrong == 0 and recorder.learned
    assert recorder.nats / found.tokens == pytest.approx(found.loss, rel=1e-6)
    assert len(learned) == (evaluator.targets - 1) // config.ttt_chunk, "all chunks but the last"


@pytest.mark.parametrize(
    "config_class, knobs",
    [
        (ScoreFirstConfig, {}),
        (FrontierConfig, {"EVAL_STRIDE": 8, "CANONICAL": 1}),
        (BothConfig, {"EVAL_STRIDE": 16}),
    ],
    ids=["plain", "stride and mask", "another model"],
)
@pytest.mark.parametrize("honest", [True, False], ids=["honest", "peeking"])
def test_no_score_knows_tokens_to_come_unless_it_peeks(make, monkeypatch, config_class, knobs, honest):
    """The flip test of `record.py rescore`, through the whole evaluation."""
    config, model, evaluator, stream = make(config_class, **knobs)
    script = models.probe_script(probe, config, model, evaluator.runtime)
    begin, texts = mixin_of(model).begin, []
    script.evaluator = lambda text, *args, **changes: (
        texts.append(text) or probe.Script.evaluator(script, text, *args, **changes)
    )

    def peeking(self, targets, forward):
        """A saboteur trains on the text before it is scored."""
        line = begin(self, targets, forward)
        for start in range(0, targets, config.ttt_chunk):
            self.trainer.trained = 0
            self.trainer.train(texts[-1].read(start, config.ttt_chunk + 1))
        self.trainer.trained = 0
        return line

    if not honest:
        monkeypatch.setattr(mixin_of(model), "begin", peeking)
    moved = probe.flips_in_evaluation(
        script, stream, evaluator.token_bytes, places=4, rng=np.random.default_rng(0), learns=True
    )
    assert len(moved) == 4 and (max(moved) == 0.0 if honest else max(moved) > 1e-3)


# What stays


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
    if hasattr(model, "trainer"):  # unless the script has called it
        assert model.end(None) is None
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
        assert (
            re.fullmatch(
                rf"eval_clock_verdict:\d+\.\d\d\ds OVER EVAL_WALLCLOCK_SECONDS={seconds}, NOT A VALID "
                "SUBMISSION",
                lines[-1],
            )
            is not None
        ) is over and len(lines) == 1 + over


# Runs


def run(environ, cwd, ranks=1) -> str:
    done = models.process(environ, cwd, ranks=ranks, TMPDIR=str(cwd))
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    return done.stdout.decode()


RUN = LEARNS | {"MODEL_FILE": FILE, "VAL_TOKENS_LIMIT": 0, "EVAL_STRIDE": 16, "ITERATIONS": 12}


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """(folder of a run that ends with it, its output)."""
    cwd = tmp_path_factory.mktemp("whole")
    return cwd / "logs" / "run", run(models.tiny_settings(corpus, **RUN, EVAL_WALLCLOCK_SECONDS=1e-9), cwd)


def digits(text: str) -> tuple[float, float]:
    return tuple(map(float, re.search(r"val_loss:(\S+) val_bpb:(\S+)", models.exact_line(text)).groups()))


def test_an_artifact_tells_its_knobs_and_is_scored_to_the_same_digits_elsewhere(whole, corpus, tmp_path):
    path, text = whole
    assert "NOT A VALID SUBMISSION" in text and re.search(r"^score_first: chunks:\d+ steps:\d+ ", text, re.MULTILINE)
    told = models.open_artifact(path / "final_model.int8.ptz")
    source = (ROOT / FILE).read_bytes()
    assert told["source"] == {"file": "score_first.py", "sha256": hashlib.sha256(source).hexdigest()}
    assert {name: told["config"][name.lower()] for name in LEARNS if name.startswith("TTT")} == {
        name: value for name, value in LEARNS.items() if name.startswith("TTT")
    }
    assert (path / "score_first.py").read_bytes() == source
    environ = models.machine_settings(corpus, MODE="eval", ARTIFACT=path / "final_model.int8.ptz")
    for file in ({}, {"MODEL_FILE": FILE}):
        again = run(environ | file, tmp_path)
        assert models.exact_line(again) == models.exact_line(text) and "assumed" not in again
    plain = run(environ | {"TTT_CHUNK": "0"}, tmp_path)
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
    text = run(models.tiny_settings(corpus, **RUN), tmp_path, ranks=2)
    assert digits(text) == pytest.approx(digits(whole[1]), abs=1e-4)
    assert "NOT A VALID SUBMISSION" not in text
