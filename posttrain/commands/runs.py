"""``posttrain runs``: every run below a folder with its state, its lifts, and what differs from the others."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain.commands.arguments import parse
from posttrain.config.expansion import leaves
from posttrain.config.schema import Half
from posttrain.disk import replace_text
from posttrain.errors import ArtifactDamaged, reject, suggest
from posttrain.quoting import cell
from posttrain.report.run import RunReport, read_report
from posttrain.report.scores import clock, scale_of
from posttrain.run.directory import INTERRUPTED

COLUMNS = ("run", "state", "lifts", "time", "differs in")
WITHOUT_INTEREST = ("output_root", "stages", "data_workers", "plugin_timeout", "spend_cap", "price_per_hour", "launch.")
"""Settings on which no result depends."""
CHOICE = (".gate.half", ".gate.chosen_from")
"""Ends of the settings that tell a choice among runs; the state of a run says it."""
HTML = "--html"
MOST_DIFFERENCES = 12
LEAST_NAME = 34
"""Characters of a run's name that stand in one line in the narrowest terminal."""
OTHER_COLUMNS = 76
"""Width of the other columns, one line a lift."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run."""

    run: str
    recipe: str
    state: str
    started: str
    seconds: float | None
    lifts: list[str]
    """One text a stage and task: the lift with its bounds, the system compared with, the decision."""
    differs: dict[str, str]
    """Values of the settings in which the runs of its recipe differ."""
    choice: str = ""
    """Its part in a choice of the best: ``for choosing``, or ``chosen from N``; empty outside of one."""
    resume: str = ""
    """Command that resumes it; empty unless it was interrupted."""


def main(words: list[str]) -> int:
    """Print the runs below ``output_root``, the newest first, or those of one recipe; or write a page of them."""
    given = parse("runs", words, ("output_root", "recipe"), ("table", "markdown", "json"), (HTML,))
    if given.plain and HTML not in given.flags:
        reject(f"runs {given.plain[0]}", "takes no word", f"posttrain runs recipe={given.plain[0]}")
    root = Path(given.settings.get("output_root", "runs"))
    found = rows(root, given.settings.get("recipe"))
    if not found:
        reject(str(root), "holds no such run", "posttrain recipe=quickstart makes one; output_root=DIR looks elsewhere")
    if HTML in given.flags:
        print(_write_page(root, found, given.plain))
    elif given.format == "json":
        print(json.dumps([asdict(row) for row in found], indent=2))
    elif given.format == "markdown":
        lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        print("\n".join([*lines, *(f"| {' | '.join(map(cell, _cells(row, '; ')))} |" for row in found)]))
    else:
        show(found)
    return 0


def _write_page(root: Path, found: Sequence[Row], names: Sequence[str]) -> Path:
    """Write the page that compares the named runs, or all of them, without those whose run.json is damaged."""
    from posttrain.report.comparison import PAGE, Side, comparison_page

    known = {row.run: row for row in found if row.recipe}
    for name in names:
        if name not in known:
            reject(f"runs {name}", "is no run here that can be read", suggest(name, known))
    chosen = [known[name] for name in names] or list(known.values())
    sides = [Side(report=read_report(root / row.run), differs=row.differs, choice=row.choice) for row in chosen]
    text = comparison_page(sides).encode("utf-8", "replace").decode("utf-8")
    replace_text(root / PAGE, text)
    return root / PAGE


