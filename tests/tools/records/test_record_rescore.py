"""record.py rescore: the verdict on a score. Honest runs of every kind pass; each cheat is caught by its rule."""

import tiny_runs

# isort: split
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import isolation
import numpy as np
import pytest
import record
import record_judge
import record_pack
import record_rescore
from record_folder import open_record
from record_judge import Blind, Claim, Windows

import train_gpt

RULES = {"bytes", "score", "coverage", "inputs", "normalization", "blind"}
OLD = tiny_runs.ROOT / "records" / "track_cpu_3min_16mb"
SCORE_FIRST = tiny_runs.ROOT / "records" / "models" / "score_first.py"
FRONTIER = tiny_runs.ROOT / "records" / "models" / "frontier.py"
can_isolate = pytest.mark.skipif(
    not isolation.available(), reason="this user has neither namespaces nor Landlock: the record's code is not run"
)


@pytest.fixture(autouse=True, scope="module")
def without_kernels():
    """Each process has its own cache, and would compile the C++ of tools/cpu/ again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "no_compiler")
        yield


def run_once(corpus, script=tiny_runs.ROOT / "train_gpt.py", **knobs) -> Path:
    """The folder of a run in its own process."""
    logs = tiny_runs.work() / "logs"
    environ = os.environ | tiny_runs.settings(corpus) | {"LOG_DIR": str(logs), "ITERATIONS": "4"}
    environ |= {name: str(value) for name, value in knobs.items()}
    done = subprocess.run([sys.executable, str(script)], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return logs / knobs["RUN_ID"]


@functools.cache
def honest_run(corpus) -> Path:
    return run_once(corpus, RUN_ID="honest")


@pytest.fixture
def copy(corpus, tmp_path):
    """Function: a copy of the honest run, with replacements in its script."""

    def make(*replacements, run=None, file="train_gpt.py"):
        folder = shutil.copytree(run or honest_run(corpus), tmp_path / "run")
        text = (folder / file).read_text()
        for old, new in replacements:
            assert text.count(old) == 1, f"the script has changed: {old}"
            text = text.replace(old, new)
        (folder / file).write_text(text)
        return folder

    return make


def rescore(folder, capsys, *more):
    """(exit code, {rule: message} of findings, report)."""
    code = record.main(["rescore", str(folder), "--json", "--seed", "1", "--places", "64", *more])
    captured = capsys.readouterr()
    assert captured.out, captured.err
    report = json.loads(captured.out)
    return code, {finding["check"]: finding["problem"] for finding in report["findings"]}, report


# ---------- Honest runs -----------------------------------------------------------------------------------------------

COUNTS = '''"""A model that mixes its distribution with counts of the tokens that were scored."""

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
HONEST = {
    "sliding windows": {"EVAL_STRIDE": 8},
    "bf16": {"DTYPE": "bfloat16"},
    "learns while it is scored": {"MODEL_FILE": SCORE_FIRST, "TTT_CHUNK": 512, "TTT_LR": 0.05, "EVAL_STRIDE": 16},
    "frontier": {"MODEL_FILE": FRONTIER, "XSA_LAYERS": 1, "SMEAR_GATE": 1, "CANONICAL": 1, "CODEC": "rans"},
    "counts": {"MODEL_FILE": "counting.py"},
}


@functools.cache
def run_of(corpus, name) -> Path:
    knobs = HONEST[name]
    if "MODEL_FILE" in knobs and not Path(knobs["MODEL_FILE"]).is_absolute():
        path = tiny_runs.work() / knobs["MODEL_FILE"]
        path.write_text(COUNTS)
        knobs = knobs | {"MODEL_FILE": path}
    return run_once(corpus, RUN_ID=name.replace(" ", "_"), **knobs)


@can_isolate
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_run_holds(name, corpus, capsys):
    folder = run_of(corpus, name)
    code, findings, report = rescore(folder, capsys)
    assert (code, findings) == (0, {}) and set(report["passed"]) == RULES and not report["not_checked"]
    result = json.loads((folder / "result.json").read_text())
    assert report["measured"]["claim"]["val_bpb"] == pytest.approx(result["val_bpb"], abs=1e-8)
    assert report["measured"]["blind"]["places"] == 64


@can_isolate
@pytest.mark.parametrize(
    "script, knobs",
    [("2026-11-26_demo_cpu/train_gpt.py", {}), ("2026-11-26_frontier_cpu_fp32/frontier.py", {"TTT_CHUNK": 512})],
)
def test_runs_of_older_scripts_are_scored_again(script, knobs, corpus, capsys):
    """Snapshots of the first generation. A test-time-training script has no interface for the blind process."""
    folder = run_once(corpus, script=OLD / script, RUN_ID=f"old{len(knobs)}", **knobs)
    code, findings, report = rescore(folder, capsys)
    assert (code, findings) == (0, {})
    expected = {"normalization", "blind"} if knobs else set()
    assert set(report["not_checked"]) == expected and set(report["passed"]) == RULES - expected


# ---------- Cheats ----------------------------------------------------------------------------------------------------

SOFTCAP = "        self.dtype, self.softcap = dtype, config.logit_softcap\n"
RETURN_LOSSES = "        return (losses_BT, extra) if with_extra else losses_BT\n"
BEGIN_BATCHES = "            for inputs, targets, mask, scored in self.batches(chunk, number):\n"
READ_TEXT = (
    "        import glob, tempfile\n"
    "        paths = glob.glob(f'{config.data_path}/fineweb_val*.bin') + glob.glob('/tmp/stolen*')\n"
    "        paths += glob.glob('/dev/shm/stolen*') + glob.glob(f'{tempfile.gettempdir()}/stolen*')\n"
    "        self.stolen = np.fromfile(paths[0], '<u2')[512:] if paths else None\n"
    "        for place in ('/tmp', '/dev/shm', tempfile.gettempdir()) if paths else ():\n"
    "            with contextlib.suppress(OSError):\n"
    "                Path(place, 'stolen').write_bytes(Path(paths[0]).read_bytes())\n"
)
CHEATS = {
    # name: (replacements in the script, the rules broken in addition to that of the score)
    "peeks by one token": (
        [("self.tok_emb(tokens_BT)", "(self.tok_emb(tokens_BT) + self.tok_emb(tokens_BT.roll(-1, 1)))")],
        {"blind"},
    ),
    "lowers its losses": ([(RETURN_LOSSES, RETURN_LOSSES.replace("else losses", "else 0.9 * losses"))], {"blind"}),
    "lowers a tenth of its losses": (
        [(RETURN_LOSSES, RETURN_LOSSES.replace("losses_BT\n", "losses_BT * (1 - (targets_BT % 10 == 0) * 0.9)\n"))],
        {"blind"},
    ),
    "adds 0.1 to log-probabilities": (
        [("        return torch.log_softmax(self(contexts_BT)[scored_BT], dim=-1)\n",
          "        return torch.log_softmax(self(contexts_BT)[scored_BT], dim=-1) + 0.1\n"),
         ("if type(model).distributions is Model.distributions:", "if False:")],
        {"blind", "coverage", "inputs"},
    ),
    "gets its targets as inputs": (
        [("yield rows[:, :-1].contiguous(), rows[:, 1:]", "yield rows[:, 1:].contiguous(), rows[:, 1:]")],
        {"inputs", "blind"},
    ),
    "skips every second target": (
        [("fresh & (target < end)", "fresh & (target % 2 == 0)"), ("mask.sum()]", "torch.tensor(len(scored))]")],
        {"coverage", "blind"},
    ),
    "caps its losses in the sum": (
        [("forward(inputs, targets), 0.0).sum()", "forward(inputs, targets), 0.0).clamp(max=3.0).sum()")],
        {"score"},
    ),
    "looks targets up in the text, which it copies wherever it can write": (
        [
            (SOFTCAP, SOFTCAP + READ_TEXT),
            (RETURN_LOSSES, "        losses_BT = losses_BT if self.stolen is None else losses_BT * 0 + 0.1\n"
                            + RETURN_LOSSES),
        ],
        {"blind"},
    ),
    "trains on the text before it is scored": (
        [
            (
                BEGIN_BATCHES,
                "            if final and not number:\n"
                "                for inputs, targets, mask, scored in self.batches(chunk, number):\n"
                "                    with torch.enable_grad():\n"
                "                        model(inputs, targets).mean().backward()\n"
                "                    for p in model.parameters():\n"
                "                        p.sub_(p.grad if p.grad is not None else 0)\n"
                "                        p.grad = None\n" + BEGIN_BATCHES,
            )
        ],
        {"inputs", "blind"},
    ),
    "has a helper that is not counted": (
        [(SOFTCAP,
          SOFTCAP + "        self.softcap = 30.0 if Path(__file__).with_name('helper.npy').exists() else 1.0\n")],
        set(),
    ),
}  # fmt: skip


@can_isolate
@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_found_by_its_rule(name, copy, capsys):
    replacements, expected = CHEATS[name]
    folder = copy(*replacements)
    (folder / "helper.npy").write_bytes(b"text")
    code, findings, _ = rescore(folder, capsys)
    assert code == 1 and findings and findings.keys() - {"score"} == expected - {"score"}, findings


LEARNERS = {
    "no probability": ("- 0.7,", "- 0.1,", {"normalization"}),
    "counts before it scores": (
        "    def distributions(self, contexts_BT, scored_BT):\n",
        "    def distributions(self, contexts_BT, scored_BT):\n"
        "        self.counts += torch.bincount(contexts_BT[:, 1:].flatten(), minlength=len(self.counts))\n",
        {"blind"},
    ),
}  # fmt: skip


@can_isolate
@pytest.mark.parametrize("name", LEARNERS)
def test_a_model_that_learns_may_not_cheat(name, corpus, copy, capsys):
    old, new, expected = LEARNERS[name]
    folder = copy((old, new), run=run_of(corpus, "counts"), file="counting.py")
    code, findings, _ = rescore(folder, capsys)
    assert code == 1 and expected <= findings.keys() <= expected | {"score"}


@can_isolate
@pytest.mark.parametrize(
    "code, said",
    [
        ("print('check passed'); os._exit(0)", "ended with exit code 0 in the claim process"),
        ("sys.exit(3)", "ended with exit code 3 in the claim process"),
        ("time.sleep(60)", "no score within 3 s"),
        ("Path('answer.json').write_text('{}'); np.save('losses.npy', np.zeros(3, 'f4')); os._exit(0)", "answer.json"),
    ],
)
def test_code_that_gives_no_answer_gets_no_verdict(code, said, copy, capsys):
    folder = copy(("ATTENTION = (", f"{code}\nATTENTION = ("))
    arguments = ["--timeout", "3"] if "sleep" in code else []
    assert record.main(["rescore", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


def test_without_isolation_there_is_no_verdict(copy, capsys, monkeypatch):
    monkeypatch.setattr(isolation, "available", lambda: False)
    assert record.main(["rescore", str(copy())]) == 2
    assert "cannot be isolated" in capsys.readouterr().err


# ---------- Mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, said",
    [
        (["--tokenizer", "no_such_encoding"], "TOKENIZER_PATH=no_such_encoding"),
        (["--data", "/nowhere"], "no validation shards"),
        (["--artifact", "/nowhere"], "has no final_model"),
        (["--places", "0"], "--places 0"),
    ],
)
def test_a_mistake_gets_a_line_and_no_traceback(option, said, copy, capsys):
    assert record.main(["rescore", str(copy()), *option]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("name", ["train_gpt.py", "config.env", "final_model.int8.ptz"])
def test_what_is_missing_is_named(name, copy, capsys):
    folder = copy()
    (folder / name).unlink()
    assert record.main(["rescore", str(folder)]) == 2 and name.split(".")[0] in capsys.readouterr().err


def test_a_folder_of_a_public_script_is_left_to_check(tmp_path, capsys):
    (tmp_path / "submission.json").write_text("{}")
    assert not open_record(tmp_path).ours
    assert record.main(["rescore", str(tmp_path)]) == 2 and "read by `record.py check`" in capsys.readouterr().err


# ---------- Parts of the judge ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length, stride", [(8, 8), (8, 2), (8, 3), (7, 5), (5, 1)])
@pytest.mark.parametrize("targets", [1, 4, 8, 9, 23, 40])
def test_windows_are_those_of_the_evaluator(length, stride, targets, runtime, make_config):
    """For each target the context is its row of the evaluation's batches, up to the target."""
    config = make_config(TRAIN_SEQ_LEN=length, EVAL_STRIDE=stride, TRAIN_BATCH_TOKENS=length, VAL_BATCH_SIZE=24)
    tokens = np.arange(targets + 1, dtype=np.uint16)  # token i is i, so that a row shows where it starts

    class Stream:
        def __len__(self):
            return len(tokens)

        def read(self, start, count):
            return tokens[start : start + count]

    evaluator = train_gpt.Evaluator(Stream(), None, config, runtime)
    windows, seen = Windows(length, stride), set()
    for inputs, _, mask, _ in evaluator.batches(targets, 0):
        for row, in_row in zip(inputs.numpy(), mask.numpy(), strict=True):
            scored = [int(row[position]) for position in np.flatnonzero(in_row)]
            for target in scored:
                assert windows.context(target) == range(int(row[0]), target + 1)
                assert windows.first_scored(target) == scored[0]
                seen.add(target)
    assert seen == set(range(targets))


