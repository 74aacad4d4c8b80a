"""Search for the share of replayed tokens at which a stage's guards hold: one half of the gate's documents chooses it.

    stages/<name>/attempts/<fingerprint>/    verdict and scores of an attempt, on the documents that choose
    stages/<name>/artifact                   the chosen attempt, judged once by the other half

An attempt that was judged before is confirmed by its scores, so that a killed search resumes.
"""

from __future__ import annotations

from dataclasses import replace

from posttrain.artifact import ModelSource
from posttrain.config.schema import Half, Role, Sequential
from posttrain.errors import reject
from posttrain.gate.spec import Verdict
from posttrain.run.directory import Attempt
from posttrain.run.job import Job, records_digest
from posttrain.run.judge import judge_stage, judged_before
from posttrain.run.train import Records, fingerprint_of, train

FOLDER = "attempts"


def choose_share(
    job: Job, parent: ModelSource, records: Records, unpromoted: tuple[str, ...] = ()
) -> tuple[Job, Records]:
    """Return the stage with the first share at which its guards hold, else with the last one, and its records.

    A stage without a search is returned as it is. Every attempt is trained, published and kept; the gate of the
    returned one asks the documents that chose nothing.
    """
    replay = job.step.replay
    if replay is None or replay.auto is None:
        return job, records
    shares = replay.auto.shares()
    attempts = [_at_share(job, share) for share in shares]
    tried: list[Attempt] = []
    for number, (share, attempt) in enumerate(zip(shares, attempts, strict=True), start=1):
        given = records.with_share(len(job.step.own_sources), share)
        verdict = _judge(attempt, parent, given, unpromoted)
        tried.append(_outcome(job.name, share, verdict))
        job.entry.attempts = list(tried)
        job.run.save()
        job.display.line(job.name, "replay", f"attempt {number} of {len(shares)} at most, {tried[-1].line()}")
        if tried[-1].held:
            break
    else:
        job.display.line(job.name, "replay", f"no share up to {shares[-1]:.1%} holds the guards: the last is judged")
    return _judged_by_others(attempts[len(tried) - 1], job, len(tried)), given


def _at_share(job: Job, share: float) -> Job:
    """Return the stage at one share, with the gate that chooses; every document of that half counts at once."""
    step = job.step.replaying(share)
    gate = replace(job.step.gate, half=Half.choosing, sequential=Sequential.none)
    step = replace(step, config=replace(step.config, gate=gate))
    return replace(job, step=step, data_digest=records_digest(step))


def _judged_by_others(attempt: Job, job: Job, tried: int) -> Job:
    gate = replace(job.step.gate, half=Half.judging, chosen_from=tried)
    return replace(attempt, step=replace(attempt.step, config=replace(attempt.step.config, gate=gate)))


def _judge(attempt: Job, parent: ModelSource, records: Records, unpromoted: tuple[str, ...]) -> Verdict:
    """Return the verdict of the choosing documents about an attempt, which is trained unless it was judged before."""
    folder = attempt.folder / FOLDER / fingerprint_of(attempt, parent, records)[:12]
    known = judged_before(attempt, parent, folder, unpromoted)
    if known is not None:
        return known
    artifact = train(attempt, parent, records)
    folder.mkdir(parents=True, exist_ok=True)
    return judge_stage(attempt, parent, artifact, unpromoted, folder)


def _outcome(stage: str, share: float, verdict: Verdict) -> Attempt:
    guards = [task for task in verdict.tasks if task.role == Role.guard.value]
    if empty := [task.task for task in guards if not task.n]:
        what = f"none of its documents is of the half that chooses, so no share can be found by it: {', '.join(empty)}"
        reject(f"{stage}.gate.tasks", what, "Give it more documents, or give replay.share")
    lost = [f"{task.task} against {task.against}: {task.reason}" for task in guards if task.state != "pass"]
    return Attempt(share=share, held=bool(guards) and not lost, reason="; ".join(lost))
