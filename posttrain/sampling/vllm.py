"""vLLM as the library that samples: a process of it, asked with the ids of prompts and a seed for each answer."""

from __future__ import annotations

import contextlib
import http.client
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from posttrain.artifact import ModelSource
from posttrain.errors import Interrupted, first_line, reject
from posttrain.model.vllm import missing_parts, rank_of, room_for
from posttrain.model.vllm_process import NAME, SERVE, Process, choices, reason_of, version_of
from posttrain.sampling.sampler import Answer, Drawing, answer_seed

BLOCK = 1024
"""Answers that are asked before they are kept: what is lost when vLLM ends."""
AT_ONCE = 256
"""Answers under way; vLLM makes its batches of them."""
NEWS_SECONDS = 5.0
"""Longest wait for what a process that ended has said."""
_BROKEN = (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError)
"""Errors of an answer that breaks off."""


def identity(command: Sequence[str]) -> dict[str, Any]:
    """Return what answers depend on beside model, prompts and settings: versions, and the options of vLLM."""
    options = list(command[command.index(SERVE) + 1 :]) if SERVE in command else []
    return {"posttrain": version("posttrain"), "vllm": version_of(command), "options": options}


class Server:
    """A process of vLLM that answers for one model."""

    def __init__(self, process: Process, name: str, weights: Path) -> None:
        """Take the process, its name of the model, and the folder of its weights."""
        self.weights = weights
        self._process, self._name = process, name
        self._fault, self._news = "", threading.Event()
        self._failed: BaseException | None = None
        process.tell = self._note

    def write(self, prompts: Sequence[Sequence[int]], drawing: Drawing, ends: Iterable[int]) -> list[list[Answer]]:
        """Return ``drawing.k`` answers to each of ``prompts``, as ``sample`` does; entropies are not known here.

        Raises Interrupted when vLLM ends or breaks off, BadInput when it rejects a prompt.
        """
        stops = sorted(ends)
        rows = [prompt for prompt in prompts for _ in range(drawing.k)]
        numbers = [number for _ in prompts for number in range(drawing.k)]
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="answer") as threads:
            found = list(threads.map(partial(self._answer, drawing=drawing, stops=stops), rows, numbers))
        if self._failed is not None:
            raise self._failed
        answers = [each for each in found if each is not None]
        return [answers[start : start + drawing.k] for start in range(0, len(answers), drawing.k)]

    def _answer(self, prompt: Sequence[int], number: int, drawing: Drawing, stops: Sequence[int]) -> Answer | None:
        """Return an answer; None once another one has failed."""
        if self._failed is not None:
            return None
        try:
            return self._asked(prompt, number, drawing, stops)
        except BaseException as error:
            self._failed = self._failed or error
            return None

    def _asked(self, prompt: Sequence[int], number: int, drawing: Drawing, stops: Sequence[int]) -> Answer:
        body = {
            "model": self._name, "prompt": list(prompt), "max_tokens": drawing.max_tokens,
            "temperature": drawing.temperature, "top_p": 1, "seed": answer_seed(drawing.seed, prompt, number),
            "stop_token_ids": list(stops), "stream": True, "return_token_ids": True,
            "return_tokens_as_token_ids": True, "logprobs": 0,
        }  # fmt: skip
        try:
            with self._process.answering(body) as answer:
                if answer.status == 200:
                    return _read(answer, stops)
                status, said = answer.status, reason_of(answer.read())
        except _BROKEN as error:
            raise self._broken(first_line(error) or type(error).__name__) from None
        if status >= 500:
            raise self._broken(f"answers with status {status}: {said}")
        reject("vLLM", f"rejects a prompt of {len(prompt):,} tokens (status {status}): {said}", "Lower max_tokens")

    def _broken(self, what: str) -> Interrupted:
        self._news.wait(NEWS_SECONDS)
        fault = self._fault or f"broke off: {what}"
        return Interrupted(
            f"vLLM {fault}; the answers of whole blocks are kept, and the same command resumes from there"
        )

    def _note(self, news: Mapping[str, Any]) -> None:
        if "fault" in news:
            self._fault = news["fault"]
            self._news.set()


@contextlib.contextmanager
def running(source: ModelSource, base: ModelSource, dtype: str, command: Sequence[str], kept: Path) -> Iterator[Server]:
    """Yield vLLM with a model; it ends with the context.

    What vLLM cannot apply itself is merged into weights of their own, in the folder that runs share. Raises BadInput
    for a command that does not begin it.
    """
    _free_memory()
    options = ["--dtype", dtype, "--logprobs-mode", "processed_logprobs"]
    adapter = source.adapter if source.adapter is not None and not missing_parts(source) else None
    if adapter is not None:
        options += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(room_for([rank_of(source)]))]
    weights = source.model if adapter is not None else _whole(source, base, dtype, kept)
    process = Process(command, weights, options, os.environ)
    try:
        process.start()
        if adapter is not None:
            process.load(source.digest[:32], adapter)
        yield Server(process, source.digest[:32] if adapter is not None else NAME, weights)
    finally:
        process.stop()


def _whole(source: ModelSource, base: ModelSource, dtype: str, kept: Path) -> Path:
    """Return the folder of weights that are the whole model."""
    if source.adapter is None and not (source.added_tokens or source.rows):
        if source.quantization is not None:
            what = f"its weights are quantised ({source.quantization}), which vLLM does in another way"
            reject(source.name, what, "Sample with backend=transformers")
        return source.model
    from posttrain.model.merging import write_whole

    return write_whole(source, base, dtype, kept / "merged" / source.digest)


def _free_memory() -> None:
    """Give the GPU what this process holds of its memory without a use."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _read(answer: http.client.HTTPResponse, stops: Sequence[int]) -> Answer:
    """Return the answer that vLLM streams."""
    ids: list[int] = []
    log_probs: list[float] = []
    reason = None
    for choice in choices(answer):
        ids += choice.get("token_ids") or []
        log_probs += (choice.get("logprobs") or {}).get("token_logprobs") or []
        reason = choice.get("finish_reason") or reason
    if reason is None or len(ids) != len(log_probs):
        raise ValueError("an answer without its end")
    ended = reason == "stop"
    if ended and not (ids and ids[-1] in stops):
        raise ValueError("an answer that ended without a stop token")
    return Answer(ids=tuple(ids), ended=ended, log_probs=tuple(log_probs), entropy=float("nan"))
