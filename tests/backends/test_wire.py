"""Statements below psycopg's cursor, on a real server, in asyncio's loop and in uvloop's."""

from __future__ import annotations

import asyncio
import contextvars
import datetime
import gc
import inspect
import os
import random
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any

import psycopg
import pytest
from django.db import DataError, Error, OperationalError, ProgrammingError
from django.db.utils import InterfaceError
from psycopg.types.string import TextLoader

from django_asyncsession import DatabaseInterface, bridge
from django_asyncsession.backends.base import BridgedMixin
from django_asyncsession.backends.options import TransactionState
from django_asyncsession.backends.postgresql import wire as wires
from django_asyncsession.backends.postgresql.connection import Connection
from django_asyncsession.backends.postgresql.wire import Wire
from django_asyncsession.pool.lease import Lease
from tests.backends.test_descriptors import Writer
from tests.faults import RESET, SERVER, FaultProxy, LoopProbe, address, cancel_at, outcome_of
from tests.faults import watchdog as frozen_after
from tests.postgres import ask, dsn_of_tests, gone, new_name, sessions_of
from tests.sessions import soon

PID = b"SELECT pg_backend_pid()"
ONE = b"SELECT 1 + $1::int"


@pytest.fixture(autouse=True)
def _no_freeze() -> Iterator[None]:
    with frozen_after(60):
        yield


class Leased:
    """A leased connection, with what is above and below it."""

    def __init__(self, db: DatabaseInterface, lease: Lease[BridgedMixin]) -> None:
        self.db, self.lease = db, lease
        self.wrapper: Any = lease.connection
        self.connection: Connection = self.wrapper.connection
        wire = self.connection.wire
        assert wire is not None
        self.wire: Wire = wire

    async def get(self, sql: bytes, *values: bytes | None, **options: Any) -> Any:
        """The first value of the first row."""
        [[value], *_] = self.wire.rows(await self.wire.execute(sql, values, **options))
        return value

    async def slowly(self, sql: str) -> Any:
        """What Django's own cursor gets."""

        def run() -> Any:
            with self.wrapper.cursor() as cursor:
                cursor.execute(sql)
                return cursor.fetchall() if cursor.description else None

        return await bridge.run_with(self.wrapper, run)

    @property
    def state(self) -> TransactionState:
        return self.wrapper.transaction_state


@asynccontextmanager
async def leased(name: str | None = None, **parameters: Any) -> AsyncIterator[Leased]:
    """A connection of a pool of its own; in the end the server has let go of it."""
    name = name or new_name()
    parameters = {"pool_max_size": 1, "application_name": name, **parameters}
    db = DatabaseInterface.from_dsn(dsn_of_tests(**parameters), alias="own")
    lease = await db.acquire()
    try:
        yield Leased(db, lease)
    finally:
        lease.release(usable=False)
        await db.close()
    assert await gone(name)


@pytest.fixture
async def own() -> AsyncIterator[Leased]:
    async with leased() as own:
        yield own


@pytest.fixture
def table() -> Iterator[str]:
    """The name of an empty table of a number and a text."""
    name = f"wire_{os.getpid()}"
    ask(f"DROP TABLE IF EXISTS {name}")
    ask(f"CREATE TABLE {name} (n int PRIMARY KEY, t text)")
    yield name
    ask(f"SET lock_timeout = 3000; DROP TABLE {name}")


def count_of(table: str) -> int:
    [[count]] = ask(f"SELECT count(*) FROM {table}")
    return int(count)


# Round trips


async def test_a_statement_takes_one_round_trip_the_first_time_and_with_begin_too() -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        leased(host="127.0.0.1", port=proxy.port) as own,
    ):

        async def cost(sql: bytes, **options: Any) -> int:
            before = proxy.round_trips
            await own.wire.execute(sql, harmless=True, **options)
            return proxy.round_trips - before

        assert await cost(b"SELECT 1") == 1
        assert await cost(b"SELECT 1") == 1
        assert await cost(b"SELECT 2", begin=b"BEGIN; SET LOCAL statement_timeout = 777") == 1
        assert own.state is TransactionState.ACTIVE
        assert await own.get(b"SHOW statement_timeout") == "777ms"
        before = proxy.round_trips
        [result] = await own.wire.simple(b"COMMIT")
        assert result.command_status == b"COMMIT" and proxy.round_trips == before + 1
        assert await cost(b"SELECT 1", begin=b"BEGIN") == 1
        assert await cost(b"SELECT 3", prepare=False) == 1
        await own.wire.simple(b"ROLLBACK")
        assert own.state is TransactionState.IDLE
        assert await cost(b"SELECT 4", prepare=False) == 1


