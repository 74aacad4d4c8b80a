"""Verdicts as a Markdown comment for a pull request: the verdict first, the answers that got worse folded away."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence

from posttrain.gate.spec import DocumentScore
from posttrain.quoting import one_line
from posttrain.report.documents import TaskChanges, changed_documents
from posttrain.report.run import RunReport
from posttrain.report.table import judges, reasons, shown_columns, table_rows
from posttrain.scoring.scorecard import Shown

MOST_BYTES = 60_000
"""Size of a summary: a comment on GitHub holds 65,536 characters, the summary of a job a megabyte."""
MOST_DOCUMENTS = 10
"""Documents shown of one task."""
MOST_CHARACTERS = 300
"""Characters shown of an answer."""
MARKS = {"pass": "✅ passed", "fail": "❌ failed", "undecided": "❔ undecided"}
ESCAPED = str.maketrans(
    {**{mark: f"\\{mark}" for mark in "\\`*_[]|~"}, "&": "&amp;", "<": "&lt;", "@": "&#64;"},
)
LEFT_OUT = ("stage", "tokens", "time")
"""Columns of the table that a comment has no use for."""


NEXT = {
    "fail": "Look at the answers that got worse. A loss that is meant is allowed in the gate (max_drop, min_lift), "
    "or by a new baseline: --update-baseline.",
    "undecided": "More documents decide it; posttrain plan says how many would do.",
}
"""The next step after a verdict that is no pass."""


def summary(
    report: RunReport, rows: Sequence[DocumentScore], prompts: Mapping[tuple[str, int], Shown] | None = None
) -> str:
    """Return the verdicts of a gate with the documents that got worse, in at most MOST_BYTES bytes.

    ``prompts`` are the questions by task and document.
    """
    lines: list[str] = []
    for stage in report.stages:
        if stage.verdict is not None:
            lines += [
                f"### {MARKS[stage.verdict.state]}: {_inline(stage.name)}, gate {_inline(report.run.recipe)}",
                "",
            ]
    columns = [(place, title) for place, title in shown_columns(report) if title not in LEFT_OUT]
    lines += [f"| {' | '.join(title for _, title in columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(_inline(row[place]) for place, _ in columns)} |" for row in table_rows(report)]
    why = [each for _, text in reasons(report) for each in text.split("; ")]
    lines += ["", *(f"- {_inline(text)}" for text in (*why, *(text for _, text in judges(report)))), ""]
    states = {stage.verdict.state for stage in report.stages if stage.verdict is not None}
    lines += [f"Next: {NEXT[state]}" for state in NEXT if state in states]
    lines += [f"Command: {_inline(shlex.join(report.run.command))}"] if report.run.command else []
    for versions in (stage.manifest["versions"] for stage in report.stages if "versions" in stage.manifest):
        lines.append(f"Versions: {_inline(', '.join(f'{name} {each}' for name, each in versions.items()))}")
    lines += [f"Evidence: {_inline(report.path.name)}", ""]
    tasks = [task for stage in report.stages if stage.verdict is not None for task in stage.verdict.tasks]
    for changes in changed_documents(tasks, rows):
        lines += _worse(changes, prompts or {})
    return _limit("\n".join(lines) + "\n")


def summary_error(name: str, adapter: str, reason: str, exit_code: int) -> str:
    """Return the summary of a gate that has no table: it failed before it asked anything, or could not judge."""
    mark = MARKS["fail"] if exit_code == 3 else "⚠️ not judged"
    return _limit(f"### {mark}: {_inline(adapter)}, gate {_inline(name)}\n\n- {_inline(reason)}\n")


def _worse(changes: TaskChanges, prompts: Mapping[tuple[str, int], Shown]) -> Iterable[str]:
    if not changes.worse:
        return
    task, count = changes.task, len(changes.worse)
    counts = f"{count:,} got worse, {len(changes.better):,} better"
    counts += f"; the first {MOST_DOCUMENTS}" if count > MOST_DOCUMENTS else ""
    yield f"<details><summary>{_inline(task.task)} against {task.against}: {counts}</summary>\n"
    yield "| document | question | before | after | wanted |\n|---|---|---|---|---|"
    for change in changes.worse[:MOST_DOCUMENTS]:
        number = change.after.doc_id
        question = prompts.get((task.task, number), Shown(task.task, number, ""))
        texts = (question.prompt[-MOST_CHARACTERS:], change.before.response, change.after.response, change.after.target)
        cells = (question.place or str(number), *(text[:MOST_CHARACTERS] for text in texts))
        yield f"| {' | '.join(map(_inline, cells))} |"
    yield "\n</details>\n"


def _inline(text: str) -> str:
    """Escape a text for one cell: an answer is shown as it is, is no markup, and mentions no user."""
    return one_line(" ".join(text.split())).translate(ESCAPED)


def _limit(text: str) -> str:
    """Cut a summary at the end of a line, and say so."""
    data = text.encode("utf-8", "replace")
    if len(data) <= MOST_BYTES:
        return data.decode("utf-8")
    note = "\n\n(the rest is left out; the scorecard holds all of it)\n"
    lines, size = [], len(note.encode())
    for line in data.decode("utf-8").split("\n"):
        size += len(line.encode()) + 1
        if size > MOST_BYTES:
            break
        lines.append(line)
    return "\n".join(lines) + note
