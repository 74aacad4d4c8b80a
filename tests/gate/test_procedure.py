"""The steps of a gate: answers of plugins are checked, and each verdict has one consequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pluggy
import pytest

from posttrain import hookspecs
from posttrain.config.schema import GateConfig, OnFail
from posttrain.errors import GateFailed, GateUndecided, PluginFailed
from posttrain.gate.procedure import decide_candidate, policy_for, score_systems, verdict_error
from posttrain.gate.spec import Scorecard, Verdict
from posttrain.hookspecs import hookimpl
from posttrain.host.plugins import Host
from tests.support import gates
from tests.support.adapters import Log

CARD = gates.card(gates.rows("base", [0.0, 1.0]), gates.rows("candidate", [1.0, 1.0]))
PASS = Verdict(state="pass", gated=True, tasks=(), reason="because")


class Answers:
    """A plugin whose wrappers answer anything: a guard checks plain hooks alone."""

    def __init__(self, scorecard: object, verdict: object) -> None:
        self.scorecard, self.verdict = scorecard, verdict

    @hookimpl(wrapper=True)
    def evaluate_artifact(self) -> Iterator[None]:  # type: ignore[misc]
        yield
        return self.scorecard

    @hookimpl(wrapper=True)
    def judge_artifact(self) -> Iterator[None]:  # type: ignore[misc]
        yield
        return self.verdict


def ask(scorecard: object, verdict: object) -> tuple[Scorecard, Verdict]:
    manager = pluggy.PluginManager("posttrain")
    manager.add_hookspecs(hookspecs)
    manager.register(Answers(scorecard, verdict))
    host = Host(manager)
    scores, scored_by = score_systems(host, gates.request(), Log())
    return scores, decide_candidate(host, gates.request(), scores, scored_by)


def test_a_gate_scores_and_decides() -> None:
    by = ("tests.gate.test_procedure.Answers",)
    assert ask(CARD, PASS) == (CARD, replace(PASS, scored_by=by, judged_by=by))


@pytest.mark.parametrize("answer", [None, "pass", True, object()])
def test_no_other_answer_is_a_pass(answer: object) -> None:
    with pytest.raises(PluginFailed, match=r"sft: .* is not a scorecard: never a pass"):
        ask(answer, PASS)
    with pytest.raises(PluginFailed, match=r"sft: .* is not a verdict: never a pass"):
        ask(CARD, answer)


def test_each_verdict_has_its_policy_and_its_error() -> None:
    gate = GateConfig(on_fail=OnFail.rollback, on_undecided=OnFail.warn)
    assert policy_for(gate, "pass") is None
    assert policy_for(gate, "fail") is OnFail.rollback
    assert policy_for(gate, "undecided") is OnFail.warn
    fail, undecided = (Verdict(state=state, gated=True, tasks=(), reason="why") for state in ("fail", "undecided"))
    assert isinstance(verdict_error("here", fail), GateFailed)
    assert isinstance(verdict_error("here", undecided), GateUndecided)
    assert str(verdict_error("here", fail)) == "here: why"
