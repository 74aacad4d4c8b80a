"""Attention for packed rows: every document sees itself and nothing else.

Each document of a row is its own causal attention, so memory and time grow with the square of a document, not of a row,
and there is no mask that could be forgotten. transformers' own isolation needs position ids that restart, no attention
mask and no cache all at once, and leaks in silence when one is missing.
"""

# B = rows (always 1), N = query heads, K = key and value heads, T = tokens of all documents, H = width of a head,
# L = tokens of one document, D = width

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AttentionInterface, PreTrainedModel

from posttrain.errors import BadInput, Problem

NAME = "posttrain_packed"


def packed_attention(
    module: torch.nn.Module,
    query_BNTH: torch.Tensor,
    key_BKTH: torch.Tensor,
    value_BKTH: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    document_lengths: Sequence[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document of one row; ``document_lengths`` adds up to T.

    Has the signature that transformers gives attention functions and returns its result as [B, T, N, H]. Raises
    BadInput for the variants of attention that it does not compute (capped scores, sinks).
    """
    if softcap is not None or s_aux is not None:
        variant = "caps attention scores" if softcap is not None else "has attention sinks"
        raise BadInput(Problem(where="model.path", what=f"the model {variant}, which sft cannot train"))
    lengths = list(document_lengths)
    attended = [
        F.scaled_dot_product_attention(
            query_BNLH,
            key_BKLH,
            value_BKLH,
            attn_mask=(mask := _window_mask(query_BNLH.shape[2], sliding_window, query_BNLH.device)),
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query_BNTH.shape[1] != key_BKTH.shape[1],
        )
        for query_BNLH, key_BKLH, value_BKLH in zip(
            query_BNTH.split(lengths, 2), key_BKTH.split(lengths, 2), value_BKTH.split(lengths, 2), strict=True
        )
    ]
    return torch.cat(attended, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, packed_attention)


def install(model: PreTrainedModel | PeftModel) -> None:
    """Make ``model`` use packed attention, and prove on two short documents that it still computes what it did before.

    Raises BadInput when the architecture lets one packed document change another, or computes its logits in a way that
    the loss does not follow.
    """
    from posttrain.sft.loss import OutputHead

    causal = causal_model(model)
    _refuse_chunks(causal)
    documents = _probe_documents(causal)
    training = model.training
    model.eval()
    with torch.no_grad():
        expected = torch.cat([model(input_ids=ids_BT, use_cache=False).logits[0] for ids_BT in documents])
        causal.set_attn_implementation(NAME)
        hidden = packed_hidden(causal, torch.cat(documents, 1), [ids_BT.shape[1] for ids_BT in documents])
        actual = OutputHead.of(causal).logits(hidden)
    model.train(training)
    _check_equal(actual, expected.float(), causal)


def packed_hidden(causal: PreTrainedModel, ids_BT: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Last hidden states [T, D] of documents of ``lengths`` tokens that lie one after another in ``ids_BT`` [1, T]."""
    positions_BT = torch.cat([torch.arange(length) for length in lengths])[None].to(ids_BT.device)
    output = causal.get_decoder()(
        input_ids=ids_BT, position_ids=positions_BT, use_cache=False, document_lengths=tuple(lengths)
    )
    hidden_TD: torch.Tensor = output.last_hidden_state[0]
    return hidden_TD


def causal_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The language model itself, with an adapter's layers in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _refuse_chunks(causal: PreTrainedModel) -> None:
    # these layers do not hand their chunk to the attention function, and the probe is too short to notice
    if getattr(causal.config.get_text_config(), "attention_chunk_size", None):
        raise BadInput(Problem(where="model.path", what="the model attends in chunks, which sft cannot train"))


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which tokens of a document see which, when a sliding window hides some; otherwise None."""
    if window is None or length <= window:
        return None
    position_L = torch.arange(length, device=device)
    distance_LL = position_L[:, None] - position_L[None, :]
    return (distance_LL >= 0) & (distance_LL < window)


def _probe_documents(causal: PreTrainedModel) -> list[torch.Tensor]:
    vocabulary = causal.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (1, size), generator=generator).to(causal.device) for size in (13, 7)]


def _check_equal(actual_TV: torch.Tensor, expected_TV: torch.Tensor, causal: PreTrainedModel) -> None:
    # root mean square, relative to the spread: rounding is about 1e-6 in float32 and 1e-2 in bfloat16, a leak about 1
    error = (actual_TV - expected_TV).norm() / (expected_TV - expected_TV.mean()).norm()
    limit = 0.1 if causal.dtype == torch.bfloat16 else 1e-3
    if not error <= limit:
        raise BadInput(
            Problem(
                where="model.path",
                what=f"{type(causal).__name__} computes packed documents differently (by {error:.1g} of the spread)",
                fix="Use a decoder model that mixes tokens by attention alone",
            )
        )
