"""Stands in for a training script in tests of the tools that start one: the same files and log lines, no training.

Knobs: LEVEL is the final loss, STEPS and STEP_MS set its length, FAIL is an error to end with, STUBBORN ignores
SIGTERM.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


class RunFolder:  # the tools recognize a script that takes a FILE.env and makes a run folder by this name
    pass


def stop(number, frame):
    print("checkpoint: saved", flush=True)
    if "STUBBORN" not in knobs:
        sys.exit(128 + number)


signal.signal(signal.SIGTERM, stop)
knobs = dict(line.split("=", 1) for path in sys.argv[1:] for line in Path(path).read_text().split()) | dict(os.environ)
level, steps, ms = (float(knobs.get(name, text)) for name, text in (("LEVEL", 2), ("STEPS", 40), ("STEP_MS", 1)))
folder = Path(knobs["LOG_DIR"]) / knobs["RUN_ID"]
print(f"pid:{os.getpid()}", flush=True)
if knobs.get("RANK", "0") != "0":
    time.sleep(steps * ms / 1000)
    sys.exit()
folder.mkdir(parents=True)
(folder / "new.env").write_text(f'ITERATIONS="{steps:.0f}"\nMAX_WALLCLOCK_SECONDS="0"\nLEVEL="{level}"\n')
(folder / "new.env").rename(folder / "config.env")
print("train_batch_tokens:1000\nseed:" + knobs.get("SEED", "0"), flush=True)
if "FAIL" in knobs and eval(knobs["FAIL"], {"level": level}):
    sys.exit("error: LEVEL is out of range: lower it")
for step in range(1, int(steps) + 1):
    time.sleep(ms / 1000)
    loss = level + 5 / step
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "train_loss": loss, "train_seconds": step * ms / 1000}) + "\n")
    print(f"step:{step}/{steps:.0f} train_loss:{loss:.4f} train_time:{step * ms:.0f}ms step_avg:{ms:.2f}ms", flush=True)
print("Total submission size int8+zlib: 123456 bytes")
print(f"final_int8_zlib_roundtrip_exact val_loss:{level:.8f} val_bpb:{level / 2:.8f}")
result = {"val_loss": level, "val_bpb": level / 2, "steps": int(steps), "bytes_total": 123456}
result |= {"train_tokens": 1000 * steps, "seconds": {"training": steps * ms / 1000}}
result |= {"world_size": int(knobs.get("WORLD_SIZE", 1))}
(folder / "result.json").write_text(json.dumps(result))
