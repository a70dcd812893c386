"""Sessions in every order of events: cancelled anywhere, closed anywhere, cut off from the server.

All or nothing is saved, and the pool is whole afterwards, so the commits and the pool are real.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import warnings
from collections.abc import Callable, Coroutine, Iterator
from itertools import count
from typing import Any

import anyio
import pytest
from django.db import DatabaseError, OperationalError
from django.db.transaction import TransactionManagementError

from django_asyncsession import CommitUnknown, DatabaseInterface, Outcome, Session
from tests.faults import CLIENT, RESET, SERVER, Elapsed, cancel_at, outcome_of
from tests.models import User
from tests.sessions import COUNT, INSERT, behind, names, pool, slow, soon, two_rows, whole

pytestmark = pytest.mark.usefixtures("never_frozen")

Operation = Callable[[DatabaseInterface], Coroutine[Any, Any, Any]]


@pytest.fixture
async def one(real_database: DatabaseInterface) -> DatabaseInterface:
    """A database with a pool of one connection, which is open."""
    with pool(real_database, max_size=1):
        await real_database.connect()
    return real_database


async def emptied(db: DatabaseInterface) -> list[str]:
    """The names that were saved, which are deleted, with the pool whole and its connection open."""
    saved = await names(db)
    if saved:
        async with db.get_session(autocommit=True) as session:
            await session.execute("DELETE FROM tests_user")
    await whole(db)
    return saved


def all_or_nothing(saved: list[str]) -> bool:
    """Whether both rows were saved, or none: with those of the step before, if the server was busy
    and did its COMMIT, which had been sent when the step was cancelled, after the names were
    read."""
    return saved in ([], ["a", "b"], ["a", "a", "b", "b"])


# Cancelled at every suspension


async def by_hand(db: DatabaseInterface) -> None:
    session = await db.get_session(timeout=30).begin()
    try:
        await session.add(User(name="a"))
        async with session.atomic():
            await session.run_sync(User.objects.using(db.alias).create, name="b")
        await session.commit()
    finally:
        await session.close()


async def in_autocommit_mode(db: DatabaseInterface) -> None:
    async with db.get_session(autocommit=True) as session, session.atomic():
        await session.execute(INSERT, ["a"])
        async for _ in session.stream("SELECT name FROM tests_user", chunk_size=1):
            await session.execute(INSERT, ["b"])


async def with_a_reset(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        await session.execute(INSERT, ["a"])
        await session.driver_connection()  # so that the connection is reset at the end
        await session.execute(INSERT, ["b"])


@pytest.mark.parametrize("operation", [two_rows, by_hand, in_autocommit_mode, with_a_reset])
async def test_cancelled_at_any_suspension_all_or_nothing_is_saved_and_the_pool_is_whole(
    one: DatabaseInterface, operation: Operation
) -> None:
    saved = []
    for step in count(1):
        attempt = cancel_at(operation(one), {step})
        outcome = await outcome_of(_awaited(attempt))
        saved.append(await emptied(one))
        if attempt.suspensions < step:
            assert outcome is None
            break
        assert isinstance(outcome, asyncio.CancelledError), (step, outcome)
    assert step > 3
    assert all(map(all_or_nothing, saved)), saved
    # Nothing is saved before COMMIT was sent, and everything after.
    assert [bool(rows) for rows in saved] == sorted(bool(rows) for rows in saved)
    assert saved[0] == [] and saved[-1]


@pytest.mark.parametrize("operation", [two_rows, in_autocommit_mode])
async def test_cancelled_twice_it_is_still_a_cancellation_and_all_or_nothing(
    one: DatabaseInterface, operation: Operation
) -> None:
    for first in count(1):
        for second in range(first + 1, first + 5):
            attempt = cancel_at(operation(one), {first, second})
            outcome = await outcome_of(_awaited(attempt))
            assert all_or_nothing(await emptied(one))
            if attempt.suspensions >= first:
                assert isinstance(outcome, asyncio.CancelledError), (first, second, outcome)
        if attempt.suspensions < first:
            break


async def failing(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        session.on_commit(lambda: pytest.fail("a callback of a rolled-back transaction ran"))
        await session.execute(INSERT, ["a"])
        async with session.begin_nested():
            await session.execute(INSERT, ["b"])
            raise ValueError("mine")


async def test_cancelled_while_it_rolls_back_nothing_is_saved(one: DatabaseInterface) -> None:
    for step in count(1):
        attempt = cancel_at(failing(one), {step})
        outcome = await outcome_of(_awaited(attempt))
        assert await emptied(one) == []
        if attempt.suspensions < step:
            assert isinstance(outcome, ValueError)
            break
        assert isinstance(outcome, asyncio.CancelledError), (step, outcome)


async def streaming(db: DatabaseInterface) -> int:
    seen = 0
    async with db.get_session() as session:
        async for _ in session.stream("SELECT name FROM tests_user", chunk_size=2):
            seen += 1
    return seen


async def test_cancelled_in_a_stream_the_next_query_gets_its_own_rows(
    one: DatabaseInterface,
) -> None:
    async with one.get_session() as session:
        await session.execute_many(INSERT, [[f"{n}"] for n in range(7)])
    for step in count(1):
        attempt = cancel_at(streaming(one), {step})
        outcome = await outcome_of(_awaited(attempt))
        async with one.get_session() as session:
            assert await session.fetch_value("SELECT 4711") == 4711
        await whole(one)
        if attempt.suspensions < step:
            assert outcome == 7
            break
        assert isinstance(outcome, asyncio.CancelledError)


async def test_cancelled_in_a_callback_the_data_stays_and_later_callbacks_are_logged(
    one: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    reached, called = asyncio.Event(), []

    async def waits() -> None:
        reached.set()
        await asyncio.sleep(10)

    def later() -> None:
        called.append("later")

    async def request() -> None:
        async with session:
            await session.execute(INSERT, ["a"])
            session.on_commit(waits)
            session.on_commit(later)

    session = one.get_session()
    task = asyncio.create_task(request())
    await reached.wait()
    task.cancel()
    assert isinstance(await outcome_of(task), asyncio.CancelledError)
    assert called == []
    assert "later did not run" in caplog.text
    assert session.outcome is Outcome.COMMITTED
    assert await emptied(one) == ["a"]


async def test_level_cancellation_ends_in_time_and_leaves_the_pool_whole(
    one: DatabaseInterface,
) -> None:
    for delay in (0.0, 0.001, 0.003, 0.006, 0.01, 0.05):

        async def request() -> None:
            async with one.get_session() as session:
                await session.execute(INSERT, ["a"])
                async with session.begin_nested():
                    await session.execute(INSERT, ["b"])
                    await session.fetch_value(slow(one, 1))

        task = asyncio.create_task(request())
        await asyncio.sleep(delay)
        with Elapsed() as took:
            while not task.done():
                task.cancel()
                await asyncio.sleep(0)
        assert task.cancelled()
        assert took.seconds < 2
        assert await emptied(one) == []


async def test_a_cancelled_scope_of_anyio_ends_a_session(one: DatabaseInterface) -> None:
    with Elapsed() as took, anyio.move_on_after(0.1) as scope:
        async with one.get_session() as session:
            await session.execute(INSERT, ["a"])
            try:
                await session.fetch_value(slow(one, 3))
            finally:
                await session.rollback()
    assert scope.cancelled_caught
    assert took.seconds < 2
    assert await emptied(one) == []


async def test_a_lock_held_by_a_cancelled_task_is_free_at_once(
    real_database: DatabaseInterface,
) -> None:
    async with real_database.get_session() as session:
        await session.execute(INSERT, ["a"])
    locked = asyncio.Event()

    async def hold() -> None:
        async with real_database.get_session() as session:
            await session.execute("UPDATE tests_user SET level = 2")
            locked.set()
            await session.fetch_value(slow(real_database, 5))

    task = asyncio.create_task(hold())
    await locked.wait()
    await asyncio.sleep(0.05)
    task.cancel()
    assert isinstance(await outcome_of(task), asyncio.CancelledError)
    async with asyncio.timeout(3), real_database.get_session() as session:
        await session.execute("UPDATE tests_user SET level = 3")
    await whole(real_database)


async def _awaited(attempt: cancel_at[Any]) -> Any:
    return await attempt


# Coroutines that are closed, or forgotten, half way


async def in_a_query(session: Session, db: DatabaseInterface) -> None:
    async with session:
        await session.execute(INSERT, ["a"])
        await session.fetch_value(slow(db, 2))


async def between_queries(session: Session, db: DatabaseInterface) -> None:
    async with session:
        await session.execute(INSERT, ["a"])
        await asyncio.sleep(10)


async def in_a_block(session: Session, db: DatabaseInterface) -> None:
    async with session, session.begin_nested(), session.atomic():
        session.on_rollback(lambda: asyncio.sleep(1))
        await session.execute(INSERT, ["a"])
        await asyncio.sleep(10)


async def in_sync_code(session: Session, db: DatabaseInterface) -> None:
    from django_asyncsession import bridge

    def sync() -> None:
        User.objects.using(db.alias).create(name="a")
        try:
            bridge.await_(asyncio.sleep(10))
        finally:
            with contextlib.suppress(DatabaseError):
                User.objects.using(db.alias).create(name="b")

    async with session:
        await session.run_sync(sync)


async def in_a_stream(session: Session, db: DatabaseInterface) -> None:
    async with session:
        await session.execute(INSERT, ["a"])
        async for _ in session.stream("SELECT 1"):
            await asyncio.sleep(10)


async def in_autocommit_atomic(session: Session, db: DatabaseInterface) -> None:
    async with db.get_session(autocommit=True) as plain, plain.atomic():
        await plain.execute(INSERT, ["a"])
        await asyncio.sleep(10)


async def in_a_transaction(session: Session, db: DatabaseInterface) -> None:
    async with db.get_transaction() as transaction:
        await transaction.execute(INSERT, ["a"])
        await asyncio.sleep(10)


async def in_finally(session: Session, db: DatabaseInterface) -> None:
    await session.begin()
    try:
        await session.execute(INSERT, ["a"])
        await asyncio.sleep(10)
    finally:
        await session.close()


HALF_WAY = [
    in_a_query, between_queries, in_a_block, in_sync_code, in_a_stream, in_autocommit_atomic,
    in_a_transaction, in_finally,
]  # fmt: skip


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize("half_way", HALF_WAY)
async def test_a_coroutine_closed_half_way_rolls_back_without_waiting(
    one: DatabaseInterface, half_way: Any, forgotten: bool
) -> None:
    coroutine = half_way(one.get_session(), one)
    with _quiet():
        await _drive(coroutine)
        if forgotten:
            del coroutine
        else:
            coroutine.close()
        assert await soon(lambda: one.stats()["pool_size"] == one.stats()["pool_available"])
        gc.collect()
    assert await emptied(one) == []


async def test_a_coroutine_closed_while_it_waits_for_its_turn(one: DatabaseInterface) -> None:
    async with one.get_session() as session:
        running = asyncio.create_task(session.fetch_value(slow(one)))
        await asyncio.sleep(0.02)
        waiting = session.execute(INSERT, ["never"])
        waiting.send(None)
        waiting.close()
        await running
        await session.execute(INSERT, ["a"])
    assert await emptied(one) == ["a"]


async def _drive(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run the coroutine by hand until it waits for long: it sleeps, or runs the slow query."""
    pending: set[Any] = set()
    while not pending:
        future = coroutine.send(None)
        if future is None:
            await asyncio.sleep(0)
        else:
            # As a task does when it has taken notice.
            future._asyncio_future_blocking = False
            _, pending = await asyncio.wait([future], timeout=0.08)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield


