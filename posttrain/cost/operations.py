"""The operations that the loss of an optimizer step asks of a model: its model FLOPs.

    weights      2 for each token forward, 2 for the gradient of the input, 2 more for that of a trained weight
    projection   the same, for the tokens alone that predict a scored one
    attention    4 times the queries' width for each pair of tokens that see each other, forward; twice as much backward

So an adapter takes 4 operations for each weight of the model and token, and full fine-tuning 6. What a device computes
besides does not count: layers again for lack of memory, norms, softmax, the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from posttrain.cost.architecture import Architecture

Family = tuple[int, Sequence[int]]
"""Tokens of a document, and of each continuation of it: a prompt with its answers."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Documents that pass a model."""

    families: Sequence[Family]
    scored: int
    """Tokens whose predictions are scored."""
    graph: bool = True
    """False for a pass without a gradient."""


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Operations of a model in training, for a token and for a pair of tokens."""

    model: Architecture
    adapter: int | None
    """Weights of the adapter that a token passes; None where all weights are trained."""

    def of(self, works: Iterable[Work]) -> int:
        """Return the operations of all ``works``."""
        return sum(self._of(each) for each in works)

    def _of(self, work: Work) -> int:
        adapted = self.adapter is not None
        frozen = 2 if not work.graph else 4 if adapted else 6
        tokens = sum(prompt + sum(answers) for prompt, answers in work.families)
        weights = frozen * self.model.active + (6 if work.graph else 2) * (self.adapter or 0)
        projection = frozen * self.model.vocabulary * self.model.width
        pairs = sum(_pairs(work.families, window) for window in self.model.windows)
        return tokens * weights + work.scored * projection + (12 if work.graph else 4) * self.model.queries * pairs


def _pairs(families: Iterable[Family], window: int | None) -> int:
    """Count the pairs of a token and one that it sees, itself among them; a prompt's once for all of its answers."""
    return sum(
        _seen(prompt, window) + sum(_seen(prompt + answer, window) - _seen(prompt, window) for answer in answers)
        for prompt, answers in families
    )


def _seen(tokens: int, window: int | None) -> int:
    near = tokens if window is None else min(tokens, window)
    return near * (near + 1) // 2 + (tokens - near) * near
