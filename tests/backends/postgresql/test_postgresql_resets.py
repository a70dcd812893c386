"""PostgreSQL: what a connection carries from one session to the next, and what that costs.

On real connections, which are the point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.db import (
    connections,
)

from django_asyncsession import DatabaseInterface
from tests.backends.postgresql.pools import interface, pid_of
from tests.faults import (
    FaultProxy,
    address,
)
from tests.models import User

# What a connection carries from one session to the next: nothing

LEAKS: dict[str, tuple[str, str]] = {
    "search_path": ("SET search_path = pg_catalog", "SHOW search_path"),
    "role": ("SET ROLE pg_monitor", "SELECT current_user"),
    "session authorization": ("SET SESSION AUTHORIZATION pg_monitor", "SELECT session_user"),
    "time zone": ("SET TIME ZONE 'Asia/Tokyo'", "SHOW TimeZone"),
    "statement timeout": ("SET statement_timeout = 12345", "SHOW statement_timeout"),
    "lock timeout": ("SET lock_timeout = 12345", "SHOW lock_timeout"),
    "isolation": (
        "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
        "SHOW default_transaction_isolation",
    ),
    "read only": ("SET default_transaction_read_only = on", "SHOW default_transaction_read_only"),
    "temporary table": (
        "CREATE TEMP TABLE das_temp (a int)",
        "SELECT count(*) FROM pg_class WHERE relname = 'das_temp'",
    ),
    "advisory lock": (
        "SELECT pg_advisory_lock(4242)",
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
    ),
    "listen": ("LISTEN das_channel", "SELECT count(*) FROM pg_listening_channels()"),
    "held cursor": (
        "DECLARE das_cursor CURSOR WITH HOLD FOR SELECT 1",
        "SELECT count(*) FROM pg_cursors WHERE name = 'das_cursor'",
    ),
    "prepared statement": (
        "PREPARE das_prepared AS SELECT 1",
        "SELECT count(*) FROM pg_prepared_statements",
    ),
    "own variable": (
        "SELECT set_config('das.user', 'x', false)",
        "SELECT coalesce(current_setting('das.user', true), '')",
    ),
    "sequence": (
        "DO $$ BEGIN CREATE TEMP SEQUENCE das_s; PERFORM nextval('das_s'); END $$",
        "SELECT count(*) FROM pg_class WHERE relname = 'das_s'",
    ),
}


@pytest.mark.parametrize("autocommit", [False, True], ids=["transaction", "autocommit"])
@pytest.mark.parametrize("leak", LEAKS)
async def test_the_next_session_sees_the_default_on_the_same_connection(
    db: DatabaseInterface, leak: str, autocommit: bool
) -> None:
    statement, probe = LEAKS[leak]
    async with db.get_session() as session:
        before = await session.fetch_value(probe)
        pid = await session.fetch_value("SELECT pg_backend_pid()")
    async with db.get_session(autocommit=autocommit) as session:
        await session.execute(statement)
    async with db.get_session() as session:
        assert await session.fetch_value(probe) == before
        assert await session.fetch_value("SELECT pg_backend_pid()") == pid
    assert db.stats()["returns_bad"] == 0


def _by_cursor(statement: str) -> None:
    with connections["own"].cursor() as cursor:
        cursor.execute(statement)


def _by_many(statement: str) -> None:
    with connections["own"].cursor() as cursor:
        cursor.executemany(statement + " -- %s", [["x"]])


def _by_drivers_connection(statement: str) -> None:
    connections["own"].connection.execute(statement)


def _by_drivers_cursor(statement: str) -> None:
    with connections["own"].cursor() as cursor:
        cursor.connection.execute(statement)


def _by_drivers_own_cursor(statement: str) -> None:
    connections["own"].connection.cursor().execute(statement)


def _by_procedure(statement: str) -> None:
    with connections["own"].cursor() as cursor:
        cursor.callproc("set_config", ["search_path", "pg_catalog", False])


def _by_stream(statement: str) -> None:
    with connections["own"].cursor() as cursor:
        list(cursor.stream("SELECT set_config('search_path', 'pg_catalog', false)"))


@pytest.mark.parametrize(
    "way",
    [
        _by_cursor,
        _by_many,
        _by_drivers_connection,
        _by_drivers_cursor,
        _by_drivers_own_cursor,
        _by_procedure,
        _by_stream,
    ],
    ids=lambda way: way.__name__,
)
async def test_it_does_not_matter_how_the_statement_was_sent(
    db: DatabaseInterface, way: Callable[[str], None]
) -> None:
    async with db.get_session() as session:
        before = await session.fetch_value("SHOW search_path")
        await session.run_sync(way, "SET search_path = pg_catalog")
    async with db.get_session() as session:
        assert await session.fetch_value("SHOW search_path") == before


async def test_what_is_set_through_the_drivers_connection_is_reset(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        before = await session.fetch_value("SHOW search_path")
        driver = await session.driver_connection()
        await session.run_sync(driver.execute, "SET search_path = pg_catalog")
    async with db.get_session() as session:
        assert await session.fetch_value("SHOW search_path") == before


async def test_options_of_one_session_do_not_hold_for_the_next(db: DatabaseInterface) -> None:
    options: dict[str, Any] = {
        "isolation": "serializable",
        "read_only": True,
        "timeout": 5,
        "lock_timeout": 3,
        "idle_timeout": 7,
    }
    settings = (
        "transaction_isolation",
        "transaction_read_only",
        "statement_timeout",
        "lock_timeout",
        "idle_in_transaction_session_timeout",
    )
    given = ["serializable", "on", "5s", "3s", "7s"]

    async def seen(**options: Any) -> list[str]:
        async with db.get_session(**options) as session:
            return [await session.fetch_value(f"SHOW {setting}") for setting in settings]

    before = await seen()
    assert await seen(**options) == given
    assert await seen() == before
    assert await seen(autocommit=True, **options) == given
    assert await seen() == before


async def test_a_transaction_begun_by_sql_does_not_survive_its_session(
    db: DatabaseInterface, caplog: pytest.LogCaptureFixture, empty_tables: None
) -> None:
    pid = await pid_of(db)
    async with db.get_transaction(autocommit=True) as low:
        await low.execute("BEGIN")
        await low.execute("INSERT INTO tests_user (name, level) VALUES ('x', 1)")
    async with db.get_session() as session:
        assert await session.fetch_value("SELECT count(*) FROM tests_user") == 0
    assert await pid_of(db) == pid
    assert "was left open and is rolled back" in caplog.text


async def test_a_stream_left_early_leaves_no_cursor_and_the_connection(
    db: DatabaseInterface,
) -> None:
    pid = await pid_of(db)
    for autocommit in (False, True):
        async with db.get_session(autocommit=autocommit) as session:
            async for _ in session.stream("SELECT generate_series(1, 100000)", chunk_size=10):
                break
        async with db.get_session() as session:
            assert await session.fetch_value("SELECT count(*) FROM pg_cursors") == 0
            assert await session.fetch_value("SELECT pg_backend_pid()") == pid


async def test_an_iterator_left_in_sync_code_leaves_no_cursor(
    db: DatabaseInterface, empty_tables: None
) -> None:
    pid = await pid_of(db)

    def leave() -> None:
        for _ in User.objects.using("own").iterator(chunk_size=10):
            return

    for autocommit in (False, True):
        async with db.get_session(autocommit=autocommit) as session:
            await session.run_sync(
                lambda: User.objects.using("own").bulk_create([User(name="x")] * 100)
            )
            await session.run_sync(leave)
        async with db.get_session() as session:
            assert await session.fetch_value("SELECT count(*) FROM pg_cursors") == 0
    assert await pid_of(db) == pid


# What nothing costs


async def test_the_reset_travels_with_the_end_of_a_transaction(name: str) -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        interface(name, host="127.0.0.1", port=proxy.port, pool_max_size=1) as db,
    ):

        async def cost(statement: str, **options: Any) -> int:
            before = proxy.round_trips
            async with db.get_session(**options) as session:
                await session.execute(statement)
            return proxy.round_trips - before

        # The first time it goes alone, so that what the server cannot read fails no COMMIT.
        await cost("SELECT 1")
        await cost("SELECT 1")
        plain = [await cost("SELECT 1") for _ in range(3)]
        assert plain == [3, 3, 3], "BEGIN, the statement, COMMIT"
        assert await cost("SELECT 1", read_only=True, timeout=5) == 3
        assert await cost("SET search_path = pg_catalog") == 3
        # Without a transaction it is sent after the answer, and only the next session waits for it.
        before = proxy.round_trips
        await cost("SELECT 1", autocommit=True)
        await cost("SELECT 1")
        assert proxy.round_trips - before == 2 + 3
