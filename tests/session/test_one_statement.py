"""The server takes one statement, whatever the text is taken for here.

On real pools: what a text deletes for good shows in another session only.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError
from django.db import Error

from django_asyncsession import DatabaseInterface, Session, statements
from django_asyncsession.scanner import Scanner
from django_asyncsession.transactions import raw
from tests.faults import watchdog

# Each is several statements for one of the databases; what it deletes must be there afterwards.
SMUGGLED = [
    "explain select 1 # 2; commit; delete from one_statement; --",
    "select 1 --1; commit; delete from one_statement",
    "select 1 --1; delete from one_statement",
    "select 1 as $$; delete from one_statement; -- $$",
    "select 1 as $$; commit; delete from one_statement; -- $$",
    "create temporary table os2 as select 1 as declare; commit; delete from one_statement",
    "select 1; delete from one_statement",
    "select '\\'; delete from one_statement; --'",
    "select '\\\\'; commit; delete from one_statement; -- '",
    "select 1 /*! ; delete from one_statement */",
    "select 1 /*!999999 ' */; commit; delete from one_statement; -- '",
    "select $a('); delete from one_statement; --'",
    "select 1 -- \r; commit; delete from one_statement",
]
WAYS: dict[str, Callable[[Session, str], Awaitable[Any]]] = {
    "execute": lambda session, sql: session.execute(sql),
    "cursor": lambda session, sql: session.cursor(sql),
    "fetch_all": lambda session, sql: session.fetch_all(sql),
    "stream": lambda session, sql: _stream(session, sql),
    "execute_many": lambda session, sql: session.execute_many(sql, [[], []]),
}


async def _stream(session: Session, sql: str) -> None:
    async for _ in session.stream(sql):
        pass


@pytest.fixture
async def db(real_database: DatabaseInterface) -> AsyncIterator[DatabaseInterface]:
    """A database with a table of three rows."""
    async with real_database.get_session() as session:
        await session.execute("DROP TABLE IF EXISTS one_statement")
        await session.execute("CREATE TABLE one_statement (n int)")
        await session.execute("INSERT INTO one_statement VALUES (1), (2), (3)")
    yield real_database
    async with real_database.get_session() as session:
        await session.execute("DROP TABLE one_statement")


async def count(db: DatabaseInterface) -> int:
    async with db.get_session() as session:
        return int(await session.fetch_value("SELECT count(*) FROM one_statement"))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("autocommit", [False, True])
@pytest.mark.parametrize("checked", [True, False])
async def test_a_text_of_several_statements_deletes_nothing(
    db: DatabaseInterface,
    way: Callable[[Session, str], Awaitable[Any]],
    autocommit: bool,
    checked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even when nothing is noticed in the text before it is sent."""
    if not checked:
        for place in (raw, statements):
            monkeypatch.setattr(place, "check_one_statement", lambda *args: None)
        monkeypatch.setattr(
            "django_asyncsession.session.statements.check_one_statement", lambda *args: None
        )
    for sql in SMUGGLED:
        session = db.get_session(autocommit=autocommit)
        try:
            async with session:
                await way(session, sql)
                if not autocommit:
                    session.set_rollback(True)
        except (Error, TypeError, ValueError):
            pass
        assert await count(db) == 3, sql


