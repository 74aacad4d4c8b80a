"""The base model is found, hashed and checked before it is used; nothing of it can run code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from peft.utils.warning import PeftWarning
from safetensors.torch import load_file, save_file

from posttrain.config.schema import LoraSettings, ModelConfig
from posttrain.errors import ArtifactDamaged, BadInput
from posttrain.model.base import resolve_base
from posttrain.model.loading import check_finite, load_model, load_tokenizer, load_trainable, new_adapter
from posttrain.model.saving import save_model
from tests.support.tiny import TEMPLATE, VOCABULARY, base_source, tiny_llama, tiny_tokenizer, write_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "tiny-base")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rejection(path: Path | str, **settings: str) -> str:
    with pytest.raises(BadInput) as caught:
        resolve_base(ModelConfig(path=str(path), **settings))
    return str(caught.value)


def test_a_directory_is_resolved_with_its_template(base: Path) -> None:
    source = base_source(base)
    assert (source.name, source.model, source.tokenizer, source.adapter) == ("base", base, base, None)
    assert source.chat_template == TEMPLATE
    assert source.base == str(base)
    assert base_source(base) == source


def test_digests_follow_the_content_they_cover(base: Path) -> None:
    before = base_source(base)
    edit_json(base / "tokenizer_config.json", model_max_length=77)
    tokenizer = base_source(base)
    assert (tokenizer.model_digest == before.model_digest, tokenizer.digest == before.digest) == (True, False)
    edit_weights(base, lambda tensors: tensors["model.norm.weight"].add_(1e-3))
    assert base_source(base).model_digest != before.model_digest


def test_a_given_template_replaces_the_tokenizers_own(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    source = resolve_base(ModelConfig(path=str(base), chat_template=str(tmp_path / "mine.jinja")))
    assert source.chat_template == load_tokenizer(source).chat_template == "{{ messages }}"
    assert source.digest != base_source(base).digest


@pytest.mark.parametrize(
    "template", [TEMPLATE, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]]
)
def test_a_template_inside_the_tokenizers_configuration_is_found(base: Path, template: object) -> None:
    (base / "chat_template.jinja").unlink()
    edit_json(base / "tokenizer_config.json", chat_template=template)
    assert base_source(base).chat_template == TEMPLATE


def test_shards_are_all_hashed_and_a_missing_one_is_named(base: Path) -> None:
    (base / "model.safetensors").unlink()
    tiny_llama().save_pretrained(base, max_shard_size="20KB")
    shards = sorted(base.glob("model-*.safetensors"))
    assert len(shards) > 1
    before = base_source(base).model_digest
    shards[-1].write_bytes(shards[-1].read_bytes()[:-1] + b"\1")
    assert base_source(base).model_digest != before
    shards[0].unlink()
    assert shards[0].name in rejection(base)


def test_a_missing_directory_is_rejected_with_its_nearest_sibling(base: Path) -> None:
    assert f"Did you mean {base}" in rejection(base.parent / "tiny-bsae")
    assert "there is no directory" in rejection(base.parent / "no" / "such" / "folder")


def test_a_hub_name_without_a_network_is_rejected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = rejection("acme/no-such-model", revision="abc")
    assert "there is no directory acme/no-such-model, and downloading it from the hub at abc failed" in message
    assert "give a local directory" in message


def test_a_hub_snapshot_is_used_like_a_directory(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **rest: asked.update(rest, name=name) or str(base)
    )
    source = resolve_base(ModelConfig(path="acme/tiny", revision="abc"))
    assert (source.model, source.base) == (base, "acme/tiny")
    assert (asked["name"], asked["revision"]) == ("acme/tiny", "abc")
    assert not any(pattern.endswith((".bin", ".py", ".pt")) or pattern == "*" for pattern in asked["allow_patterns"])


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled weights": (_pickle_only, "unpickling runs code"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
    "truncated weights": (_truncate_weights, "model.safetensors: it is damaged"),
    "huge header": (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), "it is damaged"),
    "missing config": (lambda folder: (folder / "config.json").unlink(), "config.json: the file is missing"),
    "damaged config": (lambda folder: (folder / "config.json").write_text('{"a": '), "config.json: it is damaged"),
    "config that is no object": (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
    "code in the model": (
        lambda folder: edit_json(folder / "config.json", auto_map={"AutoModel": "x.Y"}),
        "runs Python code",
    ),
    "code in the tokenizer": (
        lambda folder: edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}),
        "runs Python code",
    ),
    "code by attention": (
        lambda folder: edit_json(folder / "config.json", _attn_implementation_internal="a/b"),
        "load code",
    ),
    "quantised": (
        lambda folder: edit_json(folder / "config.json", quantization_config={"bits": 4}),
        "quantised weights",
    ),
    "adapter beside weights": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "beside the weights"),
    "no template": (_no_template, "set model.chat_template=FILE"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_rejected_in_one_sentence(base: Path, case: str) -> None:
    damage, expected = REFUSED[case]
    damage(base)
    assert expected in rejection(base)


def test_an_adapter_or_a_file_as_base_is_rejected(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "adapter_config.json").write_text("{}")
    assert "is an adapter, not a base model" in rejection(base)
    assert "is a file" in rejection(base / "config.json")


def test_an_unreadable_template_file_is_rejected(base: Path) -> None:
    assert "cannot read the chat template" in rejection(base, chat_template=str(base / "none.jinja"))


@pytest.mark.parametrize(("eos_only", "expected"), [(True, "<|end|>"), (False, "<unk>")])
def test_padding_uses_an_existing_token(base: Path, eos_only: bool, expected: str) -> None:
    if not eos_only:
        core = json.loads((base / "tokenizer.json").read_text())
        core["model"]["vocab"]["<unk>"] = len(core["model"]["vocab"])
        (base / "tokenizer.json").write_text(json.dumps(core))
    size = len(json.loads((base / "tokenizer.json").read_text())["model"]["vocab"])
    tokenizer = load_tokenizer(base_source(base))
    assert (tokenizer.pad_token, len(tokenizer)) == (expected, size)


def test_a_damaged_tokenizer_is_rejected(base: Path) -> None:
    source = base_source(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    with pytest.raises(BadInput, match="its tokenizer cannot be loaded"):
        load_tokenizer(source)


def test_a_loaded_model_computes_what_was_saved(base: Path) -> None:
    ids = torch.arange(20)[None]
    model = load_model(base_source(base), "float32")
    assert not model.training
    assert torch.equal(model(input_ids=ids).logits, tiny_llama().eval()(input_ids=ids).logits)


def test_full_weights_are_trained_in_float32_and_inferred_in_the_given_format(base: Path) -> None:
    source = base_source(base)
    assert {p.dtype for p in load_model(source, "bfloat16").parameters()} == {torch.bfloat16}
    trainable = load_trainable(source, "bfloat16")
    assert {(p.dtype, p.requires_grad) for p in trainable.parameters()} == {(torch.float32, True)}


def test_missing_weights_are_rejected_instead_of_made_up(base: Path) -> None:
    edit_weights(base, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(BadInput, match=r"its weights lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(base_source(base), "float32")


def test_weights_of_another_shape_are_rejected(base: Path) -> None:
    edit_json(base / "config.json", vocab_size=VOCABULARY + 1)
    with pytest.raises(BadInput, match="the model cannot be loaded"):
        load_model(base_source(base), "float32")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_that_is_not_finite_is_rejected_by_name(base: Path, value: float) -> None:
    edit_weights(base, lambda tensors: tensors["model.norm.weight"][3:4].fill_(value))
    source = base_source(base)
    with pytest.raises(BadInput, match=r"weight model\.norm\.weight holds NaN or infinity"):
        load_trainable(source, "float32")
    with pytest.raises(BadInput, match=r"model\.norm\.weight"):
        check_finite(load_model(source, "float32"), source)


def test_weights_that_are_elsewhere_are_neither_finite_nor_saved(base: Path, tmp_path: Path) -> None:
    source, empty = base_source(base), torch.empty(0)
    model = load_model(source, "float32")
    adapted = new_adapter(load_model(source, "float32"), LoraSettings(r=2, alpha=4), seed=0)
    model.model.norm.weight.data = empty
    with pytest.raises(BadInput, match=r"weight model\.norm\.weight is empty"):
        check_finite(model, source)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = empty
    damaged = pytest.raises(ArtifactDamaged, match=r"weight .*lora_A.* is empty")
    with pytest.warns(PeftWarning, match="have invalid shape"), damaged:  # peft would save them all the same
        save_model(adapted, source, tmp_path, "float32")
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_tokenizer_of_a_base_round_trips(base: Path) -> None:
    text = "<|user|>Hello, world!<|end|>"
    assert load_tokenizer(base_source(base))(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]


def test_planning_modules_import_no_heavy_library() -> None:
    code = (
        "import posttrain.model.base, posttrain.sft.config, posttrain.sft.plugin, sys;"
        "heavy = {'torch', 'transformers', 'peft', 'huggingface_hub', 'safetensors', 'numpy'} & set(sys.modules);"
        "sys.exit(' '.join(sorted(heavy)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
