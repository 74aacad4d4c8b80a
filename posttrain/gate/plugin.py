"""The verdict by paired tests, as a plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.hookspecs import hookimpl

if TYPE_CHECKING:
    from posttrain.gate.spec import GateRequest, Scorecard, Verdict


@hookimpl
def judge_artifact(request: GateRequest, scorecard: Scorecard) -> Verdict:
    """Judge the candidate by the bounds of its paired differences."""
    from posttrain.gate.verdict import judge

    return judge(request, scorecard)
