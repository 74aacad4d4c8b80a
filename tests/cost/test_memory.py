"""Memory and disk of a training, predicted from files alone, against tiny models that are trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config.schema import LoraSettings, Method
from posttrain.cost.architecture import read_architecture
from posttrain.cost.engines import choose_engine
from posttrain.cost.memory import Training, checkpoint_bytes, trained_weights, training_memory
from posttrain.engine.attention import causal_model, install, packed_hidden
from posttrain.engine.checkpoint import STATE
from posttrain.model.loading import load_model, load_trainable, new_adapter
from tests.support.architectures import tiny_model
from tests.support.tiny import base_source, packed_rows, tiny_tokenizer, write_base
from tests.support.training import training

GB = 10**9
LENGTHS = [40, 24]


def sizes(method: Method, **settings: Any) -> Training:
    values = {"rank": 4, "tokens": sum(LENGTHS), "checkpointing": False, "loss_chunk": 16, "compute_bytes": 4}
    return Training(**{"method": method, **values, **settings})


def policy(folder: Path, method: Method, **lora: Any) -> Any:
    source = base_source(folder)
    if method is Method.full:
        return load_trainable(source, "float32")
    return new_adapter(load_model(source, "float32"), LoraSettings(r=4, alpha=8, **lora), seed=0)


@pytest.mark.parametrize(
    "lora", [{}, {"dora": True}, {"target_modules": ["q_proj", "down_proj"]}], ids=["lora", "dora", "two modules"]
)
def test_the_adapter_has_the_predicted_weights(lora: dict[str, Any], tmp_path: Path) -> None:
    model = policy(write_base(tmp_path / "base"), Method.lora, **lora)
    architecture = read_architecture(tmp_path / "base")
    assert architecture is not None
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    asked = {"targets": lora.get("target_modules", "all-linear"), "dora": lora.get("dora", False)}
    assert trained_weights(architecture, sizes(Method.lora, **asked)) == trained


@pytest.mark.parametrize("name", ["gpt2", "bloom", "falcon", "mixtral", "gpt_oss", "qwen3_moe"])
def test_sizes_are_read_from_the_files_of_many_architectures(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    found = read_architecture(tmp_path / "base")
    assert found is not None
    config: Any = model.config
    assert found.vocabulary == model.get_input_embeddings().weight.shape[0]
    assert (found.width, found.layers) == (config.hidden_size, config.num_hidden_layers)
    assert found.total == sum(each.numel() for each in model.parameters())


def test_a_configuration_that_tells_no_sizes_gives_none(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    assert read_architecture(tmp_path / "base") is None


@pytest.mark.parametrize("method", [Method.lora, Method.full])
def test_a_checkpoint_takes_the_predicted_disk(method: Method, tmp_path: Path) -> None:
    model = policy(write_base(tmp_path / "base"), method)
    architecture = read_architecture(tmp_path / "base")
    assert architecture is not None
    run = training(model, tmp_path / "checkpoints", packed_rows([2, 2, 2, 2]), max_steps=2, method=method)
    run.run()
    tensors = [file.stat().st_size for file in (tmp_path / "checkpoints").rglob(STATE)]
    predicted = checkpoint_bytes(architecture, sizes(method))
    # beside the weights: a header, the step counters and the state of the random generator
    assert predicted <= tensors[0] <= predicted + 40_000


@pytest.mark.parametrize("method", [Method.lora, Method.full])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_that_autograd_keeps(method: Method, checkpointing: bool, tmp_path: Path) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8}
    model = policy(write_base(tmp_path / "base", **wide), method)
    architecture = read_architecture(tmp_path / "base")
    assert architecture is not None
    install(model)
    model.train()
    causal = causal_model(model)
    if checkpointing:
        causal.activation_checkpointing_enable()
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids_BT = torch.randint(100, (1, sum(LENGTHS)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_TD = packed_hidden(causal, ids_BT, LENGTHS)
    assert hidden_TD.requires_grad
    asked = sizes(method, checkpointing=checkpointing)
    predicted = training_memory(architecture, asked, "single").activations
    measured = sum(kept.values())
    if checkpointing:  # the prediction has one layer's more: what is computed again
        assert measured < predicted < measured + training_memory(architecture, sizes(method), "single").activations / 4
    else:
        assert 0.75 * measured < predicted < 1.35 * measured


@pytest.mark.parametrize("method", [Method.lora, Method.qlora, Method.full])
def test_what_is_shared_out_takes_less_on_each_device(method: Method, tmp_path: Path) -> None:
    write_base(tmp_path / "base", num_hidden_layers=16)
    model = read_architecture(tmp_path / "base")
    assert model is not None
    asked = sizes(method, compute_bytes=2)
    single = training_memory(model, asked, "single")
    assert training_memory(model, asked, "ddp", 4).weights == single.weights
    two, four = (training_memory(model, asked, "fsdp", processes) for processes in (2, 4))
    assert four.weights < two.weights < single.weights
    assert four.moments == pytest.approx(single.moments / 4, rel=0.01)
    assert (four.gradients < single.gradients) == (method is Method.full)
    assert four.activations == single.activations
    zero = training_memory(model, asked, "deepspeed", 4)  # sums every gradient at once, and gathers no layer ahead
    assert (zero.weights, zero.moments) == (four.weights, four.moments)
    assert zero.gradients == pytest.approx(single.gradients / 4, rel=0.01)


def test_a_model_in_four_bits_has_to_fit_whole_before_it_is_sliced(tmp_path: Path) -> None:
    write_base(tmp_path / "base", num_hidden_layers=64, hidden_size=512, intermediate_size=2048)
    model = read_architecture(tmp_path / "base")
    assert model is not None
    asked, bfloat16 = (sizes(method, compute_bytes=2, checkpointing=True) for method in (Method.qlora, Method.lora))
    single = training_memory(model, asked, "single")
    whole = single.weights - 4 * trained_weights(model, asked)
    assert single.loading == training_memory(model, asked, "ddp", 64).loading == 0
    for engine in ("fsdp", "deepspeed"):
        sliced = training_memory(model, asked, engine, 64)
        assert sliced.total - sliced.loading < whole / 2
        assert sliced.total == whole
        assert training_memory(model, bfloat16, engine, 64).loading == 0


def test_a_policy_in_slices_has_to_fit_whole_beside_them_while_it_writes(tmp_path: Path) -> None:
    write_base(tmp_path / "base", num_hidden_layers=64, hidden_size=512, intermediate_size=2048)
    model = read_architecture(tmp_path / "base")
    assert model is not None
    for method in (Method.lora, Method.full):
        asked = sizes(method, compute_bytes=2, checkpointing=True, tokens=1)
        writes = replace(asked, sampled=True)
        single = training_memory(model, writes, "single")
        assert single.writing == training_memory(model, writes, "ddp", 64).writing == 0
        whole = single.weights - (2 * model.total if method is Method.full else 0)  # autocast's copies are for training
        for engine in ("fsdp", "deepspeed"):
            found, silent = (training_memory(model, each, engine, 64) for each in (writes, asked))
            assert silent.writing == 0 < found.writing
            assert silent.total < found.total == pytest.approx(whole + found.weights + found.moments, abs=64)


def test_four_bits_and_an_adapter_take_less_than_sixteen_and_all_weights(tmp_path: Path) -> None:
    write_base(tmp_path / "base", hidden_size=64)
    model = read_architecture(tmp_path / "base")
    assert model is not None
    qlora, lora, full = (
        training_memory(model, sizes(method, compute_bytes=2), "single").total
        for method in (Method.qlora, Method.lora, Method.full)
    )
    assert qlora < lora < full


@pytest.mark.parametrize(
    ("setting", "processes", "need", "device", "engine", "reason"),
    [
        ("auto", 1, 100 * GB, 80 * GB, "single", "there is one device"),
        ("auto", 2, 40 * GB, 80 * GB, "ddp", "everything fits on each device: 40.0 GB of 80.0 GB"),
        ("auto", 8, 128 * GB, 80 * GB, "fsdp", "with everything on each device it takes 128 GB of 80.0 GB"),
        ("auto", 2, 79 * GB, 80 * GB, "fsdp", "with everything on each device it takes 79.0 GB of 80.0 GB"),
        ("auto", 2, None, 80 * GB, "fsdp", "it is not known what fits on a device"),
        ("fsdp", 2, 1 * GB, 80 * GB, "fsdp", "as set"),
    ],
)
def test_the_first_engine_that_fits_is_taken_and_the_reason_said(
    setting: str, processes: int, need: int | None, device: int, engine: str, reason: str
) -> None:
    assert choose_engine(setting, processes, need, device) == (engine, reason)
