"""However many statements are cancelled: no more server sessions than the pool may have, and none
runs on. On real pools, through a proxy that can freeze."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from django_asyncsession import DatabaseInterface
from tests.faults import watchdog
from tests.sessions import behind, pool, soon, whole

LONG = {
    "postgresql": "SELECT pg_sleep(60)",
    "mysql": "SELECT BENCHMARK(900000000, SHA2('x', 512))",
}
LATEST = {
    "postgresql": "SELECT max(backend_start) FROM pg_stat_activity",
    "mysql": "SELECT max(id) FROM information_schema.processlist",
}
# Of this database, younger than the given; and how many of them run what has the marker.
SESSIONS = {
    "postgresql": "SELECT count(*), count(*) FILTER (WHERE state = 'active' AND query LIKE %s) "
    "FROM pg_stat_activity WHERE datname = current_database() AND backend_start > %s "
    "AND pid <> pg_backend_pid()",
    "mysql": "SELECT count(*), coalesce(sum(info LIKE %s), 0) FROM information_schema.processlist "
    "WHERE db = database() AND id > %s AND id <> connection_id()",
}
SIZE = 4
# MySQL and MariaDB are told to end statements over one connection more.
BESIDE = {"postgresql": 0, "mysql": 1}


@pytest.fixture(autouse=True)
def _never_frozen() -> Iterator[None]:
    with watchdog(90):
        yield


class Observer:
    """Counts sessions and running statements, on a connection of its own."""

    def __init__(self, session: Any, vendor: str, since: Any, marker: str) -> None:
        self._session, self._vendor = session, vendor
        self._since, self._marker = since, marker
        self.most = 0

    async def count(self) -> tuple[int, int]:
        row = await self._session.fetch(SESSIONS[self._vendor], [f"%{self._marker}%", self._since])
        self.most = max(self.most, row[0])
        return row[0], int(row[1])

    async def runs(self, count: int) -> bool:
        return (await self.count())[1] == count

    async def watch(self, seconds: float) -> None:
        for _ in range(int(seconds / 0.05)):
            await self.count()
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "answering"])
async def test_cancelled_statements_end_and_sessions_are_never_more_than_the_pool_may_have(
    real_database: DatabaseInterface, frozen: bool
) -> None:
    db, marker = real_database, uuid.uuid4().hex
    async with (
        behind(db) as (proxy, far),
        db.get_session(autocommit=True) as session,
    ):
        observer = Observer(
            session, db.vendor, await session.fetch_value(LATEST[db.vendor]), marker
        )

        async def run() -> None:
            async with far.get_session(autocommit=True) as session:
                await session.fetch_value(f"{LONG[db.vendor]} /* {marker} */")

        async def ask() -> Any:
            async with far.get_session() as session:
                return await session.fetch_value("SELECT 1")

        with pool(far, max_size=SIZE, timeout=40):
            running = [asyncio.create_task(run()) for _ in range(SIZE)]
            assert await soon(lambda: observer.runs(SIZE), 10)
        if frozen:
            proxy.freeze()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        later = [asyncio.create_task(ask()) for _ in range(2 * SIZE)]
        await observer.watch(3.5)
        proxy.thaw()
        watching = asyncio.create_task(observer.watch(1.5))
        assert await asyncio.gather(*later) == [1] * (2 * SIZE)
        await watching
        assert await soon(lambda: observer.runs(0), 5), "a cancelled statement runs on"
        assert observer.most <= SIZE + BESIDE[db.vendor]
        await whole(far)
