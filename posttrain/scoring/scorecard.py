"""Scores on disk, one JSON line per system, task, filter and document; and what was asked."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.digests import canonical
from posttrain.disk import replace_text
from posttrain.errors import ArtifactDamaged
from posttrain.gate.spec import DocumentScore

if TYPE_CHECKING:
    from posttrain.scoring.questions import PreparedTask

PROMPT_END = 2000
"""Characters of a prompt that are kept: its end, which holds the question when examples come before it."""
_FIELDS = {field.name for field in fields(DocumentScore)}
_KINDS = {"doc_id": int, "metrics": dict}


def write_scorecard(path: Path, rows: Iterable[DocumentScore]) -> None:
    """Write rows in one step: a reader sees the old ones or the new, never a part."""
    replace_text(path, "".join(f"{row_line(row)}\n" for row in rows))


def read_scorecard(path: Path) -> list[DocumentScore]:
    """The rows of a scorecard; raises ArtifactDamaged naming the line that is not one."""
    rows = []
    for number, line in enumerate(lines_of(path.read_text(encoding="utf-8")), start=1):
        try:
            rows.append(row_from_json(json.loads(line)))
        except ValueError as error:
            raise ArtifactDamaged(f"{path}:{number} is not a score: {error}") from None
    return rows


def write_questions(path: Path, tasks: Iterable[PreparedTask]) -> None:
    """Write the end of every question's prompt, for those who read the answers."""
    lines = [
        canonical({"task": task.name, "doc_id": question.doc_id, "prompt": question.prompt[-PROMPT_END:]})
        for task in tasks
        for question in task.questions
    ]
    replace_text(path, "".join(f"{line}\n" for line in lines))


def read_questions(path: Path) -> dict[tuple[str, int], str]:
    """The end of every prompt by task and document; raises ArtifactDamaged naming the line that is not one."""
    prompts = {}
    for number, line in enumerate(lines_of(path.read_text(encoding="utf-8")), start=1):
        try:
            row = json.loads(line)
            prompts[str(row["task"]), int(row["doc_id"])] = str(row["prompt"])
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactDamaged(f"{path}:{number} is not a question: {error}") from None
    return prompts


def lines_of(text: str) -> list[str]:
    """The lines of a JSONL text; characters inside JSON strings that Unicode counts as line ends do not end a line."""
    return text.removesuffix("\n").split("\n") if text else []


def row_line(row: DocumentScore) -> str:
    """A row as one line of JSON."""
    return canonical(asdict(row))


def row_from_json(value: Any) -> DocumentScore:
    """A row from its JSON value; raises ValueError when it has not exactly the fields of one."""
    if not isinstance(value, dict) or set(value) != _FIELDS:
        raise ValueError("it does not have the fields of a score")
    wrong = [name for name in sorted(_FIELDS) if not isinstance(value[name], _KINDS.get(name, str))]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} is not of its type")
    return DocumentScore(**value)
