"""Artifacts of every kind on one tiny base, and a client of the server within this process."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from posttrain.artifact import Artifact
from posttrain.config.schema import LoraSettings
from posttrain.model.loading import load_model, new_adapter
from posttrain.model.saving import save_model
from posttrain.serve.app import make_app
from posttrain.serve.catalogue import BasePlace, Catalogue, read_catalogue
from posttrain.serve.service import Limits, Service, open_service
from tests.support.tiny import base_source, nudge, published, write_base

QUESTIONS = ("Hi", "What is this called?", "abc " * 12, "x", "Count to three, please.", "1+1=")


def make_artifact(
    folder: Path, base: Path, seed: int, *, full: bool = False, tokens: Sequence[int] = (), **lora: Any
) -> Artifact:
    """Publish an artifact with random weights that change the answers of ``base``."""
    source = base_source(base)
    model = load_model(source, "float32")
    if not full:
        model = new_adapter(model, LoraSettings(**{"r": 4, "alpha": 32, **lora}), seed, tokens)
    nudge(model, seed)
    draft = folder.with_name(f".{folder.name}")
    draft.mkdir(parents=True)
    save_model(model, source, draft, "float32")
    return published(draft, source, folder)


def make_artifacts(root: Path) -> dict[str, Artifact]:
    """Publish two plain adapters, one with DoRA, and full weights, on the base in ``root/base``."""
    base = write_base(root / "base")
    return {
        "one": make_artifact(root / "one", base, 1),
        "two": make_artifact(root / "two", base, 2),
        "dora": make_artifact(root / "dora", base, 3, dora=True),
        "full": make_artifact(root / "full", base, 4, full=True),
    }


def catalogue_of(*artifacts: Artifact) -> Catalogue:
    """Return the catalogue of artifacts that no gate has judged."""
    return read_catalogue([str(each.path) for each in artifacts], BasePlace(), unpromoted=True)


@contextmanager
def serving(*artifacts: Artifact, token: str | None = None, **limits: int) -> Iterator[Service]:
    """Serve artifacts inside, without a log."""
    service = open_service(catalogue_of(*artifacts), Limits(**limits), token)
    try:
        yield service
    finally:
        service.engine.stop()


def ask(service: Service, work: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    """Return the result of ``work`` with a client of the service."""

    async def talk() -> Any:
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=300) as client:
            return await work(client)

    return asyncio.run(talk())


def post(service: Service, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    """Return the answer to one request."""

    async def work(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(path, json=body)

    response: httpx.Response = ask(service, work)
    return response


def idle(service: Service) -> bool:
    """Wait until no answer is waiting or being made."""
    until = time.monotonic() + 300
    while any(service.gauges().values()) and time.monotonic() < until:
        time.sleep(0.01)
    return not any(service.gauges().values())


def chat(model: str, text: str, **body: Any) -> dict[str, Any]:
    """Return the body of a greedy request that asks for its tokens."""
    messages = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "max_tokens": 12, "temperature": 0, "return_token_ids": True, **body}


def events(text: str) -> list[dict[str, Any]]:
    """Return the pieces of a stream, which ends as it should."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
