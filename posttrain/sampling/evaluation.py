"""The reward of greedy answers to questions set aside from training, beside the reward of sampled ones.

At the temperature of sampling the tail of a model's distribution hides what its likeliest answers have learnt, and a
question that is trained says nothing about others: both are told by greedy answers to questions that are not.
"""

# D = questions set aside

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch

from posttrain.engine.checkpoint import State
from posttrain.engine.config import SampledConfig
from posttrain.engine.engine import Engine
from posttrain.engine.evaluation import NEGLIGIBLE, Evaluation, Measured
from posttrain.sampling.policy import Asked, Policy
from posttrain.sampling.sampler import Drawing
from posttrain.sampling.trail import Trail


@dataclass(kw_only=True)
class GreedyReward(Evaluation):
    """Measures the mean reward of greedy answers while a model is trained; without questions, never."""

    rows: Sequence[Asked]  # type: ignore[assignment]
    config: SampledConfig
    refusals: int = 0
    policy: Policy
    trail: Trail
    highest: Measured | None = field(default=None, init=False)
    _lengths: dict[str, float] = field(default_factory=dict, init=False)

    def measure(
        self,
        step: int,
        engine: Engine,
        dtype: str,
        report: Callable[[int, int], None] | None = None,
    ) -> dict[str, float]:
        """Return the mean reward, the share of answers that never ended and their tokens, after ``step``.

        Model and random numbers stay as they are.
        """
        drawing = Drawing(k=1, temperature=0, max_tokens=self.config.max_tokens, seed=0)
        answers = [each for (each,) in self.policy.answer(engine, dtype, self.rows, drawing)]
        self.trail.write_greedy(step, self.rows, answers)
        self.last = Measured(step, torch.tensor([each.reward for each in answers], dtype=torch.float64))
        self.first = self.first or self.last
        if self.highest is None or self.last.sums.mean() > self.highest.sums.mean():
            self.highest = self.last
        self._lengths = {
            "eval_cut": fmean(not each.answer.ended for each in answers),
            "eval_answer_tokens": fmean(len(each.answer.ids) for each in answers),
        }
        return {"eval_reward": _mean(self.last), **self._lengths}

    def figures(self) -> dict[str, int | float]:
        """Return the eval figures of the manifest; empty when nothing was measured."""
        if self.first is None or self.highest is None or self.last is None:
            return {}
        return {
            "eval_reward": _mean(self.last),
            "eval_reward_first": _mean(self.first),
            "eval_reward_highest": _mean(self.highest),
            "eval_reward_highest_step": self.highest.step,
            "eval_questions": len(self.rows),
            **self._lengths,
        }

    def warnings(self) -> list[str]:
        """Return a warning of training too long."""
        if self.highest is None or self.last is None:
            return []
        fall = self.difference(self.highest, self.last)
        if not fall.falls or -fall.value < NEGLIGIBLE * abs(_mean(self.highest)):
            return []
        place = f"greedy answers to questions set aside had the highest reward at step {self.highest.step}"
        change = f"{_mean(self.last):.3f} at step {self.last.step} is lower by {-fall.value:.3f} ± {fall.error:.3f}"
        step = self.highest.step
        fix = f"Train for fewer steps (max_steps={step} ends there), or lower lr" if step else "Lower lr"
        return [f"overfitting by the eval reward: {place} ({_mean(self.highest):.3f}); {change}. {fix}"]

    def left_behind(self, first: float, last: float) -> list[str]:
        """Return a warning where the sampled reward rose from ``first`` to ``last``, and the greedy one did not."""
        if self.first is None or self.last is None or last <= first:
            return []
        gain = self.difference(self.first, self.last).value
        if gain > 0:
            return []
        what = f"the sampled reward rose from {first:.3f} to {last:.3f}, that of greedy answers to questions set aside"
        change = "stayed as it was" if gain == 0 else f"fell by {-gain:.3f}"
        return [f"{what} {change}: the gain may not reach other questions. Ask more of them, or raise temperature"]

    def state(self) -> State:
        """Return the measurements to keep in a checkpoint."""
        kept = {"first": self.first, "highest": self.highest}
        state: State = {f"evaluation/{name}": each.sums.clone() for name, each in kept.items() if each is not None}
        if self.highest is not None:
            state["evaluation/highest_step"] = torch.tensor(self.highest.step)
        return state

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the measurements of ``state``."""
        if "evaluation/first" in state:
            self.first = Measured(0, state["evaluation/first"])
            self.highest = Measured(int(state["evaluation/highest_step"]), state["evaluation/highest"])

    def _tokens(self) -> torch.Tensor:
        """Return 1 for each question: the reward is a mean over them."""
        return torch.ones(len(self.rows), dtype=torch.float64)


def _mean(measured: Measured) -> float:
    return float(measured.sums.mean())
