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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.digests import digest_of, file_digest
from posttrain.scoring.catalogue import is_path, read_files
from posttrain.scoring.code import fingerprint, is_library, named_by

LIBRARIES = ("posttrain", "lm_eval", "transformers", "torch", "peft")

_ELSEWHERE = {"dataset_path", "dataset_name", "dataset_kwargs", "metadata", "task", "task_alias", "tag"}
"""Names and places. The hashes of the questions cover the documents found there."""


def code_behind(leaves: Sequence[Any], reference: str) -> dict[str, Any]:
    """Return the fingerprint of all code of loaded lm-eval tasks: their functions', their classes', their helpers'.

    ``reference`` is the name or the file of the task. Empty for a task without code of its own.
    """
    roots = {path for leaf in leaves for path in _sources([vars(leaf.config), type(leaf)])}
    if is_path(reference):
        roots |= named_by(read_files(Path(reference)))
    own = {path for path in roots if not is_library(path)}
    return fingerprint(own) if own else {}


def _sources(value: Any) -> Iterator[Path]:
    """Yield the files of the functions and classes in a value."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _sources(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _sources(vars(value))
    elif isinstance(value, functools.partial):
        yield from _sources([value.func, value.args, value.keywords])
    elif callable(value) and (file := _file(value)) is not None:
        yield file


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
    """Return a function's name and the hash of its whole file."""
    file = _file(function)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return {"function": name, "source": file_digest(file) if file else ""}


def _file(function: Any) -> Path | None:
    """Return the file of a function, of a class, or of the class of an object that can be called."""
    for found in (function, type(function)):
        try:
            file = inspect.getsourcefile(found)
        except TypeError:
            continue
        return Path(file).resolve() if file and Path(file).is_file() else None
    return None


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
