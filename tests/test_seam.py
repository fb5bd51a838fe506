"""The seam: MODEL_FILE, the only entry point for a model file, and what a model file may replace.

test_contract.py covers what every model must do. Runs are made in this process by main(), unless they need a copy of
the script or several ranks."""

import copy
import dataclasses
import hashlib
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import models
import numpy as np
import oracle
import pytest
import runs
import torch
from conftest import write_shard
from models import SCRIPT, exact_line, new_model
from torch import nn

import train_gpt
from train_gpt import GPT, Coder, Config, Linear, ParameterRule, UserError

TINY = SCRIPT.parent / "records" / "models" / "tiny.py"
STEPS = {"MODEL_FILE": TINY, "ITERATIONS": 12, "VAL_LOSS_EVERY": 5, "DROPOUT": 0.2, "HIDDEN": 40, "SCALAR_LR": 0.05}
SAME = ("val_loss", "val_bpb", "pre_quant_val_loss", "sha256_artifact", "steps", "scored_bytes")


def process(values: dict[str, str], cwd: Path, code=0, **more):
    """(standard output, standard error, run) of a process."""
    done = models.process(values, cwd, **more)
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    assert done.returncode == code, out + err
    path = cwd / values.get("LOG_DIR", "") / values.get("RUN_ID", "")
    return out, err, runs.read_run(path) if (path / "metrics.jsonl").is_file() else None


def same(one, other) -> bool:
    """Whether results match to the last digit, and artifacts bit for bit."""
    return [one.result[name] for name in SAME] == [other.result[name] for name in SAME] and one.losses == other.losses


@pytest.fixture(autouse=True)
def no_other_model_file():
    with models.fresh_model_files():
        yield


@pytest.fixture
def go(corpus, tmp_path):
    """Function: a run of tiny.py in this process. Returns the contents of its folder."""
    return runs.starter(corpus, tmp_path, **STEPS, VAL_TOKENS_LIMIT=0)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """An undisturbed run."""
    with models.fresh_model_files():
        return runs.starter(corpus, tmp_path_factory.mktemp("whole"), **STEPS, VAL_TOKENS_LIMIT=0)()


@pytest.fixture
def place(tmp_path):
    """A folder with copies of the script, its tools and the model file side by side."""
    shutil.copytree(SCRIPT.parent / "tools", tmp_path / "place" / "tools")
    for path in (SCRIPT, TINY):
        shutil.copy(path, tmp_path / "place")
    return tmp_path / "place"


# A run


def test_it_trains_by_its_own_schedule_and_learns(whole):
    lines = [json.loads(line) for line in (whole.path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train_loss" in line]
    assert [m["lr_scale"] for m in steps] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * t / 12) for t in range(12)])
    validations = [m["val_loss"] for m in lines if "val_loss" in m]
    assert len(validations) == 4 and validations[-1] < validations[0] - 0.3
    assert "\n* HIDDEN=40\n" in whole.log and "\n* DROPOUT=0.2\n" in whole.log
    means = [m["scale_mean"] for m in steps]
    assert len(set(means)) == 12 and re.findall(r"scale_mean:(\S+)$", whole.log, re.MULTILINE)[9] == f"{means[9]:.4f}"


def test_dropout_draws_by_the_seed_and_not_in_a_score(whole, go):
    """Regression: random draws of a model in training had no seed, so runs were not reproducible."""
    assert same(go(RUN_ID="again"), whole)
    first = r"^step:0/12 val_loss:.* val_bpb:\S+"
    for name, value in (("DROPOUT", 0), ("SEED", 1338)):
        other = go(RUN_ID=name, **{name: value})
        assert other.losses[0] != whole.losses[0], "the first loss is with dropout"
        found = [re.search(first, run.log, re.MULTILINE)[0] for run in (other, whole)]
        assert (found[0] == found[1]) == (name == "DROPOUT"), "and the score before it without"


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
def test_two_compiled_ranks_train_it_as_one_process(corpus, tmp_path, go):
    """Including its extra loss, which passes through DDP and the compiler together with the losses."""
    knobs = STEPS | {"DROPOUT": 0, "ITERATIONS": 6}
    one = go(RUN_ID="one", **knobs)
    values = models.tiny_settings(corpus, LOG_DIR=tmp_path / "logs", RUN_ID="two", COMPILE=1, TMPDIR=tmp_path, **knobs)
    _, _, two = process(values, tmp_path, ranks=2)
    assert len(two.losses) == 6 and two.losses == pytest.approx(one.losses, abs=1e-4)
    assert two.result["val_bpb"] == pytest.approx(one.result["val_bpb"], abs=1e-4)
    assert two.result["world_size"] == 2 and two.result["sources"] == one.result["sources"]
    means = [re.findall(r"scale_mean:(\S+)$", run.log, re.MULTILINE) for run in (one, two)]
    assert len(means[0]) == 6 and [*map(float, means[1])] == pytest.approx([*map(float, means[0])], abs=2e-4)


