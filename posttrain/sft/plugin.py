"""Registers supervised fine-tuning, through the same hook as every other stage."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.hookspecs import hookimpl
from posttrain.sft.config import SFTConfig
from posttrain.stage import Stage


@hookimpl
def register_stages() -> Sequence[Stage]:
    """The stage ``sft``."""
    return [
        Stage(
            name="sft",
            summary="supervised fine-tuning on the assistant turns of conversations, or on raw text",
            config=SFTConfig,
            run="posttrain.sft.stage:run",
            parent="base",
            records="documents",
        )
    ]
