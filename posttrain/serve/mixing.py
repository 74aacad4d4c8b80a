"""Several adapters in one forward pass: the rows of each adapter together, two batched products for all of them.

    rows       a b a c a c                  adapters of the rows, in the order in which these came
    chunks     [a a] [a .] [b .] [c c]      of equal size; "." repeats a row, and its result is dropped

A layer's output is base(x) [B, T, O] + (x [C, M*T, I] @ A [C, I, R]) @ B [C, R, O], in the rows' own order. No sum goes
over two rows, so whatever one adapter holds, infinity too, reaches no row of another. peft's own mixed batch computes
each adapter's rows apart, and routes them by hooks that it sets anew in every pass.

Adapters of embeddings, whole copies of layers and variants of LoRA do not fit: ``Mixer.fits`` tells.
"""

# B = rows, T = tokens, I = inputs, O = outputs, R = rank, N = adapters of the model and none, C = chunks,
# M = rows of a chunk

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
    """The chunks of a pass."""

    rows: int
    tokens: int
    """Of all rows, with padding."""
    slots: slice | torch.Tensor
    """Adapter of each chunk."""
    order: torch.Tensor | None
    """Rows of the chunks [C*M]; None when they are the batch as it is."""
    back: torch.Tensor | None
    """Place of each row in the chunks [B]."""


class Mixer:
    """The linear layers of a model with adapters, which add to each row what its own adapter adds.

    They hold the adapters a second time, stacked. A model that gets or loses an adapter needs a new mixer.
    """

    def __init__(self, model: PeftModel) -> None:
        """Take a model that ``fits``."""
        self._slots = {name: slot for slot, name in enumerate(model.peft_config, start=1)}
        self._model = model.get_base_model()
        self._plan: Plan | None = None
        for layer in _changed(model):
            plain = partial(type(layer).forward, layer)
            vars(layer)["forward"] = partial(_forward, self, layer, plain, *_stacked(layer, list(self._slots)))

    @staticmethod
    def fits(model: PeftModel) -> bool:
        """Return True when the adapters of a model are two matrices at linear layers, and nothing else."""
        return all(
            type(layer) is Linear and not layer.lora_variant and all(b.bias is None for b in layer.lora_B.values())
            for layer in _changed(model)
        )

    @property
    def plan(self) -> Plan | None:
        """The chunks of the present pass; None outside of one."""
        return self._plan

    @contextlib.contextmanager
    def routed(self, names: Sequence[str], ids_BT: torch.Tensor) -> Iterator[Any]:
        """Yield the model for one pass over these ids; each row has the adapter of its name, or none for BASE."""
        self._plan = planned([self._slots.get(name, 0) for name in names], ids_BT.numel(), ids_BT.device)
        try:
            yield self._model
        finally:
            self._plan = None


def planned(slots: Sequence[int], tokens: int, device: torch.device | None = None) -> Plan:
    """Return the chunks of rows with these adapters, as large as if all adapters had equally many rows."""
    rows = len(slots)
    size = -(-rows // len(set(slots)))
    chunks: list[int] = []
    order: list[int] = []
    back = [0] * rows
    for slot in sorted(set(slots)):
        own = [row for row in range(rows) if slots[row] == slot]
        for start in range(0, len(own), size):
            for row in own[start : start + size]:
                back[row] = len(order)
                order.append(row)
            order += [own[0]] * (-len(order) % size)
            chunks.append(slot)
    follows = chunks == list(range(chunks[0], chunks[0] + len(chunks)))
    same = order == list(range(rows))
    return Plan(
        rows=rows,
        tokens=tokens,
        slots=slice(chunks[0], chunks[-1] + 1) if follows else torch.tensor(chunks, device=device),
        order=None if same else torch.tensor(order, device=device),
        back=None if same else torch.tensor(back, device=device),
    )


def _changed(model: PeftModel) -> list[Any]:
    """Return the layers that adapters have changed."""
    return [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def _stacked(layer: Any, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [N, I, R] and B [N, R, O] with the scaling in it; 0 for no adapter, and beyond an adapter's rank."""
    own = [name for name in names if name in layer.lora_A]
    rank = max(layer.lora_A[name].weight.shape[0] for name in own)
    some = layer.lora_A[own[0]].weight
    first_NIR = torch.zeros(len(names) + 1, layer.in_features, rank, dtype=some.dtype, device=some.device)
    second_NRO = torch.zeros(len(names) + 1, rank, layer.out_features, dtype=some.dtype, device=some.device)
    for slot, name in enumerate(names, start=1):
        if name in own:
            first_RI, second_OR = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
            first_NIR[slot, :, : len(first_RI)] = first_RI.T
            second_NRO[slot, : len(first_RI)] = second_OR.T * layer.scaling[name]
    return first_NIR, second_NRO


def _forward(
    mixer: Mixer,
    layer: Any,
    plain: Any,
    first_NIR: torch.Tensor,
    second_NRO: torch.Tensor,
    x: torch.Tensor,
    **options: Any,
) -> Any:
    plan = mixer.plan
    if plan is None:
        return plain(x, **options)
    result = layer.base_layer(x)
    x_BTI = _by_rows(x, plan).to(first_NIR.dtype)
    x_CMI = x_BTI if plan.order is None else x_BTI.index_select(0, plan.order)
    first_CIR, second_CRO = first_NIR[plan.slots], second_NRO[plan.slots]
    added_CMO = torch.bmm(torch.bmm(x_CMI.reshape(len(first_CIR), -1, x.shape[-1]), first_CIR), second_CRO)
    added_BTO = added_CMO.view(len(x_CMI), -1, added_CMO.shape[-1])
    if plan.back is not None:
        added_BTO = added_BTO.index_select(0, plan.back)
    return (result + added_BTO.view(result.shape)).to(result.dtype)


def _by_rows(x: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Return the inputs by rows. Raises ValueError for some of the tokens of a pass: nothing says whose they are."""
    if x.dim() == 3 and len(x) == plan.rows:
        return x
    if x.shape[:-1].numel() != plan.tokens:
        raise ValueError("a layer with adapters gets some of the tokens of a batch alone: serve merged weights")
    return x.reshape(plan.rows, -1, x.shape[-1])
