"""The inside of the sandbox: a program of its own that shuts itself in, then becomes the program of an answer.

It imports the standard library alone and is run by its path, with one job on its standard input:

    {"program": "...", "calls": ["add(1, 2)"], "input": null, "limits": {...}, "folders": [...]}

New namespaces come first: no network, no process and no mount of outside. The root becomes an empty file system in
memory with the folders of Python and of the system, read-only, and one small writable folder. Rights are dropped,
limits set, then Python runs the program. What cannot be had is said on standard error, with the exit code NO_CELL.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import struct
import sys
from pathlib import Path
from typing import Any, NoReturn

NO_CELL = 97
"""Exit code where the sandbox cannot be had."""
NOBODY = 65534
NEW_MOUNTS, NEW_IPC, NEW_NAMES, NEW_USER, NEW_PROCESSES, NEW_NETWORK = (
    0x00020000, 0x08000000, 0x04000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
READ_ONLY, NO_SETUID, NO_DEVICES, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
DETACH = 2
MOUNT_SETATTR, EVERYTHING_BELOW = 442, 0x8000
DIE_WITH_PARENT, DUMPABLE, NO_NEW_RIGHTS = 1, 4, 38
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "ppc64le": 203, "s390x": 217}
"""Number of the system call, which the C library has no function for."""
RESULTS = 3
"""File descriptor of the values of calls."""
RUNNER = r"""
import json, os, sys
calls = json.load(open("/job/calls.json"))
out = os.fdopen(3, "w", encoding="utf-8")
def plain(value, depth=0):
    kind = type(value)
    if depth > 50:
        raise ValueError
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is bytes:
        return {"bytes": list(value)}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind in (list, tuple, set, frozenset):
        return {kind.__name__: [plain(each, depth + 1) for each in value]}
    if kind is dict:
        return {"dict": [[plain(key, depth + 1), plain(each, depth + 1)] for key, each in value.items()]}
    raise ValueError
space = {"__name__": "answer"}
def say(**values):
    out.write(json.dumps(values) + "\n")
    out.flush()
try:
    exec(compile(open("/job/program.py", encoding="utf-8").read(), "answer", "exec"), space)
    say(began=True)
    for number, call in enumerate(calls):
        try:
            say(number=number, value=plain(eval(compile(call, "call", "eval"), space)))
        except Exception as error:
            say(number=number, error=type(error).__name__)
except BaseException as error:
    say(error=type(error).__name__)
