"""MariaDB: asyncmy's own pool, a connection taken for each operation, autocommit, rows as
tuples, no prepared statements, which asyncmy has not; this package; SQLAlchemy's AsyncSession on
asyncmy."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from django.conf import settings

from benchmarks import rows
from benchmarks.competitors.base import Client, Competitor
from benchmarks.competitors.session import SessionClient
from benchmarks.competitors.sqlalchemy import SQLAlchemyAsyncpg
from benchmarks.competitors.texts import PSYCOPG as SQL
from benchmarks.settings import POOL
from django_asyncsession import databases


def options(alias: str = "mysql") -> dict[str, Any]:
    """The server and the database, with the names of asyncmy and pymysql."""
    entry = settings.DATABASES[alias]
    return {
        "host": entry["HOST"],
        "port": int(entry["PORT"] or 3306),
        "user": entry["USER"],
        "password": entry["PASSWORD"],
        "db": entry["NAME"],
    }


class RawAsyncmy(Competitor):
    """The driver under this package, used by hand: the unit."""

    name = "asyncmy"
    title = "raw asyncmy"
    needs = ("asyncmy",)
    pool = "asyncmy"

    async def open(self) -> None:
        import asyncmy

        sizes = {"minsize": POOL, "maxsize": POOL}
        self.connections = await asyncmy.create_pool(**options(), **sizes, autocommit=True)

    async def close(self) -> None:
        self.connections.close()
        await self.connections.wait_closed()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        yield RawAsyncmyClient(self.connections)


class RawAsyncmyClient(Client):
    """Takes a connection for each operation."""

    def __init__(self, connections: Any) -> None:
        self.connections = connections

    async def get(self, number: int) -> Any:
        async with self.connections.acquire() as connection, connection.cursor() as cursor:
            await cursor.execute(SQL.book, [rows.book_key(number)])
            return await cursor.fetchone()


class MariaDBSession(Competitor):
    """This package, a session in autocommit for each task."""

    name = "session"
    title = "session, autocommit"
    needs = ("asyncmy",)
    pool = "package"

    async def close(self) -> None:
        await databases["mysql"].close()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with databases["mysql"].get_session(autocommit=True) as session:
            yield SessionClient(session)


class SQLAlchemyAsyncmy(SQLAlchemyAsyncpg):
    """SQLAlchemy on asyncmy."""

    name = "sqlalchemy"
    title = "SQLAlchemy, asyncmy"
    needs = ("sqlalchemy", "asyncmy")
    pool = "sqlalchemy"

    def url(self) -> str:
        from benchmarks.database import url

        return url("mysql+asyncmy", "mysql")
