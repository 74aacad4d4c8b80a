"""The check of any running server in OpenAI's form: does it serve these artifacts, as they were trained and judged?"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from posttrain.errors import ArtifactDamaged, reject
from posttrain.scoring.isolation import plain_generation
from posttrain.serve.catalogue import Catalogue
from posttrain.serve.models import Loaded, Models
from posttrain.serve.names import BASE, SHORTEST
from posttrain.serve.proof import TOKENS, compare, generated, prompts_of, taken

SECONDS = 300
"""Longest wait for an answer."""


class Remote:
    """A running server."""

    def __init__(self, url: str, token: str | None) -> None:
        """Take an address with or without ``/v1`` at its end."""
        if not url.startswith(("http://", "https://")):
            reject(f"--check {url}", "is no address", "Give one such as http://127.0.0.1:8000")
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})

    def models(self) -> list[str]:
        """Return the names of its models. Raises BadInput when it does not list any."""
        status, body = self._call("/models", None)
        listed = body.get("data") if isinstance(body, dict) else None
        if status != 200 or not isinstance(listed, list):
            reject(f"{self._url}/models", f"answers with status {status}, and no list of models", "Is the token right?")
        return [str(each.get("id")) for each in listed if isinstance(each, dict)]

    def ask(self, model: str, messages: Sequence[Mapping[str, str]], **more: Any) -> tuple[int, Any]:
        """Return the status and body of a greedy answer."""
        body = {"model": model, "messages": list(messages), "max_tokens": TOKENS, "temperature": 0, **more}
        return self._call("/chat/completions", body)

    def _call(self, path: str, body: Any) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data=data, headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return answer.status, _parsed(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, _parsed(error.read())
        except (OSError, ValueError) as error:
            reject(self._url + path, f"cannot be asked: {getattr(error, 'reason', error)}", "Is the server running?")


def check(catalogue: Catalogue, remote: Remote) -> Iterator[str]:
    """Yield a line for each artifact that the server serves as it is. Raises ArtifactDamaged with what differs."""
    known, models = remote.models(), Models()
    for number, served in enumerate(catalogue.artifacts, start=1):
        models.add(served)
        loaded, alone = models.loaded[served.digest], models.alone(served.digest)
        name = _name(served.digest, f"v{number}", known)
        with plain_generation(alone, loaded.ends):
            for messages, prompt in zip(taken(loaded), prompts_of(loaded), strict=True):
                _compare(remote, name, loaded, alone, messages, prompt)
        status, _ = remote.ask(name, taken(loaded)[0], chat_template="{{ messages }}")
        if not 400 <= status < 500:
            raise ArtifactDamaged(f"{name}: a request with a chat template of its own is not rejected: status {status}")
        change = _change(remote, known, name, loaded)
        yield f"{name} is {served.name}: ids, greedy answers and template agree{change}"


def _name(digest: str, alias: str, known: Sequence[str]) -> str:
    """Return the server's name of an artifact: its digest, a beginning of it, or its number by lineage."""
    named = [name for name in known if len(name) >= SHORTEST and digest.startswith(name)]
    found = named or [name for name in known if name == alias]
    if not found:
        listed = ", ".join(name[:40] for name in known[:20])
        reject(f"model {digest[:12]}", f"the server has neither it nor {alias}", f"Its models: {listed}")
    return found[0]


def _compare(
    remote: Remote, name: str, loaded: Loaded, alone: Any, messages: Sequence[Mapping[str, str]], prompt: list[int]
) -> None:
    status, body = remote.ask(name, messages, return_token_ids=True)
    if 400 <= status < 500:  # not every server knows the field
        status, body = remote.ask(name, messages)
    try:
        choice, used = body["choices"][0], body["usage"]["prompt_tokens"]
        text, tokens = choice["message"]["content"], choice.get("token_ids")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ArtifactDamaged(f"{name}: no answer in OpenAI's form: status {status}, {str(body)[:200]}") from None
    theirs = body.get("prompt_token_ids")
    if theirs is not None and theirs != prompt:
        raise ArtifactDamaged(f"{name}: the ids of the prompt are {theirs}, in training {prompt}")
    if used != len(prompt):
        raise ArtifactDamaged(f"{name}: the prompt has {used} tokens, in training {len(prompt)}")
    if isinstance(tokens, list):
        compare(loaded, alone, prompt, tokens[:-1] if tokens and tokens[-1] in loaded.ends else tokens)
    elif text != (expected := loaded.prompter.text(generated(alone, loaded, prompt))):
        raise ArtifactDamaged(f"{name}: the greedy answer is {text!r}, the artifact's own {expected!r}")


def _change(remote: Remote, known: Sequence[str], name: str, loaded: Loaded) -> str:
    """Return how many answers differ from those of the server's base, where it has one."""
    if BASE not in known:
        return ""
    answers = [
        [remote.ask(model, messages)[1]["choices"][0]["message"]["content"] for messages in taken(loaded)]
        for model in (BASE, name)
    ]
    return f"; {sum(a != b for a, b in zip(*answers, strict=True))} of {len(answers[0])} answers are not its base's"


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None
