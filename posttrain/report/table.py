"""The final table of a run: a line per stage, task and system compared with; on a terminal and as report.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from posttrain.gate.spec import TaskVerdict, Verdict
from posttrain.host.plugins import CORE_ORIGIN
from posttrain.quoting import cell
from posttrain.quoting import markdown as inline
from posttrain.report.policy import courses
from posttrain.report.run import RunReport, StageReport
from posttrain.report.scores import clock, scale_of
from posttrain.run.directory import StageState

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = ("stage", "task", "base", "parent", "candidate", "lift", "verdict", "tokens", "time")
RIGHT = ("base", "parent", "candidate", "tokens", "time")
"""Columns aligned to the right."""
COLOURS = {"pass": "green", "promoted": "green", "fail": "red", "gate_failed": "red", "undecided": "yellow",
           "unpromoted": "yellow"}  # fmt: skip
"""Colour of a state; others have none."""
PLAIN_WIDTH = 140
"""Columns of a table written to a file or a pipe."""


def shown_columns(report: RunReport) -> list[tuple[int, str]]:
    """Return the places of a report's columns with their titles: a gate has a baseline, or nothing, for a parent."""
    titles = dict(enumerate(COLUMNS))
    if report.is_gate:
        parent = COLUMNS.index("parent")
        compared = {
            task.against for stage in report.stages if stage.verdict is not None for task in stage.verdict.tasks
        }
        titles = {place: title for place, title in titles.items() if place != parent or "baseline" in compared}
        titles |= {parent: "baseline"} if parent in titles else {}
    return list(titles.items())


def table_rows(report: RunReport) -> list[tuple[str, ...]]:
    """Return the cells in the order of COLUMNS, one line per stage, task and system compared with."""
    return [row for stage in report.stages for row in _stage_rows(stage)]


def reasons(report: RunReport) -> list[tuple[str, str]]:
    """Return the name of every judged stage, and the reason of its verdict."""
    return [(stage.name, stage.verdict.reason) for stage in report.stages if stage.verdict is not None]


def behind(verdict: Verdict) -> str:
    """Say who scored and who judged, with versions; what a report cannot judge again is said."""
    again = "" if verdict.judged_by == (CORE_ORIGIN,) else " (a plugin's decision is made again where the run resumes)"
    return f"scored by {_listed(verdict.scored_by)}; judged by {_listed(verdict.judged_by)}{again}"


def judges(report: RunReport) -> list[tuple[str, str]]:
    """Return the name of every judged stage with the notes of its verdict and who is behind it."""
    return [
        (stage.name, text)
        for stage in report.stages
        if stage.verdict is not None
        for text in (*filter(None, [stage.went_on]), *stage.verdict.notes, behind(stage.verdict))
    ]


def _listed(plugins: Sequence[str]) -> str:
    return ", ".join(plugins) or "nobody known"


def remarks(stage: StageState) -> list[str]:
    """Return the remarks on a stage: its origin, what is not promoted below it, its eval loss, and its warnings."""
    origin = [f"linked from {stage.origin}, not trained again"] if stage.origin and stage.digest else []
    below = [f"stands on what no gate passed: {'; '.join(stage.unpromoted)}"] if stage.unpromoted else []
    eval_loss = [] if stage.eval_loss is None else [f"eval loss {stage.eval_loss:.4f}"]
    return [*origin, *below, *eval_loss, *(attempt.line() for attempt in stage.attempts), *stage.warnings]


def _stage_rows(stage: StageReport) -> list[tuple[str, ...]]:
    entry = stage.entry
    cost = (f"{entry.tokens:,}" if entry.tokens else "", clock(entry.seconds))
    if stage.verdict is None or not stage.verdict.tasks:
        return [(stage.name, "", "", "", "", "", entry.state, *cost)]
    rows = [_task_row(stage.name, task, stage.verdict.recall(task.task)) for task in stage.verdict.tasks]
    return [(*row, *(cost if index == 0 else ("", ""))) for index, row in enumerate(rows)]


