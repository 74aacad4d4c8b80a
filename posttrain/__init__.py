"""Evaluation-gated post-training of language models.

These names are the public API: a plugin imports from here and from ``posttrain.testing``, and from nowhere else. Every
type in a hook's signature, on StageContext and on their fields is among them. Each is imported at its first use, so
that no command waits for a module it does not need.
"""

import importlib
from typing import TYPE_CHECKING

from posttrain.version import __version__

if TYPE_CHECKING:
    from posttrain.advice import Advice, Rule
    from posttrain.artifact import Artifact, BaseWeights, Manifest, ModelSource, Pins
    from posttrain.config.launch import LaunchConfig, Launcher
    from posttrain.config.money import Amount
    from posttrain.config.on_policy import Keep, OnPolicy, SamplingBackend
    from posttrain.config.preparation import (
        Action,
        BalanceConfig,
        Choice,
        Compared,
        ContaminationConfig,
        NearConfig,
        OnContamination,
        PrepareConfig,
        SemanticConfig,
    )
    from posttrain.config.replay import AutoShare, Replay
    from posttrain.config.schema import (
        Backend,
        Dtype,
        EngineName,
        Format,
        GateConfig,
        GateTask,
        Half,
        ModelConfig,
        OnFail,
        Role,
        Sequential,
        Source,
    )
    from posttrain.context import StageContext
    from posttrain.data.declines import declines
    from posttrain.data.records import (
        Conversation,
        Document,
        Feedback,
        Message,
        Origin,
        Preference,
        Question,
        Record,
        Text,
        Tool,
    )
    from posttrain.engine.answer_objective import AnswerLoss
    from posttrain.engine.answers import AnsweredRow, AnswerScores, set_aside
    from posttrain.engine.checkpoint import Position
    from posttrain.engine.config import FineTuneConfig, LoopConfig, SampledConfig, TrainOn
    from posttrain.errors import (
        ArtifactDamaged,
        BadInput,
        Diverged,
        GateFailed,
        GateUndecided,
        Interrupted,
        PluginFailed,
        PosttrainError,
        Problem,
        require_finite,
        suggest,
    )
    from posttrain.gate.sequential import Look
    from posttrain.gate.spec import (
        Comparator,
        DocumentScore,
        GateProgress,
        GateRequest,
        Scorecard,
        SliceVerdict,
        TaskVerdict,
        TrainedOn,
        Verdict,
        VerdictState,
    )
    from posttrain.hookspecs import hookimpl
    from posttrain.host.readers import Reader
    from posttrain.plan import Plan, Step
    from posttrain.prepare.filters import Filter, Finding
    from posttrain.prepare.rows import Row
    from posttrain.rewards.reward import Attempt, Reward, Score, Scores
    from posttrain.rewards.scorer import Rated, Scorer
    from posttrain.sampling.objective import AnsweredQuestion, PolicyLoss, TokenScores
    from posttrain.sampling.policy import Asked
    from posttrain.sampling.sampler import Answer
    from posttrain.stage import MISSING, Progress, Settings, Stage, StageConfig, from_recipe, from_variant, number
    from posttrain.tokens.chat import ChatRenderer, Rendered, RenderedPair
    from posttrain.tokens.judged import JudgedAnswer

__all__ = [
    "MISSING",
    "Action",
    "Advice",
    "Amount",
    "Answer",
    "AnswerLoss",
    "AnswerScores",
    "AnsweredQuestion",
    "AnsweredRow",
    "Artifact",
    "ArtifactDamaged",
    "Asked",
    "Attempt",
    "AutoShare",
    "Backend",
    "BadInput",
    "BalanceConfig",
    "BaseWeights",
    "ChatRenderer",
    "Choice",
    "Comparator",
    "Compared",
    "ContaminationConfig",
    "Conversation",
    "Diverged",
    "Document",
    "DocumentScore",
    "Dtype",
    "EngineName",
    "Feedback",
    "Filter",
    "Finding",
    "FineTuneConfig",
    "Format",
    "GateConfig",
    "GateFailed",
    "GateProgress",
    "GateRequest",
    "GateTask",
    "GateUndecided",
    "Half",
    "Interrupted",
    "JudgedAnswer",
    "Keep",
    "LaunchConfig",
    "Launcher",
    "Look",
    "LoopConfig",
    "Manifest",
    "Message",
    "ModelConfig",
    "ModelSource",
    "NearConfig",
    "OnContamination",
    "OnFail",
    "OnPolicy",
    "Origin",
    "Pins",
    "Plan",
    "PluginFailed",
    "PolicyLoss",
    "Position",
    "PosttrainError",
    "Preference",
    "PrepareConfig",
    "Problem",
    "Progress",
    "Question",
    "Rated",
    "Reader",
    "Record",
    "Rendered",
    "RenderedPair",
    "Replay",
    "Reward",
    "Role",
    "Row",
    "Rule",
    "SampledConfig",
    "SamplingBackend",
    "Score",
    "Scorecard",
    "Scorer",
    "Scores",
    "SemanticConfig",
    "Sequential",
    "Settings",
    "SliceVerdict",
    "Source",
    "Stage",
    "StageConfig",
    "StageContext",
    "Step",
    "TaskVerdict",
    "Text",
    "TokenScores",
    "Tool",
    "TrainOn",
    "TrainedOn",
    "Verdict",
    "VerdictState",
    "__version__",
    "declines",
    "from_recipe",
    "from_variant",
    "hookimpl",
    "number",
    "require_finite",
    "set_aside",
    "suggest",
]

