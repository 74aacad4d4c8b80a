"""The work of one of several processes, for test_several.py: small trainings, and what each of them left.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.engine.several BASES OUTPUT CASES
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from posttrain.artifact import ModelSource
from posttrain.config.schema import Dtype, LoraSettings
from posttrain.context import StageContext
from posttrain.engine import processes
from posttrain.engine.arithmetic import Arithmetic
from posttrain.engine.batches import Batch
from posttrain.engine.checkpoint import Part
from posttrain.engine.gradient import MaskedCrossEntropy
from posttrain.engine.loop import ENGINES as ENGINES_BY_NAME
from posttrain.errors import Diverged, Interrupted, require_finite
from posttrain.model.loading import load_model, load_trainable, new_adapter
from posttrain.model.quantisation import NF4
from posttrain.tokens.packing import PackedRow
from tests.support.tiny import Recorder, base_source, packed_rows, sft_config
from tests.support.training import EVAL_ROWS, evaluation, join, training

ROWS = packed_rows([3, 1, 2, 2, 1, 2, 1], seed=3)
"""Seven rows: steps of four and of three, then of one."""
STEPS: dict[str, Any] = {"gradient_accumulation": 6, "epochs": 2, "weight_decay": 0.1}
"""Settings of every training here: each epoch has a step of six rows and one of a single row."""
Load = Callable[[ModelSource, str, bool], Any]
LORA = LoraSettings(r=4, alpha=8)


class Case:
    """A kind of training."""

    def __init__(self, load: Load, base: str, dtype: str = "float32", **settings: Any) -> None:
        self.load, self.base, self.dtype, self.settings = load, base, dtype, settings

    def source(self, bases: Path) -> ModelSource:
        """Return the base."""
        return base_source(bases / self.base)

    def model(self, bases: Path, mapped: bool = False) -> Any:
        """Return the model to train."""
        return self.load(self.source(bases), self.dtype, mapped)


def full(source: ModelSource, dtype: str, mapped: bool) -> Any:
    return load_trainable(source, dtype, mapped)


def lora(source: ModelSource, dtype: str, mapped: bool) -> Any:
    return new_adapter(load_model(source, dtype, mapped), LORA, seed=0)


def dora(source: ModelSource, dtype: str, mapped: bool) -> Any:
    return new_adapter(load_model(source, dtype, mapped), replace(LORA, dora=True), seed=0)


def qlora(source: ModelSource, dtype: str, mapped: bool) -> Any:
    return new_adapter(load_model(replace(source, quantization=NF4), dtype, mapped), LORA, seed=0)


CASES: dict[str, Case] = {
    "full": Case(full, "untied"),
    "tied": Case(full, "tied"),
    "recomputed": Case(full, "tied", gradient_checkpointing=True),
    "autocast": Case(full, "untied", "bfloat16"),
    "lora": Case(lora, "untied", "bfloat16", compute_dtype=Dtype.float32),
    "lora_bfloat16": Case(lora, "untied", "bfloat16"),
    "dora": Case(dora, "untied"),
    "qlora": Case(qlora, "untied"),
}

ENGINES = ("ddp", "fsdp", "deepspeed")

RESUMED = ("full", "lora")
"""Cases that are stopped and resumed, by the same number of processes and by another."""


def train(case: Case, bases: Path, folder: Path, engine: str = "single", **settings: Any) -> tuple[Any, Recorder]:
    """Train and return the model and what was reported."""
    model, progress = case.model(bases, mapped=engine in ("fsdp", "deepspeed")), Recorder()
    given = {**STEPS, **case.settings, **settings}
    rows: list[PackedRow] = given.pop("rows", ROWS)
    training(
        model, folder, rows, engine=engine, dtype=case.dtype, progress=progress,
        evaluation=evaluation(EVAL_ROWS, gradient_accumulation=1), **given,
    ).run()  # fmt: skip
    return model, progress


def save(case: Case, bases: Path, model: Any, output: Path, progress: Recorder, engine: str) -> None:
    """Save the artifact as a stage does."""
    output.mkdir(parents=True, exist_ok=True)
    context = StageContext(
        name="sft", config=None, parent=case.source(bases), records=(), seed=0, dtype=case.dtype, progress=progress,
        stop_requested=lambda: False, checkpoints=output, output=output, engine=engine,
    )  # fmt: skip
    context.save(model)
    if processes.rank() == 0:
        (output / "steps.json").write_text(json.dumps(list(progress.steps.values())))
    processes.wait()


def interrupt(case: Case, bases: Path, folder: Path, engine: str, after: int) -> None:
    """Train until only the last process is asked to stop, after step ``after``."""
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return processes.rank() == processes.world() - 1 and len(asked) == after

    try:
        train(case, bases, folder, engine, stop_requested=stop)
    except Interrupted:
        return
    raise AssertionError("it was not stopped")


def step_once(bases: Path, output: Path, name: str) -> None:
    """Take two steps with an idle weight, the second with an infinite gradient; write what changed, by step."""
    model, config = CASES["full"].model(bases), sft_config(**STEPS)
    model.idle = torch.nn.Parameter(torch.ones(3, 5))
    engine, changed = ENGINES_BY_NAME[name](model, config), []
    totals, batch = MaskedCrossEntropy(config, "float32").totals(ROWS), Batch.of(ROWS[:1], torch.device("cpu"))

    def loss(scale: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        value, sums = MaskedCrossEntropy(config, "float32").share(model, batch, totals)
        return value * scale, sums

    with engine.prepared(Arithmetic(dtype="float32", stored="float32")):
        for scale in (1.0, math.inf):
            before = Part.of(engine.capture(), copy=True).tensors
            engine.accumulate(partial(loss, scale), last=True)
            with contextlib.suppress(Diverged):
                engine.step(1e-2, 1.0, lambda norm: require_finite(1, "norm", norm, ""))
            after = Part.of(engine.capture(), copy=True).tensors
            changed.append([key for key, each in before.items() if not torch.equal(each, after[key])])
        idle = engine.idle()
    if processes.rank() == 0:
        (output / f"{name}.json").write_text(json.dumps({"changed": changed, "idle": idle}))


def main(bases: Path, output: Path, names: Sequence[str]) -> None:
    """Run the cases by every engine for several processes."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    join()
    for engine in ENGINES:
        step_once(bases, output, engine)
        for name in names:
            case, folder = CASES[name], output / engine / name
            model, progress = train(case, bases, folder / "checkpoints", engine)
            save(case, bases, model, folder / "artifact", progress, engine)
        for name in RESUMED:  # stopped and resumed, and once more without a stop
            case = CASES[name]
            for after, kind in ((2, "resumed"), (0, "again")):
                checkpoints = output / engine / name / kind
                if after:
                    interrupt(case, bases, checkpoints, engine, after)
                    if processes.rank() == 0:  # for another number of processes
                        shutil.copytree(checkpoints, output / engine / name / "stopped")
                    processes.wait()
                model, progress = train(case, bases, checkpoints, engine)
                save(case, bases, model, output / engine / name / f"artifact_{kind}", progress, engine)
            if (stopped := output / "single" / name / "stopped").exists():
                checkpoints = output / engine / name / "taken_over"
                if processes.rank() == 0:
                    shutil.copytree(stopped, checkpoints)
                processes.wait()
                model, progress = train(case, bases, checkpoints, engine)
                save(case, bases, model, output / engine / name / "artifact_taken_over", progress, engine)
    processes.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","))
