"""Conversations as token ids, with the mask of the trained tokens.

Text and ids are proven apart from each other: ``spans`` proves the characters of the answers, and this file the ids of
those characters.
"""

from __future__ import annotations

import contextlib
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.data.records import (
    OUR_KEYS,
    Conversation,
    Document,
    Feedback,
    Message,
    Preference,
    Question,
    Record,
    Text,
)
from posttrain.errors import BadInput, reject
from posttrain.tokens.codec import decode, encode, encode_all, without_space
from posttrain.tokens.spans import AnswerSpan, Template

_READ = ("role", "content", "tool_calls", "tool_call_id", *OUR_KEYS)
"""Keys of a message that are read, or without meaning in a template that leaves them out."""
_PROBED = 3
"""Records by which the template is tried for each key."""
_GROUP = 200_000
"""Characters of texts after which the conversations gathered by then are encoded."""

_QUESTION = {"role": "user", "content": "What is this called?"}
_ANSWER = {"role": "assistant", "content": "This is called a lamp."}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "look_up", "arguments": {"word": "lamp"}}}],
}
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look up a word.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
"""A conversation that any template can render, to see the tokens that end its turns."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A document in the form of the model's input; ``ids`` and ``mask`` are equally long."""

    ids: list[int]
    """Token ids."""
    mask: list[bool]
    """True for a token trained as a target: the answers and their stop tokens."""
    text: str
    """The text behind the ids."""
    where: str = ""
    """The place of the record, as ``file:line``."""


@dataclass(frozen=True, slots=True)
class _Draft:
    """A conversation whose text and answers are known, before it is encoded."""

    text: str
    answers: Sequence[AnswerSpan]
    where: str
    """The place of its record."""


def as_array(ids: Sequence[int]) -> NDArray[np.int32]:
    """Return token ids as an array, [T]; read-only."""
    return np.frombuffer(struct.pack(f"{len(ids)}i", *ids), np.int32)  # numpy takes thrice the time to read a list


@dataclass(frozen=True, slots=True)
class RenderedPair:
    """A prompt with two answers, each of which ends with its stop token."""

    prompt: list[int]
    """Token ids of the prompt."""
    chosen: list[int]
    """Token ids of the preferred answer."""
    rejected: list[int]
    """Token ids of the rejected answer."""


