"""Pools, servers and tables of the tests of PostgreSQL."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator

import pytest

from django_asyncsession import DatabaseInterface
from tests.backends.postgresql.pools import interface
from tests.backends.postgresql.wires import Leased, leased
from tests.faults import (
    OwnServer,
    watchdog,
)
from tests.postgres import ask, new_name


@pytest.fixture(autouse=True)
def frozen_loops_end() -> Iterator[None]:
    with watchdog(90):
        yield


@pytest.fixture
def name() -> str:
    """An application_name that only this test uses."""
    return new_name()


@pytest.fixture
async def db(name: str) -> AsyncIterator[DatabaseInterface]:
    """An interface with one connection, so that the next borrower gets what the last one had."""
    async with interface(name, pool_max_size=1) as db:
        yield db


@pytest.fixture(scope="module")
def own_server() -> Iterator[OwnServer]:
    """A server that these tests may freeze and stop."""
    server = OwnServer()
    yield server
    server.stop()


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
