"""What the tests with fake connections share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults import watchdog


@pytest.fixture
def no_freeze() -> Iterator[None]:
    """Ends the process when a test froze its loop."""
    with watchdog(30):
        yield
