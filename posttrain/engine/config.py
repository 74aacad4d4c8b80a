"""Settings of the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import Dtype, Overlong
from posttrain.stage import MISSING, StageConfig, number

if TYPE_CHECKING:
    from posttrain.sft.advice import Known


class TrainOn(Enum):
    """Trained assistant turns."""

    all = "all"
    each = "each"
    last = "last"


@dataclass(kw_only=True)
class LoopConfig(StageConfig):
    """Settings of the training loop, for every stage on it, whatever its loss."""

    eval_data: Any = None
    """Records set aside from training, in the form of data: their loss is reported as eval_loss, the reward of greedy
    answers to questions as eval_reward."""
    eval_share: float = number(0.0, least=0, below=1)
    """Share of the records set aside so. 0 trains all: the gate decides in any case."""
    eval_steps: int | None = number(None, least=1, hint="; leave it out to measure once per epoch")
    """Optimizer steps between two measurements on them, and on the gate's sample where answers are sampled; once per
    epoch when absent."""
    lr: float = number(MISSING, least=0)
    """Peak learning rate."""
    epochs: int = number(2, least=1)
    """Passes over the records."""
    max_steps: int | None = number(None, least=1, hint="; leave it out to train whole epochs")
    """Stop after so many optimizer steps, even within an epoch; the schedule ends there too."""
    sequence_length: int = number(2048, least=2, hint=": each token predicts the next")
    """Tokens in a row."""
    packing: bool = True
    """Fill rows with several conversations, none of which sees another; off for models that cannot do it."""
    per_device_batch_size: int = number(1, least=1)
    """Rows in one forward pass."""
    gradient_accumulation: int = number(16, least=1)
    """Forward passes per optimizer step."""
    warmup_ratio: float = number(0.03, least=0, most=1)
    """Share of the steps in which the learning rate rises linearly from 0."""
    min_lr_ratio: float = number(0.1, least=0, most=1)
    """Share of the peak learning rate at which the cosine ends."""
    weight_decay: float = number(0.0, least=0)
    """Decoupled decay of matrices (arXiv:1711.05101); norms and biases have none."""
    adam_beta1: float = number(0.9, least=0, below=1)
    """Decay of Adam's mean of gradients."""
    adam_beta2: float = number(0.999, least=0, below=1)
    """Decay of Adam's mean of squared gradients."""
    adam_eps: float = number(1e-8, above=0)
    """Added to Adam's denominator."""
    max_grad_norm: float = number(1.0, above=0)
    """Gradients with a larger norm are scaled down to it."""
    neftune_alpha: float | None = number(None, least=0)
    """Noise on the embeddings while training (arXiv:2310.05914): 5 to 15, more for longer answers; none when absent."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: about a third slower, several times less memory."""
    checkpoint_minutes: float = number(10.0, above=0)
    """Minutes between two checkpoints, written in the background."""
    checkpoint_steps: int | None = number(None, least=1, hint="; leave it out to save by time alone")
    """Optimizer steps between two checkpoints, beside those by time; by time alone when absent."""
    compute_dtype: Dtype | None = None
    """Number format of forward and backward passes: model.dtype; for bfloat16 on a CPU the faster one, as measured."""
    loss_chunk: int = number(1024, least=1)
    """Trained tokens whose logits are held at once."""

    @property
    def coupled(self) -> bool:
        """True when the rows of a forward pass meet in the loss."""
        return False

    @property
    def visits(self) -> int:
        """Optimizer steps in a row on the same rows."""
        return 1

    def eval_sources(self) -> Any:
        """Return the sources of the eval loss."""
        return self.eval_data

    def problems(self) -> Sequence[tuple[str, str]]:
        """Return settings out of range or against each other, as (setting, what is wrong)."""
        return [*super().problems(), *self._eval_problems()]

    def departures(self, known: Known) -> Sequence[str]:
        """Return departures from usual settings, each with the reason; a kind without rules has none."""
        return ()

    def _eval_problems(self) -> Iterator[tuple[str, str]]:
        if self.eval_share and self.eval_data is not None:
            yield "eval_share", "takes eval records from data, but eval_data gives others: use one of the two"
        if (self.eval_steps or 0) > 0 and not self.eval_share and self.eval_data is None:
            yield "eval_steps", "measures nothing without eval records: give eval_data or eval_share, or leave it out"


@dataclass(kw_only=True)
class SampledConfig(LoopConfig):
    """Settings of every stage that learns from its own answers, through ``StageContext.train_sampled``."""

    k: int = number(8, least=2, hint=": an answer is compared with the others to its question")
    """Answers to each question in a step."""
    temperature: float = number(1.0, above=0)
    """Temperature at which answers are drawn, and their log-probabilities taken."""
    max_tokens: int = number(256, least=1)
    """Longest answer, in tokens: a longer one is cut, and counted as never ended."""
    reward: Any = "right"
    """A reward by name, a list of them, or weights by name: posttrain list rewards."""
    updates: int = number(1, least=1)
    """Optimizer steps on the answers of one sampling; checkpoints are saved between samplings."""
    idle_steps: int = number(20, least=1)
    """Samplings in a row without two answers of different rewards to any question, after which the stage stops."""

    @property
    def visits(self) -> int:
        """As ``updates`` has it."""
        return self.updates

    def _eval_problems(self) -> Iterator[tuple[str, str]]:
        # a gate is followed at the same steps, without eval records, too
        yield from (each for each in super()._eval_problems() if each[0] != "eval_steps" or not self.gate.enabled)

    def rewarding(self) -> Any:
        """Return the rewards."""
        return self.reward


@dataclass(kw_only=True)
class FineTuneConfig(LoopConfig):
    """Settings of every stage with SFT's loss, through ``StageContext.finetune``."""

    train_on: TrainOn = TrainOn.all
    """Trained turns: all assistant turns; each in a row of its own, as it is asked for; or the last of each record."""
    overlong: Overlong = Overlong.truncate
    """Records longer than a row: truncate keeps the head, split makes several of each, reject names them and stops."""

    @property
    def replays(self) -> bool:
        """True: replayed records have the loss of all others."""
        return True
