"""The shapes of records in files, recognised by their keys and converted to the records of the stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from posttrain.config.schema import Format
from posttrain.data.calls import check_results, read_tools
from posttrain.data.questions import read_question
from posttrain.data.records import Conversation, Feedback, Message, Preference, Question, Record, Text, Tool
from posttrain.data.rows import RawRow
from posttrain.data.turns import (
    TRAIN_MARKS,
    check_order,
    is_parts,
    make_turn,
    read_mark,
    read_turns,
    reject_media,
    require_text,
)
from posttrain.errors import reject, shown

SHAPES = {
    Format.messages: "messages (role, content) [, tools], or conversations with the same",
    Format.prompt_completion: "prompt, completion",
    Format.alpaca: "instruction, output [, input, system, history]",
    Format.sharegpt: "conversations (from, value) [, system]",
    Format.preference: "chosen, rejected [, prompt | conversations | messages | instruction, input]",
    Format.feedback: "a conversation with a label for its last turn, or prompt, completion, label",
    Format.text: "text (only with format: text)",
}
"""The keys of each shape."""

SYSTEMS = ("system", "system_prompt", "system_message")
"""Keys of a record for its first turn."""
_WEIGHTS = ("sample_weight", "example_weight", *(key for key in TRAIN_MARKS if key != "loss"))
"""Keys of a record by which tools weigh it."""

_JUDGEMENTS = ("label", "kto_tag")
"""Keys of a record that judge its answer."""

_MARKS_IN_CELLS = {"true": 1, "1": 1, "1.0": 1, "false": 0, "0": 0, "0.0": 0}
"""Marks as the cells of a table hold them."""

QUESTIONS = "questions"
"""The one of RECORD_SHAPES that is read as gates read their questions."""
CHATS = (Format.messages, Format.prompt_completion, Format.alpaca, Format.sharegpt)
SERVES = {
    "conversations": CHATS,
    "documents": (*CHATS, Format.text),
    "preferences": (Format.preference,),
    "feedback": (Format.feedback, Format.preference),
}
"""The shapes in files for each of RECORD_SHAPES."""


class _ReadRow(dict[str, Any]):
    """A row that remembers the keys asked for: what no converter asks for is read by nothing."""

    def __init__(self, row: RawRow) -> None:
        super().__init__(row)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def unread(self) -> tuple[str, ...]:
        """Return the keys with a value that nobody asked for."""
        return tuple(key for key, value in self.items() if key not in self.asked and value not in (None, "", [], {}))


def to_record(row: RawRow, form: Format, shape: str, where: str) -> Record:
    """Convert one row to a record for a stage.

    Args:
        row: Keys and values of the record; null counts as absent.
        form: Its shape, or ``auto`` to recognise it. Raw text must be asked for, since all of it is trained.
        shape: One of RECORD_SHAPES.
        where: ``file:line``, for errors and for the record.

    The record names the keys that nothing read.

    Raises:
        BadInput: The shape is unknown, does not serve the stage, or a turn breaks the rules of conversations; a key
            would change what is trained, such as a weight or an image.
    """
    if shape == QUESTIONS:
        return _question(row, form, where)
    known = recognise(row, where) if form is Format.auto else form
    if shape == "feedback" and (known is Format.prompt_completion or (known in CHATS and row.get("label") is not None)):
        known = Format.feedback
    if known not in SERVES[shape]:
        what = f"the record has the shape {known.value}, but the stage needs {shape}"
        reject(where, what, f"Known for {shape}: {_listed(shape)}")
    read = _ReadRow(row)
    reject_media(row, where, "")
    _reject_weight(read, where)
    if known in CHATS:
        _reject_bad_answer(read, where)
    return replace(CONVERTERS[known](read, where), unread=read.unread())


def _question(row: RawRow, form: Format, where: str) -> Question:
    if form is not Format.auto:
        reject(where, f"format {form.value} is none of questions", "Leave format out")
    reject_media(row, where, "")
    return read_question(row, where)


def recognise(row: RawRow, where: str) -> Format:
    """Return the shape of a row, judged by its keys; null counts as absent."""
    keys = {key for key, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= keys:
        return Format.preference
    if "messages" in keys:
        return Format.messages
    if "conversations" in keys:
        return Format.sharegpt if _is_sharegpt(row["conversations"]) else Format.messages
    if {"prompt", "completion"} <= keys:
        return Format.prompt_completion
    if {"instruction", "output"} <= keys:
        return Format.alpaca
    seen = ", ".join(f"{key} (null)" if row[key] is None else str(key) for key in row) or "none"
    shapes = "; ".join(SHAPES.values())
    hint = "To train every token of a raw text, set format: text. " if "text" in keys else ""
    reject(where, f"unknown shape of record; its keys: {seen}", f"{hint}Known: {shapes}. Rename keys with columns")


def _listed(shape: str) -> str:
    return "; ".join(SHAPES[form] for form in SERVES[shape])


def _reject_bad_answer(row: RawRow, where: str) -> None:
    # Feedback data marks bad answers by label: false. Trained as conversations they would be taught.
    for key in _JUDGEMENTS:
        if _mark(dict(row).get(key)) is not None and _mark(row.get(key)) is False:
            what = f"{key} is false: the answer was judged bad, and this stage would teach it"
            reject(where, what, f"Remove such records, or set the key aside with columns: {{judged: {key}}}")


def _reject_weight(row: RawRow, where: str) -> None:
    for key in _WEIGHTS:
        if row.get(key) is not None and _mark(row[key]) is not True:
            fix = f"Give the source a weight, mark turns train: false, or set the key aside: columns: {{unused: {key}}}"
            reject(where, f"{key} of the record is {shown(row[key])}, but a record counts as a whole", fix)


def _mark(value: Any) -> bool | None:
    """Return a mark of a record as true or false, that in a cell of a table too; None for a value that is neither."""
    return read_mark(_MARKS_IN_CELLS.get(value.strip().lower()) if isinstance(value, str) else value)


def _is_sharegpt(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and first.get("from") is not None


def _messages(row: RawRow, where: str) -> Conversation:
    name = "messages" if row.get("messages") is not None else "conversations"
    return _conversation(row, read_turns(row.get(name), where, name), where)


def _sharegpt(row: RawRow, where: str) -> Conversation:
    return _conversation(row, read_turns(row.get("conversations"), where, "conversations"), where)


def _prompt_completion(row: RawRow, where: str) -> Conversation:
    prompt = _read_side(row.get("prompt"), "user", where, "prompt")
    completion = _read_side(row.get("completion"), "assistant", where, "completion")
    if any(message["role"] == "assistant" and message.get("train", True) for message in prompt):
        fix = "Mark it train: false, or use messages, in which every assistant turn is trained"
        reject(where, "prompt holds an assistant turn", fix)
    return _conversation(row, prompt + completion, where)


def _alpaca(row: RawRow, where: str) -> Conversation:
    answer = make_turn("assistant", row.get("output"), where, "output")
    return _conversation(row, [*_alpaca_prompt(row, where), answer], where)


def _preference(row: RawRow, where: str) -> Preference:
    chosen = _read_side(row.get("chosen"), "assistant", where, "chosen")
    rejected = _read_side(row.get("rejected"), "assistant", where, "rejected")
    prompt = _explicit_prompt(row, where)
    shared = _shared_prefix(chosen, rejected)
    if shared and prompt and shared[-len(prompt) :] != prompt:
        reject(
            where, "prompt differs from the turns that chosen and rejected begin with", "Keep one of the two prompts"
        )
    if not (shared or prompt):
        what = "no prompt: chosen and rejected do not begin with the same turns"
        reject(where, what, "Add prompt, or put the whole conversation into both")
    prompt = _with_system(row, shared or prompt, where)
    for name, side in (("chosen", chosen[len(shared) :]), ("rejected", rejected[len(shared) :])):
        _check_side(prompt, side, where, name)
    if _core(chosen[-1]) == _core(rejected[-1]):
        reject(where, "chosen and rejected are the same", "Remove the record")
    tools = _tools(row, where)
    return Preference(prompt=tuple(prompt), chosen=(chosen[-1],), rejected=(rejected[-1],), where=where, tools=tools)


def _feedback(row: RawRow, where: str) -> Feedback:
    label = row.get("label")
    label = {"true": True, "false": False}.get(label.strip().lower(), label) if isinstance(label, str) else label
    if not isinstance(label, bool):
        reject(where, f"label must be true or false, not {label!r}", "true marks a good answer, false a bad one")
    prompt, completion = _split_judged(row, where)
    _check_side(prompt, completion, where, "completion")
    tools = _tools(row, where)
    return Feedback(prompt=tuple(prompt), completion=tuple(completion), label=label, where=where, tools=tools)


def _split_judged(row: RawRow, where: str) -> tuple[list[Message], list[Message]]:
    """Return the prompt and the judged answer: the completion, or the last turn of a conversation."""
    known = recognise(row, where)
    if known is Format.prompt_completion:
        prompt = _with_system(row, _read_side(row.get("prompt"), "user", where, "prompt"), where)
        return prompt, _read_side(row.get("completion"), "assistant", where, "completion")
    chat = CONVERTERS[known](row, where)
    if not isinstance(chat, Conversation):
        reject(where, f"the record has the shape {known.value}, without a single answer", SHAPES[Format.feedback])
    messages = list(chat.messages)
    return messages[:-1], messages[-1:]


def _text(row: RawRow, where: str) -> Text:
    return Text(text=require_text(row.get("text"), where, "text"), where=where)


CONVERTERS: dict[Format, Callable[[RawRow, str], Record]] = {
    Format.messages: _messages,
    Format.prompt_completion: _prompt_completion,
    Format.alpaca: _alpaca,
    Format.sharegpt: _sharegpt,
    Format.preference: _preference,
    Format.feedback: _feedback,
    Format.text: _text,
}
"""The converter of each shape."""


def _conversation(row: RawRow, messages: list[Message], where: str) -> Conversation:
    messages = _with_system(row, messages, where)
    check_order(messages, where)
    check_results(messages, where)
    if not any(message["role"] == "assistant" for message in messages):
        reject(where, "the conversation has no assistant turn, so nothing can be trained")
    return Conversation(messages=tuple(messages), where=where, tools=_tools(row, where))


def _tools(row: RawRow, where: str) -> tuple[Tool, ...]:
    """Return the tools of a record, also as the ``functions`` that OpenAI formerly had."""
    if row.get("tools") not in (None, "", []):
        return read_tools(row["tools"], where)
    return tuple({"type": "function", "function": dict(tool)} for tool in read_tools(row.get("functions"), where))


def _check_side(prompt: list[Message], side: list[Message], where: str, name: str) -> None:
    if [message["role"] for message in side] != ["assistant"]:
        reject(where, f"{name} must end in one assistant turn after the shared prompt; it has {_roles(side)}")
    if side[0].get("train") is False:
        reject(where, f"{name} is marked train: false, but every answer here is trained", "Remove train")
    check_order([*prompt, *side], where)
    if prompt[-1]["role"] == "assistant":
        reject(where, f"the prompt ends with an assistant turn, so {name} answers nothing")


def _core(message: Message) -> tuple[str, Any]:
    return message["content"].strip(), message.get("tool_calls")


def _read_side(value: Any, role: str, where: str, name: str) -> list[Message]:
    """Return text as one turn of ``role``, or messages with roles of their own."""
    if isinstance(value, Mapping | list) and not is_parts(value):
        return read_turns(value, where, name)
    return [make_turn(role, value, where, name)]


def _explicit_prompt(row: RawRow, where: str) -> list[Message]:
    """Return the prompt beside the two answers of a preference; empty when the answers hold it themselves."""
    if row.get("prompt") is not None:
        return _read_side(row["prompt"], "user", where, "prompt")
    if row.get("conversations") is not None:
        return read_turns(row["conversations"], where, "conversations")
    if row.get("instruction") is not None:
        return _alpaca_prompt(row, where)
    if row.get("messages") is not None:
        return read_turns(row["messages"], where, "messages")
    return []


def _alpaca_prompt(row: RawRow, where: str) -> list[Message]:
    messages: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        reject(where, "history must be a list of [question, answer]")
    for number, (question, answer) in enumerate(history, start=1):
        messages.append(make_turn("user", question, where, f"question {number} of history"))
        messages.append(make_turn("assistant", answer, where, f"answer {number} of history"))
    asked = [require_text(row.get("instruction"), where, "instruction")]
    if row.get("input") not in (None, ""):
        asked.append(require_text(row["input"], where, "input"))
    return [*messages, {"role": "user", "content": "\n".join(asked)}]


def _with_system(row: RawRow, messages: list[Message], where: str) -> list[Message]:
    """Return the messages with the system prompt of the record as their first turn."""
    first = [message["content"] for message in messages[:1] if message["role"] == "system"]
    given = {key: row[key] for key in SYSTEMS if row.get(key) not in (None, "")}
    for key, content in given.items():
        turn = make_turn("system", content, where, key)
        if not first:
            first, messages = [turn["content"]], [turn, *messages]
        elif turn["content"].strip() != first[0].strip():
            reject(where, f"{key} is another text than the system turn of the record", "Keep one of the two")
    return messages


def _shared_prefix(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """Return the common first turns of both sides, their last turns excluded."""
    count = 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        count += 1
    return chosen[:count]


def _roles(messages: list[Message]) -> str:
    return ", ".join(message["role"] for message in messages) or "none"
