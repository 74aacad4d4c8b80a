"""Records of sampled answers: which answers become pairs, best answers and labels, and which become none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from posttrain.config.on_policy import Keep, OnPolicy
from posttrain.data.questions import read_question
from posttrain.data.records import Conversation, Feedback, Preference
from posttrain.rewards.scorer import choose
from posttrain.rewards.shipped import rewards
from posttrain.sampling.answers import Written
from posttrain.sampling.keeping import Kept, keep, score
from posttrain.testing import tiny_tokenizer
from posttrain.tokens.chat import ChatRenderer

SCORER = choose(
    "exact", {each.name: each for each in rewards()}, dict.fromkeys((each.name for each in rewards()), "us")
)
ASKED = read_question({"question": "the capital?", "answer": "Rome"}, "q.jsonl:1")
ANSWERS = [("Paris", -9.0), ("Oslo", -2.0), ("Rome", -3.0), ("Rome ", -1.0), ("", -1.0), ("<|user|>", -0.5)]


def kept(how: Keep, answers: Sequence[tuple[str, float]] = ANSWERS, cut: Sequence[str] = ()) -> Kept:
    group = [Written(text=text, ended=text not in cut, tokens=4, log_prob=value) for text, value in answers]
    settings = OnPolicy(questions="q.jsonl", keep=how)
    return keep([ASKED], score([ASKED], [group], SCORER), settings, ChatRenderer(tiny_tokenizer()))


def said(turns: Sequence[Any]) -> list[str]:
    return [turn["content"] for turn in turns]


def test_a_pair_is_the_likeliest_best_answer_and_the_likeliest_worst_one_that_can_be_trained_on() -> None:
    found = kept(Keep.pairs)
    (pair,) = found.records
    assert isinstance(pair, Preference)
    assert (said(pair.chosen), said(pair.rejected), pair.where) == (["Rome "], ["Oslo"], "q.jsonl:1")
    assert found.figures["unusable"] == 2
    assert (found.figures["reward"], found.figures["rewards"]) == (
        pytest.approx(2 / 6),
        {"exact": pytest.approx(2 / 6)},
    )


def test_answers_that_never_ended_are_counted_and_never_kept() -> None:
    found = kept(Keep.pairs, cut=["Rome", "Rome "])
    assert (list(found.records), found.figures["never_ended"]) == ([], 2)
    assert "2 never ended" in found.line()


def test_equal_rewards_teach_nothing() -> None:
    found = kept(Keep.pairs, [("Rome", -1.0), (" Rome", -2.0)])
    assert (list(found.records), found.figures["without_spread"]) == ([], 1)


def test_the_best_answer_is_kept_only_where_it_is_good() -> None:
    (best,) = kept(Keep.best).records
    assert isinstance(best, Conversation)
    assert said(best.messages) == ["the capital?", "Rome "]
    assert not kept(Keep.best, [("Oslo", -1.0)]).records


def test_each_different_answer_gets_its_label() -> None:
    found = kept(Keep.labels).records
    assert all(isinstance(each, Feedback) for each in found)
    labels = {said(each.completion)[0].strip(): each.label for each in found if isinstance(each, Feedback)}
    assert labels == {"Paris": False, "Oslo": False, "Rome": True}
    assert len(found) == 3
