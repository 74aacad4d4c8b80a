"""Writes docs/api.md from the public names of posttrain, their docstrings and their fields: ``make docs``."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any

import posttrain
from posttrain.config.help import docstrings

PAGE = Path(__file__).with_suffix(".md")
INTRODUCTION = """\
# The API

Written by `make docs` from the docstrings. A plugin imports these names from `posttrain`, and nothing below it; its
tests also import `posttrain.testing`. [The hooks](hooks.md) take and return these types.
"""
SECTIONS = ("Types", "Choices", "Errors", "Functions", "Names")


def section(item: Any) -> str:
    """Return the section that a public name belongs to."""
    if not isinstance(item, type):
        return "Functions" if inspect.isfunction(item) else "Names"
    if issubclass(item, Exception):
        return "Errors"
    return "Choices" if issubclass(item, Enum) else "Types"


def entry(name: str) -> str:
    """Return the paragraphs about a public name."""
    item = getattr(posttrain, name)
    kind = section(item)
    blocks = [f"### {name}", assigned_docstring(name) if kind == "Names" else inspect.getdoc(item) or ""]
    if kind == "Types":
        blocks += [field_table(item)] if is_dataclass(item) else []
        blocks.append("\n".join(f"- `{signature(method)}`: {first_line(method)}" for method in methods(item)))
    elif kind == "Choices":
        blocks.append("One of " + ", ".join(f"`{choice.value}`" for choice in item) + ".")
    elif kind == "Errors":
        blocks.append(f"Exit code {item.exit_code}.")
    elif kind == "Functions":
        blocks.insert(1, f"```python\ndef {signature(item)}\n```")
    return "\n\n".join(filter(None, blocks)) + "\n"


def field_table(kind: type) -> str:
    """Return the fields of a dataclass as a table."""
    texts = docstrings(kind)
    rows = [
        f"| `{field.name}` | `{written_type(field)}` | {'' if required(field) else 'optional'} | {texts[field.name]} |"
        for field in fields(kind)
    ]
    return "\n".join(["| Field | Type | | Meaning |", "|---|---|---|---|", *rows])


def written_type(field: Field[Any]) -> str:
    """Return the type as it is written, ready for a cell of a table."""
    written = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    return written.replace("|", "\\|")


def required(field: Field[Any]) -> bool:
    """Return True for a field without a default, and for a setting that the recipe must give."""
    given = field.default is not MISSING or field.default_factory is not MISSING
    return not given or field.default == posttrain.MISSING


def methods(kind: type) -> Iterator[Any]:
    """Yield the public methods and properties that a class defines itself."""
    for name, item in vars(kind).items():
        function = getattr(item, "__func__", item)
        if not name.startswith("_") and (inspect.isfunction(function) or isinstance(item, property)):
            yield function


def signature(function: Any) -> str:
    """Return a function's head in one line, without ``self``; of a property the name and type."""
    source = inspect.getsource(function.fget if isinstance(function, property) else function)
    (node,) = ast.parse(textwrap.dedent(source)).body
    assert isinstance(node, ast.FunctionDef)
    node.args.args = [argument for argument in node.args.args if argument.arg not in ("self", "cls")]
    result = ast.unparse(node.returns) if node.returns else "Any"
    if isinstance(function, property):
        return f"{node.name}: {result}"
    return f"{node.name}({ast.unparse(node.args)}) -> {result}"


def first_line(function: Any) -> str:
    """Return the first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())


def assigned_docstring(name: str) -> str:
    """Return the value of a name that is assigned, and the docstring below the assignment."""
    home = next((module for module, names in posttrain.HOMES.items() if name in names), "posttrain.version")
    module = importlib.import_module(home)
    for source in (module, *sources(module)):
        for statement, following in pairwise([*ast.parse(inspect.getsource(source)).body, ast.Pass()]):
            if assigned(statement) == name:
                text = following.value if isinstance(following, ast.Expr) else None
                documented = isinstance(text, ast.Constant) and isinstance(text.value, str)
                shown = name if name == "__version__" else ast.unparse(statement)  # a release leaves the page as it is
                return f"`{shown}`" + (f"\n\n{inspect.cleandoc(text.value)}" if documented else "")
    raise LookupError(f"{home} assigns no {name}")


def assigned(statement: ast.stmt) -> str | None:
    """Return the name that a statement assigns to; None for any other statement."""
    if isinstance(statement, ast.Assign):
        target = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign):
        target = statement.target
    else:
        return None
    return target.id if isinstance(target, ast.Name) else None


def sources(module: Any) -> Iterator[Any]:
    """Yield the modules of posttrain that a module imports names from."""
    for statement in ast.parse(inspect.getsource(module)).body:
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("posttrain."):
            yield importlib.import_module(str(statement.module))


def page() -> str:
    """Return the whole document."""
    lines = [INTRODUCTION]
    for title in SECTIONS:
        names = [name for name in posttrain.__all__ if section(getattr(posttrain, name)) == title]
        lines += [f"## {title}\n", *map(entry, names)]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE} is written\n")
