"""record.py check on synthetic folders of the public challenge, in each of its log formats: valid folders raise no
finding, and each kind of fault that occurred in public pull requests raises one."""

import json
import math
import statistics

import pytest
import record_check
import record_data
from record_folder import open_record

SCRIPT = "import torch\n\nprint('a model')\n"
TOKENS = {"sp1024": 62_021_632, "sp8192": 40_540_160, "case marks": 47_853_343}


def loss_of(bpb, tokens=TOKENS["sp1024"], text_bytes=record_data.FINEWEB_BYTES):
    return bpb * math.log(2) * text_bytes / tokens


def march_log(
    seed=1339,
    bpb=1.20319508,
    tokens=TOKENS["sp1024"],
    ms=599_920,
    text_bytes=record_data.FINEWEB_BYTES,
    code=SCRIPT,
    label="final_int8_zlib_roundtrip",
    source=True,
    total=15_887_250,
):
    """The reference's own log: its source, a ruler, then key:value lines."""
    loss = loss_of(bpb, tokens, text_bytes)
    head = f"{code}\n{'=' * 100}\n" if source else ""
    return f"""{head}logs/run.txt
val_loader:shards pattern=./data/datasets/fineweb10B_sp1024/fineweb_val_*.bin tokens:{tokens}
model_params:17059912
world_size:8 grad_accum_steps:1
seed:{seed}
step:1/20000 train_loss:6.9408 train_time:24ms step_avg:23.99ms
step:8508/20000 val_loss:{loss - 0.006:.4f} val_bpb:{bpb - 0.0036:.4f} train_time:{ms}ms step_avg:{ms / 8508:.2f}ms
stopping_early: wallclock_cap train_time:{ms}ms step:8508/20000
Serialized model: 67224983 bytes
Code size: {len(code)} bytes
Total submission size: {67224983 + len(code)} bytes
Serialized model int8+zlib: {total - len(code)} bytes (payload:1 raw_torch:2 payload_ratio:3.91x)
Total submission size int8+zlib: {total} bytes
{label} val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:2098ms
{label}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}
"""


def april_log(seed, bpb, ms=596_137, eval_s=455.3, total=15_989_499, tokens=TOKENS["sp8192"]):
    """Spaces after the colons, indented hyperparameters, times in minutes, code size plain and compressed, scores
    before and after the export, and test-time training."""
    loss = loss_of(bpb, tokens)
    return f"""Hyperparameters:
  adam_eps: 1e-08
  datasets_dir: ./data/datasets/fineweb10B_sp8192
  seed: {seed}
  world_size: 8
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


def sliding_log(eval_ms=72_000):
    """The reference's log of a script that scores in overlapping windows, and states the time only on that line."""
    window = f"final_int6_sliding_window val_loss:{loss_of(1.1502):.4f} val_bpb:1.1502 stride:64 eval_time:{eval_ms}ms"
    old, new = "final_int8_zlib_roundtrip val_loss:", "final_int8_zlib_roundtrip_of_windows val_loss:"
    return march_log(1, 1.1502).replace(old, f"{window}\n{new}", 1).replace("eval_time:2098ms", "")


@pytest.fixture
def write(tmp_path):
    """Function: a folder of the challenge; a string is its only log, None omits a file."""

    def make(submission, logs, script=SCRIPT, track="track_10min_16mb"):
        folder = tmp_path / track / "2026-03-19_run"
        texts = {"train.log": logs} if isinstance(logs, str) else logs
        texts = texts | {"train_gpt.py": script, "README.md": "# A submission\n"}
        texts["submission.json"] = submission and json.dumps(submission)
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if text is not None:
                (folder / name).write_text(text)
        return folder

    return make


def core(bpb=1.2032, **more):
    return {"author": "A", "github_id": "a", "name": "A run", "date": "2026-03-19T04:48:00Z", "val_bpb": bpb} | more


def without(key, submission):
    return {name: value for name, value in submission.items() if name != key}


