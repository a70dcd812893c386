"""Whatever a session does to its connection, the next one on the same connection does not see it.

The database itself is made to set something, in every way that needs no word of it in the statement
that the session sends, and the driver is used behind Django's back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from django.db import Error, connections
from django.db.transaction import TransactionManagementError
from django.db.utils import ConnectionHandler

from django_asyncsession import DatabaseInterface, Session
from tests.postgres import dsn_of_tests
from tests.session.leaky import MODES, PG_PROBE, TENANT, Way, carried, sql, sync


def drivers_ways(statement: str) -> dict[str, Way]:
    """Ways to send a statement that no cursor of Django's shows."""

    def through_cursor(connection: Any) -> None:
        with connection.cursor() as cursor:
            cursor.cursor.execute(statement)

    def through_drivers_cursor(connection: Any) -> None:
        connection.connection.cursor().execute(statement)

    def through_cursors_connection(connection: Any) -> None:
        with connection.cursor() as cursor:
            cursor.connection.cursor().execute(statement)

    async def through_driver_connection(session: Session) -> None:
        if session.autocommit:
            async with session.bind.get_transaction(autocommit=True) as low:
                driver = await low.driver_connection()
                await low.run(lambda: driver.cursor().execute(statement))
        else:
            driver = await session.driver_connection()
            await session.run_sync(lambda: driver.cursor().execute(statement))

    return {
        "plain SQL": sql(statement),
        "cursor.cursor": sync(through_cursor),
        "connection.connection.cursor()": sync(through_drivers_cursor),
        "cursor.connection.cursor()": sync(through_cursors_connection),
        "driver_connection()": through_driver_connection,
    }


# PostgreSQL


PG_WAYS: dict[str, Way] = {
    "function": sql("SELECT leaky.keeps(1)"),
    "function named like a known one": sql("SELECT leaky.lower('A')"),
    "known name by search_path": sql(
        "SET LOCAL search_path = leaky, pg_catalog", "SELECT lower('A')"
    ),
    "view": sql("SELECT * FROM leaky.view"),
    "default": sql("INSERT INTO leaky.defaults (n) VALUES (1)"),
    "generated column": sql("INSERT INTO leaky.generated (n) VALUES (1)"),
    "domain": sql("INSERT INTO leaky.domains VALUES (1)"),
    "check": sql("INSERT INTO leaky.checks VALUES (1)"),
    "index": sql("INSERT INTO leaky.indexed VALUES (1)"),
    "trigger": sql("INSERT INTO leaky.triggers VALUES (1)"),
    "deferred trigger": sql("INSERT INTO leaky.deferred VALUES (1)"),
    "rule": sql("INSERT INTO leaky.rules VALUES (1)"),
    "operator": sql("SELECT 1 OPERATOR(leaky.===) 'x'"),
    "aggregate": sql("SELECT leaky.count(1)"),
    "procedure": sql("CALL leaky.call()"),
    "prepared by a function": sql("SELECT leaky.prepares()"),
    "sequence": sql("INSERT INTO leaky.sequences DEFAULT VALUES"),
    "COPY": sync(lambda connection: _copy(connection)),
    "pipeline": sync(lambda connection: _pipeline(connection)),
    **drivers_ways(f"SELECT set_config('app.tenant', '{TENANT}', false), pg_advisory_lock(4711)"),
}


def _copy(connection: Any) -> None:
    with connection.cursor() as cursor, cursor.copy("COPY leaky.triggers FROM STDIN") as copy:
        copy.write_row([1])


def _pipeline(connection: Any) -> None:
    with connection.connection.pipeline():
        connection.connection.execute("SELECT leaky.keeps(1)")


@MODES
@pytest.mark.parametrize("way", PG_WAYS)
async def test_postgresql(leaky_postgresql: None, way: str, mode: str) -> None:
    """No way brings a setting, lock, channel, table or statement to the next session."""
    db = DatabaseInterface.from_dsn(dsn_of_tests(pool_max_size=1), alias="own")
    async with db:
        before, after = await carried(db, PG_WAYS[way], PG_PROBE, mode)
    assert before == after


