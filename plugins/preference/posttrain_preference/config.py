"""Settings of the preference stages: schema, default and help in one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain import MISSING, StageConfig, from_variant, suggest
from posttrain_preference import losses

KTO_LOSSES = ("kto", "apo_zero_unpaired")
CPO_LOSSES = ("sigmoid", "hinge", "ipo")

Fault = tuple[str, str]
"""A setting and what is wrong with it."""


@dataclass(kw_only=True)
class PreferenceSettings(StageConfig):
    """What every stage that learns from preferences can be told."""

    lr: float = MISSING
    """Peak learning rate; it falls linearly to 0."""
    epochs: int = 1
    """Passes over the records."""
    max_steps: int | None = None
    """Stop after so many optimizer steps, whatever the epochs say."""
    per_device_batch_size: int = 4
    """Pairs per forward pass."""
    gradient_accumulation: int = 8
    """Forward passes per optimizer step."""
    warmup_ratio: float = 0.1
    """Part of the steps in which the learning rate rises from 0."""
    sequence_length: int = 2048
    """Longest prompt plus answer, in tokens. Longer records are dropped and counted, never cut."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    checkpoint_steps: int = 50
    """Save what resuming needs every so many optimizer steps."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: about a third slower, several times less memory."""
    beta: float = 0.1
    """How strongly the policy is held to its start; each stage says how."""

    def loss_arguments(self) -> dict[str, Any]:
        """Return what only this method's loss reads, by the names of TRL's configuration."""
        return {}

    def problems(self) -> Sequence[Fault]:
        """Values outside their range or against each other, each as (setting, what is wrong)."""
        return [*self._counts(), *self._ranges(), *self._of_the_loss()]

    def _counts(self) -> Iterator[Fault]:
        for name in ("epochs", "per_device_batch_size", "gradient_accumulation", "checkpoint_steps"):
            if getattr(self, name) < 1:
                yield name, f"must be at least 1, not {getattr(self, name)}"
        if self.max_steps is not None and self.max_steps < 1:
            yield "max_steps", f"must be at least 1, not {self.max_steps}; leave it out to train whole epochs"
        if self.sequence_length < 2:
            yield "sequence_length", f"must be at least 2, not {self.sequence_length}: each token predicts the next"

    def _ranges(self) -> Iterator[Fault]:
        yield from self._positive("beta", "lr", "max_grad_norm")
        if not 0.0 <= self.warmup_ratio < 1.0:
            yield "warmup_ratio", f"must be at least 0 and below 1, not {self.warmup_ratio}"

    def _of_the_loss(self) -> Iterator[Fault]:
        """What is wrong with the settings that only this stage's loss has."""
        yield from ()

    def _positive(self, *names: str) -> Iterator[Fault]:
        for name in names:
            if not 0.0 < getattr(self, name) < math.inf:  # NaN is in no range
                yield name, f"must be a finite number above 0, not {getattr(self, name)}"

    def _not_negative(self, *names: str) -> Iterator[Fault]:
        for name in names:
            if not 0.0 <= getattr(self, name) < math.inf:
                yield name, f"must be a finite number, at least 0, not {getattr(self, name)}"


