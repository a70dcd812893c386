"""However many statements are cancelled: no more server sessions than the pool may have, and none
runs on. On real pools, through a proxy that can freeze."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any, Self

import pytest
from django.db import DatabaseError, connections

from django_asyncsession import DatabaseInterface, Session
from tests.faults import outcome_of, watchdog
from tests.models import User
from tests.sessions import COUNT, INSERT, behind, names, pool, soon, whole

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
    # Not the server's own, such as a worker that vacuums.
    "AND pid <> pg_backend_pid() AND backend_type = 'client backend'",
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


class Account:
    """A user of MySQL's server who gets no further connection while it is `closed`, as when the
    server has none left."""

    def __init__(self, admin: Session) -> None:
        self.name = f"few_{uuid.uuid4().hex[:8]}"
        self._admin = admin

    async def say(self, what: str, more: str = "") -> None:
        await self._admin.run_sync(self._say, f"{what} {self.name}@'%' {more}")

    def _say(self, sql: str) -> None:
        with connections[self._admin.alias].cursor() as cursor:
            cursor.execute(sql)

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        await self.say("ALTER USER", "ACCOUNT LOCK")
        try:
            yield
        finally:
            await self.say("ALTER USER", "ACCOUNT UNLOCK")


@asynccontextmanager
async def account(db: DatabaseInterface) -> AsyncIterator[tuple[DatabaseInterface, Account]]:
    """The database as it is for a user of its own."""
    if db.vendor != "mysql":
        pytest.skip("PostgreSQL's statements are cancelled without a connection of their own")
    settings = {**connections.settings[db.alias]}
    async with db.get_session(autocommit=True) as admin:
        user = Account(admin)
        await user.say("CREATE USER", "IDENTIFIED BY 'x'")
        await user.say(f"GRANT ALL ON {settings['NAME']}.* TO")
        own = DatabaseInterface(db.alias, settings | {"USER": user.name, "PASSWORD": "x"})
        try:
            yield own, user
        finally:
            await own.close()
            await user.say("DROP USER")


LATE = "INSERT INTO tests_user (id, name, level) VALUES (77777, %s, 1)"


class CancelledWrite:
    """An INSERT that commits by itself, cancelled while it waits for the lock of another session;
    `release` lets it go on, if it was not ended."""

    def __init__(self, db: DatabaseInterface, observer: DatabaseInterface) -> None:
        self._db, self._holder = db, observer.get_session()
        self._observer = observer.get_session(autocommit=True)

    async def __aenter__(self) -> Self:
        await self._observer.begin()
        await self._holder.begin()
        await self._holder.execute(LATE, ["holder"])
        task = asyncio.create_task(self._write())

        async def waits() -> bool:
            return not await self.is_gone()

        assert await soon(waits, 10)
        task.cancel()
        assert isinstance(await outcome_of(task), asyncio.CancelledError)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._holder.close()
        await self._observer.close()

    async def _write(self) -> None:
        async with self._db.get_session(autocommit=True) as session:
            await session.execute(LATE, ["late"])

    async def is_gone(self) -> bool:
        sql = "SELECT count(*) FROM information_schema.processlist WHERE info LIKE %s"
        sql += " AND id <> CONNECTION_ID()"
        return not await self._observer.fetch_value(sql, ["%INSERT INTO tests_user%late%"])

    async def release(self) -> None:
        await self._holder.rollback()


@pytest.mark.parametrize("writes", [0, 20])
async def test_a_cancelled_write_of_autocommit_is_not_saved_with_no_connection_left_to_end_it(
    real_database: DatabaseInterface, writes: int
) -> None:
    async with account(real_database) as (db, user):
        with pool(db, max_size=1, timeout=10):
            async with db.get_session(autocommit=True) as session:
                await session.fetch_value("SELECT 1")
                async with user.closed():
                    for n in range(writes):
                        await session.execute(INSERT, [f"n{n}"])
                    assert await session.fetch_value(COUNT) == writes
                    async with CancelledWrite(db, real_database) as cancelled:
                        await cancelled.release()
                        assert await soon(cancelled.is_gone, 10)
                    assert len(await names(real_database)) == writes
            assert len(await names(db)) == writes, "the pool has its place again"


async def test_the_connection_that_ends_statements_is_there_before_the_server_is_full(
    real_database: DatabaseInterface,
) -> None:
    async with account(real_database) as (db, user):
        with pool(db, max_size=1, timeout=10):
            async with db.get_session(autocommit=True) as session:
                for n in range(6):
                    await session.execute(INSERT, [f"n{n}"])
            async with user.closed(), CancelledWrite(db, real_database) as cancelled:
                assert await soon(cancelled.is_gone, 10), "it waits on"
    assert "late" not in await names(real_database)


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "over a connection beside"])
async def test_writes_of_autocommit_do_the_same_however_they_are_kept_safe(
    real_database: DatabaseInterface, guarded: bool
) -> None:
    async with account(real_database) as (db, user):
        with pool(db, max_size=1, timeout=10):
            async with db.get_session(autocommit=True) as session:
                await session.fetch_value("SELECT 1")
                async with user.closed() if guarded else nullcontext():
                    for _ in range(10):
                        await session.execute("DELETE FROM tests_user")
                    assert await session.execute(INSERT, ["a"]) == 1
                    with pytest.raises(DatabaseError):
                        await session.execute("INSERT INTO tests_user (id, nothing) VALUES (1, 2)")
                    user_row = User(name="b", level=2)
                    await session.insert_now(user_row)
                    assert user_row.pk
                    await session.execute_many(INSERT, [["c"], ["d;"]])
                    assert await names(real_database) == ["a", "b", "c", "d;"]
                    await session.execute("/* x */ UPDATE tests_user SET name = 'e;' WHERE id > 0")
                    assert await session.fetch_value("SELECT @@autocommit") == 1
                assert await names(real_database) == ["e;"] * 4


async def test_the_connection_that_ends_statements_is_closed_with_the_pool(
    real_database: DatabaseInterface,
) -> None:
    sql = "SELECT count(*) FROM information_schema.processlist WHERE user = %s"
    async with (
        account(real_database) as (db, user),
        real_database.get_session(autocommit=True) as observer,
    ):

        async def has(count: int) -> bool:
            return bool(await observer.fetch_value(sql, [user.name]) == count)

        async with db.get_session(autocommit=True) as session:
            for _ in range(8):
                await session.execute(INSERT, ["a"])
        assert await has(2)
        await db.close()
        assert await soon(lambda: has(0))
