"""Several processes with the whole model in each; torch's DistributedDataParallel sums their gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from posttrain.engine.attention import causal_model
from posttrain.engine.engine import Single
from posttrain.engine.objective import Sums


class Call(torch.nn.Module):
    """A module whose forward pass is any computation with a model, as DistributedDataParallel wants it."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], Any]) -> Any:
        """Return the result of ``compute``."""
        return compute()


class Replicated(Single):
    """The engine ``ddp``."""

    def spread(self) -> None:
        """Wrap the model."""
        device = causal_model(self.model).device
        # Parameters without a gradient differ from batch to batch in a mixture of experts: none may be waited for.
        self.replica = DistributedDataParallel(
            Call(self.model),
            device_ids=[device.index] if device.type == "cuda" else None,
            forward_sync_buffers=False,
            find_unused_parameters=True,
        )
        self.replica.register_comm_hook(None, lambda state, bucket: _sum(bucket))

    def accumulate(self, compute: Callable[[], tuple[torch.Tensor, Sums]], last: bool) -> Sums:
        """Take the gradient; with ``last``, sum what all processes have taken since the last step."""
        with nullcontext() if last else self.replica.no_sync(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")  # none was unused: good
            loss, sums = self.replica(compute)
            loss.backward()
        return sums  # type: ignore[no-any-return]


def _sum(bucket: Any) -> torch.futures.Future[torch.Tensor]:
    """Sum gradients over the processes: the shares of all add up to the step's loss.

    Of itself it takes their mean. The loss times three would undo that, but a backward pass in bfloat16 would round
    otherwise.
    """
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    summed: torch.futures.Future[torch.Tensor] = work.get_future().then(lambda done: done.value()[0])
    return summed
