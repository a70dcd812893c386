"""Piccolo on asyncpg: its own pool of ten, autocommit, statements prepared by asyncpg. Rows are
objects, values are lists, which `select` has besides dicts; related rows come by `prefetch` in
one join, and the books of several authors by a second query, as Piccolo has no reverse relation."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from django.conf import settings

from benchmarks import rows
from benchmarks.competitors.base import Client, Competitor
from benchmarks.competitors.texts import PSYCOPG as SQL
from benchmarks.settings import POOL

RAW = SQL.book.replace("%s", "{}")


class Piccolo(Competitor):
    """Piccolo."""

    name = "piccolo"
    title = "Piccolo"
    needs = ("piccolo", "asyncpg")
    pool = "piccolo"

    async def open(self) -> None:
        from piccolo.engine.postgres import PostgresEngine

        from benchmarks.competitors import piccolo_models as models

        entry = settings.DATABASES["default"]
        place = {"host": entry["HOST"], "port": int(entry["PORT"] or 5432)}
        whose = {"user": entry["USER"], "password": entry["PASSWORD"] or None}
        self.engine = PostgresEngine({**place, **whose, "database": entry["NAME"]})
        for table in (models.Author, models.Book, models.Draft):
            table._meta._db = self.engine
        await self.engine.start_connection_pool(min_size=POOL, max_size=POOL)

    async def close(self) -> None:
        await self.engine.close_connection_pool()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        yield PiccoloClient(self.engine)


class PiccoloClient(Client):
    """Piccolo's queries."""

    author_id = "author"

    def __init__(self, engine: Any) -> None:
        from benchmarks.competitors.piccolo_models import Author, Book, Draft

        self.engine, self.Author, self.Book, self.Draft = engine, Author, Book, Draft

    def with_author(self, row: Any) -> tuple[Any, ...]:
        book = self.plain(row, rows.BOOK)
        return (*book[:2], row.author.id, *book[3:]), self.plain(row.author, rows.AUTHOR)

    async def get(self, number: int) -> Any:
        return await self.Book.objects().get(self.Book.id == rows.book_key(number))

    async def raw(self, number: int) -> Any:
        found = await self.Book.raw(RAW, rows.book_key(number))
        return tuple(found[0].values())

    async def count(self, number: int) -> Any:
        return await self.Book.count().where(self.Book.author == rows.author_key(number))

    async def filter(self, number: int) -> Any:
        found = self.Book.objects().where(self.Book.author == rows.author_key(number))
        return await found.order_by(self.Book.id)

    async def related(self, number: int) -> Any:
        found = self.Book.objects().where(self.Book.pages == rows.author_key(number))
        return await found.prefetch(self.Book.author).order_by(self.Book.id)

    async def prefetch(self, number: int) -> Any:
        first, Author, Book = rows.first_of_ten(number), self.Author, self.Book
        wanted = (Author.id >= first) & (Author.id < first + 10)
        authors = await Author.objects().where(wanted).order_by(Author.id)
        books: dict[int, tuple[Any, list[Any]]] = {author.id: (author, []) for author in authors}
        for book in await Book.objects().where(Book.author.is_in(list(books))):
            books[book.author][1].append(book)
        return list(books.values())

    async def values(self, number: int) -> Any:
        first, Book = rows.first_of_thousand(number), self.Book
        found = Book.select(Book.id, Book.title, Book.pages, Book.price)
        found = found.where((Book.id >= first) & (Book.id < first + 1_000)).order_by(Book.id)
        return [tuple(row.values()) for row in await found]

    async def insert(self, number: int) -> Any:
        return (await self.Draft.objects().create(**rows.draft(number))).id

    async def update(self, number: int) -> Any:
        changed = self.Draft.update({self.Draft.pages: number + 1})
        found = await changed.where(self.Draft.id == rows.draft_key(number)).returning(
            self.Draft.id
        )
        return len(found)

    async def transaction(self, number: int) -> Any:
        Author, Book, Draft = self.Author, self.Book, self.Draft
        async with self.engine.transaction():
            book = await Book.objects().get(Book.id == rows.book_key(number))
            author = await Author.objects().get(Author.id == book.author)
            draft = await Draft.objects().create(**rows.draft(number))
            await Draft.update({Draft.pages: number + 1}).where(Draft.id == draft.id)
            return book, author, await Draft.objects().get(Draft.id == draft.id)

    async def insert_many(self, number: int) -> Any:
        drafts = [self.Draft(**rows.draft(of)) for of in rows.draft_numbers(number)]
        await self.Draft.insert(*drafts)

    async def many(self, limit: int) -> Any:
        return await self.Book.objects().limit(limit)
