"""What the tests of sessions and transactions share: statements, what is saved, and whether the
pool is whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from django.db import connections
from django.test import override_settings

from django_asyncsession import DatabaseInterface, Session
from django_asyncsession.testing.queries import QueryLog
from tests.faults import FaultProxy, address, outcome_of

INSERT = "INSERT INTO tests_user (name, level) VALUES (%s, 1)"
COUNT = "SELECT COUNT(*) FROM tests_user"

# A statement that takes the server a given time.
_SLOW: dict[str, Callable[[float], str]] = {
    "postgresql": lambda seconds: f"SELECT pg_sleep({seconds})",
    "mysql": lambda seconds: f"SELECT SLEEP({seconds})",
    # About 6 million steps of a recursion in a second.
    "sqlite": lambda seconds: (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n "
        f"WHERE i < {round(seconds * 6_000_000)}) SELECT COUNT(*) FROM n"
    ),
}


def slow(db: DatabaseInterface, seconds: float = 0.3) -> str:
    """SQL of a query that takes about so many seconds in the database."""
    return _SLOW[db.vendor](seconds)


async def names(db: DatabaseInterface) -> list[str]:
    """Names of the users that are saved, as another connection sees them."""
    async with db.get_session(autocommit=True) as session:
        return [row[0] for row in await session.fetch_all("SELECT name FROM tests_user ORDER BY 1")]


async def two_rows(db: DatabaseInterface) -> None:
    """A session that saves the names "a" and, in a block, "b"."""
    async with db.get_session() as session:
        await session.execute(INSERT, ["a"])
        async with session.begin_nested():
            await session.execute(INSERT, ["b"])


async def whole(db: DatabaseInterface) -> None:
    """Assert that every connection of the pool can be had at the same moment, and none is in a
    transaction."""
    for _ in range(150):
        stats = db.stats()
        if stats["pool_size"] == stats["pool_available"]:
            break
        await asyncio.sleep(0.02)
    assert stats["pool_size"] == stats["pool_available"] <= stats["pool_max"], stats
    assert stats["requests_waiting"] == 0
    leases = await asyncio.gather(*(db.acquire() for _ in range(stats["pool_max"])))
    for lease in leases:
        state = lease.connection.transaction_state.value
        lease.release()
        assert state == "idle"


def sent(queries: QueryLog) -> list[str]:
    """The statements that were captured, without their parameters."""
    return [query["sql"] for query in queries]


async def other_task(session: Session, sql: str = "SELECT 1") -> Any:
    """What another task gets that runs a statement on the session."""
    return await outcome_of(asyncio.create_task(session.fetch_value(sql), name="other"))


async def soon(condition: Callable[[], Awaitable[bool] | bool], seconds: float = 3.0) -> bool:
    """Whether the condition comes true within so many seconds."""
    for _ in range(int(seconds / 0.02)):
        outcome = condition()
        if (await outcome) if isinstance(outcome, Awaitable) else outcome:
            return True
        await asyncio.sleep(0.02)
    return False


def pool(db: DatabaseInterface, **options: Any) -> override_settings:
    """Give the pool these options, when it is made inside the block."""
    return override_settings(ASYNC_SESSION={"POOLS": {db.alias: options}})


@asynccontextmanager
async def behind(db: DatabaseInterface) -> AsyncIterator[tuple[FaultProxy, DatabaseInterface]]:
    """A proxy before the server, and the database as it is reached through it."""
    if db.vendor == "sqlite":
        pytest.skip("SQLite has no server")
    settings = {**connections.settings[db.alias]}
    host, port = address(db.alias)
    if host.startswith("/"):
        pytest.skip("the server listens on a Unix socket")
    async with FaultProxy(host, port) as proxy:
        settings |= {"HOST": "127.0.0.1", "PORT": str(proxy.port)}
        far = DatabaseInterface(db.alias, settings)
        try:
            yield proxy, far
        finally:
            await far.close()
