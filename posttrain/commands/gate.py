"""``posttrain gate``: one gate about an adapter or a model that is there already, for CI."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from posttrain import environment
from posttrain.config.compose import compose
from posttrain.config.regression import Gating
from posttrain.config.schema import GateTask, OnFail
from posttrain.config.typed import check_resolved, conform_gate_tasks
from posttrain.disk import replace_text
from posttrain.errors import BadInput, Interrupted, PosttrainError, Problem
from posttrain.gate.procedure import STATES, policy_for, verdict_error
from posttrain.host import plugins
from posttrain.host.guard import DISK_ERRORS
from posttrain.host.plugins import Host
from posttrain.regression.gate import Outcome, gate, is_scores
from posttrain.scoring.checks import check_backend, check_tasks

if TYPE_CHECKING:
    from posttrain.report.run import RunReport

SUMMARY = "GITHUB_STEP_SUMMARY"
"""Names the file that GitHub shows with a job."""


def gate_command(words: list[str]) -> int:
    """Judge, print the table, and write what was asked for; raises GateRefused and GateUndecided after that."""
    host = plugins.load()
    name, gating, tasks, problems = gated(host, words)
    with _files_named(gating):
        outcome = _outcome(name, gating, tasks, problems, host)
        report = _report(name, outcome)
        _print(report)
        _tell(gating, report, outcome)
    return _code(gating, outcome)


def _outcome(
    name: str, gating: Gating, tasks: Mapping[str, GateTask], problems: Sequence[Problem], host: Host
) -> Outcome:
    """What the gate says; where it says nothing, the files that were asked for tell why."""
    try:
        if problems:
            raise BadInput(problems)
        environment.prepare()
        from posttrain.run.display import Display

        with _files_named(gating):
            return gate(name, gating, tasks, host, Display())
    except PosttrainError as error:
        _tell_error(name, gating, error)
        raise


@contextlib.contextmanager
def _files_named(gating: Gating) -> Iterator[None]:
    """What the disk or the rights of the user forbid is told with the file's name."""
    try:
        yield
    except OSError as error:
        place, reason = error.filename2 or error.filename or gating.output_root, error.strerror
        if error.errno in DISK_ERRORS:
            raise Interrupted(f"{reason}: {place}. What was answered until then is kept: make room") from error
        if error.filename is None:
            raise
        fix = "Give files and an output_root that this user can read and write"
        raise BadInput(Problem(where=str(place), what=f"cannot be read or written: {reason}", fix=fix)) from error


def gated(host: Host, words: list[str]) -> tuple[str, Gating, Mapping[str, GateTask], list[Problem]]:
    """The gate's name, the settings, the gate's tasks, and why they cannot be used.

    Raises BadInput with every problem of settings that are missing, misspelt or of the wrong type.
    """
    flags = {"--update-baseline": "update_baseline=true"}
    composition = compose(host, [flags.get(word, word) for word in words], "gate")
    config, problems = composition.config, list(composition.problems)
    problems += [problem for key in map(str, config) for problem in check_resolved(config, key)]
    if problems:
        raise BadInput(problems)
    gating: Gating = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Gating), config))  # type: ignore[assignment]
    tasks = conform_gate_tasks("gate", gating.gate, host, problems)
    problems += _contradictions(gating)
    found = [*check_backend(gating.gate), *check_tasks(tasks)]
    problems += [replace(problem, where=f"gate.{problem.where}") for problem in found]
    return composition.recipe, gating, tasks, problems


def _contradictions(gating: Gating) -> list[Problem]:
    problems = []
    if not gating.gate.enabled:
        problems.append(Problem(where="gate", what="this gate is switched off", fix="Choose one that asks something"))
    if gating.update_baseline and (gating.baseline is None or not is_scores(gating.baseline)):
        what = "there is no file to write the scores to"
        problems.append(Problem(where="update_baseline", what=what, fix="Add baseline=FILE.json"))
    return problems


def _report(name: str, outcome: Outcome) -> RunReport:
    """The outcome in the form of a run's report, with the candidate as its only stage."""
    from posttrain.report.run import RunReport, StageReport
    from posttrain.run.directory import RunState, StageState

    verdict, candidate = outcome.verdict, outcome.candidate
    stage = StageState(name=candidate.source.name, kind="gate", state=STATES[verdict.state], verdict=verdict.state)
    ended = "done" if verdict.state == "pass" else stage.state
    return RunReport(
        path=outcome.folder,
        run=RunState(recipe=name, state=ended, stages=[stage]),
        stages=(StageReport(entry=stage, verdict=verdict),),
    )


def _print(report: RunReport) -> None:
    from posttrain.report.table import print_table, table_console

    console = table_console()
    print_table(report, console)
    console.print(f"{report.path / 'scorecard.jsonl'}", style="dim", highlight=False, soft_wrap=True)


def _tell(gating: Gating, report: RunReport, outcome: Outcome) -> None:
    """Write the verdict for those who read files."""
    from posttrain.report.junit import junit
    from posttrain.report.summary import summary

    _write(gating.junit, junit(report))
    _summarise(gating, summary(report, outcome.rows))


def _tell_error(name: str, gating: Gating, error: PosttrainError) -> None:
    """Write that there is no verdict, and why."""
    from posttrain.report.junit import junit_error
    from posttrain.report.summary import summary_error

    _write(gating.junit, junit_error(name, error))
    _summarise(gating, summary_error(name, gating.adapter, str(error), error.exit_code))


def _summarise(gating: Gating, text: str) -> None:
    _write(gating.markdown, text)
    if path := os.environ.get(SUMMARY):
        with Path(path).open("a", encoding="utf-8") as stream:
            stream.write(text)


def _write(path: str | None, text: str) -> None:
    if path is not None:
        file = Path(path).expanduser()
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, text)


def _code(gating: Gating, outcome: Outcome) -> int:
    """0 for a pass; a verdict that the gate only warns of is one, too."""
    if policy_for(gating.gate, outcome.verdict.state) in (None, OnFail.warn):
        return 0
    raise verdict_error(str(outcome.candidate.path), outcome.verdict)
