"""Config: defaults, sources of values, valid combinations, and errors that say what to do."""

import dataclasses
import itertools
import os
import re
import shutil
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import artifact_knobs
from models import knobs as pairs

import train_gpt
from train_gpt import Config, UserError, knob

KNOBS = Config.knobs()
CHECKED = settings()  # from the profile that conftest.py loads


def load(argv=(), **environ) -> Config:
    return Config.load([str(arg) for arg in argv], {name: str(text) for name, text in environ.items()})


def error_of(argv=(), **environ) -> str:
    with pytest.raises(UserError) as caught:
        load(argv, **environ)
    return str(caught.value)


@pytest.fixture
def env_file(tmp_path):
    """Function: a FILE.env with this content."""

    def write(text):
        (tmp_path / "run.env").write_bytes(text.encode())
        return tmp_path / "run.env"

    return write


# Defaults

# The reference configuration ("Training Opt Seq4096 v1"), taken from its documentation and not from the code.
REFERENCE = """
DATA_PATH=./data/datasets/fineweb10B_sp1024 TOKENIZER_PATH=./data/tokenizers/fineweb_1024_bpe.model SEED=1337
ITERATIONS=20000 MAX_WALLCLOCK_SECONDS=600.0 WARMUP_STEPS=20 WARMDOWN_FRAC=0.3526 TRAIN_BATCH_TOKENS=393216
TRAIN_SEQ_LEN=4096 TRAIN_LOG_EVERY=200 VAL_LOSS_EVERY=1000 VAL_BATCH_SIZE=524288 VOCAB_SIZE=1024 NUM_LAYERS=9
MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=2.0 TIE_EMBEDDINGS=1 TIED_EMBED_INIT_STD=0.005 LOGIT_SOFTCAP=30.0
ROPE_BASE=10000.0 QK_GAIN_INIT=1.5 EMBED_LR=0.6 HEAD_LR=0.008 TIED_EMBED_LR=0.03 SCALAR_LR=0.02 BETA1=0.9 BETA2=0.95
ADAM_EPS=1e-08 MATRIX_LR=0.02 MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500
MUON_BACKEND_STEPS=5 GRAD_CLIP_NORM=0.0
"""
# Features added by this script are off.
EXTRAS = """
DEVICE=auto DTYPE=auto COMPILE=auto ATTENTION=auto MODEL_FILE= TARGET_WORLD_SIZE=0 LOADER=stream GRAD_ACCUM_STEPS=0
MICRO_BATCH_TOKENS=auto VAL_TOKENS_LIMIT=0 EVAL_STRIDE=0 MUON_WEIGHT_DECAY=0.0 EMBED_WEIGHT_DECAY=0.0
SCALAR_WEIGHT_DECAY=0.0 LR_FLOOR=0.0 EMA_DECAY=0.0 EMA_SHARE=1.0
"""
ONE_CALL = {"run_id": "", "mode": "train", "artifact": "", "resume": "auto", "resume_force": False}


def test_defaults_are_those_of_the_reference():
    config = load()
    expected = pairs(REFERENCE) | pairs(EXTRAS)
    assert {name: text for name, text in config.as_env().items() if name in expected} == expected
    assert {name: getattr(config, name) for name in ONE_CALL} == ONE_CALL
    assert dataclasses.replace(config, **ONE_CALL) == config


def test_every_knob_has_a_meaning_and_a_type():
    for name, field in KNOBS.items():
        kind, choices = type(field.default), field.metadata["allowed"][2]
        assert len(field.metadata["meaning"]) > 10 and field.type in (kind, kind.__name__), name
        assert kind in (int, float, bool, str) and (kind is str or not choices), name


# Sources of values


def test_environment_beats_file_beats_default(env_file):
    config = load([env_file("ITERATIONS=7\nSEED=bad\n")], SEED="9", PATH="/bin", seed="3", ITERATION="4")
    assert config == dataclasses.replace(Config(), iterations=7, seed=9)


def test_file_and_environment_beat_what_an_artifact_records(env_file):
    told = {"EVAL_STRIDE": "64", "VAL_BATCH_SIZE": "8192", "NUM_LAYERS": "3"}
    config = Config.load([env_file("EVAL_STRIDE=32\n")], {"VAL_BATCH_SIZE": "4096"}, told)
    assert (config.eval_stride, config.val_batch_size, config.num_layers) == (32, 4096, 3)


def test_the_environment_of_this_machine_is_not_read_by_load(monkeypatch):
    monkeypatch.setitem(os.environ, "ITERATIONS", "77")
    assert load().iterations == 20000


