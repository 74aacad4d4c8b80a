"""The tasks of these tests include one that ships, and are trusted to run its code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from posttrain.host import consent


@pytest.fixture(scope="package", autouse=True)
def trusted_tasks() -> Iterator[None]:
    with consent.given_by([consent.FLAG]):
        yield
