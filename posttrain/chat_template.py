"""Chat templates: pinned in every artifact with their variables, read as they are, compared line by line."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

from posttrain.errors import ArtifactDamaged, Problem, suggest

TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
DATE = "date"
"""The variable for the day that a template prints by CLOCK."""
CLOCK = "strftime_now"
"""The function by which a template asks for the present time."""
SET_BY_US = (
    CLOCK, "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "raise_exception",
    "namespace", "dict", "range", "cycler", "joiner", "lipsum",
)  # fmt: skip
"""Variables that differ by conversation, and functions."""
DIRECTIVES = [f"%{flag}{letter}" for flag in ("", "-") for letter in "aAbBcCdDeFgGhHIjmMnpPrRsSTuUVwWxXyYzZf"]
"""What strftime replaces in a format."""

_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""Tags of transformers alone, unknown to Jinja."""


def template_digest(template: str) -> str:
    """Return the SHA-256 of a chat template."""
    return hashlib.sha256(template.encode()).hexdigest()


def variables_of(template: str) -> frozenset[str]:
    """Return the variables that a template reads, and ``date`` when it prints the present day.

    Empty when it cannot be parsed: rendering will say so.
    """
    from jinja2 import Environment, TemplateSyntaxError, pass_context
    from jinja2.ext import loopcontrols
    from jinja2.meta import TrackingCodeGenerator

    # Nothing of the template is computed: with a finalize of the context and no optimizer, Jinja folds no constants.
    environment = Environment(extensions=[loopcontrols], finalize=pass_context(lambda _, value: value))
    generator = TrackingCodeGenerator(environment)
    generator.optimizer = None
    try:
        generator.visit(environment.parse(_GENERATION.sub("", template)))
        read = generator.undeclared_identifiers
    except (TemplateSyntaxError, RecursionError):
        return frozenset()
    settable = {name for name in read if name not in SET_BY_US and not name.endswith("_token")}
    return frozenset(settable | {DATE} if CLOCK in read else settable)


def variable_problems(given: Mapping[str, Any], template: str) -> list[Problem]:
    """Return what is wrong with the variables given for a template."""
    known = variables_of(template)
    problems = [
        Problem(where=f"model.template_variables.{name}", what="the chat template does not read it",
                fix=suggest(name, known) if known else "The template reads no variable: leave it out")
        for name in given if name not in known
    ]  # fmt: skip
    for name, value in given.items():
        if not _is_plain(value):
            what = f"{value!r} is no text, number, true, false, null or list of these"
            problems.append(Problem(where=f"model.template_variables.{name}", what=what))
    if DATE in given and CLOCK in template and not _is_day(given[DATE]):
        what = f"{given[DATE]!r} is no day"
        problems.append(Problem(where=f"model.template_variables.{DATE}", what=what, fix="Write it as 2026-01-31"))
    return problems


def today() -> str:
    """Return the present day, as 2026-01-31."""
    return date.today().isoformat()


def render_pinned(apply: Callable[..., Any], variables: Mapping[str, Any], conversation: Any, **options: Any) -> Any:
    """Return what a tokenizer's ``apply_chat_template`` makes of a conversation, with the variables pinned.

    The clock of the template stands at midnight of the variable ``date``.
    """
    template = options.pop("chat_template", None) or apply.__self__.chat_template  # type: ignore[attr-defined]
    return apply(conversation, chat_template=pinned_source(template, variables), **{**variables, **options})


def pinned_source(template: str, variables: Mapping[str, Any]) -> str:
    """Return a template whose clock stands at midnight of the variable ``date``, if it has the two."""
    if CLOCK in template and _is_day(variables.get(DATE)):
        return _stopped_clock(variables[DATE]) + template
    return template


def _stopped_clock(day: str) -> str:
    """Return a macro in place of the function that tells the time: transformers passes no function to a template."""
    midnight = datetime.fromisoformat(day)
    written = "".join(f" | replace({each!r}, {midnight.strftime(each)!r})" for each in DIRECTIVES)
    parts = (
        f'{{% for part in format.split("%%") %}}{{{{ "%" if not loop.first }}}}{{{{ part{written} }}}}{{% endfor %}}'
    )
    # The line end belongs to the last tag, as Jinja trims it: the template begins at a line of its own, as it is.
    return f"{{% macro {CLOCK}(format) %}}{parts}{{% endmacro %}}\n"


def check_template(folder: Path, pinned: str) -> None:
    """Raise ArtifactDamaged with the difference when a chat template in ``folder`` is not the ``pinned`` one."""
    found = {folder / TEMPLATE: _read_text(folder / TEMPLATE)}
    if (inside := template_in_config(folder / TOKENIZER_CONFIG)) is not None:
        found[folder / TOKENIZER_CONFIG] = inside
    for path, template in found.items():
        if template != pinned:
            raise ArtifactDamaged(f"{path} is not the pinned chat template:\n{template_diff(pinned, template)}")


def template_diff(pinned: str, found: str) -> str:
    """Return the unified diff from the pinned chat template to the found one."""
    lines = difflib.unified_diff(pinned.splitlines(), found.splitlines(), "pinned", "found", lineterm="")
    return "\n".join(lines) or "they differ only in their line ends"


def template_in_config(path: Path) -> str | None:
    """Return the chat template in a tokenizer_config.json: its text, or the ``default`` of several named ones.

    None when it has none. Raises ArtifactDamaged when the file cannot be parsed.
    """
    if not path.exists():
        return None
    try:
        template = json.loads(_read_text(path)).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise ArtifactDamaged(f"{path} is damaged: {error}") from None
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _is_day(value: Any) -> bool:
    if not isinstance(value, str) or not re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        return False
    try:
        date.fromisoformat(value)
    except ValueError:
        return False
    return True


def _is_plain(value: Any) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | bool | int | float)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # not read_text(): it would change the line ends, and so the digest
    except FileNotFoundError:
        raise ArtifactDamaged(f"{path} is missing") from None
    except UnicodeDecodeError as error:
        raise ArtifactDamaged(f"{path} is damaged: {error}") from None
