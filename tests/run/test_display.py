"""The display of a run without a terminal: a line every few seconds, within long steps too."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from posttrain.run import display
from posttrain.run.display import Display, TrainingProgress


def resumed(folder: Path) -> tuple[io.StringIO, TrainingProgress]:
    """A stage after step 4 of 10, and its lines."""
    shown = io.StringIO()
    host = SimpleNamespace(hook=SimpleNamespace(step_logged=lambda **arguments: None))
    progress = TrainingProgress(Display(Console(file=shown, width=200)), "sft", folder / "metrics.jsonl", host)
    progress.start(10, 4)
    return shown, progress


def test_a_long_step_shows_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "LINE_SECONDS", 0)
    monkeypatch.setattr(display, "LONG_STEP_SECONDS", 0)
    shown, progress = resumed(tmp_path)
    progress.part(1, 64, "row")
    progress.step(5, {"loss": 1.0, "tokens": 8})
    progress.part(32, 64, "row")
    progress.part(3, 9, "eval document")
    assert "4/10  step 5: row 1/64" in shown.getvalue()
    assert "5/10  step 6: row 32/64" in shown.getvalue()
    assert "5/10  step 6: eval document 3/9" in shown.getvalue()


def test_a_short_step_shows_its_figures_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "LINE_SECONDS", 0)
    shown, progress = resumed(tmp_path)
    progress.part(64, 64, "row")
    progress.step(5, {"loss": 1.0, "tokens": 8})
    assert "row" not in shown.getvalue()
    assert "5/10  loss 1.000" in shown.getvalue()


def test_a_step_on_policy_shows_what_tells_of_a_collapse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "LINE_SECONDS", 0)
    shown, progress = resumed(tmp_path)
    found = {"reward": 0.5, "eval_reward": 0.25, "entropy": 1.5, "kl": 0.0, "clipped": 0.0125}
    progress.step(5, {"loss": 1.0, "tokens": 8, **found})
    line = "loss 1.000  reward 0.500  eval reward 0.250  entropy 1.500  kl 0.0000  clipped 1.25%"
    assert line in shown.getvalue()


def test_work_before_the_first_step_is_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "LINE_SECONDS", 0)
    monkeypatch.setattr(display, "LONG_STEP_SECONDS", 0)
    shown = io.StringIO()
    host = SimpleNamespace(hook=SimpleNamespace(step_logged=lambda **arguments: None))
    progress = TrainingProgress(Display(Console(file=shown, width=200)), "dpo", tmp_path / "metrics.jsonl", host)
    progress.part(64, 400, "reference row")
    assert "reference row 64/400" in shown.getvalue()
    assert "step" not in shown.getvalue()
    assert "0/0" not in shown.getvalue()
