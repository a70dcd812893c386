"""Many sessions at once, with faults: never a stall, and nothing is left behind. The commits and
the pools are real."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import psycopg
import pytest
from django.db import DatabaseError, OperationalError, connections

from django_asyncsession import DatabaseInterface, SessionClosedError
from tests.faults import Elapsed, LoopProbe
from tests.models import Author, Book, Values
from tests.sessions import INSERT, names, pool, slow, soon, two_rows, whole

pytestmark = pytest.mark.usefixtures("never_frozen")


async def test_a_hundred_sessions_sleep_at_the_same_time_without_a_thread(
    real_database: DatabaseInterface,
) -> None:
    if real_database.vendor == "sqlite":
        pytest.skip("SQLite computes in this process")
    async with real_database.get_session() as session:
        asked = (
            "SHOW max_connections"
            if real_database.vendor == "postgresql"
            else "SELECT @@max_connections"
        )
        room = int(await session.fetch_value(asked))
    await real_database.close()
    # A server shared with others, with its default of 100 connections, has no room for as many.
    size = 100 if room >= 140 else 60
    with pool(real_database, max_size=size, min_size=size):
        await real_database.connect()
        await soon(lambda: real_database.stats()["pool_available"] == size, 20)

    async def sleep() -> None:
        async with real_database.get_session() as session:
            await session.fetch_value(slow(real_database, 0.3))

    threads, times = threading.active_count(), []
    for _ in range(3):
        with Elapsed() as took:
            await asyncio.gather(*(sleep() for _ in range(size)))
        times.append(took.seconds)
        assert threading.active_count() == threads
    assert min(times) < 1, times


async def everything(db: DatabaseInterface) -> None:
    """Every kind of operation once."""
    async with db.get_session() as session:
        author = await session.add(Author(name="a"))
        await session.run_sync(
            Book.objects.using(db.alias).bulk_create,
            [Book(title=f"{n}", author=author) for n in range(200)],
        )
        async for _ in session.stream("SELECT * FROM tests_book", chunk_size=50):
            pass
        await session.execute_script("SELECT 1; SELECT 2")
        await session.execute_many(INSERT, [["a"]] * 50)
        with contextlib.suppress(DatabaseError):
            async with session.begin_nested():
                await session.execute("SELECT * FROM no_such_table")
        await session.commit()
        await session.fetch_value(slow(db, 0.1))
        await session.remove(author)
        await session.rollback()
    async with db.get_session(autocommit=True, timeout=10) as session:
        await asyncio.gather(*(session.fetch_all("SELECT * FROM tests_book") for _ in range(5)))
        await session.truncate(Values)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.05), db.get_session() as session:
            await session.fetch_value(slow(db, 1))
    await whole(db)
    await db.close()


async def test_no_operation_stalls_the_loop(real_database: DatabaseInterface) -> None:
    await everything(real_database)
    worst = []
    for _ in range(4):
        async with LoopProbe() as probe:
            with contextlib.suppress(DatabaseError):
                await everything(real_database)
        worst.append(probe.worst)
    assert min(worst) < 0.05, worst


async def test_sessions_cancelled_at_random_leave_nothing_behind(
    real_database: DatabaseInterface,
) -> None:
    import random

    random.seed(4711)
    saved, cancelled = 0, 0

    async def request() -> None:
        async with real_database.get_session() as session:
            await session.execute(INSERT, ["a"])
            async with session.begin_nested():
                await session.execute(INSERT, ["b"])

    for _ in range(20):
        tasks = [asyncio.create_task(request()) for _ in range(15)]
        for task in random.sample(tasks, 5):
            asyncio.get_running_loop().call_later(random.random() * 0.03, task.cancel)
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if outcome is None:
                saved += 1
            else:
                assert isinstance(outcome, (asyncio.CancelledError, OperationalError)), outcome
                cancelled += 1
    assert cancelled > 5
    await whole(real_database)
    rows = await names(real_database)
    assert rows.count("a") == rows.count("b") >= saved


async def test_after_everything_the_server_has_no_session_of_ours_in_a_transaction(
    real_database: DatabaseInterface,
) -> None:
    if real_database.vendor != "postgresql":
        pytest.skip("pg_stat_activity is PostgreSQL's")
    tasks = [asyncio.create_task(two_rows(real_database)) for _ in range(30)]
    await asyncio.sleep(0.02)
    for task in tasks[::3]:
        task.cancel()
    await asyncio.wait(tasks)
    await whole(real_database)
    settings = connections.settings[real_database.alias]
    async with await psycopg.AsyncConnection.connect(
        host=settings["HOST"], port=settings["PORT"] or None, user=settings["USER"] or None,
        password=settings["PASSWORD"] or None, dbname=settings["NAME"],
    ) as admin:  # fmt: skip
        cursor = await admin.execute(
            "SELECT state FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND state <> 'idle'"
        )
        assert await cursor.fetchall() == []
    with pytest.raises(SessionClosedError):
        session = real_database.get_session()
        await session.close()
        await session.execute("SELECT 1")
