"""From a published artifact to a verdict, unless the run already holds it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from posttrain.artifact import Artifact, ModelSource
from posttrain.disk import replace_text
from posttrain.errors import BadInput, PluginFailed
from posttrain.gate.spec import GateRequest, Verdict
from posttrain.gate.verdict import read_verdict, verdict_json
from posttrain.run.display import EvaluationProgress
from posttrain.run.job import Job


def check_gates(jobs: Sequence[Job]) -> None:
    """Load the tasks of every gate that has yet to judge, so that a gate that cannot work costs no training.

    Raises BadInput with every problem of every gate.
    """
    waiting = [job for job in jobs if not (job.folder / "verdict.json").exists()]
    problems = [problem for job in waiting for answer in job.host.hook.check_gate(step=job.step) for problem in answer]
    if problems:
        raise BadInput(problems)


def judged(job: Job, parent: ModelSource, artifact: Artifact) -> Verdict:
    """The gate's verdict about an artifact, from scores of what was published, not of the trainer's memory."""
    systems = compared_systems(job, parent, artifact)
    key = job.gate_digest(systems)
    earlier = _earlier(job, key)
    if earlier is not None:
        return earlier
    request = GateRequest(
        stage=job.name,
        gate=job.step.gate,
        tasks=job.step.tasks,
        systems=systems,
        dtype=job.plan.model.dtype.value,
        cache=job.plan.output_root / "cache",
        scorecard=job.folder / "scorecard.jsonl",
    )
    progress = EvaluationProgress(job.display, job.name)
    try:
        scorecard = job.host.hook.evaluate_artifact(request=request, progress=progress)
        verdict = job.host.hook.judge_artifact(request=request, scorecard=scorecard)
    finally:
        progress.stop()
    if not isinstance(verdict, Verdict):
        raise PluginFailed(f"stage {job.name!r}: the gate answered {verdict!r}, which is not a verdict: never a pass")
    record = {**verdict_json(verdict), "gate_digest": key}
    replace_text(job.folder / "verdict.json", json.dumps(record, indent=2) + "\n")
    return verdict


def compared_systems(job: Job, parent: ModelSource, artifact: Artifact) -> dict[str, ModelSource]:
    """Base, candidate, and the parent where it is not the base."""
    systems = {"base": job.base, "candidate": artifact.source(job.base)}
    if parent.digest != job.base.digest:
        systems["parent"] = parent
    return systems


def _earlier(job: Job, key: str) -> Verdict | None:
    """The verdict in the stage's folder if it answers the same question."""
    path = job.folder / "verdict.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    return read_verdict(path) if record.get("gate_digest") == key else None
