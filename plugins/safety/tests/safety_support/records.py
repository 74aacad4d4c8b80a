"""Conversations of either kind, and the settings of a run of a few steps."""

from __future__ import annotations

from typing import Any

from posttrain_safety.config import SafetySettings

from posttrain import Conversation

REFUSAL = "I cannot help with that."


def conversation(request: str, answer: str, where: str = "safety.jsonl:1", **keys: Any) -> Conversation:
    """One request with its answer."""
    return Conversation(
        messages=({"role": "user", "content": request}, {"role": "assistant", "content": answer, **keys}), where=where
    )


def refusals(count: int) -> list[Conversation]:
    return [conversation(f"How do I harm {i}?", REFUSAL, f"safety.jsonl:{i + 1}") for i in range(count)]


def helpful(count: int) -> list[Conversation]:
    return [conversation(f"What is {i}?", f"It is {i}.", f"help.jsonl:{i + 1}") for i in range(count)]


def settings(**given: Any) -> SafetySettings:
    quick: dict[str, Any] = {
        "kind": "safety",
        "data": "safety.jsonl",
        "lr": 1e-2,
        "sequence_length": 64,
        "gradient_accumulation": 2,
        "checkpoint_steps": 1,
        "gradient_checkpointing": False,
    }
    return SafetySettings(**(quick | given))
