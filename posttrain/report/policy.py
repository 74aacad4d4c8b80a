"""The reward of an on-policy stage beside its gate, and the answers with the highest reward.

A reward is not the goal. Where it rises and the gate does not, these answers show the reason.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import ArtifactDamaged
from posttrain.gate.spec import FOLLOWED, TaskVerdict, Verdict
from posttrain.report.curves import Chart, charts_of
from posttrain.report.run import RunReport, StageReport
from posttrain.report.scores import Scale, scale_of
from posttrain.saved import read_text

CHARTS = (
    ("reward", "eval_reward", "eval_right"), ("entropy",), ("kl",), ("clipped",),
    ("answer_tokens", "eval_answer_tokens"), ("cut", "eval_cut"), ("spread",),
)  # fmt: skip
"""Metrics of the charts of such a stage; those of one chart share its axes. Beside rewards are the gate's shares."""
DRIFTS = (
    ("answer_tokens", "tokens of a sampled answer", "{:.1f}"),
    ("cut", "sampled answers that never ended", "{:.1%}"),
    ("entropy", "entropy of a sampled token, nats", "{:.3f}"),
    ("kl", "KL divergence from the parent, nats a token", "{:.4f}"),
    ("clipped", "clipped tokens", "{:.1%}"),
)
"""Metrics of length, form and distribution in the course of a training, with their names and formats."""
MOST_ANSWERS = 8
"""Answers shown."""


@dataclass(frozen=True, kw_only=True)
class SampledAnswer:
    """An answer of the trail."""

    step: int
    """Number of the sampling."""
    where: str
    """Place of the question."""
    question: str
    """Its last turn."""
    answer: str
    ended: bool
    """False when it was cut."""
    reward: float


@dataclass(frozen=True, kw_only=True)
class Course:
    """One figure of a stage, before training and at its end."""

    name: str
    before: str
    after: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class PolicyReport:
    """An on-policy stage, as its report shows it."""

    charts: list[Chart]
    courses: list[Course]
    advice: list[str]
    answers: list[SampledAnswer]
    """The answers with the highest reward, the latest of equal ones first."""
    missing: str
    """Reason for which there are no answers; empty when there are some."""


def report_policy(report: RunReport, stage: StageReport) -> PolicyReport | None:
    """Return what a stage was rewarded for; None for one that is not on policy."""
    if not stage.metrics.get("reward"):
        return None
    answers, missing = _best(report.path / "stages" / stage.name / "answers")
    return PolicyReport(
        charts=charts_of(stage, shown_together(stage)),
        courses=[*courses(stage), *_gate(stage.verdict)],
        advice=advise(stage.figures, stage.verdict),
        answers=answers,
        missing=missing,
    )


def shown_together(stage: StageReport) -> list[Sequence[str]]:
    """Return the metrics of each chart of an on-policy stage."""
    followed = [name for name in stage.metrics if name.startswith(FOLLOWED)]
    shares = [name for name in followed if all(0 <= value <= 1 for _, value in stage.metrics[name])]
    return [(*CHARTS[0], *shares), *((name,) for name in followed if name not in shares), *CHARTS[1:]]


def advise(figures: Mapping[str, Any], verdict: Verdict | None) -> list[str]:
    """Return a line where the reward rose by more than noise and its gate did not: it may have learnt the reward."""
    found = _numbers(figures, "reward_first", "reward_last")
    if verdict is None or verdict.state == "pass" or not found or figures.get("reward_rose") is not True:
        return []
    what = f"the reward rose from {found[0]:.3f} to {found[1]:.3f}, and the gate did not follow"
    return [f"{what}: read the answers with the highest rewards in answers/ before training longer"]


