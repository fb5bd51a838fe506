"""Measure how fast this machine trains, scores and exports, by part. Prints a table, then JSON in the last line.

    python tests/bench/speed.py                                  all parts at the bench shape
    python tests/bench/speed.py --parts step,split --pairs 15    step, split, start, evaluation, export, growth
    python tests/bench/speed.py --shape reference                bench, demo or reference
    MODEL_DIM=512 python tests/bench/speed.py                    any knob of train_gpt.py

bench: 4 layers, width 256, sequence 256, 8,192 tokens a step, vocabulary 1,024. demo: the shape of demo_cpu.env.
reference: 9 layers, width 512, sequence 1,024; 8,192 tokens a step on a CPU, 65,536 on a GPU, as on each of eight.

Contenders take turns in one process (start-up: each in its own process), so that speed drift of the machine affects
all alike: quote the ratios, which compare neighbors in time. Every figure is a median over --pairs rounds (7), with
the minimum and the maximum. The baseline is tests/bench/plain.py, compiled and eager.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import plain  # noqa: E402
from bench_tools import (  # noqa: E402
    FRONTIER,
    RANS,
    build_trainer,
    parse,
    random_loader,
    random_stream,
    random_weights,
    spread,
    take_turns,
    timed,
    train_gpt,
)

kernels = train_gpt.tool("kernels")

BENCH = parse("NUM_LAYERS=4 MODEL_DIM=256 NUM_HEADS=4 NUM_KV_HEADS=2 TRAIN_SEQ_LEN=256 GRAD_ACCUM_STEPS=1")
REFERENCE_TOKENS = 65_536 if torch.cuda.is_available() else 8192
SHAPES = {
    "bench": BENCH | parse("TRAIN_BATCH_TOKENS=8192"),
    "demo": BENCH | parse("TRAIN_BATCH_TOKENS=4096 VOCAB_SIZE=2048"),
    "reference": parse(f"TRAIN_SEQ_LEN=1024 TRAIN_BATCH_TOKENS={REFERENCE_TOKENS} GRAD_ACCUM_STEPS=1"),
}
# Small eager shapes; one knob at a time grows twofold and fourfold; heads stay 64 wide.
GROWING = parse("TRAIN_SEQ_LEN=128 MODEL_DIM=128 NUM_LAYERS=2 VOCAB_SIZE=512 TRAIN_BATCH_TOKENS=2048")
STEPS_ALONE = 15  # per process, after those that compile
PHASES = ("data", "forward", "backward", "clipping", "muon", "adamw", "collectives")


def load_config(knobs: dict) -> train_gpt.Config:
    texts = {name: str(value) for name, value in ({"MAX_WALLCLOCK_SECONDS": 0} | knobs).items()}
    return train_gpt.Config.load([], texts | dict(os.environ))


class Table:
    """Figures, each printed as soon as it is known, and kept for the JSON."""

    def __init__(self):
        self.figures = {}

    def add(self, name: str, values, unit: str):
        median, least, most = statistics.median(values), min(values), max(values)
        self.figures[name] = {"median": median, "least": least, "most": most, "n": len(values), "unit": unit}
        print(f"{name:48} {spread(values, 4)} {unit}", flush=True)


def product_call(runtime):
    """(function that runs a few square matmuls in the trainer's dtype, their total FLOPs)."""
    size, count = (8192, 10) if runtime.device.type == "cuda" else (1024, 20)
    left, right = (torch.randn(size, size, device=runtime.device).to(runtime.dtype) for _ in range(2))

    def multiply():
        for _ in range(count):
            left @ right

    return multiply, 2 * size**3 * count


def is_default_model(config) -> bool:
    """Whether the plain port, which supports all shapes but only this architecture, is the same model."""
    if type(config) is not train_gpt.Config or not config.tie_embeddings:
        return False
    shape = "TRAIN_SEQ_LEN VOCAB_SIZE NUM_LAYERS MODEL_DIM NUM_HEADS NUM_KV_HEADS MLP_MULT LOGIT_SOFTCAP ROPE_BASE"
    scored_by = "TRAIN_BATCH_TOKENS GRAD_ACCUM_STEPS MICRO_BATCH_TOKENS VAL_BATCH_SIZE EVAL_STRIDE"
    free = {*shape.split(), *scored_by.split()}
    return all(
        name in free or not field.metadata["artifact"] or getattr(config, field.name) == field.default
        for name, field in config.knobs().items()
    )


def contenders(config, runtime) -> dict:
    """{name: function that runs one step}: ours, and the plain port both eager and, if ours is compiled, compiled."""
    trainer = build_trainer(config, runtime)
    print(trainer.note)
    calls = {"ours": lambda: trainer.step(1.0, 0.95)}
    if not is_default_model(config):
        print("no plain contender: it knows no other architecture than the default")
        return calls
    compiled = {True, False} if trainer.compiled_model is not trainer.model else {False}
    for works in sorted(compiled, reverse=True):
        other = plain.PlainTrainer(config, runtime.device, runtime.dtype, compiled=works)
        loader = random_loader(config, runtime)
        name = "plain, compiled" if works else "plain, eager"
        calls[name] = lambda other=other, loader=loader: other.step(*loader.next_step())
    return calls


def bench_step(config, runtime, rounds: int, table: Table):
    """Time the contenders' steps, in turn with the matmuls that bound them."""
    calls = contenders(config, runtime)
    with torch.device("meta"):
        model = config.model_class()(config)
    params, tokens = sum(p.numel() for p in model.parameters()), config.train_batch_tokens
    multiply, flops = product_call(runtime)
    for call in (multiply, *calls.values()):
        for _ in range(3):
            call()
    taken = take_turns({"product": multiply} | calls, rounds, runtime.synchronize)
    rates = [flops / time for time in taken["product"]]
    table.add("product, GFLOP/s", [rate / 1e9 for rate in rates], "GFLOP/s")
    for name in calls:
        table.add(f"{name}: step", [1e3 * time for time in taken[name]], "ms")
        table.add(f"{name}: speed", [tokens / time for time in taken[name]], "tokens/s")
        for label, each in (
            ("6 * parameters", 6 * params),
            ("all products", kernels.flops_per_token(model, config.train_seq_len)),
        ):
            shares = [each * tokens / time / rate for time, rate in zip(taken[name], rates, strict=True)]
            table.add(f"{name}: MFU by {label}", shares, "of the product's rate")
    for name in list(calls)[1:]:
        ratios = [theirs / ours for theirs, ours in zip(taken[name], taken["ours"], strict=True)]
        table.add(f"ours over {name}", ratios, "times as fast")


def split_step(trainer, clock) -> dict[str, float]:
    """One training step, split into phases: seconds of each by `clock`, which waits for the device.
    On one rank nothing is reduced."""
    marks, spent = [clock()], dict.fromkeys(PHASES, 0.0)

    def lap(phase):
        marks.append(clock())
        spent[phase] += marks[-1] - marks[-2]

    inputs, targets = trainer.loader.next_step()
    lap("data")
    for tokens, expected in zip(inputs, targets, strict=True):
        loss = trainer.train_model(tokens, expected).mean() / len(inputs)
        lap("forward")
        loss.backward()
        lap("backward")
    if trainer.config.grad_clip_norm:
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.config.grad_clip_norm)
        lap("clipping")
    for optimizer in trainer.optimizers:
        muon = isinstance(optimizer, train_gpt.Muon)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"]
            if muon:
                group["momentum"] = 0.95
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        lap("muon" if muon else "adamw")
    return spent


