"""What `session.gather()` refuses: what is no read, and reads that lock. On real connections, which
are its point."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
from django.db import connections

from django_asyncsession import DatabaseInterface, Session
from django_asyncsession.exceptions import SessionStateError
from django_asyncsession.testing import async_assert_num_queries
from tests.models import User
from tests.sessions import COUNT, whole

# What is no read


async def test_what_is_no_read_is_refused(real_database: DatabaseInterface) -> None:
    async with real_database.get_session() as session:
        coroutine = session.fetch_value(COUNT)
        with pytest.raises(TypeError, match=r"'Session.fetch_value'.*lambda s: s\.fetch_all"):
            await session.gather(User.objects.all(), coroutine)
        assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED
        for wrong in (User, 7, "SELECT 1"):
            with pytest.raises(TypeError, match="gather\\(\\) got"):
                await session.gather(wrong)  # type: ignore[arg-type]
        for limit in (0, -1, True, 2.5):
            with pytest.raises(ValueError, match="limit is"):
                await session.gather(User.objects.all(), limit=limit)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="a QuerySet on 'elsewhere'"):
            await session.gather(User.objects.using("elsewhere"))
        with pytest.raises(TypeError, match=r"returned int; .* be awaited"):
            await session.gather(lambda s: 7)  # type: ignore[arg-type,return-value]


async def test_a_session_that_has_not_begun_or_is_closed_does_not_gather(
    real_database: DatabaseInterface,
) -> None:
    session = real_database.get_session()
    with pytest.raises(SessionStateError, match="has not begun"):
        await session.gather(User.objects.all())
    await session.begin()
    await session.close()
    with pytest.raises(SessionStateError, match="closed"):
        await session.gather()


# Locks


LOCKING = "SELECT name FROM tests_user FOR UPDATE"


@pytest.mark.parametrize("autocommit", [False, True], ids=["transaction", "autocommit"])
async def test_a_query_that_locks_is_refused_before_anything_is_sent(
    real_database: DatabaseInterface, autocommit: bool
) -> None:
    async with real_database.get_session(autocommit=autocommit) as session:
        plain = session.select(User)
        for locking in (
            plain.for_update(),
            plain.union(plain).queryset.select_for_update(),
            User.objects.select_for_update(),
        ):
            sent = async_assert_num_queries(0, real_database.alias)
            async with sent:
                with pytest.raises(SessionStateError, match=r"for_update.*session\.atomic\(\)"):
                    await session.gather(plain, locking)
        assert await session.gather(plain) == [[]]
    await whole(real_database)


@pytest.mark.parametrize("holds", [False, True])
async def test_a_read_whose_sql_locks_is_refused_before_it_is_sent(
    real_database: DatabaseInterface, holds: bool
) -> None:
    """Whichever connection it would be sent on, and by whom."""

    def service(alias: str) -> None:
        with connections[alias].cursor() as cursor:
            cursor.execute(LOCKING)

    reads: list[Any] = [
        lambda s: s.fetch_all(LOCKING),
        lambda s: s.fetch_all("SELECT 1 /* one */ for -- all\n Share"),
        lambda s: s.run_sync(service, real_database.alias),
        lambda s: s.select(User).for_update().all(),
        lambda s: s.run_sync(User.objects.using(s.alias).select_for_update().first),
    ]
    async with real_database.get_session() as session:
        for read in reads:
            if holds:
                await session.fetch_value(COUNT)
            with pytest.raises(SessionStateError, match=r"for_update.*session\.atomic\(\)"):
                await session.gather(read)
        if real_database.vendor != "sqlite":
            # Outside of it, a lock is the server's business.
            assert await session.fetch_all(LOCKING) == []
    await whole(real_database)


async def test_a_refused_lock_of_tables_is_not_said_to_have_committed(
    real_database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    async with real_database.get_session() as session:
        with pytest.raises(SessionStateError, match=r"session\.atomic\(\)"):
            await session.gather(lambda s: s.execute("LOCK TABLE tests_user"))
    assert "commits" not in caplog.text


async def test_words_in_quotes_lock_nothing(real_database: DatabaseInterface) -> None:
    text = "SELECT 'for update'"
    async with real_database.get_session() as session:
        assert await session.gather(lambda s: s.fetch_value(text)) == ["for update"]


async def test_what_a_read_has_started_may_lock_afterwards(
    real_database: DatabaseInterface,
) -> None:
    if real_database.vendor == "sqlite":
        pytest.skip("SQLite locks no rows")
    over = asyncio.Event()

    async def later() -> list[Any]:
        await over.wait()
        async with real_database.get_session() as session:
            return await session.fetch_all(LOCKING)

    async def read(session: Session) -> asyncio.Task[list[Any]]:
        await session.fetch_value(COUNT)
        return asyncio.create_task(later())

    async with real_database.get_session() as session:
        (task,) = await session.gather(read)
    over.set()
    assert await task == []
    await whole(real_database)
