"""Transactions on SQLite: who has the lock, from when on, and what is never saved in part. On real
connections, which are the point."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from django.db import IntegrityError, OperationalError, connections, transaction
from django.db.transaction import TransactionManagementError
from django.test import override_settings

from django_asyncsession.exceptions import ConfigurationError, QueryTimeout
from django_asyncsession.interface import DatabaseInterface
from tests.backends.sqlite3.files import (
    Locked,
    assert_lock_is_free,
    assert_lock_is_taken,
    count,
    interface,
)
from tests.faults import Elapsed
from tests.models import User


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
