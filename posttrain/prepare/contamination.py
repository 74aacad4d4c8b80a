"""Contaminated rows: records that hold what a gate asks, so that its score would show memory, not skill.

Prompts are compared with prompts, and answers with targets. A row holds a document when runs of 8 words in common cover
more than half of the document's words, or when all of a document of 5 to 7 words is in it, word for word. Runs that
more than 10 documents of a task have in common are its template, and tell nothing: words in no other run do not count.

D = documents of one side, E = runs of words in all documents, H = hits: a run of a row in one place of a document.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from posttrain.prepare.shingles import Flat, Hashes, k_grams, normalise, spell, words

RUN = 8
"""Words of a run."""
SHORTEST = 5
"""Words of the shortest document that is looked for."""
MOST_COVERED = 0.5
"""Share of a document's words that a row may hold."""
PHRASE = 13
"""Words in common that are shown."""
MOST_DOCUMENTS = 10
"""Documents of a task with the same run of words before it counts as template."""
BATCH = 2000
"""Rows compared at once."""
MOST_BITS = 26

Places = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class GateDocument:
    """A document that a gate scores."""

    task: str
    document: int
    """Number of the document in its task."""
    prompt: str
    """The question, without examples of other documents."""
    target: str
    """The answer that the task holds to be right; empty when it has none."""

    @property
    def text(self) -> str:
        """Question and answer."""
        return "\n\n".join(part for part in (self.prompt, self.target) if part)


@dataclass(frozen=True, slots=True)
class Contamination:
    """A document of a gate that a row holds."""

    task: str
    document: int
    covered: float
    """Share of the document's words that the row holds, those of the task's template left out."""
    evidence: str
    """The longest run of words in common."""
    side: Literal["prompt", "answer"] = "prompt"
    """The part of the row that holds the same part of the document."""
    kind: Literal["covered", "whole", "phrase"] = "covered"
    """``covered``: more than half of the words; ``whole``: all of a short document; ``phrase``: 13 words, no more."""


def find_contamination(
    rows: Iterable[Sequence[tuple[str, str]]], documents: Sequence[GateDocument], *, phrases: bool = False
) -> Iterator[tuple[int, Contamination]]:
    """Yield the number of each contaminated row with each document that it holds, the one that it holds most of first.

    Args:
        rows: Prompts and answers of each row, a pair for each of its turns.
        documents: Documents of all tasks of the gates.
        phrases: Yield phrases of 13 words in common, too, which contaminate no row by themselves.
    """
    by_task = sorted(documents, key=lambda each: each.task)
    prompts, targets = ([normalise(text) for text in side] for side in _sides(by_task))
    sides = (_Side("prompt", prompts, by_task), _Side("answer", targets, by_task))
    remaining, first = iter(rows), 0
    while batch := list(itertools.islice(remaining, BATCH)):
        numbers = np.repeat(np.arange(len(batch)), [len(row) for row in batch])
        found: dict[int, list[Contamination]] = {}
        for part, side in enumerate(sides):
            texts = [normalise(turn[part]) for row in batch for turn in row]
            for number, hit in side.find(texts, numbers):
                if phrases or hit.kind != "phrase":
                    found.setdefault(number, []).append(hit)
        for row in sorted(found):
            for hit in sorted(found[row], key=lambda hit: (hit.kind == "phrase", -hit.covered)):
                yield first + row, hit
        first += len(batch)


def _sides(documents: Sequence[GateDocument]) -> tuple[list[str], list[str]]:
    return [each.prompt for each in documents], [each.target for each in documents]


class _Side:
    """One side of the documents, prompts or targets, in an index for each length of run that is looked for."""

    def __init__(
        self, name: Literal["prompt", "answer"], texts: Sequence[bytes], documents: Sequence[GateDocument]
    ) -> None:
        self._name, self._texts, self._documents = name, texts, documents
        tasks = np.unique([each.task for each in documents], return_inverse=True)[1] if documents else np.empty(0, int)
        flat = words(texts)
        lengths_D = np.diff(flat.offsets)
        self._indices = [
            _Index(flat, run, wanted_D, tasks)
            for run in range(SHORTEST, RUN + 1)
            if (wanted_D := lengths_D >= RUN if run == RUN else lengths_D == run).any()
        ]

    def find(self, texts: Sequence[bytes], numbers: Places) -> Iterator[tuple[int, Contamination]]:
        """Yield each document that a row holds; ``numbers`` names the row of each text."""
        if not self._indices:
            return
        flat = words(texts)
        for index in self._indices:
            for pair in index.pairs(flat, numbers):
                kind: Literal["covered", "whole", "phrase"] = "covered" if index.run == RUN else "whole"
                if pair.covered <= MOST_COVERED:
                    kind = "phrase"
                elif index.run < RUN and pair.covered < 1:
                    continue
                document = self._documents[pair.document]
                spelled = spell(self._texts[pair.document])[pair.start : pair.end]
                yield (
                    pair.row,
                    Contamination(document.task, document.document, pair.covered, " ".join(spelled), self._name, kind),
                )


@dataclass(frozen=True, slots=True)
class _Pair:
    """A row and a document with words in common."""

    row: int
    document: int
    covered: float
    start: int
    """First word of the longest run in common."""
    end: int


