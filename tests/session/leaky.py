"""Ways to leave something on a connection, and whether the next session finds it there."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from django.db import connections
from django.db.transaction import TransactionManagementError

from django_asyncsession import DatabaseInterface, Session

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

PG_PROBE = """
SELECT coalesce(current_setting('app.tenant', true), ''), current_setting('search_path'),
    (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
    (SELECT count(*) FROM pg_listening_channels()), to_regclass('pg_temp.tenant') IS NULL,
    (SELECT count(*) FROM pg_prepared_statements WHERE from_sql), pg_backend_pid(),
    current_setting('TimeZone')
"""
