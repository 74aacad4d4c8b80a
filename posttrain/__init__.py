"""posttrain: an evaluation-gated post-training pipeline for language models.

This is the public API: a plugin imports from here and from ``posttrain.testing``, and from nowhere else.
"""

from posttrain.data.records import Conversation, Feedback, Preference, Text
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
from posttrain.sft.config import FineTuneConfig, TrainOn
from posttrain.sft.refusals import declines
from posttrain.stage import MISSING, Progress, Stage, StageConfig, StageContext, from_recipe
from posttrain.version import __version__

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
