"""Callbacks of a commit and of a rollback: when they run, in which order, and what they may do.

On real connections of the pools.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from django.db import transaction as django_transaction

from django_asyncsession import DatabaseInterface, Outcome, SessionStateError, databases
from tests.models import User
from tests.sessions import COUNT, INSERT, names, pool, whole


async def test_commit_callbacks_run_in_order_after_the_commit(
    real_database: DatabaseInterface,
) -> None:
    calls: list[Any] = []

    async def awaited() -> None:
        await asyncio.sleep(0)
        calls.append(await names(real_database))

    async with real_database.get_session() as session:
        session.on_commit(lambda: calls.append(1))
        await session.execute(INSERT, ["a"])
        session.on_commit(awaited)
        session.on_commit(lambda: awaited())
        await session.run_sync(
            lambda: django_transaction.on_commit(
                lambda: calls.append("django"), using=real_database.alias
            )
        )
        async with session.begin_nested():
            session.on_commit(lambda: calls.append(2))
        session.on_commit(lambda: calls.append(3))
        assert calls == []
    assert calls == [1, ["a"], ["a"], "django", 2, 3]
    await whole(real_database)


@pytest.mark.parametrize("statement", [False, True])
async def test_commit_callbacks_run_although_nothing_was_written(
    real_database: DatabaseInterface, statement: bool
) -> None:
    calls: list[Any] = []
    async with real_database.get_session() as session:
        session.on_commit(lambda: calls.append(User.objects.using(real_database.alias).count()))
        if statement:
            await session.execute("SELECT 1")
    assert calls == [0]
    await whole(real_database)


async def test_commit_callbacks_are_dropped_with_the_rollback(
    real_database: DatabaseInterface,
) -> None:
    calls: list[Any] = []
    with pool(real_database, max_size=1):
        await real_database.connect()

    async def fail(with_statement: bool) -> None:
        async with real_database.get_session() as session:
            session.on_commit(lambda: calls.append("outer"))
            if with_statement:
                await session.execute(INSERT, ["a"])
                session.on_commit(lambda: calls.append("outer"))
            raise ZeroDivisionError

    for with_statement in (False, True):
        with pytest.raises(ZeroDivisionError):
            await fail(with_statement)
    async with real_database.get_session() as later:
        await later.execute(INSERT, ["b"])
        await later.commit()
        await later.execute(INSERT, ["c"])
    assert calls == []
    assert await names(real_database) == ["b", "c"]


async def test_callbacks_of_a_block_that_is_rolled_back_are_dropped(
    real_database: DatabaseInterface,
) -> None:
    calls: list[Any] = []
    async with real_database.get_session() as session:
        with contextlib.suppress(ZeroDivisionError):
            async with session.begin_nested():
                session.on_commit(lambda: calls.append("dropped"))
                async with session.begin_nested():
                    session.on_commit(lambda: calls.append("dropped too"))
                raise ZeroDivisionError
        assert session.transaction is not None
        session.on_commit(lambda: calls.append("before"))
        await session.transaction.create_savepoint("sp")
        session.on_commit(lambda: calls.append("after the savepoint"))
        await session.rollback("sp")
        async with session.begin_nested() as savepoint:
            session.on_commit(lambda: calls.append("undone"))
            await savepoint.rollback()
            session.on_commit(lambda: calls.append("kept"))
    assert calls == ["before", "kept"]


async def test_an_error_in_a_callback_surfaces_and_drops_the_later_ones(
    real_database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[Any] = []

    async def fails() -> None:
        raise ValueError("in the callback")

    def never() -> None:
        calls.append("never")

    for first in (True, False):
        session = await real_database.get_session().begin()
        if first:
            await session.execute(INSERT, ["a"])
        session.on_commit(lambda: 1 / 0, robust=True)
        session.on_commit(lambda: calls.append("after robust"))
        session.on_commit(fails)
        session.on_commit(never)
        session.on_rollback(never)
        with pytest.raises(ValueError, match="in the callback"):
            await session.commit()
        assert session.closed
        assert session.outcome is Outcome.COMMITTED
        await whole(real_database)
    assert calls == ["after robust"] * 2
    assert await names(real_database) == ["a"]
    assert caplog.text.count("did not run, because an earlier one failed; the data is saved") == 2
    assert "never" in caplog.text


async def test_a_callback_may_use_the_session_and_register_more(
    real_database: DatabaseInterface,
) -> None:
    calls: list[Any] = []
    session = real_database.get_session()

    async def more() -> None:
        calls.append("more")

    async def uses() -> None:
        calls.append(await session.fetch_value(COUNT))
        await session.execute(INSERT, ["by the callback"])
        async with session.begin_nested():
            await session.execute(INSERT, ["nested"])
        session.on_commit(more)
        session.on_commit(lambda: calls.append("last"))
        for end in (session.commit, session.rollback, session.close):
            with pytest.raises(SessionStateError, match="in a callback of the end"):
                await end()

    async with session:
        await session.execute(INSERT, ["a"])
        session.on_commit(uses)
        await session.commit()
        assert calls == [1, "more", "last"]
        await session.execute(INSERT, ["b"])
    assert await names(real_database) == ["a", "b", "by the callback", "nested"]
    await whole(real_database)


async def test_a_callback_of_sync_code_may_use_the_orm(real_database: DatabaseInterface) -> None:
    async with real_database.get_session() as session:
        await session.execute(INSERT, ["a"])
        session.on_commit(lambda: User.objects.using(real_database.alias).create(name="orm"))
    assert await names(real_database) == ["a", "orm"]


async def test_what_a_callback_writes_is_saved_although_nothing_was_written_before(
    real_database: DatabaseInterface,
) -> None:
    async with real_database.get_session() as session:

        async def writes() -> None:
            await session.execute(INSERT, ["a"])
            async with session.begin_nested():
                await session.execute(INSERT, ["nested"])
            await session.run_sync(User.objects.using(real_database.alias).create, name="orm")

        session.on_commit(writes)
    assert await names(real_database) == ["a", "nested", "orm"]
    await whole(real_database)


@pytest.mark.parametrize("wrong", [None, "name", 5])
async def test_a_callback_must_be_callable(wrong: Any) -> None:
    async with databases["default"].get_session() as session:
        with pytest.raises(TypeError, match=r"on_commit\(\) needs a callable"):
            session.on_commit(wrong)
        with pytest.raises(TypeError, match=r"on_rollback\(\) needs a callable"):
            session.on_rollback(wrong)


async def test_rollback_callbacks_run_when_their_work_is_undone_and_only_then(
    real_database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []

    async def awaited() -> None:
        await asyncio.sleep(0)
        calls.append("awaited")

    async with real_database.get_session() as session:
        session.on_rollback(lambda: calls.append("committed"))
        with contextlib.suppress(ZeroDivisionError):
            async with session.begin_nested():
                async with session.begin_nested():
                    session.on_rollback(lambda: calls.append("inner, released"))
                session.on_rollback(lambda: 1 / 0)
                session.on_rollback(awaited)
                assert calls == []
                raise ZeroDivisionError
        assert calls == ["inner, released", "awaited"]
        async with session.begin_nested() as savepoint:
            session.on_rollback(lambda: calls.append("by hand"))
            await savepoint.rollback()
            assert calls.pop() == "by hand"
        assert session.transaction is not None
        await session.transaction.create_savepoint("sp")
        session.on_rollback(lambda: calls.append("by name"))
        await session.rollback("sp")
        assert calls.pop() == "by name"
    assert calls == ["inner, released", "awaited"]
    assert "error in the on_rollback callback" in caplog.text


async def test_rollback_callbacks_of_a_block_without_a_savepoint_wait_for_the_outer_one(
    real_database: DatabaseInterface,
) -> None:
    calls: list[str] = []
    async with real_database.get_session() as session:
        with contextlib.suppress(ZeroDivisionError):
            async with session.atomic():
                with contextlib.suppress(ZeroDivisionError):
                    async with session.atomic(savepoint=False):
                        session.on_rollback(lambda: calls.append("undone"))
                        raise ZeroDivisionError
                assert calls == []
        assert calls == ["undone"]


async def test_a_rollback_callback_cannot_block_the_loop_with_sync_queries(
    real_database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    session = await real_database.get_session().begin()
    await session.execute(INSERT, ["a"])
    session.on_rollback(lambda: User.objects.using(real_database.alias).count())
    await session.rollback()
    assert "would block the event loop" in caplog.text
    await session.close()


async def test_a_rollback_callback_may_use_the_session_again(
    real_database: DatabaseInterface,
) -> None:
    async with real_database.get_session() as session:
        await session.execute(INSERT, ["a"])
        session.on_rollback(lambda: session.execute(INSERT, ["by the callback"]))
        await session.rollback()
    assert await names(real_database) == ["by the callback"]
    await whole(real_database)
