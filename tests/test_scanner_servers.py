"""The scanner against what each real server does with the same texts: one statement or several.

`SCANNER_TEXTS=100000` makes it as many; `SCANNER_SEED` makes it others.
"""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from django.conf import settings

from django_asyncsession.scanner import MySQLScanner, PostgreSQLScanner, Scanner, scanner

TEXTS = int(os.environ.get("SCANNER_TEXTS", "2000"))
SEED = int(os.environ.get("SCANNER_SEED", "1"))
# What stands for a statement, values, and everything that could hide a semicolon.
STARTS = ["select 1 ", "select 'a' ", "select ", "explain select 1 ", "select 2 as a "]
PARTS = ["'", "''", '"', '""', "`", "``", "\\"]
PARTS += ["\\'", ";", "; select 2 ", "-- ", "--", "--1 ", "#"]
PARTS += ["\n", "\r", "/*", "*/", "/* a */"]
PARTS += ["/*!", "/*!50000 ", "/*!80000 ", "/*!999999 ", "/*M!"]
PARTS += [
    "$$",
    "$a$",
    "$1",
    "$",
    "a$$",
    "1$$",
    "E'",
    "e'\\'",
    "b'",
    "x'",
    "N'",
    "U&'",
    "1E'",
    "[",
    "]",
]
PARTS += [
    " ",
    "\t",
    "\x0b",
    "\xa0",
    "é",
    ", 1 ",
    ", 'b' ",
    ", '\\\\' ",
    "* 2 ",
    "- 1 ",
    "+",
    "/",
    "@a",
]
PARTS += [
    "$a(",
    "$a::b(",
    ":a(",
    "#a(",
    ")",
    "as a ",
    "as `b` ",
    'as "c" ',
    "'d'\n'e'",
    ", E'f'\n'\\''",
]
WHOLE = [
    ", 'a;b' ",
    ", $$;$$ ",
    ", $a$;$$;$a$ ",
    "/* ; */",
    "-- ;\n",
    "# ;\n",
    ', "a;" ',
    " `;` ",
    " [;] ",
]
WHOLE += [
    "/*! + 1 */",
    "/*!999999 ; */",
    "/*! */* 1",
    ", E'\\';' ",
    ", '\\'' ",
    ", ';'' ;' ",
    "/* /* ; */ */",
]
EMPTY_QUERY = 1065
# None, when the server finds an error before it has read the whole text.
Judge = Callable[[str], "bool | None"]


def texts(seed: int) -> Iterator[str]:
    """As many texts as were asked for; many of them are valid for one database or another."""
    chance = random.Random(seed)
    for _ in range(TEXTS):
        parts = [chance.choice(STARTS)]
        for _ in range(chance.randrange(8)):
            parts.append(chance.choice(PARTS if chance.random() < 0.5 else WHOLE))
        if chance.random() < 0.4:
            parts.append("; select 2")
        yield "".join(parts)


@contextmanager
def postgresql(standard_strings: bool) -> Iterator[Judge]:
    psycopg = pytest.importorskip("psycopg")
    own = settings.DATABASES["default"]
    with psycopg.connect(
        host=own["HOST"], port=own["PORT"], user=own["USER"], password=own["PASSWORD"],
        dbname="postgres", autocommit=True,
    ) as connection:  # fmt: skip
        connection.execute(f"SET standard_conforming_strings = {standard_strings}")
        connection.execute("SET backslash_quote = on; SET escape_string_warning = off")

        def judge(text: str) -> bool | None:
            result = connection.pgconn.prepare(b"", text.encode())
            if not result.error_message:
                return False
            # Any other error comes after the whole text was read, or while it was.
            return True if b"multiple commands" in result.error_message else None

        yield judge


@contextmanager
def mysql(sql_mode: str) -> Iterator[Judge]:
    pymysql = pytest.importorskip("pymysql")
    own = settings.DATABASES["mysql"]
    connection = pymysql.connect(
        host=own["HOST"], port=int(own["PORT"] or 3306), user=own["USER"],
        password=own["PASSWORD"], charset="utf8mb4",
        client_flag=pymysql.constants.CLIENT.MULTI_STATEMENTS,
    )  # fmt: skip
    connection.query(f"SET SESSION sql_mode = '{sql_mode}'")

    def judge(text: str) -> bool | None:
        try:
            connection.query(text)
        except pymysql.MySQLError:
            return None
        several = False
        try:
            while connection._result.has_next:
                connection.next_result()
                # Without rows it was a comment: each statement here gives some.
                several = several or connection._result.description is not None
        except pymysql.MySQLError as exc:
            # What was left was a comment, or else a statement with an error.
            several = several or exc.args[0] != EMPTY_QUERY
            connection._result = None
        return several

    yield judge
    connection.close()


@contextmanager
def sqlite() -> Iterator[Judge]:
    connection = sqlite3.connect(":memory:")

    def judge(text: str) -> bool | None:
        try:
            connection.execute(text)
        except (sqlite3.Error, sqlite3.Warning) as exc:
            return True if "one statement at a time" in str(exc) else None
        return False

    yield judge
    connection.close()


SERVERS = {
    "postgresql": (lambda: postgresql(True), PostgreSQLScanner()),
    "postgresql-old-strings": (lambda: postgresql(False), PostgreSQLScanner(False)),
    "sqlite": (sqlite, scanner("sqlite")),
}
if "mysql" in settings.DATABASES:
    SERVERS |= {
        "mysql": (lambda: mysql(""), MySQLScanner()),
        "mysql-no-backslash": (lambda: mysql("NO_BACKSLASH_ESCAPES"), MySQLScanner(False)),
        "mysql-ansi": (lambda: mysql("ANSI_QUOTES"), MySQLScanner(True, True)),
    }


@pytest.mark.parametrize("name", SERVERS)
def test_what_a_server_takes_for_several_statements_is_never_taken_for_one(name: str) -> None:
    connect, reader = SERVERS[name]
    judged = {True: 0, False: 0, None: 0}
    too_many: list[str] = []
    with connect() as judge:
        for text in texts(SEED):
            several = judge(text)
            judged[several] += 1
            here = _count(reader, text)
            assert not (several and here < 2), text
            if several is False and here > 1:
                too_many.append(text)
    # The texts must be such that there is something to judge.
    assert judged[True] > TEXTS / 200 and judged[False] > TEXTS / 50, judged
    print(name, judged, "refused though one:", len(too_many), too_many[:3])


def _count(reader: Scanner, text: str) -> int:
    return sum(1 for _ in reader.statements(text))
