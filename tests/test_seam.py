"""The seam: a model in a file of its own has all that the script's own model has. MODEL_FILE is the one way in; most
runs here are processes of the script with records/models/tiny.py."""

import copy
import dataclasses
import hashlib
import json
import math
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import models
import numpy as np
import pytest
import torch
from models import SCRIPT, exact_line, new_model, process, tree
from torch import nn

import train_gpt
from train_gpt import GPT, MLP, Attention, Block, Coder, Config, Linear, ParameterRule, RoPE, UserError

MODEL_FILE = SCRIPT.parent / "records" / "models" / "tiny.py"
STEPS = {
    "MODEL_FILE": MODEL_FILE,
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

# Runs the script until the middle of a step, where it is killed.
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
sys.exit(train_gpt.main())
"""


def settings(corpus, logs: Path, **overrides) -> dict[str, str]:
    return models.tiny_settings(corpus, **{"LOG_DIR": logs} | STEPS | overrides)


def run(environ: dict[str, str], cwd: Path, script=SCRIPT, code=0, **more) -> SimpleNamespace:
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


def killed(environ: dict[str, str], cwd: Path, at: int, script=SCRIPT):
    """The same process as `run` starts, but killed in that step."""
    driver = cwd / "killed.py"
    driver.write_text(KILLED.format(folder=str(script.parent), at=at))
    assert process(environ, cwd, script=driver).returncode == -signal.SIGKILL


def same(one, other) -> bool:
    """To the last digit, and bit for bit in the artifact."""
    return [one.result[name] for name in SAME] == [other.result[name] for name in SAME] and one.losses == other.losses


@pytest.fixture(autouse=True)
def imports_of_this_process(monkeypatch):
    """What a model file puts first on the module path is not there for the next test."""
    monkeypatch.setattr(sys, "path", list(sys.path))


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
    step = r"^step:12/12 train_loss:\S+ train_time:\d+ms step_avg:\S+ms tok/s:\d+ (?:mfu:\S+ )?scale_mean:(\d\.\d{4})$"
    (logged,) = re.findall(step, whole.out, re.MULTILINE)
    means = [m["scale_mean"] for m in whole.metrics if "train_loss" in m]
    assert len(set(means)) == 12 and f"{means[-1]:.4f}" == logged, "the model's own metric, in every step"


def test_all_its_sources_are_in_the_folder_in_the_result_and_in_the_code_bytes(whole):
    sources = {"train_gpt.py": SCRIPT.read_bytes(), "tiny.py": MODEL_FILE.read_bytes()}
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


@pytest.mark.parametrize("kept", ["the run folder", "a record"])
@pytest.mark.parametrize("given, where", [("absolute", "elsewhere"), ("relative", "elsewhere"), ("relative", "inside")])
def test_its_folder_runs_by_itself(whole, flat, corpus, tmp_path, given, where, kept):
    """Copied elsewhere, where nothing else is any more; without tools, which it says. With other results it would be no
    record of the run."""
    place = shutil.copytree(flat, tmp_path / "place", ignore=shutil.ignore_patterns("tools"))  # whose kernels it lacks
    named = place / "tiny.py" if given == "absolute" else "tiny.py"
    made = run(settings(corpus, tmp_path / "logs", MODEL_FILE=named), tmp_path, script=place / "train_gpt.py")
    assert f'MODEL_FILE="{named}"' in (made.path / "config.env").read_text()
    folder = tmp_path / "kept"
    if kept == "a record":
        folder.mkdir()
        for name in ("train_gpt.py", "tiny.py", "config.env", "train.log"):
            shutil.copy(made.path / name, folder)
        (folder / "README.md").write_text("A record.\n")
    else:
        shutil.copytree(made.path, folder)
    shutil.rmtree(place)
    cwd = folder if where == "inside" else tmp_path / "cwd"
    cwd.mkdir(exist_ok=True)
    environ = {"RUN_ID": "again", "LOG_DIR": str(tmp_path / "logs"), "DEVICE": "cpu"}
    again = run(environ, cwd, script=folder / "train_gpt.py", args=[folder / "config.env"])
    assert same(again, made)
    assert again.result["val_bpb"] == pytest.approx(whole.result["val_bpb"], rel=1e-4)
    assert "warning: tools/checkpoint.py is missing: " in again.out
    assert again.result["sources"] == made.result["sources"]


def test_after_a_kill_it_goes_on_bit_for_bit(whole, corpus, tmp_path):
    """With the random numbers of its dropout, and the state of an optimizer that is not the script's."""
    environ = settings(corpus, tmp_path / "logs", **EVERY_STEP)
    for at in (4, 9):
        killed(environ, tmp_path, at)
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


COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")


@pytest.mark.parametrize("compiled", [0, pytest.param(1, marks=COMPILER)])
def test_two_ranks_train_it_as_one_process(corpus, tmp_path, compiled):
    """With its extra loss, which goes through DDP and the compiler beside the others."""
    environ = settings(corpus, tmp_path / "logs", DROPOUT=0, ITERATIONS=6)
    one = run(environ, tmp_path)
    environ |= {"RUN_ID": "two", "TMPDIR": str(tmp_path), "COMPILE": str(compiled)}
    two = run(environ, tmp_path, ranks=2)
    assert list(two.losses.values()) == pytest.approx(list(one.losses.values()), abs=1e-4)
    assert two.result["val_bpb"] == pytest.approx(one.result["val_bpb"], abs=1e-4)
    assert two.result["world_size"] == 2 and two.result["sources"] == one.result["sources"]
    for name in ("scale_mean",):
        values = [[m[name] for m in made.metrics if name in m] for made in (one, two)]
        assert len(values[0]) == 6 and values[1] == pytest.approx(values[0], abs=1e-4)


# Its artifact


def test_it_is_scored_to_the_same_digits_by_the_file_it_names_and_by_the_one_it_is_given(whole, corpus, tmp_path):
    """Beside the artifact or where it was: in records/models/."""
    alone = Path(shutil.copy(whole.path / "final_model.int8.ptz", tmp_path))
    expected = exact_line((whole.path / "train.log").read_text())
    before = tree(tmp_path)
    for artifact, given in ((whole.path / "final_model.int8.ptz", ""), (alone, ""), (alone, MODEL_FILE)):
        environ = models.machine_settings(corpus, MODE="eval", ARTIFACT=artifact, MODEL_FILE=given)
        done = process(environ, tmp_path)
        assert done.returncode == 0, done.stderr.decode()
        assert exact_line(done.stdout.decode()) == expected
        assert re.search(
            rf"^source:\S+tiny.py sha256:{whole.result['sources']['tiny.py']['sha256']}$",
            done.stdout.decode(),
            re.MULTILINE,
        )
        assert b"assumed" not in done.stdout
    assert tree(tmp_path) == before


def test_it_samples_the_same_by_either_file(whole, corpus, tmp_path):
    texts = set()
    for given in ("", MODEL_FILE):
        environ = models.machine_settings(
            corpus,
            MODE="sample",
            ARTIFACT=whole.path / "final_model.int8.ptz",
            SAMPLE_PROMPT="the king",
            SAMPLE_TOKENS=20,
            MODEL_FILE=given,
        )
        done = process(environ, tmp_path)
        assert done.returncode == 0, done.stderr.decode()
        texts.add(done.stdout)
    (text,) = texts
    assert text.startswith(b"the king") and len(text) > 12


def named(whole, **source) -> bytes:
    """Its artifact, which names another file."""
    artifact = models.open_artifact(whole.path / "final_model.int8.ptz")
    assert artifact["source"] == {"file": "tiny.py", "sha256": hashlib.sha256(MODEL_FILE.read_bytes()).hexdigest()}
    return models.seal(models.torch_bytes(artifact | {"source": artifact["source"] | source}))


BROKEN = "1 / 0\n"
BROKEN_SHA256 = hashlib.sha256(BROKEN.encode()).hexdigest()


@pytest.mark.parametrize(
    "source, said",
    [
        ({"file": "nowhere.py"}, "nowhere.py, which is neither"),
        ({"file": "/etc/hostname"}, "neither next to it"),
        ({"file": "elsewhere/hidden.py"}, "neither next to it"),
        ({"file": "../hidden.py"}, "neither next to it"),
        ({"file": ""}, "artifact.ptz"),
        ({"file": "broken.py", "sha256": BROKEN_SHA256}, "cannot be loaded: ZeroDivisionError"),
        ({"file": "broken.py"}, "broken.py has sha256 "),
        ({"sha256": "0" * 64}, "tiny.py has sha256 "),
        ({"sha256": 7}, "tiny.py has sha256 "),
    ],
    ids=str,
)
def test_an_artifact_that_names_no_model_is_refused(whole, tmp_path, source, said):
    """Only files beside it and in known folders are candidates, since a model file is a program that is run."""
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
    (tmp_path / "tiny.py").write_text(MODEL_FILE.read_text() + "# another one\n")
    digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (MODEL_FILE, tmp_path / "tiny.py")}
    for path, digest in digests.items():
        _, _, found = evaluate.read_model(named(whole, sha256=digest), tmp_path / "artifact.ptz")
        assert Path(sys.modules[found.__module__].__file__) == path


