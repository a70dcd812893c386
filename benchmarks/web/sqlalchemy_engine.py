"""SQLAlchemy on asyncpg for Starlette and FastAPI: a pool of ten, a session and a transaction for
each request. The URL comes from BENCHMARKS_URL."""

from __future__ import annotations

import os
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from benchmarks.competitors.sqlalchemy_models import Book
from benchmarks.web.bodies import body

engine = create_async_engine(os.environ["BENCHMARKS_URL"], pool_size=10, max_overflow=0)
sessions = async_sessionmaker(engine, expire_on_commit=False)


async def one(session: AsyncSession, key: int) -> dict[str, Any]:
    """A book."""
    return body(await session.get_one(Book, key))


async def several(session: AsyncSession, key: int) -> dict[str, Any]:
    """The books of an author."""
    found = await session.scalars(select(Book).where(Book.author_id == key).order_by(Book.id))
    return {"books": [body(book) for book in found]}
