"""The requests that a run may make, over all of its processes and resumes.

    <run>/requests/<process>    a byte for each request that a process of the run has made

A process starts with its share of what was left when it began. What others make meanwhile makes the shares of later
ones smaller, so that together they never exceed the whole. Without a run, a command counts for itself.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.disk import naming
from posttrain.host import activity

FOLDER = "requests"


@dataclass(kw_only=True)
class Budget:
    """The requests left to one process."""

    share: int
    """Requests of this process, those before it began included."""
    file: Path | None
    """File with a byte for each of them; None without a run."""
    _asked: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, most: int) -> Budget:
        """Return the budget of this process in the run that it works for, which may make ``most`` requests."""
        directory = activity.run_directory()
        if directory is None:
            return cls(share=most, file=None)
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        folder = directory / FOLDER
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            made = {path.name: path.stat().st_size for path in folder.iterdir()}
        left = max(0, most - sum(made.values()))
        own = left * (rank + 1) // world - left * rank // world
        return cls(share=made.get(str(rank), 0) + own, file=folder / str(rank))

    def take(self) -> bool:
        """Count a request; return False when there is none left."""
        with self._lock:
            if self._made() >= self.share:
                return False
            self._asked += 1
            if self.file is not None:
                with naming(self.file), self.file.open("ab") as stream:
                    stream.write(b".")
            return True

    def _made(self) -> int:
        if self.file is None:
            return self._asked
        return self.file.stat().st_size if self.file.exists() else 0
