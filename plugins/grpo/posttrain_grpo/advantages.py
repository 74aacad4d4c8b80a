"""Advantages of answers over the others to their question. No torch: a few numbers a step."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

LEAST_SPREAD = 1e-4
"""Added to a spread that divides, as TRL has it: rewards that hardly differ shall not be blown up."""


def advantages(rewards: Sequence[Sequence[float]], scale: str) -> list[list[float]]:
    """Return each reward over the mean of its group, divided by the spread that ``scale`` names."""
    flat = [value for group in rewards for value in group]
    overall = stdev(flat) if len(flat) > 1 else 0.0
    found = []
    for group in rewards:
        spread = {"group": stdev(group), "batch": overall, "none": 1 - LEAST_SPREAD}[scale]
        mean = fmean(group)
        found.append([(value - mean) / (spread + LEAST_SPREAD) for value in group])
    return found
