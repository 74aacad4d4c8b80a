"""The stage ``grpo``: a policy learns from its own answers, by rewards. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain import Stage, hookimpl
from posttrain_grpo.config import GRPOSettings

POSTTRAIN_API = 1
KIND = "grpo"


@hookimpl
def register_stages() -> Sequence[Stage]:
    """Return the stage."""
    return [
        Stage(
            name=KIND,
            summary="group relative policy optimisation: sampled answers, scored by rewards",
            config=GRPOSettings,
            run="posttrain_grpo.stage:run",
            parent="sft",
            records="questions",
        )
    ]
