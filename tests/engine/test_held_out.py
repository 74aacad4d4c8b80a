"""What is set aside for the eval loss: rows alike on one side of it, and the former choice where no rows are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.engine.answers import set_aside
from posttrain.engine.held_out import choose_held_out
from posttrain.errors import BadInput
from posttrain.sft.examples import split_eval
from posttrain.tokens.chat import Rendered
from posttrain.tokens.table import TokenTable

NAMES = list(range(60))
GROUPS = st.lists(st.lists(st.integers(0, 59), min_size=1, max_size=8), max_size=6)


@dataclass(frozen=True)
class Row:
    """A prompt of two tokens, by its number."""

    number: int

    @property
    def prompt(self) -> Sequence[int]:
        return (self.number, 1)

    @property
    def where(self) -> str:
        return f"a.jsonl:{self.number}"


def told(groups: Sequence[Sequence[int]]) -> dict[str, int]:
    """Return the cluster of each row by its place; a row in several groups is in the last."""
    return {f"a.jsonl:{row}": number for number, group in enumerate(groups) for row in group}


@given(GROUPS, st.floats(0.01, 0.5), st.integers(0, 3))
def test_a_cluster_is_on_one_side(groups: list[list[int]], share: float, seed: int) -> None:
    pairs = [(row, number) for number, group in enumerate(groups) for row in group]
    chosen = choose_held_out(NAMES, share, seed, "records", pairs)
    for group in groups:
        assert len({row in chosen for row in group}) == 1
    assert choose_held_out(NAMES, share, seed, "records", reversed(pairs)) == chosen
    assert len(chosen) == max(1, round(share * 60)), "12 rows and more are alone, and fill what clusters leave"


@given(st.floats(0.01, 0.9), st.integers(0, 3))
def test_without_rows_alike_the_choice_is_a_seeded_sample(share: float, seed: int) -> None:
    sample = set(Random(f"eval/{seed}").sample(NAMES, max(1, round(share * 60))))
    assert choose_held_out(NAMES, share, seed, "records") == sample
    assert choose_held_out(NAMES, share, seed, "records", [(3, 0), (4, 1)]) == sample, "clusters of one row"


def test_where_all_clusters_are_larger_than_the_share_the_smallest_is_taken() -> None:
    pairs = [(row, int(row >= 4)) for row in range(10)]
    assert choose_held_out(NAMES[:10], 0.1, 0, "records", pairs) == {0, 1, 2, 3}
    with pytest.raises(BadInput, match="eval_share: cannot be taken: all 10 different records are alike"):
        choose_held_out(NAMES[:10], 0.1, 0, "records", [(row, 0) for row in range(10)])


@given(GROUPS, st.integers(0, 3))
def test_documents_and_answers_of_a_cluster_stay_together(groups: list[list[int]], seed: int) -> None:
    clusters = told(groups)
    rows = [Row(number) for number in NAMES]
    documents = TokenTable.of(Rendered([*row.prompt], [False, True], "", row.where) for row in rows).all()
    parts = split_eval(documents, 0.2, seed, clusters)
    trained, measured = ({each.where(place) for place in range(len(each))} for each in parts)
    assert len(measured) == 12
    assert {clusters[where] for where in trained & clusters.keys()}.isdisjoint(
        clusters[where] for where in measured & clusters.keys()
    )
    kept, held = set_aside(rows, 0.2, seed, clusters)
    assert ({row.where for row in kept}, {row.where for row in held}) == (trained, measured)
