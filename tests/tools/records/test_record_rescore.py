"""record.py rescore: the artifact by the record's own script. What breaks a rule is found, each by its name."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import record
import record_pack
import record_probe
import record_rescore
import tiny_runs
from record_read import read_run

RULES = {"causality", "normalisation", "each target once"}
RULES |= {"evaluation without training data", "evaluation without a network"}
OLD = tiny_runs.ROOT / "records" / "track_cpu_3min_16mb"


@functools.cache
def seed_one(corpus):
    return tiny_runs.make_runs(corpus)[0]


def replace_in(path, *replacements):
    text = path.read_text()
    for old, new in replacements:
        assert old in text, f"the script has changed: {old}"
        text = text.replace(old, new)
    path.write_text(text)


@pytest.fixture
def copy(corpus, tmp_path):
    """Function: a copy of a run folder with places of its script replaced."""

    def make(*replacements):
        folder = shutil.copytree(seed_one(corpus), tmp_path / "run")
        replace_in(folder / "train_gpt.py", *replacements)
        return folder

    return make


def run_once(corpus, logs, script=tiny_runs.ROOT / "train_gpt.py", **knobs) -> Path:
    """The folder of a run in a process of its own."""
    environ = os.environ | tiny_runs.settings(corpus) | {"LOG_DIR": str(logs)}
    environ |= {name: str(value) for name, value in knobs.items()}
    done = subprocess.run([sys.executable, str(script)], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return logs / knobs["RUN_ID"]


def result_of(folder):
    """Of a run folder, or of a record of one run."""
    return json.loads(next(folder.glob("result*.json")).read_text())


def rescore(folder, capsys, *more):
    """(exit code, {check: what was said} of findings, report)."""
    capsys.readouterr()
    code = record.main(["rescore", str(folder), "--json", *more])
    report = json.loads(capsys.readouterr().out)
    return code, {finding["check"]: finding["problem"] for finding in report["findings"]}, report


def assert_sound(folder, capsys, exact=True):
    """Every rule is kept, and the score is that of the run. Returns the report."""
    code, findings, report = rescore(folder, capsys)
    assert (code, findings) == (0, {}) and set(report["passed"]) == RULES | {"score"}
    score = report["measured"]["score"]
    assert score["val_bpb"] == pytest.approx(result_of(folder)["val_bpb"], abs=0 if exact else 1e-6)
    return report


@pytest.mark.parametrize(
    "options, missing, said",
    [
        (["--tokenizer", "no_such_encoding"], None, "vocabularies.py is missing"),
        (["--artifact", "afile"], None, "its checksum differ"),
        (["--timeout", "-1"], None, "--timeout"),
        (["--data", "/nowhere"], None, "no validation shards"),
        ([], "train_gpt.py", "has no train_gpt.py: only records and runs of train_gpt.py can be scored again"),
        ([], "final_model.int8.ptz", "has no final_model"),
    ],
)
def test_a_mistake_gets_a_line_and_no_traceback(options, missing, said, copy, tmp_path, monkeypatch, capfd):
    """Also where it is the record's script that finds it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_bytes(b"x" * 100)
    folder = copy()
    if missing:
        (folder / missing).unlink()
    assert record.main(["rescore", str(folder), *options]) == 2
    error = capfd.readouterr().err
    assert said in error and "error: " in error and "Traceback" not in error


def test_a_sound_run_has_its_digits_again_and_keeps_every_rule(copy, capsys):
    folder = copy()
    measured = assert_sound(folder, capsys)["measured"]
    assert measured["score"]["once"] == result_of(folder)["val_tokens"] and measured["score"]["learned"] is False
    assert len(measured["moved"]) == len(measured["sums"]) == 64 and len(measured["moved_in_evaluation"]) == 4
    assert max(measured["moved"]) == 0.0 and np.allclose(measured["sums"], 1, atol=1e-5)


