"""The value of every loss before the first step, against the papers' formulas written out here."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from posttrain_preference.config import CPOSettings, DPOSettings, KTOSettings, ORPOSettings, SimPOSettings
from posttrain_preference.feedback import TokenAnswer
from posttrain_preference.losses import NAMES, start_of_dpo, start_of_kto, start_of_simpo
from posttrain_preference.objectives import DPOLoss
from posttrain_preference.pairs import TokenPair, render_pairs
from posttrain_preference.stage import run
from preference_support.contexts import MakeContext, progress
from preference_support.float64 import log_probs, model_on_disk
from preference_support.loops import before_steps, gradient, loss_of, objective

from posttrain import StageContext
from posttrain.artifact import ModelSource
from posttrain.engine.loop import Training
from posttrain.engine.start import Start

LN_2 = math.log(2)
DPO_STARTS: dict[str, tuple[dict[str, Any], float]] = {
    "sigmoid": ({}, LN_2),
    "hinge": ({}, 1.0),
    "ipo": ({}, 25.0),
    "exo_pair": ({"label_smoothing": 1e-3}, 0.5 * math.log(0.5 / 0.999) + 0.5 * math.log(0.5 / 0.001)),
    "nca_pair": ({}, 2 * LN_2),
    "robust": ({"label_smoothing": 0.1}, LN_2),
    "bco_pair": ({}, 2 * LN_2),
    "sppo_hard": ({}, 50.0),
    "aot": ({"label_smoothing": 0.2}, LN_2),
    "aot_unpaired": ({"label_smoothing": 0.2}, LN_2),
    "apo_zero": ({}, 1.0),
    "apo_down": ({}, 1.0),
    "discopop": ({}, 0.5 * LN_2 + 0.5),
    "sigmoid_norm": ({}, LN_2),
}
"""At beta 0.1, with the label smoothing that the loss reads."""


def steps(context: StageContext) -> Any:
    return progress(context).steps


def test_every_loss_but_the_likelihood_has_a_start_here() -> None:
    assert {*DPO_STARTS, "sft"} == set(NAMES)


def test_every_loss_of_dpo_starts_where_policy_and_reference_agree(make_context: MakeContext) -> None:
    losses = {name: DPOSettings(lr=1.0, loss_type=[name], **given) for name, (given, _) in DPO_STARTS.items()}
    found: list[dict[str, float]] = []

    def look(training: Training, engine: Any) -> None:
        training.model.eval()
        for move in (1, -1):
            with torch.no_grad():
                for key, parameter in training.model.named_parameters():
                    if "lora_B" in key:
                        parameter.mul_(move)
            found.append({})
            for name, settings in losses.items():
                objective(training).loss = DPOLoss(settings)
                found[-1][name] = loss_of(training).item()

    before_steps(make_context("lora", records=3), look)
    assert found[0] == pytest.approx({name: wanted for name, (_, wanted) in DPO_STARTS.items()}, rel=1e-5)
    for name, (_, wanted) in DPO_STARTS.items():
        assert start_of_dpo(losses[name], [TokenPair([1], [2], [3], "")], [[0.0, 0.0]]) == pytest.approx(wanted)
        assert found[1][name] != pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_losses_are_added_by_their_weights(
    make_context: MakeContext, parents: dict[str, ModelSource], kind: str
) -> None:
    losses, weights = ["sigmoid", "ipo", "sft"], [0.8, 0.01, 0.5]
    context = make_context(kind, records=4, epochs=1, loss_type=losses, loss_weights=weights, gradient_accumulation=1)
    context.config.per_device_batch_size = 4
    rows = render_pairs(context).rows
    exact = log_probs(model_on_disk(parents[kind]), rows)
    likelihood = -sum(chosen for chosen, _ in exact) / sum(len(row.chosen) for row in rows)
    run(context)
    assert steps(context)[1]["loss"] == pytest.approx(0.8 * LN_2 + 0.01 * 25 + 0.5 * likelihood, rel=1e-5)


def test_the_likelihood_alone_does_not_hide_a_wrong_start(make_context: MakeContext) -> None:
    """The constant of the other losses holds wherever policy and reference agree; the likelihood does not."""
    settings = DPOSettings(lr=1.0, loss_type=["sigmoid", "sft"])
    rows = [TokenPair([1], [2, 3], [4], "here")]
    assert start_of_dpo(settings, rows, [[-3.0, -1.0]]) == pytest.approx(LN_2 + 1.5)
    assert start_of_dpo(settings, rows, [[-5.0, -1.0]]) == pytest.approx(LN_2 + 2.5)


# --- Without a reference ----------------------------------------------------------------------------------------------


def paper(name: str, settings: Any, chosen: Any, rejected: Any, lengths: tuple[Any, Any]) -> torch.Tensor:
    """The loss of a batch as the paper writes it, with probabilities in place of log-probabilities."""
    sigmoid = torch.sigmoid
    mean_chosen, mean_rejected = chosen / lengths[0], rejected / lengths[1]
    likelihood = -chosen.sum() / lengths[0].sum()
    if name == "orpo":
        odds = [torch.exp(value) / (1 - torch.exp(value)) for value in (mean_chosen, mean_rejected)]
        return likelihood - settings.beta * torch.log(sigmoid(torch.log(odds[0] / odds[1]))).mean()
    if name == "simpo":
        return -torch.log(sigmoid(settings.beta * (mean_chosen - mean_rejected) - settings.gamma)).mean()
    reward = settings.beta * (chosen - rejected)
    contrast = {
        "sigmoid": -(1 - settings.label_smoothing) * torch.log(sigmoid(reward))
        - settings.label_smoothing * torch.log(sigmoid(-reward)),
        "hinge": torch.clamp(1 - reward, min=0),
        "ipo": (mean_chosen - mean_rejected - 1 / (2 * settings.beta)) ** 2,
    }[settings.loss_type]
    return contrast.mean() + settings.cpo_alpha * likelihood


FREE: list[tuple[str, dict[str, Any]]] = [
    ("orpo", {}),
    ("orpo", {"beta": 1.5}),
    ("cpo", {}),
    ("cpo", {"loss_type": "hinge", "cpo_alpha": 0.3}),
    ("cpo", {"loss_type": "ipo"}),
    ("cpo", {"label_smoothing": 0.2, "cpo_alpha": 0.0}),
    ("simpo", {}),
    ("simpo", {"beta": 5.0, "gamma": 0.0}),
]


@pytest.mark.parametrize(("name", "settings"), FREE)
def test_a_loss_without_reference_and_its_gradient_are_the_papers(
    make_context: MakeContext, parents: dict[str, ModelSource], name: str, settings: dict[str, Any]
) -> None:
    """Neither the prompt's tokens nor those behind the stop token count."""
    from preference_support.float64 import log_prob

    context = make_context("lora", stage=name, records=2, gradient_checkpointing=False, **settings)
    seen: list[Any] = []
    before_steps(context, lambda training, engine: seen.extend([training.model.eval(), gradient(training)]))
    loss, ours = seen[1]
    rows = render_pairs(context).rows
    model = model_on_disk(parents["lora"])
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in ours)
    sides = [torch.stack([log_prob(model, row.prompt, ids) for row in rows for n, ids in row.answers if n == side])
             for side in ("chosen", "rejected")]  # fmt: skip
    lengths = [torch.tensor([len(ids) for row in rows for n, ids in row.answers if n == side])
               for side in ("chosen", "rejected")]  # fmt: skip
    exact = paper(name, context.config, sides[0], sides[1], (lengths[0], lengths[1]))
    exact.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(exact.item(), rel=1e-5)
    for key, parameter in model.named_parameters():
        if key in ours:
            size = float(parameter.grad.abs().max())
            assert torch.allclose(ours[key].double(), parameter.grad, atol=1e-5 * size), key


