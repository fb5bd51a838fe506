r"""Introduce deliberate faults into the product code, one at a time, and check that the tests find each of them.

    python tests/mutants.py                      all mutants
    python tests/mutants.py muon_shape           one of them
    python tests/mutants.py --table              print the list as a Markdown table
        python tests/mutants.py --sound              ignore tests that also fail without a fault

It works on a copy of the tracked files. A mutant that no test finds survives, and the exit code is 1. Tests that take
over five minutes count as failed, since a fault may also hang a run.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300  # seconds for the tests of one mutant

# file <- tests that should find its faults: test files, or FILE::TEST if the rest of the file is slow
# name: what the fault means to a user
# - text that occurs exactly once in the file
# + its replacement
TEXT = r"""
train_gpt.py <- tests/test_bytes.py
bytes_first_space: a document that begins with a space is a byte short if the tokenizer adds no space of its own
- self.boundary[previous] & self.strips_first_space)
+ self.boundary[previous])
bytes_manifest: a tokenizer that counts too many bytes passes the audit, and the score is too good
- require(total == kept_bytes,
+ require(total >= kept_bytes,

train_gpt.py <- tests/test_evaluation.py
score_last_target: the last token of the validation text is never scored
- self.total = len(stream) - 1
+ self.total = len(stream) - 2
score_count: a score that left out some targets is reported as if it were complete
- require(count == self.targets,
+ require(count <= self.targets,
score_window_bytes: with EVAL_STRIDE the bytes of the first window are missing, and the score is too bad
- begin + T - S if index else 0
+ begin + T - S

train_gpt.py <- tests/test_evaluation.py tests/records/models/test_score_first.py
score_peeks: test-time training sees one target before it is scored
- model.observe(self.stream.read(number * chunk, chunk + 1))
+ model.observe(self.stream.read(number * chunk + 1, chunk + 1))

train_gpt.py <- tests/test_export.py
export_scale: weights are rounded by another scale than the stored one, so the artifact errs more than it must
- (w / scale.float()[:, None]).round()
+ (w * qmax / clip.clamp(min=2.0**-24)[:, None]).round()
export_verdict: a submission that is too large because of its code is called OK
- verdict = "OK" if total <= limit
+ verdict = "OK" if len(blob) <= limit

train_gpt.py <- tests/test_training.py
export_not_read: the final score is that of the weights in memory and not of the artifact
- trainer.model.load_state_dict(coder.decode(runtime.broadcast(artifact)))
+ coder.decode(runtime.broadcast(artifact))
warmup_position: training skips the batches on which the warm-up compiled, so WARMUP_STEPS changes the result
- self.loader.seek(position)
+ self.loader.seek(self.loader.position)

train_gpt.py <- tests/tools/test_vocabularies.py
export_code_size: the code of vocabularies and case marks is neither counted in the submission nor kept with the run
- paths = [Path(files[key]) for name in SUBMISSION_TOOLS if (key := f"train_gpt.tools.{name}") in files]
+ paths = []

train_gpt.py <- tests/test_optimizer.py
muon_shape: tall matrices take steps that are too small, wide ones steps that are too large
- max(1, u.size(1) / u.size(2)) ** 0.5
+ max(1, u.size(2) / u.size(1)) ** 0.5

train_gpt.py <- tests/test_schedule.py
momentum_clamp: Muon's momentum rises beyond its final value, over 1 in a long run
- fraction = min(step / steps, 1.0) if steps else 1.0
+ fraction = step / steps if steps else 1.0

train_gpt.py <- tests/test_model.py
rope_frequencies: the rotary frequencies fall twice as fast, so half of them tell no positions apart
- frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
+ frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / (width // 2))

train_gpt.py <- tests/test_config.py
config_precedence: what an artifact records beats the FILE.env that the user gives
- texts = (from_artifact or {}) | texts | {
+ texts = texts | (from_artifact or {}) | {

train_gpt.py <- tests/test_ranks.py
ranks_no_sync: gradients are never averaged, so every rank trains a model of its own
- self.runtime.world_size > 1 and micro + 1 < len(inputs)
+ self.runtime.world_size > 1 and micro < len(inputs)

tools/checkpoint.py <- tests/tools/test_checkpoint.py
resume_clock: a resumed run gets its whole time again and trains for longer than the limit
- trainer.stopwatch.seconds["training"] = self.saved_at
+ trainer.stopwatch.seconds["training"] = 0.0

tools/artifact.py <- tests/tools/test_artifact.py
artifact_source: a file of the right name but of another sha256 is loaded, and so executed, as the model of an artifact
- return found[digests.index(wanted)]
+ return found[0]

tools/check.py <- tests/tools/test_check.py
check_size: MODE=check finds no fault with a submission that is too large because of its code
- if projected + code > config.size_limit:
+ if projected > config.size_limit:

tools/vocabularies.py <- tests/tools/test_vocabularies.py
marks_weight: the escape of case marks weighs nothing, so texts that hold marks are short of bytes
- table.zero_bytes = marks[:3]
+ table.zero_bytes = marks

tools/cpu/cpu_kernels_fp32.cpp <- tests/tools/cpu/test_cpu_kernels.py
kernel_mask: attention in the C++ for CPUs lets each token see the next one
- int32_t(std::min<i64>(ahead, LANES))
+ int32_t(std::min<i64>(ahead - 1, LANES))

data/tokenize_text.py <- tests/data/test_tokenize_text.py::test_at_least_one_document_is_validation
tokenizer_sample: a tokenizer also learns from the one document that becomes validation
- in heap if -key >= split.below)]
+ in heap)]

data/download_fineweb.py <- tests/data/test_download_fineweb.py
download_hash: damage to small files of a download, such as the tokenizer's vocabulary, is not noticed
- if digest != remote.digest:
+ if len(remote.digest) == 64 and digest != remote.digest:

tools/records/record_scores.py <- tests/tools/records/test_record_check.py::test_a_sabotage_is_found_by_its_check_alone
record_deviation: a record may claim the deviation of a population, which is smaller than that of a sample
- statistics.pstdev(scores)][: 1 if record.ours else 2]
+ statistics.pstdev(scores)]

tools/records/record_data.py <- tests/tools/records/test_record_check.py::test_a_sabotage_is_found_by_its_check_alone
record_leak: validation documents are found in the last training shard only
- found |= np.isin(hashes,
+ found = np.isin(hashes,

tools/experiments/ab.py <- tests/tools/experiments/test_ab.py
ab_order: A always runs before B, so that a machine that slows down favors A
- order = (0, 1) if number % 2 else (1, 0)
+ order = (0, 1)

records/models/coder.py <- tests/records/models/test_gptq.py
gptq_order: GPTQ puts the columns of a matrix back in the wrong order
- return q[order.argsort()].mT.contiguous()
+ return q[order].mT.contiguous()

records/models/frontier.py <- tests/records/models/test_techniques.py::test_losses_logits_and_gradients_equal_float64
frontier_groups: XSA pairs query heads with the wrong key-value heads
- y_BTKGd = y_BTHd.unflatten(2, (v_BTKd.size(2), -1))
-             v_BTK1d = F.normalize(v_BTKd, dim=-1).unsqueeze(3)
+ y_BTKGd = y_BTHd.unflatten(2, (-1, v_BTKd.size(2)))
+             v_BTK1d = F.normalize(v_BTKd, dim=-1).unsqueeze(2)

records/models/canonical.py <- tests/records/models/test_canonical.py::test_any_model_and_any_text
canonical_ties: the canonical mask excludes pairs of tokens that the tokenizer does write
- (a_leave < b_enter) & (b_leave <= a_enter)
+ (a_leave <= b_enter) & (b_leave <= a_enter)

records/ladders/small/small.py <- tests/records/ladders/test_small.py
ladder_dropout: dropout stays on while the model is scored
- F.dropout(x_BTD, self.dropout, self.training)
+ F.dropout(x_BTD, self.dropout)
"""


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    fault: str
    tests: tuple[str, ...]


def read_mutants(text: str) -> list[Mutant]:
    mutants = []
    for group in text.strip().split("\n\n"):
        place, faults = group.split("\n", 1)
        file, tests = place.split(" <- ")
        for name, fault, *change in re.findall(r"(\w+): (.+)\n((?:- .*\n)+)((?:\+ .*\n?)+)", faults):
            old, new = ("\n".join(line[2:] for line in part.splitlines()) for part in change)
            mutants.append(Mutant(name, file, old, new, fault, tuple(tests.split())))
    return mutants


MUTANTS = read_mutants(TEXT)


def copy_tree(target: Path):
    """Copy the tracked files of this checkout, as they are now."""
    names = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    for name in names.stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_tests(tree: Path, tests: tuple[str, ...], first: bool) -> list[str]:
    """The ids of the red tests."""
    temporary = tree.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    report = temporary / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "--tb=no", "-p", "no:cacheprovider"]
    command += ["-o", "junit_family=xunit1", f"--junitxml={report}", *(["-x"] if first else []), *tests]
    # Two mutants of equal size within one second would share the same compiled bytecode.
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(temporary)}
    process = subprocess.Popen(command, cwd=tree, env=environ, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        code = process.wait(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return ["hung"]
    finally:  # also after Ctrl+C
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # torchrun then ends its ranks, which have their own process groups
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            with contextlib.suppress(ProcessLookupError):  # all have already ended
                os.killpg(process.pid, signal.SIGKILL)
    if code not in (0, 1, 2):  # 1: failed tests; 2: a test file that cannot be imported
        raise RuntimeError(f"pytest ended with exit code {code}: {' '.join(command)}")
    cases = ET.parse(report).iter("testcase")
    red = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    names = [f"{case.get('file', '')}::{case.get('name')}" for case in red]
    return list(dict.fromkeys(names)) or [f"exit code {code}"] * bool(code)


def find(tree: Path, mutant: Mutant, first: bool) -> list[str]:
    """The tests that are red while the fault is in the tree."""
    path = tree / mutant.file
    sound = path.read_text(encoding="utf-8")
    assert sound.count(mutant.old) == 1, f"{mutant.name}: its old text does not occur once in {mutant.file}"
    path.write_text(sound.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        return run_tests(tree, mutant.tests, first)
    finally:
        path.write_text(sound, encoding="utf-8")


def table(chosen) -> str:
    """The list as a Markdown table, which is in README.md of this folder."""
    rows = [(mutant.name, mutant.file, mutant.fault, ", ".join(mutant.tests)) for mutant in chosen]
    lines = [("name", "file", "fault", "found by"), ("---",) * 4, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to try; default: all")
    parser.add_argument("--first", action="store_true", help="stop at the first red test of each")
    parser.add_argument("--sound", action="store_true", help="do not count tests that are red without a fault, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store {name: [red tests]}")
    parser.add_argument("--table", action="store_true", help="print the list as a Markdown table, and run nothing")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"there is no mutant {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in MUTANTS if mutant.name in arguments.names or not arguments.names]
    if arguments.table:
        print(table(chosen))
        return 0
    found, before = {}, set()
    with tempfile.TemporaryDirectory(prefix="mutants_", ignore_cleanup_errors=True) as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        for test in dict.fromkeys(test for mutant in chosen for test in mutant.tests) if arguments.sound else ():
            red = run_tests(tree, (test,), first=False)
            before |= {*red}
            print(f"{test}: {len(red)} red without a fault", *red, sep="\n  ", flush=True)
        first = arguments.first and not before  # otherwise the first failed test may be one of them
        for mutant in chosen:
            red = found[mutant.name] = [test for test in find(tree, mutant, first) if test not in before]
            print(f"{mutant.name}: {f'found by {len(red)}' if red else 'SURVIVES'}", *red, sep="\n  ", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
