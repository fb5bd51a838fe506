"""The faults script with three kills; the full version, with twenty, is run by hand: python tests/faults.py."""

import re

import models
import pytest

FAULTS = models.SCRIPT.parent / "tests" / "faults.py"
PHASES = ["checkpoint", "export", "evaluation"]


@pytest.fixture
def faults(corpus, tmp_path):
    """Function: run the script with some knobs. Returns its exit code and output."""

    def run(*arguments, **knobs):
        environ = models.machine_settings(corpus, TMPDIR=tmp_path, VOCAB_SIZE=(corpus / "vocab_size").read_text())
        done = models.process(environ | knobs, tmp_path, script=FAULTS, args=["--rounds", "1", *arguments], timeout=500)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    return run


def test_a_run_killed_in_three_phases_ends_like_an_undisturbed_one(faults):
    code, out, errors = faults("--phases", *PHASES, VAL_TOKENS_LIMIT="4096", NUM_LAYERS="2", TRAIN_BATCH_TOKENS="512")
    assert code == 0, out + errors
    assert re.search(r"^3 kills in \d+ runs, 0 of which ended otherwise", out, re.MULTILINE) and "the same" in out


def test_without_data_the_command_that_makes_some_is_named(faults, tmp_path):
    code, _, errors = faults(DATA_PATH=str(tmp_path / "missing"))
    assert code == 1 and "Traceback" not in errors
    assert f"DATA_PATH={tmp_path / 'missing'}" in errors and "python data/prepare_shakespeare.py" in errors
