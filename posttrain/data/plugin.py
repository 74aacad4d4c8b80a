"""The core's data plugin: checks the sources of every step, and reads their records."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from posttrain.config.schema import Half, Role
from posttrain.errors import BadInput, Problem
from posttrain.hookspecs import hookimpl
from posttrain.host.readers import Reader

if TYPE_CHECKING:
    from posttrain.config.schema import Source
    from posttrain.data.records import Record
    from posttrain.plan import Plan, Step

WHY_NOT = {
    "preferences": "its loss compares two answers to a prompt, and a replayed record has one",
    "feedback": "its loss asks for each answer if it is good, and a replayed record does not say",
    "questions": "it learns from answers that it samples, and a replayed record has a written one",
}
"""Reasons why a stage cannot replay, by the shape of its records."""
OTHER_LOSS = "its loss is not that of SFT, which replayed records have"


@hookimpl
def register_readers() -> Sequence[Reader]:
    """Return the format of lines of JSON under its other ending."""
    return [Reader(name="JSON", suffix=".ndjson", version="1", read=_read_lines)]


def _read_lines(file: BinaryIO) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    from posttrain.data.rows import BadRow
    from posttrain.data.texts import read_jsonl

    for found in read_jsonl(file, ""):
        where, row = (found.where, found.what) if isinstance(found, BadRow) else found
        yield int(where.removeprefix(":")), row


@hookimpl
def check_plan(plan: Plan) -> Sequence[Problem]:
    """Report sources without files, options out of range, and contradicting shares."""
    problems: list[Problem] = []
    for step in plan.steps:
        replayed = step.sources[len(step.own_sources) :]
        for setting, sources in (("data", step.own_sources), ("replay", replayed), ("eval_data", step.eval_sources)):
            where = f"{step.name}.{setting}"
            problems += [problem for source in sources for problem in _check_source(source, where)]
        problems += [*_check_shares(step), *_check_replay(step)]
    return problems


@hookimpl
def load_records(step: Step) -> Sequence[Record]:
    """Read every source of the step; raises BadInput with file and line of a fault."""
    from posttrain.data.mixing import read_rows

    return read_rows(step.sources, step.stage.records, step.cache, step.config.max_bad_share)


def _check_source(source: Source, where: str) -> Iterator[Problem]:
    from posttrain.data.files import local_files
    from posttrain.data.urls import check_url, is_url

    if source.limit is not None and source.limit < 1:
        what = f"limit of {source.path} is {source.limit}, must be at least 1"
        yield Problem(where=where, what=what, fix="Leave it out to take all records")
    if not 0 < source.weight < math.inf:
        what = f"weight of {source.path} is {source.weight}, must be above 0 and finite"
        yield Problem(where=where, what=what, fix="To take no record, remove the source")
    if not 0 <= source.max_bad_share < 1:
        what = f"max_bad_share of {source.path} is {source.max_bad_share}, must be at least 0 and below 1"
        yield Problem(where=where, what=what, fix="0 stops at any row that cannot be read")
    yield from _check_asked(source, where)
    try:
        if is_url(source.path):
            check_url(source.path)
        else:
            for path in local_files(source.path) or ():
                _check_head(path)
    except BadInput as error:
        yield from (replace(problem, where=f"{where}: {problem.where}") for problem in error.problems)


def _check_head(path: Path) -> None:
    if path.suffix == ".parquet":
        from posttrain.data.tables import check_table

        check_table(path, str(path))


def _check_asked(source: Source, where: str) -> Iterator[Problem]:
    if source.on_policy is None:
        return
    for key, what in source.on_policy.problems():
        yield Problem(where=f"{where}.on_policy.{key}", what=what)
    if source.share is not None or source.weight != 1:
        what = "sampled records have neither a share nor a weight: each is taken once"
        yield Problem(where=where, what=what, fix="Sample more answers (k), or fewer questions (limit)")


def _check_shares(step: Step) -> Iterator[Problem]:
    where = f"{step.name}.data"
    for source in step.eval_sources:
        if source.on_policy is not None:
            what = f"on_policy of {source.path} has no meaning: records of the eval loss are read, never sampled"
            yield Problem(where=f"{step.name}.eval_data", what=what, fix="Give a file, or eval_share")
        if source.share is not None:
            what = f"share {source.share} of {source.path} has no meaning: the eval loss is taken over all its records"
            yield Problem(where=f"{step.name}.eval_data", what=what, fix="Leave it out")
    shared = [source for source in step.own_sources if source.share is not None]
    yield from (problem for source in shared for problem in _check_share(source, where))
    if shared and step.stage.records != "documents":
        what = f"share is of the tokens of documents, but {step.stage.name} trains {step.stage.records}"
        yield Problem(where=where, what=what, fix="Use weight, which counts records")
    elif shared and len(shared) == len(step.own_sources):
        what = "every source has a share, so nothing sets the number of tokens"
        yield Problem(where=where, what=what, fix="Leave share out of one source: all of its records are taken")
    most = 0.0 if step.replay is None else max(step.replay.shares)
    if (total := sum(source.share or 0 for source in shared) + most) >= 1:
        yield Problem(where=where, what=f"the shares sum to {total:g}, which leaves nothing to the other sources")


def _check_share(source: Source, where: str) -> Iterator[Problem]:
    if not 0 < (source.share or 0) < 1:
        yield Problem(where=where, what=f"share {source.share} of {source.path} is not between 0 and 1")
    if source.weight != 1:
        what = f"{source.path} has a share and a weight, a contradiction"
        yield Problem(where=where, what=what, fix="Keep one: share is of the tokens, weight counts records")


def _check_replay(step: Step) -> Iterator[Problem]:
    if step.replay is None:
        return
    where = f"{step.name}.replay"
    yield from _check_share(step.sources[-1], where)
    if not step.config.replays:
        what = f"{step.stage.name} trains {step.stage.records}: {WHY_NOT.get(step.stage.records, OTHER_LOSS)}"
        yield Problem(where=where, what=what, fix="Replay in the sft stage before it, and guard with its gate")
    if step.replay.auto is not None and not _has_guards(step):
        what = "auto searches for the share at which the guards of the stage's gate hold, and it has none"
        yield Problem(where=f"{where}.auto", what=what, fix="Give share, or a gate with a task of role guard")
    if step.replay.auto is not None and step.gate.half is not Half.both:
        what = f"auto chooses on one half of the documents and judges on the other, and half is {step.gate.half.value}"
        yield Problem(where=f"{step.name}.gate.half", what=what, fix="Leave half out, or give replay.share")


def _has_guards(step: Step) -> bool:
    return step.gate.enabled and any(task.role is Role.guard for task in step.tasks.values())
