"""Jinja of tasks, rendered in a sandbox with limits: a task's file is data, whoever wrote it.

lm_eval renders ``doc_to_text`` and its kin in a plain environment, from which a template reaches Python. This one knows
the same filters and writes the same text, but reaches no attribute that begins with an underscore, and stops a template
that takes too long or writes too much. Operations and methods that would make one huge value are stopped beforehand:
no clock and no count of what is written interrupts them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import lm_eval.utils
from jinja2 import StrictUndefined, Template, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.nodes import Concat
from jinja2.runtime import Context
from jinja2.sandbox import SandboxedEnvironment

from posttrain.errors import reject
from posttrain.host.time_limit import time_limit

SECONDS = 5
SIZE = 10_000_000
"""Characters or elements that a template may make: beyond any prompt, and within any memory."""
BITS = 100_000
"""Bits of a number."""


class TooMuch(Exception):
    """A value of a template would be larger than SIZE."""


def _check(size: int, most: int = SIZE) -> None:
    if size > most:
        raise TooMuch(f"it makes more than {most:,} {'characters or elements' if most == SIZE else 'bits'}")


def _concat(parts: Iterable[str]) -> str:
    """Join what a template writes. Raises TooMuch beyond SIZE."""
    found, size = [], 0
    for part in parts:
        found.append(part)
        size += len(part)
        _check(size)
    return "".join(found)


class LimitedTemplate(Template):
    """A template whose faults are bad input, with the template and the reason."""

    written = ""
    """The template as its file has it."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        """Return the text. Raises BadInput when the template fails, takes too long or writes too much."""
        try:
            with time_limit(SECONDS):
                return _concat(self.root_render_func(self.new_context(dict(*args, **kwargs))))
        except TimeoutError:
            _reject(self.written, f"takes longer than {SECONDS} s")
        except (RecursionError, MemoryError):
            _reject(self.written, "calls itself without end, or makes too much")
        except Exception as error:  # whatever the methods of a value raise
            _reject(self.written, f"cannot be rendered: {str(error) or type(error).__name__}")


class _Generator(CodeGenerator):
    """Compiles ``a ~ b`` to a call that looks at the size first."""

    def visit_Concat(self, node: Concat, frame: Frame) -> None:  # noqa: N802 - the name is jinja2's
        self.write("environment.concat([str(environment.finalize(context, part)) for part in (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")])")


class Sandbox(SandboxedEnvironment):
    """lm_eval's environment of templates, in a sandbox whose values stay below SIZE."""

    template_class = LimitedTemplate
    code_generator_class = _Generator
    concat = staticmethod(_concat)
    intercepted_binops = frozenset(["*", "**", "%", "+"])

    def __init__(self) -> None:
        # Nothing is computed while a template is compiled: jinja2 ignores every exception there, a timeout too.
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True, optimized=False)
        self.filters["regex_replace"] = lm_eval.utils.regex_replace
        self.filters = {name: _limited(name, function) for name, function in self.filters.items()}
        self.policies["json.dumps_function"] = _dumps
        self.finalize = _shown
        self._templates = functools.lru_cache(maxsize=256)(self._read)

    def from_string(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        """Compile a template. Raises BadInput when it is no Jinja or takes too long to compile."""
        return self._templates(source)

    def _read(self, source: str) -> Any:
        try:
            with time_limit(SECONDS):
                template = super().from_string(source)
        except TimeoutError:
            _reject(source, f"takes longer than {SECONDS} s to be read")
        except Exception as error:  # the compiler raises more than its own errors: RecursionError, OverflowError
            _reject(source, f"cannot be read: {str(error) or type(error).__name__}")
        template.written = source  # type: ignore[attr-defined]
        return template

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute an operation, unless its result would be too large."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
            _check(bits, BITS)
        elif operator == "*":
            value, times = (left, right) if isinstance(right, int) else (right, left)
            _check(_size(value) * times if isinstance(times, int) else 0)
        elif operator == "+":
            _check(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str):
            _check(_formatted(left, right if isinstance(right, tuple) else (right,)))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        """Return the sandbox's own ``format``, unless what it writes would be too large."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> Any:
            _check(_formatted(value.__self__, [*args, *kwargs.values()]))
            return wrapped(*args, **kwargs)

        return formatted

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as in jinja2
        """Call a function or a method, unless it would make too much."""
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes | list | dict | set):
            _check(_estimate(__obj.__name__, owner, [*args, *kwargs.values()]))
        return super().call(__context, __obj, *args, **kwargs)


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that makes nothing too large; a filter that draws its input from an iterator is given a list."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        value = args[skipped]
        if name == "join":
            value = list(value)
            args = (*args[:skipped], value, *args[skipped + 1 :])
        _check(_estimate(name, value, [*args[skipped + 1 :], *kwargs.values()]))
        return function(*args, **kwargs)

    return limited


def _estimate(name: str, value: Any, given: list[Any]) -> int:
    """Return a bound of the characters or elements that a method or filter makes of ``value``."""
    texts = [len(text) for text in given if isinstance(text, str)]
    numbers = [abs(number) for number in given if isinstance(number, int)]
    widest, longest = max(numbers, default=0), max(texts, default=0)
    if name in ("center", "ljust", "rjust", "zfill", "batch", "slice", "truncate", "to_bytes"):
        return _size(value) + widest
    if name == "round":
        return widest * 1000
    if name in ("expandtabs", "indent", "wordwrap", "translate", "tojson"):
        return _size(value) + (str(value).count("\t" if name == "expandtabs" else "\n") + 1) * max(widest, longest)
    if name in ("replace", "regex_replace"):
        many = _size(value) + 1 if name == "regex_replace" else str(value).count(str(given[0])) if given else 0
        return _size(value) + many * (_size(given[1]) if len(given) > 1 else 0)
    if name == "join":
        items, separator = (value, longest) if not isinstance(value, str) else (given[0] if given else (), len(value))
        return sum(_size(item) + separator for item in items) if isinstance(items, list | tuple) else 0
    if name in ("format", "format_map"):
        return _formatted(str(value), given)
    return _size(value) + sum(map(_size, given))


def _formatted(text: str, given: Iterable[Any]) -> int:
    """Return a bound of the characters of a formatted text, whose widths are in the text or, by ``*``, among values."""
    widths = [int(digits[:20]) for digits in re.findall(r"\d+", text)]
    values = list(given)
    stars = [abs(value) for value in values if isinstance(value, int)] if "*" in text or "}}" in text else []
    fields = text.count("%") + text.count("{")
    return len(text) + fields * max(map(_size, values), default=0) + sum(widths) + sum(stars)


@pass_context
def _shown(context: Context | None, value: Any) -> Any:
    """Return a value that is about to become text. Raises TooMuch when the text would be too long."""
    if not isinstance(value, str):
        _check(_size(value))
    return value


def _dumps(value: Any, **options: Any) -> str:
    """Return JSON. Raises TooMuch when it would be too long."""
    return json.dumps(_shown(None, value), **options)


def _size(value: Any) -> int:
    """Return the characters and elements of a value, those of its elements included; more than SIZE is not counted."""
    if isinstance(value, dict):
        return _size([*value, *value.values()])
    if not isinstance(value, list | tuple | set):
        return len(value) if isinstance(value, str | bytes | range) else 0
    total = len(value)
    for item in value:
        if total > SIZE:
            break
        total += _size(item)
    return total


def _reject(template: str, what: str) -> NoReturn:
    shown = template if len(template) <= 60 else f"{template[:57]}..."
    reject(f"template {shown!r}", what, "Mend the template in the task's file")


def install() -> None:
    """Make lm_eval render every template in the sandbox."""
    if not isinstance(lm_eval.utils.env, Sandbox):
        lm_eval.utils.env = Sandbox()
