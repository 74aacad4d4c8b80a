"""The search for the share of replayed tokens: half of the gate's documents choose it, the other half judges, once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain import ledger
from posttrain.config.schema import Half
from posttrain.context import StageContext
from posttrain.errors import BadInput, GateFailed, Interrupted
from posttrain.gate.halves import select_half
from posttrain.gate.spec import DocumentScore, GateRequest, Scorecard, Verdict
from posttrain.gate.verdict import judge
from posttrain.hookspecs import hookimpl
from posttrain.scoring import plugin as scoring
from tests.support.fakes import (
    Script,
    only_run,
    run_json,
    run_on,
    run_recipe,
    scripted_host,
    write_adapter,
    write_project,
)

SEARCH = (
    "stages=[sft]",
    "sft.replay={path: general.jsonl, auto: {least: 0.1, most: 0.4, attempts: 3}}",
    "+sft.gate.tasks.kept={role: guard, metric: acc, task: some.yaml, max_drop: 0.1}",
    "sft.prepare.enabled=false",
)
DOCUMENTS = 400
HASHES = {doc_id: hashlib.sha256(str(doc_id).encode()).hexdigest() for doc_id in range(DOCUMENTS)}


class Forgetful(Script):
    """A stage that keeps what its parent knew from a share of replay on, and a gate whose answers tell so."""

    def __init__(self, enough: float) -> None:
        super().__init__()
        self.enough = enough
        self.shares: list[float] = []
        self.keeps: dict[str, bool] = {}
        self.asked: list[tuple[str, Half, frozenset[int]]] = []
        self.during_training = self.note_share

    def note_share(self, context: StageContext) -> None:
        self.shares.append(max(record.origin.share for record in context.records))

    @hookimpl
    def run_stage(self, stage: Any, context: StageContext) -> bool:
        done = super().run_stage(stage, context)
        write_adapter(replace(context, seed=int(100 * self.shares[-1])))  # other bytes for every share
        return done

    @hookimpl
    def evaluate_artifact(self, request: GateRequest) -> Scorecard:
        super().evaluate_artifact(request)
        candidate = request.systems["candidate"].digest
        self.keeps.setdefault(candidate, bool(self.shares) and self.shares[-1] >= self.enough)
        chosen = select_half(HASHES, request.gate.half)
        self.asked.append((candidate, request.gate.half, frozenset(chosen)))
        rows = [
            DocumentScore(
                system=system, digest=source.digest, task=task, filter="none", doc_id=doc_id,
                document_hash=HASHES[doc_id], request_hash=HASHES[doc_id], target_hash="t",
                metrics={"acc": self.score(system, task, doc_id, candidate)}, response="", target="",
            )
            for system, source in request.systems.items()
            for task in request.tasks
            for doc_id in sorted(chosen)
        ]  # fmt: skip
        return Scorecard(rows=tuple(rows), higher_is_better=dict.fromkeys(request.tasks, True))

    def score(self, system: str, task: str, doc_id: int, candidate: str) -> float:
        learned = system == "candidate"
        if task == "kept":
            return float(not learned or self.keeps[candidate] or doc_id % 2 == 0)
        return float(learned or doc_id % 2 == 0)

    @hookimpl
    def judge_artifact(self, request: GateRequest, scorecard: Scorecard) -> Verdict:
        return judge(request, scorecard)


@pytest.fixture(autouse=True)
def project(working_folder: Path) -> Path:
    write_project(working_folder)
    chats = [json.dumps({"prompt": f"q{number}", "completion": "a"}) for number in range(8)]
    (working_folder / "general.jsonl").write_text("\n".join(chats) + "\n")
    return working_folder


def stage() -> Mapping[str, Any]:
    found: Mapping[str, Any] = run_json()["stages"][0]
    return found


def test_the_share_rises_until_the_guards_hold_and_other_documents_judge_it_once() -> None:
    script = Forgetful(enough=0.2)
    run_recipe(script, *SEARCH)
    assert script.shares == [0.1, 0.2]
    assert [(each["share"], each["held"]) for each in stage()["attempts"]] == [(0.1, False), (0.2, True)]
    assert "kept against base" in stage()["attempts"][0]["reason"]
    assert [half for _, half, _ in script.asked] == [Half.choosing, Half.choosing, Half.judging]
    choosing, again, judging = (documents for _, _, documents in script.asked)
    assert choosing == again
    assert not choosing & judging
    assert choosing | judging == set(HASHES)
    assert (stage()["state"], stage()["digest"]) == ("promoted", script.asked[-1][0])
    rows = ledger.lifts(Path("runs"))
    assert {(row.lift.task, row.lift.tried, row.lift.n) for row in rows} == {
        ("some", 2, len(judging)),
        ("kept", 2, len(judging)),
    }
    verdict = json.loads((only_run() / "stages/sft/verdict.json").read_text())
    assert any("chosen from 2" in note for note in verdict["notes"])
    assert "10.0% of the tokens replayed: the guards do not hold" in (only_run() / "report.html").read_text()
    later = Forgetful(enough=0.2)
    run_recipe(later, *SEARCH)
    assert (later.trained, later.judged, later.asked) == ([], [], [])
    assert [each["held"] for each in stage()["attempts"]] == [False, True]


def test_without_a_share_that_holds_the_last_one_is_judged_and_fails() -> None:
    script = Forgetful(enough=0.9)
    with pytest.raises(GateFailed):
        run_recipe(script, *SEARCH)
    assert script.shares == [0.1, 0.2, 0.4]
    assert [half.value for _, half, _ in script.asked] == ["choosing"] * 3 + ["judging"]
    assert "no share up to 40.0% holds the guards" in Path("log.txt").read_text()
    assert {row.lift.tried for row in ledger.lifts(Path("runs"))} == {3}


@pytest.mark.parametrize("place", ["training", "choosing", "judging"])
def test_a_search_that_was_killed_goes_on_where_it_was(place: str) -> None:
    script = Forgetful(enough=0.2)

    def stop_in_training(context: StageContext) -> None:
        script.note_share(context)
        if place == "training" and len(script.shares) == 2:
            raise Interrupted("killed")

    def stop_in_evaluation(request: GateRequest) -> None:
        wanted = {"choosing": (Half.choosing, 2), "judging": (Half.judging, 2)}.get(place)
        if wanted == (request.gate.half, len(script.shares)):
            raise Interrupted("killed")

    script.during_training, script.during_evaluation = stop_in_training, stop_in_evaluation
    with pytest.raises(Interrupted):
        run_recipe(script, *SEARCH)
    later = Forgetful(enough=0.2)
    later.shares, later.keeps = [0.2], dict(script.keeps)
    run_recipe(later, *SEARCH)
    assert later.trained == (["sft"] if place == "training" else [])
    assert [half.value for _, half, _ in later.asked] == ["choosing", "judging"][place == "judging" :]
    assert stage()["state"] == "promoted"
    assert [each["held"] for each in stage()["attempts"]] == [False, True]


def test_a_guard_without_documents_that_choose_stops_the_run_before_it_trains() -> None:
    rows = [{"question": "q", "answer": "a", "match": "exact"}]
    Path("few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = Script()
    host = scripted_host(script)
    host.manager.register(scoring, "scoring.plugin")
    words = [*SEARCH[:2], "+sft.gate.tasks.kept={role: guard, metric: right, task: own_questions, data: few.jsonl}"]
    with pytest.raises(BadInput, match=r"sft\.gate\.tasks\.kept: none of its 1 documents is of the half"):
        run_on(host, *words, "sft.prepare.enabled=false", "~sft.gate.tasks.some", "~dpo.gate.tasks.some")
    assert script.trained == []