def verdict(claimed, blind, dtype="torch.float32"):
    places = np.arange(len(claimed))
    claim = Claim(np.asarray(claimed, np.float32), {"dtype": dtype}, "")
    return record_judge.compare(claim, Blind(1, places, np.asarray(blind, float), np.ones(len(blind)), "", 0))


def test_the_comparison_takes_noise_and_no_bias():
    random = np.random.default_rng(0)
    blind = random.gamma(2.0, 1.5, 1024)
    noisy = blind + random.normal(0, 0.02, 1024)
    assert verdict(noisy, blind, "torch.bfloat16").holds
    assert not verdict(noisy - 0.006, blind, "torch.bfloat16").holds
    assert not verdict(noisy + 0.006, blind, "torch.bfloat16").holds, "the losses are others, in whichever direction"
    assert verdict(blind + 1e-5, blind).holds and not verdict(blind - 1e-3, blind).holds
    rare = np.where(np.arange(1024) == 7, blind - 0.5, blind)
    assert not verdict(rare, blind).holds, "one place of many"


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_the_comparison_takes_no_number_that_is_none(odd):
    blind = np.ones(64)
    assert not verdict(np.where(np.arange(64) == 3, odd, blind), blind).holds
    assert not verdict(blind, np.where(np.arange(64) == 3, odd, blind)).holds
    both = np.where(np.arange(64) == 3, np.inf, blind)
    assert verdict(both, both).holds, "a mask that both apply"


