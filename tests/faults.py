"""Kill a run repeatedly, resume it each time, and compare its result with that of an undisturbed run.

    python tests/faults.py                       5 rounds of 4 kills: in training, checkpoint, export, evaluation
        python tests/faults.py --ranks 2             the same under torchrun --max-restarts, killing one rank each time
    python tests/faults.py --ranks 2 --nodes 2   two torchrun agents that meet in a rendezvous

Every kill is a SIGKILL at a random moment of a phase. Phases are read from the log: a kill counts only if the line
that ends the phase has not been written when the process is dead. The scores, the losses of all steps and the hash of
the artifact must match those of the undisturbed run, digit for digit.
"""

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools" / "experiments"))

import guard
import launcher
from launcher import ROOT

STEPS = 16
# phase: (line that starts it, line that ends it)
PHASES = {
    "training": (r"step:(?:[3-9]|10)/\d+ train_loss", r"checkpoint: writing|step:\d+/\d+ val_loss"),
    "checkpoint": (r"checkpoint: writing step:(?!16)", r"checkpoint: saved"),
    "export": (r"step:16/16 val_loss", r"Serialized model:"),
    "evaluation": (r"size_verdict:", r"final_int8_zlib_roundtrip"),
}
SAME = ("val_loss", "val_bpb", "pre_quant_val_loss", "pre_quant_val_bpb", "sha256_artifact", "steps", "scored_bytes")


def settings(logs: Path, run_id: str) -> dict[str, str]:
    """The demo's model and data, a few steps, no time limit, no compiler. Variables already set take precedence."""
    knobs = {"LOG_DIR": logs, "RUN_ID": run_id, "DEVICE": "cpu", "COMPILE": 0, "MAX_WALLCLOCK_SECONDS": 0}
    knobs |= {"ITERATIONS": STEPS, "WARMUP_STEPS": 0, "CHECKPOINT_EVERY_SECONDS": 0.3, "TRAIN_BATCH_TOKENS": 1024}
    knobs |= {"VAL_TOKENS_LIMIT": 8192, "VAL_BATCH_SIZE": 1024, "TRAIN_LOG_EVERY": 1}
    return {name: str(value) for name, value in knobs.items()} | os.environ


