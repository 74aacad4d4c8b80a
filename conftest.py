"""Fixtures of all tests, and profiles of the property tests: ``fixed`` for the suite, ``fuzz`` for ``make fuzz``.

One thread of torch in every process, those that tests start included: the tests share out the cores among processes,
tiny models gain nothing from a second thread, and the same bytes come out however many cores there are.
"""

from __future__ import annotations

import compileall
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # nothing is compiled, and bitsandbytes loads no compiler in every process

from posttrain import environment
from posttrain.host import plugins
from posttrain.host.plugins import Host

environment.prepare()
gc.disable()  # until the tests are collected

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long tests: the last process to end decides when the suite ends."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """Set apart what the tests import, a million objects: to look through them for garbage took half of a short run."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def unsynced_disk() -> Iterator[None]:
    """Keep the tests' process from waiting for the disk: a sync changes nothing but what survives a loss of power.

    Tests of that loss record the calls, and those of a failing disk put their own in its place.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # it too needs an open file
        yield


@pytest.fixture(scope="session")
def host() -> Host:
    """Load the installed plugins once."""
    return plugins.load()


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run every test in a folder of its own, so that ./runs and ./recipes are its own too, and so is the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path