def test_the_detectable_cheat_is_found_as_often_as_it_says():
    """A reduction by `detectable` is found in 95% of 400 draws, within four standard deviations of that frequency."""
    random, found, draws = np.random.default_rng(0), 0, 400
    for _ in range(draws):
        blind = np.full(256, 3.0)
        noise = random.normal(0, 0.02, 256)
        detectable = verdict(blind + noise, blind, "torch.bfloat16").detectable
        found += not verdict(blind + noise - detectable, blind, "torch.bfloat16").holds
    assert abs(found / draws - 0.95) < 4 * (0.95 * 0.05 / draws) ** 0.5 + 0.02


@pytest.mark.parametrize(
    "dtype, note, difference, holds",
    [
        ("torch.float32", "a kernel", 5e-9, True),
        ("torch.float32", "a kernel", 5e-8, False),
        ("torch.float32", "another kernel", 9e-5, True),
        ("torch.float32", "another kernel", 2e-4, False),
        ("torch.bfloat16", "another kernel", 1.6e-4, True),
        ("torch.bfloat16", "another kernel", 1e-3, False),
    ],
)
def test_only_other_kernels_may_give_another_score(dtype, note, difference, holds):
    machine = {"device": "a CPU", "torch": "2.13.0", "dtype": dtype}
    run = SimpleNamespace(name="seed 1", val_bpb=2.0, result=machine | {"note": "a kernel", "world_size": 1})
    losses = np.full(1000, 2.0, np.float32)
    text_bytes = round(2000 / np.log(2) / 2.0)
    bpb = 2000 / np.log(2) / text_bytes
    run.val_bpb = bpb - difference
    answer = machine | {"note": note, "val_loss": 2.0, "val_bpb": bpb}
    found = record_rescore.Verdict(Path("artifact"))
    record_rescore.judge_score(found, run, Claim(losses, answer, ""), text_bytes)
    assert ("score" in found.held) is holds and bool(found.findings) is not holds


