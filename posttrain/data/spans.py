r"""Where the answers stand in the text of a chat template, proven for every turn.

A template is a program, so what it writes is taken from what it renders, never guessed from its source:

    prompt = the turns before the answer, with the generation prompt   what inference shows the model
    asked  = the turns up to the answer                                begins with prompt, or it is refused
    text   = all turns                                                 what is trained

    asked:  <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n | Hello<|im_end|> | \n
                                                              prompt end     stop end

The span between the bars is trained: what the model has to write itself when it is given the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

from jinja2 import TemplateError

from posttrain.data.records import Message
from posttrain.data.turns import refuse

_SENTINELS = ("qjxzv", "wkvyb")
"""Two answers that stand in for the real one, to see where the template puts an answer."""

_MARKER = re.compile(r"(\{%-?\s*(?:end)?generation\s*(-?)%\})\n?")
"""The tags ``{% generation %}`` and ``{% endgeneration %}``, with the line end that templates drop behind a tag."""

_VISIBLE = "\ue000"
"""What a generation marker is made to write, to see where it stands."""

_OTHER_TEMPLATE = "Use another chat template: model.chat_template=FILE"


@dataclass(frozen=True, slots=True)
class Answer:
    """One trained span of a rendered text, in characters."""

    turn: int
    """Which message it is, counted from 1."""
    start: int
    """Where the model begins to write."""
    content: int
    """Where the content of the message begins."""
    end: int
    """Behind the stop token."""


class Template:
    """The chat template of a tokenizer, with the spans of the answers in what it renders."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        source: str = tokenizer.get_chat_template()
        self._visible = _MARKER.sub(_make_visible, source)
        self._marked = self._visible != source
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        longest_first = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
        self.control = re.compile(longest_first or "(?!)")
        """Matches the special tokens of the tokenizer."""

    def render(
        self, messages: Sequence[Message], where: str, *, prompt: bool = False, template: str | None = None
    ) -> str:
        """The text of ``messages``; with ``prompt`` followed by the generation prompt."""
        options = {"tokenize": False, "add_generation_prompt": prompt, "chat_template": template}
        try:
            return str(self._tokenizer.apply_chat_template([dict(message) for message in messages], **options))
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            refuse(where, f"the chat template refuses the conversation: {error}", _OTHER_TEMPLATE)

    def check(self, messages: Sequence[Message], text: str, where: str) -> None:
        """Refuse contents that hold special tokens, and templates that leave out what was said."""
        for turn, message in enumerate(messages, start=1):
            forged = self.control.search(message["content"])
            if forged:
                what = f"turn {turn} ({message['role']}) holds the special token {forged[0]!r}"
                refuse(where, f"{what}, which would fake an end of turn or a header", "Remove or rewrite the record")
            if message["role"] in ("system", "user") and message["content"].strip() not in text:
                what = f"the chat template leaves out or rewrites turn {turn} ({message['role']})"
                refuse(where, what, _OTHER_TEMPLATE)

    def answer(self, messages: Sequence[Message], index: int, text: str, where: str) -> Answer:
        """The trained span of ``messages[index]`` in ``text``, which is the rendering of all ``messages``.

        Raises:
            BadInput: The span cannot be proven, or is written differently when the turn is the last one.
        """
        told = messages[: index + 1]
        asked = text if len(told) == len(messages) else self.render(told, where)
        answer = self._last(told, asked, where)
        if text.startswith(asked[: answer.end]):
            return answer
        content = self._by_difference(messages, index, text, where)
        moved = 0 if content is None else content - answer.content
        start, end = answer.start + moved, answer.end + moved
        if content is None or start < 0 or text[start:end] != asked[answer.start : answer.end]:
            _unproven(where, answer.turn, "the template writes it differently once other turns follow")
        return Answer(answer.turn, start, content, end)

    def _last(self, messages: Sequence[Message], text: str, where: str) -> Answer:
        """The span of the last message in ``text``, the rendering of ``messages``."""
        turn, core = len(messages), messages[-1]["content"].strip()
        prompt, bare = (self.render(messages[:-1], where, prompt=add) for add in (True, False))
        if not text.startswith(prompt):
            _unproven(where, turn, "the template does not begin it with its own generation prompt")
        before = _shared_length(bare, prompt)
        answer = self._verbatim(text, before, len(prompt), core, turn)
        answer = answer or self._behind_lead(messages, text, len(prompt), where)
        stop = text[answer.content + len(core) : answer.end].strip()
        if prompt.rstrip().endswith(stop):
            _unproven(where, turn, f"{stop} follows its content, but opens answers and cannot end them")
        return self._as_marked(messages, text, before, answer, where) if self._marked else answer

    def _verbatim(self, text: str, before: int, start: int, core: str, turn: int) -> Answer | None:
        """The span if nothing but the content and its stop token follow the prompt.

        The content may begin inside the generation prompt, which starts behind ``before``: templates of thinking
        models open the block of thoughts there, and the model goes on from it.
        """
        inside = text.find(core, before, start + len(core) - 1)
        for content in (_skip_space(text, start), inside):
            if content < 0 or not text.startswith(core, content) or content + len(core) <= start:
                continue
            if end := self._stop(text, content + len(core)):
                return Answer(turn, start, content, end)
        return None

    def _behind_lead(self, messages: Sequence[Message], text: str, start: int, where: str) -> Answer:
        """The span if the template itself begins the answer, as with an empty block of thoughts."""
        turn, core = len(messages), messages[-1]["content"].strip()
        content = self._by_difference(messages, turn - 1, text, where)
        if content is None or content < start:
            _unproven(where, turn, "its content does not stand in the text as it is")
        lead = text[start:content]
        if lead.strip() and lead != self._lead:
            _unproven(where, turn, f"{_short(lead)} stands between the generation prompt and its content")
        end = self._stop(text, content + len(core))
        if end is None:
            rest = _short(text[content + len(core) :].lstrip()) or "the end of the text"
            _unproven(where, turn, f"no stop token of the tokenizer follows its content, but {rest}")
        return Answer(turn, start, content, end)

    def _by_difference(self, messages: Sequence[Message], index: int, text: str, where: str) -> int | None:
        """Where the content of ``messages[index]`` begins: behind what stays the same whatever it says."""
        one, other = (
            self.render([*messages[:index], {**messages[index], "content": sentinel}, *messages[index + 1 :]], where)
            for sentinel in _SENTINELS
        )
        before = _before_sentinel(one, other)
        if before is None or not text.startswith(before):
            return None
        content = _skip_space(text, len(before))
        return content if text.startswith(messages[index]["content"].strip(), content) else None

    @cached_property
    def _lead(self) -> str:
        """What the template writes between generation prompt and answer, the same in every conversation.

        Empty for a template without generation prompt, whose header the model would never be shown.
        """
        asked = [{"role": "user", "content": "x"}]
        prompt, bare = (self.render(asked, "model", prompt=add) for add in (True, False))
        one, other = (
            self.render([*asked, {"role": "assistant", "content": sentinel}], "model") for sentinel in _SENTINELS
        )
        before = _before_sentinel(one, other) or ""
        return before[len(prompt) :] if prompt != bare and before.startswith(prompt) else ""

    def _stop(self, text: str, content_end: int) -> int | None:
        """The end of the stop token that follows the content, whitespace between them allowed.

        Some templates close the answer with one special token before that of the turn: all up to the end of
        sequence are part of it.
        """
        ends, place = [], _skip_space(text, content_end)
        while token := self.control.match(text, place):
            place = token.end()
            ends.append(place)
            if token[0] == self._tokenizer.eos_token:
                return place
        return ends[0] if ends else None

    def _as_marked(self, messages: Sequence[Message], text: str, before: int, answer: Answer, where: str) -> Answer:
        """The span that the template's generation markers give, from the generation prompt to the stop token.

        Markers may take in the generation prompt, which starts behind ``before``, but no other turn.
        """
        pieces = self.render(messages, where, template=self._visible).split(_VISIBLE)
        answers = sum(message["role"] == "assistant" for message in messages)
        if len(pieces) != 2 * answers + 1 or "".join(pieces) != text:
            _unproven(where, answer.turn, "the template does not mark every assistant turn once with {% generation %}")
        start, end = len(text) - len(pieces[-1]) - len(pieces[-2]), len(text) - len(pieces[-1])
        content_end = answer.content + len(messages[-1]["content"].strip())
        latest = max(answer.start, answer.content)
        if not (before <= start <= latest and content_end <= end <= _skip_space(text, answer.end)):
            _unproven(where, answer.turn, f"{{% generation %}} marks {_short(text[start:end])} in its place")
        return replace(answer, start=max(start, answer.start))


def _make_visible(tag: re.Match[str]) -> str:
    return tag[1] + f"{{{{ '{_VISIBLE}' {tag[2]}}}}}"


def _before_sentinel(one: str, other: str) -> str | None:
    """What both texts hold before their sentinel, or None if they do not hold it in the same place."""
    before, found, _ = one.partition(_SENTINELS[0])
    return before if found and other.startswith(before + _SENTINELS[1]) else None


def _shared_length(one: str, other: str) -> int:
    if other.startswith(one):
        return len(one)
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start].isspace():
        start += 1
    return start


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...") if text else ""


def _unproven(where: str, turn: int, why: str) -> NoReturn:
    refuse(where, f"the mask for turn {turn} cannot be proven: {why}", _OTHER_TEMPLATE)
