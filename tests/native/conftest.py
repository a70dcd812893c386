"""Native mode, switched on; and what goes to a thread in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.test import override_settings

from tests.threads import sent_to_threads


@pytest.fixture
def native_mode() -> Iterator[None]:
    """Native mode, with the other settings as they are by default."""
    with override_settings(ASYNC_SESSION={"NATIVE_ORM": True}):
        yield


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions that went to a thread."""
    return sent_to_threads(monkeypatch)