@pytest.mark.parametrize("given, where, kept", [("absolute", "cwd", "run"), ("relative", "kept", "record")])
def test_its_folder_runs_by_itself(place, corpus, tmp_path, given, where, kept):
    """Copied to an otherwise empty folder, without tools, which it reports; and with a tokenizer of vocabularies.py,
    which is then a source, too."""
    shutil.move(place / "tools" / "vocabularies.py", place)
    shutil.rmtree(place / "tools")
    text = "".join(chr(97 + i * i % 23) for i in range(600)).encode()
    for split in ("train", "val"):
        write_shard(tmp_path / f"fineweb_{split}_000000.bin", [1, *(byte + 4 for byte in text)])
    model_file = place / "tiny.py" if given == "absolute" else "tiny.py"
    data = {"DATA_PATH": tmp_path, "TOKENIZER_PATH": "bytes", "VOCAB_SIZE": 260, "VAL_LOSS_EVERY": 0}
    knobs = STEPS | data | {"LOG_DIR": tmp_path / "logs", "MODEL_FILE": model_file}
    _, _, made = process(models.tiny_settings(corpus, **knobs), tmp_path, script=place / "train_gpt.py")
    assert f'MODEL_FILE="{model_file}"' in (made.path / "config.env").read_text()
    sources = {"train_gpt.py", "tiny.py", "vocabularies.py"}
    assert made.result["sources"].keys() == sources
    folder = tmp_path / "kept"
    if kept == "record":
        folder.mkdir()
        for name in (*sources, "config.env", "train.log"):
            shutil.copy(made.path / name, folder)
        (folder / "README.md").write_text("A record.\n")
    else:
        shutil.copytree(made.path, folder)
    shutil.rmtree(place)
    (tmp_path / "cwd").mkdir()
    values = {"RUN_ID": "again", "LOG_DIR": str(tmp_path / "logs"), "DEVICE": "cpu"}
    args = [folder / "config.env"]
    out, _, again = process(values, tmp_path / where, script=folder / "train_gpt.py", args=args)
    assert same(again, made) and again.result["sources"] == made.result["sources"]
    assert "warning: tools/checkpoint.py is missing: " in out


def test_a_copy_that_is_changed_is_refused_at_a_resume(go, tmp_path, capsys):
    model_file = Path(shutil.copy(TINY, tmp_path))
    with runs.stopped_at(6):
        go(code=143, MODEL_FILE=model_file)
    digests = [hashlib.sha256(model_file.read_bytes()).hexdigest()[:16]]
    model_file.write_text(model_file.read_text() + "# one more line\n")
    digests.append(hashlib.sha256(model_file.read_bytes()).hexdigest()[:16])
    said = "tiny.py was {}, is {}".format(*digests)
    go(code=2, MODEL_FILE=model_file)
    assert f"is of another run: {said}: change that back" in capsys.readouterr().err
    forced = go(MODEL_FILE=model_file, RESUME_FORCE=1)
    assert re.search(rf"^resumed: step:6 from .*; {said}$", forced.log, re.MULTILINE)


# Its artifact


