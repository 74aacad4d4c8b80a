"""Rules of engines and launches, checked in the plan, and ``run_stage``: a stage here, or in several processes."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from posttrain import environment
from posttrain.errors import PluginFailed
from posttrain.hookspecs import hookimpl

if TYPE_CHECKING:
    from posttrain.context import StageContext
    from posttrain.errors import Problem
    from posttrain.plan import Plan
    from posttrain.stage import Stage


@hookimpl
def check_plan(plan: Plan) -> Sequence[Problem]:
    """Report more processes than there are devices, an engine or a batch that does not fit them."""
    from posttrain.launch.shape import check

    return check(plan)


@hookimpl(trylast=True)
def run_stage(stage: Stage, context: StageContext) -> bool:
    """Run the stage here, or in the processes of its launch, unless a plugin runs it elsewhere."""
    if context.launch is None:
        run_here(stage, context)
    else:
        context.launch(stage, context)
    return True


def run_here(stage: Stage, context: StageContext, *, writes: bool = True) -> None:
    """Import the stage's function and call it; raise PluginFailed when it returns without ``context.save``.

    Of several processes one ``writes``.
    """
    with environment.importing():
        from posttrain.model.probe import PROBE

    module, _, name = stage.run.partition(":")
    try:
        with environment.importing(others=True):
            function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PluginFailed(f"stage {stage.name!r} cannot be started: {stage.run}: {error}") from error
    function(context)
    if writes and not (context.output / PROBE).exists():
        raise PluginFailed(f"stage {stage.name!r} ended without context.save(model): its output has no proof")
