"""What the scripts of this folder share: messages and exit codes, locks, and how a data set takes its place."""

import hashlib
import json
import os
import shutil
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

DATA_ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA_ROOT.parent))  # of train_gpt.py

from train_gpt import UserError, tool  # noqa: E402


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# ----------------------------------------------------------------------------------------------------------------------
# Speaking and ending
# ----------------------------------------------------------------------------------------------------------------------


def say(line: str, stream=None) -> None:
    """Print a line. A pipe that was closed, or letters that the terminal lacks, end no run: its files matter more."""
    stream = stream or sys.stdout
    try:
        try:
            print(line, file=stream, flush=True)
        except UnicodeEncodeError:
            print(line.encode("ascii", "backslashreplace").decode(), file=stream, flush=True)
    except (OSError, ValueError):  # what is in the buffer would fail once more, when Python flushes it at its end
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_command(action: Callable[[], None], interrupted: str) -> int:
    """The exit code of `action`: 0, 2 after one line that says what to do, 130 after Ctrl+C and what it leaves."""
    try:
        action()
        return 0
    except UserError as error:
        say(f"error: {error}", sys.stderr)
    except OSError as error:
        say(f"error: {error}; for a data root that can be written to, pass --out DIR", sys.stderr)
    except KeyboardInterrupt:
        say(f"interrupted: {interrupted}", sys.stderr)
        return 130
    return 2


def in_thread(task: Callable, *arguments) -> Future:
    """`task` at work beside this thread, which Ctrl+C reaches all the same, and which need not wait for it to end."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(task(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def leave(code: int) -> None:
    """End the process without waiting for threads that work for nobody any more."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Write so that the name appears only with all of its bytes on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tool("checkpoint", required=True).write_file(path, data)


def write_json(path: Path, value: dict) -> None:
    write_file(path, (json.dumps(value, indent=2) + "\n").encode("utf-8"))


def read_json(path: Path) -> dict:
    """The object in a file; empty where it is absent or damaged in whatever way."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# ----------------------------------------------------------------------------------------------------------------------
# Data sets: one process at a time makes one, beside its place
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, owner: Callable[[], str]) -> Iterator[None]:
    """Hold a lock that ends with this process, however that ends; UserError, with `owner()`, if another holds it."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        with warnings.catch_warnings(record=True) as told:  # of a file system without locks, where a file has to do
            lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{owner()}; wait for it (if there is no such process, delete {path})") from None
    for warning in told:
        say(f"note: {path.parent}: {warning.message}", sys.stderr)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def claimed(folder: Path, command: str) -> Iterator[Path]:
    """An empty folder to make the data set `folder` in, which nobody else makes meanwhile. It is gone afterwards,
    unless `publish` gave it its name, and so is what killed runs have left."""
    folder = folder.resolve()  # a link to another disk stays one
    pattern = f"{folder.name}~*"  # names of data sets have no ~

    def owner() -> str:
        found = next((read_json(path / "manifest.json") for path in folder.parent.glob(pattern)), {})
        who = f"process {found.get('process')} since {found.get('started')}, with: {found.get('command')}"
        return f"{folder}: another command is making it ({who if found else 'it has just begun'})"

    with locked(folder.with_name(f".{folder.name}.lock"), owner):
        for stale in folder.parent.glob(pattern):
            shutil.rmtree(stale, ignore_errors=True)
        work = folder.with_name(f"{folder.name}~{os.getpid()}")
        work.mkdir(exist_ok=True)
        try:
            state = {"incomplete": "run the same command again", "command": command}
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            write_json(
                work / "manifest.json",
                state | {"process": f"{os.getpid()} on {socket.gethostname()}", "started": started},
            )
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def publish(work: Path, folder: Path, manifest: dict, model: tuple[Path, bytes] | None = None) -> None:
    """Give `work` the name `folder` in one step, its manifest written last. model: path and bytes of the tokenizer."""
    folder, former = folder.resolve(), work.with_name(f"{work.name}.former")
    if folder.exists():  # at no moment may it lie beside a tokenizer that is not its own
        os.rename(folder, former)
    if model is not None and not (model[0].is_file() and model[0].read_bytes() == model[1]):
        write_file(*model)
    write_json(work / "manifest.json", manifest)
    os.rename(work, folder)
    shutil.rmtree(former, ignore_errors=True)


def agrees(found: object, header: object) -> bool:
    """Whether `found` says everything that `header` says; it may say more."""
    if isinstance(header, dict) and isinstance(found, dict):
        return all(key in found and agrees(found[key], value) for key, value in header.items())
    return found == header


def is_complete(folder: Path, model: Path | None, header: dict) -> bool:
    """Whether a manifest that agrees with `header` is there, and every file that it names, whole, and no shard more."""
    manifest = read_json(folder / "manifest.json")
    try:
        shards = {shard["file"]: shard["sha256"] for it in manifest["splits"].values() for shard in it["shards"]}
        whole = all(hash_file(folder / name) == digest for name, digest in shards.items())
        whole = whole and (model is None or hash_file(model) == manifest["tokenizer"]["sha256"])
    except (OSError, LookupError, TypeError, AttributeError):
        return False
    return whole and agrees(manifest, header) and set(shards) == {path.name for path in folder.glob("fineweb_*.bin")}


def refuse_foreign(folder: Path, header: dict, model: Path | None) -> None:
    """UserError where a finished data set of another command would be lost, or files of unknown origin."""
    manifest = read_json(folder / "manifest.json")
    if "incomplete" in manifest or agrees(manifest, header):
        return
    remedy = "choose another --name, or pass --overwrite"
    if manifest or any(folder.glob("fineweb_*.bin")):
        origin = f"made by: {manifest.get('command', 'an unknown command')}" if manifest else "without a manifest"
        raise UserError(f"{folder}: holds another data set, {origin}; {remedy}")
    if model is not None and model.is_file() and hash_file(model) != header["tokenizer"].get("sha256"):
        raise UserError(f"{model}: is another tokenizer; {remedy}")
