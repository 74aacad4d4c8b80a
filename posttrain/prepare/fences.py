"""Code fences of Markdown in answers: those left open, and Python and JSON that do not parse."""

from __future__ import annotations

import ast
import json
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PYTHON = ("python", "py", "python3")
LONGEST = 50_000
"""Characters of the longest fence that is parsed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """One fence."""

    language: str
    """First word behind its opening marks, in lower case."""
    content: str
    """Its lines."""
    is_open: bool
    """True when the text ends inside it."""


def fences(text: str) -> Sequence[Fence]:
    """Return the fences of a text: three or more backticks or tildes until as many of the same or the end."""
    return list(_fences(text)) if "```" in text or "~~~" in text else []


def _fences(text: str) -> Iterator[Fence]:
    mark, language, lines = "", "", list[str]()
    for line in text.splitlines():
        bare = line.strip()
        if not mark:
            if bare.startswith(("```", "~~~")) and not bare.strip(bare[0]).count("`"):
                mark = bare[: len(bare) - len(bare.lstrip(bare[0]))]
                language, lines = (bare.lstrip(bare[0]).split() or [""])[0].lower(), []
        elif bare.startswith(mark) and not bare.strip(mark[0]):
            yield Fence(language=language, content="\n".join(lines), is_open=False)
            mark = ""
        else:
            lines.append(line)
    if mark:
        yield Fence(language=language, content="\n".join(lines), is_open=True)


def fault_of(fence: Fence, languages: Sequence[str]) -> str:
    """Return why a closed fence in one of the languages, Python or JSON, does not parse; empty when it does."""
    content = textwrap.dedent(fence.content)
    if fence.language not in languages or fence.is_open or not content.strip() or len(content) > LONGEST:
        return ""
    if content.lstrip().startswith(">>>") or "..." in content:  # a session, or an excerpt that says so
        return ""
    try:
        with warnings.catch_warnings(action="ignore"):
            json.loads(content) if "json" in languages else ast.parse(content)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError | json.JSONDecodeError) else type(error).__name__
        line = getattr(error, "lineno", None)
        return f"{reason}, line {line}: {_line(content, line)}"
    return ""


def _line(content: str, number: int | None) -> str:
    lines = content.splitlines()
    return lines[number - 1].strip() if number is not None and 0 < number <= len(lines) else ""
