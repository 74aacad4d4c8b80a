"""Questions with their right answers: the rows of gates on your own questions, and of stages that sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.data.records import Question
from posttrain.data.turns import check_order, read_turns
from posttrain.errors import reject, shown, suggest
from posttrain.rewards.matching import MATCHES, NEEDED, is_usable

ASKED = ("question", "messages", "prompt")
"""Keys of a row for its question: a text, messages, or either."""
ANSWERED = ("answer", "completion")
"""Keys of a row for its right answers."""
KNOWN = (*ASKED, *ANSWERED, "match", "meta")
META = "meta_json"
"""Field of a gate's document with the ``meta`` of its question, as JSON: what slices are named by, and nobody asks."""
PLACE = "place"
"""Field of a gate's document with its file and line, for people who look the question up; nobody asks it."""
SHAPE = "question (text) or messages or prompt, [answer | completion, match, meta]"
"""The keys of a question, for messages."""


def read_question(row: Mapping[str, Any], where: str) -> Question:
    """Return a row as a question: null counts as absent, except as an answer.

    Raises BadInput for an unknown key, for turns out of order or without a question at the end, and for an answer that
    ``match`` cannot look for.
    """
    row = {key: value for key, value in row.items() if value is not None or key == "answer"}
    for key in row:
        if key not in KNOWN:
            reject(where, f"a question has no {key!r}", suggest(key, KNOWN))
    match = row.get("match", "exact")
    if match not in MATCHES:
        reject(where, f"match is {match!r}", suggest(str(match), MATCHES))
    meta = row.get("meta", {})
    if not isinstance(meta, Mapping):
        reject(where, f"meta must be an object, not {shown(meta)}")
    return Question(
        prompt=_prompt(row, where), answers=_answers(row, match, where), match=match, meta=meta, where=where
    )


def _prompt(row: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
    given = [key for key in ASKED if key in row]
    if len(given) != 1:
        reject(where, "needs either question or messages", f"Give one of {', '.join(ASKED)}")
    (name,) = given
    asked = row[name]
    if name == "question" or (name == "prompt" and isinstance(asked, str)):
        asked = [{"role": "user", "content": asked}]
    listed = read_turns(asked, where, name)
    check_order(listed, where)
    if listed[-1]["role"] != "user":
        reject(where, "does not end with a question", "Leave out the answer that follows it")
    return tuple(listed)


def _answers(row: Mapping[str, Any], match: str, where: str) -> tuple[Any, ...]:
    """Return the alternatives; with ``json``, the one value itself."""
    given = [key for key in ANSWERED if key in row]
    if len(given) > 1:
        reject(where, "has an answer and a completion", "Keep one of the two")
    if not given:
        return ()
    answer = row[given[0]]
    if given == ["completion"] and not isinstance(answer, str):
        answer = _said(answer, where)
    options = answer if isinstance(answer, list) and match != "json" else [answer]
    if not options:
        reject(where, "has no answer", "Give the right answer")
    for option in options:
        if not is_usable(option, match):
            fix = f"With match: {match} the answer is {NEEDED[match]}"
            reject(where, f"match: {match} cannot look for the answer {shown(option)}", fix)
    return tuple(options)


def _said(completion: Any, where: str) -> str:
    """Return the text of a completion in messages."""
    turns = read_turns(completion, where, "completion")
    if len(turns) != 1 or turns[0]["role"] != "assistant" or not isinstance(turns[0].get("content"), str):
        reject(where, "completion is more than the text of one answer", "Give the right answer as a text")
    return str(turns[0]["content"])
