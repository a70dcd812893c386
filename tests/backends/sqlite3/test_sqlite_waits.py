"""SQLite: one thread per connection, and waits for it and for locks that can be cancelled. On real
connections, which are the point."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
from django.db import IntegrityError, OperationalError

from django_asyncsession.exceptions import QueryTimeout
from django_asyncsession.interface import DatabaseInterface
from tests.backends.sqlite3.files import (
    ENDLESS,
    MANY,
    Locked,
    assert_lock_is_free,
    count,
    driver_threads,
    interface,
)
from tests.faults import Elapsed, LoopProbe, cancel_at, longest_stall, outcome_of

# Threads


async def test_a_thread_per_open_connection_and_none_after_close(db: DatabaseInterface) -> None:
    async def work() -> None:
        async with db.get_session() as session:
            for _ in range(5):
                await session.fetch_value("SELECT 1")

    await asyncio.gather(*(work() for _ in range(40)))
    assert 0 < len(driver_threads()) == db.stats()["pool_size"] <= 10
    await db.close()
    assert driver_threads() == []


async def test_driver_calls_run_in_one_thread_that_is_not_the_loops(db: DatabaseInterface) -> None:
    seen: list[int] = []
    async with db.get_session() as session:
        connection = await session.driver_connection()

        def register() -> None:
            connection.create_function("note", 0, lambda: seen.append(threading.get_ident()))

        await session.run_sync(register)
        for _ in range(3):
            await session.execute("SELECT note()")
    assert len(seen) == 3 and len(set(seen)) == 1
    assert seen[0] != threading.get_ident()


async def test_a_dropped_connection_ends_its_thread(path: Path) -> None:
    db = interface(path, max_size=1)
    told: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        # Not kept: a warning refers to what it is about.
        warnings.showwarning = lambda message, *args: told.append(str(message))  # type: ignore[assignment]
        session = await db.get_session().begin()
        await session.execute("INSERT INTO t (n) VALUES (1)")
        del session
        gc.collect()
        assert await count(db) == 0
    assert told and db.stats()["connections_num"] == 2
    await db.close()


def test_a_closed_loop_leaves_no_thread(path: Path) -> None:
    db = interface(path)

    async def work() -> None:
        async with db.get_session() as session:
            await session.execute("INSERT INTO t (n) VALUES (1)")

    for _ in range(3):
        with pytest.raises(IntegrityError):
            asyncio.run(work())
            asyncio.run(work())
    deadline = threading.Event()
    while driver_threads() and not deadline.wait(0.01):
        pass


# Many at a time


async def test_thousand_sessions_over_ten_connections_half_writing(
    db: DatabaseInterface, path: Path
) -> None:
    async def write(n: int) -> None:
        async with db.get_session() as session:
            await session.fetch_value("SELECT max(n) FROM t")
            await session.execute("INSERT INTO t (n) VALUES (%s)", [n])

    async def read() -> None:
        async with db.get_session(read_only=True) as session:
            before = await session.fetch_value("SELECT count(*) FROM t")
            assert await session.fetch_value("SELECT count(*) FROM t") == before

    async with LoopProbe() as probe, asyncio.TaskGroup() as tasks:
        for n in range(1000):
            tasks.create_task(write(n) if n % 2 else read())
            if n % 50 == 0:
                # Otherwise the loop is busy with beginning all of them.
                await asyncio.sleep(0)
    assert await count(db) == 500
    assert db.stats()["pool_size"] <= 10
    assert probe.worst < longest_stall()


async def test_writers_of_another_process_are_waited_for(db: DatabaseInterface, path: Path) -> None:
    """Django's own connection, here in a thread, shares the file as another process would."""
    stop = threading.Event()

    def write() -> None:
        other = sqlite3.connect(path, isolation_level=None, timeout=10)
        n = -1
        while not stop.wait(0.001):
            other.execute("BEGIN IMMEDIATE")
            other.execute("INSERT INTO t (n) VALUES (?)", [n])
            other.execute("COMMIT")
            n -= 1
        other.close()

    async def ours(n: int) -> None:
        async with db.get_session() as session:
            await session.execute("INSERT INTO t (n) VALUES (%s)", [n])

    thread = threading.Thread(target=write)
    thread.start()
    try:
        await asyncio.gather(*(ours(n) for n in range(40)))
    finally:
        stop.set()
        await asyncio.to_thread(thread.join)
    async with db.get_session() as session:
        assert await session.fetch_value("SELECT count(*) FROM t WHERE n >= 0") == 40


# Locks and timeouts


async def test_waiting_for_a_lock_honours_djangos_timeout(path: Path) -> None:
    db = interface(path, timeout=0.2)
    with Locked(path), Elapsed() as took:
        with pytest.raises(OperationalError, match="database is locked") as info:
            async with db.get_session() as session:
                await session.execute("INSERT INTO t (n) VALUES (1)")
        assert not isinstance(info.value, QueryTimeout)
        async with LoopProbe() as probe:
            with pytest.raises(OperationalError, match="database is locked"):
                async with db.get_session() as session:
                    await session.execute("INSERT INTO t (n) VALUES (1)")
    assert 0.35 < took.seconds < 2
    assert probe.worst < longest_stall()
    await db.close()


async def test_waiting_ends_when_the_lock_is_free(db: DatabaseInterface, path: Path) -> None:
    async def insert() -> None:
        async with db.get_session() as session:
            await session.execute("INSERT INTO t (n) VALUES (1)")

    with Locked(path):
        task = asyncio.create_task(insert())
        await asyncio.sleep(0.1)
        assert not task.done()
    await task
    assert await count(db) == 1


