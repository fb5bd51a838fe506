"""The seam: a model in a file of its own has all that the script's own model has. Runs are processes of that file."""

import dataclasses
import hashlib
import importlib.util
import inspect
import json
import math
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
import torch
from models import SCRIPT, exact_line, process, tree
from torch import nn

import train_gpt
from train_gpt import GPT, MLP, Config, Linear, Row, UserError

MODEL_FILE = Path(__file__).resolve().parent / "alternative" / "tiny_model.py"
STEPS = {
    "ITERATIONS": 12,
    "TRAIN_LOG_EVERY": 1,
    "VAL_LOSS_EVERY": 5,
    "DROPOUT": 0.2,
    "HIDDEN": 40,
    "SEED": 5,
    "SCALAR_LR": 0.05,
}
EVERY_STEP = {"CHECKPOINT_EVERY_SECONDS": 1e-9}
SAME = ("val_loss", "val_bpb", "pre_quant_val_loss", "pre_quant_val_bpb", "sha256_artifact", "steps", "scored_bytes")

# Runs a script until the middle of a step, where it is killed.
KILLED = """
import os, runpy, signal, sys
sys.path.insert(0, {folder!r})
import train_gpt
step = train_gpt.Trainer.step

def fatal(self, *args):
    if self.steps + 1 == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args)

train_gpt.Trainer.step = fatal
runpy.run_path({script!r}, run_name="__main__")
"""


def settings(corpus, logs: Path, **overrides) -> dict[str, str]:
    return models.tiny_settings(corpus, **{"LOG_DIR": logs} | STEPS | overrides)


def run(environ: dict[str, str], cwd: Path, script=MODEL_FILE, code=0, **more) -> SimpleNamespace:
    """A process and what its run folder holds then."""
    done = process(environ, cwd, script=script, **more)
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    assert done.returncode == code, out + err
    path = cwd / environ["LOG_DIR"] / environ["RUN_ID"]
    result, metrics = path / "result.json", path / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    return SimpleNamespace(
        path=path,
        out=out,
        err=err,
        metrics=lines,
        losses={m["step"]: m["train_loss"] for m in lines if "train_loss" in m},
        result=json.loads(result.read_text()) if result.is_file() else None,
    )


def killed(environ: dict[str, str], cwd: Path, script: Path, at: int):
    """The same process as `run` starts, but killed in that step."""
    driver = cwd / "killed.py"
    driver.write_text(
        KILLED.format(folder=str(SCRIPT.parent if script == MODEL_FILE else script.parent), script=str(script), at=at)
    )
    assert process(environ, cwd, script=driver).returncode == -signal.SIGKILL


def same(one, other, moved=False) -> bool:
    """To the last digit, and bit for bit in the artifact, unless the model file has moved, whose place it tells."""
    names = [name for name in SAME if not (moved and name == "sha256_artifact")]
    return [one.result[name] for name in names] == [other.result[name] for name in names] and one.losses == other.losses


