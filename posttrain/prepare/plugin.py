"""The core's filters of rows: its quality rules, registered as a plugin's are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.config.preparation import LANGUAGE, RULES
from posttrain.hookspecs import hookimpl

if TYPE_CHECKING:
    from posttrain.prepare.filters import Filter, Finding
    from posttrain.prepare.rows import Row

VERSION = "3"
"""Version of the quality rules: another one with every change of what they find, so that rows are prepared again."""


@dataclass(frozen=True, slots=True)
class QualityRule:
    """A quality rule by its name; its code is imported for the first row, because lists of filters have to be quick."""

    name: str
    version: str = VERSION

    def judge(self, rows: Sequence[Row]) -> Sequence[Finding | None]:
        """Return the finding or None for each row."""
        from posttrain.prepare.rules import QUALITY

        return QUALITY[self.name].judge(rows)


@hookimpl
def register_filters() -> Sequence[Filter]:
    """Register the quality rules."""
    return [QualityRule(name) for name in RULES if name != LANGUAGE]
