from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from posttrain_preference import reference
from posttrain_preference.losses import start_of_dpo
from posttrain_preference.pairs import render_pairs
from posttrain_preference.quiet import quiet
from posttrain_preference.stage import run
from preference_support.contexts import STAGES, MakeContext, content, progress, weights

from posttrain import ArtifactDamaged, BadInput, Diverged, StageContext
from posttrain.artifact import ModelSource

KINDS = ("lora", "full")


# --- The reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_at_ln_2_and_separates_the_answers(make_context: MakeContext, kind: str, dtype: str) -> None:
    context = make_context(kind, dtype=dtype)
    run(context)
    steps = progress(context).steps
    assert list(steps) == [1, 2, 3, 4, 5, 6]
    assert progress(context).started == (6, 0)
    assert steps[1]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert steps[1]["rewards_margin"] == pytest.approx(0)
    assert steps[6]["rewards_margin"] > 0.1
    assert steps[6]["rewards_accuracy"] == 1.0
    assert steps[6]["loss"] < steps[1]["loss"] - 0.05
    assert all(step["grad_norm"] > 0 for step in steps.values())
    rates = [step["lr"] for step in steps.values()]
    assert rates[0] == pytest.approx(2e-3)
    assert rates == sorted(rates, reverse=True)


def started(context: StageContext) -> tuple[Any, list[Any], list[list[float]]]:
    """A trainer before its first step, its first batch, and the SFT model's log-probabilities of that batch."""
    with quiet():
        from posttrain_preference.trainer import PairTrainer, build_trainer

        pairs = render_pairs(context)
        policy, rows = context.policy(), pairs.rows[:2]
        expected = reference.row_log_probs(policy, rows, autocast=False)
        trainer = build_trainer(PairTrainer, context, pairs, policy, reference.frozen_copy(policy))
        return trainer, rows, expected


def test_the_frozen_copy_shares_what_is_frozen_and_nothing_else(make_context: MakeContext) -> None:
    policy = make_context("lora").policy()
    copied = dict(reference.frozen_copy(policy).named_parameters())
    for name, parameter in policy.get_base_model().named_parameters():
        assert torch.equal(copied[name], parameter)
        assert copied[name].dtype == parameter.dtype
        assert not copied[name].requires_grad
        assert (copied[name] is parameter) == (not parameter.requires_grad)


