"""A process of vLLM: begun, watched, begun again when it ends, and ended with this one whatever happens to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.errors import ArtifactDamaged, reject, shown
from posttrain.host.supervisor import die_with

COMMAND = "POSTTRAIN_VLLM"
"""Variable of the environment with the command that starts vLLM: no recipe names a program that is run."""
WAYS = f"--vllm-command, or {COMMAND} in the environment"
SERVE = "serve"
"""vLLM's word before the options of a server."""
TOLD = {"VLLM_NO_USAGE_STATS": "1"}
"""Variables of vLLM's environment unless the user has others: it would tell its makers of its use."""
HOST, NAME = "127.0.0.1", "base"
"""vLLM's address, and its name of the weights."""
TICK = 0.1
"""Seconds between two looks at the process."""
PAUSES = (1.0, 30.0)
"""Seconds before a process is begun again: the first, which is doubled each time, and the longest."""
STEADY = 60.0
"""Seconds after which a process that ends is begun again without a longer pause."""
GRACE = 20.0
"""Seconds that vLLM has to end after SIGTERM."""
SECONDS = 600
"""Longest wait for a word of vLLM."""
LONGEST = 300
"""Most characters of a reason that vLLM gives."""
ELSEWHERE = "initialization failed"
"""Words in the errors of vLLM's processes about each other's, whose own error comes before."""
_STAMP = re.compile(r"^\(\w+ pid=\d+\) ?(?:ERROR [\d-]+ [\d:]+ \[[^]]*\] ?)?")
"""What vLLM's processes begin their lines with."""
_ERROR = re.compile(r"[\w.]*(?:Error|Exception): ")
"""Beginning of the last line of a traceback."""
GUARD = 'read -r group && { read -r end; kill -s KILL -- "-$group"; }'
"""Shell's program that ends the group of processes it reads, once nobody holds the other end of its input."""
Tell = Callable[[Mapping[str, Any]], None]
_BROKEN = (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError)
"""Errors of a word that is not vLLM's, or breaks off."""


