"""PostgreSQL: what a connection carries on, cancellation, lost servers, engines and options.

On real connections, which are the point.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import signal
import threading
import time
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from django.core.exceptions import SynchronousOnlyOperation
from django.db import (
    Error,
    IntegrityError,
    InterfaceError,
    OperationalError,
    connection,
    connections,
    transaction,
)
from django.db.backends.signals import connection_created
from django.db.utils import load_backend

from django_asyncsession import DatabaseInterface, Session, bridge, databases
from django_asyncsession.backends.base import BridgedMixin
from django_asyncsession.exceptions import PoolError, SessionClosedError
from tests.faults import (
    SERVER,
    Elapsed,
    FaultProxy,
    LoopProbe,
    OwnServer,
    address,
    cancel_at,
    outcome_of,
    watchdog,
)
from tests.models import Author, User
from tests.postgres import ask, dsn_of_tests, gone, new_name, sessions_of
from tests.sessions import soon

CANCEL_BUDGET = 2.0


@pytest.fixture(autouse=True)
def _no_freeze() -> Iterator[None]:
    with watchdog(90):
        yield


@pytest.fixture
def name() -> str:
    """An application_name that only this test uses."""
    return new_name()


@asynccontextmanager
async def interface(name: str, **parameters: Any) -> AsyncIterator[DatabaseInterface]:
    """An interface of the test's own; in the end the pool must be whole and the server empty."""
    db = DatabaseInterface.from_dsn(dsn_of_tests(application_name=name, **parameters), alias="own")
    try:
        yield db
        await assert_whole(db, name)
    finally:
        await db.close()
        assert await gone(name)


async def assert_whole(db: DatabaseInterface, name: str) -> None:
    """Nobody holds a connection, all can be had at once, and nothing runs on the server."""
    pool = db.pool()
    deadline = time.monotonic() + CANCEL_BUDGET + 1
    while pool.stats()["pool_size"] != pool.stats()["pool_available"]:
        assert time.monotonic() < deadline, repr(pool)
        await asyncio.sleep(0.01)
    assert pool.stats()["requests_waiting"] == 0 and pool._leased == 0
    assert await gone(name, where="state <> 'idle'")
    leases = [await pool.acquire(5) for _ in range(pool.options.limit)]
    assert sessions_of(name) <= pool.options.limit
    for lease in leases:
        lease.release()


@pytest.fixture
async def db(name: str) -> AsyncIterator[DatabaseInterface]:
    """An interface with one connection, so that the next borrower gets what the last one had."""
    async with interface(name, pool_max_size=1) as db:
        yield db


@pytest.fixture(scope="module")
def own_server() -> Iterator[OwnServer]:
    """A server that these tests may freeze and stop."""
    server = OwnServer()
    yield server
    server.stop()


async def pid_of(db: DatabaseInterface) -> int:
    async with db.get_session() as session:
        return int(await session.fetch_value("SELECT pg_backend_pid()"))


# What a connection carries from one session to the next: nothing

LEAKS: dict[str, tuple[str, str]] = {
    "search_path": ("SET search_path = pg_catalog", "SHOW search_path"),
    "role": ("SET ROLE pg_monitor", "SELECT current_user"),
    "session authorization": ("SET SESSION AUTHORIZATION pg_monitor", "SELECT session_user"),
    "time zone": ("SET TIME ZONE 'Asia/Tokyo'", "SHOW TimeZone"),
    "statement timeout": ("SET statement_timeout = 12345", "SHOW statement_timeout"),
    "lock timeout": ("SET lock_timeout = 12345", "SHOW lock_timeout"),
    "isolation": (
        "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
        "SHOW default_transaction_isolation",
    ),
    "read only": ("SET default_transaction_read_only = on", "SHOW default_transaction_read_only"),
    "temporary table": (
        "CREATE TEMP TABLE das_temp (a int)",
        "SELECT count(*) FROM pg_class WHERE relname = 'das_temp'",
    ),
    "advisory lock": (
        "SELECT pg_advisory_lock(4242)",
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
    ),
    "listen": ("LISTEN das_channel", "SELECT count(*) FROM pg_listening_channels()"),
    "held cursor": (
        "DECLARE das_cursor CURSOR WITH HOLD FOR SELECT 1",
        "SELECT count(*) FROM pg_cursors WHERE name = 'das_cursor'",
    ),
    "prepared statement": (
        "PREPARE das_prepared AS SELECT 1",
        "SELECT count(*) FROM pg_prepared_statements",
    ),
    "own variable": (
        "SELECT set_config('das.user', 'x', false)",
        "SELECT coalesce(current_setting('das.user', true), '')",
    ),
    "sequence": (
        "DO $$ BEGIN CREATE TEMP SEQUENCE das_s; PERFORM nextval('das_s'); END $$",
        "SELECT count(*) FROM pg_class WHERE relname = 'das_s'",
    ),
}


