"""A sample of a gate's documents for the model that is being trained: asked and scored as the gate asks and scores."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from posttrain.errors import BadInput
from posttrain.sampling.gate import SampledTask
from posttrain.scoring.checks import read_clusters
from posttrain.scoring.isolation import evaluating, quiet, seeded

if TYPE_CHECKING:
    from posttrain.config.schema import GateConfig, GateTask
    from posttrain.scoring.harness.responder import Responder
    from posttrain.scoring.questions import PreparedTask

DOCUMENTS = 64
"""Documents of each task, at most: half as many answers as a block of sampling."""
AT_ONCE = 16
"""Requests at once, at most: beside the model lies what its training keeps in memory."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Documents of a gate's tasks with their requests."""

    prepared: Sequence[PreparedTask]
    demands: Mapping[str, GateTask]
    tokenizer: Any
    size: int
    """Requests at once."""
    seed: int

    @property
    def tasks(self) -> Sequence[SampledTask]:
        """The followed tasks."""
        return [
            SampledTask(
                name=task.name, metric=task.metric, role=self.demands[task.name].role,
                higher_is_better=task.higher_is_better, documents=len(task.questions),
            )
            for task in self.prepared
        ]  # fmt: skip

    def ask(self, model: Any, place: tuple[int, int], report: Callable[[int, int], None]) -> Sequence[float]:
        """Return the scores of all documents; see ``GateSample.ask``."""
        from posttrain.scoring.harness.responder import TransformersResponder

        rank, world = place
        found: list[float] = []
        total = sum(len(task.questions) for task in self.prepared)
        with quiet(), evaluating(model):
            responder = TransformersResponder(model, self.tokenizer, self.size)
            for task in self.prepared:
                scores = [0.0] * len(task.questions)
                own = replace(task, questions=task.questions[rank::world])
                if own.questions:
                    tell = partial(_tell, report, len(found), total)
                    scores[rank::world] = self._scores(own, responder, tell)
                found += scores
        return found

    def _scores(self, task: PreparedTask, responder: Responder, report: Callable[..., None]) -> list[float]:
        from posttrain.scoring.harness.scoring import ask_block, requests_by_block, score_answers

        for index, requests in enumerate(requests_by_block(task, self.size)):
            told = partial(report, index * self.size)
            ask_block(requests, index, task.ends, responder, self.seed, task.name, told)
        used = self.demands[task.name].filter or task.filters[0]
        rows = {row.doc_id: row for row in score_answers(task, "policy", "") if row.filter == used}
        return [rows[question.doc_id].metrics[task.metric] for question in task.questions]


def sample_gate(
    gate: GateConfig, tasks: Mapping[str, GateTask], tokenizer: Any, note: Callable[[str], None]
) -> Sample | None:
    """Return a sample of the documents that a gate asks; None, with a note, for tasks that cannot be asked here.

    Tasks that run programs of the model have none: they take a consent and a time that belong to the gate.
    """
    from posttrain.scoring.harness.requests import prepare_task

    followed = {name: task for name, task in tasks.items() if not task.run_code}
    if not followed:
        return None
    try:
        with seeded(gate.seed):  # all of them: the examples in a prompt depend on the prompts before it
            prepared = [prepare_task(name, task, tokenizer, gate.seed) for name, task in followed.items()]
        clusters = read_clusters(followed, prepared)
    except BadInput as error:
        note(f"warning: the gate is not followed while training: {error}")
        return None
    halves = [task.in_half(gate.half, clusters.get(task.name)) for task in prepared]
    return Sample(
        prepared=[replace(task, questions=_chosen(task, gate.seed)) for task in halves if task.questions],
        demands=followed,
        tokenizer=tokenizer,
        size=min(gate.batch_size, AT_ONCE),
        seed=gate.seed,
    )


def _tell(report: Callable[[int, int], None], before: int, total: int, done: int, tokens: int) -> None:
    """Report the documents done so far, those of earlier tasks among them; every token is a sign of life."""
    report(before + done, total)


def _chosen(task: PreparedTask, seed: int) -> Sequence[Any]:
    """Return the documents of the sample, in their order."""
    count = len(task.questions)
    numbers = range(count) if count <= DOCUMENTS else sorted(random.Random(seed).sample(range(count), DOCUMENTS))
    return [task.questions[number] for number in numbers]
