"""Balance: caps of groups, and samples that cover what a set of rows is about, without a model.

A row's features are its words but the most common English ones, hashed, weighted by how rare they are, and projected at
random; rows about the same lie close together. Caps come first: clusters balance topics, not sources.

N = rows, C = chosen ones among the candidates, F = features.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.config.preparation import BalanceConfig, Choice

FEATURES = 128
"""Features of a row."""
WORD_BITS = 16
"""Bits of a hashed word."""
DENSITY = 1 / 16
"""Share of the features that a word has a part in."""
SAMPLE = 20_000
"""Rows from which weights of words and centres of clusters are learned; all rows are then assigned."""
MOST_CANDIDATES = 10_000
"""Rows that are compared with each other: each pair takes two bytes."""
CLUSTERS = 100
"""Clusters at most; a cluster has ten rows or more on average."""
BATCH = 2000
STEPS = 1000
"""Steps of a similarity from 0 to 1; whole numbers have the same sums on every machine."""

Features = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows among which balance chooses. Functions compute the slow parts, for the rows that need them."""

    text: Callable[[int], str]
    """Text of a row."""
    is_declined: Callable[[int], bool]
    """Returns true for a row whose answer declines a request."""
    sources: Sequence[Hashable]
    groups: Sequence[str]
    """Value of the field by which rows are capped; empty for none."""
    quality: Sequence[float]
    """The better rows stay."""


class Texts(Sequence[str]):
    """Texts made as they are asked for: all of them at once would be as large as the data."""

    def __init__(self, text: Callable[[int], str], rows: Sequence[int]) -> None:
        self._text, self._rows = text, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        rows = self._rows[index]
        return self._text(rows) if isinstance(rows, int) else [self._text(row) for row in rows]


