"""Declining and helpful answers: told apart, mixed in the stated ratio, rejected when one kind is missing."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from posttrain_safety.exchanges import Exchange, exchanges, has_declined
from posttrain_safety.mixing import Kinds, Mix
from safety_support.records import REFUSAL, conversation, helpful, refusals, settings

from posttrain import BadInput, Conversation, TrainOn

SETTINGS = settings()


def mixed(refusal_count: int, helpful_count: int, share: float = 0.5, seed: int = 0) -> Mix:
    return Mix.of(Kinds(declining=refusals(refusal_count), helpful=helpful(helpful_count)), share, seed)


def test_what_the_record_says_wins_over_how_the_answer_begins() -> None:
    assert has_declined(conversation("a", REFUSAL), SETTINGS)
    assert not has_declined(conversation("a", REFUSAL, refuses=False), SETTINGS)
    assert has_declined(conversation("a", "Nein, das mache ich nicht.", refuses=True), SETTINGS)
    assert not has_declined(conversation("a", "Nein, das mache ich nicht."), SETTINGS)


def test_only_trained_answers_count_each_with_its_own_request() -> None:
    turns = [*conversation("one", REFUSAL).messages, *conversation("two", "Yes.").messages]
    talk = Conversation(messages=tuple(turns), where="a:1")
    assert exchanges(talk, SETTINGS) == [Exchange("one", True), Exchange("two", False)]
    assert exchanges(talk, settings(train_on=TrainOn.last)) == [Exchange("two", False)]
    turns[1] = {**turns[1], "train": False}
    assert exchanges(Conversation(messages=tuple(turns), where="a:1"), SETTINGS) == [Exchange("two", False)]


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (refusals(40), r"safety\.data: holds 40 declining answers and no helpful one"),
        (helpful(7), r"safety\.data: holds 7 helpful answers and no declining one.*\n.*refuses: true"),
    ],
)
def test_one_kind_alone_is_rejected_by_name(records: list[Conversation], expected: str) -> None:
    with pytest.raises(BadInput, match=expected):
        Kinds.of(records, SETTINGS, "safety")


@given(
    st.integers(1, 60), st.integers(1, 60), st.floats(0.0, 1.0, exclude_min=True, exclude_max=True), st.integers(0, 9)
)
def test_an_epoch_has_as_many_records_as_the_data_in_the_stated_ratio(
    refusal_count: int, helpful_count: int, share: float, seed: int
) -> None:
    mix = mixed(refusal_count, helpful_count, share, seed)
    total = refusal_count + helpful_count
    assert len(mix.records) == total
    assert abs(len(mix.declining.taken) - share * total) <= 1
    for portion in (mix.declining, mix.helpful):
        times = Counter(record.where for record in portion.taken)
        assert portion.taken
        assert max(times.values()) <= math.ceil(len(portion.taken) / portion.records)
        assert len(times) == min(portion.records, len(portion.taken))  # none is left out while another is repeated
    assert mixed(refusal_count, helpful_count, share, seed).records == mix.records


def test_data_in_the_ratio_is_trained_as_it_is() -> None:
    mix = mixed(6, 6)
    assert sorted(record.where for record in mix.records) == sorted(r.where for r in [*refusals(6), *helpful(6)])
    assert list(mix.warnings(2)) == []


def test_seeds_draw_other_records() -> None:
    drawn = [{record.where for record in mixed(10, 90, seed=seed).helpful.taken} for seed in (0, 1)]
    assert drawn[0] != drawn[1]


def test_notes_warnings_and_figures_say_what_is_drawn() -> None:
    mix = mixed(10, 90)
    assert list(mix.notes()) == [
        "declining answers: 50 of 100 records, drawn from 10, each 5.0 times",
        "helpful answers: 50 of 100 records, drawn from 90",
    ]
    (line,) = mix.warnings(2)
    assert "10 declining answers are trained 10.0 times each" in line
    assert mix.figures() == {
        "refusal_share": 0.5,
        "refusals": {"records": 10, "taken": 50},
        "helpful": {"records": 90, "taken": 50},
    }


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, math.nan])
def test_a_share_that_leaves_one_kind_is_out_of_range(share: float) -> None:
    assert [setting for setting, _ in settings(refusal_share=share).problems()] == ["refusal_share"]
    assert settings(refusal_share=0.3).problems() == []
