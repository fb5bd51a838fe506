"""What keeps a run of train_gpt.py alive: memory that runs out, checkpoints, kills, restarts and resumes.

train_gpt.py loads this file where it is there, and calls Checkpoints as its own class Hooks says. Without it a run
trains, exports and scores all the same, but cannot go on after it was stopped, and does not look for micro-batches
that fit the memory.

A checkpoint is logs/<run_id>/checkpoint.pt: torch's format, then the sha256 of it. It holds all that a run needs to go
on exactly where it was: weights, optimizers, average, generators, position in the data, clock.
"""

import hashlib
import io
import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

import train_gpt
from train_gpt import require

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


def read_checkpoint(file: Path | bytes, source, config, facts: dict[str, str]) -> tuple[dict, list[str]]:
    """(state, in what its run differed from this one of all that shapes the result). A longer run is no difference.

    Of a path the tensors stay in the file, mapped, until they are copied to where they belong."""
    knobs = config.knobs()
    require(
        matches_checksum(file),
        f"{source} is damaged: it does not match its checksum: resume from another, or remove it to start again",
    )
    read = train_gpt.tool("evaluate", required=True)
    with read.reading(source):
        state, differences = read.load_tensors(file, source), []
        require(state["format"] == CHECKPOINT_FORMAT, f"{source} is no checkpoint of format {CHECKPOINT_FORMAT}")
        then, now = state["knobs"], config.as_env() | facts
        require(all(type(text) is str for text in then.values()), "its knobs are no texts")
        for name in sorted(then.keys() | now.keys()):
            old, new = then.get(name, "unset"), now.get(name, "unset")
            longer = name in LENGTH_KNOBS and (float(new) or math.inf) >= (float(old) or math.inf)
            if old != new and not longer and not (name in knobs and knobs[name].metadata["free"]):
                differences.append(f"{name} was {old}, is {new}")
        require(
            config.resume_force or not differences,
            f"{source} is of another run: {'; '.join(differences)}: change "
            "that back, set RESUME_FORCE=1 to go on all the same, or choose another RUN_ID for a new run",
        )
        return state, differences


def matches_checksum(file: Path | bytes) -> bool:
    """Whether the last 32 bytes are the sha256 of all before them; a file is read piece by piece."""
    with io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as stream:
        left, digest = stream.seek(0, os.SEEK_END) - 32, hashlib.sha256()
        stream.seek(0)
        while left > 0:
            piece = stream.read(min(left, 2**24))
            digest.update(piece)
            left -= len(piece) or left  # a file that shrinks meanwhile
        return stream.read() == digest.digest()


class HashedFile:
    """A file that is hashed while it is written, so that no copy of what is saved is held in memory."""

    def __init__(self, file):
        self.file, self.digest, self.flush = file, hashlib.sha256(), file.flush

    def write(self, data) -> int:
        self.digest.update(data)
        return self.file.write(data)


def write_checkpoint(state: dict, folder):
    """To a temporary file, which is read back before it takes the place of the one before. A full disk costs the
    checkpoint and not the run."""
    began, path, temporary = time.perf_counter(), folder.path / "checkpoint.pt", folder.path / ".checkpoint.pt.tmp"
    try:
        with open(temporary, "wb") as file:
            hashed = HashedFile(file)
            torch.save(state, hashed)
            file.write(hashed.digest.digest())
            file.flush()
            os.fsync(file.fileno())
        if not matches_checksum(temporary):
            raise OSError("it does not hold what was written to it: check the disk")
        os.replace(temporary, path)
        size, milliseconds = path.stat().st_size, 1000 * (time.perf_counter() - began)
        folder.log(f"checkpoint: saved step:{state['steps']} bytes:{size} write_time:{milliseconds:.0f}ms")
    except (OSError, RuntimeError) as error:  # torch's writer turns the one into the other, which says less
        reason = error if isinstance(error, OSError) else error.__context__ or error
        folder.log(f"warning: no checkpoint of step {state['steps']} ({reason}): the one before it stays")
    finally:
        temporary.unlink(missing_ok=True)


