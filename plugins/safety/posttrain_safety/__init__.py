"""The stage ``safety``: declining and helpful answers in a stated ratio. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from posttrain import Stage, hookimpl
from posttrain_safety.config import SafetySettings

if TYPE_CHECKING:
    from posttrain import Conversation, Record, Step

POSTTRAIN_API = 1


@hookimpl
def register_stages() -> Sequence[Stage]:
    """Return the stage ``safety``."""
    return [
        Stage(
            name="safety",
            summary="declining and helpful answers in a stated ratio, audited for words that trigger declining",
            config=SafetySettings,
            run="posttrain_safety.stage:run",
            parent="sft",
            records="conversations",
        )
    ]


@hookimpl
def register_config() -> Sequence[Path]:
    """Return the folder with the gate ``safety_default``."""
    return [Path(__file__).parent]


@hookimpl
def register_eval_tasks() -> Sequence[Path]:
    """Return the folder with the tasks ``safety_harmful`` and ``safety_harmless``."""
    return [Path(__file__).parent / "tasks"]


@hookimpl(wrapper=True)
def load_records(step: Step) -> Generator[None, Sequence[Record] | None, Sequence[Record] | None]:
    """Reject records of one kind alone before anything is trained; those of eval_data may be of either kind."""
    records = yield
    if isinstance(step.config, SafetySettings) and records is not None and step.sources != step.eval_sources:
        from posttrain_safety.mixing import Kinds

        Kinds.of(cast("Sequence[Conversation]", records), step.config, step.name)
    return records
