"""Models and adapters of strangers: no key of a configuration loads code, and no file leads out of its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.schema import ModelConfig
from posttrain.errors import BadInput
from posttrain.model.base import resolve_base
from posttrain.model.trust import ATTENTION, check_places, find_code
from tests.support.tiny import write_base

CODE: list[dict[str, Any]] = [
    {"auto_map": {"AutoModel": "evil.Evil"}},
    {"_attn_implementation_internal": "evil/kernel"},
    {"_experts_implementation_internal": "evil/kernel"},
    {"attn_implementation": "kernels-community/flash-attn"},
    {"_attn_implementation": "evil/kernel@main:function"},
    {"attn_implementation": {"text_config": "evil/kernel"}},
    {"experts_implementation": "evil/kernel"},
    {"trust_remote_code": True},
    {"custom_generate": "evil/repository"},
    {"custom_pipelines": {"x": {"impl": "evil.Evil"}}},
    {"use_kernels": True},
    {"kernel_config": {"RMSNorm": "evil/kernel"}},
    {"quantization_config": {"quant_method": "gptq"}},
    {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}},
    {"megatron_config": {"a": 1}},
    {"megatron_core": "evil"},
    {"_unheard_of": "x"},
    {"target_modules": "(a+)+" * 10_000},
]
NESTS: list[Callable[[Any], Any]] = [
    lambda inner: inner,
    lambda inner: {"text_config": inner},
    lambda inner: {"vision_config": {"text_config": inner}},
    lambda inner: {"layers": [{}, {"sub": [inner]}]},
]


@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("config", CODE, ids=lambda config: next(iter(config)))
def test_a_key_that_loads_code_is_found_however_deep(config: dict[str, Any], nest: Callable[[Any], Any]) -> None:
    ((place, _),) = find_code(nest(config))
    assert place.endswith(next(iter(config))) or next(iter(config)) in place


@pytest.mark.parametrize("name", sorted(ATTENTION))
def test_what_transformers_itself_writes_is_no_code(name: str) -> None:
    harmless = {
        "_name_or_path": "x", "_model_name_or_path": "x",
        "_attn_implementation_autoset": True, "attn_implementation": name, "auto_map": None,
        "trust_remote_code": False, "megatron_core": "megatron.core", "megatron_config": None, "auto_mapping": None,
        "experts_implementation": "grouped_mm", "architectures": ["LlamaForCausalLM"], "chat_template": "x" * 20_000,
    }  # fmt: skip
    assert list(find_code(harmless)) == []


def test_nesting_without_end_is_no_recursion() -> None:
    deep: dict[str, Any] = {"auto_map": "evil"}
    for _ in range(100_000):
        deep = {"a": deep}
    assert len(list(find_code(deep))) == 1


def link_out(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)


def link_to_a_device(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")


def link_ring(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(name)


def pipe(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def empty(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("spoil", [link_out, link_to_a_device, link_ring, pipe, empty])
def test_a_file_that_is_none_is_named(tmp_path: Path, spoil: Callable[[Path, str], None], name: str) -> None:
    base = write_base(tmp_path / "base")
    spoil(base, name)
    with pytest.raises(BadInput, match=name):
        resolve_base(ModelConfig(path=str(base)))


def test_links_within_a_folder_and_to_the_blobs_of_the_hub_are_inside(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "generation_config.json").symlink_to("config.json")
    (snapshot / "README.md").symlink_to("/dev/zero")  # nobody reads it
    check_places(snapshot)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_every_configuration_of_a_base_is_read_for_code(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base")
    config = json.loads((base / name).read_text()) if (base / name).exists() else {}
    (base / name).write_text(json.dumps({**config, "text_config": {"auto_map": {"AutoModel": "evil.Evil"}}}))
    with pytest.raises(BadInput, match=r"text_config\.auto_map runs Python code"):
        resolve_base(ModelConfig(path=str(base)))
