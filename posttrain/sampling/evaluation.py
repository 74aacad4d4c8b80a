"""The reward of greedy answers to questions set aside from training, beside the reward of sampled ones, and the gate.

Sampled answers hide the progress of the likeliest ones behind the tail of the distribution, and trained questions say
nothing about others. Greedy answers to untrained questions show both.
"""

# D = questions set aside

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import ClassVar

import torch

from posttrain.engine.checkpoint import State
from posttrain.engine.config import SampledConfig
from posttrain.engine.engine import Engine
from posttrain.engine.evaluation import NEGLIGIBLE, Evaluation, Measured
from posttrain.rewards.matching import Undecided, is_right
from posttrain.sampling.gate import GateCourse
from posttrain.sampling.policy import Asked, Policy, Rewarded
from posttrain.sampling.sampler import Drawing
from posttrain.sampling.trail import Trail


@dataclass(kw_only=True)
class GreedyReward(Evaluation):
    """Measures the mean reward of greedy answers, and the gate's sample, while a model is trained."""

    rows: Sequence[Asked]  # type: ignore[assignment]
    config: SampledConfig
    refusals: int = 0
    policy: Policy
    trail: Trail
    gate: GateCourse
    BEST: ClassVar[str] = "highest"
    _lengths: dict[str, float] = field(default_factory=dict, init=False)

    @property
    def is_asked(self) -> bool:
        """True with questions set aside, or a gate to follow."""
        return bool(self.rows) or self.gate.is_followed

    def measure(
        self,
        step: int,
        engine: Engine,
        dtype: str,
        report: Callable[[int, int], None] | None = None,
    ) -> dict[str, float]:
        """Return the figures of greedy answers to questions set aside, and the gate's scores of its sample.

        Model and random numbers stay as they are.
        """
        own = self._rewards(step, engine, dtype) if self.rows else {}
        return {**own, **self.gate.measure(step, engine, dtype)}

    def _rewards(self, step: int, engine: Engine, dtype: str) -> dict[str, float]:
        """Return the mean reward, the share of answers that never ended and their tokens, after ``step``.

        Beside them is the share of right answers by each question's own match, which the reward may not look at: what a
        gate of such questions would say.
        """
        drawing = Drawing(k=1, temperature=0, max_tokens=self.config.max_tokens, seed=0)
        answers = [each for (each,) in self.policy.answer(engine, dtype, self.rows, drawing)]
        rights = [_right(row, each) for row, each in zip(self.rows, answers, strict=True)]
        self.trail.write_greedy(step, self.rows, answers, rights)
        last = self.note(Measured(step, torch.tensor([each.reward for each in answers], dtype=torch.float64)))
        self._lengths = {
            "eval_cut": fmean(not each.answer.ended for each in answers),
            "eval_answer_tokens": fmean(len(each.answer.ids) for each in answers),
        }
        if known := [right for right in rights if right is not None]:
            self._lengths["eval_right"] = fmean(known)
        return {"eval_reward": _mean(last), **self._lengths}

    def figures(self) -> dict[str, int | float]:
        """Return the eval figures of the manifest; empty when nothing was measured."""
        if self.first is None or self.best is None or self.last is None:
            return self.gate.figures()
        return {
            "eval_reward": _mean(self.last),
            "eval_reward_first": _mean(self.first),
            "eval_reward_highest": _mean(self.best),
            "eval_reward_highest_step": self.best.step,
            "eval_questions": len(self.rows),
            **({} if (first := self.trail.right_share(0)) is None else {"eval_right_first": first}),
            **self._lengths,
            **self.gate.figures(),
        }

    def warnings(self) -> list[str]:
        """Return a warning of training too long."""
        if self.best is None or self.last is None:
            return []
        fall = self.difference(self.best, self.last)
        if not fall.falls or -fall.value < NEGLIGIBLE * abs(_mean(self.best)):
            return []
        place = f"greedy answers to questions set aside had the highest reward at step {self.best.step}"
        change = f"{_mean(self.last):.3f} at step {self.last.step} is lower by {-fall.value:.3f} ± {fall.error:.3f}"
        step = self.best.step
        fix = f"Train for fewer steps (max_steps={step} ends there), or lower lr" if step else "Lower lr"
        return [f"overfitting by the eval reward: {place} ({_mean(self.best):.3f}); {change}. {fix}"]

    def left_behind(self, first: float, last: float) -> list[str]:
        """Return a warning where greedy rewards did not rise while sampled ones did, from ``first`` to ``last``."""
        if self.first is None or self.last is None:
            return []
        gain = self.difference(self.first, self.last).value
        if gain > 0:
            return []
        what = f"the sampled reward rose from {first:.3f} to {last:.3f}, that of greedy answers to questions set aside"
        change = "stayed as it was" if gain == 0 else f"fell by {-gain:.3f}"
        return [f"{what} {change}: the gain may not reach other questions. Ask more of them, or raise temperature"]

    def gone_apart(self) -> list[str]:
        """Return a warning where the reward of greedy answers rose beyond noise, and no more of them are right."""
        first, last = self.trail.right_share(0), self._lengths.get("eval_right")
        if self.first is None or self.last is None or first is None or last is None:
            return []
        if not self.difference(self.first, self.last).rises or last > first or first == 1:
            return []
        rose = f"rose from {_mean(self.first):.3f} to {_mean(self.last):.3f}"
        what = f"the reward of greedy answers to questions set aside {rose}, and no more of them are right"
        fix = "the model may learn the reward alone. Read its answers in answers/eval-*.jsonl"
        return [f"{what} ({first:.1%}, then {last:.1%}): {fix}"]

    def state(self) -> State:
        """Return the measurements to keep in a checkpoint."""
        return {**super().state(), **self.gate.state()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the measurements of ``state``."""
        super().restore(state)
        self.gate.restore(state)

    def is_better(self, one: Measured, other: Measured) -> bool:
        """Return true when the mean reward of ``one`` is higher."""
        return bool(one.sums.mean() > other.sums.mean())

    def _tokens(self) -> torch.Tensor:
        """Return 1 for each question: the reward is a mean over them."""
        return torch.ones(len(self.rows), dtype=torch.float64)


def _right(row: Asked, each: Rewarded) -> bool | None:
    """Return True for a right answer by its question's own match; None for a question that has no right answer."""
    question = row.question
    if not question.answers:
        return None
    try:
        return each.answer.ended and is_right(each.text, question.answers, question.match)
    except Undecided:
        return None


def _mean(measured: Measured) -> float:
    return float(measured.sums.mean())
