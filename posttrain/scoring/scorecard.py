"""Scores on disk, one JSON line per system, task, filter and document; and the prompts beside them."""

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
"""Characters kept of a prompt's end: few-shot examples come first, the question last."""
_FIELDS = {field.name for field in fields(DocumentScore)}
_KINDS = {"doc_id": int, "metrics": dict}


def write_scorecard(path: Path, rows: Iterable[DocumentScore]) -> None:
    """Write rows atomically: a reader sees the old file or the new one, never a part."""
    replace_text(path, "".join(f"{row_line(row)}\n" for row in rows))


def read_scorecard(path: Path) -> list[DocumentScore]:
    """Return the rows of a scorecard. Raises ArtifactDamaged naming the first bad line."""
    rows = []
    for number, line in enumerate(lines_of(path.read_text(encoding="utf-8")), start=1):
        try:
            rows.append(row_from_json(json.loads(line)))
        except ValueError as error:
            raise ArtifactDamaged(f"{path}:{number} is not a score: {error}") from None
    return rows


def write_questions(path: Path, tasks: Iterable[PreparedTask]) -> None:
    """Write the end of every question's prompt, for people who read the answers."""
    lines = [
        canonical({"task": task.name, "doc_id": question.doc_id, "prompt": question.prompt[-PROMPT_END:]})
        for task in tasks
        for question in task.questions
    ]
    replace_text(path, "".join(f"{line}\n" for line in lines))


def read_questions(path: Path) -> dict[tuple[str, int], str]:
    """Return the end of every prompt by task and document. Raises ArtifactDamaged naming the first bad line."""
    prompts = {}
    for number, line in enumerate(lines_of(path.read_text(encoding="utf-8")), start=1):
        try:
            row = json.loads(line)
            prompts[str(row["task"]), int(row["doc_id"])] = str(row["prompt"])
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactDamaged(f"{path}:{number} is not a question: {error}") from None
    return prompts


def lines_of(text: str) -> list[str]:
    """Split a JSONL text at newlines only: ``splitlines`` would also split at U+2028 inside a JSON string."""
    return text.removesuffix("\n").split("\n") if text else []


def row_line(row: DocumentScore) -> str:
    """Return a row as one line of JSON."""
    return canonical(asdict(row))


def row_from_json(value: Any) -> DocumentScore:
    """Return the row of a JSON value. Raises ValueError unless it has exactly the fields of a row, each of its type."""
    if not isinstance(value, dict) or set(value) != _FIELDS:
        raise ValueError("it does not have the fields of a score")
    wrong = [name for name in sorted(_FIELDS) if not isinstance(value[name], _KINDS.get(name, str))]
    if wrong:
        raise ValueError(f"wrong type of {', '.join(wrong)}")
    return DocumentScore(**value)
