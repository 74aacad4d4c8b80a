"""Advice about settings: rules of the field, and every departure from one named with the reason, and never changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Config = TypeVar("Config")
Facts = TypeVar("Facts")


@dataclass(frozen=True)
class Rule(Generic[Config, Facts]):
    """One setting, its usual value, and the reason."""

    setting: str
    """Name of the setting, below its stage."""
    usual: str
    """Usual value, in words."""
    why: str
    """Reason, to follow the word ``because``."""
    departure: Callable[[Config, Facts], str | None]
    """Returns the departure from the usual value; None when there is none, or a fact is unknown."""


@dataclass(frozen=True)
class Advice(Generic[Config, Facts]):
    """Rules about the settings of one kind of stage, in the light of facts about its data and model."""

    rules: Sequence[Rule[Config, Facts]]
    """Rules in the order in which departures are named."""

    def departures(self, config: Config, facts: Facts) -> list[str]:
        """Return every departure: the setting as it is, its usual value, and the reason."""
        found = [(rule, rule.departure(config, facts)) for rule in self.rules]
        return [f"{rule.setting}: {what}; usual is {rule.usual}, because {rule.why}" for rule, what in found if what]

    def table(self) -> str:
        """Return all rules as a Markdown table."""
        rows = [f"| `{rule.setting}` | {rule.usual} | {rule.why} |" for rule in self.rules]
        return "\n".join(["| setting | usual | because |", "|---|---|---|", *rows])
