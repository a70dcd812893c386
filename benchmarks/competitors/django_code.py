"""Ordinary Django code for each work, async and sync, on one alias; it knows nothing of
sessions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from django.db import connections
from django.db.transaction import atomic

from benchmarks import rows
from benchmarks.competitors.base import Client
from benchmarks.competitors.texts import PSYCOPG as SQL
from benchmarks.models import Author, Book, Draft


class SyncCode:
    """The works as sync code: managers, `save()`, `atomic()`."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.authors = Author.objects.using(alias)
        self.books = Book.objects.using(alias)
        self.drafts = Draft.objects.using(alias)

    def get(self, number: int) -> Any:
        return self.books.get(pk=rows.book_key(number))

    def raw(self, number: int) -> Any:
        with connections[self.alias].cursor() as cursor:
            cursor.execute(SQL.book, [rows.book_key(number)])
            return cursor.fetchone()

    def count(self, number: int) -> Any:
        return self.books.filter(author_id=rows.author_key(number)).count()

    def filter(self, number: int) -> Any:
        return list(self.books.filter(author_id=rows.author_key(number)).order_by("id"))

    def related(self, number: int) -> Any:
        found = self.books.select_related("author").filter(pages=rows.author_key(number))
        return list(found.order_by("id"))

    def prefetch(self, number: int) -> Any:
        first = rows.first_of_ten(number)
        found = self.authors.filter(id__gte=first, id__lt=first + 10).order_by("id")
        return list(found.prefetch_related("books"))

    def values(self, number: int) -> Any:
        first = rows.first_of_thousand(number)
        found = self.books.filter(id__gte=first, id__lt=first + 1_000).order_by("id")
        return list(found.values_list(*rows.VALUES))

    def insert(self, number: int) -> Any:
        return self.drafts.create(**rows.draft(number)).pk

    def update(self, number: int) -> Any:
        return self.drafts.filter(pk=rows.draft_key(number)).update(pages=number + 1)

    def transaction(self, number: int) -> Any:
        with atomic(using=self.alias):
            book = self.books.get(pk=rows.book_key(number))
            author = self.authors.get(pk=book.author_id)
            draft = self.drafts.create(**rows.draft(number))
            self.drafts.filter(pk=draft.pk).update(pages=number + 1)
            return book, author, self.drafts.get(pk=draft.pk)

    def insert_many(self, number: int) -> Any:
        self.drafts.bulk_create([Draft(**rows.draft(of)) for of in rows.draft_numbers(number)])

    def many(self, limit: int) -> Any:
        return list(self.books.all()[:limit])


class AsyncCode(Client):
    """The works with Django's own async methods.

    Raw SQL and transactions have none: what runs them is given.
    """

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.authors = Author.objects.using(alias)
        self.books = Book.objects.using(alias)
        self.drafts = Draft.objects.using(alias)

    async def get(self, number: int) -> Any:
        return await self.books.aget(pk=rows.book_key(number))

    async def count(self, number: int) -> Any:
        return await self.books.filter(author_id=rows.author_key(number)).acount()

    async def filter(self, number: int) -> Any:
        found = self.books.filter(author_id=rows.author_key(number)).order_by("id")
        return [row async for row in found]

    async def related(self, number: int) -> Any:
        found = self.books.select_related("author").filter(pages=rows.author_key(number))
        return [row async for row in found.order_by("id")]

    async def prefetch(self, number: int) -> Any:
        first = rows.first_of_ten(number)
        found = self.authors.filter(id__gte=first, id__lt=first + 10).order_by("id")
        return [row async for row in found.prefetch_related("books")]

    async def values(self, number: int) -> Any:
        first = rows.first_of_thousand(number)
        found = self.books.filter(id__gte=first, id__lt=first + 1_000).order_by("id")
        return [row async for row in found.values_list(*rows.VALUES)]

    async def insert(self, number: int) -> Any:
        return (await self.drafts.acreate(**rows.draft(number))).pk

    async def update(self, number: int) -> Any:
        return await self.drafts.filter(pk=rows.draft_key(number)).aupdate(pages=number + 1)

    async def five(self, number: int) -> Any:
        """The five statements, in whatever transaction there is."""
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

    async def stream(self, limit: int) -> AsyncIterator[Any]:
        async for row in self.drafts.all()[:limit].aiterator():
            yield row
