"""The sample of a gate's documents that a training follows: which it has, who asks them, what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.config.schema import GateConfig, GateTask, Role
from posttrain.scoring import plugin
from posttrain.scoring.sample import DOCUMENTS, Sample, sample_gate
from tests.support.tiny import tiny_llama, tiny_tokenizer

(FOLDER,) = plugin.register_eval_tasks()


def own(path: Path, count: int, **settings: Any) -> GateTask:
    rows = [{"question": f"a {number}", "answer": "[a-g0-4]", "match": "regex"} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return GateTask(role=Role.lift, metric="right", task=str(FOLDER / "own_questions.yaml"), data=str(path), **settings)


def sampled(tasks: dict[str, GateTask], **gate: Any) -> Sample:
    notes: list[str] = []
    found = sample_gate(GateConfig(**gate), tasks, tiny_tokenizer(), notes.append)
    assert found is not None, notes
    return found


def chosen(sample: Sample) -> list[list[int]]:
    return [[question.doc_id for question in task.questions] for task in sample.prepared]


def test_a_large_task_has_the_same_seeded_sample_every_time(tmp_path: Path) -> None:
    tasks = {"few": own(tmp_path / "few.jsonl", 5), "many": own(tmp_path / "many.jsonl", 3 * DOCUMENTS)}
    few, many = chosen(sampled(tasks))
    assert few == [0, 1, 2, 3, 4]
    assert len(set(many)) == DOCUMENTS < max(many)
    assert chosen(sampled(tasks)) == [few, many] != chosen(sampled(tasks, seed=1))


def test_it_is_of_the_documents_that_the_gate_asks(tmp_path: Path) -> None:
    task = own(tmp_path / "many.jsonl", 90, limit=9)
    (found,) = chosen(sampled({"mine": task}))
    assert len(found) == 9
    assert max(found) > 9, "the gate's own sample"


def test_several_processes_share_the_documents_and_find_the_same_scores(tmp_path: Path) -> None:
    sample = sampled({"mine": own(tmp_path / "q.jsonl", 5), "other": own(tmp_path / "o.jsonl", 2)}, batch_size=1)
    model, seen = tiny_llama(), list[tuple[int, int]]()
    model.train()
    alone = sample.ask(model, (0, 1), lambda *given: seen.append(given))
    parts = [sample.ask(model, (rank, 3), lambda *given: None) for rank in range(3)]
    assert len(alone) == 7
    assert [sum(scores) for scores in zip(*parts, strict=True)] == alone
    assert model.training
    assert all(total == 7 for _, total in seen)


def test_programs_of_the_model_are_left_to_the_gate(tmp_path: Path) -> None:
    task = own(tmp_path / "q.jsonl", 3)
    programs = GateTask(role=Role.lift, metric="pass@1", task="humaneval", run_code=True)
    assert [each.name for each in sampled({"programs": programs, "mine": task}).tasks] == ["mine"]
    assert sample_gate(GateConfig(), {"programs": programs}, tiny_tokenizer(), print) is None


def test_a_task_that_cannot_be_asked_is_noted() -> None:
    notes: list[str] = []
    task = GateTask(role=Role.lift, metric="right", task=str(FOLDER / "own_questions.yaml"), data="missing.jsonl")
    assert sample_gate(GateConfig(), {"mine": task}, tiny_tokenizer(), notes.append) is None
    assert "the gate is not followed while training: " in notes[0]