def load_module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The undisturbed run; its `environ` and `cwd` too."""
    cwd = tmp_path_factory.mktemp("whole")
    environ = settings(corpus, cwd / "logs")
    made = run(environ, cwd)
    made.environ, made.cwd = environ, cwd
    return made


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """A folder with copies of the script, its tools and the model file side by side."""
    folder = tmp_path_factory.mktemp("flat")
    shutil.copytree(SCRIPT.parent / "tools", folder / "tools")
    for path in (SCRIPT, MODEL_FILE):
        shutil.copy(path, folder)
    return folder


# A run


def test_it_trains_by_its_own_schedule_and_learns(whole):
    assert whole.err == "" and len(whole.losses) == 12
    scales = [m["lr_scale"] for m in whole.metrics if "lr_scale" in m]
    assert scales == pytest.approx([0.5 + 0.5 * math.cos(math.pi * step / 12) for step in range(12)])
    validations = [m["val_loss"] for m in whole.metrics if "val_loss" in m]
    assert len(validations) == 4 and validations[-1] < validations[0] - 0.3
    assert re.search(r"^\* HIDDEN=40$", whole.out, re.MULTILINE) and "\n* DROPOUT=0.2\n" in whole.out
    assert re.search(r"^step:12/12 train_loss:\S+ train_time:\d+ms step_avg:\S+ms tok/s:\d+$", whole.out, re.MULTILINE)


def test_all_its_sources_are_in_the_folder_in_the_result_and_in_the_code_bytes(whole):
    sources = {"train_gpt.py": SCRIPT.read_bytes(), "tiny_model.py": MODEL_FILE.read_bytes()}
    assert {name: (whole.path / name).read_bytes() for name in sources} == sources
    expected = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in sources.items()
    }
    assert whole.result["sources"] == expected
    code = sum(map(len, sources.values()))
    assert whole.result["bytes_code"] == code and f"\nCode size: {code} bytes\n" in whole.out
    assert whole.result["bytes_total"] == code + (whole.path / "final_model.int8.ptz").stat().st_size
    names = {
        "train.log",
        "metrics.jsonl",
        "config.env",
        "final_model.pt",
        "final_model.int8.ptz",
        "result.json",
        "checkpoint.pt",
    }
    assert {path.name for path in whole.path.iterdir()} == names | sources.keys()


def test_its_folder_runs_by_itself(whole, tmp_path):
    """Without tools, which it says; with other results it would be no record of the run."""
    folder = shutil.copytree(whole.path, tmp_path / "kept")
    again = run(
        {"RUN_ID": "again", "LOG_DIR": str(tmp_path / "logs"), "DEVICE": "cpu"},
        tmp_path,
        script=folder / "tiny_model.py",
        args=[folder / "config.env"],
    )
    assert same(again, whole, moved=True)
    assert "warning: tools/checkpoint.py is not beside the script" in again.out
    assert again.result["sources"] == whole.result["sources"]


def test_after_a_kill_it_goes_on_bit_for_bit(whole, corpus, tmp_path):
    """With the random numbers of its dropout, and the state of an optimizer that is not the script's."""
    environ = settings(corpus, tmp_path / "logs", **EVERY_STEP)
    for at in (4, 9):
        killed(environ, tmp_path, MODEL_FILE, at)
    resumed = run(environ, tmp_path)
    first, second = resumed.result["resumed_at"]
    assert 1 <= first <= 3 and 6 <= second <= 8
    assert same(resumed, whole)
    states = [models.open_checkpoint(one.path / "checkpoint.pt") for one in (resumed, whole)]
    for part in ("model", "optimizer"):
        leaves = [torch.utils._pytree.tree_leaves(state[part]) for state in states]
        assert len(leaves[0]) >= 4 and all(map(torch.equal, *leaves))


def test_a_seed_gives_one_run(whole, corpus, tmp_path):
    """Regression: what a model draws in training had no seed, so that no run could be repeated."""
    again = run(settings(corpus, tmp_path / "logs"), tmp_path)
    assert same(again, whole)
    other = run(settings(corpus, tmp_path / "logs", RUN_ID="other", SEED=6), tmp_path)
    assert not same(other, whole)


def test_dropout_draws_new_numbers_in_every_step_and_none_in_a_score(whole, corpus, tmp_path):
    other = run(settings(corpus, tmp_path / "logs", DROPOUT=0), tmp_path)
    assert other.losses[1] != whole.losses[1], "the first loss is with dropout, where there is some"
    assert other.metrics[0]["val_loss"] == whole.metrics[0]["val_loss"], "and the score before it without"


@pytest.mark.parametrize("ranks", [2])
def test_ranks_train_it_as_one_process(corpus, tmp_path, ranks):
    environ = settings(corpus, tmp_path / "logs", DROPOUT=0, ITERATIONS=6)
    one = run(environ, tmp_path)
    two = run(environ | {"RUN_ID": "two", "TMPDIR": str(tmp_path)}, tmp_path, ranks=ranks)
    assert list(two.losses.values()) == pytest.approx(list(one.losses.values()), abs=1e-4)
    assert two.result["val_bpb"] == pytest.approx(one.result["val_bpb"], abs=1e-4)
    assert two.result["world_size"] == ranks and two.result["sources"] == one.result["sources"]


# Its artifact


