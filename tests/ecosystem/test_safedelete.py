"""django-safedelete: what a session deletes is marked, and what is marked is not there."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from django_asyncsession import Session
from tests.ecosystem.models import Album, Track
from tests.ecosystem.routers import everything_on

STORED = "SELECT name FROM ecosystem_album WHERE deleted IS NOT NULL ORDER BY name"


@pytest.fixture
async def albums(session: Session) -> AsyncIterator[Session]:
    with everything_on(session.alias):
        for name in ("a", "b"):
            album = await session.add(Album(name=name))
            await session.insert.rows(Track(album=album))
        yield session


async def marked(session: Session) -> list[str]:
    return [row[0] for row in await session.fetch_all(STORED)]


async def test_delete_marks_rows_and_those_that_go_with_them(albums: Session) -> None:
    await albums.delete(Album).where(name="a")
    assert await marked(albums) == ["a"]
    assert await albums.fetch_value("SELECT count(*) FROM ecosystem_album") == 2
    assert (await albums.select(Album).count(), await albums.select(Track).count()) == (1, 1)


async def test_remove_marks_as_well(albums: Session) -> None:
    await albums.remove(await albums.select(Album).where(name="b").one())
    assert await marked(albums) == ["b"]


async def test_a_marked_row_is_not_updated(albums: Session) -> None:
    await albums.delete(Album).where(name="a")
    assert await albums.update(Album).where(name__in=["a", "b"]).set(name="c") == 1
    assert await marked(albums) == ["a"]
    assert await albums.select(Album.deleted_objects).columns("name").scalars() == ["a"]


async def test_deleted_rows_are_returned(albums: Session) -> None:
    found = await albums.delete(Album).where(name="a").returning("name")
    assert [tuple(row) for row in found] == [("a",)]
    assert await marked(albums) == ["a"]
