"""metrics.jsonl: one line for every optimizer step of a run, what trackers and the report's curves read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class MetricsLog:
    """The lines of one stage in a run's metrics.jsonl."""

    path: Path
    stage: str

    def append(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add the line of one optimizer step."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"stage": self.stage, "step": step, **metrics}) + "\n")

    def rewind(self, done_steps: int) -> None:
        """Drop the stage's lines after step ``done_steps``, and any line cut off by a kill.

        A stage that resumes logs the steps after its checkpoint again; each step is in the file once.
        """
        if not self.path.exists():
            return
        rows = [line for line in self.path.read_text(encoding="utf-8").splitlines() if self._is_kept(line, done_steps)]
        self.path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")

    def _is_kept(self, line: str, done_steps: int) -> bool:
        try:
            row = json.loads(line)
        except ValueError:  # cut off by a kill
            return False
        # Step 0 holds measurements before the first step; without a checkpoint they are made again.
        return bool(row["stage"] != self.stage or (done_steps and row["step"] <= done_steps))
