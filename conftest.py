"""Profiles of the property tests: ``fixed`` for every run of the suite, ``fuzz`` for ``make fuzz``.

One thread of torch in every process, those that tests start included: the tests share out the cores among processes,
tiny models gain nothing from a second thread, and the same bytes come out however many cores there are.
"""

from __future__ import annotations

import compileall
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

# A suite that draws at random passes or fails by luck, and one with deadlines by the load of the machine.
STEADY: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("fixed", derandomize=True, **STEADY)
settings.register_profile("fuzz", derandomize=False, **STEADY)
settings.load_profile("fixed")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile what every process that a test starts would compile again where Python keeps none of its bytecode."""
    if sys.dont_write_bytecode and "PYTEST_XDIST_WORKER" not in os.environ:
        for folder in ("posttrain", "plugins"):
            compileall.compile_dir(session.config.rootpath / folder, quiet=2)


@pytest.fixture(scope="session", autouse=True)
def unsynced_disk() -> Iterator[None]:
    """Keep the tests' process from waiting for the disk: a sync changes nothing but what survives a loss of power.

    Tests of that loss record the calls, and those of a failing disk put their own in its place.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # it too needs an open file
        yield