@pytest.mark.parametrize("autocommit", [False, True], ids=["transaction", "autocommit"])
@pytest.mark.parametrize("leak", LEAKS)
async def test_the_next_session_sees_the_default_on_the_same_connection(
    db: DatabaseInterface, leak: str, autocommit: bool
) -> None:
    statement, probe = LEAKS[leak]
    async with db.get_session() as session:
        before = await session.fetch_value(probe)
        pid = await session.fetch_value("SELECT pg_backend_pid()")
    async with db.get_session(autocommit=autocommit) as session:
        await session.execute(statement)
    async with db.get_session() as session:
        assert await session.fetch_value(probe) == before
        assert await session.fetch_value("SELECT pg_backend_pid()") == pid
    assert db.stats()["returns_bad"] == 0


def _by_cursor(statement: str) -> None:
    with connections["own"].cursor() as cursor:
        cursor.execute(statement)


def _by_many(statement: str) -> None:
    with connections["own"].cursor() as cursor:
        cursor.executemany(statement + " -- %s", [["x"]])


def _by_drivers_connection(statement: str) -> None:
    connections["own"].connection.execute(statement)


def _by_drivers_cursor(statement: str) -> None:
    with connections["own"].cursor() as cursor:
        cursor.connection.execute(statement)


def _by_drivers_own_cursor(statement: str) -> None:
    connections["own"].connection.cursor().execute(statement)


def _by_procedure(statement: str) -> None:
    with connections["own"].cursor() as cursor:
        cursor.callproc("set_config", ["search_path", "pg_catalog", False])


def _by_stream(statement: str) -> None:
    with connections["own"].cursor() as cursor:
        list(cursor.stream("SELECT set_config('search_path', 'pg_catalog', false)"))


@pytest.mark.parametrize(
    "way",
    [
        _by_cursor,
        _by_many,
        _by_drivers_connection,
        _by_drivers_cursor,
        _by_drivers_own_cursor,
        _by_procedure,
        _by_stream,
    ],
    ids=lambda way: way.__name__,
)
async def test_it_does_not_matter_how_the_statement_was_sent(
    db: DatabaseInterface, way: Callable[[str], None]
) -> None:
    async with db.get_session() as session:
        before = await session.fetch_value("SHOW search_path")
        await session.run_sync(way, "SET search_path = pg_catalog")
    async with db.get_session() as session:
        assert await session.fetch_value("SHOW search_path") == before


async def test_what_is_set_through_the_drivers_connection_is_reset(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        before = await session.fetch_value("SHOW search_path")
        driver = await session.driver_connection()
        await session.run_sync(driver.execute, "SET search_path = pg_catalog")
    async with db.get_session() as session:
        assert await session.fetch_value("SHOW search_path") == before


async def test_options_of_one_session_do_not_hold_for_the_next(db: DatabaseInterface) -> None:
    options: dict[str, Any] = {
        "isolation": "serializable",
        "read_only": True,
        "timeout": 5,
        "lock_timeout": 3,
        "idle_timeout": 7,
    }
    settings = (
        "transaction_isolation",
        "transaction_read_only",
        "statement_timeout",
        "lock_timeout",
        "idle_in_transaction_session_timeout",
    )
    given = ["serializable", "on", "5s", "3s", "7s"]

    async def seen(**options: Any) -> list[str]:
        async with db.get_session(**options) as session:
            return [await session.fetch_value(f"SHOW {setting}") for setting in settings]

    before = await seen()
    assert await seen(**options) == given
    assert await seen() == before
    assert await seen(autocommit=True, **options) == given
    assert await seen() == before


async def test_a_transaction_begun_by_sql_does_not_survive_its_session(
    db: DatabaseInterface, caplog: pytest.LogCaptureFixture, empty_tables: None
) -> None:
    pid = await pid_of(db)
    async with db.get_transaction(autocommit=True) as low:
        await low.execute("BEGIN")
        await low.execute("INSERT INTO tests_user (name, level) VALUES ('x', 1)")
    async with db.get_session() as session:
        assert await session.fetch_value("SELECT count(*) FROM tests_user") == 0
    assert await pid_of(db) == pid
    assert "was left open and is rolled back" in caplog.text


async def test_a_stream_left_early_leaves_no_cursor_and_the_connection(
    db: DatabaseInterface,
) -> None:
    pid = await pid_of(db)
    for autocommit in (False, True):
        async with db.get_session(autocommit=autocommit) as session:
            async for _ in session.stream("SELECT generate_series(1, 100000)", chunk_size=10):
                break
        async with db.get_session() as session:
            assert await session.fetch_value("SELECT count(*) FROM pg_cursors") == 0
            assert await session.fetch_value("SELECT pg_backend_pid()") == pid


async def test_an_iterator_left_in_sync_code_leaves_no_cursor(
    db: DatabaseInterface, empty_tables: None
) -> None:
    pid = await pid_of(db)

    def leave() -> None:
        for _ in User.objects.using("own").iterator(chunk_size=10):
            return

    for autocommit in (False, True):
        async with db.get_session(autocommit=autocommit) as session:
            await session.run_sync(
                lambda: User.objects.using("own").bulk_create([User(name="x")] * 100)
            )
            await session.run_sync(leave)
        async with db.get_session() as session:
            assert await session.fetch_value("SELECT count(*) FROM pg_cursors") == 0
    assert await pid_of(db) == pid


# What nothing costs


async def test_the_reset_travels_with_the_end_of_a_transaction(name: str) -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        interface(name, host="127.0.0.1", port=proxy.port, pool_max_size=1) as db,
    ):

        async def cost(statement: str, **options: Any) -> int:
            before = proxy.round_trips
            async with db.get_session(**options) as session:
                await session.execute(statement)
            return proxy.round_trips - before

        # The first time it goes alone, so that what the server cannot read fails no COMMIT.
        await cost("SELECT 1")
        await cost("SELECT 1")
        plain = [await cost("SELECT 1") for _ in range(3)]
        assert plain == [3, 3, 3], "BEGIN, the statement, COMMIT"
        assert await cost("SELECT 1", read_only=True, timeout=5) == 3
        assert await cost("SET search_path = pg_catalog") == 3
        # Without a transaction it is sent after the answer, and only the next session waits for it.
        before = proxy.round_trips
        await cost("SELECT 1", autocommit=True)
        await cost("SELECT 1")
        assert proxy.round_trips - before == 2 + 3


