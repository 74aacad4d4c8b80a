"""What is asked in a conversation, and whether the trained answer declines."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain import Conversation, TrainOn, declines
from posttrain_safety.config import SafetySettings


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request with the kind of its answer."""

    request: str
    """The last user turn before the answer."""
    refused: bool


def exchanges(record: Conversation, settings: SafetySettings) -> list[Exchange]:
    """Every trained answer of ``record`` with its request."""
    found: list[Exchange] = []
    request = ""
    for message in record.messages:
        if message["role"] == "user":
            request = str(message["content"])
        elif message["role"] == "assistant" and message.get("train", True):
            found.append(Exchange(request, declines(message)))
    return found[-1:] if settings.train_on is TrainOn.last else found


def refused(record: Conversation, settings: SafetySettings) -> bool:
    """Whether a trained answer of ``record`` is a refusal."""
    return any(exchange.refused for exchange in exchanges(record, settings))
