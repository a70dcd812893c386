"""Pools of a test's own on the PostgreSQL of the tests, whole in the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from django_asyncsession import DatabaseInterface
from tests.postgres import dsn_of_tests, gone, sessions_of

CANCEL_BUDGET = 2.0


@asynccontextmanager
async def interface(name: str, **parameters: Any) -> AsyncIterator[DatabaseInterface]:
    """An interface of the test's own; in the end the pool must be whole and the server empty."""
    db = DatabaseInterface.from_dsn(dsn_of_tests(application_name=name, **parameters), alias="own")
    try:
        yield db
        await assert_whole(db, name)
    finally:
        await db.close()
        assert await gone(name)


async def assert_whole(db: DatabaseInterface, name: str) -> None:
    """Nobody holds a connection, all can be had at once, and nothing runs on the server."""
    pool = db.pool()
    deadline = time.monotonic() + CANCEL_BUDGET + 1
    while pool.stats()["pool_size"] != pool.stats()["pool_available"]:
        assert time.monotonic() < deadline, repr(pool)
        await asyncio.sleep(0.01)
    assert pool.stats()["requests_waiting"] == 0 and pool._leased == 0
    assert await gone(name, where="state <> 'idle'")
    leases = [await pool.acquire(5) for _ in range(pool.options.limit)]
    assert sessions_of(name) <= pool.options.limit
    for lease in leases:
        lease.release()


async def pid_of(db: DatabaseInterface) -> int:
    async with db.get_session() as session:
        return int(await session.fetch_value("SELECT pg_backend_pid()"))
