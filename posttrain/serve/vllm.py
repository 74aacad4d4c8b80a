"""vLLM as the generator: prompts and answers as ids, over its own interface, which nobody else can reach.

Everything before and after an answer (names, templates, limits, texts) is that of the embedded engine. Adapters are
loaded under their digests. What vLLM cannot apply is merged into weights of its own, with a process of its own.
"""

from __future__ import annotations

import http.client
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from posttrain.errors import BadInput, first_line, reject
from posttrain.model.loading import load_model
from posttrain.model.merging import write_whole
from posttrain.model.vllm import missing_parts, rank_of, room_for
from posttrain.model.vllm_process import NAME, Process, Tell, choices, reason_of
from posttrain.serve.ask import Ask, Ended, Token
from posttrain.serve.catalogue import Catalogue, Served
from posttrain.serve.engine import STOPPED, QueueFull, Unavailable, Unloaded
from posttrain.serve.lane import Lane
from posttrain.serve.models import Models, Weights, describe, key_of, require_plain

T = TypeVar("T")
Routes = MutableMapping[str, tuple[Process, str]]
"""Process of each model by its digest, and the process' name of it."""


class VllmEngine:
    """Answers by vLLM's processes, a thread for each of those under way: vLLM makes its batches of them."""

    def __init__(self, routes: Routes, end: Callable[[], None], *, rows: int = 32, queue: int = 256) -> None:
        """Take the routes, a mapping that changes as models come and go, and what ends the processes.

        ``rows`` are asked at once, ``queue`` more may wait.
        """
        self._routes, self._end, self._most_waiting = routes, end, queue
        self._threads = ThreadPoolExecutor(rows, thread_name_prefix="answer")
        self._open: Counter[str] = Counter()
        self._lock, self._jobs = threading.Lock(), threading.Lock()
        self._begun = 0
        self._stopping = False

    @property
    def ready(self) -> bool:
        """True while every process answers."""
        return all(process.ready for process, _ in list(self._routes.values()))

    @property
    def waiting(self) -> int:
        """Number of answers that have not begun."""
        return self._open.total() - self._begun

    @property
    def running(self) -> int:
        """Number of answers in the making."""
        return self._begun

    def submit(self, asks: Sequence[Ask]) -> None:
        """Queue the answers of one request, all or none.

        Raises QueueFull, Unloaded when the model has left, Unavailable while its process begins again.
        """
        with self._lock:
            if not all(ask.system in self._routes for ask in asks):
                raise Unloaded
            if not all(self._routes[ask.system][0].ready for ask in asks):
                raise Unavailable
            if self.waiting + len(asks) > self._most_waiting:
                raise QueueFull
            for ask in asks:
                self._open[ask.system] += 1
                self._threads.submit(self._answer, ask)

    def call(self, job: Callable[[], T]) -> T:
        """Call ``job`` while no other one runs; return its result. Answers go on meanwhile."""
        with self._jobs:
            return job()

    def release(self, digest: str) -> bool:
        """Take a model's route from it, unless an answer of it is open; return True when it has none."""
        with self._lock:
            if self._open[digest]:
                return False
            self._routes.pop(digest, None)
            return True

    def stop(self) -> None:
        """End every process; answers that are not complete fail."""
        self._stopping = True
        self._end()
        self._threads.shutdown()

    def _answer(self, ask: Ask) -> None:
        process, name = self._routes[ask.system]
        with self._lock:
            self._begun += 1
        try:
            events = iter(()) if _is_dropped(ask) or self._stopping else _events(process, name, ask)
            for event in events:
                ask.send(event)
                if _is_dropped(ask):
                    break
            if self._stopping:
                ask.send(Ended("failed", STOPPED))
        except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
            ask.send(Ended("failed", f"vLLM broke off: {type(error).__name__}: {first_line(error)}"))
        finally:
            with self._lock:
                self._open[ask.system] -= 1
                self._begun -= 1


def _is_dropped(ask: Ask) -> bool:
    return ask.cancelled


def _events(process: Process, name: str, ask: Ask) -> Iterator[Token | Ended]:
    """Yield the tokens of an answer, and its end."""
    sampling = ask.sampling
    body = {
        "model": name, "prompt": ask.prompt, "max_tokens": sampling.max_tokens, "temperature": sampling.temperature,
        "top_p": sampling.top_p, "seed": sampling.seed % 2**63, "stop_token_ids": sorted(ask.ends), "stream": True,
        "return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": sampling.top_logprobs,
    }  # fmt: skip
    with process.answering(body) as answer:
        if answer.status != 200:
            yield Ended("failed", f"vLLM answers with status {answer.status}: {reason_of(answer.read())}")
            return
        for choice in choices(answer):
            for token in _tokens(choice, sampling.top_logprobs):
                if token.id in ask.ends:
                    yield Ended("stop")
                    return
                yield token
            if choice.get("finish_reason"):
                yield Ended("stop" if choice["finish_reason"] == "stop" else "length")
                return
    yield Ended("failed", "vLLM broke off")


