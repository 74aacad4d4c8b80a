"""Proof before the first step that policy and reference are the parent of the stage.

A wrong start trains without complaint towards the wrong goal, so nothing is trained until two things hold:

1. The reference, where the loss has one, gives the answers of a real batch the log-probabilities of the parent, taken
   before the loop touched it, and computed from its logits by transformers alone: padded, with its own attention.
2. The loop's loss of that batch is the parent's: a constant where policy and reference agree, such as DPO's ln 2, and
   for the other losses the value from those log-probabilities.
"""

# B = answers of a row, each after the prompt; T = tokens, A = tokens of an answer, V = vocabulary

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

from posttrain.engine.answers import AnsweredRow
from posttrain.engine.precision import autocasting
from posttrain.errors import ArtifactDamaged

LogProbs = Sequence[Sequence[float]]
"""Log-probabilities of each row's answers, in nats, summed over the tokens of an answer."""
Row = TypeVar("Row", bound=AnsweredRow)

LOSS_TOLERANCE = 1e-4
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Allowed difference in nats per token of an answer, by the number format of the weights.

Both computations run the same tokens, so only rounding differs: bfloat16 has 8 significant bits, so a logit between 8
and 16 is off by up to 0.03.
"""


@dataclass(frozen=True, kw_only=True)
class Start(Generic[Row]):
    """The first batch as the parent of the stage sees it."""

    stage: str
    """Name of the stage, for messages."""
    rows: Sequence[Row]
    log_probs: LogProbs
    """Those of the parent."""
    loss: Callable[[Sequence[Row], LogProbs], float]
    """Returns the loss that a batch starts with, from the parent's log-probabilities of its answers."""
    dtype: str
    """Number format of the stored weights."""

    @classmethod
    def of(
        cls, stage: str, model: Any, rows: Sequence[Row], loss: Callable[[Sequence[Row], LogProbs], float], dtype: str
    ) -> Start[Row]:
        """Return the start of ``rows``, with ``model`` as it came from the parent."""
        return cls(stage=stage, rows=rows, log_probs=row_log_probs(model, rows, dtype), loss=loss, dtype=dtype)

    def prove_reference(self, found: LogProbs) -> None:
        """Raise ArtifactDamaged unless the reference's log-probabilities ``found`` are the parent's."""
        for row, expected, given in zip(self.rows, self.log_probs, found, strict=True):
            for (name, ids), wanted, value in zip(row.answers, expected, given, strict=True):
                allowed = TOLERANCE[self.dtype] * len(ids)
                if not abs(value - wanted) <= allowed:
                    raise ArtifactDamaged(
                        f"the reference is not the SFT model: it gives the {name} answer of {row.where} the "
                        f"log-probability {value:.4f}, the SFT model gives {wanted:.4f} ({len(ids)} tokens, allowed "
                        f"difference {allowed:.4f}); nothing was trained"
                    )

    def prove_loss(self, found: float) -> None:
        """Raise ArtifactDamaged unless the loop's loss ``found`` of the batch is the parent's."""
        wanted = self.loss(self.rows, self.log_probs)
        allowed = LOSS_TOLERANCE * max(1.0, abs(wanted)) + self.spread()
        if not abs(found - wanted) <= allowed:
            raise ArtifactDamaged(
                f"{self.stage} does not start at the SFT model: before the first step its loss is {found:.6f}, "
                f"and it has to be {wanted:.6f} within {allowed:.2g}; nothing was trained"
            )

    def spread(self) -> float:
        """Return the change of the loss under the allowed difference of the log-probabilities."""
        moved = []
        for first, second in ((1, 1), (1, 0), (0, 1)):  # downwards: a probability stays one
            shifted = [
                [
                    log_prob - share * TOLERANCE[self.dtype] * len(ids)
                    for share, log_prob, (_, ids) in zip((first, second), log_probs, row.answers, strict=False)
                ]
                for row, log_probs in zip(self.rows, self.log_probs, strict=True)
            ]
            moved.append(abs(self.loss(self.rows, shifted) - self.loss(self.rows, self.log_probs)))
        return max(moved)


def row_log_probs(model: Any, rows: Sequence[AnsweredRow], dtype: str) -> list[list[float]]:
    """Return the log-probability of each answer of each row, by the model's own forward pass in evaluation mode."""
    training = model.training
    model.eval()
    with torch.no_grad(), autocasting(model, dtype):
        sums = [_log_probs(model, row) for row in rows]
    model.train(training)
    return sums


def _log_probs(model: Any, row: AnsweredRow) -> list[float]:
    sequences = [torch.tensor([*row.prompt, *ids], device=model.device) for _, ids in row.answers]
    ids_BT = pad_sequence(sequences, batch_first=True)
    mask_BT = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    return [
        _sum_log_probs(logits_TV, ids_T, len(row.prompt))
        for logits_TV, ids_T in zip(logits_BTV, sequences, strict=True)
    ]


def _sum_log_probs(logits_TV: torch.Tensor, ids_T: torch.Tensor, prompt: int) -> float:
    log_probs_AV = logits_TV[prompt - 1 : len(ids_T) - 1].float().log_softmax(-1)
    return float(log_probs_AV.gather(1, ids_T[prompt:, None]).sum())
