"""lm-eval's task files, read without importing lm_eval: local YAML files and the names it registers."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from posttrain.data.files import FORMATS
from posttrain.digests import file_digests

EVALUATED = ("test_split", "validation_split", "training_split")
"""Splits in lm-eval's order of preference: it scores the first one of a task."""
_NAME = re.compile(rb"""^["']?(?:task|group)["']?[ ]*:[ ]*["']?([\w.:-]+)["']?[ ]*\r?$""", re.MULTILINE)


class Function(str):
    """The target of a ``!function module.name``, which is not imported."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """Name of the function, without its module."""
        return self.rpartition(".")[2]


class _Loader(yaml.SafeLoader):
    """Safe loading, with ``!function`` kept as a reference."""


def _function(loader: _Loader, node: Any) -> Function:
    return Function(loader.construct_scalar(node))


_Loader.add_constructor("!function", _function)


def is_path(reference: str) -> bool:
    """Return True when a task is given as a YAML file, False for a registered name."""
    return reference.endswith((".yaml", ".yml"))


def read_task_file(path: Path) -> dict[str, Any]:
    """Return the settings of a task file and of its includes, with data files as absolute paths.

    Raises OSError, ValueError, TypeError or yaml.YAMLError when a file cannot be read.
    """
    return _read(path.expanduser().resolve(), ())


def _read(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    if path in including:
        raise ValueError(f"{path} includes itself")
    with path.open("rb") as stream:
        settings = yaml.load(stream, Loader=_Loader)
    if not isinstance(settings, dict):
        raise TypeError(f"{path} holds no settings")
    _resolve_data_files(settings, path.parent)
    includes = settings.pop("include", [])
    merged: dict[str, Any] = {}
    for include in includes if isinstance(includes, list) else [includes]:
        merged.update(_read((path.parent / include).resolve(), (*including, path)))
    return {**merged, **settings}


def _resolve_data_files(settings: dict[str, Any], folder: Path) -> None:
    """Make relative data files relative to their task file, not to the working directory as lm-eval does."""
    arguments = settings.get("dataset_kwargs")
    if not isinstance(arguments, dict):
        return
    for key in ("data_files", "data_dir"):
        if key in arguments:
            arguments[key] = _resolve(arguments[key], folder)


def _resolve(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {split: _resolve(files, folder) for split, files in value.items()}
    if isinstance(value, list):
        return [_resolve(file, folder) for file in value]
    return value if not isinstance(value, str) or "://" in value else str(folder / value)


def local_data_files(settings: Mapping[str, Any]) -> list[Path]:
    """Return the data files named one by one in a task: no URLs, no patterns."""
    return [Path(file) for file in _leaves((settings.get("dataset_kwargs") or {}).get("data_files"))]


def _leaves(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [file for files in value.values() for file in _leaves(files)]
    if isinstance(value, list):
        return [file for files in value for file in _leaves(files)]
    return [value] if isinstance(value, str) and not re.search(r"://|[*?\[]", value) else []


def tasks_folder() -> Path:
    """Return the folder of lm-eval's registered tasks. Raises ModuleNotFoundError when lm_eval is not installed."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("lm_eval is not installed")
    return Path(spec.submodule_search_locations[0]) / "tasks"


@functools.cache
def registered_tasks() -> Mapping[str, Path]:
    """Return the registered tasks and groups by name, each with its file."""
    names: dict[str, Path] = {}
    for path in sorted(_yaml_files(str(tasks_folder()))):
        for name in _NAME.findall(_content(path)):
            names.setdefault(name.decode(), Path(path))
    return names


def _yaml_files(folder: str) -> list[str]:
    return [f"{root}/{name}" for root, _, names in os.walk(folder) for name in names if name.endswith(".yaml")]


def _content(path: str) -> bytes:
    # Plain reads: with 14,000 files, opening them as streams takes four times as long.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, 1 << 16)
    finally:
        os.close(descriptor)


def documents_from(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return settings for reading a task's documents and few-shot examples from one file.

    Raises ValueError when the task has no split.
    """
    split = next((settings[key] for key in EVALUATED if settings.get(key)), None)
    if split is None:
        raise ValueError("the task has no test, validation or training split to replace with documents")
    return {
        "dataset_path": FORMATS[path.suffix].datasets_builder,
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path)}},
        **dict.fromkeys(("training_split", "validation_split", "test_split"), None),
        "test_split": split,
        "fewshot_split": split,
    }


def task_digests(reference: str, data: str | None) -> dict[str, str]:
    """Return the SHA-256 of every file of a task: its YAML files, functions and data, and ``data``, its documents.

    A registered task belongs to the installed lm-eval, whose version is recorded; of its files only ``data`` counts.
    """
    files = _files(Path(reference).expanduser().resolve()) if is_path(reference) else []
    documents = {"documents": Path(data).expanduser()} if data is not None else {}
    return file_digests({path.name: path for path in files} | documents)


def _files(path: Path) -> list[Path]:
    """List a task file, its includes, its data and the modules of its functions."""
    with path.open("rb") as stream:
        settings = yaml.load(stream, Loader=_Loader)
    includes = settings.get("include", [])
    included = [path.parent / name for name in (includes if isinstance(includes, list) else [includes])]
    modules = {path.parent / f"{name.rpartition('.')[0]}.py" for name in _functions(settings)}
    _resolve_data_files(settings, path.parent)
    return [path, *(file for name in included for file in _files(name)), *sorted(modules), *local_data_files(settings)]


def _functions(value: Any) -> list[Function]:
    if isinstance(value, Function):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [function for item in values for function in _functions(item)]
