"""The contract of a stage: its declaration by a plugin, its settings, its progress.

Imports no torch, so that ``posttrain list`` and ``posttrain plan`` answer at once.
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

RECORD_SHAPES = ("conversations", "documents", "preferences", "feedback", "questions")
"""Shapes of prepared records; ``documents`` mixes conversations and raw texts, ``questions`` have no answer to
train."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A kind of stage, as a plugin registers it."""

    name: str
    """Name of the kind, such as ``dpo``: its option in the group ``stage``."""
    summary: str
    """One line for ``posttrain list``."""
    config: type[StageConfig]
    """Dataclass of the stage's settings: schema, defaults and help in one."""
    run: str
    """``package.module:function``, imported when the stage starts and called with a StageContext."""
    parent: str
    """Model under the stage: ``base`` or ``sft``."""
    records: str
    """One of RECORD_SHAPES."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a plugin, apart from its stages, as it registers them."""

    name: str
    """Key at the top level of every recipe; with ``group``, the option with these settings."""
    summary: str
    """One line for ``posttrain list``."""
    config: type
    """Dataclass of schema, defaults and help in one; may have ranges, and ``problems`` as StageConfig has."""
    shapes_data: bool = False
    """True when artifacts depend on them: every stage's fingerprint and manifest then include them."""
    group: str | None = None
    """``tracker`` for a tracker: ``tracker=NAME`` chooses it, and the key ``tracker`` holds its settings."""


class Progress(Protocol):
    """Receiver of a stage's steps; passes them to the display, metrics.jsonl and trackers."""

    def start(self, total_steps: int, done_steps: int = 0, device_flops: float | None = None) -> None:
        """Announce the stage's number of optimizer steps; ``done_steps`` of them are in a checkpoint.

        ``device_flops`` is what the devices together can do a second: with it, steps are shown with their share.
        """

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report optimizer step ``step``, from 1; step 0 is for metrics measured before training.

        ``tokens`` in metrics counts the step's tokens, ``model_flops`` the operations that they ask of the model.
        """

    def part(self, done: int, total: int, what: str) -> None:
        """Report ``done`` of ``total`` parts of the step in work, each a ``what``, such as a row or an eval document.

        A step may take minutes: without its parts it looks hung.
        """

    def note(self, text: str) -> None:
        """Show one line to the user."""
