"""A GGUF file asked by llama.cpp, with the prompts, cuts and texts that lm_eval's model of transformers has.

llama.cpp reports the log-probabilities of the token that comes next. So an answer's likelihood takes a request for each
of its tokens, which reads that token alone: what is before it is in the cache.
"""

# B = rows, T = tokens

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from posttrain.errors import ArtifactDamaged, BadInput, Problem
from posttrain.model.llama import Ask, llama
from posttrain.model.reloading import empty_model
from posttrain.scoring.harness.responder import Responder, TransformersResponder

if TYPE_CHECKING:
    from posttrain.artifact import ModelSource

LIKELIEST = 256
"""Tokens asked for at first; all of them are when the answer's own is not among them."""
ALL = 1 << 24
"""More tokens than any file has."""
SHORTEST = 1024
"""Tokens of the least context that llama.cpp sets aside."""
FORCED = 1e4
"""Bias of the token that llama.cpp writes where only the log-probabilities count: it reports none beside a token that
is a part of a character. They are taken before any bias."""
DRAWING: Mapping[str, float] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
"""Settings of drawn texts, with the values that change nothing."""


class LlamaResponder(TransformersResponder):
    """A file of llama.cpp in place of a loaded model: ``model`` has its configuration, and no weights."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, open_context: Callable[[int], Ask]) -> None:
        super().__init__(model, tokenizer, batch_size)
        self._open = open_context
        words = (token for token in range(len(tokenizer)) if tokenizer.decode([token]).strip().isalpha())
        self._word = next(words)
        self._latest: tuple[tuple[int, ...], dict[int, float]] = (), {}

    @property
    def device(self) -> torch.device:
        """The device of the prompts."""
        return torch.device("cpu")

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **options: Any) -> Any:
        return [self._likelihood(context, answer) for _, context, answer in requests]

    def _likelihood(self, context: Sequence[int], answer: Sequence[int]) -> tuple[float, bool]:
        """Return the log-probability of an answer's ids, and True when they are the likeliest ones."""
        whole = [*context, *answer]
        ids = whole[-(self.max_length + 1) :]
        self.cut += len(ids) < len(whole)
        total, likeliest = 0.0, True
        for place in range(len(ids) - len(answer), len(ids)):
            logprob, best = self._next(ids[:place], ids[place], reuse=place > len(ids) - len(answer))
            total, likeliest = total + logprob, likeliest and best
        self.count(len(ids))
        return total, likeliest

    def _next(self, before: Sequence[int], token: int, *, reuse: bool) -> tuple[float, bool]:
        """Return the log-probability of a token after others, and True when no other one is likelier.

        With ``reuse`` the others but the last are in the cache; else all are read, so that nothing asked earlier has a
        part in the answer.
        """
        ids = tuple(before)
        if not reuse and self._latest[0] == ids and token in (known := self._latest[1]):  # of another choice
            return known[token], known[token] >= max(known.values())
        body = {"prompt": list(before), "n_predict": 1, "temperature": 0, "logit_bias": [[self._word, FORCED]]}
        for count in (LIKELIEST, ALL):
            answer = self._open(len(before) + 2)("/completion", {**body, "n_probs": count, "cache_prompt": reuse})
            found = {
                each["id"]: float(each["logprob"]) for each in answer["completion_probabilities"][0]["top_logprobs"]
            }
            self._latest = self._latest if reuse else (ids, found)
            if token in found:
                return found[token], found[token] >= max(found.values())
        raise ArtifactDamaged(f"llama.cpp reports no log-probability of token {token}: the file has no such token")

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        """Return prompts and greedy or drawn answers [B, T], padded on the right."""
        mask_BT, room = options.pop("attention_mask"), max_length - context.shape[1]
        drawing = _drawing(options)
        answers = [
            self._write(ids_T[mask_T.bool()].tolist(), room, stop, drawing)
            for ids_T, mask_T in zip(context, mask_BT, strict=True)
        ]
        filler = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eot_token_id
        width = max(map(len, answers))
        rows_BT = torch.tensor([[*answer, *[filler] * (width - len(answer))] for answer in answers], dtype=torch.long)
        return torch.cat([context, rows_BT.reshape(len(answers), width)], dim=1)

    def _write(self, prompt: list[int], room: int, stop: Sequence[str], drawing: Mapping[str, float]) -> list[int]:
        own = self.tokenizer.decode([self.eot_token_id])
        stops = [text for text in stop if text not in ("", own)]
        body = {"prompt": prompt, "n_predict": room, "stop": stops, **drawing}
        ask = self._open(len(prompt) + room + 1)
        tokens = list(ask("/completion", {**body, "return_tokens": True, "cache_prompt": False})["tokens"])
        self.count(len(prompt) + len(tokens))
        ends = {self.eot_token_id, *self.ends}
        return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def _drawing(options: Mapping[str, Any]) -> Mapping[str, float]:
    """Return llama.cpp's settings for lm_eval's. Raises BadInput for one that it does not have."""
    drawn = bool(options.get("do_sample"))
    given = {name: value for name, value in options.items() if name not in ("do_sample", "use_cache")}
    if unknown := sorted(given.keys() - DRAWING.keys()):
        fix = f"With gate.backend=llama a task may set {', '.join(DRAWING)}"
        raise BadInput(Problem(where=f"generation_kwargs.{unknown[0]}", what="is not known to llama.cpp", fix=fix))
    if not drawn:
        return {"temperature": 0}
    return {**DRAWING, **given, "seed": int(torch.randint(2**31, ()))}


class Llama:
    """The system of a GGUF file: llama.cpp, begun again where a text needs a longer context."""

    def __init__(self, source: ModelSource, tokenizer: Any, batch_size: int) -> None:
        self._source, self._tokenizer, self._batch_size = source, tokenizer, batch_size

    @contextmanager
    def responding_as(self, system: str) -> Iterator[Responder]:
        """Hand out the file to answer as ``system``."""
        with ExitStack() as served:
            held: list[tuple[int, Ask]] = []

            def open_context(tokens: int) -> Ask:
                if not held or held[-1][0] < tokens:
                    served.close()  # the former one would keep its memory
                    context = max(SHORTEST, 1 << (tokens - 1).bit_length())
                    held[:] = [(context, served.enter_context(llama(self._source.llama, context)))]
                return held[-1][1]

            yield LlamaResponder(empty_model(self._source), self._tokenizer, self._batch_size, open_context)