@pytest.mark.parametrize(("name", "settings"), [("orpo", {"beta": 5.0}), ("cpo", {"cpo_alpha": 0.2}), ("simpo", {})])
@pytest.mark.parametrize(("kind", "dtype"), [("lora", "bfloat16"), ("full", "bfloat16")])
def test_training_separates_the_answers(
    make_context: MakeContext, name: str, settings: dict[str, Any], kind: str, dtype: str
) -> None:
    context = make_context(kind, stage=name, dtype=dtype, **{"lr": 5e-3, **settings})
    run(context)
    found = steps(context)
    assert found[6]["loss"] < found[1]["loss"]
    assert found[6]["rewards_margin"] > found[1]["rewards_margin"]
    assert found[6]["rewards_accuracy"] > 0.7
    assert found[1]["nll"] > 1


# --- Settings ---------------------------------------------------------------------------------------------------------

SHARED: list[tuple[str, Any]] = [
    ("beta", 0.0),
    ("beta", math.nan),
    ("lr", -1e-6),
    ("lr", math.inf),
    ("epochs", 0),
    ("max_steps", 0),
    ("per_device_batch_size", 0),
    ("gradient_accumulation", 0),
    ("warmup_ratio", 1.0),
    ("warmup_ratio", -0.1),
    ("sequence_length", 1),
    ("max_grad_norm", 0.0),
    ("checkpoint_steps", 0),
]
OWN: list[tuple[type, str, Any, str]] = [
    (DPOSettings, "loss_type", ["sigmod"], "no loss is called 'sigmod'. Did you mean sigmoid?"),
    (DPOSettings, "loss_type", ["kto_pair"], "Available: aot, aot_unpaired, apo_down"),
    (DPOSettings, "loss_type", ["sigmoid", "sigmoid"], "names a loss twice"),
    (DPOSettings, "loss_type", ["sft"], "compares no answers"),
    (DPOSettings, "loss_type", [], "compares no answers"),
    (DPOSettings, "loss_weights", [1.0, 2.0], "2 weights for 1 losses (sigmoid)"),
    (DPOSettings, "loss_weights", [-1.0], "must be finite numbers above 0"),
    (DPOSettings, "loss_weights", [math.inf], "must be finite numbers above 0"),
    (DPOSettings, "label_smoothing", 0.1, "is read by robust, exo_pair, aot, aot_unpaired only, not by sigmoid"),
    (DPOSettings, "label_smoothing", 0.5, "below 0.5"),
    (DPOSettings, "discopop_tau", 0.0, "above 0"),
    (KTOSettings, "loss_type", "ktoo", "Did you mean kto?"),
    (KTOSettings, "desirable_weight", 0.0, "above 0"),
    (KTOSettings, "undesirable_weight", math.nan, "above 0"),
    (KTOSettings, "per_device_batch_size", 1, "must be at least 2"),
    (CPOSettings, "loss_type", "simpo", "no loss is called 'simpo'"),
    (CPOSettings, "cpo_alpha", -1.0, "at least 0"),
    (CPOSettings, "label_smoothing", 0.7, "below 0.5"),
    (SimPOSettings, "gamma", -0.1, "at least 0"),
]


