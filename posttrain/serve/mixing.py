"""Several adapters in one forward pass: a layer adds to the rows of each adapter what that one adds.

    rows       a a a b . c c                adapters of the rows; "." has none
    runs       a 0:3, b 3:4, c 5:7          neighbours with the same adapter

A layer's output is base(x) [S, O], to which each run adds x [r, I] @ A [I, R] @ B [R, O] in place. No product goes over
two adapters, so whatever one of them holds, infinity too, reaches no row of another. Rows may come in any order; the
lane keeps those of an adapter together, which makes the runs few. peft's own mixed batch routes them by hooks that it
sets anew in every pass.

Adapters of embeddings, whole copies of layers and variants of LoRA do not fit: ``Mixer.fits`` tells.
"""

# S = tokens of all rows, I = inputs, O = outputs, R = rank, r = tokens of a run

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

BASE = "__base__"
"""peft's name of no adapter in a mixed batch."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The runs of a pass."""

    rows: int
    tokens: int
    """Of all rows, with padding."""
    runs: tuple[tuple[str, int, int], ...]
    """Adapter of each run, its first row, and the row after its last."""


Added = Mapping[str, tuple[torch.Tensor, torch.Tensor, float]]
"""A [I, R], B [R, O] and the factor of each adapter of a layer."""


class Mixer:
    """The linear layers of a model with adapters, which add to each row what its own adapter adds.

    A model that gets or loses an adapter needs a new mixer.
    """

    def __init__(self, model: PeftModel) -> None:
        """Take a model that ``fits``."""
        self._model = model.get_base_model()
        self._plan: Plan | None = None
        for layer in _changed(model):
            plain = partial(type(layer).forward, layer)
            vars(layer)["forward"] = partial(_forward, self, layer.base_layer, plain, _added(layer))

    @staticmethod
    def fits(model: PeftModel) -> bool:
        """Return True when the adapters of a model are two matrices at linear layers, and nothing else."""
        return all(
            type(layer) is Linear and not layer.lora_variant and all(b.bias is None for b in layer.lora_B.values())
            for layer in _changed(model)
        )

    @property
    def plan(self) -> Plan | None:
        """The runs of the present pass; None outside of one."""
        return self._plan

    @contextlib.contextmanager
    def routed(self, names: Sequence[str], ids_BT: torch.Tensor) -> Iterator[Any]:
        """Yield the model for one pass over these ids; each row has the adapter of its name, or none for BASE."""
        self._plan = Plan(rows=len(names), tokens=ids_BT.numel(), runs=tuple(runs_of(names)))
        try:
            yield self._model
        finally:
            self._plan = None


def runs_of(names: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Yield the adapter, first row and end of neighbours with the same adapter, but for those without one."""
    start = 0
    for name, own in groupby(names):
        end = start + sum(1 for _ in own)
        if name != BASE:
            yield name, start, end
        start = end


def _changed(model: PeftModel) -> list[Any]:
    """Return the layers that adapters have changed."""
    return [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def _added(layer: Any) -> Added:
    return {
        name: (first.weight.detach().T, layer.lora_B[name].weight.detach().T, float(layer.scaling[name]))
        for name, first in layer.lora_A.items()
    }


def _forward(mixer: Mixer, base: Any, plain: Any, added: Added, x: torch.Tensor, **options: Any) -> Any:
    plan = mixer.plan
    if plan is None:
        return plain(x, **options)
    result = base(x)
    each = _tokens_of_a_row(x, plan)
    x_SI, result_SO = x.reshape(-1, x.shape[-1]), result.view(-1, result.shape[-1])
    for name, start, end in plan.runs:
        if name not in added:
            continue
        first_IR, second_RO, factor = added[name]
        own_rI, own_rO = x_SI[start * each : end * each], result_SO[start * each : end * each]
        inner_rR = own_rI.to(first_IR.dtype) @ first_IR
        if own_rO.dtype == second_RO.dtype:
            own_rO.addmm_(inner_rR, second_RO, alpha=factor)
        else:
            own_rO.add_(inner_rR @ second_RO, alpha=factor)
    return result


def _tokens_of_a_row(x: torch.Tensor, plan: Plan) -> int:
    """Return the tokens of each row. Raises ValueError for some of a pass: nothing says whose they are."""
    if x.dim() == 3 and len(x) == plan.rows:
        return x.shape[1]
    if x.shape[:-1].numel() != plan.tokens:
        raise ValueError("a layer with adapters gets some of the tokens of a batch alone: serve merged weights")
    return plan.tokens // plan.rows
