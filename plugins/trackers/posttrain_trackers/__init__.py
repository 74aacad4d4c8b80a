"""Trackers, each chosen by ``tracker=NAME``. Importing this imports no tracking service's client.

A new tracker is a module with its class and settings, an entry of TRACKERS, and ``conf/tracker/NAME.yaml``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain import Problem, Settings, hookimpl
from posttrain_trackers.weights_and_biases import WandbSettings

if TYPE_CHECKING:
    from posttrain import Plan

POSTTRAIN_API = 1


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """A tracking service."""

    summary: str
    settings: type
    """Dataclass of the settings below ``tracker``."""
    client: str
    """Package of the service's client, and the extra of ``posttrain`` with it."""
    start: str
    """``module:class`` of the object with the hooks of a run; made of settings, directory and resolved recipe."""


TRACKERS = {
    "wandb": Tracker(
        summary="log steps, lifts and verdicts to Weights & Biases",
        settings=WandbSettings,
        client="wandb",
        start="posttrain_trackers.weights_and_biases:WandbTracker",
    ),
}


@hookimpl
def register_settings() -> Sequence[Settings]:
    """Return the settings of every tracker."""
    return [
        Settings(name=name, summary=tracker.summary, config=tracker.settings, group="tracker")
        for name, tracker in TRACKERS.items()
    ]


@hookimpl
def register_config() -> Sequence[Path]:
    """Return the folder with the options of the group ``tracker``."""
    return [Path(__file__).parent]


@hookimpl
def check_plan(plan: Plan) -> Sequence[Problem]:
    """Report a chosen tracker whose client is not installed."""
    chosen = TRACKERS.get(plan.tracker)
    if chosen is not None and find_spec(chosen.client) is None:
        fix = f"pip install 'posttrain[{chosen.client}]'"
        return [Problem(where="tracker", what=f"{chosen.client} is not installed", fix=fix)]
    return []


@hookimpl
def run_started(plan: Plan, directory: Path) -> object | None:
    """Return the chosen tracker, or None when it is not one of these."""
    if (chosen := TRACKERS.get(plan.tracker)) is None:
        return None
    module, _, name = chosen.start.partition(":")
    tracker: object = getattr(import_module(module), name)(plan.settings[plan.tracker], directory, plan.resolved)
    return tracker
