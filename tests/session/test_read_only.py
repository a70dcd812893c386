"""Read-only sessions: whatever SQL they run, the database is as it was, in both modes; and the next
session on the connection may write."""

from __future__ import annotations

import io
import sqlite3
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import DatabaseError, OperationalError, connections

from django_asyncsession import AsyncSessionError, DatabaseInterface

# What the database itself refuses.
REFUSED = [
    "INSERT INTO guarded (n) VALUES (2)",
    "UPDATE guarded SET n = 2",
    "DELETE FROM guarded",
    "CREATE TABLE made (n integer)",
    "ALTER TABLE guarded ADD COLUMN more integer",
    "DROP TABLE guarded",
    "CREATE INDEX made ON guarded (n)",
    "CREATE VIEW made AS SELECT 1",
]
# What would open the door for the next statement, or change something without one.
DOORS = {
    "postgresql": [
        "SET TRANSACTION READ WRITE",
        "SET transaction_read_only = off",
        'SET LOCAL "transaction_read_only" = off',
        "/* x */ set session default_transaction_read_only to off",
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
        'SET U&"\\0074ransaction_read_only" = off',
        "RESET default_transaction_read_only",
        "RESET ALL",
        "DISCARD ALL",
        "START TRANSACTION READ WRITE",
        "VACUUM guarded",
        "REINDEX TABLE guarded",
        "ALTER SYSTEM SET work_mem = '5MB'",
        "COPY guarded TO PROGRAM 'cat'",
        "COPY (SELECT 1) TO '/tmp/made'",
        "COPY (SELECT 1) TO U&'/tmp/m\\0061de'",
        "EXPLAIN ANALYZE CREATE TABLE made AS SELECT 1",
        'EXPLAIN (COSTS off, "analyze") CREATE MATERIALIZED VIEW made AS SELECT 1',
        "EXPLAIN (ANALYZE) SELECT 1 INTO made",
    ],
    "mysql": [
        "SET SESSION TRANSACTION READ WRITE",
        "SET @@session.tx_read_only = 0",
        "SET `tx_read_only` = 0",
        "SET STATEMENT tx_read_only = 0 FOR DELETE FROM guarded",
        "START TRANSACTION READ WRITE",
        "BEGIN NOT ATOMIC SET SESSION TRANSACTION READ WRITE; DELETE FROM guarded; END",
        "IF 1 THEN SET SESSION TRANSACTION READ WRITE; DELETE FROM guarded; END IF",
        "/*! BEGIN NOT ATOMIC SET tx_read_only = 0; DELETE FROM guarded; END */",
        "EXECUTE IMMEDIATE 'SET STATEMENT tx_read_only = 0 FOR DELETE FROM guarded'",
        "SET GLOBAL net_write_timeout = 61",
        "FLUSH TABLES",
        "ANALYZE TABLE guarded",
        "KILL QUERY 0",
        "SELECT 1 INTO OUTFILE '/tmp/made'",
        "CALL opens()",
    ],
    "sqlite": [
        "PRAGMA query_only = OFF",
        "/**/ pragma query_only(0)",
        "PRAGMA journal_mode = DELETE",
        "ATTACH ':memory:' AS other",
        "VACUUM",
    ],
}
TRUNCATES = {"postgresql": ["TRUNCATE guarded"], "mysql": ["TRUNCATE TABLE guarded"], "sqlite": []}
HARMLESS = {
    "postgresql": [
        "SET LOCAL statement_timeout = 9999",
        'SET search_path = "$user", public',
        "SELECT ';'",
        "EXPLAIN SELECT 1",
        "EXPLAIN ANALYZE SELECT 1",
        "EXPLAIN SELECT 1 INTO made",
    ],
    "mysql": ["SET @x = 1", "SET NAMES utf8mb4", "ANALYZE SELECT 1", "SELECT 'INTO OUTFILE'"],
    "sqlite": ["PRAGMA table_info(guarded)", "EXPLAIN DELETE FROM guarded"],
}

