from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from preference_support.contexts import ADAPTERS, build_context, write_parent

from posttrain import StageContext
from posttrain.artifact import ModelSource


@pytest.fixture(scope="session")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    """A parent of every kind: full weights, or an adapter."""
    return {kind: write_parent(tmp_path_factory.mktemp(kind), kind) for kind in (*ADAPTERS, "full")}


@pytest.fixture
def make_context(tmp_path: Path, parents: dict[str, ModelSource]) -> Callable[..., StageContext]:
    """Makes a context in the test's own folder, on a parent of some kind."""

    def make(kind: str = "lora", folder: str = "run", **given: Any) -> StageContext:
        return build_context(tmp_path / folder, parents[kind], **given)

    return make
