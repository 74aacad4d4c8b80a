"""``posttrain merge``: standalone weights with the adapter's logits, or none at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.artifact import Artifact, ModelSource, verify
from posttrain.config.schema import LoraSettings, Method
from posttrain.model.loading import load_model
from posttrain.model.saving import save_model
from posttrain.sft.stage import run
from tests.support.command import main
from tests.support.sft import context
from tests.support.tiny import base_source, published, write_base

IDS = torch.tensor([[4, 5, 105, 6, 104, 7]])
TOKENS = ["<think>", "</think>"]
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"lora": LoraSettings(r=4, alpha=8, rslora=False)},
    "rsLoRA": {"lora": LoraSettings(r=4, alpha=8)},
    "DoRA": {"lora": LoraSettings(r=4, alpha=8, dora=True)},
    "QLoRA": {"method": Method.qlora, "lora": LoraSettings(r=4, alpha=8)},
    "bfloat16": {"lora": LoraSettings(r=4, alpha=8), "dtype": "bfloat16"},
}


def make_base(folder: Path, tied: bool, tokens: list[str]) -> ModelSource:
    path = write_base(folder, tie_word_embeddings=tied, hidden_size=64, vocab_size=104)  # no spare rows
    return base_source(path, added_tokens=tokens)


def make_adapter(folder: Path, tied: bool = True, tokens: list[str] | None = None, **settings: Any) -> Artifact:
    base = make_base(folder / "base", tied, tokens or [])
    stage = context(base, folder / "stage", epochs=2, sequence_length=96, **settings)
    run(stage)
    return published(stage.output, base, folder / "adapter", dtype=settings.get("dtype", "float32"))


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids).logits
    return result


CASES = [
    *[("rsLoRA", tied, tokens) for tied in (True, False) for tokens in ([], TOKENS)],
    *[(kind, tied, TOKENS) for kind in KINDS if kind != "rsLoRA" for tied in (True, False)],
]


@pytest.mark.parametrize(
    ("kind", "tied", "tokens"), CASES, ids=lambda value: value if isinstance(value, str) else str(bool(value))
)
def test_merged_weights_stand_alone_and_compute_what_the_adapter_does(
    working_folder: Path, kind: str, tied: bool, tokens: list[str]
) -> None:
    adapter = make_adapter(working_folder, tied, tokens, **KINDS[kind])
    assert main("merge", "adapter", "merged") == 0
    model = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32).eval()
    source = adapter.source(make_base(working_folder / "base", tied, tokens))
    ids = IDS if tokens else IDS[:, ::2].clamp(max=103)
    dtype = str(adapter.manifest.dtype)
    expected = logits(load_model(source, dtype), ids).float()
    assert float((logits(model, ids) - expected).abs().max()) < (1e-4 if dtype == "float32" else 0.3)
    assert model.config.vocab_size == 104 + len(tokens)
    assert ("lm_head.weight" in load_file("merged/model.safetensors")) != tied
    tokenizer = AutoTokenizer.from_pretrained("merged")
    assert tokenizer.chat_template == adapter.manifest.chat_template
    assert tokenizer.convert_tokens_to_ids(tokens) == [104, 105][: len(tokens)]
    config = json.loads(Path("merged/config.json").read_text())
    assert ("quantization_config" in config, config["dtype"]) == (False, dtype)


def test_the_manifest_tells_where_the_weights_come_from(working_folder: Path) -> None:
    adapter = make_adapter(working_folder, tokens=TOKENS)
    base = make_base(working_folder / "base", True, TOKENS)
    assert main("merge", "adapter", "some/where/merged") == 0
    merged = verify(Path("some/where/merged"))
    assert merged.manifest.parent_digest == merged.manifest.merge["adapter"] == adapter.digest
    assert merged.manifest.merge["float32"] < 1e-6
    assert merged.manifest.lineage == ("sft",)
    source = merged.source(base)
    assert (source.adapter, source.added_tokens, source.model) == (None, (), merged.path)
    assert torch.allclose(
        logits(load_model(source, "float32"), IDS), logits(load_model(adapter.source(base), "float32"), IDS), atol=1e-4
    )
    assert sorted(path.name for path in merged.path.parent.iterdir()) == ["merged"]


def test_the_base_may_have_moved(working_folder: Path) -> None:
    make_adapter(working_folder)
    (working_folder / "base").rename("elsewhere")
    assert main("merge", "adapter", "merged") == 2
    assert main("merge", "adapter", "merged", "model.path=elsewhere") == 0


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.1.mlp.up_proj"])
def test_weights_that_compute_something_else_are_not_published(
    working_folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    merge = LoraModel.merge_and_unload

    def merge_wrongly(model: LoraModel, **settings: Any) -> torch.nn.Module:
        merged: torch.nn.Module = merge(model, **settings)
        with torch.no_grad():
            merged.get_parameter(f"{name}.weight")[-1] *= 1.1  # of the embeddings, the last new token alone
        return merged

    make_adapter(working_folder, tokens=TOKENS)
    monkeypatch.setattr(LoraModel, "merge_and_unload", merge_wrongly)
    assert main("merge", "adapter", "merged") == 5
    assert "merged in float32 compute other logits than the adapter" in capsys.readouterr().err
    assert not list(working_folder.glob("*merged*"))


def test_weights_that_are_saved_wrongly_are_not_published(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save_wrongly(model: torch.nn.Module, parent: ModelSource, output: Path, dtype: str) -> None:
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.up_proj.weight")[-1] *= 1.1
        save_model(model, parent, output, dtype)

    make_adapter(working_folder)
    monkeypatch.setattr("posttrain.model.merging.save_model", save_wrongly)
    assert main("merge", "adapter", "merged") == 5
    assert "saved in float32 compute other logits than the adapter" in capsys.readouterr().err
    assert not list(working_folder.glob("*merged*"))


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"use_dora": True, "bias": "lora_only"}])
def test_an_adapter_of_another_tool_is_merged(
    working_folder: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any]
) -> None:
    base = write_base(working_folder / "base", attention_bias=True)
    torch.manual_seed(1)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "down_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
            **settings,
        ),
    ).eval()
    adapted.save_pretrained("foreign")
    assert main("merge", "foreign", "merged", f"model.path={base}") == 0
    assert "without a manifest" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32).eval()
    ids = IDS.clamp(max=99)
    assert float((logits(model, ids) - logits(adapted, ids)).abs().max()) < 1e-4
    assert AutoTokenizer.from_pretrained("merged").chat_template
    assert sorted(path.name for path in working_folder.iterdir()) == ["base", "foreign", "merged"]


def test_what_cannot_be_merged_is_rejected(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_adapter(working_folder)
    (working_folder / "taken").mkdir()
    assert main("merge", "adapter", "merged") == 0
    cases = {
        ("adapter",): "needs two directories",
        ("adapter", "a", "b"): "needs two directories",
        ("nowhere", "out"): "nowhere: there is no such directory",
        ("adapter", "taken"): "taken: exists already",
        ("merged", "out"): "merged: holds full weights",
        ("adapter", "out", "model.paht=x"): "Did you mean model.path?",
        ("adapter", "out", "model.path=nowhere/at/all"): "there is no directory nowhere/at/all",
    }
    for words, expected in cases.items():
        assert main("merge", *words) == 2
        assert expected in capsys.readouterr().err
    assert main("merge", "base", "out") == 2
    assert "base: holds full weights" in capsys.readouterr().err
    write_base(working_folder / "other", tie_word_embeddings=True, hidden_size=64, vocab_size=104, rms_norm_eps=1e-5)
    assert main("merge", "adapter", "out", "model.path=other") == 5
    assert "was trained on base weights" in capsys.readouterr().err
    assert not list(working_folder.glob("*out*"))
