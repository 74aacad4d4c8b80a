"""metrics.jsonl: one line for every optimizer step of a run, what trackers and the report's curves read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.disk import naming, replace_text


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
        if not self.path.exists():
            return []
        rows = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        return [line for line in rows if self._is_of_stage(line)]

    def replace(self, lines: Sequence[str]) -> None:
        """Put ``lines`` in place of the stage's lines, in one step."""
        former = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        others = [line for line in former if self._is_kept(line, 0)]
        if lines or former:
            replace_text(self.path, "".join(f"{line}\n" for line in [*others, *lines]))

    def rewind(self, done_steps: int) -> None:
        """Drop the stage's lines after step ``done_steps``, and any line cut off by a kill.

        A stage that resumes logs the steps after its checkpoint again; each step is in the file once.
        """
        if not self.path.exists():
            return
        rows = [line for line in self.path.read_text(encoding="utf-8").splitlines() if self._is_kept(line, done_steps)]
        replace_text(self.path, "".join(f"{row}\n" for row in rows))

    def _is_of_stage(self, line: str) -> bool:
        try:
            return bool(json.loads(line)["stage"] == self.stage)
        except (ValueError, KeyError, TypeError):
            return False

    def _is_kept(self, line: str, done_steps: int) -> bool:
        try:
            row = json.loads(line)
        except ValueError:  # cut off by a kill
            return False
        # Step 0 holds measurements before the first step; without a checkpoint they are made again.
        return bool(row["stage"] != self.stage or (done_steps and row["step"] <= done_steps))
