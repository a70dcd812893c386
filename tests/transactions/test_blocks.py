"""Nested blocks: savepoints, `atomic()` with Django's meaning, and whose they are.

On connections of the pools, whose transactions are real: savepoints within the savepoint of a test
would show less.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from django.db import DatabaseError, IntegrityError, transaction
from django.db.transaction import TransactionManagementError

from django_asyncsession import DatabaseInterface, SessionInUseError, SessionStateError
from tests.models import Author
from tests.sessions import INSERT, names, whole

BAD = "SELECT * FROM no_such_table"
NESTED = {
    "begin_nested": lambda session: session.begin_nested(),
    "savepoint": lambda session: session.savepoint(),
    "atomic": lambda session: session.atomic(),
}


@pytest.mark.parametrize("kind", NESTED)
async def test_a_nested_block_is_kept_or_undone_alone(
    real_database: DatabaseInterface, kind: str
) -> None:
    nested = NESTED[kind]
    async with real_database.get_session() as session:
        await session.execute(INSERT, ["a"])
        async with nested(session):
            await session.execute(INSERT, ["b"])
            async with nested(session):
                await session.execute(INSERT, ["c"])
        with pytest.raises(ZeroDivisionError):
            async with nested(session):
                await session.execute(INSERT, ["lost"])
                async with nested(session):
                    await session.execute(INSERT, ["lost"])
                raise ZeroDivisionError
        await session.execute(INSERT, ["d"])
    assert await names(real_database) == ["a", "b", "c", "d"]
    await whole(real_database)


@pytest.mark.parametrize("kind", NESTED)
async def test_an_error_of_the_database_spoils_its_block_alone(
    real_database: DatabaseInterface, kind: str
) -> None:
    async with real_database.get_session() as session:
        with pytest.raises(IntegrityError):
            async with NESTED[kind](session):
                await session.add(Author(name="a"))
                await session.add(Author(name="a"))
        await session.execute(INSERT, ["fine"])
    assert await names(real_database) == ["fine"]


async def test_an_error_swallowed_in_a_nested_block_is_told_at_its_end(
    real_database: DatabaseInterface,
) -> None:
    async with real_database.get_session() as session:
        with pytest.raises(TransactionManagementError, match="in the nested block of") as caught:
            async with session.begin_nested():
                await session.execute(INSERT, ["lost"])
                with contextlib.suppress(DatabaseError):
                    await session.execute(BAD)
                with pytest.raises(TransactionManagementError):
                    await session.execute(INSERT, ["lost"])
        assert isinstance(caught.value.__cause__, DatabaseError)
        await session.execute(INSERT, ["a"])
    assert await names(real_database) == ["a"]


async def test_in_atomic_it_rolls_back_silently_as_in_django(
    real_database: DatabaseInterface,
) -> None:
    async with real_database.get_session() as session:
        async with session.atomic():
            await session.execute(INSERT, ["lost"])
            with contextlib.suppress(DatabaseError):
                await session.execute(BAD)
        await session.execute(INSERT, ["a"])
    assert await names(real_database) == ["a"]


async def test_the_rollback_flag_in_a_block_rolls_back_the_block_without_an_error(
    real_database: DatabaseInterface,
) -> None:
    async with real_database.get_session() as session:
        for kind in NESTED.values():
            async with kind(session):
                await session.execute(INSERT, ["lost"])
                session.set_rollback(True)
                assert session.get_rollback()
            assert not session.get_rollback()
        async with session.begin_nested():
            await session.run_sync(transaction.set_rollback, True, using=real_database.alias)
        async with session.begin_nested():
            session.set_rollback(True)
            session.set_rollback(False)
            await session.execute(INSERT, ["a"])
    assert await names(real_database) == ["a"]


async def test_a_savepoint_rolled_back_by_hand_goes_on(real_database: DatabaseInterface) -> None:
    async with real_database.get_session() as session:
        async with session.begin_nested() as savepoint:
            await session.execute(INSERT, ["lost"])
            await savepoint.rollback()
            await session.execute(INSERT, ["a"])
            with contextlib.suppress(DatabaseError):
                await session.execute(BAD)
            await session.rollback(savepoint)
            await session.execute(INSERT, ["b"])
        with pytest.raises(SessionStateError, match="not the innermost"):
            await savepoint.rollback()
    assert await names(real_database) == ["b"]


async def test_only_the_innermost_block_can_be_rolled_back_or_left(
    real_database: DatabaseInterface,
) -> None:
    async with (
        real_database.get_session() as session,
        session.begin_nested() as outer,
        session.begin_nested(),
    ):
        with pytest.raises(SessionStateError, match="not the innermost"):
            await outer.rollback()
        with pytest.raises(SessionStateError, match=r"cannot end a block .* not the innermost"):
            await outer.__aexit__(None, None, None)
        await session.execute(INSERT, ["a"])
    assert await names(real_database) == ["a"]


async def test_a_session_cannot_end_inside_a_nested_block(real_database: DatabaseInterface) -> None:
    async with real_database.get_session() as session, session.begin_nested():
        await session.execute(INSERT, ["a"])
        for end, name in ((session.commit, "commit"), (session.rollback, "rollback")):
            with pytest.raises(SessionStateError, match=rf"{name}\(\) inside a nested block"):
                await end()
    assert await names(real_database) == ["a"]


async def test_closing_inside_a_nested_block_rolls_back_all(
    real_database: DatabaseInterface,
) -> None:
    session = await real_database.get_session().begin()
    async with session.begin_nested():
        await session.execute(INSERT, ["a"])
        await session.close()
    assert await names(real_database) == []
    await whole(real_database)


async def test_without_a_savepoint_an_error_spoils_the_outer_block(
    real_database: DatabaseInterface,
) -> None:
    async with real_database.get_session() as session:
        with pytest.raises(TransactionManagementError):
            async with session.begin_nested():
                await session.execute(INSERT, ["lost"])
                with contextlib.suppress(ZeroDivisionError):
                    async with session.atomic(savepoint=False):
                        raise ZeroDivisionError
        async with session.atomic(savepoint=False):
            await session.execute(INSERT, ["a"])
    assert await names(real_database) == ["a"]


async def test_a_block_without_a_savepoint_cannot_be_rolled_back_by_hand(
    real_database: DatabaseInterface,
) -> None:
    from django_asyncsession.transactions.blocks import Block

    async with real_database.get_session() as session:
        assert session.transaction is not None
        async with Block(session.transaction, savepoint=False) as block:
            with pytest.raises(SessionStateError, match="has no savepoint"):
                await block.rollback()


async def test_a_durable_block_refuses_to_nest(real_database: DatabaseInterface) -> None:
    async with real_database.get_session() as session:
        with pytest.raises(RuntimeError, match="durable atomic block cannot be nested"):
            async with session.atomic(durable=True):
                raise AssertionError("entered")
        await session.execute(INSERT, ["a"])
    async with real_database.get_session(autocommit=True) as session, session.atomic(durable=True):
        await session.execute(INSERT, ["b"])
        with pytest.raises(RuntimeError, match="durable"):
            async with session.atomic(durable=True):
                raise AssertionError("entered")
    assert await names(real_database) == ["a", "b"]


async def test_a_block_cannot_be_entered_twice(real_database: DatabaseInterface) -> None:
    async with real_database.get_session() as session:
        block = session.begin_nested()
        async with block:
            with pytest.raises(SessionStateError, match="entered already"):
                await block.__aenter__()
        async with block:
            await session.execute(INSERT, ["a"])
    assert await names(real_database) == ["a"]


async def test_a_block_belongs_to_its_task_and_the_error_names_both(
    real_database: DatabaseInterface,
) -> None:
    async def intrude(call: Any) -> None:
        with pytest.raises(SessionInUseError) as caught:
            await call()
        assert "task 'owner' has a nested block open" in str(caught.value)
        assert "task 'intruder' cannot use it; use a session of its own" in str(caught.value)

    async def own() -> None:
        async with real_database.get_session() as session:
            async with session.begin_nested():
                await session.execute(INSERT, ["a"])
                for call in (
                    lambda: session.execute(INSERT, ["foreign"]),
                    session.commit,
                    session.begin_nested().__aenter__,
                    lambda: intrude_at_once(session.set_rollback, True),
                    lambda: intrude_at_once(session.on_commit, print),
                    lambda: intrude_at_once(session.on_rollback, print),
                ):
                    await asyncio.create_task(intrude(call), name="intruder")
            await asyncio.create_task(session.execute(INSERT, ["b"]))

    async def intrude_at_once(call: Any, *args: Any) -> None:
        call(*args)

    await asyncio.create_task(own(), name="owner")
    assert await names(real_database) == ["a", "b"]


async def test_in_autocommit_mode_a_transaction_belongs_to_its_task_too(
    real_database: DatabaseInterface,
) -> None:
    async with real_database.get_session(autocommit=True) as session:
        async with session.atomic():
            with pytest.raises(SessionInUseError):
                await asyncio.create_task(session.execute(INSERT, ["foreign"]))
            await session.execute(INSERT, ["a"])
        await asyncio.create_task(session.execute(INSERT, ["b"]))
    assert await names(real_database) == ["a", "b"]


async def test_of_two_interleaved_blocks_the_second_is_refused(
    real_database: DatabaseInterface,
) -> None:
    entered, refused = asyncio.Event(), asyncio.Event()

    async def first(session: Any) -> None:
        with contextlib.suppress(ZeroDivisionError):
            async with session.begin_nested():
                await session.execute(INSERT, ["of the first, which fails"])
                entered.set()
                await refused.wait()
                raise ZeroDivisionError

    async def second(session: Any) -> None:
        await entered.wait()
        with pytest.raises(SessionInUseError, match=r"'first'.*'second'"):
            async with session.begin_nested():
                raise AssertionError("entered")
        refused.set()

    async with real_database.get_session() as session:
        await session.execute(INSERT, ["a"])
        await asyncio.gather(
            asyncio.create_task(first(session), name="first"),
            asyncio.create_task(second(session), name="second"),
        )
    assert await names(real_database) == ["a"]
    await whole(real_database)


async def test_leaving_a_block_never_hides_the_error_on_its_way(
    real_database: DatabaseInterface,
) -> None:
    session = await real_database.get_session().begin()
    outer = session.begin_nested()
    with pytest.raises(ZeroDivisionError):
        async with outer:
            await session.execute(INSERT, ["a"])
            await session.begin_nested().__aenter__()
            raise ZeroDivisionError
    await session.close()
    assert await names(real_database) == []
    await whole(real_database)
