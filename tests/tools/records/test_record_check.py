"""record.py check: a sound record passes; each of many sabotages is found by its own check and by no other."""

import tiny_runs  # first: it knows where the tools are

# isort: split
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import record
import record_check
from record_pack import TABLE, results_table
from record_read import record_runs

TRACK = "track_cpu_1min_16mb"


@pytest.fixture(scope="session")
def sound(corpus, tmp_path_factory):
    """A record of three seeds, made by the command."""
    records = tmp_path_factory.mktemp("records")
    arguments = ["--track", TRACK, "--slug", "sound", "--author", "A. Author", "--github-id", "aauthor", "--artifact"]
    folders = [str(folder) for folder in tiny_runs.make_runs(corpus)]
    assert record.main(["new", *folders, *arguments, "--date", "2026-01-31", "--records", str(records)]) == 0
    return records / TRACK / "2026-01-31_sound"


class Saboteur:
    """A copy of a sound record, and the ways to damage it."""

    def __init__(self, folder):
        self.folder = folder

    def path(self, name):
        return self.folder / name

    def results(self):
        return sorted(path.name for path in self.folder.glob("result_seed*.json"))

    def logs(self):
        return sorted(path.name for path in self.folder.glob("train_seed*.log"))

    def edit(self, name, change):
        """Let `change` alter the object in a JSON file."""
        value = json.loads(self.path(name).read_text())
        change(value)
        self.path(name).write_text(json.dumps(value))

    def submission(self, **fields):
        self.edit("submission.json", lambda value: value.update(fields))

    def sub(self, name, pattern, new):
        text = self.path(name).read_text()
        changed = re.sub(pattern, new, text, flags=re.MULTILINE)
        assert changed != text, f"{pattern} is not in {name}"
        self.path(name).write_text(changed)

    def readme(self):
        """Cover the traces: generate the table again."""
        text = self.path("README.md").read_text()
        fresh = results_table(record_runs(self.folder))
        self.path("README.md").write_text(re.sub(rf"{TABLE}\n\n(\|.*\n)+", lambda _: fresh + "\n", text))

    def grow(self, code=0, artifact=0):
        """Let every number of every file say that code and artifact have so many bytes more."""
        for name in self.results():
            self.edit(
                name,
                lambda v: v.update(
                    bytes_code=v["bytes_code"] + code,
                    bytes_artifact=v["bytes_artifact"] + artifact,
                    bytes_total=v["bytes_total"] + code + artifact,
                ),
            )
        for name in self.logs():

            def more(extra):
                return lambda match: match[1] + str(int(match[2]) + extra)

            self.sub(name, r"^(Total submission size int8\+zlib: )(\d+)", more(code + artifact))
            if code:
                self.sub(name, r"^(Code size: )(\d+)", more(code))
        self.edit(
            "submission.json",
            lambda v: v.update(bytes_total=v["bytes_total"] + code + artifact, bytes_code=v["bytes_code"] + code),
        )

        def rows(value):
            for row in value["seed_results"].values():
                row["artifact_bytes"] += artifact

        self.edit("submission.json", rows)
        self.readme()

    def halve_bpb(self):
        """As if every byte of the text had been counted twice."""
        for name in self.results():
            self.edit(name, lambda v: v.update(val_bpb=v["val_bpb"] / 2))
        for name in self.logs():
            self.sub(
                name,
                r"^(final_\S+ val_loss:\S+ val_bpb:)(\S+)",
                lambda m: f"{m[1]}{float(m[2]) / 2:.{len(m[2].split('.')[1])}f}",
            )

        def halve(value):
            value["val_bpb"] /= 2
            value["val_bpb_std"] /= 2
            for row in value["seed_results"].values():
                row["val_bpb"] /= 2

        self.edit("submission.json", halve)
        self.readme()

    def set_clock(self, seconds):
        self.edit("result_seed2.json", lambda v: v["seconds"].update(training=seconds))
        self.sub("train_seed2.log", r"train_time:\d+ms", f"train_time:{1000 * seconds:.0f}ms")

        def claim(value):
            value["wallclock_seconds"] = seconds
            value["seed_results"]["2"] |= {"train_time_s": seconds, "step_avg_ms": 1000 * seconds / 24}

        self.edit("submission.json", claim)
        self.readme()

    def set_eval(self, seconds):
        self.edit("result_seed2.json", lambda v: v.update(eval_seconds=seconds))
        self.sub("train_seed2.log", r"eval_time:\d+ms", f"eval_time:{1000 * seconds:.0f}ms")

        def claim(value):
            value["eval_time_seconds"] = value["seed_results"]["2"]["eval_time_s"] = seconds

        self.edit("submission.json", claim)
        self.readme()

    def claim_population_deviation(self):
        """That of a population is smaller than that of a sample."""

        def claim(value):
            value["val_bpb_std"] = float(np.std([row["val_bpb"] for row in value["seed_results"].values()]))

        self.edit("submission.json", claim)

    def drop_seed_three(self):
        """Keep the best two, with their own mean and deviation."""

        def drop(value):
            value["seeds"] = [1, 2]
            del value["seed_results"]["3"]
            for key in ("val_bpb", "val_loss"):
                rows = [row[key] for row in value["seed_results"].values()]
                value[key] = float(np.mean(rows))
            value["val_bpb_std"] = float(np.std([r["val_bpb"] for r in value["seed_results"].values()], ddof=1))

        self.edit("submission.json", drop)

    def leak(self, tmp_path, shard="train_000001"):
        """Train on the validation text too, by another copy of the data."""
        env = self.path("config.env").read_text()
        data = re.search(r'DATA_PATH="(.*)"', env)[1]
        leaky = tmp_path / "leaky"
        shutil.copytree(data, leaky)
        train, val = (np.fromfile(leaky / f"fineweb_{s}.bin", "<u2", offset=1024) for s in (shard, "val_000000"))
        header = np.fromfile(leaky / f"fineweb_{shard}.bin", "<i4", 256)
        header[2] = len(train) + len(val)
        (leaky / f"fineweb_{shard}.bin").write_bytes(header.tobytes() + train.tobytes() + val.tobytes())
        self.path("config.env").write_text(env.replace(data, str(leaky)))

    def rewrite_script(self, text):
        """Ship another script, and let every hash and every number agree with it."""
        old = len(self.path("train_gpt.py").read_bytes())
        self.path("train_gpt.py").write_text(text)
        for name in self.results():

            def rehash(value):
                value["sha256_code"] = record_check.record_code.sha256(self.path("train_gpt.py"))
                if "sources" in value:
                    value["sources"]["train_gpt.py"] = {"sha256": value["sha256_code"], "bytes": len(text)}

            self.edit(name, rehash)
        self.grow(code=len(text) - old)

    def swap_logs(self):
        one, two = self.path("train_seed1.log"), self.path("train_seed2.log")
        texts = one.read_text(), two.read_text()
        one.write_text(texts[1])
        two.write_text(texts[0])

    def truncate(self, targets):
        """A shorter validation text, and every number of targets with it."""
        for name in self.results():
            self.edit(name, lambda v: v.update(scored_tokens=targets, val_tokens=targets))
        for name in self.logs():
            self.sub(name, r"^(val_loader:.*tokens:)\d+", rf"\g<1>{targets}")

    def twice(self):
        for name in ("train_seed{}.log", "metrics_seed{}.jsonl", "result_seed{}.json"):
            shutil.copyfile(self.path(name.format(3)), self.path(name.format(4)))


