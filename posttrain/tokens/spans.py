r"""The spans of the answers in the text of a chat template, proven for every turn.

A template is a program. Its source tells nothing for sure, so every span is proven by comparing renderings of the
same conversation with one known difference:

    bare   = the turns before the answer               its end is where the generation prompt begins
    prompt = the same with the generation prompt       the input of the model at inference
    asked  = the turns up to the answer                must begin with prompt, else the record is rejected
    text   = all turns                                 the training text

    asked:  <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n | Hello<|im_end|> | \n
                                                              prompt end     stop end

The span between the bars is trained: the model must write it itself after the prompt. Calls of tools have no fixed
form in a template; their span must equal the one in a conversation of nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

from posttrain.data.calls import (
    called_functions,
    core_of,
    disguise_calls,
    is_written,
    occurs_in,
    tool_names,
    with_content,
    words,
)  # fmt: skip
from posttrain.data.records import Conversation, Message
from posttrain.errors import reject
from posttrain.tokens.texts import OTHER_TEMPLATE, ChatTexts

_SHORT = 16
"""Contents of fewer characters occur in any text by chance, so finding them proves nothing."""

_SENTINELS = ("qjxzv", "wkvyb")
"""Two contents in place of the real one, to see where the template puts it.

Searching for the real content can hit an earlier copy, such as a quote in the question. These two occur nowhere else,
and there are two because the text before them must be the same: a prefix dependent on the content is no proof.
"""

_MARKER = re.compile(r"(\{%-?\s*(?:end)?generation\s*(-?)%\})\n?")
"""The tags ``{% generation %}`` and ``{% endgeneration %}``, with the line end dropped by Jinja."""

_VISIBLE = "\ue000"
"""A private-use character that generation markers are made to write, to see their places."""

_QUESTION = {"role": "user", "content": "x"}
"""The shortest conversation before an answer, to see the text independent of the conversation."""

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""The keys of thoughts before the content."""

_END_OF_THOUGHT = "</think>"

_NOT_ALL = "Make a row of each answer (train_on=each), train the last one only (train_on=last), or mark it train: false"


@dataclass(frozen=True, slots=True)
class AnswerSpan:
    """One trained span of a rendered text, in characters."""

    turn: int
    """Number of the message, from 1."""
    start: int
    """The end of the generation prompt: the model begins to write here."""
    content: int
    """The beginning of the content, or of the name of the first function called."""
    content_end: int
    """Its end; only whitespace separates it from the stop token."""
    end: int
    """The end of the stop token."""


