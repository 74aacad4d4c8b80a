"""``posttrain gate``: one gate about an existing adapter or model, for CI."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from posttrain import environment
from posttrain.config.compose import compose
from posttrain.config.launch import Launcher
from posttrain.config.regression import RegressionConfig
from posttrain.config.schema import GateTask, Half, OnFail
from posttrain.config.sources import shipped_resolvers
from posttrain.config.typed import check_resolved, conform_gate_tasks, empty_names, without_results
from posttrain.disk import explain_error, replace_text
from posttrain.errors import BadInput, PosttrainError, Problem
from posttrain.gate.procedure import policy_for, verdict_error
from posttrain.host import plugins
from posttrain.host.plugins import Host
from posttrain.launch.shape import in_slurm_job, launch_problems
from posttrain.regression.baseline import missing_baseline
from posttrain.regression.gate import Outcome, is_scores, judge_adapter
from posttrain.report import PAGE, write_gate
from posttrain.scoring.checks import check_backend, check_tasks

if TYPE_CHECKING:
    from posttrain.report.run import RunReport

SUMMARY = "GITHUB_STEP_SUMMARY"
"""Variable with the path of the file that GitHub shows with a job."""


def main(words: list[str]) -> int:
    """Judge, print the table and write the files that were asked for; only then raise GateFailed or GateUndecided."""
    host = plugins.load()
    name, settings, tasks, problems = read_settings(host, words)
    with _naming_files(settings):
        outcome = _judge(name, settings, tasks, problems, host)
        report = _make_report(name, outcome, words)
        _print(report, outcome)
        _write_reports(settings, report, outcome)
    return _exit_code(settings, outcome)


def _judge(
    name: str, settings: RegressionConfig, tasks: Mapping[str, GateTask], problems: Sequence[Problem], host: Host
) -> Outcome:
    """Judge the adapter; when there is no verdict, write the reason into the files that were asked for."""
    try:
        if problems:
            raise BadInput(problems)
        environment.prepare()
        from posttrain.run.display import Display

        with _naming_files(settings):
            return judge_adapter(name, settings, tasks, host, Display())
    except PosttrainError as error:
        _write_error(name, settings, error)
        raise


@contextlib.contextmanager
def _naming_files(settings: RegressionConfig) -> Iterator[None]:
    """Name the file in errors of the disk and of permissions."""
    try:
        yield
    except OSError as error:
        if (known := explain_error(error, Path(settings.output_root))) is None:
            raise
        raise known from error


def read_settings(host: Host, words: list[str]) -> tuple[str, RegressionConfig, Mapping[str, GateTask], list[Problem]]:
    """Return the gate's name, the settings, the gate's tasks, and the reasons why they cannot be used.

    Raises BadInput with every problem of settings that are missing, misspelt or of the wrong type.
    """
    flags = {"--update-baseline": "update_baseline=true"}
    composition = compose(host, [flags.get(word, word) for word in words], "gate")
    config, problems = composition.config, list(composition.problems)
    for line in composition.shadows:
        print(line, file=sys.stderr)
    with shipped_resolvers():
        problems += [*check_resolved(config, map(str, config)), *empty_names(config, map(str, config))]
        if problems:
            raise BadInput(without_results(problems))
        merged = OmegaConf.merge(OmegaConf.structured(RegressionConfig), config)
        settings: RegressionConfig = OmegaConf.to_object(merged)  # type: ignore[assignment]
    tasks = conform_gate_tasks("gate", settings.gate, host, problems)
    problems += _find_contradictions(settings)
    found = [*check_backend(settings.gate, settings.adapter), *check_tasks(tasks)]
    problems += [replace(problem, where=f"gate.{problem.where}") for problem in found]
    return composition.recipe, settings, tasks, problems


def _find_contradictions(settings: RegressionConfig) -> list[Problem]:
    problems = []
    if not settings.gate.enabled:
        problems.append(Problem(where="gate", what="this gate is switched off", fix="Choose a gate with tasks"))
    if settings.gate.half is Half.choosing:
        what = "this half promotes nothing, so nothing can pass"
        problems.append(Problem(where="gate.half", what=what, fix="Leave it out, or give judging"))
    if settings.update_baseline and (settings.baseline is None or not is_scores(settings.baseline)):
        what = "there is no file to write the scores to"
        problems.append(Problem(where="update_baseline", what=what, fix="Add baseline=FILE.json"))
    if settings.baseline is not None and is_scores(settings.baseline) and not settings.update_baseline:
        problems += missing_baseline(Path(settings.baseline).expanduser())
    if settings.launch.kind is Launcher.slurm and not in_slurm_job():
        what = "posttrain gate queues no Slurm job"
        problems.append(Problem(where="launch", what=what, fix="Run it inside of one, or use launch=local"))
        return problems
    return [*problems, *launch_problems(settings.launch)]


def _make_report(name: str, outcome: Outcome, words: Sequence[str]) -> RunReport:
    """Return the outcome in the form of a run's report."""
    from posttrain.model import llama
    from posttrain.report.run import GateRecord, gate_report
    from posttrain.run.job import versions

    command, source = ["posttrain", "gate", *words], outcome.candidate.source
    behind = {llama.PACKAGE: llama.version()} if source.llama else {}
    record = GateRecord(gate=name, candidate=source.name, command=command, versions={**versions(), **behind})
    return gate_report(outcome.folder, record, outcome.verdict)


def _print(report: RunReport, outcome: Outcome) -> None:
    from posttrain.report.table import print_table, table_console

    console = table_console()
    print_table(report, console)
    for name in ("scorecard.jsonl", PAGE):
        console.print(f"{report.path / name}", style="dim", soft_wrap=True)
    if ".lossy." in outcome.candidate.path.name and outcome.verdict.state == "pass":
        console.print("the artifact's card says so; the same export names the file without .lossy", style="dim")


def _write_reports(settings: RegressionConfig, report: RunReport, outcome: Outcome) -> None:
    """Write the verdict as a page beside its scores, as JUnit XML and as Markdown."""
    from posttrain.report.junit import junit
    from posttrain.report.summary import summary
    from posttrain.scoring.scorecard import read_questions

    write_gate(report)
    _write(settings.junit, junit(report))
    asked = outcome.folder / "questions.jsonl"
    _write_summary(settings, summary(report, outcome.rows, read_questions(asked) if asked.is_file() else {}))


def _write_error(name: str, settings: RegressionConfig, error: PosttrainError) -> None:
    """Write into the same files why there is no verdict."""
    from posttrain.report.junit import junit_error
    from posttrain.report.summary import summary_error

    _write(settings.junit, junit_error(name, error))
    _write_summary(settings, summary_error(name, settings.adapter, str(error), error.exit_code))


def _write_summary(settings: RegressionConfig, text: str) -> None:
    _write(settings.markdown, text)
    if path := os.environ.get(SUMMARY):
        with Path(path).open("a", encoding="utf-8") as stream:
            stream.write(text)


def _write(path: str | None, text: str) -> None:
    if path is not None:
        file = Path(path).expanduser()
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, text)


def _exit_code(settings: RegressionConfig, outcome: Outcome) -> int:
    """Return 0 for a pass, and for a verdict that the gate only warns about; raise the verdict's error otherwise."""
    if policy_for(settings.gate, outcome.verdict.state) in (None, OnFail.warn):
        return 0
    raise verdict_error(str(outcome.candidate.path), outcome.verdict)
