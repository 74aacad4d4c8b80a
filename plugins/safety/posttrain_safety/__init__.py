"""The stage ``safety``: refusals and helpful answers in a stated ratio. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from posttrain import Stage, hookimpl
from posttrain_safety.config import SafetySettings

POSTTRAIN_API = 1
NAME = "safety"


@hookimpl
def register_stages() -> Sequence[Stage]:
    """The stage ``safety``."""
    return [
        Stage(
            name=NAME,
            summary="refusals and helpful answers in a stated ratio, audited for words that trigger refusals",
            config=SafetySettings,
            run="posttrain_safety.stage:run",
            parent="sft",
            records="conversations",
        )
    ]


@hookimpl
def register_config() -> Sequence[Path]:
    """The folder with the gate ``safety_default``."""
    return [Path(__file__).parent]


@hookimpl
def register_eval_tasks() -> Sequence[Path]:
    """The tasks ``safety_harmful`` and ``safety_harmless``."""
    return [Path(__file__).parent / "tasks"]


@hookimpl(wrapper=True)
def load_records(step: Any) -> Generator[None, Sequence[Any] | None, Sequence[Any] | None]:
    """Refuse records of one kind alone while nothing is trained yet; those of eval_data may be of either kind."""
    records = yield
    if step.stage.name == NAME and records is not None and step.sources != step.eval_sources:
        from posttrain_safety.mixing import Kinds

        Kinds.of(records, step.config, step.name)
    return records
