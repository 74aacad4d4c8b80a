"""The lines of the final table, read from what a run left on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.runs import RunState, StageState, read_state

COLUMNS = ("stage", "task", "base", "parent", "candidate", "lift", "verdict", "tokens", "time")


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A run as its report shows it."""

    path: Path
    state: RunState
    rows: list[tuple[str, ...]]
    """Cells in the order of COLUMNS."""
    reasons: list[tuple[str, str]]
    """Per stage, why its verdict is what it is."""

    @property
    def remarks(self) -> list[tuple[str, str]]:
        """What else is to be known, by stage: the loss of held-out records, and warnings."""
        found = []
        for stage in self.state.stages:
            held_out = [] if stage.eval_loss is None else [f"held-out loss {stage.eval_loss:.4f}"]
            found += [(stage.name, text) for text in (*held_out, *stage.warnings)]
        return found


def read_report(path: Path) -> RunReport:
    """The report of the run in ``path``."""
    state = read_state(path)
    rows, reasons = [], []
    for stage in state.stages:
        verdict = _verdict(path, stage)
        rows += _stage_rows(stage, verdict)
        if verdict is not None:
            reasons.append((stage.name, str(verdict["reason"])))
    return RunReport(path=path, state=state, rows=rows, reasons=reasons)


def _verdict(path: Path, stage: StageState) -> dict[str, Any] | None:
    file = path / "stages" / stage.name / "verdict.json"
    if stage.verdict is None or not file.exists():
        return None
    return dict(json.loads(file.read_text()))


def _stage_rows(stage: StageState, verdict: dict[str, Any] | None) -> list[tuple[str, ...]]:
    cost = (f"{stage.tokens:,}" if stage.tokens else "", _clock(stage.seconds))
    tasks = verdict["tasks"] if verdict else []
    if not tasks:
        return [(stage.name, "", "", "", "", "", stage.state, *cost)]
    rows = [_task_row(stage, task) for task in tasks]
    return [(*row, *(cost if index == 0 else ("", ""))) for index, row in enumerate(rows)]


def _task_row(stage: StageState, task: dict[str, Any]) -> tuple[str, ...]:
    """Shares are shown in points of 100, other scores as they are."""
    scores = [task[system] for system in ("base", "parent", "candidate")]
    scale = 100 if all(0 <= score <= 1 for score in scores) else 1
    low, lift, high = (f"{scale * task[key]:+.1f}" for key in ("low", "lift", "high"))
    name = f"{task['task']} ({task['role']}, n {task['n']:,})"
    shown = (f"{scale * score:.1f}" for score in scores)
    return (stage.name, name, *shown, f"{lift} [{low}, {high}] vs {task['against']}", task["state"])


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
