"""Time training steps on random tokens, and profile some: kernels sorted by time, and a trace for chrome://tracing.

        python tests/bench/profile_step.py                                     the defaults, on the available device
    python tests/bench/profile_step.py records/recipes/frontier_sp1024.env --trace trace.json.gz
    ATTENTION=cudnn python tests/bench/profile_step.py --profile 0         time only; any knob of train_gpt.py

A model whose graph changes during a run is profiled in its last form, the one used in the final score. The last line
is a summary. Exit code 3: the requested ATTENTION does not run on this device, or not within its memory.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import speed  # noqa: E402

import train_gpt  # noqa: E402

kernels = train_gpt.tool("kernels")

UNAVAILABLE = 3
WARMUP_STEPS = 3  # the first one compiles


def run_steps(trainer, count: int) -> tuple[float, float]:
    """(seconds per step, seconds the host needs to launch a step)."""
    trainer.runtime.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        trainer.step(1.0, 0.95)
    launched = time.perf_counter()
    trainer.runtime.synchronize()
    return (time.perf_counter() - began) / count, (launched - began) / count


def profile(trainer, steps: int, rows: int, trace: Path | None) -> str:
    """Print the table and write the trace. Returns a short summary."""
    on_gpu = trainer.runtime.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profiler:
        seconds, _ = run_steps(trainer, steps)
    # On a GPU count only its kernels and copies: the host's operators and annotations would count the same time again.
    times = {}  # {name: (microseconds, calls)}
    for event in profiler.key_averages():
        if not on_gpu:
            times[event.key] = event.self_cpu_time_total, event.count
        elif event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            times[event.key] = event.self_device_time_total, event.count
    total = sum(time for time, _ in times.values())
    what = "kernels" if on_gpu else "operators"
    print(f"{'ms a step':>10} {'share':>6} {'calls':>6}  the {rows} {what} that take longest, of {len(times)}")
    for name, (taken, calls) in sorted(times.items(), key=lambda item: -item[1][0])[:rows]:
        print(f"{taken / 1000 / steps:10.3f} {taken / max(total, 1e-9):6.1%} {calls / steps:6.0f}  {name[:120]}")
    if trace:
        profiler.export_chrome_trace(str(trace))
        print(f"trace: {trace}")
    if not times:
        return ", the profiler saw no kernels: does CUPTI work here?"
    launches = sum(calls for _, calls in times.values()) / steps
    return f", {launches:.0f} {what} a step, busy {total / 1e6 / steps / seconds:.0%} of it"


def measure(config, options) -> str:
    """Compile, time and profile the steps of a configuration. Returns the summary figure."""
    began = time.perf_counter()
    runtime = train_gpt.Runtime(config, {})
    trainer = speed.build_trainer(config, runtime)
    print(trainer.note)
    trainer.model.advance(trainer.model.graph_starts[-1])
    for step in range(WARMUP_STEPS):
        seconds, _ = run_steps(trainer, 1)
        if step == 0:
            print(f"first step after {time.perf_counter() - began:.1f} s")
    seconds, host_seconds = run_steps(trainer, min(100, max(2, round(options.seconds / seconds))))
    tokens_per_second = config.train_batch_tokens / seconds
    figure = f"{1000 * seconds:.2f} ms a step, {tokens_per_second:,.0f} tokens/s"
    mfu = kernels.share_of_peak(trainer.model, config, runtime, tokens_per_second)
    figure += f", MFU {mfu:.1%}" if mfu else ""
    figure += f", host {1000 * host_seconds:.2f} ms"
    if runtime.device.type == "cuda":
        figure += f", peak {torch.cuda.max_memory_allocated() >> 20:,} MiB"
    return figure + (profile(trainer, options.profile, options.rows, options.trace) if options.profile else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", nargs="*", metavar="FILE.env")
    parser.add_argument("--seconds", type=float, default=5.0, help="of steps to time, 2 to 100 of them")
    parser.add_argument("--profile", type=int, default=2, help="steps to profile; 0: none")
    parser.add_argument("--rows", type=int, default=30, help="of the table")
    parser.add_argument("--trace", type=Path, help="file for the trace, .json or .json.gz")
    options = parser.parse_args()
    config = train_gpt.Config.load(options.env, {"MAX_WALLCLOCK_SECONDS": "0"} | os.environ)
    try:
        print(f"figure: {measure(config, options)}")
    except (train_gpt.UserError, RuntimeError) as error:
        missing = str(error).startswith(f"ATTENTION={config.attention} ") or kernels.is_out_of_memory(error)
        # With auto at least one kernel must run. A kernel with wrong results is an error, not a missing kernel.
        if config.attention == "auto" or not missing or "errs by" in str(error):
            raise
        print(f"unavailable: {error}")
        return UNAVAILABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
