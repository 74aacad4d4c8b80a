"""The systems of a gate: weights shared by several are loaded once."""

# N = bytes of a weight

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from posttrain.artifact import ModelSource
from posttrain.config.schema import Backend
from posttrain.engine.arithmetic import choose_inference
from posttrain.model.added_tokens import read_rows
from posttrain.model.loading import attach
from posttrain.scoring.isolation import evaluating


@dataclass(frozen=True)
class Loading:
    """Loaders of models and tokenizers, and the device of the models."""

    model: Callable[[ModelSource, str], Any]
    tokenizer: Callable[[ModelSource], Any]
    device: str
    """Type of the device, such as ``cpu``."""


def compute_dtype(backend: Backend, dtype: str, systems: Sequence[ModelSource]) -> str:
    """Return the number format in which all systems compute, with weights of ``dtype``: the faster one.

    vLLM computes in that of the weights, and so do quantised weights, with which all others are compared.
    """
    if backend is Backend.vllm or any(source.quantization is not None for source in systems):
        return dtype
    return choose_inference(dtype, systems[0])


def group_by_weights(systems: Mapping[str, ModelSource]) -> list[dict[str, ModelSource]]:
    """Group systems by shared weights, for one load of each group."""
    groups: dict[object, dict[str, ModelSource]] = {}
    for name, source in systems.items():
        groups.setdefault(source.weights, {})[name] = source
    return list(groups.values())


class SharedWeights:
    """Weights on which several systems stand, each of them alone.

    An adapter is put on a copy of the modules, which shares the weights. Some adapters write into these all the same
    when they are loaded: PiSSA and OLoRA leave a remainder, trained biases replace the base's. So nobody answers before
    the weights are shown to be those of the file, bit by bit, and weights that are not are loaded again.
    """

    def __init__(self, systems: Mapping[str, ModelSource], dtype: str, loading: Loading) -> None:
        self._systems, self._dtype, self._loading = systems, dtype, loading
        self._source = replace(next(iter(systems.values())), adapter=None, rows=None)
        self._model, self._bits = self._load()

    @contextlib.contextmanager
    def speaking_as(self, name: str) -> Iterator[Any]:
        """Hand out the model of system ``name``, in evaluation mode: its own, as if it were loaded alone."""
        weights, source = self._untouched(), self._systems[name]
        model = weights
        if source.adapter is not None:
            model = attach(twin(weights), source.adapter, source.rows)
        elif source.rows is not None:
            model = twin(weights)
            read_rows(model, source.rows)
        with evaluating(model):
            yield model

    def _untouched(self) -> Any:
        """Return the weights as loaded, without an adapter; load them again when one has changed them."""
        if self._bits != _bits(self._model):
            del self._model
            gc.collect()  # a model may hang in a circle, and both would not fit
            self._model, self._bits = self._load()
        return self._model

    def _load(self) -> tuple[Any, list[int]]:
        model = self._loading.model(self._source, self._dtype)
        return model, _bits(model)


def twin(model: torch.nn.Module) -> Any:
    """Return a copy of every module, configuration and hook of ``model`` on the same weights and buffers."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in _tensors(model)}
    scales = [tensor.quant_state for tensor in _tensors(model) if hasattr(tensor, "quant_state")]
    return copy.deepcopy(model, shared | {id(scale): scale for scale in scales})


def _bits(model: torch.nn.Module) -> list[int]:
    """Return the sum of the bits of every weight and buffer, read as integers: one changed number changes it."""
    return [_sum(tensor.detach().reshape(-1).view(torch.uint8)) for tensor in _tensors(model)]


def _sum(bytes_N: torch.Tensor) -> int:
    whole = len(bytes_N) - len(bytes_N) % 8
    if bytes_N.storage_offset() % 8:  # cannot be read as integers of eight bytes
        bytes_N = bytes_N.clone()
    return int(bytes_N[:whole].view(torch.int64).sum()) + int(bytes_N[whole:].sum())


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(model.parameters(), model.buffers())