class ChatRenderer:
    """Renderer of conversations by a tokenizer's chat template, with proof of the trained tokens.

    A prompt gets the same ids as at inference: where a token would cross the border between prompt and answer, the
    two are tokenized apart.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Take a fast tokenizer with a chat template and an end-of-sequence token; raises BadInput for any other."""
        if not getattr(tokenizer, "is_fast", False):
            reject("model", "the tokenizer is not a fast one", "Save it as tokenizer.json")
        if not tokenizer.chat_template:
            reject("model", "the tokenizer has no chat template", "Give one: model.chat_template=FILE")
        if tokenizer.eos_token_id is None:
            what = "the tokenizer has no end-of-sequence token, so no answer would end"
            reject("model", what, "Set eos_token in tokenizer_config.json")
        self._tokenizer = tokenizer
        self._template = Template(tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        # Any unknown character becomes the unknown token, so that one marks no place in the text.
        unknown = tokenizer.unk_token_id
        self._controls = {token.content: key for key, token in added if token.special and key != unknown}
        self._control_ids = set(self._controls.values())
        # a False more than the largest: any larger id is looked up there
        self._is_control = np.zeros(max(self._control_ids, default=0) + 2, np.bool_)
        self._is_control[list(self._control_ids)] = True
        self._head_ids = lru_cache(maxsize=1024)(self._encode)

    def document(self, record: Document, *, last_only: bool = False) -> Rendered:
        """Render a conversation or a raw text; raises BadInput as ``conversation`` and ``raw`` do."""
        return self.raw(record) if isinstance(record, Text) else self.conversation(record, last_only=last_only)

    def documents(self, records: Iterable[Document], *, last_only: bool = False) -> Iterator[Rendered]:
        """Yield ``document`` of each record, in their order.

        Conversations are encoded several at a time: the library takes a fifth less for a text after another text than
        for one after a template. Raises BadInput for the first record that fails, once those before it are yielded.
        """
        drafts: list[_Draft] = []
        size = 0
        try:
            for record in records:
                if isinstance(record, Text) or size >= _GROUP:
                    ready, drafts, size = drafts, [], 0
                    yield from self._encoded(ready)
                if isinstance(record, Text):
                    yield self.raw(record)
                else:
                    drafts.append(self._draft(record, last_only))
                    size += len(drafts[-1].text)
        except BadInput:
            yield from self._encoded(drafts)
            raise
        yield from self._encoded(drafts)

    def raw(self, record: Text) -> Rendered:
        """Render raw text with the tokenizer's beginning and an end-of-sequence token; all but the first are trained.

        Raises:
            BadInput: The text holds a special token.
        """
        if forged := self._template.control.search(record.text):
            what = f"the text holds the special token {forged[0]!r}, which would fake an end or a header"
            reject(record.where, what, "Remove or rewrite the record")
        end = self._tokenizer.eos_token_id
        ids = self._encode(record.text, whole=True)
        ids += [] if ids[-1:] == [end] else [end]
        return Rendered(ids, [place > 0 for place in range(len(ids))], record.text, record.where)

    def conversation(self, record: Conversation, *, last_only: bool = False) -> Rendered:
        """Render all turns; the assistant turns with their stop tokens are trained, and nothing else.

        A turn marked ``train: false`` is context. With ``last_only`` every assistant turn but the last is context, and
        the turns after it are dropped, since no trained token would see them.

        Raises:
            BadInput: A span cannot be proven, a content holds a special token, or the template fails.
        """
        return self._encoded_alone(self._draft(record, last_only))

    def _draft(self, record: Conversation, last_only: bool) -> _Draft:
        answers = [index for index, message in enumerate(record.messages) if message["role"] == "assistant"]
        if last_only and answers:
            answers = answers[-1:]
            record = replace(record, messages=record.messages[: answers[0] + 1])
        record = self._template.adapt(record)
        text = self._template.render(record)
        self._template.check(record, text)
        trained = [index for index in answers if record.messages[index].get("train", True)]
        return _Draft(text, self._spans(record, trained, text), record.where)

    def _encoded(self, drafts: Sequence[_Draft]) -> Iterator[Rendered]:
        encoded = encode_all(self._tokenizer, [draft.text for draft in drafts])
        for draft, whole in zip(drafts, encoded, strict=True):
            ids, mask = self._masked(draft, whole)
            yield Rendered(ids, mask, draft.text, draft.where)

    def _encoded_alone(self, draft: _Draft) -> Rendered:
        return next(self._encoded([draft]))

    def _spans(self, record: Conversation, trained: Sequence[int], text: str) -> list[AnswerSpan]:
        if len(trained) > 1:
            # What one rendering of the history proves needs no other; what it leaves open, the others decide.
            with self._template.following(record, text) as followed, contextlib.suppress(BadInput):
                if followed:
                    return [self._template.find_answer(record, index, text) for index in trained]
        return [self._template.find_answer(record, index, text) for index in trained]

    def preference(self, record: Preference) -> RenderedPair:
        """Render the prompt with both answers; raises BadInput as ``conversation`` does, or if they come out equal."""
        prompt, chosen = self._completion(record, record.chosen)
        other_prompt, rejected = self._completion(record, record.rejected)
        if prompt != other_prompt:
            reject(record.where, "the chat template renders the prompt differently for chosen and rejected")
        if chosen == rejected:
            reject(record.where, "chosen and rejected are the same once rendered", "Remove the record")
        return RenderedPair(prompt, chosen, rejected)

    def answer(self, record: Conversation, prompt: str) -> Rendered:
        """Render the last turn after its prompt, up to its stop token; the mask marks the answer.

        The text of the prompt may go on into the content of the turn.

        Raises:
            BadInput: As ``conversation`` does; or the text does not begin with the prompt, or ends with it.
        """
        record = self._template.adapt(record)
        text = self._template.render(record)
        self._template.check(record, text)
        span = self._template.find_answer(record, len(record.messages) - 1, text)
        if not text.startswith(prompt):
            reject(record.where, "the chat template renders the prompt differently once the answer follows")
        span = replace(span, start=max(span.start, len(prompt)))
        if span.start >= span.content_end:
            reject(record.where, "the answer is empty", "Remove the document")
        rendered = self._encoded_alone(_Draft(text, [span], record.where))
        ids, mask = rendered.ids, rendered.mask
        stops = list(self._template.control.finditer(text, span.content_end, span.end))
        # The lead of an answer may hold special tokens as well, so those of its stop are counted from its end.
        end = [place for place, token in enumerate(ids) if mask[place] and token in self._control_ids][-len(stops)]
        return Rendered(ids[:end], mask[:end], text[: stops[0].start()], record.where)

    def describe_unread(self, records: Sequence[Record]) -> list[str]:
        """Return a line with the keys of messages that the template does not write; none when it writes all.

        A key counts as written when the text of one of the first records with it changes without it.
        """
        found: dict[tuple[str, str], dict[str, Conversation]] = {}
        for record in records:
            if not isinstance(record, Text | Question):
                chat = _whole(record)
                for role, key in {(m["role"], key) for m in chat.messages for key in m if key not in _READ}:
                    found.setdefault((role, key), {})[chat.where] = chat
        named = [
            f"{key!r} of {role} turns ({len(chats):,} records, first {next(iter(chats))})"
            for (role, key), chats in found.items()
            if not any(self._writes(chat, role, key) for chat in islice(chats.values(), _PROBED))
        ]
        return [f"the chat template does not write {', '.join(named)}"] if named else []

    def _writes(self, chat: Conversation, role: str, key: str) -> bool:
        without = [
            {name: value for name, value in message.items() if name != key} if message["role"] == role else message
            for message in chat.messages
        ]
        try:
            return self._template.render(chat) != self._template.render(replace(chat, messages=tuple(without)))
        except BadInput:  # rendering for training will say so, and may drop the turn at fault
            return True

    def _completion(self, record: Preference, side: Sequence[Message]) -> tuple[list[int], list[int]]:
        chat = Conversation(messages=(*record.prompt, *side), where=record.where, tools=record.tools)
        chat = self._template.adapt(chat)
        text = self._template.render(chat)
        self._template.check(chat, text)
        answer = self._template.find_answer(chat, len(chat.messages) - 1, text)
        rendered = self._encoded_alone(_Draft(text, [answer], record.where))
        start, end = rendered.mask.index(True), len(rendered.mask) - rendered.mask[::-1].index(True)
        return rendered.ids[:start], rendered.ids[start:end]

    def _masked(self, draft: _Draft, whole: list[int]) -> tuple[list[int], list[bool]]:
        """Return the ids of a draft, of whose text the tokenizer made ``whole``, and their mask.

        Characters cannot be mapped to ids in general: tokens cross borders, and normalisation changes characters.
        Special tokens can: they occur in the same order in text and ids, and no other token crosses one. So they are
        the fixed points. From the last one before an answer, the prompt is tokenized alone, as inference does it, and
        must give the same ids as within the whole text.
        """
        text, where = draft.text, draft.where
        found = list(self._template.control.finditer(text))
        known = np.minimum(as_array(whole), len(self._is_control) - 1)
        places = np.flatnonzero(self._is_control[known]).tolist()
        if [whole[place] for place in places] != [self._controls.get(match[0]) for match in found]:
            reject(where, "the tokenizer does not keep the special tokens of the chat template whole")
        ends = [match.end() for match in found]
        ids, mask = whole.copy(), [False] * len(whole)
        done = moved = 0
        for answer in draft.answers:
            before = bisect_right(ends, answer.start) - 1
            first, char = (places[before], found[before].start()) if before >= 0 else (0, 0)
            last = places[ends.index(answer.end)] + 1
            head = self._head_ids(text[char : answer.start])
            start = first + len(head)
            said = whole[start:last]
            if whole[first:start] != head:
                # A token crosses the border. Training on it would teach an id that inference never starts from.
                said = self._encode(text[answer.start : answer.end])
                self._verify_border(head + said, text[char : answer.end], answer.turn, where)
                # The head may begin with the stop token of the previous answer, which is there and trained.
                asked = head[max(0, done - first) :]
                between = slice(max(first, done) + moved, last + moved)
                ids[between] = asked + said
                mask[between] = [False] * (len(asked) + len(said))
                moved += len(asked) + len(said) - (last - max(first, done))
            self._verify(said, text[answer.start : answer.end], answer.turn, where)
            mask[last + moved - len(said) : last + moved] = [True] * len(said)
            done = last
        return ids, mask

    def _verify_border(self, ids: list[int], text: str, turn: int, where: str) -> None:
        """Raise BadInput if prompt and answer, tokenized apart, decode to another text."""
        if self._decode(ids) != text:
            what = f"the mask for turn {turn} cannot be proven: a token crosses the border of prompt and answer"
            reject(where, what, "The tokenizer cannot tokenize the two apart: remove whitespace around the content")

    def _verify(self, said: list[int], span: str, turn: int, where: str) -> None:
        """Raise BadInput unless the ids decode to the trained span.

        Tokenizers may normalise characters and whitespace, so two texts are compared without either.
        """
        decoded = self._decode(said)
        if decoded != span and without_space(decoded) != without_space(span):
            what = f"the mask for turn {turn} cannot be proven: its tokens decode to {decoded!r}, not to {span!r}"
            reject(where, what, "The tokenizer cannot express the content")

    def _decode(self, ids: list[int]) -> str:
        return decode(self._tokenizer, ids)

    def _encode(self, text: str, *, whole: bool = False) -> list[int]:
        return encode(self._tokenizer, text, whole=whole)


def has_other_keys(record: Record) -> bool:
    """Return whether a message of the record has a key for the template, beside role, content and calls."""
    return not isinstance(record, Text | Question) and any(
        key not in _READ for m in _whole(record).messages for key in m
    )


def _whole(record: Conversation | Preference | Feedback) -> Conversation:
    """Return the prompt with its answer as one conversation."""
    if isinstance(record, Conversation):
        return record
    answer = record.chosen if isinstance(record, Preference) else record.completion
    return Conversation(messages=(*record.prompt, *answer), where=record.where, tools=record.tools)


def answer_ends(tokenizer: Any) -> list[int]:
    """Return the ids of the tokens that end an answer and a call of tools in the tokenizer's chat template.

    Only proven ones: none where the template's answers cannot be trained.
    """
    ends: list[int] = []
    with contextlib.suppress(BadInput):
        renderer = ChatRenderer(tokenizer)
        for turn, tools in ((_ANSWER, ()), (_CALL, (_TOOL,))):
            with contextlib.suppress(BadInput):
                shown = renderer.conversation(Conversation(messages=(_QUESTION, turn), tools=tools, where="template"))
                ends.append([token for token, trained in zip(shown.ids, shown.mask, strict=True) if trained][-1])
    return list(dict.fromkeys(ends))
