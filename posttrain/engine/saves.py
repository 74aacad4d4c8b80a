"""Saves of a training: when they are due, and the thread that writes a copy during the next steps.

A step waits for the copy, and for nothing else: hashing and syncing all of 8 billion weights, 96 GB, takes minutes. One
checkpoint is written at a time.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from posttrain.engine.checkpoint import CheckpointFolder, Part, Position, State
from posttrain.engine.config import LoopConfig


class Saves:
    """The checkpoints of one training."""

    def __init__(self, folder: CheckpointFolder, config: LoopConfig) -> None:
        self._folder, self._config = folder, config
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._begun = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Return True when a checkpoint is due after ``step``: by its number, or by the time since the last one.

        One that is due by the time waits while another is being written.
        """
        if self._config.checkpoint_steps is not None and step % self._config.checkpoint_steps == 0:
            return True
        busy = self._thread is not None and self._thread.is_alive()
        return not busy and time.monotonic() - self._begun >= 60 * self._config.checkpoint_minutes

    def begin(self, position: Position, state: State) -> None:
        """Copy ``state`` and let a thread write it, once the last one is written. Every process calls it.

        Raises OSError when writing the last one failed.
        """
        self.finish()
        self._begun = time.monotonic()
        names = self._folder.begin(bool(state))
        part = Part.of(state, copy=True)
        self._thread = threading.Thread(target=self._write, args=(position, part, names), name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Wait until all is written. Raises OSError when that failed."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    @property
    def failed(self) -> bool:
        """True when a write failed; ``finish`` raises its error."""
        return self._error is not None

    @contextlib.contextmanager
    def ended(self) -> Iterator[None]:
        """Wait in the end until all is written, whatever ends the training; a failed write is its error, or another."""
        try:
            yield
        except BaseException:
            if self._thread is not None:
                self._thread.join()
            raise
        self.finish()

    def _write(self, position: Position, part: Part, names: list[str]) -> None:
        try:
            self._folder.write(position, part, names)
        except BaseException as error:
            self._error = error