def test_it_is_scored_and_sampled_by_the_file_it_names_and_by_the_one_it_is_given(whole, bare, call, tmp_path):
    """Next to the artifact or in its original place, records/models/."""
    alone, beside = (
        Path(shutil.copy(whole.path / "final_model.int8.ptz", tmp_path)),
        whole.path / "final_model.int8.ptz",
    )
    before, texts = models.tree(tmp_path), set()
    for artifact, file in ((beside, ""), (alone, ""), (alone, TINY)):
        code, out, err = call(bare(MODE="eval", ARTIFACT=artifact, MODEL_FILE=file))
        assert code == 0 and exact_line(out) == exact_line(whole.log), err
        found = re.findall(r"^source:\S+tiny.py sha256:(\w+)$", out, re.MULTILINE)
        assert found == [whole.result["sources"]["tiny.py"]["sha256"]] and "assumed" not in out
        prompt = {"SAMPLE_PROMPT": "the king", "SAMPLE_TOKENS": 20}
        texts.add(call(bare(MODE="sample", ARTIFACT=artifact, MODEL_FILE=file, **prompt))[1])
    (text,) = texts
    assert text.startswith("the king") and len(text) > 12 and models.tree(tmp_path) == before


def named(whole, **source) -> bytes:
    """Its artifact, naming another file."""
    artifact = models.open_artifact(whole.path / "final_model.int8.ptz")
    assert artifact["source"] == {"file": "tiny.py", "sha256": hashlib.sha256(TINY.read_bytes()).hexdigest()}
    return models.seal(models.torch_bytes(artifact | {"source": artifact["source"] | source}))


BROKEN = "1 / 0\n"
BROKEN_SHA256 = hashlib.sha256(BROKEN.encode()).hexdigest()
NAMES = [
    ({"file": "nowhere.py"}, "nowhere.py, which is neither"),
    ({"file": "/etc/hostname"}, "neither next to it"),
    ({"file": "elsewhere/hidden.py"}, "neither next to it"),
    ({"file": "../hidden.py"}, "neither next to it"),
    ({"file": ""}, "artifact.ptz"),
    ({"file": "broken.py", "sha256": BROKEN_SHA256}, "cannot be loaded: ZeroDivisionError"),
    ({"file": "broken.py"}, "broken.py has sha256 "),
    ({"sha256": "0" * 64}, "tiny.py has sha256 "),
    ({"sha256": 7}, "tiny.py has sha256 "),
]


@pytest.mark.parametrize("source, said", NAMES, ids=str)
def test_an_artifact_that_names_no_model_is_refused(whole, tmp_path, source, said):
    """Only files next to it and in known folders are candidates, since a model file is a program that is executed."""
    evaluate = train_gpt.tool("artifact")
    place = tmp_path / "place"
    (place / "elsewhere").mkdir(parents=True)
    (place / "broken.py").write_text(BROKEN)
    for hidden in (place / "elsewhere" / "hidden.py", tmp_path / "hidden.py"):
        hidden.write_text("raise SystemExit('this must not run')\n")
    with pytest.raises(UserError, match=said) as caught:
        evaluate.read_model(named(whole, **source), place / "artifact.ptz")
    assert "\n" not in str(caught.value)


def test_of_two_files_of_its_name_the_one_with_its_hash_is_taken(whole, tmp_path):
    evaluate = train_gpt.tool("artifact")
    (tmp_path / "tiny.py").write_text(TINY.read_text() + "# another one\n")
    digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (TINY, tmp_path / "tiny.py")}
    for path, digest in digests.items():
        _, _, found = evaluate.read_model(named(whole, sha256=digest), tmp_path / "artifact.ptz")
        assert Path(sys.modules[found.__module__].__file__) == path


# MODEL_FILE, the only entry point

WHERE = """
import inspect, sys
import train_gpt

for text in sys.argv[1:]:
    print(inspect.getfile(train_gpt.Config.load([], {"MODEL_FILE": text}).model_class()))
"""


