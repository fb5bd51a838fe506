"""Config: defaults, where values come from, what may be combined, and errors that say how to mend the mistake."""

import dataclasses
import math
import os
import re
import shutil
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import artifact_knobs

import train_gpt
from train_gpt import Config, UserError, knob

KNOBS = Config.knobs()
check = train_gpt.tool("check")

CHECKED = settings()  # those of the profile that conftest.py loads

# The reference configuration ("Training Opt Seq4096 v1"), from its documentation and not from the code.
REFERENCE = {
    "DATA_PATH": "./data/datasets/fineweb10B_sp1024",
    "TOKENIZER_PATH": "./data/tokenizers/fineweb_1024_bpe.model",
    "SEED": 1337,
    "VAL_BATCH_SIZE": 524288,
    "VAL_LOSS_EVERY": 1000,
    "TRAIN_LOG_EVERY": 200,
    "ITERATIONS": 20000,
    "WARMDOWN_FRAC": 0.3526,
    "WARMUP_STEPS": 20,
    "TRAIN_BATCH_TOKENS": 393216,
    "TRAIN_SEQ_LEN": 4096,
    "MAX_WALLCLOCK_SECONDS": 600.0,
    "QK_GAIN_INIT": 1.5,
    "VOCAB_SIZE": 1024,
    "NUM_LAYERS": 9,
    "MODEL_DIM": 512,
    "NUM_HEADS": 8,
    "NUM_KV_HEADS": 4,
    "MLP_MULT": 2.0,
    "TIE_EMBEDDINGS": True,
    "ROPE_BASE": 10000.0,
    "LOGIT_SOFTCAP": 30.0,
    "EMBED_LR": 0.6,
    "HEAD_LR": 0.008,
    "TIED_EMBED_LR": 0.03,
    "TIED_EMBED_INIT_STD": 0.005,
    "MATRIX_LR": 0.02,
    "SCALAR_LR": 0.02,
    "MUON_MOMENTUM": 0.99,
    "MUON_BACKEND_STEPS": 5,
    "MUON_MOMENTUM_WARMUP_START": 0.92,
    "MUON_MOMENTUM_WARMUP_STEPS": 1500,
    "BETA1": 0.9,
    "BETA2": 0.95,
    "ADAM_EPS": 1e-8,
    "GRAD_CLIP_NORM": 0.0,
}


def load(argv=(), **environ) -> Config:
    return Config.load([str(arg) for arg in argv], environ)


def error_of(argv=(), **environ) -> str:
    with pytest.raises(UserError) as caught:
        load(argv, **environ)
    return str(caught.value)


@pytest.fixture
def env_file(tmp_path):
    """Function: a FILE.env with these contents."""

    def write(text):
        path = tmp_path / "run.env"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


# Defaults


@pytest.mark.parametrize("name", REFERENCE)
def test_default_is_the_reference(name):
    value = getattr(load(), name.lower())
    assert (value, type(value)) == (REFERENCE[name], type(REFERENCE[name]))


def test_extras_over_the_reference_are_off():
    config = load()
    assert (config.run_id, config.grad_accum_steps, config.micro_batch_tokens) == ("", 0, "auto")
    assert (config.val_tokens_limit, config.eval_stride) == (0, 0)
    assert (config.mode, config.resume, config.resume_force) == ("train", "auto", False)
    assert (config.artifact, config.model_file, config.target_world_size) == ("", "", 0)
    assert {config.device, config.dtype, config.compile, config.attention} == {"auto"}


def test_every_knob_has_a_meaning_and_a_parsable_type():
    for name, field in KNOBS.items():
        assert len(field.metadata["meaning"]) > 10, name
        assert type(field.default) in (str, int, float, bool), name
        assert field.type in (type(field.default), type(field.default).__name__), name


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().seed = 1


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_prints_every_knob(flag, capsys):
    assert train_gpt.main([flag]) == 0
    out = capsys.readouterr().out
    for name, field in KNOBS.items():
        default = int(field.default) if isinstance(field.default, bool) else field.default
        (line,) = (line for line in out.splitlines() if line.startswith(f"{name}=") and "  " in line)
        assert line.startswith(f"{name}={default}  ") and field.metadata["meaning"] in line
        assert line.endswith(" [free]") == field.metadata["free"], "which knobs may change at a resume"
        assert all(choice in line for choice in field.metadata["allowed"][2])
    assert "torchrun" in out and ".env" in out


