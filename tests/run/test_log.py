"""posttrain.log: what a run said, to whatever end."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import pytest

from posttrain.commands import run as command
from posttrain.errors import Interrupted
from posttrain.run.display import Display
from posttrain.run.log import RunLog
from tests.support.fakes import GATES, Script, run_recipe, scripted_host, write_project


@pytest.fixture(autouse=True)
def project(working_folder: Path) -> None:
    write_project(working_folder)


def log() -> str:
    (path,) = Path().glob("runs/mine-*/posttrain.log")
    return path.read_text(encoding="utf-8")


def talking(script: Script) -> Script:
    def during(context: object) -> None:
        logging.getLogger("stranger").warning("a stranger's %s", "complaint")
        logging.getLogger("stranger").debug("a stranger's detail")
        print("printed \x1b[31mred\x07 and", "hf_abcdefghijklmnopqrstuvwx", file=sys.stderr)

    script.during_training = during
    return script


def test_it_has_what_was_shown_printed_and_logged() -> None:
    levels = logging.getLogger().level, logging.getLogger().handlers[:]
    stderr = sys.stderr
    run_recipe(talking(Script()))
    text = log()
    for part in (
        "--- posttrain recipe=mine", "debug: posttrain: Python 3", "torch 2", "sft      PASS   sft is a pass",
        "warning: stranger: a stranger's complaint", "--- ended\n",
    ):  # fmt: skip
        assert part in text
    assert "detail" not in text
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ  ", line) for line in text.splitlines())
    assert "printed ␛[31mred␇ and ***" in text
    assert "\x1b" not in text
    assert (logging.getLogger().level, logging.getLogger().handlers) == levels
    assert sys.stderr is stderr


def test_it_names_the_end_and_a_resumed_run_is_appended() -> None:
    script = Script()

    def stop(context: object) -> None:
        raise Interrupted("stopped by SIGTERM")

    script.during_training = stop
    with pytest.raises(Interrupted):
        run_recipe(script)
    first = log()
    assert first.endswith("--- ended by Interrupted: stopped by SIGTERM\n")
    run_recipe(Script())
    assert log().startswith(first)
    assert log().endswith("--- ended\n")


def test_a_full_disk_ends_the_log_and_not_the_run() -> None:
    class Full:
        def write(self, text: str) -> int:
            tries.append(text)
            raise OSError(28, "No space left on device")

    tries: list[str] = []
    written = RunLog(Full())  # type: ignore[arg-type]
    written.write("a line")
    written.write("another")
    assert len(tries) == 1


@pytest.mark.parametrize("words", [[], ["-v"], ["--verbose"]])
def test_debug_lines_are_shown_when_asked_for(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host = scripted_host(talking(Script()))
    monkeypatch.setattr("posttrain.host.plugins.load", lambda: host)
    assert command.main(["recipe=mine", *GATES, *words]) == 0
    shown = capsys.readouterr().err
    assert ("debug: stranger: a stranger's detail" in shown) == bool(words)
    assert ("a stranger's detail" in log()) == bool(words)
    assert "-v" not in log().split("\n")[0]


def test_a_terminal_has_a_bar_and_the_log_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[str] = []
    display = Display()
    monkeypatch.setattr(type(display.console), "is_terminal", True)
    display.log = kept.append
    display.tick("sft", "train", "4/10  loss 1.000")
    assert kept == ["sft      train  4/10  loss 1.000"]
