"""Kill a run again and again, let it go on each time, and compare its end with that of an undisturbed run.

    python tests/faults.py                       5 rounds of 4 kills: in training, checkpoint, export, evaluation
    python tests/faults.py --ranks 2             the same under torchrun --max-restarts, one rank killed each time
    python tests/faults.py --ranks 2 --nodes 2   two torchrun agents that meet in a rendezvous

Every kill is a SIGKILL at a random moment of a phase. Phases are told by the program's own log: a kill counts only if
the line that ends the phase has not been written when the process is dead. The scores, the losses of all steps and the
hash of the artifact must be those of the undisturbed run, digit for digit.
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

ROOT = Path(__file__).resolve().parent.parent
STEPS = 16
# phase: (line that begins it, line that ends it)
PHASES = {
    "training": (r"step:(?:[3-9]|10)/\d+ train_loss", r"checkpoint: writing|step:\d+/\d+ val_loss"),
    "checkpoint": (r"checkpoint: writing step:(?!16)", r"checkpoint: saved"),
    "export": (r"step:16/16 val_loss", r"Serialized model:"),
    "evaluation": (r"size_verdict:", r"final_int8_zlib_roundtrip"),
}
SAME = ("val_loss", "val_bpb", "pre_quant_val_loss", "pre_quant_val_bpb", "sha256_artifact", "steps", "scored_bytes")


def settings(logs: Path, run_id: str) -> dict[str, str]:
    """The demo's model and data, few steps without a clock, no compiler; what the environment says goes before."""
    knobs = {
        "LOG_DIR": str(logs),
        "RUN_ID": run_id,
        "DEVICE": "cpu",
        "COMPILE": "0",
        "MAX_WALLCLOCK_SECONDS": "0",
        "ITERATIONS": str(STEPS),
        "WARMUP_STEPS": "0",
        "CHECKPOINT_EVERY_SECONDS": "0.3",
        "TRAIN_BATCH_TOKENS": "1024",
        "VAL_TOKENS_LIMIT": "8192",
        "VAL_BATCH_SIZE": "1024",
        "TRAIN_LOG_EVERY": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return knobs | dict(os.environ)


def launch(environ: dict[str, str], arguments, errors=subprocess.DEVNULL) -> list[subprocess.Popen]:
    """One process, or one torchrun agent per node; the first one's output carries the log."""
    ranks, nodes, recipe = arguments.ranks, arguments.nodes, arguments.recipe
    script = [str(ROOT / "train_gpt.py"), str(recipe)]
    if ranks == 1:
        commands = [[sys.executable, *script]]
    else:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        rendezvous = [
            f"--nnodes={nodes}",
            f"--nproc_per_node={ranks // nodes}",
            "--rdzv_backend=c10d",
            "--rdzv_id=faults",
            f"--rdzv_endpoint=localhost:{port}",
            "--max-restarts=100",
        ]
        commands = [[sys.executable, "-m", "torch.distributed.run", *rendezvous, *script] for _ in range(nodes)]
        # Without it torchrun's shared store keeps the addresses of dead ranks, which a restart may then wait for.
        environ = environ | ({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if nodes > 1 else {})
    outputs = [subprocess.PIPE] + [subprocess.DEVNULL] * (len(commands) - 1)
    return [
        subprocess.Popen(command, env=environ, stdout=output, stderr=errors, text=True)
        for command, output in zip(commands, outputs, strict=True)
    ]


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid` (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:
            pass
    return found


class Log:
    """train.log of a run as it grows. With several nodes the master may be any of them, so the file is what counts."""

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


def wait_for(log: Log, pattern: str, processes, timeout: float = 180) -> bool:
    """Whether a line of the log matches before the processes end."""
    text, deadline = "", time.monotonic() + timeout
    while time.monotonic() < deadline:
        ended = all(process.poll() is not None for process in processes)
        text += log.new()
        if re.search(pattern, text):
            return True
        if ended:
            return False
        time.sleep(0.002)
    raise TimeoutError(f"no line like {pattern!r} within {timeout} s")


def drain(processes):
    for process in processes:
        if process.stdout:
            process.stdout.close()  # the program must bear a reader that goes away


def kill_in(phase: str, processes, log: Log, longest: dict, rng: random.Random, ranks: int) -> bool:
    """Kill a process (one rank, if there are several) somewhere in the phase; whether it was still in it when dead."""
    begin, end = PHASES[phase]
    if not wait_for(log, begin, processes):
        return False
    time.sleep(rng.uniform(0, longest[phase] / 2))  # only half: the machine may have become faster meanwhile
    victims = [processes[0].pid] if ranks == 1 else [child for process in processes for child in children(process.pid)]
    if not victims:
        return False
    os.kill(rng.choice(victims), signal.SIGKILL)
    if ranks == 1:
        processes[0].wait()
    else:
        time.sleep(0.05)
    return not re.search(end, log.new())


def outcome(folder: Path) -> dict:
    """What must be equal: scores and artifact of result.json, and the last-written loss of every step."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {line["step"]: line["train_loss"] for line in lines if "train_loss" in line}
    return {key: result[key] for key in SAME} | {"losses": losses}


def undisturbed(logs: Path, arguments) -> tuple[dict, dict]:
    """(outcome, {phase: seconds from its first line to its last}) of a run that nobody kills. If it fails, which it
    does without data, its own message says what to do."""
    with open(logs / "errors", "w", encoding="utf-8") as errors:
        processes = launch(settings(logs, "undisturbed"), arguments, errors)
    drain(processes)
    log, text, times = Log(logs / "undisturbed" / "train.log"), "", {}
    while any(process.poll() is None for process in processes):
        text += log.new()
        for phase, patterns in PHASES.items():
            for which, pattern in enumerate(patterns):
                if re.search(pattern, text):
                    times.setdefault((phase, which), time.monotonic())
        time.sleep(0.002)
    if any(process.returncode for process in processes):
        sys.exit(f"the run that nobody disturbs failed:\n{(logs / 'errors').read_text(encoding='utf-8')}")
    longest = {phase: max(0.005, times[phase, 1] - times[phase, 0]) for phase in PHASES if phase != "training"}
    return outcome(logs / "undisturbed"), longest | {"training": 0.3}


def disturbed(logs: Path, name: str, arguments, longest: dict, rng: random.Random, phases: list[str]):
    """Kill a run once in each phase, start it again where nobody else does, let it end. (Kills, folders of the runs:
    one, and another for each that ended before a kill hit it.)"""
    folders, kills, processes = [logs / f"{name}_0"], 0, []

    def go_on():
        nonlocal processes
        if all(process.poll() is not None for process in processes):
            environ = settings(logs, folders[-1].name)
            processes = launch(environ, arguments)
            drain(processes)

    log = Log(folders[-1] / "train.log")
    for phase in phases:
        hit = False
        while not hit:
            if (folders[-1] / "result.json").exists():
                for process in processes:
                    process.wait(timeout=300)
                folders.append(logs / f"{name}_{len(folders)}")
                log = Log(folders[-1] / "train.log")
            go_on()
            hit = kill_in(phase, processes, log, longest, rng, arguments.ranks)
        kills += 1
        print(f"  {folders[-1].name}: killed in {phase}", flush=True)
    go_on()
    for process in processes:
        process.wait(timeout=300)
    return kills, folders


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
            hits, folders = disturbed(logs, f"disturbed_{number}", arguments, longest, rng, arguments.phases)
            kills, runs = kills + hits, runs + len(folders)
            for folder in folders:
                actual = outcome(folder)
                resumed = json.loads((folder / "result.json").read_text(encoding="utf-8"))["resumed_at"]
                wrong += actual != expected
                verdict = "the same" if actual == expected else f"DIFFERENT: {actual}"
                print(f"  {folder.name}: resumed at {resumed}: {verdict}", flush=True)
    print(f"{kills} kills in {runs} runs, {wrong} of which ended otherwise than the undisturbed one")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
