"""The script by itself: copied alone into an empty folder, renamed, next to folders and modules named like its tools,
and with unusual module paths. Runs are processes of the copy."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
from models import SCRIPT, exact_line, process

import train_gpt

VAL = "fineweb_val_000000.bin"


def scores(folder: Path) -> list:
    result = json.loads((folder / "result.json").read_text())
    return [result[name] for name in ("val_loss", "val_bpb", "pre_quant_val_loss", "sha256_artifact", "sources")]


def run(script: Path, cwd: Path, environ: dict, code=0, **more) -> SimpleNamespace:
    done = process(environ, cwd, script=script, **more)
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    assert done.returncode == code and "Traceback" not in err, out + err
    return SimpleNamespace(out=out, err=err)


@pytest.fixture(scope="module")
def proved(corpus, tmp_path_factory):
    """The corpus, with a manifest that states the true byte count."""
    data = shutil.copytree(corpus / "data", tmp_path_factory.mktemp("proved") / "data")
    stream = train_gpt.TokenStream(str(data), "val", int((corpus / "vocab_size").read_text()))
    table = train_gpt.TokenBytes(str(corpus / "tok.model"), stream.vocab_size)
    size = len(table.decode(stream.read(0, len(stream)).tolist()))
    (data / "manifest.json").write_text(json.dumps({"splits": {"val": {"bytes": size}}}))
    return data


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The folder of the same run, made by the script in its usual place."""
    folder = tmp_path_factory.mktemp("whole")
    assert models.call_main(models.tiny_settings(corpus, LOG_DIR=folder)) == 0
    return folder / "run"


def test_the_script_alone_trains_exports_proves_its_bytes_and_writes_its_result(corpus, proved, whole, tmp_path):
    """The script as a submission ships it. It reports which tools are missing."""
    script = Path(shutil.copy(SCRIPT, tmp_path))
    environ = models.tiny_settings(corpus, DATA_PATH=proved)
    made, folder = run(script, tmp_path, environ), tmp_path / "logs" / "run"
    assert made.err == ""
    missed = re.findall(r"^warning: tools/(\w+)\.py is missing: .+$", made.out, re.MULTILINE)
    assert {"check", "checkpoint", "kernels"} <= set(missed) and len(missed) == len(set(missed))
    assert "(bytes:proved by manifest.json)" in made.out
    result = json.loads((folder / "result.json").read_text())
    assert result["bytes_proved"] is True
    assert result["val_bytes"] == json.loads((proved / "manifest.json").read_text())["splits"]["val"]["bytes"]
    assert result["scored_bytes"] == result["val_bytes"] and result["bytes_code"] == SCRIPT.stat().st_size
    reference = json.loads((whole / "result.json").read_text())  # computed with a different attention kernel
    assert result["val_bpb"] == pytest.approx(reference["val_bpb"], rel=1e-4)
    assert result["sources"] == reference["sources"]
    written = "train.log metrics.jsonl config.env train_gpt.py final_model.pt final_model.int8.ptz result.json"
    assert {path.name for path in folder.iterdir()} == {*written.split()}
    assert exact_line(made.out) == exact_line((folder / "train.log").read_text())


CANNOT = [
    ("", "logs/run exists, or RESUME is set: choose another RUN_ID, or get tools/checkpoint.py"),
    ("RUN_ID=other RESUME=logs/run", "RESUME is set: choose another RUN_ID, or get tools/checkpoint.py"),
    ("MODE=eval ARTIFACT=x", "tools/artifact.py is missing: take it from the repository"),
    ("MODE=check", "tools/check.py is missing: take it from the repository"),
    ("ITERATIONS=many", "ITERATIONS='many' is not a whole number"),
    ("TOKENIZER_PATH=bytes", "/vocabularies.py is missing: take it from the repository"),
    ("DATA_PATH=data RUN_ID=other", "manifest.json says 7"),
]


@pytest.mark.parametrize("knobs, said", CANNOT)
def test_what_the_script_alone_cannot_do_is_one_line(corpus, tmp_path, monkeypatch, capsys, knobs, said):
    (tmp_path / "logs" / "run").mkdir(parents=True)
    data = shutil.copytree(corpus / "data", tmp_path / "data")
    (data / "manifest.json").write_text('{"splits": {"val": {"bytes": 7}}}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "__file__", str(shutil.copy(SCRIPT, tmp_path)))
    for name in list(train_gpt.sys.modules):
        if name.startswith("train_gpt.tools."):
            monkeypatch.delitem(train_gpt.sys.modules, name)
    assert models.call_main(models.tiny_settings(corpus) | models.knobs(knobs)) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("error: ") and err.count("\n") == 1
    assert [*(tmp_path / "logs").iterdir()] == [tmp_path / "logs" / "run"]


@pytest.fixture
def hostile(tmp_path):
    """A working directory where every name that the script might import as a bare module is something else."""
    folder = tmp_path / "elsewhere"
    for name in ("check", "tools", "artifact"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("1 / 0\n")
    for name in ("checkpoint", "kernels", "vocabularies", "sentencepiece_model", "train_gpt"):
        (folder / f"{name}.py").write_text("1 / 0\n")
    return folder


def test_tools_are_those_next_to_the_script(corpus, whole, hostile, tmp_path):
    """With a working directory that contains modules of the same names, on and off the module path."""
    place = tmp_path / "place"
    shutil.copytree(SCRIPT.parent / "tools", place / "tools")
    script, renamed = (Path(shutil.copy(SCRIPT, place / name)) for name in ("train_gpt.py", "renamed-copy.2.py"))
    path, folder = {"PYTHONPATH": str(hostile)}, hostile / "logs" / "run"
    made = run(renamed, hostile, models.tiny_settings(corpus, ITERATION=4), **path)
    assert made.err == "" and scores(folder) == scores(whole) and (folder / "checkpoint.pt").exists()
    assert (folder / "train_gpt.py").read_bytes() == SCRIPT.read_bytes(), "whatever it was called"
    assert "the environment variable ITERATION is no knob: did you mean ITERATIONS?" in made.out
    environ = models.machine_settings(corpus, MODE="eval", ARTIFACT=folder / "final_model.int8.ptz")
    for options, more in ((["-P"], {}), ([], {"PYTHONSAFEPATH": "1"})):  # script's folder not on the module path
        again = run(script, hostile, environ, options=options, **path, **more)
        assert exact_line(again.out) == exact_line(made.out)


def test_a_tool_is_loaded_once_and_by_its_path(monkeypatch):
    check = train_gpt.tool("check")
    assert check is train_gpt.tool("check") and Path(check.__file__) == SCRIPT.parent / "tools" / "check.py"
    assert check.train_gpt is train_gpt
    monkeypatch.setitem(train_gpt.TOOLS, "nothing", ("no nothing", False))
    with pytest.raises(train_gpt.UserError, match=r"tools/nothing.py is missing: take it from the repository$"):
        train_gpt.tool("nothing", required=True)
    said = []
    assert train_gpt.tool("nothing", said.append) is None
    assert said == ["warning: tools/nothing.py is missing: no nothing"]
