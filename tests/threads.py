"""Notes what Django sends to threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import SyncToAsync


def sent_to_threads(
    monkeypatch: pytest.MonkeyPatch, is_counted: Callable[[Any], bool] = lambda fn: True
) -> list[str]:
    """Names of the functions that go to a thread from now on, of those that count."""
    called: list[str] = []
    in_thread = SyncToAsync.__call__

    async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_counted(self.func):
            called.append(self.func.__qualname__)
        return await in_thread(self, *args, **kwargs)

    monkeypatch.setattr(SyncToAsync, "__call__", call)
    return called
