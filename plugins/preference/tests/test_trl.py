"""Losses, gradients and a training step of whole models, equal to those of TRL's trainers on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from posttrain_preference.config import DPOSettings
from posttrain_preference.losses import NAMES
from posttrain_preference.objectives import DPOLoss
from posttrain_preference.stage import run
from preference_support.contexts import MakeContext, progress, weights
from preference_support.loops import before_steps, gradient, objective
from preference_support.oracle import build, columns, frozen_copy, quiet

from posttrain.engine.loop import Training

SAME = 1e-6
"""Largest relative difference in float32, of a loss and of the gradient of all weights together."""
SMOOTHED = {"robust": 0.2, "exo_pair": 0.1, "aot": 0.2, "aot_unpaired": 0.2}
OTHERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("kto", {}, {}),
    ("kto", {"loss_type": "apo_zero_unpaired", "desirable_weight": 1.5}, {}),
    ("orpo", {}, {}),
    ("cpo", {}, {}),
    ("cpo", {"loss_type": "hinge", "cpo_alpha": 0.3}, {}),
    ("cpo", {"loss_type": "ipo"}, {}),
    ("simpo", {}, {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0}),
]


def gentle(model: Any) -> Any:
    """Give ``model`` smaller weights, through which rounding does not grow."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.3)
    return model


def moved(model: Any) -> Any:
    """Move a policy away from its reference, the same way every time."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


class Seen:
    """What the loop computes for a policy that has moved: its rows, and loss and gradient by the name of a loss."""

    def __init__(self, losses: dict[str, Any]) -> None:
        self.losses = losses
        self.found: dict[str, tuple[float, dict[str, torch.Tensor]]] = {}
        self.rows: list[Any] = []

    def __call__(self, training: Training, engine: Any) -> None:
        gentle(training.model.eval())
        if objective(training).loss.referenced:
            objective(training).before = objective(training)._computed(engine)
        moved(training.model)
        self.rows = [each.row for each in training.rows]
        for name, loss in self.losses.items():
            objective(training).loss = loss or objective(training).loss
            self.found[name] = gradient(training)


def oracle(context: Any, seen: Seen, folder: Path, **args: Any) -> Any:
    """TRL's trainer with the policy and the reference that the loop had."""
    policy = gentle(context.policy())
    reference = frozen_copy(policy) if context.name in ("dpo", "kto") else None
    return build(context.name, moved(policy), reference, seen.rows, context.tokenizer(), folder, **args)


def same(trainer: Any, stage: str, seen: Seen, name: str) -> None:
    """Check the loss ``name`` and the gradient of every weight against those of ``trainer``."""
    trainer.model.zero_grad(set_to_none=True)
    trainer.model.eval()
    with quiet():
        theirs = trainer.compute_loss(trainer.model, trainer.batch_of(columns(stage, seen.rows)))
        theirs.backward()
    loss, gradients = seen.found[name]
    assert loss == pytest.approx(theirs.item(), rel=SAME)
    exact = {key: each.grad for key, each in trainer.model.named_parameters() if each.grad is not None}
    assert exact.keys() == gradients.keys()
    ours, wanted = (torch.cat([each[key].flatten() for key in sorted(exact)]).double() for each in (gradients, exact))
    assert float(wanted.norm()) > 0
    assert float((ours - wanted).norm() / wanted.norm()) < SAME, name


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_every_loss_of_dpo_and_its_gradient_are_trls(make_context: MakeContext, tmp_path: Path, kind: str) -> None:
    names = {
        name: DPOSettings(lr=1.0, loss_type=[name], label_smoothing=SMOOTHED.get(name, 0.0), discopop_tau=0.5)
        for name in NAMES
    }
    seen = Seen({name: DPOLoss(settings) for name, settings in names.items()})
    context = make_context(kind, records=5, per_device_batch_size=5, gradient_checkpointing=False)
    before_steps(context, seen)
    # discopop's slope changes within its temperature: at the default of 0.05, float32 alone is worse than this test
    trainer = oracle(context, seen, tmp_path, discopop_tau=0.5)
    for name, settings in names.items():
        trainer.loss_types, trainer.loss_weights = [name], [1.0]
        trainer.label_smoothing = settings.label_smoothing
        same(trainer, "dpo", seen, name)


@pytest.mark.parametrize(("stage", "settings", "theirs"), OTHERS)
def test_every_other_loss_and_its_gradient_are_trls(
    make_context: MakeContext, tmp_path: Path, stage: str, settings: dict[str, Any], theirs: dict[str, Any]
) -> None:
    seen = Seen({stage: None})
    size = {"records": 4, "per_device_batch_size": 8 if stage == "kto" else 4, "gradient_checkpointing": False}
    context = make_context("lora", stage=stage, **size, **settings)
    before_steps(context, seen)
    trainer = oracle(context, seen, tmp_path, beta=context.config.beta, **settings, **theirs)
    same(trainer, stage, seen, stage)


@pytest.mark.parametrize("stage", ["dpo", "kto", "orpo", "cpo", "simpo"])
def test_a_training_step_is_trls(make_context: MakeContext, tmp_path: Path, stage: str) -> None:
    theirs: dict[str, Any] = {"simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0}}.get(stage, {})
    size = 8 if stage == "kto" else 4
    context = make_context(
        "lora", stage=stage, records=4, per_device_batch_size=size, gradient_accumulation=1, epochs=1, lr=1e-2,
        gradient_checkpointing=False, adam_eps=1e-3,
    )  # fmt: skip
    rows: list[Any] = []
    before_steps(context, lambda training, engine: rows.extend(each.row for each in training.rows))
    policy = context.policy()
    start = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    reference = frozen_copy(policy) if stage in ("dpo", "kto") else None
    args = {"learning_rate": 1e-2, "beta": context.config.beta, "adam_epsilon": 1e-3, **theirs}
    trainer = build(stage, policy, reference, rows, context.tokenizer(), tmp_path, **args)
    with quiet():
        trainer.train()
    run(context)
    found = weights(context.output)
    steps = progress(context).steps
    logged = next(entry for entry in trainer.state.log_history if "grad_norm" in entry)
    assert steps[1]["grad_norm"] == pytest.approx(float(logged["grad_norm"]), rel=SAME)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            ours = found[name.replace(".default", "")] - start[name]
            change = parameter.detach() - start[name]
            assert float(change.norm()) > 0
            assert float((ours - change).norm() / change.norm()) < 1e-5, name