GRAMMAR = [
    ("  DATA_PATH\t=  /a b  c  ", "/a b  c"),
    ("DATA_PATH=/a\t#a comment with 'quotes\"", "/a"),
    ("DATA_PATH=/a=b==", "/a=b=="),
    ("DATA_PATH=it's", "it's"),
    ("DATA_PATH='/a#b' # c", "/a#b"),
    ("""DATA_PATH="it's # 1" """, "it's # 1"),
    ("""DATA_PATH='say "hi"'""", 'say "hi"'),
    ("DATA_PATH=", ""),
    ('DATA_PATH=""', ""),
    ("DATA_PATH= # nothing", ""),
    ("DATA_PATH=$HOME/`x`/${y}~", "$HOME/`x`/${y}~"),
    ("DATA_PATH=na\u00efve/\u6d77", "na\u00efve/\u6d77"),
    ("\ufeffDATA_PATH=/a", "/a"),
    ("# DATA_PATH=/z\n\n   \n\t# more\nDATA_PATH=/a\r\nSEED=3\r\n", "/a"),
]


@pytest.mark.parametrize("line, value", GRAMMAR)
def test_file_grammar(env_file, line, value):
    assert load([env_file(line)]).data_path == value


def test_malformed_line_names_file_and_line(env_file):
    lines = ["DATA_PATH", "=/a", "export DATA_PATH=/a", "DATA_PATH: /a", "DATA-PATH=/a", "DATA_PATH=/a#b"]
    lines += ['DATA_PATH="/a', "DATA_PATH='/a", 'DATA_PATH="/a" b', 'DATA_PATH="/a"b', "DATA_PATH='/a' 'b'"]
    for line in lines:
        path = env_file(f"SEED=1\n# comment\n\n{line}\n")
        message = error_of([path])
        assert f"{path}:4" in message and line in message and "KEY=VALUE" in message


# Subclasses: the Config of a model file


class Base(Config):
    num_layers = 4
    width: int = knob(200, "channels of something", 1, 500, artifact=True)
    choice: str = knob("a", "one of two letters", choices=("a", "b"), free=True)


class Derived(Base):
    matrix_lr = 1  # an integer for a float, and 0 for a switch
    width = 300
    num_layers = 6
    tie_embeddings = 0


class Other(Config):
    seed = 5
    num_layers = 2
    depth: float = knob(2, "a float whose default is written without a point", 0, 9)


class Both(Derived, Other):
    choice = "b"


@pytest.mark.parametrize("cls", [Config, Base, Derived, Other, Both])
def test_a_subclass_keeps_every_knob_with_its_meaning_bounds_and_type(cls):
    """Overriding a default takes only the value; no decorator is needed."""
    inherited = KNOBS | Base.knobs() | Other.knobs()
    for name, field in cls.knobs().items():
        assert field.metadata == inherited[name].metadata, name
        assert type(field.default) is type(inherited[name].default), name
    assert KNOBS.keys() <= cls.knobs().keys() and artifact_knobs() <= artifact_knobs(cls)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().seed = 1
    assert cls() == cls.load([], {}) and (cls() != Config()) == (cls is not Config)
    assert KNOBS == Config.knobs() and Config().num_layers == 9, "the base class is unchanged"


def test_defaults_of_several_levels_and_of_two_bases():
    base, derived, other, both = Base(), Derived(), Other(), Both()
    assert (base.num_layers, base.width, base.choice, base.matrix_lr) == (4, 200, "a", 0.02)
    assert (derived.num_layers, derived.width, derived.choice) == (6, 300, "a")
    assert (type(derived.matrix_lr), derived.matrix_lr, derived.tie_embeddings) == (float, 1.0, False)
    assert (other.seed, other.num_layers, other.depth) == (5, 2, 2)
    assert (both.seed, both.num_layers, both.width, both.depth, both.choice) == (5, 6, 300, 2, "b")
    assert "WIDTH" in artifact_knobs(Both) and "DEPTH" not in artifact_knobs(Both)


