"""A check that keeps some models out of bfloat16."""

from collections.abc import Sequence

from posttrain import Dtype, Plan, Problem, hookimpl

UNSTABLE = ("EleutherAI/pythia-70m", "google/gemma-2-2b")


@hookimpl
def check_plan(plan: Plan) -> Sequence[Problem]:
    """Reject bfloat16 for the models of the list."""
    if plan.model.path not in UNSTABLE or plan.model.dtype is not Dtype.bfloat16:
        return []
    return [Problem(where="model.dtype", what=f"{plan.model.path} diverges in bfloat16", fix="model.dtype=float32")]