async def test_the_reset_travels_with_the_end_of_the_transaction() -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        leased(host="127.0.0.1", port=proxy.port) as own,
    ):
        await own.slowly("SELECT 1")
        await bridge.run_with(own.wrapper, own.wrapper.reset)
        assert own.connection.reset_works and own.connection.clean
        for end in (b"COMMIT", b"ROLLBACK"):
            await own.wire.execute(b"SET search_path = pg_catalog", begin=b"BEGIN")
            assert not own.connection.clean
            before = proxy.round_trips
            [result] = await own.wire.simple(end, reset=True)
            assert proxy.round_trips == before + 1 and result.command_status == end
            assert own.connection.clean
            assert await own.get(b"SHOW search_path", harmless=True) != "pg_catalog"
        sent = proxy.received
        await own.wire.execute(b"SELECT 1", begin=b"BEGIN", harmless=True)
        await own.wire.simple(b"COMMIT", reset=True)
        assert proxy.received - sent < 200, "what is clean needs no reset"


async def test_a_statement_has_no_more_than_eight_frames_of_ours(own: Leased) -> None:
    calls: list[str] = []

    def note(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and "django_asyncsession" in frame.f_code.co_filename:
            calls.append(frame.f_code.co_name)

    for values in ([b"1"], [b"2"]):
        calls.clear()
        sys.setprofile(note)
        try:
            result = await own.wire.execute(ONE, values, harmless=True)
            rows = own.wire.rows(result)
        finally:
            sys.setprofile(None)
    assert rows == [(3,)]
    # A loop may call the reader for what was read already.
    assert {"execute", "_readable", "_collect", "_take", "rows"} == set(calls) and len(
        calls
    ) <= 8, calls


# Errors


async def test_an_error_is_djangos_and_leaves_the_connection_as_the_server_says(
    own: Leased,
) -> None:
    for prepare in (True, False):
        with pytest.raises(DataError) as caught:
            await own.wire.execute(b"SELECT 1 / $1::int", [b"0"], prepare=prepare)
        assert isinstance(caught.value.__cause__, psycopg.errors.DivisionByZero)
        assert own.state is TransactionState.IDLE
        with pytest.raises(ProgrammingError, match="nowhere"):
            await own.wire.execute(b"SELECT * FROM nowhere", prepare=prepare, begin=b"BEGIN")
        assert own.state is TransactionState.FAILED
        with pytest.raises(Exception, match="aborted"):
            await own.wire.execute(ONE, [b"1"], prepare=prepare)
        await own.wire.simple(b"ROLLBACK")
        with pytest.raises(ProgrammingError, match="syntax"):
            await own.wire.execute(ONE, [b"1"], prepare=prepare, begin=b"BEGIN NONSENSE; SELECT 1")
        assert own.state is TransactionState.IDLE
        assert await own.get(ONE, b"1", prepare=prepare) == 2
    with pytest.raises(ProgrammingError, match="nowhere"):
        await own.wire.simple(b"SELECT 1; SELECT * FROM nowhere")
    assert not own.connection.closed


async def test_too_many_values_are_one_error_and_the_connection_stays(own: Leased) -> None:
    marks = b",".join(b"$%d" % n for n in range(1, 65537))
    for prepare in (True, False):
        with pytest.raises(OperationalError, match="65535"):
            await own.wire.execute(b"SELECT " + marks, [b"1"] * 65536, prepare=prepare)
        assert await own.get(ONE, b"1") == 2


async def test_values_of_a_wrong_type_leave_no_transaction_half_begun(own: Leased) -> None:
    wrong: Any = ["no bytes"]
    await own.get(ONE, b"1")
    with pytest.raises(TypeError):
        await own.wire.execute(ONE, wrong)
    assert await own.get(ONE, b"1") == 2
    with pytest.raises(TypeError):
        await own.wire.execute(ONE, wrong, begin=b"BEGIN")
    assert own.connection.closed


@pytest.mark.parametrize("begin", [None, b"BEGIN"])
@pytest.mark.parametrize("sql", [b"COPY (SELECT 1) TO STDOUT", b"COPY pg_class FROM STDIN"])
async def test_copy_is_refused_and_closes_the_connection(
    own: Leased, sql: bytes, begin: bytes | None
) -> None:
    with pytest.raises(ProgrammingError):
        await own.wire.execute(sql, begin=begin, prepare=False)
    assert own.connection.closed


async def test_two_statements_at_once_are_refused_and_the_first_goes_on(own: Leased) -> None:
    first = asyncio.create_task(own.wire.execute(b"SELECT pg_sleep(0.2), 7"))
    await asyncio.sleep(0.05)
    with pytest.raises(InterfaceError, match="under way"):
        await own.wire.execute(ONE, [b"1"])
    with pytest.raises(InterfaceError, match="under way"):
        await own.wire.simple(b"COMMIT")
    with pytest.raises(InterfaceError, match="under way"):
        await own.slowly("SELECT 1")
    assert own.wire.rows(await first)[0][1] == 7


async def test_errors_and_results_keep_no_frame_alive(own: Leased) -> None:
    class Canary:
        pass

    async def fail() -> weakref.ref[Canary]:
        canary = Canary()
        with suppress(ProgrammingError):
            await own.wire.execute(b"SELECT nonsense")
        with suppress(DataError):
            await own.wire.execute(b"SELECT 1 / $1::int", [b"0"])
        return weakref.ref(canary)

    gc.collect()
    gc.disable()
    try:
        assert (await fail())() is None
    finally:
        gc.enable()


# What is prepared


async def test_no_more_than_a_hundred_statements_are_kept_on_the_server(own: Leased) -> None:
    counted = b"SELECT count(*) FROM pg_prepared_statements"
    for n in range(250):
        await own.wire.execute(b"SELECT %d" % n, harmless=True)
        # Used again and again, it stays.
        await own.wire.execute(ONE, [b"1"], harmless=True)
        assert own.wire.prepared <= wires.STATEMENTS
    assert await own.get(counted, prepare=False, harmless=True) == own.wire.prepared == 100
    names = b"SELECT count(*) FROM pg_prepared_statements WHERE statement = $1"
    assert await own.get(names, ONE, prepare=False) == 1
    assert await own.get(names, b"SELECT 1", prepare=False) == 0


async def test_a_reset_counts_them_and_leaves_them(own: Leased) -> None:
    mine = "SELECT count(*) FROM pg_prepared_statements WHERE name LIKE '\\_das%'"
    for n in range(5):
        await own.wire.execute(b"SELECT %d" % n)
    for _ in range(3):
        await own.slowly("SET lock_timeout = 1")
        await bridge.run_with(own.wrapper, own.wrapper.reset)
        assert await own.slowly(mine) == [(5,)]
        assert own.wire.prepared == 5 and await own.slowly("SHOW lock_timeout") == [("0",)]


@pytest.mark.parametrize("by", ["PREPARE mine AS SELECT 1", "DEALLOCATE ALL", "DISCARD ALL"])
async def test_a_reset_drops_them_where_the_lease_has_changed_what_is_prepared(
    own: Leased, by: str
) -> None:
    for n in range(5):
        await own.wire.execute(b"SELECT %d" % n)
    await own.slowly(by)
    await bridge.run_with(own.wrapper, own.wrapper.reset)
    assert await own.slowly("SELECT count(*) FROM pg_prepared_statements") == [(0,)]
    assert own.wire.prepared == 0 and await own.get(b"SELECT 1") == 1


async def test_psycopgs_deallocate_all_is_noted(own: Leased) -> None:
    own.connection.prepare_threshold = 0
    await own.get(ONE, b"1")

    def roll_back() -> None:
        own.wrapper.set_autocommit(False)
        psycopg.Cursor(own.connection).execute("SELECT %s", [1], prepare=True)
        assert own.connection._prepared._names
        own.wrapper.rollback()
        own.wrapper.set_autocommit(True)

    with own.wrapper.in_own_use():
        await bridge.run_with(own.wrapper, roll_back)
    assert own.wire.prepared == 0
    await own.wire.execute(b"SELECT 1", begin=b"BEGIN")
    assert await own.get(ONE, b"1") == 2


@pytest.mark.parametrize("change", ["ALTER TABLE {} ALTER t TYPE varchar(9)", "DEALLOCATE ALL"])
async def test_a_stale_statement_is_prepared_again_where_nothing_is_lost(
    own: Leased, table: str, change: str
) -> None:
    sql = f"SELECT t FROM {table}".encode()
    ask(f"INSERT INTO {table} VALUES (1, 'x')")

    async def spoil() -> None:
        if "ALTER" in change:
            [[now]] = ask(
                "SELECT data_type FROM information_schema.columns "
                "WHERE table_name = %s AND column_name = 't'",
                table,
            )
            ask(f"ALTER TABLE {table} ALTER t TYPE {'varchar(9)' if now == 'text' else 'text'}")
        else:
            await own.wire.simple(b"DEALLOCATE ALL")

    assert await own.get(sql) == "x"
    await spoil()
    assert await own.get(sql) == "x", "in autocommit"
    await spoil()
    assert await own.get(sql, begin=b"BEGIN ISOLATION LEVEL REPEATABLE READ") == "x"
    assert own.state is TransactionState.ACTIVE
    assert await own.get(b"SHOW transaction_isolation") == "repeatable read"
    await own.wire.simple(b"COMMIT")
    # In the middle the error is told, and the next transaction works.
    await own.wire.execute(f"INSERT INTO {table} VALUES (2, 'y')".encode(), begin=b"BEGIN")
    if "ALTER" not in change:
        await spoil()
    else:
        await own.wire.simple(b"ROLLBACK")
        await spoil()
        await own.wire.execute(b"SELECT 1", begin=b"BEGIN")
    with pytest.raises(Exception, match=r"cached plan|does not exist"):
        await own.get(sql)
    assert own.state is TransactionState.FAILED
    await own.wire.simple(b"ROLLBACK")
    assert await own.get(sql) == "x" and count_of(table) == 1


async def test_a_statement_whose_type_was_dropped_and_made_anew_works_the_second_time(
    own: Leased,
) -> None:
    name = new_name().replace("-", "_")
    sql = f"SELECT $1::{name}".encode()
    try:
        ask(f"CREATE TYPE {name} AS ENUM ('a')")
        assert await own.get(sql, b"a") == "a"
        ask(f"DROP TYPE {name}")
        ask(f"CREATE TYPE {name} AS ENUM ('a')")
        await outcome_of(own.get(sql, b"a"))
        assert await own.get(sql, b"a") == "a"
    finally:
        ask(f"DROP TYPE {name}")


# Sizes


async def test_big_values_and_results_of_many_packets_pass_while_the_loop_goes_on(
    own: Leased,
) -> None:
    big = b"x" * 30_000_000
    echo = b"SELECT $1::text, length($1::text)"
    for options in ({}, {}, {"begin": b"BEGIN"}, {"prepare": False}):
        async with LoopProbe() as probe:
            result = await own.wire.execute(echo, [big], **options)
        # The server has read all of it before it answers, and the loop has lived meanwhile.
        assert result.get_value(0, 1) == b"30000000"
        value = result.get_value(0, 0)
        assert value is not None and len(value) == len(big)
        assert probe.worst < 1
    rows = b"SELECT n, repeat('y', 1000) FROM generate_series(1, 20000) n"
    result = await own.wire.execute(rows)
    loaded = own.wire.rows(result)
    assert len(loaded) == 20000 and loaded[-1] == (20000, "y" * 1000)


async def test_a_server_that_answers_before_it_has_read_all_does_not_stop_it(
    own: Leased,
) -> None:
    """In a pipeline it writes what nobody would read, if we only wrote."""

    def run() -> None:
        with own.connection.pipeline():
            for _ in range(300):
                own.connection.execute("SELECT repeat('x', 200000), length(%s)", ["y" * 200_000])

    with own.wrapper.in_own_use():
        await bridge.run_with(own.wrapper, run)
    assert await own.get(ONE, b"1") == 2


async def test_the_answer_may_come_in_single_bytes() -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        leased(host="127.0.0.1", port=proxy.port) as own,
    ):
        proxy.chunk = 1
        for begin in (b"BEGIN", None, None):
            assert await own.get(b"SELECT repeat('x', 300)", begin=begin) == "x" * 300
        [result] = await own.wire.simple(b"COMMIT")
        assert result.command_status == b"COMMIT"
        proxy.chunk = 65536


