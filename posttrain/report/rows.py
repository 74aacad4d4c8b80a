"""The lines of the final table."""

from __future__ import annotations

from posttrain.gate.spec import TaskVerdict
from posttrain.report.run import RunReport, StageReport
from posttrain.report.scores import clock, scale_of
from posttrain.run.directory import StageState

COLUMNS = ("stage", "task", "base", "parent", "candidate", "lift", "verdict", "tokens", "time")


def table_rows(report: RunReport) -> list[tuple[str, ...]]:
    """Cells in the order of COLUMNS, one line per stage, task and system that it was compared with."""
    return [row for stage in report.stages for row in _stage_rows(stage)]


def reasons(report: RunReport) -> list[tuple[str, str]]:
    """Per stage that has a verdict, why it is what it is."""
    return [(stage.name, stage.verdict.reason) for stage in report.stages if stage.verdict is not None]


def remarks(stage: StageState) -> list[str]:
    """Return the remarks on a stage: its eval loss, and its warnings."""
    eval_loss = [] if stage.eval_loss is None else [f"eval loss {stage.eval_loss:.4f}"]
    return [*eval_loss, *stage.warnings]


def _stage_rows(stage: StageReport) -> list[tuple[str, ...]]:
    state = stage.state
    cost = (f"{state.tokens:,}" if state.tokens else "", clock(state.seconds))
    tasks = stage.verdict.tasks if stage.verdict is not None else ()
    if not tasks:
        return [(stage.name, "", "", "", "", "", state.state, *cost)]
    rows = [_task_row(stage.name, task) for task in tasks]
    return [(*row, *(cost if index == 0 else ("", ""))) for index, row in enumerate(rows)]


def _task_row(stage: str, task: TaskVerdict) -> tuple[str, ...]:
    scale = scale_of(task)
    shown = (scale.score(score) for score in (task.base, task.parent, task.candidate))
    lift = f"{scale.interval(task.lift, task.low, task.high)} vs {task.against}"
    return (stage, f"{task.task} ({task.role}, n {task.n:,})", *shown, lift, task.state)
