"""Transaction: begin and end, savepoints by name, options, and what is never saved.

On real connections of the pools.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from django.db import DatabaseError, IntegrityError, OperationalError, ProgrammingError, connections
from django.db import transaction as django_transaction
from django.db.transaction import TransactionManagementError

from django_asyncsession import (
    DatabaseInterface,
    Outcome,
    QueryTimeout,
    SessionClosedError,
    SessionStateError,
    State,
    databases,
)
from tests.faults import Elapsed
from tests.models import User
from tests.sessions import COUNT, INSERT, names, pool, slow, whole

BAD = "SELECT * FROM no_such_table"


# The low-level object


async def test_async_with_begins_commits_and_closes(real_database: DatabaseInterface) -> None:
    async with real_database.get_transaction() as transaction:
        assert transaction.state is State.OPEN
        assert await transaction.execute(INSERT, ["a"]) == 1
        result = await transaction.cursor("SELECT name FROM tests_user")
        assert [row.name async for row in result] == ["a"]
    assert transaction.state is State.CLOSED
    assert transaction.outcome is Outcome.COMMITTED
    assert await names(real_database) == ["a"]
    await whole(real_database)


async def test_an_error_rolls_back_and_passes(real_database: DatabaseInterface) -> None:
    with pytest.raises(ZeroDivisionError):
        async with real_database.get_transaction() as transaction:
            await transaction.execute(INSERT, ["a"])
            raise ZeroDivisionError
    assert transaction.outcome is Outcome.ROLLED_BACK
    assert await names(real_database) == []
    await whole(real_database)


async def test_states_are_checked_and_the_error_names_the_remedy() -> None:
    transaction = databases["default"].get_transaction()
    for call in (transaction.execute("SELECT 1"), transaction.commit(), transaction.rollback()):
        with pytest.raises(SessionStateError, match=r"has not begun; call begin\(\)"):
            await call
    assert await transaction.begin() is transaction
    with pytest.raises(SessionStateError, match="has begun already; nest with create_savepoint"):
        await transaction.begin()
    await transaction.commit()
    with pytest.raises(SessionClosedError, match="has ended; make a new one"):
        await transaction.begin()
    for call in (transaction.execute("SELECT 1"), transaction.commit(), transaction.rollback()):
        with pytest.raises(SessionClosedError, match="is closed; make a new one"):
            await call
    await transaction.close()
    unused = databases["default"].get_transaction()
    await unused.close()
    assert unused.state is State.CLOSED


async def test_it_may_be_ended_inside_async_with(real_database: DatabaseInterface) -> None:
    async with real_database.get_transaction() as transaction:
        await transaction.execute(INSERT, ["a"])
        await transaction.commit()
    async with real_database.get_transaction() as transaction:
        await transaction.execute(INSERT, ["b"])
        await transaction.rollback()
    assert await names(real_database) == ["a"]


async def test_a_refused_commit_at_the_end_loses_no_connection(
    real_database: DatabaseInterface,
) -> None:
    session = real_database.get_session()
    with pytest.raises(SessionStateError, match="inside a nested block"):
        async with session:
            await session.execute(INSERT, ["a"])
            block = session.begin_nested()
            await block.__aenter__()
    assert await names(real_database) == []
    await whole(real_database)


# Savepoints by name


async def test_savepoints_by_name(real_database: DatabaseInterface) -> None:
    async with real_database.get_transaction() as transaction:
        await transaction.execute(INSERT, ["a"])
        await transaction.create_savepoint("one")
        await transaction.execute(INSERT, ["b"])
        await transaction.create_savepoint("two")
        await transaction.execute(INSERT, ["c"])
        await transaction.rollback("two")
        await transaction.execute(INSERT, ["d"])
        await transaction.release_savepoint("two")
        await transaction.rollback("one")
        await transaction.execute(INSERT, ["e"])
    assert await names(real_database) == ["a", "e"]


@pytest.mark.parametrize("name", ["Mixed Case", "a-b", "select", "a;b", "ü" * 31, "x" * 63])
async def test_savepoint_names_are_quoted(real_database: DatabaseInterface, name: str) -> None:
    async with real_database.get_session() as session:
        assert session.transaction is not None
        await session.transaction.create_savepoint(name)
        await session.execute(INSERT, ["a"])
        await session.rollback(name)
        await session.transaction.release_savepoint(name)
        async with session.begin_nested(name) as savepoint:
            await session.execute(INSERT, ["b"])
            await session.rollback(name)
            await session.execute(INSERT, ["c"])
            await session.rollback(savepoint)
            await session.execute(INSERT, ["d"])
    assert await names(real_database) == ["d"]


@pytest.mark.parametrize("name", ['a"b', "a'; DROP TABLE tests_user; --", "a`b", "", "x" * 64])
async def test_a_name_that_cannot_be_quoted_is_refused_unsent(
    real_database: DatabaseInterface, name: str
) -> None:
    async with real_database.get_session() as session:
        transaction = session.transaction
        assert transaction is not None
        for call in (
            transaction.create_savepoint,
            transaction.release_savepoint,
            transaction.rollback,
            session.rollback,
        ):
            with pytest.raises(ValueError, match="cannot name a savepoint"):
                await call(name)
        with pytest.raises(ValueError, match="cannot name a savepoint"):
            session.begin_nested(name)
    assert real_database.stats()["requests_num"] == 0


async def test_no_such_savepoint_is_the_databases_error(real_database: DatabaseInterface) -> None:
    session = await real_database.get_session().begin()
    await session.execute(INSERT, ["a"])
    with pytest.raises(DatabaseError):
        await session.rollback("nope")
    await session.close()
    await whole(real_database)


async def test_a_rollback_to_a_savepoint_revives_a_failed_transaction(
    real_database: DatabaseInterface,
) -> None:
    async with real_database.get_transaction() as transaction:
        await transaction.execute(INSERT, ["a"])
        await transaction.create_savepoint("sp")
        with pytest.raises(
            ProgrammingError if real_database.vendor != "sqlite" else OperationalError
        ):
            await transaction.execute(BAD)
        with pytest.raises(TransactionManagementError):
            await transaction.execute("SELECT 1")
        await transaction.rollback("sp")
        await transaction.execute(INSERT, ["b"])
    assert await names(real_database) == ["a", "b"]


async def test_a_savepoint_outside_the_open_block_cannot_be_rolled_back_to(
    real_database: DatabaseInterface,
) -> None:
    async with real_database.get_session() as session:
        assert session.transaction is not None
        await session.transaction.create_savepoint("outer")
        async with session.begin_nested("block"), session.begin_nested():
            with pytest.raises(SessionStateError, match="outside the open nested block"):
                await session.rollback("outer")
            with pytest.raises(SessionStateError, match="not the innermost"):
                await session.rollback("block")
            await session.execute(INSERT, ["a"])
        await session.rollback("outer")
        await session.execute(INSERT, ["b"])
    assert await names(real_database) == ["b"]


# Options


async def test_options_hold_for_one_transaction_and_never_stick(
    real_database: DatabaseInterface,
) -> None:
    if real_database.vendor != "postgresql":
        pytest.skip("SHOW is PostgreSQL's")
    shown = {
        "transaction_isolation": "serializable",
        "transaction_read_only": "on",
        "transaction_deferrable": "on",
        "statement_timeout": "1500ms",
        "lock_timeout": "1s",
        "idle_in_transaction_session_timeout": "1min",
    }
    with pool(real_database, max_size=1):
        async with real_database.get_session() as session:
            before = {name: await session.fetch_value(f"SHOW {name}") for name in shown}
            pid = await session.fetch_value("SELECT pg_backend_pid()")
    options: dict[str, Any] = {
        "isolation": "SERIALIZABLE", "read_only": True, "deferrable": True,
        "timeout": 1.5, "lock_timeout": 1, "idle_timeout": 60,
    }  # fmt: skip
    async with real_database.get_session(**options) as session:
        for _ in range(2):
            assert {name: await session.fetch_value(f"SHOW {name}") for name in shown} == shown
            await session.commit()
    async with real_database.get_session() as session:
        assert {name: await session.fetch_value(f"SHOW {name}") for name in shown} == before
        assert await session.fetch_value("SELECT pg_backend_pid()") == pid


async def test_a_read_only_transaction_refuses_writes_and_the_next_one_does_not(
    real_database: DatabaseInterface,
) -> None:
    with pool(real_database, max_size=1):
        await real_database.connect()
    session = await real_database.get_session(read_only=True).begin()
    assert await session.fetch_value(COUNT) == 0
    with pytest.raises(DatabaseError, match=r"(?i)read.?only"):
        await session.execute(INSERT, ["a"])
    await session.close()
    async with real_database.get_session() as plain:
        await plain.execute(INSERT, ["b"])
    assert await names(real_database) == ["b"]


@pytest.mark.parametrize("autocommit", [False, True])
async def test_a_statement_that_takes_too_long_raises_query_timeout(
    real_database: DatabaseInterface, autocommit: bool
) -> None:
    with pool(real_database, max_size=1):
        await real_database.connect()
    session = await real_database.get_session(timeout=0.2, autocommit=autocommit).begin()
    with (
        Elapsed() as took,
        pytest.raises(QueryTimeout, match=f"session of {real_database.alias!r}") as caught,
    ):
        await session.fetch_value(slow(real_database, 3))
    assert 0.1 < took.seconds < 1.5
    assert isinstance(caught.value, OperationalError)
    assert caught.value.__cause__ is not None
    assert not isinstance(caught.value.__cause__, DatabaseError)
    await session.close()
    async with real_database.get_session() as plain:
        await plain.fetch_value(slow(real_database, 0.4))
    await whole(real_database)


async def test_a_wait_for_a_lock_that_takes_too_long_raises_query_timeout(
    real_database: DatabaseInterface,
) -> None:
    async with (
        real_database.get_session() as holder,
        real_database.get_session(lock_timeout=1) as waiter,
    ):
        await holder.execute(INSERT, ["a"])
        await holder.commit()
        await holder.execute("UPDATE tests_user SET level = 2")
        with pytest.raises(QueryTimeout):
            async with (
                waiter.begin_nested()
                if real_database.vendor == "postgresql"
                else contextlib.nullcontext()
            ):
                await waiter.execute("UPDATE tests_user SET level = 3")
        await waiter.rollback()
    await whole(real_database)


async def test_the_servers_reason_is_told_when_it_ends_an_idle_transaction(
    real_database: DatabaseInterface,
) -> None:
    if real_database.vendor != "postgresql":
        pytest.skip("MySQL and SQLite have words of their own, in their own tests")
    session = await real_database.get_session(idle_timeout=0.1).begin()
    await session.execute(INSERT, ["a"])
    await asyncio.sleep(0.4)
    with pytest.raises(DatabaseError, match="due to idle-in-transaction timeout"):
        await session.execute(INSERT, ["b"])
    with pytest.raises((TransactionManagementError, OperationalError)):
        await session.commit()
    assert session.closed
    assert session.outcome is Outcome.ROLLED_BACK
    assert await names(real_database) == []
    await whole(real_database)


# What was swallowed is never saved


async def test_a_swallowed_error_is_told_at_commit(real_database: DatabaseInterface) -> None:
    session = await real_database.get_session().begin()
    await session.execute(INSERT, ["a"])
    with contextlib.suppress(DatabaseError):
        await session.execute(BAD)
    with pytest.raises(TransactionManagementError):
        await session.execute(INSERT, ["b"])
    with pytest.raises(
        TransactionManagementError, match="an error inside it was swallowed"
    ) as caught:
        await session.commit()
    assert isinstance(caught.value.__cause__, DatabaseError)
    assert session.closed
    assert session.outcome is Outcome.ROLLED_BACK
    assert await names(real_database) == []
    assert real_database.stats()["returns_bad"] == 0
    await whole(real_database)


async def test_a_swallowed_error_is_told_at_the_end_of_async_with(
    real_database: DatabaseInterface,
) -> None:
    with pytest.raises(TransactionManagementError, match="swallowed"):
        async with real_database.get_session() as session:
            await session.execute(INSERT, ["a"])
            with contextlib.suppress(DatabaseError):
                await session.execute(BAD)
    assert await names(real_database) == []


async def test_an_error_swallowed_in_sync_code_is_told_too(
    real_database: DatabaseInterface,
) -> None:
    if real_database.vendor != "postgresql":
        pytest.skip("other databases take back the failed statement alone, as sync Django has it")

    def swallow() -> None:
        with (
            contextlib.suppress(DatabaseError),
            connections[real_database.alias].cursor() as cursor,
        ):
            cursor.execute(BAD)

    with pytest.raises(TransactionManagementError, match="swallowed"):
        async with real_database.get_session() as session:
            await session.execute(INSERT, ["a"])
            await session.run_sync(swallow)
    assert await names(real_database) == []


async def test_a_flag_taken_back_does_not_hide_a_failed_transaction(
    real_database: DatabaseInterface,
) -> None:
    if real_database.vendor != "postgresql":
        pytest.skip("elsewhere the failed statement alone is taken back")
    with pytest.raises(TransactionManagementError, match="swallowed"):
        async with real_database.get_session() as session:
            await session.execute(INSERT, ["a"])
            with contextlib.suppress(DatabaseError):
                await session.execute(BAD)
            session.set_rollback(False)
    assert await names(real_database) == []
    await whole(real_database)


@pytest.mark.parametrize("where", ["in the database", "elsewhere"])
async def test_a_swallowed_cancellation_is_told_at_commit(
    real_database: DatabaseInterface, where: str
) -> None:
    told: list[str] = []
    session, waits = real_database.get_session(), asyncio.Event()

    async def swallow() -> None:
        async with session:
            session.on_rollback(lambda: told.append("rolled back"))
            await session.execute(INSERT, ["a"])
            with contextlib.suppress(asyncio.CancelledError):
                waits.set()
                await (
                    asyncio.sleep(5)
                    if where == "elsewhere"
                    else session.execute(slow(real_database, 2))
                )

    task = asyncio.create_task(swallow())
    await waits.wait()
    task.cancel()
    with pytest.raises(TransactionManagementError, match="cancellation inside it was swallowed"):
        await task
    assert session.outcome is Outcome.ROLLED_BACK
    assert told == ["rolled back"]
    assert await names(real_database) == []
    await whole(real_database)


async def test_a_session_in_a_cancelled_task_can_still_save(
    real_database: DatabaseInterface,
) -> None:
    async def audit() -> None:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            async with real_database.get_session() as session:
                await session.execute(INSERT, ["audit"])
            raise

    task = asyncio.create_task(audit())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await names(real_database) == ["audit"]


async def test_a_timeout_inside_that_hit_no_statement_does_not_spoil_the_transaction(
    real_database: DatabaseInterface,
) -> None:
    async with real_database.get_session() as session:
        await session.execute(INSERT, ["a"])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.sleep(1)
        await session.execute(INSERT, ["b"])
    assert await names(real_database) == ["a", "b"]


async def test_a_timeout_around_a_session_rolls_back(real_database: DatabaseInterface) -> None:
    with Elapsed() as took, pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2), real_database.get_session() as session:
            await session.execute(INSERT, ["a"])
            await session.fetch_value(slow(real_database, 5))
    assert took.seconds < 2.5
    assert session.closed
    assert await names(real_database) == []
    await whole(real_database)


@pytest.mark.parametrize("sql", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize("later", [False, True])
async def test_raw_commit_and_rollback_are_told_and_the_connection_is_dropped(
    real_database: DatabaseInterface, sql: str, later: bool
) -> None:
    called: list[str] = []
    with pytest.raises(TransactionManagementError, match="was ended by SQL inside it"):
        async with real_database.get_session() as session:
            session.on_commit(lambda: called.append("hook"))
            await session.execute(INSERT, ["a"])
            await session.execute(sql)
            if later:
                await session.execute(INSERT, ["b"])
    assert called == []
    assert session.outcome is Outcome.UNKNOWN
    assert await names(real_database) == (["a"] if sql == "COMMIT" else [])
    await whole(real_database)
    assert real_database.stats()["returns_bad"] == 1


async def test_a_raw_commit_inside_a_nested_block_is_told(real_database: DatabaseInterface) -> None:
    with pytest.raises(DatabaseError):
        async with real_database.get_session() as session, session.begin_nested():
            await session.execute(INSERT, ["a"])
            await session.execute("ROLLBACK")
            await session.execute(INSERT, ["b"])
    assert await names(real_database) == []
    await whole(real_database)


async def test_a_deferred_constraint_fails_at_commit_with_its_own_error(
    real_database: DatabaseInterface,
) -> None:
    if real_database.vendor == "mysql":
        pytest.skip("MySQL checks foreign keys at once")
    called: list[str] = []
    with pytest.raises(IntegrityError) as caught:
        async with real_database.get_session() as session:
            session.on_commit(lambda: called.append("commit"))
            session.on_rollback(lambda: called.append("rollback"))
            await session.execute("INSERT INTO tests_tag (name, owner_id) VALUES ('orphan', 4711)")
    assert caught.value.__cause__ is not None
    assert called == ["rollback"]
    assert session.outcome is Outcome.ROLLED_BACK
    assert real_database.stats()["returns_bad"] == 0
    await whole(real_database)


# The rollback flag


async def test_the_rollback_flag_rolls_back_without_an_error(
    real_database: DatabaseInterface,
) -> None:
    called: list[str] = []
    async with real_database.get_session() as session:
        session.on_commit(lambda: called.append("commit"))
        session.on_rollback(lambda: called.append("rollback"))
        assert session.get_rollback() is False
        await session.execute(INSERT, ["a"])
        session.set_rollback(True)
        assert session.get_rollback() is True
        with pytest.raises(TransactionManagementError):
            await session.execute(INSERT, ["b"])
    assert called == ["rollback"]
    assert session.outcome is Outcome.ROLLED_BACK
    async with real_database.get_session() as session:
        session.set_rollback(True)
        session.set_rollback(False)
        await session.execute(INSERT, ["c"])
    async with real_database.get_session() as session:
        session.set_rollback(True)
        assert session.get_rollback() is True
    assert session.outcome is Outcome.ROLLED_BACK
    assert await names(real_database) == ["c"]
    await whole(real_database)


async def test_djangos_rollback_flag_in_sync_code_counts_as_the_sessions(
    real_database: DatabaseInterface,
) -> None:
    def wants_rollback() -> None:
        User.objects.using(real_database.alias).create(name="lost", level=1)
        django_transaction.set_rollback(True, using=real_database.alias)

    async with real_database.get_session() as session:
        await session.run_sync(wants_rollback)
    assert session.outcome is Outcome.ROLLED_BACK
    assert await names(real_database) == []


async def test_djangos_rollback_flag_of_an_inner_block_excuses_no_swallowed_error(
    real_database: DatabaseInterface,
) -> None:
    def swallows() -> None:
        with django_transaction.atomic(using=real_database.alias):
            django_transaction.set_rollback(True, using=real_database.alias)
        with (
            contextlib.suppress(ZeroDivisionError),
            django_transaction.atomic(using=real_database.alias, savepoint=False),
        ):
            raise ZeroDivisionError

    with pytest.raises(TransactionManagementError, match="was swallowed"):
        async with real_database.get_session() as session:
            await session.run_sync(swallows)
