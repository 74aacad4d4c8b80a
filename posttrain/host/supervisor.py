"""Runs a command in a child process, so that whatever a plugin does to its process can be named and survived.

The child is a fork made before anything heavy is imported, and does all the work. The parent passes signals on and ends
a call into a plugin that gives no sign of life for too long. When the child dies without having said its exit code, by
``os._exit``, by a segmentation fault, for want of memory, it says which plugin was at work. A plugin that ends the
process while it is merely loaded is left out, and the command is begun again without it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from posttrain.errors import Interrupted, PluginFailed, PosttrainError, RunLocked, explain
from posttrain.host import activity
from posttrain.host.activity import SIZE, Activity, Told

PASSED_ON = (signal.SIGTERM, signal.SIGINT)
TICK = 0.5
"""Seconds between two looks at the child."""
ENDING = 60.0
"""Seconds that a child may take to end once it has said its exit code: no thread is waited for longer."""
PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


def supervised(work: Callable[[], int]) -> int:
    """What ``work`` returns, in a child process, so that it ends as any Python process does.

    The process that called ends here, with the child's exit code; with 6 and a message when a plugin took the child
    down. Only Linux has what this needs: elsewhere ``work`` is simply called.
    """
    lost: dict[str, str] = {}
    while sys.platform == "linux":
        memory = mmap.mmap(-1, SIZE)
        child = _fork(memory, lost)
        if child == 0:
            break
        watch = Watch(child, memory)
        status = watch.until_it_ends()
        told = watch.told()
        if told.code is not None:
            _end(told.code)
        current = told.activity
        if current is None or not current.starting or current.plugin in lost:
            _end(_explained(_reason(watch, status, current), told))
        lost[current.plugin] = f"{watch.fate(status)} in {current.call}"
    return _signed_off(work)


def _end(code: int) -> NoReturn:
    """End at once: a process that only watched has nothing to tidy up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _signed_off(work: Callable[[], int]) -> int:
    """What ``work`` returns, said to the parent before anything that happens at the end of a process can go wrong."""
    code: int | str | None = 1
    try:
        code = work()
    except SystemExit as error:
        code = error.code
        raise
    finally:
        activity.finish(code if isinstance(code, int) else 1 if code else 0)
    return code


@dataclass
class Watch:
    """A parent's view of its child."""

    child: int
    memory: mmap.mmap
    quiet: float = 0.0
    """Seconds without a sign of life; those in which this process itself was stopped do not count."""
    hanging: bool = False
    passed_on: set[signal.Signals] = field(default_factory=set)
    _seen: bytes = b""

    def until_it_ends(self) -> int:
        """Wait for the child; returns its exit status as ``subprocess`` has it: minus the signal that ended it."""
        before = time.monotonic()
        while True:
            found = signal.sigtimedwait({*PASSED_ON, signal.SIGCHLD}, TICK)
            if found is not None and found.si_signo in PASSED_ON:
                self._pass_on(signal.Signals(found.si_signo), from_terminal=found.si_code > 0)
            ended, status = os.waitpid(self.child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            now = time.monotonic()
            self._look(min(now - before, 2 * TICK))
            before = now

    def told(self) -> Told:
        """What the child said last: an exit code, the plugin and the run that it is busy with."""
        return activity.read(self.memory[:SIZE])

    def fate(self, status: int) -> str:
        """What became of the child, in words."""
        if self.hanging:
            return "hung and had to be ended"
        if status >= 0:
            return f"ended the process with exit code {status}"
        return f"took the process down: {signal.Signals(-status).name}"

    def _pass_on(self, number: signal.Signals, *, from_terminal: bool) -> None:
        self.passed_on.add(number)
        if not from_terminal:  # a terminal tells the child itself
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.child, number)

    def _look(self, seconds: float) -> None:
        """Count the time without a sign of life, and end the child when it was too long."""
        seen = self.memory[:SIZE]
        self.quiet = self.quiet + seconds if seen == self._seen else 0.0
        self._seen = seen
        told = activity.read(seen)
        limit = ENDING if told.code is not None else told.activity.seconds if told.activity is not None else None
        if limit is not None and self.quiet > limit:
            self.hanging = told.code is None
            os.kill(self.child, signal.SIGKILL)


def _fork(memory: mmap.mmap, lost: Mapping[str, str]) -> int:
    """Fork; the signals stay blocked in the parent, which takes them one by one."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*PASSED_ON, signal.SIGCHLD})
    if child := os.fork():
        return child
    signal.pthread_sigmask(signal.SIG_SETMASK, before - {*PASSED_ON, signal.SIGCHLD})
    _die_with(parent)
    activity.attach(memory, lost)
    return 0


def _die_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends, so that one killed command leaves nothing running."""
    import ctypes

    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _explained(error: PosttrainError, told: Told) -> int:
    """Print why the child died, and write it into its run, which it could not do itself; returns the exit code."""
    code = explain(error)
    if told.run is not None:
        from posttrain.run.directory import end

        try:
            with contextlib.suppress(RunLocked):  # somebody goes on with it already
                end(told.run, "interrupted" if isinstance(error, Interrupted) else "failed")
        except (OSError, ValueError, TypeError) as fault:
            print(f"the end of the run could not be written down: {fault}", file=sys.stderr)
    return code


def _reason(watch: Watch, status: int, current: Activity | None) -> PosttrainError:
    """The error that explains a child which died without a word."""
    if -status in watch.passed_on:
        return Interrupted(f"stopped by {signal.Signals(-status).name}")
    memory = " The system does this when memory runs out." if status == -signal.SIGKILL and not watch.hanging else ""
    kept = "Nothing that is published is lost: the same command goes on from there"
    if current is None:
        return PosttrainError(f"something in posttrain or below it {watch.fate(status)}.{memory} {kept}")
    limit = f" after {current.seconds:g} s without a sign of life" if watch.hanging else ""
    return PluginFailed(f"{current}: it {watch.fate(status)}{limit}.{memory} {kept}")
