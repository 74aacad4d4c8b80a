"""Learning rates that no recipe sets: each stage's own, for the variant that is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain.commands import list as listing
from posttrain.config.compose import compose
from posttrain.errors import BadInput
from posttrain.host import plugins
from posttrain.host.plugins import Host
from posttrain.plan import make_plan
from tests.support.installed import install
from tests.support.recipes import GIVEN, RECIPES

DEFAULT = {
    "sft": (2e-4, 1e-5),
    "dpo": (5e-6, 5e-7),
    "kto": (5e-6, 5e-7),
    "orpo": (2e-5, 5e-6),
    "cpo": (1e-5, 1e-6),
    "simpo": (1e-5, 1e-6),
    "safety": (1e-4, 5e-6),
    "grpo": (1e-5, 1e-6),
    "rft": (1e-4, 5e-6),
}
"""Rates of adapters and of full weights, by the kind of the stage."""
SET = {
    "quickstart": {"sft": 1e-3, "dpo": 1e-4, "safety": 5e-4},
    "quickstart_on_policy": {"sft": 1e-3, "dpo": 1e-4},
    "quickstart_iterated": {"sft": 1e-3, "dpo": 1e-4, "dpo2": 2e-5},
    "quickstart_labels": {"sft": 1e-3, "kto": 2e-4},
    "quickstart_rejection": {"sft": 1e-3, "rft": 5e-4},
    "quickstart_grpo": {"sft": 1e-3, "grpo": 2e-4},
    "tulu3_8b": {"sft": 5e-6, "dpo": 5e-7, "grpo": 3e-7},
    "lima": {"sft": 1e-5},
}
"""Rates that a recipe sets for every variant."""
OUTSIDE = """
from dataclasses import dataclass
from typing import Any
from posttrain import Stage, StageConfig, from_variant, hookimpl

POSTTRAIN_API = 1

@dataclass(kw_only=True)
class Settings(StageConfig):
    data: Any = None
    lr: float = from_variant(adapter=3e-4, full=7e-6)
    "Peak learning rate."

@hookimpl
def register_stages():
    return [
        Stage(name=name, summary="", config=Settings, run="outside:run", parent="sft", records="conversations")
        for name in ("outside", "method")
    ]
"""


def rates(host: Host, *words: str) -> dict[str, float]:
    steps: Any = make_plan(compose(host, words), host).steps
    return {step.name: step.config.lr for step in steps}


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """The plugin of a third party with two stages, one of them named as a key of every variant is."""
    install(tmp_path / "site", monkeypatch, "outside", {"outside.py": OUTSIDE})
    return plugins.load()


@pytest.mark.parametrize("variant", ["lora", "qlora", "full"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_has_the_rates_of_its_variant(host: Host, name: str, variant: str) -> None:
    for file in ("a.json", "a.jsonl"):
        Path(file).write_text("[]")
    found = rates(host, f"recipe={name}", f"variant={variant}", *GIVEN.get(name, []))
    given = SET.get(name, {})
    assert found == {stage: given.get(stage) or DEFAULT[stage][variant == "full"] for stage in found}


@pytest.mark.parametrize("variant", ["lora", "qlora", "full"])
@pytest.mark.parametrize("kind", [kind for kind in DEFAULT if kind != "sft"])
def test_every_kind_has_the_rates_of_the_variant(host: Host, kind: str, variant: str) -> None:
    added = [f"+stage@last={kind}", "last.data=a/b", "+gate@last.gate=none"]
    assert rates(host, "recipe=quickstart", f"variant={variant}", *added)["last"] == DEFAULT[kind][variant == "full"]


@pytest.mark.parametrize(("variant", "rate"), [("lora", 3e-4), ("qlora", 3e-4), ("full", 7e-6)])
@pytest.mark.parametrize("kind", ["outside", "method"])
def test_a_stage_from_outside_follows_the_variant(outside: Host, kind: str, variant: str, rate: float) -> None:
    added = [f"+stage@last={kind}", "+gate@last.gate=none"]
    assert rates(outside, "recipe=quickstart", f"variant={variant}", *added)["last"] == rate


def test_a_variant_may_set_the_rate_of_a_kind(outside: Host) -> None:
    words = ["recipe=llama8b_sft_dpo", "+stage@last=outside", "last.data=a/b", "+gate@last.gate=none"]
    chosen = ["variant.dpo.lr=3e-3", "variant.outside.lr=2e-3"]
    assert rates(outside, *words, *chosen) == {"sft": 2e-4, "dpo": 3e-3, "last": 2e-3}
    Path("mine/variant").mkdir(parents=True)
    Path("mine/variant/mine.yaml").write_text("method: full\nsft: {lr: 0.5}\noutside: {lr: 0.25}\n")
    found = rates(outside, *words, "variant=mine", "--config-dir=mine")
    assert found == {"sft": 0.5, "dpo": 5e-7, "last": 0.25}


def test_a_variant_without_a_method_is_rejected(host: Host) -> None:
    Path("mine/variant").mkdir(parents=True)
    Path("mine/variant/mine.yaml").write_text("{}")
    with pytest.raises(BadInput) as caught:
        rates(host, "recipe=llama8b_sft_dpo", "variant=mine", "--config-dir=mine")
    assert "dpo.lr (from variant.dpo.lr): Interpolation key 'variant.method' not found" in str(caught.value)


@pytest.mark.parametrize("kind", DEFAULT)
def test_the_list_of_settings_shows_both_rates(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    listing.main([kind])
    adapter, full = DEFAULT[kind]
    assert f"  {kind}.lr: float = {adapter}, with variant=full {full}\n" in capsys.readouterr().out
