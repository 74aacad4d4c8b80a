"""A stage's output is the trained model: every way of saving another one is caught and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.artifact import ModelSource, verify
from posttrain.config.schema import Dtype, LoraSettings, Method
from posttrain.context import StageContext
from posttrain.errors import ArtifactDamaged, PluginFailed
from posttrain.launch.plugin import run_stage
from posttrain.model.checks import check_output
from posttrain.model.loading import load_model, load_trainable
from posttrain.model.probe import PROBE, leave_probe, logits
from posttrain.model.reloading import check_published, check_reloaded, check_start
from posttrain.sft.plugin import register_stages
from posttrain.sft.stage import run
from posttrain.stage import Stage
from tests.support.sft import context
from tests.support.tiny import TURNS, base_source, nudge, published, tiny_tokenizer, write_base

Tensors = dict[str, torch.Tensor]
LORA = LoraSettings(r=4, alpha=8)
NAME = "model.layers.1.mlp.up_proj.weight"
TOKENS = ["<a>", "<b>", "<|turn|>"]
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"lora": LORA},
    "dora": {"lora": replace(LORA, dora=True)},
    "qlora": {"lora": LORA, "method": Method.qlora},
    "full": {"method": Method.full},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = write_base(tmp_path_factory.mktemp("models") / "base", hidden_size=64, vocab_size=104)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TURNS
    tokenizer.save_pretrained(folder)
    return base_source(folder, added_tokens=TOKENS)


@pytest.fixture(scope="module")
def outputs(base: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Outputs of the stage, by variant, and of a second seed."""
    kinds = {**VARIANTS, "other": {"lora": LORA, "lr": 3e-3}}
    folder = tmp_path_factory.mktemp("stages")
    for name, settings in kinds.items():
        run(context(base, folder / name, epochs=3, sequence_length=96, **settings))
    return {name: folder / name / "output" for name in kinds}


