"""Serving under load: interleaved requests to several adapters, hot swaps and malformed ones, and mixed batches.

    python benchmarks/serve.py [--adapters 8] [--requests 1250] [--malformed 1000] [--concurrency 128] [--model DIR]

Every greedy answer is compared with that of its artifact alone, token by token; its fingerprint says which one. The
name ``live`` is moved by the ledger while requests to it are answered. The requests come over HTTP from a process of
their own. Then the same answers are made by the engine alone: with the rows of all adapters in one batch, and with a
batch for each adapter. Prints the figures as JSON, with the memory of the server's process before and after the
requests; exits with 1 when an answer was crossed or lost. Without arguments it is the soak:
8 adapters and the moving name, 1,250 requests each, 1,000 malformed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import torch
from machine import described

from posttrain import environment
from posttrain.artifact import publish
from posttrain.config.schema import LoraSettings, ModelConfig
from posttrain.ledger import Standing, move
from posttrain.model.base import resolve_base
from posttrain.model.loading import attach, load_model, new_adapter
from posttrain.model.probe import Probe
from posttrain.model.saving import save_model
from posttrain.scoring.isolation import plain_generation
from posttrain.scoring.systems import twin
from posttrain.serve.ask import Ask, Ended, Event, Sampling
from posttrain.serve.catalogue import BasePlace, Catalogue, read_catalogue
from posttrain.serve.engine import Engine
from posttrain.serve.follower import Follower
from posttrain.serve.lane import Lane
from posttrain.serve.mixing import BASE
from posttrain.serve.proof import generated
from posttrain.serve.server import listen, take_port
from posttrain.serve.service import Limits, Service, open_service
from posttrain.testing.tiny import tiny_manifest

TOKENS = 16
ROWS = 32
"""Answers at once where the engine's speeds are compared."""
QUESTIONS = tuple(f"Which river flows through {town}?" for town in ("Ardale", "Beckmere", "Calmouth", "Norden", "Ilde"))
MALFORMED: tuple[tuple[bytes, int], ...] = (
    (b"{", 400), (b"[]", 400), (b"\xff", 400), (b'{"model": 5}', 400), (b'{"messages": [], "model": "v1"}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "model": "nobody"}', 404),
    (b'{"messages": [{"role": "user", "content": "x"}], "model": "v1", "tools": [{}]}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "model": "v1", "chat_template": "x"}', 400),
    (b'{"messages": [{"role": "robot", "content": "x"}], "model": "v1"}', 400), (b"[" * 9000, 400),
)  # fmt: skip


def make_adapters(root: Path, model: str, count: int) -> list[Path]:
    """Publish adapters with random weights in a run below ``root``; each changes what the base says."""
    source = resolve_base(ModelConfig(path=model))
    paths = []
    for number in range(count):
        adapted = new_adapter(load_model(source, "float32"), LoraSettings(r=16, alpha=32), seed=number)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in (each for each in adapted.parameters() if each.requires_grad):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        folder = root / "run" / "stages" / f"adapter{number}"
        draft = folder / ".draft"
        draft.mkdir(parents=True)
        save_model(adapted, source, draft, "float32")
        Probe.take(draft)
        publish(draft, tiny_manifest(source, draft), folder / "artifact")
        paths.append(folder / "artifact")
    return paths


def answers_alone(service: Service, digests: list[str]) -> dict[tuple[str, str], list[int]]:
    """Return the greedy tokens of each artifact alone, by its digest and the question."""
    found = {}
    for digest in digests:
        loaded, alone = service.models.loaded[digest], service.models.alone(digest)
        with plain_generation(alone, loaded.ends):
            for text in QUESTIONS:
                prompt = loaded.prompter.chat([{"role": "user", "content": text}])
                found[digest, text] = generated(alone, loaded, prompt, TOKENS)
    return found


async def soak(port: int, wanted: dict[tuple[str, str], list[int]], options: argparse.Namespace) -> dict[str, Any]:
    """Send all requests, ``concurrency`` at a time, and return what came back."""
    draw = random.Random(0)
    digests = sorted({digest for digest, _ in wanted})
    asked: list[tuple[str, str] | tuple[bytes, int]] = [
        (model, text)
        for model in (*digests, "live")
        for text in (QUESTIONS[n % len(QUESTIONS)] for n in range(options.requests))
    ]
    asked += [MALFORMED[n % len(MALFORMED)] for n in range(options.malformed)]
    draw.shuffle(asked)
    seen: Counter[str] = Counter()
    seconds: list[float] = []
    models: set[str] = set()

    async def one(client: httpx.AsyncClient, model: str | bytes, rest: str | int) -> None:
        began = time.perf_counter()
        if isinstance(model, bytes):
            answer = await client.post("/v1/chat/completions", content=model)
            seen["malformed" if answer.status_code == rest else "wrong status"] += 1
            return
        messages = [{"role": "user", "content": rest}]
        body = {"model": model, "messages": messages, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True}
        answer = await client.post("/v1/chat/completions", json=body)
        seconds.append(time.perf_counter() - began)
        if answer.status_code != 200:
            seen["lost"] += 1
            return
        made = answer.json()
        digest = made["system_fingerprint"]
        right = made["choices"][0]["token_ids"] == wanted[digest, str(rest)] and model in (digest, "live")
        seen["right" if right else "crossed"] += 1
        if model == "live":
            models.add(digest)

    async def worker() -> None:
        # a client each: one with all connections looks through them at every request, and would be the slowest part
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600, verify=False) as client:
            while asked:
                await one(client, *asked.pop())

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(options.concurrency)))
    total = time.perf_counter() - began
    ordered = sorted(seconds)
    return {
        **{name: seen[name] for name in ("right", "crossed", "lost", "malformed", "wrong status")},
        "models behind live": len(models), "seconds": round(total, 1), "clients CPU s": round(time.process_time(), 1),
        "requests/s": round(sum(seen.values()) / total, 1),
        "p50 s": round(statistics.median(ordered), 3), "p99 s": round(ordered[int(0.99 * (len(ordered) - 1))], 3),
    }  # fmt: skip


