"""Send the metrics of active or finished runs to a live dashboard: trackio, which is local and needs no account.

    python tools/experiments/watch.py logs/a logs/b      follow both until they finish; Ctrl+C does not stop the runs
    trackio show --project train_gpt                     the dashboard, in another terminal: http://localhost:7860
    python tools/experiments/watch.py logs/* --once      send the current metrics and exit
    python tools/experiments/watch.py logs/a --to wandb  use Weights & Biases instead, or --to tensorboard

For a remote machine, run both there, and ssh -N -L 7860:localhost:7860 HOST locally, then open the same address.

The tool only reads the run folders. It can start late, stop and restart at any time without sending a step twice. A
step is sent once it is complete, including its validation if it has one. If a resumed run repeats a step that was
already sent, the first version is kept. Each run has its own process. Requires trackio (in requirements-dev.txt), wandb
or tensorboard, depending on --to.
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
    """Writes a run's metrics to trackio or wandb. trackio has the same API as wandb."""

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
    """Writes events to runs/<project>/<run_id>. A restart rewrites all events and hides the earlier ones."""

    def __init__(self, name: str, project: str, run_id: str, config: dict[str, str]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer, self.last_step = SummaryWriter(Path("runs") / project / run_id, purge_step=0), -1

    def log(self, numbers: dict[str, float], step: int):
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def finish(self):
        self.writer.close()


def whole_steps(run: Run, finished: bool) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield (step, metrics) in order. The last step of an unfinished run is held back: its validation may follow."""
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
    """Send one run's metrics until it finishes, or only once. Waits for the run folder unless `once`."""
    waited_for = folder / "config.env"
    if not waited_for.is_file() and not once:
        print(f"waiting for {folder}, which is not a run folder yet", file=sys.stderr)
    while not waited_for.is_file() and not once:
        time.sleep(POLL_SECONDS)
    read_run(folder)  # raises UserError if this is not a run folder
    to = (TensorBoard if sink == "tensorboard" else Curves)(sink, project, folder.name, read_env_file(waited_for))
    try:
        while True:
            result = folder / "result.json"  # written last, so it marks a finished run
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
    parser.add_argument("--project", default="train_gpt", help="project name on the dashboard")
    parser.add_argument("--once", action="store_true", help="send the current metrics and exit")
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