def replace_row(row, **fields):
    return lambda value: value["seed_results"][row].update(fields)


def edit_result(seed, **fields):
    return lambda s, _: s.edit(f"result_seed{seed}.json", lambda value: value.update(fields))


def edit_all_results(**fields):
    return lambda s, _: [s.edit(name, lambda value: value.update(fields)) for name in s.results()]


SABOTAGES = {
    # name: (what is done to the folder, the check that must find it)
    "edited score": (lambda s, _: s.submission(val_bpb=0.9), "score"),
    "edited loss": (lambda s, _: s.submission(val_loss=1.9), "score"),
    "edited deviation": (lambda s, _: s.submission(val_bpb_std=0.001), "score"),
    "deviation of a population": (lambda s, _: s.claim_population_deviation(), "score"),
    "edited score of a seed": (lambda s, _: s.edit("submission.json", replace_row("2", val_bpb=0.9)), "score"),
    "best seed as the mean": (
        lambda s, _: s.submission(val_bpb=json.loads(s.path("result_seed1.json").read_text())["val_bpb"]),
        "score",
    ),
    "edited result": (edit_result(2, val_bpb=0.9), "score"),
    "edited log": (
        lambda s, _: s.sub("train_seed2.log", r"(_exact val_loss:\S+ val_bpb:)\S+", r"\g<1>0.90000000"),
        "score",
    ),
    "score before the export": (
        lambda s, _: s.edit(
            "result_seed1.json", lambda v: v.update(val_bpb=v["pre_quant_val_bpb"], val_loss=v["pre_quant_val_loss"])
        ),
        "score",
    ),
    "edited hardware": (lambda s, _: s.submission(hardware="8 x NVIDIA H100 80GB HBM3"), "claims"),
    "edited steps of a seed": (lambda s, _: s.edit("submission.json", replace_row("2", steps=25)), "claims"),
    "swapped logs": (lambda s, _: s.swap_logs(), "seeds"),
    "log of another seed": (
        lambda s, _: s.path("train_seed2.log").write_text(s.path("train_seed1.log").read_text()),
        "seeds",
    ),
    "dropped seed, mean of the rest": (lambda s, _: s.drop_seed_three(), "seeds"),
    "claimed seed without a log": (lambda s, _: s.submission(seeds=[1, 2, 3, 4]), "seeds"),
    "a seed twice": (lambda s, _: s.twice(), "seeds"),
    "no log": (lambda s, _: s.path("train_seed2.log").unlink(), "files"),
    "no script": (lambda s, _: s.path("train_gpt.py").unlink(), "files"),
    "no submission.json": (lambda s, _: s.path("submission.json").unlink(), "files"),
    "no README": (lambda s, _: s.path("README.md").unlink(), "files"),
    "null field": (lambda s, _: s.submission(github_id=None), "schema"),
    "score as text": (lambda s, _: s.submission(val_bpb="0.9389"), "schema"),
    "date that is none": (lambda s, _: s.submission(date="2026-02-30"), "schema"),
    "track of another folder": (lambda s, _: s.submission(track="track_10min_16mb"), "schema"),
    "cut submission.json": (lambda s, _: s.path("submission.json").write_text("{"), "schema"),
    "stale script": (
        lambda s, _: s.path("train_gpt.py").write_text(s.path("train_gpt.py").read_text() + "# one more change\n"),
        "script",
    ),
    "script that is no Python": (
        lambda s, _: s.rewrite_script(s.path("train_gpt.py").read_text() + "def broken(:\n"),
        "compile",
    ),
    "helper file not counted": (lambda s, _: s.path("helper.py").write_text("import train_gpt\n"), "code"),
    "code bytes of the claim": (lambda s, _: s.submission(bytes_code=40_000), "code"),
    "code bytes of every file": (lambda s, _: s.grow(code=-1000), "code"),
    "doubled bytes": (
        lambda s, _: s.edit("submission.json", lambda v: v.update(bytes_total=2 * v["bytes_total"])),
        "size",
    ),
    "MiB for MB": (lambda s, _: (s.path("final_model.int8.ptz").unlink(), s.grow(artifact=16_500_000)), "size"),
    "size in the log": (
        lambda s, _: s.sub("train_seed3.log", r"^(Total submission size int8\+zlib: )\d+", r"\g<1>99999"),
        "size",
    ),
    "artifact of another run": (lambda s, _: s.path("final_model.int8.ptz").write_bytes(b"another"), "artifact"),
    "changed configuration": (lambda s, _: s.sub("config.env", r"^MATRIX_LR=.*", 'MATRIX_LR="0.03"'), "config"),
    "one more knob": (
        lambda s, _: s.path("config.env").write_text(s.path("config.env").read_text() + 'NEW_KNOB="1"\n'),
        "config",
    ),
    "training over the cap": (lambda s, _: s.set_clock(61.0), "clock"),
    "evaluation over the cap": (lambda s, _: s.set_eval(61.0), "clock"),
    "a part of the validation text": (
        lambda s, _: (
            s.edit("result_seed2.json", lambda v: v.update(partial=True)),
            s.sub("train_seed2.log", r"^(final_int8_zlib_roundtrip.*)$", r"\1 partial:1000/2932"),
        ),
        "validation",
    ),
    "truncated validation": (lambda s, _: s.truncate(1000), "validation"),
    "bytes counted twice": (lambda s, _: s.halve_bpb(), "bytes"),
    "other bytes in a result": (edit_result(3, scored_bytes=18850), "bytes"),
    "tokenizer of one seed": (edit_result(3, sha256_tokenizer="0" * 64), "tokenizer"),
    "changed tokenizer": (edit_all_results(sha256_tokenizer="0" * 64), "tokenizer"),
    "validation documents in training": (lambda s, tmp_path: s.leak(tmp_path), "leak"),
    "validation documents in the first shard": (lambda s, tmp_path: s.leak(tmp_path, "train_000000"), "leak"),
    "edited table": (lambda s, _: s.sub("README.md", r"^\| 1 \| 0\.\d+", "| 1 | 0.80000"), "readme"),
    "beats no record": (lambda s, _: s.submission(base="2025-01-01_none"), "significance"),
}


