"""Silence of third-party libraries: the terminal belongs to the pipeline's display."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

TALKATIVE = ("accelerate", "bitsandbytes", "datasets", "peft", "transformers", "trl")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings, and log lines below ERROR of TRL and the libraries under it, inside the context."""
    with warnings.catch_warnings(), contextlib.ExitStack() as undo:
        warnings.simplefilter("ignore")
        for logger in map(logging.getLogger, TALKATIVE):
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Hide standard output too, inside the context: some libraries print at import."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
