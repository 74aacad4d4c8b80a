"""Proof, before the first step, that a preference stage starts where it must: policy and reference are the SFT model.

A wrong reference trains without complaint towards the wrong goal, so nothing is trained until two things hold:

1. The DPO loss of a real batch is ln 2: policy and reference agree.
2. The reference gives the answers of that batch the log-probabilities that the SFT model gave them before the trainer
   touched it, computed from the model's logits without any code of the trainer: what they agree on is the SFT model.
"""

# B = 2: prompt with chosen answer, prompt with rejected answer; T = tokens, A = tokens of an answer, V = vocabulary

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from posttrain import ArtifactDamaged
from posttrain_preference.pairs import TokenPair

LOSS_TOLERANCE = 1e-4
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Allowed difference in nats per token of an answer.

Both computations run the same sequences side by side, so that hidden states agree and what differs is how logits are
rounded: bfloat16 has 8 significant bits, so a logit between 8 and 16 is off by up to 0.03.
"""


def answer_log_probs(model: Any, rows: Sequence[TokenPair], autocast: bool) -> list[tuple[float, float]]:
    """Log-probability of the chosen and of the rejected answer of each pair, in nats, summed over the answer's tokens.

    ``autocast``: compute in bfloat16, as training full weights does.
    """
    training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        sums = [_pair_log_probs(model, row) for row in rows]
    model.train(training)
    return sums


def prove_reference(
    trainer: Any, rows: Sequence[TokenPair], expected: Sequence[tuple[float, float]], dtype: str
) -> None:
    """Check both claims on ``rows``, one batch; ``expected`` are the SFT model's log-probabilities of their answers.

    Raises ArtifactDamaged that says which claim fails, where, and by how much.
    """
    trainer.model.eval()
    for row, (chosen, rejected) in zip(rows, expected, strict=True):
        found = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, trainer.batch_of([row]))
        _check(f"the chosen answer of {row.where}", len(row.chosen), chosen, found[0].item(), TOLERANCE[dtype])
        _check(f"the rejected answer of {row.where}", len(row.rejected), rejected, found[1].item(), TOLERANCE[dtype])
    with torch.no_grad(), trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, trainer.batch_of(rows)).item()
    trainer.model.train()
    if not abs(loss - math.log(2)) <= LOSS_TOLERANCE:
        raise ArtifactDamaged(
            f"the policy does not start at its reference: before the first step the DPO loss is {loss:.6f}, "
            f"and it has to be ln 2 = {math.log(2):.6f} within {LOSS_TOLERANCE}; nothing was trained"
        )


def _check(what: str, tokens: int, expected: float, found: float, tolerance: float) -> None:
    if not abs(found - expected) <= tolerance * tokens:
        raise ArtifactDamaged(
            f"the reference is not the SFT model: it gives {what} the log-probability {found:.4f}, the SFT model gives "
            f"{expected:.4f} ({tokens} tokens, allowed difference {tolerance * tokens:.4f}); nothing was trained"
        )


def _pair_log_probs(model: Any, row: TokenPair) -> tuple[float, float]:
    sequences = [torch.tensor(row.prompt + answer, device=model.device) for answer in (row.chosen, row.rejected)]
    ids_BT = pad_sequence(sequences, batch_first=True)
    mask_BT = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    chosen, rejected = (
        _sum_log_probs(logits_TV, ids_T, len(row.prompt))
        for logits_TV, ids_T in zip(logits_BTV, sequences, strict=True)
    )
    return chosen, rejected


def _sum_log_probs(logits_TV: torch.Tensor, ids_T: torch.Tensor, prompt: int) -> float:
    log_probs_AV = logits_TV[prompt - 1 : len(ids_T) - 1].float().log_softmax(-1)
    return float(log_probs_AV.gather(1, ids_T[prompt:, None]).sum())
