"""Transactions on MySQL and MariaDB: deadlocks, time limits, and what commits by itself. On real
connections, which are the point."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any

import pytest
from django.conf import settings
from django.db import OperationalError, connections, transaction
from django.db.transaction import TransactionManagementError

from django_asyncsession.exceptions import ConfigurationError, QueryTimeout
from django_asyncsession.interface import DatabaseInterface
from tests.backends.mysql.server import assert_clean, interface, rows, sessions, sync, until
from tests.faults import Elapsed, FaultProxy, address

pytestmark = pytest.mark.skipif(
    "mysql" not in settings.DATABASES, reason="no MySQL server: set TEST_MYSQL_URL"
)


async def test_a_transaction_takes_two_round_trips(t: None) -> None:
    """BEGIN travels with the first statement, and nothing follows COMMIT."""
    async with FaultProxy(*address("mysql")) as proxy:
        db = interface(max_size=1, HOST="127.0.0.1", PORT=proxy.port)
        for expected in (None, 2):
            before = proxy.round_trips
            async with db.get_session(isolation="serializable") as session:
                await session.execute("INSERT INTO t (n) VALUES (%s)", [expected])
            assert expected is None or proxy.round_trips - before == expected
        await db.close()


async def test_a_deadlock_that_is_swallowed_leaves_nothing_half_done(
    db: DatabaseInterface,
) -> None:
    """The victim's transaction is gone on the server; code that goes on must not save the rest."""
    sync("INSERT INTO t (n) VALUES (1), (2)")
    met = [asyncio.Event(), asyncio.Event()]

    async def cross(first: int, second: int) -> str:
        def swallow() -> None:
            with connections["mysql"].cursor() as cursor:
                with suppress(OperationalError):
                    cursor.execute("UPDATE t SET n = n + 10 WHERE id = %s", [second])
                cursor.execute("INSERT INTO t (n) VALUES (%s)", [100 + first])

        try:
            async with db.get_session() as session:
                await session.execute("UPDATE t SET n = n + 10 WHERE id = %s", [first])
                met[first - 1].set()
                await met[second - 1].wait()
                await session.run_sync(swallow)
        except TransactionManagementError as exc:
            assert "taken back" in str(exc)
            return "victim"
        return "saved"

    outcomes = await asyncio.gather(cross(1, 2), cross(2, 1))
    assert sorted(outcomes) == ["saved", "victim"]
    winner = outcomes.index("saved") + 1
    assert rows() == [11, 12, 100 + winner]


async def test_a_deadlock_in_a_nested_block_dooms_the_outer_one_too(
    db: DatabaseInterface,
) -> None:
    sync("INSERT INTO t (n) VALUES (1), (2)")
    met = [asyncio.Event(), asyncio.Event()]

    async def cross(first: int, second: int) -> None:
        def swallow() -> None:
            cursor = connections["mysql"].cursor()
            with suppress(OperationalError), transaction.atomic("mysql"):
                cursor.execute("UPDATE t SET n = n + 10 WHERE id = %s", [second])

        async with db.get_session() as session:
            await session.execute("UPDATE t SET n = n + 10 WHERE id = %s", [first])
            met[first - 1].set()
            await met[second - 1].wait()
            await session.run_sync(swallow)

    outcomes = await asyncio.gather(cross(1, 2), cross(2, 1), return_exceptions=True)
    assert sorted(type(o).__name__ for o in outcomes) == ["NoneType", "TransactionManagementError"]
    assert rows() == [11, 12]


async def test_a_lock_timeout_takes_back_the_statement_only(db: DatabaseInterface) -> None:
    sync("INSERT INTO t (n) VALUES (1)")

    def swallow() -> None:
        with connections["mysql"].cursor() as cursor:
            cursor.execute("INSERT INTO t (n) VALUES (5)")
            with pytest.raises(OperationalError, match="Lock wait timeout"):
                cursor.execute("UPDATE t SET n = 3 WHERE id = 1")
            cursor.execute("INSERT INTO t (n) VALUES (6)")

    async with db.get_session() as holder:
        await holder.execute("UPDATE t SET n = 2 WHERE id = 1")
        async with db.get_session(lock_timeout=0.5) as session:
            await session.run_sync(swallow)
        with pytest.raises(QueryTimeout):
            async with db.get_session(lock_timeout=0.5) as session:
                await session.execute("UPDATE t SET n = 4 WHERE id = 1")
    assert rows() == [2, 5, 6]


