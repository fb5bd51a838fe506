"""Checkpoints, resuming, signals, and micro-batches that fit the memory, for train_gpt.py.

RunFolder and Trainer are subclasses of the script's own, which uses them if this file exists. Without it a run trains,
exports and scores, but it cannot resume after it was stopped, and it does not adapt its micro-batch to the memory.

A checkpoint is logs/<run_id>/checkpoint.pt: torch's format, followed by its sha256. It holds everything that a run
needs to continue exactly where it was: weights, optimizers, average, generators, position in the data, and the clock.
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
from train_gpt import UserError, require

CHECKPOINT_FORMAT = "train_gpt_checkpoint_v1"
LENGTH_KNOBS = ("ITERATIONS", "MAX_WALLCLOCK_SECONDS")  # a run that resumes may be longer


def launch_name(config, folder, environ) -> str:
    """The run folder of this launch before torchrun restarted it; empty at the first start.

    The config.env of every folder begins with the name of its launch.
    """
    launch = environ.get("TORCHELASTIC_RUN_ID", "none")
    if launch == "none":  # a static rendezvous has no name of its own
        launch += f" of {os.getppid()}"
    folder.header = f"# launch {launch}\n"
    if environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not folder.runtime.is_master:
        return ""
    made = Path(config.log_dir).glob("*/config.env")
    made = [path for path in made if path.read_bytes().startswith(folder.header.encode())]
    return max(made, key=lambda path: path.stat().st_mtime).parent.name if made else ""


def locate_checkpoint(config, folder) -> Path | None:
    """The file to resume from. None for a new run, or for one that died before its first checkpoint."""
    own = folder.path / "checkpoint.pt"
    if folder.path.exists():
        hint = f"choose another RUN_ID{f' (and RESUME={own} to continue from it)' if own.exists() else ''}"
        require(config.resume != "never", f"RESUME=never, but folder {folder.path} exists: {hint}")
        require(not (folder.path / "result.json").exists(), f"the run in {folder.path} is finished: {hint}")
        require((folder.path / "train.log").exists(), f"{folder.path} exists and is no run folder: {hint}")
        if own.exists():
            return own
    if config.resume in ("auto", "never"):
        return None
    named = Path(config.resume)
    if named.is_dir():
        named = named / "checkpoint.pt"
    require(named.is_file(), f"RESUME={config.resume}: there is no checkpoint {named}: give a run folder or a file")
    return named


def read_checkpoint(file: Path | bytes, source, config, facts: dict[str, str]) -> tuple[dict, list[str]]:
    """The state in a checkpoint, and in what its run differed from this one of all that shapes the result.

    The tensors of a file stay in it, mapped into memory, until they are copied to where they belong.
    """
    intact = matches_checksum(file)
    remedy = "resume from another, or remove it to start again"
    require(intact, f"{source} is damaged: it does not match its checksum: {remedy}")
    evaluate = train_gpt.tool("artifact", required=True)
    with evaluate.reading(source):
        state = evaluate.load_tensors(file, source)
        require(state["format"] == CHECKPOINT_FORMAT, f"{source} is no checkpoint of format {CHECKPOINT_FORMAT}")
        then = state["knobs"]
        require(all(type(text) is str for text in then.values()), "its knobs are no texts")
        differences = differences_between(then, config.as_env() | facts, config.knobs())
        require(
            config.resume_force or not differences,
            f"{source} is of another run: {'; '.join(differences)}: change that back, set RESUME_FORCE=1 to continue "
            "anyway, or choose another RUN_ID for a new run",
        )
        return state, differences


def differences_between(then: dict[str, str], now: dict[str, str], knobs) -> list[str]:
    """What shapes the result and differs. A longer run is no difference, nor is a moved knob at its off value."""
    if check := train_gpt.tool("check", log=str):
        then = check.drop_moved_knobs(then, now)
    found = []
    for name in sorted(then.keys() | now.keys()):
        old = then.get(name, "unset")
        new = now.get(name, "unset")
        free = name in knobs and knobs[name].metadata["free"]
        longer = name in LENGTH_KNOBS and (float(new) or math.inf) >= (float(old) or math.inf)
        if old != new and not longer and not free:
            found.append(f"{name} was {old}, is {new}")
    return found


def matches_checksum(file: Path | bytes) -> bool:
    """Whether the last 32 bytes are the sha256 of all before them. A file is read piece by piece."""
    digest = hashlib.sha256()
    with io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as stream:
        left = stream.seek(0, os.SEEK_END) - 32
        stream.seek(0)
        while left > 0:
            piece = stream.read(min(left, 2**24))
            digest.update(piece)
            left -= len(piece) or left  # the file may shrink meanwhile
        return stream.read() == digest.digest()


class HashedFile:
    """A file that is hashed while it is written, so that memory holds no copy of what is saved."""

    def __init__(self, file):
        self.file = file
        self.digest = hashlib.sha256()
        self.flush = file.flush

    def write(self, data) -> int:
        self.digest.update(data)
        return self.file.write(data)


def write_file(path: Path, data: bytes):
    """Write a file atomically and verify it: afterwards it is complete, or as it was before."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if temporary.read_bytes() != data:
            raise OSError("it does not hold what was written: check the disk")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_checkpoint(state: dict, folder):
    """Write a temporary file, read it back, and put it in the place of the previous checkpoint.

    On a full disk the checkpoint is lost and the run goes on.
    """
    began = time.perf_counter()
    path = folder.path / "checkpoint.pt"
    temporary = folder.path / ".checkpoint.pt.tmp"
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
        size = path.stat().st_size
        milliseconds = 1000 * (time.perf_counter() - began)
        folder.log(f"checkpoint: saved step:{state['steps']} bytes:{size} write_time:{milliseconds:.0f}ms")
    except (OSError, RuntimeError) as error:  # torch's writer turns an OSError into a RuntimeError, which says less
        reason = error if isinstance(error, OSError) else error.__context__ or error
        folder.log(f"warning: no checkpoint of step {state['steps']} ({reason}): the one before it stays")
    finally:
        temporary.unlink(missing_ok=True)


