"""Real gates of the quickstart's base over itself: the share that promotes, where only the batch size differs.

    python benchmarks/base_gates.py [--samples 20]

The base answers the quickstart's questions with four batch sizes in two number formats. Every ordered pair of batch
sizes is a gate about seeded samples of the documents, decided as in a run. docs/gates.md holds the result.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import permutations
from pathlib import Path

from posttrain.artifact import ModelSource
from posttrain.config.paths import shipped
from posttrain.config.schema import Dtype, GateConfig, GateTask, ModelConfig, Role
from posttrain.gate.spec import DocumentScore, GateRequest, Scorecard
from posttrain.gate.verdict import judge
from posttrain.model.base import resolve_base
from posttrain.model.device import default_device
from posttrain.model.loading import load_model, load_tokenizer
from posttrain.scoring.evaluate import evaluate
from posttrain.scoring.systems import Loading

BATCHES = (1, 7, 16, 64)
SAMPLE = 300
"""Documents of a gate."""
QUICKSTART = shipped("recipes") / "quickstart"
TASKS = {
    "towns_facts": GateTask(task=str(QUICKSTART / "tasks" / "towns_facts.yaml"), role=Role.lift, metric="exact_match"),
    "towns_documents": GateTask(
        task=str(QUICKSTART / "tasks" / "towns_documents.yaml"), role=Role.guard, metric="acc", max_drop=0.05
    ),
}


class Silence:
    """A GateProgress that shows nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""

    def advance(self, system: str, task: str, done: int, total: int) -> None:
        """Show nothing."""


def score_base(base: ModelSource, dtype: str, batch: int, folder: Path) -> Scorecard:
    """Return the base's answers."""
    request = GateRequest(
        stage="base", gate=GateConfig(batch_size=batch), tasks=TASKS, systems={"candidate": base}, dtype=dtype,
        cache=folder / "cache", scorecard=folder / "scorecard.jsonl",
    )  # fmt: skip
    return evaluate(request, Silence(), Loading(load_model, load_tokenizer, default_device().type))


def judge_samples(base: ModelSource, cards: Mapping[int, Scorecard], samples: int) -> Iterator[str]:
    """Return the state of every gate of one number format."""
    request = GateRequest(
        stage="base", gate=GateConfig(), tasks=TASKS, systems={"base": base, "candidate": base}, dtype="",
        cache=Path(), scorecard=Path(),
    )  # fmt: skip
    for seed, (old, new) in enumerate(list(permutations(BATCHES, 2)) * samples):
        chosen = set(random.Random(seed).sample(range(400), SAMPLE))
        rows = (*_rows(cards[old], "base", chosen), *_rows(cards[new], "candidate", chosen))
        card = replace(cards[old], rows=rows, documents=dict.fromkeys(TASKS, SAMPLE))
        yield judge(request, card).state


def _rows(card: Scorecard, system: str, chosen: set[int]) -> Iterator[DocumentScore]:
    return (replace(row, system=system) for row in card.rows if row.doc_id in chosen)


def count_differing(cards: Mapping[int, Scorecard]) -> int:
    """Count the documents whose score depends on the batch size."""
    scores: dict[tuple[str, int], set[float]] = {}
    for card in cards.values():
        for row in card.rows:
            scores.setdefault((row.task, row.doc_id), set()).add(row.metrics[TASKS[row.task].metric])
    return sum(len(found) > 1 for found in scores.values())


def main() -> None:
    """Print a line for each number format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20, help="gates of each pair of batch sizes")
    options = parser.parse_args()
    base = resolve_base(ModelConfig(path=str(QUICKSTART / "base")))
    for dtype in Dtype:
        with tempfile.TemporaryDirectory() as folder:
            cards = {batch: score_base(base, dtype.value, batch, Path(folder)) for batch in BATCHES}
        states = list(judge_samples(base, cards, options.samples))
        counts = ", ".join(f"{states.count(state)} {state}" for state in ("pass", "undecided", "fail"))
        print(
            f"{dtype.value}: {len(states)} gates: {counts}; {count_differing(cards)} of 800 documents differ",
            flush=True,
        )


if __name__ == "__main__":
    main()
