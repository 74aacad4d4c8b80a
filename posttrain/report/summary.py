"""Verdicts as Markdown for a pull request: short, the verdict first, the answers that got worse folded away."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from posttrain.gate.spec import DocumentScore
from posttrain.report.documents import Comparison, comparisons
from posttrain.report.rows import COLUMNS, reasons, table_rows
from posttrain.report.run import RunReport

LARGEST = 60_000
"""Bytes: a comment on GitHub holds 65,536 characters, a job's summary a megabyte."""
ANSWER = 300
"""Characters of an answer that are shown."""
MARKS = {"pass": "✅ passed", "fail": "❌ refused", "undecided": "❔ undecided"}
ESCAPED = str.maketrans(
    {**{mark: f"\\{mark}" for mark in "\\`*_[]|~"}, "&": "&amp;", "<": "&lt;", "@": "&#64;"},
)
SHOWN = tuple(column for column in COLUMNS if column not in ("stage", "tokens", "time"))


def summary(report: RunReport, rows: Sequence[DocumentScore]) -> str:
    """The verdicts of a gate, with the documents that got worse; at most LARGEST bytes."""
    lines: list[str] = []
    for stage in report.stages:
        if stage.verdict is not None:
            lines += [
                f"### {MARKS[stage.verdict.state]}: {_inline(stage.name)}, gate {_inline(report.state.recipe)}",
                "",
            ]
    lines += [f"| {' | '.join(SHOWN)} |", "|" + "---|" * len(SHOWN)]
    for row in table_rows(report):
        cells = dict(zip(COLUMNS, row, strict=True))
        lines.append(f"| {' | '.join(_inline(cells[column]) for column in SHOWN)} |")
    lines += ["", *(f"- {_inline(reason)}" for _, reason in reasons(report)), ""]
    tasks = [task for stage in report.stages if stage.verdict is not None for task in stage.verdict.tasks]
    for comparison in comparisons(tasks, rows):
        lines += _worse(comparison)
    return _limited("\n".join(lines) + "\n")


def refusal(name: str, adapter: str, reason: str, exit_code: int) -> str:
    """What is said in the place of a table that there is none of."""
    mark = MARKS["fail"] if exit_code == 3 else "⚠️ not judged"
    return _limited(f"### {mark}: {_inline(adapter)}, gate {_inline(name)}\n\n- {_inline(reason)}\n")


def _worse(comparison: Comparison) -> Iterable[str]:
    if not comparison.worse:
        return
    task, count = comparison.task, len(comparison.worse)
    changed = f"{count:,} got worse, {len(comparison.better):,} better"
    yield f"<details><summary>{_inline(task.task)} against {task.against}: {changed}</summary>\n"
    yield "| document | before | after | wanted |\n|---|---|---|---|"
    for change in comparison.worse[:10]:
        texts = (change.before.response, change.after.response, change.after.target)
        yield f"| {change.after.doc_id} | {' | '.join(_inline(text[:ANSWER]) for text in texts)} |"
    yield "\n</details>\n"


def _inline(text: str) -> str:
    """A text in one cell, as it is: what a model wrote is no markup, and calls nobody."""
    return " ".join(text.split()).translate(ESCAPED)


def _limited(text: str) -> str:
    data = text.encode("utf-8", "replace")
    if len(data) <= LARGEST:
        return data.decode("utf-8")
    note = "\n\n(the rest is left out; the scorecard holds all of it)\n"
    lines, size = [], len(note.encode())
    for line in data.decode("utf-8").split("\n"):
        size += len(line.encode()) + 1
        if size > LARGEST:
            break
        lines.append(line)
    return "\n".join(lines) + note
