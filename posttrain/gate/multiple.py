"""Several lifts at once: the chance of claiming any lift that is none stays below the error of a single one.

Source: S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979)
65-70.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

LowAt = Callable[[float], float]
"""The lower bound at a one-sided confidence; it falls as the confidence grows."""


@dataclass(frozen=True)
class Claim:
    """Whether a lift may be claimed beside the others."""

    passed: bool
    low: float
    """The adjusted lower bound: above the threshold where the lift is claimed, or at it while another one is not."""


def holm(lows: Sequence[LowAt], thresholds: Sequence[float], confidence: float) -> list[Claim]:
    """Which of several lower bounds exceed their thresholds, with bounds that agree with it.

    As long as some lift exceeds its threshold at the error divided by the number of open ones, it is claimed and no
    longer open. All true lifts lie above the adjusted bounds at once with ``confidence``: those of open lifts are taken
    at the error divided by their number; of claimed ones nothing but the claim is said until all are claimed. Source:
    K. Strassburger, F. Bretz, Compatible simultaneous lower confidence bounds for the Holm procedure and other
    Bonferroni-based closed tests, Statistics in Medicine 27 (2008) 4914-4927.
    """
    error = 1 - confidence
    unclaimed = set(range(len(lows)))
    while claimed := {i for i in unclaimed if lows[i](1 - error / len(unclaimed)) > thresholds[i]}:
        unclaimed -= claimed

    def adjusted(i: int) -> float:
        if i in unclaimed:
            return lows[i](1 - error / len(unclaimed))
        return thresholds[i] if unclaimed else max(thresholds[i], lows[i](1 - error / len(lows)))

    return [Claim(i not in unclaimed, adjusted(i)) for i in range(len(lows))]
