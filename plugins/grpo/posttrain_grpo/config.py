"""Settings of the stage: schema, default and help in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain import FineTuneConfig, SampledConfig, from_variant, number, suggest

LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo")
SCALES = ("group", "batch", "none")


@dataclass(kw_only=True)
class GRPOSettings(SampledConfig):
    """Group relative policy optimisation (arXiv:2402.03300) and the losses that grew from it."""

    lr: float = from_variant(adapter=1e-5, full=1e-6)
    """Peak learning rate."""
    epochs: int = number(1, least=1)
    """Passes over the questions."""
    per_device_batch_size: int = number(4, least=1)
    """Questions, each with all of its answers, per forward pass."""
    gradient_accumulation: int = number(4, least=1)
    """Forward passes per optimizer step."""
    warmup_ratio: float = number(0.05, least=0, below=1)
    """Share of the steps in which the learning rate rises linearly from 0."""
    loss_type: str = "dapo"
    """dapo (each token of the step weighs the same, arXiv:2503.14476), grpo (each answer, arXiv:2402.03300), dr_grpo (a
    token against max_tokens, arXiv:2503.20783), bnpo (a token of its forward pass, as TRL's) or cispo (clipped weights
    on log-likelihoods, arXiv:2506.13585)."""
    scale_rewards: str = "group"
    """Spread that divides an answer's reward over the mean of its question: of the question's answers (group), of the
    step's (batch), or none."""
    beta: float = number(0.0, least=0)
    """Weight of the KL divergence from the model before training; 0 needs no reference."""
    epsilon: float = number(0.2, least=0, below=1)
    """Most that a token's chance may fall below the one it was drawn with, and still be pushed down."""
    epsilon_high: float = number(0.28, least=0)
    """Most that it may rise above it, and still be pushed up."""
    mask_cut: bool = False
    """Leave answers that never ended out of the loss; their rewards count in the mean of their question."""

    @property
    def coupled(self) -> bool:
        """True for bnpo, which divides by the tokens of a forward pass."""
        return self.loss_type == "bnpo"

    @property
    def referenced(self) -> bool:
        """True for a loss that compares the policy with the model before training."""
        return self.beta > 0

    def problems(self) -> Sequence[tuple[str, str]]:
        """Return settings out of range, or without a meaning, as (setting, what is wrong)."""
        found = [*super().problems()]
        if self.loss_type not in LOSSES:
            found.append(("loss_type", f"no loss is called {self.loss_type!r}. {suggest(self.loss_type, LOSSES)}"))
        if self.scale_rewards not in SCALES:
            what = f"no scale is called {self.scale_rewards!r}. {suggest(self.scale_rewards, SCALES)}"
            found.append(("scale_rewards", what))
        return found


@dataclass(kw_only=True)
class RFTSettings(FineTuneConfig):
    """Fine-tuning of the parent on its own best answers (arXiv:2308.01825); every setting of SFT's loop holds."""

    lr: float = from_variant(adapter=1e-4, full=5e-6)
    """Peak learning rate: half of SFT's."""
