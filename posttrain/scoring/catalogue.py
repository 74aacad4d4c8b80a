"""lm-eval's task files, read without importing lm_eval: local YAML files and the names it registers."""

from __future__ import annotations

import copy
import functools
import glob
import importlib.util
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from posttrain.data.files import FORMATS
from posttrain.host.index import Index, files_below

MOST_BYTES = 250_000
"""Bytes of a task file."""
MOST_VALUES = 100_000
"""Values of a task file, those of its anchors counted wherever they are repeated."""
LOADERS = ("arrow", "csv", "json", "pandas", "parquet", "text")
"""Names by which datasets loads files of one's own."""
MOST_INCLUDES = 50
EVALUATED = ("test_split", "validation_split", "training_split")
"""Splits in lm-eval's order of preference: it scores the first one of a task."""
_NAME = re.compile(rb"""^["']?(?:task|group)["']?[ ]*:[ ]*["']?([\w.:-]+)["']?[ ]*\r?$""", re.MULTILINE)

_PLACES = re.compile(r"://|[*?\[]")
"""URLs and patterns, among the names of files."""
_TAGS = re.compile(rb"""^["']?tag["']?[ ]*:([^:\r\n]*(?:\r?\n[ ]*- [^:\r\n]*)*)""", re.MULTILINE)
"""A task's tags: one behind the key, or a list of them below it."""


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


@dataclass(frozen=True)
class TaskFile:
    """One YAML file of a task, with its own settings: data files as absolute paths, without its includes."""

    path: Path
    settings: dict[str, Any]


def read_task_file(path: Path) -> dict[str, Any]:
    """Return the settings of a task file and of its includes, with data files as absolute paths.

    Raises OSError, ValueError, TypeError or yaml.YAMLError when a file cannot be read.
    """
    return merge(read_files(path))


def merge(files: Iterable[TaskFile]) -> dict[str, Any]:
    """Return the settings of a task from those of its files, in the order of ``read_files``."""
    merged: dict[str, Any] = {}
    for file in files:
        merged |= file.settings
    return merged


def read_files(path: Path) -> list[TaskFile]:
    """Return a task file after all that it includes. No function is imported. Raises as read_task_file does."""
    return list(_read(path.expanduser().resolve(), ()))


def _read(path: Path, including: tuple[Path, ...]) -> Iterator[TaskFile]:
    if path in including:
        raise ValueError(f"{path} includes itself")
    if len(including) > MOST_INCLUDES:
        raise ValueError(f"{path} is included through more than {MOST_INCLUDES} files")
    settings = _parse(path)
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise TypeError(f"{path} holds no settings")
    _resolve_data_files(settings, path.parent)
    includes = settings.pop("include", [])
    for include in includes if isinstance(includes, list) else [includes]:
        if not isinstance(include, str):
            raise TypeError(f"{path} includes {include!r}, which is no path")
        yield from _read((path.parent / include).resolve(), (*including, path))
    yield TaskFile(path, settings)


def _parse(path: Path) -> Any:
    """Return the content of a YAML file, which may be hostile: a pipe, huge, nested without end, or a bomb of anchors.

    Raises OSError, ValueError or yaml.YAMLError.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is not a regular file")
    with path.open("rb") as stream:
        text = stream.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ValueError(f"{path} has more than {MOST_BYTES:,} bytes")
    try:
        return copy.deepcopy(_settings_in(text))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None


@functools.lru_cache(maxsize=100)
def _settings_in(text: bytes) -> Any:
    """Return the content of the text of a file, of which a plan asks repeatedly. Raises ValueError or YAMLError."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_nodes(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return the number of values below a node, repeated ones as often as they are repeated. Raises ValueError."""
    if id(node) not in sizes:
        sizes[id(node)] = MOST_VALUES + 1  # while it is counted: an anchor within itself never ends
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        flat = [child for item in children for child in (item if isinstance(item, tuple) else (item,))]
        sizes[id(node)] = 1 + sum(_check_nodes(child, sizes) for child in flat)
    if sizes[id(node)] > MOST_VALUES:
        raise ValueError(f"its anchors repeat more than {MOST_VALUES:,} values")
    return sizes[id(node)]


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