def test_it_is_scored_to_the_same_digits_by_either_file(whole, corpus, tmp_path):
    """By the script, which finds the model file again, and by the model file; beside the artifact or where it was."""
    alone = Path(shutil.copy(whole.path / "final_model.int8.ptz", tmp_path))
    expected = exact_line((whole.path / "train.log").read_text())
    before = tree(tmp_path)
    for script, artifact in ((SCRIPT, whole.path / "final_model.int8.ptz"), (SCRIPT, alone), (MODEL_FILE, alone)):
        environ = models.machine_settings(corpus, MODE="eval", ARTIFACT=artifact)
        done = process(environ, tmp_path, script=script)
        assert done.returncode == 0, done.stderr.decode()
        assert exact_line(done.stdout.decode()) == expected
        assert re.search(
            rf"^source:\S+tiny_model.py sha256:{whole.result['sources']['tiny_model.py']['sha256']}$",
            done.stdout.decode(),
            re.MULTILINE,
        )
        assert b"assumed" not in done.stdout
    assert tree(tmp_path) == before


def test_it_samples_the_same_by_either_file(whole, corpus, tmp_path):
    texts = set()
    for script in (SCRIPT, MODEL_FILE):
        environ = models.machine_settings(
            corpus,
            MODE="sample",
            ARTIFACT=whole.path / "final_model.int8.ptz",
            SAMPLE_PROMPT="the king",
            SAMPLE_TOKENS=20,
        )
        done = process(environ, tmp_path, script=script)
        assert done.returncode == 0, done.stderr.decode()
        texts.add(done.stdout)
    (text,) = texts
    assert text.startswith(b"the king") and len(text) > 12


def named(whole, tmp_path, **source) -> bytes:
    """Its artifact, which names another file or class."""
    artifact = models.open_artifact(whole.path / "final_model.int8.ptz")
    assert artifact["source"] == {"file": "tests/alternative/tiny_model.py", "config_class": "TinyConfig"}
    return models.seal(models.torch_bytes(artifact | {"source": artifact["source"] | source}))


@pytest.mark.parametrize(
    "source, said",
    [
        ({"file": "../tiny_model.py"}, "outside the repository"),
        ({"file": "/etc/passwd.py"}, "outside the repository"),
        ({"file": "a/../../b.py"}, "outside the repository"),
        ({"file": "nowhere.py"}, "nowhere.py, which is neither"),
        ({"config_class": "OtherConfig"}, "has no class OtherConfig"),
        ({"config_class": "math"}, "artifact.ptz"),
        ({"file": "broken.py"}, "cannot be loaded: ZeroDivisionError"),
        ({"config_class": None}, "artifact.ptz"),
        ({"file": ""}, "artifact.ptz"),
    ],
    ids=str,
)
def test_an_artifact_that_names_no_model_is_refused(whole, tmp_path, source, said):
    evaluate = train_gpt.tool("evaluate")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match=said) as caught:
        evaluate.read_model(named(whole, tmp_path, **source), tmp_path / "artifact.ptz")
    assert "\n" not in str(caught.value)


def test_a_class_of_the_same_name_in_another_file_is_not_its_own(tmp_path, monkeypatch):
    """What was started counts as the artifact's model if it is that file, or says the same."""
    source = {"file": "tests/alternative/tiny_model.py", "config_class": "TinyConfig"}
    monkeypatch.setattr(sys, "path", list(sys.path))  # which the model file adds to
    shutil.copy(SCRIPT, tmp_path)
    classes = {}
    for place, more in (("copy", ""), ("other", "# another model\n"), ("renamed", "")):
        path = tmp_path / place / ("model.py" if place == "renamed" else "tiny_model.py")
        path.parent.mkdir()
        path.write_text(MODEL_FILE.read_text() + more)
        spec = importlib.util.spec_from_file_location(place, path)
        monkeypatch.setitem(sys.modules, place, importlib.util.module_from_spec(spec))
        spec.loader.exec_module(sys.modules[place])
        classes[place] = sys.modules[place].TinyConfig
    choose, artifact = train_gpt.tool("evaluate").load_config_class, tmp_path / "artifact.ptz"
    assert choose(source, artifact, classes["copy"]) is classes["copy"]
    for place in ("other", "renamed"):
        chosen = choose(source, artifact, classes[place])
        assert chosen is not classes[place] and Path(inspect.getfile(chosen)) == MODEL_FILE
    # A file that calls its class as the script does.
    (tmp_path / "plain.py").write_text("import train_gpt\nclass Config(train_gpt.Config):\n    pass\n")
    chosen = choose({"file": "plain.py", "config_class": "Config"}, artifact, Config)
    assert chosen is not Config and Path(inspect.getfile(chosen)) == tmp_path / "plain.py"
    # The started file where there is no other; and two files of one name, loaded one after the other.
    assert choose(source | {"file": "gone/tiny_model.py"}, artifact, classes["other"]) is classes["other"]
    (tmp_path / "tiny_model.py").write_text(MODEL_FILE.read_text() + "# beside the artifact\n")
    first, second = choose(source, artifact, Config), choose(source, tmp_path / "nowhere" / "artifact.ptz", Config)
    assert [Path(inspect.getfile(cls)) for cls in (first, second)] == [tmp_path / "tiny_model.py", MODEL_FILE]