# Where values come from


def test_environment_beats_file_beats_default(env_file):
    path = env_file("ITERATIONS=7\nSEED=8\n")
    config = load([path], SEED="9")
    assert (config.iterations, config.seed, config.num_layers) == (7, 9, 9)


def test_file_and_environment_beat_what_an_artifact_records(env_file):
    told = {"EVAL_STRIDE": "64", "VAL_BATCH_SIZE": "8192", "NUM_LAYERS": "3"}
    config = Config.load([env_file("EVAL_STRIDE=32\n")], {"VAL_BATCH_SIZE": "4096"}, told)
    assert (config.eval_stride, config.val_batch_size, config.num_layers) == (32, 4096, 3)


def test_environment_beats_a_file_that_holds_a_bad_value(env_file):
    assert load([env_file("ITERATIONS=abc\n")], ITERATIONS="3").iterations == 3


def test_other_environment_variables_are_ignored():
    assert load(PATH="/bin", iterations="3", ITERATION="4") == Config()


@pytest.mark.parametrize(
    "line, value",
    [
        ("DATA_PATH=/a", "/a"),
        ("  DATA_PATH\t=  /a  ", "/a"),
        ("DATA_PATH=/a # a comment", "/a"),
        ("DATA_PATH=/a\t#a comment with 'quotes\"", "/a"),
        ("DATA_PATH=/a=b==", "/a=b=="),
        ("DATA_PATH=/a b  c", "/a b  c"),
        ("DATA_PATH=it's", "it's"),
        ('DATA_PATH="/a"', "/a"),
        ("DATA_PATH='/a'", "/a"),
        ('DATA_PATH="/a # b"', "/a # b"),
        ("DATA_PATH='/a#b' # c", "/a#b"),
        ("""DATA_PATH="it's" """, "it's"),
        ("""DATA_PATH='say "hi"'""", 'say "hi"'),
        ("DATA_PATH=", ""),
        ('DATA_PATH=""', ""),
        ("DATA_PATH= # nothing", ""),
        ("DATA_PATH=$HOME/`x`/${y}~", "$HOME/`x`/${y}~"),
        ("DATA_PATH=na\u00efve/\u6d77", "na\u00efve/\u6d77"),
        ("\ufeffDATA_PATH=/a", "/a"),
        ("# DATA_PATH=/z\n\n   \n\t# more\nDATA_PATH=/a", "/a"),
        ("DATA_PATH=/a\r\nSEED=3\r\n", "/a"),
    ],
)
def test_file_grammar(env_file, line, value):
    assert load([env_file(line)]).data_path == value


@pytest.mark.parametrize(
    "line",
    [
        "DATA_PATH",
        "=/a",
        "export DATA_PATH=/a",
        "DATA_PATH: /a",
        "DATA-PATH=/a",
        "DATA_PATH=/a#b",
        'DATA_PATH="/a',
        "DATA_PATH='/a",
        'DATA_PATH="/a" b',
        'DATA_PATH="/a"b',
        "DATA_PATH='/a' 'b'",
    ],
)
def test_malformed_line_names_file_and_line(env_file, line):
    path = env_file(f"SEED=1\n# comment\n\n{line}\n")
    message = error_of([path])
    assert f"{path}:4" in message and line in message and "KEY=VALUE" in message


def test_duplicate_key_names_file_and_line(env_file):
    path = env_file("SEED=1\nITERATIONS=2\nSEED=1\n")
    message = error_of([path])
    assert f"{path}:3" in message and "SEED" in message and "twice" in message


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("ITERATION", "ITERATIONS"),
        ("MATRXI_LR", "MATRIX_LR"),
        ("iterations", "ITERATIONS"),
        ("SEEDS", "SEED"),
        ("NUM_KV_HEAD", "NUM_KV_HEADS"),
        ("TRAIN_SEQ_LENGTH", "TRAIN_SEQ_LEN"),
    ],
)
def test_unknown_key_names_the_nearest(env_file, key, nearest):
    path = env_file(f"{key}=1\n")
    message = error_of([path])
    assert str(path) in message and key in message and f"did you mean {nearest}?" in message


def test_unknown_key_far_from_all_points_to_help(env_file):
    message = error_of([env_file("ZZZZ=1\n")])
    assert "ZZZZ" in message and "--help" in message and "did you mean" not in message


