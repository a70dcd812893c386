"""This package: `session`, one in autocommit for each task, so that each statement takes a
connection of its own, and a transaction where the work is one; and `transaction`, a session for
each operation with the transaction that sessions have by default."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from benchmarks import rows
from benchmarks.competitors.base import Client, Competitor
from benchmarks.competitors.texts import PSYCOPG as SQL
from benchmarks.models import Author, Book, Draft
from django_asyncsession import Session, databases, table

authors, books, drafts = table(Author), table(Book), table(Draft)


class PackageCompetitor(Competitor):
    """What all ways to use this package share: the pool of the alias."""

    needs = ("psycopg",)
    pool = "package"

    async def open(self) -> None:
        await databases["default"].connect()

    async def close(self) -> None:
        await databases["default"].close()


class SessionCompetitor(PackageCompetitor):
    """A session in autocommit."""

    name = "session"
    title = "session, autocommit"

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with databases["default"].get_session(autocommit=True) as session:
            yield SessionClient(session)


class TransactionCompetitor(PackageCompetitor):
    """A session with its own transaction for each operation."""

    name = "transaction"
    title = "session, its own transaction"

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        yield TransactionClient()


class SessionClient(Client):
    """The works in a session."""

    def __init__(self, session: Session) -> None:
        self.session = session

    async def get(self, number: int) -> Any:
        return await self.session.get(Book, rows.book_key(number))

    async def raw(self, number: int) -> Any:
        return await self.session.fetch(SQL.book, [rows.book_key(number)])

    async def count(self, number: int) -> Any:
        return await self.session.select(Book).where(author_id=rows.author_key(number)).count()

    async def filter(self, number: int) -> Any:
        found = self.session.select(Book).where(author_id=rows.author_key(number))
        return await found.order_by("id")

    async def related(self, number: int) -> Any:
        found = self.session.select(Book).where(books.pages == rows.author_key(number))
        return await found.related("author").order_by("id")

    async def prefetch(self, number: int) -> Any:
        first = rows.first_of_ten(number)
        found = self.session.select(Author).where(authors.id >= first, authors.id < first + 10)
        return await found.order_by("id").prefetch("books")

    async def values(self, number: int) -> Any:
        first = rows.first_of_thousand(number)
        found = self.session.select(Book).where(books.id >= first, books.id < first + 1_000)
        return await found.order_by("id").values_list(*rows.VALUES)

    async def insert(self, number: int) -> Any:
        return (await self.session.add(Draft(**rows.draft(number)))).pk

    async def update(self, number: int) -> Any:
        changed = self.session.update(Draft).where(drafts.id == rows.draft_key(number))
        return await changed.set(drafts.pages, number + 1)

    async def transaction(self, number: int) -> Any:
        async with databases["default"].get_session() as session:
            book = await session.get_one(Book, rows.book_key(number))
            author = await session.get_one(Author, book.author_id)
            draft = await session.add(Draft(**rows.draft(number)))
            changed = session.update(Draft).where(drafts.id == draft.pk)
            await changed.set(drafts.pages, number + 1)
            return book, author, await session.get_one(Draft, draft.pk)

    async def insert_many(self, number: int) -> Any:
        await self.session.add_all([Draft(**rows.draft(of)) for of in rows.draft_numbers(number)])

    async def many(self, limit: int) -> Any:
        return await self.session.select(Book).limit(limit)

    async def stream(self, limit: int) -> AsyncIterator[Any]:
        async for row in self.session.select(Draft).limit(limit).stream():
            yield row


def _alone(name: str) -> Any:
    """The work `name` in a session, and a transaction, of its own."""

    async def work(self: TransactionClient, number: int) -> Any:
        async with databases["default"].get_session() as session:
            return await getattr(SessionClient(session), name)(number)

    return work


class TransactionClient(Client):
    """Each work in a session of its own."""

    get = _alone("get")
    raw = _alone("raw")
    count = _alone("count")
    filter = _alone("filter")
    related = _alone("related")
    prefetch = _alone("prefetch")
    values = _alone("values")
    insert = _alone("insert")
    update = _alone("update")
    # In the session that it makes itself.
    transaction = SessionClient.transaction
    insert_many = _alone("insert_many")
    many = _alone("many")
