"""Runs a command that may be anyone's code, without network and without files other than those it is given.

    python isolation.py OPTIONS COMMAND...        OPTIONS: a JSON object, see `start`

Two independent layers, of which at least one must hold; otherwise the command is not started:

- namespaces (`unshare` of util-linux): no network, no other processes, empty folders in place of hidden ones;
- Landlock with a seccomp filter: only listed paths can be opened, and no system call leads around that.

This file imports nothing but the standard library, since it runs before the command in the process that becomes it.
"""

import ctypes
import functools
import json
import os
import platform
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

FILE_LIMIT = 2**32  # bytes of a file that the command may write
NOT_ISOLATED = 77  # exit code if neither layer holds, or a hidden file can still be opened
PRIVATE = ("/tmp", "/var/tmp", "/dev/shm")  # emptied in the namespace, since other processes write there
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/opt", "/proc", "/sys")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")

libc = ctypes.CDLL(None, use_errno=True)


# ---------- The parent ------------------------------------------------------------------------------------------------


def interpreter_paths() -> list[str]:
    """The folders that Python and its packages are imported from."""
    found = {sys.prefix, sys.base_prefix, *filter(os.path.isdir, sys.path)}
    return sorted(
        os.path.realpath(path) for path in found if "packages" in path or path in (sys.prefix, sys.base_prefix)
    )


UNSHARE = ["unshare", "--user", "--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child", "--mount"]


def wrap(command: list, options: dict) -> list[str]:
    wrapped = [sys.executable, "-I", __file__, json.dumps(options), *map(str, command)]
    return [*UNSHARE, *wrapped] if options["namespaces"] else wrapped


@functools.cache
def has_namespaces() -> bool:
    """Whether this user may create namespaces and mount in them. Containers and some distributions forbid it."""
    if not shutil.which("unshare"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        options = {"folder": folder, "hidden": [], "readable": [], "memory": 0, "namespaces": True}
        tried = subprocess.run(wrap([shutil.which("true")], options), capture_output=True, check=False)
    return tried.returncode == 0


@functools.cache
def available() -> bool:
    """Whether a command can be isolated on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        child = start([shutil.which("true")], Path(folder), [], stderr=subprocess.DEVNULL)
        return child.wait() == 0


def start(command: list, folder: Path, hidden: list[Path], readable: list[Path] = (), memory: int = 0, **streams):
    """A Popen of the command, isolated, with `folder` as its home, working and temporary directory.

    hidden: folders whose files must not be readable. readable: more files and folders that it may read. memory: limit
    of its address space in bytes; 0 for none. The exit code is NOT_ISOLATED if it could not be isolated.
    """
    options = {
        "folder": str(folder.resolve()),
        "hidden": [str(path.resolve()) for path in hidden if path.is_dir()],
        "readable": [*interpreter_paths(), *(str(path.resolve()) for path in readable)],
        "memory": memory,
        "namespaces": has_namespaces(),
    }
    home = {name: options["folder"] for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")}
    kept = ("PATH", "LD_LIBRARY_PATH", "LANG", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CXX")
    environ = {name: os.environ[name] for name in kept if name in os.environ} | home
    return subprocess.Popen(wrap(command, options), cwd=folder, env=environ, **streams)


# ---------- The child, before it becomes the command ------------------------------------------------------------------


def mount(source: str, target: str, kind: str | None = None, flags: int = 0):
    """The system call. The command `mount` would resolve /proc/self/fd/N to a path first."""
    if libc.mount(source.encode(), target.encode(), kind and kind.encode(), flags, None):
        raise OSError(ctypes.get_errno(), f"{source} cannot be mounted at {target}")


def hide(folders: list[str], kept: list[str]):
    """Mount empty folders over these, and mount again what is kept and was in them."""
    inside = [path for path in kept if any(Path(path).is_relative_to(folder) for folder in folders)]
    handles = {path: os.open(path, os.O_PATH) for path in inside if os.path.exists(path)}
    set_read_only("/", True)
    for folder in filter(os.path.isdir, folders):
        mount("none", folder, "tmpfs")
    for path, handle in handles.items():
        source = f"/proc/self/fd/{handle}"
        if os.path.isdir(source):
            os.makedirs(path, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(path).touch()
        mount(source, path, flags=4096 | 16384)  # MS_BIND, MS_REC
        os.close(handle)
    mount("none", "/proc", "proc")


def set_read_only(path: str, on: bool):
    """For every mount from this path on. Raises OSError before Linux 5.12."""
    attributes = struct.pack("QQQQ", on, not on, 0, 0)  # MOUNT_ATTR_RDONLY is 1
    if libc.syscall(442, -100, path.encode(), 0x8000, attributes, len(attributes)):  # mount_setattr, AT_RECURSIVE
        raise OSError(ctypes.get_errno(), f"{path} cannot be made read-only")


def drop_capabilities():
    """Give up what root of a user namespace may do, such as unmounting what hides a folder."""
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    libc.capset(header, (ctypes.c_uint32 * 6)())


# Access rights of Landlock (linux/landlock.h).
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
TRUNCATE, IOCTL = 1 << 14, 1 << 15
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, the same on all architectures


def landlock(readable: list[str], writable: list[str]) -> bool:
    """Allow nothing but these files and folders to be opened. False if the kernel has no Landlock."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    every = (1 << {1: 13, 2: 14}.get(version, 15 + (version >= 5))) - 1
    attributes = struct.pack("QQQ", every, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 * (1 + (version >= 4) + (version >= 6))
    ruleset = libc.syscall(CREATE_RULESET, attributes, size, 0)
    rules = dict.fromkeys(readable, EXECUTE | READ_FILE | READ_DIR) | dict.fromkeys(writable, every)
    for path, rights in rules.items():
        if not os.path.exists(path):
            continue
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights &= every if os.path.isdir(path) else every & OF_FILES
        if libc.syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, handle), 0):
            raise OSError(ctypes.get_errno(), f"Landlock takes no rule for {path}")
        os.close(handle)
    return not libc.syscall(RESTRICT_SELF, ruleset, 0)


