"""Measure the cost of a checkpoint at the reference shape: alternating pairs of windows, with and without a checkpoint.

    python tests/bench/checkpoint.py           PAIRS=8 STEPS=2 by default; any knob may be set

A window is STEPS steps. In a window with a checkpoint, the state is copied before the first step and written while the
steps run; the window ends when both are done. The difference between the two is the cost of a checkpoint, and it is
compared with the default interval, 60 s. On a CPU, writing also takes time from the steps; on a GPU only the copy
does. Steps use a single sequence, which changes the duration of a step but not the cost of a checkpoint.
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_tools import build_trainer, parse, random_stream, spread, take_turns, train_gpt  # noqa: E402

INTERVAL = 60.0  # CHECKPOINT_EVERY_SECONDS of a run of 600 s


def main():
    pairs, steps = int(os.environ.get("PAIRS", 8)), int(os.environ.get("STEPS", 2))
    with tempfile.TemporaryDirectory() as folder:
        knobs = parse(f"TRAIN_BATCH_TOKENS=4096 LOG_DIR={folder} TRAIN_LOG_EVERY=0 COMPILE=0")
        config = train_gpt.Config.load([], knobs | dict(os.environ))
        runtime = train_gpt.Runtime(config, {})
        checkpoint = train_gpt.tool("checkpoint")
        run_folder = checkpoint.RunFolder(runtime)
        run_folder.choose(config, random_stream(config, 10**6), {})
        run_folder.create(config, {})
        run_folder.log = lambda line: None
        trainer = build_trainer(config, runtime, checkpoint, run_folder)
        params = sum(p.numel() for p in trainer.model.parameters())

        def window(save: bool):
            if save:
                trainer.checkpoints.save(trainer, wait=False)
            for _ in range(steps):
                float(trainer.step(1.0, 0.95)["train_loss"])
            if save:
                trainer.checkpoints.written.result()

        calls = {save: lambda save=save: window(save) for save in (True, False)}
        take_turns(calls, 1)
        taken = take_turns(calls, pairs, runtime.synchronize)
        size = (run_folder.path / "checkpoint.pt").stat().st_size
    costs = [saving - plain for saving, plain in zip(taken[True], taken[False], strict=True)]
    version = train_gpt.torch.__version__
    print(f"{params} parameters, checkpoint of {size} bytes, {runtime.device_name}, torch {version}")
    print(f"{pairs} pairs of windows of {steps} steps: median (least to most)")
    print(f"{'without, s':24} {spread(taken[False])}")
    print(f"{'a checkpoint costs, s':24} {spread(costs)}")
    print(f"{f'share of {INTERVAL:.0f} s, %':24} {spread([100 * cost / INTERVAL for cost in costs])}")


if __name__ == "__main__":
    main()
