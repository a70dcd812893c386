"""The MySQL or MariaDB of the tests: interfaces to it, and a direct connection beside Django and
the package."""

from __future__ import annotations

import asyncio
import copy
from functools import cache
from typing import Any

from django.db import connections

from django_asyncsession.interface import DatabaseInterface


def interface(max_size: int = 10, options: dict[str, Any] | None = None, **entry: Any) -> Any:
    settings_dict = copy.deepcopy(connections.settings["mysql"])
    settings_dict["OPTIONS"] = {
        **(options or {}),
        "pool": {"max_size": max_size, "timeout": 5},
    }
    settings_dict.update(entry)
    return DatabaseInterface("mysql", settings_dict)


@cache
def admin() -> Any:
    """A direct connection, beside Django and the package."""
    import pymysql

    entry = connections["mysql"].settings_dict
    return pymysql.connect(
        host=entry["HOST"],
        port=int(entry["PORT"] or 3306),
        user=entry["USER"],
        password=entry["PASSWORD"],
        database=entry["NAME"],
        autocommit=True,
    )


def sync(sql: str) -> Any:
    """Run SQL over the direct connection; return the rows."""
    with admin().cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchall()


def rows() -> list[int]:
    return [n for (n,) in sync("SELECT n FROM t ORDER BY n")]


def sessions() -> dict[int, str]:
    """Ids and commands of the server's other sessions on this database."""
    found = sync(
        "SELECT id, command FROM information_schema.processlist "
        "WHERE db = database() AND id <> connection_id()"
    )
    return {number: command for number, command in found if number not in others}


# Sessions that were there before the test.
others: set[int] = set()


async def until(condition: Any, seconds: float = 3) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def assert_clean(db: DatabaseInterface) -> None:
    """Nothing is left of a transaction on the server, and the slot can be used again."""
    async with db.get_session(autocommit=True) as session:
        assert await session.fetch_value("SELECT 1") == 1
    await until(lambda: len(sessions()) <= db.stats()["pool_size"])
    ids = ", ".join(map(str, sessions())) or "0"
    assert not sync(
        f"SELECT * FROM information_schema.innodb_trx WHERE trx_mysql_thread_id IN ({ids})"
    )
