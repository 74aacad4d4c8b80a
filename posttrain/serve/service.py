"""The service behind the addresses: names resolved, limits kept, answers begun, figures counted.

It runs on one event loop. The engine's thread hands events over to it, and knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from posttrain.errors import ArtifactDamaged, BadInput, PosttrainError
from posttrain.serve.ask import Ask, Ended, Event, Generator, Token
from posttrain.serve.catalogue import Catalogue, Served
from posttrain.serve.engine import Engine, QueueFull, Unavailable, Unloaded
from posttrain.serve.metrics import Metrics
from posttrain.serve.models import Loaded, Models
from posttrain.serve.names import SHORTEST, Names, names_of
from posttrain.serve.proof import prove
from posttrain.serve.replies import Choice, Failed, Reply
from posttrain.serve.requests import Asked, RequestError

Log = Callable[[str, Mapping[str, Any]], None]
Backend = Callable[["Limits"], tuple[Models, Generator]]
"""Makes the models of a server and what generates, within the limits."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that one server does."""

    rows: int = 128
    """Most answers made at once."""
    queue: int = 256
    """Answers that may wait."""
    max_tokens: int = 2048
    """Tokens of one answer."""
    body: int = 1_000_000
    """Bytes of a request."""


@dataclass(kw_only=True)
class Service:
    """Everything that a running server has."""

    models: Models
    engine: Generator
    names: Names
    """Replaced as a whole when an alias moves: a request sees one state of it."""
    limits: Limits = field(default_factory=Limits)
    token: str | None = None
    """Bearer token of every request; None asks for none."""
    metrics: Metrics = field(default_factory=Metrics)
    log: Log = field(default=lambda event, fields: None)
    ready: bool = True
    catalogue: Catalogue
    """The models that it began with, all of them proven."""

    @property
    def answers(self) -> bool:
        """True while the server takes requests and its models can be asked."""
        return self.ready and self.engine.ready

    def find(self, name: str) -> Loaded:
        """Return the model of this name, at this moment. Raises RequestError (404) with the names."""
        names = self.names
        digest = names.find(name)
        if digest is None:
            listed = ", ".join(sorted(names.aliases))
            message = f"there is no model {name[:80]!r}; names: {listed}, or a digest of {SHORTEST} characters or more"
            if len(name) >= SHORTEST and re.fullmatch("[0-9a-f]+", name):
                message += ". A digest that no name needs is unloaded: posttrain promote NAME DIGEST loads it again"
            raise RequestError(404, message, "model", "model_not_found")
        return self.models.loaded[digest]

    def begin(self, asked: Asked) -> Exchange:
        """Resolve the model and queue the answers. Raises RequestError naming the limit that is passed."""
        loaded = self.find(asked.model)
        prompts = _prompts(loaded, asked)
        limit = min(self._room(loaded, asked, prompt) for prompt in prompts)
        reply = Reply(
            id=f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}",
            asked=asked,
            digest=loaded.served.digest,
            choices=[
                Choice(index=place * asked.n + n, prompter=loaded.prompter, asked=asked, prompt=prompt)
                for place, prompt in enumerate(prompts)
                for n in range(asked.n)
            ],
        )
        exchange = Exchange(reply=reply, loaded=loaded, service=self)
        exchange.submit(limit)
        return exchange

    def gauges(self) -> dict[str, int]:
        """Return the present lengths of the queue and of the batch."""
        return {"waiting": self.engine.waiting, "running": self.engine.running}

    def _room(self, loaded: Loaded, asked: Asked, prompt: list[int]) -> int:
        """Return the most tokens of an answer to this prompt."""
        if asked.max_tokens is not None and asked.max_tokens > self.limits.max_tokens:
            message = f"max_tokens is {asked.max_tokens:,}; this server makes at most {self.limits.max_tokens:,}"
            raise RequestError(400, message, "max_tokens")
        room = self.limits.max_tokens if loaded.context is None else loaded.context - len(prompt)
        where = "messages" if asked.chat else "prompt"
        wanted = asked.max_tokens or 1
        if wanted > room:
            message = (
                f"the prompt has {len(prompt):,} tokens and the answer at least {wanted:,}, "
                f"more than the {loaded.context:,} of the model"
            )
            raise RequestError(400, message, where, "context_length_exceeded")
        return asked.max_tokens or min(room, self.limits.max_tokens)


