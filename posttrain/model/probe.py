"""What a model computes on a few tokens: left beside what a stage saves, and asked again of what is loaded from it."""

# T = tokens, V = vocabulary

from __future__ import annotations

from collections.abc import Sequence

import torch

LENGTH = 24
"""Tokens of a probe besides those that were added to the vocabulary."""


def random_ids(vocabulary: int, added: Sequence[int] = ()) -> torch.Tensor:
    """Ids [1, T] of tokens from all over the vocabulary, always the same ones, among them every added token."""
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(vocabulary, (LENGTH,), generator=generator)
    return torch.cat([ids_T, torch.tensor(list(added), dtype=ids_T.dtype)])[None]


def difference(found_TV: torch.Tensor, expected_TV: torch.Tensor) -> float:
    """Root mean square of the difference of logits, relative to the spread of the expected ones."""
    expected_TV = expected_TV.double()
    spread = (expected_TV - expected_TV.mean()).norm()
    return float((found_TV.double() - expected_TV).norm() / spread)
