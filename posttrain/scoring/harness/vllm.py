"""Systems run by vLLM: many times faster on a GPU, never compared with answers from transformers.

The two round differently, and greedy texts differ; the backend is part of every cache key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.models.vllm_causallms import VLLM
from vllm.lora.request import LoRARequest

from posttrain.errors import BadInput, Problem
from posttrain.model.vllm import missing_parts, rank_of, room_for
from posttrain.scoring.harness.responder import Responder

if TYPE_CHECKING:
    from posttrain.artifact import ModelSource


class VllmResponder(Responder, VLLM):
    """A model in vLLM. It hides the logits of generated texts: only likelihoods are checked to be finite."""

    def modify_gen_kwargs(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str], int]:
        """Return lm_eval's settings of a generation, with the task's end tokens."""
        settings, until, room = super().modify_gen_kwargs(*args, **kwargs)
        return {**settings, "stop_token_ids": self.ends}, until, room


class Vllm:
    """Systems on shared weights: one engine, which applies the adapter of the system asked."""

    def __init__(
        self, systems: Mapping[str, ModelSource], dtype: str, tokenizer: Path, batch_size: int, seed: int
    ) -> None:
        self._requests: dict[str, LoRARequest | None] = {}
        adapters = {name: source.adapter for name, source in systems.items() if source.adapter is not None}
        ranks = [_rank(systems[name], adapter) for name, adapter in adapters.items()]
        for number, name in enumerate(systems, start=1):
            path = adapters.get(name)
            self._requests[name] = None if path is None else LoRARequest(name, number, str(path))
        weights = next(iter(systems.values()))
        self._model = VllmResponder(
            pretrained=str(weights.model),
            tokenizer=str(tokenizer),
            dtype=dtype,
            batch_size=batch_size,
            seed=seed,
            lora_local_path=str(next(iter(adapters.values()))) if adapters else None,
            max_lora_rank=max(8, room_for(ranks)),
        )

    @contextmanager
    def responding_as(self, system: str) -> Iterator[Responder]:
        """Hand out the engine to answer as ``system``."""
        self._model.lora_request = self._requests[system]
        yield self._model


def _rank(source: ModelSource, adapter: Path) -> int:
    """Return the largest rank of an adapter. Raises BadInput when vLLM would apply only part of it, in silence."""
    if missing := missing_parts(source):
        what = f"it has {' and '.join(missing)}, which gates cannot score with vLLM"
        raise BadInput(Problem(where=str(adapter), what=what, fix="Set gate.backend=hf"))
    return rank_of(source)
