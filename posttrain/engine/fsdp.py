"""Several processes with a slice of every weight in each, by torch's FSDP2: gradients and averages are sliced alike.

A layer's weights are whole only while it computes. The model itself is the root of what is sliced, so that its own
forward pass works; every other computation runs as one of the root's methods, or the weights outside of layers (the
embeddings, the last norm, the output projection) would be slices in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from posttrain.engine import processes
from posttrain.engine.arithmetic import Arithmetic
from posttrain.engine.attention import causal_model
from posttrain.engine.engine import FSDP, Result, Single
from posttrain.engine.objective import Sums
from posttrain.engine.optimizer import make_optimizer
from posttrain.engine.precision import is_quantised
from posttrain.engine.units import convert, reject_lone_experts, units
from posttrain.model.device import default_device

METHOD = "posttrain_compute"
"""Name of the root's method that runs any computation."""


class Sharded(Single):
    """The engine ``fsdp``."""

    @contextmanager
    def prepared(self, arithmetic: Arithmetic | None = None) -> Iterator[None]:
        """Slice the model unit by unit, each brought into its formats first; slices stay so, as nothing needs more.

        Raises BadInput for a model that cannot be sliced.
        """
        reject_lone_experts(self.model, FSDP)
        self._slice(None if arithmetic is None or is_quantised(self.model) else arithmetic)
        self.optimizer = make_optimizer(self.model, self.config)
        yield

    def _slice(self, arithmetic: Arithmetic | None) -> None:
        causal = causal_model(self.model)
        mesh = init_device_mesh(default_device().type, (processes.world(),))
        # Files in the format of the recipe are mapped into memory until here, not copied: of those, a process holds its
        # slices and one unit, a layer or what lies outside of layers, at a time.
        for unit in units(causal):
            if arithmetic is not None:
                convert(unit, arithmetic)
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

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gather all units, and slice them again in the end."""
        gathered = self._units()
        self.root.set_reshard_after_forward(False)
        try:
            for module in gathered:
                module.unshard()
            yield
        finally:
            for module in gathered:
                # as FSDP2 has it: a forward pass leaves the root whole, which its backward pass would gather at once
                module.set_reshard_after_forward(module is not self.root, recurse=False)
                module.reshard()

    def _units(self) -> list[FSDPModule]:
        return [module for module in self.root.modules() if isinstance(module, FSDPModule)]
