"""Where statements, strings, names and comments end, as each database reads them."""

from __future__ import annotations

import re
import time

import pytest

from benchmarks.scanner import BOUND, MIXES, TEXTS, VENDORS, milliseconds, text_of
from django_asyncsession.scanner import (
    LONGEST_NORMALISED,
    MySQLScanner,
    PostgreSQLScanner,
    Scanner,
    SQLiteScanner,
    cached_by_text,
    normalise,
    scanner,
)

POSTGRESQL, MYSQL, SQLITE = scanner("postgresql"), scanner("mysql"), scanner("sqlite")
OLD_STRINGS = PostgreSQLScanner(standard_strings=False)
NO_BACKSLASH = MySQLScanner(backslashes=False)
ANSI = MySQLScanner(ansi_quotes=True)
REAL_MYSQL = MySQLScanner(version=80036, mariadb=False)
EVERY = [POSTGRESQL, OLD_STRINGS, MYSQL, NO_BACKSLASH, ANSI, REAL_MYSQL, SQLITE]

# What a database takes for so many statements.
COUNTS = [
    (POSTGRESQL, "", 0),
    (POSTGRESQL, " ;; -- none\n; /* ; */", 0),
    (POSTGRESQL, "select ';', \";\", $$;$$, $a$;$$;$a$ -- ;", 1),
    (POSTGRESQL, "select 1 # 2; commit", 2),
    (POSTGRESQL, "select 1 --1; commit", 1),
    (POSTGRESQL, "select 1 -- \r; commit", 2),
    (POSTGRESQL, "select /* /* ; */ ; */ 1", 1),
    (POSTGRESQL, "select /* /* /* /* /* ; */ */ */ */ ; */ 1; select 2", 2),
    (POSTGRESQL, "/* /* /* /* /* */ */ */ */ */; select 2", 1),
    (POSTGRESQL, r"select '\'; drop table x --'", 2),
    (OLD_STRINGS, r"select '\'; drop table x --'", 1),
    (OLD_STRINGS, r"select b'\'; drop table x --'", 2),
    (POSTGRESQL, r"select E'\'; drop table x --'", 1),
    (POSTGRESQL, r"select fooE'\'; drop table x --'", 2),
    (POSTGRESQL, "select E'a'\n'\\'; drop table x --'", 1),
    (POSTGRESQL, "select E'a' 'b\\'; drop table x --'", 2),
    (POSTGRESQL, "select a$$; drop table x -- $$", 2),
    (POSTGRESQL, "select 1$$; drop table x -- $$", 1),
    (POSTGRESQL, "select $1; drop table x -- $1", 2),
    (
        POSTGRESQL,
        "create function f() begin atomic select case when a then 1 end; select 2; end",
        1,
    ),
    (POSTGRESQL, "create function f(begin int) as 'x'; drop table atomic", 2),
    (MYSQL, "select 1 # 2; commit", 1),
    (MYSQL, "select 1 --1; commit", 2),
    (MYSQL, "select 1 -- 1; commit", 1),
    (MYSQL, "select 1 as $$; delete from t; -- $$", 2),
    (MYSQL, r"select '\'; drop table x --'", 1),
    (MYSQL, r'select "\"; drop table x --"', 1),
    (NO_BACKSLASH, r"select '\'; drop table x -- '", 2),
    (ANSI, r'select "\"; drop table x -- "', 2),
    (MYSQL, "select /* /* */ ; drop table x -- */", 2),
    (MYSQL, "select 1 /*! ; drop table x */", 2),
    (MYSQL, "select 1 /*!999999 ' */; drop table x -- '", 2),
    (MYSQL, "select 1 /*!50000 ' */; drop table x -- '*/", 1),
    (MYSQL, "select 1 /*!999999 /* /*/ */ ; drop table x", 2),
    (POSTGRESQL, "select 1 /* /* /* /* /*/ */ */ */ */ */ ; drop table x", 2),
    (POSTGRESQL, "select $a$;$b$;$a$; drop table x -- $a$", 2),
    (MYSQL, "select 1 /*!80000 ' */; drop table x -- '", 2),
    (REAL_MYSQL, "select 1 /*!80000 ' */; drop table x -- '*/", 1),
    (REAL_MYSQL, "select 1 /*M! ' */; drop table x -- '", 2),
    (MYSQL, "select 1 /*M! */*/* 2; drop table x */", 1),
    (MYSQL, "select 2 /*! */* 2; drop table x -- */", 2),
    (MYSQL, "create procedure p() begin if a then select 1; end if; select 2; end; select 3", 2),
    (MYSQL, "begin not atomic select case when 1 then 2 end; select 1; end", 1),
    (MYSQL, "create temporary table t as select 1 as declare; drop table t", 2),
    (SQLITE, "select [;], `;`, \"'\", ';'", 1),
    (SQLITE, "select $a('); drop table t --'", 2),
    (SQLITE, "select 1 /* ; never closed", 1),
    (SQLITE, "select 1 ; /* never closed", 1),
    (SQLITE, "select 1 ; /*", 2),
    (SQLITE, "select 1 ;\v", 2),
    (SQLITE, "create temp trigger t after insert on a begin delete from b; end; select 1", 2),
    (SQLITE, "create table begin (a); drop table t", 2),
]


