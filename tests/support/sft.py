"""The stage sft, on a few conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.artifact import ModelSource
from posttrain.context import StageContext
from posttrain.data.records import Conversation
from tests.support.tiny import Recorder, sft_config


def conversations(count: int) -> list[Conversation]:
    return [
        Conversation(
            messages=({"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}),
            where=f"train.jsonl:{i + 1}",
        )
        for i in range(count)
    ]


def context(base: ModelSource, folder: Path, **settings: Any) -> StageContext:
    fields = {key: settings.pop(key) for key in ("records", "dtype") if key in settings}
    (folder / "output").mkdir(parents=True)
    return StageContext(
        **{
            "name": "sft",
            "config": sft_config(**settings),
            "parent": base,
            "records": conversations(12),
            "seed": 0,
            "dtype": "float32",
            "progress": Recorder(),
            "stop_requested": lambda: False,
            "checkpoints": folder / "checkpoints",
            "output": folder / "output",
            **fields,
        }
    )
