"""The tables on MariaDB and SQLite, made and dropped; only books are read there."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.settings import DATABASES, SQLITE

TABLES = (
    "CREATE TABLE benchmarks_author (id bigint PRIMARY KEY, name varchar(100) NOT NULL, "
    "born integer)",
    "CREATE TABLE benchmarks_book (id bigint PRIMARY KEY, title varchar(200) NOT NULL, "
    "author_id bigint NOT NULL REFERENCES benchmarks_author (id), pages integer NOT NULL, "
    "price decimal(8, 2) NOT NULL, published date NOT NULL)",
)
INSERTS = {
    "benchmarks_author": [rows.author(key) for key in range(1, rows.AUTHORS + 1)],
    "benchmarks_book": [rows.book(key) for key in range(1, rows.BOOKS + 1)],
}


@contextmanager
def on_mariadb() -> Iterator[None]:
    """A database of the benchmarks on the server of the tests.

    Raises:
        LookupError: there is no server, or no driver.
    """
    if "mysql" not in DATABASES:
        raise LookupError("no server: set TEST_MYSQL_URL, or run one on 127.0.0.1:3306")
    import pymysql

    from benchmarks.competitors.mariadb import options

    given = options()
    name = given.pop("db")
    with closing(pymysql.connect(**given, autocommit=True)) as connection:
        cursor = connection.cursor()
        cursor.execute(f"DROP DATABASE IF EXISTS `{name}`")
        cursor.execute(f"CREATE DATABASE `{name}` CHARACTER SET utf8mb4")
        try:
            cursor.execute(f"USE `{name}`")
            _fill(cursor, "%s")
            yield
        finally:
            cursor.execute(f"DROP DATABASE IF EXISTS `{name}`")


@contextmanager
def on_sqlite() -> Iterator[None]:
    """A file of the benchmarks."""
    with closing(sqlite3.connect(SQLITE)) as connection:
        _fill(connection.cursor(), "?")
        connection.commit()
    try:
        yield
    finally:
        for end in ("", "-wal", "-shm"):
            Path(SQLITE + end).unlink(missing_ok=True)
        Path(SQLITE).parent.rmdir()


def _fill(cursor: Any, placeholder: str) -> None:
    for table in TABLES:
        cursor.execute(table)
    for name, values in INSERTS.items():
        places = ", ".join([placeholder] * len(values[0]))
        plain = [[value if type(value) is int else _text(value) for value in row] for row in values]
        cursor.executemany(f"INSERT INTO {name} VALUES ({places})", plain)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