# MariaDB


MY_SET = (
    f"SET @tenant = '{TENANT}'; SET SESSION sql_mode = 'ANSI'; "
    "SET @got = GET_LOCK(CONCAT(DATABASE(), '.tenant'), 0)"
)
MY_SCHEMA = [
    "CREATE TABLE leaky_plain (n int) ENGINE=InnoDB",
    "CREATE TABLE leaky_triggers (n int) ENGINE=InnoDB",
    "CREATE TABLE leaky_counts (id int AUTO_INCREMENT PRIMARY KEY, n int) ENGINE=InnoDB",
    f"CREATE TRIGGER leaky_t BEFORE INSERT ON leaky_triggers FOR EACH ROW BEGIN {MY_SET}; END",
    f"CREATE FUNCTION leaky_keeps(n int) RETURNS int BEGIN {MY_SET}; RETURN n; END",
    f"CREATE FUNCTION leaky_lower(n text) RETURNS text BEGIN {MY_SET}; RETURN n; END",
    f"CREATE PROCEDURE leaky_call() BEGIN {MY_SET}; "
    "CREATE TEMPORARY TABLE IF NOT EXISTS leaky_temp (n int); END",
    "CREATE PROCEDURE leaky_role() SET ROLE leaky_role",
    "CREATE VIEW leaky_view AS SELECT leaky_keeps(1) AS n",
]
MY_DROP = [
    "DROP VIEW IF EXISTS leaky_view",
    *(f"DROP PROCEDURE IF EXISTS leaky_{name}" for name in ("call", "role")),
    *(f"DROP FUNCTION IF EXISTS leaky_{name}" for name in ("keeps", "lower")),
    *(f"DROP TABLE IF EXISTS leaky_{name}" for name in ("plain", "triggers", "counts")),
    "DROP ROLE IF EXISTS leaky_role",
]
MY_WAYS: dict[str, Way] = {
    "function": sql("SELECT leaky_keeps(1)"),
    "function named like a known one": sql("SELECT leaky_lower('A')"),
    "view": sql("SELECT * FROM leaky_view"),
    "trigger": sql("INSERT INTO leaky_triggers VALUES (1)"),
    "procedure": sql("CALL leaky_call()"),
    "role of a procedure": sql("CALL leaky_role()"),
    "lock": sql("LOCK TABLES leaky_plain WRITE"),
    "prepared statement": sql("PREPARE tenant FROM 'SELECT 1'"),
    "database": sql("USE mysql"),
    "variable in a condition": sql(f"SELECT 1 FROM leaky_plain WHERE (@tenant := '{TENANT}') = 1"),
    "handler": sql("HANDLER leaky_plain OPEN"),
    "identity": sql("INSERT INTO leaky_counts (n) VALUES (1)"),
    **drivers_ways(f"SET @tenant = '{TENANT}', SESSION sql_mode = 'ANSI'"),
}
MY_PROBE = (
    "SELECT @tenant, @@sql_mode, IS_USED_LOCK(CONCAT(DATABASE(), '.tenant')), CURRENT_ROLE(), "
    "DATABASE(), @@tx_isolation, @@sql_auto_is_null, @@character_set_client, LAST_INSERT_ID(), "
    "CONNECTION_ID()"
)


@pytest.fixture(scope="module")
def leaky_mysql(test_databases: None, django_db_blocker: Any) -> Any:
    def run(statements: list[str]) -> None:
        with django_db_blocker.unblock(), connections["mysql"].cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
        connections["mysql"].close()

    run([*MY_DROP, "CREATE ROLE leaky_role", *MY_SCHEMA])
    yield
    run(MY_DROP)


