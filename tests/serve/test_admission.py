"""Answers join the others: at once where nobody waits for it, together where many do, and never beyond the cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from posttrain.serve import engine as engines
from posttrain.serve.ask import Ask, Ended, Sampling, Token
from posttrain.serve.engine import CACHE, PATIENCE, Engine


@dataclass
class Going:
    ask: Ask
    left: int


class ScriptedLane:
    """A lane whose passes happen when the test lets them; it writes down who joined at which."""

    def __init__(self) -> None:
        self.rows: list[Going] = []
        self.width = 0
        self.passes = 0
        self.joined: list[tuple[int, int]] = []
        """Pass and number of rows of each admission."""
        self.caches: list[tuple[int, int]] = []
        """Rows and width after each."""
        self.may, self.did = threading.Semaphore(0), threading.Semaphore(0)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def systems(self) -> set[str]:
        return {row.ask.system for row in self.rows}

    def admit(self, asks: Sequence[tuple[Ask, str]]) -> None:
        self.joined.append((self.passes, len(asks)))
        self.rows += [Going(ask, ask.sampling.max_tokens) for ask, _ in asks]
        self.width = max(self.width, *(len(ask.prompt) for ask, _ in asks))
        self.caches.append((len(self.rows), self.width))

    def step(self) -> None:
        self.may.acquire()
        self.passes += 1
        for row in self.rows:
            row.left -= 1
            row.ask.send(Ended("length") if not row.left else Token(5))
        self.rows = [row for row in self.rows if row.left]
        self.width = self.width + 1 if self.rows else 0
        self.did.release()

    def fail(self, fault: str) -> None:
        self.rows = []

    def go(self, passes: int = 1) -> None:
        for _ in range(passes):
            self.may.release()
            self.did.acquire()


@pytest.fixture
def lane() -> ScriptedLane:
    return ScriptedLane()


@pytest.fixture
def engine(lane: ScriptedLane) -> Iterator[Engine]:
    made = Engine({"m": (lane, "a")}, rows=64)  # type: ignore[dict-item]
    yield made
    threading.Thread(target=made.stop).start()
    lane.may.release(1000)


def asks(count: int, prompt: int = 3, tokens: int = 500) -> list[Ask]:
    sampling = Sampling(max_tokens=tokens)
    made = [
        Ask(system="m", prompt=[1] * prompt, sampling=sampling, ends=frozenset(), send=lambda event: None)
        for _ in range(count)
    ]
    return made


def test_the_first_is_read_at_once(engine: Engine, lane: ScriptedLane) -> None:
    engine.submit(asks(1))
    lane.go()
    assert lane.joined == [(0, 1)]
    engine.submit(asks(1))  # as costly for one who runs as for one who waits
    lane.go(2)
    (place, count), *_ = lane.joined[1:]
    assert (count, len(lane.joined)) == (1, 2)
    assert place <= 2


def test_those_who_come_one_after_another_are_read_together(engine: Engine, lane: ScriptedLane) -> None:
    engine.submit(asks(40))
    lane.go(2)
    begun = len(lane.joined)
    for _ in range(20):
        engine.submit(asks(1))
        lane.go()
    later = lane.joined[begun:]
    assert sum(count for _, count in later) + engine.waiting == 20
    assert len(later) <= 20 // (PATIENCE - 1)
    assert all(count >= PATIENCE - 1 for _, count in later[1:])


def test_one_alone_waits_a_few_passes_at_most(engine: Engine, lane: ScriptedLane) -> None:
    engine.submit(asks(50))
    lane.go(3)
    before = lane.passes
    engine.submit(asks(1))
    lane.go(PATIENCE + 1)
    assert lane.joined[-1][1] == 1
    assert lane.joined[-1][0] - before <= PATIENCE


def test_one_that_nobody_waits_for_holds_up_no_other(engine: Engine, lane: ScriptedLane) -> None:
    engine.submit(asks(1))
    lane.go()
    (gone,) = long = asks(1, prompt=CACHE)
    gone.cancelled = True
    engine.submit([*long, *asks(1)])
    lane.go(PATIENCE + 1)
    assert (engine.waiting, engine.running) == (0, 2)


@pytest.mark.parametrize("prompt", [CACHE // 8, CACHE // 3, CACHE - 1, CACHE + 5])
def test_the_cache_holds_no_more_than_it_may(
    prompt: int, engine: Engine, lane: ScriptedLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "PREFILL", 10 * CACHE)
    engine.submit([*asks(3, tokens=6), *asks(12, prompt=prompt, tokens=6), *asks(3, tokens=6)])
    while engine.waiting or engine.running:
        lane.go()
    assert sum(count for _, count in lane.joined) == 18
    assert all(rows * width <= CACHE or rows == 1 for rows, width in lane.caches)
    assert max(rows for rows, _ in lane.caches) > 1  # the small ones share it
