"""Declining and helpful answers, mixed in a stated ratio of records."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain import BadInput, Conversation, Problem
from posttrain_safety.config import SafetySettings
from posttrain_safety.exchanges import has_declined

REPEATS = 4
"""Passes over a record before they are worth a warning: up to here repeating is nearly as good as new data
(arXiv:2305.16264)."""
RECOGNISED = "An answer declines when it begins so in English, or when its assistant turn has refuses: true"


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """The records of a stage, apart by the kind of their answers."""

    declining: list[Conversation]
    helpful: list[Conversation]

    @classmethod
    def of(cls, records: Sequence[Conversation], settings: SafetySettings, stage: str) -> Kinds:
        """Sort the stage's own records, not the replayed ones; raises BadInput naming a missing kind."""
        own = [record for record in records if not record.origin.share]
        kinds = cls(
            declining=[record for record in own if has_declined(record, settings)],
            helpful=[record for record in own if not has_declined(record, settings)],
        )
        if not (kinds.declining and kinds.helpful):
            raise BadInput(kinds._missing(f"{stage}.data"))
        return kinds

    def _missing(self, where: str) -> Problem:
        if self.declining:
            what = f"holds {len(self.declining):,} declining answers and no helpful one: a model would decline anything"
            fix = "Add helpful answers, above all to harmless requests that sound dangerous"
        else:
            what = f"holds {len(self.helpful):,} helpful answers and no declining one: a model would decline nothing"
            fix = f"Add answers that decline harmful requests. {RECOGNISED}"
        return Problem(where=where, what=what, fix=fix)


@dataclass(frozen=True, kw_only=True)
class Portion:
    """The records of one kind in an epoch."""

    name: str
    records: int
    """Records of the kind in the data."""
    taken: list[Conversation]
    """Trained records: a seeded draw, each as often as another or once more."""

    @classmethod
    def draw(cls, name: str, records: Sequence[Conversation], count: int, seed: str) -> Portion:
        """Draw ``count`` records: a sample, or each of them several times."""
        order = random.Random(seed).sample(records, len(records))
        whole, rest = divmod(count, len(records))
        return cls(name=name, records=len(records), taken=order * whole + order[:rest])

    def note(self, total: int) -> str:
        """Return the portion in one line."""
        times = len(self.taken) / self.records
        often = f", each {times:.1f} times" if times > 1 else ""
        return f"{self.name}: {len(self.taken):,} of {total:,} records, drawn from {self.records:,}{often}"

    def figures(self) -> dict[str, int]:
        """Return the portion's part of the manifest."""
        return {"records": self.records, "taken": len(self.taken)}


@dataclass(frozen=True, kw_only=True)
class Mix:
    """As many records as the data hold, with the stated share of declining answers."""

    declining: Portion
    helpful: Portion

    @classmethod
    def of(cls, kinds: Kinds, share: float, seed: int) -> Mix:
        """Draw ``share`` of the records from the declining ones, the others from the helpful; at least one of each."""
        total = len(kinds.declining) + len(kinds.helpful)
        count = min(max(round(share * total), 1), total - 1)
        return cls(
            declining=Portion.draw("declining answers", kinds.declining, count, f"refusals/{seed}"),
            helpful=Portion.draw("helpful answers", kinds.helpful, total - count, f"helpful answers/{seed}"),
        )

    @property
    def records(self) -> list[Conversation]:
        """The records of an epoch."""
        return [*self.declining.taken, *self.helpful.taken]

    def notes(self) -> Iterator[str]:
        """Yield a line for each portion."""
        yield from (portion.note(len(self.records)) for portion in (self.declining, self.helpful))

    def warnings(self, epochs: float) -> Iterator[str]:
        """Yield a line for each kind with so few records that a model learns them by heart."""
        for portion in (self.declining, self.helpful):
            times = epochs * len(portion.taken) / portion.records
            if len(portion.taken) > portion.records and times > REPEATS:
                what = f"{portion.records:,} {portion.name} are trained {times:.1f} times each"
                yield f"{what}, and learned by heart: add more of them, or change refusal_share"

    def figures(self) -> dict[str, Any]:
        """Return the mix's part of the manifest."""
        share = len(self.declining.taken) / len(self.records)
        return {"refusal_share": share, "refusals": self.declining.figures(), "helpful": self.helpful.figures()}
