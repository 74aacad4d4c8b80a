"""Requests in OpenAI's form, read field by field: what is not supported is an error that names it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from posttrain.errors import nearest, shown
from posttrain.serve.ask import Sampling
from posttrain.serve.prompts import ROLES

MOST_CHOICES, MOST_STOPS, LONGEST_STOP, MOST_TOP = 16, 16, 200, 20
OWN_TEMPLATE = ("chat_template", "chat_template_kwargs")
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,), "echo": (False,), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "function_call": ("none",), "functions": ([],), "tools": ([],), "tool_choice": ("none",),
    "parallel_tool_calls": (True, False), "response_format": ({"type": "text"},), "suffix": ("",), "store": (False,),
    "metadata": ({},), "modalities": (["text"],), "audio": (), "prediction": (), "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"), "top_k": (-1, 0), "min_p": (0,), "repetition_penalty": (1,), "verbosity": (),
    "web_search_options": (), "stream_options": (), "max_completion_tokens": (), "top_logprobs": (),
    "prompt_cache_key": (), "safety_identifier": (),
}  # fmt: skip
"""Fields that are not supported, with the values that ask for nothing."""
SHARED = (
    "model", "max_tokens", "temperature", "top_p", "n", "stream", "stream_options", "stop", "seed", "logprobs", "user",
    "return_token_ids",
)  # fmt: skip
CHAT = (*SHARED, "messages", "max_completion_tokens", "top_logprobs")
COMPLETION = (*SHARED, "prompt")


class RequestError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}

    def body(self) -> dict[str, Any]:
        """Return the body of the answer."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request for answers, before its model is known."""

    model: str
    chat: bool
    messages: tuple[Mapping[str, str], ...] = ()
    """Turns of a conversation."""
    prompts: tuple[str | tuple[int, ...], ...] = ()
    """Texts or ids to be completed."""
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    """Answers for each prompt."""
    stops: tuple[str, ...] = ()
    seed: int = 0
    top_logprobs: int | None = None
    stream: bool = False
    usage_in_stream: bool = False
    token_ids: bool = field(default=False)
    """True to return the ids of prompt and answers."""

    def sampling(self, max_tokens: int, choice: int) -> Sampling:
        """Return the settings of one of the answers; each draws with a seed of its own."""
        return Sampling(
            max_tokens=max_tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed + choice,
            top_logprobs=self.top_logprobs,
        )  # fmt: skip


def parse_body(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body. Raises RequestError (400) for anything else."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is no JSON: {str(error) or type(error).__name__}") from None
    if not isinstance(value, dict):
        raise RequestError(400, "the body is no JSON object")
    return value


def parse_chat(body: Mapping[str, Any]) -> Asked:
    """Read a request for a chat completion. Raises RequestError (400) naming the field at fault."""
    _check_fields(body, CHAT)
    if body.get("max_tokens") is not None and body.get("max_completion_tokens") is not None:
        _reject("max_completion_tokens", "is given beside max_tokens: give one of them")
    wanted = _flag(body, "logprobs")
    top = _whole(body, "top_logprobs", 0, MOST_TOP)
    if top is not None and not wanted:
        _reject("top_logprobs", "needs logprobs: true")
    limit = "max_tokens" if body.get("max_tokens") is not None else "max_completion_tokens"
    return Asked(
        chat=True, messages=_messages(body.get("messages")), max_tokens=_whole(body, limit, 1, None),
        top_logprobs=(top or 0) if wanted else None, **_shared(body),
    )  # fmt: skip


def parse_completion(body: Mapping[str, Any]) -> Asked:
    """Read a request for a completion. Raises RequestError (400) naming the field at fault."""
    _check_fields(body, COMPLETION)
    return Asked(
        chat=False, prompts=_prompts(body.get("prompt")), max_tokens=_whole(body, "max_tokens", 1, None),
        top_logprobs=_whole(body, "logprobs", 0, MOST_TOP), **_shared(body),
    )  # fmt: skip


