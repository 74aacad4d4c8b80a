"""The documents of tasks on your own files, read as training data is read.

A document holds its prompt as the JSON of a list of messages, because a data set's columns cannot mix shapes; so does
it hold what slices are named by: ``meta`` and the keys of its row that nothing else reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from typing import Any

from datasets import Dataset

from posttrain.config.schema import Source
from posttrain.data.files import local_files, read_rows
from posttrain.data.questions import META, PLACE, read_question
from posttrain.data.reading import read_with_rows
from posttrain.data.records import OUR_KEYS, Conversation, Message, Preference
from posttrain.errors import reject

Splits = dict[str, Dataset]


def responses(data_files: Mapping[str, str] | None = None, **_: Any) -> Splits:
    """Read conversations in any shape of SFT: the last trained answer is the response, all before it the prompt."""
    return _splits(data_files, lambda path: _records(path, "conversations", _response))


def preferences(data_files: Mapping[str, str] | None = None, **_: Any) -> Splits:
    """Read pairs in any shape of DPO, with the texts of the two answers, the preferred one first."""
    return _splits(data_files, lambda path: _records(path, "preferences", _pair))


def questions(data_files: Mapping[str, str] | None = None, **_: Any) -> Splits:
    """Read questions with their right answers: ``question`` or ``messages``, ``answer``, and ``match``."""
    return _splits(data_files, _questions)


def messages(doc: Mapping[str, Any]) -> list[Message]:
    """Return the messages of a document's prompt."""
    return list(json.loads(doc["prompt"]))


def _splits(data_files: Mapping[str, str] | None, read: Any) -> Splits:
    if data_files is None:
        reject("data", "the task has no documents of its own", "Give data: FILE")
    return {split: Dataset.from_list(list(read(path))) for split, path in data_files.items()}


def _records(path: str, shape: str, document: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for record, row in read_with_rows(Source(path=path), shape):
        meta = row["meta"] if isinstance(row.get("meta"), Mapping) else {}
        meta = {**{key: row[key] for key in record.unread if key in row and key != "meta"}, **meta}
        found.append({**document(record), **_notes(meta, record.where)})
    return _alike(found)


def _notes(meta: Mapping[str, Any], where: str) -> dict[str, str]:
    """Return the fields of a document that nobody asks."""
    return {META: json.dumps(meta, ensure_ascii=False, sort_keys=True, default=str), PLACE: PurePath(where).name}


def _alike(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the documents with the same fields: without ``meta`` where none has any."""
    return found if any(doc[META] != "{}" for doc in found) else [_without_meta(doc) for doc in found]


def _response(record: Any) -> dict[str, Any]:
    conversation: Conversation = record
    _reject_tools(conversation.tools, conversation.where)
    said = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant" and m.get("train", True)]
    if not said:
        reject(conversation.where, "every answer is marked as context, so there is no response", "Leave the record out")
    *_, last = said
    return {
        "prompt": _prompt(conversation.messages[:last]),
        "response": _text(conversation.messages[last], conversation.where),
    }


def _pair(record: Any) -> dict[str, Any]:
    preference: Preference = record
    _reject_tools(preference.tools, preference.where)
    answers = [_text(answer, preference.where) for (answer,) in (preference.chosen, preference.rejected)]
    return {"prompt": _prompt(preference.prompt), "answers": answers}


def _questions(path: str) -> Iterable[dict[str, Any]]:
    return _alike([_question(row, where) for file in local_files(path) or [] for where, row in read_rows(file)])


def _without_meta(doc: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in doc.items() if key != META}


def _question(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    question = read_question(row, where)
    if not question.answers:
        reject(where, "has no answer", "Give the right answer")
    answers = json.dumps(list(question.answers), ensure_ascii=False, sort_keys=True)
    document = {"prompt": _prompt(question.prompt), "answer": answers, "match": question.match}
    return document | _notes(question.meta, where)


def _prompt(listed: Iterable[Message]) -> str:
    shown = [{key: value for key, value in message.items() if key not in OUR_KEYS} for message in listed]
    return json.dumps(shown, ensure_ascii=False)


def _text(message: Message, where: str) -> str:
    text = message.get("content")
    if not isinstance(text, str) or not text or message.get("tool_calls"):
        reject(where, "its answer is not text, or calls tools", "Leave the record out")
    return text


def _reject_tools(tools: Any, where: str) -> None:
    if tools:
        reject(where, "it offers tools, which gates do not", "Leave the record out")
