"""Trackers, each chosen by ``tracker=NAME``. Importing this imports no tracking service's client."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain import Problem, Settings, hookimpl
from posttrain_trackers.config import WANDB, WandbSettings

if TYPE_CHECKING:
    from posttrain import Plan

POSTTRAIN_API = 1


@hookimpl
def register_settings() -> Sequence[Settings]:
    """Return the settings of every tracker."""
    summary = "log steps, lifts and verdicts to Weights & Biases"
    return [Settings(name=WANDB, summary=summary, config=WandbSettings, group="tracker")]


@hookimpl
def register_config() -> Sequence[Path]:
    """Return the folder with the options of the group ``tracker``."""
    return [Path(__file__).parent]


@hookimpl
def check_plan(plan: Plan) -> Sequence[Problem]:
    """Report a chosen tracker whose client is not installed."""
    if plan.tracker == WANDB and find_spec("wandb") is None:
        return [Problem(where="tracker", what="wandb is not installed", fix="pip install 'posttrain[wandb]'")]
    return []


@hookimpl
def run_started(plan: Plan, directory: Path) -> object | None:
    """Return the chosen tracker, or None when it is not one of these."""
    if plan.tracker != WANDB:
        return None
    from posttrain_trackers.weights_and_biases import WandbTracker

    return WandbTracker(plan.settings[WANDB], directory, plan.resolved)
