"""What is refused of SQL text and names before anything is sent.

On a real pool where the point is that nothing is taken from it.
"""

from __future__ import annotations

import pytest
from django.db import DatabaseError
from psycopg import sql as composed

from django_asyncsession import DatabaseInterface, MultipleStatements
from django_asyncsession.scanner import scanner
from django_asyncsession.statements import (
    change_in,
    check_one_statement,
    check_savepoint_name,
    locks,
)

ONE = [
    "SELECT 1",
    "SELECT 1;",
    "SELECT 1 ; ; ",
    "SELECT ';'",
    "SELECT 'it''s; fine'",
    'SELECT 1 AS "a;b"',
    "SELECT `a;b` FROM t",
    "SELECT 1 -- one; two",
    "SELECT 1; -- done",
    "SELECT 1; /* done; */",
    "SELECT 1; /* a */ -- b\n;",
    "/* a; b */ SELECT 1",
    "-- a; b\nSELECT 1;",
    "DO $$ BEGIN PERFORM 1; PERFORM 2; END $$",
    "CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $x$ BEGIN RETURN 1; END $x$;",
    "CREATE TRIGGER t AFTER INSERT ON a BEGIN UPDATE b SET i=1; DELETE FROM c; END",
    r"SELECT E'it\'s; fine'",
    r"""SELECT 'C:\\', $$a\; b$$, "c\;d" -- \; e""",
    "",
    " ; ",
]
# Those that one database alone takes for one statement.
ONLY = {
    "SELECT `a;b` FROM t": ("mysql", "sqlite"),
    "DO $$ BEGIN PERFORM 1; PERFORM 2; END $$": ("postgresql",),
    ONE[14]: ("postgresql",),
    ONE[15]: ("mysql", "sqlite"),
    ONE[16]: ("postgresql", "mysql"),
    ONE[17]: ("postgresql",),
}
MANY = [
    ("SELECT 1; SELECT 2", 2),
    ("SELECT 1;SELECT 2;", 2),
    ("SELECT ';'; DROP TABLE x", 2),
    ("SELECT 1; -- one\nDROP TABLE x", 2),
    ("/* ; */ SELECT 1; /* ; */ SELECT 2; SELECT 3", 3),
    ("SELECT CASE WHEN 1=1 THEN 2 END; DROP TABLE x", 2),
    ("CREATE TABLE a (i int); DROP TABLE b", 2),
    ("BEGIN; DELETE FROM x", 2),
]
# Two statements for these databases alone.
MANY_FOR = [
    ("postgresql", r"SELECT '\'; DROP TABLE x; --'"),
    ("sqlite", r"SELECT '\'; DROP TABLE x; --'"),
    # MySQL runs what is in such a comment.
    ("mysql", "SELECT 1; /*! DROP TABLE x */"),
    ("postgresql", "explain select 1 # 2; commit; --"),
    ("mysql", "select 1 --1; commit"),
    ("mysql", "select 1 as $$; delete from t; -- $$"),
    ("mysql", "create temporary table t as select 1 as declare; delete from u"),
]


READS = [
    "SELECT 1",
    "  (select 1) UNION (SELECT 2)",
    "/* INSERT */ SELECT 'update', updated, deleted FROM t -- for all",
    "-- a\n# b\nSHOW TABLES",
    "WITH t AS (SELECT updated FROM u) SELECT * FROM t",
    "EXPLAIN SELECT 1",
    "PRAGMA table_info(t)",
    'SAVEPOINT "s"',
    "VALUES (1), (2)",
    "DECLARE c CURSOR FOR SELECT 1",
    "",
    " -- nothing",
]
CHANGES = [
    ("INSERT INTO t VALUES (1)", "INSERT"),
    ("/* SELECT */ update t SET a = 1", "UPDATE"),
    ("WITH t AS (DELETE FROM u RETURNING *) SELECT * FROM t", "WITH"),
    ("SELECT * FROM t FOR NO KEY UPDATE", "SELECT"),
    ("SELECT * FROM t LOCK IN SHARE MODE", "SELECT"),
    ("SELECT set_config('a.b', '1', true)", "SELECT"),
    ("EXPLAIN (ANALYZE) UPDATE t SET a = 1", "EXPLAIN"),
    ("PRAGMA foreign_keys = ON", "PRAGMA"),
    ("SET LOCAL search_path TO other", "SET"),
    ("CREATE TABLE t (i int)", "CREATE"),
    ("CALL f()", "CALL"),
    ("NOTIFY channel", "NOTIFY"),
]


VENDORS = ["postgresql", "mysql", "sqlite"]


@pytest.mark.parametrize("sql", READS)
def test_a_statement_that_reads_changes_nothing(sql: str) -> None:
    assert change_in(sql, scanner("mysql" if "#" in sql else "postgresql")) == ""


@pytest.mark.parametrize(("sql", "word"), CHANGES)
@pytest.mark.parametrize("vendor", VENDORS)
def test_a_statement_that_does_more_is_named_by_its_first_word(
    vendor: str, sql: str, word: str
) -> None:
    assert change_in(sql, scanner(vendor)) == word


