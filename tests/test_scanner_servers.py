"""The scanner against what each real server does with the same texts: one statement or several.

A few texts, in seconds, unless told otherwise. The long run takes a few minutes; other seeds give
other texts:

    SCANNER_TEXTS=100000 SCANNER_SEED=2 pytest tests/test_scanner_servers.py -s
"""

from __future__ import annotations

import os
import random
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
# How MariaDB answers a text without a statement: well, or that the query was empty.
NOTHING = (0, 1065)
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

    def results(text: str) -> Iterator[Any]:
        connection.query(text)
        while True:
            yield connection._result.rows
            if not connection._result.has_next:
                return
            connection.next_result()

    def ask(text: str) -> tuple[list[Any], int]:
        """The rows of each statement that ran, and the number of the error that ended it or 0."""
        rows: list[Any] = []
        try:
            for found in results(text):
                # Each statement here gives rows; what follows a last semicolon gives an empty one.
                if found is not None:
                    rows.append(found)
        except pymysql.MySQLError as exc:
            connection._result = None
            return rows, exc.args[0]
        return rows, 0

    def judge(text: str) -> bool | None:
        rows, error = ask(text)
        if not rows:
            return None
        return len(rows) > 1 or (error not in NOTHING and not is_nothing(rest(text)))

    def rest(text: str) -> str:
        """What the server has left of the text after the first statement."""
        for found in re.finditer(";", text):
            mark = ask(text[: found.end()] + "select 'mark'")[0]
            if len(mark) == 2 and mark[1] == (("mark",),):
                return text[found.end() :]
        raise AssertionError(text)

    def is_nothing(text: str) -> bool:
        """Whether the server finds no statement there. A semicolon without a statement and a
        comment without an end are errors for it, which hold none."""
        text = text.lstrip("; \t\n\r\f\v")
        found = [ask(text + end) for end in ("", "*/", "*/*/", "*/*/*/")]
        return any(not rows and error in NOTHING for rows, error in found)

    yield judge
    connection.close()


@contextmanager
def sqlite() -> Iterator[Judge]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    ran: list[str] = []
    connection.set_trace_callback(ran.append)

    def judge(text: str) -> bool | None:
        ran.clear()
        try:
            connection.executescript(text)
        except (sqlite3.Error, sqlite3.Warning):
            # What is left has an error.
            return True if ran else None
        return len(ran) > 1

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
