"""The engine: one thread that generates, with a queue before it. Requests join between two tokens of the others."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from posttrain.errors import first_line
from posttrain.serve.ask import Ask, Ended
from posttrain.serve.lane import Lane

T = TypeVar("T")
PREFILL = 8192
"""Most tokens, with padding, of the prompts that are read in one pass; a longer prompt is read alone."""
CACHE = 65_536
"""Most tokens in the caches of all lanes when an answer joins, with padding, without room and texts that ended.

A longer prompt is answered alone.
"""
PATIENCE = 4
"""Passes after which those who wait are read, however few they are."""
STOPPED = "the server is stopping"


class QueueFull(Exception):
    """More answers are waiting than the server lets wait."""


class Unloaded(Exception):
    """The model has left since its name was looked up."""


class Unavailable(Exception):
    """The model cannot be asked for a while."""


class Engine:
    """The generation thread over the lanes of all models."""

    def __init__(self, places: MutableMapping[str, tuple[Lane, str]], *, rows: int, queue: int = 256) -> None:
        """Take the lane and the adapter's name of each digest, a mapping that changes as models come and go.

        At most ``rows`` are made at once, ``queue`` more may wait.
        """
        self._places, self._most_rows, self._most_waiting = places, rows, queue
        self._waiting: deque[Ask] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._passes = self._waited = 0
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """True while models can be asked."""
        return not self._stopping

    @property
    def waiting(self) -> int:
        """Number of answers that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of answers in the making."""
        return sum(map(len, self._lanes()))

    def submit(self, asks: Sequence[Ask]) -> None:
        """Queue the answers of one request, all or none. Raises QueueFull, or Unloaded when the model has left."""
        with self._changed:
            if not all(ask.system in self._places for ask in asks):
                raise Unloaded
            if len(self._waiting) + len(asks) > self._most_waiting:
                raise QueueFull
            if self._stopping:
                for ask in asks:
                    ask.send(Ended("failed", STOPPED))
                return
            self._waiting += asks
            self._changed.notify()

    def call(self, job: Callable[[], T]) -> T:
        """Call ``job`` in the generation thread, between two tokens; return its result or raise its error."""
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(job())
            except BaseException as error:  # handed to the caller, whatever it is
                future.set_exception(error)

        with self._changed:
            self._jobs.append(work)
            self._changed.notify()
        return future.result()

    def release(self, digest: str) -> bool:
        """Take a model's lane from it, unless an answer of it waits or is made; return True when it has none.

        Called in the generation thread.
        """
        with self._changed:
            used = any(ask.system == digest for ask in self._waiting) or any(
                digest in lane.systems for lane in self._lanes()
            )
            if not used:
                self._places.pop(digest, None)
            return not used

    def stop(self) -> None:
        """End the thread after the present token; answers that are not complete fail."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _lanes(self) -> list[Lane]:
        return list(dict.fromkeys(lane for lane, _ in list(self._places.values())))

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._jobs or self._stopping or self.running):
                    self._changed.wait()
                jobs, stopping = list(self._jobs), self._stopping
                self._jobs.clear()
            for job in jobs:
                job()
            if stopping:
                self._fail_all()
                return
            for lane, asks in self._admitted().items():
                _guarded(partial(lane.admit, asks), partial(_fail, [ask for ask, _ in asks]))
            for lane in self._lanes():
                if len(lane):
                    _guarded(lane.step, lane.fail)

    def _admitted(self) -> dict[Lane, list[tuple[Ask, str]]]:
        """Take the answers that fit from the queue, the oldest first, once it is their time."""
        found: dict[Lane, list[tuple[Ask, str]]] = {}
        with self._changed:
            if not self._is_time():
                return found
            room, longest, count = self._most_rows - self.running, 0, 0
            held = {lane: (len(lane), lane.width) for lane in self._lanes()}
            while self._waiting and count < room:
                ask = self._waiting[0]
                if ask.cancelled:  # it holds up nobody, however long its prompt
                    self._waiting.popleft()
                    continue
                lane, adapter = self._places[ask.system]
                rows, width = held[lane]
                longest, held[lane] = max(longest, len(ask.prompt)), (rows + 1, max(width, len(ask.prompt)))
                full = sum(many * wide for many, wide in held.values()) > CACHE
                if (count and longest * (count + 1) > PREFILL) or (full and self.running + count):
                    break
                found.setdefault(lane, []).append((self._waiting.popleft(), adapter))
                count += 1
        return found

    def _is_time(self) -> bool:
        """Return True once waiting has cost those who wait as many passes as reading them costs the others.

        A pass over few rows takes nearly as long as one over many, so prompts are read together.
        """
        self._passes += 1
        self._waited += len(self._waiting)
        due = self._waited >= self.running or self._passes >= PATIENCE
        if due or not self._waiting:
            self._passes = self._waited = 0
        return due

    def _fail_all(self) -> None:
        for lane in self._lanes():
            lane.fail(STOPPED)
        _fail(self._waiting, STOPPED)


def _fail(asks: Iterable[Ask], fault: str) -> None:
    for ask in asks:
        ask.send(Ended("failed", fault))


def _guarded(work: Callable[[], object], fail: Callable[[str], None]) -> None:
    """Do ``work``; whatever goes wrong ends the answers that ``fail`` ends, and no others."""
    try:
        work()
    except Exception as error:  # of torch, of a model's code, or memory that ran out
        fail(f"{type(error).__name__}: {first_line(error)}")