def test_a_subclass_is_loaded_and_checked_as_the_scripts_own(env_file):
    loaded = Derived.load([str(env_file("WIDTH=7\nCHOICE=b\n"))], {"NUM_LAYERS": "3"})
    assert (loaded.width, loaded.choice, loaded.num_layers, loaded.matrix_lr) == (7, "b", 3, 1.0)
    assert Derived.load([], loaded.as_env()) == loaded
    assert loaded.as_env()["MATRIX_LR"] == "1.0" and loaded.as_env()["TIE_EMBEDDINGS"] == "0"
    for text, said in (
        ("WIDTH=0", "WIDTH=0 is too small: the minimum is 1"),
        ("WIDTH=501", "WIDTH=501 is too large: the maximum is 500"),
        ("CHOICE=c", "CHOICE=c: expected one of a, b"),
        ("WIDTH=1.5", "WIDTH='1.5' is not a whole number: the default is 300"),
        ("MATRIX_LR=-1", "MATRIX_LR=-1.0 is too small"),
        ("DEPTH=nan", "DEPTH='nan' is not"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            Both.load([], pairs(text))


def test_a_bad_default_or_a_field_without_a_type_is_an_error():
    with pytest.raises(UserError, match="NUM_LAYERS=0 is too small"):
        type("TooFew", (Config,), {"num_layers": 0}).load([], {})
    with pytest.raises(ValueError):
        type("NoNumber", (Config,), {"num_layers": "many"})
    with pytest.raises(TypeError, match="width"):
        type("NoType", (Config,), {"width": knob(1, "a field that dataclasses do not see without its type")})


def test_methods_and_other_attributes_of_a_subclass_are_no_knobs():
    class Named(Config):
        vocab_padding = 5
        title = "no knob: it has no field"

        def check(self):
            super().check()
            train_gpt.require(self.seed != 13, "SEED=13 is unlucky: use another")

        @classmethod
        def model_class(cls):
            return train_gpt.Model

    assert Named.knobs().keys() == KNOBS.keys() and Named.vocab_padding == 5 and Config.vocab_padding == 127
    assert Named.load([], {}).model_class() is train_gpt.Model and Config.model_class() is train_gpt.GPT
    with pytest.raises(UserError, match="unlucky"):
        Named.load([], {"SEED": "13"})


# Refused values: every message names the knob, its value and what to do


@pytest.mark.parametrize(
    "name, texts, said",
    [
        ("ITERATIONS", ["abc", "", "1.5", "1e3", "nan", "4k", "0x10"], "a whole number: the default is 20000"),
        ("MATRIX_LR", ["abc", "", "1,5", "nan", "inf", "-inf", "1e999"], "a finite number: the default is 0.02"),
        ("TIE_EMBEDDINGS", ["", "2", "true", "False", "yes", "01"], "a switch: use 0 or 1: the default is True"),
    ],
)
def test_a_text_that_does_not_have_the_type_of_its_knob(name, texts, said):
    for text in texts:
        assert error_of(**{name: text}) == f"{name}={text!r} is not {said}"


def test_a_text_that_has_the_type_of_its_knob():
    assert [load(TIE_EMBEDDINGS=text).tie_embeddings for text in ("0", "1", " 1 ")] == [False, True, True]
    assert (load(SEED=" 7 ").seed, load(MATRIX_LR="1e-2").matrix_lr, load(MLP_MULT="3").mlp_mult) == (7, 0.01, 3.0)


@pytest.mark.parametrize("name", [name for name, field in KNOBS.items() if field.metadata["allowed"][2]])
def test_choices(name):
    choices = KNOBS[name].metadata["allowed"][2]
    assert [getattr(load(**{name: choice}), name.lower()) for choice in choices] == list(choices)
    for wrong in ("nonsense", "", choices[0].upper()):
        assert error_of(**{name: wrong}) == f"{name}={wrong}: expected one of {', '.join(choices)}"


NUMBERS = {name: field for name, field in KNOBS.items() if type(field.default) in (int, float)}


def test_bounds_are_enforced():
    """A value outside is refused; the bound itself is accepted unless another knob has to follow it."""
    for name, field in NUMBERS.items():
        kind, (low, high, _) = type(field.default), field.metadata["allowed"]
        step = kind(1) if kind is int else 1e-3
        for bound, change, said in ((low, -step, "small: the minimum"), (high, step, "large: the maximum")):
            if bound is not None:
                outside = kind(bound) + change
                assert error_of(**{name: outside}) == f"{name}={outside} is too {said} is {bound}"
                try:
                    load(**{name: kind(bound)})
                except UserError as error:
                    assert "is too" not in str(error), name


def test_the_bounds_are_those_of_the_mathematics():
    zero_is_no_value = """ITERATIONS TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN VAL_BATCH_SIZE VOCAB_SIZE NUM_LAYERS MODEL_DIM
        NUM_HEADS NUM_KV_HEADS MLP_MULT LOGIT_SOFTCAP ROPE_BASE ADAM_EPS MUON_BACKEND_STEPS SIZE_LIMIT"""
    at_most_1 = "WARMDOWN_FRAC LR_FLOOR EMA_DECAY EMA_SHARE"
    below_1 = "BETA1 BETA2 MUON_MOMENTUM MUON_MOMENTUM_WARMUP_START"
    bounds = {name: field.metadata["allowed"][:2] for name, field in NUMBERS.items()}
    assert {name for name, (low, _) in bounds.items() if low is None} == {"QK_GAIN_INIT"}
    assert {name for name, (low, _) in bounds.items() if low and low > 0} == {*zero_is_no_value.split()}
    assert {name for name, (low, _) in bounds.items() if low and low < 0} == {"CHECKPOINT_EVERY_SECONDS"}
    assert {name for name, (_, high) in bounds.items() if high == 1} == {*at_most_1.split()}
    assert {name for name, (_, high) in bounds.items() if high and 0.99 < high < 1} == {*below_1.split()}
    assert (bounds["VOCAB_SIZE"], bounds["SEED"]) == ((2, 65536), (0, 2**63 - 1))
    assert all(high is not None for name, (_, high) in bounds.items() if type(NUMBERS[name].default) is int)


ADVICE = [  # conflicting knobs, the message, a knob and all values of it that are suggested
    ("MODEL_DIM=512 NUM_HEADS=7 NUM_KV_HEADS=1", "MODEL_DIM=512 is not a multiple of 2 * NUM_HEADS=7", "MODEL_DIM 518"),
    ("NUM_HEADS=512", "MODEL_DIM=512 is not a multiple of 2 * NUM_HEADS=512", "MODEL_DIM 1024"),
    ("MODEL_DIM=511 NUM_HEADS=1 NUM_KV_HEADS=1", "MODEL_DIM=511", "MODEL_DIM 512"),
    ("NUM_KV_HEADS=3", "NUM_KV_HEADS=3 does not divide NUM_HEADS=8", "NUM_KV_HEADS 1 2 4 8"),
    ("NUM_KV_HEADS=16", "NUM_KV_HEADS=16 does not divide NUM_HEADS=8", "NUM_KV_HEADS 1 2 4 8"),
    ("TRAIN_BATCH_TOKENS=1", "TRAIN_BATCH_TOKENS=1 is not whole TRAIN_SEQ_LEN=4096", "TRAIN_BATCH_TOKENS 4096"),
    ("TRAIN_BATCH_TOKENS=393217", "TRAIN_BATCH_TOKENS=393217", "TRAIN_BATCH_TOKENS 397312"),
    ("TRAIN_SEQ_LEN=64 TRAIN_BATCH_TOKENS=1536 GRAD_ACCUM_STEPS=5", "GRAD_ACCUM_STEPS=5", "GRAD_ACCUM_STEPS 1 2 3 4 6"),
    ("EVAL_STRIDE=4097", "EVAL_STRIDE=4097 is over TRAIN_SEQ_LEN=4096: lower it", "EVAL_STRIDE 4096 1"),
    ("MLP_MULT=0.01 MODEL_DIM=16", "MLP_MULT=0.01 of MODEL_DIM=16 rounds to 0: raise it", "MLP_MULT 0.1"),
    ("GRAD_ACCUM_STEPS=2 MICRO_BATCH_TOKENS=8192", "unset one, both cut the step", "MICRO_BATCH_TOKENS 0 auto"),
    ("EMA_SHARE=0.5", "EMA_SHARE=0.5 weights an average, and EMA_DECAY=0 makes none: set EMA_DECAY", "EMA_DECAY 0.99"),
]


@pytest.mark.parametrize("knobs, said, advice", ADVICE)
def test_knobs_that_do_not_fit_each_other_and_the_advice_works(knobs, said, advice):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        load(**pairs(knobs)).accumulation_steps(1, "cuda")
    name, *advised = advice.split()
    if found := re.search(r"use (?:one of )?\[?([\d, ]+)", str(caught.value)):
        assert found[1].split(", ")[: len(advised)] == advised
    for text in advised:
        load(**pairs(knobs) | {name: text}).accumulation_steps(1, "cuda")


def test_micro_batch_under_a_sequence():
    for wrong in ("4095", "1", "-1", "-4096", "4096.0", "4e3", "", "AUTO", "none", "\u00b2", "00", "04096"):
        message = error_of(MICRO_BATCH_TOKENS=wrong)
        assert f"MICRO_BATCH_TOKENS={wrong}: expected auto, 0 (unlimited) or at least" in message
        assert "TRAIN_SEQ_LEN=4096" in message
    for text in ("4096", "4097", "0", "auto"):
        config = load(MICRO_BATCH_TOKENS=text)
        assert config.micro_batch_tokens == text and config.accumulation_steps(1, "cuda") >= 8


def test_run_id_names_a_folder():
    for run_id in ("a/b", "../up", "/abs", "..", ".", ".hidden", "a\\b", "a b", "a:b", "a*", "a\nb", 101 * "x"):
        said = "holds control characters" if "\n" in run_id else "use up to 100 letters"
        message = error_of(RUN_ID=run_id)
        assert f"RUN_ID={run_id!r}" in message and said in message
    for run_id in ("baseline", "2026-01-01_00-00-00_123", "lr=0.02+wd", "v1.2..3", "_x", "\u6d77"):
        assert load(RUN_ID=run_id).run_id == run_id


# Writing and reading back


def write_folder(config: Config, log_dir) -> str:
    """config.env as a run writes it."""
    runtime = SimpleNamespace(is_master=True, broadcast=lambda value: value)
    folder = train_gpt.tool("checkpoint").RunFolder(runtime)
    config = dataclasses.replace(config, log_dir=str(log_dir), run_id="run")
    folder.locate(config)
    folder.create(config, {"train_gpt.py": b""})
    folder.close()
    return str(log_dir / "run" / "config.env")


def test_as_env_leaves_out_what_must_not_be_repeated():
    texts = load(RUN_ID="x", MODE="eval", ARTIFACT="y", RESUME="z", RESUME_FORCE="1").as_env()
    assert KNOBS.keys() - texts.keys() == {name.upper() for name in ONE_CALL}
    assert texts["TIE_EMBEDDINGS"] == "1" and load(TIE_EMBEDDINGS="0").as_env()["TIE_EMBEDDINGS"] == "0"


@pytest.mark.parametrize("path", ['it\'s "b" ', "'a' \"b\" #c", "a\nSEED=3", "a\rb", "a\u2028b", "a\x85b", "a\udcffb"])
def test_a_value_that_config_env_cannot_hold_is_refused(path):
    assert f"DATA_PATH={path.strip()!r} holds control characters or both kinds of quotes" in error_of(DATA_PATH=path)


# Line ends and values with both kinds of quotes are tested above.
PATHS = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")) | st.sampled_from(" #'\"=$\\"), max_size=20)


@st.composite
def configs(draw):
    """Valid environments that cover all knobs."""
    number = {int: st.integers, float: lambda low, high: st.floats(low, high, allow_nan=False)}
    environ = {}
    for name, field in KNOBS.items():
        (low, high, choices), kind = field.metadata["allowed"], type(field.default)
        if kind is bool:
            environ[name] = draw(st.sampled_from("01"))
        elif kind is not str:
            low, high = (-1e6 if low is None else low), (1e6 if high is None else high)
            environ[name] = str(draw(number[kind](kind(low), kind(high))))
        elif choices:
            environ[name] = draw(st.sampled_from(choices))
        elif name not in ("RUN_ID", "MODEL_FILE"):  # the latter must be an existing program
            environ[name] = draw(PATHS.filter(lambda text: "'" not in text or '"' not in text)).strip()
    T, kv_heads, groups, halves, sequences = (draw(st.integers(1, 9)) for _ in range(5))
    environ |= {"TRAIN_SEQ_LEN": str(T), "TRAIN_BATCH_TOKENS": str(T * sequences), "NUM_KV_HEADS": str(kv_heads)}
    environ |= {"NUM_HEADS": str(kv_heads * groups), "MODEL_DIM": str(2 * halves * kv_heads * groups)}
    environ |= {"EVAL_STRIDE": str(draw(st.integers(0, T))), "MICRO_BATCH_TOKENS": str(T * draw(st.integers(1, 3)))}
    environ |= {"MLP_MULT": str(draw(st.floats(1, 1024)))}
    environ |= {} if float(environ["EMA_DECAY"]) else {"EMA_SHARE": "1"}
    del environ[draw(st.sampled_from(["GRAD_ACCUM_STEPS", "MICRO_BATCH_TOKENS"]))]
    return environ


@settings(CHECKED, max_examples=40)
@given(environ=configs())
@example(environ={"DATA_PATH": '/a "b" #c', "TOKENIZER_PATH": "it's #1", "QK_GAIN_INIT": "-0.0", "ADAM_EPS": "1e-19"})
@example(environ={"DATA_PATH": "", "TIE_EMBEDDINGS": "0", "LOADER": "shuffle"})
def test_any_config_survives_its_config_env(environ, tmp_path_factory):
    config = load(**environ)
    log_dir = tmp_path_factory.getbasetemp() / "config_env"
    path = write_folder(config, log_dir)
    again = load([path])
    shutil.rmtree(log_dir)
    repeated = dataclasses.replace(config, **ONE_CALL)  # everything except knobs of one run or one call
    assert dataclasses.replace(again, log_dir=config.log_dir) == repeated
    assert load(**config.as_env()) == repeated, "the same run from environment variables"


# Micro-steps


def brute_force(sequences: int, T: int, world: int, device: str, wanted: int, micro: str) -> int | None:
    """The number of micro-steps by exhaustive search; None if the batch or GRAD_ACCUM_STEPS does not divide evenly."""
    micro = (16_384 if device == "cpu" else 0) if micro == "auto" else int(micro)
    fitting = [n for n in range(1, sequences + 1) if sequences % (world * n) == 0]
    if wanted or not fitting:
        return wanted if wanted in fitting else None
    enough = [n for n in fitting if (device == "cpu" or n * world >= 8)]
    enough = [n for n in enough if not micro or sequences // (world * n) * T <= micro]
    return min(enough, default=max(fitting))  # too few sequences for 8 micro-batches: one sequence each


# GRAD_ACCUM_STEPS, and MICRO_BATCH_TOKENS in sevenths of a sequence
CUTS = [(0, "auto"), (0, "0"), (1, "auto"), (2, "0"), (3, "auto"), (8, "0")]
CUTS += [(0, "7"), (0, "8"), (0, "20"), (0, "21"), (0, "1000000")]


def test_accumulation_steps_against_brute_force():
    seen = set()
    for T in (7, 2048, 5000, 20_000):  # on a CPU, auto fits many, 8, 3, or not even 1
        for sequences, (wanted, micro) in itertools.product((1, 2, 6, 7, 12, 20, 24, 96, 100), CUTS):
            micro = str(int(micro) * T // 7) if micro.isdecimal() else micro
            config = Config(train_seq_len=T, train_batch_tokens=T * sequences)
            config = dataclasses.replace(config, grad_accum_steps=wanted, micro_batch_tokens=micro)
            for world, device in itertools.product((1, 2, 3, 5, 8), ("cpu", "cuda", "mps")):
                expected = brute_force(sequences, T, world, device, wanted, micro)
                try:
                    steps = config.accumulation_steps(world, device)
                except UserError:
                    steps = None
                assert steps == expected, (sequences, world, device, wanted, micro)
                seen.add(expected)
    assert {None, 1, 2, 3, 4, 5, 6, 8, 12, 24} <= seen


def test_reference_micro_steps():
    config, unlimited = Config(), Config(micro_batch_tokens="0")
    assert [config.accumulation_steps(n, "cuda") for n in (1, 2, 4, 8, 16, 32)] == [8, 4, 2, 1, 1, 1]
    assert [config.accumulation_steps(n, "cpu") for n in (1, 2, 8)] == [24, 12, 3]  # 4 sequences are 2**14 tokens
    assert [unlimited.accumulation_steps(n, "cpu") for n in (1, 2, 8)] == [1, 1, 1]
    assert [unlimited.accumulation_steps(n, "cuda") for n in (1, 2, 8)] == [8, 4, 1]


@pytest.mark.parametrize("sequences, world", [(96, 5), (96, 64), (1, 2), (10, 8)])
def test_advice_for_a_batch_that_does_not_divide_by_the_ranks_works(sequences, world):
    config = Config(train_seq_len=64, train_batch_tokens=64 * sequences)
    said = rf"^TRAIN_BATCH_TOKENS={64 * sequences} on {world} ranks: use (\d+), or one of \[([\d, ]+)\] ranks$"
    with pytest.raises(UserError, match=said) as caught:
        config.accumulation_steps(world, "cuda")
    batch, worlds = re.match(said, str(caught.value)).groups()
    assert 0 < int(batch) - 64 * sequences < 64 * world
    dataclasses.replace(config, train_batch_tokens=int(batch)).accumulation_steps(world, "cuda")
    assert [*map(int, worlds.split(", "))] == [n for n in range(1, sequences + 1) if sequences % n == 0]
    for n in map(int, worlds.split(", ")):
        config.accumulation_steps(n, "cuda")
