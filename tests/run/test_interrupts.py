"""Signals: answered at once, obeyed after the step, and at the second one now."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from posttrain.errors import Interrupted
from posttrain.run.interrupts import FINISHING, SIGNALS, STOPPING, Interrupts


def one_instruction(seconds: float) -> float:
    """Keep the main thread in one call into C that computes for ``seconds``; return the time of its end."""
    begun = time.thread_time()
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 20_000)
    rounds = int(20_000 * seconds / (time.thread_time() - begun))
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", rounds)
    return time.monotonic()


def run(interrupts: Interrupts, train: Callable[[], None]) -> None:
    """Train as a stage does."""
    with interrupts.installed(), interrupts.deferred():
        train()


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_answered_within_an_instruction_and_the_second_stops(number: signal.Signals) -> None:
    said: list[tuple[str, float]] = []
    interrupts = Interrupts(lambda text: said.append((text, time.monotonic())))

    def train() -> None:
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        end = one_instruction(2)
        assert [text for text, _ in said] == [FINISHING]
        assert said[0][1] < end - 0.5
        assert interrupts.requested()
        os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=number.name):
        run(interrupts, train)
    assert [text for text, _ in said] == [FINISHING, STOPPING]


def test_a_stage_that_ignores_the_request_is_stopped_at_its_end() -> None:
    interrupts = Interrupts(lambda text: None)
    with pytest.raises(Interrupted, match="stopped by a signal"):
        run(interrupts, lambda: os.kill(os.getpid(), signal.SIGINT))


def test_outside_of_training_a_signal_stops_at_once_and_handlers_are_restored() -> None:
    said: list[str] = []
    former = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(Interrupted, match="SIGTERM"), Interrupts(said.append).installed():
        os.kill(os.getpid(), signal.SIGTERM)
    assert said == []
    assert [signal.getsignal(number) for number in SIGNALS] == former