def test_its_tensors_must_be_those_of_its_configuration(whole, corpus, tmp_path):
    artifact = models.open_artifact(whole.path / "final_model.int8.ptz")
    artifact["config"]["hidden"] += 1
    (tmp_path / "odd.ptz").write_bytes(models.seal(models.torch_bytes(artifact)))
    done = process(models.machine_settings(corpus, MODE="eval", ARTIFACT=tmp_path / "odd.ptz"), tmp_path)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"disagree on fc.weight" in done.stderr


# MODEL_FILE, the one way in


def test_a_model_file_is_found_from_here_from_the_script_and_by_its_name(flat, corpus, tmp_path):
    """In a variable or in FILE.env; the first place where it is counts."""
    place = shutil.copytree(flat, tmp_path / "place")
    script, logs = place / "train_gpt.py", tmp_path / "logs"
    cwd = tmp_path / "cwd"
    for folder in (cwd / "mine", place / "mine"):
        folder.mkdir(parents=True)
    cases = {  # {name of the file: (where it is, how it is called)}
        "m.py": (cwd / "mine", ["mine/m.py", str(cwd / "mine" / "m.py")]),
        "n.py": (place / "mine", ["mine/n.py"]),
        "o.py": (place, ["gone/o.py", "o.py", "/nowhere/o.py"]),
    }
    # Where it would be looked for later there is another.
    for decoy in ("mine/m.py", "m.py", "n.py"):
        (place / decoy).write_text("1 / 0\n")
    losses = []
    for name, (folder, given) in cases.items():
        shutil.copy(MODEL_FILE, folder / name)
        for number, text in enumerate(given):
            environ = settings(corpus, logs, ITERATIONS=2, MODEL_FILE=text, RUN_ID=f"{name}{number}")
            args = []
            if number:
                (cwd / "x.env").write_text(f"MODEL_FILE={environ.pop('MODEL_FILE')}\n")
                args = ["x.env"]
            made = run(environ, cwd, script=script, args=args)
            assert set(made.result["sources"]) == {"train_gpt.py", name}
            losses.append(made.losses)
    assert all(found == losses[0] for found in losses) and len(losses) == 6


