"""Preparation of a stage's records within a plan: its key, its documents, its rows, from the cache where they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.preparation import DETECTOR, LANGUAGE, MODEL_FILES, Action, OnContamination, rule_actions
from posttrain.data.reading import endings, remote
from posttrain.data.records import Record
from posttrain.data.stored import JoinedRecords
from posttrain.digests import digest_of, file_digests
from posttrain.errors import BadInput, Problem, reject
from posttrain.host.plugins import CORE_ORIGIN, Host
from posttrain.plan import Plan, Step
from posttrain.prepare import kept as cache
from posttrain.prepare.filters import ask
from posttrain.prepare.kept import Kept
from posttrain.prepare.rows import Row
from posttrain.run.job import records_digest
from posttrain.saved import plain
from posttrain.scoring.catalogue import dataset_revisions
from posttrain.scoring.code import task_digests

if TYPE_CHECKING:
    from posttrain.prepare.contamination import GateDocument
    from posttrain.prepare.preparation import Judge

FOLDER = "data"
"""Folder of finished preparations in the cache."""
MANY_NEAR = 0.2
"""Share of near rows from which the display says that a template may be behind it."""


@dataclass(frozen=True, kw_only=True)
class Preparer:
    """The preparation of one stage of a plan."""

    plan: Plan
    host: Host
    step: Step
    data_digest: str
    """Digest of the stage's sources."""
    note: Callable[[str], None]
    """Receives lines for the user."""
    sampled: int = 0
    """Rows that the stage's parent has made, at the end of the trained ones."""

    @property
    def is_on(self) -> bool:
        """True when the stage's records are prepared."""
        return self.step.config.prepare.enabled

    @property
    def reads_files_alone(self) -> bool:
        """True when the digest of the sources covers the records: neither a plugin nor a model has a part in them."""
        return not self.host.shapers() and not self.sampled

    def find(self, records: Sequence[Record] | None = None) -> Kept | None:
        """Return the preparation from the cache; None when there is none or it takes the records to tell."""
        if records is None and not self.reads_files_alone:
            return None
        return cache.find(self.plan.output_root / "cache" / FOLDER, self._key(records or ()), self.note)

    def prepare(self, trained: Sequence[Record], evaluated: Sequence[Record]) -> Kept:
        """Return the preparation of these records, made now if it is not in the cache.

        Raises BadInput when nothing stays, or when an action is to stop; PluginFailed for a filter's fault.
        """
        found = self.find(JoinedRecords(trained, evaluated))
        if found is None or found.entry.rows != len(trained):
            found = self._make(trained, evaluated)
        if trained and not found.summary.kept:
            fix = "Look at the rows with posttrain data, or set another action under prepare"
            what = f"no row is left: {found.summary.line()}; every row: {found.ledger}"
            reject(f"{self.step.name}.prepare", what, fix)
        return found

    def _make(self, trained: Sequence[Record], evaluated: Sequence[Record]) -> Kept:
        from posttrain.prepare.preparation import Preparation  # a preparation in the cache needs no numpy

        root = self.plan.output_root / "cache" / FOLDER
        documents = self._documents()
        # after the documents: the revision of a data set is known by its copy
        key = self._key(JoinedRecords(trained, evaluated))
        parts = root / f"{key}.parts"
        preparation = Preparation(
            trained=trained, evaluated=evaluated, config=self.step.config.prepare, judges=self._judges(),
            documents=documents, folder=parts, sampled=self.sampled,
        )  # fmt: skip
        try:
            ledger = preparation.run()
        except BadInput as error:
            raise BadInput([_inside(problem, self.step.name) for problem in error.problems]) from None
        tasks: dict[str, int] = {}
        for document in documents:
            tasks[document.task] = tasks.get(document.task, 0) + 1
        done = cache.keep(root, key, ledger, tasks)
        shutil.rmtree(parts, ignore_errors=True)
        return done

    def _judges(self) -> dict[str, tuple[Action, Judge]]:
        """Return the rules that are looked for, posttrain's first, with their actions."""
        found: dict[str, tuple[Action, Judge]] = {}
        for name, action in rule_actions(self.step.config.prepare, self.host.filters).items():
            if action is not Action.ignore:
                found[name] = (action, partial(self._ask, name))
        if LANGUAGE in found:  # the only rule that asks for a setting
            from posttrain.prepare.languages import Languages

            found[LANGUAGE] = (found[LANGUAGE][0], Languages(self.step.config.prepare.languages).judge)
        return found

    def _ask(self, name: str, rows: Sequence[Row]) -> Sequence[Any]:
        owner, each = self.host.filters[name]
        with self.host.guarding(owner, f"the filter {name}"):
            return ask(each, owner, rows)

    def _documents(self) -> list[GateDocument]:
        """Return the documents of the gates of all stages: what an early stage learns, a later gate asks."""
        if not self._compares_with_gates():
            return []
        from posttrain.scoring.harness.documents import gate_documents

        found: dict[tuple[str, str, str], GateDocument] = {}
        for step in self._gated():
            try:
                for document in gate_documents(step.tasks):
                    found.setdefault((document.task, document.prompt, document.target), document)
            except BadInput as error:
                problems = [replace(each, where=f"{step.name}.gate.{each.where}") for each in error.problems]
                raise BadInput(problems) from error
        return list(found.values())

    def _compares_with_gates(self) -> bool:
        # Another plugin in the core's place has documents that only it knows.
        scores = CORE_ORIGIN in self.host.answerers("check_gate")
        return scores and self.step.config.prepare.contamination.action is not OnContamination.ignore

    def _gated(self) -> list[Step]:
        return [step for step in self.plan.steps if step.gate.enabled and step.tasks]

    def conditions(self) -> str:
        """Return a digest of what decides about rows that are yet to be made: settings, filters, files of the gates."""
        return digest_of(self._conditions(self._gate_files() if self._compares_with_gates() else None))

    def _key(self, records: Sequence[Record]) -> str:
        content = {
            "data": self.data_digest if self.reads_files_alone else [self.data_digest, _content(records)],
            **({"sampled": self.sampled} if self.sampled else {}),
            **self._conditions(self._gate_digests() if self._compares_with_gates() else None),
        }
        return cache.settings_key(content)

    def _conditions(self, gates: Mapping[str, Any] | None) -> dict[str, Any]:
        return {
            "shape": self.step.stage.records,
            "settings": plain(self.step.config.prepare),
            "filters": {name: [owner, each.version] for name, (owner, each) in self.host.filters.items()},
            "detector": version(DETECTOR) if self.step.config.prepare.languages else None,
            "semantic": self._static_model(),
            "gates": gates,
        }

    def _static_model(self) -> Mapping[str, str] | None:
        """Return the digests of the model by which rows are compared."""
        folder = self.step.config.prepare.semantic.model
        return (
            None if folder is None else file_digests({name: Path(folder).expanduser() / name for name in MODEL_FILES})
        )

    def _gate_digests(self) -> Mapping[str, Any]:
        revisions = {
            f"{step.name}/{name}": {} if task.data is not None else dataset_revisions(task.task or name)
            for step in self._gated()
            for name, task in step.tasks.items()
        }
        found = {name: [*each, revisions[name]] for name, each in self._gate_files().items()}
        return {**found, "lm_eval": version("lm_eval")}

    def _gate_files(self) -> dict[str, list[Any]]:
        return {
            f"{step.name}/{name}": [task.task or name, task_digests(task.task or name, task.data)]
            for step in self._gated()
            for name, task in step.tasks.items()
        }


