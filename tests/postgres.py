"""The tests' PostgreSQL database as seen from outside: its DSN, and who is connected to it."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any
from urllib.parse import quote

import psycopg
from django.db import connections


def dsn_of_tests(**parameters: Any) -> str:
    """A DSN of the test database on the shared server; `host` and `port` may be a proxy's."""
    settings = connections["default"].settings_dict
    login = quote(settings["USER"], safe="")
    if settings["PASSWORD"]:
        login += f":{quote(settings['PASSWORD'], safe='')}"
    host, port = parameters.pop("host", settings["HOST"]), parameters.pop("port", settings["PORT"])
    query = "&".join(f"{name}={quote(str(value), safe='')}" for name, value in parameters.items())
    return f"postgresql://{login}@{quote(host, safe='')}:{port or 5432}/{settings['NAME']}?{query}"


def new_name() -> str:
    """An application_name that nobody else uses."""
    return f"das-test-{uuid.uuid4().hex[:12]}"


def ask(sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """The rows of a statement on a blocking connection of its own, in autocommit mode."""
    with psycopg.connect(dsn_of_tests(), autocommit=True) as connection:
        cursor = connection.execute(sql, parameters)
        return cursor.fetchall() if cursor.description else []


def sessions_of(name: str, where: str = "true") -> int:
    """How many server sessions there are under an application_name."""
    [[count]] = ask(
        f"SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND {where}", name
    )
    return int(count)


async def gone(name: str, seconds: float = 1, where: str = "true") -> bool:
    """Whether no server session is left under the name after a while."""
    deadline = time.monotonic() + seconds
    while sessions_of(name, where):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True
