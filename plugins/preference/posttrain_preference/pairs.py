"""Preference records as token ids, rendered once by the renderer of SFT and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from posttrain import Preference, StageContext
from posttrain_preference.rows import TokenRows, split_fitting


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A prompt and its two answers as token ids; an answer ends with the end-of-turn token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
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
    def answers(self) -> tuple[tuple[str, list[int]], ...]:
        """Return both answers, the chosen one first."""
        return ("chosen", self.chosen), ("rejected", self.rejected)

    @property
    def aside(self) -> list[int]:
        """Return no answer to another prompt: no loss of pairs needs one."""
        return []


def render_pairs(context: StageContext) -> TokenRows[TokenPair]:
    """Render every record; raises BadInput for one that cannot be rendered, and without any short enough pair."""
    trained, measured = (_render(context, records) for records in (context.records, context.eval_records))
    return split_fitting(context, trained, measured, "pairs")


def _render(context: StageContext, records: Iterable[Preference]) -> Iterator[TokenPair]:
    renderer = context.renderer()
    for record in records:
        rendered = renderer.preference(record)
        yield TokenPair(rendered.prompt, rendered.chosen, rendered.rejected, record.where)
