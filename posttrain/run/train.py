"""Training of one stage: from records to a published artifact, unless there is one already."""

from __future__ import annotations

import contextlib
import os
import traceback
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.artifact import Artifact, BaseWeights, Manifest, ModelSource, publish, quantization_of
from posttrain.config.schema import GateTask
from posttrain.context import StageContext
from posttrain.data.held import HeldRecords
from posttrain.data.mixing import describe_bad, describe_unread, weigh
from posttrain.data.records import Record
from posttrain.data.stored import JoinedRecords, StoredRecords, origins_of, take
from posttrain.digests import digest_of
from posttrain.disk import is_machine_error, naming
from posttrain.errors import ArtifactDamaged, BadInput, PluginFailed, PosttrainError, Problem
from posttrain.host import activity
from posttrain.host.activity import Activity
from posttrain.host.plugins import CORE_ORIGIN
from posttrain.host.process_state import ProcessState
from posttrain.launch.group import Group
from posttrain.launch.shape import engine_of, shape_of
from posttrain.plan import Step
from posttrain.prepare.kept import Kept
from posttrain.quoting import lines
from posttrain.run.display import TrainingProgress
from posttrain.run.job import Job, records_digest, shaping_settings, versions
from posttrain.run.on_policy import Asked, check_asked, read_asked, sample_records, scorer_of
from posttrain.run.prepared import Preparer, contributors, describe
from posttrain.run.published import ARTIFACT, DRAFT, find_published
from posttrain.saved import plain
from posttrain.tokens.lengths import measure_lengths


@dataclass(frozen=True, kw_only=True)
class Records:
    """Records of a stage, for training and for the eval loss."""

    trained: HeldRecords
    eval_records: HeldRecords
    warnings: Sequence[str] = ()
    """Lines about rows that cannot be read, and about keys that nothing reads."""
    asked: Sequence[Asked] = ()
    """Questions that the stage's parent answers, for more records, when the stage starts."""
    kept: str = ""
    """Digest of the rows that preparation kept; empty when it kept all."""
    prepared: Mapping[str, Any] | None = None
    """Counts of the preparation; None without one."""
    done: Kept | None = None
    """The preparation itself."""

    def with_share(self, number: int, share: float) -> Records:
        """Return the same records, those of source ``number`` with another share of the tokens."""

        def again() -> Sequence[Record]:
            found = self.trained.all()
            changed = {each: replace(each, share=share) for each in set(origins_of(found)) if each.number == number}
            if isinstance(found, StoredRecords):
                return found.with_origins(changed)
            return [replace(record, origin=changed.get(record.origin, record.origin)) for record in found]

        return replace(self, trained=HeldRecords.of(again))

    def release(self) -> None:
        """Let the records go until the stage trains, which reads them again."""
        self.trained.release()
        self.eval_records.release()


def train(job: Job, parent: ModelSource, records: Records) -> Artifact:
    """Train the stage and return its artifact, or the one already published by this or another run.

    Raises ArtifactDamaged when the published one does not match its manifest: it is never silently trained again.
    """
    fingerprint = fingerprint_of(job, parent, records)
    existing = find_published(job, parent, fingerprint)
    if existing is not None:
        if job.entry.digest != existing.digest:
            _describe(job, parent, existing)
        return existing
    job.entry.reset()
    job.entry.state, job.entry.parent_digest, job.entry.origin = "running", parent.digest, None
    job.run.save()
    with _named_failures(job):
        artifact = _run_stage(job, parent, records, fingerprint)
    _describe(job, parent, artifact)
    job.display.line(job.name, "train", f"published {artifact.digest[:12]}{_figures(artifact)}")
    return artifact


def fingerprint_of(job: Job, parent: ModelSource, records: Records) -> str:
    """Return the digest of everything the stage's result depends on.

    Rows that are yet to be sampled follow from the parent, and those that preparation keeps of them from its settings.
    """
    preparer = preparer_of(job)
    waits = records.asked and preparer.is_on
    return job.fingerprint(parent, digest_of([records.kept, preparer.conditions()]) if waits else records.kept)


