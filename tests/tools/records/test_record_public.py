"""record.py check on folders of the public challenge: small synthetic ones in each dialect. Sound ones raise nothing;
each kind of fault that public pull requests had is found, and no other finding is raised."""

import tiny_runs  # first: it knows where the tools are

# isort: split
import json
import math
import statistics
from pathlib import Path

import pytest
import record_check
import record_data
from record_folder import open_record

SCRIPT = "import torch\n\nprint('a model')\n"
RULER = "=" * 100
TOKENS = {"sp1024": 62_021_632, "sp4096": 45_514_752, "sp8192": 40_540_160}
assert tiny_runs.ROOT  # only there for the path


def loss_of(bpb, tokens, text_bytes=record_data.FINEWEB_BYTES):
    return bpb * math.log(2) * text_bytes / tokens


def march_log(
    seed,
    bpb,
    tokens=TOKENS["sp1024"],
    ms=599_920,
    text_bytes=record_data.FINEWEB_BYTES,
    code=SCRIPT,
    label="final_int8_zlib_roundtrip",
    source=True,
    total=15_887_250,
    extra="",
):
    """The reference's own log: its source, a ruler, then key:value lines."""
    loss = loss_of(bpb, tokens, text_bytes)
    return (
        (f"{code}\n{RULER}\n" if source else "")
        + f"""logs/run.txt
val_loader:shards pattern=./data/datasets/fineweb10B_sp1024/fineweb_val_*.bin tokens:{tokens}
model_params:17059912
world_size:8 grad_accum_steps:1
seed:{seed}
step:1/20000 train_loss:6.9408 train_time:24ms step_avg:23.99ms
step:200/20000 train_loss:2.7717 train_time:10524ms step_avg:52.62ms
step:8508/20000 val_loss:{loss - 0.006:.4f} val_bpb:{bpb - 0.0036:.4f} train_time:{ms}ms step_avg:{ms / 8508:.2f}ms
stopping_early: wallclock_cap train_time:{ms}ms step:8508/20000
Serialized model: 67224983 bytes
Code size: {len(code)} bytes
Total submission size: {67224983 + len(code)} bytes
Serialized model int8+zlib: {total - len(code)} bytes (payload:1 raw_torch:2 payload_ratio:3.91x)
Total submission size int8+zlib: {total} bytes
{label} val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:2098ms
{label}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}
{extra}"""
    )


def april_log(seed, bpb, ms=596_137, eval_s=455.3, total=15_989_499):
    """Spaces after the colons, indented hyperparameters, times in minutes, code plain and compressed, scores before
    and after the export, and learning while scoring."""
    tokens = TOKENS["sp8192"]
    loss = loss_of(bpb, tokens)
    return f"""Hyperparameters:
  adam_eps: 1e-08
  datasets_dir: ./data/datasets/fineweb10B_sp8192
  seed: {seed}
  world_size: 8
train_shards: 128
val_tokens: {tokens}
1/20000 train_loss: 9.0021 train_time: 0.0m tok/s: 8200000
4900/20000 train_loss: 2.4321 train_time: 9.8m tok/s: 6500000
4950/20000 val_loss: {loss + 0.02:.4f} val_bpb: {bpb + 0.008:.4f}
stopping_early: wallclock_cap train_time: {ms}ms step: 4950/20000
pre-quantization post-ema val_loss:{loss + 0.01:.8f} val_bpb:{bpb + 0.004:.8f} eval_time:7000ms
Serialized model: 135426937 bytes
Code size (uncompressed): {len(SCRIPT)} bytes
Code size (compressed): 20 bytes
Serialized model quantized+brotli: {total - 20} bytes
Total submission size quantized+brotli: {total} bytes
quantized val_loss:{loss + 0.02:.8f} val_bpb:{bpb + 0.008:.8f} eval_time:9000ms
quantized_sliding_window val_loss:{loss + 0.005:.8f} val_bpb:{bpb + 0.002:.8f} eval_time:91000ms
quantized_ttt val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{1000 * eval_s:.0f}ms
total_eval_time:{eval_s}s
"""


