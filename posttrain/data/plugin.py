"""The records of a stage: what its data settings name, read, checked and mixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from posttrain.errors import BadInput, Problem
from posttrain.hookspecs import hookimpl

if TYPE_CHECKING:
    from posttrain.data.records import Record
    from posttrain.plan import Plan, Step


@hookimpl
def check_plan(plan: Plan) -> Sequence[Problem]:
    """Files that do not exist."""
    from posttrain.data.files import local_files

    problems: list[Problem] = []
    for step in plan.steps:
        for source in step.sources:
            try:
                local_files(source.path)
            except BadInput as error:
                problems += [replace(problem, where=f"{step.name}.data: {problem.where}") for problem in error.problems]
    return problems


@hookimpl
def load_records(step: Step) -> Sequence[Record]:
    """Read every source of the step; raises BadInput naming file and line of what is wrong."""
    from posttrain.data.mixing import mix

    return mix(step.sources, step.stage.records, step.seed)
