"""posttrain: an evaluation-gated post-training pipeline for language models.

This is the public API: a plugin imports from here and from ``posttrain.testing``, and from nowhere else. A name is
imported when it is first asked for, so that a command waits for nothing that it does not use.
"""

import importlib
from typing import TYPE_CHECKING

from posttrain.version import __version__

if TYPE_CHECKING:
    from posttrain.context import StageContext
    from posttrain.data.records import Conversation, Feedback, Preference, Text
    from posttrain.engine.config import FineTuneConfig, TrainOn
    from posttrain.errors import (
        ArtifactDamaged,
        BadInput,
        GateRefused,
        GateUndecided,
        Interrupted,
        PluginFailed,
        PosttrainError,
        Problem,
        suggest,
    )
    from posttrain.hookspecs import hookimpl
    from posttrain.sft.refusals import declines
    from posttrain.stage import MISSING, Progress, Stage, StageConfig, from_recipe

__all__ = [
    "MISSING",
    "ArtifactDamaged",
    "BadInput",
    "Conversation",
    "Feedback",
    "FineTuneConfig",
    "GateRefused",
    "GateUndecided",
    "Interrupted",
    "PluginFailed",
    "PosttrainError",
    "Preference",
    "Problem",
    "Progress",
    "Stage",
    "StageConfig",
    "StageContext",
    "Text",
    "TrainOn",
    "__version__",
    "declines",
    "from_recipe",
    "hookimpl",
    "suggest",
]

HOMES = {
    "posttrain.data.records": ("Conversation", "Feedback", "Preference", "Text"),
    "posttrain.errors": (
        "ArtifactDamaged",
        "BadInput",
        "GateRefused",
        "GateUndecided",
        "Interrupted",
        "PluginFailed",
        "PosttrainError",
        "Problem",
        "suggest",
    ),
    "posttrain.hookspecs": ("hookimpl",),
    "posttrain.engine.config": ("FineTuneConfig", "TrainOn"),
    "posttrain.sft.refusals": ("declines",),
    "posttrain.context": ("StageContext",),
    "posttrain.stage": ("MISSING", "Progress", "Stage", "StageConfig", "from_recipe"),
}
"""The modules that define the public names, the same as type checkers read above."""


if not TYPE_CHECKING:  # a type checker that saw this would take any name for one of the API

    def __getattr__(name):
        for module, names in HOMES.items():
            if name in names:
                globals()[name] = found = getattr(importlib.import_module(module), name)
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
