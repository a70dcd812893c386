"""Tasks that share a session: they queue, first come first served, and never freeze the loop.

On real connections of the pools: how often one is taken, and what is committed, are the point.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import DatabaseError, InterfaceError, connections

from django_asyncsession import (
    DatabaseInterface,
    Outcome,
    Session,
    SessionClosedError,
    SessionInUseError,
    SessionStateError,
    WrongLoopError,
    bridge,
)
from django_asyncsession.transactions.checkout import check_loop
from django_asyncsession.transactions.turn import Turn, inside
from tests.faults import Elapsed, LoopProbe, outcome_of, watchdog
from tests.models import User
from tests.sessions import COUNT, INSERT, names, pool, slow, whole


@pytest.fixture(autouse=True)
def _never_frozen() -> Iterator[None]:
    with watchdog(60):
        yield


# The queue alone


@contextlib.asynccontextmanager
async def taken(turn: Turn) -> AsyncIterator[None]:
    await turn.enter()
    try:
        yield
    finally:
        turn.leave()


async def test_turns_are_given_in_the_order_of_asking() -> None:
    turn, order = Turn("default"), []

    async def take(name: str) -> None:
        async with taken(turn):
            await asyncio.sleep(0)
            order.append(name)

    await asyncio.gather(*(take(name) for name in "abcde"))
    assert order == list("abcde")
    assert turn.task is None


async def test_nobody_comes_between_the_one_that_leaves_and_the_next_that_waits() -> None:
    turn, order = Turn("default"), []

    async def take(name: str) -> None:
        async with taken(turn):
            order.append(name)

    async with taken(turn):
        waiting = asyncio.create_task(take("first"))
        await asyncio.sleep(0)
    late = asyncio.create_task(take("late"))
    assert not turn.take(late)
    await asyncio.gather(waiting, late)
    assert order == ["first", "late"]


async def test_the_task_that_has_the_turn_may_come_again() -> None:
    turn = Turn("default")
    async with taken(turn), taken(turn):
        async with taken(turn):
            assert turn.task is asyncio.current_task()
        assert turn.task is asyncio.current_task()
    assert turn.task is None


async def test_a_cancelled_waiter_hands_the_turn_on() -> None:
    turn, order = Turn("default"), []

    async def take(name: str) -> None:
        async with taken(turn):
            order.append(name)

    async with taken(turn):
        waiters = [asyncio.create_task(take(name)) for name in "abc"]
        await asyncio.sleep(0)
        waiters[0].cancel()
    waiters[1].cancel()
    await asyncio.wait(waiters)
    assert order == ["c"]
    assert turn.task is None


async def test_a_child_task_inside_the_turn_is_refused_instead_of_waiting_for_ever() -> None:
    turn = Turn("default")

    async def take() -> None:
        async with taken(turn):
            raise AssertionError("entered")

    async with taken(turn):
        inside.set((turn.mark,))
        child = asyncio.create_task(take(), name="child")
        with pytest.raises(SessionInUseError, match="task 'child' uses the session of 'default'"):
            await child


def test_without_a_loop_or_in_another_one_the_error_names_both() -> None:
    loop = asyncio.new_event_loop()
    try:
        words = r"made at x\.py belongs to the stopped event loop .*thread without an event loop"
        with pytest.raises(WrongLoopError, match=words):
            check_loop(loop, "default", "x.py")
    finally:
        loop.close()
    check_loop(None, "default", "x.py")


# On real servers


async def test_two_tasks_on_one_session_queue_for_it(real_database: DatabaseInterface) -> None:
    async def attempt() -> float:
        async with real_database.get_session() as session:
            async with LoopProbe() as probe, asyncio.timeout(8):
                first, second = await asyncio.gather(
                    session.fetch_all(slow(real_database)), session.fetch_value("SELECT 2")
                )
            assert len(first) == 1 and second == 2
            return probe.worst

    assert min([await attempt() for _ in range(3)]) < 0.05


async def test_a_hundred_tasks_on_one_session_all_get_their_own_answer(
    real_database: DatabaseInterface,
) -> None:
    async with real_database.get_session() as session:
        rows = await asyncio.gather(
            *(session.fetch_value("SELECT %s + 0", [n]) for n in range(100)),
            *(session.run_sync(User.objects.using(real_database.alias).count) for _ in range(20)),
        )
    assert rows == [*range(100), *[0] * 20]


async def test_who_comes_after_a_commit_goes_on_in_the_next_transaction(
    real_database: DatabaseInterface,
) -> None:
    async with real_database.get_session() as session:
        await asyncio.gather(
            session.execute(INSERT, ["a"]),
            session.commit(),
            session.execute(INSERT, ["b"]),
            session.rollback(),
            session.execute(INSERT, ["c"]),
            session.commit(),
            session.commit(),
        )
    assert await names(real_database) == ["a", "c"]
    await whole(real_database)


@pytest.mark.parametrize("error", [None, ZeroDivisionError()])
async def test_in_autocommit_mode_who_comes_while_a_transaction_ends_takes_a_connection_of_its_own(
    real_database: DatabaseInterface, error: Exception | None
) -> None:
    if real_database.vendor == "sqlite":
        pytest.skip("on SQLite another writer has to wait anyway")
    ready = asyncio.Event()

    async def transaction() -> None:
        async with session.atomic():
            await session.execute(INSERT, ["a"])
            ready.set()
            if error is not None:
                raise error

    async def others() -> None:
        await ready.wait()
        for n in range(5):
            with contextlib.suppress(SessionInUseError):
                await session.execute(INSERT, [f"b{n}"])
            await asyncio.sleep(0)

    async with real_database.get_session(autocommit=True) as session:
        await asyncio.gather(transaction(), others(), others(), return_exceptions=True)
        assert not session.in_transaction
        await session.execute(INSERT, ["c"])
        await whole(real_database)
    saved = await names(real_database)
    assert ("a" in saved) is (error is None)
    assert "c" in saved and "b4" in saved


async def test_closing_waits_for_a_commit_on_its_way(real_database: DatabaseInterface) -> None:
    session = await real_database.get_session().begin()
    await session.execute(INSERT, ["a"])
    committing = asyncio.create_task(session.commit())
    await asyncio.sleep(0)
    await session.close()
    await committing
    assert session.outcome is Outcome.COMMITTED
    assert await names(real_database) == ["a"]
    await whole(real_database)


async def test_a_stream_dropped_while_another_task_has_a_block_open_ends_without_a_word(
    real_database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    async with real_database.get_session() as session:
        await session.execute_many(INSERT, [[f"{n}"] for n in range(50)])
        async for _ in session.stream("SELECT name FROM tests_user", chunk_size=5):
            break
        async with session.begin_nested():
            await asyncio.sleep(0.02)
            await session.execute(INSERT, ["last"])
        assert await session.fetch_value(COUNT) == 51
    assert caplog.text == ""
    await whole(real_database)


async def test_a_session_used_inside_its_own_sync_call(real_database: DatabaseInterface) -> None:
    def outer(depth: int) -> int:
        if depth == 0:
            return int(bridge.await_(session.fetch_value(COUNT)))
        User.objects.using(real_database.alias).create(name=f"{depth}")
        return int(bridge.await_(session.run_sync(outer, depth - 1)))

    async with real_database.get_session() as session:
        assert await session.run_sync(outer, 10) == 10


@pytest.mark.parametrize("end", [Session.commit, Session.rollback])
async def test_ending_a_session_inside_its_own_sync_call_is_refused(
    real_database: DatabaseInterface, end: Any
) -> None:
    def ends() -> None:
        User.objects.using(real_database.alias).create(name="a")
        with pytest.raises(SessionStateError, match=rf"{end.__name__}\(\) inside sync code"):
            bridge.await_(end(session))
        User.objects.using(real_database.alias).create(name="b")

    async with real_database.get_session() as session:
        await session.run_sync(ends)
    assert await names(real_database) == ["a", "b"]


async def test_a_child_task_inside_a_sync_call_is_refused_and_nothing_freezes(
    real_database: DatabaseInterface,
) -> None:
    def gathers() -> Any:
        async def both() -> Any:
            return await asyncio.gather(
                session.execute("SELECT 1"), session.execute("SELECT 2"), return_exceptions=True
            )

        return bridge.await_(both())

    async with asyncio.timeout(5), real_database.get_session() as session:
        await session.execute("SELECT 1")
        first, second = await session.run_sync(gathers)
        assert isinstance(first, SessionInUseError) and isinstance(second, SessionInUseError)
        assert "inside a call that task" in str(first)
        await session.execute(INSERT, ["a"])
    assert await names(real_database) == ["a"]


async def test_a_background_task_begun_in_a_sync_call_may_use_the_session_later(
    real_database: DatabaseInterface,
) -> None:
    tasks: list[asyncio.Task[Any]] = []

    async def later() -> None:
        await asyncio.sleep(0.01)
        await session.execute(INSERT, ["later"])

    async with real_database.get_session() as session:
        await session.run_sync(lambda: tasks.append(asyncio.ensure_future(later())))
        await tasks[0]
    assert await names(real_database) == ["later"]


# Ends and other tasks


async def test_the_late_statement_of_a_gather_that_failed_is_refused(
    real_database: DatabaseInterface,
) -> None:
    ended = asyncio.Event()

    async def fails() -> None:
        raise ZeroDivisionError

    ended = asyncio.Event()

    async def late() -> None:
        await ended.wait()
        await session.execute(INSERT, ["late"])

    late_task = asyncio.create_task(late())
    with pytest.raises(ZeroDivisionError):
        async with real_database.get_session() as session:
            await session.execute(INSERT, ["a"])
            await asyncio.gather(fails(), late_task)
    ended.set()
    with pytest.raises(SessionClosedError):
        await late_task
    assert await names(real_database) == []
    await whole(real_database)


async def test_the_running_statement_of_a_gather_that_failed_is_cut(
    real_database: DatabaseInterface,
) -> None:
    async def fails() -> None:
        await asyncio.sleep(0.1)
        raise ZeroDivisionError

    session = real_database.get_session()
    with Elapsed() as took, pytest.raises(ZeroDivisionError):
        async with session:
            await session.execute(INSERT, ["a"])
            running = asyncio.create_task(session.fetch_value(slow(real_database, 4)))
            queued = asyncio.create_task(session.execute(INSERT, ["queued"]))
            await asyncio.gather(fails(), running, queued)
    assert took.seconds < 2.5
    with pytest.raises(SessionClosedError, match="was closed while this call was running"):
        await running
    with pytest.raises(SessionClosedError):
        await queued
    assert await names(real_database) == []
    await whole(real_database)


async def test_closing_cancelled_while_another_call_unwinds_still_ends_everything(
    real_database: DatabaseInterface,
) -> None:
    release, unwinding = asyncio.Event(), asyncio.Event()

    def stubborn() -> None:
        try:
            bridge.await_(asyncio.sleep(10))
        finally:
            unwinding.set()
            bridge.await_(release.wait())

    session = await real_database.get_session().begin()
    await session.execute(INSERT, ["a"])
    call = asyncio.create_task(session.run_sync(stubborn))
    await asyncio.sleep(0.02)
    closing = asyncio.create_task(session.close())
    await unwinding.wait()
    closing.cancel()
    assert isinstance(await outcome_of(closing), asyncio.CancelledError)
    assert session.closed
    release.set()
    assert isinstance(await outcome_of(call), SessionClosedError)
    await whole(real_database)
    assert await names(real_database) == []


async def test_closing_twice_at_once_from_two_tasks(real_database: DatabaseInterface) -> None:
    session = await real_database.get_session().begin()
    await session.execute(INSERT, ["a"])
    call = asyncio.create_task(session.fetch_value(slow(real_database, 4)))
    await asyncio.sleep(0.05)
    await asyncio.gather(session.close(), session.close())
    assert isinstance(await outcome_of(call), SessionClosedError)
    await whole(real_database)
    assert await names(real_database) == []


async def test_a_task_that_swallows_the_end_of_its_call_is_not_left_cancelled(
    real_database: DatabaseInterface,
) -> None:
    """Who closes a session cuts the call that another task has running, by cancelling that task;
    when its code goes on all the same, the task must be as whole as before."""
    began = asyncio.Event()

    def swallow() -> str:
        began.set()
        with contextlib.suppress(asyncio.CancelledError):
            bridge.await_(asyncio.Event().wait())
        return "went on"

    async def sibling(session: Session) -> tuple[str, int]:
        result = await session.run_sync(swallow)
        task = asyncio.current_task()
        assert task is not None
        async with asyncio.timeout(5):
            await asyncio.sleep(0)
        return result, task.cancelling()

    session = real_database.get_session()
    await session.begin()
    task = asyncio.create_task(sibling(session))
    await began.wait()
    await session.close()
    assert await task == ("went on", 0)
    await whole(real_database)


async def test_a_sibling_in_a_task_group_has_a_session_of_its_own(
    real_database: DatabaseInterface,
) -> None:
    done = asyncio.Event()

    async def victim() -> None:
        # On SQLite a writer would hold up the other.
        async with real_database.get_session(
            read_only=real_database.vendor == "sqlite" or None
        ) as session:
            await session.execute(
                *((COUNT,) if real_database.vendor == "sqlite" else (INSERT, ["victim"]))
            )
            await asyncio.sleep(10)

    async def saved() -> None:
        async with real_database.get_session() as session:
            await session.execute(INSERT, ["saved"])
        done.set()

    async def fails() -> None:
        await done.wait()
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            for part in (victim, saved, fails):
                group.create_task(part())
    assert caught.group_contains(ZeroDivisionError) and len(caught.value.exceptions) == 1
    assert await names(real_database) == ["saved"]
    await whole(real_database)


async def test_a_background_task_that_outlives_the_session_never_writes_into_the_next_one(
    real_database: DatabaseInterface,
) -> None:
    with pool(real_database, max_size=1):
        await real_database.connect()
    ended = asyncio.Event()

    async def later(session: Session, result: Any) -> None:
        await ended.wait()
        with pytest.raises(SessionClosedError):
            await session.execute(INSERT, ["foreign"])
        with pytest.raises(SessionClosedError):
            await result.fetch_row()

    async with real_database.get_session() as first:
        await first.add(User(name="a"))
        task = asyncio.create_task(later(first, await first.cursor("SELECT 1")))
    async with real_database.get_session() as second:
        await second.execute(INSERT, ["b"])
        ended.set()
        await task
    assert await names(real_database) == ["a", "b"]
    await whole(real_database)


async def test_a_stale_connection_or_cursor_sends_nothing(real_database: DatabaseInterface) -> None:
    with pool(real_database, max_size=1):
        await real_database.connect()

    def handles() -> Any:
        connection = connections[real_database.alias]
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        User.objects.using(real_database.alias).bulk_create([User(name=name) for name in "xyz"])
        iterator = User.objects.using(real_database.alias).iterator(chunk_size=1)
        next(iterator)
        return connection, cursor, iterator

    async with real_database.get_session() as first:
        connection, cursor, iterator = await first.run_sync(handles)
    async with real_database.get_session() as second:
        await second.execute(INSERT, ["a"])

        def use(call: Any) -> None:
            with pytest.raises(InterfaceError):
                call()

        for call in (lambda: cursor.execute(INSERT, ["foreign"]), lambda: cursor.fetchall()):
            await second.run_sync(use, call)
            await bridge.run(use, call)
        await second.run_sync(use, lambda: next(iterator))
        with pytest.raises(Exception, match=r"outside the session|block the event loop"):
            connection.cursor()
    assert await names(real_database) == ["a", "x", "y", "z"]


async def test_in_a_thread_the_connection_is_refused_with_the_remedy(
    real_database: DatabaseInterface,
) -> None:
    def in_thread(connection: Any) -> str:
        try:
            with connection.cursor() as cursor:
                cursor.execute(INSERT, ["from the thread"])
        except DatabaseError as exc:
            return str(exc)
        except InterfaceError as exc:
            return str(exc)
        return "no error"

    async with real_database.get_session() as session:
        await session.execute("SELECT 1")

        def call() -> tuple[str, str]:
            connection = connections[real_database.alias]
            return (
                bridge.await_(sync_to_async(in_thread)(connection)),
                bridge.await_(asyncio.to_thread(in_thread, connection)),
            )

        for message in await session.run_sync(call):
            assert re.search(
                "used outside the session|can only be used in that same thread", message
            )
        await session.execute(INSERT, ["a"])
    assert await names(real_database) == ["a"]


async def test_in_a_thread_the_session_itself_is_refused(real_database: DatabaseInterface) -> None:
    async with real_database.get_session() as session:
        await session.execute("SELECT 1")

        def in_thread() -> list[str]:
            errors = []
            for use in (session.execute("SELECT 1"), session.commit(), session.close()):
                with pytest.raises(WrongLoopError) as caught:
                    asyncio.run(use)
                errors.append(str(caught.value))
            with pytest.raises(WrongLoopError, match="in a thread without an event loop"):
                session.set_rollback(True)
            return errors

        for message in await asyncio.to_thread(in_thread):
            assert message.count("EventLoop") == 2
            assert "make a session in the loop that uses it" in message
        await session.execute(INSERT, ["a"])
        await session.commit()
        with pytest.raises(WrongLoopError):
            await asyncio.to_thread(lambda: asyncio.run(session.execute("SELECT 1")))
    assert await names(real_database) == ["a"]
    await whole(real_database)


async def test_a_thread_may_ask_the_loop_to_use_the_session(
    real_database: DatabaseInterface,
) -> None:
    loop = asyncio.get_running_loop()
    async with real_database.get_session() as session:

        def in_thread() -> int:
            call = session.execute(INSERT, ["a"])
            return asyncio.run_coroutine_threadsafe(call, loop).result(5)

        assert await asyncio.to_thread(in_thread) == 1
    assert await names(real_database) == ["a"]


async def test_other_aliases_are_refused_in_a_sync_call(real_database: DatabaseInterface) -> None:
    other = "sqlite" if real_database.alias == "default" else "default"

    def touch() -> None:
        User.objects.using(other).count()

    async with real_database.get_session() as session:
        with pytest.raises(InterfaceError, match=f"{other!r} is not the database of this session"):
            await session.run_sync(touch)
        with contextlib.suppress(InterfaceError):
            await session.run_sync(touch)
        await session.execute(INSERT, ["a"])
    assert await names(real_database) == ["a"]
