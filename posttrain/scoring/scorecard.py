"""Scores on disk, one JSON line per system, task, filter and document; and the prompts beside them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.digests import canonical
from posttrain.disk import replace_text
from posttrain.errors import ArtifactDamaged
from posttrain.gate.spec import DocumentScore
from posttrain.saved import lines_of, parse_json, read_lines, read_text

if TYPE_CHECKING:
    from posttrain.scoring.questions import PreparedTask

PROMPT_END = 2000
"""Characters kept of the end of a question."""
_FIELDS = {field.name for field in fields(DocumentScore)}
_KINDS = {"doc_id": int, "metrics": dict}


def scorecard_text(rows: Iterable[DocumentScore]) -> str:
    """Return rows as the text of a scorecard."""
    return "".join(f"{row_line(row)}\n" for row in rows)


def write_scorecard(path: Path, rows: Iterable[DocumentScore]) -> None:
    """Write rows atomically: a reader sees the old file or the new one, never a part."""
    replace_text(path, scorecard_text(rows))


def read_scorecard(path: Path) -> list[DocumentScore]:
    """Return the rows of a scorecard. Raises ArtifactDamaged naming the first bad line."""
    return parse_scorecard(read_text(path), path)


def parse_scorecard(text: str, path: Path) -> list[DocumentScore]:
    """Return the rows in the text of a scorecard; ``path`` names it in errors, as ``read_scorecard`` does."""
    rows = []
    for number, line in enumerate(lines_of(text), start=1):
        try:
            rows.append(row_from_json(parse_json(line, f"{path}:{number}")))
        except ValueError as error:
            raise ArtifactDamaged(f"{path}:{number} is not a score: {error}") from None
    return rows


def write_questions(path: Path, tasks: Iterable[PreparedTask]) -> None:
    """Write the end of every question, for people who read the answers."""
    lines = [
        canonical(asdict(Shown(task.name, question.doc_id, question.shown[-PROMPT_END:], question.place)))
        for task in tasks
        for question in task.questions
    ]
    replace_text(path, "".join(f"{line}\n" for line in lines))


def read_questions(path: Path) -> dict[tuple[str, int], Shown]:
    """Return the end of every question by task and document. Raises ArtifactDamaged naming the first bad line."""
    return {(question.task, question.doc_id): question for question in read_lines(Shown, path)}


@dataclass(frozen=True)
class Shown:
    """A line of questions.jsonl: a question for people who read the answers."""

    task: str
    doc_id: int
    prompt: str
    """End of the question's text."""
    place: str = ""
    """File and line of an own document."""

    @property
    def name(self) -> str:
        """File and line, or the number of the document among those of its task."""
        return self.place or f"document {self.doc_id}"


def row_line(row: DocumentScore) -> str:
    """Return a row as one line of JSON."""
    return canonical(asdict(row))


def row_from_json(value: Any) -> DocumentScore:
    """Return the row of a JSON value. Raises ValueError unless it has exactly the fields of a row, each of its type."""
    if not isinstance(value, dict) or set(value) != _FIELDS:
        raise ValueError("it does not have the fields of a score")
    wrong = [name for name in sorted(_FIELDS) if not isinstance(value[name], _KINDS.get(name, str))]
    if not wrong:
        wrong = [f"metrics.{key}" for key, score in value["metrics"].items() if type(score) not in (int, float)]
    if wrong:
        raise ValueError(f"wrong type of {', '.join(wrong)}")
    return DocumentScore(**value)