def test_unreadable_files(env_file, tmp_path):
    for path in (tmp_path / "missing.env", tmp_path, env_file(b"DATA_PATH=caf\xe9\n")):
        message = error_of([path])
        assert str(path) in message and "FILE.env" in message


def test_two_arguments_are_refused(env_file):
    path = env_file("SEED=1\n")
    assert "at most one" in error_of([path, path])
    assert "environment variables" in error_of([path, "SEED=2"])


# Subclasses: the Config of a model file


class Base(Config):
    """Knobs of its own beside another default of one of the script's."""

    num_layers = 4
    width: int = knob(200, "channels of something", 1, 500, artifact=True)
    choice: str = knob("a", "one of two letters", choices=("a", "b"), free=True)


class Derived(Base):
    matrix_lr = 1
    width = 300
    num_layers = 6
    tie_embeddings = 0


class Other(Config):
    seed = 5
    num_layers = 2
    depth: float = knob(2, "a float whose default is written without a point", 0, 9)


class Both(Derived, Other):
    choice = "b"


@pytest.mark.parametrize("cls", [Base, Derived, Other, Both])
def test_a_subclass_keeps_every_knob_with_its_meaning_bounds_and_type(cls):
    """A changed default is the value alone; no decorator is needed."""
    inherited = KNOBS | Base.knobs() | Other.knobs()
    for name, field in cls.knobs().items():
        assert field.metadata == inherited[name].metadata, name
        assert type(field.default) is type(inherited[name].default), name
    assert KNOBS.keys() <= cls.knobs().keys() and artifact_knobs() <= artifact_knobs(cls)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().seed = 1
    assert cls() == cls.load([], {}) and cls() != Config()
    assert KNOBS == Config.knobs() and Config().num_layers == 9, "the class it comes from is as before"


def test_defaults_of_several_levels_and_of_two_bases():
    base, derived, other, both = Base(), Derived(), Other(), Both()
    assert (base.num_layers, base.width, base.choice, base.matrix_lr) == (4, 200, "a", 0.02)
    assert (derived.num_layers, derived.width, derived.choice) == (6, 300, "a")
    assert (derived.matrix_lr, type(derived.matrix_lr)) == (1.0, float), "a whole number for a float knob is a float"
    assert derived.tie_embeddings is False, "and 0 for a switch is a bool"
    assert (other.seed, other.num_layers, other.depth) == (5, 2, 2)
    assert (both.seed, both.num_layers, both.width, both.depth, both.choice) == (5, 6, 300, 2, "b"), (
        "as Python inherits"
    )
    assert "WIDTH" in artifact_knobs(Both) and "DEPTH" not in artifact_knobs(Both)


