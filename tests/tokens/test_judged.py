"""Judged answers in the store: the ids of the renderer, made once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.data.held import HeldRecords
from posttrain.data.records import Conversation, Feedback, Preference
from posttrain.engine.answer_objective import Numbered
from posttrain.engine.stage import judged_answers
from posttrain.errors import BadInput
from posttrain.testing import Recorder
from posttrain.tokens import judged
from posttrain.tokens.chat import ChatRenderer
from posttrain.tokens.judged import JudgedAnswer, Judging, answers_of
from posttrain.tokens.table import TokenTable
from tests.support.tiny import tiny_tokenizer

ASKED = ({"role": "user", "content": "What is a lamp?"},)


def said(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "assistant", "content": text},)


PAIR = Preference(prompt=ASKED, chosen=said("A light."), rejected=said("A lamp is a lamp."), where="p.jsonl:1")
GOOD = Feedback(prompt=ASKED, completion=said("A light."), label=True, where="é.jsonl:2")
RECORDS: Sequence[Preference | Feedback] = [PAIR, GOOD, replace(GOOD, label=False, where="f.jsonl:3"), PAIR]


class Context:
    """What ``judged_answers`` takes of a stage's context."""

    def __init__(self, folder: Path) -> None:
        self.kept = folder
        self.progress = Recorder()
        self.data_workers = 1
        self.parent = type("Parent", (), {"template_variables": ()})
        self.stop_requested = lambda: False
        self.tokenizer = tiny_tokenizer

    def answers(self, records: Sequence[Preference | Feedback]) -> list[JudgedAnswer]:
        return list(judged_answers(self, records))  # type: ignore[arg-type]


def as_lists(answers: Sequence[JudgedAnswer]) -> list[tuple[list[int], list[int], bool, str]]:
    return [(list(each.prompt), list(each.answer), each.label, each.where) for each in answers]


def rendered() -> list[tuple[list[int], list[int], bool, str]]:
    renderer = ChatRenderer(tiny_tokenizer())
    found: list[tuple[list[int], list[int], bool, str]] = []
    for record in RECORDS:
        if isinstance(record, Preference):
            pair = renderer.preference(record)
            found += [(pair.prompt, pair.chosen, True, record.where), (pair.prompt, pair.rejected, False, record.where)]
        else:
            chat = renderer.conversation(Conversation(messages=(*ASKED, *record.completion), where=record.where))
            start, end = chat.mask.index(True), len(chat.mask) - chat.mask[::-1].index(True)
            found.append((chat.ids[:start], chat.ids[start:end], record.label, record.where))
    return found


def test_the_store_gives_the_ids_of_the_renderer_once_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []

    def read() -> Sequence[Preference | Feedback]:
        reads.append(1)
        return RECORDS

    context, records = Context(tmp_path), HeldRecords.of(read)
    assert as_lists(context.answers(records)) == rendered()
    records.release()
    monkeypatch.setattr(judged, "ChatRenderer", lambda tokenizer: None)  # a second start renders nothing
    again = context.answers(records)
    assert as_lists(again) == rendered()
    assert len(reads) == 1, "what is in the store is not read"
    assert isinstance(again[0].prompt, memoryview), "mapped, not held"


def test_rows_of_the_store_are_content_as_lists_are(tmp_path: Path) -> None:
    from posttrain.engine.answer_objective import AnswerObjective

    class Row:
        def __init__(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
            self.prompt, self.answers, self.aside, self.where = prompt, [("chosen", answer)], (), ""

    content = AnswerObjective.content
    for each in Context(tmp_path).answers(RECORDS):
        mapped, listed = Row(each.prompt, each.answer), Row(list(each.prompt), list(each.answer))
        assert content(None, Numbered(0, mapped)) == content(None, Numbered(0, listed))  # type: ignore[arg-type]


def test_equal_answers_are_rejected_by_their_place() -> None:
    with pytest.raises(BadInput, match=r"p\.jsonl:1: chosen and rejected are the same once rendered"):
        list(Judging(tiny_tokenizer()).rows([replace(PAIR, rejected=PAIR.chosen)]))


def test_no_record_has_no_answer(tmp_path: Path) -> None:
    assert Context(tmp_path).answers([]) == []
    assert not any(tmp_path.iterdir())
    assert list(answers_of(TokenTable.of([]))) == []