def bench_split(config, runtime, rounds: int, table: Table):
    """Time a step's phases, in turn with complete steps: waiting between phases may make their sum longer."""
    trainer = build_trainer(config, runtime)

    def clock():
        runtime.synchronize()
        return time.perf_counter()

    for _ in range(3):
        split_step(trainer, clock)
    whole, parts = [], []
    for _ in range(rounds):
        whole.append(timed(trainer.step, 1.0, 0.95, wait=runtime.synchronize)[1])
        parts.append(split_step(trainer, clock))
    table.add("split: whole step", [1e3 * time for time in whole], "ms")
    for phase in PHASES:
        table.add(f"split: {phase}", [1e3 * part[phase] for part in parts], "ms")
    sums = [sum(part.values()) / time for part, time in zip(parts, whole, strict=True)]
    table.add("split: sum of the phases over the whole", sums, "")


def child(config, contender: str, spawned: float):
    """Run one contender in its own process, so that the other has set up nothing: times from process start to the
    first step and to the third, then of some more steps. Prints JSON. Memory is the GPU's tensors, or on
    a CPU the process including its compiler."""
    imported = time.time()
    runtime = train_gpt.Runtime(config, {})
    with contextlib.redirect_stdout(sys.stderr):
        if contender == "ours":
            trainer = build_trainer(config, runtime)
            step = lambda: trainer.step(1.0, 0.95)  # noqa: E731
        else:
            compiled, _ = kernels.choose_compile(config, runtime)
            other = plain.PlainTrainer(config, runtime.device, runtime.dtype, compiled)
            loader = random_loader(config, runtime)
            step = lambda: other.step(*loader.next_step())  # noqa: E731
        built = time.time()
        times = [timed(step, wait=runtime.synchronize)[1] for _ in range(3)]
        steps = [timed(step, wait=runtime.synchronize)[1] for _ in range(STEPS_ALONE)]
    if runtime.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        import resource  # imported here: Windows has no such module

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = {
        "imports": imported - spawned,
        "model and optimizers": built - imported,
        "compilation": times[0] - times[2],
    }
    found |= {"start to first step": built + times[0] - spawned, "step": statistics.median(steps)}
    print(json.dumps(found | {"peak memory": peak / 2**20}))


