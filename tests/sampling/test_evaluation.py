"""Greedy answers to questions set aside: their reward beside the share of right ones, and one that leaves it behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.questions import read_question
from posttrain.engine.config import SampledConfig
from posttrain.sampling.evaluation import GreedyReward
from posttrain.sampling.gate import GateCourse
from posttrain.sampling.policy import Asked, Rewarded
from posttrain.sampling.sampler import Answer
from posttrain.sampling.trail import Trail
from posttrain.testing.recording import Recorder

ROWS = [
    Asked(question=read_question({"question": text, **more}, f"q.jsonl:{number}"), prompt=[number])
    for number, (text, more) in enumerate([("one?", {"answer": "1"}), ("two?", {"answer": "2"}), ("write", {})])
]


class Saying:
    """A policy that says the same texts, each rewarded by its length."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def answer(self, *given: Any) -> list[list[Rewarded]]:
        return [
            [
                Rewarded(
                    answer=Answer(ids=(1,), ended=text != "cut", log_probs=(0.0,), entropy=0.0), text=text, parts={},
                    notes={}, reward=float(len(text)),
                )
            ]
            for text in self.texts
        ]  # fmt: skip


def measured(folder: Path, *steps: Sequence[str]) -> tuple[GreedyReward, list[dict[str, float]]]:
    made: Any = GreedyReward
    gate = GateCourse(sample=None, progress=Recorder())
    found = made(rows=ROWS, config=SampledConfig(), policy=None, trail=Trail(folder, 2), gate=gate)
    figures = []
    for number, texts in enumerate(steps):
        found.policy = Saying(*texts)
        figures.append(found.measure(number, None, "float32"))
    return found, figures


def test_the_share_of_right_answers_is_that_of_questions_that_have_one(tmp_path: Path) -> None:
    found, figures = measured(tmp_path, ["1", "no", "x"], ["1", "2", "long"])
    assert [each["eval_right"] for each in figures] == [0.5, 1.0]
    assert found.figures()["eval_right_first"] == 0.5
    assert found.gone_apart() == []


@pytest.mark.parametrize(
    ("last", "told"),
    [
        (["1 and more", "nothing", "the rest"], True),
        (["1 and more", "no", "x"], False),
        (["1", "no", "a longer text"], False),
        (["", "no", ""], False),
    ],
)
def test_a_reward_that_rises_beyond_noise_while_no_more_answers_are_right_is_named(
    tmp_path: Path, last: list[str], told: bool
) -> None:
    found, _ = measured(tmp_path, ["1", "no", "x"], last)
    assert bool(found.gone_apart()) is told
    assert not told or "and no more of them are right (50.0%, then " in found.gone_apart()[0]
