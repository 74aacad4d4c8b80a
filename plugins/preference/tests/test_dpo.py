from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from posttrain_preference import dpo, register_stages
from posttrain_preference.config import DPOSettings
from posttrain_preference.pairs import TokenPairs, render_pairs
from posttrain_preference.quiet import quiet
from posttrain_preference.reference import answer_log_probs, prove_reference
from posttrain_preference.trainer import build_trainer
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from posttrain import ArtifactDamaged, BadInput, StageContext
from posttrain.artifact import ModelSource

MakeContext = Callable[..., StageContext]
KINDS = ("lora", "full")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def progress(context: StageContext) -> Any:
    return context.progress


def answer_log_probs_float64(parent: ModelSource, prompt: list[int], answer: list[int]) -> float:
    """Log-probability of an answer under the model on disk, token by token, in float64."""
    model: Any = LlamaForCausalLM.from_pretrained(parent.model, dtype=torch.float64)
    if parent.adapter is not None:
        model = PeftModel.from_pretrained(model, parent.adapter).merge_and_unload()
    total = 0.0
    for place in range(len(answer)):
        with torch.no_grad():
            logits = model.double()(torch.tensor([prompt + answer[:place]])).logits[0, -1]
        total += float(logits[answer[place]] - torch.logsumexp(logits, 0))
    return total


# --- The reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_at_ln_2_and_separates_the_answers(make_context: MakeContext, kind: str, dtype: str) -> None:
    context = make_context(kind, dtype=dtype)
    dpo.run(context)
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_sft_model_in_float64(
    make_context: MakeContext, parents: dict[str, ModelSource], kind: str
) -> None:
    context = make_context(kind)
    with quiet():
        rows = render_pairs(context).rows[:2]
        policy = context.policy()
        expected = answer_log_probs(policy, rows, autocast=False)
        trainer = build_trainer(context, TokenPairs(rows=rows), policy, dpo._reference(context, policy))
        chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, trainer.batch_of(rows))
    for index, row in enumerate(rows):
        for answer, ours, theirs in ((row.chosen, 0, chosen), (row.rejected, 1, rejected)):
            exact = answer_log_probs_float64(parents[kind], row.prompt, answer)
            assert expected[index][ours] == pytest.approx(exact, abs=1e-4)
            assert theirs[index].item() == pytest.approx(exact, abs=1e-4)


def test_the_frozen_copy_is_exact_for_every_kind_of_adapter_weight(make_context: MakeContext) -> None:
    """LoRA on embeddings is stored under other names, and adapters may be held in another number format."""
    base = make_context("full").policy()
    lora = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], use_dora=False, task_type="CAUSAL_LM")
    policy = get_peft_model(base, lora)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
            parameter.data = parameter.data.to(torch.bfloat16)
    policy.add_adapter("ref", lora)
    dpo.freeze_reference(policy)
    copied = [(name, tensor) for name, tensor in policy.named_parameters() if ".default" in name]
    assert len(copied) == 2 + 2 * 2
    for name, tensor in copied:
        frozen = policy.get_parameter(name.replace(".default", ".ref"))
        assert torch.equal(frozen, tensor)
        assert frozen.dtype == tensor.dtype
        assert not frozen.requires_grad


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
    "sabotage",
    [
        lambda policy: _erase(policy, "lora_B.ref"),  # the base model
        lambda policy: _shift(policy, "lora_B.ref", 1e-3),
        lambda policy: (_erase(policy, "lora_B.ref"), _erase(policy, "lora_B.default")),  # both the base: ln 2 holds
    ],
)
def test_a_wrong_reference_adapter_is_refused(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, sabotage: Callable[[Any], Any]
) -> None:
    context = make_context("lora")
    monkeypatch.setattr(dpo, "freeze_reference", sabotage)
    with pytest.raises(ArtifactDamaged, match=r"the reference is not the SFT model: .*pairs\.jsonl:1 "):
        dpo.run(context)
    assert not list(context.output.iterdir())
    assert not progress(context).steps


