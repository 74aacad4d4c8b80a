"""The systems of a gate: weights shared by several are loaded once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from posttrain.artifact import ModelSource
from posttrain.scoring.isolation import evaluating


@dataclass(frozen=True)
class Loading:
    """Loaders of models and tokenizers, and the device of the models."""

    model: Callable[[ModelSource, str], Any]
    tokenizer: Callable[[ModelSource], Any]
    device: str
    """Type of the device, such as ``cpu``."""


def group_by_weights(systems: Mapping[str, ModelSource]) -> list[dict[str, ModelSource]]:
    """Group systems by shared weights, for one load of each group."""
    groups: dict[object, dict[str, ModelSource]] = {}
    for name, source in systems.items():
        groups.setdefault(source.weights, {})[name] = source
    return list(groups.values())


class SharedWeights:
    """One base model with the adapter of every system on it."""

    def __init__(self, systems: Mapping[str, ModelSource], dtype: str, loading: Loading) -> None:
        self._systems = systems
        weights = replace(next(iter(systems.values())), adapter=None)
        self._model = loading.model(weights, dtype)
        for name, source in systems.items():
            if source.adapter is not None:
                self._attach(name, source.adapter)

    def _attach(self, name: str, adapter: Path) -> None:
        if isinstance(self._model, PeftModel):
            self._model.load_adapter(adapter, adapter_name=name)
        else:
            self._model = PeftModel.from_pretrained(self._model, adapter, adapter_name=name)

    @contextlib.contextmanager
    def speaking_as(self, name: str) -> Iterator[Any]:
        """Hand out the model as system ``name``, in evaluation mode."""
        with evaluating(self._model), self._adapter(name):
            yield self._model

    @contextlib.contextmanager
    def _adapter(self, name: str) -> Iterator[None]:
        if not isinstance(self._model, PeftModel):
            yield
        elif self._systems[name].adapter is None:
            with self._model.disable_adapter():
                yield
        else:
            self._model.set_adapter(name, inference_mode=True)  # else peft would make it trainable
            yield