@pytest.fixture
def saved(outputs: Mapping[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(outputs[name], tmp_path / name))


def check(output: Path, parent: ModelSource, dtype: str = "float32") -> None:
    """As the pipeline does before it publishes."""
    check_output(output, parent)
    check_reloaded(output, parent, dtype)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_was_trained_is_published_without_its_probe(
    base: ModelSource, saved: Callable[[str], Path], name: str
) -> None:
    output = saved(name)
    assert (output / PROBE).exists()
    check(output, base)
    assert not (output / PROBE).exists()


@pytest.mark.parametrize("compute", [Dtype.float32, Dtype.bfloat16])
@pytest.mark.parametrize("method", list(Method))
def test_logits_in_memory_are_those_on_disk_whatever_was_computed_in(
    base: ModelSource, tmp_path: Path, method: Method, compute: Dtype
) -> None:
    stage = context(base, tmp_path, method=method, lora=LORA, dtype="bfloat16", compute_dtype=compute, max_steps=2)
    run(stage)
    probe = load_file(stage.output / PROBE)
    output = {"model": stage.output} if method is Method.full else {"adapter": stage.output}
    quantization = "nf4" if method is Method.qlora else None
    source = replace(base, **output, tokenizer=stage.output, quantization=quantization)
    added = () if method is Method.full else base.added_tokens
    model = load_model(replace(source, added_tokens=added), "bfloat16")
    assert torch.equal(logits(model, probe["ids"]), probe["logits"])
    check(stage.output, base, "bfloat16")


def edit(output: Path, change: Callable[[Tensors], Tensors | None], name: str = "adapter_model.safetensors") -> None:
    tensors = load_file(output / name)
    save_file(change(tensors) or tensors, output / name, metadata={"format": "pt"})


def configure(output: Path, **changes: object) -> None:
    path = output / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def first(tensors: Tensors, part: str) -> str:
    return min(name for name in tensors if part in name)


def zero(tensors: Tensors) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


def drop(tensors: Tensors, *parts: str) -> None:
    for name in [name for name in tensors if all(part in name for part in parts)]:
        del tensors[name]


def swap_layers(tensors: Tensors) -> Tensors:
    swapped = {}
    for name, tensor in tensors.items():
        other = name.replace("layers.0", "layers.x").replace("layers.1", "layers.0").replace("layers.x", "layers.1")
        swapped[other] = tensor
    return swapped


def halve_rank(tensors: Tensors) -> Tensors:
    halves = {"lora_A": slice(0, 2), "lora_B": (slice(None), slice(0, 2))}
    return {
        name: tensor[next((half for part, half in halves.items() if part in name), slice(None))].clone()
        for name, tensor in tensors.items()
    }


def transpose(tensors: Tensors) -> None:
    name = first(tensors, "lora_A")
    tensors[name] = tensors[name].T.contiguous()


def swap_halves(tensors: Tensors) -> None:
    """Of a square weight, which no shape tells apart."""
    a, b = (first(tensors, f"o_proj.lora_{half}") for half in "AB")
    tensors[a], tensors[b] = tensors[b].T.contiguous(), tensors[a].T.contiguous()


def fill(tensors: Tensors, part: str, value: float) -> None:
    tensors[first(tensors, part)].view(-1)[3] = value


def reverse_rows(tensors: Tensors) -> None:
    name = first(tensors, "trainable_tokens_delta")
    tensors[name] = tensors[name].flip(0).contiguous()


def add_module(tensors: Tensors) -> Tensors:
    return tensors | {name.replace("up_proj", "side_proj"): tensor.clone() for name, tensor in tensors.items()}


def truncate(output: Path) -> None:
    path = output / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


OTHER_MODEL = "is not the one that was trained"
IN_FILE: dict[str, tuple[Callable[[Tensors], Tensors | None], str]] = {
    "every B is zero": (lambda t: (zero(t), drop(t, "delta"))[0], "every lora_B times lora_A is zero"),
    "every B is zero beside rows of tokens": (zero, OTHER_MODEL),
    "a module missing": (lambda t: drop(t, "0.mlp.up_proj"), r"no weights for its target module \S+0\.mlp\.up_proj"),
    "rows of tokens missing": (lambda t: drop(t, "delta"), r"lacks \S+lm_head\.token_adapter\S+ and 1 more"),
    "half a pair missing": (lambda t: drop(t, "lora_A", "v_proj"), "holds only lora_B"),
    "an extra tensor": (lambda t: t.update(extra=torch.ones(2)), "has no place for extra"),
    "an extra module": (add_module, r"has no place for \S+side_proj\.lora_A\.weight and 3 more"),
    "another prefix": (lambda t: {k.removeprefix("base_model."): v for k, v in t.items()}, r"lacks base_model\."),
    "another rank": (halve_rank, "has rank 2, adapter_config.json says 4"),
    "A transposed": (transpose, "have ranks 48 and 4"),
    "A and B swapped": (swap_halves, OTHER_MODEL),
    "NaN": (lambda t: fill(t, "lora_A", torch.nan), "holds NaN or infinity"),
    "infinity in the row of a token": (lambda t: fill(t, "delta", torch.inf), "holds NaN or infinity"),
    "half precision": (lambda t: {name: tensor.half() for name, tensor in t.items()}, "is saved as F16"),
    "layers swapped": (swap_layers, OTHER_MODEL),
    "rows of tokens in another order": (reverse_rows, OTHER_MODEL),
    "a step earlier": (lambda t: {k: v * (0.999 if "lora_B" in k else 1) for k, v in t.items()}, OTHER_MODEL),
}
IN_CONFIGURATION: dict[str, tuple[dict[str, object], str]] = {
    "another rank": ({"r": 8}, "has rank 4, adapter_config.json says 8"),
    "another rank of one module": (
        {"rank_pattern": {"layers.0.mlp.up_proj": 2}},
        r"has shape \(4, 64\), but \(2, 64\) on \S+",
    ),
    "another scale": ({"lora_alpha": 9}, OTHER_MODEL),
    "another scaling": ({"use_rslora": False}, OTHER_MODEL),
    "other tokens": ({"trainable_token_indices": {"model.embed_tokens": [1, 2, 3], "lm_head": [1, 2, 3]}}, OTHER_MODEL),
    "a copied module": ({"modules_to_save": ["lm_head"]}, r"whole copies of \['lm_head'\]"),
    "a target that is missing": ({"target_modules": ["nope"]}, "no weights for its target module nope"),
}
BROKEN: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "empty": lambda output: (output / "adapter_model.safetensors").write_bytes(b""),
}