def test_a_subclass_is_loaded_and_checked_as_the_script_s_own(env_file):
    loaded = Derived.load([str(env_file("WIDTH=7\nCHOICE=b\n"))], {"NUM_LAYERS": "3"})
    assert (loaded.width, loaded.choice, loaded.num_layers, loaded.matrix_lr) == (7, "b", 3, 1.0)
    again = Derived.load([], loaded.as_env())
    assert again == loaded and loaded.as_env()["MATRIX_LR"] == "1.0" and loaded.as_env()["TIE_EMBEDDINGS"] == "0"
    for name, text, said in (
        ("WIDTH", "0", "WIDTH=0 is too small: the minimum is 1"),
        ("WIDTH", "501", "WIDTH=501 is too large: the maximum is 500"),
        ("CHOICE", "c", "CHOICE=c: expected one of a, b"),
        ("WIDTH", "1.5", "WIDTH='1.5' is not a whole number: the default is 300"),
        ("MATRIX_LR", "-1", "MATRIX_LR=-1.0 is too small"),
        ("DEPTH", "nan", "DEPTH='nan' is not"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            (Both if name == "DEPTH" else Derived).load([], {name: text})


def test_a_default_out_of_bounds_or_a_field_without_a_type_is_noticed():
    class TooFew(Config):
        num_layers = 0

    with pytest.raises(UserError, match="NUM_LAYERS=0 is too small"):
        TooFew.load([], {})
    with pytest.raises(ValueError):

        class NoNumber(Config):
            num_layers = "many"

    with pytest.raises(TypeError, match="width"):

        class NoType(Config):
            width = knob(1, "a field that dataclasses do not see without its type")


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


# What is refused: every message names the knob, its value and what to do

BOUNDS = [  # knob, first value that is refused, nearest that is taken
    ("SEED", "-1", "0"),
    ("SEED", str(2**63), str(2**63 - 1)),
    ("ITERATIONS", "0", "1"),
    ("MAX_WALLCLOCK_SECONDS", "-0.5", "0"),
    ("WARMDOWN_FRAC", "-0.1", "0"),
    ("WARMDOWN_FRAC", "1.01", "1"),
    ("WARMUP_STEPS", "-1", "0"),
    ("TRAIN_BATCH_TOKENS", "0", "4096"),
    ("TRAIN_SEQ_LEN", "0", "1"),
    ("GRAD_ACCUM_STEPS", "-1", "0"),
    ("CHECKPOINT_EVERY_SECONDS", "-1.5", "-1"),
    ("TARGET_WORLD_SIZE", "-1", "0"),
    ("TRAIN_LOG_EVERY", "-1", "0"),
    ("VAL_LOSS_EVERY", "-1", "0"),
    ("VAL_BATCH_SIZE", "0", "1"),
    ("VAL_TOKENS_LIMIT", "-1", "0"),
    ("EVAL_STRIDE", "-1", "0"),
    ("VOCAB_SIZE", "1", "2"),
    ("VOCAB_SIZE", "65537", "65536"),
    ("NUM_LAYERS", "0", "1"),
    ("MODEL_DIM", "0", "16"),
    ("NUM_HEADS", "0", "4"),
    ("NUM_KV_HEADS", "0", "1"),
    ("MLP_MULT", "0", "0.01"),
    ("TIED_EMBED_INIT_STD", "-0.1", "0"),
    ("ROPE_BASE", "0.5", "1"),
    ("LOGIT_SOFTCAP", "0", "0.001"),
    ("EMBED_LR", "-1", "0"),
    ("HEAD_LR", "-1", "0"),
    ("TIED_EMBED_LR", "-1", "0"),
    ("SCALAR_LR", "-1", "0"),
    ("MATRIX_LR", "-1", "0"),
    ("MUON_MOMENTUM", "-0.1", "0"),
    ("MUON_MOMENTUM", "1", "0.999"),
    ("MUON_MOMENTUM_WARMUP_START", "-0.1", "0"),
    ("MUON_MOMENTUM_WARMUP_START", "1", "0.999"),
    ("MUON_MOMENTUM_WARMUP_STEPS", "-1", "0"),
    ("MUON_BACKEND_STEPS", "0", "1"),
    ("BETA1", "-0.1", "0"),
    ("BETA1", "1", "0.999"),
    ("BETA2", "-0.1", "0"),
    ("BETA2", "1", "0.999"),
    ("ADAM_EPS", "0", "1e-20"),
    ("GRAD_CLIP_NORM", "-1", "0"),
    ("SIZE_LIMIT", "0", "1"),
]


@pytest.mark.parametrize("name, refused, taken", BOUNDS)
def test_bounds(name, refused, taken):
    kind = type(KNOBS[name].default)
    message = error_of(**{name: refused})
    assert f"{name}={kind(refused)}" in message
    assert getattr(load(**{name: taken}), name.lower()) == kind(taken)
    advised = re.search(r"the (?:minimum|maximum) is (\S+)$", message)[1]
    try:
        load(**{name: advised})
    except UserError as error:  # some of the least values need other knobs to follow
        assert name in ("TRAIN_BATCH_TOKENS", "MODEL_DIM", "NUM_HEADS") and "the minimum is" not in str(error)


def test_a_share_of_an_average_wants_one():
    assert "EMA_DECAY=0 makes none: set EMA_DECAY" in error_of(EMA_SHARE="0.5")
    assert load(EMA_SHARE="0.5", EMA_DECAY="0.99").ema_share == 0.5


@pytest.mark.parametrize(
    "name, choices",
    [
        ("DEVICE", "auto cuda mps cpu"),
        ("DTYPE", "auto bfloat16 float32"),
        ("COMPILE", "auto 0 1 autotune"),
        ("ATTENTION", "auto fastest flash cudnn efficient math blocked"),
        ("MODE", "train check eval sample"),
    ],
)
def test_choices(name, choices):
    for choice in choices.split():
        assert getattr(load(**{name: choice}), name.lower()) == choice
    for wrong in ("nonsense", "", choices.split()[0].upper()):
        message = error_of(**{name: wrong})
        assert f"{name}={wrong}:" in message and all(choice in message for choice in choices.split())


@pytest.mark.parametrize("name", [name for name, field in KNOBS.items() if type(field.default) is int])
@pytest.mark.parametrize("text", ["abc", "", "1.5", "1e3", "nan", "4k", "0x10"])
def test_not_a_whole_number(name, text):
    message = error_of(**{name: text})
    assert f"{name}={text!r}" in message and "whole number" in message and str(KNOBS[name].default) in message


@pytest.mark.parametrize("name", [name for name, field in KNOBS.items() if type(field.default) is float])
@pytest.mark.parametrize("text", ["abc", "", "1,5", "nan", "inf", "-inf", "1e999"])
def test_not_a_finite_number(name, text):
    message = error_of(**{name: text})
    assert f"{name}={text!r}" in message and str(KNOBS[name].default) in message


@pytest.mark.parametrize("name", [name for name, field in KNOBS.items() if type(field.default) is bool])
def test_switches(name):
    needed = {"FIT_SIZE": {"CLIP_ATTN": "13", "CLIP_MLP": "12", "CLIP_EMBED": "15"}}.get(name, {})
    values = [getattr(load(**{name: text}, **needed), name.lower()) for text in ("0", "1", " 1 ")]
    assert values == [False, True, True]
    for wrong in ("", "2", "true", "False", "yes", "01"):
        message = error_of(**{name: wrong})
        assert f"{name}={wrong!r}" in message and "0 or 1" in message


def numbers_after(words: str, message: str) -> list[int]:
    """The numbers of a list, or the one number, that a message advises."""
    return [int(n) for n in re.findall(r"\d+", re.search(rf"{words} \[?([\d, ]+)", message)[1])]


def test_heads_must_cut_the_width_and_the_advice_works():
    for width, heads in ((512, 7), (512, 3), (512, 512), (511, 7), (2, 512)):  # 512 heads of width 1 cannot be rotated
        message = error_of(MODEL_DIM=str(width), NUM_HEADS=str(heads), NUM_KV_HEADS="1")
        assert f"MODEL_DIM={width}" in message and f"NUM_HEADS={heads}" in message
        (advised,) = numbers_after("use", message)
        assert 0 < advised - width < 2 * heads, "the least that is wider"
        load(MODEL_DIM=str(advised), NUM_HEADS=str(heads), NUM_KV_HEADS="1")
    for heads in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        load(NUM_HEADS=str(heads), NUM_KV_HEADS="1")


def test_kv_heads_must_divide_the_heads_and_the_advice_works():
    for kv_heads in ("3", "16"):
        message = error_of(NUM_KV_HEADS=kv_heads)
        assert f"NUM_KV_HEADS={kv_heads}" in message and "NUM_HEADS=8" in message
        assert numbers_after("use one of", message) == [1, 2, 4, 8]
    for kv_heads in "1248":
        load(NUM_KV_HEADS=kv_heads)


@pytest.mark.parametrize("batch", [1, 4095, 4097, 393217])
def test_batch_must_be_whole_sequences_and_the_advice_works(batch):
    message = error_of(TRAIN_BATCH_TOKENS=str(batch))
    assert f"TRAIN_BATCH_TOKENS={batch}" in message and "TRAIN_SEQ_LEN=4096" in message
    (advised,) = numbers_after("use", message)
    assert 0 <= advised - batch < 4096
    load(TRAIN_BATCH_TOKENS=str(advised))


def test_stride_over_the_sequence():
    message = error_of(EVAL_STRIDE="4097")
    assert "EVAL_STRIDE=4097" in message and "TRAIN_SEQ_LEN=4096" in message and "lower" in message
    assert load(EVAL_STRIDE="4096").eval_stride == 4096


def test_micro_batch_under_a_sequence():
    for wrong in ("4095", "1", "-1", "-4096", "4096.0", "4e3", "", "AUTO", "none", "\u00b2", "00", "04096"):
        message = error_of(MICRO_BATCH_TOKENS=wrong)
        assert f"MICRO_BATCH_TOKENS={wrong}: expected auto, 0 (unlimited) or at least" in message
        assert "TRAIN_SEQ_LEN=4096" in message
    for text in ("4096", "4097", "0", "auto"):
        config = load(MICRO_BATCH_TOKENS=text)
        assert config.micro_batch_tokens == text and config.accumulation_steps(1, "cuda") >= 8


def test_knobs_that_exclude_each_other():
    load(GRAD_ACCUM_STEPS="2", MICRO_BATCH_TOKENS="0"), load(GRAD_ACCUM_STEPS="2", MICRO_BATCH_TOKENS="auto")
    message = error_of(GRAD_ACCUM_STEPS="2", MICRO_BATCH_TOKENS="8192")
    assert "GRAD_ACCUM_STEPS" in message and "MICRO_BATCH_TOKENS" in message and "unset one" in message


@pytest.mark.parametrize("run_id", ["a/b", "../up", "/abs", "..", ".", ".hidden", "a\\b", "a b", "a:b", "a\nb", "a*"])
def test_run_id_that_leaves_its_folder(run_id):
    message = error_of(RUN_ID=run_id)
    said = "holds control characters" if "\n" in run_id else "use up to 100 letters"
    assert f"RUN_ID={run_id!r}" in message and said in message


def test_run_id_that_is_fine():
    for run_id in ("baseline", "2026-01-01_00-00-00_123", "lr=0.02+wd", "v1.2..3", "_x", "\u6d77"):
        assert load(RUN_ID=run_id).run_id == run_id


# Written and read again


def write_folder(config: Config, log_dir) -> str:
    """config.env as a run writes it."""
    runtime = SimpleNamespace(is_master=True, broadcast=lambda value: value)
    folder, config = (
        train_gpt.tool("checkpoint").RunFolder(runtime),
        dataclasses.replace(config, log_dir=str(log_dir), run_id="run"),
    )
    folder.locate(config)
    folder.create(config, {"train_gpt.py": b""})
    folder.close()
    return str(log_dir / "run" / "config.env")


ONE_CALL = {"run_id": "", "mode": "train", "artifact": "", "resume": "auto", "resume_force": False}


def test_as_env_leaves_out_what_must_not_be_repeated():
    one_call = {name.upper() for name in ONE_CALL}
    changed = {"RUN_ID": "x", "MODE": "eval", "ARTIFACT": "y", "RESUME": "z", "RESUME_FORCE": "1"}
    texts = load(**changed).as_env()
    assert KNOBS.keys() - texts.keys() == one_call
    assert texts["TIE_EMBEDDINGS"] == "1" and load(TIE_EMBEDDINGS="0").as_env()["TIE_EMBEDDINGS"] == "0"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"LOADER": "shuffle"},
        {"WARMDOWN_FRAC": "0.1"},
        {"TIE_EMBEDDINGS": "0"},
        {"DATA_PATH": "/a b/#1"},
        {"DATA_PATH": ""},
        {"ADAM_EPS": "1e-19"},
    ],
)
def test_config_env_of_a_run_gives_the_same_config(tmp_path, changes):
    config = load(**changes)
    again = load([write_folder(config, tmp_path)])
    assert dataclasses.replace(again, log_dir=config.log_dir) == config


