"""A card for people beside every artifact."""

from posttrain import Artifact, Verdict, hookimpl


@hookimpl
def stage_finished(stage: str, artifact: Artifact, verdict: Verdict) -> None:
    """Write ``card.md`` beside the artifact, whose own folder must keep its bytes."""
    lines = [f"# {stage}: {verdict.state}", f"Made on {artifact.manifest.base.name}.", verdict.reason]
    (artifact.path.parent / "card.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
