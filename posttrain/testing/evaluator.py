"""A gate with invented scores, judged by the real statistics."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

from posttrain.gate.spec import DocumentScore, GateRequest, Scorecard, Verdict
from posttrain.gate.verdict import judge
from posttrain.hookspecs import hookimpl


class FakeEvaluator:
    """Plugin in lm-eval's place: each system is right on a set share of the documents of every task."""

    def __init__(self, scores: Mapping[str, float] | None = None, documents: int = 100) -> None:
        """Take the share of right answers of ``base``, ``parent`` and ``candidate``; by default the candidate wins."""
        self.scores = {"base": 0.2, "parent": 0.2, "candidate": 0.9} | dict(scores or {})
        self.documents = documents
        self.judged: list[str] = []
        """Names of the judged stages, in order."""

    @hookimpl
    def evaluate_artifact(self, request: GateRequest) -> Scorecard:
        """Score every system for every task."""
        rows = [
            self._score(request, system, task, document)
            for system in request.systems
            for task in request.tasks
            for document in range(self.documents)
        ]
        return Scorecard(rows=tuple(rows), higher_is_better=dict.fromkeys(request.tasks, True))

    @hookimpl
    def judge_artifact(self, request: GateRequest, scorecard: Scorecard) -> Verdict:
        """Judge these scores as the real gate does."""
        self.judged.append(request.stage)
        return judge(request, scorecard)

    def _score(self, request: GateRequest, system: str, task: str, document: int) -> DocumentScore:
        right = document < round(self.scores[system] * self.documents)
        digest = sha256(f"{task} {document}".encode()).hexdigest()
        return DocumentScore(
            system=system, digest=request.systems[system].digest, task=task,
            filter=request.tasks[task].filter or "none", doc_id=document,
            document_hash=digest, request_hash=digest, target_hash=digest,
            metrics={request.tasks[task].metric: float(right)}, response="right" if right else "wrong", target="right",
        )  # fmt: skip