# Cut off from the server


def on_commit_reply(action: Any) -> Callable[[str, bytes], Any]:
    """A hook that does something to what the server says after COMMIT was sent."""
    sent = False

    def hook(who: str, data: bytes) -> Any:
        nonlocal sent
        if who == CLIENT and b"COMMIT" in data.upper():
            sent = True
        elif who == SERVER and sent:
            return action() if callable(action) else action
        return None

    return hook


async def test_a_commit_that_nobody_acknowledged_is_unknown_and_says_so(
    real_database: DatabaseInterface,
) -> None:
    called: list[str] = []
    async with behind(real_database) as (proxy, far):
        session = await far.get_session().begin()
        await session.execute(INSERT, ["a"])
        session.on_commit(lambda: called.append("commit"))
        session.on_rollback(lambda: called.append("rollback"))
        proxy.hook = on_commit_reply(RESET)
        with pytest.raises(CommitUnknown, match="was lost while COMMIT was on its way") as caught:
            await session.commit()
        assert isinstance(caught.value, OperationalError)
        assert caught.value.__cause__ is not None
        proxy.hook = None
        assert session.closed
        assert session.outcome is Outcome.UNKNOWN
        await whole(far)
        assert far.stats()["returns_bad"] == 1
    assert called == []
    assert await names(real_database) == ["a"]