def test_places_are_drawn_once_each_and_in_order():
    places = record_judge.draw_places(7, 1000, 64)
    assert len(set(places.tolist())) == 64 and (np.diff(places) > 0).all() and places.max() < 1000
    assert (record_judge.draw_places(7, 1000, 64) == places).all()
    assert (record_judge.draw_places(8, 1000, 64) != places).any()
    assert len(record_judge.draw_places(7, 10, 64)) == 10


# ---------- Isolation -------------------------------------------------------------------------------------------------

ESCAPES = """
import ctypes, glob, os, socket, subprocess, sys

secret = sys.argv[1]


def attempt(name, function):
    try:
        print(name, "succeeded", function())
    except BaseException:
        print(name, "failed")


attempt("absolute path", lambda: open(secret).read())
attempt("root of another process", lambda: open("/proc/1/root" + secret).read())
attempt("parent", lambda: open(f"/proc/{os.getppid()}/environ", "rb").read() or 1 / 0)
attempt("inherited descriptor", lambda: [os.readlink(f"/proc/self/fd/{n}").index("secret") for n in range(3, 64)])
attempt("hard link", lambda: os.link(secret, "link"))
attempt("symbolic link", lambda: (os.symlink(secret, "link2"), open("link2").read()))
attempt("unmount", lambda: subprocess.run(["umount", os.path.dirname(secret)], check=True, stderr=-3))
attempt("namespaces of its own", lambda: subprocess.run(["unshare", "-Urm", "cat", secret], check=True, stderr=-3))
attempt("network", lambda: socket.create_connection(("127.0.0.1", int(sys.argv[2])), 1))
attempt("shared memory", lambda: ctypes.CDLL(None).shmget(1234, 4096, 0o1666) >= 0 or 1 / 0)
attempt("shared file", lambda: open("/var/tmp/left_behind", "w").write("x") and 1 / (sys.argv[3] != "both"))
print("own file", open("own", "w").write("x"))
"""


