"""Packing: nothing is lost, split or asked across a border, and hardly a slot stays empty."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.schema import Overlong
from posttrain.errors import BadInput
from posttrain.tokens.best_fit import best_fit
from posttrain.tokens.chat import Rendered
from posttrain.tokens.exact_fit import exact_fit
from posttrain.tokens.overlong import NAMED
from posttrain.tokens.packing import Packing, few_bins, pack


def document(ids: list[int], mask: list[bool]) -> Rendered:
    return Rendered(ids, mask, "")


@st.composite
def documents(draw: st.DrawFn) -> list[Rendered]:
    """Documents whose tokens are all different, so that each can be found again."""
    masks = draw(st.lists(st.lists(st.booleans(), max_size=24), min_size=1, max_size=30))
    made, first = [], 1
    for mask in masks:
        made.append(document(list(range(first, first + len(mask))), mask))
        first += len(mask)
    return made


def packed_documents(packing: Packing) -> list[tuple[list[int], list[bool]]]:
    found = []
    for row in packing.rows:
        for start, end in zip(row.cu_seqlens(), row.cu_seqlens()[1:], strict=False):
            found.append((row.input_ids[start:end].tolist(), row.mask[start:end].tolist()))
    return sorted(found)


def expected_documents(given: list[Rendered], length: int) -> list[tuple[list[int], list[bool]]]:
    cut = [(d.ids[:length], [False, *d.mask[1:length]][: len(d.ids)]) for d in given]
    return sorted((ids, mask) for ids, mask in cut if any(mask))


@given(documents(), st.integers(2, 30), st.booleans())
def test_every_token_of_every_kept_document_once_and_in_order(given: list[Rendered], length: int, on: bool) -> None:
    expected = expected_documents(given, length)
    if not expected:
        with pytest.raises(BadInput, match=f"no trained token in {len(given)} records"):
            pack(given, length, packing=on)
        return
    packing = pack(given, length, packing=on)
    assert packed_documents(packing) == expected
    assert all(len(row.input_ids) == len(row.mask) == sum(row.lengths) <= length for row in packing.rows)


@given(documents(), st.integers(2, 30), st.booleans())
def test_counts_add_up(given: list[Rendered], length: int, on: bool) -> None:
    kept = expected_documents(given, length)
    if not kept:
        return
    counts = pack(given, length, packing=on).counts
    assert counts.documents == len(given) == counts.packed + counts.untrained
    assert counts.packed == len(kept)
    assert counts.tokens == sum(len(ids) for ids, _ in kept)
    assert counts.trained_tokens == sum(sum(mask) for _, mask in kept)
    whole = {d.ids[0]: len(d.ids) for d in given if d.ids}
    assert counts.truncated == sum(whole[ids[0]] > length for ids, _ in kept)
    assert counts.cut_tokens == sum(whole[ids[0]] - len(ids) for ids, _ in kept)
    assert counts.fill == counts.tokens / (counts.rows * length)


@given(documents(), st.integers(2, 30))
def test_targets_are_the_next_token_of_the_same_document_if_it_is_trained(given: list[Rendered], length: int) -> None:
    if not expected_documents(given, length):
        return
    packing = pack(given, length)
    source = {token: (d, place) for d in given for place, token in enumerate(d.ids)}
    asked = 0
    for row in packing.rows:
        targets, positions = row.targets(), row.position_ids()
        for t, token in enumerate(row.input_ids.tolist()):
            origin, place = source[token]
            assert positions[t] == place
            following = place + 1
            trained = following < min(len(origin.ids), length) and origin.mask[following]
            assert targets[t] == (origin.ids[following] if trained else -100)
            asked += trained
    assert asked == packing.counts.trained_tokens


def test_a_row_looks_as_drawn() -> None:
    given = [document([11, 12, 13], [True, False, True]), document([21, 22], [False, True])]
    (row,) = pack(given, 8).rows
    assert row.input_ids.tolist() == [11, 12, 13, 21, 22]
    assert row.targets().tolist() == [-100, 13, -100, 22, -100]
    assert row.targets(ignore_index=-1).tolist() == [-1, 13, -1, 22, -1]
    assert row.position_ids().tolist() == [0, 1, 2, 0, 1]
    assert row.cu_seqlens().tolist() == [0, 3, 5]
    assert [str(array.dtype) for array in (row.input_ids, row.mask, row.cu_seqlens())] == ["int32", "bool", "int32"]


def test_documents_without_a_trained_token_are_counted_and_left_out() -> None:
    given = [
        document([1, 2], [False, True]),
        document([3, 4], [False, False]),
        document([5, 6], [True, False]),  # nothing predicts a first token
        document([7, 8, 9], [False, False, True]),  # its answer is cut off
        document([], []),
    ]
    packing = pack(given, 2)
    assert packed_documents(packing) == [([1, 2], [False, True])]
    assert (packing.counts.untrained, packing.counts.truncated, packing.counts.packed) == (4, 0, 1)


# --- Documents longer than a row --------------------------------------------------------------------------------------


@given(documents(), st.integers(2, 12))
def test_the_pieces_of_a_split_document_are_the_document(given: list[Rendered], length: int) -> None:
    everything = [document(d.ids, [True] * len(d.ids)) for d in given]
    for whole in everything:
        if len(whole.ids) < 2:  # a single token predicts nothing
            continue
        rows = pack([whole], length, packing=False, overlong=Overlong.split).rows
        pieces = [row.input_ids.tolist() for row in rows]
        assert [token for piece in pieces for token in piece] == whole.ids[: sum(map(len, pieces))]
        assert len(whole.ids) - sum(map(len, pieces)) <= 1  # nor does one at the end
        assert all(len(piece) == length for piece in pieces[:-1])
        assert all(row.mask.tolist() == [False] + [True] * (len(row.mask) - 1) for row in rows)


@given(documents(), st.integers(2, 12), st.booleans())
def test_split_documents_keep_every_trained_token_but_those_that_nothing_predicts(
    given: list[Rendered], length: int, on: bool
) -> None:
    asked = [(token, i) for d in given for i, (token, m) in enumerate(zip(d.ids, d.mask, strict=True)) if m and i]
    targets = sorted(token for token, place in asked if place % length)
    if not targets:
        return
    packing = pack(given, length, packing=on, overlong=Overlong.split)
    assert sorted(token for row in packing.rows for token in row.input_ids[row.mask].tolist()) == targets
    stand = [token for row in packing.rows for token in row.input_ids.tolist()]
    assert len(stand) == len(set(stand))
    counts = packing.counts
    left_out = sum(len(d.ids) for d in given if not any(m for i, m in enumerate(d.mask) if i % length))
    assert counts.tokens + counts.cut_tokens + left_out == sum(len(d.ids) for d in given)
    kept = {token for d in given if any(m for i, m in enumerate(d.mask) if i % length) for token in d.ids}
    assert counts.unpredicted == sum(place % length == 0 for token, place in asked if token in kept)
    assert (counts.truncated, counts.pieces) == (0, sum(len(row.lengths) for row in packing.rows))
    assert counts.documents == counts.packed + counts.untrained == len(given)
    assert all(len(row.input_ids) <= length for row in packing.rows)


def test_a_long_document_is_cut_split_or_rejected() -> None:
    long = Rendered(list(range(10)), [False] + [True] * 9, "", "long.jsonl:7")
    short = Rendered([20, 21], [False, True], "", "short.jsonl:1")
    cut = pack([long, short], 4, overlong=Overlong.truncate)
    assert packed_documents(cut)[0] == ([0, 1, 2, 3], [False, True, True, True])
    assert list(cut.counts.notes()) == [
        "1 of 2 records are longer than 4 tokens and cut there: 6 tokens lost (overlong=truncate)"
    ]
    split = pack([long, short], 4, overlong=Overlong.split)
    assert [ids for ids, _ in packed_documents(split)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [20, 21]]
    assert (split.counts.split, split.counts.pieces, split.counts.unpredicted) == (1, 4, 2)
    assert list(split.counts.notes()) == [
        "1 of 2 records are longer than 4 tokens and split: 2 tokens begin a piece and are not trained (overlong=split)"
    ]
    with pytest.raises(BadInput, match=r"long\.jsonl:7: has 10 tokens, a row takes 4\n.*1 of 2 records are longer"):
        pack([long, short], 4, overlong=Overlong.reject)
    assert list(pack([long, short], 10, overlong=Overlong.reject).counts.notes()) == []


def test_the_error_names_the_first_few_and_counts_all() -> None:
    long = [Rendered([1] * 9, [False] + [True] * 8, "", f"a.jsonl:{number}") for number in range(1, 21)]
    with pytest.raises(BadInput) as caught:
        pack(long, 4, overlong=Overlong.reject)
    assert [problem.where for problem in caught.value.problems[:-1]] == [f"a.jsonl:{n}" for n in range(1, NAMED + 1)]
    assert "20 of 20 records are longer than 4 tokens" in caught.value.problems[-1].what


def test_nothing_to_train_names_the_length_that_cut_it_off() -> None:
    with pytest.raises(BadInput, match=r"(?s)no trained token in 1 records.*longest has 3 tokens.*above 2"):
        pack([document([7, 8, 9], [False, False, True])], 2)
    with pytest.raises(BadInput, match="no trained token in 0 records"):
        pack([], 8)


def test_without_packing_every_document_has_its_own_row_in_order() -> None:
    given = [document([n, n + 1], [False, True]) for n in (10, 30, 20)]
    rows = pack(given, 8, packing=False).rows
    assert [row.input_ids.tolist() for row in rows] == [[10, 11], [30, 31], [20, 21]]


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 40))
def test_best_fit_takes_the_fullest_bin_that_fits(lengths: list[int], capacity: int) -> None:
    spaces: list[int] = []  # the same rule, tried bin by bin
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, space in enumerate(spaces) if space >= length]
        if fitting:
            spaces[min(fitting, key=lambda number: spaces[number])] -= length
        else:
            spaces.append(capacity - length)
    bins = best_fit(lengths, capacity)
    assert sorted(index for group in bins for index in group) == list(range(len(lengths)))
    assert sorted(capacity - sum(lengths[index] for index in group) for group in bins) == sorted(spaces)
    assert list(bins) == list(best_fit(lengths, capacity))


@given(st.integers(4, 60), st.lists(st.lists(st.integers(1, 59), max_size=6), min_size=1, max_size=40))
def test_bins_are_few_nothing_is_lost_and_none_is_too_full(capacity: int, cuts: list[list[int]]) -> None:
    lengths = []  # full bins taken apart, so that the best number of bins is known
    for cut in cuts:
        borders = sorted({0, capacity, *(place for place in cut if place < capacity)})
        lengths += [end - start for start, end in pairwise(borders)]
    for put in (best_fit, exact_fit, few_bins):
        bins = put(lengths, capacity)
        assert sorted(index for group in bins for index in group) == list(range(len(lengths)))
        assert max(sum(lengths[index] for index in group) for group in bins) <= capacity
        assert list(bins) == list(put(lengths, capacity))
    assert len(few_bins(lengths, capacity)) <= len(best_fit(lengths, capacity)) <= 11 / 9 * len(cuts) + 1


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ([7, 5, 3, 3, 2], [[7, 3], [5, 2, 3]]),  # one item fills the bin, two items do
        ([6, 3, 2, 2, 1], [[6, 2, 2], [3, 1]]),  # of two pairs the more equal one, to save the short item
        ([8, 1, 1], [[8, 1, 1]]),  # both items of one length
        ([8, 1], [[8, 1]]),  # not the same item twice
        ([4, 3, 3], [[4, 3, 3]]),
        ([9, 8], [[9], [8]]),
    ],
)
def test_exact_fit_leaves_no_gap_where_it_can(lengths: list[int], sizes: list[list[int]]) -> None:
    assert [[lengths[index] for index in group] for group in exact_fit(lengths, 10)] == sizes


def best_one_by_one(lengths: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    spaces: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = [space for space, numbers in spaces.items() if numbers and space >= lengths[index]]
        if not fitting:
            spaces.setdefault(capacity, []).append(len(bins))
            bins.append([])
        space = min(fitting, default=capacity)
        number = spaces[space].pop()
        bins[number].append(index)
        spaces.setdefault(space - lengths[index], []).append(number)
    return bins


def exact_one_by_one(lengths: list[int], capacity: int) -> list[list[int]]:
    waiting: dict[int, list[int]] = {size: [] for size in range(capacity + 1)}
    for index, length in enumerate(lengths):
        waiting[length].append(index)
    bins = []
    while any(waiting.values()):
        found = [max(size for size in waiting if waiting[size])]
        bins.append([waiting[found[0]].pop()])
        while found:
            space = capacity - sum(lengths[index] for index in bins[-1])
            single = [space] if space and waiting[space] else []
            pairs = [
                [size, space - size]
                for size in range(space // 2, 0, -1)
                if (len(waiting[size]) > 1 if size * 2 == space else waiting[size] and waiting[space - size])
            ]
            longest = [size for size in range(space, 0, -1) if waiting[size]][:1]
            found = single or (pairs[0] if pairs else longest)
            bins[-1] += [waiting[size].pop() for size in found]
    return bins


@given(st.lists(st.integers(1, 12), max_size=120), st.integers(12, 30), st.integers(1, 9))
def test_bins_filled_at_once_are_those_filled_one_by_one(lengths: list[int], capacity: int, copies: int) -> None:
    many = lengths * copies
    assert list(best_fit(many, capacity)) == best_one_by_one(many, capacity)
    assert list(exact_fit(many, capacity)) == exact_one_by_one(many, capacity)


@pytest.mark.parametrize("capacity", [1024, 2048, 4096])
def test_lengths_that_are_much_alike_fill_the_slots_as_well(capacity: int) -> None:
    """5,000 lengths like those of worked solutions, median 204: best fit alone leaves 0.6 to 1.8 % empty."""
    lengths = np.random.default_rng(0).lognormal(np.log(204), 0.3, 5000).astype(int).clip(8, capacity).tolist()
    assert sum(lengths) / (len(best_fit(lengths, capacity)) * capacity) < 0.995
    assert sum(lengths) / (len(few_bins(lengths, capacity)) * capacity) >= 0.995


@pytest.mark.parametrize("capacity", [2048, 4096])
@pytest.mark.parametrize("median", [90, 150, 250, 400, 650])
@pytest.mark.parametrize("spread", [0.9, 1.2])
def test_chat_like_lengths_fill_the_slots(median: float, spread: float, capacity: int) -> None:
    """5,000 log-normal lengths, those above the capacity cut: from short answers to long conversations."""
    drawn = np.random.default_rng(0).lognormal(np.log(median), spread, 5000)
    lengths = drawn.astype(int).clip(8, capacity).tolist()
    assert sum(lengths) / (len(few_bins(lengths, capacity)) * capacity) >= 0.995


def test_a_million_lengths_take_seconds() -> None:
    lengths = np.random.default_rng(0).lognormal(6.0, 0.9, 1_000_000).astype(int).clip(8, 4096).tolist()
    began = time.process_time()
    bins = few_bins(lengths, 4096)
    assert time.process_time() - began < 120  # what compares all pairs would take hours
    assert sum(map(len, bins)) == len(lengths)


def test_the_content_of_rows_is_that_of_their_tokens_masks_and_borders() -> None:
    def content(ids: list[list[int]], trained: int = 1, length: int = 8, packing: bool = True, at: str = "") -> bytes:
        masks = [[place >= trained for place in range(len(each))] for each in ids]
        documents = [Rendered(each, mask, "", at) for each, mask in zip(ids, masks, strict=True)]
        return pack(documents, length, packing=packing).rows.content()

    ids = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]
    others = [
        content([[1, 2, 4], *ids[1:]]), content(ids[:2]), content([ids[0] + ids[1][:1], ids[1][1:], ids[2]]),
        content(ids, trained=2), content(ids, length=3), content(ids, packing=False), content([*ids, ids[0]]),
    ]  # fmt: skip
    assert len({*others, content(ids)}) == len(others) + 1
    assert content(ids) == content(ids, at="moved.jsonl:1"), "a record may move to another file"
