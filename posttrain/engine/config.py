"""Settings of the training loop: those of every stage that calls ``StageContext.finetune``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import Dtype, Overlong
from posttrain.stage import MISSING, StageConfig

if TYPE_CHECKING:
    from posttrain.sft.advice import Known


class TrainOn(Enum):
    """Which assistant turns are trained."""

    all = "all"
    last = "last"


@dataclass(kw_only=True)
class FineTuneConfig(StageConfig):
    """How SFT's loop trains: the settings of every stage that calls ``StageContext.finetune``."""

    eval_data: Any = None
    """Held-out records, in the form of data: their loss is reported while training."""
    eval_share: float = 0.0
    """Share of the records that is held out instead and not trained. 0 trains all: the gate decides in any case."""
    eval_steps: int | None = None
    """Optimizer steps between two measurements of the held-out loss; once per epoch when absent."""
    train_on: TrainOn = TrainOn.all
    """Trained turns: all assistant turns, or the last of each conversation."""
    lr: float = MISSING
    """Peak learning rate."""
    epochs: int = 2
    """Passes over the records."""
    max_steps: int | None = None
    """Stop after so many optimizer steps, even within an epoch; the schedule ends there too."""
    sequence_length: int = 2048
    """Tokens in a row."""
    overlong: Overlong = Overlong.truncate
    """Records longer than a row: truncate keeps the head, split makes several of each, refuse stops and names them."""
    packing: bool = True
    """Fill rows with several conversations, which do not see each other."""
    per_device_batch_size: int = 1
    """Rows in one forward pass."""
    gradient_accumulation: int = 16
    """Forward passes per optimizer step."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises linearly from 0."""
    min_lr_ratio: float = 0.1
    """Share of the peak learning rate at which the cosine ends."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices (arXiv:1711.05101); norms and biases have none."""
    adam_beta1: float = 0.9
    """Decay of Adam's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of Adam's mean of squared gradients."""
    adam_eps: float = 1e-8
    """Added to Adam's denominator."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it."""
    neftune_alpha: float | None = None
    """Noise on the embeddings while training (arXiv:2310.05914): 5 to 15, more for longer answers; none when absent."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: about a third slower, several times less memory."""
    checkpoint_steps: int = 50
    """Save what resuming needs every so many optimizer steps."""
    compute_dtype: Dtype | None = None
    """Number format of forward and backward passes: model.dtype, but float32 for bfloat16 on a CPU without AMX."""
    loss_chunk: int = 1024
    """Trained tokens whose logits are held at once."""

    def eval_sources(self) -> Any:
        """Return the sources of the eval loss."""
        return self.eval_data

    def problems(self) -> Sequence[tuple[str, str]]:
        """Values outside their range, each as (setting, what is wrong)."""
        return [*self._counts(), *self._ranges(), *self._held_out()]

    def unusual(self, known: Known) -> Sequence[str]:
        """Departures from what is usual, each with the reason; a kind without rules has none."""
        return ()

    def _counts(self) -> Iterator[tuple[str, str]]:
        for name in ("epochs", "per_device_batch_size", "gradient_accumulation", "checkpoint_steps", "loss_chunk"):
            if getattr(self, name) < 1:
                yield name, f"must be at least 1, not {getattr(self, name)}"
        if self.max_steps is not None and self.max_steps < 1:
            yield "max_steps", f"must be at least 1, not {self.max_steps}; leave it out to train whole epochs"
        if self.sequence_length < 2:
            yield "sequence_length", f"must be at least 2, not {self.sequence_length}: each token predicts the next"

    def _held_out(self) -> Iterator[tuple[str, str]]:
        if not 0.0 <= self.eval_share < 1.0:
            yield "eval_share", f"must be at least 0 and below 1, not {self.eval_share}"
        if self.eval_share and self.eval_data is not None:
            yield "eval_share", "holds out records of data, but eval_data gives others: use one of the two"
        if self.eval_steps is not None and self.eval_steps < 1:
            yield "eval_steps", f"must be at least 1, not {self.eval_steps}; leave it out to measure once per epoch"
        elif self.eval_steps is not None and not self.eval_share and self.eval_data is None:
            yield "eval_steps", "measures nothing: nothing is held out. Give eval_data or eval_share, or leave it out"

    def _ranges(self) -> Iterator[tuple[str, str]]:
        infinity = float("inf")
        for name in ("lr", "weight_decay"):
            if not 0.0 <= getattr(self, name) < infinity:  # NaN is in no range
                yield name, f"must be a finite number of at least 0, not {getattr(self, name)}"
        for name in ("warmup_ratio", "min_lr_ratio"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                yield name, f"must be between 0 and 1, not {getattr(self, name)}"
        for name in ("adam_beta1", "adam_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                yield name, f"must be at least 0 and below 1, not {getattr(self, name)}"
        if self.neftune_alpha is not None and not 0.0 <= self.neftune_alpha < infinity:
            yield "neftune_alpha", f"must be a finite number of at least 0, not {self.neftune_alpha}"
        for name in ("adam_eps", "max_grad_norm"):
            if not 0.0 < getattr(self, name) < infinity:
                yield name, f"must be a finite number above 0, not {getattr(self, name)}"
