"""Every loss and its gradient as functions of log-probabilities, against TRL's own code on the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from posttrain_preference.config import CPOSettings, DPOSettings, KTOSettings, ORPOSettings, SimPOSettings
from posttrain_preference.feedback import TokenAnswer
from posttrain_preference.losses import NAMES
from posttrain_preference.objectives import CONTRASTS, CPOLoss, DPOLoss, KTOLoss, ORPOLoss, SimPOLoss
from posttrain_preference.pairs import TokenPair

from posttrain import AnswerScores

LENGTHS = [(3, 5), (1, 2), (7, 4), (2, 2), (5, 1), (4, 6)]
ROWS = [TokenPair([1], list(range(chosen)), list(range(rejected)), "here") for chosen, rejected in LENGTHS]
TOKENS = torch.tensor(LENGTHS)


def log_probs(seed: int, spread: float = 1.0) -> torch.Tensor:
    """Log-probabilities of both answers to six prompts, summed over their tokens, [6, 2]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(len(LENGTHS), 2, generator=generator, dtype=torch.float64) * spread
    return -(0.05 + drawn) * TOKENS


# --- TRL's trainers without their models ------------------------------------------------------------------------------


def fake_accelerator() -> Any:
    return SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda value: value, gather=lambda value: value
    )


class Metrics(dict[str, Any]):
    def __missing__(self, key: str) -> Any:
        found = self[key] = [] if "/" in key or key in ("entropy", "kl", "mean_token_accuracy") else Metrics()
        return found


