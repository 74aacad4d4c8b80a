"""A run as its reports show it: the content of its directory, and a note of each missing part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.artifact import MANIFEST
from posttrain.errors import ArtifactDamaged, BadInput, Problem
from posttrain.gate.spec import DocumentScore, Verdict
from posttrain.gate.verdict import read_verdict
from posttrain.run.directory import RunState, StageState, read_state
from posttrain.scoring.scorecard import read_questions, read_scorecard

LARGEST = 1e100
"""Values of this size or more are no measurements, and are not drawn."""
Metrics = Mapping[str, list[tuple[int, float]]]
"""Per metric of a stage, (step, value) in the order of logging."""


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """One stage of a run, with the files it has written so far."""

    entry: StageState
    """The stage's entry in run.json."""
    verdict: Verdict | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)
    error: str | None = None
    """The last line of a plugin's error, when one failed."""
    missing: tuple[str, ...] = ()
    """Parts not shown, each with the reason."""

    @property
    def name(self) -> str:
        """Name of the stage's node in the recipe."""
        return self.entry.name

    @property
    def figures(self) -> Mapping[str, Any]:
        """The stage's metrics in the manifest: token counts, final loss and the like."""
        found = self.manifest.get("metrics")
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A run: its directory, the content of run.json, and its stages."""

    path: Path
    run: RunState
    stages: tuple[StageReport, ...]

    def scores(self, stage: StageReport) -> list[DocumentScore]:
        """Read every score of a stage's gate; raise ArtifactDamaged or OSError when they cannot be read."""
        return read_scorecard(self.path / "stages" / stage.name / "scorecard.jsonl")

    def prompts(self, stage: StageReport) -> dict[tuple[str, int], str]:
        """Read the prompts of a stage's gate by task and document; raise as ``scores`` does."""
        return read_questions(self.path / "stages" / stage.name / "questions.jsonl")


def read_report(path: Path) -> RunReport:
    """Read the run in ``path``, finished or not; raise BadInput when run.json is missing or unreadable."""
    try:
        run = read_state(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = f"is not the state of a run: {error}"
        raise BadInput(Problem(where=str(path / "run.json"), what=what, fix="Run its recipe again")) from None
    metrics = _metrics(path / "metrics.jsonl")
    stages = tuple(_stage(path, stage, metrics.get(stage.name, {})) for stage in run.stages)
    return RunReport(path=path, run=run, stages=stages)


def _stage(path: Path, entry: StageState, metrics: Metrics) -> StageReport:
    folder = path / "stages" / entry.name
    missing = []
    verdict, manifest = None, {}
    try:
        verdict = read_verdict(folder / "verdict.json") if entry.verdict is not None else None
    except (OSError, ArtifactDamaged) as error:
        missing.append(f"the verdict: {explain_missing(error)}")
    try:
        manifest = _manifest(path / entry.artifact / MANIFEST) if entry.artifact is not None else {}
    except (OSError, ValueError) as error:
        missing.append(f"the manifest: {explain_missing(error)}")
    if not metrics and entry.digest is not None:
        missing.append("the curves: metrics.jsonl holds no step of this stage")
    return StageReport(
        entry=entry, verdict=verdict, manifest=manifest, metrics=metrics, error=_error(folder), missing=tuple(missing)
    )


def explain_missing(error: Exception) -> str:
    """Say in a few words why a file cannot be shown."""
    return f"there is no {Path(error.filename).name}" if isinstance(error, FileNotFoundError) else str(error)


def _manifest(path: Path) -> dict[str, Any]:
    """Read a manifest without verifying the artifact: a report shows a damaged one, too."""
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} holds no manifest")
    return manifest


def _error(folder: Path) -> str | None:
    """Return the last line of error.txt, which a failed plugin leaves."""
    try:
        lines = (folder / "error.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return None
    return lines[-1] if lines else None


def _metrics(path: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Read every finite number of metrics.jsonl by stage and metric; skip lines torn by a kill."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        row = _parse(line)
        for name, value in row.items():
            if name != "step" and _is_number(value):
                found.setdefault(str(row["stage"]), {}).setdefault(name, []).append((row["step"], float(value)))
    return found


def _parse(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    complete = isinstance(row, dict) and isinstance(row.get("stage"), str) and isinstance(row.get("step"), int)
    return row if complete else {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
