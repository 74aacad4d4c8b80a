"""Early decisions: a gate looks at its scores several times and stops at the first look that decides.

Documents are asked in a seeded random order. Testing the growing sample again and again would err far more often than
promised; so every look spends a part of the allowed error, little of it early (O'Brien and Fleming), and all looks
together err no more often than a single one at the end. A gate that can hardly pass any more is stopped as well; that
spends nothing, because it only ever prevents a pass.
"""

# G = points of the grid that the score process is integrated on

from __future__ import annotations

import functools
import math
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from posttrain.gate.evidence import Evidence

HOPELESS = 0.05
"""Chance of passing at the last look, below which a gate stops."""
_STEP = 0.01
"""Width of the grid's cells, in standard deviations at the end; the boundaries are within 2e-4 of published ones."""
_FARTHEST = -8.0
"""Lower end of the grid; the mass below it is under 1e-15."""


@dataclass(frozen=True)
class Look:
    """One of several looks at the scores of a gate."""

    number: int = 1
    """1 for the first."""
    of: int = 1
    """Number of looks."""

    @property
    def last(self) -> bool:
        """True when every document has been asked."""
        return self.number == self.of

    @property
    def share(self) -> float:
        """Share of the documents that have been asked."""
        return self.number / self.of

    def nominal(self, confidence: float) -> float:
        """Return the confidence of a bound at this look that gives all looks together ``confidence``."""
        return confidence if self.of == 1 else _nominal(self.number, self.of, confidence)


def make_looks(count: int) -> list[Look]:
    """Return all looks, the first one first."""
    return [Look(number, count) for number in range(1, count + 1)]


def select_portion(
    documents: Sequence[int], look: Look, seed: int, clusters: Mapping[int, Hashable] | None = None
) -> set[int]:
    """Select the documents of all looks up to this one: the beginning of a seeded order.

    Looks take clusters whole: a part of one would count as evidence of its own, and again with the rest of it.
    """
    groups: dict[Hashable, list[int]] = {}
    for document in sorted(documents):
        groups.setdefault(clusters[document] if clusters else document, []).append(document)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    return {document for group in order[: portion_size(len(order), look)] for document in group}


def select_new(
    documents: Sequence[int], look: Look, seed: int, clusters: Mapping[int, Hashable] | None = None
) -> set[int]:
    """Select the documents that a look adds to the earlier ones."""
    earlier = Look(look.number - 1, look.of)
    return select_portion(documents, look, seed, clusters) - select_portion(documents, earlier, seed, clusters)


def portion_size(documents: int, look: Look) -> int:
    """Return the number of documents, or of clusters, of all looks up to this one, rounded up."""
    return -(-documents * look.number // look.of)


def is_hopeless(evidence: Evidence, threshold: float, look: Look, confidence: float) -> bool:
    """Return whether passing at the end is unlikely even if the truth is the best that the scores allow.

    Conditional power: with B = z sqrt(t) at the share t of the documents, z at the end is normal around B + drift
    (1 - t) with variance 1 - t. The drift is taken at its upper one-sided confidence bound, so that a candidate that
    had bad luck is not stopped. Source: K. K. G. Lan, J. Wittes, The B-value: a tool for monitoring data, Biometrics
    44 (1988) 579-585.
    """
    if look.last or evidence.standard_error == 0:
        return False
    z, share = (evidence.mean - threshold) / evidence.standard_error, look.share
    normal = NormalDist()
    drift = (z + normal.inv_cdf(confidence)) / math.sqrt(share)
    needed = normal.inv_cdf(Look(look.of, look.of).nominal(confidence))
    expected = z * math.sqrt(share) + drift * (1 - share)
    return normal.cdf((expected - needed) / math.sqrt(1 - share)) < HOPELESS


@functools.lru_cache(maxsize=256)
def _nominal(number: int, of: int, confidence: float) -> float:
    shares = tuple(k / of for k in range(1, of + 1))
    return NormalDist().cdf(obrien_fleming(shares, 1 - confidence)[number - 1])


@functools.lru_cache(maxsize=64)
def obrien_fleming(shares: tuple[float, ...], error: float) -> tuple[float, ...]:
    """Return the z for a one-sided test to exceed at each look, in the manner of O'Brien and Fleming.

    ``shares`` are the parts of all documents seen by the looks, rising to 1. Up to share t the error
    2 - 2 Phi(z_{1 - error / 2} / sqrt(t)) is spent, by K. K. G. Lan, D. L. DeMets, Discrete sequential boundaries for
    clinical trials, Biometrika 70 (1983) 659-663. Each boundary is found by integrating the density of the score
    process that no earlier look has stopped, by P. Armitage, C. K. McPherson, B. C. Rowe, JRSS A 132 (1969) 235-244.
    """
    from scipy.optimize import brentq

    # Each look may stop only those processes that no earlier look has stopped; hence one boundary after the other.
    spent = [_spending(share, error) for share in shares]
    process = ScoreProcess()
    boundaries = []
    for look, share in enumerate(shares):
        allowed = spent[look] - (spent[look - 1] if look else 0.0)
        step = share - (shares[look - 1] if look else 0.0)
        edge = brentq(lambda edge, step=step, allowed=allowed: process.beyond(edge, step) - allowed, -8.0, 12.0)
        process.advance(edge, step)
        boundaries.append(edge / math.sqrt(share))
    return tuple(boundaries)


def _spending(share: float, error: float) -> float:
    normal = NormalDist()
    return 2 - 2 * normal.cdf(normal.inv_cdf(1 - error / 2) / math.sqrt(share))


class ScoreProcess:
    """The density, on a grid, of a score process B(t) that no look has stopped so far."""

    def __init__(self, drift: float = 0.0) -> None:
        import numpy as np

        self._drift = drift
        self._grid_G: NDArray[np.float64] = np.zeros(1)
        self._mass_G: NDArray[np.float64] = np.ones(1)
        """Density times width of the grid's cells: all of it at 0 before the first look."""

    def beyond(self, edge: float, step: float) -> float:
        """Return the chance of lying above ``edge`` after ``step`` more of the documents."""
        from scipy.special import ndtr

        return float(self._mass_G @ ndtr((self._grid_G + self._drift * step - edge) / math.sqrt(step)))

    def advance(self, edge: float, step: float) -> None:
        """Add ``step`` of the documents, then drop the part above ``edge``: those processes are stopped."""
        import numpy as np

        points = 2 * math.ceil((edge - _FARTHEST) / _STEP / 2) + 1
        grid_G = np.linspace(_FARTHEST, edge, points)
        # Simpson's rule
        width_G = np.where(np.arange(points) % 2, 4.0, 2.0) * (grid_G[1] - grid_G[0]) / 3
        width_G[[0, -1]] /= 2
        distance_GG = (grid_G[:, None] - self._grid_G[None, :] - self._drift * step) / math.sqrt(step)
        density_GG = np.exp(-(distance_GG**2) / 2) / math.sqrt(2 * math.pi * step)
        self._grid_G, self._mass_G = grid_G, (density_GG @ self._mass_G) * width_G
