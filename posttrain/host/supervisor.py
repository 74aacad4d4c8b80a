"""A command in a child process: the parent survives a plugin or a foreign file that ends the process, and names it.

The child is a fork, made before anything heavy is imported, and does all the work. The parent forwards signals and ends
a call into a plugin, or into a tokenizer, that is silent for too long. When the child dies before it has recorded its
exit code, by ``os._exit``, by a segmentation fault or for lack of memory, the parent names the plugin or the tokenizer
that was running. When a plugin ends the process while it is loaded, the command starts again without it.
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

from posttrain.errors import (
    BY_HAND,
    ArtifactDamaged,
    BadInput,
    DiskFailed,
    Interrupted,
    PluginFailed,
    PosttrainError,
    Problem,
    RunLocked,
    explain,
)
from posttrain.host import activity
from posttrain.host.activity import SIZE, Activity, Report

FORWARDED = (signal.SIGTERM, signal.SIGINT)
TICK = 0.5
"""Seconds between two checks of the child."""
ENDING = 60.0
"""Seconds that a child may take to end after it has recorded its exit code: no thread gets longer."""
KILL = 9
"""SIGKILL, a name that Windows lacks."""
PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


def supervise(work: Callable[[], int]) -> int:
    """Call ``work`` in a child process, which returns its exit code and ends as any Python process does.

    The calling process ends here with the child's exit code, or with 6 and a message when a plugin ended the child.
    Elsewhere than on Linux ``work`` is called in this process: no other system has ``sigtimedwait`` and ``prctl``.
    """
    lost: dict[str, str] = {}
    while sys.platform == "linux":
        memory = mmap.mmap(-1, SIZE)
        child = _fork(memory, lost)
        if child == 0:
            break
        watch = Watch(child, memory)
        status = watch.wait()
        report = watch.report()
        if report.code is not None:
            _end(report.code)
        current = report.activity
        if current is None or not current.starting or current.plugin in lost:
            _end(_explain(_reason(watch, status, current), report))
        lost[current.plugin] = f"{watch.fate(status)} in {current.call}"
    return _finish(work)


def _end(code: int) -> NoReturn:
    """End at once: a process that only supervised has nothing to clean up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _finish(work: Callable[[], int]) -> int:
    """Call ``work`` and record its exit code at once: the end of the process may still crash."""
    code: int | str | None = 1
    try:
        if sys.platform == "linux":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {*FORWARDED, signal.SIGCHLD})
        code = work()
    except KeyboardInterrupt:  # before work hears it, or while it answers another
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = explain(Interrupted(BY_HAND))
    except SystemExit as error:
        code = error.code
        raise
    finally:
        activity.finish(code if isinstance(code, int) else 1 if code else 0)
    return code


@dataclass
class Watch:
    """The parent's view of its child."""

    child: int
    memory: mmap.mmap
    silence: float = 0.0
    """Seconds without a sign of life, but for those in which this process itself was stopped."""
    hanging: bool = False
    forwarded: set[signal.Signals] = field(default_factory=set)
    _seen: bytes = b""

    def wait(self) -> int:
        """Wait for the child; return its exit status as ``subprocess`` does: minus the signal that ended it."""
        before = time.monotonic()
        while True:
            found = signal.sigtimedwait({*FORWARDED, signal.SIGCHLD}, TICK)
            if found is not None and found.si_signo in FORWARDED:
                self._forward(signal.Signals(found.si_signo), from_terminal=found.si_code > 0)
            ended, status = os.waitpid(self.child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            now = time.monotonic()
            self._check(min(now - before, 2 * TICK))
            before = now

    def report(self) -> Report:
        """Return the last state that the child wrote."""
        return activity.read(self.memory[:SIZE])

    def fate(self, status: int) -> str:
        """Describe how the child ended."""
        if self.hanging:
            return "hung and had to be ended"
        if status >= 0:
            return f"ended the process with exit code {status}"
        return f"took the process down: {signal.Signals(-status).name}"

    def _forward(self, number: signal.Signals, *, from_terminal: bool) -> None:
        self.forwarded.add(number)
        if not from_terminal:  # a terminal signals the child itself
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.child, number)

    def _check(self, seconds: float) -> None:
        """Add up the time without a sign of life, and end the child beyond its limit."""
        if self.hangs(seconds):
            os.kill(self.child, signal.SIGKILL)

    def hangs(self, seconds: float) -> bool:
        """Add up the time without a sign of life; return True beyond its limit."""
        seen = self.memory[:SIZE]
        self.silence = self.silence + seconds if seen == self._seen else 0.0
        self._seen = seen
        report = activity.read(seen)
        call = report.activity
        limit = ENDING if report.code is not None else None if call is None else call.silence_limit
        if limit is None or self.silence <= limit:
            return False
        self.hanging = report.code is None
        return True


def _fork(memory: mmap.mmap, lost: Mapping[str, str]) -> int:
    """Fork; the parent keeps the signals blocked and takes them one by one, the child until its work begins."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {*FORWARDED, signal.SIGCHLD})
    if child := os.fork():
        return child
    die_with(parent)
    activity.attach(memory, lost)
    return 0


def die_with(parent: int, number: int = KILL) -> None:
    """Have the kernel send this process ``number`` at the end of its parent: a killed command leaves nothing running.

    Elsewhere than on Linux, do nothing.
    """
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, number)
    if os.getppid() != parent:
        os._exit(1)


def watch_files(tell: Callable[[PosttrainError], None]) -> None:
    """Have a process end this one, after ``tell`` with the reason, when a tokenizer takes too long with a text.

    It is for the processes of a launch, which have no supervisor. Elsewhere than on Linux, do nothing.
    """
    if sys.platform != "linux":
        return
    memory, watched = mmap.mmap(-1, SIZE), os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork():
        activity.attach(memory, {})
        return
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN)
    die_with(watched)
    watch = Watch(watched, memory)
    while True:
        time.sleep(TICK)
        hangs, call = watch.hangs(TICK), watch.report().activity
        if hangs and call is not None and call.file is not None:  # a plugin may: the stage may take its time
            tell(_reason(watch, -signal.SIGKILL, call))
            os.kill(watched, signal.SIGKILL)


def _explain(error: PosttrainError, report: Report) -> int:
    """Print why the child died, record it in the child's run, and return the exit code."""
    code = explain(error)
    if report.run is not None:
        from posttrain.run.directory import end

        try:
            with contextlib.suppress(RunLocked):  # another process has resumed it
                end(report.run, "interrupted" if isinstance(error, Interrupted | DiskFailed) else "failed")
        except (OSError, ArtifactDamaged) as fault:
            print(f"the end of the run could not be recorded: {fault}", file=sys.stderr)
    return code


def _reason(watch: Watch, status: int, current: Activity | None) -> PosttrainError:
    """Return the error that explains a child without an exit code."""
    if -status in watch.forwarded:
        return Interrupted(f"stopped by {signal.Signals(-status).name}")
    memory = " The system does this when memory runs out." if status == -signal.SIGKILL and not watch.hanging else ""
    kept = "Nothing published is lost: run the same command to resume"
    if current is None:
        return PosttrainError(f"something in posttrain or below it {watch.fate(status)}.{memory} {kept}")
    limit = f" after {current.silence_limit:g} s without a sign of life" if watch.hanging else ""
    if current.file is not None:
        what = f"its tokenizer {watch.fate(status)}{limit}, at {current.call}.{memory}"
        return BadInput(Problem(where=current.file, what=what, fix="Use another tokenizer"))
    return PluginFailed(f"{current}: it {watch.fate(status)}{limit}.{memory} {kept}")
