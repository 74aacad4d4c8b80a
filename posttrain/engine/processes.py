"""The processes that train one stage together, each on a device of its own; without a launch there is one.

A launcher gives each its number in ``RANK``, their count in ``WORLD_SIZE`` and a place to meet in ``MASTER_ADDR`` and
``MASTER_PORT``, as torchrun does. Tensors are exchanged, never pickles.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from posttrain.model.device import exact

SECONDS = 600
"""Longest wait of a process for the others before it gives up."""


def join(seconds: float = SECONDS) -> None:
    """Meet the other processes; the device is ``LOCAL_RANK``'s GPU, or the CPU. Do nothing without a launch."""
    if "RANK" not in os.environ or dist.is_initialized():  # Ray has joined them before
        return
    gpu = take_device()
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(seconds=seconds))


def take_device() -> bool:
    """Compute on ``LOCAL_RANK``'s GPU from now on; return False on a machine without GPUs."""
    if gpu := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return gpu


def leave() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process, from 0; process 0 reports and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``values`` over all processes, on the CPU."""
    values = values.detach().cpu()
    if world() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def totals(values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the sum of each value over all processes, by name; the names are the same everywhere."""
    names = sorted(values)
    if not names:
        return {}
    summed = total(torch.stack([exact(values[name].detach()) for name in names]))
    return dict(zip(names, summed.tolist(), strict=True))


def agree(flag: bool) -> bool:
    """Return True on every process when one of them is given True."""
    return bool(total(torch.tensor(int(flag)))) if world() > 1 else flag


def share(value: float) -> float:
    """Return the ``value`` of process 0, on every process."""
    return float(total(torch.tensor(value if rank() == 0 else 0.0, dtype=torch.float64)))


def wait() -> None:
    """Wait until every process is here."""
    agree(False)