@pytest.mark.parametrize(
    "path",
    [
        """it's "b" """,
        """it's "b" #c""",
        """'a' "b" #c""",
        "a\nSEED=3",
        "a\rb",
        "a\u2028b",
        "a\x85b",
        "a\x1cb",
        "a\udcffb",  # a byte of the environment that is not UTF-8
    ],
)
def test_value_that_is_hard_to_write_is_kept_or_refused(tmp_path, path):
    """Never is another configuration written in silence, or one that cannot be read again."""
    try:
        config = load(DATA_PATH=path)
    except UserError as error:
        assert "DATA_PATH" in str(error)
        return
    again = load([write_folder(config, tmp_path)])
    assert again.data_path == config.data_path


# Line ends and values with both kinds of quotes are tested above.
PATHS = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")) | st.sampled_from(" #'\"=$\\"), max_size=20)


@st.composite
def configs(draw):
    """Valid environments, through all knobs."""
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
        elif name not in ("RUN_ID", "MODEL_FILE"):  # the latter must be a program that is there
            environ[name] = draw(PATHS.filter(lambda text: "'" not in text or '"' not in text)).strip()
    T, kv_heads, groups, pairs, sequences = (draw(st.integers(1, 9)) for _ in range(5))
    environ |= {"TRAIN_SEQ_LEN": str(T), "TRAIN_BATCH_TOKENS": str(T * sequences), "NUM_KV_HEADS": str(kv_heads)}
    environ |= {"NUM_HEADS": str(kv_heads * groups), "MODEL_DIM": str(2 * pairs * kv_heads * groups)}
    environ |= {"EVAL_STRIDE": str(draw(st.integers(0, T))), "MICRO_BATCH_TOKENS": str(T * draw(st.integers(1, 3)))}
    environ |= {"MLP_MULT": str(draw(st.floats(1, 1024)))}
    environ |= {} if float(environ["EMA_DECAY"]) else {"EMA_SHARE": "1"}
    del environ[draw(st.sampled_from(["GRAD_ACCUM_STEPS", "MICRO_BATCH_TOKENS"]))]
    return environ


