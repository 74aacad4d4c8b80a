"""The hooks of posttrain, in the order in which they are called.

A plugin implements any of them in a module or class that it names under the entry-point group ``posttrain``::

    from posttrain import Stage, hookimpl

    @hookimpl
    def register_stages():
        return [Stage(name="mine", ...)]

In the arguments, ``stage: Stage`` is a kind of stage and ``stage: str`` the name of its node in the recipe;
``step: Step`` is a stage of the plan and ``step: int`` an optimizer step. The product answers its own hooks in the
``plugin.py`` of a room: ``data.plugin`` loads records, ``launch.plugin`` runs stages, ``scoring.plugin`` evaluates,
``gate.plugin`` judges. A hook with an answer is checked by type in ``host.guard``.

The plugin registered last is called first. Hooks marked *first result* stop at the first answer other than None.

An exception is reported under the plugin's name; BadInput and the other errors of ``posttrain`` pass unchanged. A hook
leaves the working directory, torch's modes and the shared random numbers as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from posttrain.artifact import Artifact
    from posttrain.context import StageContext
    from posttrain.data.records import Record
    from posttrain.errors import Problem
    from posttrain.gate.spec import GateProgress, GateRequest, Scorecard, Verdict
    from posttrain.host.readers import Reader
    from posttrain.plan import Plan, Step
    from posttrain.prepare.filters import Filter
    from posttrain.rewards.reward import Reward
    from posttrain.stage import Settings, Stage

API_VERSION = 1
"""A plugin may set ``POSTTRAIN_API = 1`` in its module; one that names another version is not loaded."""

hookspec = pluggy.HookspecMarker("posttrain")
hookimpl = pluggy.HookimplMarker("posttrain")
"""Marker of a hook's implementation; ``@hookimpl(wrapper=True)`` wraps those of other plugins."""


# --- Start: no torch, no Hydra; every command waits for these -------------------------------------------------------


@hookspec
def register_stages() -> Sequence[Stage]:  # type: ignore[empty-body]
    """Return the kinds of stage of this plugin.

    A name registered by another plugin leaves the whole plugin out.
    """


@hookspec
def register_settings() -> Sequence[Settings]:  # type: ignore[empty-body]
    """Return settings of this plugin beyond those of its stages; ``plan.settings[NAME]`` holds the typed object.

    A name in use leaves the whole plugin out.
    """


@hookspec
def register_rewards() -> Sequence[Reward]:  # type: ignore[empty-body]
    """Return the rewards of this plugin, for stages and data that sample answers.

    A name in use leaves the whole plugin out.
    """


@hookspec
def register_config() -> Sequence[Path]:  # type: ignore[empty-body]
    """Return folders with ``conf/`` and ``recipes/`` of this plugin.

    ``conf/gate/NAME.yaml`` and its like become options of their groups, ``recipes/NAME.yaml`` a recipe. A file
    ``conf/stage/NAME.yaml`` with ``/settings@_here_: NAME`` as its first default sets defaults of the stage NAME. A
    name in use leaves the whole plugin out.
    """


@hookspec
def register_eval_tasks() -> Sequence[Path]:  # type: ignore[empty-body]
    """Return folders of lm-eval task files (``*.yaml``); their names come before lm-eval's own in gates."""


@hookspec
def register_filters() -> Sequence[Filter]:  # type: ignore[empty-body]
    """Return rules on rows of this plugin; what happens to the rows they find is the recipe's: ``prepare.rules.NAME``.

    A filter is asked in batches and answers one Finding or None for each row; its version is part of the cache's key. A
    name in use leaves the whole plugin out.
    """


@hookspec
def register_readers() -> Sequence[Reader]:  # type: ignore[empty-body]
    """Return the formats of files that this plugin reads, each for an ending: data and replay may then be such files.

    A reader yields the records of an open file with their lines; its name and version are part of the data's digest. An
    ending in use leaves the whole plugin out.
    """


# --- Plan: before anything is loaded or written ---------------------------------------------------------------------


@hookspec
def check_plan(plan: Plan) -> Sequence[Problem]:  # type: ignore[empty-body]
    """Return the problems of a plan; any of them rejects it with exit code 2.

    All plugins are asked, and all problems are reported at once.
    """


# --- Run: before any stage trains, so that bad data or a broken gate costs no training -------------------------------


@hookspec
def run_started(plan: Plan, directory: Path) -> object | None:
    """Return an object with hooks for this run alone, such as a tracker; None for no such object.

    It is unregistered after ``run_finished``, however the run ends.
    """


@hookspec(firstresult=True)
def load_records(step: Step) -> Sequence[Record] | None:
    """Return the training records of a stage, in the shape of its kind, each once. First result.

    They are prepared, then repeated by the weight of their origin. Those of the core are read from disk whenever they
    are asked for: answer others in their place, a change of one is lost. Answer None for stages of other plugins: the
    pipeline then reads their files. Raise BadInput for unusable records.
    """


@hookspec
def check_gate(step: Step) -> Sequence[Problem]:  # type: ignore[empty-body]
    """Return the problems of a stage's gate; its tasks may be loaded for that."""


# --- Stage ------------------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def run_stage(stage: Stage, context: StageContext) -> bool | None:
    """Train, leave an adapter or weights in ``context.output`` and answer True. First result; wrap it to time it."""


@hookspec
def step_logged(stage: str, step: int, metrics: Mapping[str, float]) -> None:
    """Receive the numbers of an optimizer step.

    ``metrics`` holds all numbers reported by the stage, ``loss`` and ``tokens`` among them, and its speed so far:
    ``tokens_per_second``, and on the core's loop ``mfu``, the share of the devices' measured rate.
    """


# --- Gate -------------------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def evaluate_artifact(request: GateRequest, progress: GateProgress) -> Scorecard | None:
    """Score every system of the request, document by document. First result."""


@hookspec(firstresult=True)
def judge_artifact(request: GateRequest, scorecard: Scorecard) -> Verdict | None:
    """Decide about the candidate from the scores. First result; without any answer the artifact is not promoted."""


# --- Finish -----------------------------------------------------------------------------------------------------------


@hookspec
def stage_finished(stage: str, artifact: Artifact, verdict: Verdict) -> None:
    """Receive the verdict about a stage's artifact."""


@hookspec
def run_finished(directory: Path, state: str) -> None:
    """Receive the state of a run at its end; nothing is logged after it."""
