"""The kernels for causal attention within each document of a packed row, fastest first, and the choice of one.

All but the last compute each document by itself: time and memory grow with the squares of documents, not of
rows, and no mask can be forgotten. Nothing here knows the rest of the model: attention.py installs and proves a kernel.
"""

# B = rows (always 1), N = query heads, K = key and value heads, T = tokens of all documents, H = width of a head,
# L = tokens of one document

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

from posttrain.engine.ahead import on_device

MASKED = "eager"
"""transformers' own attention, with a mask over the whole row."""

AttentionResult = tuple[torch.Tensor, None]
Family = tuple[int, Sequence[int]]
"""Tokens of a prompt, and of each answer to it: documents that begin alike."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel, as transformers knows it."""

    name: str
    """Its name in transformers' registry."""
    summary: str
    obstacle: Callable[[PreTrainedModel], str]
    """Returns the reason against it for a model on this machine; empty when there is none."""
    shares: bool = False
    """True when documents may begin with the same tokens, held once."""


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The documents of a row, in the forms the kernels take."""

    lengths: tuple[int, ...]
    bounds: torch.Tensor
    """The start of each and the end of the last, int32 [documents + 1], on the model's device."""
    longest: int
    pieces: tuple[int, ...] = ()
    """Tokens of each piece of the row, a prompt or what follows it, where documents share some."""
    order: tuple[int, ...] = ()
    """The numbers of the pieces that the documents are made of, one document after another."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Documents:
        """Return documents of ``lengths`` tokens, one after another."""
        bounds = on_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)
        return cls(lengths=tuple(lengths), bounds=bounds, longest=max(lengths))

    @classmethod
    def sharing(cls, families: Sequence[Family], device: torch.device) -> Documents:
        """Return the documents of ``families``: the tokens of a prompt once, then those of each answer to it.

        row         p0 p1 p2 | a0 a1 | b0              pieces 3, 2, 1
        documents   p0 p1 p2   a0 a1 | p0 p1 p2   b0   order  0, 1, 0, 2
        """
        pieces: list[int] = []
        order: list[int] = []
        for prompt, answers in families:
            first = len(pieces)
            pieces += [prompt, *answers]
            for place in range(len(answers)):
                order += [first, first + 1 + place]
        plain = cls.of([prompt + answer for prompt, answers in families for answer in answers], device)
        if all(len(answers) == 1 for _, answers in families):
            return plain
        return replace(plain, pieces=tuple(pieces), order=tuple(order))

    def apart(self, row_BNTH: torch.Tensor) -> torch.Tensor:
        """Return the queries, keys or values of a row with those of shared tokens in each of their documents."""
        # by pieces, not by the index of each token: the gradient of a shared one is then summed in a fixed order
        pieces = row_BNTH.split(self.pieces, 2)
        return torch.cat([pieces[number] for number in self.order], 2)

    def together(self, attended_BTNH: torch.Tensor) -> torch.Tensor:
        """Return the row of what the documents' tokens attended to; a shared token as in its first document."""
        found: dict[int, torch.Tensor] = {}
        for number, piece in zip(
            self.order, attended_BTNH.split([self.pieces[number] for number in self.order], 1), strict=True
        ):
            found.setdefault(number, piece)
        return torch.cat([found[number] for number in range(len(self.pieces))], 1)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The kernel of a model, and those passed over."""

    kernel: Kernel
    passed_over: tuple[str, ...]
    """Each faster kernel, with the reason against it."""

    def __str__(self) -> str:
        return ", ".join([self.kernel.summary, *(f"not {reason}" for reason in self.passed_over)])


def choose(causal: PreTrainedModel) -> Choice:
    """Return the first kernel that ``causal`` can use here; the last fits every model."""
    obstacles = [(kernel, kernel.obstacle(causal)) for kernel in KERNELS]
    usable = next(place for place, (_, obstacle) in enumerate(obstacles) if not obstacle)
    passed_over = tuple(f"{kernel.summary} ({obstacle})" for kernel, obstacle in obstacles[:usable])
    return Choice(kernel=KERNELS[usable], passed_over=passed_over)


def for_shared_tokens(attend: Callable[..., AttentionResult]) -> Callable[..., AttentionResult]:
    """Return ``attend`` for documents that may share tokens: their queries, keys and values are spread for it alone.

    Attention then takes as long as for separate documents, and gives the same numbers; every other part of the model,
    most of the work, sees a shared token once.
    """

    @wraps(attend)
    def attend_shared(
        module: torch.nn.Module,
        query_BNTH: torch.Tensor,
        key_BKTH: torch.Tensor,
        value_BKTH: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        documents: Documents,
        **settings: Any,
    ) -> AttentionResult:
        if not documents.order:
            return attend(module, query_BNTH, key_BKTH, value_BKTH, attention_mask, documents=documents, **settings)
        apart = [documents.apart(each) for each in (query_BNTH, key_BKTH, value_BKTH)]
        attended_BTNH, _ = attend(module, *apart, attention_mask, documents=documents, **settings)
        return documents.together(attended_BTNH), None

    return attend_shared


@for_shared_tokens
def flash_attention(
    module: torch.nn.Module,
    query_BNTH: torch.Tensor,
    key_BKTH: torch.Tensor,
    value_BKTH: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    documents: Documents,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> AttentionResult:
    """Attend by flash-attn's kernel for documents of different lengths (arXiv:2307.08691)."""
    from flash_attn import flash_attn_varlen_func

    attended_TNH = flash_attn_varlen_func(
        *_flat(query_BNTH, key_BKTH, value_BKTH),
        cu_seqlens_q=documents.bounds,
        cu_seqlens_k=documents.bounds,
        max_seqlen_q=documents.longest,
        max_seqlen_k=documents.longest,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=_window(sliding_window),
        softcap=softcap or 0.0,
    )
    return attended_TNH[None], None


