"""The command, in this process and in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from posttrain import cli
from tests.support import warm

PROGRAM = [sys.executable, "-m", "posttrain"]


def call(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return warm.run([*PROGRAM, *words], env={**os.environ, **environment})


@contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with the test: when that fails, nobody waits for what may hang."""
    with subprocess.Popen(command, text=True, **options) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def main(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(words))
    return int(caught.value.code or 0)


def complete(line: str) -> list[str]:
    result = call("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert not result.stderr
    return result.stdout.split()
