"""Stages that learn from preferences. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain import Stage, hookimpl
from posttrain_preference.methods import METHODS

POSTTRAIN_API = 1


@hookimpl
def register_stages() -> Sequence[Stage]:
    """Return a stage for every preference method."""
    return [
        Stage(
            name=method.name,
            summary=method.summary,
            config=method.settings,
            run="posttrain_preference.stage:run",
            parent="sft",
            records=method.records,
        )
        for method in METHODS.values()
    ]
