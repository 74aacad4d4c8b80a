"""The running server: the port taken, the models proven, then listening until a signal; answers under way are ended."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from types import FrameType
from typing import Any

import uvicorn

from posttrain.errors import reject
from posttrain.serve.app import make_app
from posttrain.serve.catalogue import Catalogue
from posttrain.serve.engine import Engine
from posttrain.serve.follower import Follower
from posttrain.serve.models import Models
from posttrain.serve.names import names_of
from posttrain.serve.proof import prove
from posttrain.serve.service import Limits, Service

GRACE = 30
"""Seconds that answers under way have to end after a signal."""


def take_port(host: str, port: int) -> socket.socket:
    """Return a socket bound to the port, which does not listen yet. Raises BadInput for one in use."""
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(kind, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        found.close()
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reject(f"{host}:{port}", f"cannot be listened on: {why}", "Give another one: --port N")
    return found


def open_service(catalogue: Catalogue, limits: Limits, token: str | None = None) -> Service:
    """Load and prove every model of a catalogue. Raises ArtifactDamaged naming what differs."""
    models = Models()
    engine = Engine(models.places, rows=limits.rows, queue=limits.queue)
    try:
        for served in (*catalogue.bases, *catalogue.artifacts):
            engine.call(lambda served=served: models.add(served))  # type: ignore[misc]
        for served in catalogue.artifacts:
            prove(models, engine, served.digest)
    except BaseException:
        engine.stop()
        raise
    loaded = frozenset(models.loaded)
    names = names_of(catalogue, {}, loaded)
    return Service(models=models, engine=engine, names=names, limits=limits, token=token, log=write_log)


def write_log(event: str, fields: Mapping[str, Any]) -> None:
    """Write a line of JSON to standard error: no word of a prompt, of an answer or of a token."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    print(json.dumps({"time": now, "event": event, **fields}), file=sys.stderr, flush=True)


def listen(service: Service, port: socket.socket, follower: Follower) -> None:
    """Answer on a port until SIGTERM or SIGINT; then take no request more, and end those under way."""
    config = uvicorn.Config(
        make_app(service), log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE, lifespan="off",
        server_header=False,
    )  # fmt: skip
    try:
        _Server(config, service).run(sockets=[port])
    finally:
        follower.stop()
        service.engine.stop()


class _Server(uvicorn.Server):
    """uvicorn's server, which ends without a second signal of its own."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals here; unlike uvicorn, do not raise them again once all has ended well."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at the first signal, at once at the second."""
        self._service.ready = False
        self.force_exit = self.should_exit
        self.should_exit = True
