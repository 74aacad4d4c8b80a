"""``posttrain serve``: promoted artifacts, and the base under them, over HTTP in OpenAI's form."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain import environment
from posttrain.commands.arguments import Arguments, parse
from posttrain.errors import reject, suggest
from posttrain.model.vllm_process import find_command
from posttrain.saved import read_text
from posttrain.serve.catalogue import BasePlace, Catalogue, read_catalogue

if TYPE_CHECKING:
    from posttrain.serve.service import Backend

USAGE = (
    "posttrain serve RUN|ARTIFACT... [--port N] [--host ADDRESS] [--token-file FILE] [--allow-unpromoted] [--check URL]"
    " [--backend embedded|vllm] [--vllm-command COMMAND]"
)
KEYS = ("model.path", "model.revision", "output_root", "batch", "queue", "max_tokens", "max_body")
OPTIONS = ("--port", "--host", "--token-file", "--check", "--backend", "--vllm-command")
BACKENDS = ("embedded", "vllm")
FLAGS = ("--allow-unpromoted",)
TOKEN = "POSTTRAIN_TOKEN"
"""Variable with the server's token."""
PORT = 8000
LOOPBACK = "127.0.0.1"


def main(words: list[str]) -> int:
    """Prove the models that are given, then serve them until a signal."""
    given = parse("serve", words, KEYS, options=OPTIONS, flags=FLAGS)
    if not given.plain:
        reject("serve", "needs a run or an artifact", USAGE)
    host, token = given.options.get("--host", LOOPBACK), _token(given)
    if token is None and not _is_loopback(host):
        fix = f"Set {TOKEN} in the environment, or give --token-file FILE"
        reject(f"--host {host}", "others can reach this address, and there is no token", fix)
    backend = given.options.get("--backend", BACKENDS[0])
    if backend not in BACKENDS:
        reject(f"--backend {backend}", "is no backend", suggest(backend, BACKENDS))
    limits, number = _limits(given), given.options.get("--port", str(PORT))
    if not number.isdecimal():
        reject(f"--port {number}", "is no number", USAGE)
    command = find_command(given.options.get("--vllm-command"), "--backend vllm") if backend == "vllm" else []
    before = dict(os.environ)
    if command:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the GPUs are vLLM's; this process proves on the CPU
    environment.prepare()
    root = given.settings.get("output_root")
    place = BasePlace(path=given.settings.get("model.path"), revision=given.settings.get("model.revision"))
    unpromoted = "--allow-unpromoted" in given.flags  # asked before a server's libraries are loaded
    catalogue = read_catalogue(given.plain, place, Path(root) if root else None, unpromoted=unpromoted)
    if url := given.options.get("--check"):
        from posttrain.serve.check import Remote, check

        _tell_left_out(catalogue)
        for line in check(catalogue, Remote(url, token)):
            print(f"proven     {line}", flush=True)
        return 0
    require_extra()
    from posttrain.serve.server import take_port

    with take_port(host, int(number)) as port:
        maker = _vllm(catalogue, command, before) if command else None
        _serve(catalogue, place, limits, token, maker, port, unpromoted=unpromoted)
    print("stopped    no answer is under way")
    return 0


def _limits(given: Arguments) -> dict[str, int]:
    """Return the most that the server does, by the names of its limits."""
    return {
        "rows": whole(given, "batch", 128), "queue": whole(given, "queue", 256),
        "max_tokens": whole(given, "max_tokens", 2048), "body": whole(given, "max_body", 1_000_000),
    }  # fmt: skip


def _serve(
    catalogue: Catalogue,
    place: BasePlace,
    limits: Mapping[str, int],
    token: str | None,
    backend: Backend | None,
    port: socket.socket,
    *,
    unpromoted: bool,
) -> None:
    with environment.importing():
        from posttrain.serve.follower import Follower
        from posttrain.serve.server import listen, write_log
        from posttrain.serve.service import Limits, embedded, open_service

    service = open_service(catalogue, Limits(**limits), token, backend or embedded)
    catalogue = service.catalogue
    _tell_left_out(catalogue)
    service.log = write_log
    follower = Follower(service, catalogue, place, unpromoted=unpromoted)
    follower.start()
    for served in (*catalogue.artifacts, *catalogue.bases):
        doubt = f", not promoted: {served.doubt}" if served.doubt else ""
        print(f"serving    {served.name} as {', '.join(service.names.of(served.digest))}{doubt}")
    host, number = port.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{number}/v1"
    listen(service, port, follower, lambda: print(f"proven     listening on {address}", flush=True))


def _vllm(catalogue: Catalogue, command: Sequence[str], environ: Mapping[str, str]) -> Backend:
    from posttrain.serve.ask import Generator
    from posttrain.serve.models import Models
    from posttrain.serve.server import write_log
    from posttrain.serve.service import Limits
    from posttrain.serve.vllm import VllmEngine, VllmModels

    def backend(limits: Limits) -> tuple[Models, Generator]:
        models = VllmModels(catalogue, command, environ, partial(write_log, "vllm"))
        return models, VllmEngine(models.routes, models.stop, rows=limits.rows, queue=limits.queue)

    return backend


def _tell_left_out(catalogue: Catalogue) -> None:
    for why in catalogue.skipped:
        print(f"left out   {why}")


def require_extra() -> None:
    """Raise BadInput when the packages of a server are not installed."""
    try:
        import fastapi
        import uvicorn
    except ImportError as error:
        reject("serve", f"{error.name} is not installed", "pip install 'posttrain[serve]'")
    del fastapi, uvicorn


def whole(given: Arguments, key: str, default: int) -> int:
    """Return a setting that is a whole number above 0. Raises BadInput for anything else."""
    value = given.settings.get(key, str(default))
    if not value.isdecimal() or int(value) < 1:
        reject(f"{key}={value}", "is no whole number above 0", f"{key}={default} is the default")
    return int(value)


def _token(given: Arguments) -> str | None:
    """Return the token in the file or in the environment; None when neither is given."""
    file = given.options.get("--token-file")
    if file is None:
        return os.environ.get(TOKEN) or None
    try:
        token = read_text(Path(file)).strip()
    except FileNotFoundError:
        reject(f"--token-file {file}", "there is no such file")
    if not token:
        reject(f"--token-file {file}", "the file is empty")
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
