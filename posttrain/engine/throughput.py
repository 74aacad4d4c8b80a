"""Model-FLOPs share of a training: the operations of its steps, beside the rate of its devices.

The yardstick is measured, not taken from a data sheet: products of the model's own shapes in the number format of the
training, alone on the device. 100 % would be a step of nothing but such products, without a pause.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.cost.architecture import architecture_of, routed_share
from posttrain.cost.operations import Operations
from posttrain.engine import processes
from posttrain.engine.arithmetic import Arithmetic, matrix_shape, product_rate
from posttrain.engine.attention import causal_model
from posttrain.engine.config import LoopConfig


@dataclass(frozen=True)
class Throughput:
    """The yardstick of a training's speed."""

    operations: Operations
    rate: float
    """Operations a second of all devices together, in products."""

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel, config: LoopConfig, arithmetic: Arithmetic) -> Throughput | None:
        """Return the yardstick for a whole ``model``; None when its configuration does not tell its sizes."""
        operations, rate = operations_of(model), product_rate(config, model, arithmetic)
        return cls(operations, rate * 1e9 * processes.world()) if operations is not None and rate else None


def operations_of(model: PreTrainedModel | PeftModel) -> Operations | None:
    """Return the operations of ``model`` in training; None when its configuration does not tell its sizes."""
    causal = causal_model(model)
    weights = {name.replace(".base_layer", ""): matrix_shape(each) for name, each in causal.named_parameters()}
    adapters = {name: shape for name, shape in weights.items() if ".lora_" in name}
    settings = causal.config.to_dict()
    architecture = architecture_of(settings, {name: weights[name] for name in weights.keys() - adapters.keys()})
    if architecture is None:
        return None
    routed = routed_share(causal.config.get_text_config().to_dict())
    passed = sum(
        prod(shape) * (routed if ".experts." in name else 1.0) for name, shape in adapters.items() if len(shape) >= 2
    )
    return Operations(model=architecture, adapter=round(passed) if isinstance(model, PeftModel) else None)
