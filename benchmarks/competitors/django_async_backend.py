"""django-async-backend: its own copy of Django's ORM on psycopg's async connections, a pool of
ten, the connection of each task given back at its end, as after a request; it has no
prefetch_related and no aiterator(), and needs Django 6.1 and Python 3.12."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from benchmarks import rows
from benchmarks.competitors.base import Client, Competitor, NotOffered
from benchmarks.competitors.texts import PSYCOPG as SQL
from benchmarks.models import Author, Book, Draft

ALIAS = "backend"


class DjangoAsyncBackend(Competitor):
    """django-async-backend."""

    name = "backend"
    title = "django-async-backend"
    needs = ("django_async_backend",)
    pool = "backend"

    @classmethod
    def missing(cls) -> str | None:
        why = super().missing()
        return f"{why}; it needs Python 3.12 and Django 6.1" if why else None

    async def open(self) -> None:
        from django_async_backend.db import async_connections

        self.connections = async_connections

    async def close(self) -> None:
        await self.connections[ALIAS].close_pool()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        try:
            yield DjangoAsyncBackendClient()
        finally:
            await self.connections[ALIAS].close()


class DjangoAsyncBackendClient(Client):
    """The methods of `async_objects`."""

    def __init__(self) -> None:
        from django_async_backend.db import async_connections
        from django_async_backend.db.transaction import async_atomic

        self.connections, self.atomic = async_connections, async_atomic
        self.authors: Any = Author.async_objects.using(ALIAS)  # type: ignore[attr-defined]
        self.books: Any = Book.async_objects.using(ALIAS)  # type: ignore[attr-defined]
        self.drafts: Any = Draft.async_objects.using(ALIAS)  # type: ignore[attr-defined]

    async def get(self, number: int) -> Any:
        return await self.books.aget(pk=rows.book_key(number))

    async def raw(self, number: int) -> Any:
        async with await self.connections[ALIAS].cursor() as cursor:
            await cursor.execute(SQL.book, [rows.book_key(number)])
            return await cursor.fetchone()

    async def count(self, number: int) -> Any:
        return await self.books.filter(author_id=rows.author_key(number)).acount()

    async def filter(self, number: int) -> Any:
        found = self.books.filter(author_id=rows.author_key(number)).order_by("id")
        return [row async for row in found]

    async def related(self, number: int) -> Any:
        found = self.books.select_related("author").filter(pages=rows.author_key(number))
        return [row async for row in found.order_by("id")]

    async def prefetch(self, number: int) -> Any:
        raise NotOffered("it has no prefetch_related")

    async def values(self, number: int) -> Any:
        first = rows.first_of_thousand(number)
        found = self.books.filter(id__gte=first, id__lt=first + 1_000).order_by("id")
        return [row async for row in found.values_list(*rows.VALUES)]

    async def insert(self, number: int) -> Any:
        return (await self.drafts.acreate(**rows.draft(number))).pk

    async def update(self, number: int) -> Any:
        return await self.drafts.filter(pk=rows.draft_key(number)).aupdate(pages=number + 1)

    async def transaction(self, number: int) -> Any:
        async with self.atomic(using=ALIAS):
            book = await self.books.aget(pk=rows.book_key(number))
            author = await self.authors.aget(pk=book.author_id)
            draft = await self.drafts.acreate(**rows.draft(number))
            await self.drafts.filter(pk=draft.pk).aupdate(pages=number + 1)
            return book, author, await self.drafts.aget(pk=draft.pk)

    async def insert_many(self, number: int) -> Any:
        drafts = [Draft(**rows.draft(of)) for of in rows.draft_numbers(number)]
        await self.drafts.abulk_create(drafts)

    async def many(self, limit: int) -> Any:
        return [row async for row in self.books.all()[:limit]]
