"""Weights of published models by their configurations alone, against models that transformers builds without memory."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
import yaml
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from posttrain.config.paths import shipped
from posttrain.cost.architecture import find_architecture
from posttrain.cost.shapes import FAMILIES, config_shapes

PUBLISHED: dict[str, dict[str, Any]] = yaml.safe_load((shipped("conf") / "architectures.yaml").read_text())
SMALLEST = {
    family: min(
        (config for config in PUBLISHED.values() if config["model_type"] == family),
        key=lambda config: int(config["num_hidden_layers"]),
        default=None,
    )
    for family in FAMILIES
}
WEIGHTS = {
    "meta-llama/Llama-3.1-8B": 8.03e9,
    "meta-llama/Llama-3.1-70B": 70.6e9,
    "meta-llama/Llama-3.2-1B": 1.24e9,
    "meta-llama/Llama-3.2-3B": 3.21e9,
    "meta-llama/Llama-2-13b-hf": 13.0e9,
    "huggyllama/llama-65b": 65.3e9,
    "Qwen/Qwen3-8B": 8.19e9,
    "Qwen/Qwen3-30B-A3B": 30.5e9,
    "google/gemma-3-1b-it": 1.0e9,
    "mistralai/Mistral-Small-24B-Instruct-2501": 23.6e9,
    "microsoft/phi-4": 14.7e9,
    "HuggingFaceTB/SmolLM3-3B": 3.08e9,
    "openai/gpt-oss-20b": 20.9e9,
    "allenai/OLMo-2-0425-1B": 1.48e9,
    "allenai/OLMo-2-1124-7B": 7.30e9,
}
"""Weights by the models' cards."""


def built(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of the model that transformers builds of a configuration."""
    settings = {key: value for key, value in config.items() if key != "sliding_every"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[settings.pop("model_type")](**settings, pad_token_id=0))
    return {name: tuple(each.shape) for name, each in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_has_the_predicted_name_and_shape(family: str) -> None:
    config = SMALLEST[family] or {
        "model_type": family, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    assert config_shapes({**config, "num_hidden_layers": 3}) == built({**config, "num_hidden_layers": 3})


def test_what_a_configuration_leaves_out_is_the_default_of_its_architecture() -> None:
    bare = {"model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = {**bare, "vocab_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert config_shapes(config) == built(config)
    dense = {**SMALLEST["qwen3_moe"], "num_hidden_layers": 2, "mlp_only_layers": [0]}  # type: ignore[dict-item]
    assert config_shapes(dense) == built(dense)


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_weights_of_a_published_model_are_those_of_its_card(name: str) -> None:
    assert sum(map(prod, (config_shapes(PUBLISHED[name]) or {}).values())) == pytest.approx(WEIGHTS[name], rel=0.005)
    found = find_architecture(name)
    assert found is not None
    assert found.total == pytest.approx(WEIGHTS[name], rel=0.005)


def test_a_token_passes_few_experts_and_slides_in_some_layers() -> None:
    sparse, gemma = find_architecture("Qwen/Qwen3-30B-A3B"), find_architecture("google/gemma-3-1b-it")
    assert sparse is not None
    assert gemma is not None
    assert sparse.active + sparse.ends / 2 == pytest.approx(3.3e9, rel=0.1)
    assert (gemma.windows.count(None), gemma.windows.count(512)) == (4, 22)


def test_unknown_architectures_and_sizes_that_are_missing_have_no_shapes() -> None:
    assert config_shapes({"model_type": "novel", "hidden_size": 8}) is None
    assert config_shapes({"model_type": "llama", "hidden_size": 8}) is None
    assert find_architecture("owner/unknown") is None
