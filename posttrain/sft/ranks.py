"""One optimizer step shared by two processes, by the engines for several devices: each takes half of the rows."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.multiprocessing.spawn import ProcessContext, spawn

from posttrain import environment
from posttrain.engine.config import FineTuneConfig
from posttrain.model.device import CPU, VARIABLE
from posttrain.tokens.packing import PackedRow

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

RANKS = 2
SECONDS = 600
"""Longest time of one engine in the two processes."""


def gradients_of_ranks(
    model: PreTrainedModel | PeftModel, rows: Sequence[PackedRow], config: FineTuneConfig, engines: Sequence[str]
) -> dict[str, dict[str, torch.Tensor]]:
    """Return the gradient of the mean loss over all ranks' trained tokens, by engine and parameter name.

    Starts two processes connected by gloo. Raises torch's ProcessException when one of them fails, TimeoutError naming
    the engine when it takes longer than ``SECONDS``.
    """
    with tempfile.TemporaryDirectory() as folder:
        # by value: shared memory is often too small for a model, in containers above all
        task = pickle.dumps((model, list(rows), config, list(engines)))
        started = spawn(_rank, args=(task, folder, model.device.type), nprocs=RANKS, join=False)
        try:
            _wait(started, Path(folder), engines)
        finally:
            for process in started.processes:
                process.kill()
        return {name: load_file(Path(folder) / name) for name in engines}


def _wait(started: ProcessContext, folder: Path, engines: Sequence[str]) -> None:
    """Wait for the processes, for each engine at most SECONDS. Raises TimeoutError naming the one that took longer."""
    done, since = 0, monotonic()
    while not started.join(timeout=1):
        count = sum((folder / name).exists() for name in engines)
        if count > done:
            done, since = count, monotonic()
        if monotonic() - since > SECONDS:
            raise TimeoutError(f"{engines[min(done, len(engines) - 1)]} did not end within {SECONDS} seconds")


def _rank(rank: int, task: bytes, folder: str, device: str) -> None:
    if device == CPU:  # a GPU of this machine would be given the engine's exchanges, of which gloo knows none there
        os.environ[VARIABLE] = CPU
    environment.prepare()
    with environment.importing():
        from posttrain.engine.gradient import MaskedCrossEntropy, StepBatches, add_shares
        from posttrain.engine.loop import ENGINES

    torch.set_num_threads(max(1, torch.get_num_threads() // RANKS))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    for name in pickle.loads(task)[-1]:
        model, rows, config, _ = pickle.loads(task)  # an engine changes the model for good
        engine = ENGINES[name](model, config)
        objective = MaskedCrossEntropy(config, "float32")
        cut = [rows[start : start + 1] for start in range(len(rows))]
        with engine.prepared():
            step = StepBatches.of(objective, cut, objective.totals(rows), torch.device("cpu"))
            add_shares(engine, objective, step)
            found = {key: each.contiguous() for key, each in engine.gradient()}
            if rank == 0:
                save_file(found, Path(folder) / name)
    dist.destroy_process_group()
