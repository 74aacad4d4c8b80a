"""The data path: rendering a row, several processes, a second start, bytes and memory of the store.

    python benchmarks/data.py [--records 2000] [--rows 100000]

Conversations of four answers are rendered by the quickstart's tokenizer. The limit is what any renderer has to do: the
template once, and the encoding of all texts in one batch. Both take turns at PART conversations, beside the same other
work on the machine, and so does a rendering of every beginning of a conversation. Times are processor seconds; a ratio
is the median of ROUNDS, with the least and the largest. Then ``--rows`` of about 200 tokens go through a whole run on a
tiny model with one optimizer step, once with an empty store and once with a full one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from posttrain import environment
from posttrain.data.held import digest_records
from posttrain.data.records import Conversation
from posttrain.engine.config import TrainOn
from posttrain.sft.examples import Rendering
from posttrain.testing.project import Project
from posttrain.tokens.filling import Fill
from posttrain.tokens.history import Historian
from posttrain.tokens.packing import pack
from posttrain.tokens.store import store_key, stored_table
from posttrain.tokens.table import TableRow

ROOT = Path(__file__).parents[1]
ANSWERS = 4
SLOTS = 64
PART, ROUNDS = 20, 5
SETTINGS = {"max_steps": 1, "sequence_length": 2048, "per_device_batch_size": 1, "gradient_accumulation": 1}


def conversation(number: int, words: list[str], rng: random.Random) -> Conversation:
    """Return a conversation of ANSWERS answers, about 800 tokens for a large vocabulary."""
    roles = [("user", 45), ("assistant", 75)] * ANSWERS
    messages = tuple({"role": role, "content": " ".join(rng.choices(words, k=count))} for role, count in roles)
    return Conversation(messages=messages, where=f"train.jsonl:{number}")


def timed(work: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """Return the least processor seconds of this process that ``work`` took, and its result."""
    found = []
    for _ in range(repeats):
        began = time.process_time()
        result = work()
        found.append(time.process_time() - began)
    return min(found), result


class Clock:
    """Renders, and counts the processor seconds of each process that does."""

    def __init__(self, rendering: Rendering) -> None:
        self._rendering, self._seconds = rendering, RawArray("d", SLOTS)

    def rows(self, records: Sequence[Any]) -> Iterator[TableRow]:
        """Render records."""
        yield from self._rendering.rows(records)
        self._seconds[os.getpid() % SLOTS] = time.process_time()  # of a forked process: from its start

    @property
    def seconds(self) -> list[float]:
        """Those of each process."""
        return [each for each in self._seconds if each]


def measure_rendering(records: list[Conversation], tokenizer: Any) -> None:
    """Print the time of a row beside the limit, and beside that of rendering every beginning by itself."""
    rendering, turns = Rendering(tokenizer, TrainOn.all), Rendering(tokenizer, TrainOn.all)
    follow = Historian.follow

    def limit(part: list[Conversation]) -> Any:
        texts = [tokenizer.apply_chat_template([*each.messages], tokenize=False) for each in part]
        return tokenizer(texts, add_special_tokens=False, verbose=False)

    def each_beginning(part: list[Conversation]) -> Any:
        Historian.follow = lambda *given: None  # type: ignore[method-assign,assignment]
        try:
            return turns.table(part)
        finally:
            Historian.follow = follow  # type: ignore[method-assign]

    ways: tuple[Callable[[list[Conversation]], Any], ...] = (rendering.table, limit, each_beginning)
    tokens = len(rendering.table(records).ids)
    rounds = []
    for _ in range(ROUNDS):
        spent = [0.0] * len(ways)
        for number, at in enumerate(range(0, len(records), PART)):
            for turn in range(len(ways)):
                place = (number + turn) % len(ways)  # each is the first as often: the first one finds no text in caches
                spent[place] += timed(partial(ways[place], records[at : at + PART]))[0]
        rounds.append(spent)
    own = 1e3 * statistics.median(each[0] for each in rounds) / len(records)
    print(f"{len(records):,} rows of {ANSWERS} answers, {tokens:,} tokens")
    print(f"rendering  {own:.2f} ms a row")
    for place, name in ((1, "the template once and one batch"), (2, "rendering every beginning by itself")):
        ratios = sorted(each[0] / each[place] for each in rounds)
        print(f"           {statistics.median(ratios):.2f} times {name} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def measure_store(records: list[Conversation], tokenizer: Any) -> None:
    """Print what filling, a hit and packing take."""
    rendering = Rendering(tokenizer, TrainOn.all)
    with tempfile.TemporaryDirectory() as folder:
        key = store_key(digest_records(records), tokenizer, train_on="all")
        began = time.perf_counter()
        alone, _ = timed(lambda: stored_table(Path(folder, "1"), key, Fill(records=records, rows=rendering.rows)))
        first = time.perf_counter() - began
        clock = Clock(rendering)
        fill = Fill(records=records, rows=clock.rows, workers=2)
        began = time.perf_counter()
        parent, _ = timed(lambda: stored_table(Path(folder, "2"), key, fill))
        second = time.perf_counter() - began
        again, stored = timed(lambda: stored_table(Path(folder, "1"), key, fill))
        size = sum(path.stat().st_size for path in Path(folder, "1", key).iterdir())
        seconds, packing = timed(lambda: pack(stored.all(), 2048))
    parts = " and ".join(f"{each:.2f}" for each in clock.seconds)
    gain = alone / (parent + max(clock.seconds))
    print(f"a fill     {alone:.2f} s by one process; by two {parts}, and {parent:.2f} of the command: {gain:.2f} times")
    print(f"           {first / second:.2f} times by the wall, {first:.1f} and {second:.1f} s")
    print(f"a hit      {again:.2f} s, {size / len(stored.ids):.2f} bytes a token on disk")
    print(f"packing    {seconds:.2f} s, {len(packing.rows):,} rows, {packing.counts.fill:.2%} filled")


def measure_run(rows: int, words: list[str], rng: random.Random) -> None:
    """Print what a run of one optimizer step takes, with an empty store and with a full one."""
    with tempfile.TemporaryDirectory() as folder:
        project = Project(folder=Path(folder), kind="sft", settings=SETTINGS).write()
        output = Path(folder, "runs")
        project.run(output, "data_workers=1", "seed=2")  # imports
        empty, _ = timed(lambda: project.run(output, "data_workers=1"))
        with (Path(folder) / "records.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(rows):
                asked, said = (" ".join(rng.choices(words, k=count)) for count in (12, 20))
                file.write(json.dumps({"prompt": asked, "completion": said}) + "\n")
        first, directory = timed(lambda: project.run(output, "data_workers=1"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        second, _ = timed(lambda: project.run(output, "data_workers=1", "seed=1"))
        manifest = json.loads(next(directory.path.glob("stages/sft/artifact/manifest.json")).read_text())
    tokens = manifest["metrics"]["epoch_tokens"]
    print(f"a run      {rows:,} rows, {tokens:,} tokens, one step: {first:.1f} s; {empty:.1f} s with 8 rows")
    print(f"again      {second:.1f} s, {second - empty:.1f} more than with 8 rows")
    print(f"peak       {peak:,.0f} MB resident in the run")


def main() -> None:
    """Print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=100_000)
    asked = parser.parse_args()
    environment.prepare()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes/quickstart/base")
    words = [word for word in (ROOT / "README.md").read_text().split() if word.isascii() and not set(word) & set("<>|")]
    rng = random.Random(0)
    if asked.records:
        records = [conversation(number, words, rng) for number in range(asked.records)]
        measure_rendering(records, tokenizer)
        measure_store(records, tokenizer)
    if asked.rows:
        measure_run(asked.rows, words, rng)


if __name__ == "__main__":
    main()