def _shift(model: Any, part: str, size: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(size)


def _erase(model: Any, part: str) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.zero_()


@pytest.mark.parametrize(
    ("kind", "sabotage"),
    [
        ("lora", lambda policy, copied: _erase(copied, "lora_B")),  # the base model
        ("lora", lambda policy, copied: _shift(copied, "lora_B", 1e-3)),
        ("lora", lambda policy, copied: (_erase(copied, "lora_B"), _erase(policy, "lora_B"))),  # both: ln 2 holds
        ("full", lambda policy, copied: _erase(copied, "layers.1.mlp")),
    ],
)
def test_a_wrong_reference_is_rejected(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, kind: str, sabotage: Callable[[Any, Any], Any]
) -> None:
    honest = reference.frozen_copy

    def wrong(policy: Any) -> Any:
        copied = honest(policy)
        sabotage(policy, copied)
        return copied

    context = make_context(kind)
    monkeypatch.setattr(reference, "frozen_copy", wrong)
    with pytest.raises(ArtifactDamaged, match=r"the reference is not the SFT model: .*pairs\.jsonl:1 "):
        run(context)
    assert not list(context.output.iterdir())
    assert not progress(context).steps


def test_a_configuration_that_names_another_model_changes_nothing(
    make_context: MakeContext, parents: dict[str, ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a reference of its own, TRL loads the model that ``_name_or_path`` names: of merged weights, the base."""
    honest = StageContext.policy

    def named_wrongly(context: StageContext) -> Any:
        policy = honest(context)
        policy.config._name_or_path = str(parents["plain"].model)
        return policy

    plain, odd = make_context("full", folder="plain", max_steps=2), make_context("full", folder="odd", max_steps=2)
    run(plain)
    monkeypatch.setattr(StageContext, "policy", named_wrongly)
    run(odd)
    assert progress(odd).steps == progress(plain).steps
    assert weights(odd.output).keys() == weights(plain.output).keys()
    assert all(torch.equal(tensor, weights(plain.output)[name]) for name, tensor in weights(odd.output).items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_that_left_its_reference_is_rejected(make_context: MakeContext, kind: str) -> None:
    context = make_context(kind)
    trainer, rows, expected = started(context)
    reference.prove_start(trainer, rows, expected, context, start_of_dpo)
    _erase(trainer.model, "lora_B" if kind == "lora" else "layers.1.mlp")
    with pytest.raises(ArtifactDamaged, match=r"does not start at the SFT model: .* be 0\.693147 within 0\.0001"):
        reference.prove_start(trainer, rows, expected, context, start_of_dpo)


# --- What is fed to the trainer -------------------------------------------------------------------------------------


def test_the_trainer_sees_exactly_the_rendered_ids(make_context: MakeContext) -> None:
    prompt = ["what is the river", "the red heron", "what is the flag"]
    answers = ("the blue otter", "a clay town")
    context = make_context("lora", records=[(prompt, *answers)], per_device_batch_size=1)
    tokenizer = context.tokenizer()
    trainer, _, _ = started(context)
    (batch,) = list(trainer.get_train_dataloader())
    text = "<|user|>{}<eos>\n<|assistant|>{}<eos>\n<|user|>{}<eos>\n<|assistant|>".format(*prompt)
    for row, answer in enumerate(answers):
        whole = tokenizer(f"{text}{answer}<eos>", add_special_tokens=False)["input_ids"]
        scored = tokenizer(f"{answer}<eos>", add_special_tokens=False)["input_ids"]
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == whole
        assert batch["input_ids"][row][batch["completion_mask"][row].bool()].tolist() == scored


def test_pairs_that_are_too_long_are_dropped_and_counted(make_context: MakeContext) -> None:
    long = [(["what is the " + "red " * 60], "yes", "no"), (["what is the flag"], "yes " * 60, "no")]
    context = make_context(records=[*long, (["what is the flag"], "yes", "no")], sequence_length=40, max_steps=1)
    run(context)
    assert context.metrics["pairs"] == 1
    assert context.metrics["dropped"] == 2
    assert progress(context).notes == ["dropped 2 pairs longer than 40 tokens"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("records", "where", "what"),
    [
        (3, "{}.sequence_length", r"each of the \d {} is longer than 4 tokens"),
        ([], "{}.data", "holds no {}"),
        ([(["what is the flag"], "the red lace", "the red lace")], r"pairs\.jsonl:1", "the same"),
    ],
)
def test_nothing_to_train_on_is_bad_input(
    make_context: MakeContext, stage: str, records: Any, where: str, what: str
) -> None:
    noun = "answers" if stage == "kto" else "pairs"
    with pytest.raises(BadInput, match=f"{where.format(stage)}: .*{what.format(noun)}"):
        run(make_context(stage=stage, records=records, sequence_length=4))


@pytest.mark.parametrize("stage", STAGES)
def test_a_template_without_a_stop_token_is_rejected(
    make_context: MakeContext, parents: dict[str, ModelSource], stage: str
) -> None:
    """Answers would be taught not to end, and TRL says nothing."""
    endless = replace(parents["lora"], chat_template=parents["lora"].chat_template.replace("<eos>", ""))
    context = replace(make_context(stage=stage), parent=endless)
    with pytest.raises(BadInput, match=r"pairs\.jsonl:1.*stop token"):
        run(context)


def test_a_prompt_that_ends_otherwise_than_the_conversation_goes_on_keeps_its_end(
    make_context: MakeContext, parents: dict[str, ModelSource]
) -> None:
    """TRL drops the end of such a prompt, here ``no``, from what is trained."""
    template = parents["lora"].chat_template.replace("<|assistant|>{% endif %}", "<|assistant|>no {% endif %}")
    context = replace(make_context(records=2), parent=replace(parents["lora"], chat_template=template))
    with pytest.raises(BadInput, match=r"pairs\.jsonl:1"):
        run(context)


# --- The result -----------------------------------------------------------------------------------------------------


def test_the_same_adapter_goes_on(make_context: MakeContext, parents: dict[str, ModelSource]) -> None:
    context = make_context("lora")
    run(context)
    parent = parents["lora"].adapter
    assert parent is not None
    before, after = weights(parent), weights(context.output)
    assert before.keys() == after.keys()
    assert all(before[name].shape == after[name].shape for name in before)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    config = json.loads((context.output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["r"] == 4
    assert config["use_rslora"]
    assert all(path.is_file() for path in context.output.iterdir())  # no folder of a second adapter


def test_full_weights_keep_the_parents_configuration(
    make_context: MakeContext, parents: dict[str, ModelSource]
) -> None:
    context = make_context("full", max_steps=2)
    run(context)
    before, after = weights(parents["full"].model), weights(context.output)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((context.output / name).read_text()) == json.loads((parents["full"].model / name).read_text())


def test_metrics_tell_about_the_whole_run(make_context: MakeContext) -> None:
    context = make_context("lora", epochs=1)
    run(context)
    steps = progress(context).steps
    rendered = render_pairs(context).rows
    tokens = sum(2 * len(row.prompt) + len(row.chosen) + len(row.rejected) for row in rendered)
    reach = {each["kind"]: each["trained_matrices"] for each in context.metrics.pop("reach")}
    assert sum(reach.values()) > 0
    assert reach["embeddings"] == 0
    assert context.metrics == {
        "pairs": 12,
        "dropped": 0,
        "steps": 3,
        "final_loss": steps[3]["loss"],
        "rewards_margin": steps[3]["rewards_margin"],
        "tokens": tokens,
    }
    assert sum(step["tokens"] for step in steps.values()) == tokens


def test_the_seed_decides_every_byte(make_context: MakeContext) -> None:
    contexts = [make_context("lora", folder=name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    for context in contexts:
        run(context)
    first, second, other = (content(context.output) for context in contexts)
    assert first == second
    assert first["adapter_model.safetensors"] != other["adapter_model.safetensors"]


def test_divergence_stops_at_once(make_context: MakeContext) -> None:
    context = make_context("full", lr=1e30, max_grad_norm=1e30)
    with pytest.raises(Diverged, match=r"diverged at step 2: the loss is nan.*Lower lr"):
        run(context)
    assert list(progress(context).steps) == [1]
    assert not list(context.output.iterdir())
