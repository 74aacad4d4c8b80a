from __future__ import annotations

from collections.abc import Iterator

import pytest

from posttrain.host import consent


@pytest.fixture(autouse=True)
def trusting() -> Iterator[None]:
    """Most tests here write task files with functions of their own; those of consent take it back."""
    with consent.given_by([consent.FLAG]):
        yield
