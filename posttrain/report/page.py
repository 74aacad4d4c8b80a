"""The report of a run as one self-contained HTML page, without scripts and without requests.

Text of models and data is untrusted: the template engine escapes it, and the policy of the page forbids to act on it.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from posttrain.errors import ArtifactDamaged
from posttrain.quoting import document
from posttrain.report.curves import further_charts, main_charts
from posttrain.report.documents import MOST_DOCUMENTS, TaskChanges, changed_documents, shorten
from posttrain.report.figures import costs, data_figures, trained_share
from posttrain.report.intervals import intervals
from posttrain.report.policy import report_policy, shown_together
from posttrain.report.rows import advice, sources
from posttrain.report.run import RunReport, StageReport, explain_missing
from posttrain.report.scores import clock
from posttrain.report.table import COLUMNS, behind, remarks, shown_columns
from posttrain.saved import read_text
from posttrain.scoring.scorecard import Shown

TONES = {
    "pass": "good", "promoted": "good", "done": "good",
    "fail": "bad", "gate_failed": "bad", "failed": "bad",
    "undecided": "warn", "interrupted": "warn", "warned": "warn", "unpromoted": "warn", "damaged": "bad",
}  # fmt: skip
"""Colour of a state; others have none."""
SYSTEMS = ("base", "parent", "candidate")
"""Columns of the table with a system's score."""
MOST_UNBROKEN = 24
"""Letters of a name's word that are not broken."""
ENDINGS = {
    "done": "The run is complete.",
    "warned": "The run is complete, but it went on after a verdict that was no pass.",
    "running": "The run is not finished; this is its state so far.",
    "gate_failed": "A gate failed an artifact, and the run stopped there.",
    "undecided": "A gate could not decide, and the run stopped there.",
    "interrupted": "The run was interrupted; the command below resumes it.",
    "failed": "The run failed; artifacts published before are kept.",
}
"""The state of a run in a sentence."""


def page(report: RunReport) -> str:
    """Render the run as HTML; name any missing part."""
    names = {stage.entry.digest: stage.name for stage in report.stages if stage.entry.digest is not None}
    return (
        environment()
        .get_template("page.html")
        .render(
            report=report,
            run=report.run,
            promoted=sum(stage.entry.state == "promoted" for stage in report.stages),
            ending=ENDINGS.get(report.run.state, ""),
            seconds=sum(stage.entry.seconds or 0 for stage in report.stages),
            stages=[_stage(report, stage, names) for stage in report.stages],
            costs=costs(report),
            base=_base(report.stages),
            versions=_versions(report.stages),
            command=shlex.join(report.run.command),
            recipe=_recipe(report),
            most=MOST_DOCUMENTS,
            systems={COLUMNS[place]: title for place, title in shown_columns(report) if COLUMNS[place] in SYSTEMS},
        )
    )


@functools.cache
def environment() -> Environment:
    """Return the template engine of pages, which escapes every text."""
    engine = Environment(
        loader=PackageLoader("posttrain.report"),
        autoescape=True,
        finalize=lambda value: document(value) if type(value) is str else value,  # Markup is ours
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters |= {"shorten": shorten, "breakable": breakable, "clock": clock}
    engine.filters["tone"] = lambda state: TONES.get(state, "plain")
    return engine


def breakable(name: str) -> Markup:
    """Return a name that a browser breaks between its words; one longer than MOST_UNBROKEN, after so many letters."""
    words = re.findall(rf"[^_./-]{{1,{MOST_UNBROKEN}}}[_./-]*|[_./-]+", document(name))
    return Markup("<wbr>").join(map(escape, words))


def _stage(report: RunReport, stage: StageReport, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of one stage for the template."""
    tasks = stage.verdict.tasks if stage.verdict is not None else ()
    documents, prompts, missing = _documents(report, stage)
    policy = None if report.is_gate else report_policy(report, stage)
    prepared = stage.prepared
    return {
        "name": stage.name,
        "report": stage,
        "entry": stage.entry,
        "origin": _origin(stage, names),
        "verdict": stage.verdict,
        "intervals": intervals(tasks),
        "charts": main_charts(stage),
        "further": further_charts(stage, shown_together(stage) if policy is not None else ()),
        "policy": policy,
        "share": trained_share(stage),
        "data": data_figures(stage),
        "prepared": prepared,
        "sources": [] if prepared is None else sources(prepared),
        "advice": [] if prepared is None else advice(prepared),
        "documents": documents,
        "prompts": prompts,
        "remarks": remarks(stage.entry),
        "behind": "" if stage.verdict is None else behind(stage.verdict),
        "missing": [*stage.missing, *missing],
    }


def _documents(
    report: RunReport, stage: StageReport
) -> tuple[list[TaskChanges], Mapping[tuple[str, int], Shown], list[str]]:
    """Return the changed documents of a stage, their prompts, and a note of each unreadable part."""
    if stage.verdict is None or not stage.verdict.tasks:
        return [], {}, []
    try:
        found = changed_documents(stage.verdict.tasks, report.scores(stage))
    except (OSError, ArtifactDamaged) as error:
        return [], {}, [f"the answers: {explain_missing(error)}"]
    try:
        return found, report.prompts(stage), []
    except (OSError, ArtifactDamaged) as error:
        return found, {}, [f"the questions: {explain_missing(error)}"]


def _base(stages: Sequence[StageReport]) -> Mapping[str, Any]:
    found = [base for stage in stages if isinstance(base := stage.manifest.get("base"), dict)]
    return {"name": "the base model", "digest": "", **(found[0] if found else {})}


def _origin(stage: StageReport, names: Mapping[str, str]) -> str:
    """Name the parent of a stage: a stage of this run, the base, or an artifact of another run."""
    parent, lineage = stage.entry.parent_digest or "", stage.manifest.get("lineage")
    if parent in names:
        return names[parent]
    return "base" if isinstance(lineage, list) and len(lineage) == 1 else f"artifact {parent}"


def _versions(stages: Sequence[StageReport]) -> Mapping[str, Any]:
    return next((versions for stage in stages if isinstance(versions := stage.manifest.get("versions"), dict)), {})


def _recipe(report: RunReport) -> str:
    """Return the resolved recipe, or an empty text when the file is missing."""
    try:
        return read_text(report.path / "recipe.yaml", errors="replace")
    except (FileNotFoundError, ArtifactDamaged):
        return ""
