"""What keeps a run of train_gpt.py alive: memory that runs out, checkpoints, kills, restarts and resumes.

train_gpt.py loads this file when it stands beside it. Without it a run trains, exports and scores all the same, but
cannot go on after it was stopped, and does not look for micro-batches that fit the memory.

A checkpoint is logs/<run_id>/checkpoint.pt: torch's format, then the sha256 of it. It holds all that a run needs to go
on exactly where it was: weights, optimizers, average, generators, position in the data, clock.
"""

import hashlib
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

CHECKPOINT_FORMAT = "train_gpt_checkpoint_v1"
LENGTH_KNOBS = ("ITERATIONS", "MAX_WALLCLOCK_SECONDS")  # more of these is free


def launch_name(config, folder, environ) -> str:
    """The run folder that the same launch made before torchrun restarted it; empty for a first start. Every folder's
    config.env begins with its launch."""
    launch = environ.get("TORCHELASTIC_RUN_ID", "none")
    launch += f" of {os.getppid()}" if launch == "none" else ""  # a static rendezvous has no name of its own
    folder.header = f"# launch {launch}\n"
    if environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not folder.runtime.is_master:
        return ""
    made = Path(config.log_dir).glob("*/config.env")
    made = [path for path in made if path.read_bytes().startswith(folder.header.encode())]
    return max(made, key=lambda path: path.stat().st_mtime).parent.name if made else ""


def locate_checkpoint(config, folder) -> Path | None:
    """The file to resume from; None for a new run, or for one that died before its first checkpoint."""
    require = trainer_of(config).require
    own, named = folder.path / "checkpoint.pt", Path(config.resume)
    if folder.path.exists():
        hint = f"choose another RUN_ID{f' (and RESUME={own} to go on from it)' if own.exists() else ''}"
        require(config.resume != "never", f"RESUME=never, but folder {folder.path} exists: {hint}")
        require(not (folder.path / "result.json").exists(), f"the run in {folder.path} is finished: {hint}")
        require((folder.path / "train.log").exists(), f"{folder.path} exists and is no run folder: {hint}")
        if own.exists():
            return own
    if config.resume in ("auto", "never"):
        return None
    named = named / "checkpoint.pt" if named.is_dir() else named
    require(named.is_file(), f"RESUME={config.resume}: there is no checkpoint {named}: give a run folder or a file")
    return named


def read_checkpoint(blob: bytes, source, config, facts: dict[str, str]) -> tuple[dict, list[str]]:
    """(state, in what its run differed from this one of all that shapes the result). A longer run is no difference."""
    trainer = trainer_of(config)
    require, knobs = trainer.require, trainer.KNOBS
    require(hashlib.sha256(blob[:-32]).digest() == blob[-32:],
            f"{source} is damaged: it does not match its checksum: resume from another, or remove it to start again")
    with trainer.reading(source):
        state, differences = trainer.load_tensors(blob[:-32], source), []
        require(state["format"] == CHECKPOINT_FORMAT, f"{source} is no checkpoint of format {CHECKPOINT_FORMAT}")
        then, now = state["knobs"], config.texts() | facts
        require(all(type(text) is str for text in then.values()), "its knobs are no texts")
        for name in sorted(then.keys() | now.keys()):
            old, new = then.get(name, "unset"), now.get(name, "unset")
            longer = name in LENGTH_KNOBS and (float(new) or math.inf) >= (float(old) or math.inf)
            if old != new and not longer and not (name in knobs and knobs[name].metadata["free"]):
                differences.append(f"{name} was {old}, is {new}")
        require(config.resume_force or not differences, f"{source} is of another run: {'; '.join(differences)}: change "
                "that back, set RESUME_FORCE=1 to go on all the same, or choose another RUN_ID for a new run")
        return state, differences


def write_checkpoint(state: dict, folder):
    """A full disk costs the checkpoint and not the run."""
    began, data = time.perf_counter(), sys.modules[type(folder).__module__].torch_bytes(state)
    try:
        folder.write("checkpoint.pt", data + hashlib.sha256(data).digest())
        milliseconds = 1000 * (time.perf_counter() - began)
        folder.log(f"checkpoint: saved step:{state['steps']} bytes:{len(data) + 32} write_time:{milliseconds:.0f}ms")
    except OSError as error:
        folder.log(f"warning: no checkpoint of step {state['steps']} ({error}): the one before it stays")


def trainer_of(config):
    """The module of train_gpt.py, which may be __main__: importing it by its name would make a second one."""
    return sys.modules[type(config).__module__]


def gather(runtime, value) -> list:
    """Every rank's value, in order, on rank 0."""
    values = [value] * runtime.world_size
    if runtime.world_size > 1:
        dist.gather_object(value, values if runtime.is_master else None, dst=0, group=runtime.hosts)
    return values


