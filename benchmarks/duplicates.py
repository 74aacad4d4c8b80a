"""Duplicates: processor time, memory and recall, beside rensa's own deduplicator on the words of the same rows.

    python benchmarks/duplicates.py [--rows 100000] [--unchecked]

Rows of random sentences, 155 words on average: 70 % distinct, 10 % copies (a quarter of them in capitals and other
spaces), 18 % with 1 to 20 % of their words edited, 2 % with other numbers. Each contender is a process of its own, and
reads the same Parquet file. A row with an earlier one of its family at a Jaccard similarity of 0.8 ought to go.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow
from pyarrow import parquet

from posttrain.prepare.near import find_duplicates

ROOT = Path(__file__).parents[1]
THRESHOLD = 0.8
BATCH = 2000
FAMILIES = 20_000
"""Latest rows of which copies are made."""


def made_rows(count: int) -> Iterator[tuple[str, int]]:
    """Yield each row and the number of the row that it is made from, its own for a distinct one."""
    rng = random.Random(0)
    words = sorted(set(re.findall(r"[a-z]{2,}", "".join(p.read_text() for p in sorted(ROOT.glob("docs/*.md"))))))
    sentences = [
        " ".join([*rng.choices(words, k=rng.randint(6, 20)), str(rng.randrange(10_000))]).capitalize() + "."
        for _ in range(60_000)
    ]
    originals: list[tuple[int, str]] = []
    for row in range(count):
        kind = rng.random()
        if kind < 0.7 or not originals:
            text, origin = " ".join(rng.choices(sentences, k=rng.randint(4, 18))), row
            if len(originals) < FAMILIES:
                originals.append((row, text))
            else:
                originals[rng.randrange(FAMILIES)] = (row, text)
        else:
            origin, text = rng.choice(originals)
            if kind < 0.8:
                text = text.upper().replace(" ", "  ") if rng.random() < 0.25 else text
            elif kind < 0.98:
                text = edited(text, rng.uniform(0.01, 0.2), words, rng)
            else:
                text = re.sub(r"\d+", lambda _: str(rng.randrange(10_000)), text)
        yield text, origin


def edited(text: str, share: float, words: Sequence[str], rng: random.Random) -> str:
    """Return a text of which a share of the words is replaced, left out, or has another one behind it."""
    found = text.split()
    for _ in range(max(1, round(share * len(found)))):
        at, kind = rng.randrange(len(found)), rng.random()
        found[at : at + 1] = [rng.choice(words)] if kind < 0.6 else [] if kind < 0.8 else [found[at], rng.choice(words)]
    return " ".join(found)


def write_rows(path: Path, count: int) -> None:
    """Write the rows into a Parquet file."""
    schema = pyarrow.schema([("text", pyarrow.string()), ("origin", pyarrow.int64())])
    rows = made_rows(count)
    with parquet.ParquetWriter(path, schema) as writer:
        for first in range(0, count, 50_000):
            texts, origins = zip(*(next(rows) for _ in range(min(50_000, count - first))), strict=True)
            writer.write_table(pyarrow.table([pyarrow.array(texts), pyarrow.array(origins)], schema=schema))


def read_rows(path: Path) -> Iterator[list[str]]:
    """Yield the texts in batches."""
    for batch in parquet.ParquetFile(path).iter_batches(BATCH, columns=["text"], use_threads=False):
        yield batch.column(0).to_pylist()


def ours(path: Path) -> Iterable[int]:
    """Return the rows that go by this project."""
    with tempfile.TemporaryDirectory() as folder:
        found = find_duplicates(lambda: read_rows(path), threshold=THRESHOLD, folder=Path(folder))
    return [each.row for each in found]


def rensa(path: Path) -> Iterable[int]:
    """Return the rows that go by rensa's deduplicator, fed with words."""
    from rensa import RMinHash, RMinHashDeduplicator

    deduplicator = RMinHashDeduplicator(THRESHOLD, 128, True, 16)
    gone, first = [], 0
    for batch in read_rows(path):
        tokens = [re.findall(r"\w+", text.lower()) for text in batch]
        signed = RMinHash.from_token_sets(tokens, 128, 42)
        added = deduplicator.add_pairs([(str(first + at), each) for at, each in enumerate(signed)])
        gone += [first + at for at, new in enumerate(added) if not new]
        first += len(batch)
    return gone


CONTENDERS: dict[str, Callable[[Path], Iterable[int]]] = {"ours": ours, "rensa": rensa}


def run(name: str, path: Path, output: Path) -> None:
    """Run a contender, and write what it took and what goes."""
    began = time.process_time()
    gone = [*CONTENDERS[name](path)]
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    output.write_text(json.dumps({"seconds": seconds, "peak": peak, "gone": gone}))


def shingles(text: str, size: int) -> set[tuple[str, ...]]:
    """Return the runs of words of a text."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[at : at + size]) for at in range(len(words) - size + 1)}


def due(path: Path, size: int) -> set[int]:
    """Return the rows that ought to go, by shingles of ``size`` words."""
    table = parquet.read_table(path)
    texts, origins = table["text"].to_pylist(), table["origin"].to_pylist()
    families: dict[int, list[int]] = {}
    for row, origin in enumerate(origins):
        families.setdefault(origin, []).append(row)
    found = set()
    for family in families.values():
        sets = [shingles(texts[row], size) for row in family] if len(family) > 1 else []
        for at, one in enumerate(sets):
            if any(len(one & other) >= THRESHOLD * len(one | other) for other in sets[:at]):
                found.add(family[at])
    return found


def main() -> None:
    """Print a line for each contender, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--unchecked", action="store_true", help="leave out recall, which holds all rows in memory")
    parser.add_argument("--contender", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        name, path, output = arguments.contender
        return run(name, Path(path), Path(output))
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder, "rows.parquet"), Path(folder, "result.json")
        write_rows(path, arguments.rows)
        print(f"{arguments.rows:,} rows, {path.stat().st_size / 1e6:,.0f} MB")
        for name, size in (("ours", 3), ("rensa", 1)):
            command = [sys.executable, __file__, "--contender", name, str(path), str(output)]
            subprocess.run(command, check=True)
            result = json.loads(output.read_text())
            seconds[name], gone = result["seconds"], set(result["gone"])
            line = f"{name:6} {seconds[name]:6.1f} s of one processor, {result['peak']:,.0f} MB, {len(gone):,} rows go"
            if not arguments.unchecked:
                expected = due(path, size)
                line += f"; {len(gone & expected) / len(expected):.2%} of {len(expected):,} found, "
                line += f"{len(gone - expected) / len(gone):.2%} of them wrongly"
            print(line, flush=True)
    print(f"ours takes {seconds['ours'] / seconds['rensa']:.2f} of rensa's time")


if __name__ == "__main__":
    main()
