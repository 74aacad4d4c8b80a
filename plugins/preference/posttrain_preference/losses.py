"""The losses of DPO: what each is called, which settings it reads, and its value where policy and reference agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

LN_2 = math.log(2)

AT_REFERENCE: Mapping[str, Callable[[float, float], float]] = {
    "sigmoid": lambda beta, smoothing: LN_2,
    "hinge": lambda beta, smoothing: 1.0,
    "ipo": lambda beta, smoothing: 1 / (4 * beta**2),
    "exo_pair": lambda beta, smoothing: -LN_2 - (math.log1p(-smoothing) + math.log(smoothing)) / 2,
    "nca_pair": lambda beta, smoothing: 2 * LN_2,
    "robust": lambda beta, smoothing: LN_2,
    "bco_pair": lambda beta, smoothing: 2 * LN_2,
    "sppo_hard": lambda beta, smoothing: 1 / (2 * beta**2),
    "aot": lambda beta, smoothing: LN_2,
    "aot_unpaired": lambda beta, smoothing: LN_2,
    "apo_zero": lambda beta, smoothing: 1.0,
    "apo_down": lambda beta, smoothing: 1.0,
    "discopop": lambda beta, smoothing: (LN_2 + 1) / 2,
    "sigmoid_norm": lambda beta, smoothing: LN_2,
}
"""Value of each loss, from beta and label_smoothing, when every log-probability equals the reference's."""

SFT = "sft"
"""Negative log-likelihood of the chosen answers, per token: no comparison, so no fixed value at the reference."""
NAMES = (*AT_REFERENCE, SFT)
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
"""Losses that read label_smoothing."""
SORTED = ("aot", "aot_unpaired")
"""Losses that sort the log-probability ratios of a batch: in a batch of one they are the sigmoid loss."""
