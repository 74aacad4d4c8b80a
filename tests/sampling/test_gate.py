"""The course of a gate while a policy is trained: what is told of it, and what happens when it cannot be asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from posttrain.config.schema import Role
from posttrain.errors import BadInput, Problem
from posttrain.sampling.gate import GateCourse, SampledTask
from posttrain.testing.recording import Recorder
from posttrain.testing.tiny import tiny_llama


class Documents:
    """A sample whose scores are given: one list for each time it is asked."""

    def __init__(self, *scores: Sequence[float] | Exception, role: Role = Role.lift, more: bool = True) -> None:
        self.given = [*scores]
        self.tasks = [
            SampledTask(name=name, metric="right", role=role, higher_is_better=more, documents=2) for name in ("a", "b")
        ]

    def ask(self, model: Any, place: tuple[int, int], report: Callable[[int, int], None]) -> Sequence[float]:
        report(0, 4)
        found = self.given.pop(0)
        if isinstance(found, Exception):
            raise found
        return found


class Whole:
    """An engine whose weights are whole."""

    def __init__(self) -> None:
        self.model = tiny_llama()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        yield


def followed(sample: Documents) -> tuple[GateCourse, Recorder, list[dict[str, float]]]:
    told = Recorder()
    course, engine = GateCourse(sample=sample, progress=told), Whole()
    return course, told, [course.measure(step, engine, "float32") for step in range(len(sample.given))]  # type: ignore[arg-type]


def test_each_task_has_its_mean_and_both_ends_are_kept() -> None:
    course, told, found = followed(Documents([0, 1, 1, 1], [1, 1, 0, 1]))
    assert found == [{"eval_gate_a": 0.5, "eval_gate_b": 1.0}, {"eval_gate_a": 1.0, "eval_gate_b": 0.5}]
    assert told.notes[1] == "gate, a sample after step 1: a 1.000, b 0.500"
    ends = {name: (each["first"], each["last"]) for name, each in course.figures()["gate_sample"].items()}
    assert ends == {"a": (0.5, 1.0), "b": (1.0, 0.5)}


@pytest.mark.parametrize(
    ("role", "more", "before", "after", "told"),
    [
        (Role.lift, True, [0, 1], [0, 1], True),
        (Role.lift, True, [0, 1], [0, 0], True),
        (Role.lift, True, [0, 1], [1, 1], False),
        (Role.lift, True, [1, 1], [1, 1], False),
        (Role.lift, False, [1.5, 2], [1, 1], False),
        (Role.lift, False, [1, 1], [1, 1], True),
        (Role.guard, True, [0, 1], [0, 0], False),
    ],
)
def test_a_lift_that_does_not_follow_the_reward_is_named(
    role: Role, more: bool, before: list[float], after: list[float], told: bool
) -> None:
    course, _, _ = followed(Documents([*before, *before], [*after, *after], role=role, more=more))
    found = course.left_behind(0.1, 0.6)
    assert len(found) == 2 * told
    line = "the sampled reward rose from 0.100 to 0.600, and the gate did not follow (a, right: "
    assert not told or line in found[0]


@pytest.mark.parametrize(
    "fault", [BadInput(Problem(where="tasks.a", what="its function fails")), torch.OutOfMemoryError("no memory")]
)
def test_a_gate_that_fails_is_followed_no_more(fault: Exception) -> None:
    course, told, found = followed(Documents([0, 0, 0, 0], fault, [1, 1, 1, 1]))
    assert [bool(each) for each in found] == [True, False, False]
    assert not course.is_followed
    assert any("the gate is not followed any more: " in note and str(fault) in note for note in told.notes)
    assert course.figures() == {} == course.state()
    assert course.left_behind(0.1, 0.6) == []


def test_a_checkpoint_keeps_the_scores_before_training_of_the_same_documents_alone() -> None:
    course, _, _ = followed(Documents([0, 1, 0, 0]))
    resumed = GateCourse(sample=Documents([1, 1, 1, 1]), progress=Recorder())
    resumed.restore(course.state())
    resumed.measure(4, Whole(), "float32")  # type: ignore[arg-type]
    assert resumed.figures()["gate_sample"]["a"]["first"] == 0.5
    other = GateCourse(sample=Documents(), progress=Recorder())
    other.restore({name: each[:3] for name, each in course.state().items()})
    assert other.figures() == {}
