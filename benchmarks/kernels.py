"""The kernels of packed attention beside float64: in values, in gradients, and in time. Part of ``gpu.py``."""

# B = 1, N = query heads, K = key and value heads, T = tokens of the row, L = tokens of a document, H = width of a head

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import machine

SHARES = (0.37, 0.22, 0.17, 0.12, 0.07, 0.05)
"""Documents of a row, as shares of its tokens."""


def compare_kernels(small: bool) -> dict[str, Any]:
    """Compare every kernel of packed attention with float64, in values and gradients, and time it."""
    import torch

    from posttrain.engine import attention_kernels as packed

    device, dtype = machine.torch_device(), machine.training_dtype()
    lengths = document_lengths(256 if small else 4096)
    heads, groups, width = (4, 2, 16) if small else (32, 8, 128)
    torch.manual_seed(0)
    total = sum(lengths)
    shapes = [(1, heads, total, width), (1, groups, total, width), (1, groups, total, width)]
    parts = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    sent_BTNH = torch.randn(1, total, heads, width, device=device).to(dtype)
    exact = _attend(_exact_attention, [part.double() for part in parts], sent_BTNH.double(), lengths)
    result: dict[str, Any] = {"documents": lengths, "dtype": str(dtype)}
    candidates: dict[str, Callable[..., Any]] = {
        "flash-attn varlen": packed.flash_attention,
        "torch varlen": packed.varlen_attention,
        "SDPA per document": packed.document_attention,
        "SDPA, one mask": _masked_attention,
    }
    for name, kernel in candidates.items():
        try:
            found = _attend(kernel, parts, sent_BTNH, lengths)
            errors = [float((a.double() - e).norm() / e.norm()) for a, e in zip(found, exact, strict=True)]
            seconds = [_timed(lambda kernel=kernel: _attend(kernel, parts, sent_BTNH, lengths)) for _ in range(10)]
            labelled = dict(zip(("output", "query", "key", "value"), errors, strict=True))
            result[name] = {"relative_error": labelled, "milliseconds": 1000 * statistics.median(seconds[2:])}
        except Exception as error:
            result[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
    return result


def _attend(
    kernel: Callable[..., Any], parts: Sequence[Any], sent_BTNH: Any, lengths: Sequence[int]
) -> tuple[Any, ...]:
    """Return the attended values and the gradients of query, key and value for the gradient ``sent_BTNH``."""
    import torch

    from posttrain.engine.attention_kernels import Documents

    inputs = [part.detach().requires_grad_() for part in parts]
    documents = Documents.of(lengths, inputs[0].device)
    output_BTNH = kernel(torch.nn.Module(), *inputs, None, documents=documents)[0]
    return output_BTNH.detach(), *torch.autograd.grad(output_BTNH, inputs, sent_BTNH)


def _exact_attention(module: Any, *parts_BNTH: Any, documents: Any) -> tuple[Any, None]:
    """Attend in plain products and a softmax, document by document."""
    import torch

    repeats = parts_BNTH[0].shape[1] // parts_BNTH[1].shape[1]
    query_BNTH, (key_BNTH, value_BNTH) = parts_BNTH[0], [part.repeat_interleave(repeats, 1) for part in parts_BNTH[1:3]]
    pieces = []
    for query, key, value in zip(
        *(part.split(documents.lengths, 2) for part in (query_BNTH, key_BNTH, value_BNTH)), strict=True
    ):
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        hidden = torch.ones(scores.shape[-2:], device=scores.device).triu(1).bool()
        pieces.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value)
    return torch.cat(pieces, 2).transpose(1, 2), None


def _masked_attention(module: Any, *parts_BNTH: Any, documents: Any) -> tuple[Any, None]:
    import torch

    lengths = torch.tensor(documents.lengths)
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    seen_TT = (document_T[:, None] == document_T[None]).tril().to(parts_BNTH[0].device)
    query, key, value = parts_BNTH[:3]
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen_TT, enable_gqa=True)
    return attended.transpose(1, 2), None


def document_lengths(tokens: int) -> list[int]:
    """Return the lengths of the documents of a row."""
    lengths = [int(tokens * share) for share in SHARES[1:]]
    return [tokens - sum(lengths), *lengths]


def _timed(compute: Callable[[], Any]) -> float:
    start = machine.now()
    compute()
    return machine.now() - start
