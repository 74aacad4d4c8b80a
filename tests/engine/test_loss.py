"""The loss and its gradient, against float64 and against every other way of cutting the same batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from posttrain.engine.attention import install, packed_hidden
from posttrain.engine.batches import Batch
from posttrain.engine.loss import OutputHead, summed_cross_entropy
from posttrain.errors import BadInput
from posttrain.tokens.packing import PackedRow
from tests.support.tiny import documents_of, packed_rows, tiny_llama

ROWS = packed_rows([3, 1, 4, 2, 5])
CPU = torch.device("cpu")
TRAINED = sum(int((row.targets() != -100).sum()) for row in ROWS)


def reference(model: torch.nn.Module, rows: Sequence[PackedRow]) -> tuple[float, torch.Tensor]:
    """Mean loss and gradient in float64: each document alone, all of its logits, transformers' own attention."""
    exact = copy.deepcopy(model).double()
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        for document in documents_of(row):
            logits = exact(input_ids=torch.from_numpy(document.input_ids)[None].long(), use_cache=False).logits[0]
            targets = torch.from_numpy(document.targets()).long()
            total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    (total / TRAINED).backward()
    return float(total.detach()) / TRAINED, gradient(exact)


def ours(model: torch.nn.Module, batches: Sequence[Sequence[PackedRow]], chunk: int) -> tuple[float, torch.Tensor]:
    """Mean loss and gradient as the training loop adds them up over ``batches``."""
    model = copy.deepcopy(model)
    install(model)
    model.train()
    head, total = OutputHead.of(model), 0.0
    for rows in batches:
        batch = Batch.of(rows, CPU)
        hidden = packed_hidden(model, batch.ids, batch.lengths)
        loss = summed_cross_entropy(head, hidden[batch.trained], batch.targets, chunk)
        (loss / TRAINED).backward()
        total += loss.item()
    return total / TRAINED, gradient(model)


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("batches", "chunk"),
    [
        ([ROWS], 1024),
        ([ROWS], 7),
        ([ROWS[:2], ROWS[2:]], 1024),
        ([[row] for row in ROWS], 16),
        ([[document] for row in ROWS for document in documents_of(row)], 1),
        ([[document for row in ROWS for document in documents_of(row)]], 1024),
    ],
    ids=["one batch", "chunks", "two micro-batches", "row by row", "document by document", "unpacked in one batch"],
)
def test_loss_and_gradient_equal_float64(tied: bool, batches: list[list[PackedRow]], chunk: int) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    expected_loss, expected = reference(model, ROWS)
    loss, actual = ours(model, batches, chunk)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert distance(actual, expected) <= 1e-6


def test_gradient_checkpointing_recomputes_layers_and_changes_no_gradient() -> None:
    model = tiny_llama()
    _, expected = ours(model, [ROWS], 16)
    model.activation_checkpointing_enable()
    calls: list[object] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *inputs: calls.append(inputs[0]))
    _, actual = ours(model, [ROWS], 16)
    probes = 3
    assert len(calls) == probes + 2
    assert distance(actual, expected) <= 1e-6


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("frozen", [False, True])
def test_logits_of_a_whole_row_are_never_held(frozen: bool) -> None:
    model = tiny_llama(vocab_size=4096)
    install(model)
    head = OutputHead.of(model)
    model.lm_head.weight.requires_grad_(not frozen)
    hidden = torch.randn(64, 32, requires_grad=True)
    with Largest() as largest:
        summed_cross_entropy(head, hidden, torch.arange(64), 8).backward()
    assert largest.elements <= 32 * 4096, "more than the head's own weight"


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_of_every_kind_of_head_is_autograds(scale: float, softcap: float | None, bias: bool) -> None:
    torch.manual_seed(0)
    projection = torch.nn.Linear(16, 50, bias=bias, dtype=torch.float64)
    hidden, targets = torch.randn(21, 16, dtype=torch.float64, requires_grad=True), torch.randint(50, (21,))
    head = OutputHead(projection, scale, softcap)
    inputs = [hidden, *projection.parameters()]
    logits = projection(hidden) * scale
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    actual = summed_cross_entropy(head, hidden, targets, 8)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-12)
    weighted = 0.5 * actual, 0.5 * expected
    for got, wanted in zip(*(torch.autograd.grad(loss, inputs) for loss in weighted), strict=True):
        assert distance(got, wanted) <= 1e-12


def test_retrained_tokens_of_a_tied_head_have_their_gradient() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    settings = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 6]})
    adapted = get_peft_model(model, settings)
    assert OutputHead.of(adapted.get_base_model()).projection is not model.get_input_embeddings()
    reference_model = copy.deepcopy(adapted)
    ids = torch.tensor([[4, 5, 6, 7, 5, 9]])
    logits = reference_model(input_ids=ids, use_cache=False).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
    install(adapted)
    causal = adapted.get_base_model()
    hidden = packed_hidden(causal, ids, [6])[:-1]
    summed_cross_entropy(OutputHead.of(causal), hidden, ids[0, 1:], 3).backward()
    expected = gradient(reference_model)
    assert distance(gradient(adapted), expected) <= 1e-6
    assert sum("trainable_tokens_delta" in name for name, p in adapted.named_parameters() if p.grad is not None) == 1


def test_an_untrained_document_adds_no_gradient() -> None:
    row = packed_rows([2])[0]
    mask = row.mask.copy()
    mask[: row.lengths[0]] = False
    second = PackedRow(row.input_ids[row.lengths[0] :], row.mask[row.lengths[0] :], row.lengths[1:])
    masked = PackedRow(row.input_ids, mask, row.lengths)
    _, with_untrained = ours(tiny_llama(), [[masked]], 1024)
    _, alone = ours(tiny_llama(), [[second]], 1024)
    assert distance(with_untrained, alone) <= 1e-6


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("CohereForCausalLM", {"logit_scale": 0.25}),
        ("GraniteForCausalLM", {"logits_scaling": 8.0}),
        ("Gemma2ForCausalLM", {"final_logit_softcapping": 5.0, "attn_logit_softcapping": None, "head_dim": 8}),
    ],
)
def test_scaled_and_capped_logits_are_the_models_own(architecture: str, settings: dict[str, float]) -> None:
    import transformers

    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**{**tiny_llama().config.to_dict(), **settings, "pad_token_id": 0})
    torch.manual_seed(0)
    model = model_class(config).eval()
    ids = torch.arange(4, 20)[None]
    expected = model(input_ids=ids, use_cache=False).logits[0]
    install(model)
    actual = OutputHead.of(model).logits(packed_hidden(model, ids, [16]))
    assert torch.allclose(actual, expected, atol=1e-5)


def test_an_unknown_treatment_of_logits_is_rejected() -> None:
    model = tiny_llama()
    forward = model.forward

    def scaled(**inputs: object) -> object:
        output = forward(**inputs)
        output.logits = output.logits * 1.5
        return output

    model.forward = scaled
    with pytest.raises(BadInput, match="computes packed documents differently"):
        install(model)
