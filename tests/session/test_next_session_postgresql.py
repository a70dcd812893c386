"""The reset of PostgreSQL's connections: what it takes back, what it keeps, and one that fails."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import IntegrityError, connections
from django.db.backends.postgresql.base import DatabaseWrapper as PostgreSQL
from django.db.backends.signals import connection_created

from django_asyncsession import DatabaseInterface
from django_asyncsession.backends.postgresql.connection import RESET
from tests.postgres import ask, dsn_of_tests
from tests.session.leaky import MODES, PG_PROBE, carried, sql


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
