"""Contamination beside a brute-force oracle of word lists."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.prepare import contamination
from posttrain.prepare.contamination import Contamination, GateDocument, find_contamination

Row = list[tuple[str, str]]


def spelled(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def runs(words: list[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]


def covered_words(words: list[str], known: set[tuple[str, ...]]) -> set[int]:
    return {at + step for at, run in enumerate(runs(words, 8)) if run in known for step in range(8)}


def oracle(rows: list[Row], documents: list[GateDocument]) -> set[tuple[int, str, int, str]]:
    """The rows, documents and sides that the rule names, by comparing each with each."""
    found = set()
    holds = [
        [{run for turn in row for size in range(5, 9) for run in runs(spelled(turn[part]), size)} for row in rows]
        for part in (0, 1)
    ]
    for part, side in enumerate(("prompt", "answer")):
        texts = [spelled((each.prompt, each.target)[part]) for each in documents]
        sizes = [min(len(words), 8) for words in texts]
        counts = Counter(
            (each.task, run)
            for each, words, size in zip(documents, texts, sizes, strict=True)
            for run in set(runs(words, size))
            if size >= 5
        )
        for each, words, size in zip(documents, texts, sizes, strict=True):
            own = {run for run in (runs(words, size) if size >= 5 else []) if counts[each.task, run] <= 10}
            whole = len(covered_words(words, own))
            for row, held in enumerate(holds[part]):
                common = own & held
                if (size < 8 and common) or (size == 8 and 2 * len(covered_words(words, common)) > whole):
                    found.add((row, each.task, each.document, side))
    return found


def text(rng: random.Random, length: int) -> str:
    return " ".join(f"w{rng.randrange(4000)}" for _ in range(length))


def part_of(words: str, share: float, rng: random.Random) -> str:
    """A piece of the words among others."""
    listed = words.split()
    size = round(share * len(listed))
    at = rng.randint(0, len(listed) - size)
    return f"{text(rng, 20)} {' '.join(listed[at : at + size]).upper()}, {text(rng, 5)}"


def planted(seed: int) -> tuple[list[Row], list[GateDocument]]:
    rng = random.Random(seed)
    documents = [
        GateDocument(
            task,
            number,
            f"Here is a question for you and you must answer it well: {text(rng, rng.randint(1, 40))}",
            text(rng, rng.choice([1, 5, 6, 7, 8, 9, 60])),
        )
        for task in ("one", "two")
        for number in range(60)
    ]
    rows: list[Row] = []
    for number in range(500):
        document = rng.choice(documents)
        clean = (text(rng, 30), text(rng, 50))
        kind = number % 4
        if kind == 1:
            clean = (part_of(document.prompt, rng.random(), rng), clean[1])
        elif kind == 2:
            clean = (clean[0], part_of(document.target, rng.choice([0.4, 0.6, 0.8, 1.0]), rng))
        elif kind == 3:  # the other side of the document is no contamination
            clean = (document.target, document.prompt)
        rows.append([(text(rng, 9), text(rng, 9)), clean] if number % 7 == 0 else [clean])
    return rows, documents


def found_in(rows: list[Row], documents: list[GateDocument]) -> set[tuple[int, str, int, str]]:
    return {(row, hit.task, hit.document, hit.side) for row, hit in find_contamination(rows, documents)}


@pytest.mark.parametrize("batch", [7, 2000])
def test_what_is_found_is_what_brute_force_finds(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contamination, "BATCH", batch)
    rows, documents = planted(1)
    expected = oracle(rows, documents)
    assert len({row for row, *_ in expected}) > 80
    assert {side for *_, side in expected} == {"prompt", "answer"}
    assert found_in(rows, documents) == expected


SMALL = st.lists(st.sampled_from("abc"), max_size=14).map(" ".join)


@given(
    st.lists(st.lists(st.tuples(SMALL, SMALL), max_size=3), max_size=6),
    st.lists(st.tuples(st.sampled_from(["one", "two"]), SMALL, SMALL), max_size=14),
)
def test_texts_of_few_words_agree_with_brute_force(rows: list[Row], asked: list[tuple[str, str, str]]) -> None:
    documents = [GateDocument(task, number, *sides) for number, (task, *sides) in enumerate(asked)]
    assert found_in(rows, documents) == oracle(rows, documents)


def test_the_evidence_is_the_longest_run_in_common() -> None:
    rng = random.Random(2)
    words = text(rng, 40).split()
    document = GateDocument("task", 3, " ".join(words), "42")
    row = [(f"{' '.join(words[:10])} {text(rng, 9)} {' '.join(words[15:40])}", "42")]
    (found,) = find_contamination([[("nothing", "of it")], row], [document])
    assert found == (1, Contamination("task", 3, 35 / 40, " ".join(words[15:40]), "prompt", "covered"))


def test_phrases_are_told_apart() -> None:
    rng = random.Random(3)
    words = text(rng, 60).split()
    document = GateDocument("task", 0, " ".join(words), "")
    rows: list[Row] = [[(f"{text(rng, 9)} {' '.join(words[5:end])} {text(rng, 9)}", "")] for end in (17, 18, 40)]
    assert [(row, hit.kind) for row, hit in find_contamination(rows, [document])] == [(2, "covered")]
    found = list(find_contamination(rows, [document], phrases=True))
    assert [(row, hit.kind) for row, hit in found] == [(1, "phrase"), (2, "covered")]
    assert found[0][1].evidence.split() == words[5:18]
    assert found[0][1].covered == pytest.approx(13 / 60)


def test_a_short_document_is_found_word_for_word_alone() -> None:
    documents = [GateDocument("task", 0, "Which city is the capital?", "four words are less")]
    rows: list[Row] = [
        [("Tell me: which CITY is  the capital, please", "four words are less")],
        [("which city was the capital", "")],
        [("city is the capital which", "")],
    ]
    assert [(row, hit.kind, hit.covered) for row, hit in find_contamination(rows, documents)] == [(0, "whole", 1.0)]


def test_a_document_of_a_language_without_spaces_is_found() -> None:
    question = "一列火车三小时行驶二百七十英里，以同样的速度，再行驶四小时能走多少英里？"
    rows: list[Row] = [[("请回答：" + question, "")], [("火车在三小时以后到达了城市，大家都很高兴。", "")]]
    found = find_contamination(rows, [GateDocument("task", 0, question, "")])
    assert [(row, hit.covered) for row, hit in found] == [(0, 1.0)]


def test_nothing_is_found_in_nothing() -> None:
    assert list(find_contamination([], [GateDocument("task", 0, "one", "two")])) == []
    assert list(find_contamination([[("a", "b")], []], [])) == []
    assert list(find_contamination([[], [("", "")]], [GateDocument("task", 0, "", "")])) == []
