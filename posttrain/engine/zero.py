"""Several processes with a slice of every weight in each, by DeepSpeed's ZeRO-3 (arXiv:1910.02054).

DeepSpeed slices the weights, gathers them where they are needed, and sums gradients into slices. Clipping, the check
before the update, AdamW and checkpoints are those of the other engines, on slices: DeepSpeed would update what never
got a gradient, clip by a norm that nobody has checked, and save pickles.

A slice is an equal part of a weight's numbers in a row, and lies in memory that DeepSpeed reads when it gathers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from posttrain.cost.memory import BUCKET
from posttrain.engine import processes
from posttrain.engine.arithmetic import Arithmetic
from posttrain.engine.attention import causal_model
from posttrain.engine.checkpoint import Slice, State, capture_parts, restore_parts
from posttrain.engine.engine import DEEPSPEED, Result, Single
from posttrain.engine.fused import recognise
from posttrain.engine.objective import Sums
from posttrain.engine.optimizer import make_adamw, update_weights
from posttrain.engine.precision import is_quantised
from posttrain.engine.units import convert, reject_lone_experts, units
from posttrain.model.device import default_device

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,  # the loop counts rows, not DeepSpeed
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 3,
        "memory_efficient_linear": False,  # would replace torch's linear map, for good
        "contiguous_gradients": False,
        "reduce_bucket_size": BUCKET,
        # A weight that is on its way is read as it is, by all that reads it without calling its module.
        "stage3_prefetch_bucket_size": 0,
        # By default small weights are never sliced, and those of a model below a billion parameters stay whole.
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
    },
}
"""DeepSpeed's settings. No number format is among them: they would convert adapters into bfloat16."""