async def test_a_commit_cancelled_on_its_way_is_a_cancellation_with_an_unknown_outcome(
    real_database: DatabaseInterface,
) -> None:
    called: list[str] = []
    async with behind(real_database) as (proxy, far):
        session = await far.get_session().begin()
        await session.execute(INSERT, ["a"])
        session.on_commit(lambda: called.append("commit"))
        held = asyncio.Event()

        async def hold() -> None:
            held.set()
            await asyncio.sleep(0.5)

        proxy.hook = on_commit_reply(hold)
        task = asyncio.create_task(session.commit())
        await held.wait()
        with Elapsed() as took:
            task.cancel()
            assert isinstance(await outcome_of(task), asyncio.CancelledError)
        assert took.seconds < 2
        assert session.closed
        assert session.outcome is Outcome.UNKNOWN
        proxy.hook = None
        await whole(far)
    assert called == []
    assert await names(real_database) == ["a"]


async def test_a_connection_lost_between_two_statements_is_never_replaced_silently(
    real_database: DatabaseInterface,
) -> None:
    async with behind(real_database) as (proxy, far):
        session = await far.get_session().begin()
        await session.execute(INSERT, ["a"])
        proxy.reset()
        with pytest.raises(DatabaseError):
            await session.execute(INSERT, ["b"])
        with pytest.raises(DatabaseError):
            await session.execute(INSERT, ["c"])
        with pytest.raises(TransactionManagementError, match="because its connection was lost"):
            await session.commit()
        assert session.outcome is Outcome.ROLLED_BACK
        await whole(far)
    assert await names(real_database) == []