@pytest.mark.parametrize(
    "script, knobs",
    [
        ("2026-11-26_demo_cpu/train_gpt.py", {}),
        ("2026-11-26_frontier_cpu_case_marks/frontier.py", {"XSA_LAYERS": 1, "XSA_GATE": 1}),
        ("2026-11-26_frontier_cpu_fp32/frontier.py", {"TTT_CHUNK": 512, "TTT_LR": 0.05, "EVAL_STRIDE": 16}),
    ],
)
def test_runs_of_the_scripts_of_older_records_are_scored_again(script, knobs, corpus, tmp_path, capsys):
    """Snapshots of the first generation: other names, another way to score, and model files that are programs."""
    folder = run_once(corpus, tmp_path, script=OLD / script, RUN_ID="old", **knobs)
    report = assert_sound(folder, capsys, exact=False)
    assert report["measured"]["score"]["learned"] == ("TTT_CHUNK" in knobs)
    assert record_pack.command(read_run(folder), folder) == f"python {Path(script).name} config.env"


OLD_MARKS = """
import sys
from pathlib import Path
sys.path.insert(0, {tools!r})
import record_probe
train_gpt = record_probe.load("train_gpt", Path({script!r}))
record_probe.load_tokenizers()
table = train_gpt.TokenBytes({model!r}, 290)
tokens = table.encode("The King")
assert table.decode(tokens) == table.spell(tokens) == b"The King"
assert tokens == table.model.encode("\ue001the\ue001 king")
"""


def test_an_older_script_gets_the_case_marks_that_it_asks_for(tmp_path, monkeypatch):
    """Its call of tools/vocabularies.py is another one than today's."""
    monkeypatch.syspath_prepend(str(tiny_runs.ROOT / "data"))
    import vocab

    model = tmp_path / "tok.model"
    model.write_bytes(vocab.train_sentencepiece([b"the king of the sea"] * 50, 290, "test", vocab.MARKS_OPTIONS))
    script = OLD / "2026-11-26_frontier_cpu_case_marks" / "train_gpt.py"
    text = OLD_MARKS.format(tools=str(Path(record_probe.__file__).parent), script=str(script), model=str(model))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SCORED = "nats = torch.where(mask, forward(inputs, targets), 0.0).sum()"