@pytest.mark.parametrize(
    "text, file, said",
    [
        ("x = 1\n", "x.py", "x.py defines no class Config(train_gpt.Config)"),
        ("from train_gpt import Config\n", "x.py", "x.py defines no class Config(train_gpt.Config)"),
        ("Config = 7\n", "x.py", "x.py defines no class Config(train_gpt.Config)"),
        ("class Config:\n    pass\n", "x.py", "x.py defines no class Config(train_gpt.Config)"),
        ("import train_gpt\nclass Mine(train_gpt.Config):\n    pass\n", "x.py", "defines no class Config(train_gpt"),
        ("1 / 0\n", "x.py", "x.py cannot be loaded: ZeroDivisionError('division by zero'): correct it"),
        ("def f(:\n", "x.py", "x.py cannot be loaded: SyntaxError("),
        ("import not_there_at_all\n", "x.py", "x.py cannot be loaded: ModuleNotFoundError("),
        ("import train_gpt\ntrain_gpt.require(False, 'not on Mondays: wait')\n", "x.py", "error: not on Mondays: wait"),
        ("", "y.py", "MODEL_FILE=y.py: no such file here or in "),
        ("", ".", "MODEL_FILE=.: no such file here or in "),
    ],
)
def test_a_model_file_that_is_none_is_one_line(tmp_path, text, file, said):
    (tmp_path / "x.py").write_text(text)
    done = process({"MODEL_FILE": file}, tmp_path)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and said in done.stderr.decode(), done.stderr


def test_a_flat_copy_that_is_changed_is_refused_at_a_resume(flat, corpus, tmp_path):
    place = shutil.copytree(flat, tmp_path / "copy")
    script, model_file = place / "train_gpt.py", place / "tiny.py"
    environ = settings(corpus, tmp_path / "logs", MODEL_FILE="tiny.py", **EVERY_STEP)
    killed(environ, tmp_path, 6, script)
    digests = [hashlib.sha256(model_file.read_bytes()).hexdigest()[:16]]
    model_file.write_text(model_file.read_text() + "# one more line\n")
    digests.append(hashlib.sha256(model_file.read_bytes()).hexdigest()[:16])
    refused = run(environ, tmp_path, script=script, code=2)
    said = "tiny.py was {}, is {}".format(*digests)
    assert f"is of another run: {said}: change that back" in refused.err and refused.err.count("\n") == 1
    forced = run(environ | {"RESUME_FORCE": "1"}, tmp_path, script=script)
    assert re.search(rf"^resumed: step:\d from .*; {said}$", forced.out, re.MULTILINE)


