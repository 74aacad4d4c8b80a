"""The training loop, on a few short rows."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from posttrain.artifact import ModelSource
from posttrain.config.schema import Dtype, LoraSettings, Method
from posttrain.engine import processes
from posttrain.engine.evaluation import Evaluation
from posttrain.engine.loop import Training
from posttrain.model.loading import load_model, load_trainable, new_adapter
from posttrain.tokens.packing import PackedRow
from tests.support.tiny import (
    Recorder,
    documents_of,
    packed_rows,
    sft_config,
)

ROWS = packed_rows([3, 1, 2, 2, 1])


DROPOUT = LoraSettings(r=4, alpha=8, dropout=0.1)


def policy(base: ModelSource, method: Method, dtype: str = "float32") -> Any:
    if method is Method.full:
        return load_trainable(base, dtype)
    return new_adapter(load_model(base, dtype), DROPOUT, seed=0)


def training(model: Any, folder: Path, rows: Sequence[PackedRow] = ROWS, **settings: Any) -> Training:
    progress = settings.pop("progress", None) or Recorder()
    stop: Callable[[], bool] = settings.pop("stop_requested", lambda: False)
    seed, dtype = settings.pop("seed", 0), settings.pop("dtype", "float32")
    evaluation, engine = settings.pop("evaluation", None), settings.pop("engine", "single")
    config = sft_config(**{"compute_dtype": Dtype(dtype), **settings})
    return Training(
        model=model,
        rows=rows,
        config=config,
        seed=seed,
        dtype=dtype,
        progress=progress,
        stop_requested=stop,
        checkpoints=folder,
        evaluation=evaluation or Evaluation(rows=(), refusals=0, config=config),
        engine=engine,
    )


def trained_bytes(model: torch.nn.Module) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in model.parameters() if p.requires_grad)


EVAL_ROWS = [document for row in packed_rows([4, 3], seed=5, longest=60) for document in documents_of(row)]


def evaluation(rows: Sequence[PackedRow] = EVAL_ROWS, refusals: int = 0, **settings: Any) -> Evaluation:
    return Evaluation(rows=rows, refusals=refusals, config=sft_config(**settings))


def together(world: int, *words: str, environment: Mapping[str, str]) -> None:
    """Run a module as ``world`` fresh processes of one launch. Fails with what they said.

    Forks of one process waited for each other for ever in DeepSpeed, in the last of some thirty trainings.
    """
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "-m", *words]
    done = subprocess.run(
        [sys.executable, "-m", *launcher], env={**environment}, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-4000:]


def join() -> None:
    """Meet the other processes of the launch, each on one core."""
    gc.freeze()  # DeepSpeed collects garbage at every start
    torch.set_num_threads(1)
    processes.join(60)