async def test_a_script_is_several_statements(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        await session.execute_script(
            "-- "
            + "-" * 72
            + "\nUPDATE one_statement SET n = n + 1;\nUPDATE one_statement SET n = n * 2;"
        )
        await session.execute_script("/* */ " * 40 + "INSERT INTO one_statement VALUES (7)")
        rows = await session.fetch_all("SELECT n FROM one_statement ORDER BY n")
    assert [row[0] for row in rows] == [4, 6, 7, 8]


async def test_a_nul_does_not_cut_a_statement_off(db: DatabaseInterface) -> None:
    with pytest.raises((ValueError, Error)):
        async with db.get_session() as session:
            await session.execute("DELETE FROM one_statement \0 WHERE n = 1")
    assert await count(db) == 3


async def test_values_may_hold_semicolons(db: DatabaseInterface) -> None:
    """With the first statement of a transaction, and with any later one."""
    async with db.get_session() as session:
        for _ in range(2):
            assert await session.fetch_value("SELECT %s", ["a;b"]) == "a;b"
            assert await session.fetch_value("SELECT 'c;d'") == "c;d"
            assert await session.fetch_value("SELECT 'e'") == "e"
    async with db.get_session(autocommit=True) as session:
        assert await session.fetch_value("SELECT %s", ["a;b"]) == "a;b"
    async with db.get_session() as session:
        rows = [row async for row in session.stream("SELECT %s", ["f;g"])]
        assert rows == [("f;g",)]


async def test_many_values_with_semicolons_are_written(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        values = [[1, "a"], [2, "b;c"], [3, "d"], [4, "e"], [5, ";"]]
        sql = "INSERT INTO one_statement VALUES (%s + 0 * length(%s))"
        assert await session.execute_many(sql, values) == 5
    assert await count(db) == 8


async def test_bad_texts_take_no_time(db: DatabaseInterface) -> None:
    """Each of them held the event loop up, for seconds or for ever."""
    texts = [
        "-" * 72 + "\nupdate one_statement set n=n+1;\nupdate one_statement set n=n-1;",
        "-" * 34 + "\nselect ';'",
        "# " * 40 + "\nselect ';'; select 1",
        "/* */ " * 40 + "select ';'; select 1",
        "select 'a;b'" + ", 'c;d'" * 50_000,
        "select ';' where 1 in (" + "1, " * 20_000 + "1)",
    ]
    ways = WAYS | {"execute_script": lambda session, sql: session.execute_script(sql)}
    # A loop that stands still cancels nothing.
    with watchdog(60):
        for text in texts:
            for name, way in ways.items():
                begun = time.thread_time()
                with contextlib.suppress(Error):
                    async with db.get_session() as session:
                        await way(session, text)
                took = time.thread_time() - begun
                assert took < 0.5, (name, text[:80])


@pytest.mark.parametrize("read_only", [None, True])
async def test_a_long_text_is_read_through_once_before_it_is_sent(
    db: DatabaseInterface, read_only: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time holds the event loop up."""
    readings: list[str] = []
    for name in ("statements", "bare"):
        original = getattr(Scanner, name)

        def count(self: Any, text: str, original: Any = original, name: str = name) -> Any:
            readings.append(name)
            return original(self, text)

        monkeypatch.setattr(Scanner, name, count)
    async with db.get_session(read_only=read_only) as session:
        await session.fetch_value("SELECT 1")
        readings.clear()
        await session.execute("SELECT 1" + ", 'a;b'" * 1500)
    assert readings == ["statements"]


LONG_TEXTS = {
    "a value": "SELECT length('{}')",
    "a name": 'SELECT 1 AS "{}"',
    "a comment": "SELECT 1 /* {} */",
    "no statement": "SELEC '{}'",
}


@pytest.mark.parametrize("text", LONG_TEXTS)
async def test_long_texts_are_kept_by_no_cache(db: DatabaseInterface, text: str) -> None:
    """Neither here nor in the driver, though each text comes once only."""

    async def run(count: int) -> None:
        for number in range(count):
            with contextlib.suppress(Error):
                async with db.get_session() as session:
                    await session.fetch_all(LONG_TEXTS[text].format("x" * 500_000 + str(number)))

    await run(1)
    gc.collect()
    tracemalloc.start()
    try:
        await run(20)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("sql", SMUGGLED)
async def test_asyncsql_without_write_deletes_nothing(db: DatabaseInterface, sql: str) -> None:
    for arguments in ([sql], [sql, "--multi"]):
        with pytest.raises((CommandError, SystemExit)):
            await asyncio.to_thread(call_command, "asyncsql", *arguments, database=db.alias)
            raise SystemExit
        assert await count(db) == 3