def test_its_tensors_must_be_those_of_its_configuration(whole, corpus, tmp_path):
    artifact = models.open_artifact(whole.path / "final_model.int8.ptz")
    artifact["config"]["hidden"] += 1
    (tmp_path / "odd.ptz").write_bytes(models.seal(models.torch_bytes(artifact)))
    done = process(models.machine_settings(corpus, MODE="eval", ARTIFACT=tmp_path / "odd.ptz"), tmp_path)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"disagree on fc.weight" in done.stderr


# Its file


def test_a_flat_copy_that_is_changed_is_refused_at_a_resume(flat, corpus, tmp_path):
    shutil.copytree(flat, tmp_path / "copy")
    script = tmp_path / "copy" / "tiny_model.py"
    environ = settings(corpus, tmp_path / "logs", **EVERY_STEP)
    killed(environ, tmp_path, script, 6)
    digests = [hashlib.sha256(script.read_bytes()).hexdigest()[:16]]
    script.write_text(script.read_text() + "# one more line\n")
    digests.append(hashlib.sha256(script.read_bytes()).hexdigest()[:16])
    refused = run(environ, tmp_path, script=script, code=2)
    said = "tiny_model.py was {}, is {}".format(*digests)
    assert f"is of another run: {said}: change that back" in refused.err and refused.err.count("\n") == 1
    forced = run(environ | {"RESUME_FORCE": "1"}, tmp_path, script=script)
    assert re.search(rf"^resumed: step:\d from .*; {said}$", forced.out, re.MULTILINE)


@pytest.mark.parametrize("place, options, more", [("above", ["-P"], {}), ("beside", [], {"PYTHONSAFEPATH": "1"})])
def test_it_finds_the_script_wherever_python_looks(whole, flat, corpus, tmp_path, place, options, more):
    """Above the model file, or beside it in a flat copy, from another working directory with others of that name."""
    (tmp_path / "check").mkdir()
    (tmp_path / "train_gpt.py").write_text("1 / 0\n")
    script = MODEL_FILE if place == "above" else flat / "tiny_model.py"
    made = run(settings(corpus, tmp_path / "logs"), tmp_path, script=script, options=options, **more)
    assert same(made, whole, moved=place == "beside")


def test_what_it_imports_from_its_own_folder_is_a_source_too(flat, corpus, tmp_path):
    shutil.copytree(flat, tmp_path / "copy")
    script = tmp_path / "copy" / "tiny_model.py"
    script.write_text("import helper\n" + script.read_text().replace("from torch import nn\n", "nn = helper.nn\n"))
    (script.parent / "helper.py").write_text("from torch import nn\n")
    (script.parent / "stranger.py").write_text("not imported\n")
    made = run(settings(corpus, tmp_path / "logs", ITERATIONS=2), tmp_path, script=script)
    assert set(made.result["sources"]) == {"train_gpt.py", "tiny_model.py", "helper.py"}
    assert made.result["bytes_code"] == sum((made.path / name).stat().st_size for name in made.result["sources"])
    assert (made.path / "helper.py").read_bytes() == (script.parent / "helper.py").read_bytes()


