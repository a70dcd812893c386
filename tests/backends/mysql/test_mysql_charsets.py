"""Character sets of MySQL and MariaDB: a value is escaped for the one that the server reads. On
real connections, which are the point."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
from django.conf import settings
from django.db import DatabaseError, connections, transaction
from django.db.transaction import TransactionManagementError

from django_asyncsession.interface import DatabaseInterface
from tests.backends.mysql.server import interface, sync

pytestmark = pytest.mark.skipif(
    "mysql" not in settings.DATABASES, reason="no MySQL server: set TEST_MYSQL_URL"
)

# In GBK the last byte of a character before it and the backslash of an escape are one character.
HOSTILE = ["中' OR 1=1 -- ", "縗' OR 1=1 -- ", "中\\' OR 1=1 -- ", "中\\", "席\\' OR 1=1 -- "]
HOSTILE_BYTES = [b"\xad' OR 1=1 -- ", b"\xbf\\' OR 1=1 -- ", b"\xad\\", b"\x00\xff'\"\\;"]


@pytest.mark.parametrize("charset", ["gbk", "big5", "utf8", "utf8mb4"])
async def test_values_hold_in_the_character_set_of_the_options(t: None, charset: str) -> None:
    db = interface(options={"charset": charset})
    try:
        async with db.get_session() as session:
            await session.execute("INSERT INTO t (n) VALUES (1)")
            for text in [text for text in HOSTILE if _fits(text, charset)]:
                found = await session.fetch_all("SELECT 1 FROM t WHERE n = 2 AND '' = %s", [text])
                assert found == []
            for data in HOSTILE_BYTES:
                assert await session.fetch_value("SELECT HEX(%s)", [data]) == data.hex().upper()
    finally:
        await db.close()


def _fits(text: str, charset: str) -> bool:
    try:
        return bool(text.encode(charset.removesuffix("mb4")))
    except UnicodeEncodeError:
        return False


async def test_another_character_set_by_sql_is_refused(db: DatabaseInterface) -> None:
    """Or values would be escaped for one that the server does not read."""
    async with db.get_session() as session:
        await session.execute("INSERT INTO t (n) VALUES (1), (2)")
    for change in ("SET NAMES gbk", "SET character_set_client = gbk", "SET CHARACTER SET big5"):
        for text in HOSTILE:
            with pytest.raises(DatabaseError, match="values are escaped for 'utf8mb4'"):
                async with db.get_session() as session:
                    await session.execute(change)
                    await session.fetch_all("SELECT * FROM t WHERE 'a' = %s", [text])
    async with db.get_session() as session:
        await session.execute("SET NAMES utf8mb4 COLLATE utf8mb4_bin")
        await session.execute("SET time_zone = '+00:00'")
        assert await session.fetch_all("SELECT * FROM t WHERE 'a' = %s", [HOSTILE[0]]) == []
        assert await session.fetch_value("SELECT %s", [HOSTILE[0]]) == HOSTILE[0]


def _many(sql: str, *params: list[str]) -> Callable[[], None]:
    def run() -> None:
        with connections["mysql"].cursor() as cursor:
            cursor.executemany(sql, params)

    return run


def _in_a_savepoint(sql: str) -> Callable[[], None]:
    def run() -> None:
        with suppress(DatabaseError), transaction.atomic("mysql"):
            sync_in_session(sql)

    return run


def sync_in_session(sql: str) -> None:
    with connections["mysql"].cursor() as cursor:
        cursor.execute(sql)


def _text(*statements: str) -> Callable[[], None]:
    return lambda: [sync_in_session(sql) for sql in statements] and None


# Ways to another character set, that of results too, which would garble what is read.
SET_GBK = "EXECUTE IMMEDIATE 'BEGIN NOT ATOMIC SET NAMES gbk; {} END'"
CHARSET_WAYS = {
    "statement": _text("SET NAMES gbk"),
    "other first": _text("SET @a = 1, character_set_client = gbk"),
    "of a statement": _text("SET STATEMENT max_statement_time = 1 FOR SET NAMES gbk"),
    "prepared": _text("PREPARE p FROM 'SET NAMES gbk'", "EXECUTE p"),
    "with rows": _text(SET_GBK.format("SELECT 1; SELECT 2;")),
    "with an error": _in_a_savepoint(SET_GBK.format("SIGNAL SQLSTATE ''45000'';")),
    "results": _text("SET character_set_results = latin1"),
    "procedure": _text("CALL charset_of_t()"),
    "many": _many("SET @a = %s, character_set_client = gbk", ["a"], [HOSTILE[0]]),
    "driver": lambda: connections["mysql"].connection.cursor().execute("SET NAMES gbk") and None,
}


@pytest.mark.parametrize("way", CHARSET_WAYS)
async def test_no_way_to_another_character_set_reaches_a_value_or_the_next_session(
    one: DatabaseInterface, way: str
) -> None:
    sync("CREATE OR REPLACE PROCEDURE charset_of_t() SET NAMES gbk")
    probe = "SELECT @@character_set_client, @@character_set_results, %s"
    try:
        # The end of the savepoint finds it first, and closes the connection.
        said = "taken back" if way == "with an error" else "values are escaped for 'utf8mb4'"
        with pytest.raises(DatabaseError, match=said):
            async with one.get_session() as session:
                await session.run_sync(CHARSET_WAYS[way])
                await session.fetch_value("SELECT %s", [HOSTILE[0]])
        async with one.get_session() as session:
            await session.execute("INSERT INTO t (n) VALUES (1)")
            with suppress(DatabaseError):
                await session.run_sync(CHARSET_WAYS[way])
            with suppress(DatabaseError, TransactionManagementError):
                await session.rollback()
        for _ in range(2):
            async with one.get_session() as session:
                (row,) = await session.fetch_all(probe, [HOSTILE[0]])
                assert tuple(row.values()) == ("utf8mb4", "utf8mb4", HOSTILE[0])
    finally:
        sync("DROP PROCEDURE charset_of_t")


@pytest.mark.parametrize("check", [False, True])
async def test_the_character_set_is_compared_once_and_not_in_each_session(check: bool) -> None:
    """What `init_command` sets, each reset sets again."""
    counts = []
    for options in ({}, {"init_command": "SET NAMES utf8mb4 COLLATE utf8mb4_bin"}):
        db = interface(max_size=1, options=options)
        counts.append([await _selects(db, check) for _ in range(4)])
        await db.close()
    plain, with_command = counts
    assert with_command[1:] == plain[1:]


async def _selects(db: DatabaseInterface, check: bool) -> int:
    """How many queries the server has run for a session."""
    async with db.get_session(timeout=10) as session:
        if check:
            await session.run_sync(lambda: connections["mysql"].connection.ping())
        assert await session.fetch_value("SELECT %s", [HOSTILE[0]]) == HOSTILE[0]
        (row,) = await session.fetch_all("SHOW SESSION STATUS LIKE 'Com_select'")
        return int(tuple(row.values())[1])


async def test_another_character_set_by_init_command_is_refused(t: None) -> None:
    db = interface(options={"init_command": "SET NAMES gbk"})
    try:
        with pytest.raises(DatabaseError, match="values are escaped for 'utf8mb4'"):
            async with db.get_session() as session:
                await session.fetch_all("SELECT * FROM t WHERE 'a' = %s", [HOSTILE[0]])
    finally:
        await db.close()
