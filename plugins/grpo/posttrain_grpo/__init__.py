"""The stage ``grpo``: a policy learns from its own answers, by rewards. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from posttrain import Problem, Stage, hookimpl
from posttrain_grpo.config import GRPOSettings

if TYPE_CHECKING:
    from posttrain import Plan

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


@hookimpl
def check_plan(plan: Plan) -> Sequence[Problem]:
    """Reject several processes: a policy that writes and trains in each of them is not proven."""
    launch = plan.launch
    several = launch.kind.value != "none" and ((launch.processes or 2) > 1 or launch.nodes > 1)
    return [
        Problem(where=f"{step.name}", what="grpo trains in one process", fix="Set launch=none, or run it apart")
        for step in plan.steps
        if step.stage.name == KIND and several
    ]
