"""Caps and samples: what is chosen, and that it is the same again."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.preparation import BalanceConfig, PrepareConfig, setting_problem
from posttrain.prepare import balance
from posttrain.prepare.balance import Rows, cover, features, locate, over_cap, spread, take_in_turn, unbalanced

TOPICS = {
    "cooking": "flour butter oven sugar dough yeast salt pastry",
    "sailing": "harbour rudder mast anchor keel wind tide rope",
    "chess": "bishop pawn castle queen endgame opening gambit rook",
    "mining": "shaft copper ore tunnel drill granite seam lamp",
}


def rows_of(counts: dict[str, int], seed: int = 0) -> tuple[list[str], list[str]]:
    """Texts of several topics in a random order, and the topic of each."""
    rng = random.Random(seed)
    topics = [topic for topic, count in counts.items() for _ in range(count)]
    rng.shuffle(topics)
    return [" ".join(rng.choices(TOPICS[topic].split(), k=12)) for topic in topics], topics


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2))), st.integers(0, 4))
def test_a_cap_keeps_the_best_of_each_group(rows: list[tuple[str, int]], most: int) -> None:
    groups, quality = [group for group, _ in rows], [float(each) for _, each in rows]
    over = over_cap(groups, most, quality)
    for group in set(groups):
        ranked = sorted((row for row, each in enumerate(groups) if each == group), key=lambda row: (-quality[row], row))
        assert [row for row in over if groups[row] == group] == sorted(ranked[most:])


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=40), st.integers(0, 45))
def test_groups_are_taken_in_turn(groups: list[str], count: int) -> None:
    chosen = take_in_turn(groups, count)
    assert len(chosen) == len(set(chosen)) == min(count, len(groups))
    taken, whole = Counter(groups[row] for row in chosen), Counter(groups)
    for one in whole:
        for other in whole:
            assert taken[one] >= taken[other] - 1 or taken[one] == whole[one]
        assert [row for row in chosen if groups[row] == one] == [row for row, each in enumerate(groups) if each == one][
            : taken[one]
        ]


def test_the_better_row_of_a_group_is_taken() -> None:
    assert take_in_turn(["a", "a", "b", "a"], 2, [0.0, 1.0, 0.0, 2.0]) == [2, 3]


def test_a_sample_is_spread_over_topics() -> None:
    texts, topics = rows_of({"cooking": 300, "sailing": 30, "chess": 30, "mining": 30})
    chosen = spread(texts, 40)
    taken = Counter(topics[row] for row in chosen)
    assert len(chosen) == 40
    assert min(taken[topic] for topic in TOPICS) >= 2
    assert taken["cooking"] < 0.9 * 300 / 390 * 40 + 5
    assert chosen == spread(texts, 40)


def test_a_covering_sample_is_nearer_to_all_rows_than_a_random_one() -> None:
    texts, topics = rows_of({"cooking": 150, "sailing": 40, "chess": 8, "mining": 2})
    features_NF = features(texts)

    def nearest(chosen: list[int]) -> float:
        return float((features_NF @ features_NF[chosen].T).max(axis=1).mean())

    chosen = cover(texts, 12)
    assert len(set(chosen)) == 12
    assert {topics[row] for row in chosen} >= {"cooking", "sailing", "chess"}
    assert nearest(chosen) > max(nearest(random.Random(seed).sample(range(200), 12)) for seed in range(20))
    assert chosen == cover(texts, 12)


def test_many_rows_are_spread_before_they_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "MOST_CANDIDATES", 50)
    texts, _ = rows_of(dict.fromkeys(TOPICS, 60))
    assert len(set(cover(texts, 10))) == 10


def test_the_lazy_choice_is_the_greedy_one() -> None:
    rng = np.random.default_rng(0)
    features_NF = rng.normal(size=(60, 6)).astype(np.float32)
    features_NF /= np.linalg.norm(features_NF, axis=1, keepdims=True)
    similar = np.rint(np.clip(features_NF @ features_NF.T, 0, 1) * balance.STEPS).astype(int)
    expected: list[int] = []
    for _ in range(9):
        sums = [-1 if row in expected else similar[[*expected, row]].max(axis=0).sum() for row in range(60)]
        expected.append(int(np.argmax(sums)))
    assert locate(features_NF, 9) == expected


@pytest.mark.parametrize("choose", [spread, cover])
def test_few_rows_all_stay(choose: object) -> None:
    assert choose(["one", "", "two"], 5) == [0, 1, 2]  # type: ignore[operator]
    assert choose([], 5) == []  # type: ignore[operator]
    assert len(choose(["", "", "the of", "one"], 2)) == 2  # type: ignore[operator]


def rows(declined: list[bool], groups: list[str] | None = None, quality: list[float] | None = None) -> Rows:
    count = len(declined)
    return Rows(
        text=lambda row: f"row {row}", is_declined=lambda row: declined[row], sources=[0] * count,
        groups=groups or [""] * count, quality=quality or [0.0] * count,
    )  # fmt: skip


def left_out(rows: Rows, /, **settings: float) -> dict[int, str]:
    return {row: rule for row, (rule, _) in unbalanced(rows, BalanceConfig(**settings))}


def test_groups_are_capped_and_rows_without_one_are_not() -> None:
    groups = ["a", "b", "a", "", "a", "", ""]
    found = left_out(rows([False] * 7, groups, [0, 0, 0, 0, 1, 0, 0]), per_group=2)
    assert found == {2: "group"}
    assert left_out(rows([False] * 7, groups), per_group=1) == {2: "group", 4: "group"}


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(0, 9), st.booleans())
def test_shares_hold_and_no_row_goes_that_could_stay(declined: list[bool], tenths: int, of_refused: bool) -> None:
    name = "refused" if of_refused else "helpful"
    out = left_out(rows(declined), **{name: tenths / 10})
    mine = [row for row, each in enumerate(declined) if each == of_refused]
    others = len(declined) - len(mine)
    stay = len(mine) - len(out)
    assert set(out.values()) <= {name}
    assert set(out) == set(mine[stay:])
    assert 10 * stay <= tenths * (stay + others)
    assert stay == len(mine) or 10 * (stay + 1) > tenths * (stay + 1 + others)


def test_a_sample_keeps_the_shares() -> None:
    declined = [row % 2 == 0 for row in range(60)]
    out = left_out(rows(declined), refused=0.2, rows=20)
    stay = [row for row in range(60) if row not in out]
    assert 0 < sum(declined[row] for row in stay) <= 0.2 * len(stay)
    assert len(stay) <= 20


def test_shares_of_less_than_all_rows_are_named() -> None:
    assert setting_problem(PrepareConfig(balance=BalanceConfig(refused=0.2, helpful=0.8))) is None
    problem = setting_problem(PrepareConfig(balance=BalanceConfig(refused=0.2, helpful=0.7)))
    assert problem is not None
    assert problem[0] == "balance"
