"""The running server: the port taken, the models proven, then listening until a signal; answers under way are ended."""

from __future__ import annotations

import contextlib
import gc
import json
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from types import FrameType
from typing import Any

import uvicorn

from posttrain.errors import reject
from posttrain.serve.app import make_app
from posttrain.serve.follower import Follower
from posttrain.serve.service import Service

GRACE = 30
"""Seconds that answers under way have to end after a signal."""
IDLE = 75
"""Seconds that a connection stays open without a request. Clients keep one for 5, as uvicorn would: one of them could
send into the end of it."""


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


def write_log(event: str, fields: Mapping[str, Any]) -> None:
    """Write a line of JSON to standard error: no word of a prompt, of an answer or of a token."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    print(json.dumps({"time": now, "event": event, **fields}), file=sys.stderr, flush=True)


def listen(service: Service, port: socket.socket, follower: Follower, announce: Callable[[], None]) -> None:
    """Answer on a port until SIGTERM or SIGINT; then take no request more, and end those under way.

    ``announce`` is called once the first request would be answered.
    """
    config = uvicorn.Config(
        make_app(service), log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE, lifespan="off",
        server_header=False, timeout_keep_alive=IDLE,
    )  # fmt: skip
    gc.collect()
    gc.freeze()  # the models stay; looking through all that they hold took a sixth of a small one's decoding
    try:
        _Server(config, service, announce).run(sockets=[port])
    finally:
        gc.unfreeze()
        follower.stop()
        service.engine.stop()


class _Server(uvicorn.Server):
    """uvicorn's server, which ends without a second signal of its own."""

    def __init__(self, config: uvicorn.Config, service: Service, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._announce = service, announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so. Raises BadInput when another server took the port while the models were loaded."""
        for each in sockets or ():
            try:
                each.listen()  # here, as uvloop's own try tells nobody that it failed
            except OSError as error:
                reject("{}:{}".format(*each.getsockname()), f"cannot be listened on: {error.strerror}", "--port N")
        await super().startup(sockets)
        self._announce()

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
