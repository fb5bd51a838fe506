"""What a checkpoint costs at the reference shape: alternating pairs of windows, one with a checkpoint and one without.

    python tests/bench/checkpoint.py           PAIRS=8 STEPS=2 by default; any knob may be set

A window is STEPS steps. In the one with a checkpoint the state is copied before the first step and written while the
steps run; the window ends when both are done. The difference of the two is what a checkpoint costs, and 60 s, the
default interval, is what it is held against. On a CPU the writing takes time from the steps; on a GPU only the copy
does. Steps are shortened to one sequence, which changes what a step takes but not what a checkpoint takes.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from speed import RandomTokens  # noqa: E402

import train_gpt  # noqa: E402

INTERVAL = 60.0  # CHECKPOINT_EVERY_SECONDS of a run of 600 s


def main():
    pairs, steps = int(os.environ.get("PAIRS", 8)), int(os.environ.get("STEPS", 2))
    with tempfile.TemporaryDirectory() as folder:
        knobs = {"TRAIN_BATCH_TOKENS": "4096", "LOG_DIR": folder, "TRAIN_LOG_EVERY": "0", "COMPILE": "0"}
        config = train_gpt.Config.load([], knobs | dict(os.environ))
        runtime = train_gpt.Runtime(config, {})
        checkpoint = train_gpt.tool("checkpoint")
        run_folder = checkpoint.RunFolder(runtime)
        loader = RandomTokens(config, runtime)
        run_folder.choose(config, loader.stream, {})
        run_folder.create(config, {})
        run_folder.log = lambda line: None
        trainer = checkpoint.Trainer(config, run_folder, train_gpt.Stopwatch(runtime.synchronize), loader)
        params = sum(p.numel() for p in trainer.model.parameters())

        def window(save: bool) -> float:
            runtime.synchronize()
            began = time.perf_counter()
            if save:
                trainer.checkpoints.save(trainer, wait=False)
            for _ in range(steps):
                float(trainer.step(1.0, 0.95)["train_loss"])
            if save:
                trainer.checkpoints.written.result()
            return time.perf_counter() - began

        for save in (True, False):
            window(save)
        rows = [
            (window(True), window(False)) if pair % 2 else (window(False), window(True))[::-1] for pair in range(pairs)
        ]
        size = (run_folder.path / "checkpoint.pt").stat().st_size
    costs = [with_checkpoint - without for with_checkpoint, without in rows]
    plain = [without for _, without in rows]
    version = train_gpt.torch.__version__
    print(f"{params} parameters, checkpoint of {size} bytes, {runtime.device_name}, torch {version}")
    print(f"{pairs} pairs of windows of {steps} steps: median (least to most)")
    for name, values in (
        ("without, s", plain),
        ("a checkpoint costs, s", costs),
        (f"share of {INTERVAL:.0f} s, %", [100 * cost / INTERVAL for cost in costs]),
    ):
        print(f"{name:24} {statistics.median(values):8.3f} ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
