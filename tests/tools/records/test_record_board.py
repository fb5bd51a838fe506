"""The board of records/README.md and the plots: built from the folders alone, reproducible, never silently stale."""

import json
import re
import shutil

import numpy as np
import plot
import pytest
import record
import tiny_runs
from record_board import BEGIN, END
from record_read import read_run

TRACK = "track_cpu_1min_16mb"


@pytest.fixture(scope="module")
def records(corpus, tmp_path_factory):
    """A track with a record of seeds 1 and 2, and one of seeds 2 and 3 that names it as its base."""
    folder = tmp_path_factory.mktemp("board") / "records"
    runs = [str(run) for run in tiny_runs.make_runs(corpus)]
    common = ["--track", TRACK, "--author", "A | B", "--github-id", "a", "--records", str(folder)]
    assert record.main(["new", *runs[:2], *common, "--slug", "first", "--date", "2026-01-01"]) == 0
    record.main(["new", *runs[1:], *common, "--slug", "second", "--date", "2026-01-02"])
    (folder / "README.md").write_text(f"# Records\n\n{BEGIN}\nout of date\n{END}\n\n## Rules\n")
    return folder


def board(records, *more):
    return record.main(["board", "--records", str(records), *more])


def test_the_board_ranks_by_the_mean_and_keeps_the_rest_of_the_page(records):
    assert board(records, "--check") == 1 and board(records) == 0 and board(records, "--check") == 0
    text = (records / "README.md").read_text()
    rows = re.findall(r"^\| (\d) \| ([\d.]+) ± ([\d.]+) \| (\d) \| \[(\S+)\]\((\S+)\) \| (.*?) \|", text, re.MULTILINE)
    scores = {run.seed: run.val_bpb for run in map(read_run, tiny_runs.work().glob("logs/run?"))}
    pairs = {"2026-01-01_first": (1, 2), "2026-01-02_second": (2, 3)}
    means = {name: np.mean([scores[seed] for seed in seeds]) for name, seeds in pairs.items()}
    expected = sorted(means, key=means.get)
    assert [row[4] for row in rows] == expected and [row[0] for row in rows] == ["1", "2"]
    assert all(float(row[1]) == pytest.approx(means[row[4]], abs=6e-5) for row in rows)
    assert all((records / row[5] / "submission.json").is_file() and row[6] == "A / B" for row in rows)
    assert "out of date" not in text and text.startswith("# Records\n") and text.endswith("## Rules\n")
    assert "the first" in text and "no, p = " in text


def test_a_stale_board_is_noticed_by_the_table_and_by_the_picture(records, tmp_path, capsys):
    copy = tmp_path / "records"
    shutil.copytree(records, copy)
    board(copy)
    text = (copy / "README.md").read_text()
    (copy / "README.md").write_text(text.replace("| 1 |", "| 3 |", 1))
    assert board(copy, "--check") == 1 and "README.md" in capsys.readouterr().out
    board(copy)
    shutil.rmtree(copy / TRACK / "2026-01-02_second")
    assert board(copy, "--check") == 1 and f"{TRACK}.svg" in capsys.readouterr().out
    shutil.rmtree(copy / TRACK)
    assert board(copy) == 0 and not list((copy / "board").iterdir())
    assert "No track holds a record yet." in (copy / "README.md").read_text()
    (copy / "README.md").write_text("no markers\n")
    assert board(copy) == 2 and "no place for the board" in capsys.readouterr().err


def test_the_committed_board_is_that_of_the_committed_records(capsys):
    assert board(tiny_runs.ROOT / "records", "--check") == 0, capsys.readouterr().out


def test_the_same_data_give_the_same_picture(records, tmp_path):
    one, two = tmp_path / "one.svg", tmp_path / "two.svg"
    for path in (one, two):
        assert plot.main([str(records / TRACK), "-o", str(path)]) == 0
    assert one.read_bytes() == two.read_bytes()
    text = one.read_text()
    assert all(label in text for label in ("val_bpb (bits per byte)", "first", "second", "limit: 16,000,000 bytes"))


