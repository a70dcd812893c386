"""Databases of the tests of MySQL, with a table."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from django_asyncsession.interface import DatabaseInterface
from tests.backends.mysql.server import admin, interface, others, sessions, sync
from tests.faults import watchdog


@pytest.fixture(autouse=True)
def frozen_loops_end() -> Iterator[None]:
    with watchdog(100):
        yield


@pytest.fixture
async def db(t: None) -> AsyncIterator[DatabaseInterface]:
    """The database of the tests, with a pool of 10."""
    db = interface()
    yield db
    await db.close()


@pytest.fixture
async def one(t: None) -> AsyncIterator[DatabaseInterface]:
    """The database of the tests, with a single connection."""
    db = interface(max_size=1)
    yield db
    await db.close()


@pytest.fixture
def t() -> Iterator[None]:
    """The table t(id, n)."""
    others.clear()
    others.update(sessions())
    sync("DROP TABLE IF EXISTS t")
    sync("CREATE TABLE t (id integer AUTO_INCREMENT PRIMARY KEY, n integer UNIQUE)")
    yield
    sync("DROP TABLE IF EXISTS t")


@pytest.fixture(scope="module", autouse=True)
def admin_leaves() -> Iterator[None]:
    yield
    admin().close()
    admin.cache_clear()
