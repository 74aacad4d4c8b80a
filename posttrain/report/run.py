"""A run as its reports show it: the content of its directory, and a note of each missing part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from posttrain.artifact import read_manifest
from posttrain.config.schema import Half, OnFail
from posttrain.errors import ArtifactDamaged
from posttrain.gate.procedure import STATES, policy_for
from posttrain.gate.spec import DocumentScore, Verdict
from posttrain.prepare.ledger import Summary
from posttrain.quoting import redacted
from posttrain.run.directory import RunState, StageState, artifact_of, read_standing, true_ending, true_stage
from posttrain.run.verdict import VERDICT, KeptVerdict, confirmed_verdict
from posttrain.saved import as_kind, read_as, read_text
from posttrain.scoring.scorecard import Shown, read_questions, read_scorecard

LARGEST = 1e100
"""Values of this size or more are no measurements, and are not drawn."""
GATE = "gate.json"
"""Name of the record beside the scores of one gate."""
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
    went_on: str = ""
    """The policy by which the run went on after a verdict that was no pass; empty when it did not."""
    missing: tuple[str, ...] = ()
    """Parts not shown, each with the reason."""
    prepared: Summary | None = None
    """Counts of the preparation of its rows."""
    damage: str | None = None
    """Damage to the manifest, to the verdict or to its scores, with the file's path."""

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
    is_gate: bool = False
    """True for one gate about an existing adapter: its candidate is the only stage, its scores lie in ``path``."""

    def scores(self, stage: StageReport) -> list[DocumentScore]:
        """Read every score of a stage's gate; raise ArtifactDamaged or OSError when they cannot be read."""
        return read_scorecard(self._evidence(stage) / "scorecard.jsonl")

    def prompts(self, stage: StageReport) -> dict[tuple[str, int], Shown]:
        """Read the questions of a stage's gate by task and document; raise as ``scores`` does."""
        return read_questions(self._evidence(stage) / "questions.jsonl")

    def _evidence(self, stage: StageReport) -> Path:
        return self.path if self.is_gate else self.path / "stages" / stage.name


@dataclass(frozen=True, kw_only=True)
class GateRecord:
    """Content of gate.json, beside the scores of ``posttrain gate``."""

    gate: str
    """Name of the gate."""
    candidate: str
    """Name of the judged adapter or model."""
    command: list[str]
    """Words of the command."""
    versions: dict[str, str]
    """Versions of the packages that scored."""


def read_report(path: Path) -> RunReport:
    """Read the run in ``path``, finished or not, as its manifests and verdicts have it.

    What is damaged is left out and named in the stage. Raises ArtifactDamaged when run.json is damaged.
    """
    recorded = read_standing(path)
    metrics = _metrics(path / "metrics.jsonl")
    found = [_stage(path, entry, metrics.get(entry.name, {})) for entry in recorded.stages]
    state = true_ending(recorded.state, [kept for _, kept in found])
    run = replace(recorded, state=state, stages=[stage.entry for stage, _ in found])
    return RunReport(path=path, run=run, stages=tuple(stage for stage, _ in found))


def gate_record(report: RunReport) -> str:
    """Return the text of gate.json: everything that a gate's report shows and its verdict does not hold."""
    (stage,) = report.stages
    record = GateRecord(
        gate=report.run.recipe, candidate=stage.name, command=report.run.command, versions=stage.manifest["versions"]
    )
    return redacted(json.dumps(asdict(record), indent=2)) + "\n"


def gate_report(path: Path, record: GateRecord, verdict: Verdict) -> RunReport:
    """Return the report of a gate about an existing adapter, with its candidate as the only stage."""
    stage = StageState(name=record.candidate, kind="gate", state=STATES[verdict.state], verdict=verdict.state)
    ended = "done" if verdict.state == "pass" else stage.state
    return RunReport(
        path=path,
        run=RunState(recipe=record.gate, state=ended, stages=[stage], command=list(record.command)),
        stages=(StageReport(entry=stage, verdict=verdict, manifest={"versions": record.versions}),),
        is_gate=True,
    )


def read_gate(path: Path) -> RunReport:
    """Read the gate in the folder ``path``; its verdict is made again from its scores.

    Raises ArtifactDamaged when the verdict is not what its scores give, or a file is damaged.
    """
    return gate_report(path, read_as(GateRecord, path / GATE), confirmed_verdict(path / VERDICT).verdict)


def _stage(path: Path, entry: StageState, metrics: Metrics) -> tuple[StageReport, KeptVerdict | None]:
    missing: list[str] = []
    kept, manifest, claimed, damage = None, {}, entry.verdict, None
    try:
        artifact = artifact_of(path, entry)
        manifest = read_manifest(artifact) if artifact is not None else {}
        entry, kept = true_stage(path, entry)
    except ArtifactDamaged as error:
        damage = str(error)
        missing.append(damage)
        entry = replace(entry, state="damaged", verdict=None)
    if claimed is not None and kept is None and damage is None:
        missing.append("the verdict: there is none about this artifact, or its scores are missing")
    if not metrics and entry.digest is not None:
        missing.append("the curves: metrics.jsonl holds no step of this stage")
    verdict = None if kept is None else kept.verdict
    prepared = _prepared(manifest, missing)
    report = StageReport(
        entry=entry, verdict=verdict, manifest=manifest, metrics=metrics, error=_error(path / "stages" / entry.name),
        went_on="" if kept is None else _went_on(kept), missing=tuple(missing), prepared=prepared, damage=damage,
    )  # fmt: skip
    return report, kept


def _went_on(kept: KeptVerdict) -> str:
    """Return the policy by which a run went on after a verdict that was no pass."""
    gate, state = kept.basis.asked[0].gate, kept.verdict.state
    if policy_for(gate, state) is not OnFail.warn:
        return ""
    by = "to be chosen from" if gate.half is Half.choosing else f"by on_{state}: warn"
    return f"not promoted, and {by} the run went on from it"


def _prepared(manifest: Mapping[str, Any], missing: list[str]) -> Summary | None:
    metrics = manifest.get("metrics")
    found = metrics.get("prepared") if isinstance(metrics, dict) else None
    if found is None:
        return None
    try:
        return as_kind(Summary, found, "prepared")
    except ArtifactDamaged as error:
        missing.append(f"the rows of its data: {error}")
        return None


def explain_missing(error: Exception) -> str:
    """Say in a few words why a file cannot be shown."""
    return f"there is no {Path(error.filename).name}" if isinstance(error, FileNotFoundError) else str(error)


def _error(folder: Path) -> str | None:
    """Return the last line of error.txt, which a failed plugin leaves."""
    try:
        lines = read_text(folder / "error.txt", errors="replace").strip().splitlines()
    except (OSError, ArtifactDamaged):
        return None
    return lines[-1] if lines else None


def _metrics(path: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Read every finite number of metrics.jsonl by stage and metric; skip lines torn by a kill."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    try:
        text = read_text(path, errors="replace")
    except (FileNotFoundError, ArtifactDamaged):
        return found
    for line in text.split("\n"):
        row = _parse(line)
        for name, value in row.items():
            if name != "step" and _is_number(value):
                found.setdefault(str(row["stage"]), {}).setdefault(name, []).append((row["step"], float(value)))
    return found


def _parse(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    complete = isinstance(row, dict) and isinstance(row.get("stage"), str) and isinstance(row.get("step"), int)
    return row if complete else {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