@CHECKED
@given(environ=configs())
@example(environ={"DATA_PATH": '/a "b" #c', "TOKENIZER_PATH": "it's #1", "QK_GAIN_INIT": "-0.0"})
def test_any_config_survives_its_config_env(environ, tmp_path_factory):
    config = load(**environ)
    log_dir = tmp_path_factory.getbasetemp() / "config_env"
    path = write_folder(config, log_dir)
    again = load([path])
    shutil.rmtree(log_dir)
    repeated = dataclasses.replace(config, **ONE_CALL)  # all but what belongs to one run or one call
    assert dataclasses.replace(again, log_dir=config.log_dir) == repeated
    # As an environment, too: an export of as_env() starts the same run.
    assert load(**config.as_env()) == repeated


# Micro-steps


def brute_force(sequences: int, T: int, world: int, device: str, wanted: int, micro: str) -> int | None:
    """Micro-steps by trying all; None where the batch or GRAD_ACCUM_STEPS does not divide."""
    micro = (16_384 if device == "cpu" else 0) if micro == "auto" else int(micro)
    fitting = [n for n in range(1, sequences + 1) if sequences % (world * n) == 0]
    if wanted or not fitting:
        return wanted if wanted in fitting else None
    enough = [n for n in fitting if (device == "cpu" or n * world >= 8)]
    enough = [n for n in enough if not micro or sequences // (world * n) * T <= micro]
    return min(enough, default=max(fitting))  # too few sequences for 8 micro-batches: one sequence each


CUTS = [
    (0, "auto"),
    (0, "0"),
    (1, "auto"),
    (2, "0"),
    (3, "auto"),
    (8, "0"),
    (0, "7"),
    (0, "8"),
    (0, "20"),
    (0, "21"),
    (0, "1000000"),
]


@pytest.mark.parametrize("T", [7, 2048, 5000, 20_000])  # on a CPU, auto holds many, 8, 3, not even 1
def test_accumulation_steps_against_brute_force(T):
    seen = set()
    for sequences in (*range(1, 26), 96, 100):
        for world in (1, 2, 3, 4, 5, 8, 16):
            for wanted, micro in CUTS:
                micro = str(int(micro) * T // 7) if micro.isdecimal() else micro
                config = Config(
                    train_seq_len=T, train_batch_tokens=T * sequences, grad_accum_steps=wanted, micro_batch_tokens=micro
                )
                config.check()
                for device in ("cpu", "cuda", "mps"):
                    expected = brute_force(sequences, T, world, device, wanted, micro)
                    try:
                        steps = config.accumulation_steps(world, device)
                    except UserError:
                        steps = None
                    assert steps == expected, (sequences, world, device, wanted, micro)
                    seen.add(expected)
    assert {None, 1, 2, 3, 4, 5, 6, 8, 12, 24} <= seen


def test_reference_micro_steps():
    config = Config()
    assert [config.accumulation_steps(n, "cuda") for n in (1, 2, 4, 8, 16, 32)] == [8, 4, 2, 1, 1, 1]
    assert [config.accumulation_steps(n, "cpu") for n in (1, 2, 8)] == [24, 12, 3]  # 4 sequences are 2**14 tokens
    unlimited = Config(micro_batch_tokens="0")
    assert [unlimited.accumulation_steps(n, "cpu") for n in (1, 2, 8)] == [1, 1, 1]
    assert [unlimited.accumulation_steps(n, "cuda") for n in (1, 2, 8)] == [8, 4, 1]


@pytest.mark.parametrize("sequences, world", [(96, 5), (96, 7), (96, 64), (1, 2), (10, 8), (7, 3)])
def test_advice_for_a_batch_that_ranks_cannot_share_works(sequences, world):
    config = Config(train_seq_len=64, train_batch_tokens=64 * sequences)
    with pytest.raises(UserError) as caught:
        config.accumulation_steps(world, "cuda")
    message = str(caught.value)
    assert f"TRAIN_BATCH_TOKENS={64 * sequences}" in message and f"{world} ranks" in message
    (batch,), worlds = numbers_after("use", message), numbers_after("or one of", message)
    assert 0 < batch - 64 * sequences < 64 * world
    dataclasses.replace(config, train_batch_tokens=batch).accumulation_steps(world, "cuda")
    assert worlds == [n for n in range(1, sequences + 1) if math.gcd(n, sequences) == n]
    for n in worlds:
        config.accumulation_steps(n, "cuda")


def test_advice_for_micro_steps_that_do_not_divide_works():
    config = Config(train_seq_len=64, train_batch_tokens=64 * 24, grad_accum_steps=5)
    with pytest.raises(UserError) as caught:
        config.accumulation_steps(2, "cpu")
    message = str(caught.value)
    assert "GRAD_ACCUM_STEPS=5" in message
    assert numbers_after("use one of", message) == [1, 2, 3, 4, 6, 12]
    for n in (1, 2, 3, 4, 6, 12):
        assert dataclasses.replace(config, grad_accum_steps=n).accumulation_steps(2, "cpu") == n


# Almost knobs in the environment


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("ITERATION", "ITERATIONS"),
        ("SEEDS", "SEED"),
        ("MATRXI_LR", "MATRIX_LR"),
        ("iterations", "ITERATIONS"),
        ("NUM_LAYER", "NUM_LAYERS"),
        ("MAX_WALLCLOCK_SECOND", "MAX_WALLCLOCK_SECONDS"),
        ("TRAIN_SEQ_LENGTH", "TRAIN_SEQ_LEN"),
        ("MOXE", "MODE"),
        ("DTYPF", "DTYPE"),
        ("RESUNE", "RESUME"),
    ],
)
def test_typo_draws_a_warning(name, nearest):
    (warning,) = check.typo_warnings({name: "1", "HOME": "/root", "SEED": "2"}, KNOBS)
    assert warning.startswith("warning:") and f" {name} " in warning and f"did you mean {nearest}?" in warning


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("WARMDOWN_ITERS", "WARMDOWN_FRAC"),
        ("MUON_WD", "MUON_WEIGHT_DECAY"),
        ("XSA_LAST_N", "XSA_LAYERS"),
        ("INT8_SCALE_FLOOR", "CLIP_MLP"),
    ],
)
def test_a_knob_of_other_trainers_draws_a_warning(name, remedy):
    (warning,) = check.typo_warnings({name: "1"}, KNOBS)
    assert f" {name} is no knob: set" in warning and remedy in warning


