"""The data path: rendering a row, several processes, a second start, bytes and memory of the store.

    python benchmarks/data.py [--records 2000]

Conversations of four answers are rendered by the quickstart's tokenizer. The limit is what any renderer has to do: the
template once, and the encoding of all texts in one batch.
"""

from __future__ import annotations

import argparse
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from posttrain import environment
from posttrain.data.held import digest_records
from posttrain.data.records import Conversation
from posttrain.engine.config import TrainOn
from posttrain.sft.examples import Rendering
from posttrain.tokens.filling import Fill
from posttrain.tokens.packing import pack
from posttrain.tokens.store import store_key, stored_table

ROOT = Path(__file__).parents[1]
ANSWERS = 4


def conversation(number: int, words: list[str], rng: random.Random) -> Conversation:
    """Return a conversation of ANSWERS answers, about 800 tokens for a large vocabulary."""
    roles = [("user", 45), ("assistant", 75)] * ANSWERS
    messages = tuple({"role": role, "content": " ".join(rng.choices(words, k=count))} for role, count in roles)
    return Conversation(messages=messages, where=f"train.jsonl:{number}")


def timed(clock: Callable[[], float], work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that ``work`` took by ``clock``, and its result."""
    began = clock()
    result = work()
    return clock() - began, result


def main() -> None:
    """Print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=2000)
    count = parser.parse_args().records
    environment.prepare()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes/quickstart/base")
    words = [word for word in (ROOT / "README.md").read_text().split() if not set(word) & set("<>|")]
    rng = random.Random(0)
    records = [conversation(number, words, rng) for number in range(count)]
    rendering = Rendering(tokenizer, TrainOn.all)
    rendering.table(records[:20])

    def limit() -> Any:
        texts = [tokenizer.apply_chat_template([*each.messages], tokenize=False) for each in records]
        return tokenizer(texts, add_special_tokens=False, verbose=False)

    own, table = timed(time.process_time, lambda: rendering.table(records))
    least, _ = timed(time.process_time, limit)
    print(f"{count:,} rows of {ANSWERS} answers, {len(table.ids):,} tokens")
    print(f"rendering  {1e3 * own / count:.2f} ms a row, {own / least:.2f} times the template once and one batch")

    with tempfile.TemporaryDirectory() as folder:
        key = store_key(digest_records(records), tokenizer, train_on="all")
        walls = {}
        for workers in (1, 2):
            place = Path(folder, str(workers))
            fill = Fill(records=records, rows=rendering.rows, workers=workers)
            walls[workers], _ = timed(time.perf_counter, lambda p=place, f=fill: stored_table(p, key, f))  # type: ignore[misc]
        again, stored = timed(time.perf_counter, lambda: stored_table(Path(folder, "1"), key, fill))
        size = sum(path.stat().st_size for path in Path(folder, "1", key).iterdir())
        seconds, packing = timed(time.perf_counter, lambda: pack(stored.all(), 2048))
    print(f"a fill     {walls[1]:.1f} s by one process, {walls[1] / walls[2]:.2f} times as fast by two")
    print(f"a hit      {again:.2f} s, {size / len(table.ids):.2f} bytes a token on disk")
    print(f"packing    {seconds:.2f} s, {len(packing.rows):,} rows, {packing.counts.fill:.2%} filled")
    print(f"peak       {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB resident")


if __name__ == "__main__":
    main()
