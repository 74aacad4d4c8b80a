"""The tracking services, each with its settings. All write into the folder of runs unless told where else to send to.

A client is imported when its run starts, and its own reports about its use and its errors are switched off.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INIT_SECONDS = 15
"""Seconds that Weights & Biases may take to answer at the start."""
MOST_AT_ONCE = 100
"""Parameters that MLflow takes in one call."""
MOST_CHARACTERS = 6000
"""Characters of a parameter that MLflow keeps."""


@dataclass(kw_only=True)
class WandbSettings:
    """Settings of Weights & Biases."""

    project: str = "posttrain"
    """Project at the tracking service."""
    entity: str | None = None
    """Team or user at the tracking service."""
    online: bool = False
    """Send to the service during the run; otherwise ``wandb sync`` sends the folder later. WANDB_MODE goes first."""


class Wandb:
    """One run of Weights & Biases, in ``wandb/`` of the run's folder."""

    def __init__(self, settings: WandbSettings, directory: Path, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if settings.online else "offline")
        self._run = wandb.init(
            project=settings.project, entity=settings.entity, dir=str(directory), name=directory.name,
            config=dict(config), mode=mode, settings=wandb.Settings(init_timeout=INIT_SECONDS, console="off"),
        )  # fmt: skip

    def log(self, values: Mapping[str, float], step: int | None) -> None:
        """Log figures; the client counts its own steps, which never go back."""
        self._run.log(dict(values))

    def summarize(self, values: Mapping[str, str]) -> None:
        """Write facts into the summary."""
        for key, value in values.items():
            self._run.summary[key] = value

    def close(self, *, done: bool) -> None:
        """End the run; one that is not done is marked as failed."""
        self._run.finish(exit_code=0 if done else 1)


@dataclass(kw_only=True)
class TensorBoardSettings:
    """Settings of TensorBoard, which has none: ``tensorboard --logdir runs`` finds every run."""


class TensorBoard:
    """One file of events, in ``tensorboard/`` of the run's folder."""

    def __init__(self, settings: TensorBoardSettings, directory: Path, config: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(logdir=str(directory / "tensorboard"))
        self._writer.add_text("recipe", _as_code(config))

    def log(self, values: Mapping[str, float], step: int | None) -> None:
        """Log figures at the stage's own step."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def summarize(self, values: Mapping[str, str]) -> None:
        """Write facts as texts."""
        for key, value in values.items():
            self._writer.add_text(key, value)

    def close(self, *, done: bool) -> None:
        """Write and close the file."""
        self._writer.close()


@dataclass(kw_only=True)
class MLflowSettings:
    """Settings of MLflow."""

    project: str = "posttrain"
    """Name of the experiment."""
    server: str | None = None
    """Address of a tracking server; null: ``mlflow/mlflow.db`` in the folder of runs. The password of a server is read
    from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""


class MLflow:
    """One run of MLflow, in one database for all runs, so that they are compared."""

    def __init__(self, settings: MLflowSettings, directory: Path, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        folder = directory.parent.absolute() / "mlflow"
        if settings.server is None:
            folder.mkdir(exist_ok=True)
        self._client = MlflowClient(tracking_uri=settings.server or f"sqlite:///{folder / 'mlflow.db'}")
        known = self._client.get_experiment_by_name(settings.project)
        place = None if settings.server else (folder / "artifacts").as_uri()
        experiment = known.experiment_id if known else self._client.create_experiment(settings.project, place)
        self._run = self._client.create_run(experiment, run_name=directory.name).info.run_id
        given = [Param(_allowed(key), value[:MOST_CHARACTERS]) for key, value in _flat(config)]
        for first in range(0, len(given), MOST_AT_ONCE):
            self._client.log_batch(self._run, params=given[first : first + MOST_AT_ONCE])

    def log(self, values: Mapping[str, float], step: int | None) -> None:
        """Log figures at the stage's own step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_allowed(key), float(value), now, step or 0) for key, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def summarize(self, values: Mapping[str, str]) -> None:
        """Write facts as tags."""
        for key, value in values.items():
            self._client.set_tag(self._run, _allowed(key), value)

    def close(self, *, done: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._run, "FINISHED" if done else "FAILED")


@dataclass(kw_only=True)
class TrackioSettings:
    """Settings of trackio."""

    project: str = "posttrain"
    """Project in the dashboard."""
    space: str | None = None
    """Hugging Face Space to send to, as OWNER/NAME; null: ``trackio/`` in the folder of runs, or TRACKIO_DIR."""


class Trackio:
    """One run of trackio, in one folder for all runs, so that they are compared."""

    def __init__(self, settings: TrackioSettings, directory: Path, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(directory.parent.absolute() / "trackio"))  # read at the import
        import trackio

        self._run = trackio.init(
            project=settings.project, name=directory.name, space_id=settings.space, config=dict(config), embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def log(self, values: Mapping[str, float], step: int | None) -> None:
        """Log figures at the stage's own step."""
        self._run.log(dict(values), step=step)

    def summarize(self, values: Mapping[str, str]) -> None:
        """Log facts as values, as the client has no summary."""
        self._run.log(dict(values))

    def close(self, *, done: bool) -> None:
        """Write what is left and end the run."""
        self._run.finish()


@dataclass(kw_only=True)
class CometSettings:
    """Settings of Comet."""

    project: str = "posttrain"
    """Project at the tracking service."""
    workspace: str | None = None
    """Workspace at the tracking service."""
    online: bool = False
    """Send to the service during the run, by the key in COMET_API_KEY; otherwise ``comet upload`` sends the archive."""


COMET_KEEPS_OUT = (
    "log_code", "log_graph", "auto_param_logging", "auto_metric_logging", "parse_args", "auto_output_logging",
    "log_env_details", "log_git_metadata", "log_git_patch",
)  # fmt: skip
"""What Comet would gather by itself: sources, the command's words, output, the machine, unpublished changes."""


class Comet:
    """One experiment of Comet, in an archive in ``comet/`` of the run's folder."""

    def __init__(self, settings: CometSettings, directory: Path, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("COMET_INTERNAL_REPORTING", "false")
        import logging

        import comet_ml

        logging.getLogger("comet_ml").setLevel(logging.ERROR)  # it asks to be imported before torch
        options: dict[str, Any] = {"project_name": settings.project, "workspace": settings.workspace}
        options |= dict.fromkeys(COMET_KEEPS_OUT, False) | {"display_summary_level": 0}
        if settings.online:
            self._experiment = comet_ml.Experiment(**options)
        else:
            self._experiment = comet_ml.OfflineExperiment(offline_directory=str(directory / "comet"), **options)
        self._experiment.set_name(directory.name)
        self._experiment.log_parameters(dict(_flat(config)))

    def log(self, values: Mapping[str, float], step: int | None) -> None:
        """Log figures at the stage's own step."""
        self._experiment.log_metrics(dict(values), step=step)

    def summarize(self, values: Mapping[str, str]) -> None:
        """Write facts beside the parameters."""
        self._experiment.log_others(dict(values))

    def close(self, *, done: bool) -> None:
        """Write the archive, or send what is left."""
        self._experiment.end()


def _as_code(config: Mapping[str, Any]) -> str:
    """Return a recipe as a block of JSON in Markdown."""
    return f"```json\n{json.dumps(config, indent=2, default=str)}\n```"


def _flat(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting of a recipe by its whole key."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", str(value)


def _allowed(key: str) -> str:
    """Return a name in the characters that MLflow takes."""
    return re.sub(r"[^\w\-./ ]", "_", key)
