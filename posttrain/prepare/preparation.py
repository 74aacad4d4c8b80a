"""The preparation of a stage's rows: rules, then documents of the gates, then duplicates; weights come after it.

Contamination comes before duplicates, so that the row that stays in a copy's place is one that is trained.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from posttrain.config.preparation import Action, BalanceConfig, Compared, OnContamination, PrepareConfig
from posttrain.data.records import Record
from posttrain.data.rows import BadRows
from posttrain.data.stored import JoinedRecords, StoredRecords, origins_of
from posttrain.errors import BadInput, Problem
from posttrain.prepare.balance import Rows, unbalanced
from posttrain.prepare.contamination import GateDocument, find_contamination
from posttrain.prepare.filters import Finding
from posttrain.prepare.ledger import CONTAMINATION, DATA, EVAL_DATA, EXACT, NEAR, SEMANTIC, Found, Ledger
from posttrain.prepare.near import BINS, Duplicates, find_duplicates
from posttrain.prepare.rows import Row, batches
from posttrain.prepare.rules import EVIDENCE
from posttrain.prepare.semantic import find_alike, load

ASKED = 2000
"""Characters of a gate's document in the ledger."""
NAMED = 10
"""Rows that are named when an action stops the run."""
Judge = Callable[[Sequence[Row]], Sequence[Finding | None]]
"""A rule on single rows: a finding or None for each."""
ON_CONTAMINATION = {
    OnContamination.drop: Action.drop, OnContamination.stop: Action.stop, OnContamination.warn: Action.count,
    OnContamination.ignore: Action.ignore,
}  # fmt: skip


