"""The roles of a task in a gate, in one table: what each demands, how it is worded, and what planning supposes.

A new role is a member of ``config.schema.Role``, its setting in ``GateTask.problems`` there, and one entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.config.schema import Role

if TYPE_CHECKING:
    from posttrain.config.schema import GateConfig, GateTask

HOPED = 0.05
"""Assumed gain over the demand, in planning: of a lift, or of a limit's score."""
POINTS = f"{100 * HOPED:g} points"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The demand of one role on a task."""

    least: Callable[[GateConfig, GateTask], float]
    """The threshold of the lower bound."""
    paired: bool = True
    """True compares with other systems, document by document; False sets the candidate's own score against a limit."""
    fails_at_least: bool = False
    """True when an upper bound of exactly ``least`` fails; otherwise it has to lie below."""
    shares_error: bool = False
    """True when several over one system share the allowed error, because each is a claim that luck alone could win."""
    pools: bool = False
    """True when ``pooled_max_drop`` takes such tasks together."""
    change: str = "change"
    """Name of the mean difference in a reason."""
    failing: str = "lies below"
    """Verb of a reason, between the upper bound of a failed task and ``least``."""
    hoped: float = HOPED
    """Assumed gain over the demand, in planning; 0 supposes that nothing changed at all."""
    supposed: str
    """The case that the chances in ``posttrain plan`` belong to."""
    hopeless_below: float = 0.2
    """Chance of passing, if the supposition holds, below which ``posttrain plan`` warns."""

    def demand(self, gate: GateConfig, task: GateTask) -> str:
        """Return the demand in words."""
        if not self.paired:
            return f"bound of the score better than {task.threshold:g}"
        return f"lower bound > {self.least(gate, task):+.3f}"

    def expect(self, gate: GateConfig, task: GateTask) -> float:
        """Return the true difference that planning supposes."""
        return min(self.least(gate, task) + self.hoped, 1.0) if self.hoped else 0.0


RULES: Mapping[Role, Rule] = {
    Role.lift: Rule(
        least=lambda gate, task: task.min_lift,
        fails_at_least=True,
        shares_error=True,
        change="lift",
        failing="does not exceed",
        supposed=f"a lift {POINTS} better",
    ),
    # A guard has to be planned for a candidate that changes nothing: anything else would plan for luck.
    Role.guard: Rule(
        least=lambda gate, task: -gate.allowed_drop(task),
        pools=True,
        hoped=0.0,
        supposed="an unchanged model",
        hopeless_below=0.5,
    ),
    # The evidence of a limit is the distance from its threshold.
    Role.limit: Rule(least=lambda gate, task: 0.0, paired=False, supposed=f"a score {POINTS} better"),
}
