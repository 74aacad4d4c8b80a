"""The report of a run as one self-contained HTML page: no script, nothing loaded from anywhere.

Whatever models and data wrote is untrusted: the template engine escapes it, and the page forbids scripts and requests.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from posttrain.errors import ArtifactDamaged
from posttrain.report.curves import further_charts, main_charts
from posttrain.report.documents import SHOWN, Comparison, comparisons, shortened
from posttrain.report.figures import costs, data_figures, trained_share
from posttrain.report.intervals import intervals
from posttrain.report.rows import remarks
from posttrain.report.run import RunReport, StageReport, reason
from posttrain.report.scores import clock

TONES = {
    "pass": "good", "promoted": "good", "done": "good",
    "fail": "bad", "refused": "bad", "failed": "bad",
    "undecided": "warn", "interrupted": "warn",
}  # fmt: skip
"""Colour of a state; others have none."""
ENDINGS = {
    "done": "The run is complete.",
    "running": "The run has not ended: this is how far it has come.",
    "refused": "A gate refused an artifact, and the run stopped there.",
    "undecided": "A gate could not decide, and the run stopped there.",
    "interrupted": "The run was interrupted; the command below goes on with it.",
    "failed": "The run failed; what it had published until then is kept.",
}
"""What the state of a run means to its reader."""


def page(report: RunReport) -> str:
    """The run as an HTML document, whatever of it there is; what is missing is said."""
    names = {stage.state.digest: stage.name for stage in report.stages if stage.state.digest is not None}
    return (
        _environment()
        .get_template("page.html")
        .render(
            report=report,
            state=report.state,
            promoted=sum(stage.state.state == "promoted" for stage in report.stages),
            ending=ENDINGS.get(report.state.state, ""),
            seconds=sum(stage.state.seconds or 0 for stage in report.stages),
            stages=[_stage(report, stage, names) for stage in report.stages],
            costs=costs(report),
            base=_base(report.stages),
            versions=_versions(report.stages),
            command=shlex.join(report.state.command),
            recipe=_recipe(report),
            most=SHOWN,
        )
    )


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("posttrain.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shortened": shortened, "clock": clock, "tone": lambda state: TONES.get(state, "plain")}
    return environment


def _stage(report: RunReport, stage: StageReport, names: Mapping[str, str]) -> dict[str, Any]:
    """What the template shows of one stage."""
    tasks = stage.verdict.tasks if stage.verdict is not None else ()
    documents, prompts, missing = _documents(report, stage)
    return {
        "name": stage.name,
        "report": stage,
        "state": stage.state,
        "origin": _origin(stage, names),
        "verdict": stage.verdict,
        "intervals": intervals(tasks),
        "charts": main_charts(stage),
        "further": further_charts(stage),
        "share": trained_share(stage),
        "data": data_figures(stage),
        "documents": documents,
        "prompts": prompts,
        "remarks": remarks(stage.state),
        "missing": [*stage.missing, *missing],
    }


def _documents(
    report: RunReport, stage: StageReport
) -> tuple[list[Comparison], Mapping[tuple[str, int], str], list[str]]:
    """The documents of a stage's comparisons and what they asked, or why there are none."""
    if stage.verdict is None or not stage.verdict.tasks:
        return [], {}, []
    try:
        found = comparisons(stage.verdict.tasks, report.scores(stage))
    except (OSError, ArtifactDamaged) as error:
        return [], {}, [f"the answers: {reason(error)}"]
    try:
        return found, report.prompts(stage), []
    except (OSError, ArtifactDamaged) as error:
        return found, {}, [f"the questions: {reason(error)}"]


def _base(stages: Sequence[StageReport]) -> Mapping[str, Any]:
    found = [base for stage in stages if isinstance(base := stage.manifest.get("base"), dict)]
    return {"name": "the base model", "digest": "", **(found[0] if found else {})}


def _origin(stage: StageReport, names: Mapping[str, str]) -> str:
    """What a stage was trained from: a stage of this run, the base, or an artifact of another run."""
    parent, lineage = stage.state.parent_digest or "", stage.manifest.get("lineage")
    if parent in names:
        return names[parent]
    return "base" if isinstance(lineage, list) and len(lineage) == 1 else f"artifact {parent}"


def _versions(stages: Sequence[StageReport]) -> Mapping[str, Any]:
    return next((versions for stage in stages if isinstance(versions := stage.manifest.get("versions"), dict)), {})


def _recipe(report: RunReport) -> str:
    """The resolved recipe, or nothing when it is not there."""
    path = report.path / "recipe.yaml"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
