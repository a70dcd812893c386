"""SQLite: the unit is one bare hop to a thread, of ten, and back, with no SQL in it; ten
connections of aiosqlite, which has no pool, by turns; this package; SQLAlchemy's AsyncSession on
aiosqlite."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import date
from decimal import Decimal
from typing import Any

from benchmarks import rows
from benchmarks.competitors.base import Client, Competitor
from benchmarks.competitors.session import SessionClient
from benchmarks.competitors.sqlalchemy import SQLAlchemyAsyncpg
from benchmarks.competitors.texts import PSYCOPG as SQL
from benchmarks.settings import POOL, SQLITE
from django_asyncsession import databases


class Hop(Competitor, Client):
    """A function of nothing, in another thread."""

    name = "hop"
    title = "a bare hop to a thread"
    pool = "hop"

    async def open(self) -> None:
        self.threads = ThreadPoolExecutor(POOL)
        self.found = [rows.book(key) for key in range(1, rows.BOOKS + 1)]

    async def close(self) -> None:
        self.threads.shutdown()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        yield self

    async def get(self, number: int) -> Any:
        place = rows.book_key(number) - 1
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, self.found.__getitem__, place)


class SQLiteSession(Competitor):
    """This package, a session in autocommit for each task."""

    name = "session"
    title = "session, autocommit"
    pool = "package"

    async def close(self) -> None:
        await databases["sqlite"].close()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with databases["sqlite"].get_session(autocommit=True) as session:
            yield SessionClient(session)


class Aiosqlite(Competitor):
    """aiosqlite, used by hand."""

    name = "aiosqlite"
    title = "raw aiosqlite"
    needs = ("aiosqlite",)
    pool = "aiosqlite"

    async def open(self) -> None:
        import aiosqlite

        self.connections = [
            await aiosqlite.connect(SQLITE, isolation_level=None) for _ in range(POOL)
        ]
        self.idle: asyncio.Queue[Any] = asyncio.Queue()
        for connection in self.connections:
            self.idle.put_nowait(connection)

    async def close(self) -> None:
        for connection in self.connections:
            await connection.close()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        yield AiosqliteClient(self.idle)


class AiosqliteClient(Client):
    """Takes a connection for each operation; numbers and dates stay as SQLite has them."""

    SQL = SQL.book.replace("%s", "?")

    def __init__(self, idle: asyncio.Queue[Any]) -> None:
        self.idle = idle

    async def get(self, number: int) -> Any:
        connection = await self.idle.get()
        try:
            async with connection.execute(self.SQL, [rows.book_key(number)]) as cursor:
                return await cursor.fetchone()
        finally:
            self.idle.put_nowait(connection)

    def plain(self, row: Any, columns: Sequence[str]) -> tuple[Any, ...]:
        *values, price, published = row
        as_decimal = Decimal(str(price)).quantize(Decimal("0.01"))
        return (*values, as_decimal, date.fromisoformat(published))


class SQLAlchemyAiosqlite(SQLAlchemyAsyncpg):
    """SQLAlchemy on aiosqlite."""

    name = "sqlalchemy"
    title = "SQLAlchemy, aiosqlite"
    needs = ("sqlalchemy", "aiosqlite")
    pool = "sqlalchemy"

    async def open(self) -> None:
        # It makes decimals of SQLite's floats, as Django does, and warns of that.
        warnings.filterwarnings("ignore", "Dialect sqlite.aiosqlite does")
        await super().open()

    def url(self) -> str:
        return f"sqlite+aiosqlite:///{SQLITE}"