def test_what_mysql_runs_in_a_comment_changes_something() -> None:
    assert change_in("/*! INSERT INTO t VALUES (1) */", scanner("mysql")) == "INSERT"
    assert change_in("/*! INSERT INTO t VALUES (1) */", scanner("postgresql")) == ""


@pytest.mark.parametrize("sql", ONE)
@pytest.mark.parametrize("vendor", VENDORS)
def test_one_statement_is_taken_whatever_semicolons_it_quotes(vendor: str, sql: str) -> None:
    if vendor in ONLY.get(sql, VENDORS):
        check_one_statement(sql, vendor)


@pytest.mark.parametrize(
    ("vendor", "sql", "count"),
    [(vendor, *many) for many in MANY for vendor in VENDORS]
    + [(vendor, sql, sql.count("; ") + 1 - (sql[-1] in "-'$")) for vendor, sql in MANY_FOR],
)
def test_more_than_one_statement_is_refused_with_their_number(
    vendor: str, sql: str, count: int
) -> None:
    with pytest.raises(
        MultipleStatements, match=f"^{count} statements where one is taken; use execute_script"
    ):
        check_one_statement(sql, vendor)


def test_statements_are_counted_no_further_than_a_message_needs() -> None:
    with pytest.raises(MultipleStatements, match=r"^100 or more statements"):
        check_one_statement("SELECT 1;" * 1000, "postgresql")


def test_sql_composed_by_the_driver_is_taken_and_other_objects_are_not() -> None:
    check_one_statement(composed.SQL("SELECT {}").format(composed.Literal(1)), "postgresql")
    for wrong in (None, 1, b"SELECT 1", ["SELECT 1"]):
        with pytest.raises(TypeError, match=f"SQL must be a string, not {type(wrong).__name__}"):
            check_one_statement(wrong, "postgresql")


@pytest.mark.parametrize("name", ["a", "sp 1", "a-b", "ünïcode", "x" * 63, "select", "a;b"])
def test_a_savepoint_name_may_be_what_can_be_quoted(name: str) -> None:
    check_savepoint_name(name)


@pytest.mark.parametrize(
    "name", ["", 'a"b', "a'b", "a`b", "a\\b", "a\0b", "100%", "x" * 64, "é" * 32]
)
def test_a_savepoint_name_that_cannot_be_quoted_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a savepoint; use 1 to 63"):
        check_savepoint_name(name)


async def test_two_statements_are_refused_before_anything_is_sent(
    real_database: DatabaseInterface,
) -> None:
    both = "INSERT INTO tests_user (name, level) VALUES ('a', 1); DELETE FROM tests_user"

    async def stream() -> None:
        await anext(session.stream(both))

    async with real_database.get_session() as session:
        for refused in (
            session.execute(both),
            session.cursor(both),
            session.fetch(both),
            session.fetch_value(both),
            session.fetch_all(both),
            session.execute_many(both, []),
            stream(),
        ):
            with pytest.raises(MultipleStatements) as caught:
                await refused
            assert isinstance(caught.value, DatabaseError)
        assert real_database.stats()["requests_num"] == 0
    async with real_database.get_transaction() as transaction:
        for refused in (transaction.execute(both), transaction.cursor(both)):
            with pytest.raises(MultipleStatements):
                await refused


@pytest.mark.parametrize("vendor", ["postgresql", "mysql", "sqlite"])
def test_what_is_quoted_or_a_comment_neither_changes_nor_locks(vendor: str) -> None:
    hidden = "for update; insert into t; set_config(a); lock in share mode; lock table t"
    texts = [f"SELECT '{hidden}'", f'SELECT 1 AS "{hidden}"', f"SELECT 1 /* {hidden} */"]
    texts += [
        f"SELECT 1 -- {hidden}",
        f"WITH x AS (SELECT '{hidden}') SELECT 1",
        "SELECT forupdate",
    ]
    texts += {
        "postgresql": [f"SELECT $a${hidden}$a$", f"SELECT E'\\'{hidden}'"],
        "mysql": [f"SELECT '\\'{hidden}'", f"SELECT 1 # {hidden}", f"SELECT `{hidden}`"],
        "sqlite": [f"SELECT [{hidden}]"],
    }[vendor]
    for text in texts:
        assert change_in(text, scanner(vendor)) == "", text
        assert not locks(text, vendor), text


@pytest.mark.parametrize("vendor", ["postgresql", "mysql", "sqlite"])
def test_a_lock_is_seen_through_what_stands_between_its_words(vendor: str) -> None:
    for text in (
        "SELECT 'a' FROM t FOR UPDATE",
        "SELECT 1 FROM t for/* ' */update",
        "select '' from t For -- '\n Update",
        "WITH x AS (SELECT ';') SELECT * FROM x LOCK\tIN SHARE MODE",
    ):
        assert change_in(text, scanner(vendor)) in ("SELECT", "WITH"), text
        assert locks(text, vendor), text
    assert locks("SELECT 1 /*! FOR UPDATE */", "mysql")
    assert not locks("SELECT 1 /*! FOR UPDATE */", "postgresql")