@pytest.mark.parametrize("options", [{"lock_timeout": 0.1}, {"timeout": 0.1}])
async def test_session_timeouts_end_a_wait_for_a_lock(
    db: DatabaseInterface, path: Path, options: dict[str, float]
) -> None:
    with Locked(path), Elapsed() as took, pytest.raises(QueryTimeout):
        async with db.get_session(**options) as session:
            await session.execute("INSERT INTO t (n) VALUES (1)")
    assert took.seconds < 1
    async with db.get_session() as session:
        await session.execute("INSERT INTO t (n) VALUES (1)")
    assert await count(db) == 1


async def test_timeout_ends_a_long_statement_and_is_gone_with_the_session(
    db: DatabaseInterface,
) -> None:
    async with LoopProbe() as probe:
        with pytest.raises(QueryTimeout):
            async with db.get_session(timeout=0.1) as session:
                await session.execute(ENDLESS)
    assert probe.worst < longest_stall()
    assert driver_threads() == ["database lite"]
    async with db.get_session() as session:
        # Longer than the timeout of before.
        await session.execute(MANY.replace("3000000", "400000"))


async def test_autocommit_execute_many_waits_without_repeating(
    db: DatabaseInterface, path: Path
) -> None:
    async with db.get_session(autocommit=True) as session:
        with Locked(path):
            task = asyncio.create_task(
                session.execute_many("INSERT INTO t (n) VALUES (%s)", [[1], [2], [3]])
            )
            await asyncio.sleep(0.05)
        assert await task == 3
    assert await count(db) == 3


# Cancellation


async def operation(db: DatabaseInterface, n: int) -> None:
    async with db.get_session() as session:
        await session.execute("INSERT INTO t (n) VALUES (%s)", [n])
        async with session.begin_nested():
            await session.execute("INSERT INTO t (n) VALUES (%s)", [n + 1])
        await session.fetch_all("SELECT * FROM t")


async def reading_first(db: DatabaseInterface, n: int) -> None:
    async with db.get_session() as session:
        await session.fetch_value("SELECT count(*) FROM t")
        async with session.begin_nested():
            await session.execute("INSERT INTO t (n) VALUES (%s)", [n])
        await session.execute("INSERT INTO t (n) VALUES (%s)", [n + 1])


@pytest.mark.parametrize("operation", [operation, reading_first])
async def test_cancelled_anywhere_it_is_all_or_nothing(path: Path, operation: Any) -> None:
    """One cancel at each suspension: both rows or none, the slot is free, so is the lock."""
    step, done = 1, False
    while not done:
        db = interface(path, max_size=1)
        before = await count(db)
        run = cancel_at(operation(db, step * 10), {step})
        outcome = await outcome_of(run)
        done = run.done
        assert outcome is None if done else isinstance(outcome, asyncio.CancelledError)
        assert await count(db) - before in ((2,) if done else (0, 2))
        await db.close()
        assert_lock_is_free(path)
        step += 1
    assert step > 5


async def test_cancelled_twice_it_is_still_all_or_nothing(path: Path) -> None:
    for first in range(1, 8):
        for second in range(first + 1, first + 5):
            db = interface(path, max_size=1)
            before = await count(db)
            run = cancel_at(operation(db, (first * 100 + second) * 10), {first, second})
            outcome = await outcome_of(run)
            assert outcome is None or isinstance(outcome, asyncio.CancelledError)
            assert await count(db) - before in (0, 2)
            await db.close()
            assert_lock_is_free(path)


async def test_a_cancelled_wait_for_the_lock_leaves_no_transaction(
    db: DatabaseInterface, path: Path
) -> None:
    async def insert() -> None:
        async with db.get_session() as session:
            await session.execute("INSERT INTO t (n) VALUES (1)")

    with Locked(path):
        task = asyncio.create_task(insert())
        await asyncio.sleep(0.1)
        with Elapsed() as took:
            task.cancel()
            assert isinstance(await outcome_of(task), asyncio.CancelledError)
        assert took.seconds < 0.5
        await db.close()
        assert driver_threads() == []
    assert_lock_is_free(path)
    assert await count(db) == 0


async def test_a_cancelled_statement_is_interrupted_and_rolled_back(
    db: DatabaseInterface, path: Path
) -> None:
    async def insert() -> None:
        async with db.get_session() as session:
            await session.execute(MANY)

    async with LoopProbe() as probe:
        task = asyncio.create_task(insert())
        await asyncio.sleep(0.1)
        with Elapsed() as took:
            task.cancel()
            assert isinstance(await outcome_of(task), asyncio.CancelledError)
            while driver_threads():
                await asyncio.sleep(0.001)
    assert took.seconds < 0.5
    assert probe.worst < longest_stall()
    assert_lock_is_free(path)
    assert await count(db) == 0


async def test_a_cancelled_rollback_is_not_a_commit(path: Path) -> None:
    async def fail(db: DatabaseInterface) -> None:
        async with db.get_session() as session:
            session.on_commit(lambda: pytest.fail("it was rolled back"))
            await session.execute("INSERT INTO t (n) VALUES (1)")
            raise ValueError

    for step in range(1, 12):
        db = interface(path, max_size=1)
        outcome = await outcome_of(cancel_at(fail(db), {step}))
        assert isinstance(outcome, asyncio.CancelledError | ValueError)
        assert await count(db) == 0
        await db.close()


async def test_close_of_a_suspended_call_ends_the_thread(db: DatabaseInterface, path: Path) -> None:
    """A coroutine that is closed cannot await: the thread rolls back by itself."""
    session = db.get_session()
    await session.begin()
    await session.execute("INSERT INTO t (n) VALUES (1)")
    call = session.execute(ENDLESS)
    call.send(None)
    call.close()
    await session.close()
    await db.close()
    assert driver_threads() == []
    assert_lock_is_free(path)
    assert await count(db) == 0
