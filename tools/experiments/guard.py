"""Run a command that must not outlive the process that started it.

    python guard.py SECONDS COMMAND...

Standard input is a pipe that the parent holds open and never writes to. It closes when the parent exits, even by
SIGKILL. The guard then sends SIGTERM to the command, and SIGKILL if it does not exit within SECONDS. When the command
has exited, any remaining descendants, such as the ranks of a killed torchrun, get SIGKILL (outside Linux: only its
process group). The exit code is the command's, or 128 + N if signal N killed it.

This file has few imports, so it starts fast and uses little memory.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

SET_PARENT_DEATH_SIGNAL, SET_CHILD_SUBREAPER = 1, 36  # options of Linux's prctl


def prctl(option: int, value: int):
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value)


def children(pid: int) -> list[int]:
    """Return the live child processes of `pid` (Linux; elsewhere none)."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc") if os.path.isdir("/proc") else []):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", errors="replace") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(name))
    return found


def kill_all(command: subprocess.Popen):
    """Send SIGKILL to the command and all its descendants. On Linux, orphaned descendants are children of the guard,
    because it is a subreaper."""
    if sys.platform != "linux":
        with contextlib.suppress(OSError, AttributeError):
            os.killpg(command.pid, signal.SIGKILL)
        return command.kill()
    while found := children(os.getpid()):
        for pid in found:
            found += children(pid)  # list grandchildren too, before their parent is killed
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def main(patience: float, arguments: list[str]) -> int:
    prctl(SET_CHILD_SUBREAPER, 1)
    # If the guard itself is killed, the command gets SIGTERM.
    posix = {"preexec_fn": lambda: prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM), "start_new_session": True}
    command = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, **posix if os.name == "posix" else {})
    ended = threading.Event()

    def end_with_parent():
        os.read(0, 1)
        command.terminate()
        if not ended.wait(patience):
            kill_all(command)

    threading.Thread(target=end_with_parent, daemon=True).start()
    code = command.wait()
    ended.set()
    kill_all(command)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