class Process:
    """vLLM on some weights, with the adapters that are loaded into it."""

    def __init__(
        self, command: Sequence[str], model: Path, options: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        """Take the words that begin vLLM, the folder of the weights and vLLM's further options."""
        self._key = secrets.token_hex(16)
        self._environment = {
            **TOLD, **environment, "VLLM_API_KEY": self._key, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        }  # fmt: skip
        self._port = _free_port()
        # vLLM wants the model before its options
        after = command.index(SERVE) + 1 if SERVE in command else len(command)
        self._command = [
            *command[:after], str(model), *command[after:],
            "--host", HOST, "--port", str(self._port), "--served-model-name", NAME,
            "--generation-config", "vllm", "--uvicorn-log-level", "warning", *options,
        ]  # fmt: skip
        self._adapters: dict[str, Path] = {}
        self._fault = ""
        self._begun, self._ending = threading.Event(), threading.Event()
        self.ready = False
        """True while it answers."""
        self.context: int | None = None
        """Most tokens of prompt and answer, which the command may have set; None when vLLM names no limit."""
        self.tell: Tell = lambda fields: None
        """Takes what happens to the process, for the log."""
        # The kernel ends vLLM with the thread that began it: this one lives as long as the process.
        self._thread = threading.Thread(target=self._keep, name="vllm", daemon=True)

    def start(self) -> None:
        """Begin the process and wait until it answers. Raises BadInput when it ends before that."""
        self._thread.start()
        self._begun.wait()
        if self._fault:
            reject(" ".join(self._command[:2]), self._fault, f"Give the command that starts vLLM: {WAYS}")

    def stop(self) -> None:
        """End the process."""
        self._ending.set()
        if self._thread.ident is not None:
            self._thread.join()

    def load(self, name: str, path: Path) -> None:
        """Load an adapter under a name. Raises ArtifactDamaged when vLLM rejects it."""
        body = {"lora_name": name, "lora_path": str(path.resolve())}
        status, said = self._ask("POST", "/v1/load_lora_adapter", body)
        if status != 200:
            raise ArtifactDamaged(f"{path}: vLLM cannot load the adapter (status {status}): {reason_of(said)}")
        self._adapters[name] = path

    def unload(self, name: str) -> None:
        """Free an adapter."""
        self._adapters.pop(name, None)
        with contextlib.suppress(OSError):  # it has ended, and will begin without it
            self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    @contextlib.contextmanager
    def answering(self, body: Mapping[str, Any]) -> Iterator[http.client.HTTPResponse]:
        """Post a request for a completion and yield the answer, to be read as it comes; leaving it drops the rest."""
        connection = http.client.HTTPConnection(HOST, self._port, timeout=SECONDS)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), self._headers())
            yield connection.getresponse()
        finally:
            connection.close()

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=SECONDS)
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body), self._headers())
            answer = connection.getresponse()
            return answer.status, answer.read()

    def _keep(self) -> None:
        """Begin the process, again whenever it ends, until it shall end."""
        pause, longest = PAUSES
        while not self._ending.is_set():
            began = time.monotonic()
            with tempfile.TemporaryFile() as output:
                status = self._live(output)
                if self._ending.is_set():
                    return
                fault = status if isinstance(status, str) else f"ended with status {status}: {_reason(output)}"
            if not self._begun.is_set():
                self._fault = fault
                self._begun.set()
                return
            pause = PAUSES[0] if time.monotonic() - began > STEADY else pause
            self.tell({"fault": fault, "again in": pause})
            self._ending.wait(pause)
            pause = min(2 * pause, longest)

    def _live(self, output: Any) -> int | str:
        """Run the process once, to its end; return its status, or why it could not be begun."""
        with contextlib.ExitStack() as stack:
            try:
                hold = stack.enter_context(_guard())
                process = subprocess.Popen(
                    self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                    start_new_session=True, env=dict(self._environment), preexec_fn=partial(die_with, os.getpid()),
                )  # fmt: skip
            except (OSError, subprocess.SubprocessError) as error:
                return f"cannot be started: {error}"
            try:
                hold(process.pid)
                self._watch(process)
            except (*_BROKEN, ArtifactDamaged) as error:
                return f"ended while it began: {type(error).__name__}: {error}"
            finally:
                self.ready = False
                _end(process)
            return process.returncode

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Load the adapters once the process answers; return when it has ended, or shall end."""
        while process.poll() is None and not self._ending.wait(TICK):
            if not self.ready and self._answers():
                status, said = self._ask("GET", "/v1/models")
                if status == 200:
                    self.context = next((each.get("max_model_len") for each in json.loads(said)["data"]), None)
                for name, path in list(self._adapters.items()):
                    self.load(name, path)
                self.ready = True
                self.tell({"process": process.pid, "port": self._port})
                self._begun.set()

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=5)
        try:
            with contextlib.closing(connection):
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


def find_command(words: str | None, where: str) -> list[str]:
    """Return the words that begin vLLM: those given, the environment's, or ``vllm serve`` where it is installed.

    Raises BadInput at ``where`` when there is no such command.
    """
    words = words or os.environ.get(COMMAND)
    if words is None:
        found = shutil.which("vllm")
        if found is None:
            fix = f"Give the command that starts it, of another environment: {WAYS}: '/opt/vllm/bin/vllm serve'"
            reject(where, "there is no command vllm", fix)
        return [found, SERVE]
    try:
        command = shlex.split(words)
    except ValueError as error:
        reject(where, f"{shown(words)} is no command: {error}", f"Give the words that start vLLM: {WAYS}")
    if not command or shutil.which(command[0]) is None:
        reject(where, f"{shown(words)}: there is no such command", f"Give the words that start vLLM: {WAYS}")
    return command


def version_of(command: Sequence[str]) -> str:
    """Return the version that vLLM names, begun by these words. Raises BadInput when it names none."""
    program = list(command[: command.index(SERVE)] if SERVE in command else command)
    try:
        found = subprocess.run(
            [*program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS,
            check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        reject(" ".join(program), f"names no version: {shown(str(error))}", f"Give another command: {WAYS}")
    lines = [line.strip() for line in found.stdout.splitlines() if line.strip()]
    if not lines:
        reject(" ".join(program), "names no version", f"Give another command: {WAYS}")
    return lines[-1]


def reason_of(said: bytes) -> str:
    """Return vLLM's reason in the body of an error, in 300 characters at most."""
    try:
        words = str(json.loads(said)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        words = said.decode("utf-8", "replace")
    return " ".join(words.split())[:LONGEST] or "no reason"


def choices(answer: Iterable[bytes]) -> Iterator[Mapping[str, Any]]:
    """Yield the pieces of a streamed completion, as vLLM's interface has them.

    Raises ValueError with vLLM's words when it gives the answer up.
    """
    for line in answer:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            piece = json.loads(line[6:])
            if "error" in piece:
                raise ValueError(piece["error"]["message"])
            (choice,) = piece["choices"]
            yield choice


@contextlib.contextmanager
def _guard() -> Iterator[Callable[[int], None]]:
    """Yield what takes the group of processes that shall not outlive this process, whatever ends it.

    The kernel ends a child with its parent, but no child of that child: vLLM's engine would keep the memory.
    """
    with subprocess.Popen(["/bin/sh", "-c", GUARD], stdin=subprocess.PIPE, start_new_session=True) as guard:
        assert guard.stdin is not None
        given = guard.stdin

        def hold(group: int) -> None:
            given.write(f"{group}\n".encode())
            given.flush()

        try:
            yield hold
        finally:
            guard.kill()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it began."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(output: Any) -> str:
    """Return the last error in what a process wrote that is not about another one, or its last line."""
    output.seek(0)
    text = output.read().decode("utf-8", "replace")
    lines = [bare for line in text.splitlines() if (bare := _STAMP.sub("", line).rstrip())]
    errors = [place for place, line in enumerate(lines) if _ERROR.match(line) and ELSEWHERE not in line]
    if not errors:
        return lines[-1][:LONGEST] if lines else "it wrote nothing"
    following = lines[errors[-1] + 1 : errors[-1] + 2]
    return " ".join([lines[errors[-1]], *(line.strip() for line in following if line.startswith(" "))])[:LONGEST]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])
