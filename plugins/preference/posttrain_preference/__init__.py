"""Stages that learn from preferences, on top of TRL's trainers. Importing this imports neither torch nor TRL."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain import Stage, hookimpl
from posttrain_preference.config import DPOSettings

POSTTRAIN_API = 1


@hookimpl
def register_stages() -> Sequence[Stage]:
    """The stage ``dpo``."""
    return [
        Stage(
            name="dpo",
            summary="direct preference optimisation against a frozen copy of the SFT model (TRL)",
            config=DPOSettings,
            run="posttrain_preference.dpo:run",
            parent="sft",
            records="preferences",
        )
    ]
