"""django-read-only refuses writes in every session, and in each of the ways to write."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from django.test import override_settings
from django_read_only import DjangoReadOnlyError, temp_writes

from django_asyncsession import DatabaseInterface, Session, native
from tests.models import User
from tests.sessions import INSERT, names


async def raw(session: Session) -> None:
    await session.execute(INSERT, ["raw"])


async def many(session: Session) -> None:
    await session.execute_many(INSERT, [["one"], ["two"]])


async def cursor(session: Session) -> None:
    await session.cursor(INSERT, ["cursor"])


async def add(session: Session) -> None:
    await session.add(User(name="added"))


async def insert(session: Session) -> None:
    await session.insert.rows(User(name="inserted"))


async def update(session: Session) -> None:
    await session.update(User).all_rows().set(name="updated")


async def delete(session: Session) -> None:
    await session.delete(User).all_rows()


async def truncate(session: Session) -> None:
    await session.truncate(User)


async def sync_code(session: Session) -> None:
    await session.run_sync(User.objects.using(session.alias).create, name="sync")


async def native_mode(session: Session) -> None:
    async with native.use(session):
        await User.objects.using(session.alias).acreate(name="native")


WRITES: list[Callable[[Session], Awaitable[Any]]] = [
    raw,
    many,
    cursor,
    add,
    insert,
    update,
    delete,
    truncate,
    sync_code,
    native_mode,
]


@pytest.fixture(params=[False, True], ids=["transaction", "autocommit"])
def autocommit(request: pytest.FixtureRequest) -> bool:
    """A session in a transaction, and one that commits each statement."""
    return bool(request.param)


@pytest.fixture
def read_only(fresh_database: DatabaseInterface) -> Iterator[DatabaseInterface]:
    """Writes are refused on each database in turn, which has a pool of one connection."""
    pools = {fresh_database.alias: {"max_size": 1}}
    with override_settings(
        DJANGO_READ_ONLY=True, ASYNC_SESSION={"NATIVE_ORM": True, "POOLS": pools}
    ):
        yield fresh_database


@pytest.mark.parametrize("write", WRITES)
async def test_a_write_is_refused_in_each_session_that_gets_the_connection(
    read_only: DatabaseInterface,
    autocommit: bool,
    write: Callable[[Session], Awaitable[Any]],
) -> None:
    with temp_writes():
        async with read_only.get_session() as session:
            await session.execute(INSERT, ["kept"])
    for _ in range(3):
        with pytest.raises(DjangoReadOnlyError):
            async with read_only.get_session(autocommit=autocommit) as session:
                assert await session.fetch_value("SELECT name FROM tests_user") == "kept"
                await write(session)
    assert await names(read_only) == ["kept"]
    assert read_only.stats()["connections_num"] == 1


async def test_writes_can_be_allowed_again(read_only: DatabaseInterface) -> None:
    for number in range(3):
        with temp_writes():
            async with read_only.get_session() as session:
                await session.execute(INSERT, [f"user {number}"])
    assert await names(read_only) == ["user 0", "user 1", "user 2"]