def _describe(job: Job, parent: ModelSource, artifact: Artifact) -> None:
    """Write a new artifact into the stage's entry in run.json."""
    entry, metrics = job.entry, artifact.manifest.metrics
    entry.state, entry.verdict, entry.digest, entry.parent_digest = "trained", None, artifact.digest, parent.digest
    entry.artifact = str(artifact.path.relative_to(job.run.path))
    entry.tokens, entry.eval_loss = metrics.get("tokens"), metrics.get("eval_loss")
    entry.warnings = metrics.get("warnings", [])
    job.run.save()


def _figures(artifact: Artifact) -> str:
    texts = {
        "steps": "{:,} steps",
        "tokens": "{:,} tokens",
        "final_loss": "loss {:.3f}",
        "eval_loss": "eval loss {:.3f}",
        "eval_reward": "eval reward {:.3f}",
    }
    found = artifact.manifest.metrics
    return "".join(", " + text.format(found[key]) for key, text in texts.items() if found.get(key) is not None)


def _run_stage(job: Job, parent: ModelSource, records: Records, fingerprint: str) -> Artifact:
    from posttrain.model.checks import check_output
    from posttrain.model.reloading import check_reloaded

    # The stage writes into a draft, never into the artifact: a crash, a failed check or a full disk leaves nothing at
    # the published name, and a later attempt removes the draft.
    draft = job.folder / DRAFT
    draft.mkdir()
    # By fingerprint: a stage with other settings or data never resumes from this one's checkpoints.
    checkpoints = job.folder / "checkpoints" / fingerprint[:12]
    checkpoints.mkdir(parents=True, exist_ok=True)
    progress = TrainingProgress(job.display, job.name, job.run.path / "metrics.jsonl", job.host)
    sampled, figures = sample_records(job, parent, records.asked, progress)
    if sampled:
        records = _joined(job, records, sampled)
    context = StageContext(
        name=job.name, config=job.step.config, parent=parent,
        records=records.trained, eval_records=records.eval_records, seed=job.step.seed,
        dtype=job.plan.model.dtype.value, progress=progress,
        stop_requested=job.interrupts.requested, checkpoints=checkpoints, output=draft,
        engine=engine_of(job.plan, job.step), launch=_launch(job),
        kept=job.plan.output_root / "cache", data_workers=job.plan.data_workers,
        scorer=scorer_of(job), trail=job.folder / "answers", clusters=_clusters(job, records),
        gate_tasks=_followed(job),
        metrics=_known_metrics(records) | ({"on_policy": figures} if figures else {}),
    )  # fmt: skip
    before = ProcessState.now()
    try:
        with job.interrupts.deferred(), _known(job):
            done = job.host.hook.run_stage(stage=job.step.stage, context=context)
    finally:
        progress.stop()
        moved = os.getcwd() if os.getcwd() != before.directory else None
        before.restore()  # a stage may seed any generator; the next stage draws the same numbers all the same
    if moved is not None:
        raise PluginFailed(f"stage {job.name!r} of plugin {job.step.origin} changed the working directory to {moved}")
    if done is not True:
        raise PluginFailed(f"stage {job.name!r}: run_stage returned {done!r} instead of True")
    with _blamed(job):
        check_output(draft, parent)
        check_reloaded(draft, parent, context.dtype)
        return publish(draft, _manifest(job, parent, context, fingerprint), job.folder / ARTIFACT)


def _clusters(job: Job, records: Records) -> Mapping[str, int]:
    """Return the clusters of rows alike where the stage sets some of its rows aside; nothing else asks for them."""
    aside = getattr(job.step.config, "eval_share", 0)
    return {} if records.done is None or not aside else records.done.clusters()


def _followed(job: Job) -> Mapping[str, GateTask]:
    """Return the tasks of the gate where the stage samples answers, and its reward could leave the gate behind."""
    return job.step.tasks if job.step.gate.enabled and job.step.config.rewarding() is not None else {}


def _known_metrics(records: Records) -> dict[str, Any]:
    """Return the figures of a stage that are known before it trains."""
    warnings = {"warnings": [*records.warnings]} if records.warnings else {}
    return warnings | ({"prepared": records.prepared} if records.prepared is not None else {})


def _launch(job: Job) -> Group | None:
    """Return the processes for the stage; None when this one runs it."""
    if shape_of(job.plan.launch).world == 1:
        return None
    return Group(launch=job.plan.launch, folder=job.folder, origin=job.step.origin)


