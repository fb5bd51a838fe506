"""ab.py: alternating pairs, what is measured, the interval, a restart after a stop."""

import json
import math
from pathlib import Path

import ab
import numpy as np
import pytest
import tiny_runs
from scipy import stats

FAKE = Path(__file__).with_name("fake_trainer.py")
ONE_PAIR = ["--pairs", "1", "--work", "w", "--warm-up", "0"]


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Two configurations of the stand-in: B's steps take 1.5 times as long and its score is 0.9 of A's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.env").write_text("LEVEL=2.0\nSTEP_MS=4\nSTEPS=20\n")
    (tmp_path / "b.env").write_text("LEVEL=1.8\nSTEP_MS=6\nSTEPS=20\n")
    return [f"{FAKE},a.env", f"{FAKE},b.env"]


def test_pairs_alternate_and_the_warm_up_does_not_count(two, tmp_path, capsys):
    assert ab.main([*two, "--pairs", "3", "--work", "w", "--json"]) == 0
    outputs = sorted(tmp_path.glob("w/*.out"), key=lambda path: path.stat().st_mtime_ns)
    order = "warm_up1_b warm_up1_a pair1_a pair1_b pair2_b pair2_a pair3_a pair3_b".split()
    assert [path.stem for path in outputs] == order
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["step_ms"]["ratio"] == pytest.approx(1.5) and found["step_ms"]["pairs"] == pytest.approx([1.5] * 3)
    assert found["tokens_per_second"]["ratio"] == pytest.approx(1 / 1.5)
    assert found["val_bpb"]["ratio"] == pytest.approx(0.9) and found["bytes_total"]["ratio"] == 1.0
    assert 0.5 < found["memory_mib"]["ratio"] < 2
    seeds = [path.read_text().split("seed:")[1][:4] for path in outputs]
    assert seeds == ["1337"] * 4 + ["1338"] * 2 + ["1339"] * 2


def test_it_continues_where_it_was_stopped_but_not_with_changed_files(two, tmp_path, monkeypatch, capsys):
    real, started = ab.launcher.start, []

    def start(target, knobs, folder, *ranks, anew):
        started.append(knobs["RUN_ID"])
        if started == ["pair1_a", "pair1_b", "pair2_b"]:
            (folder / "pair2_b").mkdir(parents=True)  # a run folder that was started
            raise KeyboardInterrupt
        return real(target, knobs, folder, *ranks, anew=anew)

    monkeypatch.setattr(ab.launcher, "start", start)
    arguments = [*two, "--pairs", "2", "--work", "w", "--warm-up", "0"]
    assert ab.main(arguments) == 130 and "continues" in capsys.readouterr().err
    assert ab.main(arguments) == 0
    assert started == ["pair1_a", "pair1_b", "pair2_b", "pair2_b", "pair2_a"]
    assert "val_bpb: B / A = 0.9000, no interval from so few pairs, n = 2" in capsys.readouterr().out
    assert ab.main([*arguments, "--ranks", "2"]) == 2 and "other files, seeds or ranks" in capsys.readouterr().err
    (tmp_path / "b.env").write_text("LEVEL=1.7\n")
    assert ab.main(arguments) == 2 and "pairs of other files" in capsys.readouterr().err


def test_a_run_that_fails_is_named_with_its_error(two, tmp_path, capsys):
    (tmp_path / "b.env").write_text("FAIL=True\n")
    assert ab.main([*two, *ONE_PAIR]) == 2
    error = capsys.readouterr().err
    assert "pair1_b ended with exit code 1: error: LEVEL is out of range: lower it" in error and "continues" in error


def test_the_interval_is_scipys_bootstrap_of_the_logarithms():
    a, b = [1.0, 2.0, 3.0, 4.0], [1.1, 2.3, 3.0, 4.6]
    found = ab.ratio(a, b)
    logs = np.log(np.array(b) / np.array(a))
    expected = stats.bootstrap((logs,), np.mean, n_resamples=ab.RESAMPLES, rng=0).confidence_interval
    assert found["ratio"] == pytest.approx(math.exp(logs.mean()))
    assert (found["low"], found["high"]) == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
    assert found["low"] < found["ratio"] < found["high"]
    assert ab.ratio([None, None], [1.0, 2.0]) is None


def test_the_script_of_this_repository_is_measured(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, rate in (("a", 0.02), ("b", 0.0)):
        knobs = tiny_runs.settings(corpus) | {"MATRIX_LR": rate}
        (tmp_path / f"{name}.env").write_text("".join(f"{knob}={text}\n" for knob, text in knobs.items()))
    assert ab.main(["a.env", "b.env", *ONE_PAIR, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    a, b = (json.loads((tmp_path / "w" / f"pair1_{side}" / "result.json").read_text()) for side in "ab")
    assert found["val_bpb"]["ratio"] == pytest.approx(b["val_bpb"] / a["val_bpb"]) and found["val_bpb"]["ratio"] > 1
    assert all(found[key] for key in ("step_ms", "tokens_per_second", "memory_mib", "bytes_total"))


@pytest.mark.parametrize("wrong", ["--pairs 0", "--pairs -3", "--warm-up -1", "--seed -1", "--ranks 0"])
def test_a_number_out_of_range_is_refused(wrong, two, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        ab.main([*two, "--work", "w", *wrong.split()])
    assert stopped.value.code == 2 and wrong.split()[0] in capsys.readouterr().err and not (tmp_path / "w").exists()
