"""Trackers, each chosen by ``tracker=NAME``. Importing this imports no tracking service's client.

A new tracker is a class and its settings in ``services.py``, a row of TRACKERS, and ``conf/tracker/NAME.yaml``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain import Problem, Settings, hookimpl
from posttrain_trackers.services import (
    CometSettings,
    MLflowSettings,
    TensorBoardSettings,
    TrackioSettings,
    WandbSettings,
)

if TYPE_CHECKING:
    from posttrain import Plan

POSTTRAIN_API = 1


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """A tracking service."""

    summary: str
    settings: type
    """Dataclass of the settings below ``tracker``."""
    clients: tuple[str, ...]
    """Modules of the service's client, installed by the extra of ``posttrain`` with the tracker's name."""
    service: str
    """Class of ``posttrain_trackers.services``; made of settings, directory and resolved recipe."""


TRACKERS = {
    "wandb": Tracker(
        summary="log steps, lifts and verdicts to Weights & Biases",
        settings=WandbSettings, clients=("wandb",), service="Wandb",
    ),
    "tensorboard": Tracker(
        summary="log steps, lifts and verdicts for TensorBoard",
        settings=TensorBoardSettings, clients=("tensorboardX",), service="TensorBoard",
    ),
    "mlflow": Tracker(
        summary="log steps, lifts and verdicts to MLflow",
        settings=MLflowSettings, clients=("mlflow", "sqlalchemy", "alembic"), service="MLflow",
    ),
    "trackio": Tracker(
        summary="log steps, lifts and verdicts to trackio",
        settings=TrackioSettings, clients=("trackio",), service="Trackio",
    ),
    "comet": Tracker(
        summary="log steps, lifts and verdicts to Comet",
        settings=CometSettings, clients=("comet_ml",), service="Comet",
    ),
}  # fmt: skip


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
    missing = [name for name in chosen.clients if find_spec(name) is None] if chosen else []
    if not missing:
        return []
    what = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
    return [Problem(where="tracker", what=what, fix=f"pip install 'posttrain[{plan.tracker}]'")]


@hookimpl
def run_started(plan: Plan, directory: Path) -> object | None:
    """Return the hooks of the chosen tracker, or None when it is not one of these."""
    if (chosen := TRACKERS.get(plan.tracker)) is None:
        return None
    from posttrain_trackers import services
    from posttrain_trackers.tracking import Tracking

    start = getattr(services, chosen.service)
    return Tracking(plan.tracker, lambda: start(plan.settings[plan.tracker], directory, plan.resolved))
