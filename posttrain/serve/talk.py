"""A talk with models in this process: each has its own turns, and answers piece by piece."""

from __future__ import annotations

import queue
import secrets
from collections.abc import Iterator

from posttrain.errors import reject
from posttrain.serve.ask import Ask, Ended, Event, Sampling
from posttrain.serve.models import Loaded
from posttrain.serve.prompts import Text
from posttrain.serve.service import Service


class Talk:
    """A talk with one model, or with several that are asked the same."""

    def __init__(self, service: Service, names: list[str], *, temperature: float, max_tokens: int) -> None:
        """Take the names of models. Raises BadInput for an unknown one."""
        self._service, self._temperature, self._max_tokens = service, temperature, max_tokens
        self.switch(names)

    def switch(self, names: list[str]) -> None:
        """Talk with these models from now on, from the beginning. Raises BadInput for an unknown one."""
        self._service.names.require(names)
        self.names = names
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._turns: dict[str, list[dict[str, str]]] = {name: [] for name in self.names}

    def answer(self, name: str, text: str) -> Iterator[str]:
        """Yield the answer of one model to the next turn, piece by piece; both become part of its talk.

        Raises BadInput when the talk is longer than the model, or the text holds a special token.
        """
        loaded = self._service.models.loaded[str(self._service.names.find(name))]
        turns = [*self._turns[name], {"role": "user", "content": text}]
        pieces = []
        for piece in self._made(loaded, loaded.prompter.chat(turns)):
            pieces.append(piece)
            yield piece
        self._turns[name] = [*turns, {"role": "assistant", "content": "".join(pieces)}]

    def _made(self, loaded: Loaded, prompt: list[int]) -> Iterator[str]:
        room = self._max_tokens if loaded.context is None else min(self._max_tokens, loaded.context - len(prompt))
        if room < 1:
            reject(
                "the talk", f"has {len(prompt):,} tokens, and the model reads {loaded.context:,}", "/new begins anew"
            )
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        sampling = Sampling(max_tokens=room, temperature=self._temperature, seed=secrets.randbits(62))
        ask = Ask(
            system=loaded.served.digest, prompt=prompt, sampling=sampling, ends=loaded.ends, send=events.put
        )  # fmt: skip
        self._service.engine.submit([ask])
        text = Text(loaded.prompter)
        try:
            while not isinstance(event := events.get(), Ended):
                yield text.add(event.id)
            if event.fault:
                reject(loaded.served.name, f"the model failed: {event.fault}")
            yield text.end()
        finally:
            ask.cancelled = True
