"""SQLite: one thread per connection, waits that can be cancelled, and nothing left behind.

On real connections, which are the point.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from django.db import IntegrityError, OperationalError, connections, transaction
from django.db.transaction import TransactionManagementError
from django.db.utils import ConnectionHandler
from django.test import override_settings

from django_asyncsession.backends.sqlite3.base import Mixin
from django_asyncsession.backends.sqlite3.connection import _lines
from django_asyncsession.exceptions import ConfigurationError, PoolTimeout, QueryTimeout
from django_asyncsession.interface import DatabaseInterface
from tests.faults import Elapsed, LoopProbe, cancel_at, longest_stall, outcome_of, watchdog
from tests.models import User

ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
MANY = (
    "INSERT INTO t (n) WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c "
    "LIMIT 3000000) SELECT x FROM c"
)


@pytest.fixture(autouse=True)
def frozen_loops_end() -> Iterator[None]:
    with watchdog(100):
        yield


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    """Whatever a test does, no thread of a connection is left when its databases are closed."""
    yield
    assert driver_threads() == []


def driver_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("database ")]


def interface(name: Any, max_size: int = 10, **options: Any) -> DatabaseInterface:
    entry = {"ENGINE": "django.db.backends.sqlite3", "NAME": name, "OPTIONS": options}
    handler = ConnectionHandler({"default": entry})
    options["pool"] = {"max_size": max_size, "timeout": 20}
    return DatabaseInterface("lite", handler.settings["default"])


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


async def count(db: DatabaseInterface) -> int:
    async with db.get_session(read_only=True) as session:
        return int(await session.fetch_value("SELECT count(*) FROM t"))


def assert_lock_is_free(path: Path) -> None:
    """Another connection can write at once, so no transaction is left open."""
    connection = sqlite3.connect(path, timeout=0, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
    finally:
        connection.close()


def assert_lock_is_taken(path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        assert_lock_is_free(path)


class Locked:
    """`with Locked(path):` another connection holds the write lock."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)

    def __enter__(self) -> Locked:
        self._connection.execute("BEGIN IMMEDIATE")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._connection.execute("ROLLBACK")
        self._connection.close()


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


# Transactions


async def test_files_are_in_wal_mode_unless_told_otherwise(path: Path) -> None:
    async def mode(**options: Any) -> Any:
        db = interface(path, **options)
        async with db.get_session() as session:
            value = await session.fetch_value("PRAGMA journal_mode")
        await db.close()
        return value

    with override_settings(ASYNC_SESSION={"SQLITE_WAL": False}):
        assert await mode() == "delete"
    assert await mode(init_command="PRAGMA journal_mode=TRUNCATE") == "truncate"
    assert await mode() == "wal"


async def test_a_writer_has_the_lock_and_readers_do_not_wait(
    db: DatabaseInterface, path: Path
) -> None:
    async with db.get_session() as writer:
        await writer.execute("DELETE FROM t")
        assert_lock_is_taken(path)
        async with db.get_session(read_only=True) as one, db.get_session(read_only=True) as two:
            assert await one.fetch_value("SELECT count(*) FROM t") == 0
            assert await two.fetch_value("SELECT count(*) FROM t") == 0
        async with db.get_session(autocommit=True) as three:
            assert await three.fetch_value("SELECT count(*) FROM t") == 0


async def test_readers_do_not_stand_in_line_with_writers(db: DatabaseInterface, path: Path) -> None:
    async def write() -> None:
        async with db.get_session() as session:
            await session.execute("INSERT INTO t (n) VALUES (1)")

    await db.connect()
    with Locked(path):
        writers = [asyncio.create_task(write())]
        await asyncio.sleep(0.05)
        with Elapsed() as took:
            assert await asyncio.gather(*(count(db) for _ in range(5))) == [0] * 5
        assert not writers[0].done() and took.seconds < 1
    await asyncio.gather(*writers)
    assert await count(db) == 1


