"""Problems of a gate's tasks: found in their YAML files before anything heavy is imported, or in loaded tasks."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from posttrain.config.regression import GGUF
from posttrain.config.schema import Backend
from posttrain.data.files import FORMATS, suggest_sibling
from posttrain.data.questions import META, PLACE
from posttrain.disk import DISK_ERRORS
from posttrain.errors import BadInput, PosttrainError, Problem, nearest, shown, suggest
from posttrain.gate.matching import group_equal, merge_sources
from posttrain.host import consent
from posttrain.host.time_limit import time_limit
from posttrain.scoring.catalogue import Function, data_files, is_path, read_task_file, registered_tasks
from posttrain.scoring.code import check_consent

if TYPE_CHECKING:
    from posttrain.config.schema import GateConfig, GateTask
    from posttrain.scoring.questions import PreparedTask

NO_FILTER = "none"
"""lm-eval's name for the filter of a task without a filter_list."""
GROUP = "task"
"""Field of the slices of a group: its tasks."""
MOST_SLICES = 200
"""Values of a field that slices can be named by."""


_NLTK = re.compile(r"Resource\s+\S*?([A-Za-z]\w+)\S*\s+not found")
_COLOUR = re.compile(r"\x1b\[\d*m")
_PIP = re.compile(r"pip install [\w .\[\]-]+")


def cure(error: BaseException) -> str:
    """Return how to get what a task lacks on this machine; empty for a fault of another kind."""
    text = _COLOUR.sub("", str(error))
    if isinstance(error, LookupError) and (resource := _NLTK.search(text)):
        return f"python -m nltk.downloader {resource[1]}"
    if isinstance(error, ImportError) and (command := _PIP.search(text)):
        return command[0].strip()
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"pip install {error.name.partition('.')[0]}"
    return ""