@pytest.mark.parametrize("kind", [DPOSettings, KTOSettings, ORPOSettings, CPOSettings, SimPOSettings])
@pytest.mark.parametrize(("name", "value"), SHARED)
def test_a_setting_out_of_range_is_named(kind: type[DPOSettings], name: str, value: float) -> None:
    assert [problem[0] for problem in kind(**{"lr": 5e-6, name: value}).problems()] == [name]
    assert list(kind(lr=5e-6).problems()) == []


@pytest.mark.parametrize(("kind", "name", "value", "what"), OWN)
def test_a_setting_of_one_stage_is_named(kind: type[DPOSettings], name: str, value: Any, what: str) -> None:
    (problem,) = kind(**{"lr": 5e-6, name: value}).problems()
    assert problem[0] == name
    assert what in problem[1]


def test_what_a_loss_needs_is_asked_for() -> None:
    (problem,) = DPOSettings(lr=5e-6, loss_type=["exo_pair"]).problems()
    assert problem == ("label_smoothing", "must be above 0 for exo_pair, whose paper recommends 1e-3")
    (problem,) = DPOSettings(lr=5e-6, loss_type=["aot"], per_device_batch_size=1).problems()
    assert problem[0] == "per_device_batch_size"
    (problem,) = CPOSettings(lr=5e-6, loss_type="hinge", label_smoothing=0.1).problems()
    assert problem == ("label_smoothing", "is read by sigmoid only, not by hinge")


def test_the_start_of_kto_counts_the_weights_of_its_batch() -> None:
    rows = [TokenAnswer([1], [2], label, "here") for label in (True, True, False)]
    settings = KTOSettings(lr=1.0, desirable_weight=2.0, undesirable_weight=3.0)
    assert start_of_kto(settings, rows, [[0.0]] * 3) == pytest.approx((2 + 2 + 3) / 3 / 2)


def test_how_far_log_probabilities_may_be_off_is_how_far_the_loss_may_be() -> None:
    rows = [TokenPair([1], [2, 3], [4, 5, 6, 7], "here")]
    settings = SimPOSettings(lr=1.0, beta=2.0, gamma=0.0)
    loss = partial(start_of_simpo, settings)
    start = Start(stage="simpo", rows=rows, log_probs=[[-2.0, -4.0]], loss=loss, dtype="float32")
    assert start.spread() == pytest.approx(1e-4 * 2.0 * 0.5, rel=0.02)  # slope of the softplus at 0 is 1/2
