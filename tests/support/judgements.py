"""Verdicts to be recorded, without a run; light, so that many processes can make them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain.artifact import BaseWeights
from posttrain.digests import digest_of, file_digest
from posttrain.gate.spec import TaskVerdict, Verdict, VerdictState
from posttrain.ledger import Judgement, record

ROOT = Path("runs")


def task_verdict(state: VerdictState) -> TaskVerdict:
    return TaskVerdict(
        task="some", metric="acc", filter="none", higher_is_better=True, questions="q" * 64, role="lift",
        against="base", n=100, base=0.1, parent=0.1, candidate=0.6, lift=0.5, low=0.4, high=0.6, confidence=0.95,
        threshold=0.0, state=state, reason="because",
    )  # fmt: skip


def judgement(
    run: str = "run", stage: str = "sft", state: VerdictState = "pass", tasks: int = 2, **figures: Any
) -> Judgement:
    """A verdict about an artifact of a run."""
    found = tuple(replace(task_verdict(state), task=f"task{number}", **figures) for number in range(tasks))
    verdict = Verdict(state=state, gated=True, tasks=found, reason="because")
    return Judgement(
        run=run, recipe="mine", stage=stage, lineage=("sft",), base=BaseWeights(name="base", digest="weights"),
        parent="parent", artifact=digest_of([run, stage]), verdict=verdict,
    )  # fmt: skip


def add(run: str = "run", **settings: Any) -> None:
    given = judgement(run, **settings)
    folder = ROOT / given.run / "stages" / given.stage
    folder.mkdir(parents=True, exist_ok=True)
    record(ROOT, folder, given)


def sign_verdict(folder: Path, **values: Any) -> None:
    """Change verdict.json in ``folder`` as somebody does who makes its hashes anew, for the present scorecard too."""
    path = folder / "verdict.json"
    record = {**json.loads(path.read_text()), **values}
    record["basis"]["scorecard"] = file_digest(folder / "scorecard.jsonl")
    del record["digest"]
    path.write_text(json.dumps({**record, "digest": digest_of(record)}))
