"""record.py check: a valid record passes, and each of many sabotages is found by its own check and by no other."""

import functools
import json
import operator
import re
import shutil
import subprocess

import launcher
import numpy as np
import pytest
import record
import record_check
import tiny_runs
from conftest import write_shard
from record_folder import open_record, sha256
from record_read import record_runs
from record_results import TABLE, results_table

from train_gpt import open_shard

TRACK = "track_cpu_1min_16mb"
ABOUT = ["--track", TRACK, "--author", "A. Author", "--github-id", "aauthor"]


@pytest.fixture(scope="session")
def sound(corpus, tmp_path_factory):
    """A record of three seeds, made by the command."""
    records = tmp_path_factory.mktemp("records")
    folders = [str(folder) for folder in tiny_runs.make_runs(corpus)]
    more = ["--slug", "sound", "--artifact", "--date", "2026-01-31", "--records", str(records)]
    assert record.main(["new", *folders, *ABOUT, *more]) == 0
    return records / TRACK / "2026-01-31_sound"


class Saboteur:
    """A copy of a valid record, and ways to damage it that keep the rest consistent."""

    def __init__(self, folder):
        self.folder = folder
        self.results = sorted(path.name for path in folder.glob("result_seed*.json"))
        self.logs = sorted(path.name for path in folder.glob("train_seed*.log"))

    def path(self, name):
        return self.folder / name

    def edit(self, name, change):
        """Apply `change` to the object in a JSON file; a dict replaces fields."""
        value = json.loads(self.path(name).read_text())
        value.update(change) if isinstance(change, dict) else change(value)
        self.path(name).write_text(json.dumps(value))

    def edit_results(self, change):
        for name in self.results:
            self.edit(name, change)

    def claim(self, change):
        self.edit("submission.json", change)

    def claim_of_seeds(self, change):
        self.claim(lambda value: [change(row) for row in value["seed_results"].values()])

    def sub(self, name, pattern, new):
        text = self.path(name).read_text()
        changed = re.sub(pattern, new, text, flags=re.MULTILINE)
        assert changed != text, f"{pattern} is not in {name}"
        self.path(name).write_text(changed)

    def sub_logs(self, pattern, new):
        for name in self.logs:
            self.sub(name, pattern, new)

    def readme(self):
        """Cover the traces: regenerate the table."""
        fresh = results_table(record_runs(self.folder))
        text = re.sub(rf"{TABLE}\n\n(\|.*\n)+", lambda _: fresh + "\n", self.path("README.md").read_text())
        self.path("README.md").write_text(text)

    def grow(self, code=0, artifact=0):
        """Increase the sizes of code and artifact by this many bytes in every file that states them."""

        def add(more):
            return lambda value: value.update({key: value[key] + count for key, count in more.items()})

        def longer(more):
            return lambda match: match[1] + str(int(match[2]) + more)

        total = {"bytes_code": code, "bytes_total": code + artifact}
        self.edit_results(add(total | {"bytes_artifact": artifact}))
        self.sub_logs(r"^(Total submission size int8\+zlib: )(\d+)", longer(code + artifact))
        if code:
            self.sub_logs(r"^(Code size: )(\d+)", longer(code))
        self.claim(add(total))
        self.claim_of_seeds(add({"artifact_bytes": artifact}))
        self.readme()

    def halve_bpb(self):
        """As if every byte of the text had been counted twice."""

        def halve(*keys):
            return lambda value: value.update({key: value[key] / 2 for key in keys})

        def half(match):
            return f"{match[1]}{float(match[2]) / 2:.{len(match[2].split('.')[1])}f}"

        self.edit_results(halve("val_bpb"))
        self.sub_logs(r"^(final_\S+ val_loss:\S+ val_bpb:)(\S+)", half)
        self.claim(halve("val_bpb", "val_bpb_std"))
        self.claim_of_seeds(halve("val_bpb"))
        self.readme()

    def set_time(self, seconds, log, result, claim, row):
        """Change the training or evaluation time of seed 2 wherever it is stated."""
        self.edit("result_seed2.json", result)
        self.sub("train_seed2.log", rf"{log}:\d+ms", f"{log}:{1000 * seconds:.0f}ms")
        self.claim({claim: seconds})
        self.claim(lambda value: value["seed_results"]["2"].update(row))
        self.readme()

    def drop_seed_three(self):
        """Keep the best two, with their own mean and deviation."""

        def drop(value):
            del value["seed_results"]["3"]
            bpb, loss = ([row[key] for row in value["seed_results"].values()] for key in ("val_bpb", "val_loss"))
            mean = {"val_bpb": np.mean(bpb), "val_loss": np.mean(loss), "val_bpb_std": np.std(bpb, ddof=1)}
            value.update(mean, seeds=[1, 2])

        self.claim(drop)

    def leak(self, shard="fineweb_train_000001.bin"):
        """Train on the validation text too, by using another copy of the data."""
        data = open_record(self.folder).config["DATA_PATH"]
        leaky = shutil.copytree(data, self.folder / "leaky")
        write_shard(leaky / shard, [*open_shard(leaky / shard), *open_shard(leaky / "fineweb_val_000000.bin")])
        self.sub("config.env", re.escape(data), str(leaky))

    def rewrite_script(self, text):
        """Ship another script, and make every hash and number agree with it."""
        old = len(self.path("train_gpt.py").read_bytes())
        self.path("train_gpt.py").write_text(text)
        digest = sha256(self.path("train_gpt.py"))

        def rehash(value):
            value["sha256_code"], value["sources"]["train_gpt.py"] = digest, {"sha256": digest, "bytes": len(text)}

        self.edit_results(rehash)
        self.grow(code=len(text) - old)

    def append(self, name, text):
        self.path(name).write_text(self.path(name).read_text() + text)

    def copy(self, *pairs):
        """Copies of the current files, under other names."""
        for name, data in [(new, self.path(old).read_bytes()) for old, new in pairs]:
            self.path(name).write_bytes(data)


