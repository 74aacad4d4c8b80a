"""Boxed mathematics: signs, fractions and units tell answers apart, and what cannot be read is counted by its name."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.questions import read_question
from posttrain.errors import BadInput
from posttrain.rewards import maths
from posttrain.rewards.reward import Attempt, Score
from posttrain.rewards.scorer import choose

REWARD = maths.maths()


@pytest.fixture(scope="module")
def compare() -> Iterator[maths.Comparer]:
    compare = maths.Comparer()
    yield compare
    assert compare._process is not None
    compare._end(compare._process)


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("-5", "−5", "5"),
        (r"-\frac{3}{4}", r"\frac{-3}{4}", r"\frac{3}{4}"),
        (r"\frac12", "0.5", "2"),
        ("1/3", r"\frac{2}{6}", "0.33"),
        (r"5\text{ cm}", r"5\,\mathrm{cm}", r"5\text{ m}"),
        ("5 cm", "5", "5 m"),
        (r"2 \text{ m}^2", r"2\text{ m}^{2}", r"2\text{ m}"),
        (r"50\%", "50", "0.5"),
        ("1,200", "1200", "1.2"),
        ("2x+1", "1+2x", "2x-1"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}", "1"),
        ("7", r"5} no, \boxed{7", r"7} no, \boxed{5"),
    ],
)
def test_equal_mathematics_is_right_and_its_neighbours_are_wrong(
    compare: maths.Comparer, gold: str, right: str, wrong: str
) -> None:
    assert compare([gold], rf"It is \boxed{{{right}}}.") == Score(value=1.0)
    assert compare([gold], rf"It is \boxed{{{wrong}}}.") == Score(value=0.0)


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("It is 5.", maths.NO_BOX),
        (r"It is \boxed{5", maths.NO_BOX),
        (r"It is \boxed{}.", maths.UNREADABLE),
        (r"It is \boxed{5^{}^{.", maths.NO_BOX),
        (r"It is \boxed{\frac{1}}.", maths.UNREADABLE),
        (rf"It is \boxed{{{'1+' * 2000}1}}.", maths.UNREADABLE),
    ],
)
def test_what_cannot_be_read_is_wrong_and_named(compare: maths.Comparer, text: str, note: str) -> None:
    assert compare(["5"], text) == Score(value=0.0, note=note)


def test_any_of_several_answers_is_right(compare: maths.Comparer) -> None:
    assert compare(["3", "-3"], r"\boxed{-3}").value == 1.0


def test_an_endless_comparison_is_ended_in_a_thread_too_and_the_next_one_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(maths, "SECONDS", 2.0)
    compare, found = maths.Comparer(), list[Score]()

    def ask() -> None:
        found.append(compare(["5"], r"\boxed{9^{9^{9^{9}}}!}"))
        found.append(compare(["5"], r"\boxed{5}"))
        assert compare._process is not None
        compare._end(compare._process)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [Score(value=0.0, note=maths.TOO_LONG), Score(value=1.0)]


@pytest.mark.parametrize(
    ("values", "what"),
    [({}, "has no answer"), ({"answer": r"\frac{1}"}, "which cannot be read as mathematics"), ({"answer": "4"}, None)],
)
def test_a_right_answer_that_cannot_be_read_is_named(values: dict[str, Any], what: str | None) -> None:
    found = choose("maths", {"maths": REWARD}, {"maths": "us"}).problems(
        [read_question({"question": "How much?", **values}, "q.jsonl:3")]
    )
    assert [what in each.what for each in found if what] == [True] * bool(what)
    assert bool(found) == bool(what)


def test_answers_are_scored_together_and_one_that_never_ended_is_wrong(tmp_path: Path) -> None:
    asked = read_question({"question": "How much?", "answer": "4"}, "q.jsonl:3")
    scorer = choose("maths", {"maths": REWARD}, {"maths": "us"}, tmp_path)
    attempts = [Attempt(question=asked, text=r"\boxed{4}", ended=ended) for ended in (True, False)]
    assert [each.reward for each in scorer.rate(attempts)] == [1.0, 0.0]
    assert scorer.identities()["maths"].startswith("maths 1 of us, math-verify 0.9")


def test_without_its_package_the_reward_is_rejected_before_anything_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(BadInput, match=r"needs the package math-verify(.|\n)*pip install 'posttrain\[maths\]'"):
        choose("maths", {"maths": REWARD}, {"maths": "us"}).identities()
