"""Connections of SQLite: how they are opened, what the next session finds, rows, forked children.
On real connections, which are the point."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.db import OperationalError, connections
from django.db.utils import ConnectionHandler

from django_asyncsession.backends.sqlite3.base import Mixin
from django_asyncsession.backends.sqlite3.connection import _lines
from django_asyncsession.exceptions import PoolTimeout, QueryTimeout
from django_asyncsession.interface import DatabaseInterface
from tests.backends.sqlite3.files import assert_lock_is_free, count, interface
from tests.faults import Elapsed

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
