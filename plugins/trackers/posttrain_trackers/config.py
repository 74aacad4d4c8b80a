"""Settings of the trackers."""

from __future__ import annotations

from dataclasses import dataclass

WANDB = "wandb"


@dataclass(kw_only=True)
class WandbSettings:
    """Settings of Weights & Biases."""

    project: str = "posttrain"
    """Project at the tracking service."""
    entity: str | None = None
    """Team or user at the tracking service."""
