"""Adapters of one batch: the logits of each row are those of its adapter alone, in float64."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from posttrain.config.schema import LoraSettings
from posttrain.model.loading import load_model, new_adapter
from posttrain.serve.mixing import BASE, Mixer, planned
from tests.support.tiny import base_source, nudge, write_base

NAMES = ("default", "second", "third", "wide")
IDS = torch.randint(4, 100, (6, 7), generator=torch.Generator().manual_seed(0))
ROWS = [
    (*NAMES, BASE, "wide"), (BASE, "third", "default", "third", "second", BASE), ("wide",) * 6, (BASE,) * 6,
    ("wide", BASE, BASE, BASE, BASE, BASE), ("second", "third", "third", "third", "third", "third"),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    """Four adapters, one of another rank at other layers."""
    made = new_adapter(load_model(base_source(base), "float32"), LoraSettings(r=4, alpha=8), seed=0)
    for name in NAMES[1:3]:
        made.add_adapter(name, made.peft_config["default"])
    made.add_adapter("wide", LoraConfig(r=8, use_rslora=True, target_modules=["q_proj", "up_proj", "lm_head"]))
    for seed, name in enumerate(NAMES):
        made.set_adapter(name)
        nudge(made, seed)
    assert Mixer.fits(made)
    return made.double().eval()


def alone(model: Any) -> dict[str, torch.Tensor]:
    """The logits of each adapter for every row, by peft."""
    found = {}
    for name in NAMES:
        model.set_adapter(name)
        found[name] = model(input_ids=IDS).logits
    with model.disable_adapter():
        found[BASE] = model(input_ids=IDS).logits
    return found


def mixed(mixer: Mixer, names: tuple[str, ...]) -> torch.Tensor:
    with mixer.routed(names, IDS) as call:
        logits: torch.Tensor = call(input_ids=IDS).logits
    return logits


@torch.no_grad()
def test_each_row_is_its_adapter_alone(model: Any) -> None:
    wanted = alone(model)
    mixer = Mixer(model)
    for names in ROWS:
        found = mixed(mixer, names)
        for place, name in enumerate(names):
            torch.testing.assert_close(found[place], wanted[name][place], rtol=1e-12, atol=1e-12)
    model.set_adapter("third")
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted["third"])  # outside of it, the model is peft's


@torch.no_grad()
@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_what_an_adapter_holds_reaches_no_other_row(model: Any, wrong: float) -> None:
    names = ("second", "third", "default", "third", BASE, "wide")
    before = mixed(Mixer(model), names)
    broken = [layer.lora_B["third"].weight for layer in model.modules() if "third" in getattr(layer, "lora_B", ())]
    kept = [weight.clone() for weight in broken]
    for weight in broken:
        weight.fill_(wrong)
    after = mixed(Mixer(model), names)
    for weight, was in zip(broken, kept, strict=True):
        weight.copy_(was)
    others = torch.tensor([name != "third" for name in names])
    assert torch.equal(after[others], before[others])
    assert not torch.isfinite(after[~others]).any()


@torch.no_grad()
def test_an_adapter_that_leaves_takes_none_of_the_others_with_it(model: Any) -> None:
    names = ("third", "wide", BASE, "default", "third", "wide")
    wanted = mixed(Mixer(model), names)
    left = copy.deepcopy(model)
    left.delete_adapter("second")
    torch.testing.assert_close(mixed(Mixer(left), names), wanted, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_inputs_without_rows_are_told_apart_or_rejected(model: Any) -> None:
    """Experts get the tokens of all rows in one line, some of them only those that are theirs."""
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x_BTI = torch.randn(2, 7, layer.in_features, dtype=torch.float64)
    with Mixer(model).routed(("wide", "third"), IDS[:2]):
        torch.testing.assert_close(layer(x_BTI.flatten(0, 1)), layer(x_BTI).flatten(0, 1))
        with pytest.raises(ValueError, match="some of the tokens"):
            layer(x_BTI.flatten(0, 1)[:8])


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_in_a_chunk_of_its_adapter(seed: int) -> None:
    draw = random.Random(seed)
    slots = [draw.choice([0, 0, 0, 1, 2, 5]) for _ in range(draw.randint(1, 33))]
    plan = planned(slots, tokens=len(slots))
    chunks = torch.arange(6)[plan.slots]
    order = torch.arange(len(slots)) if plan.order is None else plan.order
    back = torch.arange(len(slots)) if plan.back is None else plan.back
    size = len(order) // len(chunks)
    assert len(order) == size * len(chunks) < 2 * len(slots) + size
    assert order[back].tolist() == list(range(len(slots)))
    assert [slots[row] for row in order] == chunks.repeat_interleave(size).tolist()


@pytest.mark.parametrize(
    "more",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5]}, {"lora_bias": True},
     {"target_modules": ["q_proj", "embed_tokens"]}],
)  # fmt: skip
def test_adapters_that_change_more_do_not_fit(base: Path, more: dict[str, Any]) -> None:
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **more})
    assert not Mixer.fits(get_peft_model(load_model(base_source(base), "float32"), config))
