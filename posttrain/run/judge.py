"""From a published artifact to its verdict; an existing verdict about the same question is reused."""

from __future__ import annotations

import json
from collections.abc import Sequence

from posttrain.artifact import Artifact, ModelSource
from posttrain.errors import BadInput
from posttrain.gate.procedure import ask_gate
from posttrain.gate.spec import GateRequest, Verdict
from posttrain.gate.verdict import read_verdict, write_verdict
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


def judge_stage(job: Job, parent: ModelSource, artifact: Artifact, unpromoted: tuple[str, ...] = ()) -> Verdict:
    """Judge an artifact by its gate. The published files are scored, not the trainer's memory."""
    systems = _systems(job, parent, artifact)
    key = job.gate_digest(systems, unpromoted)
    if (existing := _read_existing(job, key)) is not None:
        return existing
    request = GateRequest(
        stage=job.name,
        gate=job.step.gate,
        tasks=job.step.tasks,
        systems=systems,
        dtype=job.plan.model.dtype.value,
        cache=job.plan.output_root / "cache",
        scorecard=job.folder / "scorecard.jsonl",
        unpromoted=unpromoted,
    )
    progress = EvaluationProgress(job.display, job.name)
    try:
        _, verdict = ask_gate(job.host, request, progress)
    finally:
        progress.stop()
    write_verdict(job.folder / "verdict.json", verdict, gate_digest=key, artifact=artifact.digest)
    return verdict


def _systems(job: Job, parent: ModelSource, artifact: Artifact) -> dict[str, ModelSource]:
    """Return base, candidate, and the parent where it is not the base."""
    systems = {"base": job.base, "candidate": artifact.source(job.base)}
    if parent.digest != job.base.digest:
        systems["parent"] = parent
    return systems


def _read_existing(job: Job, key: str) -> Verdict | None:
    """Return the verdict in the stage's folder; None unless it is about the same gate and the same systems."""
    path = job.folder / "verdict.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    return read_verdict(path) if record.get("gate_digest") == key else None
