"""A process that has imported the libraries and forks itself for each command, which begins at once.

It has imported nothing of posttrain: every command imports that itself, from its own path, in its own folder and
environment. A command is a child of the tests' process; its process id, signals and exit code are those of any process.
Unlike a fresh one it ends without taking its objects apart, and shares the seed of its hashes with the session's other
commands: for what hangs on these, on imports or on what libraries read as they are imported, start a fresh one.

python tests/support/warm.py SOCKET
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

LIBRARIES = (
    "torch", "transformers", "transformers.models.llama.modeling_llama", "peft", "datasets", "lm_eval.evaluator",
    "hydra", "pluggy", "rich.console", "scipy.stats",
)  # fmt: skip
PATIENCE = 1500
"""Seconds that a loaded machine may take."""
SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of prctl(2)."""
HEAD = struct.Struct("!I")
"""Number of bytes that follow."""


# --- In the process of the tests --------------------------------------------------------------------------------------


class Warm(subprocess.Popen[str]):
    """A process that runs a module or a program text of this Python, as ``python -m`` and ``python -c`` do."""

    def _execute_child(
        self, args: Sequence[str], executable: None, preexec_fn: None, close_fds: bool, pass_fds: Sequence[int],
        cwd: Any, env: Mapping[str, str] | None, startupinfo: None, creationflags: int, shell: bool,
        p2cread: int, p2cwrite: int, c2pread: int, c2pwrite: int, errread: int, errwrite: int, *others: object,
    ) -> None:  # fmt: skip
        given = {"words": list(args[1:]), "folder": os.path.abspath(cwd or "."), "environment": dict(env or os.environ)}
        streams = [own if fd == -1 else fd for own, fd in enumerate((p2cread, c2pwrite, errwrite))]
        self.pid = _fork(given, streams)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; return what it printed."""
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        out, err = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@contextlib.contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A command that ends with the test: when that fails, nobody waits for what may hang."""
    with Warm(command, text=True, **options) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def _fork(given: Mapping[str, Any], streams: Sequence[int]) -> int:
    """Return the process id of a new command, a child of this process."""
    server, prctl = _server(), ctypes.CDLL(None).prctl
    text = json.dumps(given).encode()
    prctl(SUBREAPER, 1)  # the command loses the process that forked it, and comes to this one
    try:
        socket.send_fds(server, [HEAD.pack(len(text))], streams)
        server.sendall(text)
        return int(HEAD.unpack(_read(server, HEAD.size))[0])
    finally:
        prctl(SUBREAPER, 0)


@cache
def _server() -> socket.socket:
    """Return the connection to the process with the libraries, which ends with this one."""
    ours, theirs = socket.socketpair()
    with theirs:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], env=environment, pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return ours


def _read(connection: socket.socket, size: int) -> bytes:
    """Return the next ``size`` bytes. Raises EOFError when the other side is gone."""
    read = b""
    while len(read) < size:
        if not (part := connection.recv(size - len(read))):
            raise EOFError("the other process is gone")
        read += part
    return read


# --- In the process with the libraries --------------------------------------------------------------------------------


def serve(connection: socket.socket) -> Mapping[str, Any]:
    """Fork for every command that is asked for; return in the new process, with what was asked."""
    while True:
        head, streams, _, _ = socket.recv_fds(connection, HEAD.size, 3)
        if not head:
            os._exit(0)
        given: Mapping[str, Any] = json.loads(_read(connection, HEAD.unpack(head)[0]))
        (told, tell), (ended, ending) = os.pipe(), os.pipe()
        if not (between := os.fork()):
            if not (command := os.fork()):
                os.close(ending)
                os.read(ended, 1)  # until the process between is gone, and another one is this one's parent
                _take(streams)
                return given
            os.write(tell, HEAD.pack(command))
            os._exit(0)
        os.close(ending)
        os.waitpid(between, 0)
        connection.sendall(os.read(told, HEAD.size))
        for each in (told, tell, ended, *streams):
            os.close(each)


def _take(streams: Sequence[int]) -> None:
    """Make ``streams`` those of this process, and close every other file."""
    for number, each in enumerate(streams):
        os.dup2(each, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))


def become(given: Mapping[str, Any], paths: Sequence[str]) -> None:
    """Run a command in this process as Python itself would, with ``paths`` of its own, and end."""
    os.chdir(given["folder"])
    os.environ.clear()
    os.environ.update(given["environment"])
    kind, program, *words = given["words"]
    first = "" if kind == "-c" else given["folder"]
    sys.path[:] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *paths]
    importlib.invalidate_caches()
    sys.argv[:] = [kind, *words]
    sys.modules["numpy"].random.seed()
    with _ending():
        if kind == "-c":
            main = sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(program, "<string>", "exec"), main.__dict__)
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """End this process after the context, with the exit code that it comes to.

    Taking apart what was imported would copy all the memory that this process shares.
    """
    code: object = None
    try:
        yield
    except SystemExit as ended:
        code = ended.code
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    gc.disable()
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()
    gc.enable()
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    become(asked, sys.path[1:])
