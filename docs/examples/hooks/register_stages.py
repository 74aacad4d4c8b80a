"""The stage ``anneal``: one more pass over the answers, at a low learning rate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain import FineTuneConfig, Stage, StageContext, from_variant, hookimpl, number


@dataclass(kw_only=True)
class AnnealSettings(FineTuneConfig):
    """Settings of SFT's loop with other defaults."""

    data: Any = None
    lr: float = number(from_variant(adapter=2e-5, full=1e-6), above=0)
    epochs: int = number(1, least=1)


def train(context: StageContext) -> None:
    """Train on the records and save the result."""
    context.finetune(context.records)


@hookimpl
def register_stages() -> Sequence[Stage]:
    """Return the stage ``anneal``."""
    summary = "one more pass over the answers, at a low rate"
    run = f"{__name__}:train"
    return [Stage(name="anneal", summary=summary, config=AnnealSettings, run=run, parent="sft", records="documents")]
