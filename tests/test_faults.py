"""The faults script with three kills; the full one, with twenty, is run by hand: python tests/faults.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import train_gpt

FAULTS = Path(__file__).resolve().parent / "faults.py"


def test_a_run_killed_in_three_phases_ends_like_an_undisturbed_one(corpus, tmp_path):
    environ = {name: text for name, text in os.environ.items() if name not in train_gpt.Config.knobs()}
    environ |= {
        "DATA_PATH": str(corpus / "data"),
        "TOKENIZER_PATH": str(corpus / "tok.model"),
        "TMPDIR": str(tmp_path),
        "VOCAB_SIZE": (corpus / "vocab_size").read_text(),
        "VAL_TOKENS_LIMIT": "4096",
        "NUM_LAYERS": "2",
        "TRAIN_BATCH_TOKENS": "512",
    }
    command = [sys.executable, str(FAULTS), "--rounds", "1", "--phases", "checkpoint", "export", "evaluation"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^3 kills in \d+ runs, 0 of which ended otherwise", done.stdout, re.MULTILINE), done.stdout
    assert "the same" in done.stdout


def test_without_data_it_says_which_command_brings_some(tmp_path):
    environ = {name: text for name, text in os.environ.items() if name not in train_gpt.Config.knobs()}
    command = [sys.executable, str(FAULTS), "--rounds", "1"]
    environ |= {"DATA_PATH": str(tmp_path / "nowhere"), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"DATA_PATH={tmp_path / 'nowhere'}" in done.stderr and "python data/prepare_shakespeare.py" in done.stderr
