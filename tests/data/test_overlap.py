"""Rows that are trained on and scored are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.schema import Source
from posttrain.data.overlap import count_overlap


def write(name: str, *rows: dict[str, Any]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


ROWS = [{"q": str(number), "a": "yes"} for number in range(6)]


@pytest.mark.parametrize(("scored", "shared"), [(ROWS[4:], 2), (ROWS[:1] * 3, 3), ([{"q": "0", "a": "no"}], 0)])
def test_rows_that_are_trained_as_well_are_counted(scored: list[dict[str, Any]], shared: int) -> None:
    sources = [Source(path=write("one.jsonl", *ROWS[:3])), Source(path=write("two.jsonl", *ROWS[3:]))]
    assert count_overlap(sources, [write("scored.jsonl", *scored)]) == [(shared, len(scored))]


def test_order_of_keys_and_nulls_do_not_count_and_limits_do() -> None:
    scored = write("scored.jsonl", {"a": "yes", "q": "2", "hint": None}, ROWS[5])
    assert count_overlap([Source(path=write("train.jsonl", *ROWS))], [scored]) == [(2, 2)]
    assert count_overlap([Source(path="train.jsonl", limit=3)], [scored]) == [(1, 2)]


def test_hub_names_are_not_looked_into() -> None:
    assert count_overlap([Source(path="openai/gsm8k")], [write("scored.jsonl", *ROWS)]) == [(0, 6)]


def test_several_files_are_counted_each_for_itself() -> None:
    train = [Source(path=write("train.jsonl", *ROWS[:3]))]
    assert count_overlap(train, [write("one.jsonl", *ROWS[2:4]), write("two.jsonl", *ROWS[4:])]) == [(1, 2), (0, 2)]