# Options of DATABASES


def entry(**changes: Any) -> dict[str, Any]:
    """A complete entry of DATABASES for the test database, changed."""
    made = dict(DatabaseInterface.from_dsn(dsn_of_tests())._settings_dict)
    made["OPTIONS"] = {**made["OPTIONS"], **changes.pop("OPTIONS", {})}
    return {**made, **changes}


async def test_djangos_options_hold_also_after_a_reset() -> None:
    from django.db.backends.postgresql.psycopg_any import IsolationLevel

    options = {
        "isolation_level": IsolationLevel.SERIALIZABLE,
        "assume_role": "pg_monitor",
        "server_side_binding": True,
        "options": "-c lock_timeout=1234",
        "pool": {"max_size": 1},
    }
    probes = ["transaction_isolation", "role", "lock_timeout", "TimeZone"]
    settings = entry(OPTIONS=options, TIME_ZONE="Asia/Tokyo")
    async with DatabaseInterface("own", settings) as db:
        for _ in range(2):
            async with db.get_session() as session:
                seen = [await session.fetch_value(f"SHOW {probe}") for probe in probes]
                assert seen[:3] == ["serializable", "pg_monitor", "1234ms"]
                assert seen[3] == "Asia/Tokyo"
                # The server binds: it has to be told the type of a bare parameter.
                assert await session.fetch_value("SELECT %s::int + 1", [1]) == 2
                factory = await session.run_sync(
                    lambda: connections["own"].connection.cursor_factory
                )
                assert "ServerBinding" in factory.__name__
                await session.execute("SET lock_timeout = 99")
        async with db.get_session(read_only=True) as session:
            assert await session.fetch_value("SHOW transaction_isolation") == "serializable"
        async with db.get_session(isolation="read committed") as session:
            assert await session.fetch_value("SHOW transaction_isolation") == "read committed"


# Engines


@pytest.mark.parametrize("engine", ["tests.thirdparty", "django_asyncsession.backends.postgresql"])
async def test_an_engine_of_ones_own_is_bridged(engine: str) -> None:
    db = DatabaseInterface("own", entry(ENGINE=engine))
    await db.connect()
    async with db.get_session() as session:
        wrapper: Any = await session.run_sync(lambda: connections["own"])
        assert isinstance(wrapper, BridgedMixin)
        assert isinstance(wrapper, load_backend(engine).DatabaseWrapper)
        if engine == "tests.thirdparty":
            assert wrapper.ops.third_party() == "third party"
            assert await session.fetch_value("SHOW third.party") == "was here"
        async with LoopProbe() as probe:
            await session.execute("SELECT pg_sleep(0.2)")
        assert probe.worst < 0.1
        await session.execute("SET third.party = 'gone'")
    if engine == "tests.thirdparty":
        async with db, db.get_session() as session:
            assert await session.fetch_value("SHOW third.party") == "was here"


async def test_what_a_receiver_of_connection_created_sets_every_session_has(
    db: DatabaseInterface,
) -> None:
    def receive(connection: Any, **kwargs: Any) -> None:
        if connection.alias == "own":
            with connection.cursor() as cursor:
                cursor.execute("SET statement_timeout = '77s'")

    connection_created.connect(receive)
    try:
        seen = []
        for statement in ("SELECT 1", "SET statement_timeout = '1s'", "SET ROLE pg_monitor"):
            async with db.get_session() as session:
                seen.append(await session.fetch_value("SHOW statement_timeout"))
                await session.execute(statement)
        assert seen == ["77s"] * 3 and db.stats()["connections_num"] == 1
    finally:
        connection_created.disconnect(receive)