def courses(stage: StageReport) -> Iterator[Course]:
    """Yield the figures of an on-policy stage before training and at its end, those of its gate left out."""
    if found := _numbers(stage.figures, "reward_first", "reward_last"):
        ends, note = [f"{each:.3f}" for each in found], "the first and the last tenth of the steps"
        if error := _numbers(stage.figures, "reward_error"):
            note += f", {found[1] - found[0]:+.3f} ± {error[0]:.3f}"
        yield Course(name="reward of sampled answers", before=ends[0], after=ends[1], note=note)
    keys = ("eval_reward_first", "eval_reward", "eval_reward_highest", "eval_reward_highest_step", "eval_questions")
    if found := _numbers(stage.figures, *keys):
        first, last, highest, step, count = found
        note = f"n {count:,.0f}, highest {highest:.3f} at step {step:,.0f}"
        name = "reward of greedy answers to questions set aside"
        yield Course(name=name, before=f"{first:.3f}", after=f"{last:.3f}", note=note)
    if found := _numbers(stage.figures, "eval_right_first", "eval_right"):
        name, note = "right greedy answers to questions set aside", "by a question's own match; no gate asks it"
        yield Course(name=name, before=f"{found[0]:.1%}", after=f"{found[1]:.1%}", note=note)
    for metric, name, text in DRIFTS:
        if points := stage.metrics.get(metric):
            yield Course(name=name, before=text.format(points[0][1]), after=text.format(points[-1][1]))
    yield from _followed(stage.figures)


def _followed(figures: Mapping[str, Any]) -> Iterator[Course]:
    """Yield the scores of the gate's documents that were asked while training."""
    given = figures.get("gate_sample")
    for task, found in given.items() if isinstance(given, Mapping) else ():
        if not isinstance(found, Mapping) or not (ends := _numbers(found, "first", "last", "documents")):
            continue
        scale = Scale.of(*ends[:2])
        yield Course(
            name=f"gate's sample: {task}, {found.get('metric')}", before=scale.score(ends[0]),
            after=scale.score(ends[1]), note=f"{found.get('role')}, n {ends[2]:,.0f}, asked while training",
        )  # fmt: skip


def _numbers(figures: Mapping[str, Any], *keys: str) -> list[float]:
    """Return the values of all ``keys``, or none when one is no number."""
    found = [float(each) for key in keys if isinstance(each := figures.get(key), int | float)]
    return found if len(found) == len(keys) else []


def _gate(verdict: Verdict | None) -> Iterator[Course]:
    """Yield the scores of parent and artifact by each task, with the state of every comparison."""
    tasks: dict[tuple[str, str], list[TaskVerdict]] = {}
    for task in verdict.tasks if verdict is not None else ():
        if task.n and task.role in ("lift", "guard", "limit"):
            tasks.setdefault((task.task, task.metric), []).append(task)
    for compared in tasks.values():
        task, states = compared[0], [f"{each.state} against {each.against}" for each in compared]
        scale = scale_of(task)
        yield Course(
            name=f"gate: {task.task}, {task.metric}", before=scale.score(task.parent),
            after=scale.score(task.candidate), note=", ".join([str(task.role), *states]),
        )  # fmt: skip


def _best(folder: Path) -> tuple[list[SampledAnswer], str]:
    """Return the different answers with the highest reward, and why there are none."""
    found: dict[tuple[str, str], SampledAnswer] = {}
    try:
        for path in sorted(folder.glob("step-*.jsonl")):
            for each in _read(path):
                key = (each.question, each.answer)
                if key not in found or each.reward >= found[key].reward:
                    found[key] = each
    except (OSError, ArtifactDamaged) as error:
        return [], f"the sampled answers: {error}"
    best = heapq.nlargest(MOST_ANSWERS, found.values(), key=lambda each: (each.reward, each.step))
    return best, "" if best else "the sampled answers: this run has none in answers/"


def _read(path: Path) -> Iterator[SampledAnswer]:
    """Yield the answers of a file; leave out lines torn by a kill."""
    step = path.stem.removeprefix("step-")
    for line in read_text(path, errors="replace").splitlines() if step.isdigit() else ():
        try:
            row = json.loads(line)
            yield SampledAnswer(
                step=int(step), where=str(row["where"]), question=str(row["question"]), answer=str(row["answer"]),
                ended=bool(row["ended"]), reward=float(row["reward"]),
            )  # fmt: skip
        except (ValueError, LookupError, TypeError, RecursionError):
            continue
