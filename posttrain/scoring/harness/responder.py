"""Models for lm_eval's requests, stopping at non-finite outputs and at prompts without room to answer.

lm_eval scores a NaN as a wrong answer: a diverged model would look merely bad.
"""

# B = requests in a batch, T = tokens, V = vocabulary

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from posttrain.digests import digest_of
from posttrain.errors import ArtifactDamaged, BadInput, shown
from posttrain.scoring.harness.lengths import too_long, too_much
from posttrain.scoring.harness.requests import AnswerRequest, ChatPrompt
from posttrain.scoring.isolation import plain_generation, tied_already
from posttrain.scoring.systems import Loading, SharedWeights

if TYPE_CHECKING:
    from posttrain.artifact import ModelSource


REPORT_SECONDS = 2.0
"""Seconds between two reports about tokens."""


class Responder:
    """Mixin for lm_eval's models: answers to a gate's requests, checked."""

    cut = 0
    """Number of prompts cut at their beginning to fit the model's context."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._report: Callable[[int], None] = lambda tokens: None
        self._tokens, self._reported = 0, 0.0
        self.ends: list[int] = []
        self._encoded: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def respond(self, requests: Sequence[Any], ends: Sequence[int], where: str, report: Callable[[int], None]) -> None:
        """Answer requests in place; beside the model's own end tokens, ``ends`` end a text.

        Every few seconds ``report`` gets the number of tokens read and written so far. Raises ArtifactDamaged
        naming ``where`` when an output is not finite.
        """
        sound, self.ends = True, list(ends)
        self._report, self._tokens, self._reported = report, 0, time.monotonic()
        for kind in dict.fromkeys(request.request_type for request in requests):
            asked = [request for request in requests if request.request_type == kind]
            repeated = [request for request in asked for _ in range(request.repeats or 1)]
            for request in asked:
                request.resps, request.filtered_resps = [], {}
            for request, given in zip(repeated, self._answer(kind, repeated), strict=True):
                request.resps.append(given)
                likelihood = given[0] if isinstance(given, tuple) else given
                sound = sound and (isinstance(likelihood, str) or math.isfinite(likelihood))
        if not (sound and self.finite()):
            raise ArtifactDamaged(f"{where}: the model's output is not finite; its weights hold NaN or infinity")

    def count(self, tokens: int) -> None:
        """Count tokens as they are read or written, and report them every few seconds."""
        self._tokens += tokens
        if (now := time.monotonic()) - self._reported >= REPORT_SECONDS:
            self._reported = now
            self._report(self._tokens)

    def finite(self) -> bool:
        """Return False when a logit behind a generated text was not finite; True where a backend hides its logits."""
        return True

    def _answer(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        """Return the answers to requests of one kind, of equal texts only one.

        The batches that a model gets depend on these requests alone: they decide the last bits of a logit.
        """
        # Repeats are generated every time: a task asks for them because sampled texts differ.
        if kind != "generate_until" or any((request.repeats or 1) > 1 for request in requests):
            return list(getattr(self, kind)(list(requests), disable_tqdm=True))
        keys = [digest_of([isinstance(request, ChatPrompt), *request.args]) for request in requests]
        asked = dict(zip(keys, requests, strict=True))
        texts = getattr(self, kind)(list(asked.values()), disable_tqdm=True)
        written = dict(zip(asked, texts, strict=True))
        return [written[key] for key in keys]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score as lm_eval does, but answers in a chat by their own ids.

        Raises BadInput when an answer alone is longer than the context.
        """
        answers = [request for request in requests if isinstance(request, AnswerRequest)]
        self._encoded = {request.args: (request.prompt_ids, request.answer_ids) for request in answers}
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))  # type: ignore[misc]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        model: Any = self
        pair: tuple[list[int], list[int]] | None = self._encoded.get((context, continuation))
        if pair is None:
            pair = super()._encode_pair(context, continuation)  # type: ignore[misc]
        if len(pair[1]) > model.max_length:
            raise BadInput(too_long(shown(continuation), len(pair[1]), model.max_length))
        return pair

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Generate as lm_eval does, but after a chat's own ids.

        Raises BadInput when the context has no room for a prompt beside the answer.
        """
        model: Any = self
        for request in requests:
            room = normalize_gen_kwargs(request.args[1], model.max_gen_toks)["max_gen_toks"]
            if room >= model.max_length:
                raise BadInput(too_much(str(request.task_name), room, model.max_length))
        before = model.add_bos_token
        # The prompts of a task are all chats, or none is.
        model.add_bos_token = False if any(isinstance(request, ChatPrompt) for request in requests) else None
        try:
            return list(super().generate_until(requests, disable_tqdm=disable_tqdm))  # type: ignore[misc]
        finally:
            model.add_bos_token = before  # likelihoods go by it, too


class TransformersResponder(Responder, HFLM):
    """A loaded transformers model, with or without an adapter."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        with tied_already(model):
            super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self._unsound = torch.zeros((), dtype=torch.bool, device=self.device)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Generate by the task's settings alone, up to the model's, the tokenizer's or the task's end tokens."""
        with plain_generation(self.model, [self.tokenizer.eos_token_id, *self.ends]):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def finite(self) -> bool:
        """Return True when every logit of the generated texts was finite."""
        return not bool(self._unsound)

    def tok_batch_encode(self, strings: list[str], left_truncate_len: int | None = None, **options: Any) -> Any:
        """Encode as HFLM does, and count the cut prompts."""
        ids_BT, mask_BT = super().tok_batch_encode(strings, **options)
        if left_truncate_len is None:
            return ids_BT, mask_BT
        self.cut += int((mask_BT.sum(dim=1) > left_truncate_len).sum())
        return ids_BT[:, -left_truncate_len:], mask_BT[:, -left_truncate_len:]

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **options: Any) -> Any:
        self.cut += sum(len(context) + len(choice) > self.max_length + 1 for _, context, choice in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)

    def _model_call(self, inps: torch.Tensor, **options: Any) -> torch.Tensor:
        logits_BTV: torch.Tensor = super()._model_call(inps, **options)
        self.count(inps.numel())
        return logits_BTV

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
        return super()._model_generate(context, max_length, stop, logits_processor=[self._watch], **options)

    def _watch(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        # Accumulated on the device and read once per block: a read at every token would stall the device. The maximum
        # is NaN or infinite whenever one of the logits is, except for -inf, which masks tokens on purpose.
        self.count(len(ids_BT))
        self._unsound |= ~torch.isfinite(logits_BV.amax(dim=-1)).all()
        return logits_BV


class Transformers:
    """Systems on shared weights, run by transformers: one load of the weights, with an adapter for each system."""

    def __init__(
        self, systems: Mapping[str, ModelSource], dtype: str, loading: Loading, tokenizer: Any, batch_size: int
    ) -> None:
        self._weights = SharedWeights(systems, dtype, loading)
        self._tokenizer, self._batch_size = tokenizer, batch_size

    @contextmanager
    def responding_as(self, system: str) -> Iterator[Responder]:
        """Hand out the model to answer as ``system``."""
        with self._weights.speaking_as(system) as model:
            yield TransformersResponder(model, self._tokenizer, self._batch_size)
