"""The addresses of a server, in OpenAI's form where there is one."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from posttrain.serve.replies import Failed
from posttrain.serve.requests import Parser, RequestError, parse_body, parse_chat, parse_completion
from posttrain.serve.service import Exchange, Service

GONE = 499
"""Status, in figures and log alone, of a request whose client left."""


def make_app(service: Service) -> FastAPI:
    """Return the application of a service."""
    app = FastAPI(title="posttrain", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(RequestError)
    async def explain(request: Request, error: RequestError) -> Response:
        return _error(service, error)

    @app.exception_handler(HTTPException)
    async def explain_http(request: Request, error: HTTPException) -> Response:
        return _error(service, RequestError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    @app.exception_handler(Exception)  # a fault of ours: the client has this answer, the log the traceback
    async def explain_fault(request: Request, error: Exception) -> Response:
        return _error(service, RequestError(500, f"{request.method} {request.url.path}: the server failed"))

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        return JSONResponse({"ready": service.answers}, status_code=200 if service.answers else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        _authorise(service, request)
        return PlainTextResponse(service.metrics.text(service.gauges()), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        _authorise(service, request)
        names = service.names
        listed = [_model(service, name) for name in (*names.aliases, *sorted(names.digests))]
        return JSONResponse({"object": "list", "data": listed})

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> Response:
        _authorise(service, request)
        return JSONResponse(_model(service, name))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(service, request, parse_chat)

    @app.post("/v1/completions")
    async def completion(request: Request) -> Response:
        return await _answer(service, request, parse_completion)

    return app


def _error(service: Service, error: RequestError) -> Response:
    service.metrics.count("requests_total", model="", status=str(error.status))
    service.log("rejected", {"status": error.status, "param": (error.param or "")[:80], "code": error.code})
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def _authorise(service: Service, request: Request) -> None:
    """Raise RequestError (401) without the server's token."""
    if service.token is None:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode(), service.token.encode())
    if kind.lower() != "bearer" or not right:
        error = RequestError(401, "the token is missing or wrong: Authorization: Bearer TOKEN", None, "invalid_api_key")
        error.headers["WWW-Authenticate"] = "Bearer"
        raise error


def _model(service: Service, name: str) -> dict[str, Any]:
    served = service.find(name).served
    return {
        "id": name, "object": "model", "created": 0, "owned_by": "posttrain", "root": served.digest,
        "parent": served.base.digest, "name": served.name, "promoted": served.doubt is None,
    }  # fmt: skip


async def _answer(service: Service, request: Request, parse: Parser) -> Response:
    _authorise(service, request)
    asked = parse(parse_body(await _body(request, service.limits.body)))
    if not service.ready:
        raise RequestError(503, "the server is stopping")
    exchange = service.begin(asked)
    if asked.stream:
        return StreamingResponse(_stream(exchange), media_type="text/event-stream", headers=exchange.headers())
    return await _whole(exchange, request)


async def _body(request: Request, limit: int) -> bytes:
    """Return the body. Raises RequestError (413) as soon as it is longer than ``limit``."""
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > limit:
            raise RequestError(413, f"the body has more than {limit:,} bytes")
    return bytes(found)


async def _whole(exchange: Exchange, request: Request) -> Response:
    """Return the complete answer, or drop it when the client leaves."""
    answer, left = asyncio.create_task(exchange.whole()), asyncio.create_task(_left(request))
    status = GONE
    try:
        await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return Response(status_code=GONE)
        body = answer.result()
        status = 200
        return JSONResponse(body, headers=exchange.headers())
    except RequestError as error:
        status = error.status
        raise
    finally:
        for task in (answer, left):
            task.cancel()
        exchange.cancel()
        exchange.finish(status)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(exchange: Exchange) -> AsyncIterator[str]:
    """Yield the answer as server-sent events."""
    reply, status = exchange.reply, GONE
    fresh: dict[int, list[Any]] = {choice.index: [] for choice in reply.choices}
    try:
        if reply.asked.chat:
            for choice in reply.choices:
                yield _event(reply.opening(choice))
        async for choice, piece, token in exchange.pieces():
            tokens = fresh[choice.index]
            tokens += [token] if token is not None else []
            if piece or (tokens and choice.is_done()):
                yield _event(reply.piece(choice, piece, tokens))
                tokens.clear()
            if choice.is_done():
                yield _event(reply.closing(choice))
        if reply.asked.usage_in_stream:
            yield _event(reply.usage_chunk())
        status = 200
        yield "data: [DONE]\n\n"
    except Failed as error:
        status = 500
        yield _event(RequestError(500, f"the model failed: {error}").body())
    finally:
        exchange.cancel()
        exchange.finish(status)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