class _Index:
    """Runs of words of documents, by hash, without those of templates."""

    def __init__(self, flat: Flat, run: int, wanted_D: NDArray[np.bool_], tasks_D: Places) -> None:
        self.run = run
        grams = k_grams(flat, run, whole=False)
        documents_E = np.repeat(np.arange(len(flat)), np.diff(grams.offsets))
        places_E = np.arange(len(grams.hashes)) - grams.offsets[documents_E]
        wanted_E = wanted_D[documents_E]
        order = np.flatnonzero(wanted_E)[np.argsort(grams.hashes[wanted_E], kind="stable")]
        hashes_E, documents_E, places_E = grams.hashes[order], documents_E[order], places_E[order]
        keep_E = ~_is_template(hashes_E, documents_E, tasks_D)
        self._hashes_E, self._documents_E, self._places_E = hashes_E[keep_E], documents_E[keep_E], places_E[keep_E]
        order = np.lexsort((self._places_E, self._documents_E))
        words_E, starts = _covered(self._documents_E[order], self._places_E[order], run)
        self._words_D = np.zeros(len(flat), np.int64)
        """Words of each document in runs that are not of the template."""
        self._words_D[self._documents_E[order][starts]] = words_E
        bits = min(MOST_BITS, len(self._hashes_E).bit_length() + 4)
        self._shift = np.uint64(64 - bits)
        self._seen = np.zeros(1 << bits, bool)
        """A table of the first bits of the hashes, which few runs of rows pass."""
        self._seen[self._hashes_E >> self._shift] = True

    def pairs(self, flat: Flat, numbers: Places) -> Iterator[_Pair]:
        """Yield the rows and documents that have enough words in common to be shown."""
        rows_H, documents_H, places_H = self._hits(flat, numbers)
        if not len(rows_H):
            return
        order = np.lexsort((places_H, documents_H, rows_H))
        rows_H, documents_H, places_H = rows_H[order], documents_H[order], places_H[order]
        pairs_H = rows_H * len(self._words_D) + documents_H
        covered, starts = _covered(pairs_H, places_H, self.run)
        shares = covered / self._words_D[documents_H[starts]]
        ends = np.r_[starts[1:], len(rows_H)]
        for number in np.flatnonzero((shares > MOST_COVERED) | (covered >= PHRASE)):
            start, end = _longest(places_H[starts[number] : ends[number]])
            if shares[number] > MOST_COVERED or end - start + self.run - 1 >= PHRASE:
                at = starts[number]
                yield _Pair(int(rows_H[at]), int(documents_H[at]), float(shares[number]), start, end + self.run - 1)

    def _hits(self, flat: Flat, numbers: Places) -> tuple[Places, Places, Places]:
        """Return row, document and place of each run of a row that some document has."""
        grams = k_grams(flat, self.run, whole=False)
        passed = np.flatnonzero(self._seen[grams.hashes >> self._shift])
        hashes = grams.hashes[passed]
        rows = numbers[np.searchsorted(grams.offsets, passed, side="right") - 1]
        if len(hashes):  # a run that a row repeats is one hit
            order = np.lexsort((hashes, rows))
            hashes, rows = hashes[order], rows[order]
            distinct = np.r_[True, (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1])]
            hashes, rows = hashes[distinct], rows[distinct]
        lefts = np.searchsorted(self._hashes_E, hashes, side="left")
        counts = np.searchsorted(self._hashes_E, hashes, side="right") - lefts
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        entries = np.repeat(lefts, counts) + steps
        return np.repeat(rows, counts), self._documents_E[entries], self._places_E[entries]


def _is_template(hashes_E: Hashes, documents_E: Places, tasks_D: Places) -> NDArray[np.bool_]:
    """Return for each run, sorted by hash and document, whether too many documents of its task have it."""
    if not len(hashes_E):
        return np.empty(0, bool)
    tasks_E = tasks_D[documents_E]
    group_E = np.r_[True, (hashes_E[1:] != hashes_E[:-1]) | (tasks_E[1:] != tasks_E[:-1])]
    document_E = group_E | np.r_[True, documents_E[1:] != documents_E[:-1]]
    counts = np.add.reduceat(document_E.astype(np.int64), np.flatnonzero(group_E))
    found: NDArray[np.bool_] = (counts > MOST_DOCUMENTS)[np.cumsum(group_E) - 1]
    return found


def _covered(groups_H: Places, places_H: Places, run: int) -> tuple[NDArray[np.int64], Places]:
    """Return the words that the runs of each group cover, and its first hit; hits are sorted by group and place."""
    if not len(groups_H):
        return np.empty(0, np.int64), np.empty(0, np.intp)
    changes = groups_H[1:] != groups_H[:-1]
    words_H = np.r_[np.where(changes, run, np.minimum(places_H[1:] - places_H[:-1], run)), run]
    starts = np.flatnonzero(np.r_[True, changes])
    return np.add.reduceat(words_H, starts), starts


def _longest(places: NDArray[Any]) -> tuple[int, int]:
    """Return the first of the longest run of consecutive places, and the one after its last."""
    borders = np.flatnonzero(np.r_[True, np.diff(places) != 1, True])
    longest = int(np.argmax(np.diff(borders)))
    first = int(places[borders[longest]])
    return first, first + int(borders[longest + 1] - borders[longest])