# Rows

VALUES = """SELECT 1::smallint, 2::bigint, 3.50::numeric, 1.5::float8, true, 'x'::text, NULL::int,
    '2024-02-29'::date, '12:13:14'::time, '2024-02-29 12:00'::timestamp,
    '2024-02-29 12:00+03'::timestamptz, interval '1 day 2 hours', '{"a": [1]}'::jsonb,
    ARRAY[1, 2], ARRAY['a', NULL], '\\x00ff'::bytea, int4range(1, 5),
    'c2d29867-3d0b-d497-9191-18a9d8ee7830'::uuid, '127.0.0.1'::inet, 'c'::"char" """


async def test_values_are_those_of_djangos_cursor_whatever_is_set_meanwhile(own: Leased) -> None:
    sql = VALUES.encode()

    async def same() -> list[Any]:
        expected = await own.slowly(VALUES)
        for _ in range(2):
            rows = own.wire.rows(await own.wire.execute(sql, harmless=True))
            assert rows == expected and repr(rows) == repr(expected)
        return rows

    first = await same()
    await own.slowly("SET TIME ZONE 'Asia/Tokyo'")
    assert await same() != first
    await bridge.run_with(own.wrapper, own.wrapper.reset)
    assert await same() == first
    await own.wire.execute(b"SET TIME ZONE 'Asia/Tokyo'")
    assert await same() != first
    await own.wire.simple(b"SET TIME ZONE 'UTC'")
    assert await same() == first
    own.wrapper.timezone = datetime.timezone(datetime.timedelta(hours=5))
    own.wrapper.note_touched()
    assert await same() != first