def data_files(settings: Mapping[str, Any]) -> list[Path]:
    """Return the data files named one by one in a task: no URLs, no patterns."""
    arguments = settings.get("dataset_kwargs")
    return [Path(file) for file in _leaves(arguments.get("data_files"))] if isinstance(arguments, dict) else []


def names_no_file(settings: Mapping[str, Any]) -> bool:
    """Return True for a task on files that names none: datasets would take whatever the working directory holds."""
    arguments = settings.get("dataset_kwargs")
    named = isinstance(arguments, dict) and (arguments.get("data_files") or arguments.get("data_dir"))
    return settings.get("dataset_path") in LOADERS and not named


def _leaves(value: Any) -> list[str]:
    return [text for text in _texts(value) if not _PLACES.search(text)]


def _texts(value: Any) -> list[str]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, str) else [text for each in inner for text in _texts(each)]


def _is_local(settings: Mapping[str, Any]) -> bool:
    """Return True for documents in files that are named one by one: their content is known, whatever else is cached."""
    arguments = settings.get("dataset_kwargs")
    named = _texts(arguments.get("data_files")) if isinstance(arguments, dict) else []
    return bool(named) and len(named) == len(data_files(settings))


def tasks_folder() -> Path:
    """Return the folder of lm-eval's registered tasks. Raises ModuleNotFoundError when lm_eval is not installed."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("lm_eval is not installed")
    return Path(spec.submodule_search_locations[0]) / "tasks"


@functools.cache
def registered_tasks() -> Mapping[str, Path]:
    """Return the registered tasks and groups by name, each with its file."""
    kept = Index("registered tasks", str(tasks_folder()))
    if kept.text is None:
        found = _named()
        kept.keep(json.dumps(found), task_files())
    else:
        found = json.loads(kept.text)
    return {name: Path(path) for name, path in found.items()}


def task_files() -> Iterable[str]:
    """Return the files and folders that decide which tasks are registered, and how."""
    return files_below(str(tasks_folder()))


def _named() -> dict[str, str]:
    """Read every task file; return the file of each task and group by its name."""
    names: dict[str, str] = {}
    for path in sorted(_yaml_files(str(tasks_folder()))):
        for name in _NAME.findall(_content(path)):
            names.setdefault(name.decode(), path)
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


def dataset_revisions(reference: str) -> dict[str, list[str]]:
    """Return the revisions on this machine of the hub datasets behind a task or a group, by the dataset's name."""
    waiting, seen, found = [reference], set[str](), dict[str, list[str]]()
    while waiting:
        name = waiting.pop()
        path = Path(name) if is_path(name) else registered_tasks().get(name)
        if name in seen:
            continue
        seen.add(name)
        if path is None:
            waiting += _tagged().get(name, [])
            continue
        settings = read_task_file(path)
        dataset, parts = settings.get("dataset_path"), settings.get("task")
        waiting += _leaves(parts) if isinstance(parts, list) else []  # names of tasks, and texts that name none
        if isinstance(dataset, str) and not _is_local(settings) and (revisions := _revisions(dataset)):
            found[dataset] = revisions
    return found


@functools.cache
def _tagged() -> Mapping[str, list[str]]:
    """Return the registered tasks of each tag."""
    found: dict[str, list[str]] = {}
    for name, path in registered_tasks().items():
        tags = _TAGS.search(_content(str(path)))
        for tag in re.findall(rb"[\w.-]+", tags[1]) if tags else ():
            found.setdefault(tag.decode(), []).append(name)
    return found


def _revisions(dataset: str) -> list[str]:
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets")
    copies = Path(HF_HUB_CACHE).glob(f"datasets--{glob.escape(dataset.replace('/', '--'))}/snapshots/*")
    tables = prepared.glob(f"{glob.escape(dataset.replace('/', '___'))}/*/*/*")
    return sorted({path.name for path in (*copies, *tables) if path.is_dir()})


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