def test_our_engine_works_in_sync_code() -> None:
    wrapper: Any = load_backend("django_asyncsession.backends.postgresql").DatabaseWrapper(
        entry(ENGINE="django_asyncsession.backends.postgresql", TIME_ZONE=None), "own"
    )
    try:
        with wrapper.cursor() as cursor:
            cursor.execute("SELECT 1 + %s", [1])
            assert cursor.fetchone() == (2,)
        wrapper.set_autocommit(False)
        with wrapper.cursor() as cursor:
            cursor.execute("CREATE TABLE das_never (a int)")
        wrapper.rollback()
        wrapper.set_autocommit(True)
        assert "das_never" not in wrapper.introspection.table_names()
    finally:
        wrapper.close()


async def test_outside_a_session_djangos_guards_hold_as_ever() -> None:
    wrapper: Any = load_backend("django_asyncsession.backends.postgresql").DatabaseWrapper(
        entry(ENGINE="django_asyncsession.backends.postgresql"), "own"
    )
    with pytest.raises(SynchronousOnlyOperation):
        wrapper.cursor()
    with pytest.raises(SynchronousOnlyOperation):
        connection.cursor()


async def test_our_engine_awaits_in_the_bridge_although_nobody_pooled_it() -> None:
    wrapper: Any = load_backend("django_asyncsession.backends.postgresql").DatabaseWrapper(
        entry(ENGINE="django_asyncsession.backends.postgresql"), "own"
    )

    def use() -> None:
        with wrapper.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(0.8)")

    try:
        async with LoopProbe() as probe:
            # Receivers of connection_created ask for the connection of the alias.
            await bridge.run_with(wrapper, use)
        assert probe.worst < 0.6
    finally:
        await bridge.run(wrapper.close)


# Really async


async def test_a_hundred_sessions_sleep_at_the_same_time_and_no_thread_is_started(
    own_server: OwnServer,
) -> None:
    db = DatabaseInterface.from_dsn(own_server.dsn() + "?pool_max_size=100", alias="own")
    leases = await asyncio.gather(*(db.acquire() for _ in range(100)))
    for lease in leases:
        lease.release()
    threads = threading.active_count()

    async def sleep() -> None:
        async with db.get_session() as session:
            await session.execute("SELECT pg_sleep(0.3)")

    times = []
    for _ in range(3):
        with Elapsed() as took:
            await asyncio.gather(*(sleep() for _ in range(100)))
        times.append(took.seconds)
    assert min(times) < 1, "one after the other they need 30"
    assert threading.active_count() == threads
    await db.close()


async def test_an_abandoned_connection_is_replaced_while_a_slow_link_delays_nobody_else(
    name: str,
) -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        interface(name, host="127.0.0.1", port=proxy.port, pool_max_size=2) as db,
    ):
        await asyncio.gather(db.ping(), db.ping())
        proxy.delay = 0.1
        async with LoopProbe() as probe:
            with Elapsed() as took:
                await asyncio.gather(db.ping(), db.ping())
        proxy.delay = 0
        assert 0.2 < took.seconds < 0.6 and probe.worst < 0.1


async def test_the_answer_may_come_in_single_bytes(name: str) -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        interface(name, host="127.0.0.1", port=proxy.port, pool_max_size=1) as db,
    ):
        proxy.chunk = 1
        async with db.get_session() as session:
            assert await session.fetch_value("SELECT repeat('x', 500)") == "x" * 500
        proxy.chunk = 65536


# Cancellation


async def test_a_cancelled_statement_ends_on_the_server_and_its_process_with_it(
    db: DatabaseInterface, name: str
) -> None:
    async def sleep() -> None:
        async with db.get_session() as session:
            await session.execute("SELECT pg_sleep(60)")

    task = asyncio.create_task(sleep())
    while not sessions_of(name, "state = 'active'"):
        await asyncio.sleep(0.01)
    async with LoopProbe() as probe:
        task.cancel()
        with Elapsed() as took, pytest.raises(asyncio.CancelledError):
            await task
    assert took.seconds < CANCEL_BUDGET and probe.worst < 0.1
    assert await gone(name)
    await db.ping()


async def test_cancelled_at_every_step_the_row_is_there_or_not_and_the_pool_is_whole(
    db: DatabaseInterface, name: str, empty_tables: None
) -> None:
    async def insert(step: int) -> None:
        async with db.get_session() as session:
            await session.execute(
                "INSERT INTO tests_user (name, level) VALUES (%s, 1)", [f"a{step}"]
            )
            async with session.begin_nested():
                await session.execute(
                    "INSERT INTO tests_user (name, level) VALUES (%s, 1)", [f"b{step}"]
                )

    for step in range(1, 200):
        run = cancel_at(insert(step), {step})
        outcome = await outcome_of(run)
        assert outcome is None or isinstance(outcome, asyncio.CancelledError), (step, outcome)
        rows = ask("SELECT count(*) FROM tests_user WHERE name = ANY(%s)", [f"a{step}", f"b{step}"])
        assert rows[0][0] in (0, 2), step
        await assert_whole(db, name)
        if run.done:
            assert rows[0][0] == 2
            return
    raise AssertionError("it never ends")


async def test_1000_cancels_leak_no_file_and_never_exceed_max_size(name: str) -> None:
    rng = random.Random(3)
    async with interface(name, pool_max_size=4) as db:
        most = 0

        async def victim() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rng.random() / 20), db.get_session() as session:
                    await session.execute("SELECT pg_sleep(%s)", [rng.random() / 20])

        async def batch() -> None:
            nonlocal most
            tasks = [asyncio.create_task(victim()) for _ in range(8)]
            while (await asyncio.wait(tasks, timeout=0.01))[1]:
                most = max(most, sessions_of(name))

        await batch()
        await assert_whole(db, name)
        files = len(os.listdir("/proc/self/fd"))
        for _ in range(124):
            await batch()
        await assert_whole(db, name)
        assert len(os.listdir("/proc/self/fd")) <= files + 1
        assert 1 < most <= 4
        assert db.stats()["returns_bad"] > 100


async def test_a_late_cancel_never_hits_the_next_user(name: str) -> None:
    rng = random.Random(4)
    async with interface(name, pool_max_size=1) as db:

        async def victim() -> None:
            async with db.get_session() as session:
                await session.execute("SELECT pg_sleep(%s)", [rng.random() / 100])

        async def next_user() -> None:
            async with db.get_session() as session:
                await session.execute("SELECT pg_sleep(0.005)")

        for _ in range(150):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rng.random() / 100):
                    await victim()
            await next_user()


@pytest.mark.parametrize("where", ["connect", "check"])
async def test_cancelled_while_connecting_or_checking_no_place_is_lost(
    name: str, where: str
) -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        interface(
            name, host="127.0.0.1", port=proxy.port, pool_max_size=1, pool_check="true"
        ) as db,
    ):
        if where == "check":
            await db.ping()
        proxy.freeze()
        task = asyncio.create_task(db.ping())
        await asyncio.sleep(0.1)
        task.cancel()
        with Elapsed() as took, pytest.raises(asyncio.CancelledError):
            await task
        assert took.seconds < 0.5
        proxy.thaw()
        await db.ping()


async def test_a_frozen_network_costs_no_more_than_the_budget(name: str) -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        interface(name, host="127.0.0.1", port=proxy.port, pool_max_size=1) as db,
    ):
        await db.ping()
        files = len(os.listdir("/proc/self/fd"))

        async def query() -> None:
            async with db.get_session() as session:
                await session.execute("SELECT 1")
                proxy.freeze()
                await session.execute("SELECT 2")

        async with LoopProbe() as probe:
            with Elapsed() as took, pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await query()
            assert took.seconds < 0.3 + CANCEL_BUDGET
            with Elapsed() as took, pytest.raises(PoolError):
                await db.pool().acquire(CANCEL_BUDGET + 0.5)
        assert probe.worst < 0.1
        proxy.thaw()
        proxy.reset()
        # The pool was connecting in the moment of the reset, and tells one caller of it.
        await outcome_of(db.ping())
        await db.ping()
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= files + 4  # two proxied connections at most


async def test_stopped_server_processes_keep_their_places_and_run_nothing_afterwards(
    own_server: OwnServer,
) -> None:
    db = DatabaseInterface.from_dsn(
        own_server.dsn() + "?pool_max_size=3&pool_timeout=40&application_name=stopped", alias="own"
    )
    admin = own_server.connect()

    def sessions() -> list[Any]:
        sql = "SELECT pid, query FROM pg_stat_activity WHERE application_name = 'stopped'"
        return admin.execute(sql).fetchall()

    def running() -> list[int]:
        return [pid for pid, query in sessions() if "/* marked */" in query]

    async def run(sql: str) -> Any:
        async with db.get_session(autocommit=True) as session:
            return await session.fetch_value(sql)

    tasks = [asyncio.create_task(run("SELECT pg_sleep(60) /* marked */")) for _ in range(3)]
    assert await soon(lambda: len(running()) == 3, 10)
    stopped = running()[:2]
    try:
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        later = [asyncio.create_task(run("SELECT 1 FROM pg_sleep(0.5)")) for _ in range(9)]
        most = 0
        until = time.monotonic() + CANCEL_BUDGET + 2
        while time.monotonic() < until:
            most = max(most, len(sessions()))
            await asyncio.sleep(0.05)
        assert most == 3
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    assert await asyncio.gather(*later) == [1] * 9
    assert await soon(lambda: not running(), 10)
    await db.close()
    admin.close()


async def test_a_stopped_server_process_is_replaced_in_the_end_while_it_is_still_stopped(
    own_server: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("django_asyncsession.pool.pool.UNTOLD_BUDGET", 0.5)
    db = DatabaseInterface.from_dsn(own_server.dsn() + "?pool_max_size=1", alias="own")
    pid = await pid_of(db)

    async def query() -> None:
        async with db.get_session() as session:
            await session.execute("SELECT 1")
            os.kill(pid, signal.SIGSTOP)
            await session.execute("SELECT 2")

    try:
        async with LoopProbe() as probe:
            with Elapsed() as took, pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await query()
            assert took.seconds < CANCEL_BUDGET
            with Elapsed() as took:
                assert await pid_of(db) != pid
            assert took.seconds < CANCEL_BUDGET + 2
        assert probe.worst < 0.1
        with Elapsed() as took:
            await db.close()
        assert took.seconds < CANCEL_BUDGET + 0.5
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_closing_the_pool_cuts_who_still_uses_it_also_when_close_is_cancelled(
    name: str,
) -> None:
    for cancelled in (False, True):
        async with interface(name, pool_max_size=3) as db:

            async def use(db: DatabaseInterface = db) -> None:
                async with db.get_session() as session:
                    await session.execute("SELECT pg_sleep(60)")

            users = [asyncio.create_task(outcome_of(use())) for _ in range(6)]
            while sessions_of(name, "state = 'active'") < 3:
                await asyncio.sleep(0.01)
            closing = asyncio.create_task(db.close(grace=0.2))
            await asyncio.sleep(0.1)
            if cancelled:
                closing.cancel()
            await outcome_of(closing)
            with Elapsed() as took:
                outcomes = await asyncio.gather(*users)
            assert took.seconds < 1
            assert all(isinstance(outcome, OperationalError) for outcome in outcomes), outcomes
            assert await gone(name, CANCEL_BUDGET)


@pytest.mark.parametrize("pause", range(4))
async def test_cancelled_again_after_every_step_it_ends_in_time_and_the_pool_is_whole(
    db: DatabaseInterface, name: str, pause: int, empty_tables: None
) -> None:
    async def insert() -> None:
        async with db.get_session() as session, session.begin_nested():
            await session.execute("INSERT INTO tests_user (name, level) VALUES ('x', 1)")
            await session.execute("SELECT pg_sleep(60)")

    await db.ping()
    task = asyncio.create_task(insert())
    for _ in range(pause * 3):
        await asyncio.sleep(0)
    if pause == 3:
        while not sessions_of(name, "query LIKE '%%pg_sleep%%' AND state = 'active'"):
            await asyncio.sleep(0.01)
    with Elapsed() as took:
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
    assert isinstance(await outcome_of(task), asyncio.CancelledError)
    assert took.seconds < CANCEL_BUDGET
    await assert_whole(db, name)
    assert ask("SELECT count(*) FROM tests_user") == [(0,)]


# Nobody resumes it


async def suspended_session(db: DatabaseInterface, session: Session) -> Any:
    """A coroutine in the middle of a statement, in a transaction, that nobody drives any more."""

    async def work() -> None:
        async with session:
            await session.execute("INSERT INTO tests_user (name, level) VALUES ('x', 1)")
            await session.execute("SELECT pg_sleep(60)")

    coroutine: Any = work()
    futures = 0
    while futures < 100:
        future = coroutine.send(None)
        futures += 1
        if future is not None:
            future._asyncio_future_blocking = False
            if sessions_of(str(session.info["name"]), "query LIKE '%%pg_sleep%%'"):
                return coroutine
            await asyncio.wait([future], timeout=0.2)
    raise AssertionError("never slept")


@pytest.mark.parametrize("end", ["close", "collect", "collect in a thread"])
async def test_a_session_that_nobody_resumes_is_rolled_back_and_its_place_free(
    db: DatabaseInterface,
    name: str,
    end: str,
    empty_tables: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await db.ping()
    session = db.get_session()
    session.info["name"] = name
    holder = [await suspended_session(db, session)]
    del session
    gc.disable()
    try:
        with warnings.catch_warnings():
            # The session may tell that it was never closed, or be closed by its block.
            warnings.simplefilter("ignore", ResourceWarning)
            if end == "close":
                holder.pop().close()
            elif end == "collect":
                holder.clear()
            else:
                await asyncio.to_thread(holder.clear)
                # A greenlet that another thread let go of ends at the next switch of its own.
                await bridge.run(lambda: None)
            with Elapsed() as took:
                assert await pid_of(db)
    finally:
        gc.enable()
    assert took.seconds < 1
    assert await gone(name, where="query LIKE '%%pg_sleep%%' AND state = 'active'")
    assert ask("SELECT count(*) FROM tests_user") == [(0,)]
    assert caplog.text == ""


async def test_a_session_that_is_forgotten_gives_its_place_back_without_the_collector(
    db: DatabaseInterface, name: str
) -> None:
    gc.collect()
    gc.disable()
    try:
        session = db.get_session()
        await session.begin()
        await session.execute("SELECT 1")
        with pytest.warns(ResourceWarning, match="test_postgresql.py"):
            del session
            async with asyncio.timeout(2):
                await db.ping()
    finally:
        gc.enable()


async def test_an_error_through_nested_blocks_keeps_its_class_and_keeps_nothing_alive(
    db: DatabaseInterface, empty_tables: None
) -> None:
    def fail() -> None:
        with transaction.atomic("own"), transaction.atomic("own"), transaction.atomic("own"):
            Author.objects.using("own").create(name="twice")
            Author.objects.using("own").create(name="twice")

    gc.collect()
    gc.disable()
    try:
        session = db.get_session()
        alive = weakref.ref(session)
        with contextlib.suppress(IntegrityError):
            async with session:
                await session.run_sync(fail)
                raise AssertionError("no error")
        assert session.closed
        del session
        assert alive() is None
    finally:
        gc.enable()


EVERY_KIND: dict[str, Callable[[Session], Any]] = {
    "execute": lambda s: s.execute("SELECT pg_sleep(0.05)"),
    "fetch_all": lambda s: s.fetch_all("SELECT * FROM generate_series(1, 500)"),
    "script": lambda s: s.execute_script("SELECT pg_sleep(0.02); SELECT 1"),
    "orm": lambda s: s.run_sync(lambda: list(User.objects.using("own").all())),
    "nested": lambda s: s.run_sync(_nested),
    "wrong": lambda s: outcome_of(s.execute("SELECT nonsense")),
    "reset": lambda s: s.execute("SET search_path = pg_catalog"),
}


def _nested() -> None:
    with transaction.atomic("own"), transaction.atomic("own"):
        User.objects.using("own").count()


@pytest.mark.parametrize("kind", EVERY_KIND)
async def test_the_loop_is_not_held_up_by(db: DatabaseInterface, kind: str) -> None:
    worst = []
    # The best of three: another process may have had the processor.
    for _ in range(3):
        async with LoopProbe() as probe:
            with contextlib.suppress(Error):
                async with db.get_session() as session:
                    await EVERY_KIND[kind](session)
            db.pool().discard_idle()
            await db.ping()
        worst.append(probe.worst)
    assert min(worst) < 0.05


# Lost servers


def terminate(name: str) -> None:
    ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s", name)


async def test_a_backend_terminated_in_a_query_is_one_error_and_the_next_works(
    db: DatabaseInterface, name: str
) -> None:
    async def query() -> None:
        async with db.get_session() as session:
            await session.execute("SELECT pg_sleep(60)")

    pid = await pid_of(db)
    task = asyncio.create_task(query())
    while not sessions_of(name, "state = 'active'"):
        await asyncio.sleep(0.01)
    terminate(name)
    with pytest.raises(OperationalError, match="terminating connection") as caught:
        await task
    assert isinstance(caught.value.__cause__, psycopg.errors.AdminShutdown)
    assert await pid_of(db) != pid
    assert db.stats()["returns_bad"] == 1


async def test_terminated_between_two_statements_nothing_is_written_behind_ones_back(
    db: DatabaseInterface, name: str, empty_tables: None
) -> None:
    insert = "INSERT INTO tests_user (name, level) VALUES ('x', 1)"
    with pytest.raises(Error):
        async with db.get_session() as session:
            await session.execute(insert)
            terminate(name)
            for _ in range(3):
                with pytest.raises(Error):
                    await session.execute(insert)
    assert ask("SELECT count(*) FROM tests_user") == [(0,)]
    await db.ping()


async def test_idle_too_long_in_a_transaction_the_servers_reason_is_told(
    db: DatabaseInterface,
) -> None:
    with pytest.raises(Error, match="idle-in-transaction"):
        async with db.get_session(idle_timeout=0.1) as session:
            await session.execute("SELECT 1")
            await asyncio.sleep(0.3)
            await session.execute("SELECT 2")
    await db.ping()


async def test_with_check_nobody_notices_that_all_idle_connections_were_killed(name: str) -> None:
    async with interface(name, pool_max_size=5, pool_check="true") as db:
        for _ in range(3):
            leases = [await db.acquire() for _ in range(5)]
            for lease in leases:
                lease.release()
            terminate(name)
            await asyncio.gather(*(db.ping() for _ in range(50)))


async def test_without_check_connections_that_were_killed_cost_no_error(name: str) -> None:
    async with interface(name, pool_max_size=5) as db:
        leases = [await db.acquire() for _ in range(5)]
        for lease in leases:
            lease.release()
        terminate(name)
        while sessions_of(name):
            await asyncio.sleep(0.01)
        for _ in range(20):
            await db.ping()


async def test_a_reset_in_the_middle_of_a_result_is_an_error_and_no_short_result(
    name: str,
) -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        interface(name, host="127.0.0.1", port=proxy.port, pool_max_size=1) as db,
    ):
        seen = 0

        def hook(who: str, data: bytes) -> str | None:
            nonlocal seen
            seen += len(data) if who == SERVER else 0
            return "reset" if seen > 200_000 else None

        async with db.get_session() as session:
            await session.execute("SELECT 1")
            proxy.hook = hook
            with pytest.raises(OperationalError):
                await session.fetch_all("SELECT repeat('x', 1000) FROM generate_series(1, 5000)")
            proxy.hook = None
            await session.rollback()
        await db.ping()


async def test_a_server_that_was_down_is_found_again(name: str) -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        interface(name, host="127.0.0.1", port=proxy.port, pool_max_size=3) as db,
    ):
        await db.ping()
        await proxy.refuse()
        proxy.reset()
        outcomes = [await outcome_of(db.ping()) for _ in range(5)]
        assert all(isinstance(outcome, OperationalError) for outcome in outcomes)
        attempts = db.stats()["connections_num"]
        assert attempts <= 6
        await proxy.accept()
        with Elapsed() as took:
            await asyncio.gather(*(outcome_of(db.ping()) for _ in range(10)))
            await db.ping()
        assert took.seconds < 3


async def test_too_many_connections_for_the_server_are_waited_for(own_server: OwnServer) -> None:
    with own_server.connect() as admin:
        admin.execute("ALTER ROLE guarded CONNECTION LIMIT 3")
        db = DatabaseInterface.from_dsn(
            own_server.dsn("guarded", OwnServer.PASSWORD) + "?pool_max_size=10&pool_timeout=10",
            alias="own",
        )

        async def work() -> None:
            async with db.get_session() as session:
                await session.execute("SELECT pg_sleep(0.02)")

        await db.connect()
        outcomes = await asyncio.gather(*(outcome_of(work()) for _ in range(60)))
        assert [outcome for outcome in outcomes if outcome is not None] == []
        assert db.stats()["pool_size"] <= 4
        await db.close()
        admin.execute("ALTER ROLE guarded CONNECTION LIMIT -1")


async def test_a_password_changed_while_the_pool_lives_is_told_and_a_function_is_asked_again(
    own_server: OwnServer,
) -> None:
    current = OwnServer.PASSWORD
    made = dict(DatabaseInterface.from_dsn(own_server.dsn("guarded"))._settings_dict)
    made["OPTIONS"] = {"password": lambda: current}
    db = DatabaseInterface("own", made)
    await db.ping()
    with own_server.connect() as admin:
        admin.execute("ALTER ROLE guarded PASSWORD 'rotated'")
        db.pool().discard_idle()
        with pytest.raises(OperationalError, match="authentication failed"):
            await db.ping()
        current = "rotated"
        await asyncio.sleep(0.15)
        await db.ping()
        admin.execute(f"ALTER ROLE guarded PASSWORD '{OwnServer.PASSWORD}'")
    await db.close()


# Stale handles


async def test_a_handle_of_a_session_that_ended_sends_nothing(name: str) -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        interface(name, host="127.0.0.1", port=proxy.port, pool_max_size=1) as db,
    ):
        async with db.get_session() as session:
            cursor = await session.run_sync(lambda: connections["own"].cursor())
            await session.run_sync(cursor.execute, "SELECT generate_series(1, 10)")
            wrapper: Any = await session.run_sync(lambda: connections["own"])
            driver = wrapper.connection
        sent = proxy.received
        uses: list[Callable[[], Any]] = [
            lambda: cursor.execute("SELECT 1"),
            lambda: cursor.fetchone(),
            lambda: list(cursor),
            lambda: driver.execute("SELECT 1"),
            lambda: wrapper.connection.execute("SELECT 1"),
            driver.commit,
        ]
        async with db.get_session() as other:
            await other.execute("SELECT 1")
            sent = proxy.received
            for use in uses:
                with pytest.raises((SessionClosedError, InterfaceError, SynchronousOnlyOperation)):
                    use()
        assert proxy.received - sent < 300, "COMMIT with the reset, and nothing more"


async def test_a_handle_in_a_thread_is_refused(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        wrapper: Any = await session.run_sync(lambda: connections["own"])
        with pytest.raises(SessionClosedError, match="outside the session that leased it"):
            await asyncio.to_thread(wrapper.connection.execute, "SELECT 1")


# Context


async def test_django_finds_its_own_connections_again_after_a_session() -> None:
    before = {alias: connections[alias] for alias in connections}
    async with databases["default"].get_session() as session:
        inside = await session.run_sync(lambda: connections["default"])
        assert inside is not before["default"]
        assert {alias: connections[alias] for alias in connections} == before
        with pytest.raises(ZeroDivisionError):
            await session.run_sync(lambda: 1 / 0)
        assert {alias: connections[alias] for alias in connections} == before
    assert {alias: connections[alias] for alias in connections} == before
    await databases.close_all()


async def test_code_may_remove_the_connection_it_was_served(db: DatabaseInterface) -> None:
    async with db.get_session() as session:

        def remove() -> str:
            del connections["own"]
            return "removed"

        assert await session.run_sync(remove) == "removed"
        assert await session.fetch_value("SELECT 1") == 1


async def test_sessions_of_two_databases_nest(db: DatabaseInterface) -> None:
    async with databases["default"].get_session() as outer, db.get_session() as inner:

        def use_both() -> tuple[Any, ...]:
            first = bridge.await_(inner.fetch_value("SELECT 2"))
            with connections["default"].cursor() as cursor:
                cursor.execute("SELECT 1")
                return cursor.fetchone()[0], first

        assert await outer.run_sync(use_both) == (1, 2)
    await databases.close_all()


async def test_uvloop_works_as_well(name: str) -> None:
    uvloop = pytest.importorskip("uvloop")
    dsn = dsn_of_tests(application_name=name, pool_max_size=2)

    async def main() -> None:
        db = DatabaseInterface.from_dsn(dsn, alias="own")
        await asyncio.gather(*(db.ping() for _ in range(10)))
        for _ in range(5):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05), db.get_session() as session:
                    await session.execute("SELECT pg_sleep(10)")
        assert await gone(name, where="state = 'active'")
        await db.ping()

    def thread() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())

    await asyncio.to_thread(thread)
    assert await gone(name)
