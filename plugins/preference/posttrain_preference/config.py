"""Settings of the preference stages: schema, default and help in one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf

from posttrain import LoopConfig, from_variant, number, suggest
from posttrain_preference import losses

KTO_LOSSES = ("kto", "apo_zero_unpaired")
CPO_LOSSES = ("sigmoid", "hinge", "ipo")

Fault = tuple[str, str]
"""A setting and what is wrong with it."""


@dataclass(kw_only=True)
class PreferenceSettings(LoopConfig):
    """Settings of every stage that learns from preferences, beside those of the loop."""

    epochs: int = number(1, least=1)
    """Passes over the records."""
    per_device_batch_size: int = number(4, least=1)
    """Pairs per forward pass."""
    gradient_accumulation: int = number(8, least=1)
    """Forward passes per optimizer step."""
    warmup_ratio: float = number(0.1, least=0, below=1)
    """Share of the steps in which the learning rate rises linearly from 0."""
    min_lr_ratio: float = number(0.0, least=0, most=1)
    """Share of the peak learning rate at which the cosine ends."""
    sequence_length: int = number(2048, least=2, hint=": each token predicts the next")
    """Longest prompt plus answer, in tokens. Longer records are dropped and counted, never cut."""
    packing: bool = True
    """Several answers in a forward pass, none of which sees another; off for models that cannot do it."""
    beta: float = number(0.1, above=0)
    """Hold of the policy to its start; each stage defines it."""

    @property
    def referenced(self) -> bool:
        """True for a loss that compares the policy with the model before training."""
        return False

    @property
    def per_token(self) -> bool:
        """True for a loss that is blind to the lengths of a pair's answers."""
        return True

    def advice(self, examples: int | None) -> Sequence[str]:
        """Return departures from the field's practice, as far as they show before the data is read."""
        from posttrain_preference.advice import ADVICE, Known  # the rules know these settings

        return ADVICE.departures(self, Known(rows=examples))


@dataclass(kw_only=True)
class DPOSettings(PreferenceSettings):
    """Direct preference optimisation (arXiv:2305.18290), with the losses that grew from it."""

    lr: float = from_variant(adapter=5e-6, full=5e-7)
    """Peak learning rate."""
    beta: float = 0.1
    """Hold of the policy to the reference: rewards are beta times the log-probability ratio."""
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])
    """One or more of sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero,
    apo_down, discopop, sigmoid_norm and sft, added up. [sigmoid,sft] is RPO (arXiv:2404.19733)."""
    loss_weights: list[float] | None = None
    """A weight for each loss; 1 for each when absent."""
    label_smoothing: float = number(0.0, least=0, below=0.5)
    """Probability that a pair's answers are swapped, for robust (0.1), exo_pair (1e-3), aot and aot_unpaired."""
    discopop_tau: float = number(0.05, above=0)
    """Temperature of discopop."""

    @property
    def referenced(self) -> bool:
        """True."""
        return True

    @property
    def per_token(self) -> bool:
        """True without a loss of summed log-probabilities."""
        return set(self.loss_type) <= {"ipo", "sigmoid_norm", losses.SFT}

    @property
    def coupled(self) -> bool:
        """True for the losses that sort the pairs of a forward pass."""
        return bool(self._used(losses.SORTED))

    def weighted_losses(self) -> list[tuple[str, float]]:
        """Return each loss with its weight."""
        return list(zip(self.loss_type, self.loss_weights or [1.0] * len(self.loss_type), strict=True))

    def problems(self) -> Sequence[Fault]:
        """Return values out of range or against each other, as (setting, what is wrong)."""
        found = [*super().problems(), *self._name_faults(), *self._weight_faults()]
        if not any(setting == "label_smoothing" for setting, _ in found):
            found += self._smoothing_faults()
        if self.per_device_batch_size == 1 and (sorting := self._used(losses.SORTED)):
            what = f"must be at least 2 for {sorting}, which compares the pairs of a batch"
            found.append(("per_device_batch_size", what))
        return found

    def _name_faults(self) -> Iterator[Fault]:
        for name in self.loss_type:
            if name not in losses.NAMES:
                yield "loss_type", f"no loss is called {name!r}. {suggest(name, losses.NAMES)}"
        if len(set(self.loss_type)) < len(self.loss_type):
            yield "loss_type", f"names a loss twice: {', '.join(self.loss_type)}; give it a weight instead"
        if set(self.loss_type) <= {losses.SFT}:
            yield "loss_type", f"{self.loss_type} compares no answers; add a loss that does, such as sigmoid"

    def _weight_faults(self) -> Iterator[Fault]:
        if self.loss_weights is None:
            return
        if len(self.loss_weights) != len(self.loss_type):
            what = f"{len(self.loss_weights)} weights for {len(self.loss_type)} losses ({', '.join(self.loss_type)})"
            yield "loss_weights", what
        if not all(0.0 < weight < inf for weight in self.loss_weights):
            yield "loss_weights", f"must be finite numbers above 0, not {list(self.loss_weights)}"

    def _smoothing_faults(self) -> Iterator[Fault]:
        if self.label_smoothing and not self._used(losses.SMOOTHED):
            known = ", ".join(losses.SMOOTHED)
            yield "label_smoothing", f"is read by {known} only, not by {', '.join(self.loss_type)}"
        elif not self.label_smoothing and self._used(("exo_pair",)):
            yield "label_smoothing", "must be above 0 for exo_pair, whose paper recommends 1e-3"

    def _used(self, names: Sequence[str]) -> str:
        return ", ".join(name for name in self.loss_type if name in names)