@pytest.mark.parametrize("options, more", [([], {}), (["-P"], {}), ([], {"PYTHONSAFEPATH": "1"})], ids=str)
def test_what_it_imports_as_train_gpt_is_the_script_that_runs(whole, corpus, tmp_path, options, more):
    """Whatever has that name in the working directory, on the module path or beside the model file."""
    for folder in ("cwd", "models", "modules"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train_gpt.py").write_text("1 / 0\n")
    (tmp_path / "cwd" / "check").mkdir()
    model_file = shutil.copy(MODEL_FILE, tmp_path / "models")
    environ = settings(corpus, tmp_path / "logs", MODEL_FILE=model_file, PYTHONPATH=tmp_path / "modules")
    made = run(environ, tmp_path / "cwd", options=options, **more)
    assert same(made, whole) and set(made.result["sources"]) == {"train_gpt.py", "tiny.py"}
    assert made.result["sources"] == whole.result["sources"]


def test_what_it_imports_from_its_own_folder_is_a_source_too(flat, corpus, tmp_path):
    """Its folder is the first place; what is imported is hashed, copied and counted, and the copy runs by itself."""
    place = shutil.copytree(flat, tmp_path / "copy", ignore=shutil.ignore_patterns("tools"))
    model_file = place / "own" / "tiny.py"
    model_file.parent.mkdir()
    text = MODEL_FILE.read_text().replace("from torch import Tensor, nn\n", "from torch import Tensor\n")
    model_file.write_text(
        text.replace("import train_gpt\n", "import helper\nfrom helper import nn\nimport train_gpt\n")
    )
    (model_file.parent / "helper.py").write_text("import deeper\n\nnn = deeper.nn\n")
    (model_file.parent / "deeper.py").write_text("from torch import nn\n")
    (model_file.parent / "stranger.py").write_text("not imported\n")
    for decoy in (place / "helper.py", tmp_path / "helper.py"):  # beside the script, and on the module path
        decoy.write_text("1 / 0\n")
    environ = settings(corpus, tmp_path / "logs", ITERATIONS=2, MODEL_FILE="own/tiny.py", PYTHONPATH=tmp_path)
    made = run(environ, tmp_path, script=place / "train_gpt.py")
    assert set(made.result["sources"]) == {"train_gpt.py", "tiny.py", "helper.py", "deeper.py"}
    for name, facts in made.result["sources"].items():
        path = place / name if name == "train_gpt.py" else model_file.parent / name
        assert (made.path / name).read_bytes() == path.read_bytes()
        assert facts == {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert made.result["bytes_code"] == sum(facts["bytes"] for facts in made.result["sources"].values())
    kept = shutil.copytree(made.path, tmp_path / "kept")
    shutil.rmtree(place)
    environ = {"RUN_ID": "again", "LOG_DIR": str(tmp_path / "logs"), "DEVICE": "cpu"}
    again = run(environ, tmp_path, script=kept / "train_gpt.py", args=[kept / "config.env"])
    assert same(again, made) and again.result["sources"] == made.result["sources"]


@pytest.mark.parametrize("packaged", [True, False], ids=["package", "namespace"])
def test_what_it_imports_from_a_folder_below_its_own_is_refused(corpus, tmp_path, packaged):
    """A run folder is flat: such a file would be neither copied nor counted. A folder of libraries may lie there."""
    model_file = tmp_path / "own" / "tiny.py"
    for folder in ("package", ".venv"):
        (model_file.parent / folder).mkdir(parents=True)
    (model_file.parent / "package" / "big.py").write_text("from torch import nn\n")
    (model_file.parent / ".venv" / "library.py").write_text("")
    if packaged:
        (model_file.parent / "package" / "__init__.py").write_text("")
    text = MODEL_FILE.read_text().replace("import train_gpt\n", "import library\nimport train_gpt\n", 1)
    model_file.write_text(text)
    environ = settings(corpus, tmp_path / "logs", ITERATIONS=1, MODEL_FILE=model_file)
    environ |= {"PYTHONPATH": str(model_file.parent / ".venv")}
    assert set(run(environ, tmp_path).result["sources"]) == {"train_gpt.py", "tiny.py"}
    model_file.write_text(text.replace("import library\n", "import package.big\n"))
    done = models.process(environ | {"RUN_ID": "refused"}, tmp_path)
    assert done.returncode == 2 and not (tmp_path / "logs" / "refused").exists()
    assert "big.py" in done.stderr.decode() and "put it next to it" in done.stderr.decode()


def test_check_and_help_know_it(corpus, tmp_path):
    environ = settings(corpus, tmp_path / "logs", MODE="check", DROPOU=1)
    done = process(environ, tmp_path)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    out = done.stdout.decode()
    facts = json.loads(out.splitlines()[-1].removeprefix("check_json:"))
    assert facts["bytes_code"] == sum(path.stat().st_size for path in (SCRIPT, MODEL_FILE))
    assert facts["model_params"] == 320 * 32 + 64 * 40 + 40 * 32 + 32 and not facts["problems"]
    assert "environment variable DROPOU is no knob: did you mean DROPOUT?" in out
    done = process({"MODEL_FILE": str(MODEL_FILE)}, tmp_path, args=["--help"])
    assert b"\nHIDDEN=48  channels of the MLP\n" in done.stdout and b"\nSEED=1337 " in done.stdout


def test_its_knobs_have_the_errors_of_all_knobs(corpus, tmp_path):
    (tmp_path / "x.env").write_text("DROPUOT=0.1\n")
    for environ, args, said in (
        ({"DROPOUT": "1"}, [], "DROPOUT=1.0 is too large"),
        ({"HIDDEN": "x"}, [], "HIDDEN='x'"),
        ({}, ["x.env"], "DROPUOT is not a knob: did you mean DROPOUT?"),
    ):
        done = process(environ | {"MODEL_FILE": str(MODEL_FILE)}, tmp_path, args=args)
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and said in done.stderr.decode()


def test_a_model_file_is_loaded_once(tmp_path):
    shutil.copy(MODEL_FILE, tmp_path / "once.py")
    found = train_gpt.load_model_file(str(tmp_path / "once.py"))
    assert found is train_gpt.load_model_file(str(tmp_path / "once.py")) and sys.path[0] == str(tmp_path)
    assert issubclass(found, Config) and sys.modules[found.__module__].train_gpt is train_gpt


def test_an_error_of_a_model_file_is_the_same_the_second_time(tmp_path):
    """What is half loaded is not kept."""
    (tmp_path / "bad.py").write_text("import train_gpt\n1 / 0\n")
    for _ in range(2):
        with pytest.raises(UserError, match="bad.py cannot be loaded: ZeroDivisionError"):
            train_gpt.load_model_file(str(tmp_path / "bad.py"))
    (tmp_path / "bad.py").write_text("import train_gpt\nclass Config(train_gpt.Config):\n    pass\n")
    assert issubclass(train_gpt.load_model_file(str(tmp_path / "bad.py")), Config), "corrected"


def test_a_package_that_is_called_like_a_tool_is_no_source(make_config, monkeypatch, tmp_path):
    """As HuggingFace's tokenizers, which any library may import."""
    (tmp_path / "__init__.py").write_text("")
    package = SimpleNamespace(__file__=str(tmp_path / "__init__.py"))
    monkeypatch.setitem(sys.modules, "tokenizers", package)
    assert set(train_gpt.source_paths(make_config())) == {"train_gpt.py"}
    train_gpt.tool("vocabularies")
    assert set(train_gpt.source_paths(make_config())) == {"train_gpt.py", "tokenizers.py"}


# The table of parameters, and the parts that a subclass replaces


def config_of(model, config: Config, **more):
    """The same configuration of another model."""

    class Other(Config):
        @classmethod
        def model_class(cls):
            return model

    return Other(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Config)} | more)


