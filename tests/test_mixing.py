"""Mixing: weights decide how often a record is seen, and the seed which."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.schema import Source
from posttrain.data.mixing import mix
from posttrain.data.records import Conversation
from posttrain.errors import BadInput


def source(tmp_path: Path, name: str, count: int, **options: Any) -> Source:
    path = tmp_path / f"{name}.jsonl"
    lines = [json.dumps({"prompt": f"{name}{n}", "completion": "ok"}) + "\n" for n in range(count)]
    path.write_text("".join(lines))
    return Source(path=str(path), **options)


def prompts(sources: list[Source], seed: int = 0) -> list[str]:
    records = mix(sources, "conversations", seed)
    return [record.messages[0]["content"] for record in records if isinstance(record, Conversation)]


def test_sources_follow_one_another_in_order(tmp_path: Path) -> None:
    mixed = prompts([source(tmp_path, "b", 2), source(tmp_path, "a", 2)])
    assert mixed == ["b0", "b1", "a0", "a1"]


@pytest.mark.parametrize(("weight", "once", "twice"), [(1, 10, 0), (2, 0, 10), (0.5, 5, 0), (1.5, 5, 5), (0.01, 1, 0)])
def test_weight_is_how_often_a_record_is_seen(tmp_path: Path, weight: float, once: int, twice: int) -> None:
    seen = Counter(Counter(prompts([source(tmp_path, "a", 10, weight=weight)])).values())
    assert (seen[1], seen[2], sum(seen.values())) == (once, twice, once + twice)


def test_the_seed_decides_which_half(tmp_path: Path) -> None:
    half = [source(tmp_path, "a", 40, weight=0.5)]
    assert prompts(half, seed=1) == prompts(half, seed=1)
    assert prompts(half, seed=1) != prompts(half, seed=2)


def test_equal_sources_draw_different_halves(tmp_path: Path) -> None:
    half = source(tmp_path, "a", 40, weight=0.5)
    mixed = prompts([half, half])
    assert mixed[:20] != mixed[20:]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weights_that_are_no_positive_number_are_refused(tmp_path: Path, weight: float) -> None:
    with pytest.raises(BadInput, match=r"a\.jsonl: weight is .*\n.*above 0"):
        prompts([source(tmp_path, "a", 2, weight=weight)])


def test_empty_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="names no source"):
        prompts([])
    with pytest.raises(BadInput, match="holds no records"):
        prompts([source(tmp_path, "full", 2), source(tmp_path, "empty", 0)])