def in_short(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message that holds words."""
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if re.search(r"\w", line)]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


PATTERNS = ("regex_pattern", "regexes_to_ignore")
"""Settings of filters and metrics that hold regular expressions."""
SECONDS = 20.0
"""Seconds of computing for the patterns and functions of a task about one document."""
MORE_SECONDS = 0.1
"""Seconds for each further document of a filter that is given many."""


@contextlib.contextmanager
def blaming(where: str, documents: int | None = 1) -> Iterator[None]:
    """Raise BadInput at ``where`` for whatever a task's own functions raise, or when they compute for too long.

    The limit depends on the number of ``documents``; without one there is none.
    """
    seconds = None if documents is None else SECONDS + MORE_SECONDS * (documents - 1)
    try:
        with contextlib.nullcontext() if seconds is None else time_limit(seconds):
            yield
    except PosttrainError:
        raise
    except TimeoutError as error:
        what = f"the task cannot be scored: its patterns or functions take more than {seconds:g} s of computing"
        fix = "Mend the patterns of its filter_list and metric_list, or choose another task"
        raise BadInput(Problem(where=where, what=what, fix=fix)) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:  # no fault of the task
            raise
        fix = cure(error) or "Mend the task's functions or its documents, or choose another task"
        raise BadInput(Problem(where=where, what=f"the task cannot be scored: {in_short(error)}", fix=fix)) from error


def check_tasks(tasks: Mapping[str, GateTask]) -> list[Problem]:
    """Return every problem visible in the tasks' YAML files; ``where`` starts with ``tasks.<name>``.

    Registered groups, metrics from lm-eval's defaults and data sets on the hub are not visible there:
    ``posttrain.scoring.harness.tasks.preflight`` imports lm_eval and checks them.
    """
    return [problem for name, task in tasks.items() for problem in _check_task(f"tasks.{name}", name, task)]


def check_backend(gate: GateConfig, candidate: str = "") -> list[Problem]:
    """Report a missing backend, or one that does not fit the ``candidate``; ``where`` is relative to the gate."""
    is_file = candidate.endswith(GGUF)
    if is_file and gate.backend is not Backend.llama:
        what = f"{gate.backend.value} does not read files of llama.cpp"
        return [Problem(where="backend", what=what, fix="Set gate.backend=llama")]
    if gate.backend is Backend.llama and not is_file:
        fix = "posttrain export ARTIFACT --to gguf, then posttrain gate adapter=FILE.gguf; or set gate.backend=hf"
        return [Problem(where="backend", what="llama.cpp answers for GGUF files alone", fix=fix)]
    packages = {Backend.vllm: ("vllm",), Backend.llama: ("gguf", "xllamacpp")}.get(gate.backend, ())
    fixes = {
        Backend.vllm: "pip install vllm on a machine with a GPU, or set gate.backend=hf",
        Backend.llama: "pip install 'posttrain[llama]'",
    }
    missing = [name for name in packages if find_spec(name) is None]
    return [Problem(where="backend", what=f"{name} is not installed", fix=fixes[gate.backend]) for name in missing[:1]]


def _check_task(where: str, name: str, task: GateTask) -> Iterator[Problem]:
    yield from _check_numbers(where, task)
    if task.data is not None:
        yield from _check_data(f"{where}.data", Path(task.data).expanduser())
    reference = task.task or name
    if is_path(reference):
        yield from _check_file(where, Path(reference).expanduser(), task)
    elif reference in registered_tasks():
        yield from _check_settings(where, registered_tasks()[reference], task, local=False)
    else:
        close = nearest(reference, registered_tasks())
        yield Problem(
            where=where,
            what=f"lm-eval registers no task or group {reference}",
            fix=(f"Did you mean {close}? " if close else "") + "For a task of your own, give its file: task: PATH.yaml",
        )


def _check_data(where: str, path: Path) -> Iterator[Problem]:
    endings = [ending for ending, known in FORMATS.items() if known.datasets_builder is not None]
    if not path.is_file():
        yield Problem(where=where, what=f"there is no file {path}", fix=suggest_sibling(path))
    elif path.suffix not in endings:
        yield Problem(where=where, what=f"{path} has an unknown ending", fix=f"Known: {', '.join(endings)}")


def _check_numbers(where: str, task: GateTask) -> Iterator[Problem]:
    for key, least in (("limit", 1), ("num_fewshot", 0)):
        value = getattr(task, key)
        if value is not None and value < least:
            yield Problem(where=f"{where}.{key}", what=f"{key} is {value}", fix=f"Give at least {least}")


def _check_file(where: str, path: Path, task: GateTask) -> Iterator[Problem]:
    if path.is_file():
        yield from _check_settings(where, path, task, local=True)
        return
    siblings = [str(file) for file in path.parent.glob("*.y*ml")]
    close = nearest(str(path), siblings)
    fix = f"Did you mean {close}?" if close else f"There is no task file in {path.parent}" if not siblings else ""
    yield Problem(where=f"{where}.task", what=f"there is no file {path}", fix=fix or suggest(str(path), siblings))


def _check_settings(where: str, path: Path, task: GateTask, *, local: bool) -> Iterator[Problem]:
    try:
        settings = read_task_file(path)
        problems = list(check_consent(f"{where}.task", path)) if local else []
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        yield Problem(where=f"{where}.task", what=f"{path} cannot be read: {error}")
        return
    if local and not isinstance(settings.get("task"), str):
        yield Problem(
            where=f"{where}.task",
            what=f"{path} names no task",
            fix="Add a line task: NAME; groups of your own are not supported",
        )
    if isinstance(settings.get("task"), list):
        return
    yield from problems
    if settings.get("unsafe_code"):
        yield from check_programs(where, task)
    yield from _check_metric(where, settings, task)
    yield from check_filter(where, _filters(settings), task)
    yield from _check_patterns(f"{where}.task", path, settings)
    for file in data_files(settings) if local and task.data is None else ():
        if not file.exists():
            yield Problem(where=f"{where}.task", what=f"{path} reads {file}, which does not exist")


def _check_patterns(where: str, path: Path, settings: Mapping[str, Any]) -> Iterator[Problem]:
    """Report the first pattern of a filter or a metric that is none, or that takes too long to be read."""
    for pattern in _patterns({key: settings.get(key) for key in ("filter_list", "metric_list")}):
        why = ""
        try:
            with time_limit(SECONDS):
                re.compile(pattern)
        except TimeoutError:
            why = f"takes more than {SECONDS:g} s of computing to be read"
        except (re.error, OverflowError, RecursionError, MemoryError) as error:
            why = f"is no regular expression: {error}"
        if why:
            yield Problem(where=where, what=f"the pattern {shown(pattern)} in {path} {why}", fix="Mend it")
            return


def _patterns(settings: Any) -> Iterator[str]:
    """Yield the regular expressions in a task's settings, by the names that lm-eval gives them."""
    if isinstance(settings, list):
        for each in settings:
            yield from _patterns(each)
    for key, value in settings.items() if isinstance(settings, Mapping) else ():
        if key in PATTERNS:
            yield from (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str))
        else:
            yield from _patterns(value)


