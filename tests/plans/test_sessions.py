"""Plans in sessions of every kind, on real connections of the pool: each takes its own, as ever."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from django.db import DataError, OperationalError, ProgrammingError

from django_asyncsession import DatabaseInterface, SessionClosedError, databases, native
from django_asyncsession.plans import cache
from django_asyncsession.signals import connection_leased
from tests.models import User


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    """Each test learns its own plans."""
    cache.clear_all()
    yield
    cache.clear_all()


async def fill(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        await session.insert.rows(*(User(id=n, name=f"u{n}", level=n) for n in range(1, 4)))


async def test_in_autocommit_statements_run_in_parallel(real_database: DatabaseInterface) -> None:
    await fill(real_database)
    async with real_database.get_session(autocommit=True) as session:
        for _ in range(4):
            found = await asyncio.gather(*(session.get(User, n) for n in (1, 2, 3, 4)))
            assert [user and user.level for user in found] == [1, 2, 3, None]
            counts = await asyncio.gather(
                *(session.select(User).where(level__gte=n).count() for n in (1, 2, 3))
            )
            assert counts == [3, 2, 1]
    assert cache.of(real_database.alias).hits > 0


async def test_reads_of_gather_run_on_plans(real_database: DatabaseInterface) -> None:
    await fill(real_database)
    async with real_database.get_session() as session:
        query = session.select(User).order_by("id")
        for _ in range(4):
            first, second = await session.gather(
                query.where(level=1), query.where(level__in=[2, 3])
            )
            assert [[u.level for u in rows] for rows in (first, second)] == [[1], [2, 3]]


async def test_in_native_mode_too(real_database: DatabaseInterface) -> None:
    await fill(real_database)
    native.install()
    try:
        async with real_database.get_session() as session:
            with native.use(session):
                for n in (1, 2, 3, 1):
                    (user,) = await session.select(User).where(level=n)
                    assert user == await session.get(User, n)
                    found = [u async for u in User.objects.using(session.alias).filter(level=n)]
                    assert found == [user]
                assert session.select(User).where(level=1).why() == "Runs on a plan."
    finally:
        native.uninstall()


async def test_an_error_of_the_database_is_the_transaction_s(
    real_database: DatabaseInterface,
) -> None:
    await fill(real_database)
    async with real_database.get_session() as session:
        for _ in range(4):
            assert (await session.get_one(User, 1)).level == 1
        (entry,) = cache.of(session.alias)._entries
        assert entry.plan is not None
        plan = entry.plan
        texts, wrong = (plan.sql, plan.text), "SELECT no_such_column FROM tests_user WHERE id = "
        plan.sql, plan.text = f"{wrong}%s", f"{wrong}$1".encode()
        async with session.begin_nested() as savepoint:
            with pytest.raises((ProgrammingError, OperationalError), match="no_such_column"):
                await session.get(User, 1)
            await savepoint.rollback()
        plan.sql, plan.text = texts
        assert (await session.get_one(User, 1)).level == 1


async def test_a_table_that_has_got_a_column_is_read_as_before(
    real_database: DatabaseInterface,
) -> None:
    await fill(real_database)
    async with real_database.get_session(autocommit=True) as session:
        for _ in range(4):
            assert (await session.get_one(User, 1)).level == 1
        await session.execute("ALTER TABLE tests_user ADD COLUMN more integer")
        try:
            assert (await session.get_one(User, 1)).level == 1
            assert [u.level for u in await session.select(User).where(level=2)] == [2]
        finally:
            await session.execute("ALTER TABLE tests_user DROP COLUMN more")
        assert (await session.get_one(User, 2)).level == 2


async def test_a_closed_session_says_so(real_database: DatabaseInterface) -> None:
    await fill(real_database)
    async with real_database.get_session() as session:
        query = session.select(User).where(level=1)
        for _ in range(4):
            assert len(await query) == 1
    with pytest.raises(SessionClosedError):
        await query
    with pytest.raises(SessionClosedError):
        await session.get(User, 1)


async def test_an_execute_wrapper_sees_each_statement_once(
    real_database: DatabaseInterface,
) -> None:
    await fill(real_database)
    seen: list[str] = []

    def watch(execute, sql, params, many, context):  # type: ignore[no-untyped-def]
        seen.append(sql)
        return execute(sql, params, many, context)

    def install(connection, **kwargs):  # type: ignore[no-untyped-def]
        connection.execute_wrappers.append(watch)

    connection_leased.connect(install)
    try:
        async with real_database.get_session() as session:
            for _ in range(5):
                await session.get(User, 1)
    finally:
        connection_leased.disconnect(install)
    reads = [sql for sql in seen if "tests_user" in sql]
    assert len(reads) == 5 and len(set(reads)) == 1


async def test_a_value_that_the_driver_refuses_is_refused_as_ever(
    real_database: DatabaseInterface,
) -> None:
    await fill(real_database)
    for _ in range(4):
        async with real_database.get_session() as session:
            await session.select(User).where(name="x")
    async with real_database.get_session(autocommit=True) as session:
        query = session.select(User).where(name="a\ud800")
        with pytest.raises((UnicodeEncodeError, DataError)):
            await query


def test_stats_without_a_pool_have_plans_too() -> None:
    stats = databases["default"].stats()
    assert {"plans", "plan_hits", "plan_misses", "plan_fallbacks", "pool_size"} <= stats.keys()
