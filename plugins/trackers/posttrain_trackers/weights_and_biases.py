"""Weights & Biases. Tracking can never fail a run: the first error switches the tracker off."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain import hookimpl

if TYPE_CHECKING:
    from posttrain import Artifact, Verdict

INIT_SECONDS = 15
"""Seconds that the service may take to answer at the start."""


@dataclass(kw_only=True)
class WandbSettings:
    """Settings of Weights & Biases."""

    project: str = "posttrain"
    """Project at the tracking service."""
    entity: str | None = None
    """Team or user at the tracking service."""


class WandbTracker:
    """One W&B run for one run of posttrain; steps are logged under ``<stage>/<metric>``."""

    def __init__(self, settings: WandbSettings, directory: Path, config: Mapping[str, Any]) -> None:
        self._settings = settings
        self._directory = directory
        self._config = config
        self._run: Any = None
        self._broken = False

    def _try(self, action: Callable[[], None]) -> None:
        """Start W&B at the first call, and act; print the first error and do nothing from then on."""
        if self._broken:
            return
        numbers = random.getstate()
        try:
            if self._run is None:
                self._run = self._start()
            action()
        except Exception as error:  # training continues, whatever the service or its client raises
            self._broken = True
            reason = f"{type(error).__name__}: {error}"
            print(f"wandb is off for the rest of this run: {reason}", file=sys.stderr)
        finally:
            random.setstate(numbers)  # the client may draw; a plugin must not

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
        self._try(lambda: self._run.log({f"{stage}/{key}": value for key, value in metrics.items()}))

    @hookimpl
    def stage_finished(self, stage: str, artifact: Artifact, verdict: Verdict) -> None:
        """Log the verdict and every lift."""
        lifts = {f"{stage}/lift/{task.task}/{task.against}": task.lift for task in verdict.tasks}

        def log() -> None:
            self._run.log(lifts)
            self._run.summary[f"{stage}/verdict"] = verdict.state
            self._run.summary[f"{stage}/artifact"] = artifact.digest

        self._try(log)

    @hookimpl
    def run_finished(self, directory: Path, state: str) -> None:
        """Close the W&B run."""
        if self._run is not None:
            self._try(lambda: self._run.finish(exit_code=0 if state == "done" else 1))
