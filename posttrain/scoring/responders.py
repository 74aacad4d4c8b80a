"""The models of a gate's systems: loaded when their systems are asked, weights shared by several only once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from posttrain.config.schema import Backend
from posttrain.scoring.harness.responder import Responder, Transformers
from posttrain.scoring.isolation import quiet
from posttrain.scoring.systems import Loading, group_by_weights

if TYPE_CHECKING:
    from posttrain.artifact import ModelSource


class Models(Protocol):
    """Models of systems on shared weights."""

    def responding_as(self, system: str) -> AbstractContextManager[Responder]:
        """Hand out the model to answer as ``system``."""


class Responders:
    """Every system of a gate, ready to be asked; weights stay in memory while no others need it."""

    def __init__(
        self,
        systems: Mapping[str, ModelSource],
        dtype: str,
        backend: Backend,
        batch_size: int,
        seed: int,
        loading: Loading,
        tokenizer: Any,
    ) -> None:
        self._systems, self._dtype, self._backend = systems, dtype, backend
        self._batch_size, self._seed, self._loading, self._tokenizer = batch_size, seed, loading, tokenizer
        self._held: dict[frozenset[str], Models] = {}

    def ask_each(self, systems: Sequence[str], ask: Callable[[str, Responder], None]) -> None:
        """Call ``ask`` with each of these systems and its model."""
        for group in group_by_weights({name: source for name, source in self._systems.items() if name in systems}):
            with quiet():
                models = self._held.pop(frozenset(group), None)
                self._held.clear()  # free the old weights before loading new ones
                models = models or self._load(group)
                for system in group:
                    with models.responding_as(system) as responder:
                        ask(system, responder)
            if len(group_by_weights(self._systems)) == 1:  # otherwise the next group needs the memory
                self._held[frozenset(group)] = models

    def _load(self, group: Mapping[str, ModelSource]) -> Models:
        first = next(iter(group.values()))
        if first.llama:
            from posttrain.scoring.harness.llama import Llama

            return Llama(first, self._tokenizer, self._batch_size)
        if self._backend is Backend.vllm:
            from posttrain.scoring.harness.vllm import Vllm

            return Vllm(group, self._dtype, self._systems["candidate"].tokenizer, self._batch_size, self._seed)
        return Transformers(group, self._dtype, self._loading, self._tokenizer, self._batch_size)
