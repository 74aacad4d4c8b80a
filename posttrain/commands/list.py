"""``posttrain list``: every recipe, stage, group and plugin; imports neither Hydra nor torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from posttrain.config.launch import LaunchConfig
from posttrain.config.paths import conf_folders, recipe_folders, user_recipes
from posttrain.config.schema import MISSING, GateConfig, GateTask, LoraSettings, ModelConfig, Source
from posttrain.errors import reject, suggest
from posttrain.host import consent, index, plugins
from posttrain.host.plugins import Host
from posttrain.quoting import one_line
from posttrain.stage import Settings

GROUPS = {"models": "model", "variants": "variant", "gates": "gate", "trackers": "tracker", "launches": "launch"}
"""Names of lists, and their folders below conf/."""
NODES = {
    "launch": Settings(name="launch", summary="the processes that train a stage together", config=LaunchConfig),
    "model": Settings(name="model", summary="the base model", config=ModelConfig),
    "source": Settings(name="source", summary="one source of records, below a stage's data", config=Source),
    "lora": Settings(name="lora", summary="the adapter of a stage", config=LoraSettings),
    "gate": Settings(name="gate", summary="the gate of a stage; list gate NAME has its tasks", config=GateConfig),
    "task": Settings(name="task", summary="the demand of a gate on one task", config=GateTask),
}
"""Settings that are of no plugin and of no stage."""
PLACES = {"source": "STAGE.data", "lora": "STAGE.lora", "gate": "STAGE.gate", "task": "STAGE.gate.tasks.TASK"}
"""Their keys in a recipe, where these are not their names."""
TASKS = "tasks"
MOST_TASKS = 200
"""Names of tasks that are shown."""
MOST_SUMMARY = 200
"""Characters shown of a file's first line."""
SECTIONS = ("recipes", "stages", *GROUPS, "rewards", "settings", "plugins")


def main(words: list[str]) -> int:
    """Print every section, one of them, the settings of one stage or node, a gate's tasks, or the names of tasks."""
    host = plugins.load()
    text = _answer(host, [word for word in words if word != "--json"], "--json" in words)
    kept = index.of_command()
    if kept is not None and not host.failures():  # one that failed may not fail the next time
        kept.keep(text, _deciding(host, with_tasks=TASKS in words))
    print(text)
    return 0


def _answer(host: Host, names: list[str], as_json: bool) -> str:
    declared = {**host.stages, **host.settings, **NODES}
    if names[:1] == [TASKS]:
        return _tasks(host, names[1:], as_json)
    if len(names) == 2 and names[0] == "gate":
        return _gate(host, names[1], as_json)
    if len(names) == 1 and names[0] in declared and names[0] not in SECTIONS:
        return _settings(host, names[0], as_json)
    if len(names) == 2 and names[0] in declared and names[0] not in SECTIONS:
        reject(f"list {' '.join(names)}", "takes one name", f"posttrain list {names[0]} has its settings")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        fix = suggest(unknown[0], [*SECTIONS, TASKS, *declared])
        reject(f"list {unknown[0]}", "is neither a list nor a stage", fix)
    content = {section: _rows(section, host) for section in names or SECTIONS}
    return json.dumps(content, indent=2) if as_json else _text(content)


def _deciding(host: Host, *, with_tasks: bool) -> Iterator[str]:
    """Yield every file and folder that decides a list."""
    yield from index.files_of_python()
    yield str(consent.file())
    packages = {entry.module.partition(".")[0] for entry in entry_points(group=plugins.GROUP)}
    yield from index.files_below(*(place for name in packages for place in _places(name)))
    folders = [folder for folders in host.folders.values() for folder in folders]
    tasks = {path.parent for path in host.tasks.values()}
    for folder in {user_recipes(), *recipe_folders(folders), *folders, *tasks}:
        yield from (str(folder), *map(str, folder.glob("*.yaml")))
    yield from index.files_below(*map(str, conf_folders(folders)))
    if with_tasks:
        from posttrain.scoring.catalogue import task_files

        yield from task_files()


def _places(package: str) -> list[str]:
    """Return the folders of a loaded package; none of a module, whose file is one of Python's."""
    return [str(place) for place in getattr(sys.modules.get(package), "__path__", ())]


