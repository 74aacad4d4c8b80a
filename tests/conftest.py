from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

from posttrain import environment
from posttrain.host import plugins
from posttrain.host.plugins import Host

environment.prepare()
gc.disable()  # until the tests are collected


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long tests: the last process to end decides when the suite ends."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """Set apart what the tests import, a million objects: to look through them for garbage took half of a short run."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def host() -> Host:
    return plugins.load()


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own, so that ./runs and ./recipes are its own too, and so is the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path