# System calls that a score does not need, and that lead out or leave something behind: {architecture: (AUDIT_ARCH,
# socket, others)}. The others are ptrace, mount, umount2, pivot_root, setns, unshare, process_vm_readv,
# process_vm_writev, open_by_handle_at, bpf, userfaultfd, io_uring_setup, pidfd_getfd, shmget, msgget, semget, add_key,
# keyctl.
REFUSED = {
    "x86_64": (
        0xC000003E,
        41,
        (101, 165, 166, 155, 308, 272, 310, 311, 304, 321, 323, 425, 438, 29, 68, 64, 248, 250),
    ),
    "aarch64": (
        0xC00000B7,
        198,
        (117, 40, 39, 41, 268, 97, 270, 271, 265, 280, 282, 425, 438, 194, 186, 190, 217, 219),
    ),
}
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # of the packet filter
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | 1  # EPERM


def seccomp() -> bool:
    """Refuse sockets other than local ones, and the calls above. False if the machine or the kernel has no filter."""
    if platform.machine() not in REFUSED:
        return False
    architecture, socket, calls = REFUSED[platform.machine()]
    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, REFUSE), (LOAD, 0, 0, 0)]
    for call in calls:
        program += [(EQUAL, 0, 1, call), (RETURN, 0, 0, REFUSE)]
    program += [(EQUAL, 0, 3, socket), (LOAD, 0, 0, 16), (EQUAL, 1, 0, 1), (RETURN, 0, 0, REFUSE)]  # 1: AF_UNIX
    program += [(RETURN, 0, 0, ALLOW)]
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code)
    pointer = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    return libc.prctl(22, 2, pointer, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def can_open(folders: list[str]) -> list[str]:
    """Files in these folders that can still be opened."""
    found = []
    for folder in folders:
        for place, _, names in os.walk(folder):
            for name in names:
                try:
                    os.close(os.open(os.path.join(place, name), os.O_RDONLY))
                    found.append(os.path.join(place, name))
                except OSError:
                    pass
    return found


def main(argv: list[str]):
    options, command = json.loads(argv[0]), argv[1:]
    folder, layers = options["folder"], []
    os.setsid()
    if options["namespaces"]:
        hide([*options["hidden"], *PRIVATE], [folder, *options["readable"]])
        set_read_only(folder, False)
        os.chdir(folder)
        layers.append("namespaces")
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if options["memory"]:
        resource.setrlimit(resource.RLIMIT_AS, (options["memory"], options["memory"]))
    drop_capabilities()
    gpus = [str(path) for path in Path("/dev").glob("nvidia*")]
    if landlock([*options["readable"], *SYSTEM], [folder, *DEVICES, *gpus]) and seccomp():
        layers.append("Landlock")
    if not layers or can_open(options["hidden"]):
        print("not isolated: this machine has no namespaces and no Landlock for this user", file=sys.stderr)
        sys.exit(NOT_ISOLATED)
    print(f"isolation:{'+'.join(layers)}", file=sys.stderr, flush=True)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
