"""The choice of what is set aside from training for the eval loss: rows alike are on one side of it.

A trained row tells the loss of its near copy, so the rows of a cluster, as preparation found them, are set aside
together or not at all. Without clusters every name is chosen by itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from posttrain.errors import BadInput, Problem


def choose_held_out(
    names: Sequence[Any], share: float, seed: int, noun: str, clusters: Iterable[tuple[Any, int]] = ()
) -> set[Any]:
    """Return a seeded share of ``names``, at least one, and fewer where no cluster fits into what is left of it.

    Where every cluster is larger than the share, it is the smallest one.

    Args:
        names: Different names, in an order that does not depend on that of the data.
        share: Share of the names.
        seed: Seed of the choice.
        noun: Name of the names in messages.
        clusters: Pairs of a name and its cluster; a name may be in several, which are then one.

    Raises:
        BadInput: All names would be chosen, or all are of one cluster.
    """
    count = max(1, round(share * len(names)))
    if count == len(names):
        what = f"takes all of {count} different {noun}, and leaves none to train"
        raise BadInput(Problem(where="eval_share", what=what, fix="Lower eval_share, or give eval_data"))
    units = _units(names, clusters)
    if len(units) == 1:
        what = f"cannot be taken: all {len(names)} different {noun} are alike, and tell of each other"
        raise BadInput(Problem(where="eval_share", what=what, fix="Leave it out, or give eval_data"))
    if len(units) == len(names):
        return set(random.Random(f"eval/{seed}").sample(names, count))
    chosen: set[Any] = set()
    for unit in random.Random(f"eval/{seed}").sample(units, len(units)):
        if len(chosen) + len(unit) <= count:
            chosen.update(unit)
    smallest = min(units, key=len)
    return chosen or set(smallest)


def _units(names: Sequence[Any], clusters: Iterable[tuple[Any, int]]) -> list[list[Any]]:
    """Return the names that belong together, in their order."""
    pairs = list(clusters)
    if not pairs:
        return [[name] for name in names]
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    places = {name: place for place, name in enumerate(names)}
    nodes = {cluster: len(names) + node for node, cluster in enumerate(dict.fromkeys(each for _, each in pairs))}
    edges = [places[name] for name, _ in pairs], [nodes[cluster] for _, cluster in pairs]
    size = len(names) + len(nodes)
    _, numbers = connected_components(coo_array(([True] * len(pairs), edges), shape=(size, size)), directed=False)
    units: dict[int, list[Any]] = {}
    for place, name in enumerate(names):
        units.setdefault(int(numbers[place]), []).append(name)
    return list(units.values())