def lock(file, log):
    """Keep the log of a run for this process while it is open; OSError if another has it."""
    if os.name == "nt":  # which has no fcntl
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, "another run is using it") from error
    except OSError as error:  # Lustre, SMB and some NFS have no such locks
        log(f"warning: {file.name} cannot be locked ({error.strerror}): see that no other run writes to its folder")


def gather(runtime, value) -> list:
    """Every rank's value, in order, on rank 0."""
    values = [value] * runtime.world_size
    if runtime.world_size > 1:
        dist.gather_object(value, values if runtime.is_master else None, dst=0, group=runtime.host_group)
    return values


class Checkpoints(train_gpt.Hooks):
    """The checkpoints of one run: what it resumes from, when the next is due, how it is made and put back; and the
    signals that ask for one."""

    def __init__(self, config, folder):
        super().__init__(config, folder)
        self.runtime, self.save_asked, self.patient = folder.runtime, False, False
        self.resumed_at, self.saved_step, self.saved_at = [], -1, 0.0
        self.writer, self.written = ThreadPoolExecutor(max_workers=1), None
        folder.before_closing = self.writer.shutdown  # so that the log ends with how the run ended
        self.listen()

    def listen(self):
        """SIGUSR1 asks for a checkpoint. SIGTERM, SIGINT, and SIGHUP unless it is ignored (nohup), ask for one and the
        end; a second of them ends at once, and so does the first while no step is under way."""

        def heard(number, frame):
            if number == getattr(signal, "SIGUSR1", None):
                self.save_asked = True
            elif self.stop_signal or not self.patient:
                raise KeyboardInterrupt(number)
            else:
                self.stop_signal = number

        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                signal.signal(number, heard)

    def training(self, begins: bool):
        self.patient = begins
        if not begins and self.stop_signal:  # one that came after the last validation
            raise KeyboardInterrupt(self.stop_signal)

    def choose_folder(self, stream, sources: dict[str, bytes]):
        """Name the run folder, find the checkpoint in it or in RESUME, and check that it is of this run."""
        config, folder = self.config, self.folder
        folder.locate(config, launch_name(config, folder, os.environ))
        source = locate_checkpoint(config, folder) if self.runtime.is_master else None
        # One process maps the file; several may have no common disk, and get its bytes from rank 0.
        several = source and self.runtime.world_size > 1
        self.source, file = self.runtime.broadcast((source, source.read_bytes() if several else source))
        text = stream.read(0, min(2**20, len(stream)))
        self.facts = {name: hashlib.sha256(data).hexdigest()[:16] for name, data in sources.items()}
        self.facts["training data"] = f"{len(stream)} tokens {hashlib.sha256(text).hexdigest()[:16]}"
        self.found, self.differences = (
            read_checkpoint(file, self.source, config, self.facts) if self.source else (None, [])
        )

    def wants_checkpoint(self, trainer) -> bool:
        """Rank 0 every CHECKPOINT_EVERY_SECONDS, but not shortly before the end, which has its own; any rank when a
        signal asks for it."""
        limit, every = self.config.max_wallclock_seconds, self.config.checkpoint_every_seconds
        every, elapsed = every if every >= 0 else 60.0 * (limit > 300), trainer.stopwatch.elapsed("training")
        in_time = self.saved_at + every <= elapsed < (limit or math.inf) - every / 2
        due = self.runtime.is_master and every and in_time and trainer.steps > self.saved_step
        return bool(due or self.save_asked)

    def save(self, trainer, wait: bool):
        """Copy the state now, and write it while training goes on; or `wait`, when a CPU's state needs no copy."""
        self.save_asked = False
        if trainer.exporting:  # the weights are no longer those of the training, whose last checkpoint was made before
            return
        trainer.log_steps()  # so that every loss up to here is known to be finite
        self.folder.log(f"checkpoint: writing step:{trainer.steps}")
        if self.written:
            self.written.result()
        state = self.state(trainer, not wait)
        if state:
            self.written = self.writer.submit(write_checkpoint, state, self.folder)
        self.runtime.broadcast(self.written and self.written.result()) if wait else None  # before any rank leaves
        self.saved_step = trainer.steps
        self.saved_at = trainer.step_log.last_time = trainer.stopwatch.elapsed(
            "training"
        )  # the pause is no part of a step's time

    def state(self, trainer, copy: bool = True) -> dict | None:
        """All that a run needs to go on, on the CPU, on rank 0; None on the others. Collective. Without `copy` what is
        there already is not copied: it must not change before it is written."""
        names, own = {p: name for name, p in trainer.model.named_parameters()}, {}
        for optimizer in trainer.optimizers:
            if trainer.runtime.is_master or isinstance(optimizer, train_gpt.Muon):  # Adam's is the same everywhere
                own |= {names[p]: values for p, values in optimizer.state.items()}
        rng = {"cpu": torch.get_rng_state()}
        if trainer.runtime.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state()
        ranks = gather(trainer.runtime, {"optimizer": to_host(own, copy), "rng": rng})
        if not trainer.runtime.is_master:
            return None
        model, average = to_host(trainer.model.state_dict(), copy), to_host(trainer.average, copy)
        require(
            math.isfinite(sum(float(tensor.sum()) for tensor in model.values())),
            f"step {trainer.steps}: weights are not finite: the last good checkpoint stays: lower the learning rates",
        )
        return {
            "format": CHECKPOINT_FORMAT,
            "knobs": self.config.as_env() | self.facts,
            "model": model,
            "average": average,
            "optimizer": {name: values for rank in ranks for name, values in rank["optimizer"].items()},
            "rng": [rank["rng"] for rank in ranks],
            "position": trainer.loader.position,
            "steps": trainer.steps,
            "train_seconds": trainer.stopwatch.elapsed("training"),
            "finished": trainer.finished,
            "resumed_at": self.resumed_at,
            "recent": list(trainer.step_log.step_seconds),
        }

    def before_warm_up(self, trainer):
        """Fit the micro-batch to the memory, and go on from the checkpoint that was found, if any."""
        with torch.random.fork_rng([trainer.runtime.device] if trainer.runtime.device.type == "cuda" else []):
            fit_memory(trainer)
        if self.found:
            with train_gpt.tool("evaluate", required=True).reading(self.source):
                self.put_back(trainer, self.found)
            self.folder.log(
                f"resumed: step:{trainer.steps} from {self.source} train_time:{1000 * self.saved_at:.0f}ms"
                f"{' finished' if trainer.finished else ''}{'; '.join(['', *self.differences])}"
            )
            self.found = None  # its memory is needed

    def put_back(self, trainer, state: dict):
        """Adam's state goes to every rank, Muon's to the owner of the matrix."""
        kinds = [type(state[name]) for name in ("steps", "position", "train_seconds")]
        require(kinds == [int, int, float], "wrong types of numbers")
        trainer.model.load_state_dict(state["model"])
        # A run that had no average, and goes on with one by force, begins it with the weights as they are.
        values = state["average"]
        require(
            type(values) is list and all(isinstance(value, torch.Tensor) for value in values),
            "its average is no list of tensors",
        )
        values = values or [p.detach() for p in trainer.model.parameters()]
        for tensor, value in zip(trainer.average, values, strict=bool(trainer.average)):
            require(tensor.shape == value.shape, "its average is of another model")
            tensor.copy_(value)
        names = {p: name for name, p in trainer.model.named_parameters()}
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                own = optimizer.own(group["params"]) if isinstance(optimizer, train_gpt.Muon) else group["params"]
                for p in own:
                    self.put_back_one(optimizer, p, names[p], state)
        rng = state["rng"][trainer.runtime.rank % len(state["rng"])]
        torch.set_rng_state(rng["cpu"])
        if trainer.runtime.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"])
        trainer.loader.seek(state["position"])
        trainer.steps = self.saved_step = int(state["steps"])
        trainer.stopwatch.seconds["training"] = trainer.step_log.last_time = self.saved_at = float(
            state["train_seconds"]
        )
        trainer.step_log.step_seconds.extend(map(float, state["recent"]))
        self.resumed_at = [*state["resumed_at"], trainer.steps]
        same_length = all(state["knobs"][name] == self.config.as_env()[name] for name in LENGTH_KNOBS)
        trainer.finished = state["finished"] and same_length

    def put_back_one(self, optimizer, p, name: str, state: dict):
        """An optimizer's state of one parameter. Of an optimizer that is not ours only the shapes can be checked."""
        keys = {train_gpt.Muon: {"momentum_buffer"}, torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}
        values, ours = state["optimizer"].get(name, {}), type(optimizer) in keys
        complete = values.keys() == keys.get(type(optimizer), values.keys())
        shapes = all(
            value.shape == (() if key == "step" else p.shape) if isinstance(value, torch.Tensor) else not ours
            for key, value in values.items()
        )
        unused = not values and not (state["steps"] and p.requires_grad and ours)
        require(unused or values and complete and shapes, f"wrong or no state of {name}")
        if values:
            optimizer.state[p] = {
                key: value.to(p.device, torch.float32 if key == "step" else p.dtype)
                if isinstance(value, torch.Tensor)
                else value
                for key, value in values.items()
            }