# Texts and functions that end the transaction, or its read-only mode, by themselves; PostgreSQL's
# driver would send several statements.
SEVERAL = {
    "postgresql": [
        "COMMIT; DELETE FROM guarded",
        "COMMIT; BEGIN READ WRITE; DELETE FROM guarded; COMMIT",
        "SELECT 1; COMMIT; DELETE FROM guarded; COMMIT",
        "SELECT set_config('default_transaction_read_only', 'off', false)",
        "SELECT set_config('transaction_read_only', 'off', false)",
        "SELECT opens_function()",
        "CALL opens()",
        "DO $$ BEGIN COMMIT; SET TRANSACTION READ WRITE; DELETE FROM guarded; END $$",
    ],
    "mysql": [
        "COMMIT; DELETE FROM guarded",
        "CALL opens()",
        "SELECT opens_function()",
        "SELECT NEXTVAL(counting)",
    ],
    "sqlite": ["COMMIT; DELETE FROM guarded", "PRAGMA query_only = OFF; DELETE FROM guarded"],
}
ROUTINES = {
    "postgresql": [
        "CREATE OR REPLACE PROCEDURE opens() LANGUAGE plpgsql AS "
        "$$ BEGIN COMMIT; SET TRANSACTION READ WRITE; DELETE FROM guarded; END $$",
        "CREATE OR REPLACE FUNCTION opens_function() RETURNS int LANGUAGE plpgsql AS $$ BEGIN "
        "PERFORM set_config('default_transaction_read_only', 'off', false); RETURN 1; END $$",
    ],
    "mysql": [
        "CREATE OR REPLACE PROCEDURE opens() "
        "BEGIN START TRANSACTION READ WRITE; DELETE FROM guarded; COMMIT; END",
        "CREATE OR REPLACE FUNCTION opens_function() RETURNS int "
        "BEGIN SET SESSION tx_read_only = 0; RETURN 1; END",
        "CREATE OR REPLACE SEQUENCE counting",
    ],
    "sqlite": [],
}
UNDO = {
    "postgresql": ["DROP PROCEDURE opens", "DROP FUNCTION opens_function"],
    "mysql": ["DROP PROCEDURE opens", "DROP FUNCTION opens_function", "DROP SEQUENCE counting"],
    "sqlite": [],
}

START = [
    "DROP TABLE IF EXISTS made",
    "DROP TABLE IF EXISTS guarded",
    "CREATE TABLE guarded (n integer)",
    "INSERT INTO guarded (n) VALUES (1)",
]


def ask(alias: str, *statements: str) -> Any:
    """The rows of the last statement, over Django's own connection."""
    with connections[alias].cursor() as cursor:
        for sql in statements:
            cursor.execute(sql)
        return cursor.fetchall() if cursor.description else None


@pytest.fixture
async def guarded(alias: str) -> AsyncIterator[DatabaseInterface]:
    """Each database in turn, with a table of one row, and one connection in the pool."""
    settings_dict = connections.settings[alias]
    pool = {"max_size": 1, "timeout": 5}
    entry = {**settings_dict, "OPTIONS": {**settings_dict["OPTIONS"], "pool": pool}}
    db = DatabaseInterface(alias, entry)
    async with db.get_session(autocommit=True) as session:
        for sql in START:
            await session.execute(sql)
    yield db
    async with db.get_session(autocommit=True) as session:
        await session.execute("DROP TABLE IF EXISTS guarded")
    await db.close()


async def untouched(db: DatabaseInterface) -> None:
    """Assert that the table is as it was, and that nothing of read-only stays."""
    async with db.get_session() as session:
        rows = await session.fetch_all("SELECT * FROM guarded")
        assert rows == [(1,)]
        await session.execute("UPDATE guarded SET n = 2")
        session.set_rollback(True)
    async with db.get_session(autocommit=True) as session:
        await session.execute("UPDATE guarded SET n = 1")
        with pytest.raises(DatabaseError):
            await session.execute("SELECT * FROM made")


@pytest.mark.parametrize("autocommit", [False, True], ids=["transaction", "autocommit"])
async def test_a_read_only_session_changes_nothing(
    guarded: DatabaseInterface, autocommit: bool
) -> None:
    for sql in REFUSED + TRUNCATES[guarded.vendor] + DOORS[guarded.vendor]:
        with pytest.raises(DatabaseError):
            async with guarded.get_session(read_only=True, autocommit=autocommit) as session:
                await session.execute(sql)
                await session.execute("DELETE FROM guarded")
        await untouched(guarded)