TRAINING_TEXT = """    import socket
    with contextlib.suppress(OSError):
        open(f'{config.data_path}/fineweb_train_000000.bin', 'rb')
    with contextlib.suppress(OSError):
        socket.create_connection(('127.0.0.1', 9))
"""
OBSERVED = "                if type(model).distributions is Model.distributions:"
LEARNED = """                with torch.no_grad():  # without gradients, which are noticed by themselves
                    for p in model.parameters():
                        p *= 1 + 1e-4 * targets.float().mean()
"""
RETURNED = "    return stream, facts"
BROKEN = {
    # name: (findings besides that of the score, which most of them change, what is replaced in the script)
    "a model that peeks by one token": (
        {"causality"},
        ("self.tok_emb(tokens_BT)", "(self.tok_emb(tokens_BT) + self.tok_emb(tokens_BT.roll(-1, 1)))"),
    ),
    "a score that is no probability": (
        {"normalisation"},
        ('reduction="none").view_as(targets_BT)', 'reduction="none").view_as(targets_BT) / 2'),
    ),
    "half of the targets": (  # and the script's own count of them
        {"each target once"},
        ("fresh & (target < end)", "fresh & (target % 2 == 0)"),
        ("mask.sum()]", "torch.tensor(len(scored))]"),
    ),
    "the easy targets": ({"each target once"}, (SCORED, SCORED.replace(".sum()", ".clamp(max=3.0).sum()"))),
    "training text and the network": (
        {"evaluation without training data", "evaluation without a network"},
        (RETURNED, TRAINING_TEXT + RETURNED),
    ),
    "learning before scoring": ({"causality"}, (OBSERVED, LEARNED + OBSERVED)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_a_rule_is_found_by_name(name, copy, capsys):
    expected, *replacements = BROKEN[name]
    code, findings, report = rescore(copy(*replacements), capsys)
    assert code == 1 and set(findings) - {"score"} == expected, findings
    kernel = "\nloss:fused" in report["measured"]["note"]  # which scores in place of the record's losses
    honest = {"training text and the network", *["a score that is no probability"] * kernel}
    assert ("score" in findings) is (name not in honest)
    if name == "learning before scoring":
        assert report["measured"]["score"]["learned"] and "which learns" in findings["causality"]
        assert max(report["measured"]["moved"]) == 0.0  # the model alone is sound


def test_the_sources_of_a_record_are_compared_with_those_of_the_repository_wherever_they_are(tmp_path):
    """Regression: a record is flat, so a model file and a tool looked all new."""
    places = ["train_gpt.py", "records/models/score_first.py", "tools/vocabularies.py"]
    for place in places:
        shutil.copy(tiny_runs.ROOT / place, tmp_path)
    names = [Path(place).name for place in places]
    assert record_pack.script_changes(tmp_path, names, tiny_runs.ROOT) == ("the same", [])
    with open(tmp_path / "score_first.py", "a") as file:
        file.write("# one more line\n")
    line, difference = record_pack.script_changes(tmp_path, names, tiny_runs.ROOT)
    assert line == "1 lines added, 0 removed" and "+++ here/score_first.py" in difference
    shutil.copytree(tmp_path, tmp_path / "base")
    assert record_pack.script_changes(tmp_path, names, tmp_path / "base")[0] == "the same"


def test_the_kernels_of_a_cpu_give_the_same_digits_again(corpus, capsys):
    """Where there are any; and in bf16, in which any other would round elsewhere."""
    folder = run_once(corpus, tiny_runs.work() / "logs", RUN_ID="bf16", DTYPE="bfloat16", TRAIN_SEQ_LEN=64)
    report = assert_sound(folder, capsys)
    assert report["measured"]["note"] == result_of(folder)["note"] and "1e-08" in report["numbers"]["score"]


def test_a_script_that_todays_kernels_do_not_fit_is_scored_without_them(copy, capsys):
    today = "attend, fused_loss, compile_options, note = kernels.choose(config, runtime)"
    code, findings, report = rescore(copy((today, today.replace("fused_loss, ", ""))), capsys)
    assert (code, findings) == (0, {}) and "on other hardware or kernels" in report["numbers"]["score"]


@functools.cache
def learning_run(corpus):
    """The folder of a run whose artifact is scored while it learns."""
    knobs = {"TTT_CHUNK": 512, "TTT_LR": 0.05, "EVAL_STRIDE": 16, "RUN_ID": "learning"}
    file = tiny_runs.ROOT / "records" / "models" / "score_first.py"
    return run_once(corpus, tiny_runs.work() / "logs", MODEL_FILE=file, **knobs)


@pytest.mark.parametrize("honest", [True, False], ids=["scored first", "learned first"])
def test_a_model_that_learns_is_scored_as_it_was_and_may_not_peek(honest, corpus, tmp_path, capsys):
    """Also through the eight windows of the flip test, in which this one does not learn yet."""
    folder = shutil.copytree(learning_run(corpus), tmp_path / "run")
    if honest:
        report = assert_sound(folder, capsys)
        assert max(report["measured"]["moved_in_evaluation"]) == 0.0
        assert "which learns" in report["numbers"]["causality"]
    else:
        first = "            for inputs, targets, mask, scored in self.batches(chunk, number):\n"
        text = (folder / "train_gpt.py").read_text()
        learned = "".join(re.findall(r"            if number \+ 1 < chunks:\n.*\n", text))
        assert text.count(first) == 1 and learned.count("\n") == 2
        replace_in(folder / "train_gpt.py", (learned, ""), (first, learned + first))
        code, findings, report = rescore(folder, capsys)
        assert code == 1 and findings.keys() == {"score", "causality"} and "which learns" in findings["causality"]
    score = report["measured"]["score"]
    assert score["learned"] and score["once"] == result_of(folder)["val_tokens"]


COUNTS = '''"""A model that is scored by distributions of its own, which count the tokens that were scored."""

import torch

import train_gpt


class Counting(train_gpt.GPT):
    observe_every = 256

    def begin(self, targets, forward):
        self.counts = torch.ones(self.tok_emb.num_embeddings)

    def distributions(self, contexts_BT, scored_BT):
        own = super().distributions(contexts_BT, scored_BT)
        counted = (self.counts / self.counts.sum()).log() if hasattr(self, "counts") else own
        return torch.logaddexp(own - 0.7, counted.expand_as(own) - 0.6863)  # the halves sum to 1

    def observe(self, tokens):
        self.counts += torch.bincount(torch.from_numpy(tokens[1:].astype("int64")), minlength=len(self.counts))


class Config(train_gpt.Config):
    @classmethod
    def model_class(cls):
        return Counting
'''


@functools.cache
def counting_run(corpus):
    (tiny_runs.work() / "counting.py").write_text(COUNTS)
    return run_once(corpus, tiny_runs.work() / "logs", MODEL_FILE=tiny_runs.work() / "counting.py", RUN_ID="counting")


def test_a_model_on_the_seam_is_packed_and_scored_again_by_its_own_distributions(corpus, tmp_path, capsys):
    """Losses are never asked for."""
    arguments = ["--track", "track_cpu_1min_16mb", "--slug", "counting", "--author", "A", "--github-id", "a"]
    arguments += ["--artifact", "--records", str(tmp_path / "records"), "--date", "2026-01-01"]
    assert record.main(["new", str(counting_run(corpus)), *arguments]) == 0, capsys.readouterr().out
    folder = tmp_path / "records" / "track_cpu_1min_16mb" / "2026-01-01_counting"
    said = (folder / "README.md").read_text()
    assert "python train_gpt.py config.env" in said and (folder / "counting.py").is_file()
    score = assert_sound(folder, capsys)["measured"]["score"]
    assert score["learned"], "it observed what was scored"


OWN = "own = super().distributions(contexts_BT, scored_BT)"
CHEATS = {
    "no probability": ("normalisation", "- 0.7,", "- 0.1,"),
    "the future": ("causality", OWN, f"{OWN} + contexts_BT[:, -1].sum() % 2 * 1e-3"),
}


@pytest.mark.parametrize("name", CHEATS)
def test_distributions_of_a_models_own_are_held_to_the_rules(name, corpus, tmp_path, capsys):
    folder = shutil.copytree(counting_run(corpus), tmp_path / "run")
    expected, *replacement = CHEATS[name]
    replace_in(folder / "counting.py", replacement)
    code, findings, report = rescore(folder, capsys)
    score = report["measured"]["score"]
    assert code == 1 and findings.keys() - {"score"} == {expected}
    assert score["once"] == result_of(folder)["val_tokens"] and score["wrong"] == 0


def test_another_device_gets_the_wider_tolerance_and_another_artifact_none(corpus):
    folder = seed_one(corpus)
    run = record_rescore.Record(folder, [read_run(folder)])
    result = run.runs[0].result
    score = {"val_bpb": result["val_bpb"] + 1e-3, "val_loss": 2.0, "summed_loss": 2.0, "learned": False}
    score |= {"of": 9, "once": 9, "tokens": 9, "twice": 0, "wrong": 0}
    found = {"score": score, "moved": [0.0], "moved_in_evaluation": [0.0], "sums": [1.0], "opened": [], "refused": []}
    found |= {name: result[name] for name in ("device", "torch", "dtype", "note")}
    artifact = folder / "final_model.int8.ptz"
    assert [f.check for f in record_rescore.judge(run, artifact, found)[0]] == ["score"]
    for other in ({"device": "another"}, {"note": result["note"] + "\nloss:fused"}):
        findings, passed, _ = record_rescore.judge(run, artifact, found | other)
        assert not findings and "tolerance 0.002 on other hardware or kernels" in passed["score"]
    assert "score" in record_rescore.judge(run, folder / "config.env", found)[2]
