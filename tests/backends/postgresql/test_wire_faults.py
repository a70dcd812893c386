"""A wire whose statements are cut, whose server is lost or speaks unasked, in a loop of others."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from django.db import Error, OperationalError

from django_asyncsession import DatabaseInterface, bridge
from django_asyncsession.backends.base import BridgedMixin
from django_asyncsession.backends.options import TransactionState
from django_asyncsession.backends.postgresql.wire import Wire
from django_asyncsession.pool.lease import Lease
from tests.backends.postgresql.wires import (
    ONE,
    PID,
    Leased,
    count_of,
    leased,
    promises,
    run_with_uvloop,
)
from tests.backends.test_descriptors import Writer
from tests.faults import RESET, SERVER, FaultProxy, address, cancel_at, outcome_of
from tests.faults import watchdog as frozen_after
from tests.postgres import ask, dsn_of_tests, gone, new_name, sessions_of
from tests.sessions import soon


@pytest.fixture(autouse=True)
def _no_freeze() -> Iterator[None]:
    with frozen_after(60):
        yield


# Between two statements


async def test_notices_reach_the_handlers(own: Leased) -> None:
    said: list[str] = []
    own.connection.add_notice_handler(lambda notice: said.append(notice.message_primary or ""))
    await own.wire.execute(b"DO $$ BEGIN RAISE NOTICE 'one'; END $$")
    await own.wire.simple(b"DO $$ BEGIN RAISE NOTICE 'two'; END $$")
    assert said == ["one", "two"]


async def test_what_comes_between_two_statements_is_noted_and_not_lost(own: Leased) -> None:
    await own.wire.simple(b"LISTEN wire_channel")
    assert own.wrapper.is_quiet() and not own.wire.said
    ask("NOTIFY wire_channel, 'first'")
    assert await soon(lambda: own.wire.said)
    assert not own.wrapper.is_quiet() and not own.wire.is_dead

    def heard() -> list[str]:
        return [note.payload for note in own.connection.notifies(timeout=5, stop_after=1)]

    with own.wrapper.in_own_use():
        # It was read already, and is in no socket any more.
        assert await bridge.run_with(own.wrapper, heard) == ["first"]
        assert own.wrapper.is_quiet()
        ask("NOTIFY wire_channel, 'second'")
        assert await soon(lambda: own.wire.said)
        assert await own.get(ONE, b"1") == 2
        assert await bridge.run_with(own.wrapper, heard) == ["second"]
    got: list[str] = []
    own.connection.add_notify_handler(lambda note: got.append(note.payload))
    ask("NOTIFY wire_channel, 'third'")
    assert await soon(lambda: own.wire.said)
    await own.get(ONE, b"1")
    assert got == ["third"]


async def test_what_nobody_reads_is_left_in_the_socket(own: Leased) -> None:
    def copy() -> int:
        with (
            own.connection.cursor() as cursor,
            cursor.copy(
                "COPY (SELECT repeat('x', 9999) FROM generate_series(1, 20000)) TO STDOUT"
            ) as copy,
        ):
            size = len(copy.read())
            # 200 MB, of which only what the socket holds may come.
            bridge.await_(asyncio.sleep(0.3))
            assert not own.wire._reads
            return size + sum(map(len, copy))

    with own.wrapper.in_own_use():
        assert await bridge.run_with(own.wrapper, copy) == 200_000_000
    assert await own.get(ONE, b"1") == 2


async def test_the_end_of_the_server_is_known_without_a_query_and_its_reason_is_told(
    own: Leased,
) -> None:
    pid = await own.get(PID)
    assert not own.wire.is_dead
    ask("SELECT pg_terminate_backend(%s)", pid)
    assert await soon(lambda: own.wire.is_dead)
    assert not own.wrapper.is_quiet()
    with pytest.raises(OperationalError, match="terminating connection") as caught:
        await own.get(ONE, b"1")
    assert isinstance(caught.value.__cause__, psycopg.errors.AdminShutdown)
    assert own.state is TransactionState.UNKNOWN


async def test_idle_too_long_in_a_transaction_the_servers_reason_is_told(own: Leased) -> None:
    begin = b"BEGIN; SET LOCAL idle_in_transaction_session_timeout = 50"
    await own.get(ONE, b"1", begin=begin)
    assert await soon(lambda: own.wire.is_dead)
    with pytest.raises(Error, match="idle-in-transaction") as caught:
        await own.get(ONE, b"1")
    assert own.wrapper.ended_before(caught.value)


# Lost servers


async def test_a_backend_terminated_in_a_statement_is_one_error() -> None:
    name = new_name()
    async with leased(name) as own:
        await own.get(ONE, b"1")
        running = asyncio.create_task(outcome_of(own.wire.execute(b"SELECT pg_sleep(60)")))
        assert await soon(lambda: sessions_of(name, "state = 'active'") == 1)
        ask(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s",
            name,
        )
        error = await running
        assert isinstance(error, OperationalError), error
        assert isinstance(error.__cause__, psycopg.errors.AdminShutdown)
        assert await soon(lambda: own.state is TransactionState.UNKNOWN)
        with pytest.raises(OperationalError):
            await own.get(ONE, b"1")


@pytest.mark.parametrize("begin", [None, b"BEGIN"])
async def test_a_reset_in_the_middle_of_a_result_is_an_error_and_no_short_result(
    begin: bytes | None,
) -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        leased(host="127.0.0.1", port=proxy.port) as own,
    ):
        seen = 0

        def hook(who: str, data: bytes) -> str | None:
            nonlocal seen
            seen += len(data) if who == SERVER else 0
            return RESET if seen > 300_000 else None

        proxy.hook = hook
        sql = b"SELECT repeat('x', 1000) FROM generate_series(1, 5000)"
        with pytest.raises(OperationalError):
            await own.wire.execute(sql, begin=begin)
        assert own.state is TransactionState.UNKNOWN and own.connection.closed


async def test_the_word_on_commit_counts_when_the_reset_behind_it_is_lost(table: str) -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        leased(host="127.0.0.1", port=proxy.port) as own,
    ):
        await own.slowly("SELECT 1")
        await bridge.run_with(own.wrapper, own.wrapper.reset)
        sql = f"INSERT INTO {table} VALUES (1, 'x')".encode()

        pieces = 0

        async def hook(who: str, data: bytes) -> str | None:
            nonlocal pieces
            pieces += who == SERVER
            if pieces < 2:
                return None
            await asyncio.sleep(0.1)
            return RESET

        proxy.chunk = 40
        await own.wire.execute(sql, begin=b"BEGIN")
        # The answer comes in many pieces, all of which but the first are lost.
        proxy.hook = hook
        outcome = await outcome_of(own.wire.simple(b"COMMIT", reset=True))
        assert count_of(table) == 1
        assert not isinstance(outcome, BaseException) and outcome[0].command_status == b"COMMIT"
        assert own.connection.closed


# Cut


OPTIONS: dict[str, dict[str, Any]] = {
    "first": {},
    "known": {},
    "begin": {"begin": b"BEGIN"},
    "unprepared": {"prepare": False},
}


@pytest.mark.parametrize("how", OPTIONS)
async def test_cancelled_at_any_suspension_the_connection_is_closed_and_the_statement_ended(
    how: str,
) -> None:
    name = new_name()
    sql = b"SELECT pg_sleep($1::float)"
    for step in range(1, 9):
        async with leased(name) as own:
            if how == "known":
                await own.wire.execute(sql, [b"0"])
            run = cancel_at(
                own.wire.execute(sql, [b"60" if step == 1 else b"0"], **OPTIONS[how]), {step}
            )
            outcome = await outcome_of(run)
            if not isinstance(outcome, BaseException):
                assert run.suspensions < step
                assert own.state is not TransactionState.UNKNOWN
                break
            assert isinstance(outcome, asyncio.CancelledError), outcome
            assert own.wrapper.cut and own.connection.closed
            assert own.state is TransactionState.UNKNOWN
            with pytest.raises(OperationalError):
                await own.get(ONE, b"1")
        assert await gone(name)
    assert step > 1


async def test_cancelled_before_a_big_value_is_sent_it_is_closed_and_nothing_is_written(
    table: str,
) -> None:
    async with leased() as own:
        sql = f"INSERT INTO {table} VALUES (1, $1)".encode()
        run = own.wire.execute(sql, [b"x" * 50_000_000])
        outcome = await outcome_of(cancel_at(run, {1}))
        assert isinstance(outcome, asyncio.CancelledError)
        assert own.connection.closed
    assert count_of(table) == 0


async def test_cancelled_before_djangos_cursor_has_sent_a_big_value_its_place_is_free_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server waits for the rest of it, and reads no cancelling."""
    name = new_name()
    parameters = dsn_of_tests(pool_max_size=1, application_name=name)
    async with DatabaseInterface.from_dsn(parameters, alias="own") as db:
        is_full, write = asyncio.Event(), Wire._write

        def noted(self: Wire) -> None:
            write(self)
            is_full.set()

        monkeypatch.setattr(Wire, "_write", noted)

        async def use() -> None:
            async with db.get_session() as session:
                await session.execute("SELECT length(%s)", ["x" * 50_000_000])

        running = asyncio.create_task(outcome_of(use()))
        await is_full.wait()
        running.cancel()
        await asyncio.wait([running])
        async with asyncio.timeout(5):
            await db.ping()
    assert await gone(name)


