"""The work of one of several processes, for test_several.py: small stages, and what each of them left.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m preference_support.several PARENTS OUTPUT CASES
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain_preference.stage import run

from posttrain import Interrupted
from posttrain.engine import processes
from preference_support.contexts import build_context, parent_source, progress
from tests.support.training import join

ENGINES = ("ddp", "fsdp")
STEPS: dict[str, Any] = {
    "records": 17, "gradient_accumulation": 6, "epochs": 2, "eval_share": 0.2, "gradient_checkpointing": False,
}  # fmt: skip
"""Settings of every stage here: each epoch has a step of twelve pairs and one of few."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("plain", {"stage": "dpo"}),
    "dpo_full": ("full", {"stage": "dpo", "gradient_checkpointing": True}),
    "aot": ("full", {"stage": "dpo", "loss_type": ["aot", "sft"]}),
    "kto": ("plain", {"stage": "kto", "records": 9}),
}
"""Kind of the parent and settings of each stage; the rows of a batch meet in the last two."""
RESUMED = ("dpo",)
"""Cases that are stopped and resumed."""


def train(
    parents: Path, folder: Path, name: str, engine: str = "single", stop: Callable[[], bool] = lambda: False
) -> None:
    """Run the stage of a case below ``folder``; process 0 leaves what it reported beside the artifact."""
    kind, settings = CASES[name]
    context = build_context(folder, parent_source(parents / kind), stop_requested=stop, **(STEPS | settings))
    context = replace(context, engine=engine, kept=folder.parent / "kept")
    try:
        run(context)
    finally:
        processes.wait()
        if processes.rank() == 0:
            told = progress(context)
            report = {"steps": told.steps, "notes": told.notes, "metrics": context.metrics, "started": told.started}
            (folder / "report.json").write_text(json.dumps(report))


def interrupt(parents: Path, folder: Path, name: str, engine: str, after: int) -> None:
    """Train until only the last process is asked to stop, after step ``after``."""
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return processes.rank() == processes.world() - 1 and len(asked) == after

    try:
        train(parents, folder, name, engine, stop)
    except Interrupted:
        return
    raise AssertionError("it was not stopped")


def main(parents: Path, output: Path, names: Sequence[str]) -> None:
    """Run the cases by every engine for several processes."""
    join()
    for engine in ENGINES:
        for name in names:
            train(parents, output / engine / name / "whole", name, engine)
            if name in RESUMED:
                interrupt(parents, output / engine / name / "resumed", name, engine, after=2)
                train(parents, output / engine / name / "resumed", name, engine)
    processes.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","))
