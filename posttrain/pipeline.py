"""The pipeline: every stage is trained, published, judged and recorded; its verdict decides the next one's parent.

recipe ─► plan ─► records ─► stage ─► artifact ─► scorecard ─► verdict ─► ledger ─► report
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from posttrain import ledger, report
from posttrain.artifact import Artifact, ModelSource
from posttrain.config.schema import Half, OnFail
from posttrain.data.reading import remote
from posttrain.disk import explain_error, require_writable
from posttrain.errors import DiskFailed, Interrupted, PluginFailed, interruption
from posttrain.gate.procedure import ERRORS, STATES, WARNED, policy_for, state_of, verdict_error
from posttrain.gate.spec import Verdict
from posttrain.host.plugins import Host
from posttrain.model.base import resolve_base
from posttrain.plan import Plan
from posttrain.report.policy import advise
from posttrain.run.directory import RunDirectory, open_run
from posttrain.run.display import Display
from posttrain.run.interrupts import Interrupts
from posttrain.run.job import Job, records_digest
from posttrain.run.judge import check_gates, judge_stage
from posttrain.run.log import logged
from posttrain.run.name import directory_of
from posttrain.run.published import withdraw
from posttrain.run.readings import read_all
from posttrain.run.replay import choose_share
from posttrain.run.spending import within_cap
from posttrain.run.start import read_base, read_start
from posttrain.run.train import train

ENDINGS = {error: STATES[state] for state, error in ERRORS.items()} | dict.fromkeys(
    (Interrupted, DiskFailed), "interrupted"
)
"""State of a run, by the error at its end."""


def run(plan: Plan, host: Host, display: Display) -> RunDirectory:
    """Run or resume a plan. Raises GateFailed or GateUndecided when a gate stops it; everything published stays."""
    require_writable(plan.output_root)
    ledger.check(plan.output_root)
    interrupts = Interrupts(display.announce)
    with interrupts.installed():
        start = read_start(plan)
        undated = resolve_base(plan.model, None if start is None else start.artifact.pins, dated=False)
        parent, unpromoted = (
            (undated, read_base(plan))
            if start is None
            else (_check_start(start.artifact, undated, plan.model.dtype.value), start.unpromoted)
        )
        if far := sorted({name for step in plan.steps for name in remote((*step.sources, *step.eval_sources))}):
            display.announce(f"data from afar, copied unless it is here: {', '.join(far)}")
        digests = {step.name: records_digest(step) for step in plan.steps}
        path = directory_of(plan, parent, digests)
        capped = within_cap(plan, path, interrupts, display.announce)
        with (
            open_run(path, plan) as directory, logged(path, directory.state.command, display), capped, host.restored(),
            _closing(directory, plan, host, display, interrupts),
        ):  # fmt: skip
            host.start_run(plan, path)
            display.announce(("posttrain", "bold"), f" {plan.recipe} ─► {path}")
            for line in plan.shadows:
                display.announce(line)
            # The day has no part in the run's name: on another day the same command resumes this run, with its day.
            base = directory.pin_day(undated)
            parent = base if start is None else start.artifact.source(base)
            if base.template_variables:
                display.announce(f"variables of the chat template: {dict(base.template_variables)}")
            jobs = [
                Job(
                    plan=plan, step=step, host=host, run=directory, base=base, data_digest=digests[step.name],
                    display=display, interrupts=interrupts,
                )
                for step in plan.steps
            ]  # fmt: skip
            # All data is read and all gates are checked before the first stage trains: a bad row or a
            # broken gate, even the last stage's, ends the run now instead of after hours of training.
            records = read_all(jobs)
            check_gates(jobs)
            for number, job in enumerate(jobs):
                _forget_former(jobs[number:], parent)
                with job.timed():
                    # pop: frees the records of trained stages
                    job, found = choose_share(job, parent, records.pop(job.name), unpromoted)
                    artifact = train(job, parent, found)
                    verdict = judge_stage(job, parent, artifact, unpromoted)
                _record(job, artifact, verdict)
                try:
                    parent, unpromoted = _next_parent(job, parent, artifact, verdict)
                except tuple(ERRORS.values()):
                    _withdraw(jobs[number + 1 :], job.name, verdict)
                    raise
    return directory


def _check_start(start: Artifact, base: ModelSource, dtype: str) -> ModelSource:
    """Return the source of the artifact under the first stage. Raises ArtifactDamaged when its weights are unsound."""
    from posttrain.model.reloading import check_start

    source = start.source(base)
    check_start(start.path, base, dtype)  # its manifest may have been written again
    return source


def _record(job: Job, artifact: Artifact, verdict: Verdict) -> None:
    """Write a verdict into the run, the ledger and the trackers."""
    entry = job.entry
    entry.state, entry.verdict, entry.unpromoted = state_of(verdict), verdict.state, list(verdict.unpromoted)
    job.run.save()
    judgement = ledger.Judgement(
        run=job.run.path.name, recipe=job.plan.recipe, stage=job.name, lineage=artifact.manifest.lineage,
        base=artifact.manifest.base, parent=artifact.manifest.parent_digest, artifact=artifact.digest, verdict=verdict,
        tried=job.step.gate.chosen_from,
    )  # fmt: skip
    ledger.record(job.plan.output_root, job.folder, judgement)
    if verdict.state == "pass":
        shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
    job.host.hook.stage_finished(stage=job.name, artifact=artifact, verdict=verdict)
    job.display.line(job.name, verdict.state.upper(), verdict.reason)
    for line in advise(artifact.manifest.metrics, verdict):
        job.display.line(job.name, "gate", f"warning: {line}")
    if verdict.unpromoted:
        job.display.line(job.name, "gate", f"not promoted: it stands on {'; '.join(verdict.unpromoted)}")
    report.write(job.run.path)


def _next_parent(
    job: Job, parent: ModelSource, artifact: Artifact, verdict: Verdict
) -> tuple[ModelSource, tuple[str, ...]]:
    """Return the model under the next stage, and what no gate passed in it and below it.

    It is the artifact that passed, or the one of the gate's policy for any other verdict.
    """
    policy = policy_for(job.step.gate, verdict.state)
    if policy is None:
        return artifact.source(job.base), verdict.unpromoted
    if policy is OnFail.warn:
        chosen_later = verdict.state == "undecided" and job.step.gate.half is Half.choosing
        by = "to be chosen from" if chosen_later else f"by on_{verdict.state}: warn"
        job.display.line(job.name, "gate", f"warning: not promoted, and {by} the run continues from it")
        return artifact.source(job.base), (*verdict.unpromoted, f"{artifact.named}: {verdict.state}")
    if policy is OnFail.rollback and (parent.name != "base" or job.is_last):
        job.display.line(job.name, "gate", f"rolled back: the pipeline continues from {parent.name}")
        return parent, verdict.unpromoted
    raise verdict_error(job.name, verdict)


def _forget_former(jobs: Sequence[Job], parent: ModelSource) -> None:
    """Make stages pending again when the first of them stood on another parent, under another policy of a gate."""
    if jobs[0].entry.parent_digest in (None, parent.digest):
        return
    for job in jobs:
        job.entry.reset()
    jobs[0].run.save()


def _withdraw(jobs: Sequence[Job], stopped: str, verdict: Verdict) -> None:
    """Set aside what another policy had built after the stage at which this run stops."""
    for job in jobs:
        withdraw(job, f"the run stops at {stopped}, a {verdict.state}")


@contextlib.contextmanager
def _closing(
    directory: RunDirectory, plan: Plan, host: Host, display: Display, interrupts: Interrupts
) -> Iterator[None]:
    """Close the run, whatever ends it: write its state to run.json, write the report, close the trackers."""
    state = "failed"
    try:
        yield
        state = _complete(directory, plan)
    except tuple(ENDINGS) as error:
        state = ENDINGS[type(error)]
        raise
    except OSError as error:
        if (known := explain_error(error, directory.path)) is None:
            raise
        state = ENDINGS.get(type(known), state)
        raise known from error
    except Exception as error:
        if (stop := interruption(error, heard=interrupts.heard)) is None:
            raise
        state = ENDINGS[Interrupted]
        raise stop from error
    finally:
        directory.state.end(state)
        _write_end(directory, display)
        _finish_plugins(host, directory.path, state)


def _complete(directory: RunDirectory, plan: Plan) -> str:
    """Return the state of a run after its last stage."""
    verdicts = [(step.gate, directory.state.stage(step.name).verdict) for step in plan.steps]
    went_on = any(policy_for(gate, verdict) is OnFail.warn for gate, verdict in verdicts if verdict is not None)
    return WARNED if went_on else "done"


def _finish_plugins(host: Host, directory: Path, state: str) -> None:
    """Call ``run_finished`` of every plugin, whatever the others do; raise the first failure of a run that is done."""
    # One call per plugin: in a common one the first to raise would keep the others' trackers open. After an error the
    # plugins' failures stay silent, because the user needs the error that ended the run.
    failures: list[PluginFailed] = []
    for plugin in host.manager.get_plugins():
        others = [other for other in host.manager.get_plugins() if other is not plugin]
        try:
            host.manager.subset_hook_caller("run_finished", others)(directory=directory, state=state)
        except PluginFailed as failure:
            failures.append(failure)
    if failures and state in ("done", WARNED):
        raise failures[0]


def _write_end(directory: RunDirectory, display: Display) -> None:
    """Write the end of the run, as far as the disk permits, and show its report."""
    try:
        directory.save()
        report.write(directory.path)
    except OSError as error:
        display.announce(f"the end of the run could not be recorded: {error}")
    report.show(directory.path)
