"""What a step is computed in: the format of the weights, unless the machine computes a better one faster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config.schema import Dtype, Method
from posttrain.engine.arithmetic import choose_arithmetic
from posttrain.engine.checkpoint import Position
from posttrain.engine.fused import is_fused
from posttrain.engine.loop import Training
from posttrain.engine.precision import computing_in
from posttrain.model.loading import load_model, load_trainable, new_adapter
from posttrain.model.quantisation import NF4
from posttrain.sft.examples import make_evaluation
from tests.support.tiny import Recorder, base_source, packed_rows, sft_config, write_base


def run(model: Any, folder: Path, asked: Dtype, progress: Recorder, **settings: Any) -> Position:
    """Two steps on weights stored in bfloat16."""
    config = sft_config(compute_dtype=asked, max_steps=2, **settings)
    return Training(
        model=model,
        rows=packed_rows([2, 2, 2, 2]),
        config=config,
        evaluation=make_evaluation([], config),
        seed=0,
        dtype="bfloat16",
        progress=progress,
        stop_requested=lambda: False,
        checkpoints=folder / "checkpoints",
    ).run()


def trained(folder: Path, method: Method, asked: Dtype, progress: Recorder) -> dict[str, torch.Tensor]:
    """What two steps make of a model whose weights are stored in bfloat16."""
    source = base_source(write_base(folder / "base"))
    if method is Method.full:
        model: Any = load_trainable(source, "bfloat16")
    else:
        model = new_adapter(load_model(source, "bfloat16"), sft_config().lora, seed=0)
    run(model, folder, asked, progress, method=method)
    return {name: p.detach().double() for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", [Method.lora, Method.full])
def test_float32_arithmetic_trains_on_the_stored_weights(method: Method, tmp_path: Path) -> None:
    progress = Recorder()
    exact = trained(tmp_path / "float32", method, Dtype.float32, progress)
    rounded = trained(tmp_path / "bfloat16", method, Dtype.bfloat16, Recorder())
    assert "arithmetic: float32 on weights stored as bfloat16" in progress.notes
    for name, parameter in exact.items():
        if "lora" not in name and method is Method.lora:
            assert torch.equal(parameter, rounded[name]), "frozen weights are the stored ones"
    moved = [name for name in exact if not torch.equal(exact[name], rounded[name])]
    assert moved, "the two formats round differently"


def test_after_training_the_model_is_as_anyone_loads_it(tmp_path: Path) -> None:
    source = base_source(write_base(tmp_path / "base"))
    before = load_model(source, "bfloat16").state_dict()
    model = new_adapter(load_model(source, "bfloat16"), sft_config().lora, seed=0)
    assert run(model, tmp_path, Dtype.float32, Recorder()).step == 2
    after = {name.replace(".base_layer", ""): part for name, part in model.get_base_model().state_dict().items()}
    assert all(torch.equal(after[name], part) and after[name].dtype == part.dtype for name, part in before.items())
    assert not [module for module in model.modules() if is_fused(module)]


def test_quantised_weights_keep_their_format(tmp_path: Path) -> None:
    source = replace(base_source(write_base(tmp_path / "base", hidden_size=64)), quantization=NF4)
    model = load_model(source, "bfloat16")
    kinds = [parameter.dtype for parameter in model.parameters()]
    config = sft_config(compute_dtype=Dtype.float32)
    assert choose_arithmetic(config, "bfloat16", model, tmp_path / "rates.json").dtype == "bfloat16"
    with computing_in(model, "float32"):
        assert [parameter.dtype for parameter in model.parameters()] == kinds