@pytest.mark.parametrize("end", ["close", "collect", "collect in a thread"])
async def test_a_statement_that_nobody_resumes_is_ended_with_its_connection(end: str) -> None:
    name = new_name()
    async with leased(name) as own:
        await own.get(ONE, b"1")
        holder: list[Any] = [own.wire.execute(b"SELECT pg_sleep(60)")]
        future = holder[0].send(None)
        future._asyncio_future_blocking = False
        assert await soon(lambda: sessions_of(name, "state = 'active'") == 1)
        if end == "close":
            holder.pop().close()
        elif end == "collect":
            holder.clear()
        else:
            await asyncio.to_thread(holder.clear)
        del future
        assert await soon(lambda: own.connection.closed, 1)
        own.lease.release(usable=False)
        assert await gone(name, 2)


async def test_a_connection_closed_by_another_task_is_closed_by_the_one_that_waits(
    own: Leased,
) -> None:
    await own.get(ONE, b"1")
    for slow in (False, True):
        if slow:
            running = asyncio.create_task(outcome_of(own.slowly("SELECT pg_sleep(60)")))
        else:
            running = asyncio.create_task(outcome_of(own.wire.execute(b"SELECT pg_sleep(60)")))
        assert await soon(lambda: own.wire.waits)
        fd = own.connection.pgconn.socket
        before = os.fstat(fd).st_ino
        own.connection.abandon()
        assert os.fstat(fd).st_ino == before, "nobody else can have got its number"
        outcome = await running
        assert isinstance(outcome, OperationalError) and "another task" in str(outcome)
        assert own.connection.closed
        return


