"""Whatever a session does to its connection, the next one on the same connection does not see it.

The database itself is made to set something, in every way that needs no word of it in the statement
that the session sends, and the driver is used behind Django's back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from django.db import Error, IntegrityError, connections
from django.db.backends.postgresql.base import DatabaseWrapper as PostgreSQL
from django.db.backends.signals import connection_created
from django.db.transaction import TransactionManagementError
from django.db.utils import ConnectionHandler

from django_asyncsession import DatabaseInterface, Session
from django_asyncsession.backends.postgresql.connection import RESET
from tests.postgres import ask, dsn_of_tests

TENANT = "customer A"
Way = Callable[[Session], Awaitable[Any]]


def sql(*statements: str) -> Way:
    async def run(session: Session) -> None:
        for statement in statements:
            await session.execute(statement)

    return run


def sync(fn: Callable[[Any], Any]) -> Way:
    async def run(session: Session) -> None:
        await session.run_sync(lambda: fn(connections[session.alias]))

    return run


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


async def carried(
    db: DatabaseInterface, way: Way, probe: str, mode: str, connections_stay: bool = True
) -> tuple[Any, Any]:
    """What the probe says in a first session, and in one on the same connection after the way."""
    async with db.get_session() as session:
        before = await session.fetch_all(probe)
    if mode == "autocommit":
        async with db.get_session(autocommit=True) as session:
            await way(session)
    else:
        # A script of SQLite's driver ends the transaction, which is told.
        with contextlib.suppress(ZeroDivisionError, TransactionManagementError):
            async with db.get_session() as session:
                if mode == "callback":
                    session.on_commit(lambda: None)
                await way(session)
                if mode == "rollback":
                    raise ZeroDivisionError
    async with db.get_session() as session:
        after = await session.fetch_all(probe)
    if connections_stay:
        assert db.stats()["connections_num"] == 1 and db.stats()["returns_bad"] == 0
    return [list(row.values()) for row in before], [list(row.values()) for row in after]


MODES = pytest.mark.parametrize("mode", ["commit", "rollback", "autocommit", "callback"])

# PostgreSQL

SET = (
    f"PERFORM set_config('app.tenant', '{TENANT}', false); "
    "PERFORM set_config('search_path', 'pg_catalog', false); "
    "PERFORM pg_advisory_lock(4711)"
)
PG_SCHEMA = f"""
CREATE SCHEMA leaky;
CREATE FUNCTION leaky.keeps(value anyelement) RETURNS anyelement LANGUAGE plpgsql AS
    $$ BEGIN {SET}; EXECUTE 'LISTEN tenant'; RETURN value; END $$;
CREATE FUNCTION leaky.lower(value text) RETURNS text LANGUAGE plpgsql AS
    $$ BEGIN {SET}; RETURN value; END $$;