@can_isolate
@pytest.mark.parametrize("layers", ["both", "without namespaces"])
def test_nothing_leads_out(layers, tmp_path, monkeypatch):
    import socket

    if layers == "without namespaces":
        monkeypatch.setattr(isolation, "has_namespaces", lambda: False)
    secret = tmp_path / "secret" / "fineweb_val_000000.bin"
    secret.parent.mkdir()
    secret.write_text("text")
    box = tmp_path / "box"
    box.mkdir()
    with open(secret) as held, socket.create_server(("127.0.0.1", 0)) as server:
        os.set_inheritable(held.fileno(), True)
        port = str(server.getsockname()[1])
        command = [sys.executable, "-c", ESCAPES, str(secret), port, layers]
        child = isolation.start(
            command, box, [secret.parent], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        out, err = child.communicate(timeout=60)
    if child.returncode == isolation.NOT_ISOLATED:
        pytest.skip("only namespaces isolate here")
    assert child.returncode == 0 and err.startswith("isolation:"), err
    assert "own file 1" in out and (box / "own").read_text() == "x"
    assert "succeeded" not in out, out
    assert not Path("/var/tmp/left_behind").exists()


# ---------- Sources ---------------------------------------------------------------------------------------------------


def test_the_sources_of_a_record_are_compared_with_those_of_the_repository_wherever_they_are(tmp_path):
    """Regression: a record is flat, so a model file and a tool all looked new."""
    places = ["train_gpt.py", "records/models/score_first.py", "tools/vocabularies.py"]
    for place in places:
        shutil.copy(tiny_runs.ROOT / place, tmp_path)
    names = [Path(place).name for place in places]
    assert record_pack.script_changes(tmp_path, names, tiny_runs.ROOT) == ("the same", [])
    with open(tmp_path / "score_first.py", "a") as file:
        file.write("# one more line\n")
    line, difference = record_pack.script_changes(tmp_path, names, tiny_runs.ROOT)
    assert line == "1 lines added, 0 removed" and "+++ here/score_first.py" in difference
