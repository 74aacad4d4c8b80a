"""What a step is computed in: the format of the weights, unless the machine computes a better one faster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Recorder, base_source, packed_rows, sft_config, write_base

from posttrain.config.schema import Dtype, Method
from posttrain.model.loading import load_model, load_trainable, new_adapter
from posttrain.sft.loop import Training
from posttrain.sft.precision import compute_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("asked", "stored", "device", "tiles", "expected"),
    [
        (None, "bfloat16", CPU, False, "float32"),
        (None, "bfloat16", CPU, True, "bfloat16"),
        (None, "bfloat16", GPU, False, "bfloat16"),
        (None, "float32", CPU, True, "float32"),
        (Dtype.bfloat16, "bfloat16", CPU, False, "bfloat16"),
        (Dtype.float32, "bfloat16", GPU, True, "float32"),
    ],
)
def test_the_processor_decides_unless_the_recipe_does(
    asked: Dtype | None,
    stored: str,
    device: torch.device,
    tiles: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": tiles})
    assert compute_dtype(sft_config(compute_dtype=asked), stored, device) == expected


def trained(folder: Path, method: Method, asked: Dtype, progress: Recorder) -> dict[str, torch.Tensor]:
    """What two steps make of a model whose weights are stored in bfloat16."""
    source = base_source(write_base(folder / "base"))
    config = sft_config(compute_dtype=asked, method=method, max_steps=2)
    if method is Method.full:
        model: Any = load_trainable(source, "bfloat16")
    else:
        model = new_adapter(load_model(source, "bfloat16"), config.lora, seed=0)
    Training(
        model=model, rows=packed_rows([2, 2, 2, 2]), config=config, seed=0, dtype="bfloat16", progress=progress,
        stop_requested=lambda: False, checkpoints=folder / "checkpoints",
    ).run()  # fmt: skip
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
