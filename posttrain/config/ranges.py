"""Ranges of numbers, declared at the field of the setting and checked in one place."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from math import inf
from typing import Any

RANGE = "range"
"""Key of a field's range in its metadata."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """The finite numbers allowed for a setting; None is no bound."""

    least: float | None
    above: float | None
    most: float | None
    below: float | None
    hint: str
    """End of the message about a value outside, such as ``; leave it out to train whole epochs``."""

    def fault(self, value: Any) -> str:
        """Return the fault of ``value``; empty when there is none."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"must be a number, not {value!r}"
        return "" if self._holds(value) else f"must be {self._words(value)}, not {value}{self.hint}"

    def _holds(self, value: float) -> bool:
        # each comparison asks for what is allowed, because every comparison with NaN is false
        low = (self.least is None or value >= self.least) and (self.above is None or value > self.above)
        high = (self.most is None or value <= self.most) and (self.below is None or value < self.below)
        return low and high and -inf < value < inf

    def _words(self, value: float) -> str:
        if self.least is not None and self.most is not None:
            return f"between {self.least} and {self.most}"
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        words = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
        if isinstance(value, int) or self.most is not None or self.below is not None:
            return words
        return f"a finite number of {words}" if self.least is not None else f"a finite number {words}"


def number(
    default: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    hint: str = "",
) -> Any:
    """Declare a setting with its range; a subclass with another default inherits the range.

    ``least`` and ``most`` are in the range, ``above`` and ``below`` are not. None is allowed where the type allows it.
    """
    allowed = Range(least=least, above=above, most=most, below=below, hint=hint)
    return field(default=default, metadata={RANGE: allowed})


def out_of_range(settings: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Return every number outside its range, as (setting, what is wrong); nested settings have dotted names."""
    found = []
    for name in (each.name for each in fields(settings)):
        value, allowed = getattr(settings, name), _range_of(type(settings), name)
        if is_dataclass(value):
            found += out_of_range(value, f"{prefix}{name}.")
        elif value is not None and allowed is not None and (fault := allowed.fault(value)):
            found.append((f"{prefix}{name}", fault))
    return found


def _range_of(kind: type, name: str) -> Range | None:
    """Return the range of a field from the nearest class with one: other defaults need not repeat it."""
    declared = (vars(each).get("__dataclass_fields__", {}).get(name) for each in kind.__mro__)
    ranges = (each.metadata.get(RANGE) for each in declared if each is not None)
    return next((allowed for allowed in ranges if allowed is not None), None)