HOMES = {
    "posttrain.advice": ("Advice", "Rule"),
    "posttrain.artifact": ("Artifact", "BaseWeights", "Manifest", "ModelSource", "Pins"),
    "posttrain.config.launch": ("LaunchConfig", "Launcher"),
    "posttrain.config.on_policy": ("Keep", "OnPolicy", "SamplingBackend"),
    "posttrain.config.preparation": (
        "Action",
        "BalanceConfig",
        "Choice",
        "Compared",
        "ContaminationConfig",
        "NearConfig",
        "OnContamination",
        "PrepareConfig",
        "SemanticConfig",
    ),
    "posttrain.config.replay": ("AutoShare", "Replay"),
    "posttrain.config.schema": (
        "Backend",
        "Dtype",
        "EngineName",
        "Format",
        "GateConfig",
        "GateTask",
        "Half",
        "ModelConfig",
        "OnFail",
        "Role",
        "Sequential",
        "Source",
    ),
    "posttrain.gate.sequential": ("Look",),
    "posttrain.context": ("StageContext",),
    "posttrain.data.records": (
        "Conversation",
        "Document",
        "Feedback",
        "Message",
        "Origin",
        "Preference",
        "Question",
        "Record",
        "Text",
        "Tool",
    ),
    "posttrain.engine.answer_objective": ("AnswerLoss",),
    "posttrain.config.money": ("Amount",),
    "posttrain.engine.answers": ("AnsweredRow", "AnswerScores", "set_aside"),
    "posttrain.engine.checkpoint": ("Position",),
    "posttrain.engine.config": (
        "FineTuneConfig",
        "LoopConfig",
        "SampledConfig",
        "TrainOn",
    ),
    "posttrain.errors": (
        "ArtifactDamaged",
        "BadInput",
        "Diverged",
        "GateFailed",
        "GateUndecided",
        "Interrupted",
        "PluginFailed",
        "PosttrainError",
        "Problem",
        "require_finite",
        "suggest",
    ),
    "posttrain.gate.spec": (
        "Comparator",
        "DocumentScore",
        "GateProgress",
        "GateRequest",
        "Scorecard",
        "SliceVerdict",
        "TaskVerdict",
        "TrainedOn",
        "Verdict",
        "VerdictState",
    ),
    "posttrain.hookspecs": ("hookimpl",),
    "posttrain.plan": (
        "Plan",
        "Step",
    ),
    "posttrain.rewards.reward": ("Attempt", "Reward", "Score", "Scores"),
    "posttrain.rewards.scorer": ("Rated", "Scorer"),
    "posttrain.sampling.objective": ("AnsweredQuestion", "PolicyLoss", "TokenScores"),
    "posttrain.sampling.policy": ("Asked",),
    "posttrain.sampling.sampler": ("Answer",),
    "posttrain.data.declines": ("declines",),
    "posttrain.host.readers": ("Reader",),
    "posttrain.prepare.filters": ("Filter", "Finding"),
    "posttrain.prepare.rows": ("Row",),
    "posttrain.stage": (
        "MISSING",
        "Progress",
        "Settings",
        "Stage",
        "StageConfig",
        "from_recipe",
        "from_variant",
        "number",
    ),
    "posttrain.tokens.chat": (
        "ChatRenderer",
        "Rendered",
        "RenderedPair",
    ),
    "posttrain.tokens.judged": ("JudgedAnswer",),
}
"""The module that defines each public name, as type checkers read it above."""


if not TYPE_CHECKING:  # a type checker that saw this would take any name for one of the API

    def __getattr__(name):
        for module, names in HOMES.items():
            if name in names:
                globals()[name] = found = getattr(importlib.import_module(module), name)
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