CREATE FUNCTION leaky.says_it_is_immutable(value int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS
    $$ BEGIN {SET}; RETURN value; END $$;
CREATE FUNCTION leaky.trigger() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN {SET}; CREATE TEMP TABLE IF NOT EXISTS tenant AS SELECT 1; RETURN NEW; END $$;
CREATE FUNCTION leaky.same(a int, b text) RETURNS bool LANGUAGE plpgsql AS
    $$ BEGIN {SET}; RETURN true; END $$;
CREATE FUNCTION leaky.prepares() RETURNS int LANGUAGE plpgsql AS
    $$ BEGIN EXECUTE 'PREPARE tenant AS SELECT 1'; RETURN 1; END $$;
CREATE OPERATOR leaky.=== (LEFTARG = int, RIGHTARG = text, FUNCTION = leaky.same);
CREATE DOMAIN leaky.number AS int CHECK (leaky.says_it_is_immutable(VALUE) > 0);
CREATE PROCEDURE leaky.call() LANGUAGE plpgsql AS $$ BEGIN {SET}; END $$;
CREATE TABLE leaky.plain (n int);
CREATE VIEW leaky.view AS SELECT leaky.keeps(1) AS n;
CREATE TABLE leaky.defaults (n int, m int DEFAULT leaky.keeps(1));
CREATE TABLE leaky.generated (
    n int, m int GENERATED ALWAYS AS (leaky.says_it_is_immutable(n)) STORED
);
CREATE TABLE leaky.domains (n leaky.number);
CREATE TABLE leaky.checks (n int CHECK (leaky.says_it_is_immutable(n) > 0));
CREATE TABLE leaky.indexed (n int);
CREATE INDEX ON leaky.indexed (leaky.says_it_is_immutable(n));
CREATE TABLE leaky.triggers (n int);
CREATE TRIGGER t BEFORE INSERT ON leaky.triggers FOR EACH ROW EXECUTE FUNCTION leaky.trigger();
CREATE TABLE leaky.deferred (n int);
CREATE CONSTRAINT TRIGGER t AFTER INSERT ON leaky.deferred DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION leaky.trigger();
CREATE TABLE leaky.rules (n int);
CREATE RULE r AS ON INSERT TO leaky.rules DO ALSO SELECT leaky.keeps(1);
CREATE TABLE leaky.sequences (n serial);
CREATE AGGREGATE leaky.count (int) (
    SFUNC = int4pl, STYPE = int, FINALFUNC = leaky.says_it_is_immutable
);
"""
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
PG_PROBE = """
SELECT coalesce(current_setting('app.tenant', true), ''), current_setting('search_path'),
    (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
    (SELECT count(*) FROM pg_listening_channels()), to_regclass('pg_temp.tenant') IS NULL,
    (SELECT count(*) FROM pg_prepared_statements WHERE from_sql), pg_backend_pid(),
    current_setting('TimeZone')
"""


async def test_connections_of_libpq_are_reset_too(leaky_postgresql: None) -> None:
    """What is sent with the driver's lowest calls alone, in a session without any statement."""
    db = DatabaseInterface.from_dsn(dsn_of_tests(pool_max_size=1), alias="own")
    said: list[str] = []

    def send() -> None:
        server = connections["own"].connection.pgconn
        server.exec_(b"SELECT set_config('app.tenant', 'A', false)")
        server.notice_handler = server.notify_handler = lambda *args: said.append("heard")

    async with db:
        for autocommit in (True, False):
            async with db.get_session(autocommit=autocommit) as session:
                await session.run_sync(send)
            async with db.get_session() as session:
                assert not await session.fetch_value("SELECT current_setting('app.tenant', true)")
                await session.execute("DO $$ BEGIN RAISE WARNING 'of another tenant'; END $$")
        assert db.stats()["connections_num"] == 1
    assert not said


@pytest.mark.parametrize(
    "reading",
    [
        "SELECT 1",
        "SET standard_conforming_strings = off",
        "SELECT set_config('standard_conforming_strings', 'off', false)",
        "SET client_encoding = 'LATIN1'",
        "SET client_encoding = 'SQL_ASCII'",
    ],
)
@MODES
async def test_what_connecting_has_set_is_there_however_the_lease_let_the_server_read(
    leaky_postgresql: None, reading: str, mode: str
) -> None:
    """Also behind a comment, a semicolon, and with letters and backslashes of all kinds."""

    def receive(connection: Any, **kwargs: Any) -> None:
        if connection.alias == "own":
            with connection.cursor() as cursor:
                cursor.execute("SET app.one = 'one' -- the first")
                cursor.execute(r"SET app.path = 'C:\new\'; /* ; */")
                cursor.execute("SET app.city = '\u6771\u4eac'; SET app.last = %s", ["'; \\"])

    names = ("one", "path", "city", "last")
    probe = "SELECT " + ", ".join(f"current_setting('app.{name}')" for name in names)
    connection_created.connect(receive)
    try:
        db = DatabaseInterface.from_dsn(dsn_of_tests(pool_max_size=1), alias="own")
        async with db:
            before, after = await carried(db, sql(reading), probe, mode)
    finally:
        connection_created.disconnect(receive)
    assert before == after == [["one", "C:\\new\\", "\u6771\u4eac", "'; \\"]]


@pytest.mark.parametrize("autocommit", [False, True], ids=["transaction", "autocommit"])
async def test_statements_of_the_driver_that_a_function_has_dropped_are_prepared_anew(
    leaky_postgresql: None, autocommit: bool
) -> None:
    db = DatabaseInterface.from_dsn(dsn_of_tests(pool_max_size=1), alias="own")
    db._own_settings["OPTIONS"].update(prepare_threshold=0, server_side_binding=True)  # type: ignore[index]
    async with db:
        for statement in ("SELECT 1", "DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$", "SELECT 1"):
            async with db.get_session(autocommit=autocommit) as session:
                await session.fetch_value("SELECT 1 + %s", [1])
                await session.execute(statement)
        assert db.stats()["connections_num"] == 1


async def test_what_a_receiver_prepares_stays(leaky_postgresql: None) -> None:
    def receive(connection: Any, **kwargs: Any) -> None:
        if connection.alias == "own":
            with connection.cursor() as cursor:
                cursor.execute("PREPARE answer AS SELECT 42")

    db = DatabaseInterface.from_dsn(dsn_of_tests(pool_max_size=1), alias="own")
    db._own_settings["OPTIONS"].update(prepare_threshold=0, server_side_binding=True)  # type: ignore[index]
    connection_created.connect(receive)
    try:
        async with db:
            for _ in range(3):
                async with db.get_session() as session:
                    assert await session.fetch_value("SELECT 1 + %s", [1]) == 2
                    assert await session.fetch_value("EXECUTE answer") == 42
            assert db.stats()["connections_num"] == 1
    finally:
        connection_created.disconnect(receive)


async def test_values_bound_by_the_server_are_in_no_text_of_a_reset(
    leaky_postgresql: None,
) -> None:
    def receive(connection: Any, **kwargs: Any) -> None:
        if connection.alias == "own":
            with connection.cursor() as cursor:
                cursor.execute("SELECT set_config('app.key', %s, false)", ["s3cret"])

    db = DatabaseInterface.from_dsn(dsn_of_tests(pool_max_size=1), alias="own")
    db._own_settings["OPTIONS"].update(server_side_binding=True)  # type: ignore[index]
    connection_created.connect(receive)
    try:
        async with db:
            for _ in range(3):
                async with db.get_session() as session:
                    pid = await session.fetch_value("SELECT pg_backend_pid()")
                    assert await session.fetch_value("SHOW app.key") == "s3cret"
                [[last]] = ask("SELECT query FROM pg_stat_activity WHERE pid = %s", pid)
                assert "s3cret" not in last
            assert db.stats()["connections_num"] == 1
    finally:
        connection_created.disconnect(receive)


async def test_an_engine_says_which_reset_its_server_has(
    leaky_postgresql: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of one that has not all of PostgreSQL's statements the log says which, and the remedy."""
    kept = [statement for statement in RESET if "SEQUENCES" not in statement]
    for statements, connections_num in (([*kept, "DISCARD NOTHING"], 2), (kept, 1)):
        monkeypatch.setattr(PostgreSQL, "reset_statements", tuple(statements), raising=False)
        caplog.clear()
        db = DatabaseInterface.from_dsn(dsn_of_tests(pool_max_size=1), alias="own")
        async with db:
            for _ in range(2):
                async with db.get_session() as session:
                    await session.execute("SELECT leaky.keeps(1)")
            async with db.get_session() as session:
                assert await session.fetch_value("SHOW search_path") != "pg_catalog"
            said = caplog.text
            assert ("set reset_statements of the engine" in said) == (connections_num > 1)
            assert ('"NOTHING"' in said) == (connections_num > 1)
            assert (db.stats()["connections_num"] > 1) == (connections_num > 1)


def _copy(connection: Any) -> None:
    with connection.cursor() as cursor, cursor.copy("COPY leaky.triggers FROM STDIN") as copy:
        copy.write_row([1])


def _pipeline(connection: Any) -> None:
    with connection.connection.pipeline():
        connection.connection.execute("SELECT leaky.keeps(1)")


@pytest.fixture(scope="module")
def leaky_postgresql(test_databases: None, django_db_blocker: Any) -> Any:
    with django_db_blocker.unblock(), connections["default"].cursor() as cursor:
        cursor.execute(PG_SCHEMA)
    connections["default"].close()
    yield
    with django_db_blocker.unblock(), connections["default"].cursor() as cursor:
        cursor.execute("DROP SCHEMA leaky CASCADE")
    connections["default"].close()


@MODES
@pytest.mark.parametrize("way", PG_WAYS)
async def test_postgresql(leaky_postgresql: None, way: str, mode: str) -> None:
    """No way brings a setting, lock, channel, table or statement to the next session."""
    db = DatabaseInterface.from_dsn(dsn_of_tests(pool_max_size=1), alias="own")
    async with db:
        before, after = await carried(db, PG_WAYS[way], PG_PROBE, mode)
    assert before == after


async def test_what_the_driver_has_prepared_is_kept_but_not_what_sql_has(
    leaky_postgresql: None,
) -> None:
    dsn = dsn_of_tests(pool_max_size=1, prepare_threshold=1)
    db = DatabaseInterface.from_dsn(dsn, alias="own")
    db._own_settings["OPTIONS"].update(prepare_threshold=0, server_side_binding=True)  # type: ignore[index]
    count = "SELECT count(*) FROM pg_prepared_statements WHERE from_sql = %s"
    async with db:
        for statement in ("SELECT 1", "SELECT leaky.prepares()", "PREPARE tenant AS SELECT 2"):
            for autocommit in (False, True):
                async with db.get_session(autocommit=autocommit) as session:
                    await session.fetch_value(count, [True])
                    await session.execute(statement)
                async with db.get_session() as session:
                    assert await session.fetch_value(count, [True]) == 0
                    kept = await session.fetch_value(count, [False])
                    assert kept > 1 or "prepare" in statement.lower()
        assert db.stats()["connections_num"] == 1


async def test_a_commit_that_fails_is_told_as_ever_and_leaves_nothing(
    leaky_postgresql: None,
) -> None:
    db = DatabaseInterface.from_dsn(dsn_of_tests(pool_max_size=1), alias="own")
    async with db:
        async with db.get_session() as session:
            before = await session.fetch_all(PG_PROBE)
        with pytest.raises(IntegrityError, match="duplicate key"):
            async with db.get_session() as session:
                await session.execute("SELECT leaky.keeps(1)")
                await session.execute(
                    "CREATE TABLE leaky.once (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)"
                )
                await session.execute("INSERT INTO leaky.once VALUES (1), (1)")
        async with db.get_session() as session:
            after = await session.fetch_all(PG_PROBE)
        assert [list(row.values()) for row in before] == [list(row.values()) for row in after]


@pytest.mark.parametrize("autocommit", [False, True], ids=["transaction", "autocommit"])
async def test_a_reset_that_fails_closes_the_connection_and_what_was_committed_holds(
    leaky_postgresql: None, autocommit: bool
) -> None:
    """The session hears nothing of it, and the next one gets a connection that works."""
    db = DatabaseInterface.from_dsn(dsn_of_tests(pool_max_size=1), alias="own")
    set_up = []

    def receive(connection: Any, **kwargs: Any) -> None:
        if connection.alias == "own" and not set_up:
            set_up.append(connection)
            with connection.cursor() as cursor:
                cursor.execute("CREATE FUNCTION leaky.set_up() RETURNS int LANGUAGE SQL RETURN 1")
                cursor.execute("SELECT leaky.set_up()")

    connection_created.connect(receive)
    try:
        async with db:
            async with db.get_session() as session:
                await session.execute("DELETE FROM leaky.plain")
            assert db.stats()["connections_num"] == 1
            async with db.get_session(autocommit=autocommit) as session:
                await session.execute_script(
                    "DROP FUNCTION leaky.set_up; INSERT INTO leaky.plain VALUES (1)"
                )
            async with db.get_session() as session:
                assert await session.fetch_value("SELECT count(*) FROM leaky.plain") == 1
            assert db.stats()["connections_num"] == 2
    finally:
        connection_created.disconnect(receive)


async def test_callbacks_of_the_commit_still_find_what_the_transaction_has_set(
    leaky_postgresql: None,
) -> None:
    db = DatabaseInterface.from_dsn(dsn_of_tests(pool_max_size=1), alias="own")
    seen = []

    def callback() -> None:
        with connections["own"].cursor() as cursor:
            cursor.execute("SHOW search_path")
            seen.append(cursor.fetchone()[0])

    async with db:
        async with db.get_session() as session:
            await session.execute("SET search_path = leaky")
            session.on_commit(callback)
        async with db.get_session() as session:
            seen.append(await session.fetch_value("SHOW search_path"))
    assert seen[0] == "leaky" != seen[1]


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
