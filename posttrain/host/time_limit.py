"""A limit on the computing time of a stranger's programs: templates, patterns, a task's own functions."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN = 1.0
"""Seconds of computing after which a swallowed exception is raised once more."""
SOON = 1e-3
"""Seconds to the end of a limit that an inner one has used up, or that passed where nothing can be raised."""
_end: float | None = None
"""Computing time of this process at which the innermost limit ends."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the body once this process has computed for ``seconds``.

    Computing time, not time by the clock: a busy machine must not reject a sound template. Limits nest: what the body
    computes counts for the one around it, too. Only the main thread can be interrupted, and on Windows nothing can;
    elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    global _end
    around, _end = _end, time.process_time() + seconds
    former = signal.signal(signal.SIGVTALRM, _give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, AGAIN)  # again: a library may swallow the first exception
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, former)
        _end = around
        if around is not None:
            signal.setitimer(signal.ITIMER_VIRTUAL, max(around - time.process_time(), SOON), AGAIN)
    if around is not None and time.process_time() > around:  # little may be computed between two inner limits
        raise TimeoutError


def _give_up(number: int, frame: FrameType | None) -> None:
    if _finalizes(frame):  # the interpreter prints what a finalizer raises, and continues
        signal.setitimer(signal.ITIMER_VIRTUAL, SOON, AGAIN)
        return
    raise TimeoutError


def _finalizes(frame: FrameType | None) -> bool:
    """Return True inside of an object's ``__del__``."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
