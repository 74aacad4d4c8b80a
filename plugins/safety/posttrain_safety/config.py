"""Settings of the safety stage: schema, default and help in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain import FineTuneConfig, from_variant


@dataclass(kw_only=True)
class SafetySettings(FineTuneConfig):
    """Fine-tuning of the promoted parent on declining and helpful answers; every setting of SFT's loop holds."""

    lr: float = from_variant(adapter=1e-4, full=5e-6)
    """Peak learning rate: half of SFT's."""
    refusal_share: float = 0.5
    """Share of declining answers among the trained records; the others are helpful. An epoch has as many as data."""

    def problems(self) -> Sequence[tuple[str, str]]:
        """Values outside their range, each as (setting, what is wrong)."""
        found = list(super().problems())
        if not 0.0 < self.refusal_share < 1.0:  # NaN is in no range
            what = f"must be above 0 and below 1, not {self.refusal_share}: a model needs to see both kinds"
            found.append(("refusal_share", what))
        return found
