"""asyncpg's own pool, a connection taken for each operation, autocommit, statements prepared and
kept by asyncpg itself, rows as its Records; many rows go by COPY, the fastest way it has."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from benchmarks import rows
from benchmarks.competitors.base import Client, Competitor
from benchmarks.competitors.texts import ASYNCPG as SQL
from benchmarks.database import url
from benchmarks.settings import POOL


class RawAsyncpg(Competitor):
    """asyncpg, used by hand."""

    name = "asyncpg"
    title = "raw asyncpg"
    needs = ("asyncpg",)
    pool = "asyncpg"

    async def open(self) -> None:
        import asyncpg

        self.connections = await asyncpg.create_pool(url(), min_size=POOL, max_size=POOL)

    async def close(self) -> None:
        await self.connections.close()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        yield RawAsyncpgClient(self.connections)


class RawAsyncpgClient(Client):
    """The pool's own shortcuts, which take a connection for each call."""

    def __init__(self, connections: Any) -> None:
        self.connections = connections

    async def get(self, number: int) -> Any:
        return await self.connections.fetchrow(SQL.book, rows.book_key(number))

    raw = get

    async def count(self, number: int) -> Any:
        return await self.connections.fetchval(SQL.count, rows.author_key(number))

    async def filter(self, number: int) -> Any:
        return await self.connections.fetch(SQL.filter, rows.author_key(number))

    async def related(self, number: int) -> Any:
        return await self.connections.fetch(SQL.related, rows.author_key(number))

    async def prefetch(self, number: int) -> Any:
        first = rows.first_of_ten(number)
        async with self.connections.acquire() as connection:
            authors = await connection.fetch(SQL.authors, first, first + 10)
            books: dict[int, tuple[Any, list[Any]]] = {row[0]: (row, []) for row in authors}
            for book in await connection.fetch(SQL.books_of, list(books)):
                books[book[2]][1].append(book)
        return list(books.values())

    async def values(self, number: int) -> Any:
        first = rows.first_of_thousand(number)
        return await self.connections.fetch(SQL.values, first, first + 1_000)

    async def insert(self, number: int) -> Any:
        return await self.connections.fetchval(SQL.insert, *rows.draft(number).values())

    async def update(self, number: int) -> Any:
        values = number + 1, rows.draft_key(number)
        return int((await self.connections.execute(SQL.update, *values)).split()[-1])

    async def transaction(self, number: int) -> Any:
        async with self.connections.acquire() as connection, connection.transaction():
            book = await connection.fetchrow(SQL.book, rows.book_key(number))
            author = await connection.fetchrow(SQL.author, book[2])
            key = await connection.fetchval(SQL.insert, *rows.draft(number).values())
            await connection.execute(SQL.update, number + 1, key)
            return book, author, await connection.fetchrow(SQL.draft, key)

    async def insert_many(self, number: int) -> Any:
        values = [tuple(rows.draft(of).values()) for of in rows.draft_numbers(number)]
        async with self.connections.acquire() as connection:
            await connection.copy_records_to_table(
                "benchmarks_draft", records=values, columns=rows.DRAFT[1:]
            )

    async def many(self, limit: int) -> Any:
        return await self.connections.fetch(SQL.many, limit)

    async def stream(self, limit: int) -> AsyncIterator[Any]:
        async with self.connections.acquire() as connection, connection.transaction():
            async for row in connection.cursor(SQL.stream, limit, prefetch=2_000):
                yield row
