"""Rows of files before their shape is recognised, and those that cannot be read: counted, named, left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from posttrain.data.records import Record
from posttrain.errors import BadInput, Problem

T = TypeVar("T")

RawRow = dict[str, Any]
"""One record under the keys of its file, before its shape is recognised."""
Row = tuple[str, RawRow]
"""A row with its place: ``file:line`` counted from 1, or ``file[index]`` counted from 0."""
Rows = Iterator[Row]
"""Rows with their places."""

MOST_NAMED = 10
"""Rows of each kind that a message names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that cannot be read, while those behind it can."""

    where: str
    """Place of the row."""
    kind: str
    """Class of the fault: ``encoding``, ``JSON``, ``length``, ``cells``, ``columns`` or ``shape``."""
    what: str
    """The fault, in one sentence."""
    fix: str = ""
    """Its remedy."""

    def problem(self) -> Problem:
        """Return the row as a problem of the input."""
        return Problem(where=self.where, what=self.what, fix=self.fix)


Found = Row | BadRow
"""What a reader yields: a row, or one that cannot be read."""


def strict(found: Iterable[T | BadRow]) -> Iterator[T]:
    """Yield what can be read; raises BadInput at the first row that cannot."""
    for each in found:
        if isinstance(each, BadRow):
            raise BadInput(each.problem())
        yield each


def bad_row(error: BadInput, kind: str) -> BadRow:
    """Return the first problem of an error as a row that cannot be read."""
    first = error.problems[0]
    return BadRow(where=first.where, kind=kind, what=first.what, fix=first.fix)


@dataclass(slots=True, kw_only=True)
class BadRows:
    """The rows of one source that cannot be read, counted among all of its rows."""

    path: str
    """File, folder or name of the source."""
    number: int = 0
    """Place of the source in the recipe's list, from 0."""
    read: int = 0
    """Rows of the source, good and bad."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Number of bad rows by kind."""
    rows: list[BadRow] = field(default_factory=list)
    """The bad rows, in the order of the source."""

    def sift(self, found: Iterable[Record | BadRow]) -> Iterator[Record]:
        """Yield the records, and keep the bad rows."""
        for each in found:
            self.read += 1
            if isinstance(each, BadRow):
                self.kinds[each.kind] += 1
                self.rows.append(each)
            else:
                yield each

    def check(self, most: float) -> None:
        """Raise BadInput when more than the share ``most`` of the rows is bad; names the first ten of each kind."""
        if not self.rows or (len(self.rows) <= most * self.read and len(self.rows) < self.read):
            return
        problems = [row.problem() for row in self.first()]
        needed = len(self.rows) / self.read
        if needed < 1:
            what = f"{self.summary()}; max_bad_share is {most:g}"
            fix = f"Mend them, or leave them out: {{path: {self.path}, max_bad_share: {_rounded_up(needed):g}}}"
            problems.append(Problem(where=self.path, what=what, fix=fix))
        raise BadInput(problems)

    def first(self) -> Sequence[BadRow]:
        """Return the first ten rows of each kind, in the order of the source."""
        named: Counter[str] = Counter()
        shown = []
        for row in self.rows:
            named[row.kind] += 1
            if named[row.kind] <= MOST_NAMED:
                shown.append(row)
        return shown

    def summary(self) -> str:
        """Return the counts in words: all, and by kind."""
        kinds = ", ".join(f"{count:,} by {kind}" for kind, count in self.kinds.most_common())
        return f"{len(self.rows):,} of {self.read:,} rows cannot be read ({kinds})"


def _rounded_up(share: float) -> float:
    """Return the least share of two digits that allows ``share``."""
    rounded = float(f"{share:.1e}")
    return rounded if rounded >= share else float(f"{share * 1.1:.1e}")