class GatedMLP(MLP):
    """As SwiGLU's, whose gate has a name that an attention might use for something else."""

    def __init__(self, config):
        super().__init__(config)
        self.gate = Linear(config.model_dim, self.fc.out_features, bias=False)

    def forward(self, x):
        return self.proj(nn.functional.silu(self.gate(x)) * self.fc(x))


class Ungated(GPT):
    mlp_class = GatedMLP


class Gated(Ungated):
    PARAMETERS = GPT.PARAMETERS | {"blocks.mlp.gate": ParameterRule(train_gpt.uniform_init, "matrix")}


class Late(GPT):
    """Adds parameters when all others are there."""

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
    """Regression: its name made it a gate of the attention, which begins as zeros and is trained by Adam."""
    config = make_config()
    said = r"Ungated.PARAMETERS has no rule blocks\.mlp\.gate for blocks\.0\.mlp\.gate\.weight: add one"
    with pytest.raises(UserError, match=said):
        train_gpt.build_model(config_of(Ungated, config), runtime)
    model = Ungated(config)  # not yet initialized
    for use in (
        lambda: model.init_weights(config),
        lambda: model.optimizers(config, runtime),
        lambda: Coder(config_of(Ungated, config)).quantize(model.state_dict()),
    ):
        with pytest.raises(UserError, match=said):
            use()


