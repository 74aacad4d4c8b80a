"""The core's filters of rows: its quality rules, registered as a plugin's are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from posttrain.hookspecs import hookimpl

if TYPE_CHECKING:
    from posttrain.prepare.filters import Filter


@hookimpl
def register_filters() -> Sequence[Filter]:
    """Register the quality rules."""
    from posttrain.prepare.rules import QUALITY

    return list(QUALITY.values())
