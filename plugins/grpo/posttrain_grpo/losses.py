"""The losses of sampled answers, from the log-probabilities of their tokens.

With the ratio r of a token's chance to the one it was drawn with, and its answer's advantage a:

    all but cispo         -min(r a, clip(r, 1 - epsilon, 1 + epsilon_high) a)
    cispo                 -min(r, 1 + epsilon_high) a log p, no gradient through the weight
    all                   + beta (q/p - log q/p - 1), the KL divergence from the model before training

A token's loss is divided by the tokens of the step (dapo, cispo), by those of its answer and the answers of the step
(grpo), by max_tokens and the answers (dr_grpo), or by the tokens of its batch and the batches of the step (bnpo).
"""

# N = tokens of all answers of a batch, A = answers of a batch

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch

from posttrain import AnsweredQuestion, TokenScores
from posttrain_grpo.config import GRPOSettings

LEAST_SPREAD = 1e-4
"""Added to a spread that divides, as TRL has it: rewards that hardly differ shall not be blown up."""


@dataclass(frozen=True)
class GRPOLoss:
    """The loss of a step's sampled answers."""

    settings: GRPOSettings

    @property
    def referenced(self) -> bool:
        """True with a KL term."""
        return self.settings.referenced

    def advantages(self, rewards: Sequence[Sequence[float]]) -> Sequence[Sequence[float]]:
        """Return the advantage of each answer over the others to its question."""
        return advantages(rewards, self.settings.scale_rewards)

    def totals(self, rows: Sequence[AnsweredQuestion]) -> Mapping[str, int]:
        """Count the answers' tokens that are in the loss."""
        answers = [answer for row in rows for answer in row.answers]
        counted = [answer for answer in answers if answer.ended or not self.settings.mask_cut]
        batches = {"batches": -(-len(rows) // self.settings.per_device_batch_size)} if self.settings.coupled else {}
        return {"loss_tokens": sum(len(answer.ids) for answer in counted), **batches}

    def share(self, scores: TokenScores, totals: Mapping[str, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the share of a batch in the loss of the step, and sums of its figures over tokens."""
        counts_N = self._counts(scores)
        ratio_N = (scores.log_probs - scores.drawn).exp()
        loss_N = self._policy_loss(scores, ratio_N)
        kl_N = torch.zeros_like(loss_N)
        if scores.reference is not None:
            above_N = scores.reference - scores.log_probs
            kl_N = above_N.exp() - above_N - 1
            loss_N = loss_N + self.settings.beta * kl_N
        loss = (loss_N * counts_N * self._weights(scores, totals)).sum()
        clipped_N = self._clipped(scores, ratio_N)
        sums = {"loss": loss, "kl": (kl_N * counts_N).sum(), "clipped": (clipped_N * counts_N).sum()}
        return loss, {name: value.detach() for name, value in sums.items()}

    def figures(self, sums: Mapping[str, float], totals: Mapping[str, int]) -> dict[str, float]:
        """Return the loss, the mean KL divergence of a token, and the share of tokens whose ratio is clipped."""
        tokens = max(totals["loss_tokens"], 1)
        kl = {"kl": sums["kl"] / tokens} if self.referenced else {}
        return {"loss": sums["loss"], "clipped": sums["clipped"] / tokens, **kl}

    def _policy_loss(self, scores: TokenScores, ratio_N: torch.Tensor) -> torch.Tensor:
        high = 1 + self.settings.epsilon_high
        if self.settings.loss_type == "cispo":
            return -ratio_N.clamp(max=high).detach() * scores.advantages * scores.log_probs
        clipped_N = ratio_N.clamp(1 - self.settings.epsilon, high)
        return -torch.minimum(ratio_N * scores.advantages, clipped_N * scores.advantages)

    def _clipped(self, scores: TokenScores, ratio_N: torch.Tensor) -> torch.Tensor:
        high_N = (ratio_N > 1 + self.settings.epsilon_high) & (scores.advantages > 0)
        low_N = (ratio_N < 1 - self.settings.epsilon) & (scores.advantages < 0)
        return (high_N if self.settings.loss_type == "cispo" else high_N | low_N).to(ratio_N.dtype)

    def _counts(self, scores: TokenScores) -> torch.Tensor:
        """Return 1 for each token in the loss and 0 for others, [N]."""
        counted_A = scores.ended if self.settings.mask_cut else torch.ones_like(scores.ended)
        return counted_A[scores.owners].to(scores.log_probs.dtype)

    def _weights(self, scores: TokenScores, totals: Mapping[str, int]) -> torch.Tensor:
        """Return what the loss of each token is multiplied by, [N]."""
        if self.settings.loss_type == "grpo":
            return 1 / (scores.lengths[scores.owners].to(scores.log_probs.dtype) * totals["answers"])
        if self.settings.loss_type == "dr_grpo":
            return torch.full_like(scores.log_probs, 1 / (self.settings.max_tokens * totals["answers"]))
        if self.settings.loss_type == "bnpo":
            return 1 / (self._counts(scores).sum().clamp(min=1) * totals["batches"]).expand_as(scores.log_probs)
        return torch.full_like(scores.log_probs, 1 / max(totals["loss_tokens"], 1))


def advantages(rewards: Sequence[Sequence[float]], scale: str) -> list[list[float]]:
    """Return each reward over the mean of its group, divided by the spread that ``scale`` names."""
    flat = [value for group in rewards for value in group]
    overall = stdev(flat) if len(flat) > 1 else 0.0
    found = []
    for group in rewards:
        spread = {"group": stdev(group), "batch": overall, "none": 1 - LEAST_SPREAD}[scale]
        mean = fmean(group)
        found.append([(value - mean) / (spread + LEAST_SPREAD) for value in group])
    return found