@dataclass(kw_only=True)
class Preparation:
    """The preparation of one stage's rows, in the making."""

    trained: Sequence[Record]
    evaluated: Sequence[Record] = ()
    """Rows of ``eval_data``: they stay, and leave no copy among the trained ones."""
    config: PrepareConfig
    judges: Mapping[str, tuple[Action, Judge]]
    """Rules on single rows, with the recipe's action."""
    documents: Sequence[GateDocument] = ()
    """Documents of the run's gates."""
    sampled: int = 0
    """Rows at the end of ``trained`` that a model has made: its answers to one question are no copies of each other."""
    folder: Path | None = None
    """Place for the parts of a long preparation, from which a killed one resumes."""
    _found: dict[int, list[Found]] = field(default_factory=dict)
    _digests: bytearray = field(default_factory=bytearray)
    _settings: array[int] = field(default_factory=lambda: array("i"))
    """Number of each row's setting, in the order of their first rows."""
    _records: Sequence[Record] = ()
    _characters: array[int] = field(default_factory=lambda: array("q"))
    _answers: array[int] = field(default_factory=lambda: array("q"))
    _clusters: dict[int, int] = field(default_factory=dict)
    _similarities: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def run(self) -> Ledger:
        """Return the ledger. Raises BadInput naming the first rows with a finding whose action is to stop."""
        self._records = JoinedRecords(self.trained, self.evaluated)
        self._judge()
        self._compare_with_gates()
        self._find_duplicates()
        self._find_alike()
        self._balance()
        ledger = Ledger(
            records=self._records,
            trained=len(self.trained),
            digests=bytes(self._digests),
            found=dict(sorted(self._found.items())),
            unread=[(DATA, bad) for bad in _bad(self.trained)] + [(EVAL_DATA, bad) for bad in _bad(self.evaluated)],
            similarities=self._similarities.tolist(),
            clusters=self._clusters,
            characters=self._characters,
            answer_characters=self._answers,
        )
        self._stop()
        return ledger

    def _judge(self) -> None:
        start = 0
        settings: dict[bytes, int] = {}
        for batch in batches(map(Row, self._records)):
            self._digests += b"".join(row.digest() for row in batch)
            self._settings.extend(settings.setdefault(row.setting(), len(settings)) for row in batch)
            self._characters.extend(len(row.compared(Compared.both)) for row in batch)
            self._answers.extend(len(row.compared(Compared.answer)) for row in batch)
            judged = batch[: max(len(self.trained) - start, 0)]
            for name, (action, judge) in self.judges.items() if judged else ():
                for at, finding in enumerate(judge(judged), start=start):
                    if finding is not None:
                        evidence = finding.evidence[:EVIDENCE]
                        self._add(
                            at,
                            Found(
                                rule=name, action=action, evidence=evidence, score=finding.score,
                                marked=finding.marked[:EVIDENCE],
                            ),
                        )  # fmt: skip
            start += len(batch)

    def _compare_with_gates(self) -> None:
        action = ON_CONTAMINATION[self.config.contamination.action]
        if action is Action.ignore or not self.documents:
            return
        waiting = self._staying(range(len(self.trained)))
        rows = (Row(self._records[at]).exchanges for at in waiting)
        asked = {(each.task, each.document): each.text for each in self.documents}
        hits = list(find_contamination(rows, self.documents))
        if action is Action.drop and len({index for index, _ in hits}) == len(waiting):
            action = Action.count  # data that is a gate's alone is meant so: the gate then measures recall, and says so
        for index, hit in hits:
            found = Found(
                rule=CONTAMINATION, action=action, evidence=hit.evidence[:EVIDENCE], score=hit.covered,
                task=hit.task, document=hit.document, asked=asked[hit.task, hit.document][:ASKED],
            )  # fmt: skip
            self._add(waiting[index], found)

    def _find_duplicates(self) -> None:
        actions = {EXACT: self.config.exact, NEAR: self.config.near.action}
        if set(actions.values()) == {Action.ignore}:
            return
        for number, group in enumerate(self._groups()):
            order = self._in_order(group)
            folder = None if self.folder is None else self.folder / f"group{number}"
            found = self._duplicates(order, folder)
            self._cluster(order, found.clusters)
            for each in found:
                at, witness = order[each.row], order[each.witness]
                if at >= len(self.trained) or actions[each.kind] is Action.ignore:
                    continue
                evidence = f"{self._records[witness].where}: {self._text(at)}"[:EVIDENCE]
                finding = Found(
                    rule=each.kind, action=actions[each.kind], evidence=evidence, score=each.similarity, witness=witness
                )
                self._add(at, finding)

    def _find_alike(self) -> None:
        config = self.config.semantic
        if config.model is None or config.action is Action.ignore:
            return
        model = load(Path(config.model).expanduser())
        for group in self._groups():
            order = self._in_order(group)
            texts = (Row(self._records[at]).compared(config.over) for at in order)
            for row, witness, cosine in find_alike(texts, model, config.threshold, self._families(order)):
                at, other = order[row], order[witness]
                if at < len(self.trained):
                    evidence = f"{self._records[other].where}: {Row(self._records[at]).compared(config.over)}"[
                        :EVIDENCE
                    ]
                    found = Found(rule=SEMANTIC, action=config.action, evidence=evidence, score=cosine, witness=other)
                    self._add(at, found)

    def _in_order(self, group: array[int]) -> array[int]:
        """Return the rows set aside for the eval loss first: they stay."""
        first = bisect_left(group, len(self.trained))
        return group[first:] + group[:first]

    def _quality(self, at: int) -> float:
        """Return the quality of a row: the fewer findings the better; those set aside for the eval loss are best."""
        return float("inf") if at >= len(self.trained) else -float(len(self._found.get(at, ())))

    def _cluster(self, order: Sequence[int], firsts: NDArray[np.int32]) -> None:
        """Remember the cluster of each row to train that is in one with others."""
        groups: dict[int, list[int]] = {}
        for place in np.flatnonzero(np.bincount(firsts, minlength=len(order))[firsts] > 1).tolist():
            groups.setdefault(int(firsts[place]), []).append(order[place])
        for rows in groups.values():
            trained = [at for at in rows if at < len(self.trained)]
            self._clusters |= dict.fromkeys(trained, min(trained)) if len(trained) > 1 else {}

    def _duplicates(self, order: Sequence[int], folder: Path | None) -> Duplicates:
        def chunks() -> Iterable[Sequence[str]]:
            for batch in batches(order):
                yield [self._text(at) for at in batch]

        quality = array("d", (self._quality(at) for at in order))
        found = find_duplicates(
            chunks, threshold=self.config.near.threshold, folder=folder, quality=quality, families=self._families(order)
        )
        self._similarities += found.similarities
        return found

    def _families(self, order: Sequence[int]) -> Sequence[int] | None:
        """Return the number of the question that each sampled row answers, -1 for other rows; None without any."""
        if not self.sampled:
            return None
        made = range(len(self.trained) - self.sampled, len(self.trained))
        numbers: dict[tuple[int, str], int] = {}
        asked = {at: (self._records[at].origin.number, self._records[at].where) for at in order if at in made}
        return [numbers.setdefault(asked[at], len(numbers)) if at in asked else -1 for at in order]

    def _balance(self) -> None:
        if self.config.balance == BalanceConfig():
            return
        staying = self._staying(range(len(self.trained)))
        sources = [origin.number for origin in origins_of(self.trained)]
        rows = Rows(
            text=lambda at: Row(self._records[staying[at]]).compared(Compared.both),
            is_declined=lambda at: Row(self._records[staying[at]]).is_declined,
            sources=[sources[at] for at in staying],
            groups=[self._records[at].group for at in staying],
            quality=array("d", map(self._quality, staying)),
        )
        for index, (rule, evidence) in unbalanced(rows, self.config.balance):
            self._add(staying[index], Found(rule=rule, action=Action.drop, evidence=evidence))

    def _groups(self) -> Iterator[array[int]]:
        """Yield the rows that can be copies of each other: those under equal system turns, tools and labels."""
        groups: dict[int, array[int]] = {}
        for at in self._staying(range(len(self._records))):
            groups.setdefault(self._settings[at], array("q")).append(at)
        yield from (group for group in groups.values() if len(group) > 1)

    def _text(self, at: int) -> str:
        return Row(self._records[at]).compared(self.config.near.over)

    def _staying(self, rows: Iterable[int]) -> array[int]:
        found = self._found
        return array("q", (at for at in rows if all(each.action is not Action.drop for each in found.get(at, ()))))

    def _add(self, at: int, found: Found) -> None:
        self._found.setdefault(at, []).append(found)

    def _stop(self) -> None:
        found = [(at, each) for at, all_ in self._found.items() for each in all_ if each.action is Action.stop]
        if not found:
            return
        problems = [
            Problem(where=self._records[at].where, what=f"{each.rule}: {each.evidence}") for at, each in found[:NAMED]
        ]
        rules = ", ".join(dict.fromkeys(each.rule for _, each in found))
        fix = "Mend or remove the rows, or set another action than stop under prepare"
        more = Problem(where="prepare", what=f"{len(found):,} findings stop the run ({rules})", fix=fix)
        raise BadInput([more, *problems])


def _bad(records: Sequence[Record]) -> Sequence[BadRows]:
    return records.bad if isinstance(records, StoredRecords) else ()