def listen(runtime):
    """SIGUSR1 asks for a checkpoint; SIGTERM and SIGINT ask for one and the end, a second of them ends at once."""
    def heard(number, frame):
        if number not in (signal.SIGTERM, signal.SIGINT):
            runtime.save_asked = True
        elif runtime.leave or not runtime.patient:
            raise KeyboardInterrupt(number)
        else:
            runtime.leave = number

    for name in {"SIGTERM", "SIGINT", "SIGUSR1"} & set(dir(signal)):
        signal.signal(getattr(signal, name), heard)


class Lifeline:
    """The checkpoints of one run: what it resumes from, when the next is due, how it is made and put back."""

    def __init__(self, config, folder, stream, code: bytes):
        """Name the run folder, find the checkpoint in it or in RESUME, and check that it is of this run."""
        self.config, self.folder, self.runtime = config, folder, folder.runtime
        listen(self.runtime)
        folder.locate(config, launch_name(config, folder, os.environ))
        source = locate_checkpoint(config, folder) if self.runtime.is_master else None
        self.source, blob = self.runtime.share((source, source.read_bytes()) if source else (None, None))
        text = stream.read(0, min(2**20, len(stream)))
        digests = [hashlib.sha256(part).hexdigest()[:16] for part in (code, text)]
        self.facts = {"train_gpt.py": digests[0], "training data": f"{len(stream)} tokens {digests[1]}"}
        self.found, self.differences = (
            read_checkpoint(blob, source, config, self.facts) if self.source else (None, []))
        self.resumed_at, self.saved_step, self.saved_at = [], -1, 0.0
        self.writer, self.written = ThreadPoolExecutor(max_workers=1), None

    def due(self, steps: int, elapsed: float) -> bool:
        """Every CHECKPOINT_EVERY_SECONDS, but not shortly before the end, which has its own."""
        limit, every = self.config.max_wallclock_seconds, self.config.checkpoint_every_seconds
        every = every if every >= 0 else 60.0 * (limit > 300)
        in_time = self.saved_at + every <= elapsed < (limit or math.inf) - every / 2
        return bool(every and in_time and steps > self.saved_step)

    def save(self, trainer, wait: bool):
        """Copy the state now, and write it while training goes on, unless told to `wait`."""
        self.runtime.save_asked = False
        if trainer.exporting:  # the weights are no longer those of the training, whose last checkpoint was made before
            return
        trainer.settle(keep=0)  # so that every loss up to here is known to be finite
        self.folder.log(f"checkpoint: writing step:{trainer.steps}")
        state = self.state(trainer)
        if state:
            self.written.result() if self.written else None
            self.written = self.writer.submit(write_checkpoint, state, self.folder)
        self.runtime.share(self.written and self.written.result()) if wait else None  # before any rank leaves
        self.saved_step = trainer.steps
        self.saved_at = trainer.settled_at = trainer.watch.elapsed("training")  # the pause is no part of a step's time

    def state(self, trainer) -> dict | None:
        """All that a run needs to go on, copied to the CPU, on rank 0; None on the others. Collective."""
        module, names, own = trainer_of(self.config), {p: name for name, p in trainer.model.named_parameters()}, {}
        for optimizer in trainer.optimizers:
            if trainer.runtime.is_master or isinstance(optimizer, module.Muon):  # Adam's is the same everywhere
                own |= {names[p]: values for p, values in optimizer.state.items()}
        rng = {"cpu": torch.get_rng_state()}
        if trainer.runtime.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state()
        def to_host(tree):
            return tree_map(lambda tensor: tensor.detach().to("cpu", copy=True), tree)

        ranks = gather(trainer.runtime, {"optimizer": to_host(own), "rng": rng})
        if not trainer.runtime.is_master:
            return None
        model, average = to_host(trainer.model.state_dict()), to_host(trainer.average)
        module.require(math.isfinite(sum(float(tensor.sum()) for tensor in model.values())), f"step {trainer.steps}: "
                       "weights are not finite: the last good checkpoint stays: lower the learning rates")
        return {"format": CHECKPOINT_FORMAT, "knobs": self.config.texts() | self.facts, "model": model,
                "average": average,
                "optimizer": {name: values for rank in ranks for name, values in rank["optimizer"].items()},
                "rng": [rank["rng"] for rank in ranks], "position": trainer.loader.position, "steps": trainer.steps,
                "train_seconds": trainer.watch.elapsed("training"), "finished": trainer.finished,
                "resumed_at": self.resumed_at, "recent": list(trainer.recent)}

    def begin(self, trainer):
        """Fit the micro-batch to the memory, and go on from the checkpoint that was found, if any."""
        fit_memory(trainer)
        if self.found:
            with trainer_of(self.config).reading(self.source):
                self.put_back(trainer, self.found)
            self.folder.log(f"resumed: step:{trainer.steps} from {self.source} train_time:{1000 * self.saved_at:.0f}ms"
                            f"{' finished' if trainer.finished else ''}{'; '.join(['', *self.differences])}")
            self.found = None  # its memory is needed

    def put_back(self, trainer, state: dict):
        """Adam's state goes to every rank, Muon's to the owner of the matrix."""
        module, config = trainer_of(self.config), self.config
        kinds = [type(state[name]) for name in ("steps", "position", "train_seconds")]
        module.require(kinds == [int, int, float], "wrong types of numbers")
        trainer.model.load_state_dict(state["model"])
        # A run that had no average, and goes on with one by force, begins it with the weights as they are.
        values = state["average"]
        module.require(type(values) is list and all(isinstance(value, torch.Tensor) for value in values),
                       "its average is no list of tensors")
        values = values or [p.detach() for p in trainer.model.parameters()]
        for tensor, value in zip(trainer.average, values, strict=bool(trainer.average)):
            module.require(tensor.shape == value.shape, "its average is of another model")
            tensor.copy_(value)
        names = {p: name for name, p in trainer.model.named_parameters()}
        for optimizer in trainer.optimizers:
            muon = isinstance(optimizer, module.Muon)
            own = slice(trainer.runtime.rank, None, trainer.runtime.world_size) if muon else slice(None)
            keys = ("momentum_buffer",) if muon else ("step", "exp_avg", "exp_avg_sq")
            for group in optimizer.param_groups:
                for p in group["params"][own]:
                    values = state["optimizer"].get(names[p], {})
                    shapes = {key: () if key == "step" else p.shape for key in keys}
                    complete = {key: value.shape for key, value in values.items()} == shapes
                    unused = not values and not (state["steps"] and p.requires_grad)
                    module.require(complete or unused, f"wrong or no state of {names[p]}")
                    if values:
                        optimizer.state[p] = {key: value.to(p.device, torch.float32 if key == "step" else p.dtype)
                                              for key, value in values.items()}
        rng = state["rng"][trainer.runtime.rank % len(state["rng"])]
        torch.set_rng_state(rng["cpu"])
        if trainer.runtime.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"])
        trainer.loader.seek(state["position"])
        trainer.steps = self.saved_step = int(state["steps"])
        trainer.watch.seconds["training"] = trainer.settled_at = self.saved_at = float(state["train_seconds"])
        trainer.recent.extend(map(float, state["recent"]))
        self.resumed_at = [*state["resumed_at"], trainer.steps]
        same_length = all(state["knobs"][name] == config.texts()[name] for name in LENGTH_KNOBS)
        trainer.finished = state["finished"] and same_length


