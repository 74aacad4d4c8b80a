"""The way of one optimizer step through the devices: how a gradient is taken, summed over processes, and applied.

The loop knows no device beyond this protocol. ``single`` is the plain one; the others give the same gradient to
rounding, whatever their number of processes: ddp.py holds the whole model in each, fsdp.py and zero.py a slice of every
weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, TypeVar

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from posttrain.engine.arithmetic import Arithmetic
from posttrain.engine.checkpoint import State, capture, restore
from posttrain.engine.config import LoopConfig
from posttrain.engine.objective import Sums
from posttrain.engine.optimizer import clip_gradient, make_optimizer, update_weights
from posttrain.engine.precision import computing_in

Result = TypeVar("Result")
SINGLE, DDP, FSDP, DEEPSPEED = "single", "ddp", "fsdp", "deepspeed"


class Engine(Protocol):
    """One way to train a model on one device or several."""

    model: PreTrainedModel | PeftModel

    def prepared(self, arithmetic: Arithmetic | None = None) -> AbstractContextManager[None]:
        """Hold the model spread over the processes, in the number formats of ``arithmetic``, with its optimizer.

        Whole weights are in their stored format again afterwards. Without ``arithmetic``, formats stay as they are.
        """

    def accumulate(self, compute: Callable[[], tuple[torch.Tensor, Sums]], last: bool) -> Sums:
        """Add the gradient of the loss that ``compute`` returns; with ``last``, sum it over all processes.

        Every process calls it equally often in a step. Returns the sums beside the loss, of this process.
        """

    def run(self, compute: Callable[[], Result]) -> Result:
        """Return the result of ``compute``, which may use the weights, but takes no gradient.

        Every process calls it at the same time.
        """

    def whole(self) -> AbstractContextManager[None]:
        """Hold every weight whole in each process, which may call the model as often as it wants, without a gradient.

        Every process enters and leaves it at the same time.
        """

    def parts(self) -> dict[str, torch.Tensor]:
        """Return this process' part of each trained weight, by name, in the memory that the model computes from."""

    def step(self, rate: float, max_norm: float, check: Callable[[float], None]) -> float:
        """Clip the gradient to ``max_norm``, update the weights at ``rate``, free the gradient; return its norm.

        ``check`` gets the norm from before, and raises to keep an infinite one from the weights.
        """

    def gradient(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the gradient of each trained parameter, whole, by name, summed over the processes; each calls it."""

    def idle(self) -> dict[str, int]:
        """Return the trained parameters that never got a gradient, with their sizes."""

    def capture(self) -> State:
        """Return this process' part of the state to resume from."""

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore a state, whatever the number of processes that saved it."""


class Single:
    """The plain engine: one process, one device."""

    optimizer: torch.optim.Optimizer

    def __init__(self, model: PreTrainedModel | PeftModel, config: LoopConfig) -> None:
        self.model = model
        self.config = config

    @contextmanager
    def prepared(self, arithmetic: Arithmetic | None = None) -> Iterator[None]:
        """Hold the frozen weights in the format of the arithmetic."""
        with nullcontext() if arithmetic is None else computing_in(self.model, arithmetic.dtype):
            self.spread()
            self.optimizer = make_optimizer(self.model, self.config)
            yield

    def spread(self) -> None:
        """Leave the model as it is: there is one process."""

    def accumulate(self, compute: Callable[[], tuple[torch.Tensor, Sums]], last: bool) -> Sums:
        """Take the gradient."""
        loss, sums = compute()
        loss.backward()
        return sums

    def run(self, compute: Callable[[], Result]) -> Result:
        """Compute."""
        return compute()

    def whole(self) -> AbstractContextManager[None]:
        """Do nothing: every weight is whole."""
        return nullcontext()

    def parts(self) -> dict[str, torch.Tensor]:
        """Return the trained weights, or the slices of them."""
        own = ((name, each.detach()) for name, each in _trained(self.model))
        return {name: each.to_local() if isinstance(each, DTensor) else each for name, each in own}

    def step(self, rate: float, max_norm: float, check: Callable[[float], None]) -> float:
        """Clip, check, update."""
        norm = clip_gradient(self.model, max_norm)
        check(norm)
        update_weights(self.optimizer, rate)
        return norm

    def gradient(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what each parameter has."""
        for name, parameter in _trained(self.model):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            yield name, gradient.full_tensor() if isinstance(gradient, DTensor) else gradient

    def idle(self) -> dict[str, int]:
        """Return the parameters without averages: AdamW keeps them of those alone that got a gradient."""
        return {name: each.numel() for name, each in _trained(self.model) if not self.optimizer.state.get(each)}

    def capture(self) -> State:
        """Return the whole state."""
        return capture(self.model, self.optimizer)

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the whole state."""
        restore(self.model, self.optimizer, state)


def _trained(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, each) for name, each in model.named_parameters() if each.requires_grad)
