"""The losses of the preference methods, as functions of the log-probabilities of answers.

A log-probability is in nats, summed over an answer's tokens. The loss of an optimizer step is a mean over its rows,
with a likelihood as a mean over its tokens: batches add their shares, divided by the counts of the whole step. A mean
of the batches' means would weigh the pairs of a short batch more, and change with the size of a batch.
"""

# B = rows of a batch: pairs, or judged answers; A = answers of a row

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import logsigmoid

from posttrain import AnswerScores
from posttrain_preference.config import CPOSettings, DPOSettings, KTOSettings, ORPOSettings, SimPOSettings
from posttrain_preference.feedback import TokenAnswer
from posttrain_preference.losses import SFT
from posttrain_preference.pairs import TokenPair

Sums = dict[str, torch.Tensor]
CERTAIN = -1e-12
"""Largest log-probability of a token with finite odds: those of a certain answer have no logarithm."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Log-probabilities of the answers of a batch of pairs, each [B], and their numbers of tokens."""

    chosen: torch.Tensor
    """Of the chosen answers, by the policy."""
    rejected: torch.Tensor
    chosen_reference: torch.Tensor
    """Of the chosen answers, by the reference."""
    rejected_reference: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    @classmethod
    def of(cls, scores: AnswerScores) -> Pairs:
        """Return the two columns of ``scores``; without a reference, its log-probabilities are 0."""
        reference_BA = torch.zeros_like(scores.log_probs) if scores.reference is None else scores.reference
        return cls(
            chosen=scores.log_probs[:, 0],
            rejected=scores.log_probs[:, 1],
            chosen_reference=reference_BA[:, 0],
            rejected_reference=reference_BA[:, 1],
            chosen_tokens=scores.tokens[:, 0],
            rejected_tokens=scores.tokens[:, 1],
        )

    @property
    def chosen_ratio(self) -> torch.Tensor:
        """Log-probability ratio of policy to reference, of the chosen answers."""
        return self.chosen - self.chosen_reference

    @property
    def rejected_ratio(self) -> torch.Tensor:
        """Log-probability ratio of policy to reference, of the rejected answers."""
        return self.rejected - self.rejected_reference

    @property
    def margin(self) -> torch.Tensor:
        """Difference of both ratios."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def per_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both ratios per token of their answers."""
        return self.chosen_ratio / self.chosen_tokens, self.rejected_ratio / self.rejected_tokens

    @property
    def token_margin(self) -> torch.Tensor:
        """Difference of both ratios per token."""
        chosen_B, rejected_B = self.per_token
        return chosen_B - rejected_B


# --- DPO and its kin --------------------------------------------------------------------------------------------------


def _sigmoid(pairs: Pairs, settings: DPOSettings) -> torch.Tensor:
    return -logsigmoid(settings.beta * pairs.margin)


def _hinge(pairs: Pairs, settings: DPOSettings) -> torch.Tensor:
    return torch.relu(1 - settings.beta * pairs.margin)


def _ipo(pairs: Pairs, settings: DPOSettings) -> torch.Tensor:
    # per token, as the authors of the paper computed its results; the paper's sums grow with the length of an answer
    return (pairs.token_margin - 1 / (2 * settings.beta)) ** 2


def _exo_pair(pairs: Pairs, settings: DPOSettings) -> torch.Tensor:
    smoothing = torch.tensor(settings.label_smoothing, dtype=pairs.chosen.dtype)
    reward_B = settings.beta * pairs.margin
    kept_B = reward_B.sigmoid() * (logsigmoid(reward_B) - torch.log1p(-smoothing))
    return kept_B + (-reward_B).sigmoid() * (logsigmoid(-reward_B) - torch.log(smoothing))


def _nca_pair(pairs: Pairs, settings: DPOSettings) -> torch.Tensor:
    chosen_B, rejected_B = settings.beta * pairs.chosen_ratio, settings.beta * pairs.rejected_ratio
    return -logsigmoid(chosen_B) - 0.5 * logsigmoid(-chosen_B) - 0.5 * logsigmoid(-rejected_B)


def _robust(pairs: Pairs, settings: DPOSettings) -> torch.Tensor:
    smoothing, reward_B = settings.label_smoothing, settings.beta * pairs.margin
    return (smoothing * logsigmoid(-reward_B) - (1 - smoothing) * logsigmoid(reward_B)) / (1 - 2 * smoothing)


def _bco_pair(pairs: Pairs, settings: DPOSettings) -> torch.Tensor:
    return -logsigmoid(settings.beta * pairs.chosen_ratio) - logsigmoid(-settings.beta * pairs.rejected_ratio)


def _sppo_hard(pairs: Pairs, settings: DPOSettings) -> torch.Tensor:
    target = 0.5 / settings.beta
    return (pairs.chosen_ratio - target) ** 2 + (pairs.rejected_ratio + target) ** 2