def contributors(host: Host, step: Step) -> list[str]:
    """Return the third parties' plugins behind a stage's rows: of the filters that judge them, of readers of its files.

    Those that shape records by hooks are ``Host.shapers``.
    """
    prepare = step.config.prepare
    actions = rule_actions(prepare, host.filters) if prepare.enabled else {}
    asked = {host.filters[name][0] for name, action in actions.items() if action is not Action.ignore}
    files = endings((*step.sources, *step.eval_sources), step.cache)
    return host.others({*asked, *(owner for suffix, (owner, _) in host.readers.items() if suffix in files)})


def remaining(plan: Plan, host: Host, step: Step) -> str:
    """Return what preparation leaves of a stage's rows, from the cache; without one, that counts are before it."""
    if not step.config.prepare.enabled:
        return "prepare.enabled is false, every row is trained"
    if (found := known_preparation(plan, host, step)) is not None:
        return f"prepared: {found.summary.line()}"
    return f"counts are before preparation: posttrain data recipe={plan.recipe} shows what it leaves"


def known_preparation(plan: Plan, host: Host, step: Step) -> Kept | None:
    """Return the preparation of a stage's rows from the cache; None for none there.

    No row is read, and nothing is copied from afar.
    """
    root = plan.output_root / "cache" / FOLDER
    if not step.config.prepare.enabled or not root.is_dir() or remote((*step.sources, *step.eval_sources)):
        return None
    preparer = Preparer(plan=plan, host=host, step=step, data_digest=records_digest(step), note=lambda line: None)
    return preparer.find()


def _content(records: Sequence[Record]) -> str:
    """Return a digest of records from plugins, in their order."""
    digest = blake2b(digest_size=16)
    for record in records:
        digest.update(Row(record).digest())
    return digest.hexdigest()


def _inside(problem: Problem, stage: str) -> Problem:
    return replace(problem, where=f"{stage}.prepare") if problem.where == "prepare" else problem


def describe(done: Kept) -> list[str]:
    """Return the lines of a run's display about a preparation."""
    summary = done.summary
    lines = [summary.line()] if summary.found else []
    near = summary.found.get("near", 0)
    if near > MANY_NEAR * summary.read:
        lines.append(
            f"warning: {near:,} of {summary.read:,} rows are near copies; rows that share a long text look alike: "
            "see them with posttrain data, and raise prepare.near.threshold or compare prepare.near.over=answer"
        )
    if summary.is_of_gates():
        lines.append(
            "warning: every row is of the gates' own documents, and all are trained: the scores show recall, not skill;"
            " to reject such data, set prepare.contamination.action=stop"
        )
    for task, counts in summary.tasks.items():
        if counts.touched:
            share = counts.touched / counts.documents
            lines.append(
                f"warning: {counts.touched:,} of {counts.documents:,} documents of the task {task} are in the data"
                f" ({share:.1%})"
            )
    return lines
