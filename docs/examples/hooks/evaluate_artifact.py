"""A line about the number of documents behind each verdict."""

from collections.abc import Generator

from posttrain import GateProgress, GateRequest, Scorecard, hookimpl


@hookimpl(wrapper=True)
def evaluate_artifact(
    request: GateRequest, progress: GateProgress
) -> Generator[None, Scorecard | None, Scorecard | None]:
    """Show how many documents were scored."""
    scorecard = yield
    if scorecard is not None:
        documents = {(row.task, row.doc_id) for row in scorecard.rows}
        progress.note(f"{len(documents)} documents scored for {len(request.systems)} systems")
    return scorecard
