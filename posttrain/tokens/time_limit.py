"""A limit on the computing time of programs from a model, its chat template for one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN = 1.0
"""Seconds of computing after which a swallowed exception is raised once more."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the body once this process has computed for ``seconds``.

    Computing time, not time by the clock: a busy machine must not reject a sound template. Only the main thread can
    be interrupted; elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGVTALRM, _give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, AGAIN)  # again: a library may swallow the first exception
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, former)


def _give_up(number: int, frame: FrameType | None) -> None:
    raise TimeoutError
