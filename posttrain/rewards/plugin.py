"""Registers the shipped rewards, through the same hook as every other reward."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.hookspecs import hookimpl
from posttrain.rewards.reward import Reward
from posttrain.rewards.shipped import rewards


@hookimpl
def register_rewards() -> Sequence[Reward]:
    """Return the shipped rewards."""
    return rewards()