class Template:
    """The chat template of a tokenizer, with the spans of the answers in its texts."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        source: str = tokenizer.get_chat_template()
        texts = ChatTexts(tokenizer)
        self.adapt, self.render, self.following = texts.adapt, texts.render, texts.following
        self._visible = _MARKER.sub(_make_visible, source)
        self._marked = self._visible != source
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        longest_first = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
        self.control = re.compile(longest_first or "(?!)")
        """The pattern of the tokenizer's special tokens."""

    def check(self, chat: Conversation, text: str) -> None:
        """Raise BadInput for special tokens in a record, and for a template without a content or the tools."""
        bos = self._tokenizer.bos_token
        if bos and text.startswith(2 * bos):
            reject(chat.where, f"the chat template begins with {bos} twice", OTHER_TEMPLATE)
        for turn, message in enumerate(chat.messages, start=1):
            self._check_special(message, f"turn {turn} ({message['role']})", chat.where)
            if not is_written(message, text) or not self._has_own_place(chat, turn - 1):
                what = f"the chat template leaves out or rewrites turn {turn} ({message['role']})"
                reject(chat.where, what, OTHER_TEMPLATE)
        if chat.tools:
            self._check_special(chat.tools, "tools", chat.where)
            offer = self.render(replace(chat, messages=(_QUESTION,)))
            if not all(name in offer for name in tool_names(chat.tools)):
                reject(chat.where, "the chat template leaves out the tools", OTHER_TEMPLATE)

    def _has_own_place(self, chat: Conversation, index: int) -> bool:
        """Return whether turn ``index`` is written at a place of its own.

        Finding a content in the text proves it for long ones. Two neighbours of one role may be merged or one of them
        dropped, and a short content occurs by chance: these are rendered with a sentinel as content.
        """
        message = chat.messages[index]
        beside = (*chat.messages[max(0, index - 1) : index], *chat.messages[index + 1 : index + 2])
        alone = all(other["role"] != message["role"] for other in beside)
        if message["role"] == "assistant" or (
            alone and (message["role"] == "tool" or len(message["content"]) >= _SHORT)
        ):
            return True
        changed = (*chat.messages[:index], with_content(message, _SENTINELS[0]), *chat.messages[index + 1 :])
        return _SENTINELS[0] in self.render(replace(chat, messages=changed))

    def _check_special(self, value: Any, name: str, where: str) -> None:
        for text in words(value):
            if forged := self.control.search(str(text)):
                what = f"{name} holds the special token {forged[0]!r}, which would fake an end of turn or a header"
                reject(where, what, "Remove or rewrite the record")

    def find_answer(self, chat: Conversation, index: int, text: str) -> AnswerSpan:
        """Return the trained span of turn ``index`` (from 0) in ``text``, the rendering of the whole chat.

        Raises:
            BadInput: The span cannot be proven, or the turn is written differently when it is the last one.
        """
        # Inference sees every answer as the last turn, so that rendering defines the span. Some templates write a
        # turn differently once others follow, without its thoughts for example: the model would be trained on one
        # text and asked for another. So the same characters must occur in the text of the whole chat.
        history = replace(chat, messages=chat.messages[: index + 1])
        asked = text if history.messages == chat.messages else self.render(history)
        answer = self._find_last(history, asked)
        if text.startswith(asked[: answer.end]):
            return answer
        # The text before the span may differ: then the sentinels find the content, and the span moves with it.
        content = self._find_content(chat, index, text)
        moved = 0 if content is None else content - answer.content
        start, end = answer.start + moved, answer.end + moved
        if content is None or start < 0 or text[start:end] != asked[answer.start : answer.end]:
            why = "the template writes it differently once other turns follow"
            _reject_span(chat.where, answer.turn, why, _NOT_ALL)
        self._require_opening(chat, index, text, moved)
        return replace(answer, start=start, content=content, content_end=answer.content_end + moved, end=end)

    def _require_opening(self, chat: Conversation, index: int, text: str, moved: int) -> None:
        """Raise BadInput unless the generation prompt of turn ``index`` stands before it in ``text``, ``moved`` on.

        Templates with thoughts switched off close an empty block of them there, and leave it out of earlier turns.
        """
        earlier = replace(chat, messages=chat.messages[:index])
        prompt, bare = (self.render(earlier, prompt=add) for add in (True, False))
        opening = prompt[_shared_length(bare, prompt) :]
        if not text.endswith(opening, 0, len(prompt) + moved):
            why = "the template begins it without its generation prompt once other turns follow"
            _reject_span(chat.where, index + 1, why, _NOT_ALL)

    def _find_last(self, chat: Conversation, text: str) -> AnswerSpan:
        """Return the span of the last message in ``text``, the rendering of ``chat``."""
        turn, message = len(chat.messages), chat.messages[-1]
        earlier = replace(chat, messages=chat.messages[:-1])
        prompt, bare = (self.render(earlier, prompt=add) for add in (True, False))
        # Inference ends its input with the generation prompt. An answer trained after any other text is trained for
        # an input that the model never gets.
        if not text.startswith(prompt):
            _reject_span(chat.where, turn, "the template does not begin it with its own generation prompt")
        before = _shared_length(bare, prompt)
        if called_functions(message):
            answer = self._find_calls(chat, text, before, len(prompt))
        else:
            verbatim = self._find_verbatim(text, before, len(prompt), core_of(message), turn)
            answer = verbatim or self._find_after_lead(chat, text, len(prompt))
        left_out = next((key for key in _THOUGHTS if str(message.get(key) or "").strip() not in text[before:]), None)
        if left_out:
            why = f"the template leaves out its {left_out}"
            _reject_span(chat.where, turn, why, f"Remove the key. {OTHER_TEMPLATE}")
        # A token that also ends the prompt, such as a separator of turns, would stop the model before its answer.
        stop = text[answer.content_end : answer.end].strip()
        if prompt.rstrip().endswith(stop):
            _reject_span(chat.where, turn, f"{stop} follows its content, but opens answers and cannot end them")
        return self._narrow_to_markers(chat, text, before, answer) if self._marked else answer

    def _find_verbatim(self, text: str, before: int, start: int, core: str, turn: int) -> AnswerSpan | None:
        """Return the span if only the content and its stop token follow the prompt, else None.

        The content may begin inside the generation prompt, at ``before`` or later: templates of thinking models open
        the block of thoughts there, and the model continues it.
        """
        inside = text.find(core, before, start + len(core) - 1)
        for content in (_skip_space(text, start), inside):
            if content < 0 or not text.startswith(core, content) or content + len(core) <= start:
                continue
            if end := self._stop(text, content + len(core)):
                return AnswerSpan(turn, start, content, content + len(core), end)
        return None

    def _find_after_lead(self, chat: Conversation, text: str, start: int) -> AnswerSpan:
        """Return the span if the template begins the answer with a lead of its own, such as an empty thought."""
        turn, core, where = len(chat.messages), core_of(chat.messages[-1]), chat.where
        content = self._find_content(chat, turn - 1, text)
        if content is None or content < start:
            _reject_span(where, turn, "the text does not hold its content unchanged")
        # The model has to write the lead too, so it must be the template's own, the same in every conversation;
        # anything else between prompt and content may belong to another turn.
        lead = text[start:content]
        if lead.strip() and lead != self._lead(chat):
            _reject_span(where, turn, f"{_short(lead)} is between the generation prompt and its content")
        if _END_OF_THOUGHT in lead and _END_OF_THOUGHT in core:
            why = "the template closes the thoughts before the content, which holds thoughts as well"
            _reject_span(where, turn, why, "Move them to reasoning_content, if the template reads that")
        end = self._stop(text, content + len(core))
        if end is None:
            rest = _short(text[content + len(core) :].lstrip()) or "the end of the text"
            _reject_span(where, turn, f"no stop token of the tokenizer follows its content, but {rest}")
        return AnswerSpan(turn, start, content, content + len(core), end)

    def _find_calls(self, chat: Conversation, text: str, before: int, start: int) -> AnswerSpan:
        """Return the span of a message with calls of tools: from the prompt to a stop token.

        Templates write calls as JSON, XML or code, so there is no text to compare the span with. Instead it must hold
        every word of the calls, and every word invented in their place; and it must not depend on the conversation.
        """
        turn, message, where = len(chat.messages), chat.messages[-1], chat.where
        name = self._find_content(chat, turn - 1, text)
        other, new_words = disguise_calls(message)
        disguised = self._render_alone(chat, other)
        closing = self._closing_of_calls(disguised)
        stop = text.find(closing, start)
        if name is None or not start <= name < stop:
            _reject_span(where, turn, f"its calls are not between the generation prompt and {closing}")
        span = text[start : stop + len(closing)]
        said = [word for call in called_functions(message) for word in (call["name"], *words(call["arguments"]))]
        missing = [word for word in said if not occurs_in(word, span)]
        if missing or message["content"].strip() not in text[before:stop]:
            lost = _short(str(missing[0])) if missing else "its content"
            _reject_span(where, turn, f"{lost} is missing from the text of the turn")
        # Real words such as 1 or "a" occur by chance, as in the history of the chat; invented ones do not.
        shown = disguised.partition(closing)[0]
        if not all(word in shown for word in new_words):
            _reject_span(where, turn, "the template does not write all of its calls")
        if not self._render_alone(chat, message).startswith(span):
            _reject_span(where, turn, "its calls are written differently in another conversation")
        return AnswerSpan(turn, start, name, len(text[:stop].rstrip()), start + len(span))

    def _closing_of_calls(self, alone: str) -> str:
        """Return the stop token at the end of calls: that of answers, or the special token that ends ``alone``."""
        found = list(self.control.finditer(alone))
        if self._closing in alone or not found or alone[found[-1].end() :].strip():
            return self._closing
        return found[-1][0]

    def _render_alone(self, chat: Conversation, message: Message) -> str:
        """Return the text after the generation prompt with ``message`` as the only answer; empty if none begins it."""
        earlier = replace(chat, messages=(_QUESTION,))
        prompt, text = self.render(earlier, prompt=True), self.render(replace(chat, messages=(_QUESTION, message)))
        return text[len(prompt) :] if text.startswith(prompt) else ""

    def _find_content(self, chat: Conversation, index: int, text: str) -> int | None:
        """Find where the content of turn ``index`` begins: after the part independent of it."""
        earlier, message, later = chat.messages[:index], chat.messages[index], chat.messages[index + 1 :]
        one, other = (
            self.render(replace(chat, messages=(*earlier, with_content(message, sentinel), *later)))
            for sentinel in _SENTINELS
        )
        before = _before_sentinel(one, other)
        if before is None or not text.startswith(before):
            return None
        content = _skip_space(text, len(before))
        return content if text.startswith(core_of(message), content) else None

    def _lead(self, chat: Conversation) -> str:
        """Return the text between generation prompt and content in any conversation.

        Empty for a template without generation prompt: at inference the model would have to write the header itself.
        """
        earlier = replace(chat, messages=(_QUESTION,))
        prompt, bare = (self.render(earlier, prompt=add) for add in (True, False))
        one, other = (
            self.render(replace(chat, messages=(_QUESTION, with_content(chat.messages[-1], sentinel))))
            for sentinel in _SENTINELS
        )
        before = _before_sentinel(one, other) or ""
        return before[len(prompt) :] if prompt != bare and before.startswith(prompt) else ""

    @cached_property
    def _closing(self) -> str:
        """The stop token at the end of any answer."""
        said = {"role": "assistant", "content": _SENTINELS[0]}
        answered = Conversation(messages=(_QUESTION, said), where="model.chat_template")
        text = self.render(answered)
        answer = self._find_last(answered, text)
        return text[answer.content_end : answer.end].strip()

    def _stop(self, text: str, content_end: int) -> int | None:
        """Return the end of the stop token after the content and optional whitespace; None if there is none.

        Some templates close the answer with one special token and the turn with another: all up to the end of
        sequence are part of the stop.
        """
        ends, place = [], _skip_space(text, content_end)
        while token := self.control.match(text, place):
            place = token.end()
            ends.append(place)
            if token[0] == self._tokenizer.eos_token:
                return place
        return ends[0] if ends else None

    def _narrow_to_markers(self, chat: Conversation, text: str, before: int, answer: AnswerSpan) -> AnswerSpan:
        """Return the span of the template's generation markers, from the generation prompt to the stop token.

        The template's author knows best, but markers are checked like any other claim: they may
        begin inside the generation prompt, at ``before`` or later, and must cover the content and no other turn.
        """
        # Visible markers must change nothing else, or the places found are those of another text.
        pieces = self.render(chat, template=self._visible).split(_VISIBLE)
        answers = sum(message["role"] == "assistant" for message in chat.messages)
        if len(pieces) != 2 * answers + 1 or "".join(pieces) != text:
            why = "the template does not mark every assistant turn once with {% generation %}"
            _reject_span(chat.where, answer.turn, why)
        start, end = len(text) - len(pieces[-1]) - len(pieces[-2]), len(text) - len(pieces[-1])
        latest = answer.start if called_functions(chat.messages[-1]) else max(answer.start, answer.content)
        if not (before <= start <= latest and answer.content_end <= end <= _skip_space(text, answer.end)):
            _reject_span(chat.where, answer.turn, f"{{% generation %}} marks {_short(text[start:end])} instead")
        return replace(answer, start=max(start, answer.start))


def _make_visible(tag: re.Match[str]) -> str:
    return tag[1] + f"{{{{ '{_VISIBLE}' {tag[2]}}}}}"


def _before_sentinel(one: str, other: str) -> str | None:
    """Return the text before the sentinels if it is the same in both texts, else None."""
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


def _reject_span(where: str, turn: int, why: str, fix: str = OTHER_TEMPLATE) -> NoReturn:
    reject(where, f"the mask for turn {turn} cannot be proven: {why}", fix)
