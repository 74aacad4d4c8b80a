"""Records as token ids, and the choice of those short enough to train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from posttrain import BadInput, Problem, StageContext

if TYPE_CHECKING:
    from posttrain import AnsweredRow

Row = TypeVar("Row", bound="AnsweredRow")


@dataclass(frozen=True, kw_only=True)
class TokenRows(Generic[Row]):
    """The rows of a stage, and the number of dropped ones."""

    noun: str
    """Name of the rows: ``pairs`` or ``answers``."""
    rows: list[Row]
    """Rows to train."""
    eval_rows: list[Row]
    """Rows set aside for the eval loss."""
    dropped: int
    """Rows whose prompt plus answer exceed the sequence length."""

    @property
    def own(self) -> list[Row]:
        """Rows to train, each as often as the data has it."""
        return self.rows

    def figures(self) -> dict[str, int]:
        """Return the manifest's figures of the rows."""
        return {self.noun: len(self.rows), "dropped": self.dropped}


def split_fitting(
    context: StageContext, rendered: Iterable[Row], eval_rendered: Iterable[Row], noun: str
) -> TokenRows[Row]:
    """Keep the rows within the sequence length, and set those for the eval loss aside.

    Others are dropped and counted, for a cut answer teaches not to end. Raises BadInput when no row is left to train.
    """
    from posttrain import set_aside  # imports torch, and listing the stages must not

    longest = context.config.sequence_length
    found, measured = list(rendered), list(eval_rendered)
    rows, eval_rows = ([row for row in each if _length(row) <= longest] for each in (found, measured))
    if not rows:
        raise BadInput(_nothing_left(context, len(found), noun))
    dropped = len(found) - len(rows)
    if dropped:
        context.progress.note(f"dropped {dropped} {noun} longer than {longest} tokens")
    if lost := len(measured) - len(eval_rows):
        context.progress.note(f"dropped {lost} eval {noun} longer than {longest} tokens")
    trained, held_out = set_aside(rows, context.config.eval_share, context.seed, context.clusters)
    return TokenRows(noun=noun, rows=trained, eval_rows=[*held_out, *eval_rows], dropped=dropped)


def _length(row: AnsweredRow) -> int:
    return len(row.prompt) + max(len(ids) for _, ids in row.answers)


def _nothing_left(context: StageContext, count: int, noun: str) -> Problem:
    if not count:
        return Problem(where=f"{context.name}.data", what=f"holds no {noun} to learn from")
    return Problem(
        where=f"{context.name}.sequence_length",
        what=f"each of the {count} {noun} is longer than {context.config.sequence_length} tokens",
        fix=f"Raise it, or give shorter {noun}",
    )