async def test_a_storm_of_cancellations_leaves_the_pool_whole() -> None:
    rng, name = random.Random(5), new_name()
    db = DatabaseInterface.from_dsn(
        dsn_of_tests(pool_max_size=4, application_name=name), alias="own"
    )

    async def use() -> None:
        lease = await db.acquire()
        usable = False
        try:
            wrapper: Any = lease.connection
            wire: Wire = wrapper.connection.wire
            await wire.execute(b"SELECT pg_sleep($1::float)", [b"0.005"], begin=b"BEGIN")
            await wire.execute(ONE, [b"1"])
            await wire.simple(b"COMMIT")
            usable = True
        finally:
            lease.release(usable=usable)

    async def victim() -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(rng.random() / 30):
                await use()

    for _ in range(15):
        await asyncio.gather(*(victim() for _ in range(10)))
    await asyncio.gather(*(use() for _ in range(8)))
    assert await soon(lambda: db.stats()["pool_size"] == db.stats()["pool_available"])
    assert sessions_of(name) <= 4 and await gone(name, where="state <> 'idle'")
    await db.close()


# Descriptors and the loop


async def test_descriptors_of_others_are_never_touched() -> None:
    writers = [Writer() for _ in range(4)]
    for writer in writers:
        writer.start()
    files = len(os.listdir("/proc/self/fd"))
    try:
        for kill in (False, True) * 5:
            async with leased() as own:
                running = asyncio.create_task(outcome_of(own.wire.execute(b"SELECT pg_sleep(9)")))
                assert await soon(lambda own=own: own.wire.waits)
                if kill:
                    ask("SELECT pg_terminate_backend(%s)", own.connection.info.backend_pid)
                else:
                    own.lease.release(usable=False)
                assert isinstance(await running, OperationalError)
                # Whatever has the number now, the loop does not watch it.
                await asyncio.sleep(0.01)
    finally:
        for writer in writers:
            writer.stop.set()
            writer.join()
    assert [writer.damaged for writer in writers] == [0] * 4
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= files


