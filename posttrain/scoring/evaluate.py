"""Scoring of every system of a gate: from the cache where it was asked the same before, else with loaded weights.

Scores come from the first of three places to have them: kept scores, kept answers to be scored, the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from posttrain.config.schema import Backend
from posttrain.digests import digest_of
from posttrain.errors import ArtifactDamaged
from posttrain.gate.spec import DocumentScore, GateProgress, GateRequest, Scorecard
from posttrain.gate.verdict import is_settled, plan_looks
from posttrain.scoring.cache import Blocks, ScoreCache, score_key
from posttrain.scoring.checks import read_clusters
from posttrain.scoring.fingerprint import library_versions, tokenizer_digest
from posttrain.scoring.harness.rehearsal import rehearse_task
from posttrain.scoring.harness.requests import prepare_task
from posttrain.scoring.harness.responder import Responder, Transformers
from posttrain.scoring.harness.scoring import answer, recall
from posttrain.scoring.isolation import quiet, seeded
from posttrain.scoring.questions import PreparedTask
from posttrain.scoring.scorecard import write_questions, write_scorecard
from posttrain.scoring.systems import Loading, group_by_weights

if TYPE_CHECKING:
    from posttrain.artifact import ModelSource


def evaluate(request: GateRequest, progress: GateProgress, loading: Loading) -> Scorecard:
    """Ask every system of the request the same questions, and write the scorecard and the questions.

    Raises BadInput when a task cannot be loaded or compared, ArtifactDamaged when an answer is not finite.
    """
    if not request.gate.enabled:
        return Scorecard(rows=(), higher_is_better={})
    tokenizer = loading.tokenizer(request.systems["candidate"])
    with seeded(request.gate.seed):
        tasks = [prepare_task(name, task, tokenizer, request.gate.seed) for name, task in request.tasks.items()]
    for task in tasks:
        rehearse_task(task)
    scorecard = Scorecard(
        rows=(),
        higher_is_better={task.name: task.higher_is_better for task in tasks},
        settings={task.name: digest_of(task.settings) for task in tasks},
        documents={task.name: len(task.questions) for task in tasks},
        clusters=read_clusters(request.tasks, tasks),
    )
    held: ModelsBySystems = {}
    for look in plan_looks(request):
        new = [task.at(look, request.gate.seed, scorecard.clusters.get(task.name)) for task in tasks]
        asked = [task for task in new if task.questions]
        rows = _Session(request, progress, loading, tokenizer, asked, held).score()
        scorecard = replace(scorecard, rows=(*scorecard.rows, *rows), look=look)
        if not look.last and is_settled(request, scorecard):
            progress.note(f"the gate is decided at look {look.number} of {look.of}: no more documents are scored")
            break
    write_scorecard(request.scorecard, scorecard.rows)
    write_questions(request.scorecard.with_name("questions.jsonl"), tasks)
    return scorecard


class Models(Protocol):
    """Models of systems on shared weights."""

    def responding_as(self, system: str) -> AbstractContextManager[Responder]:
        """Hand out the model to answer as ``system``."""


ModelsBySystems = dict[frozenset[str], Models]
"""Models left in memory by the last look, by their systems."""


class _Session:
    """The scoring of one gate at one look."""

    def __init__(
        self,
        request: GateRequest,
        progress: GateProgress,
        loading: Loading,
        tokenizer: object,
        tasks: Sequence[PreparedTask],
        held: ModelsBySystems,
    ) -> None:
        self._request, self._progress, self._loading = request, progress, loading
        self._tokenizer, self._tasks, self._held = tokenizer, tasks, held
        self._cache = ScoreCache(request.cache)
        content = self._content()
        self._keys = {
            (system, task.name): score_key(
                **content,
                system=source.digest,
                settings=task.settings,
                ends=task.ends,
                questions=[[doc_id, *hashes] for doc_id, hashes in task.asked.items()],
            )
            for system, source in request.systems.items()
            for task in tasks
        }
        self._answer_keys = {
            (system, task.name): score_key(
                **content,
                system=source.digest,
                ends=task.ends,
                requests=[[question.request_hash, *question.repeats] for question in task.ordered],
            )
            for system, source in request.systems.items()
            for task in tasks
        }
        self._rows: dict[str, list[DocumentScore]] = {}

    def score(self) -> list[DocumentScore]:
        """Return the rows of every system and task, in the order of the request."""
        self._read_cache()
        for group in group_by_weights(self._unscored()):
            self._score_group(group)
        return [
            replace(row, system=system, task=task)
            for (system, task), key in self._keys.items()
            for row in self._rows[key]
        ]

    def _content(self) -> dict[str, Any]:
        """Return the part of every key common to all systems and tasks.

        Size of a block, device, number format and libraries are in it because each can change the last bits of a
        logit, and with them a greedy answer; the seed, because it picks few-shot examples and drives sampling.
        """
        gate = self._request.gate
        return {
            "tokenizer": tokenizer_digest(self._tokenizer),
            "seed": gate.seed,
            "backend": gate.backend.value,
            "block": gate.batch_size,
            "dtype": self._request.dtype,
            "device": self._loading.device,
            "versions": library_versions(),
        }

    def _read_cache(self) -> None:
        for (system, name), key in self._keys.items():
            rows = self._read_kept(key, name, system)
            if rows is None:
                rows = self._recall(name, system)
            if rows is not None:
                self._rows[key] = rows

    def _read_kept(self, key: str, name: str, system: str) -> list[DocumentScore] | None:
        task = self._task(name)
        try:
            return self._cache.read(key, task.asked, task.filters)
        except (OSError, ValueError, ArtifactDamaged) as error:
            self._progress.note(f"cached scores of {system} on {name} are not used: {error}")
            return None

    def _recall(self, name: str, system: str) -> list[DocumentScore] | None:
        """Score the system's answers to equal requests of another task; None when some are missing."""
        with quiet():
            digest = self._request.systems[system].digest
            rows = recall(self._task(name), self._blocks(name, system), system, digest)
        if rows is not None:
            self._cache.write(self._keys[system, name], rows)
        return rows

    def _blocks(self, name: str, system: str) -> Blocks:
        return self._cache.blocks(self._answer_keys[system, name], self._request.gate.batch_size)

    def _unscored(self) -> Mapping[str, ModelSource]:
        waiting = {system for (system, _), key in self._keys.items() if key not in self._rows}
        return {name: source for name, source in self._request.systems.items() if name in waiting}

    def _score_group(self, group: Mapping[str, ModelSource]) -> None:
        """Score systems on shared weights; load these unless the last look left them in memory."""
        with quiet():
            models = self._held.pop(frozenset(group), None)
            self._held.clear()  # free the old weights before loading new ones
            models = models or self._load_models(group)
            for system, source in group.items():
                with models.responding_as(system) as responder:
                    self._score_system(system, source, responder)
        if len(group_by_weights(self._request.systems)) == 1:  # otherwise the next group needs the memory
            self._held[frozenset(group)] = models

    def _load_models(self, group: Mapping[str, ModelSource]) -> Models:
        gate, dtype = self._request.gate, self._request.dtype
        if gate.backend is Backend.vllm:
            from posttrain.scoring.harness.vllm import Vllm

            return Vllm(group, dtype, self._request.systems["candidate"].tokenizer, gate.batch_size, gate.seed)
        return Transformers(group, dtype, self._loading, self._tokenizer, gate.batch_size)

    def _score_system(self, system: str, source: ModelSource, responder: Responder) -> None:
        for task in self._tasks:
            key = self._keys[system, task.name]
            if key not in self._rows:
                self._rows[key] = self._answer(task, responder, system, source.digest)

    def _answer(self, task: PreparedTask, responder: Responder, system: str, digest: str) -> list[DocumentScore]:
        responder.cut = 0
        blocks = self._blocks(task.name, system)
        report = partial(self._progress.advance, system, task.name)
        rows = answer(task, responder, blocks, system, digest, self._request.gate.seed, report)
        if responder.cut:
            self._progress.note(f"{responder.cut} prompts of {task.name} did not fit {system} and lost their beginning")
        self._cache.write(self._keys[system, task.name], rows)
        return rows

    def _task(self, name: str) -> PreparedTask:
        return next(task for task in self._tasks if task.name == name)
