"""A clock for the training of every stage."""

import time
from collections.abc import Generator

from posttrain import Stage, StageContext, hookimpl


@hookimpl(wrapper=True)
def run_stage(stage: Stage, context: StageContext) -> Generator[None, bool | None, bool | None]:
    """Show the seconds that a stage trained for."""
    started = time.perf_counter()
    done = yield
    context.progress.note(f"{stage.name} trained for {time.perf_counter() - started:.1f} s")
    return done