SEEDS = {42: 1.08079123, 314: 1.08103456, 999: 1.08118789}
MEAN = statistics.fmean(SEEDS.values())
MEAN_LOSS = loss_of(MEAN, TOKENS["sp8192"])
ROWS = [{"seed": seed, "val_bpb": bpb} for seed, bpb in SEEDS.items()]
OTHER_NAMES = {"submitter": "A", "github_id": 12345, "title": "A run", "date": "2026-03-20", "mean_val_bpb": 1.2032}
FOLDERS = {f"seed{seed}/train.log": april_log(seed, bpb) for seed, bpb in SEEDS.items()}
GOOD, GOOD_LOSS = march_log(), loss_of(1.20319508)


def three(**more):
    rows = {str(seed): {"val_bpb": round(bpb, 5), "artifact_bytes": 15_989_499} for seed, bpb in SEEDS.items()}
    deviation = round(statistics.stdev(SEEDS.values()), 5)
    return core(round(MEAN, 5), val_bpb_std=deviation, seeds=list(SEEDS), seed_results=rows) | more


def three_logs(**more):
    return {f"train_seed{seed}.log": april_log(seed, bpb, **more) for seed, bpb in SEEDS.items()}


SOUND = {  # name: (submission.json, logs)
    "reference": (core(1.20319508, val_loss=round(GOOD_LOSS, 8), bytes_total=15_887_250, bytes_code=len(SCRIPT)), GOOD),
    "rounded to four digits": (core(), GOOD),
    "one step past the clock": (core(), march_log(ms=600_038)),
    "launch day's text": (core(1.2244), march_log(1, 1.2243657, 63_779_840, text_bytes=record_data.LAUNCH_BYTES)),
    "six bits, windows": (core(1.1502, bytes_total=15_887_250), march_log(1, 1.1502, label="final_int6_windows")),
    "other names, a number, another size": (OTHER_NAMES | {"artifact_size_bytes": 15_887_250}, {"log.txt": GOOD}),
    "three seeds": (three(), three_logs()),
    "seeds as rows": (three(seed_results=ROWS), three_logs()),
    "bare scores by seed": (three(seed_results={f"seed_{seed}": bpb for seed, bpb in SEEDS.items()}), three_logs()),
    "an ablation's log beside": (three(), three_logs() | {"ablation_no_ttt.log": april_log(42, 1.0828)}),
    "an ablation of another seed": (three(), three_logs() | {"ablations/no_ttt_seed7.log": april_log(7, 1.0828)}),
    "a folder for each seed": (three(), FOLDERS),
    "several authors": (without("author", core()) | {"authors": ["A", "B"]}, GOOD),
    "score as text": (core("1.2032"), GOOD),
    "loss of the last validation": (core(val_loss=round(GOOD_LOSS - 0.006, 4)), GOOD),
    "mean loss before the export": (three(val_loss=round(MEAN_LOSS + 0.01, 5)), three_logs()),
    "mean loss": (three(val_loss=round(MEAN_LOSS, 5)), three_logs()),
    "time beside the score in windows": (core(1.1502), sliding_log()),
    "log with another ending": (core(), {"train.out": GOOD}),
    "no source in the log": (core(), march_log(source=False)),
    "case marks": (core(1.0611), april_log(1, 1.0611, tokens=TOKENS["case marks"])),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_public_folder_raises_nothing(name, write):
    report = record_check.examine(write(*SOUND[name]))
    assert report["findings"] == []
    assert {"score", "files", "schema", "bytes", "clock", "size"} <= set(report["passed"])


LOWER = {str(seed): {"val_bpb": bpb - 0.01 * (seed == 42)} for seed, bpb in SEEDS.items()}
LOWER = three(seed_results=LOWER, val_bpb=round(MEAN - 0.01 / 3, 5), val_bpb_std=0.0058)
NO_PYTHON, CHANGED = "import torch\ndef (\n", SCRIPT + "x = 1\n"
FAULTS = {  # name: (check, submission.json, logs, script)
    "no log": ("files", core(), {}),
    "no script": ("files", core(), GOOD, None),
    "no submission.json": ("files", None, GOOD),
    "null score": ("schema", core(None), GOOD),
    "no github_id": ("schema", without("github_id", core()), GOOD),
    "score that is not in its log": ("score", core(1.1932), GOOD),
    "score as text that is not in its log": ("score", core("1.1932"), GOOD),
    "loss that is not in its log": ("score", core(val_loss=2.0211), GOOD),
    "score before the export": ("score", core(1.08479123), april_log(42, SEEDS[42])),
    "mean that is none": ("score", three(val_bpb=1.0801), three_logs()),
    "deviation that is none": ("score", three(val_bpb_std=0.00002), three_logs()),
    "a seed's score": ("score", LOWER, three_logs()),
    "seed without a log": ("seeds", three(), without("train_seed314.log", three_logs())),
    "best three of four": ("seeds", three(), three_logs() | {"train_seed7.log": april_log(7, 1.0999)}),
    "best three of four folders": ("seeds", three(), FOLDERS | {"seed7/train.log": april_log(7, 1.0999)}),
    "log of another seed": ("seeds", three(), three_logs() | {"train_seed42.log": april_log(1, SEEDS[42])}),
    "other code than in the log": ("script", core(), GOOD, CHANGED),
    "other size than in the log": ("script", core(), march_log(source=False), CHANGED),
    "claimed code": ("code", core(bytes_code=47_000), GOOD),
    "MiB for MB": ("size", core(bytes_total=16_500_000), march_log(total=16_500_000)),
    "claimed size": ("size", core(bytes_total=15_000_000), GOOD),
    "over the clock": ("clock", core(), march_log(ms=612_000)),
    "evaluation over the clock": ("clock", three(), three_logs(eval_s=633.0)),
    "evaluation in windows over the clock": ("clock", core(1.1502), sliding_log(633_000)),
    "truncated validation": ("validation", core(), march_log(tokens=31_010_816, text_bytes=75_540_181)),
    "bytes counted 17% too high": ("bytes", core(1.0284), march_log(bpb=1.02837186, text_bytes=176_764_025)),
    "script that is no Python": ("compile", core(), march_log(code=NO_PYTHON), NO_PYTHON),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_public_folders_is_found_alone(name, write):
    expected, *files = FAULTS[name]
    report = record_check.examine(write(*files))
    if expected == "compile" and "compile" in report["not_checked"]:
        pytest.skip("a newer Python may read it, and none is here")
    assert [finding["check"] for finding in report["findings"]] == [expected] * len(report["findings"])
    assert report["findings"]


def test_a_track_without_a_clock_asks_for_none(write):
    report = record_check.examine(write(core(), march_log(ms=9_000_000), track="track_non_record_16mb"))
    assert report["findings"] == [] and "no clock" in report["not_checked"]["clock"]


def test_a_text_that_is_not_known_is_not_judged(write):
    log = march_log(tokens=1000, text_bytes=2400).replace("fineweb10B_sp1024", "other")
    report = record_check.examine(write(core(), log))
    assert report["findings"] == [] and {"validation", "bytes"} <= report["not_checked"].keys()


def test_lines_of_each_dialect_are_read(write):
    march = open_record(write(core(1.2), GOOD)).runs[0]
    assert (march.seed, march.steps, march.train_seconds, march.eval_seconds) == (1339, 8508, 599.92, 2.098)
    assert (march.bytes_total, march.tokens, march.log.source.strip()) == (15_887_250, 62_021_632, SCRIPT.strip())
    april = open_record(write(three(), three_logs(), track="april")).runs[0]
    assert (april.seed, april.steps, april.train_seconds, april.eval_seconds) == (314, 4950, 596.137, 455.3)
    assert april.val_bpb == SEEDS[314] and april.log.code_bytes == {20, len(SCRIPT)}