async def test_adapters_that_are_registered_hold_at_once_until_the_lease_ends(own: Leased) -> None:
    class Loud(TextLoader):
        def load(self, data: Any) -> str:
            return f"{super().load(data)}!"

    sql = b"SELECT 'x'::text"
    assert await own.get(sql, harmless=True) == "x"
    own.connection.adapters.register_loader("text", Loud)
    assert await own.get(sql, harmless=True) == "x!"
    own.wrapper.scrub()
    assert await own.get(sql, harmless=True) == "x"
    own.connection.adapters.register_loader("text", Loud)
    assert await own.get(sql, harmless=True) == "x!"


async def test_rows_of_other_columns_under_the_same_text_are_loaded_as_they_are(
    own: Leased, table: str
) -> None:
    sql = f"SELECT * FROM {table}".encode()
    ask(f"INSERT INTO {table} VALUES (1, '2')")
    for prepare in (True, False):
        before = await own.wire.execute(sql, prepare=prepare)
        assert own.wire.rows(before) == [(1, "2")]
        ask(f"ALTER TABLE {table} ADD COLUMN m int DEFAULT 3, ALTER t TYPE int USING t::int")
        result = await own.wire.execute(sql, prepare=prepare, harmless=True)
        assert own.wire.rows(result) == [(1, 2, 3)]
        assert own.wire.rows(before) == [(1, "2")]
        ask(f"ALTER TABLE {table} DROP COLUMN m, ALTER t TYPE text")


