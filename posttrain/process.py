"""What all plugins of one process share and none may leave changed: working directory, generators of random numbers."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ProcessState:
    """The shared state at one moment; of modules as far as they are imported by then."""

    directory: str
    generators: dict[str, Any]

    @classmethod
    def now(cls) -> ProcessState:
        """The state at this moment."""
        return cls(os.getcwd(), _generators())

    def changes(self) -> list[str]:
        """What is not as it was, in words."""
        directory = os.getcwd()
        found = [] if directory == self.directory else [f"the working directory, to {directory}"]
        now = _generators()
        return found + [
            f"the random numbers of {name}" for name, state in self.generators.items() if now[name] != state
        ]

    def restore(self) -> None:
        """Make everything as it was."""
        os.chdir(self.directory)
        if "random" in self.generators:
            import random

            random.setstate(self.generators["random"])
        if "numpy" in self.generators:
            import numpy as np

            np.random.set_state(self.generators["numpy"])
        if "torch" in self.generators:
            import torch

            torch.set_rng_state(torch.frombuffer(bytearray(self.generators["torch"]), dtype=torch.uint8))


def _generators() -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "random" in sys.modules:
        import random

        found["random"] = random.getstate()
    if "numpy.random" in sys.modules:
        import numpy as np

        kind, keys, *rest = np.random.get_state()
        found["numpy"] = (kind, tuple(np.asarray(keys).tolist()), *rest)
    if hasattr(sys.modules.get("torch"), "get_rng_state"):
        import torch

        found["torch"] = torch.get_rng_state().numpy().tobytes()
    return found