def lock(file, log):
    """Lock the log of a run for this process while it is open. Raises OSError if another process has it."""
    if os.name == "nt":  # Windows has no fcntl
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, "another run is using it") from error
    except OSError as error:  # Lustre, SMB and some NFS have no such locks
        log(f"warning: {file.name} cannot be locked ({error.strerror}): see that no other run writes to its folder")


def gather(runtime, value) -> list:
    """The values of all ranks in order, on rank 0."""
    values = [value] * runtime.world_size
    if runtime.world_size > 1:
        dist.gather_object(value, values if runtime.is_master else None, dst=0, group=runtime.host_group)
    return values


class RunFolder(train_gpt.RunFolder):
    """A run folder that is locked, survives a restart, and whose files are verified when they are written."""

    header = ""  # first line of config.env; a restarted launch finds its folder by it
    file = None  # train.log, held open because the lock belongs to it

    def __init__(self, runtime):
        super().__init__(runtime)
        self.before_closing = lambda: None  # waits for a checkpoint that is still being written

    def choose(self, config, stream, sources: dict[str, bytes]):
        self.checkpoints = Checkpoints(config, self)
        self.checkpoints.choose_folder(stream, sources)

    def locate(self, config, name: str = ""):
        """Name the folder: RUN_ID, or `name`, or a time stamp with a random number, since containers share clocks."""
        stamp = time.strftime(f"%Y-%m-%d_%H-%M-%S_{int.from_bytes(os.urandom(3))}")
        self.run_id = self.runtime.broadcast(config.run_id or name or stamp)
        self.path = Path(config.log_dir) / self.run_id

    def create(self, config, sources: dict[str, bytes], header: str = ""):
        try:
            if self.runtime.is_master:
                self.path.mkdir(parents=True, exist_ok=True)
                self.file = open(self.path / "train.log", "a", encoding="utf-8")
                lock(self.file, self.log)
        except OSError as error:
            place = f"LOG_DIR={config.log_dir} RUN_ID={self.run_id}: folder {self.path}"
            raise UserError(f"{place} cannot be opened ({error.strerror}): choose another") from error
        super().create(config, sources, header or self.header)

    def write(self, name: str, data: bytes):
        path = self.path / name
        try:
            write_file(path, data)
        except OSError as error:
            raise OSError(f"{path} cannot be written ({error}): make room, or move LOG_DIR") from error

    def close(self, *last_lines: str):
        self.before_closing()
        super().close(*last_lines)
        self.created = False
        if self.file:
            self.file.close()
            self.file = None