async def test_a_result_that_was_loaded_is_not_kept(own: Leased) -> None:
    sql = b"SELECT repeat('x', 1000)"
    result = await own.wire.execute(sql)
    for _ in range(2):
        before = sys.getrefcount(result)
        own.wire.rows(result)
        assert sys.getrefcount(result) == before


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


# The lease


async def test_harmless_statements_need_no_reset() -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        leased(host="127.0.0.1", port=proxy.port) as own,
    ):
        await own.wire.execute(ONE, [b"1"], harmless=True)
        await own.wire.execute(ONE, [b"1"], begin=b"BEGIN", harmless=True)
        await own.wire.simple(b"SAVEPOINT a", harmless=True)
        await own.wire.simple(b"COMMIT")
        assert own.connection.clean
        sent = proxy.received
        assert own.wrapper.reset_at_once()
        assert own.wrapper.settle() is None and proxy.received == sent
        for touch in (
            own.wire.execute(ONE, [b"1"]),
            own.wire.execute(b"SELECT 2"),
            own.wire.simple(b"SELECT 1"),
            own.slowly("SELECT 1"),
        ):
            await touch
            assert not own.connection.clean
            await bridge.run_with(own.wrapper, own.wrapper.reset)
            assert own.connection.clean
        own.wrapper.note_touched()
        assert not own.connection.clean


