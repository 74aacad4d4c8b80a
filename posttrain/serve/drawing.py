"""The next token of every row, from its logits: the likeliest one, or one drawn with the row's own random numbers."""

# B = rows, V = vocabulary, K = reported tokens

from __future__ import annotations

from collections.abc import Sequence

import torch

from posttrain.serve.ask import Sampling, Token


def generator_of(sampling: Sampling) -> torch.Generator | None:
    """Return the random numbers of one answer; None when none are drawn."""
    return torch.Generator().manual_seed(sampling.seed % 2**63) if sampling.temperature > 0 else None


def draw(
    logits_BV: torch.Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator | None]
) -> list[Token | None]:
    """Return the next token of each row; None for a row whose logits are not finite.

    A row's token depends on its own logits and numbers alone, so on no row beside it.
    """
    sound = torch.isfinite(logits_BV).all(-1).tolist()
    best = logits_BV.argmax(-1).tolist()
    found: list[Token | None] = []
    for row, (sampling, generator) in enumerate(zip(samplings, generators, strict=True)):
        if not sound[row]:
            found.append(None)
        elif generator is None and sampling.top_logprobs is None:
            found.append(Token(best[row]))
        else:
            logits_V = logits_BV[row].float().cpu()
            chosen = best[row] if generator is None else _sampled(logits_V, sampling, generator)
            found.append(_reported(logits_V, chosen, sampling.top_logprobs))
    return found


def _sampled(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    chances_V = (logits_V / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        sorted_V, order_V = chances_V.sort(descending=True, stable=True)
        before_V = sorted_V.cumsum(-1) - sorted_V  # the likeliest token always stays
        chances_V = torch.zeros_like(chances_V).scatter(0, order_V, sorted_V.where(before_V < sampling.top_p, 0.0))
    return int(torch.multinomial(chances_V, 1, generator=generator))


def _reported(logits_V: torch.Tensor, chosen: int, count: int | None) -> Token:
    if count is None:
        return Token(chosen)
    logprobs_V = logits_V.log_softmax(-1)
    values_K, ids_K = logprobs_V.topk(min(count, len(logprobs_V)))
    return Token(chosen, float(logprobs_V[chosen]), tuple(zip(ids_K.tolist(), values_K.tolist(), strict=True)))