def test_runs_are_drawn_against_steps_tokens_and_time(corpus, tmp_path):
    one, two, three = tiny_runs.make_runs(corpus)
    path = tmp_path / "runs.svg"
    assert plot.main([f"{one},{two}", str(three), "-o", str(path)]) == 0
    text = path.read_text()
    assert "run1,run2 (mean ± std, n = 2)" in text and all(label in text for label in plot.AXES.values())
    lines = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    curve = plot.curves(read_run(one))["train_loss"]
    assert curve["value"].tolist() == [line["train_loss"] for line in lines if "train_loss" in line]
    assert curve["tokens"][-1] == pytest.approx(24 * 256 / 1e6)
    assert curve["seconds"].tolist() == [line["train_seconds"] for line in lines if "train_loss" in line]


def test_metrics_are_read_while_a_run_goes_on_and_with_rubbish_in_them(corpus, tmp_path, capsys):
    folder = tmp_path / "going"
    shutil.copytree(tiny_runs.make_runs(corpus)[0], folder)
    picture = ["-o", str(tmp_path / "x.png")]
    (folder / "result.json").unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 25, "train_l')
    run = read_run(folder)
    assert [m["step"] for m in run.metrics() if "train_loss" in m] == list(range(1, 25)) and run.tokens_per_step == 256
    assert plot.main([str(folder), *picture]) == 0 and (tmp_path / "x.png").stat().st_size > 20_000
    assert plot.main([str(folder), *picture, "--panel", "train_loss,seconds"]) == 0
    assert plot.main([str(folder), *picture, "--panel", "loss"]) == 2
    (folder / "metrics.jsonl").write_bytes(RUBBISH)
    lines = [line for line in read_run(folder).metrics() if len(line) > 1]
    assert lines == [{"step": 8, "train_loss": 4.5}, {"step": 9, "train_loss": 4.0, "train_seconds": 0.5}]
    assert plot.main([str(folder), *picture]) == 0
    assert record.main(["compare", str(folder), str(folder)]) == 0


RUBBISH = b"""[1]
{"a": 1}
{"step": "x", "train_loss": 1}
{"step": 1, "train_loss": "x", "val_loss": []}
{"step": true, "train_loss": 2.0}
{"step": 2, "train_loss": null, "train_seconds": null}
{"step": 3, "train_loss": NaN, "train_seconds": Infinity}
null
\xff\xfe
{"step": 9, "train_loss": 4.0, "train_seconds": 0.5}
{"step": 8, "train_loss": 4.0}
{"step": 8, "train_loss": 4.5}
"""


def test_runs_without_numbers_are_named_and_make_no_picture_alone(corpus, tmp_path, capsys):
    one, folder = tiny_runs.make_runs(corpus)[0], tmp_path / "begun"
    shutil.copytree(one, folder)
    (folder / "metrics.jsonl").write_text("")
    picture = tmp_path / "x.png"
    assert plot.main([str(folder), "-o", str(picture)]) == 2 and not picture.exists()
    assert "begun has no numbers yet" in capsys.readouterr().err
    assert plot.main([str(folder), str(one), "-o", str(picture)]) == 0 and picture.exists()
    assert "begun has no numbers yet" in capsys.readouterr().err


def test_means_over_runs_and_over_steps():
    share = np.array([0.5, 1.0])
    one, other = ((share, np.array(x), np.array(y)) for x, y in (([10, 20.0], [4, 2.0]), ([20, 40.0], [6, 2.0])))
    x, mean, deviation = plot.mean_and_spread([one, other])
    assert x.tolist() == [15, 30] and mean.tolist() == [5, 2] and deviation.tolist() == [2**0.5, 0]
    assert plot.smooth(np.arange(100.0))[[0, 1, 50]].tolist() == [0, 0.5, 49.5]  # 2% of 100: two values


MISTAKES = [
    (["/nowhere"], "no such folder"),
    (["x", "-o", "a.gif"], "expected a .png"),
    (["x", "-o", "/nowhere/a.png"], "no folder /nowhere"),
    (["track_none"], "no record"),
]


@pytest.mark.parametrize("arguments, said", MISTAKES)
def test_a_mistake_in_plot_gets_one_line(arguments, said, capsys):
    assert plot.main(arguments) == 2 and said in capsys.readouterr().err
