"""SIGTERM and SIGINT: a stage in training finishes its step and saves a checkpoint; anything else stops at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from posttrain.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """Requests to stop the run.

    Outside ``deferred`` a signal raises Interrupted at once; publishing is atomic, so nothing is lost. Inside, the
    first signal only sets a flag for the stage to poll, and the second raises.
    """

    def __init__(self) -> None:
        self._deferred = False
        self._requested = False

    def requested(self) -> bool:
        """Return True after the first signal."""
        return self._requested

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals here, then restore the former handlers; outside the main thread, do nothing."""
        if threading.current_thread() is not threading.main_thread():  # Python lets no other thread set handlers
            yield
            return
        former = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the code inside poll ``requested`` and stop by itself."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        # A stage that ignored the request still ends the run here: the user asked for it, and the next stage must not
        # start. Its finished work is not published; its checkpoints are kept.
        if self._requested:
            raise Interrupted("stopped by a signal")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._deferred and not self._requested:
            self._requested = True
            return
        self._requested = True
        raise Interrupted(f"stopped by {signal.Signals(number).name}")