def test_with_a_rule_it_is_what_the_rule_says(make_config, runtime, monkeypatch):
    monkeypatch.setattr(train_gpt, "INT8_MIN_NUMEL", 1000)
    config = config_of(Gated, make_config())
    model, _, _ = train_gpt.build_model(config, runtime)
    gate = model.blocks[0].mlp.gate.weight
    assert gate.abs().max() <= 32**-0.5 and gate.std().item() == pytest.approx(32**-0.5 / 3**0.5, rel=0.1)
    adam, muon = model.optimizers(config, runtime)
    assert any(p is gate for p in muon.param_groups[0]["params"])
    coder = config.coder_class()(config)
    artifact = coder.quantize(model.state_dict())
    q, scale = coder.quantize_matrix("", gate.detach())
    assert torch.equal(artifact["quantized"]["blocks.0.mlp.gate.weight"], q)
    assert torch.equal(artifact["scales"]["blocks.0.mlp.gate.weight"], scale)


def test_a_parameter_that_a_subclass_adds_is_initialized_optimized_and_exported(make_config, runtime, monkeypatch):
    """Regression: weights were initialized in the constructor of GPT, before those of its subclass were there."""
    monkeypatch.setattr(train_gpt, "INT8_MIN_NUMEL", 1000)
    config = config_of(Late, make_config(QK_GAIN_INIT=2.5))
    model, _, _ = train_gpt.build_model(config, runtime)
    extra = model.late["extra"].weight
    assert (model.side == 2.5).all() and extra.isfinite().all() and 0 < extra.abs().max() <= 32**-0.5
    plain, _, _ = train_gpt.build_model(make_config(QK_GAIN_INIT=2.5), runtime)
    for name, p in plain.named_parameters():
        assert torch.equal(p, dict(model.named_parameters())[name]), f"the draws of {name} are as without them"
    adam, muon = model.optimizers(config, runtime)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.randint(config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
        for optimizer in (adam, muon):
            optimizer.step()
            optimizer.zero_grad()
    for name in ("side", "late.extra.weight"):
        assert not torch.equal(before[name], dict(model.named_parameters())[name]), name
    coder = Coder(config)
    artifact, back = coder.quantize(model.state_dict()), coder.decode(coder.encode(model.state_dict(), 0)[0])
    assert "late.extra.weight" in artifact["quantized"] and artifact["passthrough"]["side"].dtype == torch.float32
    assert torch.equal(back["side"], model.side) and back.keys() == model.state_dict().keys()
    assert (back["late.extra.weight"] - extra).abs().max() < 0.01 * extra.abs().max()
    with pytest.raises(UserError, match=r"LateWithoutRule.PARAMETERS has no rule late\.extra for late\.extra\.weight"):
        train_gpt.build_model(config_of(LateWithoutRule, make_config()), runtime)


class LearnedNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x):
        return train_gpt.rms_norm(x) * self.weight.to(x.dtype)


class LearnedPositions(RoPE):
    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Parameter(torch.empty(config.train_seq_len, config.model_dim))

    def embed(self, x_BTD):
        return x_BTD + self.table[: x_BTD.size(1)].to(x_BTD.dtype)

    def rotation(self, length, dtype):
        return lambda x_BTHd: x_BTHd


class Doubled(Attention):
    def forward(self, x_BTD, rotate):
        return 2 * super().forward(x_BTD, rotate)


class Parallel(Block):
    def forward(self, x_BTD, x0_BTD, rotate):
        u_BTD = self.attn_norm(x_BTD)
        return x_BTD + self.attn(u_BTD, rotate) + self.mlp(self.mlp_norm(x_BTD))


class Parts(GPT):
    block_class, attention_class, mlp_class = Parallel, Doubled, GatedMLP
    norm_class, positions_class = LearnedNorm, LearnedPositions
    PARAMETERS = GPT.PARAMETERS | {
        "blocks.mlp.gate": ParameterRule(train_gpt.uniform_init, "matrix"),
        "blocks.attn_norm": ParameterRule(1.0, "scalar", fp32=True),
        "blocks.mlp_norm": ParameterRule(1.0, "scalar", fp32=True),
        "norm": ParameterRule(1.0, "scalar", fp32=True),
        "positions.table": ParameterRule(train_gpt.embedding_init, "embed"),
    }


def test_parts_are_replaced_by_naming_their_classes(make_config, runtime):
    config = config_of(Parts, make_config())
    model, _, _ = train_gpt.build_model(config, runtime)
    assert type(model.positions) is LearnedPositions and type(model.norm) is LearnedNorm
    for block in model.blocks:
        kinds = [type(part) for part in (block, block.attn, block.mlp, block.attn_norm, block.mlp_norm)]
        assert kinds == [Parallel, Doubled, GatedMLP, LearnedNorm, LearnedNorm]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    tokens = torch.randint(config.vocab_size, (2, 33), generator=generator)
    model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    unused = ("attn_scale", "mlp_scale", "resid_mix")
    for name, p in model.named_parameters():
        if not name.endswith(unused):
            assert p.grad is not None and p.grad.abs().max() > 0, name
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % config.vocab_size
    with torch.no_grad():
        same_before = torch.equal(model(tokens[:, :32])[:, :20], model(changed[:, :32])[:, :20])
    assert same_before, "it is causal"