def test_a_model_file_is_found_from_here_from_the_script_and_by_its_name(place, tmp_path):
    """The first place that has it counts."""
    cwd = tmp_path / "cwd"
    for folder in (cwd / "mine", place / "mine"):
        folder.mkdir(parents=True)
    for name in ("mine/m.py", "m.py", "n.py"):  # each place that would be searched later has another file
        (place / name).write_text("1 / 0\n")
    for path in (cwd / "mine" / "m.py", place / "mine" / "n.py", place / "o.py"):
        shutil.copy(TINY, path)
    (tmp_path / "where.py").write_text(WHERE)
    texts = {"mine/m.py": cwd, str(cwd / "mine" / "m.py"): cwd, "mine/n.py": place}
    texts |= {"gone/o.py": place, "o.py": place, "/nowhere/o.py": place}
    out, _, _ = process({"PYTHONPATH": str(place)}, cwd, script=tmp_path / "where.py", args=texts)
    files = [Path(line) for line in out.split()]
    names = {"m.py": "mine/m.py", "n.py": "mine/n.py", "o.py": "o.py"}
    assert files == [folder / names[Path(text).name] for text, folder in texts.items()]


NONE = "defines no class Config(train_gpt.Config)"
NO_MODELS = [
    ("x = 1\n", "x.py", f"x.py {NONE}"),
    ("from train_gpt import Config\n", "x.py", f"x.py {NONE}"),
    ("Config = 7\n", "x.py", f"x.py {NONE}"),
    ("class Config:\n    pass\n", "x.py", f"x.py {NONE}"),
    ("import train_gpt\nclass Mine(train_gpt.Config):\n    pass\n", "x.py", NONE),
    ("1 / 0\n", "x.py", "x.py cannot be loaded: ZeroDivisionError('division by zero'): correct it"),
    ("def f(:\n", "x.py", "x.py cannot be loaded: SyntaxError("),
    ("import not_there_at_all\n", "x.py", "x.py cannot be loaded: ModuleNotFoundError("),
    ("import train_gpt\ntrain_gpt.require(False, 'not on Mondays: wait')\n", "x.py", "error: not on Mondays: wait"),
    ("", "y.py", "MODEL_FILE=y.py: no such file here or in "),
    ("", ".", "MODEL_FILE=.: no such file here or in "),
]


@pytest.mark.parametrize("text, file, said", NO_MODELS)
def test_a_model_file_that_is_none_is_one_line(tmp_path, bare, call, text, file, said):
    (tmp_path / "x.py").write_text(text)
    code, _, err = call({"MODEL_FILE": file})
    assert code == 2 and err.count("\n") == 1 and said in err


