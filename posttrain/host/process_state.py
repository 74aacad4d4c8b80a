"""State shared by all plugins of a process: working directory, random numbers, torch's modes."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

NUMBERS = "the default number format of torch"
GRADIENTS = "whether torch records gradients"


@dataclass(frozen=True)
class ProcessState:
    """The shared state at one moment, of the modules imported by then."""

    directory: str
    generators: dict[str, Any]
    modes: dict[str, Any]
    """Modes of torch, for every later computation."""

    @classmethod
    def now(cls) -> ProcessState:
        """Take the state of this moment."""
        return cls(os.getcwd(), _generators(), _modes())

    def changes(self) -> list[str]:
        """Name everything that differs from this state."""
        directory = os.getcwd()
        found = [] if directory == self.directory else [f"the working directory, to {directory}"]
        modes, generators = _modes(), _generators()
        found += [name for name, value in self.modes.items() if modes[name] != value]
        return found + [
            f"the random numbers of {name}" for name, state in self.generators.items() if generators[name] != state
        ]

    def restore(self) -> None:
        """Put this state back."""
        os.chdir(self.directory)
        if "random" in self.generators:
            import random

            random.setstate(self.generators["random"])
        if "numpy" in self.generators:
            import numpy as np

            np.random.set_state(self.generators["numpy"])
        if "torch" in self.generators:
            import torch

            torch.set_default_dtype(self.modes[NUMBERS])
            torch.set_grad_enabled(self.modes[GRADIENTS])
            torch.set_rng_state(torch.frombuffer(bytearray(self.generators["torch"]), dtype=torch.uint8))


def _modes() -> dict[str, Any]:
    if not hasattr(sys.modules.get("torch"), "get_rng_state"):
        return {}
    import torch

    return {NUMBERS: torch.get_default_dtype(), GRADIENTS: torch.is_grad_enabled()}


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