@pytest.mark.parametrize(("scanner_", "sql", "count"), COUNTS)
def test_statements_end_where_the_database_ends_them(
    scanner_: Scanner, sql: str, count: int
) -> None:
    assert len(scanner_.split(sql)) == count


@pytest.mark.parametrize("scanner_", EVERY)
def test_the_pieces_of_a_text_are_the_text(scanner_: Scanner) -> None:
    for _, sql, _ in COUNTS:
        assert "".join(sql[a:b] for _, a, b, _ in scanner_.pieces(sql)) == sql


def test_words_come_without_comments_and_without_what_quotes_hold() -> None:
    words = POSTGRESQL.words("select 'a', \"b\" /* c */ from t -- d")
    assert words == ["SELECT", "''", ",", '""', "FROM", "T"]
    assert MYSQL.words("/*!50000 insert */ # no") == ["INSERT"]


def test_a_log_shows_no_literals_and_no_comments() -> None:
    sql = (
        "SELECT  'secret', 12.5e3, t1.\"c2\",\n $1, %s /* secret */ FROM t WHERE a = E'se\\'cret' ;"
    )
    assert normalise(sql) == 'SELECT ?, ?, t1."c2", $1, %s FROM t WHERE a = ?'
    assert normalise("SELECT \"secret\", 'x' # y", "mysql") == "SELECT ?, ?"
    assert normalise("SELECT 'never closed") == "SELECT ?"


def test_a_log_shows_no_more_than_two_kilobytes() -> None:
    for sql in ("SELECT " + "a, " * 500_000, "SELECT 1" + " " * 1_000_000 + "x", "'a'" * 1_000_000):
        assert len(normalise(sql)) <= LONGEST_NORMALISED


def test_texts_of_many_bytes_are_not_cached() -> None:
    asked: list[str] = []
    function = cached_by_text(asked.append)
    for text in ("a" * 4096, "b" * 4097, "\U0001f600" * 1024, "é" * 1025) * 2:
        function(text)
    assert [text[0] for text in asked] == ["a", "b", "\U0001f600", "é", "b", "é"]


@pytest.mark.parametrize("kind", [PostgreSQLScanner, MySQLScanner, SQLiteScanner])
def test_the_patterns_are_made_in_no_time(kind: type[Scanner]) -> None:
    """Some with the first statement that needs them, on the event loop."""

    def seconds() -> float:
        re.purge()
        begun = time.thread_time()
        reader = kind()
        list(reader.statements("SELECT 1; SELECT 2"))
        reader.bare("SELECT 1")
        return time.thread_time() - begun

    assert min(seconds() for _ in range(5)) < 0.03


# Texts of one pattern again and again, in which reading one could mean reading all that follow.
REPEATED = [
    "-",
    "-- \n",
    "# ",
    "/* */ ",
    "/*",
    "*/",
    "'",
    '"',
    "`",
    "$",
    "$a$",
    "$a$ $b$",
    "/*/*/*/**/*/*/*/",
    "E'",
    "E'\\",
    "[",
    "(",
]
REPEATED += [
    "/*!",
    "/*!999999 ",
    "';'",
    "a;",
    ";",
    "$a(",
    "\\",
    "E'a'\n",
    "1E",
    "é",
    "begin ",
    "a$$",
]
HEADS = ["", "create function f() begin atomic ", "create trigger t begin ", "begin not atomic "]


@pytest.mark.parametrize("scanner_", EVERY)
@pytest.mark.parametrize("head", HEADS)
def test_time_is_linear_whatever_the_text_holds(scanner_: Scanner, head: str) -> None:
    for part in REPEATED:
        text = head + part * (50_000 // len(part))
        begun = time.process_time()
        list(scanner_.statements(text))
        scanner_.bare(text)
        scanner_.normalise(text)
        scanner_.first_word(text)
        # It takes milliseconds; twice as long for each character more, it would never end.
        assert time.process_time() - begun < 5, part


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("name", [*TEXTS, *MIXES])
def test_no_question_about_a_megabyte_takes_longer_than_the_bound(name: str, vendor: str) -> None:
    """Whatever is asked of a text, with searches that are fast but begin again and again too: they
    would hardly show in a shorter one."""
    took = milliseconds(text_of(name, 1_000_000), vendor, times=1)
    assert not {question: ms for question, ms in took.items() if ms > BOUND}