async def test_a_reader_of_the_users_on_the_same_socket_does_not_take_ours_off(
    own: Leased,
) -> None:
    loop = asyncio.get_running_loop()
    loop.add_reader(own.connection.fileno(), lambda: None)
    assert await own.get(ONE, b"1") == 2
    loop.remove_reader(own.connection.fileno())
    assert await own.get(ONE, b"1") == 2
    assert await own.slowly("SELECT 1") == [(1,)]


async def test_the_reader_is_off_while_it_is_paused_and_on_again_with_the_next_statement(
    own: Leased,
) -> None:
    own.wire.pause()
    pgconn = own.connection.pgconn
    done = threading.Event()

    def block() -> None:
        for _ in range(200):
            pgconn.exec_(b"SELECT repeat('x', 10000)")
        done.set()

    await asyncio.to_thread(block)
    assert done.is_set() and await own.get(ONE, b"1") == 2
    own.wire.pause()
    own.wire.pause()
    assert await own.slowly("SELECT 1") == [(1,)]
    own.wire.resume()
    own.wire.resume()
    assert await own.get(ONE, b"1") == 2


async def test_no_context_of_a_caller_is_kept() -> None:
    class Canary:
        pass

    var: contextvars.ContextVar[Canary] = contextvars.ContextVar("canary")

    async def connect() -> tuple[Any, DatabaseInterface, Lease[BridgedMixin]]:
        canary = Canary()
        var.set(canary)
        db = DatabaseInterface.from_dsn(dsn_of_tests(), alias="own")
        lease = await db.acquire()
        wire: Wire = lease.connection.connection.wire
        await wire.execute(b"SELECT length($1)", [b"x" * 5_000_000])
        wire.pause()
        wire.resume()
        return weakref.ref(canary), db, lease

    canary, db, lease = await asyncio.create_task(connect())
    await asyncio.sleep(0)
    gc.collect()
    assert canary() is None
    lease.release()
    await db.close()


async def test_where_the_loop_has_no_readers_sessions_work_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(self: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(Wire, "resume", none)
    async with DatabaseInterface.from_dsn(dsn_of_tests(pool_max_size=1), alias="own") as db:
        async with db.get_session() as session:
            assert await session.fetch_value("SELECT 1") == 1
        lease = await db.acquire()
        assert lease.connection.connection.wire is None
        lease.release()


async def test_a_loop_that_ends_takes_its_connections_with_it() -> None:
    name = new_name()

    def run(close: bool) -> None:
        async def use() -> None:
            db = DatabaseInterface.from_dsn(dsn_of_tests(application_name=name), alias="own")
            lease = await db.acquire()
            await lease.connection.connection.wire.execute(ONE, [b"1"])
            lease.release()
            if close:
                await db.close()

        asyncio.run(use())

    for close in (True, False):
        await asyncio.to_thread(run, close)
        gc.collect()
        assert await gone(name)


# Another loop


@pytest.mark.parametrize("promise", [*promises(globals())])
def test_with_uvloop(
    promise: Callable[..., Any], table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with_uvloop(promise, table=table, monkeypatch=monkeypatch)