@dataclass(kw_only=True)
class DPOSettings(PreferenceSettings):
    """Direct preference optimisation (arXiv:2305.18290), with the losses that grew from it."""

    lr: float = from_variant(adapter=5e-6, full=5e-7)
    """Peak learning rate; it falls linearly to 0."""
    beta: float = 0.1
    """How strongly the policy is held to the reference: rewards are beta times the log-probability ratio."""
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])
    """One or more of sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero,
    apo_down, discopop, sigmoid_norm and sft, added up. [sigmoid,sft] is RPO (arXiv:2404.19733)."""
    loss_weights: list[float] | None = None
    """A weight for each loss; 1 for each when absent."""
    label_smoothing: float = 0.0
    """Probability that a pair's answers are swapped, for robust (0.1), exo_pair (1e-3), aot and aot_unpaired."""
    discopop_tau: float = 0.05
    """Temperature of discopop."""

    def loss_arguments(self) -> dict[str, Any]:
        """Return the losses with their weights and settings."""
        return {
            "loss_type": list(self.loss_type),
            "loss_weights": self.loss_weights and list(self.loss_weights),
            "label_smoothing": self.label_smoothing,
            "discopop_tau": self.discopop_tau,
        }

    def weighted_losses(self) -> list[tuple[str, float]]:
        """Return each loss with its weight."""
        return list(zip(self.loss_type, self.loss_weights or [1.0] * len(self.loss_type), strict=True))

    def _of_the_loss(self) -> Iterator[Fault]:
        yield from self._names()
        yield from self._weights()
        yield from self._smoothing()
        yield from self._positive("discopop_tau")
        if self.per_device_batch_size == 1 and (found := self._used(losses.SORTED)):
            yield "per_device_batch_size", f"must be at least 2 for {found}, which compares the pairs of a batch"

    def _names(self) -> Iterator[Fault]:
        for name in self.loss_type:
            if name not in losses.NAMES:
                yield "loss_type", f"no loss is called {name!r}. {suggest(name, losses.NAMES)}"
        if len(set(self.loss_type)) < len(self.loss_type):
            yield "loss_type", f"names a loss twice: {', '.join(self.loss_type)}; give it a weight instead"
        if set(self.loss_type) <= {losses.SFT}:
            yield "loss_type", f"{self.loss_type} compares no answers; add a loss that does, such as sigmoid"

    def _weights(self) -> Iterator[Fault]:
        if self.loss_weights is None:
            return
        if len(self.loss_weights) != len(self.loss_type):
            what = f"{len(self.loss_weights)} weights for {len(self.loss_type)} losses ({', '.join(self.loss_type)})"
            yield "loss_weights", what
        if not all(0.0 < weight < math.inf for weight in self.loss_weights):
            yield "loss_weights", f"must be finite numbers above 0, not {list(self.loss_weights)}"

    def _smoothing(self) -> Iterator[Fault]:
        if not 0.0 <= self.label_smoothing < 0.5:
            yield "label_smoothing", f"must be at least 0 and below 0.5, not {self.label_smoothing}"
        elif self.label_smoothing and not self._used(losses.SMOOTHED):
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
    """Peak learning rate; it falls linearly to 0."""
    per_device_batch_size: int = 8
    """Answers per forward pass. Good and bad ones share each batch, and its other answers estimate the KL term."""
    beta: float = 0.1
    """How strongly the policy is held to the reference: rewards are beta times the log-probability ratio."""
    loss_type: str = "kto"
    """kto, or apo_zero_unpaired (arXiv:2408.06266), which has no KL term."""
    desirable_weight: float = 1.0
    """Weight of the answers judged good."""
    undesirable_weight: float = 1.0
    """Weight of the answers judged bad."""

    def loss_arguments(self) -> dict[str, Any]:
        """Return the loss and the weights of both kinds of answers."""
        return {
            "loss_type": self.loss_type,
            "desirable_weight": self.desirable_weight,
            "undesirable_weight": self.undesirable_weight,
        }

    def _of_the_loss(self) -> Iterator[Fault]:
        yield from _one_of("loss_type", self.loss_type, KTO_LOSSES)
        yield from self._positive("desirable_weight", "undesirable_weight")
        if self.per_device_batch_size == 1:
            yield "per_device_batch_size", "must be at least 2: good and bad answers share each batch"


@dataclass(kw_only=True)
class ORPOSettings(PreferenceSettings):
    """Odds ratio preference optimisation (arXiv:2403.07691): likelihood and odds of the chosen answer, no reference."""

    lr: float = from_variant(adapter=2e-5, full=5e-6)
    """Peak learning rate; it falls linearly to 0."""
    beta: float = 0.1
    """Weight of the odds ratio beside the chosen answer's negative log-likelihood (lambda in the paper)."""


@dataclass(kw_only=True)
class CPOSettings(PreferenceSettings):
    """Contrastive preference optimisation (arXiv:2401.08417): DPO without a reference, held by the likelihood."""

    lr: float = from_variant(adapter=1e-5, full=1e-6)
    """Peak learning rate; it falls linearly to 0."""
    beta: float = 0.1
    """Temperature: rewards are beta times the log-probability."""
    loss_type: str = "sigmoid"
    """sigmoid, hinge or ipo; ipo compares log-probabilities per token."""
    label_smoothing: float = 0.0
    """Probability that a pair's answers are swapped, for sigmoid."""
    cpo_alpha: float = 1.0
    """Weight of the chosen answer's negative log-likelihood."""

    def loss_arguments(self) -> dict[str, Any]:
        """Return the contrast, its smoothing and the weight of the likelihood."""
        return {
            "loss_type": self.loss_type,
            "label_smoothing": self.label_smoothing,
            "cpo_alpha": self.cpo_alpha,
        }

    def _of_the_loss(self) -> Iterator[Fault]:
        yield from _one_of("loss_type", self.loss_type, CPO_LOSSES)
        yield from self._not_negative("cpo_alpha")
        if not 0.0 <= self.label_smoothing < 0.5:
            yield "label_smoothing", f"must be at least 0 and below 0.5, not {self.label_smoothing}"
        elif self.label_smoothing and self.loss_type != "sigmoid":
            yield "label_smoothing", f"is read by sigmoid only, not by {self.loss_type}"


@dataclass(kw_only=True)
class SimPOSettings(PreferenceSettings):
    """Simple preference optimisation (arXiv:2405.14734): log-probabilities per token, a target margin, no reference."""

    lr: float = from_variant(adapter=1e-5, full=1e-6)
    """Peak learning rate; it falls linearly to 0."""
    beta: float = 2.0
    """Temperature: rewards are beta times the mean log-probability of an answer's tokens."""
    gamma: float = 1.0
    """Margin by which the chosen answer's reward should exceed the rejected answer's."""

    def loss_arguments(self) -> dict[str, Any]:
        """Return CPO's configuration of SimPO; by its default TRL would add the likelihood."""
        return {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": self.gamma}

    def _of_the_loss(self) -> Iterator[Fault]:
        yield from self._not_negative("gamma")


def _one_of(setting: str, value: str, known: Sequence[str]) -> Iterator[Fault]:
    if value not in known:
        yield setting, f"no loss is called {value!r}. {suggest(value, known)}"
