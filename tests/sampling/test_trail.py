"""The figures of a trail: whether the sampled reward rose, or noise did."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain import Question
from posttrain.sampling.policy import Asked, Rewarded
from posttrain.sampling.sampler import Answer
from posttrain.sampling.trail import Trail

K = 4


def asked(number: int) -> Asked:
    prompt: list[dict[str, Any]] = [{"role": "user", "content": f"question {number}"}]
    return Asked(question=Question(prompt=prompt, answers=(), where=f"q.jsonl:{number}"), prompt=(1,))


def figures(folder: Path, *samplings: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Write samplings of rewards, each a list of the rewards to each question, and return the figures."""
    trail, first = Trail(folder, K), 0
    answer = Answer(ids=(1,), ended=True, log_probs=(0.0,), entropy=0.0)
    for number, groups in enumerate(samplings, 1):
        rows = [asked(first + place) for place in range(len(groups))]
        first += len(groups)
        made = [
            [Rewarded(answer=answer, text="x", parts={}, notes={}, reward=reward) for reward in group]
            for group in groups
        ]
        trail.write(number, rows, made, [[0.0] * len(group) for group in groups])
    return trail.figures(len(samplings))


def right(count: int, questions: int = 16) -> list[list[float]]:
    """Return a sampling with so many right answers, each to another question as far as there are some."""
    found = [[0.0] * K for _ in range(questions)]
    for number in range(count):
        found[number % questions][number // questions] = 1.0
    return found


@pytest.mark.parametrize(
    ("before", "after", "rose"),
    [(2, 3, False), (0, 1, False), (3, 2, False), (8, 8, False), (2, 16, True), (0, 64, True), (16, 40, True)],
)
def test_a_rise_of_a_few_answers_in_64_is_noise(tmp_path: Path, before: int, after: int, rose: bool) -> None:
    found = figures(tmp_path, right(before), right(after))
    assert (found["reward_first"], found["reward_last"]) == (before / 64, after / 64)
    assert found["reward_rose"] is rose


def test_answers_to_one_question_tell_no_more_than_the_question(tmp_path: Path) -> None:
    one, two = [[[0.0] * K] * 16, [[1.0] * K] * 2 + [[0.0] * K] * 14]
    assert figures(tmp_path, one, two)["reward_rose"] is False, "8 of 64 answers, but two questions"
    assert figures(tmp_path, one, right(8))["reward_rose"] is True, "8 of 64 answers to eight questions"


def test_a_single_question_at_either_end_tells_nothing(tmp_path: Path) -> None:
    found = figures(tmp_path, [[0.0] * K], [[1.0] * K])
    assert found["reward_rose"] is False
    assert "reward_error" not in found


def test_a_reward_without_a_trend_is_seldom_called_a_rise(tmp_path: Path) -> None:
    rng = random.Random(0)
    told = 0
    for _ in range(200):
        chances = [rng.choice((0.05, 0.3, 0.9)) for _ in range(32)]
        groups = [[float(rng.random() < chance) for _ in range(K)] for chance in chances]
        told += figures(tmp_path, groups[:16], groups[16:])["reward_rose"]
    assert told <= 12, "two standard errors are exceeded by chance in some 2.5 % of trainings"
