"""The texts of all beginnings of a conversation, from one rendering of the whole.

    messages     m0        m1        m2
    text         | t0      | t1      | t2      | closing
    cuts         0         1         2         3           where the template asks for the next message

Most templates write the messages one by one, in their order, and then the generation prompt or nothing. Such a template
writes the beginning ``m0 m1`` as ``t0 t1`` and the closing. Whether it does is not believed but watched: the messages
tell when they are asked for, and the source has no memory from one to the next. For any other template there is no
history, and every beginning is rendered by itself.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import is_
from typing import Any

from posttrain.chat_template import pinned_source, render_pinned
from posttrain.data.records import Message

STATE = ("namespace", "cycler", "joiner")
"""Functions of a template for what outlives a turn of a loop."""
BACKWARD = ("first", "index", "index0", "previtem")
"""What a loop knows without a look at the next message."""
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


class LooksAheadError(Exception):
    """The template asks for a message before it has written those before it."""


@dataclass(frozen=True, slots=True)
class History:
    """The texts of a conversation's beginnings."""

    messages: Sequence[Message]
    text: str
    cuts: Sequence[int]
    """The end of each message in ``text``; the first one is where the first begins."""
    prompt: str
    """What follows in place of the closing to ask for an answer."""

    def find(self, messages: Sequence[Message], *, prompt: bool) -> str | None:
        """Return the text of ``messages``; None unless they are a beginning of the conversation."""
        count = len(messages)
        if not 0 < count <= len(self.messages):
            return None
        if not all(map(is_, messages, self.messages)):
            return None
        return self.text[: self.cuts[count]] + (self.prompt if prompt else self.text[self.cuts[-1] :])


@dataclass
class Output:
    """A text in the making, and the place in it at which each message was asked for."""

    pieces: list[str] = field(default_factory=list)
    size: int = 0
    cuts: list[int] = field(default_factory=list)
    ended: bool = False

    def write(self, piece: str) -> None:
        """Add a piece of text."""
        self.pieces.append(piece)
        self.size += len(piece)


class Watched(Sequence[Any]):
    """The messages as a template sees them, from ``first`` on; raises LooksAheadError for a look at a later one."""

    def __init__(self, messages: Sequence[Any], output: Output, first: int = 0) -> None:
        self._messages, self._output, self._first = messages, output, first

    def __iter__(self) -> Iterator[Any]:
        output = self._output
        if output.cuts:
            raise LooksAheadError  # a second loop sees what follows
        output.cuts += [output.size] * (self._first + 1)
        for number in range(self._first, len(self._messages)):
            if number > self._first:
                if output.size == output.cuts[-1]:
                    raise LooksAheadError  # nothing was written of the message before
                output.cuts.append(output.size)
            yield self._messages[number]
        output.cuts.append(output.size)
        output.ended = True

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice) and place.stop is place.step is None and isinstance(place.start, int):
            if place.start < 0 or self._output.cuts:
                raise LooksAheadError
            return Watched(self._messages, self._output, self._first + place.start)
        seen = max(len(self._output.cuts) - 1, 0)
        if isinstance(place, int) and place >= 0 and self._first + place <= seen and not self._output.ended:
            return self._messages[self._first + place]
        raise LooksAheadError

    def __len__(self) -> int:
        raise LooksAheadError

    def __bool__(self) -> bool:
        raise LooksAheadError

    def __eq__(self, other: object) -> bool:
        raise LooksAheadError

    __hash__ = None  # type: ignore[assignment]


class Historian:
    """Renders conversations so that their beginnings are known, where the template permits it."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import PreTrainedTokenizerBase
        from transformers.utils import chat_template_utils

        self.proven: set[str] = set()
        """Generation prompts that the tokenizer itself was seen to write."""
        self._template: Any = None
        pinned = vars(tokenizer).get("apply_chat_template")
        plain = type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
        source: str = tokenizer.get_chat_template()
        compile_template = getattr(chat_template_utils, "_compile_jinja_template", None)
        if not plain or compile_template is None or not _is_memoryless(source):
            return
        variables: Mapping[str, Any] = {}
        if pinned is not None:
            if not (isinstance(pinned, functools.partial) and pinned.func is render_pinned):
                return
            variables = pinned.args[1]
            source = pinned_source(source, variables)
        self._template, self._variables = compile_template(source), {**tokenizer.special_tokens_map, **variables}

    def follow(self, messages: Sequence[Message], shown: Sequence[Message], tools: Any, text: str) -> History | None:
        """Return the history of ``messages``, whose rendering is ``text``; None where the template permits none.

        ``shown`` are the messages as the template gets them.
        """
        if self._template is None:
            return None
        output = Output()
        given = [{key: value for key, value in message.items() if value is not None} for message in shown]
        try:
            for piece in self._template.generate(
                messages=Watched(given, output), tools=tools, documents=None, add_generation_prompt=True,
                **self._variables,
            ):  # fmt: skip
                output.write(piece)
        except TimeoutError:
            raise
        except Exception:  # of any kind that a program may raise: then there is no history
            return None
        written = "".join(output.pieces)
        if not output.ended or len(output.cuts) != len(messages) + 1 or not _grows(output.cuts):
            return None
        end = output.cuts[-1]
        if written[:end] != text[:end]:
            return None
        return History(messages, text, output.cuts, written[end:])


def _grows(cuts: Sequence[int]) -> bool:
    return all(one < other for one, other in pairwise(cuts[1:]))


def _is_memoryless(source: str) -> bool:
    """Return whether nothing in a template outlives a turn of a loop, and no loop looks ahead."""
    from jinja2 import Environment, TemplateSyntaxError, nodes
    from jinja2.ext import loopcontrols

    try:
        tree = Environment(extensions=[loopcontrols]).parse(_GENERATION.sub("", source))
    except (TemplateSyntaxError, RecursionError):
        return False
    if tree.find(nodes.NSRef) or any(name.name in STATE for name in tree.find_all(nodes.Name)):
        return False
    backward = sum(
        isinstance(each.node, nodes.Name) and each.node.name == "loop" and each.attr in BACKWARD
        for each in tree.find_all(nodes.Getattr)
    )
    return backward == sum(name.name == "loop" for name in tree.find_all(nodes.Name))
