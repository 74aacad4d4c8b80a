"""Runs side by side as one static page: lifts, settings that differ, curves, and questions scored otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.errors import ArtifactDamaged
from posttrain.gate.spec import DocumentScore, TaskVerdict
from posttrain.report.curves import main_charts
from posttrain.report.page import environment
from posttrain.report.run import RunReport, StageReport
from posttrain.report.scores import clock, scale_of
from posttrain.scoring.scorecard import Shown

PAGE = "runs.html"
"""Name of the page in the folder of all runs."""
MOST_RUNS = 6
"""Runs whose settings, lifts and curves stand beside each other."""
MOST_ANSWERS = 4
"""Runs whose answers are shown beside each other."""
MOST_DOCUMENTS = 20
"""Documents shown of one task, of those whose scores differ between the runs."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the compared runs."""

    report: RunReport
    differs: Mapping[str, str]
    """Values of the settings in which the runs of its recipe differ."""
    choice: str = ""
    """Its part in a choice of the best; empty outside of one."""

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        return self.report.path.name


@dataclass(frozen=True, kw_only=True)
class Differing:
    """A document whose score differs between runs."""

    asked: Shown
    target: str
    answers: Sequence[tuple[str, float, str]]
    """Name of each run that was asked, its score and its answer."""


def comparison_page(sides: Sequence[Side]) -> str:
    """Render the runs as HTML, in the given order."""
    shown = sides[:MOST_RUNS]
    values = {key: [side.differs.get(key, "") for side in shown] for side in shown for key in side.differs}
    return (
        environment()
        .get_template("comparison.html")
        .render(
            sides=sides,
            settings=[(key, values[key]) for key in sorted(values) if len(set(values[key])) > 1],
            lifts=_lifts(shown),
            times={side.name: clock(sum(stage.seconds or 0.0 for stage in side.report.run.stages)) for side in sides},
            curves=[(name, _curves(name, shown)) for name in _stages(shown)],
            answers=[found for name in _stages(shown) for found in _answers(name, shown[:MOST_ANSWERS])],
            shown=shown,
            most_answers=MOST_ANSWERS,
            most_documents=MOST_DOCUMENTS,
        )
    )


def _stages(sides: Sequence[Side]) -> list[str]:
    return list(dict.fromkeys(stage.name for side in sides for stage in side.report.stages))


def _stage(side: Side, name: str) -> StageReport | None:
    return next((stage for stage in side.report.stages if stage.name == name), None)


def _lifts(sides: Sequence[Side]) -> list[tuple[tuple[str, str, str], list[TaskVerdict | None], list[str]]]:
    """Return every comparison by stage, task and system, with the verdict of each run on it and its text."""
    found: dict[tuple[str, str, str], dict[str, TaskVerdict]] = {}
    for side in sides:
        for stage in side.report.stages:
            for task in stage.verdict.tasks if stage.verdict is not None else ():
                found.setdefault((stage.name, task.task, task.against), {})[side.name] = task
    return [
        (key, [by_run.get(side.name) for side in sides], [_text(by_run.get(side.name)) for side in sides])
        for key, by_run in found.items()
    ]


def _text(task: TaskVerdict | None) -> str:
    if task is None:
        return ""
    scale = scale_of(task)
    return f"{scale.score(task.candidate)}, {scale.interval(task.lift, task.low, task.high)}, n {task.n:,}"


def _curves(name: str, sides: Sequence[Side]) -> list[tuple[str, Any]]:
    """Return the charts of one stage with the name of each run."""
    stages = [(side.name, _stage(side, name)) for side in sides]
    return [(run, chart) for run, stage in stages if stage is not None for chart in main_charts(stage)[:1]]


def _answers(name: str, sides: Sequence[Side]) -> list[tuple[str, str, int, list[Differing]]]:
    """Return the tasks of one stage with the number of documents that the runs score differently, and the first."""
    scores: list[dict[tuple[str, int], DocumentScore]] = []
    prompts: dict[tuple[str, int], Shown] = {}
    metrics: dict[str, str] = {}
    for side in sides:
        stage = _stage(side, name)
        found, asked = _read(side.report, stage) if stage is not None and stage.verdict is not None else ([], {})
        tasks = stage.verdict.tasks if stage is not None and stage.verdict is not None else ()
        metrics |= {task.task: task.metric for task in tasks}
        filters = {(task.task, task.filter) for task in tasks}
        kept = (row for row in found if row.system == "candidate" and (row.task, row.filter) in filters)
        scores.append({(row.task, row.doc_id): row for row in kept})
        prompts |= asked
    differing: dict[str, list[Differing]] = {}
    for task, number in sorted({key for rows in scores for key in rows}):
        metric = metrics[task]
        answered = [rows.get((task, number)) for rows in scores]
        pairs = zip(sides, answered, strict=True)
        known = [(side.name, row) for side, row in pairs if row is not None and metric in row.metrics]
        if len({row.document_hash for _, row in known}) == 1 and len({row.metrics[metric] for _, row in known}) > 1:
            differing.setdefault(task, []).append(
                Differing(
                    asked=prompts.get((task, number), Shown(task, number, "")), target=known[0][1].target,
                    answers=[(run, row.metrics[metric], row.response) for run, row in known],
                )
            )  # fmt: skip
    return [(name, task, len(found), found[:MOST_DOCUMENTS]) for task, found in differing.items()]


def _read(report: RunReport, stage: StageReport) -> tuple[list[DocumentScore], dict[tuple[str, int], Shown]]:
    """Return the scores and the questions of a stage, as far as they can be read."""
    try:
        return report.scores(stage), report.prompts(stage)
    except (OSError, ArtifactDamaged):
        return [], {}
