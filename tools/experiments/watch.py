"""Feeds runs, finished or going on, into a page of live curves: trackio's, local and without an account.

    python tools/experiments/watch.py logs/a logs/b      follows both until they are finished; Ctrl+C ends only that
    trackio show --project train_gpt                   the page, in another terminal: http://localhost:7860
    python tools/experiments/watch.py logs/* --once      what is there now, and no more
    python tools/experiments/watch.py logs/a --to wandb  the same calls into Weights & Biases, or --to tensorboard

On a machine behind ssh run both there, and on your own: ssh -N -L 7860:localhost:7860 HOST, then open the same address.

It only reads the run folders, so it may begin late, be stopped and be started again at any time: what is there already
is not sent twice. A step is sent when it is whole, with its validation if it has one; where a resumed run repeats a
step, the first counts. Each run is fed by a process of its own. Packages: trackio (in requirements-dev.txt), wandb or
tensorboard, whichever is asked for.
"""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import launcher  # first: it adds the folders of the other tools to sys.path
from record_read import Run, read_result, read_run

from train_gpt import read_env_file, require

POLL_SECONDS = 2.0
SINKS = ("trackio", "wandb", "tensorboard")  # packages


class Curves:
    """Where a run's numbers go: trackio, or wandb, whose interface trackio has."""

    def __init__(self, name: str, project: str, run_id: str, config: dict[str, str]):
        about = {"project": project, "name": run_id, "config": config, "resume": "allow"}
        self.module = importlib.import_module(name)
        if name == "trackio":
            last = self.module.SQLiteStorage.get_last_step(project, run_id)
            self.run = self.module.init(**about, embed=False, auto_log_cpu=False, auto_log_gpu=False)
        else:
            self.run = self.module.init(**about, id=run_id)
            last = self.run.step - 1 if self.run.step else None
        self.last_step = -1 if last is None else last

    def log(self, numbers: dict[str, float], step: int):
        self.run.log(numbers, step=step)

    def finish(self):
        self.run.finish()


class TensorBoard:
    """Events in runs/<project>/<run_id>; a restart writes all of them again, and hides the earlier ones."""

    def __init__(self, name: str, project: str, run_id: str, config: dict[str, str]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer, self.last_step = SummaryWriter(Path("runs") / project / run_id, purge_step=0), -1

    def log(self, numbers: dict[str, float], step: int):
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def finish(self):
        self.writer.close()


def whole_steps(run: Run, finished: bool) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, its numbers), in order; the last one only of a finished run, since its validation may follow."""
    steps = {}
    for line in run.metrics():
        numbers = {name: value for name, value in line.items() if name not in ("step", "partial")}
        steps.setdefault(line["step"], {}).update(numbers)
    if finished and steps:
        result = run.result
        final = {"final_val_bpb": result["val_bpb"], "final_val_loss": result["val_loss"]}
        steps[max(steps)].update(final | {"bytes_total": result["bytes_total"]})
    elif steps:
        del steps[max(steps)]
    yield from sorted(steps.items())


def follow(folder: Path, sink: str, project: str, once: bool):
    """Feed one run until it is finished, or once."""
    waited_for = folder / "config.env"
    if not waited_for.is_file() and not once:
        print(f"waiting for {folder}, which is no run folder yet", file=sys.stderr)
    while not waited_for.is_file() and not once:
        time.sleep(POLL_SECONDS)
    read_run(folder)  # names what is no run folder
    to = (TensorBoard if sink == "tensorboard" else Curves)(sink, project, folder.name, read_env_file(waited_for))
    try:
        while True:
            result = folder / "result.json"  # written last
            finished = result.is_file()
            run = Run(folder.name, None, read_result(result) if finished else None, result, folder / "metrics.jsonl")
            for step, numbers in whole_steps(run, finished):
                if step > to.last_step:
                    to.log(numbers, step)
                    to.last_step = step
            if finished or once:
                return
            time.sleep(POLL_SECONDS)
    finally:
        to.finish()


def check_package(sink: str):
    missing = importlib.util.find_spec(sink) is None
    require(not missing, f"--to {sink} needs a package that is not installed: pip install {sink}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="LOG_FOLDER", help="run folders: logs/<run_id>")
    parser.add_argument("--to", choices=SINKS, default="trackio", metavar="|".join(SINKS), dest="sink")
    parser.add_argument("--project", default="train_gpt", help="a name for the page")
    parser.add_argument("--once", action="store_true", help="what is there now, and no more")
    arguments = parser.parse_args(argv)

    def tool():
        check_package(arguments.sink)
        if len(arguments.folders) == 1:
            return follow(arguments.folders[0], arguments.sink, arguments.project, arguments.once)
        more = ["--to", arguments.sink, "--project", arguments.project] + ["--once"] * arguments.once
        command, environ = [sys.executable, __file__, *more], os.environ.copy()
        children = [launcher.spawn([*command, folder], environ, None) for folder in arguments.folders]
        try:
            return max(child.wait() for child in children)
        finally:
            for child in children:
                launcher.stop(child)

    return launcher.run_tool(tool, "the runs go on, and the same command continues to watch them")


if __name__ == "__main__":
    sys.exit(main())
