"""Run a million conversations whole: preparation, store, packing, one optimizer step, and a second start.

    python benchmarks/million.py FOLDER [--rows 1000000] [--words FILE] [--workers 2]

The words of each conversation are drawn from a file, about 200 tokens of the quickstart's tokenizer; the run trains
the quickstart's base for one step. Every start is a process of its own, and its clock begins once the libraries are
imported: the first with all rows, then in TURNS one with 8 rows and one with all, each with another seed of training,
so that nothing but the data is known. FOLDER keeps data and runs: a killed benchmark resumes where its run was.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BASE = ROOT / "recipes/quickstart/base"
TOKENS = 200
TURNS = 3
SETTINGS = {"max_steps": 1, "sequence_length": 512, "per_device_batch_size": 1, "gradient_accumulation": 1}


@dataclass(frozen=True, kw_only=True)
class Start:
    """Figures of one start of the run."""

    wall: float
    processor: float
    """Seconds of all of its processes."""
    peak: float
    """Megabytes resident in the command."""
    worker_peak: float
    """Megabytes resident in the largest process that it started, with what both share."""
    tokens: int


def write_rows(path: Path, rows: int, words: list[str]) -> None:
    """Write ``rows`` different conversations, seeded."""
    from transformers import AutoTokenizer

    rng = random.Random(0)
    sample = " ".join(rng.choices(words, k=10_000))
    rate = len(AutoTokenizer.from_pretrained(BASE)(sample, verbose=False)["input_ids"]) / 10_000
    asked, said = round(TOKENS * 0.35 / rate), round(TOKENS * 0.65 / rate)
    draft = path.with_suffix(".draft")
    with draft.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            texts = [" ".join(rng.choices(words, k=rng.randint(count // 2, count * 3 // 2))) for count in (asked, said)]
            file.write(json.dumps({"prompt": texts[0], "completion": texts[1]}) + "\n")
    draft.rename(path)


def start(folder: Path, records: Path, overrides: tuple[str, ...]) -> Start:
    """Run the recipe on ``records`` in a process of its own; return its figures."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # its process may have processes, unlike one of a Pool
        return pool.submit(_start, folder, records, overrides).result()


def _start(folder: Path, records: Path, overrides: tuple[str, ...]) -> Start:
    import posttrain.sft.stage  # noqa: F401  the libraries of a training take seconds, with any data
    from posttrain.testing.project import Project

    project = Project(folder=folder / "project", kind="sft", settings=SETTINGS)
    if not project.folder.is_dir():
        project.folder.mkdir()
        project.write()
    began, before = time.monotonic(), _processor()
    given = [f"sft.data={records}", f"model.path={BASE}", *overrides]
    directory = project.run(folder / "runs", *given)
    wall, processor = time.monotonic() - began, _processor() - before
    manifest = json.loads(next(directory.path.glob("stages/sft/artifact/manifest.json")).read_text())
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    tokens = manifest["metrics"]["epoch_tokens"]
    return Start(wall=wall, processor=processor, peak=peaks[0], worker_peak=peaks[1], tokens=tokens)


def _processor() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def show(name: str, rows: int, found: Start) -> None:
    """Print the figures of a start."""
    speed = f"{rows / found.processor:,.0f} rows a processor second, {rows / found.wall:,.0f} by the clock"
    print(f"{name:8} {found.processor:,.1f} s of processors, {found.wall:,.1f} by the clock; {speed}")
    print(f"{'':8} peak {found.peak:,.0f} MB in the command, {found.worker_peak:,.0f} in a process of it", flush=True)


def measure(folder: Path, asked: Any) -> None:
    """Print the figures of all starts."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [word for word in asked.words.read_text().split() if word.isascii() and not set(word) & set('<>|{}"\\')]
    few, many = folder / "few.jsonl", folder / f"{asked.rows}.jsonl"
    for path, rows in ((few, 8), (many, asked.rows)):
        if not path.exists():
            write_rows(path, rows, words)
    workers = f"data_workers={asked.workers}"
    start(folder, few, (workers,))  # the disk, and what machine and model take
    first = start(folder, many, (workers, f"seed={asked.seed}"))
    show("first", asked.rows, first)
    stores = [path for path in (folder / "runs/cache/tokens").iterdir() if path.is_dir()]
    size = max(sum(file.stat().st_size for file in path.iterdir()) for path in stores)
    print(f"{'':8} {first.tokens:,} tokens, {size / first.tokens:.2f} bytes a token in the store")
    more = []
    for turn in range(1, TURNS + 1):
        empty, again = (start(folder, path, (workers, f"seed={asked.seed + turn}")) for path in (few, many))
        show("8 rows", 8, empty)
        show("again", asked.rows, again)
        more.append(again.processor - empty.processor)
    listed = ", ".join(f"{each:.1f}" for each in sorted(more))
    print(f"{'':8} {statistics.median(more):.1f} s of processors more than with 8 rows ({listed})")


def main() -> None:
    """Print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--words", type=Path, default=ROOT / "README.md")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of training: another one trains again")
    asked = parser.parse_args()
    measure(asked.folder.absolute(), asked)


if __name__ == "__main__":
    main()
