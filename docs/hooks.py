"""Writes docs/hooks.md from posttrain/hookspecs.py and from the plugins that are shipped: ``make docs``."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from posttrain_trackers.tracking import Tracking

from posttrain import hookspecs
from posttrain.host import plugins

PAGE = Path(__file__).with_suffix(".md")
EXAMPLES = Path(__file__).parent / "examples" / "hooks"
"""A plugin for each hook, with its name; the files that it registers lie in a folder of this name."""
SHIPPED = "posttrain"
"""Plugins of this distribution are the shipped ones."""
INTRODUCTION = f"""\
# Hooks

Written by `make docs` from [posttrain/hookspecs.py](../posttrain/hookspecs.py), in the order in which they are called.
The version of this interface is {hookspecs.API_VERSION}: a plugin that says `POSTTRAIN_API = {hookspecs.API_VERSION}`
is never loaded by a posttrain with another one. [The tutorial](tutorial.md) builds a plugin from nothing,
[the API](api.md) has the types. Each example is a whole plugin from [examples/hooks](examples/hooks); a test runs it.
"""


@dataclass(frozen=True)
class Hook:
    """One hook as its specification declares it."""

    section: str
    name: str
    signature: str
    text: str
    users: tuple[str, ...]
    """Names of the shipped plugins that implement it."""


def hooks() -> Iterator[Hook]:
    """Every hook, in the order of the file."""
    source = inspect.getsource(hookspecs)
    users = shipped_users()
    banners = {number: line for number, line in enumerate(source.splitlines(), 1) if line.startswith("# --- ")}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        banner = banners[max(number for number in banners if number < node.lineno)]
        section = re.sub(r"^# --- | -+$", "", banner)
        text = ast.get_docstring(node) or ""
        yield Hook(section, node.name, signature(node), text, tuple(users.get(node.name, ())))


def signature(node: ast.FunctionDef) -> str:
    """The head of a function, in one line."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}"


def shipped_users() -> dict[str, list[str]]:
    """Names of the shipped plugins that implement each hook."""
    host = plugins.load()
    manager = host.manager
    manager.register(Tracking.__new__(Tracking), "tracker=NAME")
    found: dict[str, list[str]] = {}
    for name, plugin in manager.list_name_plugin():
        info = host.plugins.get(name)
        if info is not None and info.origin != plugins.BUILT_IN and info.origin.split()[0] != SHIPPED:
            continue
        for caller in manager.get_hookcallers(plugin) or []:
            found.setdefault(caller.name, []).append(name)
    return {hook: sorted(names) for hook, names in found.items()}


def example(name: str) -> str:
    """Return the code of a hook's example, and each settings file that it registers."""
    code = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    blocks = [f'```python title="{name}.py"\n{code}```\n']
    for path in sorted((EXAMPLES / name).rglob("*.yaml")):
        title = path.relative_to(EXAMPLES).as_posix()
        blocks.append(f'```yaml title="{title}"\n{path.read_text(encoding="utf-8")}```\n')
    return "\n".join(blocks)


def page() -> str:
    """The whole document."""
    rules = (inspect.getdoc(hookspecs) or "").split("\n\n")[-2:]
    lines, section = [INTRODUCTION, *(f"{rule}\n" for rule in rules)], ""
    for hook in hooks():
        if hook.section != section:
            section = hook.section
            lines += [f"## {section}\n"]
        code = f"```python\ndef {hook.signature}\n```\n"
        lines += [f"### {hook.name}\n", code, f"{hook.text}\n", example(hook.name)]
        lines += [f"Used by: {', '.join(hook.users)}.\n"]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE} is written\n")