def _aot(pairs: Pairs, settings: DPOSettings) -> torch.Tensor:
    policy_B, _ = (pairs.chosen - pairs.rejected).sort()
    reference_B, _ = (pairs.chosen_reference - pairs.rejected_reference).sort()
    return _smoothed(settings.beta * (policy_B - reference_B), settings.label_smoothing)


def _aot_unpaired(pairs: Pairs, settings: DPOSettings) -> torch.Tensor:
    chosen_B, _ = pairs.chosen_ratio.sort()
    rejected_B, _ = pairs.rejected_ratio.sort()
    return _smoothed(settings.beta * (chosen_B - rejected_B), settings.label_smoothing)


def _apo_zero(pairs: Pairs, settings: DPOSettings) -> torch.Tensor:
    raised_B = 1 - (settings.beta * pairs.chosen_ratio).sigmoid()
    return raised_B + (settings.beta * pairs.rejected_ratio).sigmoid()


def _apo_down(pairs: Pairs, settings: DPOSettings) -> torch.Tensor:
    lowered_B = (settings.beta * pairs.chosen_ratio).sigmoid()
    return lowered_B + 1 - (settings.beta * pairs.margin).sigmoid()


def _discopop(pairs: Pairs, settings: DPOSettings) -> torch.Tensor:
    reward_B = settings.beta * pairs.margin
    share_B = (reward_B / settings.discopop_tau).sigmoid()
    return (1 - share_B) * -logsigmoid(reward_B) + share_B * torch.exp(-reward_B)


def _sigmoid_norm(pairs: Pairs, settings: DPOSettings) -> torch.Tensor:
    return -logsigmoid(settings.beta * pairs.token_margin)


def _smoothed(reward_B: torch.Tensor, smoothing: float) -> torch.Tensor:
    return -(1 - smoothing) * logsigmoid(reward_B) - smoothing * logsigmoid(-reward_B)


