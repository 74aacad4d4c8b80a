"""Code behind a task of one's own: what of its files runs, which files that reaches, and the user's consent to it.

A task of settings and Jinja alone is data: lm-eval's own functions read it, and its templates are rendered in a
sandbox. Anything else may run whatever its author wrote, and is first asked of the user.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import os
import platform
import re
import shlex
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import posttrain
from posttrain.data.files import FORMATS
from posttrain.digests import digest_of, file_digest
from posttrain.errors import Problem
from posttrain.host import consent
from posttrain.scoring.catalogue import Function, TaskFile, data_files, is_path, read_files, tasks_folder

SETTINGS = {
    "task", "task_alias", "tag", "dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split",
    "test_split", "fewshot_split", "doc_to_text", "doc_to_target", "doc_to_choice", "description", "target_delimiter",
    "fewshot_delimiter", "fewshot_config", "num_fewshot", "metric_list", "output_type", "generation_kwargs", "repeats",
    "filter_list", "should_decontaminate", "doc_to_decontamination_query", "gen_prefix", "metadata", "include",
}  # fmt: skip
"""Keys of a task that is data, as long as no value of theirs is code."""
DATASET = {"data_files", "data_dir", "revision", "field", "sep", "delimiter", "encoding", "column_names", "quotechar"}
FEWSHOT = {
    "sampler", "split", "fewshot_indices", "samples", "doc_to_text", "doc_to_choice", "doc_to_target", "gen_prefix",
    "fewshot_delimiter", "target_delimiter",
}  # fmt: skip
GENERATION = {
    "until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "num_beams",
    "repetition_penalty", "no_repeat_ngram_size", "seed",
}  # fmt: skip
"""Arguments of generation that name no code: ``custom_generate`` names some."""
METRICS = {
    "acc", "acc_norm", "acc_bytes", "acc_mutual_info", "acc_all", "brier_score", "exact_match", "perplexity",
    "word_perplexity", "byte_perplexity", "bits_per_byte", "likelihood", "mcc", "f1", "bleu", "chrf", "chrf++", "ter",
    "bypass",
}  # fmt: skip
"""Metrics of lm-eval itself: any other name is looked up as a script, here or on the hub."""
FILTERS = {
    "regex", "regex_pos", "multi_choice_regex", "take_first", "take_first_k", "majority_vote", "remove_whitespace",
    "lowercase", "uppercase", "map", "format_span",
}  # fmt: skip
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
LIBRARIES = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib", "platstdlib"))
CORE = Path(posttrain.__file__).resolve().parent
SEARCHED = tuple(Path(entry or ".").resolve() for entry in sys.path)
"""Folders of modules before a task adds its own."""
MOST_FILES = 1000
"""Files of a folder that a task's code names."""


def find_code(files: Iterable[TaskFile]) -> list[str]:
    """Return what of a task's files runs code, in words; nothing for a task that is data.

    Included files come first and the task's own last. All count, because lm-eval imports even a function that is then
    replaced.
    """
    listed = list(files)
    folder = listed[-1].path.parent
    found = [f"includes {file.path}, outside its folder" for file in listed if not file.path.is_relative_to(folder)]
    return found + [reason for file in listed for reason in _code_in(file.settings)]


def check_consent(where: str, path: Path) -> Iterator[Problem]:
    """Report a task file that runs code to which the user has not consented. Raises as read_files does."""
    files = read_files(path)
    path = files[-1].path
    if is_shipped(path) or not (found := find_code(files)):
        return
    digest = digest_of(sorted(files_behind(files).values()))
    if consent.is_trusted(digest):
        return
    line = f"{digest}  {path.name}"
    yield Problem(
        where=where,
        what=f"{path} brings code of its own, which nobody has allowed: it {'; it '.join(found[:3])}",
        fix=f"Read its files first. Then add {consent.FLAG} to the command, or allow just these files, as they are:\n"
        f"    mkdir -p {shlex.quote(str(consent.file().parent))} && echo {shlex.quote(line)} >> "
        f"{shlex.quote(str(consent.file()))}",
    )


def task_digests(reference: str, data: str | None) -> dict[str, str]:
    """Return the SHA-256 of every file of a task by its path from the task's file, and of ``data``, its documents.

    A registered task belongs to the installed lm-eval, whose version is recorded; of its files only ``data`` counts.
    """
    files = read_files(Path(reference)) if is_path(reference) else []
    found = {os.path.relpath(path, files[-1].path.parent): digest for path, digest in files_behind(files).items()}
    return found | ({"documents": file_digest(Path(data).expanduser())} if data is not None else {})


