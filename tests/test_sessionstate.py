"""Which statements may leave something on a PostgreSQL connection; the text alone decides."""

from __future__ import annotations

import time

import pytest
from psycopg import sql

from django_asyncsession.backends.postgresql.sessionstate import changes_session

LEAVES_NOTHING = [
    "SELECT 1",
    "select * from t where a = %s",
    "  \n(SELECT 1) UNION (SELECT 2)",
    'SELECT "a"."id" FROM "a" INNER JOIN "b" ON ("a"."id" = "b"."a_id") WHERE "a"."n" IN (%s, %s)',
    'SELECT COUNT(*) AS "__count" FROM "a"',
    'SELECT COALESCE(SUM("a"."n"), %s), LOWER("a"."x"), CAST("a"."y" AS varchar(10)) FROM "a"',
    "SELECT DATE_TRUNC('day', x AT TIME ZONE %s) FROM t",
    "SELECT pg_catalog.lower(x), pg_catalog.upper(x) FROM t",
    "SELECT ST_Distance(a, b) FROM t",
    "SELECT * FROM unnest(%s::int[]) AS x(n)",
    "WITH x(n) AS (SELECT 1) SELECT n FROM x",
    'INSERT INTO "t" ("a", "b") VALUES (%s, %s) RETURNING "t"."id"',
    'INSERT INTO "s"."t" ("a") SELECT * FROM UNNEST((%s)::integer[])',
    "INSERT INTO t(a) VALUES (1) ON CONFLICT(a) DO UPDATE SET a = EXCLUDED.a",
    "UPDATE t SET a = a + 1",
    "DELETE FROM t WHERE a = 1",
    "SELECT a FROM t FOR UPDATE OF t NOWAIT",
    'SAVEPOINT "s1"',
    'RELEASE SAVEPOINT "s1"',
    'ROLLBACK TO SAVEPOINT "s1"',
    "BEGIN",
    "COMMIT",
    "SET LOCAL statement_timeout = 100",
    "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    "SET CONSTRAINTS ALL IMMEDIATE",
    'CREATE TABLE "t" ("id" bigint PRIMARY KEY, "n" varchar(10), "d" numeric(5, 2))',
    'CREATE INDEX "i" ON "t" ("a", "b")',
    "CREATE INDEX i ON ONLY t(a)",
    'ALTER TABLE "t" ADD CONSTRAINT "c" FOREIGN KEY ("a") REFERENCES "u" ("id")',
    "TRUNCATE t RESTART IDENTITY CASCADE",
    "COPY t (a, b) FROM STDIN",
    "NOTIFY channel, 'text'",
    "EXPLAIN ANALYZE SELECT 1",
    "SELECT 1; ",
    "SELECT 1 -- a comment",
    "/* a comment */ SELECT 1",
    "-- a comment\nSELECT 1",
    "SELECT 1 /*route='/shop/(list)'*/",
    "",
    "-- nothing",
]
LEAVES_SOMETHING = [
    "SET search_path = x",
    "SET SESSION AUTHORIZATION someone",
    "SET ROLE someone",
    "SET TIME ZONE 'UTC'",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "set statement_timeout to 1",
    "RESET ALL",
    "DISCARD ALL",
    "LISTEN channel",
    "UNLISTEN *",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "DEALLOCATE p",
    "LOAD 'auto_explain'",
    "DO $$ BEGIN PERFORM 1; END $$",
    "CALL procedure()",
    "DECLARE c CURSOR WITH HOLD FOR SELECT 1",
    "CREATE TEMP TABLE t (a int)",
    "CREATE TEMPORARY VIEW v AS SELECT 1",
    "CREATE TABLE pg_temp.t (a int)",
    "SELECT 1 AS a INTO TEMP t",
    "SELECT pg_advisory_lock(1)",
    "SELECT pg_try_advisory_lock (1)",
    "SELECT set_config('search_path', 'x', false)",
    "SELECT pg_catalog.set_config('search_path', 'x', false)",
    'SELECT "set_config"(%s, %s, false)',
    "SELECT set_config/* sneaky */('a', 'b', false)",
    "SELECT set_config -- sneaky\n ('a', 'b', false)",
    "SELECT '/*', set_config('a', 'b', false), '*/'",
    "SELECT my_function(1)",
    "SELECT * FROM my_function(1)",
    "SELECT * FROM a JOIN b ON pg_try_advisory_lock(a.id)",
    "SELECT evil.lower('x')",
    'SELECT "evil"."lower"(1)',
    "SELECT evil . lower(1)",
    'SELECT "LOWER"(1)',
    "SELECT dblink_connect('x')",
    "INSERT INTO t(a) SELECT t(1)",
    "UPDATE t SET a = my_function(a)",
    "COPY (SELECT my_function(1)) TO STDOUT",
    "EXPLAIN ANALYZE SELECT my_function(1)",
    "BEGIN; SET search_path = x",
    "SELECT 1; SET search_path = x",
    "/* a */ SET search_path = x",
    "/* a /* b */ c */ SET search_path = x",
    "(SELECT my_function(1))",
    "SECURITY LABEL ON TABLE t IS 'x'",
    "nonsense",
]


@pytest.mark.parametrize("text", LEAVES_NOTHING)
def test_leaves_nothing(text: str) -> None:
    assert not changes_session(text)


@pytest.mark.parametrize("text", LEAVES_SOMETHING)
def test_may_leave_something(text: str) -> None:
    assert changes_session(text)
    assert changes_session(text.upper() if '"' not in text else text)


def test_what_is_not_text_may_leave_something() -> None:
    assert changes_session(sql.SQL("SELECT 1")) and changes_session(b"SELECT 1")
    assert changes_session(None)


def test_a_long_statement_is_not_read() -> None:
    assert changes_session("SELECT " + ", ".join(["1"] * 20_000))


@pytest.mark.parametrize(
    "piece", ["a", '"', "(", "a.", "/*", "--", " ", '"a"', "a (", "on ", ".", "a . "]
)
def test_no_text_takes_long_to_read(piece: str) -> None:
    text = "SELECT " + piece * (19_000 // len(piece))
    started = time.process_time()
    changes_session(text)
    assert time.process_time() - started < 0.5
