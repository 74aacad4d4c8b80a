"""Answers in OpenAI's form, whole or piece by piece."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.serve.ask import Ended, Event, Token
from posttrain.serve.prompts import Prompter, Text
from posttrain.serve.requests import Asked


class Failed(Exception):
    """The model failed while it answered."""


@dataclass(kw_only=True)
class Choice:
    """One of the answers to a request, while it comes."""

    index: int
    prompter: Prompter
    asked: Asked
    prompt: Sequence[int]
    tokens: list[Token] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish: str | None = None
    """``stop`` or ``length`` once it is complete."""

    def __post_init__(self) -> None:
        """Begin the text."""
        self._text = Text(self.prompter, self.asked.stops)

    def is_done(self) -> bool:
        """Return True once the answer is complete."""
        return self.finish is not None

    def take(self, event: Event) -> str:
        """Take the next event and return the text that is certain with it. Raises Failed."""
        if self.finish is not None:  # the engine was a token ahead of the stop text
            return ""
        if isinstance(event, Ended):
            if event.fault:
                raise Failed(event.fault)
            self.finish, piece = event.reason, self._text.end()
        elif not (self.asked.stream or self.asked.stops):
            self.tokens.append(event)
            self._text.hold(event.id)
            return ""
        else:
            self.tokens.append(event)
            piece = self._text.add(event.id)
            if self._text.stopped:
                self.finish = "stop"
        self.pieces.append(piece)
        return piece

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Return the log-probabilities of some of its tokens, in the form of its request; None when not asked for."""
        if self.asked.top_logprobs is None:
            return None
        if self.asked.chat:
            return {"content": [self._entry(token) for token in tokens], "refusal": None}
        texts = [self.prompter.token(token.id) for token in tokens]
        starts = [sum(map(len, texts[:place])) for place in range(len(texts))]
        top = [{self.prompter.token(key): value for key, value in token.top} for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": top,
            "text_offset": starts,
        }

    def _entry(self, token: Token) -> dict[str, Any]:
        top = [self._scored(key, value) for key, value in token.top]
        return {**self._scored(token.id, token.logprob), "top_logprobs": top}

    def _scored(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.prompter.token(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answers to one request."""

    id: str
    asked: Asked
    digest: str
    choices: Sequence[Choice]
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def completion_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(len(choice.tokens) for choice in self.choices)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, each counted once."""
        return sum(len(choice.prompt) for choice in self.choices if choice.index % self.asked.n == 0)

    def whole(self) -> dict[str, Any]:
        """Return the complete answer."""
        kind = "chat.completion" if self.asked.chat else "text_completion"
        body = {**self._head(kind), "choices": [self._choice(choice) for choice in self.choices]}
        if self.asked.token_ids:
            body["prompt_token_ids"] = list(self.choices[0].prompt)
        return {**body, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Return the numbers of tokens."""
        prompt, answers = self.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}

    def opening(self, choice: Choice) -> dict[str, Any]:
        """Return the first piece of a chat's answer, with its role."""
        return self._chunk([self._piece(choice, {"role": "assistant", "content": ""}, None)])

    def piece(self, choice: Choice, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return a piece of an answer with its new text and tokens."""
        part: Any = {"content": text} if self.asked.chat else text
        entry = self._piece(choice, part, None)
        entry["logprobs"] = choice.logprobs(tokens)
        if self.asked.token_ids:
            entry["token_ids"] = [token.id for token in tokens]
        return self._chunk([entry])

    def closing(self, choice: Choice) -> dict[str, Any]:
        """Return the last piece of an answer, with the reason of its end."""
        return self._chunk([self._piece(choice, {} if self.asked.chat else "", choice.finish)])

    def usage_chunk(self) -> dict[str, Any]:
        """Return the piece after all others, with the numbers of tokens."""
        return {**self._chunk([]), "usage": self.usage()}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.asked.model,
            "system_fingerprint": self.digest,
        }  # fmt: skip

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk" if self.asked.chat else "text_completion"), "choices": choices}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.pieces)
        said: dict[str, Any] = {"text": text}
        if self.asked.chat:
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        entry = {
            "index": choice.index, **said, "logprobs": choice.logprobs(choice.tokens), "finish_reason": choice.finish,
        }  # fmt: skip
        return {**entry, "token_ids": [token.id for token in choice.tokens]} if self.asked.token_ids else entry

    def _piece(self, choice: Choice, part: Any, finish: str | None) -> dict[str, Any]:
        return {
            "index": choice.index, "delta" if self.asked.chat else "text": part, "logprobs": None,
            "finish_reason": finish,
        }  # fmt: skip
