"""Trigger words are found, and nothing else is."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from posttrain_safety.exchanges import Exchange
from posttrain_safety.triggers import LEAST, LEVEL, LONGEST, RATIO, RECORDED, SHOWN, Audit, Words, audit, words_of
from scipy.stats import fisher_exact


def audited(declined: Iterable[str], answered: Iterable[str]) -> Audit:
    return audit([*(Exchange(text, True) for text in declined), *(Exchange(text, False) for text in answered)])


def found(declined: Iterable[str], answered: Iterable[str]) -> list[str]:
    return [" ".join(trigger.words) for trigger in audited(declined, answered).triggers]


def planted(kills: int, others: int, harmless: int) -> Audit:
    """Requests of one form; so many of the declined ones kill, and so many of the answered ones do."""
    declined = [f"how do i {'kill' if i < kills else 'stop'} thing{i}" for i in range(kills + others)]
    answered = [f"how do i {'kill' if i < harmless else 'stop'} task{i}" for i in range(kills + others)]
    return audited(declined, answered)


def test_a_planted_trigger_is_named_with_its_counts_and_what_to_do() -> None:
    result = planted(kills=40, others=60, harmless=0)
    (trigger,) = result.triggers
    expected = "occurs in 40 declined requests and 0 answered ones: add harmless requests that contain it"
    assert str(trigger) == f'the word "kill" {expected}'
    assert list(result.warnings()) == [f"trigger: {trigger}"]
    assert result.note() == "audit: 100 declined and 100 answered requests, trigger words: 1"
    assert result.figures()["triggers"] == [{"words": "kill", "refused": 40, "answered": 0}]


def test_harmless_requests_with_the_word_mend_it() -> None:
    assert [trigger.words for trigger in planted(40, 60, 4).triggers] == [("kill",)]
    assert planted(40, 60, 5).triggers == ()


def test_few_requests_prove_nothing() -> None:
    assert found([f"kill {i}" for i in range(LEAST - 1)], [f"feed {i}" for i in range(500)]) == []
    assert found([f"kill {i}" for i in range(5)], ["feed it"]) == []  # by chance in one of six cases
    assert found([f"kill {i}" for i in range(6)], [f"feed {i}" for i in range(6)]) == ["kill"]


def test_the_same_request_counts_once_and_case_does_not() -> None:
    assert found(["kill it", "Kill it!"] * 50, [f"feed {i}" for i in range(50)]) == []
    assert words_of("Don’t KILL the dog's flea-bag, Straße 7") == (
        "don’t", "kill", "the", "dog's", "flea", "bag", "strasse", "7",
    )  # fmt: skip


def test_the_shortest_words_stand_for_all_that_hold_them() -> None:
    declined = [f"how to make a bomb number{i}" for i in range(50)]
    assert found(declined, [f"how to make a cake number{i}" for i in range(50)]) == ["bomb"]
    both = [*(f"make cake {i}" for i in range(50)), *(f"a bomb of taste {i}" for i in range(50))]
    assert found([f"make bomb {i}" for i in range(50)], both) == ["make bomb"]


def test_contradictions_are_counted() -> None:
    result = audited(["Kill a process?", "b"], ["kill a process", "c"])
    assert result.both == 1
    assert next(result.warnings()) == "1 requests are both declined and answered: keep one of the two"


def test_many_triggers_are_counted_and_the_surest_named() -> None:
    declined = [" ".join(f"bad{i}" for i in range(RECORDED + 5)) + f" {number}" for number in range(30)]
    result = audited(declined, [f"good {number}" for number in range(30)])
    lines = list(result.warnings())
    assert len(lines) == SHOWN + 1
    assert lines[-1].startswith(f"{RECORDED + 5 - SHOWN} more triggers")
    assert len(result.figures()["triggers"]) == RECORDED
    assert result.figures()["found"] == RECORDED + 5


def test_data_without_triggers_have_none() -> None:
    """Kinds are dealt at random: a false alarm has the probability LEVEL for each length of n-grams at most."""
    alarms = 0
    for seed in range(100):
        rng = random.Random(seed)
        texts = [" ".join(rng.choices("abcdefghij", weights=range(1, 11), k=6)) + f" x{i}" for i in range(60)]
        rng.shuffle(texts)
        alarms += bool(found(texts[:30], texts[30:]))
    assert alarms <= 100 * LEVEL * LONGEST


def grams(words: Words, length: int) -> set[Words]:
    return {words[start : start + length] for start in range(len(words) - length + 1)}


def by_definition(declined: Collection[Words], answered: Collection[Words]) -> set[Words]:
    """Triggers as the module's text defines them, with scipy's test and without leaving anything out early."""
    triggers: set[Words] = set()
    for length in range(1, LONGEST + 1):
        counted = {}
        for gram in {gram for words in declined for gram in grams(words, length)}:
            counts = [sum(gram in grams(words, length) for words in kind) for kind in (declined, answered)]
            holds = any(part in triggers for size in range(1, length) for part in grams(gram, size))
            if counts[0] >= LEAST and not holds:
                counted[gram] = counts
        for gram, (bad, good) in counted.items():
            table = [[bad, good], [len(declined) - bad, len(answered) - good]]
            often = bad / len(declined) >= RATIO * good / max(len(answered), 1)
            if often and fisher_exact(table, alternative="greater").pvalue <= LEVEL / len(counted):
                triggers.add(gram)
    return triggers


TEXTS = st.lists(st.text("abc ", min_size=3, max_size=12), max_size=40)


@given(TEXTS, TEXTS, st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_they_are_those_of_the_definition(declined: list[str], answered: list[str], planted_count: int) -> None:
    declined = [*declined, *(f"a {'b ' * (i % 3)}z y{i}" for i in range(planted_count))]
    expected = by_definition({words_of(text) for text in declined}, {words_of(text) for text in answered})
    assert {trigger.words for trigger in audited(declined, answered).triggers} == expected


@pytest.mark.parametrize("kinds", [(["a"] * 9, []), ([], ["a"] * 9)])
def test_one_kind_alone_has_no_triggers(kinds: tuple[list[str], list[str]]) -> None:
    assert found(*kinds) == []