async def test_reads_take_no_lock_and_keep_nobody_waiting(
    db: DatabaseInterface, path: Path
) -> None:
    """A request that reads and then waits for something else stops neither readers nor writers."""
    async with db.get_session() as waiting:
        assert await waiting.fetch_value("SELECT count(*) FROM t") == 0
        assert_lock_is_free(path)
        async with db.get_session(lock_timeout=0.1) as other:
            assert await other.fetch_value("SELECT count(*) FROM t") == 0
            await other.execute("INSERT INTO t (n) VALUES (1)")
        # Until it writes itself it sees what it saw.
        assert await waiting.fetch_value("SELECT count(*) FROM t") == 0


async def test_a_thousand_readers_beside_one_writer(db: DatabaseInterface, path: Path) -> None:
    reading, most = 0, 0

    async def read() -> None:
        nonlocal reading, most
        async with db.get_session(lock_timeout=0.1) as session:
            before = await session.fetch_value("SELECT count(*) FROM t")
            reading += 1
            most = max(most, reading)
            await asyncio.sleep(0)
            assert await session.fetch_value("SELECT count(*) FROM t") == before
            reading -= 1

    async with db.get_session() as writer:
        await writer.execute("INSERT INTO t (n) VALUES (1)")
        assert_lock_is_taken(path)
        await asyncio.gather(*(read() for _ in range(1000)))
    assert most > 1 and await count(db) == 1


async def test_the_first_write_sees_the_newest_data(db: DatabaseInterface) -> None:
    """What was read before is not locked: another session may have changed it meanwhile."""
    async with db.get_session() as session:
        assert await session.fetch_value("SELECT count(*) FROM t") == 0
        async with db.get_session() as other:
            await other.execute("INSERT INTO t (n) VALUES (1)")
        await session.execute("UPDATE t SET n = n + 1")
        assert await session.fetch_all("SELECT n FROM t") == [(2,)]
    async with db.get_session() as session:
        assert await session.fetch_all("SELECT n FROM t") == [(2,)]


WRITES = {
    "with": "WITH q AS (SELECT 5) INSERT INTO t (n) SELECT * FROM q",
    "comment": "/* SELECT */ -- x\n INSERT INTO t (n) VALUES (5)",
    "returning": "INSERT INTO t (n) VALUES (5) RETURNING n",
    "replace": "REPLACE INTO t (n) VALUES (5)",
    "parts": "/* a */ /* b */ WITH x AS (SELECT 5 AS y) INSERT INTO t (n) SELECT y FROM x WHERE 1",
}