def row(seed, **fields):
    return lambda value: value["seed_results"][seed].update(fields)


def best_seed_as_the_mean(value):
    value["val_bpb"] = min(row["val_bpb"] for row in value["seed_results"].values())


def population_deviation(value):
    """The population's standard deviation is smaller than the sample's."""
    value["val_bpb_std"] = np.std([row["val_bpb"] for row in value["seed_results"].values()])


def before_export(value):
    value.update(val_bpb=value["pre_quant_val_bpb"], val_loss=value["pre_quant_val_loss"])


def slow_training(s):
    slow, row = {"seconds": {"training": 61.0}}, {"train_time_s": 61.0, "step_avg_ms": 61000 / 24}
    s.set_time(61.0, "train_time", slow, "wallclock_seconds", row)


def slow_evaluation(s):
    s.set_time(61.0, "eval_time", {"eval_seconds": 61.0}, "eval_time_seconds", {"eval_time_s": 61.0})


def partial_validation(s):
    s.edit("result_seed2.json", {"partial": True})
    s.sub("train_seed2.log", r"^(final_int8_zlib_roundtrip.*)$", r"\1 partial:1000/2932")


def truncated_validation(s):
    s.edit_results({"scored_tokens": 1000, "val_tokens": 1000})
    s.sub_logs(r"^(val_loader:.*tokens:)\d+", r"\g<1>1000")


def larger_than_the_limit(s):
    s.path("final_model.int8.ptz").unlink()
    s.grow(artifact=16_500_000)


def wrong_sum(s):
    s.edit("result_seed2.json", lambda value: value.update(bytes_total=value["bytes_total"] - 9))
    s.sub(LOG2, r"^(Total submission size int8\+zlib: )(\d+)", lambda match: match[1] + str(int(match[2]) - 9))
    s.readme()