def _manifest(job: Job, parent: ModelSource, context: StageContext, fingerprint: str) -> Manifest:
    return Manifest(
        stage=job.name,
        kind=job.step.stage.name,
        plugin=job.step.origin,
        plugins=tuple(sorted({*job.host.shapers(), *contributors(job.host, job.step)})),
        **shaping_settings(job.plan),
        recipe=job.plan.recipe,
        base=BaseWeights(name=job.base.base, digest=job.base.model_digest),
        parent_digest=parent.digest,
        lineage=(*parent.lineage, job.step.stage.name),
        data_digest=job.data_digest,
        chat_template=parent.chat_template,
        added_tokens=job.base.added_tokens,
        template_variables=job.base.template_variables or None,
        fingerprint=fingerprint,
        config={key: value for key, value in plain(job.step.config).items() if key != "gate"},
        seed=job.step.seed,
        dtype=job.plan.model.dtype.value,
        quantization=quantization_of(context.output),
        versions=versions(),
        metrics=context.metrics,
    )


@contextlib.contextmanager
def _named_failures(job: Job) -> Iterator[None]:
    """Name the stage and its plugin in any exception of a plugin's stage, and keep the traceback in error.txt."""
    # A bare "KeyError: 'prompt'" blames posttrain; its user could not tell whom to ask. Three kinds pass unchanged: our
    # own errors already name a cause, a full disk is not the plugin's fault, a bug in the core keeps its traceback.
    try:
        yield
    except PosttrainError:
        raise
    except (Exception, SystemExit) as error:
        if is_machine_error(error):
            raise
        if job.step.origin == CORE_ORIGIN:
            raise
        log = job.folder / "error.txt"
        with naming(log):
            log.write_text(lines(traceback.format_exc()), encoding="utf-8")
        reason = f"{type(error).__name__}: {error}"
        raise PluginFailed(f"stage {job.name!r} of plugin {job.step.origin} failed: {reason} (see {log})") from error


@contextlib.contextmanager
def _blamed(job: Job) -> Iterator[None]:
    """Turn ArtifactDamaged about the output of a plugin's stage into PluginFailed: the plugin saved it."""
    try:
        yield
    except ArtifactDamaged as error:
        if job.step.origin == CORE_ORIGIN:
            raise
        raise PluginFailed(
            f"stage {job.name!r} of plugin {job.step.origin} saved an unsound artifact: {error}"
        ) from error


def _known(job: Job) -> contextlib.AbstractContextManager[None]:
    """Record the stage of a plugin for the supervisor, to be ended after too long a silence; not one of posttrain."""
    if job.step.origin == CORE_ORIGIN:
        return contextlib.nullcontext()
    plugin, limit = job.host.owner(job.step.stage.name), job.plan.plugin_timeout
    call = f"stage {job.name!r}"
    return activity.calling(Activity(plugin=plugin.name, origin=plugin.origin, call=call, silence_limit=limit))


def read_records(job: Job) -> Records:
    """Read, prepare and weigh the stage's records.

    Raises BadInput when the data changed after the run was named by its digest.
    """
    trained, evaluated = _read_both(job)
    check_asked(job, trained, evaluated)
    left_out = [line for each in (trained, evaluated) for line in _left_out(job, each)]
    unread = _unread(job, JoinedRecords(trained, evaluated))
    # all records are yet to be sampled: they are prepared once they are made
    waiting = not trained and any(source.on_policy for source in job.step.sources)
    done = None if waiting else _prepare(job, trained, evaluated)
    return Records(
        trained=_held(job, job.step, trained, done),
        eval_records=_held(job, evaluation_of(job), evaluated),
        warnings=[*left_out, *unread],
        asked=read_asked(job),
        kept="" if done is None else done.entry.kept,
        prepared=None if done is None else plain(measure_lengths(done, trained, job.plan.model)),
        done=done,
    )


