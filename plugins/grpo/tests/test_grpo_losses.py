"""Losses and gradients equal to those of TRL's trainer on the same tokens, in float64; advantages by its formula."""

# N = tokens of all answers, A = answers, T = tokens of the longest answer

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from posttrain_grpo.config import GRPOSettings
from posttrain_grpo.losses import GRPOLoss, advantages
from trl import GRPOTrainer

from posttrain import AnsweredQuestion, TokenScores
from posttrain.data.records import Question
from posttrain.sampling.policy import Asked
from posttrain.sampling.sampler import Answer

LENGTHS = (3, 5, 1, 4, 2, 5)
ENDED = (True, False, True, True, True, False)
CUTS = ((0, 2), (2, 6))
"""First and last answer of each question, which is a batch of its own."""
MOST = 5
EPSILON, HIGH = 0.2, 0.3


def numbers(spread: float) -> list[torch.Tensor]:
    """Log-probabilities of policy, drawing and reference, and an advantage of each answer, in float64."""
    generator = torch.Generator().manual_seed(0)
    base_N = -torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64) * 3 - 0.1
    others = [base_N + spread * torch.randn(len(base_N), generator=generator, dtype=torch.float64) for _ in range(2)]
    return [base_N, *others, torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64)]


def settings(**given: Any) -> GRPOSettings:
    return GRPOSettings(
        kind="grpo", data="q", max_tokens=MOST, epsilon=EPSILON, epsilon_high=HIGH, lr=1e-5, per_device_batch_size=1,
        **given,
    )  # fmt: skip


def ours(spread: float, **given: Any) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Loss, gradient for each token's log-probability, and figures; the step cut into two batches."""
    policy_N, drawn_N, reference_N, advantages_A = numbers(spread)
    policy_N.requires_grad_()
    loss = GRPOLoss(settings(**given))
    answers = [
        Answer(ids=(1,) * length, ended=ended, log_probs=(0.0,) * length, entropy=0.0)
        for length, ended in zip(LENGTHS, ENDED, strict=True)
    ]
    asked = Asked(question=Question(prompt=(), where="q:1"), prompt=[1])
    rows = [
        AnsweredQuestion(asked=asked, answers=answers[first:last], rewards=[], advantages=[]) for first, last in CUTS
    ]
    totals = {"answers": len(answers), **loss.totals(rows)}
    total, summed = torch.zeros((), dtype=torch.float64), defaultdict[str, float](float)
    for row, (first, last) in zip(rows, CUTS, strict=True):
        lengths = torch.tensor(LENGTHS[first:last])
        part = slice(sum(LENGTHS[:first]), sum(LENGTHS[:last]))
        owners = torch.arange(last - first).repeat_interleave(lengths)
        scores = TokenScores(
            rows=[row], log_probs=policy_N[part], drawn=drawn_N[part],
            reference=reference_N[part] if loss.referenced else None, advantages=advantages_A[first:last][owners],
            owners=owners, lengths=lengths, ended=torch.tensor(ENDED[first:last]),
        )  # fmt: skip
        share, sums = loss.share(scores, totals)
        total = total + share
        for name, value in sums.items():
            summed[name] += float(value)
    total.backward()
    assert policy_N.grad is not None
    return float(total.detach()), policy_N.grad, loss.figures(summed, totals)


def theirs(kind: str, spread: float, beta: float = 0.0, mask_cut: bool = False) -> tuple[float, torch.Tensor, Any]:
    """Loss, gradient and metrics of TRL's trainer on the same tokens, padded.

    The step is its one batch, or, for the loss that depends on batches, each question is, as in accumulated gradients.
    """
    policy_N, drawn_N, reference_N, advantages_A = numbers(spread)
    policy_N.requires_grad_()
    rows = torch.tensor([[place < length for place in range(MOST)] for length in LENGTHS])
    ended_A1 = torch.tensor(ENDED).long()[:, None]
    metrics: dict[str, Any] = {"train": defaultdict(list)}
    cuts = CUTS if kind == "bnpo" else [(0, len(LENGTHS))]

    def padded(values_N: torch.Tensor) -> torch.Tensor:
        return torch.zeros(rows.shape, dtype=torch.float64).masked_scatter(rows, values_N)

    total = torch.zeros((), dtype=torch.float64)
    for first, last in cuts:
        part = slice(first, last)
        mask = (rows.long() * ended_A1 if mask_cut else rows.long())[part]
        accelerator = SimpleNamespace(
            gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True
        )
        trainer = SimpleNamespace(
            aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=beta, loss_type=kind,
            importance_sampling_level="token", epsilon_low=EPSILON, use_vllm=False,
            current_gradient_accumulation_steps=len(cuts),
            epsilon_high=1 + HIGH if kind == "cispo" else HIGH, max_completion_length=MOST, accelerator=accelerator,
            args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1), _metrics=metrics,
            model=SimpleNamespace(training=True), _entropy_bonus_enabled=False,
            _get_per_token_logps_and_entropies=lambda *_, part=part, mask=mask, **__: (
                padded(policy_N)[part], torch.zeros(mask.shape), None,
            ),
        )  # fmt: skip
        inputs = {
            "prompt_ids": torch.ones(len(mask), 1).long(), "prompt_mask": torch.ones(len(mask), 1).long(),
            "completion_ids": rows.long()[part], "completion_mask": mask, "advantages": advantages_A[part],
            "old_per_token_logps": padded(drawn_N)[part], "ref_per_token_logps": padded(reference_N)[part],
            "num_items_in_batch": mask.sum(),
        }  # fmt: skip
        total = total + GRPOTrainer._compute_loss(trainer, None, inputs)
    total.backward()
    return float(total.detach()), policy_N.grad, metrics["train"]


@pytest.mark.parametrize("mask_cut", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("kind", ["dapo", "grpo", "dr_grpo", "cispo", "bnpo"])
def test_loss_and_gradient_are_trls(kind: str, beta: float, mask_cut: bool) -> None:
    loss, gradient, figures = ours(0.4, loss_type=kind, beta=beta, mask_cut=mask_cut)
    expected, expected_gradient, metrics = theirs(kind, 0.4, beta, mask_cut)
    assert loss == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-14)
    assert 0 < figures["clipped"] < 1
    if kind != "bnpo":  # its batches report means of their own
        clipped = metrics["cispo_clip_ratio" if kind == "cispo" else "clip_ratio/region_mean"][0]
        assert figures["clipped"] == pytest.approx(clipped, rel=1e-6)
        if beta:
            assert figures["kl"] == pytest.approx(metrics["kl"][0], rel=1e-6)


def test_on_policy_nothing_is_clipped_and_the_divergence_is_zero() -> None:
    _, _, figures = ours(0.0, beta=0.1)
    assert (figures["clipped"], figures["kl"]) == (0.0, 0.0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(scale: str) -> None:
    rewards = [[0.0, 1.0, 1.0, 0.0], [0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 2.0]]
    given = torch.tensor(rewards, dtype=torch.float64)
    spread = {"group": given.std(1, keepdim=True), "batch": given.std(), "none": torch.tensor(1 - 1e-4)}[scale]
    expected = (given - given.mean(1, keepdim=True)) / (spread + 1e-4)
    torch.testing.assert_close(torch.tensor(advantages(rewards, scale), dtype=torch.float64), expected)