def _task_row(stage: str, task: TaskVerdict, recall: str) -> tuple[str, ...]:
    scale = scale_of(task)
    scores = (scale.score(score) for score in (task.base, task.parent, task.candidate))
    lift = "; ".join(filter(None, [f"{scale.interval(task.lift, task.low, task.high)} vs {task.against}", recall]))
    return (stage, f"{task.task} ({task.role}, n {task.n:,})", *scores, lift, task.state)


def table_console() -> Console:
    """Return a console on standard output: as wide as the terminal, PLAIN_WIDTH where there is none."""
    from posttrain.console import DataConsole

    console = DataConsole()
    return console if console.is_terminal else DataConsole(width=PLAIN_WIDTH)


def print_table(report: RunReport, console: Console) -> None:
    """Print the table of a run with the reason of every verdict; shares are in points of 100."""
    from rich.box import SIMPLE
    from rich.table import Table

    from posttrain.console import styled

    title = f"{report.run.recipe}: {report.run.state.replace('_', ' ')}"
    table = Table(title=styled(title), title_justify="left", header_style="bold", box=SIMPLE)
    columns = shown_columns(report)
    for place, column in columns:
        table.add_column(column, justify="right" if COLUMNS[place] in RIGHT else "left", overflow="fold")
    previous = None
    for stage, *cells in table_rows(report):
        if previous not in (None, stage):
            table.add_section()
        styles = ["default"] * 5 + [COLOURS.get(cells[5], "default")] + ["default"] * 2
        coloured = [styled(pair) for pair in zip(cells, styles, strict=True)]
        named = [styled("" if stage == previous else stage), *coloured]
        table.add_row(*(named[place] for place, _ in columns))
        previous = stage
    console.print(table)
    for stage, reason in reasons(report):
        console.print(styled((stage, "bold"), f": {reason}"))
    for stage, text in judges(report):
        console.print(styled((f"{stage}: {text}", "dim")))
    for entry in report.run.stages:
        for remark in remarks(entry):
            console.print(styled((entry.name, "yellow"), f": {remark}"))


def markdown(report: RunReport) -> str:
    """Return report.md: the table, the reasons, the course of on-policy stages, and the lineage of every artifact."""
    lines = [
        f"# {inline(report.run.recipe)}: {report.run.state.replace('_', ' ')}",
        "",
        "Shares are in points of 100, other scores as they are; brackets hold the bounds of the paired difference.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "|".join("---" for _ in COLUMNS) + "|",
        *("| " + " | ".join(map(cell, row)) + " |" for row in table_rows(report)),
        "",
        *(f"- **{inline(stage)}**: {inline(text)}" for stage, text in (*reasons(report), *judges(report))),
        *(f"- **{inline(entry.name)}**: {inline(remark)}" for entry in report.run.stages for remark in remarks(entry)),
        "",
        *_course(report),
        "| stage | kind | state | artifact | digest | parent digest |",
        "|---|---|---|---|---|---|",
        *(_lineage(entry) for entry in report.run.stages),
    ]
    return "\n".join(lines) + "\n"


def _course(report: RunReport) -> list[str]:
    """Return the table of what on-policy stages were rewarded for, empty without such a stage."""
    rows = [
        (stage.name, each.name, each.before, each.after, each.note)
        for stage in report.stages
        if stage.metrics.get("reward")
        for each in courses(stage)
    ]
    head = ["| stage | on policy | first | last | |", "|---|---|---|---|---|"]
    return [*head, *("| " + " | ".join(map(cell, row)) + " |" for row in rows), ""] if rows else []


def _lineage(entry: StageState) -> str:
    digests = ((entry.digest or "")[:12], (entry.parent_digest or "")[:12])
    return "| " + " | ".join(map(cell, (entry.name, entry.kind, entry.state, entry.artifact or "", *digests))) + " |"