@pytest.mark.parametrize("autocommit", [False, True], ids=["transaction", "autocommit"])
async def test_each_statement_is_refused_though_nothing_follows_it(
    guarded: DatabaseInterface, autocommit: bool
) -> None:
    """If it were not, it would be committed."""
    for sql in REFUSED + TRUNCATES[guarded.vendor] + DOORS[guarded.vendor]:
        with pytest.raises(DatabaseError):
            async with guarded.get_session(read_only=True, autocommit=autocommit) as session:
                await session.execute(sql)
        await untouched(guarded)


@pytest.mark.parametrize("autocommit", [False, True], ids=["transaction", "autocommit"])
async def test_code_that_goes_on_after_a_refusal_changes_nothing(
    guarded: DatabaseInterface, autocommit: bool
) -> None:
    """Each statement is tried behind each other one on one connection, and by the driver too."""

    def attack(door: str) -> None:
        wrapper = connections[guarded.alias]
        for sql in (door, "DELETE FROM guarded", "COMMIT", door, *REFUSED, "COMMIT"):
            with suppress(Exception), wrapper.cursor() as cursor:
                cursor.execute(sql)
        for sql in (door, "DELETE FROM guarded", "COMMIT"):
            with suppress(Exception), wrapper.connection.cursor() as cursor:
                cursor.execute(sql)

    for door in DOORS[guarded.vendor]:
        with suppress(Exception):
            async with guarded.get_session(read_only=True, autocommit=autocommit) as session:
                await session.run_sync(attack, door)
        await untouched(guarded)


@pytest.mark.parametrize("autocommit", [False, True], ids=["transaction", "autocommit"])
async def test_sync_code_drivers_cursors_and_routines_cannot_open_the_door(
    guarded: DatabaseInterface, autocommit: bool
) -> None:
    def attack(text: str, how: str) -> None:
        connection = connections[guarded.alias]
        for sql in (text, "DELETE FROM guarded", "COMMIT"):
            with suppress(Exception), connection.cursor() as cursor:
                if how == "Django's cursor":
                    cursor.execute(sql)
                elif how == "its driver's cursor":
                    cursor.cursor.execute(sql)
                else:
                    connection.connection.cursor().execute(sql)

    async with guarded.get_session(autocommit=True) as session:
        for sql in ROUTINES[guarded.vendor]:
            await session.execute(sql)
    try:
        for text in SEVERAL[guarded.vendor]:
            for how in ("Django's cursor", "its driver's cursor", "a cursor of the driver's"):
                with suppress(Exception):
                    async with guarded.get_session(
                        read_only=True, autocommit=autocommit
                    ) as session:
                        await session.run_sync(attack, text, how)
                await untouched(guarded), text, how
    finally:
        async with guarded.get_session(autocommit=True) as session:
            for sql in UNDO[guarded.vendor]:
                await session.execute(sql)


async def test_methods_of_sqlites_driver_find_the_transaction_begun(tmp_path: Any) -> None:
    """Also if they come before any statement."""
    entry = {**connections.settings["sqlite"], "NAME": str(tmp_path / "blobs.sqlite3")}

    def write() -> None:
        raw = connections["own"].connection
        with raw.blobopen("blobs", "data", 1) as blob:
            blob.write(b"evil")

    async with DatabaseInterface("own", entry) as db:
        async with db.get_session(autocommit=True) as session:
            await session.execute("CREATE TABLE blobs (data blob)")
            await session.execute("INSERT INTO blobs VALUES (x'00000000')")
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            async with db.get_session(read_only=True) as session:
                await session.run_sync(write)
        async with db.get_session() as session:
            await session.run_sync(write)
            session.set_rollback(True)
        async with db.get_session() as session:
            assert await session.fetch_value("SELECT data FROM blobs") == bytes(4)


async def test_a_script_of_a_read_only_session_changes_nothing(guarded: DatabaseInterface) -> None:
    for autocommit in (False, True):
        for door in DOORS[guarded.vendor]:
            with pytest.raises(DatabaseError):
                async with guarded.get_session(read_only=True, autocommit=autocommit) as session:
                    await session.execute_script(f"SELECT 1; {door}; DELETE FROM guarded; COMMIT")
            await untouched(guarded)


async def test_a_read_only_session_runs_what_only_reads(guarded: DatabaseInterface) -> None:
    for autocommit in (False, True):
        async with guarded.get_session(read_only=True, autocommit=autocommit) as session:
            for sql in HARMLESS[guarded.vendor]:
                await session.execute(sql)
            assert await session.fetch_value("SELECT n FROM guarded") == 1
            assert [row async for row in session.stream("SELECT n FROM guarded")] == [(1,)]
            await session.execute_script("SELECT 1; SELECT 2")
        await untouched(guarded)


