"""The contract of a stage: what a plugin declares, what it is configured with, what it is handed.

Nothing here imports torch, so that stages can be listed and planned at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from posttrain.config.ranges import number
from posttrain.config.schema import MISSING, StageConfig, from_recipe, from_variant

__all__ = [
    "MISSING",
    "RECORD_SHAPES",
    "Progress",
    "Settings",
    "Stage",
    "StageConfig",
    "from_recipe",
    "from_variant",
    "number",
]

RECORD_SHAPES = ("conversations", "documents", "preferences", "feedback")
"""The shapes of prepared records that a stage can ask for; documents are conversations and raw texts, mixed."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A kind of stage, as a plugin registers it."""

    name: str
    """Name of the kind, such as ``dpo``: the option of the group ``stage``."""
    summary: str
    """One line for ``posttrain list``."""
    config: type[StageConfig]
    """Dataclass that is schema, default and help of the stage's settings."""
    run: str
    """``package.module:function``, imported when the stage starts; called with a StageContext."""
    parent: str
    """What the stage is stacked on: ``base`` or ``sft``."""
    records: str
    """One of RECORD_SHAPES."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that belong to no stage, as a plugin registers them."""

    name: str
    """Key at the top level of every recipe; with ``group``, the option that has these settings."""
    summary: str
    """One line for ``posttrain list``."""
    config: type
    """Dataclass that is schema, default and help; it may have ranges, and ``problems`` like that of StageConfig."""
    shapes_data: bool = False
    """True when artifacts depend on them: they are then part of every stage's fingerprint and manifest."""
    group: str | None = None
    """``tracker`` for a tracker: ``tracker=NAME`` chooses it, and its settings stand under the key ``tracker``."""


class Progress(Protocol):
    """Where a stage reports its steps; display, metrics.jsonl and trackers hang on it."""

    def start(self, total_steps: int, done_steps: int = 0) -> None:
        """Announce how many optimizer steps the stage takes and how many a checkpoint already holds."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report optimizer step ``step`` (from 1), or with 0 what was measured before the first.

        ``tokens`` in metrics counts the step's tokens.
        """

    def note(self, text: str) -> None:
        """Show one line to the user."""