def launch(environ: dict[str, str], arguments, output=None) -> list[subprocess.Popen]:
    """One process, or one torchrun agent per node. Without an output file, its pipe's reading end is closed at once."""
    ranks, nodes = arguments.ranks, arguments.nodes
    command = launcher.command(ROOT / "train_gpt.py", arguments.recipe)
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        options = f"--nnodes={nodes} --nproc_per_node={ranks // nodes} --rdzv_backend=c10d --rdzv_id=faults"
        options += f" --rdzv_endpoint=localhost:{port} --max-restarts=100"
        command[1:1] = ["-m", "torch.distributed.run", *options.split()]
        # Otherwise torchrun's shared store keeps the addresses of dead ranks, and a restart may wait for them.
        environ = environ | ({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if nodes > 1 else {})
    processes = [launcher.spawn(command, environ, output or subprocess.PIPE) for _ in range(nodes if ranks > 1 else 1)]
    for process in processes if output is None else ():
        process.stdout.close()
    return processes


def ended(processes: list[subprocess.Popen]) -> bool:
    return all(process.poll() is not None for process in processes)


class Log:
    """train.log of a run as it grows. With several nodes, any may be the master, so only the file is reliable."""

    def __init__(self, path: Path):
        self.path, self.at = path, 0

    def new(self) -> str:
        if not self.path.exists():
            return ""
        with open(self.path, encoding="utf-8") as file:
            file.seek(self.at)
            text = file.read()
            self.at = file.tell()
        return text

    def wait_for(self, pattern: str, processes, timeout: float = 180) -> bool:
        """Whether a line matches before the processes end."""
        text, deadline, over = "", time.monotonic() + timeout, False
        while time.monotonic() < deadline and not over:
            over = ended(processes)
            text += self.new()
            if re.search(pattern, text):
                return True
            time.sleep(0.002)
        assert over, f"no line like {pattern!r} within {timeout} s"
        return False


def kill_in(phase: str, processes, log: Log, longest: dict, rng: random.Random, ranks: int) -> bool:
    """Kill a process (one rank, if there are several) during the phase. Returns whether the kill hit the phase."""
    begin, end = PHASES[phase]
    if not log.wait_for(begin, processes):
        return False
    victims = [pid for process in processes for pid in guard.children(process.pid)]
    if ranks > 1:
        victims = [pid for agent in victims for pid in guard.children(agent)]
    time.sleep(rng.uniform(0, longest[phase] / 2))  # only half: the machine may be faster by now
    if not victims or ended(processes):
        return False
    os.kill(rng.choice(victims), signal.SIGKILL)
    if ranks == 1:
        processes[0].wait()
    else:
        time.sleep(0.05)
    return not re.search(end, log.new())


def outcome(folder: Path) -> dict:
    """What must be equal: scores and artifact of result.json, and the last loss written for each step."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {line["step"]: line["train_loss"] for line in lines if "train_loss" in line}
    return {key: result[key] for key in SAME} | {"losses": losses}


def undisturbed(logs: Path, arguments) -> tuple[dict, dict]:
    """(outcome, {phase: seconds from its first line to its last}) of a run without kills. If it fails, for example
    because data is missing, its own message says what to do."""
    with open(logs / "output", "w") as output:
        processes = launch(settings(logs, "undisturbed"), arguments, output)
    log, text, times = Log(logs / "undisturbed" / "train.log"), "", {}
    while not ended(processes):
        text += log.new()
        for phase, patterns in PHASES.items():
            for which, pattern in enumerate(patterns):
                if re.search(pattern, text):
                    times.setdefault((phase, which), time.monotonic())
        time.sleep(0.002)
    if any(process.returncode for process in processes):
        sys.exit(f"the undisturbed run failed:\n{(logs / 'output').read_text(encoding='utf-8')}")
    longest = {phase: max(0.005, times[phase, 1] - times[phase, 0]) for phase in PHASES if phase != "training"}
    return outcome(logs / "undisturbed"), longest | {"training": 0.3}


def disturbed(logs: Path, name: str, arguments, longest: dict, rng: random.Random) -> list[Path]:
    """Kill a run once in each phase, restart it if torchrun does not, and let it finish. Returns the run folders: one,
    plus another for each run that ended before a kill hit it."""
    folders, processes = [logs / f"{name}_0"], []
    log = Log(folders[0] / "train.log")
    for phase in [*arguments.phases, None]:
        hit = False
        while not hit:
            if phase and (folders[-1] / "result.json").exists():
                for process in processes:
                    process.wait(timeout=300)
                folders.append(logs / f"{name}_{len(folders)}")
                log = Log(folders[-1] / "train.log")
            if ended(processes):
                processes = launch(settings(logs, folders[-1].name), arguments)
            hit = not phase or kill_in(phase, processes, log, longest, rng, arguments.ranks)
        if phase:
            print(f"  {folders[-1].name}: killed in {phase}", flush=True)
    for process in processes:
        process.wait(timeout=300)
    return folders


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs, each killed once in every phase")
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=list(PHASES))
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1, help="torchrun agents; they share the ranks")
    parser.add_argument("--seed", type=int, default=None, help="of the moments of the kills; printed")
    parser.add_argument("--recipe", type=Path, default=ROOT / "records/recipes/demo_cpu.env")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    print(f"seed:{seed}", flush=True)
    rng, kills, runs, wrong = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        logs = Path(temporary)
        expected, longest = undisturbed(logs, arguments)
        print("undisturbed:", {key: expected[key] for key in SAME}, "phases in s:", longest, flush=True)
        for number in range(arguments.rounds):
            folders = disturbed(logs, f"disturbed_{number}", arguments, longest, rng)
            kills, runs = kills + len(arguments.phases), runs + len(folders)
            for folder in folders:
                actual = outcome(folder)
                resumed = json.loads((folder / "result.json").read_text(encoding="utf-8"))["resumed_at"]
                wrong += actual != expected
                verdict = "the same" if actual == expected else f"DIFFERENT: {actual}"
                print(f"  {folder.name}: resumed at {resumed}: {verdict}", flush=True)
    print(f"{kills} kills in {runs} runs, {wrong} of which ended otherwise than the undisturbed one")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(launcher.run_tool(main, "its runs, too"))