async def test_timeouts_are_gone_with_the_session(one: DatabaseInterface) -> None:
    async def limits() -> Any:
        async with one.get_session() as session:
            return await session.fetch(
                "SELECT @@innodb_lock_wait_timeout, @@lock_wait_timeout, @@wait_timeout, "
                "@@tx_isolation, @@tx_read_only, connection_id()"
            )

    before = await limits()
    with Elapsed() as took, pytest.raises(QueryTimeout):
        async with one.get_session(timeout=0.2, lock_timeout=1, idle_timeout=60) as session:
            await session.fetch_value("SELECT SLEEP(20) FROM information_schema.collations")
    assert took.seconds < 2
    async with one.get_session(
        autocommit=True, timeout=5, isolation="serializable", read_only=True
    ) as session:
        assert await session.fetch_value("SELECT @@tx_isolation") == "SERIALIZABLE"
    async with one.get_session(isolation="serializable", read_only=True) as session:
        await session.fetch_value("SELECT 1")
    assert await limits() == before


async def test_a_transaction_idle_for_too_long_is_ended_by_the_server(
    db: DatabaseInterface,
) -> None:
    with pytest.raises(TransactionManagementError, match="lost"):
        async with db.get_session(idle_timeout=1) as session:
            await session.execute("INSERT INTO t (n) VALUES (1)")
            await until(lambda: not sessions())
            with pytest.raises(OperationalError) as info:
                await session.execute("INSERT INTO t (n) VALUES (2)")
            assert info.value.args[0] in (2006, 2013, 4031)
    assert rows() == []


async def test_read_only_and_isolation_hold_in_the_transaction(db: DatabaseInterface) -> None:
    with pytest.raises(OperationalError, match="READ ONLY"):
        async with db.get_session(read_only=True) as session:
            await session.execute("INSERT INTO t (n) VALUES (1)")
    sync("INSERT INTO t (n) VALUES (1)")
    async with db.get_session(isolation="repeatable read") as session:
        assert await session.fetch_value("SELECT count(*) FROM t") == 1
        sync("INSERT INTO t (n) VALUES (2)")
        assert await session.fetch_value("SELECT count(*) FROM t") == 1
    async with db.get_session() as session:
        assert await session.fetch_value("SELECT count(*) FROM t") == 2
        sync("INSERT INTO t (n) VALUES (3)")
        assert await session.fetch_value("SELECT count(*) FROM t") == 3


async def test_deferrable_is_refused(db: DatabaseInterface) -> None:
    with pytest.raises(ConfigurationError, match="deferrable"):
        async with db.get_session(deferrable=True) as session:
            await session.fetch_value("SELECT 1")


async def test_ddl_in_a_transaction_is_warned_of(
    db: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "django_asyncsession"), pytest.raises(ValueError):
        async with db.get_session() as session:
            await session.execute("INSERT INTO t (n) VALUES (1)")
            await session.execute("CREATE TABLE t2 (x integer)")
            await session.execute("INSERT INTO t (n) VALUES (2)")
            raise ValueError
    sync("DROP TABLE t2")
    assert "CREATE TABLE commits the transaction" in caplog.text
    assert rows() == [1]


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK", "BEGIN", "START TRANSACTION"])
async def test_sql_that_ends_the_transaction_is_noticed(
    db: DatabaseInterface, statement: str
) -> None:
    with pytest.raises(TransactionManagementError, match="SQL"):
        async with db.get_session() as session:
            await session.execute(statement)
    with pytest.raises(TransactionManagementError, match="SQL"):
        async with db.get_session() as session:
            await session.execute("SELECT 1")
            await session.execute(statement)
            await session.execute("INSERT INTO t (n) VALUES (1)")
    assert rows() == []
    await assert_clean(db)
