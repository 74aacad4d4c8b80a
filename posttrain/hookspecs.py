"""The hooks of posttrain, in the order in which they are called.

A plugin implements any of them in a module or class that it names under the entry-point group ``posttrain``::

    from posttrain import Stage, hookimpl

    @hookimpl
    def register_stages():
        return [Stage(name="mine", ...)]

Calls go to the plugin registered last first. Hooks marked *first result* stop at the first answer that is not None.

Whatever an implementation raises is reported with the plugin's name, except the errors of ``posttrain`` itself, which
mean what they say. None may change the working directory or torch's modes, or draw from shared random numbers.
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
    from posttrain.plan import Plan, Step
    from posttrain.stage import Settings, Stage

API_VERSION = 1
"""A plugin may set ``POSTTRAIN_API = 1`` in its module; one that names another version is not loaded."""

hookspec = pluggy.HookspecMarker("posttrain")
hookimpl = pluggy.HookimplMarker("posttrain")


# --- Start: no torch, no Hydra; every command waits for these -------------------------------------------------------


@hookspec
def register_stages() -> Sequence[Stage]:  # type: ignore[empty-body]
    """The kinds of stage that this plugin brings.

    A name that another plugin has registered leaves the whole plugin out.
    """


@hookspec
def register_settings() -> Sequence[Settings]:  # type: ignore[empty-body]
    """Settings of this plugin that belong to no stage; ``plan.settings[NAME]`` holds them as an object of their type.

    A name that is taken leaves the whole plugin out.
    """


@hookspec
def register_config() -> Sequence[Path]:  # type: ignore[empty-body]
    """Folders that hold ``conf/`` and ``recipes/`` of this plugin.

    ``conf/gate/NAME.yaml`` and its like become options of their groups, ``recipes/NAME.yaml`` a recipe. A file
    ``conf/stage/NAME.yaml`` that begins with ``/settings@_here_: NAME`` sets what the stage NAME has by default.
    One whose name is taken leaves the whole plugin out.
    """


@hookspec
def register_eval_tasks() -> Sequence[Path]:  # type: ignore[empty-body]
    """Folders of lm-eval task files (``*.yaml``); gates may use the names of these tasks, before lm-eval's own."""


# --- Plan: before anything is loaded or written ---------------------------------------------------------------------


@hookspec
def check_plan(plan: Plan) -> Sequence[Problem]:  # type: ignore[empty-body]
    """What is wrong with the plan; any problem refuses it with exit code 2.

    All plugins are asked, and all problems are reported at once.
    """


# --- Run --------------------------------------------------------------------------------------------------------------


@hookspec
def run_started(plan: Plan, directory: Path) -> object | None:
    """Return an object whose hooks are called for this run alone, such as a tracker; None for no such object.

    After ``run_finished`` it is unregistered, however the run ends.
    """


# --- Stage ------------------------------------------------------------------------------------------------------------


@hookspec
def check_gate(step: Step) -> Sequence[Problem]:  # type: ignore[empty-body]
    """What only loading the tasks of a stage's gate shows to be wrong; asked before any stage trains."""


@hookspec(firstresult=True)
def load_records(step: Step) -> Sequence[Record] | None:
    """The training records of a stage, in the shape that its kind asks for. First result.

    Answer None for a stage that is not yours: its files are read then. Raise BadInput for records that cannot be used.
    """


@hookspec(firstresult=True)
def run_stage(stage: Stage, context: StageContext) -> bool | None:
    """Train: leave an adapter or weights in ``context.output`` and answer True. First result; wrap it to time it."""


@hookspec
def step_logged(stage: str, step: int, metrics: Mapping[str, float]) -> None:
    """An optimizer step is done.

    ``metrics`` are the numbers that the stage reported, ``loss`` and ``tokens`` among them.
    """


# --- Gate -------------------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def evaluate_artifact(request: GateRequest, progress: GateProgress) -> Scorecard | None:
    """Score every system of the request, document by document. First result."""


@hookspec(firstresult=True)
def judge_artifact(request: GateRequest, scorecard: Scorecard) -> Verdict | None:
    """Decide about the candidate from the scores. First result; no answer at all is a refusal."""


# --- Finish -----------------------------------------------------------------------------------------------------------


@hookspec
def stage_finished(stage: str, artifact: Artifact, verdict: Verdict) -> None:
    """A stage has its verdict, whatever it is."""


@hookspec
def run_finished(directory: Path, state: str) -> None:
    """The run is over; nothing more is logged."""
