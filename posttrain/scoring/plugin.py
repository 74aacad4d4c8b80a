"""Scoring as a plugin: the tasks of a gate checked, then asked by lm-eval. Light: heavy imports wait for the calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.hookspecs import hookimpl

if TYPE_CHECKING:
    from posttrain.errors import Problem
    from posttrain.gate.spec import GateProgress, GateRequest, Scorecard
    from posttrain.plan import Plan, Step


@hookimpl
def register_eval_tasks() -> Sequence[Path]:
    """Register the tasks on your own files: questions, responses, preferences."""
    return [Path(__file__).parent / "tasks"]


@hookimpl
def check_plan(plan: Plan) -> Sequence[Problem]:
    """Report problems in the task files of all gates, and a missing backend."""
    from posttrain.scoring.checks import check_backend, check_tasks

    return [
        replace(problem, where=f"{step.name}.gate.{problem.where}")
        for step in plan.steps
        if step.gate.enabled
        for problem in (*check_backend(step.gate), *check_tasks(step.tasks))
    ]


@hookimpl
def check_gate(step: Step) -> Sequence[Problem]:
    """Load the tasks as scoring will, and score invented answers: nothing may be missing after the training."""
    from posttrain.errors import BadInput
    from posttrain.scoring.harness.documents import empty_halves
    from posttrain.scoring.harness.rehearsal import rehearse
    from posttrain.scoring.harness.tasks import preflight

    if not step.gate.enabled:
        return []
    try:
        rehearse(step.tasks, preflight(step.tasks))
        searched = step.replay is not None and step.replay.auto is not None
        found = [*empty_halves(step.gate, step.tasks)] if searched else []
    except BadInput as error:
        found = error.problems
    return [replace(problem, where=f"{step.name}.gate.{problem.where}") for problem in found]


@hookimpl
def evaluate_artifact(request: GateRequest, progress: GateProgress) -> Scorecard:
    """Score every system of the request with lm-eval, or from the cache."""
    from posttrain import environment

    with environment.importing():
        from posttrain.model.device import default_device
        from posttrain.model.loading import load_model, load_tokenizer
        from posttrain.scoring.evaluate import evaluate
        from posttrain.scoring.systems import Loading

    return evaluate(request, progress, Loading(load_model, load_tokenizer, default_device().type))
