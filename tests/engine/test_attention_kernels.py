"""The kernels of packed attention: the one that fits is chosen and named, and all compute the same."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM, PreTrainedModel

from posttrain.config.schema import Dtype
from posttrain.engine import attention_kernels as kernels
from posttrain.engine.attention import install, packed_hidden
from posttrain.engine.attention_kernels import Documents, choose
from posttrain.model.loading import load_trainable
from tests.support.tiny import VOCABULARY, base_source, tiny_llama, write_base
from tests.support.training import training

LENGTHS = [12, 3, 15]
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2, "sliding_window": 4, "pad_token_id": 0,
}  # fmt: skip


def gemma2() -> PreTrainedModel:
    """A model that caps attention scores and alternates windows with full attention."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)).eval()


def gpt_oss() -> PreTrainedModel:
    """A model with attention sinks."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def on_cuda(capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, **config: Any) -> Any:
    """What the choice looks at, of a model on a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    text = SimpleNamespace(**config)
    return SimpleNamespace(
        device=torch.device("cuda"), dtype=dtype, named_parameters=list,
        config=SimpleNamespace(get_text_config=lambda: text),
    )  # fmt: skip


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("build", [gemma2, gpt_oss])
def test_what_only_a_mask_can_isolate_is_isolated_by_one(build: Any) -> None:
    model = build()
    ids = torch.randint(VOCABULARY, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = [model.model(input_ids=part, use_cache=False).last_hidden_state[0] for part in ids.split(LENGTHS, 1)]
        choice = install(model)
        packed = packed_hidden(model, ids, LENGTHS)
    assert choice.kernel.name == "eager"
    assert relative(packed, torch.cat(alone)) <= 1e-6


def test_the_choice_is_told_with_its_reasons() -> None:
    told = "SDPA per document, not flash-attn varlen (needs a CUDA GPU), not torch varlen (needs a CUDA GPU)"
    assert str(choose(tiny_llama())) == told
    assert str(choose(gemma2())).endswith("not SDPA per document (cannot cap scores)")
    assert str(choose(gpt_oss())).endswith("not SDPA per document (has no attention sinks)")


@pytest.mark.parametrize(
    ("capability", "dtype", "installed", "config", "expected"),
    [
        ((9, 0), torch.bfloat16, True, {}, "posttrain_flash"),
        ((9, 0), torch.bfloat16, True, {"attn_logit_softcapping": 50.0}, "posttrain_flash"),
        ((8, 0), torch.bfloat16, False, {}, "posttrain_varlen"),
        ((8, 0), torch.bfloat16, False, {"attention_dropout": 0.1}, "posttrain_documents"),
        ((8, 0), torch.bfloat16, False, {"attn_logit_softcapping": 50.0}, "eager"),
        ((9, 0), torch.float32, True, {}, "posttrain_documents"),
        ((7, 5), torch.float16, True, {}, "posttrain_documents"),
    ],
)
def test_on_a_gpu_the_fastest_that_fits_is_chosen(
    capability: tuple[int, int],
    dtype: torch.dtype,
    installed: bool,
    config: dict[str, Any],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: object() if installed else None)
    choice = choose(on_cuda(capability, dtype, monkeypatch, **config))
    assert choice.kernel.name == expected
    assert len(choice.passed_over) == [kernel.name for kernel in kernels.KERNELS].index(expected)


def variable_lengths(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """What the kernels for variable lengths are documented to compute, from their own arguments, in plain torch."""
    bounds = options.get("cu_seqlens_q", options.get("cu_seq_q"))
    longest = options.get("max_seqlen_q", options.get("max_q"))
    scale = options.get("softmax_scale", options.get("scale"))
    left, right = options["window_size"]
    assert right == 0 or options.get("causal")
    assert bounds.dtype == torch.int32
    assert longest == int(bounds.diff().max())
    pieces = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        q, k, v = (part[start:end].transpose(0, 1)[None] for part in (query, key, value))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None]
        seen = (distance >= 0) & ((left < 0) | (distance <= left))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        pieces.append(attended[0].transpose(0, 1))
    return torch.cat(pieces)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kernel", [kernels.flash_attention, kernels.varlen_attention])
def test_kernels_for_variable_lengths_are_told_where_documents_lie(
    kernel: Any, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash = ModuleType("flash_attn")
    flash.flash_attn_varlen_func = variable_lengths  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", variable_lengths)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 30, 8, generator=generator)
    key, value = torch.randn(2, 1, 2, 30, 8, generator=generator)
    documents = Documents.of(LENGTHS, query.device)
    module = copy.deepcopy(tiny_llama())
    options: dict[str, Any] = {"documents": documents, "scaling": 0.3, "sliding_window": window}
    actual, _ = kernel(module, query, key, value, None, **options)
    expected, _ = kernels.document_attention(module, query, key, value, None, **options)
    assert actual.shape == expected.shape == (1, 30, 4, 8)
    assert relative(actual, expected) <= 1e-6


def test_kernels_are_chosen_by_the_arithmetic_not_by_the_stored_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    model = on_cuda((9, 0), torch.float32, monkeypatch)
    assert choose(model).kernel.name == "posttrain_documents", "weights of float32 are multiplied as such"
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    assert choose(model).kernel.name == "posttrain_varlen", "trained weights are float32, and multiplied in bfloat16"


def test_kernels_get_the_number_format_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.dtype] = []

    def varlen_attn(query_TNH: torch.Tensor, *others: torch.Tensor, **_: Any) -> torch.Tensor:
        given.extend(each.dtype for each in (query_TNH, *others))
        return query_TNH

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    query_BNTH, key_BKTH, value_BKTH = (torch.randn(1, 2, 5, 8) for _ in range(3))
    documents = Documents.of([2, 3], query_BNTH.device)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # the rotation of queries and keys gives float32 even there
        kernels.varlen_attention(
            torch.nn.Module(), query_BNTH, key_BKTH, value_BKTH.bfloat16(), None, documents=documents
        )
    assert given == [torch.bfloat16] * 3


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_training_of_all_weights_chooses_by_its_arithmetic(
    compute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[torch.dtype, torch.dtype]] = []

    def obstacle(causal: PreTrainedModel) -> str:
        asked.append((causal.dtype, kernels.arithmetic_of(causal)))
        return "not here"

    first = kernels.Kernel(name="first", summary="first", obstacle=obstacle)
    monkeypatch.setattr(kernels, "KERNELS", (first, *kernels.KERNELS))
    model = load_trainable(base_source(write_base(tmp_path / "base")), "bfloat16")
    run = training(model, tmp_path / "run", dtype="bfloat16", compute_dtype=Dtype(compute), max_steps=1)
    run.run()
    assert asked == [(torch.float32, getattr(torch, compute))], "trained weights are held in float32"
