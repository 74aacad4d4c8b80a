"""Weights & Biases, when the recipe asks for it. Tracking can never fail a run: its first error switches it off."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import Tracker
from posttrain.hookspecs import hookimpl

if TYPE_CHECKING:
    from posttrain.artifact import Artifact
    from posttrain.config.schema import TrackerConfig
    from posttrain.gate.spec import Verdict
    from posttrain.plan import Plan

INIT_SECONDS = 15
"""How long the tracking service may take to answer at the start."""


class WandbTracker:
    """One W&B run per posttrain run; steps are logged under ``<stage>/<metric>``."""

    def __init__(
        self, settings: TrackerConfig, directory: Path, config: Mapping[str, Any], note: Callable[[str], None]
    ) -> None:
        self._note = note
        self._settings = settings
        self._directory = directory
        self._config = config
        self._run: Any = None
        self._broken = False

    @classmethod
    def of(cls, plan: Plan, directory: Path, note: Callable[[str], None]) -> WandbTracker | None:
        """The tracker that a plan asks for; it tells ``note`` when it gives up."""
        return cls(plan.tracker, directory, plan.resolved, note) if plan.tracker.kind is Tracker.wandb else None

    def _guarded(self, action: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            if self._run is None:
                self._run = self._start()
            action()
        except Exception as error:  # whatever the service or its client does, training goes on
            self._broken = True
            self._note(f"wandb is off for the rest of this run: {type(error).__name__}: {error}")

    def _start(self) -> Any:
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        return wandb.init(
            project=self._settings.project,
            entity=self._settings.entity,
            dir=str(self._directory),
            name=self._directory.name,
            config=dict(self._config),
            settings=wandb.Settings(init_timeout=INIT_SECONDS, console="off"),
        )

    @hookimpl
    def step_logged(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Log one optimizer step."""
        self._guarded(lambda: self._run.log({f"{stage}/{key}": value for key, value in metrics.items()}))

    @hookimpl
    def stage_finished(self, stage: str, artifact: Artifact, verdict: Verdict) -> None:
        """Log the verdict and every lift."""
        lifts = {f"{stage}/lift/{task.task}/{task.against}": task.lift for task in verdict.tasks}

        def action() -> None:
            self._run.log(lifts)
            self._run.summary[f"{stage}/verdict"] = verdict.state
            self._run.summary[f"{stage}/artifact"] = artifact.digest

        self._guarded(action)

    @hookimpl
    def run_finished(self, directory: Path, state: str) -> None:
        """Close the W&B run."""
        if self._run is not None:
            self._guarded(lambda: self._run.finish(exit_code=0 if state == "done" else 1))
