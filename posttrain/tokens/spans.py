r"""Where the answers stand in the text of a chat template, proven for every turn.

A template is a program, so what it writes is taken from what it renders, never guessed from its source:

    prompt = the turns before the answer, with the generation prompt   what inference shows the model
    asked  = the turns up to the answer                                begins with prompt, or it is refused
    text   = all turns                                                 what is trained

    asked:  <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n | Hello<|im_end|> | \n
                                                              prompt end     stop end

The span between the bars is trained: what the model has to write itself when it is given the prompt. Calls of tools are
written in whatever way the template likes; their span has to be the same as in a conversation that holds nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

from jinja2 import TemplateError

from posttrain.data.calls import called_functions, disguise_calls, occurs_in, rename_call, tool_names, words
from posttrain.data.records import Conversation, Message
from posttrain.errors import reject
from posttrain.tokens.time_limit import patience

OURS = ("train", "refuses")
"""The keys of a message that are said to posttrain, not to the template."""

SECONDS = 5
"""Computing time that a template may take for one conversation; templates of published models take a thousandth."""
SIZE, SIZE_PER_CHARACTER = 1_000_000, 10
"""Characters that a template may write in any case, and for every one that the conversation holds."""

_FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)
"""What a template that fails may raise."""

_SHORT = 16
"""Contents of fewer characters are looked for by putting others in their place: they stand in any text by chance."""

_SENTINELS = ("qjxzv", "wkvyb")
"""Two answers that stand in for the real one, to see where the template puts an answer."""

_MARKER = re.compile(r"(\{%-?\s*(?:end)?generation\s*(-?)%\})\n?")
"""The tags ``{% generation %}`` and ``{% endgeneration %}``, with the line end that templates drop behind a tag."""

_VISIBLE = "\ue000"
"""What a generation marker is made to write, to see where it stands."""

_ASKED = {"role": "user", "content": "x"}
"""A turn that says nothing, to see what the template writes whatever is said."""

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""The keys under which messages hold what was thought before the content."""

_END_OF_THOUGHT = "</think>"

_OTHER_TEMPLATE = "Use another chat template: model.chat_template=FILE"
_ONLY_LAST = "Train the last turn only (train_on=last), or mark this one train: false, or use another chat template"


