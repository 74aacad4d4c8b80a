"""Gates without models: requests, and scorecards with the scores that a test gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain.artifact import ModelSource
from posttrain.config.schema import GateConfig, GateTask, Role
from posttrain.gate.spec import DocumentScore, GateRequest, Scorecard, Verdict
from posttrain.gate.verdict import judge

LIFT = GateTask(role=Role.lift, metric="acc")
GUARD = GateTask(role=Role.guard, metric="acc", max_drop=0.02)


def source(name: str) -> ModelSource:
    return ModelSource(
        name=name,
        model=Path("model"),
        adapter=None,
        tokenizer=Path("model"),
        chat_template="",
        digest=name,
        base="model",
        model_digest="weights",
    )


def request(task: GateTask = LIFT, systems: Sequence[str] = ("base", "candidate"), **gate: Any) -> GateRequest:
    return GateRequest(
        stage="sft",
        gate=GateConfig(**gate),
        tasks={"quiz": task},
        systems={name: source(name) for name in systems},
        dtype="float32",
        cache=Path("cache"),
        scorecard=Path("scorecard.jsonl"),
    )


def rows(system: str, scores: Sequence[float], task: str = "quiz", filter_name: str = "none") -> list[DocumentScore]:
    return [
        DocumentScore(
            system=system,
            digest=system,
            task=task,
            filter=filter_name,
            doc_id=doc_id,
            document_hash=f"{task} d{doc_id}",
            request_hash=f"{task} r{doc_id}",
            target_hash=f"t{doc_id}",
            metrics={"acc": score},
            response="",
            target="",
        )
        for doc_id, score in enumerate(scores)
    ]


def card(*parts: list[DocumentScore], higher_is_better: bool = True) -> Scorecard:
    return Scorecard(rows=tuple(row for part in parts for row in part), higher_is_better={"quiz": higher_is_better})


def binary(right: int, n: int) -> list[float]:
    return [1.0] * right + [0.0] * (n - right)


def decide(base: Sequence[float], candidate: Sequence[float], task: GateTask = LIFT, **gate: Any) -> Verdict:
    return judge(request(task, **gate), card(rows("base", base), rows("candidate", candidate)))


def request_of(
    tasks: Mapping[str, GateTask], systems: Sequence[str] = ("base", "candidate"), **gate: Any
) -> GateRequest:
    """A gate of several tasks."""
    return replace(request(systems=systems, **gate), tasks=dict(tasks))


def card_of(scores: Mapping[str, Mapping[str, Sequence[float]]], **card: Any) -> Scorecard:
    """A scorecard with the scores by task and system."""
    found = [
        row for task, systems in scores.items() for system in systems for row in rows(system, systems[system], task)
    ]
    return Scorecard(rows=tuple(found), **{"higher_is_better": dict.fromkeys(scores, True), **card})


def paired_scores(wins: int, losses: int, n: int) -> dict[str, list[float]]:
    """Right and wrong answers of base and candidate with so many wins and losses."""
    rest = n - wins - losses
    shared = [1.0] * (rest // 2) + [0.0] * (rest - rest // 2)
    return {"base": [0.0] * wins + [1.0] * losses + shared, "candidate": [1.0] * wins + [0.0] * losses + shared}