out.flush()
os._exit(0)
"""
"""Program that gives the values of calls; it never sees the right ones."""


class Unavailable(Exception):
    """The sandbox cannot be had; the text says why."""


_c = ctypes.CDLL(None, use_errno=True)


def _must(result: int, what: str) -> None:
    if result != 0:
        raise Unavailable(f"{what}: {os.strerror(ctypes.get_errno())}")


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    words = [each.encode() for each in (source, target, kind, options)]
    _must(_c.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]), f"mounting {target}")


def _own_namespaces() -> None:
    """Leave the network, the processes, the mounts and the names of outside; as an ordinary user, the users too."""
    flags = NEW_MOUNTS | NEW_IPC | NEW_NAMES | NEW_PROCESSES | NEW_NETWORK
    if os.geteuid() == 0:
        _must(_c.unshare(flags), "new namespaces")
        return
    user, group = os.geteuid(), os.getegid()
    _must(_c.unshare(flags | NEW_USER), "new namespaces of an ordinary user")
    _map_user(user, group, os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY))


def _map_user(user: int, group: int, process: int) -> None:
    """Be nobody within the new space of users; ``process`` is the open folder of this process in /proc."""
    lines = {"setgroups": "deny", "uid_map": f"{NOBODY} {user} 1", "gid_map": f"{NOBODY} {group} 1"}
    for name, line in lines.items():
        file = os.open(name, os.O_WRONLY, dir_fd=process)
        os.write(file, line.encode())
        os.close(file)


def _own_root(job: dict[str, Any]) -> None:
    """Make an empty file system in memory the root, with the given folders, read-only, and the job in it."""
    limits = job["limits"]
    _mount("none", "/", "", RECURSIVE | PRIVATE)
    root = job["root"]
    _mount("tmpfs", root, "tmpfs", NO_SETUID | NO_DEVICES, "size=8m,mode=755")
    for folder in job["folders"]:
        inside = root + folder
        if os.path.islink(folder):
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            os.symlink(os.readlink(folder), inside)
        elif os.path.isdir(folder):
            os.makedirs(inside, exist_ok=True)
            _mount(folder, inside, "", BIND | RECURSIVE)
            _make_read_only(inside)
    os.makedirs(f"{root}/dev")
    for name in ("null", "zero", "urandom"):
        Path(f"{root}/dev/{name}").touch()
        _mount(f"/dev/{name}", f"{root}/dev/{name}", "", BIND)
    os.makedirs(f"{root}/job")
    Path(f"{root}/job/program.py").write_text(job["program"], encoding="utf-8")
    Path(f"{root}/job/calls.json").write_text(json.dumps(job["calls"]), encoding="utf-8")
    Path(f"{root}/job/input").write_text(job["input"] or "", encoding="utf-8")
    for name in ("work", "tmp"):
        os.makedirs(f"{root}/{name}")
    _mount("tmpfs", f"{root}/work", "tmpfs", NO_SETUID | NO_DEVICES, f"size={limits['disk']},nr_inodes=1000,mode=777")
    _mount(f"{root}/work", f"{root}/tmp", "", BIND)
    os.chdir(root)
    os.makedirs("old")
    _must(_c.syscall(PIVOT_ROOT[os.uname().machine], b".", b"old"), "changing the root")
    os.chdir("/")
    _must(_c.umount2(b"/old", DETACH), "leaving the old root")
    os.rmdir("/old")
    _mount("none", "/", "", BIND | REMOUNT | READ_ONLY | NO_SETUID | NO_DEVICES)


def _make_read_only(path: str) -> None:
    """Make the mounts at and below a path read-only."""
    wanted = struct.pack("QQQQ", READ_ONLY | NO_SETUID, 0, 0, 0)
    result = _c.syscall(MOUNT_SETATTR, -1, path.encode(), EVERYTHING_BELOW, wanted, len(wanted))
    _must(result, f"making {path} read-only")


def _drop_rights(outside: int) -> None:
    """Become nobody; a root, in a space of users of its own, so that its processes are counted for itself alone."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        _c.prctl(DUMPABLE, 1, 0, 0, 0)  # without it, the files below belong to root
        _must(_c.unshare(NEW_USER), "a new space of users")
        _map_user(NOBODY, NOBODY, outside)
    os.close(outside)
    _must(_c.prctl(NO_NEW_RIGHTS, 1, 0, 0, 0), "dropping rights")


def _limit(limits: dict[str, Any]) -> None:
    import resource  # Linux has it, where alone this runs; the module is read everywhere

    wanted = {
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_CPU: limits["seconds"],
        resource.RLIMIT_FSIZE: limits["disk"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_NPROC: limits["processes"],
    }
    for name, most in wanted.items():
        resource.setrlimit(name, (most, most))


def _become(job: dict[str, Any]) -> NoReturn:
    """Become the program, in the empty folder, with nothing but a path in its environment."""
    os.chdir("/work")
    os.dup2(1, RESULTS)
    silent = os.open("/dev/null", os.O_RDWR)
    given = os.open("/job/input", os.O_RDONLY)
    os.dup2(given, 0)
    os.dup2(silent, 2)
    if job["input"] is None:
        os.dup2(silent, 1)
        words = ["-c", RUNNER]
    else:
        os.close(RESULTS)
        words = ["/job/program.py"]
    os.closerange(RESULTS + 1, 64)
    _limit(job["limits"])
    os.execve(job["python"], [job["python"], "-I", "-S", *words], {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"})


def _supervise(job: dict[str, Any]) -> NoReturn:
    """Be the first process of the new space: with its end, the kernel ends every other."""
    _c.prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    _c.prctl(DUMPABLE, 0, 0, 0, 0)
    program = os.fork()
    if program == 0:
        try:
            _become(job)
        except OSError as error:
            os.write(2, f"starting the program: {error}".encode())
            os._exit(NO_CELL)
    while True:
        ended, status = os.wait()
        if ended == program:
            os._exit(min(128 + os.WTERMSIG(status), 255) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def main() -> NoReturn:
    """Shut this process in, and run the job."""
    job = json.load(sys.stdin)
    try:
        _own_namespaces()
        first = os.fork()
        if first == 0:
            outside = os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY)
            _own_root(job)
            _drop_rights(outside)
            _supervise(job)
    except (Unavailable, OSError, LookupError) as error:
        os.write(2, str(error).encode())
        os._exit(NO_CELL)
    _, status = os.waitpid(first, 0)
    os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


if __name__ == "__main__":
    main()
