"""Two halves of a gate's documents: one to choose a candidate on, one to judge the chosen one on.

The best of many candidates looks better than it is on the documents that it was chosen by: of twenty that are no better
than the base, one passes a gate with an error of 5 % more often than not. Documents that had no part in the choice know
nothing of it, so the gate's error holds on them whatever was chosen, and however.

A document belongs to a half by the hash of its content alone: in every run, in any order, whichever others there are.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from posttrain.config.schema import Half, Role
from posttrain.digests import digest_of

if TYPE_CHECKING:
    from posttrain.config.schema import GateConfig
    from posttrain.gate.spec import Verdict


def half_of(document_hash: str) -> Half:
    """Return the half of a document, by the SHA-256 of its content: either is as likely."""
    return Half.choosing if int(digest_of(["half", document_hash])[0], 16) % 2 else Half.judging


def select_half(hashes: Mapping[int, str], half: Half, sources: Mapping[int, Hashable] | None = None) -> frozenset[int]:
    """Select the documents of a half, from the hash of each.

    Documents of one of the ``sources`` stay together, in the half of the least of their hashes: an answer learned from
    one of them may help with another. Equal documents have equal hashes.
    """
    if half is Half.both:
        return frozenset(hashes)
    least: dict[Hashable, str] = {}
    place: dict[int, Hashable] = {doc_id: (sources or {}).get(doc_id, doc_id) for doc_id in hashes}
    for doc_id, document_hash in hashes.items():
        least[place[doc_id]] = min(least.get(place[doc_id], document_hash), document_hash)
    return frozenset(doc_id for doc_id in hashes if half_of(least[place[doc_id]]) is half)


def hold_back(gate: GateConfig, verdict: Verdict) -> Verdict:
    """Return a verdict on the half for choosing as one that promotes nothing, and any other as it is."""
    if gate.half is not Half.choosing or verdict.state != "pass":
        return verdict
    return replace(verdict, state="undecided", reason=f"the half for choosing promotes nothing: {verdict.reason}")


def choose(verdicts: Sequence[Verdict]) -> int | None:
    """Return the place of the best candidate by verdicts about the same half; None when each has failed.

    It has the largest mean lift: over the tasks that must improve, or over all tasks of a gate without one. Lifts of
    scores beyond 0 and 1 count in widths of their intervals. The first of several equals is chosen.
    """
    standing = [place for place, verdict in enumerate(verdicts) if verdict.state != "fail" and verdict.tasks]
    return max(standing, key=lambda place: (mean_lift(verdicts[place]), -place), default=None)


def mean_lift(verdict: Verdict) -> float:
    """Return the mean lift that candidates are compared by."""
    tasks = [task for task in verdict.tasks if task.role == Role.lift.value] or list(verdict.tasks)
    shares = all(0 <= score <= 1 for task in tasks for score in (task.base, task.parent, task.candidate))
    lifts = [task.lift if shares else task.lift / ((task.high - task.low) or 1.0) for task in tasks]
    return sum(lifts) / len(lifts)
