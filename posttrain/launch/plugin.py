"""Rules of engines and launches, checked in the plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from posttrain.hookspecs import hookimpl

if TYPE_CHECKING:
    from posttrain.errors import Problem
    from posttrain.plan import Plan


@hookimpl
def check_plan(plan: Plan) -> Sequence[Problem]:
    """Report more processes than there are devices, an engine or a batch that does not fit them."""
    from posttrain.launch.shape import check

    return check(plan)