def _rows(section: str, host: Host) -> list[dict[str, Any]]:
    """Return the entries of one list."""
    if section == "plugins":
        return [
            {
                "name": p.name,
                "summary": p.reason or ", ".join(p.stages),
                "origin": p.origin,
                "version": p.version,
                "stages": list(p.stages),
                "state": p.state,
            }
            for p in host.plugins.values()
        ]
    if section == "stages":
        return [
            {
                "name": s.name,
                "summary": s.summary,
                "parent": s.parent,
                "records": s.records,
                "plugin": host.origin(s.name),
            }
            for s in host.stages.values()
        ]
    if section == "rewards":
        return [
            {"name": r.name, "summary": r.summary, "version": r.version, "plugin": host.reward_owners[r.name]}
            for r in host.rewards.values()
        ]
    if section == "settings":
        return [
            {"name": s.name, "summary": s.summary, "key": s.group or s.name, "plugin": host.origin(s.name)}
            for s in host.settings.values()
        ]
    plugin_folders = [folder for folders in host.folders.values() for folder in folders]
    if section == "recipes":
        return _files(recipe_folders(plugin_folders))
    return _files([folder / GROUPS[section] for folder in conf_folders(plugin_folders)])


def _files(folders: list[Path]) -> list[dict[str, Any]]:
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return [{"name": name, "summary": _summary(path), "path": str(path)} for name, path in sorted(found.items())]


def _summary(path: Path) -> str:
    """Return the comment on the first line of a file, or nothing: an unsound file is explained when it is used."""
    if not path.is_file():  # a pipe would keep its reader waiting
        return ""
    with path.open(encoding="utf-8", errors="replace") as stream:
        first = stream.readline(MOST_SUMMARY).strip()
    return first.lstrip("# ").rstrip(":") if first.startswith("#") and "@package" not in first else ""


def _text(content: dict[str, list[dict[str, Any]]]) -> str:
    lines: list[str] = []
    for section, rows in content.items():
        lines += [section, *(_line(row) for row in rows), ""]
    return "\n".join(lines).rstrip("\n")


def _line(row: dict[str, Any]) -> str:
    state = f"{row['state']:<8} {row['origin']:<24} " if "state" in row else ""
    return one_line(f"  {row['name']:<24} {state}{row['summary']}").rstrip()


def _settings(host: Host, name: str, as_json: bool) -> str:
    from posttrain.config.help import settings

    declared = NODES.get(name) or host.stages.get(name) or host.settings[name]
    key = getattr(declared, "group", None) or PLACES.get(name, name)
    rows = settings(declared.config)
    if as_json:
        what = "stage" if name in host.stages else "plugin" if name in host.settings else "group"
        return json.dumps({what: name, "settings": [vars(row) for row in rows]}, indent=2)
    lines = [f"{name}: {declared.summary}", ""]
    for row in rows:
        lines += [f"  {key}.{row.name}: {row.type} = {row.default}", f"      {row.help}"]
    return "\n".join(lines)


def _gate(host: Host, name: str, as_json: bool) -> str:
    """Return the tasks of a gate's file with their settings, and the gate's own. Raises BadInput for an unknown one."""
    from omegaconf import OmegaConf

    from posttrain.config.settings_file import Reading

    files = {row["name"]: row for row in _rows("gates", host)}
    if name not in files:
        reject(f"list gate {name}", f"no gate is named {name!r}", suggest(name, files))
    path = Path(files[name]["path"])
    found: Any = OmegaConf.to_container(Reading().read(path, f"gate/{name}")[0], resolve=False)
    if as_json:
        return json.dumps({"gate": name, "path": str(path), "settings": found}, indent=2)
    lines = [f"{name}: {files[name]['summary']}", f"  {path}", ""]
    for task, settings in (found.get("tasks") or {}).items():
        given = {key: "(must be given)" if value == MISSING else value for key, value in settings.items()}
        about = [f"{key} {value}" for key, value in given.items() if key != "role"]
        lines += [f"  {settings.get('role', ''):<6} {task}", *(f"           {line}" for line in about)]
    lines += [f"  {key}: {value}" for key, value in found.items() if key != "tasks"]
    lines += ["", f"In a recipe: gate@STAGE.gate={name}, or gate: {name} in a plain one; {{name: {name}, data: FILE}}"]
    return "\n".join(map(one_line, lines))


def _tasks(host: Host, patterns: list[str], as_json: bool) -> str:
    """Return the names of lm-eval's and plugins' tasks that match a pattern, such as ``gsm8k*``, or contain a word."""
    from fnmatch import fnmatchcase

    from posttrain.scoring.catalogue import registered_tasks

    names = sorted({*registered_tasks(), *host.tasks})
    wanted = [each if set(each) & set("*?[") else f"*{each}*" for each in patterns] or ["*"]
    found = [name for name in names if any(fnmatchcase(name, each) for each in wanted)]
    if not found:
        what = f"none of {len(names):,} tasks has such a name"
        reject(f"list tasks {' '.join(patterns)}", what, "posttrain list tasks shows the first")
    if as_json:
        return json.dumps({TASKS: found}, indent=2)
    lines = [one_line(name) for name in found[:MOST_TASKS]]
    if len(found) > MOST_TASKS:
        lines.append(f"and {len(found) - MOST_TASKS:,} more: posttrain list tasks PATTERN, such as 'mmlu_*'")
    return "\n".join(lines)
