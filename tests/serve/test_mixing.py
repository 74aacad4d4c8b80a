"""Stacked adapters: the logits of each row are those of its adapter alone, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config.schema import LoraSettings
from posttrain.model.loading import load_model, new_adapter
from posttrain.serve import mixing
from posttrain.serve.lane import BASE
from posttrain.serve.mixing import mix
from tests.support.tiny import base_source, nudge, write_base

NAMES = ("default", "second", "third", "fourth")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    base = base_source(write_base(tmp_path_factory.mktemp("base")))
    made = new_adapter(load_model(base, "float32"), LoraSettings(r=4, alpha=8), seed=0)
    for name in NAMES[1:]:
        made.add_adapter(name, made.peft_config["default"])
    for seed, name in enumerate(NAMES):
        made.set_adapter(name)
        nudge(made, seed)
    return mix(made.double().eval())


@pytest.mark.parametrize("rows", [NAMES, (*NAMES, BASE), (BASE, "third", "default", "third", "second", BASE)])
def test_each_row_is_its_adapter_alone(model: Any, rows: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    stacked = []
    right = mixing._is_uniform
    monkeypatch.setattr(mixing, "_is_uniform", lambda *given: stacked.append(right(*given)) or stacked[-1])
    ids = torch.randint(4, 100, (len(rows), 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(input_ids=ids, adapter_names=list(rows)).logits
        assert stacked
        assert all(stacked)
        for place, name in enumerate(rows):
            if name == BASE:
                with model.disable_adapter():
                    alone = model(input_ids=ids[place : place + 1]).logits[0]
            else:
                model.set_adapter(name)
                alone = model(input_ids=ids[place : place + 1]).logits[0]
            torch.testing.assert_close(found[place], alone, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_stacked_is_left_to_peft(tmp_path: Path, model: Any) -> None:
    layer = next(each for each in model.modules() if "_mixed_batch_forward" in vars(each))
    assert mixing._is_uniform(layer, set(NAMES))
    layer.lora_A["fourth"] = torch.nn.Linear(layer.in_features, 3, bias=False)
    assert not mixing._is_uniform(layer, set(NAMES))