async def test_an_answer_to_a_reset_that_comes_while_nobody_waits_is_no_surprise(
    own: Leased,
) -> None:
    await own.slowly("SET lock_timeout = 1")
    assert own.wrapper.reset_at_once() and own.connection.resetting
    assert own.wrapper.reset_at_once(), "it is under way"
    assert await soon(lambda: not own.connection.pgconn.is_busy())
    assert own.wrapper.is_quiet() and not own.wire.said
    assert own.wrapper.settle() is None and own.connection.clean
    assert await own.get(b"SHOW lock_timeout", harmless=True) == "0"


async def test_a_transaction_begun_by_the_wire_and_ended_by_sql_is_noticed(own: Leased) -> None:
    await own.get(ONE, b"1", begin=b"BEGIN")
    await own.slowly("COMMIT")
    assert own.wrapper.left_by_sql
    own.connection.left_by_sql = False
    await own.get(ONE, b"1", begin=b"BEGIN")
    await own.wire.simple(b"COMMIT")
    assert not own.wrapper.left_by_sql
    await own.get(ONE, b"1", begin=b"BEGIN")
    await own.wire.execute(b"COMMIT")
    assert own.wrapper.left_by_sql


async def test_both_ways_share_a_transaction(own: Leased, table: str) -> None:
    insert = f"INSERT INTO {table} VALUES ($1, 'x')".encode()
    await own.wire.execute(insert, [b"1"], begin=b"BEGIN")
    await own.slowly(f"INSERT INTO {table} VALUES (2, 'y')")
    assert await own.get(f"SELECT count(*) FROM {table}".encode()) == 2
    assert count_of(table) == 0
    await own.wire.simple(b"COMMIT")
    assert count_of(table) == 2


# Another loop


def promises() -> Iterator[Any]:
    """The tests above, with each of their parameters."""
    for name, test in list(globals().items()):
        if not name.startswith("test_") or not inspect.iscoroutinefunction(test):
            continue
        given: list[dict[str, Any]] = [{}]
        for mark in getattr(test, "pytestmark", []):
            given = [{**g, mark.args[0]: value} for g in given for value in mark.args[1]]
        for parameters in given:
            label = "-".join([name.removeprefix("test_"), *map(str, parameters.values())])
            yield pytest.param(partial(test, **parameters), id=label)


@pytest.mark.parametrize("promise", [*promises()])
def test_with_uvloop(
    promise: Callable[..., Any], table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uvloop = pytest.importorskip("uvloop")
    wanted = inspect.signature(promise).parameters

    async def run() -> None:
        async with AsyncExitStack() as stack:
            fixtures: dict[str, Any] = {"table": table, "monkeypatch": monkeypatch}
            if "own" in wanted:
                fixtures["own"] = await stack.enter_async_context(leased())
            await promise(**{name: fixtures[name] for name in wanted if name in fixtures})

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
