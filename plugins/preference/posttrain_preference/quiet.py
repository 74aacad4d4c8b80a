"""Keeps third-party libraries from writing to the terminal, which belongs to the pipeline's display."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

TALKATIVE = ("accelerate", "bitsandbytes", "datasets", "peft", "transformers", "trl")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings, and log lines below ERROR of TRL and the libraries under it; undone at the end."""
    with warnings.catch_warnings(), contextlib.ExitStack() as undo:
        warnings.simplefilter("ignore")
        for logger in map(logging.getLogger, TALKATIVE):
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Hide standard output, too: some libraries print there, while they are imported, what they find installed."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