def _check_metric(where: str, settings: Mapping[str, Any], task: GateTask) -> Iterator[Problem]:
    entries = settings.get("metric_list")
    if not isinstance(entries, list):
        return
    metrics = {_metric_name(entry): entry for entry in entries if isinstance(entry, dict)}
    if task.metric not in metrics:
        yield unknown_metric(where, metrics, task)
    elif metrics[task.metric].get("aggregation", "mean") != "mean":
        yield unsupported_aggregation(where, task)


def unknown_metric(where: str, metrics: Mapping[str, Any], task: GateTask) -> Problem:
    """Report a metric unknown to the task."""
    return Problem(
        where=f"{where}.metric", what=f"the task has no metric {task.metric}", fix=suggest(task.metric, metrics)
    )


def check_programs(where: str, task: GateTask) -> Iterator[Problem]:
    """Report a task that runs programs written by the model, without permission by recipe and user to do so."""
    entry = where.removeprefix("tasks.")
    what, setting = "the task runs programs that the model writes", f"{where}.run_code"
    if not task.run_code:
        fix = "In a container without network, set run_code: true on the task; elsewhere choose another task"
        yield Problem(where=setting, what=what, fix=fix)
    elif not consent.may_run_programs(entry, task.task or entry):
        fix = f"In a container without network, add {consent.FLAG} to the command, or the line run_code "
        fix += f"{task.task or entry} to {consent.file()}: a recipe alone cannot allow it"
        yield Problem(where=setting, what=what, fix=fix)


def unsupported_aggregation(where: str, task: GateTask) -> Problem:
    """Report a metric other than a mean over documents: it has no paired differences."""
    return Problem(
        where=f"{where}.metric",
        what=f"{task.metric} is not a mean over documents",
        fix="Choose a metric with aggregation: mean; only those are compared document by document",
    )


def check_filter(where: str, filters: Sequence[str], task: GateTask) -> Iterator[Problem]:
    """Report a filter unknown to the task, or a missing choice among several."""
    if task.filter is None and len(filters) > 1:
        yield Problem(
            where=f"{where}.filter", what="the task has several filters", fix=f"Choose one of {', '.join(filters)}"
        )
    elif task.filter is not None and task.filter not in filters:
        yield Problem(
            where=f"{where}.filter", what=f"the task has no filter {task.filter}", fix=suggest(task.filter, filters)
        )


def check_direction(where: str, task: GateTask, declared: bool | None) -> Iterator[Problem]:
    """Report a direction of the metric against the task's, or given by neither recipe nor task."""
    setting, stated = f"{where}.higher_is_better", task.higher_is_better
    if declared is None and stated is None:
        what = f"the task does not say whether more {task.metric} is better"
        yield Problem(where=setting, what=what, fix="Give higher_is_better: true, or false")
    elif stated not in (None, declared) and declared is not None:
        what = f"is {str(stated).lower()}, but for the task {'more' if declared else 'less'} {task.metric} is better"
        yield Problem(where=setting, what=what, fix="Leave it out, or correct the task's file")


