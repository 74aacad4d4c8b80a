"""Ranges of numbers, declared at the field of the setting."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from posttrain import StageConfig, number


@dataclass(kw_only=True)
class Inner:
    rank: int = number(8, least=1)


@dataclass(kw_only=True)
class Settings(StageConfig):
    count: int = number(2, least=1)
    steps: int | None = number(None, least=1, hint="; leave it out to train whole epochs")
    rate: float = number(0.1, least=0)
    norm: float = number(1.0, above=0)
    ratio: float = number(0.5, least=0, most=1)
    decay: float = number(0.9, least=0, below=1)
    share: float = number(0.5, above=0, below=1)
    inner: Inner = field(default_factory=Inner)


@dataclass(kw_only=True)
class Child(Settings):
    rate: float = 0.2
    ratio: float = number(3.0, least=0, most=4)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("count", 0, "must be at least 1, not 0"),
        ("steps", 0, "must be at least 1, not 0; leave it out to train whole epochs"),
        ("rate", -0.1, "must be a finite number of at least 0, not -0.1"),
        ("rate", math.inf, "must be a finite number of at least 0, not inf"),
        ("rate", math.nan, "must be a finite number of at least 0, not nan"),
        ("norm", 0.0, "must be a finite number above 0, not 0.0"),
        ("norm", math.inf, "must be a finite number above 0, not inf"),
        ("ratio", 1.5, "must be between 0 and 1, not 1.5"),
        ("ratio", math.nan, "must be between 0 and 1, not nan"),
        ("decay", 1.0, "must be at least 0 and below 1, not 1.0"),
        ("share", 0.0, "must be above 0 and below 1, not 0.0"),
        ("share", -math.inf, "must be above 0 and below 1, not -inf"),
        ("count", True, "must be a number, not True"),
        ("rate", "0.1", "must be a number, not '0.1'"),
    ],
)
def test_a_number_outside_its_range_is_a_problem(setting: str, value: Any, message: str) -> None:
    assert list(Settings(**{setting: value}).problems()) == [(setting, message)]


def test_numbers_at_their_bounds_are_in_range() -> None:
    assert list(Settings(count=1, steps=1, rate=0, ratio=1, decay=0).problems()) == []


def test_a_nested_setting_is_named_by_its_path() -> None:
    assert list(Settings(inner=Inner(rank=0)).problems()) == [("inner.rank", "must be at least 1, not 0")]


def test_a_subclass_with_another_default_keeps_the_range_unless_it_gives_its_own() -> None:
    assert [name for name, _ in Child(rate=math.nan).problems()] == ["rate"]
    assert list(Child(ratio=3.5).problems()) == []
    assert [name for name, _ in Child(ratio=4.5).problems()] == ["ratio"]
