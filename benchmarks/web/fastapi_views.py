"""FastAPI with SQLAlchemy, the session by a dependency, as FastAPI's documentation does it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.web.sqlalchemy_engine import one, sessions, several


async def session_of_request() -> AsyncIterator[AsyncSession]:
    """A session with its transaction."""
    async with sessions.begin() as session:
        yield session


SessionOfRequest = Annotated[AsyncSession, Depends(session_of_request)]
application = FastAPI()


@application.get("/books/{key}")
async def get(key: int, session: SessionOfRequest) -> dict[str, Any]:
    """A book."""
    return await one(session, key)


@application.get("/authors/{key}/books")
async def list_all(key: int, session: SessionOfRequest) -> dict[str, Any]:
    """The books of an author."""
    return await several(session, key)