LOG2, EXACT = "train_seed2.log", r"(_exact val_loss:\S+ val_bpb:)\S+"
FOURTH = [(f"{name}_seed3.{end}", f"{name}_seed4.{end}") for name, end in (("train", "log"), ("metrics", "jsonl"))]
SABOTAGES = {  # name: (the check that must find it, how the folder is changed)
    "edited score": ("score", lambda s: s.claim({"val_bpb": 0.9})),
    "edited loss": ("score", lambda s: s.claim({"val_loss": 1.9})),
    "edited deviation": ("score", lambda s: s.claim({"val_bpb_std": 0.001})),
    "deviation of a population": ("score", lambda s: s.claim(population_deviation)),
    "edited score of a seed": ("score", lambda s: s.claim(row("2", val_bpb=0.9))),
    "best seed as the mean": (
        "score",
        lambda s: s.claim(best_seed_as_the_mean),
    ),
    "edited result": ("score", lambda s: s.edit("result_seed2.json", {"val_bpb": 0.9})),
    "edited log": ("score", lambda s: s.sub(LOG2, EXACT, r"\g<1>0.90000000")),
    "score before the export": ("score", lambda s: s.edit("result_seed1.json", before_export)),
    "edited hardware": ("claims", lambda s: s.claim({"hardware": "8 x NVIDIA H100 80GB HBM3"})),
    "edited steps of a seed": ("claims", lambda s: s.claim(row("2", steps=25))),
    "swapped logs": ("seeds", lambda s: s.copy(("train_seed1.log", LOG2), (LOG2, "train_seed1.log"))),
    "log of another seed": ("seeds", lambda s: s.copy(("train_seed1.log", LOG2))),
    "dropped seed, mean of the rest": ("seeds", lambda s: s.drop_seed_three()),
    "claimed seed without a log": ("seeds", lambda s: s.claim({"seeds": [1, 2, 3, 4]})),
    "a seed twice": ("seeds", lambda s: s.copy(*FOURTH, ("result_seed3.json", "result_seed4.json"))),
    "no log": ("files", lambda s: s.path(LOG2).unlink()),
    "no script": ("files", lambda s: s.path("train_gpt.py").unlink()),
    "no submission.json": ("files", lambda s: s.path("submission.json").unlink()),
    "no README": ("files", lambda s: s.path("README.md").unlink()),
    "null field": ("schema", lambda s: s.claim({"github_id": None})),
    "score as text": ("schema", lambda s: s.claim({"val_bpb": "0.9389"})),
    "date that is none": ("schema", lambda s: s.claim({"date": "2026-02-30"})),
    "track of another folder": ("schema", lambda s: s.claim({"track": "track_10min_16mb"})),
    "cut submission.json": ("schema", lambda s: s.path("submission.json").write_text("{")),
    "stale script": ("script", lambda s: s.append("train_gpt.py", "# one more change\n")),
    "script that is no Python": ("compile", lambda s: s.rewrite_script("def broken(:\n" * 999)),
    "helper file not counted": ("code", lambda s: s.path("helper.py").write_text("import train_gpt\n")),
    "code bytes of the claim": ("code", lambda s: s.claim({"bytes_code": 40_000})),
    "code bytes of every file": ("code", lambda s: s.grow(code=-1000)),
    "doubled bytes": ("size", lambda s: s.claim(lambda v: v.update(bytes_total=2 * v["bytes_total"]))),
    "a total that is no sum": ("size", wrong_sum),
    "MiB for MB": ("size", larger_than_the_limit),
    "size in the log": ("size", lambda s: s.sub(LOG2, r"^(Total submission size int8\+zlib: )\d+", r"\g<1>99999")),
    "artifact of another run": ("artifact", lambda s: s.path("final_model.int8.ptz").write_bytes(b"another")),
    "changed configuration": ("config", lambda s: s.sub("config.env", r"^MATRIX_LR=.*", 'MATRIX_LR="0.03"')),
    "one more knob": ("config", lambda s: s.append("config.env", 'NEW_KNOB="1"\n')),
    "training over the cap": ("clock", slow_training),
    "evaluation over the cap": ("clock", slow_evaluation),
    "a part of the validation text": ("validation", partial_validation),
    "truncated validation": ("validation", truncated_validation),
    "bytes counted twice": ("bytes", lambda s: s.halve_bpb()),
    "other bytes in a result": ("bytes", lambda s: s.edit("result_seed3.json", {"scored_bytes": 18850})),
    "tokenizer of one seed": ("tokenizer", lambda s: s.edit("result_seed3.json", {"sha256_tokenizer": "0" * 64})),
    "changed tokenizer": ("tokenizer", lambda s: s.edit_results({"sha256_tokenizer": "0" * 64})),
    "validation documents in training": ("leak", lambda s: s.leak()),
    "validation documents in the first shard": ("leak", lambda s: s.leak("fineweb_train_000000.bin")),
    "edited table": ("readme", lambda s: s.sub("README.md", r"^\| 1 \| 0\.\d+", "| 1 | 0.80000")),
    "beats no record": ("significance", lambda s: s.claim({"base": "2025-01-01_none"})),
}


@pytest.fixture
def copy(sound, tmp_path):
    folder = tmp_path / TRACK / sound.name
    shutil.copytree(sound, folder)
    return Saboteur(folder)


def test_a_sound_record_passes_and_names_what_is_not_checked(sound):
    report = record_check.examine(sound)
    assert report["findings"] == []
    assert set(report["not_checked"]) == {"significance", *record_check.NEEDS_RESCORE}
    assert {"score", "bytes", "leak", "artifact", "readme"} <= set(report["passed"])


@pytest.mark.parametrize("name", SABOTAGES)
def test_a_sabotage_is_found_by_its_check_alone(name, copy):
    expected, sabotage = SABOTAGES[name]
    sabotage(copy)
    assert {finding["check"] for finding in record_check.examine(copy.folder)["findings"]} == {expected}