@for_shared_tokens
def varlen_attention(
    module: torch.nn.Module,
    query_BNTH: torch.Tensor,
    key_BKTH: torch.Tensor,
    value_BKTH: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    documents: Documents,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> AttentionResult:
    """Attend by torch's own kernel for documents of different lengths."""
    from torch.nn.attention.varlen import varlen_attn

    query_TNH, key_TKH, value_TKH = _flat(query_BNTH, key_BKTH, value_BKTH)
    attended_TNH = varlen_attn(
        query_TNH,
        key_TKH,
        value_TKH,
        cu_seq_q=documents.bounds,
        cu_seq_k=documents.bounds,
        max_q=documents.longest,
        max_k=documents.longest,
        scale=scaling,
        window_size=_window(sliding_window),
        enable_gqa=query_BNTH.shape[1] != key_BKTH.shape[1],
    )
    return cast(torch.Tensor, attended_TNH)[None], None


@for_shared_tokens
def document_attention(
    module: torch.nn.Module,
    query_BNTH: torch.Tensor,
    key_BKTH: torch.Tensor,
    value_BKTH: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    documents: Documents,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> AttentionResult:
    """Attend by torch's scaled dot-product attention, document by document."""
    lengths = documents.lengths
    attended = [
        F.scaled_dot_product_attention(
            query_BNLH,
            key_BKLH,
            value_BKLH,
            attn_mask=(mask := _window_mask(query_BNLH.shape[2], sliding_window, query_BNLH.device)),
            is_causal=mask is None,  # without a mask torch takes its fused kernels, and makes no [L, L] tensor
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query_BNTH.shape[1] != key_BKTH.shape[1],
        )
        for query_BNLH, key_BKLH, value_BKLH in zip(
            query_BNTH.split(lengths, 2), key_BKTH.split(lengths, 2), value_BKTH.split(lengths, 2), strict=True
        )
    ]
    return torch.cat([piece_BNLH.transpose(1, 2) for piece_BNLH in attended], 1), None


def row_mask(causal: PreTrainedModel, documents: Documents) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return the summand of a row's scores, [1, 1, T, T]: 0 for the tokens a token sees, else a huge negative number.

    A model with layers of several kinds, full and sliding, gets a mask for each kind.
    """
    config = causal.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if not kinds:
        return _block_mask(documents, window, causal.dtype)
    return {kind: _block_mask(documents, window if "sliding" in kind else None, causal.dtype) for kind in kinds}


def _block_mask(documents: Documents, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    device = documents.bounds.device
    lengths = torch.tensor(documents.lengths)
    document_T = on_device(torch.repeat_interleave(torch.arange(len(lengths)), lengths), device)
    position_T = torch.arange(len(document_T), device=device)
    distance_TT = position_T[:, None] - position_T[None]
    seen_TT = (document_T[:, None] == document_T[None]) & (distance_TT >= 0)
    if window is not None:
        seen_TT &= distance_TT < window
    # the smallest number, not -infinity: a row of -infinity alone would be NaN after softmax
    blocked = torch.zeros(seen_TT.shape, dtype=dtype, device=device)
    return blocked.masked_fill_(~seen_TT, torch.finfo(dtype).min)[None, None]


def arithmetic_of(causal: PreTrainedModel) -> torch.dtype:
    """Return the number format that ``causal`` multiplies in: autocast's inside of it, else that of the weights."""
    kind = causal.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else causal.dtype


def _flat(*tensors_BNTH: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return [1, N, T, H] as [T, N, H], in the number format of autocast inside of it: it knows no such kernels."""
    kind = tensors_BNTH[0].device.type
    if torch.is_autocast_enabled(kind):
        tensors_BNTH = tuple(each_BNTH.to(torch.get_autocast_dtype(kind)) for each_BNTH in tensors_BNTH)
    return [tensor_BNTH[0].transpose(0, 1) for tensor_BNTH in tensors_BNTH]


def _window(sliding_window: int | None) -> tuple[int, int]:
    """Return the tokens seen to the left, -1 for all, and to the right; sliding_window counts the token itself."""
    return (-1, 0) if sliding_window is None else (sliding_window - 1, 0)


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return the visible pairs of a document's tokens, [L, L]; None when a sliding window hides none."""
    if window is None or length <= window:
        return None
    position_L = torch.arange(length, device=device)
    distance_LL = position_L[:, None] - position_L[None, :]
    return (distance_LL >= 0) & (distance_LL < window)


def _without_flash(causal: PreTrainedModel) -> str:
    if obstacle := _without_tensor_cores(causal):
        return obstacle
    if find_spec("flash_attn") is None:
        return "not installed"
    return "has no attention sinks" if _sinks(causal) else ""


def _without_varlen(causal: PreTrainedModel) -> str:
    if obstacle := _without_tensor_cores(causal):
        return obstacle
    if getattr(causal.config.get_text_config(), "attention_dropout", 0.0):
        return "has no dropout"
    return _special_scores(causal)


def _without_tensor_cores(causal: PreTrainedModel) -> str:
    if causal.device.type != "cuda":
        return "needs a CUDA GPU"
    if torch.cuda.get_device_capability(causal.device) < (8, 0):
        return "needs an Ampere GPU or newer"
    return "" if arithmetic_of(causal) in (torch.bfloat16, torch.float16) else "needs bfloat16"


def _special_scores(causal: PreTrainedModel) -> str:
    if getattr(causal.config.get_text_config(), "attn_logit_softcapping", None):
        return "cannot cap scores"
    return "has no attention sinks" if _sinks(causal) else ""


# learned scores beside those of the tokens (arXiv:2309.17453): these kernels would silently leave them out
def _sinks(causal: PreTrainedModel) -> bool:
    return any(name.endswith(".sinks") for name, _ in causal.named_parameters())


KERNELS = (
    Kernel(name="posttrain_flash", summary="flash-attn varlen", obstacle=_without_flash, shares=True),
    Kernel(name="posttrain_varlen", summary="torch varlen", obstacle=_without_varlen, shares=True),
    Kernel(name="posttrain_documents", summary="SDPA per document", obstacle=_special_scores, shares=True),
    Kernel(name=MASKED, summary="one block mask per row", obstacle=lambda causal: ""),
)

ALONE = Kernel(name="posttrain_alone", summary="each document alone", obstacle=lambda causal: "")
"""The way of a model that no kernel fits."""

AttentionInterface.register("posttrain_flash", flash_attention)
AttentionInterface.register("posttrain_varlen", varlen_attention)
AttentionInterface.register("posttrain_documents", document_attention)
