"""A second demand on every gate: no pass on a handful of documents."""

from collections.abc import Generator
from dataclasses import replace

from posttrain import GateRequest, Scorecard, Verdict, hookimpl

LEAST = 50


@hookimpl(wrapper=True)
def judge_artifact(request: GateRequest, scorecard: Scorecard) -> Generator[None, Verdict | None, Verdict | None]:
    """Turn a pass on fewer than LEAST documents into undecided."""
    verdict = yield
    if verdict is None or verdict.state != "pass" or not verdict.tasks:
        return verdict
    fewest = min(task.n for task in verdict.tasks)
    if fewest >= LEAST:
        return verdict
    return replace(verdict, state="undecided", reason=f"{fewest} documents are too few for a pass: {LEAST} needed")
