"""The steps of a gate, for runs and for ``posttrain gate`` alike: score, decide, and act on the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from posttrain.config.schema import Half, OnFail
from posttrain.errors import GateFailed, GateUndecided, PluginFailed, PosttrainError
from posttrain.gate.halves import hold_back
from posttrain.gate.spec import GateProgress, GateRequest, Scorecard, Verdict, VerdictState

if TYPE_CHECKING:
    from posttrain.config.schema import GateConfig
    from posttrain.host.plugins import Host

STATES: Mapping[VerdictState, str] = {"pass": "promoted", "fail": "gate_failed", "undecided": "undecided"}
"""State of a stage by the verdict about it, where everything below it is promoted."""
UNPROMOTED = "unpromoted"
"""State of a stage that passed its gate on top of what no gate passed."""
WARNED = "warned"
"""State of a run that is complete, but went on after a verdict that was no pass."""
ERRORS: Mapping[VerdictState, type[PosttrainError]] = {"fail": GateFailed, "undecided": GateUndecided}
"""Errors of the verdicts that stop a command."""


HOOKS = ("evaluate_artifact", "judge_artifact")
"""Hooks behind a verdict."""


def score_systems(host: Host, request: GateRequest, progress: GateProgress) -> tuple[Scorecard, tuple[str, ...]]:
    """Score every system of a request; return the scores and the plugins behind them.

    Raises PluginFailed when no plugin answers with a scorecard.
    """
    scorecard, scored_by = host.ask_first("evaluate_artifact", request=request, progress=progress)
    # The guard checks plain hooks; this also covers no answer at all, and wrappers.
    if not isinstance(scorecard, Scorecard):
        raise PluginFailed(f"{request.stage}: the gate scored {scorecard!r}, which is not a scorecard: never a pass")
    return scorecard, scored_by


def decide_candidate(
    host: Host, request: GateRequest, scorecard: Scorecard, scored_by: tuple[str, ...] = ()
) -> Verdict:
    """Decide about the candidate of a request; ``scored_by`` are the plugins behind its scores.

    Raises PluginFailed when no plugin answers with a verdict.
    """
    verdict, judged_by = host.ask_first("judge_artifact", request=request, scorecard=scorecard)
    if not isinstance(verdict, Verdict):
        raise PluginFailed(f"{request.stage}: the gate answered {verdict!r}, which is not a verdict: never a pass")
    return replace(
        hold_back(request.gate, verdict),
        gated=verdict.gated and request.gate.enabled,
        unpromoted=request.unpromoted,
        trained_on=request.trained_on,
        scored_by=scored_by,
        judged_by=judged_by,
    )


def state_of(verdict: Verdict) -> str:
    """Return the state of a stage under a verdict: a pass on top of what no gate passed promotes nothing."""
    return UNPROMOTED if verdict.state == "pass" and verdict.unpromoted else STATES[verdict.state]


def policy_for(gate: GateConfig, state: str) -> OnFail | None:
    """Return the gate's policy for a verdict; None for a pass, which needs none.

    A run continues from an artifact that the half for choosing does not fail: it is compared, and promoted by nothing.
    """
    if state == "pass":
        return None
    if state == "undecided" and gate.half is Half.choosing:
        return OnFail.warn
    return gate.on_fail if state == "fail" else gate.on_undecided


def verdict_error(where: str, verdict: Verdict) -> PosttrainError:
    """Return the error of a verdict that stops the command: GateFailed for a fail, GateUndecided for undecided."""
    return ERRORS[verdict.state](f"{where}: {verdict.reason}")
