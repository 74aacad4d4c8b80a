"""Help for settings: the docstrings under the fields of their dataclasses."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Enum
from itertools import pairwise
from typing import Any

from posttrain.config.schema import variant_rates


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting as help shows it."""

    name: str
    type: str
    default: str
    help: str


def settings(kind: type, prefix: str = "") -> list[Setting]:
    """Return the settings of a dataclass in the order of their definition, nested ones by dotted name."""
    texts = docstrings(kind)
    rows = []
    for field in fields(kind):
        default = _default(field)
        if is_dataclass(default) and not isinstance(default, type):
            rows += settings(type(default), f"{prefix}{field.name}.")
        else:
            shown = default.value if isinstance(default, Enum) else default
            rows.append(
                Setting(name=f"{prefix}{field.name}", type=_type(field), default=_shown(shown), help=texts[field.name])
            )
    return rows


def docstrings(kind: type) -> dict[str, str]:
    """Return the docstring under each field, inherited ones included; empty for a field without one."""
    texts = {field.name: "" for field in fields(kind)}
    for cls in reversed([c for c in kind.__mro__ if is_dataclass(c)]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for statement, following in pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = following.value if isinstance(following, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    texts[statement.target.id] = " ".join(text.value.split())
    return texts


def _type(field: Field[Any]) -> str:
    """Return the type as it is written: a text with postponed annotations, else a class."""
    return field.type.__name__ if isinstance(field.type, type) else str(field.type)


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _shown(default: Any) -> str:
    if default == "???":
        return "(must be given)"
    if rates := variant_rates(default):
        return f"{rates[0]}, with variant=full {rates[1]}"
    return "null" if default is None else str(default)
