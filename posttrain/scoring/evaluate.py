"""Scoring of every system of a gate: from the cache where it was asked the same before, else with loaded weights.

Scores come from the first of three places to have them: kept scores, kept answers to be scored, the model. Where a
launch has several processes, they fill the second place first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from posttrain.config.schema import Backend
from posttrain.digests import digest_of
from posttrain.errors import ArtifactDamaged
from posttrain.gate.sequential import Look
from posttrain.gate.spec import DocumentScore, GateProgress, GateRequest, Scorecard
from posttrain.gate.verdict import is_settled, plan_looks
from posttrain.model.llama import PACKAGE, version
from posttrain.model.loading import WIDENED, number_format
from posttrain.scoring.cache import Blocks, ScoreCache, score_key
from posttrain.scoring.checks import read_clusters, read_slices
from posttrain.scoring.fingerprint import library_versions, tokenizer_digest
from posttrain.scoring.harness.rehearsal import rehearse_task
from posttrain.scoring.harness.requests import prepare_task, request_values
from posttrain.scoring.harness.responder import Responder
from posttrain.scoring.harness.scoring import answer, missing_blocks, recall, requests_by_block
from posttrain.scoring.inquiry import Inquirers, Inquiry, Part, Place, describe_cut
from posttrain.scoring.isolation import quiet, seeded
from posttrain.scoring.questions import PreparedTask
from posttrain.scoring.responders import Responders
from posttrain.scoring.scorecard import write_questions, write_scorecard
from posttrain.scoring.systems import Loading, compute_dtype


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
    request = replace(request, dtype=_number_format(request))
    evaluation = _Evaluation(request, progress, loading, tokenizer, tasks)
    if request.launch is not None and request.gate.backend is Backend.hf:
        evaluation.ask_elsewhere()
    scorecard = evaluation.score()
    write_scorecard(request.scorecard, scorecard.rows)
    write_questions(request.scorecard.with_name("questions.jsonl"), tasks)
    return scorecard


def _number_format(request: GateRequest) -> str:
    """Return the format in which all systems of the request are loaded."""
    systems = [*request.systems.values()]
    compute = request.compute_dtype or compute_dtype(request.gate.backend, request.dtype, systems)
    return number_format(request.dtype, compute)


class _Evaluation:
    """The scoring of one gate, look by look."""

    def __init__(
        self,
        request: GateRequest,
        progress: GateProgress,
        loading: Loading,
        tokenizer: Any,
        tasks: Sequence[PreparedTask],
    ) -> None:
        self._request, self._progress, self._loading, self._tokenizer = request, progress, loading, tokenizer
        half, clusters = request.gate.half, read_clusters(request.tasks, tasks)
        tasks = [task.in_half(half, clusters.get(task.name)) for task in tasks]
        self._empty = Scorecard(
            rows=(),
            higher_is_better={task.name: task.higher_is_better for task in tasks},
            settings={task.name: digest_of(task.settings) for task in tasks},
            documents={task.name: len(task.questions) for task in tasks},
            clusters={
                task.name: {question.doc_id: clusters[task.name][question.doc_id] for question in task.questions}
                for task in tasks
                if task.name in clusters
            },
            slices=read_slices(request.tasks, tasks),
        )
        seed, sources = request.gate.seed, self._empty.clusters
        self._sessions = []
        content = {name: _content(request, name, loading.device, tokenizer) for name in request.systems}
        for look in plan_looks(request):
            new = [task.at(look, seed, sources.get(task.name)) for task in tasks]
            asked = [task for task in new if task.questions]
            self._sessions.append(_Session(request, progress, content, look, asked))

    def score(self) -> Scorecard:
        """Return all scores that the gate needs; ask for those that are missing."""
        request, scorecard = self._request, self._empty
        gate = request.gate
        if request.dtype == WIDENED and not self._sessions[0].read():
            self._progress.note("arithmetic: float32 on weights stored as bfloat16")
        models = Responders(
            request.systems, request.dtype, gate.backend, gate.batch_size, gate.seed, self._loading, self._tokenizer
        )
        for session in self._sessions:
            session.score(models)
            scorecard, look = session.added_to(scorecard), session.look
            if not look.last and is_settled(request, scorecard):
                text = f"the gate is decided at look {look.number} of {look.of}: no more documents are scored"
                self._progress.note(text)
                break
        return scorecard

    def ask_elsewhere(self) -> None:
        """Have the processes of the launch answer what is missing, look by look until the gate is settled."""
        request, asked = self._request, set[str]()
        inquirers: Inquirers | None = request.launch
        if inquirers is None or self._is_settled(len(self._sessions)):
            return
        parts = [part for session in self._sessions for part in session.missing_parts(asked)]
        inquiry = Inquiry(
            systems=request.systems, dtype=request.dtype, device=self._loading.device, seed=request.gate.seed,
            size=request.gate.batch_size, cache=request.cache, parts=tuple(parts),
        )  # fmt: skip
        inquirers(inquiry, self._requests(parts), request.scorecard.parent, self._progress, self._is_settled)

    def _is_settled(self, looks: int) -> bool:
        """Return True when kept answers settle the gate at one of so many looks, the last one included."""
        scorecard = self._empty
        for session in self._sessions[:looks]:
            if not session.read():
                return False
            scorecard = session.added_to(scorecard)
            if session.look.last or is_settled(self._request, scorecard):
                return True
        return False

    def _requests(self, parts: Sequence[Part]) -> Iterator[tuple[Place, Sequence[Any]]]:
        """Yield the requests of every missing block as JSON values, those of several systems once."""
        missing = {(part.look, part.task, block) for part in parts for block in part.blocks}
        for session in self._sessions:
            for place, requests in session.requests():
                if place in missing:
                    yield place, [request_values(request) for request in requests]


class _Session:
    """The scoring of one gate at one look."""

    def __init__(
        self,
        request: GateRequest,
        progress: GateProgress,
        content: Mapping[str, Mapping[str, Any]],
        look: Look,
        tasks: Sequence[PreparedTask],
    ) -> None:
        self._request, self._progress, self._tasks, self.look = request, progress, tasks, look
        self._cache = ScoreCache(request.cache)
        self._keys = {
            (system, task.name): score_key(
                **content[system],
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
                **content[system],
                system=source.digest,
                ends=task.ends,
                requests=[[question.request_hash, *question.repeats] for question in task.ordered],
            )
            for system, source in request.systems.items()
            for task in tasks
        }
        self._rows: dict[str, list[DocumentScore]] = {}
        self._looked_up: set[str] = set()

    def read(self) -> bool:
        """Read kept scores, and score kept answers; return False when some are missing."""
        for (system, name), key in self._keys.items():
            if key not in self._rows and (rows := self._read_kept(key, name, system) or self._recall(name, system)):
                self._rows[key] = rows
        return all(key in self._rows for key in self._keys.values())

    def score(self, models: Responders) -> None:
        """Score every system and task, those that are not kept by asking."""
        if not self.read():
            waiting = {system for (system, _), key in self._keys.items() if key not in self._rows}
            models.ask_each([system for system in self._request.systems if system in waiting], self._score_system)

    def added_to(self, scorecard: Scorecard) -> Scorecard:
        """Return the scores of earlier looks with those of this one, in the order of the request."""
        rows = [
            replace(row, system=system, task=task)
            for (system, task), key in self._keys.items()
            for row in self._rows[key]
        ]
        return replace(scorecard, rows=(*scorecard.rows, *rows), look=self.look)

    def missing_parts(self, asked: set[str]) -> Iterator[Part]:
        """Yield what each system has yet to answer to each task; add its key to ``asked``, to ask nothing twice."""
        for system in self._request.systems:
            for task in self._tasks:
                key = self._answer_keys[system, task.name]
                if self._keys[system, task.name] in self._rows or key in asked:
                    continue
                asked.add(key)
                if blocks := missing_blocks(task, self._blocks(task.name, system)):
                    yield Part(
                        look=self.look.number, system=system, task=task.name, key=key, ends=tuple(task.ends),
                        blocks=tuple(blocks), total=len(task.questions),
                    )  # fmt: skip

    def requests(self) -> Iterator[tuple[Place, Sequence[Any]]]:
        """Yield the requests of every block."""
        for task in self._tasks:
            for block, requests in enumerate(requests_by_block(task, self._request.gate.batch_size)):
                yield (self.look.number, task.name, block), requests

    def _read_kept(self, key: str, name: str, system: str) -> list[DocumentScore] | None:
        task = self._task(name)
        if key in self._looked_up:  # what is damaged stays so, and is told once
            return None
        self._looked_up.add(key)
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

    def _score_system(self, system: str, responder: Responder) -> None:
        for task in self._tasks:
            key = self._keys[system, task.name]
            if key not in self._rows:
                self._rows[key] = self._answer(task, responder, system, self._request.systems[system].digest)

    def _answer(self, task: PreparedTask, responder: Responder, system: str, digest: str) -> list[DocumentScore]:
        responder.cut = 0
        blocks = self._blocks(task.name, system)
        report = partial(self._progress.advance, system, task.name)
        rows = answer(task, responder, blocks, system, digest, self._request.gate.seed, report)
        if responder.cut:
            self._progress.note(describe_cut(responder.cut, task.name, system))
        self._cache.write(self._keys[system, task.name], rows)
        return rows

    def _task(self, name: str) -> PreparedTask:
        return next(task for task in self._tasks if task.name == name)


def _content(request: GateRequest, system: str, device: str, tokenizer: object) -> dict[str, Any]:
    """Return the part of every key of a system that is common to all tasks.

    Size of a block, device, number format and libraries are in it because each can change the last bits of a
    logit, and with them a greedy answer; the seed, because it picks few-shot examples and drives sampling. What
    llama.cpp answers depends on its version; the systems beside a GGUF file have the keys that they have anywhere.
    """
    gate = request.gate
    found = {
        "tokenizer": tokenizer_digest(tokenizer),
        "seed": gate.seed,
        "backend": gate.backend.value,
        "block": gate.batch_size,
        "dtype": request.dtype,
        "device": device,
        "versions": library_versions(),
    }
    if gate.backend is not Backend.llama:
        return found
    if not request.systems[system].llama:
        return {**found, "backend": Backend.hf.value}
    return {**found, "device": "cpu", "versions": {**library_versions(), PACKAGE: version()}}