def embedded(limits: Limits) -> tuple[Models, Generator]:
    """Return the models of this process and the thread that generates."""
    models = Models()
    return models, Engine(models.places, rows=limits.rows, queue=limits.queue)


def open_service(
    catalogue: Catalogue, limits: Limits, token: str | None = None, backend: Backend = embedded
) -> Service:
    """Load and prove every model of a catalogue; one that cannot be proven is left out.

    Raises ArtifactDamaged naming what differs when none is left.
    """
    models, engine = backend(limits)
    faults: dict[str, PosttrainError] = {}

    def attempt(served: Served, work: Callable[[], object]) -> None:
        try:
            work()
        except (ArtifactDamaged, BadInput) as error:
            faults[served.digest] = error

    try:
        for served in catalogue.bases:
            engine.call(partial(models.add, served))
        for served in catalogue.artifacts:
            attempt(served, partial(engine.call, partial(models.add, served)))
        for served in catalogue.artifacts:  # once all are loaded: one may have changed another
            if served.digest not in faults:
                attempt(served, partial(prove, models, engine, served.digest))
        left = catalogue.without(faults)
        for digest in (*faults, *(base.digest for base in catalogue.bases if base not in left.bases)):
            drop(models, engine, digest)
    except BaseException:
        engine.stop()
        raise
    names = names_of(left, {}, frozenset(models.loaded))
    return Service(models=models, engine=engine, names=names, limits=limits, token=token, catalogue=left)


def take_in(models: Models, engine: Generator, served: Served) -> None:
    """Load a model between two tokens and prove it; it is gone again when that fails, and the error is raised."""
    try:
        engine.call(partial(models.add, served))
        prove(models, engine, served.digest)
    except BaseException:
        drop(models, engine, served.digest)
        raise


def drop(models: Models, engine: Generator, digest: str) -> bool:
    """Free a loaded model unless an answer of it is waiting or being made; return True when it is gone."""

    def work() -> bool:
        if digest in models.loaded and engine.release(digest):
            models.remove(digest)
        return digest not in models.loaded

    return engine.call(work)