def sliding_log(seed, bpb, eval_ms=72_000):
    """The reference's log of a script that scores in overlapping windows, and states the time on that line alone."""
    loss = loss_of(bpb, TOKENS["sp1024"])
    return (
        march_log(seed, bpb)
        .replace(
            "final_int8_zlib_roundtrip val_loss:",
            (
                f"final_int6_sliding_window val_loss:{loss:.4f} val_bpb:{bpb:.4f} stride:64 eval_time:{eval_ms}ms\n"
                "final_int8_zlib_roundtrip_of_windows val_loss:"
            ),
            1,
        )
        .replace("eval_time:2098ms", "")
    )


def write(folder: Path, submission, logs, script=SCRIPT, readme=True):
    folder.mkdir(parents=True)
    if submission is not None:
        (folder / "submission.json").write_text(json.dumps(submission, indent=2))
    for name, text in logs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if script is not None:
        (folder / "train_gpt.py").write_text(script)
    if readme:
        (folder / "README.md").write_text("# A submission\n")
    return folder


def core(bpb, **more):
    return {"author": "A", "github_id": "a", "name": "A run", "date": "2026-03-19T04:48:00Z", "val_bpb": bpb} | more


SEEDS = {42: 1.08079123, 314: 1.08103456, 999: 1.08118789}
MEAN = statistics.fmean(SEEDS.values())


def three(**more):
    rows = {str(seed): {"val_bpb": round(bpb, 5), "artifact_bytes": 15_989_499} for seed, bpb in SEEDS.items()}
    deviation = round(statistics.stdev(SEEDS.values()), 5)
    return core(round(MEAN, 5), val_bpb_std=deviation, seeds=list(SEEDS), seed_results=rows) | more


def three_logs(**more):
    return {f"train_seed{seed}.log": april_log(seed, bpb, **more) for seed, bpb in SEEDS.items()}


SOUND = {
    "reference": (
        core(
            1.20319508,
            val_loss=round(loss_of(1.20319508, TOKENS["sp1024"]), 8),
            bytes_total=15_887_250,
            bytes_code=len(SCRIPT),
        ),
        {"train.log": march_log(1339, 1.20319508)},
    ),
    "rounded to four digits": (core(1.2032), {"train.log": march_log(1339, 1.20319508)}),
    "one step past the clock": (core(1.2032), {"train.log": march_log(1339, 1.20319508, ms=600_038)}),
    "launch day's text": (
        core(1.2244),
        {"train.log": march_log(1337, 1.2243657, tokens=63_779_840, text_bytes=record_data.LAUNCH_BYTES)},
    ),
    "six bits, sliding windows": (
        core(1.1502, bytes_total=15_887_250),
        {"train.log": march_log(1, 1.1502, label="final_int6_sliding_window")},
    ),
    "submitter, github number, artifact_size_bytes": (
        {
            "submitter": "A",
            "github_id": 12345,
            "title": "A run",
            "date": "2026-03-20",
            "mean_val_bpb": 1.2032,
            "artifact_size_bytes": 15_887_250,
        },
        {"log.txt": march_log(7, 1.20319508)},
    ),
    "three seeds": (three(), three_logs()),
    "seeds as rows": (
        three(seed_results=[{"seed": seed, "val_bpb": bpb} for seed, bpb in SEEDS.items()]),
        three_logs(),
    ),
    "bare scores by seed": (three(seed_results={f"seed_{seed}": bpb for seed, bpb in SEEDS.items()}), three_logs()),
    "an ablation's log beside": (three(), three_logs() | {"ablation_no_ttt.log": april_log(42, 1.0828)}),
    "an ablation of another seed": (three(), three_logs() | {"ablations/no_ttt_seed7.log": april_log(7, 1.0828)}),
    "a folder for each seed": (three(), {f"seed{seed}/train.log": april_log(seed, b) for seed, b in SEEDS.items()}),
    "several authors": (
        {k: v for k, v in core(1.2032).items() if k != "author"} | {"authors": ["A", "B"]},
        {"train.log": march_log(1339, 1.20319508)},
    ),
    "score as text": (core("1.2032"), {"train.log": march_log(1339, 1.20319508)}),
    "loss of the last validation": (
        core(1.2032, val_loss=round(loss_of(1.20319508, TOKENS["sp1024"]) - 0.006, 4)),
        {"train.log": march_log(1339, 1.20319508)},
    ),
    "mean loss before the export": (three(val_loss=round(loss_of(MEAN, TOKENS["sp8192"]) + 0.01, 5)), three_logs()),
    "mean loss": (three(val_loss=round(loss_of(MEAN, TOKENS["sp8192"]), 5)), three_logs()),
    "time beside the score in windows": (core(1.1502), {"train.log": sliding_log(1, 1.1502)}),
    "log with another ending": (core(1.2032), {"train.out": march_log(1, 1.20319508)}),
    "no source in the log": (core(1.2032), {"train.log": march_log(1, 1.20319508, source=False)}),
    "case marks": (
        core(1.0611),
        {
            "train.log": april_log(1, 1.0611)
            .replace("val_tokens: 40540160", "val_tokens: 47853343")
            .replace(
                f"val_loss:{loss_of(1.0611, TOKENS['sp8192']):.8f} val_bpb:1.06110000",
                f"val_loss:{loss_of(1.0611, 47_853_343):.8f} val_bpb:1.06110000",
            )
        },
    ),
}


