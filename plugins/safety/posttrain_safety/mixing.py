"""Refusals and helpful answers, mixed in a stated ratio of records."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain import BadInput, Conversation, Problem
from posttrain_safety.config import SafetySettings
from posttrain_safety.exchanges import refused

REPEATS = 4
"""How often a record may be seen before it is worth a word: up to here repeating is nearly as good as new data
(arXiv:2305.16264)."""
HELP = "A refusal is told by how its answer begins, in English, or by refuses: true on the assistant turn"


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """The records of a stage, apart by the kind of their answers."""

    refusals: list[Conversation]
    helpful: list[Conversation]

    @classmethod
    def of(cls, records: Sequence[Any], settings: SafetySettings, stage: str) -> Kinds:
        """Tell the records apart; raises BadInput naming the kind that is missing."""
        kinds = cls(
            refusals=[record for record in records if refused(record, settings)],
            helpful=[record for record in records if not refused(record, settings)],
        )
        if not (kinds.refusals and kinds.helpful):
            raise BadInput(kinds._missing(f"{stage}.data"))
        return kinds

    def _missing(self, where: str) -> Problem:
        if self.refusals:
            what = f"holds {len(self.refusals):,} refusals and no helpful answer: a model of it would refuse anything"
            fix = "Add helpful answers, above all to harmless requests that sound dangerous"
        else:
            what = f"holds {len(self.helpful):,} helpful answers and no refusal: a model of it would refuse nothing"
            fix = f"Add refusals of harmful requests. {HELP}"
        return Problem(where=where, what=what, fix=fix)


@dataclass(frozen=True, kw_only=True)
class Portion:
    """What is trained of one kind in an epoch."""

    name: str
    records: int
    """Records of the kind in the data."""
    taken: list[Conversation]
    """Those that are trained: a seeded draw, each as often as another or once more."""

    def note(self, total: int) -> str:
        """The portion in one line."""
        times = len(self.taken) / self.records
        often = f", each {times:.1f} times" if times > 1 else ""
        return f"{self.name}: {len(self.taken):,} of {total:,} records, drawn from {self.records:,}{often}"


@dataclass(frozen=True, kw_only=True)
class Mix:
    """As many records as the data hold, with the stated share of refusals."""

    refusals: Portion
    helpful: Portion

    @classmethod
    def of(cls, kinds: Kinds, share: float, seed: int) -> Mix:
        """Draw ``share`` of the records from the refusals, the others from the helpful answers; at least one of each.

        A kind with more records than it needs gives a seeded sample, one with fewer gives each of them several times.
        """
        total = len(kinds.refusals) + len(kinds.helpful)
        count = min(max(round(share * total), 1), total - 1)
        return cls(
            refusals=_portion("refusals", kinds.refusals, count, seed),
            helpful=_portion("helpful answers", kinds.helpful, total - count, seed),
        )

    @property
    def records(self) -> list[Conversation]:
        """What is trained in an epoch."""
        return [*self.refusals.taken, *self.helpful.taken]

    def notes(self) -> Iterator[str]:
        """What a person should know before the records are trained on, one line each."""
        yield from (portion.note(len(self.records)) for portion in (self.refusals, self.helpful))

    def warnings(self, epochs: float) -> Iterator[str]:
        """A kind with so few records that they are learned by heart."""
        for portion in (self.refusals, self.helpful):
            times = epochs * len(portion.taken) / portion.records
            if len(portion.taken) > portion.records and times > REPEATS:
                what = f"{portion.records:,} {portion.name} are trained {times:.1f} times each"
                yield f"{what}, and learned by heart: add more of them, or change refusal_share"

    def figures(self) -> dict[str, Any]:
        """The mix for a manifest."""
        return {
            "refusal_share": len(self.refusals.taken) / len(self.records),
            "refusals": {"records": self.refusals.records, "taken": len(self.refusals.taken)},
            "helpful": {"records": self.helpful.records, "taken": len(self.helpful.taken)},
        }


def _portion(name: str, records: Sequence[Conversation], count: int, seed: int) -> Portion:
    order = random.Random(f"{name}/{seed}").sample(records, len(records))
    whole, rest = divmod(count, len(records))
    return Portion(name=name, records=len(records), taken=order * whole + order[:rest])
