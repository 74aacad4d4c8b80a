"""SIGTERM and SIGINT: a training stage finishes its step and saves, everything else stops where it is."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from posttrain.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """Whether someone asked the run to stop.

    Outside ``deferred`` a signal raises Interrupted at once: everything that is published is published atomically, so
    nothing is lost. Inside, the first signal only sets a flag that the stage polls, and the second raises.
    """

    def __init__(self) -> None:
        self._deferred = False
        self._requested = False

    def requested(self) -> bool:
        """Whether a signal came while stopping was deferred."""
        return self._requested

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals here; the former handlers come back afterwards. Only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
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
        if self._requested:
            raise Interrupted("stopped by a signal")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._deferred and not self._requested:
            self._requested = True
            return
        self._requested = True
        raise Interrupted(f"stopped by {signal.Signals(number).name}")
