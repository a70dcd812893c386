"""Files of SQLite for its tests: interfaces to them, their locks, the threads of connections."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from django.db.utils import ConnectionHandler

from django_asyncsession.interface import DatabaseInterface

ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
MANY = (
    "INSERT INTO t (n) WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c "
    "LIMIT 3000000) SELECT x FROM c"
)


def driver_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("database ")]


def interface(name: Any, max_size: int = 10, **options: Any) -> DatabaseInterface:
    entry = {"ENGINE": "django.db.backends.sqlite3", "NAME": name, "OPTIONS": options}
    handler = ConnectionHandler({"default": entry})
    options["pool"] = {"max_size": max_size, "timeout": 20}
    return DatabaseInterface("lite", handler.settings["default"])


async def count(db: DatabaseInterface) -> int:
    async with db.get_session(read_only=True) as session:
        return int(await session.fetch_value("SELECT count(*) FROM t"))


def assert_lock_is_free(path: Path) -> None:
    """Another connection can write at once, so no transaction is left open."""
    connection = sqlite3.connect(path, timeout=0, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
    finally:
        connection.close()


def assert_lock_is_taken(path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        assert_lock_is_free(path)


class Locked:
    """`with Locked(path):` another connection holds the write lock."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)

    def __enter__(self) -> Locked:
        self._connection.execute("BEGIN IMMEDIATE")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._connection.execute("ROLLBACK")
        self._connection.close()