def to_host(tree, copy: bool):
    """In the host's memory; from a GPU through pinned memory, in one wait. Without `copy`, what is there stays."""

    def move(value):
        if not isinstance(value, torch.Tensor) or (value.device.type == "cpu" and not copy):
            return value
        host = torch.empty_like(value, device="cpu", pin_memory=value.device.type == "cuda", requires_grad=False)
        return host.copy_(value.detach(), non_blocking=True)

    moved = tree_map(move, tree)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return moved


def fit_memory(trainer):
    """Halve the micro-batch until a micro-step fits the memory of every rank. It runs without DDP: a rank that
    fails must not leave the others waiting for its gradients."""
    loader, T = trainer.loader, trainer.config.train_seq_len
    auto = trainer.config.micro_batch_tokens == "auto" and not trainer.config.grad_accum_steps
    while True:
        tokens, lacking, ballast = loader.rank_tokens // loader.accum_steps, False, []
        try:  # with as much taken as the optimizers, the average and DDP will need
            copies = 3 + bool(trainer.config.ema_decay)
            ballast += [torch.empty_like(p) for p in trainer.model.parameters() for _ in range(copies)]
            x = torch.zeros(tokens // T, T, dtype=torch.long, device=trainer.runtime.device)
            output = trainer.compiled_model(x, x.clone())  # one tensor twice would be compiled as another graph
            (output[0] if isinstance(output, tuple) else output).mean().backward()
        except RuntimeError as error:
            if not (lacking := train_gpt.is_out_of_memory(error)):
                raise
        ballast = x = output = None  # noqa: F841 (given back before the next try)
        trainer.model.zero_grad(set_to_none=True)
        if not trainer.runtime.all_reduce([lacking])[0]:
            return
        torch._dynamo.reset()  # each size is one more graph, and there may only be so many
        require(
            auto and tokens > T,
            f"out of memory with micro-steps of {tokens} tokens: use "
            "MICRO_BATCH_TOKENS=auto without GRAD_ACCUM_STEPS, or a smaller model",
        )
        trainer.config = replace(trainer.config, micro_batch_tokens=str(max(T, tokens // 2)))
        ranks, device_type = trainer.runtime.world_size, trainer.runtime.device.type
        loader.accum_steps = trainer.config.accumulation_steps(ranks, device_type)
        trainer.folder.log(
            f"micro_batch: {tokens} tokens per rank do not fit the memory: trying "
            f"{loader.rank_tokens // loader.accum_steps}, grad_accum_steps:{loader.accum_steps}"
        )
