"""Settings of the safety stage: schema, default and help in one."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain import FineTuneConfig, from_variant, number


@dataclass(kw_only=True)
class SafetySettings(FineTuneConfig):
    """Fine-tuning of the promoted parent on declining and helpful answers; every setting of SFT's loop holds."""

    lr: float = from_variant(adapter=1e-4, full=5e-6)
    """Peak learning rate: half of SFT's."""
    refusal_share: float = number(0.5, above=0, below=1, hint=": a model needs to see both kinds")
    """Share of declining answers among the trained records; the others are helpful. An epoch has as many as data."""