@dataclass(frozen=True, slots=True)
class Answer:
    """One trained span of a rendered text, in characters."""

    turn: int
    """Which message it is, counted from 1."""
    start: int
    """Where the model begins to write."""
    content: int
    """Where what the message says begins: its content, or the name of the first function that it calls."""
    content_end: int
    """Where it ends: only whitespace stands between it and the stop token."""
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

    def render(self, chat: Conversation, *, prompt: bool = False, template: str | None = None) -> str:
        """The text of a conversation; with ``prompt`` followed by the generation prompt."""
        messages = [{key: value for key, value in message.items() if key not in OURS} for message in chat.messages]
        tools = [dict(tool) for tool in chat.tools] or None
        options = {"tokenize": False, "add_generation_prompt": prompt, "chat_template": template, "tools": tools}
        try:
            with patience(SECONDS):
                text = str(self._tokenizer.apply_chat_template(messages, **options))
            text.encode()
        except TimeoutError:
            reject(chat.where, f"the chat template takes longer than {SECONDS} s", _OTHER_TEMPLATE)
        except _FAILURES as error:
            why = str(error) or type(error).__name__
            reject(chat.where, f"the chat template cannot render the conversation: {why}", _OTHER_TEMPLATE)
        if len(text) > SIZE and len(text) > SIZE_PER_CHARACTER * sum(
            len(str(word)) for word in words([messages, tools])
        ):
            reject(chat.where, f"the chat template makes {len(text):,} characters of it", _OTHER_TEMPLATE)
        return text

    def check(self, chat: Conversation, text: str) -> None:
        """Refuse what holds special tokens, and templates that leave out what was said or the tools on offer."""
        bos = self._tokenizer.bos_token
        if bos and text.startswith(2 * bos):
            reject(chat.where, f"the chat template begins with {bos} twice", _OTHER_TEMPLATE)
        for turn, message in enumerate(chat.messages, start=1):
            self._check_forged(message, f"turn {turn} ({message['role']})", chat.where)
            if not _is_told(message, text) or not self._is_apart(chat, turn - 1):
                what = f"the chat template leaves out or rewrites turn {turn} ({message['role']})"
                reject(chat.where, what, _OTHER_TEMPLATE)
        if chat.tools:
            self._check_forged(chat.tools, "tools", chat.where)
            offer = self.render(replace(chat, messages=(_ASKED,)))
            if not all(name in offer for name in tool_names(chat.tools)):
                reject(chat.where, "the chat template leaves out the tools", _OTHER_TEMPLATE)

    def _is_apart(self, chat: Conversation, index: int) -> bool:
        """Whether turn ``index`` is written for itself.

        Asked of those that a turn of the same role follows or goes before, and of short ones.
        """
        message = chat.messages[index]
        beside = (*chat.messages[max(0, index - 1) : index], *chat.messages[index + 1 : index + 2])
        alone = all(other["role"] != message["role"] for other in beside)
        if message["role"] == "assistant" or (
            alone and (message["role"] == "tool" or len(message["content"]) >= _SHORT)
        ):
            return True
        changed = (*chat.messages[:index], _saying(message, _SENTINELS[0]), *chat.messages[index + 1 :])
        return _SENTINELS[0] in self.render(replace(chat, messages=changed))

    def _check_forged(self, value: Any, name: str, where: str) -> None:
        for text in words(value):
            if forged := self.control.search(str(text)):
                what = f"{name} holds the special token {forged[0]!r}, which would fake an end of turn or a header"
                reject(where, what, "Remove or rewrite the record")

    def answer(self, chat: Conversation, index: int, text: str) -> Answer:
        """The trained span of turn ``index`` (from 0) in ``text``, which is the rendering of the whole chat.

        Raises:
            BadInput: The span cannot be proven, or is written differently when the turn is the last one.
        """
        told = replace(chat, messages=chat.messages[: index + 1])
        asked = text if told.messages == chat.messages else self.render(told)
        answer = self._last(told, asked)
        if text.startswith(asked[: answer.end]):
            return answer
        content = self._by_difference(chat, index, text)
        moved = 0 if content is None else content - answer.content
        start, end = answer.start + moved, answer.end + moved
        if content is None or start < 0 or text[start:end] != asked[answer.start : answer.end]:
            why = "the template writes it differently once other turns follow"
            _unproven(chat.where, answer.turn, why, _ONLY_LAST)
        return replace(answer, start=start, content=content, content_end=answer.content_end + moved, end=end)

    def _last(self, chat: Conversation, text: str) -> Answer:
        """The span of the last message in ``text``, the rendering of ``chat``."""
        turn, message = len(chat.messages), chat.messages[-1]
        asked = replace(chat, messages=chat.messages[:-1])
        prompt, bare = (self.render(asked, prompt=add) for add in (True, False))
        if not text.startswith(prompt):
            _unproven(chat.where, turn, "the template does not begin it with its own generation prompt")
        before = _shared_length(bare, prompt)
        if called_functions(message):
            answer = self._with_calls(chat, text, before, len(prompt))
        else:
            verbatim = self._verbatim(text, before, len(prompt), _core(message), turn)
            answer = verbatim or self._behind_lead(chat, text, len(prompt))
        left_out = next((key for key in _THOUGHTS if str(message.get(key) or "").strip() not in text[before:]), None)
        if left_out:
            _unproven(chat.where, turn, f"the template leaves out its {left_out}", f"Remove the key. {_OTHER_TEMPLATE}")
        stop = text[answer.content_end : answer.end].strip()
        if prompt.rstrip().endswith(stop):
            _unproven(chat.where, turn, f"{stop} follows its content, but opens answers and cannot end them")
        return self._as_marked(chat, text, before, answer) if self._marked else answer

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
                return Answer(turn, start, content, content + len(core), end)
        return None

    def _behind_lead(self, chat: Conversation, text: str, start: int) -> Answer:
        """The span if the template itself begins the answer, as with an empty block of thoughts."""
        turn, core, where = len(chat.messages), _core(chat.messages[-1]), chat.where
        content = self._by_difference(chat, turn - 1, text)
        if content is None or content < start:
            _unproven(where, turn, "its content does not stand in the text as it is")
        lead = text[start:content]
        if lead.strip() and lead != self._lead(chat):
            _unproven(where, turn, f"{_short(lead)} stands between the generation prompt and its content")
        if _END_OF_THOUGHT in lead and _END_OF_THOUGHT in core:
            why = "the template closes the thoughts before the content, which holds thoughts as well"
            _unproven(where, turn, why, "Move them to reasoning_content, if the template reads that")
        end = self._stop(text, content + len(core))
        if end is None:
            rest = _short(text[content + len(core) :].lstrip()) or "the end of the text"
            _unproven(where, turn, f"no stop token of the tokenizer follows its content, but {rest}")
        return Answer(turn, start, content, content + len(core), end)

    def _with_calls(self, chat: Conversation, text: str, before: int, start: int) -> Answer:
        """The span of a message that calls tools: everything up to the stop token that ends any answer."""
        turn, message, where = len(chat.messages), chat.messages[-1], chat.where
        name = self._by_difference(chat, turn - 1, text)
        stop = text.find(self._closing, start)
        if name is None or not start <= name < stop:
            _unproven(where, turn, f"its calls do not stand between the generation prompt and {self._closing}")
        span = text[start : stop + len(self._closing)]
        said = [word for call in called_functions(message) for word in (call["name"], *words(call["arguments"]))]
        missing = [word for word in said if not occurs_in(word, span)]
        if missing or message["content"].strip() not in text[before:stop]:
            _unproven(where, turn, f"{_short(str(missing[0])) if missing else 'its content'} does not stand in it")
        other, new_words = disguise_calls(message)
        shown = self._alone(chat, other).partition(self._closing)[0]
        if not all(word in shown for word in new_words):
            _unproven(where, turn, "the template does not write all of its calls")
        if not self._alone(chat, message).startswith(span):
            _unproven(where, turn, "its calls are written differently in another conversation")
        return Answer(turn, start, name, len(text[:stop].rstrip()), start + len(span))

    def _alone(self, chat: Conversation, message: Message) -> str:
        """What follows the generation prompt when ``message`` is the only answer; empty if it is not begun with it."""
        asked = replace(chat, messages=(_ASKED,))
        prompt, text = self.render(asked, prompt=True), self.render(replace(chat, messages=(_ASKED, message)))
        return text[len(prompt) :] if text.startswith(prompt) else ""

    def _by_difference(self, chat: Conversation, index: int, text: str) -> int | None:
        """Where turn ``index`` begins to say something: behind what stays the same whatever it says."""
        earlier, message, later = chat.messages[:index], chat.messages[index], chat.messages[index + 1 :]
        one, other = (
            self.render(replace(chat, messages=(*earlier, _saying(message, sentinel), *later)))
            for sentinel in _SENTINELS
        )
        before = _before_sentinel(one, other)
        if before is None or not text.startswith(before):
            return None
        content = _skip_space(text, len(before))
        return content if text.startswith(_core(message), content) else None

    def _lead(self, chat: Conversation) -> str:
        """What the template writes between generation prompt and answer, whatever the conversation was.

        Empty for a template without generation prompt, whose header the model would never be shown.
        """
        asked = replace(chat, messages=(_ASKED,))
        prompt, bare = (self.render(asked, prompt=add) for add in (True, False))
        one, other = (
            self.render(replace(chat, messages=(_ASKED, _saying(chat.messages[-1], sentinel))))
            for sentinel in _SENTINELS
        )
        before = _before_sentinel(one, other) or ""
        return before[len(prompt) :] if prompt != bare and before.startswith(prompt) else ""

    @cached_property
    def _closing(self) -> str:
        """The stop token with which the template ends any answer."""
        said = {"role": "assistant", "content": _SENTINELS[0]}
        answered = Conversation(messages=(_ASKED, said), where="model.chat_template")
        text = self.render(answered)
        answer = self._last(answered, text)
        return text[answer.content_end : answer.end].strip()

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

    def _as_marked(self, chat: Conversation, text: str, before: int, answer: Answer) -> Answer:
        """The span that the template's generation markers give, from the generation prompt to the stop token.

        Markers may take in the generation prompt, which starts behind ``before``, but no other turn.
        """
        pieces = self.render(chat, template=self._visible).split(_VISIBLE)
        answers = sum(message["role"] == "assistant" for message in chat.messages)
        if len(pieces) != 2 * answers + 1 or "".join(pieces) != text:
            why = "the template does not mark every assistant turn once with {% generation %}"
            _unproven(chat.where, answer.turn, why)
        start, end = len(text) - len(pieces[-1]) - len(pieces[-2]), len(text) - len(pieces[-1])
        latest = answer.start if called_functions(chat.messages[-1]) else max(answer.start, answer.content)
        if not (before <= start <= latest and answer.content_end <= end <= _skip_space(text, answer.end)):
            _unproven(chat.where, answer.turn, f"{{% generation %}} marks {_short(text[start:end])} in its place")
        return replace(answer, start=max(start, answer.start))


def _core(message: Message) -> str:
    """What a message says that can be found in the text: its content, or the name of the first function it calls."""
    calls = called_functions(message)
    return str(calls[0]["name"] if calls else message["content"]).strip()


def _saying(message: Message, sentinel: str) -> Message:
    return rename_call(message, sentinel) if called_functions(message) else {**message, "content": sentinel}


def _is_told(message: Message, text: str) -> bool:
    """Whether ``text`` holds what a message says; thoughts of earlier answers may be left out."""
    if message["role"] == "assistant":
        return all(call["name"] in text for call in called_functions(message))
    content = message["content"].strip()
    return content in text or (message["role"] == "tool" and occurs_in(content, text))


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


def _unproven(where: str, turn: int, why: str, fix: str = _OTHER_TEMPLATE) -> NoReturn:
    reject(where, f"the mask for turn {turn} cannot be proven: {why}", fix)
