"""Streams from MySQL and MariaDB: little memory, and what nobody wants is not sent. On real
connections, which are the point."""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
from typing import Any

import pytest
from asyncmy import Connection
from django.conf import settings

from django_asyncsession import Session
from django_asyncsession.interface import DatabaseInterface
from tests.backends.mysql.server import interface, rows, sessions, sync, until
from tests.faults import (
    SERVER,
    Elapsed,
    FaultProxy,
    LoopProbe,
    address,
    cancel_at,
    longest_stall,
    outcome_of,
)
from tests.models import User

pytestmark = pytest.mark.skipif(
    "mysql" not in settings.DATABASES, reason="no MySQL server: set TEST_MYSQL_URL"
)


async def test_rows_stream_without_being_held_in_memory(db: DatabaseInterface) -> None:
    big = "SELECT seq, REPEAT('x', 1000) FROM seq_1_to_100000"
    async with db.get_session() as session:
        seen = []
        with Elapsed() as took:
            async for row in session.stream(big, chunk_size=500):
                if not seen:
                    first = time.monotonic() - took._started
                seen.append(row[0])
        assert seen == list(range(1, 100001))
        assert first < took.seconds / 2
        assert await session.fetch_value("SELECT 7") == 7


async def test_a_statement_in_the_middle_of_a_stream_loses_no_row(db: DatabaseInterface) -> None:
    seen = []
    async with db.get_session() as session:
        async for row in session.stream("SELECT seq FROM seq_1_to_5000", chunk_size=100):
            seen.append(row[0])
            if row[0] in (1, 150, 151):
                assert await session.fetch_value("SELECT %s", [row[0]]) == row[0]
    assert seen == list(range(1, 5001))


async def test_a_stream_left_half_way_keeps_the_connection(one: DatabaseInterface) -> None:
    def first() -> Any:
        for user in User.objects.using("mysql").iterator(chunk_size=10):
            return user.name
        return None

    sync("INSERT INTO tests_user (name, level) SELECT CONCAT('u', seq), 1 FROM seq_0_to_999")
    try:
        async with one.get_session() as session:
            assert await session.run_sync(first) == "u0"
            assert await session.fetch_value("SELECT 7") == 7
            async for _ in session.stream("SELECT seq FROM seq_1_to_5000"):
                break
        async with one.get_session() as session:
            rows = session.stream("SELECT seq FROM seq_1_to_5000")
            await anext(rows)
        await rows.aclose()
        async with one.get_session() as session:
            assert await session.fetch_value("SELECT 8") == 8
        assert one.stats()["connections_num"] == 1
    finally:
        sync("DELETE FROM tests_user")
        gc.collect()


LONG = "SELECT seq, REPEAT('x', 500) FROM seq_1_to_1000000"


async def test_a_stream_left_early_is_not_sent_to_its_end(t: None) -> None:
    """The server is told to stop; the transaction, the connection and what was written stay."""
    sent = [0]

    def count(who: str, data: bytes) -> None:
        sent[0] += len(data) if who == SERVER else 0

    async def leave(session: Session) -> None:
        async for _ in session.stream(LONG):
            break

    async def close(session: Session) -> None:
        rows = session.stream(LONG)
        await anext(rows)
        await rows.aclose()

    async with FaultProxy(*address("mysql")) as proxy:
        proxy.hook = count
        db = interface(max_size=1, HOST="127.0.0.1", PORT=proxy.port)
        for number, way in enumerate((leave, close)):
            async with LoopProbe() as probe, db.get_session() as session:
                await session.execute("INSERT INTO t (n) VALUES (%s)", [10 * number])
                await way(session)
                await session.execute("INSERT INTO t (n) VALUES (%s)", [10 * number + 1])
            assert probe.worst < longest_stall()
        assert db.stats()["connections_num"] == 1
        await db.close()
    assert rows() == [0, 1, 10, 11]
    # Of more than 500 MB, twice what was on its way: the buffers of the sockets and of the proxy.
    assert sent[0] < 60_000_000


async def test_at_the_end_of_the_transaction_nothing_is_read_of_a_stream(
    one: DatabaseInterface,
) -> None:
    """A generator that is still there when the session ends must not bring the rest into memory."""
    async with one.get_session() as session:
        await session.execute("INSERT INTO t (n) VALUES (1)")
        stream = session.stream(LONG)
        await anext(stream)
        tracemalloc.start()
        await session.commit()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 10_000_000 and rows() == [1]
    await stream.aclose()
    with pytest.raises(ZeroDivisionError):
        async with one.get_session() as session:
            stream = session.stream(LONG)
            await anext(stream)
            raise ZeroDivisionError
    await stream.aclose()
    assert one.stats()["connections_num"] == 1


async def test_a_stream_of_a_statement_that_writes_runs_to_its_end(one: DatabaseInterface) -> None:
    """Stopping it would undo what the statement has written."""
    insert = "INSERT INTO t (n) SELECT seq FROM seq_1_to_300000 RETURNING id, REPEAT('x', 100)"
    async with one.get_session() as session:
        rows_of_it = session.stream(insert, chunk_size=10)
        await anext(rows_of_it)
        await rows_of_it.aclose()
    assert sync("SELECT COUNT(*) FROM t") == ((300_000,),)


async def test_a_stream_that_cannot_be_stopped_is_read_to_its_end(
    one: DatabaseInterface, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with one.get_session() as session:
        await session.execute("INSERT INTO t (n) VALUES (1)")
        connection = await session.driver_connection()
        no_server = lambda: Connection(host="127.0.0.1", port=1)  # noqa: E731
        monkeypatch.setattr(connection._killer, "_make", no_server)
        rows_of_it = session.stream("SELECT seq, REPEAT('x', 500) FROM seq_1_to_50000")
        await anext(rows_of_it)
        await rows_of_it.aclose()
        assert await session.fetch_value("SELECT n FROM t") == 1
    assert rows() == [1]


async def test_a_stream_cancelled_while_it_is_stopped_leaks_nothing(t: None) -> None:
    async def leave(db: DatabaseInterface) -> None:
        async with db.get_session() as session:
            stream = session.stream(LONG)
            await anext(stream)
            await stream.aclose()

    step, done = 1, False
    while not done:
        db = interface(max_size=1)
        run = cancel_at(leave(db), {step})
        outcome = await outcome_of(run)
        done = run.done
        assert outcome is None if done else isinstance(outcome, asyncio.CancelledError)
        async with db.get_session() as session:
            assert await session.fetch_value("SELECT 7") == 7
        await db.close()
        await until(lambda: not sessions())
        # Skipping takes as many steps as the network likes.
        step += 1 if step < 12 else 5


async def test_the_server_bears_with_a_reader_that_pauses(one: DatabaseInterface) -> None:
    """It would end a stream that is not read for a minute; a setting of the project stays."""
    async with one.get_session() as session:
        assert await session.fetch_value("SELECT @@net_write_timeout") >= 3600
    own = interface(options={"init_command": "SET SESSION net_write_timeout = 77"})
    async with own.get_session() as session:
        assert await session.fetch_value("SELECT @@net_write_timeout") == 77
    await own.close()
