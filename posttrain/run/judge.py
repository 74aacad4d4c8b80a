"""From a published artifact to its verdict; a kept verdict about the same question is confirmed by its scores."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from posttrain.artifact import Artifact, ModelSource, read_manifest
from posttrain.errors import BadInput, Problem
from posttrain.gate.procedure import decide_candidate, score_systems
from posttrain.gate.spec import GateRequest, TrainedOn, Verdict
from posttrain.host.plugins import CORE_ORIGIN
from posttrain.launch.gate import gate_group
from posttrain.run.display import EvaluationProgress
from posttrain.run.job import Job
from posttrain.run.published import keep_evidence
from posttrain.run.verdict import SCORECARD, VERDICT, read_verdict, write_verdict


def check_gates(jobs: Sequence[Job]) -> None:
    """Load the tasks of every gate that has yet to judge, so that a gate that cannot work costs no training.

    Raises BadInput with every problem of every gate.
    """
    waiting = [job for job in jobs if not (job.folder / "verdict.json").exists()]
    problems = [problem for job in waiting for answer in job.host.hook.check_gate(step=job.step) for problem in answer]
    problems = problems or _check_documents([job for job in waiting if job.step.gate.enabled])
    if problems:
        raise BadInput(problems)


def _check_documents(jobs: Sequence[Job]) -> list[Problem]:
    """Return the problems of the gates' documents with the base's template and context, which every stage keeps."""
    if not jobs:
        return []
    from posttrain.model.loading import load_tokenizer
    from posttrain.scoring.harness.lengths import check_lengths
    from posttrain.scoring.harness.rehearsal import check_chats

    problems: list[Problem] = []
    load = cache(partial(load_tokenizer, jobs[0].base))
    for job in jobs:
        found = check_chats(job.step.tasks, load)
        if not found and CORE_ORIGIN in job.host.answerers("check_gate"):  # another's documents are known to it alone
            found = check_lengths(job.step.tasks, job.step.gate.seed, job.base, load)
        problems += [replace(problem, where=f"{job.name}.gate.{problem.where}") for problem in found]
    return problems


def judge_stage(
    job: Job,
    parent: ModelSource,
    artifact: Artifact,
    unpromoted: tuple[str, ...] = (),
    folder: Path | None = None,
) -> Verdict:
    """Judge an artifact by its gate. The published files are scored, not the trainer's memory.

    The verdict lies in ``folder``, by default that of the stage. A kept verdict about the same question is made again
    from its scores. Raises ArtifactDamaged when that gives another decision, or when the verdict or its scores are not
    what was written.
    """
    place = folder or job.folder
    request = _request(job, parent, artifact.source(job.base), unpromoted, place)
    request = replace(request, trained_on=_trained_on(job, artifact))
    key = job.gate_digest(request.systems, unpromoted)
    path = place / VERDICT
    if (existing := _confirm_kept(job, request, path, key)) is not None:
        return existing
    if folder is None:
        keep_evidence(job)
    # Before the new scores replace those that it rests on: a kill in between leaves no verdict, never a false one.
    path.unlink(missing_ok=True)
    progress = EvaluationProgress(job.display, job.name)
    try:
        scorecard, scored_by = score_systems(job.host, request, progress)
        verdict = decide_candidate(job.host, request, scorecard, scored_by)
    finally:
        progress.stop()
    write_verdict(path, verdict, [request], scorecard, key)
    return verdict


def judged_before(job: Job, parent: ModelSource, folder: Path, unpromoted: tuple[str, ...] = ()) -> Verdict | None:
    """Return the verdict in ``folder``, confirmed by its scores; None when ``judge_stage`` has to judge."""
    path = folder / VERDICT
    if not os.path.lexists(path):
        return None
    kept = read_verdict(path)
    candidate = replace(job.base, name=job.name, digest=kept.artifact)  # scores are matched by digest
    request = _request(job, parent, candidate, unpromoted, folder)
    request = replace(request, trained_on=kept.verdict.trained_on)
    return _confirm_kept(job, request, path, job.gate_digest(request.systems, unpromoted))


def _request(
    job: Job, parent: ModelSource, candidate: ModelSource, unpromoted: tuple[str, ...], folder: Path
) -> GateRequest:
    return GateRequest(
        stage=job.name,
        gate=job.step.gate,
        tasks=job.step.tasks,
        systems=_systems(job, parent, candidate),
        dtype=job.plan.model.dtype.value,
        cache=job.plan.output_root / "cache",
        scorecard=folder / SCORECARD,
        unpromoted=unpromoted,
        launch=gate_group(job.plan.launch),
    )


def _trained_on(job: Job, artifact: Artifact) -> tuple[TrainedOn, ...]:
    """Return the gate's tasks of which the rows of the stage, or of one below it in the run, hold documents."""
    names = [step.name for step in job.plan.steps]
    below = names[: names.index(job.name)]
    places = [each.artifact for each in job.run.state.stages if each.name in below and each.artifact]
    made = [artifact.manifest.metrics, *(read_manifest(job.run.path / place)["metrics"] for place in places)]
    found: dict[str, TrainedOn] = {}
    for name, counts in (item for metrics in made for item in _documents(metrics).items()):
        trained = counts.get("trained", 0)
        if name in job.step.tasks and trained > (found[name].trained if name in found else 0):
            found[name] = TrainedOn(task=name, documents=counts["documents"], trained=trained)
    return tuple(found[name] for name in job.step.tasks if name in found)


def _documents(metrics: Mapping[str, Any]) -> Mapping[str, Mapping[str, int]]:
    """Return the counts of a preparation by task; none where nothing was prepared."""
    found: Mapping[str, Mapping[str, int]] = (metrics.get("prepared") or {}).get("tasks", {})
    return found


def _systems(job: Job, parent: ModelSource, candidate: ModelSource) -> dict[str, ModelSource]:
    """Return base, candidate, and the parent where it is not the base."""
    systems = {"base": job.base, "candidate": candidate}
    if parent.digest != job.base.digest:
        systems["parent"] = parent
    return systems


def _confirm_kept(job: Job, request: GateRequest, path: Path, key: str) -> Verdict | None:
    """Return the verdict in ``path`` when its scores give it again; None for another question, or without scores."""
    if not os.path.lexists(path):
        return None
    kept = read_verdict(path)
    if kept.gate_digest != key or not os.path.lexists(request.scorecard):
        return None
    scorecard = kept.scorecard()
    derived = decide_candidate(job.host, request, scorecard, kept.verdict.scored_by)
    if derived == kept.verdict:
        return derived
    if kept.is_cores:
        raise kept.differs(derived)
    # The code of a plugin may change without its version. Its present answer to the same scores counts.
    job.display.line(job.name, "gate", f"judged again: {', '.join(derived.judged_by)} decides otherwise than it did")
    write_verdict(path, derived, [request], scorecard, key)
    return derived
