"""Settings of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import LoraSettings, Method
from posttrain.engine.config import FineTuneConfig
from posttrain.stage import from_recipe, from_variant

if TYPE_CHECKING:
    from posttrain.sft.advice import Known

ALL_LINEAR = "all-linear"


@dataclass(kw_only=True)
class SFTConfig(FineTuneConfig):
    """Supervised fine-tuning on the assistant turns of conversations, or on raw text."""

    data: Any = None
    """Training records: a path or hub name, one source, or a list of sources; the recipe's own data when absent."""
    method: Method = from_recipe("variant.method")
    """full trains every weight, lora an adapter, qlora an adapter on weights of 4 bits (arXiv:2305.14314)."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The adapter, when the method is not full."""
    lr: float = from_variant(adapter=2e-4, full=1e-5)
    """Peak learning rate."""

    def problems(self) -> Sequence[tuple[str, str]]:
        """Return settings out of range or against each other, as (setting, what is wrong)."""
        return [*super().problems(), *self._targets()]

    def advice(self, examples: int | None) -> Sequence[str]:
        """Return departures from the field's recipe, as far as they show before the data is read."""
        from posttrain.sft.advice import Known  # settings are listed without the rules

        return self.departures(Known(examples=examples))

    def departures(self, known: Known) -> Sequence[str]:
        """Return departures from the field's recipe."""
        from posttrain.sft.advice import ADVICE

        return ADVICE.departures(self, known)

    def _targets(self) -> Iterator[tuple[str, str]]:
        targets = self.lora.target_modules
        if isinstance(targets, list) and "lm_head" in targets:
            yield "lora.target_modules", "lm_head is the output projection, which carries no adapter"
        if targets != ALL_LINEAR and (isinstance(targets, str) or not targets):
            yield "lora.target_modules", f"must be {ALL_LINEAR} or a list of module names, not {targets!r}"