class Trainer(train_gpt.Trainer):
    """A training loop that saves checkpoints, resumes from one, and ends after a signal."""

    def __init__(self, config, folder, stopwatch, loader):
        super().__init__(config, folder, stopwatch, loader)
        self.checkpoints = folder.checkpoints
        self.checkpoints.before_warm_up(self)

    @property
    def resumed_at(self) -> list[int]:
        return self.checkpoints.resumed_at

    def plan(self) -> tuple[float, float, bool]:
        """The script's own, after all checkpoints that are due, and the exit that a signal on any rank asks for."""
        while True:
            scale, progress, stop = super().plan()
            wanted = not stop and self.checkpoints.wants_checkpoint(self)
            save, leave = self.runtime.all_reduce([wanted, bool(self.checkpoints.stop_signal)])
            if not save and not leave:
                return scale, progress, stop
            self.checkpoints.save(self, wait=bool(leave))
            if leave:
                raise KeyboardInterrupt(self.checkpoints.stop_signal)

    def interrupted(self) -> bool:
        return bool(self.checkpoints.stop_signal)

    def save(self):
        self.checkpoints.save(self, wait=True)

    def train(self, evaluator):
        self.checkpoints.training(True)
        score = super().train(evaluator)
        self.checkpoints.training(False)
        return score


