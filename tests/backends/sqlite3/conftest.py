"""A database file for each test of SQLite; no thread of a connection may stay."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from django_asyncsession.interface import DatabaseInterface
from tests.backends.sqlite3.files import driver_threads, interface
from tests.faults import watchdog


@pytest.fixture(autouse=True)
def frozen_loops_end() -> Iterator[None]:
    with watchdog(100):
        yield


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    """Whatever a test does, no thread of a connection is left when its databases are closed."""
    yield
    assert driver_threads() == []


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    """A database file with the table t(id, n)."""
    path = tmp_path / "file.sqlite3"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (id integer PRIMARY KEY, n integer UNIQUE)")
    connection.close()
    return path


@pytest.fixture
async def db(path: Path) -> AsyncIterator[DatabaseInterface]:
    """The database of that file, with a pool of 10."""
    db = interface(path, timeout=10)
    yield db
    await db.close()