def _joined(job: Job, records: Records, sampled: Sequence[Record]) -> Records:
    """Return the stage's records with the sampled ones, all of them prepared together."""
    if not job.step.config.prepare.enabled:
        return replace(records, trained=HeldRecords.of(lambda: [*records.trained, *sampled]))
    read, evaluated = _read_both(job)
    together = [*read, *sampled]
    done = _prepare(job, together, evaluated, len(sampled))
    assert done is not None
    job.display.line(job.name, "data", f"every row: {done.ledger}")
    kept = done.rows()
    own = weigh([read[at] for at in kept if at < len(read)], job.step.seed)
    trained = [*own, *(together[at] for at in kept if at >= len(read))]
    lengths = plain(measure_lengths(done, together, job.plan.model))
    return replace(records, trained=HeldRecords.of(lambda: trained), prepared=lengths, done=done)


def evaluation_of(job: Job) -> Step:
    """Return the step whose records are those of the eval loss."""
    return replace(job.step, sources=job.step.eval_sources)


def preparer_of(job: Job, sampled: int = 0) -> Preparer:
    """Return the preparation of the stage's records, the last ``sampled`` of which its parent has made."""
    return Preparer(
        plan=job.plan, host=job.host, step=job.step, data_digest=job.data_digest, sampled=sampled,
        note=lambda line: job.display.line(job.name, "data", line),
    )  # fmt: skip


def _prepare(job: Job, trained: Sequence[Record], evaluated: Sequence[Record], sampled: int = 0) -> Kept | None:
    """Prepare the stage's records and show what it did; return None when the recipe switches it off."""
    preparer = preparer_of(job, sampled)
    if not preparer.is_on:
        return None
    done = preparer.prepare(trained, evaluated)
    show_preparation(job, done)
    return done


def show_preparation(job: Job, done: Kept | None) -> None:
    """Show the lines about a preparation, if there is one."""
    for line in () if done is None else describe(done):
        job.display.line(job.name, "data", line)


def _left_out(job: Job, records: Sequence[Record]) -> list[str]:
    """Return and show a line about the rows of each source that are left out."""
    lines = describe_bad(records)
    for line in lines:
        job.display.line(job.name, "data", f"warning: {line}")
    return lines


def _unread(job: Job, records: Sequence[Record]) -> list[str]:
    """Return and show a line about keys of rows and of messages that nothing reads."""
    from posttrain.model.loading import load_tokenizer
    from posttrain.tokens.chat import ChatRenderer, has_other_keys

    lines = describe_unread(records)
    if any(map(has_other_keys, records)):
        lines += ChatRenderer(load_tokenizer(job.base)).describe_unread(records)
    for line in lines:
        job.display.line(job.name, "data", f"warning: {line}")
    return lines


def _held(job: Job, step: Step, read: Sequence[Record], done: Kept | None = None) -> HeldRecords:
    """Return the records that preparation keeps, repeated by weight; they are read again once let go."""
    waiting = [read]

    def again() -> Sequence[Record]:
        return taken(job, step, done, waiting.pop() if waiting else None)

    return HeldRecords.of(again, f"{job.name}.{'data' if step is job.step else 'eval_data'}")


def _read_both(job: Job) -> tuple[Sequence[Record], Sequence[Record]]:
    """Return the stage's records to train and those of its eval data. Raises BadInput for data that has changed."""
    evaluation = evaluation_of(job)
    evaluated = _read(job, evaluation) if evaluation.sources else ()
    trained = _read(job, job.step)
    # Compared after reading: a file replaced between the digest and this line would train under the wrong name.
    if records_digest(job.step) != job.data_digest:
        what = "the data changed while it was read"
        raise BadInput(Problem(where=f"{job.name}.data", what=what, fix="Run the same command again"))
    return trained, evaluated


def taken(job: Job, step: Step, done: Kept | None, read: Sequence[Record] | None = None) -> Sequence[Record]:
    """Return the records of ``read``, read now without it, that preparation keeps, repeated by weight."""
    records = read if read is not None else _read(job, step) if step.sources else ()
    if done is not None and done.entry.kept:
        records = take(records, array("q", (at for at in done.rows() if at < len(records))))
    return weigh(records, step.seed)


def _read(job: Job, step: Step) -> Sequence[Record]:
    records: Sequence[Record] | None = job.host.hook.load_records(step=step)
    if records is None:
        raise PluginFailed(f"no plugin reads the records of stage {job.name!r}")
    return records