async def test_a_frozen_network_does_not_hold_up_a_rollback(
    real_database: DatabaseInterface,
) -> None:
    async with behind(real_database) as (proxy, far):
        session = await far.get_session().begin()
        await session.execute(INSERT, ["a"])
        proxy.freeze()
        with Elapsed() as took, contextlib.suppress(DatabaseError):
            await session.rollback()
        assert took.seconds < 3.5
        assert session.closed
        with Elapsed() as took, pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3), far.get_session() as other:
                await other.execute(INSERT, ["b"])
        assert took.seconds < 2.5
        proxy.thaw()
        await whole(far)
    assert await names(real_database) == []


async def test_a_backend_ended_by_the_administrator(real_database: DatabaseInterface) -> None:
    if real_database.vendor != "postgresql":
        pytest.skip("pg_terminate_backend is PostgreSQL's")
    session = await real_database.get_session().begin()
    pid = await session.fetch_value("SELECT pg_backend_pid()")
    await session.execute(INSERT, ["a"])
    async with real_database.get_session() as other:
        await other.execute("SELECT pg_terminate_backend(%s)", [pid])
    with pytest.raises(OperationalError, match="terminating connection"):
        await session.execute(INSERT, ["b"])
    with pytest.raises(DatabaseError):
        await session.execute(INSERT, ["c"])
    with pytest.raises(TransactionManagementError, match="because its connection was lost"):
        await session.commit()
    assert session.closed
    await whole(real_database)
    assert await names(real_database) == []


async def test_a_transaction_begun_by_sql_in_autocommit_mode_is_rolled_back_and_told(
    one: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    async with one.get_session(autocommit=True) as session:
        await session.execute_script("BEGIN; INSERT INTO tests_user (name, level) VALUES ('a', 1)")
        assert await session.fetch_value(COUNT) == 0
    assert "begun by SQL" in caplog.text
    assert await emptied(one) == []
    assert one.stats()["returns_bad"] == 0