@MODES
@pytest.mark.parametrize("way", MY_WAYS)
async def test_mysql(leaky_mysql: None, way: str, mode: str) -> None:
    """No way brings a variable, setting, lock, role, database or table to the next session."""
    settings = dict(connections["mysql"].settings_dict)
    settings["OPTIONS"] = {**settings["OPTIONS"], "pool": {"max_size": 1}}
    db = DatabaseInterface("own", settings)
    async with db:
        before, after = await carried(db, MY_WAYS[way], MY_PROBE, mode)
        async with db.get_session(autocommit=True) as session:
            for statement in ("EXECUTE tenant", "SELECT * FROM leaky_temp"):
                with pytest.raises(Exception, match=r"1243|1146"):
                    await session.execute(statement)
            assert await session.fetch_value("SELECT COUNT(*) FROM leaky_counts") >= 0
    assert before == after


# SQLite


LITE_SCHEMA = """
CREATE TABLE plain (n);
CREATE VIEW view AS SELECT n FROM plain;
CREATE TABLE triggers (n);
CREATE TRIGGER t BEFORE INSERT ON triggers BEGIN INSERT INTO plain VALUES (new.n); END;
"""


def _function(connection: Any) -> None:
    connection.connection.create_function("tenant", 0, lambda: TENANT)


def _script(connection: Any) -> None:
    connection.connection.executescript("PRAGMA cache_size = 77; CREATE TEMP TABLE tenant (n)")


LITE_WAYS: dict[str, Way] = {
    "pragma": sql("PRAGMA cache_size = 77"),
    "pragma of the begin": sql("PRAGMA query_only = ON"),
    "pragma of the settings": sql("PRAGMA recursive_triggers = ON", "PRAGMA cache_size = 77"),
    "comment before it": sql("/* SELECT */ PRAGMA cache_size(77)"),
    "attach": sql("ATTACH ':memory:' AS tenant"),
    "temporary table": sql("CREATE TEMP TABLE tenant (n)"),
    "temporary view": sql("CREATE VIEW temp.tenant AS SELECT 1"),
    "temporary trigger": sql(
        "CREATE TEMP TRIGGER tenant BEFORE INSERT ON plain BEGIN SELECT 1; END"
    ),
    "view": sql("SELECT * FROM view"),
    "trigger": sql("INSERT INTO triggers VALUES (1)"),
    "function": sync(_function),
    "script of the driver": sync(_script),
    **drivers_ways("PRAGMA cache_size = 77"),
}
LITE_PROBE = """
SELECT (SELECT cache_size FROM pragma_cache_size), (SELECT count(*) FROM pragma_database_list),
    (SELECT count(*) FROM sqlite_temp_master), (SELECT query_only FROM pragma_query_only),
    (SELECT count(*) FROM pragma_function_list WHERE name = 'tenant'),
    (SELECT recursive_triggers FROM pragma_recursive_triggers)
"""


@pytest.fixture
async def lite(tmp_path: Path) -> AsyncIterator[DatabaseInterface]:
    options = {"pool": {"max_size": 1}, "init_command": "PRAGMA cache_size = 99"}
    name = tmp_path / "file.sqlite3"
    entry = {"ENGINE": "django.db.backends.sqlite3", "NAME": name, "OPTIONS": options}
    db = DatabaseInterface("own", ConnectionHandler({"default": entry}).settings["default"])
    async with db:
        async with db.get_session(autocommit=True) as session:
            await session.execute_script(LITE_SCHEMA)
        yield db


@MODES
@pytest.mark.parametrize("way", LITE_WAYS)
async def test_sqlite(lite: DatabaseInterface, way: str, mode: str) -> None:
    """No way brings a pragma, database, table or function to the next session; a connection that
    has something of the kind is closed, and no other."""
    opened = lite.stats()["connections_num"]
    before, after = await carried(lite, LITE_WAYS[way], LITE_PROBE, mode, connections_stay=False)
    assert before == after
    if way in ("view", "trigger"):
        assert lite.stats()["connections_num"] == opened


