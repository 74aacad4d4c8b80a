"""Two halves of a gate's documents: by content, whole sources, nothing shared."""

from __future__ import annotations

import hashlib
import random

import pytest

from posttrain.gate.halves import Half, half_of, select_half

HASHES = {number: hashlib.sha256(f"document {number}".encode()).hexdigest() for number in range(2000)}


def test_every_document_is_in_exactly_one_half():
    choosing, judging = (select_half(HASHES, half) for half in Half)
    assert choosing | judging == set(HASHES)
    assert not choosing & judging
    assert abs(len(choosing) - 1000) < 4 * 22.4  # four standard deviations of 2,000 fair draws


def test_a_document_has_the_same_half_in_every_order_number_and_company():
    shuffled = list(HASHES.items())
    random.Random(0).shuffle(shuffled)
    chosen = {HASHES[document] for document in select_half(HASHES, Half.choosing)}
    some = dict(enumerate(found for _, found in shuffled[:300]))
    assert {some[document] for document in select_half(some, Half.choosing)} == chosen & set(some.values())


@pytest.mark.parametrize("half", Half)
def test_a_source_is_never_divided_and_has_the_same_half_when_seen_alone(half: Half):
    clusters = {document: document // 7 for document in HASHES}
    found = select_half(HASHES, half, clusters)
    assert {clusters[document] for document in found}.isdisjoint(clusters[each] for each in set(HASHES) - found)
    alone = {document: HASHES[document] for document in found}
    assert select_half(alone, half, {document: clusters[document] for document in found}) == found


def test_the_division_is_the_published_one():
    assert [half_of(HASHES[number]).value[0] for number in range(12)] == list("cjjcjccjjjjc")
