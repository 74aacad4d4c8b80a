"""Scoring at looks: no more documents than needed, with the sources and directions of the tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.artifact import ModelSource
from posttrain.config.schema import GateConfig, GateTask, Half, Role, Sequential
from posttrain.errors import BadInput
from posttrain.gate.sequential import Look
from posttrain.gate.spec import GateRequest, Scorecard
from posttrain.gate.verdict import judge
from posttrain.model.loading import load_model, load_tokenizer
from posttrain.scoring.evaluate import evaluate
from posttrain.scoring.harness.tasks import preflight
from posttrain.scoring.scorecard import read_scorecard
from posttrain.scoring.systems import Loading
from tests.support.adapters import TASK, Log, base_source_with, write_adapters
from tests.support.tiny import base_source


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(tmp_path_factory.mktemp("looks"))


def quiz(root: Path, **settings: Any) -> GateTask:
    return GateTask(**{"task": str(root / "quiz.yaml"), "role": Role.lift, "metric": "acc", **settings})


def asked(root: Path, out: Path, adapter: str = "good", task: GateTask | None = None, **gate: Any) -> GateRequest:
    base = base_source(root / "base")
    return GateRequest(
        stage="sft", gate=GateConfig(**{"batch_size": 8, **gate}), dtype="float32", tasks={"quiz": task or quiz(root)},
        systems={"base": base, "candidate": base_source_with(base, root / adapter)},
        cache=out / "cache", scorecard=out / "scorecard.jsonl",
    )  # fmt: skip


def scored(request: GateRequest, model: Any = load_model) -> tuple[Scorecard, Log]:
    log = Log()
    return evaluate(request, log, Loading(model, load_tokenizer, "cpu")), log


def answers(card: Scorecard) -> Mapping[tuple[str, int], tuple[str, float]]:
    return {(row.system, row.doc_id): (row.response, row.metrics["acc"]) for row in card.rows}


def never_load(source: ModelSource, dtype: str) -> Any:
    raise AssertionError(f"{source.name} was loaded")


def test_a_large_lift_is_decided_before_all_documents_are_scored(root: Path, tmp_path: Path) -> None:
    request = asked(root, tmp_path, sequential=Sequential.obrien_fleming)
    card, log = scored(request)
    assert card.look == Look(2, 5)
    assert len(card.rows) == 2 * 20  # two fifths of 48 documents, under two systems
    assert log.notes == ["the gate is decided at look 2 of 5: no more documents are scored"]
    verdict = judge(request, card)
    assert (verdict.state, verdict.tasks[0].n) == ("pass", 20)
    assert len(read_scorecard(request.scorecard)) == 40


def test_documents_of_a_look_are_scored_as_in_one_go(root: Path, tmp_path: Path) -> None:
    early, _ = scored(asked(root, tmp_path / "early", sequential=Sequential.obrien_fleming))
    whole, log = scored(asked(root, tmp_path / "whole"))
    assert (len(whole.rows), whole.look, log.notes) == (96, Look(), [])
    assert answers(early).items() <= answers(whole).items()
    assert whole.documents == early.documents == {"quiz": 48}


def test_what_decides_nothing_is_scored_to_the_end(root: Path, tmp_path: Path) -> None:
    request = asked(root, tmp_path, task=quiz(root, min_lift=0.75), sequential=Sequential.obrien_fleming)
    card, _ = scored(request)
    assert card.look.last
    assert len(card.rows) == 96
    assert judge(request, card).tasks[0].n == 48


def test_weights_are_loaded_once_for_all_looks(root: Path, tmp_path: Path) -> None:
    loaded: list[str] = []

    def load(source: ModelSource, dtype: str) -> Any:
        loaded.append(source.name)
        return load_model(source, dtype)

    request = asked(root, tmp_path, task=quiz(root, min_lift=0.75), sequential=Sequential.obrien_fleming)
    card, _ = scored(request, load)
    assert card.look.last
    assert len(loaded) == 1
    whole, _ = scored(asked(root, tmp_path / "whole"))
    assert answers(card) == answers(whole)


def test_looks_that_were_scored_before_load_nothing(root: Path, tmp_path: Path) -> None:
    request = asked(root, tmp_path, sequential=Sequential.obrien_fleming)
    first, _ = scored(request)
    again, _ = scored(request, never_load)
    assert again == first


def test_more_looks_than_documents_are_no_harm(root: Path, tmp_path: Path) -> None:
    request = asked(root, tmp_path, task=quiz(root, limit=3), sequential=Sequential.obrien_fleming, looks=7)
    card, log = scored(request)
    assert len(card.rows) == 6
    assert judge(request, card).state == "undecided"
    assert not log.notes


def with_pages(root: Path, folder: Path, **fields: Any) -> GateTask:
    """Write the questions of the quiz, four to a page, in a file of their own."""
    rows = [json.loads(line) for line in (root / "quiz.jsonl").read_text().splitlines()]
    pages = [{**row, "page": f"page {index // 4}", **fields} for index, row in enumerate(rows)]
    (folder / "pages.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in pages))
    return quiz(root, data=str(folder / "pages.jsonl"), cluster="page")


def test_sources_are_read_from_the_documents(root: Path, tmp_path: Path) -> None:
    request = asked(root, tmp_path, task=with_pages(root, tmp_path))
    card, _ = scored(request)
    assert card.clusters["quiz"][5] == "page 1"
    (task,) = judge(request, card).tasks
    assert task.method == "Student's t over 12 clusters, corrected for skewness"
    assert (task.state, task.n) == ("pass", 48)


def test_looks_take_whole_sources(root: Path, tmp_path: Path) -> None:
    request = asked(root, tmp_path, task=with_pages(root, tmp_path), sequential=Sequential.obrien_fleming, looks=2)
    card, _ = scored(request)
    seen = {row.doc_id for row in card.rows}
    assert len({card.clusters["quiz"][document] for document in seen}) == -(-len(seen) // 4)


@pytest.mark.parametrize("fields", [{"page": None}, {}])
def test_documents_without_a_source_are_rejected_before_training(
    root: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    task = with_pages(root, tmp_path, **fields)
    tasks = {"quiz": task if fields else replace(task, cluster="pages")}
    with pytest.raises(BadInput, match="document 0 has no field page"):
        preflight(tasks)
    with pytest.raises(BadInput, match="document 0 has no field page"):
        scored(asked(root, tmp_path, task=tasks["quiz"]))


def written(folder: Path, root: Path, direction: str) -> GateTask:
    """Write the quiz with a metric of its own, and a direction in its file."""
    (folder / "scoring.py").write_text("def score(doc, results):\n    return {'points': 1.0}\n")
    text = TASK.replace("quiz.jsonl", str(root / "quiz.jsonl")).replace(
        "  - {metric: acc, aggregation: mean, higher_is_better: true}",
        f"  - {{metric: points, aggregation: mean{direction}}}\nprocess_results: !function scoring.score",
    )
    (folder / "own.yaml").write_text(text)
    return GateTask(task=str(folder / "own.yaml"), role=Role.lift, metric="points")


def test_a_metric_whose_direction_nobody_says_is_rejected(root: Path, tmp_path: Path) -> None:
    task = written(tmp_path, root, "")
    with pytest.raises(BadInput, match="does not say whether more points is better"):
        preflight({"own": task})
    for stated in (True, False):
        card, _ = scored(asked(root, tmp_path, task=replace(task, higher_is_better=stated)))
        assert card.higher_is_better == {"quiz": stated}


@pytest.mark.parametrize("declared", [True, False])
def test_a_direction_that_the_task_contradicts_is_rejected(root: Path, tmp_path: Path, declared: bool) -> None:
    task = written(tmp_path, root, f", higher_is_better: {str(declared).lower()}")
    preflight({"own": task})
    preflight({"own": replace(task, higher_is_better=declared)})
    with pytest.raises(BadInput, match=r"tasks\.own\.higher_is_better: is .* but for the task (more|less) points"):
        preflight({"own": replace(task, higher_is_better=not declared)})


def test_a_gate_on_a_half_asks_its_documents_alone_and_the_same_of_each(root: Path, tmp_path: Path) -> None:
    whole, _ = scored(asked(root, tmp_path / "whole"))
    cards = {}
    for half in (Half.choosing, Half.judging):
        request = asked(root, tmp_path / half.value, half=half)
        cards[half], _ = scored(request)
        assert answers(cards[half]).items() < answers(whole).items()
        assert judge(request, cards[half]).state == ("pass" if half is Half.judging else "undecided")
        assert {row.doc_id for row in read_scorecard(request.scorecard)} == {row.doc_id for row in cards[half].rows}
    assert not answers(cards[Half.choosing]).keys() & answers(cards[Half.judging]).keys()
    assert sum(card.documents["quiz"] for card in cards.values()) == 48