def asked_from_outside(*given: Any) -> dict[str, Any]:
    """Run the soak, in the process of the clients."""
    return asyncio.run(soak(*given))


def soaked(
    service: Service,
    follower: Follower,
    wanted: dict[tuple[str, str], list[int]],
    options: argparse.Namespace,
    before_end: Callable[[], None],
) -> dict[str, Any]:
    """Listen as a server does, until the process of the clients has its answers, and return the figures of both."""
    port = take_port("127.0.0.1", 0)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(int).result()  # its imports are no part of the figures
        found: list[Future[dict[str, Any]]] = []

        def announce() -> None:
            began, before = time.process_time(), resident()
            future = pool.submit(asked_from_outside, port.getsockname()[1], wanted, options)
            future.add_done_callback(lambda done: ended(done, began, before))

        def ended(done: Future[dict[str, Any]], began: float, before: int) -> None:
            spent = {"server CPU s": round(time.process_time() - began, 1)}
            figures.update({**spent, "rss MB before": before, "rss MB after": resident()})
            found.append(done)
            before_end()
            os.kill(os.getpid(), signal.SIGTERM)

        figures: dict[str, Any] = {}
        listen(service, port, follower, announce)
        return {**found[0].result(), **figures}


def swapping(root: Path, catalogue: Catalogue, ended: threading.Event) -> threading.Thread:
    """Start a thread that moves ``live`` from artifact to artifact until the end."""
    served = catalogue.artifacts

    def work() -> None:
        place = 0
        while not ended.wait(1.0):
            place = (place + 1) % len(served)
            path = str(served[place].source.tokenizer.relative_to(root))
            move(root, "live", Standing(artifact=served[place].digest, path=path))

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def resident() -> int:
    """Return the memory of this process in megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def speed(service: Service, places: dict[str, tuple[Lane, str]], digests: list[str], count: int) -> float:
    """Return the tokens in a second of the processor by an engine that makes ``count`` answers of all adapters.

    Of the processor, because other work on the machine would decide by the clock.
    """
    engine = Engine(places, rows=ROWS, queue=count)
    tokens, open_answers, done = 0, count, threading.Event()

    def take(event: Event) -> None:
        nonlocal tokens, open_answers
        tokens += not isinstance(event, Ended)
        open_answers -= isinstance(event, Ended)
        if not open_answers:
            done.set()

    asks = []
    for number in range(count):
        loaded = service.models.loaded[digests[number % len(digests)]]
        prompt = loaded.prompter.chat([{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}])
        sampling = Sampling(max_tokens=TOKENS)
        asks.append(Ask(system=loaded.served.digest, prompt=prompt, sampling=sampling, ends=frozenset(), send=take))
    began = time.process_time()
    engine.submit(asks)
    done.wait()
    seconds = time.process_time() - began
    engine.stop()
    return tokens / seconds


def separate(service: Service, digests: list[str]) -> dict[str, tuple[Lane, str]]:
    """Return a lane for each adapter, on the same weights."""
    weights = next(iter(service.models._weights.values())).plain
    adapters = {digest: service.models.loaded[digest].served.source.adapter for digest in digests}
    return {
        digest: (Lane(attach(twin(weights), path).eval(), mixed=False), BASE)
        for digest, path in adapters.items()
        if path is not None
    }


def main() -> None:
    """Print the figures of one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--requests", type=int, default=1250, help="to each adapter, and to the name that moves")
    parser.add_argument("--malformed", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=128)
    parser.add_argument("--answers", type=int, default=256, help="of each engine, for its speed")
    parser.add_argument("--model", default=str(Path(__file__).parents[1] / "recipes" / "quickstart" / "base"))
    options = parser.parse_args()
    environment.prepare()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        paths = make_adapters(root, options.model, options.adapters)
        catalogue = read_catalogue([str(path) for path in paths], BasePlace(), root, unpromoted=True)
        first = catalogue.artifacts[0]
        move(root, "live", Standing(artifact=first.digest, path=str(first.source.tokenizer.relative_to(root))))
        service = open_service(catalogue, Limits(queue=10_000))
        follower, ended = Follower(service, catalogue, BasePlace(), unpromoted=True), threading.Event()
        follower.look()
        digests = [served.digest for served in catalogue.artifacts]
        wanted = answers_alone(service, digests)
        follower.start()
        thread = swapping(root, catalogue, ended)

        def still() -> None:
            ended.set()
            thread.join()

        figures = soaked(service, follower, wanted, options, still)
        mixed = speed(service, service.models.places, digests, options.answers)
        single = speed(service, separate(service, digests), digests, options.answers)
    tokens = {"mixed tokens per CPU s": round(mixed), "an adapter a batch tokens per CPU s": round(single)}
    print(json.dumps({**described(), **figures, **tokens, "mixed over single": round(mixed / single, 2)}, indent=1))
    sys.exit(1 if figures["crossed"] or figures["lost"] or figures["wrong status"] else 0)


if __name__ == "__main__":
    main()