def check_cluster(where: str, task: GateTask, documents: Iterable[Any]) -> Iterator[Problem]:
    """Report the first document without the field for its source."""
    if task.cluster is None:
        return
    for index, document in enumerate(documents):
        if not isinstance(document, Mapping) or document.get(task.cluster) is None:
            fields = [str(key) for key in document] if isinstance(document, Mapping) else []
            what = f"document {index} has no field {task.cluster}"
            yield Problem(where=f"{where}.cluster", what=what, fix=suggest(task.cluster, fields))
            return


def check_slices(where: str, task: GateTask, documents: Iterable[Any]) -> Iterator[Problem]:
    """Report the first document without a field for slices, with the fields it has; or a field of too many values."""
    values: dict[str, set[str]] = {field: set() for field in task.slices}
    for index, document in enumerate(documents):
        found = {field: field_of(document, field) for field in task.slices}
        if missing := [field for field, value in found.items() if value is None]:
            what = f"document {index} has no field {' and no '.join(missing)}"
            fix = suggest(missing[0], fields_of(document))
            yield Problem(where=f"{where}.slices", what=what, fix=fix)
            return
        for field, value in found.items():
            values[field].add(str(value))
    for field, different in values.items():
        if len(different) > MOST_SLICES:
            what = f"{field} has {len(different):,} values, more than {MOST_SLICES}"
            yield Problem(where=f"{where}.slices", what=what, fix="Name a field that many documents share")


def field_of(document: Any, field: str) -> str | None:
    """Return the value of a document's field, or of its ``meta``, as text; None without one."""
    if not isinstance(document, Mapping):
        return None
    value = document.get(field)
    if value is None and META in document:
        value = json.loads(document[META]).get(field)
    return None if value is None else value if isinstance(value, str) else json.dumps(value, default=str)


def fields_of(document: Any) -> list[str]:
    """Return the names of a document's fields, those of its ``meta`` among them."""
    if not isinstance(document, Mapping):
        return []
    meta = json.loads(document[META]) if META in document else {}
    return [str(key) for key in (*document, *meta) if key not in (META, PLACE)]


def read_slices(
    gate: Mapping[str, GateTask], prepared: Iterable[PreparedTask]
) -> dict[str, dict[str, dict[str, tuple[int, ...]]]]:
    """Return the documents of each value of each field of a task's slices; of a group without any, of its tasks."""
    found: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {}
    for task in prepared:
        fields = gate[task.name].slices or ([GROUP] if len(task.leaves) > 1 else [])
        for field in fields:
            values: dict[str, list[int]] = {}
            for question in task.questions:
                own = question.leaf.config.task if field == GROUP else field_of(question.doc, field)
                values.setdefault(str(own), []).append(question.doc_id)
            by_value = {value: tuple(ids) for value, ids in sorted(values.items())}
            found.setdefault(task.name, {})[field] = by_value
    return found


def read_clusters(gate: Mapping[str, GateTask], prepared: Iterable[PreparedTask]) -> dict[str, dict[int, str]]:
    """Return the source of every document, for the tasks with ``cluster`` and those in which questions are equal.

    Equal questions are one source, whatever examples precede them. Raises BadInput when a document has no source.
    """
    found: dict[str, dict[int, str]] = {}
    for task in prepared:
        field = gate[task.name].cluster
        equal = group_equal({question.doc_id: question.contents for question in task.questions})
        if field is not None:
            documents = [question.doc for question in task.questions]
            if problems := list(check_cluster(f"tasks.{task.name}", gate[task.name], documents)):
                raise BadInput(problems)
            sources = {question.doc_id: str(question.doc[field]) for question in task.questions}
        elif len(equal) < len(task.questions):
            sources = {question.doc_id: str(question.doc_id) for question in task.questions}
        else:
            continue
        merged = zip(equal, merge_sources(equal, sources), strict=True)
        found[task.name] = {doc_id: source for group, source in merged for doc_id in group}
    return found


def _metric_name(entry: Mapping[str, Any]) -> str:
    metric = entry.get("metric")
    return metric.name if isinstance(metric, Function) else str(metric)


def _filters(settings: Mapping[str, Any]) -> list[str]:
    entries = settings.get("filter_list")
    if not isinstance(entries, list):
        return [NO_FILTER]
    return [str(entry.get("name")) for entry in entries if isinstance(entry, dict)]