# An extra loss, and metrics


class Deep(nn.Module):
    """A part of a part, which leaves a loss."""

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


def scattered(config, **how):
    model = new_model(config, **how)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    tokens = torch.randint(config.vocab_size, (2, 33), generator=generator)
    return model, tokens[:, :-1], tokens[:, 1:]


def left(model) -> list:
    return [module.extra_loss for module in model.modules() if getattr(module, "extra_loss", None) is not None]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("compiled", [False, True])
def test_extra_losses_of_nested_modules_are_summed_and_reset(make_config, compiled):
    config = make_config()
    model, x, y = scattered(config, of=Regularized)
    plain = new_model(config)
    plain.load_state_dict(model.state_dict())
    forward = model
    if compiled:
        torch._dynamo.reset()
        forward = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    for _ in range(2):  # nothing of the first is left for the second
        features = plain.features(x)
        expected = features.mean() + 0.5 * features.square().mean() + 0.25 * (2 * features).square().mean()
        losses = plain.losses(plain.logits(2 * features), y)
        for p in (*model.parameters(), *plain.parameters()):
            p.grad = None
        (losses.mean() + expected).backward()
        found, extra = forward(x, y)
        assert extra.shape == () and left(model) == []
        torch.testing.assert_close(found, losses, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(extra, expected, rtol=1e-6, atol=1e-6)
        (found.mean() + extra).backward()
        for name, grad in gradients(plain).items():
            torch.testing.assert_close(gradients(model)[name], grad, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)
    model.eval()
    assert torch.is_tensor(forward(x, y)), "it is no part of a score"
    assert torch.is_tensor(forward(x)), "nor of logits"
    model.train()
    found, extra = forward(x, y)
    torch.testing.assert_close(extra, expected, rtol=1e-6, atol=1e-6)
    assert left(model) == []
    torch._dynamo.reset()


def test_without_an_extra_loss_the_losses_are_alone(make_config):
    model, x, y = scattered(make_config())
    assert torch.is_tensor(model(x, y)) and torch.is_tensor(model.eval()(x, y))


@pytest.mark.parametrize("micro_steps", [1, 4])
def test_an_extra_loss_is_minimized_and_not_logged(make_config, runtime, micro_steps):
    """It is a mean over the micro-steps, as the losses are."""
    one = models.build_trainer(config_of(Regularized, make_config(GRAD_ACCUM_STEPS=micro_steps)), runtime)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in one.model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    one.optimizers = []
    tokens = torch.from_numpy(one.loader.stream.read(0, 257).astype(np.int64))
    by_hand = copy.deepcopy(one.model)
    losses, extra = by_hand(tokens[:-1].view(8, 32), tokens[1:].view(8, 32))
    (losses.mean() + extra).backward()
    metrics = one.step(1.0, 0.9)
    assert set(metrics) == {"train_loss", "lr_scale"}
    assert float(metrics["train_loss"]) == pytest.approx(float(losses.detach().mean()), rel=1e-5)
    for name, grad in gradients(by_hand).items():
        torch.testing.assert_close(gradients(one.model)[name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m)


METRICS = """
import torch

import train_gpt


class Config(train_gpt.Config):
    @classmethod
    def model_class(cls):
        return Measured


class Measured(train_gpt.GPT):
    calls = 0

    def metrics(self):
        self.calls += 1
        return {"host": self.calls / 4, "device": self.blocks[0].attn.q_gain.detach().mean()}
"""


def test_metrics_of_a_whole_run(corpus, tmp_path, capsys):
    """Numbers known on the host and scalars on the device, in every line of metrics.jsonl and of the log."""
    (tmp_path / "measured.py").write_text(METRICS)
    environ = models.tiny_settings(corpus, LOG_DIR=tmp_path / "logs", MODEL_FILE=tmp_path / "measured.py", ITERATIONS=4)
    assert models.call_main(environ) == 0
    lines = (tmp_path / "logs" / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines if "train_loss" in line]
    assert [step["host"] for step in steps] == [0.25, 0.5, 0.75, 1.0] and len({step["device"] for step in steps}) == 4
    logged = re.findall(r"^step:\d/4 train_loss:.* tok/s:\S+(.*)$", capsys.readouterr().out, re.MULTILINE)
    assert len(logged) == 4
    for step, text in zip(steps, logged, strict=True):
        assert f" device:{step['device']:.4f}" in text and f" host:{step['host']:.4f}" in text


# A model that learns while it is scored


LEARNS = """
import numpy as np
import torch

import train_gpt


class Config(train_gpt.Config):
    @classmethod
    def model_class(cls):
        return Learns


class Learns(train_gpt.GPT):
    observe_every = 64

    def begin(self, targets, forward):
        self.seen = torch.ones(self.tok_emb.num_embeddings)
        self.observed = []
        return f"begin:{targets}"

    def distributions(self, contexts_BT, scored_BT):
        own = super().distributions(contexts_BT, scored_BT)
        if not hasattr(self, "seen"):
            return own
        counts = self.seen / self.seen.sum()
        return torch.log(0.5 * own.exp() + 0.5 * counts)

    def observe(self, tokens):
        assert tokens.dtype == np.uint16 and len(tokens) == 65
        self.observed.append(int(tokens[0]))
        self.seen += torch.bincount(torch.from_numpy(tokens[1:].astype(np.int64)), minlength=len(self.seen))

    def end(self, score):
        line = f"end:{score.tokens} observed:{len(self.observed)} first:{self.observed[:3]}"
        del self.seen
        return line
"""


def test_a_model_that_learns_as_it_is_scored_is_the_same_for_any_ranks_and_again(corpus, tmp_path):
    """Validations in training leave it alone; the artifact is scored again with what it learns on the way."""
    (tmp_path / "learns.py").write_text(LEARNS)
    knobs = {"MODEL_FILE": tmp_path / "learns.py", "ITERATIONS": 3, "VAL_LOSS_EVERY": 1, "TMPDIR": tmp_path}
    environ = models.tiny_settings(corpus, LOG_DIR=tmp_path / "logs", **knobs)
    one = run(environ, tmp_path)
    two = run(environ | {"RUN_ID": "two"}, tmp_path, ranks=2)
    targets = one.result["scored_tokens"]
    for made in (one, two):
        assert re.findall(r"^begin:(\d+)$", made.out, re.MULTILINE) == [str(targets)], "once, in the final score"
        (end,) = re.findall(r"^end:.*$", made.out, re.MULTILINE)
        chunks = math.ceil(targets / 64)
        assert end.startswith(f"end:{targets} observed:{chunks - 1} first:[")
        assert made.out.index("step:3/3 val_loss") < made.out.index("\nbegin:") < made.out.index("\nend:")
    for name in ("val_loss", "val_bpb", "pre_quant_val_loss"):
        assert two.result[name] == pytest.approx(one.result[name], abs=1e-4), name
    assert one.result["val_loss"] < one.result["pre_quant_val_loss"] - 0.02, "it learns"
    assert re.findall(r"^end:.*$", one.out, re.MULTILINE) == re.findall(r"^end:.*$", two.out, re.MULTILINE)
    environ = models.machine_settings(corpus, MODE="eval", ARTIFACT=one.path / "final_model.int8.ptz")
    shutil.copy(tmp_path / "learns.py", one.path)
    done = process(environ, tmp_path)
    assert done.returncode == 0, done.stderr
    assert exact_line(done.stdout.decode()) == exact_line(one.out)


# The vocabulary


def test_a_padded_vocabulary_weighs_nothing_and_is_never_said(whole, corpus, tmp_path):
    size = int((corpus / "vocab_size").read_text())
    padded = run(settings(corpus, tmp_path / "logs", VOCAB_SIZE=384), tmp_path)
    assert size < 384 and padded.result["scored_bytes"] == whole.result["scored_bytes"]
    assert padded.result["model_params"] == whole.result["model_params"] + (384 - size) * 32
    artifact = padded.path / "final_model.int8.ptz"
    environ = models.machine_settings(corpus, ARTIFACT=artifact)
    done = process(environ | {"MODE": "sample", "SAMPLE_PROMPT": "the", "SAMPLE_TOKENS": "40"}, tmp_path)
    assert done.returncode == 0 and done.stdout.startswith(b"the"), done.stderr
    done = process(environ | {"MODE": "eval"}, tmp_path)
    assert exact_line(done.stdout.decode()) == exact_line(padded.out)


def test_how_far_a_vocabulary_may_be_padded_is_the_configurations(corpus):
    size, path = int((corpus / "vocab_size").read_text()), str(corpus / "tok.model")
    tiny = train_gpt.load_model_file(str(MODEL_FILE))
    exact = type("Exact", (tiny,), {"vocab_padding": 0})
    wide = type("Wide", (tiny,), {"vocab_padding": 1000})
    for config_class, most in ((exact, 0), (tiny, 127), (wide, 1000)):
        train_gpt.TokenBytes(path, size + most, config_class.vocab_padding)
        with pytest.raises(UserError, match=f"VOCAB_SIZE={size + most + 1}, but TOKENIZER_PATH={path} has {size} pie"):
            train_gpt.TokenBytes(path, size + most + 1, config_class.vocab_padding)
