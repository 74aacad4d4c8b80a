"""Work of the host that a GPU need not wait for: copies queued behind its kernels, and the next step's rows laid out.

A plain copy to a GPU waits until all work before it is done, and the GPU then waits for Python to give it more. A copy
from pinned memory is queued like a kernel. So within a step nothing waits, as long as Python asks for no value either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return ``tensor``, which is on the CPU, on ``device``; a GPU gets it after the work that it has already."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextmanager
def prepared_ahead(
    prepare: Callable[[Item], Result], items: Iterable[Item], device: torch.device
) -> Iterator[Iterator[Result]]:
    """Hold the results of ``prepare`` for ``items``, in order; for a GPU, a thread makes each while the last is used.

    A CPU has no time to spare while it computes: there each is made when it is asked for. ``prepare`` draws no random
    numbers. What it raises is raised where the result is asked for. At the end the thread is gone.
    """
    if device.type != "cuda":
        yield map(prepare, items)
        return
    # a new thread works on the first GPU, whichever this process has
    with ThreadPoolExecutor(1, "rows", torch.cuda.set_device, (device,)) as thread:
        yield _one_ahead(thread, prepare, items)


def _one_ahead(
    thread: ThreadPoolExecutor, prepare: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    waiting: Future[Result] | None = None
    for item in items:
        following = thread.submit(prepare, item)
        if waiting is not None:
            yield waiting.result()
        waiting = following
    if waiting is not None:
        yield waiting.result()
