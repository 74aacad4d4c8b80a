"""``posttrain list``: every recipe, stage, group and plugin; imports neither Hydra nor torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.config.paths import conf_folders, recipe_folders
from posttrain.config.schema import LaunchConfig
from posttrain.errors import reject, suggest
from posttrain.host import plugins
from posttrain.host.plugins import Host
from posttrain.quoting import one_line
from posttrain.stage import Settings

GROUPS = {"models": "model", "variants": "variant", "gates": "gate", "trackers": "tracker", "launches": "launch"}
"""Names of lists, and their folders below conf/."""
NODES = {"launch": Settings(name="launch", summary="the processes that train a stage together", config=LaunchConfig)}
"""Settings that are of no plugin and of no stage."""
MOST_SUMMARY = 200
"""Characters shown of a file's first line."""
SECTIONS = ("recipes", "stages", *GROUPS, "rewards", "settings", "plugins")


def main(words: list[str]) -> int:
    """Print every section, one of them, or the settings of one stage."""
    as_json = "--json" in words
    names = [word for word in words if word != "--json"]
    host = plugins.load()
    declared = {**host.stages, **host.settings, **NODES}
    if len(names) == 1 and names[0] in declared and names[0] not in SECTIONS:
        _print_settings(host, names[0], as_json)
        return 0
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        fix = suggest(unknown[0], [*SECTIONS, *declared])
        reject(f"list {unknown[0]}", "is neither a list nor a stage", fix)
    content = {section: _rows(section, host) for section in names or SECTIONS}
    print(json.dumps(content, indent=2) if as_json else _text(content))
    return 0


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


def _print_settings(host: Host, name: str, as_json: bool) -> None:
    from posttrain.config.help import settings

    declared = NODES.get(name) or host.stages.get(name) or host.settings[name]
    key = getattr(declared, "group", None) or name
    rows = settings(declared.config)
    if as_json:
        what = "stage" if name in host.stages else "plugin" if name in host.settings else "group"
        print(json.dumps({what: name, "settings": [vars(row) for row in rows]}, indent=2))
        return
    print(f"{name}: {declared.summary}\n")
    for row in rows:
        print(f"  {key}.{row.name}: {row.type} = {row.default}")
        print(f"      {row.help}")
