"""The names that plugins import from ``posttrain`` itself."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import posttrain
from posttrain import hookspecs
from posttrain.context import StageContext

PUBLIC = [
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
    "Backend",
    "BadInput",
    "BalanceConfig",
    "Choice",
    "BaseWeights",
    "ChatRenderer",
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
    "AutoShare",
    "MISSING",
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
"""The whole public API. A name that is added or removed is a change that plugins feel: it belongs in CHANGELOG.md."""
FOREIGN = {
    "Any",
    "BinaryIO",
    "Callable",
    "Iterable",
    "Iterator",
    "Mapping",
    "None",
    "Path",
    "PreTrainedModel",
    "PreTrainedTokenizerBase",
    "Sequence",
    "torch",
}
"""Names in signatures that come from Python, torch and transformers."""


def test_the_public_names_are_these_and_no_others() -> None:
    assert sorted(posttrain.__all__) == sorted(PUBLIC)


def named_types(annotations: Iterable[str]) -> set[str]:
    """Names of classes in annotations, without those of builtins."""
    trees = [ast.parse(annotation) for annotation in annotations]
    names = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return {name for name in names if not hasattr(builtins, name)} - FOREIGN


def annotations_of(thing: Any) -> list[str]:
    """Annotations of a class's public fields and methods, or of a function."""
    if not isinstance(thing, type):
        return [str(annotation) for annotation in thing.__annotations__.values()]
    found = [str(value) for name, value in vars(thing).get("__annotations__", {}).items() if not name.startswith("_")]
    methods = [item for name, item in vars(thing).items() if inspect.isfunction(item) and not name.startswith("_")]
    return found + [annotation for method in methods for annotation in annotations_of(method)]


def test_every_type_that_a_plugin_meets_is_public() -> None:
    """Those of the hooks' signatures, of the context, and of all that can be reached from them."""
    hooks = [item for item in vars(hookspecs).values() if hasattr(item, "posttrain_spec")]
    waiting = {name for thing in (*hooks, StageContext) for name in named_types(annotations_of(thing))}
    met: set[str] = set()
    while waiting:
        name = waiting.pop()
        met.add(name)
        assert name in posttrain.__all__, name
        found = getattr(posttrain, name)
        if isinstance(found, type):
            waiting |= named_types(annotations_of(found)) - met
    assert {"Plan", "Step", "Record", "Artifact", "DocumentScore", "ModelSource", "Position"} <= met


def test_every_public_name_is_the_one_that_its_module_defines() -> None:
    homes = {name: module for module, names in posttrain.HOMES.items() for name in names}
    assert sorted([*homes, "__version__"]) == sorted(posttrain.__all__)
    for name, module in homes.items():
        assert getattr(posttrain, name) is getattr(importlib.import_module(module), name)


def test_type_checkers_find_every_name_where_python_does() -> None:
    tree = ast.parse(Path(posttrain.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    read = {node.module: tuple(a.name for a in node.names) for node in block.body if isinstance(node, ast.ImportFrom)}
    assert read == posttrain.HOMES


def test_a_star_and_dir_give_all_of_them() -> None:
    namespace: dict[str, object] = {}
    exec("from posttrain import *", namespace)
    assert set(posttrain.__all__) <= namespace.keys()
    assert set(posttrain.__all__) <= set(dir(posttrain))


def test_an_unknown_name_is_an_import_error() -> None:
    with pytest.raises(ImportError, match="cannot import name 'Stagge'"):
        exec("from posttrain import Stagge")
