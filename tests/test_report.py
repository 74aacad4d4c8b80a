from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from fakes import Script, only_run, run_recipe, task_verdict, write_project

from posttrain import report


def report_of(folder: Path, **scores: float) -> str:
    """The report of a run in which the SFT stage's verdict holds these figures."""
    write_project(folder)
    run_recipe(Script())
    path = only_run() / "stages/sft/verdict.json"
    verdict = json.loads(path.read_text())
    verdict["tasks"] = [vars(replace(task_verdict("pass"), **scores))]  # type: ignore[arg-type]
    path.write_text(json.dumps(verdict))
    report.write(only_run())
    return (only_run() / "report.md").read_text()


def test_shares_are_shown_in_points(working_folder: Path) -> None:
    text = report_of(working_folder, base=0.25, parent=0.25, candidate=1.0, lift=0.75, low=0.7, high=0.8)
    assert "| sft | some (lift, n 100) | 25.0 | 25.0 | 100.0 | +75.0 [+70.0, +80.0] vs base | pass |" in text


def test_other_scores_are_shown_as_they_are(working_folder: Path) -> None:
    text = report_of(working_folder, base=-231.1, parent=-231.1, candidate=-215.5, lift=15.6, low=12.8, high=18.4)
    assert "| -231.1 | -231.1 | -215.5 | +15.6 [+12.8, +18.4] vs base | pass |" in text


def test_a_report_can_be_made_of_a_run_that_has_not_ended(working_folder: Path) -> None:
    write_project(working_folder)
    run_recipe(Script())
    state = json.loads((only_run() / "run.json").read_text())
    state["stages"][1] |= {"state": "pending", "verdict": None, "seconds": None, "tokens": None}
    (only_run() / "run.json").write_text(json.dumps(state))
    report.write(only_run())
    assert "| dpo |  |  |  |  |  | pending |  |  |" in (only_run() / "report.md").read_text()