class Checkpoints:
    """The checkpoints of one run: what it resumes from, when the next is due, how to make and restore one.

    It also handles the signals that ask for one.
    """

    stop_signal = 0  # number of a signal that asks the run to save a checkpoint and exit

    def __init__(self, config, folder):
        self.config = config
        self.folder = folder
        self.runtime = folder.runtime
        self.save_requested = False
        self.in_training = False  # a signal waits for the end of the step
        self.resumed_at = []
        self.saved_step = -1
        self.saved_at = 0.0  # training clock of the last checkpoint
        self.writer = ThreadPoolExecutor(max_workers=1)
        self.written = None  # the checkpoint that is being written, a Future
        folder.before_closing = self.writer.shutdown  # so that the log ends with how the run ended
        self.handle_signals()

    def handle_signals(self):
        """SIGUSR1 saves a checkpoint. SIGTERM, SIGINT and SIGHUP save one and end the run.

        A second signal of the latter ends it at once, and so does the first one outside of the training. SIGHUP stays
        ignored under nohup.
        """

        def handler(number, frame):
            if number == getattr(signal, "SIGUSR1", None):
                self.save_requested = True
            elif self.stop_signal or not self.in_training:
                raise KeyboardInterrupt(number)
            else:
                self.stop_signal = number

        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                signal.signal(number, handler)

    def training(self, begins: bool):
        self.in_training = begins
        if not begins and self.stop_signal:  # it came after the last validation
            raise KeyboardInterrupt(self.stop_signal)

    def choose_folder(self, stream, sources: dict[str, bytes]):
        """Name the run folder, find the checkpoint in it or in RESUME, and check that it is of this run."""
        config = self.config
        folder = self.folder
        folder.locate(config, launch_name(config, folder, os.environ))
        source = locate_checkpoint(config, folder) if self.runtime.is_master else None
        # One process maps the file. Several may have no common disk, so they get its bytes from rank 0.
        several = source and self.runtime.world_size > 1
        self.source, file = self.runtime.broadcast((source, source.read_bytes() if several else source))
        text = stream.read(0, min(2**20, len(stream)))
        self.facts = {name: hashlib.sha256(data).hexdigest()[:16] for name, data in sources.items()}
        self.facts["training data"] = f"{len(stream)} tokens {hashlib.sha256(text).hexdigest()[:16]}"
        self.found = None
        self.differences = []
        if self.source:
            self.found, self.differences = read_checkpoint(file, self.source, config, self.facts)

    def wants_checkpoint(self, trainer) -> bool:
        """Rank 0 every CHECKPOINT_EVERY_SECONDS, but not shortly before the end, which has its own. Any rank after a
        signal."""
        limit = self.config.max_wallclock_seconds
        every = self.config.checkpoint_every_seconds
        if every < 0:
            every = 60.0 if limit > 300 else 0.0
        elapsed = trainer.stopwatch.elapsed("training")
        in_time = self.saved_at + every <= elapsed < (limit or math.inf) - every / 2
        due = self.runtime.is_master and every and in_time and trainer.steps > self.saved_step
        return bool(due or self.save_requested)

    def save(self, trainer, wait: bool):
        """Copy the state now and write it while training goes on, or `wait` until it is written.

        If it waits, what is in the memory of a CPU needs no copy.
        """
        self.save_requested = False
        if trainer.exporting:  # the weights are those of the export; the last checkpoint of the training exists
            return
        trainer.log_steps()  # raises if a loss up to here is not finite
        self.folder.log(f"checkpoint: writing step:{trainer.steps}")
        if self.written:
            self.written.result()
        state = self.state(trainer, copy=not wait)
        if state:
            self.written = self.writer.submit(write_checkpoint, state, self.folder)
        if wait:  # on all ranks, before any of them leaves
            self.runtime.broadcast(self.written and self.written.result())
        self.saved_step = trainer.steps
        self.saved_at = trainer.stopwatch.elapsed("training")
        trainer.last_time = self.saved_at  # the pause is no part of a step's time

    def state(self, trainer, copy: bool = True) -> dict | None:
        """Everything that a run needs to continue, on the CPU of rank 0; None on the other ranks. It is collective.

        Without `copy`, tensors that are on the CPU are not copied and must not change until they are written.
        """
        names = {p: name for name, p in trainer.model.named_parameters()}
        own = {}
        for optimizer in trainer.optimizers:
            # The state of Adam is the same on every rank. Muon's is on the rank that owns the matrix.
            if trainer.runtime.is_master or isinstance(optimizer, train_gpt.Muon):
                own |= {names[p]: values for p, values in optimizer.state.items()}
        rng = {"cpu": torch.get_rng_state()}
        if trainer.runtime.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state()
        ranks = gather(trainer.runtime, {"optimizer": to_host(own, copy), "rng": rng})
        if not trainer.runtime.is_master:
            return None
        model = to_host(trainer.model.state_dict(), copy)
        require(
            math.isfinite(sum(float(tensor.sum()) for tensor in model.values())),
            f"step {trainer.steps}: weights are not finite: the last good checkpoint stays: lower the learning rates",
        )
        return {
            "format": CHECKPOINT_FORMAT,
            "knobs": self.config.as_env() | self.facts,
            "model": model,
            "average": to_host(trainer.average, copy),
            "optimizer": {name: values for rank in ranks for name, values in rank["optimizer"].items()},
            "rng": [rank["rng"] for rank in ranks],
            "position": trainer.loader.position,
            "steps": trainer.steps,
            "train_seconds": trainer.stopwatch.elapsed("training"),
            "finished": trainer.finished,
            "resumed_at": self.resumed_at,
            "recent": list(trainer.step_seconds),
        }

    def before_warm_up(self, trainer):
        """Fit the micro-batch to the memory, and load the checkpoint that was found, if any."""
        with torch.random.fork_rng([trainer.runtime.device] if trainer.runtime.device.type == "cuda" else []):
            fit_memory(trainer)
        if self.found:
            with train_gpt.tool("artifact", required=True).reading(self.source):
                self.restore(trainer, self.found)
            finished = " finished" if trainer.finished else ""
            differences = "; ".join(["", *self.differences])
            where = f"from {self.source} train_time:{1000 * self.saved_at:.0f}ms"
            self.folder.log(f"resumed: step:{trainer.steps} {where}{finished}{differences}")
            self.found = None  # its memory is needed

    def restore(self, trainer, state: dict):
        """Load a state. That of Adam goes to every rank, that of Muon to the owner of the matrix."""
        kinds = [type(state[name]) for name in ("steps", "position", "train_seconds")]
        require(kinds == [int, int, float], "wrong types of numbers")
        trainer.model.load_state_dict(state["model"])
        # A run without an average that continues with one, by RESUME_FORCE, begins it with the current weights.
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
                params = group["params"]
                if isinstance(optimizer, train_gpt.Muon):  # only the matrices of this rank
                    params = params[trainer.runtime.rank :: trainer.runtime.world_size]
                for p in params:
                    self.restore_one(optimizer, p, names[p], state)
        rng = state["rng"][trainer.runtime.rank % len(state["rng"])]
        torch.set_rng_state(rng["cpu"])
        if trainer.runtime.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"])
        trainer.loader.seek(state["position"])
        trainer.steps = int(state["steps"])
        self.saved_step = trainer.steps
        self.saved_at = float(state["train_seconds"])
        trainer.stopwatch.seconds["training"] = self.saved_at
        trainer.last_time = self.saved_at
        trainer.step_seconds.extend(map(float, state["recent"]))
        self.resumed_at = [*state["resumed_at"], trainer.steps]
        same_length = all(state["knobs"][name] == self.config.as_env()[name] for name in LENGTH_KNOBS)
        trainer.finished = state["finished"] and same_length

    def restore_one(self, optimizer, p, name: str, state: dict):
        """Load the state of one parameter. For an optimizer of a model file only the shapes can be checked."""
        keys = {train_gpt.Muon: {"momentum_buffer"}, torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}
        ours = type(optimizer) in keys
        values = state["optimizer"].get(name, {})
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
    """A tree of tensors in the memory of the host. Copies from a GPU go through pinned memory, with one wait.

    Without `copy`, tensors that are on the host are taken as they are.
    """

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
    """Halve the micro-batch until a micro-step fits the memory of every rank.

    It runs without DDP: a rank that fails must not leave the others waiting for its gradients.
    """
    loader = trainer.loader
    runtime = trainer.runtime
    T = trainer.config.train_seq_len
    auto = trainer.config.micro_batch_tokens == "auto" and not trainer.config.grad_accum_steps
    while True:
        tokens = loader.rank_tokens // loader.accum_steps
        lacking = not micro_step_fits(trainer, tokens // T)
        if not runtime.all_reduce([lacking])[0]:
            return
        torch._dynamo.reset()  # every size is one more graph, and their number is limited
        require(
            auto and tokens > T,
            f"out of memory with micro-steps of {tokens} tokens: use "
            "MICRO_BATCH_TOKENS=auto without GRAD_ACCUM_STEPS, or a smaller model",
        )
        trainer.config = replace(trainer.config, micro_batch_tokens=str(max(T, tokens // 2)))
        trainer.coder.config = trainer.config  # the artifact records it
        loader.accum_steps = trainer.config.accumulation_steps(runtime.world_size, runtime.device.type)
        trainer.folder.log(
            f"micro_batch: {tokens} tokens per rank do not fit the memory: trying "
            f"{loader.rank_tokens // loader.accum_steps}, grad_accum_steps:{loader.accum_steps}"
        )


def micro_step_fits(trainer, rows: int) -> bool:
    """Whether forward and backward of so many sequences fit the memory.

    Meanwhile as much memory is taken as the optimizers, the average and DDP will need.
    """
    copies = 3 + bool(trainer.config.ema_decay)
    ballast = []
    try:
        ballast += [torch.empty_like(p) for p in trainer.model.parameters() for _ in range(copies)]
        x = torch.zeros(rows, trainer.config.train_seq_len, dtype=torch.long, device=trainer.runtime.device)
        output = trainer.compiled_model(x, x.clone())  # the same tensor twice would be another graph
        losses, *extra = output if isinstance(output, tuple) else (output,)
        sum(extra, losses.mean()).backward()
    except RuntimeError as error:
        kernels = train_gpt.tool("kernels", log=str)
        if not (kernels and kernels.is_out_of_memory(error)):
            raise
        return False
    finally:
        trainer.model.zero_grad(set_to_none=True)
    return True
