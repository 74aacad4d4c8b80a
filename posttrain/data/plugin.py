"""The records of a stage: what its data settings name, read, checked and mixed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from posttrain.errors import BadInput, Problem
from posttrain.hookspecs import hookimpl

if TYPE_CHECKING:
    from posttrain.data.records import Record
    from posttrain.plan import Plan, Step


@hookimpl
def check_plan(plan: Plan) -> Sequence[Problem]:
    """Files that do not exist, and shares that make no mix."""
    from posttrain.data.files import local_files

    problems: list[Problem] = []
    for step in plan.steps:
        problems += _share_problems(step)
        for setting, sources in (("data", step.sources), ("eval_data", step.eval_sources)):
            for source in sources:
                try:
                    local_files(source.path)
                except BadInput as error:
                    where = f"{step.name}.{setting}"
                    problems += [replace(problem, where=f"{where}: {problem.where}") for problem in error.problems]
    return problems


@hookimpl
def load_records(step: Step) -> Sequence[Record]:
    """Read every source of the step; raises BadInput naming file and line of what is wrong."""
    from posttrain.data.mixing import mix

    return mix(step.sources, step.stage.records, step.seed)


def _share_problems(step: Step) -> Iterator[Problem]:
    where = f"{step.name}.data"
    for source in step.eval_sources:
        if source.share is not None:
            what = f"share {source.share} of {source.path} means nothing: records of eval_data are measured as they are"
            yield Problem(where=f"{step.name}.eval_data", what=what, fix="Leave it out")
    shared = [source for source in step.sources if source.share is not None]
    for source in shared:
        if not 0 < (source.share or 0) < 1:
            yield Problem(where=where, what=f"share {source.share} of {source.path} is not between 0 and 1")
        if source.weight != 1:
            what = f"{source.path} has a share and a weight, which contradict each other"
            yield Problem(where=where, what=what, fix="Keep one: share is of the tokens, weight counts records")
    if shared and step.stage.records != "documents":
        what = f"share is of the tokens of a mix, but {step.stage.name} trains {step.stage.records}"
        yield Problem(where=where, what=what, fix="Use weight, which counts records")
    elif shared and len(shared) == len(step.sources):
        what = "every source has a share, so nothing says how large the mix is"
        yield Problem(where=where, what=what, fix="Leave share out of one source: all of its records are taken")
    elif (total := sum(source.share or 0 for source in shared)) >= 1:
        yield Problem(where=where, what=f"the shares sum to {total:g}, which leaves nothing to the other sources")
