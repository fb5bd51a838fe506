"""tests/gpu_day.sh with a stand-in for Python, and tests/bench/profile_step.py on the CPU at the smallest size."""

import gzip
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_gpt

TESTS = Path(__file__).resolve().parent

# The commands of the parts: one passes, one fails, one hangs, and one lacks its kernel.
PYTHON = r"""#!/bin/bash
case "$*" in
  *device_count*) echo "$GPUS" ;;
  -) echo 'figure: 2 x a GPU' ;;
  *tokenize_text.py*) cat >/dev/null; echo 'train: 9 documents, 80 bytes, 40 tokens, 2.0 bytes per token' ;;
  *pytest.main*) setsid sleep 60 & echo $! >"$LOG_DIR/pid"; sleep 60 ;;
  *train_gpt.py*)
    echo "$* RUN_ID=$RUN_ID DATA_PATH=$DATA_PATH"
    echo 'step:7/20000 train_loss:2.5 train_time:9ms step_avg:1.3ms tok/s:99 mfu:40.0%'
    echo 'final_int8_zlib_roundtrip val_loss:2 val_bpb:1.25 eval_time:9ms' ;;
  *profile_step.py*)
    case "${ATTENTION:-}" in
      cudnn) printf 'RuntimeError: a crash\n\nx.ChildFailedError: \n===\n'; exit 1 ;;
      flash3) echo 'unavailable: ATTENTION=flash3 does not run on cuda; flash3 failed: no package'; exit 3 ;;
    esac
    echo "figure: 5 ms a step ${ATTENTION:-auto}" ;;
  *) exit 9 ;;
esac
"""


@pytest.fixture
def gpu_day(tmp_path):
    """Function: run the script with the stand-in. Returns the CompletedProcess."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(folder, **variables):
        environ = {name: text for name, text in os.environ.items() if name not in train_gpt.Config.knobs()}
        environ |= {"PYTHON": str(python), "GPUS": "5", "LIMIT_tests": "1"} | variables
        command = ["bash", str(TESTS / "gpu_day.sh"), str(folder)]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)

    return run


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(gpu_day, tmp_path):
    folder = tmp_path / "day"
    done = gpu_day(folder)
    assert done.returncode == 1, done.stdout + done.stderr
    summary = (folder / "summary.txt").read_text()
    assert done.stdout == summary and "SOME PARTS FAILED" in summary
    rows = {row[0]: (int(row[1]), row[2]) for row in re.findall(r"^(\w+) +(\d+) +\d+  (.*)$", summary, re.MULTILINE)}
    run = "step:7/20000 train_loss:2.5 step_avg:1.3ms tok/s:99 mfu:40.0% val_bpb:1.25"
    assert rows == {
        "environment": (0, "2 x a GPU"),
        "data": (0, "9 documents, 80 bytes, 40 tokens"),
        "steps": (0, "5 ms a step auto"),
        "tests": (124, "STOPPED after 1 s; "),
        "defaults": (0, run),
        "frontier": (0, run),
        "attention_flash": (0, "5 ms a step flash"),
        "attention_cudnn": (1, "FAILED: RuntimeError: a crash; "),
        "attention_efficient": (0, "5 ms a step efficient"),
        "attention_flash3": (3, "unavailable: no package"),
        "attention_math": (0, "5 ms a step math"),
    }
    pid = int((folder / "pid").read_text())  # has its own session, like a torchrun worker
    time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()
    # Five GPUs cannot share a batch of 96 sequences.
    log = (folder / "frontier.log").read_text()
    assert "--nproc_per_node=4 train_gpt.py records/recipes/frontier_sp1024.env RUN_ID=frontier" in log
    assert f"DATA_PATH={folder}/data/datasets/gpu_day_sp1024" in log
    again = gpu_day(folder)
    assert again.returncode == 2 and "is not empty" in again.stderr


def test_data_of_8192_pieces_that_is_given_is_what_the_frontier_trains_on(gpu_day, tmp_path):
    data = tmp_path / "fineweb_sp8192"
    data.mkdir()
    gpu_day(tmp_path / "day", GPUS="1", DATA_PATH=str(data))
    log = (tmp_path / "day" / "frontier.log").read_text()
    assert f"\ntrain_gpt.py records/recipes/frontier_sp8192.env RUN_ID=frontier DATA_PATH={data}\n" in log
    assert not (tmp_path / "day" / "data.log").exists()


@pytest.mark.parametrize("gpus", ["0", "ModuleNotFoundError: No module named 'torch'"])
def test_without_a_gpu_it_ends_at_once(gpu_day, tmp_path, gpus):
    done = gpu_day(tmp_path / "day", GPUS=gpus)
    assert done.returncode == 2 and not done.stdout and not (tmp_path / "day").exists()
    assert re.fullmatch(f"gpu_day: no CUDA GPU: .*{gpus}\n", done.stderr)


def test_the_script_tries_every_attention_kernel_that_auto_tries(make_config, monkeypatch):
    kernels = train_gpt.tool("kernels")
    monkeypatch.setattr(kernels.torch.cuda, "get_device_capability", lambda device: (9, 0))
    runtime = type("Runtime", (), {"device": kernels.torch.device("cuda")})
    (names,) = re.findall("^for attention in (.*); do$", (TESTS / "gpu_day.sh").read_text(), re.MULTILINE)
    assert sorted(names.split()) == sorted(kernels.attention_order(make_config(), runtime))


@pytest.fixture
def profile_step(tiny, tmp_path):
    """Function: run the bench on a tiny model. Returns the CompletedProcess."""

    def run(*options, **knobs):
        command = [sys.executable, str(TESTS / "bench" / "profile_step.py"), *map(str, options)]
        return subprocess.run(
            command, env=os.environ | tiny(**knobs), capture_output=True, text=True, timeout=120, check=False
        )

    return run


def test_profile_of_a_few_steps(profile_step, tmp_path):
    trace = tmp_path / "trace.json.gz"
    done = profile_step("--seconds", 0.01, "--rows", 3, "--trace", trace)
    assert done.returncode == 0, done.stderr
    figure = r"figure: [\d.]+ ms a step, [\d,]+ tokens/s, host [\d.]+ ms, \d+ operators a step, busy \d+% of it"
    assert re.fullmatch(figure, done.stdout.splitlines()[-1])
    table = re.findall(r"^ +[\d.]+ +[\d.]+% +\d+  \S.*$", done.stdout, re.MULTILINE)
    assert len(table) == 3
    assert any(
        event.get("name", "").startswith("aten::") for event in json.loads(gzip.open(trace).read())["traceEvents"]
    )


def test_a_kernel_that_does_not_run_here_is_unavailable(profile_step):
    done = profile_step("--profile", 0, ATTENTION="flash3")
    assert done.returncode == 3 and done.stdout.startswith("unavailable: ATTENTION=flash3 "), done.stderr
