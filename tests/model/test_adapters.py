"""Adapters and full weights: made, saved, read back, and rejected when they are not sound."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from posttrain.artifact import ModelSource
from posttrain.config.schema import LoraSettings
from posttrain.engine.precision import computing_in
from posttrain.errors import ArtifactDamaged, BadInput
from posttrain.model.checks import check_output
from posttrain.model.loading import WIDENED, load_model, load_trainable, new_adapter
from posttrain.model.saving import save_model
from tests.support.tiny import TEMPLATE, base_source, nudge, write_base

IDS = torch.arange(4, 30)[None]
LORA = LoraSettings(r=4, alpha=8)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return base_source(write_base(tmp_path_factory.mktemp("models") / "base", tie_word_embeddings=True))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "output").mkdir()
    return tmp_path / "output"


def save_adapter(base: ModelSource, output: Path, seed: int = 0, dtype: str = "float32") -> Any:
    model = new_adapter(load_model(base, dtype), LORA, seed=seed)
    nudge(model)
    save_model(model, base, output, dtype)
    return model


def adapted(base: ModelSource, folder: Path) -> ModelSource:
    return replace(base, name="sft", adapter=folder, tokenizer=folder)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_new_adapter_changes_nothing_and_follows_the_seed(base: ModelSource) -> None:
    plain = load_model(base, "float32")
    expected = logits(plain)
    first, second, other = (new_adapter(load_model(base, "float32"), LORA, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(logits(first), expected)
    weights = [
        torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]) for model in (first, second, other)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_making_an_adapter_leaves_the_callers_random_numbers_alone(base: ModelSource) -> None:
    model = load_model(base, "float32")
    before = torch.get_rng_state()
    new_adapter(model, LORA, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_adapter_weights_are_float32_on_a_bfloat16_base(base: ModelSource, output: Path) -> None:
    model = save_adapter(base, output, dtype="bfloat16")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    again = load_trainable(adapted(base, output), "bfloat16")
    assert {(p.dtype, p.requires_grad) for p in again.parameters()} == {(torch.bfloat16, False), (torch.float32, True)}
    assert {tensor.dtype for tensor in load_file(output / "adapter_model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["layers.0.mlp.up_proj"]])
def test_listed_targets_carry_the_adapter(base: ModelSource, targets: list[str]) -> None:
    model = new_adapter(load_model(base, "float32"), replace(LORA, target_modules=targets), seed=0)
    carriers = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert carriers
    assert all(any(carrier.endswith(target) for target in targets) for carrier in carriers)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "vproj"], "Did you mean v_proj"),
        (["lm_head"], "output projection"),
        (["embed_tokens"], "no linear layer of the model is called embed_tokens"),
        (["proj"], "no linear layer of the model is called proj"),
    ],
)
def test_targets_that_cannot_carry_an_adapter_are_rejected(base: ModelSource, targets: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        new_adapter(load_model(base, "float32"), replace(LORA, target_modules=targets), seed=0)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_saved_adapter_computes_the_same(base: ModelSource, output: Path, rslora: bool) -> None:
    model = new_adapter(load_model(base, "float32"), replace(LORA, rslora=rslora), seed=0)
    nudge(model)
    expected = logits(model)
    save_model(model, base, output, "float32")
    source = adapted(base, output)
    assert torch.equal(logits(load_model(source, "float32")), expected)
    assert torch.equal(logits(load_trainable(source, "float32")), expected)
    assert not torch.equal(logits(load_model(base, "float32")), expected)


def test_a_saved_adapter_holds_no_more_than_it_must(base: ModelSource, output: Path) -> None:
    model = save_adapter(base, output)
    model.add_adapter("ref", model.peft_config["default"])
    save_model(model, base, output, "float32")
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert set(contents(output)) == {"adapter_model.safetensors", "adapter_config.json"} | tokenizer
    assert not [name for name in load_file(output / "adapter_model.safetensors") if "ref" in name]


def test_an_adapters_configuration_is_ordered_and_names_the_base(base: ModelSource, output: Path) -> None:
    save_adapter(replace(base, base="acme/tiny"), output)
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == set(PROJECTIONS)
    assert config["base_model_name_or_path"] == "acme/tiny"
    assert config["inference_mode"] is True


def test_equal_adapters_have_equal_bytes(base: ModelSource, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_adapter(base, tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_full_weights_compute_the_same(base: ModelSource, tmp_path: Path, dtype: str) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        model = load_trainable(base, dtype)
        nudge(model)
        save_model(model, base, tmp_path / name, dtype)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    saved = load_model(replace(base, model=tmp_path / "one"), dtype)
    assert torch.equal(logits(saved), logits(model))
    assert {p.dtype for p in saved.parameters()} == {getattr(torch, dtype)}
    assert saved.lm_head.weight is saved.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "one" / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
def test_widened_weights_compute_what_the_training_computes(base: ModelSource, tmp_path: Path, tied: bool) -> None:
    if not tied:
        base = base_source(write_base(tmp_path / "untied", tie_word_embeddings=False))
    (tmp_path / "adapter").mkdir()
    save_adapter(base, tmp_path / "adapter")
    source = replace(base, adapter=tmp_path / "adapter")
    trained, widened = load_model(source, "bfloat16"), load_model(source, WIDENED)
    assert {each.dtype for each in widened.parameters()} == {torch.float32}
    assert (widened.get_output_embeddings().weight is widened.get_input_embeddings().weight) == tied
    with computing_in(trained, "float32"):
        assert torch.equal(logits(widened), logits(trained))
    assert not torch.equal(logits(widened), logits(load_model(source, "float32"))), "the weights were not rounded"


def test_full_weights_keep_the_parents_generation_settings(base: ModelSource, output: Path, tmp_path: Path) -> None:
    settings = '{"temperature": 0.6, "do_sample": false, "eos_token_id": [3]}'  # contradictory, as some models' are
    shutil.copytree(base.model, tmp_path / "own")
    (tmp_path / "own" / "generation_config.json").write_text(settings)
    source = base_source(tmp_path / "own")
    save_model(load_trainable(source, "float32"), source, output, "float32")
    assert (output / "generation_config.json").read_text() == settings


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("settings", "ends"),
    [({"eos_token_id": [3, 9]}, [3, 9, 0]), ({"eos_token_id": 3}, [3, 0]), ({"top_k": 5}, 0), (None, [3, 0])],
)
def test_whoever_serves_the_result_stops_where_its_answers_end(
    base: ModelSource, output: Path, tmp_path: Path, full: bool, settings: dict[str, Any] | None, ends: Any
) -> None:
    shutil.copytree(base.model, tmp_path / "own")
    generation = tmp_path / "own" / "generation_config.json"
    generation.unlink()
    if settings is not None:
        generation.write_text(json.dumps(settings))
    source = replace(base_source(tmp_path / "own"), chat_template=TEMPLATE.replace("<|end|>", "<|system|>"))
    model = load_model(source, "float32")
    save_model(model if full else new_adapter(model, LoraSettings(r=4), seed=0), source, output, "float32")
    found = json.loads((output / "generation_config.json").read_text())
    assert {**found, **(settings or {}), "eos_token_id": ends} == found
    assert AutoTokenizer.from_pretrained(output).convert_ids_to_tokens(0) == "<|system|>"


def test_the_tokenizer_and_its_pinned_template_travel_along(base: ModelSource, output: Path) -> None:
    source = replace(base, chat_template=TEMPLATE + "{# pinned #}")
    save_model(load_trainable(source, "float32"), source, output, "float32")
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == source.chat_template
    assert (
        tokenizer("<|user|>Hi")["input_ids"] == AutoTokenizer.from_pretrained(base.tokenizer)("<|user|>Hi")["input_ids"]
    )


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = next(folder.glob("*model.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def first(tensors: dict[str, torch.Tensor], half: str) -> str:
    return next(name for name in sorted(tensors) if half in name)


def zero(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


def rerank(tensors: dict[str, torch.Tensor]) -> None:
    module = first(tensors, "lora_A").removesuffix(".lora_A.weight")
    tensors[f"{module}.lora_A.weight"] = torch.ones(2, 32)
    tensors[f"{module}.lora_B.weight"] = torch.ones(tensors[f"{module}.lora_B.weight"].shape[0], 2)


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors, "lora_A")] = torch.ones(5, 32)


def drop(tensors: dict[str, torch.Tensor], part: str) -> None:
    for name in [name for name in tensors if part in name]:
        del tensors[name]


SABOTAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "NaN": (lambda tensors: tensors[first(tensors, "lora_A")][0].fill_(float("nan")), "holds NaN or infinity"),
    "infinity": (lambda tensors: tensors[first(tensors, "lora_B")][0].fill_(float("inf")), "holds NaN or infinity"),
    "zero B": (zero, "every lora_B times lora_A is zero"),
    "missing half": (lambda tensors: tensors.pop(first(tensors, "lora_B")), "holds only lora_A"),
    "missing module": (lambda tensors: drop(tensors, "gate_proj"), r"no weights for its target module \S+gate_proj"),
    "other rank": (rerank, "has rank 2, adapter_config.json says 4"),
    "unequal ranks": (widen, "have ranks 5 and 4"),
    "no LoRA keys": (lambda tensors: (tensors.clear(), tensors.update(x=torch.ones(1))), "no lora_A and lora_B"),
    "empty": (lambda tensors: tensors.clear(), "its safetensors file is empty"),
}


@pytest.mark.parametrize("case", SABOTAGE)
def test_a_damaged_adapter_is_not_published(base: ModelSource, output: Path, case: str) -> None:
    save_adapter(base, output)
    check_output(output, base)
    damage, message = SABOTAGE[case]
    edit(output, damage)
    with pytest.raises(ArtifactDamaged, match=message):
        check_output(output, base)


def test_a_truncated_or_missing_file_is_not_published(base: ModelSource, output: Path) -> None:
    save_adapter(base, output)
    weights = output / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(ArtifactDamaged, match="cannot be read"):
        check_output(output, base)
    weights.unlink()
    with pytest.raises(ArtifactDamaged, match="holds no weights"):
        check_output(output, base)


@pytest.mark.parametrize("content", ['{"r": ', "[]", '{"peft_type": "LORA"}'])
def test_an_adapter_without_a_sound_configuration_is_not_published(
    base: ModelSource, output: Path, content: str
) -> None:
    save_adapter(base, output)
    (output / "adapter_config.json").write_text(content)
    with pytest.raises(ArtifactDamaged, match=r"adapter_config\.json describes no LoRA adapter"):
        check_output(output, base)


def test_an_adapter_that_equals_its_parent_is_not_published(base: ModelSource, output: Path, tmp_path: Path) -> None:
    save_adapter(base, output)
    source = adapted(base, output)
    (tmp_path / "next").mkdir()
    model = load_trainable(source, "float32")
    save_model(model, source, tmp_path / "next", "float32")
    with pytest.raises(ArtifactDamaged, match="training changed nothing: every weight equals sft's"):
        check_output(tmp_path / "next", source)
    nudge(model)
    save_model(model, source, tmp_path / "next", "float32")
    check_output(tmp_path / "next", source)
    edit(tmp_path / "next", lambda tensors: tensors.update(extra=torch.ones(1)))
    with pytest.raises(ArtifactDamaged, match="is not in both"):
        check_output(tmp_path / "next", source)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_weights_are_published_only_when_sound_and_changed(base: ModelSource, output: Path, dtype: str) -> None:
    save_model(load_trainable(base, dtype), base, output, dtype)
    with pytest.raises(ArtifactDamaged, match="training changed nothing"):
        check_output(output, base)
    model = load_trainable(base, dtype)
    nudge(model)
    save_model(model, base, output, dtype)
    check_output(output, base)
    shutil.copytree(output, output.with_name("other"))
    edit(output, lambda tensors: tensors["model.norm.weight"][:1].fill_(float("nan")))
    with pytest.raises(ArtifactDamaged, match=r"weight model\.norm\.weight holds NaN"):
        check_output(output, base)
    edit(output.with_name("other"), lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(ArtifactDamaged, match=r"has shape \(31,\), its parent's \(32,\)"):
        check_output(output.with_name("other"), base)
