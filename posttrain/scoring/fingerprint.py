"""Fingerprints of what scores depend on, as JSON values: task settings, a tokenizer, library versions.

A fingerprint follows content, never names or paths: a renamed task or a moved file keeps its scores, an edited one
loses them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.digests import digest_of, file_digest

LIBRARIES = ("posttrain", "lm_eval", "transformers", "torch", "peft")

_ELSEWHERE = {"dataset_path", "dataset_name", "dataset_kwargs", "metadata", "task", "task_alias", "tag"}
"""Names and places. The hashes of the questions cover the documents found there."""


def task_settings(config: Any) -> Any:
    """Return the resolved settings of an lm-eval task as JSON values, with hashes of its functions' source files."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: _plain(value) for name, value in fields.items() if name not in _ELSEWHERE and value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping) and not dataclasses.is_dataclass(value):
        return {str(key): _plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, functools.partial):
        return {"partial": [_plain(value.func), _plain(value.args), _plain(value.keywords)]}
    if callable(value):
        return _source(value)
    return value if isinstance(value, str | int | float | None) else repr(value)


def _source(function: Any) -> dict[str, str]:
    """Return a function's name and the hash of its whole file: its helpers count as well."""
    try:
        file = inspect.getsourcefile(function)
    except TypeError:
        file = inspect.getsourcefile(type(function))
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return {"function": name, "source": file_digest(Path(file)) if file else ""}


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 over a tokenizer's behaviour: vocabulary, rules, special tokens and chat template.

    Its files do not count: saving and loading again may rewrite them without a change of behaviour.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else dict(tokenizer.get_vocab())
    for state in ("padding", "truncation"):  # left behind by the last call, not part of the rules
        rules.pop(state, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest_of({"rules": rules, "special": special, "template": tokenizer.chat_template})


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries behind the scores; a source tree is ``not installed``."""
    installed = {}
    for name in LIBRARIES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed
