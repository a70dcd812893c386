"""Fixtures of the wire's tests."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.backends.wires import Leased, leased
from tests.postgres import ask


@pytest.fixture
async def own() -> AsyncIterator[Leased]:
    async with leased() as own:
        yield own


@pytest.fixture
def table() -> Iterator[str]:
    """The name of an empty table of a number and a text."""
    name = f"wire_{os.getpid()}"
    ask(f"DROP TABLE IF EXISTS {name}")
    ask(f"CREATE TABLE {name} (n int PRIMARY KEY, t text)")
    yield name
    ask(f"SET lock_timeout = 3000; DROP TABLE {name}")