def bench_start(config, shape: str, rounds: int, table: Table):
    """Start processes in turn: with an empty cache of compiled code, then again with the cache filled by the first."""
    found, names = {}, ["ours", "plain"] if is_default_model(config) else ["ours"]
    caches = ("eager",) if config.compile == "0" else ("empty cache", "warm cache")
    for turn in range(rounds):
        for name in names[:: -1 if turn % 2 else 1]:
            with tempfile.TemporaryDirectory() as cache:
                for cached in caches:
                    environ = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
                    command = [sys.executable, __file__, "--shape", shape, "--child", name, str(time.time())]
                    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
                    if done.returncode:
                        raise SystemExit(f"{name} did not start:\n{done.stderr[-2000:]}")
                    for phase, value in json.loads(done.stdout.splitlines()[-1]).items():
                        found.setdefault((name, cached, phase), []).append(value)
    for (name, cached, phase), values in found.items():
        table.add(f"{name}, {cached}: {phase}", values, "MiB" if "memory" in phase else "s")
    for cached in caches * ("plain" in names):
        for phase in ("start to first step", "step"):
            pairs = zip(*(found[name, cached, phase] for name in ("plain", "ours")), strict=True)
            table.add(f"ours over plain, {cached}: {phase}", [theirs / ours for theirs, ours in pairs], "times as fast")


def bytes_table(config) -> train_gpt.TokenBytes:
    """A byte table in which every token has one byte; the counting itself is the trainer's."""
    table, size = train_gpt.TokenBytes.__new__(train_gpt.TokenBytes), config.vocab_size
    table.byte_count, table.boundary = np.ones(size, int), np.zeros(size, bool)
    table.leading_space, table.strips_first_space = np.zeros(size, bool), True
    return table