def unbalanced(rows: Rows, config: BalanceConfig) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yield the rows that balance leaves out, each with its rule and the reason.

    The order is length, source, group, shares, sample, and shares once more: a sample of topics has shares of its own.
    """
    left = list(range(len(rows.sources)))
    for judge in (_long, _of_sources, _of_groups, _of_shares, _beyond_sample, _of_shares):
        out = dict(judge(rows, left, config))
        yield from sorted(out.items())
        left = [row for row in left if row not in out]


Reasons = Iterator[tuple[int, tuple[str, str]]]
"""Rows that are left out, each with its rule and the reason."""


def _long(rows: Rows, left: Sequence[int], config: BalanceConfig) -> Reasons:
    if (most := config.longest) is not None:
        words = {row: len(rows.text(row).split()) for row in left}
        yield from ((row, ("length", f"{count:,} words")) for row, count in words.items() if count > most)


def _of_sources(rows: Rows, left: Sequence[int], config: BalanceConfig) -> Reasons:
    if (most := config.per_source) is not None:
        for at in over_cap([rows.sources[row] for row in left], most, [rows.quality[row] for row in left]):
            yield left[at], ("source", f"more than {most:,} rows of it")


def _of_groups(rows: Rows, left: Sequence[int], config: BalanceConfig) -> Reasons:
    if (most := config.per_group) is not None:
        named = [row for row in left if rows.groups[row]]
        for at in over_cap([rows.groups[row] for row in named], most, [rows.quality[row] for row in named]):
            yield named[at], ("group", f"more than {most:,} rows of {rows.groups[named[at]]}")


def _of_shares(rows: Rows, left: Sequence[int], config: BalanceConfig) -> Reasons:
    if config.refused is None and config.helpful is None:
        return
    parts: dict[bool, list[int]] = {True: [], False: []}
    for row in left:
        parts[rows.is_declined(row)].append(row)
    for name, share, one, other in (
        ("refused", config.refused, parts[True], parts[False]), ("helpful", config.helpful, parts[False], parts[True])
    ):  # fmt: skip
        if share is None:
            continue
        most = int(Fraction(str(share)) * len(other) / (1 - Fraction(str(share))))
        for at in over_cap([name] * len(one), most, [rows.quality[row] for row in one]):
            yield one[at], (name, f"more than {share:.0%} of the rows")


def _beyond_sample(rows: Rows, left: Sequence[int], config: BalanceConfig) -> Reasons:
    if config.rows is not None:
        choose = spread if config.choose is Choice.spread else cover
        chosen = set(choose(Texts(rows.text, left), config.rows, [rows.quality[row] for row in left]))
        yield from ((row, ("sample", "not chosen")) for at, row in enumerate(left) if at not in chosen)


def over_cap(groups: Sequence[Hashable], most: int, quality: Sequence[float] | None = None) -> list[int]:
    """Return the rows beyond the best ``most`` of their group, the first among equals."""
    counts: Counter[Hashable] = Counter()
    over = []
    for row in _ranked(len(groups), quality):
        counts[groups[row]] += 1
        if counts[groups[row]] > most:
            over.append(row)
    return sorted(over)


def spread(texts: Sequence[str], count: int, quality: Sequence[float] | None = None) -> list[int]:
    """Return ``count`` rows, taken in turn from clusters of the texts, the best of each first."""
    if count >= len(texts):
        return list(range(len(texts)))
    return take_in_turn(clusters(features(texts)).tolist(), count, quality)


def cover(texts: Sequence[str], count: int, quality: Sequence[float] | None = None) -> list[int]:
    """Return the ``count`` rows to which all others are most similar, among at most MOST_CANDIDATES spread ones."""
    if count >= len(texts):
        return list(range(len(texts)))
    features_NF = features(texts)
    candidates = list(range(len(texts)))
    if len(texts) > MOST_CANDIDATES:
        candidates = take_in_turn(clusters(features_NF).tolist(), max(MOST_CANDIDATES, count), quality)
    chosen = locate(features_NF[candidates], count)
    return sorted(candidates[each] for each in chosen)


def features(texts: Sequence[str]) -> Features:
    """Return the features of texts, each row of length 1, or 0 for a text without words."""
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.preprocessing import normalize
    from sklearn.random_projection import SparseRandomProjection

    hashing = HashingVectorizer(n_features=1 << WORD_BITS, stop_words="english", norm=None, alternate_sign=False)
    weights = TfidfTransformer(sublinear_tf=True).fit(hashing.transform(_sample(texts)))
    projection = SparseRandomProjection(FEATURES, density=DENSITY, dense_output=True, random_state=0)
    projection.fit(hashing.transform([""]))
    found = np.zeros((len(texts), FEATURES), np.float32)
    for first in range(0, len(texts), BATCH):
        weighted = weights.transform(hashing.transform(texts[first : first + BATCH]))
        found[first : first + BATCH] = normalize(projection.transform(weighted))
    return found


def clusters(features_NF: Features) -> NDArray[np.int32]:
    """Return the number of each row's cluster."""
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    count = max(1, min(CLUSTERS, len(features_NF) // 10))
    means = MiniBatchKMeans(count, random_state=0, n_init=1)
    with threadpool_limits(1):  # sums in another order would move rows between clusters
        means.fit(_sample(features_NF))
        found = [means.predict(features_NF[first : first + BATCH]) for first in range(0, len(features_NF), BATCH)]
    return np.concatenate(found).astype(np.int32)


def take_in_turn(groups: Sequence[Hashable], count: int, quality: Sequence[float] | None = None) -> list[int]:
    """Return ``count`` rows, one of each group in turn, the best of each first; a group used up is passed over."""
    turns: list[tuple[int, int, int]] = []
    seen: Counter[Hashable] = Counter()
    for rank, row in enumerate(_ranked(len(groups), quality)):
        turns.append((seen[groups[row]], rank, row))
        seen[groups[row]] += 1
    return sorted(row for _, _, row in heapq.nsmallest(count, turns))


def locate(features_NF: Features, count: int) -> list[int]:
    """Return ``count`` rows chosen one by one, each the one that adds most to the similarity of all rows to the chosen.

    Greedy facility location: at least 63 % of the best choice (Nemhauser, Wolsey, Fisher 1978), lazily (Minoux 1978).
    """
    similar_NN = np.empty((len(features_NF), len(features_NF)), np.int16)
    for first in range(0, len(features_NF), BATCH):
        products = features_NF[first : first + BATCH] @ features_NF.T
        similar_NN[first : first + BATCH] = np.rint(np.clip(products, 0, 1) * STEPS)
    best_N = np.zeros(len(features_NF), np.int16)
    gains = [(-int(row.sum(dtype=np.int64)), at, 0) for at, row in enumerate(similar_NN)]
    heapq.heapify(gains)
    chosen: list[int] = []
    while gains and len(chosen) < count:
        _, row, known = heapq.heappop(gains)
        if known == len(chosen):  # no gain grows later on: the first that is up to date is the largest
            chosen.append(row)
            np.maximum(best_N, similar_NN[row], out=best_N)
        else:
            gain = int(np.maximum(similar_NN[row] - best_N, 0).sum(dtype=np.int64))
            heapq.heappush(gains, (-gain, row, len(chosen)))
    return chosen


def _ranked(count: int, quality: Sequence[float] | None) -> Iterator[int]:
    """Yield rows, the best first, the first among equals."""
    yield from range(count) if quality is None else sorted(range(count), key=lambda row: -quality[row])


def _sample(rows: Any) -> Any:
    """Return SAMPLE of the rows at even distances, or all when there are fewer."""
    return rows[:: max(1, -(-len(rows) // SAMPLE))]
