"""Packing: its time and the fill of its rows, beside TRL's best-fit packing of the same documents.

    python benchmarks/packing.py [--documents 20000] [--lengths 1000000]

Both get lists of token ids with their masks and give packed rows of both. TRL needs them in a table first, which is
timed by itself. It packs every thousand documents by themselves, the default of its trainer. Lengths
are log-normal, median 400, as of conversations.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars
from trl import pack_dataset

from posttrain.tokens.chat import Rendered
from posttrain.tokens.packing import few_bins, pack

CAPACITY = 4096
MEDIAN, SPREAD = 400.0, 0.9


def drawn_lengths(count: int) -> list[int]:
    """Draw ``count`` seeded lengths, none above the capacity."""
    drawn = np.random.default_rng(0).lognormal(np.log(MEDIAN), SPREAD, count)
    lengths: list[int] = drawn.astype(int).clip(8, CAPACITY).tolist()
    return lengths


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of ``work``, and the seconds it took."""
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def main() -> None:
    """Print one line for each packing of the same documents, their ratio, and the time for many lengths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--lengths", type=int, default=1_000_000)
    options = parser.parse_args()
    disable_progress_bars()

    lengths = drawn_lengths(options.documents)
    tokens = sum(lengths)
    documents = [Rendered([7] * length, [False] + [True] * (length - 1), "") for length in lengths]
    columns = {"input_ids": [each.ids for each in documents], "mask": [each.mask for each in documents]}
    print(f"{len(lengths):,} documents, {tokens:,} tokens, rows of {CAPACITY:,} slots")
    packing, own = timed(lambda: pack(documents, CAPACITY))
    print(f"posttrain  {own:.2f} s, {packing.counts.rows:,} rows, {packing.counts.fill:.2%} filled")
    dataset, table = timed(lambda: Dataset.from_dict(columns))
    packed, other = timed(lambda: pack_dataset(dataset, CAPACITY, strategy="bfd"))
    fill = tokens / (len(packed) * CAPACITY)
    print(f"TRL        {other:.2f} s and {table:.2f} s for the table, {len(packed):,} rows, {fill:.2%} filled")
    print(f"TRL / posttrain: time {other / own:.2f}, with the table {(other + table) / own:.2f}, ", end="")
    print(f"rows {len(packed) / packing.counts.rows:.4f}")

    many = drawn_lengths(options.lengths)
    bins, seconds = timed(lambda: few_bins(many, CAPACITY))
    print(f"{len(many):,} lengths into bins: {seconds:.2f} s, {sum(many) / (len(bins) * CAPACITY):.3%} filled")


if __name__ == "__main__":
    main()
