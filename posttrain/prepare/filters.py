"""Filters: rules on rows, of posttrain and of plugins, asked in batches, one finding per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from posttrain.errors import PluginFailed, shown
from posttrain.prepare.rows import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A fault of one row."""

    evidence: str
    """The part of the row that shows it, or the reason in words."""
    marked: str = ""
    """The very words within ``evidence``, for the audit; empty where all of it shows the fault."""
    score: float | None = None
    """Strength of the finding, in the rule's own unit."""


@runtime_checkable
class Filter(Protocol):
    """A rule of a plugin; what happens to the rows it finds is the recipe's: ``prepare.rules.NAME``."""

    @property
    def name(self) -> str:
        """Name of the rule in recipes, ledger and report."""

    @property
    def version(self) -> str:
        """Version of its answers: another one prepares again."""

    def judge(self, rows: Sequence[Row]) -> Sequence[Finding | None]:
        """Return a finding or None for each row, in their order. It must not change the rows."""


def ask(judge: Filter, plugin: str, rows: Sequence[Row]) -> Sequence[Finding | None]:
    """Return a filter's findings about some rows. Raises PluginFailed naming the plugin for any other answer."""
    found = judge.judge(rows)
    where = f"plugin {plugin}, filter {judge.name}"
    if not isinstance(found, list | tuple):
        raise PluginFailed(f"{where}: judge answered {shown(found)}, not a list with one entry per row")
    if len(found) != len(rows):
        raise PluginFailed(f"{where}: judge answered {len(found):,} findings for {len(rows):,} rows, not one per row")
    strange = next((each for each in found if each is not None and not isinstance(each, Finding)), None)
    if strange is not None:
        raise PluginFailed(f"{where}: judge answered {shown(strange)} among others, not Finding or None")
    return found
