"""Every stage on every kind of SFT artifact: it starts at the artifact, and leaves one of the same kind."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from posttrain_preference.stage import run
from preference_support.contexts import ADAPTERS, STAGES, MakeContext, progress, weights
from preference_support.float64 import log_prob, log_probs, model_on_disk
from preference_support.loops import before_steps, gradient

from posttrain import ArtifactDamaged
from posttrain.artifact import ModelSource
from posttrain.engine.loop import Training
from posttrain.engine.start import Start


class Spy:
    """Keeps what is proven."""

    reference: Any = None

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = Start.prove_reference, Start.prove_loss

        def prove_reference(start: Start[Any], found: Any) -> None:
            self.reference = found
            honest[0](start, found)

        def prove_loss(start: Start[Any], found: float) -> None:
            self.start, self.loss = start, found
            honest[1](start, found)

        monkeypatch.setattr(Start, "prove_reference", prove_reference)
        monkeypatch.setattr(Start, "prove_loss", prove_loss)


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
    exact = log_probs(model_on_disk(parents[kind]), spy.start.rows)
    for wanted, ours in zip(exact, spy.start.log_probs, strict=True):
        assert ours == pytest.approx(wanted, abs=1e-4)
    assert spy.loss == pytest.approx(spy.start.loss(spy.start.rows, exact), abs=1e-5)
    assert (spy.reference is not None) == (name in ("dpo", "kto"))
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
    honest = Start.of

    def of_another_policy(stage: str, model: Any, *rest: Any) -> Start[Any]:
        start = honest(stage, model, *rest)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key or (kind == "full" and "mlp" in key):
                    parameter.zero_()
        return start

    monkeypatch.setattr(Start, "of", of_another_policy)
    context = make_context(kind, stage=name)
    with pytest.raises(ArtifactDamaged, match="the SFT model"):
        run(context)
    assert not list(context.output.iterdir())
    assert not progress(context).steps


@pytest.mark.parametrize("kind", ["lora", "dora", "tied_tokens", "qlora", "full"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_the_gradient_of_every_kind_of_parent_reaches_its_weights(
    make_context: MakeContext, parents: dict[str, ModelSource], kind: str, recomputed: bool
) -> None:
    """Log-probabilities are computed in chunks, and their gradient in closed form."""
    seen: dict[str, torch.Tensor] = {}
    rows: list[Any] = []

    def look(training: Training, engine: Any) -> None:
        rows.extend(each.row for each in training.rows)
        seen.update(gradient(training)[1])

    before_steps(make_context(kind, records=2, gradient_checkpointing=recomputed, loss_chunk=3), look)
    model = model_on_disk(parents[kind])
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in seen)
    beta = 0.1
    margins = [log_prob(model, r.prompt, r.chosen) - log_prob(model, r.prompt, r.rejected) for r in rows]
    # where policy and reference agree, the DPO loss has the slope -beta / 2 in each margin
    (-beta / 2 * torch.stack(margins).mean()).backward()
    exact = {key: parameter.grad for key, parameter in model.named_parameters() if key in seen}
    assert exact.keys() == seen.keys()
    for key, found in seen.items():
        wanted = exact[key]
        assert wanted is not None
        assert torch.allclose(found.double(), wanted, atol=1e-6, rtol=1e-4), key


def test_dropout_of_the_parent_is_off_and_stays_in_its_settings(make_context: MakeContext) -> None:
    context = make_context("dropout", max_steps=1)
    run(context)
    assert progress(context).steps[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert json.loads((context.output / "adapter_config.json").read_text())["lora_dropout"] == 0.5