def bench_evaluation(config, runtime, rounds: int, table: Table):
    """Eight batches of chunks and of windows, in turn with forwards over the same inputs, already on the device."""
    model, compiled_model, _ = train_gpt.build_model(config, runtime)
    T, rows = config.train_seq_len, max(1, config.train_batch_tokens // config.train_seq_len)
    for label, stride in (("chunks", T), ("windows", config.eval_stride or max(1, T // 4))):
        targets = T + (8 * rows - 1) * stride
        scoring = replace(config, eval_stride=stride, val_batch_size=rows * T, val_tokens_limit=0)
        evaluator = train_gpt.Evaluator(random_stream(config, targets + 1), bytes_table(config), scoring, runtime)
        batches = [batch[:2] for batch in evaluator.batches(evaluator.targets, 0)]

        @torch.no_grad()
        def forward(batches=batches):
            compiled_model.eval()
            for inputs, expected in batches:
                compiled_model(inputs, expected)
            compiled_model.train()

        calls = {"score": lambda evaluator=evaluator: evaluator.score(model, compiled_model), "forward": forward}
        for call in calls.values():
            call()
        taken = take_turns(calls, rounds, runtime.synchronize)
        table.add(f"evaluation by {label} of {stride}", [targets / time for time in taken["score"]], "tokens/s")
        ratios = [score / pure for score, pure in zip(taken["score"], taken["forward"], strict=True)]
        table.add(f"evaluation by {label} over a pure forward", ratios, "times as long")


def serialized(artifact: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(artifact, buffer)
    return buffer.getvalue()


def unpacked(blob: bytes) -> dict:
    """Read an artifact as the coder does before it dequantizes."""
    assert hashlib.sha256(blob[:-32]).digest() == blob[-32:]
    return torch.load(io.BytesIO(zlib.decompress(blob[:-32])), weights_only=True)


def export_phases(state: dict, config, folder: Path) -> dict[str, float]:
    """Seconds of each phase from the weights to the artifact on disk and back."""
    spent = {}

    def phase(name, call, *args):
        result, spent[name] = timed(call, *args)
        return result

    run_folder = train_gpt.tool("checkpoint").RunFolder(train_gpt.Runtime(config, {}))  # verifies what it has written
    run_folder.path = folder
    coder = config.coder_class()(config)
    artifact = phase("quantize", coder.quantize, state)
    if rans := getattr(config, "codec", "") == "rans":
        artifact = phase("rans", coder.rans_pack, artifact)
    raw = phase("serialize", serialized, artifact)
    stream = phase("zlib", zlib.compress, raw, 9)
    blob = stream + hashlib.sha256(stream).digest()
    phase("write and read back", run_folder.write, "artifact", blob)
    artifact = phase("unpack", lambda: unpacked((folder / "artifact").read_bytes()))
    if rans:
        artifact = phase("decode rans", coder.rans_unpack, artifact)
    phase("dequantize", coder.dequantize, artifact)
    return spent


def bench_export(config, rounds: int, table: Table):
    """Compare the script's coder with the frontier's, in turns, on random weights.

    Compression takes about as long as with trained weights. rANS needs a frontier configuration of the same shape.
    """
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in config.model_class()(config).state_dict().items()}
    state = random_weights(shapes)
    shape = {
        name: text for name, text in config.as_env().items() if train_gpt.Config.knobs()[name].metadata["artifact"]
    }
    codecs = {"zlib": config, "rans": train_gpt.load_model_file(str(FRONTIER)).load([], shape | RANS)}
    taken = {name: [] for name in codecs}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, coded in codecs.items():
                taken[name].append(export_phases(state, coded, Path(folder)))
    for name, parts in taken.items():
        for phase in parts[0]:
            table.add(f"export, {name}: {phase}", [1e3 * part[phase] for part in parts], "ms")
        table.add(f"export, {name}: in all", [1e3 * sum(part.values()) for part in parts], "ms")


def bench_growth(runtime, rounds: int, table: Table):
    """Exponents: the slope of log time over log size, from the shape itself to four times the value of one knob. Longer
    sequences are fewer, so that the tokens per step stay the same."""
    calls, sizes = {}, (1, 2, 4)
    for knob in GROWING:
        for factor in sizes:
            knobs = GROWING | {"COMPILE": 0, "NUM_HEADS": 2, "NUM_KV_HEADS": 1} | {knob: int(GROWING[knob]) * factor}
            if knob == "MODEL_DIM":
                knobs |= {"NUM_HEADS": 2 * factor, "NUM_KV_HEADS": factor}
            config = train_gpt.Config.load([], {name: str(value) for name, value in knobs.items()})
            trainer = build_trainer(config, runtime)
            calls[knob, factor] = lambda trainer=trainer: trainer.step(1.0, 0.95)
            calls[knob, factor]()
    taken = take_turns(calls, rounds, runtime.synchronize)
    for knob in GROWING:
        logs = np.log([taken[knob, factor] for factor in sizes])
        table.add(f"growth with {knob}: exponent", np.polyfit(np.log(sizes), logs, 1)[0].tolist(), "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("step", "split", "start", "evaluation", "export", "growth")
    parser.add_argument("--shape", choices=SHAPES, default="bench")
    parser.add_argument("--pairs", type=int, default=7, help="rounds, of which medians are told")
    parser.add_argument("--parts", default=",".join(parts), help="some of " + ",".join(parts))
    parser.add_argument("--json", type=Path, help="a file for the JSON as well")
    parser.add_argument("--child", nargs=2, metavar=("CONTENDER", "TIME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        config = load_config(SHAPES[options.shape])
    except train_gpt.UserError as error:
        parser.error(str(error))
    if options.child:
        return child(config, options.child[0], float(options.child[1]))
    wanted = options.parts.split(",")
    if set(wanted) - set(parts):
        parser.error(f"--parts {options.parts}: expected some of {','.join(parts)}")
    if options.pairs < 1:
        parser.error(f"--pairs {options.pairs}: expected at least 1")
    runtime, table = train_gpt.Runtime(config, {}), Table()
    facts = {
        "shape": options.shape,
        "device": runtime.device_name,
        "dtype": str(runtime.dtype),
        "torch": torch.__version__,
        "tokens_per_step": config.train_batch_tokens,
        "pairs": options.pairs,
    }
    print(*(f"{name}: {value}" for name, value in facts.items()), "median (least to most)", sep="\n")
    benches = {
        "step": lambda: bench_step(config, runtime, options.pairs, table),
        "split": lambda: bench_split(config, runtime, options.pairs, table),
        "start": lambda: bench_start(config, options.shape, options.pairs, table),
        "evaluation": lambda: bench_evaluation(config, runtime, options.pairs, table),
        "export": lambda: bench_export(config, options.pairs, table),
        "growth": lambda: bench_growth(runtime, options.pairs, table),
    }
    for part in wanted:
        benches[part]()
    found = json.dumps(facts | {"figures": table.figures})
    if options.json:
        options.json.write_text(found + "\n")
    print("bench_json:" + found)


if __name__ == "__main__":
    main()