def fit_memory(trainer):
    """Halve the micro-batch until a micro-step fits the memory of every rank. It runs without DDP: a rank that
    fails must not leave the others waiting for its gradients."""
    module, loader, T = trainer_of(trainer.config), trainer.loader, trainer.config.train_seq_len
    auto = trainer.config.micro_batch_tokens == "auto" and not trainer.config.grad_accum_steps
    while True:
        tokens, lacking, ballast = loader.share // loader.accum_steps, False, []
        try:  # with as much taken as the optimizers, the average and DDP will need
            copies = 3 + bool(trainer.config.ema_decay)
            ballast += [torch.empty_like(p) for p in trainer.model.parameters() for _ in range(copies)]
            x = torch.zeros(tokens // T, T, dtype=torch.long, device=trainer.runtime.device)
            trainer.scorer(x, x.clone()).mean().backward()  # one tensor twice would be compiled as another graph
        except RuntimeError as error:
            if not (lacking := module.is_out_of_memory(error)):
                raise
        ballast = x = None  # noqa: F841 (given back before the next try)
        trainer.model.zero_grad(set_to_none=True)
        if not trainer.runtime.sum([lacking])[0]:
            return
        module.require(auto and tokens > T, f"out of memory with micro-steps of {tokens} tokens: use "
                       "MICRO_BATCH_TOKENS=auto without GRAD_ACCUM_STEPS, or a smaller model")
        trainer.config = replace(trainer.config, micro_batch_tokens=str(max(T, tokens // 2)))
        ranks, device_type = trainer.runtime.world_size, trainer.runtime.device.type
        loader.accum_steps = trainer.config.accumulation_steps(ranks, device_type)
        trainer.folder.log(f"micro_batch: {tokens} tokens per rank do not fit the memory: trying "
                           f"{loader.share // loader.accum_steps}, grad_accum_steps:{loader.accum_steps}")
