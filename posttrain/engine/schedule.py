"""The learning rate of each optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from posttrain.engine.config import LoopConfig


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then a cosine down to a floor (arXiv:1608.03983, without restarts)."""

    peak: float
    total: int
    """Optimizer steps."""
    warmup: int
    """Steps with a rising rate; the last of them has the peak."""
    floor: float
    """Share of the peak at the end of the cosine."""

    @classmethod
    def from_config(cls, config: LoopConfig, total: int) -> Schedule:
        """Return the schedule of a run of ``total`` optimizer steps."""
        warmup = math.ceil(config.warmup_ratio * total)
        return cls(peak=config.lr, total=total, warmup=warmup, floor=config.min_lr_ratio)

    def rate(self, step: int) -> float:
        """Return the learning rate of optimizer step ``step``, counted from 1."""
        if step <= self.warmup:
            return self.peak * step / self.warmup
        progress = (step - 1 - self.warmup) / (self.total - self.warmup)
        return self.peak * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress)))
