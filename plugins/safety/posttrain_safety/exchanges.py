"""Requests of a conversation, each with the kind of its trained answer."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain import Conversation, TrainOn, declines
from posttrain_safety.config import SafetySettings


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request with the kind of its answer."""

    request: str
    """Last user turn before the answer."""
    declined: bool


def exchanges(record: Conversation, settings: SafetySettings) -> list[Exchange]:
    """Return every trained answer of ``record`` with its request."""
    found: list[Exchange] = []
    request = ""
    for message in record.messages:
        if message["role"] == "user":
            request = str(message["content"])
        elif message["role"] == "assistant" and message.get("train", True):
            found.append(Exchange(request, declines(message)))
    return found[-1:] if settings.train_on is TrainOn.last else found


def has_declined(record: Conversation, settings: SafetySettings) -> bool:
    """Return True when a trained answer of ``record`` declines."""
    return any(exchange.declined for exchange in exchanges(record, settings))