def is_shipped(path: Path) -> bool:
    """Return True for a task file of posttrain, lm-eval or a plugin."""
    path = path.resolve()
    return path.is_relative_to(CORE) or path.is_relative_to(tasks_folder().resolve()) or consent.is_shipped(path)


def files_behind(files: Iterable[TaskFile]) -> dict[Path, str]:
    """Return the SHA-256 of every file of a task: YAML, modules and what they import and name, data."""
    listed = list(files)
    data = [path for file in listed for path in data_files(file.settings)]
    reached = reach(named_by(listed))
    return {path: file_digest(path) for path in {*(file.path for file in listed), *reached, *data} if path.is_file()}


def named_by(files: Iterable[TaskFile]) -> set[Path]:
    """Return the modules of the functions that task files name, and all files that the settings beside them name."""
    found: set[Path] = set()
    for file in files:
        functions = _functions(file.settings)
        modules = [file.path.parent / f"{name.rpartition('.')[0].replace('.', '/')}.py" for name in functions]
        found |= {module.resolve() for module in modules if module.is_file()}
        for text in _texts(file.settings) if functions else ():
            found |= set(_files_named(text, file.path.parent))
    return found


def fingerprint(roots: Iterable[Path]) -> dict[str, Any]:
    """Return the hashes of all files that code reaches from ``roots``, and the versions of the libraries it imports.

    The hashes are sorted and without names: a moved file keeps its scores.
    """
    reached = reach(roots)
    names = {name for path in reached for name in _imports(path)[0]}
    tops = {name.partition(".")[0] for name in names} - {"", "posttrain"} - sys.stdlib_module_names
    versions = {name: _version(name) for name in sorted(tops)}
    return {
        "files": sorted({file_digest(path) for path in reached}),
        "libraries": {name: version for name, version in versions.items() if version},
        "python": platform.python_version(),
    }


def reach(roots: Iterable[Path]) -> set[Path]:
    """Return the files that code reaches: modules that it imports, and files that it names, whether or not it does so.

    The files of installed libraries are not followed, but for the roots themselves.
    """
    waiting, found = [path.resolve() for path in roots], set()
    while waiting:
        path = waiting.pop()
        if path not in found and path.is_file():
            found.add(path)
            if path.suffix == ".py" and not is_library(path):
                waiting += _reached_from(path)
    return found


def forget(files: Iterable[Path]) -> None:
    """Forget imported modules of a task's files, and others of their names, so that the files are imported as they are.

    Python imports a name once: a helper edited since, or one of the same name in another task's folder, would do for
    it.
    """
    paths = {path for path in files if path.suffix == ".py" and not is_library(path)}
    stems = {path.stem for path in paths}
    for name, module in list(sys.modules.items()):
        source = getattr(module, "__file__", None)
        if source is None or name == "__main__" or name.partition(".")[0] in _plugins():
            continue
        path = _place(os.path.abspath(source))
        if path in paths or (name in stems and not is_library(path)):
            del sys.modules[name]


@functools.cache
def _place(source: str) -> Path:
    """Return where the file of a module lies, looked up once: for all modules it takes half a second."""
    return Path(source).resolve()


@functools.cache
def is_library(path: Path) -> bool:
    """Return True for a file of Python, of an installed library, or of posttrain itself: it changes with its version.

    Installed plugins do not count: they may change without one.
    """
    if path.is_relative_to(CORE):
        return True
    folder = next((folder for folder in LIBRARIES if path.is_relative_to(folder)), None)
    return folder is not None and path.relative_to(folder).parts[0] not in _plugins()


@functools.cache
def _plugins() -> frozenset[str]:
    return frozenset(entry.module.partition(".")[0] for entry in importlib.metadata.entry_points(group="posttrain"))


def _code_in(settings: Mapping[str, Any]) -> Iterator[str]:
    for function in _functions(settings):
        yield f"calls {function}"
    for key in settings:
        if key not in SETTINGS:
            yield f"has the key {key}"
    kwargs, generation = settings.get("dataset_kwargs"), settings.get("generation_kwargs")
    for key, known, value in (
        ("dataset_kwargs", DATASET, kwargs),
        ("generation_kwargs", GENERATION, generation),
        ("fewshot_config", FEWSHOT, settings.get("fewshot_config")),
    ):
        if value is not None and not (isinstance(value, dict) and set(value) <= known):
            yield f"has {key} other than {', '.join(sorted(known))}"
    yield from _code_in_lists(settings)
    dataset = settings.get("dataset_path")
    named = HUB_NAME.fullmatch(str(dataset)) is not None and not str(dataset).endswith(".py")
    builders = {known.datasets_builder for known in FORMATS.values()} | {"arrow"}
    if dataset is not None and dataset not in builders and not named:
        yield f"reads data by {dataset!r}"


