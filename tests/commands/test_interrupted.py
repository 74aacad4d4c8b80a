"""Ctrl-C while libraries are imported, which wrap what is raised in them, or lose it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from signal import SIGINT, default_int_handler, getsignal, raise_signal, signal

import pytest

from posttrain import cli
from posttrain.errors import BadInput, Interrupted, PluginFailed, Problem, interruption

TOLD = "error: stopped by Ctrl-C\nRun the same command again to resume.\n"


def wraps() -> int:
    try:
        raise_signal(SIGINT)
    except KeyboardInterrupt as error:
        raise RuntimeError("Error calling __set_name__") from error
    return 0


def replaces() -> int:
    try:
        raise_signal(SIGINT)
    except KeyboardInterrupt:
        raise ModuleNotFoundError("Could not import module 'A'") from None
    return 0


def loses() -> int:
    with suppress(KeyboardInterrupt):
        raise_signal(SIGINT)
    raise ImportError("cannot load module more than once per process")


def blames() -> int:
    try:
        wraps()
    except RuntimeError as error:
        raise PluginFailed("theirs (their-package 1.0) in run: RuntimeError") from error
    return 0


@pytest.mark.parametrize("work", [wraps, replaces, loses, blames])
def test_a_library_that_makes_another_error_of_it_hides_nothing(
    work: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "dispatch", lambda words: work())
    former = signal(SIGINT, default_int_handler)
    try:
        assert cli.answer(["recipe=a"]) == 75
        assert getsignal(SIGINT) is default_int_handler
    finally:
        signal(SIGINT, former)
    assert capsys.readouterr().err == TOLD


def test_an_error_of_its_own_is_no_interruption(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> int:
        raise ImportError("no module")

    monkeypatch.setattr(cli, "dispatch", lambda words: fails())
    assert cli.answer(["recipe=a"]) == 1
    assert "ImportError: no module" in capsys.readouterr().err
    assert interruption(ValueError("a bug"), heard=True) is None


def test_what_is_found_on_the_way_to_stop_keeps_its_name() -> None:
    stop, bad = Interrupted("stopped by SIGTERM"), BadInput(Problem(where="a", what="is wrong"))
    bad.__context__ = stop
    assert interruption(bad, heard=True) is None
    other = RuntimeError("a fault")
    other.__context__ = stop
    assert interruption(other, heard=False) is stop
