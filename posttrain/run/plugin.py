"""The start of a run, checked in its plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from posttrain.config.on_policy import SamplingBackend
from posttrain.errors import BadInput
from posttrain.hookspecs import hookimpl

if TYPE_CHECKING:
    from posttrain.errors import Problem
    from posttrain.plan import Plan


@hookimpl
def check_plan(plan: Plan) -> Sequence[Problem]:
    """Report a ``start_from`` that no gate passed, and a vLLM that is not there to answer questions."""
    from posttrain.run.start import check_start

    return [*check_start(plan), *_missing_vllm(plan)]


def _missing_vllm(plan: Plan) -> Iterator[Problem]:
    for step in plan.steps:
        asked = [source.on_policy for source in step.sources if source.on_policy is not None]
        if any(each.backend is SamplingBackend.vllm for each in asked):
            from posttrain.model.vllm_process import find_command

            try:
                find_command(None, f"{step.name}.data.on_policy.backend")
            except BadInput as error:
                yield from error.problems
