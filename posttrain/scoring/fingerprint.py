"""JSON values that stand for things which scores depend on: task settings, a tokenizer, library versions."""

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
"""Settings that are names and places; what they lead to is in the hashes of the questions."""


def task_settings(config: Any) -> Any:
    """The resolved settings of an lm-eval task as JSON, with the source files of its functions, without paths."""
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
    """A function as its name and the hash of the file it stands in, which holds its helpers, too."""
    try:
        file = inspect.getsourcefile(function)
    except TypeError:
        file = inspect.getsourcefile(type(function))
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return {"function": name, "source": file_digest(Path(file)) if file else ""}


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over what a tokenizer does: vocabulary, rules, special tokens and chat template; not over its files."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else dict(tokenizer.get_vocab())
    for state in ("padding", "truncation"):  # left behind by the last call
        rules.pop(state, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest_of({"rules": rules, "special": special, "template": tokenizer.chat_template})


def library_versions() -> dict[str, str]:
    """Versions of the libraries that scoring runs on; a source tree that is not installed has none."""
    installed = {}
    for name in LIBRARIES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed
