"""Fixtures shared by all tests: a small generated corpus and a configuration that trains in seconds on a CPU."""

import os
import random
import signal
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads would only wait for each other
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # runs would inherit SIG_IGN from nohup
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), *(str(ROOT / "tools" / room) for room in ("records", "experiments"))]

pytest.register_assert_rewrite("contract", "models", "oracle", "runs")  # so that their asserts show the compared values
import models  # noqa: E402

import train_gpt  # noqa: E402

# Property tests use the same examples on every machine, above all in CI, so that a new failure is due to a change.
# To search for bugs, `python -m pytest --hypothesis-profile=random` draws new examples and prints the seed at the end;
# adding `--hypothesis-seed=N` repeats those of seed N.
hypothesis.settings.register_profile("fixed", database=None, deadline=None, derandomize=True)
hypothesis.settings.register_profile("random", database=None, deadline=None, derandomize=False, print_blob=True)
hypothesis.settings.load_profile("fixed")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if config.getoption("hypothesis_profile") == "random" and config.getoption("hypothesis_seed") is None:
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(10**6))


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("hypothesis_profile") == "random":
        seed = config.getoption("hypothesis_seed")
        terminalreporter.write_line(f"examples by --hypothesis-profile=random --hypothesis-seed={seed}")


@pytest.fixture(autouse=True)
def no_source_of_another_run():
    """Clear the loaded tools: a run counts them as its sources, and several tests' runs share this process."""
    for name in train_gpt.SUBMISSION_TOOLS:
        sys.modules.pop(f"train_gpt.tools.{name}", None)


@pytest.fixture(autouse=True)
def all_attention_kernels():
    """Enable all attention kernels again: a run pins torch's global switches."""
    yield
    for switch in ("flash", "cudnn", "mem_efficient", "math"):
        getattr(train_gpt.torch.backends.cuda, f"enable_{switch}_sdp")(True)


WORDS = "the king of sea and na\u00efve caf\u00e9 night \u6d77 love sleeps".split() + ["  indented", "\n"]


def shard_bytes(tokens, magic=20240520, version=1, count=None) -> bytes:
    """A shard written independently of the code under test; `count` is the token count stated in the header."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes()


def write_shard(path, tokens):
    path.write_bytes(shard_bytes(tokens))


def make_documents(count, seed, words=60):
    """Documents of pseudo-text with accents, a second script, runs of spaces, newlines and an unknown emoji."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words)).strip() + rng.choice(["", " \U0001f600", "\n"]) for _ in range(count)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Folder with data/ (two training shards, one validation shard) and tok.model, a small BPE with byte fallback."""
    import sentencepiece as spm

    folder = tmp_path_factory.mktemp("corpus")
    train, val = make_documents(400, seed=1), make_documents(30, seed=2)
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(train),
        model_prefix=str(folder / "tok"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    model = spm.SentencePieceProcessor(model_file=str(folder / "tok.model"))
    tokens = [[model.bos_id(), *ids] for ids in model.encode(train)]
    flat = [token for ids in tokens for token in ids]
    (folder / "data").mkdir()
    write_shard(folder / "data" / "fineweb_train_000000.bin", flat[: len(flat) // 3])
    write_shard(folder / "data" / "fineweb_train_000001.bin", flat[len(flat) // 3 :])
    val_tokens = [token for ids in model.encode(val) for token in [model.bos_id(), *ids]]
    write_shard(folder / "data" / "fineweb_val_000000.bin", val_tokens)
    (folder / "vocab_size").write_text(str(model.vocab_size()))
    return folder


@pytest.fixture
def tiny(corpus, tmp_path):
    """Function: the environment of a run that trains a two-layer model on the corpus, with knob overrides."""

    return lambda **overrides: models.run_settings(corpus, **{"LOG_DIR": tmp_path / "logs"} | overrides)


@pytest.fixture
def make_config(tiny):
    """Function: the Config of `tiny`, with knob overrides."""
    return lambda **overrides: train_gpt.Config.load([], tiny(**overrides))


@pytest.fixture
def runtime(make_config):
    """One CPU process in float32."""
    return train_gpt.Runtime(make_config(), {})


@pytest.fixture
def launch(tiny, tmp_path_factory):
    """Function: run train_gpt.py (or another script) in its own process, under torchrun if ranks > 1. Returns the
    CompletedProcess."""

    def start(ranks=1, args=(), timeout=300, script=ROOT / "train_gpt.py", max_restarts=0, **overrides):
        environ = tiny(**overrides) | {"TMPDIR": str(tmp_path_factory.mktemp("launch"))}  # for torchrun's own folders
        how = {"torchrun": [f"--max-restarts={max_restarts}"], "timeout": timeout, "text": True}
        return models.process(environ, None, ranks, script, args, **how)

    return start


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    return models.train_tiny(corpus, folder, ITERATIONS=60)


@pytest.fixture
def bare(corpus, tmp_path, monkeypatch):
    """Function: an environment with only what the machine and the data require."""
    monkeypatch.chdir(tmp_path)
    return lambda **knobs: models.machine_settings(corpus, **knobs)


@pytest.fixture
def call(capfd):
    """Function: call main() in this environment. Returns (exit code, stdout, stderr)."""

    def run(environ):
        capfd.readouterr()
        return models.call_main(environ), *capfd.readouterr()

    return run
