"""The documents of tasks on files of one's own, read as training data is read.

A document holds its prompt as the JSON of a list of messages, because the columns of a data set take no mixed shapes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset

from posttrain.config.schema import Source
from posttrain.data.files import local_files, read_rows
from posttrain.data.reading import read_source
from posttrain.data.records import Conversation, Message, Preference
from posttrain.data.turns import check_order, read_turns
from posttrain.errors import BadInput, Problem, suggest
from posttrain.scoring.tasks.metrics import MATCHES

Splits = dict[str, Dataset]


def responses(data_files: Mapping[str, str] | None = None, **_: Any) -> Splits:
    """Conversations in any shape that SFT takes: the last answer is the response, all before it the prompt."""
    return _splits(data_files, lambda path: map(_response, read_source(Source(path=path), "conversations")))


def preferences(data_files: Mapping[str, str] | None = None, **_: Any) -> Splits:
    """Pairs in any shape that DPO takes, with the texts of the two answers."""
    return _splits(data_files, lambda path: map(_pair, read_source(Source(path=path), "preferences")))


def questions(data_files: Mapping[str, str] | None = None, **_: Any) -> Splits:
    """Questions with what is a right answer: ``question`` or ``messages``, ``answer``, and ``match``."""
    return _splits(data_files, _questions)


def messages(doc: Mapping[str, Any]) -> list[Message]:
    """The messages that a document asks with."""
    return list(json.loads(doc["prompt"]))


def _splits(data_files: Mapping[str, str] | None, read: Any) -> Splits:
    if data_files is None:
        problem = Problem(where="data", what="the task has no documents of its own", fix="Give data: FILE")
        raise BadInput(problem)
    return {split: Dataset.from_list(list(read(path))) for split, path in data_files.items()}


def _response(record: Any) -> dict[str, Any]:
    conversation: Conversation = record
    _reject_tools(conversation.tools, conversation.where)
    spoken = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    *_, last = spoken
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
    for file in local_files(path) or []:
        for where, row in read_rows(file):
            yield _question(row, where)


def _question(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    known = ("question", "messages", "answer", "match")
    for key in row:
        if key not in known:
            raise BadInput(Problem(where=where, what=f"a question has no {key!r}", fix=suggest(key, known)))
    if ("question" in row) == ("messages" in row):
        raise BadInput(Problem(where=where, what="gives not one of question and messages", fix="Give one of the two"))
    asked = [{"role": "user", "content": row["question"]}] if "question" in row else row["messages"]
    listed = read_turns(asked, where, "messages" if "messages" in row else "question")
    check_order(listed, where)
    if listed[-1]["role"] != "user":
        raise BadInput(Problem(where=where, what="does not end with a question", fix="Leave out what answers it"))
    match = row.get("match", "exact")
    if match not in MATCHES:
        raise BadInput(Problem(where=where, what=f"match is {match!r}", fix=suggest(str(match), MATCHES)))
    return {"prompt": _prompt(listed), "answer": _answer(row, match, where), "match": match}


def _answer(row: Mapping[str, Any], match: str, where: str) -> str:
    """The right answer as JSON: one, or a list of which any is right; with ``json``, the value itself."""
    if "answer" not in row:
        raise BadInput(Problem(where=where, what="has no answer", fix="Give what a right answer is"))
    answer = row["answer"]
    options = answer if isinstance(answer, list) and match != "json" else [answer]
    for option in options if match != "json" else []:
        if not _usable(option, match):
            raise BadInput(Problem(where=where, what=f"{option!r} is no answer that match: {match} can look for"))
    if not options:
        raise BadInput(Problem(where=where, what="has no answer", fix="Give what a right answer is"))
    return json.dumps(options, ensure_ascii=False, sort_keys=True)


def _usable(option: Any, match: str) -> bool:
    if match == "numeric" and isinstance(option, int | float) and not isinstance(option, bool):
        return True
    if not isinstance(option, str) or not option:
        return False
    try:
        if match == "regex":
            re.compile(option)
        elif match == "numeric":
            return math.isfinite(float(option.replace(",", "")))
    except (ValueError, re.error):
        return False
    return True


def _prompt(listed: Iterable[Message]) -> str:
    return json.dumps([dict(message) for message in listed], ensure_ascii=False)


def _text(message: Message, where: str) -> str:
    text = message.get("content")
    if not isinstance(text, str) or not text or message.get("tool_calls"):
        raise BadInput(Problem(where=where, what="its answer is no text, or calls tools", fix="Leave the record out"))
    return text


def _reject_tools(tools: Any, where: str) -> None:
    if tools:
        raise BadInput(Problem(where=where, what="it offers tools, and gates ask without", fix="Leave the record out"))