def rows(root: Path, recipe: str | None = None) -> list[Row]:
    """Return the runs below a folder, the newest first; one whose run.json is damaged says so in its state."""
    reports: dict[Path, RunReport | str] = {}
    for path in root.glob("*/run.json"):
        try:
            reports[path.parent] = read_report(path.parent)
        except (ArtifactDamaged, OSError) as error:
            reports[path.parent] = f"damaged: {error}"
    settings = {path: _settings(path) for path in reports}
    names = {path: path.name if isinstance(report, str) else report.run.recipe for path, report in reports.items()}
    found = []
    for path, report in reports.items():
        alike = [settings[other] for other in reports if names[other] == names[path]]
        differs = _differences(settings[path], alike)
        if isinstance(report, str):
            row = Row(run=path.name, recipe="", state=report, started="", seconds=None, lifts=[], differs={})
        else:
            row = Row(
                run=path.name, recipe=report.run.recipe, state=report.run.state, started=report.run.started or "",
                seconds=sum(stage.seconds or 0.0 for stage in report.run.stages) or None,
                lifts=list(_lifts(report)), differs=differs, choice=_choice(settings[path]),
                resume=shlex.join(report.run.command) if report.run.state == INTERRUPTED else "",
            )  # fmt: skip
        found.append(row)
    chosen = [row for row in found if recipe in (None, row.recipe)]
    return sorted(chosen, key=lambda row: (row.started, row.run), reverse=True)


def _lifts(report: RunReport) -> Iterator[str]:
    for stage in report.stages:
        if stage.verdict is None:
            yield f"{stage.name}: {stage.entry.state}"
            continue
        for task in stage.verdict.tasks:
            text = scale_of(task).interval(task.lift, task.low, task.high)
            yield f"{stage.name} {task.task} {text} vs {task.against}: {task.state}"
        if not stage.verdict.tasks:
            yield f"{stage.name}: promoted unseen" if not stage.verdict.gated else f"{stage.name}: {stage.entry.state}"


def _settings(path: Path) -> dict[str, str]:
    """Return the resolved settings of a run by dotted name; none where its recipe cannot be read."""
    import yaml

    try:
        raw: Any = yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    found = leaves(raw) if isinstance(raw, Mapping) else ()
    return {key: str(value) for key, value in found if not key.startswith(WITHOUT_INTEREST)}


def _choice(settings: Mapping[str, str]) -> str:
    """Return the part of a run in a choice, by its settings."""
    halves = {value for key, value in settings.items() if key.endswith(CHOICE[0])}
    if Half.choosing.value in halves:
        return "for choosing"
    tried = max((int(value) for key, value in settings.items() if key.endswith(CHOICE[1])), default=1)
    return f"chosen from {tried}" if tried > 1 else ""


def _differences(own: Mapping[str, str], alike: Sequence[Mapping[str, str]]) -> dict[str, str]:
    return {
        key: own.get(key, "absent")
        for key in sorted({key for other in alike for key in other if not key.endswith(CHOICE)})
        if len({other.get(key) for other in alike}) > 1
    }


def _cells(row: Row, between: str) -> tuple[str, ...]:
    differs = [f"{key}={value}" for key, value in row.differs.items()]
    if len(differs) > MOST_DIFFERENCES:
        differs = [*differs[:MOST_DIFFERENCES], f"and {len(differs) - MOST_DIFFERENCES} more"]
    state = f"{row.state}, {row.choice}" if row.choice else row.state
    return (row.run, state, between.join(row.lifts), clock(row.seconds), between.join(differs))


def show(found: Sequence[Row]) -> None:
    """Print the table of runs; nothing for none."""
    if not found:
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from posttrain.console import styled
    from posttrain.report.table import COLOURS, table_console

    console = table_console()
    line = max(LEAST_NAME, console.width - OTHER_COLUMNS)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        table.add_column(column, overflow="fold", no_wrap=column == "run")
    for row in found:
        name, state, lifts, time, differs = _cells(row, "\n")
        coloured = styled((state, COLOURS.get(row.state, "default")))
        folded = Text("\n").join(styled(name[start : start + line]) for start in range(0, len(name), line))
        table.add_row(folded, coloured, Text(lifts), styled(time), Text(differs))
    console.print(table)
    for row in found:
        if row.resume:
            console.print(styled(f"{row.run} was interrupted; this resumes it: {row.resume}"), soft_wrap=True)