@pytest.mark.parametrize("case", IN_FILE)
def test_other_tensors_than_the_trained_ones_are_named(
    base: ModelSource, saved: Callable[[str], Path], case: str
) -> None:
    damage, message = IN_FILE[case]
    output = saved("lora")
    edit(output, damage)
    with pytest.raises(ArtifactDamaged, match=message):
        check(output, base)


@pytest.mark.parametrize("case", IN_CONFIGURATION)
def test_another_configuration_than_the_trained_one_is_named(
    base: ModelSource, saved: Callable[[str], Path], case: str
) -> None:
    changes, message = IN_CONFIGURATION[case]
    output = saved("lora")
    configure(output, **changes)
    with pytest.raises(ArtifactDamaged, match=message):
        check(output, base)


@pytest.mark.parametrize(
    ("changes", "damage", "message"),
    [
        *(
            ({}, *IN_FILE[name])
            for name, (_, message) in IN_FILE.items()
            if message not in (OTHER_MODEL, "is saved as F16")
        ),
        *((changes, None, message) for changes, message in IN_CONFIGURATION.values() if message != OTHER_MODEL),
        (
            {},
            lambda t: {k: v * ("lora_A" not in k) for k, v in t.items() if "delta" not in k},
            "every lora_B times lora_A is zero",
        ),
        ({"lora_alpha": 0}, None, "changes nothing"),
    ],
)
def test_an_artifact_signed_again_is_checked_as_any_adapter(
    base: ModelSource,
    saved: Callable[[str], Path],
    tmp_path: Path,
    changes: dict[str, object],
    damage: Any,
    message: str,
) -> None:
    output = saved("lora")
    configure(output, **changes)
    edit(output, damage or (lambda t: None))
    signed = published(output, base, tmp_path / "artifact")
    assert verify(signed.path).digest == signed.digest
    with pytest.raises(ArtifactDamaged, match=message):
        check_published(signed.path, base, "float32")


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: {name: tensor for name, tensor in t.items() if "magnitude" not in name},
        lambda t: {name.replace("q_proj", "p_proj"): tensor for name, tensor in t.items()},
    ],
    ids=["without lengths", "renamed"],
)
def test_no_stage_starts_from_a_dora_signed_again(
    base: ModelSource, saved: Callable[[str], Path], tmp_path: Path, damage: Callable[[Tensors], Tensors]
) -> None:
    output = saved("dora")
    edit(output, damage)
    with pytest.raises(ArtifactDamaged, match=r"the adapter (lacks|holds no weights for)"):
        check_start(published(output, base, tmp_path / "artifact").path, base, "float32")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_sound_artifact_is_accepted(
    base: ModelSource, saved: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    path = published(saved(name), base, tmp_path / "artifact").path
    check_published(path, base, "float32")
    check_start(path, base, "float32")


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_not_whole_is_named(base: ModelSource, saved: Callable[[str], Path], case: str) -> None:
    output = saved("lora")
    BROKEN[case](output)
    with pytest.raises(ArtifactDamaged, match="cannot be read"):
        check(output, base)


def test_weights_of_another_run_are_named(base: ModelSource, saved: Callable[[str], Path]) -> None:
    output, other = saved("lora"), saved("other")
    for name in ("lora_B", "lora_A"):
        theirs = load_file(other / "adapter_model.safetensors")
        edit(output, lambda t, part=name, own=theirs: t | {k: v for k, v in own.items() if part in k})  # type: ignore[misc]
        with pytest.raises(ArtifactDamaged, match=OTHER_MODEL):
            check(shutil.copytree(output, output.with_name(name)), base)


def test_another_base_of_the_same_shapes_is_named(
    base: ModelSource, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(base.model, tmp_path / "other"))
    edit(other, lambda t: {name: value.flip(0).contiguous() for name, value in t.items()}, "model.safetensors")
    for name in ("lora", "qlora"):
        with pytest.raises(ArtifactDamaged, match=OTHER_MODEL):
            check(saved(name), replace(base, model=other, tokenizer=other))


def test_a_lost_quantisation_and_lost_lengths_are_named(base: ModelSource, saved: Callable[[str], Path]) -> None:
    output = saved("qlora")
    (output / "quantization_config.json").unlink()
    with pytest.raises(ArtifactDamaged, match=OTHER_MODEL):
        check(output, base)
    output = saved("dora")
    configure(output, use_dora=False)
    with pytest.raises(ArtifactDamaged, match=r"has no place for .*lora_magnitude_vector and 13 more"):
        check(output, base)


def test_full_weights_that_are_not_the_trained_ones_are_named(base: ModelSource, saved: Callable[[str], Path]) -> None:
    output = saved("full")
    edit(output, lambda t: t | {NAME: t[NAME] * 1.01}, "model.safetensors")
    with pytest.raises(ArtifactDamaged, match=OTHER_MODEL):
        check(output, base)


def test_weights_that_differ_and_compute_the_same_are_named(base: ModelSource, tmp_path: Path) -> None:
    """Queries and keys of one layer scaled against each other."""
    stage = context(replace(base, added_tokens=()), tmp_path)
    model = load_trainable(stage.parent, "float32")
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight.mul_(2)
        attention.k_proj.weight.div_(2)
    stage.save(model)
    with pytest.raises(ArtifactDamaged, match="training changed nothing: its logits equal base's"):
        check(stage.output, stage.parent)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stage_on_an_adapter_is_compared_with_that_adapter(
    base: ModelSource, saved: Callable[[str], Path], tmp_path: Path, dtype: str
) -> None:
    parent = published(saved("lora"), base, tmp_path / "artifact").source(base)
    stage = replace(context(parent, tmp_path), dtype=dtype)
    policy = load_trainable(parent, dtype)
    nudge(policy)
    stage.save(policy)
    shutil.copytree(stage.output, tmp_path / "again")
    check(stage.output, parent, dtype)
    shutil.copy(parent.tokenizer / "adapter_model.safetensors", tmp_path / "again")
    with pytest.raises(ArtifactDamaged, match="training changed nothing"):
        check(tmp_path / "again", parent, dtype)


def test_the_probe_leaves_the_model_as_it_was(base: ModelSource, tmp_path: Path) -> None:
    model = load_trainable(base, "float32").train()
    attention, random = model.config._attn_implementation, torch.get_rng_state()
    leave_probe(model, base, tmp_path)
    assert model.training
    assert model.config._attn_implementation == attention
    assert torch.equal(torch.get_rng_state(), random)
    probe = load_file(tmp_path / PROBE)
    assert {104, 105, 106} < set(probe["ids"][0].tolist())
    expected = model.eval()(input_ids=probe["ids"]).logits[0]
    assert torch.allclose(probe["logits"], expected, atol=1e-5)
    assert torch.allclose(logits(model, probe["ids"]), expected, atol=1e-5)


def forgetful(context: StageContext) -> None:
    """A stage that ends without saving."""


def test_a_stage_that_does_not_save_through_its_context_fails(base: ModelSource, tmp_path: Path) -> None:
    (sft,) = register_stages()
    stage = Stage(**{**vars(sft), "name": "mine", "run": f"{__name__}:forgetful"})
    with pytest.raises(PluginFailed, match=r"stage 'mine' ended without context\.save"):
        run_stage(stage, context(base, tmp_path))
    assert run_stage(sft, context(base, tmp_path / "sft", max_steps=1)) is True
