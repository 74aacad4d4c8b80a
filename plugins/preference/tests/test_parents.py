"""Every stage on every kind of SFT artifact: it starts at the artifact, and leaves one of the same kind."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from posttrain_preference import reference, stage
from posttrain_preference.stage import run
from preference_support.contexts import ADAPTERS, STAGES, MakeContext, progress, weights
from preference_support.float64 import log_probs, model_on_disk

from posttrain import ArtifactDamaged, StageContext
from posttrain.artifact import ModelSource


class Spy:
    """Looks at what is proven, in place of the proof that it calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.honest = reference.prove_start
        monkeypatch.setattr(reference, "prove_start", self)

    def __call__(self, trainer: Any, rows: Any, expected: Any, context: StageContext, start: Any) -> None:
        self.honest(trainer, rows, expected, context, start)
        self.rows, self.expected, self.start = rows, expected, start
        self.loss = trainer.loss_of(rows)
        self.referenced = trainer.ref_model is not None
        self.reference = [trainer.reference_log_probs(row) for row in rows] if self.referenced else None


@pytest.mark.parametrize("kind", [*ADAPTERS, "full"])
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_starts_at_its_parent_and_leaves_its_kind(
    make_context: MakeContext,
    parents: dict[str, ModelSource],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kind: str,
) -> None:
    spy = Spy(monkeypatch)
    context = make_context(kind, stage=name, records=2, max_steps=1, gradient_accumulation=1)
    run(context)
    exact = log_probs(model_on_disk(parents[kind]), spy.rows)
    for wanted, ours in zip(exact, spy.expected, strict=True):
        assert ours == pytest.approx(wanted, abs=1e-4)
    assert spy.loss == pytest.approx(spy.start(context.config, spy.rows, exact), abs=1e-5)
    assert spy.referenced == (name in ("dpo", "kto"))
    for wanted, theirs in zip(exact, spy.reference or exact, strict=True):
        assert theirs == pytest.approx(wanted, abs=1e-4)

    parent = parents[kind].adapter or parents[kind].model
    before, after = weights(parent), weights(context.output)
    assert before.keys() == after.keys()
    assert all(before[key].shape == after[key].shape for key in before)
    assert all(not torch.equal(before[key], after[key]) for key in before if "token_adapter" not in key)  # stays
    assert all(path.is_file() for path in context.output.iterdir())  # no folder of a second adapter
    if kind != "full":
        assert (
            json.loads((context.output / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
        )


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_policy_that_is_not_the_parent_is_rejected(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    honest = reference.prove_start

    def of_another_policy(trainer: Any, *rest: Any) -> None:
        with torch.no_grad():
            for key, parameter in trainer.model.named_parameters():
                if "lora_B" in key or (kind == "full" and "mlp" in key):
                    parameter.zero_()
        honest(trainer, *rest)

    monkeypatch.setattr(reference, "prove_start", of_another_policy)
    context = make_context(kind, stage=name)
    with pytest.raises(ArtifactDamaged, match="the SFT model"):
        run(context)
    assert not list(context.output.iterdir())
    assert not progress(context).steps


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_adapters_on_weights_of_4_bits_stay_as_they_are(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """TRL rounds them to bfloat16, away from the reference."""
    honest, policies = StageContext.policy, []

    def quantised(context: StageContext) -> Any:
        policies.append(honest(context))
        policies[0].get_base_model().is_loaded_in_4bit = True
        return policies[0]

    monkeypatch.setattr(StageContext, "policy", quantised)
    context = make_context("lora", stage=name, max_steps=1)
    run(context)
    assert progress(context).steps[1]["loss"] == pytest.approx({"dpo": math.log(2), "kto": 0.5}[name], abs=1e-6)
    assert {p.dtype for p in policies[0].parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("kind", ["lora", "dora", "tied_tokens", "qlora"])
def test_the_gradient_of_every_kind_of_adapter_reaches_its_weights(
    make_context: MakeContext, parents: dict[str, ModelSource], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """TRL's fused output layer computes log-probabilities in chunks, and their gradient itself."""
    seen: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(stage, "_take_steps", lambda context, trainer: seen.update(gradients(trainer, spy.rows)))
    spy = Spy(monkeypatch)
    with pytest.raises(IndexError):  # nothing was trained, so there is nothing to tell about
        run(make_context(kind, records=2, gradient_checkpointing=False))

    from preference_support.float64 import log_prob

    model = model_on_disk(parents[kind])
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in seen)
    beta = 0.1
    margins = [log_prob(model, r.prompt, r.chosen) - log_prob(model, r.prompt, r.rejected) for r in spy.rows]
    # where policy and reference agree, the DPO loss has the slope -beta / 2 in each margin
    (-beta / 2 * torch.stack(margins).mean()).backward()
    exact = {key: parameter.grad for key, parameter in model.named_parameters() if key in seen}
    assert exact.keys() == seen.keys()
    for key, gradient in seen.items():
        assert torch.allclose(gradient.double(), exact[key], atol=1e-6), key


def gradients(trainer: Any, rows: Any) -> dict[str, torch.Tensor]:
    trainer.model.eval()
    trainer.compute_loss(trainer.model, trainer.batch_of(rows)).backward()
    return {key: p.grad for key, p in trainer.model.named_parameters() if p.requires_grad and p.grad is not None}
