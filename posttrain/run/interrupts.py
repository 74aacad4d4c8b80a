"""SIGTERM and SIGINT: a stage in training finishes its step and saves a checkpoint; anything else stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType

from posttrain.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)
FINISHING = "stop requested: this step is finished and saved first; Ctrl-C once more stops now"
STOPPING = "stopping now; the same command resumes from the last checkpoint"


class Interrupts:
    """Requests to stop the run.

    Outside ``deferred`` a signal raises Interrupted at once; publishing is atomic, so nothing is lost. Inside, the
    first signal only sets a flag for the stage to poll, and the second raises. Either is answered through ``say``.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._deferred = False
        self._requested = False
        self._installed = False
        self._asked: float | None = None
        self._steps: deque[float] = deque(maxlen=5)

    def requested(self) -> bool:
        """Return True after the first signal."""
        now = time.monotonic()
        if self._asked is not None:
            self._steps.append(now - self._asked)
        self._asked = now
        return self._requested

    @property
    def heard(self) -> bool:
        """True after the first signal."""
        return self._requested

    @property
    def longest_step(self) -> float:
        """Longest of the newest times in seconds between two looks at ``requested``: a stage looks after each step."""
        return max(self._steps, default=0.0)

    def stop(self) -> None:
        """Request a stop from another thread, unless there was a request already."""
        if not self._installed:
            self._requested = True
        elif not self._requested:
            if os.name == "nt":
                signal.raise_signal(signal.SIGTERM)
            else:
                os.kill(os.getpid(), signal.SIGTERM)  # it wakes the main thread, whatever that waits for

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals here, then restore the former handlers; outside the main thread, do nothing."""
        if threading.current_thread() is not threading.main_thread():  # Python lets no other thread set handlers
            yield
            return
        with self._answered():
            former = {number: signal.signal(number, self._handle) for number in SIGNALS}
            self._installed = True
            try:
                yield
            finally:
                self._installed = False
                for number, handler in former.items():
                    signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the code inside poll ``requested`` and stop by itself."""
        self._deferred, self._asked = True, None
        try:
            yield
        finally:
            self._deferred = False
        # A stage that ignored the request still ends the run here: the user asked for it, and the next stage must not
        # start. Its finished work is not published; its checkpoints are kept.
        if self._requested:
            raise Interrupted("stopped by a signal")

    @contextlib.contextmanager
    def _answered(self) -> Iterator[None]:
        """Answer every signal from a thread of its own."""
        # Python calls a handler between two instructions of the main thread, and a backward pass is one of them: on its
        # own it would leave the user without an answer for as long as that takes.
        reader, writer = os.pipe()
        if hasattr(os, "set_blocking"):  # on Windows from Python 3.12 on
            os.set_blocking(writer, False)
        former = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._answer, args=(reader,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(former)
            os.close(writer)
            thread.join()
            os.close(reader)

    def _answer(self, reader: int) -> None:
        finishing = False
        while number := os.read(reader, 1):
            if number[0] not in SIGNALS:
                continue
            if finishing:
                self._say(STOPPING)
            elif self._deferred:
                finishing = True
                self._say(FINISHING)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._deferred and not self._requested:
            self._requested = True
            return
        self._requested = True
        raise Interrupted(f"stopped by {signal.Signals(number).name}")
