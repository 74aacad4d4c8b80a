"""metrics.jsonl: one line for every optimizer step of a run, what trackers and the report's curves read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.disk import naming, replace_text
from posttrain.saved import lines_of, read_text


@dataclass(frozen=True)
class MetricsLog:
    """The lines of one stage in a run's metrics.jsonl."""

    path: Path
    stage: str

    def append(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add the line of one optimizer step."""
        with naming(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"stage": self.stage, "step": step, **metrics}) + "\n")

    def lines(self) -> list[str]:
        """Return the stage's lines, those cut off by a kill left out."""
        return [line for line in self._all() if self._is_of_stage(line)]

    def replace(self, lines: Sequence[str]) -> None:
        """Put ``lines`` in place of the stage's lines, in one step."""
        former = self._all()
        others = [line for line in former if self._is_kept(line, 0)]
        if lines or former:
            replace_text(self.path, "".join(f"{line}\n" for line in [*others, *lines]))

    def rewind(self, done_steps: int) -> None:
        """Drop the stage's lines after step ``done_steps``, and any line cut off by a kill.

        A stage that resumes logs the steps after its checkpoint again; each step is in the file once.
        """
        if former := self._all():
            rows = [line for line in former if self._is_kept(line, done_steps)]
            replace_text(self.path, "".join(f"{row}\n" for row in rows))

    def _all(self) -> list[str]:
        try:
            return lines_of(read_text(self.path, errors="replace"))
        except FileNotFoundError:
            return []

    def _is_of_stage(self, line: str) -> bool:
        try:
            return bool(json.loads(line)["stage"] == self.stage)
        except (ValueError, KeyError, TypeError, RecursionError):
            return False

    def _is_kept(self, line: str, done_steps: int) -> bool:
        try:
            row = json.loads(line)
            # Step 0 holds measurements before the first step; without a checkpoint they are made again.
            return bool(row["stage"] != self.stage or (done_steps and row["step"] <= done_steps))
        except (ValueError, TypeError, KeyError, RecursionError):  # cut off by a kill, or no line of ours
            return False