def _shared(body: Mapping[str, Any]) -> dict[str, Any]:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        _reject("model", "is missing: give an alias or a digest (GET /v1/models lists them)")
    seed = _whole(body, "seed", -(2**63), 2**63 - 1)
    options = body.get("stream_options")
    if options is not None and (not isinstance(options, dict) or set(options) - {"include_usage"}):
        _reject("stream_options", "may hold include_usage alone")
    stream = _flag(body, "stream")
    if options is not None and not stream:
        _reject("stream_options", "needs stream: true")
    return {
        "model": model,
        "temperature": _number(body, "temperature", 0, 2, 1.0),
        "top_p": _number(body, "top_p", 0, 1, 1.0),
        "n": _whole(body, "n", 1, MOST_CHOICES) or 1,
        "stops": _stops(body.get("stop")),
        "seed": secrets.randbits(62) if seed is None else seed,
        "stream": stream,
        "usage_in_stream": _flag(options or {}, "include_usage"),
        "token_ids": _flag(body, "return_token_ids"),
    }


def _check_fields(body: Mapping[str, Any], known: Sequence[str]) -> None:
    for name, value in body.items():
        if value is None or name in known:
            continue
        if name in OWN_TEMPLATE:
            _reject(name, "is not taken: the template is pinned by the artifact, as it was trained and judged", name)
        if name not in NEUTRAL:
            close = nearest(name, known)
            _reject(shown(name), "is not supported" + (f"; did you mean {close}?" if close else ""), name)
        if not any(value == neutral and type(value) is type(neutral) for neutral in NEUTRAL[name]) and not (
            isinstance(value, float) and value in NEUTRAL[name]
        ):
            _reject(name, "is not supported by this server", name)


def _messages(value: Any) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list) or not value:
        _reject("messages", "is no list of turns")
    return tuple(_message(turn, f"messages[{number}]") for number, turn in enumerate(value))


def _message(turn: Any, where: str) -> Mapping[str, str]:
    if not isinstance(turn, dict):
        _reject(where, "is no object with role and content")
    for name, value in turn.items():
        if name not in ("role", "content") and value is not None:
            _reject(f"{where}.{shown(name)}", "is not supported", where)
    if turn.get("role") not in ROLES:
        _reject(f"{where}.role", f"is {shown(turn.get('role'))}, not one of {', '.join(ROLES)}")
    return {"role": turn["role"], "content": _content(turn.get("content"), f"{where}.content")}


def _content(value: Any, where: str) -> str:
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                _reject(where, "may hold parts of type text alone")
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        _reject(where, "is no text")
    return _sound(value, where)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(value, list) and value and all(type(each) is int for each in value):
        return (tuple(value),)
    listed = value if isinstance(value, list) else [value]
    if not listed or len(listed) > MOST_CHOICES or not all(isinstance(each, str) for each in listed):
        _reject("prompt", f"is no text, no list of 1 to {MOST_CHOICES} texts and no list of ids")
    return tuple(_sound(each, "prompt") for each in listed)


def _stops(value: Any) -> tuple[str, ...]:
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if len(listed) > MOST_STOPS or not all(isinstance(each, str) and 0 < len(each) <= LONGEST_STOP for each in listed):
        _reject("stop", f"is no text or list of at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters")
    return tuple(_sound(each, "stop") for each in listed)


def _sound(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        _reject(where, "holds half of a surrogate pair, which is no character")
    return text


def _whole(body: Mapping[str, Any], name: str, low: int, high: int | None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or value < low or (high is not None and value > high):
        _reject(name, f"is {shown(value)}, not a whole number of {low} to {high if high is not None else 'the limit'}")
    return int(value)


def _number(body: Mapping[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not low <= value <= high:
        _reject(name, f"is {shown(value)}, not a number of {low:g} to {high:g}")
    return float(value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and type(value) is not bool:
        _reject(name, f"is {shown(value)}, not true or false")
    return bool(value)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _reject(where: str, what: str, param: str | None = None) -> NoReturn:
    raise RequestError(400, f"{where} {what}", param or where)


Parser = Callable[[Mapping[str, Any]], Asked]
