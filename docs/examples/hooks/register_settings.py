"""The setting ``budget.stages``: a limit on every run of a team."""

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain import Plan, Problem, Settings, hookimpl, number


@dataclass(kw_only=True)
class Budget:
    """Limits of a run."""

    stages: int = number(3, least=1)
    """Stages that a run may have."""


@hookimpl
def register_settings() -> Sequence[Settings]:
    """Return the settings under ``budget``."""
    return [Settings(name="budget", summary="limits of a run", config=Budget)]


@hookimpl
def check_plan(plan: Plan) -> Sequence[Problem]:
    """Reject a plan with more stages than the budget allows."""
    count, allowed = len(plan.steps), plan.settings["budget"].stages
    if count <= allowed:
        return []
    return [Problem(where="stages", what=f"{count} stages, {allowed} allowed", fix=f"budget.stages={count}")]
