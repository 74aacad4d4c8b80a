"""A line on standard output at every tenth optimizer step."""

from collections.abc import Mapping

from posttrain import hookimpl


@hookimpl
def step_logged(stage: str, step: int, metrics: Mapping[str, float]) -> None:
    """Print the loss."""
    if step % 10 == 0:
        print(f"{stage}: step {step}, loss {metrics['loss']:.3f}")
