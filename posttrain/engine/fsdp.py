"""Several processes with a slice of every weight in each, by torch's FSDP2: gradients and averages are sliced alike.

A layer's weights are whole only while it computes. The model itself is the root of what is sliced, so that its own
forward pass works; every other computation runs as one of the root's methods, or the weights outside of layers (the
embeddings, the last norm, the output projection) would be slices in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from posttrain.engine import processes
from posttrain.engine.arithmetic import Arithmetic
from posttrain.engine.attention import causal_model
from posttrain.engine.engine import Result, Single
from posttrain.engine.objective import Sums
from posttrain.engine.optimizer import make_optimizer
from posttrain.engine.precision import is_quantised
from posttrain.errors import reject
from posttrain.model.loading import DTYPES, default_device
from posttrain.model.targets import text_decoder

METHOD = "posttrain_compute"
"""Name of the root's method that runs any computation."""
EXPERT = re.compile(r"\bexperts\.\d+\.")


class Sharded(Single):
    """The engine ``fsdp``."""

    @contextmanager
    def prepared(self, arithmetic: Arithmetic | None = None) -> Iterator[None]:
        """Slice the model unit by unit, each brought into its formats first; slices stay so, as nothing needs more.

        Raises BadInput for a model that cannot be sliced.
        """
        self._reject_lone_experts()
        self._slice(None if arithmetic is None or is_quantised(self.model) else arithmetic)
        self.optimizer = make_optimizer(self.model, self.config)
        yield

    def _slice(self, arithmetic: Arithmetic | None) -> None:
        causal = causal_model(self.model)
        mesh = init_device_mesh(default_device().type, (processes.world(),))
        # Files in the format of the recipe are mapped into memory until here, not copied: of those, a process holds its
        # slices and one unit, a layer or what lies outside of layers, at a time.
        for unit in [*decoder_layers(causal), causal]:
            if arithmetic is not None:
                _convert(unit, arithmetic)
            fully_shard(unit, mesh=mesh)
        self.root = cast(Any, causal)
        setattr(self.root, METHOD, lambda compute: compute())
        register_fsdp_forward_method(self.root, METHOD)
        for module in self._units():
            # Shares add up to the step's loss, so gradients are summed, not averaged. On the root alone, either call
            # would leave the layers' gradients averaged, in silence. gloo knows no other sum than the plain one.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)

    def accumulate(self, compute: Callable[[], tuple[torch.Tensor, Sums]], last: bool) -> Sums:
        """Take the gradient; sum it over the processes with ``last``, or at once where it is as large as the model."""
        adapter = isinstance(self.model, PeftModel)
        self.root.set_requires_gradient_sync(last or not adapter)
        self.root.set_is_last_backward(last)
        loss, sums = getattr(self.root, METHOD)(compute)
        loss.backward()
        return sums  # type: ignore[no-any-return]

    def run(self, compute: Callable[[], Result]) -> Result:
        """Compute with whole weights, and slice those of the root again: without a backward pass they stay whole."""
        try:
            result: Result = getattr(self.root, METHOD)(compute)
            return result
        finally:
            for module in self._units():
                module.reshard()

    def _units(self) -> list[FSDPModule]:
        return [module for module in self.root.modules() if isinstance(module, FSDPModule)]

    def _reject_lone_experts(self) -> None:
        # An expert that no token of one process reaches has no gradient there, and the sum over processes would mix up
        # what the others send. Experts that are one weight of three dimensions always have one.
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and EXPERT.search(name):
                what = f"fsdp cannot train experts that are layers of their own ({name})"
                reject("engine", what, "Use engine=ddp, or leave the experts out of lora.target_modules")


def _convert(unit: torch.nn.Module, arithmetic: Arithmetic) -> None:
    """Bring the whole weights of ``unit`` into their formats: trained ones into float32, frozen ones as ``single``."""
    for parameter in unit.parameters():
        if isinstance(parameter.data, DTensor) or not parameter.is_floating_point():
            continue
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        else:
            parameter.data = parameter.data.to(DTYPES[arithmetic.stored]).to(DTYPES[arithmetic.dtype])


def decoder_layers(causal: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the layers of the language model of ``causal``, the units that are whole one at a time."""
    lists = [each for each in text_decoder(causal).modules() if isinstance(each, torch.nn.ModuleList)]
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []
