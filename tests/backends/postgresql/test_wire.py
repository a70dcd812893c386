"""Statements below psycopg's cursor, on a real server, in asyncio's loop and in uvloop's."""

from __future__ import annotations

import asyncio
import datetime
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from django.db import DataError, OperationalError, ProgrammingError
from django.db.utils import InterfaceError
from psycopg.types.string import TextLoader

from django_asyncsession import bridge
from django_asyncsession.backends.options import TransactionState
from django_asyncsession.backends.postgresql import wire as wires
from tests.backends.postgresql.wires import ONE, Leased, count_of, leased, promises, run_with_uvloop
from tests.faults import FaultProxy, LoopProbe, address, outcome_of
from tests.faults import watchdog as frozen_after
from tests.postgres import ask, new_name
from tests.sessions import soon


@pytest.fixture(autouse=True)
def _no_freeze() -> Iterator[None]:
    with frozen_after(60):
        yield


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
    assert own.wire._results == []


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


@pytest.mark.parametrize("promise", [*promises(globals())])
def test_with_uvloop(
    promise: Callable[..., Any], table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with_uvloop(promise, table=table, monkeypatch=monkeypatch)
