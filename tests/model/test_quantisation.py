"""QLoRA: an adapter on 4-bit weights, trained, saved, reloaded and scored on the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.artifact import ModelSource, quantization_of
from posttrain.config.compose import compose
from posttrain.config.schema import LoraSettings, Method
from posttrain.environment import NO_COMPILER
from posttrain.errors import ArtifactDamaged, BadInput
from posttrain.host import plugins
from posttrain.model.checks import check_output
from posttrain.model.loading import load_model, load_tokenizer, load_trainable, new_adapter
from posttrain.model.quantisation import NF4, dequantise, quantisation_config
from posttrain.plan import make_plan
from posttrain.scoring.systems import Loading, SharedWeights, group_by_weights
from posttrain.sft.stage import policy, run
from tests.support.fakes import GATES, Script, scripted_host, write_project
from tests.support.sft import context
from tests.support.tiny import Killed, Recorder, base_source, published, write_base

IDS = torch.arange(4, 30)[None]
LORA = LoraSettings(r=4, alpha=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = tmp_path_factory.mktemp("models") / "base"
    return base_source(write_base(folder, hidden_size=64, intermediate_size=128))  # blocks of 64 share a scale


@pytest.fixture
def quantised(base: ModelSource) -> ModelSource:
    return replace(base, quantization=NF4)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result.float()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of the trained weights, in training mode; B is moved off zero first, so that A has a gradient too."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_weights_are_nf4_with_quantised_scales_and_compute_in_the_given_format(quantised: ModelSource) -> None:
    model = load_model(quantised, "bfloat16")
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.weight.dtype, layer.weight.quant_state.quant_type, layer.weight.quant_state.nested) == (
        torch.uint8, "nf4", True,
    )  # fmt: skip
    assert layer.compute_dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.bfloat16}
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_and_merging_are_right_after_a_forward_pass_for_evaluation(
    quantised: ModelSource, dora: bool
) -> None:
    lora = replace(LORA, dora=dora)
    used, plain = load_model(quantised, "bfloat16"), dequantise(load_model(quantised, "bfloat16")).float()
    logits(used)
    adapted, reference = new_adapter(used, lora, seed=0), new_adapter(plain, lora, seed=0)
    logits(adapted)
    found, expected = gradients(adapted), gradients(reference)
    assert set(found) == set(expected)
    assert (
        distance(torch.cat([g.flatten() for g in found.values()]), torch.cat([*map(torch.flatten, expected.values())]))
        < 0.05
    )
    merged = dequantise(used)
    for name, weight in dequantise(load_model(quantised, "bfloat16")).named_parameters():
        assert torch.equal(merged.get_parameter(name.replace("_proj.", "_proj.base_layer.")), weight)


def test_the_stage_trains_saves_and_reloads_on_the_same_weights(base: ModelSource, tmp_path: Path) -> None:
    stage = context(base, tmp_path, method=Method.qlora, lora=LORA, epochs=6, sequence_length=96, dtype="bfloat16")
    run(stage)
    check_output(stage.output, base)
    assert stage.metrics["final_loss"] < stage.progress.steps[1]["loss"]
    settings = json.loads((stage.output / "quantization_config.json").read_text())
    assert (settings["bnb_4bit_quant_type"], settings["bnb_4bit_use_double_quant"]) == ("nf4", True)
    source = published(stage.output, base, tmp_path / "artifact").source(base)
    assert source.quantization == NF4
    trained = logits(load_model(source, "bfloat16"))
    assert torch.equal(trained, logits(load_trainable(source, "bfloat16")))
    off = replace(source, quantization=None)
    assert distance(logits(load_model(off, "bfloat16")), trained) > 0.05  # the test can tell the two bases apart
    (tmp_path / "plain").mkdir()
    assert quantization_of(tmp_path / "plain") is None


def test_an_interrupted_stage_ends_with_the_same_bytes(base: ModelSource, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": Method.qlora, "lora": LORA, "epochs": 2, "sequence_length": 96}
    whole = context(base, tmp_path / "whole", **settings)
    run(whole)
    killed = replace(context(base, tmp_path / "killed", **settings), progress=Recorder(fail_at=3))
    with pytest.raises(Killed):
        run(killed)
    again = replace(killed, progress=Recorder())
    run(again)
    assert again.progress.started == (4, 2)
    for path in whole.output.iterdir():
        assert (again.output / path.name).read_bytes() == path.read_bytes()


def test_the_gate_scores_the_candidate_on_its_own_weights_and_the_base_on_the_original(
    base: ModelSource, tmp_path: Path
) -> None:
    stage = context(base, tmp_path, method=Method.qlora, lora=LORA, epochs=3)
    run(stage)
    candidate = published(stage.output, base, tmp_path / "artifact").source(base)
    groups = group_by_weights({"base": base, "candidate": candidate})
    assert [list(group) for group in groups] == [["base"], ["candidate"]]
    loading = Loading(load_model, load_tokenizer, "cpu")
    for group, source in zip(groups, (base, candidate), strict=True):
        name = next(iter(group))
        with SharedWeights(group, "float32", loading).speaking_as(name) as model:
            assert torch.equal(logits(model), logits(load_model(source, "float32")))


@pytest.mark.parametrize(
    ("targets", "message"), [(["q_proj", "vproj"], "Did you mean v_proj"), (["lm_head"], "output")]
)
def test_every_target_must_exist_in_a_quantised_model_too(
    base: ModelSource, tmp_path: Path, targets: list[str], message: str
) -> None:
    stage = context(base, tmp_path, method=Method.qlora, lora=replace(LORA, target_modules=targets))
    with pytest.raises(BadInput, match=message):
        policy(stage)


def test_a_base_that_is_not_finite_is_rejected_although_quantising_hides_it(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", hidden_size=64)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stage = context(base_source(folder), tmp_path, method=Method.qlora, lora=LORA)
    with pytest.raises(BadInput, match=r"weight model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        policy(stage)


def test_other_quantisations_are_rejected() -> None:
    with pytest.raises(BadInput, match="to nf4, not to fp4"):
        quantisation_config("fp4", torch.bfloat16)


def test_a_damaged_record_of_the_quantisation_is_named(tmp_path: Path) -> None:
    (tmp_path / "quantization_config.json").write_text("[]")
    with pytest.raises(ArtifactDamaged, match=r"quantization_config\.json describes no quantisation"):
        quantization_of(tmp_path)


def test_a_missing_package_is_a_problem_of_the_plan(monkeypatch: pytest.MonkeyPatch, working_folder: Path) -> None:
    write_project(working_folder)
    host = scripted_host(Script())
    words = ["recipe=mine", *GATES, "variant=qlora", "sft.method=qlora"]
    assert make_plan(compose(host, words), host).steps[0].config.method is Method.qlora  # type: ignore[attr-defined]
    monkeypatch.setattr("posttrain.model.quantisation.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"sft\.method: .*bitsandbytes, which is not installed\n.*pip install"):
        make_plan(compose(host, words), host)


def test_the_variant_sets_method_and_rates() -> None:
    host = plugins.load()
    plan = make_plan(compose(host, ["recipe=quickstart", "variant=qlora"]), host)
    assert [getattr(step.config, "method", None) for step in plan.steps] == [Method.qlora, None, None]


IMPORTED = """
import gc, os, sys
from posttrain import environment
environment.prepare()
with environment.importing():
    import bitsandbytes
assert environment.NO_COMPILER not in os.environ
assert "torch._inductor.compile_fx" not in sys.modules, "the compiler was loaded"
assert gc.get_freeze_count() > 100_000, "what was imported is looked through for garbage"
"""


def test_bitsandbytes_says_nothing_when_it_is_imported_and_loads_no_compiler() -> None:
    given = {name: value for name, value in os.environ.items() if name != NO_COMPILER}
    done = subprocess.run([sys.executable, "-c", IMPORTED], env=given, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