@pytest.mark.parametrize("sql", WRITES.values(), ids=WRITES)
async def test_sqlite_says_what_writes_and_not_the_text(
    db: DatabaseInterface, path: Path, sql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for knows in (True, False):
        if not knows:
            module = "django_asyncsession.backends.sqlite3.base"
            monkeypatch.setattr(f"{module}.change_in", lambda *args: "")
        async with db.get_session() as session:
            await session.fetch_value("SELECT count(*) FROM t")
            async with db.get_session() as other:
                await other.execute("DELETE FROM t")
            await session.fetch_all(sql)
            assert_lock_is_taken(path)
        async with db.get_session() as session:
            assert await session.fetch_all("SELECT n FROM t") == [(5,)]


async def test_every_way_to_write_takes_the_lock_after_a_read(
    db: DatabaseInterface, path: Path
) -> None:
    def by_script() -> None:
        script = "INSERT INTO t (n) VALUES (2); INSERT INTO t (n) VALUES (3)"
        with connections["lite"].cursor() as cursor:
            cursor.cursor.executescript(script)

    async with db.get_session() as session:
        await session.fetch_value("SELECT count(*) FROM t")
        await session.execute_many("INSERT INTO t (n) VALUES (%s)", ([n] for n in (0, 1)))
        assert_lock_is_taken(path)
    async with db.get_session(autocommit=True) as session:
        await session.run_sync(by_script)
    async with db.get_session() as session:
        await session.fetch_value("SELECT count(*) FROM t")
        connection = await session.driver_connection()
        await session.run_sync(connection.execute, "INSERT INTO t (n) VALUES (4)")
        assert_lock_is_taken(path)
    async with db.get_session() as session:
        await session.fetch_value("SELECT count(*) FROM t")
        await session.execute("PRAGMA user_version = 7")
        assert_lock_is_taken(path)
    async with db.get_session() as session:
        assert await session.fetch_all("SELECT n FROM t") == [(n,) for n in range(5)]
        assert await session.fetch_value("PRAGMA user_version") == 7


async def test_savepoints_of_the_reading_stay_when_the_writing_begins(
    db: DatabaseInterface,
) -> None:
    async def insert(session: Any, n: int) -> None:
        await session.execute("INSERT INTO t (n) VALUES (%s)", [n])

    async with db.get_session() as session, session.begin_nested("outer") as outer:
        async with session.begin_nested("gone"):
            await session.fetch_value("SELECT count(*) FROM t")
        with suppress(ValueError):
            async with session.begin_nested():
                async with db.get_session() as other:
                    await insert(other, 1)
                await insert(session, 2)
                raise ValueError
        await insert(session, 3)
        await outer.rollback()
        await insert(session, 4)
    async with db.get_transaction() as low:
        await low.create_savepoint("a")
        await low.execute("SELECT 1")
        await low.create_savepoint("b")
        await low.rollback("a")
        await low.execute("INSERT INTO t (n) VALUES (5)")
        await low.rollback("a")
        with pytest.raises(OperationalError, match="no such savepoint"):
            await low.release_savepoint("b")
        await low.rollback("a")
        await low.execute("SAVEPOINT raw")
        await low.execute("INSERT INTO t (n) VALUES (6)")
        await low.execute("ROLLBACK TO raw")
        await low.execute("INSERT INTO t (n) VALUES (7)")
    async with db.get_session() as session:
        await session.fetch_value("SELECT count(*) FROM t")
        await session.execute("SAVEPOINT raw")
        await insert(session, 8)
        await session.execute("ROLLBACK TO raw")
    async with db.get_session() as session:
        assert await session.fetch_all("SELECT n FROM t ORDER BY n") == [(1,), (4,), (7,)]


async def test_a_write_that_gets_no_lock_leaves_the_reading_as_it_was(
    db: DatabaseInterface, path: Path
) -> None:
    async with db.get_session(lock_timeout=0.1) as session, session.begin_nested("around"):
        assert await session.fetch_value("SELECT count(*) FROM t") == 0
        with Locked(path), pytest.raises(QueryTimeout):
            async with session.begin_nested():
                await session.execute("INSERT INTO t (n) VALUES (1)")
        assert_lock_is_free(path)
        assert await session.fetch_value("SELECT count(*) FROM t") == 0
        await session.execute("INSERT INTO t (n) VALUES (2)")
    async with db.get_session() as session:
        assert await session.fetch_all("SELECT n FROM t") == [(2,)]


@pytest.mark.parametrize("others_write", [False, True])
async def test_rows_of_an_open_cursor_stay_what_they_were_when_it_writes(
    db: DatabaseInterface, others_write: bool
) -> None:
    async with db.get_session() as session:
        await session.execute_many("INSERT INTO t (n) VALUES (%s)", [[n] for n in range(3500)])
    seen = []
    async with db.get_session() as session:
        async for row in session.stream("SELECT n FROM t ORDER BY n", chunk_size=10):
            seen.append(row[0])
            if row[0] == 5:
                if others_write:
                    async with db.get_session() as other:
                        await other.execute("DELETE FROM t WHERE n > 3000")
                await session.execute("INSERT INTO t (n) VALUES (-1)")
    assert seen == list(range(3500))
    assert await count(db) == (3002 if others_write else 3501)


async def test_a_query_for_update_takes_the_write_lock() -> None:
    """SQLite has no locks on rows, so the session gets the one there is; other reads do not."""
    entry = connections.settings["sqlite"]
    path = Path(entry["NAME"])
    db = DatabaseInterface("sqlite", entry)
    users = User.objects.using("sqlite")
    for locks in (
        lambda s: s.select(User).for_update(),
        lambda s: s.run_sync(lambda: list(users.select_for_update())),
        lambda s: s.run_sync(lambda: users.select_for_update().first()),
        lambda s: s.run_sync(lambda: users.update_or_create(name="x", defaults={"xp": 1})),
    ):
        async with db.get_session() as session:
            await session.select(User)
            assert_lock_is_free(path)
            await locks(session)
            assert_lock_is_taken(path)
            session.set_rollback(True)
        async with db.get_session() as session:
            await locks(session)
            assert_lock_is_taken(path)
            session.set_rollback(True)
    async with db.get_session() as session:
        await session.run_sync(
            lambda: users.select_for_update().query.get_compiler("sqlite").as_sql()
        )
        await session.select(User)
        assert_lock_is_free(path)
    await db.close()


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
async def test_isolation_that_keeps_reads_takes_the_lock_with_the_first_of_them(
    db: DatabaseInterface, path: Path, level: str
) -> None:
    async with db.get_session(isolation=level) as session:
        await session.fetch_value("SELECT count(*) FROM t")
        assert_lock_is_taken(path)
    async with db.get_session(isolation=level, read_only=True) as session:
        await session.fetch_value("SELECT count(*) FROM t")
        assert_lock_is_free(path)


async def test_without_wal_a_reader_waits_for_a_commit(tmp_path: Path) -> None:
    with override_settings(ASYNC_SESSION={"SQLITE_WAL": False}):
        db = interface(tmp_path / "file.sqlite3", timeout=10)
        async with db.get_session() as session:
            await session.execute("CREATE TABLE t (id integer PRIMARY KEY, n integer UNIQUE)")
        other = sqlite3.connect(tmp_path / "file.sqlite3", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        async with db.get_session() as session:
            task = asyncio.create_task(session.fetch_value("SELECT count(*) FROM t"))
            await asyncio.sleep(0.05)
            assert not task.done()
            other.execute("COMMIT")
            assert await task == 0
        other.close()
        await db.close()


async def test_transaction_mode_is_djangos(path: Path) -> None:
    db = interface(path, transaction_mode="DEFERRED")
    async with db.get_session() as session:
        await session.fetch_value("SELECT 1")
        assert_lock_is_free(path)
    await db.close()


async def test_read_only_refuses_writes_and_is_gone_with_the_session(path: Path) -> None:
    db = interface(path, max_size=1)
    for options in ({"read_only": True}, {"read_only": True, "autocommit": True}):
        with pytest.raises(OperationalError, match="readonly"):
            async with db.get_session(**options) as session:
                await session.execute("INSERT INTO t (n) VALUES (1)")
    async with db.get_session() as session:
        await session.execute("INSERT INTO t (n) VALUES (1)")
    assert await count(db) == 1
    await db.close()


@pytest.mark.parametrize("autocommit", [False, True])
async def test_sql_of_a_read_only_session_cannot_make_it_write(
    path: Path, autocommit: bool, tmp_path: Path
) -> None:
    def by_driver(connection: Any) -> None:
        connection.execute("PRAGMA query_only = OFF")

    def by_script(connection: Any) -> None:
        connection.executescript("PRAGMA query_only = OFF; DELETE FROM t")

    statements = ("PRAGMA query_only = OFF", "/**/ pragma query_only(0)", ";PRAGMA query_only=0")
    more = ("PRAGMA journal_mode = DELETE", f"VACUUM INTO '{tmp_path}/copy'", "ATTACH 'x' AS x")
    db = interface(path, max_size=1)
    async with db.get_session() as session:
        await session.execute("INSERT INTO t (n) VALUES (1)")
    options: dict[str, Any] = {"read_only": True, "autocommit": autocommit}
    for sql in (*statements, *more, "DELETE FROM t", "DROP TABLE t"):
        with pytest.raises(OperationalError, match=r"read-?only"):
            async with db.get_session(**options) as session:
                await session.execute(sql)
    for fn in (by_driver, by_script):
        with pytest.raises((OperationalError, sqlite3.OperationalError), match="read-only"):
            async with db.get_session(read_only=True) as session:
                await session.run_sync(fn, await session.driver_connection())
    async with db.get_session(**options) as session:
        assert await session.fetch_value("PRAGMA query_only") == 1
        assert (await session.fetch_all("PRAGMA table_info(t)"))[0][1] == "id"
        assert await session.fetch_value("SELECT count(*) FROM t") == 1
    async with db.get_session() as session:
        await session.execute("INSERT INTO t (n) VALUES (2)")
    await db.close()


async def test_a_file_that_cannot_be_written_can_be_read(path: Path) -> None:
    db = interface(f"file:{path}?mode=ro")
    async with db.get_session() as session:
        assert await session.fetch_value("SELECT count(*) FROM t") == 0
    with pytest.raises(OperationalError, match="readonly"):
        async with db.get_session() as session:
            await session.execute("INSERT INTO t (n) VALUES (1)")
    await db.close()


async def test_what_sqlite_rolled_back_cannot_be_committed_in_part(db: DatabaseInterface) -> None:
    """`ON CONFLICT ROLLBACK` takes all of the transaction back; code that swallows the error
    would otherwise have what follows saved alone."""

    def swallow() -> None:
        with connections["lite"].cursor() as cursor:
            cursor.execute("INSERT INTO t (n) VALUES (1)")
            with suppress(IntegrityError):
                cursor.execute("INSERT OR ROLLBACK INTO t (n) VALUES (1)")
            with pytest.raises(TransactionManagementError):
                cursor.execute("INSERT INTO t (n) VALUES (2)")
            connections["lite"].set_rollback(False)
            with pytest.raises(TransactionManagementError):
                cursor.execute("INSERT INTO t (n) VALUES (2)")

    with pytest.raises(TransactionManagementError):
        async with db.get_session() as session:
            await session.run_sync(swallow)
    assert await count(db) == 0


async def test_a_nested_block_cannot_outlive_what_sqlite_rolled_back(
    db: DatabaseInterface,
) -> None:
    def swallow() -> None:
        with connections["lite"].cursor() as cursor:
            cursor.execute("INSERT INTO t (n) VALUES (1)")
            try:
                with transaction.atomic("lite"):
                    cursor.execute("INSERT OR ROLLBACK INTO t (n) VALUES (1)")
            except IntegrityError:
                pass
            cursor.execute("INSERT INTO t (n) VALUES (2)")

    with pytest.raises(TransactionManagementError):
        async with db.get_session() as session:
            await session.run_sync(swallow)
    assert await count(db) == 0


async def test_a_failed_statement_in_a_nested_block_fails_the_block_only(
    db: DatabaseInterface,
) -> None:
    async with db.get_session() as session:
        await session.execute("INSERT INTO t (n) VALUES (1)")
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                await session.execute("INSERT INTO t (n) VALUES (1)")
        await session.execute("INSERT INTO t (n) VALUES (2)")
    assert await count(db) == 2


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK"])
async def test_sql_that_ends_the_transaction_is_noticed(
    db: DatabaseInterface, statement: str
) -> None:
    with pytest.raises(TransactionManagementError, match="SQL"):
        async with db.get_session() as session:
            await session.execute(statement)
    with pytest.raises(TransactionManagementError, match="SQL"):
        async with db.get_session() as session:
            await session.execute(statement)
            await session.execute("INSERT INTO t (n) VALUES (1)")
    assert await count(db) == 0


async def test_a_transaction_idle_for_too_long_gives_its_lock_back(
    db: DatabaseInterface, path: Path
) -> None:
    with pytest.raises(TransactionManagementError, match="lost"):
        async with db.get_session(idle_timeout=0.1) as session:
            await session.execute("INSERT INTO t (n) VALUES (1)")
            # Waits for the lock that the first session lets go.
            async with db.get_session(lock_timeout=5) as other:
                await other.execute("INSERT INTO t (n) VALUES (2)")
            with pytest.raises(OperationalError, match=r"idle for 0\.1 s"):
                await session.execute("INSERT INTO t (n) VALUES (3)")
    async with db.get_session() as session:
        assert await session.fetch_value("SELECT n FROM t") == 2
        await asyncio.sleep(0.2)
        assert await session.fetch_value("SELECT n FROM t") == 2


async def test_options_that_sqlite_has_not_are_refused(db: DatabaseInterface) -> None:
    with pytest.raises(ConfigurationError, match="deferrable"):
        async with db.get_session(deferrable=True) as session:
            await session.fetch_value("SELECT 1")
    async with db.get_session(isolation="read committed") as session:
        assert await session.fetch_value("SELECT 1") == 1


# What a session leaves behind


LEFTOVERS = {
    "foreign keys": ("PRAGMA foreign_keys = OFF", "PRAGMA foreign_keys", 1),
    "case": ("PRAGMA case_sensitive_like = ON", "SELECT 'A' LIKE 'a'", 1),
    "attached": ("ATTACH ':memory:' AS other", "SELECT count(*) FROM pragma_database_list", 1),
    "temporary": ("CREATE TEMP TABLE x (y)", "SELECT count(*) FROM sqlite_temp_master", 0),
    "busy": ("PRAGMA busy_timeout = 7", "PRAGMA busy_timeout", 0),
    "pragma": ("/* x */ pragma main.cache_size(7)", "SELECT 1", 1),
}


@pytest.mark.parametrize("change, ask, expected", LEFTOVERS.values(), ids=LEFTOVERS)
async def test_the_next_session_sees_defaults(
    path: Path, change: str, ask: str, expected: Any
) -> None:
    db = interface(path, max_size=1)
    async with db.get_session(autocommit=True) as session:
        await session.execute(change)
    async with db.get_session() as session:
        assert await session.fetch_value(ask) == expected
    assert db.stats()["connections_num"] == 2
    await db.close()


async def test_a_function_of_one_session_is_not_the_nexts(path: Path) -> None:
    db = interface(path, max_size=1)
    async with db.get_session() as session:
        connection = await session.driver_connection()
        await session.run_sync(connection.create_function, "seven", 0, lambda: 7)
        assert await session.fetch_value("SELECT seven()") == 7
    with pytest.raises(OperationalError, match="no such function"):
        async with db.get_session() as session:
            await session.fetch_value("SELECT seven()")
    await db.close()


@pytest.mark.parametrize(
    "sql, stays",
    [
        ("PRAGMA foreign_keys", True),
        ("pragma table_info('t')", True),
        ("PRAGMA main.foreign_key_list(t);", True),
        ("SELECT name FROM pragma_table_info('t')", True),
        ("PRAGMA foreign_keys = 0", False),
        ("/* a */ PRAGMA foreign_keys(0)", False),
        ("ATTACH ':memory:' AS other", False),
        ("CREATE TEMP TABLE tt (x)", False),
        ("CREATE TABLE IF NOT EXISTS temp.tt (x)", False),
    ],
)
async def test_a_connection_is_kept_after_what_leaves_nothing_on_it(
    path: Path, sql: str, stays: bool
) -> None:
    db = interface(path, max_size=1)
    for _ in range(2):
        async with db.get_session(autocommit=True) as session:
            await session.execute(sql)
    assert db.stats()["connections_num"] == (1 if stays else 2)
    await db.close()


async def test_asking_the_driver_how_it_is_set_leaves_nothing_on_the_connection(path: Path) -> None:
    """Django asks so for each bulk insert, in some of its versions."""
    db = interface(path, max_size=1)

    def ask() -> int:
        driver: Any = connections[db.alias].connection
        return int(driver.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER))

    for _ in range(2):
        async with db.get_session() as session:
            assert await session.run_sync(ask) > 0
    assert db.stats()["connections_num"] == 1
    await db.close()


async def test_plain_sessions_keep_their_connection(path: Path) -> None:
    db = interface(path, max_size=1)
    for n in range(3):
        async with db.get_session() as session:
            await session.execute("INSERT INTO t (n) VALUES (%s)", [n])
            await session.fetch_all("PRAGMA table_info(t)")
    assert db.stats()["connections_num"] == 1
    await db.close()


# Connecting


async def test_connections_are_set_up_as_by_django(path: Path) -> None:
    db = interface(path, init_command="PRAGMA synchronous=OFF; PRAGMA cache_size=77")
    async with db.get_session() as session:
        assert await session.fetch_value("PRAGMA foreign_keys") == 1
        assert await session.fetch_value("PRAGMA synchronous") == 0
        assert await session.fetch_value("PRAGMA cache_size") == 77
        assert await session.fetch_value("SELECT MD5('x')") == "9dd4e461268c8034f5c8564e155c67a6"
        assert await session.fetch_value("SELECT 'abc' REGEXP 'b'") == 1
    await db.close()


async def test_a_database_in_memory_is_shared_by_all_sessions(tmp_path: Path) -> None:
    db = interface(":memory:", timeout=2)
    async with db.get_session() as session:
        await session.execute("DROP TABLE IF EXISTS t")
        await session.execute("CREATE TABLE t (id integer PRIMARY KEY, n integer UNIQUE)")

    async def write(n: int) -> None:
        async with db.get_session() as session:
            await session.execute("INSERT INTO t (n) VALUES (%s)", [n])

    await asyncio.gather(*(write(n) for n in range(50)))
    assert await count(db) == 50
    await db.close()
    assert await count(db) == 50
    await db.close()


async def test_in_memory_a_reader_waits_for_the_writer_of_its_table() -> None:
    db = interface(":memory:", timeout=5)
    async with db.get_session() as session:
        await session.execute("DROP TABLE IF EXISTS t")
        await session.execute("CREATE TABLE t (id integer PRIMARY KEY, n integer UNIQUE)")
    async with db.get_session() as session:
        await session.execute("INSERT INTO t (n) VALUES (1)")
        reader = asyncio.create_task(count(db))
        await asyncio.sleep(0.05)
        assert not reader.done()
    assert await reader == 1
    with pytest.raises(QueryTimeout):
        async with db.get_session() as session, db.get_session(lock_timeout=0.1) as other:
            await session.execute("INSERT INTO t (n) VALUES (2)")
            await other.fetch_value("SELECT count(*) FROM t")
    await db.close()


async def test_in_memory_a_reader_lets_go_for_a_writer_that_waits_for_it() -> None:
    """There readers lock tables too; two sessions that wait for each other would both fail."""
    db = interface(":memory:", timeout=5)
    async with db.get_session() as session:
        await session.execute("DROP TABLE IF EXISTS t")
        await session.execute("CREATE TABLE t (id integer PRIMARY KEY, n integer UNIQUE)")
        await session.execute("DROP TABLE IF EXISTS u")
        await session.execute("CREATE TABLE u (id integer PRIMARY KEY)")
    async with db.get_session() as reader:
        await reader.fetch_all("SELECT * FROM t")

        async def write() -> None:
            async with db.get_session() as writer:
                await writer.execute("INSERT INTO u DEFAULT VALUES")
                reading = asyncio.create_task(reader.fetch_value("SELECT count(*) FROM u"))
                await writer.execute("INSERT INTO t (n) VALUES (1)")
            assert await reading == 1

        await write()
    await db.close()


async def test_a_file_that_cannot_be_opened_says_so_at_once(tmp_path: Path) -> None:
    db = interface(tmp_path / "missing" / "file.sqlite3")
    with Elapsed() as took, pytest.raises(OperationalError, match="unable to open") as info:
        async with db.get_session() as session:
            await session.fetch_value("SELECT 1")
    assert took.seconds < 1
    assert not isinstance(info.value, PoolTimeout)
    await db.close()


def test_as_an_engine_it_is_djangos_own_in_sync_code(path: Path) -> None:
    entry = {"ENGINE": "django_asyncsession.backends.sqlite3", "NAME": path}
    connection = ConnectionHandler({"default": entry})["default"]
    assert isinstance(connection, Mixin)
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO t (n) VALUES (%s), (%s)", [1, 2])
        assert cursor.rowcount == 2
        cursor.execute("SELECT n FROM t ORDER BY n")
        assert cursor.fetchone() == (1,)
        assert cursor.fetchall() == [(2,)]
        assert cursor.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert cursor.execute("SELECT 1 UNION SELECT 2").fetchmany(1) == [(1,)]
    connection.close()


# Rows


async def test_rows_beyond_the_first_come_as_asked(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        await session.execute_many("INSERT INTO t (n) VALUES (%s)", [[n] for n in range(3500)])
        async with await session.cursor("SELECT n FROM t ORDER BY n") as cursor:
            assert (await cursor.fetch_row()) == (0,)
            assert [r[0] for r in await cursor.fetch_many(1500)] == list(range(1, 1501))
            assert [r[0] for r in await cursor.flatten()] == list(range(1501, 3500))
        rows = [row[0] async for row in session.stream("SELECT n FROM t ORDER BY n")]
        assert rows == list(range(3500))


async def test_a_result_left_half_read_blocks_nobody(db: DatabaseInterface, path: Path) -> None:
    async with db.get_session() as session:
        await session.execute_many("INSERT INTO t (n) VALUES (%s)", [[n] for n in range(3500)])
    async with db.get_session() as session:
        cursor = await session.cursor("SELECT n FROM t")
        await cursor.fetch_row()
        del cursor
        await session.execute("DELETE FROM t")
    assert_lock_is_free(path)
    assert await count(db) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_child_forked_while_a_writer_stands_in_line_can_write(path: Path) -> None:
    db = interface(path)
    loop = asyncio.new_event_loop()

    async def write(n: int) -> None:
        async with db.get_session() as session:
            await session.execute("INSERT INTO t (n) VALUES (%s)", [n])

    async def fork_in_between() -> int:
        with locked_by_a_process(path):
            writer = asyncio.create_task(write(1))
            line = _lines[str(path)]
            while not line.locked():
                await asyncio.sleep(0.001)
            child = os.fork()
            if child == 0:
                _write_and_exit(write)
        await writer
        return child

    with warnings.catch_warnings():
        # Of forking with threads, which is what this is about.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = loop.run_until_complete(fork_in_between())
    _, status = os.waitpid(child, 0)
    loop.run_until_complete(db.close())
    loop.close()
    assert os.waitstatus_to_exitcode(status) == 0
    with sqlite3.connect(path) as connection:
        assert sorted(connection.execute("SELECT n FROM t")) == [(1,), (2,)]
    connection.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_child_forked_while_its_parent_writes_is_told_so_and_the_parent_saves(
    path: Path,
) -> None:
    db = interface(path, timeout=0.5)
    loop = asyncio.new_event_loop()

    async def write(n: int) -> None:
        async with db.get_session() as session:
            await session.execute("INSERT INTO t (n) VALUES (%s)", [n])

    async def fork_while_writing() -> int:
        async with db.get_session() as session:
            await session.execute("INSERT INTO t (n) VALUES (1)")
            child = os.fork()
            if child == 0:
                _tell_and_exit(write)
            _, status = await asyncio.to_thread(os.waitpid, child, 0)
        return os.waitstatus_to_exitcode(status)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        code = loop.run_until_complete(fork_while_writing())
    loop.run_until_complete(db.close())
    loop.close()
    assert code == 3, "the child was told that the database is locked"
    with sqlite3.connect(path) as connection:
        assert list(connection.execute("SELECT n FROM t")) == [(1,)]
        assert list(connection.execute("PRAGMA integrity_check")) == [("ok",)]
    connection.close()


def _tell_and_exit(write: Callable[[int], Coroutine[Any, Any, None]]) -> None:
    signal.alarm(30)
    try:
        asyncio.run(write(2))
    except OperationalError as error:
        os._exit(3 if "database is locked" in str(error) else 1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@contextmanager
def locked_by_a_process(path: Path) -> Iterator[None]:
    """Another process holds the write lock: SQLite itself cannot be forked while this one does."""
    code = "c = sqlite3.connect(sys.argv[1]); c.execute('BEGIN IMMEDIATE'); print(1); input()"
    holder = subprocess.Popen(
        [sys.executable, "-uc", f"import sqlite3, sys; {code}", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        try:
            yield
        finally:
            holder.communicate(b"go\n")


def _write_and_exit(write: Callable[[int], Coroutine[Any, Any, None]]) -> None:
    signal.alarm(20)
    try:
        asyncio.run(write(2))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
