"""The final table as report.md."""

from __future__ import annotations

from posttrain.report.rows import COLUMNS, reasons, remarks, table_rows
from posttrain.report.run import RunReport
from posttrain.run.directory import StageState


def markdown(report: RunReport) -> str:
    """The run as a Markdown page; scores and lifts are in points of 100, intervals are one-sided bounds."""
    lines = [
        f"# {report.state.recipe}: {report.state.state}",
        "",
        "Shares are in points of 100, other scores as they are; brackets hold the bounds of the paired difference.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "|".join("---" for _ in COLUMNS) + "|",
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table_rows(report)),
        "",
        *(f"- **{stage}**: {reason}" for stage, reason in reasons(report)),
        *(f"- **{stage.name}**: {remark}" for stage in report.state.stages for remark in remarks(stage)),
        "",
        "| stage | kind | state | artifact | digest | parent digest |",
        "|---|---|---|---|---|---|",
        *(_lineage(stage) for stage in report.state.stages),
    ]
    return "\n".join(lines) + "\n"


def _lineage(stage: StageState) -> str:
    digests = ((stage.digest or "")[:12], (stage.parent_digest or "")[:12])
    return "| " + " | ".join((stage.name, stage.kind, stage.state, stage.artifact or "", *digests)) + " |"