def test_check_and_help_know_it(corpus, tmp_path):
    environ = settings(corpus, tmp_path / "logs", MODE="check", DROPOU=1)
    done = process(environ, tmp_path, script=MODEL_FILE)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    out = done.stdout.decode()
    facts = json.loads(out.splitlines()[-1].removeprefix("check_json:"))
    assert facts["bytes_code"] == sum(path.stat().st_size for path in (SCRIPT, MODEL_FILE))
    assert facts["model_params"] == 320 * 32 + 64 * 40 + 40 * 32 + 32 and not facts["problems"]
    assert "environment variable DROPOU is no knob: did you mean DROPOUT?" in out
    done = process({}, tmp_path, script=MODEL_FILE, args=["--help"])
    assert b"\nHIDDEN=48  channels of the MLP\n" in done.stdout and b"\nSEED=1337 " in done.stdout


def test_its_knobs_have_the_errors_of_all_knobs(corpus, tmp_path):
    (tmp_path / "x.env").write_text("DROPUOT=0.1\n")
    for environ, args, said in (
        ({"DROPOUT": "1"}, [], "DROPOUT=1.0 is too large"),
        ({"HIDDEN": "x"}, [], "HIDDEN='x'"),
        ({}, ["x.env"], "DROPUOT is no knob: did you mean DROPOUT?"),
    ):
        done = process(environ, tmp_path, script=MODEL_FILE, args=args)
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and said in done.stderr.decode()


# MODEL_FILE: the script runs it


def test_the_script_runs_a_model_file_as_the_file_runs_itself(flat, corpus, tmp_path):
    """By a path from where it is called or from the script, in a variable or in FILE.env."""
    model_file = flat / "tiny_model.py"
    environ = settings(corpus, tmp_path / "logs", ITERATIONS=3)
    itself = run(environ, tmp_path, script=model_file)
    made = run(environ | {"MODEL_FILE": "tiny_model.py", "RUN_ID": "script"}, tmp_path, script=flat / "train_gpt.py")
    assert same(itself, made) and made.result["sources"] == itself.result["sources"]
    (tmp_path / "x.env").write_text(f"MODEL_FILE={model_file}\n")
    again = run(environ | {"RUN_ID": "env"}, tmp_path, script=flat / "train_gpt.py", args=["x.env"])
    assert same(itself, again)
    copy = shutil.copytree(made.path, tmp_path / "copy")  # which has no tools
    assert 'MODEL_FILE="tiny_model.py"' in (copy / "config.env").read_text()
    environ = {"RUN_ID": "copy", "LOG_DIR": str(tmp_path / "logs")}
    assert same(itself, run(environ, tmp_path, script=copy / "tiny_model.py", args=[copy / "config.env"]))


@pytest.mark.parametrize(
    "text, file, said",
    [
        ("x = 1\n", "x.py", "MODEL_FILE=x.py defines no subclass of train_gpt.Config"),
        ("from train_gpt import Config\n", "x.py", "MODEL_FILE=x.py defines no subclass of train_gpt.Config"),
        ("1 / 0\n", "x.py", "x.py, of MODEL_FILE, cannot be loaded: ZeroDivisionError"),
        ("", "y.py", "MODEL_FILE=y.py: it is neither there nor"),
    ],
    ids=["no class", "an imported class", "an error", "no file"],
)
def test_a_model_file_that_is_none_is_one_line(tmp_path, text, file, said):
    (tmp_path / "x.py").write_text(text)
    done = process({"MODEL_FILE": file}, tmp_path, script=SCRIPT)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and said in done.stderr.decode()


def test_two_model_files_are_too_many(tmp_path):
    done = process({"MODEL_FILE": "records/models/frontier.py"}, tmp_path, script=MODEL_FILE)
    assert done.returncode == 2 and b"tiny_model.py was started: choose one" in done.stderr


def test_help_knows_the_knobs_of_a_model_file(tmp_path):
    done = process({"MODEL_FILE": str(MODEL_FILE)}, tmp_path, script=SCRIPT, args=["--help"])
    assert b"\nHIDDEN=48  channels of the MLP\n" in done.stdout


# The table of parameters, and the vocabulary


class GatedMLP(MLP):
    """As SwiGLU's, whose gate has a name that the attention uses for something else."""

    def __init__(self, config):
        super().__init__(config)
        self.gate = Linear(config.model_dim, self.fc.out_features, bias=False)

    def forward(self, x):
        return self.proj(nn.functional.silu(self.gate(x)) * self.fc(x))


