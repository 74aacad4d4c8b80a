"""``posttrain data``: what preparation does to the rows of a recipe, by stage, source and rule; trains nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rich.table import Table

from posttrain import environment
from posttrain.config.compose import compose
from posttrain.console import DataConsole, styled
from posttrain.data.records import Record
from posttrain.data.stored import JoinedRecords
from posttrain.disk import replace_text
from posttrain.errors import PluginFailed
from posttrain.host import plugins
from posttrain.host.plugins import Host
from posttrain.plan import Plan, Step, make_plan
from posttrain.prepare.kept import Kept
from posttrain.prepare.ledger import Summary, Waterfall
from posttrain.run.job import records_digest
from posttrain.run.prepared import Preparer, describe
from posttrain.saved import plain
from posttrain.tokens.lengths import known_lengths, measure_lengths

JSON = "--json"
PAGE = "audit.html"
"""Name of the page in the folder of a preparation."""


def main(words: list[str]) -> int:
    """Prepare the records of every stage, or take them from the cache, and print the waterfall of its rows."""
    host = plugins.load()
    plan = make_plan(compose(host, [word for word in words if word != JSON]), host)
    environment.prepare()
    console = DataConsole(stderr=JSON in words, soft_wrap=True)
    done = {step.name: found for step in plan.steps if (found := _prepared(plan, host, step, console)) is not None}
    if JSON in words:
        print(json.dumps(_values(plan, done), indent=2))
        return 0
    for name, each in done.items():
        _show(console, name, each)
        console.print(styled(f"the rows themselves: {each.folder / PAGE}"), end="\n\n")
    for line in (line for step in plan.steps for line in _remarks(step)):
        console.print(styled(line))
    return 0


def _prepared(plan: Plan, host: Host, step: Step, console: DataConsole) -> Kept | None:
    """Return a stage's preparation, from the cache without reading a row where that is possible."""
    told: set[str] = set()

    def note(line: str) -> None:  # a damaged preparation is found with and without the records
        if line not in told:
            console.print(styled((f"{step.name:<8}", "bold"), f" {line}"))
        told.add(line)

    preparer = Preparer(plan=plan, host=host, step=step, data_digest=records_digest(step), note=note)
    if not preparer.is_on or all(source.on_policy for source in step.sources):
        return None
    found = preparer.find()
    if found is None or not (found.folder / PAGE).exists() or known_lengths(found, plan.model) is None:
        trained, evaluated = _read(host, step)
        found = found or preparer.prepare(trained, evaluated)
        _write_page(plan, step, found, trained, evaluated)
    return found


def _remarks(step: Step) -> Iterator[str]:
    """Yield a line about rows of a stage that cannot be shown."""
    if not step.config.prepare.enabled:
        yield f"{step.name}: prepare.enabled is false, every row is trained"
    elif asked := ", ".join(_asked(step)):
        where = "the run's report.html has their counts, and its display names their ledger"
        yield f"{step.name}: the parent's answers to {asked} are made and prepared when the stage starts: {where}"


def _asked(step: Step) -> list[str]:
    """Return the sources of questions whose answers become rows when the stage starts."""
    return [source.path for source in step.sources if source.on_policy]


def _write_page(plan: Plan, step: Step, done: Kept, trained: Sequence[Record], evaluated: Sequence[Record]) -> None:
    from posttrain.report.audit import audit_page  # a page that is there already needs no engine of templates

    title = f"{plan.recipe}, {step.name}"
    summary = measure_lengths(done, trained, plan.model)
    records = JoinedRecords(trained, evaluated)
    lines = [*describe(done)[1:], *_remarks(step)]
    text = audit_page(title, done, summary, records, step.config.prepare.near.threshold, lines)
    replace_text(done.folder / PAGE, text)


def _read(host: Host, step: Step) -> tuple[Sequence[Record], Sequence[Record]]:
    evaluation = replace(step, sources=step.eval_sources)
    steps = [step, *([evaluation] if evaluation.sources else [])]
    trained, *evaluated = [host.hook.load_records(step=each) for each in steps]
    if trained is None:
        raise PluginFailed(f"no plugin reads the records of stage {step.name!r}")
    return trained, evaluated[0] if evaluated else ()


def _values(plan: Plan, done: dict[str, Kept]) -> dict[str, Any]:
    summaries = [each.summary for each in done.values()]
    return {
        "recipe": plan.recipe,
        "read": sum(each.read for each in summaries),
        "kept": sum(each.kept for each in summaries),
        "dropped": dict(sum((Counter(each.dropped) for each in summaries), Counter())),
        "asked": {step.name: asked for step in plan.steps if (asked := _asked(step))},
        "stages": {name: plain(each.summary) | {"ledger": str(each.ledger)} for name, each in done.items()},
    }


def _show(console: DataConsole, name: str, done: Kept) -> None:
    """Print the rows of each source of a stage from read to kept, what was found, and the place of the ledger."""
    summary = done.summary
    console.rule(styled(f"{name}: rows"), align="left")
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("source", overflow="fold")
    for title in ("read", *summary.dropped, "kept"):
        table.add_column(title, justify="right")
    for source in (*summary.sources, *_all(summary)):
        counts = [source.read, *(-source.dropped.get(rule, 0) for rule in summary.dropped), source.kept]
        table.add_row(*map(styled, [source.source, *(f"{count:,}" for count in counts)]))
    console.print(table, soft_wrap=False, end="\n\n")
    for line in describe(done):
        console.print(styled(line))
    console.print(styled(f"every row: {done.ledger}"), end="\n\n")


def _all(summary: Summary) -> Iterator[Waterfall]:
    if len(summary.sources) > 1:
        yield Waterfall(source="all", read=summary.read, kept=summary.kept, dropped=summary.dropped)
