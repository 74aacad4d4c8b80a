"""Answers that decline a request, recognised by their first words."""

from __future__ import annotations

import re

from posttrain.data.records import Conversation, Message

OPENING = 200
"""Searched characters at the start of an answer: further on, "I cannot" is about something else."""

REFUSAL = re.compile(
    r"\bI(?:['’]m| am| must| have to| will| would)?(?: (?:really|truly|very|afraid|sorry|but|that|,|I))*"
    r" (?:cannot|can['’]t|can not|won['’]t|will not|not going to|not able to|unable to|not be able to|decline|refuse"
    r"|(?:not|do not feel|don['’]t feel) comfortable)"
    r"(?: (?:in good conscience|to|with|you|be|able|me|directly|fully|currently))*"
    r" (?:help(?!\s+but)|assist|compl|fulfil|provid|answer|creat|writ|generat|shar|giv|support|discuss|engag|do that"
    r"|do this|respond|offer|produc|participat|request|promot|instruct)"
    r"|\bI must (?:respectfully )?(?:decline|refuse)\b"
    r"|\bI(?:['’]m| am) (?:sorry|afraid),? (?:but )?(?:I )?(?:can['’]t|cannot|can not|won['’]t)\b(?! help but)"
    r"|\bas an ai(?: language)?(?: model| assistant)?,? I (?:cannot|can['’]t|am not able|do not|don['’]t)\b",
    re.IGNORECASE,
)
"""English ways to decline, after the phrases of arXiv:2307.15043; other languages are not recognised."""


def opens_with_decline(answer: str) -> bool:
    """Return true when ``answer`` begins by declining."""
    return REFUSAL.search(answer[:OPENING]) is not None


def declines(message: Message) -> bool:
    """Return true when an assistant turn declines: by its key ``refuses`` if it has one, else by its first words."""
    marked = message.get("refuses")
    return opens_with_decline(str(message["content"] or "")) if marked is None else bool(marked)


def is_declined(record: Conversation) -> bool:
    """Return true when a trained answer of ``record`` declines."""
    answers = [message for message in record.messages if message["role"] == "assistant"]
    return any(declines(message) for message in answers if message.get("train", True))