def _code_in_lists(settings: Mapping[str, Any]) -> Iterator[str]:
    for entry in _dicts(settings.get("metric_list")):
        if entry.get("metric") not in METRICS or entry.get("hf_evaluate"):
            yield f"has the metric {entry.get('metric')!r}, which is not lm-eval's own"
        if not isinstance(entry.get("aggregation", ""), str):
            yield "has an aggregation of its own"
    for pipeline in _dicts(settings.get("filter_list")):
        for step in _dicts(pipeline.get("filter")):
            if step.get("function") not in FILTERS:
                yield f"has the filter {step.get('function')!r}"


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [{} if not isinstance(item, dict) else item for item in value] if isinstance(value, list) else []


def _functions(value: Any) -> list[Function]:
    if isinstance(value, Function):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [function for item in values for function in _functions(item)]


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [] if isinstance(value, Function) else [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for item in values for text in _texts(item)]


def _reached_from(path: Path) -> list[Path]:
    names, texts = _imports(path)
    named = [file for text in texts for file in _files_named(text, path.parent)]
    folders = [path.parent, *(folder for text in texts if (folder := _folder(text, path.parent)) is not None)]
    return [*named, *(place for name in names for place in _places(name, tuple(folders)))]


def _imports(path: Path) -> tuple[list[str], list[str]]:
    """Return the modules that a file imports, relative ones with dots, and the texts in it that may name files."""
    try:
        tree = ast.parse(path.read_bytes()) if path.suffix == ".py" else ast.Module([], [])
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return [], []
    names, texts = [], []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            joined = start if start.endswith(".") else f"{start}."
            names += [start, *(f"{joined}{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and 0 < len(node.value) < 256:
            texts.append(node.value)
    return names, texts


def _places(name: str, folders: tuple[Path, ...]) -> list[Path]:
    """Return the files of a module that is no library's: its own, and those of the packages that it is in."""
    parts = [part for part in name.split(".") if part]
    if dots := len(name) - len(name.lstrip(".")):
        return _along(parts, [([folder, *folder.parents][dots - 1]) for folder in folders[:1]])
    if found := [*_along(parts, folders), *_along(parts, SEARCHED)]:
        return found
    loaded = getattr(sys.modules.get(name), "__file__", None)
    now = [Path(entry or ".").resolve() for entry in sys.path]
    return [Path(loaded).resolve()] if loaded and not is_library(Path(loaded).resolve()) else _along(parts, now)


def _along(parts: list[str], folders: Iterable[Path]) -> list[Path]:
    """Return the files of a module in the first of the folders that has it."""
    for folder in folders:
        found, place = [], folder
        for part in parts:
            found += [file for file in (place / f"{part}.py", place / part / "__init__.py") if file.is_file()]
            place = place / part
        if own := [file.resolve() for file in found if not is_library(file.resolve())]:
            return own
    return []


def _files_named(text: str, folder: Path) -> list[Path]:
    """Return the files that a text may name from a folder: itself, a module, or the files of a folder below."""
    if "\0" in text or "\n" in text:
        return []
    try:
        found = [file for file in (folder / text, folder / f"{text.replace('.', '/')}.py") if file.is_file()]
        inside = _folder(text, folder)
        if inside is not None and inside != folder and inside.is_relative_to(folder):
            found += [file for file in sorted(inside.iterdir())[:MOST_FILES] if file.is_file()]
    except OSError:
        return []
    return [file.resolve() for file in found]


def _folder(text: str, folder: Path) -> Path | None:
    try:
        return place.resolve() if "\0" not in text and (place := folder / text).is_dir() else None
    except OSError:
        return None


@functools.cache
def _version(name: str) -> str:
    """Return the version of the distribution of a top-level module; empty without a distribution."""
    for distribution in (name, *_distributions().get(name, ())):
        try:
            return importlib.metadata.version(distribution)
        except (importlib.metadata.PackageNotFoundError, ValueError):
            continue
    return ""


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()
