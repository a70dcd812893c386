"""Tortoise ORM on asyncpg: its own pool of ten, autocommit, statements prepared by asyncpg."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from benchmarks import rows
from benchmarks.competitors.base import Client, Competitor
from benchmarks.competitors.texts import ASYNCPG as SQL
from benchmarks.database import url
from benchmarks.settings import POOL


class Tortoise(Competitor):
    """Tortoise ORM."""

    name = "tortoise"
    title = "Tortoise"
    needs = ("tortoise", "asyncpg")
    pool = "tortoise"

    async def open(self) -> None:
        from tortoise import Tortoise

        await Tortoise.init(
            db_url=f"{url('asyncpg')}?minsize={POOL}&maxsize={POOL}",
            modules={"models": ["benchmarks.competitors.tortoise_models"]},
            use_tz=True,
            # Tasks that were started elsewhere find it as well.
            _enable_global_fallback=True,
        )

    async def close(self) -> None:
        from tortoise import Tortoise

        await Tortoise.close_connections()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        yield TortoiseClient()


class TortoiseClient(Client):
    """Tortoise's querysets."""

    def __init__(self) -> None:
        import tortoise
        from tortoise.transactions import in_transaction

        from benchmarks.competitors.tortoise_models import Author, Book, Draft

        self.Author, self.Book, self.Draft = Author, Book, Draft
        self.connections, self.in_transaction = tortoise.connections, in_transaction

    async def get(self, number: int) -> Any:
        return await self.Book.get(id=rows.book_key(number))

    async def raw(self, number: int) -> Any:
        connection = self.connections.get("default")
        _, found = await connection.execute_query(SQL.book, [rows.book_key(number)])
        return found[0]

    async def count(self, number: int) -> Any:
        return await self.Book.filter(author_id=rows.author_key(number)).count()

    async def filter(self, number: int) -> Any:
        return await self.Book.filter(author_id=rows.author_key(number)).order_by("id")

    async def related(self, number: int) -> Any:
        found = self.Book.filter(pages=rows.author_key(number)).select_related("author")
        return await found.order_by("id")

    async def prefetch(self, number: int) -> Any:
        first = rows.first_of_ten(number)
        found = self.Author.filter(id__gte=first, id__lt=first + 10).order_by("id")
        return await found.prefetch_related("books")

    def _books(self, row: Any) -> tuple[Any, Any]:
        return row, list(row.books)

    async def values(self, number: int) -> Any:
        first = rows.first_of_thousand(number)
        found = self.Book.filter(id__gte=first, id__lt=first + 1_000).order_by("id")
        return await found.values_list(*rows.VALUES)

    async def insert(self, number: int) -> Any:
        return (await self.Draft.create(**rows.draft(number))).id

    async def update(self, number: int) -> Any:
        return await self.Draft.filter(id=rows.draft_key(number)).update(pages=number + 1)

    async def transaction(self, number: int) -> Any:
        async with self.in_transaction():
            book = await self.Book.get(id=rows.book_key(number))
            author = await self.Author.get(id=book.author_id)
            draft = await self.Draft.create(**rows.draft(number))
            await self.Draft.filter(id=draft.id).update(pages=number + 1)
            return book, author, await self.Draft.get(id=draft.id)

    async def insert_many(self, number: int) -> Any:
        drafts = [self.Draft(**rows.draft(of)) for of in rows.draft_numbers(number)]
        await self.Draft.bulk_create(drafts)

    async def many(self, limit: int) -> Any:
        return await self.Book.all().limit(limit)
