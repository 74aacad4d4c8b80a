"""The doctor's proof of answers: every stage is right, and a fault of the loop is found."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from posttrain_preference.stage import run
from preference_support.contexts import MakeContext

from posttrain import StageContext
from posttrain.commands.doctor import OwnLoop, Proving, Silent
from posttrain.engine import answers
from posttrain.model.loading import load_trainable
from posttrain.sft.answer_proof import sample_rows
from posttrain.sft.proof import Check


def proven(context: StageContext) -> list[Check]:
    """The comparisons of a stage on the parent of its context."""
    given = {each.name: getattr(context, each.name) for each in fields(context)} | {"progress": Silent()}
    proving = Proving(**given, model=load_trainable(context.parent, "float32"))
    run(proving)
    return proving.checks


@pytest.mark.parametrize(
    ("stage", "kind", "settings"),
    [
        ("dpo", "full", {"loss_type": ["sigmoid", "sft"]}),
        ("dpo", "dora", {"loss_type": ["aot"]}),
        ("kto", "plain", {}),
        ("orpo", "plain", {}),
        ("cpo", "experts", {}),
        ("simpo", "tied_tokens", {}),
    ],
)
def test_loss_and_gradient_are_those_of_answers_alone(
    make_context: MakeContext, stage: str, kind: str, settings: dict[str, Any]
) -> None:
    checks = proven(make_context(kind, stage=stage, **settings))
    assert [check.name for check in checks] == [f"{stage}: answers packed, in float{bits}" for bits in (32, 64)]
    assert [check for check in checks if check.failed] == []
    assert checks[1].error is not None
    assert checks[1].error < 1e-7  # routers of experts compute in float32


def seeing(causal: Any, ids_BT: torch.Tensor, families: Any) -> torch.Tensor:
    """Hidden states of families whose answers see each other."""
    return answers.packed_hidden(causal, ids_BT, [prompt + sum(each) for prompt, each in families])


@pytest.mark.parametrize("kind", ["full", "plain"])
def test_answers_that_see_each_other_are_found(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(answers, "shared_hidden", seeing)
    assert all(check.failed for check in proven(make_context(kind)))


def test_a_stage_that_asks_for_the_model_is_not_trained(make_context: MakeContext) -> None:
    context = make_context()
    given = {each.name: getattr(context, each.name) for each in fields(context)}
    with pytest.raises(OwnLoop):
        Proving(**given, model=None).policy()


def test_rows_of_a_proof_are_short_and_spread(make_context: MakeContext) -> None:
    found: list[Any] = []

    class Looking(Proving):
        def train_answers(self, rows: Any, *given: Any) -> None:
            found.extend(rows)

    context = make_context(records=40)
    given = {each.name: getattr(context, each.name) for each in fields(context)}
    run(Looking(**given, model=None))
    sizes = sorted(len(row.prompt) + len(row.chosen) + len(row.rejected) for row in found)
    chosen = [len(row.prompt) + sum(len(ids) for _, ids in row.answers) for row in sample_rows(found)]
    assert len(chosen) == 4
    assert min(chosen) == sizes[0]
    assert max(chosen) <= sizes[len(sizes) // 2]