def test_a_record_that_does_not_beat_its_base_is_told_so(copy):
    shutil.copytree(copy.folder, copy.folder.parent / "2026-01-01_base")
    copy.claim({"base": "2026-01-01_base"})
    (finding,) = record_check.examine(copy.folder)["findings"]
    assert finding["check"] == "significance" and "p = " in finding["problem"]


def test_data_that_is_not_whole_is_not_checked_for_leaks(copy):
    copy.leak()
    next((copy.folder / "leaky").glob("fineweb_val_*")).write_bytes(b"cut")
    report = record_check.examine(copy.folder)
    assert not report["findings"] and "fineweb_val_000000.bin: 3 bytes" in report["not_checked"]["leak"]


ENV_LINES, ENV = "A=1 # one\nB = 2\nC='x'  # q\n", {"A": "1", "B": "2", "C": "x"}


def test_every_tool_reads_a_configuration_as_the_script_does(copy, tmp_path):
    """Regression: a reader of the record tools took the comment as part of A, dropped B and kept the quotes of C."""
    copy.path("config.env").write_text(ENV_LINES)
    assert open_record(copy.folder).config == ENV
    script = tmp_path / "public.py"
    script.write_text(f"import os\nprint({{name: os.environ[name] for name in {[*ENV]}}})\n")
    process = launcher.start(launcher.Target(script, copy.path("config.env")), {"RUN_ID": "run"}, tmp_path / "work")
    assert launcher.wait(process)[0] == 0 and (tmp_path / "work" / "run.out").read_text() == f"{ENV}\n"


@pytest.fixture
def checkout(sound, tmp_path):
    """A repository with one commit, the branch `base`, and a function that commits the current tree."""
    root = tmp_path / "checkout"
    old = root / "records" / TRACK / "2026-01-01_old"
    shutil.copytree(sound, old)
    (root / "train_gpt.py").write_text("script\n")

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", root, *identity, *words], check=True, capture_output=True)

    def commit():
        git("add", "-A")
        git("commit", "-qm", "change")

    git("init", "-q")
    commit()
    git("branch", "base")
    return root, commit


