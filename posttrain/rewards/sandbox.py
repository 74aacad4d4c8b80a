"""Programs that models write, run where they can do no harm, on Linux: see ``cell`` for the inside.

A program has no network, no files but Python's own and a small empty folder in memory, an empty environment, and limits
on time, memory, disk, processes and output. Whatever it starts ends with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from posttrain.rewards import cell

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
"""Folders of the system that a program sees, beside those of Python."""
TOO_LONG = "the program ran out of time"
TOO_MUCH = "the program wrote too much"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one program."""

    seconds: int = 5
    """Processor time of each of its processes."""
    clock: float = 30.0
    """Seconds by the clock, for one that sleeps."""
    memory: int = 512 << 20
    """Bytes of address space of each of its processes."""
    disk: int = 16 << 20
    """Bytes of its folder, and of a file."""
    processes: int = 8
    """Processes and threads."""
    output: int = 1 << 20
    """Bytes that it may write."""


LIMITS = Limits()


@dataclass(frozen=True, kw_only=True)
class Ran:
    """The end of a program."""

    output: bytes
    """Its output, or the lines of its calls, as far as it was read."""
    fault: str = ""
    """Limit that ended it."""


class NoSandbox(Exception):
    """A sandbox cannot be had on this machine; the text says why."""


def run(program: str, calls: Sequence[str] = (), given: str | None = None, limits: Limits = LIMITS) -> Ran:
    """Run a program on the input ``given``; without one, give the values of ``calls`` after it as lines of JSON.

    Raises NoSandbox when it cannot be had.
    """
    if not sys.platform.startswith("linux"):
        raise NoSandbox(f"it needs namespaces of Linux, and this is {sys.platform}")
    with tempfile.TemporaryDirectory(prefix="posttrain-cell-") as root:
        job = {
            "program": program, "calls": list(calls), "input": given, "limits": asdict(limits), "root": root,
            "folders": _folders(), "python": _python(),
        }  # fmt: skip
        process = subprocess.Popen(
            [_python(), "-I", "-S", str(Path(cell.__file__).resolve())], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={"PATH": os.defpath}, cwd="/", start_new_session=True,
        )  # fmt: skip
        try:
            return _watch(process, json.dumps(job).encode(), limits)
        finally:
            _end(process)


def check() -> str | None:
    """Return why a sandbox cannot be had here; None when it can."""
    try:
        ran = run("", ["6 * 7"])
    except (NoSandbox, OSError) as error:
        return str(error)
    return None if b'"value": 42' in ran.output else "a program that was tried there did not answer"


def _watch(process: subprocess.Popen[bytes], job: bytes, limits: Limits) -> Ran:
    """Return what the program writes until its end, or its limits."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(job)
        process.stdin.close()
    output, deadline = bytearray(), time.monotonic() + limits.clock
    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not waiting.select(left):
                return Ran(output=bytes(output), fault=TOO_LONG)
            read = os.read(process.stdout.fileno(), 1 << 16)
            output += read
            if len(output) > limits.output:
                return Ran(output=bytes(output[: limits.output]), fault=TOO_MUCH)
            if not read:
                break
    try:
        code = process.wait(max(deadline - time.monotonic(), 1))
    except subprocess.TimeoutExpired:  # it closed its output and goes on
        return Ran(output=bytes(output), fault=TOO_LONG)
    if code == cell.NO_CELL and (why := process.stderr.read(1000)):  # a program cannot write there
        raise NoSandbox(why.decode(errors="replace"))
    out_of_time = code in (128 + signal.SIGXCPU, 128 + signal.SIGKILL)
    return Ran(output=bytes(output), fault=TOO_LONG if out_of_time else "")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and the first one of its space, and so every other; the pipes with them."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


def _python() -> str:
    """Return the interpreter itself, not the link of a virtual environment."""
    return os.path.realpath(sys.executable)


def _folders() -> list[str]:
    """Return the folders that a program sees: those of the system and of Python, none within another."""
    own = [os.path.realpath(each) for each in (sys.base_prefix, sys.base_exec_prefix, Path(_python()).parent)]
    found: list[str] = []
    for folder in (*SYSTEM, *dict.fromkeys(own)):
        if not any(folder == each or folder.startswith(f"{each}/") for each in found):
            found.append(folder)
    return found
