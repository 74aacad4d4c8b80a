"""Proof before the first step that policy and reference are the SFT model.

A wrong start trains without complaint towards the wrong goal, so nothing is trained until two things hold:

1. The reference, where the loss has one, gives the answers of a real batch the log-probabilities of the SFT model,
   taken before the trainer touched it and computed from its logits without any code of the trainer.
2. The trainer's loss of that batch is the SFT model's: a constant where policy and reference agree, such as DPO's
   ln 2, and for the other losses the value from those log-probabilities.
"""

# B = answers of a row, each after the prompt; T = tokens, A = tokens of an answer, V = vocabulary

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from posttrain import ArtifactDamaged, StageContext
from posttrain_preference.losses import LogProbs, Start
from posttrain_preference.rows import TokenRow

if TYPE_CHECKING:
    from posttrain_preference.config import PreferenceSettings
    from posttrain_preference.trainer import StageTrainer

LOSS_TOLERANCE = 1e-4
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Allowed difference in nats per token of an answer.

Both computations run the same sequences side by side, so hidden states agree and only the rounding of logits differs:
bfloat16 has 8 significant bits, so a logit between 8 and 16 is off by up to 0.03.
"""


def frozen_copy(policy: Any) -> Any:
    """Return the reference: ``policy`` as it is now, with every trained weight copied and every frozen one shared.

    As a model of its own it needs no second adapter next to ``default``, of which TRL copies only a part, and TRL does
    not load it by the name in the policy's configuration.
    """
    shared = {id(parameter): parameter for parameter in policy.parameters() if not parameter.requires_grad}
    copied = copy.deepcopy(policy, shared)
    model = copied.get_base_model() if hasattr(copied, "get_base_model") else copied
    return model.requires_grad_(False).eval()


def row_log_probs(model: Any, rows: Sequence[TokenRow], autocast: bool) -> list[list[float]]:
    """Return the log-probability of each answer of each row, in nats, summed over the answer's tokens.

    ``autocast`` computes in bfloat16, as training full weights does.
    """
    training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        sums = [_log_probs(model, row) for row in rows]
    model.train(training)
    return sums


def prove_start(
    trainer: StageTrainer, rows: Sequence[TokenRow], expected: LogProbs, context: StageContext, start: Start
) -> None:
    """Check both claims on ``rows``, one batch; ``expected`` are the SFT model's log-probabilities of their answers.

    Raises ArtifactDamaged with the failed claim, its place and the difference.
    """
    trainer.model.eval()
    tolerance = TOLERANCE[context.dtype]
    if trainer.ref_model is not None:
        for row, log_probs in zip(rows, expected, strict=True):
            _check_reference(row, log_probs, trainer.reference_log_probs(row), tolerance)
    wanted = start(context.config, rows, expected)
    found = trainer.loss_of(rows)
    trainer.model.train()
    allowed = LOSS_TOLERANCE * max(1.0, abs(wanted)) + _spread(context.config, rows, expected, start, tolerance)
    if not abs(found - wanted) <= allowed:
        raise ArtifactDamaged(
            f"{context.name} does not start at the SFT model: before the first step its loss is {found:.6f}, "
            f"and it has to be {wanted:.6f} within {allowed:.2g}; nothing was trained"
        )


def _check_reference(row: TokenRow, expected: Sequence[float], found: Sequence[float], tolerance: float) -> None:
    for (name, ids), wanted, given in zip(row.answers, expected, found, strict=True):
        allowed = tolerance * len(ids)
        if not abs(given - wanted) <= allowed:
            raise ArtifactDamaged(
                f"the reference is not the SFT model: it gives the {name} answer of {row.where} the log-probability "
                f"{given:.4f}, the SFT model gives {wanted:.4f} ({len(ids)} tokens, allowed difference {allowed:.4f}); "
                "nothing was trained"
            )


def _spread(
    settings: PreferenceSettings, rows: Sequence[TokenRow], expected: LogProbs, start: Start, tolerance: float
) -> float:
    """Return the change of the loss under the allowed difference of the log-probabilities."""
    moved = []
    for first, second in ((1, 1), (1, 0), (0, 1)):  # downwards: a probability stays one
        shifted = [
            [
                log_prob - share * tolerance * len(ids)
                for share, log_prob, (_, ids) in zip((first, second), log_probs, row.answers, strict=False)
            ]
            for row, log_probs in zip(rows, expected, strict=True)
        ]
        moved.append(abs(start(settings, rows, shifted) - start(settings, rows, expected)))
    return max(moved)


def _log_probs(model: Any, row: TokenRow) -> list[float]:
    sequences = [torch.tensor(row.prompt + ids, device=model.device) for _, ids in row.answers]
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
