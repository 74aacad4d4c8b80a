"""The start of a run, checked in its plan, and ``run_stage``: runs a stage here unless a plugin runs it elsewhere."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from posttrain.errors import PluginFailed
from posttrain.hookspecs import hookimpl

if TYPE_CHECKING:
    from posttrain.context import StageContext
    from posttrain.errors import Problem
    from posttrain.plan import Plan
    from posttrain.stage import Stage


@hookimpl
def check_plan(plan: Plan) -> Sequence[Problem]:
    """Report a ``start_from`` that no gate passed."""
    from posttrain.run.start import check_start

    return check_start(plan)


@hookimpl(trylast=True)
def run_stage(stage: Stage, context: StageContext) -> bool:
    """Import the stage's function and call it; raise PluginFailed when it returns without ``context.save``."""
    from posttrain.model.probe import PROBE

    module, _, name = stage.run.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PluginFailed(f"stage {stage.name!r} cannot be started: {stage.run}: {error}") from error
    function(context)
    if not (context.output / PROBE).exists():
        raise PluginFailed(f"stage {stage.name!r} ended without context.save(model): its output has no proof")
    return True