def test_a_wrong_reference_model_is_refused(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    context = make_context("full")
    honest = dpo._reference

    def other(context: StageContext, policy: Any) -> Any:
        reference = honest(context, policy)
        _erase(reference, "layers.1.mlp")
        return reference

    monkeypatch.setattr(dpo, "_reference", other)
    with pytest.raises(ArtifactDamaged, match="the reference is not the SFT model"):
        dpo.run(context)
    assert not list(context.output.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_that_left_its_reference_is_refused(make_context: MakeContext, kind: str) -> None:
    context = make_context(kind)
    with quiet():
        pairs = render_pairs(context)
        policy = context.policy()
        expected = answer_log_probs(policy, pairs.rows[:2], autocast=False)
        trainer = build_trainer(context, pairs, policy, dpo._reference(context, policy))
        prove_reference(trainer, pairs.rows[:2], expected, "float32")
        _erase(policy, "lora_B.default" if kind == "lora" else "layers.1.mlp")
        with pytest.raises(ArtifactDamaged, match=r"does not start at its reference: .* ln 2 = 0\.693147"):
            prove_reference(trainer, pairs.rows[:2], expected, "float32")


# --- What is fed to the trainer -------------------------------------------------------------------------------------


def test_the_trainer_sees_exactly_the_rendered_ids(make_context: MakeContext) -> None:
    prompt = ["what is the river", "the red heron", "what is the flag"]
    answers = ("the blue otter", "a clay town")
    context = make_context("lora", records=[(prompt, *answers)], per_device_batch_size=1)
    tokenizer = context.tokenizer()
    with quiet():
        trainer = build_trainer(context, render_pairs(context), context.policy(), None)
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
    dpo.run(context)
    assert context.metrics["pairs"] == 1
    assert context.metrics["dropped"] == 2
    assert progress(context).notes == ["dropped 2 pairs longer than 40 tokens"]


@pytest.mark.parametrize(
    ("records", "where", "what"),
    [
        (3, "dpo.sequence_length", "each of the 3 pairs is longer than 4 tokens"),
        ([], "dpo.data", "no preference pairs"),
        ([(["what is the flag"], "the red lace", "the red lace")], "pairs.jsonl:1", "the same"),
    ],
)
def test_nothing_to_train_on_is_bad_input(make_context: MakeContext, records: Any, where: str, what: str) -> None:
    with pytest.raises(BadInput) as caught:
        dpo.run(make_context(records=records, sequence_length=4))
    (problem,) = caught.value.problems
    assert problem.where == where
    assert what in problem.what


# --- The result -----------------------------------------------------------------------------------------------------


def test_the_same_adapter_goes_on(make_context: MakeContext, parents: dict[str, ModelSource]) -> None:
    context = make_context("lora")
    dpo.run(context)
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
    dpo.run(context)
    before, after = weights(parents["full"].model), weights(context.output)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((context.output / name).read_text()) == json.loads((parents["full"].model / name).read_text())


def test_the_frozen_copy_is_gone_when_the_result_is_saved(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[list[str]] = []
    monkeypatch.setattr(StageContext, "save", lambda context, model: saved.append(list(model.peft_config)))
    dpo.run(make_context("lora", max_steps=1))
    assert saved == [["default"]]


def test_metrics_tell_about_the_whole_run(make_context: MakeContext) -> None:
    context = make_context("lora", epochs=1)
    dpo.run(context)
    steps = progress(context).steps
    rendered = render_pairs(context).rows
    tokens = sum(2 * len(row.prompt) + len(row.chosen) + len(row.rejected) for row in rendered)
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
        dpo.run(context)
    first, second, other = (content(context.output) for context in contexts)
    assert first == second
    assert first["adapter_model.safetensors"] != other["adapter_model.safetensors"]


def test_nothing_is_printed(make_context: MakeContext, capfd: pytest.CaptureFixture[str]) -> None:
    for kind in KINDS:
        dpo.run(make_context(kind, folder=kind, max_steps=2, checkpoint_steps=1))
    assert capfd.readouterr() == ("", "")


def test_divergence_stops_at_once(make_context: MakeContext) -> None:
    context = make_context("full", lr=1e30, max_grad_norm=1e30)
    with pytest.raises(ArtifactDamaged, match=r"diverged at step 2: the loss is nan.*Lower lr"):
        dpo.run(context)
    assert list(progress(context).steps) == [1]
    assert not list(context.output.iterdir())


# --- Settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
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
    ],
)
def test_a_setting_out_of_range_is_named(name: str, value: float) -> None:
    settings = DPOSettings(**{"lr": 5e-6, name: value})
    assert [problem[0] for problem in settings.problems()] == [name]


def test_the_defaults_have_no_problems() -> None:
    assert list(DPOSettings(lr=5e-6).problems()) == []


def test_the_stage_is_registered() -> None:
    (stage,) = register_stages()
    module, _, function = stage.run.partition(":")
    assert (stage.name, stage.parent, stage.records) == ("dpo", "sft", "preferences")
    assert getattr(sys.modules[module], function) is dpo.run
    assert stage.config is DPOSettings


def test_listing_the_stage_imports_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'trl', 'peft', 'datasets'}"
    code = f"import sys, posttrain_preference, posttrain_preference.dpo; sys.exit(bool({heavy} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
