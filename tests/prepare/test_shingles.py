"""Hashes of words and k-grams beside Python's own words."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.prepare import shingles as module
from posttrain.prepare.shingles import k_grams, normalise, shingles, spell, words

LETTERS = st.text("aAbB _19.,-\n\t\0éß“”ñ")
TEXTS = st.lists(LETTERS, max_size=8)


def numbered(rows: list[list[object]]) -> list[list[int]]:
    """Rows in which equal things have equal numbers, by their first place."""
    known: dict[object, int] = {}
    return [[known.setdefault(each, len(known)) for each in row] for row in rows]


@given(TEXTS)
def test_words_have_equal_hashes_where_they_are_equal(texts: list[str]) -> None:
    flat = words([normalise(text) for text in texts])
    expected = [re.findall(r"\w+", text.lower()) for text in texts]
    assert numbered([flat.row(row).tolist() for row in range(len(flat))]) == numbered([[*row] for row in expected])
    assert [spell(normalise(text)) for text in texts] == expected


@given(TEXTS, st.integers(1, 4), st.booleans())
def test_k_grams_have_equal_hashes_where_they_are_equal(texts: list[str], k: int, whole: bool) -> None:
    flat = k_grams(words([normalise(text) for text in texts]), k, whole=whole)
    expected: list[list[object]] = []
    for text in texts:
        found = re.findall(r"\w+", text.lower())
        runs = [tuple(found[at : at + k]) for at in range(len(found) - k + 1)]
        expected.append([*runs] or [tuple(found)] * (whole and bool(found)))
    assert numbered([flat.row(row).tolist() for row in range(len(flat))]) == numbered(expected)


@given(st.text())
def test_normal_texts_differ_in_more_than_case_and_spaces(text: str) -> None:
    assert normalise(text) == " ".join(text.lower().split()).encode()
    assert normalise(normalise(text).decode()) == normalise(" ".join(text.lower().split()))


@pytest.mark.parametrize("slab", [16, 60, 1 << 16])
def test_the_size_of_slabs_changes_nothing(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    texts = [" ".join("abcdef"[: rng.randint(1, 6)] for _ in range(rng.randint(0, 40))).encode() for _ in range(50)]
    expected = words(texts)
    monkeypatch.setattr(module, "SLAB", slab)
    found = words(texts)
    assert np.array_equal(found.hashes, expected.hashes)
    assert np.array_equal(found.offsets, expected.offsets)


def test_hashes_are_the_same_everywhere() -> None:
    texts = [normalise("Two plus two is FOUR"), "四是二加二".encode()]
    expected = [
        8262137308779568856,
        10192377050766135082,
        3262888057662430461,
        4200785901937430925,
    ]
    assert shingles(texts).hashes.tolist() == expected
