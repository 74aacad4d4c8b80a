"""The cache of answers that are written, predicted from a configuration, against that of tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from posttrain.config.on_policy import BLOCK
from posttrain.config.schema import Dtype, Method
from posttrain.cost.architecture import Architecture, architecture_of
from posttrain.cost.memory import DRAWN, Training, training_memory
from posttrain.cost.needs import training_of
from posttrain.host import plugins
from posttrain.testing import Project
from tests.support.architectures import tiny_model
from tests.support.asking import asking_project, asking_source
from tests.support.tiny import VOCABULARY

ROWS, TOKENS = 3, 21
ASKED = Training(
    method=Method.lora, rank=4, tokens=8, sampled=True, answers=ROWS, answer_tokens=TOKENS, checkpointing=True,
    loss_chunk=8, compute_bytes=4,
)  # fmt: skip


def deepseek() -> PreTrainedModel:
    """Return a model with multi-head latent attention."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    config = DeepseekV3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=12,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def sizes(model: PreTrainedModel) -> Architecture:
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
    found = architecture_of(model.config.to_dict(), shapes)
    assert found is not None
    return found


@torch.no_grad()
def kept_numbers(model: PreTrainedModel) -> int:
    """Return the numbers in the cache of ROWS answers of TOKENS tokens, the last of which was written by itself."""
    ids = torch.randint(4, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    cache: Any = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    cache = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).past_key_values
    found = 0
    for layer in cache.layers:
        values = vars(layer)
        # a layer without attention has its states by number
        states = [each for name in ("conv_states", "recurrent_states") for each in values.get(name, {}).values()]
        found += sum(each.numel() for each in (values.get("keys"), values.get("values"), *states) if each is not None)
    return found


@pytest.mark.parametrize(
    "name",
    ["qwen3_moe", "gpt2", "falcon", "bloom", "qwen3_next", "deepseek", "gpt_oss"],
)  # fmt: skip
def test_the_cache_has_the_predicted_numbers(name: str) -> None:
    model = deepseek() if name == "deepseek" else tiny_model(name)
    found, predicted = kept_numbers(model), ROWS * sizes(model).cache(TOKENS)
    # a window leaves room for the token that is written
    sliding = sum(window is not None for window in sizes(model).windows)
    assert predicted - found == ROWS * sizes(model).cached * sliding


def test_it_counts_where_it_is_more_than_a_training_pass_takes() -> None:
    model = sizes(tiny_model("qwen3_moe"))
    silent = training_memory(model, replace(ASKED, answers=0), "single")
    many = replace(ASKED, answers=1000)
    found, more = (training_memory(model, each, "single") for each in (many, replace(many, answers=1001)))
    assert silent.writing == 0 < found.writing
    each = 4 * model.cache(TOKENS)
    assert more.writing - found.writing == pytest.approx(each + each / model.layers + DRAWN * model.vocabulary, abs=1)
    cache = 1000 * (each + each / model.layers + DRAWN * model.vocabulary)
    assert found.total == pytest.approx(found.weights + found.moments + cache, abs=1)
    sliced = training_memory(model, many, "fsdp", 4)  # whole weights lie beside the slices
    assert sliced.total == pytest.approx(sliced.weights + sliced.moments + found.weights + cache, abs=2)
    parents = training_memory(model, replace(many, sampled=False), "single")  # nothing is ready for training by then
    assert parents.total == pytest.approx(4 * model.total + cache, abs=1)


def test_a_plan_has_the_answers_that_are_written_at_once(tmp_path: Path) -> None:
    (tmp_path / "grpo").mkdir()
    (tmp_path / "asking").mkdir()
    settings = {"per_device_batch_size": 2, "gradient_accumulation": 3, "k": 4, "sequence_length": 64, "max_tokens": 8}
    questions = [{"question": "a red", "answer": "x"}]
    project = Project(folder=tmp_path / "grpo", kind="grpo", settings=settings, records=questions).write()
    asking = asking_project(tmp_path / "asking")
    host = plugins.load()

    def written(given: Project, *words: str) -> tuple[int, int]:
        (step,) = given.plan(host, *words).steps
        found = training_of(step, Dtype.float32, ASKED, on_gpus=False)
        assert found is not None
        return found.answers, found.answer_tokens

    assert written(project) == (24, 64)
    assert written(project, "grpo.eval_share=0.5") == (BLOCK, 64)
    assert written(project, "grpo.per_device_batch_size=100") == (BLOCK, 64)
    assert written(project, "grpo.k=200") == (200, 64)
    assert written(asking, asking_source(asking, k=3))[0] == 126
    assert written(asking)[0] == 0
