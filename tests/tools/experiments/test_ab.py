"""ab.py: alternating pairs, what is measured, the interval, going on after a stop."""

import tiny_runs  # first: it knows where the tools are

# isort: split
import json
import math
from pathlib import Path

import ab
import numpy as np
import pytest
from scipy import stats

FAKE = Path(__file__).with_name("fake_trainer.py")


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Two configurations of the stand-in: B's steps take 1.5 times as long and its score is 0.9 of A's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.env").write_text("LEVEL=2.0\nSTEP_MS=4\nSTEPS=20\n")
    (tmp_path / "b.env").write_text("LEVEL=1.8\nSTEP_MS=6\nSTEPS=20\n")
    return [f"{FAKE},a.env", f"{FAKE},b.env"]


def order_of(folder):
    return [path.stem for path in sorted(folder.glob("*.out"), key=lambda path: path.stat().st_mtime_ns)]


def test_pairs_alternate_and_the_warm_up_does_not_count(two, tmp_path, capsys):
    assert ab.main([*two, "--pairs", "3", "--work", "w", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert order_of(tmp_path / "w") == [
        "warm_up1_b",
        "warm_up1_a",
        "pair1_a",
        "pair1_b",
        "pair2_b",
        "pair2_a",
        "pair3_a",
        "pair3_b",
    ]
    found = json.loads(out[-1])
    assert found["step_ms"]["ratio"] == pytest.approx(1.5) and found["step_ms"]["pairs"] == pytest.approx([1.5] * 3)
    assert found["tokens_per_second"]["ratio"] == pytest.approx(1 / 1.5)
    assert found["val_bpb"]["ratio"] == pytest.approx(0.9) and found["bytes_total"]["ratio"] == 1.0
    assert 0.5 < found["memory_mib"]["ratio"] < 2
    outputs = [(tmp_path / "w" / f"pair{n}_{side}.out").read_text() for n in (1, 2) for side in "ab"]
    seeds = [text.split("seed:")[1][:4] for text in outputs]
    assert seeds == ["1337", "1337", "1338", "1338"]


def test_it_goes_on_where_it_was_stopped(two, tmp_path, monkeypatch, capsys):
    real, started = ab.launcher.start, []

    def start(target, knobs, folder):
        if knobs["RUN_ID"] == "pair2_b" and "pair2_b" not in started:
            started.append("pair2_b")
            (folder / "pair2_b").mkdir(parents=True)  # a run folder that was begun
            raise KeyboardInterrupt
        started.append(knobs["RUN_ID"])
        return real(target, knobs, folder)

    monkeypatch.setattr(ab.runner, "start", start)
    arguments = [*two, "--pairs", "2", "--work", "w", "--warm-up", "0"]
    assert ab.main(arguments) == 130 and "goes on" in capsys.readouterr().err
    assert ab.main(arguments) == 0
    assert started == ["pair1_a", "pair1_b", "pair2_b", "pair2_b", "pair2_a"]
    assert "val_bpb: B / A = 0.9000, no interval from so few pairs, n = 2" in capsys.readouterr().out


def test_a_changed_file_is_refused(two, tmp_path, capsys):
    arguments = [*two, "--pairs", "1", "--work", "w", "--warm-up", "0"]
    assert ab.main(arguments) == 0
    (tmp_path / "b.env").write_text("LEVEL=1.7\n")
    assert ab.main(arguments) == 2 and "pairs of other files" in capsys.readouterr().err


def test_a_run_that_fails_is_named_with_its_error(two, tmp_path, capsys):
    (tmp_path / "b.env").write_text("FAIL=True\n")
    assert ab.main([*two, "--pairs", "1", "--work", "w", "--warm-up", "0"]) == 2
    error = capsys.readouterr().err
    assert "pair1_b ended with exit code 1: error: LEVEL is not to be had: lower it" in error and "goes on" in error


def test_the_interval_is_scipys_bootstrap_of_the_logarithms():
    a, b = [1.0, 2.0, 3.0, 4.0], [1.1, 2.3, 3.0, 4.6]
    found = ab.ratio(a, b)
    logs = np.log(np.array(b) / np.array(a))
    expected = stats.bootstrap((logs,), np.mean, n_resamples=ab.RESAMPLES, rng=0).confidence_interval
    assert found["ratio"] == pytest.approx(math.exp(logs.mean()))
    assert (found["low"], found["high"]) == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
    assert found["low"] < found["ratio"] < found["high"]
    assert ab.ratio([None, None], [1.0, 2.0]) is None


def test_a_public_script_gets_its_knobs_as_environment_and_a_folder_of_its_own(tmp_path, monkeypatch):
    """It reads no FILE.env, and leaves its model where it runs."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "train.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "assert not sys.argv[1:]\n"
        "pathlib.Path('final_model.pt').write_text('x')\n"
        "print('step:1/1 train_loss:1.0 train_time:' + os.environ['MS'] + 'ms step_avg:1ms')\n"
        "print('final_int8_zlib_roundtrip_exact val_loss:2.0 val_bpb:1.00000000')\n"
    )
    for name, ms in (("a", 10), ("b", 20)):
        (tmp_path / f"{name}.env").write_text(f"MS={ms}\n")
    assert ab.main([f"{script},a.env", f"{script},b.env", "--pairs", "1", "--work", "w", "--warm-up", "0"]) == 0
    assert {path.parent.name for path in tmp_path.glob("w/*/final_model.pt")} == {"pair1_a", "pair1_b"}
    assert not (tmp_path / "final_model.pt").exists()


def test_the_script_of_this_repository_is_measured(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, rate in (("a", 0.02), ("b", 0.0)):
        knobs = tiny_runs.settings(corpus) | {"MATRIX_LR": rate}
        (tmp_path / f"{name}.env").write_text("".join(f"{knob}={text}\n" for knob, text in knobs.items()))
    assert ab.main(["a.env", "b.env", "--pairs", "1", "--work", "w", "--warm-up", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    a, b = (json.loads((tmp_path / "w" / f"pair1_{side}" / "result.json").read_text()) for side in "ab")
    assert found["val_bpb"]["ratio"] == pytest.approx(b["val_bpb"] / a["val_bpb"]) and found["val_bpb"]["ratio"] > 1
    assert all(found[key] for key in ("step_ms", "tokens_per_second", "memory_mib", "bytes_total"))


@pytest.mark.parametrize("wrong", [["--pairs", "0"], ["--pairs", "-3"], ["--warm-up", "-1"], ["--seed", "-1"]])
def test_a_number_of_pairs_that_is_none_is_refused(wrong, two, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        ab.main([*two, "--work", "w", *wrong])
    assert stopped.value.code == 2 and wrong[0] in capsys.readouterr().err and not (tmp_path / "w").exists()


@pytest.mark.parametrize("spec", ["/nowhere.env", "a.txt", "a.env,b.env"])
def test_a_target_that_is_none_gets_one_line(spec, two, tmp_path, capsys):
    (tmp_path / "a.txt").touch()
    assert ab.main([spec, two[1]]) == 2 and "expected FILE.env" in capsys.readouterr().err


@pytest.mark.parametrize("spec", ["records/models/frontier.py", "records/models/tiny.py,a.env", "mine.py"])
def test_a_model_file_is_no_program_and_the_message_says_what_to_do(spec, two, tmp_path, capsys):
    """It would end at once, without a word."""
    (tmp_path / "mine.py").write_text("from train_gpt import Config as Base\n\n\nclass Config(Base):\n    seed = 1\n")
    spec = str(tiny_runs.ROOT / spec) if spec.startswith("records") else spec
    script = spec.split(",")[0]
    assert ab.main([two[0], spec, "--work", "w"]) == 2
    said = f"{script} is a model file and no program: put MODEL_FILE={script} into a FILE.env and give that"
    assert said in capsys.readouterr().err and not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "script, ours",
    [
        ("train_gpt.py", True),
        ("tests/tools/experiments/fake_trainer.py", True),
        ("records/track_cpu_3min_16mb/2026-11-26_demo_cpu/train_gpt.py", True),
        ("records/track_cpu_3min_16mb/2026-11-26_frontier_cpu_fp32/frontier.py", True),
        ("tools/experiments/plot.py", False),
    ],
)
def test_the_script_its_copies_and_older_model_files_take_a_configuration_file(script, ours):
    assert ab.launcher.parse_target(str(tiny_runs.ROOT / script)).ours == ours
