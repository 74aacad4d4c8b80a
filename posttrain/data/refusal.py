"""How a record is refused."""

from __future__ import annotations

from typing import Any, NoReturn

from posttrain.errors import BadInput, Problem


def refuse(where: str, what: str, fix: str = "") -> NoReturn:
    """Raise BadInput with one problem."""
    raise BadInput(Problem(where=where, what=what, fix=fix))


def shown(value: Any) -> str:
    """The value for an error, shortened to 40 characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
