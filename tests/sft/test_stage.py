"""Supervised fine-tuning as a stage: from records to a model that can be published."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.artifact import ModelSource
from posttrain.config.schema import Method
from posttrain.engine.config import TrainOn
from posttrain.errors import ArtifactDamaged, BadInput
from posttrain.model.checks import check_output
from posttrain.model.merging import merge
from posttrain.model.reloading import check_reloaded
from posttrain.sft.plugin import register_stages
from posttrain.sft.stage import run
from tests.support.architectures import tiny_model
from tests.support.sft import context, conversations
from tests.support.tiny import base_source, published, tiny_llama, tiny_tokenizer, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return base_source(write_base(tmp_path_factory.mktemp("models") / "base"))


@pytest.mark.parametrize("method", list(Method))
def test_the_stage_leaves_a_model_that_learned(base: ModelSource, tmp_path: Path, method: Method) -> None:
    stage = context(base, tmp_path, method=method, epochs=6, sequence_length=96)
    run(stage)
    check_output(stage.output, base)
    assert not [path.name for path in stage.output.glob("*.json") if "posttrain_packed" in path.read_text()]
    metrics = stage.metrics
    assert (metrics["records"], metrics["untrained"], metrics["truncated"], metrics["steps"]) == (12, 0, 0, 12)
    assert metrics["tokens"] == 6 * metrics["epoch_tokens"]
    assert metrics["trained_tokens"] == 6 * metrics["epoch_trained_tokens"]
    assert metrics["final_loss"] < stage.progress.steps[1]["loss"]


def test_the_stage_repeats_itself_byte_for_byte(base: ModelSource, tmp_path: Path) -> None:
    stages = [context(base, tmp_path / name) for name in ("one", "two")]
    for stage in stages:
        run(stage)
    first, second = ({path.name: path.read_bytes() for path in stage.output.iterdir()} for stage in stages)
    assert first == second
    assert stages[0].metrics == stages[1].metrics


def test_the_stage_trains_a_parents_adapter_on(base: ModelSource, tmp_path: Path) -> None:
    first = context(base, tmp_path / "first")
    run(first)
    parent = replace(base, name="sft", adapter=first.output, tokenizer=first.output)
    second = context(parent, tmp_path / "second")
    run(second)
    check_output(second.output, parent)
    with pytest.raises(BadInput, match=r"sft\.method: full fine-tuning cannot start from an adapter"):
        run(context(parent, tmp_path / "third", method=Method.full))


def test_a_rate_of_zero_is_caught_before_publishing(base: ModelSource, tmp_path: Path) -> None:
    stage = context(base, tmp_path, lr=0.0)
    run(stage)
    with pytest.raises(ArtifactDamaged, match="was the learning rate 0"):
        check_output(stage.output, base)


def test_records_without_a_trained_token_are_refused_before_training(base: ModelSource, tmp_path: Path) -> None:
    stage = context(base, tmp_path, sequence_length=4)
    with pytest.raises(BadInput, match="no trained token"):
        run(stage)
    assert stage.progress.started == (0, 0)


def test_the_last_turn_alone_or_each_in_a_row_can_be_trained(base: ModelSource, tmp_path: Path) -> None:
    talks = [replace(record, messages=record.messages * 2) for record in conversations(2)]
    mute = replace(talks[0], messages=(*talks[0].messages[:3], {**talks[0].messages[3], "train": False}))
    trained = {}
    for train_on in TrainOn:
        stage = context(base, tmp_path / train_on.value, train_on=train_on, records=[*talks, mute], max_steps=1)
        run(stage)
        trained[train_on] = (stage.metrics["epoch_trained_tokens"], stage.metrics["untrained"])
    answers = trained[TrainOn.last][0]
    every = (2 * answers + answers // 2, 0)
    assert trained == {TrainOn.last: (answers, 1), TrainOn.all: every, TrainOn.each: every}


def test_tokens_that_the_model_does_not_know_are_rejected(base: ModelSource, tmp_path: Path) -> None:
    shutil.copytree(base.model, tmp_path / "small")
    tiny_llama(vocab_size=50).save_pretrained(tmp_path / "small")
    with pytest.raises(BadInput, match="has only 50 embeddings"):
        run(context(base_source(tmp_path / "small"), tmp_path / "run"))


def test_the_stage_is_registered_with_its_config_and_entry() -> None:
    (stage,) = register_stages()
    module, _, function = stage.run.partition(":")
    assert (stage.name, stage.parent, stage.records) == ("sft", "base", "documents")
    assert getattr(sys.modules[module], function) is run


def write_architecture(folder: Path, name: str) -> ModelSource:
    """Write a model of the architecture ``name``, with our tokenizer."""
    tiny_model(name).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return base_source(folder)


@pytest.mark.parametrize(
    ("name", "packing"), [("gpt_oss", True), ("qwen2_moe", True), ("gpt2", True), ("falcon_alibi", False)]
)
def test_an_adapter_on_every_kind_of_layer_is_saved_reloaded_and_merged(
    tmp_path: Path, name: str, packing: bool
) -> None:
    base = write_architecture(tmp_path / "base", name)
    stage = context(base, tmp_path, method=Method.lora, packing=packing, gradient_checkpointing=True)
    run(stage)
    reach = {each["kind"]: each for each in stage.metrics["reach"]}
    assert reach["linear layers"]["trained_weights"] == reach["linear layers"]["weights"] > 0
    assert "without_gradient" not in stage.metrics
    check_output(stage.output, base)
    check_reloaded(stage.output, base, "float32")
    artifact = published(stage.output, base, tmp_path / "artifact")
    assert merge(artifact, base, tmp_path / "merged").distances.published < 1e-5


def test_an_adapter_past_which_the_model_reads_is_named(tmp_path: Path) -> None:
    stage = context(write_architecture(tmp_path / "base", "mamba"), tmp_path, method=Method.lora, packing=False)
    run(stage)
    assert stage.metrics["without_gradient"] > 0
    (idle,) = [line for line in stage.metrics["warnings"] if "never got a gradient" in line]
    assert "mixer.dt_proj.lora_A" in idle
    (left,) = [line for line in stage.metrics["warnings"] if "all-linear reaches" in line]
    assert "2 of 8 linear layers" in left
