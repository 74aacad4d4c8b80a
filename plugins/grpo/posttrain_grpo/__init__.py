"""The stages ``grpo`` and ``rft``: a policy learns from its own answers. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain import Stage, hookimpl
from posttrain_grpo.config import GRPOSettings, RFTSettings

POSTTRAIN_API = 1
KIND = "grpo"


@hookimpl
def register_stages() -> Sequence[Stage]:
    """Return the stages."""
    return [
        Stage(
            name=KIND,
            summary="group relative policy optimisation: sampled answers, scored by rewards",
            config=GRPOSettings,
            run="posttrain_grpo.stage:run",
            parent="sft",
            records="questions",
        ),
        Stage(
            name="rft",
            summary="rejection sampling: fine-tuning on the best of the parent's own answers",
            config=RFTSettings,
            run="posttrain_grpo.rejection:run",
            parent="sft",
            records="conversations",
        ),
    ]
