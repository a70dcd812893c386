"""SQLAlchemy's AsyncSession on asyncpg and on psycopg: a session for each operation, in the
transaction that it begins by itself, expire_on_commit=False as its documentation says for
asyncio, a pool of ten without overflow; both drivers prepare statements by their own defaults."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

from benchmarks import rows
from benchmarks.competitors.base import Client, Competitor
from benchmarks.competitors.texts import PSYCOPG as SQL
from benchmarks.database import url
from benchmarks.settings import POOL, TIMEOUT


class SQLAlchemyAsyncpg(Competitor):
    """On asyncpg."""

    name = "sqlalchemy_asyncpg"
    title = "SQLAlchemy, asyncpg"
    needs = ("sqlalchemy", "asyncpg")
    pool = "sqlalchemy_asyncpg"
    scheme: ClassVar[str] = "postgresql+asyncpg"

    def url(self) -> str:
        """Of the database."""
        return url(self.scheme)

    async def open(self) -> None:
        from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

        options = {"pool_size": POOL, "max_overflow": 0, "pool_timeout": TIMEOUT}
        self.engine = create_async_engine(self.url(), **options)
        self.sessions = async_sessionmaker(self.engine, expire_on_commit=False)

    async def close(self) -> None:
        await self.engine.dispose()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        yield SQLAlchemyClient(self.sessions)


class SQLAlchemyPsycopg(SQLAlchemyAsyncpg):
    """On psycopg."""

    name = "sqlalchemy_psycopg"
    title = "SQLAlchemy, psycopg"
    needs = ("sqlalchemy", "psycopg")
    pool = "sqlalchemy_psycopg"
    scheme = "postgresql+psycopg"


class SQLAlchemyClient(Client):
    """Statements of the ORM in SQLAlchemy's present style."""

    def __init__(self, sessions: Any) -> None:
        import sqlalchemy
        from sqlalchemy import orm

        from benchmarks.competitors import sqlalchemy_models as models

        self.sessions, self.models, self.sql, self.orm = sessions, models, sqlalchemy, orm
        self.book = sqlalchemy.text(SQL.book.replace("%s", ":id"))

    async def _all(self, statement: Any) -> Any:
        async with self.sessions() as session:
            return (await session.scalars(statement)).all()

    async def get(self, number: int) -> Any:
        async with self.sessions() as session:
            return await session.get(self.models.Book, rows.book_key(number))

    async def raw(self, number: int) -> Any:
        async with self.sessions() as session:
            return (await session.execute(self.book, {"id": rows.book_key(number)})).one()

    async def count(self, number: int) -> Any:
        Book, sql = self.models.Book, self.sql
        counted = sql.select(sql.func.count()).select_from(Book)
        async with self.sessions() as session:
            return await session.scalar(counted.where(Book.author_id == rows.author_key(number)))

    async def filter(self, number: int) -> Any:
        Book = self.models.Book
        found = self.sql.select(Book).where(Book.author_id == rows.author_key(number))
        return await self._all(found.order_by(Book.id))

    async def related(self, number: int) -> Any:
        Book = self.models.Book
        found = self.sql.select(Book).options(self.orm.joinedload(Book.author, innerjoin=True))
        return await self._all(found.where(Book.pages == rows.author_key(number)).order_by(Book.id))

    async def prefetch(self, number: int) -> Any:
        Author, first = self.models.Author, rows.first_of_ten(number)
        found = self.sql.select(Author).options(self.orm.selectinload(Author.books))
        found = found.where(Author.id >= first, Author.id < first + 10)
        return await self._all(found.order_by(Author.id))

    async def values(self, number: int) -> Any:
        Book, first = self.models.Book, rows.first_of_thousand(number)
        found = self.sql.select(Book.id, Book.title, Book.pages, Book.price)
        found = found.where(Book.id >= first, Book.id < first + 1_000).order_by(Book.id)
        async with self.sessions() as session:
            return (await session.execute(found)).all()

    async def insert(self, number: int) -> Any:
        draft = self.models.Draft(**rows.draft(number))
        async with self.sessions.begin() as session:
            session.add(draft)
        return draft.id

    async def update(self, number: int) -> Any:
        Draft = self.models.Draft
        changed = self.sql.update(Draft).where(Draft.id == rows.draft_key(number))
        async with self.sessions.begin() as session:
            return (await session.execute(changed.values(pages=number + 1))).rowcount

    async def transaction(self, number: int) -> Any:
        Draft = self.models.Draft
        async with self.sessions.begin() as session:
            book = await session.get(self.models.Book, rows.book_key(number))
            author = await session.get(self.models.Author, book.author_id)
            draft = Draft(**rows.draft(number))
            session.add(draft)
            await session.flush()
            # The unit of work has the row; the UPDATE is sent without it, as others do.
            changed = self.sql.update(Draft).where(Draft.id == draft.id).values(pages=number + 1)
            await session.execute(changed, execution_options={"synchronize_session": False})
            return book, author, await session.get(Draft, draft.id, populate_existing=True)

    async def insert_many(self, number: int) -> Any:
        drafts = [self.models.Draft(**rows.draft(of)) for of in rows.draft_numbers(number)]
        async with self.sessions.begin() as session:
            session.add_all(drafts)

    async def many(self, limit: int) -> Any:
        return await self._all(self.sql.select(self.models.Book).limit(limit))

    async def stream(self, limit: int) -> AsyncIterator[Any]:
        found = self.sql.select(self.models.Draft).limit(limit)
        found = found.execution_options(yield_per=2_000)
        async with self.sessions() as session:
            async for row in await session.stream_scalars(found):
                yield row