@pytest.fixture
def copy(sound, tmp_path):
    folder = tmp_path / TRACK / sound.name
    shutil.copytree(sound, folder)
    return Saboteur(folder)


def found(folder):
    return {finding["check"] for finding in record_check.examine(folder)["findings"]}


def test_a_sound_record_passes_and_names_what_is_not_checked(sound):
    report = record_check.examine(sound)
    assert report["findings"] == []
    assert set(report["not_checked"]) == {"significance", *record_check.NEEDS_RESCORE}
    assert {"score", "bytes", "leak", "artifact", "readme"} <= set(report["passed"])


@pytest.mark.parametrize("name", SABOTAGES)
def test_a_sabotage_is_found_by_its_check_alone(name, copy, tmp_path):
    sabotage, expected = SABOTAGES[name]
    sabotage(copy, tmp_path)
    assert found(copy.folder) == {expected}


def test_a_record_that_does_not_beat_its_base_is_told_so(copy):
    shutil.copytree(copy.folder, copy.folder.parent / "2026-01-01_base")
    copy.submission(base="2026-01-01_base")
    (finding,) = record_check.examine(copy.folder)["findings"]
    assert finding["check"] == "significance" and "p = " in finding["problem"]


@pytest.fixture
def checkout(sound, tmp_path):
    """A repository with one commit, the branch `base`, and a function that commits the tree as it stands."""
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


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["check"], "nothing to check"),
        (["check", "/nowhere"], "no such folder"),
        (["check", "--all", "--root", "/nowhere"], "there is no /nowhere/records"),
        (["check", "--base", "no_such_ref"], "no_such_ref"),
        (["board", "--records", "/nowhere"], "no README.md"),
        (["compare", "/nowhere", "/nowhere"], "no such folder"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(arguments, said, capsys):
    assert record.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") <= 2


@pytest.mark.parametrize(
    "option, said",
    [
        (["--date", "2026-13-45"], "expected YYYY-MM-DD"),
        (["--author", " "], "--author"),
        (["--github-id", ""], "--github-id"),
        (["--slug", "../x"], "--slug ../x"),
        (["--slug", ""], "--slug"),
        (["--track", "nope"], "--track nope"),
    ],
)
def test_a_record_without_a_name_or_a_date_is_not_begun(option, said, corpus, tmp_path, capsys):
    """What `check` would find in any case is told before a folder is made."""
    records = tmp_path / "records"
    about = ["--track", TRACK, "--slug", "s", "--author", "A", "--github-id", "a", "--records", str(records)]
    assert record.main(["new", str(tiny_runs.make_runs(corpus)[0]), *about, *option]) == 2
    assert said in capsys.readouterr().err and not records.exists()


ODD = [None, "x", -1, 1e400, [1], {"a": 1}, True]
JSON_FILES = ("result_seed2.json", "submission.json", "data_manifest.json")


def places(value, path=()):
    """The way to every value in an object of objects."""
    for key, inner in value.items():
        yield (*path, key)
        yield from places(inner, (*path, key)) if isinstance(inner, dict) else ()


@pytest.mark.parametrize("name", JSON_FILES)
def test_no_value_of_a_wrong_kind_breaks_the_check(name, copy, monkeypatch):
    """Each value in turn is missing, or of another kind: every time there is an answer."""
    monkeypatch.setitem(record_check.CHECKS, "compile", lambda record: [])  # it reads none of them, and takes long
    monkeypatch.setitem(record_check.CHECKS, "leak", lambda record: [])
    whole = copy.path(name).read_text()
    for number, path in enumerate(places(json.loads(whole))):
        for odd in (ODD[number % len(ODD)], ODD[(number + 3) % len(ODD)], KeyError):
            value = json.loads(whole)
            inner = value
            for key in path[:-1]:
                inner = inner[key]
            if odd is KeyError:
                del inner[path[-1]]
            else:
                inner[path[-1]] = odd
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


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*JSON_FILES, "config.env"])
def test_a_file_that_cannot_be_read_is_a_finding_that_names_it(name, damage, copy, capsys):
    if (name, damage) == ("data_manifest.json", "a folder"):
        pytest.skip("as if there were none")
    DAMAGES[damage](copy.path(name))
    assert record.main(["check", str(copy.folder)]) == 1
    said = capsys.readouterr().out
    assert name in said.replace(str(copy.folder), "") and "remedy: " in said


def test_one_broken_record_does_not_keep_the_others_from_being_checked(sound, tmp_path, capsys):
    track = tmp_path / "records" / TRACK
    for name in ("2026-01-01_broken", "2026-01-02_sound"):
        shutil.copytree(sound, track / name)
    (track / "2026-01-01_broken" / "result_seed1.json").write_text("{")
    assert record.main(["check", "--all", "--root", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "result_seed1.json is no JSON" in said and "2026-01-02_sound: 0 findings" in said


@pytest.mark.parametrize("name", ["../train_gpt.py", "/etc/passwd", "a/../../b"])
def test_a_source_outside_the_folder_is_refused(name, copy, capsys):
    copy.edit("result_seed1.json", lambda v: v["sources"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    assert record.main(["check", str(copy.folder)]) == 1
    assert "inside the folder" in capsys.readouterr().out