@pytest.mark.parametrize(
    "name, file", [("CONTEXTS", "frontier"), ("MUON_HEADS", "frontier"), ("TTT_CHUNK", "score_first")]
)
def test_a_knob_of_a_model_file_names_the_file(env_file, name, file):
    (warning,) = check.typo_warnings({name: "1"}, KNOBS)
    for message in (warning, error_of([env_file(f"{name}=1\n")])):
        said = f"knob: it is one of a model file: set MODEL_FILE=records/models/{file}.py"
        assert re.search(rf"\b{name} is (no|not a) {re.escape(said)}", message)


def test_ordinary_variables_draw_no_warning():
    ordinary = """PATH HOME USER SHELL PWD OLDPWD LANG LC_ALL TERM TMPDIR HOSTNAME LOGNAME MAIL EDITOR DISPLAY SHLVL _
        PYTHONPATH VIRTUAL_ENV CONDA_PREFIX CUDA_HOME CUDA_VISIBLE_DEVICES LD_LIBRARY_PATH OMP_NUM_THREADS
        MKL_NUM_THREADS TZ
        RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE ROLE_NAME
        MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RESTART_COUNT
        TORCHELASTIC_ERROR_FILE NCCL_DEBUG NCCL_P2P_DISABLE TORCH_LOGS SLURM_JOB_ID SLURM_NTASKS SLURM_PROCID CI
        GITHUB_ACTIONS XDG_RUNTIME_DIR SSH_CLIENT SSH_TTY""".split()
    assert check.typo_warnings(dict.fromkeys([*ordinary, *KNOBS], "1"), KNOBS) == []


def test_the_environment_of_this_machine_is_not_read_by_load(monkeypatch):
    monkeypatch.setitem(os.environ, "ITERATIONS", "77")
    assert load().iterations == 20000
