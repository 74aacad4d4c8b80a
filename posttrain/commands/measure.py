"""Two real steps of a recipe's first stage on this machine, for ``posttrain plan --measure``."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from posttrain import environment
from posttrain.config.schema import GateConfig, Source
from posttrain.cost.estimate import Pace, Volume
from posttrain.errors import reject
from posttrain.host.plugins import Host
from posttrain.plan import NO_TRACKER, Plan, Step

if TYPE_CHECKING:
    from posttrain.run.display import Display

STEPS = 2
LOG = "measure.log"
"""File of the lines of the last such run, below the plan's folder."""
SPARE = 1.5
"""Records that are read, over those that fill the rows of the steps: preparation may leave some out."""


def measure(plan: Plan, host: Host, pace: Pace, volume: Volume) -> tuple[float, float]:
    """Return the tokens and the seconds of the last of two steps of the first stage, trained as the plan has it.

    The run lies in a folder of its own below the plan's, asks no gate, calls no tracker and is removed; a terminal
    shows the last of its lines, and all are in LOG beside it. Raises BadInput when the stage ends before its second
    step, and what a run raises.
    """
    environment.prepare()
    with environment.importing():
        from posttrain.pipeline import run

    plan.output_root.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="measure-", dir=plan.output_root) as folder,
        _kept_lines(plan.output_root / LOG, plan.steps[0].name) as display,
    ):
        short = _shortened(plan, host, Path(folder), _rows(pace, volume))
        metrics = run(short, host, display).path / "metrics.jsonl"
        steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    timed = [each for each in steps if "tokens_per_second" in each]
    if len(timed) < STEPS:
        what = f"{plan.steps[0].name} ended after {len(timed)} steps, and the time of {STEPS} is needed"
        reject("--measure", what, "Leave out --measure")
    first, last = timed[-2:]
    before = first["tokens"] / first["tokens_per_second"]
    seconds = (first["tokens"] + last["tokens"]) / last["tokens_per_second"] - before
    return float(last["tokens"]), max(seconds, 1e-9)


@contextmanager
def _kept_lines(log: Path, stage: str) -> Iterator[Display]:
    """Return a display whose lines go into ``log``, while standard error has one about all of them."""
    from posttrain.console import DataConsole
    from posttrain.run.display import Display

    said = f"--measure: two steps of {stage}, in a run of its own that is removed; its lines are in {log}"
    shown = DataConsole(file=sys.stderr, soft_wrap=True)
    shown.print(said)
    with log.open("w", encoding="utf-8") as file, shown.status(stage) as status:

        class Kept(Display):
            def _print(self, text: Text) -> None:
                super()._print(text)
                file.flush()
                status.update(Text(text.plain.partition("\n")[0]))

        yield Kept(DataConsole(file=file, soft_wrap=True))


def _rows(pace: Pace, volume: Volume) -> int:
    """Return the records that two steps need."""
    mean = sum(min(prompt + sum(answers), pace.sequence_length) for prompt, answers in volume.families)
    each = pace.sequence_length / (mean / len(volume.families)) if pace.packed else 1.0
    return round(STEPS * pace.rows * each * SPARE) + 1


def _shortened(plan: Plan, host: Host, root: Path, records: int) -> Plan:
    """Return the plan of two steps, with its copies of data in the same place as before."""
    first = plan.steps[0]
    settings: dict[str, Any] = {"max_steps": STEPS, "gate": GateConfig(enabled=False)}
    if hasattr(first.config, "eval_data"):
        settings |= {"eval_data": None, "eval_share": 0.0, "eval_steps": None}
    step: Step = replace(
        first, config=replace(first.config, **settings), tasks={}, eval_sources=(),
        sources=tuple(_limited(source, records) for source in first.sources),
    )  # fmt: skip
    trackers = [name for name, declared in host.settings.items() if declared.group == "tracker"]
    kept = {name: value for name, value in plan.settings.items() if name not in trackers}
    return replace(plan, steps=(step,), output_root=root, tracker=NO_TRACKER, settings=kept, spend_cap=None)


def _limited(source: Source, records: int) -> Source:
    return replace(source, limit=records if source.limit is None else min(records, source.limit))