def _tokens(choice: Mapping[str, Any], count: int | None) -> Iterator[Token]:
    """Yield the tokens of a piece, with their log-probabilities and ``count`` likeliest tokens where asked for."""
    logprobs, ids = choice.get("logprobs"), choice.get("token_ids") or []
    for place, token in enumerate(ids):
        if logprobs is None:
            yield Token(token)
            continue
        top = {_id(key): value for key, value in (logprobs["top_logprobs"][place] or {}).items()}
        likeliest = sorted(top.items(), key=lambda item: -item[1])[:count]  # vLLM adds the chosen one
        yield Token(token, logprobs["token_logprobs"][place], tuple(likeliest))


def _id(text: str) -> int:
    return int(text.removeprefix("token_id:"))


class VllmModels(Models):
    """Models in vLLM; their weights are in this process' memory too, which proves them."""

    def __init__(
        self, catalogue: Catalogue, command: Sequence[str], environment: Mapping[str, str], tell: Tell
    ) -> None:
        """Take the models of the start, the words that begin vLLM, its environment and what takes its news."""
        super().__init__()
        self.routes: dict[str, tuple[Process, str]] = {}
        self._held: dict[str, tuple[Process, str]] = {}
        self._processes: dict[Hashable, Process] = {}
        self._command, self._environment, self._tell = command, environment, tell
        self._folder = catalogue.root / "cache" / "merged"
        plain = [each.source for each in catalogue.artifacts if each.source.adapter and not missing_parts(each.source)]
        # with room for one that is coming while another leaves
        count, self._rank = len(plain) + 2, room_for([rank_of(source) for source in plain])
        self._adapting = ["--enable-lora", "--max-loras", str(count), "--max-cpu-loras", str(count)]
        self._adapting += ["--max-lora-rank", str(self._rank)]

    def add(self, served: Served) -> None:
        """Load a model into vLLM and into this process' memory, unless it is loaded."""
        if served.digest in self.loaded:
            return
        source, key = served.source, key_of(served)
        if source.quantization is not None and source.adapter is None:
            what = f"its weights are quantised ({source.quantization}), which vLLM does in another way"
            reject(served.name, what, "Merge the adapter (posttrain merge), and serve the merged weights")
        if key not in self._weights:
            plain: Any = load_model(replace(source, adapter=None), served.dtype)
            self._weights[key] = Weights(plain, Lane(plain, mixed=True))
        route = self._held[served.digest] = self.routes[served.digest] = self._route(served)
        loaded, room = describe(served, self._weights[key].plain), route[0].context
        if room is not None and (loaded.context is None or room < loaded.context):  # the command may give it less
            loaded = replace(loaded, context=room)
        self.loaded = {**self.loaded, served.digest: loaded}

    def remove(self, digest: str) -> None:
        """Unload a model; a process without one ends."""
        super().remove(digest)
        self.routes.pop(digest, None)
        process, name = self._held.pop(digest)
        if all(process is not other for other, _ in self._held.values()):
            self._processes = {key: each for key, each in self._processes.items() if each is not process}
            process.stop()
        elif name != NAME:
            process.unload(name)

    def alone(self, digest: str) -> Any:
        """Return the model as ``load_model`` gives it."""
        served = self.loaded[digest].served
        try:
            if served.source.adapter is not None:
                require_plain(served.source)
        except BadInput:  # it would change the weights under the others
            return load_model(served.source, served.dtype)
        return super().alone(digest)

    def stop(self) -> None:
        """End every process."""
        for process in self._processes.values():
            process.stop()

    def _route(self, served: Served) -> tuple[Process, str]:
        """Return the process of a model, and the process' name of it, once it can be asked."""
        source = served.source
        if source.adapter is not None and not missing_parts(source) and rank_of(source) <= self._rank:
            process, name = self._process(key_of(served), source.model, served.dtype), served.digest[:32]
            process.load(name, source.adapter)
            return process, name
        if source.adapter is None and not (source.added_tokens or source.rows):
            return self._process(key_of(served), source.model, served.dtype), NAME
        whole = write_whole(source, served.base, served.dtype, self._folder / served.digest)
        return self._process(served.digest, whole, served.dtype, ()), NAME

    def _process(self, key: Hashable, model: Path, dtype: str, options: Sequence[str] | None = None) -> Process:
        if key not in self._processes:
            options = self._adapting if options is None else options
            process = Process(self._command, model, [*options, "--dtype", dtype], self._environment)
            process.tell = self._tell
            process.start()
            self._processes[key] = process
        return self._processes[key]