class _Call(torch.nn.Module):
    """A module whose forward pass is any computation with a model, as DeepSpeed wants it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: tuple[Callable[[], Any]]) -> Any:
        """Return the result of ``compute``."""
        return compute[0]()


class Partitioned(Single):
    """The engine ``deepspeed``."""

    @contextmanager
    def prepared(self, arithmetic: Arithmetic | None = None) -> Iterator[None]:
        """Slice the model unit by unit, each brought into its formats first.

        In the end it is sliced by torch's FSDP2, as the engine ``fsdp`` leaves it: saving knows one kind of slice.
        Raises BadInput for a model that cannot be sliced.
        """
        reject_lone_experts(self.model, DEEPSPEED)
        recognise(self.model)
        self._units = list(units(causal_model(self.model)))
        deepspeed = load_deepspeed()
        for unit in self._units:
            _copy_mapped(unit, None if arithmetic is None or is_quantised(self.model) else arithmetic)
            deepspeed.zero.Init(module=unit, config_dict_or_path=CONFIG)
        trained = [each for each in self.model.parameters() if each.requires_grad]
        # the optimizer names the trained parameters, and does nothing else
        self._zero, *_ = deepspeed.initialize(
            model=_Call(self.model), optimizer=torch.optim.SGD(trained, lr=0.0), config=CONFIG, dist_init_required=False
        )
        self._bind(deepspeed.zero)
        self._watch()
        yield
        self._hand_over()

    def _bind(self, zero: Any) -> None:
        """Have the weights of a unit gathered together, while it computes: one by one takes several times as long.

        What reads a weight without calling its module, as fused layers do, finds it there.
        """
        bound: set[torch.nn.Parameter] = set()
        for unit in self._units:
            owner = self._zero.module if unit is self._units[-1] else unit
            for parameter in unit.parameters():
                if parameter not in bound:
                    zero.register_external_parameter(owner, parameter)
                    bound.add(parameter)

    def _watch(self) -> None:
        """Make a parameter of every slice, with AdamW on them, and note which weights get a gradient."""
        self._whole = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        self._slices = {
            name: torch.nn.Parameter(each.ds_tensor[: _own_numbers(each)]) for name, each in self._whole.items()
        }
        dimensions = [len(each.ds_shape) for each in self._whole.values()]
        self.optimizer = make_adamw(list(zip(self._slices.values(), dimensions, strict=True)), self.config)
        self._reached: set[str] = set()
        self._begins = True
        for name, each in self._whole.items():
            each.register_post_accumulate_grad_hook(lambda parameter, name=name: self._reached.add(name))

    def accumulate(self, compute: Callable[[], tuple[torch.Tensor, Sums]], last: bool) -> Sums:
        """Take the gradient, and sum it over the processes."""
        found: list[Sums] = []

        def loss() -> torch.Tensor:
            value, sums = compute()
            found.append(sums)
            return value

        if self._begins:
            self._forget()
        self._begins = last
        self._zero.backward(self._forward(loss), scale_wrt_gas=False)
        if last:
            for name in self._reached:
                # It was averaged. A loss times the number of processes would do the same, but a backward pass in
                # bfloat16 would round otherwise.
                gradient = self._gradient(name).mul_(processes.world())
                self._slices[name].grad = gradient[: len(self._slices[name])].to(self._slices[name].dtype)
            self._zero.optimizer.empty_partition_cache()
        return found[0]

    def _forward(self, compute: Callable[[], Any]) -> Any:
        # DeepSpeed would learn the order of the layers, for what it gathers ahead, and fail when a pass has another.
        layers = self._zero.optimizer.parameter_offload.get_param_coordinator()
        if not layers.is_invalid_trace():
            layers._invalidate_trace()
        return self._zero((compute,))

    def _forget(self) -> None:
        """Drop the gradient of the last step: DeepSpeed keeps what no later one replaces, or adds to it."""
        self._zero.optimizer.zero_grad()
        self._reached.clear()
        for name, part in self._slices.items():
            part.grad = None
            self._gradient(name).zero_()

    def _gradient(self, name: str) -> torch.Tensor:
        """Return the memory of this process' slice of a gradient, padded to the size of the others."""
        from deepspeed.utils import safe_get_local_grad

        found: torch.Tensor = safe_get_local_grad(self._whole[name])
        return found

    def run(self, compute: Callable[[], Result]) -> Result:
        """Compute with whole weights, and drop what was gathered."""
        found: list[Result] = []

        def silently() -> tuple[()]:
            found.append(compute())
            return ()

        try:
            self._forward(silently)
        finally:
            self._zero.optimizer.empty_partition_cache()
        return found[0]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gather all weights, unit by unit, and keep DeepSpeed from slicing them wherever a module ends."""
        from deepspeed.runtime.zero import GatheredParameters

        hooks, left = self._zero.optimizer.parameter_offload, set(self.model.parameters())
        with ExitStack() as gathered:
            for unit in self._units:
                own = [each for each in unit.parameters() if each in left]
                left.difference_update(own)
                gathered.enter_context(GatheredParameters(own))
            for hook in (*hooks.forward_hooks, *hooks.backward_hooks):
                hook.remove()
            hooks.forward_hooks, hooks.backward_hooks = [], []
            try:
                yield
            finally:
                hooks._register_deepspeed_module(hooks.module)

    def parts(self) -> dict[str, torch.Tensor]:
        """Return the slices of this process."""
        return {name: each.detach() for name, each in self._slices.items()}

    def step(self, rate: float, max_norm: float, check: Callable[[float], None]) -> float:
        """Clip, check, update."""
        parts = [each for each in self._slices.values() if each.grad is not None]
        own = torch.nn.utils.get_total_norm([each.grad for each in parts if each.grad is not None])
        norm = processes.total(own.double().square()).sqrt().to(own)
        check(float(norm))
        torch.nn.utils.clip_grads_with_norm_(parts, max_norm, norm)
        update_weights(self.optimizer, rate)
        return float(norm)

    def idle(self) -> dict[str, int]:
        """Return the parameters without averages: AdamW keeps them of those alone that got a gradient."""
        return {
            name: self._whole[name].ds_numel
            for name, part in self._slices.items()
            if not self.optimizer.state.get(part)
        }

    def gradient(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the gradient of each trained parameter, gathered from all processes."""
        for name, parameter in self._whole.items():
            own = self._gradient(name)
            whole = own.new_empty(processes.world() * own.numel())
            dist.all_gather_into_tensor(whole, own)
            yield name, whole[: parameter.ds_numel].view(parameter.ds_shape)

    def capture(self) -> State:
        """Return the slices of this process."""
        return capture_parts(self._slices, self.optimizer, self._cut)

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the slices of this process."""
        restore_parts(self._slices, self.optimizer, state, self._cut)

    def _cut(self, name: str, own: torch.Tensor) -> Slice:
        parameter: Any = self._whole[name]
        first = min(processes.rank() * parameter.ds_tensor.numel(), parameter.ds_numel)
        return Slice(own=own, first=first, rows=parameter.ds_numel)

    def _hand_over(self) -> None:
        """Free all but the weights, and slice them by FSDP2, unit by unit."""
        from deepspeed.runtime.zero import GatheredParameters

        del self.optimizer, self._slices
        self._zero.destroy()
        mesh = init_device_mesh(default_device().type, (processes.world(),))
        for unit in self._units:
            parameters: list[Any] = [each for each in unit.parameters() if hasattr(each, "ds_id")]
            with GatheredParameters(parameters):
                whole = [each.data.clone() for each in parameters]
            for each, data in zip(parameters, whole, strict=True):
                each.data, each.ds_tensor = data, None
            for module in unit.modules():
                module._parameters = dict(module._parameters)
            fully_shard(unit, mesh=mesh)


def load_deepspeed() -> Any:
    """Return DeepSpeed, silent, with nothing to compile and nothing to detect; every process of a launch can do so."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It would compile an exchange through shared memory, which nothing here uses, wherever it finds a compiler, and
    # ask the machine for every other of its kernels before.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    return deepspeed


def _copy_mapped(unit: torch.nn.Module, arithmetic: Arithmetic | None) -> None:
    """Convert the whole weights of ``unit``; what lies in mapped files is copied, as DeepSpeed writes where it lies."""
    held = {parameter: parameter.data_ptr() for parameter in unit.parameters() if parameter.numel()}
    if arithmetic is not None:
        convert(unit, arithmetic)
    for parameter, place in held.items():
        if parameter.data_ptr() == place:
            parameter.data = parameter.data.clone()


def _own_numbers(parameter: Any) -> int:
    """Return the count of numbers in this process' slice: the last processes may have fewer, or none."""
    size: int = parameter.ds_tensor.numel()
    numbers: int = parameter.ds_numel
    return max(0, min(size, numbers - processes.rank() * size))
