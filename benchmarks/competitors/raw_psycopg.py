"""The unit: psycopg's AsyncConnectionPool, a connection taken for each operation, autocommit,
every statement prepared at its first use, rows as tuples; many rows go by COPY, the fastest way
it has."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from benchmarks import rows
from benchmarks.competitors.base import Client, Competitor
from benchmarks.competitors.texts import PSYCOPG as SQL
from benchmarks.database import url
from benchmarks.settings import POOL, TIMEOUT


class RawPsycopg(Competitor):
    """The driver under this package, used by hand."""

    name = "psycopg"
    title = "raw psycopg"
    needs = ("psycopg", "psycopg_pool")
    pool = "psycopg"

    async def open(self) -> None:
        from psycopg_pool import AsyncConnectionPool

        options = {"autocommit": True, "prepare_threshold": 0}
        self.connections: AsyncConnectionPool[Any] = AsyncConnectionPool(
            url(), min_size=POOL, max_size=POOL, timeout=TIMEOUT, kwargs=options, open=False
        )
        await self.connections.open(wait=True)

    async def close(self) -> None:
        await self.connections.close()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        yield RawPsycopgClient(self.connections)


class RawPsycopgClient(Client):
    """Takes a connection for each operation."""

    def __init__(self, connections: Any) -> None:
        self.connections = connections

    async def _one(self, sql: str, values: Sequence[Any]) -> Any:
        async with self.connections.connection() as connection:
            return await (await connection.execute(sql, values)).fetchone()

    async def _all(self, sql: str, values: Sequence[Any]) -> Any:
        async with self.connections.connection() as connection:
            return await (await connection.execute(sql, values)).fetchall()

    async def get(self, number: int) -> Any:
        return await self._one(SQL.book, [rows.book_key(number)])

    raw = get

    async def count(self, number: int) -> Any:
        return (await self._one(SQL.count, [rows.author_key(number)]))[0]

    async def filter(self, number: int) -> Any:
        return await self._all(SQL.filter, [rows.author_key(number)])

    async def related(self, number: int) -> Any:
        return await self._all(SQL.related, [rows.author_key(number)])

    async def prefetch(self, number: int) -> Any:
        first = rows.first_of_ten(number)
        async with self.connections.connection() as connection:
            cursor = await connection.execute(SQL.authors, [first, first + 10])
            books: dict[int, tuple[Any, list[Any]]] = {
                author[0]: (author, []) for author in await cursor.fetchall()
            }
            cursor = await connection.execute(SQL.books_of, [list(books)])
            for book in await cursor.fetchall():
                books[book[2]][1].append(book)
        return list(books.values())

    async def values(self, number: int) -> Any:
        first = rows.first_of_thousand(number)
        return await self._all(SQL.values, [first, first + 1_000])

    async def insert(self, number: int) -> Any:
        return (await self._one(SQL.insert, list(rows.draft(number).values())))[0]

    async def update(self, number: int) -> Any:
        async with self.connections.connection() as connection:
            values = [number + 1, rows.draft_key(number)]
            return (await connection.execute(SQL.update, values)).rowcount

    async def transaction(self, number: int) -> Any:
        async with self.connections.connection() as connection, connection.transaction():

            async def one(sql: str, values: Sequence[Any]) -> Any:
                return await (await connection.execute(sql, values)).fetchone()

            book = await one(SQL.book, [rows.book_key(number)])
            author = await one(SQL.author, [book[2]])
            (key,) = await one(SQL.insert, list(rows.draft(number).values()))
            await connection.execute(SQL.update, [number + 1, key])
            return book, author, await one(SQL.draft, [key])

    async def insert_many(self, number: int) -> Any:
        values = [tuple(rows.draft(of).values()) for of in rows.draft_numbers(number)]
        async with (
            self.connections.connection() as connection,
            connection.cursor() as cursor,
            cursor.copy(SQL.copy) as copy,
        ):
            for row in values:
                await copy.write_row(row)

    async def many(self, limit: int) -> Any:
        return await self._all(SQL.many, [limit])

    async def stream(self, limit: int) -> AsyncIterator[Any]:
        async with (
            self.connections.connection() as connection,
            connection.transaction(),
            connection.cursor("benchmarks") as cursor,
        ):
            cursor.itersize = 2_000
            await cursor.execute(SQL.stream, [limit])
            async for row in cursor:
                yield row
