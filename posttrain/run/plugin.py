"""The start of a run, checked in its plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from posttrain.config.on_policy import SERVED, SamplingBackend
from posttrain.errors import BadInput, Problem
from posttrain.hookspecs import hookimpl

if TYPE_CHECKING:
    from posttrain.plan import Plan


@hookimpl
def check_plan(plan: Plan) -> Sequence[Problem]:
    """Report a ``start_from`` that no gate passed, sampled records of a wrong shape, and a vLLM that is not there."""
    from posttrain.run.start import check_start

    return [*check_start(plan), *_wrong_shapes(plan), *_missing_vllm(plan)]


def _wrong_shapes(plan: Plan) -> Iterator[Problem]:
    """Yield a problem for each on-policy source whose records are of another shape than its stage trains."""
    for step in plan.steps:
        shape = step.stage.records
        for keep in [source.on_policy.keep for source in step.sources if source.on_policy is not None]:
            if shape not in SERVED[keep]:
                what = f"keep={keep.value} makes records of {SERVED[keep][0]}; the stage trains {shape}"
                fix = ", ".join(f"{each.value}: {' or '.join(shapes)}" for each, shapes in SERVED.items())
                fix = f"The choices and their shapes: {fix}"
                yield Problem(where=f"{step.name}.data.on_policy.keep", what=what, fix=fix)


def _missing_vllm(plan: Plan) -> Iterator[Problem]:
    """Yield a problem for each stage that vLLM is to sample for, where there is none."""
    for step in plan.steps:
        asked = [source.on_policy for source in step.sources if source.on_policy is not None]
        if any(each.backend is SamplingBackend.vllm for each in asked):
            from posttrain.model.vllm_process import find_command

            try:
                find_command(None, f"{step.name}.data.on_policy.backend")
            except BadInput as error:
                yield from error.problems