CHANGES = {
    "one record, and the board": (["records/{}/new/README.md", "records/README.md", "records/board/a.svg"], None),
    "no record at all": (["train_gpt.py", "tests/test_new.py"], None),
    "two records": (["records/{}/new/README.md", "records/{}/second/README.md"], "more than one"),
    "the script too": (["records/{}/new/README.md", "train_gpt.py"], "outside"),
    "an older record too": (["records/{}/new/README.md", "records/{}/2026-01-01_old/README.md"], "more than one"),
    "an older record": (["records/{}/2026-01-01_old/README.md"], "there already"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_pull_request_brings_one_record_and_nothing_else(name, checkout):
    root, commit = checkout
    paths, expected = CHANGES[name]
    for path in paths:
        path = root / path.format(TRACK)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("changed\n")
    commit()
    folders, findings = record_check.against_base(root, "base")
    assert bool(findings) == bool(expected) and (not expected or expected in findings[0].problem)
    assert {folder.name for folder in folders} == {path.split("/")[2] for path in paths if "{}" in path}


def test_check_against_a_base_exits_with_1_and_names_the_files(checkout, capsys):
    root, commit = checkout
    shutil.copytree(root / "records" / TRACK / "2026-01-01_old", root / "records" / TRACK / "2026-01-31_sound")
    (root / "train_gpt.py").write_text("changed\n")
    commit()
    assert record.main(["check", "--base", "base", "--root", str(root), "--json"]) == 1
    reports = json.loads(capsys.readouterr().out)
    findings = [finding for report in reports for finding in report["findings"]]
    assert [(f["check"], f["place"]) for f in findings] == [("scope", "train_gpt.py")]


MISTAKES = [  # (arguments, the message)
    (["check"], "nothing to check"),
    (["check", "/nowhere"], "no such folder"),
    (["check", "--all", "--root", "/nowhere"], "there is no /nowhere/records"),
    (["check", "--base", "no_such_ref"], "no_such_ref"),
    (["board", "--records", "/nowhere"], "no README.md"),
    (["compare", "/nowhere", "/nowhere"], "no such folder"),
    (["new", "--date", "2026-13-45"], "expected YYYY-MM-DD"),
    (["new", "--author", " "], "--author"),
    (["new", "--github-id", ""], "--github-id"),
    (["new", "--slug", "../x"], "--slug ../x"),
    (["new", "--slug", ""], "--slug"),
    (["new", "--track", "nope"], "--track nope"),
    (["new", "--base", "/nowhere"], "a record of the same track"),
]


@pytest.mark.parametrize("arguments, said", MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(arguments, said, corpus, tmp_path, capsys):
    """A record without a name or a date is not started."""
    command, *options = arguments
    if command == "new":
        records = ["--slug", "s", "--records", str(tmp_path / "records")]
        options = [str(tiny_runs.make_runs(corpus)[0]), *ABOUT, *records, *options]
    assert record.main([command, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") <= 2
    assert not (tmp_path / "records").exists()


OTHER = {"train_gpt.py": {"sha256": "0" * 64, "bytes": 1}}
NOT_PACKED = [  # (change to a copy of a run folder, the message)
    (lambda s: None, "each seed once"),
    (lambda s: s.path("metrics.jsonl").unlink(), "has no metrics.jsonl"),
    (lambda s: s.edit("result.json", {"seed": 9, "partial": True}), "scored a part of the validation text"),
    (lambda s: s.edit("result.json", {"seed": 9, "sources": OTHER}), "ran other code"),
]


@pytest.mark.parametrize("change, said", NOT_PACKED)
def test_runs_that_are_no_record_are_not_packed(change, said, corpus, tmp_path, capsys):
    run = tiny_runs.make_runs(corpus)[0]
    change(Saboteur(shutil.copytree(run, tmp_path / "run")))
    records = ["--slug", "s", "--records", str(tmp_path / "records")]
    assert record.main(["new", str(run), str(tmp_path / "run"), *ABOUT, *records]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "records").exists()


ODD = [None, "x", -1, 1e400, [1], {"a": 1}, True]
JSON_FILES = ("result_seed2.json", "submission.json", "data_manifest.json")


def places(value, path=()):
    """The paths to all values in nested objects."""
    for key, inner in value.items():
        yield (*path, key)
        yield from places(inner, (*path, key)) if isinstance(inner, dict) else ()


@pytest.fixture
def quick(monkeypatch):
    """Skip the checks that take long and read no JSON."""
    for name in ("compile", "leak"):
        monkeypatch.setitem(record_check.CHECKS, name, lambda record: [])


@pytest.mark.parametrize("name", JSON_FILES)
def test_no_value_of_a_wrong_kind_breaks_the_check(name, copy, quick):
    """Each value in turn is missing or has another type: the check always gives an answer."""
    whole = copy.path(name).read_text()
    for number, (*way, last) in enumerate(places(json.loads(whole))):
        for odd in ({last: ODD[number % len(ODD)]}, {last: ODD[(number + 3) % len(ODD)]}, {}):
            value = json.loads(whole)
            inner = functools.reduce(operator.getitem, way, value)
            del inner[last]
            inner.update(odd)
            copy.path(name).write_text(json.dumps(value))
            assert isinstance(record_check.examine(copy.folder)["findings"], list)


def as_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a folder": as_folder,
    "a list": lambda path: path.write_text("[1]"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "UTF-16": lambda path: path.write_text("{}", "utf-16"),
}


UNREADABLE = [(name, damage) for name in ("result_seed2.json", "submission.json", "config.env") for damage in DAMAGES]


@pytest.mark.parametrize("name, damage", [*UNREADABLE, ("data_manifest.json", "cut in half")])
def test_a_file_that_cannot_be_read_is_a_finding_that_names_it(name, damage, copy, quick, capsys):
    DAMAGES[damage](copy.path(name))
    assert record.main(["check", str(copy.folder)]) == 1
    said = capsys.readouterr().out
    assert name in said.replace(str(copy.folder), "") and "remedy: " in said


def test_one_broken_record_does_not_keep_the_others_from_being_checked(sound, tmp_path, quick, capsys):
    track = tmp_path / "records" / TRACK
    for name in ("2026-01-01_broken", "2026-01-02_sound"):
        shutil.copytree(sound, track / name)
    (track / "2026-01-01_broken" / "result_seed1.json").write_text("{")
    assert record.main(["check", "--all", "--root", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "result_seed1.json is no JSON" in said and "2026-01-02_sound: 0 findings" in said


@pytest.mark.parametrize("name", ["../train_gpt.py", "/etc/passwd", "a/../../b"])
def test_a_source_outside_the_folder_is_refused(name, copy, quick, capsys):
    copy.edit("result_seed1.json", lambda v: v["sources"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    assert record.main(["check", str(copy.folder)]) == 1
    assert "inside the folder" in capsys.readouterr().out