def spread_over_tokens(sums: torch.Tensor, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [B, T] of tokens with the sums [B], behind a prompt of one token, and their mask [B, T + 1]."""
    longest = max(lengths)
    mask = torch.tensor([[0] + [1] * length + [0] * (longest - length) for length in lengths])
    return sums[:, None] / torch.tensor(lengths)[:, None] * mask[:, 1:], mask


def trl_dpo(settings: DPOSettings, policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    from trl import DPOTrainer

    lengths = [*(pair[0] for pair in LENGTHS), *(pair[1] for pair in LENGTHS)]
    tokens, mask = spread_over_tokens(policy.T.flatten(), lengths)
    output = SimpleNamespace(log_probs=tokens, entropy=tokens, mean_logits=tokens, is_top1=mask[:, 1:].bool())
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=fake_accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        _metrics={"train": Metrics()},
        _total_train_tokens=0,
        _tp_size=1,
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        args=SimpleNamespace(discopop_tau=settings.discopop_tau),
        loss_types=list(settings.loss_type),
        loss_weights=[weight for _, weight in settings.weighted_losses()],
    )
    inputs = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "ref_chosen_logps": reference[:, 0],
        "ref_rejected_logps": reference[:, 1],
    }
    loss: torch.Tensor = DPOTrainer._compute_loss(trainer, lambda **unused: output, inputs, False)
    return loss


def trl_kto(settings: KTOSettings, labels: Sequence[bool], policy: Any, reference: Any, aside: Any) -> torch.Tensor:
    from trl import KTOTrainer

    lengths = [chosen for chosen, _ in LENGTHS]
    tokens, mask = spread_over_tokens(policy, lengths)
    output = SimpleNamespace(log_probs=tokens, entropy=tokens, mean_logits=tokens)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=fake_accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=settings.loss_type == "kto",
        _compute_kl_logps=lambda *unused: aside[0],
        _metrics={"train": Metrics()},
        _total_train_tokens=0,
        _tp_size=1,
        beta=settings.beta,
        loss_type=settings.loss_type,
        desirable_weight=settings.desirable_weight,
        undesirable_weight=settings.undesirable_weight,
    )
    inputs = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "label": torch.tensor(labels),
        "ref_logps": reference,
        "ref_KL_logps": aside[1],
    }
    loss: torch.Tensor = KTOTrainer._compute_loss(trainer, lambda **unused: output, inputs, False)
    return loss


def trl_free(settings: Any, policy: torch.Tensor) -> torch.Tensor:
    """TRL's loss of a batch, with the likelihood of the answers alone."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    loss_type = "simpo" if isinstance(settings, SimPOSettings) else getattr(settings, "loss_type", "orpo")
    given = policy / TOKENS if loss_type in ("orpo", "simpo", "ipo") else policy
    nll = -policy[:, 0].sum() / TOKENS[:, 0].sum()
    trainer = SimpleNamespace(
        accelerator=fake_accelerator(),
        beta=settings.beta,
        loss_type=loss_type,
        alpha=0.0,
        label_smoothing=getattr(settings, "label_smoothing", 0.0),
        simpo_gamma=getattr(settings, "gamma", 0.0),
    )
    if loss_type == "orpo":
        losses, *_ = ORPOTrainer.odds_ratio_loss(trainer, given[:, 0], given[:, 1])
        return nll - losses.mean()
    losses, *_ = CPOTrainer.cpo_loss(trainer, given[:, 0], given[:, 1])
    return losses.mean() + getattr(settings, "cpo_alpha", 0.0) * nll


def apart(ours: torch.Tensor, theirs: torch.Tensor, leaf: torch.Tensor) -> float:
    """Return the larger relative difference, of two losses or of their gradients with respect to ``leaf``."""
    (found,) = torch.autograd.grad(ours, leaf)
    (wanted,) = torch.autograd.grad(theirs, leaf)
    return max(abs(ours.item() - theirs.item()) / abs(theirs.item()), float((found - wanted).norm() / wanted.norm()))


# --- Pairs ------------------------------------------------------------------------------------------------------------

DPO: list[dict[str, Any]] = [
    *({"loss_type": [name]} for name in CONTRASTS if name != "exo_pair"),
    {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    *({"loss_type": [name], "label_smoothing": 0.2} for name in ("robust", "exo_pair", "aot", "aot_unpaired")),
    {"loss_type": ["discopop"], "discopop_tau": 0.5},
    {"loss_type": ["sigmoid", "sft"]},
    {"loss_type": ["hinge", "sft", "bco_pair"], "loss_weights": [0.3, 2.0, 0.5]},
]


def test_every_loss_of_dpo_is_compared() -> None:
    assert {name for settings in DPO for name in settings["loss_type"]} == set(NAMES)


@pytest.mark.parametrize("beta", [0.1, 1.7])
@pytest.mark.parametrize("settings", DPO, ids=lambda settings: "+".join(settings["loss_type"]))
def test_a_loss_of_dpo_and_its_gradient_are_trls(settings: dict[str, Any], beta: float) -> None:
    given = DPOSettings(lr=1.0, beta=beta, **settings)
    policy, reference = log_probs(0).requires_grad_(), log_probs(1)
    loss = DPOLoss(given)
    ours, _ = loss.share(
        AnswerScores(rows=ROWS, log_probs=policy, tokens=TOKENS, reference=reference), loss.totals(ROWS)
    )
    # TRL holds the label smoothing of exo_pair in float32
    limit = 1e-6 if "exo_pair" in given.loss_type else 1e-12
    assert apart(ours, trl_dpo(given, policy, reference), policy) <= limit


FREE: list[tuple[Any, type]] = [
    (ORPOSettings(lr=1.0), ORPOLoss),
    (ORPOSettings(lr=1.0, beta=1.5), ORPOLoss),
    (CPOSettings(lr=1.0), CPOLoss),
    (CPOSettings(lr=1.0, label_smoothing=0.2, cpo_alpha=0.0), CPOLoss),
    (CPOSettings(lr=1.0, loss_type="hinge", cpo_alpha=0.3), CPOLoss),
    (CPOSettings(lr=1.0, loss_type="ipo"), CPOLoss),
    (SimPOSettings(lr=1.0), SimPOLoss),
    (SimPOSettings(lr=1.0, beta=5.0, gamma=0.0), SimPOLoss),
]


@pytest.mark.parametrize(("settings", "kind"), FREE)
def test_a_loss_without_reference_and_its_gradient_are_trls(settings: Any, kind: type) -> None:
    policy = log_probs(2, spread=3.0).requires_grad_()
    loss = kind(settings)
    ours, _ = loss.share(AnswerScores(rows=ROWS, log_probs=policy, tokens=TOKENS), loss.totals(ROWS))
    # TRL's ORPO computes in float32
    assert apart(ours, trl_free(settings, policy), policy) <= (1e-6 if kind is ORPOLoss else 1e-12)


def test_the_odds_of_a_certain_answer_are_finite() -> None:
    policy = torch.zeros(len(ROWS), 2, dtype=torch.float64).requires_grad_()
    loss = ORPOLoss(ORPOSettings(lr=1.0))
    ours, _ = loss.share(AnswerScores(rows=ROWS, log_probs=policy, tokens=TOKENS), loss.totals(ROWS))
    ours.backward()
    assert torch.isfinite(ours)
    assert policy.grad is not None
    assert bool(torch.isfinite(policy.grad).all())


# --- Judged answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[True, False, True, True, False, False], [True] * 6, [False] * 6])
@pytest.mark.parametrize("settings", [{}, {"desirable_weight": 2.0, "undesirable_weight": 0.5}, {"beta": 1.5}])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("divergence", [-0.5, 0.7])
def test_the_loss_of_kto_and_its_gradient_are_trls(
    name: str, settings: dict[str, Any], labels: list[bool], divergence: float
) -> None:
    given = KTOSettings(lr=1.0, loss_type=name, **settings)
    policy, reference = log_probs(3)[:, :1].clone().requires_grad_(), log_probs(4)[:, :1]
    aside = (log_probs(5)[:, 0] + divergence, log_probs(5)[:, 0])
    rows = [TokenAnswer([1], row.chosen, label, "here", [2]) for row, label in zip(ROWS, labels, strict=True)]
    loss = KTOLoss(given)
    kl = {"aside": aside[0], "aside_reference": aside[1]} if name == "kto" else {}
    scores = AnswerScores(rows=rows, log_probs=policy, tokens=TOKENS[:, :1], reference=reference, **kl)
    ours, sums = loss.share(scores, loss.totals(rows))
    assert apart(ours, trl_kto(given, labels, policy[:, 0], reference[:, 0], aside), policy) <= 1e-12
    assert float(sums["kl"]) == pytest.approx(max(divergence, 0.0) if name == "kto" else 0.0)


DEVICE = torch.device("meta")
"""A device without numbers stands for a GPU: whatever asks it for a value fails, as boolean indexing does."""


@pytest.mark.parametrize(
    "loss",
    [
        *(
            DPOLoss(DPOSettings(lr=1.0, loss_type=[name], label_smoothing=0.1 if name in ("exo_pair", "robust") else 0))
            for name in NAMES
        ),
        *(kind(settings) for settings, kind in FREE),
        KTOLoss(KTOSettings(lr=1.0)),
    ],
)
def test_no_loss_waits_for_the_device(loss: Any) -> None:
    answers = 1 if isinstance(loss, KTOLoss) else 2
    policy, reference = log_probs(0)[:, :answers], log_probs(1)[:, :answers]
    rows = [TokenAnswer([1], [2], number > 2, "here", [3]) for number in range(6)] if answers == 1 else ROWS
    given = {"log_probs": policy, "reference": reference, "aside": policy[:, 0], "aside_reference": reference[:, 0]}
    sent = {name: each.to(DEVICE).requires_grad_(name == "log_probs") for name, each in given.items()}
    share, sums = loss.share(AnswerScores(rows=rows, tokens=TOKENS[:, :answers].to(DEVICE), **sent), loss.totals(rows))
    share.backward()
    assert {each.device for each in sums.values()} == {DEVICE}


# --- Shares and figures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [DPOLoss(DPOSettings(lr=1.0, loss_type=["sigmoid", "sft"])), *(k(s) for s, k in FREE)])
@pytest.mark.parametrize("size", [1, 4])
def test_the_shares_of_batches_add_up_to_the_loss_of_the_step(loss: Any, size: int) -> None:
    """Chosen answers have different lengths: a mean of the batches' likelihoods would be another."""
    policy, reference = log_probs(0), log_probs(1)
    totals = loss.totals(ROWS)

    def share(part: slice) -> Any:
        scores = AnswerScores(rows=ROWS[part], log_probs=policy[part], tokens=TOKENS[part], reference=reference[part])
        return loss.share(scores, totals)

    whole, all_sums = share(slice(None))
    parts = [share(slice(start, start + size)) for start in range(0, len(ROWS), size)]
    assert sum(part.item() for part, _ in parts) == pytest.approx(whole.item())
    summed = {name: float(sum(sums[name] for _, sums in parts)) for name in all_sums}
    assert loss.figures(summed, totals) == pytest.approx(
        loss.figures({k: float(v) for k, v in all_sums.items()}, totals)
    )


def test_the_figures_of_a_step_are_means_over_its_pairs() -> None:
    policy, reference = log_probs(0), log_probs(1)
    loss = DPOLoss(DPOSettings(lr=1.0, beta=0.5))
    scores = AnswerScores(rows=ROWS, log_probs=policy, tokens=TOKENS, reference=reference)
    total, sums = loss.share(scores, loss.totals(ROWS))
    rewards = 0.5 * (policy - reference)
    assert loss.figures({name: float(value) for name, value in sums.items()}, loss.totals(ROWS)) == {
        "loss": pytest.approx(float(total)),
        "rewards_margin": pytest.approx(float((rewards[:, 0] - rewards[:, 1]).mean())),
        "rewards_accuracy": pytest.approx(float((rewards[:, 0] > rewards[:, 1]).double().mean())),
    }


def test_a_step_of_one_kind_of_answers_has_no_margin() -> None:
    loss = KTOLoss(KTOSettings(lr=1.0))
    rows = [TokenAnswer([1], [2], True, "here") for _ in range(2)]
    assert loss.figures({"loss": 1.0, "good": 1.0, "bad": 0.0, "kl": 0.4}, loss.totals(rows)) == {
        "loss": 1.0,
        "kl": 0.4,
    }