class Ungated(GPT):
    def __init__(self, config, *args):
        super().__init__(config, *args)
        for block in self.blocks:
            block.mlp = GatedMLP(config)
        self.init_weights(config)


class Gated(Ungated):
    PARAMETERS = GPT.PARAMETERS | {"blocks.mlp.gate": Row(train_gpt.uniform_init, "matrix", "mlp")}


def config_of(model, config: Config):
    """The same configuration of another model."""
    cls = dataclasses.dataclass(frozen=True)(
        type("OtherConfig", (Config,), {"model_class": classmethod(lambda cls: model)})
    )
    return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Config)})


def test_a_parameter_without_a_row_raises_its_name(make_config, runtime):
    """Regression: its name made it a gate of the attention, which begins as zeros and is trained by Adam."""
    config = make_config()
    said = r"Ungated.PARAMETERS has no row blocks\.mlp\.gate for blocks\.0\.mlp\.gate\.weight: add one"
    with pytest.raises(UserError, match=said):
        Ungated(config)
    model = GPT(config)
    model.blocks[1].mlp = GatedMLP(config)
    said = said.replace("Ungated", "GPT").replace("0", "1")
    for use in (
        lambda: model.optimizers(config, runtime),
        lambda: train_gpt.quantize(model.state_dict(), config),
        lambda: train_gpt.tool("check").projected_bytes(config, model),
    ):
        with pytest.raises(UserError, match=said):
            use()


def test_with_a_row_it_is_what_the_row_says(make_config, runtime, monkeypatch):
    monkeypatch.setattr(train_gpt, "INT8_MIN_NUMEL", 1000)
    config = config_of(Gated, make_config(CODEC="rans", CLIP_MLP=5, WEIGHT_BITS=6))
    model = Gated(config)
    gate = model.blocks[0].mlp.gate.weight
    assert gate.abs().max() <= 32**-0.5 and gate.std().item() == pytest.approx(32**-0.5 / 3**0.5, rel=0.1)
    adam, muon = model.optimizers(config, runtime)
    assert any(p is gate for p in muon.param_groups[0]["params"])
    artifact = train_gpt.quantize(model.state_dict(), config)
    q, scale = train_gpt.quantize_rows(gate.detach(), 31, 5.0)
    assert torch.equal(artifact["quantized"]["blocks.0.mlp.gate.weight"], q)
    assert torch.equal(artifact["scales"]["blocks.0.mlp.gate.weight"], scale)
    tables = train_gpt.tool("compress").rans_tables(["blocks.0.mlp.gate.weight"], config)
    assert tables == [train_gpt.TENSOR_CLASSES.index("mlp")]


def test_a_padded_vocabulary_weighs_nothing_and_is_never_said(whole, corpus, tmp_path):
    size = int((corpus / "vocab_size").read_text())
    padded = run(settings(corpus, tmp_path / "logs", VOCAB_SIZE=384, SAMPLE_PROMPT="the", SAMPLE_TOKENS=40), tmp_path)
    assert size < 384 and padded.result["scored_bytes"] == whole.result["scored_bytes"]
    assert padded.result["model_params"] == whole.result["model_params"] + (384 - size) * 32
    assert "\nsample: the" in padded.out
    artifact = padded.path / "final_model.int8.ptz"
    done = process(models.machine_settings(corpus, MODE="eval", ARTIFACT=artifact), tmp_path)
    assert exact_line(done.stdout.decode()) == exact_line(padded.out)


def test_how_far_a_vocabulary_may_be_padded_is_the_configurations(corpus, make_config):
    size, path = int((corpus / "vocab_size").read_text()), str(corpus / "tok.model")
    tiny_model = load_module(MODEL_FILE)
    exact = type("Exact", (tiny_model.TinyConfig,), {"vocab_padding": 0})
    wide = type("Wide", (tiny_model.TinyConfig,), {"vocab_padding": 1000})
    for config_class, most in ((exact, 0), (tiny_model.TinyConfig, 127), (wide, 1000)):
        train_gpt.TokenBytes(path, size + most, config_class.vocab_padding)
        with pytest.raises(UserError, match=f"VOCAB_SIZE={size + most + 1}, but TOKENIZER_PATH={path} has {size} pie"):
            train_gpt.TokenBytes(path, size + most + 1, config_class.vocab_padding)