def folder_in(tmp_path, track="track_10min_16mb"):
    return tmp_path / track / "2026-03-19_run"


def checks_of(report):
    return {finding["check"] for finding in report["findings"]}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_public_folder_raises_nothing(name, tmp_path):
    submission, logs = SOUND[name]
    report = record_check.examine(write(folder_in(tmp_path), submission, logs))
    assert report["findings"] == []
    assert {"score", "files", "schema", "bytes", "clock", "size"} <= set(report["passed"])


GOOD = march_log(1339, 1.20319508)
FAULTS = {
    "no log": (core(1.2032), {}, {}, "files"),
    "no script": (core(1.2032), {"train.log": GOOD}, {"script": None}, "files"),
    "no submission.json": (None, {"train.log": GOOD}, {}, "files"),
    "null score": (core(None), {"train.log": GOOD}, {}, "schema"),
    "no github_id": ({k: v for k, v in core(1.2032).items() if k != "github_id"}, {"train.log": GOOD}, {}, "schema"),
    "score that is not in its log": (core(1.1932), {"train.log": GOOD}, {}, "score"),
    "score as text that is not in its log": (core("1.1932"), {"train.log": GOOD}, {}, "score"),
    "loss that is not in its log": (core(1.2032, val_loss=2.0211), {"train.log": GOOD}, {}, "score"),
    "score before the export": (core(1.08479123), {"train_seed42.log": april_log(42, SEEDS[42])}, {}, "score"),
    "mean that is none": (three(val_bpb=1.0801), three_logs(), {}, "score"),
    "deviation that is none": (three(val_bpb_std=0.00002), three_logs(), {}, "score"),
    "a seed's score": (
        three(
            seed_results={str(s): {"val_bpb": b - 0.01 * (s == 42)} for s, b in SEEDS.items()},
            val_bpb=round(MEAN - 0.01 / 3, 5),
            val_bpb_std=0.0058,
        ),
        three_logs(),
        {},
        "score",
    ),
    "seed without a log": (three(), {k: v for k, v in three_logs().items() if "314" not in k}, {}, "seeds"),
    "best three of four": (three(), three_logs() | {"train_seed7.log": april_log(7, 1.0999)}, {}, "seeds"),
    "best three of four folders": (
        three(),
        {f"seed{seed}/train.log": april_log(seed, bpb) for seed, bpb in (SEEDS | {7: 1.0999}).items()},
        {},
        "seeds",
    ),
    "log of another seed": (three(), three_logs() | {"train_seed42.log": april_log(1, SEEDS[42])}, {}, "seeds"),
    "other code than in the log": (core(1.2032), {"train.log": GOOD}, {"script": SCRIPT + "x = 1\n"}, "script"),
    "other size than in the log": (
        core(1.2032),
        {"train.log": march_log(1339, 1.20319508, source=False)},
        {"script": SCRIPT + "x = 1\n"},
        "script",
    ),
    "claimed code": (core(1.2032, bytes_code=47_000), {"train.log": GOOD}, {}, "code"),
    "MiB for MB": (
        core(1.2032, bytes_total=16_500_000),
        {"train.log": march_log(1339, 1.20319508, total=16_500_000)},
        {},
        "size",
    ),
    "claimed size": (core(1.2032, bytes_total=15_000_000), {"train.log": GOOD}, {}, "size"),
    "over the clock": (core(1.2032), {"train.log": march_log(1339, 1.20319508, ms=612_000)}, {}, "clock"),
    "evaluation over the clock": (three(), three_logs(eval_s=633.0), {}, "clock"),
    "evaluation in windows over the clock": (core(1.1502), {"train.log": sliding_log(1, 1.1502, 633_000)}, {}, "clock"),
    "truncated validation": (
        core(1.2032),
        {"train.log": march_log(1339, 1.20319508, tokens=31_010_816, text_bytes=75_540_181)},
        {},
        "validation",
    ),
    "bytes counted 17% too high": (
        core(1.0284),
        {"train.log": march_log(1339, 1.02837186, text_bytes=176_764_025)},
        {},
        "bytes",
    ),
    "script that is no Python": (
        core(1.2032),
        {"train.log": march_log(1339, 1.20319508, code="import torch\ndef (\n")},
        {"script": "import torch\ndef (\n"},
        "compile",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_public_folders_is_found_alone(name, tmp_path):
    submission, logs, options, expected = FAULTS[name]
    report = record_check.examine(write(folder_in(tmp_path), submission, logs, **options))
    checks = checks_of(report)
    if expected == "compile" and "compile" in report["not_checked"]:
        pytest.skip("a newer Python may read it, and none is here")
    assert checks == {expected}, report["findings"]


def test_truncated_bytes_are_told_by_the_validation_check_alone(tmp_path):
    """The implied bytes of a cut text are wrong too; one fault, one finding."""
    submission, logs, _, _ = FAULTS["truncated validation"]
    report = record_check.examine(write(folder_in(tmp_path), submission, logs))
    assert [finding["check"] for finding in report["findings"]] == ["validation"]


def test_a_track_without_a_clock_asks_for_none(tmp_path):
    report = record_check.examine(
        write(
            folder_in(tmp_path, "track_non_record_16mb"),
            core(1.2032),
            {"train.log": march_log(1339, 1.20319508, ms=9_000_000)},
        )
    )
    assert report["findings"] == [] and "no clock" in report["not_checked"]["clock"]


def test_lines_of_each_dialect_are_read(tmp_path):
    march = open_record(write(folder_in(tmp_path), core(1.2), {"train.log": GOOD})).runs[0]
    assert (march.seed, march.steps, march.train_seconds, march.eval_seconds) == (1339, 8508, 599.92, 2.098)
    assert (march.bytes_total, march.tokens, march.log.source.strip()) == (15_887_250, 62_021_632, SCRIPT.strip())
    april = open_record(write(folder_in(tmp_path / "b"), three(), three_logs())).runs[0]
    assert (april.seed, april.steps, april.train_seconds, april.eval_seconds) == (314, 4950, 596.137, 455.3)
    assert april.val_bpb == SEEDS[314] and april.log.code_bytes == {20, len(SCRIPT)} and april.log.world_size == 8