CONTRASTS: Mapping[str, Callable[[Pairs, DPOSettings], torch.Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
}
"""The loss of each pair of a batch by the name of each of DPO's losses; the sources are in the README."""


# --- The methods ------------------------------------------------------------------------------------------------------


class PairLoss(ABC):
    """The loss of a method on pairs: a mean over pairs, and where it has one, the likelihood of the chosen answers."""

    referenced: ClassVar[bool] = False
    coupled = False
    shuffled = True
    likelihood: float = 0.0
    """Weight of the negative log-likelihood of the chosen answers, per token."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @abstractmethod
    def contrast(self, pairs: Pairs) -> torch.Tensor:
        """Return the loss of each pair, [B]."""

    @abstractmethod
    def rewards(self, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rewards of the chosen and of the rejected answers, each [B]."""

    def totals(self, rows: Sequence[TokenPair]) -> dict[str, int]:
        """Count the pairs of a step and the tokens of their chosen answers."""
        return {"pairs": len(rows), "chosen_tokens": sum(len(row.chosen) for row in rows)}

    def share(self, scores: AnswerScores, totals: Mapping[str, int]) -> tuple[torch.Tensor, Sums]:
        """Return the share of a batch in the loss of the step, and its sums of rewards."""
        pairs = Pairs.of(scores)
        nll = -pairs.chosen.sum()
        loss = self.contrast(pairs).sum() / totals["pairs"]
        if self.likelihood:
            loss = loss + self.likelihood * nll / totals["chosen_tokens"]
        chosen_B, rejected_B = (each.detach() for each in self.rewards(pairs))
        return loss, {
            "loss": loss.detach(),
            "margin": (chosen_B - rejected_B).sum(),
            "right": (chosen_B > rejected_B).sum(),
            "nll": nll.detach(),
        }

    def figures(self, sums: Mapping[str, float], totals: Mapping[str, int]) -> dict[str, float]:
        """Return the loss of the step, and the means of its rewards and likelihoods."""
        found = {
            "loss": sums["loss"],
            "rewards_margin": sums["margin"] / totals["pairs"],
            "rewards_accuracy": sums["right"] / totals["pairs"],
        }
        return found if self.referenced else found | {"nll": sums["nll"] / totals["chosen_tokens"]}


class DPOLoss(PairLoss):
    """The weighted sum of DPO's losses."""

    referenced = True
    settings: DPOSettings

    def __init__(self, settings: DPOSettings) -> None:
        super().__init__(settings)
        self.coupled = settings.coupled
        self.likelihood = dict(settings.weighted_losses()).get(SFT, 0.0)

    def contrast(self, pairs: Pairs) -> torch.Tensor:
        """Return the weighted sum of each pair's losses, but for the likelihood."""
        total_B = torch.zeros_like(pairs.chosen)
        for name, weight in self.settings.weighted_losses():
            if name != SFT:
                total_B = total_B + weight * CONTRASTS[name](pairs, self.settings)
        return total_B

    def rewards(self, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return beta times the log-probability ratios."""
        return _scaled(self.settings.beta, (pairs.chosen_ratio, pairs.rejected_ratio))


class ORPOLoss(PairLoss):
    """The likelihood of the chosen answers, and their odds over the rejected ones."""

    settings: ORPOSettings
    likelihood = 1.0

    def contrast(self, pairs: Pairs) -> torch.Tensor:
        """Return minus beta times the log-sigmoid of the odds ratio of tokens."""
        chosen_B, rejected_B = pairs.per_token
        return -self.settings.beta * logsigmoid(_log_odds(chosen_B) - _log_odds(rejected_B))

    def rewards(self, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return beta times the log-probabilities per token."""
        return _scaled(self.settings.beta, pairs.per_token)


class CPOLoss(PairLoss):
    """The contrast of both answers, held by the likelihood of the chosen ones."""

    settings: CPOSettings

    def __init__(self, settings: CPOSettings) -> None:
        super().__init__(settings)
        self.likelihood = settings.cpo_alpha

    def contrast(self, pairs: Pairs) -> torch.Tensor:
        """Return the loss of each pair by the settings' ``loss_type``."""
        if self.settings.loss_type == "ipo":
            return (pairs.token_margin - 1 / (2 * self.settings.beta)) ** 2
        reward_B = self.settings.beta * pairs.margin
        if self.settings.loss_type == "hinge":
            return torch.relu(1 - reward_B)
        return _smoothed(reward_B, self.settings.label_smoothing)

    def rewards(self, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return beta times the log-probabilities, per token for ``ipo``."""
        whole = (pairs.chosen, pairs.rejected)
        return _scaled(self.settings.beta, pairs.per_token if self.settings.loss_type == "ipo" else whole)


class SimPOLoss(PairLoss):
    """The contrast of both answers per token, beyond a target margin."""

    settings: SimPOSettings

    def contrast(self, pairs: Pairs) -> torch.Tensor:
        """Return minus the log-sigmoid of the rewards' difference beyond the target margin."""
        return -logsigmoid(self.settings.beta * pairs.token_margin - self.settings.gamma)

    def rewards(self, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return beta times the log-probabilities per token."""
        return _scaled(self.settings.beta, pairs.per_token)


class KTOLoss:
    """The value of answers judged good or bad, against the divergence from the reference on other answers."""

    referenced = True
    shuffled = False  # good and bad answers are spread evenly over the batches
    settings: KTOSettings

    def __init__(self, settings: KTOSettings) -> None:
        self.settings = settings
        self.coupled = settings.coupled

    def totals(self, rows: Sequence[TokenAnswer]) -> dict[str, int]:
        """Count the answers of a step, and the good ones."""
        size = self.settings.per_device_batch_size
        return {"answers": len(rows), "good": sum(row.label for row in rows), "batches": -(-len(rows) // size)}

    def share(self, scores: AnswerScores, totals: Mapping[str, int]) -> tuple[torch.Tensor, Sums]:
        """Return the share of a batch in the loss of the step, and its sums of rewards."""
        if scores.reference is None:
            raise ValueError("KTO compares with a reference, and none was given")
        settings = self.settings
        good_B = scores.per_row([row.label for row in scores.rows])
        ratio_B = (scores.log_probs - scores.reference)[:, 0]
        kl = ratio_B.new_zeros(())
        if scores.aside is not None and scores.aside_reference is not None:
            # an estimate, and no part of the gradient: each answer here belongs to another prompt of the batch
            kl = (scores.aside - scores.aside_reference).mean().clamp(min=0).detach()
        sign_B = torch.where(good_B, 1.0, -1.0).to(ratio_B.dtype)
        weight_B = torch.where(good_B, settings.desirable_weight, settings.undesirable_weight).to(ratio_B.dtype)
        loss = (weight_B * (1 - (settings.beta * sign_B * (ratio_B - kl)).sigmoid())).sum() / totals["answers"]
        reward_B = settings.beta * ratio_B.detach()
        return loss, {
            "loss": loss.detach(),
            "good": reward_B.where(good_B, 0.0).sum(),
            "bad": reward_B.where(~good_B, 0.0).sum(),
            "kl": kl,
        }

    def figures(self, sums: Mapping[str, float], totals: Mapping[str, int]) -> dict[str, float]:
        """Return the loss of the step, its KL estimate, and the margin of the rewards where it has both kinds."""
        found = {"loss": sums["loss"], "kl": sums["kl"] / totals["batches"]}
        bad = totals["answers"] - totals["good"]
        if totals["good"] and bad:
            found["rewards_margin"] = sums["good"] / totals["good"] - sums["bad"] / bad
        return found


def _scaled(beta: float, pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return beta * pair[0], beta * pair[1]


def _log_odds(log_prob_B: torch.Tensor) -> torch.Tensor:
    """Return log(p / (1 - p)) of a log-probability, [B]."""
    log_prob_B = log_prob_B.clamp(max=CERTAIN)
    return log_prob_B - torch.log(-torch.expm1(log_prob_B))
