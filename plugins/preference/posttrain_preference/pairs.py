"""Preference records as token ids, from the store of rendered rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain import StageContext
from posttrain_preference.rows import TokenRows, split_fitting

if TYPE_CHECKING:
    from posttrain import JudgedAnswer


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A prompt and its two answers as token ids; an answer ends with the end-of-turn token."""

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]
    where: str
    """File and line of the record, for messages."""

    @property
    def judgement(self) -> tuple[object, ...]:
        """Return what is judged, and how."""
        return tuple(self.prompt), tuple(self.chosen), tuple(self.rejected)

    @property
    def opposite(self) -> tuple[object, ...]:
        """Return the other judgement of the same answers."""
        return tuple(self.prompt), tuple(self.rejected), tuple(self.chosen)

    @property
    def answers(self) -> tuple[tuple[str, Sequence[int]], ...]:
        """Return both answers, the chosen one first."""
        return ("chosen", self.chosen), ("rejected", self.rejected)

    @property
    def aside(self) -> Sequence[int]:
        """Return no answer to another prompt: no loss of pairs needs one."""
        return []


def render_pairs(context: StageContext) -> TokenRows[TokenPair]:
    """Render every record; raises BadInput for one that cannot be rendered, and without any short enough pair."""
    trained, measured = (_pairs(context.answers(records)) for records in (context.records, context.eval_records))
    return split_fitting(context, trained, measured, "pairs")


def _pairs(answers: Iterator[JudgedAnswer]) -> Iterator[TokenPair]:
    for chosen in answers:
        yield TokenPair(chosen.prompt, chosen.answer, next(answers).answer, chosen.where)
