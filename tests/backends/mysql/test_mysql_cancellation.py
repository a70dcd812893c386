"""Statements that are cancelled on MySQL and MariaDB: killed there, and all or nothing is saved. On
real connections, which are the point."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from django.conf import settings
from django.db import DatabaseError

from django_asyncsession.interface import DatabaseInterface
from tests.backends.mysql.server import assert_clean, interface, rows, sessions, until
from tests.faults import (
    Elapsed,
    FaultProxy,
    LoopProbe,
    address,
    cancel_at,
    longest_stall,
    outcome_of,
)

pytestmark = pytest.mark.skipif(
    "mysql" not in settings.DATABASES, reason="no MySQL server: set TEST_MYSQL_URL"
)


async def test_a_cancelled_statement_is_killed_and_its_row_not_written(
    db: DatabaseInterface,
) -> None:
    async def insert() -> None:
        async with db.get_session(autocommit=True) as session:
            await session.execute("INSERT INTO t (n) SELECT SLEEP(2)")

    task = asyncio.create_task(insert())
    await until(lambda: "Query" in sessions().values())
    (thread_id,) = sessions()
    async with LoopProbe() as probe:
        with Elapsed() as took:
            task.cancel()
            assert isinstance(await outcome_of(task), asyncio.CancelledError)
        assert took.seconds < 0.5
        await asyncio.sleep(0)
    await until(lambda: thread_id not in sessions(), 1)
    assert probe.worst < longest_stall()
    await asyncio.sleep(0.1)
    assert rows() == []


async def operation(db: DatabaseInterface, n: int) -> None:
    async with db.get_session() as session:
        await session.execute("INSERT INTO t (n) VALUES (%s)", [n])
        async with session.begin_nested():
            await session.execute("INSERT INTO t (n) VALUES (%s)", [n + 1])
        await session.fetch_all("SELECT * FROM t")


async def test_cancelled_anywhere_it_is_all_or_nothing(t: None) -> None:
    """One cancel at each suspension: both rows or none, no transaction left on the server."""
    step, done = 1, False
    while not done:
        db = interface(max_size=1)
        before = len(rows())
        run = cancel_at(operation(db, step * 10), {step})
        outcome = await outcome_of(run)
        done = run.done
        assert outcome is None if done else isinstance(outcome, asyncio.CancelledError)
        await assert_clean(db)
        assert len(rows()) - before in ((2,) if done else (0, 2))
        await db.close()
        step += 1
    assert step > 5


async def test_cancelled_twice_it_is_still_all_or_nothing(t: None) -> None:
    for first in range(1, 7):
        for second in range(first + 1, first + 4):
            db = interface(max_size=1)
            before = len(rows())
            run = cancel_at(operation(db, (first * 100 + second) * 10), {first, second})
            outcome = await outcome_of(run)
            assert outcome is None or isinstance(outcome, asyncio.CancelledError)
            await assert_clean(db)
            assert len(rows()) - before in (0, 2)
            await db.close()


async def test_a_cancelled_rollback_is_not_a_commit(t: None) -> None:
    async def fail(db: DatabaseInterface) -> None:
        async with db.get_session() as session:
            session.on_commit(lambda: pytest.fail("it was rolled back"))
            await session.execute("INSERT INTO t (n) VALUES (1)")
            raise ValueError

    for step in range(1, 10):
        db = interface(max_size=1)
        outcome = await outcome_of(cancel_at(fail(db), {step}))
        assert isinstance(outcome, asyncio.CancelledError | ValueError)
        await assert_clean(db)
        assert rows() == []
        await db.close()


async def test_a_read_cancelled_in_mid_packet_is_never_seen_by_the_next(t: None) -> None:
    async with FaultProxy(*address("mysql")) as proxy:
        proxy.chunk = 100
        db = interface(max_size=1, HOST="127.0.0.1", PORT=proxy.port)
        async with db.get_session() as session:
            await session.fetch_value("SELECT 1")
        proxy.delay = 0.02

        async def read() -> None:
            async with db.get_session() as session:
                await session.fetch_all("SELECT REPEAT('old rows', 500)")

        task = asyncio.create_task(read())
        await asyncio.sleep(0.3)
        assert not task.done()
        task.cancel()
        assert isinstance(await outcome_of(task), asyncio.CancelledError)
        proxy.delay = 0.0
        async with db.get_session() as session:
            assert await session.fetch_value("SELECT 'new'") == "new"
        assert db.stats()["connections_num"] == 2
        await db.close()


async def test_a_frozen_network_does_not_hold_up_a_cancel(t: None) -> None:
    async with FaultProxy(*address("mysql")) as proxy:
        db = interface(max_size=1, HOST="127.0.0.1", PORT=proxy.port)
        async with db.get_session() as session:
            await session.fetch_value("SELECT 1")
            proxy.freeze()
            with Elapsed() as took, pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await session.fetch_value("SELECT 2")
            assert took.seconds < 1
            with suppress(DatabaseError):
                await session.rollback()
        proxy.thaw()
        await db.close()


async def test_close_of_a_suspended_call_drops_the_connection(db: DatabaseInterface) -> None:
    session = db.get_session()
    await session.begin()
    await session.execute("INSERT INTO t (n) VALUES (1)")
    call = session.execute("DO SLEEP(20)")
    call.send(None)
    call.close()
    await session.close()
    await until(lambda: not sessions(), 2)
    assert rows() == []