async def test_the_refusal_names_the_statement_and_the_remedy(guarded: DatabaseInterface) -> None:
    door = DOORS[guarded.vendor][0]
    with pytest.raises(OperationalError, match=r"in a read-only session of .*; use a session that"):
        async with guarded.get_session(read_only=True) as session:
            await session.execute(door)


@pytest.fixture
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    yield


def test_asyncsql_without_write_changes_nothing(alias: str, no_terminal: None) -> None:
    """Whatever it is given; what it cannot run it refuses, and what it ran is rolled back."""
    vendor = connections[alias].vendor
    ask(alias, *START)
    everything = [*REFUSED, *TRUNCATES[vendor], *DOORS[vendor], "COMMIT", "ROLLBACK"]
    try:
        for sql in everything:
            for more in ([], ["--multi"]):
                text = f"{sql}; DELETE FROM guarded; COMMIT" if more else sql
                out = {"stdout": io.StringIO(), "stderr": io.StringIO()}
                with suppress(CommandError, AsyncSessionError):
                    call_command("asyncsql", text, "--database", alias, *more, **out)
                assert list(ask(alias, "SELECT * FROM guarded")) == [(1,)], sql
    finally:
        ask(alias, "DROP TABLE guarded")
        assert "made" not in connections[alias].introspection.table_names()
        connections[alias].close()


# Statements that end the transaction from inside: some only that, some to write after it.
ENDING = {
    "postgresql": (
        [
            "CREATE OR REPLACE PROCEDURE only_ends() LANGUAGE plpgsql AS $$ BEGIN COMMIT; END $$",
            "CREATE OR REPLACE PROCEDURE ends_and_writes() LANGUAGE plpgsql AS "
            "$$ BEGIN COMMIT; DELETE FROM guarded; COMMIT; END $$",
        ],
        ["CALL only_ends()", "DO $$ BEGIN ROLLBACK; END $$"],
        ["CALL ends_and_writes()", "DO $$ BEGIN COMMIT; DELETE FROM guarded; END $$"],
    ),
    "mysql": (
        [
            "CREATE OR REPLACE PROCEDURE only_ends() COMMIT",
            "CREATE OR REPLACE PROCEDURE ends_and_writes() "
            "BEGIN COMMIT; DELETE FROM guarded; COMMIT; END",
            "CREATE OR REPLACE PROCEDURE ends_by_schema() "
            "BEGIN CREATE TABLE made (n int); DELETE FROM guarded; END",
        ],
        ["CALL only_ends()"],
        [
            "CALL ends_and_writes()",
            "CALL ends_by_schema()",
            "CREATE TABLE made (n int)",
            "ALTER TABLE guarded ADD more int",
            "TRUNCATE TABLE guarded",
        ],
    ),
}


@pytest.mark.parametrize("alias", ["default", "mysql"], indirect=True)
def test_asyncsql_tells_that_a_statement_ended_its_transaction(
    alias: str, no_terminal: None
) -> None:
    """Without --write nothing is written by it or after it, and the command fails."""
    routines, ends, writes = ENDING[connections[alias].vendor]
    ask(alias, *START, *routines)
    names = [text.partition("PROCEDURE ")[2].partition("(")[0] for text in routines]
    told = (
        # By us, by the server that refuses the write, and by PostgreSQL that refuses the end.
        r"the SQL ended the transaction; nothing after it was run|--write allows changes"
        r"|invalid transaction termination"
    )
    try:
        for sql in [*ends, *writes]:
            for text in (sql, f"{sql}; DELETE FROM guarded"):
                out = {"stdout": io.StringIO(), "stderr": io.StringIO()}
                with pytest.raises(CommandError, match=told):
                    call_command("asyncsql", text, "--database", alias, "--multi", **out)
                assert "committed" not in out["stderr"].getvalue()
                assert list(ask(alias, "SELECT * FROM guarded")) == [(1,)], text
                assert "made" not in connections[alias].introspection.table_names(), text
    finally:
        ask(alias, *[f"DROP PROCEDURE {name}" for name in names], "DROP TABLE guarded")
        connections[alias].close()