@pytest.mark.parametrize("options", [[], ["-P"]], ids=str)
def test_what_it_imports_as_train_gpt_is_the_script_that_runs(corpus, tmp_path, options):
    """Regardless of modules of that name in the working directory, on the module path or next to the model file."""
    for folder in ("cwd", "models", "modules"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train_gpt.py").write_text("1 / 0\n")
    (tmp_path / "cwd" / "check").mkdir()
    knobs = {"MODEL_FILE": shutil.copy(TINY, tmp_path / "models"), "PYTHONPATH": tmp_path / "modules", "ITERATIONS": 1}
    values = models.tiny_settings(corpus, LOG_DIR=tmp_path / "logs", **STEPS | knobs)
    _, _, made = process(values, tmp_path / "cwd", options=options)
    assert made.result["sources"].keys() == {"train_gpt.py", "tiny.py"}


def test_what_it_imports_from_its_own_folder_is_a_source_too(place, corpus, tmp_path):
    """Its folder is searched first; its imports are hashed, copied and counted, and the copy runs by itself."""
    shutil.rmtree(place / "tools")
    model_file = place / "own" / "tiny.py"
    model_file.parent.mkdir()
    text = TINY.read_text().replace("import Tensor, nn\n", "import Tensor\n")
    model_file.write_text(text.replace("import train_gpt\n", "import train_gpt\nfrom helper import nn\n", 1))
    (model_file.parent / "helper.py").write_text("import deeper\n\nnn = deeper.nn\n")
    (model_file.parent / "deeper.py").write_text("from torch import nn\n")
    (model_file.parent / "stranger.py").write_text("not imported\n")
    for decoy in (place / "helper.py", tmp_path / "helper.py"):  # next to the script, and on the module path
        decoy.write_text("1 / 0\n")
    knobs = STEPS | {"LOG_DIR": tmp_path / "logs", "ITERATIONS": 2, "MODEL_FILE": "own/tiny.py", "PYTHONPATH": tmp_path}
    _, _, made = process(models.tiny_settings(corpus, **knobs), tmp_path, script=place / "train_gpt.py")
    paths = [place / "train_gpt.py", *(model_file.with_name(f"{name}.py") for name in ("tiny", "helper", "deeper"))]
    contents = {path.name: path.read_bytes() for path in paths}
    assert {name: facts["sha256"] for name, facts in made.result["sources"].items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in contents.items()
    }
    assert made.result["bytes_code"] == sum(map(len, contents.values()))
    kept = shutil.copytree(made.path, tmp_path / "kept")
    shutil.rmtree(place)
    values = {"RUN_ID": "again", "LOG_DIR": str(tmp_path / "logs"), "DEVICE": "cpu"}
    _, _, again = process(values, tmp_path, script=kept / "train_gpt.py", args=[kept / "config.env"])
    assert same(again, made) and again.result["sources"] == made.result["sources"]


@pytest.mark.parametrize("packaged", [True, False], ids=["package", "namespace"])
def test_what_it_imports_from_a_folder_below_its_own_is_refused(go, tmp_path, monkeypatch, call, corpus, packaged):
    """A run folder is flat, so such a file would be neither copied nor counted. A folder of libraries is allowed."""
    own, package = tmp_path / "own", f"package{packaged}"
    for folder in (package, ".venv"):
        (own / folder).mkdir(parents=True)
    (own / package / "big.py").write_text("from torch import nn\n")
    (own / ".venv" / f"library_of_{package}.py").write_text("")
    if packaged:
        (own / package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(own / ".venv")
    (own / "good.py").write_text(f"import library_of_{package}\n" + TINY.read_text())
    (own / "bad.py").write_text(f"import {package}.big\n" + TINY.read_text())
    assert go(MODEL_FILE=own / "good.py", ITERATIONS=1).result["sources"].keys() == {"train_gpt.py", "good.py"}
    values = {"MODEL_FILE": own / "bad.py", "LOG_DIR": tmp_path / "logs", "RUN_ID": "refused"}
    code, _, err = call(models.tiny_settings(corpus, **STEPS | values))
    assert code == 2 and "big.py" in err and "put it next to it" in err and not (tmp_path / "logs" / "refused").exists()


def test_check_and_help_know_it(corpus, call, monkeypatch):
    monkeypatch.setenv("DROPOU", "1")
    code, out, err = call(models.tiny_settings(corpus, **STEPS, MODE="check"))
    assert code == 0, out + err
    facts = json.loads(out.splitlines()[-1].removeprefix("check_json:"))
    assert facts["bytes_code"] == sum(path.stat().st_size for path in (SCRIPT, TINY)) and not facts["problems"]
    assert facts["model_params"] == 320 * 32 + 64 * 40 + 40 * 32 + 32
    assert "environment variable DROPOU is no knob: did you mean DROPOUT?" in out
    out, _, _ = process({"MODEL_FILE": str(TINY)}, Path(), args=["--help"])
    assert "\nHIDDEN=48  channels of the MLP\n" in out and "\nSEED=1337 " in out


def test_its_knobs_have_the_errors_of_all_knobs(tmp_path):
    (tmp_path / "x.env").write_text("DROPUOT=0.1\n")
    for values, args, said in (
        ({"DROPOUT": "1"}, [], "DROPOUT=1.0 is too large"),
        ({"HIDDEN": "x"}, [], "HIDDEN='x'"),
        ({}, [str(tmp_path / "x.env")], "DROPUOT is not a knob: did you mean DROPOUT?"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            Config.load(args, values | {"MODEL_FILE": str(TINY)})


def test_a_model_file_is_loaded_once_and_a_mistake_is_not_kept(tmp_path):
    shutil.copy(TINY, tmp_path / "once.py")
    found = train_gpt.load_model_file(str(tmp_path / "once.py"))
    assert found is train_gpt.load_model_file(str(tmp_path / "once.py")) and sys.path[0] == str(tmp_path)
    assert issubclass(found, Config) and sys.modules[found.__module__].train_gpt is train_gpt
    (tmp_path / "bad.py").write_text("import train_gpt\n1 / 0\n")
    for _ in range(2):
        with pytest.raises(UserError, match="bad.py cannot be loaded: ZeroDivisionError"):
            train_gpt.load_model_file(str(tmp_path / "bad.py"))
    (tmp_path / "bad.py").write_text("import train_gpt\nclass Config(train_gpt.Config):\n    pass\n")
    assert issubclass(train_gpt.load_model_file(str(tmp_path / "bad.py")), Config), "corrected"


def test_a_package_that_is_called_like_a_tool_is_no_source(make_config, monkeypatch, tmp_path):
    """Any library may import such a package."""
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setitem(sys.modules, "vocabularies", SimpleNamespace(__file__=str(tmp_path / "__init__.py")))
    assert set(train_gpt.source_paths(make_config())) == {"train_gpt.py"}
    train_gpt.tool("vocabularies")
    assert set(train_gpt.source_paths(make_config())) == {"train_gpt.py", "vocabularies.py"}


# The table of parameters


def config_of(model, config: Config, **more):
    """The same configuration with another model."""

    class Other(Config):
        @classmethod
        def model_class(cls):
            return model

    return Other(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Config)} | more)


class Late(GPT):
    """Adds parameters after all others exist."""

    PARAMETERS = GPT.PARAMETERS | {
        "side": ParameterRule("qk_gain_init", "scalar", fp32=True),
        "late.extra": ParameterRule(train_gpt.uniform_init, "matrix"),
    }

    def __init__(self, config, *args):
        super().__init__(config, *args)
        self.side = nn.Parameter(torch.full((config.model_dim,), math.nan))
        self.late = nn.ModuleDict({"extra": Linear(config.model_dim, config.model_dim, bias=False)})
        with torch.no_grad():
            self.late["extra"].weight.fill_(math.nan)

    def features(self, tokens_BT):
        x_BTD = super().features(tokens_BT)
        return x_BTD + self.late["extra"](x_BTD * self.side.to(x_BTD.dtype))


class LateWithoutRule(Late):
    PARAMETERS = GPT.PARAMETERS | {"side": ParameterRule(1.0, "scalar")}


def test_a_parameter_without_a_rule_raises_its_name(make_config, runtime):
    config = config_of(LateWithoutRule, make_config())
    said = r"LateWithoutRule.PARAMETERS has no rule late\.extra for late\.extra\.weight: add one"
    model = LateWithoutRule(config)  # not yet initialized
    for use in (
        lambda: train_gpt.build_model(config, runtime),
        lambda: model.optimizers(config, runtime),
        lambda: Coder(config).quantize({"late.extra.weight": torch.zeros(2, 2)}),
    ):
        with pytest.raises(UserError, match=said):
            use()


def test_a_parameter_that_a_subclass_adds_is_initialized_optimized_and_exported(make_config, runtime, monkeypatch):
    """Regression: weights were initialized in GPT's constructor, before those of its subclass existed."""
    monkeypatch.setattr(train_gpt, "INT8_MIN_NUMEL", 1000)
    config = config_of(Late, make_config(QK_GAIN_INIT=2.5))
    model, _, _ = train_gpt.build_model(config, runtime)
    plain, _, _ = train_gpt.build_model(make_config(QK_GAIN_INIT=2.5), runtime)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(p, parameters[name]) for name, p in plain.named_parameters()), "the draws stay"
    extra = parameters["late.extra.weight"]
    assert (model.side == 2.5).all() and extra.abs().max() <= 32**-0.5
    assert extra.std().item() == pytest.approx(32**-0.5 / 3**0.5, rel=0.1)
    groups = models.parameter_groups(model, config, runtime)
    assert any(p is extra for p in groups["matrix"]) and any(p is model.side for p in groups["scalar"])
    coder = Coder(config)
    artifact, back = coder.quantize(model.state_dict()), coder.decode(coder.encode(model.state_dict(), 0)[0])
    assert "late.extra.weight" in artifact["quantized"] and artifact["passthrough"]["side"].dtype == torch.float32
    assert torch.equal(back["side"], model.side) and back.keys() == model.state_dict().keys()
    assert (back["late.extra.weight"] - extra).abs().max() < 0.01 * extra.abs().max()


# An extra loss


class Deep(nn.Module):
    """A nested submodule that sets an extra loss."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        self.extra_loss = self.factor * x.float().square().mean()
        return x


class Regularized(GPT):
    def __init__(self, config, *args):
        super().__init__(config, *args)
        self.parts = nn.ModuleList([nn.Sequential(Deep(0.5)), nn.Sequential(nn.Identity(), Deep(0.25))])

    def features(self, tokens_BT):
        x_BTD = super().features(tokens_BT)
        self.extra_loss = x_BTD.float().mean()
        return self.parts[1](2 * self.parts[0](x_BTD))


def left(model) -> list:
    return [module.extra_loss for module in model.modules() if getattr(module, "extra_loss", None) is not None]


def test_extra_losses_of_nested_modules_are_summed_and_reset(make_config):
    config = make_config()
    model, tokens = oracle.scatter(new_model(config, of=Regularized)), oracle.random_tokens(config, 2, 33)
    plain, x, y = new_model(config), tokens[:, :-1], tokens[:, 1:]
    plain.load_state_dict(model.state_dict())
    features = plain.features(x)
    expected = features.mean() + 0.5 * features.square().mean() + 0.25 * (2 * features).square().mean()
    losses = plain.losses(plain.logits(2 * features), y)
    (losses.mean() + expected).backward()
    gradients = [p.grad for p in plain.parameters()]
    compiled, graphs = oracle.graphs_of(model)
    for forward in (model, compiled):
        for _ in range(2):  # the first call leaves nothing for the second
            found = oracle.losses_and_gradients(forward, model, tokens)
            torch.testing.assert_close(found, (losses, [expected], gradients), rtol=1e-5, atol=1e-6)
            assert left(model) == []
        model.eval()
        assert torch.is_tensor(forward(x, y)) and torch.is_tensor(forward(x)), "it is no part of a score"
        model.train()
    torch._dynamo.reset()


def test_an_extra_loss_is_minimized_and_not_logged(make_config, runtime):
    """It is averaged over the micro-steps, like the losses."""
    one = models.build_trainer(config_of(Regularized, make_config(GRAD_ACCUM_STEPS=4)), runtime)
    oracle.scatter(one.model)
    one.optimizers = []
    tokens = torch.from_numpy(one.loader.stream.read(0, 257).astype(np.int64))
    by_hand = copy.deepcopy(one.model)
    losses, extra = by_hand(tokens[:-1].view(8, 32), tokens[1:].view(8, 32))
    (losses.mean() + extra).backward()
    metrics = one.step(1.0, 0.9)
    assert set(metrics) == {"train_loss", "lr_scale"}
    assert float(metrics["train_loss"]) == pytest.approx(float(losses.detach().mean()), rel=1e-5)
    for (name, p), q in zip(by_hand.named_parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m)


# The vocabulary


def test_a_padded_vocabulary_weighs_nothing_and_is_never_said(whole, go, corpus, bare, call):
    size = int((corpus / "vocab_size").read_text())
    padded = go(VOCAB_SIZE=384)
    assert size < 384 and padded.result["scored_bytes"] == whole.result["scored_bytes"]
    assert padded.result["model_params"] == whole.result["model_params"] + (384 - size) * 32
    artifact = padded.path / "final_model.int8.ptz"
    code, out, err = call(bare(MODE="sample", ARTIFACT=artifact, SAMPLE_PROMPT="the", SAMPLE_TOKENS=40))
    assert code == 0 and out.startswith("the"), err
    assert exact_line(call(bare(MODE="eval", ARTIFACT=artifact))[1]) == exact_line(padded.log)


def test_how_far_a_vocabulary_may_be_padded_is_the_configurations(corpus):
    size, path = int((corpus / "vocab_size").read_text()), str(corpus / "tok.model")
    of_tiny = train_gpt.load_model_file(str(TINY))
    exact = type("Exact", (of_tiny,), {"vocab_padding": 0})
    wide = type("Wide", (of_tiny,), {"vocab_padding": 1000})
    for config_class, most in ((exact, 0), (of_tiny, 127), (wide, 1000)):
        train_gpt.TokenBytes(path, size + most, config_class.vocab_padding)
        with pytest.raises(UserError, match=f"VOCAB_SIZE={size + most + 1}, but TOKENIZER_PATH={path} has {size} pie"):
            train_gpt.TokenBytes(path, size + most + 1, config_class.vocab_padding)
