"""Loading of lm_eval's tasks: a task of a gate is one of them, or the tasks of a group pooled."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lm_eval.api.metrics import mean
from lm_eval.tasks import TaskManager

from posttrain.errors import BadInput, PosttrainError, Problem, reject
from posttrain.host import consent
from posttrain.scoring import code
from posttrain.scoring.catalogue import (
    documents_from,
    is_path,
    merge,
    names_no_file,
    read_files,
    registered_tasks,
    tasks_folder,
)
from posttrain.scoring.checks import (
    check_cluster,
    check_direction,
    check_filter,
    check_programs,
    check_slices,
    cure,
    in_short,
    unknown_metric,
    unsupported_aggregation,
)
from posttrain.scoring.harness.examples import OtherExamples
from posttrain.scoring.isolation import muted, quiet

if TYPE_CHECKING:
    from posttrain.config.schema import GateTask

CODE_EVAL = "HF_ALLOW_CODE_EVAL"
"""Variable required by the library that runs programs written by the model."""


def preflight(tasks: Mapping[str, GateTask]) -> dict[str, list[Any]]:
    """Load every task as scoring will. Raises BadInput with the problems of all tasks."""
    problems: list[Problem] = []
    loaded = {}
    for name, task in tasks.items():
        try:
            loaded[name] = load_leaves(name, task)
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    return loaded


def load_leaves(name: str, task: GateTask) -> list[Any]:
    """Return the lm-eval tasks of a gate's task. Raises BadInput when one cannot be loaded or compared."""
    reference = task.task or name
    if task.run_code and consent.may_run_programs(name, reference):
        os.environ[CODE_EVAL] = "1"
    try:
        with quiet(), muted():
            leaves = _load(f"tasks.{name}", reference, task.data)
    except PosttrainError:
        raise
    except Exception as error:  # task files run functions and data scripts of their own: any exception is possible
        raise BadInput(_unloadable(name, reference, error)) from error
    for leaf in leaves:
        if problems := list(_objections(f"tasks.{name}", task, leaf)):
            raise BadInput(problems)
    if not shared_filters(leaves):
        raise BadInput(Problem(where=f"tasks.{name}", what=f"the tasks of {reference} share no filter"))
    for leaf in leaves:
        if task.num_fewshot is not None:
            leaf.set_config("num_fewshot", task.num_fewshot)
        if hasattr(leaf, "sampler"):
            leaf.sampler = OtherExamples(leaf, f"tasks.{name}")
    return leaves


def _load(where: str, reference: str, data: str | None) -> list[Any]:
    if is_path(reference):
        if problems := list(code.check_consent(where, Path(reference))):
            raise BadInput(problems)
        return _load_file(Path(reference), data)
    if data is not None:
        return _load_file(registered_tasks()[reference], data)
    return _load_registered(reference)


def _load_file(path: Path, data: str | None) -> list[Any]:
    """Load the task of a YAML file, with data files relative to that file, or with the documents of ``data``."""
    files = read_files(path)
    path, settings = files[-1].path, merge(files)
    override: dict[str, Any] = {"include": str(path)}
    if not code.find_code(files):
        override = settings  # lm-eval's own reader, which runs code, sees nothing that was not looked at
    elif not code.is_shipped(path):
        code.forget(code.files_behind(files))
    if data is not None:
        override |= documents_from(settings, Path(data).expanduser().resolve())
    elif names_no_file(settings):
        what = f"its dataset_path is {settings['dataset_path']}, and it names no file"
        reject(
            str(path), what, "Name it: dataset_kwargs: {data_files: {test: FILE}}, or give the gate's task data: FILE"
        )
    elif arguments := settings.get("dataset_kwargs"):
        override["dataset_kwargs"] = arguments
    # A second file includes the first and overrides its paths, because lm_eval resolves them against the working
    # directory.
    with tempfile.TemporaryDirectory() as folder:
        wrapper = Path(folder) / path.name
        wrapper.write_text(yaml.safe_dump(override), encoding="utf-8")
        return list(TaskManager(include_defaults=False).load(str(wrapper))["tasks"].values())


def _load_registered(name: str) -> list[Any]:
    """Load a registered task or group; index its family first, all thousands of tasks only when members are missing."""
    family = tasks_folder() / registered_tasks()[name].relative_to(tasks_folder()).parts[0]
    manager = TaskManager(include_defaults=False, include_path=str(family))
    if not _is_complete(name, manager.task_index):
        manager = TaskManager()
    return list(manager.load(name)["tasks"].values())


def _is_complete(name: str, index: Mapping[str, Any]) -> bool:
    """Return True when the index holds ``name`` and all its members."""
    return name in index and _has_members(index[name].cfg or {}, index)


def _has_members(settings: Mapping[str, Any], index: Mapping[str, Any]) -> bool:
    """Return True when the index holds a group's members: names, overrides, groups and tasks defined in place."""
    members = settings.get("task")
    for member in members if isinstance(members, list) else []:
        name = member if isinstance(member, str) else member.get("task", member.get("group"))
        if isinstance(name, list):
            if not _has_members(member, index):
                return False
        elif not _is_complete(name, index) and not (isinstance(member, dict) and "dataset_path" in member):
            return False
    return True


def _unloadable(name: str, reference: str, error: Exception) -> Problem:
    return Problem(
        where=f"tasks.{name}",
        what=f"lm-eval cannot load {reference}: {in_short(error)}",
        fix=cure(error)
        or "Check that its data are on this machine or reachable, and that its file is a valid lm-eval task",
    )


def _objections(where: str, task: GateTask, leaf: Any) -> Iterator[Problem]:
    """Report the reasons why a loaded task cannot be scored or compared."""
    if getattr(leaf, "UNSAFE_CODE", False):
        yield from check_programs(where, task)
    if getattr(leaf, "MULTIMODAL", False):
        yield Problem(where=where, what=f"{leaf.task_name} needs more than text", fix="Choose another task")
    aggregation = leaf.aggregation()
    if task.metric not in aggregation:
        yield unknown_metric(where, aggregation, task)
    elif aggregation[task.metric] is not mean:
        yield unsupported_aggregation(where, task)
    else:
        yield from check_direction(where, task, leaf.higher_is_better().get(task.metric))
    yield from check_filter(where, _filters(leaf), task)
    if task.cluster is not None:
        yield from check_cluster(where, task, leaf.eval_docs)
    if task.slices:
        yield from check_slices(where, task, leaf.eval_docs)


def _filters(leaf: Any) -> list[str]:
    return [ensemble.name for ensemble in leaf._filters]


def shared_filters(leaves: Sequence[Any]) -> list[str]:
    """Return the filters common to all the loaded tasks."""
    return [name for name in _filters(leaves[0]) if all(name in _filters(leaf) for leaf in leaves)]
