"""The start of a run, checked in its plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from posttrain.hookspecs import hookimpl

if TYPE_CHECKING:
    from posttrain.errors import Problem
    from posttrain.plan import Plan


@hookimpl
def check_plan(plan: Plan) -> Sequence[Problem]:
    """Report a ``start_from`` that no gate passed."""
    from posttrain.run.start import check_start

    return check_start(plan)