@dataclass(kw_only=True)
class KTOSettings(PreferenceSettings):
    """Kahneman-Tversky optimisation (arXiv:2402.01306): answers judged good or bad, each on its own."""

    lr: float = from_variant(adapter=5e-6, full=5e-7)
    """Peak learning rate."""
    per_device_batch_size: int = number(8, least=2, hint=": good and bad answers share each batch")
    """Answers per forward pass. Good and bad ones share each batch, and its other answers estimate the KL term."""
    beta: float = 0.1
    """Hold of the policy to the reference: rewards are beta times the log-probability ratio."""
    loss_type: str = "kto"
    """kto, or apo_zero_unpaired (arXiv:2408.06266), which has no KL term."""
    desirable_weight: float = number(1.0, above=0)
    """Weight of the answers judged good."""
    undesirable_weight: float = number(1.0, above=0)
    """Weight of the answers judged bad."""

    @property
    def referenced(self) -> bool:
        """True."""
        return True

    @property
    def coupled(self) -> bool:
        """True for the loss with a KL term, which the answers of a forward pass estimate."""
        return self.loss_type == "kto"

    def problems(self) -> Sequence[Fault]:
        """Return values out of range, as (setting, what is wrong)."""
        return [*super().problems(), *_unknown_loss(self.loss_type, KTO_LOSSES)]


@dataclass(kw_only=True)
class ORPOSettings(PreferenceSettings):
    """Odds ratio preference optimisation (arXiv:2403.07691): likelihood and odds of the chosen answer, no reference."""

    lr: float = from_variant(adapter=2e-5, full=5e-6)
    """Peak learning rate."""
    beta: float = 0.1
    """Weight of the odds ratio beside the chosen answer's negative log-likelihood (lambda in the paper)."""


@dataclass(kw_only=True)
class CPOSettings(PreferenceSettings):
    """Contrastive preference optimisation (arXiv:2401.08417): DPO without a reference, held by the likelihood."""

    lr: float = from_variant(adapter=1e-5, full=1e-6)
    """Peak learning rate."""
    beta: float = 0.1
    """Temperature: rewards are beta times the log-probability."""
    loss_type: str = "sigmoid"
    """sigmoid, hinge or ipo; ipo compares log-probabilities per token."""
    label_smoothing: float = number(0.0, least=0, below=0.5)
    """Probability that a pair's answers are swapped, for sigmoid."""
    cpo_alpha: float = number(1.0, least=0)
    """Weight of the chosen answer's negative log-likelihood."""

    @property
    def per_token(self) -> bool:
        """True for ipo."""
        return self.loss_type == "ipo"

    def problems(self) -> Sequence[Fault]:
        """Return values out of range or against each other, as (setting, what is wrong)."""
        found = [*super().problems(), *_unknown_loss(self.loss_type, CPO_LOSSES)]
        if 0 < self.label_smoothing < 0.5 and self.loss_type != "sigmoid":
            found.append(("label_smoothing", f"is read by sigmoid only, not by {self.loss_type}"))
        return found


@dataclass(kw_only=True)
class SimPOSettings(PreferenceSettings):
    """Simple preference optimisation (arXiv:2405.14734): log-probabilities per token, a target margin, no reference."""

    lr: float = from_variant(adapter=1e-5, full=1e-6)
    """Peak learning rate."""
    beta: float = 2.0
    """Temperature: rewards are beta times the mean log-probability of an answer's tokens."""
    gamma: float = number(1.0, least=0)
    """Margin by which the chosen answer's reward should exceed the rejected answer's."""


def _unknown_loss(name: str, known: Sequence[str]) -> Iterator[Fault]:
    if name not in known:
        yield "loss_type", f"no loss is called {name!r}. {suggest(name, known)}"
