"""Settings of the preference stages: schema, default and help in one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from posttrain import StageConfig, from_recipe


@dataclass(kw_only=True)
class DPOSettings(StageConfig):
    """Direct preference optimisation with the sigmoid loss (arXiv:2305.18290)."""

    beta: float = 0.1
    """How strongly the policy is held to the reference: rewards are beta times the log-probability ratio."""
    lr: float = from_recipe("variant.dpo.lr")
    """Peak learning rate; it falls linearly to 0. 5e-6 for adapters, 5e-7 for full weights."""
    epochs: int = 1
    """Passes over the pairs."""
    max_steps: int | None = None
    """Stop after so many optimizer steps, whatever the epochs say."""
    per_device_batch_size: int = 4
    """Pairs per forward pass."""
    gradient_accumulation: int = 8
    """Forward passes per optimizer step."""
    warmup_ratio: float = 0.1
    """Part of the steps in which the learning rate rises from 0."""
    sequence_length: int = 2048
    """Longest prompt plus answer, in tokens. Longer pairs are dropped and counted, never cut."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    checkpoint_steps: int = 50
    """Save what resuming needs every so many optimizer steps."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: about a third slower, several times less memory."""

    def problems(self) -> Sequence[tuple[str, str]]:
        """Values outside their range, each as (setting, what is wrong)."""
        return [*self._counts(), *self._ranges()]

    def _counts(self) -> Iterator[tuple[str, str]]:
        for name in ("epochs", "per_device_batch_size", "gradient_accumulation", "checkpoint_steps"):
            if getattr(self, name) < 1:
                yield name, f"must be at least 1, not {getattr(self, name)}"
        if self.max_steps is not None and self.max_steps < 1:
            yield "max_steps", f"must be at least 1, not {self.max_steps}; leave it out to train whole epochs"
        if self.sequence_length < 2:
            yield "sequence_length", f"must be at least 2, not {self.sequence_length}: each token predicts the next"

    def _ranges(self) -> Iterator[tuple[str, str]]:
        for name in ("beta", "lr", "max_grad_norm"):
            if not 0.0 < getattr(self, name) < float("inf"):  # NaN is in no range
                yield name, f"must be a finite number above 0, not {getattr(self, name)}"
        if not 0.0 <= self.warmup_ratio < 1.0:
            yield "warmup_ratio", f"must be at least 0 and below 1, not {self.warmup_ratio}"