@dataclass(eq=False, kw_only=True)
class Exchange:
    """One request and its answers on their way."""

    reply: Reply
    loaded: Loaded
    service: Service
    started: float = field(default_factory=time.monotonic)

    def submit(self, max_tokens: int) -> None:
        """Queue the answers. Raises RequestError (429) when too many wait."""
        self._arrived: asyncio.Queue[list[tuple[int, Event]]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._outlets = [Outlet(choice, loop, self._arrived) for choice in self.reply.choices]
        self._asks = [
            Ask(
                system=self.reply.digest, prompt=list(choice.prompt), ends=self.loaded.ends,
                sampling=self.reply.asked.sampling(max_tokens, choice.index), send=outlet.send,
            )
            for choice, outlet in zip(self.reply.choices, self._outlets, strict=True)
        ]  # fmt: skip
        try:
            self.service.engine.submit(self._asks)
        except QueueFull:
            error = RequestError(429, f"{self.service.engine.waiting} answers wait already: try again", None, "queue")
            error.headers["Retry-After"] = "1"
            raise error from None
        except Unavailable:
            error = RequestError(503, "the model is being started again: try again", "model", "unavailable")
            error.headers["Retry-After"] = "5"
            raise error from None
        except Unloaded:
            message = f"the model {self.reply.digest[:12]} has just been replaced: try again"
            raise RequestError(503, message, "model") from None

    def cancel(self) -> None:
        """Let the engine drop what is left."""
        for ask in self._asks:
            ask.cancelled = True

    async def pieces(self) -> AsyncIterator[tuple[Choice, str, Token | None]]:
        """Yield each token's choice with the text that is certain with it; no token comes with the end. Raises Failed.

        Whoever stops listening cancels the answers.
        """
        going, first = len(self.reply.choices), True
        try:
            while going:
                arrived = await self._arrived.get()
                if first:
                    self.service.metrics.observe("first_token_seconds", self.seconds, model=self.reply.digest)
                first = False
                for index, event in arrived:
                    choice = self.reply.choices[index]
                    if choice.is_done():
                        continue
                    piece = choice.take(event)
                    if choice.is_done():
                        going -= 1
                        self._asks[index].cancelled = True
                    yield choice, piece, event if isinstance(event, Token) else None
        finally:
            self.cancel()

    async def whole(self) -> dict[str, Any]:
        """Return the complete answer. Raises RequestError (500) when the model fails."""
        try:
            async for _ in self.pieces():
                pass
        except Failed as error:
            raise RequestError(500, f"the model failed: {error}") from None
        return self.reply.whole()

    @property
    def generated(self) -> int:
        """Tokens of all answers so far, with those that are kept back."""
        return self.reply.completion_tokens + sum(outlet.kept for outlet in self._outlets)

    @property
    def seconds(self) -> float:
        """Time since the request."""
        return time.monotonic() - self.started

    def headers(self) -> dict[str, str]:
        """Return the headers that tell which model answers, and that it is not promoted."""
        served = self.loaded.served
        found = {"X-Posttrain-Digest": served.digest, "X-Request-Id": self.reply.id}
        if served.doubt is not None:
            found["X-Posttrain-Unpromoted"] = " ".join(served.doubt.split()).encode("ascii", "replace").decode()[:500]
        return found

    def finish(self, status: int) -> None:
        """Count the request, and write it into the log."""
        reply, metrics = self.reply, self.service.metrics
        metrics.count("requests_total", model=reply.digest, status=str(status))
        metrics.count("tokens_total", reply.prompt_tokens, model=reply.digest, kind="prompt")
        metrics.count("tokens_total", self.generated, model=reply.digest, kind="completion")
        metrics.observe("request_seconds", self.seconds, model=reply.digest)
        self.service.log("request", {
            "id": reply.id, "status": status, "asked": reply.asked.model[:80], "model": reply.digest,
            "stream": reply.asked.stream, **reply.usage(), "seconds": round(self.seconds, 4),
        })  # fmt: skip


def _prompts(loaded: Loaded, asked: Asked) -> list[list[int]]:
    try:
        if asked.chat:
            return [loaded.prompter.chat(asked.messages)]
        found = [list(each) if isinstance(each, tuple) else loaded.prompter.plain(each) for each in asked.prompts]
    except BadInput as error:
        problem = error.problems[0]
        raise RequestError(400, f"{problem.where} {problem.what}", problem.where) from None
    rows = loaded.rows
    for ids in found:
        if not ids:
            raise RequestError(400, "prompt has no token", "prompt")
        if not all(0 <= each < rows for each in ids):
            raise RequestError(400, f"prompt holds an id beyond the model's {rows:,}", "prompt")
    return found


class Outlet:
    """Takes the events of one answer from the engine's thread to the loop of its request.

    An answer that is read whole arrives in two parts, its first token and the rest: a thread wakes the loop for each
    part, and both can run Python only in turns.
    """

    def __init__(
        self, choice: Choice, loop: asyncio.AbstractEventLoop, arrived: asyncio.Queue[list[tuple[int, Event]]]
    ) -> None:
        """Hand the choice's events over to ``arrived``, a queue of ``loop``."""
        self._choice, self._loop, self._arrived = choice, loop, arrived
        self._at_once = True
        self._kept: list[tuple[int, Event]] = []

    def send(self, event: Event) -> None:
        """Take the next event."""
        self._kept.append((self._choice.index, event))
        if self._at_once or isinstance(event, Ended):
            kept, self._kept = self._kept, []
            self._at_once = self._choice.asked.stream or bool(self._choice.asked.stops)
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
                self._loop.call_soon_threadsafe(self._arrived.put_nowait, kept)

    @property
    def kept(self) -> int:
        """Tokens that are not handed over yet."""
        return len(self._kept)