async def test_a_setting_of_the_options_that_a_session_repeats_is_noticed_too(
    lite: DatabaseInterface,
) -> None:
    """SQLite compiles each text once; what was compiled before the first session counts again."""
    async with lite.get_session(autocommit=True) as session:
        await session.fetch_value("SELECT 1")
    opened = lite.stats()["connections_num"]
    async with lite.get_session(autocommit=True) as session:
        await session.execute("PRAGMA cache_size = 99")
    async with lite.get_session(autocommit=True) as session:
        await session.fetch_value("SELECT 1")
    assert lite.stats()["connections_num"] == opened + 1


# Ends of a session of all kinds


SLOW = {
    "postgresql": "SELECT pg_sleep(60)",
    "mysql": "SELECT SLEEP(60)",
    "sqlite": "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "
    "SELECT count(*) FROM c",
}
ROWS = {
    "postgresql": "SELECT generate_series(1, 5000)",
    "mysql": "SELECT seq FROM seq_1_to_5000",
    "sqlite": "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 5000) "
    "SELECT x FROM c",
}


async def cancelled(session: Session) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await session.execute(SLOW[session.bind.vendor])


async def failed(session: Session) -> None:
    await session.execute("SELECT nonsense FROM nowhere")


async def left_a_stream(session: Session) -> None:
    async for _ in session.stream(ROWS[session.bind.vendor]):
        break


ENDS = {"cancelled": cancelled, "failed": failed, "left a stream": left_a_stream}


async def ended(db: DatabaseInterface, statement: str, probe: str, how: str) -> tuple[Any, Any]:
    """What the probe says before and after sessions that set something and end so."""

    async def look() -> Any:
        async with db.get_session() as session:
            return [list(row.values()) for row in await session.fetch_all(probe)]

    before = await look()
    for autocommit in (False, True):
        reached = False
        # What was cut, or failed, is told at the end of the transaction too.
        with contextlib.suppress(Error, TransactionManagementError):
            async with db.get_session(autocommit=autocommit) as session:
                await session.execute(statement)
                reached = True
                await ENDS[how](session)
        assert reached
        if (after := await look()) != before:
            break
    for turns in range(0, 40, 3):
        # Cancelled after so many turns of the loop, at whatever it awaits then.
        task = asyncio.create_task(one_statement(db, statement))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        if (after := await look()) != before:
            break
    return before, after


async def one_statement(db: DatabaseInterface, statement: str) -> None:
    async with db.get_session() as session:
        await session.execute(statement)


@pytest.mark.parametrize("how", ENDS)
async def test_postgresql_after_any_end(leaky_postgresql: None, how: str) -> None:
    """Nothing comes to the next session from one that was cut, failed, or left a stream."""
    probe = PG_PROBE.replace("pg_backend_pid()", "0")
    async with DatabaseInterface.from_dsn(dsn_of_tests(pool_max_size=1), alias="own") as db:
        before, after = await ended(db, "SELECT leaky.keeps(1)", probe, how)
    assert before == after


@pytest.mark.parametrize("how", ENDS)
async def test_mysql_after_any_end(leaky_mysql: None, how: str) -> None:
    """Nothing comes to the next session from one that was cut, failed, or left a stream."""
    settings = dict(connections["mysql"].settings_dict)
    settings["OPTIONS"] = {**settings["OPTIONS"], "pool": {"max_size": 1}}
    async with DatabaseInterface("own", settings) as db:
        probe = MY_PROBE.replace("CONNECTION_ID()", "0")
        before, after = await ended(db, "SELECT leaky_keeps(1)", probe, how)
    assert before == after


@pytest.mark.parametrize("how", ENDS)
async def test_sqlite_after_any_end(lite: DatabaseInterface, how: str) -> None:
    """Nothing comes to the next session from one that was cut, failed, or left a stream."""
    before, after = await ended(lite, "PRAGMA cache_size = 77", LITE_PROBE, how)
    assert before == after
